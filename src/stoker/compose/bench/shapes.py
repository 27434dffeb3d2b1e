"""Models of well-known shapes with random weights, for measuring: `shape:llama-3.1-8b` needs no download.

Written once as a Hugging Face folder, drawn on the device, so that every trainer loads the same weights the usual way.
"""

import gc
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.arch import families
from stoker.arch import shapes as published
from stoker.compose.bench import nf4_shapes
from stoker.errors import ModelError, OutputError

if TYPE_CHECKING:
    import torch

PREFIX = "shape:"
_FORMAT = 2
"""Raised when the code below changes what it writes, so that folders made before are made again."""
_DEVIATION = 0.02
_NF4 = "-nf4"

_SPECIAL: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": _DEVIATION,
}
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
    **_SPECIAL,
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
    "mamba-130m": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": 50280,
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 24,
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 48,
        "tie_word_embeddings": True,
        **_SPECIAL,
    },
    "mamba2-780m": {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 1536,
        "num_hidden_layers": 48,
        "num_heads": 48,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "expand": 2,
        "chunk_size": 256,
        "tie_word_embeddings": True,
        **_SPECIAL,
    },
    "qwen3-30b-a3b-8-layers": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        **_SPECIAL,
    },
    "mixtral-8x7b-4-layers": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        **_SPECIAL,
    },
}
"""Name -> config.json, in the sizes of the published models (without rope scaling, which costs nothing in a step); of
the mixtures, the first few layers."""


def is_shape(name: str) -> bool:
    """Whether `model.base` names a shape."""
    return name.startswith(PREFIX)


def config_of(name: str) -> dict[str, Any]:
    """Returns the config.json of the shape `name`: of those here, else of a published model.

    `NAME-4-layers` is one with so many of its layers, and `NAME-nf4` one that is stored in NF4.

    Raises:
        ModelError: there is no such shape.
    """
    if name in SHAPES:
        return SHAPES[name]
    cut = re.fullmatch(r"(.+)-(\d+)-layers", name)
    if cut is not None:
        return config_of(cut[1]) | {"num_hidden_layers": int(cut[2])}
    if name not in published.names():
        known = ", ".join(PREFIX + shape for shape in dict.fromkeys((*SHAPES, *published.names())))
        raise ModelError(
            f"There is no shape {PREFIX + name!r}.", fix=f"Known: {known}; -N-layers cuts one, -nf4 stores it so."
        )
    return published.config(name) | _SPECIAL


def resolve(name: str, *, device: "torch.device | str", folder: Path | None = None) -> Path:
    """Returns the folder of the model `shape:...`, in `folder` (by default the user's cache), made unless it is there.

    Raises:
        ModelError: there is no such shape, or its folder cannot be written.
    """
    short = name.removeprefix(PREFIX)
    config = config_of(short.removesuffix(_NF4))
    parent = Path.home() / ".cache" / "stoker" / "shapes" if folder is None else folder
    target = parent / f"{short}-{_FORMAT}"
    if (target / "config.json").is_file():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{short}-", dir=parent))
        try:
            write(config, aside, device=device, in_nf4=short.endswith(_NF4))
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, OutputError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise ModelError(
            f"The model {name} cannot be written to {target}: {why or error}.",
            fix="Make room, or name another place with --models.",
        ) from error
    return target


def write(
    config: dict[str, Any],
    folder: Path,
    *,
    device: "torch.device | str",
    max_shard_bytes: int = 2 * 2**30,
    in_nf4: bool = False,
) -> None:
    """Writes a model of `config` in bf16, or its layers' linear weights in NF4, and a byte-level tokenizer.

    Norms are one and biases zero, a state space's rates and step sizes are those that it begins with, and all else is
    normal, drawn on `device`, whose memory holds the model meanwhile.
    """
    import torch

    from stoker.models import native
    from stoker.models.build import on_meta

    _write_tokenizer(folder)
    if in_nf4:
        nf4_shapes.write(config, folder, device=device, deviation=_DEVIATION, max_shard_bytes=max_shard_bytes)
        return
    spec = families.read(config, "shape")
    generator = torch.Generator(device=device).manual_seed(0)
    decoder = on_meta(spec, dtype=torch.bfloat16, kernels="reference").to_empty(device=device)
    native.fill(decoder, generator=generator, initializer_range=_DEVIATION)
    native.save(decoder, spec, folder, config={**config, "dtype": "bfloat16"}, max_shard_bytes=max_shard_bytes)
    del decoder  # what is measured next must not find its memory taken
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


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
