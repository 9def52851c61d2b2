"""One running batch for several threads: each brings a job of pictures and waits, one thread does the steps of them all."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from executors.batching.batch import RunningBatch
from executors.batching.company import Company, Part, StepShare
from executors.batching.requests import BatchEvent, Failed, Finished, KeptPicture, PictureRequest, Previewed, Stepped

_UNIT_PX = 512 * 512

Progress = Callable[[int, int, str], None]
"""Called between two steps with the steps done and in all, over all pictures of a job, and how many of them are made."""


def _unseen(_picture: Any) -> None:
    """Show nobody."""


class Stopped(Exception):
    """The job was told to stop; what it had comes along, by place."""

    def __init__(self, kept: Mapping[int, KeptPicture], made: Mapping[int, Any]) -> None:
        super().__init__("stopped between two steps, as told")
        self.kept = kept
        self.made = made


@dataclass(slots=True)
class _Job:
    """A job's pictures by id, and where they stand; only the serving thread writes to it until `over` is set."""

    places: dict[str, int]
    pictures: dict[str, KeptPicture]
    progress: Progress
    should_stop: Callable[[], bool]
    preview: Callable[[Any], None] = _unseen
    share: StepShare = field(default_factory=StepShare)
    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    made: dict[int, Any] = field(default_factory=dict)
    count: int = 0
    error: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)


class SharedBatch:
    """A running batch behind a door that threads may knock at."""

    def __init__(self, batch: RunningBatch) -> None:
        self._batch = batch
        self._changed = threading.Condition()
        self._arrived: list[_Job] = []
        self._jobs: dict[str, _Job] = {}
        """Jobs by the id of each of their pictures that is in the batch."""
        self._company = Company()
        self._number = 0
        self._closed = False

    def make(
        self,
        pictures: Mapping[int, PictureRequest | KeptPicture],
        made: Mapping[int, Any],
        progress: Progress,
        should_stop: Callable[[], bool],
        *,
        preview: Callable[[Any], None] = _unseen,
        share: StepShare | None = None,
        served: bool = True,
    ) -> dict[int, Any]:
        """Make the pictures of a job, by place, and wait for them; returns them together with those `made` before.

        Where no other thread serves, say so: then the one that calls does.

        Raises Stopped, or the error of the first picture that failed (the others of the job are dropped then). The callables
        are called by the serving thread; `preview` gets small PIL pictures where the requests ask for them. `share` is filled in.
        """
        job = self._entered(pictures, made, progress, should_stop, preview, share or StepShare())
        while not served and not job.over.is_set():
            self._turn()
        job.over.wait()
        if job.error is not None:
            raise job.error
        return job.made

    def _entered(
        self,
        pictures: Mapping[int, PictureRequest | KeptPicture],
        made: Mapping[int, Any],
        progress: Progress,
        should_stop: Callable[[], bool],
        preview: Callable[[Any], None],
        share: StepShare,
    ) -> _Job:
        with self._changed:
            if self._closed:
                raise RuntimeError("the batch is closed: its Pod is ending")
            self._number += 1
            job = _Job({}, {}, progress, should_stop, made=dict(made), count=len(pictures) + len(made))
            job.preview, job.share = preview, share
            for place, given in pictures.items():
                kept = given if isinstance(given, KeptPicture) else KeptPicture(given)
                id = f"{self._number}/{place}"
                job.places[id] = place
                job.pictures[id] = kept.renamed(id)
            self._arrived.append(job)
            self._changed.notify_all()
        return job

    def peak_bytes(self, share: StepShare) -> int:
        """Return the device's memory that a job needed: what lay there anyway, and its own share of the calls."""
        return self._batch.memory.base_bytes + share.working_bytes

    def serve(self) -> None:
        """Step as long as there are pictures, wait while there are none; returns after `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._closed or len(self._batch))
            if not self._turn():
                return

    def _turn(self) -> bool:
        """Let in who has come, let out who is to stop, and take a step; False when the batch is closed."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            closed = self._closed
        for job in arrived:
            self._let_in(job)
        if closed:
            self._abandon(RuntimeError("the batch was closed before the picture was made"))
            return False
        for job in self._present():
            if job.should_stop():
                self._stop(job)
        present, began = self._present(), time.monotonic()
        try:
            events = self._batch.step()
        except Exception as error:
            # No request's own failure: those are events. Whatever it is, nobody may wait for ever.
            traceback.print_exc()
            self._abandon(error)
            return True
        self._measure((time.monotonic() - began) * 1e6, present, events)
        self._tell(events)
        return True

    def close(self) -> None:
        """Let `serve` return after the step under way; may be called from any thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _present(self) -> list[_Job]:
        return list({id(job): job for job in self._jobs.values()}.values())

    def _measure(self, took_us: float, present: list[_Job], events: list[BatchEvent]) -> None:
        """Note what a step took, and what of that each job that was present had in it."""
        parts: dict[int, dict[Hashable, float]] = {}
        for event in events:
            job = self._jobs.get(event.id) if isinstance(event, Stepped) else None
            if job is not None:
                request = job.pictures[event.id].request
                rows = 2.0 if request.guidance > 1.0 else 1.0
                sizes = parts.setdefault(id(job), {})
                size = (request.width, request.height)
                sizes[size] = sizes.get(size, 0.0) + rows * request.width * request.height / _UNIT_PX
        if parts:
            self._company.step(
                took_us, [Part(*part) for part in parts.items()], {id(job): job.share for job in present}
            )

    def _let_in(self, job: _Job) -> None:
        if not job.pictures:
            job.over.set()
        for name, kept in job.pictures.items():
            try:
                self._batch.resume(kept)
            except Exception as error:
                self._end(job, error)
                return
            self._jobs[name] = job

    def _stop(self, job: _Job) -> None:
        try:
            kept = {place: self._batch.pause(name) for name, place in job.places.items() if name in self._batch}
        except Exception as error:
            self._end(job, error)
            return
        self._end(job, Stopped(kept, dict(job.made)))

    def _tell(self, events: list[BatchEvent]) -> None:
        moved: dict[int, _Job] = {}
        for event in events:
            job = self._jobs.get(event.id)
            if job is None:
                continue
            match event:
                case Stepped(done=done, total=total):
                    job.steps[event.id] = (done, total)
                    moved[id(job)] = job
                case Finished(picture=picture, working_bytes=working_bytes):
                    job.share.working_bytes += working_bytes
                    job.made[job.places[event.id]] = picture
                    del self._jobs[event.id]
                    if len(job.made) == job.count:
                        self._report(job)
                        moved.pop(id(job), None)
                        self._end(job, None)
                case Failed(error=error):
                    moved.pop(id(job), None)
                    self._end(job, error)
                case Previewed(picture=picture):
                    job.preview(picture)
                case _:
                    pass
        for job in moved.values():
            if not job.over.is_set():
                self._report(job)

    @staticmethod
    def _report(job: _Job) -> None:
        """Tell a job's progress; pictures that have not begun, or were made before, count as the others do."""
        each = max(total for _done, total in job.steps.values()) if job.steps else 1
        before = job.count - len(job.places)
        done = sum(done for done, _total in job.steps.values()) + before * each
        job.progress(done, each * job.count, f"{len(job.made)}/{job.count}")

    def _end(self, job: _Job, error: Exception | None) -> None:
        for name in job.places:
            self._jobs.pop(name, None)
            self._batch.cancel(name)
        job.error = error
        job.over.set()

    def _abandon(self, error: Exception) -> None:
        for job in self._present():
            self._end(job, error)
