"""Mixtures of experts: a router that chooses for each token, and experts that run on what they are given."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stoker.kernels.mixture import ExpertMatrix, MixtureOptions, mixture
from stoker.kernels.routing import choose
from stoker.nn.feed_forward import GatedFeedForward

_SMALLEST_SUM = 1e-20


class ExpertLinear(nn.Module):
    """The linear layers of all experts as one weight `[num_experts, out_features, in_features]`.

    `name` is that of the Hugging Face parameter that holds them in memory ("model.layers.0.mlp.experts.down_proj"):
    adapters speak it. `is_interleaved`: there, rows of gate and up alternate; here gate comes first. It computes within
    `Experts` alone.
    """

    product_weights = ("weight",)
    """As `FusedLinear` has it."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        name: str,
        bias: bool = False,
        is_interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self.is_interleaved = is_interleaved
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def matrix(self) -> ExpertMatrix:
        """What the mixture's kernel computes with."""
        return ExpertMatrix(self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shows the sizes."""
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), bias={self.bias is not None}"


class FrozenExpertLinear(ExpertLinear):
    """An `ExpertLinear` whose weight is never trained and is stored as `matrix` (see the quant room).

    `matrix` is a module with `dense` and `dequantize`; `weight` dequantises all of it at every access.
    """

    def __init__(self, layer: ExpertLinear, matrix: nn.Module) -> None:
        nn.Module.__init__(self)  # the other would make the weight that this layer is there to avoid
        self.num_experts = layer.num_experts
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.name = layer.name
        self.is_interleaved = layer.is_interleaved
        self.source_dtype = layer.weight.dtype
        self.bias = layer.bias
        self.stored = matrix

    @property
    def weight(self) -> Tensor:  # pyrefly: ignore[bad-override]
        """The dequantised weight, a new tensor in the dtype that it had before."""
        stored: Any = self.stored
        return stored.dequantize(dtype=self.source_dtype)

    @property
    def device(self) -> torch.device:
        """Where the stored weight is."""
        return next(self.stored.buffers()).device

    def matrix(self) -> ExpertMatrix:
        """What the mixture's kernel computes with."""
        stored: Any = self.stored
        return ExpertMatrix(stored, self.bias)


def interleave(tensor: Tensor) -> Tensor:
    """Returns `[E, 2 I, ...]` with gate's and up's rows in turn, as gpt-oss stores them, from gate before up."""
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


class Routing(NamedTuple):
    """`logits` [N, E] in fp32, and of the chosen experts `weights` [N, k] in fp32 and `chosen` [N, k], integers."""

    logits: Tensor
    weights: Tensor
    chosen: Tensor


class Router(nn.Module):
    """Chooses `top_k` of `num_experts` for each token, in fp32; the options are those of `RouterSpec`."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        score: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax",
        normalized: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        chosen_groups: int = 1,
        group_top: int = 1,
        correction: bool = False,
        bias: bool = False,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.top_k = top_k
        self.score = score
        self.normalized = normalized
        self.scale = scale
        self.groups = groups
        self.chosen_groups = chosen_groups
        self.group_top = group_top
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        # Only compared with, so it has no gradient; Transformers keeps it in fp32 too.
        self.correction = nn.Parameter(torch.zeros(num_experts), requires_grad=False) if correction else None

    @property
    def keeps_float32(self) -> tuple[str, ...]:
        """Parameters that stay in fp32, whatever the model's dtype."""
        return () if self.correction is None else ("correction",)

    @property
    def is_plain(self) -> bool:
        """Whether the largest logits are chosen and weighed by a softmax, which one kernel does."""
        return self.score != "sigmoid" and self.groups == 1 and self.correction is None

    def reset_parameters(self) -> None:
        """Makes the correction zero."""
        if self.correction is not None:
            nn.init.zeros_(self.correction)

    def forward(self, x: Tensor) -> Routing:
        """x [N, D], any float dtype."""
        with torch.autocast(x.device.type, enabled=False):
            logits = _RouterLogits.apply(x, self.weight)
            if self.bias is not None:
                logits = logits + self.bias
            if self.kernels == "triton" and self.is_plain:
                normalized = self.normalized or self.score == "softmax_of_chosen"
                options = {"normalized": normalized, "scale": self.scale, "implementation": self.kernels}
                return Routing(logits, *choose(logits, self.top_k, **options))
            if self.score == "softmax_of_chosen":
                top, chosen = torch.topk(logits, self.top_k, dim=-1)
                return Routing(logits, torch.softmax(top, dim=-1) * self.scale, chosen)
            scores = torch.sigmoid(logits) if self.score == "sigmoid" else torch.softmax(logits, dim=-1)
            chosen = torch.topk(self._comparable(scores.detach()), self.top_k, dim=-1).indices
            weights = scores.gather(1, chosen)
            if self.normalized:
                weights = weights / (weights.sum(-1, keepdim=True) + _SMALLEST_SUM)
            return Routing(logits, weights * self.scale if self.scale != 1.0 else weights, chosen)

    def _comparable(self, scores: Tensor) -> Tensor:
        """What the choice compares: corrected, and nothing from groups that are not among the best."""
        if self.correction is not None:
            scores = scores + self.correction
        if self.groups == 1:
            return scores
        grouped = scores.view(scores.shape[0], self.groups, -1)
        of_group = grouped.topk(self.group_top, dim=-1).values.sum(-1)
        best = torch.topk(of_group, self.chosen_groups, dim=-1).indices
        is_best = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~is_best[..., None], float("-inf")).view_as(scores)

    def extra_repr(self) -> str:
        """Shows sizes and kind."""
        return f"{self.weight.shape[1]} -> top {self.top_k} of {self.weight.shape[0]}, {self.score}"


