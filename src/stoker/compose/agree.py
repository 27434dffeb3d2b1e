"""What the processes of a run must agree on before it begins, and what ends them all when one hangs."""

import hashlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.compose.data import Data
from stoker.compose.run_folder import RunFolder
from stoker.errors import TrainingError
from stoker.plan.hardware import Device, Hardware

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoker.distributed.ranks import Ranks

_SAMPLED_DOCUMENTS = 64
_SEEN_SECONDS = 60.0
"""How long a shared file system may take to show a new file: NFS keeps what it knows of a folder for so long."""
_DRIVER = Path("/proc/driver/nvidia/version")


def require_same_data(ranks: "Ranks", data: Data, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Waits until every process has its data, then refuses to begin where it differs; raises TrainingError.

    Each process prepares or reads it by itself, for as long as that takes: none waits for another in a collective.
    """
    if ranks.world_size == 1:
        return
    ranks.wait_for_all("prepared")
    ranks.require_same(facts_of_data(data, tokenizer))


def facts_of_data(data: Data, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Returns what tells two preparations apart: counts, hashes of all lengths and of the ids of some documents."""
    from stoker.data.cache import tokenizer_fingerprint

    facts: dict[str, Any] = {"the tokenizer (its hash)": tokenizer_fingerprint(tokenizer)[:12]}
    for split, documents in (("train", data.train), ("validation", data.validation)):
        if documents is None:
            continue
        lengths, trained = documents.lengths, documents.trained_counts
        sampled = np.linspace(0, len(documents) - 1, min(len(documents), _SAMPLED_DOCUMENTS)).astype(int)
        content = [array.tobytes() for index in sampled.tolist() for array in documents.document(index)]
        facts |= {
            f"data.{split}: the number of documents": len(documents),
            f"data.{split}: the number of tokens": int(lengths.sum()),
            f"data.{split}: the number of trained tokens": int(trained.sum()),
            f"data.{split}: its content (a hash)": _hash(lengths.tobytes(), trained.tobytes(), *content),
        }
    return facts


def _hash(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]


def require_shared_folder(ranks: "Ranks", folder: RunFolder) -> None:
    """Refuses to begin where a process does not see what the first one has written; every rank must call it.

    Raises:
        TrainingError: it names the ranks and their machines.
    """
    written = ranks.share(lambda: _hash(folder.config.read_bytes()) if ranks.world_size > 1 else "")
    if ranks.world_size == 1:
        return
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := _sees(folder, written)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [
        f"{rank} ({host})" for rank, (host, sees) in enumerate(ranks.gather((socket.gethostname(), seen))) if not sees
    ]
    if blind:
        raise TrainingError(
            f"output.folder {folder.path} is not the same folder on every machine: what rank 0 has written is not "
            f"there for rank {', '.join(blind)}.",
            fix="Put it into a file system that all machines share: they read each other's checkpoints.",
        )


def _sees(folder: RunFolder, written: str) -> bool:
    try:
        return _hash(folder.config.read_bytes()) == written
    except OSError:
        return False


def smallest(ranks: "Ranks", hardware: Hardware) -> Hardware:
    """Returns the hardware that the plan is for: of the process with the oldest device, or the least memory."""

    def key(one: Hardware) -> tuple[tuple[int, int], int]:
        device = one.devices[0]
        return device.compute_capability or (0, 0), device.memory_bytes

    return min(ranks.gather(hardware), key=key)


def device_warnings(ranks: "Ranks", hardware: Hardware) -> list[str]:
    """Returns a sentence for each thing in which the processes' GPUs differ."""
    gpu = hardware.first("cuda")
    return different(ranks.gather(_gpu_facts(gpu) if gpu is not None else {}))


def different(found: list[dict[str, str]]) -> list[str]:
    """Returns a sentence for each fact that ranks differ in; `found` has those of each rank, and its host."""
    sentences = []
    for name in [name for name in found[0] if name != "host"]:
        first = found[0][name]
        rank = next((rank for rank, facts in enumerate(found) if facts.get(name) != first), None)
        if rank is not None:
            other = found[rank].get(name, "none")
            sentences.append(
                f"The processes' GPUs differ in {name}: rank 0 ({found[0]['host']}) has {first}, rank {rank} "
                f"({found[rank].get('host', 'no GPU')}) has {other}. Every step waits for the slowest, and the plan "
                "is for the smallest."
            )
    return sentences


def _gpu_facts(gpu: Device) -> dict[str, str]:
    import torch

    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {
        "host": socket.gethostname(),
        "type": gpu.name,
        "memory": f"{memory / 2**30:.0f} GiB",
        "driver": _driver_version(),
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none",
    }


def _driver_version() -> str:
    """Returns the version of NVIDIA's kernel module, "unknown" where the system does not say it."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]+)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


@contextmanager
def watched(ranks: "Ranks", folder: RunFolder, timeout_seconds: float) -> Iterator[Callable[[str, int], None]]:
    """Within it a process that hangs ends them all; yields what is told the phase that begins, and the steps done."""
    if ranks.world_size == 1 or ranks.store is None:
        yield lambda phase, finished: None
        return
    from torch.distributed import PrefixStore

    from stoker.compose.launch import fail
    from stoker.distributed.watchdog import Watchdog

    with Watchdog(
        PrefixStore("watch", ranks.store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout_seconds=timeout_seconds,
        folder=folder.hang,
        fail=fail,
    ) as watchdog:
        yield watchdog.at
