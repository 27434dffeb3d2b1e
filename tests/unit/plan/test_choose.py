import subprocess
import sys
from dataclasses import replace

import pytest

from stoker.arch import families
from stoker.arch.activations import LADDER
from stoker.errors import PlanError
from stoker.plan import speed
from stoker.plan.choose import MemoryPlanError, Statistics, choose
from stoker.plan.efficiencies import MEASURED
from stoker.plan.plan import CHOICES
from stoker.plan.rates import of as rates_of
from stoker.plan.spread import Spread

GIB = 2**30


def test_a_gpu_is_taken_when_there_is_one(run, llama_8b, machine):
    assert choose(run(), llama_8b, machine(80)).device == "cuda"
    assert choose(run(), llama_8b, machine()).device == "cpu"
    assert choose(run("engine.device=cpu"), llama_8b, machine(80)).device == "cpu"


def test_targets_may_be_a_list(run, llama_8b, machine):
    some, all_linear = (
        choose(run(f"adapter.targets={it}"), llama_8b, machine(80)) for it in ("[q_proj]", "all-linear")
    )
    assert some.memory.optimizer < all_linear.memory.optimizer


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
    assert set(roomy.keep) == {"all"}
    assert set(tight.keep) == {"all", "mixer"}
    assert "keeping all needs" in tight.reasons["recompute"]
    assert tight.memory.total <= tight.available_bytes


# An 8B at 2 x 4,096 on cards of these sizes. bf16 weights alone are 15 GiB; NF4's are 5.3.
@pytest.mark.parametrize(
    ("gib", "quantization", "rungs", "offload"),
    [
        (80, "none", {"all"}, False),
        (40, "none", {"all", "mixer"}, False),
        (24, "none", {"mixer"}, True),
        (20, "none", {"mixer", "attention"}, True),
        (40, "nf4", {"all"}, False),
        (24, "nf4", {"all", "mixer"}, False),
        (16, "nf4", {"mixer"}, True),
        (10, "nf4", {"mixer", "attention"}, True),
    ],
)
def test_the_ladder_fills_the_memory_that_is_there(run, llama_8b, machine, gib, quantization, rungs, offload):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2", f"model.quantization={quantization}")
    plan = choose(run(*asked), llama_8b, machine(gib))
    assert (set(plan.keep), plan.offload_activations) == (rungs, offload), plan.recompute
    assert plan.memory.total <= gib * GIB
    # No layer computes more again than it must, and none more waits on the host: with one layer a rung higher it would
    # not fit. It keeps 448 MiB more at most.
    if rungs in ({"all", "mixer"}, {"mixer"}):
        assert plan.memory.total > (gib - 0.6) * GIB
    # Layers that keep less come first: their backward runs when the others' memory is free.
    assert list(plan.keep) == sorted(plan.keep, key=LADDER.index, reverse=True)


def test_estimates_are_near_what_an_8b_took_on_a_gpu(run, llama_8b, machine):
    # Allocated at the peak on an H200 at 2 x 4,096 (PyTorch's count, without context and fragments), in GiB; since
    # then the head needs one tensor of 64 MiB less.
    measured = {
        ("none", "none", "false"): 39.3 - 1 / 16,
        ("none", "attention", "true"): 16.9,
        ("nf4", "attention", "true"): 7.47,
    }
    for (quantization, recompute, offload), peak in measured.items():
        plan = choose(
            run(
                "data.sequence_length=4096",
                "engine.micro_batch_size=2",
                f"model.quantization={quantization}",
                f"engine.recompute={recompute}",
                f"engine.offload_activations={offload}",
            ),
            llama_8b,
            machine(80),
        )
        estimate = (plan.memory.total - plan.memory.reserve) / GIB
        assert peak <= estimate < 1.1 * peak  # never less than what was needed, at most a tenth more


def test_a_memory_limit_is_what_the_plan_fills(run, llama_8b, machine):
    limited = choose(run("engine.memory_limit_gib=24"), llama_8b, machine(80))
    assert limited.available_bytes == 24 * GIB
    assert limited.keep == choose(run(), llama_8b, machine(24)).keep
    assert choose(run("engine.memory_limit_gib=200"), llama_8b, machine(80)).available_bytes == 80 * GIB
    with pytest.raises(PlanError, match=r"10.0 GiB allowed. What would fit: engine.memory_limit_gib: null"):
        choose(run("engine.memory_limit_gib=10"), llama_8b, machine(80))


