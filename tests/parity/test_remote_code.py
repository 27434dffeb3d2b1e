"""A model that brings its own code: refused until allowed, and then held to that code's own numbers."""

import json
from tempfile import TemporaryDirectory

import pytest
import torch
from borrowed_models import ids_of
from peft import PeftModel
from remote_model import write
from transformers import AutoModelForCausalLM, dynamic_module_utils

from stoker.adapters.lora import add_lora
from stoker.arch.spec import ArchSpec
from stoker.compose.merge import merge as merge_named
from stoker.compose.model import open_base
from stoker.compose.session import open_session
from stoker.data.batch import Batch
from stoker.errors import ConfigError, ModelError
from stoker.export import adapter
from stoker.export.merged import merge
from stoker.generate.decode import generate
from stoker.models import open as models
from stoker.tasks.supervised import SupervisedTask

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# Where Transformers copies a model's code to run it from: once a process, as Python remembers where the package lies.
_KEPT = TemporaryDirectory(prefix="stoker-modules-")
dynamic_module_utils.HF_MODULES_CACHE = _KEPT.name


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "tiny")


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def opened(folder):
    base = open_base(str(folder), trust_remote_code=True)
    return base, models.load(folder, base.spec)


def test_code_is_not_run_unless_it_is_allowed(folder):
    (folder / "configuration_tiny.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelError, match=r"brings its own code \(modeling_tiny.TinyForCausalLM\).*all your rights"):
        open_base(str(folder))


def test_code_from_the_hub_needs_a_pinned_commit(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("stoker.models.folder.resolve", lambda *names, **options: asked.append(options) or folder)
    for revision in (None, "main", COMMIT[:10]):
        with pytest.raises(ConfigError, match="may be changed by others under revision"):
            open_base("owner/name", revision=revision, trust_remote_code=True)
    assert not asked
    open_base("owner/name", revision=COMMIT, trust_remote_code=True)
    assert asked == [{"revision": COMMIT, "with_code": True}]


def test_code_of_another_repository_is_not_pinned_and_so_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other/place--modeling_tiny.TinyForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another repository, other/place"):
        open_base(str(folder), trust_remote_code=True)


INTERNLM2 = {
    "model_type": "internlm2",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
}


def test_a_native_model_needs_no_code_of_its_own(tmp_path):
    (tmp_path / "modeling_internlm2.py").write_text("raise SystemExit('this must not run')")
    assert isinstance(models.read(tmp_path, INTERNLM2, trust_remote_code=True), ArchSpec)


def test_a_setting_that_a_family_refuses_is_named_before_the_code_that_might_bear_it(tmp_path):
    with pytest.raises(ModelError, match=r"attention_dropout = 0\.1") as refused:
        models.read(tmp_path, {**INTERNLM2, "attention_dropout": 0.1})
    assert "brings its own code (modeling_internlm2.InternLM2ForCausalLM)" in str(refused.value)


def test_what_the_code_does_not_bear_is_left_to_it_and_said(folder):
    base, model = opened(folder)
    assert base.spec.is_remote
    assert model.head_weight is None  # its logits are no scaled or capped linear function
    assert not model.packs
    said = " ".join([*model.notices, model.why_not_packed])
    assert "makes its logits in a way of its own" in said
    assert "layers.0.left, layers.1.left cannot have an adapter" in said
    assert "computes attention, or what it has instead of it, by itself" in said


def test_a_step_adapter_merge_and_answer_are_those_of_the_plain_class(folder, tmp_path):
    _, model = opened(folder)
    add_lora(model, rank=3, alpha=6, targets="all-linear", seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    adapter.save(model, tmp_path / "adapter", base_name=str(folder))
    peft = PeftModel.from_pretrained(plain(folder), tmp_path / "adapter", is_trainable=True)
    ids = ids_of(2, 12)
    targets = ids.roll(-1, dims=1).clone()
    targets[:, -1] = -100
    loss = SupervisedTask(model)(Batch(ids, targets, None, 24, 22)).loss_sum
    logits = peft(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    theirs = {name: tensor.grad for name, tensor in peft.named_parameters() if tensor.requires_grad}
    for layer in (module for module in model.modules() if type(module).__name__ == "LoraLinear"):
        name = f"base_model.model.{layer.names[0]}.lora_B.default.weight"
        torch.testing.assert_close(layer.lora_b.grad, theirs[name], rtol=1e-4, atol=1e-5)
    merge(folder, tmp_path / "adapter", tmp_path / "merged", trust_remote_code=True)
    assert (tmp_path / "merged" / "modeling_tiny.py").is_file()
    with torch.no_grad():
        torch.testing.assert_close(plain(tmp_path / "merged")(ids).logits, peft.eval()(input_ids=ids).logits)
        greedy = ids[:1, :5]
        for _ in range(4):
            greedy = torch.cat((greedy, peft(input_ids=greedy).logits[:, -1:].argmax(-1)), dim=1)
    assert list(generate(model, ids[0, :5].tolist(), max_new_tokens=4)) == greedy[0, 5:].tolist()


def test_an_adapter_without_its_run_needs_the_word_again(folder, tmp_path):
    _, model = opened(folder)
    add_lora(model, rank=2, alpha=4)
    adapter.save(model, tmp_path / "adapter", base_name=str(folder))
    for command in (merge_named, open_session):
        options = {"output": tmp_path / "out"} if command is merge_named else {"device": "cpu"}
        with pytest.raises(ModelError, match="--trust-remote-code"):
            command(str(tmp_path / "adapter"), **options)
    said = merge_named(str(tmp_path / "adapter"), tmp_path / "out", trust_remote_code=True)
    assert "verified: logits differ" in said
