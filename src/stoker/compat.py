"""The only place for workarounds of upstream versions: each entry with its link and the condition for its removal."""

from collections.abc import Iterator
from contextlib import contextmanager


def shares_bytes() -> bool:
    """Whether this torch's `fully_shard` takes parameters that are bytes, and gathers them as they are."""
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 13)


@contextmanager
def bytes_may_be_shared() -> Iterator[None]:
    """Lets `fully_shard` take frozen parameters of whole numbers, which cannot have a gradient.

    torch/distributed/fsdp/_fully_shard/_fsdp_param.py of 2.11 makes every part a parameter with a gradient first and
    takes the gradient away in the next line; 2.13 asks the parameter. Where bytes are gathered, `param_dtype` must be
    None before 2.13, which would cast them. To be removed with support for torch before 2.13.
    """
    if shares_bytes():
        yield
        return
    from torch import Tensor, nn
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    class Modules:
        """torch.nn with parameters that have a gradient where they can."""

        def __getattr__(self, name: str) -> object:
            return getattr(nn, name)

        @staticmethod
        def Parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:  # noqa: N802 - torch's name
            return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    _fsdp_param.nn = Modules()  # pyrefly: ignore[bad-assignment]
    try:
        yield
    finally:
        _fsdp_param.nn = nn
