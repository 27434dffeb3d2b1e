"""`data`: the rows to train on, and how they become tokens."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from stoker.config.sections.section import Count, CountOrZero, Positive, Section, Share, Text

EndOfTurn = Literal["turn", "all", "last", "none"]


class Fields(Section):
    """Your names of a format's fields, ours first: `{messages: dialogue}`. docs/data.md says which format has which."""

    messages: Text | None = None
    """The list of messages of a chat; `messages` or `conversations` unless set."""
    role: Text | None = None
    """Key of a message: who speaks; `role`, or `from` in ShareGPT rows, unless set."""
    content: Text | None = None
    """Key of a message: what is said; `content`, or `value` in ShareGPT rows, unless set."""
    thinking: Text | None = None
    """Key of a message: its reasoning; `reasoning_content`, `thinking` or `reasoning` unless set."""
    train: Text | None = None
    """Key of a message: whether it trains, true or false, over `train_on`; rows have none unless set."""
    train_detail: Text | None = None
    """Key of a message: which of its characters train, a list of `begin_offset`, `end_offset` (inclusive), `train`."""
    message_properties: dict[Text, Text] = {}
    """Further keys of a message that the chat template reads, the template's name first: `{name: author}`."""
    tools: Text | None = None
    """The tools that a chat may call, as a list or its JSON."""
    system: Text | None = None
    """A system message."""
    instruction: Text | None = None
    """What is asked."""
    input: Text | None = None
    """What the instruction is about."""
    output: Text | None = None
    """The answer."""
    text: Text | None = None
    """A text."""
    segments: Text | None = None
    """A list of `label` (whether it trains) and `text`."""
    input_ids: Text | None = None
    """Token ids."""
    attention_mask: Text | None = None
    """1 for a token, 0 for padding, which is left out."""
    labels: Text | None = None
    """Token ids to learn, -100 elsewhere; or whether each step of a stepwise row is right."""
    prompt: Text | None = None
    """What precedes a completion or a pair: a text or messages."""
    completion: Text | None = None
    """What follows the prompt: a text or messages."""
    label: Text | None = None
    """Whether the completion is desirable."""
    chosen: Text | None = None
    """The better answer: a text, a message or messages."""
    rejected: Text | None = None
    """The worse answer: a text, a message or messages."""
    completions: Text | None = None
    """The steps of a stepwise row: a list of texts."""


class Chat(Section):
    """How one source's conversations are read, rendered and trained; what is not set here holds as for all sources."""

    chat_template: Text | None = None
    """Chat template of these rows, as `model.chat_template` would name it."""
    chat_template_kwargs: dict[Text, Any] = {}
    """Further variables that the chat template reads: `{enable_thinking: false}`."""
    roles: dict[Text, list[Text]] = {}
    """Other names of roles, ours first: `{assistant: [narrator, bot]}`."""
    train_on: Literal["assistant", "all"] | list[Text] | None = None
    """Whose words are learned; `[]` leaves it to `fields.train`. `data.train_on` unless set."""
    last_turn_only: bool = False
    """Learn the last of the turns that would train, not those before it."""
    train_on_end_of_turn: EndOfTurn | None = None
    """Which turns' end token is learned; `data.train_on_end_of_turn` unless set."""
    train_on_eos: EndOfTurn | None = None
    """The same where the end token is the tokenizer's EOS; as `train_on_end_of_turn` unless set."""
    default_system_message: Text | None = None
    """System message of conversations that have none."""
    drop_system_message: bool = False
    """Leave out system messages."""
    split_thinking: bool = False
    """Give a thought that opens a content (`<think>...</think>`) to the template as `reasoning_content`."""


class PromptTexts(Section):
    """The text around the fields of formats `prompt`, `preference`, `unpaired`: `{system}`, `{instruction}`, ..."""

    format: Text | None = None
    """The prompt: `"User: {instruction} {input}\\nAssistant:"`; in preference rows `{prompt}` stands in it."""
    no_input_format: Text | None = None
    """The prompt of rows without `input`; `format` unless set."""
    system: str | None = None
    """System text of rows that bring none."""
    system_no_input: str | None = None
    """System text of rows that bring neither one nor `input`; `system` unless set."""
    system_format: str = "{system}"
    """How a system text is printed, before the prompt."""
    output_format: Text | None = None
    """The answer; as it is unless set. It trains."""


