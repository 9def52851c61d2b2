"""Acts out a fault plan on the simulated cluster: machines die and come back, GPUs fall ill and recover."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from engine.events import NodeJoined, NodeLost, NodeReported
from engine.resources import NodeSpec
from engine.tasks import Micros
from sim.faults import Fault, FaultKind, FaultPlan
from sim.parts import SimNode

if TYPE_CHECKING:
    from sim.world import SimWorld


class Breakage:
    """The failures of one run. The controller learns of a dead node only after its silence (`Hardware.detect_us`)."""

    def __init__(self, world: SimWorld, plan: FaultPlan) -> None:
        self._world = world
        self._plan = plan
        self._nth: dict[tuple[FaultKind, str], int] = {}

    def arm(self) -> None:
        """Put the listed faults and each part's first failure on the clock."""
        world, plan = self._world, self._plan
        for fault in plan.faults:
            self._check(fault)
            world.after(fault.at - world.now(), self.strike, fault)
        for name, node in world.nodes.items():
            if plan.node_mtbf_us:
                self._arm_own(FaultKind.NODE_LOST, name, "")
            if plan.gpu_mtbf_us:
                for gpu in node.spec.gpus:
                    self._arm_own(FaultKind.GPU_ILL, name, gpu.uuid)

    def _check(self, fault: Fault) -> None:
        node = self._world.nodes.get(fault.node)
        if node is None:
            raise ValueError(
                f"faults: node {fault.node!r} is not in the cluster; its nodes are {', '.join(self._world.nodes)}"
            )
        if fault.kind is FaultKind.GPU_ILL and fault.gpu not in node.model_of:
            raise ValueError(
                f"faults: GPU {fault.gpu!r} is not on node {fault.node!r}; it has {', '.join(node.model_of)}"
            )

    def _arm_own(self, kind: FaultKind, node: str, gpu: str) -> None:
        name = gpu or node
        nth = self._nth.get((kind, name), 0)
        self._nth[kind, name] = nth + 1
        up = self._plan.next_up_us(self._world.seed, kind, name, nth)
        if up is None:
            return
        down = self._plan.next_down_us(self._world.seed, kind, name, nth)
        self._world.after(up, self._strike_again, Fault(self._world.now() + up, kind, node, gpu, down))

    def _strike_again(self, fault: Fault) -> None:
        self.strike(fault)
        assert fault.repair_after_us is not None
        self._world.after(fault.repair_after_us, self._arm_own, fault.kind, fault.node, fault.gpu)

    def strike(self, fault: Fault) -> None:
        """Let a fault happen now."""
        node = self._world.nodes[fault.node]
        match fault.kind:
            case FaultKind.NODE_LOST:
                self._lose(node, fault.repair_after_us)
            case FaultKind.GPU_ILL:
                self._sicken(node, fault.gpu, fault.repair_after_us)
            case FaultKind.PODS_CRASHED:
                for pod in list(node.pods):
                    self._world.crash_pod(pod, "drill")
            case _:
                assert_never(fault.kind)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _lose(self, node: SimNode, repair_after_us: Micros | None) -> None:
        if not node.up:
            return
        world = self._world
        node.up = False
        node.life += 1
        node.memory.clear()
        node.fetching.clear()
        for pod in list(node.pods):
            world.forget_pod(pod)
        world.count("node_failures")
        world.after(world.hardware.detect_us, self._noticed, node, node.life)
        if repair_after_us is not None:
            world.after(repair_after_us, self._return, node, node.life)

    def _noticed(self, node: SimNode, life: int) -> None:
        if not node.up and node.life == life:
            self._world.emit(NodeLost(node.spec.name, "silent"))

    def _return(self, node: SimNode, life: int) -> None:
        if not node.up and node.life == life:
            node.up = True
            self._world.emit(NodeJoined(self.seen(node)))
            if len(node.disk):
                self._world.tell_later(node)

    # --- GPUs ---------------------------------------------------------------------------------------------------------

    def _sicken(self, node: SimNode, uuid: str, repair_after_us: Micros | None) -> None:
        if uuid in node.ill:
            return
        world = self._world
        node.ill.add(uuid)
        world.count("gpu_failures")
        for pod in node.pods.values():
            if any(grant.uuid == uuid for grant in pod.order.grants):
                pod.hung = True
                for attempt in pod.running.values():
                    attempt.token += 1
        if node.up:
            world.emit(NodeReported(node.spec.name, self.seen(node).gpus))
        if repair_after_us is not None:
            world.after(repair_after_us, self._heal, node, uuid)

    def _heal(self, node: SimNode, uuid: str) -> None:
        if uuid in node.ill:
            node.ill.discard(uuid)
            if node.up:
                self._world.emit(NodeReported(node.spec.name, self.seen(node).gpus))

    def seen(self, node: SimNode) -> NodeSpec:
        """Return the node as its DevicePlugin sees it now."""
        gpus = tuple(replace(gpu, healthy=gpu.uuid not in node.ill) for gpu in node.spec.gpus)
        return replace(node.spec, gpus=gpus)
