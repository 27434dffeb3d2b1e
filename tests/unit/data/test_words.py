import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stoker.data import words
from stoker.data.words import word_encoder

# As published with the models.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": None,
    "llama3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_END}",
    "qwen": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_END}",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
CORPUS = [
    "The furnace's hot, HOW hot's it? 12345 x=1+2;\n\n  tabs\t\t ok",
    "Naïve café 🙂🙂 Straße 中文字符 мир العربية हिन्दी ไทย 한국어 日本語 ΑΒΓ ",
] * 20
SPECIAL = ["<|a|>", "<|a|>b", "</s>"]


@functools.cache
def tokenizer(pattern, trims, form):
    core = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    split = [] if pattern == "gpt2" else [pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    core.normalizer = normalizers.NFC() if form else None
    core.decoder = decoders.ByteLevel()
    if trims is not None:
        core.post_processor = processors.ByteLevel(trim_offsets=trims, add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def whole(tokenizer, texts):
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [pair for text in encoded["offset_mapping"] for pair in text]
    return encoded["input_ids"], np.array(offsets, dtype=np.int64).reshape(-1, 2)


@functools.cache
def encoder(pattern, trims, form):
    one = tokenizer(pattern, trims, form)
    return one, word_encoder(one, functools.partial(whole, one))


fragments = st.sampled_from(
    [
        *SPECIAL,
        *("<|a|", "'s", "'LL", " the", "hot", "  ", "\n", "\r\n", "\t", " 12345", "x=1", ".", ",\n", "/"),
        *"aeTsSL'.,! é ß ñ 中 文 字 हि न् दी ไท ย 한 글 🙂 👍🏽",
        *"\u0301\u00a0\u2009\u3000\u200b\u0085\u00bd\u0663\u017f\u1e9e\x1c",
    ]
)
characters = st.characters(exclude_categories=["Cs"])
ascii_texts = st.text(st.characters(max_codepoint=127) | st.sampled_from("  \n\r\t'asTS09.,!"), max_size=30)
texts = st.lists(st.one_of(fragments, characters), max_size=12).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "NFC"])
@pytest.mark.parametrize("trims", [True, False, None])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_words_give_what_the_tokenizer_gives(pattern, trims, form):
    one, by_words = encoder(pattern, trims, form)
    assert by_words is not None

    @settings(max_examples=40, deadline=None)
    @given(st.lists(texts | ascii_texts, min_size=1, max_size=4))
    def check(batch):
        ids, offsets = by_words.encode(batch)
        expected, expected_offsets = whole(one, batch)
        assert [text.tolist() for text in ids] == expected
        assert np.array_equal(offsets, expected_offsets)

    check()


def test_common_texts_need_no_second_look():
    one = tokenizer("llama3", True, "NFC")

    def refuse(texts):
        raise AssertionError(texts)

    by_words = word_encoder(one, refuse)
    batch = [*CORPUS[:2], "", "<|a|><|a|>b</s>", "İstanbul'da 100€ — “quoted” 😀 你好"]
    assert [text.tolist() for text in by_words.encode(batch)[0]] == whole(one, batch)[0]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\na-zA-Z0-9]?[a-zA-Z]+"),
        (r"[\p{Lt}\p{M}]|\p{Lm}x|[^\p{Lo}]", r"(?!)|(?!)x|[^\x00-\x7f]"),
        (r"\[\p{Lu}\]", r"\[[A-Z]\]"),
        (r"\p{Han}+", None),
        (r"[[:alpha:]]+", None),
    ],
)
def test_expressions_are_translated_for_ascii(pattern, expected):
    found = words._in_ascii(pattern)
    assert (found.pattern if found else None) == expected


def test_table_is_thrown_away_before_it_grows_without_end(monkeypatch):
    one, by_words = encoder("qwen", False, None)
    monkeypatch.setattr(words, "_MAX_WORDS", 10)
    for start in range(0, 200, 20):
        batch = [f"word{number} and{number}" for number in range(start, start + 20)]
        assert [text.tolist() for text in by_words.encode(batch)[0]] == whole(one, batch)[0]
    assert len(by_words._words) < 200


def changed(change):
    core = Tokenizer.from_str(tokenizer("llama3", True, None).backend_tokenizer.to_str())
    change(core)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    "change",
    [
        lambda core: setattr(core, "normalizer", normalizers.Lowercase()),
        lambda core: setattr(core, "normalizer", normalizers.Prepend("▁")),
        lambda core: setattr(core, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda core: setattr(core, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda core: setattr(core, "model", models.Unigram([("a", 0.0)])),
        lambda core: setattr(core, "model", models.BPE({"a": 0}, [])),
        lambda core: setattr(
            core,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)]),
        ),
    ],
)
def test_tokenizers_of_other_kinds_are_left_alone(change):
    assert word_encoder(changed(change), None) is None


def test_added_tokens_that_take_in_their_surroundings_are_left_alone():
    from tokenizers import AddedToken

    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        flags = {"normalized": False, flag: True}
        added = changed(lambda core, flags=flags: core.add_special_tokens([AddedToken("<x>", **flags)]))
        assert word_encoder(added, None) is None
