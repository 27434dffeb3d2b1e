import math

import pytest
import torch

from stoker.optim import schedules

TOTAL, WARMUP = 40, 8


def transformers_shares(kind, **options):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL, **options)
    return scheduler.lr_lambdas[0]


@pytest.mark.slow  # Transformers' trainer takes seconds to import
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("constant", {}), ("constant_with_warmup", {})),
        (("linear", {}), ("linear", {})),
        (("cosine", {}), ("cosine", {})),
        (("cosine", {"floor": 0.1}), ("cosine_with_min_lr", {"scheduler_specific_kwargs": {"min_lr": 0.1}})),
        (("inverse_sqrt", {}), ("inverse_sqrt", {})),
        (
            ("wsd", {"decay_steps": 10, "floor": 0.2}),
            (
                "warmup_stable_decay",
                {"scheduler_specific_kwargs": {"num_decay_steps": 10, "min_lr_ratio": 0.2, "decay_type": "linear"}},
            ),
        ),
    ],
    ids=["constant", "linear", "cosine", "cosine with floor", "inverse_sqrt", "wsd"],
)
def test_after_warmup_every_schedule_equals_transformers(ours, theirs):
    share = schedules.build(ours[0], TOTAL, warmup_steps=WARMUP, **ours[1])
    expected = transformers_shares(theirs[0], **theirs[1])
    for index in range(WARMUP, TOTAL + 1):
        assert share(index) == pytest.approx(expected(index), abs=1e-12)


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_warmup_rises_to_one_and_never_starts_at_zero(kind):
    share = schedules.build(kind, TOTAL, warmup_steps=4, decay_steps=10 if kind == "wsd" else None)
    assert [share(index) for index in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert share(4) == pytest.approx(1.0, abs=1e-9)


def test_closed_forms_without_warmup():
    assert schedules.linear(10, floor=0.5)(4) == pytest.approx(0.5 + 0.5 * 0.6)
    assert schedules.cosine(10, floor=0.1)(5) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedules.cosine(10)(10) == pytest.approx(0.0)
    assert schedules.warmup_stable_decay(10, decay_steps=4)(6) == 1.0
    assert schedules.warmup_stable_decay(10, decay_steps=4, floor=0.2)(8) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedules.inverse_sqrt()(30_000) == pytest.approx(0.5)
    assert schedules.inverse_sqrt(warmup_steps=100)(400) == pytest.approx(math.sqrt(100 / 400))


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_rate_stays_at_the_floor_past_the_end(kind):
    share = schedules.build(kind, 10, floor=0.3, decay_steps=4 if kind == "wsd" else None)
    assert [share(index) for index in (10, 13)] == pytest.approx([0.3, 0.3])


def test_wsd_whose_decay_overlaps_warmup_still_warms_up_first():
    share = schedules.warmup_stable_decay(10, decay_steps=9, warmup_steps=4)
    assert share(3) == 1.0
    assert share(7) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cosin", {}, "unknown schedule"),
        ("constant", {"floor": 0.1}, "no floor"),
        ("wsd", {}, "decay_steps"),
        ("cosine", {"decay_steps": 3}, "decay_steps"),
        ("linear", {"floor": 1.5}, "floor"),
        ("linear", {"warmup_steps": 41}, "warmup_steps"),
    ],
)
def test_what_a_schedule_cannot_use_is_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        schedules.build(kind, TOTAL, **options)
