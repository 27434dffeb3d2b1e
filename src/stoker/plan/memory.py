"""Bytes that a training step holds at its peak on one device, by what holds them.

The peak lies in the backward pass: weights, gradients, the optimiser's state and what the forward kept live at once.
Trained weights, their gradients and the optimiser's averages are fp32 (Micikevicius et al. 2018), or all bf16; frozen
weights are in the compute type or a quantised one. These are estimates for choosing; a run prints the measured peak
beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

from stoker.arch import arithmetic
from stoker.arch.activations import Micro
from stoker.arch.borrowed import AnySpec
from stoker.config.schema import Adapter, Optimizer
from stoker.plan import facts, shared_rows
from stoker.plan import gathered as fsdp2
from stoker.plan.adapter import expert_parameters
from stoker.plan.amounts import LENGTH_BYTES
from stoker.plan.remember import remember
from stoker.plan.spread import SINGLE, Spread
from stoker.plan.states import state_bytes

GIB = 2**30
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What is there before a model is: PyTorch's libraries, and on a GPU the CUDA context and cuBLAS workspaces.
BASE_BYTES = {"cpu": GIB // 2, "cuda": GIB, "mps": GIB}
# Of these, what PyTorch allocates for cuBLAS: a workspace for each thread that makes products, forward's and
# autograd's, of 32 MiB on Hopper and Blackwell and 8.125 on others (parseChosenWorkspaceSize in ATen's
# CublasHandlePool.cpp). After a step an H200 holds 64.5 to 66 MiB more than weights and optimiser.
_WORKSPACES, _WORKSPACE_BYTES, _WIDE_WORKSPACE_BYTES = 2, 8 * 2**20 + 2**17, 32 * 2**20
# The head's logits are made in chunks of at most this many bytes, with as much again for their gradient.
_LOGITS_BYTES = 2 * 128 * 2**20
# Tensors [N, D] about the head: its norm's input and output, the trained rows of those, whose place their gradient
# takes, and that among all rows.
_HEAD_TENSORS = 4
# Freed blocks of odd sizes that the allocator cannot hand out again, as a share of everything else.
_FRAGMENTATION = 0.05
# Layers that are gathered at a time where devices share weights: the one at work and the next.
_GATHERED_LAYERS = 2
# NCCL's own, for a communicator over a node: rule of thumb.
_NCCL_BYTES = 512 * 2**20
# Of gradients that DeepSpeed sums at once (reduce_bucket_size: 5e8 values of two bytes), and how many such buckets are
# alive with overlap_comm (4.5, by Transformers' page on DeepSpeed).
_BUCKET_BYTES, _BUCKETS = 10**9, 4.5
# Of what DeepSpeed keeps on NVMe, the host has buffers of at most so many bytes, by its defaults: for a sub-group of
# 1e9 values (sub_group_size) its weights, both averages and gradients in fp32, and five parts of weights (buffer_size:
# 1e8).
_DISK_BUFFERS = {"optimizer": 3 * 4 * 10**9, "gradients": 4 * 10**9, "weights": 5 * 4 * 10**8}
# NF4 (quant/nf4.py): 4 bits a value, a byte of scale for 64 of them, and two fp32 for each 256 of those.
_NF4_BYTES = 0.5 + 1 / 64 + 2 * 4 / (64 * 256)


@dataclass(frozen=True)
class Memory:
    """Bytes by category.

    `scratch` is where quantised weights are turned into the compute type, or transposed, one at a time; `transposed`
    are the copies of fp8 weights that are kept instead, and those of a head in fp8. `communication`: what several
    devices gather and send in. The others are not in the total: `states_on_host`, which are not the device's;
    `backward_buffers`, what of `communication` is there in layers' backward alone, and `last_buffers`, what is there
    instead when that has ended.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    scratch: int
    transposed: int
    reserve: int
    communication: int = 0
    states_on_host: int = 0
    backward_buffers: int = 0
    last_buffers: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self._total

    @cached_property
    def _total(self) -> int:
        return sum(getattr(self, one) for one in CATEGORIES)

    def with_activations(self, count: int, *, beside_head: int | None = None) -> "Memory":
        """Returns the same with `count` bytes more of activations, and what the allocator loses with them.

        `beside_head`: those of them that are there while the head runs, where what it needs is gone before the layers'
        backward: then only what exceeds their peak is added for it. None: it stays, as a trained head's gradient does.
        """
        logits = self._logits_with(count, beside_head)
        lost = round(_FRAGMENTATION * (count + logits - self.logits))
        return replace(self, activations=self.activations + count, logits=logits, reserve=self.reserve + lost)

    def total_with(self, count: int, *, beside_head: int | None = None) -> int:
        """Returns the total of what `with_activations` returns."""
        more = count + self._logits_with(count, beside_head) - self.logits
        return self._total + more + round(_FRAGMENTATION * more)

    def _logits_with(self, count: int, beside_head: int | None) -> int:
        return self.logits if beside_head is None else max(0, beside_head + self.logits - count)

    def with_transposed(self, count: int) -> "Memory":
        """Returns the same with `count` bytes of such copies kept, which leaves nothing to do in `scratch`."""
        lost = round(_FRAGMENTATION * (count - self.scratch))
        return replace(self, scratch=0, transposed=count, reserve=self.reserve + lost)


