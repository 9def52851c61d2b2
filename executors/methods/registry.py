"""Methods by name, imported only when one is created, so that a Pod that sleeps never loads torch."""

from __future__ import annotations

from executors.methods.base import Method


def create(method_name: str) -> Method:
    """Return a new, unloaded method; raises ValueError for an unknown name."""
    match method_name:
        case "text_to_image":
            from executors.methods.text_to_image import TextToImage

            return TextToImage()
        case "dreambooth":
            from executors.methods.dreambooth import DreamBooth

            return DreamBooth()
        case "sleep":
            from executors.methods.sleep import Sleep

            return Sleep()
        case _:
            raise ValueError(f"method: {method_name!r} is unknown; choose text_to_image, dreambooth or sleep")


def preload(method_name: str) -> None:
    """Import what a method needs ahead of time, in a process that Pods are forked from."""
    create(method_name)
