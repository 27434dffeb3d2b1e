"""What Axolotl does with a key, one by one."""

import json
import re

import pytest

from stoker.config import document
from stoker.config.axolotl.outcome import KINDS, Reading, UnreadableError
from stoker.config.axolotl.table import KEYS
from stoker.config.axolotl.translate import translate
from stoker.config.load import load
from stoker.errors import ConfigError

from .conftest import LORA, MINIMAL


@pytest.mark.parametrize("blank", [None, "", [], {}])
def test_a_blank_value_is_as_if_the_key_were_not_there(translated, blank):
    keys = sorted({name.partition(".")[0].partition("[")[0] for name in KEYS} - {*MINIMAL})

    found = translated(**dict.fromkeys(keys, blank))

    assert not found.problems
    assert found.values == translated().values
    assert {line.text for line in found.report.lines if line.name in keys} == {"blank: as if it were not there"}


@pytest.mark.parametrize("written", ["2e-5", "'2e-5'", "0.00002", "2.0E-5"])
def test_a_number_may_be_written_in_quotes(tmp_path, written):
    path = tmp_path / "their.yml"
    path.write_text(f"base_model: a/b\ndatasets: [{{path: rows.jsonl, type: alpaca}}]\nlearning_rate: {written}\n")

    assert load(path).train.learning_rate == 2e-5


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("on", True), ("no", False), ("off", False)])
def test_booleans_of_yaml_1_1_are_booleans(translated, written, value):
    read = document.scalar(written)

    assert read == written  # our reader follows YAML 1.2
    assert translated(sample_packing=read).values["data"]["packing"] is value


def test_merge_keys_are_obeyed(tmp_path):
    path = tmp_path / "their.yml"
    path.write_text(
        "x: &rows {path: rows.jsonl, type: alpaca}\nbase_model: a/b\nlearning_rate: 1e-4\n"
        "datasets:\n  - {<<: *rows, type: completion}\n"
    )

    (source,) = load(path, allow_unknown=True).data.train

    assert (source.path, source.format) == ("rows.jsonl", "completion")


# Length and batches


def test_sequence_len_is_512_unless_set(config):
    assert config().data.sequence_length == 512
    assert config(sequence_len=4096).data.sequence_length == 4096


def test_max_steps_wins_over_num_epochs(config, line):
    assert config(num_epochs=3, max_steps=10).train.steps == 10
    assert config(num_epochs=3, max_steps=10).train.epochs is None
    assert config(num_epochs=3, max_steps=-1).train.epochs == 3.0
    assert line(num_epochs=3, max_steps=10).kind == "no effect"


@pytest.mark.parametrize(
    ("keys", "rows", "micro"),
    [
        ({}, 1, 1),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4}, 8, 2),
        ({"micro_batch_size": 2, "batch_size": 8}, 8, 2),
        ({"gradient_accumulation_steps": 4, "batch_size": 8}, 8, 2),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 4, "batch_size": 8}, 8, 2),
        ({"micro_batch_size": 4}, 4, 4),
    ],
)
def test_batch_size_is_micro_batch_times_accumulation(config, keys, rows, micro):
    found = config(**keys)

    assert (found.train.batch_size, found.engine.micro_batch_size) == (rows, micro)


def test_batch_sizes_that_contradict_each_other_are_refused(translated):
    found = translated(micro_batch_size=2, gradient_accumulation_steps=4, batch_size=16)

    assert "micro_batch_size x gradient_accumulation_steps is 8, but batch_size is 16" in str(found.problems[0])


# Schedule


