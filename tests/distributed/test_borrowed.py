"""A model of Transformers' class from its YAML on two processes that hold parts of it: trained, answering, saved."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from stoker import builtin

pytestmark = pytest.mark.skipif(os.environ.get("STOKER_TEST_ALL") != "1", reason="make test-distributed runs it")

ZERO3 = ("--set", "engine.strategy=deepspeed", "--set", "engine.deepspeed.stage=3")
WAYS = {"fsdp2": ("--set", "engine.strategy=fsdp2"), "zero3": ZERO3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small OPT, with the tokenizer of the built-in Llama, and a run that trains it."""
    place = tmp_path_factory.mktemp("borrowed")
    ignored = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(builtin.resolve_model("builtin:tiny-llama"), place / "opt", ignore=ignored)
    vocabulary = json.loads((builtin.resolve_model("builtin:tiny-llama") / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 16}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.0}
    OPTForCausalLM(OPTConfig(**sizes, **heads, **tokens)).save_pretrained(place / "opt")
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n} plus one?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(24)
    ]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"base": "opt"},
        "data": {"train": [{"path": "train.jsonl"}], "sequence_length": 64, "validation": 4, "cache_folder": "cache"},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.002},
        "engine": {"device": "cpu", "num_threads": 1, "micro_batch_size": 1},
        "output": {"save_every_steps": 3, "trackers": [], "questions": ["What is 1 plus one?"]},
    }
    for name, more in {"full": {}, "adapter": {"adapter": {"rank": 4, "alpha": 8}}}.items():
        (place / f"{name}.yaml").write_text(
            yaml.safe_dump({**values, **more, "output": {**values["output"], "folder": name}})
        )
    return place


def train(folder, name, *options):
    command = [sys.executable, "-m", "stoker.cli.main", "train", f"{name}.yaml", "--overwrite", *map(str, options)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def facts(folder, name):
    """Losses by step, what the run said of itself, and the weights that it ended with."""
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    weights = next((folder / name / ("model" if name == "full" else "adapter")).glob("*.safetensors"))
    return (
        {row["step"]: row["loss"] for row in rows if "loss" in row},
        json.loads((folder / name / "run.json").read_text()),
        load_file(weights),
    )


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_borrowed_model_trains_in_parts_as_on_one_device(folder, name):
    train(folder, name)
    losses, said, weights = facts(folder, name)
    for way, options in WAYS.items():
        if way == "zero3" and importlib.util.find_spec("deepspeed") is None:
            continue
        output = train(folder, name, "--gpus", 2, *options)
        assert "Each process reads the whole model, then keeps its part: Transformers' OPTForCausalLM" in output
        assert "view tensor" not in output
        found, theirs, parts = facts(folder, name)
        assert found == pytest.approx(losses, abs=2e-5), way
        assert theirs["losses"]["validation"]["after"] == pytest.approx(said["losses"]["validation"]["after"], abs=2e-5)
        assert theirs["answers"] == said["answers"]
        assert parts.keys() == weights.keys()
        for key, weight in weights.items():
            if not key.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which AdamW makes steps of
                torch.testing.assert_close(parts[key], weight, atol=2e-4, rtol=1e-3)