def test_q_k_and_v_wait_on_the_host_only_where_copies_are_not_what_a_step_waits_for(run, llama_8b, machine):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2")
    quick = choose(run(*asked), llama_8b, machine(20))
    assert set(quick.keep) == {"mixer", "attention"}
    slow = replace(rates_of(machine(20).first("cuda")), efficiencies=replace(MEASURED, host_link=0.02))
    slow_plan = choose(run(*asked), llama_8b, machine(20), rates=slow)
    assert slow_plan.offload_activations
    assert set(slow_plan.keep) == {"attention"}


def test_layers_keep_more_where_gradients_arrive_while_they_let_go(run, llama_8b, machine):
    # One micro-batch a step: the last layer's backward, with all that is kept, comes before the gradients.
    asked = ("engine.micro_batch_size=2", "train.weight_dtype=bf16", "data.sequence_length=4096")
    full = run(*asked, "train.batch_size=2", "adapter=null"), run(*asked, "train.batch_size=4", "adapter=null")
    once, twice = (choose(one, llama_8b, machine(76)) for one in full)
    assert once.keep.count("all") > twice.keep.count("all")
    assert once.memory.total <= once.available_bytes
    # But not where graphs add to gradients that are always there.
    captured = run(*asked, "train.batch_size=2", "adapter=null", "engine.cuda_graphs=true", "data.packing=false")
    assert choose(captured, llama_8b, machine(76)).keep == twice.keep


def test_adapters_gradients_arrive_while_layers_let_go(run, llama_8b, machine):
    asked = ("engine.micro_batch_size=2", "data.sequence_length=4096", "engine.recompute=mixer", "adapter.rank=64")
    once, twice = (choose(run(*asked, f"train.batch_size={rows}"), llama_8b, machine(76)).memory for rows in (2, 4))
    # At the peak, in the last layer's backward, there are those of one layer at most.
    assert twice.activations - once.activations == pytest.approx(once.gradients * 31 / 32, rel=0.04)
    graphs = (*asked, "train.batch_size=2", "engine.cuda_graphs=true", "data.packing=false")
    assert choose(run(*graphs), llama_8b, machine(76)).memory == once
    # AdamW in eight bits takes gradients as they are, and graphs add to those.
    eager, captured = (
        choose(
            run(*graphs, "train.optimizer.kind=adamw_8bit", f"engine.cuda_graphs={on}"), llama_8b, machine(76)
        ).memory
        for on in ("false", "true")
    )
    assert captured.activations - eager.activations == twice.activations - once.activations


def test_attention_waits_on_the_host_before_it_is_computed_again(run, llama_8b, machine):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2")
    away = choose(run(*asked), llama_8b, machine(20))
    # x, attention's output and its statistics of 8,192 tokens, and where they are kept q, k and v.
    assert away.host_bytes == (32 * (2 * 64 + 1) + away.keep.count("mixer") * 96) * 2**20
    assert "pinned host memory" in away.reasons["offload_activations"]
    here = choose(run(*asked, "engine.offload_activations=false"), llama_8b, machine(21.5))
    assert "input" in here.keep
    assert here.host_bytes == 0


def test_as_few_layers_offload_as_memory_demands(run, llama_8b, machine):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2", "engine.recompute=mixer")
    plans = [choose(run(*asked, f"engine.memory_limit_gib={gib}"), llama_8b, machine(80)) for gib in (29, 25, 23)]
    away = [plan.ladder.num_away for plan in plans]
    assert away[0] == 0 < away[1] < away[2] < 32
    for plan, count in zip(plans[1:], away[1:], strict=True):
        assert plan.memory.total <= plan.available_bytes
        assert f"of the first {count} of 32 layers wait in pinned host memory" in plan.reasons["offload_activations"]
        one_less = choose(run(*asked, f"engine.offload_activations={count - 1}"), llama_8b, machine(80))
        assert one_less.ladder.num_away == count - 1
        assert one_less.memory.total > plan.available_bytes
        # x, q, k and v, attention's output and statistics of 8,192 tokens.
        assert plan.host_bytes == count * (64 + 96 + 64 + 1) * 2**20
    by_hand = choose(run(*asked, f"engine.offload_activations={away[1]}"), llama_8b, machine(80))
    assert by_hand.memory == plans[1].memory
    assert by_hand.reasons["offload_activations"].endswith(f"of the first {away[1]} of 32 layers")


