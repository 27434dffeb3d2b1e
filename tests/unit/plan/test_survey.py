from dataclasses import replace

import pytest

from stoker.errors import ConfigError
from stoker.plan import explain, scaling, speed, survey_text
from stoker.plan.catalogue import shipped
from stoker.plan.gathered import passing
from stoker.plan.survey import Request, allowed_methods, methods_of, simplest, survey
from stoker.plan.verdict import pareto, verdict
from stoker.plan.workload import log_normal

NAMES = ("t4", "rtx4090", "a100-80", "h100")
DEVICES = [shipped()[name] for name in NAMES]
DOCUMENTS = log_normal(20_000, 450, 0.4, "a test")


@pytest.fixture
def ask(run, llama_8b):
    def build(
        *overrides, methods=("lora", "nf4"), documents=DOCUMENTS, devices=DEVICES, every_strategy=False, **changes
    ):
        request = Request(run(*overrides), llama_8b, documents, methods, **changes)
        offers = survey(request, devices, every_strategy=every_strategy)
        return request, offers, verdict(request, offers)

    return build


def test_every_device_and_method_is_there_and_what_fits_comes_first_by_time(ask):
    _, offers, _ = ask()
    assert len(offers) == 8
    fits = [one.fits for one in offers]
    assert fits == sorted(fits, reverse=True)
    times = [one.step.seconds for one in offers if one.fits]
    assert times == sorted(times)
    (t4,) = [one for one in offers if not one.fits]
    assert (t4.device.key, t4.method) == ("t4", "lora")
    assert "GiB" in t4.why


def test_categories_of_memory_add_up_to_the_plan(ask):
    for one in ask(methods=("full", "lora", "nf4", "int8", "fp8"))[1]:
        if one.fits:
            assert sum(one.memory().values()) == one.plan.memory.total
            assert all(count >= 0 for count in one.memory().values())
            assert (one.memory()["adapters"] == 0) == (one.method == "full")


def test_hours_and_cost_are_those_of_all_steps(ask):
    one = next(one for one in ask()[1] if one.device.key == "h100" and one.method == "lora")
    assert one.hours == pytest.approx(one.work.steps * one.step.seconds / 3600, rel=0.05)
    assert one.usd == pytest.approx(one.hours * one.device.price.usd_per_hour)


def test_a_deadline_takes_the_cheapest_in_time_and_a_budget_the_fastest_for_the_money(ask):
    _, offers, free = ask()
    fitting = [one for one in offers if one.fits]
    limit = sorted(one.hours for one in fitting)[2]
    _, _, hurried = ask(deadline_hours=limit)
    in_time = [one for one in fitting if one.hours <= limit]
    assert hurried.best.usd <= 1.1 * min(one.usd for one in in_time)
    assert hurried.best.hours <= limit
    money = sorted(one.usd for one in fitting)[2]
    _, _, thrifty = ask(budget_usd=money)
    assert thrifty.best.usd <= money
    assert thrifty.best.hours <= 1.1 * min(one.hours for one in fitting if one.usd <= money)
    assert free.best.name in {one.name for one in fitting}


def test_what_no_candidate_keeps_to_is_said_with_the_nearest(ask):
    _, _, found = ask(deadline_hours=0.001)
    assert found.best is None
    assert "the fastest is H100 SXM" in found.because
    _, _, unknown = ask(documents=None, deadline_hours=1.0)
    assert "not known" in unknown.because


def test_nothing_fits_and_what_would_is_said(ask):
    _, offers, found = ask(methods=("full",), devices=[shipped()["t4"]])
    assert not offers[0].fits
    assert found.best is None
    assert any("Tesla T4" in sentence for sentence in found.would_change)


def test_a_quantised_base_must_gain_to_be_recommended(ask):
    # On a roomy card NF4 is slower than the base as it is.
    _, _, found = ask(devices=[shipped()["h100"]])
    assert found.best.method == "lora"


def test_the_runner_up_is_on_another_device_and_a_price_would_change_the_answer(ask):
    _, _, found = ask()
    assert found.second.device.key != found.best.device.key
    assert "x the time" in found.runner_up
    dearer = found.best.device
    assert any("would win" in sentence for sentence in found.would_change)
    price = replace(dearer.price, usd_per_hour=100 * dearer.price.usd_per_hour)
    others = [replace(one, price=price) if one.key == dearer.key else one for one in DEVICES]
    _, _, changed = ask(devices=others)
    assert changed.best.device.key != dearer.key


def test_more_memory_is_named_where_it_would_spare_time(ask):
    _, _, found = ask("data.sequence_length=4096", methods=("lora",), devices=[shipped()["rtx4090"]])
    assert any("GiB nothing would be computed again" in sentence for sentence in found.would_change)


