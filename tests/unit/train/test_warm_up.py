import pytest

from stoker.distributed.rehearsal import Rehearsal
from stoker.train.warm_up import WarmUp


def test_says_what_the_first_step_took_once():
    warm_up = WarmUp("kernels are kept in a folder")
    assert warm_up.after(8.24) is None
    expected = "Warm-up: the first step took 8.2 s, the second 0.5 s (kernels are kept in a folder)."
    assert warm_up.after(0.5) == expected
    assert warm_up.after(0.1) is None


@pytest.mark.parametrize("steps", [(0.9, 0.1), (8.0, 5.0), (2.0, 3.0)])
def test_says_nothing_of_a_step_like_the_others(steps):
    warm_up = WarmUp()
    assert [warm_up.after(seconds) for seconds in steps] == [None, None]


def test_says_what_of_the_first_step_was_a_rehearsal():
    warm_up = WarmUp()
    rehearsal = Rehearsal(2.0, 1.0, 27, 16)
    warm_up.after(8.24, rehearsal)
    assert warm_up.after(0.5, rehearsal).endswith(f"the second 0.5 s. Of the first: {rehearsal.describe()}.")
