import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stoker.checkpoint.read import load_latest
from stoker.train.interrupt import Interrupt

TOY = Path(__file__).parent / "toy.py"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_noted(number, capfd):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.name == signal.Signals(number).name
    assert signal.getsignal(number) == before
    assert "finishing the step" in capfd.readouterr().err


def test_a_second_ctrl_c_acts_at_once():
    with Interrupt(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_takes_no_signals():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run():
        with Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def start(folder, *, seconds_a_step):
    return subprocess.Popen(
        [sys.executable, TOY, folder, str(seconds_a_step)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_run_told_to_stop_finishes_its_step_saves_and_ends(tmp_path, number):
    child = start(tmp_path, seconds_a_step=0.05)
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(number)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0
    assert f"{number.name}: finishing the step and saving" in errors
    *steps, ending = output.splitlines()
    last = int(steps[-1]) if steps else 3
    assert ending == f"interrupted {last} {number.name} step-{last:06d}"
    loaded = load_latest(tmp_path)
    assert loaded.step == last < 400
    assert loaded.values["train"]["step"] == last


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_real_run_now(tmp_path):
    child = start(tmp_path, seconds_a_step=300)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline() == "\n"
    assert "finishing the step" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert load_latest(tmp_path) is None
