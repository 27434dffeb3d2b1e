"""Holds the logits of a merged model against those of base and adapter."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stoker.adapters.lora import Awaited
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError
from stoker.export import adapter
from stoker.export.streamed import Progress, no_progress
from stoker.models.on_demand import OnDemandModel, open_on_demand

# Largest allowed difference of a logit, as a share of the largest one. fp32: sums in another order. bf16 and fp16
# round a merged weight by up to 2^-9 and 2^-12 of itself; over tens of layers such errors add up to many times that.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Below this share of the largest logit, an adapter's effect is the noise of fp32 arithmetic: there is nothing to lose.
_NOISE = 1e-5
_NUM_ROWS, _NUM_TOKENS = 2, 32


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote and how near its answers are to those of base and adapter, on rows of random tokens.

    `num_layers` of Hugging Face's linear layers changed; `dtype` is that of the written weights. `max_difference` is
    the largest difference of a logit between the written model and base with adapter, `tolerance` what was allowed, and
    `adapter_effect` the largest difference that the adapter makes to the base; all computed in fp32.
    """

    folder: Path
    num_layers: int
    dtype: torch.dtype
    max_difference: float
    tolerance: float
    adapter_effect: float


@dataclass(frozen=True)
class Differences:
    """Of logits, on rows of random tokens: the `largest` of base with adapter, how far the adapter moves those of the
    base (`effect`), and how far the written model's are from those of base with adapter (`difference`)."""

    largest: float
    effect: float
    difference: float

    def tolerance(self, dtype: torch.dtype) -> float:
        """The difference that rounding to `dtype` may make."""
        return TOLERANCES[dtype] * self.largest

    def judge(self, dtype: torch.dtype, *, out: Path, num_layers: int) -> MergeReport:
        """Returns the report if rounding to `dtype` left the adapter's answers recognisable; else raises ModelError."""
        lost = self.effect > _NOISE * self.largest and self.difference > self.effect / 2
        if lost or not self.difference <= self.tolerance(dtype):
            name = str(dtype).removeprefix("torch.")
            raise ModelError(
                f"rounding to {name} changes logits by up to {self.difference:.4g}: allowed are "
                f"{self.tolerance(dtype):.4g}, and half of the {self.effect:.4g} by which the adapter changes them. "
                "The merged model was not kept.",
                where=str(out),
                fix="Merge in float32 (--dtype fp32).",
            )
        return MergeReport(out, num_layers, dtype, self.difference, self.tolerance(dtype), self.effect)


def random_tokens(vocab_size: int, max_positions: int) -> Tensor:
    """Returns the rows of tokens, the same in every run: [rows, tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_NUM_ROWS, min(_NUM_TOKENS, max_positions)), generator=generator)


@torch.no_grad()
def compare(
    base: Path, adapter_folder: Path, written: Path, spec: ArchSpec, *, progress: Progress = no_progress
) -> Differences:
    """Returns how the logits of the native model `written` differ from those of `base` with the adapter.

    Both are computed in fp32, layer by layer, from weights that are read as the forward needs them, the base's twice;
    memory holds one of them, and the adapter.
    """
    tokens = random_tokens(spec.vocab_size, spec.max_positions)
    with ExitStack() as stack:
        original, merged = open_on_demand(base, spec, stack), open_on_demand(written, spec, stack)
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            progress("checking logits", done, 3 * len(spec.layers))

        for block in (*original.decoder.blocks, *merged.decoder.blocks):
            block.register_forward_hook(count)
        plain = original.decoder(tokens)
        adapter.load(original.decoder, adapter_folder, awaited=Awaited("cpu"))
        adapted = original.decoder.eval()(tokens)
        return _differences((original, merged), plain, adapted, merged.decoder(tokens))


def _differences(
    models: tuple[OnDemandModel, OnDemandModel], plain: Tensor, adapted: Tensor, made: Tensor
) -> Differences:
    """Of the logits of final hidden states, a range of the vocabulary at a time."""
    original, merged = models
    largest, effect, difference = torch.zeros(3).unbind()
    for start, stop in original.vocabulary_ranges:
        first, second = original.logits(torch.cat((plain, adapted)), start, stop).chunk(2)
        largest = torch.maximum(largest, second.abs().max())  # as tensors: a NaN stays one
        effect = torch.maximum(effect, (second - first).abs().max())
        difference = torch.maximum(difference, (merged.logits(made, start, stop) - second).abs().max())
    return Differences(largest.item(), effect.item(), difference.item())
