# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Does the `aigc` profile beat `fifo` on GenTD26 at this load?
#
# Eight GPUs on two nodes serve the trace's requests eight times as fast as they came, which is more than they can serve at
# the peaks. Both profiles meet the same arrivals, run times and loads (common random numbers). Each seed draws anew which
# tenant a group belongs to and which tasks are urgent; the differences are taken seed by seed, so that the luck cancels.
#
# `AIGC_FULL=1` simulates the whole trace and five seeds; without it, a short case. `AIGC_TRACE` names the file
# `lora_request_trace.csv`; without the trace a synthetic workload like it is used.

# %%
import os
from pathlib import Path

from rich.console import Console

from sim.paired import compare_over_seeds, render_differences
from sim.simulate import SimulationConfig

full = os.environ.get("AIGC_FULL") == "1"
here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
trace = Path(os.environ.get("AIGC_TRACE", here.parents[1] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"))
profiles = ("fifo", "aigc")
seeds = 5 if full else 3

# %%
config = SimulationConfig(
    trace=trace if trace.exists() else None,
    nodes=2,
    gpus_per_node=4,
    rate_scale=8.0,
    limit=None if full else 1_000,
    synthetic_tasks=20_000,
    forecaster="online",
)
runs, differences = compare_over_seeds(config, profiles, seeds)

# %% [markdown]
# ## Waiting until the first start, in seconds

# %%
for run in runs:
    every, urgent = run.summary.waiting["all"], run.summary.waiting["priority urgent"]
    print(
        f"seed {run.config.seed}  {run.profile:5s}  all: mean {every.mean:6.1f}  p90 {every.p90:7.1f}  p99 {every.p99:7.1f}"
        f"   urgent: mean {urgent.mean:6.1f}  p90 {urgent.p90:7.1f}"
    )

# %% [markdown]
# ## The differences, seed by seed, with 95% intervals

# %%
Console(width=110).print(render_differences(differences, "fifo"))

# %% [markdown]
# ## The answer

# %%
found = {each.measure: each for each in differences}
assert found["mean waiting, s"].mean < 0, "tasks should wait less under aigc on average"
assert found["mean waiting of urgent tasks, s"].mean < 0, "urgent tasks should wait less under aigc"
assert found["started in a warm Pod, %"].mean > 0, "aigc should reuse warm Pods more often"
print("Yes: tasks wait less on average, urgent ones much less, and more of them find their model loaded.")
