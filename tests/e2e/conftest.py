"""A tiny model, a few rows and a YAML on disk, and the command line as a real process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass
class Stoker:
    """Runs `stoker` in `folder` as a user would, in a process of its own."""

    folder: Path

    def command(self, *arguments):
        return [sys.executable, "-m", "stoker.cli.main", *map(str, arguments)]

    @property
    def environment(self):
        return {**os.environ, **ENVIRONMENT, "HOME": str(self.folder)}

    def __call__(self, *arguments, code=0, stdin=""):
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert code == 1 or "Traceback" not in done.stderr
        return done

    def killed_at(self, *arguments, metrics, lines, number=signal.SIGKILL):
        """Starts the command and sends it a signal once its metrics hold `lines` lines; returns (exit code, stdout)."""
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_text().count("\n") >= lines:
                process.send_signal(number)
                break
            time.sleep(0.005)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Llama-shaped folder written by Transformers itself, with a byte-level tokenizer and a ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def chat_rows(count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus one?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
        }
        for number in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows():
    """Makes rows of a chat."""
    return chat_rows


@pytest.fixture
def stoker(tmp_path):
    return Stoker(tmp_path)


@pytest.fixture
def run_values(tmp_path, tiny_model):
    """The values of a small LoRA run in `tmp_path`, to change and write."""
    write_rows(tmp_path / "train.jsonl", chat_rows(24))
    return {
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": [{"path": "train.jsonl"}],
            "validation": 4,
            "sequence_length": 128,
            "packing": False,
            "cache_folder": str(tmp_path / "cache"),
        },
        "train": {"steps": 8, "batch_size": 4, "learning_rate": 0.01, "evaluate_every_steps": 4},
        "engine": {"device": "cpu", "num_threads": 1},
        "output": {"folder": "run", "save_every_steps": 2, "trackers": []},
    }


@pytest.fixture
def write_yaml(tmp_path):
    def write(values, name="run.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False))
        return name

    return write
