"""Byte-level BPE by words: each word is split into tokens once, and texts are put together from those.

A byte-level BPE tokenizer (GPT-2's and those after it: Llama 3, Qwen, Phi, DeepSeek, ...) first cuts a text into words
by a regular expression and then splits each word on its own, so what a word becomes never depends on its neighbours.
Texts repeat words: with a table of those seen so far, most of the work is a lookup, faster than splitting anew.

This is only done where it is exact. The tokenizer must have the parts named in `word_encoder`; a text must hold no
character whose class (letter, digit, space) may differ between the two regular-expression engines, and must be in
normal form if the tokenizer wants one. All other texts, and all other tokenizers, go through the tokenizer itself.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

# What `ByteLevel` cuts by when no expression is given (Radford et al., 2019, encoder.py).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MAX_WORDS = 400_000
# What templates print between special tokens ("assistant\n", "\n") comes again and again.
_SHORT = 16
# Case folding takes these two for an s and a k in one engine and not in the other.
_FOLDED = {"\u017f", "\u212a"}
# The characters of ASCII in each class that the expressions name.
_ASCII = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9"}
_ASCII |= dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Mc", "Nl", "No"), "")
# White space for Python, not for Unicode.
_SEPARATORS = "\x1c\x1d\x1e\x1f"

Encoded = tuple[list[list[int]], np.ndarray]
"""Token ids by text, and the character offsets of all tokens, int64 `[all tokens, 2]`."""
EncodedArrays = tuple[list[np.ndarray], np.ndarray]
"""The same with the ids as arrays of uint32."""


class WordEncoder:
    """Encodes texts as `tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)` does.

    `pattern` cuts texts into words, `added` holds the added tokens and their ids, `trims` says whether a token's
    offsets leave out the white space at its ends. `otherwise` encodes the texts that this cannot.
    """

    def __init__(
        self,
        model: Any,
        pattern: Any,
        added: dict[str, int],
        *,
        trims: bool,
        form: str | None,
        otherwise: Callable[[list[str]], Encoded],
    ) -> None:
        self._model = model
        self._findall = pattern.findall
        ascii_pattern = _in_ascii(pattern.pattern)
        self._findall_ascii = self._findall if ascii_pattern is None else ascii_pattern.findall
        longest_first = sorted(added, key=len, reverse=True)
        self._added = added
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split if added else None
        self._trims = trims
        self._form = form
        self._otherwise = otherwise
        self._safe: set[str] = set()
        self._unsafe: set[str] = set()
        self._words: dict[str, int] = {}
        self._forget()

    def encode(self, texts: Sequence[str]) -> EncodedArrays:
        """Returns ids and offsets of each text, in order."""
        if len(self._words) + len(self._short_parts) > _MAX_WORDS:
            self._forget()
        found = [self._word_numbers(text) for text in texts]
        rest = [text for text, words in zip(texts, found, strict=True) if words is None]
        ids, offsets, counts = self._gathered([words for words in found if words is not None])
        if not rest:
            return np.split(ids, np.cumsum(counts)[:-1]) if texts else [], offsets
        return self._merged(found, (ids, offsets, counts), self._otherwise(rest))

    def _word_numbers(self, text: str) -> list[int] | None:
        """Returns the numbers of the text's words in the table, None if the text must be encoded otherwise."""
        if not self._is_safe(text):
            return None
        numbers: list[int] = []
        findall = self._findall_ascii if text.isascii() else self._findall
        number_of, parts = self._words.__getitem__, self._cut(text) if self._cut else [text]
        for index, part in enumerate(parts):
            if index % 2:
                numbers.append(self._special_number(part))
                continue
            short = self._short_parts.get(part)
            if short is not None:
                numbers += short
                continue
            words = findall(part)
            if "".join(words) != part:
                return None  # the expression leaves gaps, which are words of their own
            try:
                known = list(map(number_of, words))
            except KeyError:
                known = [number_of(word) if word in self._words else self._number(word) for word in words]
            numbers += known
            if len(part) < _SHORT:
                self._short_parts[part] = known
        return numbers

    def _is_safe(self, text: str) -> bool:
        if text.isascii():
            return not any(map(text.__contains__, _SEPARATORS))
        if self._form is not None and not unicodedata.is_normalized(self._form, text):  # type: ignore[arg-type]
            return False
        characters = set(text)
        if not characters.isdisjoint(self._unsafe):
            return False
        new = characters - self._safe
        unsafe = {character for character in new if not _is_stable(character)}
        self._unsafe |= unsafe
        self._safe |= new - unsafe
        return not unsafe

    def _number(self, word: str) -> int:
        number = self._words.get(word)
        if number is None:
            tokens = self._model.tokenize("".join(map(_BYTE_CHARACTERS.__getitem__, word.encode())))
            number = self._add(len(word), [token.id for token in tokens], _offsets(word, tokens, trims=self._trims))
            self._words[word] = number
        return number

    def _special_number(self, text: str) -> int:
        number = self._specials.get(text)
        if number is None:
            number = self._add(len(text), [self._added[text]], [(0, len(text))])
            self._specials[text] = number
        return number

    def _add(self, length: int, ids: list[int], offsets: list[tuple[int, int]]) -> int:
        """Adds a word to the table and returns its number."""
        self._table.append((length, len(self._flat_ids), len(ids)))
        self._flat_ids += ids
        self._flat_offsets += offsets
        return len(self._table) - 1

    def _forget(self) -> None:
        self._words.clear()
        self._specials: dict[str, int] = {}
        self._short_parts: dict[str, list[int]] = {}
        self._table: list[tuple[int, int, int]] = []  # length in characters, first token, number of tokens
        self._flat_ids: list[int] = []
        self._flat_offsets: list[tuple[int, int]] = []
        self._arrays = (np.empty((0, 3), np.int64), np.empty(0, np.uint32), np.empty((0, 2), np.int64))

    def _current(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the table as arrays; only what is new is converted."""
        table, ids, offsets = self._arrays
        if len(table) < len(self._table):
            new_words = np.array(self._table[len(table) :], dtype=np.int64).reshape(-1, 3)
            new_ids = np.array(self._flat_ids[len(ids) :], dtype=np.uint32)
            new_offsets = np.array(self._flat_offsets[len(ids) :], dtype=np.int64).reshape(-1, 2)
            table, ids = np.concatenate([table, new_words]), np.concatenate([ids, new_ids])
            self._arrays = table, ids, np.concatenate([offsets, new_offsets])
        return self._arrays

    def _gathered(self, found: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids, offsets and the number of tokens of each text, from the numbers of its words."""
        table, ids, offsets = self._current()
        sizes = np.array([len(words) for words in found], dtype=np.int64)
        words = np.fromiter(chain.from_iterable(found), np.int64, int(sizes.sum()))
        lengths, firsts, counts = table[words].T
        before = np.cumsum(counts) - counts
        places = np.repeat(firsts - before, counts) + np.arange(int(counts.sum()))
        starts = np.cumsum(lengths) - lengths
        text_ends = np.cumsum(sizes)
        text_firsts = text_ends - sizes
        origins = np.append(starts, lengths.sum())[text_firsts]
        starts = starts - np.repeat(origins, sizes)
        tokens_before = np.append(before, counts.sum())
        per_text = tokens_before[text_ends] - tokens_before[text_firsts]
        return ids[places], offsets[places] + np.repeat(starts, counts)[:, None], per_text

    @staticmethod
    def _merged(
        found: list[list[int] | None], ours: tuple[np.ndarray, np.ndarray, np.ndarray], theirs: Encoded
    ) -> EncodedArrays:
        """Puts the texts of both ways back into their order."""
        ids, offsets, counts = ours
        ends = np.cumsum(counts)
        mine = iter(zip((ends - counts).tolist(), ends.tolist(), strict=True))
        their_ids, start = iter(theirs[0]), 0
        all_ids: list[np.ndarray] = []
        all_offsets = [np.empty((0, 2), dtype=np.int64)]
        for words in found:
            if words is not None:
                first, last = next(mine)
                all_ids.append(ids[first:last])
                all_offsets.append(offsets[first:last])
            else:
                all_ids.append(np.array(next(their_ids), dtype=np.uint32))
                all_offsets.append(theirs[1][start : start + len(all_ids[-1])])
                start += len(all_ids[-1])
        return all_ids, np.concatenate(all_offsets)


def word_encoder(tokenizer: Any, otherwise: Callable[[list[str]], Encoded]) -> WordEncoder | None:
    """Returns the encoder of a tokenizer by words, or None if it is not one whose words stand on their own.

    It must be BPE without dropout, every byte of which is a token; without a normaliser, or with a Unicode normal form;
    its pre-tokenizer `ByteLevel`, alone or after one `Split` by a regular expression; no added token may take in its
    surroundings; and nothing but `ByteLevel` and what adds special tokens may come after.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    pattern = _compiled(_pattern(state["pre_tokenizer"]))
    trims = _trims(state.get("post_processor"))
    form = (state.get("normalizer") or {}).get("type")
    if pattern is None or trims is None or form not in (None, "NFC", "NFKC", "NFD", "NFKD"):
        return None
    if not _splits_any_word(state["model"]) or any(map(_looks_around, state["added_tokens"])):
        return None
    added = {token["content"]: token["id"] for token in state["added_tokens"]}
    return WordEncoder(backend.model, pattern, added, trims=trims, form=form, otherwise=otherwise)


def _compiled(pattern: str | None) -> Any:
    """Returns the compiled expression, None if there is none or if it cannot be used."""
    try:
        import regex
    except ImportError:
        return None
    try:
        compiled = None if pattern is None else regex.compile(pattern)
    except regex.error:
        return None
    return compiled if compiled is not None and not compiled.groups else None  # findall would return the groups


def _in_ascii(pattern: str) -> re.Pattern[str] | None:
    """Returns an expression of Python's own engine, twice as fast, that cuts ASCII texts as `pattern` does; None if
    `pattern` names classes that are not known here."""
    if any(sign in pattern for sign in ("[[", "[:", "&&", "[^[")):  # sets of sets, which Python's engine has not
        return None
    translated, in_class, position = [], False, 0
    for found in re.finditer(r"\\p\{(\w+)\}|\\.|[\[\]]", pattern, re.DOTALL):
        translated.append(pattern[position : found.start()])
        position, name = found.end(), found[1]
        if name is None:
            in_class = {"[": True, "]": False}.get(found[0], in_class)
            translated.append(found[0])
        elif name in _ASCII:
            inside = _ASCII[name]
            translated.append(inside if in_class else f"[{inside}]" if inside else "(?!)")
        else:
            return None
    translated.append(pattern[position:])
    # A class of which nothing is left holds no character of ASCII.
    text = "".join(translated).replace("[^]", "[^\\x00-\\x7f]").replace("[]", "(?!)")
    try:
        return re.compile(text, re.ASCII)
    except re.error:
        return None


def _splits_any_word(model: dict[str, Any]) -> bool:
    """Whether a model is BPE that makes the same tokens of a word each time, none of them unknown."""
    if model["type"] != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        return False
    return all(character in model["vocab"] for character in _BYTE_CHARACTERS)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Returns the expression that cuts words, None if the words are cut in another way."""
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        return None
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return _GPT2
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True):
            split = steps[0]
            plain = split["behavior"] == "Isolated" and not split.get("invert")
            return split["pattern"].get("Regex") if plain else None
    return None


