"""`adapter`: what is trained while the base stays frozen."""

from typing import Annotated, Literal

from pydantic import Field

from stoker.config.sections.section import Count, Positive, Ratio, Section, Text


class Adapter(Section):
    """A low-rank adapter that is trained while the base stays frozen. Leave the section out to train every weight."""

    kind: Literal["lora", "dora"] = "lora"
    """`lora`, or `dora`: LoRA with a trained magnitude for each output row."""
    rank: Count = 16
    """Inner size of the adapter's two matrices."""
    alpha: Positive = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Ratio = 0.0
    """Share of the adapter's inputs dropped in training."""
    start_from: Text | None = None
    """Folder of an adapter in PEFT's format to go on from, instead of a new one; its settings must be those here."""
    targets: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """`all-linear`, `all-dense` (not on a mixture's experts), a list of layer names such as `[q_proj, v_proj]`, or a
    regular expression for full names."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), which keeps large ranks learning."""
