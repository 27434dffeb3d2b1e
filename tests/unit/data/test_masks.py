"""Masks where contents alone do not tell them: calls of tools, and templates that rewrite what they print.

The truth is Transformers' own: its `{% generation %}` masks, or its text rendered up to one turn and up to the next.
"""

import time

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from stoker.data.options import ChatOptions
from stoker.data.prepare import SourceOptions, prepare
from stoker.data.template import resolve
from stoker.errors import DataError

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MARKERS = [
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "</think>",
    "<think>",
    "[INST]",
    "[/INST]",
    "</s>",
    "\n\n",
    " ",
    "é 🙂",
]
words = st.lists(
    st.sampled_from([*MARKERS, "assistant", "hot", "yes", "no", "{}", '"', "\\n", "\U000f0000"]), max_size=5
).map("".join)
arguments = st.dictionaries(st.sampled_from(["to", "unit"]), st.one_of(words, st.integers(), st.none()), max_size=2)


@st.composite
def tool_talks(draw):
    """Questions, calls of one tool, results and answers, with contents that may look like markers."""
    talk = []
    for _ in range(draw(st.integers(1, 2))):
        talk.append({"role": "user", "content": draw(words)})
        for _ in range(draw(st.integers(0, 2))):
            function = {"name": draw(st.sampled_from(["heat", "cool"])), "arguments": draw(arguments)}
            call = {"id": "abc123def", "type": "function", "function": function}
            talk.append({"role": "assistant", "content": "", "tool_calls": [call]})
            talk.append({"role": "tool", "name": "heat", "tool_call_id": "abc123def", "content": draw(words)})
        talk.append({"role": "assistant", "content": draw(words.filter(str.strip))})
    return talk


def masked(tokenizer, messages, **options):
    rows = [{"messages": messages}]
    found = prepare([SourceOptions(rows=rows)], tokenizer=tokenizer, sequence_length=1 << 20, **options)
    return *found.document(0), found.audit


# The end of a turn, and what the model writes of an answer's white space: Mistral's space is the template's.
PREFIX_STABLE = {
    "chatml": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "qwen_25": "<|im_end|>",
    "mistral_v3_tekken": "</s>",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PREFIX_STABLE if name != "chatml"])
def test_calls_and_answers_train_as_re_rendering_turn_by_turn_says(name, make_tokenizer):
    tokenizer = make_tokenizer(None, eos=PREFIX_STABLE[name])
    tokenizer.chat_template = resolve(tokenizer, name).source
    end = PREFIX_STABLE[name]

    @settings(max_examples=20, deadline=None, suppress_health_check=FIXTURES)
    @given(messages=tool_talks())
    def check(messages):
        text, spans = tokenizer.apply_chat_template(messages, tokenize=False), []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
                whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
                stop = whole.rindex(end) + len(end)
                start = len(prompt)
                if not message.get("tool_calls") and name != "llama3_1":  # white space before a content is its own
                    assert text.startswith(message["content"], start)
                spans.append((start, stop))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        expected = [any(s < stop and e > start for start, stop in spans) for s, e in encoded["offset_mapping"]]
        expected[0] = False
        ids, trained, _ = masked(tokenizer, messages)
        assert ids.tolist() == encoded["input_ids"]
        assert trained.tolist() == expected

    check()


# What a template may do to a content, and what its mask must be: `{}` stands for the content.
REWRITES = {
    "cut": "{}[:4]",
    "split": "{}.split('no')[0]",
    "last part": "{}.split('no')[-1]",
    "replaced": "{}.replace('yes', 'indeed')",
    "upper": "({} | upper)",
    "trimmed": "({} | trim)",
    "words": "({}.split() | join(' '))",
    "if long": "({} if {} | length > 3 else 'short')",
    "reversed": "({} | reverse)",
    "json": "({} | tojson)",
    "twice": "({} + {})",
    "quoted": "('<' + {} + '>')",
}


