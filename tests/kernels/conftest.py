"""Kernels run on the GPU where there is one, else on the CPU under Triton's interpreter (see tests/conftest.py)."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton (pip install triton)")

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def draw(device: torch.device) -> Callable[..., Tensor]:
    """Draws normal tensors, each call another, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, scale=1.0: (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device)


def _run(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of `op` and gradients of all inputs, for output gradients that depend on nothing but their shape."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def _outputs(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs alone, of an `op` that autograd does not see and that may write over copies of its inputs."""
    outputs = op(*(x.detach().to(dtype, copy=True) for x in inputs))
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.fixture
def assert_as_exact_as_eager(device: torch.device) -> Callable[..., None]:
    """Three results are compared: the truth in float64, eager in the working dtype, and the kernel.

    The kernel's error in every output and every gradient may exceed eager's by `factor`, plus half a unit in the last
    place of the largest value: both round the same result once. Under the interpreter float32 is cut, not rounded, to
    bfloat16, which makes that a whole unit or two; on a GPU in float32, Triton's exponential and division add some.
    """

    def check(
        kernel: Op,
        reference: Op,
        inputs: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        factor: float = 2.0,
        gradients: bool = True,
    ) -> None:
        run = _run if gradients else _outputs
        truth = run(reference, inputs, torch.float64)
        eager = run(reference, inputs, dtype)
        actual = run(kernel, inputs, dtype)
        units = 0.5
        if device.type == "cpu" and dtype is torch.bfloat16:
            units = 2
        elif device.type == "cuda" and dtype is torch.float32:
            units = 4
        for index, (true, plain, result) in enumerate(zip(truth, eager, actual, strict=True)):
            assert result.dtype == plain.dtype, f"result {index}"
            assert result.shape == plain.shape, f"result {index}"
            if result.numel() == 0:
                continue
            unit = torch.finfo(dtype).eps * true.abs().max().item()
            allowed = factor * (plain.double() - true).abs().max().item() + units * unit
            error = (result.double() - true).abs().max().item()
            assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"

    return check
