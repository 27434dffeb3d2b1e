"""What layers of every family keep for their backward, beside what lives after a forward: within 3%; their peaks."""

from contextlib import nullcontext

import pytest
import torch
from small import CASES, as_a_gpu_attends, spec_of

from live_bytes import LiveBytes
from stoker.adapters.fused_block import FusedBlock, freeze_into, fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch import activations, arithmetic
from stoker.arch.activations import LADDER
from stoker.arch.families import read
from stoker.arch.saved import Adapted, Micro
from stoker.arch.shape import why_not_llama
from stoker.config.schema import Adapter
from stoker.kernels import triton_support
from stoker.models import native
from stoker.nn.mamba1 import Mamba1
from stoker.plan.adapter import adapted
from stoker.quant.nf4 import NF4Weight

LENGTH, RANK = 32, 4


@pytest.fixture
def hollow(monkeypatch):
    """Triton's kernels launch nothing: which tensors there are is as on a GPU, what is in them is not."""
    pytest.importorskip("triton")
    for kind in {type(kernel) for kernel in triton_support.KERNELS}:
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *args, **options: None)


def built(spec, mode, kernels, *, dropout=0.0):
    """(a model, what its adapters keep); `mode`: "full" (fp32 weights), "full in bf16", or an adapter's."""
    is_full = mode.startswith("full")
    narrow = torch.float32 if mode == "full" or kernels == "reference" else torch.bfloat16
    model = native.build(spec, kernels=kernels, dtype=narrow)
    if is_full:
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.data = parameter.data.float()
        return model, None
    kind, quantization = ("dora" if "dora" in mode else "lora"), ("nf4" if "nf4" in mode else "none")
    has_experts = bool(arithmetic.expert_counts(spec))
    targets = "all-dense" if has_experts and (kind == "dora" or dropout) else "all-linear"
    if quantization == "nf4":
        model.requires_grad_(requires_grad=False)
        freeze_into(model, lambda weight, rows: NF4Weight.quantize(weight, part_rows=rows, implementation=kernels))
    add_lora(model, rank=RANK, alpha=8.0, dora=kind == "dora", targets=targets, dropout=dropout)
    adapter = Adapter(kind=kind, rank=RANK, targets=targets, dropout=dropout)
    return model, adapted(spec, adapter, quantization)


def micro(mode, kernels, adapter: Adapted | None):
    is_plain = kernels == "reference"
    wide = 4 if mode == "full" and not is_plain else None
    return Micro(1, 4 if is_plain else 2, adapter=adapter, is_plain=is_plain, stream_bytes=wide)


def kept_per_token(block, hidden_size, *, dtype, autocast):
    """Bytes that live after a layer's forward because of one more token, without its output."""
    kept = []
    for rows in (1, 3):
        x = torch.randn(rows, LENGTH, hidden_size).to(dtype).requires_grad_()
        rotary = getattr(block.mixing, "rotary", None)
        tables = (None, None) if rotary is None else rotary.span(0, LENGTH, x.device)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), LiveBytes(clears=True) as memory:
            source = x.clone()  # so that it counts where something keeps it
            y = (block.recomputed if block.recompute else block)(source, *tables)
            del source
            kept.append(memory.now - y.untyped_storage().nbytes())
    return (kept[1] - kept[0]) / (2 * LENGTH)


def set_up(block, rung, kernels):
    """As `compose.execution` does for a layer that runs op by op."""
    block.recompute, block.keep_attention = rung in ("attention", "input"), rung == "attention"
    if isinstance(block.mixing, Mamba1):
        block.mixing.keeps_all = rung == "all" and kernels == "triton"


def distinct(spec, model):
    """(layer's spec, its block, its index) of those that differ."""
    first = {}
    for index, layer in enumerate(spec.layers):
        first.setdefault(layer, index)
    return [(layer, model.blocks[index], index) for layer, index in first.items()]


def assert_kept(spec, mode, kernels, rungs_of):
    model, adapter = built(spec, mode, kernels)
    how = micro(mode, kernels, adapter)
    autocast = kernels == "triton"
    dtype = torch.bfloat16 if autocast and mode != "full" else torch.float32
    for layer, block, _ in distinct(spec, model):
        for rung in rungs_of(layer):
            set_up(block, rung, kernels)
            measured = kept_per_token(block, spec.hidden_size, dtype=dtype, autocast=autocast)
            predicted = activations.op_by_op(layer, spec.hidden_size, how, rung).kept
            assert predicted == pytest.approx(measured, rel=0.03), (rung, layer)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_plain_pytorch_keeps_what_is_counted(name):
    spec = as_a_gpu_attends(spec_of(name))
    assert_kept(spec, "full", "reference", lambda layer: ("all",))
    assert_kept(spec, "lora", "reference", activations.op_by_op_rungs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "full in bf16", "lora", "nf4 dora"])
@pytest.mark.parametrize("name", CASES)
def test_layers_keep_on_a_gpu_what_is_counted(name, mode, hollow):
    spec = as_a_gpu_attends(spec_of(name))
    assert_kept(spec, mode, "triton", lambda layer: ("all",) if "dora" in mode else activations.op_by_op_rungs(layer))


