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
import math
import os
from pathlib import Path

from sim.simulate import SimulationConfig, compare

full = os.environ.get("AIGC_FULL") == "1"
here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
trace = Path(os.environ.get("AIGC_TRACE", here.parents[1] / "shared" / "traces" / "gentd26" / "lora_request_trace.csv"))
profiles = ("fifo", "aigc")
seeds = range(5) if full else range(2)

# %%
runs = {}
for seed in seeds:
    config = SimulationConfig(
        trace=trace if trace.exists() else None,
        nodes=2,
        gpus_per_node=4,
        rate_scale=8.0,
        limit=None if full else 1_200,
        synthetic_tasks=20_000,
        forecaster="online",
        seed=seed,
    )
    for result in compare(config, profiles):
        runs[seed, result.profile] = result.summary

# %% [markdown]
# ## Waiting until the first start, in seconds

# %%
for seed in seeds:
    for profile in profiles:
        waiting = runs[seed, profile].waiting
        every, urgent = waiting["all"], waiting["priority urgent"]
        print(
            f"seed {seed}  {profile:5s}  all: mean {every.mean:6.1f}  p90 {every.p90:7.1f}  p99 {every.p99:7.1f}"
            f"   urgent: mean {urgent.mean:6.1f}  p90 {urgent.p90:7.1f}"
        )

# %% [markdown]
# ## The difference, seed by seed


# %%
def paired(measure):
    """Return the mean of fifo - aigc over seeds and its 95% half-width (normal approximation)."""
    gains = [measure(runs[seed, "fifo"]) - measure(runs[seed, "aigc"]) for seed in seeds]
    mean = sum(gains) / len(gains)
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1))
    return mean, 1.96 * spread / math.sqrt(len(gains))


mean_gain, mean_width = paired(lambda summary: summary.waiting["all"].mean)
urgent_gain, urgent_width = paired(lambda summary: summary.waiting["priority urgent"].mean)
warm_gain, _ = paired(lambda summary: -summary.fairness["warm_starts"])
print(f"a task waits {mean_gain:.1f} s less (+- {mean_width:.1f}) on average, an urgent one {urgent_gain:.1f} s (+- {urgent_width:.1f})")
print(f"{warm_gain:.1%} more of the tasks start in a warm Pod")

# %% [markdown]
# ## The answer

# %%
assert urgent_gain > 0, "urgent tasks should wait less under aigc"
assert mean_gain > 0, "tasks should wait less under aigc on average"
assert warm_gain > 0, "aigc should reuse warm Pods more often"
print("Yes: tasks wait less on average, urgent ones much less, and more of them find their model loaded.")
