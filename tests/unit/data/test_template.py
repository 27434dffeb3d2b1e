import pytest

from stoker.data.template import CHECKED_ROWS, NAMED, resolve
from stoker.data.template_analysis import escapes_contents, only_prints_contents
from stoker.data.template_engine import parse
from stoker.errors import DataError

MESSAGES = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes"}]
LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def counted(monkeypatch):
    """Counts the renders of a template: by marks, and by Transformers."""

    def count(tokenizer, name=None):
        template, renders = resolve(tokenizer, name), {"marked": 0, "plain": 0}

        class Counting:
            def __init__(self, inner):
                self.inner = inner

            def render(self, **variables):
                renders["marked"] += 1
                return self.inner.render(**variables)

        original = tokenizer.apply_chat_template

        def plain(*arguments, **options):
            renders["plain"] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(template, "_template", Counting(template._template))
        monkeypatch.setattr(tokenizer, "apply_chat_template", plain)
        return template, renders

    return count


def test_conversations_built_alike_are_rendered_once_after_the_first_rows(chatml, counted):
    template, renders = counted(chatml)
    for _ in range(CHECKED_ROWS + 50):
        template.render(MESSAGES)
    assert renders == {"marked": CHECKED_ROWS + 1, "plain": CHECKED_ROWS}


def test_conversations_with_more_than_contents_are_rendered_each_after_the_first_rows(chatml, counted):
    template, renders = counted(chatml)
    for _ in range(CHECKED_ROWS + 50):
        template.render([message | {"name": "x"} for message in MESSAGES])
    assert renders == {"marked": CHECKED_ROWS + 50, "plain": CHECKED_ROWS}


def test_template_that_looks_into_contents_is_checked_on_every_row(template_case, counted):
    template, renders = counted(template_case("qwen3")[0])
    for _ in range(CHECKED_ROWS + 50):
        template.render(MESSAGES)
    assert renders == {"marked": CHECKED_ROWS + 50, "plain": CHECKED_ROWS + 50}


def test_row_with_an_empty_content_is_checked_even_later(chatml, counted):
    template, renders = counted(chatml)
    for _ in range(CHECKED_ROWS):
        template.render(MESSAGES)
    template.render([{"role": "user", "content": ""}])
    assert renders["plain"] == CHECKED_ROWS + 1


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral", "chatml", "zephyr", "gemma"])
def test_published_templates_only_print_contents(name, template_case):
    assert only_prints_contents(parse(template_case(name)[0].chat_template)[1])


@pytest.mark.parametrize(
    "source",
    [
        "{% if 'x' in messages[0].content %}y{% endif %}",
        "{% if messages[0].content == 'x' %}y{% endif %}",
        "{{ messages[0].content | length }}",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content | trim('x') }}",
        "{{ messages[0].content.split('x')[0] }}",
        "{{ messages[0].content.strip('x') }}",
        "{{ messages[0].content[:5] }}",
        "{{ messages[0].content[0] }}",
        "{% for letter in messages[0].content %}{{ letter }}{% endfor %}",
        "{% set c = messages[0].content %}{% if c > 'x' %}y{% endif %}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].content) }}",
        "{% if messages[0].content is eq('x') %}y{% endif %}",
        "{% set n = namespace(x=0) %}{% set n.x = messages[0].content %}{% if n.x == 'y' %}z{% endif %}",
        "{% set t = messages[0].content %}{% if t | length > 3 %}z{% endif %}",
        "{% for call in messages[0].content %}{{ call }}{% endfor %}",
    ],
)
def test_templates_that_do_more_than_print_are_told(source):
    assert not only_prints_contents(parse(source)[1])


def test_json_of_a_content_is_told_from_json_of_calls():
    assert escapes_contents(parse("{{ messages[0].content | tojson }}")[1])
    calls = "{% for call in messages[0].tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}"
    assert not escapes_contents(parse(calls)[1])


def test_white_space_around_a_content_that_is_printed_as_json_is_escaped_in_every_row(make_tokenizer):
    template = resolve(make_tokenizer("{% for m in messages %}{{ m.content | tojson }}{% endfor %}"))
    for _ in range(CHECKED_ROWS + 1):
        rendered = template.render([{"role": "user", "content": "hot?\n"}])
    assert rendered.text == '"hot?\\n"'


LOOK_INTO_CONTENTS = ("deepseek_v3", "falcon", "qwen3")


