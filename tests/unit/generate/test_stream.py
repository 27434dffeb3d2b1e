import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stoker.generate.stream import stream_text

TEXT = "Héllo, wörld! 日本語 👩‍🚀 fin\nnew line."


def bytes_tokenizer():
    """Every token is one byte: the hardest case for characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def words_tokenizer():
    """SentencePiece's way: words carry their space, and that of the first token is stripped."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁word": 1, "s": 2, "?": 3}, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def by_bytes():
    return bytes_tokenizer()


def test_pieces_joined_are_the_text_and_no_character_is_split(by_bytes):
    pieces = list(stream_text(by_bytes.encode(TEXT), by_bytes))
    assert "".join(pieces) == TEXT
    assert pieces == list(TEXT)


def test_each_piece_comes_with_the_token_that_completes_it(by_bytes):
    seen = []

    def ids():
        for token in by_bytes.encode("aé"):
            seen.append(token)
            yield token

    pieces = stream_text(ids(), by_bytes)
    assert next(pieces) == "a"
    assert len(seen) == 1
    assert next(pieces) == "é"
    assert len(seen) == 3


def test_bytes_that_never_become_a_character_come_at_the_end(by_bytes):
    ids = by_bytes.encode("aé")[:-1]
    assert list(stream_text(ids, by_bytes)) == ["a", "\ufffd"]


def test_invalid_bytes_within_the_text_do_not_stop_it(by_bytes):
    broken = [by_bytes.encode("é")[0], *by_bytes.encode("abc")]
    assert "".join(stream_text(broken, by_bytes)) == by_bytes.decode(broken) == "\ufffdabc"


def test_spaces_between_words_survive():
    tokenizer = words_tokenizer()
    ids = [0, 1, 2, 0, 1, 1]
    assert list(stream_text(ids, tokenizer)) == ["a", " word", "s", " a", " word", " word"]


def test_special_tokens_are_left_out_unless_wanted():
    tokenizer = words_tokenizer()
    end = tokenizer.eos_token_id
    assert "".join(stream_text([0, end, end, 1, end], tokenizer)) == "a word"
    assert "".join(stream_text([0, end], tokenizer, skip_special_tokens=False)).endswith("<end>")


def test_the_work_for_a_token_does_not_grow_with_the_text(by_bytes):
    longest = []

    class Counting:
        def decode(self, token_ids, **options):
            longest.append(len(token_ids))
            return by_bytes.decode(token_ids, **options)

    assert "".join(stream_text(by_bytes.encode(TEXT * 5), Counting())) == TEXT * 5
    assert max(longest) <= 8  # two characters of at most four bytes


def test_no_tokens_give_no_pieces(by_bytes):
    assert list(stream_text([], by_bytes)) == []