def _template(rewrite, *, tagged):
    said = rewrite.format("m.content", "m.content")
    answer = "{{ " + said + " + eos_token }}"
    if tagged:
        answer = "{% generation %}" + answer + "{% endgeneration %}"
    return (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", REWRITES)
def test_rewritten_contents_train_as_generation_tags_say_or_are_refused(name, make_tokenizer):
    plain, tagged = (make_tokenizer(_template(REWRITES[name], tagged=tagged)) for tagged in (False, True))

    @settings(max_examples=25, deadline=None, suppress_health_check=FIXTURES)
    @given(talk=st.lists(st.tuples(words, words), min_size=1, max_size=2))
    @example(talk=[("", "</s>")])
    @example(talk=[("", "<|im_end|>"), ("no", "")])
    @example(talk=[("assistant", "assistant")])
    @example(talk=[("", "no<|im_start|>assistant\n</think>")])
    @example(talk=[("", "no hot <think> yes")])
    @example(talk=[("", "no hot <think>yes</think> cold")])
    @example(talk=[("", "no\n\n<think>")])
    @example(talk=[("", '"\n\n')])
    def check(talk):
        messages = [
            {"role": role, "content": text}
            for pair in talk
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        expected = tagged.apply_chat_template(messages, return_assistant_tokens_mask=True)
        try:
            ids, trained, _ = masked(plain, messages)
        except DataError as error:
            assert "is not certain" in str(error)  # never a guess
            return
        assert ids.tolist() == expected["input_ids"]
        flags = [bool(flag) for flag in expected["assistant_masks"]]
        # A template's own characters around a content are not the content's; what it makes of the content is.
        differing = [index for index, (a, b) in enumerate(zip(trained.tolist(), flags, strict=True)) if a != b]
        if name not in ("quoted", "json", "if long"):
            assert not differing
        assert all(flags[index] for index in differing)

    check()


def test_whole_turn_of_an_answer_trains_where_its_content_is_rewritten(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer(_template(REWRITES["cut"], tagged=False))
    messages = [{"role": "user", "content": "how hot?"}, {"role": "assistant", "content": "very hot"}]
    ids, trained, audit = masked(tokenizer, messages)
    assert trained_texts(tokenizer, ids, trained) == ["very</s>"]
    assert (audit.rows_by_turn, audit.end_of_turn_share) == (1, 1.0)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        # The content of a user stands twice in its turn: either may be meant.
        (
            "{% for m in messages %}{{ m.content[:9] }}{{ m.content[:9] }}{% endfor %}",
            [{"role": "user", "content": "hot? now!"}],
            r"row 1: the chat template changes the content of message 0 \(user\)",
        ),
        # The answer's turn does not begin as the prompt for an answer does.
        (
            "{% for m in messages %}{{ m.role + m.content[:3] }}{% endfor %}{{ 'A:' if add_generation_prompt }}",
            [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "very"}],
            r"row 1: the chat template does not print after its prompt for an answer message 1 \(assistant\)",
        ),
        # What stands in the turn of a user may be the template's own word.
        (
            "{% for m in messages %}{{ 'user: ' + m.content | upper }}{% endfor %}{{ messages[0].content[:0] }}",
            [{"role": "user", "content": "user", "name": "\U000f0000"}],
            r"row 1: the chat template changes the content of message 0 \(user\)",
        ),
        # No loop over the messages prints the answer.
        (
            "{{ messages[0].content[:4] }}{{ messages[1].content[:4] }}",
            [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes!"}],
            r"row 1: the chat template does not print in its loop message 1 \(assistant\)",
        ),
        # A call that the template leaves out.
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}], "content": ""}],
            r"row 1: the chat template leaves out message 1 \(assistant\)",
        ),
    ],
)
def test_what_cannot_be_placed_is_an_error_that_names_row_and_message(template, messages, message, make_tokenizer):
    chat = ChatOptions(train_on=("user", "assistant"))
    if len(messages) == 2:
        chat = ChatOptions()
    source = SourceOptions(rows=[{"messages": messages}], chat=chat)
    with pytest.raises(DataError, match=message):
        prepare([source], tokenizer=make_tokenizer(template), sequence_length=512)


