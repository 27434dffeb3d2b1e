"""A translation as a YAML of ours, with a comment wherever the meaning shifted."""

from stoker.config import describe
from stoker.config.axolotl.report import BLANK, Line
from stoker.config.axolotl.translate import Translation
from stoker.config.document import Path
from stoker.config.schema import RunConfig
from stoker.config.show import values_to_yaml

_WIDTH = 116


def to_yaml(translation: Translation) -> str:
    """Returns the YAML: it loads, and is the configuration that the translation is.

    Comments say which value is Axolotl's default, how a meaning shifted and, at the top, which keys stand for nothing.
    """
    defaults = {path for path, _ in translation.report.defaults}

    def comment(path: Path) -> str:
        return translation.notes.get(path) or ("Axolotl's default" if path in defaults else "")

    order = list(describe.annotations(RunConfig))
    values = {name: translation.values[name] for name in order if name in translation.values}
    return _head(translation) + values_to_yaml(values, comment)


def _head(translation: Translation) -> str:
    report = translation.report
    lines = [f"# From {report.file}, written for Axolotl, by `stoker convert`."]
    for kind, words in (("automatic", "Done anyway"), ("no effect", "Without effect")):
        for group, text in report.grouped(kind):
            if text != BLANK:
                lines += _wrapped(f"{words}: {', '.join(_names(group))}: {text}.")
    return "\n".join(lines) + "\n"


def _names(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(line.name for line in lines))


def _wrapped(text: str) -> list[str]:
    lines, current = [], "#"
    for word in text.split():
        if len(current) + len(word) + 1 > _WIDTH:
            lines.append(current)
            current = "#  "
        current += f" {word}"
    return [*lines, current]
