"""NF4 against bitsandbytes' CPU build: same bytes, same values, same files."""

import pytest
import torch

from stoker.errors import ModelError
from stoker.quant import nf4
from stoker.quant.frozen import Scratch

# Importing bitsandbytes takes seconds, so `make check` leaves out what compares with it.
against_bitsandbytes = pytest.mark.slow

SHAPES = [(64, 512), (48, 40), (3, 7), (300, 128), (1, 64)]


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.05).to(dtype)


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes.functional")


def bitsandbytes_state(functional, weight: torch.Tensor, *, double: bool, name: str) -> dict[str, torch.Tensor]:
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    tensors = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"{name}.weight": packed, **tensors}


@against_bitsandbytes
def test_codes_are_those_of_bitsandbytes(functional):
    assert torch.equal(nf4.dynamic_code(), functional.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.kernel.NF4_CODE), functional.get_4bit_type("nf4", device="cpu"))


@against_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_tensors_are_byte_for_byte_those_of_bitsandbytes(functional, shape, dtype):
    weight = random_weight(*shape, dtype=dtype)
    ours = nf4.to_checkpoint(nf4.NF4Weight.quantize(weight, double=False), ("layer",))
    theirs = bitsandbytes_state(functional, weight, double=False, name="layer")
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert ours[key].dtype == expected.dtype, key
        assert torch.equal(ours[key], expected), key


@against_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (512, 512)])
def test_double_quantised_tensors_are_those_of_bitsandbytes(functional, shape, dtype):
    weight = random_weight(*shape, dtype=dtype)
    ours = nf4.to_checkpoint(nf4.NF4Weight.quantize(weight), ("layer",))
    theirs = bitsandbytes_state(functional, weight, double=True, name="layer")
    assert ours.keys() == theirs.keys()
    for key in theirs.keys() - {"layer.weight.absmax"}:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    # The CPU build finds the nearest code in a table of 65,536 entries, its CUDA build exactly: a scale may take the
    # other neighbour only when it lies within 2^-16 of the point between them.
    ours_index, theirs_index = (tensors["layer.weight.absmax"].long() for tensors in (ours, theirs))
    differ = ours_index != theirs_index
    assert differ.float().mean() < 0.01 or differ.sum() <= 1
    code = nf4.dynamic_code()
    plain = nf4.NF4Weight.quantize(weight, double=False).absmax
    nested_absmax = ours["layer.weight.nested_absmax"].repeat_interleave(256)[: plain.numel()]
    scaled = (plain - plain.mean()) / nested_absmax.clamp(min=1e-38)
    middle = (code[ours_index] + code[theirs_index]) / 2
    assert ((scaled - middle).abs()[differ] <= 2**-16).all()


def test_nearest_code_is_the_nearest():
    code = nf4.dynamic_code()
    values = torch.cat((torch.linspace(-1, 1, 5001), code, (code[1:] + code[:-1]) / 2))
    chosen = code[nf4._nearest(values, code)]
    best = (values[:, None] - code).abs().min(dim=1).values
    torch.testing.assert_close((values - chosen).abs(), best, rtol=0, atol=6e-8)  # a tie may round either way


def test_large_weight_quantised_in_chunks_is_the_same(monkeypatch):
    weight = random_weight(64, 512)
    whole = nf4.NF4Weight.quantize(weight)
    monkeypatch.setattr(nf4, "CHUNK_VALUES", 4096)
    chunked = nf4.NF4Weight.quantize(weight)
    assert torch.equal(whole.packed, chunked.packed)
    assert torch.equal(whole.absmax, chunked.absmax)


def test_a_block_of_zeros_stays_zero():
    weight = random_weight(4, 64)
    weight[1] = 0
    assert torch.equal(nf4.NF4Weight.quantize(weight, double=False).dequantize(dtype=torch.float32)[1], torch.zeros(64))


