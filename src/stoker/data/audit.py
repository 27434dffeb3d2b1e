"""What a prepared dataset holds, counted before the first step, and what is wrong with it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stoker.errors import Problem

LOW_TRAINED_SHARE = 0.01
MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Audit:
    """Counts of one prepared dataset. Tokens are counted after truncation; a trained token is a target of the loss."""

    rows: int = 0
    """Rows that became documents."""
    documents: int = 0
    """Documents after cutting long ones into pieces."""
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    median: int = 0
    """Tokens of the median document."""
    bad_rows: int = 0
    """Rows left out because they are malformed."""
    bad_row_examples: tuple[str, ...] = ()
    truncated: int = 0
    """Rows cut at the sequence length."""
    truncated_tokens: int = 0
    dropped: int = 0
    """Rows left out because they are longer than the sequence length."""
    split: int = 0
    """Rows cut into pieces."""
    rows_without_trained_token: int = 0
    untrained_examples: tuple[str, ...] = ()
    turns: int = 0
    """Rendered turns of the roles to train (for text: documents)."""
    turns_not_rendered: int = 0
    """Turns of the roles to train that the chat template leaves out, or of which it prints the calls alone."""
    turns_with_end: int = 0
    """Turns whose end-of-turn token is trained."""
    end_tokens: Mapping[str, int] = field(default_factory=dict)
    """The end-of-turn tokens found after trained turns."""
    end_of_turn_wanted: bool = True
    every_end_wanted: bool = True
    """Whether every trained turn's end should train, not only a conversation's last."""
    doubled_bos: int = 0
    """Documents that begin with two BOS tokens."""
    special_in_content: int = 0
    """Rows whose contents hold the text of a special token, which is then read as that token."""
    roles: Mapping[str, int] = field(default_factory=dict)
    """Messages by role."""
    train_on: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    """Source -> format and why it was taken for that."""
    template: str = "none"
    """Where the chat template comes from and how trained text is found in it."""
    short: int = 0
    """Rows left out because they are shorter than the least length."""
    duplicates: int = 0
    """Rows left out because an equal one came before."""
    rows_by_turn: int = 0
    """Rows in which trained text was told by what the template prints for each message."""
    row_kind: str = "documents"
    """What rows are: "documents" to learn, "pairs" of a better and a worse answer, or "labelled" documents."""
    held_out: int = 0
    """Documents of the same rows that were held out: what is not counted by documents and tokens is of both."""

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens, 0.0 if there are none."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def end_of_turn_share(self) -> float:
        """Trained turns whose end-of-turn token is trained, over all trained turns; 0.0 if there are none."""
        return self.turns_with_end / self.turns if self.turns else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and shares as plain JSON values."""
        facts = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return facts | {"trained_share": self.trained_share, "end_of_turn_share": self.end_of_turn_share}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Audit":
        """Reads what `to_dict` returned."""
        known: dict[str, Any] = {name: value for name, value in facts.items() if name in cls.__dataclass_fields__}
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        return cls(**known)


