"""What is drawn for each seed of the drill: faults, losses, delays; and what a run of it counts.

Every random choice is keyed by what it is about - (seed, site, identity) - and never by the order of the choices, so that leaving
a fault out changes nothing else.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field

from engine.limits import Limits
from engine.tasks import SECOND, Micros

NODES = 3
GPUS = 2
TASKS = 18
FAULTY_US = 60 * SECOND
QUIET_CAP_US = 600 * SECOND
LIMITS = Limits(backoff_us=SECOND, backoff_cap_us=8 * SECOND, idle_ttl_us=15 * SECOND, grace_us=2 * SECOND)


class Violation(AssertionError):
    """A rule that must always hold did not."""


class Dice:
    """Random numbers by identity."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def draw(self, *identity: object) -> float:
        """Return a number in [0, 1) that depends on the seed and the identity alone."""
        text = repr((self._seed, identity)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") / 2**56

    def whole(self, low: int, high: int, *identity: object) -> int:
        """Return a whole number in [low, high]."""
        return low + int(self.draw(*identity) * (high - low + 1))


@dataclass(frozen=True)
class Fault:
    """Something that breaks at a time: ``scheduler`` or ``agent`` crash, ``freeze``, ``deaf`` (nothing reaches the node), ``mute``
    (nothing leaves it), ``cut`` (both), ``pods`` (every Pod of the node crashes)."""

    kind: str
    node: int
    at: Micros
    lasts_us: Micros


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn per seed."""

    seed: int
    loss: float
    doubling: float
    delay_us: int
    window_crash: float
    faults: tuple[Fault, ...]

    @staticmethod
    def of(seed: int) -> Plan:
        """Draw a plan."""
        dice = Dice(seed)
        faults = []
        for number in range(dice.whole(0, 9, "faults")):
            kinds = ("scheduler", "agent", "freeze", "deaf", "mute", "cut", "pods")
            faults.append(
                Fault(
                    kinds[dice.whole(0, len(kinds) - 1, "kind", number)],
                    dice.whole(0, NODES - 1, "node", number),
                    dice.whole(1, FAULTY_US, "at", number),
                    dice.whole(SECOND // 5, 40 * SECOND, "lasts", number),
                )
            )
        return Plan(
            seed,
            loss=(0.0, 0.01, 0.05, 0.25)[dice.whole(0, 3, "loss")],
            doubling=(0.0, 0.02, 0.2)[dice.whole(0, 2, "doubling")],
            delay_us=(1_000, 20_000, 400_000, 3 * SECOND)[dice.whole(0, 3, "delay")],
            window_crash=(0.0, 0.02, 0.1)[dice.whole(0, 2, "window")],
            faults=tuple(sorted(faults, key=lambda f: f.at)),
        )


@dataclass
class Counts:
    """What a run did, to tell a real drill from an idle one."""

    messages: int = 0
    lost: int = 0
    doubled: int = 0
    scheduler_crashes: int = 0
    agent_crashes: int = 0
    nodes_lost: int = 0
    fences: int = 0
    finished: int = 0
    attempts: int = 0
    states: dict[str, int] = field(default_factory=lambda: defaultdict(int))
