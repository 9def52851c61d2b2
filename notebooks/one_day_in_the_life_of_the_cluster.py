# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What does one day in the life of the cluster look like?
#
# Sixteen GPUs on four nodes serve a day of requests that come in bursts. Two hours after noon a node dies and comes back. We look at the
# queue, at what the GPUs do, and at each node; then we ask whether anything was lost and who waited.
#
# `AIGC_FULL=1` simulates the whole day; without it, six hours with the failure in the third.

# %%
import os

import matplotlib.pyplot as plt

from engine.tasks import SECOND
from sim.faults import Fault, FaultKind
from sim.simulate import SimulationConfig, simulate
from sim.synthetic import SyntheticConfig

full = os.environ.get("AIGC_FULL") == "1"
hours = 24 if full else 6
hour_us = 3600 * SECOND
dies_at = (14 if full else 2) * hour_us
per_day = 18_000

# %%
config = SimulationConfig(
    synthetic=SyntheticConfig(tasks=per_day * hours // 24, per_day=per_day, seed=7),
    nodes=4,
    gpus_per_node=4,
    profile="aigc",
    forecaster="declared",
    faults=(Fault(dies_at, FaultKind.NODE_LOST, "node-1", repair_after_us=hour_us),),
)
result = simulate(config)
summary = result.summary
print(f"{summary.counts['submitted']} tasks in {result.simulated_s / 3600:.1f} h, simulated in {result.wall_s:.1f} s")

# %% [markdown]
# ## The queue, and the GPUs under it

# %%
figure, (above, below) = plt.subplots(2, 1, figsize=(10, 5), sharex=True, layout="constrained")
for place, name, label in ((above, "queue", "tasks waiting"), (below, "gpus", "GPUs there"), (below, "busy", "GPUs busy")):
    series = summary.series[name]
    place.plot([number * series.bin_s / 3600 for number in range(len(series.values))], series.values, label=label)
for place in (above, below):
    place.axvspan(dies_at / hour_us, dies_at / hour_us + 1, color="0.9", label="a node is down")
    place.legend(loc="upper left")
below.set_xlabel("hours")
plt.show()

# %% [markdown]
# ## Each node: the share of its GPUs that is busy

# %%
names = list(summary.heat)
longest = max(len(series.values) for series in summary.heat.values())
rows = [[*series.values, *[0.0] * (longest - len(series.values))] for series in summary.heat.values()]
figure, place = plt.subplots(figsize=(10, 2), layout="constrained")
width_h = longest * summary.heat[names[0]].bin_s / 3600
place.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=(0, width_h, len(names), 0))
place.set_yticks([number + 0.5 for number in range(len(names))], names)
place.set_xlabel("hours")
plt.show()

# %% [markdown]
# ## Who waited

# %%
for name, spread in summary.waiting.items():
    print(f"{name:20s} {spread.count:6d} tasks  p50 {spread.p50:7.1f}  p90 {spread.p90:7.1f}  p99 {spread.p99:7.1f} s")
print("ends:", summary.ends, " failures:", summary.failures)

# %% [markdown]
# ## The answer

# %%
urgent, ordinary = summary.waiting["priority urgent"], summary.waiting["priority ordinary"]
assert result.world["node_failures"] == 1
assert summary.counts["nodes_lost"] == 1, "the scheduler should have noticed"
assert summary.ends["open"] == 0, "nothing may be lost, whatever breaks"
assert max(summary.series["gpus"].values) <= 16
assert min(summary.series["gpus"].values[1:-1]) < 16, "the failure should show"
assert urgent.p99 < max(1.0, ordinary.p99), "urgent tasks should wait less than ordinary ones"
print(f"Bursts fill the queue, a node's death costs GPUs for an hour and no task; urgent p99 is {urgent.p99:.0f} s.")
