"""The one table: every key that Axolotl documents, reads or once read, and what becomes of it here.

Names are paths, with `[]` for the entries of a list; the three lists of datasets share their entries. A key whose value
is a free mapping (`deepspeed`, `lr_scheduler_kwargs`) has one entry, whose rule reads what is inside. The entries stand
in `keys/`, the rules that need more than a line in the modules beside this one.
"""

from stoker.config.axolotl.keys import adapter, engine, learning, model, output, parallel, rows, unrelated, unsupported
from stoker.config.axolotl.outcome import Entry

PARTS = (model, rows, adapter, learning, output, engine, parallel, unsupported, unrelated)
"""Modules of keys, in the order of the docs; no key stands in two of them."""

KEYS: dict[str, Entry] = {name: entry for part in PARTS for name, entry in part.KEYS.items()}
"""Every key's entry; `datasets[]` stands for all three lists of datasets."""

SECTIONS = {name.rpartition(".")[0] for name in KEYS if "." in name} | {
    name.removesuffix("[]") for name in KEYS if name.endswith("[]")
}
"""Keys whose members have entries of their own: they are no keys to be read themselves."""