def test_offload_without_host_memory_is_not_planned(run, llama_8b, machine):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2")
    assert "input" in choose(run(*asked), llama_8b, machine(20, cpu_gib=4)).keep
    with pytest.raises(PlanError, match=r"needs 4\.0 GiB of pinned host memory"):
        choose(
            run(*asked, "engine.offload_activations=true", "engine.recompute=attention"),
            llama_8b,
            machine(20, cpu_gib=4),
        )


def test_triton_runs_on_a_gpu_that_has_it_and_the_reason_is_given_elsewhere(run, llama_8b, machine):
    assert choose(run(), llama_8b, machine(80)).kernels == "triton"
    for hardware, why in [
        (machine(), "this is a CPU"),
        (machine(80, triton=False), "pip install triton"),
        (machine(80, triton=False, capability=(6, 1)), "GPU has 6.1"),
    ]:
        plan = choose(run(), llama_8b, hardware)
        assert plan.kernels == "reference"
        assert why in plan.reasons["kernels"]
        with pytest.raises(PlanError, match=r"engine.kernels = triton: .*Use reference, or auto"):
            choose(run("engine.kernels=triton"), llama_8b, hardware)
    assert choose(run("engine.kernels=reference"), llama_8b, machine(80)).kernels == "reference"


def test_plain_pytorch_runs_op_by_op_until_something_is_computed_again(run, llama_8b, machine):
    assert choose(run(), llama_8b, machine(80)).layers == "fused"
    plain = choose(run("engine.kernels=reference"), llama_8b, machine(80))
    assert (plain.layers, set(plain.keep)) == ("op by op", {"all"})
    assert choose(run("engine.kernels=reference"), llama_8b, machine(23)).layers == "fused"


def test_dora_goes_through_the_layer_kernel_on_every_rung(run, llama_8b, machine):
    roomy, tight = (choose(run("adapter.kind=dora"), llama_8b, machine(gib)) for gib in (80, 22))
    assert roomy.layers == tight.layers == "fused"
    assert len(set(tight.keep) | set(roomy.keep)) > 1
    assert set(choose(run("adapter.kind=dora", "engine.recompute=mixer"), llama_8b, machine(80)).keep) == {"mixer"}
    lora = choose(run("engine.recompute=mixer"), llama_8b, machine(80))
    dora = choose(run("engine.recompute=mixer", "adapter.kind=dora"), llama_8b, machine(80))
    # The backward turns q, k and v once more, copies gate and up, and runs two products again.
    assert dora.memory.activations > lora.memory.activations
    again = 2 * 32 * (4096 * 4096 + 14336 * 4096)
    assert dora.flops_per_token - lora.flops_per_token == pytest.approx(again, rel=1e-6)


def test_offload_needs_a_gpu(run, llama_8b, machine):
    with pytest.raises(PlanError, match="needs a CUDA GPU; this run uses CPU"):
        choose(run("engine.offload_activations=true"), llama_8b, machine())


def test_fp8_needs_a_gpu_that_has_it(run, llama_8b, machine):
    assert choose(run("model.quantization=fp8"), llama_8b, machine(80, capability=(8, 9))).quantization == "fp8"
    for capability, has in [((8, 0), "GPU has 8.0"), (None, "GPU has none")]:
        with pytest.raises(PlanError, match=f"8.9 or later.*{has}. Use int8"):
            choose(run("model.quantization=fp8"), llama_8b, machine(80, capability=capability))
    assert "slow" in choose(run("model.quantization=fp8"), llama_8b, machine()).reasons["quantization"]


@pytest.fixture
def long_context(llama_8b):
    return replace(llama_8b, max_positions=131072)


_LONG = ("data.sequence_length=32768", "train.batch_size=1", "model.quantization=nf4")


def test_long_rows_go_through_the_feed_forward_in_tiles(run, long_context, machine):
    asked = (*_LONG, "engine.recompute=attention", "engine.offload_activations=true")
    plan = choose(run(*asked), long_context, machine(80))
    assert plan.tile_tokens == 8192
    assert plan.reasons["tile_tokens"] == "feed-forward in tiles of 8,192 tokens: all at once would need 1.4 GiB more"
    assert plan.memory.total < 12 * GIB  # 13.3 GiB without
    assert f"tile_tokens          8192  {' ' * (len(plan.recompute) - 4)}feed-forward" in plan.table()


def test_tiles_leave_memory_to_layers_that_keep_more(run, long_context, machine):
    plan = choose(run(*_LONG), long_context, machine(30))
    assert plan.tile_tokens == 8192
    whole = choose(run(*_LONG), long_context, machine(30), ladder=replace(plan.ladder, tile_tokens=None))
    assert whole.ladder != replace(plan.ladder, tile_tokens=None)  # which does not fit: the plan is made anew
    assert whole == plan


