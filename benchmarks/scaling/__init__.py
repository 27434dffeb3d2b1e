"""Training on 1, 2, ... GPUs of one host, measured: `python -m benchmarks.scaling --help`."""
