"""Every row that docs/data.md shows has the format it stands under, and every name it should list is there."""

import json
import re
from pathlib import Path

import pytest

from stoker.config.row_formats import FORMATS, NOT_READ, PRESETS
from stoker.data import formats
from stoker.data.options import PromptTexts
from stoker.data.prepare import SourceOptions, prepare
from stoker.data.template import ALIASES, NAMED

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^### ", PAGE.split("## Formats")[1].split("### Names that others use")[0], flags=re.MULTILINE)[1:]
ROWS = {
    section.splitlines()[0]: [
        json.loads(line)
        for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
    ]
    for section in SECTIONS
}


def test_every_format_has_an_example():
    assert set(ROWS) == set(formats.FORMATS) == set(FORMATS) - {"auto"}
    assert all(ROWS.values())


@pytest.mark.parametrize("name", ROWS)
def test_examples_have_the_format_they_stand_under_and_train_something(name, chatml):
    prompt = PromptTexts(format="Task: {instruction}\nText: {input}\nAnswer: ") if name == "prompt" else PromptTexts()
    for row in ROWS[name]:
        if name != "prompt":
            assert formats.detect([row], "page").format.name == name
        source = SourceOptions(rows=[row], format=name, prompt=prompt)
        found = prepare([source], tokenizer=chatml, sequence_length=512)
        assert found.audit.trained_tokens


def test_every_name_is_on_the_page():
    templates = set(re.findall(r"`(\w+)`", PAGE.split("| templates |")[1].split("\n\n")[0]))
    assert templates == {*NAMED, *ALIASES}
    names = {name for name in PRESETS if not name.startswith(("kto.", "chatml.", "llama3."))}
    assert all(f"`{name}`" in PAGE for name in (*names, *NOT_READ))
