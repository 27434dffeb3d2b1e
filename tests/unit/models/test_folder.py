import json
from pathlib import Path

import pytest

from stoker.errors import ModelError
from stoker.models.folder import load_tokenizer, read_config, resolve, weight_files


def test_a_folder_resolves_to_itself(folder):
    assert resolve(str(folder)) == folder
    assert resolve(folder) == folder


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ModelError, match="no such folder") as error:
        resolve(name)
    assert str(name) in str(error.value)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(ModelError, match="a file, not a model's folder"):
        resolve(folder / "config.json")


def test_a_hub_id_that_is_not_cached_says_so_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="the Hub was not reached") as error:
        resolve("someone/some-model")
    assert "HF_HUB_OFFLINE" in str(error.value)


def test_a_name_that_can_be_neither_is_refused():
    with pytest.raises(ModelError, match="neither a folder nor a Hub id"):
        resolve("not a model!")


def test_only_safetensors_and_small_files_are_fetched(monkeypatch, tmp_path):
    asked = {}

    def snapshot(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("someone/some-model", revision="v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith(("*", ".bin", ".pt", ".pth", ".py")) for pattern in asked["allow_patterns"])


def test_configurations_are_read_or_refused(folder, config):
    assert read_config(folder)["hidden_size"] == config["hidden_size"]
    for text in ("{broken", "[1]", b"\xff\xfe\xff"):
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ModelError, match=r"config\.json: this is not"):
            read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(folder)


def test_one_file_and_shards_hold_the_same_tensors(folder, sharded):
    single, several = weight_files(folder), weight_files(sharded)
    assert single.files.keys() == several.files.keys()
    assert len(set(single.files.values())) == 1
    assert len(set(several.files.values())) > 2


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(pytorch_model\.bin\)"):
        weight_files(folder)


def test_no_weights_at_all_is_said(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="there are no weights"):
        weight_files(folder)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match="missing") as error:
        weight_files(sharded)
    assert shard.name in str(error.value)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_a_shard_outside_the_folder_is_refused(sharded, folder, change_index, name):
    change_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(ModelError, match="not a file directly in this folder") as error:
        weight_files(sharded)
    assert repr(name) in str(error.value)


def test_a_tensor_that_its_shard_lacks_is_named(sharded, change_index):
    first = sorted(path.name for path in sharded.glob("model-*"))[0]
    change_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": first}))
    with pytest.raises(ModelError, match=r"does not hold model\.norm\.weight"):
        weight_files(sharded)


def test_a_cut_file_is_recognised(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        weight_files(folder)


def test_an_index_without_a_map_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(ModelError, match="weight_map"):
        weight_files(sharded)


def test_a_missing_or_broken_tokenizer_is_an_error_not_a_traceback(folder):
    with pytest.raises(ModelError, match="there is no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: this is not readable JSON"):
        load_tokenizer(folder)


def test_a_tokenizer_is_read(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    assert load_tokenizer(folder)("ab")["input_ids"] == [2]


def test_a_tokenizer_that_wants_its_own_code_run_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    (folder / "vocab.json").write_text("{}")
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(folder)
