import pytest
import torch

from stoker.arch import families
from stoker.compose.vocabulary import Tokens, grow
from stoker.errors import ModelError
from stoker.models import native


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<e>", "a", "b", "<u>"])}, "<u>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", unk_token="<u>")


def decoder(*, tied, vocab_size=4):
    spec = families.read(
        {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 32,
            "tie_word_embeddings": tied,
        },
        "config.json",
    )
    return native.build(spec)


def test_a_known_token_only_gets_its_role(tokenizer):
    Tokens({"eos": "b", "pad": "a"}).apply(tokenizer, vocab_size=4)

    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("b", "a", 4)


def test_a_new_token_is_one_token(tokenizer):
    Tokens({"bos": "<s>"}, ("<tool>",), may_grow=True).apply(tokenizer, vocab_size=4)

    assert tokenizer.encode("a <tool> b", add_special_tokens=False) == [1, 5, 2]
    assert (tokenizer.bos_token_id, len(tokenizer)) == (4, 6)


def test_spare_rows_of_the_model_are_used_before_it_has_to_grow(tokenizer):
    Tokens(new=("<tool>",)).apply(tokenizer, vocab_size=8)

    assert len(tokenizer) == 5


def test_a_token_without_a_row_is_refused_where_no_row_can_train(tokenizer):
    with pytest.raises(ModelError, match="<tool>: the tokenizer does not know them"):
        Tokens(new=("<tool>",)).apply(tokenizer, vocab_size=4)


def test_a_padding_token_without_a_row_is_left_out(tokenizer):
    Tokens({"pad": "<pad>"}).apply(tokenizer, vocab_size=4)

    assert (tokenizer.pad_token, len(tokenizer)) == (None, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_as_the_mean_and_old_ones_stay(tied):
    model = decoder(tied=tied)
    before = model.embedding.weight.detach().clone()

    grow(model, 7)

    torch.testing.assert_close(model.embedding.weight[:4], before, rtol=0, atol=0)
    torch.testing.assert_close(model.embedding.weight[4:], before.mean(0).expand(3, -1))
    assert model.head_weight.shape == (7, 8)
    assert (model.head is None) is tied
    assert model.logits(model(torch.tensor([[6, 1]]))).shape == (1, 2, 7)
