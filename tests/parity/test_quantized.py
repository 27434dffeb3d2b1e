"""NF4 bases beside bitsandbytes, Transformers and PEFT: the same values, losses and training, on a CPU."""

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from stoker.adapters.fused_block import fuse_blocks
from stoker.adapters.lora import add_lora
from stoker.arch.families import read
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.models.folder import read_config
from stoker.models.native import load

pytest.importorskip("bitsandbytes")
from peft import PeftModel

# Transformers quantises in the base's own dtype and computes in fp32, as Stoker does on a CPU.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def theirs(folder):
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def ours(folder):
    return load(folder, read(read_config(folder), str(folder)), quantization="nf4")


def test_weights_quantized_on_the_way_are_those_of_bitsandbytes(folder, theirs):
    import bitsandbytes

    model = ours(folder)
    qkv = model.blocks[1].attention.qkv
    for name, rows in zip(qkv.names, qkv.slices, strict=True):
        weight = theirs.get_submodule(name).weight
        assert torch.equal(qkv.weight[rows], bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))


def test_folder_that_transformers_saved_in_nf4_loads_with_its_logits(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    # With gradients, as in training: without, bitsandbytes' CPU kernel multiplies in bf16.
    expected = theirs(ids).logits.detach()
    for quantization in ("nf4", "none"):
        spec = read(read_config(tmp_path), str(tmp_path))
        model = load(tmp_path, spec, quantization=quantization)
        # The same values in fp32; logits up to 10, sums in another order.
        torch.testing.assert_close(model.logits(model(ids)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("keep", [None, "all", "mixer", "attention", "input"])
def test_training_over_nf4_gives_the_losses_of_peft_over_bitsandbytes(folder, theirs, ids, tmp_path, keep):
    model = ours(folder)
    add_lora(model, rank=4, alpha=8)
    adapter.save(model, tmp_path, base_name=str(folder))
    peft_model = PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    # As PEFT prepares such models: else the first layer's input needs no gradient, and bitsandbytes' kernel for that
    # multiplies in bf16 on a CPU.
    peft_model.enable_input_require_grads()
    if keep is not None:
        fuse_blocks(model, keep=keep, implementation="reference")

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

    our_losses = train(model, lambda: model.logits(model(ids)))
    their_losses = train(peft_model, lambda: peft_model(ids).logits)
    assert our_losses[-1] < our_losses[0] - 0.1
    # fp32 on both sides, so only the order of sums differs; Adam's small denominators let 1e-6 grow over six steps.
    assert our_losses == pytest.approx(their_losses, abs=1e-4)


def test_adapter_trained_over_a_folder_in_nf4_merges_into_its_values(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path / "base")
    spec = read(read_config(tmp_path / "base"), "config.json")
    model = load(tmp_path / "base", spec, quantization="nf4")
    add_lora(model, rank=4, alpha=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
        expected = model.logits(model(ids))
    adapter.save(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    # fp32 sums in another order, over logits of about ten.
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-3)
