"""What trains in a row: of every format, and by every option of a source."""

import numpy as np
import pytest

from stoker.data.audit import problems, warnings
from stoker.data.loader import StepLoader
from stoker.data.options import ChatOptions, PromptTexts
from stoker.data.prepare import SourceOptions, prepare
from stoker.data.records import Given
from stoker.data.rows import RowReader
from stoker.data.tokenize import Tokenizer
from stoker.errors import DataError

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hot?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "how?"},
    {"role": "assistant", "content": "very"},
]


def prepared(tokenizer, rows, *, fields=None, chat=None, prompt=None, form="auto", **options):
    source = SourceOptions(
        rows=rows,
        format=form,
        fields=fields or {},
        chat=ChatOptions(**(chat or {})),
        prompt=PromptTexts(**(prompt or {})),
    )
    return prepare([source], tokenizer=tokenizer, sequence_length=1 << 15, **options)


@pytest.fixture
def trained(chatml, trained_texts):
    """Rows and options -> the trained texts of the first row, with the ChatML template."""

    def texts(rows, **options):
        return trained_texts(chatml, *prepared(chatml, rows, **options).document(0))

    return texts


# ---- options of conversations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("turn", ["yes<|im_end|>", "very<|im_end|>"]),
        ("all", ["<|im_end|>", "<|im_end|>", "yes<|im_end|>", "<|im_end|>", "very<|im_end|>"]),
        ("last", ["yes", "very<|im_end|>"]),
        ("none", ["yes", "very"]),
    ],
)
def test_end_of_turn_trains_where_it_is_asked_to(choice, expected, trained):
    assert trained([{"messages": TALK}], train_on_end_of_turn=choice) == expected
    assert trained([{"messages": TALK}], chat={"train_on_end_of_turn": choice}) == expected


@pytest.mark.parametrize("choice", ["last", "none"])
def test_ends_that_are_not_asked_for_are_not_missed(choice, chatml):
    for options in ({"train_on_end_of_turn": choice}, {"chat": {"train_on_end_of_turn": choice}}):
        audit = prepared(chatml, [{"messages": TALK}], **options).audit
        assert not problems(audit)
        assert not warnings(audit)


def test_last_end_of_turn_is_the_conversations_even_where_the_user_has_it(trained):
    assert trained([{"messages": TALK[:4]}], train_on_end_of_turn="last") == ["yes", "<|im_end|>"]


def test_eos_may_train_otherwise_than_other_ends_of_turns(make_tokenizer, trained_texts):
    """A user's turn ends with a marker of its own, an answer with EOS, as in Mistral's format."""
    template = "{% for m in messages %}{{ m.content + ('<|eot_id|>' if m.role == 'user' else eos_token) }}{% endfor %}"
    tokenizer = make_tokenizer(template)
    rows = [{"messages": TALK[1:]}]
    both = prepared(tokenizer, rows, chat={"train_on_end_of_turn": "all", "train_on_eos": "none"})
    assert trained_texts(tokenizer, *both.document(0)) == ["<|eot_id|>yes", "<|eot_id|>very"]
    last = prepared(tokenizer, rows, chat={"train_on_end_of_turn": "none", "train_on_eos": "last"})
    assert trained_texts(tokenizer, *last.document(0)) == ["yes", "very</s>"]


def test_eos_of_a_turn_that_does_not_train_stays_untrained_unless_all_are_asked_for(chatml, trained_texts):
    """ChatML ends every turn with this tokenizer's EOS, a user's too."""
    for eos, expected in (("turn", ["yes<|im_end|>"]), ("all", ["<|im_end|>", "yes<|im_end|>"])):
        found = prepared(chatml, [{"messages": TALK[1:3]}], chat={"train_on_end_of_turn": "all", "train_on_eos": eos})
        assert trained_texts(chatml, *found.document(0)) == expected


