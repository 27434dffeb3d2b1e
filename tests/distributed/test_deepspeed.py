"""DeepSpeed's stages take the same steps as one device, keep parts, and hand their state to any other strategy."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import jobs
import pytest
import sharding_jobs
import torch
import yaml
from transformers import LlamaConfig

from stoker.adapters.lora import Awaited
from stoker.compose import parallel
from stoker.config.deepspeed import OPTIMIZERS
from stoker.distributed.deepspeed import Zero, package, require_disk
from stoker.errors import PlanError
from stoker.models import native
from stoker.models.streamed import StreamedDecoder
from stoker.tasks.supervised import SupervisedTask

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; `make env` does it"
    ),
    pytest.mark.timeout(1800),
]

ALL = os.environ.get("STOKER_TEST_ALL") == "1"
OFFLOADED = "zero3-offload_optimizer+offload_param"
KINDS = ("zero1", "zero2", "zero3", OFFLOADED)
QUICK = (("zero2", "full"), ("zero3", "nf4"), ("zero2", "8-bit"))
POSSIBLE = [name for name, case in jobs.CASES.items() if case.optimizer in OPTIMIZERS]
ON_TWO = (
    *(("zero3", name) for name in POSSIBLE),
    *(("zero2", name) for name in ("full", "tied", "lora", "mixture", "gptj")),
    *(("zero1", name) for name in ("full", "dora")),
    ("zero2-offload_optimizer", "full"),
    (OFFLOADED, "int8"),
)
ON_FOUR = (
    *(("zero3", name) for name in POSSIBLE),
    *(("zero2", name) for name in ("full", "tied", "lora")),
    ("zero1", "mamba"),
    ("zero3-offload_optimizer", "opt"),
)
CASES = [(2, *pair) for pair in (ON_TWO if ALL else QUICK)] + [(4, *pair) for pair in (ON_FOUR if ALL else ())]
slow = pytest.mark.skipif(not ALL, reason="make test-distributed runs it")


def train_pairs(ranks, pairs):
    return {(kind, name): jobs.train(name, kind, ranks) for kind, name in pairs}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the first rank has of each case."""

    @cache
    def on(world_size):
        pairs = [pair for size, *pair in CASES if size == world_size]
        return jobs.on_ranks(world_size, tmp_path_factory.mktemp("ranks"), train_pairs, pairs)

    return on


@pytest.mark.parametrize(("world_size", "kind", "name"), CASES)
def test_losses_norms_and_weights_are_those_of_one_device(results, world_size, kind, name):
    expected, found, case = jobs.alone(name), results(world_size)[kind, name], jobs.CASES[name]
    # Blocks of averages in 8 bits are others here: they lie in flat parts.
    grain = 10 * case.grain if case.optimizer == "adamw_8bit" else case.grain
    assert found["losses"] == pytest.approx(expected["losses"], abs=grain)
    assert found["norms"] == pytest.approx(expected["norms"], rel=max(1e-4, 2 * grain))
    assert found["loss"] == pytest.approx(expected["loss"], abs=grain)
    for key, weight in found["state"].weights.items():
        torch.testing.assert_close(found["whole"][key], weight, rtol=0, atol=0)
    if case.optimizer == "adamw_8bit":
        averages = [value for key, value in found["state"].optimizer.items() if key.startswith("exp_avg")]
        assert {value.dtype for value in averages} == {torch.float32}
        return
    for key, weight in expected["state"].weights.items():
        torch.testing.assert_close(found["state"].weights[key], weight, atol=2e-4, rtol=1e-3)
    assert found["state"].optimizer.keys() == expected["state"].optimizer.keys()
    for key, value in expected["state"].optimizer.items():
        torch.testing.assert_close(found["state"].optimizer[key], value, atol=1e-5, rtol=1e-3)


def streamed(ranks, folder):
    """Trains adapters on bases that are read weight by weight into their parts; the losses by number format."""
    found = {}
    for kind in sharding_jobs.KINDS:
        loaded = StreamedDecoder(
            folder,
            sharding_jobs.SPEC,
            quantization=kind,
            rank=ranks.rank,
            world_size=ranks.world_size,
            gather=ranks.gather,
        )
        model = sharding_jobs.lora(loaded.decoder, Awaited("cpu", loaded.weight_of))
        settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        strategy = Zero(ranks, "cpu", settings=settings, model=model, layers=list(model.blocks), fill=loaded.fill)
        found[kind] = jobs.train("lora", "zero3", model=model, strategy=strategy, steps=sharding_jobs.STEPS)["losses"]
    shared, whole = strategy.shared_state(), strategy.state()
    written = ranks.gather({**shared.weights, **shared.optimizer})
    return found, written, {**whole.weights, **whole.optimizer}


