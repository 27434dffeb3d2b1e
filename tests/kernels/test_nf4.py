"""The NF4 kernel equals the reference bit for bit: both follow the same float32 operations."""

import pytest
import torch

from stoker.kernels import nf4


def random_tensors(num_values: int, *, block_size: int, nested: bool, device: torch.device) -> nf4.NF4Tensors:
    generator = torch.Generator().manual_seed(num_values)
    num_blocks = -(-num_values // block_size)
    num_groups = -(-num_blocks // 256)
    packed = torch.randint(0, 256, ((num_values + 1) // 2,), generator=generator, dtype=torch.uint8)
    code = torch.tensor(nf4.NF4_CODE)
    if not nested:
        absmax = torch.rand(num_blocks, generator=generator)
        return nf4.NF4Tensors(*(t.to(device) for t in (packed, absmax, code)), None, None, None, block_size)
    absmax = torch.randint(0, 256, (num_blocks,), generator=generator, dtype=torch.uint8)
    nested_code = torch.linspace(-1, 1, 256)
    nested_absmax = torch.rand(num_groups, generator=generator)
    nested_offset = torch.rand(num_groups, generator=generator)
    tensors = (packed, absmax, code, nested_code, nested_absmax, nested_offset)
    return nf4.NF4Tensors(*(t.to(device) for t in tensors), block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_values", "block_size", "nested"),
    [(64 * 256 * 2 + 64, 64, True), (1000, 64, True), (4096, 128, False), (2, 64, True), (63, 32, False)],
)
def test_kernel_equals_reference_bit_for_bit(num_values, block_size, nested, dtype, device):
    tensors = random_tensors(num_values, block_size=block_size, nested=nested, device=device)
    expected = nf4.dequantize(tensors, torch.empty(num_values, dtype=dtype, device=device))
    # One value past the end shows a store that overruns.
    buffer = torch.full((num_values + 1,), 7.0, dtype=dtype, device=device)
    out = nf4.dequantize(tensors, buffer[:num_values], implementation="triton")
    if dtype is torch.bfloat16 and device.type == "cpu":
        # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: one unit in the last of 8 bits.
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, expected)
    assert buffer[-1] == 7.0


def test_empty_weight_is_left_empty(device):
    tensors = random_tensors(0, block_size=64, nested=False, device=device)
    assert nf4.dequantize(tensors, torch.empty(0, device=device), implementation="triton").numel() == 0


def test_output_of_the_wrong_size_is_refused(device):
    tensors = random_tensors(128, block_size=64, nested=False, device=device)
    with pytest.raises(ValueError, match="contiguous with 128 values"):
        nf4.dequantize(tensors, torch.empty(64, device=device))
    with pytest.raises(ValueError, match="contiguous with 128 values"):
        nf4.dequantize(tensors, torch.empty(8, 32, device=device)[:, :16])
