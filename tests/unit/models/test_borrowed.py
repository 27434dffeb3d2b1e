"""What is replaced in a class of Transformers, what is left to it, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    HeliumConfig,
    OPTConfig,
)

from stoker.adapters.lora import add_lora
from stoker.errors import ModelError
from stoker.export import adapter, peft_config
from stoker.models.borrowed import checks, load, swaps
from stoker.models.borrowed.attention import Call, UnsupportedError, attend, calling
from stoker.models.borrowed.head import HeadFit, HeadTap, fit
from stoker.nn.feed_forward import GatedFeedForward
from stoker.nn.norm import RmsNorm

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a configuration's model."""

    def make(config):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def opened(path, **options):
    return load.load(path, load.read(path, why="it is a test", is_remote=False), **options)


def opt():
    return OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)


def test_what_computes_the_same_is_ours_and_keeps_its_parameters(folder):
    model = opened(folder(HeliumConfig(**SIZES, head_dim=4)))
    gated = [module for module in model.modules() if isinstance(module, GatedFeedForward)]
    norms = [module for module in model.modules() if isinstance(module, RmsNorm)]
    assert (len(gated), len(norms)) == (2, 5)
    assert gated[0].gate_up.names == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert not model.notices and not model.why_not_packed
    assert all(parameter.requires_grad for parameter in model.parameters())