class Tally:
    """Counts that grow while rows are prepared; `audit` turns them into an `Audit`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.end_tokens: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self.formats: dict[str, str] = {}
        self.templates: dict[str, None] = {}
        self.row_kind = "documents"
        self.bad_row_examples: list[str] = []
        self.untrained_examples: list[str] = []
        self.lengths: Counter[int] = Counter()
        """Documents by length."""

    def merge(self, other: "Tally") -> None:
        """Adds what was counted over later rows."""
        self.counts.update(other.counts)
        self.end_tokens.update(other.end_tokens)
        self.roles.update(other.roles)
        self.lengths.update(other.lengths)
        self.formats.update(other.formats)
        self.templates.update(other.templates)
        for mine, theirs in (
            (self.bad_row_examples, other.bad_row_examples),
            (self.untrained_examples, other.untrained_examples),
        ):
            mine.extend(theirs[: MAX_EXAMPLES - len(mine)])

    def taken(self) -> "Tally":
        """Returns what was counted so far and starts anew from nothing, on rows of the same kind."""
        counted = Tally()
        counted.merge(self)
        counted.row_kind = self.row_kind
        for part in (self.counts, self.end_tokens, self.roles, self.lengths, self.formats, self.templates):
            part.clear()
        self.bad_row_examples, self.untrained_examples = [], []
        return counted

    def bad_row(self, problem: str) -> None:
        """Counts a row that is left out because it is malformed."""
        self.counts["bad_rows"] += 1
        if len(self.bad_row_examples) < MAX_EXAMPLES:
            self.bad_row_examples.append(problem)

    def document(self, where: str, *, length: int, num_trained: int) -> None:
        """Counts a finished document."""
        self.lengths[length] += 1
        self.counts["tokens"] += length
        self.counts["trained_tokens"] += num_trained
        if not num_trained:
            self.counts["rows_without_trained_token"] += 1
            if len(self.untrained_examples) < MAX_EXAMPLES:
                self.untrained_examples.append(where)

    def audit(self, *, train_on: Sequence[str], end_of_turn_wanted: bool, every_end_wanted: bool = True) -> Audit:
        """Returns what was counted."""
        counts: dict[str, Any] = dict(self.counts)
        return Audit(
            **counts,
            documents=self.lengths.total(),
            longest=max(self.lengths, default=0),
            median=_median(self.lengths),
            bad_row_examples=tuple(self.bad_row_examples),
            untrained_examples=tuple(self.untrained_examples),
            end_tokens=dict(self.end_tokens.most_common()),
            end_of_turn_wanted=end_of_turn_wanted,
            every_end_wanted=every_end_wanted,
            roles=dict(self.roles.most_common()),
            train_on=tuple(train_on),
            formats=self.formats,
            template="; ".join(self.templates) or "none",
            row_kind=self.row_kind,
        )


def problems(audit: Audit) -> list[Problem]:
    """Returns what makes training pointless or wrong; a run should stop for any of these."""
    found = []
    if not audit.trained_tokens:
        found.append(_nothing_trained(audit))
    elif audit.end_of_turn_wanted and audit.turns and not audit.turns_with_end:
        found.append(
            Problem(
                f"the end-of-turn token is trained in none of {audit.turns:,} turns, so the model would never stop.",
                fix="Use a chat template whose end-of-turn marker is a special token of this tokenizer (zephyr's is "
                "its end of text), name the token in data.end_of_turn_tokens, raise data.sequence_length if turns are "
                "cut off, or set data.train_on_end_of_turn: false.",
            )
        )
    if audit.doubled_bos:
        found.append(
            Problem(
                f"{audit.doubled_bos:,} of {audit.documents + audit.held_out:,} documents begin with two BOS tokens.",
                fix="Remove the BOS text from the rows or from the chat template.",
            )
        )
    return found


def warnings(audit: Audit) -> list[Problem]:
    """Returns what a person should know before training, though it may be meant."""
    found = []
    if audit.bad_rows:
        found.append(Problem(f"{audit.bad_rows:,} malformed rows are left out (first: {audit.bad_row_examples[0]})"))
    if audit.truncated:
        found.append(
            Problem(
                f"{audit.truncated:,} of {audit.rows:,} rows are cut at the sequence length "
                f"({audit.truncated_tokens:,} tokens lost).",
                fix="Raise data.sequence_length to keep them whole.",
            )
        )
    if audit.dropped:
        found.append(Problem(f"{audit.dropped:,} rows are longer than the sequence length and are left out."))
    if audit.short:
        found.append(Problem(f"{audit.short:,} rows are shorter than data.min_length and are left out."))
    if audit.duplicates:
        found.append(Problem(f"{audit.duplicates:,} rows are equal to an earlier one and are left out."))
    if audit.rows_without_trained_token and audit.trained_tokens:
        example = f" (first: {audit.untrained_examples[0]})" if audit.untrained_examples else ""
        found.append(Problem(f"{audit.rows_without_trained_token:,} documents have no trained token{example}."))
    if audit.turns_not_rendered:
        found.append(
            Problem(f"the chat template leaves out {audit.turns_not_rendered:,} turns that should be trained.")
        )
    if audit.end_of_turn_wanted and audit.every_end_wanted and 0 < audit.turns_with_end < audit.turns:
        found.append(
            Problem(
                f"{audit.turns - audit.turns_with_end:,} of {audit.turns:,} trained turns end without a trained end."
            )
        )
    if audit.special_in_content:
        found.append(
            Problem(f"{audit.special_in_content:,} rows hold the text of a special token, which is read as that token.")
        )
    if audit.rows_by_turn:
        found.append(
            Problem(
                f"in {audit.rows_by_turn:,} rows the chat template changes contents; what trains there is what it "
                "prints for each message.",
                fix="Look at some of them with `stoker inspect`.",
            )
        )
    if audit.trained_tokens and audit.trained_share < LOW_TRAINED_SHARE:
        found.append(Problem(f"only {audit.trained_share:.2%} of the tokens are trained."))
    return found


def _median(lengths: Counter[int]) -> int:
    """The middle length, rounded down between two."""
    total, seen, low = lengths.total(), 0, 0
    for length in sorted(lengths):
        if not low and 2 * (seen + lengths[length]) >= total:
            low = length
        seen += lengths[length]
        if 2 * seen > total:
            return (low + length) // 2
    return 0


def _nothing_trained(audit: Audit) -> Problem:
    if not audit.documents:
        return Problem("no row is left to train on.", fix="Every row was malformed or too long; see the counts above.")
    roles = ", ".join(f"{role} ({count:,})" for role, count in audit.roles.items())
    if roles and not set(audit.train_on) & set(audit.roles):
        return Problem(
            f"no token is trained: data.train_on = {', '.join(audit.train_on)}, but the roles in the data are {roles}.",
            fix="Name roles that the data has, or use `all`.",
        )
    return Problem(
        f"none of {audit.tokens:,} tokens is trained.",
        fix="Raise data.sequence_length if answers are cut off, or look at rows with `stoker inspect`.",
    )
