"""A tiny language model with dropout, its rows, and a trainer around them; run as a script it is a run to interrupt."""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from stoker.compose.updates import eight_bit
from stoker.data.batch import Batch
from stoker.distributed.single import SingleDevice
from stoker.observe.events import StepLogged
from stoker.optim import optimizers, schedules
from stoker.tasks.supervised import SupervisedTask
from stoker.train.loop import Trainer
from stoker.train.settings import Checkpoints, Every, Settings

VOCABULARY, WIDTH, ROWS = 24, 64, 8


class ToyModel(nn.Module):
    head_bias = None
    logit_scale = 1.0
    logit_softcap = None

    def __init__(self, *, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)

    @property
    def head_weight(self):
        return self.head.weight

    def forward(self, input_ids, *, document_lengths=None):
        hidden = self.embedding(input_ids)
        return self.norm(hidden + self.dropout(torch.relu(self.hidden(hidden))))


class ToyLoader:
    """Eight rows a step; rows differ in how many of their targets are trained."""

    def __init__(self, *, micro_batch_size=ROWS, steps_per_epoch=4):
        self.micro_batch_size = micro_batch_size
        self.steps_per_epoch = steps_per_epoch

    def step(self, index):
        generator = torch.Generator().manual_seed(index % self.steps_per_epoch)
        ids = torch.randint(0, VOCABULARY, (ROWS, 7), generator=generator)
        targets = ids[:, 1:].clone()
        for row in range(ROWS):
            targets[row, : row % 5] = -100
        return [
            make_batch(ids[start : start + self.micro_batch_size, :-1], targets[start : start + self.micro_batch_size])
            for start in range(0, ROWS, self.micro_batch_size)
        ]


def make_batch(ids, targets):
    return Batch(ids, targets, None, ids.numel(), int((targets != -100).sum()))


def make_strategy(*, kind="adamw", dropout=0.0, precision="fp32", seed=0, device="cpu"):
    torch.manual_seed(seed)
    strategy = SingleDevice(device, precision=precision)
    task = SupervisedTask(ToyModel(dropout=dropout))
    strategy.prepare(task, partial(optimizers.build, kind=kind, learning_rate=1e-2, eight_bit=eight_bit("reference")))
    return strategy, task


def make_settings(total_steps=8, **options):
    return Settings(total_steps, 1e-2, schedules.cosine(total_steps, warmup_steps=2), **options)


class Recorder:
    def __init__(self):
        self.events = []

    def handle(self, event):
        self.events.append(event)

    def close(self):
        pass

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class SlowPrinter(Recorder):
    """Prints each step and lingers there, so that a signal arrives while the run is under way."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def handle(self, event):
        if isinstance(event, StepLogged):
            print(event.step, flush=True)
            time.sleep(self.seconds)


def main(folder, seconds):
    torch.set_num_threads(1)
    strategy, _ = make_strategy(dropout=0.2)
    trainer = Trainer(
        strategy,
        ToyLoader(),
        settings=make_settings(400),
        checkpoints=Checkpoints(Path(folder), Every(steps=1000)),
        observers=[SlowPrinter(float(seconds))],
    )
    result = trainer.run()
    print(result.reason, result.step, result.interrupted_by, result.checkpoint.name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
