"""FLOPs of every family, forward and backward, on every rung, beside torch's counter: within 1%."""

import pytest
import torch
from small import CASES, as_a_gpu_attends, spec_of
from torch.utils.flop_counter import FlopCounterMode

from stoker.adapters.fused_block import FusedBlock, fuse_blocks, why_not_fused
from stoker.adapters.lora import add_lora
from stoker.arch import activations, arithmetic
from stoker.arch.activations import LADDER
from stoker.arch.families import FAMILIES
from stoker.arch.parts import mean_keys, part
from stoker.arch.spec import Mamba1Spec, Mamba2Spec, SideBySideSpec
from stoker.config.schema import Adapter
from stoker.kernels.chunked_scan import chunked_scan_reference
from stoker.models import native
from stoker.plan.adapter import adapted, adapter_parameters, targeted
from stoker.plan.amounts import Way, amounts

ROWS, LENGTH, RANK = 2, 64, 2
TOKENS = ROWS * LENGTH
STATE_SPACES = Mamba1Spec | Mamba2Spec | SideBySideSpec


def _attended(q, k, v, *_, attn_mask=None, is_causal=False, **__):
    """FLOPs of attention on a CPU: two products over the pairs of positions that see each other, by the mask given."""
    batch, heads, length, channels = q.shape
    pairs = length * k.shape[2]
    if attn_mask is not None:
        pairs = int((attn_mask if attn_mask.dtype == torch.bool else attn_mask > float("-inf")).sum())
    elif is_causal:
        pairs = length * (length + 1) // 2
    return 2 * batch * heads * pairs * (channels + v.shape[-1])


def _attention(q, k, v, dropout=0.0, is_causal=False, *, attn_mask=None, **_):
    return _attended(q, k, v, attn_mask=attn_mask, is_causal=is_causal)


def _attention_backward(grad, q, k, v, out, sums, dropout, is_causal, *, attn_mask=None, **_):
    return 2 * _attended(q, k, v, attn_mask=attn_mask, is_causal=is_causal)


def _added(total, left, right, **_):
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


