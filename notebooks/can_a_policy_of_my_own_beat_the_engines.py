# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Can a policy of my own beat the engine's on a question of my own, in one small file?
#
# Suppose that small requests are worth more: whoever asks for one picture should not wait behind an order for eight. No profile does
# that. We write an ordering that ranks by the number of pictures, name it in TOML, and hold it against first come, first served.
#
# `AIGC_FULL=1` takes more tasks; without it, a short case.

# %%
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from engine.events import TaskStarted, TaskSubmitted
from sim.simulate import SimulationConfig, simulate

full = os.environ.get("AIGC_FULL") == "1"
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The policy: one file
#
# A task is ranked once, when it enters a line; the smaller key goes first, and equal keys go by submission. A day of waiting outweighs
# everything, so that large orders do not starve.

# %%
(folder / "few_pictures.py").write_text(
    '''"""Few pictures first."""

from dataclasses import dataclass

from engine.levels.ordering import Policy


@dataclass(frozen=True, slots=True)
class FewPicturesFirst(Policy):
    def key(self, task, now):
        return next((int(value) for name, value in task.spec.features if name == "images"), 1)
'''
)
(folder / "few_pictures.toml").write_text(
    """name = "few-pictures"

[ordering]
policy = "few_pictures:FewPicturesFirst"
age_s = 86400

[placement]
group_affinity = true

[binding]
warm_reuse = true
"""
)
sys.path.insert(0, str(folder))

# %% [markdown]
# ## The comparison
#
# We need waiting by number of pictures, which no table has: a journal of our own listens to every step.


# %%
def waits_of(profile):
    """Return seconds until the first start, by number of pictures."""
    came, waited = {}, {}

    def watch(now, events, commands):
        for event in events:
            if isinstance(event, TaskSubmitted):
                came[event.task.req_no] = (now, dict(event.task.features)["images"])
            elif isinstance(event, TaskStarted) and event.req_no in came:
                at, images = came.pop(event.req_no)
                waited.setdefault(images, []).append((now - at) / 1e6)

    config = SimulationConfig(
        synthetic_tasks=4_000 if full else 800, nodes=1, gpus_per_node=4, rate_scale=25, profile=profile, forecaster="none"
    )
    simulate(config, journal=watch)
    return {images: sum(waits) / len(waits) for images, waits in sorted(waited.items())}


first_come, ours = waits_of("fifo"), waits_of(str(folder / "few_pictures.toml"))
for images in first_come:
    print(f"{images} pictures: fifo {first_come[images]:8.1f} s, few pictures first {ours[images]:8.1f} s")

# %%
figure, place = plt.subplots(figsize=(7, 3), layout="constrained")
places = range(len(first_come))
place.bar([x - 0.2 for x in places], first_come.values(), 0.4, label="fifo")
place.bar([x + 0.2 for x in places], ours.values(), 0.4, label="few pictures first")
place.set_xticks(list(places), [f"{images}" for images in first_come])
place.set_xlabel("pictures")
place.set_ylabel("mean seconds waiting")
place.legend()
plt.show()

# %% [markdown]
# ## The answer

# %%
smallest, largest = min(first_come), max(first_come)
assert ours[smallest] < first_come[smallest], "small requests should wait less"
assert ours[smallest] < ours[largest], "and less than large ones"
print(f"Yes: a request for {smallest} picture waits {ours[smallest]:.0f} s instead of {first_come[smallest]:.0f} s.")