def test_without_prices_the_fastest_is_recommended(ask):
    bare = [replace(one, price=None) for one in DEVICES]
    _, offers, found = ask(devices=bare)
    assert found.best is offers[0]
    assert pareto(offers) == []


def test_no_candidate_beats_one_of_the_pareto_line(ask):
    _, offers, _ = ask()
    line = pareto(offers)
    for one in line:
        for other in offers:
            if other.fits and other is not one:
                assert other.step.seconds >= one.step.seconds or other.usd_per_step > one.usd_per_step


def test_methods_are_what_the_yaml_leaves_open(run):
    assert allowed_methods(run()) == ("lora", "nf4", "int8", "fp8")
    assert allowed_methods(run("model.quantization=nf4")) == ("nf4",)
    assert allowed_methods(run("model.quantization=none")) == ("lora",)
    assert allowed_methods(run("adapter=null")) == ("full",)
    assert methods_of("nf4, full") == ("full", "nf4")
    with pytest.raises(ConfigError, match="qlora is no method"):
        methods_of("qlora")


def test_the_table_has_a_line_for_each_and_json_has_it_all(ask):
    request, offers, found = ask()
    lines = survey_text.table(offers).splitlines()
    assert len(lines) == 8
    assert survey_text.misfits(offers) == []
    values = survey_text.to_dict(request, offers, found)
    assert len(values["offers"]) == 8
    assert values["recommended"] == found.best.name
    text = "\n".join(survey_text.summary(request, found))
    assert text.startswith(f"Recommended: {found.best.name}")


@pytest.mark.slow
@pytest.mark.parametrize("category", explain.CATEGORIES)
def test_every_category_has_its_formula_with_numbers(ask, category):
    request, offers, _ = ask()
    text = explain.explain(request, offers[0], category)
    assert category in text
    assert any(letter.isdigit() for letter in text)


@pytest.mark.parametrize(
    ("reshards", "said", "explained"),
    [
        ("true", "are let go after their forward and gathered again", "gathered again for their backward"),
        ("false", "stay gathered until their backward", "gathered once a micro-batch"),
    ],
)
def test_a_plan_says_when_gathered_layers_are_let_go(ask, reshards, said, explained):
    asked = ("engine.strategy=fsdp2", f"engine.fsdp2.reshard_after_forward={reshards}", "train.batch_size=4")
    request, offers, found = ask(*asked, methods=("lora",), devices=[shipped()["h100"]], per_node=2)
    alone, two = (next(one for one in offers if one.num_devices == count) for count in (1, 2))
    assert f"layers {said}" in survey_text.summary(request, replace(found, best=two))[0]
    assert "gathered" not in survey_text.summary(request, replace(found, best=alone))[0]
    assert f"layers are {explained}" in explain.explain(request, two, "communication")


def test_what_passes_is_explained_by_the_figures_that_time_is_counted_with(ask):
    request, offers, _ = ask(
        "train.batch_size=4", methods=("nf4",), devices=[shipped()["h100"]], per_node=2, every_strategy=True
    )
    two = next(one for one in offers if one.spread.stage == 3)
    text = explain.explain(request, two, "communication")
    sizes = speed.sizes_of(two.config, request.spec, two.plan)
    come = passing(request.spec, two.plan.spread, sizes).per_step(two.plan.accumulation_steps, 2)
    assert f"{come / 1e9:,.2f} GB come into a device" in text
    # Of NF4's bytes, embedding and head in bf16 are a third, and two of 32 layers a sixteenth of what is left.
    tables, whole = 2 * 2 * 128256 * 4096, sizes.base + sizes.trained_bytes
    assert f"{(tables + (whole - tables) / 16) / whole:.1%} of the weights gathered at a time" in text


def test_several_devices_stand_beside_one_with_every_strategy(ask):
    _, offers, _ = ask(methods=("lora",), devices=[shipped()["h100"]], per_node=8, every_strategy=True)
    assert {one.num_devices for one in offers} == {1, 2, 4, 8}
    eight = [one for one in offers if one.num_devices == 8]
    assert {one.spread.name for one in eight} == {"ddp", "fsdp2", "ZeRO-1", "ZeRO-2", "ZeRO-3"}
    one = next(one for one in offers if one.num_devices == 1)
    best = min(eight, key=lambda one: one.step.seconds)
    assert one.step.seconds / 8 < best.step.seconds < one.step.seconds / 4
    assert best.usd_per_step > one.usd_per_step
    assert best.tokens_per_second == pytest.approx(one.tokens_per_second * one.step.seconds / best.step.seconds)
    for offer in offers:
        assert sum(offer.memory().values()) == offer.plan.memory.total
        assert offer.memory()["communication"] > 0 or offer.num_devices == 1