@pytest.mark.parametrize(
    ("keys", "steps", "ratio"),
    [
        ({"warmup_steps": 10}, 10, None),
        ({"warmup_steps": 0.1}, None, 0.1),
        ({"warmup_steps": "0.1"}, None, 0.1),
        ({"warmup_ratio": 0.05}, None, 0.05),
        ({"warmup_steps": 0, "warmup_ratio": 0.05}, None, 0.05),
        ({"warmup_steps": 0}, 0, None),
        ({}, None, 0.03),
        ({"max_steps": 1000}, None, 0.03),
        ({"max_steps": 100000}, None, 0.001),
        ({"warmup_steps": 10, "max_steps": 10}, 9, None),
    ],
)
def test_warmup_steps_given_as_a_fraction_are_a_ratio(config, keys, steps, ratio):
    schedule = config(**keys).train.schedule

    assert (schedule.warmup_steps, schedule.warmup_ratio) == (steps, ratio)


def test_both_warmups_are_refused(translated):
    assert "both set" in str(translated(warmup_steps=10, warmup_ratio=0.1).problems[0])


@pytest.mark.parametrize(
    ("keys", "kind", "floor"),
    [
        ({}, "cosine", 0.0),
        ({"lr_scheduler": "linear"}, "linear", 0.0),
        ({"lr_scheduler": "constant_with_warmup"}, "constant", None),
        ({"cosine_min_lr_ratio": 0.1}, "cosine", 0.1),
        ({"lr_scheduler": "linear", "cosine_min_lr_ratio": 0.1}, "linear", 0.0),
        ({"lr_scheduler": "polynomial"}, "linear", 1e-7 / 2e-4),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-5}}, "cosine", 0.1),
        ({"cosine_min_lr_ratio": 1.0, "cosine_constant_lr_ratio": 0}, "cosine", 1.0),
    ],
)
def test_schedules_have_our_names_and_floors(config, keys, kind, floor):
    schedule = config(**keys).train.schedule

    assert schedule.kind == kind
    assert getattr(schedule, "floor", None) == pytest.approx(floor)


def test_the_constant_schedule_of_transformers_has_no_warmup(config, line):
    assert config(lr_scheduler="constant", warmup_steps=10).train.schedule.warmup_steps is None
    assert line(warmup_steps=10, lr_scheduler="constant").kind == "no effect"


# Evaluation and checkpoints


@pytest.mark.parametrize(
    ("keys", "steps", "epochs"),
    [
        ({"evals_per_epoch": 4}, None, 0.25),
        ({"eval_steps": 50}, 50, None),
        ({"eval_steps": 0.1, "num_epochs": 2}, None, 0.2),
        ({"eval_steps": 0.25, "max_steps": 10}, 3, None),
        ({"eval_strategy": "epoch"}, None, 1.0),
        ({"evaluation_strategy": "epoch"}, None, 1.0),
        ({"eval_strategy": "no", "num_epochs": 3}, None, 3.0),
        ({"evals_per_epoch": 0, "num_epochs": 3}, None, 3.0),
        ({"num_epochs": 3}, None, 3.0),
        ({"eval_strategy": "steps"}, 500, None),
        ({"eval_strategy": "steps", "eval_steps": 20}, 20, None),
    ],
)
def test_evals_per_epoch_are_intervals(config, keys, steps, epochs):
    train = config(val_set_size=0.1, **keys).train

    assert (train.evaluate_every_steps, train.evaluate_every_epochs) == (steps, epochs)


def test_evaluation_without_rows_has_no_effect(config, line):
    assert config(evals_per_epoch=4, val_set_size=0).data.validation is None
    assert line(evals_per_epoch=4, val_set_size=0.0).kind == "no effect"


@pytest.mark.parametrize(
    ("keys", "steps", "epochs"),
    [
        ({}, None, 1.0),
        ({"saves_per_epoch": 2}, None, 0.5),
        ({"save_steps": 100}, 100, None),
        ({"save_steps": 0.5, "num_epochs": 4}, None, 2.0),
        ({"save_strategy": "no", "num_epochs": 4}, None, 4.0),
        ({"save_strategy": "epoch"}, None, 1.0),
        ({"save_strategy": "steps", "save_steps": 10}, 10, None),
    ],
)
def test_saves_per_epoch_are_intervals(config, keys, steps, epochs):
    output = config(**keys).output

    assert (output.save_every_steps, output.save_every_epochs) == (steps, epochs)


