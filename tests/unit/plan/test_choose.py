import subprocess
import sys

import pytest

from stoker.errors import PlanError
from stoker.plan.choose import Statistics, choose
from stoker.plan.plan import CHOICES


def test_a_gpu_is_taken_when_there_is_one(run, llama_8b, machine):
    assert choose(run(), llama_8b, machine(80)).device == "cuda"
    assert choose(run(), llama_8b, machine()).device == "cpu"
    assert choose(run("engine.device=cpu"), llama_8b, machine(80)).device == "cpu"


@pytest.mark.parametrize(
    ("overrides", "gpu", "bf16", "precision"),
    [
        ([], 80, True, "bf16"),
        ([], 80, False, "fp16"),
        ([], 0, False, "fp32"),
        (["engine.precision=fp32"], 80, True, "fp32"),
    ],
)
def test_precision_follows_the_device_unless_set(run, llama_8b, machine, overrides, gpu, bf16, precision):
    assert choose(run(*overrides), llama_8b, machine(gpu, bf16=bf16)).precision == precision


def test_recompute_is_chosen_only_where_memory_demands_it(run, llama_8b, machine):
    roomy, tight = choose(run(), llama_8b, machine(80)), choose(run(), llama_8b, machine(23))
    assert (roomy.recompute, tight.recompute) == ("none", "block")
    assert "without it" in tight.reasons["recompute"]
    assert tight.memory.total <= tight.available_bytes


def test_micro_batches_make_up_the_batch(run, llama_8b, machine):
    for batch_size in (1, 7, 12, 32):
        plan = choose(run(f"train.batch_size={batch_size}"), llama_8b, machine(80))
        assert plan.micro_batch_size * plan.accumulation_steps == batch_size


def test_what_the_user_sets_is_obeyed(run, llama_8b, machine):
    set_by_user = run("engine.micro_batch_size=2", "engine.recompute=block", "engine.num_threads=3")
    plan = choose(set_by_user, llama_8b, machine(80))
    assert (plan.micro_batch_size, plan.recompute, plan.num_threads) == (2, "block", 3)
    assert plan.reasons["recompute"] == "set in the configuration"


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(run, llama_8b, machine):
    with pytest.raises(PlanError, match=r"needs about \d+.*What would fit: engine.micro_batch_size: auto") as caught:
        choose(run("engine.micro_batch_size=32", "engine.recompute=block"), llama_8b, machine(20.6))
    assert "20.6 GiB free" in str(caught.value)
    with pytest.raises(PlanError, match=r"What would fit: engine\.recompute: auto"):
        choose(run("engine.recompute=none"), llama_8b, machine(23))
    with pytest.raises(PlanError, match="What would fit: an adapter"):
        choose(run("adapter=null"), llama_8b, machine(80))
    with pytest.raises(PlanError, match="choose a smaller model"):
        choose(run(), llama_8b, machine(8))


def test_the_advice_when_nothing_fits_works(run, llama_8b, machine):
    hardware = machine(18.5)
    with pytest.raises(PlanError, match=r"What would fit: data.sequence_length: (\d+)") as caught:
        choose(run("data.sequence_length=8192"), llama_8b, hardware)
    length = str(caught.value).rsplit(": ", 1)[1].rstrip(".")
    assert choose(run(f"data.sequence_length={length}"), llama_8b, hardware).memory.total <= 18.5 * 2**30


def test_a_device_that_is_not_there_is_refused(run, llama_8b, machine):
    with pytest.raises(PlanError, match="PyTorch finds no CUDA GPU"):
        choose(run("engine.device=cuda"), llama_8b, machine())
    with pytest.raises(PlanError, match="fp16 needs a GPU"):
        choose(run("engine.precision=fp16"), llama_8b, machine())
    with pytest.raises(PlanError, match="GPU does not compute in it"):
        choose(run("engine.precision=bf16"), llama_8b, machine(80, bf16=False))


def test_short_documents_need_less_memory_when_not_packed(run, llama_8b, machine):
    config = run("data.packing=false", "engine.micro_batch_size=1")
    known = choose(config, llama_8b, machine(80), statistics=Statistics(longest=100))
    assert known.row_tokens == 104
    assert known.memory.activations < choose(config, llama_8b, machine(80)).memory.activations
    assert choose(run(), llama_8b, machine(80), statistics=Statistics(longest=100)).row_tokens == 2048


def test_every_choice_has_a_reason(run, llama_8b, machine):
    reasons = choose(run(), llama_8b, machine(80)).reasons
    assert set(reasons) == set(CHOICES)
    assert all(reasons.values())


def test_problems_with_the_model_are_reported_together(run, llama_8b, machine):
    with pytest.raises(PlanError) as caught:
        choose(run("data.sequence_length=9000", "adapter.targets=[q_prj]"), llama_8b, machine(80))
    assert len(caught.value.problems) == 2


def test_planning_imports_no_framework():
    code = "import sys, stoker.plan.choose; print(*{'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
