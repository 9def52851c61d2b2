"""What SS keeps for customers: jobs, outcomes, results to publish, models, compensations. One SQLite file, shared with the journal.

Writes go through the journal's transaction, so a step and its meaning become durable together; reads use their own connection and
never wait for a writer. A result and a cancel compete for one `outcome` row: whichever step came first is the outcome for ever.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from api.support.jobs import TERMINAL, Folded, Job, Model, Outcome

_SCHEMA = """
CREATE TABLE IF NOT EXISTS job(
  n INTEGER PRIMARY KEY, tenant TEXT NOT NULL, req_no TEXT NOT NULL, task_id TEXT NOT NULL UNIQUE,
  message_id TEXT NOT NULL, header BLOB NOT NULL, "group" TEXT NOT NULL, task_type TEXT NOT NULL, method TEXT NOT NULL,
  model TEXT NOT NULL, priority INTEGER NOT NULL, parameters BLOB NOT NULL, submitted_at REAL NOT NULL, state TEXT NOT NULL,
  attempt INTEGER NOT NULL, node TEXT NOT NULL, progress_done INTEGER NOT NULL, progress_total INTEGER NOT NULL,
  started_at REAL, finished_at REAL, reason TEXT NOT NULL, detail TEXT NOT NULL, result BLOB, rerun INTEGER NOT NULL,
  last_event INTEGER NOT NULL, quota TEXT NOT NULL, UNIQUE(tenant, req_no));
