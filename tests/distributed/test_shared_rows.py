"""Rows that processes share: losses, every gradient and weights are those of one process with whole rows."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import jobs
import pytest
import shared_rows_jobs
import torch

from stoker.data.batch import IGNORED, Batch
from stoker.distributed.ranks import Place, Ranks
from stoker.distributed.shared_rows import share
from stoker.kernels.head_exchange import HeadExchange

ALL = os.environ.get("STOKER_TEST_ALL") == "1"
QUICK = ("grouped, rungs all and attention", "few kv heads, rungs mixer and input", "as many kv heads, op by op")
NAMES = tuple(shared_rows_jobs.CASES) if ALL else QUICK
WORLDS = {2: (2,), 4: (2, 4)} if ALL else {2: (2,)}
KINDS = ("ddp", "fsdp2")
CHECKS = [(world, size, kind, name) for world in WORLDS for size in WORLDS[world] for kind in KINDS for name in NAMES]


@cache
def alone(name):
    return shared_rows_jobs.run(shared_rows_jobs.CASES[name])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    @cache
    def of(world):
        folder = tmp_path_factory.mktemp("ranks")
        return jobs.on_ranks(world, folder, shared_rows_jobs.run_all, NAMES, WORLDS[world], KINDS)

    return of


@pytest.mark.parametrize(("world", "size", "kind", "name"), CHECKS)
def test_shared_rows_train_as_whole_ones_do(results, world, size, kind, name):
    expected, found = alone(name), results(world)[name, kind, size]
    # Sums are taken in another order: some units in the last place of fp32.
    assert found["losses"] == pytest.approx(expected["losses"], abs=5e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=5e-6)
    assert found["grads"].keys() == expected["grads"].keys()
    largest = max(float(grad.abs().max()) for grad in expected["grads"].values())
    assert largest > 0.01
    for key, grad in expected["grads"].items():
        torch.testing.assert_close(found["grads"][key], grad, atol=2e-5 * largest, rtol=1e-4)
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, atol=1e-5, rtol=1e-4)


def test_parts_hold_the_targets_and_tokens_of_whole_rows():
    targets = torch.full((2, 6), IGNORED)
    targets[0, 1:3], targets[1, 4] = 7, 8
    ids = torch.arange(12).view(2, 6)
    batch = Batch(ids, targets, ((2, 2, 2), (6,)), num_tokens=9, num_trained_tokens=3, row_tokens=(4, 5))
    parts = [batch.part(index, 4) for index in range(4)]
    assert torch.equal(torch.cat([part.input_ids for part in parts], 1)[:, :6], ids)
    assert torch.equal(torch.cat([part.targets for part in parts], 1)[:, :6], targets)
    assert [part.num_trained_tokens for part in parts] == [1, 1, 1, 0]
    assert [part.row_tokens for part in parts] == [(2, 2), (2, 2), (0, 1), (0, 0)]
    assert sum(part.num_tokens for part in parts) == 9
    assert parts[0].document_lengths == ((2, 2, 2, 2), (6, 2))


def test_heads_that_cannot_be_dealt_out_are_refused():
    exchange = HeadExchange(None, index=0, size=3)
    assert [exchange.repeats(24, 8), exchange.repeats(12, 6), exchange.repeats(6, 1)] == [3, 1, 3]
    with pytest.raises(ValueError, match="4 heads cannot be dealt out to 3 ranks"):
        exchange.repeats(4, 2)
    with pytest.raises(ValueError, match="3 ranks cannot share rows in groups of 2"):
        share(Ranks(Place(0, 3)), 2)


@pytest.mark.skipif(not ALL, reason="make test-distributed runs it")
def test_a_run_begins_with_shared_rows_and_goes_on_alone(tmp_path):
    rows = [{"text": f"line {n}: " + "word " * (n % 40)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "task": {"kind": "pretrain"},
        "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.1, "sequence_length": 77, "cache_folder": "cache"},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 0.001, "evaluate_every_steps": 3},
        "engine": {"device": "cpu", "num_threads": 1},
        "output": {"folder": "run", "save_every_steps": 3, "trackers": []},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))

    def train(folder, *options):
        command = [sys.executable, "-m", "stoker.cli.main", "train", "run.yaml", "--set", f"output.folder={folder}"]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [row.get("loss", row.get("validation_loss")) for row in lines]

    whole = train("whole")
    shared = ("--gpus", "2", "--set", "engine.context_parallel=2")
    assert train("shared", *shared) == pytest.approx(whole, abs=2e-5)
    shutil.rmtree(tmp_path / "shared" / "checkpoints" / "step-000006")
    (tmp_path / "shared" / "metrics.jsonl").unlink()
    assert train("shared", "--resume") == pytest.approx(whole[-4:], abs=2e-5)
