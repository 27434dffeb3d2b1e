import copy

import pytest
import torch

from stoker.nn.rotary import Rotary

# fp32; a cache and packing sum the same terms in another order.
TOLERANCE = 2e-6


def test_a_tied_head_is_the_embeddings_own_weight(make_decoder):
    tied, untied = make_decoder(tied_head=True), make_decoder(head_bias=True)
    assert tied.head_weight is tied.embedding.weight
    assert tied.head_bias is None
    assert untied.head_weight is untied.head.weight
    assert untied.head_bias is untied.head.bias
    assert tied.logits(torch.ones(2, 3, 16)).shape == (2, 3, 40)


def test_a_later_token_changes_no_earlier_state(make_decoder, ids):
    decoder = make_decoder()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 40
    before, after = decoder(ids), decoder(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_equal_each_alone(make_decoder, ids, window):
    decoder = make_decoder(window=window)
    packed = decoder(ids, document_lengths=((5, 7), (1, 11)))
    for row, lengths in enumerate([(5, 7), (1, 11)]):
        for piece, found in zip(ids[row].split(lengths), packed[row].split(lengths), strict=True):
            assert (decoder(piece[None])[0] - found).abs().max() <= TOLERANCE


def test_explicit_positions_shift_the_rotation_only(make_decoder, ids):
    decoder = make_decoder()
    positions = torch.arange(12).expand(2, 12)
    assert (decoder(ids, positions=positions) - decoder(ids)).abs().max() <= TOLERANCE
    # Attention knows distances only, so the same shift everywhere changes nothing, and a stretch does.
    assert (decoder(ids, positions=positions + 100) - decoder(ids)).abs().max() <= 20 * TOLERANCE
    assert (decoder(ids, positions=positions * 3) - decoder(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_pieces_through_a_cache_equal_the_whole(make_decoder, ids, window):
    decoder = make_decoder(window=window)
    cache = decoder.new_cache(capacity=12, batch_size=2)
    pieces = [decoder(piece, cache=cache) for piece in ids.split([4, 1, 5, 2], dim=1)]
    assert (torch.cat(pieces, 1) - decoder(ids)).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="12 of 12"):
        decoder(ids[:, :1], cache=cache)


def test_recompute_changes_no_gradient_and_keeps_less(make_decoder, ids):
    plain = make_decoder()
    again = copy.deepcopy(plain)
    for block in again.blocks:
        block.recompute = True
    kept = {}
    for name, decoder in (("plain", plain), ("again", again)):
        kept[name] = 0

        def count(tensor, name=name):
            kept[name] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            hidden = decoder(ids)
        hidden.square().sum().backward()
    assert kept["again"] < kept["plain"] / 3
    for one, other in zip(plain.blocks.parameters(), again.blocks.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_each_distinct_rope_is_computed_once(make_decoder, ids, monkeypatch):
    shared, other = Rotary(4, theta=1e4), Rotary(4, theta=10.0)
    calls = []
    original = Rotary.span
    monkeypatch.setattr(Rotary, "span", lambda self, *args: calls.append(self) or original(self, *args))
    mixed = make_decoder(rotaries=[shared, other, shared])(ids)
    assert calls == [shared, other]
    assert not torch.equal(mixed, make_decoder(rotaries=[shared] * 3)(ids))


def test_a_new_cache_has_the_models_dtype(make_decoder):
    cache = make_decoder().to(torch.bfloat16).new_cache(capacity=3)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.layers[0].keys.shape == (1, 3, 2, 4)
