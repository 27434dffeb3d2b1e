"""Axolotl's settings for many GPUs, normalised: FSDP 1 and 2, prefixed names or not, DeepSpeed by path or inline.

DeepSpeed's settings become ours. Of the others the report only says what they mean on one device; what is read here is
what a strategy over many devices will take.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stoker.config.axolotl import optimizer, sharding
from stoker.config.axolotl.outcome import Outcome, Reading, UnreadableError
from stoker.config.axolotl.values import is_off, whole
from stoker.config.deepspeed import OPTIMIZERS
from stoker.config.document import Path

Whole = Mapping[str, Any]
_SECTION = ("engine", "deepspeed")

_PREFIX = "fsdp_"
_RENAMED = {"version": "fsdp_version", "fsdp_version": "fsdp_version", "sharding_strategy": "reshard_after_forward"}
# What FSDP 1 calls a sharding strategy is in FSDP 2 whether a layer's weights are let go after its forward.
_RESHARDS = {"FULL_SHARD": True, "HYBRID_SHARD": True, "SHARD_GRAD_OP": False, "HYBRID_SHARD_ZERO2": False}
_GONE_IN_FSDP2 = ("limit_all_gathers", "sync_module_states", "use_orig_params", "backward_prefetch", "forward_prefetch")


@dataclass(frozen=True)
class Parallel:
    """What the file asks of many GPUs. `strategy` None: nothing; sizes are 1 unless the file names them.

    `offload_parameters`: weights wait in host memory. `reshard_after_forward`: a layer's weights are let go between its
    forward and its backward (ZeRO-3's behaviour). `zero_stage`: of DeepSpeed. `options`: the rest, by FSDP 2's names.
    """

    strategy: Literal["fsdp2", "deepspeed"] | None = None
    offload_parameters: bool = False
    reshard_after_forward: bool = True
    zero_stage: int | None = None
    data_shards: int = 1
    data_replicas: int = 1
    tensor_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def read(keys: Whole) -> Parallel:
    """Returns the settings in the keys of a file's top level."""
    sizes = {
        "data_shards": _size(keys, "dp_shard_size"),
        "data_replicas": _size(keys, "dp_replicate_size"),
        "tensor_parallel": _size(keys, "tensor_parallel_size"),
        "context_parallel": _size(keys, "context_parallel_size", "sequence_parallel_degree"),
        "expert_parallel": _size(keys, "expert_parallel_size"),
    }
    if keys.get("deepspeed") and not is_off(keys["deepspeed"]):
        stage, offload = zero(keys["deepspeed"])
        return Parallel("deepspeed", offload, stage == 3, stage, **sizes)
    options = fsdp_options(keys)
    if not options and sizes["data_shards"] == sizes["data_replicas"] == 1 and not keys.get("fsdp"):
        return Parallel(**sizes)
    words = " ".join(map(str, keys.get("fsdp") or ())) if isinstance(keys.get("fsdp"), list) else str(keys.get("fsdp"))
    offload = bool(options.pop("offload_params", False)) or "offload" in words
    reshard = bool(options.pop("reshard_after_forward", "shard_grad_op" not in words))
    return Parallel("fsdp2", offload, reshard, options=options, **sizes)


def fsdp_options(keys: Whole) -> dict[str, Any]:
    """Returns `fsdp_config` by FSDP 2's names: the prefix gone, FSDP 1's strategy as reshard_after_forward.

    `fsdp_version` and `fsdp_final_state_dict_type` of the top level are in it too; what FSDP 2 has no use for is not.
    """
    given = keys.get("fsdp_config")
    options: dict[str, Any] = {}
    for name, value in (given if isinstance(given, Mapping) else {}).items():
        if value is not None and plain(name) not in _GONE_IN_FSDP2:
            _put(options, plain(name), value)
    if keys.get("fsdp_final_state_dict_type"):
        options.setdefault("final_state_dict_type", keys["fsdp_final_state_dict_type"])
    options.pop("fsdp_version", None)
    return options


def _put(options: dict[str, Any], name: str, value: Any) -> None:
    if name == "sharding_strategy":
        options.setdefault("reshard_after_forward", _RESHARDS.get(str(value).upper(), True))
    else:
        options[_RENAMED.get(name, name)] = value


def plain(name: str) -> str:
    """Returns an option's name without FSDP 1's prefix: `fsdp_offload_params` is `offload_params`."""
    return name if name == "fsdp_version" else name.removeprefix(_PREFIX)


def zero(value: Any) -> tuple[int, bool]:
    """Returns the ZeRO stage and whether it offloads weights, of a DeepSpeed file's path or its content.

    A path that does not lead anywhere from here, as `deepspeed_configs/zero3_bf16_cpuoffload_all.json` from Axolotl's
    own repository, says it by its name.
    """
    if isinstance(value, str):
        path = pathlib.Path(value).expanduser()
        if not path.is_file():
            stage = re.search(r"zero[_-]?([0-3])", path.name)
            return (int(stage.group(1)) if stage else 0), "offload" in path.name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnreadableError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, Mapping):
        raise UnreadableError("it must be a path or a mapping.")
    zero_part = value.get("zero_optimization") or {}
    if not isinstance(zero_part, Mapping):
        raise UnreadableError("zero_optimization must be a mapping.")
    return int(zero_part.get("stage", 0)), bool(zero_part.get("offload_param"))


