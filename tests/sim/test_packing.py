"""The packing experiment: what it offers, what it counts, and the FGD paper's figures."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from api.cli.main import app
from engine.levels.scoring.fragmentation import Typical
from sim import packing, packing_report
from sim.openb import NodeRow, PodRow, read_nodes, read_pods
from sim.workload import WorkloadError

TRACE = Path(__file__).parents[2].parent / "shared" / "traces" / "openb"
NODES = [NodeRow(f"n{at}", 64_000, 262_144, 4, "T4" if at % 2 else "P100") for at in range(6)]
PODS = [
    PodRow(f"p{at}", 4_000 + 1_000 * (at % 3), 8_192, gpus, share, models)
    for at, (gpus, share, models) in enumerate(
        [(1, 300, ()), (1, 500, ("T4",)), (1, 1000, ()), (2, 1000, ()), (0, 0, ()), (1, 250, ())] * 4
    )
]


@pytest.fixture
def experiment() -> packing.Experiment:
    return packing.prepare(NODES, PODS)


def test_each_seed_offers_the_whole_list_in_its_own_order_and_then_more(experiment: packing.Experiment) -> None:
    offered = packing.sequences(experiment, [1, 2])
    share = np.append(experiment.shapes.gpus * experiment.shapes.share, 0)
    for run in offered:
        head, rest = run[: len(PODS)], run[len(PODS) :]
        assert sorted(head) == sorted(experiment.kinds)
        assert set(rest[rest >= 0]) <= set(experiment.kinds.tolist())
        # One more thousandth per device of the largest shape could have been added; a two-GPU Pod may overshoot by one GPU.
        asked = share[run].sum()
        assert 1.3 * experiment.capacity - 1000 <= asked <= 1.3 * experiment.capacity + 1000
    assert offered[0].tolist() != offered[1].tolist()
    assert packing.sequences(experiment, [2])[0].tolist()[: len(PODS)] == offered[1].tolist()[: len(PODS)]


def test_a_list_that_asks_for_too_much_loses_pods_that_are_drawn() -> None:
    experiment = packing.prepare(NODES[:1], PODS)
    offered = packing.sequences(experiment, [5])[0]
    asked = (experiment.shapes.gpus * experiment.shapes.share)[offered].sum()
    assert len(offered) < len(PODS)
    assert asked <= 1.3 * experiment.capacity


def test_typical_shapes_are_counted_without_memory_and_with_gpu_models() -> None:
    pods = [PodRow("a", 1_000, 1, 1, 500), PodRow("b", 1_000, 2, 1, 500), PodRow("c", 2_000, 1, 0, 0)]
    pods.append(PodRow("d", 1_000, 1, 1, 500, ("T4",)))
    assert packing.typical_shapes(pods, 100) == (
        Typical(2, 1_000, 1, 500),
        Typical(1, 2_000, 0, 1_000),
        Typical(1, 1_000, 1, 500, ("T4",)),
    )


@pytest.mark.parametrize("name", packing.POLICIES)
@pytest.mark.parametrize("tie", packing.TIES)
def test_no_node_ever_holds_more_than_it_has(experiment: packing.Experiment, name: str, tie: str) -> None:
    seeds = list(range(12))
    offered = packing.sequences(experiment, seeds)
    placed = packing.placements(experiment, name, offered, seeds, tie, lambda *_: None)
    shapes, nodes = experiment.shapes, experiment.nodes
    assert (placed[offered < 0] == -1).all()
    for run in range(len(seeds)):
        took = placed[run] >= 0
        for row in range(len(nodes)):
            kinds = offered[run][took & (placed[run] == row)]
            assert shapes.cpu[kinds].sum() <= nodes.cpu[row]
            assert shapes.memory[kinds].sum() <= nodes.memory[row]
            assert (shapes.gpus * shapes.share)[kinds].sum() <= 1000 * nodes.gpus[row]
            assert shapes.access[nodes.model[row], kinds].all()
    assert placed.tolist() == packing.placements(experiment, name, offered, seeds, tie, lambda *_: None).tolist()


@pytest.mark.parametrize("tie", ["name", "random"])
@pytest.mark.parametrize("name", packing.POLICIES)
def test_a_run_does_not_depend_on_the_runs_beside_it(experiment: packing.Experiment, name: str, tie: str) -> None:
    offered = packing.sequences(experiment, range(13))
    among = packing.placements(experiment, name, offered, range(13), tie, lambda *_: None)
    alone = packing.placements(experiment, name, offered[3:4], [3], tie, lambda *_: None)
    assert among[3].tolist() == alone[0].tolist()


def test_a_pod_with_more_gpus_than_any_node_or_a_model_that_no_node_has_is_dropped() -> None:
    pods = [*PODS, PodRow("wide", 1_000, 1, 16, 1_000), PodRow("odd", 1_000, 1, 1, 500, ("H800",))]
    experiment = packing.prepare(NODES, pods)
    offered = experiment.kinds[None, :]
    for name in packing.POLICIES:
        placed = packing.placements(experiment, name, offered, [1], "name", lambda *_: None)[0]
        assert placed[-2:].tolist() == [-1, -1]
        assert (placed[:-2] >= 0).sum() > 10


def test_what_is_given_away_follows_what_is_asked_for_until_the_cluster_is_full(experiment: packing.Experiment) -> None:
    result = packing.run_policy(experiment, "best-fit", list(range(4)))
    curve = result.curve
    assert len(curve) == 131
    assert curve[30] == pytest.approx(30, abs=2)
    assert curve[130] <= 100
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(curve))
    assert result.mean(100) == pytest.approx(curve[100], abs=1e-3)


@pytest.mark.parametrize(
    ("nodes", "pods", "complaint"),
    [
        ([NodeRow("n", 1, 1, 0, "")], PODS, "nodes: none of them has a GPU"),
        (NODES, [PodRow("p", 1, 1, 0, 0)], "pods: none of them asks for a GPU"),
        (NODES, [PodRow("p", 1 << 40, 1, 1, 500)], "cpu_milli: 1099511627776 is more than a machine has"),
    ],
)
def test_lists_that_measure_nothing_are_refused(nodes: Any, pods: Any, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        packing.prepare(nodes, pods)
    assert complaint in str(caught.value)


def test_a_list_that_could_never_fill_the_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_PODS", 50)
    experiment = packing.prepare(NODES, [PodRow("p", 1, 1, 1, 1)])
    with pytest.raises(WorkloadError, match="pods: 50 of them do not ask for the cluster's GPUs"):
        packing.sequences(experiment, [0])


def test_unknown_policies_and_rules_are_named(experiment: packing.Experiment) -> None:
    with pytest.raises(WorkloadError, match="policy: 'luck' is unknown"):
        packing.run_policy(experiment, "luck", [0])
    with pytest.raises(WorkloadError, match="tie: 'luck' is unknown"):
        packing.run_policy(experiment, "fgd", [0], "luck")


# --- the paper's figures ------------------------------------------------------------------------------------------------

needs_trace = pytest.mark.skipif(not TRACE.is_dir(), reason="the trace openb is not at ../shared/traces/openb")


@needs_trace
def test_the_policies_come_in_the_papers_order_and_within_a_point_of_its_figures() -> None:
    """Weng et al., USENIX ATC 2023, figure 7: the paper's artifact on the default list, with two of our seeds."""
    nodes = read_nodes(TRACE / "openb_node_list_gpu_node.csv.gz")
    experiment = packing.prepare(nodes, read_pods(TRACE / "openb_pod_list_default.csv.gz"))
    assert (len(nodes), experiment.capacity, len(experiment.kinds)) == (1_213, 6_212_000, 8_152)
    found = {}
    for name, (at_100, _, at_130) in packing_report.PUBLISHED["openb_pod_list_default"].items():
        result = packing.run_policy(experiment, name, [42, 43])
        assert result.mean(100) == pytest.approx(at_100, abs=1.0)
        assert result.mean(130) == pytest.approx(at_130, abs=1.0)
        found[name] = result.mean(100)
    close = {"clustering", "packing"}
    assert [name for name in sorted(found, key=found.__getitem__) if name not in close] == [
        "random",
        "dot-product",
        "best-fit",
        "fgd",
    ]
    assert all(found["dot-product"] < found[name] < found["best-fit"] for name in close)


