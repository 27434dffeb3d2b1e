"""`stoker plan`: what a run takes on which hardware, in time and money, before anything is paid for."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile
from stoker.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from stoker.arch.borrowed import AnySpec
    from stoker.config.load import Loaded
    from stoker.config.schema import RunConfig
    from stoker.plan.advice import Case
    from stoker.plan.catalogue import CatalogueDevice
    from stoker.plan.hardware import Hardware
    from stoker.plan.rates import Rates
    from stoker.plan.survey import Offer, Request
    from stoker.plan.verdict import Verdict

_AMOUNT = re.compile(r"\$?([0-9]*\.?[0-9]+)\s*(usd|\$)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)\s*(m|min|h|d)", re.IGNORECASE)
_HOURS = {"m": 1 / 60, "min": 1 / 60, "h": 1.0, "d": 24.0}
_SHOWN = 14


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
    gpu: Annotated[
        str | None, typer.Option(help="Devices by name: t4,4090,a100-80,h100; all, or those with a price unless set.")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="This machine.")] = False,
    gpus: Annotated[
        Path | None, typer.Option(metavar="FILE.TOML", help="Your own devices and prices, in gpus.toml's form.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="full,lora,nf4,int8,fp8; what the YAML leaves open unless set.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Plan for a known model's sizes, such as llama-3.1-70b.")] = None,
    budget: Annotated[str | None, typer.Option(help="The fastest for at most so much: 20usd.")] = None,
    deadline: Annotated[str | None, typer.Option(help="The cheapest that is done by then: 90m, 6h, 2d.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows of the data, if it is not at hand.")] = None,
    tokens_per_row: Annotated[float | None, typer.Option(min=1.0, help="Tokens of a row on average.")] = None,
    trained_share: Annotated[float | None, typer.Option(help="Share of the tokens that are learned.")] = None,
    host_memory: Annotated[float, typer.Option(min=1.0, help="GiB of host memory beside each device.")] = 64.0,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of so many devices at most.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Devices in a node at most: 1 unless set, with --here this machine's.")
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(min=0.1, help="Gbit/s into a node, all adapters together; gpus.toml's unless set."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="CATEGORY", help="A figure's formula with its numbers.")
    ] = None,
    advice: Annotated[
        bool, typer.Option("--advice", help="What others measured of methods, ranks, rates and epochs for such data.")
    ] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Look at every strategy and show every candidate.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="PLAN.HTML", help="Write the charts to this page.")] = None,
) -> None:
    """Show what fits, how long it takes and what it costs, on any hardware; loads nothing, asks no network.

    Example: stoker plan run.yaml --gpu t4,4090,h100 --deadline 6h
    """
    from stoker.cli.read import read
    from stoker.plan import explain as explain_text
    from stoker.plan import limits, survey, survey_text, verdict
    from stoker.plan.efficiencies import MEASURED
    from stoker.plan.memory import GIB
    from stoker.plan.workload import given

    if here and gpu is not None:
        raise ConfigError("--here plans for this machine, --gpu for others.", fix="Give one of them.")
    if explain is not None and explain not in explain_text.CATEGORIES:
        raise ConfigError(f"--explain {explain!r} is no category.", fix=f"Use {', '.join(explain_text.CATEGORIES)}.")
    budget_usd, deadline_hours = _amount(budget), _hours(deadline)
    loaded = read(run_file, overrides, allow_unknown=allow_unknown, to_stderr=json_output)
    spec, model_note = _architecture(loaded, shape)
    config = limits.fitted(loaded.config, spec)
    if shape is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"base": f"shape:{shape}"})})
    known = _known(gpus, config, run_file)
    host_bytes, efficiencies, num_threads = int(host_memory * GIB), MEASURED, None
    if here:
        hardware, figures = _this_machine(known)
        devices, efficiencies, num_threads = [figures.device], figures.efficiencies, hardware.num_threads
        host = hardware.first("cpu")
        host_bytes = host.memory_bytes if host is not None else 0
        gpus_per_node = gpus_per_node or _gpus_here()
    else:
        devices = _chosen(gpu, known)

    if network is not None:
        devices = [replace(one, network=network / 8 * 1e9) for one in devices]

    from stoker.compose.sample import known_documents

    documents = given(
        rows=rows, tokens_per_row=tokens_per_row, trained_share=trained_share, known=known_documents(config)
    )
    request = survey.Request(
        config,
        spec,
        documents,
        survey.methods_of(methods) if methods is not None else survey.allowed_methods(config),
        host_bytes=host_bytes,
        budget_usd=budget_usd,
        deadline_hours=deadline_hours,
        efficiencies=efficiencies,
        nodes=nodes,
        per_node=gpus_per_node or 1,
        num_threads=num_threads,
    )
    offers = survey.survey(request, devices, every_strategy=show_all)
    found = verdict.verdict(request, offers)
    if html is not None:
        _write_page(html, survey_text.to_dict(request, offers, found))
    if json_output:
        facts = survey_text.to_dict(request, offers, found)
        facts |= {"advice": _advice_as_json(request, devices)} if advice else {}
        typer.echo(json.dumps(facts, indent=1, default=str))
    elif explain is not None:
        typer.echo(_explained(request, offers, found, explain))
    else:
        told = ["", *_advice(request, devices)] if advice else []
        only = devices[0].name if here else None
        _print(request, offers, found, model_note, show_all=show_all, only=only, advice=told)
        if html is not None:
            typer.echo(f"Charts: {html}")
    if found.best is None:  # nothing fits, or nothing keeps to the deadline or the budget
        raise typer.Exit(1)


def _amount(text: str | None) -> float | None:
    if text is None:
        return None
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--budget {text!r} is no amount.", fix="Write 20usd, $20 or 20; prices are in US dollars.")
    return float(match[1])


def _hours(text: str | None) -> float | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--deadline {text!r} is no duration.", fix="Write 90m, 6h or 2d.")
    return float(match[1]) * _HOURS[match[2].lower()]


def _architecture(loaded: "Loaded", shape: str | None) -> "tuple[AnySpec, str]":
    """Returns the model's architecture and, where its own config.json is not at hand, what stands in for it.

    Raises:
        ModelError: nothing is known of the model; the message says how to tell.
    """
    from stoker.arch import shapes
    from stoker.cli import preflight

    chosen = loaded.config.model
    if shape is not None:
        return shapes.spec(shape), f"the shape {shape} in place of {chosen.base}"
    if chosen.base.startswith("shape:"):
        return shapes.spec(chosen.base.removeprefix("shape:")), ""
    if chosen.base.startswith(preflight.BUILTIN):
        from stoker import builtin

        builtin.resolve_model(chosen.base)
    folder = str(_cached(chosen.base) or chosen.base)
    spec = preflight.local_spec(folder, trust_remote_code=chosen.trust_remote_code, overrides=chosen.overrides)
    if spec is not None:
        return spec, ""
    name = shapes.of_model(chosen.base)
    if name is not None:
        return shapes.spec(name), f"{chosen.base} is not on this disk; sizes of the shape {name}, which its name has"
    raise ModelError(
        f"the config.json of {chosen.base} is not on this disk, and nothing is downloaded to plan.",
        where=loaded.origins.get(("model", "base")),
        fix=f"Use --shape with the nearest of {', '.join(shapes.names())}; or put config.json alone into a folder and "
        "add --set model.base=FOLDER.",
    )


def _cached(base: str) -> Path | None:
    """Returns the folder of a Hub model in Hugging Face's cache, if its config.json lies there."""
    from stoker.cli import places

    if places.exists(base) or not places.may_be_model_id(base) or "/" not in base:
        return None
    from huggingface_hub import constants  # alone: its functions take a fifth of the time that a plan has

    # The cache's layout is documented: models--OWNER--NAME/refs/main holds the name of a folder in snapshots.
    folder = Path(constants.HF_HUB_CACHE) / f"models--{base.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return snapshot if (snapshot / "config.json").is_file() else None