def data_ranks(keys: Whole) -> int:
    """Returns how many devices hold different rows, as far as the file says: they multiply the batch."""
    return _size(keys, "dp_shard_size") * _size(keys, "dp_replicate_size")


def _size(keys: Whole, *names: str) -> int:
    found = next((keys[name] for name in names if keys.get(name) is not None), None)
    return max(1, whole(found)) if found is not None else 1


ONE_DEVICE = "several GPUs: not in this version; on one GPU it runs as single, with the same result"


def setting(reading: Reading) -> Outcome:
    """Any key about how work is spread over GPUs."""
    return Outcome("no effect", ONE_DEVICE)


def deepspeed(reading: Reading) -> Outcome:
    """`deepspeed`: a path or the content itself, which goes on as it is.

    A path that leads nowhere from here, as those to Axolotl's own files do, is read by its name. With an optimiser that
    does not go with DeepSpeed here, another strategy gives the same losses.
    """
    value, note = reading.value, ""
    if is_off(value):
        return Outcome("no effect", "off, as it is here")
    stage, _ = zero(value)
    kind = optimizer.kind(reading.whole)
    if kind not in OPTIMIZERS:
        why = f"DeepSpeed steps flat parts of many weights, which {kind} cannot; engine.strategy stays auto"
        return Outcome("no effect", f"{why}, which is ddp or fsdp2 on several GPUs")
    if _size(reading.whole, "context_parallel_size", "sequence_parallel_degree") > 1:
        why = "rows are shared under ddp and fsdp2; engine.strategy stays auto"
        return Outcome("no effect", why)
    settings: dict[Path, Any] = {("engine", "strategy"): "deepspeed"}
    what = "engine.strategy: deepspeed"
    if isinstance(value, Mapping) or pathlib.Path(str(value)).expanduser().is_file():
        settings[(*_SECTION, "config")] = value
        what = f"{what} with engine.deepspeed.config"
    elif stage:
        settings[(*_SECTION, "stage")] = stage
        name = pathlib.Path(value).name
        if "offload" in name:
            settings[(*_SECTION, "offload_parameters")] = "cpu"
            if "params" not in name:
                settings[(*_SECTION, "offload_optimizer")] = "cpu"
        note = f"{value} is not here; this is what a file of that name holds in Axolotl's repository"
    else:
        raise UnreadableError("there is no such file.", "Name one that is here, or write its content in its place.")
    return Outcome("honoured", f"{what}, ZeRO-{stage}{'; ' if note else ''}{note}", settings, note)


def data_size(reading: Reading) -> Outcome:
    """`dp_shard_size` and `dp_replicate_size`: devices with different rows, whose number multiplies the batch."""
    size = whole(reading.value)
    if size < 1:
        raise UnreadableError("it must be at least 1.")
    if size == 1:
        return Outcome("no effect", "1, as it is here")
    settings = sharding.replicas(reading)
    note = f"train.batch_size is that of all {data_ranks(reading.whole)} devices together, on however many it runs"
    shown = "".join(f", {'.'.join(map(str, path))}: {value}" for path, value in settings.items())
    return Outcome("honoured", f"train.batch_size x {size}{shown}; {note}", settings, note)


def split_size(reading: Reading) -> Outcome:
    """Sizes of groups that share the same rows: the result does not depend on them."""
    size = whole(reading.value)
    return Outcome("no effect", "1, as it is here" if size <= 1 else ONE_DEVICE)
