import json
import time

import numpy as np
import pytest

from stoker.data.prepare import SourceOptions, prepare, split
from stoker.errors import DataError


def chat(user="hot?", assistant="yes"):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def prepared(tokenizer, rows, *, sequence_length=512, **options):
    return prepare([SourceOptions(rows=rows)], tokenizer=tokenizer, sequence_length=sequence_length, **options)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return SourceOptions(path=str(path))


def test_sources_of_different_formats_join_in_order(chatml, tmp_path):
    sources = [write(tmp_path / "a.jsonl", [chat()] * 2), SourceOptions(rows=[{"text": "hot"}])]
    result = prepare(sources, tokenizer=chatml, sequence_length=64)
    assert [chatml.decode(result.document(index)[0])[:12] for index in range(3)] == ["<|im_start|>"] * 2 + [
        "hot<|im_end|"
    ]
    assert list(result.audit.formats.values()) == [
        "chat (detected: rows have 'messages' with role/content)",
        "completion (detected: rows have 'text')",
    ]


def test_completion_has_bos_as_the_tokenizer_does_it_and_eos_and_trains_all(make_tokenizer):
    for add_bos in (False, True):
        tokenizer = make_tokenizer(add_bos=add_bos)
        ids, trained = prepared(tokenizer, [{"text": "hot hot"}]).document(0)
        assert tokenizer.decode(ids) == ("<s>" if add_bos else "") + "hot hot</s>"
        assert trained.tolist() == [False] + [True] * (len(ids) - 1)


def test_completion_needs_no_chat_template(make_tokenizer):
    assert prepared(make_tokenizer(None), [{"text": "hot"}]).audit.template == "none"


def test_eos_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer()
    assert tokenizer.decode(prepared(tokenizer, [{"text": "hot</s>"}]).document(0)[0]) == "hot</s>"


def test_chat_without_template_is_an_error_that_names_templates(make_tokenizer):
    for on_bad_row in ("stop", "skip"):  # not a matter of single rows
        with pytest.raises(DataError, match=r"^the tokenizer has no chat template.*alpaca, chatml, .*llama2, llama3"):
            prepared(make_tokenizer(None), [chat()], on_bad_row=on_bad_row)


def test_malformed_line_stops_with_file_and_line(chatml, tmp_path):
    source = write(tmp_path / "rows.jsonl", [chat(), '{"messages": [', chat()])
    with pytest.raises(DataError, match=r"rows.jsonl:2: the line is not JSON: .*on_bad_row: skip"):
        prepare([source], tokenizer=chatml, sequence_length=64)


def test_malformed_rows_are_counted_when_skipped(chatml, tmp_path):
    rows = [chat(), '{"messages": [', {"messages": [{"role": "user"}]}, chat()]
    audit = prepare(
        [write(tmp_path / "rows.jsonl", rows)], tokenizer=chatml, sequence_length=64, on_bad_row="skip"
    ).audit
    assert (audit.rows, audit.bad_rows) == (2, 2)
    assert audit.bad_row_examples[1].endswith(
        "rows.jsonl:3: messages[0].content is missing or null; the message has: role."
    )


def test_row_that_the_template_refuses_has_its_place(template_case):
    gemma = template_case("gemma")[0]
    with pytest.raises(
        DataError, match="row 2: the chat template refuses this conversation: System role not supported"
    ):
        prepared(gemma, [chat(), {"messages": [{"role": "system", "content": "a"}]}])


def test_wrong_field_names_name_those_found(chatml):
    with pytest.raises(DataError, match="their fields are: question, answer"):
        prepared(chatml, [{"question": "a", "answer": "b"}])
    source = SourceOptions(rows=[{"question": "a", "answer": "b"}], format="alpaca")
    with pytest.raises(DataError, match="row 1: field 'instruction' is missing or null; the row has: question, answer"):
        prepare([source], tokenizer=chatml, sequence_length=64)


@pytest.mark.parametrize("rows", [[], ["", "\n"]])
def test_empty_source_is_an_error(rows, chatml, tmp_path):
    source = write(tmp_path / "empty.jsonl", rows)
    with pytest.raises(DataError, match=r"empty.jsonl: the source holds no rows"):
        prepare([source], tokenizer=chatml, sequence_length=64)


