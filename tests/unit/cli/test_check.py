import json
import subprocess
import sys

import pytest
from rich.console import Console

from stoker.cli import check
from stoker.compose import hardware
from stoker.compose.inspect import inspect
from stoker.config.load import load_with_origins
from stoker.errors import ConfigError, DataError, PlanError
from stoker.plan import choose
from stoker.plan.hardware import Device, Hardware

FRAMEWORKS = {"torch", "transformers", "datasets", "peft"}
REPORT = f"import sys, time; print(time.process_time(), *{FRAMEWORKS} & set(sys.modules))"


def problems(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        check.command(path, list(overrides))
    return [str(problem) for problem in caught.value.problems]


def test_a_sound_run_is_summed_up(write_run, capsys):
    path = write_run(extra="adapter: {rank: 4}")
    check.command(path, [])
    shown = capsys.readouterr().out
    assert "is fine." in shown
    assert "model: llama, 0.1 million parameters" in shown
    assert "LoRA of rank 4 on all-linear" in shown
    assert "1 epoch of 32 sequences a step; learning rate 0.001, cosine schedule, adamw" in shown
    assert f"stoker train {path}" in shown


@pytest.mark.parametrize(
    ("changes", "line", "words"),
    [
        ({"path": "row.jsonl"}, 5, "data.train[0]: row.jsonl does not exist. Did you mean rows.jsonl?"),
        ({"path": "data/*.jsonl"}, 5, "data.train[0]: no file matches data/*.jsonl."),
        ({"path": "builtin:nothing"}, 5, "there are no rows builtin:nothing. Known: builtin:fine-tuning"),
        ({"base": "./modl"}, 2, "model.base: ./modl does not exist. Did you mean model?"),
        ({"base": "rows.jsonl"}, 2, "model.base = rows.jsonl is a file."),
        ({"base": "builtin:huge"}, 2, "there is no such built-in model. Known: builtin:tiny-llama"),
        ({"base": "."}, 2, "the folder holds no config.json."),
        ({"length": "2048"}, 6, "data.sequence_length = 2048: model was made for sequences of at most 1024"),
        ({"extra": "adapter: {targets: [q_prj]}"}, 9, "no layer called q_prj. Did you mean q_proj?"),
    ],
)
def test_what_is_not_there_is_reported_with_its_line(write_run, changes, line, words):
    path = write_run(**changes)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:{line}: ")
    assert words in problem


def test_names_of_template_and_tokenizer_are_looked_at(write_run):
    path = write_run()
    template, tokenizer = problems(path, "model.chat_template=chatmll", "model.tokenizer=./tok")[::-1]
    assert "Did you mean chatml? Use one of alpaca, chatml" in template
    assert "./tok does not exist" in tokenizer
    check.command(path, ["model.chat_template=chatml"])


def test_the_template_and_the_split_of_a_source_are_looked_at(write_run):
    path = write_run()
    source = "{path: rows.jsonl, split: train+test, chat: {chat_template: lama3}}"
    split, template = problems(path, f"data.train=[{source}]")
    assert "data.train[0].split = 'train+test' is not a split." in split
    assert "data.train[0].chat.chat_template = lama3 is neither" in template
    assert "Did you mean llama3?" in template
    good = "{path: rows.jsonl, split: 'train[:20%]', chat: {chat_template: tokenizer_default_fallback_llama3}}"
    check.command(path, [f"data.train=[{good}]"])
    # The datasets library adds splits of a Hub dataset up; files that Stoker reads itself have none to add.
    check.command(path, ["data.train=[{path: owner/name, split: train+test}]"])


def test_an_architecture_that_no_path_takes_is_named(write_run):
    (problem,) = problems(write_run(config={"model_type": "nobody_knows"}))
    assert 'model_type "nobody_knows" is neither native nor a causal language model of Transformers' in problem


def test_what_no_family_reads_is_run_through_transformers_and_check_says_so(write_run, capsys):
    check.command(write_run(config={"model_type": "bloom", "hidden_size": 32, "n_head": 4}))
    assert "bloom, through Transformers' BloomForCausalLM" in capsys.readouterr().out


def test_a_folder_with_pickled_weights_alone_is_refused_before_the_run(write_run, here):
    path = write_run()
    weights = here / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    (here / "model" / "pytorch_model.bin").write_bytes(b"")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:2: ")
    assert "pickled (pytorch_model.bin)" in problem
    weights.write_bytes(kept)
    check.command(path, [])


def test_weights_that_are_missing_are_named_before_the_run(write_run, here, weight_names, write_weights):
    path, names = write_run(), weight_names
    write_weights(here / "model", [*names[:3], *names[4:], "extra.weight"])
    missing, unexpected, remedy = problems(path)
    assert missing == f"model: tensor {names[3]} is missing."
    assert unexpected == "model: tensor extra.weight is not part of this architecture."
    assert "do not fit config.json" in remedy
    (here / "model" / "model.safetensors").unlink()
    (problem,) = problems(path)
    assert "there are no weights" in problem


def test_a_shard_that_is_missing_is_named(write_run, here, weight_names):
    path = write_run()
    names, folder = weight_names, here / "model"
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shards = dict.fromkeys(names, "one.safetensors") | {names[-1]: "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (problem,) = problems(path)
    assert "the shard two.safetensors, which the index names, is missing" in problem
    (folder / "two.safetensors").write_bytes((folder / "one.safetensors").read_bytes()[:-4])
    (problem,) = problems(path)
    assert "not a whole safetensors file" in problem


def test_a_missing_tokenizer_is_named_unless_another_is(write_run, here):
    path = write_run()
    (here / "model" / "tokenizer.json").rename(here / "tokenizer.json")
    (problem,) = problems(path)
    assert problem.startswith("model: there is no tokenizer: none of tokenizer.json, ")
    check.command(path, ["model.tokenizer=."])


def test_a_broken_config_json_is_named(write_run, here):
    path = write_run()
    (here / "model" / "config.json").write_text("{")
    (problem,) = problems(path)
    assert "config.json cannot be read" in problem


def test_an_empty_data_file_is_reported(write_run, here):
    path = write_run()
    (here / "rows.jsonl").write_text("")
    assert "rows.jsonl is empty" in problems(path)[0]


def test_names_that_may_be_hub_ids_are_accepted_and_said_to_be(write_run, capsys):
    check.command(write_run(base="some/model", path="some/rows"), [])
    shown = capsys.readouterr().out
    assert "some/model: no folder of this name here, so it is taken for a Hub id" in shown
    assert "some/rows: not found here, taken for a Hub id" in shown


def test_a_folder_that_holds_a_run_is_mentioned(write_run, here, capsys):
    path = write_run()
    (here / "runs" / "x" / "checkpoints").mkdir(parents=True)
    check.command(path, [])
    assert "--resume or --overwrite" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_reported_with_its_line(write_run, capsys):
    (problem,) = problems(path := write_run(), "output.folder=rows.jsonl/x")
    assert problem.startswith("--set output.folder=rows.jsonl/x: output.folder rows.jsonl/x cannot be made: rows.jsonl")
    assert "fine" not in capsys.readouterr().out
    path.write_text(path.read_text().replace("runs/x", "rows.jsonl"))
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:8: output.folder rows.jsonl cannot be made")


def test_checking_takes_under_a_second_and_imports_no_framework(write_run):
    path = write_run(extra="adapter: {rank: 4}")
    code = f"from pathlib import Path; from stoker.cli import check; check.command(Path({str(path)!r}), []); {REPORT}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *frameworks = result.stdout.splitlines()[-1].split()
    assert frameworks == []
    # Of the processor's time, start of Python included: a busy machine must not fail this.
    assert float(seconds) < 1.0


@pytest.mark.parametrize("name", ["preference", "chat_template.argilla", "unpaired", "stepwise"])
def test_rows_that_judge_answers_are_refused_where_the_format_tells(write_run, name):
    path = write_run()
    (problem,) = problems(path, f"data.train=[{{path: rows.jsonl, format: {name}}}]")
    assert f"data.train[0].format = {name}: " in problem
    assert "which task sft does not learn from" in problem


PAIR = '{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (PAIR, "rows.jsonl: the rows are pairs (preference, detected: "),
        ('{"prompt": "1 + 1?", "completion": "2", "label": true}\n', "rows.jsonl: the rows are labelled (unpaired, "),
        ('{"a": 1}\n', "rows.jsonl: the rows fit no known format; their fields are: a."),
        ("{\n", "rows.jsonl:1: the first row is malformed: "),
        ("\n", "rows.jsonl: the source holds no rows."),
    ],
)
def test_the_first_rows_are_refused_as_training_refuses_them(write_run, here, content, words):
    path = write_run()
    (here / "rows.jsonl").write_text(content)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:5: data.train[0]: ")
    assert words in problem
    (here / "sound.jsonl").write_text('{"text": "a"}\n')
    (problem,) = problems(path, "data.train=[{path: sound.jsonl}]", "data.validation=[{path: rows.jsonl}]")
    assert words in problem


