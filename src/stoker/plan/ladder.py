"""The recompute ladder: which layers keep what for the backward, from keeping everything to keeping next to nothing.

The layers that keep less are the first ones: their backward runs last, when the others hold nothing any more, so what
it computes again takes memory that is free by then.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from stoker.arch import activations
from stoker.arch.activations import LADDER, Held, Keep, Micro
from stoker.arch.borrowed import AnySpec
from stoker.arch.shape import why_not_llama
from stoker.arch.spec import LayerSpec
from stoker.plan.remember import remember

Layers = Literal["fused", "op by op"]
TILE_TOKENS = 8192
"""Of the feed-forward's tiles: enough that matrix products run at full speed, few beside a long row."""


@dataclass(frozen=True)
class Ladder:
    """The rung of each layer, whether what they keep waits on the host, and how the layers run.

    `tile_tokens`: the feed-forward goes through so many tokens at a time (None: through all at once). `staying`: with
    `offload`, so many of the last layers keep theirs on the device. Their backward comes first: nothing has to be
    waited for there, and what they hold is gone when the others' gradients have come.
    """

    keep: tuple[Keep, ...]
    offload: bool
    layers: Layers
    tile_tokens: int | None = None
    staying: int = 0

    @property
    def num_away(self) -> int:
        """How many layers, from the first, have what they keep wait on the host."""
        return len(self.keep) - self.staying if self.offload else 0

    @property
    def words(self) -> str:
        """What the layers keep and where, for people: "keep all, on the host in 14"."""
        away = f", on the host in {self.num_away}" if self.staying else " and on the host"
        return words(self.keep) + (away if self.num_away else "")

    def tiled(self, spec: AnySpec, micro: Micro) -> "Ladder":
        """Returns the same with the feed-forward in tiles if that lowers the peak, and without if not."""
        whole = self if self.tile_tokens is None else replace(self, tile_tokens=None)
        if self.layers != "fused" or set(self.keep) <= {"all"} or micro.tokens < TILE_TOKENS * 5 // 4:
            return whole
        tiles = replace(self, tile_tokens=TILE_TOKENS)
        return tiles if tiles.device_bytes(spec, micro) < whole.device_bytes(spec, micro) else whole

    @remember(1)
    def device_bytes(self, spec: AnySpec, micro: Micro) -> int:
        """Returns the bytes of all layers on the device at the backward's peak."""
        return activations.peak(self._runs(spec, micro))

    @remember(1)
    def bytes_after_forward(self, spec: AnySpec, micro: Micro) -> int:
        """Returns the bytes of all layers on the device while the head runs."""
        return activations.after_forward(self._runs(spec, micro))

    @remember(1)
    def host_bytes(self, spec: AnySpec, micro: Micro) -> int:
        """Returns the bytes that wait in pinned host memory."""
        return sum(count * held.host for held, count in self._runs(spec, micro))

    def held(self, spec: AnySpec, micro: Micro) -> list[Held]:
        """Returns what each layer holds, in their order."""
        return [held for held, count in self._runs(spec, micro) for _ in range(count)]

    def _runs(self, spec: AnySpec, micro: Micro) -> list[tuple[Held, int]]:
        """Returns what layers hold, in their order, each with how many alike follow one another."""
        # Most layers are one and the same object.
        objects = {id(layer): layer for layer in spec.layers}
        away, count = self.num_away, len(self.keep)
        first: _Place = "all away" if away == count else "away"
        places: list[_Place] = [first if index < away else "here" for index in range(count)]
        if 0 < away < count:
            places[away] = "first here"
        runs = itertools.groupby(zip(map(id, spec.layers), self.keep, places, strict=True))
        return [
            (
                _held(objects[identity], spec.hidden_size, micro, rung, (self.layers, place, self.tile_tokens)),
                len(list(same)),
            )
            for (identity, rung, place), same in runs
        ]


_Place = Literal["here", "all away", "away", "first here"]


@remember(0)
def _held(layer: LayerSpec, hidden_size: int, micro: Micro, rung: Keep, way: tuple[Layers, _Place, int | None]) -> Held:
    """Returns what a layer holds; `way`: how the layers run, where what they keep waits, and the tokens of a tile.

    "away" is on the host, as far as it can be: for this layer and those before it, or for all. "first here" is the
    device, for the layer after those.
    """
    how, place, tile_tokens = way
    if how == "op by op" or why_not_llama(layer):
        # Among layers that the layer kernel runs, the residual stream is as those hand it on.
        held = activations.op_by_op(layer, hidden_size, micro if how == "op by op" else micro.narrow(), rung)
    else:
        is_away = place in ("away", "all away")
        held = activations.fused(layer, hidden_size, micro, rung, offload=is_away, tile_tokens=tile_tokens)
        if place == "away":  # all has left when the last of those that stay has run
            held = replace(held, leaving=0)
        elif place == "first here":  # what the layer before it needs comes back beside its backward
            others = activations.fused(layer, hidden_size, micro, rung, offload=True, tile_tokens=tile_tokens)
            held = replace(held, passing=held.passing + min(others.leaving, others.host))
    return replace(held, arriving=activations.arriving(layer, hidden_size, micro))


@remember(0)
def ladders_of(spec: AnySpec, **settings: Any) -> tuple[Ladder, ...]:
    """Returns what `ladders` yields for a model's layers."""
    return tuple(ladders(spec.layers, **settings))


class Weighed(NamedTuple):
    """A ladder with the bytes of its layers at the backward's peak, on the device and on the host.

    `after_forward`: those on the device while the head runs.
    """

    ladder: Ladder
    device: int
    host: int
    after_forward: int


