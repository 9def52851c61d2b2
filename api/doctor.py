"""`aigc doctor`: what is wrong with this machine, its configuration and its state, before a customer finds out."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from api.settings import Settings
from api.state_dir import StateDir, check_database

Verdict = Literal["ok", "note", "fault"]
GIB = 1 << 30
EXTRAS = {
    "api": ("fastapi", "uvicorn", "pyzmq", "obstore"),
    "executors": ("torch", "diffusers", "transformers", "peft"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A `fault` has to be mended; a `note` is worth knowing."""

    what: str
    verdict: Verdict
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return asdict(self)


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything, cheap things first."""
    yield _python()
    yield from _packages()
    yield from _disk(settings.state_dir)
    yield from _state(StateDir(settings.state_dir))
    yield _profile(settings.scheduler.profile)
    yield from _devices(settings.agent.devices)
    yield from _models(settings.models_dir)
    yield from _memory(settings)
    gateway = _gateway(settings)
    yield gateway
    if gateway.verdict == "note":  # Where it runs, its own parts have the ports.
        yield from _ports(settings)


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info < (3, 14)
    return Finding(
        "python", "ok" if fits else "fault", platform.python_version() + ("" if fits else ": 3.11 to 3.13 is needed")
    )


def _packages() -> Iterator[Finding]:
    for extra, names in EXTRAS.items():
        found, missing = [], []
        for name in names:
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                missing.append(name)
        if missing:
            yield Finding(
                f"extra {extra}", "note", f"missing {', '.join(missing)}: pip install 'aigc-platform[{extra}]'"
            )
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(found))


def _disk(path: Path) -> Iterator[Finding]:
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    free = usage.free / usage.total
    detail = f"{usage.free / GIB:.1f} GiB ({free:.0%}) free under {existing}"
    verdict: Verdict = "fault" if free < 0.05 else "note" if free < 0.10 else "ok"
    yield Finding("disk", verdict, detail + (": requests are refused below 5%" if verdict != "ok" else ""))


def _state(state: StateDir) -> Iterator[Finding]:
    if not state.root.is_dir():
        yield Finding("state", "note", f"{state.root} does not exist yet; `aigc up` makes it")
        return
    if state.root.stat().st_mode & 0o077:
        yield Finding("state", "fault", f"{state.root} is open to others: chmod 700 {state.root}")
    for path in (state.journal, state.queue, state.gateway, state.keys):
        found = check_database(path)
        verdict: Verdict = "ok" if found == "ok" else "note" if found == "absent" else "fault"
        yield Finding(path.name, verdict, found)


def _profile(name: str) -> Finding:
    from engine import profiles

    try:
        path = Path(name)
        profiles.load(path.read_text() if path.suffix == ".toml" and path.is_file() else name)
    except (ValueError, OSError) as error:
        return Finding("profile", "fault", f"{name}: {error}")
    return Finding("profile", "ok", name)


def _devices(spec: str) -> Iterator[Finding]:
    try:
        from executors.devices import open_plugin
    except ImportError as error:
        yield Finding("devices", "note", f"the extra `executors` is not installed: {error}")
        return
    try:
        devices = open_plugin(spec).devices()
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("devices", "fault", f"{spec}: {error}")
        return
    if not devices:
        yield Finding("devices", "fault", f"{spec}: no device found; `cpu:2` offers two CPU slots")
    for device in devices:
        verdict: Verdict = "ok" if device.healthy else "fault"
        health = "" if device.healthy else ", unhealthy"
        yield Finding("device", verdict, f"{device.uuid}: {device.model}, {device.memory_bytes / GIB:.1f} GiB{health}")


def _models(directory: Path | None) -> Iterator[Finding]:
    if directory is None:
        return
    if not directory.is_dir():
        yield Finding("models", "fault", f"models_dir: {directory} is no directory")
        return
    found = sorted(path.parent.name for path in directory.glob("*/model_index.json"))
    yield Finding(
        "models", "ok" if found else "note", ", ".join(found) or f"{directory} holds no model in diffusers' format"
    )


def _memory(settings: Settings) -> Iterator[Finding]:
    """Say what each model would take of each kind of device here."""
    try:
        from executors.devices import open_plugin
        from executors.memory.footprint import FootprintUnknown, read_footprint
        from executors.memory.plan import Place, described
        from executors.pod_models import BUILTIN_MODELS

        cards = sorted(
            {(device.model, device.memory_bytes) for device in open_plugin(settings.agent.devices).devices()}
        )
    except (ImportError, ValueError, OSError, RuntimeError):
        return  # Said above.
    folders = dict(BUILTIN_MODELS)
    if settings.models_dir is not None:
        found = sorted(settings.models_dir.rglob("model_index.json"))
        folders |= {index.parent.relative_to(settings.models_dir).as_posix(): index.parent for index in found}
    for name, folder in folders.items():
        try:
            footprint = read_footprint(folder)
        except FootprintUnknown as error:
            yield Finding("memory", "note", f"{name}: {error}")
            continue
        for model, room_bytes in cards:
            place, said = described(footprint, 4 if model == "cpu" else 2, room_bytes)
            verdict: Verdict = "fault" if place is Place.NOWHERE else "note" if place is not Place.DEVICE else "ok"
            yield Finding("memory", verdict, f"{name} on {model} ({room_bytes / GIB:.1f} GiB): {said}")


def _ports(settings: Settings) -> Iterator[Finding]:
    """Say which ports somebody listens on already."""
    try:
        from api.platform import ports_taken
    except ImportError:
        return  # Said above.
    for taken in ports_taken(settings):
        yield Finding("port", "note", f"{taken}; if it is a part of this platform, all is well")


def _gateway(settings: Settings) -> Finding:
    recorded = StateDir(settings.state_dir).url
    url = recorded.read_text().strip() if recorded.is_file() else settings.gateway_url()
    try:
        import httpx

        answer = httpx.get(f"{url}/readyz", timeout=3)
    except ImportError:
        return Finding("gateway", "note", "the extra `api` is not installed")
    except httpx.TransportError:
        return Finding("gateway", "note", f"{url} does not answer; it is not running")
    return Finding("gateway", "ok" if answer.status_code == 200 else "fault", f"{url} answers {answer.status_code}")
