"""Names of row formats: ours, and those that Axolotl's users know (its `type`), each as one of ours with its options.

Field names and prompt texts of the presets are facts of those formats, from Axolotl's documentation ("Dataset formats",
"RLHF") and, for the Alpaca prompt, from Stanford Alpaca (Taori et al., 2023).
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from stoker.config.schema import Section, Source
from stoker.errors import Problem

FORMATS = {
    "auto": "what most of the first rows have",
    "chat": "messages with roles (also ShareGPT's)",
    "alpaca": "instruction, input and output, as a conversation through the chat template",
    "prompt": "instruction, input and output, in the texts of section `prompt`",
    "prompt_completion": "a prompt and its completion, which trains",
    "completion": "a text, which trains whole",
    "segments": "texts that train or do not",
    "tokenized": "token ids with their labels",
    "preference": "a better and a worse answer to a prompt",
    "unpaired": "an answer and whether it is desirable",
    "stepwise": "steps of a solution and whether each is right",
}
"""Our formats and what a row of each holds."""

JUDGING = ("preference", "unpaired", "stepwise")
"""Those whose rows judge answers: they are prepared and inspected, and not yet trained on."""


def not_learned(what: str, task: str) -> Problem:
    """Returns what is wrong with `what`, a clause that names rows which judge answers."""
    return Problem(
        f"{what}, which task {task} does not learn from.",
        fix="`stoker inspect` shows them. To train on the better answers alone, keep them as chats.",
    )


@dataclass(frozen=True)
class Preset:
    """One of our formats, with what its name stands for: sections `fields`, `prompt` and `chat` of the source."""

    format: str
    fields: dict[str, str] = field(default_factory=dict)
    prompt: dict[str, str] = field(default_factory=dict)
    chat: dict[str, Any] = field(default_factory=dict)


_TASK = "Below is an instruction that describes a task"
_END = "Write a response that appropriately completes the request."
_ALPACA = {
    "system": f"{_TASK}, paired with an input that provides further context. {_END}",
    "system_no_input": f"{_TASK}. {_END}",
}
_ALPACA_SYSTEM = {
    "system": _ALPACA["system"] + "\n\n",
    "system_no_input": _ALPACA["system_no_input"] + "\n\n",
}
_USERS_TASK = "Below is an instruction from a USER that describes a task"
_CONCISE = {
    "system": f"{_USERS_TASK}, paired with an input that provides further context. The ASSISTANT writes a response "
    "that concisely and appropriately completes the request.\n\n",
    "system_no_input": f"{_USERS_TASK}. The ASSISTANT writes a response that appropriately and concisely completes the "
    "request.\n\n",
}
_INSTRUCT = {
    "format": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "no_input_format": "### Instruction:\n{instruction}\n\n### Response:\n",
}
_CHAT = {
    "format": "USER: {instruction}\n{input}\nASSISTANT:",
    "no_input_format": "USER: {instruction}\nASSISTANT:",
}
_CHATML = {
    "format": "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "no_input_format": "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    "system_format": "<|im_start|>system\n{system}<|im_end|>\n",
}
_PHI = {
    "format": "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
    "no_input_format": "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    "system_format": "<|system|>\n{system}<|end|>\n",
}
_ORCA = {
    "format": "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "no_input_format": "### Human:\n{instruction}\n### Assistant:\n",
    "system_format": "### System:\n{system}\n",
}
_CHAT_SYSTEM = {"system_format": "SYSTEM: {system}\n"}
_ORCA_FIELDS = {"system": "system_prompt", "instruction": "question", "output": "response"}
_QA_FIELDS = {"instruction": "question", "output": "answer"}


def _prompt(texts: dict[str, str], *, fields: dict[str, str] | None = None, **more: str) -> Preset:
    return Preset("prompt", fields or {}, texts | more)


def _preference(**fields: str) -> Preset:
    return Preset("preference", fields)


PRESETS: dict[str, Preset] = {
    # Conversations.
    "chat_template": Preset("chat"),
    "sharegpt": Preset("chat"),
    "sharegpt.load_role": Preset("chat", {"role": "role", "content": "value"}),
    "messages": Preset("chat"),
    "messages.chat": Preset("chat"),
    # The Alpaca prompt and its relatives.
    "alpaca_instruct": _prompt(_INSTRUCT, **_ALPACA_SYSTEM),
    "alpaca_instruct.load_no_prompt": _prompt(_INSTRUCT),
    "alpaca_chat": _prompt(_CHAT, **_CHAT_SYSTEM, **_ALPACA),
    "alpaca_chat.load_concise": _prompt(_CHAT, **_CHAT_SYSTEM, **_CONCISE),
    "alpaca_chat.load_qa": _prompt(_CHAT, fields=_QA_FIELDS, **_CHAT_SYSTEM, **_CONCISE),
    "alpaca_chat.load_no_prompt": _prompt(_CHAT),
    "alpaca_chat.load_camel_ai": _prompt(
        _CHAT, fields={"instruction": "message_1", "output": "message_2"}, **_CHAT_SYSTEM, **_CONCISE
    ),
    "alpaca_chatml": _prompt(_CHATML, **_ALPACA),
    "alpaca_phi": _prompt(_PHI, **_ALPACA),
    "alpaca_w_system": _prompt(_CHAT, **_CHAT_SYSTEM),
    "alpaca_w_system.load_chat": _prompt(_CHAT, **_CHAT_SYSTEM),
    "alpaca_w_system.load_instruct": _prompt(_INSTRUCT, system_format="{system}\n\n"),
    "alpaca_w_system.load_open_orca": _prompt(_ORCA, fields=_ORCA_FIELDS),
    "alpaca_w_system.load_open_orca_chatml": _prompt(_CHATML, fields=_ORCA_FIELDS),
    "gpteacher": _prompt(_INSTRUCT, fields={"output": "response"}, **_ALPACA_SYSTEM),
    "oasst": _prompt(_INSTRUCT, fields={"instruction": "INSTRUCTION", "output": "RESPONSE"}, **_ALPACA_SYSTEM),
    "jeopardy": _prompt(
        _INSTRUCT,
        fields={"instruction": "question", "input": "category", "output": "answer"},
        output_format="what is {output}",
        system="Below is a Jeopardy clue paired with input providing the category of the clue. Write a concise "
        "response that best answers tbe clue given the category.\n\n",
    ),
    "summarizetldr": _prompt(
        {"format": "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:"},
        fields={"instruction": "article", "output": "summary"},
    ),
    "orcamini": _prompt({"format": "### System:\n{system}\n\n### User:\n{instruction}\n\n### Response:\n"}),
    "metharme": _prompt({"format": "{instruction}"}, fields={"instruction": "prompt", "output": "generation"}),
    "context_qa": _prompt(
        {"format": "USER: {input}\n===\n{instruction}\nASSISTANT:"},
        fields={"input": "article", **_QA_FIELDS},
        system="Use the following contextual information to concisely answer the question.\n",
    ),
    "context_qa.load_v2": _prompt(
        {"format": "Context: {input}\nQuestion: {instruction}\n"},
        fields={"input": "context", **_QA_FIELDS},
        output_format="Answer: {output}",
    ),
    "user_defined": Preset("prompt"),
    # Texts, segments, tokens.
    "pretrain": Preset("completion"),
    "input_output": Preset("segments"),
    # Preference rows. `chatml.` and `llama3.` only say which chat template prints them.
    "chat_template.default": Preset("preference", {"prompt": "messages"}),
    "chat_template.argilla": _preference(),
    "chat_template.argilla_chat": _preference(),
    "stepwise_supervised": Preset("stepwise"),
    **{
        f"{template}.{name}": Preset(preset.format, preset.fields, chat={"chat_template": template})
        for template in ("chatml", "llama3")
        for name, preset in {
            "argilla": _preference(prompt="instruction", chosen="chosen_response", rejected="rejected_response"),
            "argilla_chat": _preference(),
            "icr": _preference(prompt="input"),
            "intel": _preference(prompt="question"),
            "prompt_pairs": _preference(),
            "ultra": _preference(),
        }.items()
    },
    # The same names mean unpaired rows where Axolotl's `rl` is `kto`.
    **{
        f"kto.{template}.{name}": Preset("unpaired", fields, chat={"chat_template": template})
        for template in ("chatml", "llama3")
        for name, fields in {
            "argilla": {"prompt": "instruction"},
            "argilla_chat": {},
            "intel": {"prompt": "question"},
            "prompt_pairs": {},
            "ultra": {},
        }.items()
    },
}
"""Other names of formats; `.load` at the end of a name changes nothing."""

NOT_READ = {
    "reflection": "Write its prompt out with format: prompt and a section prompt.",
    "explainchoice": "Join the choices into one field and use format: prompt.",
    "concisechoice": "Join the choices into one field and use format: prompt.",
    "context_qa.load_404": "Write the answer into the rows and use format: context_qa.",
    "creative_acr.load_answer": "Use format: prompt with the prompt written out.",
    "creative_acr.load_critique": "Use format: prompt with the prompt written out.",
    "creative_acr.load_revise": "Use format: prompt with the prompt written out.",
    "pygmalion": "Use format: chat with a chat template that prints its roles.",
    "llama2_chat": "Use format: chat with model.chat_template: llama2.",
    **dict.fromkeys(
        (
            *(f"sharegpt.load_{name}" for name in ("guanaco", "ultrachat", "glaive")),
            *(f"sharegpt_simple.load_{name}" for name in ("role", "guanaco", "ultrachat")),
        ),
        "Use format: chat, and say in fields how the rows call messages, role and content.",
    ),
    **dict.fromkeys(
        ("bradley_terry.chat_template", "bradley_terry.llama3"),
        "Reward models are not trained. Their rows are format: preference, which `stoker prepare` and inspect read.",
    ),
    "passthrough.default": "Use format: preference, which reads prompt, chosen and rejected.",
    "zephyr.nectar": "Write the best and worst ranked answers as chosen and rejected and use format: preference.",
}
"""Axolotl's formats that are not read -> what to do instead."""


