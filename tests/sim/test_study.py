"""The GenTD26 study on a small trace: its comparisons, sizes, tie rules, and what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from api.cli.main import app
from engine import profiles
from sim.configuration import ConfigError
from sim.study import report
from sim.study.case import StudyCase
from sim.study.gentd26 import run_study
from sim.study.plan import StudyPlan, profile_text, with_tie
from sim.study.sizes import FREE, find_sizes
from sim.sweep import run_sweep
from sim.sweep_table import Interval

HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora\n"
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    rows = [
        f"2024-11-{15 + number // 144} {number // 6 % 24:02d}:{number % 6 * 10:02d}:{number % 7:02d},TXT_2_IMG,SUCCEED,"
        f"{20 + number % 5 * 10},G{number % 11},10,,1,30,M{number % 3},{number % 2}"
        for number in range(288)
    ]
    path = tmp_path_factory.mktemp("trace") / "lora_request_trace.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def plan_of(trace: Path, **changed) -> StudyPlan:
    values = {
        "trace": trace,
        "loads": (0.5, 0.9),
        "profiles": ("fifo", "kube-default", "aigc"),
        "seeds": 2,
        "gpus": 3,
        "gpus_per_node": 2,
        "hours": 0.5,
        "forecaster": "declared",
        "ties": ("first", "last"),
    } | changed
    return StudyPlan(**values)


@pytest.fixture(scope="module")
def study(trace):
    return run_study(plan_of(trace), jobs=1)


def test_every_profile_stands_at_every_load(study):
    assert [(each.load, each.profile) for each in study.standings] == [
        (load, profile) for load in (0.5, 0.9) for profile in ("fifo", "kube-default", "aigc")
    ]
    first = study.standing("fifo", 0.5)
    own = [run.summary["completion"]["all"]["p99"] for run in study.runs if run.config.profile == "fifo"][:2]
    assert first.figures["p99 completion, s"].mean == pytest.approx(sum(own) / 2)


def test_the_reference_is_the_best_classic_and_others_are_compared_with_it(study):
    for load, reference in study.references.items():
        p99 = {name: study.standing(name, load).figures["p99 completion, s"].mean for name in ("fifo", "kube-default")}
        assert reference == min(p99, key=p99.__getitem__)
        assert not study.standing(reference, load).differences
        gap = next(each for each in study.standing("aigc", load).differences if each.measure == "p99 completion, s")
        ours = study.standing("aigc", load).figures["p99 completion, s"].mean
        assert gap.mean == pytest.approx(ours - p99[reference])


def test_the_same_requests_meet_every_profile_and_every_size(study):
    digests = {(run.config.busy_gpus, run.config.seed): set() for run in study.runs}
    for run in study.runs:
        digests[run.config.busy_gpus, run.config.seed].add(run.workload_digest)
    assert all(len(each) == 1 for each in digests.values())
    assert len(set.union(*digests.values())) == len(digests)


def test_tie_rules_are_compared_at_the_load_of_the_sizes(study):
    assert study.ties_missing == ""
    assert [each.profile for each in study.ties] == ["fifo", "kube-default", "aigc"]
    own = {run.config.profile for run in study.runs}
    assert len([profile for profile in own if "tie" in profile]) == 3, (
        "the tie rule that a profile has is not run again"
    )
    for each in study.ties:
        assert list(each.by_tie) == ["first", "last"]
        first = study.standing(each.profile, study.plan.size_load).figures["p99 completion, s"]
        assert each.by_tie["first"] == first
        assert each.by_tie[each.best].mean <= each.by_tie[each.worst].mean


def test_every_size_holds_the_target_and_one_less_does_not(study):
    load, reference = study.plan.size_load, study.references[study.plan.size_load]
    p99 = {}
    for run in study.runs:
        if run.config.busy_gpus == pytest.approx(load * 3):
            profile = FREE if run.config.load_scale < 1 else run.config.profile
            key = (profile, run.config.seed, sum(count for _, count in run.config.pools))
            p99[key] = run.summary["completion"]["all"]["p99"]
    for size in study.sizes:
        for seed, gpus in zip(study.plan.all_seeds, size.gpus, strict=True):
            target = p99[reference, seed, 3]
            assert p99[size.profile, seed, gpus] <= target
            if gpus > 1:
                assert p99[size.profile, seed, gpus - 1] > target
    assert study.size_of("aigc").saving.count == 2
    assert study.size_of(FREE).mean.mean <= study.size_of(reference).mean.mean


def test_a_profile_that_never_gets_there_has_no_size(trace):
    plan = plan_of(trace, profiles=("fifo", "aigc"), seeds=1)

    def record(case):
        quick = case.profile == "fifo"
        return SimpleNamespace(summary={"completion": {"all": {"p99": 1.0 if quick else 2.0}}}, simulated_s=3600.0)

    asked = []

    def runs(cases):
        asked.extend((case.profile, sum(count for _, count in case.pools)) for case in cases)
        return [record(case) for case in cases]

    full = {(name, 0): record(plan.case(name, 0.9, 0)) for name in plan.profiles}
    fifo, aigc, free = find_sizes(plan, "fifo", full, runs)
    assert (free.profile, free.gpus) == (FREE, (1,))
    assert (fifo.gpus, fifo.gpu_hours) == ((1,), 1.0)
    assert (aigc.gpus, aigc.mean, aigc.saving) == ((None,), None, None)
    assert ("aigc", 12) in asked
    assert max(gpus for _, gpus in asked) == 12


def test_the_answer_and_the_tables_name_the_profiles(study):
    assert "aigc needs" in report.answer(study)
    titles = [title for title, _, _ in report.tables(study)]
    assert any("differences from" in title for title in titles)
    assert any(title.startswith("Fewest GPUs") for title in titles)
    assert any(title.startswith("What the tie rule moves") for title in titles)
    for _, headings, rows in report.tables(study):
        assert all(len(row) == len(headings) for row in rows)


def test_the_values_are_plain_and_the_page_needs_no_network(study, tmp_path):
    values = json.loads(json.dumps(report.json_values(study), allow_nan=False))
    assert values["references"]["0.9"] in {"fifo", "kube-default"}
    assert values["fit"]["dispersion_1min"]["scaled"]["seeds"] == 2
    assert len(values["runs"]) == len(study.runs)
    page = tmp_path / "study.html"
    report.write_html(study, page)
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_a_study_goes_on_from_its_store(trace, tmp_path):
    plan = plan_of(trace, loads=(0.5,), profiles=("fifo",), seeds=1, ties=())
    store = tmp_path / "runs.jsonl"
    first = run_study(plan, store, jobs=1)
    again = run_study(plan, store, jobs=1)
    assert all(run.reused for run in again.runs)
    assert report.json_values(again)["loads"] == report.json_values(first)["loads"]


def test_progress_never_falls(trace):
    seen = []
    plan = plan_of(trace, loads=(0.5,), profiles=("fifo", "aigc"), seeds=1)
    run_study(plan, jobs=1, on_progress=lambda share, note: seen.append(share))
    assert seen == sorted(seen)
    assert seen[-1] <= 1.0


@pytest.mark.parametrize("name", profiles.NAMES)
def test_every_profile_takes_every_tie_rule(name):
    for tie in ("first", "last", "name", "random"):
        assert profiles.load(with_tie(name, tie)).tie == tie


def test_another_tie_rule_changes_nothing_else():
    own, changed = profiles.load(profile_text("aigc")), profiles.load(with_tie("aigc", "last"))
    assert own.tie != changed.tie
    assert (own.ordering, own.scorers, own.warm_first_us) == (changed.ordering, changed.scorers, changed.warm_first_us)
    twice = Path("/nonexistent.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        with_tie(str(twice), "last")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"loads": ()}, "loads: name at least one"),
        ({"loads": (0.5, 0.5)}, "loads: one of them is given twice"),
        ({"loads": (9.0,)}, "loads: 9.0 is out of range"),
        ({"profiles": ("nonsense",)}, "profiles: unknown 'nonsense'"),
        ({"gpus": 0}, "gpus: must be at least 1"),
        ({"ties": ("middle",)}, "ties: unknown 'middle'"),
    ],
)
def test_a_wrong_plan_is_named(changed, named, trace):
    with pytest.raises(ConfigError, match=named):
        plan_of(trace, **changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"trace": None}, "trace: a study"), ({"hours": 0}, "hours: must be"), ({"rate_method": "x"}, "rate_method")],
)
def test_a_wrong_case_is_named(changed, named, trace):
    with pytest.raises(ConfigError, match=named):
        StudyCase(**({"trace": trace} | changed))


def test_a_case_without_monitoring_files_loads_by_bytes(trace):
    (record,) = run_sweep([StudyCase(trace=trace, hours=0.5, busy_gpus=1.0, nodes=1, forecaster="none")], jobs=1)
    assert "loads_measured" not in record.world
    assert record.world["loads_remote"] > 0


def test_the_command_prints_the_answer(trace, tmp_path):
    arguments = ["study", "gentd26", "--trace", str(trace), "--loads", "0.6", "--profiles", "fifo,aigc", "--seeds", "1"]
    arguments += ["--gpus", "2", "--hours", "0.3", "--forecaster", "none", "--ties", "none", "--jobs", "1"]
    done = CliRunner().invoke(app, [*arguments, "--html", str(tmp_path / "a.html")])
    assert done.exit_code == 0, done.output
    assert "Fewest GPUs" in done.stdout
    assert "aigc needs" in done.stdout
    assert (tmp_path / "a.html").is_file()
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert values["plan"]["gpus"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--trace", "nowhere.csv"], 3, "nowhere.csv does not exist"),
        (["--loads", "much"], 2, "'much' is not a number"),
        (["--profiles", "nonsense"], 2, "unknown 'nonsense'"),
        (["--from", "2025-01-01", "--to", "2025-01-02"], 2, "has no request between"),
    ],
)
def test_the_command_names_what_is_wrong(arguments, code, named, trace):
    base = [] if "--trace" in arguments else ["--trace", str(trace)]
    done = CliRunner().invoke(app, ["study", "gentd26", *base, *arguments, "--jobs", "1"])
    assert done.exit_code == code
    assert named in done.stderr


def test_a_file_is_a_challenger_and_never_the_reference(trace, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(profile_text("priority"))
    plan = plan_of(trace, loads=(0.5,), profiles=(str(mine), "fifo", "aigc"), seeds=1, ties=())
    assert run_study(plan, jobs=1).references == {0.5: "fifo"}


@pytest.mark.parametrize(("mean", "text"), [(0.25, "25.0 ±10.0% fewer"), (-0.08, "8.0 ±10.0% more")])
def test_the_answer_says_fewer_or_more(mean, text, study):
    sizes = tuple(
        replace(size, saving=Interval(mean, 0.1, 2)) if size.profile == "aigc" else size for size in study.sizes
    )
    assert text in report.answer(replace(study, sizes=sizes))