def test_two_intervals_at_once_are_refused(translated):
    assert "both set" in str(translated(saves_per_epoch=1, save_steps=10).problems[0])
    assert "both set" in str(translated(val_set_size=0.1, evals_per_epoch=1, eval_steps=10).problems[0])


def test_checkpoints_kept_are_four_unless_set(config):
    assert config().output.keep_last == 4
    assert config(save_total_limit=2).output.keep_last == 2


def test_early_stopping_needs_rows(config, problem):
    assert config(early_stopping_patience=3, val_set_size=0.1).train.early_stopping.patience == 3
    assert "no rows are held out" in problem(early_stopping_patience=3)


@pytest.mark.parametrize(("size", "held_out"), [(0.05, 0.05), ("0.05", 0.05), (200, 200), (200.0, 200), (0, None)])
def test_val_set_size_is_a_share_or_a_count(config, size, held_out):
    assert config(val_set_size=size).data.validation == held_out


@pytest.mark.parametrize("size", [1, -0.1, 1.5])
def test_a_val_set_size_that_is_neither_is_refused(problem, size):
    assert "share below 1 or a count" in problem(val_set_size=size)


def test_test_datasets_are_validation_rows(config, translated):
    rows = [{"path": "held-out.jsonl", "type": "alpaca"}]

    assert config(test_datasets=rows).data.validation[0].path == "held-out.jsonl"
    assert "both set" in str(translated(test_datasets=rows, val_set_size=0.1).problems[0])


# Rows


def test_packing_implies_rows_of_full_length(config, line):
    assert config(sample_packing=True).data.packing is True
    assert config().data.packing is False
    assert line(pad_to_sequence_len=False, sample_packing=True).kind == "automatic"


@pytest.mark.parametrize(
    ("asked", "ours"), [("drop", "drop"), ("truncate", "truncate"), ("raise", "stop"), (None, "drop")]
)
def test_long_rows_are_dropped_unless_asked_otherwise(config, asked, ours):
    assert config(excess_length_strategy=asked).data.on_long == ours


def test_training_on_inputs_learns_every_turn(config):
    assert config(train_on_inputs=True).data.train_on == "all"
    assert config(train_on_inputs=False).data.train_on == "assistant"


