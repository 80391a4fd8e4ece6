# mypy: disable-error-code="import-not-found,import-untyped"
# pyright: basic, reportMissingImports=false
"""What `examples.benchmark` compares: boilermaker, a bare sqlite3 loop and other task runners, behind the same methods.

    python -m examples.peers                    # lists them, with their settings, and says which are installed

Each is a class with `publish`, `publish_many` and `work`. All run the same three tasks, of one int argument, which
write the time to a `Ledger`: a no-op, one that sleeps 0.1 s, and one that holds its worker. The tasks are `async def`
where the runner awaits coroutines, plain functions where it runs threads. Every library is imported where it is used,
so that a process holds no more than its own. Every process of the benchmark plays one of the roles at the end, which
print JSON.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import logging
import math
import mmap
import os
import statistics
import sys
import time
import types
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

BATCH = 100
NAP = 0.1
DOZE = 0.01
FOREVER = 3600
MOMENT = 0.001


# -- the tasks


class Ledger:
    """When each task was published, first run and last run again, by the clock that a machine's processes share.

    A file that all of them map, of three numbers a task: a stamp costs 0.2 microseconds and survives a `kill -9`.
    """

    def __init__(self, path: str, count: int) -> None:
        with Path(path).open("r+b") as file:
            times = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        self.published, self.first, self.again = (times[start * count : (start + 1) * count] for start in range(3))

    @classmethod
    def create(cls, path: str, count: int) -> Ledger:
        Path(path).write_bytes(bytes(3 * 8 * count))
        return cls(path, count)

    def stamp(self, number: int) -> None:
        (self.again if self.first[number] else self.first)[number] = time.monotonic()


ledger: Ledger


def noop(number: int) -> None:
    ledger.stamp(number)


def nap(number: int) -> None:
    time.sleep(NAP)
    ledger.stamp(number)


def hold(number: int) -> None:
    """End only when it is run again."""
    ledger.stamp(number)
    if not ledger.again[number]:
        time.sleep(FOREVER)


async def async_noop(number: int) -> None:
    ledger.stamp(number)


async def async_nap(number: int) -> None:
    await asyncio.sleep(NAP)
    ledger.stamp(number)


async def async_hold(number: int) -> None:
    ledger.stamp(number)
    if not ledger.again[number]:
        await asyncio.sleep(FOREVER)


async def async_doze(number: int) -> None:
    await asyncio.sleep(DOZE)
    ledger.stamp(number)


PLAIN = {"noop": noop, "nap": nap, "hold": hold}
ASYNC = {"noop": async_noop, "nap": async_nap, "hold": async_hold, "doze": async_doze}


def with_context(run: Callable[[int], Coroutine[Any, Any, None]]) -> Callable[[Any, int], Coroutine[Any, Any, None]]:
    """The task for runners that pass something of their own first."""

    async def call(context: Any, number: int) -> None:
        await run(number)

    return call


# -- the peers


class Peer:
    """A task runner.

    Args:
        place: the URL of its server, or the path of its file.
    """

    label: ClassVar[str]
    module: ClassVar[str]
    setting: ClassVar[str]
    server: ClassVar[str] = "redis"  # or postgres, rabbitmq, azure, file
    bulk: ClassVar[str] = ""  # its best way to publish many tasks; none if it has nothing better than a loop
    concurrency: ClassVar[int] = 100  # with which no-op tasks are the fastest
    parallel: ClassVar[bool] = True  # whether a worker process can run several tasks at once

    def __init__(self, place: str) -> None:
        self.place = place

    async def reach(self) -> str:
        """Why its server cannot be used, or nothing."""
        return ""

    async def clear(self) -> None:
        """Delete all that is on the queue."""

    async def remove(self) -> None:
        """Delete all that was ever made on the server."""
        await self.clear()

    async def open(self) -> None:
        """Prepare for publishing."""

    async def publish(self, task: str, number: int) -> None:
        raise NotImplementedError

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        raise NotImplementedError

    async def close(self) -> None: ...

    def work(self, concurrency: int) -> None:
        """Run tasks until killed."""
        raise NotImplementedError


class Boilermaker(Peer):
    label = "boilermaker"
    module = "boilermaker"
    server = "file"
    setting = "synchronous=FULL to publish; concurrency 100 unless it says otherwise"
    bulk = "publish_many"

    def __init__(self, place: str) -> None:
        import boilermaker

        super().__init__(place)
        self.app = boilermaker.Boilermaker(None, self.bus())
        self.tasks = {name: self.app.task(name=name)(with_context(run)) for name, run in ASYNC.items()}

    def bus(self) -> Any:
        import boilermaker

        return boilermaker.LocalServiceBus(self.place)

    async def publish(self, task: str, number: int) -> None:
        await self.tasks[task].delay(number)

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        signature = self.tasks[task].si
        await self.app.publish_many([signature(number) for number in numbers])

    async def close(self) -> None:
        await self.app.close()

    def work(self, concurrency: int) -> None:
        asyncio.run(self.app.run(concurrency=concurrency))


class Bare(Peer):
    """boilermaker's tables and rows, its batches and its durability, without JSON, event loop or tasks."""

    label = "bare sqlite3 loop"
    module = "sqlite3"
    server = "file"
    setting = "boilermaker's schema, rows and batches; FULL to publish, NORMAL to claim and to delete"
    bulk = "executemany"

    def connect(self, synchronous: str) -> None:
        import sqlite3

        self.connection = sqlite3.connect(self.place, isolation_level=None)
        for pragma in ("journal_mode = WAL", f"synchronous = {synchronous}", "secure_delete = OFF"):
            self.connection.execute(f"PRAGMA {pragma}")

    async def open(self) -> None:
        import boilermaker

        self.connect("FULL")
        self.connection.executescript(";".join(boilermaker.MIGRATIONS))
        self.body = boilermaker.encode(boilermaker.Task(function_name="noop", args=[12345]), "tasks", "tasks")

    async def publish(self, task: str, number: int) -> None:
        await self.publish_many(task, [number])

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        now = time.time()
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(
            """
            INSERT INTO message (queue_id, state, due, enqueued_time, message_id, body)
            VALUES              (1,        1,     ?,   ?,             ?,          ?)
            """,
            [(now, now, "5d3b1a0e-6f1c-4b39-9d3b-0d7b1f6a6c11", self.body)] * len(numbers),
        )
        self.connection.execute("COMMIT")

    async def close(self) -> None:
        self.connection.close()

    def work(self, concurrency: int) -> None:
        self.connect("NORMAL")
        while rows := self.claim(concurrency):
            for row in rows:
                ledger.stamp(row[0] - 1)
            self.delete(rows)
        time.sleep(FOREVER)

    def claim(self, limit: int) -> list[Any]:
        import boilermaker

        now = time.time()
        self.connection.execute("BEGIN IMMEDIATE")
        rows = self.connection.execute(boilermaker.SELECT_DUE, (1, now, limit)).fetchall()
        self.connection.execute(boilermaker.LOCK_DUE, (now + 10, 1, now, limit))
        self.connection.execute("COMMIT")
        return rows

    def delete(self, rows: Sequence[Any]) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(
            "DELETE FROM message WHERE sequence_number = ? AND delivery_count = ? AND state = 0",
            [(number, count + 1) for number, count, *_ in rows],
        )
        self.connection.execute("COMMIT")


