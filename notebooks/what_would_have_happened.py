# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # What would have happened with one node more, or under another policy?
#
# A journal holds every fact that the scheduler was told and every order that it gave. So a run can be decided again, to the byte, and
# it can be left at any moment for another future. We record a busy morning, replay it, and go on from its middle in three ways.
#
# `AIGC_FULL=1` takes a longer morning and more seeds; without it, a short case.

# %%
import os

import matplotlib.pyplot as plt

from engine import profiles
from engine.journal import MemoryJournal
from engine.replay import replay
from engine.tasks import SECOND
from sim.fork import Change, Fork, Pool, run_forward
from sim.metrics import Metrics
from sim.simulate import SimulationConfig, simulate

full = os.environ.get("AIGC_FULL") == "1"
seeds = range(5 if full else 2)
hour_us = 3600 * SECOND

# %%
journal = MemoryJournal()
config = SimulationConfig(
    synthetic_tasks=3_000 if full else 600, nodes=2, gpus_per_node=2, rate_scale=16, profile="fifo", forecaster="online"
)
recorded = simulate(config, journal=journal)
records = list(journal.records)
print(f"{len(records)} steps over {recorded.simulated_s / 3600:.1f} h")

# %% [markdown]
# ## Replay: the same decisions, and the first one that another policy takes

# %%
same = replay(records, profiles.load("fifo"))
other = replay(records, profiles.load("aigc"))
print("fifo again:", "every order came out as recorded" if same.same else same.difference)
print("aigc:", other.difference)

# %% [markdown]
# ## What if: three futures from the middle of the morning

# %%
middle = records[len(records) // 2].now
fork = Fork.of(None, records, at=middle)
futures = {
    "as it was": Change(profiles.load("fifo")),
    "one node more": Change(profiles.load("fifo"), add=(Pool(1, "a100", 2),)),
    "aigc": Change(profiles.load("aigc")),
}
waits = {}
for name, change in futures.items():
    waits[name] = []
    for seed in seeds:
        metrics = Metrics()
        run_forward(fork, change, metrics, seed=seed, window_us=middle, horizon_us=hour_us)
        waits[name].append(metrics.summary().waiting["all"].mean)
    print(f"{name:14s} mean waiting {sum(waits[name]) / len(seeds):8.1f} s")

# %%
figure, place = plt.subplots(figsize=(7, 3), layout="constrained")
for name, found in waits.items():
    place.scatter([name] * len(found), found)
place.set_ylabel("mean seconds waiting, by seed")
plt.show()

# %% [markdown]
# ## The answer

# %%
mean = {name: sum(found) / len(found) for name, found in waits.items()}
assert same.same, "the recorded policy should decide everything as recorded"
assert other.difference is not None, "another policy should decide something differently"
assert mean["one node more"] < mean["as it was"], "a node more should shorten the waiting"
print({name: f"{value:.0f} s" for name, value in mean.items()})