def _known(gpus: Path | None, config: "RunConfig", run_file: Path) -> "Mapping[str, CatalogueDevice]":
    """Returns the catalogue with the devices of a file and of the YAML."""
    from stoker.plan import catalogue

    known = catalogue.with_file(gpus) if gpus is not None else catalogue.shipped()
    own = {key: one.model_dump(exclude_none=True) for key, one in config.plan.devices.items()}
    return catalogue.with_devices(own, f"{run_file}: plan.devices", known) if own else known


def _chosen(names: str | None, known: "Mapping[str, CatalogueDevice]") -> "list[CatalogueDevice]":
    from stoker.plan import catalogue

    if names is None:
        return [one for one in known.values() if one.price is not None]
    if names == "all":
        return list(known.values())
    asked = [name for name in names.split(",") if name.strip()]
    if not asked:
        raise ConfigError(f"--gpu {names!r} names no device.", fix="Write t4,4090,h100; or all.")
    return catalogue.find(asked, known)


def _this_machine(known: "Mapping[str, CatalogueDevice]") -> "tuple[Hardware, Rates]":
    """Returns this machine, and the figures of the device that a run here would use.

    They are those that `stoker doctor --calibrate` measured; or else the catalogue's, yours first; or else what the
    device reports of itself.
    """
    from stoker.compose.hardware import look
    from stoker.plan import calibration, catalogue, rates

    hardware = look()
    host = hardware.first("cpu")
    device = hardware.first("cuda") or hardware.first("mps") or host
    assert device is not None
    found = catalogue.by_name(device.name, known) if device.kind == "cuda" else None
    figures = rates.of_catalogue(device, num_threads=hardware.num_threads)
    if found is not None:
        figures = rates.Rates(found)
    own = replace(figures.device, name=device.name, memory_bytes=device.memory_bytes, price=None)
    figures = calibration.measured_here(device.name, replace(figures, device=own))
    return hardware, figures


