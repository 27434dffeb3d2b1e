"""Micro-batches replayed as CUDA graphs train as they do launch by launch. Needs a GPU."""

import gc

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
    assert captured_rows(replayed) == {(2, 64), (2, 128)}
    # bf16; and of a mixture a few tokens change experts by a hair.
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=1e-3)


def batch(number, width):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 300, (2, width), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[0, : width // (3 + number % 3)] = -100  # how many are trained differs from batch to batch
    return Batch(ids, targets, None, ids.numel(), int((targets != -100).sum()))


def captured_rows(run):
    """(rows, length) of what is captured, whatever room there is for trained positions."""
    return {shape[:2] for shape in run._graphs._captured}


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
    assert captured_rows(replayed) == {(2, 64), (2, 128)}  # widths 64 and 128; 70 is rounded up
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
    assert captured_rows(other) == {(2, 64), (2, 128)}
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
    assert captured_rows(run) == {(2, 64), (2, 128)}
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


@pytest.mark.parametrize("optimizer", [listed, flat])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_which_little_is_trained_run_less_through_the_head(precision, optimizer):
    def sparse(number):
        whole = batch(number, 128)
        whole.targets[:, : 80 + 4 * (number % 3)] = -100
        return Batch(whole.input_ids, whole.targets, None, 256, int((whole.targets != -100).sum()))

    eager = strategy(precision, graphs=False, adapter=True)
    replayed = strategy(precision, graphs=True, adapter=True, optimizer=optimizer)
    for run in (eager, replayed):
        for group in run._optimizer.param_groups:
            group["weight_decay"] = 1e-2
    for number in range(10):
        one = batch(number, 128) if number % 4 == 3 else sparse(number)
        losses = []
        for run in (eager, replayed):
            result = run.forward_backward(one, divisor=one.num_trained_tokens, is_last=True)
            norm = run.step(1e-3, max_gradient_norm=1.0).gradient_norm
            losses.append((result.loss_sum.item() / one.num_trained_tokens, norm))
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4 if precision == "fp32" else 2e-2, atol=1e-4)
    # 256 positions, of which 78 to 94 are trained in most: the first graph has room for all, the second for 96.
    assert {shape.trained for shape in replayed._graphs._captured} == {256, 96}


