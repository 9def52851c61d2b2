"""The processes behind a sweep: each runs one configuration after another; one that dies is replaced and its run tried again.

Plain processes and pipes rather than the standard library's pool: one that loses a worker is broken as a whole, and does not say
which run it was.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from sim.configuration import SimulationConfig
from sim.workload import Workload

Run = Callable[[SimulationConfig, dict[str, Workload]], dict[str, Any]]
_TRIES = 2


class SweepError(ValueError):
    """A run of a sweep could not be done; says which and why."""

    def __init__(self, config: SimulationConfig, why: str) -> None:
        profile = config.profile if "\n" not in config.profile else "of a text"
        super().__init__(f"sweep: the run of profile {profile!r}, seed {config.seed}, {config.nodes} nodes: {why}")
        self.config = config
        self.why = why


class _Worker:
    """A process, the pipe to it, and what it is doing."""

    def __init__(self, run: Run) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()
        self.key: str | None = None

    def give(self, key: str, config: SimulationConfig) -> None:
        self.key = key
        self.pipe.send(config)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def work_through(
    order: Sequence[tuple[str, SimulationConfig]],
    run: Run,
    jobs: int,
    finished: Callable[[str, dict[str, Any]], None],
) -> None:
    """Run every configuration on `jobs` processes, calling `finished` with each result; none is left when this returns.

    A run that fails, or whose process died twice, stops the sweep: what is in flight still finishes, then `SweepError` is raised.
    """
    waiting = deque(order)
    configs = dict(order)
    tries: dict[str, int] = {}
    workers: list[_Worker] = []
    failure: SweepError | None = None
    try:
        while waiting or any(worker.key is not None for worker in workers):
            while waiting and len(workers) < jobs:
                workers.append(_Worker(run))
            for worker in workers:
                if worker.key is None and waiting:
                    key, config = waiting.popleft()
                    tries[key] = tries.get(key, 0) + 1
                    _give(worker, key, config)
            ready = wait([worker.pipe for worker in workers if worker.key is not None])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                key = worker.key or ""
                answer = _answer(worker)
                if answer is None:
                    workers.remove(worker)
                    worker.end()
                    if tries[key] >= _TRIES:
                        failure = failure or SweepError(configs[key], _died(worker))
                    elif failure is None:
                        waiting.appendleft((key, configs[key]))
                else:
                    worker.key = None
                    if isinstance(answer, str):
                        failure = failure or SweepError(configs[key], answer)
                    else:
                        finished(key, answer)
            if failure is not None:
                waiting.clear()
    finally:
        for worker in workers:
            worker.end()
    if failure is not None:
        raise failure


def _give(worker: _Worker, key: str, config: SimulationConfig) -> None:
    try:
        worker.give(key, config)
    except BrokenPipeError:
        worker.key = key  # It is dead already: the empty pipe tells below, and the run is tried again.


def _answer(worker: _Worker) -> dict[str, Any] | str | None:
    """Return the result, what went wrong, or None when the process is gone."""
    try:
        answer: dict[str, Any] | str = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return None
    return answer


def _died(worker: _Worker) -> str:
    code = worker.process.exitcode
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
    return f"its process ended {how}, twice; is there enough memory? Try fewer --jobs or a smaller workload"


def _serve(pipe: Connection, run: Run) -> None:
    """Run what comes through the pipe until it closes. An interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    workloads: dict[str, Workload] = {}
    while True:
        try:
            config = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer: dict[str, Any] | str = run(config, workloads)
        except ValueError as error:
            answer = str(error)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """End this process, whatever it is at, when the one that started it is gone: nobody would take the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
