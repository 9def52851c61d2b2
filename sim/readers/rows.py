"""What every trace reader shares: rows, the account of what was kept, and fields that know where they stand.

A reader turns one record into a `TraceRow` or says why not. In strict mode the first bad record raises; otherwise it is
counted with the line it stands in, which is what the trace doctor reads.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn, TextIO

from engine.resources import Demand
from engine.tasks import SECOND, Affinity, Micros, TaskSpec, TaskType
from sim.workload import Truth, WorkloadError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
UNKNOWN = frozenset({"", "none", "null", "nan", "na", "n/a"})
"""What traces write for a value they do not have, in lower case."""


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """What the readers cannot know from the file."""

    limit: int | None = None
    """Keep the first tasks only, by time; None: all."""
    gpus_per_node: int = 8
    """Jobs that ask for more GPUs become gangs whose members ask for at most this many."""
    gpu_types: bool = True
    """Hold tasks to the GPU types that the trace names; False for a cluster whose models it does not know."""
    cpu_tasks: bool = False
    """Keep tasks that ask for no GPU."""
    tenants: int = 4
    """Number of tenants to draw for traces that know none."""
    urgent_share: float = 0.1
    """Share of tasks to make urgent for traces of a service that knows no urgency."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no reader could follow."""
        if self.limit is not None and self.limit < 1:
            raise WorkloadError(f"limit: must be at least 1, got {self.limit}; leave it out to take every task")
        if self.gpus_per_node < 1:
            raise WorkloadError(f"gpus_per_node: must be at least 1, got {self.gpus_per_node}")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One record as a reader understood it; `at` counts microseconds on the trace's own clock."""

    line: int
    at: Micros
    task: TaskSpec
    truth: Truth


@dataclass(slots=True)
class Problem:
    """Records that are wrong in the same way."""

    field: str
    message: str
    """Of the first one, with its place."""
    line: int
    count: int = 1


class BadRecord(WorkloadError):
    """A record cannot be a task; whoever reads without being strict goes on with the next one."""


@dataclass(slots=True)
class Intake:
    """The account of one reading."""

    path: Path
    strict: bool = True
    unit: str = "line"
    """What places are counted in: lines of a text, entries of a JSON list."""
    records: int = 0
    """Records seen, kept or not."""
    skipped: dict[str, Problem] = field(default_factory=dict)
    """By reason: records that are well-formed and still no task to simulate."""
    bad: dict[str, Problem] = field(default_factory=dict)
    """By field and kind: records that are wrong."""
    missing: dict[str, Problem] = field(default_factory=dict)
    """By field: optional values that are not there, so a default serves."""
    facts: dict[str, int | float | str] = field(default_factory=dict)
    """What the file says about itself, and what the reader assumed."""
    counts: Counter[str] = field(default_factory=Counter)
    """What the reader noticed in records it kept."""

    def skip(self, line: int, reason: str) -> None:
        """Note that a record is left out, and why."""
        _count(self.skipped, reason, "", line, reason)

    def lack(self, line: int, name: str, default: str) -> None:
        """Note that an optional value is missing."""
        _count(self.missing, name, name, line, f"missing; taken as {default}")

    def refuse(self, line: int, name: str, message: str, kind: str = "value") -> NoReturn:
        """Raise for a wrong record: for good when strict, else for `attempt` to catch."""
        text = f"{self.path}, {self.unit} {line}, {name}: {message}"
        if self.strict:
            raise WorkloadError(text)
        _count(self.bad, f"{name} ({kind})", name, line, text)
        raise BadRecord(text)

    def attempt(self, read: Callable[[], TraceRow | None]) -> TraceRow | None:
        """Return what `read` returns, or None for a record that it refused."""
        self.records += 1
        try:
            return read()
        except BadRecord:
            return None


def _count(table: dict[str, Problem], key: str, name: str, line: int, message: str) -> None:
    known = table.get(key)
    if known is None:
        table[key] = Problem(name, message, line)
    else:
        known.count += 1


