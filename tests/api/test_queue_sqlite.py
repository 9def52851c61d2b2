"""The embedded queue: priority, leases, dedupe, dead letters, and life across threads, processes and restarts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from api.mq.port import Outgoing, QueueBroken, QueueRefused
from api.mq.sqlite import SqliteQueue


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock):
    queue = SqliteQueue(tmp_path / "queue.db", max_deliveries=3, clock=clock)
    yield queue
    queue.close()


def ids(deliveries) -> list[str]:
    return [delivery.message_id for delivery in deliveries]


def test_higher_priority_comes_first_and_equal_ones_in_order(queue: SqliteQueue) -> None:
    for message_id, priority in (("a", 0), ("b", 100), ("c", 0), ("d", 100), ("e", -5)):
        assert queue.put("requests", message_id, b"x", priority)
    assert ids(queue.take("requests", 10)) == ["b", "d", "a", "c", "e"]


def test_queues_of_one_file_do_not_mix(queue: SqliteQueue) -> None:
    queue.put("requests", "same", b"1")
    assert queue.put("results", "same", b"2")
    assert [d.body for d in queue.take("results", 5)] == [b"2"]


def test_a_known_id_is_accepted_once_even_after_its_acknowledgement(queue: SqliteQueue) -> None:
    assert queue.put("requests", "a", b"first")
    assert not queue.put("requests", "a", b"second")
    (delivery,) = queue.take("requests")
    assert delivery.body == b"first"
    assert queue.ack([delivery]) == 1
    assert not queue.put("requests", "a", b"third")
    assert queue.take("requests") == []


def test_an_id_may_be_forced_again(queue: SqliteQueue) -> None:
    queue.put("results", "a", b"x")
    queue.ack(queue.take("results"))
    assert queue.put_many("results", [Outgoing("a", b"x")], again=True) == 1
    assert queue.put_many("results", [Outgoing("a", b"x")], again=True) == 0, "a copy still waits"
    assert ids(queue.take("results", 5)) == ["a"]


def test_an_expired_lease_delivers_again_and_the_old_receipt_is_void(queue: SqliteQueue, clock: Clock) -> None:
    queue.put("requests", "a", b"x")
    (first,) = queue.take("requests", lease_s=10)
    assert queue.take("requests") == []
    clock.now += 10
    (second,) = queue.take("requests", lease_s=10)
    assert (first.deliveries, second.deliveries) == (1, 2)
    assert queue.ack([first]) == 0
    assert queue.ack([second]) == 1


def test_extending_a_lease_keeps_the_message_away_from_others(queue: SqliteQueue, clock: Clock) -> None:
    queue.put("requests", "a", b"x")
    taken = queue.take("requests", lease_s=10)
    clock.now += 9
    assert queue.extend(taken, 10) == 1
    clock.now += 9
    assert queue.take("requests") == []
    clock.now += 2
    assert queue.extend(queue.take("requests"), 10) == 1
    assert queue.extend(taken, 10) == 0


def test_a_reader_that_begins_anew_gets_what_it_had_taken_before(queue: SqliteQueue) -> None:
    queue.put("requests", "a", b"x")
    queue.put("results", "b", b"x")
    (old,) = queue.take("requests", lease_s=1000)
    queue.take("results", lease_s=1000)
    assert queue.release("requests") == 1
    (new,) = queue.take("requests")
    assert new.deliveries == 2
    assert queue.ack([old]) == 0
    assert queue.take("results") == []


def test_a_message_given_back_waits_for_its_delay(queue: SqliteQueue, clock: Clock) -> None:
    queue.put("requests", "a", b"x")
    queue.nack(queue.take("requests"), delay_s=5)
    assert queue.take("requests") == []
    assert queue.counts()["requests"]["delayed"] == 1
    clock.now += 5
    assert ids(queue.take("requests")) == ["a"]


def test_a_message_put_with_a_delay_is_not_delivered_before(queue: SqliteQueue, clock: Clock) -> None:
    queue.put("requests", "a", b"x", delay_s=5)
    assert queue.take("requests") == []
    clock.now += 5
    assert ids(queue.take("requests")) == ["a"]


def test_a_message_never_acknowledged_becomes_a_dead_letter(queue: SqliteQueue, clock: Clock) -> None:
    queue.put("requests", "poison", b"x", 7)
    queue.put("requests", "good", b"y")
    for _ in range(3):
        assert "poison" in ids(queue.take("requests", 5, lease_s=1))
        clock.now += 1
    assert queue.take("requests", 5) == []
    dead = {letter.message_id: letter for letter in queue.list_dead("requests")}
    assert dead["poison"].reason == "delivered 3 times and never acknowledged"
    assert (dead["poison"].body, dead["poison"].priority, dead["poison"].deliveries) == (b"x", 7, 3)


def test_a_buried_message_keeps_its_reason_and_can_be_put_back(queue: SqliteQueue) -> None:
    queue.put("requests", "a", b"x")
    assert queue.bury(queue.take("requests"), "not JSON") == 1
    assert queue.take("requests") == []
    assert not queue.put("requests", "a", b"x"), "a dead letter's id stays taken"
    assert queue.list_dead("requests")[0].reason == "not JSON"
    assert queue.requeue_dead("requests", "a")
    assert not queue.requeue_dead("requests", "a")
    (again,) = queue.take("requests")
    assert (again.body, again.deliveries) == (b"x", 1)
    assert queue.list_dead("requests") == []


def test_a_message_can_be_claimed_by_its_id_out_of_turn(queue: SqliteQueue) -> None:
    queue.put("requests", "a", b"x", 100)
    queue.put("requests", "b", b"y")
    assert queue.peek("requests", "b") is not None
    claimed = queue.claim("requests", "b")
    assert claimed is not None
    assert claimed.body == b"y"
    assert queue.claim("requests", "b") is None, "it is leased"
    assert queue.claim("requests", "c") is None
    assert ids(queue.take("requests", 5)) == ["a"]


def test_a_claim_waits_for_its_message(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db")
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.append(queue.claim("results", "mine", wait_s=60)))
    reader.start()
    queue.put("results", "another", b"x")
    queue.put("results", "mine", b"y")
    reader.join(30)
    assert [delivery.body for delivery in got] == [b"y"]
    assert queue.claim("results", "mine", wait_s=0.01) is None
    queue.close()


def test_a_result_queue_that_nobody_reads_keeps_its_newest_messages(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db", max_messages=5, keep_newest={"results": 10})
    for n in range(30):
        assert queue.put("results", str(n), b"x")
    assert ids(queue.take("results", 100)) == [str(n) for n in range(20, 30)]
    assert not queue.put("results", "3", b"x"), "the id of a dropped message stays known"
    queue.close()


def test_messages_survive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    code = (
        "import os, sys; from api.mq.sqlite import SqliteQueue\n"
        f"q = SqliteQueue({str(path)!r}); q.put('requests', 'a', b'x', 3); q.take('requests', lease_s=0); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    queue = SqliteQueue(path)
    (delivery,) = queue.take("requests", wait_s=5)
    assert (delivery.message_id, delivery.priority, delivery.deliveries) == ("a", 3, 2)
    queue.close()


def test_a_waiting_reader_wakes_for_a_put_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    queue = SqliteQueue(path)
    code = f"from api.mq.sqlite import SqliteQueue; SqliteQueue({str(path)!r}).put('requests', 'a', b'x')"
    writer = subprocess.Popen([sys.executable, "-c", code])
    assert ids(queue.take("requests", wait_s=30)) == ["a"]
    assert writer.wait(30) == 0
    queue.close()


def test_a_waiting_reader_gets_a_message_whose_lease_runs_out(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db")
    queue.put("requests", "a", b"x")
    queue.take("requests", lease_s=0.05)
    assert ids(queue.take("requests", wait_s=30)) == ["a"]
    queue.close()


def test_closing_wakes_a_waiting_reader(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db")
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.append(queue.take("requests", wait_s=60)))
    reader.start()
    queue.close()
    reader.join(30)
    assert got == [[]]


def test_concurrent_puts_and_takes_lose_and_double_nothing(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    queue = SqliteQueue(path)
    code = (
        "import sys; from api.mq.sqlite import SqliteQueue; from api.mq.port import Outgoing\n"
        f"q = SqliteQueue({str(path)!r})\n"
        "for i in range(50): q.put_many('requests', [Outgoing(f'{sys.argv[1]}-{i}-{k}', b'x') for k in range(4)])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(2)]

    def put(n: int) -> None:
        for i in range(50):
            assert queue.put("requests", f"t{n}-{i}", b"x")

    threads = [threading.Thread(target=put, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    seen: list[str] = []
    while len(seen) < 2 * 200 + 4 * 50:
        taken = queue.take("requests", 32, lease_s=300, wait_s=30)
        assert taken, f"only {len(seen)} messages arrived"
        seen += ids(taken)
        assert queue.ack(taken) == len(taken)
    for thread in threads:
        thread.join()
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert len(set(seen)) == len(seen) == 600
    assert queue.take("requests") == []
    queue.close()


def test_a_full_queue_and_a_large_message_are_refused_with_a_remedy(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db", max_messages=2, max_body_bytes=10)
    queue.put("requests", "a", b"x")
    queue.put("requests", "b", b"x")
    with pytest.raises(QueueRefused, match="holds 2 of 2"):
        queue.put("requests", "c", b"x")
    with pytest.raises(QueueRefused, match="file store"):
        queue.put("requests", "d", b"x" * 11)
    queue.ack(queue.take("requests"))
    assert queue.put("requests", "c", b"x")
    queue.close()


def test_a_storage_error_is_reported_and_nothing_is_claimed_to_be_stored(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db")
    queue._durable.execute("PRAGMA max_page_count = 1")
    with pytest.raises(QueueBroken, match="full"):
        for n in range(100):
            queue.put("requests", str(n), b"x" * 4000)
    queue.close()


def test_dead_letters_and_remembered_ids_are_bounded(tmp_path: Path) -> None:
    queue = SqliteQueue(tmp_path / "queue.db", max_dead=2, remember=2)
    for name in "abc":
        queue.put("requests", name, b"x")
        queue.bury(queue.take("requests"), "bad")
        queue.put("results", name, b"x")
        queue.ack(queue.take("results"))
    assert [letter.message_id for letter in queue.list_dead("requests")] == ["c", "b"]
    assert queue.put("results", "a", b"x"), "the oldest id was forgotten"
    assert not queue.put("results", "c", b"x")
    queue.close()
