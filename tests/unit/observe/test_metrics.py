import json

from stoker.observe.events import Evaluated, RunStarted, StepLogged
from stoker.observe.metrics import MetricsFile, read


def logged(step, loss=1.0):
    return StepLogged(
        step=step,
        total_steps=9,
        epoch=step / 3,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=0.5,
        num_tokens=100,
        num_trained_tokens=60,
        padding_share=0.1,
        tokens_per_second=1000.0,
        memory_bytes=2**20,
        seconds=0.1,
    )


def run(path, first_step, events):
    file = MetricsFile(path)
    file.handle(RunStarted(total_steps=9, first_step=first_step, steps_per_epoch=3))
    for event in events:
        file.handle(event)
    file.close()


def test_lines_have_the_documented_names(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, 0, [logged(1, loss=2.5), Evaluated(step=1, loss=2.25, num_trained_tokens=10, seconds=0.1)])
    step, evaluation = read(path)
    assert step["loss"] == 2.5
    named = {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes"}
    assert named <= step.keys()
    assert evaluation["validation_loss"] == 2.25
    assert evaluation["step"] == 1


def test_resume_drops_the_lines_after_its_checkpoint_and_keeps_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, 0, [logged(1), logged(2), logged(3, loss=99.0)])
    run(path, 2, [logged(3, loss=0.5), logged(4)])
    assert [(record["step"], record["loss"]) for record in read(path)] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 1.0)]


def test_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(path, 0, [logged(1)])
    run(path, 0, [logged(1), logged(2)])
    assert [record["step"] for record in read(path)] == [1, 2]


def test_line_cut_short_by_a_killed_process_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')
    assert [record["step"] for record in read(path)] == [1]
    run(path, 1, [logged(2)])
    assert [record["step"] for record in read(path)] == [1, 2]
