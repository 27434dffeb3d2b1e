import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stoker.checkpoint import tensors as safetensors_file
from stoker.checkpoint.durable import DurableFile, sha256_of

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def written(path, tensors):
    with DurableFile(path) as file:
        safetensors_file.write(file, tensors)
    return file


def test_the_library_reads_back_every_dtype_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    written(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[3:7],
        torch.tensor([0.1, float("nan"), float("-inf"), -0.0]),
        torch.ones(2, requires_grad=True),
    ],
    ids=["scalar", "empty", "transposed", "slice", "special values", "with gradient"],
)
def test_awkward_tensors_come_back_the_same(tmp_path, tensor):
    written(tmp_path / "x.safetensors", {"x": tensor})
    torch.testing.assert_close(
        load_file(tmp_path / "x.safetensors")["x"], tensor.detach(), atol=0, rtol=0, equal_nan=True
    )


def test_tensors_that_share_memory_are_each_written(tmp_path):
    shared = torch.arange(4.0)
    written(tmp_path / "x.safetensors", {"a": shared, "b": shared[:2]})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["a"].tolist() == [0, 1, 2, 3]
    assert loaded["b"].tolist() == [0, 1]


def test_hash_and_size_are_those_of_the_file(tmp_path):
    file = written(tmp_path / "x.safetensors", {"x": torch.randn(1000)})
    assert file.sha256 == sha256_of(tmp_path / "x.safetensors")
    assert file.num_bytes == (tmp_path / "x.safetensors").stat().st_size


def test_file_says_that_it_is_torchs(tmp_path):
    written(tmp_path / "x.safetensors", {})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
