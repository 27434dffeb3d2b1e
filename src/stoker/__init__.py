"""Stoker: a fine-tuning engine for language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoker.api import Model as Model
    from stoker.api import load as load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports the Python API when it is first asked for: `stoker --help` must not wait for torch."""
    if name in ("Model", "load"):
        from stoker import api

        return getattr(api, name)
    raise AttributeError(f"module 'stoker' has no attribute {name!r}")
