"""Micro-batches replayed as CUDA graphs train as they do launch by launch. Needs a GPU."""

import pytest
import torch

from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.data.batch import Batch
from stoker.distributed.single import SingleDevice
from stoker.kernels.adamw import AdamWStep, adamw_
from stoker.models import native
from stoker.optim import optimizers
from stoker.tasks.supervised import SupervisedTask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def listed(named):
    return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3)


def flat(named):
    """As a run steps adapters beside graphs: all at once, by our own kernel."""

    def update(weight, grad, average, square, *, number, betas, **values):
        numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
        adamw_(weight, grad, average, square, numbers, seed=0, number=number, implementation="triton")

    return optimizers.build(
        named, kind="adamw", learning_rate=1e-3, weight_decay=1e-2, decay_all=True, flat=True, flat_update=update
    )


def strategy(precision, *, graphs, adapter, seed=3, optimizer=listed):
    model = native.build(read(CONFIG, "config.json"), device="cuda", seed=seed, kernels="triton")
    if adapter:
        add_lora(model, rank=4, alpha=8)
    fuse_blocks(model, implementation="triton")
    result = SingleDevice("cuda", precision=precision, cuda_graphs=graphs)
    result.prepare(SupervisedTask(model, kernels="triton"), optimizer)
    return result


def op_by_op(config, *, graphs, keep_attention=False, keeps_all=False, optimizer=listed):
    """A model whose layers run op by op in bf16: recomputed, or with all that Mamba-1 keeps."""
    sizes = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2}
    model = native.build(read(sizes | config, "config.json"), device="cuda", seed=3, kernels="triton")
    add_lora(model, rank=4, alpha=8)
    for block in model.blocks:
        block.recompute, block.keep_attention = not keeps_all, keep_attention
        if keeps_all:
            block.mixing.keeps_all = True
    result = SingleDevice("cuda", precision="bf16", cuda_graphs=graphs)
    result.prepare(SupervisedTask(model, kernels="triton"), optimizer)
    return result


MIXTURE = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GEMMA = {  # through FlexAttention
    "model_type": "gemma2",
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 48,
}
MAMBA = {"model_type": "mamba", "intermediate_size": 256}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (MIXTURE, {}),
        (MIXTURE, {"keep_attention": True}),
        (GEMMA, {}),
        (MAMBA, {}),
        (MAMBA, {"keeps_all": True}),
        ({"model_type": "mamba2", "num_heads": 4, "head_dim": 64, "n_groups": 1}, {}),
    ],
)
def test_layers_that_run_op_by_op_can_be_captured(config, options):
    eager = op_by_op(config, graphs=False, **options)
    replayed = op_by_op(config, graphs=True, optimizer=flat, **options)
    expected, actual = train(eager), train(replayed)
    assert replayed._graphs.num_captured == 2
    # bf16; and of a mixture a few tokens change experts by a hair.
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=1e-3)


def batch(number, width):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 300, (2, width), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[0, : width // (2 + number % 3)] = -100  # how many are trained differs from batch to batch
    return Batch(ids, targets, None, ids.numel(), int((targets != -100).sum()))


def train(run, steps=8):
    losses = []
    for number in range(steps):
        batches = [batch(10 * number + part, width) for part, width in enumerate((64, 70, 128, 64))]
        divisor = sum(b.num_trained_tokens for b in batches)
        results = [run.forward_backward(b, divisor=divisor, is_last=b is batches[-1]) for b in batches]
        loss = sum(r.loss_sum.item() for r in results) / divisor
        step = run.step(1e-3, max_gradient_norm=1.0)
        losses.append((loss, step.gradient_norm))
    return losses


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_and_gradient_norms_are_those_of_eager_steps(precision, adapter):
    eager, replayed = (strategy(precision, graphs=graphs, adapter=adapter) for graphs in (False, True))
    expected, actual = train(eager), train(replayed)
    assert replayed._graphs.num_captured == 2  # widths 64 and 128; 70 is rounded up
    torch.testing.assert_close(actual, expected, rtol=1e-4 if precision == "fp32" else 2e-2, atol=1e-4)
    for name, weight in eager.state().weights.items():
        torch.testing.assert_close(replayed.state().weights[name], weight, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_in_one_tensor_is_that_of_the_list(precision):
    one = strategy(precision, graphs=False, adapter=True)
    other = strategy(precision, graphs=True, adapter=True, optimizer=flat)
    for group in one._optimizer.param_groups:
        group["weight_decay"] = 1e-2
    expected, actual = train(one), train(other)
    assert other._graphs.num_captured == 2
    torch.testing.assert_close(actual, expected, rtol=1e-4 if precision == "fp32" else 2e-2, atol=1e-4)
    held = other._graphs._captured.values()
    assert len({captured.gradient.data_ptr() for captured in held}) == 1  # one buffer for all shapes
    assert all(parameter.grad is None for parameter in other._trained.values())
    for name, weight in one.state().weights.items():
        torch.testing.assert_close(other.state().weights[name], weight, rtol=0.05, atol=5e-3)


def test_after_gradients_are_discarded_shapes_are_captured_anew():
    run = strategy("bf16", graphs=True, adapter=True)
    train(run, steps=3)
    run.discard_gradients()
    assert run._graphs.num_captured == 0
    before = train(run, steps=3)
    assert run._graphs.num_captured == 2
    assert all(loss == loss for loss, _ in before)


@pytest.mark.parametrize("optimizer", [listed, flat])
def test_what_cannot_be_captured_runs_as_always_and_says_so_once(optimizer):
    class Waits(SupervisedTask):
        """Waits for the device, which a capture forbids."""

        def forward(self, batch):
            result = super().forward(batch)
            result.loss_sum.item()
            return result

    def make(graphs):
        model = native.build(read(CONFIG, "config.json"), device="cuda", seed=3, kernels="triton")
        add_lora(model, rank=4, alpha=8)
        fuse_blocks(model, implementation="triton")
        result = SingleDevice("cuda", precision="bf16", cuda_graphs=graphs)
        result.prepare(Waits(model, kernels="triton"), optimizer)
        return result

    run = make("auto")
    expected, actual = train(make(False)), train(run)
    assert run._graphs.num_captured == 0
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)
    assert run._graphs.refused
    with pytest.raises(RuntimeError):
        train(make(True))


def test_packed_rows_run_as_always_beside_graphs():
    run = strategy("bf16", graphs=True, adapter=True)
    train(run, steps=2)
    packed = batch(1, 64)
    packed = Batch(packed.input_ids, packed.targets, ((30, 34), (64,)), 128, packed.num_trained_tokens)
    result = run.forward_backward(packed, divisor=packed.num_trained_tokens, is_last=True)
    assert result.loss_sum.isfinite()
    assert run.step(1e-3, max_gradient_norm=None).gradient_norm > 0
