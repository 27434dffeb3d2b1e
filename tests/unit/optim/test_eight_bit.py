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


def test_a_scale_of_gradients_acts_on_the_next_step():
    plain, scaled = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    stepped(plain, 3)
    stepped(scaled, 3, scale=4.0)
    assert torch.equal(plain, scaled)
