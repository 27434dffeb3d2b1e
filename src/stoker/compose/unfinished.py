"""What a checkpoint of a run holds, as an adapter's or a model's folder: read on a CPU, a tensor at a time."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stoker.arch.spec import ArchSpec
from stoker.compose.model import Base, load_tokenizer, open_base
from stoker.compose.run_folder import RunFolder
from stoker.compose.vocabulary import Tokens
from stoker.config.load import load
from stoker.config.schema import RunConfig
from stoker.errors import ModelError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.nn.decoder import Decoder
    from stoker.nn.linear import FusedLinear

_TASK = "model."  # checkpoints name parameters as the task that is trained does
_SHARD_BYTES = 512 * 2**20


def is_checkpoint(name: str) -> bool:
    """Whether `name` is that of a run's checkpoint, there or not."""
    folder = Path(name).expanduser()
    return folder.name.startswith("step-") and RunFolder(folder.parent.parent).config.is_file()


@contextmanager
def adapter(name: str) -> Iterator[Path | None]:
    """Within it there is a folder with the adapter of the checkpoint `name`; None where the run trains every weight.

    Raises:
        CheckpointError: it is not whole. ModelError: it is of a model that runs through Transformers.
    """
    from stoker.compose.trainer import add_adapter

    path, config = Path(name).expanduser(), _config(name)
    if config.adapter is None:
        yield None
        return
    from stoker.adapters.lora import Awaited
    from stoker.export import adapter as folders

    base, tokenizer = _open(config)
    weights, decoder = _weights(path), _on_meta(base)
    chosen = config.adapter.model_copy(update={"start_from": None})
    add_adapter(decoder, chosen, seed=0, awaited=Awaited("cpu", _no_weight))
    _fill(decoder, weights)
    with TemporaryDirectory() as aside:
        # Beside a copy of the run's configuration, which says how the adapter was trained.
        folder = Path(aside) / "adapter"
        shutil.copyfile(RunFolder(path.parent.parent).config, Path(aside) / "config.yaml")
        name_of_base = str(base.folder.resolve()) if Path(base.name).expanduser().is_dir() else base.name
        folders.save(decoder, folder, base_name=name_of_base, revision=base.revision)
        tokenizer.save_pretrained(str(folder))
        yield folder


def write_model(name: str, output: Path, *, dtype: str | None = None) -> str:
    """Writes the model of the checkpoint `name`, of a run that trains every weight, to `output`; says what was done.

    `dtype` names torch's type of the written weights; None: that in which they are trained. Memory holds half a GiB of
    them at a time, or the largest tensor.

    Raises:
        CheckpointError: it is not whole. OutputError: `output` holds something, or cannot be written.
    """
    import torch

    from stoker.models import writer
    from stoker.models.folder import weight_files
    from stoker.models.native import hf_tensors
    from stoker.models.reader import Reader

    if output.exists() and any(output.iterdir()):
        raise OutputError("it exists and is not an empty folder.", where=str(output), fix="Name a new folder.")
    path, config = Path(name).expanduser(), _config(name)
    base, tokenizer = _open(config)
    weights, decoder = _weights(path), _on_meta(base)
    assert isinstance(base.spec, ArchSpec)
    for ours, parameter in decoder.named_parameters():
        held = _TASK + ours
        kept = weights.rows(held, 0, 0).dtype if held in weights and parameter.dim() else parameter.dtype
        parameter.data = parameter.data.to(getattr(torch, dtype) if dtype else kept)
    with ExitStack() as stack:
        reader = Reader(weight_files(base.folder), stack)
        source = _Source(decoder, base.spec, weights, reader)
        tensors = hf_tensors(decoder, base.spec)
        kept_config = {key: value for key, value in base.config.items() if key != "quantization_config"}
        writer.write(tensors, output, config=kept_config, max_shard_bytes=_SHARD_BYTES, read=source.read)
    tokenizer.save_pretrained(str(output))
    return f"wrote the model of {path} to {output}"


class _Source:
    """The values of Hugging Face's tensors by name: trained ones from a checkpoint, others from the base's files."""

    def __init__(self, decoder: "Decoder", spec: ArchSpec, weights: "Mapping[str, Tensor]", reader: Any) -> None:
        from stoker.arch.families import weight_map

        self._decoder, self._weights, self._reader = decoder, weights, reader
        self._entries = {name: entry for entry in weight_map(spec) for name in entry.stored or entry.theirs}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str) -> "Tensor":
        from stoker.models.native import entry_tensors

        entry = self._entries[name]
        if _TASK + entry.ours not in self._weights:  # train.only left it as it was
            self._reader.let_go()
            return self._reader.tensor(name)
        if self._last[0] != entry.ours:  # the parts of one weight come one after the other
            whole = self._weights[_TASK + entry.ours]
            self._last = entry.ours, dict(entry_tensors(self._decoder, entry, whole))
        return self._last[1][name]


def _config(name: str) -> RunConfig:
    return load(RunFolder(Path(name).expanduser().parent.parent).config)


def _open(config: RunConfig) -> tuple[Base, Any]:
    chosen = config.model
    base = open_base(
        chosen.base,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
        overrides=chosen.overrides,
    )
    if not isinstance(base.spec, ArchSpec):
        raise ModelError(
            f"checkpoints of models that run through Transformers ({base.spec.class_name}) are not read here.",
            fix="Finish the run with stoker train RUN.YAML --resume: its adapter or model is written at the end.",
        )
    tokens = Tokens.of(chosen, may_grow=config.adapter is None)
    tokenizer = load_tokenizer(base, override=chosen.tokenizer, chat_template=chosen.chat_template, tokens=tokens)
    if chosen.new_tokens or chosen.special_tokens.model_fields_set:
        base = base.with_tokens(tokenizer)
    return base, tokenizer


def _weights(path: Path) -> Any:
    from stoker.checkpoint.read import load as read

    return read(path).tensors["weights"]


def _on_meta(base: Base) -> "Decoder":
    import torch

    from stoker.models.build import on_meta

    assert isinstance(base.spec, ArchSpec)
    return on_meta(base.spec, dtype=torch.float32, kernels="reference")


def _no_weight(layer: "FusedLinear") -> "Tensor":
    """In place of a base's weight, of which only DoRA's first magnitudes would follow: the checkpoint has the last."""
    import torch

    return torch.zeros(1).expand(sum(layer.out_features), layer.in_features)


def _fill(decoder: "Decoder", weights: "Mapping[str, Tensor]") -> None:
    import torch

    trained = {_TASK + name: one for name, one in decoder.named_parameters() if one.requires_grad}
    if set(trained) != set(weights):
        odd = sorted(set(trained) ^ set(weights))
        raise ModelError(f"the checkpoint's weights are not those of the run's adapter ({odd[0]}).", fix="Use another.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
