"""From needs and room to decisions: which parts stay on the device, how many pictures go into one call, and what can never be made.

Plain arithmetic over a `Footprint`, so that the Pod, the doctor and the door that refuses requests decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from executors.memory.footprint import Footprint
from predictors.activations import TRAINED_BYTES

GIB = 1 << 30
MARGIN = 1.25
"""What is planned is multiplied by this until the Pod's own measurements say better: allocators round, kernels need scratch."""
SAFETY = 1.05
"""The same over what was measured."""
MANY = 1 << 16
"""So many pictures are no limit."""
_RATIO_MAX = 8.0
Phase = str
"""``step`` or ``decode``."""


class Place(StrEnum):
    """Where a pipeline's parts are while they are not used."""

    DEVICE = "device"
    """All of them on the device."""
    ASIDE = "aside"
    """Text encoders and autoencoder in host memory, on the device only while they work."""
    LAYERS = "layers"
    """The network too: each layer is on the device only while it computes. Slow, since all weights travel in every step."""
    NOWHERE = "nowhere"
    """Not even that fits."""


@dataclass(frozen=True, slots=True)
class SizePlan:
    """What is decided for pictures of one size."""

    width: int
    height: int
    at_once: int
    """Pictures in one call of the network; 0: not even one."""
    decoded_at_once: int
    tiled: bool
    """Decoded in tiles, since a whole picture does not fit."""

    @property
    def possible(self) -> bool:
        """Whether such a picture can be made at all."""
        return self.at_once > 0 and self.decoded_at_once > 0


