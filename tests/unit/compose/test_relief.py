"""A run whose memory runs out with a single document goes on with layers that keep less, and learns the same."""

import pytest
import torch
from rich.console import Console

from stoker.compose import relief
from stoker.compose.data import prepare_data
from stoker.compose.hardware import probe
from stoker.compose.model import load_decoder, load_tokenizer, open_base
from stoker.compose.trainer import make_engine
from stoker.config.load import parse
from stoker.distributed.single import SingleDevice
from stoker.errors import TrainingError
from stoker.plan.choose import choose
from stoker.plan.ladder import Ladder, lower
from stoker.train.guard import MemoryGuard
from stoker.train.step import take_step


def run(tmp_path, *overrides):
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "data": {"train": [{"path": "builtin:fine-tuning", "limit": 12}], "sequence_length": 64, "packing": False},
        "train": {"learning_rate": 1e-3, "batch_size": 2, "steps": 3},
        "engine": {"micro_batch_size": 1},
        "output": {"folder": str(tmp_path)},
    }
    return parse(values, overrides)


def losses(config, said):
    base = open_base("builtin:tiny-llama")
    plan = choose(config, base.spec, probe())
    assert set(plan.keep) == {"all"}
    tokenizer = load_tokenizer(base)
    data = prepare_data(config, tokenizer, console=Console(quiet=True))
    decoder = load_decoder(base, device="cpu", dtype=torch.float32, kernels="reference")
    engine = make_engine(config, plan, decoder, data, pad_id=0)
    guard = MemoryGuard(engine.strategy, said.append, relieve=engine.relieve)
    found = []
    for number in range(1, 4):
        outcome = take_step(
            engine.strategy,
            engine.train.step(number - 1),
            number=number,
            learning_rate=1e-3,
            max_gradient_norm=1.0,
            guard=guard,
            notify=said.append,
        )
        found.append((outcome.loss, outcome.gradient_norm))
    return found


@pytest.fixture
def small_memory(monkeypatch):
    """A device that has the memory for layers that keep their input alone, from its second step on."""
    kept: list[relief.Layers] = []
    made, forward = relief.Layers.__init__, SingleDevice.forward_backward
    calls = []

    def note(self, decoder, plan):
        kept.append(self)
        made(self, decoder, plan)

    def run_out(self, batch, **options):
        calls.append(1)
        if len(calls) > 2 and set(kept[-1].plan.keep) != {"input"}:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, **options)

    monkeypatch.setattr(relief.Layers, "__init__", note)
    monkeypatch.setattr(SingleDevice, "forward_backward", run_out)


@pytest.mark.slow
def test_layers_keep_less_and_the_loss_stays_what_it_was(tmp_path, small_memory, monkeypatch):
    said: list[str] = []
    relieved = losses(run(tmp_path), said)
    assert said
    assert "keep input from here on" in said[-1]
    monkeypatch.undo()
    plain = losses(run(tmp_path), [])
    for (loss, norm), (other, other_norm) in zip(relieved, plain, strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def test_what_the_user_set_is_kept_and_the_error_says_what_to_set(tmp_path, small_memory):
    with pytest.raises(TrainingError, match=r"single document .* Set engine\.recompute: input"):
        losses(run(tmp_path, "engine.recompute=none"), [])


def test_rungs_go_down_to_what_waits_on_the_host():
    ladder = Ladder(("mixer", "all", "all"), offload=False, layers="fused")
    rungs = []
    while ladder is not None:
        rungs.append((*ladder.keep, ladder.offload))
        ladder = lower(ladder, can_offload=True)
    assert rungs == [
        ("mixer", "all", "all", False),
        ("attention", "attention", "attention", False),
        ("input", "input", "input", False),
        ("input", "input", "input", True),
    ]
    beside = Ladder(("mixer",) * 3, offload=True, layers="fused", staying=2)
    assert lower(beside, can_offload=True) == Ladder(("mixer",) * 3, offload=True, layers="fused")
    op_by_op = lower(Ladder(("all", "input"), offload=False, layers="op by op"), can_offload=True)
    assert op_by_op.keep == ("input", "input")
    assert lower(op_by_op, can_offload=True) is None