def test_short_rows_and_layers_that_keep_all_go_through_at_once(run, llama_8b, long_context, machine):
    short = choose(run("engine.recompute=mixer", "engine.micro_batch_size=1"), llama_8b, machine(80))
    roomy = choose(run(*_LONG), long_context, machine(139))
    for plan in (short, roomy):
        assert plan.tile_tokens is None
        assert "tile_tokens" not in plan.table()


def test_a_run_that_goes_on_keeps_its_ladder_while_it_fits(run, long_context, machine):
    began = choose(run(*_LONG), long_context, machine(30))
    assert choose(run(*_LONG), long_context, machine(139)).ladder != began.ladder
    assert choose(run(*_LONG), long_context, machine(139), ladder=began.ladder).ladder == began.ladder
    tight = choose(run(*_LONG), long_context, machine(14), ladder=began.ladder)
    assert tight == choose(run(*_LONG), long_context, machine(14))


def test_fp8_weights_stay_transposed_too_where_memory_is_left(run, llama_8b, machine):
    asked = ("model.quantization=fp8", "data.sequence_length=4096", "engine.micro_batch_size=2")
    roomy = choose(run(*asked), llama_8b, machine(80))
    assert roomy.keep_transposed is True
    layers, head = 32 * 4096 * (3 * 14336 + 10240), 2 * 128256 * 4096
    assert (roomy.memory.transposed, roomy.memory.scratch) == (layers + head, 0)
    assert "6.5 GiB that are free" in roomy.reasons["keep_transposed"]
    assert "transposed 7.5 GiB" in roomy.table()
    # No layer computes anything again for the copies' sake: they get what is left, or nothing.
    tight = choose(run(*asked, "engine.memory_limit_gib=36"), llama_8b, machine(80))
    assert (tight.keep_transposed, tight.keep, tight.memory.transposed) == (False, roomy.keep, 0)
    assert tight.memory.total <= 36 * GIB < roomy.memory.total
    assert "each backward transposes each weight" in tight.reasons["keep_transposed"]
    assert choose(run(*asked[1:]), llama_8b, machine(80)).keep_transposed is None


