"""Shapes stored in NF4, as bitsandbytes stores them: a 70B takes 40 GB of a disk in place of 141."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.arch import arithmetic, families
from stoker.arch.spec import ArchSpec, AttentionSpec, GatedSpec
from stoker.errors import ModelError

if TYPE_CHECKING:
    import torch

_STORED = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def write(
    config: dict[str, Any], folder: Path, *, device: "torch.device | str", deviation: float, max_shard_bytes: int
) -> None:
    """Writes a model of `config`: linear weights of layers in NF4, all else in bf16; no tokenizer.

    Norms are one, biases zero, and all else is normal with this standard deviation, drawn on `device` and put away on
    the host, tensor by tensor.

    Raises:
        ModelError: its layers are not attention and a gated feed-forward.
    """
    from stoker.models import writer

    spec = families.read(config, "shape")
    for layer in spec.layers:
        if not isinstance(layer.mixer, AttentionSpec) or not isinstance(layer.feed_forward, GatedSpec):
            raise ModelError(f"shapes of {spec.model_type} are not made in NF4.", fix="Use one that is like Llama.")
    tensors = _tensors(spec, device, deviation)
    stored = {**config, "quantization_config": _STORED}
    writer.write(tensors, folder, config=stored, max_shard_bytes=max_shard_bytes)


def _tensors(spec: ArchSpec, device: "torch.device | str", deviation: float) -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    from stoker.models.build import on_meta
    from stoker.models.native import hf_tensors
    from stoker.quant.nf4 import NF4Weight, to_checkpoint

    generator = torch.Generator(device=device).manual_seed(0)
    linears = arithmetic.linear_shapes(spec)
    for name, like in hf_tensors(on_meta(spec, dtype=torch.bfloat16, kernels="reference"), spec):
        if like.dim() == 1:
            yield name, torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
            continue
        drawn = torch.empty(like.shape, dtype=like.dtype, device=device).normal_(0.0, deviation, generator=generator)
        module = name.removesuffix(".weight")
        if module not in linears:
            yield name, drawn.cpu()
            continue
        for key, tensor in to_checkpoint(NF4Weight.quantize(drawn), (module,)).items():
            yield key, tensor.cpu()
