from statistics import median

import hypothesis.strategies as st
from hypothesis import given

from stoker.data.audit import Tally


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 12))
def test_tallies_of_parts_add_up_to_that_of_the_whole(lengths, cut):
    whole, parts = Tally(), [Tally(), Tally()]
    for index, length in enumerate(lengths):
        for tally in (whole, parts[index >= cut]):
            tally.document(f"row {index}", length=length, num_trained=length % 3)
            tally.counts["rows"] += 1
            tally.roles["user"] += length
    merged = Tally()
    for part in parts:
        merged.merge(part)
    facts = {"train_on": ("all",), "end_of_turn_wanted": True}
    assert merged.audit(**facts) == whole.audit(**facts)
    assert whole.audit(**facts).median == (int(median(lengths)) if lengths else 0)
