"""Borrowed models on a GPU: the same parts replaced as on a CPU, and the losses of Transformers with PEFT in bf16."""

import pytest
import torch
from borrowed_models import CONFIGS, folder_of, ids_of, theirs
from peft import PeftModel

from stoker.adapters.lora import add_lora
from stoker.data.batch import Batch
from stoker.export import adapter
from stoker.generate.decode import generate
from stoker.models.borrowed import load as borrowed
from stoker.nn.frozen_linear import FrozenLinear
from stoker.tasks.supervised import SupervisedTask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTHS = ((40, 24), (64,))


def ours(model_type, **options):
    folder = folder_of(model_type)
    spec = borrowed.read(folder, why="it is a test", is_remote=False)
    return borrowed.load(folder, spec, **options)


def on_gpu(model_type, **options):
    return ours(model_type, device="cuda", dtype=torch.bfloat16, kernels="triton", **options)


def parts(model):
    return sorted(type(module).__name__ for module in model.modules() if type(module).__module__.startswith("stoker."))


def batch():
    ids = ids_of(2, 64).cuda()
    targets = ids.roll(-1, dims=1).clone()
    for row, lengths in enumerate(LENGTHS):
        targets[row, torch.tensor(lengths).cumsum(0) - 1] = -100
    return Batch(ids, targets, LENGTHS, ids.numel(), int((targets != -100).sum()))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_same_parts_are_replaced_as_on_a_cpu(model_type):
    cpu, gpu = ours(model_type), on_gpu(model_type)
    assert parts(gpu) == parts(cpu)
    assert (gpu.packs, gpu.notices, gpu.head) == (cpu.packs, cpu.notices, cpu.head)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_loss_in_bf16_is_that_of_transformers_with_peft(model_type, tmp_path):
    model = on_gpu(model_type)
    add_lora(model, rank=4, alpha=8, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1)
    adapter.save(model, tmp_path, base_name=str(folder_of(model_type)))
    plain = theirs(folder_of(model_type), dtype=torch.bfloat16).cuda()
    peft = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    one = batch()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = SupervisedTask(model.train(), kernels="triton")(one).loss_sum
        expected = 0.0
        for row, lengths in enumerate(LENGTHS):
            documents = zip(one.input_ids[row].split(lengths), one.targets[row].split(lengths), strict=True)
            for ids, targets in documents:
                logits = peft(input_ids=ids[None]).logits[0].float()
                expected += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    assert loss.item() == pytest.approx(expected, rel=0.02)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("model_type", ["opt", "helium", "gptj", "rwkv"])
def test_a_quantised_base_trains_and_answers(model_type, quantization):
    if quantization == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs Ada or Hopper")
    model = on_gpu(model_type, quantization=quantization)
    assert any(isinstance(module, FrozenLinear) for module in model.modules())
    add_lora(model, rank=4, alpha=8, seed=1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = SupervisedTask(model.train(), kernels="triton")(batch()).loss_sum
        loss.backward()
        assert len(list(generate(model, ids_of(1, 9)[0].tolist(), max_new_tokens=6))) == 6
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
