"""`aigc models`: list, show, deploy, undeploy, unload, delete."""

from __future__ import annotations

from typing import Annotated

import typer

from api.cli.client import GatewayClient
from api.cli.options import DEFAULT_STATE, Json, Key, State, Url
from api.cli.output import err, print_facts, print_json, print_rows

app = typer.Typer(no_args_is_help=True, help="Models: list, show, deploy, undeploy, unload, delete.")
ModelId = Annotated[str, typer.Argument(help="The model's id.")]


@app.command("list")
def list_models(url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """List the models you may use."""
    answer = GatewayClient(url, key, state_dir).request("GET", "/v1/models")
    rows = [{**model, "model_id": model.get("model_id") or model.get("id")} for model in answer["data"]]
    print_rows(rows, ("model_id", "kind", "base", "deployed_pods", "source_req_no"), as_json)


@app.command()
def show(
    model_id: ModelId, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Show one model."""
    print_facts(GatewayClient(url, key, state_dir).request("GET", f"/v1/models/{model_id}"), as_json)


@app.command()
def deploy(
    model_id: ModelId,
    pods: Annotated[int, typer.Option(min=1, max=1000, help="Pods to keep warm.")] = 1,
    url: Url = "",
    key: Key = "",
    state_dir: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Keep Pods warm with a model, so that generation with it starts at once."""
    answer = GatewayClient(url, key, state_dir).request("POST", f"/v1/models/{model_id}/deploy", json={"pods": pods})
    if as_json:
        print_json(answer)
    else:
        err.print(f"{model_id}: {pods} warm Pod(s) wanted", markup=False)


@app.command()
def undeploy(
    model_id: ModelId, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Keep no Pod warm for a model any more."""
    answer = GatewayClient(url, key, state_dir).request("POST", f"/v1/models/{model_id}/undeploy")
    if as_json:
        print_json(answer)
    else:
        err.print(f"{model_id}: undeployed", markup=False)


@app.command()
def unload(
    model_id: ModelId,
    node: Annotated[str, typer.Option(help="Only this node; else every node that holds the model.")] = "",
    url: Url = "",
    key: Key = "",
    state_dir: State = DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """Take a model's idle Pods and files off the nodes that hold them; what is in use or deployed stays (operators)."""
    client = GatewayClient(url, key, state_dir)
    names = [node] if node else _holders(client, model_id)
    for name in names:
        client.request("POST", f"/v1/nodes/{name}/unload", json={"model": model_id})
    if as_json:
        print_json({"model_id": model_id, "nodes": names})
    else:
        err.print(f"{model_id}: leaves {', '.join(names) or 'no node: none holds it'}", markup=False)


def _holders(client: GatewayClient, model_id: str) -> list[str]:
    nodes = client.request("GET", "/v1/nodes")["data"]
    return [
        str(node["name"])
        for node in nodes
        if node.get("up", True)
        and any(each["model"] == model_id for each in (*node.get("models", ()), *node.get("pods", ())))
    ]


@app.command()
def delete(
    model_id: ModelId, url: Url = "", key: Key = "", state_dir: State = DEFAULT_STATE, as_json: Json = False
) -> None:
    """Delete a personalised model."""
    GatewayClient(url, key, state_dir).request("DELETE", f"/v1/models/{model_id}")
    if as_json:
        print_json({"model_id": model_id, "deleted": True})
    else:
        err.print(f"{model_id}: deleted", markup=False)
