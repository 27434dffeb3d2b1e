"""Next-token prediction on the targets that the data room marked: fine-tuning and continued pre-training alike."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from stoker.kernels.documents import Boundaries
from stoker.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy
from stoker.kernels.load_balance import load_balancing_loss
from stoker.tasks.task import Batch, TaskResult


class CausalModel(Protocol):
    """What the task needs of a model: hidden states, and the head apart, so that logits are never held whole.

    `head_weight` None: only the model's class knows how it makes logits, and the call returns those.
    """

    head_weight: Tensor | None
    head_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def __call__(
        self, input_ids: Tensor, *, document_lengths: tuple[tuple[int, ...], ...] | Boundaries | None
    ) -> Tensor:
        """Returns the last hidden states `[B, T, D]`, after the final norm, or logits `[B, T, V]`."""


class BalancedModel(Protocol):
    """A model that may have mixtures of experts."""

    def balancing(self) -> tuple[list[Tensor], float, int]:
        """Routers' logits of the last training forward, the loss's coefficient, and how many experts a token has."""
        ...


class SupervisedTask(nn.Module):
    """Cross-entropy of `model`'s predictions, summed over the trained tokens of a batch.

    A mixture whose configuration asks for a load-balancing loss has it added in training, not in evaluation.
    `kernels` names the implementation of the loss ("reference" is plain PyTorch).
    """

    def __init__(self, model: nn.Module, *, kernels: str = "reference") -> None:
        super().__init__()
        self.model = model
        self.kernels = kernels
        self._num_trained_rows: int | None = None
        self._documents: Boundaries | None = None

    @contextmanager
    def capturing(self, num_trained: int, ends: Tensor | None = None, longest: int = 0) -> Generator[None]:
        """Within it no size of the work depends on what a batch holds, as a CUDA graph demands.

        `num_trained`: positions that run through the head, no fewer than a batch trains. `ends` int32: where documents
        of packed rows begin and the last one ends, which is read instead of the batch's lengths; none has more than
        `longest` positions (see `kernels.documents.Boundaries`). None: not packed.
        """
        self._num_trained_rows = num_trained
        self._documents = None if ends is None else Boundaries(ends, longest)
        try:
            yield
        finally:
            self._num_trained_rows = self._documents = None

    def forward(self, batch: Batch) -> TaskResult:
        """Returns the loss sum over targets that are not -100 (fp32 scalar)."""
        model = cast("CausalModel", self.model)
        hidden = model(batch.input_ids, document_lengths=self._documents or batch.document_lengths)
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
            num_rows=self._num_trained_rows,
            rounded=getattr(model, "rounded_head", None),
            implementation=self.kernels,
        )
        balancing = self._balancing(batch)
        if balancing is None:
            return TaskResult(loss_sum, batch.num_trained_tokens, {})
        # A mean over rows beside a sum over trained tokens: weighed so that the step's division makes it a mean again.
        balancing = balancing * batch.num_trained_tokens
        return TaskResult(loss_sum + balancing, batch.num_trained_tokens, {"balancing_loss": balancing.detach()})

    def _balancing(self, batch: Batch) -> Tensor | None:
        """A mixture's load-balancing loss times its coefficient, in training; padding does not count."""
        if not (self.training and hasattr(self.model, "balancing")):
            return None
        logits, coefficient, top_k = cast("BalancedModel", self.model).balancing()
        if not logits:
            return None
        rows, length = batch.input_ids.shape
        mask = None
        if batch.num_tokens < rows * length:
            by_row = batch.row_tokens or (batch.num_tokens // rows,) * rows
            tokens = torch.tensor(by_row, device=batch.input_ids.device)
            mask = (torch.arange(length, device=tokens.device) < tokens[:, None]).flatten()
        exchange = getattr(self.model, "exchange", None)
        return coefficient * load_balancing_loss(logits, top_k=top_k, mask=mask, exchange=exchange)