def test_the_head_is_in_fp8_where_memory_is_left_and_its_weight_is_whole(run, llama_8b, machine):
    asked = ("model.quantization=fp8", "data.sequence_length=4096", "engine.micro_batch_size=2")
    roomy = choose(run(*asked), llama_8b, machine(80))
    assert roomy.head_in_fp8 is True
    assert "1002 MiB that are free" in roomy.reasons["head_in_fp8"]
    limit = (roomy.memory.total - GIB // 2) / GIB
    tight = choose(run(*asked, f"engine.memory_limit_gib={limit}"), llama_8b, machine(80))
    assert (tight.keep_transposed, tight.head_in_fp8, tight.keep) == (True, False, roomy.keep)
    assert "1002 MiB more would need" in tight.reasons["head_in_fp8"]
    tighter = choose(run(*asked, "engine.memory_limit_gib=36"), llama_8b, machine(80))
    assert (tighter.keep_transposed, tighter.head_in_fp8) == (False, False)
    odd = choose(run(*asked), replace(llama_8b, vocab_size=128257), machine(80))
    assert odd.head_in_fp8 is False
    assert "sizes that 16 divides" in odd.reasons["head_in_fp8"]
    assert "head_in_fp8" in roomy.table()
    assert choose(run(*asked[1:]), llama_8b, machine(80)).head_in_fp8 is None


def test_a_head_in_fp8_is_predicted_to_be_faster(run, llama_8b, machine):
    asked = ("model.quantization=fp8", "data.sequence_length=4096", "engine.micro_batch_size=2")
    config, rows = run(*asked), speed.Rows(4096, 4096)
    plan = choose(config, llama_8b, machine(80))
    device = rates_of(machine(80).first("cuda")).device
    with_it, without = (
        speed.step(config, llama_8b, replace(plan, head_in_fp8=one), device, rows=rows).head for one in (True, False)
    )
    assert with_it < 0.75 * without


def test_micro_batches_make_up_the_batch(run, llama_8b, machine):
    for batch_size in (1, 7, 12, 32):
        plan = choose(run(f"train.batch_size={batch_size}"), llama_8b, machine(80))
        assert plan.micro_batch_size * plan.accumulation_steps == batch_size


def test_what_the_user_sets_is_obeyed(run, llama_8b, machine):
    set_by_user = run("engine.micro_batch_size=2", "engine.recompute=input", "engine.num_threads=3")
    plan = choose(set_by_user, llama_8b, machine(80))
    assert (plan.micro_batch_size, plan.recompute, plan.num_threads) == (2, "keep input", 3)
    assert plan.reasons["recompute"] == "set in the configuration"


def test_what_does_not_fit_is_refused_with_the_nearest_that_does(run, llama_8b, machine):
    with pytest.raises(PlanError, match=r"needs about \d+.*What would fit: engine.micro_batch_size: auto") as caught:
        choose(run("engine.micro_batch_size=32", "engine.recompute=input"), llama_8b, machine(20.6))
    assert "20.6 GiB free" in str(caught.value)
    with pytest.raises(PlanError, match=r"What would fit: engine\.recompute: auto"):
        choose(run("engine.recompute=none"), llama_8b, machine(20))
    with pytest.raises(PlanError, match=r"What would fit: engine\.offload_activations: auto"):
        asked = ("engine.offload_activations=false", "data.sequence_length=8192")
        choose(run(*asked), llama_8b, machine(20.2))
    with pytest.raises(PlanError, match=r"What would fit: train\.weight_dtype: bf16\."):
        choose(run("adapter=null"), llama_8b, machine(80))
    with pytest.raises(PlanError, match="What would fit: an adapter"):
        choose(run("adapter=null"), llama_8b, machine(40))
    with pytest.raises(PlanError, match=r"What would fit: model\.quantization: nf4"):
        choose(run(), llama_8b, machine(12))
    with pytest.raises(PlanError, match="choose a smaller model"):
        choose(run(), llama_8b, machine(6))


@pytest.mark.parametrize(("length", "memory", "changes"), [(8192, 8.5, 2), (8192, 18, 1)])
def test_the_advice_when_nothing_fits_works(run, llama_8b, machine, length, memory, changes):
    hardware = machine(memory)
    with pytest.raises(PlanError, match=r"What would fit: ") as caught:
        choose(run(f"data.sequence_length={length}"), llama_8b, hardware)
    advice = str(caught.value).partition("What would fit: ")[2].rstrip(".").split(" and ")
    assert len(advice) == changes
    asked = (f"data.sequence_length={length}", *(one.replace(": ", "=") for one in advice))
    assert choose(run(*asked), llama_8b, hardware).memory.total <= memory * GIB


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


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["data.packing=true", "engine.precision=fp32"], "document by document: variable-length attention has no fp32"),
        (["data.packing=false", "adapter.dropout=0.1"], "dropout draws a seed"),
        (["data.packing=false", "train.embedding_noise=5.0"], "noise is drawn"),
        (["data.packing=false", "engine.offload_activations=true"], "wait on the host"),
    ],
)
def test_what_cannot_be_captured_as_a_graph_says_why(run, llama_8b, machine, settings, why):
    plan = choose(run(*settings), llama_8b, machine(80))
    assert not plan.cuda_graphs
    assert why in plan.reasons["cuda_graphs"]
    with pytest.raises(PlanError, match=f"engine.cuda_graphs = true: .*{why}"):
        choose(run(*settings, "engine.cuda_graphs=true"), llama_8b, machine(80))


def test_graphs_are_for_where_launching_takes_longer_than_the_work(run, llama_8b, machine):
    long = choose(run("data.packing=false", "engine.micro_batch_size=8"), llama_8b, machine(80))
    assert not long.cuda_graphs
    assert "longer than launching" in long.reasons["cuda_graphs"]
    short = choose(run("data.packing=false", "data.sequence_length=128", "train.batch_size=1"), llama_8b, machine(80))
    assert short.cuda_graphs
    engine = choose(
        run("data.packing=false", "data.sequence_length=128", "train.batch_size=1"),
        llama_8b,
        machine(80),
        spread=Spread("fsdp2"),
    )
    assert not engine.cuda_graphs  # one process too runs its hooks between kernels
    assert "fsdp2 launches kernel by kernel" in engine.reasons["cuda_graphs"]
    forced = choose(run("data.packing=false", "engine.cuda_graphs=true"), llama_8b, machine(80))
    assert (forced.cuda_graphs, forced.reasons["cuda_graphs"]) == (True, "set in the configuration")
    with pytest.raises(PlanError, match="only a CUDA GPU"):
        choose(run("engine.cuda_graphs=true"), llama_8b, machine())


