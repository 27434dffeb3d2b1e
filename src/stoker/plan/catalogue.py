"""Devices by name: what `gpus.toml` holds, and what users add in a file of the same form."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from stoker.errors import ConfigError
from stoker.plan.hardware import Device, DeviceKind
from stoker.plan.memory import GIB

GB = 10**9
DTYPES = ("fp32", "tf32", "fp16", "bf16", "fp8")
BASES = ("datasheet", "whitepaper", "derived", "arithmetic", "yours")
PRICE_CLASSES = ("on demand", "serverless", "spot", "yours")
# What the driver and its page tables keep of a GPU's memory: an H200 of 141 GB, 131.3 GiB by its data sheet, has more
# (139.8, in `usable_gib`); on cards of 16 to 80 GiB 1 to 2% are missing. A rule of thumb.
_USABLE = 0.985
_TRITON_CAPABILITY = (7, 0)
_NUMBERS = ("memory_gib", "memory_gb", "usable_gib", "bandwidth", "host_link", "nvlink", "network", "price")
_TEXTS = ("name", "vendor", "capability", "source", "basis", "price_class", "price_date", "price_source")
_KINDS: Mapping[str, DeviceKind] = {"cpu": "cpu", "apple": "mps"}  # all others answer to CUDA's calls
# Between nodes of devices for which nothing is said: 25 Gbit/s, what ordinary rented machines have. A rule of thumb.
_NETWORK = 3.125


@dataclass(frozen=True)
class Price:
    """USD an hour for one device, from where and when; `kind`: "on demand", "serverless" (with the host), "spot"."""

    usd_per_hour: float
    kind: str
    date: str
    source: str


@dataclass(frozen=True)
class CatalogueDevice:
    """A device as its maker describes it. Rates in FLOP/s, dense, by dtype; bandwidth and links in bytes a second.

    `host_link`: to the host's memory, one direction; `device_link`: to its peers, both directions (0: none but the
    host's); `network`: into a node of such devices, by all its adapters together. `basis`: how the figures of `source`
    came about (see `gpus.toml`).
    """

    key: str
    name: str
    vendor: str
    memory_bytes: int
    bandwidth: float
    rates: Mapping[str, float]
    compute_capability: tuple[int, int] | None
    host_link: float
    device_link: float
    source: str
    basis: str
    price: Price | None
    network: float = _NETWORK * 1e9

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16."""
        return "bf16" in self.rates

    @property
    def fp8(self) -> bool:
        """Whether it has matrix products in fp8."""
        return "fp8" in self.rates

    def device(self) -> Device:
        """Returns it as the plan sees a machine's device: all of its memory free, Triton installed."""
        capability = self.compute_capability
        compiles = self.vendor not in _KINDS and (capability is None or capability >= _TRITON_CAPABILITY)
        return Device(
            _KINDS.get(self.vendor, "cuda"),
            self.name,
            self.memory_bytes,
            bf16=self.bf16,
            compute_capability=capability,
            triton=compiles,
        )


@cache
def shipped() -> Mapping[str, CatalogueDevice]:
    """Returns the devices of `gpus.toml` by their short names."""
    return _devices(_tables(), "gpus.toml")


def with_file(path: Path) -> Mapping[str, CatalogueDevice]:
    """Returns the catalogue with a file's devices added; one of a known name changes only what the file says of it.

    Raises:
        ConfigError: the file cannot be read, or a device in it lacks a figure or has one that makes no sense.
    """
    try:
        added = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "Name a TOML file of devices; names of known ones go to --gpu."
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    for key, facts in added.items():
        if not isinstance(facts, dict):
            raise ConfigError(f"{path}: {key} is no table.", fix=f"Write [{key}] and its figures below it.")
    return with_devices(added, str(path))


def with_devices(
    added: Mapping[str, Mapping[str, Any]], where: str, known: Mapping[str, CatalogueDevice] | None = None
) -> Mapping[str, CatalogueDevice]:
    """Returns the catalogue (`known`, the shipped one unless given) with devices added, as `with_file` reads them.

    What a device does not say is as under its own name, or under that of its `like`, among the shipped ones. Raises
    ConfigError as `with_file` does.
    """
    tables = _tables()
    merged: dict[str, Any] = {}
    for key, facts in added.items():
        own = {"basis": "yours", "source": where} | ({"price_class": "yours"} if "price" in facts else {})
        dated = {"price_date": "today", "price_source": where} if "price" in facts else {}
        like = facts.get("like", key)
        if "like" in facts and like not in tables:
            close = difflib.get_close_matches(str(like), tables, 1, 0.5)
            near = f"Did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{where}: [{key}]: like = {like!r} is no device.", fix=f"{near}{', '.join(tables)}.")
        before = dict(tables.get(like, {}))
        if {"memory_gib", "memory_gb"} & facts.keys():  # its own memory, not the other's under another unit
            for name in ("memory_gib", "memory_gb", "usable_gib"):
                before.pop(name, None)
        if like != key and "name" not in facts:
            before["name"] = key
        merged[key] = before | own | dated | {name: value for name, value in facts.items() if name != "like"}
    return dict(known or shipped()) | _devices(merged, where)


