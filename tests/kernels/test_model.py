"""A whole model with Triton's kernels equals the same model with the references."""

import pytest
import torch

from stoker.arch.families import read
from stoker.kernels.attention import attention, attention_reference
from stoker.kernels.documents import Boundaries
from stoker.kernels.linear_cross_entropy import linear_cross_entropy
from stoker.models import native

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("document_lengths", [None, ((3, 4), (5, 2))])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_every_gradient_are_those_of_the_references(document_lengths, recompute, device):
    spec = read(CONFIG, "config.json")
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for kernels in ("reference", "triton"):
        model = native.build(spec, device=device, kernels=kernels, seed=1)
        for block in model.blocks:
            block.recompute = recompute
        hidden = model(ids, document_lengths=document_lengths).flatten(0, 1)
        loss = linear_cross_entropy(hidden, model.head_weight, ids.flatten(), implementation=kernels)
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (expected, expected_grads), (actual, actual_grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)  # float32 throughout, sums in another order
    for name, grad in expected_grads.items():
        torch.testing.assert_close(
            actual_grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("document_lengths", [None, ((40, 60), (100,))])
@pytest.mark.parametrize(("kv_heads", "channels"), [(4, 64), (1, 128)])
def test_attention_in_half_precision_on_a_gpu(document_lengths, kv_heads, channels, draw, device):
    if device.type != "cuda":
        pytest.skip("chooses among a GPU's kernels")
    q, k, v = (draw(2, 100, heads, channels).bfloat16().requires_grad_() for heads in (4, kv_heads, kv_heads))
    grad = draw(2, 100, 4, channels).bfloat16()
    actual = attention(q, k, v, document_lengths=document_lengths, implementation="triton")
    expected = attention_reference(q.double(), k.double(), v.double(), document_lengths=document_lengths)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-2)  # bf16's 2^-8 on values of about 2
    for result, truth in zip(
        torch.autograd.grad(actual, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad.double()),
        strict=True,
    ):
        error = (result.double() - truth.double()).norm() / truth.double().norm()
        assert error < 1e-2


@pytest.mark.parametrize("window", [None, 30])
def test_attention_on_a_gpu_with_room_for_more_and_longer_documents(window, draw, device):
    if device.type != "cuda":
        pytest.skip("needs variable-length attention")
    q, k, v = (draw(2, 100, heads, 64).bfloat16().requires_grad_() for heads in (4, 2, 2))
    grad = draw(2, 100, 4, 64).bfloat16()
    lengths = ((40, 1, 59), (100,))
    ends = torch.tensor([0, 0, 40, 41, 100, 100, 200, 200, 200, 200], dtype=torch.int32, device=device)
    results = []
    for documents in (lengths, Boundaries(ends, 640)):
        out = attention(q, k, v, document_lengths=documents, window=window, implementation="triton")
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for index, (exact, roomy) in enumerate(zip(*results, strict=True)):
        # The same blocks in the same order; only the queries' gradients are added up in any order, in fp32.
        tolerance = 1e-2 if index == 1 else 0.0
        assert roomy.isfinite().all()
        assert (roomy.double() - exact.double()).norm() <= tolerance * exact.double().norm()
    expected = attention_reference(q.double(), k.double(), v.double(), document_lengths=lengths, window=window)
    torch.testing.assert_close(results[1][0].double(), expected, rtol=0, atol=2e-2)
