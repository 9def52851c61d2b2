# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # How many GPUs do I need?
#
# Nine tasks in ten should start within two minutes. The planner looks for the fewest GPUs that keep this: it simulates clusters of
# different sizes on the same requests with several seeds, until it is clear which sizes hold and which do not.
#
# `AIGC_FULL=1` plans for more tasks and looks at what the answer depends on; without it, a short case.

# %%
import os

import matplotlib.pyplot as plt

from sim.planner import PlanRequest, plan
from sim.planner.objectives import parse
from sim.prices import Price
from sim.simulate import SimulationConfig

full = os.environ.get("AIGC_FULL") == "1"

# %%
request = PlanRequest(
    base=SimulationConfig(
        synthetic_tasks=5_000 if full else 400, gpus_per_node=4, rate_scale=12, profile="aigc", forecaster="declared"
    ),
    objectives=(parse("p90_wait<120s"),),
    offers=(Price("a100", 1.8),),
    seeds=5 if full else 3,
    mixes=0,
    sensitivity=full,
)
answer = plan(request, jobs=1)
print(answer.sentence())

# %% [markdown]
# ## Cost against waiting

# %%
points = sorted((sum(count for _, count in trial.pool), answer.value(trial)) for trial in answer.curve)
figure, place = plt.subplots(figsize=(7, 3), layout="constrained")
place.plot([gpus for gpus, _ in points], [value for _, value in points], marker="o")
place.axhline(120, color="0.6", linestyle="--", label="what was promised")
place.set_xlabel("GPUs")
place.set_ylabel("p90 of waiting, s")
place.set_yscale("symlog")
place.legend()
plt.show()

# %% [markdown]
# ## The answer

# %%
assert answer.answer is not None, "some size should do"
assert answer.value(answer.answer) < 120, "the answer should keep the promise"
if answer.below is not None:
    assert answer.value(answer.below) > answer.value(answer.answer), "one GPU less should be slower"
assert answer.load < 1, "no cluster can be smaller than its work"
print(f"{sum(count for _, count in answer.answer.pool)} GPUs; the work alone would keep {answer.load:.0%} of them busy.")
