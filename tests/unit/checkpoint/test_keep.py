import pytest

from stoker.checkpoint.keep import keep
from stoker.checkpoint.write import save


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


@pytest.fixture
def five(tmp_path, content):
    for step in range(1, 6):
        save(tmp_path, step, **content())
    return tmp_path


def test_the_last_and_the_best_stay(five):
    assert sorted(keep(five, last=2, steps=[1])) == [2, 3]
    assert steps(five) == [1, 4, 5]


def test_without_a_best_only_the_last_stay(five):
    keep(five, last=1)
    assert steps(five) == [5]


def test_fewer_than_the_limit_all_stay(five):
    assert keep(five, last=9) == []
    assert steps(five) == [1, 2, 3, 4, 5]


def test_none_at_all_is_refused(five):
    with pytest.raises(ValueError, match="at least one"):
        keep(five, last=0)
    assert len(steps(five)) == 5
