"""`task`: what is learned from the rows."""

from typing import Annotated, Literal

from pydantic import Tag

from stoker.config.sections.section import DEFAULT_KINDS, Section, by_kind


class Sft(Section):
    """Supervised fine-tuning: learn the turns that `data.train_on` names."""

    kind: Literal["sft"] = "sft"
    """The task."""


class Pretrain(Section):
    """Continued pre-training: learn every token of plain text; long texts are cut into pieces, none is lost."""

    kind: Literal["pretrain"] = "pretrain"
    """The task."""


Task = Annotated[Annotated[Sft, Tag("sft")] | Annotated[Pretrain, Tag("pretrain")], by_kind(DEFAULT_KINDS[0])]
