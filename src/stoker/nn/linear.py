"""Linear layers that share an input, kept as one weight."""

import torch
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """Hugging Face's linear layers of one input as one weight `[sum(out_features), in_features]`, so one matmul.

    `names` are the full Hugging Face module names of the parts, in row order (for example the `q_proj`, `k_proj` and
    `v_proj` of a layer); adapters, checkpoints and PEFT folders speak those names. An ordinary linear has one part.
    `by_name_only`: it has an adapter only where targets name it, not by "all-linear".
    """

    product_weights = ("weight",)
    """Parameters that are read by matrix products alone, in their dtype (`distributed.fsdp2`)."""

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        *,
        names: tuple[str, ...],
        bias: bool = False,
        by_name_only: bool = False,
    ) -> None:
        super().__init__()
        if len(out_features) != len(names):
            raise ValueError(f"{len(out_features)} parts but {len(names)} names: {names}")
        self.in_features = in_features
        self.out_features = out_features
        self.names = names
        self.by_name_only = by_name_only
        self.weight = nn.Parameter(torch.empty(sum(out_features), in_features))
        self.bias = nn.Parameter(torch.zeros(sum(out_features))) if bias else None

    @property
    def slices(self) -> tuple[slice, ...]:
        """Rows of `weight` (and of the output's last dimension) that belong to each part."""
        ends = [sum(self.out_features[: index + 1]) for index in range(len(self.out_features))]
        return tuple(slice(end - size, end) for end, size in zip(ends, self.out_features, strict=True))

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x @ weight.T + bias`: `[..., in_features]` to `[..., sum(out_features)]`, parts side by side."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shows the short names of the parts."""
        short = ", ".join(name.rsplit(".", 1)[-1] for name in self.names)
        return f"{self.in_features} -> {self.out_features} ({short}), bias={self.bias is not None}"
