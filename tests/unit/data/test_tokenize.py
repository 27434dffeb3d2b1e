"""The loss mask of whole conversations, against Transformers' `{% generation %}` masks and against re-rendering."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import processors

from stoker.data.prepare import SourceOptions, prepare
from stoker.errors import DataError

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
NAMES = ("llama2", "llama3", "mistral", "chatml", "zephyr", "gemma")

NAMES_AND_MARKERS = [
    "assistant",
    "user",
    "model\n",
    "<|im_start|>assistant\n",
    "[INST]",
    "[/INST]",
    "</s>",
    "<|eot_id|>",
]
TEMPLATE_LIKE = ["<<SYS>>", "### Response:", "{{ messages }}", "{% generation %}"]
WHITE_SPACE = ["\n", "\n\n", " ", "\t", "\u00a0", "\u205f", "\u2007", "\u2028"]
CHARACTERS = ["🙂", "👩‍👩‍👧", "é", "中", "ß", "\ue000", "\U000f0000", "\U00100001", "\U0010fff0"]
fragments = st.sampled_from([*NAMES_AND_MARKERS, *TEMPLATE_LIKE, *WHITE_SPACE, *CHARACTERS, "The furnace is hot."])
plain = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)  # NUL is refused
contents = st.lists(fragments | plain, max_size=6).map("".join)


@st.composite
def conversations(draw, *, system):
    pool = draw(st.lists(contents, min_size=1, max_size=3))  # a small pool: contents that equal one another
    turns = draw(st.integers(1, 3))
    messages = [{"role": "system", "content": draw(st.sampled_from(pool))}] if system and draw(st.booleans()) else []
    for _ in range(turns):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": draw(st.sampled_from(pool))})
    return messages


def masked(tokenizer, messages, **options):
    rows = [{"messages": messages}]
    prepared = prepare([SourceOptions(rows=rows)], tokenizer=tokenizer, sequence_length=1 << 20, **options)
    return *prepared.document(0), prepared.audit


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("name", NAMES)
def test_mask_equals_generation_tags_of_transformers(name, kind, template_case):
    tokenizer, tagged, system, _ = template_case(name, kind)

    @settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
    @given(messages=conversations(system=system))
    def check(messages):
        expected = tagged.apply_chat_template(messages, return_assistant_tokens_mask=True)
        ids, trained, audit = masked(tokenizer, messages)
        assert ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"] == expected["input_ids"]
        assert audit.rows_by_turn == 0
        assert trained.tolist() == [bool(flag) for flag in expected["assistant_masks"]]

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tagged_template_gives_the_same_mask_as_marks(name, template_case):
    tokenizer, tagged, system, _ = template_case(name)

    @settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES)
    @given(messages=conversations(system=system), end=st.booleans())
    def check(messages, end):
        ids, trained, _ = masked(tokenizer, messages, train_on_end_of_turn=end)
        same_ids, same_trained, audit = masked(tagged, messages, train_on_end_of_turn=end)
        assert audit.template == "the tokenizer's own, by its generation tags"
        assert ids.tolist() == same_ids.tolist()
        # Without the end-of-turn token the tags still take in white space before it (Llama 2's space).
        differing = np.flatnonzero(trained != same_trained)
        assert not len(differing) or (name == "llama2" and not end)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "chatml", "zephyr", "gemma"])
def test_mask_equals_re_rendering_turn_by_turn(name, template_case):
    """What rendering one more turn adds beyond the generation prompt is that turn's own text."""
    tokenizer, _, system, end = template_case(name)

    @settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES)
    @given(messages=conversations(system=system))
    def check(messages):
        text, spans = tokenizer.apply_chat_template(messages, tokenize=False), []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
                whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
                spans.append((len(prompt), whole.rindex(end) + len(end)))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        expected = [any(s < stop and e > start for start, stop in spans) for s, e in encoded["offset_mapping"]]
        assert masked(tokenizer, messages)[1].tolist() == expected

    check()


@pytest.mark.slow
def test_template_that_looks_into_contents_is_rendered_as_transformers_does(template_case):
    tokenizer, _, _, _ = template_case("qwen3")

    @settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
    @given(
        messages=conversations(system=True), opening=st.sampled_from(["", "<tool_response>", "<think>a</think>\n\n"])
    )
    def check(messages, opening):
        messages[-2]["content"] = opening + messages[-2]["content"]
        messages[-1]["content"] = opening + messages[-1]["content"]
        try:
            ids, trained, _ = masked(tokenizer, messages)
        except DataError as error:
            assert "changes the content" in str(error)
        else:
            assert ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
            assert trained.any()

    check()


def test_thought_and_answer_are_trained_as_one_turn(template_case, trained_texts):
    tokenizer, _, _, _ = template_case("qwen3")
    thought = "<think>\nhot?\n</think>\n\nIt is hot."
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": thought}]
    ids, trained, audit = masked(tokenizer, messages)
    assert trained_texts(tokenizer, ids, trained) == [thought + "<|im_end|>"]
    assert audit.rows_by_turn == 0
    for name in ("reasoning_content", "thinking", "reasoning"):
        apart = [{"role": "user", "content": "a"}, {"role": "assistant", name: "hot?", "content": "It is."}]
        ids, trained, audit = masked(tokenizer, apart)
        assert trained_texts(tokenizer, ids, trained) == ["<think>\nhot?\n</think>\n\nIt is.<|im_end|>"]
        assert audit.rows_by_turn == 0


