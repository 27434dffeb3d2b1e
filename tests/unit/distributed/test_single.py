import pytest
import torch

from stoker.distributed.single import SingleDevice
from stoker.distributed.strategy import StrategyState
from stoker.errors import CheckpointError
from stoker.optim import optimizers


def gradients(task):
    return {name: parameter.grad.clone() for name, parameter in task.named_parameters() if parameter.grad is not None}


def take_steps(strategy, batch, count):
    for _ in range(count):
        strategy.forward_backward(batch, divisor=32, is_last=True)
        strategy.step(1e-2, max_gradient_norm=1.0)


def test_gradients_are_of_the_divided_loss_and_add_up(toy_strategy, toy_batch):
    strategy, task = toy_strategy()
    whole = toy_batch(8)
    strategy.forward_backward(whole, divisor=64.0, is_last=True)
    expected = torch.autograd.grad(task(whole).loss_sum / 64.0, [task.hidden.weight])[0]
    torch.testing.assert_close(task.hidden.weight.grad, expected)
    strategy.forward_backward(whole, divisor=64.0, is_last=True)
    torch.testing.assert_close(task.hidden.weight.grad, 2 * expected)


def test_forward_backward_returns_the_undivided_loss_detached(toy_strategy, toy_batch):
    strategy, task = toy_strategy()
    result = strategy.forward_backward(toy_batch(4), divisor=32.0, is_last=True)
    assert result.loss_sum.item() == pytest.approx(task(toy_batch(4)).loss_sum.item())
    assert not result.loss_sum.requires_grad
    assert set(result.metrics) == {"largest"}


def test_step_clips_at_the_norm_it_reports_before_clipping(toy_strategy, toy_batch):
    strategy, task = toy_strategy("sgd")
    before = task.hidden.weight.detach().clone()
    strategy.forward_backward(toy_batch(8), divisor=1.0, is_last=True)
    found = gradients(task)
    norm = torch.cat([gradient.flatten() for gradient in found.values()]).norm().item()
    result = strategy.step(0.5, max_gradient_norm=0.1)
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    torch.testing.assert_close(
        before - task.hidden.weight.detach(), 0.5 * 0.1 / norm * found["hidden.weight"], atol=1e-7, rtol=1e-3
    )
    assert task.hidden.weight.grad is None


def test_step_without_a_limit_does_not_clip(toy_strategy, toy_batch):
    strategy, task = toy_strategy("sgd")
    before = task.hidden.weight.detach().clone()
    strategy.forward_backward(toy_batch(8), divisor=1.0, is_last=True)
    gradient = gradients(task)["hidden.weight"]
    strategy.step(1e-3, max_gradient_norm=None)
    torch.testing.assert_close(task.hidden.weight.detach(), before - 1e-3 * gradient)


