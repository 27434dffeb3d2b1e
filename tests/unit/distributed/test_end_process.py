"""How a process ends that had joined others: all it owes is done, and nothing is left to the interpreter's own end."""

import subprocess
import sys

import pytest

# Stands for a thread of a process group's that asks for the lock while the interpreter is taken down.
_ABORTS = """
import atexit, os, sys

class Last:
    def __del__(self):
        os.abort()

kept = Last()
"""


def ended(code):
    return subprocess.run([sys.executable, "-c", _ABORTS + code], capture_output=True, text=True, check=False)


def test_the_interpreter_s_own_end_would_be_an_abort():
    assert ended("").returncode == -6


@pytest.mark.parametrize("code", [0, 2])
def test_hooks_have_run_and_all_is_written_but_the_interpreter_is_not_taken_down(code):
    done = ended(f"""
from stoker.distributed.ranks import end_process
atexit.register(print, "saved")
sys.stdout.write("said ")
sys.stderr.write("warned")
end_process({code})
""")
    assert (done.returncode, done.stdout, done.stderr) == (code, "said saved\n", "warned")


def test_a_hook_that_fails_does_not_keep_it():
    done = ended("""
from stoker.distributed.ranks import end_process
atexit.register(lambda: 1 / 0)
end_process(0)
""")
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr
