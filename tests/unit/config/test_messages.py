# ruff: noqa: E501 - whole sentences, as users read them
import pytest

from stoker.config import describe, foreign
from stoker.config.document import dotted


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size='8'", "train.batch_size = '8': must be a whole number of at least 1. Write it without quotes: 8."),
        ("data.packing=on", "data.packing = 'on': must be true or false. Write true."),
        ("data.packing=1", "data.packing = 1: must be true or false."),
        ("model.revision=1234567", 'model.revision = 1234567: must be text or null. Quote it: "1234567".'),
        ("engine.strategy=zero3", "engine.strategy = 'zero3': must be auto, single, ddp, fsdp2 or deepspeed. Use deepspeed, and engine.deepspeed.stage: 3."),
        ("engine.micro_batch_size=0", "engine.micro_batch_size = 0: must be auto, or a whole number of at least 1."),
        ("engine.precision=float16", "engine.precision = 'float16': must be auto, fp32, bf16 or fp16. Use fp16."),
        ("output.trackers=[wandbb]", "output.trackers[0] = 'wandbb': must be tensorboard, wandb or mlflow. Did you mean wandb?"),
        ("train.seed=null", "train.seed is empty; it must be a whole number of at least 0. Fill it in, or remove the line for the default."),
        ("train.optimizer.kind=lion", "train.optimizer.kind = 'lion': must be adamw, adamw_8bit, sgd, adafactor or muon."),
        ("train.optimizer={kind: sgd, betas: [0.9, 0.9]}", "train.optimizer.betas is not a setting. What train.optimizer may hold: weight_decay, decay_all, kind, momentum."),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas = [0.9]: must be a list of 2 numbers."),
        ("task.kind=dpo", "task.kind = 'dpo': must be sft or pretrain. This version does not do that task yet."),
        ("data.train.0.pth=x", "data.train[0].pth is not a setting. Did you mean path?"),
        ("train.gradient_accumulation_steps=4", f"train.gradient_accumulation_steps is not a setting. {foreign.NOT_A_SETTING['gradient_accumulation_steps']}"),
        ("engine.sequence_length=4", "engine.sequence_length is not a setting. It belongs elsewhere: data.sequence_length."),
        ("output.xyzzy=4", "output.xyzzy is not a setting. What output may hold: folder, save_every_steps, save_every_epochs, keep_last, save_in_background, keep_best, trackers, wandb, hub_model_id, hub_revision, resume, questions."),
        ("data.train.0.fields={content: 1}", 'data.train[0].fields.content = 1: must be text or null. Quote it: "1".'),
        ("train.learning_rate=.inf", "train.learning_rate = inf: must be a number above 0."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_explained_in_one_sentence(complaints, override, message):
    assert complaints(override)[0] == message


@pytest.mark.parametrize("value", ["true", "hello", "1.5", "0", "{a: 1}", "[]"])
def test_validation_of_the_wrong_form_is_one_problem(complaints, value):
    (message,) = complaints(f"data.validation={value}")
    assert message.startswith("data.validation = ")


def test_a_mistake_inside_validation_sources_is_named_there(complaints):
    (message,) = complaints("data.validation=[{pat: x, path: y}]")
    assert message == "data.validation[0].pat is not a setting. Did you mean path?"


def test_a_misspelt_required_name_is_one_mistake(complaints):
    values = {
        "model": {"base": "m"},
        "data": {"train": [{"path": "x"}]},
        "train": {"learnig_rate": 1.0},
        "output": {"folder": "x"},
    }
    assert complaints(values=values) == ["train.learnig_rate is not a setting. Did you mean learning_rate?"]


def test_names_of_other_trainers_lead_to_settings_that_exist():
    ours = {dotted(path) for path, _ in describe.walk()}
    targets = {name.replace("[0]", "") for name in foreign.SAME_THING.values()}
    assert targets <= ours
    assert not set(foreign.SAME_THING) & set(foreign.NOT_A_SETTING)
