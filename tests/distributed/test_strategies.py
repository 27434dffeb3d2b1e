"""Every strategy takes the same steps as one device, on two and on four processes, and hands its state to any other."""

import os

import guards
import jobs
import pytest
import torch

from stoker.data.loader import StepLoader
from stoker.errors import TrainingError
from stoker.tasks.supervised import SupervisedTask

QUICK = ("full", "nf4", "8-bit")
ALL = os.environ.get("STOKER_TEST_ALL") == "1"
NAMES = tuple(jobs.CASES) if ALL else QUICK
SIZES = (2, 4) if ALL else (2,)


def work(ranks, names):
    """All that two processes are started for; on four, the strategies alone."""
    return jobs.train_all(ranks, names) | (guards.all_of_them(ranks) if ranks.world_size == 2 else {})


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory):
    return jobs.on_ranks(request.param, tmp_path_factory.mktemp("ranks"), work, NAMES)


@pytest.fixture
def of_two(results, request):
    if request.node.callspec.params["results"] != 2:
        pytest.skip("runs on two")
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_losses_norms_and_weights_are_those_of_one_device(results, kind, name):
    expected, found, grain = jobs.alone(name), results[kind, name], jobs.CASES[name].grain
    assert expected["losses"][-1] < expected["losses"][0] - 0.3
    assert found["losses"] == pytest.approx(expected["losses"], abs=grain)
    assert found["norms"] == pytest.approx(expected["norms"], rel=max(1e-4, 2 * grain))
    assert found["loss"] == pytest.approx(expected["loss"], abs=grain)
    for key, weight in expected["state"].weights.items():
        torch.testing.assert_close(found["state"].weights[key], weight, atol=max(2e-4, 10 * grain), rtol=1e-3)
        torch.testing.assert_close(found["whole"][key], found["state"].weights[key], rtol=0, atol=0)
    assert found["state"].optimizer.keys() == expected["state"].optimizer.keys()


def test_memory_that_runs_out_on_one_rank_splits_micro_batches_on_all_and_changes_no_loss(of_two):
    expected, found = guards.steps(None, "single"), of_two["out of memory"]
    assert found["error"] == ""
    assert found["losses"] == pytest.approx(expected["losses"], abs=5e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["loss"] == pytest.approx(expected["loss"], abs=5e-6)
    assert len(found["notices"]) == 1
    assert "Memory ran out on rank 1 with a micro-batch of 3 rows of 24 tokens" in found["notices"][0]
    assert found["limits"] == [(48, 48)] * 2


def test_a_rank_that_lacks_the_memory_of_one_document_is_named(of_two):
    assert "Memory is exhausted with a single document" in of_two["no memory"]["error"]
    assert "It is rank 1 of 2." in of_two["no memory"]["error"]


def test_the_rank_and_the_documents_of_a_loss_that_is_no_number_are_named(of_two):
    found = of_two["not a number"]
    assert len(found["losses"]) == 1
    place = {"rank": 1, "world_size": 2, "batch_size": 12, "micro_batch_size": 3, "sequence_length": 32}
    rows = StepLoader(jobs.Rows(), packing=False, seed=3, **place).examples(1)[1]
    assert "training loss of step 2 is nan. On rank 1 it comes from micro-batch 2 of 2: documents" in found["error"]
    assert f"documents {', '.join(map(str, rows))} of the prepared data" in found["error"]


def go_on(ranks, kind, states):
    return {name: jobs.train(name, kind, ranks, start=10, steps=10, state=state)["losses"] for name, state in states}


@pytest.mark.skipif(not ALL, reason="make test-distributed runs it")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_state_of_one_device_goes_on_over_ranks(kind, tmp_path):
    states = [(name, jobs.alone(name, 10)["state"]) for name in ("full", "nf4")]
    found = jobs.on_ranks(2, tmp_path, go_on, kind, states)
    for name, _ in states:
        assert found[name] == pytest.approx(jobs.alone(name)["losses"][10:], abs=1e-5)


def differ(ranks):
    try:
        ranks.require_same({"the version of torch": 1 + ranks.rank})
    except TrainingError as error:
        return str(error)


@pytest.mark.skipif(not ALL, reason="make test-distributed runs it")
def test_ranks_that_differ_are_named(tmp_path):
    message = jobs.on_ranks(2, tmp_path, differ)
    assert "the version of torch: rank 0 has 1, rank 1 has 2" in message


def test_a_step_leaves_a_rank_without_a_trained_token():
    """What the comparison above is there for: the loader does hand such batches out."""
    case = jobs.CASES["full"]

    class Place:
        rank, world_size = 3, 4

    counts = [batch.num_trained_tokens for index in range(20) for batch in jobs.loader(case, Place).step(index)]
    assert 0 in counts
    assert len(set(counts)) > 5


@pytest.mark.parametrize("name", ["full", "mixture", "mamba"])
def test_a_rank_with_nothing_but_padding_adds_nothing_and_no_gradient_that_is_no_number(name):
    class Place:
        rank, world_size = 3, 4

    case = jobs.CASES[name]
    empty = next(batch for batch in jobs.loader(case, Place).step(0) if batch.num_tokens == 0)
    model = jobs.build(case)
    result = SupervisedTask(model)(empty)
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0.0
    assert all(float(one.grad.abs().sum()) == 0.0 for one in model.parameters() if one.grad is not None)
