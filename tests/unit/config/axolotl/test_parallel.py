import json

import pytest

from stoker.config.axolotl.parallel import Parallel, read


def test_fsdp_1_and_2_and_prefixed_names_are_the_same():
    first = read(
        {
            "fsdp": ["full_shard", "auto_wrap"],
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_offload_params": True,
                "fsdp_sharding_strategy": "FULL_SHARD",
                "fsdp_state_dict_type": "FULL_STATE_DICT",
                "fsdp_limit_all_gathers": True,
                "fsdp_use_orig_params": False,
            },
        }
    )
    second = read(
        {
            "fsdp_version": 2,
            "fsdp_config": {
                "offload_params": True,
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
            },
        }
    )

    assert first == second
    assert first == Parallel("fsdp2", offload_parameters=True, options={"state_dict_type": "FULL_STATE_DICT"})


@pytest.mark.parametrize(
    ("strategy", "reshards"), [("FULL_SHARD", True), ("SHARD_GRAD_OP", False), ("HYBRID_SHARD", True)]
)
def test_a_sharding_strategy_of_fsdp_1_says_whether_weights_are_let_go(strategy, reshards):
    assert read({"fsdp_config": {"fsdp_sharding_strategy": strategy}}).reshard_after_forward is reshards


def test_fsdp_may_be_a_list_alone():
    found = read({"fsdp": ["shard_grad_op", "offload"]})

    assert (found.strategy, found.offload_parameters, found.reshard_after_forward) == ("fsdp2", True, False)


def test_deepspeed_is_a_path_or_its_content(tmp_path):
    content = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))

    assert read({"deepspeed": content}) == read({"deepspeed": str(path)})
    assert read({"deepspeed": content}).zero_stage == 3
    assert read({"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_all.json"}).offload_parameters
    assert read({"deepspeed": "deepspeed_configs/zero1.json"}).zero_stage == 1


def test_sizes_of_groups_are_kept():
    found = read({"dp_shard_size": 4, "tensor_parallel_size": 2, "sequence_parallel_degree": 2})

    assert (found.data_shards, found.tensor_parallel, found.context_parallel) == (4, 2, 2)


def test_a_file_for_one_gpu_asks_for_nothing():
    assert read({"learning_rate": 1}) == Parallel()


def test_devices_with_rows_of_their_own_multiply_the_batch(config, line):
    keys = {"dp_shard_size": 2, "dp_replicate_size": 2, "micro_batch_size": 1, "gradient_accumulation_steps": 3}

    assert config(**keys).train.batch_size == 12
    assert config(**keys).engine.micro_batch_size == 1
    assert line(**keys).kind == "honoured"


@pytest.mark.parametrize("name", ["tensor_parallel_size", "expert_parallel_size"])
def test_on_one_gpu_a_strategy_changes_nothing(line, name):
    found = line(**{name: 2})

    assert found.kind == "no effect"
    assert "on one GPU it runs as single" in found.text


def test_the_patience_of_processes_with_each_other_is_taken(config):
    assert config(ddp_timeout=600).engine.hang_timeout == 600.0