@pytest.mark.parametrize(
    ("format_name", "content", "refused"),
    [
        (
            "completion",
            '{"text": "a"}\n{"body": "b"}\n',
            "rows.jsonl:2: field 'text' is missing or null; ",
        ),
        ("chat", '{"body": "b"}\n', "rows.jsonl:1: field 'messages' (or 'conversations') is missing or null; "),
        ("alpaca", '{"instruction": "a"}\n', "rows.jsonl:1: field 'output' is missing or null; "),
        ("tokenized", '{"input_ids": [1, 2], "labels": [1]}\n', "field 'labels' has 1 entries for 2 token ids."),
        ("completion", '{"text": "a"}\n{"text" "b"}\n', "rows.jsonl:2: the line is not JSON: "),
        ("auto", '{"text": "a"}\n{"text": 3}\n', "rows.jsonl:2: field 'text' is int, not text."),
    ],
)
def test_rows_that_training_would_stop_at_are_refused_in_its_words(write_run, here, format_name, content, refused):
    path = write_run(base="builtin:tiny-llama")
    (here / "rows.jsonl").write_text(content)
    rows = (f"data.train=[{{path: rows.jsonl, format: {format_name}}}]", f"data.cache_folder={here}")
    (problem,) = problems(path, *rows)
    assert refused in problem
    with pytest.raises(DataError) as stopped:
        inspect(load_with_origins(path, list(rows)).config, rows=1, split="train", console=Console(quiet=True))
    assert problem.endswith(f"data.train[0]: {stopped.value}")
    check.command(path, [*rows, "data.on_bad_row=skip"])


