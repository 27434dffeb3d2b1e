"""The main job from YAML to a merged model that Transformers loads, as a user runs it."""

import json

import pytest
import torch

pytestmark = pytest.mark.slow


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lora_run_trains_answers_evaluates_merges_and_chats(stoker, run_values, write_yaml, tmp_path):
    run_values["output"] |= {"questions": ["What is 1 plus one?"], "trackers": ["tensorboard"]}
    yaml = write_yaml(run_values)
    assert "is fine" in stoker("check", yaml).stdout

    said = stoker("train", yaml, fresh=True).stdout
    run = tmp_path / "run"
    assert (run / "adapter/adapter_model.safetensors").is_file()
    for name in ("config.yaml", "plan.json", "audit.json", "run.json", "metrics.jsonl", "report.html"):
        assert (run / name).stat().st_size > 0
    for part in (
        "before",
        "after",
        "What is 1 plus one?",
        "run/adapter",
        "step-000008",
        "report.html",
        "stoker chat run",
    ):
        assert part in said
    steps = [record for record in records(run / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    losses = json.loads((run / "run.json").read_text())["losses"]
    assert losses["train"]["after"] < losses["train"]["before"]

    evaluated = json.loads(stoker("eval", yaml, "--json").stdout)
    assert evaluated["loss"] == pytest.approx(losses["validation"]["after"], abs=1e-6)
    base = json.loads(stoker("eval", yaml, "--json", "--base").stdout)
    assert base["loss"] == pytest.approx(losses["validation"]["before"], abs=1e-6)

    assert "verified" in stoker("merge", "run", "-o", "merged").stdout
    prompt = ("--prompt", "What is 2 plus one?", "--max-new-tokens", "12")
    from_adapter, from_merged = stoker("generate", "run", *prompt).stdout, stoker("generate", "merged", *prompt).stdout
    assert from_adapter == from_merged
    assert from_adapter.strip()
    chatted = stoker("chat", "run", "--max-new-tokens", "12", stdin="What is 2 plus one?\n/quit\n").stdout
    assert from_adapter.strip() in chatted


def test_full_fine_tuning_writes_a_model_that_transformers_loads_with_the_same_logits(
    stoker, run_values, write_yaml, tmp_path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stoker.arch.families import read
    from stoker.models import native
    from stoker.models.folder import read_config

    del run_values["adapter"]
    run_values["train"]["learning_rate"] = 1e-3
    stoker("train", write_yaml(run_values))
    folder = tmp_path / "run/model"
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("It is 7.")["input_ids"]])
    ours = native.load(folder, read(read_config(folder), "config.json")).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        difference = (ours.logits(ours(ids)) - theirs(ids).logits).abs().max()
    assert difference <= 1e-5  # the same weights in fp32; sums in another order


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_adapter_variants_train_and_lower_the_loss(stoker, run_values, write_yaml, tmp_path, kind):
    run_values["adapter"] |= {"kind": "dora"} if kind == "dora" else {"rank_stabilized": True}
    stoker("train", write_yaml(run_values))
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["use_dora"] == (kind == "dora")
    assert config["use_rslora"] == (kind == "rslora")
    losses = json.loads((tmp_path / "run/run.json").read_text())["losses"]
    assert losses["train"]["after"] < losses["train"]["before"]


def test_completion_text_pretrains_in_packed_pieces(stoker, run_values, write_yaml, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join("the same words again and again " * 20 for _ in range(8)))
    run_values["data"] |= {"train": [{"path": "text.txt"}], "validation": 2, "packing": True, "sequence_length": 64}
    run_values["task"] = {"kind": "pretrain"}
    said = stoker("train", write_yaml(run_values)).stdout
    assert "completion" in said
    audit = json.loads((tmp_path / "run/audit.json").read_text())
    assert audit["train"]["truncated"] == 0
    losses = json.loads((tmp_path / "run/run.json").read_text())["losses"]
    assert losses["train"]["after"] < losses["train"]["before"]


def test_folder_of_another_run_is_refused_unless_told(stoker, run_values, write_yaml):
    run_values["train"]["steps"] = 2
    yaml = write_yaml(run_values)
    stoker("train", yaml)
    assert "already holds a run" in stoker("train", yaml, code=2).stderr
    stoker("train", yaml, "--overwrite")
    assert "--resume" in stoker("train", yaml, "--resume", "--overwrite", code=2).stderr


def test_early_stopping_keeps_the_best_weights(stoker, run_values, write_yaml, tmp_path):
    run_values["train"] |= {
        "learning_rate": 1.0,
        "steps": 30,
        "evaluate_every_steps": 1,
        "schedule": {"kind": "constant"},
    }
    run_values["train"]["early_stopping"] = {"patience": 2}
    yaml = write_yaml(run_values)
    said = stoker("train", yaml).stdout
    assert "early stopping" in said
    assert "best ones" in said
    evaluations = [one for one in records(tmp_path / "run/metrics.jsonl") if "validation_loss" in one]
    best = min(one["validation_loss"] for one in evaluations)
    assert len(evaluations) < 30
    assert evaluations[-1]["validation_loss"] > best
    assert json.loads(stoker("eval", yaml, "--json").stdout)["loss"] == pytest.approx(best, abs=1e-6)
