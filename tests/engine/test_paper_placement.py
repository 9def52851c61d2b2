"""The placement classics against their definitions: each test cites where the rule comes from and works it out by hand."""

from __future__ import annotations

from collections import Counter
from math import exp
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from engine import profiles
from engine.cluster import Cluster
from engine.commands import CreatePod
from engine.entities import Node, Task, Tenant
from engine.events import TaskSubmitted
from engine.fit import Fit
from engine.levels.scorers import SCORERS, scorer
from engine.levels.scoring.fragmentation import Fragmentation, Typical, most_popular
from engine.levels.scoring.gradient import Fgd
from engine.levels.scoring.protocol import fitting_devices
from engine.levels.speed import fastest
from engine.resources import Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import SECOND, Estimate, Quantiles, TaskSpec, TaskType

MIB = 1 << 20


def add(cluster: Cluster, name: str, free: list[int], cpu: int = 0, of_cpu: int = 128_000, model: str = "m") -> Node:
    """Add a node with these free shares and this free CPU."""
    specs = tuple(GpuSpec(f"g{at}", model, 16) for at in range(len(free)))
    node = cluster.add(NodeSpec(name, specs, cpu_milli=of_cpu))
    cluster.take(node, (), Demand(gpus=0, cpu_milli=of_cpu - cpu))
    for at, share in enumerate(free):
        if share < 1000:
            cluster.take(node, (GpuGrant(f"g{at}", 1000 - share, 0),), Demand(gpus=0))
    return node


def score(name: str, cluster: Cluster, node: Node, demand: Demand) -> int:
    one = SCORERS[name].node(cluster, node, demand)
    assert one == SCORERS[name].nodes(cluster, demand)[node.index]
    return one


# --- FGD: Weng et al., USENIX ATC 2023, sections 3.2 and 4.2 ---------------------------------------------------------

HAND = (
    Typical(3, cpu_milli=4_000, gpu_share=500),
    Typical(1, cpu_milli=8_000, gpus=2),
    Typical(1, cpu_milli=2_000, gpus=0),
)


def test_fragmentation_is_what_the_typical_shapes_cannot_use() -> None:
    measure = Fragmentation(HAND)
    # 1.3 GPUs are free. Half a GPU fits: only the device with 0.3 is a fragment to it. Two GPUs do not fit, and a shape without
    # GPUs cannot use any: all 1.3 are. So 3 x 300 + 1 x 1300 + 1 x 1300, of 5 counts.
    assert measure.of(0, measure.cpu_class(10_000), [300, 1000]) == 3_500
    # With less CPU than half a GPU needs, everything is a fragment to everyone.
    assert measure.of(0, measure.cpu_class(3_999), [300, 1000]) == 5 * 1_300
    # Two whole GPUs and the CPU for them: a fragment only to the shape without GPUs.
    assert measure.of(0, measure.cpu_class(8_000), [1000, 1000]) == 2_000
    assert measure.of(0, measure.cpu_class(7_999), [1000, 1000]) == 4_000


def test_fgd_goes_down_the_gradient_and_picks_the_device_too() -> None:
    cluster = Cluster()
    node = add(cluster, "n", [300, 1000], cpu=10_000)
    demand = Demand(gpu_share=300, cpu_milli=1_000)
    fgd = Fgd(HAND)
    # On the device with 0.3: 0 + 1000 + 1000 remain, 1500 less than 3500; on the whole one 3 x 300 + 1000 + 1000, 600 less.
    measure = Fragmentation(HAND)
    after = measure.cpu_class(9_000)
    assert measure.of(0, after, [0, 1000]) == 2_000
    assert measure.of(0, after, [300, 700]) == 2_900
    assert fgd.node(cluster, node, demand) == 10 * int(100 / (1 + exp(-1500 / 5 / 1000))) == 570
    assert fgd.nodes(cluster, demand).tolist() == [570]
    assert fgd.device(node, demand, fitting_devices(node, demand)) is node.gpus[0]
    assert Fit(cluster, demand, ((fgd, 1),)).grants(node) == (GpuGrant("g0", 300, 0),)