@pytest.mark.parametrize("methods", [("lora", "nf4"), ("full",)])
def test_strategies_that_are_left_out_would_not_have_been_shown(ask, methods):
    devices = [shipped()[name] for name in ("t4", "rtx4090", "h100")]
    asked = {"methods": methods, "devices": devices, "per_node": 4, "nodes": 2}
    _, some, found = ask(**asked)
    _, every, same = ask(**asked, every_strategy=True)
    assert {one.name for one in some} <= {one.name for one in every}
    assert len(some) < len(every) or methods == ("full",)  # of which communication takes more than is looked away from

    def shown(offers):
        return {(one.name, one.choice.best.rows, one.step_seconds) for one in simplest(offers)}

    assert shown(some) == shown(every)
    assert found.best.name == same.best.name
    assert found.runner_up == same.runner_up


def test_several_are_never_recommended_where_one_is_cheaper_unless_time_is_short(ask):
    one, many = shipped()["h100"], {"per_node": 8, "devices": [shipped()["h100"]], "methods": ("lora",)}
    _, offers, found = ask(**many)
    assert found.best.num_devices == 1
    assert any("8 x H100" in sentence for sentence in found.would_change)
    alone = next(offer for offer in offers if offer.num_devices == 1)
    _, _, hurried = ask(deadline_hours=alone.hours / 3, **many)
    assert hurried.best.num_devices == 4
    _, _, rich = ask(budget_usd=1.2 * alone.usd, **many)
    assert rich.best.num_devices > 1
    assert rich.best.hours < alone.hours
    # A network so slow that a second node only waits: one device is faster, and stays so whatever there is to spend.
    slow = [replace(one, network=1e6, device_link=0.0, host_link=1e6)]
    _, _, waiting = ask(budget_usd=1000.0, per_node=8, nodes=2, devices=slow, methods=("lora",))
    assert waiting.best.num_devices == 1


def test_full_fine_tuning_of_8b_takes_several_devices_that_share_the_weights(ask):
    many = {"per_node": 8, "devices": [shipped()["a100-80"]], "methods": ("full",)}
    _, offers, found = ask("adapter=null", **many)
    assert not any(one.fits for one in offers if one.num_devices == 1)
    assert found.best.num_devices > 1
    assert found.best.spread.weight_shards > 1 or found.best.spread.stage > 0


def test_scaling_is_told_for_each_number_up_to_all_nodes(ask):
    request, offers, found = ask(
        "train.batch_size=64", methods=("lora",), devices=[shipped()["h100"]], per_node=8, nodes=8
    )
    made = scaling.scaling(found.best, offers)
    assert [one.num_devices for one in made] == [1, 2, 4, 8, 16, 32, 64]
    assert made[0].speed_up == made[0].efficiency == 1.0
    efficiencies = [one.efficiency for one in made]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert [one.nodes for one in made][-1] == 8
    text = "\n".join(scaling.lines(found.best, offers))
    assert "64 (8 nodes)" in text
    assert text.splitlines()[1].split()[-3:] == ["communication", "hours", "cost"]  # as a step's part is called
    (last,) = [one for one in offers if one.num_devices == 64 and one.spread.name == made[-1].strategy]
    assert made[-1].communication_share == last.step.communication / last.step.seconds > 0
    assert survey_text.to_dict(request, offers, found)["scaling"][-1]["num_devices"] == 64


def test_rows_that_cannot_be_dealt_out_are_said(ask):
    _, offers, _ = ask("train.batch_size=12", methods=("lora",), devices=[shipped()["h100"]], per_node=8)
    eight = [one for one in offers if one.num_devices == 8]
    assert not any(one.fits for one in eight)
    assert all("cannot be dealt out to 8 devices" in one.why for one in eight)


def test_a_micro_batch_larger_than_what_devices_have_of_a_step_is_said(ask):
    settings = ("train.batch_size=8", "engine.micro_batch_size=2")
    _, offers, _ = ask(*settings, methods=("lora",), devices=[shipped()["h100"]], per_node=8)
    assert {one.num_devices for one in offers if one.fits} == {1, 2, 4}
    eight = [one for one in offers if one.num_devices == 8]
    assert eight
    assert all("does not divide the one sequence a step of each of 8 devices" in one.why for one in eight)


def test_a_cpu_among_several_devices_is_said_to_be_alone(ask):
    request, offers, _ = ask(devices=[shipped()["cpu"]], methods=("lora",), per_node=2)
    assert {one.num_devices for one in offers} == {1}
    assert any("a CPU is planned for alone" in sentence for sentence in survey_text.notes(request, offers))


def test_a_cpu_of_the_catalogue_has_a_cpus_efficiencies(ask):
    request, offers, _ = ask(devices=[shipped()["cpu"], shipped()["t4"]], methods=("nf4",))
    sources = [sentence for sentence in survey_text.notes(request, offers) if sentence.startswith("Efficiencies")]
    assert len(sources) == 2
    assert "a Xeon's" in " ".join(sources)
