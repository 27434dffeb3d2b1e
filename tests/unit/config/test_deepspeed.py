"""Our settings of DeepSpeed beside its own JSON; none of it needs the package, but for the tables' own test."""

import importlib.util
import json

import pytest

from stoker.config import deepspeed, deepspeed_keys
from stoker.config.load import parse
from stoker.errors import ConfigError

# As other trainers ship it, with everything that can be `auto`.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 0,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 1.0},
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 32},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
    "wall_clock_breakdown": False,
}


def config(json_values=None, *, engine=None, **sections):
    ours = {} if json_values is None else {"config": json_values}
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "adapter": {},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "output": {"folder": "run"},
        "engine": {"strategy": "deepspeed", **(engine or {})},
        "train": {"learning_rate": 1e-4, **sections.pop("train", {})},
        **sections,
    }
    values["engine"]["deepspeed"] = {**ours, **values["engine"].get("deepspeed", {})}
    return parse(values)


def complaint(*arguments, **options):
    with pytest.raises(ConfigError) as caught:
        config(*arguments, **options)
    return str(caught.value)


def test_a_json_of_another_trainer_is_taken_as_it_is(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(ZERO3))
    for given in (ZERO3, str(path)):
        found = config(given)
        assert found.engine.precision == "bf16"
        assert deepspeed.stage(found.engine.deepspeed) == 3
        settings = deepspeed.settings(found.engine.deepspeed, hidden_size=100)
        zero = settings.pop("zero_optimization")
        assert settings == {"wall_clock_breakdown": False}  # the rest is the run's own
        assert (zero["stage"], zero["sub_group_size"], zero["overlap_comm"]) == (3, 0, True)
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
        assert zero["reduce_bucket_size"] == 10_000
        assert zero["stage3_prefetch_bucket_size"] == 9_000
        assert zero["stage3_param_persistence_threshold"] == 1_000


def test_our_own_fields_are_enough():
    ours = {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "cpu", "nvme_path": "/disk"}
    settings = deepspeed.settings(config(engine={"deepspeed": ours}).engine.deepspeed, hidden_size=None)
    assert settings == {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"},
            "offload_param": {"device": "cpu"},
        }
    }
    assert deepspeed.stage(config().engine.deepspeed) == 2


def test_what_ours_leaves_open_the_json_decides():
    given = {"gradient_clipping": 0.3, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    found = config(given)
    assert (found.train.max_gradient_norm, found.engine.micro_batch_size) == (0.3, 2)
    assert config({"gradient_clipping": 0.0}).train.max_gradient_norm is None


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ({"zero_optimisation": {}}, {}, "zero_optimisation is no key of DeepSpeed's. Did you mean zero_optimization?"),
        (
            {"zero_optimization": {"overlap_com": True}},
            {},
            "zero_optimization.overlap_com is no key of DeepSpeed's. Did you mean overlap_comm?",
        ),
        ({"zero_optimization": {"offload_param": {"dvice": "cpu"}}}, {}, "Did you mean device?"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, {}, "overlap_comm = yes: it must be true or false"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, {}, "it must be none, cpu or nvme"),
        ({"zero_optimization": 3}, {}, "zero_optimization = 3 must be a section"),
        ({"zero_optimization": {"stage": 0}}, {}, "stage 0 of ZeRO shares nothing"),
        ({"zero_optimization": {"stage": 2}}, {"engine": {"deepspeed": {"stage": 3}}}, "stage = 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
            {"engine": {"deepspeed": {"offload_optimizer": "cpu"}}},
            "offload_optimizer.device says none, but engine.deepspeed.offload_optimizer = cpu",
        ),
        ({"bf16": {"enabled": True}}, {"engine": {"precision": "fp32"}}, "says bf16, but engine.precision = fp32"),
        ({"fp16": {"enabled": True}}, {}, "has no loss scale here"),
        ({"gradient_clipping": 0.5}, {"train": {"max_gradient_norm": 1.0}}, "train.max_gradient_norm = 1.0"),
        ({"train_batch_size": 7}, {"train": {"batch_size": 8}}, "train_batch_size says 7"),
        ({"train_micro_batch_size_per_gpu": 2}, {"engine": {"micro_batch_size": 4}}, "engine.micro_batch_size = 4"),
        ({"optimizer": {"type": "Lamb"}}, {}, "optimizer.type says Lamb, but train.optimizer.kind = adamw"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, {}, "lr says 1.0, but train.learning_rate = 0.0001"),
        ({"scheduler": {"type": "OneCycle"}}, {}, "scheduler.type says OneCycle, but train.schedule.kind = cosine"),
        ({"activation_checkpointing": {}}, {}, "engine.recompute says it"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, {}, "zero_quantized_weights: it is not done here"),
        ("nowhere.json", {}, "engine.deepspeed.config = nowhere.json: No such file"),
        (None, {"engine": {"deepspeed": {"offload_parameters": "cpu"}}}, "weights are offloaded in stage 3"),
        (None, {"engine": {"deepspeed": {"offload_optimizer": "nvme"}}}, "goes to NVMe in stage 3, and the stage is 2"),
        (None, {"engine": {"deepspeed": {"stage": 3, "offload_optimizer": "nvme"}}}, "nothing says where"),
        (
            None,
            {
                "engine": {"deepspeed": {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/disk"}},
                "train": {"optimizer": {"kind": "adamw_8bit"}},
            },
            "writes no state to NVMe but fp32",
        ),
        (None, {"train": {"optimizer": {"kind": "muon"}}}, "kind = muon: DeepSpeed steps flat parts"),
        (None, {"adapter": None, "train": {"weight_dtype": "bf16"}}, "keeps its weights in fp32"),
        (
            None,
            {"engine": {"deepspeed": {"stage": 3, "offload_parameters": "nvme", "nvme_path": "/disk"}}},
            "weights on NVMe have one number format",
        ),
        (None, {"engine": {"context_parallel": 2}}, "rows are shared under ddp and fsdp2"),
        (None, {"engine": {"strategy": "ddp", "deepspeed": {"stage": 3}}}, "engine.deepspeed has no effect"),
    ],
)
def test_what_cannot_be_is_named(given, options, words):
    assert words in complaint(given, **options)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_tables_hold_every_key_of_the_installed_package():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    pairs = {
        "zero_optimization.": (DeepSpeedZeroConfig, deepspeed_keys.ZERO),
        "zero_optimization.offload_param.": (DeepSpeedZeroOffloadParamConfig, deepspeed_keys.OFFLOAD_PARAM),
        "zero_optimization.offload_optimizer.": (DeepSpeedZeroOffloadOptimizerConfig, deepspeed_keys.OFFLOAD_OPTIMIZER),
        "bf16.": (DeepSpeedBF16Config, deepspeed_keys.TOP["bf16"]),
        "fp16.": (DeepSpeedFP16Config, deepspeed_keys.TOP["fp16"]),
    }
    for prefix, (theirs, ours) in pairs.items():
        names = {field.alias or name for name, field in theirs.model_fields.items()}
        refused = {key.removeprefix(prefix) for key in deepspeed_keys.REFUSED if key.startswith(prefix)}
        assert names <= set(ours) | refused, prefix
        assert set(ours) <= names, prefix
