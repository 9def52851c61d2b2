# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Which policy serves a shared cluster best: the first come, the shortest, the fairest, or all at once?
#
# The same requests go through several profiles of the same engine. Each seed makes a workload of its own, and every profile meets it;
# differences are taken seed by seed, so that most of the luck cancels. Run times are guessed as well as people guess them.
#
# `AIGC_FULL=1` takes more tasks and ten seeds; without it, a short case.

# %%
import os

import matplotlib.pyplot as plt
from rich.console import Console

from sim.simulate import SimulationConfig
from sim.sweep import grid, run_sweep
from sim.sweep_table import render, rows_of

full = os.environ.get("AIGC_FULL") == "1"
profiles = ["fifo", "priority", "sjf", "fair-share", "aigc"]
seeds = list(range(10 if full else 3))

# %%
base = SimulationConfig(
    synthetic_tasks=4_000 if full else 500, nodes=2, gpus_per_node=4, rate_scale=30, forecaster="declared"
)
records = run_sweep(grid(base, {"profile": profiles, "seed": seeds}), jobs=1)
rows = {dict(row.point)["profile"]: row for row in rows_of(records, {"profile": "fifo"})}
Console(width=150).print(render(list(rows.values())))

# %% [markdown]
# ## What each is good at

# %%
shown = ["mean waiting, s", "p99 waiting of urgent, s", "longest waiting of ordinary, s", "model loads per task"]
figure, places = plt.subplots(1, len(shown), figsize=(13, 3), layout="constrained")
for place, name in zip(places, shown, strict=True):
    found = [rows[profile].figures[name] for profile in profiles]
    place.bar(profiles, [each.mean for each in found], yerr=[each.half_width for each in found], capsize=3)
    place.set_title(name, fontsize=9)
    place.tick_params(axis="x", rotation=60)
plt.show()

# %% [markdown]
# ## The differences from `fifo`, seed by seed

# %%
gaps = {profile: {each.measure: each for each in rows[profile].differences} for profile in profiles[1:]}
for profile, found in gaps.items():
    for name in shown:
        each = found[name]
        print(f"{profile:12s} {name:32s} {each.mean:+9.2f} ± {each.half_width:8.2f}  {'clear' if each.clear else 'may be luck'}")

# %% [markdown]
# ## The answer

# %%
mean = {profile: {name: rows[profile].figures[name].mean for name in shown} for profile in profiles}
assert len({record.workload_digest for record in records}) == len(seeds), "every profile should meet the same requests"
assert mean["sjf"]["mean waiting, s"] < mean["fifo"]["mean waiting, s"], "the shortest first should lower the mean"
assert mean["priority"]["p99 waiting of urgent, s"] < mean["fifo"]["p99 waiting of urgent, s"]
assert mean["aigc"]["p99 waiting of urgent, s"] < mean["fifo"]["p99 waiting of urgent, s"]
assert mean["aigc"]["mean waiting, s"] < mean["fifo"]["mean waiting, s"]
print("Each classic is good at one thing; aigc keeps urgent work quick without making the others wait longer than fifo does.")
