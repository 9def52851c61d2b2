"""`aigc nodes`: list, show, drain, uncordon."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from api.cli.client import GatewayClient
from api.cli.options import DEFAULT_STATE, Json, Key, State, Url
from api.cli.output import err, print_json, print_rows

app = typer.Typer(no_args_is_help=True, help="Nodes: list, show, drain, uncordon (operators).")
Node = Annotated[str, typer.Argument(help="Name of the node.")]
Gpu = Annotated[str, typer.Option(help="Only this GPU of the node, by UUID.")]


@app.command("list")
def list_nodes(url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """List the nodes with their GPUs, Pods and state."""
    answer = GatewayClient(url, key, state_dir).request("GET", "/v1/nodes")
    nodes: list[dict[str, Any]] = answer["data"]
    rows = nodes if as_json else [{**node, "gpus": _gpus(node), "pods": _pods(node)} for node in nodes]
    print_rows(rows, ("name", "state", "gpus", "pods"), as_json)


@app.command()
def show(node: Node, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """Show a node's GPUs and Pods, and which models lie on its disk and in its memory."""
    answer = GatewayClient(url, key, state_dir).request("GET", "/v1/nodes")
    found = next((each for each in answer["data"] if each["name"] == node), None)
    if found is None:
        names = ", ".join(str(each["name"]) for each in answer["data"][:20]) or "none"
        raise typer.BadParameter(f"{node[:80]!r} is no node of this platform; there are {names}", param_hint="NODE")
    if as_json:
        print_json(found)
        return
    print_rows([{**found, "gpus": _gpus(found), "pods": _pods(found)}], ("name", "state", "gpus", "pods"), False)
    models = [
        {**each, "size": _size(each), "pinned": "yes" if each.get("pinned") else ""} for each in found.get("models", ())
    ]
    print_rows(models, ("model", "tier", "size", "pinned"), False)
    for tier, figures in sorted(found.get("caches", {}).items()):
        err.print(f"{tier}: {', '.join(f'{name} {value}' for name, value in figures.items())}", markup=False)


@app.command()
def drain(
    node: Node, gpu: Gpu = "", url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Start nothing new on a node, or on one of its GPUs; what runs there finishes."""
    _order("drain", node, gpu, GatewayClient(url, key, state_dir), as_json)


@app.command()
def uncordon(
    node: Node, gpu: Gpu = "", url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Let a node, or one of its GPUs, take work again."""
    _order("uncordon", node, gpu, GatewayClient(url, key, state_dir), as_json)


def _order(order: str, node: str, gpu: str, client: GatewayClient, as_json: bool) -> None:
    answer = client.request("POST", f"/v1/nodes/{node}/{order}", json={"gpu": gpu} if gpu else {})
    if as_json:
        print_json(answer)
    else:
        err.print(f"{order}: {node}{' ' + gpu if gpu else ''}", markup=False)


def _gpus(node: dict[str, Any]) -> str:
    gpus = node.get("gpus") or []
    models = sorted({str(gpu.get("model")) for gpu in gpus})
    return f"{len(gpus)} x {'/'.join(models)}" if gpus else "none"


def _size(model: dict[str, Any]) -> str:
    return f"{int(model.get('size_bytes') or 0) / 2**20:,.1f} MiB"


def _pods(node: dict[str, Any]) -> str:
    pods = node.get("pods") or []
    return ", ".join(f"{pod.get('method')}:{pod.get('model') or '-'} {pod.get('state')}" for pod in pods)
