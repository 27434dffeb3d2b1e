"""A base model and its tokenizer, from a folder, the Hub or `builtin:`, as the rooms take them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import builtin
from stoker.arch.borrowed import BorrowedSpec
from stoker.arch.families.stored import stored_quantization
from stoker.arch.spec import ArchSpec
from stoker.compose.vocabulary import Tokens
from stoker.config.schema import RunConfig
from stoker.errors import ConfigError, ModelError
from stoker.plan import limits

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stoker.models.open import Model


@dataclass(frozen=True)
class Base:
    """A model as it was found: `name` as the user wrote it, the folder of its files, its configuration and facts."""

    name: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    spec: ArchSpec | BorrowedSpec

    @property
    def stored_quantization(self) -> str:
        """How the folder's weights are stored: "nf4", or "none" in full."""
        return stored_quantization(self.config, str(self.folder / "config.json"))

    def with_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> "Base":
        """Returns the base with a vocabulary that holds all of the tokenizer's tokens, and its special ones' ids."""
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}
        config = self.config | {name: value for name, value in ids.items() if value is not None}
        if len(tokenizer) <= self.spec.vocab_size:
            return replace(self, config=config)
        if not isinstance(self.spec, ArchSpec) or "vocab_size" not in self.config:
            raise ModelError("tokens are added to native models only.", fix="Use tokens of the model's vocabulary.")
        grown = replace(self.spec, vocab_size=len(tokenizer))
        return replace(self, config=config | {"vocab_size": len(tokenizer)}, spec=grown)

    def quantization(self, asked: str) -> str:
        """Returns the format that the weights will have in memory: the one asked for, or the one they are stored in.

        Raises ConfigError when the two contradict each other.
        """
        stored = self.stored_quantization
        if stored == "none" or asked in ("none", stored):
            return stored if asked == "none" else asked
        raise ConfigError(
            f"model.quantization = {asked}, but the weights of {self.name} are stored in {stored}.",
            fix=f"Leave it out (they stay {stored}), or name the unquantised model as model.base.",
        )


def open_base(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Base:
    """Finds (and for a Hub id fetches, for a builtin makes) a model, and reads its architecture.

    `trust_remote_code`: code that comes with the model may run, where neither Stoker nor Transformers has its class.
    `overrides` are changes to its config.json.

    Raises:
        ModelError: it is not there, its configuration is broken, or neither path can take its architecture.
        ConfigError: code from the Hub is to run whose commit is not pinned.
    """
    from stoker.models import folder as folders
    from stoker.models import open as models

    is_local = builtin.is_builtin(name) or Path(name).expanduser().is_dir()
    if trust_remote_code and not is_local and not models.is_commit(revision):
        raise ConfigError(
            f"the code that comes with {name} may be changed by others under revision {revision or 'main'}.",
            fix="Name the commit (40 hexadecimal digits) whose code you read as the revision.",
        )
    if builtin.is_builtin(name):
        folder = builtin.resolve_model(name)
    else:
        folder = folders.resolve(name, revision=revision, with_code=trust_remote_code)
    config = folders.read_config(folder) | dict(overrides or {})
    spec = read_facts(folder, config, trust_remote_code=trust_remote_code)
    if overrides and not isinstance(spec, ArchSpec):
        raise ModelError(
            f"model.overrides are for native models, and {name} runs through {spec.origin}.",
            fix="Change config.json in a copy of the model's folder, and name that.",
        )
    return Base(name, revision, folder, config, spec)


def open_base_of(config: RunConfig) -> Base:
    """Returns the base that a configuration names; raises what `open_base` does."""
    chosen = config.model
    return open_base(
        chosen.base,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
        overrides=chosen.overrides,
    )


def read_facts(folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> ArchSpec | BorrowedSpec:
    """Returns the facts of the model in `folder` with the parsed `config`, by the path that it will take.

    Raises:
        ModelError: neither path can take it; the message has the reason.
    """
    from stoker.models import open as models

    return models.read(folder, config, trust_remote_code=trust_remote_code)


def load_tokenizer(
    base: Base,
    *,
    override: str | Path | None = None,
    chat_template: str | None = None,
    tokens: Tokens | None = None,
) -> "PreTrainedTokenizerBase":
    """Returns the base's tokenizer, or that of `override` (folder or Hub id), with `chat_template` put in if given.

    `tokens` get their roles or are added. `chat_template` is the name of a shipped template or a Jinja file.
    """
    from stoker.data import template
    from stoker.models import folder as folders

    tokenizer = folders.load_tokenizer(folders.resolve(str(override)) if override else base.folder)
    if len(tokenizer) > base.spec.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model only {base.spec.vocab_size:,}.",
            where=str(override or base.folder),
            fix="Use the tokenizer that belongs to the model.",
        )
    if tokens is not None:
        tokens.apply(tokenizer, base.spec.vocab_size)
    if chat_template is not None:
        tokenizer.chat_template = template.source_of(tokenizer, chat_template)
    return tokenizer


def load_tokenizer_of(config: RunConfig, base: Base) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer that a configuration names for its base, with the tokens and the template that it wants."""
    chosen, tokens = config.model, Tokens.of(config.model, may_grow=config.adapter is None)
    return load_tokenizer(base, override=chosen.tokenizer, chat_template=chosen.chat_template, tokens=tokens)


def fitted(config: RunConfig, base: Base) -> RunConfig:
    """Returns the configuration with what the base decides: how long sequences may be, and how it is stored.

    Raises:
        ConfigError: the base is stored quantised, and the configuration wants another format or trains every weight.
    """
    quantization = base.quantization(config.model.quantization)
    if quantization != "none" and config.adapter is None:
        raise ConfigError(
            f"the weights of {base.name} are stored in {quantization}, which cannot be trained.",
            fix="Add an adapter (adapter: {kind: lora}), or name the unquantised model as model.base.",
        )
    model = config.model.model_copy(update={"quantization": quantization})
    return limits.fitted(config.model_copy(update={"model": model}), base.spec)


def load_decoder(
    base: Base,
    *,
    device: "torch.device | str",
    dtype: "torch.dtype",
    kernels: str,
    quantization: str = "none",
) -> "Model":
    """Streams the base's weights on to `device` as `dtype`, its layers' linear weights in the format asked for."""
    from stoker.models import open as models

    return models.load(
        base.folder,
        base.spec,
        device=device,
        dtype=dtype,
        kernels=kernels,
        quantization=base.quantization(quantization),
    )


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns the id that fills rows; any id will do, since padding is never attended to or trained."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0
