"""The state of every random-number generator that a step may draw from: Python's, NumPy's, torch's on its device."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the states as named uint8 tensors (torch) and JSON values (Python and NumPy)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        # A process draws on one GPU; asking the others would take memory there.
        tensors[f"cuda:{torch.cuda.current_device()}"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Puts back what `state` returned; states of other devices are passed over."""
    torch.set_rng_state(tensors["cpu"])
    for name, value in tensors.items():
        kind, _, index = name.partition(":")
        if kind == "cuda" and torch.cuda.is_available() and int(index) == torch.cuda.current_device():
            torch.cuda.set_rng_state(value)
        elif kind == "mps" and torch.backends.mps.is_available():
            torch.mps.set_rng_state(value)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
