"""A run goes on over another number of ranks and under another strategy, from what all ranks wrote together."""

import importlib.util
import os

import jobs
import pytest
from sharding_jobs import CHECKPOINTED, STEPS, all_of

ALL = os.environ.get("STOKER_TEST_ALL") == "1"


def expected(name, count):
    return jobs.alone(name, count)["losses"]


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_a_run_of_one_process_goes_on_over_two_and_again_in_one(shared, kind):
    last = all_of(None, "single", CHECKPOINTED[kind], f"{shared['checkpoints at']}/{kind}")
    for name in CHECKPOINTED[kind]:
        losses, num_bytes, files = shared["checkpoints"][kind][name]
        grain = 2 * jobs.CASES[name].grain
        assert losses == pytest.approx(expected(name, 2 * STEPS)[STEPS:], abs=grain)
        assert last[name][0] == pytest.approx(expected(name, 3 * STEPS)[2 * STEPS :], abs=grain)
        assert {"weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"} <= set(files)
        # Three numbers a trained parameter, or less, and some KiB of names: a frozen base is not in it.
        trained = sum(one.numel() for one in jobs.build(jobs.CASES[name]).parameters() if one.requires_grad)
        each = {"adamw": 12, "adamw_8bit": 6, "adafactor": 4}[jobs.CASES[name].optimizer]
        assert each * trained < num_bytes < (each + 0.2) * trained + 40_000
    assert not shared["read back"]


def chain(places, names, tmp_path):
    """Trains over `places` (strategy, ranks) in turn; returns the losses of each case."""
    losses = {name: [] for name in names}
    for number, (kind, count) in enumerate(places):
        work = tmp_path / f"ranks-{number}"
        work.mkdir()
        alone = kind == "single"
        found = (
            all_of(None, kind, names, tmp_path) if alone else jobs.on_ranks(count, work, all_of, kind, names, tmp_path)
        )
        for name, (more, *_) in found.items():
            losses[name] += more
    return losses


EVERY = tuple(jobs.CASES)
SOME = ("full", "tied", "nf4", "mixture", "opt")  # DeepSpeed's engines take longest to start


@pytest.mark.skipif(not ALL, reason="make test-distributed runs it")
@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([("fsdp2", 2), ("single", 1), ("fsdp2", 2)], EVERY),
        ([("fsdp2", 4), ("fsdp2", 2), ("single", 1), ("fsdp2", 4)], EVERY),
        ([("ddp", 4), ("fsdp2", 2), ("ddp", 2)], EVERY),
        ([("zero3", 4), ("fsdp2", 2), ("single", 1), ("zero2", 4)], SOME),
        ([("ddp", 2), ("zero1", 4), ("zero3", 2), ("fsdp2", 4)], SOME),
    ],
)
def test_a_run_goes_on_over_any_number_of_ranks(places, names, tmp_path):
    if any(kind.startswith("zero") for kind, _ in places) and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; `make env` does it")
    losses = chain(places, names, tmp_path)
    for name in names:
        grain = 4 * jobs.CASES[name].grain
        assert losses[name] == pytest.approx(expected(name, len(places) * STEPS), abs=grain)
