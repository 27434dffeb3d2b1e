"""Token ids to pieces of text as they come."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not, or not yet, UTF-8


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ..., **options: Any) -> Any:
        """Returns the text of `token_ids`."""
        ...


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> Iterator[str]:
    """Yields the text of `ids` in non-empty pieces, each as soon as its characters are whole.

    The pieces joined are the text of all ids. A character whose bytes are spread over several tokens is held back until
    the last has come; bytes that never become a character come out as U+FFFD at the end. Only the tokens since the last
    whole piece are decoded again, together with that piece: tokenizers that mark word starts strip the space of a first
    token, so a token must not be decoded alone.
    """

    def decode(window: list[int]) -> str:
        return tokenizer.decode(window, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    window: list[int] = []
    mark = 0  # tokens of the window before it belong to the piece that is kept as context
    num_given = 0  # characters of the window's text that have been yielded
    text = ""
    for token in ids:
        window.append(token)
        text = decode(window)
        whole = len(text.rstrip(_REPLACEMENT))
        if whole <= num_given:
            continue
        yield text[num_given:whole]
        num_given = whole
        if whole == len(text):
            window = window[mark:]
            mark = len(window)
            text = decode(window)
            num_given = len(text)
    if len(text) > num_given:
        yield text[num_given:]