@dataclass(slots=True)
class MemoryPlan:
    """The plan of one model on one device; `learn` corrects it by what calls have taken."""

    footprint: Footprint
    item_bytes: int
    """Bytes of a number in the computing precision."""
    room_bytes: int
    """What may be allocated on the device in all."""
    _ratios: dict[Phase, float] = field(default_factory=dict)
    settled: Place = Place.DEVICE
    """Where the parts lie, once they do."""
    card_bytes: int = 0
    """What could be allocated if the card were this process's alone; 0: it is."""

    def place(self, width: int, height: int, rows: int = 2) -> Place:
        """Decide where the parts lie, so that at least one picture of the model's own size can be made."""
        whole = self.footprint.weights_bytes(self.item_bytes)
        if whole + self._working_bytes(width, height, rows) <= self.room_bytes:
            return Place.DEVICE
        for place in (Place.ASIDE, Place.LAYERS):
            if self.least_bytes(width, height, rows, place) <= self.room_bytes:
                return place
        return Place.NOWHERE

    def wants_the_card(self, width: int, height: int) -> bool:
        """Whether layers need not travel on the whole card: then it is better to run again there than to run slowly here."""
        if self.card_bytes <= self.room_bytes or self.place(width, height) is not Place.LAYERS:
            return False
        return MemoryPlan(self.footprint, self.item_bytes, self.card_bytes).place(width, height) is not Place.LAYERS

    def least_bytes(self, width: int, height: int, rows: int = 2, place: Place = Place.ASIDE) -> int:
        """Return the smallest room in which one picture can be made with the parts in a place, decoded in tiles if need be.

        Where layers are not told apart, `LAYERS` takes no less than `ASIDE`.
        """
        print_, item = self.footprint, self.item_bytes
        resident = print_.weights_bytes(item, print_.stepped)
        encode = resident + print_.encoders_bytes(item)
        if place is Place.LAYERS and print_.layered:
            resident, encode = 0, print_.layer_bytes(item)
        step = resident + self.coming_bytes("step", place) + self._planned("step", width, height, rows, False)
        decode = resident + print_.weights_bytes(item, ("vae",))
        decode += min(self._planned("decode", width, height, 1, tiled) for tiled in (False, print_.tiles))
        return max(encode, step, decode)

    def coming_bytes(self, phase: Phase, place: Place | None = None) -> int:
        """Return the weights that a call brings to the device; `place` is where they lie otherwise, as `settled` if not given."""
        place = place or self.settled
        if phase == "decode" and place in (Place.ASIDE, Place.LAYERS):
            return self.footprint.weights_bytes(self.item_bytes, ("vae",))
        return self.footprint.layer_bytes(self.item_bytes) if place is Place.LAYERS and self.footprint.layered else 0

    def size(
        self, width: int, height: int, rows: int = 2, free_bytes: int | None = None, place: Place | None = None
    ) -> SizePlan:
        """Decide for pictures of a size; `free_bytes` is what is free now beside the weights, where that is known better."""
        if free_bytes is None:
            place = place or self.place(width, height, rows)
            parts = {Place.ASIDE: self.footprint.stepped, Place.LAYERS: ()}.get(place)
            free_bytes = max(0, self.room_bytes - self.footprint.weights_bytes(self.item_bytes, parts))
        step_free = free_bytes - self.coming_bytes("step", place)
        decode_free = free_bytes - self.coming_bytes("decode", place)
        at_once = self._fit("step", width, height, rows, step_free)
        decoded = self._fit("decode", width, height, rows, decode_free)
        if decoded or not self.footprint.tiles:
            return SizePlan(width, height, at_once, decoded, tiled=False)
        fits = self._planned("decode", width, height, 1, True) <= decode_free
        return SizePlan(width, height, at_once, int(fits), tiled=fits)

    def learn(self, phase: Phase, planned_bytes: int, measured_bytes: int) -> None:
        """Take in what a call took beside the weights; the largest ratio seen lately holds, older ones fade."""
        if planned_bytes <= 0 or measured_bytes <= 0:
            return
        ratio = min(_RATIO_MAX, measured_bytes / planned_bytes * SAFETY)
        known = self._ratios.get(phase)
        self._ratios[phase] = ratio if known is None or ratio > known else 0.98 * known + 0.02 * ratio

    def planned(self, phase: Phase, width: int, height: int, rows: int, pictures: int, tiled: bool = False) -> int:
        """Return what a call should take beside the weights, without any margin."""
        if phase == "step":
            return self.footprint.step_bytes(width, height, rows * pictures, self.item_bytes)
        return self.footprint.decode_bytes(width, height, pictures, self.item_bytes, tiled)

    def to_json(self) -> Mapping[str, object]:
        """Return what was learned, for people."""
        return {phase: round(ratio, 3) for phase, ratio in sorted(self._ratios.items())}

    def _planned(self, phase: Phase, width: int, height: int, rows: int, tiled: bool) -> int:
        ratio = self._ratios.get(phase, MARGIN)
        return int(self.planned(phase, width, height, rows, 1, tiled) * ratio)

    def _working_bytes(self, width: int, height: int, rows: int) -> int:
        decode = min(self._planned("decode", width, height, 1, tiled) for tiled in (False, self.footprint.tiles))
        return max(self._planned("step", width, height, rows, False), decode)

    def _fit(self, phase: Phase, width: int, height: int, rows: int, free_bytes: int) -> int:
        each = self._planned(phase, width, height, rows, False)
        return MANY if each <= 0 else max(0, min(MANY, free_bytes // each))


def too_large(footprint: Footprint, item_bytes: int, width: int, height: int, largest_bytes: int, model: str) -> str:
    """Return why a picture can never be made on the largest card there is; empty when it can."""
    # At the door nothing is refused for a margin: what just might fit is for the Pod to try.
    plan = MemoryPlan(footprint, item_bytes, largest_bytes, {"step": 1.0, "decode": 1.0})
    least = plan.least_bytes(width, height, place=Place.LAYERS)
    if least <= largest_bytes:
        return ""
    return (
        f"pictures of {width}x{height} from {model} need at least {least / GIB:.1f} GiB of GPU memory, the largest GPU here has "
        f"{largest_bytes / GIB:.1f} GiB; ask for a smaller picture"
    )


@dataclass(frozen=True, slots=True)
class TrainingNeeds:
    """What a training asks for."""

    side_px: int
    rows: int
    """Rows of a batch, prior rows included."""
    full: bool = False
    """All weights are trained, not an adapter."""
    parts: tuple[str, ...] = ("unet",)
    """Parts that are trained."""
    frugal: bool = False
    """Activations are computed twice instead of kept."""


def training_parts(footprint: Footprint, item_bytes: int, needs: TrainingNeeds, free_bytes: int) -> int:
    """Return into how many parts a batch must be cut to fit what is free beside the weights; one row each at most."""
    each = footprint.train_bytes(needs.side_px, needs.side_px, 1, item_bytes, frugal=needs.frugal) * MARGIN
    free_bytes -= _trained_bytes(footprint, needs)
    if each <= 0 or each * needs.rows <= free_bytes:
        return 1
    return min(needs.rows, -(-needs.rows // max(1, int(free_bytes // each))))


def training_too_large(
    footprint: Footprint, item_bytes: int, needs: TrainingNeeds, largest_bytes: int, model: str
) -> str:
    """Return why a training can never run on the largest card there is; empty when it can, row by row."""
    least = footprint.weights_bytes(item_bytes) + _trained_bytes(footprint, needs)
    least += footprint.train_bytes(needs.side_px, needs.side_px, 1, item_bytes, frugal=needs.frugal)
    if least <= largest_bytes:
        return ""
    ways = [] if needs.frugal else ["gradient_checkpointing"]
    ways += ["method lora"] if needs.full else []
    return (
        f"a training of {model} at {needs.side_px} px needs at least {least / GIB:.1f} GiB of GPU memory, the largest GPU here "
        f"has {largest_bytes / GIB:.1f} GiB; ask for {', '.join([*ways, 'a smaller size'])}"
    )


def _trained_bytes(footprint: Footprint, needs: TrainingNeeds) -> int:
    """Memory of what is trained; an adapter's is small beside everything else."""
    if not needs.full:
        return 0
    return TRAINED_BYTES * sum(footprint.parts[name].numbers for name in needs.parts if name in footprint.parts)


def described(footprint: Footprint, item_bytes: int, room_bytes: int) -> tuple[Place, str]:
    """Say in a line what a model needs on a device of that size, and what is decided for its own size and twice that."""
    plan, own = MemoryPlan(footprint, item_bytes, room_bytes), footprint.native_px
    place = plan.place(own, own)
    weights = footprint.weights_bytes(item_bytes) / GIB
    if place is Place.NOWHERE:
        return (
            place,
            f"weights {weights:.2f} GiB; one picture needs {plan.least_bytes(own, own, place=Place.LAYERS) / GIB:.2f} GiB",
        )
    said = [f"weights {weights:.2f} GiB"]
    if place is Place.ASIDE:
        said.append("text encoders and autoencoder lie in host memory")
    elif place is Place.LAYERS:
        said.append("all weights lie in host memory and travel in every step, layer by layer: slow")
    for side in (own, 2 * own):
        size = plan.size(side, side, place=place)
        said.append(f"{side} px: {_said(size)}")
    return place, "; ".join(said)


def _said(size: SizePlan) -> str:
    if not size.possible:
        return "too large"
    many = "any number" if size.at_once >= MANY else str(size.at_once)
    return f"{many} in a step, " + (
        "decoded in tiles" if size.tiled else f"{min(size.decoded_at_once, MANY)} decoded at once"
    )