def test_answer_is_looked_for_behind_its_prompt_alone(make_tokenizer, trained_texts):
    """The word of a content may stand in the template's own text too."""
    template = _template(REWRITES["upper"], tagged=False)
    tokenizer = make_tokenizer(template)
    messages = [{"role": "user", "content": "a", "name": "\U000f0000"}, {"role": "assistant", "content": "assistant"}]
    ids, trained, audit = masked(tokenizer, messages)
    assert trained_texts(tokenizer, ids, trained) == ["ASSISTANT</s>"]
    assert audit.rows_by_turn == 1


def test_only_what_trains_must_be_certain(make_tokenizer, trained_texts):
    """A user's content that the template rewrites beyond finding is no obstacle to training the answer."""
    template = (
        "{% for m in messages %}{{ m.content[:3] if m.role == 'user' else m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    messages = [{"role": "user", "content": "how hot?"}, {"role": "assistant", "content": "how"}]
    ids, trained, _ = masked(tokenizer, messages)
    assert trained_texts(tokenizer, ids, trained) == ["how</s>"]


def test_results_of_tools_inside_one_turn_of_the_user_do_not_train(make_tokenizer, trained_texts):
    """Qwen prints neighbouring results as one turn of the user."""
    tokenizer = make_tokenizer(None, eos="<|im_end|>")
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("heat", "cool")]
    messages = [
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "content": "wait", "tool_calls": calls},
        {"role": "tool", "content": "yes"},
        {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "yes"},
    ]
    ids, trained, _ = masked(tokenizer, messages, template="qwen_25")
    called = "".join(
        f'\n<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>' for name in ("heat", "cool")
    )
    assert trained_texts(tokenizer, ids, trained) == [f"wait{called}<|im_end|>", "yes<|im_end|>"]


def test_call_beside_a_content_trains_whole_where_marks_do_not_serve(make_tokenizer, trained_texts):
    """Private-use characters outside contents keep marks from being used."""
    tokenizer = make_tokenizer(None, eos="<|im_end|>")
    call = {"function": {"name": "heat", "arguments": {"to": "\U000f0000"}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "wait", "tool_calls": [call]}]
    ids, trained, audit = masked(tokenizer, messages, template="qwen_25")
    called = '\n<tool_call>\n{"name": "heat", "arguments": {"to": "\U000f0000"}}\n</tool_call>'
    assert trained_texts(tokenizer, ids, trained) == [f"wait{called}<|im_end|>"]
    assert audit.rows_by_turn == 1


LONG = {
    "chatml": lambda number: [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes, hot"}],
    "qwen3": lambda number: [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes, hot"}],
    "llama3_1": lambda number: [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "\nyes "}],
    "qwen_25": lambda number: [
        {"role": "user", "content": f"{number}?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "heat", "arguments": {"to": number}}]},
    ],
    "{% for m in messages %}{{ m.content[:8] + eos_token }}{% endfor %}": lambda number: [
        {"role": "user", "content": f"{number}?"},
        {"role": "assistant", "content": "yes, it is hot"},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("template", LONG, ids=lambda name: name if len(name) < 20 else "rewriting")
def test_two_thousand_turns_prepare_in_less_than_a_second(template, make_tokenizer):
    tokenizer = make_tokenizer(None)
    messages = [message for number in range(1000) for message in LONG[template](number)]
    masked(tokenizer, messages[:4], template=template)
    start = time.process_time()
    _, trained, audit = masked(tokenizer, messages, template=template)
    assert time.process_time() - start < 1.0
    assert audit.turns == 1000
    assert trained.any()
