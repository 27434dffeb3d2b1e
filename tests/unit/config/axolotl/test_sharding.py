"""FSDP's settings, of either version and in any spelling, become `engine.strategy` and `engine.fsdp2`."""

import pytest

from stoker.config.axolotl.sharding import MEMBERS

SHARED = {"offload": "cpu", "reshard_after_forward": True}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"fsdp": ["full_shard", "auto_wrap"]}, {"reshard_after_forward": True}),
        ({"fsdp": "full_shard auto_wrap offload"}, SHARED),
        ({"fsdp": ["shard_grad_op"]}, {"reshard_after_forward": False}),
        ({"fsdp": True}, {}),
        ({"fsdp_config": {"fsdp_offload_params": True, "fsdp_sharding_strategy": "FULL_SHARD"}}, SHARED),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True, "reshard_after_forward": True}}, SHARED),
        ({"fsdp_config": {"reshard_after_forward": False}}, {"reshard_after_forward": False}),
        ({"fsdp_config": {"sharding_strategy": 2}}, {"reshard_after_forward": False}),
        ({"fsdp_config": {"reshard_after_forward": "SHARD_GRAD_OP"}}, {"reshard_after_forward": False}),
        ({"dp_shard_size": 4, "dp_replicate_size": 2}, {"replicas": 2}),
    ],
)
def test_weights_are_shared_as_asked(config, keys, expected):
    engine = config(**keys).engine
    assert engine.strategy == "fsdp2"
    assert engine.fsdp2.model_dump(exclude_unset=True) == expected


def test_no_shard_is_ddp(config):
    assert config(fsdp=["no_shard"]).engine.strategy == "ddp"
    assert config(fsdp_config={"sharding_strategy": "NO_SHARD"}).engine.strategy == "ddp"


@pytest.mark.parametrize("keys", [{"fsdp": []}, {"fsdp": False}, {"fsdp_version": 2}, {"dp_replicate_size": 2}])
def test_what_does_not_ask_for_it_leaves_the_plan_free(config, keys):
    assert config(**keys).engine.strategy == "auto"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fsdp": "full_shrad"}, "'full_shrad' is no word of FSDP's. Did you mean full_shard?"),
        ({"fsdp": ["full_shard", "autowrap"]}, "Did you mean auto_wrap?"),
        ({"fsdp_config": {"sharding_strategy": "FULL_SHARDS"}}, "Did you mean full_shard?"),
        ({"fsdp_config": {"fsdp_state_dict_type": "FULL_STATEDICT"}}, "Did you mean full_state_dict?"),
        ({"fsdp_config": {"auto_wrap_policy": "TRANSFORMERS_BASED_WRAP"}}, "Did you mean transformer_based_wrap?"),
        ({"fsdp_config": {"offload_params": "maybe"}}, "it must be true or false"),
        ({"fsdp_version": 3}, "it must be 1 or 2"),
    ],
)
def test_a_misspelt_value_is_refused_with_what_was_meant(problem, keys, words):
    assert words in problem(**keys)


@pytest.mark.parametrize("name", ["activation_checkpointing", "use_orig_params", "cpu_ram_efficient_loading"])
@pytest.mark.parametrize("prefix", ["", "fsdp_"])
def test_members_that_set_nothing_are_read_too(translated, name, prefix):
    found = translated(fsdp_config={f"{prefix}{name}": True})
    (line,) = [line for line in found.report.lines if line.name.startswith("fsdp_config")]
    assert line.kind in ("automatic", "no effect")
    assert not found.problems


def test_groups_need_their_number(translated):
    (line,) = [line for line in translated(fsdp=["hybrid_shard"]).report.lines if line.name == "fsdp"]
    assert "replicas to the number of machines" in line.note


def test_every_member_of_the_table_is_read():
    from stoker.config.axolotl.table import KEYS

    names = {key.removeprefix("fsdp_config.").removeprefix("fsdp_") for key in KEYS if key.startswith("fsdp_config.")}
    assert names == set(MEMBERS)
