"""The planner: its answer where queueing theory knows it, its search on made-up clusters, and that it can be resumed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.resources import Demand
from engine.tasks import SECOND, Affinity, TaskSpec, TaskType
from sim.draws import exponential
from sim.planner import PlanError, PlanRequest, plan, report
from sim.planner import runs as runs_module
from sim.planner.bounds import Bound
from sim.planner.objectives import parse
from sim.planner.request import Pool
from sim.planner.results import Plan, csv_text
from sim.planner.runs import Runs
from sim.planner.search import Search, enlarged
from sim.planner.theory import servers_for
from sim.planner.trials import Trial, Trials, Verdict, estimate, student
from sim.prices import Price
from sim.simulate import SimulationConfig
from sim.theory import erlang_c_servers, mmc_wait
from sim.workload import Arrival, Truth, Workload

A100, H100 = Price("a100", 2.0), Price("h100", 4.0)


def poisson(tasks: int, rate: float, mean_s: float, seed: int = 1) -> Workload:
    """Make an M/M/c workload: sleeps without models or groups, so that nothing but queueing happens."""
    at, arrivals = 0.0, []
    for number in range(tasks):
        at += exponential(1 / rate, seed, "gap", number)
        spec = TaskSpec(
            f"task-{number:05d}",
            tenant="t",
            group="",
            task_type=TaskType.GC,
            method="sleep",
            model="",
            demand=Demand(gpus=1),
            affinity=Affinity.NONE,
        )
        run_us = max(1, round(exponential(mean_s, seed, "run", number) * SECOND))
        arrivals.append(Arrival(round(at * SECOND), spec, Truth(work_us=run_us)))
    return Workload("poisson", tuple(arrivals))


def request(slo: str = "p90_wait<8s", **changes: object) -> PlanRequest:
    values: dict[str, object] = {
        "base": SimulationConfig(profile="fifo", forecaster="none"),
        "objectives": (parse(slo),),
        "offers": (A100,),
        "workload": poisson(900, rate=0.5, mean_s=10.0),
        "seeds": 2,
        "sensitivity": False,
    }
    return PlanRequest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planned() -> Plan:
    base = SimulationConfig(synthetic_tasks=60, rate_scale=30, forecaster="none")
    asked = PlanRequest(base, (parse("p90_wait<90s"),), (A100, H100), seeds=2, policies=("fifo",), mixes=1)
    return plan(asked, jobs=1)


# --- against theory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "mean_s", "slo"), [(0.5, 10.0, "p90_wait<8s"), (0.2, 20.0, "mean_wait<6s")])
def test_where_erlang_c_is_exact_the_planner_gives_its_number_give_or_take_one(
    rate: float, mean_s: float, slo: str
) -> None:
    found = plan(request(slo, workload=poisson(800, rate, mean_s)), jobs=1)
    assert found.answer is not None
    objective = parse(slo)
    if objective.tail is None:
        exact = next(count for count in range(1, 100) if mmc_wait(count, rate, mean_s) < objective.limit)
    else:
        exact = erlang_c_servers(rate, mean_s, 1 - objective.tail, objective.limit)
    assert abs(found.answer.pool[0][1] - exact) <= 1
    assert found.below is not None
    assert not found.below.holds
    assert found.theory is not None
    assert found.theory.formulas[0].gpus is not None
    assert abs(found.theory.formulas[0].gpus - exact) <= 1


@pytest.mark.parametrize(
    "slo", ["p90_wait<8s", "p99_wait<1s", "mean_wait<2s", "p95_completion<60s", "mean_completion<12s"]
)
def test_the_formulas_answer_is_the_smallest_that_keeps_the_objective(slo: str) -> None:
    objective = parse(slo)
    found = servers_for(objective, 0.5, 10.0)
    assert found is not None
    if objective.measure == "wait" and objective.tail is not None:
        assert found == erlang_c_servers(0.5, 10.0, 1 - objective.tail, objective.limit)
    assert found > 5
    looser = servers_for(parse(slo.partition("<")[0] + f"<{objective.limit * 2}s"), 0.5, 10.0)
    assert looser is not None
    assert looser <= found


def test_no_number_of_servers_makes_run_times_shorter() -> None:
    assert servers_for(parse("p99_completion<10s"), 0.5, 10.0) is None
    assert servers_for(parse("mean_completion<9s"), 0.5, 10.0) is None
    assert servers_for(parse("mean_slowdown<2"), 0.5, 10.0) is None


def test_students_t_is_that_of_the_tables() -> None:
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)):
        assert student(0.95, degrees) == pytest.approx(value, rel=1e-3)
    assert student(0.99, 4) == pytest.approx(4.604, rel=1e-3)


def test_an_interval_with_a_task_that_is_never_served_has_no_upper_end() -> None:
    found = estimate([1.0, math.inf, 3.0], 0.95)
    assert (found.mean, found.low, found.high) == (math.inf, 1.0, math.inf)
    single = estimate([1.0], 0.95)
    assert (single.low, single.high) == (0.0, math.inf)


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_a_cluster_that_the_bound_calls_impossible_misses_when_it_is_simulated() -> None:
    asked = request("p90_wait<8s", workload=poisson(900, rate=0.5, mean_s=10.0))
    runs = Runs(asked.workload, None, 1)
    bound = Bound(asked, runs)
    fewest = bound.fewest("a100", 100)
    assert 2 <= fewest <= 7
    assert bound.impossible((("a100", fewest - 1),))
    assert not Trials(asked, runs).judge((("a100", fewest - 1),), full=True).holds


def test_the_bound_counts_a_faster_gpu_for_more() -> None:
    asked = request("p90_wait<8s", offers=(A100, H100))
    bound = Bound(asked, Runs(asked.workload, None, 1))
    assert bound.fewest("h100", 100) < bound.fewest("a100", 100)
    assert bound.load((("h100", 4),)) < bound.load((("a100", 4),))


def test_an_objective_of_one_class_is_bounded_by_the_work_of_that_class() -> None:
    everybody, urgent = (request(slo) for slo in ("p90_wait<8s", "urgent_p90_wait<8s"))
    runs = Runs(everybody.workload, None, 1)
    assert Bound(everybody, runs).fewest("a100", 100) > Bound(urgent, runs).fewest("a100", 100) == 1


# --- the search, on clusters whose quality is a formula -----------------------------------------------------------------


class MadeUp:
    """Trials by formula: `holds` says which clusters do."""

    def __init__(self, asked: PlanRequest, holds: Callable[[Pool], bool]) -> None:
        self._asked, self._holds = asked, holds
        self.known: dict[Pool, Trial] = {}

    def judge(self, pool: Pool, profile: str | None = None, *, full: bool = False) -> Trial:
        kept = self._holds(pool)
        value = self._asked.objectives[0].limit * (0.5 if kept else 10.0 / (1 + sum(count for _, count in pool)) + 1.0)
        verdict = Verdict.HOLDS if kept else Verdict.MISSES
        found = Trial(pool, "fifo", verdict, (estimate([value, value], 0.95),), ({}, {}))
        self.known[pool] = found
        return found

    def prepare(self, pools: list[Pool], profile: str | None = None) -> None:
        """Have nothing to run."""

    def all(self, profile: str | None = None) -> list[Trial]:
        return list(self.known.values())


def searching(asked: PlanRequest, holds: Callable[[Pool], bool]) -> tuple[Search, MadeUp]:
    trials = MadeUp(asked, holds)
    return Search(asked, trials, lambda pool: False, lambda model, most: 1, lambda model: ""), trials  # type: ignore[arg-type]


def size(pool: Pool) -> int:
    return sum(count for _, count in pool)


@pytest.mark.parametrize("start", [1, 30, 37, 38, 200])
@pytest.mark.parametrize("needed", [1, 2, 37])
def test_the_fewest_gpus_are_found_from_any_beginning_with_few_trials(needed: int, start: int) -> None:
    search, trials = searching(request(), lambda pool: size(pool) >= needed)
    found = search.fewest("a100", start)
    assert found.count == needed
    assert found.above is not None
    assert found.above.holds
    assert (found.below is None) == (needed == 1)
    assert found.below is None or not found.below.holds
    assert len(trials.known) < 25


def test_a_larger_cluster_that_misses_sends_the_search_upwards_and_is_reported() -> None:
    search, _ = searching(request(), lambda pool: size(pool) in {20, 22, 23} or size(pool) > 23)
    found = search.fewest("a100", 20)
    assert found.count == 22
    assert found.breaches == ("20 a100 hold, 21 do not: the answer is sought above",)


def test_what_gpus_do_not_help_has_no_answer_and_says_why() -> None:
    search, _ = searching(request(), lambda pool: False)
    found = search.fewest("a100", 200)
    assert found.count is None
    assert "more GPUs do not help" in found.why
    assert found.largest is not None


def test_what_holds_with_a_few_seeds_only_ends_the_search_and_asks_for_more_seeds() -> None:
    asked = request()
    search, trials = searching(asked, lambda pool: True)
    judged = trials.judge

    def doubtful(pool: Pool, profile: str | None = None, *, full: bool = False) -> Trial:
        found = judged(pool, profile, full=full)
        return replace(found, verdict=Verdict.UNCLEAR) if full else found

    trials.judge = doubtful  # type: ignore[method-assign]
    found = search.fewest("a100", 10)
    assert found.count is None
    assert "no number of GPUs is sure to be enough" in found.why
    assert "--seeds" in found.why
    assert len(trials.known) < 60


def test_too_small_a_limit_of_gpus_has_no_answer_and_names_the_option() -> None:
    search, _ = searching(request(most_gpus=8), lambda pool: size(pool) >= 9)
    found = search.fewest("a100", 2)
    assert found.count is None
    assert "--most-gpus" in found.why


def test_a_cheaper_mix_is_found_when_one_gpu_of_the_other_kind_is_enough() -> None:
    asked = request(offers=(A100, H100), mixes=10)

    def holds(pool: Pool) -> bool:
        counts = dict(pool)
        return counts.get("a100", 0) + 1.9 * counts.get("h100", 0) >= 10.8

    search, _ = searching(asked, lambda pool: holds(pool) or (dict(pool).get("h100", 0) >= 1 and size(pool) >= 9))
    pure = [search.fewest("a100", 5), search.fewest("h100", 5)]
    assert [each.count for each in pure] == [11, 6]
    mixes, _ = search.mixes(pure)
    assert mixes
    assert min(asked.cost(trial.pool) for trial in mixes) < 22.0


def test_a_mix_that_holds_by_luck_alone_is_not_an_answer() -> None:
    asked = request(offers=(A100, H100), mixes=50)
    lucky: Pool = (("a100", 8), ("h100", 1))
    search, trials = searching(asked, lambda pool: pool == lucky or (len(pool) == 1 and size(pool) >= 11))
    pure = [search.fewest("a100", 5), search.fewest("h100", 5)]
    mixes, _ = search.mixes(pure)
    assert lucky in trials.known
    assert not mixes


def test_a_mix_grows_by_the_model_that_it_has_most_of() -> None:
    assert enlarged((("a100", 3), ("h100", 1))) == (("a100", 4), ("h100", 1))
    assert enlarged((("h100", 1),), -1) == ()


# --- whole plans ------------------------------------------------------------------------------------------------------


def test_a_plan_answers_in_one_line_with_its_interval_and_what_one_gpu_less_does(planned: Plan) -> None:
    line = planned.sentence()
    assert "\n" not in line
    assert re.search(
        r"\d+ (a100|h100).* keep p90_wait<90 s with aigc: p90_wait .* 95% interval .* over 2 seeds; ", line
    )
    assert planned.answer is not None
    assert planned.answer.holds
    assert (
        planned.request.cost(planned.answer.pool)
        == min(planned.request.cost(each.trial.pool) for each in planned.pure if each.trial is not None)
        or len(planned.answer.pool) > 1
    )


def test_cost_rises_along_the_curve_and_the_front_falls(planned: Plan) -> None:
    costs = [planned.request.cost(trial.pool) for trial in planned.curve]
    assert costs == sorted(costs)
    values = [planned.value(trial) for trial in planned.front()]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values) > 1


def test_a_stricter_objective_never_costs_less() -> None:
    costs = []
    for slo in ("p90_wait<20s", "p90_wait<8s", "p90_wait<2s"):
        found = plan(request(slo, workload=poisson(200, 0.5, 10.0)), jobs=1)
        assert found.answer is not None
        costs.append(found.request.cost(found.answer.pool))
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_every_assumption_is_varied_and_the_widest_comes_first(planned: Plan) -> None:
    names = {sway.name for sway in planned.sways}
    assert names == {"arrival rate", "number of models", "load times", "failures", "prediction error"}
    widths = [sway.width for sway in planned.sways]
    assert widths == sorted(widths, reverse=True)
    by_name = {sway.name: sway for sway in planned.sways}
    assert by_name["load times"].low < by_name["load times"].high


def test_equal_requests_give_equal_plans_whatever_the_processes_and_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    work_through = runs_module.work_through

    def counted(order: Any, run: Any, jobs: int, finished: Any) -> None:
        started.append(jobs)
        work_through(order, run, jobs, finished)

    monkeypatch.setattr(runs_module, "work_through", counted)
    monkeypatch.setattr(runs_module, "_WORTH_PROCESSES_S", 0.3)
    asked = request(workload=poisson(150, 0.5, 10.0), seeds=3)
    first = plan(asked, jobs=1)
    second = plan(asked, jobs=2, store=tmp_path / "runs.jsonl")
    third = plan(asked, jobs=1, store=tmp_path / "runs.jsonl")
    assert first.to_json() == second.to_json() == third.to_json()
    assert started
    assert set(started) == {2}
    assert second.reused == 0
    assert third.reused == third.runs == second.runs


def test_a_plan_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    asked, store = request(workload=poisson(150, 0.5, 10.0)), tmp_path / "runs.jsonl"
    heard: list[str] = []

    def interrupt(share: float, text: str) -> None:
        heard.append(text)
        if len(heard) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(asked, interrupt, store=store, jobs=1)
    kept = len(store.read_text(encoding="utf-8").splitlines())
    assert kept > 0
    found = plan(asked, store=store, jobs=1)
    assert found.reused == kept
    assert found.runs > kept
    assert found.to_json() == plan(asked, jobs=1).to_json()


def test_progress_rises_to_the_end_and_names_the_stage() -> None:
    shares: list[float] = []
    texts: list[str] = []

    def report_to(share: float, text: str) -> None:
        shares.append(share)
        texts.append(text)

    plan(request(workload=poisson(200, 0.5, 10.0)), report_to, jobs=1)
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert any(text.startswith("searching a100: ") for text in texts)


def test_the_page_is_self_contained_and_shows_the_answer(planned: Plan, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    report.write_html(planned, page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert not re.search(r"""(src|href)\s*=\s*["']https?://|@import|url\(http""", text)
    assert planned.request.digest() in text
    assert "keep p90_wait&lt;90 s" in text
    assert text == (report.write_html(planned, page), page.read_text(encoding="utf-8"))[1]


