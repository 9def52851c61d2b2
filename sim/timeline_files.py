"""Records a run into a timeline file by the name it is given: a picture for a viewer, or tables for analysis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.commands import Command
from engine.events import Event
from engine.state import State
from engine.tasks import Micros
from sim.timeline import Follower, TimelineError
from sim.timeline_perfetto import MAX_SLICES, Perfetto

__all__ = ["Recorder"]


class Recorder:
    """A journal that writes a timeline.

    ``.json`` and ``.json.gz`` become a trace for Perfetto, a name that ends in ``.parquet`` a directory of tables. Call it with
    every step, then `finish`. Raises `TimelineError` for another ending, or without pyarrow.
    """

    def __init__(
        self, path: Path, facts: dict[str, str | int | float] | None = None, max_slices: int = MAX_SLICES
    ) -> None:
        self.path = path
        self._facts = facts or {}
        self._picture: Perfetto | None = None
        self._tables = None
        if path.name.endswith((".json", ".json.gz")):
            _check_folder(path)
            self._picture = Perfetto(max_slices)
            self._follower = Follower([self._picture])
        elif path.name.endswith(".parquet"):
            from sim.timeline_parquet import ParquetTables

            if path.is_file():
                raise TimelineError(f"timeline: {path} is a file; Parquet tables need a directory, so name another")
            self._tables = ParquetTables(path, self._facts)
            self._follower = Follower([self._tables])
        else:
            raise TimelineError(
                f"timeline: {path.name} ends in none of .json, .json.gz (for ui.perfetto.dev) and .parquet (a directory of tables)"
            )

    def __call__(self, now: Micros, events: Sequence[Event], commands: Sequence[Command]) -> None:
        """Take one step."""
        if self._tables is not None:
            self._tables.step(now, events, commands)
        self._follower(now, events, commands)

    def begin_from(self, state: State) -> None:
        """Take over what a snapshot holds, before the first step."""
        self._follower.begin_from(state)

    def finish(self) -> list[str]:
        """Complete the file; return what to tell people, warnings included."""
        self._follower.close()
        if self._tables is not None:
            self._tables.close()
            shown = ", ".join(f"{rows:,} {name}" for name, rows in self._tables.rows.items())
            return [f"timeline written to {self.path}: {shown}"]
        picture = self._picture
        assert picture is not None
        picture.write(self.path, self._facts)
        lines = [
            f"timeline written to {self.path} ({self.path.stat().st_size / 1e6:,.1f} MB); open it in ui.perfetto.dev"
        ]
        if picture.left_out:
            nodes = len({each.node for each in picture.runs} | {each.node for each in picture.pods})
            until = "" if picture.cut_at is None else f" up to {(picture.cut_at - (picture.began or 0)) / 3.6e9:,.2f} h"
            lines.append(
                f"it shows {nodes} of {len(picture.gpus)} nodes{until} and leaves {picture.left_out:,} runs and Pods out, to stay "
                f"below {picture.max_slices:,}; --timeline-slices raises that, a .parquet directory has everything"
            )
        return lines


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise TimelineError(f"timeline: {path.parent} is no directory; make it first, or write elsewhere")