_added._get_raw = _attention._get_raw = _attention_backward._get_raw = True
_aten = torch.ops.aten
BESIDES = {
    _aten.addmm_: _added,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted(model, vocab_size):
    """FLOPs of a forward and a backward a token: of linear layers, the head and attention; not of scans.

    Torch's counter knows neither a CPU's attention nor products that are added in place.
    """
    with FlopCounterMode(display=False, custom_mapping=BESIDES) as counter:
        model.logits(model(torch.randint(0, vocab_size, (ROWS, LENGTH)))).sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(flops for name, flops in by_operator.items() if "bmm" not in str(name)) / TOKENS


def beyond_products(spec, rungs):
    """FLOPs of state spaces, which the counter does not see: convolution and scan, three times and as often as again.

    Of Mamba-1 it sees the product that widens the step sizes.
    """
    total = 0.0
    for layer, rung in zip(spec.layers, rungs, strict=True):
        mixer = layer.mixer
        if not isinstance(mixer, STATE_SPACES):
            continue
        scan = mixer.state_space if isinstance(mixer, SideBySideSpec) else mixer
        flops = part(scan, spec.hidden_size).flops(LENGTH)
        if isinstance(scan, Mamba1Spec):
            flops -= 2.0 * scan.inner_size * scan.time_step_rank
        times = 3 + (rung != "all") + (not isinstance(scan, Mamba1Spec) or rung == "input")
        total += times * flops
    return total


def set_up(model, rungs, *, is_fused):
    if is_fused:
        fuse_blocks(model, keep=rungs, implementation="reference")
    for block, rung in zip(model.blocks, rungs, strict=True):
        if not isinstance(block, FusedBlock):
            block.recompute, block.keep_attention = rung in ("attention", "input"), rung == "attention"


def rungs_of(spec, *, is_fused):
    """The ladders that put all layers on one rung, each once; Mamba-1 in plain PyTorch keeps no more than "mixer"."""
    lowest = {rung: activations.legal(spec.layers, (rung,) * len(spec.layers), is_fused=is_fused) for rung in LADDER}
    plain = (
        tuple(
            "mixer" if rung == "all" and isinstance(layer.mixer, Mamba1Spec) else rung
            for layer, rung in zip(spec.layers, rungs, strict=True)
        )
        for rungs in lowest.values()
    )
    return list(dict.fromkeys(plain))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_takes_the_flops_that_torch_counts_on_every_rung(name):
    spec = as_a_gpu_attends(spec_of(name))
    can_fuse = why_not_fused(native.build(spec)) is None
    for is_fused in {False, can_fuse}:
        for rungs in rungs_of(spec, is_fused=is_fused):
            model = native.build(spec)
            set_up(model, rungs, is_fused=is_fused)
            ours = arithmetic.training_flops_per_token(spec, LENGTH, frozen_base=False)
            ours += activations.recomputed_flops_per_token(spec, LENGTH, rungs, is_fused=is_fused)
            ours -= beyond_products(spec, rungs)
            assert ours == pytest.approx(counted(model, spec.vocab_size), rel=0.01), (is_fused, rungs)


# The counter does not tell what of a scan's gradients frozen parameters spare.
WITHOUT_SCANS = [
    name for name in CASES if not any(isinstance(layer.mixer, STATE_SPACES) for layer in spec_of(name).layers)
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", WITHOUT_SCANS)
def test_adapters_take_the_flops_and_parameters_that_are_counted(name, kind):
    spec = as_a_gpu_attends(spec_of(name))
    targets = "all-dense" if kind == "dora" else "all-linear"
    adapter = Adapter(kind=kind, rank=RANK, targets=targets)
    model = native.build(spec)
    summary = add_lora(model, rank=RANK, alpha=4.0, dora=kind == "dora", targets=targets)
    assert summary.parameters == adapter_parameters(spec, adapter)
    model.embedding.weight.requires_grad_(requires_grad=True)  # looking up is free, and all layers need gradients
    can_fuse = why_not_fused(model) is None
    rungs = activations.legal(spec.layers, ("all",) * len(spec.layers), is_fused=can_fuse)
    set_up(model, rungs, is_fused=can_fuse)
    names, kept = tuple(targeted(spec, targets)), adapted(spec, adapter, "none")
    ours = arithmetic.training_flops_per_token(spec, LENGTH, frozen_base=True)
    ours += arithmetic.adapter_flops_per_token(spec, RANK, names)
    ours += activations.recomputed_flops_per_token(spec, LENGTH, rungs, is_fused=can_fuse, adapter=kept)
    ours += 2 * spec.vocab_size * spec.hidden_size if spec.tied_head else 0  # its weight is the embedding's
    if kind == "dora":  # the lengths of rows, once a micro-batch: W Aᵀ and A Aᵀ
        shapes = arithmetic.linear_shapes(spec)
        ours += sum(2 * RANK * into * out for into, out in (shapes[name] for name in names)) / TOKENS
    assert ours == pytest.approx(counted(model, spec.vocab_size), rel=0.01)


@pytest.mark.parametrize(("is_fused", "rung"), [(False, "all"), (False, "input"), *((True, rung) for rung in LADDER)])
def test_what_dora_takes_more_than_lora_is_in_the_plans_time(is_fused, rung):
    spec, rank = as_a_gpu_attends(spec_of("qwen2")), 4
    found, planned = {}, {}
    for kind in ("lora", "dora"):
        model = native.build(spec)
        add_lora(model, rank=rank, alpha=4.0, dora=kind == "dora")
        model.embedding.weight.requires_grad_(requires_grad=True)
        rungs = (rung,) * len(spec.layers)
        set_up(model, rungs, is_fused=is_fused)
        found[kind] = TOKENS * counted(model, spec.vocab_size)
        kept = adapted(spec, Adapter(kind=kind, rank=rank), "none")
        way = Way("fused" if is_fused else "op by op", rungs, "none", None, True, uses_triton=False, adapter=kept)
        work = amounts(spec, way, TOKENS, LENGTH, 1.0)
        planned[kind] = 2 * rank * work.measured_weights
        planned[kind] += sum(one.flops * (one.times + one.again) for one in work.products)
    more = planned["dora"] - planned["lora"]
    # A Aᵀ and its product with B, which a plan leaves out: a rank is small beside a width, though not here.
    taken = 2 if rung == "input" and not is_fused else 1
    more += taken * sum(2 * rank**2 * (into + out) for into, out in arithmetic.linear_shapes(spec).values())
    # Of the fused layer's, also the updates of what is run again.
    assert more == pytest.approx(found["dora"] - found["lora"], rel=0.06 if is_fused else 0.001)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_modules(name):
    spec = spec_of(name)
    assert arithmetic.num_parameters(spec) == sum(p.numel() for p in native.build(spec).parameters())


@pytest.mark.parametrize("window", [1, 7, 16, 64, 100])
def test_windows_are_counted_as_their_masks_are(window):
    spec = as_a_gpu_attends(spec_of("llama"), window=window)
    model = native.build(spec)
    ours = arithmetic.training_flops_per_token(spec, LENGTH, frozen_base=False)
    assert ours == pytest.approx(counted(model, spec.vocab_size), rel=0.001)
    positions = torch.arange(LENGTH)
    distance = positions[:, None] - positions
    seen = ((distance >= 0) & (distance < window)).sum() / LENGTH
    assert mean_keys(LENGTH, window) == pytest.approx(seen.item())


def test_a_scan_in_chunks_takes_the_products_that_torch_counts():
    heads, channels, states, chunk = 4, 16, 8, 64  # the reference's chunk
    spec = Mamba2Spec(heads, channels, states, num_groups=heads, conv_kernel=4, chunk_size=chunk)
    x = torch.randn(1, 4 * chunk, heads, channels)
    keys = torch.randn(1, 4 * chunk, heads, states)
    with FlopCounterMode(display=False) as counter:
        chunked_scan_reference(x, torch.rand(1, 4 * chunk, heads), -torch.ones(heads), keys, keys)
    # The reference computes whole squares of a chunk, of which the formula counts what is seen; it passes states on
    # without products, and there is no convolution.
    squares = 2.0 * (chunk - mean_keys(chunk, None)) * heads * (states + channels)
    inner, width = heads * channels, heads * (channels + 2 * states)
    others = 2.0 * width * 4 + 2.0 * inner * states / chunk
    ours = part(spec, 64).flops(4 * chunk) + squares - others
    assert ours == pytest.approx(counter.get_total_flops() / (4 * chunk), rel=0.01)


def test_every_family_is_among_the_cases():
    assert {spec_of(name).model_type for name in CASES} == set(FAMILIES)
