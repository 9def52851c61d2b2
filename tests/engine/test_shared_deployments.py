"""Several personalised models deployed on one base share its warm Pods: as many are kept as the one wants that wants most."""

from __future__ import annotations

from engine import snapshot
from engine.commands import CreatePod, DeletePod
from engine.events import Event, ModelDeployed, ModelUndeployed, NodeJoined, PodStarted
from engine.limits import Limits
from engine.profiles import load
from engine.resources import Demand, GpuSpec, NodeSpec
from engine.scheduler import Engine
from engine.tasks import SECOND

GIB = 1 << 30
NODE = NodeJoined(NodeSpec("n1", tuple(GpuSpec(f"g{i}", "a100", 80 * GIB) for i in range(8))))


class Drill:
    """An engine whose Pods start at once."""

    def __init__(self) -> None:
        self.engine = Engine(load("aigc"), Limits())
        self.now = 0
        self.step(NODE)

    def step(self, *events: Event, later_us: int = SECOND) -> list[object]:
        self.now += later_us
        commands = list(self.engine.step(self.now, events))
        started = [PodStarted(each.pod) for each in commands if isinstance(each, CreatePod)]
        if started:
            self.engine.step(self.now, started)
        return commands

    def deploy(self, adapter: str, pods: int, model: str = "base") -> list[CreatePod]:
        event = ModelDeployed(model, "text_to_image", Demand(), 4, pods, adapter)
        return [each for each in self.step(event) if isinstance(each, CreatePod)]

    def undeploy(self, adapter: str, model: str = "base") -> None:
        self.step(ModelUndeployed(model, "text_to_image", adapter))

    @property
    def kept(self) -> int:
        return sum(each.pods for each in self.engine.state.deployments.values())


def test_models_of_one_base_share_its_pods() -> None:
    drill = Drill()
    assert [pod.model for pod in drill.deploy("lora-1", 1)] == ["base"]
    assert drill.deploy("lora-2", 1) == []
    assert len(drill.deploy("", 2)) == 1
    assert len(drill.deploy("lora-3", 3)) == 1
    assert (drill.kept, len(drill.engine.state.pods)) == (3, 3)


def test_what_is_undeployed_is_given_back_unless_others_want_it() -> None:
    drill = Drill()
    for adapter, pods in (("lora-1", 3), ("lora-2", 1), ("", 2)):
        drill.deploy(adapter, pods)
    left = []
    for adapter in ("lora-1", "", "lora-2"):
        drill.undeploy(adapter)
        left.append(drill.kept)
    assert left == [2, 1, 0]
    gone = drill.step(later_us=Limits().idle_ttl_us + SECOND)
    assert len([each for each in gone if isinstance(each, DeletePod)]) == 3


def test_undeploying_what_is_not_deployed_changes_nothing() -> None:
    drill = Drill()
    drill.deploy("lora-1", 2)
    drill.undeploy("lora-9")
    assert drill.kept == 2
    assert drill.engine.state.ignored["ModelUndeployed"] == 1


def test_a_deployment_from_when_models_had_pods_of_their_own_is_taken_over() -> None:
    drill = Drill()
    drill.deploy("", 1, model="lora-1")
    drill.deploy("lora-1", 1)
    assert [each.model for each in drill.engine.state.deployments.values()] == ["base"]
    drill = Drill()
    drill.deploy("", 1, model="lora-1")
    drill.undeploy("lora-1")
    assert drill.kept == 0


def test_who_wants_the_pods_survives_a_snapshot() -> None:
    drill = Drill()
    for adapter, pods in (("lora-1", 2), ("lora-2", 1)):
        drill.deploy(adapter, pods)
    state = snapshot.restore(drill.engine.snapshot())
    [deployment] = state.deployments.values()
    assert deployment.wanted == {"lora-1": 2, "lora-2": 1}
    assert snapshot.digest(state) == snapshot.digest(drill.engine.state)
