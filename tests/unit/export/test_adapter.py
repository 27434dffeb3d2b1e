import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stoker.adapters.lora import add_lora, lora_layers
from stoker.errors import ModelError, OutputError
from stoker.export import adapter

IDS = torch.arange(24).view(2, 12)
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("options", [{"dora": True}, {"targets": ["q_proj", "up_proj"], "rank_stabilized": True}])
def test_an_adapter_comes_back_as_it_was(make_base, make_adapter, load_base, options):
    base = make_base()
    folder = make_adapter(base, dropout=0.1, **options)
    first, second = load_base(base), load_base(base)
    adapter.load(first, folder)
    adapter.save(first, folder, base_name="elsewhere", revision="abc")
    adapter.load(second, folder)
    assert torch.equal(first(IDS), second(IDS))
    assert not torch.equal(first(IDS), load_base(base)(IDS))
    assert next(lora_layers(first)).settings == next(lora_layers(second)).settings
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", WEIGHTS}


def test_a_loaded_adapter_can_be_trained_on(make_base, make_adapter, load_base):
    base = make_base()
    model = load_base(base)
    adapter.load(model, make_adapter(base))
    model(IDS).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2  # A and B of four layers in each of two blocks
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


def test_targets_are_short_names_unless_those_would_say_too_much(make_base, make_adapter):
    base = make_base()
    folder = make_adapter(base, targets=["v_proj", "q_proj"])
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    folder = make_adapter(base, targets=["layers.1.self_attn.q_proj"])
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.1.self_attn.q_proj"]


def test_a_model_without_adapters_is_not_saved(make_base, load_base, tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        adapter.save(load_base(make_base()), tmp_path / "new", base_name="x")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_previous_adapter_whole(make_base, make_adapter, load_base, monkeypatch):
    base = make_base()
    folder = make_adapter(base)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = load_base(base)
    add_lora(model, rank=1, alpha=1)

    def full(file, tensors):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stoker.export.adapter.safetensors_file.write", full)
    with pytest.raises(OutputError, match="No space left"):
        adapter.save(model, folder, base_name="x")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"some_future_option": {"x": 1}}, "some_future_option is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": "many"}, "no valid number"),
        ({"r": 0}, "rank = 0 is not positive"),
    ],
)
def test_settings_that_change_the_meaning_are_refused_by_name(make_base, make_adapter, load_base, change, message):
    base = make_base()
    folder = make_adapter(base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        adapter.load(load_base(base), folder)


def test_every_unsupported_setting_is_reported_at_once(make_base, make_adapter, load_base):
    base = make_base()
    path = make_adapter(base) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": "all", "use_qalora": True}))
    with pytest.raises(ModelError) as caught:
        adapter.load(load_base(base), path.parent)
    assert [problem.what.split()[0] for problem in caught.value.problems] == ["bias", "use_qalora"]


def test_a_missing_setting_is_named(make_base, make_adapter, load_base):
    base = make_base()
    path = make_adapter(base) / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the setting 'r' is missing"):
        adapter.load(load_base(base), path.parent)


def test_pickled_weights_are_refused(make_base, make_adapter, load_base):
    base = make_base()
    folder = make_adapter(base)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle"):
        adapter.load(load_base(base), folder)


def test_a_folder_without_an_adapter_is_refused(make_base, load_base, tmp_path):
    with pytest.raises(ModelError, match="no adapter here"):
        adapter.load(load_base(make_base()), tmp_path / "none")


@pytest.mark.parametrize(("name", "content"), [("adapter_config.json", "{"), (WEIGHTS, "half")])
def test_broken_files_are_named(make_base, make_adapter, load_base, name, content):
    base = make_base()
    folder = make_adapter(base)
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=f"{name}: it cannot be read"):
        adapter.load(load_base(base), folder)


def test_tensors_that_do_not_fit_are_named_and_the_model_stays_plain(make_base, make_adapter, load_base):
    base = make_base()
    path = make_adapter(base, targets=["q_proj"]) / WEIGHTS
    tensors = load_file(path)
    prefix = "base_model.model.model.layers"
    tensors[f"{prefix}.9.self_attn.q_proj.lora_A.weight"] = tensors.pop(f"{prefix}.0.self_attn.q_proj.lora_A.weight")
    tensors[f"{prefix}.1.self_attn.q_proj.lora_B.weight"] = torch.zeros(3, 2)
    save_file(tensors, path)
    model = load_base(base)
    with pytest.raises(ModelError) as caught:
        adapter.load(model, path.parent)
    message = str(caught.value)
    assert f"{prefix}.0.self_attn.q_proj.lora_A.weight is missing" in message
    assert f"{prefix}.9.self_attn.q_proj.lora_A.weight fits nothing in this model" in message
    assert f"{prefix}.1.self_attn.q_proj.lora_B.weight has shape [3, 2], not [32, 2]" in message
    assert not list(lora_layers(model))


def test_tensors_of_other_methods_are_named(make_base, make_adapter, load_base):
    base = make_base()
    path = make_adapter(base) / WEIGHTS
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=r"base_model\.model\.lm_head\.weight, not part of a LoRA adapter"):
        adapter.load(load_base(base), path.parent)
