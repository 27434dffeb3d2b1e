"""Low-rank adapters: submodules replaced on one model instance, and merged back into it."""
