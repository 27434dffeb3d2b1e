import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stoker.config.axolotl.convert import to_yaml
from stoker.config.axolotl.outcome import KINDS
from stoker.config.axolotl.report import TranslationError
from stoker.config.axolotl.table import KEYS, SECTIONS
from stoker.config.axolotl.translate import translate
from stoker.config.load import load, load_with_origins, parse
from stoker.errors import ConfigError

from .cases import CASES, REFUSED
from .conftest import LORA, MINIMAL

DONE = sorted(set(CASES) - set(REFUSED))


def names(value, prefix=""):
    """Every key of a file that is not a section, counted without the translator's help."""
    if isinstance(value, dict) and value and (not prefix or table_name(prefix) in SECTIONS):
        for key, inner in value.items():
            yield from names(inner, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and value and f"{table_name(prefix)}[]" in {*SECTIONS, *KEYS}:
        for index, inner in enumerate(value):
            yield from names(inner, f"{prefix}[{index}]")
    else:
        yield prefix


def table_name(name):
    for theirs in ("test_datasets", "pretraining_dataset"):
        name = name.replace(theirs, "datasets")
    return "".join(part for part in name if not part.isdigit())


@pytest.mark.parametrize("name", CASES)
def test_every_key_of_a_file_has_one_line_in_the_report(name):
    report = translate(CASES[name], file="their.yml").report

    assert [line.name for line in report.lines] == list(names(CASES[name]))
    assert sum(report.counts().values()) == len(report.lines)
    assert all(line.kind in KINDS and line.text for line in report.lines)


@pytest.mark.parametrize("name", DONE)
def test_usual_files_are_translated(name):
    config = parse(CASES[name])

    assert config.model.base == CASES[name]["base_model"]
    assert config.train.learning_rate == float(CASES[name]["learning_rate"])


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_ask_for_what_is_not_done_are_refused_for_that_alone(name):
    with pytest.raises(TranslationError) as caught:
        parse(CASES[name])

    causes = [line.name for line in caught.value.report.lines if line.kind == "refused" and line.is_cause]
    assert causes == REFUSED[name]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", DONE)
def test_what_is_converted_loads_and_is_the_same(tmp_path, name):
    theirs, ours = tmp_path / "their.yml", tmp_path / "run.yaml"
    theirs.write_text(yaml.safe_dump(CASES[name], sort_keys=False))

    loaded = load_with_origins(theirs)
    ours.write_text(to_yaml(loaded.translation))

    assert load(ours) == loaded.config


def test_comments_stand_where_the_meaning_shifted(tmp_path):
    theirs = tmp_path / "their.yml"
    theirs.write_text(yaml.safe_dump(MINIMAL | {"gradient_accumulation_steps": 2, "warmup_steps": 0.1}))

    text = to_yaml(load_with_origins(theirs).translation)

    assert "batch_size: 2  # rows of an optimiser step over all devices" in text
    assert "warmup_ratio: 0.1  # a fraction of steps is a ratio" in text
    assert "sequence_length: 512  # Axolotl's default" in text


# Unknown keys


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"context_parapllel_size": 2}, "Did you mean context_parallel_size?"),
        ({"lora_rank": 2}, "Did you mean lora_r"),
        ({"field_messages": "x"}, "It belongs elsewhere: datasets[].field_messages."),
        ({"dataset": []}, "Did you mean datasets?"),
        ({"sequence_length": 2048}, "Did you mean sequence_len?"),
        ({"lora": True}, "Did you mean adapter: lora?"),
        ({"zzz": 1}, "Remove it"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_probably_meant(problem, keys, advice):
    assert advice in problem(**keys)


@pytest.mark.parametrize(
    ("keys", "where", "advice"),
    [
        ("datasets: [{path: a, type: alpaca, field_mesages: x}]", "datasets[0].field_mesages", "field_messages"),
        ("fsdp_config: {offload_parms: true}", "fsdp_config.offload_parms", "offload_params"),
        ("special_tokens: {pad_tokn: x}", "special_tokens.pad_tokn", "pad_token"),
        ("special_tokens: {pad: x}", "special_tokens.pad", "Did you mean pad_token?"),
        (
            "gradient_checkpointing_kwargs: {use_rentrant: true}",
            "gradient_checkpointing_kwargs.use_rentrant",
            "reentrant",
        ),
        ("trl: {num_generation: 2}", "trl.num_generation", "num_generations"),
        ("datasets: [{path: a, type: {field_instructions: x}}]", "datasets[0].type.field_instructions", "instruction"),
    ],
)
def test_unknown_keys_are_found_at_every_level_with_their_line(tmp_path, keys, where, advice):
    path = tmp_path / "their.yml"
    head = "base_model: a/b\nlearning_rate: 1e-4\n"
    if not keys.startswith("datasets"):
        head += "datasets: [{path: a, type: alpaca}]\n"
    path.write_text(f"{head}{keys}\n")

    with pytest.raises(ConfigError) as caught:
        load(path)

    (problem,) = caught.value.problems
    assert problem.what == f"{where} is no key of Axolotl's."
    assert problem.where == f"{path}:{head.count(chr(10)) + 1}"
    assert advice in problem.fix


def test_unknown_keys_may_be_let_through(tmp_path):
    path = tmp_path / "their.yml"
    path.write_text(yaml.safe_dump(MINIMAL | {"lora_rnk": 4}))

    loaded = load_with_origins(path, allow_unknown=True)

    (line,) = [line for line in loaded.translation.report.lines if line.name == "lora_rnk"]
    assert line.kind == "no effect"
    assert "let through by --allow-unknown. Did you mean lora_r?" in line.text


def test_a_key_that_is_written_twice_is_refused(tmp_path):
    path = tmp_path / "their.yml"
    path.write_text(yaml.safe_dump(MINIMAL) + "learning_rate: 1\n")

    with pytest.raises(ConfigError, match="learning_rate is set twice"):
        load(path)


def test_a_section_that_is_not_one_is_refused(problem):
    assert problem(special_tokens="<pad>") == (
        'their.yml: special_tokens = "<pad>": it must be a mapping. Write its keys beneath it, such as bos_token: ...'
    )


# What the file says and what the command line says


def test_overrides_are_in_our_terms(tmp_path):
    path = tmp_path / "their.yml"
    path.write_text(yaml.safe_dump(MINIMAL | {"max_steps": 100}))

    config = load(path, ["train.steps=3", "model.base=builtin:tiny-llama"])

    assert (config.train.steps, config.model.base) == (3, "builtin:tiny-llama")


def test_problems_name_the_line_of_their_file(tmp_path):
    path = tmp_path / "their.yml"
    path.write_text("base_model: a/b\nlearning_rate: -1\ndatasets: [{path: a, type: alpaca}]\n")

    with pytest.raises(ConfigError) as caught:
        load(path)

    assert str(caught.value.problems[0]).startswith(f"{path}:2: train.learning_rate = -1")


def test_a_file_of_ours_is_left_alone(write):
    loaded = load_with_origins(
        write("model: {base: a}\ndata: {train: [{path: a}]}\ntrain: {learning_rate: 1}\noutput: {folder: x}")
    )

    assert loaded.translation is None


def test_refusals_that_follow_from_another_key_are_no_problems_of_their_own(translated):
    found = translated(rl="dpo", rl_beta=0.1, trl={"beta": 0.1}, dpo_loss_type=["sigmoid"])

    assert len(found.problems) == 1
    assert len(found.report.of("refused")) == 4


def test_settings_of_samples_have_no_effect_where_none_are_asked_for(line):
    assert line(eval_max_new_tokens=128).kind == "no effect"
    assert line(eval_max_new_tokens=128, eval_table_size=0).kind == "no effect"
    assert line(eval_max_new_tokens=128, eval_table_size=5).kind == "refused"


def test_the_old_name_of_a_split_is_honoured(config):
    source = {"path": "rows.jsonl", "type": "chat_template", "train_on_split": "validation"}
    assert config(datasets=[source]).data.train[0].split == "validation"


def test_keys_that_share_a_reason_share_a_problem(translated):
    (found,) = translated(qat={"weight_dtype": "int4", "group_size": 32}).problems

    assert found.what.startswith("qat.weight_dtype, qat.group_size: quantisation-aware training is not done")


def test_reinforcement_learning_settings_alone_have_no_effect(line):
    assert line(rl_beta=0.1).kind == "no effect"


# Property: any mixture of keys with sound values


SOUND = {
    **{key: value for case in CASES.values() for key, value in case.items() if key not in MINIMAL},
    **LORA,
}


@given(st.sets(st.sampled_from(sorted(SOUND)), max_size=12))
def test_any_choice_of_keys_is_translated_whole_or_refused_with_a_reason(chosen):
    keys = MINIMAL | {key: SOUND[key] for key in chosen}
    found = translate(keys, file="their.yml")

    assert [line.name for line in found.report.lines] == list(names(keys))
    refused = [line for line in found.report.of("refused") if line.is_cause]
    assert bool(refused) == bool(found.problems)
    if not found.problems:
        assert parse(keys).model.base == MINIMAL["base_model"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"datasets": "rows.jsonl"},
            "datasets = rows.jsonl: it must be a list. Write its entries beneath it: - path: rows",
        ),
        (
            {"datasets": ["rows.jsonl"]},
            "datasets[0] = rows.jsonl: it must be a mapping. Write its keys beneath it, such",
        ),
        (
            {"datasets": [{"type": "alpaca"}]},
            "datasets[0].path is missing. Name a file, a folder or a dataset of the Hub.",
        ),
        (
            {"plugins": "x.LigerPlugin"},
            "plugins = x.LigerPlugin: it must be a list. Write its entries beneath it: - x.L",
        ),
        (
            {"plugins": ["axolotl.integrations.liger.LigerPlugn"]},
            "LigerPlugn is no plugin of Axolotl's. Did you mean Li",
        ),
        ({"eos_token": "</s>"}, "eos_token is no key of Axolotl's. It belongs elsewhere: special_tokens.eos_token."),
        ({"optimizer": "adamw_tourch"}, "adamw_tourch is no optimiser that Axolotl knows. Did you mean adamw_torch?"),
        ({"lr_scheduler": "cosin"}, "it is not one of the words that Axolotl knows. Did you mean cosine?"),
        ({"lr_scheduler": "staircase"}, "it is not one of the words that Axolotl knows. Use one of cosine, "),
        ({"learning_rate": None, "learnign_rate": 1e-4}, "learnign_rate is no key of Axolotl's. Did you mean learning"),
        (
            {"datasets": [{"path": "a.jsonl", "type": "chat_template", "message_property_mappings": {"rol": "from"}}]},
            "rol is no key that templates read. Did you mean role?",
        ),
    ],
)
def test_a_mistake_is_named_once_with_what_to_write(problem, keys, said):
    assert said in problem(**keys)


def test_asking_for_both_precisions_is_refused(translated):
    said = [str(found) for found in translated(bf16=True, fp16=True).problems]

    assert len(said) == 2
    assert all("the file asks for bf16 and for fp16. Keep one of them." in one for one in said)
