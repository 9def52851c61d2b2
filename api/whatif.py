"""What if, asked of a live journal: reads it without touching it, and keeps the computing out of the scheduler's own process.

`answer` computes here. `ask_worker` has a process of its own do it, with bounds on time and memory: the scheduler and the gateway
stay as quick as they were. `python -m api.whatif` is that process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from api.sm.journal import JournalBroken, JournalCorrupt, read_journal
from api.whatif_request import WhatIfRequest
from engine import profiles
from engine.events import TaskFinished
from engine.journal import Record
from engine.profile import Profile
from engine.tasks import SECOND
from sim.fork import Change, Fork, ForkError, ForkIdle, Pool
from sim.whatif import WhatIf, compare_futures

TIMEOUT_S = 120.0
MEMORY_BYTES = 8 << 30
_NICE = 10
Progress = Callable[[float, str], None]


class WhatIfRefused(ValueError):
    """The question cannot be answered; the message names the field and the remedy."""


class WhatIfTooLong(RuntimeError):
    """The answer took longer, or more memory, than is allowed."""


def answer(
    journal: Path,
    request: WhatIfRequest,
    unchanged: Profile,
    changed: Profile | None = None,
    on_progress: Progress | None = None,
) -> WhatIf:
    """Return the two futures of a journal's end; raises WhatIfRefused, FileNotFoundError.

    `unchanged` is the profile that production runs; `changed` overrides the one that the request names.
    """
    try:
        if changed is None:
            changed = profiles.load(request.profile, own_policies=False) if request.profile else unchanged
        before = Change(unchanged)
        after = Change(
            changed,
            tuple(Pool.parse(text, "add_nodes") for text in request.add_nodes),
            tuple(Pool.parse(text, "remove_nodes") for text in request.remove_nodes),
            request.load,
        )
        begin, records = read_journal(journal, from_start=True)
        at = None
        if request.back_s and records:
            at = records[-1].now - round(request.back_s * SECOND)
        fork = Fork.of(begin, records, at)
        return compare_futures(
            fork,
            before,
            after,
            hours=request.hours,
            window_hours=request.window_hours,
            seeds=request.seeds,
            on_progress=on_progress,
        )
    except ForkIdle as error:
        raise WhatIfRefused(f"{error}; {_when_it_worked(records)}") from error
    except (ForkError, profiles.InvalidProfile, JournalCorrupt, JournalBroken) as error:
        raise WhatIfRefused(str(error)) from error


def _when_it_worked(records: Sequence[Record]) -> str:
    """Say how far back a moment lies at which tasks still finished."""
    for record in reversed(records):
        if any(isinstance(event, TaskFinished) for event in record.events):
            back_s = (records[-1].now - record.now) // SECOND + 1
            return f"the last task finished {back_s} s before the journal's end: begin {back_s} s back (back_s, --back)"
    return "no task ever finished in this journal"


async def ask_worker(
    journal: Path, request: WhatIfRequest, unchanged: Profile, timeout_s: float = TIMEOUT_S
) -> Mapping[str, Any]:
    """Have a process of its own answer; returns `WhatIf.to_json`. Raises WhatIfRefused, WhatIfTooLong."""
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "api.whatif",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    question = pickle.dumps((journal, request, unchanged, timeout_s))
    try:
        out, problems = await asyncio.wait_for(worker.communicate(question), timeout_s)
    except TimeoutError:
        raise WhatIfTooLong(
            f"no answer within {timeout_s:.0f} s; ask for fewer seeds or hours, or use `aigc whatif`, which has no limit"
        ) from None
    finally:
        if worker.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()
    try:
        found = json.loads(out)
    except ValueError:
        last = problems.decode(errors="replace").strip().rpartition("\n")[2]
        raise WhatIfTooLong(f"the worker ended without an answer ({last or worker.returncode}); ask for less") from None
    if "refused" in found:
        raise WhatIfRefused(found["refused"])
    result: Mapping[str, Any] = found["answer"]
    return result


def _serve() -> None:
    """Answer the one question that the parent process sent."""
    journal, request, unchanged, timeout_s = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - from the parent process
    os.nice(_NICE)
    seconds = round(timeout_s) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        found: dict[str, Any] = {"answer": answer(journal, request, unchanged).to_json()}
    except (WhatIfRefused, FileNotFoundError) as error:
        found = {"refused": str(error)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _serve()