def test_fgd_prefers_the_node_that_nobody_else_can_use() -> None:
    cluster = Cluster()
    whole, broken = add(cluster, "a", [1000, 1000], cpu=16_000), add(cluster, "b", [400], cpu=16_000)
    fit = Fit(cluster, Demand(gpu_share=400, cpu_milli=1_000), ((Fgd(HAND), 1),))
    assert fit.best() is broken
    assert fit.score(broken) > fit.score(whole)


def by_definition(typical: tuple[Typical, ...], model: str, cpu: int, shares: list[int]) -> int:
    """Equations of section 3.2, shape by shape and device by device."""
    amount = 0
    for shape in typical:
        able = sum(share >= shape.gpu_share for share in shares)
        fits = shape.gpus > 0 and cpu >= shape.cpu_milli and able >= shape.gpus
        fits = fits and (not shape.gpu_models or model in shape.gpu_models)
        amount += shape.count * sum(share for share in shares if not fits or share < shape.gpu_share)
    return amount


SHAPES = st.one_of(
    st.builds(
        Typical,
        count=st.integers(1, 9),
        cpu_milli=st.integers(0, 4),
        gpus=st.just(1),
        gpu_share=st.integers(1, 1000),
        gpu_models=st.sampled_from(((), ("a",), ("a", "b"))),
    ),
    st.builds(Typical, count=st.integers(1, 9), cpu_milli=st.integers(0, 4), gpus=st.sampled_from((0, 1, 2, 4))),
)
SHARES = st.lists(st.one_of(st.integers(0, 1000), st.just(1000)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    typical=st.lists(SHAPES, min_size=1, max_size=6), model=st.sampled_from("abc"), cpu=st.integers(0, 5), shares=SHARES
)
def test_the_tables_say_what_the_definition_says(typical: Any, model: str, cpu: int, shares: list[int]) -> None:
    measure = Fragmentation(typical)
    found = measure.of(measure.model(model), measure.cpu_class(cpu), shares)
    assert found == by_definition(tuple(typical), model, cpu, shares)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    typical=st.lists(SHAPES, min_size=1, max_size=5),
    nodes=st.lists(st.tuples(SHARES, st.integers(0, 5), st.sampled_from("abc")), min_size=1, max_size=4),
    demand=st.builds(
        Demand,
        gpus=st.sampled_from((0, 1, 1, 2, 3)),
        gpu_share=st.sampled_from((1, 200, 500, 1000)),
        gpu_models=st.sampled_from(((), ("a",))),
        cpu_milli=st.integers(0, 3),
    ),
)
def test_fgd_scores_one_node_and_all_nodes_alike(typical: Any, nodes: Any, demand: Demand) -> None:
    cluster, fgd = Cluster(), Fgd(typical)
    for at, (shares, cpu, model) in enumerate(nodes):
        add(cluster, f"n{at}", shares, cpu, 10, model)
    assert fgd.nodes(cluster, demand).tolist() == [fgd.node(cluster, node, demand) for node in cluster.nodes]


def test_typical_shapes_are_the_most_popular_ones() -> None:
    shapes = [Typical(60, gpu_share=500), Typical(30), Typical(6, gpus=2), Typical(4, gpus=4)]
    assert most_popular(shapes, 95) == tuple(shapes[:3])
    assert most_popular(shapes, 90) == tuple(shapes[:2])
    assert most_popular(reversed(shapes), 100) == tuple(shapes)


# --- GPU packing and GPU clustering: the paper's section 6.1 names them as baselines ---------------------------------


