"""Prints the predictor's report card, its speed, how it follows a drift, and the machine that was measured on.

python -m benchmarks.predict [--trace lora_request_trace.csv] [--json FILE]
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

# Beside this file lies an `engine.py`: as a script, its own folder must not come before the packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from benchmarks.machine import machine_line  # noqa: E402
from engine.tasks import SECOND  # noqa: E402
from predictors.gentd26 import SUCCEED, Row, read_rows  # noqa: E402
from predictors.predictor import Prediction, Predictor  # noqa: E402
from predictors.report import report  # noqa: E402

TRACE = Path(__file__).resolve().parent.parent.parent / "shared/traces/gentd26/lora_request_trace.csv"
DRIFT_STARTS = (5_000, 8_000, 11_000, 14_000)
DRIFT_FACTOR = 1.5


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, help="request trace as GenTD26 publishes it")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    arguments = parser.parse_args()
    if not arguments.trace.exists():
        parser.error(f"--trace: {arguments.trace} does not exist; GenTD26 is published in alibaba/clusterdata")
    rows = read_rows(arguments.trace)
    card = report(rows)
    print(card.table())
    drift = drift_bias([row for row in rows if row.status == SUCCEED and row.run_us > 0])
    print(
        f"\nall run times x {DRIFT_FACTOR} from one request on: mean log error that this adds, over the requests after it"
    )
    for start, biases in drift.items():
        print(f"  from request {start}: " + ", ".join(f"{window} {bias:+.3f}" for window, bias in biases.items()))
    parts = part_speeds(rows)
    print("\nmedian of one call: " + ", ".join(f"{name} {us:.1f} us" for name, us in parts.items()))
    print(machine_line())
    if arguments.json is not None:
        figures = {"card": card.to_json(), "drift": drift, "parts_us": parts, "machine": machine_line()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def drift_bias(rows: list[Row]) -> dict[int, dict[str, float]]:
    """Return, by the request at which all run times grow, the mean log error this adds within windows after it."""
    windows = {"1-20": (0, 20), "21-80": (20, 80), "81-200": (80, 200), "201-350": (200, 350), "351-450": (350, 450)}
    biases = {}
    for start in DRIFT_STARTS:
        if start + 450 > len(rows):
            continue
        head = rows[: start + 450]
        slowed = [*head[:start], *(replace(row, run_us=round(row.run_us * DRIFT_FACTOR)) for row in head[start:])]
        added = [now - before for now, before in zip(_log_errors(slowed), _log_errors(head), strict=True)]
        biases[start] = {
            name: statistics.fmean(added[start + low : start + high]) for name, (low, high) in windows.items()
        }
    return biases


def _log_errors(rows: list[Row]) -> list[float]:
    predictor = Predictor()
    running: list[tuple[int, int, Row, Prediction]] = []
    errors = []
    for index, row in enumerate(rows):
        while running and running[0][0] <= row.submitted_us:
            ended_us, _, done, made = heapq.heappop(running)
            predictor.observe(made.request, ended_us, done.run_us, prediction=made)
        prediction = predictor.predict(row.features(), row.submitted_us)
        errors.append(math.log(row.run_us / prediction.p50_us))
        heapq.heappush(running, (row.submitted_us + row.run_us, index, row, prediction))
    return errors


def part_speeds(rows: list[Row]) -> dict[str, float]:
    """Return medians in microseconds of the calls a scheduler makes, on a predictor that has learned 4,000 tasks."""
    predictor = Predictor()
    known = [row for row in rows if row.status == SUCCEED and row.run_us > 0][:5_000]
    now = known[-1].submitted_us
    for row in known[:4_000]:
        predictor.observe(row.features(), now, row.run_us)
    times: dict[str, list[float]] = {"predict": [], "observe": [], "another GPU model": [], "remaining": []}
    for row in known[4_000:]:
        features = row.features()
        marks = [time.perf_counter()]
        prediction = predictor.predict(features, now)
        marks.append(time.perf_counter())
        predictor.observe(prediction.request, now, row.run_us, prediction=prediction)
        marks.append(time.perf_counter())
        predictor.on(prediction, "a100", now)
        marks.append(time.perf_counter())
        predictor.remaining(prediction, 30 * SECOND)
        marks.append(time.perf_counter())
        for name, begun, ended in zip(times, marks, marks[1:], strict=False):
            times[name].append((ended - begun) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
