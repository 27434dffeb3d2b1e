"""One layer of a decoder: a mixer and a feed-forward, with their norms placed in one of five ways."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from stoker.nn.norm import Norm
from stoker.nn.rotary import Documents

# PyTorch's ways to attend; a result of theirs is [B, T, H, E], and costs T / 2 times as much to make as a read of it.
_ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


@lru_cache(maxsize=1)
def _attention_ops() -> list[Any]:
    return [getattr(torch.ops.aten, name).default for name in _ATTENTION if hasattr(torch.ops.aten, name)]


@contextmanager
def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Within it nothing keeps `tensor` (or a view of all of it) for the backward: `make()` gives its values there."""
    place, dtype, count = tensor.data_ptr(), tensor.dtype, tensor.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_it = saved.data_ptr() == place and saved.dtype == dtype and saved.numel() == count
        # Detached: an operation's output, as it is, would hold the graph that saves it.
        return saved.shape if is_it and saved.is_contiguous() else saved.detach()

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make().view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Block(nn.Module):
    """Mixer, then feed-forward, each added to its input and each given the norm of it (pre-norm).

    One of the two may be None. The mixer is registered as `mixer_name`; `norms` are named after the part that they
    belong to, "attention_norm" before and "attention_post_norm" after it. `residual_scale` multiplies what is added.
    `recompute`: the decoder drops what the block saved for backward and runs it again there; all but attention itself
    with `keep_attention`, whose result is kept.
    """

    def __init__(
        self,
        mixer: nn.Module | None,
        feed_forward: nn.Module | None,
        *,
        mixer_name: str = "attention",
        residual_scale: float = 1.0,
        **norms: Norm,
    ) -> None:
        super().__init__()
        self.mixer_name = mixer_name
        # In the order in which a model's parameters are drawn and stored: each part after its first norm.
        for part, module in ((mixer_name, mixer), ("feed_forward", feed_forward)):
            if f"{part}_norm" in norms:
                self.add_module(f"{part}_norm", norms[f"{part}_norm"])
            if module is not None:
                self.add_module(part, module)
            if f"{part}_post_norm" in norms:
                self.add_module(f"{part}_post_norm", norms[f"{part}_post_norm"])
        self.has_feed_forward = feed_forward is not None
        self.residual_scale = residual_scale
        self.recompute = False
        self.keep_attention = False

    @property
    def mixing(self) -> Any:
        """The mixer under whatever name, or None."""
        return self._modules.get(self.mixer_name)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        document_lengths: Documents | None = None,
        cache: Any = None,
        cache_length: int = 0,
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; the other arguments are those of the mixer, as in `Attention.forward`."""
        context = {"document_lengths": document_lengths, "cache": cache, "cache_length": cache_length}
        if self.mixing is None:
            return x + self._scaled(self._part("feed_forward")(self._norm("feed_forward_norm")(x)))
        if not self.has_feed_forward:
            return x + self._scaled(self.mixing(self._norm(f"{self.mixer_name}_norm")(x), cos, sin, **context))
        normed, x = self._norm("feed_forward_norm").add(self._scaled(self._mixed(x, cos, sin, **context)), x)
        return x + self._scaled(self._part("feed_forward")(normed))

    def recomputed(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, **context: Any) -> Tensor:
        """The forward, of which the backward runs again what is not kept (Chen et al. 2016, arXiv:1604.06174).

        That is all of it, but for a feed-forward that keeps little of its own accord, as a mixture of experts does: of
        that the backward would otherwise run even what it does not need. Nor is the mixer's output projection run again
        where what goes into it is kept.
        """
        # The state of random numbers cannot be read while a graph is captured; what is captured draws none.
        is_captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        context["preserve_rng_state"] = not is_captured
        if self.keep_attention:
            context["context_fn"] = partial(create_selective_checkpoint_contexts, _attention_ops())
        feed_forward = self._modules.get("feed_forward")
        if type(self) is not Block or self.mixing is None or not getattr(feed_forward, "keeps_little", False):
            return checkpoint(self, x, cos, sin, use_reentrant=False, **context)
        if self.keep_attention and hasattr(self.mixing, "attended"):
            mixed = self.mixing.out(checkpoint(self._attended, x, cos, sin, use_reentrant=False, **context))
        else:
            mixed = checkpoint(self._mixed, x, cos, sin, use_reentrant=False, **context)
        norm = self._norm("feed_forward_norm")
        normed, x = norm.add(self._scaled(mixed), x)
        with _made_again(normed, partial(norm, x.detach())):
            output = self._part("feed_forward")(normed)
        return x + self._scaled(output)

    def _mixed(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, **context: Any) -> Tensor:
        """The mixer's output."""
        return self.mixing(self._norm(f"{self.mixer_name}_norm")(x), cos, sin, **context)

    def _attended(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, **context: Any) -> Tensor:
        """What goes into the mixer's output projection."""
        return self.mixing.attended(self._norm(f"{self.mixer_name}_norm")(x), cos, sin, **context)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def _norm(self, name: str) -> Norm:
        return cast("Norm", self._modules[name])

    def _part(self, name: str) -> nn.Module:
        return cast("nn.Module", self._modules[name])


class PostNormBlock(Block):
    """Mixer, then feed-forward, each given its plain input, whose norm is added: x + n(m(x)), then x + n(f(x))."""

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, **context: Any) -> Tensor:
        """The arguments and the result are those of `Block.forward`."""
        if self.mixing is not None:
            x = x + self._scaled(self._norm(f"{self.mixer_name}_post_norm")(self.mixing(x, cos, sin, **context)))
        if self.has_feed_forward:
            x = x + self._scaled(self._norm("feed_forward_post_norm")(self._part("feed_forward")(x)))
        return x


class SandwichBlock(Block):
    """Norms before and after each part: x + n(m(n(x))), then x + n(f(n(x)))."""

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, **context: Any) -> Tensor:
        """The arguments and the result are those of `Block.forward`."""
        name = self.mixer_name
        if self.mixing is not None:
            mixed = self.mixing(self._norm(f"{name}_norm")(x), cos, sin, **context)
            mixed = self._scaled(self._norm(f"{name}_post_norm")(mixed))
            if not self.has_feed_forward:
                return x + mixed
            normed, x = self._norm("feed_forward_norm").add(mixed, x)
        else:
            normed = self._norm("feed_forward_norm")(x)
        output = self._part("feed_forward")(normed)
        return x + self._scaled(self._norm("feed_forward_post_norm")(output))


class ParallelBlock(Block):
    """Both parts read norms of the block's input: x + m(n(x)) + f(n'(x)); without a norm of its own, f reads n(x)."""

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, **context: Any) -> Tensor:
        """The arguments and the result are those of `Block.forward`."""
        normed = self._norm(f"{self.mixer_name}_norm")(x)
        mixed = self.mixing(normed, cos, sin, **context)
        if "feed_forward_norm" in self._modules:
            normed = self._norm("feed_forward_norm")(x)
        return x + self._scaled(mixed + self._part("feed_forward")(normed))


PLACEMENTS: dict[str, type[Block]] = {
    "pre": Block,
    "post": PostNormBlock,
    "sandwich": SandwichBlock,
    "parallel": ParallelBlock,
    "parallel_one_norm": ParallelBlock,
}
"""The block of each placement of a layer's spec."""