def test_packing_takes_used_devices_then_used_nodes_then_fresh_nodes() -> None:
    cluster = Cluster()
    fresh = add(cluster, "fresh", [1000, 1000])
    half = add(cluster, "half", [400, 1000])
    fuller = add(cluster, "fuller", [350, 1000])
    tight = add(cluster, "tight", [200, 1000])
    demand = Demand(gpu_share=300)
    # 100 - 35% / 10 and 100 - 40% / 10 on devices in use; 50 - 1 when a free device must be opened; 33 - 2 on an unused node.
    assert [score("packing", cluster, node, demand) for node in (fuller, half, tight, fresh)] == [970, 960, 490, 310]
    assert score("packing", cluster, half, Demand(gpus=1)) == 490
    assert score("packing", cluster, half, Demand(gpus=0)) == 0


def test_packing_prefers_the_smaller_of_two_unused_nodes() -> None:
    cluster = Cluster()
    add(cluster, "large", [1000] * 8)
    small = add(cluster, "small", [1000] * 2)
    assert Fit(cluster, Demand(gpus=2), ((SCORERS["packing"], 1),)).best() is small


def test_clustering_keeps_pods_of_one_kind_together(desk: Any, task: Any) -> None:
    text = (
        'name = "c"\n[placement]\ngroup_affinity = false\nscorers = { clustering = 1 }\n[binding]\nwarm_reuse = false'
    )
    d = desk(profiles.load(text))
    for name in ("n1", "n2", "n3"):
        d.node(name, gpus=4, cpu_milli=128_000)
    half, one = Demand(gpu_share=400), Demand(gpus=1)
    for at, demand in enumerate((half, one, half, one, half)):
        d.submit(task(f"t{at}", demand=demand))
    # The first shared Pod goes to n1; a whole GPU finds n1 of another kind and takes an unused node; the rest follow their kind.
    assert [d.where(f"t{at}") for at in range(5)] == ["n1", "n2", "n1", "n2", "n1"]


# --- vectors: dot product (Grandl et al., SIGCOMM 2014, section 3.2, as a cost), best fit and worst fit ---------------


def test_dot_product_keeps_nodes_that_look_like_the_demand() -> None:
    cluster = Cluster()
    much_cpu = add(cluster, "cpu", [1000], cpu=128_000)
    much_gpu = add(cluster, "gpu", [1000] * 8, cpu=16_000)
    hungry = Demand(gpus=1, cpu_milli=64_000)
    # (128/128 x 64/128 + 1/8 x 1/8) / 2 = 0.2578 of alignment costs 26 hundredths on the one, (16/128 x 64/128 + 1 x 1/8) / 2 =
    # 0.09375 costs 10 on the other, where its CPU does not suffice; a demand without CPU turns them round.
    assert score("dot_product", cluster, much_cpu, hungry) == 740
    assert score("dot_product", cluster, much_gpu, hungry) == 900
    assert score("dot_product", cluster, much_cpu, Demand(gpus=1)) == 990
    assert score("dot_product", cluster, much_gpu, Demand(gpus=1)) == 930


def test_best_fit_leaves_least_and_worst_fit_leaves_most() -> None:
    cluster = Cluster()
    tight = add(cluster, "tight", [600], cpu=16_000)
    wide = add(cluster, "wide", [1000] * 4, cpu=64_000)
    demand = Demand(gpu_share=600, cpu_milli=16_000)
    # Nothing is left on the one; 48/128 of CPU and 3.4/8 of GPU on the other: 1 - (0.375 + 0.425) / 2 = 0.6.
    assert [score("best_fit_vector", cluster, node, demand) for node in (tight, wide)] == [1000, 600]
    assert [score("worst_fit", cluster, node, demand) for node in (tight, wide)] == [0, 400]


def test_a_node_larger_than_the_formulas_know_still_scores_at_least_nothing() -> None:
    cluster = Cluster()
    huge = add(cluster, "huge", [1000] * 40, cpu=900_000, of_cpu=900_000)
    for name in ("dot_product", "best_fit_vector", "worst_fit", "clustering", "packing"):
        for demand in (Demand(gpus=8, cpu_milli=500_000), Demand(gpu_share=1), Demand(gpus=0, cpu_milli=1)):
            assert score(name, cluster, huge, demand) >= 0


