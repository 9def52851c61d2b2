"""Acts out attempts on the simulated cluster: how long each runs, how it ends, and how it is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.commands import StartTask, StopTask
from engine.events import TaskFailed, TaskFinished, TaskProgressed, TaskStarted, TaskStopped
from engine.tasks import FailureCause, Micros, TaskSpec, TaskType
from sim.draws import lognormal, unit
from sim.hardware import PEAK_FEATURES, BatchRow
from sim.maker import Maker
from sim.parts import Outcome, SimAttempt, SimPod

if TYPE_CHECKING:
    from sim.world import SimWorld

_STARTED: Final = Maker(TaskStarted)
_FINISHED: Final = Maker(TaskFinished)
_LORAS_PER_POD = 8
_PEAKS_REMEMBERED = 10_000
_EPSILON = 1e-6
"""A step counts as done at its end, however floating point rounds."""
_STOP_SAVE_US = 200_000
"""Time to write a checkpoint or latents down when an attempt is told to stop and keep them."""


class Attempts:
    """The attempts of one simulated world."""

    def __init__(self, world: SimWorld) -> None:
        self._world = world
        self.checkpoints: dict[str, dict[str, float]] = {}
        """By task: the share of the work that each of its checkpoints holds."""
        self._peaks: dict[tuple[object, ...], int] = {}
        self._batches: dict[tuple[object, ...], list[float]] = {}

    def forget(self, attempt: SimAttempt) -> None:
        """Let an attempt vanish with its Pod."""
        attempt.token += 1
        attempt.gone = True

    def start(self, order: StartTask) -> None:
        """Begin to carry out a StartTask."""
        attempt = self._enter(order)
        if attempt is not None:
            # Order and report both travel before the run: it shifts the run by one report, and saves a timeout per task.
            self._world.after(2 * self._world.hardware.dispatch_us, self._begin, attempt, attempt.token)

    def resume(self, order: StartTask, ran_us: Micros) -> None:
        """Go on with an attempt that is known to have begun `ran_us` ago, before this world was; nobody is told again."""
        attempt = self._enter(order)
        if attempt is None:
            return
        now = self._world.now()
        attempt.began_at, attempt.rebased_at = now - ran_us, now
        load_us = self._decide(attempt)
        attempt.left_us = max(1.0, load_us + attempt.total_us - ran_us)
        attempt.batch_at = now
        self._respeed(attempt.pod)

    def _enter(self, order: StartTask) -> SimAttempt | None:
        pod = self._world.pods.get(order.pod)
        known = self._world.open_tasks.get(order.req_no)
        if pod is None or pod.stopping or known is None:
            return None
        key = (order.req_no, order.attempt, order.rank)
        done = self.checkpoints.get(order.req_no, {}).get(order.checkpoint, 0.0) if order.checkpoint else 0.0
        attempt = SimAttempt(key, known[0], known[1], pod, done)
        pod.running[key] = attempt
        return attempt

    def _begin(self, attempt: SimAttempt, token: int) -> None:
        if attempt.token != token:
            return
        if attempt.stop_ordered:
            self._stopped(attempt, token, False)
            return
        req_no, number, rank = attempt.key
        now = self._world.now()
        attempt.began_at = now
        load_us = self._decide(attempt)
        self._world.emit(_STARTED.make((req_no, number, rank)))
        if load_us > 0.0:
            attempt.token += 1
            self._world.after(round(load_us), self._join, attempt, attempt.token)
        else:
            self._join(attempt, attempt.token)
        if self._world.hardware.progress_reports and attempt.task.task_type is TaskType.TP:
            self._arm_progress(attempt)

    def _join(self, attempt: SimAttempt, token: int) -> None:
        """Let an attempt that has all it needs into the running batch of its Pod."""
        if attempt.token == token:
            attempt.batch_at = attempt.rebased_at = self._world.now()
            self._respeed(attempt.pod)

    def _decide(self, attempt: SimAttempt) -> float:
        """Settle how long the attempt runs alone and how it ends; return how long it loads before it enters its Pod's batch.

        A load does not stop the batch that is running. With one slot there is no batch, and a load is a part of the run.
        """
        task, truth, pod, hardware = attempt.task, attempt.truth, attempt.pod, self._world.hardware
        req_no, number, _ = attempt.key
        if truth.work_us is not None:
            work = truth.work_us / hardware.speed(pod.gpu_model)
        else:
            noise = (
                1.0
                if task.method == "sleep"
                else lognormal(hardware.noise_sigma, self._world.seed, "run", req_no, number)
            )
            work = hardware.run_us(task, pod.gpu_model, pod.share) * noise
            if task.method != "sleep":
                work += hardware.transfer_us(_pictures(task))
        work = max(1.0, work * (1.0 - attempt.done_before))
        if pod.fresh:
            pod.fresh = False
            if hardware.first_runs is not None:
                work += hardware.first_runs.draw(task.method, task.model, self._world.seed, pod.order.pod)
        load_us = self._lora_us(attempt)
        if pod.order.slots == 1:
            work, load_us = work + load_us, 0.0
        attempt.peak_bytes = truth.peak_gpu_memory_bytes or self._peak_bytes(task)
        cap = min((grant.memory_bytes for grant in pod.order.grants), default=0)
        wish = _wished_failure(task, number)
        if cap and attempt.peak_bytes > cap:
            attempt.outcome, attempt.cause, attempt.peak_bytes = Outcome.FAIL, FailureCause.OUT_OF_MEMORY, cap
            work *= 0.1 + 0.4 * unit(self._world.seed, "oom", req_no, number)
        elif truth.fails_with is not None or wish is not None:
            attempt.cause = truth.fails_with or wish or FailureCause.CRASHED
            attempt.outcome = Outcome.CRASH if wish is FailureCause.CRASHED else Outcome.FAIL
        elif (
            self._world.plan.attempt_crash_ppm
            and unit(self._world.seed, "crash", req_no, number) * 1e6 < self._world.plan.attempt_crash_ppm
        ):
            attempt.outcome = Outcome.CRASH
            work *= unit(self._world.seed, "crash-at", req_no, number)
        attempt.total_us = attempt.left_us = max(1.0, work)
        return load_us

    def _peak_bytes(self, task: TaskSpec) -> int:
        key = (task.method, task.model, *[feature for feature in task.features if feature[0] in PEAK_FEATURES])
        median = self._peaks.get(key)
        if median is None:
            if len(self._peaks) >= _PEAKS_REMEMBERED:
                self._peaks.clear()
            median = self._peaks[key] = self._world.hardware.peak_memory_bytes(task)
        return (
            round(median * lognormal(self._world.hardware.memory_sigma, self._world.seed, "memory", task.req_no))
            if median
            else 0
        )

    def _lora_us(self, attempt: SimAttempt) -> float:
        spent = self._pipeline_us(attempt) if self._world.hardware.measured is not None else 0.0
        loaded = attempt.pod.loras
        for lora in attempt.truth.loras:
            if lora in loaded:
                loaded.move_to_end(lora)
                continue
            self._world.count("lora_loads")
            spent += self._one_lora_us(attempt, lora)
            loaded[lora] = None
            if len(loaded) > _LORAS_PER_POD:
                loaded.popitem(last=False)
        return spent

    def _one_lora_us(self, attempt: SimAttempt, lora: str) -> float:
        hardware, seed = self._world.hardware, self._world.seed
        if hardware.measured is not None and attempt.pod.order.grants:
            uuid = attempt.pod.order.grants[0].uuid
            return hardware.measured.lora_us(uuid, seed, lora, attempt.key[0], attempt.key[1])
        return hardware.lora_load_us * lognormal(
            hardware.lora_sigma, seed, "lora", lora, attempt.key[0], attempt.key[1]
        )

    def _pipeline_us(self, attempt: SimAttempt) -> float:
        """Return the time to put the pipeline together anew, where neither the Pod's last task nor any in it is of this kind."""
        kind = _kind(attempt.task)
        pod, measured = attempt.pod, self._world.hardware.measured
        before, pod.pipeline = pod.pipeline, kind
        if measured is None or not kind or before in ("", kind) or not pod.order.grants:
            return 0.0
        if any(
            other is not attempt and other.began_at >= 0 and _kind(other.task) == kind for other in pod.running.values()
        ):
            return 0.0
        self._world.count("pipeline_switches")
        return measured.pipeline_us(pod.order.grants[0].uuid, self._world.seed, attempt.key[0], attempt.key[1])

    def _respeed(self, pod: SimPod) -> None:
        """Set everybody's speed in a Pod after one came or went, and reschedule their ends."""
        if pod.hung:
            return
        now = self._world.now()
        batch = [attempt for attempt in pod.running.values() if attempt.batch_at >= 0]
        stretches = self._stretches(pod, batch) if len(batch) > 1 else [1.0]
        for attempt, stretch in zip(batch, stretches, strict=False):
            attempt.rebase(now)
            attempt.stretch = stretch
            attempt.company = len(batch) - 1
            attempt.token += 1
            self._world.after(max(1, round(attempt.left_us * stretch)), self._end, attempt, attempt.token)

    def _stretches(self, pod: SimPod, batch: list[SimAttempt]) -> list[float]:
        """Return how many times as long as alone each member of a batch takes now."""
        hardware = self._world.hardware
        rows: list[BatchRow] = []
        for attempt in batch:
            if attempt.row is None:
                attempt.row, attempt.row_share = hardware.batch_row(attempt.task, attempt.truth.work_us is not None)
            rows.append(attempt.row)
        key = (pod.gpu_model, *rows)
        found = self._batches.get(key)
        if found is None:
            if len(self._batches) >= _PEAKS_REMEMBERED:
                self._batches.clear()
            found = self._batches[key] = hardware.stretches(pod.gpu_model, rows)
        return [1.0 + attempt.row_share * (stretch - 1.0) for attempt, stretch in zip(batch, found, strict=True)]

    def _end(self, attempt: SimAttempt, token: int) -> None:
        if attempt.token != token:
            return
        req_no, number, rank = attempt.key
        if attempt.outcome is Outcome.CRASH:
            self._world.crash_pod(attempt.pod.order.pod, f"attempt {number} of {req_no} crashed")
            return
        attempt.rebase(self._world.now())
        self._leave(attempt)
        if attempt.outcome is Outcome.FAIL:
            self._world.emit(TaskFailed(req_no, number, attempt.cause, rank, "simulated", attempt.peak_bytes))
        else:
            self._finish(attempt)

    def _finish(self, attempt: SimAttempt) -> None:
        """Report a result, in a Pod of several slots with what others in the batch made of the run time."""
        req_no, number, rank = attempt.key
        now = self._world.now()
        spent = now - attempt.began_at
        alone_us = company = 0
        if attempt.pod.order.slots > 1:
            alone_us = attempt.batch_at - attempt.began_at + round(attempt.total_us)
            company = round(1000 * attempt.company_us / max(1, now - attempt.batch_at))
        self._world.emit(
            _FINISHED.make((req_no, number, rank, f"sim:{req_no}", spent, attempt.peak_bytes, alone_us, company, 0))
        )

    def _leave(self, attempt: SimAttempt) -> None:
        attempt.token += 1
        attempt.gone = True
        running = attempt.pod.running
        running.pop(attempt.key, None)
        if running:
            self._respeed(attempt.pod)

    def _arm_progress(self, attempt: SimAttempt) -> None:
        gap = max(1, round(attempt.total_us / (self._world.hardware.progress_reports + 1)))
        self._world.after(gap, self._report_progress, attempt, gap)

    def _report_progress(self, attempt: SimAttempt, gap: Micros) -> None:
        if attempt.gone:
            return
        req_no, number, rank = attempt.key
        steps = self._steps(attempt.task)
        done = int(attempt.done_share(self._world.now()) * steps + _EPSILON)
        checkpoint = ""
        if self._world.hardware.running_checkpoints and rank == 0 and done:
            checkpoint = f"sim:{req_no}/{number}/{done}-of-{steps}"
            self.checkpoints.setdefault(req_no, {})[checkpoint] = done / steps
        self._world.emit(TaskProgressed(req_no, number, done, steps, rank, checkpoint))
        self._world.after(gap, self._report_progress, attempt, gap)

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop(self, order: StopTask) -> None:
        """Begin to carry out a StopTask."""
        pod = self._world.pods.get(order.pod)
        attempt = pod.running.get((order.req_no, order.attempt, order.rank)) if pod is not None else None
        if attempt is None or attempt.stop_ordered:
            return
        attempt.stop_ordered = True
        if attempt.began_at < 0:
            return
        now = self._world.now()
        steps = self._steps(attempt.task)
        step_us = max(1.0, attempt.total_us * attempt.stretch / max(1.0, steps * (1.0 - attempt.done_before)))
        to_boundary = round(step_us - (now - attempt.batch_at) % step_us) if attempt.batch_at >= 0 else 0
        if order.grace_us and to_boundary > order.grace_us:
            self._world.after(order.grace_us, self._kill_for_grace, attempt)
            return
        save = _STOP_SAVE_US if order.keep_checkpoint else 0
        self._world.after(to_boundary + save, self._stop_due, attempt, order.keep_checkpoint)

    def _stop_due(self, attempt: SimAttempt, keep: bool) -> None:
        if not attempt.gone:
            self._stopped(attempt, attempt.token, keep)

    def _kill_for_grace(self, attempt: SimAttempt) -> None:
        if not attempt.gone:
            self._world.pod_gone(attempt.pod.order.pod, FailureCause.POD_LOST, "killed after the grace")

    def _stopped(self, attempt: SimAttempt, token: int, keep: bool) -> None:
        if attempt.token != token:
            return
        req_no, number, rank = attempt.key
        checkpoint = ""
        if keep:
            steps = self._steps(attempt.task)
            done = int(attempt.done_share(self._world.now()) * steps + _EPSILON) / steps
            checkpoint = f"sim:{req_no}/{number}/{round(done * steps)}-of-{steps}"
            self.checkpoints.setdefault(req_no, {})[checkpoint] = done
        self._leave(attempt)
        self._world.emit(TaskStopped(req_no, number, rank, checkpoint))

    def _steps(self, task: TaskSpec) -> int:
        for name, value in task.features:
            if name == "steps" and isinstance(value, int | float) and value >= 1:
                return int(value)
        return self._world.hardware.default_steps


def _kind(task: TaskSpec) -> str:
    return next((str(value) for name, value in task.features if name == "kind"), "")


def _pictures(task: TaskSpec) -> int:
    for name, value in task.features:
        if name == "images" and isinstance(value, int | float):
            return max(1, int(value))
    return 1


def _wished_failure(task: TaskSpec, attempt: int) -> FailureCause | None:
    """Return the failure that a ``sleep`` task asks for: ``fail`` names it, ``fail_attempts`` how often (default: always)."""
    if task.method != "sleep":
        return None
    features = dict(task.features)
    limit = features.get("fail_attempts", 1 << 30)
    if isinstance(limit, int | float) and attempt > limit:
        return None
    named = {"crash": FailureCause.CRASHED, "oom": FailureCause.OUT_OF_MEMORY, "error": FailureCause.BAD_INPUT}
    return named.get(str(features.get("fail", "")))
