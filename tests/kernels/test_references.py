"""The references, by which every kernel is judged, have the gradients of what they compute: `torch.autograd.gradcheck`.

All in float64. Those with a backward of their own (projections under a layer's backward, the head's loss) are checked
against differences too, not against autograd alone.
"""

import pytest
import torch

from stoker.kernels import attention, glu, linear_cross_entropy, rms_norm, rope
from stoker.kernels.linear_cross_entropy import LossOptions


def check(function, *inputs):
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_norms(draw):
    x, residual, weight = draw(3, 6), draw(3, 6), draw(6)
    check(lambda x, w: rms_norm.rms_norm_reference(x, w, 1e-3), x, weight)
    check(lambda x, r, w: rms_norm.rms_norm_reference(x + r, w, 1e-3), x, residual, weight)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved, draw):
    angles = draw(1, 3, 2)
    check(
        lambda x: rope.rotate_reference(x, angles.cos(), angles.sin(), interleaved=interleaved),
        draw(2, 3, 2, 6),
    )


@pytest.mark.parametrize("activation", sorted(glu.ACTIVATIONS))
def test_gated_activations(activation, draw):
    check(lambda x: glu.gated_reference(x, activation), draw(3, 8))


@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"window": 2}])
def test_attention(extra, draw):
    q, k, v = draw(1, 5, 4, 3), draw(1, 5, 2, 3), draw(1, 5, 2, 3)
    check(lambda *heads: attention.attention_reference(*heads, document_lengths=[[2, 3]], **extra), q, k, v)


@pytest.mark.parametrize(
    "options", [LossOptions(), LossOptions(soft_cap=3.0, logit_scale=0.5), LossOptions(label_smoothing=0.1, z_loss=0.1)]
)
def test_the_heads_loss(options, draw, device):
    targets = torch.tensor([1, -100, 4], device=device)
    check(
        lambda hidden, weight, bias: linear_cross_entropy.linear_cross_entropy_reference(
            hidden, weight, targets, bias=bias, options=options
        ),
        draw(3, 4),
        draw(5, 4),
        draw(5),
    )