# --- kube-scheduler: NodeResourcesLeastAllocated and NodeResourcesBalancedAllocation ---------------------------------


def test_balanced_allocation_is_one_less_the_deviation_of_the_used_parts() -> None:
    cluster = Cluster()
    specs = (GpuSpec("g0", "m", 16), GpuSpec("g1", "m", 16))
    node = cluster.add(NodeSpec("n", specs, cpu_milli=10_000, memory_bytes=100 * MIB))
    # With the Pod: GPU 1/2, CPU 1/10, memory 3/10; mean 0.3, deviation sqrt((0.04 + 0.04 + 0) / 3) = 0.163.
    demand = Demand(gpus=1, cpu_milli=1_000, memory_bytes=30 * MIB)
    assert score("balanced", cluster, node, demand) == 1000 - 163
    even = Demand(gpus=1, cpu_milli=5_000, memory_bytes=50 * MIB)
    assert score("balanced", cluster, node, even) == 1000


def test_least_allocated_is_the_mean_of_the_free_parts() -> None:
    cluster = Cluster()
    node = add(cluster, "n", [1000, 500], cpu=32_000)
    assert score("spread", cluster, node, Demand()) == (750 + 250) // 2


# --- first fit, random, and what decides between equals -----------------------------------------------------------------


def four_nodes(*names: str) -> Cluster:
    cluster = Cluster()
    for name in names:
        add(cluster, name, [1000])
    return cluster


@pytest.mark.parametrize(("tie", "name"), [("first", "c"), ("last", "d"), ("name", "a")])
def test_the_tie_rule_decides_between_equals(tie: str, name: str) -> None:
    fit = Fit(four_nodes("c", "a", "b", "d"), Demand(), ((SCORERS["first_fit"], 1),), tie=tie)
    found = fit.best()
    assert found is not None
    assert found.name == name


def test_names_decide_among_nodes_that_join_later_too() -> None:
    cluster = four_nodes("c", "b")
    fit = Fit(cluster, Demand(), (), tie="name")
    assert fit.best() is cluster.nodes[1]
    late = add(cluster, "a", [1000])
    assert fit.best() is late


def test_a_random_tie_is_uniform_and_the_same_for_the_same_task() -> None:
    fit = Fit(four_nodes("a", "b", "c", "d"), Demand(), (), tie="random")
    counts = Counter(node.name for node in (fit.best(key) for key in range(4_000)) if node is not None)
    assert all(900 < counts[name] < 1_100 for name in "abcd")
    assert fit.best(7) is fit.best(7)


def test_the_random_profile_spreads_tasks_and_repeats_itself(desk: Any, task: Any) -> None:
    runs = []
    for _ in range(2):
        d = desk("random")
        for at in range(8):
            d.node(f"n{at}", gpus=4)
        for at in range(16):
            d.submit(task(f"t{at}", model=f"m{at}", demand=Demand(gpu_share=300)))
        runs.append([(c.node, c.grants) for c in d.orders if isinstance(c, CreatePod)])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 16
    assert len({node for node, _ in runs[0]}) > 4
    assert len({grants[0].uuid.rpartition("-")[2] for _, grants in runs[0]}) > 2


# --- profiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["random", "first-fit", "best-fit", "worst-fit", "dot-product", "packing", "clustering", "fgd"]
)
def test_every_placement_has_a_profile_that_places(desk: Any, task: Any, name: str) -> None:
    d = desk(name)
    d.node("n1", gpus=2, cpu_milli=64_000)
    d.node("n2", gpus=2, cpu_milli=64_000)
    for at in range(4):
        d.answer(d.submit(task(f"t{at}", model=f"m{at}", demand=Demand(cpu_milli=1_000))))
    assert [d.state(f"t{at}") for at in range(4)] == ["running"] * 4


