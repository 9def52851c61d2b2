"""GPUs cut into fixed partitions (NVIDIA's Multi-Instance GPU): which partitions there are, which fit beside which, and where.

A partition takes compute slices (sevenths of the GPU) and memory slices (eighths), and may begin at certain memory slices only.
That is why "half is free" does not mean that half can be had: a 1g in the wrong place blocks a 3g, as a partition cannot move.

To the engine a partition is a device of its own: `partitioned` turns one GPU and its layout into what the node's agent reports, and
`onto_partitions` turns a demand for a part of a GPU into one for a partition that suffices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from engine.resources import WHOLE_GPU, Demand, GpuSpec

COMPUTE_SLICES = 7
MEMORY_SLICES = 8


@dataclass(frozen=True, slots=True)
class PartitionProfile:
    """One kind of partition of one GPU model."""

    name: str
    """As the driver calls it: ``2g.20gb``."""
    compute: int
    """Compute slices."""
    memory: int
    """Memory slices."""
    memory_bytes: int
    starts: tuple[int, ...]
    """Memory slices at which it may begin."""

    @property
    def share(self) -> int:
        """Return the thousandths of the GPU's compute that it has, rounded down."""
        return WHOLE_GPU * self.compute // COMPUTE_SLICES


@dataclass(frozen=True, slots=True, order=True)
class Partition:
    """A partition in its place."""

    start: int
    """First memory slice."""
    profile: str


_RULES = (
    ("1g", 1, 1, (0, 1, 2, 3, 4, 5, 6)),
    ("2g", 2, 2, (0, 2, 4)),
    ("3g", 3, 4, (0, 4)),
    ("4g", 4, 4, (0,)),
    ("7g", 7, 8, (0,)),
)
"""(name, compute slices, memory slices, starts): the A100's and H100's."""


def _profiles(gib_per_slice: int, last_gib: int) -> tuple[PartitionProfile, ...]:
    found = []
    for name, compute, memory, starts in _RULES:
        gib = last_gib if memory == MEMORY_SLICES else memory * gib_per_slice
        found.append(PartitionProfile(f"{name}.{gib}gb", compute, memory, gib << 30, starts))
    return tuple(found)


CATALOGUE: dict[str, tuple[PartitionProfile, ...]] = {
    "a100-40gb": _profiles(5, 40),
    "a100-80gb": _profiles(10, 80),
    "h100-80gb": _profiles(10, 80),
    "h200-141gb": _profiles(18, 141),
}
"""GPU model -> its partitions, the smallest first."""


class InvalidLayout(ValueError):
    """Partitions that the GPU cannot have together; says which and what would be right."""


def profile_of(model: str, name: str) -> PartitionProfile:
    """Return a partition of a GPU model by its name, ``3g.40gb`` or just ``3g``; raises `InvalidLayout`."""
    known = CATALOGUE.get(model)
    if known is None:
        raise InvalidLayout(f"partitions: the GPU model {model!r} has none; use one of {', '.join(CATALOGUE)}")
    for each in known:
        if name in (each.name, each.name.partition(".")[0]):
            return each
    raise InvalidLayout(
        f"partitions: {model} has no partition {name!r}; use one of {', '.join(each.name for each in known)}"
    )


def free_starts(model: str, taken: Sequence[Partition], name: str) -> tuple[int, ...]:
    """Return where a partition may begin beside those that are there."""
    profile = profile_of(model, name)
    used, compute = 0, profile.compute
    for each in taken:
        other = profile_of(model, each.profile)
        used |= _slices(each.start, other.memory)
        compute += other.compute
    if compute > COMPUTE_SLICES:
        return ()
    return tuple(start for start in profile.starts if not used & _slices(start, profile.memory))


def best_start(model: str, taken: Sequence[Partition], name: str) -> int | None:
    """Return where a partition leaves the most places to others, the first among equals; None when it fits nowhere.

    A place counts as much as its memory, so the places of the large profiles stay open as long as they can.
    """
    known = CATALOGUE.get(model, ())
    best: tuple[int, int] | None = None
    for start in free_starts(model, taken, name):
        after = (*taken, Partition(start, name))
        left = sum(len(free_starts(model, after, each.name)) * each.memory for each in known)
        if best is None or left > best[0]:
            best = (left, start)
    return None if best is None else best[1]


def layout(model: str, names: Iterable[str]) -> tuple[Partition, ...]:
    """Return places for these partitions on one GPU, in the order of their places; raises `InvalidLayout` when they do not fit.

    The large ones are placed first; all places are tried, so whatever is possible is found.
    """
    wanted = sorted((profile_of(model, name) for name in names), key=lambda each: (-each.memory, -each.compute))
    found = _search(model, (), wanted)
    if found is None:
        raise InvalidLayout(
            f"partitions: {', '.join(each.name for each in wanted)} do not fit together on one {model}; "
            f"it has {COMPUTE_SLICES} compute and {MEMORY_SLICES} memory slices"
        )
    return tuple(sorted(found))


def _search(
    model: str, taken: tuple[Partition, ...], wanted: Sequence[PartitionProfile]
) -> tuple[Partition, ...] | None:
    if not wanted:
        return taken
    for start in free_starts(model, taken, wanted[0].name):
        found = _search(model, (*taken, Partition(start, wanted[0].name)), wanted[1:])
        if found is not None:
            return found
    return None


def partitioned(gpu: GpuSpec, names: Iterable[str]) -> tuple[GpuSpec, ...]:
    """Return a GPU's partitions as devices, the smallest first: what the agent of its node reports instead of the GPU."""
    placed = layout(gpu.model, names)
    ordered = sorted(placed, key=lambda each: (profile_of(gpu.model, each.profile).memory, each.start))
    return tuple(
        GpuSpec(
            f"{gpu.uuid}/{each.profile}@{each.start}",
            f"{gpu.model}.{each.profile}",
            profile_of(gpu.model, each.profile).memory_bytes,
            gpu.healthy,
        )
        for each in ordered
    )


def onto_partitions(demand: Demand, model: str) -> Demand:
    """Return a demand for a part of a GPU as one for a whole partition with at least that compute and memory.

    Every partition that suffices is allowed; devices are taken in a node's order, so `partitioned` ones give the smallest. Raises
    `InvalidLayout` when none suffices.
    """
    if demand.gpus == 0:
        return demand
    enough = [
        each
        for each in CATALOGUE.get(model, ())
        if each.share >= min(demand.gpu_share, WHOLE_GPU) and each.memory_bytes >= demand.gpu_memory_bytes
    ]
    if not enough:
        profile_of(model, CATALOGUE[model][-1].name if model in CATALOGUE else "")
        raise InvalidLayout(
            f"gpu_memory_bytes: no partition of {model} has {demand.gpu_memory_bytes} bytes; ask for less or a larger GPU"
        )
    return replace(demand, gpu_share=WHOLE_GPU, gpu_models=tuple(sorted(f"{model}.{each.name}" for each in enough)))


def _slices(start: int, count: int) -> int:
    return ((1 << count) - 1) << start