def packed_batch(number, rows=2, width=192):
    """Rows of documents whose number and lengths differ from batch to batch: 2 to 26 in two rows of 192."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 300, (rows, width), generator=generator)
    targets = ids.roll(-1, 1)
    documents = []
    for row in range(rows):
        count = (1, 3, 13, 2, 6)[(number + row) % 5]
        cuts = torch.randperm(width - 1, generator=generator)[: count - 1].sort().values + 1
        ends = [*cuts.tolist(), width]
        targets[row, torch.tensor(ends) - 1] = -100
        documents.append(tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False)))
    targets[0, : width // (3 + number % 3)] = -100
    return Batch(ids, targets, tuple(documents), ids.numel(), int((targets != -100).sum()))


def train_packed(run, steps=8):
    losses = []
    for number in range(steps):
        batches = [packed_batch(10 * number + part) for part in range(3)]
        divisor = sum(b.num_trained_tokens for b in batches)
        results = [run.forward_backward(b, divisor=divisor, is_last=b is batches[-1]) for b in batches]
        loss = sum(r.loss_sum.item() for r in results) / divisor
        losses.append((loss, run.step(1e-3, max_gradient_norm=1.0).gradient_norm))
    return losses


@pytest.mark.parametrize("optimizer", [listed, flat])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_packed_rows_of_any_documents_train_as_in_eager_steps(precision, optimizer):
    eager = strategy(precision, graphs=False, adapter=True)
    replayed = strategy(precision, graphs=True, adapter=True, optimizer=optimizer)
    for group in eager._optimizer.param_groups:
        group["weight_decay"] = 1e-2
    for group in replayed._optimizer.param_groups:
        group["weight_decay"] = 1e-2
    expected, actual = train_packed(eager), train_packed(replayed)
    assert 1 < replayed._graphs.num_captured <= 8  # of 24 micro-batches, hardly two of which have the same documents
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)
    for name, weight in eager.state().weights.items():
        torch.testing.assert_close(replayed.state().weights[name], weight, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("adapter", [True, False])
def test_gradients_of_packed_rows_are_those_of_eager_steps(adapter):
    """Each micro-batch by itself: nothing of the one before is left in a replay."""
    eager, replayed = (strategy("bf16", graphs=graphs, adapter=adapter) for graphs in (False, True))
    for number in range(16):
        one = packed_batch(number)
        found = []
        for run in (eager, replayed):
            run.forward_backward(one, divisor=one.num_trained_tokens, is_last=True)
            found.append({name: weight.grad.float().clone() for name, weight in run._trained.items()})
            for weight in run._trained.values():
                weight.grad.zero_()
        for name, gradient in found[0].items():
            error = (found[1][name] - gradient).norm()
            # bf16; flash attention's backward adds up in no fixed order, and rows of one document take cuDNN's in eager
            # steps. Documents mixed up would be an error of the gradient's own size.
            assert error <= 0.05 * gradient.norm() + 1e-6, (number, name)
    assert replayed._graphs.num_captured > 1


WINDOWS = CONFIG | {"model_type": "mistral", "sliding_window": 40}
MAMBA2 = {"model_type": "mamba2", "num_heads": 4, "head_dim": 64, "n_groups": 1}


@pytest.mark.parametrize("config", [WINDOWS, MIXTURE, GEMMA, MAMBA, MAMBA2])
def test_packed_rows_of_layers_that_run_op_by_op_can_be_captured(config):
    eager, replayed = op_by_op(config, graphs=False), op_by_op(config, graphs=True, optimizer=flat)
    expected, actual = train_packed(eager, steps=5), train_packed(replayed, steps=5)
    assert replayed._graphs.num_captured > 1
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=1e-3)


def test_packed_and_other_rows_are_replayed_side_by_side_and_captured_ahead():
    eager, replayed = (strategy("bf16", graphs=graphs, adapter=True) for graphs in (False, True))
    for run in (eager, replayed):
        train_packed(run, steps=1)
        train(run, steps=2)
    ahead = [packed_batch(10 * number + part) for number in range(4) for part in range(3)]
    assert replayed.capture(ahead) > 0
    captured = replayed._graphs.num_captured
    assert captured_rows(replayed) == {(2, 64), (2, 128), (2, 192)}
    torch.testing.assert_close(train_packed(replayed, 4), train_packed(eager, 4), rtol=2e-2, atol=1e-4)
    assert replayed._graphs.num_captured == captured


def test_packed_rows_in_fp32_which_run_document_by_document_are_not_captured():
    eager, run = (strategy("fp32", graphs=graphs, adapter=True) for graphs in (False, "auto"))
    torch.testing.assert_close(train_packed(run, 3), train_packed(eager, 3), rtol=1e-4, atol=1e-4)
    assert run._graphs.num_captured == 0
    assert run._graphs.refused


def test_longer_rows_leave_the_rotation_of_captured_ones_as_it_was():
    """Tables of angles grow with the rows; a graph goes on reading those that it was captured with."""
    eager, run = (strategy("bf16", graphs=graphs, adapter=True) for graphs in (False, True))
    losses = []
    for one in (eager, run):
        for _ in range(4):
            one.forward_backward(batch(1, 64), divisor=1.0, is_last=True)
        for width in (320, 512):
            one.forward_backward(batch(2, width), divisor=1.0, is_last=True)
        if one is run:  # what was let go of is written over
            with torch.cuda.stream(run._graphs._stream):
                _written = [torch.full((64, 16), 7.0, device="cuda") for _ in range(2000)]
            torch.cuda.synchronize()
        losses.append(one.forward_backward(batch(1, 64), divisor=1.0, is_last=True).loss_sum.item())
    assert run._graphs.num_captured == 1
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_graphs_of_an_earlier_run_do_not_end_while_others_are_captured():
    earlier = op_by_op(MIXTURE, graphs=True, optimizer=flat)
    train(earlier, steps=3)
    assert earlier._graphs.num_captured
    earlier.itself = earlier  # only the collector lets go of it
    replayed = op_by_op(MIXTURE, graphs=True, optimizer=flat)
    gc.disable()
    del earlier
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    gc.enable()
    try:
        train(replayed, steps=3)
    finally:
        gc.set_threshold(*thresholds)
    assert replayed._graphs.num_captured == 2
