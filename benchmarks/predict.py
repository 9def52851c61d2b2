"""Prints the predictor's report card, its speed, how it follows drifts and predicts loads, and the machine that was measured on.

python -m benchmarks.predict [--trace lora_request_trace.csv] [--json FILE]
"""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import json
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

# Beside this file lies an `engine.py`: as a script, its own folder must not come before the packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402

from benchmarks.machine import machine_line  # noqa: E402
from engine.tasks import SECOND  # noqa: E402
from predictors.challenger import ChallengerSettings  # noqa: E402
from predictors.duration import DurationSettings  # noqa: E402
from predictors.features import read_request  # noqa: E402
from predictors.gentd26 import SUCCEED, Row, read_rows  # noqa: E402
from predictors.loads import LoadTimes  # noqa: E402
from predictors.predictor import Prediction, Predictor  # noqa: E402
from predictors.report import report  # noqa: E402
from predictors.trees import fit  # noqa: E402

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
    of_model = model_drift([row for row in rows if row.status == SUCCEED and row.run_us > 0])
    print(
        f"\nrun times of one model alone x {DRIFT_FACTOR}: the same over its own requests, and over those of the others"
    )
    for model, biases in of_model.items():
        print(f"  {model}: " + ", ".join(f"{window} {bias:+.3f}" for window, bias in biases.items()))
    loads = load_scores(arguments.trace.parent)
    print(
        "\nload times, last 70% of the published monitoring: "
        + ("; ".join(loads.values()) or "the files are not there")
    )
    parts = part_speeds(rows)
    print("\nmedian CPU time of one call: " + ", ".join(f"{name} {us:.1f} us" for name, us in parts.items()))
    print(machine_line())
    if arguments.json is not None:
        figures = {
            "card": card.to_json(),
            "drift": drift,
            "drift_of_model": of_model,
            "loads": loads,
            "parts_us": parts,
            "machine": machine_line(),
        }
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


def model_drift(rows: list[Row], start: int = 6_000, models: int = 3) -> dict[str, dict[str, float]]:
    """Return the same for models that alone become slower: the busiest after the first."""
    windows = {"1-20": (0, 20), "21-50": (20, 50), "51-80": (50, 80), "81-200": (80, 200), "201-300": (200, 300)}
    tail = rows[start:14_000]
    biases = {}
    for model, _ in Counter(row.model for row in tail).most_common(1 + models)[1:]:
        own = [place for place, row in enumerate(tail) if row.model == model][:300]
        if len(own) < 300:
            continue
        head = rows[: start + own[-1] + 1]
        slowed = [
            replace(row, run_us=round(row.run_us * DRIFT_FACTOR)) if place >= start and row.model == model else row
            for place, row in enumerate(head)
        ]
        added = [now - before for now, before in zip(_log_errors(slowed), _log_errors(head), strict=True)][start:]
        mine = [added[place] for place in own]
        biases[model] = {name: statistics.fmean(mine[low:high]) for name, (low, high) in windows.items()}
        others = [off for off, row in zip(added, tail, strict=False) if row.model != model]
        biases[model]["others"] = statistics.fmean(others)
    return biases


def load_scores(folder: Path) -> dict[str, str]:
    """Return how well loads of base models and adapters are predicted from their holders alone, in words."""
    said = {}
    for kind, name in (("base model", "basemodel_update_latency_anon"), ("LoRA", "lora_update_latency_anon")):
        path = folder / f"{name}.csv.gz"
        if not path.exists():
            continue
        with gzip.open(path, "rt") as file:
            fields = [(float(r["timestamp_anon"]), float(r["value"]), r["container_ip"]) for r in csv.DictReader(file)]
        loads, truth, predicted, held = LoadTimes(), [], [], []
        for at_s, load_ms, holder in sorted(fields):
            if load_ms <= 0:
                continue
            now, load_us = round(at_s * SECOND), round(load_ms * 1000)
            found = loads.predict(now, kind=kind, holder=holder)
            truth.append(math.log(load_us))
            predicted.append(math.log(found.p50_us))
            held.append(load_us <= found.p90_us)
            loads.observe(now, load_us, kind=kind, holder=holder)
        begin = len(truth) * 3 // 10
        mean = statistics.fmean(truth[begin:])
        missed = sum((true - guess) ** 2 for true, guess in zip(truth[begin:], predicted[begin:], strict=True))
        r2 = 1.0 - missed / sum((true - mean) ** 2 for true in truth[begin:])
        said[kind] = f"{kind} R2 of the log {r2:.2f}, P90 holds for {100 * statistics.fmean(held[begin:]):.1f} %"
    return said


def _log_errors(rows: list[Row]) -> list[float]:
    predictor = Predictor(DurationSettings(challenger=ChallengerSettings(refit_every=0)))
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
    """Return medians in microseconds of CPU time of the calls a scheduler makes, on a predictor that has learned 4,000 tasks.

    Trees are there and serve. A refit, at every thousandth label, is not among the medians: production does it beside the path.
    """
    predictor = Predictor(DurationSettings(challenger=ChallengerSettings(margin=9.0)))  # Who serves is not judged here.
    known = [row for row in rows if row.status == SUCCEED and row.run_us > 0][:4_900]
    for row in known[:4_000]:
        made = predictor.predict(row.features(), row.submitted_us)
        predictor.observe(made.request, row.submitted_us, row.run_us, prediction=made)
    predictor.methods["text_to_image"].challenger.serving = True
    now = known[3_999].submitted_us
    times: dict[str, list[float]] = {"predict": [], "observe": [], "another GPU model": [], "remaining": []}
    for row in known[4_000:]:
        features = row.features()
        marks = [time.process_time_ns()]
        prediction = predictor.predict(features, now)
        marks.append(time.process_time_ns())
        predictor.observe(prediction.request, now, row.run_us, prediction=prediction)
        marks.append(time.process_time_ns())
        predictor.on(prediction, "a100", now)
        marks.append(time.process_time_ns())
        predictor.remaining(prediction, 30 * SECOND)
        marks.append(time.process_time_ns())
        for name, begun, ended in zip(times, marks, marks[1:], strict=False):
            times[name].append((ended - begun) / 1e3)
    found = {name: statistics.median(values) for name, values in times.items()}
    waiting = [read_request(row.features()) for row in rows[:10_000]]
    begun = time.process_time_ns()
    predictor.predict_many(waiting, now)
    found["each of 10,000 at once"] = (time.process_time_ns() - begun) / 1e3 / len(waiting)
    challenger = predictor.methods["text_to_image"].challenger
    begun = time.process_time_ns()
    fit(np.stack(challenger.rows), np.array(challenger.targets), ())
    found["a refit to 4,900 labels"] = (time.process_time_ns() - begun) / 1e3
    return found


if __name__ == "__main__":
    main()