def workspace_bytes(compute_capability: tuple[int, int] | None) -> int:
    """Returns the bytes of the reserve that PyTorch allocates for cuBLAS on a CUDA GPU, and counts as allocated."""
    is_wide = compute_capability is not None and compute_capability[0] in (9, 10, 12)
    return _WORKSPACES * (_WIDE_WORKSPACE_BYTES if is_wide else _WORKSPACE_BYTES)


_BESIDE = ("states_on_host", "backward_buffers", "last_buffers")
CATEGORIES = tuple(one.name for one in fields(Memory) if one.name not in _BESIDE)


def estimate(
    spec: AnySpec,
    *,
    trained: int,
    frozen: int,
    optimizer: Optimizer,
    tokens: int,
    precision: str,
    device: str,
    quantization: str = "none",
    weight_dtype: str = "fp32",
    casts_by_layer: bool = False,
    head_apart: bool = False,
    gradients_arrive: bool = False,
    spread: Spread = SINGLE,
    adapter: Adapter | None = None,
) -> Memory:
    """Returns what a micro-batch of `tokens` tokens needs besides the layers' activations.

    `trained` and `frozen` are counts of parameters, of an `adapter` and its base where there is one. `weight_dtype` is
    that of trained matrices, their gradients and averages; norms and biases are fp32. `casts_by_layer`: matrices that
    are trained are cast to the compute type layer by layer; otherwise every copy lives as long as the forward's
    results. bf16 ones are not cast at all. `gradients_arrive`: there are none before the backward. `spread`: the
    result is that of one of its devices.
    """
    value_bytes = VALUE_BYTES[precision]
    is_narrow = weight_dtype == "bf16"
    base = frozen_weight_bytes(spec, quantization, value_bytes) if frozen else 0
    # What four bytes for every trained value would take, less what matrices in two bytes spare.
    share = 1.0 - 0.5 * num_matrix_parameters(spec) / trained if is_narrow else 1.0
    kept = round(4 * share * trained)
    gradients, copies, shards = kept, 0, spread.optimizer_shards
    state = share * state_bytes(spec, optimizer, trained, adapter=adapter, shards=shards)
    if spread.stage:
        state += kept / shards  # DeepSpeed's optimiser steps on a flat copy of its part
    shares_by_layer = spread.strategy == "fsdp2"
    sizes = fsdp2.Sizes(base, trained, not frozen, 2 if is_narrow else 4, value_bytes)
    if shares_by_layer and not frozen:
        if fsdp2.casts_in_products(spec, spread, sizes):
            cast = facts.largest_layer(spec) if casts_by_layer else trained - facts.table_values(spec)
            copies = cast * value_bytes
    elif precision != "fp32" and not is_narrow:
        one_layer = facts.largest_layer(spec) + (0 if head_apart else 2 * spec.vocab_size * spec.hidden_size)
        # Gathered layers are cast one at a time, whichever way they run.
        by_layer = casts_by_layer or spread.weight_shards > 1 or spread.copies_weights
        in_all, in_a_layer = expert_parameters(spec, adapter)  # those of experts are cast for each product anew
        cast = trained - in_all + in_a_layer
        copies = (min(cast, one_layer) if by_layer else cast) * value_bytes
    communication, buffers = 0, fsdp2.Buffers(0, 0, 0)
    if shares_by_layer:
        found = fsdp2.gathered(spec, spread, sizes)
        arrives = gradients_arrive and "gradients" not in spread.on_host
        buffers = fsdp2.buffers(found, spread, arrives=arrives)
        communication = buffers.always + buffers.in_backward
    if spread.num_processes > 1:
        communication += buffer_bytes(spec, spread, sizes, kept=kept, gradients=gradients, device=device)
        communication += shared_rows.buffer_bytes(spec, tokens, spread.sharing, value_bytes)
    states = {
        "weights": (kept + base) // spread.weight_shards,
        "gradients": gradients // spread.gradient_shards,
        "optimizer": round(state),
    }
    weights, gradients, state = (0 if name in spread.on_host else count for name, count in states.items())
    weights += copies
    logits = head_bytes(spec, tokens, value_bytes)
    if is_narrow and not shares_by_layer:
        # Beside the logits there is the head's gradient alone, in fp32 and then rounded: more than all of them or not.
        logits = max(0, _trained_head_bytes(spec, tokens, value_bytes) - gradients)
    scratch = scratch_bytes(spec, quantization, value_bytes)
    held = weights + gradients + state + logits + scratch + communication
    reserve = BASE_BYTES[device] + round(_FRAGMENTATION * held)
    return Memory(
        weights,
        gradients,
        state,
        0,
        logits,
        scratch,
        0,
        reserve,
        communication,
        states_on_host=_on_host(states, spread),
        backward_buffers=buffers.in_backward,
        last_buffers=buffers.last,
    )


