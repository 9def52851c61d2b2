"""`aigc jobs`: list, show, why, cancel, watch."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from api.cli.client import GatewayClient
from api.cli.options import DEFAULT_STATE, Json, Key, State, Url
from api.cli.output import Exit, err, fail, out, print_facts, print_json, print_rows

app = typer.Typer(no_args_is_help=True, help="Jobs: list, show, why, quote, cancel, watch.")

COLUMNS = (
    "req_no",
    "task_type",
    "method",
    "model",
    "group",
    "priority",
    "state",
    "node",
    "progress",
    "waited_s",
    "ran_s",
    "place",
    "done_in_s",
)
TERMINAL = {"finished", "cancelled", "rejected", "dead"}
ReqNo = Annotated[str, typer.Argument(help="The job's reqNo.")]


@app.command("list")
def list_jobs(
    state: Annotated[str, typer.Option(help="Only jobs in this state.")] = "",
    group: Annotated[str, typer.Option(help="Only jobs of this group.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most, newest first.")] = 50,
    url: Url = "",
    key: Key = "",
    state_dir: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    client = GatewayClient(url, key, state_dir)
    jobs: list[dict[str, Any]] = []
    cursor = ""
    while len(jobs) < limit:
        wanted = {"limit": min(100, limit - len(jobs)), "state": state, "group": group, "cursor": cursor}
        page = client.request("GET", "/v1/jobs", params={name: value for name, value in wanted.items() if value})
        jobs.extend(page["data"])
        cursor = page.get("next_cursor") or ""
        if not cursor:
            break
    print_rows(jobs if as_json else [row(job) for job in jobs], COLUMNS, as_json)


@app.command()
def show(req_no: ReqNo, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Show one job with its parameters and result."""
    print_facts(GatewayClient(url, key, state_dir).request("GET", f"/v1/jobs/{req_no}"), as_json)


