import hashlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from stoker.builtin import default_folder, materialize
from stoker.builtin.rows import rows_path
from stoker.errors import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return materialize("tiny-llama", tmp_path_factory.mktemp("builtin") / "tiny-llama")


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _messages() -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in rows_path("fine-tuning").read_text("utf-8").splitlines()]


def test_folder_holds_what_transformers_reads(folder):
    assert set(_hashes(folder)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_another_process_makes_the_same_bytes(folder, tmp_path):
    program = (
        "import sys, pathlib; from stoker.builtin import materialize; "
        "materialize('tiny-llama', pathlib.Path(sys.argv[1])); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "again"], check=True)
    assert _hashes(tmp_path / "again") == _hashes(folder)


def test_weights_have_the_shapes_of_the_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    keys = config["num_key_value_heads"] * config["head_dim"]
    assert len(tensors) == 3 + 9 * config["num_hidden_layers"]
    assert tensors["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (keys, config["hidden_size"])
    assert (tensors["model.norm.weight"] == 1).all()


def test_linear_layers_keep_the_size_of_what_passes_through(folder):
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" in name or name == "lm_head.weight":
            # Thousands of draws: their standard deviation is within 2 % of the one they were drawn with.
            assert tensor.std() * math.sqrt(tensor.shape[1]) == pytest.approx(1, rel=0.02), name


def test_tokenizer_fills_the_vocabulary_and_the_special_tokens_come_first(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert [tokenizer.token_to_id(token) for token in ("<|pad|>", "<|begin|>", "<|end|>")] == [
        config["pad_token_id"],
        config["bos_token_id"],
        config["eos_token_id"],
    ]


@pytest.mark.parametrize("text", ["What is LoRA?", "  zwei  Leerzeichen\n\tö ", "日本語 🙂", "\x00\x7f"])
def test_every_text_survives_the_tokenizer(folder, text):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_folder_that_exists_is_used_as_it_is(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert materialize("tiny-llama", folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_two_at_once_leave_one_whole_folder_and_nothing_aside(folder, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: materialize("tiny-llama", tmp_path / "model"), range(2)))
    assert made == [tmp_path / "model"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert _hashes(tmp_path / "model") == _hashes(folder)


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stoker.builtin.tiny_llama._write_json", no_space)
    with pytest.raises(ModelError, match="No space left on device"):
        materialize("tiny-llama", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        materialize("tiny-llama", tmp_path / "file" / "model")


def test_the_default_folder_is_in_the_users_cache_and_named_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    first = default_folder("tiny-llama")
    assert first.parent == tmp_path / ".cache" / "stoker" / "builtin"
    monkeypatch.setattr("stoker.builtin.tiny_llama._SEED", 21)
    assert default_folder("tiny-llama") != first


@pytest.mark.slow
def test_transformers_loads_the_folder_and_its_template(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is LoRA?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|system|>Be brief.<|end|><|user|>What is LoRA?<|end|><|assistant|>"
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for row in _messages()[:20]:
        text = tokenizer.apply_chat_template(row, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == raw.encode(text, add_special_tokens=False).ids

    ids = torch.tensor([raw.encode(text).ids])
    with torch.no_grad():
        logits = model(ids).logits
    # A head of 1/sqrt(hidden) on normed hidden states: logits of standard deviation 1, whatever the layers do.
    assert 0.9 < logits.std().item() < 1.1
