"""The step of AdamW with averages in 8 bits, beside bitsandbytes' and torch's fused fp32 one, on a CUDA GPU.

    python -m benchmarks.eight_bit -o benchmarks/results/eight_bit.json

Before a time is printed, twenty steps from the same gradients must leave the three with weights that are near one
another. Weights are as wide as a multiple of 256, so that blocks are the same values here and there.
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stoker.compose.updates import eight_bit
from stoker.optim.eight_bit import EightBitAdamW

SHAPES = {"qkv of an 8B": (6144, 4096), "gate and up of an 8B": (28672, 4096), "A of rank 16": (16, 4096)}
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
# Rounding turns a step of 0.001 by some percent, up and down, and bitsandbytes lets small square averages become zero.
_MAX_RMS = 2e-3


def optimizers() -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    """The three, by name."""
    import bitsandbytes

    return {
        "stoker": lambda held: EightBitAdamW([{"params": held}], kept=eight_bit("triton"), **OPTIONS),
        "bitsandbytes": lambda held: bitsandbytes.optim.AdamW8bit(held, weight_decay=0.0, **OPTIONS),
        "torch, fp32": lambda held: torch.optim.AdamW(held, weight_decay=0.0, fused=True, **OPTIONS),
    }


def stepped(make: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], *, steps: int = 20) -> torch.Tensor:
    """Returns the weights after some steps from zero."""
    parameter = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
    optimizer = make([parameter])
    generator = torch.Generator("cuda").manual_seed(0)
    mean = torch.randn(shape, device="cuda", generator=generator)
    for _ in range(steps):
        parameter.grad = mean + torch.randn(shape, device="cuda", generator=generator)
        optimizer.step()
    return parameter.detach()


def milliseconds(make: Callable[..., torch.optim.Optimizer], shape: tuple[int, int], *, repeats: int = 50) -> float:
    """Returns the median time of a step over one weight, by the device's clock."""
    parameter = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
    parameter.grad = torch.randn_like(parameter)
    optimizer, times = make([parameter]), []
    for index in range(repeats + 10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        optimizer.step()
        end.record()
        end.synchronize()
        if index >= 10:
            times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def main() -> None:
    """Compares, then measures each shape, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    output = parser.parse_args().output
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    rows = []
    for name, shape in SHAPES.items():
        made = optimizers()
        exact = stepped(made["torch, fp32"], shape)
        for kind, make in made.items():
            error = (stepped(make, shape) - exact).square().mean().sqrt().item()
            if error > _MAX_RMS:
                raise SystemExit(f"{kind} on {name}: weights differ by {error:.2e} from AdamW's in fp32")
            row = {"weight": name, "shape": shape, "optimizer": kind, "rms_from_fp32": error}
            row["milliseconds"] = milliseconds(make, shape)
            rows.append(row)
            print(row)
    found = {"device": torch.cuda.get_device_name(), "commit": commit.stdout.strip(), "rows": rows}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
