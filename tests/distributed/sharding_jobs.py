"""What each of two processes does for the tests of sharding and of checkpoints: all of it once, in one go."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jobs
import torch
from torch.distributed.tensor import DTensor

from stoker.adapters.fused_block import FusedBlock, fuse_blocks
from stoker.adapters.lora import Awaited, add_lora
from stoker.arch import families
from stoker.checkpoint.read import load_latest
from stoker.checkpoint.saver import Saver
from stoker.compose import predicted
from stoker.compose.trainer import widen_vectors
from stoker.distributed.ddp import DataParallel
from stoker.distributed.fsdp2 import Sharded, Sharding
from stoker.distributed.strategy import StrategyState
from stoker.kernels.adamw import AdamWStep, adamw_
from stoker.models import native
from stoker.models.streamed import StreamedDecoder
from stoker.optim.stochastic import StochasticAdamW
from stoker.tasks.supervised import SupervisedTask

STEPS = 3
SPEC = families.read({**jobs.CASES["full"].config.to_dict(), "architectures": None}, "config.json")
CHECKPOINTED = {"ddp": ("full", "nf4"), "fsdp2": ("full", "nf4", "8-bit", "adafactor")}
NARROW = ("full", "tied", "mixture", "mamba")
BF16 = ("full", "tied", "opt", "head with a bias")
KINDS = ("none", "nf4", "int8")
SETTINGS = {
    "kept": Sharding(reshard_after_forward=False),
    "offload": Sharding(cpu_offload=True),
    "gathered in bf16": Sharding(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
}


def save(folder):
    native.save(
        native.build(SPEC, seed=0, initializer_range=0.1), SPEC, folder, config=jobs.CASES["full"].config.to_dict()
    )


def lora(model, awaited=None):
    """Adapters with a B that is not zero, and layers through the layer kernel."""
    add_lora(model, rank=4, alpha=8, awaited=awaited)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.fill_(0.05)
    fuse_blocks(model, keep="mixer", implementation="reference")
    return model


def streamed(ranks, folder, kind):
    """Trains adapters on a base of which this rank reads its part alone; returns what it held, in bytes, as well."""
    loaded = StreamedDecoder(
        folder, SPEC, quantization=kind, rank=ranks.rank, world_size=ranks.world_size, gather=ranks.gather
    )
    model = lora(loaded.decoder, Awaited("cpu", loaded.weight_of))
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), fill=loaded.fill)
    result = jobs.train("lora", "fsdp2", model=model, strategy=strategy, steps=STEPS)
    held = [
        (parameter.to_local().nbytes, parameter.numel() * parameter.element_size())
        for parameter in model.parameters()
        if isinstance(parameter, DTensor)
    ]
    fused = all(isinstance(block, FusedBlock) for block in model.blocks)
    return result["losses"], [sum(column) for column in zip(*held, strict=True)], fused


def streamed_whole(ranks, folder):
    """Trains every weight, products in bf16, of a model of which this rank reads its part alone."""
    loaded = StreamedDecoder(folder, SPEC, rank=ranks.rank, world_size=ranks.world_size, gather=ranks.gather)
    model = loaded.decoder
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), precision="bf16", fill=loaded.fill)
    return jobs.train("full", "fsdp2", model=model, strategy=strategy, steps=STEPS)["losses"]


def with_settings(ranks, sharding):
    model = jobs.build(jobs.CASES["full"])
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), sharding=sharding)
    result = jobs.train("full", "fsdp2", model=model, strategy=strategy, steps=STEPS)
    return result["losses"], result["norms"]


def measured_weights(ranks):
    """Bytes of weights that a run which ends with an evaluation reports, and those of all of them."""
    model = jobs.build(jobs.CASES["full"])
    tensors = {one.data_ptr(): one.nbytes for one in (*model.parameters(), *model.buffers())}
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), sharding=SETTINGS["kept"])
    jobs.train("full", "fsdp2", model=model, strategy=strategy, steps=1)
    strategy.evaluate(next(iter(jobs.loader(jobs.CASES["full"], strategy).all())))
    plan = SimpleNamespace(device="cpu", num_processes=2, memory=SimpleNamespace(weights=0, total=0))
    found = predicted.memory(plan, model, SimpleNamespace(strategy=strategy))
    return found["weights"]["measured"], sum(tensors.values())


def in_bf16(name, strategy_of):
    """Two steps of fp32 weights whose products are bf16, with their gradients, and each weight's dtype in a layer."""
    model = jobs.build(jobs.CASES[name])
    if name == "full":  # through the layer kernel, which runs again what it drops
        fuse_blocks(model, keep="input", implementation="reference")
    strategy = strategy_of(model)
    strategy.prepare(SupervisedTask(model), jobs.adamw)
    used = {}
    model.blocks[0].register_forward_pre_hook(
        lambda module, _: used.update({key: one.dtype for key, one in model.named_parameters()})
    )
    steps, batches = [], jobs.loader(jobs.CASES[name], strategy)
    for index in range(2):
        rows = list(batches.step(index))
        (count,) = strategy.sum_over_ranks([float(sum(one.num_trained_tokens for one in rows))])
        last = len(rows) - 1
        results = [
            strategy.forward_backward(one, divisor=count, is_last=number == last) for number, one in enumerate(rows)
        ]
        strategy.reduce_gradients()
        (loss,) = strategy.sum_over_ranks([sum(float(one.loss_sum) for one in results) / count])
        steps.append((loss, {key: whole(one.grad) for key, one in model.named_parameters()}))
        strategy.step(1e-2, max_gradient_norm=1.0)
    return steps, used, {key: one.dtype for key, one in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def loaded_between_evaluations(strategy_of):
    """The loss of one batch before and after other weights are loaded."""
    model = jobs.build(jobs.CASES["full"])
    strategy = strategy_of(model)
    strategy.prepare(SupervisedTask(model), jobs.adamw)
    others = SupervisedTask(jobs.build(jobs.CASES["full"])).named_parameters()
    batch = next(iter(jobs.loader(jobs.CASES["full"], strategy).all()))
    before = float(strategy.evaluate(batch).loss_sum)
    strategy.load_weights({name: 1.5 * parameter.detach() for name, parameter in others})
    return before, float(strategy.evaluate(batch).loss_sum)


def narrow(strategy_of, name="full", model=None):
    """Trains every weight in bf16, vectors in fp32; returns the losses and each rank's own weights as bytes.

    `model`: of the case's shape, trained as far as it requires gradients.
    """
    if name == "head with a bias":
        model, name = native.build(replace(SPEC, head_bias=True), seed=0, initializer_range=0.1), "full"
    model = model or jobs.build(jobs.CASES[name])
    widen_vectors(model.to(torch.bfloat16))
    strategy = strategy_of(model)

    def update(weight, grad, average, square, *, number, betas, **values):
        numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
        adamw_(weight, grad, average, square, numbers, seed=1, number=number + (strategy.part << 20))

    def optimizer(named):
        group = {"params": [parameter for _, parameter in named]}
        return StochasticAdamW([group], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, update=update)

    result = jobs.train(name, "", model=model, strategy=strategy, optimizer=optimizer, precision="bf16", steps=STEPS)
    held = [one.to_local() if isinstance(one, DTensor) else one for one in model.parameters()]
    return result["losses"], [one.detach().float().sum().item() for one in held]


def overflow(ranks):
    """One rank's gradients overflow; returns each rank's word on the step and its loss scale before and after."""
    model = jobs.build(jobs.CASES["full"])
    strategy = Sharded(ranks, "cpu", model=model, layers=list(model.blocks), precision="fp16")
    strategy.prepare(SupervisedTask(model), jobs.adamw)
    before = strategy._scaler.get_scale()
    (batch, *_) = jobs.loader(jobs.CASES["full"], strategy).step(0)
    strategy.forward_backward(batch, divisor=10.0, is_last=True)
    weight = model.blocks[0].attention.out.weight
    if ranks.rank == 1:
        weight.grad.to_local()[0, 0] = float("inf")
    result = strategy.step(1e-2, max_gradient_norm=1.0)
    return ranks.gather((result.skipped, before, result.loss_scale))


def everything(ranks, folder, checkpoints):
    found = {kind: streamed(ranks, folder, kind) for kind in KINDS}
    found["streamed whole"] = streamed_whole(ranks, folder)
    found |= {name: with_settings(ranks, sharding) for name, sharding in SETTINGS.items()}
    found["measured weights"] = measured_weights(ranks)
    found["overflow"] = overflow(ranks)
    found["loaded"] = loaded_between_evaluations(
        lambda model: Sharded(ranks, "cpu", model=model, layers=list(model.blocks))
    )
    losses, sums = narrow(lambda model: DataParallel(ranks, "cpu", precision="bf16"))
    found["bf16 ddp"] = losses, ranks.gather(sums)
    found["products in bf16"] = {
        name: in_bf16(
            name, lambda model: Sharded(ranks, "cpu", model=model, layers=list(model.blocks), precision="bf16")
        )
        for name in NARROW
    }
    found["bf16"] = {
        name: narrow(
            lambda model: Sharded(ranks, "cpu", model=model, layers=list(model.blocks), precision="bf16"), name
        )
        for name in BF16
    }
    found["checkpoints"] = {
        kind: all_of(ranks, kind, names, f"{checkpoints}/{kind}") for kind, names in CHECKPOINTED.items()
    }
    found["read back"] = [
        one for name in CHECKPOINTED["fsdp2"] for one in read_back(ranks, name, f"{checkpoints}/fsdp2/{name}")
    ]
    return found


def read_back(ranks, name, folder):
    """Returns what of the last checkpoint is not the same, bit for bit, once ranks have it in parts and are asked."""
    loaded = load_latest(Path(folder))
    stored = StrategyState(loaded.tensors["weights"], loaded.tensors["optimizer"], loaded.values["strategy"])
    model = jobs.build(jobs.CASES[name])
    strategy = jobs.make_strategy("fsdp2", ranks, model)
    strategy.prepare(SupervisedTask(model), jobs.optimizer_of(jobs.CASES[name].optimizer))
    strategy.load_state(stored)
    state = strategy.state()
    pairs = [(state.weights, stored.weights), (state.optimizer, stored.optimizer)]
    differ = [f"{name}: {key}" for ours, theirs in pairs for key in theirs if not torch.equal(ours[key], theirs[key])]
    return differ if ranks.rank == 0 else []


def go_on(ranks, kind, name, folder, steps=STEPS):
    """Takes `steps` steps from the last checkpoint of `folder`, if there is one, and saves; returns the losses."""
    folder, made = Path(folder), []
    loaded = load_latest(folder)
    state, start = None, 0
    if loaded is not None:
        state, start = (
            StrategyState(loaded.tensors["weights"], loaded.tensors["optimizer"], loaded.values["strategy"]),
            loaded.step,
        )
    model = jobs.build(jobs.CASES[name])
    made = jobs.make_strategy(kind, ranks, model)
    result = jobs.train(name, kind, model=model, strategy=made, steps=steps, start=start, state=state)
    options = {"rank": made.rank, "world_size": made.world_size, "gather": made.gather_over_ranks}
    saver = Saver(folder, **options, background=True)
    state = made.shared_state()
    saver.begin(
        start + steps,
        tensors={"weights": state.weights, "optimizer": state.optimizer},
        values={"strategy": state.values},
    )
    saved = saver.commit()
    return result["losses"], saved.num_bytes, [path.name for path in saved.path.iterdir()]


def all_of(ranks, kind, names, folder, steps=STEPS):
    return {name: go_on(ranks, kind, name, f"{folder}/{name}", steps) for name in names}
