"""A model with its tokenizer, ready to answer: what `chat`, `generate`, the end of a run and notebooks use."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker.compose import artifact
from stoker.compose.hardware import probe
from stoker.compose.model import Base, load_decoder, load_tokenizer, open_base
from stoker.config.schema import Adapter
from stoker.errors import ConfigError, ModelError
from stoker.plan.hardware import Device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stoker.models.open import Model

Message = Mapping[str, str]


@dataclass
class Session:
    """A loaded model that answers; `dtype` is what its matrix products run in on `device`."""

    base: Base
    decoder: "Model"
    tokenizer: "PreTrainedTokenizerBase"
    device: str
    dtype: "torch.dtype"
    description: str
    adapter: Adapter | None = None
    quantization: str = "none"

    def stream_chat(self, messages: Sequence[Message], **settings: Any) -> Iterator[str]:
        """Yields the answer to `messages` piece by piece; `settings` are those of `generate.decode.generate`.

        Raises:
            ModelError: the tokenizer has no chat template, or the conversation does not fit the model's context.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {self.base.name} has no chat template, so it cannot chat.",
                fix="Continue plain text instead: stoker generate --raw.",
            )
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        yield from self._stream(self.tokenizer(text, add_special_tokens=False)["input_ids"], settings)

    def stream_text(self, text: str, **settings: Any) -> Iterator[str]:
        """Yields the continuation of `text` piece by piece."""
        yield from self._stream(self.tokenizer(text)["input_ids"], settings)

    def answer(self, question: str, **settings: Any) -> str:
        """Returns the whole answer to one question of a user, or the text's continuation without a chat template."""
        if self.tokenizer.chat_template:
            pieces = self.stream_chat([{"role": "user", "content": question}], **settings)
        else:
            pieces = self.stream_text(question, **settings)
        return "".join(pieces).strip()

    def _stream(self, prompt_ids: list[int], settings: Mapping[str, Any]) -> Iterator[str]:
        from stoker.generate.decode import generate
        from stoker.generate.stream import stream_text

        room = self.base.spec.max_positions - len(prompt_ids)
        if not prompt_ids or room < 1:
            raise ModelError(
                f"the prompt has {len(prompt_ids):,} tokens, not 1 to {self.base.spec.max_positions - 1:,}.",
                fix="Shorten it, or start over with /new.",
            )
        settings = {"max_new_tokens": 256, **settings}
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        with self._autocast():
            ids = generate(self.decoder, prompt_ids, stop_ids=self.stop_ids(), **settings)
            yield from stream_text(ids, self.tokenizer)

    def stop_ids(self) -> set[int]:
        """Returns the tokens that end an answer: the tokenizer's, the model's and the chat template's."""
        ids: set[int] = set()
        path = self.base.folder / "generation_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for value in (self.tokenizer.eos_token_id, self.base.config.get("eos_token_id"), settings.get("eos_token_id")):
            ids.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
        return ids | self._end_of_turn()

    def _end_of_turn(self) -> set[int]:
        """Returns the special token that the chat template writes right after an answer, if it writes one."""
        from stoker.data.template import resolve
        from stoker.data.tokenize import Piece, Span, Tokenizer

        if not self.tokenizer.chat_template:
            return set()
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = resolve(self.tokenizer).render(exchange)
        spans = tuple(Span(turn.start, turn.end) for turn in rendered.turns if turn.role == "assistant")
        (document,) = Tokenizer(self.tokenizer).documents([Piece(rendered.text, spans)])
        return {int(document.ids[end]) for _, end in document.turns if end >= 0}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        enabled = self.dtype != torch.float32
        return torch.autocast(self.device, dtype=self.dtype) if enabled else contextlib.nullcontext()


def open_session(
    name: str,
    *,
    base: str | None = None,
    device: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Session:
    """Loads what `name` stands for: a run's folder, an adapter's folder, or a model.

    `quantization` is the format of the base's linear weights. None: the one that the run trained on, whose rounding
    the adapter has learned to make up for; the model's own for anything but a run. `revision` is that of a Hub id;
    `trust_remote_code` lets code that comes with the model run, as a run's configuration may.

    Raises:
        ModelError: it cannot be found or loaded.
        ConfigError: the device does not exist here.
    """
    found = artifact.find(name, base=base)
    trusted = trust_remote_code or found.trust_remote_code
    opened = open_base(
        found.base, revision=revision or found.revision, trust_remote_code=trusted, overrides=found.overrides
    )
    tokenizer = load_tokenizer(opened, override=found.tokenizer)
    chosen = choose_device(device)
    kind, dtype = chosen.kind, _decoding_dtype(chosen)
    if quantization is None:
        quantization = found.quantization or "none"
    decoder = load_decoder(opened, device=kind, dtype=dtype, kernels=_kernels(chosen), quantization=quantization)
    adapter = _load_adapter(decoder, found.adapter) if found.adapter is not None else None
    held = opened.quantization(quantization)
    return Session(opened, decoder.eval(), tokenizer, kind, dtype, found.description, adapter, held)


def _kernels(device: Device) -> str:
    """Returns Triton's kernels on a GPU that has them: dequantising op by op would cost more than the products."""
    return "triton" if device.kind == "cuda" and device.triton else "reference"


def _load_adapter(decoder: "Model", folder: Path) -> Adapter:
    """Puts a saved adapter on the model and returns its settings as a configuration would write them."""
    from stoker.adapters.lora import lora_layers
    from stoker.export import adapter

    summary = adapter.load(decoder, folder)
    settings = next(lora_layers(decoder)).settings
    return Adapter(
        kind="dora" if settings.dora else "lora",
        rank=settings.rank,
        alpha=float(settings.alpha),
        dropout=float(settings.dropout),
        targets=list(summary.names),
        rank_stabilized=settings.rank_stabilized,
    )


def choose_device(asked: str) -> Device:
    """Returns where to decode: the device asked for, or for "auto" the first of this machine's.

    Raises:
        ConfigError: there is none of that kind here.
    """
    devices = probe().devices  # the best first
    for device in devices:
        if asked in ("auto", device.kind):
            return device
    kinds = ", ".join(device.kind for device in devices)
    raise ConfigError(f"--device {asked}: this machine has {kinds}.", fix="Use one of these, or auto.")


def _decoding_dtype(device: Device) -> "torch.dtype":
    """Returns the number format to decode in: fp32 on a CPU, bf16 or fp16 on a GPU."""
    import torch

    if device.kind != "cuda":
        return torch.float32
    return torch.bfloat16 if device.bf16 else torch.float16
