import pytest

from stoker.config import row_formats
from stoker.config.load import parse
from stoker.config.schema import Fields, PromptTexts, Source
from stoker.data import formats
from stoker.errors import ConfigError


def values(**source):
    return {
        "model": {"base": "m"},
        "data": {"train": [{"path": "a.jsonl", **source}]},
        "train": {"learning_rate": 1e-4},
        "output": {"folder": "out"},
    }


@pytest.mark.parametrize("name", [*row_formats.PRESETS, "alpaca_chat.load", "chat.load"])
def test_every_preset_is_a_source_of_one_of_our_formats(name):
    source = row_formats.expanded(Source(path="a", format=name))
    assert source.format in row_formats.FORMATS
    assert set(source.fields.model_dump(exclude_none=True)) <= set(Fields.model_fields)
    PromptTexts.model_validate(source.prompt.model_dump())
    if source.format == "prompt" and name != "user_defined":
        assert "{instruction}" in (source.prompt.format or "")


def test_formats_that_judge_are_those_whose_rows_are_no_documents():
    assert set(row_formats.JUDGING) == {name for name, form in formats.FORMATS.items() if form.kind != "documents"}


def test_what_the_user_sets_stands_above_the_preset():
    source = Source(
        path="a", format="alpaca_chat.load_qa", fields=Fields(output="reply"), prompt=PromptTexts(system="")
    )
    found = row_formats.expanded(source)
    assert (found.fields.instruction, found.fields.output, found.prompt.system) == ("question", "reply", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpca", "data.train[0].format = 'alpca' is not known. Did you mean alpaca?"),
        ("reflection", "format = 'reflection' is not read. Write its prompt out with format: prompt"),
        ("prompt", "data.train[0].format = prompt: the prompt's text is missing."),
    ],
)
def test_a_format_that_cannot_be_read_is_named(name, message):
    with pytest.raises(ConfigError) as raised:
        parse(values(format=name))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("theirs", "rl", "ours"),
    [
        ("alpaca", None, "alpaca_instruct"),
        ("alpaca:chat", None, "alpaca_chat"),
        ("alpaca:chatml", None, "alpaca_chatml"),
        ("alpaca:phi", None, "alpaca_phi"),
        ("alpaca:instruct", None, "alpaca_instruct"),
        ("alpaca.load", None, "alpaca_instruct"),
        ("alpaca_w_system.load_open_orca", None, "alpaca_w_system.load_open_orca"),
        ("chat_template", None, "chat"),
        ("", None, "tokenized"),
        ("llama3.ultra", "kto", "kto.llama3.ultra"),
        ("llama3.ultra", "dpo", "llama3.ultra"),
        ("input_output", None, "input_output"),
    ],
)
def test_axolotls_types_have_a_name_here(theirs, rl, ours):
    assert row_formats.of_axolotl(theirs, rl=rl) == ours
    assert row_formats.problem(ours) is None


def test_a_preset_means_the_same_once_a_run_has_spelt_out_what_nobody_set():
    source = Source(path="rows.jsonl", format="alpaca_instruct")

    assert row_formats.expanded(Source.model_validate(source.model_dump())) == row_formats.expanded(source)


def test_a_style_of_alpacas_that_nobody_knows_is_refused():
    ours = row_formats.of_axolotl("alpaca:pi")
    assert row_formats.problem(ours) == ("format = 'alpaca_pi' is not known.", "Did you mean alpaca_phi?")


SYSTEM = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and "
    "concisely completes the request."
)


@pytest.mark.parametrize(
    ("theirs", "row", "printed"),
    [
        ("alpaca", {"instruction": "A"}, f"{SYSTEM}\n\n### Instruction:\nA\n\n### Response:\n"),
        ("alpaca:chat", {"instruction": "A"}, f"SYSTEM: {SYSTEM}\nUSER: A\nASSISTANT:"),
        ("alpaca_chat.load", {"instruction": "A"}, f"SYSTEM: {SYSTEM}\nUSER: A\nASSISTANT:"),
        ("alpaca_chat.load_qa", {"question": "A"}, f"SYSTEM: {CONCISE}\n\n\nUSER: A\nASSISTANT:"),
        ("alpaca_chat.load_no_prompt", {"instruction": "A"}, "USER: A\nASSISTANT:"),
        (
            "alpaca:chatml",
            {"instruction": "A"},
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("alpaca:phi", {"instruction": "A"}, f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\nA<|end|>\n<|assistant|>\n"),
        ("alpaca_w_system.load_chat", {"instruction": "A", "system": "S"}, "SYSTEM: S\nUSER: A\nASSISTANT:"),
        (
            "alpaca_w_system.load_instruct",
            {"instruction": "A", "system": "S"},
            "S\n\n### Instruction:\nA\n\n### Response:\n",
        ),
        (
            "alpaca_w_system.load_open_orca",
            {"question": "A", "system_prompt": "S"},
            "### System:\nS\n### Human:\nA\n### Assistant:\n",
        ),
    ],
)
def test_prompts_are_printed_as_axolotl_prints_them(theirs, row, printed):
    """The texts are those of Axolotl's prompters."""
    source = row_formats.expanded(Source(path="a", format=row_formats.of_axolotl(theirs)))
    fields = source.fields.model_dump(exclude_none=True)
    texts = source.prompt
    named = {ours: row.get(fields.get(ours, ours), "") for ours in ("instruction", "input", "system")}
    system = named["system"] or texts.system_no_input or texts.system or ""
    before = texts.system_format.replace("{system}", system) if system else ""
    form = texts.no_input_format or texts.format
    assert before + form.replace("{instruction}", named["instruction"]) == printed
