"""Models that run through Transformers' own classes: what pays is replaced on one instance, and checked there."""
