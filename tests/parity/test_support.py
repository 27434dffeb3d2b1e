"""The support table claims what tiny checkpoints of every model type in it do, no more and no less.

Native families: that all of the oracle's checks run for a model type is its parity test's doing; here it is only
required that there is one. What the oracle does not look at is looked at here.
"""

import importlib
from pathlib import Path

import pytest
import torch
from borrowed_models import CONFIGS, folder_of
from oracle import CHECKS, pair
from test_more_dense import STAND_INS
from transformers import PretrainedConfig

from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.arch.shape import why_not_llama
from stoker.arch.support import row_of, rows
from stoker.models import open as models
from stoker.models.borrowed.model import BorrowedModel
from stoker.models.folder import read_config
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.moe import FrozenExpertLinear

FOLDER = Path(__file__).parent
ROWS = {row.model_type: row for row in rows()}


def parity_cases():
    """Model type to the configurations that the parity tests of this folder hold to Transformers."""
    found = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        if "CHECKS" in path.read_text(encoding="utf-8") or path.stem == "test_llama":
            for value in vars(importlib.import_module(path.stem)).values():
                for config in value.values() if isinstance(value, dict) else ():
                    if isinstance(config, PretrainedConfig):
                        found.setdefault(config.model_type, []).append(config)
    return found


CASES = parity_cases()


def quantised_products(model_type, folder, quantization):
    """How many layers keep their weight in the format, in a model that computes finite numbers from it."""
    spec = models.read(folder, read_config(folder))
    model = models.load(folder, spec, quantization=quantization).eval()
    ids = torch.randint(5, spec.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert model.logits(model(ids)).isfinite().all()
    return sum(isinstance(module, FrozenLinear | FrozenExpertLinear) for module in model.modules())


def recomputes(model):
    """Whether layers run twice where they are asked to, with the same gradients."""
    add_lora(model, rank=2, alpha=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(5, model.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
    inside, runs, found = next(model.blocks[-1].children()), [], []
    inside.register_forward_pre_hook(lambda *_: runs.append(1))
    for recompute in (False, True):
        for block in model.blocks:
            block.recompute = recompute
        runs.append(0)
        found.append(torch.autograd.grad(model.train()(ids).square().mean(), trained))
    once = runs.index(0, 1) - 1
    assert sum(runs) == 3 * once
    return all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*found, strict=True))


def test_the_table_has_a_row_for_every_native_type_and_every_class_tried():
    native = [row.model_type for row in rows() if row.path == "native"]
    borrowed = [row.model_type for row in rows() if row.path == "borrowed"]
    assert native == list(families.FAMILIES)
    assert sorted(borrowed) == sorted(set(CONFIGS) - set(native))
    assert row_of("llama") == ROWS["llama"]
    assert row_of("nobody_knows") is None


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_a_native_row_is_true(model_type):
    row = ROWS[model_type]
    # Adapters, NF4, packing, export and generation are checks of the oracle, which every parity test runs.
    assert {"lora", "nf4", "packing", "round trip", "generation"} <= set(CHECKS)
    assert (row.lora, row.nf4, row.packing, row.export, row.generation) == (True, True, "at once", True, "cache")
    made = STAND_INS[model_type]() if model_type in STAND_INS else pair(CASES[model_type][0])
    specs = [families.read(config.to_dict(), model_type) for config in CASES.get(model_type, ())] or [made.spec]
    if row.layers == "kernel":  # check_layers of the oracle holds such layers to those that run op by op
        assert any(not why_not_llama(layer) for spec in specs for layer in spec.layers)
    assert (quantised_products(model_type, made.folder, "fp8") > 0) == row.fp8
    assert recomputes(made.fresh()) == row.recompute


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_borrowed_row_is_true(model_type):
    row = ROWS[model_type]
    if row.path == "native":
        return  # its family has been added since, and what its class would do is not in the table
    folder = folder_of(model_type)
    model = models.load(folder, models.read(folder, read_config(folder)))
    assert isinstance(model, BorrowedModel)
    model.new_cache(capacity=8)
    assert row.packing == ("at once" if model.packs else "by document")
    assert row.generation == ("cache" if model.caches else "whole text")
    assert row.nf4 == (quantised_products(model_type, folder, "nf4") > 0)
    assert row.fp8 == (quantised_products(model_type, folder, "fp8") > 0)
    assert recomputes(model) == row.recompute
    assert row.layers == "op by op"  # the layer kernel has layers of ours only
    assert row.lora and row.export  # test_borrowed.py: each class's adapter and merged folder, through PEFT