class Shard(Section):
    """One of several equal parts of a source's rows."""

    num: Count
    """How many parts there are."""
    index: CountOrZero
    """Which one to read, from 0: rows `index`, `index + num`, `index + 2 num`, and so on."""


class Source(Section):
    """One place that rows come from."""

    path: Text
    """File, folder, glob, Hub id, URL (`s3://`, `gs://`, `https://`), or `builtin:` rows; a relative path starts where
    the command is run. Files may be compressed (`.gz`, `.zst`)."""
    format: Text = "auto"
    """What a row holds, by a name in docs/data.md; `auto` looks at the first rows and reports what it found."""
    fields: Fields = Fields()
    """Other names for a format's fields, ours first: `{messages: dialogue}`."""
    chat: Chat = Chat()
    """How conversations of this source are read, rendered and trained."""
    prompt: PromptTexts = PromptTexts()
    """The text around the fields, for format `prompt` and preference rows."""
    file_type: Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"] | None = None
    """How to read the file; by its ending unless set."""
    split: Text = "train"
    """Split of a Hub dataset or folder, whole or a slice of it: `train[:20%]`, `train[1000:2000]`, `train[-10%:]`.
    Slices work on files too."""
    name: Text | None = None
    """Configuration (subset) of a Hub dataset."""
    limit: Count | None = None
    """Read only this many rows."""
    data_files: list[Text] = []
    """Files or patterns within the folder, URL or Hub dataset; all of it unless set."""
    revision: Text | None = None
    """Branch, tag or commit of a Hub dataset; its main branch unless set."""
    weight: Positive | None = None
    """Share of the training sequences that come from this source, relative to the others' weights. Set it for all
    sources or for none; without, every row comes once an epoch."""
    shard: Shard | None = None
    """Read one of several equal parts of the rows."""


def _validation_form(value: Any) -> str:
    forms = {float: "share", int: "count", list: "sources", tuple: "sources"}
    return forms.get(type(value), "neither")


Validation = Annotated[
    Annotated[Share, Tag("share")]
    | Annotated[Count, Tag("count")]
    | Annotated[list[Source], Field(min_length=1), Tag("sources")],
    Discriminator(_validation_form),
]


class Data(Section):
    """The rows to train on, and how they become tokens."""

    train: Annotated[list[Source], Field(min_length=1)]
    """List of sources, read one after the other."""
    validation: Validation | None = None
    """Rows held out to evaluate on: a share (`0.05`), a count (`200`), or a list of sources like `train`."""
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens of a training sequence at most."""
    packing: bool = True
    """Fill each sequence with whole documents, which never see one another."""
    train_on: Literal["assistant", "all"] | Annotated[list[Text], Field(min_length=1)] = "assistant"
    """Whose words are learned: `assistant`, `all`, or a list of roles. Task pretrain learns `all`."""
    train_on_end_of_turn: EndOfTurn | bool = "turn"
    """Which turns' end token is learned: of `turn`s that train (or `true`), of `all`, the `last` in the conversation,
    or `none` (or `false`), with which the model does not learn to stop."""
    end_of_turn_tokens: list[Text] = []
    """Tokens that end a turn; unless set, the first special token after it."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What to do with a row that cannot be read: `stop` naming file and line, or `skip` and count."""
    on_long: Literal["truncate", "drop", "stop", "split"] = "truncate"
    """What to do with a row longer than `sequence_length`; `split`, task pretrain's way, cuts text into pieces."""
    cache_folder: Text = "~/.cache/stoker"
    """Where prepared tokens are kept, by the content they come from."""
    shuffle: bool = True
    """Draw the order of sequences anew for each epoch; `false` takes rows in their order."""
    min_length: Count = 1
    """Leave out (and count) documents of fewer tokens."""
    deduplicate: bool = False
    """Take rows that are equal in every field once."""
    num_workers: Literal["auto"] | CountOrZero = "auto"
    """Processes that tokenise; 0 does it in the main one. `auto`: none for small data, else one for each core."""
    prepare: Literal["ahead", "overlap"] = "ahead"
    """`ahead` tokenises everything before the first step; `overlap` starts training while the rest is prepared: rows
    then come in windows, in their order, and `train.steps` says how long to train."""
    streaming: bool = False
    """Tokenise rows as they are needed and keep nothing, for data larger than memory and disk; needs `train.steps`."""
    window_sequences: Count = 256
    """With `streaming` or `prepare: overlap`: about how many sequences are packed and shuffled together."""
