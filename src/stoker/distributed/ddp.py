"""Many devices that each hold the whole model: torch's DistributedDataParallel, which averages gradients over ranks."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stoker.distributed.ranks import Ranks
from stoker.distributed.single import SingleDevice
from stoker.distributed.strategy import StrategyState


class DataParallel(SingleDevice):
    """The `Strategy` of `ranks`, each with the whole model on its `device`; otherwise as `SingleDevice`.

    Gradients are reduced once a step, while the backward of its last micro-batch runs (Li et al. 2020,
    arXiv:2006.15704). Every trained parameter must take part in every forward. `splits_alone`: micro-batches but the
    last run without the other ranks; not where ranks share rows.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device | str = "cpu",
        *,
        precision: str = "fp32",
        on_discard: Sequence[Callable[[], None]] = (),
        splits_alone: bool = True,
    ) -> None:
        super().__init__(device, precision=precision, on_discard=on_discard, ranks=ranks)
        self._splits_alone = splits_alone

    def _place(self, task: nn.Module) -> nn.Module:
        super()._place(task)
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        # Every rank has read the same weights; what was drawn at random is taken from the first.
        with torch.no_grad():
            for parameter in trained:
                dist.broadcast(parameter, 0)
        self._replica: Any = task
        if trained:  # Otherwise it can only evaluate.
            with warnings.catch_warnings():
                # Newer versions have another name for it, with which buffers are still sent once.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self._replica = DistributedDataParallel(
                    task, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        return self._replica

    @property
    def splits_alone(self) -> bool:
        """Whether only the last micro-batch of a step waits for the others."""
        return self._splits_alone

    def reduce_gradients(self) -> None:
        """Averages gradients over ranks one by one, as the last backward would have done by the bucket."""
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad.div_(self.world_size))

    def shared_state(self) -> StrategyState:
        """Returns the state, which every rank has: each writes some of it."""
        return self.state()

    def _reducing(self, *, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext() if is_last else self._replica.no_sync()
