from rich.console import Console

from stoker.data.audit import Audit
from stoker.data.inspect import TRAINED_STYLE, audit_table, coloured, findings, rows
from stoker.data.prepare import SourceOptions, prepare, split


def prepared_rows(tokenizer, answer="It is hot 🙂 [b]"):
    messages = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": answer}]
    return prepare([SourceOptions(rows=[{"messages": messages}])], tokenizer=tokenizer, sequence_length=100)


def printed(*renderables):
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return capture.get()


def test_trained_tokens_are_coloured_and_bracketed(chatml):
    text = coloured(*prepared_rows(chatml).document(0), chatml)
    spans = [text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED_STYLE]
    assert spans == ["⟦It is hot 🙂 [b]<|im_end|>⟧"]


def test_uncoloured_text_is_the_document_with_brackets(chatml):
    prepared = prepared_rows(chatml)
    text = coloured(*prepared.document(0), chatml).plain
    assert text.replace("⟦", "").replace("⟧", "") == chatml.decode(prepared.document(0)[0])


def test_pairs_are_shown_side_by_side_and_labels_named(chatml):
    row = {"prompt": "hot?", "chosen": "yes", "rejected": "no"}
    pairs = prepare([SourceOptions(rows=[row, row])], tokenizer=chatml, sequence_length=100)
    text = printed(*rows(pairs, chatml, count=1))
    assert "Pair 0, chosen: " in text
    assert "Pair 0, rejected: " in text
    assert "Pair 1" not in text
    assert "⟦no<|im_end|>⟧" in text
    answer = {"prompt": "hot?", "completion": "yes", "label": False}
    labelled = prepare([SourceOptions(rows=[answer])], tokenizer=chatml, sequence_length=100)
    assert ", label: no" in printed(*rows(labelled, chatml))
    steps = {"prompt": "hot?", "completions": ["a", "b", "c"], "labels": [True, True, False]}
    stepwise = prepare([SourceOptions(rows=[steps])], tokenizer=chatml, sequence_length=100)
    assert ", labels: yes yes no" in printed(*rows(stepwise, chatml))


def test_rows_say_how_much_trains_and_stop_at_the_last(chatml):
    prepared = prepared_rows(chatml)
    shown = list(rows(prepared, chatml, count=5))
    ids, trained = prepared.document(0)
    assert len(shown) == 1
    assert f"Document 0: {len(ids)} tokens, {trained.sum()} trained" in printed(*shown)


def test_table_shows_format_template_and_end_tokens(chatml):
    text = printed(audit_table(prepared_rows(chatml).audit, title="train"))
    assert "rows in memory: chat (detected: rows have 'messages' with role/content)" in text
    assert "'<|im_end|>': 1" in text
    assert "the tokenizer's own, by marks" in text


def test_a_part_that_is_held_out_is_shown_with_its_own_counts(chatml):
    row = {"messages": [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes " * 40}]}
    whole = prepare([SourceOptions(rows=[row] * 20)], tokenizer=chatml, sequence_length=30)
    train, validation = (part.audit for part in split(whole, 5))
    assert (validation.rows, validation.documents, validation.truncated, dict(validation.roles)) == (5, 5, 0, {})
    assert (train.documents, train.held_out, train.rows, train.truncated) == (15, 5, 20, 20)
    told = printed(audit_table(train), *findings(train))
    assert "20, 5 of them held out: 15 to train on" in told
    assert "truncated (all rows)      20 rows" in told
    assert "roles (all rows)          user: 20, assistant: 20" in told
    told = printed(audit_table(validation), *findings(validation))
    assert "tokens          150 (longest document 30, median 30)" in told
    assert "20" not in told


def test_rows_of_a_part_are_not_told_where_some_were_cut_into_pieces(chatml):
    rows = [{"text": "it is hot " * 30}] * 3
    whole = prepare([SourceOptions(rows=rows)], tokenizer=chatml, sequence_length=30, on_long="split")
    train, validation = (part.audit for part in split(whole, 2))
    assert (validation.rows, validation.documents) == (0, 2)
    assert "documents       2" in printed(audit_table(validation))
    assert f"3 as {len(whole)} documents, 2 of them held out: {len(whole) - 2} to train on" in printed(
        audit_table(train)
    )


def test_findings_tell_problems_from_notes():
    lines = [
        line.plain for line in findings(Audit(documents=2, rows=2, tokens=10, trained_tokens=5, turns=2, doubled_bos=1))
    ]
    assert [line.split(":")[0] for line in lines] == ["Problem", "Problem"]
    assert [
        line.plain.split(":")[0] for line in findings(Audit(documents=1, tokens=10, trained_tokens=5, dropped=3))
    ] == ["Note"]
