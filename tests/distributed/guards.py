"""What goes wrong on one of several processes, and what all of them make of it."""

import jobs
import torch

from stoker.data.loader import StepLoader
from stoker.errors import TrainingError
from stoker.optim import optimizers
from stoker.tasks.supervised import SupervisedTask
from stoker.train.evaluate import evaluate
from stoker.train.guard import MemoryGuard
from stoker.train.step import take_step

STEPS = 6


def steps(ranks, kind, *, spoil=lambda forward, batch: forward(batch), count=STEPS):
    """Takes some steps in micro-batches of three rows, whose forward is `spoil`ed, and returns how that went."""
    case = jobs.CASES["full"]
    model = jobs.build(case)
    strategy, task = jobs.make_strategy(kind, ranks, model), SupervisedTask(model)
    whole = task.forward
    task.forward = lambda batch: spoil(whole, batch)
    strategy.prepare(task, lambda named: optimizers.build(list(named), kind="adamw", learning_rate=1e-2))
    place = {"rank": strategy.rank, "world_size": strategy.world_size}
    sizes = {"batch_size": 12, "micro_batch_size": 3, "sequence_length": 32}
    batches = StepLoader(jobs.Rows(), packing=False, seed=3, **sizes, **place)
    notices = []
    guard = MemoryGuard(strategy, notices.append)
    found = {"losses": [], "norms": [], "notices": notices, "limits": [], "error": ""}
    try:
        for index in range(count):
            done = take_step(
                strategy,
                batches.step(index),
                number=index + 1,
                learning_rate=1e-2,
                max_gradient_norm=1.0,
                guard=guard,
                notify=print,
                rows=lambda index=index: batches.examples(index),
            )
            found["losses"].append(done.loss)
            found["norms"].append(done.gradient_norm)
        found["limits"] = strategy.gather_over_ranks((guard.max_positions, guard.fitted_positions))
        found["loss"] = evaluate(strategy, batches.all()).loss
    except TrainingError as error:
        found["error"] = str(error)
    return found


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def too_small(positions):
    """Memory that suffices for so many positions; where it does not, a backward that has begun finds out."""

    def spoil(forward, batch):
        result = forward(batch)
        if batch.input_ids.numel() <= positions:
            return result
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result._replace(loss_sum=_FailsInBackward.apply(result.loss_sum))

    return spoil


def not_a_number_in(batches):
    """The losses of so many micro-batches are as they should be, then one is not a number."""
    seen = []

    def spoil(forward, batch):
        seen.append(batch)
        result = forward(batch)
        return result._replace(loss_sum=result.loss_sum * float("nan")) if len(seen) == batches + 1 else result

    return spoil


def all_of_them(ranks):
    """Every fault on rank 1 of two, and what the first process says of it."""
    is_second = ranks.rank == 1
    plain = {}
    out_of_memory = steps(ranks, "ddp", **({"spoil": too_small(50)} if is_second else plain))
    no_memory = steps(ranks, "ddp", **({"spoil": too_small(0)} if is_second else plain))
    not_a_number = steps(ranks, "ddp", **({"spoil": not_a_number_in(3)} if is_second else plain))
    return {"out of memory": out_of_memory, "no memory": no_memory, "not a number": not_a_number}
