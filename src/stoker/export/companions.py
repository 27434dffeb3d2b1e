"""What a model's folder holds besides weights and config.json."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from stoker.export import peft_config

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_COPIED_STEMS = ("license", "notice", "use_policy")


def copy_companions(base: Path, adapter_folder: Path | None, written: Path) -> None:
    """Copies what a model's folder holds besides weights and config.json: tokenizer, templates, licences.

    A tokenizer beside the adapter goes before that of the base.
    """
    for path in _companions(base):
        shutil.copyfile(path, written / path.name)
    if adapter_folder is not None and (adapter_folder / "tokenizer_config.json").is_file():
        for path in _companions(adapter_folder):
            shutil.copyfile(path, written / path.name)


def _companions(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES or path.stem.lower().startswith(_COPIED_STEMS)
        written_anew = path.name in ("config.json", peft_config.FILE) or path.name.endswith(".index.json")
        if wanted and not written_anew and path.is_file():
            yield path