def _on_host(states: Mapping[str, int], spread: Spread) -> int:
    """Returns the bytes of what waits on the host, and of buffers for what waits on a disk."""
    return sum(
        min(states[name], _DISK_BUFFERS[name]) if name in spread.on_disk else states[name] for name in spread.on_host
    )


def head_bytes(spec: AnySpec, tokens: int, value_bytes: int) -> int:
    """Returns what the head and the loss hold: chunks of logits with their gradient, and the rows about them."""
    return _logits_bytes(spec, tokens) + _HEAD_TENSORS * tokens * spec.hidden_size * value_bytes


def _logits_bytes(spec: AnySpec, tokens: int) -> int:
    return min(_LOGITS_BYTES, 2 * 4 * tokens * spec.vocab_size)


def trained_head_bytes(spec: AnySpec, micro: Micro) -> int:
    """Returns what the head and the loss hold of a micro-batch where the head is trained.

    That is its gradient in fp32, and two bytes a weight beside it: while the gradient is made, the weights in the
    compute type or, where they are bf16, a chunk of logits of that size; when it is rounded to bf16, the rounded one.
    """
    return _trained_head_bytes(spec, micro.tokens, micro.value_bytes, is_narrow=micro.gradient_bytes == 2)


def _trained_head_bytes(spec: AnySpec, tokens: int, value_bytes: int, *, is_narrow: bool = True) -> int:
    weights, logits = spec.vocab_size * spec.hidden_size, _logits_bytes(spec, tokens)
    beside = max(2 * weights, logits) if is_narrow else 2 * weights + logits
    return 4 * weights + beside + _HEAD_TENSORS * tokens * spec.hidden_size * value_bytes


def last_gradient_bytes(spec: AnySpec, micro: Micro) -> int:
    """Returns what lies beside all gradients when a backward that leaves them ends: the embedding's, until it is added
    to that of a head that shares its table."""
    return round(micro.gradient_bytes * spec.vocab_size * spec.hidden_size) if getattr(spec, "tied_head", False) else 0


def zero_bytes(
    parameters: float, ranks: int, stage: int, *, weight: int = 2, gradient: int = 2, state: int = 12
) -> float:
    """Returns the bytes of weights, gradients and optimiser's state on one of `ranks`, by the ZeRO paper's formula.

    Bytes of each for a parameter; the defaults are its mixed precision with Adam (arXiv:1910.02054, section 5): fp16
    weights and gradients, and fp32 weights and two averages as the state. With 2, 4 and 12 it is Megatron-LM's
    distributed optimiser in bf16, with 4, 4 and 8 that in fp32.
    """
    each = weight / (ranks if stage >= 3 else 1) + gradient / (ranks if stage >= 2 else 1)
    return parameters * (each + state / (ranks if stage >= 1 else 1))


def buffer_bytes(spec: AnySpec, spread: Spread, sizes: fsdp2.Sizes, *, kept: int, gradients: int, device: str) -> int:
    """Returns what one device of several holds to gather and send in; `kept` and `gradients`: bytes of what is trained
    and of its gradients.

    ZeRO-3: two layers (the one at work and the next) and what lies outside of the layers (embedding, head), as much of
    the gradients, and one bucket in which these are summed, which it takes whole from the start. ZeRO-1 and -2: buckets
    of gradients. DDP sums where gradients lie. NCCL has buffers of its own on a GPU, which is all that is said of FSDP2
    here (`gathered.buffers` has the rest).
    """
    own = _NCCL_BYTES if device == "cuda" else 0
    if spread.stage == 3:
        own += 4 * (spec.hidden_size**2 if spread.bucket_values is None else spread.bucket_values)
        return own + gathered_bytes(spec, sizes, kept) + _gathered_of_trained(spec, sizes, gradients)
    if spread.strategy == "deepspeed":
        return own + round(_BUCKETS * min(gradients, _BUCKET_BYTES))
    return own


