"""Checkpoints that are whole or not there, and the state of random-number generators."""
