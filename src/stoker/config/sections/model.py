"""`model`: what to start from."""

from typing import Any, Literal

from stoker.config.sections.section import Section, Text


class SpecialTokens(Section):
    """Tokens with a role; the tokenizer's own unless set. One that it does not know is added to it."""

    bos: Text | None = None
    """Begins a text."""
    eos: Text | None = None
    """Ends a text, and most templates' turns."""
    pad: Text | None = None
    """Fills rows; it is never seen."""
    unk: Text | None = None
    """Stands for what the tokenizer does not know."""


class Model(Section):
    """The model to start from."""

    base: Text
    """Hub id (`meta-llama/Llama-3.2-1B`), local folder, or `builtin:tiny-llama` (made on the spot, no download)."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub repository; its main branch unless set."""
    trust_remote_code: bool = False
    """Run code that comes with the model, if neither Stoker nor Transformers has its class. Such code can do on this
    machine whatever you can: read it first, and for a Hub id set `revision` to the commit (40 digits) that you read."""
    overrides: dict[Text, Any] = {}
    """Changes to the model's config.json, of native models: `{output_router_logits: true}` learns a mixture's load
    balance too, `{rope_parameters: {...}}` scales positions. What is saved keeps them."""
    tokenizer: Text | None = None
    """Hub id or folder of another tokenizer; the model's own unless set."""
    chat_template: Text | None = None
    """A name in docs/data.md (`chatml`, `llama3`, ...), `tokenizer_default`, `tokenizer_default_fallback_chatml`, a
    Jinja file, or Jinja itself; the tokenizer's own unless set."""
    special_tokens: SpecialTokens = SpecialTokens()
    """Tokens with a role: `{pad: <|finetune_right_pad_id|>}`."""
    new_tokens: list[Text] = []
    """Tokens to add to the tokenizer: each is one token from here on, with a row of its own in the embedding."""
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Format of the frozen base's linear layers under an adapter: `none` as stored, `nf4` 4.1 bits a weight, `int8` 8
    bits, `fp8` 8 bits and products in fp8 on GPUs that have them. A bitsandbytes 4-bit folder is NF4 by itself."""
