import pytest

from stoker.config.schema import Adapter
from stoker.plan.adapter import adapter_parameters, targeted, targets_problem


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 7 * 32),
        (["q_proj", "v_proj"], 2 * 32),
        (["layers.0.self_attn.q_proj"], 1),
        (r"model\.layers\.[01]\..*_proj", 2 * 7),
        ("q_proj", 0),
        (["proj"], 0),
    ],
)
def test_targets_mean_what_they_mean_to_peft(llama_8b, targets, count):
    assert len(targeted(llama_8b, targets)) == count


def test_parameters_of_an_8b_model_at_rank_16_are_those_that_peft_reports(llama_8b):
    # 41,943,040: PEFT's print_trainable_parameters for Llama 3.1 8B, r=16, all seven projections.
    assert adapter_parameters(llama_8b, Adapter(rank=16)) == 41_943_040


def test_dora_adds_one_value_an_output_row(llama_8b):
    lora = adapter_parameters(llama_8b, Adapter(targets=["q_proj"]))
    assert adapter_parameters(llama_8b, Adapter(kind="dora", targets=["q_proj"])) == lora + 32 * 4096


def test_unknown_targets_are_named_with_what_there_is(llama_8b):
    problem = targets_problem(llama_8b, ["q_proj", "v_prj"])
    assert problem is not None
    assert "no layer called v_prj" in problem.what
    assert str(problem.fix).startswith("Did you mean v_proj? There are q_proj, k_proj")
    assert targets_problem(llama_8b, "q_proj") is not None
    assert targets_problem(llama_8b, "all-linear") is None
