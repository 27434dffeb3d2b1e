"""A model that no family reads, from YAML to a merged folder: through Transformers' own class."""

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from stoker.cli.main import app

SIZES = {"hidden_size": 32, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(scope="module")
def opt(tiny_model, tmp_path_factory):
    """A small OPT with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("opt") / "opt"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    config = OPTConfig(vocab_size=260, ffn_dim=64, max_position_embeddings=256, dropout=0.0, **SIZES, **heads)
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_opt_is_trained_answers_is_merged_and_evaluated(stoker, run_values, write_yaml, opt, tmp_path, monkeypatch):
    run_values["model"] = {"base": str(opt)}
    run_values["adapter"] = {"rank": 4, "alpha": 8}
    run_values["data"] |= {"packing": True}
    run_values["output"] |= {"questions": ["What is 3 plus one?"]}
    said = stoker("train", write_yaml(run_values)).stdout
    assert 'through Transformers\' OPTForCausalLM: model_type "opt" is not native' in said
    assert "coarser estimate" in said
    losses = json.loads((tmp_path / "run" / "run.json").read_text())["losses"]["validation"]
    assert losses["after"] < losses["before"] - 0.05
    monkeypatch.chdir(tmp_path)
    prompt = "What is 1 plus one?"
    answer = command("generate", "run", "-p", prompt, "--max-new-tokens", 8).rstrip("\n")
    assert "verified: logits differ" in command("merge", "run", "-o", "merged")
    assert f"loss {losses['after']:.4f}" in command("eval", "run.yaml")

    tokenizer = AutoTokenizer.from_pretrained("merged")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(opt), "run/adapter").eval()
    for theirs in (merged, peft):
        found = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=[0]
        )[0, ids.shape[1] :]
        assert tokenizer.decode(found, skip_special_tokens=True).strip() == answer.strip()


def test_a_class_that_keeps_no_documents_apart_gets_rows_that_are_not_packed(run_values, tmp_path, tiny_model):
    from stoker.compose.model import fitted, open_base
    from stoker.config.load import parse

    BloomForCausalLM(BloomConfig(vocab_size=260, n_layer=1, n_head=4, **SIZES)).save_pretrained(tmp_path / "bloom")
    base = open_base(str(tmp_path / "bloom"))
    del run_values["data"]["packing"]
    assert fitted(parse(run_values), base).data.packing is False
    run_values["data"]["packing"] = True  # the user's word: document by document, then
    assert fitted(parse(run_values), base).data.packing is True
