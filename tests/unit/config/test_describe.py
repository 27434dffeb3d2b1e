import pytest

from stoker.config import describe, schema


@pytest.mark.parametrize(
    ("section", "name", "phrase"),
    [
        (schema.Train, "batch_size", "a whole number of at least 1"),
        (schema.Train, "max_gradient_norm", "a number above 0, or null"),
        (schema.Cosine, "floor", "a number from 0 to 1"),
        (schema.Adapter, "dropout", "a number of at least 0 and below 1"),
        (schema.AdamW, "betas", "a list of 2 numbers"),
        (schema.Engine, "num_threads", "auto, or a whole number of at least 1"),
        (schema.Output, "trackers", "auto, or a list of tensorboard, wandb or mlflow"),
        (schema.RunConfig, "task", "a section with kind: sft or pretrain"),
    ],
)
def test_what_a_field_may_hold_reads_as_a_phrase(section, name, phrase):
    assert describe.expectation(describe.annotations(section)[name]) == phrase


def test_a_section_is_found_by_the_kind_in_the_values_or_the_default_kind():
    at = describe.section_at
    assert at(("train", "schedule"), {"train": {"schedule": {"kind": "wsd"}}}) is schema.WarmupStableDecay
    assert at(("train", "schedule"), {"train": {"schedule": {"floor": 0.1}}}) is schema.Cosine
    assert at(("data", "validation", 0), {"data": {"validation": [{}]}}) is schema.Source
    assert at(("train", "seed"), {"train": {"seed": 1}}) is None


def test_every_setting_is_documented():
    undocumented = [path for path, field in describe.walk() if not field.description]
    assert undocumented == []
