"""Axolotl's FSDP settings, of both its versions, as `engine.strategy` and `engine.fsdp2`.

Members of `fsdp_config` come with FSDP 1's prefix or without it; `fsdp` may be a list, or words in one text.
"""

from collections.abc import Callable, Mapping
from typing import Any

from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import advice, flag, text, whole
from stoker.config.document import Path

_STRATEGY: Path = ("engine", "strategy")
_SECTION: Path = ("engine", "fsdp2")

# What each strategy of FSDP 1 is in FSDP 2: whether a layer's weights are let go after its forward; None: not FSDP.
_STRATEGIES = {
    "FULL_SHARD": True,
    "HYBRID_SHARD": True,
    "SHARD_GRAD_OP": False,
    "HYBRID_SHARD_ZERO2": False,
    "_HYBRID_SHARD_ZERO2": False,
    "NO_SHARD": None,
}
_BY_NUMBER = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # accelerate's, from 1
_OTHER_WORDS = ("AUTO_WRAP", "OFFLOAD")
_POLICIES = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
_STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT")
_HYBRID = "HYBRID"
_HYBRID_NOTE = "set engine.fsdp2.replicas to the number of machines: one group shares weights on each"


def words(reading: Reading) -> Outcome:
    """`fsdp`: a list of words, one text of them, or true."""
    value = reading.value
    if isinstance(value, bool):
        return _shared(reading, {}) if value else Outcome("no effect", "off, as it is here")
    found = [text(word) for word in value] if isinstance(value, list) else text(value).split()
    settings: dict[Path, Any] = {}
    for word in found:
        name = word.upper()
        if name in _STRATEGIES:
            settings |= _of_strategy(name)
        elif name not in _OTHER_WORDS:
            known = [known.lower() for known in (*_STRATEGIES, *_OTHER_WORDS)]
            raise UnreadableError(f"{word!r} is no word of FSDP's.", advice(word, known))
    if settings.get(_STRATEGY) == "ddp":
        return _shared(reading, settings)
    if any(word.upper() == "OFFLOAD" for word in found):
        settings[*_SECTION, "offload"] = "cpu"
    return _shared(reading, settings, _HYBRID_NOTE if any(_HYBRID in word.upper() for word in found) else "")


def version(reading: Reading) -> Outcome:
    """`fsdp_version`, `fsdp_config.version`."""
    if whole(reading.value) not in (1, 2):
        raise UnreadableError("it must be 1 or 2.")
    return Outcome("no effect", "engine.strategy: fsdp2 is torch's second version, for either")


def member(reading: Reading) -> Outcome:
    """A member of `fsdp_config`."""
    name = str(reading.path[-1]).removeprefix("fsdp_")
    return _MEMBERS[name](reading)


def replicas(reading: Reading) -> Mapping[Path, Any]:
    """Returns the settings of `dp_replicate_size` and `dp_shard_size`, beside what they do to the batch."""
    size = whole(reading.value)
    if str(reading.path[-1]) == "dp_shard_size":
        return {_STRATEGY: "fsdp2"} if size > 1 else {}
    is_shared = whole(reading.other("dp_shard_size") or 1) > 1 or bool(reading.other("fsdp_config"))
    return {_STRATEGY: "fsdp2", (*_SECTION, "replicas"): size} if size > 1 and is_shared else {}


def _of_strategy(name: str) -> dict[Path, Any]:
    reshards = _STRATEGIES[name]
    return {_STRATEGY: "ddp"} if reshards is None else {(*_SECTION, "reshard_after_forward"): reshards}


def _shared(reading: Reading, settings: Mapping[Path, Any], note: str = "") -> Outcome:
    settings = {_STRATEGY: "fsdp2", **settings}
    shown = ", ".join(f"{'.'.join(map(str, path))}: {_yaml(value)}" for path, value in settings.items())
    return Outcome("honoured", f"{shown}{'; ' if note else ''}{note}", settings, note)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _strategy(reading: Reading) -> Outcome:
    value = reading.value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= len(_BY_NUMBER):
        value = _BY_NUMBER[value - 1]
    name = text(value).upper()
    if name not in _STRATEGIES:
        raise UnreadableError("it is no sharding strategy.", _advice(name, _STRATEGIES))
    return _shared(reading, _of_strategy(name), _HYBRID_NOTE if _HYBRID in name else "")


def _reshard(reading: Reading) -> Outcome:
    if isinstance(reading.value, str) and reading.value.upper() in _STRATEGIES:
        return _strategy(reading)
    return _shared(reading, {(*_SECTION, "reshard_after_forward"): flag(reading.value)})


def _offload(reading: Reading) -> Outcome:
    return _shared(reading, {(*_SECTION, "offload"): "cpu" if flag(reading.value) else "none"})


def _one_of(known: tuple[str, ...], why: str) -> Callable[[Reading], Outcome]:
    def read(reading: Reading) -> Outcome:
        name = text(reading.value).upper()
        if name not in known:
            raise UnreadableError("it is not one of FSDP's words.", _advice(name, known))
        return Outcome("automatic", why)

    return read


def _advice(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """`values.advice` over words in capitals."""
    return advice(name, [word.lower() for word in known if not word.startswith("_")])


def _flag(kind: str, why: str) -> Callable[[Reading], Outcome]:
    def read(reading: Reading) -> Outcome:
        flag(reading.value)
        return Outcome("automatic" if kind == "automatic" else "no effect", why)

    return read


def _any(kind: str, why: str) -> Callable[[Reading], Outcome]:
    return lambda reading: Outcome("automatic" if kind == "automatic" else "no effect", why)


_STREAMED = "each process reads the rows that it keeps"
_GONE = "torch's second version has no such setting"
_MEMBERS: dict[str, Callable[[Reading], Outcome]] = {
    "version": version,
    "activation_checkpointing": _flag("automatic", "the plan recomputes as far as memory demands"),
    "offload_params": _offload,
    "sync_module_states": _flag("automatic", _STREAMED),
    "cpu_ram_efficient_loading": _flag("automatic", _STREAMED),
    "cpu_offload_pin_memory": _flag("automatic", "what waits on the host is pinned"),
    "use_orig_params": _flag("no effect", _GONE),
    "state_dict_type": _one_of(_STATE_DICTS, "processes write checkpoints in parts, and any number reads them"),
    "final_state_dict_type": _one_of(_STATE_DICTS, "the tuned weights are one folder that Transformers or PEFT loads"),
    "auto_wrap_policy": _one_of(_POLICIES, "layers to share come from the model"),
    "transformer_layer_cls_to_wrap": _any("automatic", "layers to share come from the model"),
    "min_num_params": _any("automatic", "layers to share come from the model"),
    "reshard_after_forward": _reshard,
    "mixed_precision_policy": _any("no effect", "engine.precision and engine.fsdp2.param_dtype say it"),
    "limit_all_gathers": _flag("no effect", _GONE),
    "sharding_strategy": _strategy,
    "backward_prefetch": _any("automatic", "the next layer is gathered while one computes"),
    "forward_prefetch": _any("automatic", "the next layer is gathered while one computes"),
    "forward_prefetch_limit": _any("automatic", "the next layer is gathered while one computes"),
}
MEMBERS = tuple(_MEMBERS)
"""The members of `fsdp_config`, without FSDP 1's prefix."""
