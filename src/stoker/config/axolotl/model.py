"""The model and its tokenizer: keys that need a rule of their own."""

from collections.abc import Mapping
from typing import Any

from stoker.config.axolotl.entries import at, honoured
from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import flag, texts


def special_token(role: str) -> Any:
    """Returns the rule of one member of `special_tokens`."""

    def read(reading: Reading) -> Outcome:
        if not isinstance(reading.value, str):
            raise UnreadableError("it must be text.")
        return honoured({at(f"model.special_tokens.{role}"): reading.value})

    return read


def new_tokens(reading: Reading) -> Outcome:
    """`tokens` and `special_tokens.additional_special_tokens`."""
    if isinstance(reading.value, Mapping):
        raise UnreadableError(
            "it must be a list.", "Tokens with a role, such as pad_token, belong under special_tokens."
        )
    others = reading.other("tokens") if len(reading.path) > 1 else []
    extra = reading.other("special_tokens") if len(reading.path) == 1 else None
    extra = extra.get("additional_special_tokens") if isinstance(extra, Mapping) else None
    found = [*texts(others or []), *texts(reading.value), *texts(extra or [])]
    return honoured({at("model.new_tokens"): list(dict.fromkeys(found))})


def model_type(reading: Reading) -> Outcome:
    """`model_type`: the class follows from the model's config.json; classifiers are another task."""
    name = str(reading.value)
    if "Classification" in name:
        return Outcome("refused", f"{name}: classifiers and reward models are not trained. Use a causal model.")
    return Outcome("automatic", "the architecture is read from the model's config.json")


def remote_code(reading: Reading) -> Outcome:
    """`trust_remote_code`: obeyed where the file names the commit whose code was read."""
    revision = str(reading.other("revision_of_model") or reading.other("model_revision") or "")
    is_pinned = len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)
    if flag(reading.value) and is_pinned:
        return honoured({("model", "trust_remote_code"): True})
    return Outcome("no effect", "code that comes with a model runs only where a commit (40 digits) is named")


def chat_template(reading: Reading) -> Outcome:
    """`chat_template` of the top level."""
    name = str(reading.value)
    fallback = "tokenizer_default_fallback_"
    if name == "tokenizer_default":
        return Outcome("honoured", "the tokenizer's own template, as it is unless model.chat_template is set")
    if name == "jinja":
        if reading.other("chat_template_jinja") is None:
            raise UnreadableError(
                "chat_template: jinja needs chat_template_jinja.", "Set it to the template or a file."
            )
        return Outcome("honoured", "as chat_template_jinja says")
    if name.startswith(fallback):
        name = name.removeprefix(fallback)
        return honoured({at("model.chat_template"): name}, "used even where the tokenizer has a template of its own")
    return honoured({at("model.chat_template"): name})


def chat_template_text(reading: Reading) -> Outcome:
    """`chat_template_jinja` of the top level: read with chat_template: jinja or none."""
    name = reading.other("chat_template")
    if name not in (None, "jinja"):
        return Outcome("no effect", f"chat_template: {name} decides")
    return honoured({at("model.chat_template"): str(reading.value)})


def overrides(reading: Reading) -> Outcome:
    """`model_config`: changes to the model's config.json."""
    if not isinstance(reading.value, Mapping):
        raise UnreadableError("it must be a mapping.")
    ours = {"use_cache", "attn_implementation", "torch_dtype", "dtype"}
    changes = {str(key): value for key, value in reading.value.items() if key not in ours}
    if not changes:
        return Outcome("no effect", "the plan decides it")
    return honoured({at("model.overrides"): changes})


def rope_scaling(reading: Reading) -> Outcome:
    """`rope_scaling` of the top level, which moved into `model_config`."""
    if not isinstance(reading.value, Mapping):
        raise UnreadableError("it must be a mapping.")
    return honoured({at("model.overrides.rope_scaling"): dict(reading.value)})
