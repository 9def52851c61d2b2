"""A profile names a whole set of policies, one per level; it is a stateless value."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.levels.ordering import Fifo, Ordering
from engine.levels.quotas import Quotas
from engine.levels.scorers import Scorer, scorer
from engine.levels.scoring.fragmentation import Typical
from engine.tasks import SECOND, Micros

BACKFILLS = ("none", "skip", "easy", "conservative")
"""none: nobody passes the first one that finds no room; skip: whoever fits; easy: whoever does not delay the first one;
conservative: whoever delays nobody that comes before."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The policies of all levels."""

    name: str = "fifo"
    # admission
    reject_impossible: bool = True
    # ordering
    ordering: Ordering = field(default_factory=Fifo)
    backfill: str = "skip"
    """What others may do while the next one finds no room: one of `BACKFILLS`."""
    backfill_depth: int = 1_000
    """Most waiting tasks that have a reservation, with conservative backfill."""
    quotas: Quotas | None = None
    # placement
    scorers: tuple[tuple[str, int], ...] = ()
    """(name, weight); none: the first node that fits."""
    tie: str = "first"
    """Which of several best nodes is taken: first, last, name or random (`engine.fit.TIES`)."""
    typical: tuple[Typical, ...] = ()
    """The shapes that the scorer `fgd` keeps room for; none: its own."""
    gpu_speed_weight: int = 0
    """Added to the score of a node whose GPU model runs the task in the shortest predicted time, less in proportion elsewhere."""
    compact_gangs: bool = False
    """Members of a gang on one node where that is possible, else in one rack (the nodes' label `rack`)."""
    group_affinity: bool = True
    cached_model_bonus: int = 0
    """Added to the score of a node that holds the model, for as much of a load as that spares."""
    prefetch_ahead: int = 0
    """While at most so many tasks wait per Pod, models of those that have to wait go where room comes next; 0: never."""
    # binding
    warm_reuse: bool = True
    spread_slots: bool = True
    """Prefer the warm Pod with the fewest tasks in it; else the one with the most."""
    predicted_memory: bool = False
    """Give shared GPUs by the predicted P99 of memory where an estimate has one."""
    warm_first_us: Micros = 0
    """How much longer a task must have waited than the next one that fits a warm Pod, before that Pod goes for its sake."""
    reclaim_idle: bool = True
    warm_first_loads: int = 0
    """The same in times of what a load takes where the Pod is; 0: `warm_first_us` counts."""
    serve_loads: int = 0
    """A Pod whose model has tasks waiting stays until it has served for so many times its load; 0: it may go at any time."""
    gather_us: Micros = 0
    """How long an ordinary task stands back for models with more tasks waiting per Pod where others must leave; 0: never."""
    slot_slowdown_permille: int = 0
    """Share of a run, in thousandths, that every other task in a Pod adds to it; 0: Pods are shared as if that were nothing."""
    widen_loads: int = 4
    """A task gets one more Pod of its model in the place of an idle one if sharing costs more than so many loads there."""
    # preemption
    preempt: bool = False
    urgent_weight: int = 10
    """Worth of a microsecond of an urgent task's waiting, in microseconds of ordinary work lost."""
    preempt_patience_us: Micros = 5 * SECOND
    """How long an urgent task waits before others are stopped for it."""
    reload_us: Micros = 30 * SECOND
    """Loss of a preemption besides the work since the last checkpoint."""
    min_run_us: Micros = 5 * SECOND
    """No attempt is stopped for others sooner than this after its start, and never in the step that ordered the start."""
    preemptions_per_task: int = 0
    """How often a task may be stopped for others that outrank it; 0: as `Limits` says."""
    # elasticity
    keep_deployed: bool = True
    scale_after_us: Micros = 0
    """Ask for more nodes when work that fits nowhere has waited this long; 0: never."""
    scale_nodes_max: int = 0
    scale_level: int = 900
    """Quantile of the forecast demand, in thousandths, that nodes are asked for ahead (where there is a fleet)."""
    scale_fill_permille: int = 1000
    """Share of the nodes' GPUs that is meant to be in use, the headroom apart."""
    scale_headroom_permille: int = 2000
    """GPUs that are meant to be free for bursts, in thousandths of the square root of those in use or expected."""
    clear_us: Micros = 60 * SECOND
    """In what time the nodes that are asked for could work off what waits."""
    warm_ahead: bool = False
    """Start Pods ahead where the demand forecast asks for them, and let idle ones go that it does not ask for."""
    hold_permille: int = 50
    """Cost of holding a Pod for a while, in thousandths of the cost of a load that takes as long."""

    @property
    def in_order(self) -> bool:
        """Whether placement goes through all that waits in exact order, as these policies need."""
        ordering = self.ordering
        return (
            self.backfill != "skip"
            or self.quotas is not None
            or ordering.shares
            or ordering.ranks_anew
            or ordering.preemptive
        )

    def scorer_values(self) -> tuple[tuple[Scorer, int], ...]:
        """Return the scorers behind the names."""
        return tuple((scorer(name, self.typical), weight) for name, weight in self.scorers)
