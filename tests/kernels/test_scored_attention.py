"""Soft-capped scores and sinks on a GPU, where FlexAttention compiles them; `tests/unit/kernels` has the reference."""

import pytest
import torch

from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.data.batch import Batch
from stoker.kernels.attention import attention, attention_reference
from stoker.models import native
from stoker.tasks.supervised import SupervisedTask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernel needs a CUDA GPU")


PACKED = ((300, 5, 335), (640,))
# FlexAttention compiles each kind of scores once, and once more for lengths in general at the second length.
CASES = {
    "Gemma 2's, packed": (640, PACKED, {"softcap": 2.0, "window": 200}, False),
    "Gemma 2's, of a part of a block": (200, None, {"softcap": 2.0, "window": 200}, False),
    "gpt-oss', packed": (640, PACKED, {"window": 40}, True),
    "both, whole rows": (256, None, {"softcap": 2.0}, True),
    "another cap": (256, None, {"softcap": 3.0}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_kernel_equals_the_formula(case):
    length, documents, options, with_sinks = CASES[case]
    torch.manual_seed(0)
    shapes = [(2, length, 4, 64), (2, length, 2, 64), (2, length, 2, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda", requires_grad=True) if with_sinks else None
    wanted = [*inputs, sinks] if with_sinks else inputs
    exact = [x.detach().double().requires_grad_() for x in wanted]
    output = attention(*inputs, document_lengths=documents, scale=0.1, sinks=sinks, implementation="triton", **options)
    expected = attention_reference(
        *exact[:3], document_lengths=documents, scale=0.1, sinks=exact[3] if with_sinks else None, **options
    )
    grad = torch.randn_like(output)
    found = [output, *torch.autograd.grad(output, wanted, grad)]
    right = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for one, other in zip(found, right, strict=True):
        # bf16 keeps 8 bits of each factor.
        assert (one.double() - other).norm() <= 2e-2 * other.norm()


SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
MODELS = {
    "gemma2": {"query_pre_attn_scalar": 32, "intermediate_size": 96, "sliding_window": 32},
    "gpt_oss": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_s_packed_rows_have_the_references_loss_and_gradients(model_type):
    config = {"model_type": model_type, **SIZES, "num_key_value_heads": 2, **MODELS[model_type]}
    ids = torch.randint(5, 96, (2, 128), generator=torch.Generator().manual_seed(0)).cuda()
    documents, results = ((50, 78), (128,)), []
    for kernels in ("reference", "triton"):
        model = native.build(read(config, "config.json"), device="cuda", kernels=kernels, seed=1)
        add_lora(model, rank=4, alpha=8, seed=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator("cuda").manual_seed(3))
        task = SupervisedTask(model.train(), kernels=kernels)
        with torch.autocast("cuda", torch.bfloat16):
            loss = task(Batch(ids, ids.roll(-1, 1), documents, ids.numel(), ids.numel())).loss_sum
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradient = torch.cat([one.flatten() for one in torch.autograd.grad(loss, trained)])
        results.append((loss.item(), gradient))
    (expected, right), (found, other) = results
    assert found == pytest.approx(expected, rel=1e-2)
    # bf16 on both sides; of a mixture a few tokens change experts by a hair.
    assert torch.nn.functional.cosine_similarity(right, other, dim=0) > 0.98
