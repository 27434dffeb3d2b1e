"""What is filled into a known skeleton equals what the template renders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.data.template import CHECKED_ROWS, NAMED, ChatTemplate, resolve
from stoker.errors import DataError

TAGGED = (
    "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content | trim }}!{% endgeneration %}\n{% endfor %}"
    "{% if messages[-1].role == 'user' %}?{% endif %}"
)
PADDED = "{% for m in messages %}{{ m.content.lstrip() + ' ' }}|{% endfor %}"
TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
contents = st.text(st.sampled_from("ab \n\t{}\u00e9\u2007\u205f\u00a0<|\U000f0000"), max_size=6)


@pytest.fixture(scope="module")
def templates(make_tokenizer):
    """Named templates that only print contents, and three of ours, each with one that keeps no skeleton."""
    tokenizer = make_tokenizer(TAGGED)
    sources = {name: resolve(tokenizer, name).source for name in NAMED} | {"t": TAGGED, "p": PADDED, "2": TWICE}
    known = {name: ChatTemplate(source, origin="", tokenizer=tokenizer) for name, source in sources.items()}
    return {
        name: (template, ChatTemplate(sources[name], origin="", tokenizer=tokenizer))
        for name, template in known.items()
        if template._skeletons is not None and not template._checks_all_rows
    }


def outcome(template, messages):
    try:
        return template.render(messages)
    except DataError as error:
        return str(error)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(contents, min_size=4, max_size=4), min_size=2, max_size=6), st.booleans())
def test_filled_skeletons_equal_renders(templates, talks, has_system):
    roles = ["system", "user", "assistant"] if has_system else ["user", "assistant", "user", "assistant"]
    for template, rendering in templates.values():
        template._rows_seen = CHECKED_ROWS
        rendering._rows_seen, rendering._skeletons = CHECKED_ROWS, None
        for talk in talks:
            messages = [{"role": role, "content": text} for role, text in zip(roles, talk, strict=False)]
            assert outcome(template, messages) == outcome(rendering, messages)


def test_skeletons_are_used_where_they_are_exact_and_only_there(templates):
    messages = [{"role": "user", "content": " a"}, {"role": "assistant", "content": "b\n"}]
    for name, (template, _) in templates.items():
        template._rows_seen = CHECKED_ROWS
        rendered = template.render(messages)
        known = template._skeletons.render(messages)
        assert known == (None if name == "2" else rendered)
        for other in ("<think>x</think>a", "", " ", "a\U000f0000"):
            assert template._skeletons.render([messages[0] | {"content": other}, messages[1]]) is None
        assert template._skeletons.render([messages[0] | {"name": "x"}, messages[1]]) is None
        assert template._skeletons.render(messages[:1]) is None
    assert len(templates) > 10


@pytest.mark.parametrize("source", ["{{ strftime_now('%d') }}" + PADDED, "{{ messages | tojson }}"])
def test_no_skeleton_where_time_or_json_changes_the_text(make_tokenizer, source):
    assert ChatTemplate(source, origin="", tokenizer=make_tokenizer())._skeletons is None
