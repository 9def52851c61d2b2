"""The fidelity report as one page that needs no network and no other file."""

from __future__ import annotations

import io
import json
from importlib import resources
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from engine.tasks import SECOND
from sim.fidelity import FidelityReport, Observed

_STYLE = {"svg.hashsalt": "aigc", "svg.fonttype": "none", "font.size": 9.0, "axes.grid": True, "grid.color": "#e6e9ed"}


def write_html(report: FidelityReport, path: Path) -> None:
    """Write the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("sim").joinpath("fidelity.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=f"Simulator against real executors: {report.tasks} {report.workload} tasks on {report.nodes} nodes",
        report=report,
        svg=_tails(report),
        calibration=json.dumps(report.calibration.to_json(), indent=1),
    )
    path.write_text(page, encoding="utf-8")


def _tails(report: FidelityReport) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, run, colour in (("real", report.real, "#1c2330"), ("simulated", report.simulated, "#d1495b")):
            stays = _stays(run)
            axes.step(stays, 1 - np.arange(len(stays)) / len(stays), where="post", color=colour, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("completion, s")
        axes.set_ylabel("share of tasks")
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _stays(run: Observed) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.sort(np.array([task.finished - task.submitted for task in run.tasks]) / SECOND)
