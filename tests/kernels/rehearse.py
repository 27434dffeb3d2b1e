"""Rehearses steps of small models for a GPU that is not there, and prints what was compiled; one JSON line.

Run as a process of its own: kernels defined under TRITON_INTERPRET cannot be compiled.
"""

import json
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.data.batch import Batch
from stoker.distributed.single import SingleDevice
from stoker.kernels import rms_norm
from stoker.kernels.adamw import AdamWStep, adamw_
from stoker.kernels.ahead import can_compile_ahead, compiling_ahead, is_compiling_ahead
from stoker.kernels.offload import HostOffload
from stoker.kernels.triton_support import KERNELS
from stoker.models import native
from stoker.optim import optimizers
from stoker.tasks.supervised import SupervisedTask

MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


class Driver:
    """What Triton asks of a driver before a launch."""

    def __init__(self):
        self.launchers = []

    def launcher_cls(self, source, metadata):
        self.launchers.append((source.name, threading.current_thread() is threading.main_thread()))

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compiled():
    """Kernel names, each as often as it was compiled."""
    return sorted(kernel.__name__ for kernel in KERNELS for _ in kernel.device_caches[0][0].values())


def strategy(rehearsing, **changes):
    model = native.build(read(MIXTURE | changes, "config.json"), seed=3, kernels="triton")
    add_lora(model, rank=4, alpha=8)
    result = SingleDevice("cpu", rehearsing=rehearsing)
    task = SupervisedTask(model, kernels="triton")
    options = {"kind": "adamw", "learning_rate": 1e-3, "flat": True, "flat_update": update}
    result.prepare(task, lambda named: optimizers.build(named, **options))
    return result


def update(weight, grad, average, square, *, number, betas, **values):
    numbers = AdamWStep(first_beta=betas[0], second_beta=betas[1], **values)
    adamw_(weight, grad, average, square, numbers, seed=1, number=number, implementation="triton")


def asked_by_a_step_after_its_rehearsal():
    """Kernels that a rehearsal of weights in bf16, some of odd sizes, asked for, and those that its step then did."""
    module = torch.nn.Module()
    for name, shape in {"even": (96, 96), "odd": (7, 9), "large": (130, 131), "bias": (48,), "short": (3,)}.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))
    module.register_parameter("norm", torch.nn.Parameter(torch.zeros(64)))
    run = SingleDevice("cpu")
    run.prepare(module, lambda named: optimizers.build(named, kind="adamw", learning_rate=1e-3, rounded_update=update))
    with compiling_ahead() as rehearsed:
        run._rehearse_step()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with compiling_ahead() as stepped:
        run._optimizer.step()
    return rehearsed.num_kernels, stepped.num_kernels


@contextmanager
def nothing_runs():
    """Launches neither compile nor run; what they would have written is full of not-a-number and of huge integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2, dtype=torch.int32).min() > 10**6
    for kernel in KERNELS:
        kernel.run = lambda *_, **__: None
    yield
    for kernel in KERNELS:
        del kernel.run


ids = torch.arange(32).view(2, 16)
batch = Batch(ids, ids.roll(-1, 1), None, ids.numel(), ids.numel())
triton.runtime.driver.set_active(driver := Driver())
assert can_compile_ahead()
if sys.argv[1] == "launch":
    x, weight, found = torch.randn(4, 64), torch.ones(64), []
    with compiling_ahead():
        threads = [threading.Thread(target=lambda: found.append(rms_norm.launch_forward(x, None, weight, 1e-6)))]
        for thread in threads:
            thread.start()
            thread.join()
        found.append(rms_norm.launch_forward(x, None, weight, 1e-6))
    assert len(found) == 2
    print(
        json.dumps(
            {
                "compiled": compiled(),
                "launchers": driver.launchers,
                "restored": all("run" not in vars(kernel) for kernel in KERNELS),
            }
        )
    )
    # An index that only a kernel gives must not lead out of a tensor: on a GPU that would be the end of the process.
    for model_type in ("qwen3_moe", "gpt_oss"):
        with nothing_runs():
            strategy(None, model_type=model_type)._rehearse(batch)
else:
    run = strategy(compiling_ahead)
    before = torch.random.get_rng_state()
    # A batch that is cut short: kernels for it must be those of the whole one.
    long = Batch(ids.repeat(3, 100), ids.roll(-1, 1).repeat(3, 100), None, 9600, 9600)
    with compiling_ahead() as asked:
        run._rehearse(long)
        assert is_compiling_ahead()
        assert not HostOffload().takes(torch.ones(2**20))
    assert HostOffload().takes(torch.ones(2**20))
    assert asked.num_kernels == len(compiled())
    short = compiled()
    with compiling_ahead() as asked:
        whole = SimpleNamespace(shortened=lambda: long)
        run._rehearse(whole)
    assert asked.num_kernels == 0, sorted((Counter(compiled()) - Counter(short)).elements())
    for parameter in run._trained.values():
        parameter.grad = torch.zeros_like(parameter)
    with compiling_ahead() as asked:
        run._optimizer.step()
    assert asked.num_kernels == 0
    run._task.zero_grad()
    grads = [name for name, parameter in run._trained.items() if parameter.grad is not None]
    kept = torch.equal(before, torch.random.get_rng_state())
    found = {"compiled": compiled(), "grads": grads, "random_numbers_kept": kept}
    print(json.dumps(found | {"step": asked_by_a_step_after_its_rehearsal()}))
