"""How a model's folder says that its weights are stored quantised."""

from collections.abc import Mapping
from typing import Any

from stoker.errors import ModelError


def stored_quantization(config: Mapping[str, Any], where: str) -> str:
    """Returns "nf4" for a folder that bitsandbytes wrote in 4 bits, "none" for one that is not quantised.

    `config` is the parsed config.json, `where` its name in errors. Raises ModelError for any other format.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return "none"
    method = settings.get("quant_method", "bitsandbytes") if isinstance(settings, dict) else settings
    four_bits = isinstance(settings, dict) and settings.get("load_in_4bit", settings.get("_load_in_4bit"))
    if method == "bitsandbytes" and four_bits and settings.get("bnb_4bit_quant_type", "fp4") == "nf4":
        return "nf4"
    kind = settings.get("bnb_4bit_quant_type") if four_bits else None
    what = f"{method} {kind or ''}".strip() if isinstance(method, str) else repr(settings)
    raise ModelError(
        f"quantization_config: weights stored as {what} are not computed.",
        where=where,
        fix="Use a bitsandbytes NF4 folder, or the unquantised checkpoint with model.quantization.",
    )
