"""The drawn world that the tiny model learns: 12 colours, 10 plain shapes and 4 composite things on plain grounds.

Everything is drawn from a `Scene` alone, so a picture can be drawn again exactly, and a judge knows the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE_PX = 64
_OVERSAMPLING = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (45, 160, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 215),
    "purple": (130, 50, 170),
    "pink": (245, 145, 190),
    "brown": (120, 75, 35),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (135, 135, 135),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "moon", "arrow")
COMPOSITES = ("emblem", "robot", "flower", "house")
KINDS = SHAPES + COMPOSITES
EMBLEM_PLATES = ("circle", "square", "shield")
EMBLEM_SIGNS = ("star", "heart", "cross", "triangle", "moon", "ring")
OPENINGS = ("", "a picture of ", "a drawing of ", "a photo of ", "the ", "an image of ", "a small icon of ")

Pixels: TypeAlias = NDArray[np.uint8]
Rgb: TypeAlias = tuple[int, int, int]
Points: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture's truth; lengths are fractions of the picture's side."""

    kind: str
    colour: str
    background: str
    detail: str  # the second colour; plain shapes do not show it
    plate: str = "circle"  # emblem only
    sign: str = "star"  # emblem only
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.34
    angle: float = 0.0
    tint: Rgb = (0, 0, 0)  # a small shift of every colour, so that no colour is a single value


def _circle(points: int = 40) -> Points:
    turn = np.linspace(0.0, 2.0 * math.pi, points, endpoint=False)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1)


def _star() -> Points:
    turn = np.arange(10) * math.pi / 5.0 - math.pi / 2.0
    reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
    return np.stack([np.cos(turn) * reach, np.sin(turn) * reach], axis=1)


def _heart() -> Points:
    turn = np.linspace(0.0, 2.0 * math.pi, 40, endpoint=False)
    x = 16.0 * np.sin(turn) ** 3
    y = 13.0 * np.cos(turn) - 5.0 * np.cos(2 * turn) - 2.0 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([x / 16.5, -(y + 2.5) / 15.0], axis=1)


def _moon() -> Points:
    outer = np.linspace(0.32 * math.pi, 1.68 * math.pi, 30)
    edge = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    inner = np.linspace(1.55 * math.pi, 0.45 * math.pi, 24)
    start, half = edge[-1], abs(edge[-1][1])
    bite = np.stack([np.cos(inner) * 0.8, np.sin(inner) / abs(math.sin(0.45 * math.pi)) * half], axis=1)
    bite[:, 0] += start[0] - bite[0, 0]
    return np.concatenate([edge, bite])


OUTLINES: dict[str, Points] = {
    "circle": _circle(),
    "square": np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": np.array([(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]),
    "star": _star(),
    "heart": _heart(),
    "ring": _circle(),
    "cross": np.array(
        [
            *[(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)],
            *[(0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)],
        ]
    ),
    "diamond": np.array([(0.0, -1.15), (0.68, 0.0), (0.0, 1.15), (-0.68, 0.0)]),
    "moon": _moon(),
    "arrow": np.array([(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1.05, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)]),
    "shield": np.array([(-0.9, -0.95), (0.9, -0.95), (0.9, 0.1), (0.55, 0.7), (0, 1.1), (-0.55, 0.7), (-0.9, 0.1)]),
}


class _Pen:
    """Draws outlines in a scene's own coordinates (centre 0, radius 1) onto an oversampled canvas."""

    def __init__(self, scene: Scene) -> None:
        self._scale = SIDE_PX * _OVERSAMPLING
        self._scene = scene
        self.ground = self._tinted(scene.background)
        self.main = self._tinted(scene.colour)
        self.second = self._tinted(scene.detail)
        self.canvas = Image.new("RGB", (self._scale, self._scale), self.ground)
        self._draw = ImageDraw.Draw(self.canvas)
        cos, sin = math.cos(scene.angle), math.sin(scene.angle)
        self._turn = np.array([(cos, sin), (-sin, cos)])

    def _tinted(self, colour: str) -> Rgb:
        r, g, b = (max(0, min(255, c + t)) for c, t in zip(COLOURS[colour], self._scene.tint, strict=True))
        return (r, g, b)

    def named(self, colour: str) -> Rgb:
        return self._tinted(colour)

    def shape(self, outline: str, colour: Rgb, x: float = 0.0, y: float = 0.0, size: float = 1.0) -> None:
        self.polygon(OUTLINES[outline] * size + (x, y), colour)

    def box(self, colour: Rgb, left: float, top: float, right: float, bottom: float) -> None:
        self.polygon(np.array([(left, top), (right, top), (right, bottom), (left, bottom)]), colour)

    def polygon(self, points: Points, colour: Rgb) -> None:
        scene = self._scene
        placed = (points @ self._turn * scene.radius + (scene.x, scene.y)) * self._scale
        self._draw.polygon([(float(x), float(y)) for x, y in placed], fill=colour)

    def pixels(self) -> Pixels:
        small = self.canvas.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.uint8)


def draw(scene: Scene) -> Pixels:
    """Draw one scene as uint8 RGB, [64, 64, 3]."""
    pen = _Pen(scene)
    match scene.kind:
        case "emblem":
            _emblem(pen, scene)
        case "robot":
            _robot(pen)
        case "flower":
            _flower(pen)
        case "house":
            _house(pen)
        case "ring":
            pen.shape("circle", pen.main)
            pen.shape("circle", pen.ground, size=0.55)
        case _:
            pen.shape(scene.kind, pen.main)
    return pen.pixels()