class OnRedis(Peer):
    """Of those on Redis: the database has to be empty before, and is emptied between measurements."""

    async def reach(self) -> str:
        import redis

        with redis.Redis.from_url(self.place) as client:
            keys = client.dbsize()
        return f"the Redis database {self.place} holds {keys} keys: give an empty one" if keys else ""

    async def clear(self) -> None:
        import redis

        with redis.Redis.from_url(self.place) as client:
            client.flushdb()


class HueyOnSqlite(Peer):
    label = "huey, SQLite"
    module = "huey"
    server = "file"
    setting = "one thread (-w 1), no results, SQLite's default synchronous=FULL; polls every 10 ms (-d 0.01 -m 0.01)"
    concurrency = 1

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.huey = self.make()
        self.tasks = {name: self.huey.task(name=name)(run) for name, run in PLAIN.items()}

    def make(self) -> Any:
        from huey import SqliteHuey

        return SqliteHuey(filename=self.place, results=False)

    async def publish(self, task: str, number: int) -> None:
        self.tasks[task](number)

    def work(self, concurrency: int) -> None:
        self.huey.create_consumer(workers=concurrency, periodic=False, initial_delay=0.01, max_delay=0.01).run()


class HueyOnRedis(HueyOnSqlite, OnRedis):
    label = "huey, Redis"
    server = "redis"
    setting = "one thread (-w 1), no results, blocking reads"

    def make(self) -> Any:
        from huey import RedisHuey

        return RedisHuey(url=self.place, results=False)