def test_a_base_streamed_into_parts_trains_as_one_that_one_device_reads(tmp_path):
    sharding_jobs.save(tmp_path / "model")
    found, written, whole = jobs.on_ranks(2, tmp_path, streamed, tmp_path / "model")
    for name, tensor in whole.items():
        writers = [tensors[name] for tensors in written if name in tensors]
        assert len(writers) == (2 if name.startswith("step:") else 1)  # each has the count of steps
        assert torch.equal(writers[0], tensor), name
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in written]
    assert max(sizes) < 1.1 * min(sizes)
    for kind, losses in found.items():
        model = sharding_jobs.lora(native.load(tmp_path / "model", sharding_jobs.SPEC, quantization=kind))
        alone = jobs.train("lora", "single", model=model, steps=sharding_jobs.STEPS)["losses"]
        assert losses == pytest.approx(alone, abs=5e-6), kind


def go_on(ranks, states):
    """The second half of a run after each of `states`, by the name of its case, under each kind."""
    return {
        (kind, key): jobs.train(key[-1], kind, ranks, start=10, steps=10, state=state)["losses"]
        for kind in KINDS
        for key, state in states.items()
    }


def both_halves(ranks, names, states):
    """What `go_on` gives, and the states after the first half under each kind."""
    halves = {(kind, name): jobs.train(name, kind, ranks, steps=10)["state"] for kind in KINDS for name in names}
    return go_on(ranks, states), halves


@slow
def test_a_state_goes_on_under_another_strategy_and_on_another_number_of_ranks(tmp_path):
    names = ("full", "nf4", "8-bit")
    alone = {("single", name): jobs.alone(name, 10)["state"] for name in names}
    found, states = jobs.on_ranks(2, tmp_path, both_halves, names, alone)
    # On three ranks parts end within rows, and the last ones are padded.
    on_three = (("zero2", "full"), ("zero3", "nf4"), ("zero2", "8-bit"))
    found |= jobs.on_ranks(3, tmp_path, go_on, {key: states[key] for key in on_three})
    for (kind, name), state in states.items():
        onwards = jobs.train(name, "single", start=10, steps=10, state=state)
        found["single", (kind, name)] = onwards["losses"]
    assert len(found) == 12 + 12 + 12
    for (_, (_, name)), losses in found.items():
        grain = 0.02 if name == "8-bit" else 1e-5
        assert losses == pytest.approx(jobs.alone(name)["losses"][10:], abs=grain)


@slow
def test_ranks_write_checkpoints_together_that_any_strategy_goes_on_from(tmp_path):
    names, grain = ("full", "8-bit"), {"full": 2e-5, "8-bit": 0.02}
    steps = sharding_jobs.STEPS
    places = (("zero2", 2), ("single", 1), ("zero3", 2), ("fsdp2", 2))
    for number, (kind, count) in enumerate(places):
        found = sharding_jobs.all_of(None, kind, names, tmp_path) if count == 1 else None
        found = found or jobs.on_ranks(count, tmp_path, sharding_jobs.all_of, kind, names, tmp_path)
        for name, (losses, _, files) in found.items():
            expected = jobs.alone(name, len(places) * steps)["losses"][number * steps :][:steps]
            assert losses == pytest.approx(expected, abs=grain[name]), (kind, name)
            assert (f"optimizer-{count:05}-of-{count:05}.safetensors" in files) or count == 1, files


def odd_steps(ranks, kind):
    """Elements that this rank keeps of all, then a step whose gradient is not a number and one that is."""
    case = jobs.CASES["nf4"]
    model = jobs.build(case)
    strategy = jobs.make_strategy(kind, ranks, model)
    strategy.prepare(SupervisedTask(model), jobs.adamw)
    batch = next(iter(jobs.loader(case, strategy).step(0)))
    kept = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    gathered = sum(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.ds_numel for parameter in model.parameters())
    before = strategy.state().weights
    strategy.forward_backward(batch, divisor=math.nan, is_last=True)
    bad = strategy.step(1e-2, max_gradient_norm=1.0)
    between = strategy.state().weights
    strategy.forward_backward(batch, divisor=1.0, is_last=True)
    good = strategy.step(1e-2, max_gradient_norm=1.0)
    after = strategy.state().weights
    return kept, gathered, whole, bad, good, [before, between, after]


@slow
def test_ranks_keep_parts_and_a_step_that_is_no_number_is_left_out(tmp_path):
    kept, gathered, whole, bad, good, (before, between, after) = jobs.on_ranks(2, tmp_path, odd_steps, "zero3")
    assert whole / 2 <= kept <= whole / 2 * 1.02
    assert gathered == 0
    assert bad.skipped
    assert not math.isfinite(bad.gradient_norm)
    assert not good.skipped
    assert all(torch.equal(before[name], between[name]) for name in before)
    assert not all(torch.equal(between[name], after[name]) for name in before)


def in_bf16(ranks, kind, names):
    return {name: jobs.train(name, kind, ranks, precision="bf16")["losses"] for name in names}


@slow
def test_products_in_bf16_are_those_of_one_device(tmp_path):
    found = jobs.on_ranks(2, tmp_path, in_bf16, "zero3", ["full", "nf4"])
    for name, losses in found.items():
        assert losses == pytest.approx(jobs.train(name, "single", precision="bf16")["losses"], abs=5e-3)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"):
        parallel.require_deepspeed()