def test_a_dataset_brings_its_fields(config):
    (source,) = config(
        datasets=[
            {
                "path": "json",
                "data_files": "rows.jsonl",
                "type": "chat_template",
                "field_messages": "dialogue",
                "message_property_mappings": {"role": "from", "content": "value", "name": "author"},
                "message_field_training": "learn",
                "message_field_training_detail": "spans",
                "roles": {"assistant": ["gpt", "model"]},
                "roles_to_train": ["assistant"],
                "train_on_eos": "last",
                "drop_system_message": True,
                "field_thinking": "thought",
                "template_thinking_key": "thinking",
            }
        ],
        chat_template_kwargs={"enable_thinking": False},
        eot_tokens=["<|eot_id|>"],
    ).data.train

    assert (source.path, source.file_type, source.format) == ("rows.jsonl", "jsonl", "chat")
    assert source.fields.model_dump(exclude_defaults=True) == {
        "messages": "dialogue",
        "role": "from",
        "content": "value",
        "message_properties": {"name": "author"},
        "train": "learn",
        "train_detail": "spans",
        "thinking": "thought",
    }
    assert source.chat.model_dump(exclude_defaults=True) == {
        "roles": {"assistant": ["gpt", "model"]},
        "train_on": ["assistant"],
        "train_on_end_of_turn": "last",
        "drop_system_message": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_a_prompt_may_be_written_out_as_the_type(config):
    (source,) = config(
        datasets=[
            {
                "path": "rows.jsonl",
                "type": {
                    "system_prompt": "Be brief.",
                    "field_instruction": "question",
                    "field_output": "answer",
                    "format": "Q: {instruction}\nA:",
                },
            }
        ]
    ).data.train

    assert source.format == "prompt"
    assert source.prompt.format == "Q: {instruction}\nA:"
    assert source.prompt.system == "Be brief."
    assert (source.fields.instruction, source.fields.output) == ("question", "answer")


def test_completion_rows_alone_are_pretraining(config, line):
    rows = [{"path": "texts.jsonl", "type": "completion", "field": "chapter"}]
    found = config(datasets=rows)

    assert found.task.kind == "pretrain"
    assert found.data.on_long == "split"
    assert found.data.train[0].fields.text == "chapter"
    assert line(chat_template="chatml", datasets=rows).kind == "no effect"


def test_a_chat_template_is_named_or_written_out(config, problem):
    assert config(chat_template="chatml").model.chat_template == "chatml"
    assert config(chat_template="tokenizer_default").model.chat_template is None
    assert config(chat_template_jinja="{{ messages }}").model.chat_template == "{{ messages }}"
    assert config(chat_template="jinja", chat_template_jinja="chat.jinja").model.chat_template == "chat.jinja"
    assert "needs chat_template_jinja" in problem(chat_template="jinja")


# The adapter


def test_qlora_needs_4_bits(config, problem):
    qlora = LORA | {"adapter": "qlora"}

    assert config(**qlora, load_in_4bit=True).model.quantization == "nf4"
    assert "qlora needs load_in_4bit: true" in problem(**qlora)
    assert "qlora needs load_in_4bit: true" in problem(**qlora, load_in_4bit=False)


def test_bits_without_an_adapter_are_refused(problem):
    assert "without an adapter" in problem(load_in_4bit=True)


def test_lora_in_8_bits_is_int8(config):
    assert config(**LORA, load_in_8bit=True).model.quantization == "int8"


def test_targets_are_names_a_pattern_or_all_linear(config):
    some = LORA | {"lora_target_linear": None}

    assert config(**LORA).adapter.targets == "all-dense"
    assert config(**LORA, lora_target_modules=["q_proj"]).adapter.targets == "all-dense"
    assert config(**some, lora_target_modules=["q_proj", "v_proj"]).adapter.targets == ["q_proj", "v_proj"]
    assert config(**some, lora_target_modules=r".*\.(q|v)_proj").adapter.targets == r".*\.(q|v)_proj"


def test_unset_targets_are_every_linear_layer_and_said_so(config, translated):
    unset = {key: value for key, value in LORA.items() if key != "lora_target_linear"}

    assert config(**unset).adapter.targets == "all-dense"
    assert "no targets are named" in translated(**unset).notes["adapter", "targets"]


def test_experts_are_targets_where_they_are_named(config):
    some = LORA | {"lora_target_linear": None, "lora_target_parameters": ["experts.gate_up_proj"]}

    assert config(**some).adapter.targets == ["experts.gate_up_proj"]
    assert config(**some, lora_target_modules=["q_proj"]).adapter.targets == ["q_proj", "experts.gate_up_proj"]
    assert config(**LORA, lora_target_parameters=["experts.down_proj"]).adapter.targets == "all-linear"
    pattern = config(**some, lora_target_modules=r".*\.(q|v)_proj").adapter.targets
    names = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [name for name in names if re.fullmatch(pattern, name)] == names[:2]


def test_changes_to_the_models_configuration_are_overrides(config, line):
    scaling = {"rope_type": "linear", "factor": 2.0}

    assert config(model_config={"output_router_logits": True}).model.overrides == {"output_router_logits": True}
    assert config(overrides_of_model_config={"rope_scaling": scaling}).model.overrides == {"rope_scaling": scaling}
    assert config(rope_scaling=scaling).model.overrides == {"rope_scaling": scaling}
    assert line(model_config={"use_cache": False}).kind == "no effect"


def test_layers_to_transform_are_a_pattern(config):
    targets = config(
        **LORA | {"lora_target_linear": None},
        lora_target_modules=["q_proj"],
        peft_layers_to_transform=[0, 11],
    ).adapter.targets

    names = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 11, 111) for name in ("q_proj", "k_proj")]
    assert [name for name in names if re.fullmatch(targets, name)] == [names[0], names[4]]