def test_named_end_of_turn_tokens_alone_end_turns(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}")
    rows = [{"messages": TALK[1:3]}]
    named = prepared(tokenizer, rows, end_of_turn_tokens=["<|eot_id|>"])
    assert trained_texts(tokenizer, *named.document(0)) == ["yes<|eot_id|>"]
    other = prepared(tokenizer, rows, end_of_turn_tokens=["</s>"])
    assert trained_texts(tokenizer, *other.document(0)) == ["yes"]
    assert other.audit.turns_with_end == 0
    with pytest.raises(DataError, match="end_of_turn_tokens: '<end>' is not a token"):
        prepared(tokenizer, rows, end_of_turn_tokens=["<end>"])


def test_end_of_turn_token_need_not_be_special(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content + ';' }}{% endfor %}")
    tokenizer.add_tokens([";"])
    named = prepared(tokenizer, [{"messages": TALK[1:3]}], end_of_turn_tokens=[";"])
    assert trained_texts(tokenizer, *named.document(0)) == ["yes;"]
    assert named.audit.end_tokens == {";": 1}
    assert named.audit.special_in_content == 0


def test_a_source_may_name_its_own_roles_to_train(trained):
    assert trained([{"messages": TALK}], chat={"train_on": ("user",)}) == ["hot?<|im_end|>", "how?<|im_end|>"]
    assert trained([{"messages": TALK}], chat={"last_turn_only": True}) == ["very<|im_end|>"]


def test_messages_say_themselves_whether_they_train(trained):
    flags = [None, True, False, None, None]
    talk = [message | {"learn": flag} for message, flag in zip(TALK, flags, strict=True)]
    rows = [{"messages": talk}]
    assert trained(rows, fields={"train": "learn"}) == ["hot?<|im_end|>", "very<|im_end|>"]
    assert trained(rows, fields={"train": "learn"}, chat={"train_on": ()}) == ["hot?<|im_end|>"]


