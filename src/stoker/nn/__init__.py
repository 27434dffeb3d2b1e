"""Modules over the kernels, built from flat arguments."""