def test_json_and_csv_hold_the_seeds_and_the_configuration_hash(planned: Plan, tmp_path: Path) -> None:
    report.write_json(planned, tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert values["seeds"] == [0, 1]
    assert values["config_hash"] == planned.request.digest()
    assert values["answer"]["objectives"][0]["low"] <= values["answer"]["objectives"][0]["mean"]
    rows = list(csv.DictReader(io.StringIO(csv_text(planned))))
    assert len(rows) == len(planned.curve)
    chosen = [row for row in rows if row["answer"]]
    assert len(chosen) == 1
    assert chosen[0]["config_hash"] == planned.request.digest()


def test_an_objective_that_loads_alone_break_has_no_answer_but_one_in_reach() -> None:
    base = SimulationConfig(synthetic_tasks=60, rate_scale=20, forecaster="none", profile="fifo")
    found = plan(PlanRequest(base, (parse("p99_wait<2s"),), (A100,), seeds=2, sensitivity=False), jobs=1)
    assert found.answer is None
    assert "more GPUs do not help" in found.sentence()
    assert re.search(r"p99_wait<\d+ s with \d+ a100", found.within_reach)
    assert found.to_json()["answer"] is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"objectives": ()}, "slo: say what is to be kept"),
        ({"objectives": (parse("p99_wait<8s"), parse("p99_wait<9s"))}, "same measure"),
        ({"offers": ()}, "gpu: name at least one"),
        ({"confidence": 1.0}, "confidence: must be at least 0.5 and below 1"),
        ({"seeds": 1}, "seeds: an interval needs at least 2"),
        ({"most_gpus": 0}, "most_gpus: must be at least 1"),
        ({"base": SimulationConfig(until_hours=3)}, "until_hours: a plan needs every task"),
        ({"policies": ("no-such",)}, "no-such"),
    ],
)
def test_what_is_wrong_with_a_request_is_named_with_the_remedy(changes: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)):
        request(**changes)


def test_a_gpu_model_that_the_tasks_do_not_fit_is_left_out_with_the_reason() -> None:
    base = SimulationConfig(synthetic_tasks=40, rate_scale=20, forecaster="none", profile="fifo")
    asked = PlanRequest(base, (parse("p50_wait<300s"),), (Price("t4", 0.35), A100), seeds=2, sensitivity=False)
    found = plan(asked, jobs=1)
    assert found.answer is not None
    assert dict(found.answer.pool).keys() == {"a100"}
    assert "100% of the tasks do not fit; they ask for up to 24 GiB of a GPU's memory (it has 16)" in found.pure[0].why


def test_a_class_that_nobody_is_in_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no task in \[urgent\]"):
        plan(request("urgent_p99_wait<2s", workload=poisson(50, 0.5, 10.0)), jobs=1)


def test_an_empty_workload_cannot_be_planned_for() -> None:
    with pytest.raises(PlanError, match="holds no task"):
        plan(request(workload=Workload("nothing", ())), jobs=1)
