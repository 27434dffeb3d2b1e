"""How several machines start one run: torchrun's line, a batch script for Slurm, a Job for Kubernetes."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

PORT = 29500
_SHARED = "/workspace"
_JOIN_SECONDS = 1800
_SHUTDOWN_SECONDS = 300
# The first process hosts a store for each round. That of the agents is told to those alone who came to the first: one
# that comes later, for a machine that was lost, would wait for it in vain (torch 2.13).
_OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_LONGEST_NAME = 50  # of 63 that a host's name may have, of which "-12.<name>" takes some


@dataclass(frozen=True)
class Job:
    """A run over `nodes` machines with `gpus_per_node` each. `run_file` as the machines find it; `overrides`: --set's.

    `output` and `cache` are the run's folder and that of prepared data, in a file system that all machines see.
    """

    run_file: str
    name: str
    nodes: int
    gpus_per_node: int
    output: str
    cache: str
    overrides: Sequence[str] = ()
    max_restarts: int = 3

    @property
    def train(self) -> list[str]:
        """The arguments of `stoker`: a run that is there already is gone on with, which a restart needs."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        return ["train", self.run_file, *sets, "--set", "output.resume=true"]


def name_of(text: str) -> str:
    """Returns `text` as a name that Slurm, Kubernetes and DNS accept: small letters, digits, hyphens."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return found if found[:1].isalpha() else f"run-{found}".strip("-")


def torchrun_line(job: Job, host: str = "HOST") -> str:
    """Returns the command that each machine runs; `host` is the first one."""
    if job.nodes == 1:
        count = ["--gpus", str(job.gpus_per_node), "--max-restarts", str(job.max_restarts)]
        return shlex.join(["stoker", *job.train, *count])
    own_store = " ".join(f"{name}={value}" for name, value in _OWN_STORE.items())
    return f"{own_store} {_torchrun(job, host)} \\\n    {shlex.join(['-m', 'stoker.cli.main', *job.train])}"


def _torchrun(job: Job, host: str, extra: str = "") -> str:
    return (
        f"torchrun --nnodes {job.nodes} --nproc-per-node {job.gpus_per_node} --max-restarts {job.max_restarts} \\\n"
        f"    --rdzv-backend c10d --rdzv-endpoint {host}:{PORT} --rdzv-id {job.name}{extra}"
    )


_SLURM = """\
#!/bin/bash
# {title} on {nodes} machines with {gpus} GPUs each. Start it with: sbatch {file}
# Slurm starts one process for each GPU; they find each other by the names that it gives them.
#
# All machines must see in one file system:
{shared}
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@600
##SBATCH --partition=...
##SBATCH --account=...

# Ten minutes before the time is up, and when the job is preempted, every process finishes its step and saves; the job
# then goes back into the queue and goes on from there.

# The environment that has Stoker in it:
# source .venv/bin/activate

# NCCL. Which interface and adapters to use, where it does not find the fast ones by itself:
export NCCL_DEBUG=WARN
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-8}}"
export SRUN_CPUS_PER_TASK="$OMP_NUM_THREADS" # srun does not take it from the lines above

run_file={run_file}
max_restarts={max_restarts}

if ! srun --ntasks-per-node=1 test -r "$run_file"; then
    echo "$run_file cannot be read on every machine. All must share the file system that holds it." >&2
    exit 2
fi

ending=
trap 'ending=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

restarts=0
while :; do
    srun --kill-on-bad-exit=1 {command} &
    processes=$!
    wait "$processes"
    code=$?
    if [ -n "$ending" ]; then # the signal ended the first wait
        wait "$processes"
        code=$?
    fi
    if [ "$code" -eq 0 ]; then
        exit 0
    elif [ -n "$ending" ]; then
        exec scontrol requeue "$SLURM_JOB_ID"
    elif [ "$code" -eq 2 ] || [ "$restarts" -ge "$max_restarts" ]; then # 2: a mistake in the configuration
        exit "$code"
    fi
    restarts=$((restarts + 1))
    echo "a process ended with exit code $code: going on from the last checkpoint ($restarts of $max_restarts)" >&2
