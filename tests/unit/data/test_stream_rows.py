"""What a stream reads of its sources, and how full rows become, from files on."""

import json
from collections import Counter

import numpy as np
import pytest

from stoker.data.collate import Collator
from stoker.data.loader import StepLoader
from stoker.data.prepare import SourceOptions, describe, prepare
from stoker.data.stream_loader import StreamLoader
from stoker.data.streaming import StreamedWindows
from stoker.data.windows import RowStream
from stoker.data.workers import InProcess

LENGTH = 256


def texts(count):
    return [{"text": f"{number} " + "hot " * (number * 7 % 11)} for number in range(count)]


def chats(count):
    return [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "hot " * (1 + n * 7 % 11)},
            ]
        }
        for n in range(count)
    ]


def preferences(count):
    return [{"prompt": f"{n}?", "chosen": "yes " * (1 + n % 5), "rejected": "no " * (1 + n % 7)} for n in range(count)]


ROWS = {"completion": texts, "chat": chats, "preference": preferences}


@pytest.fixture
def source(tmp_path):
    """Writes 60 rows of a format into two files; returns the source with options."""

    def write(rows, **options):
        folder = tmp_path / "rows"
        folder.mkdir(exist_ok=True)
        made = ROWS[rows](60) if isinstance(rows, str) else rows
        half = len(made) // 2
        for name, part in (("a", made[:half]), ("b", made[half:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return SourceOptions(path=str(folder), **options)

    return write


def stream(sources, tokenizer, *, packing=True, length=LENGTH, window_rows=4, shuffle=True):
    preparation = describe(sources, tokenizer=tokenizer, sequence_length=length)
    maker = preparation.maker
    together = preparation.documents_per_example
    collator = Collator(2, length, packing, pad_id=0, documents_per_example=together)
    window_tokens = window_rows * collator.row_tokens
    windows = StreamedWindows(preparation, range(len(sources)), InProcess(maker), window_tokens=window_tokens)
    capacity = collator.row_tokens if packing else None
    rows = RowStream(windows, seed=1, salt=0, capacity=capacity, shuffle=shuffle)
    return StreamLoader([rows], collator=collator, batch_size=4, seed=1, steps_per_epoch=100), rows


def first_pass(rows):
    """Every example of one pass, as token ids of its documents."""
    found = Counter()
    while True:
        row = rows.next()
        if rows.position[0] > 0:
            return found
        found.update(tuple(tuple(ids.tolist()) for ids, _ in example) for example in row)


PARTS = {
    "all": {},
    "limit": {"limit": 7},
    "limit over two files": {"limit": 41},
    "slice": {"split": "train[10:50]"},
    "slice in percent": {"split": "train[25%:75%]"},
    "slice from the end": {"split": "train[-13:]"},
    "shard": {"shard": 1, "num_shards": 3},
    "shard of a slice, limited": {"shard": 2, "num_shards": 4, "split": "train[5:]", "limit": 6},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("packing", [True, False])
def test_a_pass_of_a_stream_holds_what_would_be_prepared(form, part, packing, source, chatml, monkeypatch):
    monkeypatch.setattr("stoker.data.preparation.CHUNK_ROWS", 7)
    options = source(form, **PARTS[part])
    whole = prepare([options], tokenizer=chatml, sequence_length=LENGTH)
    together = whole.documents_per_example
    documents = [tuple(whole.document(index)[0].tolist()) for index in range(len(whole))]
    expected = Counter(tuple(documents[at : at + together]) for at in range(0, len(documents), together))
    _, rows = stream([options], chatml, packing=packing)
    assert first_pass(rows) == expected


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("packing", [True, False])
def test_parts_of_a_stream_are_found_again_at_once(form, packing, source, chatml, monkeypatch):
    monkeypatch.setattr("stoker.data.preparation.CHUNK_ROWS", 7)
    options = [source(form, shard=1, num_shards=2, split="train[4:]")]
    unbroken, _ = stream(options, chatml, packing=packing)
    steps = [unbroken.step(index) for index in range(12)]
    until, _ = stream(options, chatml, packing=packing)
    for index in range(7):
        until.step(index)
    resumed, _ = stream(options, chatml, packing=packing)
    resumed.seek(7, json.loads(json.dumps(until.position())))
    for index in range(7, 12):
        for one, other in zip(resumed.step(index), steps[index], strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.targets.tolist() == other.targets.tolist()
            assert one.document_lengths == other.document_lengths


# How full rows are: lengths as fine-tuning data has them, log-normal, some cut off at the limit.
def long_and_short(form, count=1500, *, length):
    lengths = np.random.default_rng(0).lognormal(np.log(length / 6), 0.9, (count, 2)).astype(int) + 1
    for number, (one, other) in enumerate(lengths.tolist()):
        said, instead = ("hot " * one).strip(), ("cold " * (1 + other // 2)).strip()
        if form == "completion":
            yield {"text": said}
        elif form == "chat":
            yield {"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": said}]}
        else:
            yield {"prompt": f"{number}?", "chosen": said, "rejected": instead}


@pytest.mark.slow
@pytest.mark.parametrize("form", ROWS)
def test_rows_are_98_percent_full(form, source, chatml):
    rows = list(long_and_short(form, length=512))
    options = source(rows)
    whole = prepare([options], tokenizer=chatml, sequence_length=512)
    assert whole.lengths.std() > 100
    loader = StepLoader(whole, batch_size=8, micro_batch_size=2, sequence_length=512, packing=True, seed=0)
    assert loader.padding_share < 0.02
    together = whole.documents_per_example
    batch = loader.step(0)[0]
    assert all(length % (512 * together) == 0 for length in map(sum, batch.document_lengths))
    _, streamed = stream([options], chatml, length=512, window_rows=256)
    for _ in range(100):
        streamed.next()
    assert streamed.efficiency > 0.98
