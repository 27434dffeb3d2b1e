"""What a user gets wrong: each mistake has its own message, exit code 2 and no traceback."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def own_model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def missing_folder(values, model, folder):
    values["model"]["base"] = "./nowhere"
    return "nowhere"


def unknown_architecture(values, model, folder):
    edit_json(model / "config.json", model_type="rwkv9")
    return "rwkv9"


def no_chat_template(values, model, folder):
    (model / "chat_template.jinja").unlink()
    return "no chat template"


def empty_dataset(values, model, folder):
    (folder / "train.jsonl").write_text("")
    return "train.jsonl"


def broken_line(values, model, folder):
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    return "train.jsonl:25"


def wrong_fields(values, model, folder):
    (folder / "train.jsonl").write_text('{"frage": "a", "antwort": "b"}\n')
    return "frage"


def pairs_without_a_task(values, model, folder):
    (folder / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    return "the rows are pairs (preference"


def format_that_is_not_read(values, model, folder):
    values["data"]["train"][0]["format"] = "reflection"
    return "format = 'reflection' is not read"


def too_long(values, model, folder):
    values["data"] |= {"sequence_length": 16, "on_long": "stop"}
    return "train.jsonl:1"


def longer_than_the_model(values, model, folder):
    values["data"]["sequence_length"] = 4096
    return "at most 1024"


def pickled_weights(values, model, folder):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return "pickled"


def missing_shard(values, model, folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "missing"


def shard_outside(values, model, folder):
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "not a file directly in this folder"


def nothing_trained(values, model, folder):
    values["data"]["train_on"] = ["narrator"]
    return "narrator"


def no_such_target(values, model, folder):
    values["adapter"]["targets"] = ["query_key_value"]
    return "query_key_value"


CASES = [
    missing_folder,
    unknown_architecture,
    no_chat_template,
    empty_dataset,
    broken_line,
    wrong_fields,
    pairs_without_a_task,
    format_that_is_not_read,
    too_long,
    longer_than_the_model,
    pickled_weights,
    missing_shard,
    shard_outside,
    nothing_trained,
    no_such_target,
]


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_mistake_is_named_without_a_traceback(stoker, run_values, write_yaml, own_model, tmp_path, spoil):
    run_values["model"]["base"] = str(own_model)
    expected = spoil(run_values, own_model, tmp_path)
    done = stoker("train", write_yaml(run_values), code=2)
    assert expected in done.stderr
    assert done.stderr.startswith("error:")
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/config.yaml").exists(), "a run that did not begin must not claim its folder"
