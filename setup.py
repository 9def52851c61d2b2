"""Builds the hot modules as native extensions when asked: ``AIGC_COMPILE=1 pip install --no-build-isolation .``

The same typed Python files are compiled by mypyc (it comes with mypy; a C compiler is needed), so there is one source and no second
implementation to keep. Without the variable the packages stay pure Python. Everything else about the build is in pyproject.toml.
"""

import os

from setuptools import setup

COMPILED = """
engine/asked.py engine/backlog.py engine/cluster.py engine/entities.py engine/fit.py engine/fold_commands.py
engine/fold_events.py engine/fold_tasks.py engine/idle.py engine/kinds.py engine/lifecycle.py engine/lines.py
engine/making.py engine/ports.py engine/scheduler.py engine/state.py engine/states.py engine/timers.py engine/turn.py
engine/levels/admission.py engine/levels/binding.py engine/levels/choice.py engine/levels/creation.py
engine/levels/elasticity.py engine/levels/fleet.py engine/levels/models.py engine/levels/near.py
engine/levels/preemption.py engine/levels/reactions.py engine/levels/room.py engine/levels/sharing.py
engine/levels/urgent_slots.py engine/levels/victims.py engine/levels/waiting.py
sim/attempts.py sim/caches.py sim/coverage.py sim/draws.py sim/due.py sim/gpu_ledger.py sim/maker.py sim/metrics.py
sim/open_tasks.py sim/parts.py sim/pump.py sim/shares.py sim/sketches.py sim/world.py
sim/jobs/core.py sim/jobs/line.py sim/jobs/nodes.py sim/jobs/processors.py sim/jobs/promise.py
""".split()  # noqa: SIM905 - a list of files reads better as text


def extensions() -> list[object]:
    """Return the native modules to build, none unless asked."""
    if os.environ.get("AIGC_COMPILE", "0") in {"", "0"}:
        return []
    from mypyc.build import mypycify

    return list(mypycify(["--config-file", "mypyc.ini", *COMPILED], opt_level="3", debug_level="0"))


setup(ext_modules=extensions())
