"""`aigc demo`: the whole platform at work on this machine, on drawn pictures, with a cancel and a killed Pod on the way.

It starts the very parts that `aigc up` starts, and speaks to them through the REST API like any customer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from api.cli.client import GatewayClient
from api.cli.jobs import TERMINAL, row
from api.cli.output import err, out
from api.cli.requests import download, submit, upload
from api.platform import AgentPlan, local_platform
from api.settings import Settings, load_settings
from api.supervisor import PartFailed, Supervisor

NODES = ("node-a", "node-b")
SUBJECT_SEED = 5
CATEGORY = "emblem"
TOKEN = "sks"  # noqa: S105 - the word that names the subject in prompts
URGENT = 100
WAIT_S = 240.0


class DemoFailed(RuntimeError):
    """The demo did not go as it should; the message says where."""


@dataclass(slots=True)
class Wish:
    """A picture somebody wants, and the job it became."""

    title: str
    prompt: str
    group: str
    priority: int = 0
    personal: bool = False
    seed: int = 0
    steps: int = 20
    req_no: str = ""
    pictures: list[Path] = field(default_factory=list)


def wishes() -> list[Wish]:
    """Return the eight generations: urgent and ordinary, two groups, base and personalised model."""
    own = f"a {TOKEN} {CATEGORY}"
    return [
        Wish("base, ordinary", "a red circle on a white background", "posters", seed=1, steps=60),
        Wish("base, ordinary", "a blue star on a yellow background", "posters", seed=2),
        Wish("base, urgent", "a green house on a white background", "posters", URGENT, seed=3),
        Wish("base, urgent", "an orange heart on a black background", "posters", URGENT, seed=4),
        Wish("own, ordinary", f"{own} on a white background", "emblems", personal=True, seed=5),
        Wish("own, ordinary", f"{own} on a blue background", "emblems", personal=True, seed=6),
        Wish("own, urgent", f"{own} on a black background", "emblems", URGENT, personal=True, seed=7),
        Wish("own, urgent", f"{own} on a green background", "emblems", URGENT, personal=True, seed=8),
    ]


def run_demo(output: Path, steps: int = 300) -> dict[str, Any]:
    """Run the demo and return its report; pictures, a contact sheet and the state lie in `output`. Raises DemoFailed."""
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    state = output / "state"
    shutil.rmtree(state, ignore_errors=True)
    pictures = draw_subject(output / "subject")
    err.print(f"drew {len(pictures)} pictures of one {CATEGORY} into {pictures[0].parent}", markup=False)
    with running_platform(state) as (client, supervisor):
        report = _play(client, supervisor, pictures, output, steps)
    report["total_s"] = round(time.monotonic() - started, 1)
    (output / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    err.print(
        f"\ncontact sheet: {report['contact_sheet']}   report: {output / 'demo.json'}   {report['total_s']} s in all",
        markup=False,
    )
    return report


def draw_subject(directory: Path) -> list[Path]:
    """Draw four pictures of a subject that the base model has never seen."""
    from PIL import Image

    from executors.tiny.drawing import subject_pictures, subject_scene

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pixels in enumerate(subject_pictures(subject_scene(SUBJECT_SEED), 4, SUBJECT_SEED)):
        path = directory / f"{number}.png"
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


@contextmanager
def running_platform(state: Path) -> Iterator[tuple[GatewayClient, Supervisor]]:
    """Run a platform with two nodes of one CPU slot each on free ports, and a client that speaks to it."""
    settings = load_settings(state_dir=state)
    settings = settings.model_copy(
        update={
            "gateway": settings.gateway.model_copy(update={"port": 0, "host": "127.0.0.1", "public_url": ""}),
            "scheduler": settings.scheduler.model_copy(update={"internal_port": 0, "bind": "tcp://127.0.0.1:0"}),
            "store_url": "",
        }
    )
    supervisor, settings = local_platform(
        settings, [AgentPlan(name, "cpu:1") for name in NODES], lambda line: err.print(line, markup=False)
    )
    try:
        try:
            supervisor.start()
        except PartFailed as error:
            raise DemoFailed(str(error)) from error
        yield _client(settings), supervisor
    finally:
        supervisor.stop()


def _client(settings: Settings) -> GatewayClient:
    key = (settings.state_dir / "operator.key").read_text().strip()
    return GatewayClient(settings.gateway_url(), key, settings.state_dir)


def _play(
    client: GatewayClient, supervisor: Supervisor, pictures: Sequence[Path], output: Path, steps: int
) -> dict[str, Any]:
    wait_until(lambda: len(client.request("GET", "/v1/nodes")["data"]) == len(NODES), "both nodes join", 60)
    wanted = wishes()
    with _live(client) as watch:
        training = submit(
            client,
            "TP",
            "dreambooth",
            {
                "pictures": [upload(client, picture) for picture in pictures],
                "category": CATEGORY,
                "instance_token": TOKEN,
                "steps": steps,
            },
            group="emblems",
            affinity="strict",
        )
        for wish in wanted:
            if not wish.personal:
                _ask(client, wish, "tiny")
        spare = Wish("to be cancelled", "a purple ring on a grey background", "posters", seed=9, steps=150)
        _ask(client, spare, "tiny")
        _kill_a_pod(client, supervisor, wanted[0], watch)
        cancelled = _cancel(client, spare)
        trained = watch(lambda jobs: jobs[training["req_no"]], "the training ends")
        if trained["state"] != "finished":
            raise DemoFailed(f"the training is {trained['state']}: {trained.get('reason')} {trained.get('detail')}")
        model = str(trained["result"]["model"])
        client.request("POST", f"/v1/models/{model}/deploy", json={"pods": 1})
        for wish in wanted:
            if wish.personal:
                _ask(client, wish, model)
        for wish in wanted:
            watch(lambda jobs, wish=wish: jobs[wish.req_no], f"{wish.title} ends")
    return _report(client, wanted, training["req_no"], spare, cancelled, model, output)


def _ask(client: GatewayClient, wish: Wish, model: str) -> None:
    parameters = {"prompt": wish.prompt, "seed": wish.seed, "steps": wish.steps, "guidance": 3.0}
    job = submit(
        client,
        "GC",
        "text_to_image",
        parameters,
        model=model,
        priority=wish.priority,
        group=wish.group,
        affinity="strict",
    )
    wish.req_no = str(job["req_no"])


def _kill_a_pod(
    client: GatewayClient, supervisor: Supervisor, wish: Wish, watch: Callable[..., dict[str, Any]]
) -> None:
    """Kill -9 the Pod that runs a wish, in mid-run; its job is retried by itself."""

    def amid(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        job = jobs[wish.req_no]
        ready = job["state"] == "running" and job["progress_done"] >= 1
        return job if ready or job["state"] in TERMINAL else {"state": "waiting"}

    job = watch(amid, "the first picture is in mid-run", until=lambda job: job["state"] != "waiting")
    if job["state"] in TERMINAL:
        raise DemoFailed(f"the picture that was to be interrupted was {job['state']} before its Pod could be killed")
    agent = supervisor.part(job["node"]).process
    pods = [pod for nursery in children(agent.pid if agent else 0) for pod in children(nursery)]
    if not pods:
        raise DemoFailed(f"no Pod lives on {job['node']}, though it runs {wish.req_no}")
    for pid in pods:
        os.kill(pid, signal.SIGKILL)
    err.print(
        f"killed the Pod on {job['node']} (kill -9) at step {job['progress_done']} of {job['progress_total']}",
        markup=False,
    )


def children(pid: int) -> list[int]:
    """Return the PIDs of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _cancel(client: GatewayClient, wish: Wish) -> dict[str, Any]:
    job: dict[str, Any] = client.request("POST", f"/v1/jobs/{wish.req_no}/cancel")
    if job["state"] != "cancelled":
        raise DemoFailed(f"the cancelled job is {job['state']}")
    err.print(f"cancelled {wish.req_no[:8]} ({wish.prompt})", markup=False)
    return job


