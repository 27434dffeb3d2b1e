"""Axolotl's YAMLs as users bring them, with a tiny model and rows in place of theirs: from file to trained weights."""

import io
import json
import runpy
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from stoker.compose.train import train
from stoker.config.load import load, load_with_origins

HELD = runpy.run_path(str(Path(__file__).parents[1] / "unit/config/axolotl/cases.py"))
CASES, REFUSED = HELD["CASES"], HELD["REFUSED"]
ALPACA = [
    {"instruction": f"Add one to {number}.", "input": "" if number % 2 else "Briefly.", "output": f"{number + 1}"}
    for number in range(24)
]
CHATS = [
    {"conversations": [{"from": "human", "value": f"{number} plus one?"}, {"from": "gpt", "value": f"{number + 1}."}]}
    for number in range(24)
]
TEXTS = [{"text": f"{number} is followed by {number + 1}. " * 4} for number in range(24)]
ROWS = {"alpaca": ALPACA, "alpaca:chat": ALPACA, "chat_template": CHATS, "pretrain": TEXTS}
# Tokens that the tiny model's tokenizer does not know would need an adapter that trains the embedding.
KNOWN = {"bos_token": "<|user|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "pad_token": "<|new|>"}


def swapped(keys, folder, model):
    """The keys of a case with a tiny model, a few rows and three steps in place of its own."""
    keys = json.loads(json.dumps(keys))
    lists = [keys[name] for name in ("datasets", "pretraining_dataset") if keys.get(name)]
    for entry in (entry for found in lists for entry in found):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[entry["type"]]))
        entry["path"] = str(path)
        for name in ("name", "split"):
            entry.pop(name, None)
    if keys.get("special_tokens") and keys.get("adapter"):
        keys["special_tokens"] = {name: KNOWN[name] for name in keys["special_tokens"]}
    if keys.get("deepspeed"):
        keys["deepspeed"] = {"zero_optimization": {"stage": 2}}
    return keys | {
        "base_model": str(model),
        "tokenizer_config": None,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "loss_watchdog_threshold": 20 if keys.get("loss_watchdog_threshold") else None,
        "sequence_len": 256,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_steps": None,
        "save_strategy": None,
        "lora_r": 4 if keys.get("adapter") else None,
    }


@pytest.mark.parametrize("name", sorted(set(CASES) - set(REFUSED)))
def test_usual_files_train(tmp_path, tiny_model, name):
    path = tmp_path / "their.yml"
    path.write_text(yaml.safe_dump(swapped(CASES[name], tmp_path, tiny_model), sort_keys=False))
    loaded = load_with_origins(path, ["engine.device=cpu", "engine.num_threads=1", "output.trackers=[]"])

    result = train(loaded, console=Console(file=io.StringIO()))

    assert (result.reason, result.step) == ("finished", 3)
    assert result.weights.is_dir()
    kept = load(result.folder / "config.yaml")
    assert kept.train.batch_size == loaded.config.train.batch_size
