"""`aigc generate` and `aigc train`: a request from the shell, followed to its result."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Annotated, Any

import typer

from api.cli.client import GatewayClient
from api.cli.jobs import follow
from api.cli.options import DEFAULT_STATE, Json, Key, State, Url
from api.cli.output import Exit, err, fail, out, print_json


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    model: Annotated[str, typer.Option(help="Model id; `tiny` comes with the package.")] = "tiny",
    negative_prompt: Annotated[str, typer.Option(help="What it must not show.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=64, help="Number of pictures.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    size: Annotated[str, typer.Option(help="Width x height in pixels, such as 64x64. Default: the model's own.")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A further LoRA of the same base, ID or ID:WEIGHT such as lora-12ab:0.8; may be repeated."),
    ] = None,
    adapter_scale: Annotated[float | None, typer.Option(help="Weight of --model where it is a LoRA, 0 to 2.")] = None,
    preview_every: Annotated[int, typer.Option(min=0, help="Steps between two previews in the job's events.")] = 0,
    image: Annotated[Path | None, typer.Option(help="A picture to begin with.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it may change, up to 1.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture as large, white where it is painted anew.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="NAME:FILE or NAME:FILE:SCALE, a ControlNet and what it follows; repeatable."),
    ] = None,
    priority: Annotated[int, typer.Option(help="100 and above is urgent.")] = 0,
    group: Annotated[str, typer.Option(help="Requests of one group go to the same node.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the pictures.")] = Path("."),
    wait: Annotated[bool, typer.Option(help="Wait for the pictures.")] = True,
    url: Url = "",
    key: Key = "",
    state_dir: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Generate pictures from text, and from other pictures, and download them."""
    parameters: dict[str, Any] = {"prompt": prompt, "count": count}
    optional: dict[str, Any] = {
        "negative_prompt": negative_prompt or None,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "strength": strength,
    }
    optional |= {"adapter_scale": adapter_scale, "preview_every": preview_every or None}
    parameters |= {name: value for name, value in optional.items() if value is not None}
    if adapter:
        parameters["adapters"] = [adapter_use(text) for text in adapter]
    if size:
        width, _, height = size.lower().partition("x")
        if not (width.isdigit() and height.isdigit()):
            fail(f"--size: {size!r} is not WIDTHxHEIGHT, such as 512x512", Exit.USAGE)
        parameters |= {"width": int(width), "height": int(height)}
    followed = [_control(text) for text in control or []]
    _present([path for path in (image, mask, *(path for _, path, _ in followed)) if path is not None])
    client = GatewayClient(url, key, state_dir)
    given = {name: path for name, path in (("image", image), ("mask", mask)) if path is not None}
    parameters |= {name: upload(client, path) for name, path in given.items()}
    if followed:
        parameters["control"] = [
            {"model": name, "image": upload(client, path), "scale": scale} for name, path, scale in followed
        ]
    job = submit(client, "GC", "text_to_image", parameters, model=model, priority=priority, group=group)
    if not wait:
        _say(job, as_json)
        return
    job = follow(client, job["req_no"], quiet=as_json)
    if job["state"] == "finished":
        output.mkdir(parents=True, exist_ok=True)
        job["saved"] = [str(path) for path in download(client, job, output)]
    _end(job, as_json)


def adapter_use(text: str) -> dict[str, Any]:
    """Read ID or ID:WEIGHT; ids may hold colons themselves."""
    name, colon, weight = text.rpartition(":")
    try:
        return {"model": name, "weight": float(weight)} if colon and name else {"model": text}
    except ValueError:
        return {"model": text}


def train(
    pictures: Annotated[list[Path], typer.Argument(help="3 to 5 pictures of the subject.")],
    category: Annotated[str, typer.Option(help="What the subject is, one noun: dog, robot.")],
    base_model: Annotated[str, typer.Option(help="Model to personalise.")] = "tiny",
    method: Annotated[str, typer.Option(help="lora or full.")] = "lora",
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
    priority: Annotated[int, typer.Option(help="100 and above is urgent.")] = 0,
    group: Annotated[str, typer.Option(help="Requests of one group go to the same node.")] = "",
    wait: Annotated[bool, typer.Option(help="Wait for the model.")] = True,
    url: Url = "",
    key: Key = "",
    state_dir: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Train a personalised model from a few pictures (DreamBooth); prints its model id."""
    _present(pictures)
    client = GatewayClient(url, key, state_dir)
    parameters: dict[str, Any] = {
        "pictures": [upload(client, picture) for picture in pictures],
        "category": category,
        "base_model": base_model,
        "method": method,
    }
    parameters |= {name: value for name, value in {"steps": steps, "seed": seed}.items() if value is not None}
    job = submit(client, "TP", "dreambooth", parameters, priority=priority, group=group)
    if not wait:
        _say(job, as_json)
        return
    _end(follow(client, job["req_no"], quiet=as_json), as_json)


def _present(pictures: list[Path]) -> None:
    missing = [str(picture) for picture in pictures if not picture.is_file()]
    if missing:
        fail(f"no such picture: {', '.join(missing)}", Exit.USAGE)


def _control(text: str) -> tuple[str, Path, float]:
    """Read NAME:FILE or NAME:FILE:SCALE; the file's own name may hold colons."""
    name, _, rest = text.partition(":")
    file, _, number = rest.rpartition(":")
    scale = 1.0
    if file and not Path(rest).is_file():
        try:
            scale, rest = float(number), file
        except ValueError:
            pass  # The colon is part of a name that does not exist; that is said of the whole of it.
    if not name or not rest:
        fail(f"--control: {text!r} is not NAME:FILE, such as canny:edges.png", Exit.USAGE)
    return name, Path(rest), scale


def submit(
    client: GatewayClient,
    task_type: str,
    method: str,
    parameters: dict[str, Any],
    *,
    model: str = "",
    priority: int = 0,
    group: str = "",
    affinity: str = "",
) -> dict[str, Any]:
    """Submit a job and return the gateway's answer."""
    body = {"task_type": task_type, "method": method, "parameters": parameters, "priority": priority, "group": group}
    body |= {name: value for name, value in {"model": model, "affinity": affinity}.items() if value}
    job: dict[str, Any] = client.request("POST", "/v1/jobs", json=body)
    return job


def upload(client: GatewayClient, picture: Path) -> str:
    """Upload a picture and return its file id."""
    media_type = mimetypes.guess_type(picture.name)[0] or "application/octet-stream"
    with picture.open("rb") as file:
        answer = client.request(
            "POST", "/v1/uploads", about=f"{picture}: ", files={"file": (picture.name, file, media_type)}
        )
    return str(answer["file_id"])


def download(client: GatewayClient, job: dict[str, Any], directory: Path) -> list[Path]:
    """Download a finished job's pictures; returns their paths."""
    saved = []
    for number, file in enumerate((job.get("result") or {}).get("files", [])):
        if not str(file.get("media_type", "")).startswith("image/"):
            continue
        path = directory / f"{job['req_no'][:8]}-{number}{mimetypes.guess_extension(file['media_type']) or '.bin'}"
        client.download(file["url"], path)
        saved.append(path)
    return saved


def _say(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        out.print(job["req_no"], markup=False, soft_wrap=True)


def _end(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
    elif job["state"] == "finished":
        for line in job.get("saved") or [(job.get("result") or {}).get("model", "")]:
            out.print(line, markup=False, soft_wrap=True)
    else:
        err.print(f"{job['req_no']} is {job['state']}: {job.get('reason', '')} {job.get('detail', '')}", markup=False)
    if job["state"] != "finished":
        raise typer.Exit(int(Exit.FAILED))
