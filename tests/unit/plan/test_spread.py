"""Several devices: what each holds and what passes between them, held to the published formulas."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stoker.arch import arithmetic
from stoker.arch.activations import Micro, op_by_op
from stoker.arch.spec import AttentionSpec, LayerSpec, NormSpec, PlainSpec
from stoker.config.schema import AdamW
from stoker.errors import PlanError
from stoker.plan import speed
from stoker.plan.catalogue import shipped
from stoker.plan.choose import choose
from stoker.plan.efficiencies import MEASURED
from stoker.plan.gathered import Sizes, passing
from stoker.plan.hardware import Device, Hardware
from stoker.plan.links import Links
from stoker.plan.many import choose_over
from stoker.plan.memory import estimate, workspace_bytes, zero_bytes
from stoker.plan.spread import SINGLE, Spread, configured, share, spreads, volume

GIB, GB = 2**30, 10**9
ROOT = Path(__file__).parents[3]
H100, H200 = shipped()["h100"], shipped()["h200"]


def states(spec, way, precision="bf16"):
    memory = estimate(
        spec,
        trained=arithmetic.num_parameters(spec),
        frozen=0,
        optimizer=AdamW(),
        tokens=1,
        precision=precision,
        device="cuda",
        spread=way,
    )
    return memory.weights + memory.gradients + memory.optimizer


# arXiv:1910.02054, figure 1: 7.5 billion parameters on 64 GPUs, mixed precision with Adam (K = 12), in GB.
@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_under_zero_are_those_of_its_paper(stage, published):
    assert zero_bytes(7.5e9, 64, stage) / GB == pytest.approx(published, rel=0.015)


# Megatron-LM's dist_optimizer.md, bytes a parameter on d ranks, without and with the distributed optimiser.
@pytest.mark.parametrize(
    ("weight", "gradient", "state", "alone", "shared"),
    [(2, 2, 16, 20, lambda d: 4 + 16 / d), (2, 4, 12, 18, lambda d: 6 + 12 / d), (4, 4, 8, 16, lambda d: 8 + 8 / d)],
)
def test_states_of_a_distributed_optimiser_are_those_that_megatron_publishes(weight, gradient, state, alone, shared):
    sizes = {"weight": weight, "gradient": gradient, "state": state}
    assert zero_bytes(1, 64, 0, **sizes) == alone
    for ranks in (2, 8, 64):
        assert zero_bytes(1, ranks, 1, **sizes) == pytest.approx(shared(ranks))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_under_deepspeed_here_follow_zeros_formula_in_fp32(llama_8b, stage):
    # Weights and gradients stay fp32, and the optimiser has a flat copy of its part beside two averages.
    count = arithmetic.num_parameters(llama_8b)
    ours = states(llama_8b, Spread("deepspeed", 64, 8, stage), "fp32")
    assert ours == pytest.approx(zero_bytes(count, 64, stage, weight=4, gradient=4, state=12), rel=1e-6)


def test_fsdp2_divides_all_states_and_ddp_none(llama_8b):
    count = arithmetic.num_parameters(llama_8b)
    whole, shared = states(llama_8b, Spread("ddp", 8, 8)), states(llama_8b, Spread("fsdp2", 8, 8))
    assert whole == (4 + 2 + 4 + 8) * count
    assert shared == pytest.approx(16 * count / 8, rel=1e-6)  # parts in fp32; what products read is gathered as bf16


def test_a_frozen_base_is_shared_where_weights_are(llama_8b):
    def weights(way):
        count = arithmetic.num_parameters(llama_8b)
        memory = estimate(
            llama_8b,
            trained=40_000_000,
            frozen=count,
            optimizer=AdamW(),
            tokens=2048,
            precision="bf16",
            device="cuda",
            quantization="nf4",
            spread=way,
        )
        return memory.weights, memory.communication

    alone, _ = weights(SINGLE)
    parts, buffers = weights(Spread("fsdp2", 8, 8))
    assert parts < alone / 6
    # Embedding and head in bf16, two layers in NF4 with their adapters, gradients of one twice, and NCCL's own.
    tables = 2 * 2 * 128256 * 4096
    casts = 2 * 40_000_000  # of adapters, which are counted with the weights
    layers = 2 * (alone - tables - casts) / 32 + 2 * 4 * 40_000_000 / 32
    assert buffers == pytest.approx(tables + layers + 512 * 2**20, rel=1e-3)
    assert weights(Spread("deepspeed", 8, 8, 2))[0] > 0.95 * alone
    # ZeRO-3: the same tables, two layers in NF4 with their adapters, two layers' gradients, and its bucket.
    parts, buffers = weights(Spread("deepspeed", 8, 8, 3))
    assert parts < alone / 6
    layers = 2 * (alone - tables - casts) / 32 + 2 * 4 * 40_000_000 / 32
    assert buffers == pytest.approx(tables + layers + 4 * 5 * 10**8 + 512 * 2**20, rel=1e-3)


# arXiv:2205.05198, equation 1 without its 5 a s / h (attention's scores, which no kernel keeps): 34 s b h bytes a
# layer, of which 2 s b h are the masks of two dropouts that these layers have not.
def test_activations_of_a_layer_are_those_of_megatrons_formula():
    hidden, heads, tokens = 1024, 16, 2048
    attention = AttentionSpec(heads, heads, hidden // heads, rope=None, qkv_bias=True, out_bias=True)
    layer = LayerSpec(attention, PlainSpec(4 * hidden, "gelu"), NormSpec("layer", bias=True))
    kept = op_by_op(layer, hidden, Micro(tokens, 2), "all").kept
    statistics = 4 * tokens * heads  # of attention, in fp32; the formula leaves them out
    assert kept - statistics == (34 - 2) * tokens * hidden
    # Full recomputation keeps 2 s b h.
    assert op_by_op(layer, hidden, Micro(tokens, 2), "input").kept == 2 * tokens * hidden


# arXiv:1910.02054, section 7: 2 P for a sum that all have and for stages 1 and 2, 3 P for stage 3, in values.
@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_what_passes_in_a_step_is_what_zeros_paper_says(stage, times):
    count = 10**9
    way = Spread("deepspeed", 64, 8, stage) if stage else Spread("ddp", 64, 8)
    moved = volume(way, stored=2 * count, gradients=2 * count)
    assert moved.per_step(1, 64) == pytest.approx(times * 2 * count * 63 / 64)


def test_every_micro_batch_gathers_weights_that_are_shared():
    fsdp2 = volume(Spread("fsdp2", 8, 8), stored=16e9, gradients=160e6)
    assert fsdp2.per_step(4, 8) == pytest.approx(4 * fsdp2.per_step(1, 8))
    ddp = volume(Spread("ddp", 8, 8), stored=16e9, gradients=160e6)
    assert ddp.per_step(4, 8) == ddp.per_step(1, 8)


def test_links_are_the_devices_own_in_a_node_and_the_network_between():
    links = Links.of(H100)
    inside = links.seconds(8e9, Spread("fsdp2", 8, 8))
    assert inside == pytest.approx(8e9 * 7 / 8 / (0.58 * 450e9) + 25e-6)
    between = links.seconds(8e9, Spread("fsdp2", 16, 8))
    assert between == pytest.approx(8e9 / 2 / (0.8 * 400e9) + 85e-6, rel=0.01) or between > inside
    slow = Links.of(replace(H100, network=3.125e9)).seconds(8e9, Spread("fsdp2", 16, 8))
    assert slow == pytest.approx(8e9 / 2 / 2.5e9, rel=0.01)
    without = Links.of(shipped()["rtx4090"]).seconds(8e9, Spread("ddp", 2, 2))
    assert without > 5 * inside


def machine(gib=80, name=H100.name):
    gpu = Device("cuda", name, int(gib * GIB), bf16=True, compute_capability=(9, 0), triton=True)
    return Hardware((gpu, Device("cpu", "CPU", 256 * GIB)), num_threads=8)


def test_more_processes_have_more_collectives_and_less_work(run, llama_8b):
    plans = {
        n: choose(
            run(f"train.batch_size={32 // n}"), llama_8b, machine(), spread=Spread("ddp", n, n) if n > 1 else SINGLE
        )
        for n in (1, 2, 8)
    }
    rows = speed.Rows(2048, 2048)
    seconds = {
        n: speed.step(run(f"train.batch_size={32 // n}"), llama_8b, plan, H100, rows=rows) for n, plan in plans.items()
    }
    assert seconds[1].communication == 0.0
    assert seconds[8].communication > 0.0
    assert seconds[1].seconds > seconds[2].seconds > seconds[8].seconds
    assert seconds[8].seconds > seconds[1].seconds / 8
    assert seconds[8].seconds == pytest.approx(sum(seconds[8].parts().values()))


def test_auto_keeps_the_whole_model_on_each_where_it_fits_and_shares_it_where_not(run, llama_8b):
    lora = choose_over(run(), llama_8b, machine(), num_processes=8)
    assert (lora.strategy, lora.num_processes) == ("ddp", 8)
    full = run("adapter=null", "train.batch_size=4")
    with pytest.raises(PlanError):
        choose(full, llama_8b, machine())
    shared = choose_over(full, llama_8b, machine(), num_processes=8)
    assert shared.strategy == "fsdp2"
    assert shared.memory.total <= shared.available_bytes
    assert shared.memory.communication > 0
    assert "a part of each weight" in shared.reasons["strategy"]


def test_what_does_not_fit_on_one_fits_on_eight_only_when_weights_are_shared(run):
    from stoker.arch import shapes

    spec = shapes.spec("llama-3.1-70b")
    asked = run("train.batch_size=2")
    with pytest.raises(PlanError, match="the run needs"):
        choose_over(run("train.batch_size=2", "engine.strategy=ddp"), spec, machine(), num_processes=8)
    plan = choose_over(asked, spec, machine(), num_processes=8)
    assert plan.strategy == "fsdp2"
    assert plan.memory.weights < 25 * GIB


def test_what_waits_on_the_host_leaves_the_device(run, llama_8b):
    full = ("adapter=null", "train.batch_size=4", "engine.strategy=fsdp2", "engine.micro_batch_size=1")
    here = choose_over(run(*full), llama_8b, machine(), num_processes=8)
    away = choose_over(run(*full, "engine.fsdp2.offload=cpu"), llama_8b, machine(), num_processes=8)
    held = here.memory
    assert away.memory.states_on_host == pytest.approx(16 * arithmetic.num_parameters(llama_8b) / 8, rel=1e-6)
    assert away.memory.gradients == away.memory.optimizer == 0
    assert away.memory.total < held.total - 0.9 * away.memory.states_on_host
    small = Hardware((machine().devices[0], Device("cpu", "CPU", 100 * GIB)), num_threads=8)
    with pytest.raises(PlanError):  # eight parts of 15 GiB on one host of 100
        choose_over(run(*full, "engine.fsdp2.offload=cpu"), llama_8b, small, num_processes=8)


@pytest.mark.parametrize(("stage", "bytes_a_weight"), [(2, 16), (3, 16)])
def test_an_offloaded_optimiser_takes_the_gradients_with_it(run, llama_8b, stage, bytes_a_weight):
    full = ("adapter=null", "train.batch_size=4", "engine.micro_batch_size=1", "engine.strategy=deepspeed")
    asked = run(*full, f"engine.deepspeed.stage={stage}", "engine.deepspeed.offload_optimizer=cpu")
    away = choose_over(asked, llama_8b, machine(), num_processes=8, stages=(stage,)).memory
    assert away.gradients == away.optimizer == 0
    # The optimiser's flat copy and two averages, and the gradients of its part.
    count = arithmetic.num_parameters(llama_8b)
    assert away.states_on_host == pytest.approx(bytes_a_weight * count / 8, rel=1e-6)


def test_what_waits_on_nvme_takes_buffers_of_the_host_alone(run):
    from stoker.arch import shapes

    spec = shapes.spec("llama-3.1-70b")
    full = ("adapter=null", "train.batch_size=4", "engine.micro_batch_size=1", "engine.strategy=deepspeed")
    full += ("engine.deepspeed.stage=3", "engine.deepspeed.nvme_path=/disk")
    small = Hardware((machine().devices[0], Device("cpu", "CPU", 256 * GIB)), num_threads=8)

    def planned(place):
        asked = run(*full, f"engine.deepspeed.offload_optimizer={place}")
        return choose_over(asked, spec, small, num_processes=8, stages=(3,)).memory

    with pytest.raises(PlanError):  # eight parts of 131 GiB
        planned("cpu")
    away = planned("nvme")
    assert away.gradients == away.optimizer == 0
    assert away.states_on_host == 16 * 10**9  # a sub-group of 1e9 values: weights, two averages and gradients


def test_zero_3_takes_its_bucket_of_gradients_whole(run, llama_8b):
    def communication(zero):
        asked = run("engine.strategy=deepspeed", "engine.deepspeed.stage=3", f"engine.deepspeed.config={zero}")
        way = configured(Spread("deepspeed", 8, 8, 3), asked)
        return choose(share(asked, way), llama_8b, machine(), spread=way).memory.communication

    plain = communication('{"zero_optimization": {}}')
    assert plain - communication('{"zero_optimization": {"reduce_bucket_size": 100000000}}') == 4 * 4 * 10**8
    assert plain - communication('{"zero_optimization": {"reduce_bucket_size": "auto"}}') == 4 * (5 * 10**8 - 4096**2)


def test_replicas_hold_larger_parts_and_layers_that_stay_gathered_more(run, llama_8b):
    full = ("adapter=null", "train.batch_size=4", "engine.strategy=fsdp2", "engine.micro_batch_size=1")
    hybrid = choose_over(run(*full, "engine.fsdp2.replicas=2"), llama_8b, machine(141), num_processes=16)
    lets_go = "engine.fsdp2.reshard_after_forward=true"
    plain = choose_over(run(*full, lets_go), llama_8b, machine(141), num_processes=16)
    assert hybrid.memory.optimizer == pytest.approx(2 * plain.memory.optimizer, rel=1e-6)
    stays = choose_over(
        run(*full, "engine.fsdp2.reshard_after_forward=false"), llama_8b, machine(141), num_processes=16
    )
    assert stays.memory.communication > 3 * plain.memory.communication / 2


def test_layers_stay_gathered_where_there_is_the_memory_and_are_gathered_again_where_not(run, llama_8b):
    full = ("adapter=null", "train.batch_size=4", "engine.strategy=fsdp2", "engine.micro_batch_size=1")
    lets_go = choose_over(
        run(*full, "engine.fsdp2.reshard_after_forward=true"), llama_8b, machine(141), num_processes=16
    )
    stays = choose_over(run(*full), llama_8b, machine(141), num_processes=16)
    more = stays.memory.total - lets_go.memory.total
    assert (lets_go.reshards, stays.reshards) == (True, False)
    assert lets_go.ladder == stays.ladder  # what layers keep comes first
    # All layers in bf16 instead of two, and what the allocator loses with them.
    assert more == pytest.approx(1.05 * 30 / 32 * 2 * (8_030_261_248 - 2 * 128256 * 4096), rel=1e-3)
    assert "free: layers are gathered once a micro-batch" in stays.reasons["reshards"]
    less = machine((lets_go.memory.total + more / 2) / GIB)
    small = choose_over(run(*full), llama_8b, less, num_processes=16)
    assert small.reshards is True
    assert small.memory == lets_go.memory
    assert "to stay they would need" in small.reasons["reshards"]
    assert "reshards" in small.table()
    assert "reshards" not in choose(run(), llama_8b, machine()).table()


def test_matrices_pass_in_the_products_dtype_and_what_is_in_no_layer_once(run, llama_8b):
    tables, count = 2 * 128256 * 4096, 8_030_261_248
    sizes = Sizes(0, count, is_full=True, weight_bytes=4, value_bytes=2)
    way = Spread("fsdp2", 8, 8)
    moved = passing(llama_8b, way, sizes)
    assert moved.micro_gathered == 2 * 2 * (count - tables) + 4 * tables
    assert moved.micro_summed == 4 * count
    once = passing(llama_8b, replace(way, reshards=False, param_dtype="fp32", reduce_dtype="bf16"), sizes)
    assert (once.micro_gathered, once.micro_summed) == (4 * count, 2 * count)


def test_memory_under_fsdp2_is_what_was_measured(run):
    # Cell full_1b of benchmarks/results/scaling.json: every weight of a 1B on two H200, 4 x 4,096 tokens each. It was
    # measured when weights were gathered in fp32 and let go after their forward.
    from stoker.arch import shapes

    runs = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())["runs"]
    measured = next(one for one in runs if one["cell"] == "full_1b" and one.get("strategy") == "fsdp2")
    config = run(
        "adapter=null",
        "train.batch_size=4",
        "data.sequence_length=4096",
        "engine.strategy=fsdp2",
        "engine.micro_batch_size=4",
        "engine.fsdp2.param_dtype=fp32",
        "engine.fsdp2.reshard_after_forward=true",
    )
    plan = choose_over(config, shapes.spec("llama-3.2-1b"), machine(130, H200.name), num_processes=2)
    tensors = plan.memory.total - plan.memory.reserve - 512 * 2**20 + workspace_bytes((9, 0))
    assert tensors == pytest.approx(measured["peak_bytes"], rel=0.025)


def test_strategies_are_those_that_are_asked_for():
    assert spreads(1, 1) == [SINGLE]
    assert [way.name for way in spreads(8, 8)] == ["ddp", "fsdp2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert [way.name for way in spreads(8, 8, asked="deepspeed", stages=(2,))] == ["ZeRO-2"]
    assert spreads(16, 8)[0].nodes == 2


def test_states_on_the_host_are_updated_there_and_weights_on_it_are_fetched(run, llama_8b):
    machine = Hardware((H100.device(), Device("cpu", "host", 4000 * GIB)))
    config = run("train.batch_size=4", "adapter=null", "engine.micro_batch_size=2", "engine.recompute=input")

    def step(*away):
        way = Spread("fsdp2", 8, 8, on_host=frozenset(away))
        plan = choose(config, llama_8b, machine, spread=way)
        return speed.step(config, llama_8b, plan, H100, rows=speed.Rows(2048, 2048))

    here, states = step(), step("optimizer")
    # A billion values a device: 8 GB over the link, and 38 bytes of each through memory that eight processes share.
    mine, link = 8_030_261_248 / 8, 0.8 * H100.host_link
    least = mine * (8 / link + 8 * 38 / 100e9)
    assert least < states.optimizer < least + here.optimizer
    assert states.matmul == here.matmul
    away = step("optimizer", "gradients", "weights")
    passes = away.communication + away.hidden["collectives"] - states.communication - states.hidden["collectives"]
    # Of each of two micro-batches, for its forward and its backward.
    assert passes == pytest.approx(2 * 2 * 4 * mine / link, rel=0.01)


@pytest.mark.parametrize(
    ("strategy", "more", "runs_as"),
    [
        ("ddp", (), "single"),
        ("fsdp2", (), "single"),
        ("fsdp2", ("engine.fsdp2.offload=cpu",), "fsdp2"),
        ("fsdp2", ("engine.fsdp2.reduce_dtype=bf16",), "fsdp2"),
        ("deepspeed", ("engine.deepspeed.stage=3",), "single"),
        ("deepspeed", ("engine.deepspeed.offload_optimizer=cpu",), "deepspeed"),
        ("deepspeed", ("engine.deepspeed.config={zero_optimization: {stage: 2}}",), "deepspeed"),
    ],
)
def test_one_device_runs_as_single_unless_its_strategy_does_more_than_share(
    run, llama_8b, machine, strategy, more, runs_as
):
    plan = choose_over(run(f"engine.strategy={strategy}", *more), llama_8b, machine(141), num_processes=1)
    assert plan.strategy == runs_as
    if runs_as == "single":
        assert f"{strategy} has nothing to share" in plan.reasons["strategy"]
    else:
        setting = more[0].partition("=")[0]
        assert f"one device has use for {setting}" in plan.reasons["strategy"]
        copies = (
            "brings each layer's weights from the host" if "offload" in setting else "copies what each layer trains"
        )
        assert (copies in plan.reasons["strategy"]) == (strategy == "fsdp2")


def test_fsdp2_alone_copies_what_is_trained_and_no_more(run, llama_8b):
    # As in cell alone_fsdp2 of benchmarks/results/scaling.json: 8B, LoRA, 2 x 4,096, all kept, one H200.
    config = run(
        "train.batch_size=2", "engine.micro_batch_size=2", "data.sequence_length=4096", "engine.recompute=none"
    )
    hardware, steps, memory = Hardware((H200.device(), Device("cpu", "host", 100 * GIB))), {}, {}
    ways = {"single": Spread(), "again": Spread("fsdp2"), "stays": Spread("fsdp2", reshards=None)}
    plans = {name: choose(config, llama_8b, hardware, spread=way) for name, way in ways.items()}
    for name, plan in plans.items():
        steps[name] = speed.step(config, llama_8b, plan, H200, rows=speed.Rows(4096, 4096)).seconds
        memory[name] = plan.memory.total - plan.memory.reserve
    adapters, bandwidth = 4 * plans["single"].num_trained_parameters, MEASURED.bandwidth * H200.bandwidth
    # Read and written for the forward and again for the backward.
    assert steps["again"] - steps["single"] == pytest.approx(2 * 2 * adapters / bandwidth)
    assert steps["stays"] - steps["single"] == pytest.approx(2 * adapters / bandwidth)
    # Of a layer, its adapters, their gradients, and these as they are summed.
    assert memory["again"] - memory["single"] == pytest.approx(3 * adapters / 32, rel=1e-3)
    assert memory["stays"] - memory["single"] == pytest.approx((1 + 2 / 32) * adapters, rel=1e-3)
    assert plans["stays"].reshards is False
    assert "layers are copied once a micro-batch" in plans["stays"].reasons["reshards"]


@pytest.mark.parametrize(
    ("way", "passes_base"),
    [
        (Spread("fsdp2"), False),
        (Spread("fsdp2", 8, 8, replicas=8), False),
        (Spread("fsdp2", 8, 8, replicas=4), True),
        (Spread("fsdp2", on_host=frozenset(("weights", "gradients", "optimizer"))), True),
    ],
)
def test_frozen_weights_pass_unless_a_device_has_all_of_them(llama_8b, way, passes_base):
    base, trained = 16 * 10**9, 40 * 10**6
    moved = passing(llama_8b, way, Sizes(base, trained, is_full=False, weight_bytes=4, value_bytes=2))
    tables = 2 * 2 * 128256 * 4096  # are gathered once
    expected = 2 * (base + 4 * trained) - tables if passes_base else 2 * 4 * trained
    assert moved.micro_gathered == expected
    assert moved.micro_summed == 4 * trained
    full = passing(llama_8b, way, Sizes(0, 8 * 10**9, is_full=True, weight_bytes=4, value_bytes=2))
    assert full.micro_gathered > 2 * 2 * 6 * 10**9  # all of it is trained
