"""Models of state spaces with Triton's kernels equal the same models with the references, under checkpoints too."""

import pytest
import torch

from stoker.arch.families import read
from stoker.models import native

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": True}
CONFIGS = {
    "mamba": {"model_type": "mamba", **SIZES, "state_size": 4},
    "mamba2": {"model_type": "mamba2", **SIZES, "state_size": 16, "num_heads": 2, "head_dim": 16, "n_groups": 1},
}
LENGTH = 9


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_gradients_and_cached_pieces_are_those_of_the_references(name, recompute, device):
    ids = torch.randint(0, 40, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for kernels in ("reference", "triton"):
        model = native.build(read(CONFIGS[name], "config.json"), device=device, kernels=kernels, initializer_range=0.2)
        model.blocks[0].recompute = recompute
        hidden = model(ids, document_lengths=((4, LENGTH - 4),))
        # Not the mean square, which the final norm makes the same for all.
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (hidden * weights).sum().backward()
        with torch.no_grad():
            cache = model.new_cache(capacity=LENGTH)
            pieces = torch.cat([model(piece, cache=cache) for piece in ids.split([5, 1, LENGTH - 6], 1)], 1)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"hidden": hidden.detach(), "pieces": pieces, **gradients})
    expected, found = results
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        # fp32 on both sides, sums in another order.
        assert (found[key] - tensor).abs().max() <= 1e-4 * max(1.0, tensor.abs().max().item()), key
