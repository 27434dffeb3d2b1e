"""Axolotl's YAMLs as users bring them, with a tiny model and rows in place of theirs: from file to trained weights."""

import io
import json
import runpy
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from stoker.compose.train import train
from stoker.config.load import load, load_with_origins
from stoker.errors import ConfigError

HELD = runpy.run_path(str(Path(__file__).parents[1] / "unit/config/axolotl/cases.py"))
CASES, REFUSED = HELD["CASES"], HELD["REFUSED"]
ALPACA = [
    {"instruction": f"Add one to {number}.", "input": "" if number % 2 else "Briefly.", "output": f"{number + 1}"}
    for number in range(24)
]
CHATS = [
    {"conversations": [{"from": "human", "value": f"{number} plus one?"}, {"from": "gpt", "value": f"{number + 1}."}]}
    for number in range(24)
]
TEXTS = [{"text": f"{number} is followed by {number + 1}. " * 4} for number in range(24)]
ROWS = {"alpaca": ALPACA, "alpaca:chat": ALPACA, "chat_template": CHATS, "pretrain": TEXTS}
# Tokens that the tiny model's tokenizer does not know would need an adapter that trains the embedding.
KNOWN = {"bos_token": "<|user|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "pad_token": "<|new|>"}


def swapped(keys, folder, model):
    """The keys of a case with a tiny model, a few rows and three steps in place of its own."""
    keys = json.loads(json.dumps(keys))
    lists = [keys[name] for name in ("datasets", "pretraining_dataset") if keys.get(name)]
    for entry in (entry for found in lists for entry in found):
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[entry["type"]]))
        entry["path"] = str(path)
        for name in ("name", "split"):
            entry.pop(name, None)
    if keys.get("special_tokens") and keys.get("adapter"):
        keys["special_tokens"] = {name: KNOWN[name] for name in keys["special_tokens"]}
    if keys.get("deepspeed"):
        keys["deepspeed"] = {"zero_optimization": {"stage": 2}}
    return keys | {
        "base_model": str(model),
        "tokenizer_config": None,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "loss_watchdog_threshold": 20 if keys.get("loss_watchdog_threshold") else None,
        "sequence_len": 256,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_steps": None,
        "save_strategy": None,
        "lora_r": 4 if keys.get("adapter") else None,
    }


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory, tiny_model):
    """A Mixtral-shaped folder with the tiny model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(set(CASES) - set(REFUSED)))
def test_usual_files_train(tmp_path, tiny_model, tiny_mixture, name):
    path = tmp_path / "their.yml"
    model = tiny_mixture if "Mixtral" in CASES[name]["base_model"] else tiny_model
    path.write_text(yaml.safe_dump(swapped(CASES[name], tmp_path, model), sort_keys=False))
    overrides = ["engine.device=cpu", "engine.num_threads=1", "output.trackers=[]"]
    if CASES[name].get("context_parallel_size"):
        overrides.append("engine.context_parallel=1")  # one process has nobody to share rows with
    loaded = load_with_origins(path, overrides)

    result = train(loaded, console=Console(file=io.StringIO()))

    assert (result.reason, result.step) == ("finished", 3)
    assert result.weights.is_dir()
    kept = load(result.folder / "config.yaml")
    assert kept.train.batch_size == loaded.config.train.batch_size


@pytest.fixture
def their(tmp_path, tiny_model):
    """Writes a small file of Axolotl's with further keys; returns its name and the keys."""

    def write(**keys):
        write_rows(tmp_path / "rows.jsonl", CHATS)
        values = {
            "base_model": str(tiny_model),
            "datasets": [{"path": "rows.jsonl", "type": "chat_template", "field_messages": "conversations"}],
            "learning_rate": "1e-2",
            "max_steps": 3,
            "sequence_len": 256,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "dataset_prepared_path": "prepared",
            "output_dir": "out",
            "bf16": False,
        } | keys
        (tmp_path / "their.yml").write_text(yaml.safe_dump(values, sort_keys=False))
        return values

    return write


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_of_axolotls_is_checked_converted_and_trained(stoker, their, tmp_path):
    their(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)

    checked = stoker("check", "their.yml")
    assert "their.yml is Axolotl's: 16 keys" in checked.stdout
    assert "adapter.rank: 4" in checked.stdout
    assert "their.yml is fine." in checked.stdout

    converted = stoker("convert", "their.yml", "-o", "run.yaml")
    assert "Wrote run.yaml" in converted.stdout
    assert "already" in stoker("convert", "their.yml", "-o", "run.yaml", code=2).stderr
    assert "YAML of Stoker's already" in stoker("convert", "run.yaml", code=2).stderr

    done = stoker("train", "their.yml", "--set", "engine.device=cpu", "--set", "output.trackers=[]")
    assert "honoured" in done.stdout
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert load(tmp_path / "run.yaml") == load(tmp_path / "their.yml")


