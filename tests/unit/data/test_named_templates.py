# ruff: noqa: E501, RUF001 - prompt formats as they are published, one a line
"""Each named template prints exactly its model's published prompt format, and trains what the model writes."""

import pytest

from stoker.data.prepare import SourceOptions, prepare
from stoker.data.template import ALIASES, NAMED, resolve
from stoker.errors import DataError

S, U, A, V, B = "be brief", "hot?", "yes", "how hot?", "900"
SYSTEM = [{"role": "system", "content": S}]
TALK = [
    {"role": "user", "content": U},
    {"role": "assistant", "content": A},
    {"role": "user", "content": V},
    {"role": "assistant", "content": B},
]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. "
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA_HEAD = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)


def header(role, text, end="<|eot_id|>"):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}{end}"


def im(role, text, sep="\n", end="<|im_end|>\n"):
    return f"<|im_start|>{role}{sep}{text}{end}"


def gemma(role, text):
    return f"<start_of_turn>{role}\n{text}<end_of_turn>\n"


def cohere(role, text):
    return f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{text}<|END_OF_TURN_TOKEN|>"


# name -> BOS, EOS, the end of a turn, the text with a system message (None: refused), the text without
CASES = {
    "alpaca": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>{S}\n\n### Instruction:\n{U}\n\n### Response:\n{A}</s>\n\n### Instruction:\n{V}\n\n### Response:\n{B}</s>",
        f"<s>{ALPACA}### Instruction:\n{U}\n\n### Response:\n{A}</s>\n\n### Instruction:\n{V}\n\n### Response:\n{B}</s>",
    ),
    "chatml": (
        None,
        "<|im_end|>",
        "<|im_end|>",
        im("system", S) + im("user", U) + im("assistant", A) + im("user", V) + im("assistant", B),
        im("user", U) + im("assistant", A) + im("user", V) + im("assistant", B),
    ),
    "llama2": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>[INST] <<SYS>>\n{S}\n<</SYS>>\n\n{U} [/INST] {A} </s><s>[INST] {V} [/INST] {B} </s>",
        f"<s>[INST] {U} [/INST] {A} </s><s>[INST] {V} [/INST] {B} </s>",
    ),
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        "<|begin_of_text|>"
        + header("system", S)
        + header("user", U)
        + header("assistant", A)
        + header("user", V)
        + header("assistant", B),
        "<|begin_of_text|>" + header("user", U) + header("assistant", A) + header("user", V) + header("assistant", B),
    ),
    "llama3_1": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        f"<|begin_of_text|>{LLAMA_HEAD}{S}<|eot_id|>"
        + header("user", U)
        + header("assistant", A)
        + header("user", V)
        + header("assistant", B),
        f"<|begin_of_text|>{LLAMA_HEAD}<|eot_id|>"
        + header("user", U)
        + header("assistant", A)
        + header("user", V)
        + header("assistant", B),
    ),
    "llama4": (
        "<|begin_of_text|>",
        "<|eot|>",
        "<|eot|>",
        f"<|begin_of_text|><|header_start|>system<|header_end|>\n\n{S}<|eot|><|header_start|>user<|header_end|>\n\n{U}"
        f"<|eot|><|header_start|>assistant<|header_end|>\n\n{A}<|eot|><|header_start|>user<|header_end|>\n\n{V}<|eot|>"
        f"<|header_start|>assistant<|header_end|>\n\n{B}<|eot|>",
        f"<|begin_of_text|><|header_start|>user<|header_end|>\n\n{U}<|eot|><|header_start|>assistant<|header_end|>\n\n{A}"
        f"<|eot|><|header_start|>user<|header_end|>\n\n{V}<|eot|><|header_start|>assistant<|header_end|>\n\n{B}<|eot|>",
    ),
    "mistral": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>[INST] {S}\n\n{U} [/INST] {A}</s>[INST] {V} [/INST] {B}</s>",
        f"<s>[INST] {U} [/INST] {A}</s>[INST] {V} [/INST] {B}</s>",
    ),
    "mistral_v2v3": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>[INST] {U}[/INST] {A}</s>[INST] {S}\n\n{V}[/INST] {B}</s>",
        f"<s>[INST] {U}[/INST] {A}</s>[INST] {V}[/INST] {B}</s>",
    ),
    "mistral_v3_tekken": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>[INST]{U}[/INST]{A}</s>[INST]{S}\n\n{V}[/INST]{B}</s>",
        f"<s>[INST]{U}[/INST]{A}</s>[INST]{V}[/INST]{B}</s>",
    ),
    "mistral_v7_tekken": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>[SYSTEM_PROMPT]{S}[/SYSTEM_PROMPT][INST]{U}[/INST]{A}</s>[INST]{V}[/INST]{B}</s>",
        f"<s>[INST]{U}[/INST]{A}</s>[INST]{V}[/INST]{B}</s>",
    ),
    "gemma": (
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        None,
        "<bos>" + gemma("user", U) + gemma("model", A) + gemma("user", V) + gemma("model", B),
    ),
    "gemma3": (
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        "<bos>" + gemma("user", f"{S}\n\n{U}") + gemma("model", A) + gemma("user", V) + gemma("model", B),
        "<bos>" + gemma("user", U) + gemma("model", A) + gemma("user", V) + gemma("model", B),
    ),
    "phi_3": (
        None,
        "<|endoftext|>",
        "<|end|>",
        f"<|system|>\n{S}<|end|>\n<|user|>\n{U}<|end|>\n<|assistant|>\n{A}<|end|>\n<|user|>\n{V}<|end|>\n"
        f"<|assistant|>\n{B}<|end|>\n",
        f"<|user|>\n{U}<|end|>\n<|assistant|>\n{A}<|end|>\n<|user|>\n{V}<|end|>\n<|assistant|>\n{B}<|end|>\n",
    ),
    "phi_4": (
        None,
        "<|im_end|>",
        "<|im_end|>",
        "".join(
            im(role, text, "<|im_sep|>", "<|im_end|>")
            for role, text in (("system", S), ("user", U), ("assistant", A), ("user", V), ("assistant", B))
        ),
        "".join(
            im(role, text, "<|im_sep|>", "<|im_end|>")
            for role, text in (("user", U), ("assistant", A), ("user", V), ("assistant", B))
        ),
    ),
    "qwen_25": (
        None,
        "<|im_end|>",
        "<|im_end|>",
        im("system", S) + im("user", U) + im("assistant", A) + im("user", V) + im("assistant", B),
        im("system", QWEN) + im("user", U) + im("assistant", A) + im("user", V) + im("assistant", B),
    ),
    "qwen3": (
        None,
        "<|im_end|>",
        "<|im_end|>",
        im("system", S)
        + im("user", U)
        + im("assistant", A)
        + im("user", V)
        + im("assistant", f"<think>\n\n</think>\n\n{B}"),
        im("user", U) + im("assistant", A) + im("user", V) + im("assistant", f"<think>\n\n</think>\n\n{B}"),
    ),
    "deepseek_v2": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        f"<｜begin▁of▁sentence｜>{S}\n\nUser: {U}\n\nAssistant: {A}<｜end▁of▁sentence｜>User: {V}\n\nAssistant: {B}"
        "<｜end▁of▁sentence｜>",
        f"<｜begin▁of▁sentence｜>User: {U}\n\nAssistant: {A}<｜end▁of▁sentence｜>User: {V}\n\nAssistant: {B}"
        "<｜end▁of▁sentence｜>",
    ),
    "deepseek_v3": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        f"<｜begin▁of▁sentence｜>{S}<｜User｜>{U}<｜Assistant｜>{A}<｜end▁of▁sentence｜><｜User｜>{V}<｜Assistant｜>{B}"
        "<｜end▁of▁sentence｜>",
        f"<｜begin▁of▁sentence｜><｜User｜>{U}<｜Assistant｜>{A}<｜end▁of▁sentence｜><｜User｜>{V}<｜Assistant｜>{B}"
        "<｜end▁of▁sentence｜>",
    ),
    "cohere": (
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>"
        + cohere("SYSTEM", S)
        + cohere("USER", U)
        + cohere("CHATBOT", A)
        + cohere("USER", V)
        + cohere("CHATBOT", B),
        "<BOS_TOKEN>" + cohere("USER", U) + cohere("CHATBOT", A) + cohere("USER", V) + cohere("CHATBOT", B),
    ),
    "vicuna": (
        "<s>",
        "</s>",
        "</s>",
        f"<s>{S} USER: {U} ASSISTANT: {A}</s>USER: {V} ASSISTANT: {B}</s>",
        f"<s>{VICUNA}USER: {U} ASSISTANT: {A}</s>USER: {V} ASSISTANT: {B}</s>",
    ),
    "zephyr": (
        "<s>",
        "</s>",
        "</s>",
        f"<|system|>\n{S}</s>\n<|user|>\n{U}</s>\n<|assistant|>\n{A}</s>\n<|user|>\n{V}</s>\n<|assistant|>\n{B}</s>\n",
        f"<|user|>\n{U}</s>\n<|assistant|>\n{A}</s>\n<|user|>\n{V}</s>\n<|assistant|>\n{B}</s>\n",
    ),
    "falcon": (
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        f"System: {S}\nUser: {U}\nFalcon: {A}<|endoftext|>User: {V}\nFalcon: {B}<|endoftext|>",
        f"User: {U}\nFalcon: {A}<|endoftext|>User: {V}\nFalcon: {B}<|endoftext|>",
    ),
    "falcon3": (
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        f"<|system|>\n{S}\n<|user|>\n{U}\n<|assistant|>\n{A}<|endoftext|>\n<|user|>\n{V}\n<|assistant|>\n{B}<|endoftext|>",
        f"<|user|>\n{U}\n<|assistant|>\n{A}<|endoftext|>\n<|user|>\n{V}\n<|assistant|>\n{B}<|endoftext|>",
    ),
    "olmo": (
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
        f"<|endoftext|><|system|>\n{S}\n<|user|>\n{U}\n<|assistant|>\n{A}<|endoftext|>\n<|user|>\n{V}\n<|assistant|>\n{B}"
        "<|endoftext|>",
        f"<|endoftext|><|user|>\n{U}\n<|assistant|>\n{A}<|endoftext|>\n<|user|>\n{V}\n<|assistant|>\n{B}<|endoftext|>",
    ),
    "exaone": (
        "[BOS]",
        "[|endofturn|]",
        "[|endofturn|]",
        f"[|system|]{S}[|endofturn|]\n[|user|]{U}\n[|assistant|]{A}[|endofturn|]\n[|user|]{V}\n[|assistant|]{B}"
        "[|endofturn|]\n",
        f"[|system|][|endofturn|]\n[|user|]{U}\n[|assistant|]{A}[|endofturn|]\n[|user|]{V}\n[|assistant|]{B}"
        "[|endofturn|]\n",
    ),
    "granite": (
        None,
        "<|end_of_text|>",
        "<|end_of_text|>",
        "".join(
            f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n"
            for role, text in (("system", S), ("user", U), ("assistant", A), ("user", V), ("assistant", B))
        ),
        "".join(
            f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n"
            for role, text in (("user", U), ("assistant", A), ("user", V), ("assistant", B))
        ),
    ),
    "metharme": (
        "<s>",
        "</s>",
        "</s>",
        f"<s><|system|>{S}<|user|>{U}<|model|>{A}</s><|user|>{V}<|model|>{B}</s>",
        f"<s><|user|>{U}<|model|>{A}</s><|user|>{V}<|model|>{B}</s>",
    ),
}


