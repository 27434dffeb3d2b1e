"""Job files are run and read as their launchers do: the script beside a Slurm of paper, the manifest by its fields."""

import os
import subprocess

import pytest
import yaml

from stoker.compose.job_files import Job, kubernetes, name_of, slurm, torchrun_line
from stoker.distributed.ranks import find_place

JOB = Job(
    "runs/my run.yaml", "my-run", 2, 8, "/data/my-run", "/data/cache", overrides=("train.seed=7",), max_restarts=2
)


@pytest.mark.parametrize(
    ("text", "name"),
    [("quickstart", "quickstart"), ("My_Run.v2", "my-run-v2"), ("8B-lora", "run-8b-lora"), ("--", "run"), ("é", "run")],
)
def test_names_are_what_dns_allows(text, name):
    assert name_of(text) == name
    assert len(name_of("x" * 90)) <= 50


def test_the_line_of_torchrun_names_its_parts_and_quotes_paths():
    line = torchrun_line(JOB, "gpu01")
    assert line.startswith(
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 2 "
    )
    assert "--rdzv-backend c10d --rdzv-endpoint gpu01:29500 --rdzv-id my-run" in line
    assert line.endswith("-m stoker.cli.main train 'runs/my run.yaml' --set train.seed=7 --set output.resume=true")


def test_one_machine_needs_no_torchrun():
    line = torchrun_line(Job("run.yaml", "run", 1, 4, "out", "cache"))
    assert line == "stoker train run.yaml --set output.resume=true --gpus 4 --max-restarts 3"


def test_torchrun_takes_every_option_of_the_line():
    """Parsed by the torchrun that is installed here."""
    import shlex

    from torch.distributed.run import get_args_parser

    command = shlex.split(torchrun_line(JOB, "gpu01").replace("\\\n", ""))
    found = get_args_parser().parse_args(command[2:])
    assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("2", "8", 2)
    assert (found.rdzv_backend, found.rdzv_endpoint, found.rdzv_id) == ("c10d", "gpu01:29500", "my-run")
    assert found.module
    assert found.training_script == "stoker.cli.main"


# Slurm