def _emblem(pen: _Pen, scene: Scene) -> None:
    pen.shape(scene.plate, pen.main, size=1.1)
    if scene.sign == "ring":
        pen.shape("circle", pen.second, size=0.6)
        pen.shape("circle", pen.main, size=0.3)
    else:
        pen.shape(scene.sign, pen.second, size=0.62)


def _robot(pen: _Pen) -> None:
    pen.box(pen.main, -0.06, -1.25, 0.06, -0.9)
    pen.shape("circle", pen.second, y=-1.22, size=0.14)
    pen.box(pen.main, -0.6, -0.98, 0.6, -0.22)
    pen.box(pen.second, -0.4, -0.76, -0.12, -0.48)
    pen.box(pen.second, 0.12, -0.76, 0.4, -0.48)
    pen.box(pen.main, -0.75, -0.12, 0.75, 0.75)
    pen.box(pen.second, -0.35, 0.12, 0.35, 0.5)
    pen.box(pen.main, -1.1, -0.08, -0.85, 0.55)
    pen.box(pen.main, 0.85, -0.08, 1.1, 0.55)
    pen.box(pen.main, -0.6, 0.75, -0.2, 1.2)
    pen.box(pen.main, 0.2, 0.75, 0.6, 1.2)


def _flower(pen: _Pen) -> None:
    pen.box(pen.named("green"), -0.09, 0.0, 0.09, 1.3)
    for petal in range(6):
        turn = petal * math.pi / 3.0
        pen.shape("circle", pen.main, x=0.55 * math.cos(turn), y=-0.3 + 0.55 * math.sin(turn), size=0.36)
    pen.shape("circle", pen.second, y=-0.3, size=0.32)


def _house(pen: _Pen) -> None:
    pen.box(pen.main, -0.85, -0.15, 0.85, 1.05)
    pen.polygon(np.array([(-1.1, -0.12), (0.0, -1.1), (1.1, -0.12)]), pen.second)
    pen.box(pen.second, -0.2, 0.4, 0.2, 1.05)


def random_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """Draw lots for a scene: half composite things, half plain shapes unless `kind` says which."""
    if kind is None:
        kind = str(rng.choice(COMPOSITES if rng.random() < 0.5 else SHAPES))
    colour, background, detail = (str(name) for name in rng.permutation(list(COLOURS))[:3])
    composite = kind in COMPOSITES
    scene = Scene(
        kind=kind,
        colour=colour,
        background=background,
        detail=detail,
        plate=str(rng.choice(EMBLEM_PLATES)),
        sign=str(rng.choice(EMBLEM_SIGNS)),
    )
    return vary(scene, rng, turn=0.08 if composite else 0.22)


def vary(scene: Scene, rng: np.random.Generator, turn: float = 0.08) -> Scene:
    """The same thing drawn again: another place, size, angle (radians) and tint."""
    composite = scene.kind in COMPOSITES
    low, high = (0.30, 0.36) if composite else (0.24, 0.36)
    reach = 0.05 if composite else 0.09
    tint = rng.integers(-10, 11, size=3)
    return replace(
        scene,
        x=0.5 + float(rng.uniform(-reach, reach)),
        y=0.5 + float(rng.uniform(-reach, reach)),
        radius=float(rng.uniform(low, high)),
        angle=float(rng.uniform(-turn, turn)),
        tint=(int(tint[0]), int(tint[1]), int(tint[2])),
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say in words what a scene shows: always the kind and its colour, mostly the ground, at times the second colour."""
    opening = str(rng.choice(OPENINGS))
    colours = scene.colour
    if scene.kind in COMPOSITES and rng.random() < 0.5:
        colours = f"{scene.colour} and {scene.detail}"
    thing = f"{colours} {scene.kind}"
    text = opening + (thing if opening == "the " else with_article(thing))
    if rng.random() < 0.75:
        text += f" on {with_article(scene.background)} background"
    return text


def with_article(words: str) -> str:
    """Put "a" or "an" before words that begin with a colour or a thing."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def subject_scene(seed: int) -> Scene:
    """A particular emblem, to be learned as a new subject."""
    return random_scene(np.random.default_rng([seed, 77]), kind="emblem")


def subject_pictures(scene: Scene, count: int, seed: int) -> list[Pixels]:
    """Pictures of one subject on different grounds, as a user would hand them in."""
    rng = np.random.default_rng([seed, 78])
    grounds = [name for name in COLOURS if name not in (scene.colour, scene.detail)]
    return [draw(replace(vary(scene, rng), background=str(rng.choice(grounds)))) for _ in range(count)]


def clutter(rng: np.random.Generator) -> Pixels:
    """A random picture outside the captioned world, so that users' own pictures pass through the VAE too."""
    scale = SIDE_PX * 2
    corners = rng.integers(0, 256, size=(2, 2, 3)).astype(np.uint8)
    canvas = Image.fromarray(corners).resize((scale, scale), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    names = list(OUTLINES)
    for _ in range(int(rng.integers(2, 9))):
        outline = OUTLINES[names[int(rng.integers(len(names)))]]
        turn = rng.uniform(0.0, 2.0 * math.pi)
        matrix = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
        placed = (outline @ matrix * rng.uniform(0.04, 0.4) + rng.uniform(0.0, 1.0, size=2)) * scale
        r, g, b = (int(c) for c in rng.integers(0, 256, size=3))
        pen.polygon([(float(x), float(y)) for x, y in placed], fill=(r, g, b))
    return np.asarray(canvas.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.uint8)
