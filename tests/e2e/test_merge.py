"""`stoker merge` and `stoker export` as a user meets them: on a run, and stopped half-way."""

import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.export import adapter
from stoker.models import native

pytestmark = pytest.mark.slow

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4_000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture
def trained(tmp_path):
    """An adapter on a base large enough that writing and checking it take a second or two."""
    spec = read(CONFIG, "config.json")
    model = native.build(spec, initializer_range=0.1)
    native.save(model, spec, tmp_path / "base", config=CONFIG)
    add_lora(model, rank=2, alpha=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapter.save(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    return tmp_path / "adapter"


def test_stopped_by_any_signal_it_leaves_no_folder_and_the_next_one_clears_what_is_left(stoker, trained, tmp_path):
    left = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        running = stoker.start("merge", trained, "-o", "out")
        process, deadline = running.process, time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not list(tmp_path.glob(".out.part/*")):
            time.sleep(0.002)
        process.send_signal(number)
        done = running.finish(timeout=60)
        assert done.returncode in (130, 143, -signal.SIGKILL), done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
        left.append({path.name for path in tmp_path.glob(".out*")})
    assert left == [set(), set(), {".out.part", ".out.lock"}]
    assert "verified: logits differ" in stoker("merge", trained, "-o", "out").stdout
    assert not list(tmp_path.glob(".out*"))


def test_a_run_and_its_checkpoints_are_exported(stoker, run_values, write_yaml, tmp_path):
    values = {**run_values, "adapter": {"rank": 2, "alpha": 4}}
    values["output"] = {**run_values["output"], "save_every_steps": 2}
    run_file = write_yaml(values)
    stoker("train", run_file)
    run = values["output"]["folder"]
    last = sorted((tmp_path / run / "checkpoints").glob("step-*"))[-1]
    assert "copied the adapter" in stoker("export", run, "-o", "finished").stdout
    assert "wrote the adapter" in stoker("export", last, "-o", "exported").stdout
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("finished", "exported"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "there is no such folder" in stoker("merge", "nowhere", "-o", "x", code=2).stderr
    assert not (tmp_path / "x").exists()