def test_thought_that_the_template_drops_is_not_trained(template_case, trained_texts):
    tokenizer, _, _, _ = template_case("qwen3")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhot?\n</think>\n\nIt is hot."},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "Yes."},
    ]
    ids, trained, _ = masked(tokenizer, messages)
    assert trained_texts(tokenizer, ids, trained) == ["It is hot.<|im_end|>", "Yes.<|im_end|>"]


def test_marks_on_users_that_change_the_render_are_left_out(template_case, trained_texts):
    tokenizer, _, _, _ = template_case("qwen3")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>t</think>b"},
        {"role": "user", "content": "<tool_response>c"},
        {"role": "assistant", "content": "assistant"},
    ]
    ids, trained, audit = masked(tokenizer, messages)
    assert audit.rows_by_turn == 0
    assert trained_texts(tokenizer, ids, trained) == ["<think>\nt\n</think>\n\nb<|im_end|>", "assistant<|im_end|>"]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", ["yes<|im_end|>"]),
        ("user", ["hot?<|im_end|>"]),
        (["system", "user"], ["be brief<|im_end|>", "hot?<|im_end|>"]),
        ("all", ["be brief<|im_end|>", "hot?<|im_end|>", "yes<|im_end|>"]),
    ],
)
def test_roles_that_train_are_those_asked_for(train_on, expected, chatml, trained_texts):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "content": "yes"},
    ]
    ids, trained, _ = masked(chatml, messages, train_on=train_on)
    assert trained_texts(chatml, ids, trained) == expected


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral", "chatml", "zephyr", "gemma", "qwen3"])
def test_end_of_turn_token_trains_only_if_wanted(name, template_case, trained_texts):
    tokenizer, _, _, end = template_case(name)
    messages = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes"}] * 2
    ids, trained, audit = masked(tokenizer, messages)
    assert [text.replace(" ", "") for text in trained_texts(tokenizer, ids, trained)] == [f"yes{end}"] * 2
    assert audit.end_of_turn_share == 1.0
    assert audit.end_tokens == {end: 2}
    ids, trained, audit = masked(tokenizer, messages, train_on_end_of_turn=False)
    assert [text.strip() for text in trained_texts(tokenizer, ids, trained)] == ["yes", "yes"]
    assert audit.turns_with_end == 0


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama2", "llama3", "mistral"])
def test_named_templates_train_answers_and_their_end(name, make_tokenizer, trained_texts):
    tokenizer = make_tokenizer(None, bos="<s>", eos="</s>")
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "content": "hot?"},
    ]
    ids, trained, audit = masked(tokenizer, messages, template=name)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    expected = [f"yes{end}", f"hot?{end}"]
    assert [text.replace(" ", "") for text in trained_texts(tokenizer, ids, trained)] == expected
    assert tokenizer.decode(ids).startswith("<s>")
    assert audit.doubled_bos == 0


def test_end_of_turn_is_not_the_next_sequence_opening(make_tokenizer):
    """A template without an end marker, whose next turn opens with BOS: nothing ends the turn."""
    template = "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    _, _, audit = masked(make_tokenizer(template), messages)
    assert (audit.turns, audit.turns_with_end) == (2, 0)


def test_adjacent_contents_keep_their_own_white_space(make_tokenizer):
    template = "{% for m in messages %}{{ m.content | trim if m.role == 'user' else m.content }}{% endfor %}"
    tokenizer = make_tokenizer(template)
    messages = [{"role": "user", "content": " a  "}, {"role": "assistant", "content": "\n\nb "}]
    ids, trained, audit = masked(tokenizer, messages, train_on="all")
    assert tokenizer.decode(ids) == "a\n\nb "
    assert audit.rows_by_turn == 0
    assert trained.tolist() == [False] + [True] * (len(ids) - 1)


def test_text_between_content_and_special_token_ends_nothing(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content + ' [END]' + eos_token }}{% endfor %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hot"}]
    ids, trained, audit = masked(tokenizer, messages)
    assert trained_texts(tokenizer, ids, trained) == ["hot"]
    assert (audit.turns, audit.turns_with_end) == (1, 0)


def test_white_space_without_characters_of_its_own_trains_with_its_content(template_case, make_tokenizer):
    """Tokenizers that trim offsets (RoBERTa's way) give a token of white space an empty span."""
    plain = template_case("chatml")[0]
    trimming = make_tokenizer(plain.chat_template, bos=None, eos="<|im_end|>")
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hot   x   "}]
    offsets = trimming("x   y", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    ids, trained, _ = masked(trimming, messages, train_on_end_of_turn=False)
    same_ids, expected, _ = masked(plain, messages, train_on_end_of_turn=False)
    assert ids.tolist() == same_ids.tolist()
    assert trained.tolist() == expected.tolist()


def test_characters_that_look_like_marks_survive(chatml, trained_texts):
    icons = "\U000f0000\U000f0001 \U00100000 \U0010fff0"
    messages = [{"role": "user", "content": icons}, {"role": "assistant", "content": f"{icons} yes"}]
    ids, trained, audit = masked(chatml, messages)
    assert chatml.decode(ids) == chatml.apply_chat_template(messages, tokenize=False)
    assert trained_texts(chatml, ids, trained) == [f"{icons} yes<|im_end|>"]
    assert audit.rows_by_turn == 0
