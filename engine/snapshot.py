"""A State as plain data and back."""

from __future__ import annotations


def digest(state: object) -> str:
    """Return a SHA-256 over the whole state."""
    return ""
