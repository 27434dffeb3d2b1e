"""Random rows to measure on: full ones, or documents of real lengths packed into rows."""

import numpy as np

from stoker.compose.data import Data
from stoker.config.schema import RunConfig
from stoker.data.audit import Audit
from stoker.data.pack import pack
from stoker.data.prepared import Prepared

MEDIAN_TOKENS = 300
SIGMA = 1.0
"""Lengths of chat rows are about log-normal; with these two, a fifth of the documents is longer than 700 tokens."""
_SHORTEST = 8


def random_data(config: RunConfig, vocab_size: int, *, steps: int) -> Data:
    """Returns random documents for `steps` steps: of data.sequence_length each, or with data.packing of real lengths.

    Real lengths are log-normal with median MEDIAN_TOKENS, cut at data.sequence_length. Every token but a document's
    first is trained. The same configuration gives the same documents.
    """
    generator = np.random.default_rng(config.train.seed)
    length, rows = config.data.sequence_length, steps * config.train.batch_size
    lengths = _packed_lengths(generator, length, rows) if config.data.packing else np.full(rows, length)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ids = generator.integers(0, vocab_size, offsets[-1], dtype=np.uint32)
    trained = np.ones(len(ids), dtype=np.bool_)
    trained[offsets[:-1]] = False
    audit = Audit(
        rows=len(lengths),
        documents=len(lengths),
        tokens=len(ids),
        trained_tokens=int(trained.sum()),
        longest=int(lengths.max()),
        median=int(np.median(lengths)),
    )
    return Data(Prepared(ids, trained, offsets, audit), None, {"train": audit}, ())


def _packed_lengths(generator: np.random.Generator, longest: int, rows: int) -> np.ndarray:
    """Lengths of enough documents to fill `rows` rows of `longest` tokens."""
    median = min(MEDIAN_TOKENS, longest // 2)
    lengths = np.zeros(0, dtype=np.int64)
    while len(lengths) == 0 or len(pack(np.sort(lengths)[::-1], longest)) < rows:
        drawn = np.exp(generator.normal(np.log(median), SIGMA, 64 * rows)).astype(np.int64)
        lengths = np.concatenate([lengths, drawn.clip(min(_SHORTEST, longest), longest)])
    return lengths
