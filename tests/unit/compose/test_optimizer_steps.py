"""How AdamW steps follows from what trains and from the plan."""

from types import SimpleNamespace

import pytest
import torch

from stoker.compose.trainer import _steps, make_optimizer
from stoker.config.load import parse
from stoker.optim.flat import FlatAdamW
from stoker.optim.stochastic import StochasticAdamW

RUN = {
    "model": {"base": "builtin:tiny-llama"},
    "data": {"train": [{"path": "builtin:fine-tuning"}]},
    "train": {"learning_rate": 1e-3},
    "output": {"folder": "runs/x"},
}


def optimizer(overrides, *, graphs, dtype=torch.float32):
    config = parse(RUN, overrides)
    plan = SimpleNamespace(cuda_graphs=graphs, kernels="reference")
    named = [("layer.lora_a", torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype)))]
    return make_optimizer(named, config.train.optimizer, 1e-3, **_steps(config, plan, 0))


@pytest.mark.parametrize(
    ("overrides", "graphs", "expected"),
    [
        (["adapter={rank: 4}"], True, FlatAdamW),
        (["adapter={rank: 4}"], False, torch.optim.AdamW),
        (["adapter={rank: 4}", "train.optimizer={kind: sgd}"], True, torch.optim.SGD),
        ([], True, torch.optim.AdamW),  # every weight: side by side they would be held twice
    ],
)
def test_adapters_beside_graphs_are_stepped_all_at_once(overrides, graphs, expected):
    assert type(optimizer(overrides, graphs=graphs)) is expected


def test_weights_in_bf16_are_rounded():
    overrides = ["train.weight_dtype=bf16", "engine.precision=bf16"]
    assert type(optimizer(overrides, graphs=False, dtype=torch.bfloat16)) is StochasticAdamW