class RMSNorm(nn.Module):
    """Named like one, and no root-mean-square norm."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


class Gated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def test_a_part_that_only_looks_alike_is_left_as_it_is():
    model = nn.ModuleDict({"norm": RMSNorm(8), "mish": Gated(nn.functional.mish), "gelu": Gated(nn.functional.gelu)})
    assert swaps.replace_norms(model, kernels="reference") == 0
    assert swaps.replace_gated(model, kernels="reference") == 1
    assert type(model["norm"]) is RMSNorm
    assert type(model["mish"]) is Gated
    assert model["gelu"].activation == "gelu"


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda z: z, HeadFit()),
        (lambda z: z / 8, HeadFit(scale=0.125)),
        (lambda z: 20 * torch.tanh(z / 20), HeadFit(softcap=20.0)),
        (lambda z: z + z.sin(), None),
        (lambda z: z[..., :-1], None),
    ],
    ids=["plain", "scaled", "capped", "something else", "shorter"],
)
def test_how_a_class_makes_its_logits_is_found_out(after, expected):
    torch.manual_seed(0)
    tap, hidden = HeadTap(nn.Linear(16, 40)), 0.01 * torch.randn(1, 5, 16)
    config = OPTConfig(final_logit_softcapping=20.0)
    found = fit(tap, lambda: after(tap(hidden)), config)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.softcap == expected.softcap
        assert found.scale == pytest.approx(expected.scale, rel=1e-5)
    assert torch.equal(tap(hidden), hidden)  # and afterwards it hands on hidden states


def test_a_window_that_attention_is_not_told_of_is_noticed():
    config = ArceeConfig(**SIZES)
    config.sliding_window = 8
    assert checks._unknown_windows(config, Call(windows=[None, None])) == [8]
    assert checks._unknown_windows(config, Call(windows=[None, 8])) == []
    config.sliding_window_pattern, config.max_window_layers = 2, 1  # count layers, not tokens
    assert checks._unknown_windows(config, Call(windows=[None, 8])) == []
    config.layer_types = ["full_attention", "full_attention"]
    assert checks._unknown_windows(config, Call(windows=[None, None])) == []


def test_a_rope_that_depends_on_the_rows_length_is_not_packed(folder):
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = opened(folder(ArceeConfig(**SIZES, rope_parameters=parameters)))
    assert not model.packs
    assert "dynamic rope depends on the length" in model.why_not_packed


def test_attention_refuses_what_it_does_not_compute():
    q = torch.randn(1, 2, 4, 8)
    layer = nn.Module()
    for options in ({"is_causal": False}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(UnsupportedError):
            attend(layer, q, q, q, None, **options)
    with pytest.raises(UnsupportedError, match="a mask of its own"):
        attend(layer, q, q, q, torch.ones(4, 4, dtype=torch.bool))


def test_dropped_attention_weights_keep_documents_apart():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    changed = v.clone()
    changed[:, :, :2] += 10.0  # the first document
    results = []
    for values in (v, changed):
        torch.manual_seed(1)
        with calling(Call(((2, 4),))):
            results.append(attend(nn.Module(), q, k, values, None, dropout=0.5)[0])
    assert torch.equal(results[0][:, 2:], results[1][:, 2:])
    assert not torch.equal(results[0][:, :2], results[1][:, :2])


def test_an_encoder_is_refused_by_its_configuration_or_by_what_it_predicts(tmp_path):
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"is an encoder.*is_decoder"):
        opened(tmp_path / "bert")
    other = BertGenerationDecoder(BertGenerationConfig(**sizes))  # a type without a class for masked words
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"predictions depend on later tokens.*is_decoder"):
        opened(tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model.decoder.layers.1.fc1.weight": None}, "fc1.weight is missing: Transformers would make it up"),
        ({"model.decoder.layers.2.fc1.weight": torch.ones(2)}, "fc1.weight is not part of this architecture"),
        ({"model.decoder.layers.1.fc1.weight": torch.ones(3, 3)}, None),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, changes, what):
    path = folder(opt()) / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: one for name, one in tensors.items() if one is not None}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=what):
        opened(path.parent)


def test_masks_among_old_weights_are_passed_over(folder):
    path = folder(opt()) / "model.safetensors"
    tensors = load_file(path) | {"model.decoder.layers.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, path, metadata={"format": "pt"})
    opened(path.parent)


def test_pickled_weights_are_refused(folder):
    path = folder(opt())
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="unpickling runs whatever code they hold"):
        opened(path)


def test_rotary_frequencies_keep_their_values_in_half_precision(folder):
    model = opened(folder(ArceeConfig(**SIZES)))
    before = [buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name]
    model.to(torch.bfloat16).float()
    after = [buffer for name, buffer in model.named_buffers() if "inv_freq" in name]
    assert before
    assert all(map(torch.equal, before, after))


def test_facts_are_exact_where_the_plan_counts_on_them(folder):
    path = folder(opt())
    spec, model = load.read(path, why="it is a test", is_remote=False), opened(path)
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert spec.linear_shapes()["model.decoder.layers.1.fc1"] == (16, 24)
    assert len(spec.linear_shapes()) == 12
    assert (spec.vocab_size, spec.hidden_size, spec.max_positions, len(spec.layers)) == (40, 16, 64, 2)
    assert spec.packs


@pytest.mark.slow
def test_peft_finds_the_adapted_layers_and_no_others_of_the_same_name(tmp_path):
    from peft import PeftModel  # takes as long to import as all quick tests of a folder

    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    add_lora(model, rank=2, alpha=4)
    adapter.save(model, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    plain = BertLMHeadModel.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter")  # its head has a layer called dense, as its layers do
    assert sorted(peft.base_model.targeted_module_names) == sorted(
        load.read(tmp_path / "base", why="it is a test", is_remote=False).linear_shapes()
    )


def test_parameters_go_by_the_names_in_the_models_files(folder):
    path = folder(HeliumConfig(**SIZES, head_dim=4))
    names = load.parameter_names(opened(path))
    fused = names["model.model.layers.0.mlp.gate_up.weight"]
    assert fused == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert {name for parts in names.values() for name in parts} == set(load_file(path / "model.safetensors"))


def test_a_class_that_looks_into_its_parts_keeps_them(folder, monkeypatch):
    from transformers.models.helium.modeling_helium import HeliumDecoderLayer

    run = HeliumDecoderLayer.forward

    def look_inside(self, *inputs, **options):
        assert self.mlp.gate_proj.weight.shape  # ours has no such layer
        return run(self, *inputs, **options)

    path = folder(HeliumConfig(**SIZES, head_dim=4))
    monkeypatch.setattr(HeliumDecoderLayer, "forward", look_inside)
    model = opened(path)
    assert not any(isinstance(module, GatedFeedForward) for module in model.modules())
    assert len(load.parameter_names(model)) == len(load_file(path / "model.safetensors"))


def test_a_layer_whose_weights_training_reads_past_it_has_no_adapter(folder, monkeypatch):
    """Classes with fused kernels call a layer in evaluation, and hand its weight to the kernel in training."""
    from transformers.models.opt.modeling_opt import OPTAttention

    plain = OPTAttention.forward

    class Kernel(nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            self.weight, self.bias = weight, bias

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    def fused(self, *arguments, **options):
        out = self.out_proj
        try:
            self.out_proj = Kernel(out.weight, out.bias) if self.training else out
            return plain(self, *arguments, **options)
        finally:
            self.out_proj = out

    monkeypatch.setattr(OPTAttention, "forward", fused)
    model = opened(folder(opt()))
    assert not model.training
    assert any("out_proj" in notice and "cannot have an adapter" in notice for notice in model.notices)
    names = add_lora(model, rank=2, alpha=4).names
    assert any(name.endswith("q_proj") for name in names)
    assert not any(name.endswith("out_proj") for name in names)


def test_an_adapted_layer_has_the_bias_that_classes_ask_for(folder):
    model = opened(folder(opt()))
    add_lora(model, rank=2, alpha=4, targets=["out_proj"])
    layer = next(module for name, module in model.named_modules() if name.endswith("out_proj"))
    assert layer.bias is layer.base.bias


def test_layers_in_lists_go_by_whole_names_in_an_adapters_folder():
    names = ["model.layers.0.adapters.0", "model.layers.1.adapters.0"]
    assert peft_config.target_modules(names, names) == names
    assert peft_config.target_modules(["a.q_proj", "b.q_proj"], ["a.q_proj", "b.q_proj"]) == ["q_proj"]
