"""How fast the embedded queue is, beside a bare sqlite3 loop that does the same.

    python -m examples.benchmark [--tasks 50000] [--concurrency 100] [--rounds 5]

One process publishes no-op tasks to a new file, in lists of 100; another drains it. The bare loop has the same schema,
the same rows in batches of the same size, the same durability (synchronous=FULL to publish, NORMAL to claim and
delete), and nothing around them: no JSON, no event loop, no tasks. Rounds alternate, so that both meet the same
machine; the figures are medians, in messages a second. Each round checks that every task ran exactly once.
"""

import argparse
import asyncio
import multiprocessing
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import boilermaker
from boilermaker import Boilermaker, LocalServiceBus

BATCH = 100


def application(path: str) -> Boilermaker:
    app = Boilermaker([], LocalServiceBus(path))

    @app.task
    async def noop(state: list[int], number: int) -> None:
        state.append(number)

    return app


def publish(path: str, count: int) -> float:
    """Publish through boilermaker; messages a second."""

    async def main() -> float:
        async with application(path) as app:
            noop = app.registration("noop")
            assert noop is not None
            batches = [
                [app.create_task(noop.function, number) for number in range(start, start + BATCH)]
                for start in range(0, count, BATCH)
            ]
            started = time.perf_counter()
            for batch in batches:
                await app.publish_many(batch)
            return count / (time.perf_counter() - started)

    return asyncio.run(main())


def drain(path: str, count: int, concurrency: int) -> float:
    """Run all that is on the queue; messages a second."""

    async def main() -> float:
        async with application(path) as app:
            await app.service_bus_client.peek(1)
            started = time.perf_counter()
            await app.run(concurrency=concurrency, burst=True)
            seconds = time.perf_counter() - started
            if sorted(app.state) != list(range(count)):
                sys.exit(f"{len(app.state)} tasks ran of {count}")
            return count / seconds

    return asyncio.run(main())


def bare(path: str, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute("PRAGMA secure_delete = OFF")
    return connection


def bare_publish(path: str, count: int) -> float:
    """Insert the same rows by a loop."""
    connection = bare(path, "FULL")
    connection.executescript(boilermaker.SCHEMA)
    body = boilermaker.encode(boilermaker.Task(function_name="noop", args=[count]), "tasks", "tasks")
    started = time.perf_counter()
    for _ in range(0, count, BATCH):
        now = time.time()
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            """
            INSERT INTO message (queue_id, state, due, enqueued_time, message_id, body)
            VALUES              (1,        1,     ?,   ?,             ?,          ?)
            """,
            [(now, now, "5d3b1a0e-6f1c-4b39-9d3b-0d7b1f6a6c11", body)] * BATCH,
        )
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return count / seconds


def bare_drain(path: str, count: int, concurrency: int) -> float:
    """Claim and delete the same rows by a loop, as many at a time as the worker holds."""
    connection = bare(path, "NORMAL")
    done = 0
    started = time.perf_counter()
    while True:
        now = time.time()
        connection.execute("BEGIN IMMEDIATE")
        rows = connection.execute(
            """
            UPDATE message
            SET    state = 0, due = ?, delivery_count = delivery_count + 1
            WHERE  sequence_number IN (
                       SELECT   sequence_number
                       FROM     message
                       WHERE    queue_id = 1 AND state IN (0, 1) AND due <= ?
                       ORDER BY state, due
                       LIMIT    ?
                   )
            RETURNING sequence_number, delivery_count, message_id, body, application_properties, expires
            """,
            (now + 10, now, concurrency),
        ).fetchall()
        connection.execute("COMMIT")
        if not rows:
            break
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "DELETE FROM message WHERE sequence_number = ? AND delivery_count = ? AND state = 0",
            [row[:2] for row in rows],
        )
        connection.execute("COMMIT")
        done += len(rows)
    seconds = time.perf_counter() - started
    connection.close()
    if done != count:
        sys.exit(f"{done} rows claimed of {count}")
    return count / seconds


def in_a_process(function: Callable[..., float], *arguments: object) -> float:
    """Call in a process of its own, as users do."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def one_round(tasks: int, concurrency: int) -> tuple[float, float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = str(Path(folder, "ours.db")), str(Path(folder, "bare.db"))
        return (
            in_a_process(publish, ours, tasks),
            in_a_process(bare_publish, theirs, tasks),
            in_a_process(drain, ours, tasks, concurrency),
            in_a_process(bare_drain, theirs, tasks, concurrency),
        )


def row(name: str, ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Medians, and the median of the rounds' ratios."""
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return f"{name:<12} {statistics.median(ours):>12,.0f} {statistics.median(theirs):>12,.0f} {ratio:>8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded queue beside a bare sqlite3 loop.")
    parser.add_argument("--tasks", type=int, default=50_000)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tasks = options.tasks // BATCH * BATCH or BATCH
    rounds = [one_round(tasks, options.concurrency) for _ in range(options.rounds)]
    published, bare_published, drained, bare_drained = zip(*rounds, strict=True)
    print(f"{'':<12} {'boilermaker':>12} {'bare sqlite3':>12} {'ratio':>8}")
    print(row("publish", published, bare_published))
    print(row("drain", drained, bare_drained))


if __name__ == "__main__":
    main()