LLAMAS = [name for name in CASES if not all(why_not_llama(layer) for layer in as_a_gpu_attends(spec_of(name)).layers)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full in bf16", "lora", "dora", "nf4 dora"])
@pytest.mark.parametrize("name", LLAMAS)
def test_the_layer_kernel_keeps_what_is_counted(name, mode, hollow):
    spec = as_a_gpu_attends(spec_of(name))
    for rung in LADDER:
        model, adapter = built(spec, mode, "triton")
        fuse_blocks(model, keep=rung)
        for layer, block, _ in distinct(spec, model):
            if not isinstance(block, FusedBlock):
                continue
            measured = kept_per_token(block, spec.hidden_size, dtype=torch.bfloat16, autocast=True)
            held = activations.fused(layer, spec.hidden_size, micro(mode, "triton", adapter), rung)
            assert held.kept == pytest.approx(measured, rel=0.03), rung


def test_dropout_over_a_quantised_base_keeps_a_copy_and_a_mask(hollow):
    spec = spec_of("qwen2")
    model, adapter = built(spec, "nf4 lora", "triton", dropout=0.1)
    (layer, block, _) = distinct(spec, model)[0]
    measured = kept_per_token(block, spec.hidden_size, dtype=torch.bfloat16, autocast=True)
    # A CPU's mask has the dtype of what it multiplies, a GPU's a byte a value.
    dropped = sum(linear.in_features for linear in arithmetic.linears(layer, spec.hidden_size).values())
    predicted = activations.op_by_op(layer, spec.hidden_size, micro("nf4 lora", "triton", adapter), "all").kept
    assert predicted + dropped == pytest.approx(measured, rel=0.03)


# (model, channels of an expert): with wide experts the mixture's backward is the highest moment, with narrow ones the
# mixer's.
MIXTURES = [("mixtral", 224), ("qwen3_moe", 32)]


def peak_per_token(block, hidden_size, *, dtype):
    """Bytes at the highest moment of a layer's backward because of one more token, without the layer's output.

    What goes in lives for as long as something keeps it, as between layers.
    """
    peaks = []
    for length in (2048, 4096):
        x = torch.randn(1, length, hidden_size).to(dtype).requires_grad_()
        tables = block.mixing.rotary.span(0, length, x.device)
        with torch.autocast("cpu", torch.bfloat16), LiveBytes(clears=True) as memory:
            source = x.clone()
            y = (block.recomputed if block.recompute else block)(source, *tables)
            del source
            memory.peak, gradient = 0, torch.ones_like(y)
            y.backward(gradient)
            peaks.append(memory.peak - y.untyped_storage().nbytes())
    return (peaks[1] - peaks[0]) / 2048


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "full in bf16", "lora"])
@pytest.mark.parametrize(("model_type", "inner"), MIXTURES)
def test_a_mixtures_backward_peaks_where_it_is_counted(model_type, inner, mode, hollow):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 64}
    experts = {"num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": inner}
    config = {"model_type": model_type, "moe_intermediate_size": inner, "num_experts": 4}
    spec = read(config | sizes | experts, "config.json")
    model, adapter = built(spec, mode, "triton")
    how, (layer,), (block,) = micro(mode, "triton", adapter), spec.layers, model.blocks
    for rung in activations.op_by_op_rungs(layer):
        set_up(block, rung, "triton")
        dtype = torch.float32 if mode == "full" else torch.bfloat16
        measured = peak_per_token(block, spec.hidden_size, dtype=dtype)
        held = activations.op_by_op(layer, spec.hidden_size, how, rung)
        # The fp32 sum of q's gradient is inside a GPU's kernel, and no tensor here.
        in_kernel = 4 * 64 if model_type == "qwen3_moe" and rung != "all" else 0
        assert held.kept + held.passing - in_kernel == pytest.approx(measured, rel=0.03), rung


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("rung", LADDER)
def test_a_fused_layers_backward_stays_within_what_is_counted(rung, kind, hollow):
    """With a wide feed-forward, whose backward is the highest moment: DoRA's needs no second gate and up."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 64}
    spec = read({"model_type": "llama", "num_hidden_layers": 1, "intermediate_size": 256} | sizes, "config.json")
    model, adapter = built(spec, kind, "triton")
    how, (layer,) = micro(kind, "triton", adapter), spec.layers
    fuse_blocks(model, keep=rung, implementation="triton")
    peaks = []
    for length in (1024, 2048):
        x, tables = torch.randn(1, length, 64).bfloat16().requires_grad_(), (torch.ones(1, length, 8),) * 2
        with LiveBytes(clears=True) as memory:
            y = model.blocks[0](x, *tables)
            memory.peak = 0
            y.backward(torch.ones_like(y))
        # The output is the next layer's; its gradient is counted.
        peaks.append(memory.peak - y.untyped_storage().nbytes())
    held = activations.fused(layer, 64, how, rung)
    counted = (held.kept + held.passing) / how.tokens
    assert 0.8 * counted < (peaks[1] - peaks[0]) / 1024 <= counted