@cache
def _tables() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("stoker.plan").joinpath("gpus.toml").read_text(encoding="utf-8"))


def find(names: Sequence[str], catalogue: Mapping[str, CatalogueDevice]) -> list[CatalogueDevice]:
    """Returns the devices of these names; "a100-80", "A100 80" and "RTX 4090" or "4090" are understood.

    Raises:
        ConfigError: there is no device of a name; the message has the nearest.
    """
    return [_find(name, catalogue) for name in names]


def by_name(name: str, catalogue: Mapping[str, CatalogueDevice]) -> CatalogueDevice | None:
    """Returns the device that PyTorch calls `name` ("NVIDIA H100 80GB HBM3"), or None.

    The longest short name wins whose words are all in it, and a size only where it is the card's.
    """
    words = _words(name)
    fits = [one for one in catalogue.values() if _words(one.key.replace("rtx", "rtx ")) <= words | {"sxm"}]
    return max(fits, key=lambda one: len(one.key), default=None)


def _find(name: str, catalogue: Mapping[str, CatalogueDevice]) -> CatalogueDevice:
    plain = _plain(name)
    for key, one in catalogue.items():
        if plain in (_plain(key), _plain(key).removeprefix("rtx"), _plain(one.name)):
            return one
    close = difflib.get_close_matches(plain, [_plain(key) for key in catalogue], 3, 0.6)
    near = sorted((key for key in catalogue if _plain(key) in close), key=lambda key: close.index(_plain(key)))
    fix = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"there is no device {name!r} in the catalogue.", fix=f"{fix}Known: {', '.join(catalogue)}; --gpus adds yours."
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _words(name: str) -> set[str]:
    spaced = "".join(letter if letter.isalnum() else " " for letter in name.lower())
    words = spaced.replace("80gb", "80").replace("40gb", "40").replace("32gb", "32").split()
    return {part for word in words for part in (word, word.removesuffix("gb"))}


def _devices(tables: Mapping[str, Any], where: str) -> dict[str, CatalogueDevice]:
    return {key: _device(key, facts, f"{where}: [{key}]") for key, facts in tables.items()}


def _device(key: str, facts: Mapping[str, Any], where: str) -> CatalogueDevice:
    _check(facts, where)
    size = facts["memory_gib"] * GIB if "memory_gib" in facts else facts["memory_gb"] * GB
    vendor = facts.get("vendor", "nvidia")
    usable = 1.0 if vendor == "cpu" else _USABLE
    memory = facts["usable_gib"] * GIB if "usable_gib" in facts else usable * size
    major, _, minor = str(facts.get("capability", "")).partition(".")
    price = None
    if "price" in facts:
        price = Price(facts["price"], facts["price_class"], facts["price_date"], facts["price_source"])
    return CatalogueDevice(
        key=key,
        name=facts.get("name", key),
        vendor=vendor,
        memory_bytes=int(memory),
        bandwidth=facts["bandwidth"] * 1e9,
        rates={dtype: rate * 1e12 for dtype, rate in facts["rates"].items()},
        compute_capability=(int(major), int(minor)) if major else None,
        host_link=facts.get("host_link", 0) * 1e9,
        device_link=facts.get("nvlink", 0) * 1e9,
        source=facts["source"],
        basis=facts["basis"],
        price=price,
        network=facts.get("network", _NETWORK) * 1e9,
    )


def _check(facts: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a table that lacks a figure, or has one that is none."""
    missing = [name for name in ("bandwidth", "rates", "source", "basis") if name not in facts]
    if "memory_gib" not in facts and "memory_gb" not in facts:
        missing.append("memory_gib")
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.", fix="gpus.toml in the package shows the form.")
    allowed = [*_NUMBERS, *_TEXTS, "rates"]
    unknown = [name for name in facts if name not in allowed]
    if unknown:
        close = difflib.get_close_matches(unknown[0], allowed, 1, 0.6)
        near = f"Did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"{where} has unknown keys: {', '.join(sorted(unknown))}.", fix=f"{near}{', '.join(allowed)}."
        )
    rates = facts["rates"]
    if not isinstance(rates, dict) or not rates.keys() <= set(DTYPES) or "fp32" not in rates:
        raise ConfigError(f"{where}: rates is a table of TFLOP/s by {', '.join(DTYPES)}, fp32 among them.")
    numbers = {name: facts[name] for name in _NUMBERS if name in facts} | {f"rates.{k}": v for k, v in rates.items()}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{where}: {name} = {value!r} is not a number above zero.")


def facts(one: CatalogueDevice) -> dict[str, Any]:
    """Returns a device as JSON values."""
    values = {field.name: getattr(one, field.name) for field in fields(one)}
    price = values.pop("price")
    values["rates"] = dict(one.rates)
    values["price"] = None if price is None else {field.name: getattr(price, field.name) for field in fields(price)}
    return values
