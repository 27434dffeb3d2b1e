import json

import pytest

from stoker.compose.sample import CHARACTERS_PER_TOKEN, known_documents
from stoker.config.load import parse


def config(tmp_path, path, **data):
    return parse(
        {
            "model": {"base": "x"},
            "data": {"train": [{"path": str(path)}], **data},
            "train": {"learning_rate": 1e-4},
            "output": {"folder": str(tmp_path / "run")},
        }
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_chats_are_counted_and_the_assistants_words_are_learned(tmp_path):
    file = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a" * 120}]
    write(file, [{"messages": messages}] * 40)
    found = known_documents(config(tmp_path, file))
    assert found.count == 40
    assert found.mean == pytest.approx(420 / CHARACTERS_PER_TOKEN + 10)
    assert found.trained_share == pytest.approx(120 / 420)


def test_a_large_file_is_sampled(tmp_path):
    file = tmp_path / "rows.jsonl"
    write(file, [{"text": "x" * 100}] * 3000)
    found = known_documents(config(tmp_path, file))
    assert found.count == 3000
    assert "500 rows sampled" in found.source
    assert found.trained_share == 1.0


def test_an_earlier_run_of_the_same_folder_knows_better(tmp_path):
    file = tmp_path / "rows.jsonl"
    write(file, [{"text": "x"}])
    (tmp_path / "run").mkdir()
    facts = {"train": {"documents": 10, "tokens": 4000, "trained_tokens": 1000}}
    (tmp_path / "run" / "audit.json").write_text(json.dumps(facts))
    assert known_documents(config(tmp_path, file)).count == 10


def test_what_is_not_here_is_not_known(tmp_path):
    assert known_documents(config(tmp_path, "someone/dataset")) is None
