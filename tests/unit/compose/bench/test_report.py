import csv
import json

import pytest
from rich.console import Console

from stoker.compose.bench import report
from stoker.compose.bench.floor import Floor
from stoker.compose.bench.result import Measured, fault, speed
from stoker.errors import OutputError

FLOOR = Floor(seconds=0.5, recomputed_seconds=0.75, attention_seconds=0.1, flops=2e12, peak_flops=8e12)
OURS = Measured("stoker", 300.0, 1.0, 2.0, 3.0, 2**30, (6.0, 5.0), 0.1)
THEIRS = Measured("hf", 200.0, 1.5, 2.0, 3.0, 2**31, (6.0, 5.0), 0.1, versions=("peft 1",))
FAILED = Measured("unsloth", error="out of memory")


@pytest.fixture
def facts():
    results = report.rows([OURS, THEIRS, FAILED], FLOOR, computes_again=True)
    return {"cell": "A", "title": "t", "device": "d", "commit": "c", "date": "now", "results": results}


def test_shares_and_ratios_come_from_the_same_run(facts):
    ours, theirs, failed = facts["results"]
    assert ours["share_of_floor"] == 0.5
    assert ours["share_of_recomputed_floor"] == 0.75
    assert ours["share_of_peak"] == 0.25
    assert theirs["stoker_speed_ratio"] == 1.5
    assert theirs["stoker_memory_ratio"] == 0.5
    assert failed["share_of_floor"] is failed["stoker_speed_ratio"] is failed["tokens_per_second"] is None


def test_the_second_floor_is_for_layers_that_compute_again():
    (row,) = report.rows([OURS], FLOOR, computes_again=False)
    assert row["share_of_recomputed_floor"] is None


def test_results_are_written_as_json_and_csv(facts, tmp_path):
    output, beside = report.write(facts, tmp_path / "new" / "out.json")
    assert json.loads(output.read_text())["results"] == facts["results"]
    with beside.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["cell"], line["name"], line["commit"]) for line in lines] == [
        ("A", "stoker", "c"),
        ("A", "hf", "c"),
        ("A", "unsloth", "c"),
    ]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--out"):
        report.write(facts, tmp_path / "file" / "out.json")


def test_the_table_shows_who_has_no_result(facts):
    console = Console(width=160, record=True)
    console.print(report.table(facts))
    text = console.export_text()
    assert "50% (75%)" in text
    assert "1.50 x" in text
    assert "no result" in text


def test_steps_of_different_sizes_count_by_their_rate():
    assert speed([10, 20, 90], [1.0, 1.0, 3.0]) == (20.0, 1.0)


def test_numbers_without_meaning_are_refused():
    assert fault([1.0, 2.0], 0.1) == ""
    assert "not finite" in fault([1.0, float("nan")], 0.1)
    assert "nothing was trained" in fault([1.0], 0.0)
    assert "nan" in fault([1.0], float("nan"))
