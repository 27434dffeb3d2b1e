"""What DoRA adds to the plan's time and memory, beside what LoRA has (its products: tests/unit/arch/test_flops.py)."""

from dataclasses import replace

import pytest
import torch

from live_bytes import LiveBytes
from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch.activations import LADDER
from stoker.arch.families import read
from stoker.config.schema import Adapter
from stoker.kernels import dora as dora_kernels
from stoker.kernels.dora import row_norms
from stoker.models import native
from stoker.plan import speed
from stoker.plan.adapter import adapted
from stoker.plan.amounts import LENGTH_BYTES, LENGTHS_MAX_RANK, Way, amounts
from stoker.plan.catalogue import shipped
from stoker.plan.choose import choose
from stoker.plan.memory import lengths_bytes

H200 = shipped()["h200"]


def step(run, spec, machine, kind, tokens, *settings):
    rows = ("train.batch_size=2", "engine.micro_batch_size=2")
    config = run(f"adapter.kind={kind}", "engine.recompute=mixer", *rows, *settings)
    plan = choose(config, spec, machine(140))
    return speed.step(config, spec, plan, H200, rows=speed.Rows(tokens, tokens))


def test_lengths_of_rows_cost_the_same_however_many_tokens_there_are(run, llama_8b, machine):
    more = {}
    for tokens in (1024, 4096):
        lora, dora = (step(run, llama_8b, machine, kind, tokens) for kind in ("lora", "dora"))
        assert dora.matmul == lora.matmul
        assert dora.recompute > 1.5 * lora.recompute  # out and down again, beside gate and up
        more[tokens] = dora.adapters - lora.adapters
    fixed = (4 * more[1024] - more[4096]) / 3
    # Of 7 billion weights in bf16, read once at 80% of the bandwidth.
    weights = 32 * (4096 * (6144 + 4096) + 3 * 4096 * 14336)
    assert fixed == pytest.approx(2 * weights / (0.8 * H200.bandwidth), rel=0.01)


@pytest.mark.parametrize("setting", ["engine.kernels=reference", f"adapter.rank={LENGTHS_MAX_RANK + 1}"])
def test_plain_pytorch_widens_a_weight_for_them(run, llama_8b, machine, setting):
    weights = 32 * (4096 * (6144 + 4096) + 3 * 4096 * 14336)
    lora, dora = (step(run, llama_8b, machine, kind, 1, setting) for kind in ("lora", "dora"))
    # Read and widened, squared, summed, and multiplied by A, which takes longer than reading where its rank is high.
    widened = (2 + 4 + 4 + 4 + 4) * weights / (0.8 * H200.bandwidth)
    rank = LENGTHS_MAX_RANK + 1 if "rank" in setting else 16
    widened += max(4 / (0.8 * H200.bandwidth), 2 * rank / (0.69 * H200.rates["fp32"])) * weights
    assert dora.adapters - lora.adapters == pytest.approx(widened, rel=0.01)


def test_the_plans_ranks_are_the_kernels():
    assert LENGTHS_MAX_RANK == dora_kernels.MAX_RANK
    assert LENGTH_BYTES == dora_kernels._CHUNK_BYTES


def test_a_quantised_base_is_made_dense_for_them(run, llama_8b, machine):
    plain, nf4 = (
        step(run, llama_8b, machine, "dora", 4096, f"model.quantization={kind}").adapters for kind in ("none", "nf4")
    )
    assert nf4 > plain


def test_their_launches_count(run, llama_8b, machine):
    slow = replace(H200, bandwidth=1e15, rates=dict.fromkeys(H200.rates, 1e18))
    waiting = {}
    for kind in ("lora", "dora"):
        config = run(f"adapter.kind={kind}", "engine.cuda_graphs=false", "engine.micro_batch_size=1")
        plan = choose(config, llama_8b, machine(140))
        waiting[kind] = speed.step(config, llama_8b, plan, slow, rows=speed.Rows(64, 64)).waiting
    # A kernel for each of a layer's seven weights, and what is done for the four that lie together.
    assert waiting["dora"] - waiting["lora"] == pytest.approx(32 * (7 + 4 * 10) * 5e-6 * 32, rel=0.01)


@pytest.mark.parametrize(("rows", "dtype"), [(8192, torch.bfloat16), (512, torch.bfloat16), (8192, torch.float32)])
def test_they_take_the_memory_that_is_counted(rows, dtype):
    columns = 1024
    weight, a, b = torch.zeros(rows, columns, dtype=dtype), torch.zeros(4, columns), torch.zeros(rows, 4)
    with LiveBytes() as memory:
        row_norms(weight, a, b, scaling=1.0, slices=[slice(0, rows)])
    sizes = {"hidden_size": columns, "intermediate_size": rows // 2, "num_attention_heads": 4, "vocab_size": 64}
    spec = read({"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 1} | sizes, "config.json")
    expected = lengths_bytes(spec, "none", dtype.itemsize, in_pieces=True)
    if rows == 512:  # the largest weight of that model is q, k and v
        expected = 2 * 4 * rows * columns
    assert memory.peak == pytest.approx(expected, rel=0.05)
    dense = lengths_bytes(spec, "nf4", dtype.itemsize, in_pieces=False)
    assert lengths_bytes(spec, "none", dtype.itemsize, in_pieces=False) == 0
    assert dense == dtype.itemsize * max(rows * columns, 1536 * columns)


class Recorder:
    """In place of a kernel: launches nothing, and adds up the values of the rows that it would read or write."""

    def __init__(self, moved, num_tensors):
        self.moved, self.num_tensors = moved, num_tensors

    def __getitem__(self, grid):
        def launch(rows, *others, **constants):
            self.moved.append(rows.numel() * self.num_tensors(constants))

        return launch


@pytest.mark.parametrize("rung", LADDER)
def test_what_factors_move_is_what_the_kernels_are_given(rung, monkeypatch):
    tokens, moved = 16, []
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
    spec = read({"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2} | sizes, "config.json")
    model = native.build(spec, device="cpu", seed=1)
    add_lora(model, rank=2, alpha=2.0, dora=True)
    fuse_blocks(model, keep=rung, implementation="triton")
    # The sum with the residual is counted with a layer's others: of this pass, what it reads of one is not.
    monkeypatch.setattr(dora_kernels, "_scale_kernel", Recorder(moved, lambda constants: 2))
    monkeypatch.setattr(dora_kernels, "_sums_kernel", Recorder(moved, lambda constants: 2 + constants["WRITES"]))
    x = torch.randn(1, tokens, 32, requires_grad=True)
    with LiveBytes(clears=True):  # what no kernel has written is zero
        y = model.blocks[0](x, torch.ones(1, tokens, 4), torch.zeros(1, tokens, 4))
        y.backward(torch.ones_like(y))
    kept = adapted(spec, Adapter(kind="dora", rank=2), "none")
    work = amounts(spec, Way("fused", (rung,), "none", None, True, uses_triton=True, adapter=kept), tokens, tokens, 1.0)
    again = 2 * tokens * (32 + 32)  # the updates of `out` and `down`, run again, which are LoRA's products
    assert work.factor_values - again == sum(moved)