@app.command()
def why(req_no: ReqNo, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Say every reason that keeps a job waiting, with what is missing."""
    answer = GatewayClient(url, key, state_dir).request("GET", f"/v1/jobs/{req_no}/why")
    if as_json:
        print_json(answer)
        return
    blockers = answer["data"] if isinstance(answer, dict) else answer
    if not blockers:
        out.print("nothing keeps it waiting")
    for blocker in blockers:
        missing = ", ".join(f"{name}={value}" for name, value in (blocker.get("missing") or {}).items())
        out.print(
            f"{blocker['reason']}: {blocker.get('message', '')}" + (f" ({missing})" if missing else ""), markup=False
        )


@app.command()
def quote(
    prompt: Annotated[str, typer.Argument(help="The prompt; leave it out for another method.")] = "",
    method: Annotated[str, typer.Option(help="AI method.")] = "text_to_image",
    model: Annotated[str, typer.Option(help="Model id; empty: the default.")] = "",
    parameters: Annotated[str, typer.Option(help="The method's parameters as a JSON object.")] = "{}",
    priority: Annotated[int, typer.Option(min=-1000, max=1000, help="100 and above is urgent.")] = 0,
    group: Annotated[str, typer.Option(help="The job's group.")] = "",
    url: Url = "",
    key: Key = "",
    state_dir: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Say when a job would be done if it were submitted now, and what it would cost. Nothing is submitted."""
    try:
        given = json.loads(parameters)
    except ValueError as error:
        fail(f"--parameters: no JSON ({error}); write an object such as '{{\"steps\": 20}}'", Exit.USAGE)
    if not isinstance(given, dict):
        fail("--parameters: write a JSON object, such as '{\"steps\": 20}'", Exit.USAGE)
    if prompt:
        given = {"prompt": prompt, **given}
    body = {"method": method, "model": model, "parameters": given, "priority": priority, "group": group}
    found = GatewayClient(url, key, state_dir).request("POST", "/v1/quotes", json=body)
    if as_json:
        print_json(found)
        return
    now = time.time()
    if not found["finish_at"]:
        out.print(f"nobody can say: {found['reason']}", markup=False)
        return
    for name, at in (("starts", found["start_at"]), ("is done", found["finish_at"])):
        out.print(
            f"{name} in about {seconds_text(at['p50'] - now)}, 90%: {seconds_text(at['p90'] - now)}", markup=False
        )
    place = found["queue_position"]
    out.print(f"place {place} of {found['waiting'] + 1}" if place else "a place is free", markup=False)
    if found["cost"]:
        out.print(f"costs about {found['cost']['expected']:.4f} {found['cost']['currency']}", markup=False)
    for other in found["alternatives"]:
        done = other.get("finish_at")
        when = f": done in about {seconds_text(done['p50'] - now)}" if done else ""
        out.print(f"or {other['kind'].replace('_', ' ')} {json.dumps(other['change'])}{when}", markup=False)


@app.command()
def cancel(
    req_no: ReqNo, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Cancel a job; returns when it is certain. Exit code 1 when the result came first."""
    job = GatewayClient(url, key, state_dir).request("POST", f"/v1/jobs/{req_no}/cancel")
    if as_json:
        print_json(job)
    else:
        out.print(f"{req_no} is {job['state']}")
    if job["state"] != "cancelled":
        raise typer.Exit(int(Exit.FAILED))


@app.command()
def watch(req_no: ReqNo, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Follow a job until it ends. Exit code 0 only when it finished."""
    client = GatewayClient(url, key, state_dir)
    final = follow(client, req_no, quiet=as_json)
    if as_json:
        print_json(final)
    if final["state"] != "finished":
        raise typer.Exit(int(Exit.FAILED))


def follow(client: GatewayClient, req_no: str, quiet: bool = False) -> dict[str, Any]:
    """Read a job's events until it is terminal, saying each change on stderr; returns the job."""
    said: tuple[Any, ...] = ()
    for event in client.stream(f"/v1/jobs/{req_no}/events"):
        view = event.get("view", event)
        expected = outlook_text(view, time.time())
        now = (view["state"], view.get("progress_done"), view.get("attempt"), view.get("queue_position"))
        if (now != said or event.get("kind") == "outlook") and not quiet:
            steps = f" {view['progress_done']}/{view['progress_total']}" if view.get("progress_total") else ""
            where = f" on {view['node']}" if view.get("node") else ""
            why = view.get("reason") or view.get("progress_note") or ""
            err.print(f"{req_no[:8]} {view['state']}{steps}{where} {why} {expected}".rstrip(), markup=False)
            said = now
        if view["state"] in TERMINAL:
            break
    job: dict[str, Any] = client.request("GET", f"/v1/jobs/{req_no}")
    return job


def outlook_text(view: dict[str, Any], now: float) -> str:
    """Return a job's place and when it is expected to be done, in words; empty where nobody can say."""
    done = view.get("finish_at")
    if not done or view["state"] in TERMINAL:
        return ""
    place = f"place {view['queue_position']}, " if view.get("queue_position") else ""
    return f"({place}done in about {seconds_text(done['p50'] - now)}, 90%: {seconds_text(done['p90'] - now)})"


def seconds_text(seconds: float) -> str:
    """Return a span in words."""
    seconds = max(0.0, seconds)
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def row(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job with the columns of the list worked out."""
    started, ended = job.get("started_at"), job.get("finished_at")
    submitted = float(job["submitted_at"])
    first = started or ended or time.time()
    return {
        **job,
        "progress": f"{job['progress_done']}/{job['progress_total']}" if job.get("progress_total") else "",
        "waited_s": f"{max(first - submitted, 0):.1f}",
        "ran_s": f"{(ended or time.time()) - started:.1f}" if started else "",
        "place": job.get("queue_position") or "",
        "done_in_s": _span(job.get("finish_at")) if not ended else "",
    }


def _span(at: dict[str, float] | None) -> str:
    """Return the seconds to the P50 and the P90 of a moment."""
    now = time.time()
    return f"{max(0.0, at['p50'] - now):.0f}-{max(0.0, at['p90'] - now):.0f}" if at else ""