def test_graphs_are_also_for_where_gaps_between_kernels_show_and_memory_is_free(run, llama_1b, machine):
    asked = ("data.packing=false", "engine.micro_batch_size=8", "train.batch_size=8")
    plan = choose(run(*asked), llama_1b, machine(140))
    assert (plan.micro_batch_size, plan.cuda_graphs) == (8, True)
    # Twice the activations do not fit beside the weights: a graph's, and those of rows of another shape.
    tight = choose(run(*asked, "engine.memory_limit_gib=24"), llama_1b, machine(140))
    assert not tight.cuda_graphs
    assert tight.memory.total + tight.memory.activations > tight.available_bytes
    assert "another shape" in tight.reasons["cuda_graphs"]
    # Twice the work, the same gaps.
    assert not choose(run(*asked, "data.sequence_length=4096"), llama_1b, machine(140)).cuda_graphs
    # Gradients of all weights would be held from step to step.
    assert not choose(run(*asked, "adapter=null"), llama_1b, machine(140)).cuda_graphs


@pytest.mark.parametrize(("base", "captured"), [("none", False), ("fp8", True)])
def test_gaps_show_sooner_where_products_are_faster(run, llama_8b, machine, base, captured):
    asked = ("data.packing=false", "data.sequence_length=4096", "engine.micro_batch_size=2", "train.batch_size=2")
    assert choose(run(*asked, f"model.quantization={base}"), llama_8b, machine(140)).cuda_graphs == captured


def test_packed_rows_are_captured_where_their_attention_is_one_kernel(run, llama_1b, machine):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2", "train.batch_size=2")
    plan = choose(run(*asked), llama_1b, machine(140))
    assert plan.cuda_graphs
    assert "wait for launches" in plan.reasons["cuda_graphs"]
    old = choose(run(*asked), llama_1b, machine(140, capability=(7, 5)))
    assert not old.cuda_graphs
    assert "needs compute capability 8.0, and GPU has 7.5" in old.reasons["cuda_graphs"]
    assert not choose(run(*asked, "engine.cuda_graphs=false"), llama_1b, machine(140)).cuda_graphs


@pytest.mark.parametrize(
    ("changes", "kernels", "why"),
    [
        ({"model_type": "mamba2", "num_heads": 64, "head_dim": 64, "n_groups": 1}, "reference", ""),
        ({"model_type": "gemma2", "head_dim": 64, "sliding_window": 512}, "triton", ""),
        ({"model_type": "gemma2", "head_dim": 64, "sliding_window": 512}, "reference", "soft-capped scores or sinks"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "triton", ""),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 1024},
            "triton",
            "angles follow a document's length",
        ),
    ],
)
def test_what_runs_packed_rows_document_by_document_is_not_captured(run, machine, changes, kernels, why):
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "max_position_embeddings": 8192,
    }
    spec = families.read(config | changes, "config.json")
    plan = choose(run("train.batch_size=1", f"engine.kernels={kernels}"), spec, machine(80))
    assert plan.cuda_graphs == (not why)
    assert why in plan.reasons["cuda_graphs"]


def test_bf16_weights_run_in_bf16_and_are_refused_without_it(run, llama_8b, machine):
    asked = run("adapter=null", "train.weight_dtype=bf16")
    plan = choose(asked, llama_8b, machine(100))
    assert plan.precision == "bf16"
    assert plan.memory.weights < 1.01 * 2 * plan.num_parameters
    wide = choose(run("adapter=null"), llama_8b, machine(200)).memory
    assert plan.memory.gradients + plan.memory.optimizer == pytest.approx(
        (wide.gradients + wide.optimizer) / 2, rel=1e-3
    )
    with pytest.raises(PlanError, match=r"train\.weight_dtype = bf16, but GPU does not compute in it"):
        choose(asked, llama_8b, machine(100, bf16=False))
    with pytest.raises(PlanError, match="an adapter"):  # not advised where there is no bf16
        choose(run("adapter=null"), llama_8b, machine(80, bf16=False))


def test_by_force_the_nearest_to_fitting_is_planned(run, llama_8b, machine):
    with pytest.raises(MemoryPlanError):
        choose(run("engine.recompute=none"), llama_8b, machine(15.5))
    plan = choose(run("engine.recompute=none"), llama_8b, machine(15.5), force=True)
    assert plan.memory.total > plan.available_bytes
    assert plan.micro_batch_size == 1
    assert "by force" in plan.reasons["micro_batch_size"]
    assert choose(run(), llama_8b, machine(80), force=True) == choose(run(), llama_8b, machine(80))