@pytest.fixture
def tokenizer_of(make_tokenizer):
    """Name of a template -> a tokenizer with the special tokens of its model."""

    def build(name):
        bos, eos, end, *_ = CASES[name]
        tokenizer = make_tokenizer(None, bos=bos, eos=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": [end, *_CALL_MARKS.get(name, ())]})
        return tokenizer

    return build


_CALL_MARKS = {
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "mistral_v3_tekken": ("[TOOL_CALLS]", "[INST]", "[/INST]"),
}


def test_every_named_template_has_a_case():
    assert set(CASES) == set(NAMED)
    assert set(ALIASES.values()) <= set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_text_is_the_published_prompt_format(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    with_system, without = CASES[name][3:]
    template = resolve(tokenizer, name)
    assert template.render(TALK).text == without
    if with_system is None:
        with pytest.raises(DataError, match="refuses this conversation"):
            template.render(SYSTEM + TALK)
    else:
        assert template.render(SYSTEM + TALK).text == with_system


@pytest.mark.parametrize("name", NAMED)
def test_answers_and_their_end_train_and_nothing_else(name, tokenizer_of, trained_texts):
    tokenizer = tokenizer_of(name)
    rows = [{"messages": TALK}]
    prepared = prepare([SourceOptions(rows=rows)], tokenizer=tokenizer, sequence_length=4096, template=name)
    ids, trained = prepared.document(0)
    end = CASES[name][2]
    assert [text.replace(" ", "") for text in trained_texts(tokenizer, ids, trained)] == [f"{A}{end}", f"{B}{end}"]
    assert prepared.audit.rows_by_turn == 0
    assert prepared.audit.end_of_turn_share == 1.0


@pytest.mark.parametrize("name", NAMED)
def test_prompt_for_an_answer_is_what_stands_before_it(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    source = resolve(tokenizer, name).source
    text = tokenizer.apply_chat_template(TALK, chat_template=source, tokenize=False)
    prompt = tokenizer.apply_chat_template(TALK[:3], chat_template=source, tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)


CALL = {"id": "abc123def", "type": "function", "function": {"name": "heat", "arguments": {"to": 900, "unit": "C"}}}
TOOL = {
    "type": "function",
    "function": {"name": "heat", "description": "Heats.", "parameters": {"type": "object", "properties": {}}},
}
TOOL_TALK = [
    {"role": "user", "content": U},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "heat", "tool_call_id": "abc123def", "content": "done"},
    {"role": "assistant", "content": A},
]
ARGUMENTS = '{"to": 900, "unit": "C"}'
QWEN_CALL = f'<tool_call>\n{{"name": "heat", "arguments": {ARGUMENTS}}}\n</tool_call>'
MISTRAL_CALL = f'[{{"name": "heat", "arguments": {ARGUMENTS}, "id": "abc123def"}}]'

# name -> what stands after the tools' declaration, and the turns that train
TOOL_CASES = {
    "llama3_1": (
        f"{U}<|eot_id|>"
        + header("assistant", f'{{"name": "heat", "parameters": {ARGUMENTS}}}')
        + header("ipython", '"done"')
        + header("assistant", A),
        [f'{{"name": "heat", "parameters": {ARGUMENTS}}}<|eot_id|>', f"{A}<|eot_id|>"],
    ),
    "qwen_25": (
        im("user", U)
        + im("assistant", QWEN_CALL)
        + im("user", "<tool_response>\ndone\n</tool_response>")
        + im("assistant", A),
        [f"{QWEN_CALL}<|im_end|>", f"{A}<|im_end|>"],
    ),
    "qwen3": (
        im("user", U)
        + im("assistant", QWEN_CALL)
        + im("user", "<tool_response>\ndone\n</tool_response>")
        + im("assistant", f"<think>\n\n</think>\n\n{A}"),
        [f"{QWEN_CALL}<|im_end|>", f"{A}<|im_end|>"],
    ),
    "mistral_v2v3": (
        f'[/AVAILABLE_TOOLS][INST] {U}[/INST][TOOL_CALLS] {MISTRAL_CALL}</s>[TOOL_RESULTS] {{"content": "done", '
        f'"call_id": "abc123def"}}[/TOOL_RESULTS] {A}</s>',
        [f"[TOOL_CALLS] {MISTRAL_CALL}</s>", f"{A}</s>"],
    ),
    "mistral_v3_tekken": (
        f'[/AVAILABLE_TOOLS][INST]{U}[/INST][TOOL_CALLS]{MISTRAL_CALL}</s>[TOOL_RESULTS]{{"content": "done", '
        f'"call_id": "abc123def"}}[/TOOL_RESULTS]{A}</s>',
        [f"[TOOL_CALLS]{MISTRAL_CALL}</s>", f"{A}</s>"],
    ),
    "mistral_v7_tekken": (
        f"[/AVAILABLE_TOOLS][INST]{U}[/INST][TOOL_CALLS]{MISTRAL_CALL}</s>[TOOL_RESULTS]abc123def[TOOL_CONTENT]done"
        f"[/TOOL_RESULTS]{A}</s>",
        [f"[TOOL_CALLS]{MISTRAL_CALL}</s>", f"{A}</s>"],
    ),
    "deepseek_v3": (
        f"<｜User｜>{U}<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>heat\n```json\n{ARGUMENTS}"
        "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>done"
        f"<｜tool▁output▁end｜><｜tool▁outputs▁end｜>{A}<｜end▁of▁sentence｜>",
        [
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>heat\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
            f"{A}<｜end▁of▁sentence｜>",
        ],
    ),
}


@pytest.mark.parametrize("arguments", [CALL["function"]["arguments"], ARGUMENTS], ids=["object", "text"])
@pytest.mark.parametrize("name", TOOL_CASES)
def test_calls_of_tools_train_whole_and_results_do_not(name, arguments, tokenizer_of, trained_texts):
    tokenizer = tokenizer_of(name)
    expected_end, expected = TOOL_CASES[name]
    call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
    talk = [TOOL_TALK[0], TOOL_TALK[1] | {"tool_calls": [call]}, *TOOL_TALK[2:]]
    tools = {} if name == "deepseek_v3" else {"tools": [TOOL]}  # V3's format has no place for declarations
    rows = [{"messages": talk, **tools}]
    prepared = prepare([SourceOptions(rows=rows)], tokenizer=tokenizer, sequence_length=1 << 15, template=name)
    ids, trained = prepared.document(0)
    assert tokenizer.decode(ids).endswith(expected_end)
    assert [text.removeprefix(" ") for text in trained_texts(tokenizer, ids, trained)] == expected
    assert prepared.audit.end_of_turn_share == 1.0


def test_declared_tools_are_printed(tokenizer_of):
    for name in TOOL_CASES:
        if name != "deepseek_v3":
            text = resolve(tokenizer_of(name), name).render(TOOL_TALK, tools=[TOOL]).text
            assert '"description": "Heats."' in text, name


def test_thoughts_leave_the_history_and_stay_after_the_last_question(tokenizer_of, trained_texts):
    """Qwen3's rule: only what follows the last question of the user shows its thought."""
    tokenizer = tokenizer_of("qwen3")
    thought = "<think>\nlook\n</think>\n\n"
    inside = [TALK[0], TALK[1] | {"content": thought + A}, TALK[2], TALK[3] | {"content": thought + B}]
    apart = [message | {"reasoning_content": "look"} if message["role"] == "assistant" else message for message in TALK]
    rows = [{"messages": inside}, {"messages": apart}]
    prepared = prepare([SourceOptions(rows=rows)], tokenizer=tokenizer, sequence_length=4096, template="qwen3")
    for row in range(2):
        assert trained_texts(tokenizer, *prepared.document(row)) == [f"{A}<|im_end|>", f"{thought}{B}<|im_end|>"]