def problem(name: str) -> tuple[str, str] | None:
    """Returns what is wrong with a format's name and what to do; None for a name that is known."""
    plain = name.removesuffix(".load")
    if plain in FORMATS or plain in PRESETS:
        return None
    if plain in NOT_READ:
        return f"format = {name!r} is not read.", NOT_READ[plain]
    known = [*FORMATS, *PRESETS]
    close = difflib.get_close_matches(plain, known, 1, 0.6)
    return (
        f"format = {name!r} is not known.",
        f"Did you mean {close[0]}?" if close else f"Use one of {', '.join(FORMATS)}.",
    )


def expanded(source: Source) -> Source:
    """Returns the source with one of our formats: a preset's fields and texts stand beneath what the user set.

    Raises ValueError for a name that is not known; configuration rules find those.
    """
    wrong = problem(source.format)
    if wrong:
        raise ValueError(" ".join(wrong))
    name = source.format.removesuffix(".load")
    if name not in PRESETS:
        return source.model_copy(update={"format": name})
    preset = PRESETS[name]
    sections = {
        part: getattr(source, part).model_copy(
            update={
                key: value
                for key, value in getattr(preset, part).items()
                if getattr(getattr(source, part), key) == _default(getattr(source, part), key)
            }
        )
        for part in ("fields", "prompt", "chat")
    }
    return source.model_copy(update={"format": preset.format, **sections})


def _default(section: Section, key: str) -> Any:
    """What the schema says of a key: a run's own config.yaml spells out what nobody set, which must mean the same."""
    return type(section).model_fields[key].get_default(call_default_factory=True)


def of_axolotl(type_name: str, *, rl: str | None = None) -> str:
    """Returns our name of Axolotl's `datasets[].type`, given its `rl`; the same name where both mean the same.

    Axolotl prints `alpaca` rows in the Alpaca prompt, ours go through the chat template: there the names differ.
    """
    base, _, style = type_name.partition(":")
    base = base.removesuffix(".load")
    if base == "alpaca":
        styles = {"": "alpaca_instruct", "instruct": "alpaca_instruct", "chat": "alpaca_chat"}
        return styles.get(style, f"alpaca_{style}")
    if rl == "kto" and f"kto.{base}" in PRESETS:
        return f"kto.{base}"
    return {"": "tokenized", "chat_template": "chat", "sharegpt": "chat"}.get(base, base)
