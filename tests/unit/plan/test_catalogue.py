import pytest

from stoker.errors import ConfigError
from stoker.plan import catalogue
from stoker.plan.catalogue import BASES, DTYPES, PRICE_CLASSES, by_name, find, shipped, with_devices, with_file

GIB = 2**30
ALL = list(shipped().values())


def test_there_are_about_35_devices_each_with_its_source():
    assert 33 <= len(ALL) <= 40
    assert all(len(one.source) > 10 and one.basis in BASES for one in ALL)
    assert len({one.name for one in ALL}) == len(ALL)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.key)
def test_figures_of_a_device_agree_with_one_another(one):
    assert set(one.rates) <= set(DTYPES)
    # Never slower in fewer bits, and no card has more than 32 times its fp32 rate: a rate with sparsity would.
    known = [one.rates[dtype] for dtype in DTYPES if dtype in one.rates and dtype not in ("fp16", "bf16")]
    assert known == sorted(known)
    assert one.rates.get("fp16", one.rates["fp32"]) >= one.rates.get("tf32", one.rates["fp32"])
    if one.bf16 and one.vendor != "cpu":
        assert one.rates["bf16"] == one.rates["fp16"]
    if one.fp8:
        assert one.rates["fp8"] / one.rates["bf16"] == pytest.approx(2.0, rel=0.03)
    assert 8 * GIB < one.memory_bytes < 200 * GIB
    # Matrix operations a byte of memory: from 10 (a CPU, Pascal) to some 400 (Ada).
    assert 5 < max(one.rates.values()) / one.bandwidth < 900


@pytest.mark.parametrize("one", [one for one in ALL if one.vendor == "nvidia"], ids=lambda one: one.key)
def test_what_an_nvidia_card_computes_in_follows_from_its_capability(one):
    assert one.bf16 == (one.compute_capability >= (8, 0))
    assert ("tf32" in one.rates) == (one.compute_capability >= (8, 0))
    assert one.fp8 == (one.compute_capability >= (8, 9))
    assert one.device().triton == (one.compute_capability >= (7, 0))
    assert one.host_link > 0


def test_prices_have_a_date_and_a_source():
    priced = [one.price for one in ALL if one.price]
    assert len(priced) >= 10
    assert all(0.1 < one.usd_per_hour < 15 and one.kind in PRICE_CLASSES for one in priced)
    assert all(one.date[:2] == "20" and len(one.source) > 10 for one in priced)


@pytest.mark.parametrize(
    ("name", "key"),
    [("a100-80", "a100-80"), ("A100 80", "a100-80"), ("4090", "rtx4090"), ("RTX 4090", "rtx4090"), ("t4", "t4")],
)
def test_names_are_found_however_they_are_written(name, key):
    assert find([name], shipped())[0].key == key


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean .*h200"):
        find(["h202"], shipped())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_names_that_pytorch_gives_are_known(name, key):
    found = by_name(name, shipped())
    assert (found.key if found else None) == key


def test_a_file_adds_a_device_and_changes_a_price(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        "[t4]\nprice = 0.2\n[mine]\nname = 'Mine'\nmemory_gib = 20\nbandwidth = 500\nrates = {fp32 = 20, bf16 = 80}\n"
    )
    found = with_file(file)
    assert found["t4"].price.usd_per_hour == 0.2
    assert found["t4"].bandwidth == shipped()["t4"].bandwidth
    assert found["mine"].bf16
    assert found["mine"].basis == "yours"
    assert "mine" not in shipped()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[x]\nbandwidth = 1", "lacks rates, memory_gib"),
        ("[t4]\nbandwidth = -1", "not a number above zero"),
        ("[t4]\nrates = {bf16 = 3}", "fp32 among them"),
        ("[t4]\nspeed = 3", "unknown keys: speed"),
        ("t4 = 3", "is no table"),
        ("[t4", "is not TOML"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, text, what):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=what):
        with_file(file)


def test_a_name_in_place_of_a_file_is_told_where_names_go(tmp_path):
    with pytest.raises(ConfigError, match=r"h100 cannot be read.*names of known ones go to --gpu"):
        with_file(tmp_path / "h100")


def test_a_device_is_plain_json():
    values = catalogue.facts(shipped()["h100"])
    assert values["price"]["usd_per_hour"] > 1
    assert values["rates"]["bf16"] == 989.5e12


def test_devices_of_the_yaml_are_as_their_like_but_for_what_they_say():
    known = with_devices({"mine": {"like": "h100", "price": 1.99}, "t4": {"price": 0.1}}, "run.yaml: plan.devices")
    mine, h100 = known["mine"], known["h100"]
    assert (mine.name, mine.memory_bytes, dict(mine.rates)) == ("mine", h100.memory_bytes, dict(h100.rates))
    assert mine.price.usd_per_hour == 1.99
    assert mine.source == "run.yaml: plan.devices"
    assert known["t4"].price.usd_per_hour == 0.1
    own = {"memory_gib": 48, "bandwidth": 900, "rates": {"fp32": 50, "bf16": 100}}
    odd = with_devices({"odd": own, "h100": {"memory_gb": 64}}, "run.yaml")
    assert odd["odd"].memory_bytes == pytest.approx(0.985 * 48 * 2**30)
    assert odd["h100"].memory_bytes == pytest.approx(0.985 * 64e9)


@pytest.mark.parametrize(
    ("facts", "what", "fix"),
    [
        ({"like": "h10"}, "like = 'h10' is no device", "Did you mean h100"),
        ({"like": "h100", "bandwith": 5}, "unknown keys: bandwith", "Did you mean bandwidth"),
        ({"bandwidth": 5}, "lacks rates, memory_gib", "gpus.toml"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused_with_the_nearest(facts, what, fix):
    with pytest.raises(ConfigError) as caught:
        with_devices({"mine": facts}, "run.yaml")
    assert what in str(caught.value)
    assert fix in str(caught.value)
