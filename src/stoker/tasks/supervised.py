"""Next-token prediction on the targets that the data room marked: fine-tuning and continued pre-training alike."""

from typing import Protocol, cast

from torch import Tensor, nn

from stoker.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from stoker.tasks.task import Batch, TaskResult


class CausalModel(Protocol):
    """What the task needs of a model: hidden states, and the head apart, so that logits are never held whole.

    `head_weight` None: only the model's class knows how it makes logits, and the call returns those.
    """

    head_weight: Tensor | None
    head_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def __call__(self, input_ids: Tensor, *, document_lengths: tuple[tuple[int, ...], ...] | None) -> Tensor:
        """Returns the last hidden states `[B, T, D]`, after the final norm, or logits `[B, T, V]`."""


class SupervisedTask(nn.Module):
    """Cross-entropy of `model`'s predictions, summed over the trained tokens of a batch.

    `kernels` names the implementation of the loss ("reference" is plain PyTorch).
    """

    def __init__(self, model: nn.Module, *, kernels: str = "reference") -> None:
        super().__init__()
        self.model = model
        self.kernels = kernels

    def forward(self, batch: Batch) -> TaskResult:
        """Returns the loss sum over targets that are not -100 (fp32 scalar)."""
        model = cast("CausalModel", self.model)
        hidden = model(batch.input_ids, document_lengths=batch.document_lengths)
        targets = batch.targets.flatten()
        if model.head_weight is None:
            loss_sum = nn.functional.cross_entropy(hidden.flatten(0, 1).float(), targets, reduction="sum")
            return TaskResult(loss_sum, batch.num_trained_tokens, {})
        loss_sum = linear_cross_entropy(
            hidden.flatten(0, 1),
            model.head_weight,
            targets,
            bias=model.head_bias,
            options=LossOptions(logit_scale=model.logit_scale, soft_cap=model.logit_softcap),
            implementation=self.kernels,
        )
        return TaskResult(loss_sum, batch.num_trained_tokens, {})
