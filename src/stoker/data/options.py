"""How the rows of one source are read: options that formats, templates and masks share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

END_OF_TURN = ("turn", "all", "last", "none")
"""Whose end-of-turn token trains: of trained turns, of all, the conversation's last, of none."""


@dataclass(frozen=True)
class ChatOptions:
    """How conversations of one source are read, rendered and trained; None leaves it to what holds for all sources.

    `roles` maps our names to further names of theirs; `message_properties` maps keys that the template reads to keys of
    the row's messages. `train_on` may be empty: then messages say themselves whether they train.
    """

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    message_properties: Mapping[str, str] = field(default_factory=dict)
    train_on: tuple[str, ...] | None = None
    last_turn_only: bool = False
    train_on_end_of_turn: str | None = None
    train_on_eos: str | None = None
    default_system_message: str | None = None
    drop_system_message: bool = False
    split_thinking: bool = False


@dataclass(frozen=True)
class PromptTexts:
    """The text around a row's fields, which stand in it as `{instruction}`, `{input}`, `{system}`, `{output}`."""

    format: str | None = None
    no_input_format: str | None = None
    system: str | None = None
    system_no_input: str | None = None
    system_format: str = "{system}"
    output_format: str | None = None


@dataclass(frozen=True)
class Reading:
    """What a format's conversion may ask for: other names of fields, chat options, prompt texts."""

    fields: Mapping[str, str] = field(default_factory=dict)
    chat: ChatOptions = field(default_factory=ChatOptions)
    prompt: PromptTexts = field(default_factory=PromptTexts)

    def theirs(self, name: str) -> str:
        """Returns the row's own name of a field, for messages."""
        return self.fields.get(name, name)


@dataclass(frozen=True)
class SourceOptions:
    """One source of rows: a file, folder, glob, URL or Hub id in `path`, or the rows themselves in `rows`.

    `format` is a name of `formats.FORMATS` or "auto"; `fields` maps our field names to the source's; `chat` and
    `prompt` say how its conversations and prompts are read; `split` may hold a slice; `name` (a configuration) and
    `revision` apply to Hub ids, `data_files` to them and to folders; `limit` takes the first rows only, and of
    `num_shards` parts number `shard`; `file_type` overrides the file's suffix. `weight` is for the loader.
    """

    path: str | None = None
    rows: Sequence[Mapping[str, Any]] | None = None
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    name: str | None = None
    limit: int | None = None
    file_type: str | None = None
    chat: ChatOptions = field(default_factory=ChatOptions)
    prompt: PromptTexts = field(default_factory=PromptTexts)
    data_files: tuple[str, ...] = ()
    revision: str | None = None
    shard: int = 0
    num_shards: int = 1
    weight: float | None = None

    @property
    def reading(self) -> Reading:
        """How its rows are read."""
        return Reading(self.fields, self.chat, self.prompt)
