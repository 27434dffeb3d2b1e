"""The layer kernel and attention on exchanged heads, over a group of one rank: the same numbers in other strides.

Several ranks are in tests/distributed/test_shared_rows.py; this one runs the fast kernels where there is a GPU.
"""

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.kernels.block import KEEP
from stoker.kernels.head_exchange import HeadExchange
from stoker.models import native
from stoker.nn.shared_rows import share_rows

SIZES = {
    "vocab_size": 32,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def exchange(device):
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield HeadExchange(None, index=0, size=1)
    dist.destroy_process_group()


def run(device, exchange, keep, documents, rows):
    """Hidden states and the gradients of adapters, in the device's fast kernels and dtype."""
    on_gpu = device.type == "cuda"
    kernels = "triton" if on_gpu else "reference"
    values = {**LlamaConfig(**SIZES).to_dict(), "architectures": None}
    spec = families.read(values, "config.json")
    model = native.build(spec, seed=0, kernels=kernels, initializer_range=0.2)
    model = model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    add_lora(model, rank=4, alpha=8, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    if exchange is not None:
        share_rows(model, exchange)
    if keep:
        fuse_blocks(model, keep=keep, implementation=kernels)
    ids = torch.arange(rows * 96, device=device).view(rows, 96) % 31
    hidden = model(ids, document_lengths=documents)
    hidden.float().square().mean().backward()
    return hidden, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("documents", [None, ((40, 56), (96,))], ids=["whole", "packed"])
@pytest.mark.parametrize("keep", [*KEEP, None])
def test_exchanged_heads_give_the_same(device, exchange, keep, documents):
    (hidden, grads), (expected, truth) = (run(device, one, keep, documents, 2) for one in (exchange, None))
    # Kernels may add in another order where strides differ: bf16 has 8 bits.
    tolerance = 2e-2 if hidden.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(hidden, expected, atol=tolerance, rtol=tolerance)
    assert grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[name], grad, atol=tolerance * float(grad.abs().max()), rtol=tolerance)