CREATE INDEX IF NOT EXISTS job_quota ON job(tenant) WHERE quota = 'reserved';
CREATE INDEX IF NOT EXISTS job_state ON job(state, n);
CREATE INDEX IF NOT EXISTS job_tenant ON job(tenant, n);
CREATE TABLE IF NOT EXISTS outcome(
  tenant TEXT NOT NULL, req_no TEXT NOT NULL, att INTEGER NOT NULL, kind TEXT NOT NULL, sha TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY(tenant, req_no)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox(
  n INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, req_no TEXT NOT NULL, message_id TEXT NOT NULL UNIQUE,
  priority INTEGER NOT NULL, body BLOB NOT NULL, sent INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS outbox_unsent ON outbox(n) WHERE sent = 0;
CREATE INDEX IF NOT EXISTS outbox_request ON outbox(tenant, req_no, n);
CREATE TABLE IF NOT EXISTS inbox(msg_id TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS job_event(
  event_id INTEGER PRIMARY KEY, n INTEGER NOT NULL, kind TEXT NOT NULL, at REAL NOT NULL, change BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS job_event_job ON job_event(n, event_id);
CREATE TABLE IF NOT EXISTS model(
  model_id TEXT PRIMARY KEY, kind TEXT NOT NULL, base TEXT NOT NULL, tenant TEXT NOT NULL, created_at REAL NOT NULL,
  source_req_no TEXT NOT NULL, deployed_pods INTEGER NOT NULL, files BLOB NOT NULL, metadata BLOB NOT NULL,
  manifest BLOB NOT NULL, deleted INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS model_source ON model(source_req_no);
CREATE TABLE IF NOT EXISTS compensation(
  key TEXT PRIMARY KEY, tenant TEXT NOT NULL, req_no TEXT NOT NULL, action TEXT NOT NULL, at REAL NOT NULL, answer BLOB NOT NULL);
"""
_JOB_COLUMNS = (
    'task_id, tenant, req_no, header, task_type, method, parameters, submitted_at, "group", model, priority, message_id, state,'
    " attempt, node, progress_done, progress_total, started_at, finished_at, reason, detail, result, rerun, n, last_event, quota"
)
_CHANGING = (
    "state",
    "attempt",
    "node",
    "progress_done",
    "progress_total",
    "started_at",
    "finished_at",
    "reason",
    "detail",
)
_MODEL_COLUMNS = "model_id, kind, base, tenant, created_at, source_req_no, deployed_pods, files, metadata, manifest"
_QUOTA_AFTER = {"finished": "used", "cancelled": "released", "rejected": "released", "dead": "reserved"}
"""A dead-lettered job keeps its reservation, because it may be run again; a compensation gives it back."""


class Store:
    """Tables beside the journal. `write_*` run inside a journal transaction on its connection; the rest read."""

    def __init__(self, path: Path | str, *, max_events: int = 1_000_000) -> None:
        self._max_events = max_events
        self._next_n = 0
        self._lock = threading.RLock()
        self._read = sqlite3.connect(Path(path), timeout=10.0, isolation_level=None, check_same_thread=False)
        self._read.executescript(_SCHEMA)
        self._events = self._rows("SELECT count(*) FROM job_event")[0][0]

    def close(self) -> None:
        """Close the reading connection."""
        with self._lock:
            self._read.close()

    # --- writing, inside a journal transaction ------------------------------------------------------------------------

    def write_folded(self, db: sqlite3.Connection, folded: Folded) -> None:
        """Write what a step meant."""
        self._write_new(db, folded.new)
        for job in folded.reopened:
            db.execute("DELETE FROM outcome WHERE tenant = ? AND req_no = ? AND kind = 'dead'", job.key)
            job.quota = "reserved"
        won = self._win_outcomes(db, folded.outcomes)
        fresh = {job.n for job in folded.new}
        lasting = [change for change in folded.changes if change.durable]
        changed = {change.job.n: change.job for change in lasting}
        db.executemany(
            f"UPDATE job SET {', '.join(f'{name}=?' for name in _CHANGING)}, result=?, rerun=?, last_event=?, quota=? WHERE n=?",  # noqa: S608
            [(*_changing(job), *_rest(job), n) for n, job in changed.items() if n not in fresh],
        )
        db.executemany(
            "INSERT INTO job_event(event_id, n, kind, at, change) VALUES(?,?,?,?,?)",
            [
                (
                    change.event_id,
                    change.job.n,
                    change.kind,
                    change.at,
                    _json([change.view[name] for name in _CHANGING]),
                )
                for change in lasting
            ],
        )
        for model in folded.models:
            self.write_model(db, model)
        for model_id, pods in folded.deployments:
            db.execute("UPDATE model SET deployed_pods = ? WHERE model_id = ?", (pods, model_id))
        db.executemany(
            "INSERT OR IGNORE INTO outbox(tenant, req_no, message_id, priority, body) VALUES(?,?,?,?,?)",
            [(*outcome.job.key, outcome.message_id, outcome.job.priority, outcome.body) for outcome in won],
        )
        self._events += len(lasting)
        if self._events > self._max_events:
            gone = max(self._events - self._max_events, self._max_events // 100)
            oldest = "SELECT event_id FROM job_event ORDER BY event_id LIMIT ?"
            self._events -= db.execute(f"DELETE FROM job_event WHERE event_id IN ({oldest})", (gone,)).rowcount  # noqa: S608

    def _write_new(self, db: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        """Add jobs as they are now, after all of the step."""
        if not jobs:
            return
        if self._next_n == 0:
            self._next_n = db.execute("SELECT coalesce(max(n), 0) + 1 FROM job").fetchone()[0]
        for job in jobs:
            job.n = self._next_n
            self._next_n += 1
            if job.terminal:
                job.quota = _QUOTA_AFTER[job.state]
        db.executemany(
            "INSERT INTO job(n, task_id, tenant, req_no, message_id, header, \"group\", task_type, method, model, priority,"
            f" parameters, submitted_at, {', '.join(_CHANGING)}, result, rerun, last_event, quota)"
            f" VALUES({','.join('?' * (17 + len(_CHANGING)))})",
            [
                (
                    job.n, job.task_id, job.tenant, job.req_no, job.message_id, _json(job.header), job.group, job.task_type,
                    job.method, job.model, job.priority, _json(job.parameters), job.submitted_at, *_changing(job), *_rest(job),
                )
                for job in jobs
            ],
        )  # fmt: skip
        db.executemany(
            "INSERT OR IGNORE INTO inbox(msg_id, n) VALUES(?,?)",
            [(f"{job.tenant} {job.message_id}", job.n) for job in jobs],
        )

    def _win_outcomes(self, db: sqlite3.Connection, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Take the outcome rows that are free; only those outcomes are announced."""
        won = []
        for outcome in outcomes:
            job = outcome.job
            row = (*job.key, outcome.attempt, outcome.kind, outcome.sha, job.finished_at)
            if db.execute("INSERT OR IGNORE INTO outcome VALUES(?,?,?,?,?,?)", row).rowcount:
                job.quota = _QUOTA_AFTER[outcome.kind]
                won.append(outcome)
        return won

    def write_model(self, db: sqlite3.Connection, model: Model) -> None:
        """Add a model; a known one stays as it is."""
        db.execute(
            f"INSERT OR IGNORE INTO model({_MODEL_COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?)",
            (model.model_id, model.kind, model.base, model.tenant, model.created_at, model.source_req_no, model.deployed_pods,
             _json(model.files), _json(model.metadata), model.manifest),
        )  # fmt: skip

    def write_fixed_models(self, db: sqlite3.Connection, models: Iterable[Model]) -> None:
        """Make the builtin and local models those of the configuration; deployments of the ones that stay are kept."""
        fixed = {model.model_id: model for model in models}
        for (model_id,) in db.execute("SELECT model_id FROM model WHERE kind IN ('builtin', 'local')").fetchall():
            if model_id not in fixed:
                db.execute("DELETE FROM model WHERE model_id = ?", (model_id,))
        for model in fixed.values():
            self.write_model(db, model)
            db.execute(
                "UPDATE model SET kind = ?, metadata = ? WHERE model_id = ?",
                (model.kind, _json(model.metadata), model.model_id),
            )

    def write_model_deleted(self, db: sqlite3.Connection, model_id: str) -> None:
        """Mark a model deleted; its row stays so that its id is never given out again."""
        db.execute("UPDATE model SET deleted = 1, deployed_pods = 0 WHERE model_id = ?", (model_id,))

    def write_sent(self, db: sqlite3.Connection, numbers: Iterable[int]) -> None:
        """Note that messages of the outbox reached the result queue."""
        db.executemany("UPDATE outbox SET sent = 1 WHERE n = ?", [(n,) for n in numbers])

    def write_compensation(
        self, db: sqlite3.Connection, key: str, job: tuple[str, str], action: str, at: float, answer: Mapping[str, Any]
    ) -> bool:
        """Record a compensation under its key; False when the key is taken."""
        row = (key, *job, action, at, _json(answer))
        return db.execute("INSERT OR IGNORE INTO compensation VALUES(?,?,?,?,?,?)", row).rowcount > 0

    def write_quota_released(self, db: sqlite3.Connection, key: tuple[str, str]) -> bool:
        """Give a reservation back; False when there was none left."""
        query = "UPDATE job SET quota = 'released' WHERE tenant = ? AND req_no = ? AND quota = 'reserved'"
        return db.execute(query, key).rowcount > 0

    # --- reading ------------------------------------------------------------------------------------------------------

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._read.execute(query, parameters).fetchall()

    def job(self, tenant: str, req_no: str) -> Job | None:
        """Return a job; tenant ``*`` finds any tenant's, the oldest of that reqNo."""
        if tenant == "*":
            rows = self._rows(f"SELECT {_JOB_COLUMNS} FROM job WHERE req_no = ? ORDER BY n LIMIT 1", (req_no,))  # noqa: S608
        else:
            rows = self._rows(f"SELECT {_JOB_COLUMNS} FROM job WHERE tenant = ? AND req_no = ?", (tenant, req_no))  # noqa: S608
        return _job(rows[0]) if rows else None

    def job_by_task(self, task_id: str) -> Job | None:
        """Return the job the engine knows by this name."""
        rows = self._rows(f"SELECT {_JOB_COLUMNS} FROM job WHERE task_id = ?", (task_id,))  # noqa: S608
        return _job(rows[0]) if rows else None

    def known(self, tenant: str, req_no: str, message_id: str) -> bool:
        """Tell whether a request, or this very message, was taken in before."""
        return bool(
            self._rows(
                "SELECT 1 FROM job WHERE tenant = ? AND req_no = ? UNION ALL SELECT 1 FROM inbox WHERE msg_id = ?",
                (tenant, req_no, f"{tenant} {message_id}"),
            )
        )

    def jobs(self, tenant: str, limit: int, before: int, state: str, group: str) -> list[Job]:
        """Return jobs newest first, those that arrived before number `before` (0: from the newest)."""
        wheres, values = ["1"], []
        for column, value in (("tenant", "" if tenant == "*" else tenant), ("state", state), ('"group"', group)):
            if value:
                wheres.append(f"{column} = ?")
                values.append(value)
        if before:
            wheres.append("n < ?")
        query = f"SELECT {_JOB_COLUMNS} FROM job WHERE {' AND '.join(wheres)} ORDER BY n DESC LIMIT ?"  # noqa: S608
        return [_job(row) for row in self._rows(query, (*values, *((before,) if before else ()), limit))]

    def live_jobs(self) -> Iterator[Job]:
        """Return every job that has not ended, oldest first."""
        marks = ",".join("?" * len(TERMINAL))
        query = f"SELECT {_JOB_COLUMNS} FROM job WHERE state NOT IN ({marks}) ORDER BY n"  # noqa: S608
        for row in self._rows(query, sorted(TERMINAL)):
            yield _job(row)

    def last_event_id(self) -> int:
        """Return the highest event id given out durably."""
        return int(self._rows("SELECT coalesce(max(event_id), 0) FROM job_event")[0][0])

    def events(
        self, tenant: str, req_no: str, after: int, limit: int
    ) -> list[tuple[int, str, float, int, dict[str, Any]]]:
        """Return stored changes after an event id as (event_id, kind, at, job number, changed fields), oldest first."""
        wheres, values = (
            ["event_id > ?"],
            [after, *(value for value in ("" if tenant == "*" else tenant, req_no) if value)],
        )
        if tenant != "*":
            wheres.append("tenant = ?")
        if req_no:
            wheres.append("req_no = ?")
        rows = self._rows(
            f"SELECT event_id, kind, at, n, change FROM job_event JOIN job USING(n) WHERE {' AND '.join(wheres)}"  # noqa: S608
            " ORDER BY event_id LIMIT ?",
            (*values, limit),
        )
        return [
            (row[0], row[1], row[2], row[3], dict(zip(_CHANGING, msgspec.json.decode(row[4]), strict=True)))
            for row in rows
        ]

    def job_by_number(self, n: int) -> Job | None:
        """Return a job by its place in the order of arrival."""
        rows = self._rows(f"SELECT {_JOB_COLUMNS} FROM job WHERE n = ?", (n,))  # noqa: S608
        return _job(rows[0]) if rows else None

    def outcome(self, tenant: str, req_no: str) -> tuple[str, int, str] | None:
        """Return (kind, attempt, sha) of an ended request."""
        rows = self._rows("SELECT kind, att, sha FROM outcome WHERE tenant = ? AND req_no = ?", (tenant, req_no))
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    def unsent(self, after: int, limit: int) -> list[tuple[int, str, int, bytes]]:
        """Return (number, message id, priority, body) of results that have not reached the queue, oldest first."""
        rows = self._rows(
            "SELECT n, message_id, priority, body FROM outbox WHERE sent = 0 AND n > ? ORDER BY n LIMIT ?",
            (after, limit),
        )
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    def manifests(self, numbers: Sequence[int]) -> list[bytes]:
        """Return the manifests of the models that the requests of these outbox rows made."""
        marks = ",".join("?" * len(numbers))
        rows = self._rows(
            "SELECT manifest FROM outbox JOIN model ON source_req_no = req_no AND model.tenant = outbox.tenant"  # noqa: S608
            f" WHERE outbox.n IN ({marks})",
            numbers,
        )
        return [row[0] for row in rows if row[0]]

    def newest_result(self, tenant: str, req_no: str) -> tuple[str, int, bytes] | None:
        """Return (message id, priority, body) of a request's result message."""
        rows = self._rows(
            "SELECT message_id, priority, body FROM outbox WHERE tenant = ? AND req_no = ? ORDER BY n DESC LIMIT 1",
            (tenant, req_no),
        )
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    def models(self, tenant: str) -> list[Model]:
        """Return the models a tenant may use, everybody's first."""
        query = f"SELECT {_MODEL_COLUMNS} FROM model WHERE deleted = 0 AND (tenant = '' OR tenant = ?1 OR ?1 = '*')"  # noqa: S608
        return [_model(row) for row in self._rows(query + " ORDER BY tenant, created_at, model_id", (tenant,))]

    def model(self, model_id: str) -> Model | None:
        """Return a model that was not deleted."""
        rows = self._rows(f"SELECT {_MODEL_COLUMNS} FROM model WHERE model_id = ? AND deleted = 0", (model_id,))  # noqa: S608
        return _model(rows[0]) if rows else None

    def model_in_use(self, model_id: str) -> bool:
        """Tell whether a job that has not ended needs the model."""
        marks = ",".join("?" * len(TERMINAL))
        live = f"state NOT IN ({marks})"
        added = "EXISTS (SELECT 1 FROM json_each(CAST(parameters AS TEXT), '$.adapters') WHERE value ->> 'model' = ?)"
        query = f"SELECT 1 FROM job WHERE {live} AND (model = ? OR {added}) LIMIT 1"  # noqa: S608
        return bool(self._rows(query, (*sorted(TERMINAL), model_id, model_id)))

    def compensation(self, key: str) -> tuple[str, str, str, dict[str, Any]] | None:
        """Return (tenant, req_no, action, answer) recorded under a key."""
        rows = self._rows("SELECT tenant, req_no, action, answer FROM compensation WHERE key = ?", (key,))
        return (rows[0][0], rows[0][1], rows[0][2], msgspec.json.decode(rows[0][3])) if rows else None

    def quota_reserved(self, tenant: str) -> int:
        """Return how many of a tenant's requests hold a reservation."""
        return int(self._rows("SELECT count(*) FROM job WHERE tenant = ? AND quota = 'reserved'", (tenant,))[0][0])

    def counts_by_state(self) -> dict[str, dict[str, int]]:
        """Return ``{tenant: {state: number}}`` of the jobs that have not ended."""
        marks = ",".join("?" * len(TERMINAL))
        counts: dict[str, dict[str, int]] = {}
        query = f"SELECT tenant, state, count(*) FROM job WHERE state NOT IN ({marks}) GROUP BY tenant, state"  # noqa: S608
        for tenant, state, number in self._rows(query, sorted(TERMINAL)):
            counts.setdefault(tenant, {})[state] = number
        return counts


def _job(row: tuple[Any, ...]) -> Job:
    values = list(row)
    values[3] = msgspec.json.decode(values[3])
    values[6] = msgspec.json.decode(values[6])
    values[21] = msgspec.json.decode(values[21]) if values[21] else None
    return Job(*values)


def _model(row: tuple[Any, ...]) -> Model:
    model_id, kind, base, tenant, created_at, source, pods, files, metadata, manifest = row
    return Model(
        model_id,
        kind,
        base,
        tenant,
        created_at,
        source,
        pods,
        msgspec.json.decode(files),
        msgspec.json.decode(metadata),
        manifest,
    )


_json = msgspec.json.encode


def _changing(job: Job) -> tuple[Any, ...]:
    return (
        job.state,
        job.attempt,
        job.node,
        job.progress_done,
        job.progress_total,
        job.started_at,
        job.finished_at,
        job.reason,
        job.detail,
    )


def _rest(job: Job) -> tuple[Any, ...]:
    return None if job.result is None else _json(job.result), job.rerun, job.last_event, job.quota
