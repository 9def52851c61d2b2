"""The command line's HTTP client: finds the gateway and the key, and turns problem documents into exit codes."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api.cli.output import Exit, fail


class GatewayClient:
    """Talks to the gateway's REST API.

    The URL comes from the flag, ``AIGC_URL`` or ``url`` in the state directory; the key from ``AIGC_API_KEY`` or the key file that
    `aigc up` left in the state directory.
    """

    def __init__(self, url: str = "", key: str = "", state_dir: Path = Path("aigc-state")) -> None:
        import httpx

        self._httpx = httpx
        self.url = (url or os.environ.get("AIGC_URL") or _read(state_dir / "url") or "http://127.0.0.1:8080").rstrip(
            "/"
        )
        self.key = key or os.environ.get("AIGC_API_KEY") or _read(state_dir / "operator.key")
        if not self.key:
            fail(
                f"no API key: set AIGC_API_KEY, or run where `aigc up` keeps its state ({state_dir}/operator.key)",
                Exit.USAGE,
            )
        self._client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=httpx.Timeout(30, read=630)
        )
        weakref.finalize(self, self._client.close)

    def request(self, method: str, path: str, *, about: str = "", **arguments: Any) -> Any:
        """Send a request and return the JSON answer (None where there is none); a refusal ends the command.

        `about` stands before what the server says, where one of several things was refused.
        """
        try:
            answer = self._client.request(method, path, **arguments)
        except self._httpx.TransportError as error:
            fail(f"the gateway at {self.url} does not answer ({error}); is `aigc up` running?", Exit.UNREACHABLE)
        if answer.status_code >= 400:
            fail(about + explain(answer.status_code, answer.content), Exit.REFUSED)
        return answer.json() if answer.content else None

    def stream(self, path: str, last_event_id: str = "") -> Iterator[dict[str, Any]]:
        """Yield the JSON data of a server-sent event stream, until the server ends it."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_event_id} if last_event_id else {})}
        try:
            with self._client.stream("GET", path, headers=headers, timeout=None) as answer:
                if answer.status_code >= 400:
                    fail(explain(answer.status_code, answer.read()), Exit.REFUSED)
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        data = json.loads(line[5:])
                        if isinstance(data, dict):
                            yield data
        except self._httpx.TransportError as error:
            fail(f"the stream from {self.url} broke off: {error}", Exit.UNREACHABLE)

    def download(self, url: str, to: Path) -> None:
        """Write the bytes behind a signed link to a file, replacing it only when all have come."""
        part = to.with_name(to.name + ".part")
        try:
            with self._httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer:
                if answer.status_code >= 400:
                    fail(explain(answer.status_code, answer.read()), Exit.REFUSED)
                with part.open("wb") as file:
                    for chunk in answer.iter_bytes():
                        file.write(chunk)
        except self._httpx.TransportError as error:
            fail(f"could not download {url}: {error}", Exit.UNREACHABLE)
        part.replace(to)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def explain(status: int, body: bytes) -> str:
    """Turn a problem document into one line for people."""
    try:
        problem = json.loads(body)
    except ValueError:
        return f"the server answered {status}"
    if not isinstance(problem, dict):
        return f"the server answered {status}"
    detail = problem.get("detail") or (problem.get("error") or {}).get("message") or problem.get("title") or ""
    parameter = (problem.get("error") or {}).get("param")
    remedy = "; give one by --key or AIGC_API_KEY, `aigc keys create` makes one" if status == 401 else ""
    field = f" (field: {parameter})" if parameter and str(parameter) not in str(detail) else ""
    return f"{status}: {str(detail).rstrip('.') if remedy else detail}{remedy}{field}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
