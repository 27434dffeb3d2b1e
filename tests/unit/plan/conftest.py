from collections.abc import Callable

import pytest

from stoker.arch import families
from stoker.arch.spec import ArchSpec
from stoker.config.load import parse
from stoker.config.schema import RunConfig
from stoker.plan.hardware import Device, Hardware

GIB = 2**30


@pytest.fixture
def run() -> Callable[..., RunConfig]:
    """A LoRA run with overrides."""
    values = {
        "model": {"base": "some/model"},
        "adapter": {"rank": 16},
        "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 2048},
        "train": {"learning_rate": 2e-4},
        "output": {"folder": "runs/x"},
    }
    return lambda *overrides: parse(values, overrides)


@pytest.fixture
def llama_1b() -> ArchSpec:
    """Llama 3.2 1B's shape."""
    return families.read(
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
        "config.json",
    )


@pytest.fixture
def llama_8b() -> ArchSpec:
    """Llama 3.1 8B's shape."""
    return families.read(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
        "config.json",
    )


@pytest.fixture
def machine() -> Callable[..., Hardware]:
    """A machine with a CPU and, if its memory is given, a GPU."""

    def build(
        gpu_gib: float = 0.0,
        *,
        bf16: bool = True,
        cpu_gib: float = 64.0,
        capability: tuple[int, int] | None = (9, 0),
        triton: bool = True,
    ) -> Hardware:
        cpu = Device("cpu", "CPU", int(cpu_gib * GIB))
        gpu = Device("cuda", "GPU", int(gpu_gib * GIB), bf16=bf16, compute_capability=capability, triton=triton)
        return Hardware((gpu, cpu) if gpu_gib else (cpu,), num_threads=8)

    return build
