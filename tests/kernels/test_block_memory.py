"""What a layer's backward holds at its peak is what the plan reckons with."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from live_bytes import LiveBytes
from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch import activations
from stoker.arch.activations import Micro
from stoker.arch.families import read
from stoker.kernels.attention import attention
from stoker.kernels.kept_attention import KeptAttention
from stoker.kernels.offload import HostOffload
from stoker.models import native

# Heads of their own for keys and values: a CPU's attention copies shared ones, which a GPU's does not.
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 64,
}
TOKENS = 1024


@pytest.mark.parametrize("keep", ["mixer", "attention", "input"])
def test_a_long_rows_backward_peaks_in_attention_as_the_plan_says(keep):
    spec = read(CONFIG, "config.json")
    model = native.build(spec, device="cpu", seed=1)
    add_lora(model, rank=1, alpha=1.0)
    fuse_blocks(model, keep=keep, implementation="reference", tile_tokens=TOKENS // 16)
    cos, sin = torch.ones(1, TOKENS, 8), torch.zeros(1, TOKENS, 8)
    x = torch.randn(1, TOKENS, 64, requires_grad=True)
    with LiveBytes() as memory:
        y = model.blocks[0](x, cos, sin)
        after_forward = memory.now
        y.backward(torch.ones_like(y))
    held = activations.fused(spec.layers[0], 64, Micro(TOKENS, 4), keep, tile_tokens=TOKENS // 16)
    in_kernels = 4 * 64 * TOKENS  # the fp32 sum of q's gradient is inside of a GPU's kernel
    assert memory.peak - after_forward == pytest.approx(held.passing - in_kernels, rel=0.1)


def test_queries_keys_and_values_in_one_tensor_leave_the_device_with_an_offload():
    length, heads, channels = 64, 4, 16
    drawn = torch.randn(1, length, 3 * heads, channels)
    offload = HostOffload(min_bytes=length * channels)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v).flatten(2)

    def run(where: HostOffload | None) -> tuple[int, list[Tensor]]:
        with LiveBytes() as memory:
            attended = KeptAttention(attend, drawn.clone().split(heads, dim=2), offload=where)
            attended.put_away()
            kept = memory.now - (0 if where is None else where.host_bytes)
        values = attended.values().clone()
        return kept, [values, *attended.backward(torch.ones_like(values))]

    kept, results = run(offload)
    held, expected = run(None)
    unit = length * heads * channels * 4
    assert held >= 4 * unit  # q, k, v and the result
    assert kept < 0.1 * unit
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert offload.num_stored == 0
    # Another tensor at the address of one that has left is another tensor.
    _, again = run(offload)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


class _RanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        raise MemoryError("out of memory")


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("keep", ["all", "mixer", "attention", "input"])
def test_a_forward_that_runs_out_of_memory_leaves_nothing_behind(keep, offloads):
    model = native.build(read(CONFIG, "config.json"), device="cpu", seed=1)
    add_lora(model, rank=1, alpha=1.0)
    offload = HostOffload(min_bytes=1) if offloads and keep != "all" else None
    fuse_blocks(model, keep=keep, implementation="reference", offload=offload)
    cos, sin = torch.ones(1, TOKENS, 8), torch.zeros(1, TOKENS, 8)
    x = torch.randn(1, TOKENS, 64, requires_grad=True)

    def attempt() -> None:
        _RanOut.apply(model.blocks[0](model.blocks[0](x, cos, sin), cos, sin))

    with LiveBytes() as memory:
        with pytest.raises(MemoryError) as failure:
            attempt()
        del failure
        if offload is not None:
            offload.clear()
            assert offload.num_stored == 0
            offload._free.clear()  # its buffers are for the next attempt
        gc.collect()
        assert memory.now == 0
