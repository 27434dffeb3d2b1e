"""A tiny model, a few rows and a YAML on disk, and the command line as a real process."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from preloaded import Command, Server

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass
class Running:
    """A command that was started, and the folder of its input, output and errors."""

    process: subprocess.Popen | Command
    streams: Path

    def finish(self, timeout=240):
        """Waits for its end; returns its exit code, output and errors."""
        code = self.process.wait(timeout)
        output, errors = ((self.streams / name).read_text() for name in ("output", "errors"))
        return subprocess.CompletedProcess(["stoker"], code, output, errors)


@dataclass
class Stoker:
    """Runs `stoker` in `folder` as a user would, in a process of its own."""

    folder: Path
    streams: Path
    """Where a folder for each command's input and output goes."""
    server: Server
    _count: Iterator[int] = field(default_factory=itertools.count)

    @property
    def environment(self):
        return {**os.environ, **ENVIRONMENT, "HOME": str(self.folder)}

    def start(self, *arguments, stdin="", fresh=False):
        """Starts the command; `fresh`: in a Python that has nothing loaded, which takes seconds longer."""
        arguments = [str(one) for one in arguments]
        folder = self.streams / str(next(self._count))
        folder.mkdir()
        paths = [folder / name for name in ("input", "output", "errors")]
        for path, text in zip(paths, (stdin, "", ""), strict=True):
            path.write_text(text)
        if not fresh:
            return Running(self.server.start(arguments, self.folder, self.environment, paths), folder)
        command = [sys.executable, "-m", "stoker.cli.main", *arguments]
        with paths[0].open() as read, paths[1].open("w") as output, paths[2].open("w") as errors:
            streams = {"stdin": read, "stdout": output, "stderr": errors}
            return Running(subprocess.Popen(command, cwd=self.folder, env=self.environment, **streams), folder)

    def __call__(self, *arguments, code=0, **how):
        done = self.start(*arguments, **how).finish()
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert code == 1 or "Traceback" not in done.stderr
        return done

    def killed_at(self, *arguments, metrics, lines, number=signal.SIGKILL):
        """Starts the command and sends it a signal once its metrics hold `lines` lines; returns (exit code, stdout)."""
        running = self.start(*arguments)
        deadline = time.monotonic() + 120
        while running.process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_text().count("\n") >= lines:
                running.process.send_signal(number)
                break
            time.sleep(0.005)
        done = running.finish(timeout=60)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    # As `stoker` sets it before it loads them.
    one = Server({**os.environ, **ENVIRONMENT, "HOME": str(home), "TRANSFORMERS_VERBOSITY": "error"})
    yield one
    one.close()


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
def stoker(tmp_path, tmp_path_factory, server):
    return Stoker(tmp_path, tmp_path_factory.mktemp("streams"), server)


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