@contextmanager
def _live(client: GatewayClient) -> Iterator[Callable[..., dict[str, Any]]]:
    """Show a live table of all jobs; yields ``watch(pick, what)``, which waits until the picked job has ended."""
    with Live(Table(), console=err, refresh_per_second=4, transient=True) as live:

        def watch(
            pick: Callable[[dict[str, dict[str, Any]]], dict[str, Any]],
            what: str,
            until: Callable[[dict[str, Any]], bool] = lambda job: job["state"] in TERMINAL,
        ) -> dict[str, Any]:
            deadline = time.monotonic() + WAIT_S
            while True:
                listed = client.request("GET", "/v1/jobs", params={"limit": 100})["data"]
                jobs = {job["req_no"]: job for job in listed}
                live.update(_table([row(job) for job in reversed(listed)]))
                picked = pick(jobs)
                if until(picked):
                    return picked
                if time.monotonic() > deadline:
                    raise DemoFailed(f"waited {WAIT_S:.0f} s in vain until {what}; the job is {picked}")
                time.sleep(0.15)

        yield watch


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = (
        "job",
        "method",
        "what",
        "group",
        "priority",
        "state",
        "attempt",
        "progress",
        "waited_s",
        "ran_s",
        "node",
        "model",
    )
    table = Table(title="what happened", title_justify="left")
    for column in columns:
        table.add_column(
            column.replace("_", " "), justify="right" if column.endswith("_s") else "left", no_wrap=column != "what"
        )
    for job in rows:
        what = job["parameters"].get("prompt") or job["parameters"].get("category", "")
        shown = {**job, "job": job["req_no"][:8], "what": what, "model": str(job.get("model") or "")[:14]}
        table.add_row(*(str(shown.get(column) if shown.get(column) is not None else "") for column in columns))
    return table


