"""A page that shows a queue and acts on it, probes, and metrics for Prometheus.

    pip install starlette uvicorn prometheus_client

    python -m examples.dashboard tasks.db                # of a queue; installed, python -m boilermaker.dashboard
    boilermaker worker shop:app --web 8080               # beside a worker, in a thread of its own
    api.mount("/tasks", dashboard.asgi(app))             # in a FastAPI application, or any other of ASGI, at any path

The queue is named as for the command `boilermaker`: a file (`tasks.db`, `tasks.db#mailer`), an application
(`shop:app`), or `azure:QUEUE` by the environment. In a project, copy this file and `dashboard.html` beside
`boilermaker.py`.

    GET  .                     the page
    GET  api                   what it shows; ?text= and ?task= choose, ?dead_from= and ?scheduled_from= turn pages
    GET  api/message           one message in full: ?number=, and &dead_letter=1
    POST api/replay            dead letters are run again: {"numbers": [...]}, or {"matching": {"text":, "task":}}
    POST api/discard           dead letters are deleted
    POST api/cancel            scheduled messages are taken back
    GET  healthz               200 while the event loop and the worker turn, also while the bus is away
    GET  readyz                503 while the worker connects, reconnects or stops
    GET  metrics               for Prometheus

A POST needs the header `Boilermaker-Action`, of any content, which no page of another site can send. Sequence numbers
are strings, since on Azure they may be larger than what JavaScript counts with. The page loads nothing but itself and
`api`, and shows what messages hold as text only; its Content-Security-Policy forbids anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.util
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeGuard, TypeVar

import boilermaker  # where it is vendored under another name: that one, here and in `python -m`

try:
    import prometheus_client
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    packages = ("starlette", "uvicorn", "prometheus_client")
    missing = [name for name in packages if importlib.util.find_spec(name) is None] or packages
    problem = f"The page needs {', '.join(missing)}: pip install {' '.join(missing)} ({error})."
    if __name__ == "__main__":
        print(problem, file=sys.stderr)
        raise SystemExit(boilermaker.USAGE) from None
    raise boilermaker.UsageError(problem) from error

logger = logging.getLogger("boilermaker.dashboard")

T = TypeVar("T")

ROWS = 25
"""Messages, tasks or schedules that the page shows at once."""

SHOWN = 300
"""Characters of an argument list or an error in a row; all of it is in `api/message`."""

LOOKED_AT, LOOKED_AT_ON_AZURE = (200, 51), (1_000, 1)
"""Messages among which the page finds what it shows: so many at once, so many times. Actions find all."""

LONGEST_LOOK = 5.0
"""Seconds after which it looks no further."""

SHARE = 20
"""What took some time to read is not read again for so many times as long."""

LONGEST_PAUSE = 60.0
"""Seconds for which it is not read again at most."""

PATIENCE = 1.0
"""Seconds that an answer waits for what is being read; then it has what is known."""

LARGEST_BODY = 1_000_000
"""Bytes of a POST."""

UNRESPONSIVE = 10.0
"""Seconds without a turn after which a worker's event loop counts as stuck."""

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""Seconds, of both histograms."""


# -- what the page shows


def row_of(message: boilermaker.Message) -> dict[str, Any]:
    """What the page shows of a message, and what a filter's text is looked for in."""
    task = message.task
    if task is None:
        arguments = message.body
    else:
        named = [f"{name}={as_json(value)}" for name, value in task.kwargs.items()]
        arguments = ", ".join([*map(as_json, task.args), *named])
    died = message.dead_lettered_time_utc or message.enqueued_time_utc
    moment = message.scheduled_enqueue_time_utc if message.state is boilermaker.MessageState.SCHEDULED else died
    return {
        "number": str(message.sequence_number),
        "time": moment and moment.isoformat(),
        "task": None if task is None else task.function_name[:SHOWN],
        "arguments": arguments[:SHOWN],
        "reason": message.dead_letter_reason,
        "error": (message.dead_letter_error_description or "")[:SHOWN],
    }


