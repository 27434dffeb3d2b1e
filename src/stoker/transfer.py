"""Small tensors that go from the host to a device, which must not wait for them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def int32s(values: Sequence[int], device: torch.device) -> Tensor:
    """Returns [n] int32 on the device.

    To a GPU it is copied from pinned memory: from ordinary memory, the copy would have the host wait for all that the
    GPU still has to do.
    """
    made = torch.tensor(values, dtype=torch.int32)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
