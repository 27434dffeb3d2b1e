"""LoRA on the experts of a mixture: an A and a B for each expert, never a dense update.

PEFT keeps these adapters on the 3-D parameters of Transformers 5 (`target_parameters` of its LoraConfig), and this is
its representation: gate and up of an expert are one matrix with one A. There is no dropout and no DoRA there.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stoker.adapters.settings import LoraSettings
from stoker.kernels.mixture import ExpertMatrix
from stoker.nn.moe import ExpertLinear, interleave

__all__ = ["ExpertLinear", "LoraExperts", "expert_layers", "interleave", "lora_experts"]


class LoraExperts(nn.Module):
    """A frozen `ExpertLinear` with a trained low-rank update of each expert.

    `lora_a` `[E, rank, in]` and `lora_b` `[E, out, rank]` are fp32; the update of expert e is `scaling * B[e] @ A[e]`.
    """

    def __init__(
        self,
        base: ExpertLinear,
        *,
        settings: LoraSettings,
        generator: torch.Generator,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.settings = settings
        # PEFT's linear layer for all A at once has `in` inputs, and so has its bound; drawn on the CPU.
        bound = 1 / math.sqrt(base.in_features)
        shape = (base.num_experts, settings.rank, base.in_features)
        a = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.num_experts, base.out_features, settings.rank, device=device))

    @property
    def name(self) -> str:
        """The Hugging Face parameter that is adapted."""
        return self.base.name

    def matrix(self) -> ExpertMatrix:
        """What the mixture's kernel computes with."""
        base = self.base.matrix()
        return base._replace(a=self.lora_a, b=self.lora_b, scaling=self.settings.scaling)

    def delta(self, expert: int) -> Tensor:
        """The update `[out, in]` of one expert, fp32."""
        return self.settings.scaling * (self.lora_b[expert] @ self.lora_a[expert])


def lora_experts(model: nn.Module) -> Iterator[LoraExperts]:
    """Yields the model's `LoraExperts`, in the order of its modules."""
    return (module for module in model.modules() if isinstance(module, LoraExperts))


def expert_layers(model: nn.Module) -> Iterator[ExpertLinear]:
    """Yields the linear layers of experts that have or can have an adapter, in the order of the model's modules."""
    return (module for module in model.modules() if isinstance(module, ExpertLinear))
