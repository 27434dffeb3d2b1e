"""Makes the model of a cell unless it is there: `make_model.py SHAPE OUTPUT [FOLDER]` writes its folder into OUTPUT."""

import sys
from pathlib import Path

import torch

from stoker.compose.bench import shapes


def main(shape: str, output: str, folder: str | None = None) -> None:
    """Makes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = shapes.resolve(shapes.PREFIX + shape, device=device, folder=None if folder is None else Path(folder))
    Path(output).write_text(str(made.resolve()))


if __name__ == "__main__":
    main(*sys.argv[1:])
