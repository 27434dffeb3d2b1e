"""How much work a run is: tokens of an epoch, how rows fill, what share is trained; from lengths or from totals.

Documents' lengths come in as plain numbers: counted in prepared data, sampled, or given. The distribution matters, not
the longest: packing fills rows to a few percent, without it a micro-batch is as long as its longest row, and attention
within documents costs what their lengths cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stoker.config.schema import RunConfig
from stoker.errors import ConfigError
from stoker.plan.speed import Rows

# Real conversations' lengths are about log-normal; with a mean alone known, their spread is taken to be this (sigma of
# the logarithm). A rule of thumb: public chat data sets have 0.8 to 1.1.
_SPREAD = 0.9
_QUANTILES = 200


@dataclass(frozen=True)
class Documents:
    """What data holds: `lengths` of documents in tokens, each with how many have it (a histogram or a sample).

    `count`: of all documents, which may be more than the sample has. `trained_share`: of tokens. `source` says where
    all this is from. `is_train_part`: what is held out is not among them. `sequences`: rows that they fill when packed.
    """

    lengths: Mapping[int, float]
    count: int
    trained_share: float
    source: str
    is_train_part: bool = False
    sequences: int | None = None

    @property
    def mean(self) -> float:
        """Tokens of a document on average."""
        total = sum(self.lengths.values())
        return sum(length * count for length, count in self.lengths.items()) / total if total else 0.0

    def cut(self, limit: int) -> "Documents":
        """Returns the same with no document longer than `limit`."""
        lengths: dict[int, float] = {}
        for length, count in self.lengths.items():
            lengths[min(length, limit)] = lengths.get(min(length, limit), 0.0) + count
        return replace(self, lengths=lengths)

    @property
    def felt(self) -> float:
        """The length at which attention would cost the same a token if all documents had it."""
        tokens = sum(length * count for length, count in self.lengths.items())
        return sum(length * length * count for length, count in self.lengths.items()) / tokens if tokens else 0.0


def log_normal(count: int, mean: float, trained_share: float, source: str) -> Documents:
    """Returns documents of which only the mean length is known, spread as real ones are."""
    median = mean / math.exp(_SPREAD**2 / 2)
    lengths: dict[int, float] = {}
    for index in range(_QUANTILES):
        share = (index + 0.5) / _QUANTILES
        length = max(1, round(median * math.exp(_SPREAD * _normal_quantile(share))))
        lengths[length] = lengths.get(length, 0.0) + count / _QUANTILES
    return Documents(lengths, count, trained_share, source)


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


@dataclass(frozen=True)
class Workload:
    """A run's work. `sequences`: rows of an epoch after packing (None: not known, the run counts in steps).

    `steps` of the whole run; `rows` as the speed of a step wants them; `fill`: share of a row's tokens that are not
    padding; `source`: what all this rests on, for people.
    """

    steps: int | None
    sequences: int | None
    rows: Rows
    fill: float
    source: str


def workload(config: RunConfig, documents: Documents | None, *, micro_rows: int = 1) -> Workload:
    """Returns the work of a run on these documents, or on full rows where nothing is known of them.

    `micro_rows`: rows of a micro-batch, which are padded to the longest among them where rows are not packed.
    """
    capacity = config.data.sequence_length
    if documents is None or not documents.lengths:
        rows = Rows(capacity, capacity, 1.0)
        return Workload(config.train.steps, None, rows, 1.0, "full rows, all trained: nothing is known of the data")
    cut = documents.cut(capacity)
    if config.data.packing:
        if cut.sequences is not None:
            sequences, fill = cut.sequences, cut.mean * cut.count / (capacity * cut.sequences)
        else:
            fill = packed_fill(cut, capacity)
            sequences = max(1, math.ceil(cut.mean * cut.count / (capacity * fill)))
        tokens = float(capacity)
    else:
        sequences, tokens = cut.count, longest_of(cut, micro_rows)
        fill = cut.mean / tokens
    rows = Rows(tokens, min(cut.felt, tokens), cut.trained_share * fill)
    if not documents.is_train_part:
        sequences = max(1, round(sequences * (1.0 - _held_out(config, documents))))
    return Workload(_steps(config, sequences), sequences, rows, fill, documents.source)


def _held_out(config: RunConfig, documents: Documents) -> float:
    """Returns the share of the documents that data.validation takes away."""
    held_out = config.data.validation
    if isinstance(held_out, int):
        return min(1.0, held_out / max(1, documents.count))
    return held_out if isinstance(held_out, float) else 0.0


def _steps(config: RunConfig, sequences: int) -> int:
    if config.train.steps is not None:
        return config.train.steps
    # As the loader counts: an epoch's last step may have fewer rows.
    an_epoch = math.ceil(sequences / config.train.batch_size)
    return max(1, math.ceil(round((config.train.epochs or 1.0) * an_epoch, 6)))


def packed_fill(documents: Documents, capacity: int) -> float:
    """Returns the share of packed rows that documents fill: best-fit decreasing over a sample of their lengths."""
    sample = _sampled(documents)
    free: dict[int, int] = {}  # room -> rows that have it
    rows = 0
    for length in sorted(sample, reverse=True):
        room = min((room for room in free if room >= length), default=None)
        if room is None:
            rows, room = rows + 1, capacity
        else:
            free[room] -= 1
            if not free[room]:
                del free[room]
        if room > length:
            free[room - length] = free.get(room - length, 0) + 1
    return sum(sample) / (rows * capacity) if rows else 1.0


def _sampled(documents: Documents, at_most: int = 600) -> list[int]:
    """Returns up to so many lengths, in their proportions."""
    total = sum(documents.lengths.values())
    number = min(at_most, max(1, documents.count))
    sample, due = [], 0.0
    for length, count in sorted(documents.lengths.items()):
        due += number * count / total
        while len(sample) + 0.5 <= due:
            sample.append(length)
    return sample or [round(documents.mean)]


def longest_of(documents: Documents, rows: int) -> float:
    """Returns the expected length of the longest of `rows` documents drawn at random."""
    total, below, expected = sum(documents.lengths.values()), 0.0, 0.0
    for length, count in sorted(documents.lengths.items()):
        share = below + count / total
        expected += length * (share**rows - below**rows)
        below = share
    return expected


def given(
    *, rows: int | None, tokens_per_row: float | None, trained_share: float | None, known: Documents | None
) -> Documents | None:
    """Returns documents as flags say, what they leave out from what is known otherwise.

    Raises:
        ConfigError: a flag makes no sense, or one lacks its counterpart.
    """
    if rows is None and tokens_per_row is None and trained_share is None:
        return known
    if trained_share is not None and not 0.0 < trained_share <= 1.0:
        raise ConfigError(f"--trained-share {trained_share} is not above 0 and at most 1.")
    if known is None and (rows is None or tokens_per_row is None):
        raise ConfigError(
            "nothing is known of the data yet.", fix="Give both --rows and --tokens-per-row (and --trained-share)."
        )
    share = trained_share if trained_share is not None else known.trained_share if known else 1.0
    if tokens_per_row is not None:
        count = rows if rows is not None else known.count if known else 1
        return log_normal(count, tokens_per_row, share, "--rows and --tokens-per-row, spread as real lengths are")
    assert known is not None
    same = rows is None or rows == known.count
    return replace(
        known,
        count=rows or known.count,
        trained_share=share,
        source=f"{known.source}, changed by flags",
        sequences=known.sequences if same else None,
    )


def from_audit(facts: Mapping[str, object], source: str) -> Documents | None:
    """Returns documents from the totals of an audit (`audit.json` of a run: documents, tokens, trained_tokens)."""
    counts = [facts.get(name) for name in ("documents", "tokens", "trained_tokens")]
    if not all(isinstance(count, int) and count > 0 for count in counts):
        return None
    documents, tokens, trained = (int(str(count)) for count in counts)
    return log_normal(documents, tokens / documents, trained / tokens, source)


def from_sample(lengths: Sequence[int], count: int, trained_share: float, source: str) -> Documents:
    """Returns documents from the lengths of a sample of them."""
    histogram: dict[int, float] = {}
    for length in lengths:
        histogram[length] = histogram.get(length, 0.0) + 1.0
    return Documents(histogram, count, trained_share, source)
