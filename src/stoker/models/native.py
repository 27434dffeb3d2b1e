"""`ArchSpec` to `nn.Decoder`: built on the meta device, filled at random or from a folder, and written back to one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec, LayerSpec, RopeSpec
from stoker.models import weights, writer
from stoker.nn.attention import Attention
from stoker.nn.block import Block
from stoker.nn.decoder import Decoder
from stoker.nn.feed_forward import GatedFeedForward
from stoker.nn.linear import FusedLinear
from stoker.nn.norm import RmsNorm
from stoker.nn.rotary import Rotary


def build(
    spec: ArchSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    initializer_range: float = 0.02,
    kernels: str = "reference",
) -> Decoder:
    """A `Decoder` with random weights: norms one, biases zero, the rest normal with `initializer_range`.

    Drawn in fp32 on the CPU from their own generator, so that a seed gives the same weights on every device.
    """
    decoder = _on_meta(spec, dtype=dtype, kernels=kernels).to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, initializer_range, generator=generator))
    return decoder


def load(
    folder: Path | str,
    spec: ArchSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
    quantization: str = "none",
) -> Decoder:
    """A `Decoder` with the weights of a Hugging Face folder; beyond the model, memory holds one weight at a time.

    With `quantization` ("nf4", "int8", "fp8") the linear layers of the blocks become `FrozenLinear`s, quantised one by
    one as they are read; the rest has `dtype`. A folder that bitsandbytes wrote in NF4 is read as it is with "nf4", and
    dequantised to `dtype` with "none". With "fp8", layers whose output it would move too far keep `dtype`.

    Raises ModelError, naming the tensors, when some are missing, unexpected or of another shape.
    """
    decoder = _on_meta(spec, dtype=dtype, kernels=kernels)
    weights.stream_into(decoder, spec, folder, device=device, quantization=quantization, kernels=kernels)
    return decoder


def hf_tensors(decoder: Decoder, spec: ArchSpec) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor's name and its rows of our parameters, as detached views."""
    for entry in weight_map(spec):
        module_name, _, kind = entry.ours.rpartition(".")
        module = decoder.get_submodule(module_name)
        parameter = getattr(module, kind).detach()  # of a quantised layer: its dequantised weight
        if isinstance(module, FusedLinear):
            for name, rows in zip(module.names, module.slices, strict=True):
                yield f"{name}.{kind}", parameter[rows]
        else:
            yield entry.theirs[0], parameter


def save(
    decoder: Decoder,
    spec: ArchSpec,
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int = writer.DEFAULT_SHARD_BYTES,
) -> None:
    """Writes `decoder` as a folder that Transformers loads: weights, and `config` with the weights' dtype.

    Raises OutputError when it cannot be written.
    """
    writer.write(hf_tensors(decoder, spec), folder, config=config, max_shard_bytes=max_shard_bytes)


def _on_meta(spec: ArchSpec, *, dtype: torch.dtype, kernels: str) -> Decoder:
    """A `Decoder` whose parameters have shapes and dtypes but no memory."""
    names = {entry.ours: entry.theirs for entry in weight_map(spec)}
    rotaries = {layer.mixer.rope: _rotary(layer.mixer.rope) for layer in spec.layers}
    with torch.device("meta"):
        blocks = [
            _block(
                layer,
                spec.hidden_size,
                names=_module_names(names, f"blocks.{index}."),
                rotary=rotaries[layer.mixer.rope],
                kernels=kernels,
            )
            for index, layer in enumerate(spec.layers)
        ]
        decoder = Decoder(
            spec.vocab_size,
            spec.hidden_size,
            blocks=blocks,
            final_norm=RmsNorm(spec.hidden_size, epsilon=spec.final_norm.epsilon, kernels=kernels),
            tied_head=spec.tied_head,
            head_bias=spec.head_bias,
        )
    return decoder.to(dtype)


def _module_names(names: Mapping[str, tuple[str, ...]], prefix: str) -> dict[str, tuple[str, ...]]:
    """The Hugging Face module names of a block's linears, by our names within the block."""
    return {
        ours.removeprefix(prefix).removesuffix(".weight"): tuple(name.removesuffix(".weight") for name in theirs)
        for ours, theirs in names.items()
        if ours.startswith(prefix) and ours.endswith(".weight")
    }


def _block(
    layer: LayerSpec, hidden_size: int, *, names: Mapping[str, tuple[str, ...]], rotary: Rotary, kernels: str
) -> Block:
    mixer, feed_forward = layer.mixer, layer.feed_forward
    attention = Attention(
        hidden_size,
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        rotary=rotary,
        qkv_names=names["attention.qkv"],
        out_names=names["attention.out"],
        window=mixer.window,
        qkv_bias=mixer.qkv_bias,
        out_bias=mixer.out_bias,
        kernels=kernels,
    )
    gated = GatedFeedForward(
        hidden_size,
        intermediate_size=feed_forward.intermediate_size,
        gate_up_names=names["feed_forward.gate_up"],
        down_names=names["feed_forward.down"],
        bias=feed_forward.bias,
        kernels=kernels,
    )
    return Block(
        attention,
        gated,
        attention_norm=RmsNorm(hidden_size, epsilon=layer.norm.epsilon, kernels=kernels),
        feed_forward_norm=RmsNorm(hidden_size, epsilon=layer.norm.epsilon, kernels=kernels),
    )


def _rotary(rope: RopeSpec) -> Rotary:
    if rope.scaling is None:
        return Rotary(rope.dim, theta=rope.theta)
    return Rotary(rope.dim, theta=rope.theta, kind=rope.scaling.kind, **asdict(rope.scaling))