def gathered_bytes(spec: AnySpec, sizes: fsdp2.Sizes, kept: int) -> int:
    """Returns the bytes of weights that ZeRO-3 has whole at a time: two layers, and all that is in none; `kept`: bytes
    of what is trained."""
    outside, of_layers = fsdp2.frozen_parts(spec, sizes)
    return round(outside + _layers_share(spec) * of_layers) + _gathered_of_trained(spec, sizes, kept)


def _gathered_of_trained(spec: AnySpec, sizes: fsdp2.Sizes, count: int) -> int:
    """Of so many bytes for what is trained, those for what is whole at a time; adapters lie in layers."""
    outside = facts.table_values(spec) / facts.num_parameters(spec) if sizes.is_full else 0.0
    return round((outside + (1.0 - outside) * _layers_share(spec)) * count)


def _layers_share(spec: AnySpec) -> float:
    return min(1.0, _GATHERED_LAYERS / max(1, len(spec.layers)))


@remember(0)
def num_matrix_parameters(spec: AnySpec) -> int:
    """Returns how many parameters lie in linear layers, the embedding and the head: all but norms, biases and such."""
    experts = arithmetic.expert_counts(spec)
    shapes = arithmetic.linear_shapes(spec).items()
    linear = sum(into * out * experts.get(name, 1) for name, (into, out) in shapes)
    table = spec.vocab_size * spec.hidden_size
    # A tied head is the embedding's own table.
    return linear + table * min(2, (arithmetic.num_parameters(spec) - linear) // table)


@remember(0)
def frozen_weight_bytes(spec: AnySpec, quantization: str, value_bytes: int) -> int:
    """Returns the bytes of a frozen base: its layers' linear weights quantised, the rest in the compute type."""
    # Experts are kept in NF4 or in the compute type, in no other format.
    experts = facts.expert_counts(spec)
    shapes = [
        (into * experts.get(name, 1), out)
        for name, (into, out) in facts.linear_shapes(spec).items()
        if quantization == "nf4" or name not in experts
    ]
    values, rows = sum(into * out for into, out in shapes), sum(out for _, out in shapes)
    rest = (facts.num_parameters(spec) - values) * value_bytes
    if quantization == "nf4":
        return rest + round(values * _NF4_BYTES)
    if quantization in ("int8", "fp8"):
        return rest + values + 4 * rows  # one fp32 scale a row
    return rest + values * value_bytes


@remember(0)
def transposed_bytes(spec: AnySpec) -> int:
    """Returns the bytes of a transposed copy of every fp8 weight, a byte a value."""
    experts = facts.expert_counts(spec)
    shapes = facts.linear_shapes(spec).items()
    return sum(into * out for name, (into, out) in shapes if name not in experts)


@remember(0)
def rounded_head_bytes(spec: AnySpec) -> int:
    """Returns the bytes of a head in fp8 beside the one in the compute type: as it is and transposed."""
    return 2 * spec.vocab_size * spec.hidden_size


@remember(0)
def scratch_bytes(spec: AnySpec, quantization: str, value_bytes: int) -> int:
    """Returns the bytes of the buffer that holds one dequantised weight, the largest; fp8's holds a transposed one."""
    if quantization == "none":
        return 0
    largest = max((size for layer in set(spec.layers) for size in facts.fused_sizes(spec, layer)), default=0)
    return largest if quantization == "fp8" else largest * value_bytes


@remember(0)
def lengths_bytes(spec: AnySpec, quantization: str, value_bytes: int, *, in_pieces: bool) -> int:
    """Returns the bytes that DoRA's lengths of a weight's rows take, as a layer's forward begins.

    Of a quantised weight that is all of it in the compute type; and where the lengths are taken `in_pieces`, as plain
    PyTorch does, a piece in fp32 and its squares.
    """
    largest = max((size for layer in set(spec.layers) for size in facts.fused_sizes(spec, layer)), default=0)
    pieces = (2 if value_bytes < 4 else 1) * min(LENGTH_BYTES, 4 * largest)
    return (pieces if in_pieces else 0) + (largest * value_bytes if quantization != "none" else 0)
