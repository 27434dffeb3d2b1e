"""Stoker: a fine-tuning engine for language models."""
