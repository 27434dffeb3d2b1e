import pytest
import torch

from stoker.kernels import scored_attention
from stoker.kernels.attention import attend_cached, attention, attention_reference
from stoker.kernels.documents import Boundaries
from stoker.kernels.scored_attention import Scores, block_mask, first_seen, flex

# fp32; blocks of queries sum in another order.
TOLERANCE = 2e-6
CPU = torch.device("cpu")
DOCUMENTS = ((300, 5, 335), (640,))


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    shapes = [(2, 640, 4, 8), (2, 640, 2, 8), (2, 640, 2, 6)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


@pytest.fixture
def sinks():
    return torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_blocks_of_queries_equal_the_formula(inputs, sinks, window, documents):
    options = {"window": window, "document_lengths": documents, "scale": 0.3, "softcap": 2.0, "sinks": sinks}
    results = []
    for attend in (attention, attention_reference):
        output = attend(*inputs, **options)
        gradients = torch.autograd.grad(output.square().sum(), [*inputs, sinks])
        results.append([output, *gradients])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())


@pytest.mark.parametrize("new", [1, 7, 20])
@torch.no_grad()
def test_the_last_positions_see_what_was_cached(inputs, sinks, new):
    q, k, v = (x[:, :20] for x in inputs)
    options = {"window": 9, "softcap": 2.0, "sinks": sinks}
    expected = attention_reference(q, k, v, **options)[:, -new:]
    assert (attend_cached(q[:, -new:], k, v, **options) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("window", [None, 9])
def test_what_a_position_sees_first_is_its_documents_begin_or_the_windows(window):
    rows = ((3, 17), (20,))
    begins = torch.tensor([[0] * 3 + [3] * 17, [0] * 20])
    expected = begins if window is None else torch.maximum(begins, torch.arange(20) - window + 1)
    first = first_seen(rows, window, 2, 20, CPU)
    assert first.dtype == torch.int32
    assert torch.equal(first.long(), expected)
    # As a tensor, with empty documents before and after.
    ends = torch.tensor([0, 0, 3, 20, 20, 40, 40], dtype=torch.int32)
    assert torch.equal(first_seen(Boundaries(ends, 32), window, 2, 20, CPU), first)


@pytest.mark.parametrize("window", [None, 40, 200])
def test_the_block_mask_shows_every_block_that_a_position_sees_and_masks_none_of_the_whole_ones(window):
    size, length = 64, 640
    first = first_seen(DOCUMENTS, window, 2, length, CPU)
    mask = block_mask(first, CPU, size)
    position = torch.arange(length)
    seen = (position[None, None] <= position[None, :, None]) & (position[None, None] >= first[:, :, None])
    blocks = seen.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    some, every = blocks.any(4).any(2), blocks.all(4).all(2)
    dense = mask.to_dense()[:, 0].bool()
    assert torch.equal(dense, some)
    for row in range(2):
        for block in range(length // size):
            whole = mask.full_kv_indices[row, 0, block, : int(mask.full_kv_num_blocks[row, 0, block])].long()
            assert every[row, block, whole].all()
            assert len(whole) == every[row, block].sum()


@pytest.mark.slow
@pytest.mark.parametrize("documents", [DOCUMENTS, ((60, 140), (200,))])  # 200: no whole number of blocks
@pytest.mark.parametrize("with_sinks", [False, True])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_equals_the_formula(inputs, sinks, documents, with_sinks, monkeypatch):
    """Uncompiled, as a CPU runs it: the block mask, the cap and the sink are the same."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(scored_attention, "_compiled", lambda: flex_attention)
    q, k = (x.detach()[:, : sum(documents[0])] for x in inputs[:2])
    given = sinks.detach() if with_sinks else None
    options = {"window": 150, "scale": 0.3, "softcap": 2.0, "sinks": given}
    found = flex(q, k, k, documents, Scores(**options))
    expected = attention_reference(q, k, k, document_lengths=documents, **options)
    assert (found - expected).abs().max() <= TOLERANCE
