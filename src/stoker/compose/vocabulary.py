"""Tokens that a configuration gives a role or adds: on the tokenizer, and as rows of the embedding and the head."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stoker.config.schema import Model
from stoker.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from stoker.models.open import Model as LoadedModel


@dataclass(frozen=True)
class Tokens:
    """What to change of a tokenizer: `roles` (bos, eos, pad, unk) and tokens to add.

    `may_grow`: tokens may be added that the model has no row for yet, because every weight is trained.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    may_grow: bool = False

    @classmethod
    def of(cls, model: Model, *, may_grow: bool) -> "Tokens":
        """Returns what the section `model` of a configuration asks for."""
        roles = {role: token for role, token in model.special_tokens.model_dump().items() if token is not None}
        return cls(roles, tuple(model.new_tokens), may_grow)

    def apply(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
        """Gives the tokens their roles and adds those that the tokenizer does not know.

        A padding token without a row in the model's embedding is left out where the embedding may not grow: padding is
        never seen, so that any token fills rows as well.

        Raises:
            ModelError: the model has no row for a token that is not padding, and may not get one.
        """
        known = tokenizer.get_vocab()
        missing = [token for token in dict.fromkeys([*self.roles.values(), *self.new]) if token not in known]
        room = len(missing) if self.may_grow else max(0, vocab_size - len(tokenizer))
        pad = self.roles.get("pad")
        if len(missing) > room and pad in missing and pad not in self.new:
            missing.remove(pad)
        if len(missing) > room:
            raise ModelError(
                f"{', '.join(missing)}: the tokenizer does not know them and the model has no rows for them. An "
                "adapter trains no rows of the embedding.",
                fix="Use tokens of the vocabulary, or train every weight (no section adapter).",
            )
        for role, token in self.roles.items():
            if token in known or token in missing:
                tokenizer.add_special_tokens({f"{role}_token": token})
        tokenizer.add_tokens([token for token in self.new if token in missing], special_tokens=False)


def grow(decoder: "LoadedModel", num_tokens: int) -> None:
    """Gives the embedding and the head a row for each token; new rows start as the mean of those there are."""
    from stoker.nn.decoder import Decoder

    if not isinstance(decoder, Decoder):
        raise ModelError("tokens are added to native models only.", fix="Use tokens of the model's vocabulary.")
    _grow(decoder.embedding, num_tokens)
    decoder.embedding.num_embeddings = num_tokens
    if decoder.head is not None:
        _grow(decoder.head, num_tokens)
        decoder.head.out_features = num_tokens
    decoder.vocab_size = num_tokens


def _grow(module: "nn.Embedding | nn.Linear", num_rows: int) -> None:
    import torch
    from torch.nn import Parameter

    for name, parameter in list(module.named_parameters(recurse=False)):
        old = parameter.detach()
        start = old.float().mean(0, keepdim=True).to(old.dtype)
        rows = [old, start.expand(num_rows - old.shape[0], *old.shape[1:])]
        setattr(module, name, Parameter(torch.cat(rows), requires_grad=parameter.requires_grad))
