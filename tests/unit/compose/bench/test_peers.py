"""The peer's process is given the job that we had: the same rows, weights and losses."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch

from stoker.compose.bench import peer, peers, shapes
from stoker.compose.bench.measure import measure
from stoker.compose.bench.result import Measured
from stoker.compose.bench.rows import random_data
from stoker.compose.hardware import probe
from stoker.compose.model import open_base
from stoker.errors import ConfigError
from stoker.plan.choose import choose


@pytest.fixture
def job(config, base, tmp_path):
    """Measures a run of ours and writes its job; returns both."""

    def make(*overrides):
        chosen = config(*overrides)
        plan = choose(chosen, base.spec, probe())
        data = random_data(chosen, base.spec.vocab_size, steps=4)
        ours, steps = measure(chosen, plan, base, data, steps=1)
        return ours, json.loads(peers.write_job(chosen, plan, base, steps, tmp_path).read_text())

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.packing=true", "data.sequence_length=96"),
        ("engine.recompute=input",),
        ("model.quantization=nf4", "engine.recompute=attention"),
    ],
)
def test_transformers_and_peft_have_our_losses_on_the_same_job(job, overrides):
    ours, written = job(*overrides)
    model, packages = peer.load("hf", written)
    result = peer.train("hf", model, written)
    assert packages[:2] == ("transformers", "peft")
    # Before the first step both are the base; later steps start from other random adapters, whose updates are small.
    assert result["losses"][0] == pytest.approx(ours.losses[0], rel=1e-5)
    assert result["losses"][-1] == pytest.approx(ours.losses[-1], rel=1e-2)
    assert result["gradient_norm"] > 0
    assert result["tokens_per_second"] > 0
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 4 * 2 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mamba"])
def test_mixtures_and_state_spaces_are_the_same_job_too(model_type, config, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "model_type": model_type}
    if model_type == "mamba":
        sizes |= {"intermediate_size": 32, "time_step_rank": 2, "tie_word_embeddings": True}
    else:
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 32}
        sizes |= {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    shapes.write(sizes, tmp_path, device="cpu")
    chosen, base = config(), open_base(str(tmp_path))
    plan = choose(chosen, base.spec, probe())
    ours, steps = measure(chosen, plan, base, random_data(chosen, 64, steps=4), steps=1)
    written = json.loads(peers.write_job(chosen, plan, base, steps, tmp_path).read_text())
    assert written["has_attention"] == written["checkpointing"] == (model_type == "qwen3_moe")
    adapter = {key: written["adapter"][key] for key in ("targets", "target_parameters")}
    if model_type == "mamba":
        assert adapter == {"targets": ["in_proj", "x_proj"], "target_parameters": []}
    else:
        assert adapter["targets"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert adapter["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model, _ = peer.load("hf", written)
    result = peer.train("hf", model, written)
    assert result["losses"][0] == pytest.approx(ours.losses[0], rel=1e-4)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == plan.num_trained_parameters


def test_every_weight_is_trained_without_an_adapter(job):
    ours, written = job("adapter=null")
    model, _ = peer.load("hf", written)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert peer.train("hf", model, written)["losses"] == pytest.approx(ours.losses, rel=1e-4)


def test_unsloth_is_given_one_row_and_where_its_documents_end(job):
    _, written = job("data.packing=true", "data.sequence_length=96")
    batch, share = peer.inputs("unsloth", written, torch.device("cpu"))[0][0]
    lengths = batch["packed_seq_lengths"].tolist()
    assert batch["input_ids"].shape == (1, 192)
    assert sum(lengths) == 192
    starts = np.cumsum([0, *lengths[:-1]])
    assert (batch["position_ids"][0, starts] == 0).all()
    assert (batch["labels"][0, starts] == -100).all()
    assert 0 < share < 1


def test_labels_shift_back_to_the_targets():
    targets = np.array([[5, 6, -100, 8, -100]])
    assert peer.labels_of(targets).tolist() == [[-100, 5, 6, -100, 8]]


@pytest.mark.slow
def test_a_peer_that_fails_is_a_result_with_its_last_words(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    failed = peers.run("hf", tmp_path / "job.json", timeout_seconds=60)
    assert "KeyError" in failed.error
    assert math.isnan(failed.tokens_per_second)


def test_a_peer_that_takes_too_long_is_stopped(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    assert "did not end within" in peers.run("hf", tmp_path / "job.json", timeout_seconds=0.01).error


def test_numbers_of_another_job_are_not_kept():
    ours = Measured("stoker", losses=(6.2, 6.1))
    same, other = (Measured("hf", tokens_per_second=1.0, losses=(loss, 6.0)) for loss in (6.21, 6.4))
    assert peers.checked(same, ours) is same
    assert "not the same job" in peers.checked(other, ours).error


def test_unknown_and_missing_peers_are_named():
    assert peers.parse("hf, liger") == ["hf", "liger"]
    with pytest.raises(ConfigError, match="--peers trl: there is no such peer"):
        peers.parse("hf,trl")
    assert peers.names_without(["hf"], device="cpu") == {}
    if importlib.util.find_spec("liger_kernel") is None:
        assert peers.why_not("liger", device="cuda") == "not installed: liger_kernel"
