"""Keys of the executor channel: one CURVE key pair for the scheduler, one for each node, and the directory of nodes that may join.

The public key is the identity: the directory ``authorized/`` holds one file ``<node>.pub`` for each node, and a connection may
speak for that node alone. Files are read again when the directory changes: a node is added or shut out without a restart.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import zmq

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class KeyProblem(ValueError):
    """A key file is missing, unreadable for the program or readable for others; the message says what to do."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair in Z85 text, 40 characters each."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r}, secret=...)"


def generate() -> KeyPair:
    """Return a new key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def save(pair: KeyPair, path: Path) -> None:
    """Write a key pair for its owner alone (mode 0600); raises FileExistsError rather than replace one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(f"public = '{pair.public}'\nsecret = '{pair.secret}'\n")
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> KeyPair:
    """Read a key pair; raises KeyProblem when it is missing, malformed, or others may read it."""
    try:
        mode = path.stat().st_mode
        content = tomllib.loads(path.read_text("ascii"))
    except FileNotFoundError:
        raise KeyProblem(f"{path}: no key file; generate it with `executors.curve.load_or_generate`") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyProblem(f"{path}: not a key file: {error}") from error
    if mode & 0o077:
        raise KeyProblem(f"{path}: others may read this secret key; run `chmod 600 {path}`")
    return KeyPair(_key(content.get("public"), path, "public"), _key(content.get("secret"), path, "secret"))


def load_public(path: Path) -> str:
    """Read a file with one public key; raises KeyProblem when it is missing or holds none."""
    try:
        return _key(path.read_text("ascii").strip(), path, "its content")
    except FileNotFoundError:
        raise KeyProblem(f"{path}: no such key file") from None
    except UnicodeDecodeError:
        raise KeyProblem(f"{path}: its content is not a Z85 key of 40 characters") from None


def load_or_generate(path: Path) -> KeyPair:
    """Read a key pair, making and saving it first where there is none."""
    if not path.exists():
        try:
            save(generate(), path)
        except FileExistsError:
            pass
    return load(path)


def authorize(directory: Path, node: str, public: str) -> Path:
    """Let the holder of a public key speak for a node; replaces the node's earlier key."""
    if not NODE_NAME.fullmatch(node):
        raise KeyProblem(f"node name {node!r}: use letters, digits, dot, dash and underscore, at most 63 characters")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{node}.pub"
    scratch = directory / f".{node}.pub.new"
    scratch.write_text(_key(public, path, "public") + "\n", "ascii")
    scratch.replace(path)
    return path


class Authorized:
    """The nodes that may join, as the directory says now."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._node_of: dict[str, str] = {}
        self.problems: tuple[str, ...] = ()
        """Files that are no public keys."""

    def node_of(self, public: str) -> str | None:
        """Return the node that the holder of a public key may speak for, None when it may not join."""
        self._refresh()
        return self._node_of.get(public)

    def _refresh(self) -> None:
        try:
            entries = sorted(self._directory.glob("[!.]*.pub"))
            seen = tuple((entry.name, entry.stat().st_mtime_ns, entry.stat().st_ino) for entry in entries)
        except FileNotFoundError:
            entries, seen = [], ()
        if seen == self._seen:
            return
        node_of: dict[str, str] = {}
        problems: list[str] = []
        for entry in entries:
            try:
                node_of[_key(entry.read_text("ascii").strip(), entry, "public")] = entry.stem
            except (OSError, ValueError) as error:
                problems.append(str(error))
        self._node_of, self._seen, self.problems = node_of, seen, tuple(problems)


def _key(value: object, path: Path, field: str) -> str:
    if not isinstance(value, str) or not _Z85.fullmatch(value):
        raise KeyProblem(f"{path}: {field} is not a Z85 key of 40 characters")
    return value