def test_a_gradient_that_is_not_finite_leaves_weights_and_optimiser_alone(toy_strategy, toy_batch):
    strategy, task = toy_strategy()
    take_steps(strategy, toy_batch(4), 1)
    before = strategy.state()
    weights = {name: tensor.clone() for name, tensor in before.weights.items()}
    moments = {name: tensor.clone() for name, tensor in before.optimizer.items()}
    strategy.forward_backward(toy_batch(4), divisor=32, is_last=True)
    task.hidden.weight.grad[0, 0] = float("nan")
    result = strategy.step(1e-2, max_gradient_norm=1.0)
    assert result.skipped
    assert result.loss_scale is None
    after = strategy.state()
    assert all(torch.equal(after.weights[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(after.optimizer[name], tensor) for name, tensor in moments.items())


def test_evaluate_draws_no_dropout_keeps_no_gradient_and_returns_to_training(toy_strategy, toy_batch):
    strategy, task = toy_strategy(dropout=0.5)
    batch = toy_batch(4)
    strategy.forward_backward(batch, divisor=1, is_last=True)
    strategy.discard_gradients()
    losses = {strategy.evaluate(batch).loss_sum.item() for _ in range(3)}
    assert len(losses) == 1
    assert not strategy.evaluate(batch).loss_sum.requires_grad
    assert gradients(task) == {}
    assert task.training


def test_evaluation_does_not_move_the_random_state(toy_strategy, toy_batch):
    strategy, _ = toy_strategy(dropout=0.5)
    before = torch.get_rng_state()
    strategy.evaluate(toy_batch(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_discard_gradients_forgets_a_half_done_step(toy_strategy, toy_batch):
    strategy, task = toy_strategy()
    strategy.forward_backward(toy_batch(4), divisor=1, is_last=False)
    strategy.discard_gradients()
    assert gradients(task) == {}


def test_prepared_without_an_optimiser_it_evaluates_and_cannot_step(toy_strategy, toy_batch):
    with_optimizer, task = toy_strategy()
    strategy = SingleDevice()
    strategy.prepare(task)
    batch = toy_batch(4)
    assert strategy.evaluate(batch).loss_sum == with_optimizer.evaluate(batch).loss_sum
    with pytest.raises(RuntimeError, match="evaluation only"):
        strategy.step(1e-2, max_gradient_norm=None)


class TestPrecision:
    def test_bf16_runs_matmuls_in_bf16_over_fp32_weights(self, toy_strategy, toy_batch):
        strategy, task = toy_strategy(precision="bf16")
        seen = []
        task.hidden.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        take_steps(strategy, toy_batch(4), 1)
        strategy.evaluate(toy_batch(4))
        assert seen == [torch.bfloat16, torch.bfloat16]
        assert task.hidden.weight.dtype == torch.float32

    def test_fp16_unscales_before_clipping_and_stepping(self, toy_strategy, toy_batch):
        strategy, task = toy_strategy("sgd", precision="fp16")
        reference, reference_task = toy_strategy("sgd", precision="fp32")
        for each in (strategy, reference):
            each.forward_backward(toy_batch(4), divisor=512, is_last=True)
        ours, expected = (each.step(1e-2, max_gradient_norm=0.01) for each in (strategy, reference))
        # fp16 keeps 11 bits: relative 5e-4 a product, sums of 64 of them.
        assert ours.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-2)
        torch.testing.assert_close(task.hidden.weight, reference_task.hidden.weight, atol=1e-5, rtol=0)
        assert ours.loss_scale == 65536.0

    def test_fp16_overflow_skips_the_step_and_halves_the_scale(self, toy_strategy, toy_batch):
        strategy, task = toy_strategy(precision="fp16")
        before = task.hidden.weight.detach().clone()
        strategy.forward_backward(toy_batch(64), divisor=1e-3, is_last=True)
        result = strategy.step(1e-2, max_gradient_norm=1.0)
        assert result.skipped
        assert result.loss_scale == 32768.0
        assert torch.equal(task.hidden.weight, before)
        assert strategy.state().optimizer == {}

    def test_unknown_precision_is_refused(self, toy_strategy):
        with pytest.raises(ValueError, match="unknown precision 'fp8'"):
            toy_strategy(precision="fp8")


class TestState:
    @pytest.mark.parametrize("kind", optimizers.KINDS)
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_loading_into_a_fresh_strategy_goes_on_bit_for_bit(self, toy_strategy, toy_batch, kind, precision):
        strategy, task = toy_strategy(kind, precision=precision)
        take_steps(strategy, toy_batch(4), 2)
        fresh, fresh_task = toy_strategy(kind, precision=precision, seed=1)
        fresh_task.frozen.load_state_dict(task.frozen.state_dict())
        fresh.load_state(strategy.state())
        for each in (strategy, fresh):
            take_steps(each, toy_batch(4, seed=3), 2)
        for ours, theirs in zip(task.parameters(), fresh_task.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_only_trained_weights_are_in_it(self, toy_strategy):
        strategy, _ = toy_strategy()
        assert set(strategy.state().weights) == {"hidden.weight", "hidden.bias", "out.weight"}

    def test_loss_scale_comes_back(self, toy_strategy, toy_batch):
        strategy, _ = toy_strategy(precision="fp16")
        strategy.forward_backward(toy_batch(64), divisor=1e-3, is_last=True)
        strategy.step(1e-2, max_gradient_norm=None)
        fresh, _ = toy_strategy(precision="fp16")
        fresh.load_state(strategy.state())
        assert fresh.state().values["loss_scale"]["scale"] == 32768.0

    def test_weights_of_another_model_are_refused_by_name(self, toy_strategy):
        strategy, _ = toy_strategy()
        state = strategy.state()
        weights = {"hidden.weight": torch.zeros(3, 3), "hidden.bias": torch.zeros(64), "extra": torch.zeros(1)}
        with pytest.raises(CheckpointError, match=r"missing.*out\.weight.*extra.*shape.*hidden\.weight"):
            strategy.load_state(StrategyState(weights, state.optimizer, state.values))

    def test_another_optimiser_is_refused(self, toy_strategy):
        adamw, _ = toy_strategy("adamw")
        sgd, _ = toy_strategy("sgd")
        with pytest.raises(CheckpointError, match="state of AdamW, but this run's optimiser is SGD"):
            sgd.load_state(adamw.state())

    def test_loading_weights_alone_leaves_the_optimiser(self, toy_strategy, toy_batch):
        strategy, task = toy_strategy()
        first = {name: tensor.clone() for name, tensor in strategy.state().weights.items()}
        take_steps(strategy, toy_batch(4), 2)
        strategy.load_weights(first)
        assert torch.equal(task.hidden.weight, first["hidden.weight"])
        assert strategy.state().optimizer["step:hidden.weight"] == 2


def test_peak_memory_is_this_process_in_bytes(toy_strategy):
    strategy, _ = toy_strategy()
    # A Python process with torch loaded takes more than 50 MiB and, in these tests, less than 16 GiB.
    assert 50 * 2**20 < strategy.peak_memory_bytes() < 16 * 2**30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("kind", optimizers.KINDS)
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_loading_into_a_fresh_strategy_goes_on_bit_for_bit(self, toy_strategy, toy_batch, kind, precision):
        strategy, task = toy_strategy(kind, precision=precision, device="cuda")
        take_steps(strategy, toy_batch(4), 2)
        state = strategy.state()
        # As a checkpoint would: by way of the CPU.
        state = StrategyState(
            {name: tensor.cpu() for name, tensor in state.weights.items()},
            {name: tensor.cpu() for name, tensor in state.optimizer.items()},
            state.values,
        )
        fresh, fresh_task = toy_strategy(kind, precision=precision, device="cuda", seed=1)
        fresh_task.frozen.load_state_dict(task.frozen.state_dict())
        fresh.load_state(state)
        for each in (strategy, fresh):
            take_steps(each, toy_batch(4, seed=3), 2)
        for ours, theirs in zip(task.parameters(), fresh_task.parameters(), strict=True):
            assert ours.device.type == "cuda"
            assert torch.equal(ours, theirs)

    def test_peak_memory_is_the_devices(self, toy_strategy, toy_batch):
        strategy, _ = toy_strategy(device="cuda")
        take_steps(strategy, toy_batch(4), 1)
        before = strategy.peak_memory_bytes()
        block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        assert strategy.peak_memory_bytes() >= 2**28
        assert strategy.peak_memory_bytes() > before
        del block


def test_a_step_that_is_broken_off_lets_go_of_what_else_is_held():
    calls = []
    strategy = SingleDevice(on_discard=[lambda: calls.append("let go")])
    strategy.prepare(torch.nn.Linear(2, 2))
    strategy.discard_gradients()
    assert calls == ["let go"]


def test_a_group_may_step_at_a_multiple_of_the_rate(toy_strategy, toy_batch):
    strategy, task = toy_strategy("sgd")
    for group in strategy._optimizer.param_groups:
        group["rate_scale"] = 0.5
    before = task.hidden.weight.detach().clone()
    strategy.forward_backward(toy_batch(4), divisor=32.0, is_last=True)
    gradient = task.hidden.weight.grad.clone()

    strategy.step(0.1, max_gradient_norm=None)

    torch.testing.assert_close(task.hidden.weight, before - 0.05 * gradient)
