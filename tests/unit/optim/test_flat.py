from functools import partial

import pytest
import torch
from torch.nn import Parameter

from stoker.kernels.adamw import AdamWStep, adamw_
from stoker.optim import optimizers
from stoker.optim.flat import ALIGNMENT, FlatAdamW

SHAPES = ((5, 7), (64,), (3, 2, 11), (1,))


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(f"layer{i}.weight", Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(SHAPES)]


def build(named, *, flat, **options):
    # Of the four, the two with one dimension do not decay, so that there are two groups; one has another rate.
    return optimizers.build(
        named,
        kind="adamw",
        learning_rate=1e-2,
        weight_decay=0.1,
        flat=flat,
        rate_scale=lambda name: 2.0 if name.startswith("layer2") else 1.0,
        **options,
    )


def steps(optimizer, named, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group.get("rate_scale", 1.0)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


# A CPU steps eight values at once and the rest one by one, which rounds the last bit otherwise.
close = partial(torch.testing.assert_close, rtol=3e-7, atol=1e-8)


def test_steps_are_torchs_with_groups_decay_and_rates():
    ours, theirs = parameters(), parameters()
    flat, listed = build(ours, flat=True), build(theirs, flat=False)
    assert len(flat.param_groups) == 3
    steps(flat, ours, 5)
    steps(listed, theirs, 5)
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        close(a, b, msg=name)
        for entry in ("step", "exp_avg", "exp_avg_sq"):
            close(flat.state[a][entry], listed.state[b][entry], msg=f"{entry} of {name}")


def test_a_kernel_steps_each_group_once_with_the_same_numbers():
    calls = []

    def update(weight, grad, average, square, *, number, betas, **values):
        calls.append(weight.numel())
        numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
        adamw_(weight, grad, average, square, numbers, seed=0, number=number)

    ours, theirs = parameters(), parameters()
    flat, listed = build(ours, flat=True, flat_update=update), build(theirs, flat=False)
    steps(flat, ours, 3)
    steps(listed, theirs, 3)
    assert len(calls) == 3 * 3
    assert sum(calls) == 3 * flat.layout.size
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_flat_gradient_is_scaled_and_what_lies_between_parameters_stays_zero():
    ours, theirs = parameters(), parameters()
    flat, listed = build(ours, flat=True), build(theirs, flat=False)
    gradient = torch.zeros(flat.layout.size)
    generator = torch.Generator().manual_seed(4)
    for view, parameter in zip(flat.layout.views(gradient), flat.parameters, strict=True):
        view.copy_(torch.randn(parameter.shape, generator=generator))
        listed_one = dict(theirs)[next(name for name, one in ours if one is parameter)]
        listed_one.grad = 0.25 * view.clone()
    flat.set_gradient(gradient)
    flat.scale_gradients(0.25)
    flat.step()
    listed.step()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        close(a, b)
    used = flat.layout.gather([torch.ones_like(one) for one in flat.parameters], like=flat.parameters[0])
    assert flat._weights[used == 0].abs().sum() == 0


def test_parameters_stay_themselves_and_begin_where_wide_words_do():
    named = parameters()
    before = [(parameter, parameter.detach().clone()) for _, parameter in named]
    flat = build(named, flat=True)
    for parameter, values in before:
        assert any(parameter is one for one in flat.parameters)
        assert torch.equal(parameter, values)
        assert parameter.storage_offset() % ALIGNMENT == 0
        assert parameter.untyped_storage().data_ptr() == flat._weights.untyped_storage().data_ptr()


def test_state_from_elsewhere_is_taken_over():
    theirs = parameters()
    listed = build(theirs, flat=False)
    steps(listed, theirs, 3)
    ours = parameters()
    flat = build(ours, flat=True)
    steps(flat, ours, 1, seed=9)  # what it held before is overwritten
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
        flat.state[a] = {name: value.clone() for name, value in listed.state[b].items()}
    steps(flat, ours, 2, seed=5)
    steps(listed, theirs, 2, seed=5)
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        close(a, b)
        assert flat.state[a]["step"] == 5


def test_parameters_stepped_apart_are_refused():
    named = parameters()
    flat = build(named, flat=True)
    steps(flat, named, 1)
    first = named[0][1]
    flat.state[first] = {name: value.clone() for name, value in flat.state[first].items()} | {"step": torch.tensor(7.0)}
    other = named[1][1]
    flat.state[other] = {name: value.clone() for name, value in flat.state[other].items()}
    with pytest.raises(ValueError, match=r"stepped \[1.0, 7.0\] times"):
        steps(flat, named, 1)


def test_only_fp32_side_by_side():
    with pytest.raises(ValueError, match="fp32 and on one device"):
        FlatAdamW([{"params": [Parameter(torch.zeros(2, dtype=torch.float64))]}], lr=1, betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(ValueError, match="only adamw"):
        optimizers.build(parameters(), kind="sgd", learning_rate=1e-2, flat=True)
