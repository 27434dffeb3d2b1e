import torch
from torch import nn

from stoker.compose.updates import eight_bit
from stoker.optim.eight_bit import EightBitAdamW


def stepped(parameter, count=1, *, scale=1.0, **options):
    optimizer = EightBitAdamW(
        [{"params": [parameter], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        kept=eight_bit("reference"),
        **options,
    )
    torch.manual_seed(1)
    for _ in range(count):
        parameter.grad = torch.randn(parameter.shape) / scale
        optimizer.scale_gradients(scale)
        optimizer.step()
    return optimizer


def entries(shape):
    parameter = nn.Parameter(torch.zeros(shape))
    state = stepped(parameter).state[parameter]
    return {name: (str(one.dtype), tuple(one.shape)) for name, one in state.items() if isinstance(one, torch.Tensor)}


def test_large_matrices_take_a_byte_a_value_and_a_scale_for_each_block_of_a_row():
    assert entries((64, 300)) == {
        "exp_avg": ("torch.int8", (64, 300)),
        "exp_avg_sq": ("torch.uint8", (64, 300)),
        "exp_avg_scale": ("torch.float32", (64, 2)),
        "exp_avg_sq_scale": ("torch.float32", (64, 2)),
    }
    assert entries((2, 64, 64))["exp_avg_scale"] == ("torch.float32", (2, 64, 1))


def test_vectors_small_matrices_and_narrow_ones_keep_fp32():
    for shape in ((8192,), (16, 64), (4096, 1, 4)):
        assert entries(shape) == dict.fromkeys(("exp_avg", "exp_avg_sq"), ("torch.float32", shape))


def test_those_in_fp32_are_torchs_adamw():
    ours, theirs = (nn.Parameter(torch.ones(16, 64)) for _ in range(2))
    stepped(ours, 5)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    torch.manual_seed(1)
    for _ in range(5):
        theirs.grad = torch.randn(theirs.shape)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_averages_put_there_in_fp32_are_compressed_at_the_next_step_to_what_they_were():
    unbroken, broken = (nn.Parameter(torch.ones(64, 300)) for _ in range(2))
    first, second = stepped(unbroken, 3), stepped(broken, 3)
    second.expand(broken)
    assert {one.dtype for one in second.state[broken].values() if isinstance(one, torch.Tensor)} == {torch.float32}
    for optimizer, parameter in ((first, unbroken), (second, broken)):
        parameter.grad = torch.full((64, 300), 0.5)
        optimizer.step()
    assert torch.equal(unbroken, broken)
    for name, value in first.state[unbroken].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state[broken][name])), name


def test_flat_parts_of_several_weights_are_kept_in_eight_bits_too():
    parameter = nn.Parameter(torch.zeros(5000))
    optimizer = stepped(parameter, 0)
    optimizer.steps_flat_parts = True
    parameter.grad = torch.ones(5000)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.int8
    assert state["exp_avg_scale"].shape == (20,)


def test_a_scale_of_gradients_acts_on_the_next_step():
    plain, scaled = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    stepped(plain, 3)
    stepped(scaled, 3, scale=4.0)
    assert torch.equal(plain, scaled)