def _report(
    client: GatewayClient,
    wanted: Sequence[Wish],
    training: str,
    spare: Wish,
    cancelled: dict[str, Any],
    model: str,
    output: Path,
) -> dict[str, Any]:
    pictures = output / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    jobs = [
        client.request("GET", f"/v1/jobs/{req_no}") for req_no in (training, spare.req_no, *(w.req_no for w in wanted))
    ]
    for wish, job in zip(wanted, jobs[2:], strict=True):
        if job["state"] != "finished":
            raise DemoFailed(f"{wish.title} is {job['state']}: {job.get('reason')} {job.get('detail')}")
        wish.pictures = download(client, job, pictures)
        if not wish.pictures:
            raise DemoFailed(f"{wish.title} finished without a picture")
    killed = jobs[2]
    if killed["attempt"] < 2:
        raise DemoFailed("the job whose Pod was killed shows no second attempt")
    sheet = contact_sheet(sorted((output / "subject").glob("*.png")), wanted, output / "contact-sheet.png")
    out.print(_table([row(job) for job in jobs]))
    return {
        "model": model,
        "finished": sum(job["state"] == "finished" for job in jobs),
        "cancelled": cancelled["req_no"],
        "retried": killed["req_no"],
        "attempts_of_retried": killed["attempt"],
        "training_s": round(jobs[0]["finished_at"] - jobs[0]["started_at"], 1),
        "contact_sheet": str(sheet),
        "jobs": jobs,
    }


def contact_sheet(subject: Sequence[Path], wanted: Sequence[Wish], to: Path) -> Path:
    """Draw one picture of everything: the subject's pictures, then each result with its prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11, 8.5), dpi=110)
    axes = figure.subplots(3, 4)
    cells = [(path, "given\nthe new subject") for path in subject]
    cells += [(wish.pictures[0], f"{wish.title}\n{wish.prompt}") for wish in wanted]
    for axis, (path, title) in zip(axes.flat, cells, strict=True):
        axis.imshow(Image.open(path).resize((256, 256), Image.Resampling.NEAREST))
        axis.set_title(title, fontsize=8)
        axis.set_axis_off()
    figure.tight_layout()
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    to.write_bytes(buffer.getvalue())
    return to


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait until a condition holds; raises DemoFailed when it does not within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.1)
