"""How layers run and what they keep, where the layer kernel cannot run all of them."""

from dataclasses import replace

import pytest

from stoker.arch import families
from stoker.errors import PlanError
from stoker.plan.choose import choose

ASKED = ("data.sequence_length=4096", "engine.micro_batch_size=2")


@pytest.fixture
def gemma2_9b():
    shape = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
    return families.read({"model_type": "gemma2", "num_key_value_heads": 8, **shape}, "config.json")


def with_soft_caps(spec, every):
    """The model with soft-capped scores in every so-many-th layer."""
    layers = [
        replace(layer, mixer=replace(layer.mixer, softcap=50.0)) if index % every == 0 else layer
        for index, layer in enumerate(spec.layers)
    ]
    return replace(spec, layers=tuple(layers))


@pytest.mark.parametrize(("gib", "rungs"), [(140, {"all"}), (36, {"all", "input"})])
def test_a_model_that_the_layer_kernel_cannot_run_keeps_all_of_a_layer_or_its_input(
    run, gemma2_9b, machine, gib, rungs
):
    plan = choose(run(*ASKED), gemma2_9b, machine(gib))
    assert plan.layers == "op by op"
    assert "cannot run these layers: this model has norms or parts placed otherwise" in plan.reasons["layers"]
    assert set(plan.keep) == rungs
    assert plan.memory.total <= plan.available_bytes


@pytest.mark.parametrize("setting", ["engine.recompute=mixer", "engine.offload_activations=true"])
def test_what_only_the_layer_kernel_has_is_refused_for_such_a_model(run, gemma2_9b, machine, setting):
    with pytest.raises(PlanError, match="cannot run here: this model has norms or parts placed otherwise") as error:
        choose(run(*ASKED, setting), gemma2_9b, machine(80))
    assert "adapter.dropout" not in str(error.value)


def test_layers_of_both_kinds_keep_what_each_can(run, llama_8b, machine):
    spec = with_soft_caps(llama_8b, 4)
    plan = choose(run(*ASKED), spec, machine(28))
    assert plan.layers == "fused"
    assert "8 of 32 layers run op by op: they have soft-capped scores" in plan.reasons["layers"]
    assert set(plan.keep[::4]) <= {"all", "input"}
    assert "mixer" in plan.keep
    assert plan.memory.total <= plan.available_bytes
    asked = choose(run(*ASKED, "engine.recompute=attention"), spec, machine(80))
    assert asked.keep == ("input", "attention", "attention", "attention") * 8


def test_memory_of_a_model_counts_what_its_layers_have_besides_linear_ones(run, machine):
    gpt2 = families.read({"model_type": "gpt2"}, "config.json")
    plan = choose(run("adapter=null", "data.sequence_length=1024"), gpt2, machine(24))
    assert plan.num_parameters == plan.num_trained_parameters == 124_439_808  # as published, a tied head counted once
