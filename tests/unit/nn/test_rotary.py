import torch

from stoker.nn.rotary import Rotary

CPU = torch.device("cpu")
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_max_positions": 8}


def test_a_span_is_a_slice_of_the_whole():
    rotary = Rotary(4, theta=1e4)
    whole = rotary.span(0, 20, CPU)
    for part, table in zip(rotary.span(5, 9, CPU), whole, strict=True):
        assert torch.equal(part, table[:, 5:9])
    assert whole[0].shape == (1, 20, 2)


def test_tables_grow_without_changing():
    rotary = Rotary(4, theta=1e4)
    before = rotary.span(0, 10, CPU)[1].clone()
    assert rotary.span(0, 3000, CPU)[1].shape == (1, 3000, 2)
    assert torch.equal(rotary.span(0, 10, CPU)[1], before)


def test_positions_restart_in_every_document():
    for rotary in (Rotary(4, theta=1e4), Rotary(4, theta=1e4, **DYNAMIC)):
        cos, sin = rotary.packed(((3, 12), (15,)), 2, 15, CPU)
        assert cos.shape == sin.shape == (2, 15, 2)
        assert torch.equal(cos[0, :3], rotary.span(0, 3, CPU)[0][0])
        assert torch.equal(sin[0, 3:], rotary.span(0, 12, CPU)[1][0])
        assert torch.equal(sin[1], rotary.span(0, 15, CPU)[1][0])


def test_dynamic_angles_follow_the_documents_length():
    rotary = Rotary(4, theta=1e4, **DYNAMIC)
    short, long = rotary.span(0, 8, CPU)[1], rotary.span(0, 16, CPU)[1]
    assert torch.equal(short, Rotary(4, theta=1e4).span(0, 8, CPU)[1])
    assert not torch.equal(short[:, 1:, 1], long[:, 1:8, 1])


def test_explicit_positions_equal_the_span_they_spell_out():
    for rotary in (Rotary(4, theta=1e4), Rotary(4, theta=1e4, **DYNAMIC)):
        cos, sin = rotary.at(torch.arange(12)[None].expand(2, 12))
        expected = rotary.span(0, 12, CPU)
        assert torch.equal(cos[:1], expected[0])
        assert torch.equal(sin[-1:], expected[1])
