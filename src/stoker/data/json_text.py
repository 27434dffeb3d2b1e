"""JSON read piece by piece, so that the first rows of a large file cost no more than those rows."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from stoker.data.records import kind
from stoker.errors import DataError

SAVE_AS_UTF8 = "Save the file as UTF-8."
"""What to do with a file in another encoding."""
_BLOCK_BYTES = 1 << 20
_BLANK = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = len("-Infinity")


def entries(head: bytes, opened: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Yields the entries of a list, or of the list `data` in an object, each with the line on which it begins.

    `head` is what was read of the file already. Raises DataError, with its line, where the file is not JSON; and, once
    it is read to its end, where it holds neither.
    """
    text = _Text(head, opened, name)
    opens = text.peek()
    if opens == "[":
        yield from _list(text)
    elif opens == "{":
        keys: list[str] = []
        for key in _keys(text):
            if key == "data" and text.peek() == "[":
                if "data" in keys:
                    text.fail('The object has two lists called "data"')
                keys.append(key)
                yield from _list(text)
            else:
                keys.append(key if key != "data" else "data, which is no list")
                text.value()
        if "data" not in keys:
            _refuse(f"an object with: {', '.join(keys) or 'nothing'}", name)
    else:
        _, value = text.value()
        _refuse(kind(value), name)
    if text.peek():
        text.fail("Extra data")


def _refuse(found: str, name: str) -> NoReturn:
    fix = 'Use a list of rows, or an object {"data": [rows]}, or JSONL.'
    raise DataError(f"the file holds {found}.", where=name, fix=fix)


def _list(text: "_Text") -> Iterator[tuple[int, Any]]:
    text.skip("[")
    while text.peek() != "]":
        yield text.value()
        if not text.separates("]"):
            break
    text.skip("]")


def _keys(text: "_Text") -> Iterator[str]:
    """Yields an object's keys; whoever takes one has to read its value before the next."""
    text.skip("{")
    while text.peek() != "}":
        if text.peek() != '"':
            text.fail("Expecting property name enclosed in double quotes")
        _, key = text.value()
        text.skip(":")
        yield key
        if not text.separates("}"):
            break
    text.skip("}")


class _Text:
    """A file's text from a place on, of which as much is held as the value at hand needs."""

    def __init__(self, head: bytes, opened: BinaryIO, name: str) -> None:
        self._opened, self._name = opened, name
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._decoder = json.JSONDecoder()
        self._ahead = head.removeprefix(codecs.BOM_UTF8)
        self._bytes_read = len(head) - len(self._ahead)
        self._lines_read = 0
        self._text, self._position, self._at_end = "", 0, False
        self._line, self._counted = 1, 0
        """The line of the character `_counted` of what is held."""

    def peek(self) -> str:
        """Returns the next character that is not blank, without taking it; "" at the end."""
        while True:
            self._position = _BLANK.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._read_on()

    def skip(self, sign: str) -> None:
        """Takes a sign that must come next."""
        if self.peek() != sign:
            self.fail(f"Expecting {sign!r} delimiter" if sign in ":]}" else f"Expecting {sign!r}")
        self._position += 1

    def separates(self, closing: str) -> bool:
        """Takes a comma after a value, if there is one; no `closing` may follow it."""
        found = self.peek()
        if found not in (",", closing) or not found:
            self.fail("Expecting ',' delimiter")
        if found == closing:
            return False
        self._position += 1
        if self.peek() == closing:
            kind = "list" if closing == "]" else "object"
            self.fail(f"Trailing comma before the end of the {kind}")
        return True

    def value(self) -> tuple[int, Any]:
        """Takes a value; returns it with the line on which it begins."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # What breaks near the end of what is held may only not have been read; so may the end of a string.
                is_open = error.msg.startswith("Unterminated string")
                if self._at_end or not (is_open or error.pos + _LONGEST_WORD >= len(self._text)):
                    self.fail(error.msg.removesuffix(" starting at"), error.pos, is_open=is_open)
            except RecursionError as error:
                raise DataError("the file is JSON nested too deeply.", where=self._name) from error
            else:
                # A number may go on with what is not read yet: 1, 1.5, 1.5e+7.
                if self._at_end or end + _LONGEST_WORD < len(self._text):
                    line = self._line_of(self._position)
                    self._position = end
                    return line, value
            self._read_on()

    def fail(self, what: str, position: int | None = None, *, is_open: bool = False) -> NoReturn:
        """Raises DataError at the place where reading stands, or at another one, from which on a value `is_open`."""
        position = self._position if position is None else position
        ends = is_open or position >= len(self._text)
        fix = "The file ends in the midst of it: it may be cut off; write or fetch it again." if ends else None
        raise DataError(f"the file is not JSON: {what}.", where=f"{self._name}:{self._line_of(position)}", fix=fix)

    def _line_of(self, position: int) -> int:
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def _read_on(self) -> None:
        """Lets go of what was taken and reads a block more; as much again as is held, so that a long value is not tried
        too often."""
        self._line_of(self._position)
        held = self._text[self._position :]
        block = self._ahead or self._opened.read(max(_BLOCK_BYTES, len(held)))
        self._ahead = b""
        self._at_end = not block
        try:
            more = self._decode(block, final=self._at_end)
        except UnicodeDecodeError as error:
            # What the decoder still held of the block before is counted again.
            before = self._bytes_read + len(block) - len(error.object)
            line = self._lines_read + error.object.count(b"\n", 0, error.start) + 1
            what = f"the file is not UTF-8 (byte {before + error.start + 1})."
            raise DataError(what, where=f"{self._name}:{line}", fix=SAVE_AS_UTF8) from error
        self._bytes_read += len(block)
        self._lines_read += block.count(b"\n")
        self._text, self._position, self._counted = held + more, 0, 0