class Fields:
    """One record's values by name, and where it stands."""

    __slots__ = ("_intake", "_row", "line")

    def __init__(self, intake: Intake, line: int, row: Mapping[str, object]) -> None:
        self._intake = intake
        self._row = row
        self.line = line

    def refuse(self, name: str, message: str, kind: str = "value") -> NoReturn:
        """Raise for this record."""
        self._intake.refuse(self.line, name, message, kind)

    def has(self, *names: str) -> bool:
        """Tell whether the file has these columns at all."""
        return all(name in self._row for name in names)

    def known(self, name: str) -> bool:
        """Tell whether the value is there."""
        value = self._row.get(name)
        return value is not None and str(value).strip().lower() not in UNKNOWN

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; without a default it has to be there."""
        if self.known(name):
            return str(self._row[name]).strip()
        if default is None:
            self.refuse(name, "is missing; every record needs it", "missing")
        self._intake.lack(self.line, name, repr(default))
        return default

    def number(self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """Return a number from `low` to `high`."""
        if not self.known(name):
            if default is None:
                self.refuse(name, "is missing; every record needs it", "missing")
            self._intake.lack(self.line, name, f"{default:g}")
            return default
        value = self._row[name]
        try:
            found = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            self.refuse(name, f"{value!r} is not a number", "not a number")
        if not math.isfinite(found) or not low <= found <= high:
            kind = "negative" if found < 0 <= low else "out of range"
            self.refuse(name, f"{found:g} is out of range; expected {low:g} to {high:g}", kind)
        return found

    def whole(self, name: str, default: int | None = None, low: int = 0, high: int = 1_000_000) -> int:
        """Return an integer; 4.0 is one, 4.5 is not."""
        found = self.number(name, default, low, high)
        if found != int(found):
            self.refuse(name, f"{found:g} is not a whole number", "not a number")
        return int(found)

    def moment(self, name: str) -> Micros:
        """Return a point in time: a date and time without a zone, or seconds since whenever the trace counts from."""
        text = self.text(name)
        found = moment(text)
        if found is None:
            self.refuse(
                name, f"{text!r} is neither a time like 2017-10-01 00:00:45 nor a number of seconds", "not a time"
            )
        return found

    def span(self, began: str, ended: str) -> Micros:
        """Return the time between two moments; the clock must not run backwards."""
        first, last = self.moment(began), self.moment(ended)
        if last < first:
            self.refuse(ended, f"{self._row[ended]!r} lies before {began} {self._row[began]!r}", "negative")
        return last - first


def moment(text: str) -> Micros | None:
    """Return microseconds since 1970 for a date and time, or for a number of seconds; None when it is neither."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            stamp = datetime.fromisoformat(text)
        except ValueError:
            return None
        return (
            (stamp.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
            if stamp.tzinfo is None
            else (stamp - _EPOCH) // _MICROSECOND
        )
    return round(seconds * SECOND) if math.isfinite(seconds) and abs(seconds) < 1e12 else None


def gang(gpus: int, gpus_per_node: int) -> tuple[int, int]:
    """Return (members, GPUs of each): the fewest equal members, none with more than `gpus_per_node`, the total kept exactly.

    A total that no small number divides becomes many small members: 13 GPUs on nodes of 8 are 13 members with one each.
    """
    members = max(1, -(-gpus // gpus_per_node))
    while gpus % members:
        members += 1
    return members, gpus // members


def batch_task(
    req_no: str,
    tenant: str,
    demand: Demand,
    members: int,
    features: Mapping[str, str | int | float],
    declared_us: Micros | None = None,
) -> TaskSpec:
    """Return a batch job as a training task that holds its GPUs for its time and needs no model."""
    return TaskSpec(
        req_no=req_no,
        tenant=tenant,
        group="",
        task_type=TaskType.TP,
        method="sleep",
        demand=demand,
        members=members,
        affinity=Affinity.NONE,
        declared_us=declared_us,
        features=tuple(sorted(features.items())),
    )


def columns_of(head: str) -> list[str]:
    """Return the column names in the first line of a CSV, quoted or not."""
    first = head.partition("\n")[0].rstrip("\r")
    return next(csv.reader([first]), [])


def open_text(path: Path) -> TextIO:
    """Open a text file, packed with gzip or not, with a byte order mark or without; raises `WorkloadError`."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if packed:
            return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline="")
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise WorkloadError(f"trace: cannot read {path}: {error.strerror}; check the path") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every line with its number; raises `WorkloadError` for what is no text."""
    try:
        with open_text(path) as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"trace: {path} is not UTF-8 text ({error.reason} at byte {error.start}); unpack archives first"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"trace: {path} cannot be unpacked ({error}); fetch it again") from None


def csv_records(
    path: Path, intake: Intake, columns: tuple[str, ...], header: tuple[str, ...] | None = None
) -> Iterator[Fields]:
    """Yield a CSV's records; `columns` have to be there, `header` names them where the file does not."""
    reader = csv.DictReader((text for _, text in lines(path)), fieldnames=header)
    try:
        names = reader.fieldnames or ()
        for name in columns:
            if name not in names:
                raise WorkloadError(
                    f"{path}: column {name!r} is missing; the header has {', '.join(map(str, names))[:200]}"
                )
        for row in reader:
            yield Fields(intake, reader.line_num, row)
    except csv.Error as error:
        raise WorkloadError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
