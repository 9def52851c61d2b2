"""The two ways in which the engine refuses to go on."""

from __future__ import annotations


class InvalidEvent(ValueError):
    """The driver lied: time went backwards, or a fact contradicts itself. Names the field and the remedy."""


class InvariantViolated(AssertionError):
    """Our own bug: the state contradicts itself. Keep the journal, it replays the way here."""
