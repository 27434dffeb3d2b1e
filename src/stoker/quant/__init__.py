"""Frozen weight formats: quantise, store, dequantise. The room is laid out; no format lives here yet."""
