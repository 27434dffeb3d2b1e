"""Seconds of a micro-batch on a CPU in plain PyTorch: arithmetic, what moves, and the calls one after the other.

Products reach one rate whatever their shape and move their matrices besides; attention's rate grows with the length of
a document and, up to 64, with the channels of a head. Elementwise work has two rates: results that stay in the caches,
and larger ones, whose pages the system hands out anew each time. Small models take most of their time in calls, which
are counted from the layers.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from stoker.plan.amounts import LENGTH_BYTES, Amounts

# Results up to so many bytes stay in the caches from one operation to the next; from so many on (glibc's largest
# threshold) each is made of pages that the system has to clear. What lies between is taken to be between.
_CACHED_BYTES, _PAGED_BYTES = 8 * 2**20, 32 * 2**20
# Products of an adapter's few columns reach this share of a large one's rate. By measurement at rank 16 on one core.
_NARROW = 0.5
# Reads or writes of each value that goes into and comes out of an adapted layer, beside its products.
_ADAPTER_PASSES = 3.0
# Plain PyTorch makes norms, turns and gates of several operations each: so many times what fused kernels move.
_PLAIN_PASSES = 2.5
# Reads and writes of a trained embedding's gradient: made of zeros, added to, gathered with the rest.
_EMBEDDING_PASSES = 3.0
# A call inside a step takes so many of a chain of small operations: modules and autograd functions are Python's. By
# measurement of Llama layers of 64 channels on 16 tokens: 6.7 to 8.3 us a call, beside 3.1 us in a chain.
_IN_STEP = 2.5
ATTENTION_TOKENS, ATTENTION_HEAD = 1024, 64
"""Where attention's rate is measured; larger heads are no faster."""
# Of packed rows attention runs document by document, forward and backward: slices, the call, and what they lie in.
_DOCUMENT_CALLS = 25
# Calls' worth of Python in a micro-batch about the layers (batch, head, loss) and in a step (schedule, norm, update).
_MICRO_BATCH_CALLS, _STEP_CALLS = 100, 300


@dataclass(frozen=True)
class CpuRates:
    """What `Efficiencies` lacks of a CPU. `call_seconds`: of a small operation under autograd, forward or backward.

    Bytes a second, read and written, of operations with results `in_caches` or `in_memory`; `logit_seconds`: of
    a logit's softmax, loss and gradient. Attention has half its rate at `attention_half` tokens. The defaults are one
    core's of a Xeon of 2023 (Sapphire Rapids, 2.1 GHz).
    """

    call_seconds: float = 3.1e-6
    in_caches: float = 30e9
    in_memory: float = 3.5e9
    logit_seconds: float = 5e-9
    attention_half: float = 320.0

    def bandwidth(self, size: float) -> float:
        """Returns bytes a second of an operation with a result of `size` bytes."""
        share = math.log(max(size, 1.0) / _CACHED_BYTES) / math.log(_PAGED_BYTES / _CACHED_BYTES)
        return self.in_caches * (self.in_memory / self.in_caches) ** min(1.0, max(0.0, share))

    def attention(self, rate: float, power: float, tokens: float, head_dim: int) -> float:
        """Returns FLOP/s of attention in documents of so many tokens; `rate`: with 1,024 tokens and heads of 64."""
        half = self.attention_half
        of_length = (ATTENTION_TOKENS + half) / ATTENTION_TOKENS * tokens / (tokens + half)
        return rate * of_length * min(1.0, head_dim / ATTENTION_HEAD) ** power


def micro_batch_seconds(
    work: Amounts,
    found: CpuRates,
    *,
    rate: float,
    attention: float,
    head_power: float,
    value_bytes: int,
    hidden_size: int,
    tokens: float,
    document_tokens: float,
    is_packed: bool,
    rank: int | None,
    adapted: float,
) -> dict[str, float]:
    """Returns seconds by part, `waiting` for the calls.

    `rate`: FLOP/s of products; `attention` and `head_power`: as `CpuRates.attention` takes them. `rank`: of the
    adapters on a share `adapted` of the linear layers; None: every weight is trained.
    """
    times: defaultdict[str, float] = defaultdict(float)
    # A gate's results are about twice as wide as the hidden states.
    bandwidth = found.bandwidth(2 * tokens * hidden_size * value_bytes)
    for product in work.products:
        one = product.flops / rate + product.values * value_bytes / found.in_caches
        times["matmul"] += product.times * one
        times["recompute"] += product.again * one
    documents = 0.0
    for mixing in work.mixing:
        speed = rate
        if mixing.kind == "attention":
            speed = found.attention(attention, head_power, document_tokens, mixing.width)
            documents += is_packed * mixing.times / 3 * tokens / max(1.0, document_tokens)
        times["attention"] += mixing.times * mixing.flops / speed
        times["recompute"] += mixing.again * mixing.flops / speed
    moved = _PLAIN_PASSES * (work.fused_values + work.op_by_op_values)
    times["elementwise"] = moved * value_bytes / bandwidth
    times["dequantise"] = work.dequantised_bytes / found.in_memory
    if rank is not None:
        passes = _ADAPTER_PASSES * value_bytes / bandwidth
        times["adapters"] = (
            adapted * (work.adapter_values + work.routed_adapter_values) * (6 * rank / (_NARROW * rate) + passes)
        )
        times["adapters"] += work.factor_values * value_bytes / bandwidth
        # Pieces of a weight are read where they lie; their squares are made anew, and read again.
        lengths = 3 * value_bytes / found.bandwidth(LENGTH_BYTES) + 2 * rank / (_NARROW * rate)
        times["adapters"] += work.measured_weights * lengths
    times["head"] = (2 if rank is not None else 3) * work.head.flops / rate
    times["head"] += work.head.rows * work.head.out * found.logit_seconds
    if rank is None:
        times["head"] += _EMBEDDING_PASSES * work.head.weights * value_bytes / found.in_memory
    calls = (
        work.calls + work.dora_calls + adapted * work.adapter_calls + _MICRO_BATCH_CALLS + _DOCUMENT_CALLS * documents
    )
    times["waiting"] = calls * _IN_STEP * found.call_seconds
    return times


def step_seconds(found: CpuRates) -> float:
    """Returns what Python takes of a step beside its micro-batches."""
    return _STEP_CALLS * _IN_STEP * found.call_seconds
