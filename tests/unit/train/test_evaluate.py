import dataclasses

import pytest
import torch

from stoker.errors import DataError
from stoker.train.evaluate import evaluate, evaluate_unless
from stoker.train.guard import MemoryGuard


def test_loss_is_the_mean_over_all_trained_tokens(toy):
    strategy, task = toy.make_strategy(dropout=0.5)
    batches = [*toy.ToyLoader(micro_batch_size=2).step(0), *toy.ToyLoader().step(1)]
    task.eval()
    with torch.no_grad():
        total = sum(task(batch).loss_sum.item() for batch in batches)
    task.train()
    evaluation = evaluate(strategy, iter(batches))
    trained = sum(batch.num_trained_tokens for batch in batches)
    assert evaluation.num_trained_tokens == trained
    assert evaluation.loss == pytest.approx(total / trained, rel=1e-6)


def test_rows_without_a_trained_token_are_a_clear_error(toy):
    strategy, _ = toy.make_strategy()
    (batch,) = toy.ToyLoader().step(0)
    empty = dataclasses.replace(batch, targets=torch.full_like(batch.targets, -100), num_trained_tokens=0)
    with pytest.raises(DataError, match="no trained token"):
        evaluate(strategy, [empty])


def test_an_interrupted_evaluation_ends_between_batches_without_a_result(toy):
    strategy, _ = toy.make_strategy()
    seen = []

    def batches():
        for batch in toy.ToyLoader(micro_batch_size=1).step(0):
            seen.append(batch)
            yield batch

    assert evaluate_unless(lambda: len(seen) == 3, MemoryGuard(strategy, print), strategy, batches()) is None
    assert len(seen) == 3
