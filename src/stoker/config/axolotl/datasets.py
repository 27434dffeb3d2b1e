"""The rows: entries of `datasets`, `test_datasets` and `pretraining_dataset`, and the keys about all of them."""

import difflib
from collections.abc import Mapping
from typing import Any

from stoker.config import row_formats
from stoker.config.axolotl.entries import at, custom, honoured
from stoker.config.axolotl.outcome import Entry, Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import Convert, advice, flag, is_off, number, positive, text, texts, whole
from stoker.config.document import Path

Whole = Mapping[str, Any]

LISTS = {"datasets": "train", "pretraining_dataset": "train", "test_datasets": "validation"}
"""Axolotl's lists of datasets -> the list of ours that their entries are in."""
_LOADERS = ("json", "csv", "parquet", "arrow", "text")
_TEXT_TYPES = ("completion", "pretrain")


def entries(keys: Whole, name: str) -> list[Any]:
    """Returns the entries of one of the lists; a text alone is the path of one."""
    found = keys.get(name)
    if isinstance(found, str):
        return [{"path": found}]
    return found if isinstance(found, list) else []


def is_pretraining(keys: Whole) -> bool:
    """Whether the file trains on plain texts alone: those are cut into pieces, and every token is learned."""
    if entries(keys, "pretraining_dataset"):
        return True
    types = [entry.get("type") for entry in entries(keys, "datasets") if isinstance(entry, Mapping)]
    return bool(types) and all(one in _TEXT_TYPES for one in types)


def every_source(keys: Whole, name: str, value: Any) -> dict[Path, Any]:
    """Returns the settings that give every dataset's entry the same field."""
    return {
        ("data", ours, index, *at(name)): value
        for theirs, ours in LISTS.items()
        for index in range(len(entries(keys, theirs)))
    }


def _own(reading: Reading) -> Mapping[str, Any]:
    """Returns the dataset's entry that the value is in."""
    found = entries(reading.whole, str(reading.path[0]))[int(reading.path[1])]
    return found if isinstance(found, Mapping) else {}


def set_alone(reading: Reading) -> Outcome:
    """`pretraining_dataset` given as a text: the path of one dataset."""
    return honoured({("data", LISTS[reading.name], 0, "path"): text(reading.value)})


# Where rows come from


def path(reading: Reading) -> Outcome:
    """`path`; `json` and its like are not paths but say how `data_files` are read."""
    value, files = text(reading.value), _own(reading).get("data_files")
    if value == "synthetic":
        return Outcome("refused", "made-up rows are not made. Use builtin:capitals, or a file.")
    if value not in _LOADERS or not files:
        return honoured({(*reading.entry, "path"): value})
    names = texts(files)
    settings = {(*reading.entry, "file_type"): _file_type(value, names)}
    if len(names) == 1:
        return honoured({**settings, (*reading.entry, "path"): names[0]}, f"{value} is how data_files are read")
    return honoured({**settings, (*reading.entry, "path"): "."}, f"{value} is how data_files are read")


def data_files(reading: Reading) -> Outcome:
    """`data_files`: inside of a folder or a Hub dataset; beside `path: json` the files themselves."""
    names = texts(reading.value)
    if _own(reading).get("path") in _LOADERS and len(names) == 1:
        return Outcome("honoured", "path, see above")
    return honoured({(*reading.entry, "data_files"): names})


def ds_type(reading: Reading) -> Outcome:
    """`ds_type`: how a file is read."""
    own = _own(reading)
    names = texts(own.get("data_files") or own.get("path") or "")
    if reading.value not in _LOADERS:
        raise UnreadableError("it is not one of the words that Axolotl knows.", advice(str(reading.value), _LOADERS))
    return honoured({(*reading.entry, "file_type"): _file_type(str(reading.value), names)})


def _file_type(loader: str, names: list[str]) -> str:
    """`json` reads JSON Lines too: the file's ending says which."""
    return "jsonl" if loader == "json" and any(".jsonl" in name for name in names) else loader


def shards(reading: Reading) -> Outcome:
    """`shards` and `shards_idx`: one part of many."""
    own = _own(reading)
    if own.get("shards") is None:
        raise UnreadableError("it needs shards.", "Set how many parts there are.")
    shard = {"num": positive(own["shards"]), "index": whole(own.get("shards_idx") or 0)}
    return honoured({(*reading.entry, "shard", key): value for key, value in shard.items()})


def all_shards(reading: Reading) -> Outcome:
    """`dataset_shard_num` and `dataset_shard_idx`: one part of every dataset."""
    keys = reading.whole
    if keys.get("dataset_shard_num") is None:
        raise UnreadableError("it needs dataset_shard_num.", "Set how many parts there are.")
    num, index = positive(keys["dataset_shard_num"]), whole(keys.get("dataset_shard_idx") or 0)
    settings = {**every_source(keys, "shard.num", num), **every_source(keys, "shard.index", index)}
    return Outcome("honoured", f"shard: {{num: {num}, index: {index}}} on every dataset", settings)