done
"""


def slurm(job: Job, file: str) -> str:
    """Returns the batch script, to be called `file`."""
    return _SLURM.format(
        title=job.name,
        file=file,
        name=job.name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        shared="\n".join(f"#   {line}" for line in _shared(job)),
        run_file=shlex.quote(job.run_file),
        max_restarts=job.max_restarts,
        command=shlex.join(["stoker", *job.train]),
    )


_KUBERNETES = """\
# {title} on {nodes} pods with {gpus} GPUs each. Start it with: kubectl apply -f {file}
#
# Plain Kubernetes from 1.31 on; no operator. Put in: the image, with Stoker in it, and the claim of a volume that all
# pods may write (ReadWriteMany). It is mounted at {place}, which relative paths are below. It must hold
{shared}
#
# A pod that dies comes back under its name, the others meet it again, and all go on from the last checkpoint.
# NCCL's settings go into `env`; an adapter for RDMA is asked for in `resources` by the name that its plugin gives it.
"""


def kubernetes(job: Job, file: str, *, image: str, claim: str) -> str:
    """Returns an Indexed Job and the headless Service through which its pods find the first one, as YAML."""
    head = _KUBERNETES.format(
        title=job.name,
        nodes=job.nodes,
        gpus=job.gpus_per_node,
        file=file,
        place=_SHARED,
        shared="\n".join(f"#   {line}" for line in _shared(job)),
    )
    documents = [_service(job), _kubernetes_job(job, image=image, claim=claim)]
    return head + yaml.safe_dump_all(documents, sort_keys=False, width=1000)


def _service(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",
            "selector": {"batch.kubernetes.io/job-name": job.name},
            "publishNotReadyAddresses": True,
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _kubernetes_job(job: Job, *, image: str, claim: str) -> dict[str, Any]:
    gpus = {"nvidia.com/gpu": job.gpus_per_node}
    container = {
        "name": "stoker",
        "image": image,
        "workingDir": _SHARED,
        "command": ["/bin/sh", "-c", _pod_command(job)],
        "env": [{"name": name, "value": value} for name, value in _ENVIRONMENT.items()],
        "resources": {"limits": gpus, "requests": dict(gpus)},
        "volumeMounts": [{"name": "shared", "mountPath": _SHARED}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completions": job.nodes,
            "parallelism": job.nodes,
            "completionMode": "Indexed",
            # One process's death may end every pod: torchrun's own restarts come first.
            "backoffLimit": max(1, job.max_restarts) * job.nodes,
            "podFailurePolicy": {
                # A pod that was moved away is no failure of the run's.
                "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
            },
            "template": {
                "metadata": {"labels": {"app": job.name}},
                "spec": {
                    "subdomain": job.name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": _SHUTDOWN_SECONDS,
                    "containers": [container],
                    "volumes": [
                        {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}},
                    ],
                },
            },
        },
    }


_ENVIRONMENT = {
    "NCCL_DEBUG": "WARN",
    **_OWN_STORE,
    # How long torchrun lets processes finish their step and save once the pod is told to go.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS - 60),
}


def _pod_command(job: Job) -> str:
    """The shell's command of each pod: the first one, whose name is known before, holds the rendezvous."""
    first = f"{job.name}-0.{job.name}"
    settings = f" \\\n    --rdzv-conf is_host=$first,join_timeout={_JOIN_SECONDS},read_timeout={_JOIN_SECONDS}"
    return (
        'first=$([ "$JOB_COMPLETION_INDEX" = 0 ] && echo true || echo false)\n'
        f"exec {_torchrun(job, first, settings)} \\\n    {shlex.join(['-m', 'stoker.cli.main', *job.train])}\n"
    )


def _shared(job: Job) -> list[str]:
    return [
        f"{job.run_file} (the run)",
        f"{job.output} (output.folder)",
        f"{job.cache} (data.cache_folder, or each prepares the rows by itself)",
    ]
