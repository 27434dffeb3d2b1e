import json
import math

import pytest

from stoker.observe import report


def run_folder(folder, *, losses=(3.0, 2.0, 1.0)):
    lines = [
        {"step": step, "loss": loss, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 1000.0 * step}
        | {"memory_bytes": step * 2**20, "num_trained_tokens": 10}
        for step, loss in enumerate(losses, start=1)
    ]
    lines.append({"step": 2, "validation_loss": 1.75})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "config.yaml").write_text("model:\n  base: <script>alert(1)</script>\n")
    (folder / "plan.json").write_text(json.dumps({"precision": "float32", "reasons": {"precision": "a CPU"}}))
    (folder / "audit.json").write_text(json.dumps({"train": {"rows": 4321, "trained share": 0.5}}))
    answers = [{"question": "What is LoRA?", "answer": "Low-rank & small."}]
    run = {"title": "LoRA of tiny", "answers": answers, "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def test_report_holds_curves_configuration_versions_and_audit(tmp_path):
    page = report.write(run_folder(tmp_path)).read_text()
    for part in ("Learning rate", "validation", "float32", "a CPU", "4,321", "2.13.0", "Low-rank &amp; small."):
        assert part in page


def test_report_is_self_contained(tmp_path):
    page = report.write(run_folder(tmp_path)).read_text()
    assert "Plotly.newPlot" in page
    assert '<script src="http' not in page
    assert '<link rel="stylesheet" href="http' not in page


def test_report_escapes_what_it_shows(tmp_path):
    page = report.write(run_folder(tmp_path)).read_text()
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_report_survives_a_run_without_steps_or_with_a_loss_that_is_not_finite(tmp_path):
    assert "Curves" not in report.write(tmp_path).read_text()
    assert "Curves" in report.write(run_folder(tmp_path, losses=(3.0, math.nan, 1.0))).read_text()


@pytest.mark.parametrize(
    ("strategy", "shown"),
    [
        ("single", set()),
        ("ddp", {"num processes", "per node", "sharing"}),
        ("fsdp2", {"num processes", "per node", "sharing", "replicas", "reshards", "on host"}),
        ("deepspeed", {"num processes", "per node", "sharing", "stage", "on host", "on disk", "bucket values"}),
    ],
)
def test_a_plan_is_told_without_what_means_nothing_to_its_strategy(tmp_path, strategy, shown):
    everything = {"num_processes": 2, "per_node": 2, "sharing": 1, "replicas": 1, "reshards": True, "stage": 2}
    everything |= {"on_host": [], "on_disk": [], "bucket_values": 5 * 10**8}
    (run_folder(tmp_path) / "plan.json").write_text(json.dumps({"strategy": strategy, **everything}))
    page = report.write(tmp_path).read_text()
    assert f"<td>{strategy}</td>" in page
    names = {name.replace("_", " ") for name in everything}
    assert {name for name in names if f"<th>{name}</th>" in page} == shown


def test_a_choice_against_something_is_told_with_its_reason_and_what_does_not_arise_is_not(tmp_path):
    plan = {"strategy": "fsdp2", "reshards": False, "keep_transposed": None, "stage": 0}
    reasons = {"reshards": "11 MiB that are free"}
    (run_folder(tmp_path) / "plan.json").write_text(json.dumps({**plan, "reasons": reasons}))
    page = report.write(tmp_path).read_text()
    assert '<th>reshards</th><td>no</td><td class="soft">11 MiB that are free</td>' in page
    assert "<th>keep transposed</th>" not in page


def test_smoothing_is_unbiased_at_the_start():
    assert report._smooth([4.0, 4.0, 4.0], window=10) == [4.0, 4.0, 4.0]


def test_predictions_stand_beside_measurements(tmp_path):
    memory = {name: {"predicted": 110 * 2**20, "measured": 100 * 2**20} for name in ("weights", "total")}
    facts = {"memory": memory, "step_seconds": {"predicted": 0.96, "measured": 1.0}}
    (run_folder(tmp_path) / "run.json").write_text(json.dumps(facts))
    page = report.write(tmp_path).read_text()
    for part in ("memory: weights", "110.0 MiB", "100.0 MiB", "+10.0%", "seconds of a step", "-4%"):
        assert part in page