def skip(reading: Reading) -> Outcome:
    """`skip` of a pretraining dataset: the first rows are left out."""
    count, split = whole(reading.value), str(_own(reading).get("split") or "train")
    if not count:
        return Outcome("no effect", "0: none is left out")
    if "[" in split:
        raise UnreadableError("split names a part already.", "Write the part that you want as split.")
    return honoured({(*reading.entry, "split"): f"{split}[{count}:]"})


def split(reading: Reading) -> Outcome:
    """`split`; of a pretraining dataset it may lose its first rows to `skip`."""
    if not is_off(_own(reading).get("skip") or 0):
        return Outcome("honoured", "split, see skip")
    return honoured({(*reading.entry, "split"): text(reading.value)})


# What a row holds


def row_type(reading: Reading) -> Outcome:
    """`type`, a name."""
    name = text(reading.value)
    if name == "_synthetic":
        return Outcome("refused", "made-up rows are not made. Use a file.")
    ours = row_formats.of_axolotl(name, rl=reading.other("rl"))
    wrong = row_formats.problem(ours)
    if wrong:
        return Outcome("refused", f"rows of type {name} are not read. {wrong[1]}", follows=_cause(reading))
    return honoured({(*reading.entry, "format"): ours})


def _cause(reading: Reading) -> str:
    """Returns the key that makes a type's own refusal beside the point."""
    return next((name for name in ("rl", "reward_model", "process_reward_model") if reading.other(name)), "")


_PROMPT_FORMATS = {
    "prompt": ("field_instruction", "field_input", "field_output", "system_prompt", "system_format", "format"),
    "preference": ("field_chosen", "field_rejected", "chosen_format", "rejected_format"),
    "unpaired": ("field_completion", "field_label", "completion_format"),
}


def in_prompt(name: str, convert: Convert = text) -> Entry:
    """Returns the entry of a member of a `type` that is written out as a mapping: a prompt of the user's own."""

    def read(reading: Reading) -> Outcome:
        own = _own(reading).get("type")
        given = own if isinstance(own, Mapping) else {}
        kind = next((kind for kind, names in _PROMPT_FORMATS.items() if any(one in given for one in names)), "prompt")
        settings = {(*reading.entry, "format"): kind, (*reading.entry, *at(name)): convert(reading.value)}
        return honoured(settings)

    return custom("honoured", f"`data.train[].{name}`, and `format`", read)


def output_format(value: Any) -> str:
    """Returns the text around an answer with our placeholder in it."""
    found = text(value)
    for theirs in ("chosen", "rejected", "completion"):
        found = found.replace(f"{{{theirs}}}", "{output}")
    return found


def prompt_system(reading: Reading) -> Outcome:
    """`type.system_prompt`: the system text of rows that bring none."""
    return honoured({(*reading.entry, "format"): "prompt", (*reading.entry, "prompt", "system"): text(reading.value)})


def field_messages(reading: Reading) -> Outcome:
    """`field_messages`: the conversation; of preference rows, what precedes the answers."""
    kind = str(_own(reading).get("type"))
    name = "prompt" if kind.startswith("chat_template.") else "messages"
    return honoured({(*reading.entry, "fields", name): text(reading.value)})


_PROPERTIES = {"role": "role", "content": "content", "reasoning_content": "thinking"}


def properties(reading: Reading) -> Outcome:
    """`message_property_mappings`: the template's name of a key -> the row's."""
    if not isinstance(reading.value, Mapping):
        raise UnreadableError("it must be a mapping.")
    settings: dict[Path, Any] = {}
    for theirs, ours in reading.value.items():
        if ours is None:
            continue
        known = _PROPERTIES.get(str(theirs))
        close = difflib.get_close_matches(str(theirs), ("role", "content"), 1, 0.8)
        if close and not known:
            raise UnreadableError(f"{theirs} is no key that templates read.", f"Did you mean {close[0]}?")
        name = ("fields", known) if known else ("fields", "message_properties", str(theirs))
        settings[(*reading.entry, *name)] = text(ours)
    return honoured(settings)


def thinking_key(reading: Reading) -> Outcome:
    """`template_thinking_key`: where the template looks for a thought."""
    key = text(reading.value)
    if key in ("reasoning_content", "thinking"):
        return Outcome("automatic", "the template sees a thought under reasoning_content and under thinking")
    source = text(_own(reading).get("field_thinking") or "reasoning_content")
    return honoured({(*reading.entry, "fields", "message_properties", key): source})


def roles(value: Any) -> dict[str, list[str]]:
    """Returns other names of roles, ours first."""
    if not isinstance(value, Mapping):
        raise UnreadableError("it must be a mapping.")
    return {str(role): texts(names) for role, names in value.items()}


