import pytest

from stoker.config import document
from stoker.config.load import load, load_with_origins
from stoker.config.show import inline, to_yaml


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["task.kind=pretrain"],
        ["adapter.kind=dora", "adapter.targets=[q_proj]", "data.validation=[{path: v.jsonl, limit: 3}]"],
        ["data.validation=0.1", "train.early_stopping={patience: 3}", "train.optimizer={kind: muon}"],
        ["output.questions=['007', 'what: is #this?', \"it's\", 'true', '']".replace(", ''", "")],
        ["data.train.0.fields={messages: 'a b', role: '1'}", "train.learning_rate=1e-12"],
        ["engine.strategy=single"],
        ["engine.strategy=ddp"],
        ["engine.strategy=fsdp2"],
        ["engine.strategy=deepspeed"],
    ],
)
def test_the_resolved_file_loads_to_the_same(minimal, tmp_path, overrides):
    loaded = load_with_origins(minimal, overrides)
    again = tmp_path / "config.yaml"
    again.write_text(to_yaml(loaded.config, loaded.origins))
    assert load(again) == loaded.config


def test_each_line_says_where_its_value_came_from(minimal):
    loaded = load_with_origins(minimal, ["train.seed=7", "train.schedule={kind: wsd}"])
    text = to_yaml(loaded.config, loaded.origins)
    assert f"learning_rate: 0.0002  # {minimal}:5\n" in text
    assert "  seed: 7  # --set train.seed=7\n" in text
    assert "    kind: wsd  # --set train.schedule={kind: wsd}\n    warmup_steps: null  # default\n" in text
    assert "#" not in to_yaml(loaded.config)


@pytest.mark.parametrize(
    "text", ["plain", "org/name-1.5", "builtin:tiny", "5", "true", "~", "a: b", "a #b", "-", "é", " x", '"']
)
def test_text_is_read_back_as_the_same_text(text):
    assert document.scalar(inline(text)) == text
