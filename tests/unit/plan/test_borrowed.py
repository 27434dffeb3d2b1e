"""The plan of a model that runs through Transformers' class: op by op, coarsely counted, said so."""

from dataclasses import replace

import pytest

from stoker.arch.borrowed import BorrowedMixer, BorrowedSpec
from stoker.arch.spec import LayerSpec, NormSpec
from stoker.errors import PlanError
from stoker.plan import limits
from stoker.plan.adapter import adapter_parameters, targets_problem
from stoker.plan.choose import choose
from stoker.plan.hardware import Device, Hardware

GIB = 2**30
LINEARS = (
    ("self_attn.q_proj", 2048, 2048),
    ("self_attn.out_proj", 2048, 2048),
    ("fc1", 2048, 8192),
    ("fc2", 8192, 2048),
)


@pytest.fixture
def spec():
    """A model of 24 layers of OPT 1.3B's width."""
    layer = LayerSpec(BorrowedMixer(LINEARS, attention_width=2048), None, NormSpec())
    return BorrowedSpec(
        model_type="opt",
        class_name="OPTForCausalLM",
        vocab_size=50272,
        hidden_size=2048,
        max_positions=1024,
        layers=(layer,) * 24,
        layers_name="model.decoder.layers",
        num_parameters=1_000_000_000,
        packs=True,
        is_remote=False,
        why='model_type "opt" is not native to Stoker yet.',
    )


@pytest.fixture
def gpu():
    def make(gib):
        cpu = Device("cpu", "CPU", 64 * GIB)
        device = Device("cuda", "GPU", gib * GIB, bf16=True, compute_capability=(9, 0), triton=True)
        return Hardware((device, cpu), num_threads=8)

    return make


def test_layers_run_through_the_class_and_the_plan_says_why(run, spec, gpu):
    plan = choose(limits.fitted(run("data.sequence_length=1024"), spec), spec, gpu(80))
    assert plan.layers == "op by op"
    assert 'through Transformers\' OPTForCausalLM: model_type "opt" is not native' in plan.reasons["layers"]
    assert "coarser estimate" in plan.reasons["layers"]
    assert (plan.num_parameters, plan.kernels) == (1_000_000_000 + plan.num_trained_parameters, "triton")


def test_less_memory_makes_layers_run_again(run, spec, gpu):
    config = run("data.sequence_length=1024", "engine.micro_batch_size=8")
    assert set(choose(config, spec, gpu(80)).keep) == {"all"}
    assert "input" in choose(config, spec, gpu(10)).keep


def test_a_rung_of_the_layer_kernel_is_refused(run, spec, gpu):
    with pytest.raises(PlanError, match="they are Transformers' OPTForCausalLM"):
        choose(run("data.sequence_length=1024", "engine.recompute=mixer"), spec, gpu(80))


def test_adapters_are_counted_and_their_targets_checked(run, spec):
    adapter = run("adapter.targets=[q_proj]").adapter
    assert adapter_parameters(spec, adapter) == 24 * 16 * (2048 + 2048)
    assert targets_problem(spec, ["fc1", "self_attn.out_proj"]) is None
    assert "no layer called o_proj" in targets_problem(spec, ["o_proj"]).what


def test_what_keeps_scores_needs_more(run, spec, gpu):
    config = run("data.sequence_length=1024", "engine.micro_batch_size=1")
    mixer = replace(spec.layers[0].mixer, score_values=2 * 32 * 1024)
    scores = replace(spec, layers=(replace(spec.layers[0], mixer=mixer),) * 24)
    fused, own = (choose(config, one, gpu(80)).memory.activations for one in (spec, scores))
    assert own > 2 * fused


def test_rows_are_not_packed_for_a_class_that_keeps_no_documents_apart(run, spec, gpu):
    apart = replace(spec, packs=False)
    config = limits.fitted(run("data.sequence_length=1024"), apart)
    assert config.data.packing is False
    assert "rows are not packed" in choose(config, apart, gpu(80)).reasons["layers"]
    assert limits.fitted(run("data.packing=true"), apart).data.packing is True
    assert limits.fitted(run(), spec).data.packing is True
