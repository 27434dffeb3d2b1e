"""Models that run through Transformers' classes: the same losses, gradients, adapters, answers and files as there."""

import warnings

import pytest
import torch
from borrowed_models import CONFIGS, folder_of, ids_of, theirs
from peft import PeftModel

from stoker.adapters.lora import add_lora
from stoker.adapters.merge import merge_into
from stoker.arch.activations import Micro, op_by_op
from stoker.data.batch import Batch
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.generate.decode import generate
from stoker.models.borrowed import load as borrowed
from stoker.nn.frozen_linear import FrozenLinear
from stoker.nn.linear import FusedLinear
from stoker.tasks.supervised import SupervisedTask

# fp32 and logits of about 1 to 10: norms, feed-forwards and attention take sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
every_model = pytest.mark.parametrize("model_type", CONFIGS)


def ours(model_type, **options):
    folder = folder_of(model_type)
    spec = borrowed.read(folder, why="it is a test", is_remote=False)
    return borrowed.load(folder, spec, **options)


def adapted(model_type):
    """Our model with an adapter whose update is not zero."""
    model = ours(model_type)
    add_lora(model, rank=3, alpha=6, targets="all-linear", seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def through_peft(model_type, folder, *, is_trainable=False):
    """Transformers' model with the adapter in `folder`; PEFT must find a tensor for all that it expects."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        return PeftModel.from_pretrained(theirs(folder_of(model_type)), folder, is_trainable=is_trainable)


@pytest.mark.proves("loss", "gradients", "lora")
@every_model
def test_a_training_step_has_the_loss_and_gradients_of_transformers_with_peft(model_type, tmp_path):
    model = adapted(model_type).train()
    adapter.save(model, tmp_path / "start", base_name=str(folder_of(model_type)))
    peft = through_peft(model_type, tmp_path / "start", is_trainable=True).train()
    ids = ids_of(2, 12)
    targets = ids.roll(-1, dims=1).clone()
    targets[:, -1] = -100
    targets[1, 7:] = -100  # the second row is padded on the right
    ids[1, 8:] = 0
    task = SupervisedTask(model)
    sides = [
        (
            model,
            lambda: task(Batch(ids, targets, None, ids.numel(), int((targets != -100).sum()))).loss_sum,
        ),
        (
            peft,
            lambda: torch.nn.functional.cross_entropy(
                peft(input_ids=ids).logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
            ),
        ),
    ]
    losses = []
    for module, compute in sides:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        loss = compute()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), compute().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] - losses[0][1] > 1e-3  # the step did something
    adapter.save(model, tmp_path / "stepped", base_name=str(folder_of(model_type)))
    again = through_peft(model_type, tmp_path / "stepped").eval()
    for name, tensor in peft.named_parameters():
        if tensor.requires_grad:  # the gradients were equal, as the weights after the step are
            torch.testing.assert_close(again.get_parameter(name), tensor, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().logits(model(ids)), again(input_ids=ids).logits, **TOLERANCE)


@pytest.mark.proves("packing")
@every_model
def test_packed_documents_do_not_see_one_another(model_type):
    model = ours(model_type)
    ids, lengths = ids_of(2, 12), ((3, 5, 4), (10, 2))
    with torch.no_grad():
        packed = model(ids, document_lengths=lengths)
        for row, sizes in enumerate(lengths):
            apart = [model(document[None])[0] for document in ids[row].split(list(sizes))]
            torch.testing.assert_close(packed[row], torch.cat(apart), **TOLERANCE)
        assert (packed - model(ids)).abs().max() > 1e-3


@pytest.mark.proves("recompute")
@every_model
def test_layers_that_run_again_give_the_same_gradients(model_type):
    model = adapted(model_type).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    runs, found = 0, []

    def count(*_):
        nonlocal runs
        runs += 1

    next(layer for layer in model.modules() if type(layer).__name__ == "LoraLinear").register_forward_hook(count)
    for recompute in (False, True):
        for block in model.blocks:
            block.recompute = recompute
        loss = model.logits(model(ids_of(1, 12), document_lengths=((5, 7),))).square().mean()
        found.append(torch.autograd.grad(loss, list(trained.values())))
    assert runs % 3 == 0 and runs  # once, then twice
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice)


@pytest.mark.proves("generation")
@every_model
def test_greedy_answers_are_those_of_transformers(model_type):
    model, prompt = ours(model_type), ids_of(1, 5)
    expected = theirs(folder_of(model_type)).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0, 5:]
    assert list(generate(model, prompt[0].tolist(), max_new_tokens=12)) == expected.tolist()


@pytest.mark.proves("export")
@every_model
def test_a_merged_adapter_is_a_model_that_transformers_loads(model_type, tmp_path):
    model = adapted(model_type)
    adapter.save(model, tmp_path / "adapter", base_name=str(folder_of(model_type)))
    merge(folder_of(model_type), tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    merge_into(model)
    ids = ids_of(2, 12)
    with torch.no_grad():
        merged = theirs(tmp_path / "merged")(ids).logits
        torch.testing.assert_close(merged, model.logits(model(ids)), **TOLERANCE)
        assert (merged - theirs(folder_of(model_type))(ids).logits).abs().max() > 1e-2


def test_linear_layers_that_share_a_weight_with_others_have_no_adapter():
    model = ours("zamba2")
    spec = borrowed.read(folder_of("zamba2"), why="it is a test", is_remote=False)
    adapted_to = add_lora(model, rank=2, alpha=4).names
    assert set(spec.linear_shapes()) == set(adapted_to)
    assert {"model.layers.1.linear", "model.layers.3.mamba_decoder.mamba.in_proj"} <= set(adapted_to)
    assert not any("shared_transformer" in name for name in adapted_to)
    assert "44 linear layers (down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj) are neither" in model.notices[0]


@pytest.mark.parametrize(
    ("model_type", "quantization"),
    [
        *(pytest.param(name, "nf4", marks=pytest.mark.proves("nf4")) for name in CONFIGS),
        *((name, quantization) for name in ("opt", "helium", "openai-gpt") for quantization in ("int8", "fp8")),
    ],
)
def test_a_quantised_base_computes_with_the_weights_that_it_holds(model_type, quantization):
    model = ours(model_type, quantization=quantization)
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    plain = theirs(folder_of(model_type))
    state = plain.state_dict()
    for name, tensor in borrowed.tensors(model):
        state[name].copy_(tensor)
    ids = ids_of(2, 12)
    with torch.no_grad():
        expected, made = plain(ids).logits, model.logits(model(ids))
    # fp8 rounds what layers read as well, to three bits.
    allowed = 0.15 if quantization == "fp8" else 1e-4
    assert len(frozen) == sum(isinstance(module, FusedLinear) for module in ours(model_type).modules())
    assert (made - expected).abs().max() <= allowed * expected.abs().max()


@pytest.mark.parametrize("model_type", ["gptj", "openai-gpt", "helium", "vaultgemma"])
def test_every_weight_is_trained_and_written_as_transformers_would(model_type, tmp_path):
    model = ours(model_type).requires_grad_(True)
    plain = theirs(folder_of(model_type))
    ids = ids_of(2, 12)
    loss, expected = (torch.logsumexp(logits, -1).mean() for logits in (model.logits(model(ids)), plain(ids).logits))
    loss.backward()
    expected.backward()
    written = dict(borrowed.tensors(model))
    assert set(written) == {name for name, _ in plain.named_parameters()}
    with torch.no_grad():
        for parameter in (*model.parameters(), *plain.parameters()):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(borrowed.tensors(model))[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["arcee", "bitnet", "codegen", "gpt_bigcode", "opt", "seed_oss"])
def test_the_plans_estimate_of_what_layers_keep_is_within_a_factor_of_two(model_type):
    spec = borrowed.read(folder_of(model_type), why="it is a test", is_remote=False)
    model, ids = adapted(model_type).train(), ids_of(4, 60)
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids)
    measured = sum(size for size, _ in kept.values())
    estimated = sum(op_by_op(layer, spec.hidden_size, Micro(ids.numel(), 4), "all").kept for layer in spec.layers)
    assert 0.5 < estimated / measured < 2.0
