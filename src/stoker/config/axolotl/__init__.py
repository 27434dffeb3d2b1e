"""Axolotl's YAML in: one table of its keys, the translation into ours, and a report in which every key has its line."""
