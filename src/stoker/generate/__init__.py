"""Decoding with a key/value cache, and token ids to text as they come."""
