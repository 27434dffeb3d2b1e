"""Adapters over a quantised base from YAML to merged model, and the engine's other switches, as a user runs them."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import stoker as api
from stoker.errors import ConfigError

pytestmark = pytest.mark.slow
_MEASURED = {"seconds", "tokens_per_second", "memory_bytes"}


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in _MEASURED} for record in records]


def losses(run):
    return json.loads((run / "run.json").read_text())["losses"]


@pytest.fixture
def quantized(run_values):
    run_values["model"]["quantization"] = "nf4"
    run_values["adapter"]["dropout"] = 0.0
    return run_values


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_run_over_a_quantized_base_trains_evaluates_answers_and_merges(stoker, quantized, write_yaml, tmp_path, kind):
    quantized["model"]["quantization"] = kind
    quantized["output"]["questions"] = ["What is 1 plus one?"]
    yaml = write_yaml(quantized)
    said = stoker("train", yaml).stdout
    run = tmp_path / "run"
    assert f"quantization         {kind}" in said
    assert losses(run)["train"]["after"] < losses(run)["train"]["before"]

    # eval and chat load the base as it was trained on: the loss is the run's to the last digits.
    evaluated = json.loads(stoker("eval", yaml, "--json").stdout)
    assert evaluated["loss"] == pytest.approx(losses(run)["validation"]["after"], abs=1e-6)
    assert f"in {kind}" in evaluated["model"]
    base = json.loads(stoker("eval", yaml, "--json", "--base").stdout)
    assert base["loss"] == pytest.approx(losses(run)["validation"]["before"], abs=1e-6)
    if kind != "nf4":
        return
    prompt = ("--prompt", "What is 2 plus one?", "--max-new-tokens", "8")
    answer = stoker("generate", "run", *prompt).stdout.strip()
    chatted = stoker("chat", "run", "--max-new-tokens", "8", stdin="What is 2 plus one?\n/quit\n").stdout
    assert answer in chatted

    # Merged is the base in full precision: near the run's loss, not equal to it.
    assert f"trained on {quantized['model']['base']} in {kind}" in stoker("merge", "run", "-o", "merged").stdout
    full = write_yaml({**quantized, "model": {"base": "merged"}}, "merged.yaml")
    merged = json.loads(stoker("eval", full, "--json", "--model", "merged").stdout)
    assert merged["loss"] != evaluated["loss"]
    assert merged["loss"] == pytest.approx(evaluated["loss"], abs=0.05)


def test_layers_that_fp8_would_spoil_are_left_out_said_and_recorded(stoker, quantized, write_yaml, tmp_path):
    folder = shutil.copytree(quantized["model"]["base"], tmp_path / "spiky")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"][0] *= 1e6
    tensors["model.layers.0.mlp.up_proj.weight"][:, 0] = 0.0  # all that up reads is small beside what it does not
    save_file(tensors, folder / "model.safetensors")
    quantized["model"] = {"base": str(folder), "quantization": "fp8"}
    quantized["train"]["steps"] = 1
    said = stoker("train", write_yaml(quantized)).stdout
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["layers_not_in_fp8"] == ["model.layers.0.mlp.gate_proj, up_proj"]
    (notice,) = [one["message"] for one in facts["notices"] if "fp8" in one["message"]]
    assert notice.startswith("1 of ")
    assert notice in said
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["keep_transposed"] is True
    assert plan["head_in_fp8"] is False  # a CPU has no fp8 products
    assert plan["memory"]["transposed_bytes"] > 0


@pytest.mark.parametrize("recompute", ["none", "mixer"])
def test_killed_run_over_nf4_resumes_exactly(stoker, quantized, write_yaml, tmp_path, recompute):
    quantized["data"]["packing"] = True
    quantized["engine"]["recompute"] = recompute
    quantized["train"] |= {"steps": 30, "evaluate_every_steps": 7}
    quantized["output"]["save_every_steps"] = 5
    unbroken = {**quantized, "output": {**quantized["output"], "folder": "unbroken"}}
    stoker("train", write_yaml(unbroken, "unbroken.yaml"))
    yaml = write_yaml(quantized)
    code, _ = stoker.killed_at("train", yaml, metrics=tmp_path / "run/metrics.jsonl", lines=12)
    assert code == -signal.SIGKILL
    stoker("train", yaml, "--resume")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")
    ours, theirs = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_format_of_the_base_is_another_run(stoker, quantized, write_yaml):
    quantized["train"]["steps"] = 2
    yaml = write_yaml(quantized)
    stoker("train", yaml)
    said = stoker("train", yaml, "--resume", "--set", "model.quantization=int8", code=2).stderr
    assert "model.quantization was 'nf4'" in said


def test_dora_and_dropout_over_nf4_go_through_the_layer_kernel(stoker, quantized, write_yaml, tmp_path):
    quantized["adapter"] |= {"kind": "dora", "dropout": 0.1}
    quantized["engine"]["recompute"] = "input"
    said = stoker("train", write_yaml(quantized)).stdout
    assert re.search(r"^layers +fused", said, re.MULTILINE)
    assert losses(tmp_path / "run")["train"]["after"] < losses(tmp_path / "run")["train"]["before"]


def test_tritons_kernels_train_as_plain_pytorch_does(stoker, quantized, write_yaml, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")  # kernels on a CPU
    quantized["train"] |= {"steps": 2, "batch_size": 1, "evaluate_every_steps": 2}
    quantized["data"] |= {"train": [{"path": "train.jsonl", "limit": 3}], "validation": 1}
    curves = []
    for kernels in ("reference", "triton"):
        quantized["engine"]["kernels"] = kernels
        quantized["output"]["folder"] = kernels
        said = stoker("train", write_yaml(quantized)).stdout
        assert f"kernels              {kernels}" in said
        curves.append([record["loss"] for record in metrics(tmp_path / kernels) if "loss" in record])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)  # fp32, sums in another order


def test_what_cannot_run_here_says_what_can(stoker, quantized, write_yaml):
    yaml = write_yaml(quantized)
    said = stoker("train", yaml, "--set", "engine.memory_limit_gib=0.1", code=2).stderr
    assert "allowed" in said
    assert "What would fit: engine.memory_limit_gib: null" in said
    assert "freezes the base" in stoker("check", yaml, "--set", "adapter=null", code=2).stderr


def test_api_trains_over_a_quantized_base_more_than_once(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = api.load(str(tiny_model), device="cpu", quantization="nf4")
    with pytest.raises(ConfigError, match="freezes the base"):
        model.train(rows(8), learning_rate=0.02, steps=1)
    model.add_lora(rank=4, alpha=8)
    first = model.train(rows(8), learning_rate=0.02, steps=3, batch_size=4, engine={"recompute": "mixer"})
    second = model.train(rows(8), learning_rate=0.02, steps=3, batch_size=4)
    assert second.losses["train"]["after"] < first.losses["train"]["before"]
    answer = model.generate("What is 3 plus one?", max_new_tokens=8)
    assert api.load(str(second.folder), device="cpu").generate("What is 3 plus one?", max_new_tokens=8) == answer
    with pytest.raises(ConfigError, match="Use one of nf4, int8, fp8"):
        api.load(str(tiny_model), quantization="int3")