class Pgqueuer(Peer):
    label = "pgqueuer, PostgreSQL"
    module = "pgqueuer"
    server = "postgres"
    setting = "asyncpg, uvloop; batches of 500, 1,000 tasks at once (50 and 100 for tasks that sleep)"
    bulk = "enqueue of lists"
    concurrency = 1000

    async def reach(self) -> str:
        await self.open()
        installed = await self.queries.schema_is_installed()
        return f"{self.place} has pgqueuer's tables already: give another database" if installed else ""

    async def clear(self) -> None:
        await self.open()
        if await self.queries.schema_is_installed():
            await self.queries.uninstall()
        await self.queries.install()
        await self.close()

    async def remove(self) -> None:
        await self.open()
        await self.queries.uninstall()
        await self.close()

    async def open(self) -> None:
        import asyncpg
        from pgqueuer import AsyncpgDriver, Queries

        self.connection = await asyncpg.connect(self.place)
        self.queries = Queries(AsyncpgDriver(self.connection))

    async def publish(self, task: str, number: int) -> None:
        await self.queries.enqueue(task, b"%d" % number)

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        await self.queries.enqueue([task] * len(numbers), [b"%d" % number for number in numbers], [0] * len(numbers))

    async def close(self) -> None:
        await self.connection.close()

    def work(self, concurrency: int) -> None:
        run_fast(self.worker(concurrency))

    async def worker(self, concurrency: int) -> None:
        import asyncpg
        from pgqueuer import PgQueuer

        app = PgQueuer.from_asyncpg_connection(await asyncpg.connect(self.place))
        for name, run in ASYNC.items():
            app.entrypoint(name)(with_job(run))
        await app.run(batch_size=max(1, concurrency // 2), max_concurrent_tasks=concurrency)


def with_job(run: Callable[[int], Coroutine[Any, Any, None]]) -> Callable[[Any], Coroutine[Any, Any, None]]:
    async def call(job: Any) -> None:
        await run(int(job.payload))

    return call


class Dramatiq(OnRedis):
    label = "dramatiq, Redis"
    module = "dramatiq"
    setting = "16 threads (100 for tasks that sleep)"
    concurrency = 16

    def __init__(self, place: str) -> None:
        import dramatiq
        from dramatiq.brokers.redis import RedisBroker

        super().__init__(place)
        make: Any = RedisBroker
        self.broker = make(url=place)
        self.tasks = {name: dramatiq.actor(actor_name=name, broker=self.broker)(run) for name, run in PLAIN.items()}

    async def publish(self, task: str, number: int) -> None:
        self.tasks[task].send(number)

    def work(self, concurrency: int) -> None:
        from dramatiq import Worker

        Worker(self.broker, worker_threads=concurrency).start()
        time.sleep(FOREVER)


class CeleryOnRedis(OnRedis):
    label = "Celery, Redis"
    module = "celery"
    setting = "solo pool (threads for tasks that sleep), prefetch 100, results ignored, no gossip, mingle or heartbeat"
    concurrency = 1

    def __init__(self, place: str) -> None:
        import celery

        super().__init__(place)
        self.app: Any = celery.Celery("benchmark", broker=place)
        self.app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=100)
        self.tasks = {name: self.app.task(name=name)(run) for name, run in PLAIN.items()}

    async def publish(self, task: str, number: int) -> None:
        self.tasks[task].delay(number)

    def work(self, concurrency: int) -> None:
        pool = ["--pool=solo"] if concurrency == 1 else ["--pool=threads", f"--concurrency={concurrency}"]
        quiet = ["--loglevel=ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        self.app.worker_main(["worker", *pool, *quiet])


class CeleryOnRabbitMQ(CeleryOnRedis):
    label = "Celery, RabbitMQ"
    server = "rabbitmq"

    async def reach(self) -> str:
        with self.app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)
        return ""

    async def clear(self) -> None:
        with self.app.connection_for_write() as connection:
            connection.default_channel.queue_delete("celery")


class Taskiq(OnRedis):
    label = "taskiq, Redis"
    module = "taskiq_redis"
    setting = "RedisStreamBroker (which acknowledges), uvloop, 100 async tasks, prefetch 100, no parsing of parameters"
    bulk = "100 coroutines"

    def __init__(self, place: str) -> None:
        from taskiq_redis import RedisStreamBroker

        super().__init__(place)
        self.broker = RedisStreamBroker(place)
        self.tasks = {name: self.broker.register_task(run, task_name=name) for name, run in ASYNC.items()}

    async def open(self) -> None:
        await self.broker.startup()

    async def publish(self, task: str, number: int) -> None:
        await self.tasks[task].kiq(number)

    async def close(self) -> None:
        await self.broker.shutdown()

    def work(self, concurrency: int) -> None:
        from taskiq.api import run_receiver_task

        options: dict[str, Any] = {"max_async_tasks": concurrency, "max_prefetch": BATCH, "validate_params": False}
        run_fast(run_receiver_task(self.broker, run_startup=True, **options))


class Saq(OnRedis):
    label = "SAQ, Redis"
    module = "saq"
    setting = "10 jobs at once, the default (100 for tasks that sleep), nothing kept of a job that ended (ttl=-1)"
    bulk = "100 coroutines"
    concurrency = 10

    async def open(self) -> None:
        from saq import Queue

        make: Any = Queue.from_url
        self.queue = make(self.place)
        await self.queue.connect()

    async def publish(self, task: str, number: int) -> None:
        await self.queue.enqueue(task, number=number, ttl=-1)

    async def close(self) -> None:
        await self.queue.disconnect()

    def work(self, concurrency: int) -> None:
        asyncio.run(self.worker(concurrency))

    async def worker(self, concurrency: int) -> None:
        from saq import Queue, Worker

        functions: Any = [(name, with_context(run)) for name, run in ASYNC.items()]
        await Worker(Queue.from_url(self.place), functions, concurrency=concurrency).start()


class Arq(OnRedis):
    label = "arq, Redis"
    module = "arq"
    setting = "10 jobs at once, the default (100 for tasks that sleep), keep_result=0, polls every 10 ms (poll_delay)"
    bulk = "100 coroutines"
    concurrency = 10

    async def open(self) -> None:
        from arq import create_pool
        from arq.connections import RedisSettings

        self.pool = await create_pool(RedisSettings.from_dsn(self.place))

    async def publish(self, task: str, number: int) -> None:
        await self.pool.enqueue_job(task, number)

    async def close(self) -> None:
        await self.pool.aclose()

    def work(self, concurrency: int) -> None:
        asyncio.run(self.worker(concurrency))

    async def worker(self, concurrency: int) -> None:
        from arq.connections import RedisSettings
        from arq.worker import Worker, func

        make: Any = func
        functions = [make(with_context(run), name=name) for name, run in ASYNC.items()]
        settings = RedisSettings.from_dsn(self.place)
        await Worker(functions, redis_settings=settings, max_jobs=concurrency, poll_delay=0.01, keep_result=0).main()


class Streaq(OnRedis):
    label = "streaq, Redis"
    module = "streaq"
    setting = "1,000 tasks at once (100 that sleep), uvloop, no results (ttl=0), silent"
    bulk = "enqueue_many"
    concurrency = 1000

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.make(self.concurrency)

    def make(self, concurrency: int) -> None:
        from streaq import Worker

        options = {"use_uvloop": importlib.util.find_spec("uvloop") is not None}
        self.worker: Any = Worker(redis_url=self.place, concurrency=concurrency, anyio_kwargs=options)
        self.tasks = {name: self.worker.task(name=name, ttl=0, silent=True)(run) for name, run in ASYNC.items()}

    async def open(self) -> None:
        await self.worker.__aenter__()

    async def publish(self, task: str, number: int) -> None:
        await self.tasks[task].enqueue(number)

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        enqueue = self.tasks[task].enqueue
        await self.worker.enqueue_many([enqueue(number) for number in numbers])

    async def close(self) -> None:
        await self.worker.__aexit__(None, None, None)

    def work(self, concurrency: int) -> None:
        self.make(concurrency)
        self.worker.run_sync()


class Rq(OnRedis):
    label = "RQ, Redis"
    module = "rq"
    setting = "SimpleWorker (no fork for each job), results not kept (result_ttl=0)"
    bulk = "enqueue_many"
    concurrency = 1
    parallel = False

    def __init__(self, place: str) -> None:
        import redis
        import rq

        super().__init__(place)
        self.queue = rq.Queue(connection=redis.Redis.from_url(place))

    async def publish(self, task: str, number: int) -> None:
        self.queue.enqueue(PLAIN[task], number, result_ttl=0)

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        prepare = self.queue.prepare_data
        self.queue.enqueue_many([prepare(PLAIN[task], [number], result_ttl=0) for number in numbers])

    def work(self, concurrency: int) -> None:
        import rq

        rq.SimpleWorker([self.queue], connection=self.queue.connection).work(logging_level="WARNING")


def run_fast(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed, as the peer's own command line does."""
    if importlib.util.find_spec("uvloop") is None:
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


class BoilermakerOnAzure(Boilermaker):
    label = "boilermaker, Azure bus"
    module = "azure.servicebus"
    server = "azure"
    setting = "its defaults"
    concurrency = 32

    def bus(self) -> Any:
        import boilermaker

        return boilermaker.AzureServiceBus.from_connection_string(self.place, "tasks")

    async def ask(self, number: int) -> None:
        task = await self.tasks["noop"].options(result_ttl=60).delay(number)
        await task.result(timeout=60)


class BareSdk(Peer):
    """What one would write by hand: receive as many as may run, run and settle them at once, and again."""

    label = "bare SDK loop"
    module = "azure.servicebus"
    server = "azure"
    setting = "socket_timeout=0.02, the best of 0.2, 0.02 and 0.005; settlements gathered"
    bulk = "send_messages of lists"
    concurrency = 32

    async def open(self) -> None:
        from azure.servicebus.aio import ServiceBusClient

        import boilermaker

        self.body = boilermaker.encode(boilermaker.Task(function_name="TASK", args=[12345]), "tasks", "tasks")
        self.client = ServiceBusClient.from_connection_string(self.place)
        self.sender = await self.client.get_queue_sender("tasks").__aenter__()
        self.replies: Any = None

    async def publish(self, task: str, number: int) -> None:
        await self.publish_many(task, [number])

    async def publish_many(self, task: str, numbers: Sequence[int]) -> None:
        from azure.servicebus import ServiceBusMessage

        body = self.body.replace("TASK", task)
        bodies = [body.replace("12345", str(number)) for number in numbers]
        await self.sender.send_messages([ServiceBusMessage(body, message_id=str(uuid.uuid4())) for body in bodies])

    async def ask(self, number: int) -> None:
        """Request and response by a session, as the service's documentation has them; one reply at a time."""
        from azure.servicebus import ServiceBusMessage

        if self.replies is None:
            receiver = self.client.get_queue_receiver("tasks-replies", session_id=str(uuid.uuid4()))
            self.replies = await receiver.__aenter__()
        body = self.body.replace("TASK", "noop").replace("12345", str(number))
        session_id = self.replies.session.session_id
        await self.sender.send_messages(ServiceBusMessage(body, reply_to_session_id=session_id))
        [reply] = await self.replies.receive_messages(1)
        await self.replies.complete_message(reply)

    async def close(self) -> None:
        if self.replies is not None:
            await self.replies.close()
        await self.sender.close()
        await self.client.close()

    def work(self, concurrency: int) -> None:
        asyncio.run(self.loop(concurrency))

    async def loop(self, concurrency: int) -> None:
        from azure.servicebus import ServiceBusMessage
        from azure.servicebus.aio import ServiceBusClient

        async with (
            ServiceBusClient.from_connection_string(self.place) as client,
            client.get_queue_receiver("tasks", socket_timeout=0.02) as receiver,
            client.get_queue_sender("tasks-replies") as replies,
        ):

            async def handle(message: Any) -> None:
                task = json.loads(str(message))
                await ASYNC[task["function_name"]](*task["payload"]["args"])
                if message.reply_to_session_id is not None:
                    reply = ServiceBusMessage("null", session_id=message.reply_to_session_id)
                    await replies.send_messages(reply)
                await receiver.complete_message(message)

            while True:
                messages = await receiver.receive_messages(concurrency, max_wait_time=5)
                await asyncio.gather(*map(handle, messages))


class Original(BareSdk):
    """Publishes nothing: it runs what boilermaker published."""

    label = "boilermaker-servicebus 1.4.1"
    module = "aio_azure_clients_toolbox"
    setting = "one task after the other, as it has it"
    bulk = ""

    def work(self, concurrency: int) -> None:
        asyncio.run(self.run())

    async def run(self) -> None:
        from azure.servicebus.aio import ServiceBusClient

        here = str(Path(__file__).resolve().parent.parent)
        sys.path[:] = [path for path in sys.path if path not in ("", here)]  # where another boilermaker is
        from boilermaker.app import Boilermaker as OriginalBoilermaker

        client = ServiceBusClient.from_connection_string(self.place)
        bus: Any = types.SimpleNamespace(get_receiver=lambda: client.get_queue_receiver("tasks"))
        app: Any = OriginalBoilermaker(client, bus)  # a state there has to be, though not used here
        for name, run in ASYNC.items():
            function = with_context(run)
            function.__name__ = name
            app.register_async(function)
        await app.run()


AZURE_PEERS = (BoilermakerOnAzure, BareSdk, Original)

PEERS: dict[str, type[Peer]] = {
    peer.__name__: peer
    for peer in (
        Boilermaker,
        Bare,
        HueyOnSqlite,
        HueyOnRedis,
        Pgqueuer,
        Dramatiq,
        CeleryOnRedis,
        CeleryOnRabbitMQ,
        Taskiq,
        Saq,
        Arq,
        Streaq,
        Rq,
        *AZURE_PEERS,
    )
}


# -- the roles: what a process of the benchmark does, and the JSON that it prints


def check(peer: str, place: str) -> str:
    """Why a peer cannot run, or nothing."""
    if importlib.util.find_spec(PEERS[peer].module) is None:
        return "not installed"
    try:
        return asyncio.run(PEERS[peer](place).reach())
    except Exception as error:
        return f"no answer from {place} ({type(error).__name__})"


def remove(peer: str, place: str) -> None:
    asyncio.run(PEERS[peer](place).remove())


def fill(peer: str, place: str, task: str, count: int) -> None:
    """Empty the queue and publish tasks, numbered from 0, as fast as it goes."""
    asyncio.run(_fill(PEERS[peer](place), task, count))


async def _fill(peer: Peer, task: str, count: int) -> None:
    await peer.clear()
    await peer.open()
    await publishing(peer, "many" if peer.bulk else "one")(task, range(count))
    await peer.close()


def publish(peer: str, place: str, how: str, start: int, count: int, clear: bool = True) -> dict[str, float]:
    """Publish no-op tasks, after one that warms up: how many a second, and the peak of the memory in MB.

    Args:
        how: one, each awaited before the next; many, in lists of 100; or crowd, by 100 coroutines at once.
    """
    return asyncio.run(_publish(PEERS[peer](place), how, start, count, clear))


async def _publish(peer: Peer, how: str, start: int, count: int, clear: bool) -> dict[str, float]:
    if clear:
        await peer.clear()
    await peer.open()
    await peer.publish("noop", start)
    send = publishing(peer, how)
    started = time.perf_counter()
    await send("noop", range(start + 1, start + 1 + count))
    seconds = time.perf_counter() - started
    await peer.close()
    return {"rate": count / seconds, "memory": peak_memory("self")}


def request(peer: str, place: str, start: int, count: int) -> list[float]:
    """Await the results of no-op tasks on Azure, each when the one before is there; the seconds that each took."""
    return asyncio.run(_request(PEERS[peer](place), start, count))


async def _request(peer: Any, start: int, count: int) -> list[float]:
    await peer.open()
    seconds = []
    for number in range(start, start + count):
        started = time.perf_counter()
        await peer.ask(number)
        seconds.append(time.perf_counter() - started)
    await peer.close()
    return seconds


def publishing(peer: Peer, how: str) -> Callable[[str, range], Coroutine[Any, Any, None]]:
    if how == "crowd" or (how == "many" and peer.bulk == "100 coroutines"):
        return lambda task, numbers: _by_a_crowd(peer, task, iter(numbers))
    return lambda task, numbers: (_in_lists if how == "many" else _one_by_one)(peer, task, numbers)


async def _one_by_one(peer: Peer, task: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        await peer.publish(task, number)


async def _in_lists(peer: Peer, task: str, numbers: range) -> None:
    for start in range(0, len(numbers), BATCH):
        await peer.publish_many(task, numbers[start : start + BATCH])


async def _by_a_crowd(peer: Peer, task: str, numbers: Iterator[int]) -> None:
    await asyncio.gather(*(_one_by_one(peer, task, numbers) for _ in range(BATCH)))


def drip(peer: str, place: str, path: str, count: int, pace: float) -> None:
    """Publish the tasks from 1 on, so many a second, and write down when."""
    asyncio.run(_drip(PEERS[peer](place), Ledger(path, count), count, pace))


async def _drip(peer: Peer, times: Ledger, count: int, pace: float) -> None:
    await peer.open()
    started = time.monotonic()
    for number in range(1, count):
        await asyncio.sleep(started + number / pace - time.monotonic())
        times.published[number] = time.monotonic()
        await peer.publish("noop", number)
    await peer.close()


def ask(peer: str, place: str, path: str, one_by_one: int, together: int) -> dict[str, float]:
    """Publish the tasks from 1 on and await results, while a worker in another process runs them: what it takes."""
    return asyncio.run(_ask(Boilermaker(place), Ledger(path, 1 + one_by_one + 2 * together), one_by_one, together))


async def _ask(peer: Boilermaker, times: Ledger, one_by_one: int, together: int) -> dict[str, float]:
    noop, numbers, took = peer.tasks["noop"].options(result_ttl=60), itertools.count(1), []
    for _ in range(one_by_one):
        started = time.perf_counter()
        await (await noop.delay(next(numbers))).result(FOREVER)
        took.append(time.perf_counter() - started)

    started = time.monotonic()
    without = [peer.tasks["noop"].si(next(numbers)) for _ in range(together)]
    await peer.app.publish_many(without)
    while not all(times.first[one_by_one + 1 : one_by_one + 1 + together]):
        await asyncio.sleep(DOZE)
    seconds_without = max(times.first[one_by_one + 1 : one_by_one + 1 + together]) - started

    started = time.monotonic()
    published = await peer.app.publish_many([noop.si(next(numbers)) for _ in range(together)])
    await asyncio.gather(*(task.result(FOREVER) for task in published))
    seconds = time.monotonic() - started
    await peer.close()
    percentile = sorted(took)[math.ceil(0.99 * len(took)) - 1]
    figures = {"p50": statistics.median(took) * 1000, "p99": percentile * 1000}
    return figures | {"without": seconds_without * 1000, "together": seconds * 1000}


def join(peer: str, place: str, path: str, count: int) -> dict[str, float]:
    """Publish no-op tasks from 1 on, then as many as one group; the ms to the last run, and to the group's result."""
    return asyncio.run(_join(PEERS[peer](place), Ledger(path, 1 + 2 * count), count))


async def _join(peer: Any, times: Ledger, count: int) -> dict[str, float]:
    noop = peer.tasks["noop"]
    await peer.open()
    await noop.map([0]).publish()  # where groups are joined by a worker, it begins to do so
    started = time.monotonic()
    await peer.app.publish_many([noop.si(number) for number in range(1, 1 + count)])
    while not all(times.first[1 : 1 + count]):
        await asyncio.sleep(DOZE)
    plain = max(times.first[1 : 1 + count]) - started
    started = time.monotonic()
    published = await noop.map(range(1 + count, 1 + 2 * count)).publish(result_ttl=60)
    await published.result(FOREVER)
    joined = time.monotonic() - started
    await peer.close()
    return {"plain": plain * 1000, "group": joined * 1000}


def work(peer: str, place: str, path: str, count: int, concurrency: int, at: float = 0, log: bool = False) -> None:
    """Run tasks until killed.

    Args:
        at: when to begin, by the ledger's clock, so that several begin together.
        log: log from level INFO on, by a StreamHandler on the standard error, which is a file here.
    """
    global ledger
    ledger = Ledger(path, count)
    if log:
        logging.basicConfig(level=logging.INFO)
    runner = PEERS[peer](place)
    time.sleep(max(0, at - time.monotonic()))
    runner.work(concurrency)


def grow(peer: str, place: str, waiting: int, scheduled: int, dead: int, expired: int = 0) -> None:
    """Fill boilermaker's file by SQL: messages that wait, are scheduled, were dead-lettered, and have expired."""
    import boilermaker

    asyncio.run(_fill(PEERS[peer](place), "noop", 0))
    store = boilermaker.Store(place)
    store.open_queue("tasks", boilermaker.QueueSettings())
    store.open_queue(boilermaker.dead_letter_queue("tasks"), boilermaker.QueueSettings(None))
    store.close()
    bare = Bare(place)
    bare.connect("NORMAL")
    for queue_id, numbers, delay, reason, expires in (
        (1, range(waiting), 0, None, None),
        (1, range(scheduled), 86400, None, None),
        (2, range(dead), 0, "TaskFailed", None),
        (1, range(expired), 0, None, time.time()),
    ):
        bare.connection.execute("BEGIN IMMEDIATE")
        bare.connection.executemany(
            """
            INSERT INTO message (queue_id, state, due, enqueued_time, scheduled_enqueue_time, message_id, body,
                                 dead_letter_reason, dead_letter_error_description, expires)
            VALUES              (?,        1,     ?,   ?,             ?,                      ?,          ?,
                                 ?,                  ?,                             ?)
            """,
            _rows(queue_id, numbers, delay, reason, expires),
        )
        bare.connection.execute("COMMIT")
    bare.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _rows(
    queue_id: int, numbers: range, delay: float, reason: str | None, expires: float | None
) -> Iterator[tuple[Any, ...]]:
    import boilermaker

    description = reason and "ValueError: a message such as errors have"
    for number in numbers:
        task, due = boilermaker.Task(function_name="noop", args=[number]), time.time() + delay
        body = boilermaker.encode(task, "tasks", "tasks")
        yield queue_id, due, due, due if delay else None, task.task_id, body, reason, description, expires


def bystand(peer: str, place: str, path: str, count: int, gaps: str, pace: float) -> None:
    """Work, or publish so many no-op tasks a second, until killed, and write down the longest gap in the event loop.

    Args:
        path: of the ledger for `count` tasks, of which the last is the one that is published again and again.
        gaps: the path of another, for one; who reads it sets it to 0.
        pace: 0 to work.
    """
    global ledger
    ledger = Ledger(path, count)
    asyncio.run(_bystand(Boilermaker(place), Ledger(gaps, 1), count - 1, pace))


async def _bystand(peer: Boilermaker, gaps: Ledger, number: int, pace: float) -> None:
    noting = asyncio.create_task(note_gaps(gaps))
    if not pace:
        await peer.app.run(concurrency=peer.concurrency)
    while not noting.done():
        await peer.publish("noop", number)
        await asyncio.sleep(1 / pace)


async def note_gaps(gaps: Ledger) -> None:
    """Since when, and for how long at most, the event loop kept a coroutine that sleeps for a moment waiting."""
    gaps.published[0] = time.monotonic()
    while True:
        before = time.monotonic()
        await asyncio.sleep(MOMENT)
        gaps.first[0] = max(gaps.first[0], time.monotonic() - before - MOMENT)


def operate(peer: str, place: str, gaps: str, by: str) -> dict[str, float]:
    """Count and replay all dead letters, as an operator's process does beside the others: what it takes."""
    return asyncio.run(_operate(Boilermaker(place).bus(), Ledger(gaps, 1), PREDICATES[by]))


PREDICATES: dict[str, Callable[[Any], bool]] = {
    "reason": lambda message: message.dead_letter_reason == "TaskFailed",
    "task": lambda message: message.task.function_name == "noop",
}


async def _operate(bus: Any, gaps: Ledger, which: Callable[[Any], bool]) -> dict[str, float]:
    counting = []
    noting = asyncio.create_task(note_gaps(gaps))
    for _ in range(10):
        started = time.perf_counter()
        await bus.counts()
        counting.append(time.perf_counter() - started)
    started = time.perf_counter()
    replayed = await bus.replay(which)
    seconds = time.perf_counter() - started
    await asyncio.sleep(2 * MOMENT)
    noting.cancel()
    figures = {"counts": statistics.median(counting) * 1000, "replayed": len(replayed)}
    figures |= {"replay": len(replayed) / seconds, "memory": peak_memory("self")}
    await bus.close()
    return figures


def memory(pid: int | str, field: str = "VmRSS") -> float:
    """The resident memory of a process in MB; NaN where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return float("nan")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_memory(pid: int | str) -> float:
    return memory(pid, "VmHWM")


ROLES: dict[str, Callable[..., Any]] = {
    role.__name__: role
    for role in (check, remove, fill, publish, drip, ask, request, join, work, grow, bystand, operate)
}


def main() -> None:
    """Play a role, where the command line is ROLE PEER ARGUMENTS; else list the peers."""
    if len(sys.argv) == 4:
        role, peer, arguments = sys.argv[1:]
        print(json.dumps(ROLES[role](peer, **json.loads(arguments))), flush=True)
        os._exit(0)  # without waiting for threads that a library left
    for record in PEERS.values():
        missing = "" if importlib.util.find_spec(record.module) else " (not installed)"
        print(f"{record.label}{missing}: {record.setting}")


if __name__ == "__main__":
    main()