def test_file_of_malformed_lines_only_is_an_error_even_when_skipping(chatml, tmp_path):
    source = write(tmp_path / "rows.jsonl", ["{", "{"])
    with pytest.raises(DataError, match=r"rows.jsonl:1: the first 2 rows are all malformed"):
        prepare([source], tokenizer=chatml, sequence_length=64, on_bad_row="skip")


def test_long_rows_are_truncated_dropped_refused_or_cut(make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"text": "a b c d e f g h"}, {"text": "a"}]
    whole = prepared(tokenizer, rows)
    length, limit = len(whole.document(0)[0]), 6
    cut = prepared(tokenizer, rows, sequence_length=limit)
    assert cut.lengths.tolist() == [limit, 2]
    assert (cut.audit.truncated, cut.audit.truncated_tokens) == (1, length - limit)
    dropped = prepared(tokenizer, rows, sequence_length=limit, on_long="drop")
    assert (len(dropped), dropped.audit.dropped, dropped.audit.rows) == (1, 1, 1)
    with pytest.raises(DataError, match=f"row 1: the row has {length} tokens, more than data.sequence_length = 6"):
        prepared(tokenizer, rows, sequence_length=limit, on_long="stop")
    pieces = prepared(tokenizer, rows, sequence_length=limit, on_long="split")
    assert pieces.lengths.max() <= limit
    assert pieces.audit.trained_tokens == whole.audit.trained_tokens
    assert (pieces.audit.split, pieces.audit.rows, pieces.audit.documents) == (1, 2, len(pieces))


def test_audit_counts_what_is_in_the_arrays(chatml):
    result = prepared(chatml, [chat(), chat("a", "longer answer"), {"messages": [{"role": "user", "content": "b"}]}])
    audit = result.audit
    assert audit.tokens == len(result.ids) == int(result.lengths.sum())
    assert audit.trained_tokens == int(result.trained.sum()) == int(result.trained_counts.sum())
    assert (audit.longest, audit.median) == (result.lengths.max(), np.median(result.lengths))
    assert (audit.turns, audit.turns_with_end, audit.roles) == (2, 2, {"user": 3, "assistant": 2})
    assert (audit.rows_without_trained_token, audit.untrained_examples) == (1, ("row 3",))


def test_turns_are_counted_in_all_pieces_of_a_row_that_is_cut(chatml):
    audit = prepared(chatml, [{"messages": chat()["messages"] * 3}], sequence_length=16, on_long="split").audit
    assert audit.documents > 3
    assert (audit.turns, audit.turns_with_end) == (3, 3)


def test_doubled_bos_is_counted(make_tokenizer):
    audit = prepared(make_tokenizer(add_bos=True), [{"text": "<s>hot"}, {"text": "hot"}]).audit
    assert audit.doubled_bos == 1
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    assert prepared(make_tokenizer(template), [chat("<s>hot?")]).audit.doubled_bos == 1


def test_special_token_text_in_contents_is_counted(chatml):
    assert prepared(chatml, [chat("a <|im_end|> b"), chat()]).audit.special_in_content == 1


def test_turns_that_the_template_leaves_out_are_counted(make_tokenizer):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    audit = prepared(make_tokenizer(template), [chat()]).audit
    assert (audit.turns_not_rendered, audit.trained_tokens) == (1, 0)


def test_calls_of_tools_train_whether_or_not_the_template_tags_them(make_tokenizer, trained_texts):
    body = "{{ m.content if m.content is defined else (m.tool_calls | tojson) }}{{ eos_token }}"
    plain = "{% for m in messages %}" + body + "{% endfor %}"
    tagged = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + body + "{% endgeneration %}"
        "{% else %}" + body + "{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"messages": [{"role": "user", "content": "hot?"}, call]}]
    for tokenizer in (make_tokenizer(plain), make_tokenizer(tagged)):
        ids, trained = prepared(tokenizer, rows).document(0)
        call = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
        assert trained_texts(tokenizer, ids, trained) == [call + "</s>"]


def test_tools_that_the_template_does_not_know_are_refused(chatml):
    with pytest.raises(DataError, match="row 1: the row has tools, but the chat template does not mention them"):
        prepared(chatml, [chat() | {"tools": [{"name": "f"}]}])


