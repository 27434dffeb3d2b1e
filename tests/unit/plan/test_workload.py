import pytest

from stoker.data.pack import pack
from stoker.errors import ConfigError
from stoker.plan.workload import Documents, from_audit, given, log_normal, longest_of, packed_fill, workload


def documents(*lengths, count=None, trained=0.5):
    histogram = {length: float(lengths.count(length)) for length in set(lengths)}
    return Documents(histogram, count or len(lengths), trained, "a test")


def test_packing_fills_rows_as_the_data_room_does():
    lengths = [
        int(length) for length, count in log_normal(400, 300, 1.0, "").lengths.items() for _ in range(round(count))
    ]
    lengths = [min(length, 2048) for length in lengths]
    packed = len(pack(lengths, 2048))
    ours = sum(lengths) / (packed_fill(documents(*lengths), 2048) * 2048)
    assert ours == pytest.approx(packed, rel=0.02)


def test_epochs_become_steps_of_packed_rows(run):
    work = workload(run("train.epochs=3", "train.batch_size=8"), documents(*[512] * 4096))
    assert (work.sequences, work.fill, work.steps) == (1024, 1.0, 3 * 128)
    assert work.rows.tokens == 2048
    assert work.rows.document_tokens == 512
    assert work.rows.trained_share == 0.5


def test_what_is_held_out_is_not_trained_on(run):
    whole = workload(run("train.batch_size=8"), documents(*[512] * 4096)).steps
    assert workload(run("train.batch_size=8", "data.validation=0.25"), documents(*[512] * 4096)).steps == 0.75 * whole


def test_rows_that_are_not_packed_are_as_long_as_the_longest_beside_them(run):
    data = documents(100, 100, 100, 700)
    alone, four = (workload(run("data.packing=false"), data, micro_rows=rows).rows for rows in (1, 4))
    assert alone.tokens == 250
    # 700 unless all four are short: (3/4)^4.
    assert four.tokens == pytest.approx(700 - 600 * 0.75**4)
    assert four.trained_share == pytest.approx(0.5 * 250 / four.tokens)
    assert longest_of(data, 1) == data.mean


def test_longer_documents_are_cut(run):
    work = workload(run("data.sequence_length=1024"), documents(5000, 5000))
    assert work.sequences == 2
    assert work.rows.document_tokens == 1024


def test_attention_feels_long_documents_more():
    assert documents(100, 300).felt == (100**2 + 300**2) / 400


def test_without_data_rows_are_full_and_the_run_is_as_long_as_it_says(run):
    work = workload(run("train.steps=7"), None)
    assert (work.steps, work.sequences, work.rows.trained_share) == (7, None, 1.0)
    assert workload(run(), None).steps is None


def test_lengths_are_spread_about_the_mean_that_is_known():
    assert log_normal(1000, 400, 1.0, "").mean == pytest.approx(400, rel=0.03)


def test_totals_of_an_audit_are_read():
    found = from_audit({"documents": 10, "tokens": 4000, "trained_tokens": 1000}, "x")
    assert (found.count, found.trained_share) == (10, 0.25)
    assert found.mean == pytest.approx(400, rel=0.03)
    assert from_audit({"documents": 0, "tokens": 0, "trained_tokens": 0}, "x") is None


def test_flags_go_before_what_is_known():
    known = documents(100, 300)
    assert given(rows=None, tokens_per_row=None, trained_share=None, known=known) is known
    assert given(rows=50, tokens_per_row=None, trained_share=None, known=known).count == 50
    assert given(rows=None, tokens_per_row=None, trained_share=0.9, known=known).trained_share == 0.9
    assert given(rows=7, tokens_per_row=500, trained_share=None, known=None).trained_share == 1.0
    with pytest.raises(ConfigError, match="Give both"):
        given(rows=7, tokens_per_row=None, trained_share=None, known=None)
    with pytest.raises(ConfigError, match="--trained-share"):
        given(rows=7, tokens_per_row=5, trained_share=1.5, known=None)