@against_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 512), (48, 40), (300, 128)])
def test_dequantised_values_are_those_of_bitsandbytes(functional, shape, dtype):
    weight = random_weight(*shape, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    expected = functional.dequantize_4bit(packed, state)
    loaded = nf4.from_checkpoint(bitsandbytes_state(functional, weight, double=True, name="up"), ("up",))
    assert torch.equal(loaded.dequantize(dtype=dtype), expected)


@pytest.mark.parametrize("rows", [(128, 64, 64), (5, 3, 2)])
def test_fused_group_holds_what_each_part_would_alone(rows):
    # 256 columns: the first group's parts end on nested blocks (one run), the second's do not (part by part).
    weight = random_weight(sum(rows), 256)
    fused = nf4.NF4Weight.quantize(weight, part_rows=rows)
    alone = [nf4.NF4Weight.quantize(part) for part in weight.split(rows)]
    assert fused._is_seamless() == (rows[0] == 128)
    expected = torch.cat([part.dequantize(dtype=torch.float32) for part in alone])
    assert torch.equal(fused.dequantize(dtype=torch.float32), expected)
    names = ("q_proj", "k_proj", "v_proj")
    saved = nf4.to_checkpoint(fused, names)
    for name, part in zip(names, alone, strict=True):
        for key, tensor in nf4.to_checkpoint(part, (name,)).items():
            assert torch.equal(saved[key], tensor), key


@against_bitsandbytes
@pytest.mark.parametrize("double", [True, False])
def test_reads_what_bitsandbytes_wrote(functional, double):
    weights = {"q_proj": random_weight(96, 64, seed=1), "k_proj": random_weight(32, 64, seed=2)}
    tensors, expected = {}, []
    for name, weight in weights.items():
        tensors |= bitsandbytes_state(functional, weight, double=double, name=name)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        expected.append(functional.dequantize_4bit(packed, state))
    loaded = nf4.from_checkpoint(tensors, tuple(weights))
    assert loaded.part_rows == (96, 32)
    assert torch.equal(loaded.dequantize(dtype=torch.float32), torch.cat(expected))


def test_reads_bytes_stored_as_bfloat16():
    weight = random_weight(32, 64)
    tensors = nf4.to_checkpoint(nf4.NF4Weight.quantize(weight), ("up",))
    tensors["up.weight"] = tensors["up.weight"].flatten().view(torch.bfloat16)[:, None]
    assert torch.equal(
        nf4.from_checkpoint(tensors, ("up",)).dequantize(dtype=torch.float32),
        nf4.NF4Weight.quantize(weight).dequantize(dtype=torch.float32),
    )


def test_broken_checkpoints_are_refused_by_name():
    tensors = nf4.to_checkpoint(nf4.NF4Weight.quantize(random_weight(32, 64)), ("up",))
    with pytest.raises(ModelError, match=r"down\.weight is missing"):
        nf4.from_checkpoint(tensors, ("down",))
    with pytest.raises(ModelError, match="512 bytes do not hold a weight of 32 x 64"):
        nf4.from_checkpoint({**tensors, "up.weight": tensors["up.weight"][:512]}, ("up",))
    with pytest.raises(ModelError, match="another code"):
        nf4.from_checkpoint({**tensors, "up.weight.quant_map": torch.zeros(16)}, ("up",))
    other = nf4.to_checkpoint(nf4.NF4Weight.quantize(random_weight(32, 128)), ("gate",))
    with pytest.raises(ModelError, match="parts differ"):
        nf4.from_checkpoint(tensors | other, ("up", "gate"))


def test_products_use_the_dequantised_weight_and_share_one_scratch():
    scratch = Scratch()
    first = nf4.NF4Weight.quantize(random_weight(48, 64, seed=1), scratch=scratch)
    second = nf4.NF4Weight.quantize(random_weight(16, 64, seed=2), scratch=scratch)
    x = random_weight(2, 3, 64, seed=3)
    for weight in (first, second):
        dense = weight.dequantize(dtype=torch.float32)
        assert torch.equal(weight.matmul(x), x @ dense.T)
        grad = random_weight(2, 3, dense.shape[0], seed=4)
        assert torch.equal(weight.matmul_transposed(grad), grad @ dense)
    assert scratch.num_bytes == 48 * 64 * 4


def test_moving_to_another_dtype_leaves_the_scales_exact():
    weight = nf4.NF4Weight.quantize(random_weight(48, 64))
    before = {name: buffer.clone() for name, buffer in weight.named_buffers()}
    weight.to(torch.bfloat16)
    for name, buffer in weight.named_buffers():
        assert torch.equal(buffer, before[name]), name