@needs_trace
@pytest.mark.parametrize("name", ["gpushare40", "gpuspec10", "multigpu20"])
def test_the_other_lists_of_the_trace_run_too(name: str) -> None:
    nodes = read_nodes(TRACE / "openb_node_list_all_node.csv.gz")
    experiment = packing.prepare(nodes, read_pods(TRACE / f"openb_pod_list_{name}.csv.gz"))
    result = packing.run_policy(experiment, "best-fit", [42])
    assert 85 < result.mean(100) < 100


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Path]:
    nodes, pods = tmp_path / "nodes.csv", tmp_path / "pods.csv"
    lines = [f"{node.name},{node.cpu_milli},{node.memory_mib},{node.gpus},{node.model}" for node in NODES]
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\n" + "\n".join(lines) + "\n")
    lines = [
        f"{pod.name},{pod.cpu_milli},{pod.memory_mib},{pod.gpus},{pod.gpu_milli},{'|'.join(pod.gpu_models)}"
        for pod in PODS
    ]
    pods.write_text("name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n" + "\n".join(lines) + "\n")
    return pods, nodes


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["reproduce", "fgd", *map(str, arguments)])


def test_the_command_prints_json_with_every_policy(lists: tuple[Path, Path]) -> None:
    pods, nodes = lists
    done = run("--pods", pods, "--nodes", nodes, "--seeds", 2, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [row["policy"] for row in told["results"]] == list(packing.PAPER_POLICIES)
    assert told["seeds"] == [42, 43]
    assert sorted(told["order"]) == sorted(packing.PAPER_POLICIES)
    for row in told["results"]:
        assert row["published_100"] is None
        assert row["allocated_100"] == round(sum(row["seeds_100"]) / 2, 2)
        assert len(row["curve"]) == 131


def test_the_command_prints_tables_and_draws(lists: tuple[Path, Path], tmp_path: Path) -> None:
    pods, nodes = lists
    png, page = tmp_path / "curves.png", tmp_path / "page.html"
    done = run(
        "--pods",
        pods,
        "--nodes",
        nodes,
        "--seeds",
        1,
        "--policy",
        "fgd,packing",
        "--ties",
        "--png",
        png,
        "--html",
        page,
    )
    assert done.exit_code == 0, done.output
    assert "What the tie rule moves" in done.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "<svg" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert text.count("<tr>") == 1 + 2 * len(packing.TIES)


def test_published_figures_stand_beside_ours_for_the_default_list(lists: tuple[Path, Path], tmp_path: Path) -> None:
    pods, nodes = lists
    named = tmp_path / "openb_pod_list_default.csv"
    named.write_text(pods.read_text())
    rows = json.loads(run("--pods", named, "--nodes", nodes, "--seeds", 1, "--json").stdout)["results"]
    assert {row["policy"]: row["published_100"] for row in rows}["fgd"] == 95.23
    other = json.loads(run("--pods", named, "--nodes", nodes, "--seeds", 1, "--json", "--tie", "last").stdout)[
        "results"
    ]
    assert [row["published_100"] for row in other] == [None] * 6


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--policy", "luck"), 2, "--policy: 'luck' is unknown"),
        (("--tie", "luck"), 2, "--tie: 'luck' is unknown"),
        (("--pods", "absent.csv"), 3, "--pods: absent.csv does not exist"),
    ],
)
def test_wrong_options_are_named(
    lists: tuple[Path, Path], arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    pods, nodes = lists
    done = run("--pods", pods, "--nodes", nodes, *arguments)
    assert done.exit_code == code
    assert complaint in done.output


def test_a_broken_list_is_named_by_line(lists: tuple[Path, Path]) -> None:
    pods, nodes = lists
    pods.write_text(pods.read_text().replace(",300,", ",3000,", 1))
    done = run("--pods", pods, "--nodes", nodes)
    assert done.exit_code == 2
    assert "line 2, gpu_milli: 3000 is wrong" in done.output
