"""Axolotl's keys by what they are about; `stoker.config.axolotl.table` puts them together."""