class Slurm:
    """`srun`, `scancel` and `scontrol` that note what they were told; srun ends with the next of `codes`."""

    def __init__(self, folder, script):
        self.folder = folder
        (folder / "job.sbatch").write_text(script)
        (folder / "bin").mkdir()
        (folder / "log").write_text("")
        self._program("scontrol", "exit 0")
        # What scancel signals are the processes of the step, here one that ends with the code of a saved interrupt.
        self._program("scancel", "kill -TERM $(cat step)")

    def _program(self, name, body):
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> log\n{body}\n')
        path.chmod(0o755)

    def run(self, *codes, readable=0, interrupt=False):
        """Runs the script; returns its exit code and what was told to Slurm, line by line."""
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        wait = (
            "trap 'exit 143' TERM\necho $$ > step\nkill -TERM $PPID\nwhile :; do sleep 0.01; done" if interrupt else ""
        )
        take = 'code=$(head -n 1 codes); sed -i 1d codes; exit "$code"'
        self._program("srun", f'case "$*" in *" test "*) exit {readable};; esac\n{wait}\n{take}')
        environment = os.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
        done = subprocess.run(
            ["bash", "job.sbatch"], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, (self.folder / "log").read_text().splitlines(), done.stderr


@pytest.fixture
def cluster(tmp_path):
    return Slurm(tmp_path, slurm(JOB, "my-run.sbatch"))


STEP = "srun --kill-on-bad-exit=1 stoker train runs/my run.yaml --set train.seed=7 --set output.resume=true"


def test_the_script_is_one_that_bash_reads(tmp_path):
    (tmp_path / "job.sbatch").write_text(slurm(JOB, "my-run.sbatch"))
    done = subprocess.run(["bash", "-n", tmp_path / "job.sbatch"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_that_ends_well_is_started_once(cluster):
    assert cluster.run(0) == (0, ["srun --ntasks-per-node=1 test -r runs/my run.yaml", STEP], "")


def test_a_process_that_dies_is_followed_by_a_restart_up_to_the_limit(cluster):
    code, log, told = cluster.run(137, 1, 139)
    assert code == 139
    assert log.count(STEP) == 3
    assert "ended with exit code 137: going on from the last checkpoint (1 of 2)" in told


def test_a_mistake_in_the_configuration_is_not_tried_again(cluster):
    code, log, _ = cluster.run(2)
    assert code == 2
    assert log.count(STEP) == 1


def test_the_signal_before_the_end_reaches_the_processes_and_the_job_is_queued_again(cluster):
    code, log, _ = cluster.run(interrupt=True)
    assert code == 0
    assert log[-2:] == ["scancel --signal=TERM 42", "scontrol requeue 42"]


def test_a_machine_that_does_not_see_the_run_ends_the_job_before_it_begins(cluster):
    code, log, told = cluster.run(readable=1)
    assert code == 2
    assert STEP not in log
    assert "runs/my run.yaml cannot be read on every machine" in told


def test_what_slurm_is_asked_for_stands_before_the_first_command():
    lines = slurm(JOB, "my-run.sbatch").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert all(number < first for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "8", "8")
    # What such a step gives its processes is what the engine looks for.
    assert find_place({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}).rank == 9


# Kubernetes: the fields of the API's objects, as its reference has them (v1.31), as far as they are used here.

FIELDS = {
    "Service": {"apiVersion": str, "kind": str, "metadata": "ObjectMeta", "spec": "ServiceSpec"},
    "ServiceSpec": {"clusterIP": str, "selector": dict, "publishNotReadyAddresses": bool, "ports": ["ServicePort"]},
    "ServicePort": {"name": str, "port": int},
    "Job": {"apiVersion": str, "kind": str, "metadata": "ObjectMeta", "spec": "JobSpec"},
    "ObjectMeta": {"name": str, "labels": dict},
    "JobSpec": {
        "completions": int,
        "parallelism": int,
        "completionMode": str,
        "backoffLimit": int,
        "podFailurePolicy": "PodFailurePolicy",
        "template": "PodTemplateSpec",
    },
    "PodFailurePolicy": {"rules": ["PodFailurePolicyRule"]},
    "PodFailurePolicyRule": {"action": str, "onPodConditions": ["PodFailurePolicyOnPodConditionsPattern"]},
    "PodFailurePolicyOnPodConditionsPattern": {"type": str, "status": str},
    "PodTemplateSpec": {"metadata": "ObjectMeta", "spec": "PodSpec"},
    "PodSpec": {
        "subdomain": str,
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
        "containers": ["Container"],
        "volumes": ["Volume"],
    },
    "Container": {
        "name": str,
        "image": str,
        "workingDir": str,
        "command": [str],
        "env": ["EnvVar"],
        "resources": "ResourceRequirements",
        "volumeMounts": ["VolumeMount"],
    },
    "EnvVar": {"name": str, "value": str},
    "ResourceRequirements": {"limits": dict, "requests": dict},
    "VolumeMount": {"name": str, "mountPath": str},
    "Volume": {"name": str, "persistentVolumeClaim": "PersistentVolumeClaimVolumeSource", "emptyDir": "EmptyDir"},
    "PersistentVolumeClaimVolumeSource": {"claimName": str},
    "EmptyDir": {"medium": str},
}


def check(value, kind, path):
    if isinstance(kind, list):
        assert isinstance(value, list), path
        for number, one in enumerate(value):
            check(one, kind[0], f"{path}[{number}]")
    elif isinstance(kind, str):
        assert set(value) <= set(FIELDS[kind]), f"{path}: {set(value) - set(FIELDS[kind])}"
        for name, one in value.items():
            check(one, FIELDS[kind][name], f"{path}.{name}")
    else:
        assert type(value) is kind, f"{path}: {value!r}"


@pytest.fixture(scope="module")
def manifest():
    text = kubernetes(JOB, "my-run.kubernetes.yaml", image="registry/stoker:1", claim="disk")
    return list(yaml.safe_load_all(text))


def test_the_manifest_has_the_fields_of_the_api_and_no_others(manifest):
    service, job = manifest
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    for one in manifest:
        check(one, one["kind"], one["kind"])


def test_pods_find_the_first_one_by_the_service_and_have_the_shared_volume(manifest):
    service, job = manifest
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["completionMode"]) == (2, 2, "Indexed")
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(("index", "is_host"), [("0", "true"), ("1", "false")])
def test_the_pods_command_starts_torchrun_with_the_first_as_its_host(manifest, tmp_path, index, is_host):
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    command = manifest[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": index}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = done.stdout.splitlines()
    assert f"is_host={is_host},join_timeout=1800,read_timeout=1800" in found
    assert found[found.index("--rdzv-endpoint") + 1] == "my-run-0.my-run:29500"
    assert found[found.index("train") + 1] == "runs/my run.yaml"
