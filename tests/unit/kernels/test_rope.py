import math

import pytest
import torch

from stoker.kernels.rope import frequencies, rotate, rotate_reference, split_and_rotate

LLAMA3 = {"factor": 8.0, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_max_positions": 64}


def tables(length=6, dim=8):
    inverse, factor = frequencies(dim, 10_000.0)
    angles = torch.arange(length)[None, :, None] * inverse
    return angles.cos() * factor, angles.sin() * factor


def test_rotation_keeps_length_and_depends_on_distance_only():
    cos, sin = tables()
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 6, 1, 8)
    q, k = rotate(x, x.flip(-1), cos, sin)
    torch.testing.assert_close(q.norm(dim=-1), x.norm(dim=-1))
    scores = torch.einsum("bthe,bshe->ts", q, k)
    for distance in range(1, 6):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-5)


def test_split_and_rotate_equals_its_parts_with_their_gradients():
    cos, sin = tables()
    qkv = torch.randn(2, 6, (4 + 2 * 2) * 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parts = split_and_rotate(qkv, cos, sin, num_heads=4, num_kv_heads=2)
    q, k, v = qkv.unflatten(-1, (8, 8)).split((4, 2, 2), dim=2)
    expected = (rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v)
    grads = [torch.randn_like(part) for part in expected]
    for part, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(y, qkv, grads) for y in (parts, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_linear_scaling_divides_every_frequency():
    assert torch.equal(frequencies(8, 1e4, kind="linear", factor=4.0)[0] * 4, frequencies(8, 1e4)[0])


def test_dynamic_scaling_starts_past_the_original_length():
    plain, _ = frequencies(8, 1e4)
    options = {"kind": "dynamic", "factor": 2.0, "original_max_positions": 16}
    assert torch.equal(frequencies(8, 1e4, length=16, **options)[0], plain)
    longer, longest = (frequencies(8, 1e4, length=length, **options)[0] for length in (17, 64))
    assert plain[0] == longer[0] == longest[0] == 1.0
    assert (plain[1:] > longer[1:]).all()
    assert (longer[1:] > longest[1:]).all()


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = frequencies(64, 1e4)[0], frequencies(64, 1e4, kind="llama3", **LLAMA3)[0]
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 16], plain[wavelength < 16])
    assert torch.equal(scaled[wavelength > 64], plain[wavelength > 64] / 8)
    between = (wavelength > 16) & (wavelength < 64)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_keeps_the_first_channel_and_interpolates_the_last():
    scaling = {"original_max_positions": 64, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    scaled, factor = frequencies(64, 1e4, kind="yarn", factor=4.0, attention_factor=1.25, **scaling)
    plain, _ = frequencies(64, 1e4)
    assert factor == 1.25
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 4)


def test_unknown_scaling_and_implementation_are_refused():
    with pytest.raises(ValueError, match="spiral"):
        frequencies(8, 1e4, kind="spiral")
    with pytest.raises(ValueError, match="abacus"):
        rotate(torch.ones(1, 6, 1, 8), torch.ones(1, 6, 1, 8), *tables(), implementation="abacus")
