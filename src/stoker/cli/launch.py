"""`stoker launch`: how several machines start a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stoker.cli.options import AllowUnknown, Overrides, RunFile

if TYPE_CHECKING:
    from stoker.compose.job_files import Job

_KINDS = ("torchrun", "slurm", "kubernetes")


def command(
    run_file: RunFile,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    allow_unknown: AllowUnknown = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each: one process for each.")] = 8,
    kind: Annotated[
        str | None, typer.Option(help="torchrun, slurm or kubernetes; all of them with -o unless set.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Write the files there; printed unless set.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Times to go on from the last checkpoint after a process died.")
    ] = 3,
    host: Annotated[str, typer.Option(help="torchrun: the first machine, by the name that the others reach.")] = "HOST",
    image: Annotated[str, typer.Option(help="kubernetes: the image with Stoker in it.")] = "registry/stoker:latest",
    claim: Annotated[str, typer.Option(help="kubernetes: the claim of a volume that all pods may write.")] = "stoker",
) -> None:
    """Print how several machines start the run: torchrun's line, a Slurm script, a Kubernetes Job. Starts nothing.

    Example: stoker launch run.yaml --nodes 2 --gpus-per-node 8 --kind slurm -o jobs
    """
    from stoker.cli.read import read
    from stoker.compose.job_files import Job, kubernetes, name_of, slurm
    from stoker.compose.parallel import share_of_one
    from stoker.errors import ConfigError

    if kind is not None and kind not in _KINDS:
        raise ConfigError(f"--kind {kind!r} is no launcher.", fix=f"Use {', '.join(_KINDS)}.")
    config = read(run_file, overrides, allow_unknown=allow_unknown, to_stderr=True).config
    if config.engine.strategy == "single" and nodes * gpus_per_node > 1:
        raise ConfigError(
            f"engine.strategy = single, but these are {nodes * gpus_per_node} processes.", fix="Use auto, ddp or fsdp2."
        )
    share_of_one(config, nodes * gpus_per_node)  # a batch that cannot be dealt out is told here, not in the queue
    job = Job(
        str(run_file),
        name=name_of(Path(config.output.folder).name),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        output=config.output.folder,
        cache=config.data.cache_folder,
        overrides=tuple(overrides),
        max_restarts=max_restarts,
    )
    names = {"slurm": f"{job.name}.sbatch", "kubernetes": f"{job.name}.kubernetes.yaml"}
    made = {
        "slurm": lambda: slurm(job, names["slurm"]),
        "kubernetes": lambda: kubernetes(job, names["kubernetes"], image=image, claim=claim),
    }
    if kind in (None, "torchrun"):
        _print_torchrun(job, host)
    if output is None:
        if kind in made:
            typer.echo(made[kind](), nl=False)
        return
    for one in made if kind is None else [kind] if kind in made else []:
        _write(output / names[one], made[one]())


def _print_torchrun(job: "Job", host: str) -> None:
    """Prints the line, on stdout, and what else there is to know, on stderr."""
    from stoker.compose.job_files import torchrun_line

    typer.echo(torchrun_line(job, host))
    if job.nodes == 1:
        return
    where = "HOST is the first machine's name. " if host == "HOST" else ""
    typer.echo(
        f"Run it on every machine, as the same user with the same environment. {where}All must see {job.run_file} and "
        f"{job.output} in one file system; {job.cache} is better shared too, or each prepares the rows by itself. "
        "NCCL_SOCKET_IFNAME and NCCL_IB_HCA go into each machine's environment, where NCCL does not find its fast "
        "network.",
        err=True,
    )


def _write(path: Path, text: str) -> None:
    from stoker.errors import OutputError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.", fix="Name another folder with -o.") from None
    typer.echo(f"Wrote {path}.", err=True)
