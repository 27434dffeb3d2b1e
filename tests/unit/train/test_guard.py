import dataclasses

import pytest
import torch

from stoker.errors import TrainingError
from stoker.train.evaluate import evaluate
from stoker.train.guard import LossGuard, MemoryGuard, is_out_of_memory
from stoker.train.settings import LossLimit


class SmallMemory:
    """Makes a strategy run out of memory above `positions`; in the middle of backward, when some gradients exist."""

    def __init__(self, strategy, task, positions, error=torch.OutOfMemoryError):
        self.attempts = []
        forward = task.forward

        def limited(batch):
            size = batch.input_ids.numel()
            self.attempts.append(size)
            result = forward(batch)
            if size <= positions:
                return result
            if not torch.is_grad_enabled():
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result._replace(loss_sum=FailsInBackward.apply(result.loss_sum, task.model.head.weight, error))

        task.forward = limited


class FailsInBackward(torch.autograd.Function):
    """Leaves a gradient behind on `weight`, then runs out of memory."""

    @staticmethod
    def forward(ctx, loss, weight, error):
        ctx.weight, ctx.error = weight, error
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.weight.grad = torch.full_like(ctx.weight, 1000.0)
        raise ctx.error("CUDA out of memory. Tried to allocate 2.00 GiB.")


def gradients(task):
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("micro_batch_size", [8, 4])
def test_a_micro_batch_that_does_not_fit_is_split_and_loss_and_gradients_are_unchanged(toy, error, micro_batch_size):
    batches = toy.ToyLoader(micro_batch_size=micro_batch_size).step(0)
    reference, reference_task = toy.make_strategy()
    expected = MemoryGuard(reference, print).forward_backward(batches, 30.0)
    strategy, task = toy.make_strategy()
    memory, notices = SmallMemory(strategy, task, positions=12, error=error), []
    results = MemoryGuard(strategy, notices.append).forward_backward(batches, 30.0)
    assert len(results) == 4
    assert sum(result.num_trained_tokens for result in results) == sum(batch.num_trained_tokens for batch in batches)
    loss, expected_loss = (sum(result.loss_sum.item() for result in each) for each in (results, expected))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in gradients(reference_task).items():
        # Only the order of fp32 sums differs.
        torch.testing.assert_close(gradients(task)[name], gradient, atol=1e-7, rtol=1e-5, msg=name)
    assert memory.attempts[-4:] == [12, 12, 12, 12]
    assert "4 rows of 6 tokens" in notices[-1]
    assert "at most 12 tokens" in notices[-1]


@pytest.mark.slow
def test_later_steps_start_at_the_size_that_fitted(toy):
    strategy, task = toy.make_strategy()
    memory, notices = SmallMemory(strategy, task, positions=12), []
    guard = MemoryGuard(strategy, notices.append)
    guard.forward_backward(toy.ToyLoader().step(0), 30.0)
    memory.attempts.clear()
    guard.forward_backward(toy.ToyLoader().step(1), 30.0)
    assert memory.attempts == [12, 12, 12, 12]
    assert len(notices) == 2


@pytest.mark.slow
def test_a_single_document_that_does_not_fit_is_a_clear_error(toy):
    strategy, task = toy.make_strategy()
    SmallMemory(strategy, task, positions=3)
    with pytest.raises(TrainingError, match=r"single document in a row of 6 tokens.*recompute"):
        MemoryGuard(strategy, print).forward_backward(toy.ToyLoader().step(0), 30.0)


def test_a_packed_row_is_split_between_documents(toy):
    strategy, task = toy.make_strategy()
    SmallMemory(strategy, task, positions=4)
    (batch,) = toy.ToyLoader().step(0)
    row = dataclasses.replace(
        batch, input_ids=batch.input_ids[:1], targets=batch.targets[:1], document_lengths=((2, 4),), num_tokens=6
    )
    results = MemoryGuard(strategy, print).forward_backward([row], 30.0)
    assert len(results) == 2


def test_evaluation_splits_too_and_its_loss_is_unchanged(toy):
    batches = toy.ToyLoader().step(0)
    reference, _ = toy.make_strategy()
    strategy, task = toy.make_strategy()
    SmallMemory(strategy, task, positions=12)
    assert evaluate(strategy, batches).loss == pytest.approx(evaluate(reference, batches).loss, rel=1e-6)


def test_other_errors_are_not_taken_for_a_lack_of_memory(toy):
    strategy, task = toy.make_strategy()
    SmallMemory(strategy, task, positions=3, error=KeyError)
    with pytest.raises(KeyError):
        MemoryGuard(strategy, print).forward_backward(toy.ToyLoader().step(0), 30.0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_message_of_this_machines_own_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_lack_of_device_memory_is_split_and_loss_and_gradients_are_unchanged(toy):
    """Activations that each row needs 256 MiB for, on a device that may use 2 GiB: eight rows fail, two fit."""
    total = torch.cuda.get_device_properties(0).total_memory

    def run(limit_bytes):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
        strategy, task = toy.make_strategy(device="cuda")
        model, notices = task.model, []
        model.hidden.register_forward_hook(lambda module, inputs, output: output + hungry(output))
        results = MemoryGuard(strategy, notices.append).forward_backward(toy.ToyLoader().step(0), 30.0)
        return sum(result.loss_sum.item() for result in results), gradients(task), notices

    def hungry(output):
        rows = torch.ones(output.shape[0], 2**26, device="cuda", requires_grad=True)
        return (rows.square() * 0.0).sum(1).reshape(-1, 1, 1)

    try:
        loss, found, notices = run(2 * 2**30)
        expected_loss, expected, none = run(total)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert none == []
    assert len(notices) >= 1
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        # Only the order of fp32 sums differs.
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_loss_above_the_limit_stops_only_after_as_many_steps_in_a_row():
    guard = LossGuard(LossLimit(5.0, patience=2))

    for step, loss in enumerate([6.0, 4.0, 6.0, 5.0], start=1):
        guard.check(loss, step)
    guard.check(5.1, 5)
    with pytest.raises(TrainingError, match=r"above train.loss_limit.above = 5 for 2 steps in a row; at step 6"):
        guard.check(7.0, 6)


def test_without_a_limit_no_loss_is_too_high():
    guard = LossGuard(None)
    for step in range(10):
        guard.check(1e9, step)