def test_without_an_adapter_its_keys_have_no_effect(config, line):
    assert config(lora_r=16, adapter=None).adapter is None
    assert line(lora_r=16).kind == "no effect"


def test_dora_and_rank_stabilised_lora(config):
    found = config(**LORA, peft_use_dora=True, peft_use_rslora=True).adapter

    assert (found.kind, found.rank_stabilized) == ("dora", True)


# Precision and kernels


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({"bf16": "auto"}, "auto"),
        ({"bf16": True}, "bf16"),
        ({"bf16": "full"}, "bf16"),
        ({"bf16": "auto", "fp16": True}, "fp16"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"bf16": False, "fp16": False}, "fp32"),
        ({"bf16": "auto", "fp16": False}, "auto"),
        ({"bfloat16": True}, "bf16"),
        ({"float16": True}, "fp16"),
        ({"bf16": False, "float32": True}, "fp32"),
        ({}, "auto"),
    ],
)
def test_precision(config, keys, precision):
    assert config(**keys).engine.precision == precision


@pytest.mark.parametrize(
    "name", ["flash_attention", "sdp_attention", "flex_attention", "xformers_attention", "eager_attention"]
)
def test_the_old_names_of_attention_are_automatic(line, name):
    assert line(**{name: True}).kind == "automatic"
    assert line(**{name: False}).kind == "no effect"


def test_two_of_the_old_names_are_refused(translated):
    assert "both true" in str(translated(flash_attention=True, sdp_attention=True).problems[0])


def test_coarse_attention_is_exact_here_and_sparse_attention_is_refused(line):
    assert line(sage_attention=True).kind == "automatic"
    assert line(attn_implementation="fp8").kind == "automatic"
    assert line(s2_attention=True).kind == "refused"


def test_fp8_is_done_over_a_frozen_base(config, line):
    assert config(**LORA, fp8=True).model.quantization == "fp8"
    assert line(fp8=True).kind == "no effect"


@pytest.mark.parametrize("name", ["LigerPlugin", "CutCrossEntropyPlugin", "KernelsPlugin"])
def test_plugins_whose_work_is_done_anyway_are_automatic(translated, name):
    package = {"L": "liger", "C": "cut_cross_entropy", "K": "kernels"}[name[0]]
    found = translated(plugins=[f"axolotl.integrations.{package}.{name}"])

    assert found.report.lines[-1].kind == "automatic"


def test_a_plugin_of_the_users_own_is_refused(problem):
    assert "code of plugins is not run" in problem(plugins=["my.package.Plugin"])


# Keys with old names, and trackers


def test_old_names_mean_the_same(config):
    assert config(revision_of_model="abc").model.revision == "abc"
    assert config(model_revision="abc").model.revision == "abc"


def test_naming_a_wandb_project_turns_the_tracker_on(config, line):
    found = config(wandb_project="p", wandb_entity="me", wandb_name="n", wandb_mode="offline").output

    assert found.trackers == ["wandb"]
    assert found.wandb.model_dump(exclude_none=True) == {
        "project": "p",
        "entity": "me",
        "name": "n",
        "mode": "offline",
    }
    assert line(wandb_entity="me").kind == "no effect"


def test_tokens_get_their_roles_and_new_ones_are_added(config, problem):
    found = config(
        special_tokens={"pad_token": "<pad>", "additional_special_tokens": ["<c>"]}, tokens=["<a>", "<b>"]
    ).model

    assert found.special_tokens.pad == "<pad>"
    assert found.new_tokens == ["<a>", "<b>", "<c>"]
    assert "must be a list" in problem(tokens={"pad_token": "<pad>"})


