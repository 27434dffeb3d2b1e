"""Twenty steps of tiny models under any strategy: what each process of a test runs, and what the others are held to.

The batches hold rows of very different lengths and few rows a step, so that ranks have uneven counts of trained tokens
and some steps leave a rank without any.
"""

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, MambaConfig, MixtralConfig, OPTConfig

from stoker.adapters.fused_block import freeze_into, fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.compose.updates import eight_bit
from stoker.data.loader import StepLoader
from stoker.distributed.ddp import DataParallel
from stoker.distributed.fsdp2 import Sharded
from stoker.distributed.ranks import Place, Ranks, end_process, join
from stoker.distributed.single import SingleDevice
from stoker.models import native
from stoker.models import open as models
from stoker.optim import optimizers
from stoker.quant.formats import quantize
from stoker.tasks.supervised import SupervisedTask
from stoker.train.evaluate import evaluate
from stoker.train.guard import MemoryGuard
from stoker.train.step import take_step

STEPS = 20
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **_TOKENS}
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """A model and how it is trained. `recompute`: layers are run again; `fused`: through the layer kernel.

    `borrowed`: it runs through Transformers' class.
    `grain`: what losses over twenty steps may differ by. Sums over ranks are taken in another order: some units in the
    last place of fp32. Averages in 8 bits make more of that: a value between two codes that goes to the other one turns
    an update by some percent, which at these rates is seen in the third digit behind the point. (At a learning rate of
    1e-2 one process whose weights begin 1e-7 off ends tenths away: such runs tell nothing.) Muon iterates in bf16.
    """

    config: Any
    lora: dict = field(default_factory=dict)
    quantization: str = ""
    recompute: bool = False
    fused: bool = False
    packing: bool = False
    borrowed: bool = False
    optimizer: str = "adamw"
    grain: float = 5e-6
    learning_rate: float = 1e-2


def _llama(**more):
    return LlamaConfig(**{**SIZES, **ATTENTION, **more})


def _mixture(**more):
    return MixtralConfig(**{**SIZES, **ATTENTION, "num_local_experts": 4, "output_router_logits": True, **more})


_LORA = {"rank": 4, "alpha": 8}
# Weights that are large enough for averages in 8 bits; the rows of the embedding are odd.
_WIDE = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 96}
CASES = {
    "full": Case(_llama()),
    "tied": Case(_llama(tie_word_embeddings=True), recompute=True),
    "lora": Case(_llama(), _LORA, fused=True, packing=True),
    "dora": Case(_llama(), {**_LORA, "dora": True}),
    "nf4": Case(_llama(), _LORA, "nf4", recompute=True),
    "int8": Case(_llama(), _LORA, "int8", fused=True),
    "mixture": Case(_mixture(), recompute=True),
    "mamba": Case(MambaConfig(**SIZES, state_size=8, intermediate_size=64)),
    # Its table of words is tied to the head, and narrower than the layers.
    "opt": Case(
        OPTConfig(
            **SIZES,
            ffn_dim=48,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.0,
            **_TOKENS,
        ),
        recompute=True,
        borrowed=True,
    ),
    # Its head has a bias.
    "gptj": Case(
        GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4, **_NO_DROPOUT),
        _LORA,
        "nf4",
        packing=True,
        borrowed=True,
    ),
    "8-bit": Case(_llama(**_WIDE), optimizer="adamw_8bit", grain=2e-3, learning_rate=3e-3),
    "8-bit lora": Case(
        _llama(**_WIDE), {"rank": 64, "alpha": 64}, fused=True, optimizer="adamw_8bit", grain=2e-3, learning_rate=3e-3
    ),
    "8-bit mixture": Case(_mixture(**_WIDE), optimizer="adamw_8bit", grain=2e-3, learning_rate=3e-3),
    "adafactor": Case(_llama(**_WIDE), optimizer="adafactor", grain=2e-5),
    "adafactor mixture": Case(_mixture(), optimizer="adafactor", grain=2e-5),
    "muon": Case(_llama(), optimizer="muon", grain=2e-3),
}


class Rows:
    """Forty documents of 2 to 24 tokens; one in eight trains its last token alone."""

    documents_per_example = 1
    source_starts = (0,)

    def __init__(self):
        random = np.random.default_rng(0)
        self.ids = [random.integers(5, 64, length).astype(np.uint32) for length in random.integers(2, 25, 40)]

    def __len__(self):
        return len(self.ids)

    @property
    def lengths(self):
        return np.array([len(ids) for ids in self.ids])

    @property
    def trained_counts(self):
        return np.array([self.document(index)[1].sum() for index in range(len(self))])

    def document(self, index):
        ids = self.ids[index]
        trained = np.arange(len(ids)) >= (len(ids) - 1 if index % 8 == 0 else 1)
        return ids, trained


