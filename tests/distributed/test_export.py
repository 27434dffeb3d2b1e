"""A checkpoint that several ranks wrote is a model for Transformers, read on one CPU a tensor at a time."""

import importlib.util
import os
from contextlib import ExitStack

import jobs
import pytest
import torch
from export_jobs import train_and_save
from safetensors.torch import load_file

from stoker.arch import families
from stoker.checkpoint.read import load_latest
from stoker.export.streamed import written
from stoker.export.trained_tensors import TrainedTensors
from stoker.models import native

ALL = os.environ.get("STOKER_TEST_ALL") == "1"


@pytest.mark.parametrize("kinds", [("ddp", "fsdp2"), pytest.param(("zero2", "zero3"), id="deepspeed")])
def test_a_model_in_parts_of_two_ranks_is_written_as_the_whole_one(kinds, tmp_path):
    if kinds[0].startswith("zero"):
        if not ALL:
            pytest.skip("make test-distributed runs it")
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed; `make env` does it")
    (tmp_path / "ranks").mkdir()
    whole = jobs.on_ranks(2, tmp_path / "ranks", train_and_save, kinds, tmp_path)
    for (kind, name), gathered in whole.items():
        loaded = load_latest(tmp_path / kind / name)
        num_files = len(list(loaded.path.glob("weights-*-of-00002.safetensors")))
        assert num_files == 2
        values = {**jobs.CASES[name].config.to_dict(), "architectures": None}
        spec = families.read(values, "config.json")
        model = native.build(spec)
        model.load_state_dict({key.removeprefix("model."): one for key, one in gathered.items()})
        expected = dict(native.hf_tensors(model, spec))
        out = tmp_path / "out" / kind / name
        with ExitStack() as stack:
            base = {"base": tmp_path / "none", "base_spec": spec, "stack": stack}
            tensors = TrainedTensors(loaded.tensors["weights"], spec, dtype=torch.bfloat16, **base)
            with written(tensors, out, config=values):
                pass
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], one.bfloat16()) for key, one in expected.items())
        assert (native.load(out, spec)(torch.arange(8)[None]) != 0).any()
