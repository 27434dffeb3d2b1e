"""`engine`: how to run it, over one process or many."""

from typing import Any, Literal

from stoker.config.sections.section import Count, Positive, Section, Text


class Fsdp2(Section):
    """How `engine.strategy: fsdp2` shares weights: the settings of torch's `fully_shard`."""

    reshard_after_forward: Literal["auto"] | bool = "auto"
    """Let a layer's weights go after its forward and gather them again for its backward. `false` sends a third less
    and holds the whole model from the forward on; `auto`: true, unless the plan finds that there is the memory."""
    replicas: Count = 1
    """Groups of processes, each of which holds the whole model in parts (hybrid sharding): as many as machines, so that
    weights are sent within a machine and gradients alone between machines."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: parts of weights, gradients and optimiser states wait in host memory, where the optimiser steps."""
    param_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """In which trained weights are sent and used; `auto`: layers' matrices in `engine.precision`, in which products
    read them anyway, all else as it is kept. `fp32` sends twice as much; `bf16` also rounds embedding, head and norms.
    For training every weight."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over processes."""


class DeepSpeed(Section):
    """What `engine.strategy: deepspeed` shares, and what waits outside of the GPU."""

    stage: Literal["auto", 1, 2, 3] = "auto"
    """Of ZeRO: 1 shares the optimiser's state, 2 gradients too, 3 also weights. `auto`: that of `config`, or 2."""
    offload_optimizer: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """Where the optimiser's state waits and steps: on the GPU (`none`), on the host, or, in stage 3, on an NVMe disk
    between steps. `auto`: as `config` has it, or `none`."""
    offload_parameters: Literal["auto", "none", "cpu", "nvme"] = "auto"
    """The same for the parts of weights, in stage 3."""
    nvme_path: Text | None = None
    """Folder on an NVMe disk, for what is offloaded there."""
    config: Text | dict[str, Any] | None = None
    """DeepSpeed's own JSON, as a path or written here; values left `auto` come from the plan, and what contradicts this
    YAML is refused. Optimiser, schedule, clipping and batch sizes are those of `train`."""


class Engine(Section):
    """How to run it. What is `auto` the plan decides, and says why."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """How work is spread over processes, one for each device: `single` is one of them; with `ddp` each holds the whole
    model, with `fsdp2` a part of every weight, with `deepspeed` (an extra) what its stage says. `auto`: `ddp` or
    `fsdp2` where there are several, never DeepSpeed."""
    num_processes: Count | None = None
    """Processes on this machine, one for each GPU; `--gpus` sets it. One unless set, or as many as an outer launcher
    (torchrun, Slurm, accelerate) has started."""
    context_parallel: Count = 1
    """Processes that share each row, for sequences too long for one GPU: each holds a part of a row's activations, and
    exchanges heads for attention. The rows of a step are dealt out to groups of so many."""
    fsdp2: Fsdp2 = Fsdp2()
    """Settings of `strategy: fsdp2`."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Settings of `strategy: deepspeed`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Sequences that go through the model at once; must divide `train.batch_size`."""
    recompute: Literal["auto", "none", "mixer", "attention", "input"] = "auto"
    """What a layer keeps for the backward, which computes the rest again: `none` keeps all; `mixer` what attention
    made, but not the wide feed-forward; `attention` its input and attention's output; `input` its input alone. `auto`
    keeps as much as fits, layer by layer."""
    offload_activations: Literal["auto"] | bool | Count = "auto"
    """Let what layers keep wait in pinned host memory (CUDA only): of all layers, or of so many, from the first; those
    after them keep theirs on the GPU. `auto`: of as many as the GPU's memory demands."""
    memory_limit_gib: Positive | None = None
    """Use at most so much of the device's memory, in GiB; all that is free unless set."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the matrix products; trained weights stay in `train.weight_dtype`."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """Which implementation of each operation runs: `triton`, fused for CUDA GPUs, or `reference`, plain PyTorch."""
    tf32: bool = False
    """Let products of fp32 matrices round their factors to TF32 (10 bits) on GPUs that have it. Those of `precision`
    bf16 and fp16 are not affected."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Replay micro-batches of one shape as one launch (CUDA only); `auto` where launching is what steps would wait for.
    Needs no dropout and, of packed rows, attention in bf16 or fp16."""
    num_threads: Literal["auto"] | Count = "auto"
    """CPU threads of PyTorch."""
    hang_timeout: Positive = 1800.0
    """Seconds that one of several processes may stand still while the others wait for it; then all end, and the message
    says which it is and what it was doing."""
