import pytest


@pytest.mark.parametrize("name", ["context_parallel_size", "sequence_parallel_degree"])
def test_processes_that_share_rows_are_asked_for_by_either_name(config, line, name):
    assert config(**{name: 4}).engine.context_parallel == 4
    assert line(**{name: 4}).kind == "honoured"
    assert line(**{name: 1}).kind == "no effect"


def test_the_newer_name_counts_where_both_are_given(config):
    assert config(sequence_parallel_degree=2, context_parallel_size=4).engine.context_parallel == 4