def _trims(post_processor: dict[str, Any] | None) -> bool | None:
    """Returns whether offsets are trimmed afterwards; None if something else changes them."""
    if post_processor is None:
        return False
    steps = post_processor.get("processors") or [post_processor]
    if not {step["type"] for step in steps} <= {"ByteLevel", "TemplateProcessing"}:
        return None
    return any(step["type"] == "ByteLevel" and step["trim_offsets"] for step in steps)


def _looks_around(token: dict[str, Any]) -> bool:
    return token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"] or not token["content"]


def _is_stable(character: str) -> bool:
    """Whether every version of Unicode since 3.2 (2002) says of a character whether it is a letter, mark, digit or
    space, or that it is none of them."""
    now, then = unicodedata.category(character), unicodedata.ucd_3_2_0.category(character)
    if character in _FOLDED or character in _SEPARATORS or "\ud800" <= character <= "\udfff":
        return False
    return now == then or not {now[0], then[0]} & set("LMNZ")


def _offsets(word: str, tokens: Sequence[Any], *, trims: bool) -> list[tuple[int, int]]:
    """Returns the characters of each token: those that its bytes are of."""
    starts = [index for index, character in enumerate(word) for _ in character.encode()]
    found, position = [], 0
    for token in tokens:
        text = token.value
        start, end = starts[position], starts[position + len(text) - 1] + 1
        position += len(text)
        if trims:
            # As the ByteLevel post-processor does: white space at a token's ends is none of its characters.
            leading = len(text) - len(text.lstrip(_SPACE))
            trailing = len(text) - len(text.rstrip(_SPACE))
            start = min(start + leading, end)
            end = max(end - trailing, start)
        found.append((start, end))
    return found


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte (Radford et al., 2019, encoder.py: bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, others = {byte: chr(byte) for byte in printable}, 0
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + others)
            others += 1
    return [characters[byte] for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
_SPACE = _BYTE_CHARACTERS[0x20]
