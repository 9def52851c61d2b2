"""The planner's objectives and prices: what is understood, and what the messages say about what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim import prices
from sim.planner.objectives import Objective, ObjectiveError, parse, shown
from sim.prices import PriceError

UNDERSTOOD = [
    ("p99_wait<8s", "p99", "wait", 8.0, "all", False),
    ("  p99_wait < 8 s ", "p99", "wait", 8.0, "all", False),
    ("p50_wait<=500ms", "p50", "wait", 0.5, "all", True),
    ("mean_completion<2.5min", "mean", "completion", 150.0, "all", False),
    ("p95_completion<1h", "p95", "completion", 3600.0, "all", False),
    ("p90_slowdown<3", "p90", "slowdown", 3.0, "all", False),
    ("mean_slowdown<=2.5x", "mean", "slowdown", 2.5, "all", True),
    ("urgent_p99_wait<2s", "p99", "wait", 2.0, "urgent", False),
    ("p99_wait[urgent]<2s", "p99", "wait", 2.0, "urgent", False),
    ("ordinary_p90_completion<3m", "p90", "completion", 180.0, "ordinary", False),
    ("p99_wait[tenant=acme labs]<1d", "p99", "wait", 86400.0, "tenant acme labs", False),
    ("p99_wait[type=TP]<1e3s", "p99", "wait", 1000.0, "type TP", False),
    ("p99_wait[all]<8s", "p99", "wait", 8.0, "all", False),
]


@pytest.mark.parametrize(("text", "statistic", "measure", "limit", "selector", "inclusive"), UNDERSTOOD)
def test_an_objective_is_read_as_it_is_written(
    text: str, statistic: str, measure: str, limit: float, selector: str, inclusive: bool
) -> None:
    read = parse(text)
    assert (read.statistic, read.measure, read.selector, read.inclusive) == (statistic, measure, selector, inclusive)
    assert read.limit == pytest.approx(limit)


@pytest.mark.parametrize("text", [case[0] for case in UNDERSTOOD])
def test_an_objective_that_is_written_out_reads_as_the_same(text: str) -> None:
    first = parse(text)
    again = parse(str(first))
    assert (again.name, again.inclusive) == (first.name, first.inclusive)
    assert again.limit == pytest.approx(first.limit, rel=0.005)


NOT_UNDERSTOOD = [
    ("", "such as p99_wait<8s"),
    ("p99_wait", "no < or <="),
    ("p99_wait>8s", "use < or <="),
    ("p99_wait<8", "no unit; use ms, s"),
    ("p99_wait<8parsec", "unit 'parsec' is unknown"),
    ("p99_wait<soon", "'soon' is no positive number"),
    ("p99_wait<-1s", "'-1s' is no positive number"),
    ("p99_wait<0s", "above 0"),
    ("p99_wait<s", "'s' is no positive number"),
    ("p97_wait<8s", "statistic 'p97' is unknown; use mean, p50"),
    ("p99_queue<8s", "measure 'queue' is unknown; use wait, completion, slowdown"),
    ("wait<8s", "'wait' is no measure"),
    ("slow_p99_wait<8s", "'slow_p99_wait' is no measure"),
    ("p99_slowdown<8s", "a slowdown has no unit"),
    ("p99_slowdown<1", "never below 1"),
    ("p99_wait[vip]<8s", "selector [vip] is unknown"),
    ("p99_wait[tenant=]<8s", "selector [tenant=] is unknown"),
    ("p99_wait[type=XX]<8s", "'XX' is unknown; use type=TP"),
    ("p99_wait[urgent<8s", "closing ] is missing"),
    ("urgent_p99_wait[tenant=a]<8s", "said twice"),
]


@pytest.mark.parametrize(("text", "part"), NOT_UNDERSTOOD)
def test_what_is_wrong_with_an_objective_is_named_with_the_remedy(text: str, part: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        parse(text)
    assert part in str(caught.value)
    assert str(caught.value).startswith("--slo")


def test_an_objective_about_a_class_that_nobody_is_in_names_the_classes_that_there_are() -> None:
    spread = {"mean": 1.0, "p99": 2.0}
    classes = {"all": {"count": 3, "wait": spread}, "tenant a": {"count": 3, "wait": spread}}
    assert parse("p99_wait[tenant=a]<8s").value(classes) == 2.0
    with pytest.raises(ObjectiveError, match=r"no task in \[tenant=b\]; it has all, tenant=a"):
        parse("p99_wait[tenant=b]<8s").value(classes)


def test_a_limit_itself_is_kept_only_by_an_inclusive_objective() -> None:
    assert not parse("p99_wait<8s").kept(8.0)
    assert parse("p99_wait<=8s").kept(8.0)
    assert not parse("p99_wait<=8s").kept(float("inf"))


def test_the_share_of_tasks_that_may_be_late_follows_from_the_quantile() -> None:
    assert parse("p95_wait<8s").tail == pytest.approx(0.05)
    assert parse("mean_wait<8s").tail is None


def test_values_are_shown_in_units_that_people_read() -> None:
    assert [shown(each) for each in (0.25, 8, 900, 9000, float("inf"))] == ["250 ms", "8 s", "15 min", "2.5 h", "never"]
    assert shown(2.5, "x") == "2.5x"
    assert Objective("p99", "slowdown", 3.0).unit == "x"


# --- prices ---------------------------------------------------------------------------------------------------------


def listed() -> prices.PriceList:
    return prices.read('currency = "EUR"\n[per_hour]\na100 = 2\nl4 = 0.5\n', "a list")


def test_offers_take_the_price_that_is_written_and_else_the_lists() -> None:
    offers = prices.parse_offers("a100:1.8/h, l4 ,h100:2920/month,t4:12/day", listed())
    assert [(offer.gpu_model, offer.per_hour) for offer in offers] == [
        ("a100", 1.8),
        ("l4", 0.5),
        ("h100", 4.0),
        ("t4", 0.5),
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "names no GPU"),
        ("a1000:1/h", "unknown GPU model 'a1000'; known are"),
        ("a100:cheap", "'cheap' is no price"),
        ("a100:1/fortnight", "'fortnight' is no unit"),
        ("a100:1,a100:2", "named twice"),
        ("h100", "has no price of 'h100'"),
        ("a100:-1", "'-1' is no price"),
    ],
)
def test_what_is_wrong_with_an_offer_is_named_with_the_remedy(text: str, part: str) -> None:
    with pytest.raises(PriceError) as caught:
        prices.parse_offers(text, listed())
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("per_hour = 3", "per_hour: must be a table"),
        ("[per_hour]\na100 = 'x'", "per_hour.a100: 'x' is no price"),
        ("[per_hour]\na100 = true", "per_hour.a100: True is no price"),
        ("[per_hour]\na100 = nan", "per_hour.a100: nan is no price"),
        ("currency = 3\n[per_hour]\na100 = 1", "currency: 3 is no text"),
        ("[per_day]\na100 = 1", "per_day: there is no such key"),
        ("[per_hour", "no TOML"),
    ],
)
def test_what_is_wrong_with_a_price_list_is_named(text: str, part: str) -> None:
    with pytest.raises(PriceError) as caught:
        prices.read(text, "a list")
    assert part in str(caught.value)


def test_the_packages_list_is_used_until_there_is_one_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert prices.load().of("a100").per_hour > 0
    prices.own_path().parent.mkdir(parents=True)
    prices.own_path().write_text(prices.default_text().replace("a100 = 1.80", "a100 = 7.25"), encoding="utf-8")
    assert prices.load().of("a100").per_hour == 7.25
    with pytest.raises(PriceError, match="cannot read"):
        prices.load(tmp_path / "missing.toml")