class Profile:
    """The ladders of a model in their order, each weighed once for a micro-batch, when it is first asked for."""

    def __init__(self, spec: AnySpec, micro: Micro, all_of_them: tuple[Ladder, ...]) -> None:
        self._spec, self._micro, self._ladders = spec, micro, all_of_them
        self._known: list[Weighed] = []

    def __iter__(self) -> Iterator[Weighed]:
        for index in range(len(self._ladders)):
            if index == len(self._known):
                self._known.append(self._weigh(self._ladders[index]))
            yield self._known[index]

    def within(self, room: int) -> Iterator[Weighed]:
        """Yields those whose layers hold at most `room` bytes of the device."""
        return (one for one in self if one.device <= room)

    def last(self) -> Iterator[Weighed]:
        """Yields the one that keeps least."""
        yield self._weigh(self._ladders[-1])

    def _weigh(self, ladder: Ladder) -> Weighed:
        tiled = ladder.tiled(self._spec, self._micro)
        host = tiled.host_bytes(self._spec, self._micro) if tiled.offload else 0
        device, after = (one(self._spec, self._micro) for one in (tiled.device_bytes, tiled.bytes_after_forward))
        return Weighed(tiled, device, host, after)


@remember(0)
def profile(spec: AnySpec, micro: Micro, **settings: Any) -> Profile:
    """Returns the ladders that `ladders` yields for a model's layers, weighed for a micro-batch."""
    return Profile(spec, micro, ladders_of(spec, **settings))


def ladders(
    layers: Sequence[LayerSpec],
    *,
    asked: str,
    offload: bool | int | Literal["auto"],
    can_fuse: bool,
    can_offload: bool,
    fuses_all: bool,
) -> Iterator[Ladder]:
    """Yields what may run, from the least to the most that is computed again.

    A layer that the layer kernel cannot run among others that it can keeps all, or its input alone.
    `asked` and `offload` are the user's settings, "auto" for the plan's choice. `can_fuse`: the layer kernel can run
    this model; `fuses_all`: it is the faster one even where nothing is computed again. With an automatic offload, what
    layers keep on the rung "mixer" waits on the host, one layer after the other, before any layer computes q, k and v
    again, and what they keep of attention before any computes attention again.
    """
    everything = ("all",) * len(layers)
    if not can_fuse:
        yield from _mixtures(layers, LADDER, asked, offload=False, how="op by op")
        return
    if not fuses_all and asked in ("auto", "none") and offload in ("auto", False):
        yield Ladder(everything, offload=False, layers="op by op")
        if asked == "none":
            return
    if offload != "auto" or not can_offload:
        is_away = can_offload and offload is not False
        staying = max(0, len(layers) - offload) if is_away and not isinstance(offload, bool | str) else 0
        for one in _mixtures(layers, LADDER, asked, offload=is_away, how="fused"):
            yield replace(one, staying=staying)
        return
    kept = list(_mixtures(layers, LADDER[:2], asked, offload=False, how="fused"))
    yield from kept
    for staying in reversed(range(len(layers))):
        yield replace(kept[-1], offload=True, staying=staying)
    if asked == "auto":
        yield from itertools.islice(_mixtures(layers, LADDER[1:3], asked, offload=False, how="fused"), 1, None)
        yield from itertools.islice(_mixtures(layers, LADDER[1:], asked, offload=True, how="fused"), 1, None)


def _mixtures(
    layers: Sequence[LayerSpec], rungs: Sequence[Keep], asked: str, *, offload: bool, how: Layers
) -> Iterator[Ladder]:
    """Yields every layer on the highest rung, then one layer after the other a rung lower; or the rung asked for."""
    count = len(layers)
    legal = partial(activations.legal, is_fused=how == "fused")
    if asked != "auto":
        rung: Keep = next(rung for rung in LADDER if rung == ("all" if asked == "none" else asked))
        yield Ladder(legal(layers, (rung,) * count), offload, how)
        return
    keep = legal(layers, (rungs[0],) * count)
    yield Ladder(keep, offload, how)
    for upper, lower in itertools.pairwise(rungs):
        for lowered in range(1, count + 1):
            previous, keep = keep, legal(layers, (lower,) * lowered + (upper,) * (count - lowered))
            if keep != previous:
                yield Ladder(keep, offload, how)


def lower(ladder: Ladder, *, can_offload: bool) -> Ladder | None:
    """Returns the ladder with every layer on the rung below its lowest, or what waits on the host; None below that.

    For a run whose memory was not what the plan thought. Layers that run op by op keep their input alone at once; where
    some offload, all do first.
    """
    if ladder.num_away and ladder.staying:
        return replace(ladder, staying=0)
    lowest = max(LADDER.index(rung) for rung in ladder.keep) if ladder.keep else len(LADDER)
    is_fused = ladder.layers == "fused"
    if lowest + 1 < len(LADDER):
        rung = LADDER[lowest + 1] if is_fused else "input"
        return replace(ladder, keep=(rung,) * len(ladder.keep), tile_tokens=TILE_TOKENS if is_fused else None)
    if any(rung != "input" for rung in ladder.keep):
        return replace(ladder, keep=("input",) * len(ladder.keep), tile_tokens=TILE_TOKENS if is_fused else None)
    if is_fused and can_offload and not ladder.offload:
        return replace(ladder, offload=True)
    return None


def words(keep: Sequence[Keep]) -> str:
    """Returns the ladder for people: "keep all", or "keep all in 30 layers, mixer in 2"."""
    counts = {rung: list(keep).count(rung) for rung in LADDER if rung in keep}
    if len(counts) < 2:
        return f"keep {next(iter(counts), 'all')}"
    (first, number), *rest = counts.items()
    layers = "layer" if number == 1 else "layers"
    return f"keep {first} in {number} {layers}, " + ", ".join(f"{rung} in {count}" for rung, count in rest)
