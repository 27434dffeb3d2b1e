"""Adapters exchanged with PEFT in both directions: equal logits, equal training, equal merging."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.adapters.merge import merge_into
from stoker.arch.families import read
from stoker.export import adapter
from stoker.models.folder import read_config
from stoker.models.native import load

VARIANTS = {
    "lora": {},
    "rslora": {"rank_stabilized": True},
    "dora": {"dora": True},
}
TARGETS = ["all-linear", ["q_proj", "v_proj", "down_proj"], r"model\.layers\.1\..*\.(k_proj|gate_proj)"]
# fp32, two layers of width 32 and logits of about 1: the sums of both sides differ in their order only.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


@pytest.fixture
def ours(folder):
    return load(folder, read(read_config(folder), str(folder))).eval()


@pytest.fixture
def theirs(folder):
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def perturb(model):
    """Gives every trained tensor other values, so that no adapter is zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def our_logits(model, ids):
    return model.logits(model(ids))


def peft_config(variant, targets="all-linear", rank=3):
    return LoraConfig(
        r=rank,
        lora_alpha=5,
        target_modules=targets,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("targets", TARGETS, ids=["all", "names", "expression"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_our_adapter_and_gives_our_logits(ours, theirs, ids, tmp_path, folder, variant, targets):
    plain = our_logits(ours, ids)
    add_lora(ours, rank=3, alpha=5, targets=targets, **VARIANTS[variant])
    perturb(ours)
    adapter.save(ours, tmp_path, base_name=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about tensors that it misses or does not use
        loaded = PeftModel.from_pretrained(theirs, tmp_path).eval()
    logits = our_logits(ours, ids)
    assert (logits - plain).abs().max() > 0.01
    torch.testing.assert_close(logits, loaded(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("targets", TARGETS, ids=["all", "names", "expression"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_we_load_pefts_adapter_and_give_its_logits(ours, theirs, ids, tmp_path, variant, targets):
    plain = our_logits(ours, ids)
    model = get_peft_model(theirs, peft_config(variant, targets)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    summary = adapter.load(ours, tmp_path)
    assert summary.parameters == sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    logits = our_logits(ours, ids)
    assert (logits - plain).abs().max() > 0.01
    torch.testing.assert_close(logits, model(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("targets", TARGETS, ids=["all", "names", "expression"])
def test_our_configuration_names_the_layers_that_pefts_does(ours, theirs, tmp_path, folder, targets):
    summary = add_lora(ours, rank=3, alpha=5, targets=targets)
    adapter.save(ours, tmp_path, base_name=str(folder), revision="abc")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (str(folder), "abc")
    model = get_peft_model(theirs, peft_config("lora", targets))
    assert sorted(summary.names) == sorted(model.base_model.targeted_module_names)


@pytest.mark.parametrize("keep", [None, "all", "input"], ids=["op by op", "fused, all kept", "fused, input kept"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_with_adamw_gives_pefts_losses_and_weights(ours, theirs, ids, tmp_path, folder, variant, keep):
    add_lora(ours, rank=3, alpha=5, targets="all-linear", **VARIANTS[variant])
    perturb(ours)
    adapter.save(ours, tmp_path / "start", base_name=str(folder))
    if keep is not None:
        fuse_blocks(ours, keep=keep, implementation="reference")
    model = PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)

    def train(module, logits):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        losses = []
        for _ in range(6):
            loss = torch.nn.functional.cross_entropy(logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    our_losses = train(ours, lambda: our_logits(ours, ids))
    their_losses = train(model, lambda: model(ids).logits)
    assert our_losses[-1] < our_losses[0] - 0.1
    assert our_losses == pytest.approx(their_losses, abs=2e-5)  # Adam divides by small numbers: errors of 1e-6 grow
    torch.testing.assert_close(our_logits(ours, ids), model(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_equal_pefts(ours, theirs, tmp_path, variant):
    model = get_peft_model(theirs, peft_config(variant)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    adapter.load(ours, tmp_path)
    merge_into(ours)
    merged = model.merge_and_unload().state_dict()
    qkv = torch.cat([merged[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    torch.testing.assert_close(ours.blocks[1].attention.qkv.weight, qkv, rtol=0, atol=1e-6)
