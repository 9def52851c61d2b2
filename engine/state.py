"""The state of the whole scheduler, a fold over events and commands.

`apply_event` and `apply_command` are the only ways to change it, and no policy is asked in them: recovery applies what was recorded
and arrives at the same state, whatever the policies have become. What an event calls for (admit this task, retry that one) is noted
in `agenda`; the engine works it off in the same step, so that it is empty between steps and no part of a snapshot.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from engine import snapshot
from engine.capacity import Fleet
from engine.cluster import Cluster
from engine.commands import Command
from engine.entities import Claim, Deployment, Group, Pod, Task, Tenant
from engine.events import Event
from engine.fold_commands import COMMAND_FOLDS
from engine.fold_events import EVENT_FOLDS
from engine.limits import Limits
from engine.tasks import TERMINAL_STATES, Micros


class Watch(Protocol):
    """Whoever keeps indices over the state is told what changed."""

    def waits(self, task: Task) -> None:
        """Note that a task entered the queue."""

    def leaves(self, task: Task) -> None:
        """Note that a task left the queue."""

    def pod_changed(self, pod: Pod) -> None:
        """Note that a Pod's free slots or its usability may have changed, or that it is gone."""

    def check_pod(self, pod: Pod, at: Micros) -> None:
        """Ask for a look at a Pod at a time."""

    def task_due(self, task: Task, at: Micros) -> None:
        """Ask for a look at a task at a time (retry, deadline)."""

    def tenant_changed(self, tenant: Tenant) -> None:
        """Note that a tenant may run more tasks than before."""

    def regrouped(self, group: Group) -> None:
        """Note that a group was bound to a node, or is bound no more."""


class Unwatched:
    """Keeps no index: for recovery, which builds them once at the end."""

    def waits(self, task: Task) -> None:
        """Do nothing."""

    def leaves(self, task: Task) -> None:
        """Do nothing."""

    def pod_changed(self, pod: Pod) -> None:
        """Do nothing."""

    def check_pod(self, pod: Pod, at: Micros) -> None:
        """Do nothing."""

    def task_due(self, task: Task, at: Micros) -> None:
        """Do nothing."""

    def tenant_changed(self, tenant: Tenant) -> None:
        """Do nothing."""

    def regrouped(self, group: Group) -> None:
        """Do nothing."""


class State:
    """Everything the scheduler knows. Read it freely; change it only through `apply_event` and `apply_command`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.now: Micros = 0
        self.cluster = Cluster()
        self.tasks: dict[str, Task] = {}
        """Live tasks, and terminal ones as long as they are remembered."""
        self.terminal: OrderedDict[str, None] = OrderedDict()
        self.tenants: dict[str, Tenant] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.idle_groups: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.pods: dict[int, Pod] = {}
        self.claims: dict[str, Claim] = {}
        self.deployments: dict[tuple[str, str], Deployment] = {}
        self.next_pod = 1
        self.next_seq = 1
        self.next_tenant = 0
        self.next_group = 0
        self.floor = 0
        """Virtual time of the tenant that was served last."""
        self.wanted_nodes = 0
        self.fleet = Fleet()
        self.ignored: dict[str, int] = {}
        """Reports that changed nothing (duplicates, late and unknown ones), by event type."""
        self.outcomes: dict[str, int] = {}
        """Terminal tasks so far, by state; rejected ones by reason as well."""
        self.pending = 0
        """Admitted tasks in PENDING or BACKOFF."""
        self.placed = 0
        """Attempts begun and rooms claimed so far; says whose turn it is between aged and urgent tasks."""
        self.faults: dict[tuple[str, str], list[tuple[Micros, str]]] = {}
        """(node, GPU) -> when its latest faults were and who saw them (`engine.faults`)."""
        self.resting: dict[tuple[str, str], Micros] = {}
        """(node, GPU) -> until when it takes nothing new after a hung step."""
        self.loads_us: list[Micros] = [0, 0, 0]
        """What loads took lately from the store, a node's disk and its memory (`engine.stock`); 0: none was seen."""
        self.deployed = 0
        """Grows when a deployment changes."""
        self.agenda: list[tuple[int, object]] = []
        self.watch: Watch = Unwatched()

    def apply_event(self, now: Micros, event: Event) -> None:
        """Take in one fact."""
        self.now = now
        EVENT_FOLDS[type(event)](self, now, event)

    def apply_command(self, now: Micros, command: Command) -> None:
        """Take in one order, as if its beginning were certain."""
        COMMAND_FOLDS[type(command)](self, now, command)

    def ignore(self, event: Event) -> None:
        """Count a report that changes nothing."""
        name = type(event).__name__
        self.ignored[name] = self.ignored.get(name, 0) + 1

    def tenant(self, name: str) -> Tenant:
        """Return a tenant, made on first sight."""
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = Tenant(name, self.next_tenant)
            self.next_tenant += 1
        return tenant

    def group(self, tenant: Tenant, name: str) -> Group | None:
        """Return a group of a tenant, made on first sight; None for the empty name."""
        if not name:
            return None
        key = (tenant.name, name)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(tenant, name, self.next_group)
            self.next_group += 1
        return group

    def live_tasks(self) -> list[Task]:
        """Return the tasks that are not terminal, oldest first."""
        return [task for task in self.tasks.values() if task.state not in TERMINAL_STATES]

    def digest(self) -> str:
        """Return a SHA-256 over the whole state: equal digests, equal states."""
        return snapshot.digest(self)
