"""One step while it is being decided: what the levels read, and the one way for them to give an order."""

from __future__ import annotations

from collections.abc import Sequence

from engine.backlog import Backlog
from engine.commands import Command, DeletePod, Notify, StartTask
from engine.entities import Deployment, Pod, Task
from engine.fold_commands import COMMAND_FOLDS, pend, start_in
from engine.kinds import RoomLine
from engine.limits import Limits
from engine.lines import Rank
from engine.making import notify
from engine.profile import Profile
from engine.reasons import Reason
from engine.state import State
from engine.tasks import Micros, PodState, TaskState


class Turn:
    """Collects the orders of one step; each is applied to the state the moment it is given."""

    __slots__ = (
        "backlog",
        "check_capacity",
        "cold",
        "cold_known",
        "commands",
        "limits",
        "more",
        "now",
        "profile",
        "reasons",
        "state",
    )

    def __init__(
        self, state: State, backlog: Backlog, profile: Profile, reasons: dict[Reason, int], now: Micros
    ) -> None:
        self.state = state
        self.backlog = backlog
        self.profile = profile
        self.limits: Limits = state.limits
        self.reasons = reasons
        self.now = now
        self.commands: list[Command] = []
        self.cold: tuple[Rank, Task, RoomLine, int] | None = None
        """Who is next among the room lines that sleep, with the task's ticket, as of the last time it was looked for."""
        self.cold_known = False
        self.more = False
        self.check_capacity = False
        """Nodes and warm Pods are to be looked at in this step."""
        """A bound cut this step short: there is more to decide at once."""

    def order(self, command: Command) -> None:
        """Give an order."""
        COMMAND_FOLDS[type(command)](self.state, self.now, command)
        self.commands.append(command)

    def start(self, command: StartTask, task: Task, pod: Pod) -> None:
        """Give the order to start a task, which is at hand with its Pod."""
        start_in(self.state, self.now, command, task, pod)
        self.commands.append(command)

    def let_in(self, task: Task) -> None:
        """Let a task wait that was submitted."""
        command = notify(task.req_no, TaskState.PENDING, task.attempt, self.now)
        pend(self.state, self.now, command, task)
        self.commands.append(command)

    def news(self, command: Notify) -> None:
        """Tell what the state knows already."""
        self.commands.append(command)

    def tell(self, task: Task, state: TaskState, reason: str = "", detail: str = "", until: Micros = 0) -> None:
        """Decide about a task by telling it."""
        if reason:
            self.count(Reason(reason))
        self.order(notify(task.req_no, state, task.attempt, self.now, reason, detail, until=until))

    def delete(self, pod: Pod, reason: Reason) -> None:
        """Order a Pod to go, unless it is going."""
        if pod.state is not PodState.STOPPING and pod.state is not PodState.GONE:
            self.count(reason)
            self.order(DeletePod(pod.number, reason))

    def is_kept(self, pod: Pod, gone: Sequence[Pod] = ()) -> bool:
        """Tell whether a deployment needs the Pod, supposing that others are gone."""
        deployment = self.state.deployments.get((pod.method, pod.model))
        if deployment is None or not self.profile.keep_deployed:
            return False
        return self.kept_pods(deployment, gone) <= deployment.pods

    def kept_pods(self, deployment: Deployment, gone: Sequence[Pod] = ()) -> int:
        """Return how many Pods serve a deployment now, supposing that others are gone."""
        pods = self.backlog.by_model.get((deployment.method, deployment.model), {})
        return sum(1 for pod in pods.values() if pod.usable and pod not in gone)

    def count(self, reason: Reason) -> None:
        """Count a reason."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
