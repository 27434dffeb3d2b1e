"""Frozen weight formats (NF4, int8, fp8): quantise, store, dequantise, multiply."""
