"""What `stoker merge` and `stoker export` say of what they cannot use, and of what they did."""

import json

import pytest
import torch
import yaml

from stoker.adapters.lora import add_lora
from stoker.compose.merge import export, merge
from stoker.compose.model import load_decoder, open_base
from stoker.errors import ConfigError, ModelError, OutputError
from stoker.export import adapter
from stoker.models import native
from stoker.models import open as models

BASE = "builtin:tiny-llama"


@pytest.fixture
def run(tmp_path):
    """The folder of a finished LoRA run."""
    base = open_base(BASE)
    model = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    folder = tmp_path / "run"
    adapter.save(model, folder / "adapter", base_name=BASE)
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    values = {
        "model": {"base": BASE},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"learning_rate": 0.1},
        "output": {"folder": str(folder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_another_base_than_the_adapter_names_is_noted(run, tmp_path):
    base = open_base(BASE)
    model = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    models.save(model, base.spec, tmp_path / "copy", config=base.config, source=base.folder)
    assert "note" not in merge(str(run), tmp_path / "first", max_shard_size="1.5 MiB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 5
    report = merge(str(run), tmp_path / "second", base=str(tmp_path / "copy"))
    assert f"the adapter names {BASE} as its base" in report


def test_a_base_that_is_gone_can_be_named(run, tmp_path):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match=r"gone: there is no such folder.*lies elsewhere now, name it with --base"):
        merge(str(run), tmp_path / "out")


def test_what_is_no_adapter_is_told_with_what_there_is(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="nowhere: there is no such folder"):
        merge(str(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(ModelError, match="this is a file"):
        merge(str(tmp_path / "file"), tmp_path / "out")
    with pytest.raises(ModelError, match=r"only checkpoints. Merge its last checkpoint, .*step-000002"):
        merge(str(run / "checkpoints"), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"there is no adapter here\. Name a run's folder"):
        merge(str(tmp_path / "empty"), tmp_path / "out")
    (run / "adapter").rename(run / "model")
    (run / "model" / "adapter_config.json").rename(run / "model" / "config.json")
    with pytest.raises(ModelError, match=r"nothing to merge. The whole model is in .*run/model"):
        merge(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_names_its_own(run, tmp_path):
    smaller = open_base(BASE, overrides={"num_hidden_layers": 1})
    native.save(native.build(smaller.spec), smaller.spec, tmp_path / "other", config=smaller.config)
    with pytest.raises(ModelError, match=f"the adapter does not fit.*trained on, {BASE}"):
        merge(str(run), tmp_path / "out", base=str(tmp_path / "other"))


def test_options_are_read_strictly_and_before_anything_else(run, tmp_path):
    with pytest.raises(ConfigError, match="Use one of auto, fp32, bf16, fp16"):
        merge("nowhere", tmp_path / "out", dtype="fp8")
    for size in ("5", "0GB", "-1GB", "5 apples"):
        with pytest.raises(ConfigError, match="Write a number with a unit"):
            merge("nowhere", tmp_path / "out", max_shard_size=size)
    with pytest.raises(OutputError, match="not an empty folder"):
        merge("nowhere", run)
    with pytest.raises(ConfigError, match="are for the model of a checkpoint"):
        export(str(run), tmp_path / "out", dtype="bf16")


def test_a_finished_run_is_exported_as_it_is(run, tmp_path):
    assert "copied the adapter" in export(str(run), tmp_path / "out")
    names = {path.name for path in (run / "adapter").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with pytest.raises(ModelError, match="neither the folder of a run"):
        export(str(run / "adapter"), tmp_path / "other")
