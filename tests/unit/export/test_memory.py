"""Merging and exporting hold one tensor of a model, whatever its size: measured in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.checkpoint import write as checkpoints
from stoker.checkpoint.pieces import Piece
from stoker.export import adapter
from stoker.models import native

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LARGEST = 24_000 * 512 * 4
"""Bytes of the embedding, and of the head."""

CHILD = """
import sys
from pathlib import Path

import torch

def peak():
    # Not ru_maxrss: Linux counts into it what the process that started this one held at the time.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
print("bare", peak())
from stoker.compose.merge import export, merge

for size in ("small", "large"):
    folder = Path(sys.argv[1]) / size
    print(size, "merge", merge(str(folder / "adapter"), folder / "merged", max_shard_size="150MB").count("verified"))
    print(f"{size}-merge", peak())
    print(size, "export", export(str(folder / "run/checkpoints/step-000007"), folder / "model").count("wrote"))
    print(f"{size}-export", peak())
"""


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="a").save_pretrained(folder)


def make(folder, num_layers):
    """A base with a DoRA adapter on it, and a run's checkpoint of all its weights by three processes."""
    config = {**CONFIG, "num_hidden_layers": num_layers}
    spec = read(config, "config.json")
    model = native.build(spec, seed=1, initializer_range=0.05)
    native.save(model, spec, folder / "base", config=config)
    save_tokenizer(folder / "base")
    weights = {f"model.{name}": one.detach() for name, one in model.named_parameters()}
    add_lora(model, rank=4, alpha=8, dora=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.02)
    adapter.save(model, folder / "adapter", base_name=str(folder / "base"))
    values = {
        "model": {"base": str(folder / "base")},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"learning_rate": 0.1},
        "output": {"folder": str(folder / "run")},
    }
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    checkpoints.prepare(run / "checkpoints", 7)
    files = {}
    for rank in range(3):
        pieces = {}
        for name, one in weights.items():
            size = -(-one.shape[0] // 3)
            rows = one[rank * size : (rank + 1) * size]
            pieces[name] = Piece(rows, (rank * size, *(0,) * (one.dim() - 1)), tuple(one.shape))
        file = f"weights-{rank + 1:05d}-of-00003.safetensors"
        files[file] = checkpoints.write_group(run / "checkpoints", 7, file, pieces)
    checkpoints.commit(run / "checkpoints", 7, files, {})
    return sum(one.nbytes for one in weights.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to read the peak from")
def test_memory_does_not_grow_with_the_model(tmp_path):
    make(tmp_path / "small", 1)
    num_bytes = make(tmp_path / "large", 24)
    assert num_bytes > 6 * LARGEST
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[2] for line in lines if len(line) == 3] == ["1"] * 4
    peaks = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    # The small model takes the same tensor and the same libraries. 23 layers more, of 240 MB, may add their adapter,
    # and what the allocator does not give back.
    assert peaks["large-export"] - peaks["small-export"] < LARGEST, peaks
    # Transformers and the other libraries take some 260 MB beyond torch alone.
    assert peaks["large-export"] - peaks["bare"] < 300e6 + 2 * LARGEST, peaks
    index = json.loads((tmp_path / "large" / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
