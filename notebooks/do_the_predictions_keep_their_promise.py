# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Do the predictions keep their promise?
#
# A predicted P90 is a promise: nine run times in ten stay below it, on every day, for every model, and soon after everything became
# slower at once. The trace is replayed in time order, and a run time is learned only when its request had ended.
#
# `AIGC_FULL=1` takes the whole trace; without it, a short case. `AIGC_TRACE` names `lora_request_trace.csv`; without the trace,
# requests are made up: models, users and steps matter, the rest is noise.

# %%
import math
import os
import random
from pathlib import Path

from engine.tasks import SECOND
from predictors.gentd26 import SUCCEED, Row, read_rows
from predictors.report import report_with_figures

full = os.environ.get("AIGC_FULL") == "1"
here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
trace = Path(os.environ.get("AIGC_TRACE", here.parents[1] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"))


def made_up(count):
    """Return requests every 40 s on average, of some models and many users."""
    rng = random.Random(1)
    users = [rng.gauss(0, 0.25) for _ in range(80)]
    models = [rng.gauss(0, 0.5) for _ in range(8)]
    rows, now = [], 0
    for _ in range(count):
        now += round(rng.expovariate(1 / 40) * SECOND)
        user, model, steps = rng.randrange(80), rng.randrange(8), rng.choice([20, 30, 50])
        log_s = 2.7 + users[user] + models[model] + 0.3 * math.log(steps / 30) + rng.gauss(0, 0.3)
        run_us = round(math.exp(log_s) * SECOND)
        rows.append(Row(now, run_us, SUCCEED, f"G{user}", f"M{model}", "TXT_2_IMG", 1.0, float(steps), 0, 60.0))
    return rows


rows = read_rows(trace) if trace.exists() else made_up(20_000)
rows = rows if full else rows[:3_500]
card, figures = report_with_figures(rows)
print(card.table())

# %% [markdown]
# ## What the pictures show
#
# The same pictures come as a page: `aigc predict report --trace lora_request_trace.csv --html card.html`.

# %%
from sim.prediction_page import pictures  # noqa: E402

plots = pictures(card, figures)
for plot in plots:
    print(f"{plot.heading:45s}{len(plot.svg):>8,} bytes of SVG")

if "get_ipython" in globals():
    from IPython.display import SVG, display

    for plot in plots:
        display(SVG(plot.svg))

# %% [markdown]
# ## By day, by history, after a shift

# %%
for group in (*figures.days, *figures.history):
    if group.requests:
        print(
            f"{group.name:12s}{group.requests:>7,}   inside {group.within_90:5.1f}%   median error {group.medape:5.1f}%"
        )
settled = [added for place, added in figures.drift if place >= 350]
print(f"after all run times grew by half: {sum(settled) / len(settled):+.3f} log error from the 350th request on")

# %% [markdown]
# ## What the forecast of demand is for
#
# A fleet sized by it, on the same requests several times over, against what they need. On the page: `--fleet`.

# %%
import csv  # noqa: E402
import tempfile  # noqa: E402
from datetime import UTC, datetime  # noqa: E402

from sim.study.elasticity import follow  # noqa: E402
from sim.study.elasticity_report import fleet_picture  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "lora_request_trace.csv"
    with copy.open("w", newline="") as file:
        table = csv.writer(file)
        names = (
            "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,num_inference_steps,num_images_per_prompt"
        )
        table.writerow([*names.split(","), "checkpoint_model_version_id", "num_lora"])
        for row in rows[-2_000:]:
            came = datetime.fromtimestamp(row.submitted_us / SECOND, UTC).strftime("%Y-%m-%d %H:%M:%S")
            table.writerow(
                [
                    came,
                    row.kind,
                    row.status,
                    row.run_us // SECOND,
                    row.user,
                    row.steps,
                    row.images,
                    row.model,
                    row.loras,
                ]
            )
    fleet = follow(copy, hours=6.0 if full else 2.0, warm_days=1)
plot = fleet_picture(fleet)
if "get_ipython" in globals():
    display(SVG(plot.svg))
(sized,) = fleet.runs
busy = sum(sized.used) / len(sized.used)
print(
    f"{busy:.1f} GPUs in use on average, {max(sized.used):.1f} at most; p99 waiting {sized.p99_waiting_s:.0f} s, "
    f"{sized.gpu_hours:.0f} GPU-hours"
)

# %% [markdown]
# ## The answer

# %%
calibration = card.calibration
worst = max(abs(below - level) for level, below in zip(figures.levels, figures.below, strict=True))
assert calibration.crossings == 0
assert abs(calibration.within_90 - 90) < (1 if full else 3), "the central 90% interval should hold for nine in ten"
assert worst < 0.05, "no quantile should be off by more than five points"
assert abs(sum(settled) / len(settled)) < 0.08, "a shift of everything should be followed"
assert max(gpus for _, gpus in sized.sizes) > min(gpus for _, gpus in sized.sizes), "the fleet should follow the demand"
assert sized.unfinished == 0
assert figures.memory.exceed[7] < figures.memory.exceed_unlearned[7], "measured peaks should make limits tighter"
print(
    f"Yes: {calibration.within_90:.1f}% lay inside the 90% interval, and no quantile was off by more than {100 * worst:.1f} points."
)
