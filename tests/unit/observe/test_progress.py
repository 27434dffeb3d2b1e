import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from stoker.observe.events import CheckpointSaved, Evaluated, Notice, RunEnded, RunStarted, StepLogged
from stoker.observe.progress import LiveProgress, PlainProgress, build, duration, size

STEP = StepLogged(
    step=1,
    total_steps=10,
    epoch=0.1,
    loss=2.3456,
    learning_rate=2e-4,
    gradient_norm=0.75,
    num_tokens=100,
    num_trained_tokens=60,
    padding_share=0.125,
    tokens_per_second=1234.0,
    memory_bytes=3 * 2**30,
    seconds=0.1,
)
EVENTS = [
    RunStarted(total_steps=10, first_step=0, steps_per_epoch=5),
    STEP,
    Evaluated(step=1, loss=2.0, num_trained_tokens=50, seconds=0.1, best=True),
    CheckpointSaved(step=1, folder=Path("runs/[a]/checkpoints/step-1"), seconds=0.2, num_bytes=2**20),
    Notice("micro-batch split in two", level="warning"),
    RunEnded(step=1, reason="interrupted", seconds=61.0),
]


def shown(console_kind, **options):
    console = Console(file=io.StringIO(), width=160, **options)
    display = console_kind(console)
    for event in EVENTS:
        display.handle(event)
    display.close()
    return console.file.getvalue()


@pytest.mark.parametrize("kind", [PlainProgress, LiveProgress])
def test_display_shows_every_figure_a_person_wants(kind):
    text = shown(kind, force_terminal=kind is LiveProgress)
    for figure in (
        "2.3456",
        "2.00e-04",
        "0.750",
        "1,234 tok/s",
        "12.5%",
        "3.0 GiB",
        "runs/[a]",
        "interrupted",
        "split in",
    ):
        assert figure in text


def test_lines_are_plain_when_output_is_not_a_terminal():
    assert isinstance(build(Console(file=io.StringIO())), PlainProgress)
    assert "\x1b[" not in shown(PlainProgress)


def test_plain_progress_prints_at_most_one_step_an_interval():
    console = Console(file=io.StringIO(), width=160)
    display = PlainProgress(console, interval_seconds=3600)
    display.handle(EVENTS[0])
    for step in range(1, 10):
        display.handle(StepLogged(**{**STEP.__dict__, "step": step}))
    assert console.file.getvalue().count("tok/s") == 1


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.9, "59s"), (61, "1m01s"), (7500, "2h05m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("num_bytes", "text"), [(512, "512 B"), (3.4 * 2**20, "3.4 MiB"), (5000 * 2**30, "4.9 TiB")])
def test_size(num_bytes, text):
    assert size(num_bytes) == text


READERLESS = """
import signal
from stoker.observe.progress import RunConsole

requested = []
signal.signal(signal.SIGTERM, lambda number, frame: requested.append(number))
console = RunConsole()
input()  # until the reader has gone
for _ in range(3):
    console.print("a step")
raise SystemExit(f"requested {len(requested)}")
"""


def test_a_run_whose_output_nobody_reads_is_asked_to_save_and_end():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", READERLESS], text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "\nNobody reads standard output any more, so the run ends.\nrequested 1\n"