def test_limit_and_progress(chatml):
    seen = []
    source = SourceOptions(rows=[chat()] * 1200, limit=1100)
    result = prepare([source], tokenizer=chatml, sequence_length=64, progress=seen.append)
    assert (len(result), [progress.rows for progress in seen]) == (1100, [512, 1024, 1100])


def test_slow_tokenizer_is_refused(chatml):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match=r"not a fast tokenizer"):
        prepared(Slow(), [chat()])


def test_time_grows_linearly_with_the_conversation(chatml):
    """Ten times the turns cost about ten times the calls into our own code, far from a hundred."""
    import cProfile
    import pstats

    def calls(turns):
        profile = cProfile.Profile()
        rows = [{"messages": chat()["messages"] * turns}]
        profile.runcall(prepared, chatml, rows, sequence_length=1 << 20)
        return pstats.Stats(profile).total_calls

    calls(20)  # imports and caches
    assert calls(2000) < 12 * calls(200)


def test_split_takes_a_share_or_count_and_leaves_the_rest(chatml):
    whole = prepared(chatml, [chat(str(number)) for number in range(20)])
    for share in (0.25, 5):
        train, validation = split(whole, share, seed=3)
        assert (len(train), len(validation)) == (15, 5)
        assert sorted([*train.indices, *validation.indices]) == list(range(20))
        assert validation.document(0)[0].tolist() == whole.document(int(validation.indices[0]))[0].tolist()
        assert validation.audit.tokens == int(validation.lengths.sum())
    assert split(whole, 5, seed=3)[1].indices.tolist() == split(whole, 5, seed=3)[1].indices.tolist()
    assert split(whole, 5, seed=3)[1].indices.tolist() != split(whole, 5, seed=4)[1].indices.tolist()


@pytest.mark.parametrize("share", [0.99, 2, 3])
def test_split_that_leaves_nothing_to_train_on_is_refused(share, chatml):
    with pytest.raises(DataError, match="leaves none to train on"):
        split(prepared(chatml, [chat()] * 2), share)


def test_index_outside_is_an_error(chatml):
    with pytest.raises(IndexError):
        prepared(chatml, [chat()]).document(1)


TOOL = {"type": "function", "function": {"name": "heat", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "heat", "arguments": {"of": "ovens"}}}


def a_long_talk(kind, turns):
    """A conversation of so many messages: plain ones, with thoughts, or with calls of tools."""
    messages = []
    for number in range(turns // (4 if kind == "calls" else 2)):
        messages.append({"role": "user", "content": f"How hot is furnace {number}?"})
        if kind == "calls":
            messages.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
            messages.append({"role": "tool", "tool_call_id": "abcdefghi", "name": "heat", "content": str(number)})
        thought = "<think>\nhm\n</think>\n\n" if kind == "thoughts" else ""
        messages.append({"role": "assistant", "content": f"{thought}It is {number}."})
    return {"messages": messages} | ({"tools": [TOOL]} if kind == "calls" else {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "eos", "kind"),
    [
        ("llama3", "<|eot_id|>", "plain"),
        ("gemma", "<end_of_turn>", "plain"),
        ("phi_4", "<|im_end|>", "plain"),
        ("qwen3", "<|im_end|>", "thoughts"),
        ("qwen_25", "<|im_end|>", "calls"),
        ("mistral_v3_tekken", "</s>", "calls"),
        ("llama3_1", "<|eot_id|>", "calls"),
    ],
)
def test_a_file_with_a_conversation_of_2000_turns_is_prepared_in_under_a_second(
    template, eos, kind, make_tokenizer, tmp_path
):
    source = write(tmp_path / "long.jsonl", [a_long_talk(kind, 2000)])
    tokenizer = make_tokenizer(None, eos=eos)
    options = {"tokenizer": tokenizer, "sequence_length": 1 << 18, "template": template}
    started = time.process_time()
    result = prepare([source], cache_folder=tmp_path / "cache", **options)
    assert time.process_time() - started < 1.0  # 0.1 to 0.3 s on an idle core
    assert (len(result), result.audit.turns, result.audit.turns_with_end) == (1, 1000, 1000)
