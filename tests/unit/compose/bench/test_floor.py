import pytest
import torch

from stoker.arch import arithmetic, families
from stoker.compose.bench import floor, shapes
from stoker.compose.bench.floor import Product, seen_keys, work

SPEC = families.read(shapes.SHAPES["llama-tiny"], "test")


@pytest.mark.parametrize("frozen", [True, False])
def test_the_products_and_attention_of_a_step_are_the_flops_of_training(frozen):
    measured = floor.measure(
        SPEC,
        rows=2,
        length=16,
        documents=[16, 16],
        trained_tokens=32,
        micro_batches=3,
        frozen=frozen,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    assert measured.flops == 96 * arithmetic.training_flops_per_token(SPEC, 16, frozen_base=frozen)
    assert 0 < measured.attention_seconds < measured.seconds < measured.recomputed_seconds
    assert measured.peak_flops > 0


def test_weights_that_are_frozen_need_no_gradient():
    frozen, trained = (work(SPEC, tokens=8, trained_tokens=8, frozen=kind).products for kind in (True, False))
    gate_up = Product(8, 64, 256, True)
    assert frozen[gate_up] == 2  # one a layer
    of_weight = Product(256, 8, 64, False)
    assert of_weight not in frozen
    assert trained[of_weight] == 2
    assert sum(trained.values()) == sum(frozen.values()) * 3 // 2


def test_the_head_runs_over_trained_tokens_in_chunks_and_may_be_in_fp8_where_it_is_frozen():
    products = work(SPEC, tokens=16384, trained_tokens=9000, frozen=True).products
    head = {product.rows: count for product, count in products.items() if product.columns == 512}
    assert head == {4096: 2, 808: 1}
    assert all(product.fp8 for product in products if 512 in (product.columns, product.inner))
    trained = work(SPEC, tokens=16384, trained_tokens=9000, frozen=False).products
    assert not any(product.fp8 for product in trained)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_keys_are_counted_within_documents_and_windows(window):
    lengths = [1, 7, 4]
    brute = sum(
        1
        for length in lengths
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )
    assert seen_keys(lengths, window) == brute