def test_a_profile_names_its_typical_shapes() -> None:
    text = """
name = "ours"
[placement]
scorers = { fgd = 2 }
tie = "last"
[[placement.typical]]
count = 3
gpu_share = 500
cpu_milli = 4000
[[placement.typical]]
count = 1
gpus = 2
gpu_models = ["h100", "a100"]
"""
    profile = profiles.load(text)
    assert profile.tie == "last"
    assert profile.typical == (
        Typical(3, cpu_milli=4_000, gpu_share=500),
        Typical(1, gpus=2, gpu_models=("a100", "h100")),
    )
    ((made, weight),) = profile.scorer_values()
    assert weight == 2
    assert made is not SCORERS["fgd"]
    assert scorer("fgd") is SCORERS["fgd"]


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ('tie = "luck"', "placement.tie: 'luck' is unknown; use first, last, name, random"),
        ("typical = []", "placement.typical: use one table per shape"),
        ("typical = [{ gpus = 1 }]", "placement.typical[0].count: it is missing"),
        ("typical = [{ count = 0 }]", "typical.count: 0 is wrong"),
        ("typical = [{ count = 1, gpu_share = 1001 }]", "typical.gpu_share: 1001 is wrong"),
        (
            "typical = [{ count = 1, gpus = 2, gpu_share = 500 }]",
            "typical.gpu_share: a shape of 2 GPUs takes whole ones",
        ),
        ("typical = [{ count = 1, cpu = 1 }]", "placement.typical[0].cpu: there is no such key"),
        ("typical = [{ count = 1, cpu_milli = -1 }]", "placement.typical[0].cpu_milli: -1 is wrong"),
        ('typical = [{ count = 1, gpu_models = "a" }]', "placement.typical[0].gpu_models: 'a' is wrong"),
    ],
)
def test_a_wrong_placement_key_is_named_with_its_remedy(key: str, complaint: str) -> None:
    with pytest.raises(profiles.InvalidProfile) as caught:
        profiles.load(f'name = "x"\n[placement]\n{key}\n')
    assert complaint in str(caught.value)


# --- unlike GPUs, warm models, and gangs close together -----------------------------------------------------------------


def seconds(**by_model: float) -> Estimate:
    def quantiles(value: float) -> Quantiles:
        return Quantiles(*[round(value * SECOND)] * 4)

    return Estimate(tuple(sorted((name.replace("any", "*"), quantiles(value)) for name, value in by_model.items())))


def place_with_estimate(desk: Any, task: Any, estimate: Estimate | None, profile: str = "heterogeneous") -> str:
    d = desk(profile)
    d.node("slow", gpus=4, model="t4")
    d.node("fast", gpus=4, model="h100")
    d.step(TaskSubmitted(task("t"), estimate))
    return str(d.where("t"))


def test_a_task_goes_to_the_gpu_model_that_runs_it_fastest(desk: Any, task: Any) -> None:
    assert place_with_estimate(desk, task, seconds(any=20, t4=40, h100=10)) == "fast"
    assert place_with_estimate(desk, task, seconds(any=20, t4=10, h100=40)) == "slow"
    # Without a prediction, or one that knows no difference, the first of two equals is taken.
    assert place_with_estimate(desk, task, seconds(any=20)) == "slow"
    assert place_with_estimate(desk, task, None) == "slow"
    assert (
        place_with_estimate(desk, task, seconds(any=20, t4=40, h100=10), "best-fit") == "fast"
    )  # "fast" < "slow" by name
    assert place_with_estimate(desk, task, seconds(any=20, t4=40, h100=10), "first-fit") == "slow"


def test_a_small_gain_in_speed_yields_to_the_score() -> None:
    cluster = Cluster()
    full, empty = add(cluster, "full", [1000, 0], model="a"), add(cluster, "empty", [1000, 1000], model="b")
    fit = Fit(cluster, Demand(), ((SCORERS["best_fit"], 1),))
    one = Tenant("a", 0)

    def chosen(weight: int, slow: float) -> Node | None:
        spec = TaskSpec("t", "a", "", TaskType.GC, "sleep")
        return fastest(cluster, fit, Task(spec, 1, one, None, 0, seconds(any=9, a=slow, b=10)), weight, 0)

    # Best fit says 500 for the half-full node; with weight 1000 the slower model adds 1000 x 10/11 = 909 and 1000 x 10/40 = 250.
    assert chosen(1000, 11) is full
    assert chosen(1000, 40) is empty
    assert chosen(100, 40) is full


