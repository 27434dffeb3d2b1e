"""The training loop, evaluation, guards and interrupts."""
