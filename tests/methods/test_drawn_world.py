"""The drawn world: the same scene is the same picture, its caption is true, and a judge can be asked about it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from executors.tiny import drawing


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", drawing.KINDS)
def test_every_kind_is_drawn_in_its_colour_on_its_ground(kind: str) -> None:
    scene = drawing.random_scene(rng(3), kind=kind)
    picture = drawing.draw(scene).astype(int)
    assert picture.shape == (64, 64, 3)
    ground = np.array(drawing.COLOURS[scene.background]) + scene.tint
    assert np.abs(picture[0, 0] - np.clip(ground, 0, 255)).max() <= 1
    main = np.clip(np.array(drawing.COLOURS[scene.colour]) + scene.tint, 0, 255)
    assert (np.abs(picture - main).max(axis=2) <= 1).sum() > 60


def test_one_seed_draws_one_picture_and_another_seed_another() -> None:
    first, again, other = (drawing.draw(drawing.random_scene(rng(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_captions_name_the_kind_and_colour_always_and_the_ground_mostly() -> None:
    grounds = 0
    for seed in range(200):
        scene = drawing.random_scene(rng(seed))
        words = drawing.caption(scene, rng(seed + 1000)).split()
        assert scene.kind in words
        assert scene.colour in words
        if "background" in words:
            grounds += 1
            assert words[-2] == scene.background
    assert 120 <= grounds <= 175


def test_half_of_the_scenes_are_composite_things() -> None:
    counted = Counter(drawing.random_scene(rng(seed)).kind in drawing.COMPOSITES for seed in range(400))
    assert 160 <= counted[True] <= 240


def test_colours_of_one_scene_differ() -> None:
    for seed in range(100):
        scene = drawing.random_scene(rng(seed))
        assert len({scene.colour, scene.background, scene.detail}) == 3


def test_articles_fit_the_words_that_follow() -> None:
    assert drawing.with_article("orange star") == "an orange star"
    assert drawing.with_article("red star") == "a red star"


def test_pictures_of_a_subject_show_one_thing_on_several_grounds() -> None:
    subject = drawing.subject_scene(2)
    pictures = drawing.subject_pictures(subject, 5, seed=1)
    corners = {tuple(picture[0, 0]) for picture in pictures}
    assert len(corners) > 1
    assert subject.kind == "emblem"


def test_importing_the_drawn_world_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from executors.tiny import MODEL_DIR, drawing\n"
        "assert 'torch' not in sys.modules\n"
        "assert MODEL_DIR.name == 'model'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