class _RouterLogits(torch.autograd.Function):
    """x Wᵀ summed and kept in fp32: products of two 16-bit values are exact, so neither has to be widened on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        if x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return x.to(wide) @ weight.to(wide).t()

    @staticmethod
    @once_differentiable
    # The decorator's type hides the name of `ctx`.
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        narrow = grads[0].to(x.dtype)
        grad_x = narrow @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (narrow.t() @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class Experts(nn.Module):
    """A mixture of experts as a feed-forward: each token's chosen experts, weighed, and one that every token has.

    `names` are those of the Hugging Face parameters or modules, by ours: "experts.gate_up" and "experts.down" (one
    each), "shared.gate_up" (gate and up) and "shared.down". `shared_size`: inner width of the shared expert (0: none),
    `shared_gate`: weighed by a sigmoid of its own. `limit`: gpt-oss' clamped gate. `auxiliary_loss`: the coefficient of
    a load-balancing loss; with one, `collects_router_logits`: those of the last training forward, [N, E], stay in
    `router_logits`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        intermediate_size: int,
        router: Router,
        names: Mapping[str, tuple[str, ...]],
        bias: bool = False,
        limit: float | None = None,
        is_interleaved: bool = False,
        shared_size: int = 0,
        shared_gate: bool = False,
        auxiliary_loss: float = 0.0,
        kernels: str = "reference",
    ) -> None:
        super().__init__()
        self.options = MixtureOptions(num_experts, limit, kernels)
        self.router = router
        inner, name = intermediate_size, names["experts.gate_up"][0]
        gate_up = ExpertLinear(num_experts, hidden_size, 2 * inner, name=name, bias=bias, is_interleaved=is_interleaved)
        down = ExpertLinear(num_experts, inner, hidden_size, name=names["experts.down"][0], bias=bias)
        self.experts = nn.ModuleDict({"gate_up": gate_up, "down": down})
        self.shared = None
        if shared_size:
            self.shared = GatedFeedForward(
                hidden_size,
                intermediate_size=shared_size,
                gate_up_names=names["shared.gate_up"],
                down_names=names["shared.down"],
                kernels=kernels,
            )
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if shared_gate else None
        self.auxiliary_loss = auxiliary_loss
        self.collects_router_logits = auxiliary_loss > 0.0
        self.router_logits: Tensor | None = None

    @property
    def keeps_little(self) -> bool:
        """Whether its forward keeps its input and what is tiny, and its backward makes the rest again by itself."""
        return self.shared is None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        self.router_logits = routing.logits if self.collects_router_logits and self.training else None
        gate_up, down = (cast("ExpertLinear", self.experts[name]).matrix() for name in ("gate_up", "down"))
        out = mixture(flat, routing.weights, routing.chosen, gate_up, down, options=self.options)
        if self.shared is not None:
            shared = self.shared(flat)
            out = out + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(flat)) * shared)
        return out.view(x.shape)