_END_OF_TURN = ("turn", "all", "last", "none")


def end_of_turn(value: Any) -> str:
    """Returns which turns' end tokens are learned."""
    found = "none" if value is False else str(value)
    if found not in _END_OF_TURN:
        raise UnreadableError("it is not one of the words that Axolotl knows.", advice(str(found), _END_OF_TURN))
    return found


def train_on_eos(reading: Reading) -> Outcome:
    """`train_on_eos`: alone it is about every token that ends a turn."""
    name = "train_on_eos" if _own(reading).get("train_on_eot") is not None else "train_on_end_of_turn"
    return honoured({(*reading.entry, "chat", name): end_of_turn(reading.value)})


def chat_template(reading: Reading) -> Outcome:
    """`chat_template` and `chat_template_jinja` of one dataset."""
    own, value = _own(reading), text(reading.value)
    if value == "jinja" and reading.path[-1] == "chat_template":
        if own.get("chat_template_jinja") is None:
            raise UnreadableError(
                "chat_template: jinja needs chat_template_jinja.", "Set it to the template or a file."
            )
        return Outcome("honoured", "as chat_template_jinja says")
    if reading.path[-1] == "chat_template_jinja" and own.get("chat_template") not in (None, "jinja"):
        return Outcome("no effect", f"chat_template: {own['chat_template']} decides")
    return honoured({(*reading.entry, "chat", "chat_template"): value})


def conversation(reading: Reading) -> Outcome:
    """`conversation`, which went with `type: sharegpt`: a template's name."""
    names = {"chatml": "chatml", "llama3": "llama3", "llama-3": "llama3"}
    value = text(reading.value)
    if value in names:
        return honoured({(*reading.entry, "chat", "chat_template"): names[value]})
    return Outcome("refused", f"conversation: {value} is of FastChat. Name the template as chat_template.")


# Keys about all rows


def validation(reading: Reading) -> Outcome:
    """`val_set_size`: a share, or above 1 a count."""
    value = number(reading.value)
    if value == 0:
        return Outcome("no effect", "0: no rows are held out, as it is here")
    if value == 1 or value < 0 or (value > 1 and value != int(value)):
        raise UnreadableError("it must be a share below 1 or a count of rows above 1.")
    if entries(reading.whole, "test_datasets"):
        raise UnreadableError("val_set_size and test_datasets are both set.", "Keep one of them.")
    return honoured({at("data.validation"): int(value) if value > 1 else value})


def long_rows(reading: Reading) -> Outcome:
    """`excess_length_strategy`."""
    if is_pretraining(reading.whole):
        return Outcome("no effect", "plain texts are cut into pieces, none is lost")
    words = {"drop": "drop", "truncate": "truncate", "raise": "stop"}
    value = str(reading.value).lower()
    if value not in words:
        raise UnreadableError("it is not one of the words that Axolotl knows.", advice(str(value), words))
    return honoured({at("data.on_long"): words[value]})


def train_on_inputs(reading: Reading) -> Outcome:
    """`train_on_inputs`."""
    if not flag(reading.value):
        return Outcome("no effect", "off, as it is here: answers are learned")
    if is_pretraining(reading.whole):
        return Outcome("automatic", "plain text is learned whole")
    return honoured({at("data.train_on"): "all"})


def for_conversations(entry: Entry) -> Entry:
    """Returns the entry of a key about conversations, which plain texts have no use for."""

    def read(reading: Reading) -> Outcome:
        if is_pretraining(reading.whole):
            return Outcome("no effect", "plain texts have no turns")
        return entry.read(reading)

    return custom(entry.kind, entry.means, read)


def template_arguments(reading: Reading) -> Outcome:
    """`chat_template_kwargs`: for every dataset."""
    if not isinstance(reading.value, Mapping):
        raise UnreadableError("it must be a mapping.")
    settings = every_source(reading.whole, "chat.chat_template_kwargs", dict(reading.value))
    return Outcome("honoured", "chat.chat_template_kwargs of every dataset", settings)


def default_system_message(reading: Reading) -> Outcome:
    """`default_system_message`: Axolotl puts it into the template chatml alone."""
    if reading.other("chat_template") != "chatml":
        return Outcome("no effect", "Axolotl reads it for chat_template: chatml alone")
    settings = every_source(reading.whole, "chat.default_system_message", text(reading.value))
    return Outcome("honoured", "chat.default_system_message of every dataset", settings)


def in_order(reading: Reading) -> Outcome:
    """`shuffle_merged_datasets` and `curriculum_sampling`: whether rows keep their order."""
    keeps = flag(reading.value) == (reading.name == "curriculum_sampling")
    if not keeps:
        return Outcome("no effect", "rows are shuffled, as they are here")
    return honoured({at("data.shuffle"): False})


def streaming(reading: Reading) -> Outcome:
    """`streaming`."""
    return honoured({at("data.streaming"): flag(reading.value)})