def borrowed(case):
    """Returns a model of Transformers' class, with weights large enough for attention to be uneven."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(case.config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    stored = {id(tensor): (name, tensor) for name, tensor in reversed(theirs.state_dict(keep_vars=True).items())}
    with TemporaryDirectory() as folder:
        # Of several processes Transformers' own `save_pretrained` writes on the first alone.
        theirs.config.save_pretrained(folder)
        save_file(dict(stored.values()), f"{folder}/model.safetensors", metadata={"format": "pt"})
        spec = models.read(Path(folder), case.config.to_dict())
        model = models.load(Path(folder), spec, quantization=case.quantization or "none").train()
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, of which AdamW makes whole steps
            parameter.requires_grad_(False)
    return model


def build(case):
    if case.borrowed:
        model = borrowed(case)
    else:
        values = {**case.config.to_dict(), "architectures": None}
        model = native.build(families.read(values, "config.json"), seed=0, initializer_range=0.1)
    if case.quantization and not case.borrowed:
        model.blocks.requires_grad_(False)
        freeze_into(model.blocks, lambda weight, rows: quantize(weight, case.quantization, part_rows=rows))
    if case.lora:
        add_lora(model, **case.lora)
        with torch.no_grad():  # B is zero at first, and A's gradient with it
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    for block in model.blocks:
        block.recompute = case.recompute
    if case.fused:
        fuse_blocks(model, keep="mixer", implementation="reference")
    return model


def make_strategy(kind, ranks, model, *, precision="fp32", device="cpu"):
    if kind == "single":
        return SingleDevice(device, precision=precision)
    if kind == "ddp":
        return DataParallel(ranks, device, precision=precision)
    parts = {"precision": precision, "model": model, "layers": list(model.blocks)}
    if kind == "fsdp2":
        return Sharded(ranks, device, **parts)
    from stoker.distributed.deepspeed import Zero

    stage, _, offloads = kind.removeprefix("zero").partition("-")
    zero = {"stage": int(stage), **{name: {"device": "cpu"} for name in offloads.split("+") if name}}
    zero["stage3_param_persistence_threshold"] = 0  # or all of these small weights would stay gathered
    return Zero(ranks, device, settings={"zero_optimization": zero}, **parts)


def loader(case, strategy):
    return StepLoader(
        Rows(),
        batch_size=6,
        micro_batch_size=1,  # so that what a mixture balances over is the same on any number of ranks
        sequence_length=32,
        packing=case.packing,
        seed=3,
        rank=strategy.rank,
        world_size=strategy.world_size,
    )


def optimizer_of(kind):
    return lambda named: optimizers.build(list(named), kind=kind, learning_rate=1e-2, eight_bit=eight_bit("reference"))


adamw = optimizer_of("adamw")


def train(
    name,
    kind,
    ranks=None,
    *,
    steps=STEPS,
    start=0,
    state=None,
    device="cpu",
    precision="fp32",
    model=None,
    strategy=None,
    optimizer=None,
):
    """Returns losses, gradient norms, the loss on all rows, the gathered state and what was saved as a whole model."""
    case = CASES[name]
    model = build(case) if model is None else model
    strategy = strategy or make_strategy(kind, ranks, model, device=device, precision=precision)
    strategy.prepare(SupervisedTask(model), optimizer or optimizer_of(case.optimizer))
    if state is not None:
        strategy.load_state(state)
    batches, guard = loader(case, strategy), MemoryGuard(strategy, print)
    losses, norms = [], []
    for index in range(start, start + steps):
        done = take_step(
            strategy,
            batches.step(index),
            number=index + 1,
            learning_rate=case.learning_rate,
            max_gradient_norm=1.0,
            guard=guard,
            notify=print,
        )
        losses.append(done.loss)
        norms.append(done.gradient_norm)
    evaluation = evaluate(strategy, batches.all())
    kept = strategy.state()
    with strategy.gathered(trained_only=bool(case.lora)):
        named = ((f"model.{key}", value) for key, value in model.named_parameters())
        whole = {key: value.detach().clone() for key, value in named if key in kept.weights}
    return {"losses": losses, "norms": norms, "loss": evaluation.loss, "state": kept, "whole": whole}


@cache
def alone(name, steps=STEPS):
    """The same on one device."""
    return train(name, "single", steps=steps)


def _worker(rank, world_size, port, work, folder, arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = join(Place(rank, world_size, rank, "torchrun"), kind="cpu")
    try:
        result = work(ranks, *arguments)
        if rank == 0:
            torch.save(result, f"{folder}/result.pt")
        ranks.sum([0.0])
    finally:
        ranks.leave()
    end_process(0)


def on_ranks(world_size, folder, work, *arguments):
    """Runs `work(ranks, *arguments)` in so many gloo processes and returns what the first one's returned."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    mp.spawn(_worker, args=(world_size, port, work, str(folder), arguments), nprocs=world_size)
    return torch.load(f"{folder}/result.pt", weights_only=False)


def train_all(ranks: Ranks, names):
    """Each case under both strategies."""
    return {(kind, name): train(name, kind, ranks) for kind in ("ddp", "fsdp2") for name in names}