def as_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def in_full(message: boilermaker.Message) -> dict[str, Any]:
    """A message with all that an operator may ask about it."""
    task = message.task
    return {
        "task_id": None if task is None else task.task_id,
        "message_id": message.message_id,
        "enqueued": message.enqueued_time_utc and message.enqueued_time_utc.isoformat(),
        "attempt": None if task is None else task.attempts.attempts + 1,
        "delivery_count": message.delivery_count,
        "arguments": message.body if task is None else as_json({"args": task.args, "kwargs": task.kwargs}, indent=2),
        "error": message.dead_letter_error_description,
        "traceback": message.dead_letter_traceback,
    }


@dataclass(frozen=True)
class Matching:
    """A filter: text that a row has somewhere, and the name of a task ("" of what is none)."""

    text: str = ""
    task: str | None = None

    @classmethod
    def of(cls, given: object) -> Matching:
        """Raises ValueError where it is none."""
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise ValueError('"matching" must be an object of texts')
        if unknown := given.keys() - {"text", "task"}:
            raise ValueError(f'"matching" knows "text" and "task", not {sorted(unknown)}')
        return cls(**given)

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has all of that."""
        if self.task is not None and self.task != (row["task"] or ""):
            return False
        text = self.text.casefold()
        return not text or any(text in value.casefold() for value in row.values() if isinstance(value, str))


@dataclass(frozen=True)
class Look:
    """Rows, and whether all there is was looked at."""

    rows: Sequence[dict[str, Any]] = ()
    complete: bool = True

    def page(self, matching: Matching, start: int) -> dict[str, Any]:
        """Some of those that match, and how many do."""
        found = [row for row in self.rows if matching.has(row)]
        start = max(0, min(start, (len(found) - 1) // ROWS * ROWS))  # the last page where it has shrunk meanwhile
        return {
            "rows": found[start : start + ROWS],
            "from": start,
            "size": ROWS,
            "matching": len(found),
            "looked_at": len(self.rows),
            "complete": self.complete,
        }


@dataclass
class Cached(Generic[T]):
    """What is read of the bus, however many ask: once at a time, and the less often the longer it takes."""

    read: Callable[[], Awaitable[T]]
    pause: float
    value: T | None = None
    error: str = ""
    _again: float = 0.0
    _reading: asyncio.Task[None] | None = None

    async def get(self) -> T | None:
        """The present value, or, where that is not read in a moment, the last one, None if there is none yet."""
        if (self._reading is None or self._reading.done()) and time.monotonic() >= self._again:
            self._reading = asyncio.get_running_loop().create_task(self._read())
        if self._reading is not None and not self._reading.done():
            await asyncio.wait([self._reading], timeout=PATIENCE)
        return self.value

    def forget(self, at_once: bool = True) -> None:
        """What is being read is out of date already; read it again when somebody asks, or when it is time."""
        self._reading = None
        if at_once:
            self._again = 0.0

    async def _read(self) -> None:
        began, this = time.monotonic(), asyncio.current_task()
        try:
            value: T | None = await self.read()
            error, cost = "", min(SHARE * (time.monotonic() - began), LONGEST_PAUSE)
        except Exception as failure:
            if not isinstance(failure, boilermaker.BoilermakerError):
                logger.exception("Cannot read the queue")
            value, error, cost = self.value, str(failure) or repr(failure), 0.0
        if self._reading is this:  # else it was forgotten meanwhile
            self.value, self.error = value, error
            self._again = time.monotonic() + max(self.pause, cost)


class Queue:
    """What there is to see of one bus, and what can be done to its messages."""

    def __init__(self, app: boilermaker.Boilermaker | None, bus: boilermaker.ServiceBus) -> None:
        self.app = app
        self.bus = bus
        self.is_local = bus.system == "boilermaker"
        # To look at Azure opens links, which take half a second each, and shows some messages only.
        self._looked_at = LOOKED_AT if self.is_local else LOOKED_AT_ON_AZURE
        pause = 1.0 if self.is_local else 30.0
        self.counts = Cached(bus.counts, 0.5 if self.is_local else 10.0)
        self.tasks = Cached(self._look_at_tasks, pause)
        self.dead = Cached(self._look_at_dead, pause)
        self.scheduled = Cached(self._look_at_scheduled, pause)

    async def _look_at_tasks(self) -> Look:
        def look() -> Look:
            rows: list[dict[str, Any]] = [
                dataclasses.asdict(each) | {"task": name, "last_error": (each.last_error or "")[:SHOWN]}
                for name, each in counts.items()
            ]
            rows.sort(key=lambda row: (-row["dead_letter"], -row["active"], row["task"]))
            return Look(rows, all(row["exact"] for row in rows))

        counts = await self.bus.counts_by_task()
        return await asyncio.to_thread(look)

    async def _look_at_dead(self) -> Look:
        look = await self._look(dead_letter=True)
        return Look(sorted(look.rows, key=lambda row: row["time"] or "", reverse=True), look.complete)

    async def _look_at_scheduled(self) -> Look:
        counts = await self.counts.get()
        if counts is not None and counts.exact and not counts.scheduled:
            return Look()
        look = await self._look(dead_letter=False)
        return Look(sorted(look.rows, key=lambda row: row["time"] or ""), look.complete)

    async def _look(self, dead_letter: bool) -> Look:
        """Rows of dead letters, or of what is scheduled, among the first messages."""
        rows: list[dict[str, Any]] = []
        state = boilermaker.MessageState.DEAD_LETTER if dead_letter else boilermaker.MessageState.SCHEDULED
        number, (at_once, times), began = 0, self._looked_at, time.monotonic()
        for _ in range(times):
            messages = await self.bus.peek(at_once, dead_letter, number)
            wanted = [message for message in messages if message.state is state]
            rows += await asyncio.to_thread(lambda some: [row_of(message) for message in some], wanted)
            if len(messages) < at_once:
                return Look(rows)
            number = messages[-1].sequence_number + 1
            if time.monotonic() - began > LONGEST_LOOK:
                break
        return Look(rows, complete=False)

    async def show(self, matching: Matching, dead_from: int, scheduled_from: int) -> dict[str, Any]:
        """What the page shows, for as far as it can be read."""
        parts = (self.counts, self.tasks, self.dead, self.scheduled)
        counts, tasks, dead, scheduled = await asyncio.gather(
            self.counts.get(), self.tasks.get(), self.dead.get(), self.scheduled.get()
        )
        return {
            "queue": self.bus.queue_name,
            "bus": repr(self.bus),
            "counts": counts and dataclasses.asdict(counts),
            "tasks": tasks and tasks.page(matching, 0),
            "dead": dead and dead.page(matching, dead_from),
            "scheduled": scheduled and scheduled.page(matching, scheduled_from),
            "schedules": self._schedules(matching),
            "errors": sorted({part.error for part in parts if part.error}),
        }

    def _schedules(self, matching: Matching) -> dict[str, Any]:
        schedules = {} if self.app is None else self.app.schedules
        rows: list[dict[str, Any]] = [
            {"name": name, "when": str(each.when), "task": each.workflow.function_name}
            for name, each in schedules.items()
        ]
        page = Look(rows).page(matching, 0)
        for row in page["rows"]:
            row["next"] = [moment.isoformat() for moment in schedules[row["name"]].next_times(3)]
        return page

    async def message(self, number: int, dead_letter: bool) -> dict[str, Any] | None:
        """One message in full, None if it is gone."""
        for message in await self.bus.peek(1, dead_letter, number):
            if message.sequence_number == number:
                return in_full(message)
        return None

    async def act(self, action: str, numbers: Sequence[int] | None, matching: Matching) -> int:
        """Replay or discard dead letters, or cancel what is scheduled; how many."""

        def which(message: boilermaker.Message) -> bool:
            scheduled = message.state is boilermaker.MessageState.SCHEDULED
            return scheduled == (action == "cancel") and matching.has(row_of(message))

        done: Collection[int] = ()
        try:
            if action == "cancel" and numbers is not None:
                done = [number for number in numbers if await self._cancel(number)]
            else:
                operation = {"replay": self.bus.replay, "discard": self.bus.discard, "cancel": self.bus.purge}[action]
                done = [message.sequence_number for message in await operation(which if numbers is None else numbers)]
        except boilermaker.OperationStopped as stopped:
            done = [message.sequence_number for message in stopped.messages]
            raise
        finally:
            self._remove({str(number) for number in done})
        return len(done)

    async def _cancel(self, number: int) -> bool:
        try:
            await self.bus.cancel(number)
        except boilermaker.MessageNotFound:
            return False
        return True

    def _remove(self, numbers: Collection[str]) -> None:
        """Show what was done at once: on Azure it is not looked at again for a while."""
        for part in (self.dead, self.scheduled):
            if part.value is not None:
                part.value = Look([row for row in part.value.rows if row["number"] not in numbers], part.value.complete)
        self.counts.forget()
        for part in (self.tasks, self.dead, self.scheduled):
            part.forget(at_once=self.is_local)


# -- probes and metrics


@dataclass
class Probes:
    """Whether the workers of this process turn, and work."""

    app: boilermaker.Boilermaker | None
    has_worker: bool
    _seen: set[boilermaker.Worker] = field(default_factory=set)
    _asked: dict[boilermaker.Worker, float] = field(default_factory=dict)

    async def healthz(self, request: Request) -> Response:
        """200 while the event loop and the worker turn; a bus that is away is no reason to start anew."""
        stuck = [silence for worker in self._workers() if (silence := self._silence_of(worker)) > UNRESPONSIVE]
        if stuck:
            return PlainTextResponse(f"a worker's event loop has had no turn for {max(stuck):.0f} s", 503)
        if self._seen and not self._workers():
            return PlainTextResponse("the worker was ended by an error", 503)
        return PlainTextResponse("ok")

    async def readyz(self, request: Request) -> Response:
        """503 while the worker connects, reconnects or stops."""
        phases = [worker.phase for worker in self._workers()]
        if not phases and (self.has_worker or self._seen):
            return PlainTextResponse("no worker", 503)
        waiting = [phase for phase in phases if phase is not boilermaker.Phase.WORKING]
        return PlainTextResponse(", ".join(waiting) or "ok", 503 if waiting else 200)

    def _workers(self) -> set[boilermaker.Worker]:
        """Those that run; remembers them, and which of those that do no more were ended by an error."""
        workers = set() if self.app is None else self.app.workers.copy()

        def failed(worker: boilermaker.Worker) -> bool:
            return worker.ended.done() and not worker.ended.cancelled() and worker.ended.exception() is not None

        self._seen = workers | {worker for worker in self._seen if failed(worker)}
        for gone in self._asked.keys() - workers:
            self._asked.pop(gone, None)
        return workers

    def _silence_of(self, worker: boilermaker.Worker) -> float:
        """Seconds since its event loop was asked for a sign of life which it has not given."""
        if worker.loop is asyncio.get_running_loop():
            return 0.0
        now = time.monotonic()
        if worker not in self._asked:
            self._asked[worker] = now
            with contextlib.suppress(RuntimeError):  # it is closed
                worker.loop.call_soon_threadsafe(self._asked.pop, worker, None)
        return now - self._asked.get(worker, now)


class Metrics:
    """What Prometheus asks for, of this process's workers and, on the local bus, of the queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._registry = prometheus_client.CollectorRegistry()
        make: dict[str, Any] = {"namespace": "boilermaker", "registry": self._registry}
        self._messages = prometheus_client.Gauge("messages", "Messages by state", ["queue", "state"], **make)
        app = self._app = queue.app
        if app is None:
            return
        self._settled = prometheus_client.Counter("tasks", "Settled messages by outcome", ["task", "outcome"], **make)
        buckets = {"labelnames": ["task"], "buckets": BUCKETS, **make}
        self._seconds = prometheus_client.Histogram("task_duration_seconds", "How long tasks ran", **buckets)
        self._waited = prometheus_client.Histogram("task_wait_seconds", "From due to begun", **buckets)
        running = prometheus_client.Gauge("tasks_running", "Tasks that run now", **make)
        running.set_function(lambda: sum(worker.running for worker in app.workers.copy()))
        concurrency = prometheus_client.Gauge("concurrency", "Tasks that may run at once", **make)
        concurrency.set_function(lambda: sum(worker.concurrency for worker in app.workers.copy()))
        app.on_settled(self._count)

    def _count(
        self, task: boilermaker.Task | None, outcome: boilermaker.Outcome, seconds: float, waited: float
    ) -> None:
        known = task is not None and self._app is not None and self._app.registration(task.function_name) is not None
        name = task.function_name if task is not None and known else "?"  # foreign names would be series without end
        self._settled.labels(name, str(outcome)).inc()
        if outcome.ran:
            self._seconds.labels(name).observe(seconds)
            self._waited.labels(name).observe(waited)

    async def metrics(self, request: Request) -> Response:
        if self._queue.is_local:
            counts = await self._queue.counts.get()
            self._messages.clear()
            if counts is not None and not self._queue.counts.error:
                for state in boilermaker.MessageState:
                    self._messages.labels(self._queue.bus.queue_name, state.value).set(getattr(counts, state.value))
        return Response(
            prometheus_client.generate_latest(self._registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
        )


# -- the ASGI application


class Guard:
    """Lets nobody through who does not know the password, or who was led here under a name that is not ours."""

    def __init__(self, app: ASGIApp, auth: str | None = None, hosts: Collection[str] | None = None) -> None:
        self._app = app
        self._auth = auth
        self._hosts = None if hosts is None else {host.lower().rstrip(".") for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app if scope["type"] != "http" else self._refusal(Headers(scope=scope)) or self._app
        await app(scope, receive, send)

    def _refusal(self, headers: Headers) -> Response | None:
        host = re.sub(r":\d+$", "", headers.get("host", "")).rstrip(".").lower()
        if self._hosts is not None and host not in self._hosts:  # as where a foreign name was made to lead to us
            return PlainTextResponse(f"This page does not go by the name {host!r}: --allow-host names more.", 403)
        if self._auth is not None and not self._knows_password(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="boilermaker", charset="UTF-8"'}
            return PlainTextResponse("A user and a password, please.", 401, challenge)
        return None

    def _knows_password(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.partition(" ")
        try:
            given = base64.b64decode(credentials.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, (self._auth or "").encode())


def as_response(content: object, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(json.dumps(content), status, headers, "application/json")


class Page:
    """The page, and what it asks for."""

    def __init__(self, queue: Queue, user: str, read_only: bool) -> None:
        self._queue = queue
        self._user = user
        self._read_only = read_only
        self._html = Path(__file__).with_name("dashboard.html").read_text("utf-8")
        policy = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'"}
        policy |= {"form-action": "'none'", "frame-ancestors": "'none'"}
        for name in ("script", "style"):  # these very texts, and no other
            [text] = re.findall(rf"<{name}>(.*?)</{name}>", self._html, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            policy[f"{name}-src"] = f"'sha256-{digest}'"
        self._headers = {
            "Content-Security-Policy": "; ".join(map(" ".join, policy.items())),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def html(self, request: Request) -> Response:
        return Response(self._html, headers=self._headers, media_type="text/html")

    async def api(self, request: Request) -> Response:
        given = request.query_params
        starts = [given.get(name, "0") for name in ("dead_from", "scheduled_from")]
        if not all(map(is_number, starts)):
            return as_response({"error": "dead_from and scheduled_from must be numbers"}, 400)
        shown = await self._queue.show(Matching(given.get("text", ""), given.get("task")), *map(int, starts))
        return as_response({**shown, "read_only": self._read_only})

    async def message(self, request: Request) -> Response:
        given = request.query_params
        if not is_number(number := given.get("number")):
            return as_response({"error": "number must be a sequence number"}, 400)
        try:
            found = await self._queue.message(int(number), bool(given.get("dead_letter")))
        except boilermaker.BoilermakerError as error:
            return as_response({"error": str(error)}, 503)
        return as_response(found or {"error": "It is gone."}, 200 if found else 404)

    async def act(self, action: str, request: Request) -> Response:
        """Do what a POST asks for, after a look at whether it may."""
        if "boilermaker-action" not in request.headers:
            return as_response({"error": "an action needs the header Boilermaker-Action"}, 403)
        if self._read_only:
            return as_response({"error": "this page is read-only"}, 403)
        try:
            numbers, matching = asked_for(await self._body(request))
        except (ValueError, RecursionError) as error:
            return as_response({"error": f"the body is wrong: {error}"}, 400)
        count, problem, status = 0, "", 200
        try:
            count = await self._queue.act(action, numbers, matching)
        except boilermaker.OperationStopped as stopped:
            count, problem, status = len(stopped.messages), str(stopped), 503
        except boilermaker.BoilermakerError as error:
            problem, status = str(error), 503
        if numbers is not None and count == 0 and not problem:
            problem, status = "Gone: somebody else was first, or it runs already.", 404
        what = matching if numbers is None else numbers if len(numbers) < ROWS else f"{len(numbers)} numbers"
        who = request.client.host if request.client else "?"
        logger.info("Page: %s %s by %s (%s): messages=%d %s", action, what, self._user, who, count, problem)
        return as_response({"count": count, "error": problem}, status)

    async def _body(self, request: Request) -> Any:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise ValueError(f"it is larger than {LARGEST_BODY} bytes")
        return json.loads(body)


def is_number(given: object) -> TypeGuard[int | str]:
    """Whether it is a sequence number, or an offset: an int, or its digits."""
    return type(given) in (int, str) and re.fullmatch("[0-9]{1,19}", str(given)) is not None


def asked_for(body: Any) -> tuple[list[int] | None, Matching]:
    """The sequence numbers that a POST names, or what its messages match; ValueError where it is neither."""
    if not isinstance(body, dict) or len(body) != 1 or not body.keys() <= {"numbers", "matching"}:
        raise ValueError('it must be {"numbers": [...]} or {"matching": {...}}')
    if "matching" in body:
        return None, Matching.of(body["matching"])
    numbers = body["numbers"]
    if not isinstance(numbers, list) or not all(map(is_number, numbers)):
        raise ValueError('"numbers" must be a list of sequence numbers')
    return [int(number) for number in numbers], Matching()


def asgi(
    app_or_bus: Any,
    auth: str | None = None,
    read_only: bool | None = None,
    *,
    allow_hosts: Collection[str] | None = None,
    has_worker: bool = False,
) -> Starlette:
    """The page, the probes and metrics as an ASGI application, to be mounted at any path.

    Args:
        app_or_bus: an application, for its schedules and workers too; or a bus alone.
        auth: `user:password`, asked for by the page and metrics; None asks nobody.
        read_only: None: unless there is `auth`.
        allow_hosts: the names that the page goes by; None for any, as where the enclosing application sees to that.
        has_worker: this process is a worker's, and not ready without.

    Raises:
        UsageError: `auth` has no colon, or the first argument is neither.
    """
    app = app_or_bus if hasattr(app_or_bus, "service_bus_client") else None
    bus = app_or_bus if app is None else app.service_bus_client
    if not hasattr(bus, "counts_by_task"):
        raise boilermaker.UsageError(f"{app_or_bus!r} is neither an application nor a bus.")
    if auth is not None and not re.fullmatch(r"[^:]+:.+", auth, re.DOTALL):
        raise boilermaker.UsageError("auth must be USER:PASSWORD, with a colon.")
    queue = Queue(app, bus)
    user = "anybody" if auth is None else auth.partition(":")[0]
    page = Page(queue, user, (auth is None) if read_only is None else read_only)
    probes, metrics = Probes(app, has_worker), Metrics(queue)
    guarded = [
        Route("/", page.html),
        Route("/api", page.api),
        Route("/api/message", page.message),
        *(Route(f"/api/{name}", partial(page.act, name), methods=["POST"]) for name in ("replay", "discard", "cancel")),
    ]
    return Starlette(
        routes=[
            Route("/healthz", probes.healthz),
            Route("/readyz", probes.readyz),
            Route("/metrics", metrics.metrics, middleware=[Middleware(Guard, auth)]),
            Mount("/", routes=guarded, middleware=[Middleware(Guard, auth, allow_hosts)]),
        ]
    )


# -- serving


def listen(address: str) -> socket.socket:
    """A socket that listens on `[HOST:]PORT`, of loopback where no host is given."""
    match = re.fullmatch(r"(?:(.+):)?(\d{1,5})", address)
    if match is None or int(match[2]) > 65535:
        raise boilermaker.UsageError(f"--web {address!r} must be [HOST:]PORT, such as 8080 or 0.0.0.0:8080.")
    host, port = (match[1] or "127.0.0.1").strip("[]"), int(match[2])
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        raise boilermaker.UsageError(f"--web {address}: cannot listen there: {why}.") from error


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextlib.asynccontextmanager
async def beside(
    app_or_bus: Any,
    address: str,
    auth: str | None = None,
    allow_hosts: Sequence[str] = (),
    read_only: bool = False,
    has_worker: bool = True,
) -> AsyncIterator[str]:
    """Serve in a thread of its own, so that a task which blocks the event loop does not take the page with it.

    Gives the page's address. It goes by the names of loopback, of the host that it listens on, and `allow_hosts`.

    Raises:
        UsageError: it cannot listen there; or others than this machine could, and there is no password.
    """
    auth = auth if auth is not None else os.environ.get("BOILERMAKER_WEB_AUTH") or None
    named = address.rpartition(":")[0].lower()
    if named and not is_loopback(named.strip("[]")) and auth is None:
        raise boilermaker.UsageError(
            f"--web {address}: any host but loopback wants --auth USER:PASSWORD, or BOILERMAKER_WEB_AUTH."
        )
    hosts = {"localhost", "127.0.0.1", "[::1]", named, *allow_hosts} - {""}
    page = asgi(app_or_bus, auth, read_only, allow_hosts=hosts, has_worker=has_worker)
    bus = getattr(app_or_bus, "service_bus_client", app_or_bus)
    listening = listen(address)
    quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False, "server_header": False}
    server = uvicorn.Server(uvicorn.Config(page, ws="none", lifespan="off", timeout_graceful_shutdown=2, **quiet))

    async def serve() -> None:
        await server.serve(sockets=[listening])
        if not isinstance(bus, boilermaker.LocalServiceBus):  # whose file other event loops use too
            await bus.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="boilermaker-web", daemon=True)
    thread.start()
    url = "http://{}:{}/".format(named or "127.0.0.1", listening.getsockname()[1])
    logger.info("The page of %r is at %s", bus, url)
    try:
        yield url
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join)


def main(arguments: Sequence[str] | None = None) -> int:
    """The page alone, until Ctrl-C or SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="dashboard", description="A page that shows a queue and acts on it.")
    parser.add_argument("bus", metavar="BUS", help="tasks.db, tasks.db#queue, azure, azure:QUEUE, or module:attribute")
    parser.add_argument("--web", metavar="[HOST:]PORT", default="8080", help="where to listen (127.0.0.1:8080)")
    parser.add_argument("--auth", metavar="U:P", help="user and password (or BOILERMAKER_WEB_AUTH)")
    parser.add_argument("--allow-host", metavar="H", action="append", default=[], help="a name that the page goes by")
    parser.add_argument("--read-only", action="store_true", help="only to look")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("azure").setLevel(logging.WARNING)

    async def serve() -> None:
        ended = asyncio.Event()
        with contextlib.suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        named = boilermaker.named(args.bus)
        try:
            async with beside(named, args.web, args.auth, args.allow_host, args.read_only, has_worker=False):
                await ended.wait()
        finally:
            await getattr(named, "service_bus_client", named).close()

    sys.path.insert(0, os.getcwd())
    try:
        asyncio.run(serve())
    except boilermaker.BoilermakerError as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return next((code for kinds, code in boilermaker.EXIT_CODES if isinstance(error, kinds)), boilermaker.USAGE)
    except KeyboardInterrupt:
        pass
    return boilermaker.DONE


if __name__ == "__main__":
    sys.exit(main())
