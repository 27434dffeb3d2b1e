import pytest

from stoker.plan import track_record
from stoker.plan.track_record import Outcome


@pytest.fixture(autouse=True)
def machine_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))


def outcome(memory=1.0, seconds=1.0, device="T4"):
    return Outcome(device, "some/model", "lora", round(1000 * memory), 1000, seconds, 1.0)


def test_the_last_twelve_runs_are_quoted_by_their_medians():
    for _ in range(5):
        track_record.add(outcome(memory=9.0, seconds=9.0))
    for _ in range(12):
        track_record.add(outcome(memory=1.018, seconds=0.96))
    assert track_record.quote() == "Predicted over measured, last 12 runs here: memory +1.8%, time -4%."


def test_only_the_device_that_is_named_is_quoted():
    track_record.add(outcome(memory=2.0, device="H100"))
    track_record.add(outcome(memory=1.1))
    assert track_record.quote("T4") == "Predicted over measured, last run here: memory +10.0%, time +0%."
    assert track_record.quote("L4") == ""


def test_torn_lines_and_runs_without_a_measurement_are_left_out():
    track_record.add(outcome())
    track_record.add(Outcome("T4", "some/model", "lora", 10, 0, 1.0, 1.0))
    with track_record.path().open("a") as file:
        file.write('{"device": "T4", "mod\n[1]\n')
    assert len(track_record.read()) == 1
