import json

from stoker.plan.choose import choose
from stoker.plan.plan import CHOICES, size


def test_the_plan_is_json_with_reasons_and_bytes(run, llama_8b, machine):
    plan = choose(run(), llama_8b, machine(80))
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["reasons"]["device"] == "GPU"
    assert values["memory"]["total_bytes"] == plan.memory.total
    assert values["memory"]["weights_bytes"] == plan.memory.weights
    assert values["micro_batch_size"] == plan.micro_batch_size


def test_the_table_shows_each_choice_with_its_reason(run, llama_8b, machine):
    plan = choose(run(), llama_8b, machine(80))
    lines = plan.table().splitlines()
    shown = [name for name in CHOICES if getattr(plan, name) is not None]
    assert "keep_transposed" not in shown  # there is no fp8 in this run
    for line, name in zip(lines, shown, strict=False):
        chosen = getattr(plan, name)
        value = ("yes" if chosen else "no") if isinstance(chosen, bool) else str(chosen)
        assert line.startswith(name)
        assert line.endswith(plan.reasons[name])
        assert f"  {value}  " in line
    assert "8.1B" in plan.table()


def test_the_ladder_is_said_in_words(run, llama_8b, machine):
    asked = ("data.sequence_length=4096", "engine.micro_batch_size=2")
    plan = choose(run(*asked), llama_8b, machine(42))
    assert plan.recompute == "keep all in 31 layers, mixer in 1"
    assert plan.recompute in plan.table()
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["recompute"] == plan.recompute
    assert values["keep"] == ["mixer"] + ["all"] * 31


def test_sizes_are_for_people():
    assert size(3 * 2**29) == "1.5 GiB"
    assert size(5 * 2**20) == "5 MiB"
