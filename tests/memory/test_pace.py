"""Which generation promises a sign of life after each step, and so may be called hung."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the AI methods need the executors extra")


class Calls:
    def __call__(self, prompt: str, callback_on_step_end: Any = None) -> None:
        pass


class KeepsToItself:
    def __call__(self, prompt: str) -> None:
        pass


@pytest.mark.parametrize(
    ("family", "pipe", "paced"),
    [("sd", KeepsToItself(), True), ("other", Calls(), True), ("other", KeepsToItself(), False)],
)
def test_only_what_is_heard_of_after_each_step_is_watched(family: str, pipe: Any, paced: bool) -> None:
    from executors.methods.text_to_image import TextToImage

    method = TextToImage()
    made: Any = SimpleNamespace(family=family, pipe=pipe)
    method._loaded = made
    assert method.paced is paced
