"""Follows GPUs through the journal: what is there, granted, busy and wasted in splinters, over time and by node."""

from __future__ import annotations

from engine.commands import CreatePod
from engine.resources import WHOLE_GPU, Demand, GpuGrant, GpuSpec, NodeSpec
from engine.tasks import SECOND, Micros
from sim.sketches import Bins

_CLASSES = 16
"""Kinds of demand that fragmentation is judged by; rarer ones count to the most common."""


class _Node:
    __slots__ = ("busy", "free", "gpus", "healthy", "splinters")

    def __init__(self) -> None:
        self.gpus: dict[str, str] = {}
        self.free: dict[str, int] = {}
        self.healthy: dict[str, bool] = {}
        self.busy = Bins(limit=120)
        self.splinters = 0.0


class LedgerPod:
    """A Pod with its devices, and how many tasks are in it."""

    __slots__ = ("demand", "gone", "gpu_model", "grants", "node", "place", "running", "share")

    def __init__(self, node: str, place: _Node, grants: tuple[GpuGrant, ...], demand: Demand) -> None:
        self.node = node
        self.place = place
        self.grants = grants
        self.demand = demand
        self.running = 0
        self.share = sum([grant.share for grant in grants])
        self.gpu_model = place.gpus.get(grants[0].uuid, "*") if grants else "*"
        """The GPU model it runs on; ``*`` when it has none."""
        self.gone = False


class GpuLedger:
    """Shares of GPUs over time, in thousandths x microseconds until they are reported as GPUs."""

    def __init__(self) -> None:
        self.capacity, self.granted, self.busy, self.splinters = Bins(), Bins(), Bins(), Bins()
        self._nodes: dict[str, _Node] = {}
        self._pods: dict[int, LedgerPod] = {}
        self._kinds: dict[tuple[int, int], int] = {}
        self._wanted = 0
        self._last: tuple[Demand, tuple[int, int]] | None = None

    # --- nodes --------------------------------------------------------------------------------------------------------

    def joined(self, now: Micros, spec: NodeSpec, pods: tuple[int, ...]) -> None:
        """Take a node in; the Pods it does not name are gone."""
        known = self._nodes.get(spec.name)
        if known is not None:
            for number in [
                number for number, pod in self._pods.items() if pod.node == spec.name and number not in pods
            ]:
                self.pod_gone(now, number)
        self.reported(now, spec.name, spec.gpus)

    def reported(self, now: Micros, name: str, gpus: tuple[GpuSpec, ...]) -> None:
        """Note what GPUs a node has and which are well."""
        node = self._nodes.setdefault(name, _Node())
        before = sum(node.healthy.values())
        node.healthy = {gpu.uuid: gpu.healthy for gpu in gpus}
        for gpu in gpus:
            node.gpus[gpu.uuid] = gpu.model
            node.free.setdefault(gpu.uuid, WHOLE_GPU)
        self.capacity.change(now, (sum(node.healthy.values()) - before) * WHOLE_GPU)
        self._judge(now, node)

    def lost(self, now: Micros, name: str) -> None:
        """Take a node and its Pods out."""
        node = self._nodes.get(name)
        if node is None:
            return
        for number in [number for number, pod in self._pods.items() if pod.node == name]:
            self.pod_gone(now, number)
        self.capacity.change(now, -sum(node.healthy.values()) * WHOLE_GPU)
        node.healthy = {}
        self._judge(now, node)

    # --- Pods ---------------------------------------------------------------------------------------------------------

    def wanted(self, demand: Demand) -> None:
        """Note what kinds of demand there are: fragmentation is judged by them."""
        last = self._last
        if last is not None and last[0] is demand:
            self._kinds[last[1]] += 1
            self._wanted += 1
        elif demand.gpus:
            kind = (demand.gpus, demand.gpu_share)
            if kind in self._kinds or len(self._kinds) < _CLASSES:
                self._kinds[kind] = self._kinds.get(kind, 0) + 1
                self._wanted += 1
                self._last = (demand, kind)

    def pod(self, number: int) -> LedgerPod | None:
        """Return a Pod that is there."""
        return self._pods.get(number)

    def pod_created(self, now: Micros, order: CreatePod) -> None:
        """Take the devices for a Pod."""
        node = self._nodes.get(order.node)
        if node is None or order.pod in self._pods:
            return
        pod = self._pods[order.pod] = LedgerPod(order.node, node, order.grants, order.demand)
        for grant in order.grants:
            node.free[grant.uuid] = node.free.get(grant.uuid, WHOLE_GPU) - grant.share
        self.granted.change(now, pod.share)
        self._judge(now, node)

    def pod_gone(self, now: Micros, number: int) -> None:
        """Give the devices of a Pod back."""
        pod = self._pods.pop(number, None)
        if pod is None:
            return
        node = self._nodes[pod.node]
        for grant in pod.grants:
            node.free[grant.uuid] += grant.share
        pod.gone = True
        self.granted.change(now, -pod.share)
        if pod.running:
            self.busy.change(now, -pod.share)
            node.busy.change(now, -pod.share)
        self._judge(now, node)

    def task_began(self, now: Micros, pod: LedgerPod | None) -> None:
        """Count a task into its Pod: the Pod's GPUs are busy while it has one."""
        if pod is None or pod.gone:
            return
        pod.running += 1
        if pod.running == 1:
            self.busy.change(now, pod.share)
            pod.place.busy.change(now, pod.share)

    def task_ended(self, now: Micros, pod: LedgerPod | None) -> None:
        """Count a task out of its Pod."""
        if pod is None or pod.gone or not pod.running:
            return
        pod.running -= 1
        if not pod.running:
            self.busy.change(now, -pod.share)
            pod.place.busy.change(now, -pod.share)

    def _judge(self, now: Micros, node: _Node) -> None:
        """Work out the share of a node's free GPUs that a task like those seen so far could not use."""
        free = [amount for uuid, amount in node.free.items() if node.healthy.get(uuid) and amount > 0]
        total = sum(free)
        lost = 0.0
        if total and self._wanted:
            for (gpus, share), count in self._kinds.items():
                fitting = [amount for amount in free if amount >= share]
                usable = sum(fitting) if len(fitting) >= gpus else 0
                lost += (total - usable) * count / self._wanted
        self.splinters.change(now, lost - node.splinters)
        node.splinters = lost

    # --- reading ------------------------------------------------------------------------------------------------------

    def close(self, now: Micros) -> None:
        """Bring every series up to this moment."""
        for series in (self.capacity, self.granted, self.busy, self.splinters):
            series.advance(now)
        for node in self._nodes.values():
            node.busy.advance(now)

    def gpu_hours(self, series: Bins) -> float:
        """Return a series' integral in GPU hours."""
        return series.total / WHOLE_GPU / SECOND / 3600

    def heat(self) -> dict[str, tuple[float, list[float]]]:
        """Return by node: seconds per bin, and the share of its GPUs that was busy in each bin."""
        found = {}
        for name, node in self._nodes.items():
            size = max(1, len(node.gpus)) * WHOLE_GPU
            found[name] = (node.busy.width_us / SECOND, [mean / size for mean in node.busy.means()])
        return found
