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
from stoker.errors import ModelError
from stoker.models.folder import save_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from stoker.export.streamed import Progress
    from stoker.nn.decoder import Decoder

_TASK = "model."  # checkpoints name parameters as the task that is trained does


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
    if not has_adapter(name):
        yield None
        return
    with TemporaryDirectory() as aside:
        # Beside a copy of the run's configuration, which says how the adapter was trained.
        shutil.copyfile(RunFolder(Path(name).expanduser().parent.parent).config, Path(aside) / "config.yaml")
        _save_adapter(name, Path(aside) / "adapter")
        yield Path(aside) / "adapter"


def has_adapter(name: str) -> bool:
    """Whether the checkpoint `name` is of a run that trains an adapter."""
    return _config(name).adapter is not None


def write_adapter(name: str, output: Path) -> str:
    """Writes the adapter of the checkpoint `name` and its tokenizer to `output`; says what was done.

    Raises:
        CheckpointError: it is not whole. OutputError: `output` holds something, or cannot be written. ModelError: it is
            of a model that runs through Transformers.
    """
    from stoker.export.new_folder import new_folder

    path = Path(name).expanduser()
    num_bytes = sum(file.stat().st_size for file in path.glob("weights*.safetensors"))
    with new_folder(output, needed_bytes=num_bytes) as aside:
        _save_adapter(name, aside)
    return f"wrote the adapter of {path} to {output}"


def _save_adapter(name: str, folder: Path) -> None:
    from stoker.adapters.lora import Awaited
    from stoker.compose.trainer import add_adapter
    from stoker.export import adapter as folders

    config = _config(name)
    assert config.adapter is not None
    _, base, tokenizer = _open(config)
    weights, decoder = _weights(Path(name).expanduser()), _on_meta(base)
    chosen = config.adapter.model_copy(update={"start_from": None})
    add_adapter(decoder, chosen, seed=0, awaited=Awaited("cpu"))
    _fill(decoder, weights)
    name_of_base = str(base.folder.resolve()) if Path(base.name).expanduser().is_dir() else base.name
    folders.save(decoder, folder, base_name=name_of_base, revision=base.revision)
    save_tokenizer(tokenizer, folder)


def write_model(
    name: str,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    progress: "Progress | None" = None,
) -> str:
    """Writes the model of the checkpoint `name`, of a run that trains every weight, to `output`; says what was done.

    `dtype` names torch's type of the written weights; None: that in which they are trained. Memory holds one tensor.

    Raises:
        CheckpointError: it is not whole. OutputError: `output` holds something, or cannot be written.
    """
    import torch

    from stoker.export.new_folder import refuse_occupied
    from stoker.export.streamed import no_progress, written
    from stoker.export.trained_tensors import TrainedTensors
    from stoker.models.writer import DEFAULT_SHARD_BYTES

    refuse_occupied(output)
    path, config = Path(name).expanduser(), _config(name)
    original, base, tokenizer = _open(config)
    assert isinstance(base.spec, ArchSpec) and isinstance(original.spec, ArchSpec)
    weights = _weights(path)
    kept_config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    with ExitStack() as stack:
        tensors = TrainedTensors(
            weights,
            base.spec,
            base=base.folder,
            base_spec=original.spec,
            stack=stack,
            dtype=getattr(torch, dtype) if dtype else None,
        )
        options = {"max_shard_bytes": max_shard_bytes or DEFAULT_SHARD_BYTES, "progress": progress or no_progress}
        with written(tensors, output, config=kept_config, **options) as aside:
            save_tokenizer(tokenizer, aside)
    return f"wrote the model of {path} to {output}\nverified: the files, read again, hold what was written"


def _config(name: str) -> RunConfig:
    return load(RunFolder(Path(name).expanduser().parent.parent).config)


def _open(config: RunConfig) -> tuple[Base, Base, Any]:
    """The base as its folder has it, the same with the tokens that the run added, and its tokenizer."""
    chosen = config.model
    original = open_base(
        chosen.base,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
        overrides=chosen.overrides,
    )
    if not isinstance(original.spec, ArchSpec):
        raise ModelError(
            f"checkpoints of models that run through Transformers ({original.spec.class_name}) are not read here.",
            fix="Finish the run with stoker train RUN.YAML --resume: its adapter or model is written at the end.",
        )
    tokens = Tokens.of(chosen, may_grow=config.adapter is None)
    tokenizer = load_tokenizer(original, override=chosen.tokenizer, chat_template=chosen.chat_template, tokens=tokens)
    grows = bool(chosen.new_tokens or chosen.special_tokens.model_fields_set)
    return original, original.with_tokens(tokenizer) if grows else original, tokenizer


def _weights(path: Path) -> Any:
    from stoker.checkpoint.read import load as read

    return read(path).tensors["weights"]


def _on_meta(base: Base) -> "Decoder":
    import torch

    from stoker.models.build import on_meta

    assert isinstance(base.spec, ArchSpec)
    return on_meta(base.spec, dtype=torch.float32, kernels="reference")


def _fill(decoder: "Decoder", weights: "Mapping[str, Tensor]") -> None:
    import torch

    trained = {_TASK + name: one for name, one in decoder.named_parameters() if one.requires_grad}
    if set(trained) != set(weights):
        odd = sorted(set(trained) ^ set(weights))
        raise ModelError(f"the checkpoint's weights are not those of the run's adapter ({odd[0]}).", fix="Use another.")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
