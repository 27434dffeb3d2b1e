"""Rows to batches: sources, formats, templates, loss masks, packing, the prepared cache, the loader."""