def test_a_model_that_is_cached_draws_its_tasks(desk: Any, task: Any) -> None:
    d = desk("model-aware")
    d.node("n1", gpus=4)
    d.node("n2", gpus=4)
    d.answer(d.submit(task("first", model="sd", slots=1)))
    d.answer(d.submit(task("other", model="xl", slots=1)))
    assert d.where("first") == "n1"
    d.submit(task("again", model="sd", slots=1))
    assert d.where("again") == "n1"


def gang_on(d: Any, task: Any, members: int) -> list[str]:
    d.submit(task("gang", members=members, demand=Demand(gpus=1)))
    return sorted(c.node for c in d.orders if isinstance(c, CreatePod) and c.req_no == "gang")


def rack(name: str) -> tuple[tuple[str, str], ...]:
    return (("rack", name),)


def test_a_gang_goes_to_one_node_where_that_is_possible(desk: Any, task: Any) -> None:
    d = desk("topology")
    d.node("a1", gpus=2, labels=rack("a"))
    d.node("a2", gpus=2, labels=rack("a"))
    d.node("b1", gpus=4, labels=rack("b"))
    assert gang_on(d, task, 4) == ["b1"] * 4


def test_a_gang_too_large_for_a_node_goes_to_one_rack_on_as_few_nodes_as_possible(desk: Any, task: Any) -> None:
    d = desk("topology")
    d.node("a1", gpus=4, labels=rack("a"))
    d.node("b1", gpus=1, labels=rack("b"))
    d.node("b2", gpus=4, labels=rack("b"))
    d.node("b3", gpus=2, labels=rack("b"))
    # No rack but b has room for six: four on b2, and the smallest room for the other two is b3's.
    assert gang_on(d, task, 6) == ["b2"] * 4 + ["b3"] * 2


def test_a_gang_too_large_for_a_rack_goes_anywhere_and_unlabelled_nodes_are_no_rack(desk: Any, task: Any) -> None:
    d = desk("topology")
    d.node("a1", gpus=2, labels=rack("a"))
    d.node("x1", gpus=2)
    d.node("x2", gpus=2)
    assert gang_on(d, task, 5) == ["a1"] * 2 + ["x1"] * 2 + ["x2"]


# --- a scorer of one's own ----------------------------------------------------------------------------------------------


def test_the_scorer_in_the_documentation_works(desk: Any, task: Any, tmp_path: Path, monkeypatch: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```python\n")[1:] if "class FewPods" in part).split("```")[0]
    (tmp_path / "my_scorers.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = 'name = "few"\n[placement]\ngroup_affinity = false\nscorers = { "my_scorers:FewPods" = 1 }'
    d = desk(profiles.load(text))
    d.node("n1", gpus=4)
    d.node("n2", gpus=4)
    for at in range(4):
        d.submit(task(f"t{at}", model=f"m{at}"))
    assert [d.where(f"t{at}") for at in range(4)] == ["n1", "n2", "n1", "n2"]
    with pytest.raises(profiles.InvalidProfile, match="there is no such scorer"):
        profiles.load(text, own_policies=False)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_such_module_here:X", "cannot be made (No module named"),
        ("engine.tasks:X", "cannot be made (module 'engine.tasks' has no attribute 'X')"),
        ("engine.resources:Demand", "is no scorer; it needs the methods node and nodes"),
        ("engine.levels.speed:fastest", "cannot be made (fastest() missing"),
    ],
)
def test_a_scorer_that_cannot_be_made_is_named(name: str, complaint: str) -> None:
    with pytest.raises(profiles.InvalidProfile) as caught:
        profiles.load(f'name = "x"\n[placement]\nscorers = {{ "{name}" = 1 }}')
    assert complaint in str(caught.value)