def _gpus_here() -> int:
    """Returns how many GPUs this machine shows, at least 1."""
    from stoker.compose.hardware import gpus_here

    return max(1, len(gpus_here()))


def _explained(request: "Request", offers: "Sequence[Offer]", found: "Verdict", category: str) -> str:
    from stoker.plan import explain, survey_text

    one = found.best or next((one for one in offers if one.fits), None)
    if one is None:
        return "\n".join(survey_text.misfits(offers))
    return explain.explain(request, one, category)


def _print(
    request: "Request",
    offers: "Sequence[Offer]",
    found: "Verdict",
    note: str,
    *,
    show_all: bool,
    only: str | None,
    advice: "Sequence[str]",
) -> None:
    from stoker.arch import arithmetic
    from stoker.plan import scaling, survey_text, track_record

    count = arithmetic.num_parameters(request.spec) / 1e9
    typer.echo(f"{request.config.model.base}: {request.spec.family}, {count:,.2f} billion parameters")
    # What ran here says nothing of the devices that --gpu names.
    quoted = [sentence] if only is not None and (sentence := track_record.quote(only)) else []
    for sentence in [*([f"Model: {note}."] if note else []), *survey_text.notes(request, offers), *quoted]:
        typer.echo(sentence)
    typer.echo("")
    if any(one.fits for one in offers):
        typer.echo(survey_text.table(offers, at_most=None if show_all else _SHOWN))
    missing = survey_text.misfits(offers)
    for sentence in missing:
        typer.echo(f"does not fit  {sentence}")
    typer.echo("")
    more = [] if found.best is None else scaling.lines(found.best, offers)
    for sentence in [*more, *([""] if more else []), *survey_text.summary(request, found), *advice]:
        typer.echo(sentence)


def _advice(request: "Request", devices: "Sequence[CatalogueDevice]") -> list[str]:
    from stoker.plan import advice

    return advice.lines(_case(request, devices))


def _advice_as_json(request: "Request", devices: "Sequence[CatalogueDevice]") -> "list[Mapping[str, object]]":
    from dataclasses import asdict

    from stoker.plan import advice

    return [asdict(one) for one in advice.advise(_case(request, devices))]


def _case(request: "Request", devices: "Sequence[CatalogueDevice]") -> "Case":
    from stoker.plan import advice

    largest = max((one.memory_bytes for one in devices if one.vendor != "cpu"), default=0)
    rows = None if request.documents is None else request.documents.count
    together = largest * request.nodes * request.per_node
    return advice.case_of(request.config, request.spec, request.work(1), rows=rows, device_bytes=together)


def _write_page(path: Path, survey: "Mapping[str, object]") -> None:
    from stoker.errors import OutputError
    from stoker.observe import plan_page

    try:
        path.write_text(plan_page.render(survey), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--html {path} cannot be written: {error.strerror}.", fix="Name another file.") from None
