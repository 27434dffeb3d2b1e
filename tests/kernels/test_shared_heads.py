"""Shared heads by PyTorch's memory-efficient kernel itself, as a GPU before Ampere runs them, and fp32 on any."""

import pytest
import torch

from stoker.kernels import shared_heads as module
from stoker.kernels.attention import attention, attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is CUDA's")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [None, ((100, 157), (257,))])
def test_an_old_card_s_attention_is_the_formula_s(draw, monkeypatch, dtype, lengths):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    shapes = [(2, 257, count, 64) for count in (8, 2, 2)]
    exact = [draw(*shape).requires_grad_() for shape in shapes]
    heads = [x.detach().to(dtype).requires_grad_() for x in exact]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attention(*heads, document_lengths=lengths, implementation="triton")
    assert not [x for x in kept if x.ndim == 4 and x.shape[2] == 8 and x.numel() > heads[0].numel()]
    assert sum(x.shape[2] == 2 for x in kept if x.ndim == 4) == 2 * (1 if lengths is None else 3)
    expected = attention_reference(*exact, document_lengths=lengths)
    tolerance = 4e-3 if dtype == torch.float16 else 2e-5
    assert (out - expected).abs().max() <= tolerance
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    found = torch.autograd.grad((out * weights.to(dtype)).sum(), heads)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    for grad, one in zip(found, wanted, strict=True):
        assert (grad - one).abs().max() <= 4 * tolerance * one.abs().max().clamp(min=1)


def test_fp32_on_a_new_card_makes_no_matrix_of_all_scores(draw):
    length = 4096
    heads = [draw(1, length, count, 64).float().requires_grad_() for count in (8, 2, 2)]
    assert not module.knows_shared_heads(heads[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(*heads, implementation="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * length * length * 4 / 4
