# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # How well do predicted P90s hold?
#
# The forecaster stamps each task when it is submitted, before anything is known of its run, and learns only from tasks that
# have finished by then. A P90 is honest when nine run times in ten stay within it: over all, late in the run, and for rare models
# as for popular ones.
#
# `AIGC_FULL=1` takes the whole trace; without it, a short case. `AIGC_TRACE` names `lora_request_trace.csv`; without
# the trace a synthetic workload like it is used.

# %%
import os
from collections import Counter
from pathlib import Path

from engine.events import TaskFinished, TaskSubmitted
from sim.simulate import SimulationConfig, simulate

full = os.environ.get("AIGC_FULL") == "1"
here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
trace = Path(os.environ.get("AIGC_TRACE", here.parents[1] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"))

# %%
stamped, outcomes = {}, []


def watch(now, events, commands):
    """Keep what was promised and what came true, in the order of finishing."""
    for event in events:
        if isinstance(event, TaskSubmitted):
            stamped[event.task.req_no] = (event.task.model, event.estimate.duration("a100"))
        elif isinstance(event, TaskFinished):
            model, promised = stamped.pop(event.req_no)
            outcomes.append((model, promised, event.run_us))


config = SimulationConfig(
    trace=trace if trace.exists() else None,
    nodes=8,
    gpus_per_node=8,
    limit=None if full else 2_000,
    synthetic_tasks=20_000,
    forecaster="online",
)
result = simulate(config, journal=watch)


# %%
def within(rows, quantile="p90"):
    """Return the share of run times that stayed within their promised quantile."""
    return sum(run_us <= getattr(promised, quantile) for _, promised, run_us in rows) / len(rows)


late = outcomes[len(outcomes) // 2 :]
popular = {model for model, _ in Counter(model for model, _, _ in outcomes).most_common(3)}
parts = {
    "all": outcomes,
    "second half": late,
    "three most used models": [row for row in outcomes if row[0] in popular],
    "all other models": [row for row in outcomes if row[0] not in popular],
}
for name, rows in parts.items():
    shares = "  ".join(f"{quantile} {within(rows, quantile):.1%}" for quantile in ("p50", "p90", "p99"))
    print(f"{name:24s}{len(rows):>7,} tasks   within {shares}")

# %% [markdown]
# ## By tenths of the run: does it hold while models, users and load drift?

# %%
step = max(1, len(outcomes) // 10)
tenths = [within(outcomes[at : at + step]) for at in range(0, step * 10, step)]
print("  ".join(f"{share:.0%}" for share in tenths))

# %% [markdown]
# ## The answer

# %%
assert abs(within(outcomes) - 0.90) < 0.03, "P90s should hold for 87 to 93% of the tasks"
assert abs(within(late) - 0.90) < 0.04
assert all(within(rows) > 0.82 for rows in parts.values()), "neither rare nor popular models should be promised too much"
assert abs(result.summary.coverage["within_p90"] - within(outcomes)) < 0.02, "the metrics should tell the same"
print(f"Well: {within(outcomes):.1%} of the run times stayed within their P90.")