def test_weights_of_openais_rows_say_so_too(trained):
    talk = [TALK[1], TALK[2] | {"weight": 0}, TALK[3], TALK[4] | {"weight": 1}]
    assert trained([{"messages": talk}]) == ["very<|im_end|>"]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 3, True), (4, 8, False)], ["I am"]),
        ([(0, 3, False), (5, 7, True)], ["hot"]),
        ([(0, 3, False), (4, 11, True)], [" hot now<|im_end|>"]),
        ([(0, 0, True), (2, 3, True)], ["I", "am"]),
        ([], []),
    ],
)
def test_characters_of_a_message_train_as_their_detail_says(spans, expected, make_tokenizer, trained_texts):
    """One token a character, so that what trains is the detail's to say alone."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n'}}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([*"Iamhotnw "])
    detail = [{"begin_offset": start, "end_offset": end, "train": flag} for start, end, flag in spans]
    talk = [TALK[1], {"role": "assistant", "content": "I am hot now", "detail": detail}]
    found = prepared(tokenizer, [{"messages": talk}], fields={"train_detail": "detail"})
    assert trained_texts(tokenizer, *found.document(0)) == expected


def test_detail_counts_in_the_content_whatever_the_template_trims(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content | trim + eos_token }}{% endfor %}")
    tokenizer.add_tokens([*"hotyes "])
    detail = [{"begin_offset": 2, "end_offset": 4, "train": True}]
    talk = [TALK[1], {"role": "assistant", "content": "  yes hot", "detail": detail}]
    found = prepared(tokenizer, [{"messages": talk}], fields={"train_detail": "detail"})
    assert trained_texts(tokenizer, *found.document(0)) == ["yes"]


def test_detail_of_a_content_that_the_template_rewrites_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}")
    talk = [TALK[1], TALK[2] | {"detail": [{"begin_offset": 0, "end_offset": 0, "train": True}]}]
    with pytest.raises(DataError, match=r"row 1: the chat template changes the content of message 1 \(assistant\)"):
        prepared(tokenizer, [{"messages": talk}], fields={"train_detail": "detail"})


def test_system_messages_are_dropped_or_put_in(chatml):
    def text(**chat):
        return chatml.decode(prepared(chatml, [{"messages": chat.pop("talk", TALK)}], chat=chat).document(0)[0])

    assert "system" not in text(drop_system_message=True)
    assert text(default_system_message="calm").startswith("<|im_start|>system\nbe brief")
    assert text(default_system_message="calm", talk=TALK[1:]).startswith("<|im_start|>system\ncalm<|im_end|>")


def test_template_variables_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("{{ 'calm: ' if calm else '' }}{% for m in messages %}{{ m.content }};{% endfor %}")
    found = prepared(tokenizer, [{"messages": TALK}], chat={"chat_template_kwargs": {"calm": True}})
    assert tokenizer.decode(found.document(0)[0]).startswith("calm: be brief")


def test_a_source_may_have_a_template_of_its_own(chatml):
    found = prepared(chatml, [{"messages": TALK}], chat={"chat_template": "llama3"})
    assert "<|start_header_id|>" in chatml.decode(found.document(0)[0])
    assert found.audit.template == "llama3, by marks"


def test_template_may_be_given_as_jinja(chatml):
    found = prepared(chatml, [{"messages": TALK}], template="{% for m in messages %}{{ m.content }};{% endfor %}")
    assert chatml.decode(found.document(0)[0]) == "be brief;hot?;yes;how?;very;"
    assert found.audit.template == "given as Jinja, by marks"


@pytest.mark.parametrize(("own", "expected"), [(None, "llama3"), ("{{ messages[0].content }}", "the tokenizer's own")])
def test_fallback_is_taken_where_the_tokenizer_has_no_template(own, expected, make_tokenizer):
    found = prepared(make_tokenizer(own), [{"messages": TALK[1:]}], template="tokenizer_default_fallback_llama3")
    assert found.audit.template.startswith(expected)


def test_thought_that_opens_an_answer_goes_to_the_template_apart(make_tokenizer, trained_texts):
    template = (
        "{% for m in messages %}{{ ('(' + m.reasoning_content + ')' if m.reasoning_content is defined else '') "
        "+ m.content + eos_token }}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    for opening, closing in (("<think>", "</think>"), ("<reasoning>", "</reasoning>")):
        talk = [TALK[1], {"role": "assistant", "content": f"{opening}\nhm\n{closing}\n\nyes"}]
        found = prepared(tokenizer, [{"messages": talk}], chat={"split_thinking": True})
        assert trained_texts(tokenizer, *found.document(0)) == ["hm)yes</s>"]


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_prompt_texts_are_printed_and_the_answer_trains(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer(add_bos=True)
    texts = {"format": "Q: {instruction} {input}\nA:", "no_input_format": "Q: {instruction}\nA:", "system": "S\n"}
    rows = [
        {"instruction": "hot?", "input": "now", "output": "yes"},
        {"instruction": "hot?", "input": "", "output": "yes", "system": "T\n"},
    ]
    found = prepared(tokenizer, rows, form="prompt", prompt=texts)
    assert [tokenizer.decode(found.document(row)[0]) for row in range(2)] == [
        "<s>S\nQ: hot? now\nA:yes</s>",
        "<s>T\nQ: hot?\nA:yes</s>",
    ]
    assert trained_texts(tokenizer, *found.document(0)) == ["yes</s>"]
    everything = prepared(tokenizer, rows, form="prompt", prompt=texts, train_on="all")
    assert trained_texts(tokenizer, *everything.document(0)) == ["S\nQ: hot? now\nA:yes</s>"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"format": "{instruction} {answer}"}, r"row 1: the prompt text '\{instruction\} \{answer\}' has \{answer\}."),
        ({"format": "{instruction.__class__}"}, "which is no field"),
        ({"format": "{instruction"}, "cannot be read"),
        ({}, "the prompt's text is missing"),
    ],
)
def test_prompt_texts_that_cannot_be_filled_are_refused(texts, message, chatml):
    with pytest.raises(DataError, match=message):
        prepared(chatml, [{"instruction": "a", "output": "b"}], form="prompt", prompt=texts)


def test_braces_in_rows_and_doubled_braces_in_texts_stay(make_tokenizer):
    tokenizer = make_tokenizer()
    found = prepared(
        tokenizer,
        [{"instruction": "{x}", "output": "{y}"}],
        form="prompt",
        prompt={"format": "{{json}} {instruction}:"},
    )
    assert tokenizer.decode(found.document(0)[0]) == "{json} {x}:{y}</s>"


def test_segments_train_as_they_say_and_get_nothing_added(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer(add_bos=True)
    segments = [
        {"label": True, "text": "<s>hot\n"},
        {"label": True, "text": "yes "},
        {"label": False, "text": "no "},
        {"label": True, "text": "very</s>"},
    ]
    found = prepared(tokenizer, [{"segments": segments}])
    ids, trained = found.document(0)
    assert tokenizer.decode(ids) == "<s>hot\nyes no very</s>"
    assert trained_texts(tokenizer, ids, trained) == ["hot\nyes ", "very</s>"]


def test_segments_are_tokenised_one_by_one(make_tokenizer):
    tokenizer = make_tokenizer()
    parts = ["furn", "ace"]
    found = prepared(tokenizer, [{"segments": [{"label": True, "text": part} for part in parts]}])
    expected = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert found.document(0)[0].tolist() == expected


def test_rows_of_tokens_are_taken_as_they_are(chatml):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [5, 6, 0, 0], "labels": [5, 6, -100, -100], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [5, 6]},
    ]
    found = prepared(chatml, rows)
    assert [found.document(row)[0].tolist() for row in range(3)] == [[5, 6, 7, 8], [5, 6], [5, 6]]
    masks = [found.document(row)[1].tolist() for row in range(3)]
    assert masks == [[False, False, True, True], [False, True], [False, True]]
    with pytest.raises(DataError, match=f"row 1: token id {len(chatml)} is outside the tokenizer's"):
        prepared(chatml, [{"input_ids": [len(chatml)]}])


def test_labels_of_given_tokens_become_the_targets_of_batches(chatml):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
        {"input_ids": [9, 10, 11], "labels": [-100, 10, 11]},
    ]
    loader = StepLoader(
        prepared(chatml, rows), batch_size=2, micro_batch_size=2, sequence_length=8, packing=False, seed=0
    )
    (batch,) = loader.step(0)
    assert batch.input_ids[:, :4].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch.targets[:, :4].tolist() == [[6, -100, 8, -100], [10, 11, -100, -100]]


@pytest.mark.parametrize("labels", [[6, 7, 8, -100], [-100, -100, 8, 7]])
def test_labels_that_are_not_the_tokens_themselves_are_refused(chatml, labels):
    with pytest.raises(DataError, match=r"row 2: field 'labels': \d+ at \d is neither .*Other targets are not learned"):
        prepared(chatml, [{"input_ids": [5]}, {"input_ids": [5, 6, 7, 8], "labels": labels}])


def test_prompt_and_completion_are_plain_text_or_a_conversation(make_tokenizer, chatml, trained_texts):
    plain = make_tokenizer()
    found = prepared(plain, [{"prompt": "hot? ", "completion": "yes"}])
    assert plain.decode(found.document(0)[0]) == "hot? yes</s>"
    assert trained_texts(plain, *found.document(0)) == ["yes</s>"]
    rows = [{"prompt": TALK[:4], "completion": TALK[4:]}]
    assert trained_texts(chatml, *prepared(chatml, rows).document(0)) == ["very<|im_end|>"]


PAIRS = {
    "texts": {"prompt": "hot?", "chosen": "yes", "rejected": "no"},
    "a message each": {
        "prompt": [TALK[1]],
        "chosen": {"role": "assistant", "content": "yes"},
        "rejected": {"role": "assistant", "content": "no"},
    },
    "prompt inside": {
        "chosen": [TALK[1], {"role": "assistant", "content": "yes"}],
        "rejected": [TALK[1], {"role": "assistant", "content": "no"}],
    },
    "prompt beside and inside": {
        "prompt": "hot?",
        "chosen": [TALK[1], {"role": "assistant", "content": "yes"}],
        "rejected": [TALK[1], {"role": "assistant", "content": "no"}],
    },
    "sharegpt": {
        "prompt": [{"from": "human", "value": "hot?"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs_become_two_documents_that_train_their_answers(row, chatml, trained_texts):
    found = prepared(chatml, [row])
    assert found.audit.row_kind == "pairs"
    assert (found.audit.rows, found.audit.documents) == (1, 2)
    assert [trained_texts(chatml, *found.document(i)) for i in range(2)] == [["yes<|im_end|>"], ["no<|im_end|>"]]
    assert all("<|im_start|>user\nhot?<|im_end|>" in chatml.decode(found.document(i)[0]) for i in range(2))


def test_pairs_train_no_earlier_answer(chatml, trained_texts):
    row = {"prompt": TALK[:4], "chosen": "very", "rejected": "little", "system": None}
    found = prepared(chatml, [row])
    assert [trained_texts(chatml, *found.document(i)) for i in range(2)] == [["very<|im_end|>"], ["little<|im_end|>"]]


def test_pairs_may_be_plain_text(make_tokenizer, trained_texts):
    tokenizer = make_tokenizer()
    row = {"system": "S ", "prompt": "hot?", "chosen": "yes", "rejected": "no"}
    found = prepared(tokenizer, [row], prompt={"format": "Q: {prompt} A:", "output_format": " {chosen}"})
    assert [tokenizer.decode(found.document(i)[0]) for i in range(2)] == ["S Q: hot? A: yes</s>", "S Q: hot? A: no</s>"]
    assert [trained_texts(tokenizer, *found.document(i)) for i in range(2)] == [[" yes</s>"], [" no</s>"]]


def reader(tokenizer, form):
    from stoker.data import formats
    from stoker.data.audit import Tally
    from stoker.data.options import Reading
    from stoker.data.rows import Training

    options = {"training": Training(), "tokenizer": tokenizer, "template_choice": None, "tally": Tally()}
    return RowReader(formats.declared(form), Reading(), **options)


def documents(tokenizer, form, row):
    return Tokenizer(tokenizer).documents(reader(tokenizer, form).pieces(row))


def test_labelled_answers_keep_their_label_on_what_trains(chatml):
    for label in (True, False):
        (document,) = documents(chatml, "unpaired", {"prompt": "hot?", "completion": "yes", "label": label})
        assert document.labels is not None
        assert np.array_equal(document.labels, np.where(document.trained, int(label), -1))
        assert document.trained.any()


def test_steps_keep_their_labels_at_their_last_tokens(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=True)
    row = {"prompt": "hot?", "completions": ["yes it is", "no"], "labels": [True, False]}
    (document,) = documents(tokenizer, "stepwise", row)
    assert document.labels is not None
    assert tokenizer.decode(document.ids) == "<s>hot?\nyes it is\nno\n</s>"
    places = np.flatnonzero(document.labels >= 0)
    assert document.labels[places].tolist() == [1, 0]
    assert [tokenizer.decode(document.ids[: place + 1]) for place in places] == [
        "<s>hot?\nyes it is\n",
        "<s>hot?\nyes it is\nno\n",
    ]
    assert np.flatnonzero(document.trained).tolist() == places.tolist()


def test_kinds_of_rows_do_not_mix(chatml):
    sources = [SourceOptions(rows=[{"messages": TALK}]), SourceOptions(rows=[PAIRS["texts"]])]
    with pytest.raises(DataError, match=r"its rows are pairs \(preference\), those of the sources before it documents"):
        prepare(sources, tokenizer=chatml, sequence_length=64)


def test_tokens_of_a_row_need_no_template(make_tokenizer):
    (piece,) = reader(make_tokenizer(None), "tokenized").pieces({"input_ids": [3, 4]})
    assert isinstance(piece, Given)


def test_half_of_a_surrogate_pair_is_no_text(chatml):
    for row in ({"messages": [TALK[1], {"role": "assistant", "content": "a\ud83d"}]}, {"text": "\udc00"}):
        with pytest.raises(DataError, match=r"row 1: the text holds half of a surrogate pair \(\\u.... at character"):
            prepared(chatml, [row])
