import os
import signal

import pytest

from stoker.cli.signals import leaving_on_signals


def leave_by(number):
    """A library that makes an error of its own of whatever is raised in it."""
    with leaving_on_signals():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except BaseException as error:
            raise ValueError("what a library says") from error


def test_ctrl_c_and_sigterm_leave_whatever_a_library_makes_of_them():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        leave_by(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        leave_by(signal.SIGTERM)
    assert left.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ValueError, match="mine"), leaving_on_signals():
        raise ValueError("mine")
