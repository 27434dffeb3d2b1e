"""Which words of conversations with tools train, from the YAML to what `stoker inspect` shows."""

import io
import json
import re

import pytest
import yaml
from rich.console import Console

from stoker.compose.inspect import inspect
from stoker.config.load import load

TOOL = {
    "type": "function",
    "function": {
        "name": "get_heat",
        "description": "Heat of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def openai_row(arguments, **said):
    call = {"id": "abc123xyz", "type": "function", "function": {"name": "get_heat", "arguments": arguments}}
    return {
        "tools": [TOOL],
        "messages": [
            {"role": "system", "content": "You know heat."},
            {"role": "user", "content": "How hot is the furnace?"},
            {"role": "assistant", "content": None, "tool_calls": [call], **said},
            {"role": "tool", "tool_call_id": "abc123xyz", "name": "get_heat", "content": '{"heat": 900}'},
            {"role": "assistant", "content": "It is 900 degrees."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Welcome."},
        ],
    }


HERMES_CALL = '<tool_call>\n{"name": "get_heat", "arguments": {"place": "furnace"}}\n</tool_call>'
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "You may call <tools>[...]</tools>"},
        {"from": "human", "value": "How hot?"},
        {"from": "gpt", "value": HERMES_CALL},
        {"from": "tool", "value": "<tool_response>900</tool_response>"},
        {"from": "gpt", "value": "900."},
    ]
}
ROWS = {
    "object": openai_row({"place": "furnace"}),
    "JSON text": openai_row('{"place": "furnace"}') | {"tools": json.dumps([TOOL])},
}
CALLS = {
    "llama3_1": ('{"name": "get_heat", "parameters": {"place": "furnace"}}', "<|eot_id|>"),
    "qwen_25": (HERMES_CALL, "<|im_end|>"),
    "qwen3": (HERMES_CALL, "<|im_end|>"),
    "mistral_v3_tekken": (
        '[TOOL_CALLS][{"name": "get_heat", "arguments": {"place": "furnace"}, "id": "abc123xyz"}]',
        "</s>",
    ),
}


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Returns what `stoker inspect` prints of one row, and the runs of words that train."""
    monkeypatch.chdir(tmp_path)

    def of(row, template, end):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        values = {
            "model": {
                "base": "builtin:tiny-llama",
                "chat_template": template,
                "special_tokens": {"eos": end},
                "new_tokens": ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]"],
            },
            "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 1024, "cache_folder": "cache"},
            "train": {"steps": 1, "learning_rate": 0.1},
            "output": {"folder": "run"},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        console = Console(file=io.StringIO(), width=4000)
        inspect(load(tmp_path / "run.yaml"), rows=1, split="train", console=console)
        text = console.file.getvalue()
        return text, re.findall(r"⟦(.*?)⟧", text, re.DOTALL)

    return of


@pytest.mark.parametrize("template", CALLS)
@pytest.mark.parametrize("row", ROWS)
def test_calls_and_answers_train_and_results_do_not(row, template, shown):
    call, end = CALLS[template]
    _, trained = shown(ROWS[row], template, end)
    assert trained == [f"{call}{end}", f"It is 900 degrees.{end}", f"Welcome.{end}"]


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_calls_that_are_text_train_as_text(template, end, shown):
    _, trained = shown(SHAREGPT, template, end)
    assert trained == [f"{HERMES_CALL}{end}", f"900.{end}"]


def test_what_is_said_beside_a_call_trains_or_is_noted_where_the_template_leaves_it_out(shown):
    row = openai_row({"place": "furnace"}, content="Let me look.")
    text, trained = shown(row, "qwen_25", "<|im_end|>")
    assert trained[0] == f"Let me look.\n{HERMES_CALL}<|im_end|>"
    assert "leaves out" not in text
    text, trained = shown(row, "llama3_1", "<|eot_id|>")
    assert trained[0] == f"{CALLS['llama3_1'][0]}<|eot_id|>"
    assert "the chat template leaves out 1 turns that should be trained" in text
