"""The support table claims what tests found on tiny checkpoints of every model type in it, and leaves no cell empty."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from borrowed_models import CONFIGS, folder_of
from oracle import CHECKS, pair
from proofs import COLLECTED
from test_stand_ins import STAND_INS
from transformers import PretrainedConfig

from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.arch.shape import why_not_llama
from stoker.arch.support import TRIED, results, row_of, rows
from stoker.models import open as models
from stoker.models.borrowed.model import BorrowedModel
from stoker.models.folder import read_config
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.moe import FrozenExpertLinear

FOLDER = Path(__file__).parent
ROWS = {row.model_type: row for row in rows()}
OF_ALL = {"fp8", "recompute"}
OF_BORROWED = {"loss", "gradients", "lora", "nf4", "packing", "generation", "export"}


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
    assert set(TRIED) == set(CONFIGS)
    assert borrowed == [name for name in TRIED if name not in native]
    assert row_of("llama") == ROWS["llama"]
    assert row_of("nobody_knows") is None


def test_no_cell_of_the_table_is_empty():
    for model_type in families.FAMILIES:
        assert set(CHECKS) | OF_ALL <= set(results()[model_type]), model_type
    for model_type in set(TRIED) - set(families.FAMILIES):
        assert set(results()[model_type]) >= OF_BORROWED | OF_ALL, model_type
    assert set(results()) == set(ROWS)


def test_no_cell_of_the_table_is_without_a_test(request):
    collected = {pair for pairs in request.config.stash[COLLECTED].values() for pair in pairs}
    files = {Path(item.partition("::")[0]).name for item in request.config.stash[COLLECTED]}
    proving = [
        path for path in FOLDER.glob("test_*.py") if re.search(r"proves\(|proved\(|every_check\(", path.read_text())
    ]
    if not {path.name for path in proving} <= files:
        pytest.skip("only some files of this folder are run")
    claimed = {(model_type, name) for model_type, found in results().items() for name in found}
    missing = {model_type for model_type in ROWS if model_type not in CASES and model_type not in STAND_INS}
    missing -= set(CONFIGS)
    assert missing <= {"internlm3", "minicpm3"}  # of Transformers 5.17, which has no class for them
    assert {cell for cell in claimed if cell[0] not in missing} <= collected


def case_of(model_type):
    """The first pair of a native type."""
    if model_type in STAND_INS:
        return STAND_INS[model_type]()
    if model_type not in CASES:
        pytest.skip("this Transformers has no class for it")
    return pair(CASES[model_type][0])


@pytest.mark.proves("fp8", "recompute")
@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_layers_of_a_native_type_run_in_fp8_and_run_again(model_type):
    made = case_of(model_type)
    assert quantised_products(model_type, made.folder, "fp8") > 0
    assert recomputes(made.fresh())


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_a_type_whose_layers_are_kernels_has_a_parity_case_with_such_layers(model_type):
    made = case_of(model_type)
    specs = [families.read(config.to_dict(), model_type) for config in CASES.get(model_type, ())] or [made.spec]
    if ROWS[model_type].layers == "kernel":  # check_layers of the oracle holds such layers to those that run op by op
        assert any(not why_not_llama(layer) for spec in specs for layer in spec.layers)


@pytest.mark.proves("nf4", "fp8", "packing", "generation", "recompute")
@pytest.mark.parametrize("model_type", sorted(set(CONFIGS) - set(families.FAMILIES)))
def test_what_a_borrowed_class_bears(model_type, found):
    folder = folder_of(model_type)
    model = models.load(folder, models.read(folder, read_config(folder)))
    assert isinstance(model, BorrowedModel)
    model.new_cache(capacity=8)
    found(
        packing="at once" if model.packs else "by document",
        generation="cache" if model.caches else "whole text",
    )
    assert quantised_products(model_type, folder, "nf4") > 0
    assert quantised_products(model_type, folder, "fp8") > 0
    assert recomputes(model)