def test_remote_code_needs_a_commit(config, line):
    commit = "a" * 40

    assert line(trust_remote_code=True).kind == "no effect"
    assert config(trust_remote_code=True).model.trust_remote_code is False
    assert config(trust_remote_code=True, revision_of_model=commit).model.trust_remote_code is True


def test_deepspeed_goes_on_as_it_is(tmp_path, line, config):
    path = tmp_path / "mine.json"
    inline = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    path.write_text(json.dumps(inline))

    for value in (str(path), inline):
        found = config(deepspeed=value).engine
        assert (found.strategy, found.deepspeed.config) == ("deepspeed", value)
        assert line(deepspeed=value).text.endswith("engine.deepspeed.config, ZeRO-3")
    assert config(deepspeed=False).engine.strategy == "auto"


def test_what_deepspeed_does_not_do_goes_without_it(config, line):
    for other in ({"optimizer": "adafactor"}, {"context_parallel_size": 2}):
        keys = {"deepspeed": "deepspeed_configs/zero2.json", **other}

        assert line(**keys).kind == "no effect"
        assert config(**keys).engine.strategy == "auto"


def test_a_misspelt_key_of_deepspeed_is_refused(config):
    with pytest.raises(ConfigError, match=r"overlap_com is no key of DeepSpeed's\. Did you mean overlap_comm\?"):
        config(deepspeed={"zero_optimization": {"stage": 2, "overlap_com": True}})


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "parameters"),
    [
        ("zero1", 1, "auto", "auto"),
        ("zero3_bf16", 3, "auto", "auto"),
        ("zero3_bf16_cpuoffload_all", 3, "cpu", "cpu"),
        ("zero3_bf16_cpuoffload_params", 3, "auto", "cpu"),
    ],
)
def test_a_file_of_axolotls_own_repository_is_read_by_its_name(config, line, name, stage, optimizer, parameters):
    found = config(deepspeed=f"deepspeed_configs/{name}.json").engine.deepspeed

    assert (found.stage, found.offload_optimizer, found.offload_parameters) == (stage, optimizer, parameters)
    assert "is not here" in line(deepspeed=f"deepspeed_configs/{name}.json").text


def test_a_value_of_the_wrong_kind_is_refused_with_its_line():
    found = translate(MINIMAL | {"sequence_len": "long"}, {("sequence_len",): "their.yml:7"}, file="their.yml")

    assert str(found.problems[0]) == "their.yml:7: sequence_len = long: it must be a number."


def test_what_is_missing_is_said(translated):
    assert {str(one) for one in translated(learning_rate=None, datasets=None).problems} == {
        "their.yml: learning_rate is missing. Set it, for example 2e-4 with an adapter, 2e-5 without.",
        "their.yml: datasets is missing. Name the rows to train on.",
    }


def test_every_rule_takes_any_value_without_falling_over():
    """Whatever stands where a value belongs, a rule answers with an outcome or says what is wrong."""
    values = [True, False, 0, 1, -1, 0.5, 1e300, "text", "auto", ["a"], [1], {"a": 1}, "nan"]
    for name, entry in KEYS.items():
        path = tuple(part for part in name.replace("[]", ".0").split("."))
        real = tuple(int(part) if part == "0" else part for part in path)
        own = {"path": "rows.jsonl", "type": {}}
        for value in values:
            keys = (
                MINIMAL | {"datasets": [own], str(real[0]): value} if len(real) == 1 else MINIMAL | {"datasets": [own]}
            )
            translated = Reading(real, value, keys, ("data", "train", 0) if real[0] == "datasets" else ())
            try:
                outcome = entry.read(translated)
            except UnreadableError as error:
                assert error.what
            else:
                assert outcome.kind in KINDS
                assert outcome.text
