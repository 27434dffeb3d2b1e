"""Models of well-known shapes with random weights, for measuring: `shape:llama-3.1-8b` needs no download.

Written once as a Hugging Face folder, drawn on the device, so that every trainer loads the same weights the usual way.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.arch import arithmetic, families
from stoker.arch.spec import ArchSpec
from stoker.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PREFIX = "shape:"
_FORMAT = 1
"""Raised when the code below changes what it writes, so that folders made before are made again."""
_DEVIATION = 0.02

_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": _DEVIATION,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.2-1b": _LLAMA_8B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-tiny": _LLAMA_8B
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
"""Name -> config.json, in the sizes of the published models (without rope scaling, which costs nothing in a step)."""


def is_shape(name: str) -> bool:
    """Whether `model.base` names a shape."""
    return name.startswith(PREFIX)


def resolve(name: str, *, device: "torch.device | str", folder: Path | None = None) -> Path:
    """Returns the folder of the model `shape:...`, in `folder` (by default the user's cache), made unless it is there.

    Raises:
        ModelError: there is no such shape, or its folder cannot be written.
    """
    short = name.removeprefix(PREFIX)
    if short not in SHAPES:
        known = ", ".join(PREFIX + shape for shape in SHAPES)
        raise ModelError(f"There is no shape {name!r}.", fix=f"Known: {known}.")
    parent = Path.home() / ".cache" / "stoker" / "shapes" if folder is None else folder
    target = parent / f"{short}-{_FORMAT}"
    if (target / "config.json").is_file():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{short}-", dir=parent))
        try:
            write(SHAPES[short], aside, device=device)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"The model {name} cannot be written to {target}: {error.strerror or error}.",
            fix="Make room, or name another place with --models.",
        ) from error
    return target


def write(
    config: dict[str, Any], folder: Path, *, device: "torch.device | str", max_shard_bytes: int = 2 * 2**30
) -> None:
    """Writes a model of `config` with normal bf16 weights (norms are one) and a byte-level tokenizer."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator(device=device).manual_seed(0)
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in _tensors(families.read(config, "shape"), device, generator):
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    _write_tokenizer(folder)
    _write_json(folder / "config.json", {**config, "dtype": "bfloat16"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _tensors(
    spec: ArchSpec, device: "torch.device | str", generator: "torch.Generator"
) -> "Iterator[tuple[str, Tensor]]":
    import torch

    linears = {f"{name}.weight": shape for name, shape in arithmetic.linear_shapes(spec).items()}
    for entry in families.weight_map(spec):
        for name in entry.theirs:
            if entry.ours.endswith("norm.weight"):
                yield name, torch.ones(spec.hidden_size, dtype=torch.bfloat16)
                continue
            columns, rows = linears.get(name, (spec.hidden_size, spec.vocab_size))
            drawn = torch.empty((rows, columns), dtype=torch.bfloat16, device=device)
            yield name, drawn.normal_(0.0, _DEVIATION, generator=generator).cpu()


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, for trainers that will not load a model without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=131072, **names).save_pretrained(folder)
