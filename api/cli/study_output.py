"""What all studies have in common: where their inputs lie, and how their answers are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from api.cli.output import Exit, err, fail, out, print_json


def load_times_of(trace: Path, folder: Path | None) -> Path | None:
    """Return the folder of the monitoring files: the one given, else the trace's if they are there; fails without a trace."""
    from sim import measured_loads

    if not trace.is_file():
        fail(f"--trace: {trace} does not exist; give the path of lora_request_trace.csv", Exit.UNREACHABLE)
    folder = folder or (trace.parent if measured_loads.present(trace.parent) else None)
    if folder is None:
        err.print("no monitoring files beside the trace: load times are worked out from bytes and bandwidths")
    return folder


def tell(
    study: Any, report: Any, *, html: Path | None, output: Path | None, as_json: bool, remarks: Sequence[str] = ()
) -> None:
    """Write a study's files, then print it by its `report` module; raises ValueError where a file cannot be written."""
    from sim import sweep_table

    values = report.json_values(study) if as_json or output else {}
    if output is not None:
        sweep_table.write(output, json.dumps(values, indent=2) + "\n")
        err.print(f"result written to {output}", soft_wrap=True)
    if html is not None:
        report.write_html(study, html)
        err.print(f"report written to {html}", soft_wrap=True)
    if as_json:
        print_json(values)
        return
    for table in report.render(study):
        out.print(table)
    for line in (*remarks, report.answer(study)):
        out.print(line, markup=False, soft_wrap=True)