def test_what_is_not_done_ends_with_2_before_anything_is_loaded(stoker, their, tmp_path):
    their(base_model="not/there", rl="dpo", rl_beta=0.1, lora_rnk=4)

    ended = stoker("train", "their.yml", code=2)

    assert "refused" in ended.stdout
    assert "their.yml:14: rl: dpo" in ended.stderr
    assert "their.yml:16: lora_rnk is no key of Axolotl's. Did you mean lora_r?" in ended.stderr
    assert "2 problems" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_keys_are_let_through_when_asked(stoker, their):
    their(lora_rnk=4)

    assert "Did you mean lora_r?" in stoker("check", "their.yml", code=2).stderr
    for command in ("check", "prepare"):
        assert "let through by --allow-unknown" in stoker(command, "their.yml", "--allow-unknown").stdout


def _train(path, *overrides, **options):
    loaded = load_with_origins(path, ["engine.device=cpu", "engine.num_threads=1", "output.trackers=[]", *overrides])
    return train(loaded, console=Console(file=io.StringIO()), **options)


def test_new_tokens_get_rows_that_train_and_transformers_reads(their, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    keys = their(tokens=["<tool>"], special_tokens={"pad_token": "<pad>", "eos_token": "<|end|>"})
    before = AutoModelForCausalLM.from_pretrained(keys["base_model"])

    weights = _train("their.yml").weights

    tokenizer, model = AutoTokenizer.from_pretrained(weights), AutoModelForCausalLM.from_pretrained(weights)
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<pad>"]) == [before.vocab_size + 1, before.vocab_size]
    assert model.config.vocab_size == before.vocab_size + 2 == len(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    ids = torch.tensor([tokenizer.encode("<tool> a", add_special_tokens=False)])
    assert model(ids).logits.isfinite().all()


def test_only_unfrozen_parameters_change(their, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    keys = their(unfrozen_parameters=["model.layers.1.mlp", "^lm_head.weight$"])

    weights = _train("their.yml").weights

    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (keys["base_model"], weights))
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    assert changed == {"lm_head.weight", *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))}


def test_changes_to_the_models_configuration_are_kept_with_the_model(their, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    their(model_config={"rope_parameters": scaling})

    weights = _train("their.yml").weights

    assert json.loads((weights / "config.json").read_text())["rope_parameters"] == scaling


def test_training_goes_on_from_an_adapter(their, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    their(**lora)
    first = _train("their.yml").weights
    their(**lora, lora_model_dir=str(first), output_dir="out2", loraplus_lr_ratio=16, neftune_noise_alpha=5)

    # A rate so low that what comes out is what went in.
    second = _train("their.yml", "train.learning_rate=1e-12").weights

    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(value.allclose(after[name], atol=1e-7) for name, value in before.items())
    their(**(lora | {"lora_r": 8}), lora_model_dir=str(first), output_dir="out3")
    with pytest.raises(ConfigError, match=r"adapter.rank = 8, but the adapter in .* has 4"):
        _train("their.yml")


def test_a_run_goes_on_by_itself_where_the_file_says_so(their, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    their(auto_resume_from_checkpoints=True, save_steps=1)

    assert _train("their.yml").step == 3
    assert _train("their.yml", "train.steps=5").step == 5


def test_noise_and_rates_change_what_is_learned(their, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [{}, {"neftune_noise_alpha": 50}, {"embedding_lr": 1e-6}]

    losses = []
    for number, more in enumerate(keys):
        their(output_dir=f"out{number}", seed=1, **more)
        losses.append(_train("their.yml").losses["train"])

    assert len({pair["before"] for pair in losses}) == 1
    assert len({pair["after"] for pair in losses}) == len(keys)


def test_weights_are_uploaded_at_the_end(their, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    uploaded = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *rest, **named: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **named: uploaded.append(named))
    their(hub_model_id="me/model", hub_strategy="every_save")

    weights = _train("their.yml").weights

    assert [(one["repo_id"], one["folder_path"]) for one in uploaded] == [("me/model", weights)]
