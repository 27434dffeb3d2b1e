from types import SimpleNamespace

import pytest
import torch

from stoker.arch import families
from stoker.compose import predicted
from stoker.config.load import parse
from stoker.plan import calibration, track_record
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware

SPEC = families.read(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 300,
        "max_position_embeddings": 1024,
    },
    "config.json",
)


@pytest.fixture
def config():
    return parse(
        {
            "model": {"base": "some/model"},
            "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 128},
            "train": {"learning_rate": 1e-3, "batch_size": 2},
            "output": {"folder": "runs/x"},
        }
    )


@pytest.fixture
def plan(config):
    return choose(config, SPEC, Hardware((Device("cpu", "CPU (a test)", 10 * 2**30, bf16=True),)))


def record(seconds, *, num_tokens=200):
    return {"loss": 1.0, "seconds": seconds, "num_tokens": num_tokens, "num_trained_tokens": 100, "padding_share": 0.2}


def test_first_steps_do_not_count_and_rows_are_taken_as_they_came(config, plan):
    steps = [record(9.0), record(9.0), record(9.0), *(record(0.5) for _ in range(5))]
    found = predicted.step_seconds(config, SPEC, plan, steps, [50, 50])
    assert found["measured"] == 0.5
    fuller = [record(0.5, num_tokens=800) for _ in range(8)]
    assert predicted.step_seconds(config, SPEC, plan, fuller, [50])["predicted"] > 1.5 * found["predicted"]


def test_a_run_of_one_step_tells_no_time(config, plan):
    assert predicted.step_seconds(config, SPEC, plan, [record(9.0)], [50]) == {}


def test_memory_by_category_sums_to_the_peak_and_tied_tensors_count_once(plan):
    module = torch.nn.Linear(16, 16, bias=False)
    module.tied = module.weight
    state = SimpleNamespace(optimizer={"m": torch.zeros(10)})
    strategy = SimpleNamespace(peak_memory_bytes=lambda: 10**6, state=lambda: state, let_go=lambda: None)
    found = predicted.memory(plan, module, SimpleNamespace(strategy=strategy))
    assert found["weights"]["measured"] == 16 * 16 * 4
    assert found["optimizer"]["measured"] == 40
    for which in ("predicted", "measured"):
        assert sum(found[name][which] for name in found if name != "total") == found["total"][which]
    assert found["total"]["predicted"] == plan.memory.total


def test_an_outcome_is_kept_and_quoted_for_the_same_device(config, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    assert predicted.known_here(plan) == []
    total = {"total": {"predicted": 110, "measured": 100}}
    sentence = predicted.remember(config, plan, total, {"predicted": 0.96, "measured": 1.0})
    assert sentence.startswith("Predicted over measured: memory +10.0%, time of a step -4%")
    assert track_record.read()[0].method == "full"
    assert predicted.known_here(plan) == ["Predicted over measured, last run here: memory +10.0%, time -4%."]
    assert predicted.remember(config, plan, total, {}) == ""
    assert calibration.load(plan.device_name) is None
