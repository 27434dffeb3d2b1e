import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stoker.adapters.merge import merged
from stoker.errors import ModelError, OutputError, StokerError
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.export.merged_tensors import MergedTensors
from stoker.models.writer import write

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("options", [{}, {"rank_stabilized": True}, {"dora": True}])
def test_the_written_model_answers_like_base_and_adapter(make_base, make_adapter, load_base, tmp_path, options):
    base = make_base()
    adapter_folder = make_adapter(base, **options)
    report = merge(base, adapter_folder, tmp_path / "new" / "out")
    adapted = load_base(base)
    adapter.load(adapted, adapter_folder)
    torch.testing.assert_close(load_base(tmp_path / "new" / "out")(IDS), adapted.eval()(IDS), rtol=1e-4, atol=1e-4)
    assert report.num_layers == 14
    assert report.dtype == torch.float32
    assert report.max_difference <= report.tolerance < report.adapter_effect
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_keep_the_dtype_of_the_base(make_base, make_adapter, tmp_path, dtype):
    base = make_base(dtype)
    report = merge(base, make_adapter(base), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype} == {report.dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config
    untouched = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], untouched)
    assert 0 < report.max_difference <= report.tolerance < report.adapter_effect


def test_an_adapter_lost_in_rounding_is_refused_and_fp32_keeps_it(make_base, make_adapter, tmp_path):
    base = make_base(torch.bfloat16)
    adapter_folder = make_adapter(base, size=1e-3)
    with pytest.raises(ModelError, match=r"rounding to bfloat16 changes logits by up to.*Merge in float32"):
        merge(base, adapter_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = merge(base, adapter_folder, tmp_path / "out", dtype=torch.float32)
    assert report.max_difference < report.adapter_effect / 10


def test_an_untrained_adapter_merges(make_base, make_adapter, tmp_path):
    base = make_base()
    report = merge(base, make_adapter(base, size=0.0), tmp_path / "out")
    assert report.adapter_effect == 0.0


def test_a_merge_that_answers_otherwise_is_not_kept(make_base, make_adapter, tmp_path, monkeypatch):
    base = make_base(torch.bfloat16)
    adapter_folder = make_adapter(base)

    def merged_wrongly(*tensors, scaling, magnitude):
        return merged(*tensors, scaling=scaling * 1.01, magnitude=magnitude)

    monkeypatch.setattr("stoker.export.merged_tensors.merged", merged_wrongly)
    with pytest.raises(StokerError, match=r"down_proj.*merging changed the answers.*not kept"):
        merge(base, adapter_folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_file_that_reads_otherwise_is_not_kept(make_base, make_adapter, tmp_path, monkeypatch):
    base = make_base()
    adapter_folder = make_adapter(base)

    def write_and_spoil(*args, **options):
        hashes = write(*args, **options)
        path = next(iter(hashes))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return hashes

    monkeypatch.setattr("stoker.export.streamed.writer.write", write_and_spoil)
    with pytest.raises(StokerError, match=r"what was written is not what was made: model.safetensors.*kept"):
        merge(base, adapter_folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_weights_under_other_names_are_found_by_logits(make_base, make_adapter, tmp_path, monkeypatch):
    """What no layer and no hash tells: that the parts are in their places."""
    base = make_base(torch.bfloat16)
    adapter_folder = make_adapter(base)
    read = MergedTensors.read

    def read_swapped(self, name):
        blocks = {"0": "1", "1": "0"}
        parts = name.split(".")
        return read(self, ".".join([*parts[:2], blocks[parts[2]], *parts[3:]]) if parts[1] == "layers" else name)

    monkeypatch.setattr(MergedTensors, "read", read_swapped)
    with pytest.raises(ModelError, match=r"rounding to bfloat16 changes logits"):
        merge(base, adapter_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_tensor_keeps_its_dtype_and_the_most_usual_is_the_models(make_base, make_adapter, tmp_path):
    base = make_base(torch.bfloat16)
    adapter_folder = make_adapter(base)
    path = base / "model.safetensors"
    tensors = load_file(path)
    norms = {name for name in tensors if "norm" in name}
    save_file({name: one.float() if name in norms else one for name, one in tensors.items()}, path)
    report = merge(base, adapter_folder, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, one in written.items() if one.dtype == torch.float32} == norms
    assert report.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_have_an_index_and_are_read_again(make_base, make_adapter, load_base, tmp_path):
    base = make_base()
    adapter_folder = make_adapter(base)
    merge(base, adapter_folder, tmp_path / "whole")
    merge(base, adapter_folder, tmp_path / "shards", max_shard_bytes=20_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 24_000 for path in files)
    merge(tmp_path / "shards", adapter_folder, tmp_path / "again")  # a sharded base
    assert torch.equal(load_base(tmp_path / "whole")(IDS), load_base(tmp_path / "shards")(IDS))
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == 1


def test_values_that_are_not_finite_are_not_kept(make_base, make_adapter, tmp_path):
    base = make_base()
    path = make_adapter(base) / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(StokerError, match="merging changed the answers"):
        merge(base, path.parent, tmp_path / "out")


def test_tokenizer_and_licence_are_copied_and_the_adapters_tokenizer_goes_first(make_base, make_adapter, tmp_path):
    base = make_base()
    adapter_folder = make_adapter(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json", "README.md", "x.bin"):
        (base / name).write_text("base")
    merge(base, adapter_folder, tmp_path / "first")
    copied = {path.name for path in (tmp_path / "first").iterdir()} - {"config.json", "model.safetensors"}
    assert copied == {"tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"}
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (adapter_folder / name).write_text("adapter")
    merge(base, adapter_folder, tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer_config.json").read_text() == "adapter"
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "adapter"
    assert (tmp_path / "second" / "tokenizer.json").read_text() == "base"
    assert not (tmp_path / "second" / "adapter_config.json").exists()


def test_a_folder_that_holds_something_is_refused(make_base, make_adapter, tmp_path):
    base = make_base()
    adapter_folder = make_adapter(base)
    with pytest.raises(OutputError, match="not an empty folder"):
        merge(base, adapter_folder, base)
    (tmp_path / "empty").mkdir()
    merge(base, adapter_folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_full_disk_leaves_nothing_behind(make_base, make_adapter, tmp_path, monkeypatch):
    base = make_base()
    adapter_folder = make_adapter(base)
    (base / "tokenizer.json").write_text("{}")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stoker.export.companions.shutil.copyfile", full)
    with pytest.raises(OutputError, match="No space left"):
        merge(base, adapter_folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_dtype_without_a_tolerance_is_refused(make_base, make_adapter, tmp_path):
    base = make_base()
    with pytest.raises(ModelError, match=r"float64 cannot be written.*float32, bfloat16, float16"):
        merge(base, make_adapter(base), tmp_path / "out", dtype=torch.float64)