def test_a_disk_that_cannot_be_read_or_written_is_named(tmp_path):
    def having(is_there):
        return SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={"async_io": is_there}))

    def on(device, path):
        return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": device, "nvme_path": str(path)}}}

    with pytest.raises(PlanError, match=r"async_io.*apt install libaio-dev"):
        require_disk(having(False), on("nvme", tmp_path))
    with pytest.raises(PlanError, match="nowhere is no folder that can be written to"):
        require_disk(having(True), on("nvme", tmp_path / "nowhere"))
    require_disk(having(True), on("nvme", tmp_path))
    require_disk(having(False), on("cpu", tmp_path / "nowhere"))


JSON = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.fixture
def stoker(tmp_path):
    """Writes a run of full fine-tuning and returns what trains it with options."""
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n} plus one?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "zero3.json").write_text(json.dumps(JSON))
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "data": {"train": [{"path": "train.jsonl"}], "sequence_length": 64, "packing": False, "cache_folder": "cache"},
        "train": {"steps": 8, "batch_size": 4, "learning_rate": 0.001},
        "engine": {"device": "cpu", "num_threads": 1, "micro_batch_size": 1},
        "output": {"folder": "run", "save_every_steps": 4, "trackers": [], "questions": ["What is 1 plus one?"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    def train(*options, code=0, **environment):
        command = [sys.executable, "-m", "stoker.cli.main", "train", "run.yaml", *map(str, options)]
        kept = {"capture_output": True, "text": True, "env": os.environ | environment}
        done = subprocess.run(command, cwd=tmp_path, timeout=600, check=False, **kept)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return train


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


NVME = ("--set", "engine.strategy=deepspeed", "--set", "engine.deepspeed.stage=3", "--set")
NVME += ("engine.deepspeed.offload_optimizer=nvme", "--set", "engine.deepspeed.nvme_path=disk")


@slow
def test_without_libaio_a_run_with_nvme_is_refused_before_its_data_is_prepared(stoker, tmp_path):
    (tmp_path / "disk").mkdir()
    # No compiler: the program that asks for libaio's functions is not made.
    output = stoker("--gpus", 2, *NVME, code=2, CC="/bin/false", CXX="/bin/false")
    assert output.count("error:") == 1
    assert "async_io, which cannot be compiled here" in " ".join(output.split())
    assert "apt install libaio-dev" in " ".join(output.split())
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


# DeepSpeed leaves parts of less than a MiB in memory.
WIDE = jobs.Case(LlamaConfig(**jobs.SIZES | {"hidden_size": 512}, **jobs.ATTENTION))


def on_disk(ranks, folder):
    """Trains with the optimiser's state, and with weights too, on a disk; each with the bytes that lie there then."""
    found = {}
    for parts in (("offload_optimizer",), ("offload_optimizer", "offload_param")):
        place = folder / "+".join(parts)
        model = jobs.build(WIDE)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        zero |= {part: {"device": "nvme", "nvme_path": str(place)} for part in parts}
        settings = {"zero_optimization": zero}
        strategy = Zero(ranks, "cpu", settings=settings, model=model, layers=list(model.blocks))
        result = jobs.train("full", "zero3", model=model, strategy=strategy, steps=4)
        ranks.sum([0.0])
        found[parts] = result, sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return found


@slow
def test_states_that_wait_on_nvme_give_the_losses_of_one_device(tmp_path):
    package("cpu", None)
    if not importlib.import_module("deepspeed").ops.__compatible_ops__["async_io"]:
        pytest.skip("libaio's headers are not installed, without which DeepSpeed reads no NVMe")
    expected = jobs.train("full", "single", model=jobs.build(WIDE), steps=4)
    for parts in ("offload_optimizer", "offload_optimizer+offload_param"):
        (tmp_path / parts).mkdir()
    count = sum(parameter.numel() for parameter in jobs.build(WIDE).parameters())
    for result, num_bytes in jobs.on_ranks(2, tmp_path, on_disk, tmp_path).values():
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-6)
        assert result["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        for kind in ("weights", "optimizer"):
            kept = getattr(result["state"], kind)
            for key, value in getattr(expected["state"], kind).items():
                torch.testing.assert_close(kept[key], value, atol=2e-4, rtol=1e-3)
        assert num_bytes >= 12 * count  # of both ranks: weights and two averages


@slow
def test_a_run_from_a_yaml_ends_as_on_one_device_and_goes_on_under_another_strategy(stoker, tmp_path):
    stoker("--set", "output.folder=alone")
    zero = ("--set", "engine.strategy=deepspeed", "--set", "engine.deepspeed.config=zero3.json")
    output = stoker("--gpus", 2, *zero)
    assert "ZeRO-3" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=2e-5)
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == sorted(
        path.name for path in (tmp_path / "alone" / "model").iterdir()
    )
    stoker(
        "--gpus",
        2,
        *zero,
        "--set",
        "output.folder=half",
        "--set",
        "train.steps=4",
        "--set",
        "train.schedule.kind=constant",
    )
    stoker("--resume", "--set", "output.folder=half", "--set", "train.schedule.kind=constant")
    stoker("--set", "output.folder=whole", "--set", "train.schedule.kind=constant")
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)
