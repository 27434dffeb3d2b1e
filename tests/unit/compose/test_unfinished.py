"""Checkpoints of runs that have not finished become folders that others load."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stoker.adapters.lora import add_lora
from stoker.checkpoint.saver import Saver
from stoker.compose.merge import merge
from stoker.compose.model import load_decoder, open_base
from stoker.errors import CheckpointError, ModelError, OutputError
from stoker.export import adapter as folders
from stoker.models import open as models

BASE = "builtin:tiny-llama"


@pytest.fixture(scope="module")
def base():
    return open_base(BASE)


def decoder_of(base):
    return load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")


def checkpoint(tmp_path, model, **settings):
    """A run's folder with a checkpoint of the trained weights of `model`, as the trainer names them."""
    run = tmp_path / "run"
    run.mkdir()
    values = {
        "model": {"base": BASE},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"learning_rate": 0.1},
        "output": {"folder": str(run)},
        **settings,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    weights = {f"model.{name}": one.detach() for name, one in model.named_parameters() if one.requires_grad}
    saver = Saver(run / "checkpoints")
    saver.begin(7, tensors={"weights": weights, "optimizer": {}}, values={})
    return str(saver.commit().path)


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    return model


def tensors_of(folder):
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def test_a_model_is_written_as_a_finished_run_writes_it(tmp_path, base):
    model = changed(decoder_of(base))
    report = merge(checkpoint(tmp_path, model), tmp_path / "out")
    assert "step-000007" in report
    models.save(model, base.spec, tmp_path / "expected", config=base.config, source=base.folder)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    with pytest.raises(OutputError, match="not an empty folder"):
        merge(str(tmp_path / "run" / "checkpoints" / "step-000007"), tmp_path / "out")


def test_weights_that_were_not_trained_come_from_the_base(tmp_path, base):
    model = decoder_of(base).requires_grad_(False)
    model.blocks[0].attention.qkv.weight.requires_grad_(True)
    merge(checkpoint(tmp_path, changed(model)), tmp_path / "out", dtype="bf16")
    found = tensors_of(tmp_path / "out")
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    original = tensors_of(base.folder)
    different = [name for name, one in found.items() if not torch.equal(one, original[name].bfloat16())]
    assert sorted(name.split(".")[-2] for name in different) == ["k_proj", "q_proj", "v_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_merged_as_from_a_finished_run(tmp_path, base, kind):
    model = decoder_of(base)
    add_lora(model, rank=2, alpha=4, dora=kind == "dora")
    path = checkpoint(tmp_path, changed(model), adapter={"kind": kind, "rank": 2, "alpha": 4})
    merge(path, tmp_path / "out")
    folders.save(model, tmp_path / "adapter", base_name=str(base.folder))
    merge(str(tmp_path / "adapter"), tmp_path / "expected")
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_checkpoint_that_is_gone_or_damaged_is_named(tmp_path, base):
    model = decoder_of(base).requires_grad_(False)
    model.final_norm.weight.requires_grad_(True)
    path = checkpoint(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*step-000003"):
        merge(path.replace("step-000007", "step-000003"), tmp_path / "out")
    (Path(path) / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is not whole: weights\.safetensors has 0 bytes"):
        merge(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_adapter_are_refused(tmp_path, base):
    model = decoder_of(base)
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    path = checkpoint(tmp_path, model, adapter={"rank": 2, "alpha": 4})
    with pytest.raises(ModelError, match="not those of the run's adapter"):
        merge(path, tmp_path / "out")
