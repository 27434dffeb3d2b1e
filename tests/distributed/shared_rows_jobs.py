"""Models whose rows several processes share: their gradients, losses and weights, and those of one process."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jobs import Rows, make_strategy
from transformers import DeepseekV3Config, Gemma2Config, GPT2Config, GptOssConfig, LlamaConfig, MistralConfig

from transformers import MixtralConfig, Qwen3Config  # isort: skip

from stoker.adapters.fused_block import freeze_into, fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch import families
from stoker.data.loader import StepLoader
from stoker.distributed.shared_rows import Sharing, share
from stoker.kernels.head_exchange import HeadExchange
from stoker.models import native
from stoker.nn.shared_rows import share_rows
from stoker.optim import optimizers
from stoker.quant.formats import quantize
from stoker.tasks.supervised import SupervisedTask
from stoker.train.evaluate import evaluate
from stoker.train.guard import MemoryGuard
from stoker.train.step import take_step

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
_LORA = {"rank": 4, "alpha": 8}


def _llama(kv=2, **more):
    return LlamaConfig(**_SIZES, num_attention_heads=4, num_key_value_heads=kv, **more)


@dataclass(frozen=True)
class Case:
    """`keep`: the rung of each layer in the layer kernel (empty: op by op); `recompute`: layers run again, op by op."""

    config: Any
    keep: tuple[str, ...] = ()
    recompute: bool = False
    packing: bool = False
    lora: dict = field(default_factory=dict)
    quantization: str = ""
    sequence_length: int = 26  # which 4 does not divide


CASES = {
    "grouped, rungs all and attention": Case(_llama(), keep=("all", "attention"), packing=True),
    "few kv heads, rungs mixer and input": Case(_llama(1), keep=("mixer", "input"), packing=True, lora=_LORA),
    "as many kv heads, op by op": Case(_llama(4), recompute=True),
    "windows": Case(
        MistralConfig(**_SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=5), packing=True
    ),
    "fused windows": Case(
        MistralConfig(**_SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=5),
        keep=("attention", "mixer"),
    ),
    "nf4": Case(_llama(), keep=("attention", "input"), packing=True, lora=_LORA, quantization="nf4"),
    "normed heads": Case(
        Qwen3Config(**_SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        keep=("attention", "all"),
        packing=True,
    ),
    "soft-caps": Case(
        Gemma2Config(
            **_SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
        ),
        recompute=True,
        packing=True,
    ),
    "sinks": Case(
        GptOssConfig(
            **_SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=6
        ),
        packing=True,
    ),
    "mixture": Case(
        MixtralConfig(
            **_SIZES, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
        ),
        packing=True,
    ),
    "latent": Case(
        DeepseekV3Config(
            **_SIZES,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=2,
        ),
    ),
    "learned positions": Case(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32), packing=True),
    "angles by length": Case(
        _llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=16)
    ),
}


def build(case, sharing: Sharing):
    values = {**case.config.to_dict(), "architectures": None}
    model = native.build(families.read(values, "config.json"), seed=0, initializer_range=0.2)
    if case.quantization:
        model.blocks.requires_grad_(False)
        freeze_into(model.blocks, lambda weight, rows: quantize(weight, case.quantization, part_rows=rows))
    if case.lora:
        add_lora(model, **case.lora)
        with torch.no_grad():  # B is zero at first, and A's gradient with it
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    if sharing.size > 1:
        share_rows(model, HeadExchange(sharing.group, index=sharing.index, size=sharing.size))
    for block in model.blocks:
        block.recompute = case.recompute
    if case.keep:
        fuse_blocks(model, keep=case.keep, implementation="reference")
    return model


def run(case, kind="single", ranks=None, size=1):
    """Two steps: the gradients of the first, losses and norms, then the loss on all rows and the weights."""
    sharing = Sharing(None, 0, 1, 0, 1) if ranks is None else share(ranks, size)
    model = build(case, sharing)
    strategy = make_strategy(kind, ranks, model)
    task = SupervisedTask(model)
    strategy.prepare(task, lambda named: optimizers.build(list(named), kind="sgd", learning_rate=0.1))
    batches = StepLoader(
        Rows(),
        batch_size=4,
        micro_batch_size=1,
        sequence_length=case.sequence_length,
        packing=case.packing,
        seed=3,
        rank=sharing.number,
        world_size=sharing.num_groups,
        part=sharing.index,
        num_parts=sharing.size,
    )
    result = {"grads": {}, "losses": [], "norms": []}
    parts = batches.step(0)
    for index, batch in enumerate(parts):
        strategy.forward_backward(batch, divisor=10.0, is_last=index == len(parts) - 1)
    for name, parameter in task.named_parameters():
        if parameter.grad is not None:
            result["grads"][name] = strategy._kept(parameter.grad).clone()
    strategy.discard_gradients()
    guard = MemoryGuard(strategy, print)
    for index in range(2):
        options = {"learning_rate": 0.1, "max_gradient_norm": 1.0, "guard": guard, "notify": print}
        done = take_step(strategy, batches.step(index), number=index + 1, **options)
        result["losses"].append(done.loss)
        result["norms"].append(done.gradient_norm)
    evaluation = evaluate(strategy, batches.all())
    result["evaluation"] = (evaluation.loss, evaluation.num_trained_tokens)
    result["weights"] = {name: tensor.clone() for name, tensor in strategy.state().weights.items()}
    return result


def run_all(ranks, names, sizes, kinds):
    """Each case under each strategy, with each number of processes that share a row."""
    return {
        (name, kind, size): run(CASES[name], kind, ranks, size) for name in names for kind in kinds for size in sizes
    }