CPU = Hardware((Device("cpu", "CPU (toy)", 2**33),))
GPU = Hardware((Device("cuda", "Tesla T4", 2**33, compute_capability=(7, 5), triton=True), *CPU.devices))


@pytest.mark.parametrize(
    ("machine", "wish", "words"),
    [
        (CPU, "engine.offload_activations=14", "= 14 needs a CUDA GPU; this run uses CPU (toy). Use false or auto. "),
        (CPU, "engine.offload_activations=true", "= true needs a CUDA GPU; this run uses CPU (toy). "),
        (CPU, "engine.kernels=triton", "Triton's kernels need a CUDA GPU, and this is a CPU. Use reference, or auto. "),
        (CPU, "engine.precision=fp16", "needs a GPU; this run is on the CPU. "),
        (GPU, "engine.precision=bf16", "= bf16, but Tesla T4 does not compute in it. Use fp16 or auto. "),
    ],
)
@pytest.mark.parametrize("base", ["model", "someone/their-model"])
def test_what_this_machine_has_not_is_refused_as_training_refuses_it(
    write_run, monkeypatch, base, machine, wish, words
):
    monkeypatch.setattr(hardware, "look", lambda: machine)
    path = write_run(base=base, extra=f"engine: {{{wish.partition('.')[2].replace('=', ': ')}}}")
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:9: {wish.replace('=', ' = ').partition(' ')[0]} = ")
    assert words in problem
    assert problem.endswith("If it is for another machine, name that one's engine.device.")
    with pytest.raises(PlanError) as refused:
        choose.check_device(load_with_origins(path, []).config, None, machine)
    assert f"{path}:9: {refused.value}" in problem


def test_a_yaml_that_names_a_device_of_another_machine_is_not_held_against_this_one(write_run, monkeypatch):
    monkeypatch.setattr(hardware, "look", lambda: CPU)
    check.command(write_run(), ["engine.device=cuda", "engine.offload_activations=1", "engine.kernels=triton"])
    (problem,) = problems(write_run(), "engine.device=cpu", "engine.kernels=triton")
    assert problem.endswith("Use reference, or auto.")


def test_rows_are_looked_at_in_the_fields_that_they_have(write_run, here):
    path = write_run()
    (here / "rows.jsonl").write_text('{"body": "a"}\n')
    check.command(path, ["data.train=[{path: rows.jsonl, fields: {text: body}}]"])
    (problem,) = problems(path, "data.train=[{path: rows.jsonl, format: completion, fields: {messages: body}}]")
    assert "fields names 'messages', which the format completion does not have" in problem


def test_rows_that_only_a_count_of_all_can_find_are_not_looked_at(write_run, here):
    path = write_run()
    (here / "rows.jsonl").write_text(PAIR + '{"text": "a"}\n')
    assert "are pairs" in problems(path, "data.train=[{path: rows.jsonl, limit: 1}]")[0]
    check.command(path, ["data.train=[{path: rows.jsonl, split: 'train[1:]'}]"])
    check.command(path, ["data.train=[{path: rows.jsonl, split: 'train[:50%]'}]"])
