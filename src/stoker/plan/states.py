"""Bytes of an optimiser's state, whole and where ranks share its rows."""

from stoker.arch import arithmetic
from stoker.arch.borrowed import AnySpec
from stoker.config.schema import Adapter, Optimizer
from stoker.plan.remember import remember

# Values of a row that share a scale in 8 bits, and the shortest rows that are kept so (kernels/adamw_8bit.py,
# optim/eight_bit.py). Of each weight there are two averages, with an fp32 scale each.
_BLOCK, _MIN_WIDTH = 256, 8


def state_bytes(
    spec: AnySpec, optimizer: Optimizer, trained: int, *, adapter: Adapter | None = None, shards: int = 1
) -> float:
    """Returns the bytes of the state of `trained` values on one of `shards` ranks that share its rows.

    Without `adapter` they are the model's own. Adafactor's means over rows are on every rank.
    """
    if optimizer.kind == "adafactor":
        rows, columns = _adapter_means(trained, adapter) if adapter else _means(spec)
        return 4 * (rows / shards + columns)
    return trained * bytes_each(optimizer, adapter) / shards


def bytes_each(optimizer: Optimizer, adapter: Adapter | None = None) -> float:
    """Returns the bytes of state for each trained value, on one rank that holds all of it."""
    match optimizer.kind:
        case "adamw_8bit":
            wide = _in_eight_bits(_BLOCK)
            # Half of an adapter's values are in B, whose rows are as long as its rank.
            return wide if adapter is None else (wide + _in_eight_bits(adapter.rank)) / 2
        case "sgd":
            return 4.0 if optimizer.momentum else 0.0
        case "adafactor":
            # A row and a column for each matrix: a thousandth of AdamW's at ordinary widths.
            return 0.01 if adapter is None else 4.0 / adapter.rank
        case "muon":
            # One average for the matrices; embeddings and norms have AdamW's two, hence the upper bound.
            return 8.0
        case _:
            return 8.0


def _in_eight_bits(width: int) -> float:
    return 2.0 + 2 * 4 / min(width, _BLOCK) if width >= _MIN_WIDTH else 8.0


@remember(0)
def _means(spec: AnySpec) -> tuple[float, float]:
    """Adafactor's numbers for a model's own weights: those in rows (all of a vector's, and of experts), and columns."""
    table = spec.vocab_size * spec.hidden_size
    matrices, rows, columns = 0, 0, 0
    for layer in spec.layers:
        for linear in arithmetic.linears(layer, spec.hidden_size).values():
            matrices += linear.weights * max(1, linear.experts)
            out = linear.weights // linear.in_features
            rows += (linear.in_features + out) * linear.experts if linear.experts else out
            columns += 0 if linear.experts else linear.in_features
    tables = min(2, (arithmetic.num_parameters(spec) - matrices) // table)  # a tied head is the embedding's own
    vectors = arithmetic.num_parameters(spec) - matrices - tables * table
    return rows + tables * spec.vocab_size + vectors, columns + tables * spec.hidden_size


def _adapter_means(trained: int, adapter: Adapter) -> tuple[float, float]:
    """The same for A [rank, in] and B [out, rank], half of the values each: B's rows, and A's columns."""
    return trained / adapter.rank / 2, trained / adapter.rank / 2
