from dataclasses import replace

import pytest

from stoker.arch import shapes
from stoker.config.load import parse
from stoker.plan import advice
from stoker.plan.advice import QUESTIONS, RULES, Case
from stoker.plan.workload import log_normal, workload

PER_RANK = 2_600_000  # of Llama 3.1 8B, about
SMALL = Case("instructions", 0.4e6, 2000, 300, 8_000_000_000, PER_RANK, 80 * 10**9)


def answer(case, question):
    return next((one for one in advice.advise(case) if one.question == question), None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.question)
def test_each_rule_rests_on_a_source_with_a_link_and_what_was_found(rule):
    assert rule.question in QUESTIONS
    assert rule.sources
    for source in rule.sources:
        assert source.link.startswith("https://")
        assert any(letter.isdigit() for letter in source.found) or source.name in ("rsLoRA", "Tinker's LoRA primer")


def test_each_rule_is_the_answer_for_some_run():
    cases = [
        replace(SMALL, task=task, tokens=tokens, rows=rows, steps=steps, parameters=parameters, device_bytes=memory)
        for task in ("instructions", "continued pre-training")
        for tokens in (None, 1e5, 3e8, 2e10)
        for rows in (None, 500, 10**6)
        for steps in (None, 50, 5000)
        for parameters in (8_000_000_000, 70_000_000_000)
        for memory in (0, 15 * 10**9, 80 * 10**9)
    ]
    used = {
        next(i for i, rule in enumerate(RULES) if rule.question == question and rule.holds(case))
        for case in cases
        for question in QUESTIONS
        if any(rule.question == question and rule.holds(case) for rule in RULES)
    }
    assert used == set(range(len(RULES)))


def test_a_small_set_gets_lora_of_the_lowest_rank_and_a_few_epochs():
    assert answer(SMALL, "method").answer.startswith("LoRA")
    assert answer(SMALL, "rank").answer.startswith("16:")
    assert answer(SMALL, "epochs").answer.startswith("3 or 4")
    assert answer(SMALL, "scale").answer == "alpha = 2 x rank = 32"


def test_rank_follows_the_trained_tokens_and_high_ranks_are_stabilised():
    case = replace(SMALL, tokens=100 * PER_RANK, rows=10**6)
    assert answer(case, "rank").answer.startswith("128:")
    assert "rank-stabilised" in answer(case, "scale").answer
    assert answer(replace(case, tokens=None), "rank").answer.startswith("16 to begin with")


def test_more_tokens_than_an_adapter_holds_ask_for_every_weight_at_lower_rates():
    case = replace(SMALL, task="continued pre-training", tokens=20e9, rows=10**7, steps=10**5)
    assert answer(case, "method").answer.startswith("every weight: the text")
    assert answer(case, "learning rate").answer.startswith("5e-6")
    assert answer(replace(case, parameters=70_000_000_000), "learning rate").answer.startswith("2e-6")
    assert answer(case, "batch") is None
    assert answer(replace(case, task="instructions"), "method").answer.startswith("every weight, or LoRA of rank 256")


def test_a_base_that_leaves_no_room_is_quantised():
    assert answer(replace(SMALL, device_bytes=15 * 10**9), "method").answer.startswith("QLoRA")


def test_short_runs_get_higher_rates_than_those_of_large_models():
    assert answer(replace(SMALL, steps=50), "learning rate").answer.startswith("2e-4 to 5e-4")
    assert answer(replace(SMALL, parameters=70_000_000_000), "learning rate").answer.startswith("2e-5")


def test_a_run_is_read_from_its_configuration_and_its_work():
    values = {
        "model": {"base": "some/model"},
        "data": {"train": [{"path": "rows.jsonl"}], "sequence_length": 2048},
        "train": {"learning_rate": 2e-4, "batch_size": 8},
        "output": {"folder": "runs/x"},
    }
    config, spec = parse(values), shapes.spec("llama-3.1-8b")
    work = workload(config, log_normal(2000, 500.0, 0.4, "a test"))
    case = advice.case_of(config, spec, work, rows=2000)
    assert case.task == "instructions"
    assert case.tokens == pytest.approx(2000 * 500 * 0.4, rel=0.1)
    assert 16 * case.values_per_rank == 41_943_040  # as PEFT counts an adapter of rank 16 on every linear layer
    text = parse(values | {"task": {"kind": "pretrain"}})
    assert advice.case_of(text, spec, work, rows=None).task == "continued pre-training"
    assert advice.case_of(text, spec, work, rows=None).tokens is None