@pytest.mark.parametrize("name", NAMED)
def test_shipped_templates_render_as_transformers_renders_them(name, make_tokenizer):
    tokenizer = make_tokenizer(None)
    template = resolve(tokenizer, name)
    assert only_prints_contents(parse(template.source)[1]) or name in LOOK_INTO_CONTENTS
    for messages in (MESSAGES, [*MESSAGES, *MESSAGES]):
        text = template.render(messages).text
        assert text == tokenizer.apply_chat_template(messages, chat_template=template.source, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], chat_template=template.source, tokenize=False, add_generation_prompt=True
        )
        assert text.startswith(prompt)


def test_alpaca_template_prints_the_published_prompt(make_tokenizer):
    user = {"role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"}
    text = resolve(make_tokenizer(None), "alpaca").render([user, {"role": "assistant", "content": "3"}]).text
    assert text == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3</s>"
    )


def test_absent_tools_look_as_they_do_in_transformers(make_tokenizer):
    """Llama 3.1's template asks `tools is not none`, and versions of Transformers differ in what they pass."""
    source = "{{ tools is none }} {{ documents is none }} {{ tools is defined }}" + LOOP
    tokenizer = make_tokenizer(source)
    template = resolve(tokenizer)
    for _ in range(CHECKED_ROWS + 1):  # the last is not compared with Transformers' text any more
        rendered = template.render(MESSAGES)
    assert rendered.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert not rendered.by_turns


def test_content_that_the_template_changes_is_placed_by_its_turn_or_refused(make_tokenizer):
    cutting = resolve(make_tokenizer("{% for m in messages %}{{ m.content[:3] }};{% endfor %}"))
    messages = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]
    rendered = cutting.render(messages, roles=("assistant",))
    assert rendered.by_turns
    assert [(turn.start, turn.end) for turn in rendered.turns] == [(4, 7)]
    with pytest.raises(DataError, match=r"changes the content of message 0 \(user\)"):
        cutting.render(messages)
    escaping = resolve(make_tokenizer("{% for m in messages %}{{ m.role + m.content | tojson }};{% endfor %}"))
    rendered = escaping.render([{"role": "user", "content": "hot?\n"}])
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["hot?\\n"]


def test_content_that_the_template_rewrites_keeps_its_place(make_tokenizer):
    template = resolve(make_tokenizer("{% for m in messages %}{{ m.content.replace('e', 'xx') | upper }};{% endfor %}"))
    rendered = template.render(MESSAGES)
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["HOT?", "YXXS"]
    assert not rendered.by_turns


def test_template_with_private_use_characters_is_placed_by_its_turns(make_tokenizer):
    template = resolve(make_tokenizer("\U000f0000" + LOOP))
    rendered = template.render(MESSAGES)
    assert rendered.by_turns
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["hot?", "yes"]


def test_private_use_characters_outside_contents_are_no_obstacle(make_tokenizer):
    template = resolve(make_tokenizer("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"))
    rendered = template.render([{"role": "user", "name": "\U000f0000", "content": "hot?"}])
    assert rendered.by_turns
    assert rendered.text == "\U000f0000hot?"


def test_template_file_and_named_choice(make_tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text(LOOP)
    tokenizer = make_tokenizer("x" + LOOP)
    assert resolve(tokenizer).render(MESSAGES).text == "xhot?yes"
    assert resolve(tokenizer, str(tmp_path / "mine.jinja")).render(MESSAGES).text == "hot?yes"
    assert resolve(tokenizer, "chatml").origin == "chatml"


def test_default_of_several_templates_is_taken(make_tokenizer):
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = {"default": LOOP, "tool_use": "x"}
    assert resolve(tokenizer).source == LOOP


@pytest.mark.parametrize(
    ("template", "message"),
    [("chatmll", "neither a named template nor a file"), (None, "has no chat template")],
)
def test_missing_template_names_those_that_exist(template, message, make_tokenizer):
    with pytest.raises(DataError, match=f"{message}.*alpaca, chatml"):
        resolve(make_tokenizer(None), template)


def test_template_that_does_not_compile_is_an_error(make_tokenizer):
    with pytest.raises(DataError, match=r"the tokenizer's own\) is not valid Jinja: .*, line 2"):
        resolve(make_tokenizer("{% for m in messages %}\n{% endif %}"))


@pytest.mark.parametrize("source", ["{{ messages[0].nothing.deeper }}", "{{ 'a' + 3 }}", "{{ raise_exception('no') }}"])
def test_template_that_fails_on_a_conversation_is_an_error(source, make_tokenizer):
    with pytest.raises(DataError, match="the chat template refuses this conversation"):
        resolve(make_tokenizer(source)).render(MESSAGES)
