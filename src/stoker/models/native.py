"""`ArchSpec` to `nn.Decoder`: built on the meta device, weights streamed in from safetensors, and out again."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from stoker.arch.families import weight_map
from stoker.arch.spec import ArchSpec, LayerSpec, RopeSpec
from stoker.errors import ModelError, Problem
from stoker.models.folder import WeightIndex, weight_files
from stoker.nn.attention import Attention
from stoker.nn.block import Block
from stoker.nn.decoder import Decoder
from stoker.nn.feed_forward import GatedFeedForward
from stoker.nn.norm import RmsNorm
from stoker.nn.rotary import Rotary

_MAX_PROBLEMS = 12


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
) -> Decoder:
    """A `Decoder` with the weights of a Hugging Face folder; beyond the model, memory holds one tensor at a time.

    Raises ModelError, naming the tensors, when some are missing, unexpected or of another shape.
    """
    index = weight_files(Path(folder))
    decoder = _on_meta(spec, dtype=dtype, kernels=kernels)
    with ExitStack() as stack:
        reader = _Reader(index, stack)
        sources = _sources(spec, index, reader)
        _check_shapes(decoder, spec, sources, reader)
        decoder.to_empty(device=device)
        with torch.no_grad():
            for parameter, names in ((decoder.get_parameter(ours), names) for ours, names in sources.items()):
                start = 0
                for name in names:
                    tensor = reader.tensor(name)
                    parameter[start : start + tensor.shape[0]].copy_(tensor)
                    start += tensor.shape[0]
    return decoder


def hf_tensors(decoder: Decoder, spec: ArchSpec) -> Iterator[tuple[str, Tensor]]:
    """Each Hugging Face tensor's name and its rows of our parameters, as detached views."""
    for entry in weight_map(spec):
        parameter = decoder.get_parameter(entry.ours).detach()
        if len(entry.theirs) == 1:
            yield entry.theirs[0], parameter
            continue
        owner = decoder.get_submodule(entry.ours.rpartition(".")[0])
        for name, rows in zip(entry.theirs, owner.slices, strict=True):
            yield name, parameter[rows]


def _on_meta(spec: ArchSpec, *, dtype: torch.dtype, kernels: str) -> Decoder:
    """A `Decoder` whose parameters have shapes and dtypes but no memory."""
    names = {entry.ours: entry.theirs for entry in weight_map(spec)}
    rotaries: dict[RopeSpec, Rotary] = {}
    with torch.device("meta"):
        blocks = [
            _block(layer, spec.hidden_size, f"blocks.{index}", names=names, rotaries=rotaries, kernels=kernels)
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


def _block(
    layer: LayerSpec,
    hidden_size: int,
    prefix: str,
    *,
    names: dict[str, tuple[str, ...]],
    rotaries: dict[RopeSpec, Rotary],
    kernels: str,
) -> Block:
    def modules(*ours: str) -> tuple[str, ...]:
        """The Hugging Face module names of our linears."""
        return tuple(name.removesuffix(".weight") for linear in ours for name in names[f"{prefix}.{linear}.weight"])

    mixer, feed_forward = layer.mixer, layer.feed_forward
    attention = Attention(
        hidden_size,
        num_heads=mixer.num_heads,
        num_kv_heads=mixer.num_kv_heads,
        head_dim=mixer.head_dim,
        rotary=rotaries.setdefault(mixer.rope, _rotary(mixer.rope)),
        names=modules("attention.qkv", "attention.out"),
        window=mixer.window,
        qkv_bias=mixer.qkv_bias,
        out_bias=mixer.out_bias,
        kernels=kernels,
    )
    return Block(
        attention,
        GatedFeedForward(
            hidden_size,
            intermediate_size=feed_forward.intermediate_size,
            names=modules("feed_forward.gate_up", "feed_forward.down"),
            bias=feed_forward.bias,
            kernels=kernels,
        ),
        attention_norm=RmsNorm(hidden_size, epsilon=layer.norm.epsilon, kernels=kernels),
        feed_forward_norm=RmsNorm(hidden_size, epsilon=layer.norm.epsilon, kernels=kernels),
    )


def _rotary(rope: RopeSpec) -> Rotary:
    if rope.scaling is None:
        return Rotary(rope.dim, theta=rope.theta)
    return Rotary(rope.dim, theta=rope.theta, kind=rope.scaling.kind, **asdict(rope.scaling))


class _Reader:
    """Tensors of a folder by name; files are opened when first asked for and closed with `stack`."""

    def __init__(self, index: WeightIndex, stack: ExitStack) -> None:
        self._index = index
        self._stack = stack
        self._files: dict[Path, safe_open] = {}

    def _file(self, name: str) -> safe_open:
        path = self._index.files[name]
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)


def _sources(spec: ArchSpec, index: WeightIndex, reader: _Reader) -> dict[str, tuple[str, ...]]:
    """Our parameter names and the tensors to read for each; raises ModelError for missing and unexpected ones."""
    sources = {entry.ours: entry.theirs for entry in weight_map(spec)}
    present = {name for name in index.files if not name.endswith("rotary_emb.inv_freq")}  # a buffer of old checkpoints
    if spec.tied_head and "lm_head.weight" in present:
        _check_tied(sources, present, index, reader)
        present.discard("lm_head.weight")
    expected = {name for names in sources.values() for name in names}
    expected.discard("lm_head.weight" if spec.tied_head else "")
    problems = [("is missing", name) for name in sorted(expected - present)]
    problems += [("is not part of this architecture", name) for name in sorted(present - expected)]
    _raise(problems, index.folder)
    return sources


def _check_tied(sources: dict[str, tuple[str, ...]], present: set[str], index: WeightIndex, reader: _Reader) -> None:
    """A tied model may store its one matrix under either name or both; two different ones contradict config.json."""
    (embedding,) = sources["embedding.weight"]
    if embedding not in present:
        sources["embedding.weight"] = ("lm_head.weight",)
    elif not torch.equal(reader.tensor(embedding), reader.tensor("lm_head.weight")):
        raise ModelError(
            f"config.json ties the head to the embedding, but lm_head.weight differs from {embedding}.",
            where=str(index.folder),
            fix='Set "tie_word_embeddings": false in config.json if the head is meant to be its own.',
        )


def _check_shapes(decoder: Decoder, spec: ArchSpec, sources: dict[str, tuple[str, ...]], reader: _Reader) -> None:
    problems = []
    for ours, names in sources.items():
        owner = decoder.get_submodule(ours.rpartition(".")[0])
        parameter = decoder.get_parameter(ours)
        rows = getattr(owner, "out_features", None) if len(names) > 1 else (parameter.shape[0],)
        for name, size in zip(names, rows, strict=True):
            wanted = (size, *parameter.shape[1:])
            if reader.shape(name) != wanted:
                problems.append((f"has shape {list(reader.shape(name))}, config.json makes it {list(wanted)}", name))
    _raise(problems, reader._index.folder)


def _raise(problems: list[tuple[str, str]], folder: Path) -> None:
    """Raises one ModelError for all problems, if any: (what, tensor name)."""
    if not problems:
        return
    listed = [Problem(f"tensor {name} {what}.", str(folder)) for what, name in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        listed.append(Problem(f"and {len(problems) - _MAX_PROBLEMS} tensors more.", str(folder)))
    listed.append(Problem("The weights do not fit config.json.", fix="Fetch the model again, or mend its config.json."))
    raise ModelError(listed)
