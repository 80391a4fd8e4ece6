# mypy: disable-error-code="import-not-found"
# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
"""Async background tasks: Azure Service Bus in production, a durable SQLite queue everywhere else.

    import asyncio
    from boilermaker import Boilermaker, LocalServiceBus

    app = Boilermaker({"greeting": "Hello"}, LocalServiceBus("tasks.db"))

    @app.task
    async def greet(state, name: str):
        print(f"{state['greeting']}, {name}!")

    async def main():
        await greet.delay("world")        # from a web request, a script, another task ...
        await app.run(burst=True)         # ... and a worker, here or in another process

    asyncio.run(main())

A task is an `async def` whose first argument is the application's state. Publishing one turns its name and
arguments into a JSON message on a queue; a worker receives the message under a lock, runs the function, and settles
the message: completed, retried later, or dead-lettered. What must follow (a callback, the next step of a chain, a
retry) is a message too, published before its parent is settled, so that a worker may die at any instant and nothing
is lost. How a workflow ended is told, in the same way, to who awaits its result or to the group that it is a member of.
Deciding what follows, and what is told to whom, is pure (section 6); only the worker and the application (sections 12
and 13) talk to a bus.

    1.  Vocabulary      errors, limits, checks, clocks
    2.  Retries         policies and the exceptions that carry them
    3.  Tasks           a task, its callbacks, chains, groups; the decorated function
    4.  Wire format     a task as JSON, compatible with boilermaker-servicebus 1.x
    5.  Messages        what travels between the application and a bus
    6.  Decisions       what happens to a message, and how a group ends: a table and pure functions
    7.  Store           the embedded queue as SQL
    8.  Local bus       group commit, waking up, lock renewal around the store
    9.  Azure bus       the same protocol over azure-servicebus
    10. Tracing         OpenTelemetry, when asked for
    11. Schedules       when periodic tasks are due, and how each worker publishes them
    12. Worker          receive, run, settle, shut down
    13. Application     registering, publishing, operating
    14. Old names       the modules of the multi-file original
    15. Command line    a worker, and what an operator asks of a queue

The way of a message through a worker, from its lock to its end. A *run* is a message with its task and how that ended;
a *settlement* is what to do with the message, and what is published before that.

    1.  Worker._pump            settles what has ended, asks for as many messages as there are free slots
    2.  Worker._receive         starts what came
         on the local bus                                    on Azure
    3.  LocalReceiver.receive   waits for a change          AzureReceiver.receive
    4.  GroupCommit.submit      into the next transaction   AzureReceiver._receive
    5.  GroupCommit._flush      runs it                     AzureLink.call
    6.  Store.claim             locks what is due           AzureReceiver._hold
    7.  Worker._start           gives each message an asyncio task of its own
    8.  Worker._process         from a message to its settlement:
    9.  decode                  its body becomes a task,
    10. Worker._call            whose function is called,
    11. decide                  and what follows from how that ended;
    12. Boilermaker.messages_of makes the messages of it
    13. LocalReceiver.settle    into the next transaction   AzureReceiver.settle
    14. Store.settle            deletes the message         AzureReceiver._settle
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import dataclasses
import datetime
import enum
import functools
import heapq
import importlib.util
import inspect
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import reprlib
import shutil
import signal
import sqlite3
import sys
import threading
import time
import traceback
import types
import urllib.parse
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

if TYPE_CHECKING:
    import argparse

    from azure.servicebus import ServiceBusMessage, ServiceBusReceivedMessage
    from azure.servicebus.aio import ServiceBusClient
    from opentelemetry.trace import Span

__version__ = "0.1.0"

__all__ = [
    "AzureServiceBus",
    "Boilermaker",
    "BoilermakerAppException",
    "BoilermakerError",
    "Config",
    "ConfigurationError",
    "Counts",
    "Group",
    "InvalidArguments",
    "LocalServiceBus",
    "Message",
    "MessageLockLost",
    "MessageNotFound",
    "MessageTooLarge",
    "NoRetry",
    "OperationStopped",
    "Outcome",
    "Phase",
    "Progress",
    "RequestRefused",
    "RetryException",
    "RetryExceptionDefault",
    "RetryExceptionDefaultExponential",
    "RetryExceptionDefaultLinear",
    "RetryMode",
    "RetryPolicy",
    "Schedule",
    "ServiceBusUnavailable",
    "Task",
    "TaskFailed",
    "TaskFailureResult",
    "TaskFunction",
    "UsageError",
    "current_task",
    "group",
    "retries",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
if TYPE_CHECKING:  # which knows defaults of type variables; Python does from 3.13 on
    from typing_extensions import TypeVar as TypeVarWithDefault

    R_co = TypeVarWithDefault("R_co", covariant=True, default=Any)
else:
    R_co = TypeVar("R_co", covariant=True)
TaskT = TypeVar("TaskT", bound="Task[Any]")

# ======================================================================================================================
# 1. Vocabulary: errors, limits, checks, clocks
# ======================================================================================================================

logger = logging.getLogger("boilermaker.app")

DEFAULT_MAX_MESSAGE_BYTES = 262_144
"""256 KiB, a message on Service Bus Standard, headers included:
https://learn.microsoft.com/azure/service-bus-messaging/service-bus-quotas"""

MAX_MESSAGE_ID_LENGTH = 128
"""Characters in a Service Bus message id (same page)."""

MAX_SECONDS = 2**31 - 1
"""The longest delay, about 68 years: beyond it, dates overflow."""

MAX_WORKFLOW_DEPTH = 750
"""How deep callbacks may nest: a JSON decoder in Python stops at a depth of about 1000."""

DEAD_LETTER_SUFFIX = "/$DeadLetterQueue"
"""What Service Bus appends to a queue's name for that of its dead-letter queue."""


class BoilermakerError(Exception):
    """The root of every error of this module."""


class UsageError(BoilermakerError, ValueError):
    """The calling code has to change: a wrong argument, name or combination."""


class InvalidArguments(UsageError, TypeError):
    """A task's arguments do not fit its function, or JSON cannot carry them."""


class MessageTooLarge(UsageError):
    """A message is over the size limit of the bus."""


class RequestRefused(UsageError):
    """The service refuses what was asked, and will again: to try later is of no use."""


class ConfigurationError(UsageError):
    """A setting is missing or wrong: the queue, the credential, the file."""


class ServiceBusUnavailable(BoilermakerError):
    """The bus could not do it this time: try again later. The cause is chained."""


class MessageLockLost(BoilermakerError):
    """The lock ran out and another receiver has the message, or it is gone."""


class MessageNotFound(BoilermakerError):
    """There is no scheduled message with that sequence number."""


class BoilermakerAppException(ServiceBusUnavailable):
    """Publishing failed at every attempt.

    `errors` holds the error of each attempt, in order.
    """

    def __init__(self, message: str, errors: Sequence[Exception] = ()) -> None:
        super().__init__(f"{message}: {'; '.join(map(str, errors))}" if errors else message)
        self.errors = list(errors)


class TaskFailed(BoilermakerError):
    """A task whose result was awaited has failed for good.

    Its attributes are what an `on_failure` callback receives: `task_id` and `function_name` of the step that failed,
    `error` (the name of the exception's type, or the reason of an ending without one, such as `Expired` or
    `Cancelled`), `message`, `traceback`, `attempts`. The traceback is its note, too.

    Args:
        failure: these, by name.
    """

    def __init__(self, failure: Mapping[str, Any]) -> None:
        super().__init__(failure)
        self.task_id: str = failure.get("task_id", "")
        self.function_name: str = failure.get("function_name", "")
        self.error: str = failure.get("error", "")
        self.message: str = failure.get("message", "")
        self.traceback: str = failure.get("traceback", "")
        self.attempts: int = failure.get("attempts", 0)
        if self.traceback:
            self.add_note(self.traceback)

    def __str__(self) -> str:
        return f"{self.function_name} {self.task_id}: {self.error}{': ' if self.message else ''}{self.message}"


class TaskFailureResultType:
    """What a task returns to fail without raising: the singleton `TaskFailureResult`."""

    def __call__(self) -> TaskFailureResultType:
        return self

    def __repr__(self) -> str:
        return "TaskFailureResult"

    def __reduce__(self) -> str:
        return "TaskFailureResult"  # one object, also through copies, pickles and process pools


TaskFailureResult = TaskFailureResultType()


def _short(value: object) -> str:
    """A value for an error message: never long, never an error itself."""
    try:
        return reprlib.repr(value)
    except Exception:  # an integer of more digits than Python prints, a broken __repr__
        return f"<{type(value).__name__}>"


def _printable(text: str) -> str:
    """Foreign text for a line of the log: with a line break in it, it would forge another."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _is_text(value: object) -> bool:
    """Whether it may be an id: a string that is not empty, and that can be encoded."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _positive(name: str, value: float, or_zero: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_SECONDS or (value == 0 and not or_zero):
        least = "from 0" if or_zero else "over 0,"
        raise ConfigurationError(f"{name}={value!r} must be a number {least} up to {MAX_SECONDS}.")
    return value


def _count(name: str, value: int) -> int:
    if type(value) is not int or not 0 < value <= MAX_SECONDS:
        raise ConfigurationError(f"{name}={value!r} must be an int over 0, up to {MAX_SECONDS}.")
    return value


def _listed(things: Iterable[T], taker: str) -> list[T]:
    if not isinstance(things, Iterable):
        raise UsageError(f"{taker} takes a list, not {_short(things)}.")
    return list(things)


def _checked_queue_name(name: object) -> str:
    """A queue's name, by the rules of Service Bus: https://learn.microsoft.com/rest/api/servicebus/queues."""
    if not isinstance(name, str) or not re.fullmatch(
        r"[A-Za-z0-9]([\w./-]{0,258}[A-Za-z0-9])?(/\$DeadLetterQueue)?", name, re.ASCII
    ):
        raise ConfigurationError(
            f"queue name {_short(name)} must be 1 to 260 letters, digits, '.', '-', '_' and '/', "
            "beginning and ending with a letter or digit."
        )
    return name


def dead_letter_queue(queue: str) -> str:
    """The path of a queue's dead-letter queue; that of a dead-letter queue is itself."""
    return queue if queue.endswith(DEAD_LETTER_SUFFIX) else queue + DEAD_LETTER_SUFFIX


def _check_sequence_number(number: object) -> None:
    if type(number) is not int:
        raise UsageError(f"sequence_number={number!r} must be an int: that of a task published with delay or eta.")


def _is_64_bit(number: int) -> bool:
    """Whether SQLite and AMQP can hold a number, and so whether a message can have it."""
    return abs(number) < 2**63


def _utc(timestamp: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC)


def _seconds(name: str, value: float | datetime.timedelta) -> float:
    """A span of time, given as seconds or as a timedelta."""
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_SECONDS:
        raise UsageError(f"{name}={value!r} must be seconds from now, 0 to {MAX_SECONDS}, or a timedelta.")
    return seconds


def _time_limit(name: str, value: float | datetime.timedelta | None) -> float | None:
    """A span of time that is no less than a moment; None for no limit."""
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else value
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= MAX_SECONDS:
        raise UsageError(f"{name}={value!r} must be seconds over 0, up to {MAX_SECONDS}, a timedelta, or None.")
    return float(seconds)


def _due_time(delay: float | datetime.timedelta | None, eta: datetime.datetime | None) -> float | None:
    """When a message is due, as a Unix timestamp; None for now."""
    if delay is not None and eta is not None:
        raise UsageError(f"Both delay={delay!r} and eta={eta!r} are given: choose one.")
    if delay is not None:
        seconds = _seconds("delay", delay)
        return time.time() + seconds if seconds else None
    if eta is None:
        return None
    if not isinstance(eta, datetime.datetime):
        raise UsageError(f"eta={eta!r} must be a datetime.")
    if eta.utcoffset() is None:
        raise UsageError(f"eta={eta!r} has no time zone: use for example datetime.now(UTC) + timedelta(minutes=5).")
    timestamp = eta.timestamp()
    if timestamp > time.time() + MAX_SECONDS:
        raise UsageError(f"eta={eta!r} is too far away: at most {MAX_SECONDS} seconds from now.")
    return timestamp


# ======================================================================================================================
# 2. Retries: policies and the exceptions that carry them
# ======================================================================================================================

MAX_TRIES = 100

DEFAULT_DELAY_MAX = 3600
"""Seconds: the longest delay where none is given, unless the first is longer."""


@enum.unique
class RetryMode(enum.IntEnum):
    """How the delay grows from one retry to the next; the values are those of the wire format."""

    Fixed = 0
    Exponential = 1
    Linear = 2


@dataclass(frozen=True, slots=True, eq=False)
class RetryPolicy:
    """How often a task may run, and how long to wait in between.

    Args:
        max_tries: how often the function runs at most, the first time included; 0 to 100.
        delay: seconds before a retry, the base of the three modes.
        delay_max: the longest delay, in seconds; None for an hour, or `delay` where that is longer.
        retry_mode: `Fixed`, `Linear` or `Exponential`, see `get_delay_interval`.

    Raises:
        ValueError: a value is negative, too large, or not an int; `delay_max` is under `delay`.
    """

    max_tries: int = 5
    delay: int = 0
    delay_max: int | None = None
    retry_mode: RetryMode = RetryMode.Fixed

    def __post_init__(self) -> None:
        for name, limit in (("max_tries", MAX_TRIES), ("delay", MAX_SECONDS)):
            self._check(name, limit)
        if self.delay_max is None:
            object.__setattr__(self, "delay_max", max(DEFAULT_DELAY_MAX, self.delay))
        self._check("delay_max", MAX_SECONDS)
        if self.longest_delay < self.delay:
            raise UsageError(
                f"RetryPolicy: delay_max={self.delay_max} must not be under delay={self.delay}: it would cut every "
                "delay. Leave it out, or give more."
            )
        if type(self.retry_mode) is not RetryMode:
            object.__setattr__(self, "retry_mode", self._mode(self.retry_mode))

    def _check(self, name: str, limit: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not 0 <= value <= limit:
            raise UsageError(f"RetryPolicy: {name}={_short(value)} must be an int from 0 to {limit}.")

    @staticmethod
    def _mode(value: object) -> RetryMode:
        if type(value) is int and value in RetryMode.__members__.values():
            return RetryMode(value)
        modes = ", ".join(f"RetryMode.{mode.name} ({mode.value})" for mode in RetryMode)
        raise UsageError(f"RetryPolicy: retry_mode={_short(value)} must be one of {modes}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryPolicy) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self.max_tries, self.delay, self.delay_max))  # enough to tell most apart

    def _values(self) -> tuple[int, int, int, int]:
        return self.max_tries, self.delay, self.longest_delay, self.retry_mode

    @property
    def longest_delay(self) -> int:
        """`delay_max`, which is a number once the policy is made."""
        assert self.delay_max is not None
        return self.delay_max

    @classmethod
    def default(cls) -> RetryPolicy:
        """Five tries, two minutes apart."""
        return RetryPolicy(max_tries=5, delay=120, delay_max=120, retry_mode=RetryMode.Fixed)

    @classmethod
    def no_retry(cls) -> RetryPolicy:
        """One try."""
        return RetryPolicy(max_tries=1, delay=5, delay_max=5, retry_mode=RetryMode.Fixed)

    def get_delay_interval(self, attempts_so_far: int) -> int:
        """Seconds to wait before the next retry.

        Fixed: `delay`. Linear: `delay * (n + 1)`. Exponential: `d = delay * 2**n`, then a uniform choice from
        `[d // 2, d]`, the "equal jitter" of
        https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/. None is over `delay_max`.

        Args:
            attempts_so_far: n, the retries so far: 0 for the first one.
        """
        if self.retry_mode is RetryMode.Fixed:
            return min(self.delay, self.longest_delay)
        if self.retry_mode is RetryMode.Linear:
            return min(self.delay * (attempts_so_far + 1), self.longest_delay)
        longest = min(self.delay * 2 ** min(attempts_so_far, 31), self.longest_delay)  # 2**31 is over any
        return random.randint(longest // 2, longest)


class NoRetry(RetryPolicy):
    """The policy of one try."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(max_tries=1, delay=5, delay_max=5)


DEFAULT_POLICY = RetryPolicy.default()


class RetryAttempts(NamedTuple):
    """How often a task has run before, and when it was last sent to the queue."""

    attempts: int
    last_retry: datetime.datetime

    @classmethod
    def default(cls, attempts: int = 0) -> RetryAttempts:
        return cls(attempts, datetime.datetime.now(datetime.UTC))


class RetryException(BoilermakerError):
    """Raised by a task that wants to run again later.

    Args:
        msg: why, for the log and the dead letter.
        policy: the policy for this retry; None for the task's own.
        delay: seconds until it runs again, or a timedelta, in place of the policy's; it changes when, not how often.
    """

    msg: str = ""
    policy: RetryPolicy | None = None
    delay: float | None = None

    def __init__(
        self, msg: str = "", policy: RetryPolicy | None = None, delay: float | datetime.timedelta | None = None
    ) -> None:
        name = type(self).__name__
        if policy is not None and not isinstance(policy, RetryPolicy):
            raise UsageError(f"{name}: policy={policy!r} must be a RetryPolicy.")
        if isinstance(msg, RetryPolicy):
            raise UsageError(f"{name}: the message comes first, then the policy: policy={msg!r}.")
        super().__init__(msg)
        self.msg = msg
        self.policy = policy
        self.delay = None if delay is None else _seconds(f"{name}: delay", delay)


class RetryExceptionDefault(RetryException):
    """Retry by `RetryPolicy.default()`."""

    def __init__(self, msg: str = "") -> None:
        super().__init__(msg, RetryPolicy.default())


def _overridden(mode: RetryMode, override: dict[str, Any]) -> RetryPolicy:
    """Five tries, from 30 s up to 600 s, but for what is overridden; a longer delay is not cut to those 600 s."""
    policy = RetryPolicy(**{"max_tries": 5, "delay": 30, "retry_mode": mode, **override})
    return policy if "delay_max" in override else dataclasses.replace(policy, delay_max=max(600, policy.delay))


class RetryExceptionDefaultLinear(RetryException):
    """Retry after 30 s, 60 s, 90 s ... up to 600 s, five tries in all; keywords override the policy's fields."""

    def __init__(self, msg: str = "", **override: Any) -> None:
        super().__init__(msg, _overridden(RetryMode.Linear, override))


class RetryExceptionDefaultExponential(RetryException):
    """Retry after 30 s, 60 s, 120 s ... with jitter, up to 600 s; keywords override the policy's fields."""

    def __init__(self, msg: str = "", **override: Any) -> None:
        super().__init__(msg, _overridden(RetryMode.Exponential, override))


def _retry_in(error: BaseException | None) -> RetryException | None:
    """The RetryException that was raised; by a TaskGroup, in a group that holds nothing else."""
    if isinstance(error, RetryException):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    members = list(_members_of(error))
    return members[0] if all(isinstance(member, RetryException) for member in members) else None


def _members_of(group: BaseExceptionGroup[Any]) -> Iterator[Any]:
    """The exceptions in a group, and in the groups in it, which may be nested deeper than Python calls."""
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending += reversed(error.exceptions)
        else:
            yield error


# ======================================================================================================================
# 3. Tasks: a task, its callbacks, chains, groups; the decorated function
# ======================================================================================================================

TaskCallable: TypeAlias = Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]
"""What can be registered: an `async def` whose first argument is the application's state."""


_random = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


def new_task_id() -> str:
    """A UUID of version 7, https://www.rfc-editor.org/rfc/rfc9562: ids sort by the time they were made.

    A generator of our own is as good as, and five times faster than, asking the operating system for each.
    """
    milliseconds = int(time.time() * 1000) & 0xFFFF_FFFF_FFFF
    bits = milliseconds << 80 | 0x7 << 76 | _random.getrandbits(12) << 64 | 0b10 << 62 | _random.getrandbits(62)
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def derived_id(text: str) -> str:
    """A UUID of version 5: the same for the same text."""
    return str(uuid.uuid5(_ID_NAMESPACE, text))


_ID_NAMESPACE = uuid.UUID("5f6a1c1e-7b5c-5a53-9d0c-6d1f2f3c7b10")


class Options(NamedTuple):
    """What a registration says of its tasks, and a message too; where a task says nothing (None), this applies."""

    policy: RetryPolicy = DEFAULT_POLICY
    should_dead_letter: bool = True
    acks_late: bool = True


RetryOn: TypeAlias = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], object]
"""Which errors are worth another try: of a type, of one of several, or those for which a function returns true."""


class TaskOptions(TypedDict, total=False):
    """What a registration may say, by keyword.

    Args:
        name: the name in messages, `function.__name__` if None. A worker finds the function by it, so it must not
            change while messages are waiting.
        policy: when and how often a task is tried again; `RetryPolicy.default()` if None.
        should_dead_letter: keep what failed in the dead-letter queue (True).
        acks_late: settle the message after the function ran, so that it runs at least once (True); False: before, so
            that it runs at most once.
        timeout: seconds, or a timedelta, that a run may take, middleware included; then it is cancelled, and has failed
            with TimeoutError. None: no limit but the `max_lock_renewal` of `run`.
        expires: seconds, or a timedelta, after it was due when a task is not begun any more, but dead-lettered with
            reason `Expired`. A retry counts anew. None: never.
        retry_on: the errors that count as a RetryException.
        dont_retry_on: the types of those that do not, whatever `retry_on` says.
        result_ttl: seconds, or a timedelta, for which the outcome is kept, from when it is there, for those who await
            its `result`. None: it is not kept.
    """

    name: str | None
    policy: RetryPolicy | None
    should_dead_letter: bool
    acks_late: bool
    timeout: float | datetime.timedelta | None
    expires: float | datetime.timedelta | None
    retry_on: RetryOn | None
    dont_retry_on: type[Exception] | tuple[type[Exception], ...]
    result_ttl: float | datetime.timedelta | None


class _KeywordOptions(TypedDict, total=False):
    """Those of PublishOptions that are given by keyword only."""

    eta: datetime.datetime | None
    policy: RetryPolicy | None
    expires: float | datetime.timedelta | None
    task_id: str | None
    result_ttl: float | datetime.timedelta | None


class PublishOptions(_KeywordOptions, total=False):
    """What may be said when a task is published, by keyword; it is about the head of a workflow.

    Args:
        delay: seconds from now, or a timedelta; or else
        eta: an aware datetime.
        policy: when and how often to retry, in place of the registration's.
        publish_attempts: how often to try to send it. Every try has the same message id, the task's id, so that a queue
            with duplicate detection takes one.
        expires: seconds, or a timedelta, after it was due when it is not begun any more.
        task_id: the caller's own id, of 1 to 128 characters. A second publish of one id within the window of duplicate
            detection (on the local bus without one: 600 s) is not enqueued, and is no error.
        result_ttl: seconds, or a timedelta, for which the workflow's outcome is kept; if None, the longest that is
            registered for a step of its chain.
    """

    delay: float | datetime.timedelta | None
    publish_attempts: int | None


@dataclass(frozen=True, slots=True)
class Registration:
    """A function under its name, with its options."""

    name: str
    function: Callable[..., Coroutine[Any, Any, Any]]
    options: Options
    timeout: float | None = None
    expires: float | None = None
    retry_on: RetryOn | None = None
    dont_retry_on: tuple[type[Exception], ...] = ()
    result_ttl: float | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], given: TaskOptions) -> Registration:
        """The registration of a function, its options checked; UsageError names the one that is wrong."""
        if unknown := sorted(set(given) - TaskOptions.__optional_keys__):
            options = ", ".join(sorted(TaskOptions.__optional_keys__))
            raise InvalidArguments(f"There is no option {unknown[0]}= of a task; there are {options}.")
        name = _function_name(function, given.get("name"))
        if _signature(function)[2] < 0:
            raise UsageError(
                f"{name} must take the application's state as its first argument: async def {name}(state)."
            )
        flags: dict[str, Any] = {option: given.get(option, True) for option in ("should_dead_letter", "acks_late")}
        for option, value in flags.items():
            if type(value) is not bool:
                raise UsageError(f"{name}: {option}={_short(value)} must be True or False.")
        retry_on, dont_retry_on = given.get("retry_on"), given.get("dont_retry_on", ())
        is_predicate = callable(retry_on) and not isinstance(retry_on, type) and not _is_async(retry_on)
        if retry_on is not None and not _are_exceptions(retry_on) and not is_predicate:
            raise UsageError(
                f"{name}: retry_on={_short(retry_on)} must be a type of Exception, a tuple of such types, or a "
                "function, not async, of the exception."
            )
        if not _are_exceptions(dont_retry_on):
            raise UsageError(
                f"{name}: dont_retry_on={_short(dont_retry_on)} must be a type of Exception, or a tuple of such types."
            )
        return cls(
            name,
            function,
            Options(_checked_policy(name, given.get("policy")) or DEFAULT_POLICY, **flags),
            _time_limit(f"{name}: timeout", given.get("timeout")),
            _time_limit(f"{name}: expires", given.get("expires")),
            retry_on,
            dont_retry_on if isinstance(dont_retry_on, tuple) else (dont_retry_on,),
            _time_limit(f"{name}: result_ttl", given.get("result_ttl")),
        )

    def fill_in(self, task: Task) -> None:
        """Put in force for a task that is about to run what it was not given."""
        options = self.options
        if task.policy is None:
            task.policy = options.policy
        if task.should_dead_letter is None:
            task.should_dead_letter = options.should_dead_letter
        if task.acks_late is None:
            task.acks_late = options.acks_late
        if task.expires is None:
            task.expires = self.expires

    def retries(self, error: BaseException) -> bool:
        """Whether an error is worth another try, of a group each: by `retry_on`, unless by `dont_retry_on`."""
        if self.retry_on is None:
            return False
        if isinstance(error, BaseExceptionGroup):
            return all(self.retries(member) for member in _members_of(error))
        if not isinstance(error, Exception) or isinstance(error, (UsageError, *self.dont_retry_on)):
            return False
        if isinstance(self.retry_on, (type, tuple)):
            return isinstance(error, self.retry_on)
        try:
            return bool(self.retry_on(error))
        except Exception as broken:  # it says nothing, and so the task has failed
            error.add_note(f"retry_on of {self.name} failed: {type(broken).__name__}: {broken}")
            return False


def _is_async(function: Any) -> bool:
    """Whether a call of it gives a coroutine, or an asynchronous generator."""
    called = getattr(function, "__call__", None)  # noqa: B004 (an object with an async method of that name)
    return any(map(inspect.iscoroutinefunction, (function, called))) or inspect.isasyncgenfunction(function)


def _are_exceptions(types: object) -> bool:
    """Whether it is a type of Exception, or a tuple of such."""
    members = types if isinstance(types, tuple) else (types,)
    return all(isinstance(member, type) and issubclass(member, Exception) for member in members)


class Address(NamedTuple):
    """Who is told how a workflow ends: those who await the result of a task, or the group that it is a member of.

    It travels with all that continues the workflow: retries, `on_success`, tasks that take over.
    """

    id: str
    """The task whose outcome is awaited, the head of the workflow as it was published; or the group."""
    ttl: float = 0
    """Seconds for which an outcome is kept, from when it is there; a group needs it until it ends."""
    position: int | None = None
    """The member's, in a group."""
    queue: str | None = None
    """Where outcomes are sent; None where the bus keeps them in its file."""
    session: str | None = None
    """The session, in that queue, of the process that awaits."""


class GroupSettings(NamedTuple):
    """How a group ends.

    `names` tell who its members are once they are on their way: function names in order, each with how many of it.
    """

    return_exceptions: bool
    timeout: float
    names: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        return sum(count for _, count in self.names)


class _Bound:
    """What a task knows besides its fields; it is not compared or pickled with them."""

    _app: Boilermaker | None = None
    _function: Callable[..., Any] | None = None
    _predecessor: Task | None = None
    _worker: Worker | None = None
    _published: Options = Options()
    """The options of the registration where the task was published: on the wire they stand for what was not given."""
    _publishing: PublishOptions = {}  # noqa: RUF012 (it is replaced, never changed)
    """What was said of its publishing before that: `delay`, `eta`, `publish_attempts`, `result_ttl`."""
    _id_is_given: bool = False
    """The caller chose the id, so that a second publish of it is dropped."""
    _due: float | None = None
    group: GroupSettings | None = None
    """What makes a task a group of others, its members."""
    members: Sequence[Task] = ()

    @property
    def eta(self) -> datetime.datetime | None:
        """When the message was due; in a task that was received."""
        return None if self._due is None else _utc(self._due)


@dataclass(eq=False, repr=False, kw_only=True)
class Task(_Bound, Generic[R_co]):
    """A call of a registered function, to be run by a worker; generic in the type of its workflow's result.

    Make one with `fn.si(...)`, `Task.si(fn, ...)` or `app.create_task(fn, ...)`; until it is published, every field may
    be set. `sequence_number` and `message_id` are set by publishing, and by receiving. An option that is None was not
    given: then the registration at the receiver says. While the task runs, its options are those in force.

    Args:
        function_name: the name the function is registered under.
        args: positional arguments after `state`; JSON values.
        kwargs: keyword arguments; JSON values.
        task_id: identifies the task through its retries; also the message id of the first publish.
        expires: seconds after it was due when it is not begun any more.
        policy: when and how often to retry.
        retry_policy: in a retry by an exception's own policy, that one: it allows this try.
        attempts: the runs so far.
        should_dead_letter: a failed message goes to the dead-letter queue; else it is completed.
        acks_late: the message is settled after the function ran; else completed before it.
        on_success: the task to publish when this one has returned.
        on_failure: the task to publish when this one has failed for good.
        graph_id: kept for boilermaker-servicebus.
        queue: the queue it belongs on; None for that of the application that publishes it.
        takes_result: made by `.s()`: its parent's result, or failure, becomes the first argument.
        root: in a retry, what the ids of all that follows the task are made of.
        outcome_to: who is told how the workflow ends; set by publishing.
    """

    function_name: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    task_id: str = field(default_factory=new_task_id)
    policy: RetryPolicy | None = None
    retry_policy: RetryPolicy | None = None
    attempts: RetryAttempts = field(default_factory=RetryAttempts.default)
    should_dead_letter: bool | None = None
    acks_late: bool | None = None
    expires: float | None = None
    on_success: Task | None = None
    on_failure: Task | None = None
    graph_id: str | None = None
    queue: str | None = None
    takes_result: bool = False
    root: str | None = None
    outcome_to: Address | None = None
    sequence_number: int | None = field(default=None, init=False)
    message_id: str | None = field(default=None, init=False)

    def __repr__(self) -> str:
        return f"<Task {_printable(str(self.function_name))} {_printable(str(self.task_id))}>"

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    @classmethod
    def default(cls, function_name: str, *, payload: Mapping[str, Any] | None = None, **fields: Any) -> Task[Any]:
        """A task by name, with `payload={"args": [...], "kwargs": {...}}` and any other field."""
        payload = payload or {}
        return cls(
            function_name=function_name,
            args=list(payload.get("args", ())),
            kwargs=dict(payload.get("kwargs", {})),
            **fields,
        )

    @classmethod
    def si(
        cls,
        fn: TaskFunction[..., T] | TaskCallable[..., T],
        /,
        *args: Any,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool | None = None,
        acks_late: bool | None = None,
        **kwargs: Any,
    ) -> Task[T]:
        """An immutable signature: a call of `fn` with these arguments and no others, not yet published.

        Args:
            fn: a decorated function, or one that is registered by the time the task is published.
            policy: overrides the registration's, as do `should_dead_letter` and `acks_late`.

        Raises:
            InvalidArguments: the arguments do not fit `fn`, or JSON cannot carry them.
        """
        task = _signature_of(fn, args, kwargs, policy, should_dead_letter, acks_late)
        _check_arguments(task)
        return task

    @classmethod
    def s(
        cls,
        fn: TaskFunction[..., T] | TaskCallable[..., T],
        /,
        *args: Any,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool | None = None,
        acks_late: bool | None = None,
        **kwargs: Any,
    ) -> Task[T]:
        """As `si`, with room for the parent's result as the first argument after `state`.

        As an `on_failure` callback it receives a dict of the failure: `task_id`, `function_name`, `error` (the type's
        name), `message`, `traceback`, `attempts`.
        """
        task = _signature_of(fn, args, kwargs, policy, should_dead_letter, acks_late)
        task.takes_result = True
        _check_arguments(task)
        return task

    @property
    def payload(self) -> dict[str, Any]:
        """The arguments as they stand in the message."""
        return {"args": self.args, "kwargs": self.kwargs}

    def copy(self) -> Self:
        """The same work as new work: this task and its callbacks with fresh ids, unpublished."""
        twin = _replica(self)
        for task in _workflow(twin):
            task.task_id, task._id_is_given, task.attempts = new_task_id(), False, RetryAttempts.default()
            task.root = task.retry_policy = task.outcome_to = None
        return twin

    async def publish(self, **options: Unpack[PublishOptions]) -> Self:
        """`app.publish_task(self, ...)` of the application the task was made by; options as PublishOptions says."""
        if self._app is None:
            raise UsageError(f"{self!r} belongs to no application: use `await app.publish_task(task)`.")
        await self._app._publish([self], options)
        return self

    async def result(self, timeout: float | datetime.timedelta | None) -> R_co:
        """What the task returned, or the last step of the workflow that it is the head of; see `app.result`.

        Raises:
            UsageError: it is not published, or its result is not kept.
        """
        if self._app is None or self.message_id is None:
            raise UsageError(f"{self!r} is not published yet: what publishing gives has the result.")
        if self.outcome_to is None or self.outcome_to.id != self.task_id:
            raise UsageError(
                f"The result of {self!r} is not kept: @app.task(result_ttl=600) above {self.function_name}, or "
                "publish(result_ttl=600), keeps it for ten minutes."
            )
        result: R_co = await self._app._result(self.outcome_to, timeout)
        return result

    async def progress(self) -> Progress:
        """Of a group, how many members have ended; on the local bus, until 600 seconds after the end.

        Raises:
            UsageError: it is no group, is not published, or ended longer ago; or on Azure, which does not tell.
        """
        if self.group is None:
            raise UsageError(f"{self!r} is no group: only the members of one are counted.")
        if self._app is None or self.message_id is None:
            raise UsageError(f"{self!r} is not published yet: what publishing gives has the progress.")
        return await self._app.service_bus_client.progress(self.message_id)

    def __rshift__(self, other: Task[T] | TaskFunction[..., T]) -> Task[T]:
        """`a >> b` runs b when a has returned, and gives b, so that `a >> b >> c` reads on. Publish a.

        It changes a, whose type goes on to say what a alone returns; that of `a | b` says what b does.
        """
        following = _as_task(other)
        _refuse_groups(self, following)
        self.on_success, following._predecessor = following, self
        return following

    def __lshift__(self, other: TaskLike) -> Task[R_co]:
        """`a << b` runs a when b has returned, and gives a. Publish b."""
        preceding = _as_task(other)
        _refuse_groups(self, preceding)
        preceding.on_success, self._predecessor = self, preceding
        return self

    def __or__(self, other: Task[T] | TaskFunction[..., T]) -> Task[T]:
        """`a | b`: a new workflow, copies with fresh ids, b at the end of a's chain. Publish the whole."""
        following = _as_task(other)
        _check_beginning(self)
        _check_beginning(following)
        for task in (self, following):
            if task._id_is_given:
                raise UsageError(
                    f"{task!r}: a | b makes copies with fresh ids; give the whole one: publish(task_id=...)."
                )
        head: Any = self.copy()
        head._app = head._app or following._app  # an empty group has none
        _chain_of(head)[-1].on_success = following.copy()
        return head  # type: ignore[no-any-return]


@dataclass(eq=False, repr=False, kw_only=True)
class Group(Task[list[T]]):
    """Tasks that run at the same time, and one workflow: see `group`. What ends it follows when all have ended."""

    function_name: str = "group"
    members: Sequence[Task[T]] = ()
    group: GroupSettings | None = None

    def __repr__(self) -> str:
        return f"<Group of {len(self.members)} {_printable(str(self.task_id))}>"


def group(
    *members: Task[T] | TaskFunction[..., T] | Iterable[Task[T] | TaskFunction[..., T]],
    return_exceptions: bool = False,
    timeout: float | datetime.timedelta = 86_400,
) -> Group[T]:
    """Tasks that run at the same time: `group(a.si(1), b.si(2)) | report.s()`; its result is the list of theirs.

    What follows it, by `|` or `on_success`, runs when all members have ended, with the list of their results in their
    order. Where one has failed for good, its `on_failure` runs instead, with the failure of the first of those.

    Args:
        members: heads of workflows, one by one or as one iterable: tasks, chains, groups.
        return_exceptions: failures stand in the list, as the dicts that an `on_failure` callback receives.
        timeout: seconds, or a timedelta, after which a group that has not ended has failed with TimeoutError.

    Raises:
        UsageError: a member is no task, is not the head of its workflow, or is there twice; or an option is wrong.
    """
    [*tasks] = members
    if len(tasks) == 1 and isinstance(tasks[0], Iterable):
        tasks = list(tasks[0])
    if type(return_exceptions) is not bool:
        raise UsageError(f"group: return_exceptions={_short(return_exceptions)} must be True or False.")
    limit = _time_limit("group: timeout", timeout)
    if limit is None:
        raise UsageError("group: timeout=None: a group that never ends would be kept for ever; give seconds.")
    heads: list[Task[Any]] = [_as_task(task, "A group's member") for task in tasks]
    if len({id(head) for head in heads}) < len(heads):
        twice = next(head for head, count in collections.Counter(heads).items() if count > 1)
        raise UsageError(f"{twice!r} is in the group twice: use copy().")
    for head in heads:
        _check_beginning(head)
    whole: Group[T] = Group(members=heads, group=GroupSettings(return_exceptions, limit))
    whole._app = next((head._app for head in heads if head._app is not None), None)
    return whole


def _refuse_groups(*tasks: Task) -> None:
    for task in tasks:
        if task.group is not None:
            raise UsageError(f"{task!r} has no part in a >> b, which would link the group itself: use a | b.")


class TaskFunction(functools.partial[Coroutine[Any, Any, R]], Generic[P, R]):
    """A function that `@app.task` registered: call it inline, or make tasks of it.

    `await fn(state, ...)` runs it here and now, without a queue. To whoever asks, such as FastAPI or APScheduler, it is
    a coroutine function: as a `functools.partial` of one, the only such thing besides a function in Python 3.11.
    """

    app: Boilermaker
    registration: Registration
    function: TaskCallable[P, R]
    _publishing: PublishOptions

    def __new__(cls, app: Boilermaker, registration: Registration) -> TaskFunction[P, R]:
        self = super().__new__(cls, registration.function)
        functools.update_wrapper(self, registration.function)
        self.app, self.registration, self.function = app, registration, registration.function
        self._publishing = {}
        return self

    def __call__(self, state: Any, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return self.function(state, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<TaskFunction {self.registration.name}>"

    def __reduce__(self) -> str:
        return str(vars(self).get("__qualname__", self.registration.name))  # by name, as a function

    @overload
    def si(self: TaskFunction[P, Task[T]], /, *args: P.args, **kwargs: P.kwargs) -> Task[T]: ...

    @overload
    def si(self, /, *args: P.args, **kwargs: P.kwargs) -> Task[R]: ...

    def si(self, /, *args: P.args, **kwargs: P.kwargs) -> Task[Any]:
        """An immutable signature, see `Task.si`; typed by what the function returns, or the task that it returns."""
        task = self._call(args, kwargs)
        _check_arguments(task)
        return task

    @overload
    def s(self: TaskFunction[P, Task[T]], /, *args: Any, **kwargs: Any) -> Task[T]: ...

    @overload
    def s(self, /, *args: Any, **kwargs: Any) -> Task[R]: ...

    def s(self, /, *args: Any, **kwargs: Any) -> Task[Any]:
        """A signature with room for the parent's result, see `Task.s`."""
        task = self._call(args, kwargs)
        task.takes_result = True
        _check_arguments(task)
        return task

    def map(self, items: Iterable[Any], /, *args: Any, **kwargs: Any) -> Group[R]:
        """A group of this function's calls, one for each item: `fn(state, item, *args, **kwargs)`; see `group`."""
        calls = [self._call((item, *args), dict(kwargs)) for item in _listed(items, f"{self.registration.name}.map")]
        whole: Group[R] = group(calls)
        whole._app, whole._publishing = self.app, self._about_sending()
        if "task_id" in self._publishing:
            _set_options(whole, {"task_id": self._publishing["task_id"]})
        for call in calls:
            _check_arguments(call)
            call._publishing = {}  # what is said of publishing is said of the group
            if call._id_is_given:
                call.task_id, call._id_is_given = new_task_id(), False
        return whole

    def options(self, **options: Unpack[PublishOptions]) -> TaskFunction[P, R]:
        """This function with options for what is published of it: `await fn.options(expires=60).delay("x")`.

        They are those of PublishOptions. In a workflow, all but `policy` and `expires` are for its head.

        Raises:
            UsageError: names the option that is wrong.
        """
        twin: TaskFunction[P, R] = TaskFunction(self.app, self.registration)
        twin._publishing = _merged_options(self._publishing, options, self.registration.name)
        return twin

    @overload
    async def delay(self: TaskFunction[P, Task[T]], /, *args: P.args, **kwargs: P.kwargs) -> Task[T]: ...

    @overload
    async def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> Task[R]: ...

    async def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> Task[Any]:
        """Publish a call of this function, to run as soon as a worker is free; the published `Task`.

        Raises:
            InvalidArguments: the arguments do not fit the function, or JSON cannot carry them.
            MessageTooLarge: the message is over the limit of the bus.
            BoilermakerAppException: the bus did not take it.
        """
        return await self.app.publish_task(self._call(args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task[Any]:
        task: Task[Any] = Task(function_name=self.registration.name, args=list(args), kwargs=kwargs)
        task._app, task._function = self.app, self.function
        if self._publishing:
            _set_options(task, self._publishing)
            task._publishing = self._about_sending()
        return task

    def _about_sending(self) -> PublishOptions:
        """Of the options, those that are no fields of a task."""
        sending = ("delay", "eta", "publish_attempts", "result_ttl")
        about_sending: Any = {name: value for name, value in self._publishing.items() if name in sending}
        return about_sending  # type: ignore[no-any-return]

    def __rshift__(self, other: Task[T] | TaskFunction[..., T]) -> Task[T]:
        return self._call((), {}) >> other

    def __lshift__(self, other: TaskLike) -> Task[R]:
        return self._call((), {}) << other

    def __or__(self, other: Task[T] | TaskFunction[..., T]) -> Task[T]:
        return self._call((), {}) | other


TaskLike: TypeAlias = Task | TaskFunction[..., Any]
"""What a workflow is made of: a task, or a decorated function, which stands for `fn.si()`."""


def _as_task(operand: object, role: str = "A workflow's member") -> Task:
    if isinstance(operand, Task):
        return operand
    if isinstance(operand, TaskFunction):
        try:
            return operand.si()
        except InvalidArguments as error:
            name = operand.registration.name
            raise InvalidArguments(
                f"{error} Alone, a function stands for {name}.si(); {name}.s() receives its parent's result."
            ) from None
    hint = ""
    if inspect.iscoroutine(operand):
        operand.close()
        hint = " To publish by delay(), await it; si() makes a task to be published later."
    elif inspect.iscoroutinefunction(operand):
        hint = f" Use Task.si({operand.__name__}, ...)."
    raise UsageError(f"{role} must be a Task or a decorated function, not {operand!r}.{hint}")


def _signature_of(
    fn: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    policy: RetryPolicy | None,
    should_dead_letter: bool | None,
    acks_late: bool | None,
) -> Task:
    """The task of `Task.si` and `Task.s`."""
    if isinstance(fn, TaskFunction):
        task = fn._call(args, kwargs)
    else:
        task = Task(function_name=_function_name(fn), args=list(args), kwargs=kwargs)
        task._function = fn
    task.policy = _checked_policy(task.function_name, policy)
    task.should_dead_letter, task.acks_late = should_dead_letter, acks_late
    return task


def _checked_policy(name: str, policy: RetryPolicy | None) -> RetryPolicy | None:
    if policy is not None and not isinstance(policy, RetryPolicy):
        raise UsageError(f"{name}: policy={policy!r} must be a RetryPolicy.")
    return policy


def _merged_options(said: PublishOptions, options: PublishOptions, name: str) -> PublishOptions:
    """Options on top of others, without what is None; checked, and spans of time that are kept in seconds.

    Raises:
        UsageError: names the option that is wrong.
    """
    if unknown := sorted(set(options) - PublishOptions.__optional_keys__):
        known = ", ".join(sorted(PublishOptions.__optional_keys__))
        raise InvalidArguments(f"{name}: there is no option {unknown[0]}= of publishing; there are {known}.")
    given: Any = {option: value for option, value in options.items() if value is not None}
    merged: Any = {**said, **given}
    for one, other in (("delay", "eta"), ("eta", "delay")):
        if one in given and other not in given:
            merged.pop(other, None)
    _due_time(merged.get("delay"), merged.get("eta"))
    _checked_policy(name, merged.get("policy"))
    attempts, task_id = merged.get("publish_attempts", 1), merged.get("task_id", "x")
    if type(attempts) is not int or attempts < 1:
        raise UsageError(f"publish_attempts={_short(attempts)} must be an int of at least 1.")
    if not isinstance(task_id, str) or not 0 < len(task_id) <= MAX_MESSAGE_ID_LENGTH or task_id.startswith("cron:"):
        raise UsageError(
            f"task_id={_short(task_id)} must be a string of 1 to {MAX_MESSAGE_ID_LENGTH} characters that does not "
            "begin with 'cron:', as the ids of periodic tasks do."
        )
    for name in ("expires", "result_ttl"):
        if name in merged:
            merged[name] = _time_limit(name, merged[name])
    options_of_now: PublishOptions = merged
    return options_of_now


def _set_options(task: Task, options: PublishOptions) -> None:
    """Set the fields that options are about, checked as they are; the others are for the bus."""
    expires: Any = options.get("expires", task.expires)  # in seconds by now
    task.policy, task.expires = options.get("policy", task.policy), expires
    if (task_id := options.get("task_id")) is not None:
        task.task_id, task._id_is_given = task_id, True


def _function_name(fn: Any, name: str | None = None) -> str:
    """The name of an `async def`; anything else is an error that says what is wrong with it.

    Args:
        name: what it is to be called; its own name if None.
    """
    called = getattr(fn, "__name__", None) or getattr(getattr(fn, "__func__", None), "__name__", None) or repr(fn)
    if isinstance(fn, (staticmethod, classmethod)):
        raise UsageError(
            f"Function must be async: {called} is a {type(fn).__name__} here. Put @{type(fn).__name__} above @app.task."
        )
    if inspect.isasyncgenfunction(fn):
        raise UsageError(f"Function must not yield: {called} is an async generator. Return its result instead.")
    if not inspect.iscoroutinefunction(fn):
        raise UsageError(f"Function must be async: {called}. Declare it with `async def {called}(state, ...)`.")
    if name is None and not hasattr(fn, "__name__"):
        raise UsageError(f"Function has no name: {fn!r}. Give it one with name='...'.")
    name = str(fn.__name__) if name is None else name
    if not isinstance(name, str) or not name:
        raise UsageError(f"name={name!r} of {called} must be a string that is not empty.")
    return name


def _workflow(head: Task) -> list[Task]:
    """The task, all its callbacks and members, each once, before their parents; decorated functions made tasks.

    Without recursion, so that a long chain is no deeper than a short one.

    Raises:
        UsageError: a callback is no task, or is, by way of its callbacks, its own.
    """
    finished: dict[int, Task] = {}
    entered: set[int] = set()
    pending = [head]
    while pending:
        task = pending[-1]
        for role in ("on_success", "on_failure"):
            if (callback := getattr(task, role)) is not None and not isinstance(callback, Task):
                setattr(task, role, _as_task(callback, f"{role} of {task!r}"))
        callbacks = [callback for callback in (task.on_success, task.on_failure, *task.members) if callback is not None]
        following = [callback for callback in callbacks if id(callback) not in finished]
        if id(task) in finished or not following:
            finished[id(task)] = pending.pop()
            continue
        entered.add(id(task))
        for callback in following:
            if id(callback) in entered:
                raise UsageError(
                    f"{callback!r} is its own callback, or member: a workflow cannot have a cycle, use copy()."
                )
        pending += following
    return list(finished.values())


def _chain_of(head: Task) -> list[Task]:
    """The task, its `on_success`, and so on."""
    _workflow(head)
    steps = [head]
    while (following := steps[-1].on_success) is not None:
        steps.append(following)
    return steps


def _beginnings_of(head: Task) -> list[Task]:
    """What runs first of a workflow: its head, or the members of a group, or of groups among them."""
    _workflow(head)
    beginnings, pending = [], [head]
    while pending:
        task = pending.pop()
        beginnings += [task] if task.group is None else []
        pending += task.members
    return beginnings


def _steps_of(head: Task) -> list[Task]:
    """The steps of a chain, with those of the members of its groups."""
    steps = _chain_of(head)
    for step in steps:  # which grows meanwhile
        for member in step.members:
            steps += _chain_of(member)
    return steps


def _replica(head: TaskT) -> TaskT:
    """A copy of a workflow, ids included, that can be changed without the original."""
    replicas: dict[int, Task] = {}
    for task in _workflow(head):
        parts: dict[str, Any] = {
            "args": list(task.args),
            "kwargs": dict(task.kwargs),
            "on_success": replicas.get(id(task.on_success)),
            "on_failure": replicas.get(id(task.on_failure)),
        }
        if task.group is not None:
            parts["members"] = [replicas[id(member)] for member in task.members]
        replicas[id(task)] = replica = dataclasses.replace(task, **parts)
        _bind_like(replica, task)
    twin: TaskT = replicas[id(head)]  # type: ignore[assignment]
    return twin


def _bind_like(twin: Task, task: Task) -> None:
    """Let a copy know what the original does, but for its place in a workflow."""
    twin._app, twin._function, twin._published = task._app, task._function, task._published
    twin._publishing, twin._id_is_given = task._publishing, task._id_is_given


def _check_beginning(task: Task) -> None:
    """Refuse what `a >> b` returned: to publish b, or to begin a part of a workflow with it, would skip a."""
    head = task
    while head._predecessor is not None and head._predecessor.on_success is head:
        head = head._predecessor
        if head is task:
            break
    if head is not task:
        raise UsageError(
            f"{task!r} follows another task, which would be skipped: take the chain's head, {head!r}, "
            "or, to do without that one, a copy()."
        )


def _check_arguments(task: Task) -> None:
    """Raise InvalidArguments unless the arguments fit the function and JSON."""
    if task._function is not None:
        _check_call(task, task._function)
    try:
        _to_json(task.payload)
    except (TypeError, ValueError, RecursionError) as error:
        raise _explain_arguments(task, error) from error


_HINTS = {
    "on_success": "A callback is set on a task: task = app.create_task(...); task.on_success = ...; task.publish().",
    "on_failure": "A callback is set on a task: task = app.create_task(...); task.on_failure = ...; task.publish().",
    "countdown": "The option is called delay.",
    "queue": "To another application's queue it goes by app.send_task('name', ..., queue=...).",
}
"""What people who come from Celery pass as options, and here would be arguments."""


def _check_call(task: Task, function: Callable[..., Any]) -> None:
    positional = len(task.args) + task.takes_result
    signature, least, most = _signature(function)
    if not task.kwargs and least <= positional <= most:
        return
    try:
        signature.bind(*[None] * (1 + positional), **task.kwargs)
    except TypeError as error:
        name = task.function_name
        hints = [hint for option, hint in _HINTS.items() if option in task.kwargs]
        if task.takes_result and positional > most:
            hints.append(f"{name}.s() passes its parent's result as the first argument; {name}.si() passes none.")
        raise InvalidArguments(" ".join([f"{name}{signature} cannot be called like that: {error}.", *hints])) from None


_SIGNATURE_OPTIONS: dict[str, Any] = {"follow_wrapped": False}  # what is called is the wrapper
if sys.version_info >= (3, 14):
    import annotationlib

    _SIGNATURE_OPTIONS["annotation_format"] = annotationlib.Format.STRING  # annotations are nobody's to evaluate


@functools.lru_cache(maxsize=4096)
def _signature(function: Callable[..., Any]) -> tuple[inspect.Signature, float, float]:
    """A function's signature; the least and the most positional arguments after `state` of a call without keywords."""
    signature = inspect.signature(function, **_SIGNATURE_OPTIONS)
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unlimited = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    most = math.inf if unlimited else len(positional) - 1
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return signature, math.inf, most
    return signature, sum(p.default is p.empty for p in positional) - 1, most


def _explain_arguments(task: Task, error: Exception) -> InvalidArguments:
    """The error that names the argument which JSON cannot carry."""
    for name, value in itertools.chain(enumerate(task.args, 1), task.kwargs.items()):
        try:
            _to_json(value)
        except (TypeError, ValueError, RecursionError) as cause:
            return InvalidArguments(
                f"{task.function_name}: JSON cannot carry argument {name} = {_short(value)}: {cause}. "
                "Pass numbers, strings (such as `.isoformat()` of a date), lists and dicts, or an id to look it up by."
            )
    return InvalidArguments(f"{task.function_name}: JSON cannot carry the arguments: {error}.")


_current_task: contextvars.ContextVar[Task] = contextvars.ContextVar("boilermaker_current_task")


def current_task() -> Task:
    """The task that is running, inside a task function.

    Raises:
        UsageError: called outside of one.
    """
    try:
        return _current_task.get()
    except LookupError:
        raise UsageError("current_task() was called outside of a running task.") from None


# ======================================================================================================================
# 4. Wire format: a task as JSON, compatible with boilermaker-servicebus 1.x
# ======================================================================================================================

# What is new here is optional, and ignored by the other side. `FIELDS` is all there is to know about a field: what may
# be set, how it is written, how it is read. Only the options have more to them, since the other side always wants to
# see a policy and two flags, whether they were given or not.

MAX_WORKFLOW_BYTES = 100 * 1024 * 1024
"""The largest message of any Service Bus tier (Premium): where encoding a workflow gives up."""

_to_json: Callable[[object], str] = json.JSONEncoder(
    separators=(",", ":"), allow_nan=False, check_circular=False
).encode
"""Compact JSON, strict about NaN. ASCII only, so that a character is a byte."""


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def _from_json(text: str) -> Any:
    """As `json.loads`, strict about numbers, and quicker where there is no white space around the value."""
    try:
        document, end = _decoder.raw_decode(text)
    except ValueError:
        return _decoder.decode(text)
    return document if end == len(text) else _decoder.decode(text)


class InvalidTaskFormat(BoilermakerError):
    """A message body is not a task; says where and why."""


# -- the fields


def _write_text(text: str | None) -> str:
    return "null" if text is None else _to_json(text)


def _write_attempts(attempts: RetryAttempts) -> str:
    return f'{{"attempts":{attempts.attempts},"last_retry":"{attempts.last_retry.isoformat()}"}}'


def _read_attempts(document: dict[str, Any], name: str, where: str) -> RetryAttempts:
    attempts, last_retry = document.get("attempts"), document.get("last_retry")
    attempts = 0 if attempts is None else attempts
    if type(attempts) is not int or not 0 <= attempts <= MAX_SECONDS:
        raise InvalidTaskFormat(f"{name} of {where}: {_short(attempts)} is no integer from 0 to {MAX_SECONDS}.")
    if last_retry is None:
        return RetryAttempts.default(attempts)
    try:
        return RetryAttempts(attempts, datetime.datetime.fromisoformat(last_retry))
    except (ValueError, TypeError) as error:
        raise InvalidTaskFormat(f"last_retry of {where}: {_short(last_retry)} is no ISO 8601 time.") from error


def _read_payload(document: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for part, kind in (("args", list), ("kwargs", dict)):
        value = document.get(part)
        if type(value) is kind:
            payload[part] = value
        elif value is not None:
            raise InvalidTaskFormat(f"{name}.{part} of {where} must be {_JSON_TYPES[kind]}, not {_short(value)}.")
    return payload


def _read_policy(document: dict[str, Any], name: str, where: str) -> RetryPolicy:
    try:
        values = _policy_values(document)
        try:
            return _policy_of(*values)
        except TypeError:  # a list, which the cache cannot look up
            return _policy_of.__wrapped__(*values)
    except KeyError as missing:
        raise InvalidTaskFormat(f"{name} of {where}: {missing} is missing.") from missing
    except UsageError as error:
        raise InvalidTaskFormat(f"{name} of {where}: {error}") from error


_policy_values = operator.itemgetter("max_tries", "delay", "delay_max", "retry_mode")


@functools.lru_cache(maxsize=1024, typed=True)
def _policy_of(max_tries: Any, delay: Any, delay_max: Any, retry_mode: Any) -> RetryPolicy:
    """A policy as it stands in a message: there, a maximum under the delay is no error."""
    policy = RetryPolicy(max_tries, 0, delay_max, retry_mode)
    object.__setattr__(policy, "delay", RetryPolicy(delay=delay).delay)
    return policy


def _read_queue(queue: str, name: str, where: str) -> str:
    try:
        return _checked_queue_name(queue)
    except ConfigurationError as error:
        raise InvalidTaskFormat(f"{name} of {where}: {error}") from error


def _write_address(address: Address) -> str:
    return _to_json({name: value for name, value in address._asdict().items() if value is not None})


def _read_address(document: dict[str, Any], name: str, where: str) -> Address:
    address = Address(*[document.get(part, default) for part, default in _ADDRESS_DEFAULTS.items()])
    try:
        known = _is_text(address.id) and (address.session is None or _is_text(address.session))
        if address.position is None:
            known = known and _time_limit("ttl", address.ttl) is not None
        else:
            known = known and type(address.position) is int and 0 <= address.position <= MAX_SECONDS
            _seconds("ttl", address.ttl)
        if address.queue is not None:
            _checked_queue_name(address.queue)
    except UsageError:
        known = False
    if not known:
        raise InvalidTaskFormat(f"{name} of {where}: {_short(document)} does not say whom to tell.")
    return address


_ADDRESS_DEFAULTS: Mapping[str, Any] = {"id": "", **Address._field_defaults}


def _write_group(settings: GroupSettings) -> str:
    return _to_json(settings._asdict())


def _read_group(document: dict[str, Any], name: str, where: str) -> GroupSettings:
    try:
        timeout = _time_limit("timeout", document["timeout"]) or 0
        names = tuple((str(member), _count("names", count)) for member, count in document["names"])
        settings = GroupSettings(document["return_exceptions"] is True, timeout, names)
        if settings.total > MAX_SECONDS:
            raise ValueError(f"{settings.total} members")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidTaskFormat(
            f"{name} of {where}: {_short(document)} are no settings of a group: {error}."
        ) from error
    return settings


def _read_expires(seconds: float, name: str, where: str) -> float:
    try:
        return _time_limit(name, seconds) or 0
    except UsageError as error:
        raise InvalidTaskFormat(f"{where}: {error}") from error


class Field(NamedTuple):
    """A field of a task: what it may be set to, and how it stands in a message."""

    name: str
    types: tuple[type, ...]
    """Of the attribute; none where there is no such attribute."""
    json_type: type | None
    """Of the JSON value; None where it is a part of another field's."""
    write: Callable[[Any], str] = _to_json
    read: Callable[[Any, str, str], Any] | None = None
    """Makes the attribute of the JSON value, its name and where the task stands, for errors; None if it is the same."""


_NONE = type(None)

ALWAYS_WRITTEN = (
    Field("task_id", (str,), str),
    Field("function_name", (str,), str),
    Field("payload", (dict,), dict, read=_read_payload),
    Field("attempts", (RetryAttempts,), dict, _write_attempts, _read_attempts),
    Field("graph_id", (str, _NONE), str, _write_text),
)
WRITTEN_WHERE_SET = (  # where they are neither None nor False, that is
    Field("takes_result", (bool,), bool),
    Field("root", (str, _NONE), str),
    Field("expires", (float, int, _NONE), float, read=_read_expires),
    Field("outcome_to", (Address, _NONE), dict, _write_address, _read_address),
    Field("group", (GroupSettings, _NONE), dict, _write_group, _read_group),
)
WRITTEN_WITH_OTHERS = (  # in the payload; the options together, see below; the queue where it is another
    Field("args", (list, tuple), None),
    Field("kwargs", (dict,), None),
    Field("policy", (RetryPolicy, _NONE), dict, read=_read_policy),
    Field("retry_policy", (RetryPolicy, _NONE), None),
    Field("scheduled_policy", (), dict, read=_read_policy),
    Field("policy_is_default", (), bool),
    Field("should_dead_letter", (bool, _NONE), bool),
    Field("acks_late", (bool, _NONE), bool),
    Field("default_options", (), list),
    Field("queue", (str, _NONE), str, read=_read_queue),
)
FIELDS = ALWAYS_WRITTEN + WRITTEN_WHERE_SET + WRITTEN_WITH_OTHERS

_TEMPLATE = "{" + "".join(f'"{each.name}":%s,' for each in ALWAYS_WRITTEN) + '%s%s,"on_success":%s,"on_failure":%s}'
_WRITERS = [each.write for each in ALWAYS_WRITTEN]
_READERS = {each.name: (each.json_type, each.read) for each in FIELDS if each.json_type is not None}
_TYPES = [each.types for each in FIELDS if each.types]
_attributes = operator.attrgetter(*(each.name for each in FIELDS if each.types))
_always = operator.attrgetter(*(each.name for each in ALWAYS_WRITTEN))
_where_set = operator.attrgetter(*(each.name for each in WRITTEN_WHERE_SET))
_JSON_TYPES: Mapping[type, str] = {
    str: "a string",
    bool: "true or false",
    float: "a number",
    list: "an array",
    dict: "an object",
}


def _check_fields(task: Task) -> None:
    """Refuse what was set by hand and cannot be."""
    if not all(map(isinstance, _attributes(task), _TYPES)):
        for each in FIELDS:
            if each.types and not isinstance(value := getattr(task, each.name), each.types):
                expected = " or ".join(kind.__name__ for kind in each.types)
                raise UsageError(f"{task!r}: {each.name}={_short(value)} must be of type {expected}.")
    if not task.function_name or not task.task_id:
        name = "task_id" if task.function_name else "function_name"
        raise UsageError(f"{task!r}: {name}='' must not be empty.")
    if not (task.task_id.isascii() and task.function_name.isascii()):
        try:
            f"{task.task_id}{task.function_name}".encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{task!r}: task_id and function_name must be text that can be encoded: {error}."
            ) from None
    attempts, last_retry = task.attempts
    if type(attempts) is not int or not 0 <= attempts <= MAX_SECONDS or not isinstance(last_retry, datetime.datetime):
        raise UsageError(f"{task!r}: attempts={_short(task.attempts)} must be a count from 0, and a datetime.")
    if task.queue is not None:
        _checked_queue_name(task.queue)
    if task.expires is not None:
        _time_limit(f"{task!r}: expires", task.expires)


# -- the options: in a message there is always one, marked where nobody gave it, and the receiver's registration applies


@functools.lru_cache(maxsize=1024)
def _write_options(
    policy: RetryPolicy | None,
    retry_policy: RetryPolicy | None,
    should_dead_letter: bool | None,
    acks_late: bool | None,
    published: Options,
) -> str:
    """What was given; for the rest, the publisher's registration, with a mark. A retry's own policy comes first."""
    flags = {"should_dead_letter": should_dead_letter, "acks_late": acks_late}
    not_given = [name for name, value in flags.items() if value is None]
    options: dict[str, Any] = {
        "policy": dataclasses.asdict(retry_policy or policy or published.policy),
        **{name: getattr(published, name) if value is None else value for name, value in flags.items()},
    }
    if policy is None:
        options["policy_is_default"] = True
    elif retry_policy is not None:
        options["scheduled_policy"] = dataclasses.asdict(policy)
    if not_given:
        options["default_options"] = not_given
    return _to_json(options)[1:-1]


def _read_options(fields: dict[str, Any]) -> Options:
    """Turn what is marked into None; what stood there, the publisher's registration, is given back."""
    policy = fields.get("policy")
    published = Options(policy or DEFAULT_POLICY, fields.get("should_dead_letter", True), fields.get("acks_late", True))
    if "scheduled_policy" in fields:
        fields["policy"], fields["retry_policy"] = fields.pop("scheduled_policy"), policy
    if fields.pop("policy_is_default", policy is None):
        fields["policy"] = None
        if "attempts" in fields and fields["attempts"].attempts:  # whoever published a retry allowed it
            fields["retry_policy"] = policy
    if "default_options" in fields:
        for name in fields.pop("default_options"):
            if name in ("should_dead_letter", "acks_late"):
                fields[name] = None
    return published


# -- whole tasks


def encode(task: Task, queue: str, home: str) -> str:
    """The body of a task's message, its callbacks nested inside; ASCII only, so a character is a byte.

    Args:
        queue: where the message goes.
        home: where callbacks go that name no queue: the publisher's own.

    Raises:
        UsageError: the workflow has a cycle, or is too deep to be decoded again.
        InvalidArguments: JSON cannot carry an argument.
        MessageTooLarge: it would be larger than on any bus.
    """
    if task.on_success is None and task.on_failure is None and not task.members:
        return _encode_one(task, None, "null", "null")
    texts: dict[int, str] = {}
    depths: dict[int, int] = {}
    members = _workflow(task)
    for member in members:
        on_success, on_failure, *parts = map(id, (member.on_success, member.on_failure, *member.members))
        depths[id(member)] = 1 + max(depths.get(part, 0) for part in (on_success, on_failure, *parts))
        own_queue = queue if member is task else member.queue or home
        texts[id(member)] = _encode_one(
            *(member, own_queue if own_queue != queue else None),
            *(texts.get(on_success, "null"), texts.get(on_failure, "null"), ",".join(texts[part] for part in parts)),
        )
        if len(texts[id(member)]) > MAX_WORKFLOW_BYTES:
            raise MessageTooLarge(f"{task!r} and its callbacks are over {MAX_WORKFLOW_BYTES} bytes: no bus takes that.")
    if depths[id(task)] > MAX_WORKFLOW_DEPTH:
        raise UsageError(
            f"{task!r} is the head of {depths[id(task)]} nested callbacks, the limit is {MAX_WORKFLOW_DEPTH}: "
            "let a task of the chain publish the rest."
        )
    if len(members) > 100:  # with deep arguments, it may still be too deep together
        try:
            _from_json(texts[id(task)])
        except RecursionError as error:
            raise UsageError(f"{task!r}: its callbacks and arguments are nested too deeply to be read.") from error
    return texts[id(task)]


def _encode_one(task: Task, queue: str | None, on_success: str, on_failure: str, members: str = "") -> str:
    """One task around the JSON of its callbacks; a template is twice as fast as a dict."""
    options = _write_options(task.policy, task.retry_policy, task.should_dead_letter, task.acks_late, task._published)
    if any(_where_set(task)):
        for each in WRITTEN_WHERE_SET:
            if value := getattr(task, each.name):
                options += f',"{each.name}":{each.write(value)}'
    if members:
        options += f',"members":[{members}]'
    queue_text = "" if queue is None else f',"queue":{_to_json(queue)}'
    try:
        written = [write(value) for write, value in zip(_WRITERS, _always(task))]  # noqa: B905
        return _TEMPLATE % (*written, options, queue_text, on_success, on_failure)
    except (TypeError, ValueError, RecursionError) as error:
        raise _explain_arguments(task, error) from error


def decode(body: str | bytes, queue: str) -> Task:
    """The task of a message body that was received from `queue`, with all its callbacks.

    Without recursion, so that a long chain is no deeper than a short one.

    Raises:
        InvalidTaskFormat: it is no task; unknown fields are no reason.
    """
    try:
        document = _from_json(body if isinstance(body, str) else body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidTaskFormat(f"The body is not JSON that can be read: {error}.") from error
    head = _decode_one(document, queue, "the body")
    pending = [(head, document, "")]
    while pending:
        parent, fields, path = pending.pop()
        for role in ("on_success", "on_failure"):
            if (nested := fields.get(role)) is not None:
                place = path + role
                callback = _decode_one(nested, queue, place if len(place) <= 200 else f"{place[:80]}...{place[-80:]}")
                setattr(parent, role, callback)
                pending.append((callback, nested, f"{place}."))
        if parent.group is not None:
            members = [] if fields.get("members") is None else fields["members"]
            if not isinstance(members, list):
                raise InvalidTaskFormat(f"{path}members must be an array, not {_short(members)}.")
            parent.members = [_decode_one(nested, queue, f"{path}members") for nested in members]
            pending += [
                (member, nested, f"{path}members.") for member, nested in zip(parent.members, members, strict=True)
            ]
    return head


def _decode_one(document: Any, queue: str, where: str) -> Task:
    """One task without its callbacks. A field that is absent or null has its default."""
    if type(document) is not dict:
        raise InvalidTaskFormat(f"{where} must be an object, not {_short(document)}.")
    fields: dict[str, Any] = {"queue": queue}
    for name, value in document.items():
        if value is None or name not in _READERS:
            continue
        json_type, read = _READERS[name]
        if type(value) is not json_type and (json_type is not float or type(value) is not int):
            raise InvalidTaskFormat(f"{name} of {where} must be {_JSON_TYPES[json_type]}, not {_short(value)}.")
        fields[name] = value if read is None else read(value, name, where)
    if "payload" in fields:
        fields.update(fields.pop("payload"))
    for name in ("task_id", "function_name"):
        if name not in fields:
            raise InvalidTaskFormat(f"{name} of {where} is missing.")
    published = _read_options(fields)
    task: Task = Group(**fields) if "group" in fields else Task(**fields)
    task._published = published
    return task


# ======================================================================================================================
# 5. Messages: what travels between the application and a bus
# ======================================================================================================================


class Outgoing(NamedTuple):
    """A message to send. `due` is a Unix timestamp, None for at once."""

    body: str | bytes
    message_id: str
    queue: str
    due: float | None = None
    application_properties: Mapping[str, str] = {}
    function_name: str | None = None
    """The task's, for those who count a queue by task; the body is what counts."""
    given_id: bool = False
    """The id stands for what is meant, a caller's or a tick's: a second one within the bus's `id_window` is dropped."""
    outcome_id: str | None = None
    """Of a task that is to run anew: under this id there may be an outcome, to be forgotten."""
    numbered: bool = True
    """Who sends it, scheduled, wants to know its sequence number, which on Azure costs a request for each time."""
    opens_group: bool = False
    """It is no message for a worker, but what a group begins with, under the group's id."""
    part_of: str | None = None
    """The id that was given to what it is sent with: where that group is a duplicate, so is this."""
    session: str | None = None
    """This and the next two are for Azure alone, and for what tells an outcome."""
    correlation_id: str | None = None
    time_to_live: float | None = None
    """In seconds."""


@dataclass(slots=True, eq=False)
class Delivery:
    """A message received under a lock.

    `delivery_count` is how often it had been delivered before, `due` when it was enqueued, or scheduled for.
    """

    sequence_number: int
    delivery_count: int
    message_id: str | None
    body: str | bytes
    application_properties: Mapping[str, str]
    locked_until: float
    due: float = 0
    raw: Any = None
    received: float = field(default_factory=time.monotonic)


class Action(enum.Enum):
    """What a receiver does with a message; the names are those of the Azure SDK, but for the last two."""

    COMPLETE = "complete"
    ABANDON = "abandon"
    DEAD_LETTER = "dead_letter"
    LEAVE = "leave"
    """Nothing: it is settled already, or its lock has to run out."""
    KEEP = "keep"
    """Nothing yet: it stays locked until its worker ends."""


class Answer(NamedTuple):
    """What is told to who waits for the outcome of a workflow: its last value, or, where it failed, how; as JSON."""

    to: Address
    failed: bool
    value: str
    message_id: str = ""
    """Where it is sent: one for all endings of a task, as that of what follows it."""


class FollowUp(NamedTuple):
    """A task to publish, under which message id, and in how many seconds."""

    task: Task
    message_id: str
    delay: float = 0


@dataclass(slots=True, eq=False)
class Settlement:
    """What to do with a message, and what to publish, and to tell, before that, or together with it.

    The follow-ups are tasks, the messages the same ready to be sent, and the answer too where it is sent. The bus notes
    what went wrong: the error for which it was not settled, and the ids of messages that were dropped as duplicates.
    """

    delivery: Delivery
    action: Action
    task: Task | None = None
    reason: str = ""
    description: str = ""
    traceback: str = ""
    follow_ups: Sequence[FollowUp] = ()
    answer: Answer | None = None
    messages: Sequence[Outgoing] = ()
    error: Exception | None = None
    dropped: Sequence[str] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the message is to be deleted, and nothing follows it; its outcome may be told."""
        return self.action is Action.COMPLETE and not self.messages


class MessageState(enum.StrEnum):
    """Where a message is on its way."""

    ACTIVE = "active"
    """It waits for a worker."""
    RUNNING = "running"
    """A worker holds it; Azure does not tell, and shows it as active."""
    SCHEDULED = "scheduled"
    DEAD_LETTER = "dead_letter"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message as `peek` shows it, without a lock; names and meanings are those of the Azure SDK.

    `body` is its text; `raw_body` is the body as it is, where that is not UTF-8 and so no text. `state` is one of
    MessageState, `task` the task in the body, None if there is none. `locked_until_utc`, `dead_lettered_time_utc` and
    `dead_letter_traceback` are None where the bus does not tell.
    """

    body: str
    message_id: str | None
    sequence_number: int
    delivery_count: int
    enqueued_time_utc: datetime.datetime | None
    scheduled_enqueue_time_utc: datetime.datetime | None
    dead_letter_reason: str | None
    dead_letter_error_description: str | None
    application_properties: Mapping[str, str]
    queue_name: str
    state: MessageState = MessageState.ACTIVE
    locked_until_utc: datetime.datetime | None = None
    dead_lettered_time_utc: datetime.datetime | None = None
    dead_letter_traceback: str | None = None
    raw_body: bytes | None = field(default=None, repr=False)
    _decoded: ClassVar[Any] = ...  # until it is; a cached_property would make a dict for each of many thousands

    @property
    def task(self) -> Task | None:
        if self._decoded is ...:
            try:
                body = self.body if self.raw_body is None else self.raw_body
                task = decode(body, self.queue_name.removesuffix(DEAD_LETTER_SUFFIX))
            except InvalidTaskFormat:
                task = None
            object.__setattr__(self, "_decoded", task)
        return self._decoded  # type: ignore[no-any-return]

    def forget_task(self) -> None:
        """Let go of what was decoded: of many thousands, it would take a gigabyte."""
        object.__setattr__(self, "_decoded", ...)


def text_of(body: str | bytes) -> tuple[str, bytes | None]:
    """A message's `body` and `raw_body`."""
    if isinstance(body, str):
        return body, None
    try:
        return body.decode("utf-8"), None
    except UnicodeDecodeError:
        return body.decode("utf-8", "replace"), body


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many messages a queue has, by state.

    `running` is None where the bus does not tell, `oldest` the age in seconds of the oldest message that is due and
    waits, None if none does. `exact` is False where peeking had to do, which looks at some only.
    """

    active: int
    running: int | None
    scheduled: int
    dead_letter: int
    oldest: float | None
    exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts(Counts):
    """How many messages a queue has of one task, and the description of the last that was dead-lettered."""

    last_error: str | None = None


class Progress(NamedTuple):
    """How many of a group's members have ended, how many of these failed for good, and how many there are."""

    done: int
    failed: int
    total: int


Which: TypeAlias = Callable[[Message], object] | Iterable[int]
"""Messages to do something about: those for which a function returns true, or those of some sequence numbers."""


class Selection(NamedTuple):
    """What `which` says: the numbers, None for all messages, and the function, None for all of these."""

    numbers: frozenset[int] | None
    function: Callable[[Message], object] | None

    def has(self, message: Message) -> bool:
        """Whether a message is one of them."""
        if self.function is None:
            return self.numbers is None or message.sequence_number in self.numbers
        try:
            verdict = self.function(message)
        except StopIteration as error:  # which no future can pass on: whoever waits for it would wait for ever
            raise RuntimeError(f"which={_short(self.function)} raised StopIteration") from error
        if inspect.iscoroutine(verdict):
            verdict.close()
            raise UsageError(f"which={_short(self.function)} must be a plain function: it returned a coroutine.")
        return bool(verdict)


def selection_of(which: Which) -> Selection:
    """Raises UsageError where it is neither a plain function nor sequence numbers."""
    expected = f"which={_short(which)} must be a function Message -> bool, or a list of sequence numbers"
    if callable(which):
        if any(map(inspect.iscoroutinefunction, (which, type(which).__call__))):
            raise UsageError(f"{expected}: not a coroutine function.")
        return Selection(None, which)
    if isinstance(which, (str, bytes, bytearray)) or not isinstance(which, Iterable):
        raise UsageError(f"{expected}.")
    numbers = list(which)
    for number in numbers:
        if type(number) is not int:
            raise UsageError(f"{expected}: {_short(number)} is no int.")
    return Selection(frozenset(filter(_is_64_bit, numbers)), None)


class OperationStopped(ServiceBusUnavailable):
    """An operation on many messages ended half-way; called again, it goes on from there. `messages` are those done."""

    def __init__(self, message: str, messages: Sequence[Message] = ()) -> None:
        super().__init__(message)
        self.messages = list(messages)


class Receiver(Protocol):
    """The receiving side of a bus: messages under locks, which it renews by itself until they are settled."""

    @property
    def connected(self) -> bool:
        """Whether it has what it receives from, as far as it knows; False while it reconnects."""
        ...

    async def receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        """Lock and return what is there, or what comes first within `max_wait_time` seconds.

        A cancelled receive leaves nothing locked. A lost connection is waited out and is no error.

        Raises:
            ConfigurationError: it can go on no more: the queue is gone, or another program's file is in its place.
        """
        ...

    def settle(self, settlements: Sequence[Settlement], durable: bool = False) -> asyncio.Future[None]:
        """Begin to settle, messages first or together with it. It never fails: what did, has its `error`.

        A message that can never be sent dead-letters its parent, as `rejected` says; what is to follow a message that
        is gone already (LEAVE) is tried again until it is sent or the receiver closed.

        Args:
            durable: answer when it would survive a power cut; else what is lost then is only delivered again.
        """
        ...

    async def close(self) -> None:
        """Stop renewing and let go of the connection. Messages that are still held stay locked."""
        ...


class ServiceBus(Protocol):
    """What the application needs of a queue."""

    queue_name: str
    max_message_bytes: int
    max_delivery_count: int | None
    """Deliveries after which the bus itself dead-letters a message."""
    id_window: float
    """Seconds, from the sending on, for which a given id is remembered; 0 if it is not."""
    takes_group_ids: bool
    """Whether the caller may choose a group's id."""
    system: str
    """OpenTelemetry's `messaging.system`."""

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        """Send in order, in as few round trips as there can be; the sequence numbers where the bus tells them."""
        ...

    def size(self, message: Outgoing) -> int:
        """The bytes of a message that count towards `max_message_bytes`."""
        ...

    def check_queue(self, queue: str) -> None:
        """Raise UsageError where nothing can be sent to that queue from here."""
        ...

    def address(self, task_id: str, ttl: float) -> Address:
        """Where this process and event loop would be told the outcome of a task."""
        ...

    async def expect(self, heads: Sequence[Task]) -> None:
        """Be ready to be told how workflows end, before they are published; ConfigurationError where that cannot be."""
        ...

    def reply(self, answer: Answer) -> Outgoing | None:
        """The message that tells an outcome; None where it is told in settling. MessageTooLarge if it is."""
        ...

    def member_address(self, group_id: str, position: int) -> Address:
        """Where the outcome of a group's member is told."""
        ...

    def open_group(self, message: Outgoing) -> list[Outgoing]:
        """What is to be sent, before its members, for a group to begin.

        Args:
            message: what defines the group, under its id, with `due` where its members are scheduled.

        Raises:
            ConfigurationError: the bus has no place for groups.
        """
        ...

    async def progress(self, group_id: str) -> Progress:
        """How far a group is; UsageError where that is not known."""
        ...

    async def outcome(self, address: Address, timeout: float | None) -> Answer:
        """What was told, or is within so many seconds: None for without end, 0 for what is there.

        Raises:
            TimeoutError: nothing was.
        """
        ...

    def address_of(self, task_id: str) -> Address:
        """Where the outcome of a task that is known by its id alone is told; UsageError where it cannot be known."""
        ...

    async def open_receiver(
        self, on_lock_lost: Callable[[Delivery], None], max_renewal: float, suspect_from: int
    ) -> Receiver:
        """A receiver that works; ConfigurationError where that needs another setting.

        Args:
            on_lock_lost: called in the event loop when a delivery's lock is gone.
            max_renewal: seconds after which a lock is renewed no more, and so counts as lost.
            suspect_from: the delivery count from which on a message is better handed out alone.
        """
        ...

    # -- for operators

    async def counts(self) -> Counts:
        """How many messages there are, by state."""
        ...

    async def counts_by_task(self) -> Mapping[str, TaskCounts]:
        """The same by the tasks' function names; under '' what is no task."""
        ...

    async def peek(
        self, max_message_count: int = 100, dead_letter: bool = False, sequence_number: int = 0
    ) -> list[Message]:
        """List messages by sequence number, from that one on, without locking them or delaying anybody."""
        ...

    async def replay(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Run dead letters again, as `replay_of` says; those that it did, or, for `dry_run`, would do.

        Args:
            on_progress: called in the event loop with the number of messages done so far.

        Raises:
            OperationStopped: it cannot go on for now.
        """
        ...

    async def discard(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete dead letters; else as `replay`."""
        ...

    async def purge(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete messages that wait or are scheduled; else as `replay`."""
        ...

    async def cancel(self, sequence_number: int) -> None:
        """Take back a scheduled message, and, on the local bus, one that waits."""
        ...

    async def close(self) -> None:
        """Let go of files and connections."""
        ...


# ======================================================================================================================
# 6. Decisions: what happens to a message, and how a group ends
# ======================================================================================================================

# The handling of a message ends in one of the ways that `Outcome` lists, as a table: how the message is settled, by
# which reason, and what is published before that. All of it is pure: the worker gathers the facts in a `Run`, `decide`
# says what to do, a receiver does it.

_MAY_COMPLETE = "may complete"
_NOT_RUN = "not run"


class Outcome(enum.Enum):
    """How the handling of a message ended, and by that what becomes of it: the task ...

    Columns: the words of the log, the action, the reason of the dead letter, the callback that follows, and notes:
    whether `should_dead_letter=False` completes it instead, and whether the function was not called at all (else, with
    `acks_late=False`, the message is completed already).
    """

    RETURNED = ("returned", Action.COMPLETE, "", "on_success")
    FAILED = ("failed", Action.DEAD_LETTER, "TaskFailed", "on_failure", _MAY_COMPLETE)
    RETRY = ("asked for a retry", Action.COMPLETE, "", "retry")
    EXHAUSTED = ("used up its tries", Action.DEAD_LETTER, "RetriesExhausted", "on_failure", _MAY_COMPLETE)
    NO_TRY_LEFT = ("has no try left", Action.DEAD_LETTER, "RetriesExhausted", "on_failure", _MAY_COMPLETE, _NOT_RUN)
    KILLER = ("ended its workers", Action.DEAD_LETTER, "MaxDeliveryCountExceeded", "on_failure", _NOT_RUN)
    EXPIRED = ("was begun too late", Action.DEAD_LETTER, "Expired", "on_failure", _MAY_COMPLETE, _NOT_RUN)
    UNREGISTERED = ("is not registered here", Action.DEAD_LETTER, "UnregisteredFunction", "on_failure", _NOT_RUN)
    UNDECODABLE = ("cannot be decoded", Action.DEAD_LETTER, "InvalidTaskFormat", "", _NOT_RUN)
    STOPPED = ("was stopped with its worker", Action.ABANDON, "", "")
    LOCK_LOST = ("lost its lock", Action.LEAVE, "", "")

    def __init__(self, text: str, action: Action, reason: str, follow_up: str, *notes: str) -> None:
        self.text = text
        self.action = action
        self.reason = reason
        self.follow_up = follow_up
        self.may_complete = _MAY_COMPLETE in notes
        self.ran = _NOT_RUN not in notes

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(slots=True, eq=False)
class Run:
    """A message in a worker: its task, and how it ended, with the result it returned or the error it raised."""

    delivery: Delivery
    task: Task | None = None
    registration: Registration | None = None
    outcome: Outcome | None = None
    result: Any = None
    error: BaseException | None = None
    began: float = 0.0
    seconds: float = 0.0
    settlement: Settlement | None = None
    asyncio_task: asyncio.Task[None] | None = None
    stopped: Outcome | None = None
    """How it ended, if something other than the task ended it."""


MAX_DESCRIPTION_LENGTH = 4096
"""Characters of a dead letter's description: Service Bus takes 4 KiB
(https://learn.microsoft.com/azure/service-bus-messaging/service-bus-dead-letter-queues)."""

FOLLOW_UP_REJECTED = "FollowUpRejected"

CANCELLED, DISCARDED = "Cancelled", "Discarded"
"""The names of what ends the outcome of a message that an operator has removed: one that waited, a dead letter."""


def decide(run: Run, queue: str) -> Settlement:
    """What happens to a message after its run.

    Args:
        queue: where the message was received.
    """
    task, outcome = run.task, run.outcome
    assert outcome is not None
    settlement = Settlement(run.delivery, outcome.action, task)

    # The table has it, but for the task's own wishes; and a dead letter stays what it is.
    if task is not None and outcome.ran and not task.acks_late:
        settlement.action = Action.LEAVE  # completed before it ran
    elif task is not None and outcome.may_complete and not task.should_dead_letter:
        settlement.action = Action.COMPLETE
    elif outcome.action is Action.DEAD_LETTER and queue.endswith(DEAD_LETTER_SUFFIX):
        settlement.action = Action.KEEP
    if outcome.reason:
        settlement.reason = outcome.reason
        settlement.description, settlement.traceback = describe(run.error), _traceback_of(run.error)

    if settlement.action is Action.KEEP:
        return settlement  # what follows a failure followed when it died
    try:
        settlement.follow_ups = _follow_ups(run, queue)
        settlement.answer = _answer(run, queue, goes_on=bool(settlement.follow_ups))
    except Exception as error:  # the function has returned: whatever it left behind, it does not run again
        return rejected(settlement, error, queue)
    return settlement


def rejected(settlement: Settlement, error: Exception, queue: str) -> Settlement:
    """The settlement in place of one whose follow-up can never be published; a dead letter stays what it is."""
    action, task = settlement.action, settlement.task
    if action is Action.COMPLETE:
        action = Action.KEEP if queue.endswith(DEAD_LETTER_SUFFIX) else Action.DEAD_LETTER
    instead = Settlement(settlement.delivery, action, task, FOLLOW_UP_REJECTED, describe(error), _traceback_of(error))
    if task is not None and task.outcome_to is not None and action is not Action.KEEP:
        failure = failure_of(task, type(error).__name__, error, task.attempts.attempts + 1)
        instead.answer = _answer_of(task, settlement.delivery, queue, failure)
    return instead


def _follow_ups(run: Run, queue: str) -> list[FollowUp]:
    """What is published when a run has ended, under ids that no other task's follow-ups have."""
    task, outcome = run.task, run.outcome
    if outcome is Outcome.RETURNED and task and task.on_success is None and not isinstance(run.result, Task):
        return []  # most messages
    if task is None or outcome is None:
        return []

    root = _root(task, run.delivery, queue)
    if outcome is Outcome.RETRY:
        return [_retry_of(run, queue, root)]
    following: Task | None = None
    if outcome.follow_up == "on_success":
        following = _successor(task, run.result)
    elif outcome.follow_up == "on_failure" and task.on_failure is not None:
        following = _given(_as_task(task.on_failure, f"on_failure of {task!r}"), lambda: _failure_in(run))
    if following is None:
        return []
    due = _due_time(following._publishing.get("delay"), following._publishing.get("eta"))
    return [FollowUp(following, root, max(0.0, due - time.time()) if due is not None else 0)]


def _answer(run: Run, queue: str, goes_on: bool) -> Answer | None:
    """What is told when a run has ended its workflow: nothing is of a try that is retried, of a step that goes on."""
    task, outcome = run.task, run.outcome
    if task is None or task.outcome_to is None or outcome is None:
        return None
    if outcome.reason:
        return _answer_of(task, run.delivery, queue, _failure_in(run))
    if outcome is not Outcome.RETURNED or goes_on:
        return None
    try:
        return _answer_of(task, run.delivery, queue, None, run.result)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArguments(
            f"{task.function_name} returned {_short(run.result)}, which is to be kept and JSON cannot carry: {error}. "
            "Return numbers, strings, lists and dicts."
        ) from error


def _answer_of(
    task: Task, delivery: Delivery, queue: str, failure: Mapping[str, Any] | None, result: object = None
) -> Answer:
    assert task.outcome_to is not None
    value = _to_json(result if failure is None else failure)
    message_id = f"{_root(task, delivery, queue)}:outcome" if task.outcome_to.queue is not None else ""
    return Answer(task.outcome_to, failure is not None, value, message_id)


def ended_by(body: str | bytes, queue: str, reason: str, message: str) -> Answer | None:
    """What is told where a message ends without a run; None if nobody waits for its outcome, or it is no task."""
    mark = "outcome_to"
    if (mark not in body) if isinstance(body, str) else (mark.encode() not in body):
        return None
    try:
        task = decode(body, queue)
    except InvalidTaskFormat:
        return None
    if task.outcome_to is None:
        return None
    failure = failure_of(task, reason, None, task.attempts.attempts)
    return Answer(task.outcome_to, True, _to_json(failure | {"message": message}))


def outcome_of(task: Task, error: BaseException, registration: Registration | None = None) -> Outcome:
    """How a run ended that raised."""
    retry = _retry_in(error)
    if retry is None and (registration is None or not registration.retries(error)):
        return Outcome.FAILED
    policy = (retry and retry.policy) or task.policy or DEFAULT_POLICY
    return Outcome.RETRY if task.attempts.attempts + 1 < policy.max_tries else Outcome.EXHAUSTED


def may_run(task: Task) -> bool:
    """Whether a received task has a try left: one that was published with too few, or by another hand, may not."""
    tries = MAX_TRIES if task.policy is None else task.policy.max_tries
    if task.retry_policy is not None:
        tries = max(tries, task.retry_policy.max_tries)
    return task.attempts.attempts < tries


def _retry_of(run: Run, queue: str, root: str) -> FollowUp:
    """The task as it came, whatever the function did to it, with one attempt more."""
    task, retry = run.task, _retry_in(run.error) or RetryException()
    assert task is not None
    attempts = task.attempts.attempts
    again = decode(run.delivery.body, queue.removesuffix(DEAD_LETTER_SUFFIX))
    again.attempts, again.root, again.retry_policy = RetryAttempts.default(attempts + 1), root, retry.policy
    if run.registration is not None:
        again._published = run.registration.options
    policy = retry.policy or task.policy or DEFAULT_POLICY
    delay = policy.get_delay_interval(attempts) if retry.delay is None else retry.delay
    return FollowUp(again, f"{root}:{attempts + 1}", delay)


def _successor(task: Task, result: Any) -> Task | None:
    """The task to publish after a success: a returned task that was not published yet takes over.

    It is followed by what would have followed the task that returned it.
    """
    if isinstance(result, Task) and result.message_id is None:
        head = _replica(result)
        steps = _chain_of(head)
        for step in steps:
            step.on_failure = step.on_failure or task.on_failure
        steps[-1].on_success = task.on_success
        head.outcome_to = task.outcome_to
        return head
    if task.on_success is None:
        return None
    following = _given(_as_task(task.on_success, f"on_success of {task!r}"), lambda: result)
    following.outcome_to = task.outcome_to
    return following


def _given(callback: Task, value: Callable[[], Any]) -> Task:
    """The callback with the value as its first argument, where it takes one; of a group, each member that does."""
    if callback.group is not None:
        callback.members = [_given(member, value) for member in callback.members]
        return callback
    if not callback.takes_result:
        return callback
    given = dataclasses.replace(callback, args=[value(), *callback.args], takes_result=False)
    _bind_like(given, callback)
    return given


def _failure_in(run: Run) -> dict[str, Any]:
    task, error, outcome = run.task, run.error, run.outcome
    assert task is not None
    assert outcome is not None
    name = "TaskFailureResult" if error is None else type(error).__name__
    return failure_of(task, name if outcome.ran else outcome.reason, error, task.attempts.attempts + outcome.ran)


def failure_of(task: Task, name: str, error: BaseException | None, attempts: int) -> dict[str, Any]:
    """What is told of a failure to an `on_failure` callback made by `.s()`, and to who awaits the result."""
    return {
        "task_id": task.task_id,
        "function_name": task.function_name,
        "error": name,
        "message": _message_of(error)[:MAX_DESCRIPTION_LENGTH] if error is not None else "",
        "traceback": _traceback_of(error),
        "attempts": attempts,
    }


def describe(error: BaseException | None) -> str:
    """An error in one readable text, short enough for a dead letter; a group's with its members."""
    if error is None:
        return "The task returned TaskFailureResult."
    if isinstance(error, BaseExceptionGroup):
        members = "; ".join(describe(member) for member in itertools.islice(_members_of(error), 100))
        text = f"{type(error).__name__}: {_message_of(error)}: {members}"
    else:
        text = "".join(traceback.format_exception_only(error)).strip()
    return text.encode("utf-8", "backslashreplace")[:MAX_DESCRIPTION_LENGTH].decode("utf-8", "ignore")


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # an exception's own __str__ may fail
        return f"<{type(error).__name__}: str() failed: {type(broken).__name__}>"


def _traceback_of(error: BaseException | None) -> str:
    """The end of a traceback, where the cause stands."""
    try:
        text = "" if error is None else "".join(traceback.format_exception(error))
    except Exception:
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode("utf-8")[-MAX_DESCRIPTION_LENGTH:]


def root_of(delivery: Delivery | Message, queue: str) -> str:
    """What the ids of all that follows a task are made of: a UUID of its first try's message.

    Redelivery does not change it, no caller chooses it, and no two messages share it. It is itself the id of what
    follows the task, success or failure alike, whichever of its tries ends it: so only one of these can be enqueued,
    even when a worker died between publishing and completing. Retries have `<root>:<attempt>`, and carry the root.
    """
    return derived_id(f"{queue}\n{delivery.sequence_number}\n{delivery.message_id}")


def _root(task: Task, delivery: Delivery, queue: str) -> str:
    """The same of any try of a task; a dead letter's is its own."""
    return task.root if task.root and not queue.endswith(DEAD_LETTER_SUFFIX) else root_of(delivery, queue)


def replay_of(dead_letter: Message) -> Outgoing:
    """The message that runs a dead letter's task again, with the whole workflow behind it and all its tries.

    Its id is made of the dead letter's, so that a replay which is repeated after a crash enqueues no second one where
    duplicate detection is on. Only what counts the tries is changed in the body; what is no task goes back as it is,
    for a worker that can read it.
    """
    queue, task = dead_letter.queue_name.removesuffix(DEAD_LETTER_SUFFIX), dead_letter.task
    body: str | bytes = dead_letter.body if dead_letter.raw_body is None else dead_letter.raw_body
    if task is not None and (task.attempts.attempts or task.root or task.retry_policy):
        document = _from_json(dead_letter.body)
        document["attempts"] = _from_json(_write_attempts(RetryAttempts.default()))
        document.pop("root", None)
        if "scheduled_policy" in document:
            document["policy"] = document.pop("scheduled_policy")
        body = _to_json(document)
    number = dead_letter.sequence_number
    message_id = derived_id(f"replay\n{queue}\n{number}\n{dead_letter.message_id}")
    name = None if task is None else task.function_name
    address = None if task is None else task.outcome_to
    outcome_id = address.id if address is not None and address.position is None else None
    return Outgoing(body, message_id, queue, None, dead_letter.application_properties, name, outcome_id=outcome_id)


# -- groups: a group is told how each of its members ended, as one who awaits a result is, and ends when all have


def outgoing_of(
    bus: ServiceBus,
    home: str,
    task: Task,
    message_id: str,
    due: float | None = None,
    properties: Mapping[str, str] = {},
) -> Outgoing:
    """A task's message, checked against the limits of the bus.

    Args:
        home: the queue of tasks that name none.
    """
    queue = task.queue or home
    if len(message_id) > MAX_MESSAGE_ID_LENGTH:
        raise UsageError(f"{task!r}: a message id has at most {MAX_MESSAGE_ID_LENGTH} characters.")
    message = Outgoing(encode(task, queue, home), message_id, queue, due, properties, task.function_name)
    if (size := bus.size(message)) > bus.max_message_bytes:
        raise MessageTooLarge(
            f"{task!r} with its callbacks makes a message of {size} bytes, the limit is {bus.max_message_bytes}: "
            "store the data elsewhere and pass its id."
        )
    return message


def messages_of(
    bus: ServiceBus, make: Callable[[Task, str, float | None], Outgoing], task: Task, message_id: str, due: float | None
) -> list[Outgoing]:
    """What is sent for a task; for a group what opens it, then its members, groups among them likewise.

    Args:
        make: makes one task's message.
    """
    if task.group is None:
        return [make(task, message_id, due)]
    names = tuple(
        (name, len(list(same))) for name, same in itertools.groupby(member.function_name for member in task.members)
    )
    definition = dataclasses.replace(task, members=(), group=task.group._replace(names=names))  # type: ignore[call-arg]
    definition.root = root = derived_id(f"group\n{message_id}")
    _bind_like(definition, task)
    messages = bus.open_group(make(definition, message_id, due))
    for position, member in enumerate(task.members):
        member.outcome_to = bus.member_address(message_id, position)
        messages += messages_of(bus, make, member, f"{root}:{position}", due)
    return messages


def _given_an_id(messages: Sequence[Outgoing], given_id: str) -> list[Outgoing]:
    """The messages of a task, or of a group with its members, of which there is to be one by this id."""
    return [each._replace(given_id=place == 0, part_of=given_id) for place, each in enumerate(messages)]


class Ending(NamedTuple):
    """What follows a group: messages, and what is told to who waits for its outcome."""

    messages: list[Outgoing]
    answer: Answer | None


def ending_of(
    bus: ServiceBus,
    home: str,
    definition: str | bytes,
    outcomes: Mapping[int, tuple[bool, str]],
    error: Exception | None = None,
) -> Ending:
    """How a group ends: its `on_success` gets the list of the results, or else its `on_failure` the failure.

    Args:
        home: the queue it was published from.
        definition: what opened it.
        outcomes: of its members by position: whether it is a failure, and the value. Where some are missing, its time
            has run out.
        error: why it cannot be joined.
    """
    group = decode(definition, home)
    assert group.group is not None
    failure = failure_of(group, type(error).__name__, error, 0) if error is not None else None
    failure = failure or _failure_among(group, group.group, outcomes)
    if failure is None:
        try:
            values = [_from_json(outcomes[position][1]) for position in range(group.group.total)]
            return _ending(bus, home, group, group.on_success, values, failed=False)
        except Exception as problem:  # whatever it is: nothing that members return may keep a group from its end
            failure = failure_of(group, type(problem).__name__, problem, 0)
    try:
        return _ending(bus, home, group, group.on_failure, failure, failed=True)
    except Exception as problem:
        logger.error("What follows the failure of %r cannot be published: %s", group, problem)
        return _ending(bus, home, group, None, failure, failed=True)


def _ending(bus: ServiceBus, home: str, group: Task, following: Task | None, value: Any, failed: bool) -> Ending:
    root, messages, answer = group.root or "", list[Outgoing](), None
    if following is not None:
        following = _given(following, lambda: value)
        following.outcome_to = following.outcome_to if failed else group.outcome_to
        messages = messages_of(bus, functools.partial(outgoing_of, bus, home), following, root, None)
    if group.outcome_to is not None and (failed or following is None):
        answer = Answer(group.outcome_to, failed, _to_json(value), f"{root}:outcome")
        reply = bus.reply(answer)
        messages += [] if reply is None else [reply]
    return Ending(messages, answer)


GROUP_TIMER = '{"timeout":true}'
"""The body of the message that comes when a group's time is over."""


class GroupState(NamedTuple):
    """What is known of a group where it is joined from messages: nothing, before the first; or that it has ended.

    Three kinds of messages make it: what opens the group, how a member ended, and, when its time is over, the timer.
    """

    definition: str = ""
    outcomes: Mapping[int, tuple[bool, Any]] = {}
    """Of its members by position: whether it is a failure, and the value."""
    ended: bool = False
    timed_out: bool = False

    @classmethod
    def read(cls, text: str | bytes | None, home: str) -> GroupState:
        """Raises InvalidTaskFormat where another program has written it."""
        if text is None:
            return cls()
        try:
            document = _from_json(text if isinstance(text, str) else text.decode("utf-8"))
            outcomes = {int(position): (failed, value) for position, (failed, value) in document["outcomes"].items()}
            state = cls(document["definition"], outcomes, document["ended"], document["timed_out"])
            if state.definition and decode(state.definition, home).group is None:
                raise ValueError("its definition is a task's")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidTaskFormat) as error:
            raise InvalidTaskFormat(f"The state of the session is none of a group: {error}.") from error
        return state

    def write(self) -> str | None:
        """None for nothing."""
        if self == GroupState():
            return None
        return _to_json(self._asdict())

    def with_message(self, body: str | bytes, home: str) -> GroupState:
        """What is known after one of its messages, that may have come before; InvalidTaskFormat if it is none."""
        try:
            text = body if isinstance(body, str) else body.decode("utf-8")
            document = _from_json(text)
            if "group" in document:
                if decode(text, home).group is None:
                    raise ValueError("it is a task's")
                return self if self.ended or self.definition else self._replace(definition=text)
            if text == GROUP_TIMER:
                return self._replace(timed_out=True)
            position, failed, value = document["position"], document["failed"], document["value"]
            if type(position) is not int or position < 0 or type(failed) is not bool:
                raise ValueError(f"position {_short(position)}, failed {_short(failed)}")
            if failed and type(value) is not dict:
                raise ValueError(f"a failure is an object, not {_short(value)}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidTaskFormat(f"The body tells nothing of a group: {error}.") from error
        if self.ended or self.timed_out or not self.definition or position in self.outcomes:
            return self  # it has ended, or was not begun; or the member had ended before
        return self._replace(outcomes={**self.outcomes, position: (failed, value)})

    def ends(self, home: str) -> bool:
        """Whether what follows the group is to be published."""
        if self.ended or not self.definition:
            return False
        group = decode(self.definition, home).group
        return self.timed_out or (group is not None and all(n in self.outcomes for n in range(group.total)))

    def after_the_end(self) -> GroupState:
        """What is left to be known of a group that has ended: until its timer comes, that it has."""
        return GroupState() if self.timed_out else GroupState(ended=True)


def _failure_among(
    group: Task, settings: GroupSettings, outcomes: Mapping[int, tuple[bool, str]]
) -> dict[str, Any] | None:
    """How a group has failed: its time ran out, or members have, the first of which is told of; None if it has not."""
    total = settings.total
    names = itertools.chain.from_iterable(itertools.repeat(name, count) for name, count in settings.names)
    missing = (f"{position} ({name})" for position, name in enumerate(names) if position not in outcomes)
    if shown := list(itertools.islice(missing, 10)):
        count = total - sum(position < total for position in outcomes)
        message = f"{count} of {total} members have not ended after {settings.timeout:g} s: {', '.join(shown)}"
        message += ", ..." if count > len(shown) else ""
        return failure_of(group, "TimeoutError", None, 0) | {"message": message}
    failed = [position for position in range(total) if outcomes[position][0]]
    if not failed or settings.return_exceptions:
        return None
    first: dict[str, Any] = _from_json(outcomes[failed[0]][1])
    return first | {"message": f"{len(failed)} of {total} members failed, the first: {first.get('message', '')}"}


# ======================================================================================================================
# 7. Store: the embedded queue as SQL
# ======================================================================================================================

# A row is a message. `due` is when it can be received: when it was enqueued, when it is scheduled for, or, while it is
# locked, when the lock runs out. So the query that receives is also what expires locks, by the same index, and those
# come first. A delivery is told from an earlier one of the same message by its delivery count, which only rises: who
# settles or renews names both numbers, and finds no row if another receiver has the message. The dead-letter queue is
# a queue like any other, under Service Bus's own name for it.

APPLICATION_ID = 0x424F494C  # "BOIL"
LOCKED, READY, DEFERRED = 0, 1, 2  # the SQL below has the numbers; nothing here defers a message, the emulator does

MIGRATIONS = (
    """
    CREATE TABLE queue (
        queue_id            INTEGER PRIMARY KEY,
        name                TEXT NOT NULL UNIQUE,
        max_delivery_count  INTEGER,
        duplicate_detection REAL,
        time_to_live        REAL
    );
    CREATE TABLE message (
        sequence_number               INTEGER PRIMARY KEY AUTOINCREMENT,
        queue_id                      INTEGER NOT NULL,
        state                         INTEGER NOT NULL,
        due                           REAL NOT NULL,
        delivery_count                INTEGER NOT NULL DEFAULT 0,
        enqueued_time                 REAL NOT NULL,
        scheduled_enqueue_time        REAL,
        expires                       REAL,
        message_id                    TEXT,
        body                          NOT NULL,
        application_properties        TEXT,
        dead_letter_reason            TEXT,
        dead_letter_error_description TEXT
    );
    CREATE INDEX message_due ON message (queue_id, state, due);
    CREATE TABLE duplicate (
        queue_id        INTEGER NOT NULL,
        message_id      TEXT NOT NULL,
        expires         REAL NOT NULL,
        sequence_number INTEGER NOT NULL,
        PRIMARY KEY (queue_id, message_id)
    ) WITHOUT ROWID;
    CREATE INDEX duplicate_expires ON duplicate (queue_id, expires)
    """,
    # What a process of the former version does not know, it leaves alone: it inserts NULL, and reads what it asks for.
    """
    ALTER TABLE message ADD COLUMN function_name TEXT;
    ALTER TABLE message ADD COLUMN dead_lettered_time REAL;
    ALTER TABLE message ADD COLUMN dead_letter_traceback TEXT;
    CREATE TABLE outcome (
        task_id TEXT PRIMARY KEY,
        failed  INTEGER NOT NULL,
        value   TEXT NOT NULL,
        expires REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX outcome_expires ON outcome (expires);
    CREATE TABLE task_group (
        group_id   TEXT PRIMARY KEY,
        queue_id   INTEGER NOT NULL,
        total      INTEGER NOT NULL,
        definition TEXT NOT NULL,
        due        REAL NOT NULL,
        ended      INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    CREATE INDEX task_group_due ON task_group (due);
    CREATE TABLE group_member (
        group_id TEXT NOT NULL,
        position INTEGER NOT NULL,
        failed   INTEGER NOT NULL,
        value    TEXT NOT NULL,
        PRIMARY KEY (group_id, position)
    ) WITHOUT ROWID
    """,
)
"""The schema, as what each version adds to the one before: version 2 has room for results and groups."""

SCHEMA_VERSION = len(MIGRATIONS)

GIVEN_ID_WINDOW = 600
"""Seconds for which an id that was given is remembered at least, where a queue's duplicate detection is off too."""

_DUE = """
    FROM     message
    WHERE    queue_id = ? AND state IN (0, 1) AND due <= ?
    ORDER BY state, due, sequence_number
    LIMIT    ?
"""

SELECT_DUE = f"""
    SELECT   sequence_number, delivery_count, message_id, body, application_properties, expires,
             ifnull(scheduled_enqueue_time, enqueued_time) {_DUE}
"""

LOCK_DUE = f"""
    UPDATE message
    SET    state = 0, due = ?, delivery_count = delivery_count + 1
    WHERE  sequence_number IN (SELECT sequence_number {_DUE})
"""
"""Two statements that find the same messages, as RETURNING would copy every one once more."""

INSERT = """
    INSERT INTO message (queue_id, state, due, enqueued_time, scheduled_enqueue_time, expires,
                         message_id, body, application_properties, function_name)
    VALUES              (?,        1,     ?,   ?,             nullif(?, 0),           nullif(?, 0),
                         ?,          ?,    nullif(?, ''),          nullif(?, ''))
"""
"""0 and '' stand for NULL, as sqlite3 takes ten times as long to pass on None."""

BY_NUMBER = "message NOT INDEXED"
"""The table, for SQLite to go to each number, where else it goes through all of the queue by its index."""

GROUPS_INTERVAL = 1.0
"""Seconds between two looks whether the time of a group has run out."""

GROUP_MEMBERS_AT_ONCE = 1000
"""Members of a group that one transaction forgets."""

GROUP_KEPT = 600
"""Seconds for which a group that has ended is known, for who asks for its progress."""

BURIED_AT_ONCE = 500
"""Messages that one transaction dead-letters of a backlog that has expired, lest everybody else wait for it."""


class QueueSettings(NamedTuple):
    """The properties of a queue, in seconds, None for off."""

    max_delivery_count: int | None = 10
    duplicate_detection: float | None = None
    time_to_live: float | None = None

    def id_window(self, given_id: bool) -> float | None:
        """Seconds for which a message's id is remembered."""
        return max(self.duplicate_detection or 0, GIVEN_ID_WINDOW) if given_id else self.duplicate_detection


class FileState(enum.Enum):
    """Of a queue's file, as one process has it."""

    OPEN = "open"
    GONE = "gone"
    """Deleted, replaced, or on a disk that failed: whoever uses it next opens what is there then."""
    CLOSED = "closed"


class Connection:
    """A connection to a queue's file, for one thread at a time, which holds `mutex`.

    SQLite keeps in memory which locks the process has on a file. A forked child inherits that, but not the locks. So it
    closes its copy at once, while its parent still has the file open, and opens the file for itself.
    """

    def __init__(self, path: str, mode: str | None = None) -> None:
        self.path = path
        self.mutex = threading.Lock()
        self.state = FileState.OPEN
        with _connecting:
            self.sql = connect(path, mode)
            _connections.add(self)

    def close(self) -> None:
        with self.mutex:
            self.state = FileState.CLOSED if self.state is FileState.OPEN else self.state
            self.sql.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, sqlite3.Error):  # it was never opened, or is closed
            self.sql.close()

    def after_fork_in_child(self) -> None:
        self.state = FileState.CLOSED
        self.sql.close()
        self.mutex.release()


class Store(Connection):
    """Queues in one SQLite file. The methods are statements, to be run inside `transaction()`.

    Raises:
        ConfigurationError: the path cannot hold a queue, and will not by waiting.
        ServiceBusUnavailable: the file is locked for too long, the disk is full, or failed.
    """

    def __init__(self, path: str) -> None:
        self.additions = 0
        """Counts up when there may be more to receive than before, at once or later."""
        self.bytes_written = 0
        """Roughly: what went to the write-ahead log."""
        self.inode: int | None = None
        """Which file it is: in another that replaced it, a message of the same number is another message."""
        self.end_group: Callable[[str, str, Mapping[int, tuple[bool, str]]], Ending] | None = None
        """Says what follows a group: `ending_of`, of the bus that has opened this."""
        self._queues: dict[str, tuple[int, QueueSettings]] = {}
        self._groups_seen_to = 0.0
        with _explained(path):
            _patiently(path, functools.partial(super().__init__, path))
            try:
                _patiently(path, self._prepare)
            except BaseException:
                self.close()
                raise

    def _prepare(self) -> None:
        """Make sure that the file is ours before changing anything about it; then make it of the present version."""
        with self.mutex:
            check_version(self.path, self.sql)
            (mode,) = self._one("PRAGMA journal_mode = WAL")
            if mode != "wal" and self.path != ":memory:":
                raise ConfigurationError(f"{self.path}: SQLite cannot keep a write-ahead log on this file system.")
        with self.transaction():
            (version,) = self._one("PRAGMA user_version")
            for statement in ";".join(MIGRATIONS[version:]).split(";") if version < SCHEMA_VERSION else ():
                self.sql.execute(statement)
            if version < SCHEMA_VERSION:
                self.sql.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self.sql.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _one(self, sql: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self.sql.execute(sql, parameters).fetchone()
        return row

    def _changed(self, sql: str, parameters: Sequence[Any]) -> bool:
        return self.sql.execute(sql, parameters).rowcount == 1

    @contextlib.contextmanager
    def transaction(self, wait: bool = True) -> Iterator[None]:
        """A write transaction, committed at the end, rolled back on an error.

        Args:
            wait: for other threads and processes, up to LOCK_PATIENCE; else `sqlite3.OperationalError` at once.
        """
        begin = functools.partial(self._begin, wait)
        _patiently(self.path, begin) if wait else begin()
        try:
            yield
            self.sql.execute("COMMIT")
        except BaseException:
            if self.sql.in_transaction:
                self.sql.execute("ROLLBACK")
            raise
        finally:
            self.mutex.release()  # which `_begin` acquired

    def _begin(self, wait: bool) -> None:
        """Begin, and keep other threads away; they are not while this one waits for another process."""
        if not self.mutex.acquire(blocking=wait):
            raise sqlite3.OperationalError("database is locked")
        try:
            self.sql.execute("BEGIN IMMEDIATE")
        except BaseException:
            self.mutex.release()
            raise

    def run(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run statements in one transaction, or, if one of them fails, each in its own; errors among the results."""
        try:
            with _explained(self.path), self.transaction():
                return [work() for work in works]
        except Exception as error:
            if len(works) == 1 or _is_about_the_file(error):
                return [error] * len(works)
        return [result for work in works for result in self.run([work])]

    def data_version(self) -> int:
        """A number that differs when another connection has committed."""
        with self.mutex:
            version: int = self._one("PRAGMA data_version")[0]
        return version

    # -- queues

    def open_queue(self, name: str, settings: QueueSettings) -> None:
        """Create the queue, or give it other settings, in a transaction of its own."""
        with _explained(self.path), self.transaction():
            self._save_queue(name, settings)
            opened = self._queue(name)
        self._queues[name] = opened

    def _save_queue(self, name: str, settings: QueueSettings) -> None:
        self.sql.execute(
            """
            INSERT INTO queue (name, max_delivery_count, duplicate_detection, time_to_live)
            VALUES            (?,    ?,                  ?,                   ?)
            ON CONFLICT (name) DO UPDATE
            SET max_delivery_count  = excluded.max_delivery_count,
                duplicate_detection = excluded.duplicate_detection,
                time_to_live        = excluded.time_to_live
            """,
            (name, *settings),
        )

    def _queue(self, name: str) -> tuple[int, QueueSettings]:
        """The id and the settings of a queue; one that nobody opened yet is made."""
        if name in self._queues:
            return self._queues[name]
        find = "SELECT queue_id, max_delivery_count, duplicate_detection, time_to_live FROM queue WHERE name = ?"
        while (row := self._one(find, (name,))) is None:
            self._save_queue(name, QueueSettings(None) if name.endswith(DEAD_LETTER_SUFFIX) else QueueSettings())
        return row[0], QueueSettings(*row[1:])

    # -- sending

    def insert(self, messages: Sequence[Outgoing], now: float, dropped: list[str] | None = None) -> list[int]:
        """Enqueue messages; their sequence numbers. A duplicate is dropped, and gets the original's.

        Args:
            dropped: takes the message ids of duplicates.
        """
        self.additions += len(messages)
        numbers: list[int] = []
        sent_again: set[str | None] = set()  # ids given to groups that are remembered
        for (queue, given_id, opens_group, part_of), together in itertools.groupby(messages, key=_kind):
            queue_id, settings = self._queue(queue)
            group = list(together)
            if opens_group or part_of in sent_again:
                numbers += [0] * len(group)
                for message in group:
                    if part_of not in sent_again and not self._open_group(queue_id, message, now):
                        sent_again.add(part_of)
                continue
            rows = [self._row(queue_id, settings.time_to_live, message, now) for message in group]
            if (window := settings.id_window(given_id)) is not None:
                numbers += [
                    self._insert_once(queue_id, row, message.outcome_id, now, now + window, dropped)
                    for row, message in zip(rows, group, strict=True)
                ]
            elif len(rows) == 1:
                numbers.append(self.sql.execute(INSERT, rows[0]).lastrowid or 0)
            else:
                self.sql.executemany(INSERT, rows)
                (last,) = self._one("SELECT last_insert_rowid()")
                numbers += range(last - len(rows) + 1, last + 1)
        return numbers

    def _row(self, queue_id: int, time_to_live: float | None, message: Outgoing, now: float) -> tuple[Any, ...]:
        self.bytes_written += len(message.body) + BYTES_OF_A_CHANGE
        scheduled = message.due or 0
        enqueued = max(scheduled, now)
        expires = 0 if time_to_live is None else enqueued + time_to_live
        properties = _to_json(message.application_properties) if message.application_properties else ""
        return (
            *(queue_id, enqueued, enqueued, scheduled, expires),
            *(message.message_id, message.body, properties, message.function_name or ""),
        )

    def _insert_once(
        self,
        queue_id: int,
        row: tuple[Any, ...],
        outcome_id: str | None,
        now: float,
        expires: float,
        dropped: list[str] | None,
    ) -> int:
        """Enqueue a message unless its id is remembered; it is from now on, until it expires."""
        message_id = row[5]
        if (original := self._original(queue_id, message_id, now)) is not None:
            if dropped is not None:
                dropped.append(message_id)
            return original
        number = self.sql.execute(INSERT, row).lastrowid or 0
        self._remember(queue_id, message_id, expires, number, outcome_id)
        return number

    def _original(self, queue_id: int, message_id: str, now: float) -> int | None:
        """The sequence number of the message that an id is remembered of."""
        self.sql.execute("DELETE FROM duplicate WHERE queue_id = ? AND expires <= ?", (queue_id, now))
        row = self._one(
            "SELECT sequence_number FROM duplicate WHERE queue_id = ? AND message_id = ?", (queue_id, message_id)
        )
        return None if row is None else int(row[0])

    def _remember(self, queue_id: int, message_id: str, expires: float, number: int, outcome_id: str | None) -> None:
        if outcome_id is not None:
            self.sql.execute("DELETE FROM outcome WHERE task_id = ?", (outcome_id,))
        self.sql.execute(
            "INSERT INTO duplicate (queue_id, message_id, expires, sequence_number) VALUES (?, ?, ?, ?)",
            (queue_id, message_id, expires, number),
        )

    # -- receiving

    def claim(
        self, queue: str, max_message_count: int, lock_duration: float, now: float, suspect_from: int = MAX_SECONDS
    ) -> list[Delivery]:
        """Lock what is due, expired locks first; what has outlived its settings goes to the dead-letter queue.

        Of an expired backlog, only so much at once: there may be more to receive although none was locked. A message
        with a delivery count of `suspect_from` or more is handed out alone.
        """
        queue_id, settings = self._queue(queue)
        if not 0 <= now - self._groups_seen_to < GROUPS_INTERVAL:
            self._see_to_groups(now)
        most = MAX_SECONDS if settings.max_delivery_count is None else settings.max_delivery_count
        mortal = not queue.endswith(DEAD_LETTER_SUFFIX)
        buried = 0
        while buried < BURIED_AT_ONCE:
            limit = BURIED_AT_ONCE if buried else max_message_count
            rows = self.sql.execute(SELECT_DUE, (queue_id, now, limit)).fetchall()
            over = [row for row in rows if row[1] >= most or (row[5] is not None and row[5] <= now)] if mortal else []
            if over:
                buried += self._bury(queue, over, now)
                continue
            suspect = next((place for place, row in enumerate(rows) if row[1] >= suspect_from), max_message_count)
            rows = rows[: min(max(suspect, 1), max_message_count)]
            if not rows:
                break
            locked_until, received = now + lock_duration, time.monotonic()
            self.sql.execute(LOCK_DUE, (locked_until, queue_id, now, len(rows)))
            self.bytes_written += len(rows) * BYTES_OF_A_CHANGE
            return [
                Delivery(number, count, message_id, body, _properties(text), locked_until, due, self.inode, received)
                for number, count, message_id, body, text, _, due in rows
            ]
        return []

    def _bury(self, queue: str, rows: Sequence[tuple[Any, ...]], now: float) -> int:
        """Dead-letter messages that may not be delivered any more; how many."""
        queue_id, _ = self._queue(dead_letter_queue(queue))
        self.additions += len(rows)
        self.bytes_written += len(rows) * BYTES_OF_A_CHANGE
        reasons = [
            ("TTLExpiredException", "Its time to live has passed.", number)
            if expires is not None and expires <= now
            else ("MaxDeliveryCountExceeded", f"It was delivered {count} times, never settled.", number)
            for number, count, _, _, _, expires, _ in rows
        ]
        endings = [(row[3], reason, description) for row, (reason, description, _) in zip(rows, reasons, strict=True)]
        self._tell_endings(queue, endings, now)
        self.sql.executemany(
            f"""
            UPDATE message
            SET    queue_id = {queue_id}, state = 1, due = {now!r}, dead_lettered_time = {now!r}, expires = NULL,
                   dead_letter_reason = ?, dead_letter_error_description = ?
            WHERE  sequence_number = ?
            """,
            reasons,
        )
        return len(rows)

    def next_due(self, queue: str) -> float | None:
        """When the next message can be received: it is scheduled for then, or its lock runs out."""
        queue_id, _ = self._queue(queue)
        dues = [
            self._one("SELECT min(due) FROM message WHERE queue_id = ? AND state = ?", (queue_id, state))[0]
            for state in (LOCKED, READY)
        ]
        return min((due for due in dues if due is not None), default=None)

    def renew(self, delivery: Delivery, lock_duration: float, now: float) -> bool:
        """Lock a held message anew; False if the lock was lost."""
        return delivery.raw == self.inode and self._changed(
            "UPDATE message SET due = ? WHERE sequence_number = ? AND delivery_count = ? AND state = 0",
            (now + lock_duration, delivery.sequence_number, delivery.delivery_count + 1),
        )

    # -- settling

    def settle(self, queue: str, settlements: Sequence[Settlement], now: float) -> None:
        """Settle a message, publish what follows and tell its outcome, or, if the lock was lost, none of that.

        Several, if they are to be deleted and nothing follows them, take one statement. It does not tell which of them
        had been lost: then it is an error, for the transaction to be undone.
        """
        settlement, held = settlements[0], True
        match settlement.action:
            case Action.COMPLETE:
                held = self.complete([each.delivery for each in settlements]) == len(settlements)
            case Action.ABANDON:
                held = self.abandon(settlement.delivery)
            case Action.DEAD_LETTER:
                held = self.dead_letter(
                    *(queue, settlement.delivery, settlement.reason, settlement.description, now, settlement.traceback)
                )
        if not held:
            number = settlement.delivery.sequence_number
            lost = MessageLockLost(f"the lock of message {number} ran out and another receiver had it")
            if len(settlements) > 1:
                raise lost
            settlement.error = lost
            return
        if settlement.messages:
            dropped: list[str] = []
            settlement.dropped = dropped
            self.insert(settlement.messages, now, dropped)
        self.tell([each.answer for each in settlements if each.answer is not None], now)

    def complete(self, deliveries: Sequence[Delivery]) -> int:
        """Delete messages; how many of them were still held."""
        self.bytes_written += len(deliveries) * BYTES_OF_A_CHANGE
        return self.sql.executemany(
            "DELETE FROM message WHERE sequence_number = ? AND delivery_count = ? AND state = 0",
            [(each.sequence_number, each.delivery_count + 1) for each in deliveries if each.raw == self.inode],
        ).rowcount

    def abandon(self, delivery: Delivery) -> bool:
        """Give a message back, to where it was in the queue; False if the lock was lost."""
        self.additions += 1
        return delivery.raw == self.inode and self._changed(
            """
            UPDATE message
            SET    state = 1, due = enqueued_time
            WHERE  sequence_number = ? AND delivery_count = ? AND state = 0
            """,
            (delivery.sequence_number, delivery.delivery_count + 1),
        )

    def dead_letter(
        self, queue: str, delivery: Delivery, reason: str, description: str, now: float, traceback: str = ""
    ) -> bool:
        """Move a held message to the queue's dead-letter queue; False if the lock was lost."""
        self.additions += 1
        queue_id, _ = self._queue(dead_letter_queue(queue))
        return delivery.raw == self.inode and self._changed(
            """
            UPDATE message
            SET    queue_id = ?, state = 1, due = ?, dead_lettered_time = ?, expires = NULL,
                   dead_letter_reason = ?, dead_letter_error_description = ?, dead_letter_traceback = ?
            WHERE  sequence_number = ? AND delivery_count = ? AND state = 0
            """,
            (
                *(queue_id, now, now, reason, description, traceback),
                *(delivery.sequence_number, delivery.delivery_count + 1),
            ),
        )

    # -- outcomes

    def tell(self, answers: Sequence[Answer], now: float, instead: bool = True) -> None:
        """Keep outcomes for who awaits them, or for the groups of members; what has expired goes.

        Args:
            instead: of what may be there, as of a task that has run anew; a member's first outcome stands.
        """
        kept = [answer for answer in answers if answer.to.position is None]
        if kept:
            self.additions += 1
            self.bytes_written += sum(len(answer.value) + BYTES_OF_A_CHANGE for answer in kept)
            self.sql.execute("DELETE FROM outcome WHERE expires <= ?", (now,))
            self.sql.executemany(
                f"INSERT OR {'REPLACE' if instead else 'IGNORE'} INTO outcome VALUES (?, ?, ?, ?)",
                [(answer.to.id, answer.failed, answer.value, now + answer.to.ttl) for answer in kept],
            )
        by_group: dict[str, list[tuple[Any, ...]]] = {}
        for to, failed, value, _ in answers:
            if to.position is not None:
                by_group.setdefault(to.id, []).append((to.id, to.position, failed, value))
        for group_id, members in by_group.items():
            self._join(group_id, members, now)

    # What defines a group is the row of its member -1, there until it ends: in `task_group`, to count a member would be
    # to write it anew.

    def _open_group(self, queue_id: int, message: Outgoing, now: float) -> bool:
        """Begin a group; False, and it is not begun, if the id that was given to it is remembered."""
        group_id, settings = message.message_id, decode(message.body, message.queue).group
        assert settings is not None
        if message.given_id and message.part_of is not None:
            if self._original(queue_id, message.part_of, now) is not None:
                return False
            window = self._queue(message.queue)[1].id_window(given_id=True) or 0
            self._remember(queue_id, message.part_of, now + window, 0, message.outcome_id)
        self.bytes_written += len(message.body) + BYTES_OF_A_CHANGE
        due = max(message.due or 0, now) + settings.timeout
        self.sql.execute(
            "INSERT OR IGNORE INTO task_group VALUES (?, ?, ?, '', ?, 0)", (group_id, queue_id, settings.total, due)
        )
        self.sql.execute("INSERT OR IGNORE INTO group_member VALUES (?, -1, 0, ?)", (group_id, message.body))
        if not settings.total:
            self._end_group(group_id, now, message.due)
        return True

    def _join(self, group_id: str, members: Sequence[tuple[Any, ...]], now: float) -> None:
        """Note how members of a group ended, each the first time that it does; the last one ends the group.

        Args:
            members: their rows.
        """
        is_open = "SELECT total, ended FROM task_group JOIN group_member USING (group_id) WHERE group_id = ?"
        row = self._one(f"{is_open} AND position = -1", (group_id,))
        if row is None:
            return
        total, ended = row
        known = [member for member in members if 0 <= member[1] < total]
        self.bytes_written += sum(len(member[3]) + BYTES_OF_A_CHANGE for member in known)
        joined = self.sql.executemany("INSERT OR IGNORE INTO group_member VALUES (?, ?, ?, ?)", known).rowcount
        if joined > 0:
            self.sql.execute("UPDATE task_group SET ended = ended + ? WHERE group_id = ?", (joined, group_id))
            if ended + joined == total:
                self._end_group(group_id, now)

    def _end_group(self, group_id: str, now: float, due: float | None = None) -> None:
        """Publish what follows a group, and tell its outcome; members that end from now on change nothing."""
        rows = self.sql.execute("SELECT position, failed, value FROM group_member WHERE group_id = ?", (group_id,))
        outcomes = {position: (bool(failed), value) for position, failed, value in rows}
        (home,) = self._one("SELECT name FROM queue JOIN task_group USING (queue_id) WHERE group_id = ?", (group_id,))
        assert self.end_group is not None
        _, definition = outcomes.pop(-1)
        ending = self.end_group(home, definition, outcomes)
        self.sql.execute("DELETE FROM group_member WHERE group_id = ? AND position = -1", (group_id,))
        self.sql.execute("UPDATE task_group SET due = ? WHERE group_id = ?", (now + GROUP_KEPT, group_id))
        self.insert([message._replace(due=due) for message in ending.messages] if due else ending.messages, now)
        if ending.answer is not None:
            self.tell([ending.answer], now)

    def _see_to_groups(self, now: float) -> None:
        """End a group whose time has run out, or forget one that ended long ago, if there is one, of any queue."""
        is_open = "EXISTS (SELECT 1 FROM group_member AS member WHERE member.group_id = g.group_id AND position = -1)"
        due = self._one(f"SELECT group_id, {is_open} FROM task_group AS g WHERE due <= ? LIMIT 1", (now,))
        if due is None:
            self._groups_seen_to = now
        elif due[1]:
            self._end_group(due[0], now)
        else:
            self._forget_group(due[0])

    def _forget_group(self, group_id: str) -> None:
        """Delete what is left of a group; of a large one, only some members at once."""
        members = "SELECT group_id, position FROM group_member WHERE group_id = ? LIMIT ?"
        deleted = self.sql.execute(
            f"DELETE FROM group_member WHERE (group_id, position) IN ({members})", (group_id, GROUP_MEMBERS_AT_ONCE)
        )
        self.bytes_written += deleted.rowcount * BYTES_OF_A_CHANGE
        if deleted.rowcount < GROUP_MEMBERS_AT_ONCE:
            self.sql.execute("DELETE FROM task_group WHERE group_id = ?", (group_id,))

    def progress(self, group_id: str) -> Progress | None:
        """How far a group is, until some time after its end."""
        row = self._one(
            """
            SELECT ended, (SELECT count(*) FROM group_member WHERE group_id = ?1 AND failed), total
            FROM   task_group
            WHERE  group_id = ?1
            """,
            (group_id,),
        )
        return None if row is None else Progress(*row)

    def _tell_endings(self, queue: str, endings: Iterable[tuple[str | bytes, str, str]], now: float) -> None:
        """Tell of messages that end without a run, by their bodies, with reason and description."""
        home = queue.removesuffix(DEAD_LETTER_SUFFIX)
        answers = [ended_by(body, home, reason, description) for body, reason, description in endings]
        self.tell([answer for answer in answers if answer is not None], now, instead=False)

    def outcomes(self, ids: Sequence[str], now: float) -> dict[str, tuple[bool, str]]:
        """Of some tasks the outcomes that are there, by id: whether it failed, and the value.

        In no transaction: it reads beside whoever writes, in other processes, and none of them waits for it.
        """
        found: dict[str, tuple[bool, str]] = {}
        with self.mutex:
            for place in range(0, len(ids), READ_AT_ONCE):
                some = ids[place : place + READ_AT_ONCE]
                sql = f"""
                    SELECT task_id, failed, value
                    FROM   outcome
                    WHERE  task_id IN ({",".join("?" * len(some))}) AND expires > ?
                """
                for task_id, failed, value in self.sql.execute(sql, (*some, now)):
                    found[task_id] = bool(failed), value
        return found

    # -- for operators

    def replace(self, queue: str, successors: Mapping[int, Outgoing | None], now: float, why: str = "") -> set[int]:
        """Delete messages that are still in the queue and that nobody holds; their numbers.

        Args:
            successors: by sequence number, what is to be enqueued in a message's place.
            why: the name of the error of which who awaits a result is told, where nothing is.
        """
        queue_id, _ = self._queue(queue)
        free = f"""
            FROM  {BY_NUMBER}
            WHERE sequence_number IN ({",".join(map(str, successors))}) AND queue_id = ? AND (state != 0 OR due <= ?)
        """
        removed = {row[0] for row in self.sql.execute(f"SELECT sequence_number {free}", (queue_id, now))}
        if why:
            awaited = self.sql.execute(f"SELECT body {free} AND instr(body, 'outcome_to')", (queue_id, now))
            self._tell_endings(queue, [(body, why, "The message was removed.") for (body,) in awaited], now)
        self.sql.execute(f"DELETE {free}", (queue_id, now))
        self.bytes_written += len(removed) * BYTES_OF_A_CHANGE
        instead = [each for number in successors if number in removed and (each := successors[number])]
        outcome_ids = [(each.outcome_id,) for each in instead if each.outcome_id]
        self.sql.executemany("DELETE FROM outcome WHERE task_id = ?", outcome_ids)
        self.insert(instead, now)
        return removed

    def cancel(self, queue: str, sequence_number: int, now: float) -> MessageState | None:
        """Delete a message that is scheduled or waits; where it was, or, of another, is; None if it is gone."""
        fate = self._fate_of(queue, sequence_number, now)
        if fate in (MessageState.SCHEDULED, MessageState.ACTIVE):
            self.replace(queue, {sequence_number: None}, now, CANCELLED)
        return fate

    def _fate_of(self, queue: str, sequence_number: int, now: float) -> MessageState | None:
        """Where a message of the queue, or of its dead-letter queue, is; None if it is gone."""
        row = self._one(
            """
            SELECT name, state, due
            FROM   message JOIN queue USING (queue_id)
            WHERE  sequence_number = ? AND name IN (?, ?)
            """,
            (sequence_number, queue, dead_letter_queue(queue)),
        )
        return None if row is None else _state_of(row[0], row[1], row[2], now)


_kind = operator.attrgetter("queue", "given_id", "opens_group", "part_of")

_connecting = threading.Lock()
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_forking: list[Connection] = []


def _before_fork() -> None:
    _connecting.acquire()
    _forking[:] = _connections
    for connection in _forking:
        connection.mutex.acquire()


def _after_fork(action: Callable[[Connection], None]) -> None:
    for connection in _forking:
        action(connection)
    _forking.clear()
    _connecting.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=functools.partial(_after_fork, lambda connection: connection.mutex.release()),
        after_in_child=functools.partial(_after_fork, Connection.after_fork_in_child),
    )


BYTES_OF_A_CHANGE = 512
"""What a row that is added, changed or deleted adds to the log besides its body, roughly: pages are shared."""

_NO_PROPERTIES: Mapping[str, str] = {}


def _properties(text: str | None) -> Mapping[str, str]:
    properties: Mapping[str, str] = json.loads(text) if text else _NO_PROPERTIES
    return properties


def connect(path: str, mode: str | None = None) -> sqlite3.Connection:
    """A connection for short write transactions that never wait, and never checkpoint, by themselves.

    Args:
        mode: how to open a file that is only to be read, see https://www.sqlite.org/uri.html.
    """
    if sqlite3.sqlite_version_info < (3, 24):
        raise ConfigurationError(f"SQLite {sqlite3.sqlite_version} is too old: boilermaker needs 3.24, for upserts.")
    uri = path if mode is None else f"{Path(path).as_uri()}?{mode}"
    connection = sqlite3.connect(uri, uri=mode is not None, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("synchronous = NORMAL", "wal_autocheckpoint = 0", "secure_delete = OFF", "cache_size = -16000"):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def check_version(path: str, connection: sqlite3.Connection) -> int:
    """The schema version of a file, 0 of one that is empty; a ConfigurationError if it is not for us."""
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and application != APPLICATION_ID:
        raise ConfigurationError(f"{path} is the database of another program: choose another path.")
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{path} has schema version {version}, this boilermaker knows {SCHEMA_VERSION}: "
            "it was written by a newer one. Update boilermaker, or choose another path."
        )
    return int(version) if tables else 0


def open_to_read(path: str) -> Connection | None:
    """A connection beside all others, which takes no lock that anybody waits for; None if the file is empty.

    To look changes nothing: a file of an older version is read as it is, also in a folder that cannot be written to.
    """

    def opened() -> Connection | None:
        try:
            connection = Connection(path, "mode=ro")
            version = check_version(path, connection.sql)
        except sqlite3.OperationalError as error:  # SQLite would make the log's index beside it, and may not
            if _is_locked(error) or (os.path.exists(path + "-wal") and os.path.getsize(path + "-wal")):
                raise
            connection = Connection(path, "mode=ro&immutable=1")
            version = check_version(path, connection.sql)
        return connection if version else None

    with _explained(path):
        return _patiently(path, opened)  # who opens or closes the file as the first, or the last, locks it for a moment


def _state_of(queue: str, state: int, due: float, now: float) -> MessageState:
    if queue.endswith(DEAD_LETTER_SUFFIX):
        return MessageState.DEAD_LETTER
    if state == LOCKED:
        return MessageState.RUNNING if due > now else MessageState.ACTIVE
    return MessageState.SCHEDULED if due > now else MessageState.ACTIVE


def _version_of(connection: Connection) -> int:
    version: int = connection.sql.execute("PRAGMA user_version").fetchone()[0]
    return version


def _select(connection: Connection, table: str, condition: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
    """Rows to make messages of, also from a file of version 1, which has not all the columns."""
    since_version_2 = "dead_lettered_time, dead_letter_traceback" if _version_of(connection) > 1 else "NULL, NULL"
    return connection.sql.execute(
        f"""
        SELECT sequence_number, delivery_count, message_id, body, application_properties, enqueued_time,
               scheduled_enqueue_time, dead_letter_reason, dead_letter_error_description, state, due, {since_version_2}
        FROM   {table}
        WHERE  queue_id = (SELECT queue_id FROM queue WHERE name = ?) AND {condition}
        """,
        parameters,
    )


NEAR = """
    SELECT   sequence_number
    FROM     (SELECT sequence_number, queue_id FROM message NOT INDEXED
              WHERE sequence_number >= ?2 ORDER BY sequence_number LIMIT 20 * ?3)
    WHERE    queue_id = (SELECT queue_id FROM queue WHERE name = ?1)
    ORDER BY sequence_number
    LIMIT    ?3
"""
"""The first numbers of a queue from one on, found among the next rows of all queues: quick in a long queue."""

FEW = 1000
"""Messages, at most, that are looked for nearby first."""

ANYWHERE = """
    SELECT   sequence_number
    FROM     message
    WHERE    queue_id = (SELECT queue_id FROM queue WHERE name = ?1) AND sequence_number >= ?2
    ORDER BY sequence_number
    LIMIT    ?3
"""
"""The same by the index that receives, through all of the queue: quick in a short one."""


def read_messages(connection: Connection, queue: str, max_message_count: int, sequence_number: int) -> list[Message]:
    """The messages of a queue by sequence number, from that one on, locked and scheduled ones included."""
    rows: list[tuple[Any, ...]] = []
    # Held until all is read: a child that is forked in the middle of it could not close the connection.
    with _explained(connection.path), connection.mutex:
        for numbers in (NEAR, ANYWHERE) if max_message_count <= FEW else (ANYWHERE,):
            if len(rows) < max_message_count:
                condition = f"sequence_number IN ({numbers}) ORDER BY sequence_number"
                rows = list(_select(connection, BY_NUMBER, condition, queue, sequence_number, max_message_count))
    now = time.time()
    return [_message_of_row(queue, row, now) for row in rows]


def _message_of_row(queue: str, row: tuple[Any, ...], now: float) -> Message:
    number, count, message_id, body, properties, enqueued, scheduled, reason, description, state, due, died, trace = row
    text, raw_body = text_of(body)
    return Message(
        queue_name=queue,
        body=text,
        raw_body=raw_body,
        message_id=message_id,
        sequence_number=number,
        delivery_count=count,
        enqueued_time_utc=_utc(enqueued),
        scheduled_enqueue_time_utc=_utc(scheduled) if scheduled is not None else None,
        dead_letter_reason=reason,
        dead_letter_error_description=description,
        application_properties=_properties(properties),
        state=_state_of(queue, state, due, now),
        locked_until_utc=_utc(due) if state == LOCKED and due > now else None,
        dead_lettered_time_utc=_utc(died) if died is not None else None,
        dead_letter_traceback=trace,
    )


def count_messages(connection: Connection, queue: str, now: float) -> Counts:
    """How many messages there are, by an index alone; of a dead-letter queue, all are dead letters."""
    sql = """
        SELECT (SELECT count(*) FROM message WHERE queue_id = :ours AND state = 1 AND due <= :now),
               (SELECT count(*) FROM message WHERE queue_id = :ours AND state = 0 AND due <= :now),
               (SELECT count(*) FROM message WHERE queue_id = :ours AND state = 0 AND due > :now),
               (SELECT count(*) FROM message WHERE queue_id = :ours AND state = 1 AND due > :now),
               (SELECT count(*) FROM message WHERE queue_id = :dead),
               (SELECT min(due) FROM message WHERE queue_id = :ours AND state = 1 AND due <= :now),
               (SELECT min(enqueued_time) FROM message WHERE queue_id = :ours AND state = 0 AND due <= :now)
    """
    with _explained(connection.path), connection.mutex:
        ids = dict(connection.sql.execute("SELECT name, queue_id FROM queue"))
        dead = dead_letter_queue(queue)
        parameters = {"ours": ids.get(queue) if queue != dead else None, "dead": ids.get(dead), "now": now}
        ready, expired, running, scheduled, dead_letters, *oldest = connection.sql.execute(sql, parameters).fetchone()
    ages = [now - since for since in oldest if since is not None]
    return Counts(
        active=ready + expired,
        running=running,
        scheduled=scheduled,
        dead_letter=dead_letters,
        oldest=max(ages, default=None),
    )


def count_by_task(connection: Connection, queue: str, now: float) -> dict[str, TaskCounts]:
    """The same by function name; under '' what is no task. A body is read where the name is not beside it."""
    with _explained(connection.path), connection.mutex:
        version = _version_of(connection)
        connection.sql.create_function("name_in", 1, _name_in, deterministic=True)
        by_state = """
            sum(due <= :now) AS active, sum(state = 0 AND due > :now) AS running,
            sum(state = 1 AND due > :now) AS scheduled, min(CASE WHEN due <= :now THEN enqueued_time END) AS since
        """
        waiting = connection.sql.execute(
            f"""
            SELECT   name, sum(active), sum(running), sum(scheduled), min(since)
            FROM     ({_by_name(by_state, version)})
            GROUP BY name
            """,
            {"queue": queue, "now": now},
        ).fetchall()
        died = "ifnull(dead_lettered_time, due)" if version > 1 else "due"
        and_last = f"count(*) AS number, dead_letter_error_description AS error, max({died}) AS died"
        dead = connection.sql.execute(
            f"SELECT name, sum(number), error, max(died) FROM ({_by_name(and_last, version)}) GROUP BY name",
            {"queue": dead_letter_queue(queue)},
        ).fetchall()
    counts = {
        name: TaskCounts(
            active=active,
            running=running,
            scheduled=scheduled,
            dead_letter=0,
            oldest=None if since is None else now - since,
        )
        for name, active, running, scheduled, since in (waiting if queue != dead_letter_queue(queue) else ())
    }
    none = TaskCounts(active=0, running=0, scheduled=0, dead_letter=0, oldest=None)
    for name, number, error, _ in dead:
        counts[name] = dataclasses.replace(counts.get(name, none), dead_letter=number, last_error=error)
    return counts


def _by_name(columns: str, version: int) -> str:
    """A select of :queue by function name, once for the names beside the bodies, and once for those in them.

    In one, SQLite would sort all the bodies too. So a name may come twice.
    """
    return " UNION ALL ".join(
        f"""
        SELECT   {name} AS name, {columns}
        FROM     message
        WHERE    queue_id = (SELECT queue_id FROM queue WHERE name = :queue) AND {condition}
        GROUP BY 1
        """
        for name, condition, since in (
            ("function_name", "function_name IS NOT NULL", 2),
            ("name_in(body)", "function_name IS NULL" if version > 1 else "1", 1),
        )
        if version >= since
    )


def _name_in(body: str | bytes) -> str:
    """The function name of a task's message, '' of another."""
    try:
        return decode(body, "").function_name
    except InvalidTaskFormat:
        return ""


READ_AT_ONCE = 500
"""Messages that an operation on many reads at once, and at most changes in one transaction."""

READ_BYTES = 1024 * 1024
"""Bytes of bodies after which it reads no more at once."""

LONGEST_STEP = 0.05
"""Seconds for which an operation on many messages looks at some, before it changes those that it found."""


class Walk:
    """Goes once over the messages of a queue, and finds those that are asked for, in bounded steps.

    It goes by the index that receives. What is enqueued after its beginning has a higher number than there was then,
    and is passed over; so is what somebody holds.
    """

    def __init__(self, queue: str, which: Selection) -> None:
        self.queue = queue
        self._which = which
        self._numbers = None if which.numbers is None else sorted(which.numbers)
        self._rows: collections.deque[tuple[Any, ...]] = collections.deque()
        self._read_all = self._numbers == []
        self._place: tuple[float, ...] = (LOCKED, -math.inf, 0)
        self._last: int | None = None

    @property
    def ended(self) -> bool:
        return self._read_all and not self._rows

    def step(self, reading: Callable[[], contextlib.AbstractContextManager[Connection]]) -> Iterator[Message]:
        """The next that are asked for; within LONGEST_STEP, so there may be none although there are more to come."""
        if not self._rows:
            with reading() as connection, _explained(connection.path), connection.mutex:
                self._read(connection)
        now, latest = time.time(), time.monotonic() + LONGEST_STEP
        while self._rows and time.monotonic() < latest:
            message = _message_of_row(self.queue, self._rows.popleft(), now)
            if self._which.has(message):
                yield message

    def _read(self, connection: Connection) -> None:
        if self._last is None:
            (self._last,) = connection.sql.execute("SELECT ifnull(max(sequence_number), 0) FROM message").fetchone()
        rows = self._by_index(connection) if self._numbers is None else self._by_number(connection, self._numbers)
        size = 0
        for row in rows:
            self._rows.append(row)
            self._place = row[9], row[10], row[0]
            size += len(row[3])
            if size > READ_BYTES:
                return
        self._read_all = self._numbers is None and len(self._rows) < READ_AT_ONCE
        if self._numbers is not None:
            self._place = (0, 0, self._numbers[:READ_AT_ONCE][-1])
            self._numbers = self._numbers[READ_AT_ONCE:]
            self._read_all = not self._numbers

    def _by_index(self, connection: Connection) -> Iterator[tuple[Any, ...]]:
        condition = """
            (state, due, sequence_number) > (?, ?, ?) AND state < 2 AND NOT (state = 0 AND due > ?)
            AND sequence_number <= ?
            ORDER BY state, due, sequence_number
            LIMIT    ?
        """
        place = *self._place, time.time(), self._last
        return _select(connection, "message", condition, self.queue, *place, READ_AT_ONCE)

    def _by_number(self, connection: Connection, numbers: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        condition = f"""
            sequence_number IN ({",".join(map(str, numbers[:READ_AT_ONCE]))}) AND sequence_number BETWEEN ? AND ?
            AND state < 2 AND NOT (state = 0 AND due > ?)
            ORDER BY sequence_number
        """
        return _select(connection, BY_NUMBER, condition, self.queue, self._place[2] + 1, self._last, time.time())


def read_queues(connection: Connection) -> dict[str, QueueSettings]:
    """The queues of a file, with their settings."""
    sql = "SELECT name, max_delivery_count, duplicate_detection, time_to_live FROM queue ORDER BY name"
    with _explained(connection.path), connection.mutex:
        return {name: QueueSettings(*settings) for name, *settings in connection.sql.execute(sql)}


LOCK_PATIENCE = 30
"""Seconds to wait for another process's transaction."""


def _patiently(path: str, action: Callable[[], T]) -> T:
    """Repeat an action that another process's lock may keep from happening."""
    for _ in range(LOCK_PATIENCE * 1000):
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not _is_locked(error):
                raise
            time.sleep(random.uniform(0.0005, 0.0015))
    raise ServiceBusUnavailable(f"Another process has locked {path} for over {LOCK_PATIENCE} s: is it stopped?")


def _is_locked(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _may_pass(error: Exception) -> bool:
    """Whether it is worth to try again what failed so: the file may be mended."""
    return isinstance(error, ConfigurationError) or _is_about_the_file(error)


def _is_about_the_file(error: Exception | None) -> bool:
    """Whether an error concerns all that is asked of the file, and not only a value that SQLite cannot hold."""
    return isinstance(error, ServiceBusUnavailable) and not isinstance(
        error.__cause__, (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
    )


_HOPELESS = {
    sqlite3.SQLITE_NOTADB: "is not a SQLite database: choose another path",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: it must be a file, in a directory that exists, and both writable",
    sqlite3.SQLITE_READONLY: "is read-only: the file and its directory have to be writable",
    sqlite3.SQLITE_PERM: "may not be opened: check its permissions",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore it, or choose another path",
}


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """SQLite's errors as ours, naming the file and the way out."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _HOPELESS:
            raise ConfigurationError(f"{path} {_HOPELESS[code]} ({error}).") from error
        if code == sqlite3.SQLITE_FULL:
            raise ServiceBusUnavailable(f"{path}: the disk is full. Nothing was changed; free some space.") from error
        raise ServiceBusUnavailable(f"{path}: {error}. Nothing was changed.") from error


# ======================================================================================================================
# 8. Local bus: group commit, waking up, lock renewal around the store
# ======================================================================================================================

# What coroutines ask for in one turn of the event loop becomes one transaction. A commit at `synchronous=NORMAL` only
# writes to the operating system's cache, some 30 microseconds, so it runs in the event loop; one that would have to
# wait, for another process or for a failing disk, is run again in a thread. A publish is answered after an fdatasync of
# the write-ahead log: what `synchronous=FULL` does, but outside the lock and for many publishers at once, and always in
# a thread, as a disk may take seconds. Checkpoints, which write and sync the file itself, have a thread and a
# connection of their own.

CHECKPOINT_BYTES = 8 * 1024 * 1024
"""Bytes, roughly, in the write-ahead log between two checkpoints, after each of which it is written from its beginning
again: to sync a file that grows takes the disk twice as long."""

FULL_LOG_BYTES = 16 * 1024 * 1024
"""The size at which who writes waits for a checkpoint that makes the log a short file again."""

LOOK_BYTES = 512 * 1024
"""Bytes, roughly, that are written between two looks at how long the log is."""

CHECKPOINT_PATIENCE = 50
"""Milliseconds for which a checkpoint keeps writers waiting for somebody who reads, before it leaves it to the next."""

POLL_INTERVAL = 0.025
"""Seconds between two looks at the file where the operating system does not tell of changes."""

CHECK_INTERVAL = 1.0
"""Seconds between two looks of a worker whether the file is still there."""

RETRY_PAUSE = 0.25
"""Seconds between two attempts to settle."""


class QueueFile:
    """A store, opened in this process, with what keeps it durable and tells of changes."""

    def __init__(self, path: str) -> None:
        self._log: int | None = None
        self.log_path = None if path == ":memory:" else path + "-wal"
        self.listeners: set[Changes] = set()
        self.store = Store(path)
        try:
            if self.log_path is not None:
                self._log, self.store.inode = os.open(self.log_path, os.O_RDWR), os.stat(path).st_ino
        except OSError as error:
            self.store.close()
            raise ServiceBusUnavailable(f"{path} cannot be opened: {error}") from error
        self.threads = ThreadPoolExecutor(3, thread_name_prefix="boilermaker")
        self._syncing = threading.Lock()
        self._checkpointing = threading.Lock()
        self._checkpointed = 0 if self._log is None else -os.fstat(self._log).st_size  # what it found was written too
        self._full_at, self._look_at = FULL_LOG_BYTES, 0
        self._checked = 0.0

    def in_a_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Call where waiting does no harm; the future fails if the file has been closed."""
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self.threads, function, *arguments)
        except RuntimeError:
            closed: asyncio.Future[T] = loop.create_future()
            closed.set_exception(ServiceBusUnavailable(f"{self.store.path} has been closed."))
            return closed

    def check(self, interval: float = 0) -> None:
        """Notice that the file was deleted or replaced, and do not write on into nothing; look once in so many seconds.

        The log is not asked for its inode: to Linux that is to read its time of change, which it then writes more
        exactly, and so more often; a publish would take a tenth longer.
        """
        now, path = time.monotonic(), self.store.path
        if now - self._checked < interval:
            return
        self._checked = now
        try:
            if self.log_path is None or (
                os.stat(path).st_ino == self.store.inode and os.access(self.log_path, os.F_OK)
            ):
                return
        except OSError:  # it is not there
            pass
        raise self._gone(f"{path} was deleted or replaced while open: what was in it is not seen any more.")

    def _gone(self, why: str) -> ServiceBusUnavailable:
        if self.store.state is FileState.OPEN:
            self.store.state = FileState.GONE
        return ServiceBusUnavailable(why)

    def sync(self) -> None:
        """Wait until all that is committed is on the disk, in a thread.

        The system tells of a failure once, and forgets what it could not write. So a file whose sync failed is opened
        anew, and what its log has is written to the file itself before it is used again, see `write_back`.
        """
        if self._log is None:
            return
        with self._syncing:  # after another's that may fail
            if self.store.state is FileState.GONE:
                raise ServiceBusUnavailable(f"{self.store.path} could not be synced to the disk, or was replaced.")
            self.check()
            try:
                getattr(os, "fdatasync", os.fsync)(self._log)
            except OSError as error:
                raise self._gone(f"{self.store.path} could not be synced to the disk: {error}") from error

    def write_back(self) -> None:
        """Write all that the log has to the file, and begin the log anew; ServiceBusUnavailable while it cannot be."""
        path = self.store.path
        with _explained(path), contextlib.closing(Connection(path)) as connection, connection.mutex:
            connection.sql.execute(f"PRAGMA busy_timeout = {10 * CHECKPOINT_PATIENCE}")
            blocked, _, _ = connection.sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if blocked:
            raise ServiceBusUnavailable(f"{path}: the log could not be written back yet, somebody reads.")

    def run(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run statements in a thread, after a checkpoint if the log is full."""
        if self._log is not None and os.fstat(self._log).st_size >= self._full_at:
            with self._checkpointing:
                self._checkpoint()
        return self.store.run(works)

    async def outcomes(self, ids: Sequence[str]) -> dict[str, tuple[bool, str]]:
        """Of some tasks the outcomes that are there: read here, or, where that would wait, in a thread."""
        read = functools.partial(self.store.outcomes, ids, time.time())
        if not self.store.mutex.locked():
            with contextlib.suppress(sqlite3.Error):  # whatever it is, the thread meets it again
                return read()

        def read_patiently() -> dict[str, tuple[bool, str]]:
            with _explained(self.store.path):
                return _patiently(self.store.path, read)

        return await self.in_a_thread(read_patiently)

    def log_is_full(self) -> bool:
        """Whether the log is so long that who writes waits for a checkpoint; looked at after some writing only."""
        if self._log is None or self.store.bytes_written < self._look_at:
            return False
        self._look_at = self.store.bytes_written + LOOK_BYTES
        return os.fstat(self._log).st_size >= self._full_at

    def checkpoint_soon(self) -> None:
        """After a transaction, let a thread move the log's content to the file if there is much of it."""
        if self._log is None or self.store.bytes_written - self._checkpointed < CHECKPOINT_BYTES:
            return
        self._checkpointed = self.store.bytes_written
        with contextlib.suppress(RuntimeError):  # it has been closed
            self.threads.submit(self._checkpoint_alone)

    def _checkpoint_alone(self) -> None:
        if self._checkpointing.acquire(blocking=False):
            try:
                self._checkpoint()
            finally:
                self._checkpointing.release()

    def _checkpoint(self) -> None:
        """Copy without hindering anybody, then, with writers waiting for a moment, what they wrote meanwhile.

        If somebody reads for too long, the log goes on, and is full when it is longer by another CHECKPOINT_BYTES.
        """
        assert self._log is not None
        self._checkpointed = self.store.bytes_written
        size = os.fstat(self._log).st_size
        mode = "RESTART" if size < FULL_LOG_BYTES else "TRUNCATE"
        try:
            with contextlib.closing(Connection(self.store.path)) as connection, connection.mutex:
                connection.sql.execute("PRAGMA wal_checkpoint(PASSIVE)")
                connection.sql.execute(f"PRAGMA busy_timeout = {CHECKPOINT_PATIENCE}")
                blocked, _, _ = connection.sql.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                self._full_at = FULL_LOG_BYTES if not blocked else max(size, FULL_LOG_BYTES) + CHECKPOINT_BYTES
                if not blocked:  # the log begins anew, and the first to write to it has to sync it: here, not there
                    with contextlib.suppress(sqlite3.OperationalError):  # somebody else was the first
                        connection.sql.execute("UPDATE queue SET name = name")
        except sqlite3.Error as error:
            logger.warning("Checkpoint of %s failed, the next will try again: %s", self.store.path, error)

    def announce(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake those who wait for messages: in this process, and, see Changes, in others.

        By the log, not by the file: to close any descriptor of that would let go of the locks SQLite has on it.
        """
        for changes in list(self.listeners):
            changes.tell(loop)
        if self.log_path is not None and _HAS_INOTIFY:
            with contextlib.suppress(OSError):  # it is gone, or no descriptor is free: they look again by themselves
                os.close(os.open(self.log_path, os.O_RDONLY))

    def close(self) -> None:
        if self.store.state is FileState.OPEN:  # else it stays gone, for who had it open to go on with what is there
            self.store.state = FileState.CLOSED
        self.threads.shutdown(wait=True)
        self.store.close()
        self._close_log()

    def __del__(self) -> None:
        self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            os.close(log)


class Changes:
    """Tells a receiver that there may be something to receive.

    In this process, by the group commit; from others, on Linux, by inotify, within a fraction of a millisecond and
    without costing anything in between: who has added messages opens and closes the write-ahead log after the commit,
    for that to be heard. (That it is written to can be heard too, but in the middle of the commit, too soon to receive
    anything.) Elsewhere the file's change counter is read every POLL_INTERVAL. It may tell for nothing, and nothing
    depends on it: a worker looks for itself every MAX_WAIT, should somebody have died in between.
    """

    def __init__(self, file: QueueFile) -> None:
        self.file = file
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._inotify = None if file.log_path is None else _inotify(file.log_path)
        self._polls = file.log_path is not None and self._inotify is None
        self._version = 0
        file.listeners.add(self)

    def tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say so, from an event loop of this process."""
        if loop is self._loop:
            self._changed.set()
        else:
            with contextlib.suppress(RuntimeError):  # that one is closed
                self._loop.call_soon_threadsafe(self._changed.set)

    def clear(self) -> None:
        """Forget what was told so far; to be called before a look at the queue."""
        self._changed.clear()
        if self._polls:
            self._version = self.file.store.data_version()

    async def wait(self, timeout: float) -> None:
        """Wait for a change since `clear`, for at most so many seconds."""
        if self._inotify is not None:
            self._loop.add_reader(self._inotify, self._heard, self._inotify)
        try:
            async with asyncio.timeout(timeout):
                while not self._changed.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), POLL_INTERVAL if self._polls else None)
                    if self._polls and self.file.store.data_version() != self._version:
                        return
        except TimeoutError:
            pass
        finally:
            if self._inotify is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._inotify)

    def _heard(self, inotify: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(inotify, 65536)
        self._changed.set()

    def close(self) -> None:
        self.file.listeners.discard(self)
        inotify, self._inotify = self._inotify, None
        if inotify is not None:
            os.close(inotify)


_HAS_INOTIFY = sys.platform.startswith("linux")


def _inotify(path: str) -> int | None:
    """A descriptor that is readable when the file was opened; None where the system has no such thing."""
    if not _HAS_INOTIFY:
        return None
    import ctypes

    opened = 0x20  # IN_OPEN, see inotify(7)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(path), opened) >= 0:
            return descriptor
    except (OSError, AttributeError):
        return None
    if descriptor >= 0:
        os.close(descriptor)
    return None


class _Request(NamedTuple):
    """Statements to run in a transaction, together with those of others. Durable: answered when it is on the disk."""

    works: Sequence[Callable[[], Any]]
    future: asyncio.Future[list[Any]]
    durable: bool


class GroupCommit:
    """The transactions of one event loop on a queue file."""

    def __init__(self, file: QueueFile) -> None:
        self.file = file
        self._loop = asyncio.get_running_loop()
        self._requests: list[_Request] = []
        self._flushing = False
        self._unsynced: list[tuple[asyncio.Future[list[Any]], list[Any]]] = []
        self._syncing = False
        self._seen_additions = 0

    def submit(self, *works: Callable[[], Any], durable: bool = False) -> asyncio.Future[list[Any]]:
        """Run statements in the next transaction; their results, errors among them.

        Args:
            works: run in order, and again from the start if the transaction has to be.
            durable: answer when the transaction is on the disk, not when it is committed; fails if it cannot be.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        self._requests.append(_Request(works, future, durable))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        return future

    async def do(self, work: Callable[[], T], durable: bool = False) -> T:
        """Run a statement in the next transaction; its result."""
        [result] = await self.submit(work, durable=durable)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    def _flush(self) -> None:
        """Run all that was asked for in one transaction: here, or, where it has to wait, in a thread."""
        requests = [request for request in self._requests if not request.future.done()]
        self._requests.clear()
        works = [work for request in requests for work in request.works]
        try:
            if self.file.log_is_full():
                raise BlockingIOError
            with self.file.store.transaction(wait=False):
                results = [work() for work in works]
        except Exception:  # whatever it is, the thread meets it again, and has the time to deal with it
            pass
        except BaseException as interrupt:
            self._answer(requests, [_interrupted(interrupt)] * len(works))
            raise
        else:
            self._answer(requests, results)
            return
        thread = self.file.in_a_thread(self.file.run, works)
        thread.add_done_callback(functools.partial(self._thread_done, requests, len(works)))

    def _thread_done(self, requests: Sequence[_Request], count: int, thread: asyncio.Future[list[Any]]) -> None:
        error = asyncio.CancelledError() if thread.cancelled() else thread.exception()
        if error is not None and not isinstance(error, Exception):
            error = _interrupted(error)
        self._answer(requests, thread.result() if error is None else [error] * count)

    def _answer(self, requests: Sequence[_Request], results: Sequence[Any]) -> None:
        self._flushing = bool(self._requests)
        if self._requests:
            self._loop.call_soon(self._flush)
        left = iter(results)
        for request in requests:
            own = list(itertools.islice(left, len(request.works)))
            if request.durable and not any(isinstance(result, Exception) for result in own):
                self._unsynced.append((request.future, own))
            else:
                _resolve(request.future, own)
        if self._unsynced and not self._syncing:
            self._sync()
        self.file.checkpoint_soon()
        if self.file.store.additions != self._seen_additions:
            self._seen_additions = self.file.store.additions
            self.file.announce(self._loop)

    def _sync(self) -> None:
        self._syncing = True
        waiting, self._unsynced = self._unsynced, []
        thread = self.file.in_a_thread(self.file.sync)
        thread.add_done_callback(functools.partial(self._synced, waiting))

    def _synced(
        self, waiting: Sequence[tuple[asyncio.Future[list[Any]], list[Any]]], thread: asyncio.Future[None]
    ) -> None:
        self._syncing = False
        error = asyncio.CancelledError() if thread.cancelled() else thread.exception()
        for future, results in waiting:
            _resolve(future, results if error is None else error)
        if self._unsynced:
            self._sync()


def _interrupted(interrupt: BaseException) -> ServiceBusUnavailable:
    return ServiceBusUnavailable(f"Interrupted by {type(interrupt).__name__}: nothing was changed.")


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result if isinstance(result, Exception) else _interrupted(result))
    else:
        future.set_result(result)


class LocalServiceBus:
    """A durable queue in a SQLite file, for as many processes of one machine as like to open it.

    It has Service Bus's semantics: peek-lock with expiry and renewal, delivery count, scheduled messages, time to live,
    dead-letter queue, duplicate detection, size limit, several queues in one file. The settings are kept with the
    queue by who sends to it or receives from it, for those who send to it from another: give the same in all its
    processes. The file is opened at the first use, and must be on a local disk. One that is deleted or replaced
    meanwhile is noticed, and what is there then is opened.

    Args:
        path: the file, made where there is none; ":memory:" for a queue that ends with `close()`.
        queue_name: the queue in the file.
        lock_duration: seconds before an unsettled message is delivered again, unless its lock is renewed.
        max_delivery_count: deliveries before a message is dead-lettered, None for no limit.
        duplicate_detection: seconds in which a second message of the same id is dropped, None for off; the ids of
            periodic tasks are remembered for 600 at least.
        time_to_live: seconds before a message that nobody received is dead-lettered, None for never.
        max_message_bytes: the size limit of a message body.

    Raises:
        ConfigurationError: an argument is out of range; at the first use, the file cannot hold a queue.
        ServiceBusUnavailable: at use, the disk is full or the file locked for long: nothing was changed then. Or what
            was sent could not be synced to the disk: then it may be there all the same.
    """

    system = "boilermaker"
    takes_group_ids = True

    def __init__(
        self,
        path: str | os.PathLike[str] = ":memory:",
        queue_name: str = "tasks",
        *,
        lock_duration: float = 10,
        max_delivery_count: int | None = 10,
        duplicate_detection: float | None = None,
        time_to_live: float | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
        if not isinstance(text, str) or not text or "\0" in text:
            raise ConfigurationError(f"path={path!r} must be that of a file, or ':memory:'.")
        self.path = text
        self.queue_name = _checked_queue_name(queue_name)
        self.lock_duration = _positive("lock_duration", lock_duration)
        self.max_delivery_count = max_delivery_count
        self.max_message_bytes = _count("max_message_bytes", max_message_bytes)
        self._settings = QueueSettings(
            None if max_delivery_count is None else _count("max_delivery_count", max_delivery_count),
            None if duplicate_detection is None else _positive("duplicate_detection", duplicate_detection),
            None if time_to_live is None else _positive("time_to_live", time_to_live),
        )
        self.id_window = self._settings.id_window(given_id=True) or 0
        self._real_path = self.path if self.path == ":memory:" else os.path.realpath(self.path)
        self._file: QueueFile | None = None
        self._keeps_settings = False
        self._commits: dict[asyncio.AbstractEventLoop, GroupCommit] = {}
        self._outcomes: dict[asyncio.AbstractEventLoop, LocalOutcomes] = {}
        self.opening = threading.Lock()
        _buses.add(self)

    def __repr__(self) -> str:
        return f"LocalServiceBus({self.path!r}, {self.queue_name!r})"

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        commit = await self.commit()
        numbers = await commit.do(lambda: commit.file.store.insert(messages, time.time()), durable=True)
        return [number or None for number in numbers]  # what opens a group has none

    def size(self, message: Outgoing) -> int:
        return len(message.body)

    def check_queue(self, queue: str) -> None:
        """Every queue can be sent to."""

    # -- outcomes are rows of the same file

    def address(self, task_id: str, ttl: float) -> Address:
        return Address(task_id, ttl)

    def address_of(self, task_id: str) -> Address:
        """Any process that has the file can ask for any."""
        return Address(task_id, 0)

    async def expect(self, heads: Sequence[Task]) -> None:
        """How they end is found when somebody looks."""

    def reply(self, answer: Answer) -> Outgoing | None:
        """None: they are written in settling."""
        if (size := len(answer.value)) > self.max_message_bytes:
            raise MessageTooLarge(f"it makes an outcome of {size} bytes, the limit is {self.max_message_bytes}")
        return None

    def member_address(self, group_id: str, position: int) -> Address:
        return Address(group_id, position=position)

    def open_group(self, message: Outgoing) -> list[Outgoing]:
        return [message._replace(opens_group=True)]

    async def progress(self, group_id: str) -> Progress:
        commit = await self.commit(keep_settings=False)
        progress = await commit.do(functools.partial(commit.file.store.progress, group_id))
        if progress is None:
            raise UsageError(
                f"Group {group_id} is not known to {self!r}: it ended over {GROUP_KEPT} s ago, or was not enqueued, as "
                "its task_id= had been published before."
            )
        return progress

    async def outcome(self, address: Address, timeout: float | None) -> Answer:
        loop = asyncio.get_running_loop()
        if loop not in self._outcomes:
            for closed in [other for other in list(self._outcomes) if other.is_closed()]:
                self._outcomes.pop(closed, None)
            self._outcomes[loop] = LocalOutcomes(self)
        failed, value = await self._outcomes[loop].get(address.id, timeout)
        return Answer(address, failed, value)

    # -- for operators: to look goes on beside all else, outside of the event loop, and changes nothing

    async def counts(self) -> Counts:
        return await self._look(count_messages, self.queue_name, time.time())

    async def counts_by_task(self) -> dict[str, TaskCounts]:
        return await self._look(count_by_task, self.queue_name, time.time())

    async def peek(
        self, max_message_count: int = 100, dead_letter: bool = False, sequence_number: int = 0
    ) -> list[Message]:
        """List messages by sequence number, from that one on, without locking them or delaying anybody."""
        _count("max_message_count", max_message_count)
        _check_sequence_number(sequence_number)
        if sequence_number >= 2**63:
            return []
        queue = dead_letter_queue(self.queue_name) if dead_letter else self.queue_name
        return await self._look(read_messages, queue, max_message_count, max(sequence_number, 0))

    async def _look(self, look: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Read in a thread; only where there is no file yet, it is made."""
        if not os.path.isfile(self._real_path):
            await self.commit()

        def read() -> T:
            with self._reading() as connection:
                return look(connection, *args, **kwargs)

        return await asyncio.to_thread(read)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A connection of its own, or, of a queue in memory, the only one there is."""
        if self.path == ":memory:":
            yield self.open().store
            return
        with contextlib.closing(open_to_read(self._real_path) or Store(":memory:")) as connection:
            yield connection

    async def replay(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Run dead letters again, as `replay_of` says; those that it did, or, for `dry_run`, would do.

        Some are replaced in each transaction, so that nobody has to wait for long; what a worker holds stays.

        Args:
            which: a function `Message -> bool`, which is called in a thread, or sequence numbers.
            on_progress: called in the event loop with the number of messages done so far.

        Raises:
            OperationStopped: it cannot go on for now; `messages` are those done. Called again, it goes on from there.
        """
        queue = dead_letter_queue(self.queue_name)
        return await self._operate(queue, replay_of, "", which, dry_run, on_progress)

    async def discard(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete dead letters; else as `replay`."""
        queue = dead_letter_queue(self.queue_name)
        return await self._operate(queue, lambda message: None, DISCARDED, which, dry_run, on_progress)

    async def purge(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete messages that wait or are scheduled; else as `replay`."""
        if self.queue_name.endswith(DEAD_LETTER_SUFFIX):
            raise UsageError(f"{self.queue_name} has dead letters only: discard() deletes these.")
        return await self._operate(self.queue_name, lambda message: None, CANCELLED, which, dry_run, on_progress)

    async def _operate(
        self,
        queue: str,
        successor_of: Callable[[Message], Outgoing | None],
        why: str,
        which: Which,
        dry_run: bool,
        on_progress: Callable[[int], object] | None,
    ) -> list[Message]:
        """Find messages in a thread, and put others, or none, in their places: step by step, each in one transaction.

        Whatever ends it ends it between two steps. In a file that replaced the one it began with, messages of the same
        numbers are others: it stops.
        """
        walk, done = Walk(queue, selection_of(which)), dict[int, Message]()

        def look() -> tuple[list[Message], dict[int, Outgoing | None]]:
            found, successors = list[Message](), dict[int, Outgoing | None]()
            for message in walk.step(self._reading):
                found.append(message)
                if not dry_run:
                    successors[message.sequence_number] = successor_of(message)
                message.forget_task()
            return found, successors

        try:
            if not os.path.isfile(self._real_path):  # it is made, or was deleted
                (await self.commit(keep_settings=False)).file.check()
            inode = None if self.path == ":memory:" else os.stat(self._real_path).st_ino
            while not walk.ended:
                found, successors = await asyncio.to_thread(look)
                if found and not dry_run:
                    commit = await self.commit(keep_settings=False)
                    if commit.file.store.inode != inode:
                        raise ServiceBusUnavailable(f"{self.path} was replaced meanwhile.")
                    work = functools.partial(commit.file.store.replace, queue, successors, time.time(), why)
                    changed = await commit.do(work, durable=True)
                    found = [message for message in found if message.sequence_number in changed]
                done |= {message.sequence_number: message for message in found}
                if found and on_progress is not None:
                    on_progress(len(done))
        except ServiceBusUnavailable as error:
            raise OperationStopped(f"Stopped after {len(done)} messages: {error}", list(done.values())) from error
        return [done[number] for number in sorted(done)]

    async def cancel(self, sequence_number: int) -> None:
        """Take back a message that is scheduled, or waits.

        Raises:
            MessageNotFound: none is there under that number; says what became of it, where that can be told.
        """
        _check_sequence_number(sequence_number)
        fate = None
        if _is_64_bit(sequence_number):
            commit = await self.commit(keep_settings=False)
            fate = await commit.do(
                functools.partial(commit.file.store.cancel, self.queue_name, sequence_number, time.time()), durable=True
            )
        number = (
            f"{self.queue_name} has no scheduled message with sequence number {sequence_number}, nor one that waits"
        )
        if fate is MessageState.RUNNING:
            raise MessageNotFound(f"{number}: it runs at the moment.")
        if fate is MessageState.DEAD_LETTER:
            raise MessageNotFound(f"{number}: it is a dead letter, which discard() deletes.")
        if fate is None:
            raise MessageNotFound(f"{number}: it is gone, if it ever was.")

    async def open_receiver(
        self, on_lock_lost: Callable[[Delivery], None], max_renewal: float, suspect_from: int = MAX_SECONDS
    ) -> LocalReceiver:
        return LocalReceiver(self, await self.commit(), on_lock_lost, max_renewal, suspect_from)

    async def close(self) -> None:
        """Close the file. The bus opens it again if it is used again; a worker that still receives from it fails."""
        commit = self._commits.get(asyncio.get_running_loop())
        if (outcomes := self._outcomes.pop(asyncio.get_running_loop(), None)) is not None:
            outcomes.close()
        try:
            if commit is not None and commit.file is self._file and commit.file.store.state is FileState.OPEN:
                with contextlib.suppress(ServiceBusUnavailable):
                    await commit.submit(durable=True)  # after all that was asked for before
        finally:
            await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        with self.opening:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    async def commit(self, keep_settings: bool = True) -> GroupCommit:
        """This event loop's transactions, on the file as it is now.

        Args:
            keep_settings: write the queue's settings to the file, as who sends or receives does.
        """
        loop = asyncio.get_running_loop()
        commit = self._commits.get(loop)
        if (
            commit is not None
            and commit.file.store.state is FileState.OPEN
            and (self._keeps_settings or not keep_settings)
        ):
            return commit
        file = await asyncio.to_thread(self.open, keep_settings)
        commit = self._commits.get(loop)  # somebody else may have been first
        if commit is None or commit.file is not file:
            for closed in [other for other in list(self._commits) if other.is_closed()]:
                self._commits.pop(closed, None)
            commit = self._commits[loop] = GroupCommit(file)
        return commit

    def open(self, keep_settings: bool = False) -> QueueFile:
        """Open the file, anew if it is gone, or closed as it is after a fork."""
        with self.opening:
            file = self._file
            if file is None or file.store.state is not FileState.OPEN:
                former, file = file, QueueFile(self._real_path)
                if former is not None and former.store.state is FileState.GONE:
                    try:
                        file.write_back()
                    except BaseException:
                        file.close()
                        raise
                    former.close()
                file.store.end_group = functools.partial(ending_of, self)
                self._file, self._keeps_settings = file, False
            if keep_settings and not self._keeps_settings:
                file.store.open_queue(self.queue_name, self._settings)
                self._keeps_settings = True
            return file


_buses: weakref.WeakSet[LocalServiceBus] = weakref.WeakSet()


def _forget_who_was_opening() -> None:
    """In a forked child, which has none of its parent's threads."""
    for bus in _buses:
        bus.opening = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_who_was_opening)


class LocalOutcomes:
    """Finds outcomes for all who wait for one in an event loop, by one look for all whenever the file has changed."""

    def __init__(self, bus: LocalServiceBus) -> None:
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, set[asyncio.Future[tuple[bool, str]]]] = {}
        self._changes: Changes | None = None
        self._looking: asyncio.Task[None] | None = None

    async def get(self, task_id: str, timeout: float | None) -> tuple[bool, str]:
        """An outcome, that is there or comes within so many seconds: whether it is a failure, and the value.

        Raises:
            TimeoutError: it does not.
        """
        if timeout == 0:
            commit = await self._bus.commit(keep_settings=False)
            found = await commit.file.outcomes([task_id])
            if task_id not in found:
                raise TimeoutError
            return found[task_id]
        outcome: asyncio.Future[tuple[bool, str]] = self._loop.create_future()
        self._waiting.setdefault(task_id, set()).add(outcome)
        if self._looking is None or self._looking.done():
            self._looking = self._loop.create_task(self._look())
        elif self._changes is not None:
            self._changes.tell(self._loop)  # for a look at this one
        try:
            async with asyncio.timeout(timeout):
                return await outcome
        finally:
            self._waiting[task_id].discard(outcome)
            if not self._waiting[task_id]:
                del self._waiting[task_id]

    async def _look(self) -> None:
        """Look for as long as somebody waits; a second look begins no sooner than the first one took."""
        try:
            while self._waiting:
                commit = await self._bus.commit(keep_settings=False)
                if self._changes is None or self._changes.file is not commit.file:
                    self._stop_listening()
                    self._changes = Changes(commit.file)
                self._changes.clear()
                began = self._loop.time()
                try:
                    commit.file.check(CHECK_INTERVAL)
                    found = await commit.file.outcomes(list(self._waiting))
                except ServiceBusUnavailable as error:
                    logger.warning("Looking for results failed, will try again: %s", error)
                    found = {}
                for task_id, outcome in found.items():
                    for waiting in self._waiting.get(task_id, ()):
                        _resolve(waiting, outcome)
                await asyncio.sleep(self._loop.time() - began)
                await self._changes.wait(MAX_WAIT)
        except Exception as error:
            for waiting in itertools.chain(*self._waiting.values()):
                _resolve(waiting, error)
        finally:
            self._stop_listening()

    def _stop_listening(self) -> None:
        if self._changes is not None:
            self._changes.close()
            self._changes = None

    def close(self) -> None:
        """Leave nobody waiting."""
        for waiting in itertools.chain(*self._waiting.values()):
            _resolve(waiting, ServiceBusUnavailable(f"{self._bus!r} was closed while a result was awaited."))
        if self._looking is not None:
            self._looking.cancel()


class LocalReceiver:
    """Receives from a `LocalServiceBus`, and keeps the locks of what it received."""

    def __init__(
        self,
        bus: LocalServiceBus,
        commit: GroupCommit,
        on_lock_lost: Callable[[Delivery], None],
        max_renewal: float,
        suspect_from: int,
    ) -> None:
        self._bus = bus
        self._queue = bus.queue_name
        self._lock_duration = bus.lock_duration
        self._on_lock_lost = on_lock_lost
        self._max_renewal = max_renewal
        self._suspect_from = suspect_from
        self._loop = asyncio.get_running_loop()
        self._commit = commit
        self._changes = Changes(commit.file)
        self._held: set[Delivery] = set()
        self._pending: set[asyncio.Future[Any]] = set()
        self._closed = threading.Event()
        self._renewer = threading.Thread(target=self._keep_locks, name="boilermaker-locks", daemon=True)
        self._renewer.start()

    @property
    def connected(self) -> bool:
        """A file is no connection: where it is not to be used, `receive` says so."""
        return True

    async def receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        deadline = self._loop.time() + max_wait_time
        while True:
            commit = await self._present_commit()
            if self._changes.file is not commit.file:
                self._changes.close()
                self._changes = Changes(commit.file)
            self._changes.clear()
            claiming = commit.submit(functools.partial(self._claim, commit.file.store, max_message_count))
            try:
                [claim] = await asyncio.shield(claiming)
            except asyncio.CancelledError:
                self._pending.add(claiming)
                claiming.add_done_callback(self._give_back)
                raise
            if isinstance(claim, Exception):
                raise claim
            deliveries: list[Delivery] = claim[0]
            next_due: float | None = claim[1]
            self._held.update(deliveries)  # so that from now on a task that blocks the event loop keeps their locks
            now, remaining = time.time(), deadline - self._loop.time()
            if deliveries:
                return deliveries
            if next_due is not None and next_due <= now:  # the rest of a backlog that has expired
                continue
            if remaining <= 0:
                return []
            await self._changes.wait(remaining if next_due is None else min(remaining, next_due - now))

    async def _present_commit(self) -> GroupCommit:
        """The transactions on the file that is there now; that it was deleted or replaced is seen within a second."""
        file = self._commit.file
        try:
            file.check(CHECK_INTERVAL)
        except ServiceBusUnavailable as error:
            logger.error("%s Going on with what is there now.", error)
        if file.store.state is FileState.CLOSED:
            raise UsageError(f"{self._bus!r} was closed under a worker: app.close() ends its workers first.")
        if file.store.state is FileState.GONE:
            self._commit = await self._bus.commit()
        return self._commit

    def _claim(self, store: Store, max_message_count: int) -> tuple[list[Delivery], float | None]:
        """Lock messages; none, and when to look again."""
        deliveries = store.claim(self._queue, max_message_count, self._lock_duration, time.time(), self._suspect_from)
        return deliveries, None if deliveries else store.next_due(self._queue)

    def _give_back(self, claiming: asyncio.Future[list[Any]]) -> None:
        """What was locked by a receive that was cancelled in between."""
        if claiming.exception() is None and not isinstance(claiming.result()[0], Exception):
            self.settle([Settlement(delivery, Action.ABANDON) for delivery in claiming.result()[0][0]])
        self._pending.discard(claiming)

    # -- settling

    def settle(self, settlements: Sequence[Settlement], durable: bool = False) -> asyncio.Future[None]:
        self._held.difference_update([each.delivery for each in settlements if each.action is not Action.KEEP])
        plain = [each for each in settlements if each.is_plain]
        groups = [[each] for each in settlements if not each.is_plain]
        if plain:
            groups.append(plain)
        attempt = self._attempt(self._commit, groups, durable)
        settling = self._loop.create_task(self._insist(groups, attempt))
        self._pending.add(settling)
        settling.add_done_callback(self._pending.discard)
        return settling

    def _attempt(
        self, commit: GroupCommit, groups: Sequence[Sequence[Settlement]], durable: bool = False
    ) -> asyncio.Future[list[Any]]:
        settle, now = functools.partial(commit.file.store.settle, self._queue), time.time()
        return commit.submit(*[functools.partial(settle, group, now) for group in groups], durable=durable)

    async def _insist(self, groups: Sequence[Sequence[Settlement]], attempt: asyncio.Future[list[Any]]) -> None:
        """See to what failed: one by one, to find a lost lock; rejected, if its messages are to blame; or again.

        Again for as long as the lock lasts, or, where the message is gone already, until the receiver is closed.
        """
        latest = self._loop.time() + self._lock_duration / 2
        while True:
            try:
                results = await asyncio.shield(attempt)
            except ServiceBusUnavailable as unsynced:  # it was done all the same
                for settlement in itertools.chain(*groups):
                    settlement.error = unsynced
                return
            failed = [
                (group, error) for group, error in zip(groups, results, strict=True) if isinstance(error, Exception)
            ]
            for group, error in failed:
                for settlement in group:
                    settlement.error = error
            groups = [[settlement] for group, error in failed for settlement in self._again(group, error, latest)]
            if not groups or self._closed.is_set():
                return
            if any(_may_pass(error) for _, error in failed):
                logger.warning("Settling failed, will try again: %s", failed[0][1])
                await asyncio.sleep(RETRY_PAUSE)
            for [settlement] in groups:
                settlement.error = None
            try:
                attempt = self._attempt(await self._present_commit(), groups)
            except BoilermakerError as error:
                attempt = self._loop.create_future()
                attempt.set_result([error] * len(groups))

    def _again(self, group: Sequence[Settlement], error: Exception, latest: float) -> list[Settlement]:
        """What is to be tried in place of what failed."""
        if isinstance(error, MessageLockLost) or (len(group) > 1 and not _may_pass(error)):
            return list(group)  # each by itself
        if isinstance(error, UsageError) and not isinstance(error, ConfigurationError):
            return []  # the bus was closed
        if not _may_pass(error):
            instead = [rejected(settlement, error, self._queue) for settlement in group if settlement.messages]
            self._held.update(settlement.delivery for settlement in instead if settlement.action is Action.KEEP)
            return instead
        late = self._loop.time() >= latest
        return [settlement for settlement in group if not late or settlement.action is Action.LEAVE]

    # -- renewing

    def _keep_locks(self) -> None:
        """Renew in a thread, so that a task which blocks the event loop keeps its lock; soon again if that failed."""
        pause = self._lock_duration / 2
        while not self._closed.wait(pause) and not self._loop.is_closed():
            try:
                lost = self._renew(list(self._held))
                pause = self._lock_duration / 2
            except Exception as error:
                logger.warning("Renewing the locks of %s failed, will try again: %s", self._queue, error)
                pause = self._lock_duration / 10
                continue
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                for delivery in lost:
                    self._loop.call_soon_threadsafe(self._lose, delivery)

    def _renew(self, held: Sequence[Delivery]) -> list[Delivery]:
        """Renew locks; those that are lost, or were renewed for long enough."""
        if not held:
            return []
        lost, latest = [], time.monotonic() - self._max_renewal
        file = self._commit.file
        store = file.store if file.store.state is not FileState.GONE else self._bus.open().store
        with _explained(store.path), store.transaction():
            now = time.time()
            for delivery in held:
                if delivery.received < latest or not store.renew(delivery, self._lock_duration, now):
                    lost.append(delivery)
                else:
                    delivery.locked_until = now + self._lock_duration
        return lost

    def _lose(self, delivery: Delivery) -> None:
        if delivery in self._held:
            self._held.remove(delivery)
            self._on_lock_lost(delivery)

    async def close(self) -> None:
        self._closed.set()
        try:
            while self._pending:  # what is being given back
                await asyncio.wait(self._pending)
        finally:
            await asyncio.to_thread(self._renewer.join)
            self._changes.close()


# ======================================================================================================================
# 9. Azure bus: the same protocol over azure-servicebus
# ======================================================================================================================

# The SDK's senders and receivers ask for some care, see each class. It is told not to try anything again: a sender of
# ours does, for a few seconds, and a receiver for as long as it takes. What is wrong with the settings shows at once.

AZURE_PACKAGES = "azure-servicebus azure-identity"
OLDEST_SDK = (7, 15)
"""From this release on a settlement waits for the service's answer; earlier ones could succeed without effect."""

SOCKET_TIMEOUT = 0.02
"""Seconds for which a coroutine that reads keeps others from settling on the same receiver; the SDK's own is 0.2."""

BATCH_WAIT = 0.02
"""Seconds to wait for the rest of a batch: the SDK's own wait, 0.2, would hold back a lone message for so long."""

PATIENT_BATCH_WAIT = 0.5
"""The same where many are to come, and nobody waits for the first."""

MOST_LONELY = 15
"""Messages that are received one by one, at most, before the next look for many: each costs a round trip."""

ATTEMPT_TIMEOUT = 15
"""Seconds for one attempt to send, to settle, to renew or to open a link."""

CALL_TIMEOUT = 40
"""Seconds after which a call of the SDK is given up: some wait without end for a connection that passes nothing on."""

SEND_PAUSES = (0.25, 1.0, 4.0)
"""Seconds, at most, between attempts to send."""

SEND_PATIENCE = 18
"""Seconds after which a publisher is told that it did not work, whatever the attempts are waiting for."""

RESEND_PAUSE = 1.0
"""Seconds between two attempts to publish what follows a message that is gone already."""

SHORTEST_LOCK, LONGEST_LOCK = 5, 300
"""Seconds that a lock lasts at least and at most: https://learn.microsoft.com/rest/api/servicebus/queues."""

JUST_ENQUEUED = 0.5
"""Seconds by which a message may seem old and yet count as just enqueued."""

CLOCK_TOLERANCE = 0.1
"""Seconds by which a message may seem to come from the future, with clocks that agree."""

START_PATIENCE = 2
"""Seconds for which a worker that starts tries to connect."""

FRESH_LINK = 5
"""Seconds for which a refusal is taken for one of the settings; on an older link, for the end of its token."""

SILENCE = 30
"""Seconds without a word from the service after which it is asked for one: a connection has no time-out of its own."""

EMPTY_WAIT = 1.0
"""Seconds without a message after which a queue counts as empty, where nobody wants to wait for one."""

SETTLE_WAIT = 0.2
"""Seconds for which a receive gives way to settlements."""

CLOSE_TIMEOUT = 5
"""Seconds for closing a link that may be dead already."""

MAX_BACKOFF = 30
"""Seconds between two attempts to reconnect, at most."""

MAX_REQUESTS = 5_000
"""Requests to the management node on one link before it is replaced: the SDK has 10,000 credits for the answers."""

RENEWED_AT_ONCE = 250
"""Locks that one request renews."""

PEEKED_AT_ONCE = 250
"""Messages that one request peeks at: the service gives no more."""

COUNTED = 1_000
"""Messages of a queue that are peeked at to count them."""

ADMINISTRATION_TIMEOUT = 3
"""Seconds for an answer of the service's HTTP side, which a firewall may keep for itself."""

ADMINISTRATION_PAUSE = 300
"""Seconds for which it is not asked again, after it was not to be had."""

TAKEN_AT_ONCE = 250
"""Messages that an operation on many settles at once, or cancels by one request."""

MAX_HELD = 2_000
"""Messages that an operation holds which do not concern it, before it stops."""

OPERATION_PATIENCE = 60
"""Seconds without an answer after which an operation stops."""

REPLIES_AHEAD = 100
"""Replies that the service sends before they are asked for, so that many cost one round trip and not one each."""

REPLY_SOCKET_TIMEOUT = 0.1
"""As SOCKET_TIMEOUT, for replies: who reads keeps nobody from settling there, so that it wakes less often."""

PUBLISHED_KEPT = 100_000
"""Tasks that a process can still ask for by their ids alone."""

LONGEST_TIME_TO_LIVE = 2**32 // 1000 - 1
"""Seconds, about 49 days: AMQP has 32 bits for the milliseconds."""

TRACEBACK_PROPERTY = "DeadLetterTraceback"
"""The application property of a dead letter that has the end of the traceback."""

JOINED_SESSIONS = 4
"""Groups that one worker joins at a time."""

JOINED_AT_ONCE = 100
"""How many members' endings are noted together."""

ACCEPT_WAIT, MORE_WAIT = 30, 2
"""Seconds for which one request waits for a group that has something to be joined; while there are some, for more."""

JOIN_WAIT = 0.2
"""Seconds without a message after which a worker leaves a group."""

JOIN_REST = 1.0
"""Seconds without a group to be joined, after which a worker that ends when all is done takes it for done."""

WITH_SESSIONS = "--enable-session true"
"""What `az servicebus queue create` makes a queue with, through which results and groups go."""

AZURE_REASONS = ("MaxDeliveryCountExceeded", "TTLExpiredException")
"""Why Azure itself dead-letters a message, of which no worker knows."""

DEAD_LETTER_PROPERTIES = ("DeadLetterReason", "DeadLetterErrorDescription", TRACEBACK_PROPERTY)
"""Application properties that a message has for being dead; those of another kind travel on when it is replayed."""


class Throttled(ServiceBusUnavailable):
    """The service asks to slow down; the link is fine."""


class SessionLost(ServiceBusUnavailable):
    """The lock of a link's session ran out, or somebody took it: the link is of no use."""


def _default_credential(include_msi: bool) -> Any:
    """The synchronous credential: the asynchronous one needs aiohttp, which azure-identity does not install."""
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError as error:
        raise ConfigurationError(f"Azure needs more packages: pip install {AZURE_PACKAGES} ({error}).") from error
    return DefaultAzureCredential(exclude_managed_identity_credential=not include_msi)


@dataclass(kw_only=True)
class Config:
    """Where the Azure queue is, and who asks; what is not given comes from the environment.

    Args:
        service_bus_namespace_url: the namespace, as a host name or a URL; from SERVICE_BUS_NAMESPACE_URL or
            SERVICEBUS_FULLY_QUALIFIED_NAMESPACE.
        service_bus_queue_name: the queue; from SERVICE_BUS_QUEUE_NAME or SERVICEBUS_QUEUE_NAME, or the connection
            string's EntityPath.
        service_bus_connection_string: instead of namespace and credential; from SERVICEBUS_CONNECTION_STRING.
        service_bus_credential: a credential of azure-identity or azure-core, or a function that makes one.
        azure_credential_include_msi: let the default credential try managed identity, which outside of Azure waits
            for an address that never answers; from AZURE_CREDENTIAL_INCLUDE_MSI.
        service_bus_reply_queue_name: see AzureServiceBus; from SERVICE_BUS_REPLY_QUEUE_NAME.
        service_bus_join_queue_name: the same; from SERVICE_BUS_JOIN_QUEUE_NAME.

    Raises:
        ConfigurationError: names what is missing or cannot be read.
    """

    service_bus_namespace_url: str | None = None
    service_bus_queue_name: str | None = None
    service_bus_connection_string: str | None = field(default=None, repr=False)
    service_bus_credential: Any = field(default=None, repr=False)
    azure_credential_include_msi: bool | None = None
    service_bus_reply_queue_name: str | None = None
    service_bus_join_queue_name: str | None = None

    def __post_init__(self) -> None:
        if not self.service_bus_namespace_url and not self.service_bus_connection_string:
            self.service_bus_connection_string = _env("SERVICEBUS_CONNECTION_STRING")
        self.service_bus_namespace_url = self.service_bus_namespace_url or _env(
            "SERVICE_BUS_NAMESPACE_URL", "SERVICEBUS_FULLY_QUALIFIED_NAMESPACE"
        )
        self.service_bus_queue_name = (
            self.service_bus_queue_name
            or _env("SERVICE_BUS_QUEUE_NAME", "SERVICEBUS_QUEUE_NAME")
            or _connection_setting(self.service_bus_connection_string or "", "EntityPath")
        )
        if self.azure_credential_include_msi is None:
            self.azure_credential_include_msi = _env_flag("AZURE_CREDENTIAL_INCLUDE_MSI")
        self.service_bus_reply_queue_name = self.service_bus_reply_queue_name or _env("SERVICE_BUS_REPLY_QUEUE_NAME")
        self.service_bus_join_queue_name = self.service_bus_join_queue_name or _env("SERVICE_BUS_JOIN_QUEUE_NAME")
        self._check()

    def _check(self) -> None:
        if not self.service_bus_namespace_url and not self.service_bus_connection_string:
            raise ConfigurationError(
                "The Service Bus namespace is missing: pass service_bus_namespace_url, or set "
                "SERVICE_BUS_NAMESPACE_URL, SERVICEBUS_FULLY_QUALIFIED_NAMESPACE or SERVICEBUS_CONNECTION_STRING."
            )
        if not self.service_bus_queue_name:
            raise ConfigurationError(
                "The queue is missing: pass service_bus_queue_name, "
                "set SERVICE_BUS_QUEUE_NAME or SERVICEBUS_QUEUE_NAME, or use a connection string with an EntityPath."
            )
        if self.service_bus_namespace_url:
            _namespace_of(self.service_bus_namespace_url)

    def az_credential(self) -> Any:
        """The credential that was given, or azure-identity's default one."""
        if self.service_bus_credential is None:
            return _default_credential(bool(self.azure_credential_include_msi))
        return _made_credential(self.service_bus_credential)


def _made_credential(credential: Any) -> Any:
    """A credential, made by calling what was given if that is a function or a class."""
    makes_one = isinstance(credential, type) or (callable(credential) and not hasattr(credential, "get_token"))
    return credential() if makes_one else credential


def _env(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _env_flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise ConfigurationError(f"{name}={value!r} must be true or false.")
    return value in ("1", "true", "yes", "on")


def _connection_setting(connection_string: str, name: str) -> str | None:
    """One setting of a connection string."""
    pairs = [part.split("=", 1) for part in connection_string.split(";") if "=" in part]
    return next((value.strip() for key, value in pairs if key.strip().lower() == name.lower()), None)


def _namespace_of(url: object) -> str:
    """The host of a namespace, given as `host`, `sb://host` or `https://host:443/`."""
    text = url.strip() if isinstance(url, str) else ""
    if ";" in text or "=" in text:  # secrets, not to be shown
        raise ConfigurationError(
            "The namespace is a connection string: use AzureServiceBus.from_connection_string, "
            "or Config(service_bus_connection_string=...)."
        )
    match = re.fullmatch(r"(?:[a-z]+://)?([a-z0-9][\w.-]*|\[[0-9a-f:.]+\])(?::\d+)?/*", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ConfigurationError(
            f"namespace {url!r} must be a host such as 'example.servicebus.windows.net', or its URL."
        )
    return match[1]


class AzureServiceBus:
    """A queue of Azure Service Bus.

    The queue is made outside of this module, without sessions. Its lock duration, maximum delivery count, time to live
    and duplicate detection are those it was made with; with duplicate detection, no follow-up is enqueued twice.

    Args:
        namespace_url: `example.servicebus.windows.net`, or its URL.
        queue_name: the queue.
        credential: of azure-identity or azure-core, synchronous or not, or a function that makes one;
            `DefaultAzureCredential` without managed identity if None.
        max_message_bytes: the size limit of a message: 262,144 on Standard, up to 100 MB on Premium.
        duplicate_detection: the window, in seconds, that the queue was made with; 0 for none.
        max_delivery_count: how often the queue delivers a message before it dead-letters it.
        reply_queue_name: the queue with sessions through which results are told; `<queue_name>-replies` if None.
        join_queue_name: the queue with sessions and duplicate detection through which groups are joined,
            `<queue_name>-join` if None. A worker that is given one joins groups from its start on; else as
            soon as its process publishes a group or runs a member of one.
        client_options: for the SDK's `ServiceBusClient`: `transport_type`, `http_proxy`, `custom_endpoint_address`,
            `connection_verify` and others.

    Raises:
        ConfigurationError: an argument is wrong, or a package is missing.
    """

    system = "servicebus"
    takes_group_ids = False

    OWN_OPTIONS = (
        "retry_total",
        "retry_mode",
        "retry_backoff_factor",
        "retry_backoff_max",
        "try_timeout",
        "uamqp_transport",
    )
    """Options of the SDK's client that this module sets, or has no use for: it tries again by itself."""

    def __init__(
        self,
        namespace_url: str,
        queue_name: str,
        credential: Any = None,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        duplicate_detection: float = 600,
        max_delivery_count: int = 10,
        reply_queue_name: str | None = None,
        join_queue_name: str | None = None,
        **client_options: Any,
    ) -> None:
        self.namespace = _namespace_of(namespace_url)
        self.queue_name = _checked_queue_name(queue_name)
        home = self.queue_name.removesuffix(DEAD_LETTER_SUFFIX)
        self.reply_queue = f"{home}-replies" if reply_queue_name is None else _checked_queue_name(reply_queue_name)
        self.join_queue = f"{home}-join" if join_queue_name is None else _checked_queue_name(join_queue_name)
        if len({home, self.reply_queue, self.join_queue}) < 3:
            raise ConfigurationError(
                f"queue_name={home!r}, reply_queue_name={self.reply_queue!r} and join_queue_name={self.join_queue!r} "
                "must be three queues: who takes what comes next from one would take what is another's."
            )
        self.joins = join_queue_name is not None
        """Whether workers of this process join groups: from the start on, or since it has to do with one."""
        self.max_message_bytes = _count("max_message_bytes", max_message_bytes)
        self.duplicate_detection = self.id_window = _positive("duplicate_detection", duplicate_detection, or_zero=True)
        self.max_delivery_count: int | None = _count("max_delivery_count", max_delivery_count)
        self.entity_path: str | None = None
        self._credential = credential
        self._connection_string: str | None = None
        self._client_options = client_options
        self._opened: dict[tuple[int, asyncio.AbstractEventLoop], _Opened] = {}
        self._outcomes: dict[tuple[int, asyncio.AbstractEventLoop], AzureOutcomes] = {}

        # The SDK's client takes any option, and says nothing of one that it does not know; its documentation does.
        known = re.findall(r":keyword [^:]*?(\w+):", _import_azure().aio.ServiceBusClient.__doc__ or "")
        for name in client_options:
            if name in self.OWN_OPTIONS or (known and name not in known):
                names = ", ".join(option for option in known if option not in self.OWN_OPTIONS)
                raise ConfigurationError(f"AzureServiceBus takes no option {name}=; the SDK's client takes {names}.")

    @classmethod
    def from_config(
        cls,
        config: Config,
        **options: Any,
    ) -> AzureServiceBus:
        """The bus of a `Config`: by its connection string where it has one, else by namespace and credential.

        Args:
            options: those of the constructor, by keyword.
        """
        options = {
            "reply_queue_name": config.service_bus_reply_queue_name,
            "join_queue_name": config.service_bus_join_queue_name,
            **options,
        }
        queue = config.service_bus_queue_name or ""
        if config.service_bus_connection_string:
            return cls.from_connection_string(config.service_bus_connection_string, queue, **options)
        return cls(config.service_bus_namespace_url or "", queue, config.az_credential, **options)

    @classmethod
    def from_connection_string(
        cls,
        conn_str: str,
        queue_name: str,
        **options: Any,
    ) -> AzureServiceBus:
        """The bus of a connection string, as the Azure portal shows it under "Shared access policies".

        One with an `EntityPath` is for that queue and its dead-letter queue only.

        Args:
            options: those of the constructor, by keyword.
        """
        text = conn_str.strip() if isinstance(conn_str, str) else ""
        endpoint = _connection_setting(text, "Endpoint") or _connection_setting(text, "HostName")
        if not endpoint:
            raise ConfigurationError("The connection string has no Endpoint: it begins with 'Endpoint=sb://...'.")
        bus = cls(endpoint, queue_name, **options)
        bus.entity_path = _connection_setting(text, "EntityPath") or None
        if bus.entity_path not in (None, queue_name.removesuffix(DEAD_LETTER_SUFFIX)):
            raise ConfigurationError(
                f"The connection string is for queue {bus.entity_path!r} only (EntityPath), not for {queue_name!r}: "
                "use that queue, or a connection string of the namespace."
            )
        if "://" not in endpoint:  # the SDK wants one
            text = f"{text.rstrip(';')};Endpoint=sb://{endpoint}"
        bus._connection_string = text
        return bus

    def __repr__(self) -> str:
        return f"AzureServiceBus({self.namespace!r}, {self.queue_name!r})"

    def check_queue(self, queue: str) -> None:
        """Refuse a queue that this bus has no access to: its connection string is for another (EntityPath)."""
        if self.entity_path not in (None, queue.removesuffix(DEAD_LETTER_SUFFIX)):
            raise UsageError(
                f"{self!r} cannot send to queue {queue!r}: its connection string is for {self.entity_path!r} only "
                "(EntityPath). Use a connection string of the namespace."
            )

    def _of_this_loop(self) -> _Opened:
        """What can neither be shared by event loops, nor across a fork."""
        here = os.getpid(), asyncio.get_running_loop()
        if here not in self._opened:
            for closed in [other for other in list(self._opened) if other[1].is_closed()]:
                self._opened.pop(closed, None)
            self._opened[here] = self._open()
        return self._opened[here]

    def _open(self) -> _Opened:
        make = _import_azure().aio.ServiceBusClient
        options = {"retry_total": 0, "try_timeout": ATTEMPT_TIMEOUT, **self._client_options}
        credential = None
        if self._connection_string is None:
            credential = self._credential
            credential = _default_credential(include_msi=False) if credential is None else _made_credential(credential)
            if hasattr(credential, "get_token") and not inspect.iscoroutinefunction(credential.get_token):
                credential = ThreadedCredential(credential)
            make, where = functools.partial(make, credential=credential), self.namespace
        else:
            make, where = make.from_connection_string, self._connection_string
        try:
            client: ServiceBusClient = make(where, **options)
        except (AttributeError, TypeError, ValueError) as error:
            given = "its options" if self._connection_string is None else "its connection string, or its options,"
            raise ConfigurationError(f"{self!r}: {given} cannot be read: {error}") from None
        administration = AzureAdministration(self.namespace, self._connection_string, credential, self._client_options)
        return _Opened(client, {}, administration, set())

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        by_queue: dict[str, list[int]] = collections.defaultdict(list)
        for place in sorted(range(len(messages)), key=lambda place: messages[place].session is None):
            by_queue[messages[place].queue].append(place)  # what opens groups before their members
        numbers: list[int | None] = [None] * len(messages)
        for queue, places in by_queue.items():
            senders = self._of_this_loop().senders
            if queue not in senders:
                senders[queue] = AzureSender(self, queue)
            sent = await senders[queue].send([messages[place] for place in places])
            for place, number in zip(places, sent, strict=True):
                numbers[place] = number
        return numbers

    # -- outcomes are told by request and response: each event loop that publishes has a session in the reply queue

    def _outcomes_of_this_loop(self) -> AzureOutcomes:
        """They outlive `close`: who opens the bus again may ask for what was published before."""
        here = os.getpid(), asyncio.get_running_loop()
        if here not in self._outcomes:
            for closed in [other for other in list(self._outcomes) if other[1].is_closed()]:
                self._outcomes.pop(closed, None)
            self._outcomes[here] = AzureOutcomes(self)
        return self._outcomes[here]

    def address(self, task_id: str, ttl: float) -> Address:
        outcomes = self._outcomes_of_this_loop()
        outcomes.remember(task_id)
        return Address(task_id, ttl, queue=self.reply_queue, session=outcomes.session)

    def address_of(self, task_id: str) -> Address:
        """Only the process and event loop that published a task is told its outcome."""
        return self._outcomes_of_this_loop().address_of(task_id)

    async def expect(self, heads: Sequence[Task]) -> None:
        workflows = [head for head in heads if head.group or head.on_success or head.on_failure]
        if any(task.group is not None for head in workflows for task in _workflow(head)):
            await self.check_join_queue()
        if awaited := [head.outcome_to for head in heads if head.outcome_to is not None]:
            await self._outcomes_of_this_loop().expect(awaited)

    def reply(self, answer: Answer) -> Outgoing | None:
        """The message to who awaits an outcome, or to the group of a member; None for one of a local bus."""
        to = answer.to
        if to.queue is None:
            return None
        document = f'{{"failed":{_to_json(answer.failed)},"value":{answer.value}'
        if to.position is None:
            ttl = min(math.ceil(to.ttl), LONGEST_TIME_TO_LIVE)  # the SDK takes whole seconds, and 0.5 for 0
            message = Outgoing(
                document + "}",
                answer.message_id,
                to.queue,
                session=to.session,
                correlation_id=to.id,
                time_to_live=ttl,
            )
        else:
            document += f',"position":{to.position}}}'  # what GroupState reads
            message_id = f"{to.id}:{to.position}"
            if len(message_id) > MAX_MESSAGE_ID_LENGTH:  # of a tick whose schedule has a long name
                message_id = derived_id(message_id)
            message = Outgoing(document, message_id, to.queue, session=to.id)
        if (size := self.size(message)) > self.max_message_bytes:
            raise MessageTooLarge(f"it makes an outcome of {size} bytes, the limit is {self.max_message_bytes}")
        return message

    async def publish(self, messages: Sequence[Outgoing]) -> None:
        """Send messages, at last the outcomes among them, whoever awaits them.

        Where one of these can never be told, as the queue is gone, that is no reason to do anything again.
        """
        if others := [message for message in messages if message.correlation_id is None]:
            await self.send(others)
        for outcome in (message for message in messages if message.correlation_id is not None):
            try:
                await self.send([outcome])
            except (ConfigurationError, RequestRefused) as error:
                logger.error("Outcome cannot be told task_id=%s: %s", outcome.correlation_id, error)

    def end_of(self, message: Message, why: str) -> list[Outgoing]:
        """What is told of a message that is removed: whoever awaits its outcome would wait for nothing."""
        queue = message.queue_name.removesuffix(DEAD_LETTER_SUFFIX)
        body = message.body if message.raw_body is None else message.raw_body
        answer = ended_by(body, queue, why, "The message was removed.")
        if answer is None:
            return []
        message_id = f"{root_of(message, queue)}:{why}"
        reply = self.reply(answer._replace(message_id=message_id))
        return [] if reply is None else [reply]

    async def outcome(self, address: Address, timeout: float | None) -> Answer:
        return await self._outcomes_of_this_loop().get(address, timeout)

    def member_address(self, group_id: str, position: int) -> Address:
        return Address(group_id, position=position, queue=self.join_queue)

    def open_group(self, message: Outgoing) -> list[Outgoing]:
        """What defines the group, and its timer: messages of a session of its own in the join queue.

        Of an empty one it is what follows it: no member would make a worker look into that queue.
        """
        home = self.queue_name.removesuffix(DEAD_LETTER_SUFFIX)
        group_id, settings = message.message_id, decode(message.body, home).group
        assert settings is not None
        if not settings.total:
            ending = ending_of(self, home, message.body, {})
            return [each._replace(due=message.due) for each in ending.messages]
        end = (message.due or time.time()) + settings.timeout
        opening, timer = (derived_id(f"{part}\n{group_id}") for part in ("opening", "timer"))
        head = message._replace(message_id=opening, queue=self.join_queue, due=None, session=group_id)
        return [head, head._replace(message_id=timer, body=GROUP_TIMER, due=end, numbered=False)]

    async def progress(self, group_id: str) -> Progress:
        raise UsageError(f"{self!r} does not tell how far a group is: only a local bus does.")

    def size(self, message: Outgoing) -> int:
        """The body, the ids and properties, and 512 bytes for what AMQP adds to them."""
        properties = sum(len(key) + len(value) for key, value in message.application_properties.items())
        ids = len(message.message_id) + len(message.session or "") + len(message.correlation_id or "")
        return len(message.body) + ids + properties + 512

    async def open_receiver(
        self, on_lock_lost: Callable[[Delivery], None], max_renewal: float, suspect_from: int = MAX_SECONDS
    ) -> AzureReceiver:
        receiver = AzureReceiver(self, on_lock_lost, max_renewal)
        if self.joins:
            await self.check_join_queue()
        await receiver.open()
        return receiver

    def has_join_queue(self) -> bool:
        """Whether it has been found in this event loop."""
        return self.join_queue in self._of_this_loop().checked_queues

    async def check_join_queue(self) -> None:
        """Raise ConfigurationError unless there is a queue with sessions, through which groups are joined."""
        if not self.has_join_queue():
            try:
                async with self.session_link(self.join_queue, str(uuid.uuid4()), ATTEMPT_TIMEOUT):
                    self._of_this_loop().checked_queues.add(self.join_queue)
                    self.joins = True
            except ConfigurationError as error:
                options = f"{WITH_SESSIONS} --enable-duplicate-detection true"
                raise self.without_a_queue(self.join_queue, "Groups", options, error) from error

    def receiver_link(self, queue: str | None = None) -> AzureLink:
        queue = queue or self.queue_name
        options: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT, "timeout": ATTEMPT_TIMEOUT}
        if queue.endswith(DEAD_LETTER_SUFFIX):  # by its own name, a connection string for the queue would not do
            options["sub_queue"] = "deadletter"
        client = self._of_this_loop().client
        return AzureLink(self, queue, client.get_queue_receiver(queue.removesuffix(DEAD_LETTER_SUFFIX), **options))

    def session_link(self, queue: str, session: str | None, wait: float, **options: Any) -> AzureLink:
        """A receiver of one session of a queue.

        Args:
            session: its id; None for the next that has messages and that nobody holds, which opening waits for.
            wait: seconds to wait for it.
            options: of the SDK's receiver.
        """
        sdk = _import_azure()
        options = {"socket_timeout": SOCKET_TIMEOUT, "timeout": ATTEMPT_TIMEOUT, "max_wait_time": wait, **options}
        options["session_id"] = sdk.NEXT_AVAILABLE_SESSION if session is None else session
        hint = f"The queue has to be made {WITH_SESSIONS}."
        return AzureLink(self, queue, self._of_this_loop().client.get_queue_receiver(queue, **options), hint)

    def without_a_queue(self, queue: str, what: str, options: str, error: BoilermakerError) -> ConfigurationError:
        """The error of a queue that has to be made for what one asks."""
        return ConfigurationError(
            f"{what} of {self.queue_name!r} need the queue {queue!r}: az servicebus queue create --namespace-name "
            f"{self.namespace.partition('.')[0]} --resource-group ... --name {queue} {options} ({error})"
        )

    def sender_link(self, queue: str) -> AzureLink:
        client = self._of_this_loop().client
        return AzureLink(self, queue, client.get_queue_sender(queue, socket_timeout=SOCKET_TIMEOUT))

    # -- for operators

    async def counts(self) -> Counts:
        """How many messages there are, by state: exact where this identity may manage the queue.

        Else as many as peeking at up to 1,000 messages of the queue, and of its dead-letter queue, shows. What a worker
        holds counts as active.
        """
        queue = self.queue_name.removesuffix(DEAD_LETTER_SUFFIX)
        counts = await self._of_this_loop().administration.counts(queue)
        if counts is None:
            waiting, dead_letters = await self._peek_at_some()
            return _counted(waiting + dead_letters, exact=False)
        if queue != self.queue_name:
            return dataclasses.replace(counts, active=0, scheduled=0)
        return dataclasses.replace(counts, oldest=await self._oldest()) if counts.active else counts

    async def counts_by_task(self) -> dict[str, TaskCounts]:
        """The same by the tasks' function names, as peeking shows it; exact where there are no more messages than that.

        The last dead letter of a task is that with the highest sequence number.
        """
        waiting, dead_letters = await self._peek_at_some()
        exact = max(len(waiting), len(dead_letters)) < COUNTED
        by_task: dict[str, list[Message]] = collections.defaultdict(list)
        for message in waiting + dead_letters:
            by_task[message.task.function_name if message.task is not None else ""].append(message)
        counts: dict[str, TaskCounts] = {}
        for name, messages in by_task.items():
            last_error = messages[-1].dead_letter_error_description
            counts[name] = TaskCounts(**dataclasses.asdict(_counted(messages, exact)), last_error=last_error)
        return counts

    async def _peek_at_some(self) -> tuple[list[Message], list[Message]]:
        """Messages of the queue, and dead letters."""
        dead_letters = self.peek(COUNTED, dead_letter=True)
        if self.queue_name.endswith(DEAD_LETTER_SUFFIX):
            return [], await dead_letters
        waiting, dead = await asyncio.gather(self.peek(COUNTED), dead_letters)
        return waiting, dead

    async def _oldest(self) -> float | None:
        """The age of the first message that is due, if there is one among the first thousand."""
        async with AzureBrowser(self, self.queue_name) as browser:
            async for page in browser.pages(count=COUNTED):
                if (oldest := _counted(page, exact=True).oldest) is not None:
                    return oldest
        return None

    async def peek(
        self, max_message_count: int = 100, dead_letter: bool = False, sequence_number: int = 0
    ) -> list[Message]:
        """List messages by sequence number, from that one on, without locking them: locked and scheduled ones too."""
        _count("max_message_count", max_message_count)
        _check_sequence_number(sequence_number)
        if sequence_number >= 2**63:
            return []
        queue = dead_letter_queue(self.queue_name) if dead_letter else self.queue_name
        async with AzureBrowser(self, queue) as browser:
            return [message async for page in browser.pages(sequence_number, max_message_count) for message in page]

    async def replay(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Run dead letters again, as `replay_of` says; those that it did, or, for `dry_run`, would do.

        Azure hands out no dead letter by its number. So it looks first, without locks; then it receives dead letters
        from the first on, up to the last that it looks for, and holds those that it does not: at most 2,000, and beyond
        that it stops. At the end these are as they were, delivery count included; but what is held when a connection
        is lost is locked until that runs out.

        A replay is published, then its dead letter deleted. After a crash in between, call it again: within the window
        of duplicate detection none is enqueued twice.

        Args:
            which: a function `Message -> bool`, or sequence numbers.
            on_progress: called in the event loop with the number of messages done so far.

        Raises:
            OperationStopped: it cannot go on for now; `messages` are those done. Called again, it goes on from there.
        """
        return await self._remove_dead_letters(which, dry_run, on_progress, lambda message: [replay_of(message)])

    async def discard(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete dead letters; else as `replay`.

        Who awaits the outcome of one that, by its reason, Azure itself has dead-lettered is told; of the others a
        worker has told.
        """

        def told(message: Message) -> list[Outgoing]:
            return self.end_of(message, DISCARDED) if message.dead_letter_reason in AZURE_REASONS else []

        return await self._remove_dead_letters(which, dry_run, on_progress, told)

    async def _remove_dead_letters(
        self,
        which: Which,
        dry_run: bool,
        on_progress: Callable[[int], object] | None,
        outgoing_of: Callable[[Message], Sequence[Outgoing]],
    ) -> list[Message]:
        queue, selection = dead_letter_queue(self.queue_name), selection_of(which)
        operation = AzureOperation(self, queue, outgoing_of, on_progress)
        found = await operation.find(selection, dry_run)
        if dry_run or not found:
            return found
        await operation.receive()
        if operation.left:
            raise operation.stopped("another receiver has the others, or had them, and they are locked for minutes")
        return operation.done

    async def purge(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete messages that wait or are scheduled; else as `replay`.

        What is scheduled is cancelled by its number. What waits is received, as dead letters are: with many that do not
        match before those that do, workers have to do without them for so long. They go back as if they had not been
        received, unless the connection is lost: then that was a delivery. What a worker holds stays.
        """
        if self.queue_name.endswith(DEAD_LETTER_SUFFIX):
            raise UsageError(f"{self!r} has dead letters only: discard() deletes these.")
        selection = selection_of(which)
        operation = AzureOperation(self, self.queue_name, lambda message: self.end_of(message, CANCELLED), on_progress)
        found = await operation.find(selection, dry_run)
        if dry_run or not found:
            return found
        while await operation.cancel():  # some were due meanwhile, and have another number now
            await operation.find(selection)
        await operation.receive()
        return operation.done

    async def cancel(self, sequence_number: int) -> None:
        """Take back a scheduled message.

        Who awaits its outcome is told, where this identity may look at the queue.

        Raises:
            MessageNotFound: none is waiting under that number; it may be due already.
        """
        _check_sequence_number(sequence_number)
        if not _is_64_bit(sequence_number) or self.queue_name.endswith(DEAD_LETTER_SUFFIX):
            raise MessageNotFound(f"{self!r} has no scheduled message with sequence number {sequence_number}.")

        async def look() -> list[Message]:
            with contextlib.suppress(BoilermakerError):
                return await self.peek(1, sequence_number=sequence_number)
            return []

        looking = asyncio.ensure_future(look())  # while the other link is opened
        try:
            async with self.sender_link(self.queue_name) as link:
                found = await looking
                await link.request(link.sdk.cancel_scheduled_messages, sequence_number, timeout=ATTEMPT_TIMEOUT)
        finally:
            looking.cancel()
        for message in found:
            if message.sequence_number == sequence_number:
                await self.publish(self.end_of(message, CANCELLED))

    async def close(self) -> None:
        """Close all connections of this event loop. The bus opens new ones if it is used again."""
        here = os.getpid(), asyncio.get_running_loop()
        opened, outcomes = self._opened.pop(here, None), self._outcomes.get(here)

        async def close_all() -> None:
            if outcomes is not None:
                await outcomes.close()
            if opened is not None:
                await asyncio.gather(*[sender.close() for sender in opened.senders.values()])
                await opened.client.close()
                opened.administration.close()

        await asyncio.shield(asyncio.ensure_future(close_all()))

    @contextlib.contextmanager
    def explained(self, queue: str) -> Iterator[None]:
        """The SDK's errors as ours, naming the queue and the way out."""
        try:
            yield
        except BoilermakerError:
            raise
        except Exception as error:
            raise _azure_error(error, f"queue {queue!r} of {self.namespace}") from error


class _Opened(NamedTuple):
    """What belongs to one event loop."""

    client: ServiceBusClient
    senders: dict[str, AzureSender]
    administration: AzureAdministration
    checked_queues: set[str]


def _import_azure() -> Any:
    try:
        import azure.servicebus.aio
    except ImportError as error:
        raise ConfigurationError(f"Azure needs more packages: pip install {AZURE_PACKAGES} ({error}).") from error
    version = azure.servicebus.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_SDK:
        raise ConfigurationError(f"azure-servicebus {version} is too old: pip install 'azure-servicebus>=7.15'.")
    return azure.servicebus


class ThreadedCredential:
    """A synchronous credential, asked for tokens in a thread."""

    def __init__(self, credential: Any) -> None:
        self.synchronous = credential

    async def get_token(self, *scopes: str, **options: Any) -> Any:
        return await asyncio.to_thread(self.synchronous.get_token, *scopes, **options)

    async def close(self) -> None:
        await asyncio.to_thread(getattr(self.synchronous, "close", lambda: None))

    async def __aenter__(self) -> ThreadedCredential:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


class BlockingCredential:
    """An asynchronous credential, asked for tokens by a thread."""

    def __init__(self, credential: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._credential = credential
        self._loop = loop

    def get_token(self, *scopes: str, **options: Any) -> Any:
        asking = asyncio.run_coroutine_threadsafe(self._credential.get_token(*scopes, **options), self._loop)
        return asking.result(ADMINISTRATION_TIMEOUT)


class AzureAdministration:
    """The service's HTTP side, which tells of a queue what AMQP does not, to an identity that may manage it.

    It is asked in a thread, and by the way: whatever it does not answer in time it does not tell, and is left alone for
    some minutes.
    """

    def __init__(
        self, namespace: str, connection_string: str | None, credential: Any, client_options: Mapping[str, Any]
    ) -> None:
        self._namespace = namespace
        self._connection_string = connection_string
        self._credential = credential
        self._options = client_options
        self._client: Any = None
        self._turn = threading.Lock()
        self._ask_from = -math.inf
        if client_options.get("custom_endpoint_address") or (
            connection_string and _connection_setting(connection_string, "UseDevelopmentEmulator") == "true"
        ):
            self._ask_from = math.inf  # there is none

    async def counts(self, queue: str) -> Counts | None:
        """How many messages a queue has, and its dead-letter queue; None where that is not to be had."""
        if time.monotonic() < self._ask_from:
            return None
        try:
            async with asyncio.timeout(ADMINISTRATION_TIMEOUT):
                return await asyncio.to_thread(self._ask, queue, asyncio.get_running_loop())
        except Exception as error:
            self._ask_from = time.monotonic() + ADMINISTRATION_PAUSE
            logger.info("Exact counts of queue %r are not to be had: %s: %s", queue, type(error).__name__, error)
            return None

    def _ask(self, queue: str, loop: asyncio.AbstractEventLoop) -> Counts:
        with self._turn:
            if self._client is None:
                self._client = self._make_client(loop)
            told = self._client.get_queue_runtime_properties(queue)
        return Counts(
            active=int(told.active_message_count),
            running=None,
            scheduled=int(told.scheduled_message_count),
            dead_letter=int(told.dead_letter_message_count),
            oldest=None,
        )

    def _make_client(self, loop: asyncio.AbstractEventLoop) -> Any:
        from azure.servicebus.management import ServiceBusAdministrationClient

        timeout = ADMINISTRATION_TIMEOUT
        options: dict[str, Any] = {"retry_total": 0, "connection_timeout": timeout, "read_timeout": timeout}
        if "connection_verify" in self._options:
            options["connection_verify"] = self._options["connection_verify"]
        if proxy := self._options.get("http_proxy"):
            names = [urllib.parse.quote(proxy[key], "") for key in ("username", "password") if proxy.get(key)]
            user = f"{':'.join(names)}@" if names else ""
            options["proxies"] = {"https": f"http://{user}{proxy['proxy_hostname']}:{proxy['proxy_port']}"}
        if self._connection_string is not None:
            return ServiceBusAdministrationClient.from_connection_string(self._connection_string, **options)
        credential = self._credential
        if isinstance(credential, ThreadedCredential):
            credential = credential.synchronous
        elif inspect.iscoroutinefunction(getattr(credential, "get_token", None)):
            credential = BlockingCredential(credential, loop)
        return ServiceBusAdministrationClient(self._namespace, credential, **options)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


_NETWORK = "check the namespace's name, and that port 5671 (AMQP) is open; transport_type=AmqpOverWebsocket uses 443."
_ACCESS = (
    "check the key and the queue's name, or give the identity the roles "
    "'Azure Service Bus Data Sender' and 'Azure Service Bus Data Receiver'."
)
_AZURE_ERRORS: Mapping[str, tuple[type[BoilermakerError], str]] = {
    "MessageLockLostError": (MessageLockLost, "the lock ran out, or the answer to an earlier attempt was lost:"),
    "MessageAlreadySettled": (MessageLockLost, "it is settled already:"),
    "MessageNotFoundError": (MessageNotFound, "{where} has no such scheduled message:"),
    "MessageSizeExceededError": (MessageTooLarge, "{where} refused a message as too large:"),
    "MessagingEntityNotFoundError": (ConfigurationError, "There is no {where}: create it, or correct its name."),
    "ServiceBusAuthenticationError": (ConfigurationError, f"Access to {{where}} was refused: {_ACCESS}"),
    "ServiceBusAuthorizationError": (ConfigurationError, f"Access to {{where}} was refused: {_ACCESS}"),
    "ServiceBusServerBusyError": (Throttled, "{where} is throttled:"),
    "ServiceBusConnectionError": (ServiceBusUnavailable, f"{{where}} cannot be reached: {_NETWORK}"),
    "SessionCannotBeLockedError": (ServiceBusUnavailable, "Another receiver holds that session of {where}:"),
    "SessionLockLostError": (SessionLost, "{where}: the lock of the session ran out, or was taken:"),
    "OperationTimeoutError": (ServiceBusUnavailable, f"{{where}} did not answer in time: {_NETWORK}"),
    "TimeoutError": (ServiceBusUnavailable, f"{{where}} did not answer in time: {_NETWORK}"),
    "ClientAuthenticationError": (
        ConfigurationError,
        "There is no usable credential for {where}: run `az login`, or pass one.",
    ),
    "FileNotFoundError": (ConfigurationError, "{where}: an option, such as connection_verify, names no file:"),
    "ImportError": (ConfigurationError, "{where}: a package is missing, pip install aiohttp:"),
    "TypeError": (RequestRefused, "{where}: the SDK refuses it:"),
    "ValueError": (RequestRefused, "{where}: the SDK refuses it:"),
}
"""What an error of the SDK means for the caller, by its class or the nearest base."""


def _azure_error(error: Exception, where: str) -> BoilermakerError:
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, (FileNotFoundError, UnicodeError)):  # wrapped as if the link were broken
        error = inner
    kind: type[BoilermakerError] = ServiceBusUnavailable
    text = f"{{where}}: {type(error).__name__}:"
    if "amqp:not-allowed" in str(error):
        kind, text = RequestRefused, "{where} does not allow it:"
    else:
        names = (base.__name__ for base in type(error).__mro__)
        kind, text = next((_AZURE_ERRORS[name] for name in names if name in _AZURE_ERRORS), (kind, text))
    return kind(f"{text.format(where=where)} {error}")


def _message_of_sdk(queue: str, raw: ServiceBusReceivedMessage) -> Message:
    (body, raw_body), properties = text_of(_body_of(raw)), _properties_of(raw)
    scheduled = getattr(raw.state, "name", "") == "SCHEDULED"
    state = MessageState.SCHEDULED if scheduled else MessageState.ACTIVE
    return Message(
        queue_name=queue,
        body=body,
        raw_body=raw_body,
        message_id=_message_id_of(raw),
        sequence_number=raw.sequence_number or 0,
        delivery_count=raw.delivery_count or 0,
        enqueued_time_utc=raw.enqueued_time_utc,
        scheduled_enqueue_time_utc=raw.scheduled_enqueue_time_utc,
        dead_letter_reason=raw.dead_letter_reason,
        dead_letter_error_description=raw.dead_letter_error_description,
        dead_letter_traceback=properties.get(TRACEBACK_PROPERTY),
        application_properties={key: properties[key] for key in properties if key not in DEAD_LETTER_PROPERTIES},
        state=MessageState.DEAD_LETTER if queue.endswith(DEAD_LETTER_SUFFIX) else state,
    )


def _message_id_of(raw: ServiceBusReceivedMessage) -> str | None:
    """As text: AMQP has numbers, UUIDs and bytes too."""
    return None if raw.message_id is None else str(raw.message_id)


def _body_of(raw: ServiceBusReceivedMessage) -> str | bytes:
    """The bytes of a message's data sections; for other kinds of AMQP body, their text."""
    body = raw.body
    if isinstance(body, (str, bytes)):
        return body
    try:
        return b"".join(body)
    except TypeError:
        return str(raw)


def _properties_of(raw: ServiceBusReceivedMessage) -> Mapping[str, str]:
    """Application properties as text: over AMQP they arrive as bytes."""
    text = functools.partial(str, encoding="utf-8", errors="replace")
    return {
        text(key) if isinstance(key, bytes) else key: text(value) if isinstance(value, bytes) else str(value)
        for key, value in (raw.application_properties or {}).items()
    }


def _counted(messages: Sequence[Message], exact: bool) -> Counts:
    """What messages say about their number; those that are locked count as active."""
    states = collections.Counter(message.state for message in messages)
    active = [message for message in messages if message.state is MessageState.ACTIVE]
    since = [message.enqueued_time_utc.timestamp() for message in active if message.enqueued_time_utc is not None]
    return Counts(
        active=states[MessageState.ACTIVE],
        running=None,
        scheduled=states[MessageState.SCHEDULED],
        dead_letter=states[MessageState.DEAD_LETTER],
        oldest=max(time.time() - min(since), 0) if since else None,
        exact=exact,
    )


def _backoff(failures: int) -> float:
    """Seconds until the next attempt to connect: from 1/16, doubled by each failure, less up to half at random."""
    return random.uniform(0.5, 1.0) * min(2.0 ** min(failures, 10) / 16, MAX_BACKOFF)


class AzureLink:
    """A sender or receiver of the SDK that is opened once, and given up after a failure.

    By itself the SDK (7.15) opens and closes it inside of any call, which goes wrong as soon as several coroutines use
    one: each that finds the connection lost opens another, one that has little time left closes what the others use,
    and a settlement under way opens again what was closed. So here a failure only marks the link as lost, and its user
    opens another. All that is done to internals of the SDK is done in this class.
    """

    def __init__(
        self, bus: AzureServiceBus, queue: str, sdk: Any, hint: str = "Tasks have no sessions: use a queue without."
    ) -> None:
        self.sdk = sdk
        self._hint = hint
        self.error: BoilermakerError | None = None
        self.opened = self.heard = 0.0  # the latter is when the service last said something, where that is known
        self.round_trip = 0.0
        self._bus = bus
        self._queue = queue
        self._calls = 0
        self._requests = 0
        self._turn = asyncio.Lock()
        # For most errors the SDK closes all at once: a request that the service refuses would take the settlements of
        # others with it. Halfway through an opening it would also forget the socket, which stays open.
        sdk._close_handler = self._leave_open

    async def __aenter__(self) -> AzureLink:
        # In a task of its own: wait_for, by which the SDK reads, may lose a cancellation in Python 3.11.
        opening = asyncio.ensure_future(self.sdk.__aenter__())
        try:
            await asyncio.wait([opening])
            with self._bus.explained(self._queue):
                opening.result()
        except BaseException as error:
            opening.cancel()
            await asyncio.wait([opening], timeout=CLOSE_TIMEOUT)
            await self.close()
            if isinstance(error, RequestRefused):
                hint = self._hint if "session" in str(error) else ""
                raise ConfigurationError(f"A link cannot be opened: {error} {hint}") from error
            raise
        # The SDK opens again what was lost, in the middle of any call; and what was closed, for a settlement.
        self.sdk._open = self._check_open
        self.opened = self.heard = time.monotonic()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def works(self) -> bool:
        return self.error is None and not self.worn_out

    @property
    def was_good(self) -> bool:
        """Whether it has worked at all, so that a failure is the first one."""
        return self.heard > self.opened or time.monotonic() - self.opened > 1

    @property
    def worn_out(self) -> bool:
        return self._requests >= MAX_REQUESTS

    async def call(self, operation: Callable[..., Coroutine[Any, Any, T]], *args: Any, **options: Any) -> T:
        """Call an operation of the SDK. What fails for another reason than its message has lost the link."""
        if self.error is not None:
            raise ServiceBusUnavailable(f"The link to {self._queue!r} was lost: {self.error}")
        self._calls += 1
        try:
            with self._bus.explained(self._queue):
                async with asyncio.timeout(CALL_TIMEOUT):
                    return await operation(*args, **options)
        except (MessageLockLost, MessageNotFound, RequestRefused, Throttled):
            raise
        except BoilermakerError as error:
            self.error = self.error or error
            if isinstance(error, ConfigurationError) and time.monotonic() - self.opened > FRESH_LINK:
                raise ServiceBusUnavailable(f"The token may have run out: {error}") from error  # a new link will tell
            raise
        finally:
            self._calls -= 1

    async def request(self, operation: Callable[..., Coroutine[Any, Any, T]], *args: Any, **options: Any) -> T:
        """Call an operation that asks the management node.

        One at a time, since at once they may get the same delivery number, for which the service cuts the connection.
        """
        async with self._turn:
            self._requests += 1
            answer = await self.call(operation, *args, **options)
        self.heard = time.monotonic()
        return answer

    # -- what Service Bus has and the SDK does not offer

    async def dead_letter(self, raw: Any, reason: str, description: str, properties: Mapping[str, str]) -> None:
        """`dead_letter_message` with application properties besides, as the SDKs for other languages have it."""
        sdk = self.sdk
        try:
            from azure.servicebus._pyamqp.error import AMQPError

            settle, ask = sdk._handler.settle_messages_async, sdk._settle_message_via_mgmt_link
            names, explained = DEAD_LETTER_PROPERTIES, sdk._do_retryable_operation
        except (AttributeError, ImportError):  # another release, or the link was lost: it will do, or say so
            await sdk.dead_letter_message(raw, reason=reason, error_description=description)
            return
        if raw._is_deferred_message:
            why = {"deadletter-reason": reason, "deadletter-description": description}
            details = {**why, "properties-to-modify": dict(properties)}
            work = functools.partial(ask, "suspended", [raw.lock_token], dead_letter_details=details)
        else:
            info = {names[0]: reason, names[1]: description, **properties}
            error = AMQPError(b"com.microsoft:dead-letter", description, info)
            outcome = {"await_outcome": True, "outcome_timeout": ATTEMPT_TIMEOUT}
            work = functools.partial(settle, raw._delivery_id, raw._delivery_tag, "rejected", error=error, **outcome)
        await explained(work)
        raw._settled = True

    @property
    def has_more(self) -> bool:
        """Whether messages have come ahead that nobody has received yet."""
        waiting = getattr(getattr(self.sdk, "_handler", None), "_received_messages", None)
        return waiting is not None and not waiting.empty()

    async def renew(self, raws: Sequence[Any], timeout: float) -> list[datetime.datetime]:
        """`renew_message_lock` for several at once; one that is lost is an error for all."""
        if len(raws) == 1:
            return [await self.sdk.renew_message_lock(raws[0], timeout=timeout)]
        tokens = [raw.lock_token for raw in raws]
        if None in tokens:
            raise MessageLockLost("one of several messages is settled already")
        answer = await self.sdk._renew_locks(*tokens, timeout=timeout)
        return [_utc(milliseconds / 1000) for milliseconds in answer[b"expirations"]]

    async def complete(self, raws: Sequence[Any]) -> None:
        """`complete_message` for several at once, of any link; one that is lost is an error for all."""
        await self.sdk._settle_message_via_mgmt_link("completed", [raw.lock_token for raw in raws])
        for raw in raws:
            raw._settled = True

    async def stop(self) -> None:
        """Ask for no more messages; some may be on their way."""
        await self.sdk._handler._link.flow(link_credit=0)

    async def release(self, raw: Any) -> None:
        """Give back a message of this link as if it had not been received; no answer is waited for."""
        await self.sdk._handler.settle_messages_async(raw._delivery_id, raw._delivery_tag, "released")
        raw._settled = True

    async def close(self) -> None:
        """Close it as soon as no call is under way, or CLOSE_TIMEOUT has passed."""
        self.error = self.error or ServiceBusUnavailable("it was closed")
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while self._calls and time.monotonic() < deadline:
            await asyncio.sleep(SOCKET_TIMEOUT)
        vars(self.sdk).pop("_close_handler", None)
        handler: Any = getattr(self.sdk, "_handler", None)
        keep_alive = getattr(handler, "_keep_alive_thread", None)
        if keep_alive is not None:  # closing would wait for its next round, for up to a second
            keep_alive.cancel()
            handler._keep_alive_thread = None
        # Where the connection was lost, or never opened, the SDK leaves the socket open.
        transport = getattr(getattr(handler, "_connection", None), "_transport", None)
        writer, session = getattr(transport, "writer", None), getattr(transport, "session", None)
        if writer is not None and not self.opened:  # nobody is there to say goodbye to
            writer.transport.abort()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.sdk.close()
                if session is not None:  # over WebSockets
                    await session.close()
        except Exception as error:
            logger.debug("Closing a link to %r failed: %s", self._queue, error)
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _leave_open(self) -> None:
        """Instead of closing: `close` does."""

    async def _check_open(self, *args: Any, **options: Any) -> None:
        if self.error is not None:
            raise _import_azure().exceptions.ServiceBusConnectionError(message=f"The link was lost: {self.error}")


@dataclass(slots=True, eq=False)
class _SendRequest:
    """Messages that are sent together, if need be in several batches, and answered together."""

    count: int
    future: asyncio.Future[list[int | None]]
    numbers: list[int | None] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def answer(self, number_or_error: int | Exception | None) -> None:
        """Say what became of the next message; its sequence number is None if the bus does not tell it."""
        if isinstance(number_or_error, Exception):
            self.errors.append(number_or_error)
        else:
            self.numbers.append(number_or_error)
        if len(self.numbers) + len(self.errors) == self.count:
            _resolve(self.future, self.errors[0] if self.errors else self.numbers)


_Waiting: TypeAlias = tuple[Outgoing, _SendRequest]


class AzureSender:
    """Sends to one queue, over one link that stays open.

    The SDK's sender must not be used by two coroutines at once: one task sends what is waiting, in full batches.
    """

    MAX_SCHEDULED = 100

    def __init__(self, bus: AzureServiceBus, queue: str) -> None:
        self._bus = bus
        self._queue = queue
        self._link: AzureLink | None = None
        self._waiting: list[_Waiting] = []
        self._sending: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        """Send one or more, in order; the sequence numbers of those that are scheduled."""
        loop = asyncio.get_running_loop()
        request = _SendRequest(len(messages), loop.create_future())
        self._waiting += [(message, request) for message in messages]
        if self._sending is None or self._sending.done():
            self._sending = loop.create_task(self._send_waiting())
        return await request.future

    async def close(self) -> None:
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=CLOSE_TIMEOUT)
            self._sending.cancel()
            await asyncio.wait([self._sending], timeout=CLOSE_TIMEOUT)
        self._drop_link()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _send_waiting(self) -> None:
        """Send until nothing waits, by turns the first ones that can go together."""
        while self._waiting:
            waiting = [(message, request) for message, request in self._waiting if not request.future.done()]
            due = _due_if_numbered(waiting[0][0]) if waiting else None
            count = next(
                (i for i, (message, _) in enumerate(waiting) if _due_if_numbered(message) != due), len(waiting)
            )
            some, self._waiting = waiting[:count], waiting[count:]
            try:
                with self._bus.explained(self._queue):
                    numbers = await self._insist([message for message, _ in some])
            except (MessageTooLarge, RequestRefused) as error:  # the first one, by itself
                self._waiting = some[1:] + self._waiting
                some[0][1].answer(error)
            except BoilermakerError as error:  # about the queue or the connection: so it goes for all that waits
                some, self._waiting = some + self._waiting, []
                for _, request in some:
                    request.answer(error)
            except BaseException:
                some, self._waiting = some + self._waiting, []
                for _, request in some:
                    request.answer(ServiceBusUnavailable(f"{self._bus!r} was closed before it had sent everything."))
                self._drop_link()  # a send that was interrupted leaves it in no state to send more
                raise
            else:
                self._waiting = some[len(numbers) :] + self._waiting
                for (_, request), number in zip(some, numbers, strict=False):
                    request.answer(number)

    async def _insist(self, messages: Sequence[Outgoing]) -> Sequence[int | None]:
        """Send as many as one call can carry; again after a failure that may pass, but not for long."""
        failure: ServiceBusUnavailable | None = None
        try:
            async with asyncio.timeout(SEND_PATIENCE):
                for pause in (0, *SEND_PAUSES):
                    await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
                    try:
                        return await self._send_some(messages)
                    except ServiceBusUnavailable as error:
                        logger.info("Sending to %r failed: %s", self._queue, error)
                        failure = error
                    except (MessageTooLarge, RequestRefused):
                        if len(messages) == 1:
                            raise
                        return await self._insist(messages[:1])  # to find the one
        except TimeoutError as error:
            self._drop_link()
            failure = failure or ServiceBusUnavailable(f"{self._bus!r} took over {SEND_PATIENCE} s: {error}")
        assert failure is not None
        raise failure

    async def _send_some(self, messages: Sequence[Outgoing]) -> Sequence[int | None]:
        """Send as many of them as one call can carry, in order; their sequence numbers."""
        if not messages:
            return []
        if self._link is None or not self._link.works:
            self._drop_link()
            self._link = await self._bus.sender_link(self._queue).__aenter__()
        due, link = _due_if_numbered(messages[0]), self._link
        if due is not None:
            sizes = itertools.accumulate(self._bus.size(message) for message in messages[: self.MAX_SCHEDULED])
            fitting = max(1, sum(size <= self._bus.max_message_bytes for size in sizes))
            some = [_sdk_message(message) for message in messages[:fitting]]
            return await link.request(link.sdk.schedule_messages, some, _utc(due), timeout=ATTEMPT_TIMEOUT)
        if len(messages) == 1:
            await link.call(link.sdk.send_messages, _sdk_message(messages[0]), timeout=ATTEMPT_TIMEOUT)
            return [None]
        batch = await link.call(link.sdk.create_message_batch)
        for message in messages:
            size = batch.size_in_bytes + self._bus.size(message)  # the SDK's own sum is a little short
            if size > batch.max_size_in_bytes:
                break
            batch.add_message(_sdk_message(message))
        if not len(batch):
            return await self._send_some(messages[:1])
        await link.call(link.sdk.send_messages, batch, timeout=ATTEMPT_TIMEOUT)
        return [None] * len(batch)

    def _drop_link(self) -> None:
        """Let go of the link; one that is lost may take seconds to close, for which nobody should wait."""
        if self._link is not None:
            closing = asyncio.get_running_loop().create_task(self._link.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._link = None


def _due_if_numbered(message: Outgoing) -> float | None:
    """What the messages of one request have in common: None for those that need not be asked for their numbers."""
    return message.due if message.numbered else None


def _sdk_message(message: Outgoing) -> ServiceBusMessage:
    try:
        sdk_message: ServiceBusMessage = _import_azure().ServiceBusMessage(
            message.body,
            message_id=message.message_id,
            content_type="application/json",
            application_properties=dict(message.application_properties) or None,
            scheduled_enqueue_time_utc=None if message.due is None else _utc(message.due),
            session_id=message.session,
            correlation_id=message.correlation_id,
            time_to_live=None if message.time_to_live is None else datetime.timedelta(seconds=message.time_to_live),
        )
    except (TypeError, ValueError) as error:
        raise RequestRefused(f"Message {message.message_id!r} cannot be sent: {error}") from error
    return sdk_message


class AzureOutcomes:
    """Takes the outcomes that one event loop of this process is told, and keeps them until they expire.

    They come through a session of the reply queue, which one task holds for as long as the bus is open, whatever
    happens to its link. That task does one thing after the other, so that nothing on the link waits for its reads: it
    receives, hands on, deletes, and renews the session's lock when that is due, which is a sign of life at the same
    time. What is not deleted, since a link was lost, comes once more and says the same.
    """

    def __init__(self, bus: AzureServiceBus) -> None:
        self.session = str(uuid.uuid4())
        self._bus = bus
        self._queue = bus.reply_queue
        self._loop = asyncio.get_running_loop()
        self._published: collections.OrderedDict[str, float] = collections.OrderedDict()  # when, by the loop's clock
        self._outcomes: dict[str, tuple[Answer, float]] = {}  # with when they expire
        self._ends: list[tuple[float, str]] = []  # a heap of these times
        self._waiting: dict[str, set[asyncio.Future[Answer]]] = {}
        self._link: AzureLink | None = None
        self._running: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._deleting: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._longest_lock: float = LONGEST_LOCK
        self._renew_at = 0.0

    # -- asking

    def remember(self, task_id: str) -> None:
        """Know a task as one of ours."""
        self._published.setdefault(task_id, -math.inf)
        self._published.move_to_end(task_id)
        if len(self._published) > PUBLISHED_KEPT:
            self._published.popitem(last=False)

    def address_of(self, task_id: str) -> Address:
        if task_id not in self._published:
            raise self._not_ours(task_id)
        return Address(task_id, 0, queue=self._queue, session=self.session)

    def _not_ours(self, task_id: str) -> UsageError:
        return UsageError(
            f"Task {_printable(task_id)[:MAX_MESSAGE_ID_LENGTH]} was not published here with a result_ttl, or too long "
            f"ago: of {self._bus!r} only the process and event loop that published a task can ask for its result."
        )

    async def expect(self, addresses: Sequence[Address]) -> None:
        """Hold the session; and forget the outcomes that there were of the same ids.

        But where a second message of an id is dropped: there the outcome is that of the first.

        Raises:
            ConfigurationError: there is no such queue, or not for this identity, or it is one without sessions.
            ServiceBusUnavailable: the service is away, or somebody else holds the session.
        """
        self._bus.check_queue(self._queue)
        self._start()
        await asyncio.shield(self._opened)
        now = self._loop.time()
        for address in addresses:
            self.remember(address.id)
            if now - self._published[address.id] >= self._bus.id_window:
                self._outcomes.pop(address.id, None)
                self._published[address.id] = now

    async def get(self, address: Address, timeout: float | None) -> Answer:
        """An outcome that is there, or comes within so many seconds.

        Raises:
            TimeoutError: it does not.
            UsageError: another process, or event loop, is told it.
        """
        if (address.queue, address.session) != (self._queue, self.session):
            raise self._not_ours(address.id)
        self._start()
        self._forget_expired()
        if address.id in self._outcomes:
            return self._outcomes[address.id][0]
        if timeout == 0:
            raise TimeoutError
        outcome: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting.setdefault(address.id, set()).add(outcome)
        try:
            async with asyncio.timeout(timeout):
                return await outcome
        finally:
            self._waiting[address.id].discard(outcome)
            if not self._waiting[address.id]:
                del self._waiting[address.id]

    # -- being told

    def _start(self) -> None:
        if self._running is None or self._running.done():
            self._opened = self._loop.create_future()
            self._running = self._loop.create_task(self._run())

    async def _run(self) -> None:
        """Take what is told, until cancelled; what is wrong at the start ends it, and is told to all who wait."""
        this = asyncio.current_task()
        assert this is not None
        error: BoilermakerError = self._closed()
        try:
            await self._open()
            self._opened.set_result(None)
            while not this.cancelling():  # wait_for, by which the SDK reads, may lose a cancellation in Python 3.11
                await self._turn()
        except BoilermakerError as failure:
            error = failure
        finally:
            self._leave(error)

    def _closed(self) -> ServiceBusUnavailable:
        return ServiceBusUnavailable(f"{self._bus!r} was closed while a result was awaited.")

    def _leave(self, error: BoilermakerError) -> None:
        """Tell all who wait that there will be nothing."""
        _resolve(self._opened, error)
        self._opened.exception()  # nobody may be waiting for it
        for waiting in itertools.chain(*self._waiting.values()):
            _resolve(waiting, error)

    async def _open(self) -> None:
        """Open the session, so that what is wrong with the queue shows at once; what may pass is tried again."""
        failure: BoilermakerError | None = None
        try:
            async with asyncio.timeout(SEND_PATIENCE):
                for pause in (0, *SEND_PAUSES):
                    await asyncio.sleep(pause)
                    try:
                        await self._accept()
                        return
                    except ServiceBusUnavailable as error:
                        failure = error
        except ConfigurationError as error:
            raise self._bus.without_a_queue(self._queue, "Results", WITH_SESSIONS, error) from error
        except TimeoutError as error:
            failure = failure or ServiceBusUnavailable(f"{self._queue!r} took over {SEND_PATIENCE} s to open: {error}")
        assert failure is not None
        raise failure

    async def _accept(self) -> None:
        options = {"prefetch_count": REPLIES_AHEAD, "socket_timeout": REPLY_SOCKET_TIMEOUT}
        link = self._bus.session_link(self._queue, self.session, ATTEMPT_TIMEOUT, **options)
        self._link = await link.__aenter__()
        self._granted(link.sdk.session.locked_until_utc)

    async def _turn(self) -> None:
        """Take what has come, or wait for it until the lock is to be renewed; open another link if this one is lost."""
        link = self._link
        assert link is not None
        if not link.works:
            await self._reopen(link)
            return
        try:
            if self._loop.time() >= self._renew_at:
                self._granted(await link.request(link.sdk.session.renew_lock, timeout=ATTEMPT_TIMEOUT))
            replies = await self._receive(link)
        except Throttled:
            await asyncio.sleep(RETRY_PAUSE)
            return
        except BoilermakerError as error:
            link.error = link.error or error
            return
        self._forget_expired()
        for reply in replies:
            self._keep(reply)
            deleting = self._spawn(self._delete(link, reply))
            self._deleting.add(deleting)
            deleting.add_done_callback(self._deleting.discard)
        if self._deleting:  # to receive meanwhile would slow down both
            await asyncio.wait(self._deleting, timeout=SETTLE_WAIT)

    async def _receive(self, link: AzureLink) -> list[ServiceBusReceivedMessage]:
        """The next reply, and those that have come with it: to ask for several would wait for more than there are."""
        wait = max(self._renew_at - self._loop.time(), RETRY_PAUSE)
        replies: list[ServiceBusReceivedMessage] = await link.call(link.sdk.receive_messages, 1, max_wait_time=wait)
        while replies and link.has_more and len(replies) < REPLIES_AHEAD:
            replies += await link.call(link.sdk.receive_messages, 1, max_wait_time=wait)
        if replies:
            link.heard = time.monotonic()
        return replies

    def _granted(self, until: datetime.datetime | None) -> None:
        """Note when to renew the session's lock: when half of it has passed, by this machine's clock.

        Where that is wrong, as the lock was lost, it is taken for the shortest that Azure has.
        """
        left = until.timestamp() - time.time() if until is not None else 0
        left = min(left if left > 0 else SHORTEST_LOCK, self._longest_lock)
        self._renew_at = self._loop.time() + min(left / 2, SILENCE)

    async def _reopen(self, former: AzureLink) -> None:
        """Open the same session over another link, however long it takes; the pauses grow until that works."""
        error = former.error
        if isinstance(error, SessionLost):
            self._longest_lock = SHORTEST_LOCK
        if former.was_good:
            self._failures = 0
        closing = self._spawn(former.close())
        if error is None:  # worn out: it still holds the session
            await asyncio.wait([closing])
        while True:
            if error is not None:
                pause = _backoff(self._failures)
                self._failures += 1
                logger.warning("The link for results of %r was lost, again in %.1f s: %s", self._bus, pause, error)
                await asyncio.sleep(pause)
            try:
                await self._accept()
                return
            except BoilermakerError as failure:
                error = failure

    def _keep(self, reply: ServiceBusReceivedMessage) -> None:
        """Keep an outcome for its time, in place of a former one, and hand it to those who wait."""
        task_id = str(reply.correlation_id)
        try:
            document = _from_json(text_of(_body_of(reply))[0])
            failed, value = document["failed"] is True, _to_json(document["value"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            logger.warning("What came as an outcome is none task_id=%s: %r", _printable(task_id), error)
            return
        ttl = 0 if reply.time_to_live is None else reply.time_to_live.total_seconds()
        answer, end = Answer(Address(task_id, ttl), failed, value), self._loop.time() + ttl
        self._outcomes[task_id] = answer, end
        heapq.heappush(self._ends, (end, task_id))
        for waiting in self._waiting.get(task_id, ()):
            _resolve(waiting, answer)

    def _forget_expired(self) -> None:
        now = self._loop.time()
        while self._ends and self._ends[0][0] <= now:
            end, task_id = heapq.heappop(self._ends)
            if task_id in self._outcomes and self._outcomes[task_id][1] == end:  # else there is a later one
                del self._outcomes[task_id]

    async def _delete(self, link: AzureLink, reply: ServiceBusReceivedMessage) -> None:
        while link.works:
            try:
                await link.call(link.sdk.complete_message, reply)
                return
            except Throttled:
                await asyncio.sleep(RETRY_PAUSE)
            except BoilermakerError as error:
                logger.debug("A reply was not deleted: %s", error)
                return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Let go of the session, and leave nobody waiting. What is there already can still be asked for."""
        running = self._running
        while running is not None and not running.done():
            running.cancel()
            await asyncio.wait([running], timeout=1)
        self._leave(self._closed())  # where it was cancelled before its first step, it did nothing
        for deleting in self._deleting:
            deleting.cancel()
        if self._link is not None:
            await self._link.close()
        if self._tasks:
            await asyncio.wait(self._tasks)


@dataclass(slots=True, eq=False)
class _Lock:
    """When a lock is to be renewed, and when it is given up; of the monotonic clock."""

    renew_at: float
    lost_at: float
    asked: bool = False
    renewing: bool = False


class AzureReceiver:
    """Receives from an Azure queue, reconnects for as long as it takes, and renews the locks of what it received.

    Everything waits for a link that works, which one task opens when the former is lost: by management requests, the
    messages of one link can be settled and renewed over another. A receive is never cancelled, since its credit would
    stay on the link and lock messages that nobody looks at. It asks for one message when the queue was empty, and for
    all the free slots when it was not: either way it returns as soon as there is something to do. But where one message
    comes after the other, as requests do of one who awaits each result, a look for many would hold back each: there it
    looks for many more and more rarely.
    """

    RENEWAL_TICK = 0.25

    def __init__(
        self,
        bus: AzureServiceBus,
        on_lock_lost: Callable[[Delivery], None],
        max_renewal: float,
        queue: str | None = None,
        expects_many: bool = False,
    ) -> None:
        self._bus = bus
        self._queue = queue or bus.queue_name
        self._on_lock_lost = on_lock_lost
        self._max_renewal = max_renewal
        self._link: AzureLink
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._busy = expects_many
        self._lonely = self._singles = 0  # messages to receive one by one before the next look for many; how many now
        self._batch_wait = PATIENT_BATCH_WAIT if expects_many else BATCH_WAIT
        self._youngest = -math.inf  # how far ahead of this machine's clock a message's time of enqueueing was, at most
        self._warned_of_clock = False
        self._closing = False
        self._settling: set[asyncio.Future[None]] = set()
        self._locks: dict[Delivery, _Lock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._joiner: AzureJoiner | None = None

    async def open(self) -> None:
        """Connect, so that what is wrong with the settings shows at the start; a failure that may pass, soon after."""
        deadline = time.monotonic() + START_PATIENCE
        while True:
            try:
                self._link = await self._bus.receiver_link(self._queue).__aenter__()
                break
            except ServiceBusUnavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_PAUSE)
        self._spawn(self._keep_locks())

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- the link

    @property
    def connected(self) -> bool:
        return self._link.error is None

    @property
    def trouble(self) -> object:
        """Why there is no link that works, as far as that is known."""
        return self._link.error or "the connection is up"

    async def _working_link(self) -> AzureLink:
        """The link, or another when that one is lost or worn out."""
        while not self._link.works:
            if self._connecting is None or self._connecting.done():
                self._connecting = self._spawn(self._reconnect(self._link))
            await asyncio.wait([self._connecting])
        return self._link

    async def _reconnect(self, former: AzureLink) -> None:
        """Replace the link, however long it takes; the pauses grow until one works."""
        error = former.error
        self._spawn(former.close())
        if former.was_good:
            self._failures = 0
        while True:
            if error is not None:
                pause = _backoff(self._failures)
                self._failures += 1
                logger.warning("The connection to %r was lost, reconnecting in %.1f s: %s", self._bus, pause, error)
                await asyncio.sleep(pause)
            try:
                self._link = await self._bus.receiver_link(self._queue).__aenter__()
                return
            except BoilermakerError as failure:
                error = failure

    async def close(self) -> None:
        """Stop renewing and close the link. Messages that are still held stay locked."""
        self._closing = True

        async def close_all() -> None:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._joiner is not None:
                await self._joiner.close()
            await self._link.close()

        await asyncio.shield(asyncio.ensure_future(close_all()))

    # -- receiving

    async def receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        receiving = self._spawn(self._receive(max_message_count, max_wait_time))
        try:
            return await asyncio.shield(receiving)
        except asyncio.CancelledError:
            await asyncio.shield(self._spawn(self._give_back(receiving, max_wait_time + 1)))
            raise

    async def _give_back(self, receiving: asyncio.Task[list[Delivery]], patience: float) -> None:
        """Abandon what a receive brings that nobody waits for any more."""
        await asyncio.wait([receiving], timeout=patience)
        if not receiving.cancel() and not receiving.cancelled() and receiving.exception() is None:
            await self.settle([Settlement(delivery, Action.ABANDON) for delivery in receiving.result()])

    async def _receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        if self._bus.joins and self._joiner is None and self._queue == self._bus.queue_name:
            self._joiner = AzureJoiner(self._bus)
        if self._settling:  # to receive meanwhile would slow down both
            await asyncio.wait(self._settling, timeout=SETTLE_WAIT)
        while not self._closing:
            link = await self._working_link()
            try:
                messages = await self._receive_over(link, max_message_count, max_wait_time)
                if not messages and not max_wait_time and self._joiner is not None and await self._joiner.rest():
                    continue  # what follows a group may have come
            except Throttled:
                await asyncio.sleep(RETRY_PAUSE)
            except BoilermakerError as error:
                link.error = link.error or error  # go on with another
            else:
                if messages:
                    link.heard = time.monotonic()
                return [self._hold(raw) for raw in messages]
        return []

    async def _receive_over(
        self, link: AzureLink, max_message_count: int, max_wait_time: float
    ) -> list[ServiceBusReceivedMessage]:
        receive = functools.partial(link.call, link.sdk.receive_messages)
        messages: list[ServiceBusReceivedMessage] = []
        if self._busy:
            wait = max(self._batch_wait, 2 * link.round_trip)
            messages = await receive(max_message_count, max_wait_time=wait)
            if max_message_count > 1:
                self._lonely = 0 if len(messages) > 1 else min(2 * self._lonely + 1, MOST_LONELY)
                self._singles = self._lonely
        if not messages:
            messages = await receive(1, max_wait_time=max_wait_time or EMPTY_WAIT)
            self._singles = max(self._singles - 1, 0)
        self._busy = bool(messages) and not self._singles
        if not messages and time.monotonic() - link.heard > SILENCE:
            await link.request(link.sdk.peek_messages, 1, timeout=ATTEMPT_TIMEOUT)
        return messages

    def _hold(self, raw: ServiceBusReceivedMessage) -> Delivery:
        if raw.enqueued_time_utc is not None:
            self._youngest = max(self._youngest, raw.enqueued_time_utc.timestamp() - time.time())
        delivery = Delivery(
            sequence_number=raw.sequence_number or 0,
            delivery_count=raw.delivery_count or 0,
            message_id=_message_id_of(raw),
            body=_body_of(raw),
            application_properties=_properties_of(raw),
            locked_until=0,
            due=(raw.scheduled_enqueue_time_utc or raw.enqueued_time_utc or _utc(0)).timestamp(),
            raw=raw,
        )
        self._locks[delivery] = self._granted(delivery, raw.locked_until_utc)
        return delivery

    # -- settling

    def settle(self, settlements: Sequence[Settlement], durable: bool = False) -> asyncio.Future[None]:
        async def settle_all() -> None:
            await asyncio.gather(*map(self._settle, settlements))

        # A future, not the task: who waits for it may be cancelled, and the settling goes on.
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        settling = self._spawn(settle_all())
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        settling.add_done_callback(lambda _: _resolve(settled, None))
        return settled

    async def _settle(self, settlement: Settlement) -> None:
        """Publish what follows, then settle: there is no transaction over both."""
        delivery, held = settlement.delivery, settlement.action not in (Action.LEAVE, Action.KEEP)
        if held and delivery.locked_until <= time.time():
            self._locks.pop(delivery, None)
            settlement.error = MessageLockLost(
                f"the lock of message {delivery.sequence_number} ran out before it was renewed: "
                "is the connection lost, or the event loop blocked?"
            )
            return
        try:
            # What tells an outcome apart from tasks: what has to be sent again does not repeat the others.
            for _, some in itertools.groupby(settlement.messages, lambda each: each.correlation_id is None):
                await self._insist(settlement, functools.partial(self._bus.publish, list(some)))
            if any(message.queue == self._bus.join_queue for message in settlement.messages):
                self._bus.joins = True
            if held:
                await self._insist(settlement, functools.partial(self._dispose, settlement))
        except BoilermakerError as error:
            settlement.error = error
            if held and settlement.messages and isinstance(error, (MessageTooLarge, RequestRefused)):
                instead = rejected(settlement, error, self._queue)
                settlement.action = instead.action
                if instead.action is not Action.KEEP:
                    with contextlib.suppress(BoilermakerError):
                        if instead.answer is not None and (reply := self._bus.reply(instead.answer)) is not None:
                            await self._insist(settlement, functools.partial(self._bus.publish, [reply]))
                        await self._insist(settlement, functools.partial(self._dispose, instead))
        finally:
            if settlement.action is not Action.KEEP:
                self._locks.pop(delivery, None)

    async def _insist(self, settlement: Settlement, action: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Do something about a message, if need be again: until it works, or the lock has run out.

        What follows a message that is gone already nobody else would publish: that is tried until the receiver closes.
        """
        gone = settlement.action is Action.LEAVE
        pause = 0.0
        while True:
            try:
                if pause:
                    await asyncio.sleep(pause)
                await action()
                return
            except asyncio.CancelledError:
                if self._closing:
                    raise ServiceBusUnavailable(f"{self._bus!r} was closed before it had done it.") from None
                # Else the program ends: asyncio.run cancels all tasks at once, and waits for what they still do.
            except (MessageTooLarge, RequestRefused):
                raise
            except BoilermakerError as error:
                late = time.time() + RETRY_PAUSE > settlement.delivery.locked_until
                if not gone and (late or not isinstance(error, ServiceBusUnavailable)):
                    raise
                number = settlement.delivery.sequence_number
                logger.info("Settling failed, will try again sequence_number=%s: %s", number, error)
                pause = RESEND_PAUSE if gone else RETRY_PAUSE

    async def _dispose(self, settlement: Settlement) -> None:
        raw = settlement.delivery.raw
        link = await self._working_link()
        call = link.call
        if raw._receiver is not link.sdk:
            # Its delivery number may be another message's on this link. What the SDK takes for deferred it settles by
            # the lock token, in a management request.
            raw._is_deferred_message = True
            call = link.request
        raw._expiry = _utc(settlement.delivery.locked_until)  # by which the SDK refuses to settle
        started = time.monotonic()
        match settlement.action:
            case Action.COMPLETE:
                await call(link.sdk.complete_message, raw)
            case Action.ABANDON:
                await call(link.sdk.abandon_message, raw)
            case Action.DEAD_LETTER:
                traceback = self._traceback_that_fits(settlement)
                properties = {TRACEBACK_PROPERTY: traceback} if traceback else {}
                await call(link.dead_letter, raw, settlement.reason, settlement.description, properties)
        link.round_trip = min(link.round_trip or ATTEMPT_TIMEOUT, time.monotonic() - started)

    def _traceback_that_fits(self, settlement: Settlement) -> str:
        """The end of the traceback: a dead letter may not be larger than any other message."""
        delivery, encoded = settlement.delivery, settlement.traceback.encode("utf-8", "replace")
        dead_letter = Outgoing(delivery.body, delivery.message_id or "", "", None, delivery.application_properties)
        room = self._bus.max_message_bytes - self._bus.size(dead_letter)
        room -= len(f"{settlement.reason}{settlement.description}".encode("utf-8", "replace"))
        return encoded[-room:].decode("utf-8", "ignore") if room > 0 else ""

    async def complete(self, settlements: Sequence[Settlement]) -> None:
        """Delete many messages by one request, or, if that fails, each by itself; each notes its error."""
        if not settlements:
            return
        try:
            link = await self._working_link()
            await link.request(link.complete, [settlement.delivery.raw for settlement in settlements])
        except BoilermakerError:
            for settlement in settlements:
                settlement.messages = ()  # they are sent
            await self.settle(settlements)
        else:
            for settlement in settlements:
                self._locks.pop(settlement.delivery, None)

    async def release(self, deliveries: Collection[Delivery]) -> None:
        """Receive no more, and give messages back as if they had not been received; of another link, as abandoned."""
        for delivery in deliveries:
            self._locks.pop(delivery, None)
        link = self._link
        with contextlib.suppress(BoilermakerError):  # their locks will run out
            # When anything has been answered, what was sent before it has come: so have messages that are on their way
            # to nobody, which the SDK releases, and so have our releases, which closing would cut off.
            answer = functools.partial(link.request, link.sdk.peek_messages, 1, timeout=ATTEMPT_TIMEOUT)
            await link.call(link.stop)
            await answer()
            for delivery in deliveries:
                if delivery.raw._receiver is link.sdk:
                    await link.call(link.release, delivery.raw)
            await answer()
            for delivery in deliveries:
                if delivery.raw._receiver is not link.sdk:
                    with contextlib.suppress(MessageLockLost):
                        await self._dispose(Settlement(delivery, Action.ABANDON))

    # -- renewing

    # The service does not say how long a lock lasts, only when it ends, by its own clock. What is left by ours is the
    # lock's duration and the difference of the clocks in one number: a minute may be a lock of five seconds on a
    # machine that is 55 behind, where half of the minute would be far too late. Times of enqueueing tell the clocks
    # apart from one side only: a message that seems to come from the future proves that ours is behind, one that
    # seems old proves nothing, as it may have waited. So the end is taken at its word as long as some message has
    # seemed just enqueued, none from the future, and no lock was lost too early. Otherwise a lock is renewed as the
    # shortest that Azure has, which costs requests but no locks, and counts as lost by itself only after the longest:
    # it is the service that knows. From one answer to the next the monotonic clock counts, which nobody sets.

    def _granted(self, delivery: Delivery, until: datetime.datetime | None) -> _Lock:
        """The lock that the service has just granted or renewed."""
        left = until.timestamp() - time.time() if until is not None else 0
        if (left <= 0 or left > LONGEST_LOCK + 1 or 1 < self._youngest < math.inf) and not self._warned_of_clock:
            self._warned_of_clock = True
            logger.warning(
                "The clocks of this machine and of %r differ, which costs requests: set the clock", self._bus
            )
        if left > 0 and -JUST_ENQUEUED <= self._youngest <= CLOCK_TOLERANCE:
            shortest = longest = left
        else:
            shortest, longest = left if 0 < left < SHORTEST_LOCK else SHORTEST_LOCK, LONGEST_LOCK
        delivery.locked_until = time.time() + longest
        return _Lock(time.monotonic() + shortest / 2, time.monotonic() + longest)

    async def _keep_locks(self) -> None:
        """Renew what is due, and give up what could not be renewed."""
        offset = time.time() - time.monotonic()
        while True:
            await asyncio.sleep(self.RENEWAL_TICK)
            now = time.monotonic()
            if abs(step := time.time() - now - offset) > 1:  # somebody has set the clock
                offset, self._youngest = offset + step, -math.inf
                for delivery in self._locks:
                    delivery.locked_until += step
            due: list[tuple[Delivery, _Lock]] = []
            for delivery, lock in list(self._locks.items()):
                if now - delivery.received > self._max_renewal or (lock.asked and now > lock.lost_at):
                    self._lose(delivery)
                elif now >= lock.renew_at and not lock.renewing:
                    if not lock.asked and now > lock.lost_at:  # the event loop was blocked: the service may yet know it
                        lock.lost_at = now + 1
                    lock.asked = lock.renewing = True
                    due.append((delivery, lock))
            for place in range(0, len(due), RENEWED_AT_ONCE):
                self._spawn(self._renew(due[place : place + RENEWED_AT_ONCE]))

    async def _renew(self, due: Sequence[tuple[Delivery, _Lock]]) -> None:
        """Renew locks in one request; after a failure, again when half of what is left has passed."""
        lost_at = min(lock.lost_at for _, lock in due)
        timeout = min(max((lost_at - time.monotonic()) / 2, 1), ATTEMPT_TIMEOUT)
        for delivery, _ in due:
            delivery.raw._expiry = None
        try:
            link = await self._working_link()
            ends = await link.request(link.renew, [delivery.raw for delivery, _ in due], timeout=timeout)
        except BoilermakerError as error:
            await self._not_renewed(due, error)
        else:
            for (delivery, _), until in zip(due, ends, strict=True):
                if delivery in self._locks:
                    self._locks[delivery] = self._granted(delivery, until)

    async def _not_renewed(self, due: Sequence[tuple[Delivery, _Lock]], error: BoilermakerError) -> None:
        if len(due) > 1 and isinstance(error, (MessageLockLost, RequestRefused)):  # it does not say which of them
            for one in due:
                if one[0] in self._locks:
                    await self._renew([one])
        elif isinstance(error, MessageLockLost):
            [(delivery, lock)] = due
            if time.monotonic() < lock.lost_at:
                self._youngest = math.inf  # taken from us, or else the clocks are not what they seemed
            self._lose(delivery)
        else:
            logger.info("Renewing locks of %r failed, will try again: %s", self._bus, error)
            for _, lock in due:
                lock.renewing = False
                lock.renew_at = time.monotonic() + max((lock.lost_at - time.monotonic()) / 2, RETRY_PAUSE)

    def _lose(self, delivery: Delivery) -> None:
        if self._locks.pop(delivery, None) is not None:
            self._on_lock_lost(delivery)


class AzureJoiner:
    """Ends groups: takes the sessions of the join queue as they have messages, each a group, some at a time.

    The session's state is what is known of the group. In this order: the state is set, what follows is published, the
    state says that it has ended, the messages are completed. Whoever dies in between is followed by one that does the
    same again, of which duplicate detection keeps one.
    """

    def __init__(self, bus: AzureServiceBus) -> None:
        self._bus = bus
        self._home = bus.queue_name.removesuffix(DEAD_LETTER_SUFFIX)
        self._accepting: set[asyncio.Task[None]] = set()
        self._joining = 0
        self._last_join = time.monotonic()
        self._worked = bus.has_join_queue()  # else an error is one of the settings
        self._closing = False
        self._spawn(ACCEPT_WAIT)

    def _spawn(self, wait: float) -> None:
        task = asyncio.get_running_loop().create_task(self._accept(wait))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def close(self) -> None:
        self._closing = True  # wait_for, by which the SDK reads, may lose a cancellation in Python 3.11
        tasks = list(self._accepting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def rest(self) -> bool:
        """Wait until no group is being joined any more; whether there was something to wait for."""
        began = self._last_join
        while self._joining or time.monotonic() - self._last_join < JOIN_REST:
            await asyncio.sleep(RETRY_PAUSE / 5)
        return began != self._last_join

    async def _accept(self, wait: float) -> None:
        """Take one group after the other, as they have messages; where there is one, let others look for more.

        Args:
            wait: seconds to wait for the next. One waits without end; the others only as long as there is much to do.
        """
        failures = 0
        while not self._closing:
            link = self._bus.session_link(self._bus.join_queue, None, wait)
            try:
                await link.__aenter__()
            except BoilermakerError as error:
                if type(error.__cause__).__name__ == "OperationTimeoutError":  # there was none
                    self._worked = True
                    if wait < ACCEPT_WAIT:
                        return
                    continue
                if isinstance(error, ConfigurationError) and not self._worked:
                    logger.error("This worker joins no groups: %s", error)
                    return
                failures += 1
                pause = _backoff(failures)
                logger.warning("Waiting for groups failed, will try again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)
                continue
            failures, self._worked = 0, True
            for _ in range(JOINED_SESSIONS - len(self._accepting)):
                self._spawn(MORE_WAIT)
            self._joining += 1
            try:
                await self._join(link)
            finally:
                self._joining -= 1
                self._last_join = time.monotonic()

    async def _join(self, link: AzureLink) -> None:
        """See to one group, for as long as there are messages about it."""
        renewing = asyncio.get_running_loop().create_task(self._renew(link))
        try:
            state = await self._state(link)
            receive, wait = functools.partial(link.call, link.sdk.receive_messages), BATCH_WAIT
            while messages := await receive(JOINED_AT_ONCE, max_wait_time=wait) or await receive(1, max_wait_time=wait):
                state, wait = await self._take_in(link, state, messages), JOIN_WAIT
                if not state.definition or self._closing:  # it has ended, or this worker
                    break
        except BoilermakerError as error:
            logger.warning("Joining a group was interrupted, somebody will try again: %s", error)
            await asyncio.sleep(RETRY_PAUSE)
        except Exception:
            logger.exception("Joining a group failed, somebody will try again")
            await asyncio.sleep(MAX_BACKOFF)
        finally:
            renewing.cancel()
            await asyncio.shield(asyncio.ensure_future(link.close()))

    async def _state(self, link: AzureLink) -> GroupState:
        """What is known of the group; what another program has left there is removed, lest it be met for ever."""
        text = await link.request(link.sdk.session.get_state, timeout=ATTEMPT_TIMEOUT)
        try:
            return GroupState.read(text, self._home)
        except InvalidTaskFormat as error:
            logger.error("Removed a state in %r: %s", self._bus.join_queue, error)
            await self._set(link, GroupState())
            return GroupState()

    async def _take_in(
        self, link: AzureLink, state: GroupState, messages: Sequence[ServiceBusReceivedMessage]
    ) -> GroupState:
        """Note what some messages tell; end the group if that was all."""
        former = state
        understood: list[ServiceBusReceivedMessage] = []
        timers: list[ServiceBusReceivedMessage] = []
        for raw in messages:
            try:
                state = state.with_message(_body_of(raw), self._home)
                (timers if text_of(_body_of(raw))[0] == GROUP_TIMER else understood).append(raw)
            except InvalidTaskFormat as error:  # to close a session counts no delivery: it would come for ever
                number, why = raw.sequence_number, describe(error)
                logger.error("Dead-lettered what is no message of a group sequence_number=%s: %s", number, why)
                await link.call(link.dead_letter, raw, "InvalidTaskFormat", why, {})
        too_large = self._too_large(state)
        if too_large is not None or state.ends(self._home):
            if too_large is None:
                await self._set(link, state)
            await self._publish(state, too_large)
            state = state.after_the_end()
        elif state.timed_out:
            state = GroupState()
        if state != former:
            await self._set(link, state)
        for raws in (understood, timers):  # lest a group be begun again that no timer would end
            await asyncio.gather(*[link.call(link.sdk.complete_message, raw) for raw in raws])
        return state

    def _too_large(self, state: GroupState) -> MessageTooLarge | None:
        limit = self._bus.max_message_bytes
        try:
            size = len(state.write() or "")
        except RecursionError:
            return MessageTooLarge("the results of members are nested too deeply to be kept")
        if size <= limit:
            return None
        return MessageTooLarge(
            f"the results of {len(state.outcomes)} members have {size} bytes, the limit is {limit}: return ids of what "
            "is stored elsewhere"
        )

    async def _publish(self, state: GroupState, error: Exception | None) -> None:
        known = state.outcomes if error is None else {}
        outcomes = {position: (failed, _to_json(value)) for position, (failed, value) in known.items()}
        ending = ending_of(self._bus, self._home, state.definition, outcomes, error)
        await self._bus.publish(ending.messages)

    async def _set(self, link: AzureLink, state: GroupState) -> None:
        await link.request(link.sdk.session.set_state, state.write(), timeout=ATTEMPT_TIMEOUT)

    async def _renew(self, link: AzureLink) -> None:
        """Keep the session, at half of what is left of its lock each time."""
        with contextlib.suppress(BoilermakerError):  # then it is another's
            until = link.sdk.session.locked_until_utc
            while True:
                left = (until - _utc(time.time())).total_seconds()
                await asyncio.sleep(max(left, SHORTEST_LOCK) / 2 if left <= LONGEST_LOCK else SHORTEST_LOCK / 2)
                until = await link.request(link.sdk.session.renew_lock, timeout=ATTEMPT_TIMEOUT)


class AzureBrowser:
    """Peeks at a queue, for as long as there is to see: over another link when one is lost or worn out."""

    def __init__(self, bus: AzureServiceBus, queue: str) -> None:
        self._bus = bus
        self._queue = queue
        self._link: AzureLink | None = None

    async def __aenter__(self) -> AzureBrowser:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._link is not None:
            await self._link.close()

    async def page(self, sequence_number: int, count: int) -> list[Message]:
        """The messages from that number on that one request brings, up to `count`; none if there are no more."""
        pauses = iter(SEND_PAUSES)
        while True:
            link = self._link
            if link is None or not link.works:
                await self.__aexit__()
                link = self._link = await self._bus.receiver_link(self._queue).__aenter__()
                pauses = iter(())  # one that has just been opened is given no second try
            peek = functools.partial(link.request, link.sdk.peek_messages, timeout=ATTEMPT_TIMEOUT)
            try:
                some = await peek(min(count, PEEKED_AT_ONCE), sequence_number=max(sequence_number, 1))
                return [_message_of_sdk(self._queue, raw) for raw in some]
            except ServiceBusUnavailable as error:
                pause = next(pauses, None)
                if pause is None:
                    raise
                await asyncio.sleep(pause if isinstance(error, Throttled) else 0)

    async def pages(self, sequence_number: int = 1, count: int = MAX_SECONDS) -> AsyncIterator[list[Message]]:
        """All pages from that number on, up to `count` messages."""
        while count > 0 and (page := await self.page(sequence_number, count)):
            yield page
            sequence_number = page[-1].sequence_number + 1
            count -= len(page)


class AzureOperation:
    """Takes certain messages out of a queue that hands out none by its number.

    It receives whatever comes first, deletes what was asked for, and holds the rest, lest it come again, until the end.
    What it holds it releases then, which does not count as a delivery.
    """

    def __init__(
        self,
        bus: AzureServiceBus,
        queue: str,
        outgoing_of: Callable[[Message], Sequence[Outgoing]],
        on_progress: Callable[[int], object] | None,
    ) -> None:
        self._bus = bus
        self._queue = queue
        self._outgoing_of = outgoing_of  # what is published before a message is deleted
        self._on_progress = on_progress or (lambda done: None)
        self.left: dict[int, Message] = {}
        self._done: list[Message] = []
        self._doubtful: set[int] = set()  # deleted, or to come again
        self._refusals: list[Exception] = []
        self._held: set[Delivery] = set()
        self._last: dict[int, int] = {}  # the last number that was asked for, by partition
        self._receiving: asyncio.Future[list[Delivery]] | None = None
        self._settling: asyncio.Future[None] | None = None

    @property
    def done(self) -> list[Message]:
        return sorted(self._done, key=lambda message: message.sequence_number)

    def stopped(self, why: object) -> OperationStopped:
        total = len(self._done) + len(self._refusals) + len(self.left)
        return OperationStopped(f"Stopped after {len(self._done)} of {total} messages: {why}", self.done)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """What goes wrong for now stops the operation, which says what it has done."""
        try:
            yield
        except OperationStopped:
            raise
        except ServiceBusUnavailable as error:
            raise self.stopped(error) from error

    async def find(self, which: Selection, shows_progress: bool = False) -> list[Message]:
        """Look for the messages that are asked for, without locks: at all, or where the numbers are."""
        found: list[Message] = []
        numbers = None if which.numbers is None else sorted(which.numbers, reverse=True)
        number = 1
        with self._stopping():
            async with AzureBrowser(self._bus, self._queue) as browser:
                while numbers is None or numbers:
                    count = PEEKED_AT_ONCE if numbers is None else len(numbers)
                    page = await browser.page(number if numbers is None else numbers[-1], count)
                    if not page:
                        break
                    found += filter(which.has, page)
                    number = page[-1].sequence_number + 1
                    while numbers and numbers[-1] < number:
                        numbers.pop()
                    if shows_progress:
                        self._on_progress(len(found))
        self.left = {message.sequence_number: message for message in found}
        return found

    async def cancel(self) -> bool:
        """Delete what is scheduled, by its numbers; whether some of it was due meanwhile."""
        numbers = [number for number, message in self.left.items() if message.state is MessageState.SCHEDULED]
        missed = False
        with self._stopping():
            while numbers:
                async with self._bus.sender_link(self._queue) as link:
                    while numbers and link.works:
                        missed |= await self._cancel(link, numbers[:TAKEN_AT_ONCE])
                        numbers = numbers[TAKEN_AT_ONCE:]
                        self._on_progress(len(self._done))
        return missed

    async def _cancel(self, link: AzureLink, numbers: Sequence[int]) -> bool:
        """Cancel by one request, or, where one of them is due, each alone; whether that was so."""
        try:
            await link.request(link.sdk.cancel_scheduled_messages, list(numbers), timeout=ATTEMPT_TIMEOUT)
        except MessageNotFound:
            if len(numbers) > 1:
                return any([await self._cancel(link, [number]) for number in numbers])
            del self.left[numbers[0]]
            return True
        cancelled = [self.left.pop(number) for number in numbers]
        self._done += cancelled
        await asyncio.gather(*[self._bus.publish(self._outgoing_of(message)) for message in cancelled])
        return False

    async def receive(self) -> None:
        """Receive and delete, until nothing is left, or nothing more comes: `left` is then what somebody else holds.

        Raises:
            OperationStopped: no answer comes, too much else comes first, or something was refused.
        """
        if not self.left:
            return
        self._last = {number >> 48: number for number in sorted(self.left)}
        receiver = AzureReceiver(self._bus, self._held.discard, MAX_SECONDS, self._queue, expects_many=True)
        with self._stopping():
            await receiver.open()
            try:
                while self.left and await self._take(receiver):
                    if self.left and len(self._held) > MAX_HELD:
                        why = f"over {MAX_HELD} others come before the next, and Azure hands out none by its number"
                        raise self.stopped(why)
            finally:
                await asyncio.shield(asyncio.ensure_future(self._give_back(receiver)))

        # What has not come is in other hands, or gone; by ours, where the answer was lost.
        missing = self.left
        if missing:
            await self.find(Selection(frozenset(missing), None))
            self._done += [missing[number] for number in self._doubtful & missing.keys() - self.left.keys()]
        for refusal in self._refusals:
            raise self.stopped(f"{len(self._refusals)} were refused, such as: {refusal}") from refusal

    async def _take(self, receiver: AzureReceiver) -> bool:
        """Receive some, and settle those that were asked for; whether there may be more."""
        self._receiving = asyncio.ensure_future(receiver.receive(TAKEN_AT_ONCE, 0))
        await self._answer_to(self._receiving, receiver)
        deliveries, self._receiving = self._receiving.result(), None
        settlements = [settlement for delivery in deliveries if (settlement := self._settlement_of(delivery))]
        self._settling = asyncio.ensure_future(self._settle(settlements, receiver))
        await self._answer_to(self._settling, receiver)
        errors = [error for settlement in settlements if (error := self._note(settlement)) is not None]
        if settlements:
            self._on_progress(len(self._done))
        for error in errors:
            raise error

        # What waits comes by its number: when later ones come than all that were asked for, a worker has what is left.
        numbers = [delivery.sequence_number for delivery in deliveries]
        in_order = not self._queue.endswith(DEAD_LETTER_SUFFIX)
        all_later = in_order and all(number > self._last.get(number >> 48, number) for number in numbers)
        return bool(deliveries) and not all_later

    async def _answer_to(self, asking: asyncio.Future[Any], receiver: AzureReceiver) -> None:
        """Wait for it, but not for ever; whoever is cancelled meanwhile leaves it to `_give_back`."""
        await asyncio.wait([asking], timeout=OPERATION_PATIENCE)
        if not asking.done():
            raise self.stopped(f"no answer for {OPERATION_PATIENCE} s ({receiver.trouble})")

    def _settlement_of(self, delivery: Delivery) -> Settlement | None:
        """What to do with a message; None if it is only held."""
        self._held.add(delivery)
        message = self.left.get(delivery.sequence_number)
        if message is None:
            return None
        try:
            messages = self._outgoing_of(message)
            if any(each.session is None for each in messages) and delivery.raw.body_type.value != "data":
                raise RequestRefused(f"its body is an AMQP {delivery.raw.body_type.value}, and would go back as text")
            for outgoing in messages:
                if (size := self._bus.size(outgoing)) > (limit := self._bus.max_message_bytes):
                    raise MessageTooLarge(f"it makes a message of {size} bytes, the limit is {limit}")
        except UsageError as error:
            self._refuse(message, error)
            return None
        self._held.discard(delivery)
        return Settlement(delivery, Action.COMPLETE, messages=messages)

    async def _settle(self, settlements: Sequence[Settlement], receiver: AzureReceiver) -> None:
        """Publish what is to be published, then delete; each notes its error."""
        sending = [self._bus.publish(settlement.messages) for settlement in settlements]
        for settlement, sent in zip(settlements, await asyncio.gather(*sending, return_exceptions=True), strict=True):
            settlement.error = sent if isinstance(sent, Exception) else None
        await receiver.complete([settlement for settlement in settlements if settlement.error is None])

    def _note(self, settlement: Settlement) -> Exception | None:
        """What became of a message; the error, if it is one for all."""
        number = settlement.delivery.sequence_number
        match settlement.error:
            case None:
                self._done.append(self.left.pop(number))
            case MessageLockLost():
                self._doubtful.add(number)
            case MessageTooLarge() | RequestRefused():
                self._held.add(settlement.delivery)
                self._refuse(self.left[number], settlement.error)
            case _:
                return settlement.error
        return None

    def _refuse(self, message: Message, error: Exception) -> None:
        del self.left[message.sequence_number]
        self._refusals.append(error)
        logger.warning("Message stays as it is sequence_number=%s: %s", message.sequence_number, error)

    async def _give_back(self, receiver: AzureReceiver) -> None:
        """Let what is under way end, release what is held, and close."""
        under_way = [asking for asking in (self._receiving, self._settling) if asking is not None]
        if under_way:
            await asyncio.wait(under_way, timeout=CLOSE_TIMEOUT)
        receiving = self._receiving
        if receiving is not None and not receiving.cancel() and not receiving.cancelled() and not receiving.exception():
            self._held.update(receiving.result())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await receiver.release(self._held)
        await receiver.close()


# ======================================================================================================================
# 10. Tracing: OpenTelemetry, when asked for
# ======================================================================================================================


class Tracing:
    """Spans for publishing and processing, by OpenTelemetry's conventions for messaging.

    https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/. What the program's propagators inject (by
    default the W3C trace context and baggage) travels in the message's application properties, so that a task's span is
    a child of its publisher's.
    """

    def __init__(self, bus: ServiceBus) -> None:
        try:
            from opentelemetry import context, propagate, trace
        except ImportError as error:
            raise ConfigurationError(
                "enable_opentelemetry=True needs opentelemetry-api: pip install opentelemetry-api."
            ) from error
        self._bus = bus
        self._context, self._propagate, self._trace = context, propagate, trace
        self._tracer = trace.get_tracer("boilermaker", __version__)

    def publishing(self, task: Task, queue: str, message_id: str) -> tuple[Span, Mapping[str, str]]:
        """A PRODUCER span, to be ended when the message is sent, and the properties that carry it."""
        span = self._tracer.start_span(
            f"publish {task.function_name}",
            kind=self._trace.SpanKind.PRODUCER,
            attributes=self._attributes("publish", "send", task, queue, message_id),
        )
        properties: dict[str, str] = {}
        self._propagate.inject(properties, self._trace.set_span_in_context(span))
        return span, properties

    @contextlib.contextmanager
    def processing(self, run: Run, task: Task) -> Iterator[None]:
        """A CONSUMER span around a run, child of the publisher's and in its context, with the error of the run."""
        queue, delivery = self._bus.queue_name, run.delivery
        token = self._context.attach(self._propagate.extract(dict(delivery.application_properties)))
        try:
            with self._tracer.start_as_current_span(
                f"process {task.function_name}",
                kind=self._trace.SpanKind.CONSUMER,
                attributes=self._attributes("process", "process", task, queue, delivery.message_id or ""),
            ) as span:
                yield
                if run.error is not None:
                    span.record_exception(run.error)
                    span.set_status(self._trace.StatusCode.ERROR, describe(run.error))
        finally:
            self._context.detach(token)

    def _attributes(self, name: str, kind: str, task: Task, queue: str, message_id: str) -> dict[str, str | int]:
        return {
            "messaging.system": self._bus.system,
            "messaging.destination.name": queue,
            "messaging.operation.name": name,
            "messaging.operation.type": kind,
            "messaging.message.id": message_id,
            "boilermaker.function_name": task.function_name,
            "boilermaker.task_id": task.task_id,
            "boilermaker.attempts": task.attempts.attempts,
        }


def _end_span(span: Span, kind: object, error: BaseException | None, trace: object) -> None:
    if error is not None:
        span.record_exception(error)
    span.end()


# ======================================================================================================================
# 11. Schedules: when periodic tasks are due, and how each worker publishes them
# ======================================================================================================================

# A tick is one time of a schedule. There is no leader: each worker publishes the ticks of the near future, as scheduled
# messages under ids that are the same whoever does it, and the bus keeps one of each. So all depends on an id being
# remembered for as long as somebody may send it again. The bus remembers it for its window W, from the sending on. A
# tick that is due at d is sent from d - W/2 on at the earliest, and so remembered until d + W/2 at least; at the latest
# it is sent at d + W/4, by a worker that makes up for it. What lies between is for clocks that differ and for sends
# that take long: W/4, two and a half minutes of ten.

AHEAD, BEHIND = 1 / 2, 1 / 4
"""How far in the future ticks are published, and how far in the past they are made up for, in windows of the bus."""

MOST_TICKS = 100
"""Ticks of a schedule that are published ahead at most."""

RARE = (
    "rarer than every %g s, half of the queue's window of duplicate detection: for each tick a worker has to be there "
    "within that time before it. Where there may be none, make the window longer (duplicate_detection=), or let KEDA's "
    "cron trigger start one"
)

TICKER_PAUSE = 10.0
"""Seconds between two looks at the clock at most, which somebody may set meanwhile."""

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Every:
    """The times that are so far apart, counted from the Unix epoch, so that all workers agree on them."""

    interval: datetime.timedelta

    def __post_init__(self) -> None:
        if not isinstance(self.interval, datetime.timedelta):
            raise UsageError(f"every={_short(self.interval)} must be a timedelta, such as timedelta(minutes=5).")
        if not 1 <= self.interval.total_seconds() <= MAX_SECONDS:
            raise UsageError(f"every={self.interval!r} must be at least a second, and at most {MAX_SECONDS}.")

    def __str__(self) -> str:
        return f"every {self.interval}"

    @property
    def timezone(self) -> datetime.tzinfo:
        return datetime.UTC

    def after(self, moment: datetime.datetime) -> Iterator[datetime.datetime]:
        """All times after a moment, in UTC."""
        for count in itertools.count((moment - EPOCH) // self.interval + 1):
            yield EPOCH + count * self.interval


@dataclass(frozen=True, slots=True)
class Cron:
    """The times of a cron expression of five fields, by the clocks of a time zone, with Debian cron's rules.

    Where clocks are set forward, what was to run in the time that is skipped runs right after it; where they are set
    back, what is shown twice counts once. But an expression whose minutes or hours begin with a star only goes by what
    clocks show: by what they show twice, twice; by what they skip, not at all.
    """

    expression: str
    zone: str = "UTC"

    def __post_init__(self) -> None:
        fields = self.expression.split() if isinstance(self.expression, str) else ()
        if len(fields) != 5:
            raise UsageError(
                f"cron={_short(self.expression)} must have five fields: minute, hour, day of the month, month, day of "
                "the week; for seconds there is every=timedelta(seconds=...)."
            )
        _time_zone(self.zone)
        try:
            first = next(self.after(_utc(time.time())), None)
        except ConfigurationError:
            raise
        except Exception as error:
            raise UsageError(f"cron={self.expression!r} is no cron expression, or never comes: {error}.") from error
        if first is None:
            raise UsageError(f"cron={self.expression!r} never comes: no date of the next 50 years matches it.")

    def __str__(self) -> str:
        return f"cron {self.expression!r} {self.zone}"

    @property
    def timezone(self) -> datetime.tzinfo:
        return _time_zone(self.zone)

    def after(self, moment: datetime.datetime) -> Iterator[datetime.datetime]:
        """All times after a moment, in UTC."""
        try:
            from cronsim import CronSim
        except ImportError as error:
            raise ConfigurationError(f"cron={self.expression!r} needs a package: pip install cronsim.") from error
        plain = EPOCH + (moment - EPOCH)  # of subclasses some, such as freezegun's, forget which of two 02:30 they are
        for match in CronSim(self.expression, plain.astimezone(self.timezone)):
            tick = match.astimezone(datetime.UTC)
            if tick > moment:  # where clocks show a time again, cronsim means the first, though it asked for the second
                yield tick


def _time_zone(name: str) -> datetime.tzinfo:
    """A time zone by its name; UTC also where there is no time zone data."""
    import zoneinfo

    if name == "UTC":
        return datetime.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UsageError(
            f"timezone={_short(name)} is not known here: give a name such as 'Europe/Berlin'. Where the system has no "
            "time zone data, as on Windows and in small images, pip install tzdata."
        ) from error


When: TypeAlias = Cron | Every


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A workflow that is published again and again.

    Args:
        name: tells it from others, in its ticks' ids too.
        workflow: what each tick is a copy of.
        when: its times.
        of_registration: it came with `@app.task`, and goes when the function is registered anew without.
    """

    name: str
    workflow: Task
    when: When
    of_registration: bool = False

    def next_times(self, count: int, after: datetime.datetime | None = None) -> list[datetime.datetime]:
        """Its next times, in its time zone.

        Args:
            after: an aware datetime; now if None.
        """
        times = self.when.after(_utc(time.time()) if after is None else after.astimezone(datetime.UTC))
        return [each.astimezone(self.when.timezone) for each in itertools.islice(times, count)]

    def is_rare(self, id_window: float) -> bool:
        """Whether it ends where no worker is, as RARE says: none of its ticks may be on the queue then."""
        return is_rarer_than(self.when, datetime.timedelta(seconds=AHEAD * id_window), _utc(time.time()))

    def tick(self, when: datetime.datetime) -> Task:
        """What is published for one of its times, by whichever worker: with the id that all give it."""
        task = self.workflow.copy()
        task.task_id = tick_id(self.name, when)
        return task


def tick_id(name: str, when: datetime.datetime) -> str:
    """The task's and the message's id of a tick; where the name is too long for that, of a digest of the name."""
    utc = when.astimezone(datetime.UTC).isoformat()
    message_id = f"cron:{name}:{utc}"
    return message_id if len(message_id) <= MAX_MESSAGE_ID_LENGTH else f"cron:{derived_id(name)}:{utc}"


def when_of(cron: str | None, every: datetime.timedelta | None, timezone: str) -> When | None:
    """The times of a declaration, None of one without any.

    Raises:
        UsageError: both are given, or one that makes no sense.
        ConfigurationError: a package is missing.
    """
    if cron is not None and every is not None:
        raise UsageError(f"Both cron={cron!r} and every={every!r} are given: choose one.")
    if cron is not None:
        return Cron(cron, timezone)
    if timezone != "UTC":
        raise UsageError(f"timezone={_short(timezone)} goes with cron=; every= is counted from the Unix epoch, in UTC.")
    return None if every is None else Every(every)


# -- which ticks to publish


def ticks_within(when: When, since: datetime.datetime, until: datetime.datetime) -> list[datetime.datetime]:
    """The ticks after one moment and up to another; MOST_TICKS at most."""
    return list(itertools.islice(itertools.takewhile(until.__ge__, when.after(since)), MOST_TICKS))


def latest_tick(when: When, since: datetime.datetime, until: datetime.datetime) -> datetime.datetime | None:
    """The last tick from one moment to another; looked for a minute back, then further and further."""
    back, before = datetime.timedelta(minutes=1), since - datetime.timedelta.resolution
    while True:
        start = max(before, until - back)
        ticks = list(itertools.takewhile(until.__ge__, when.after(start)))
        if ticks or start == before:
            return ticks[-1] if ticks else None
        back *= 4


class ScheduleProgress(NamedTuple):
    """How far a worker is with a schedule: the ticks up to `published` are; the next are looked for at `look_at`."""

    published: datetime.datetime
    look_at: datetime.datetime


def first_progress(when: When, now: datetime.datetime, window: datetime.timedelta) -> ScheduleProgress:
    """Where a worker begins that starts: right before the latest tick, if that is not too old to be made up for."""
    latest = latest_tick(when, now - BEHIND * window, now)
    return ScheduleProgress(now if latest is None else latest - datetime.timedelta.resolution, now)


def ticks_to_publish(
    when: When, published: datetime.datetime, now: datetime.datetime, window: datetime.timedelta
) -> list[datetime.datetime]:
    """The ticks that are due soon and not published yet, and those before them that are not too old."""
    oldest = now - BEHIND * window
    late = ticks_within(when, max(published, oldest - datetime.timedelta.resolution), now)
    soon = ticks_within(when, now, now + AHEAD * window)
    return [tick for tick in late + soon if tick > published][:MOST_TICKS]


def next_progress(
    when: When, published: datetime.datetime, now: datetime.datetime, window: datetime.timedelta
) -> ScheduleProgress:
    """When to publish more: as soon as the next tick is near enough, so that there is always one on the queue where no
    worker is left; but of many at once, when half of those are due that are there."""
    following = next(when.after(published), None)
    if following is None:
        return ScheduleProgress(published, datetime.datetime.max.replace(tzinfo=datetime.UTC))
    return ScheduleProgress(published, max(following - AHEAD * window, now + (published - now) / 2))


def is_rarer_than(when: When, span: datetime.timedelta, now: datetime.datetime) -> bool:
    """Whether more than so much time lies between two ticks: of the next hundred, or, by samples, of the next month."""
    hours, days = datetime.timedelta(hours=1), datetime.timedelta(days=1)
    samples = [now + n * hours for n in range(24)] + [now + n * days for n in range(1, 32)]
    gaps = itertools.chain(
        (next(when.after(sample), sample + 2 * span) - sample for sample in samples),
        (later - tick for tick, later in itertools.pairwise(itertools.islice(when.after(now), MOST_TICKS))),
    )
    return any(gap > span for gap in gaps)


class Ticker:
    """Publishes the ticks of an application's schedules for one worker: what it has published, not again.

    Raises:
        ConfigurationError: the queue would not keep one of each.
    """

    def __init__(self, app: Boilermaker) -> None:
        seconds = app.service_bus_client.id_window
        if not seconds:
            raise ConfigurationError(
                f"{app.service_bus_client!r} has no duplicate detection (duplicate_detection=0), which keeps one of "
                "each tick that several workers publish. Make the queue with it, or run(schedules=False)."
            )
        self._app = app
        self._window = datetime.timedelta(seconds=seconds)
        self._pause = datetime.timedelta(seconds=min(TICKER_PAUSE, seconds / 8))
        self._progress: dict[Schedule, ScheduleProgress] = {}

    async def run(self) -> None:
        """Publish what is due soon, from time to time, until cancelled."""
        pause = await self.publish()
        await self._name_rare_ones()
        while True:
            await asyncio.sleep(pause)
            pause = await self.publish()

    async def publish(self) -> float:
        """Publish what is due soon; the seconds until there is more. What fails is logged, and tried again."""
        look_at, available = _utc(time.time()) + self._pause, True
        for schedule in list(self._app.schedules.values()):
            now = _utc(time.time())
            try:
                progress = self._progress[schedule] = self._progress_of(schedule, now)
                if progress.look_at <= now and available:
                    ticks = ticks_to_publish(schedule.when, progress.published, now, self._window)
                    await self._app.publish_ticks(schedule, ticks)
                    published = ticks[-1] if ticks else max(progress.published, now)
                    progress = self._progress[schedule] = next_progress(schedule.when, published, now, self._window)
                look_at = min(look_at, progress.look_at)
            except ServiceBusUnavailable as error:  # for the others too, which only begin
                logger.warning("Ticks of %s are not published, will try again: %s", schedule.name, error)
                available = False
            except Exception as error:
                logger.error("Ticks of %s cannot be published, will try again: %s", schedule.name, error)
        pause = (look_at - _utc(time.time())).total_seconds() if available else self._pause.total_seconds()
        return min(max(pause, 0), self._pause.total_seconds())

    def _progress_of(self, schedule: Schedule, now: datetime.datetime) -> ScheduleProgress:
        """Where this worker is; where the clock was set back so far that its future is another one: anew, from now on.

        A smaller step changes nothing: what is published is, and the ids keep others from doing it again.
        """
        progress = self._progress.get(schedule) or first_progress(schedule.when, now, self._window)
        if progress.published - now <= self._window:
            return progress
        logger.warning("The clock was set back: ticks of %s begin anew", schedule.name)
        return ScheduleProgress(now, now)

    async def _name_rare_ones(self) -> None:
        """Say which schedules end when no worker is there for long."""
        rare, seconds = [], self._window.total_seconds()
        for schedule in list(self._app.schedules.values()):
            if schedule.is_rare(seconds):
                rare.append(schedule.name)
            await asyncio.sleep(0)
        if rare:
            logger.info(f"Schedules %s are {RARE}", ", ".join(rare), AHEAD * seconds)


# ======================================================================================================================
# 12. Worker: receive, run, settle, shut down
# ======================================================================================================================

MAX_WAIT = 1.0
"""Seconds that one receive waits at most, after which a worker looks around."""

BURST_PAUSE = 0.05
"""Seconds after which a worker that is to end when all is done looks for more, while its last tasks run."""

STOP_PATIENCE = 2.0
"""Seconds that a cancelled task may take to end, and a last settlement, before a worker ends without it."""

LONGEST_TURN = 0.01
"""Seconds for which messages are begun one after the other, before the event loop has its turn."""

LONGEST_BLOCK = 1.0
"""Seconds for which the event loop may not have had its turn before the log says what keeps it."""

SIGNAL_GAP = 0.5
"""Seconds within which a second signal is the same one: a terminal's to the group, and the supervisor's."""

AWAITING_PER_PLACE = 10
"""Tasks that may await results, for each that may run."""

MOST_KEPT = 2_000
"""Dead letters that a worker on a dead-letter queue holds which it leaves as they are."""


class Phase(enum.StrEnum):
    """Where a worker is between its start and its end."""

    CONNECTING = "connecting"
    WORKING = "working"
    RECONNECTING = "reconnecting"
    STOPPING = "stopping"


class Worker:
    """One `app.run()`: keeps up to `concurrency` tasks running, and settles what has ended.

    A turn of the pump settles all that has finished and receives as many as there are free slots, both at the same
    time: on the local bus they become one transaction.
    """

    def __init__(
        self,
        app: Boilermaker,
        *,
        concurrency: int,
        burst: bool,
        grace_period: float,
        max_renewal: float,
        max_deliveries: int | None,
        schedules: bool,
    ) -> None:
        self._app = app
        self._bus = app.service_bus_client
        self._queue, self._home = app.service_bus_client.queue_name, app.queue_name
        self._concurrency = concurrency
        self._burst = burst
        self._grace_period = grace_period
        self._max_renewal = max_renewal
        self._most_deliveries = self._suspect_from = MAX_SECONDS
        if not self._queue.endswith(DEAD_LETTER_SUFFIX):  # how often those were delivered was counted before they died
            self._most_deliveries = max_deliveries or MAX_SECONDS
            self._suspect_from = max(3, math.ceil((max_deliveries or self._bus.max_delivery_count or MAX_SECONDS) / 2))
        self._receiver: Receiver | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._waiting: collections.deque[Delivery] = collections.deque()
        self._together = 1
        self._suspects: list[Delivery] = []
        self._suspects_until = 0.0
        self._alone: Run | None = None
        self._running: dict[Delivery, Run] = {}
        self._awaiting: collections.Counter[Task | None] = collections.Counter()
        self._going_on: collections.deque[tuple[Task, asyncio.Future[None]]] = collections.deque()
        self._place_freed = asyncio.Event()
        self._place_freed.set()
        self._finished: list[Run] = []
        self._settling: set[asyncio.Future[None]] = set()
        self._kept: dict[Delivery, Run] = {}
        self._schedules = schedules
        self._wake = asyncio.Event()
        self._dry = False
        self._cut_off = False  # the last receive has failed
        self._signalled: float | None = None
        self._stopping = False
        self._in_haste = False
        self._failure: Exception | None = None
        self.state: Any = None
        self.started = False
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Task[None]

    async def run(self) -> None:
        """Work until a signal, until stopped or cancelled, or, in a burst, until there is nothing to do.

        The work is a task of its own, so that whoever cancels this one, even at every await as anyio's cancel scopes
        do, only ends the grace period: it returns when what was left has been given back.
        """
        self._owner, cancelled = asyncio.current_task(), False
        self.ended = self.loop.create_task(self._work())
        self._app.workers.add(self)
        try:
            with _signals.told_to(self._on_signal, self.loop):
                while not self.ended.done():
                    try:
                        await asyncio.wait([self.ended])
                    except asyncio.CancelledError:
                        cancelled = True
                        self._abandon()
        finally:
            self._app.workers.discard(self)
        if cancelled and (self.ended.cancelled() or self.ended.exception() is None):
            raise asyncio.CancelledError
        self.ended.result()

    async def _work(self) -> None:
        """Open, work within the lifespan, close; what goes wrong is in the log too, since nobody may await the run."""
        lifespan = self._app.lifespan
        try:
            ticker = Ticker(self._app) if self._schedules and self._app.schedules else None
            self._receiver = await self._bus.open_receiver(self._lock_lost, self._max_renewal, self._suspect_from)
            try:
                async with contextlib.nullcontext() if lifespan is None else lifespan(self._app) as state:
                    self.state = self._app.state if state is None else state
                    with _watched(self):
                        cancelled = await self._serve(ticker)
            finally:
                await self._wait([self.loop.create_task(self._receiver.close())])
                for settling in list(self._settling):
                    settling.cancel()
        except Exception as error:
            what = "was ended by an error" if self.started else "cannot start"
            logger.error(
                "Worker of %r %s: %s", self._bus, what, error, exc_info=not isinstance(error, BoilermakerError)
            )
            raise
        logger.info("Worker ended: %r", self._bus)
        if self._failure is not None:
            raise self._failure
        if cancelled:
            raise asyncio.CancelledError

    async def _serve(self, ticker: Ticker | None) -> bool:
        """Pump and tick, until told to end; whether by who cancels all tasks, as asyncio.run does at its end."""
        names, ticking, cancelled = self._app.task_names, None, False
        self.started = True
        logger.info("Worker started: %r, concurrency=%d, tasks: %s", self._bus, self._concurrency, ", ".join(names))
        if not names:
            logger.warning("No task is registered: import the modules that register some before app.run()")
        try:
            if ticker is not None:
                if self._burst:
                    await ticker.publish()  # what is due now counts as there
                ticking = self.loop.create_task(ticker.run())
            await self._pump()
        except asyncio.CancelledError:
            cancelled = True
            self._abandon()
        if ticking is not None:
            ticking.cancel()
            await self._wait([ticking], STOP_PATIENCE)
        await self._end()
        return cancelled

    @property
    def running(self) -> int:
        """How many tasks run."""
        return len(self._running)

    @property
    def concurrency(self) -> int:
        """How many tasks may run at the same time."""
        return self._concurrency

    @property
    def phase(self) -> Phase:
        """Where it is between its start and its end; may be asked from another thread."""
        if self._stopping:
            return Phase.STOPPING
        if self._receiver is None or not self.started:
            return Phase.CONNECTING
        return Phase.WORKING if self._receiver.connected and not self._cut_off else Phase.RECONNECTING

    def stop(self) -> None:
        """Take no more, and end when what runs has ended, or the grace period is over."""
        self._stopping = True
        self._wake.set()

    def _abandon(self) -> None:
        """Give back what runs, at once."""
        self._in_haste = True
        self.stop()
        if not self.started and not self.ended.cancelling():  # it is still being opened
            self.ended.cancel()

    def _on_signal(self, number: int) -> None:
        """The first signal stops the worker, the second ends the grace period."""
        name = signal.Signals(number).name
        if self._signalled is None:
            self._signalled = self.loop.time()
            logger.warning(
                "Received %s: shutting down; tasks running: %d, for %g s at most; a second signal ends them at once",
                *(name, len(self._running), self._grace_period),
            )
            self.stop()
        elif self.loop.time() - self._signalled > SIGNAL_GAP:
            logger.warning("Received %s: ending at once", name)
            self._in_haste = True
            self.stop()

    # -- the pump

    async def _pump(self) -> None:
        while not self._stopping:
            self._wake.clear()
            free = self._free_places() - len(self._waiting)
            if self._suspects:
                self._run_suspect()
            elif self._may_receive() and free > 0:
                self._receiving = self.loop.create_task(self._receive(free))
            self._settle_finished()  # it is asked for before the other, and begins after it: both in one transaction
            await self._wake.wait()

    def _may_receive(self) -> bool:
        """Not beside a suspect, unless that awaits a result, which may be of what is to be received."""
        beside_suspect = self._alone is not None and self._alone.task not in self._awaiting
        busy = self._receiving is not None or beside_suspect or len(self._settling) >= self._concurrency
        return not busy and not self._dry

    async def _receive(self, free: int) -> None:
        """Begin with what comes; in a burst, see whether anything will."""
        assert self._receiver is not None
        was_idle = self._is_idle()
        try:
            deliveries = await self._receiver.receive(free, 0 if self._burst else MAX_WAIT)
            self._cut_off = False
            self._waiting += deliveries
            await self._begin_waiting()
            if self._burst and not deliveries:
                self._stopping = self._stopping or was_idle
                self._dry = True  # until something has ended here, or a moment has passed
                self.loop.call_later(BURST_PAUSE, self._look_again)
        except UsageError as error:
            logger.error("Worker of %r cannot go on: %s", self._bus, error)
            self._failure = error
            self.stop()
        except Exception as error:
            self._cut_off = True
            logger.error("Receiving from %r failed, will try again: %s", self._bus, error)
            await asyncio.sleep(MAX_WAIT)
        finally:
            self._receiving = None
            if not self.loop.is_closed():  # as where a coroutine is thrown away that was never ended
                self._wake.set()

    def _look_again(self) -> None:
        self._dry = False
        self._wake.set()

    def _is_idle(self) -> bool:
        return not (self._running or self._finished or self._settling or self._suspects)

    async def _begin_waiting(self) -> None:
        """Begin with what was received: as many at once as do not keep the event loop from its turn for long."""
        while self._waiting and not self._stopping:
            if self._free_places() <= 0:  # a task that awaited a result was first
                self._place_freed.clear()
                await self._place_freed.wait()
                continue
            began = self.loop.time()
            for _ in range(min(self._together, len(self._waiting), self._free_places())):
                delivery = self._waiting.popleft()
                if self._suspect_from <= delivery.delivery_count < self._most_deliveries:
                    self._set_aside(delivery)
                else:
                    self._start(Run(delivery))
                if self.loop.time() - began > LONGEST_TURN:
                    break
            if self._waiting or self._together < self._concurrency:
                await asyncio.sleep(0)  # where tasks do not begin at once, they do now
            in_time = self.loop.time() - began < LONGEST_TURN
            self._together = min(2 * self._together, self._concurrency) if in_time else 1

    def _start(self, run: Run) -> None:
        """Give a message an asyncio task of its own, which begins at once where Python can."""
        self._running[run.delivery] = run
        if self.loop.get_task_factory() is None and sys.version_info >= (3, 12):
            run.asyncio_task = asyncio.Task(self._process(run), loop=self.loop, eager_start=True)
        else:
            run.asyncio_task = self.loop.create_task(self._process(run))

    # -- places: a task that awaits a result gives up its own, which may be for what it waits for

    def _free_places(self) -> int:
        return self._concurrency - len(self._running) + len(self._awaiting)

    async def wait_for(self, waiting: Coroutine[Any, Any, T], task: Task) -> T:
        """Wait, for a task of this worker, while another runs in its place; it goes on before what is new begins."""
        if not any(run.task is task for run in self._running.values()):  # it has ended, but for something it began
            return await waiting
        if task not in self._awaiting and len(self._awaiting) >= AWAITING_PER_PLACE * self._concurrency:
            waiting.close()
            raise UsageError(
                f"{len(self._awaiting)} tasks of this worker await results, {AWAITING_PER_PLACE} times its "
                "concurrency, so no more may: a chain, a | b.s(), hands on a result without waiting."
            )
        self._awaiting[task] += 1
        self._places_changed()
        self._look_again()
        try:
            result = await waiting
        except BaseException:  # without a result, as by its timeout, it goes on at once
            self._stop_awaiting(task)
            raise
        await self._take_place(task)
        return result

    async def _take_place(self, task: Task) -> None:
        """Go on with a result when there is a place, unless the task awaits others too, or has ended meanwhile."""
        if self._awaiting[task] != 1 or self._free_places() > 0:
            self._stop_awaiting(task)
            return
        place: asyncio.Future[None] = self.loop.create_future()
        self._going_on.append((task, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._stop_awaiting(task)
            raise

    def _stop_awaiting(self, task: Task) -> None:
        self._awaiting[task] -= 1
        if self._awaiting[task] <= 0:
            del self._awaiting[task]

    def _places_changed(self) -> None:
        """Let those go on that have their results; then what was received begins."""
        while self._going_on and self._free_places() > 0:
            task, place = self._going_on.popleft()
            if not place.done():
                self._stop_awaiting(task)
                place.set_result(None)
        if self._free_places() > 0:
            self._place_freed.set()  # for what was received

    # -- suspects: messages that were delivered often and never settled, since they may be what ends workers

    def _set_aside(self, delivery: Delivery) -> None:
        """To run when nothing else does."""
        logger.warning(
            "Suspect sequence_number=%s: delivered %d times and never settled; it runs alone",
            *(delivery.sequence_number, delivery.delivery_count),
        )
        if not self._suspects:
            lock_left = max(delivery.locked_until - time.time(), 0)
            self._suspects_until = self.loop.time() + lock_left
            self.loop.call_later(lock_left, self._wake.set)
        self._suspects.append(delivery)

    def _run_suspect(self) -> None:
        """Run one of them, if all else has ended; give them back where that takes longer than a lock lasts."""
        others_run = len(self._running) > len(self._awaiting)
        if self._receiving is None and not (others_run or self._finished or self._settling):
            self._alone = Run(self._suspects.pop(random.randrange(len(self._suspects))))
            self._start(self._alone)
        elif self._alone is None and self.loop.time() >= self._suspects_until:
            limit = min(self._most_deliveries, self._bus.max_delivery_count or MAX_SECONDS)
            for delivery in [each for each in self._suspects if each.delivery_count + 1 < limit]:
                logger.warning("Suspect given back sequence_number=%s: others still run", delivery.sequence_number)
                self._give_back(Run(delivery))  # which counts as a delivery: not the last one, unrun
                self._suspects.remove(delivery)

    # -- one message

    async def _process(self, run: Run) -> None:
        """From a message to its settlement, which is left with the pump."""
        delivery = run.delivery
        try:
            try:
                run.task = decode(delivery.body, self._home)
            except InvalidTaskFormat as error:
                run.outcome, run.error = Outcome.UNDECODABLE, error
            else:
                run.task.sequence_number, run.task.message_id = delivery.sequence_number, delivery.message_id
                run.task._app, run.task._worker, run.task._due = self._app, self, delivery.due
                run.registration = self._app.registration(run.task.function_name)
                _current_task.set(run.task)
                if self._app.tracing is not None:
                    with self._app.tracing.processing(run, run.task):
                        await self._call(run)
                        self._conclude(run)
                else:
                    await self._call(run)
            if run.settlement is None:
                self._conclude(run)
        except Exception:  # such as one of a log handler
            run.settlement = run.settlement or Settlement(delivery, Action.LEAVE)  # again when its lock has run out
            with contextlib.suppress(Exception):
                logger.exception("Internal error sequence_number=%s", delivery.sequence_number)
        assert run.settlement is not None
        if self._running.pop(delivery, None) is not None:  # else the worker has ended without it
            self._finished.append(run)
            if run.settlement.action is Action.KEEP:
                self._keep(run)
        if self._awaiting or self._going_on or not self._place_freed.is_set():
            self._awaiting.pop(run.task, None)  # where what it began still awaits
            self._places_changed()
        if self._alone is run:
            self._alone = None
        self._wake.set()

    async def _call(self, run: Run) -> None:
        """Call the function, unless something speaks against it; whatever it does, the worker goes on."""
        task, registration = run.task, run.registration
        assert task is not None
        run.outcome = self._objection(run, task)
        if run.outcome is not None or registration is None:
            return
        if not task.acks_late and not await self._complete_early(run):
            return
        self._log(logging.INFO, run, "Begin Task")
        started, allowed = time.perf_counter(), (task.policy, task.attempts)
        try:
            if registration.timeout is None and not self._app.middlewares:
                result = await registration.function(self.state, *task.args, **task.kwargs)
            else:
                result = await self._call_within(registration, task)
            run.result = None if result is None else self._checked(result, task)
            run.outcome = Outcome.FAILED if result is TaskFailureResult else Outcome.RETURNED
        except BaseException as error:
            task.policy, task.attempts = allowed  # whatever the function did to them
            run.outcome, run.error = outcome_of(task, error, registration), error
            if isinstance(error, asyncio.CancelledError) and self._program_ends():
                run.stopped = run.stopped or Outcome.STOPPED
        if run.stopped is Outcome.LOCK_LOST or (run.stopped is not None and run.outcome is not Outcome.RETURNED):
            run.outcome, run.error = run.stopped, None
        run.seconds = time.perf_counter() - started

    async def _call_within(self, registration: Registration, task: Task) -> Any:
        """Call the function through all middleware, for no longer than its timeout."""

        async def call_next() -> Any:
            return await registration.function(self.state, *task.args, **task.kwargs)

        call: Callable[[], Coroutine[Any, Any, Any]] = call_next
        for middleware in reversed(self._app.middlewares):
            call = functools.partial(middleware, task, self.state, call)
        try:
            async with asyncio.timeout(registration.timeout) as limit:
                return await call()
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"{registration.name} ran into its timeout of {registration.timeout:g} s") from error
            raise

    def _objection(self, run: Run, task: Task) -> Outcome | None:
        """How the run ends before it begins, if it does."""
        delivery = run.delivery
        run.began = time.time()
        if run.registration is None:
            run.error = UsageError(f"{task.function_name!r} is not registered: import its module before run().")
            return Outcome.UNREGISTERED
        run.registration.fill_in(task)
        if delivery.locked_until <= run.began:  # somebody else may have it
            return Outcome.LOCK_LOST
        if delivery.delivery_count >= self._most_deliveries:
            run.error = BoilermakerError(f"It was delivered {delivery.delivery_count} times, never settled.")
            return Outcome.KILLER
        if task.expires is not None and run.began - delivery.due > task.expires:
            late = run.began - delivery.due
            run.error = BoilermakerError(
                f"It was to begin {late:.3g} s after it was due, and expires after {task.expires:g}."
            )
            return Outcome.EXPIRED
        if not may_run(task):
            run.error = RetryException(f"no try left: {task.attempts.attempts} made, {task.policy}")
            return Outcome.NO_TRY_LEFT
        return None

    def _program_ends(self) -> bool:
        """Whether the worker is cancelled: `asyncio.run`, when it ends, cancels a task and its worker at once."""
        return self.ended.cancelling() > 0 or (self._owner is not None and self._owner.cancelling() > 0)

    async def _complete_early(self, run: Run) -> bool:
        """Complete the message of a task that is to run at most once; whether it may begin."""
        assert self._receiver is not None
        settlement = Settlement(run.delivery, Action.COMPLETE)
        try:
            await asyncio.wait([self._receiver.settle([settlement], durable=True)])
        except asyncio.CancelledError:
            run.outcome = run.stopped or Outcome.STOPPED
            return False
        if settlement.error is None:
            return True
        run.outcome = Outcome.LOCK_LOST
        if not isinstance(settlement.error, MessageLockLost):
            self._log(logging.ERROR, run, "Settling failed", ": %s", settlement.error)
        return False

    def _checked(self, result: Any, task: Task) -> Any:
        """What a task returned; a task among it is bound, and one that is published already has its own life."""
        if isinstance(result, RetryException):
            raise UsageError(f"{task.function_name} returned {_short(result)}: raise it.")
        if inspect.iscoroutine(result):
            result.close()
            raise UsageError(f"{task.function_name} returned {_short(result)}: await it.")
        if not isinstance(result, (Task, TaskFunction)):
            return result
        returned = _as_task(result)
        if returned.message_id is None:
            return self._app.bound(returned)
        if task.outcome_to is not None:
            raise UsageError(
                f"{returned!r} is published already, so its outcome is not that of {task.function_name}, which is "
                f"awaited: return {returned.function_name}.si(...), or await its result()."
            )
        if task.on_success is not None and _as_task(task.on_success).takes_result:
            raise UsageError(
                f"{returned!r} is published already and cannot take over: return {returned.function_name}.si(...)."
            )
        return returned

    def _conclude(self, run: Run) -> None:
        """Say what to do with the message, its follow-ups ready to be sent; then, in the log, how it went."""
        settlement = decide(run, self._queue)
        if settlement.follow_ups or settlement.answer is not None:
            try:
                self._prepare(settlement)
            except Exception as error:
                settlement = rejected(settlement, error, self._queue)
                with contextlib.suppress(Exception):
                    self._prepare(settlement)
        run.settlement = settlement
        if run.outcome is Outcome.RETURNED:
            self._log(logging.INFO, run, "Completed Task", " in %.5fs", run.seconds)
        else:
            self._log_outcome(run, settlement)
        if settlement.reason == FOLLOW_UP_REJECTED:
            self._log(logging.ERROR, run, "Follow-up rejected", ": %s", _printable(settlement.description))

    def _prepare(self, settlement: Settlement) -> None:
        """Make the messages that go with a settlement."""
        settlement.messages = [
            message
            for task, message_id, delay in settlement.follow_ups
            for message in self._app.messages_of(task, message_id, time.time() + delay if delay else None)
        ]
        if settlement.answer is not None:
            reply = self._bus.reply(settlement.answer)
            settlement.messages += [] if reply is None else [reply]

    # -- settling

    def _settle_finished(self) -> None:
        if self._finished:
            assert self._receiver is not None
            runs, self._finished = self._finished, []
            settling = self._receiver.settle([run.settlement for run in runs if run.settlement is not None])
            self._settling.add(settling)
            settling.add_done_callback(functools.partial(self._settled, runs))

    def _settled(self, runs: Sequence[Run], settling: asyncio.Future[None]) -> None:
        self._settling.discard(settling)
        self._look_again()
        for run in runs:
            settlement = run.settlement
            assert settlement is not None
            if settlement.error is not None:
                self._log(logging.ERROR, run, "Settling failed", ": %s", settlement.error)
            for message_id in settlement.dropped:
                self._log(logging.WARNING, run, "Follow-up dropped as a duplicate", " message_id=%s", message_id)
            if run.outcome is not None and self._app.settled_listeners:
                outcome = Outcome.LOCK_LOST if isinstance(settlement.error, MessageLockLost) else run.outcome
                waited = max(0.0, run.began - run.delivery.due) if run.began else 0.0
                for listener in self._app.settled_listeners:
                    try:
                        listener(run.task, outcome, run.seconds, waited)
                    except Exception:
                        logger.exception("What on_settled was given has failed: %r", listener)

    def _keep(self, run: Run) -> None:
        """Hold a dead letter that stays one until the worker ends: given back now, it would be received at once."""
        self._kept[run.delivery] = run
        if len(self._kept) == MOST_KEPT:
            logger.error("Worker of %r ends: it holds %d dead letters that it leaves alone", self._bus, MOST_KEPT)
            self.stop()

    def _give_back(self, run: Run) -> None:
        run.settlement = Settlement(run.delivery, Action.ABANDON)
        self._finished.append(run)
        self._wake.set()

    def _lock_lost(self, delivery: Delivery) -> None:
        if delivery in self._running:
            self._stop_task(self._running[delivery], Outcome.LOCK_LOST)
        self._kept.pop(delivery, None)

    def _stop_task(self, run: Run, outcome: Outcome) -> None:
        run.stopped = run.stopped or outcome
        if run.asyncio_task is not None:
            run.asyncio_task.add_done_callback(functools.partial(self._see_whether_it_began, run))
            run.asyncio_task.cancel()

    def _see_whether_it_began(self, run: Run, ended: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step does nothing at all, not even `_process`."""
        if self._running.get(run.delivery) is run and run.settlement is None and run.stopped is not None:
            del self._running[run.delivery]
            run.settlement = Settlement(run.delivery, run.stopped.action)
            self._finished.append(run)
            self._places_changed()
            self._wake.set()

    # -- the end

    async def _end(self) -> None:
        """Take no more, let what runs come to its end for a while, and give back what is left."""
        assert self._receiver is not None
        if self._receiving is not None:
            if not self._receiving.cancelling():  # a second time would keep it from giving back what just arrived
                self._receiving.cancel()
            await self._wait([self._receiving], MAX_WAIT + STOP_PATIENCE)
        for delivery in [*self._waiting, *self._suspects]:
            self._give_back(Run(delivery))
        self._waiting.clear()
        self._suspects.clear()

        # The grace period.
        deadline = self.loop.time() + self._grace_period
        while not self._is_idle() and not self._in_haste and (left := deadline - self.loop.time()) > 0:
            self._wake.clear()
            self._settle_finished()
            waking = self.loop.create_task(self._wake.wait())
            await self._wait([waking], left)
            waking.cancel()

        # What is left is given back.
        for run in list(self._running.values()):
            self._stop_task(run, Outcome.STOPPED)
        await self._wait([run.asyncio_task for run in self._running.values() if run.asyncio_task], STOP_PATIENCE)
        for run in list(self._running.values()):
            self._log(logging.ERROR, run, "Would not stop")
            held = (run.task is None or run.task.acks_late) and run.stopped is Outcome.STOPPED
            run.settlement = Settlement(run.delivery, Action.ABANDON if held else Action.LEAVE)
            self._finished.append(run)
        self._running.clear()
        self._places_changed()  # for what tasks began and left awaiting
        self._settle_finished()
        for run in self._kept.values():
            self._give_back(Run(run.delivery, run.task))
        self._settle_finished()
        await self._wait(self._settling, STOP_PATIENCE)
        if self._settling:
            logger.error("A settlement did not end: its messages will be delivered again when their locks run out.")

    async def _wait(self, futures: Iterable[asyncio.Future[Any]], timeout: float = math.inf) -> None:
        """Wait for all, for so long, however often it is cancelled: that only ends the grace period."""
        deadline = self.loop.time() + timeout
        while (pending := [future for future in futures if not future.done()]) and self.loop.time() < deadline:
            try:
                await asyncio.wait(pending, timeout=min(deadline - self.loop.time(), MAX_SECONDS))
            except asyncio.CancelledError:
                self._abandon()

    # -- the log

    def _log(
        self, level: int, run: Run, text: str, rest: str = "", *args: Any, error: BaseException | None = None
    ) -> None:
        """A line about a message, with fields for who reads them by machine; `current_task()` is its task meanwhile."""
        if not logger.isEnabledFor(level):
            return
        task, delivery = run.task, run.delivery
        fields: dict[str, Any] = {
            "queue": self._queue,
            "sequence_number": delivery.sequence_number,
            "delivery_count": delivery.delivery_count,
        }
        if task is not None:
            fields |= {"task": task.function_name, "task_id": task.task_id, "attempt": task.attempts.attempts + 1}
            text, args = f"[%s] {text}", (_printable(task.function_name), delivery.sequence_number, *args)
        else:
            args = (delivery.sequence_number, *args)
        token = None if task is None else _current_task.set(task)
        try:
            traced = None if error is None or error.__traceback__ is None else error  # only what was raised has one
            logger.log(level, f"{text} sequence_number=%s{rest}", *args, extra=fields, exc_info=traced)
        finally:
            if token is not None:
                _current_task.reset(token)

    def log_what_blocks(self, frame: types.FrameType | None) -> None:
        """Name the task whose function is running in a thread that stands still, with where it is."""
        where, run = "".join(traceback.format_stack(frame, 5)), None
        while frame is not None and run is None:
            run = frame.f_locals.get("run") if frame.f_code is Worker._call.__code__ else None
            frame = frame.f_back
        if isinstance(run, Run):
            what = "Blocks the event loop"
            self._log(logging.WARNING, run, what, " for over %g s: is it to run in a thread?\n%s", LONGEST_BLOCK, where)
        else:
            logger.warning(
                "The event loop has been blocked for over %g s, tasks running: %d\n%s",
                LONGEST_BLOCK,
                self.running,
                where,
            )

    def _log_outcome(self, run: Run, settlement: Settlement) -> None:
        """How a run ended that did not return."""
        task, outcome, error = run.task, run.outcome, run.error
        assert outcome is not None
        match outcome:
            case Outcome.UNDECODABLE:
                self._log(logging.ERROR, run, "Invalid task", ": %s", error)
            case Outcome.RETRY if task is not None and settlement.follow_ups:
                retry, (again, _, delay) = _retry_in(error), settlement.follow_ups[0]
                tries = ((retry and retry.policy) or task.policy or DEFAULT_POLICY).max_tries
                why = _message_of(error) if retry is error and error is not None else describe(error)
                self._log(
                    *(logging.WARNING, run, "Retry", " [attempt %d of %d] in %g s: %s"),
                    *(again.attempts.attempts, tries, delay, _printable(why)),
                )
            case Outcome.STOPPED:
                held = task is None or task.acks_late
                fate = "given back" if held else "not to run again, as acks_late=False"
                self._log(logging.WARNING, run, f"Stopped with the worker, {fate}")
            case Outcome.LOCK_LOST:
                held = task is None or task.acks_late
                again_text = "it will run again" if held else "it may not run again, as acks_late=False"
                self._log(logging.ERROR, run, f"Lock lost, {'cancelled' if run.stopped else 'not begun'}: {again_text}")
            case _:
                kept = ", left as it is" if settlement.action is Action.KEEP else ""
                self._log(
                    *(logging.ERROR, run, f"Task {outcome.text}{kept}", ": %s", _printable(describe(error))),
                    error=error,
                )


@contextlib.contextmanager
def _watched(worker: Worker) -> Iterator[None]:
    """Say in the log which task keeps the event loop from its turn: a thread asks it for an answer, while tasks run."""
    loop, ended, thread_of_loop = worker.loop, threading.Event(), threading.get_ident()

    def watch() -> None:
        while not ended.wait(LONGEST_BLOCK):
            turned = threading.Event()
            if worker.running:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(turned.set)
                    if not turned.wait(LONGEST_BLOCK) and not ended.is_set():
                        worker.log_what_blocks(sys._current_frames().get(thread_of_loop))
                    while not turned.wait(LONGEST_BLOCK) and not ended.is_set() and not loop.is_closed():
                        pass

    watcher = threading.Thread(target=watch, name="boilermaker-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


class _Signals:
    """Tells the workers of the main thread of SIGINT and SIGTERM, where the program has set no handler of its own."""

    def __init__(self) -> None:
        self._listeners: dict[Callable[[int], None], asyncio.AbstractEventLoop] = {}
        self._previous: dict[int, Any] = {}
        self._mask: set[int] | None = None

    @contextlib.contextmanager
    def told_to(self, listener: Callable[[int], None], loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
            yield
            return
        self._listeners = {each: its for each, its in self._listeners.items() if not its.is_closed()} | {listener: loop}
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(number)
            if number not in self._previous and _is_default(previous):
                self._previous[number] = previous
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._listeners.pop(listener, None)
            if not self._listeners:
                self.give_back()

    def _handle(self, number: int, frame: object) -> None:
        for listener, loop in list(self._listeners.items()):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(listener, number)

    def give_back(self) -> None:
        """Restore what was there, unless somebody else has set a handler since."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
        self._previous.clear()
        self._listeners.clear()

    # A forked child has what was there at once. Signals wait until then: a fork makes Python forget those that its own
    # handlers have not seen to.

    def before_fork(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._previous) if self._previous else None

    def after_fork_in_parent(self) -> None:
        if self._mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def after_fork_in_child(self) -> None:
        self.give_back()
        self.after_fork_in_parent()


def _is_default(handler: Any) -> bool:
    """Whether a signal handler is the system's, Python's or `asyncio.run`'s."""
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return handler in (signal.SIG_DFL, signal.default_int_handler) or isinstance(owner, asyncio.Runner)


_signals = _Signals()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_signals.before_fork,
        after_in_parent=_signals.after_fork_in_parent,
        after_in_child=_signals.after_fork_in_child,
    )


# ======================================================================================================================
# 13. Application: registering, publishing, operating
# ======================================================================================================================


Middleware: TypeAlias = Callable[[Task, Any, Callable[[], Coroutine[Any, Any, Any]]], Coroutine[Any, Any, Any]]
MiddlewareT = TypeVar("MiddlewareT", bound=Middleware)
SettledListener: TypeAlias = Callable[[Task | None, Outcome, float, float], object]
SettledListenerT = TypeVar("SettledListenerT", bound=SettledListener)


class Boilermaker:
    """Tasks, the state they share, and the queue they go through.

    Args:
        state: any object; every task gets it as its first argument.
        service_bus_client: a `LocalServiceBus` or an `AzureServiceBus`.
        enable_opentelemetry: trace publishing and processing; needs opentelemetry-api.
        lifespan: a function of the application that gives an async context manager. Each `run` enters its own, when
            the bus is open and before the first message, and leaves it after the last settlement. What it yields is the
            state of that worker's tasks; None for `state`. Who only publishes never enters it.

    `async with app:` closes the bus at the end.
    """

    def __init__(
        self,
        state: Any,
        service_bus_client: ServiceBus,
        enable_opentelemetry: bool = False,
        *,
        lifespan: Callable[[Boilermaker], contextlib.AbstractAsyncContextManager[Any]] | None = None,
    ) -> None:
        if isinstance(service_bus_client, type) or not hasattr(service_bus_client, "open_receiver"):
            of_azure = type(service_bus_client).__module__.startswith("azure.")
            hint = " Give that one's settings to AzureServiceBus(namespace_url, queue_name)." if of_azure else ""
            raise UsageError(
                f"service_bus_client={service_bus_client!r} must be a LocalServiceBus or an AzureServiceBus.{hint}"
            )
        if lifespan is not None and (not callable(lifespan) or _is_async(lifespan)):
            raise UsageError(
                f"lifespan={_short(lifespan)} must be a function of the application that gives an async context "
                "manager: decorate it with @contextlib.asynccontextmanager."
            )
        self.state = state
        self.lifespan = lifespan
        self.service_bus_client = service_bus_client
        self.queue_name = service_bus_client.queue_name.removesuffix(DEAD_LETTER_SUFFIX)
        """The queue to publish to: of an application that works on a dead-letter queue, the one it belongs to."""
        self.tracing = Tracing(service_bus_client) if enable_opentelemetry else None
        self.workers: set[Worker] = set()
        """Those that run now."""
        self.middlewares: list[Middleware] = []
        self.settled_listeners: list[SettledListener] = []
        self._registry: dict[str, Registration] = {}
        self._by_function: dict[Callable[..., Any], Registration] = {}
        self._schedules: dict[str, Schedule] = {}
        self._keeps_results = False

    async def __aenter__(self) -> Boilermaker:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the workers of this event loop, as `stop` does, then close the bus.

        Raises:
            UsageError: called by a task or a worker's lifespan, before which the worker cannot end.
        """
        if self._works_here():
            raise UsageError(
                "close() was called by a task, or a worker's lifespan, before the worker has ended: stop() asks that "
                "to end."
            )
        try:
            await self.stop()
        finally:
            await self.service_bus_client.close()

    # -- registering

    @overload
    def task(self, function: TaskCallable[P, R], /) -> TaskFunction[P, R]: ...

    @overload
    def task(
        self,
        /,
        *,
        every: datetime.timedelta | None = None,
        cron: str | None = None,
        timezone: str = "UTC",
        **options: Unpack[TaskOptions],
    ) -> Callable[[TaskCallable[P, R]], TaskFunction[P, R]]: ...

    def task(
        self,
        function: Any = None,
        /,
        *,
        every: datetime.timedelta | None = None,
        cron: str | None = None,
        timezone: str = "UTC",
        **options: Unpack[TaskOptions],
    ) -> Any:
        """Register an `async def` as a task: `@app.task`, `@app.task()` or `@app.task(policy=...)`.

        Args:
            every: a timedelta: publish it periodically, as `schedule` does under the task's name; or else
            cron: an expression of five fields, with
            timezone: by whose clocks.
            options: those of TaskOptions: `name`, `policy`, `should_dead_letter`, `acks_late`, `timeout`, `expires`,
                `retry_on`, `dont_retry_on`, `result_ttl`.

        Raises:
            UsageError: the name is taken, the function is not `async def`, or an option is wrong.
        """

        if isinstance(function, str):
            raise UsageError(f"Options are given by keyword: @app.task(name={function!r}).")

        when = when_of(cron, every, timezone)

        def decorate(function: TaskCallable[P, R]) -> TaskFunction[P, R]:
            registration = self._register(function, options)
            task: TaskFunction[P, R] = TaskFunction(self, registration)
            former = self._schedules.get(registration.name)
            if when is not None:
                self._add_schedule(registration.name, task, when, of_registration=True)
            elif former is not None and former.of_registration:
                del self._schedules[registration.name]
            return task

        return decorate if function is None else decorate(function)

    def register_async(
        self, fn: TaskCallable[..., Any] | TaskFunction[..., Any], **options: Unpack[TaskOptions]
    ) -> Boilermaker:
        """Register a function without changing it; options as for `task`. Returns the application."""
        self._register(fn, options)
        return self

    def register_many_async(
        self, fns: Iterable[TaskCallable[..., Any] | TaskFunction[..., Any]], **options: Unpack[TaskOptions]
    ) -> Boilermaker:
        """Register several functions with the same options, of which `name` cannot be one."""
        if "name" in options:
            raise UsageError("register_many_async: name= can be that of one function only: register it by itself.")
        for fn in _listed(fns, "register_many_async"):
            self._register(fn, options)
        return self

    def _register(self, function: Callable[..., Any], options: TaskOptions) -> Registration:
        if isinstance(function, TaskFunction):
            function = function.function
        registration = Registration.of(function, options)
        name = registration.name
        if name in self._registry:
            self._check_replacement(name, self._registry[name].function, function)
        self._registry[name] = self._by_function[function] = registration
        self._keeps_results = self._keeps_results or registration.result_ttl is not None
        logger.info("Registered background function fn=%s", name)
        return registration

    def _check_replacement(self, name: str, former: Callable[..., Any], function: Callable[..., Any]) -> None:
        """Allow what a notebook's cell does that is run twice, or a module that is reloaded; else the name is taken."""
        if former is function:
            raise UsageError(f"Function already registered: {name}, this very one. Leave out one of the two.")
        place, former_place = _place_of(function), _place_of(former)
        if place is None or former_place is None or not _is_anew(former, function):
            raise UsageError(f"Function already registered: {name}. Give one of the two another name with name='...'.")
        logger.warning("Registered anew: %s of %s replaces that of %s", name, place[2], former_place[2])

    def middleware(self, function: MiddlewareT) -> MiddlewareT:
        """Put an `async def m(task, state, call_next)` around every run of a worker, the first registered outermost.

        `await call_next()` gives the function's result, or raises its error; what the middleware returns or raises is
        the run's. It sees retries and the cancellation by a timeout; the message is settled after it.

        Raises:
            UsageError: it is not `async def`, or does not take these three.
        """
        name = getattr(function, "__name__", None) or _short(function)
        if not callable(function) or not _is_async(function) or inspect.isasyncgenfunction(function):
            raise UsageError(f"Middleware must be async: async def {name}(task, state, call_next).")
        try:
            inspect.signature(function, **_SIGNATURE_OPTIONS).bind(None, None, None)
        except TypeError as error:
            raise UsageError(f"Middleware {name} must take (task, state, call_next): {error}.") from None
        self.middlewares.append(function)
        return function

    def on_settled(self, listener: SettledListenerT) -> SettledListenerT:
        """Call `listener(task, outcome, seconds, waited)` after each settlement, for metrics.

        Args:
            listener: gets the task (None of a message that was none), its Outcome, the seconds it ran, and those
                between when it was due and when it began. It is called in the event loop, and is not to wait.
        """
        if not callable(listener) or _is_async(listener):
            raise UsageError(
                f"on_settled takes a function, not async, of (task, outcome, seconds, waited), not {_short(listener)}."
            )
        self.settled_listeners.append(listener)
        return listener

    @property
    def task_names(self) -> list[str]:
        """The names of what is registered."""
        return list(self._registry)

    def registration(self, name: str) -> Registration | None:
        """What is registered under a name; boilermaker-servicebus's connection test always is."""
        return self._registry.get(name) or _BUILT_IN.get(name)

    def _registration_of(self, function: Callable[..., Any] | None, name: str) -> Registration | None:
        """A function's registration: the one of that name, if it has several."""
        if function is None:
            return None
        registration = self._registry.get(name)
        if registration is not None and registration.function is function:
            return registration
        return self._by_function.get(function)

    # -- scheduling

    def schedule(
        self,
        workflow: TaskLike | TaskCallable[..., Any],
        /,
        *,
        cron: str | None = None,
        every: datetime.timedelta | None = None,
        timezone: str = "UTC",
        name: str | None = None,
    ) -> Schedule:
        """Publish a workflow periodically, once at each of its times, however many workers there are.

        Workers do so that know the schedule when they start, see `run`; any worker that knows the functions runs it.

        Args:
            workflow: the head of a workflow, or a registered function that needs no arguments.
            cron: five fields, minute, hour, day of the month, month, day of the week; needs the package cronsim.
            timezone: by whose clocks `cron` goes, as "Europe/Berlin".
            every: in place of `cron`, a timedelta of at least a second, counted from the Unix epoch.
            name: tells it from others, and must not change while workers are replaced; the head's function if None.

        Raises:
            UsageError: neither or both of `cron` and `every` are given, or one that is wrong or never comes; the name
                is taken; the workflow is not the head, needs arguments, or has a function that is not registered.
            ConfigurationError: cronsim is missing.
        """
        when = when_of(cron, every, timezone)
        if when is None:
            raise UsageError("A schedule needs one of cron='0 4 * * *' and every=timedelta(minutes=5).")
        return self._add_schedule(name, workflow, when)

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """What is published periodically, by name, to be read only."""
        return types.MappingProxyType(self._schedules)

    def _add_schedule(self, name: str | None, workflow: Any, when: When, of_registration: bool = False) -> Schedule:
        try:
            if callable(workflow) and not isinstance(workflow, TaskFunction):
                head = self._new_task(workflow, (), {}, None)
                _check_arguments(head)
            else:
                head = _as_task(workflow, "What is scheduled")
        except InvalidArguments as error:
            raise InvalidArguments(
                f"{error} A schedule gives no arguments: app.schedule(fn.si(...), ...) binds them."
            ) from None
        _check_beginning(head)
        for task in _workflow(head):
            _check_fields(task)
        name = head.function_name if name is None else name
        if not isinstance(name, str) or not name:
            raise UsageError(f"name={_short(name)} of a schedule must be a string that is not empty.")
        schedule = Schedule(name, self.bound(head.copy()), when, of_registration)
        _check_arguments(self.bound(schedule.tick(EPOCH)))
        former = self._schedules.get(name)
        if former is not None:
            if not _is_anew(former.workflow._function, head._function):
                raise UsageError(f"Schedule already there: {name}. Give one of the two another name with name='...'.")
            logger.warning("Scheduled anew: %s, %s replaces %s", name, when, former.when)
        self._schedules[name] = schedule
        logger.info("Scheduled %s, %s", name, when)
        return schedule

    # -- making tasks

    @overload
    def create_task(
        self,
        fn: TaskFunction[..., Task[T]] | TaskCallable[..., Task[T]],
        /,
        *args: Any,
        policy: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Task[T]: ...

    @overload
    def create_task(
        self,
        fn: TaskFunction[..., T] | TaskCallable[..., T],
        /,
        *args: Any,
        policy: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Task[T]: ...

    def create_task(self, fn: Any, /, *args: Any, policy: RetryPolicy | None = None, **kwargs: Any) -> Task[Any]:
        """A task that is not sent yet.

        Args:
            fn: a decorated or a registered function.
            policy: overrides the registration's.

        Raises:
            UsageError: `fn` is not registered here.
            InvalidArguments: the arguments do not fit `fn`, or JSON cannot carry them.
        """
        task = self._new_task(fn, args, kwargs, policy)
        _check_arguments(task)
        return task

    def _new_task(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], policy: RetryPolicy | None) -> Task:
        function = fn.function if isinstance(fn, TaskFunction) else fn
        name = fn.registration.name if isinstance(fn, TaskFunction) else ""
        if not callable(function):
            raise UsageError(
                f"What is to be run must be a function, not {_short(fn)}: a Task is published by publish_task, "
                "a task known by name alone by send_task."
            )
        registration = self._registration_of(function, name)
        if registration is None:
            raise _unregistered(getattr(fn, "__name__", repr(fn)))
        if isinstance(fn, TaskFunction):
            task = fn._call(args, kwargs)
        else:
            task = Task(function_name=registration.name, args=list(args), kwargs=kwargs)
        task._app, task._function = self, function
        task.policy = _checked_policy(registration.name, policy) or task.policy
        return task

    def chain(self, *tasks: TaskLike, on_failure: TaskLike | None = None) -> Task[Any]:
        """Link two or more tasks, or chains, by `on_success`; the first, which is the one to publish.

        Args:
            on_failure: the callback of each step; without it each keeps its own.
        """
        if len(tasks) < 2:
            hint = " Pass them one by one: app.chain(*tasks)." if tasks and isinstance(tasks[0], (list, tuple)) else ""
            raise UsageError(f"A chain needs at least two tasks, not {len(tasks)}.{hint}")
        members = [_as_task(task) for task in tasks]
        _check_beginning(members[0])
        failure = None if on_failure is None else _as_task(on_failure, "on_failure")
        for member, following in itertools.pairwise(members):
            if following is member:
                raise UsageError(f"{member!r} is in the chain twice in a row: use copy().")
            steps = _chain_of(member)
            if following not in steps:
                _check_beginning(following)
                steps[-1].on_success = following
        for step in _chain_of(members[0]):
            step.on_failure = failure or step.on_failure
        _workflow(members[0])  # the callback of a failure may close a circle too
        return members[0]

    # -- publishing

    @overload
    async def apply_async(
        self,
        fn: TaskFunction[..., Task[T]] | TaskCallable[..., Task[T]],
        /,
        *args: Any,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int | None = None,
        policy: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Task[T]: ...

    @overload
    async def apply_async(
        self,
        fn: TaskFunction[..., T] | TaskCallable[..., T],
        /,
        *args: Any,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int | None = None,
        policy: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Task[T]: ...

    async def apply_async(
        self,
        fn: Any,
        /,
        *args: Any,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int | None = None,
        policy: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Task[Any]:
        """Make a task and publish it: `create_task` and `publish_task` in one.

        It has the options it had, since each takes a name from the function's own arguments; `fn.options()` has all.
        """
        task = self._new_task(fn, args, kwargs, policy)
        [published] = await self._publish([task], {"delay": delay, "eta": eta, "publish_attempts": publish_attempts})
        return published

    async def send_task(
        self,
        name: str,
        /,
        *args: Any,
        queue: str | None = None,
        on_success: TaskLike | None = None,
        on_failure: TaskLike | None = None,
        should_dead_letter: bool | None = None,
        policy: RetryPolicy | None = None,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int | None = None,
        expires: float | datetime.timedelta | None = None,
        task_id: str | None = None,
        result_ttl: float | datetime.timedelta | None = None,
        **kwargs: Any,
    ) -> Task[Any]:
        """Publish a task by its name alone, for another application to run.

        Args:
            name: what it is registered under there.
            queue: that application's queue; this one's own if None.
            on_success: published, to this application's queue, when it has returned; so is `on_failure` when it failed.
            should_dead_letter: keep it in that queue's dead-letter queue if it fails; None: as it is registered there.
            policy: overrides the policy of the registration there. The other options are those of PublishOptions.
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"send_task: name={_short(name)} must be the name a task is registered under.")
        task = Task(function_name=name, args=list(args), kwargs=kwargs, should_dead_letter=should_dead_letter)
        task.queue = None if queue is None else _checked_queue_name(queue)
        task.on_success = None if on_success is None else _as_task(on_success, "on_success")
        task.on_failure = None if on_failure is None else _as_task(on_failure, "on_failure")
        options: PublishOptions = {
            "delay": delay,
            "eta": eta,
            "policy": policy,
            "publish_attempts": publish_attempts,
            "expires": expires,
            "task_id": task_id,
            "result_ttl": result_ttl,
        }
        [published] = await self._publish([task], options)
        return published

    @overload
    async def publish_task(
        self,
        task: TaskT,
        delay: float | datetime.timedelta | None = None,
        publish_attempts: int | None = None,
        **options: Unpack[_KeywordOptions],
    ) -> TaskT: ...

    @overload
    async def publish_task(
        self,
        task: TaskFunction[..., T],
        delay: float | datetime.timedelta | None = None,
        publish_attempts: int | None = None,
        **options: Unpack[_KeywordOptions],
    ) -> Task[T]: ...

    async def publish_task(
        self,
        task: TaskLike,
        delay: float | datetime.timedelta | None = None,
        publish_attempts: int | None = None,
        **options: Unpack[_KeywordOptions],
    ) -> Task[Any]:
        """Send a task; its `sequence_number` is set where the bus tells it.

        Args:
            task: the head of its workflow.
            delay: seconds from now, or a timedelta. The other options are `eta`, `policy`, `expires`, `task_id` and
                `result_ttl`, see PublishOptions.
            publish_attempts: how often to try, once if None.

        Raises:
            UsageError: an option is wrong; the task is not the head; a function of the workflow is not registered.
            InvalidArguments: the arguments do not fit the function, or JSON cannot carry them.
            MessageTooLarge: the message with all its callbacks is over the limit of the bus.
            BoilermakerAppException: no try worked; `.errors` holds the error of each.
        """
        [published] = await self._publish([task], {"delay": delay, "publish_attempts": publish_attempts, **options})
        return published

    async def publish_many(self, tasks: Iterable[TaskLike], **options: Unpack[PublishOptions]) -> list[Task]:
        """Send many tasks in order, in as few round trips as the bus allows; all are checked before the first is sent.

        Arguments and errors are those of `publish_task`, but for `task_id`, which is one task's. On the local bus it is
        all or nothing; on Azure a batch may fail after others were sent.
        """
        if options.get("task_id") is not None:
            raise UsageError("publish_many: task_id= can be that of one task only: fn.options(task_id=...).si(...).")
        return await self._publish(_listed(tasks, "publish_many"), options)

    async def _publish(self, tasks: Sequence[TaskLike], options: PublishOptions) -> list[Task]:
        """Check all, send all, and note what the bus says of each."""
        heads = [_as_task(task, "What is published") for task in tasks]
        name = heads[0].function_name if heads else ""
        checked = _merged_options({}, options, name)
        said = [_merged_options(head._publishing, checked, name) if head._publishing else checked for head in heads]
        groups = [head for head in heads if head.group is not None]
        if len(set(groups)) < len(groups):
            raise UsageError("A group that is to be published is there twice: use copy().")
        for head, its in zip(heads, said, strict=True):
            if head.group is not None:
                self._check_group(head, checked)
            self.bound(head)
            if its:
                _set_options(head, its)
            if self._keeps_results or "result_ttl" in its:
                self._keep_results(head, its)
        with contextlib.ExitStack() as spans:
            messages, sent, make = list[Outgoing](), list[tuple[str, int | None]](), self._maker(spans)
            for head, its in zip(heads, said, strict=True):
                # Of a group by a given id there may be several at a time: each has members of its own.
                message_id = new_task_id() if head.group is not None and head._id_is_given else head.task_id
                due = _due_time(its.get("delay"), its.get("eta"))
                some = messages_of(self.service_bus_client, make, head, message_id, due)
                if head._id_is_given:
                    some = _given_an_id(some, head.task_id)
                    some[0] = some[0]._replace(outcome_id=head.task_id)
                sent.append((message_id, len(messages) if some else None))  # none of an empty group without successor
                messages += some
            attempts = max((its.get("publish_attempts") or 1 for its in said), default=1)
            numbers = await self._send(messages, attempts, heads)
        for head, (message_id, place) in zip(heads, sent, strict=True):
            head.sequence_number, head.message_id = None if place is None else numbers[place], message_id
        return heads

    def _check_group(self, head: Task, options: PublishOptions) -> None:
        """Raise UsageError for what cannot be done with a group that is published."""
        if head.message_id is not None:
            raise UsageError(f"{head!r} is published already: what is to run once more is its copy().")
        for name in ("policy", "expires"):
            if name in options:
                raise UsageError(f"{head!r} does not run itself: {name}= is for its members, fn.options({name}=...).")
        if (head._id_is_given or "task_id" in options) and not self.service_bus_client.takes_group_ids:
            bus = self.service_bus_client
            raise UsageError(f"{head!r}: task_id= of a group is for the local bus only, not for {bus!r}.")

    def _keep_results(self, head: Task, options: PublishOptions) -> None:
        """Say where the outcomes of a workflow are told: its own, and those of what follows a failure, each its own."""
        callbacks = {id(task.on_failure): task.on_failure for task in _workflow(head) if task.on_failure is not None}
        for first in (*callbacks.values(), head):
            steps = [self._registration_of(step._function, step.function_name) for step in _steps_of(first)]
            ttls = [step.result_ttl for step in steps if step is not None and step.result_ttl is not None]
            given: Any = options.get("result_ttl") if first is head else None
            ttl = given or max(ttls, default=None)
            first.outcome_to = None if ttl is None else self.service_bus_client.address(first.task_id, ttl)

    async def publish_ticks(self, schedule: Schedule, times: Sequence[datetime.datetime]) -> None:
        """Publish a schedule's ticks of some times, unless the bus remembers that somebody has."""
        with contextlib.ExitStack() as spans:
            messages, make = list[Outgoing](), self._maker(spans)
            for when in times:
                tick = self.bound(schedule.tick(when))
                some = messages_of(self.service_bus_client, make, tick, tick.task_id, when.timestamp())
                messages += [message._replace(numbered=False) for message in _given_an_id(some, tick.task_id)]
            if messages:
                await self._send(messages, 1)

    def bound(self, head: Task) -> Task:
        """A workflow as this application would publish it: complete, and all its functions known.

        Raises:
            UsageError: the task is not the head, a function is not registered, or a queue cannot be sent to.
        """
        _check_beginning(head)
        for first in _beginnings_of(head) if head.group is not None or head.takes_result else ():
            _check_beginning(first)
            if first.takes_result:
                raise UsageError(
                    f"{first!r} was made by .s(), for a parent's result, but has no parent: make it by .si()."
                )
        single = head.on_success is None and head.on_failure is None and head.group is None
        for task in [head] if single else _workflow(head):
            _check_fields(task)
            registration = self._registration_of(task._function, task.function_name)
            if registration is not None:
                task.function_name, task._published = registration.name, registration.options
                _check_call(task, registration.function)
            elif task._function is not None and task.queue in (None, self.queue_name):
                raise _unregistered(task.function_name)
            if task.queue not in (None, self.queue_name):
                self.service_bus_client.check_queue(task.queue)
            if task._publishing and task is not head:
                name = next(iter(task._publishing))
                raise UsageError(f"{task!r} is a part of a workflow: {name}= is for the head of what is published.")
            task._app = task._app or self
        return head

    def messages_of(self, task: Task, message_id: str, due: float | None = None) -> list[Outgoing]:
        """What is to be sent for what follows another task."""
        return messages_of(self.service_bus_client, self._maker(None), self.bound(task), message_id, due)

    def _maker(self, spans: contextlib.ExitStack | None) -> Callable[[Task, str, float | None], Outgoing]:
        """What makes one task's message, traced if that is wanted.

        Args:
            spans: where a span that covers the sending is ended; if None, it covers only the making.
        """
        bus, home, tracing = self.service_bus_client, self.queue_name, self.tracing
        if tracing is None:
            return functools.partial(outgoing_of, bus, home)

        def make(task: Task, message_id: str, due: float | None) -> Outgoing:
            span, properties = tracing.publishing(task, task.queue or home, message_id)
            if spans is None:
                span.end()
            else:
                spans.push(functools.partial(_end_span, span))
            return outgoing_of(bus, home, task, message_id, due, properties)

        return make

    async def _send(self, messages: Sequence[Outgoing], attempts: int, heads: Sequence[Task] = ()) -> list[int | None]:
        """Send messages, ready to be told how the workflows of these heads end."""
        errors: list[Exception] = []
        ready = False
        while True:
            try:
                await self.service_bus_client.expect(heads)
                ready = True
                return await self.service_bus_client.send(messages)
            except (ServiceBusUnavailable, ConfigurationError) as error:
                if isinstance(error, ConfigurationError) and not ready:
                    raise  # a queue is missing, which no attempt will make
                errors.append(error)
                if len(errors) == attempts:
                    raise BoilermakerAppException("Publishing failed", errors) from error
                logger.warning("Publishing failed [attempt %d of %d]: %s", len(errors), attempts, error)
            await asyncio.sleep(min(0.1 * 2 ** len(errors), MAX_WAIT))

    # -- results

    async def result(self, task_id: str, timeout: float | datetime.timedelta | None) -> Any:
        """What the workflow returned whose head was published under an id: the value of its last step.

        It can be asked for as often as one likes until it expires, see `result_ttl` in TaskOptions: on the local bus by
        any process, on Azure by the one that published. A task that awaits a result lets another run in its place.

        Args:
            task_id: the `task_id` of what publishing gave.
            timeout: seconds, or a timedelta; None waits without end, 0 for what is there.

        Raises:
            TaskFailed: it has failed for good, or its message was removed; says how.
            TimeoutError: there is no outcome in that time; the task goes on. On the local bus also where there never
                was such a task.
            UsageError: on Azure, this process has not published it; or too many tasks of a worker await results.
        """
        if not _is_text(task_id):
            raise UsageError(f"task_id={_short(task_id)} must be that of a published task, a string.")
        return await self._result(self.service_bus_client.address_of(task_id), timeout)

    async def _result(self, address: Address, timeout: float | datetime.timedelta | None) -> Any:
        seconds = None if timeout is None else _seconds("timeout", timeout)
        waiting = self.service_bus_client.outcome(address, seconds)
        task = _current_task.get(None)
        worker = None if task is None else task._worker
        try:
            if task is not None and worker is not None and worker.loop is asyncio.get_running_loop() and seconds != 0:
                answer = await worker.wait_for(waiting, task)
            else:
                answer = await waiting
        except TimeoutError:
            raise TimeoutError(
                f"Task {_short(address.id)} has no outcome after {timeout} s: it waits or runs, its outcome is not "
                "kept (result_ttl=), or has expired."
            ) from None
        value = _from_json(answer.value)
        if answer.failed:
            raise TaskFailed(value)
        return value

    # -- operating: see the bus's methods of these names

    async def counts(self) -> Counts:
        """How many messages there are, by state."""
        return await self.service_bus_client.counts()

    async def counts_by_task(self) -> Mapping[str, TaskCounts]:
        """The same by the tasks' function names; under '' what is no task."""
        return await self.service_bus_client.counts_by_task()

    async def peek(
        self, max_message_count: int = 100, dead_letter: bool = False, sequence_number: int = 0
    ) -> list[Message]:
        """List messages by sequence number, from that one on, without locking them."""
        return await self.service_bus_client.peek(max_message_count, dead_letter, sequence_number)

    async def replay(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Run dead letters again."""
        return await self.service_bus_client.replay(which, dry_run, on_progress)

    async def discard(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete dead letters."""
        return await self.service_bus_client.discard(which, dry_run, on_progress)

    async def purge(
        self, which: Which, dry_run: bool = False, on_progress: Callable[[int], object] | None = None
    ) -> list[Message]:
        """Delete messages that wait or are scheduled."""
        return await self.service_bus_client.purge(which, dry_run, on_progress)

    async def cancel(self, sequence_number: int) -> None:
        """Take back a scheduled message, and, on the local bus, one that waits."""
        await self.service_bus_client.cancel(sequence_number)

    # -- working

    async def run(
        self,
        concurrency: int = 10,
        burst: bool = False,
        *,
        grace_period: float = 25,
        max_lock_renewal: float = 24 * 3600,
        max_deliveries: int | None = 9,
        schedules: bool | None = None,
    ) -> None:
        """Receive and run tasks until SIGINT or SIGTERM, until `stop`, or until cancelled.

        On a signal the worker takes no more, gives running tasks the grace period, and then gives their messages back;
        a second signal, half a second later or more, ends the grace period. It listens to a signal only where the
        program has no handler of its own: a web server has, and its lifespan's end calls `stop`. Cancelling gives the
        messages back at once. A lost connection is reconnected without end.

        Args:
            concurrency: how many tasks run at the same time.
            burst: end when nothing is waiting or running, here or due; what is scheduled for later, or held by another
                worker, is not waited for.
            grace_period: seconds; less than the 30 after which Kubernetes kills.
            max_lock_renewal: seconds after which a task that still runs is cancelled, to be delivered again.
            max_deliveries: after so many deliveries without a settlement a message is not run any more, since it has
                ended its workers, but dead-lettered, and `on_failure` published. One less than the queue's own limit at
                most, which would dead-letter it without. None: only that limit counts.
            schedules: publish what is to be published periodically; None: unless it is a burst, or works on dead
                letters.

        Raises:
            ConfigurationError: at the start, the queue, the credential or the file is not right; says what to do. Or,
                later, another program's file is in the place of the queue's.
            ServiceBusUnavailable: at the start, the bus cannot be reached.
        """
        if type(concurrency) is not int or concurrency < 1:
            raise UsageError(f"concurrency={concurrency!r} must be an int of at least 1.")
        _positive("max_lock_renewal", max_lock_renewal)
        _positive("grace_period", grace_period, or_zero=True)
        limit = self.service_bus_client.max_delivery_count
        if max_deliveries is not None:
            _count("max_deliveries", max_deliveries)
            max_deliveries = max_deliveries if limit is None else max(min(max_deliveries, limit - 1), 1)
        if schedules not in (None, True, False):
            raise UsageError(f"schedules={_short(schedules)} must be True, False or None.")
        on_dead_letters = self.service_bus_client.queue_name.endswith(DEAD_LETTER_SUFFIX)
        worker = Worker(
            self,
            concurrency=concurrency,
            burst=burst,
            grace_period=grace_period,
            max_renewal=max_lock_renewal,
            max_deliveries=max_deliveries,
            schedules=not (burst or on_dead_letters) if schedules is None else schedules,
        )
        await worker.run()

    async def stop(self) -> None:
        """End the workers of this event loop: they take no more, and give what runs their grace period.

        Returns when they have ended; called by a task of such a worker, it only asks.
        """
        workers = [worker for worker in list(self.workers) if worker.loop is asyncio.get_running_loop()]
        for worker in workers:
            worker.stop()
        if workers and not self._works_here():
            await asyncio.wait([worker.ended for worker in workers])

    def _works_here(self) -> bool:
        """Whether it is a task of one of our workers, or its lifespan, that calls."""
        task, caller = _current_task.get(None), asyncio.current_task()
        return (task is not None and task._worker in self.workers) or caller in [each.ended for each in self.workers]


def _place_of(function: Any) -> tuple[str, str, str] | None:
    """The module and the qualified name of a function, and its line for people; None of what has no name."""
    if not hasattr(function, "__qualname__"):
        return None
    code = inspect.unwrap(function).__code__
    return function.__module__, function.__qualname__, f"{code.co_filename}:{code.co_firstlineno}"


def _is_anew(former: Any, function: Any) -> bool:
    """Whether a function is another's new version: of a notebook's cell that ran twice, of a module's reload."""
    place, former_place = _place_of(function), _place_of(former)
    return (
        former is not function
        and place is not None
        and former_place is not None
        and place[:2] == former_place[:2]
        and "<locals>" not in place[1]
    )


def _unregistered(name: str) -> UsageError:
    return UsageError(
        f"Unregistered function: {name}. Decorate it with @app.task or use app.register_async({name}); "
        "for a function of another application, use app.send_task(name, ..., queue=...)."
    )


async def _debug_task(state: Any) -> int:
    """What boilermaker-servicebus publishes to see whether its connection works."""
    return 0


_BUILT_IN = {"debug_task": Registration("debug_task", _debug_task, Options())}


# ======================================================================================================================
# 14. Old names: the modules of the multi-file original
# ======================================================================================================================


class retries:
    """`from boilermaker import retries`, as in the original; the names are this module's own."""

    NoRetry: TypeAlias = NoRetry
    RetryAttempts: TypeAlias = RetryAttempts
    RetryException: TypeAlias = RetryException
    RetryExceptionDefault: TypeAlias = RetryExceptionDefault
    RetryExceptionDefaultExponential: TypeAlias = RetryExceptionDefaultExponential
    RetryExceptionDefaultLinear: TypeAlias = RetryExceptionDefaultLinear
    RetryMode: TypeAlias = RetryMode
    RetryPolicy: TypeAlias = RetryPolicy


for _old in ("app", "config", "failure", "retries", "service_bus", "task"):
    sys.modules[f"{__name__}.{_old}"] = sys.modules[__name__]
    globals().setdefault(_old, sys.modules[__name__])


# ======================================================================================================================
# 15. Command line: a worker, and what an operator asks of a queue
# ======================================================================================================================

# A sub-command is a function of the parsed arguments that gives an exit code; `_parser` says which arguments it has.
# What goes wrong in a way that a user can mend is a line on standard error, see `main`.

DONE, WRONG, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: all is well; something is wrong there; the command or the application is; no connection, or no access;
by Ctrl-C, as shells have it."""

EXIT_CODES = (
    ((MessageNotFound, OperationStopped), WRONG),
    ((ConfigurationError, ServiceBusUnavailable), UNREACHABLE),
)
"""Those of errors; of any other of ours it is USAGE."""

RESTART_PAUSE, LONGEST_RESTART_PAUSE = 0.5, 30.0
"""Seconds before a worker process that died is started again, at first and at most; it doubles each time."""

PAGE = 1000
"""Messages that are looked at by one peek."""

WAITER_TTL = 600
"""Seconds for which an outcome is kept that `publish --wait` waits for, where nothing else keeps it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `boilermaker`; its exit code.

    Args:
        arguments: those of the command line; the program's own if None.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    parser = _parser()
    args, more = parser.parse_known_args(arguments)
    if more and not ("numbers" in args and all(each.isdecimal() for each in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # numbers that follow an option
        args.numbers += map(int, more)
    try:
        if (elsewhere := _home_of(args)) is not sys.modules[__name__]:
            return int(elsewhere.main(arguments))  # of the copy that the application was made by
        exit_code: int = args.command(args)
        sys.stdout.flush()
        return exit_code
    except BoilermakerError as error:
        print(f"{args.program}: {error}", file=sys.stderr)
        return next((exit_code for kinds, exit_code in EXIT_CODES if isinstance(error, kinds)), USAGE)
    except KeyboardInterrupt:
        print("\nInterrupted: what was done is done, the rest is as it was.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads has read enough; nothing is left to be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _parser() -> argparse.ArgumentParser:
    import argparse

    program = __name__.rpartition(".")[2]
    app_help = "the application, as module:attribute (attribute app if left out)"
    bus_help = (
        "an application (module:attribute); or, without its code, a queue file (tasks.db, tasks.db#queue), or azure or "
        "azure:QUEUE, by the environment's SERVICE_BUS_NAMESPACE_URL or SERVICEBUS_CONNECTION_STRING"
    )
    parser = argparse.ArgumentParser(prog=program, description="Workers, and what an operator asks of a queue.")
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def seconds(text: str) -> float:
        try:
            return _positive("S", float(text), or_zero=True)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be seconds, 0 or more.") from None

    def span(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number with its unit: 90s, 30m, 2h or 7d.")
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]

    def count(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"{text!r} must be a number over 0.")
        return int(text)

    def add(name: str, command: Callable[..., object], text: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example: {program} {name} {example}",
        )
        added.set_defaults(command=command, program=f"{program} {name}")
        return added

    def add_filters(to: argparse.ArgumentParser, all_help: str) -> None:
        to.add_argument("--task", metavar="NAME", help="only messages of this task")
        to.add_argument("--all", action="store_true", help=all_help)
        to.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        to.add_argument("-y", "--yes", action="store_true", help="do not ask")

    worker = add("worker", _worker, "run an application's tasks", "myapp.tasks:app -c 20")
    worker.add_argument("app", metavar="APP", help=app_help)
    worker.add_argument("-c", "--concurrency", type=count, default=10, metavar="N", help="tasks at the same time (10)")
    worker.add_argument("--burst", action="store_true", help="end when nothing is left to do")
    worker.add_argument("--processes", type=count, default=1, metavar="N", help="worker processes (1)")
    worker.add_argument("--reload", action="store_true", help="start again when a .py file changes, for development")
    worker.add_argument("--grace-period", type=seconds, default=25, metavar="S", help="seconds for running tasks (25)")
    worker.add_argument("--no-schedules", action="store_true", help="publish no periodic tasks")
    worker.add_argument("--web", metavar="[HOST:]PORT", help="serve the page, the probes and metrics (127.0.0.1)")
    worker.add_argument("--auth", metavar="U:P", help="the page's user and password (or BOILERMAKER_WEB_AUTH)")
    worker.add_argument("--allow-host", metavar="H", action="append", default=[], help="a name that the page goes by")
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    worker.add_argument("--log-level", type=str.upper, choices=levels, default="INFO", help="of what is logged (INFO)")

    inspect_ = add("inspect", _command(_inspect), "count messages, by state and by task", "tasks.db --json")
    inspect_.add_argument("bus", metavar="BUS", help=bus_help)
    inspect_.add_argument("--task", metavar="NAME", help="only this task")
    inspect_.add_argument("-n", type=count, default=20, metavar="N", help="tasks to list at most (20)")
    inspect_.add_argument("--json", action="store_true", help="as one JSON object")
    inspect_.add_argument("--fail-on-dead", action="store_true", help="exit with 1 if there are dead letters")

    dead = add(
        "dead", _command(_dead), "look at dead letters, run them again or delete them", "tasks.db list --since 2h"
    )
    dead.add_argument("bus", metavar="BUS", help=bus_help)
    dead.add_argument("action", choices=("list", "show", "replay", "discard", "export"))
    dead.add_argument("numbers", metavar="NUMBER", type=int, nargs="*", help="sequence numbers of dead letters")
    dead.add_argument("--reason", metavar="R", help="only those of this reason, such as TaskFailed")
    dead.add_argument("--error", metavar="TEXT", help="only those with this text in their description")
    dead.add_argument("--since", type=span, metavar="2h", help="only those of the last 90s, 30m, 2h or 7d")
    dead.add_argument("-n", type=count, default=20, metavar="N", help="dead letters to list at most (20)")
    dead.add_argument("--json", action="store_true", help="one JSON object a line")
    add_filters(dead, "all that match, not only those of the given numbers; list: with no limit")

    publish = add("publish", _command(_publish), "publish a task", """myapp:app resize '["cat.png", 200]' --delay 60""")
    publish.add_argument("bus", metavar="APP|BUS", help=bus_help)
    publish.add_argument("name", metavar="NAME", help="the task's name")
    publish.add_argument(
        "arguments", metavar="ARGS_JSON", nargs="?", default="[]", help="a JSON array, or an object of keywords"
    )
    publish.add_argument("--delay", type=seconds, metavar="S", help="seconds from now")
    publish.add_argument(
        "--task-id", metavar="ID", help="an id of your own: a second publish of it is dropped for a while"
    )
    publish.add_argument(
        "--wait",
        type=seconds,
        nargs="?",
        const=math.inf,
        metavar="S",
        help="wait for the result, for S seconds if given, and print it as JSON; exit with 1 if there is none",
    )

    cancel = add("cancel", _command(_cancel), "take back messages that are scheduled, or wait", "tasks.db 17 18")
    cancel.add_argument("bus", metavar="BUS", help=bus_help)
    cancel.add_argument("numbers", metavar="NUMBER", type=int, nargs="+", help="their sequence numbers")

    purge = add("purge", _command(_purge), "delete messages that wait or are scheduled", "tasks.db --task resize --all")
    purge.add_argument("bus", metavar="BUS", help=bus_help)
    purge.add_argument("--scheduled", action="store_true", help="only scheduled messages")
    add_filters(purge, "needed, unless --dry-run")

    schedules = add("schedules", _schedules, "show periodic tasks and their next times", "myapp:app -n 5")
    schedules.add_argument("app", metavar="APP", help=app_help)
    schedules.add_argument("-n", type=count, default=3, metavar="N", help="times of each (3)")
    return parser


# -- what a command is about


def _home_of(args: argparse.Namespace) -> Any:
    """The module that the application's class comes from, by whatever name it was vendored; this one where none is."""
    args.application = None
    target = args.app if "app" in args else args.bus
    if "app" not in args and _is_no_application(target):
        return sys.modules[__name__]
    if args.command is _worker and args.reload:
        return sys.modules[__name__]  # its process loads it, again and again
    args.application = _load(target)
    for base in type(args.application).__mro__:
        home = sys.modules[base.__module__]
        if base.__name__ == "Boilermaker" and hasattr(home, "main"):
            return home
    raise UsageError(f"{target} is {_short(args.application)}, and no Boilermaker application.")


def named(target: str) -> Any:
    """The application, or the bus, that a command line names: APP or BUS."""
    return _open_bus(target) if _is_no_application(target) else _load(target)


def _is_no_application(bus: str) -> bool:
    path = bus.partition("#")[0]
    looks_like_a_file = os.sep in path or path.endswith((".db", ".sqlite", ".sqlite3")) or "#" in bus
    return bus.partition(":")[0] == "azure" or os.path.exists(path) or looks_like_a_file


def _load(target: str) -> Any:
    """An application, by `module:attribute`; what its own code raises is shown as if there were nothing of ours."""
    module_name, _, attribute = target.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.\w+)*(:\w+(\.\w+)*)?", target):
        raise UsageError(f"{target!r} is no file that is there, and no application: that is module:attribute.")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _of_the_application(target, error) from error
        raise UsageError(
            f"there is no module {module_name!r}, in this folder or installed, nor a file of that name. An application "
            "is given as module:attribute."
        ) from error
    except (Exception, SystemExit) as error:
        raise _of_the_application(target, error) from error
    for name in (attribute or "app").split("."):
        if not hasattr(found, name):
            raise UsageError(f"module {module_name!r} has no attribute {attribute or 'app'!r}.")
        found = getattr(found, name)
    return found


def _of_the_application(target: str, error: BaseException) -> UsageError:
    """The error of an application's own code, with its traceback from where its code begins."""
    where = error.__traceback__
    while where is not None and where.tb_frame.f_globals.get("__name__") in (__name__, "importlib", *_IMPORTING):
        where = where.tb_next
    traceback.print_exception(type(error), error.with_traceback(where), where, chain=True)
    return UsageError(f"{target} cannot be imported.")


_IMPORTING = ("importlib._bootstrap", "importlib._bootstrap_external")


def _open(args: argparse.Namespace) -> ServiceBus:
    """The bus that a command is about."""
    if args.application is not None:
        bus: ServiceBus = args.application.service_bus_client
        return bus
    return _open_bus(args.bus)


def _open_bus(bus: str) -> ServiceBus:
    """A bus that is named without an application."""
    kind, _, queue = bus.partition(":")
    if kind == "azure":
        return AzureServiceBus.from_config(Config(service_bus_queue_name=queue or None))
    path, _, queue = bus.partition("#")
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path!r}: a queue's file is made by who publishes to it.")
    connection = open_to_read(os.path.realpath(path))
    if connection is None:
        raise UsageError(f"{path!r} is empty, and no queue's file.")
    with contextlib.closing(connection):
        queues = read_queues(connection)
    if (queue or "tasks") not in queues:
        there = ", ".join(f"{path}#{name}" for name in queues if not name.endswith(DEAD_LETTER_SUFFIX)) or "none"
        raise UsageError(f"{path!r} has no queue {queue or 'tasks'!r}. There are: {there}.")
    return LocalServiceBus(
        path, queue or "tasks", **queues[queue or "tasks"]._asdict()
    )  # as it is: it keeps its settings


def _command(command: Callable[[argparse.Namespace, ServiceBus], Coroutine[Any, Any, int]]) -> Callable[..., int]:
    """A sub-command that opens a bus, and closes it."""

    async def run(args: argparse.Namespace) -> int:
        bus = _open(args)
        try:
            return await command(args, bus)
        finally:
            await bus.close()

    return lambda args: asyncio.run(run(args))


# -- looking


async def _inspect(args: argparse.Namespace, bus: ServiceBus) -> int:
    counts, by_task = await bus.counts(), dict(await bus.counts_by_task())
    if args.task is not None:
        by_task = {name: each for name, each in by_task.items() if name == args.task}
    if args.json:
        tasks = {name: dataclasses.asdict(each) for name, each in by_task.items()}
        print(json.dumps({**dataclasses.asdict(counts), "tasks": tasks}))
    else:
        running = "unknown" if counts.running is None else f"{counts.running:,}"
        oldest = "" if counts.oldest is None else f"; the oldest waits for {_span(counts.oldest)}"
        about = "" if counts.exact else " (as far as peeking shows)"
        print(
            f"{args.bus}: {counts.active:,} waiting, {running} running, {counts.scheduled:,} scheduled, "
            f"{counts.dead_letter:,} dead{about}{oldest}"
        )
        listed = sorted(by_task.items(), key=lambda item: (-item[1].dead_letter, -item[1].active, item[0]))
        _print_table(
            [("TASK", "WAITING", "RUNNING", "SCHEDULED", "DEAD", "OLDEST", "LAST ERROR")]
            + [
                (
                    *(name or "(no task)", each.active, "-" if each.running is None else each.running),
                    *(each.scheduled, each.dead_letter, "-" if each.oldest is None else _span(each.oldest)),
                    each.last_error or "",
                )
                for name, each in listed[: args.n]
            ],
        )
        if len(listed) > args.n:
            print(f"... and {len(listed) - args.n:,} more tasks: -n {len(listed)}")
    dead = counts.dead_letter if args.task is None else sum(each.dead_letter for each in by_task.values())
    return WRONG if args.fail_on_dead and dead else DONE


def _filter(args: argparse.Namespace) -> Callable[[Message], bool]:
    """Whether a message is one of those that the options name."""
    numbers, now = set(getattr(args, "numbers", ())), time.time()
    since, reason, error = (getattr(args, name, None) for name in ("since", "reason", "error"))

    def matches(message: Message) -> bool:
        died = message.dead_lettered_time_utc or message.enqueued_time_utc
        return (
            (not numbers or message.sequence_number in numbers)
            and (args.task is None or (message.task is not None and message.task.function_name == args.task))
            and (reason is None or message.dead_letter_reason == reason)
            and (error is None or error.lower() in (message.dead_letter_error_description or "").lower())
            and (since is None or (died is not None and died.timestamp() >= now - since))
            and (not getattr(args, "scheduled", False) or message.state is MessageState.SCHEDULED)
        )

    return matches


async def _matching(bus: ServiceBus, matches: Callable[[Message], bool]) -> list[Message]:
    """Dead letters, page by page."""
    found: list[Message] = []
    number = 0
    while page := await bus.peek(PAGE, dead_letter=True, sequence_number=number):
        found += filter(matches, page)
        number = page[-1].sequence_number + 1
    return found


async def _dead(args: argparse.Namespace, bus: ServiceBus) -> int:
    if args.action in ("replay", "discard"):
        operation = bus.replay if args.action == "replay" else bus.discard
        return await _change(args, operation, "dead letter", f"{args.action}ed")
    if args.action == "show" and not args.numbers:
        raise UsageError("show wants the number of a dead letter, or several; `list` has them.")
    found = await _matching(bus, _filter(args))
    if missing := set(args.numbers) - {message.sequence_number for message in found}:
        print(f"No such dead letter, or none that matches: {', '.join(map(str, sorted(missing)))}", file=sys.stderr)
    if args.action == "export" or args.json:
        for message in found:
            print(json.dumps(_document(message)))
    elif args.action == "show":
        for message in found:
            print(_in_full(message))
    else:
        _list_dead(found, len(found) if args.all else args.n)
    return WRONG if missing else DONE


def _list_dead(found: Sequence[Message], count: int) -> None:
    """Why they died, how many each, then the last of them."""
    if not found:
        print("No dead letter matches.")
        return
    causes: dict[tuple[str, ...], list[Message]] = {}
    for message in found:
        kind = (message.dead_letter_error_description or "").partition(":")[0]
        causes.setdefault((_name_of(message), message.dead_letter_reason or "", kind), []).append(message)
    _print_table(
        [("DEAD", "TASK", "REASON", "LAST ERROR")]
        + [
            (len(members), name, reason, members[-1].dead_letter_error_description or "")
            for (name, reason, _), members in sorted(causes.items(), key=lambda item: -len(item[1]))
        ]
    )
    print()
    _print_table(
        [("NUMBER", "DIED", "TASK", "ARGUMENTS", "ERROR")]
        + [
            (
                *(message.sequence_number, _moment(message.dead_lettered_time_utc), _name_of(message)),
                *(_arguments_of(message), message.dead_letter_error_description or message.dead_letter_reason or ""),
            )
            for message in found[-count:]
        ]
    )
    if len(found) > count:
        print(f"These are the last {count:,} of {len(found):,}: --all shows all.")


def _name_of(message: Message) -> str:
    return message.task.function_name if message.task is not None else "(no task)"


def _arguments_of(message: Message) -> str:
    task = message.task
    if task is None:
        return message.body
    words = [json.dumps(value) for value in task.args]
    return ", ".join(words + [f"{name}={json.dumps(value)}" for name, value in task.kwargs.items()])


def _document(message: Message) -> dict[str, Any]:
    """A message for other programs."""
    task = message.task
    times = ("enqueued_time_utc", "scheduled_enqueue_time_utc", "locked_until_utc", "dead_lettered_time_utc")
    moments = {name: getattr(message, name) for name in times}
    return {
        **{name: getattr(message, name) for name in ("sequence_number", "message_id", "state", "delivery_count")},
        "task": None if task is None else task.function_name,
        "task_id": None if task is None else task.task_id,
        "args": None if task is None else task.args,
        "kwargs": None if task is None else task.kwargs,
        **{name: moment and moment.isoformat() for name, moment in moments.items()},
        "dead_letter_reason": message.dead_letter_reason,
        "dead_letter_error_description": message.dead_letter_error_description,
        "dead_letter_traceback": message.dead_letter_traceback,
        "body": message.body,
    }


def _in_full(message: Message) -> str:
    """A dead letter for people."""
    lines = [
        f"{name}: {_printable(str(value))}"
        for name, value in _document(message).items()
        if value is not None and name not in ("args", "kwargs", "body", "dead_letter_traceback")
    ]
    if message.task is None:
        lines.append(f"body: {_printable(message.body)}")
    else:
        arguments = [*enumerate(message.task.args, 1), *message.task.kwargs.items()]
        lines += [f"argument {_printable(str(name))}: {json.dumps(value, indent=2)}" for name, value in arguments]
    lines += [f"    {_printable(line)}" for line in (message.dead_letter_traceback or "").splitlines()]
    return "\n".join([*lines, ""])


def _moment(moment: datetime.datetime | None) -> str:
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}Z"


def _span(seconds: float) -> str:
    """A span of time for people, by its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _print_table(rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, numbers to the right; on a terminal no line is longer than that is wide."""
    texts = [
        [f"{cell:,}" if type(cell) is int and place else _printable(str(cell)) for place, cell in enumerate(row)]
        for row in rows
    ]
    widths = [min(max(map(len, column)), 40) for column in zip(*texts, strict=True)]
    numeric = [all(type(row[place]) is int or row[place] == "-" for row in rows[1:]) for place in range(len(widths))]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else MAX_DESCRIPTION_LENGTH
    for row in texts:
        cells = [
            cell.rjust(width) if number else (cell if len(cell) <= width else cell[: width - 3] + "...").ljust(width)
            for cell, width, number in zip(row[:-1], widths, numeric, strict=False)
        ]
        line = "  ".join([*cells, row[-1]])
        print((line if len(line) <= room else line[: room - 3] + "...").rstrip())


# -- changing


async def _change(
    args: argparse.Namespace, operation: Callable[..., Coroutine[Any, Any, list[Message]]], thing: str, done: str
) -> int:
    """Do something about messages, after it was said which, and agreed to where that is more than a few numbers."""
    numbers = set(getattr(args, "numbers", ()))
    if not (numbers or args.all or args.dry_run):
        raise UsageError(f"this is about every {thing} that matches: give --all, or their numbers, or --dry-run.")
    found = await operation(_filter(args), dry_run=True)
    if missing := numbers - {message.sequence_number for message in found}:
        print(f"Not there, or not matching: {', '.join(map(str, sorted(missing)))}", file=sys.stderr)
    if not found:
        print(f"No {thing} matches: nothing was done.")
        return WRONG if missing else DONE
    if args.dry_run:
        for name, count in collections.Counter(map(_name_of, found)).most_common():
            print(f"{count:,} of {_printable(name)}")
        print(f"{_some(len(found), thing)} would be {done}.")
        return DONE
    if not numbers and not args.yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{_some(len(found), thing)} would be {done}: without a terminal to ask, give -y.")
        if not _agreed(f"{_some(len(found), thing)} to be {done}. Go on? [y/N] "):
            print("Nothing was done.")
            return DONE
    progress = _Progress(len(found))
    try:
        concerned = await operation([message.sequence_number for message in found], on_progress=progress.show)
    finally:
        progress.end()
    print(f"{_some(len(concerned), thing)} {done}.")
    return WRONG if missing else DONE


def _some(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _agreed(question: str) -> bool:
    """Ask on the terminal; Ctrl-C, which asyncio would keep for later, ends it at once."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
    finally:
        signal.signal(signal.SIGINT, previous)


class _Progress:
    """How far it is, on a terminal."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.shown = False

    def show(self, done: int) -> None:
        if sys.stderr.isatty():
            self.shown = True
            print(f"\r{done:,} of {self.total:,}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print(file=sys.stderr)


async def _purge(args: argparse.Namespace, bus: ServiceBus) -> int:
    return await _change(args, bus.purge, "message", "deleted")


async def _cancel(args: argparse.Namespace, bus: ServiceBus) -> int:
    exit_code = DONE
    for number in args.numbers:
        try:
            await bus.cancel(number)
        except MessageNotFound as error:
            print(error, file=sys.stderr)
            exit_code = WRONG
        else:
            print(f"{number} cancelled.")
    return exit_code


async def _publish(args: argparse.Namespace, bus: ServiceBus) -> int:
    try:
        arguments = _from_json(args.arguments)
    except ValueError as error:
        raise UsageError(f"ARGS_JSON {args.arguments!r} is no JSON: {error}.") from None
    if not isinstance(arguments, (list, dict)):
        raise UsageError(f"ARGS_JSON {args.arguments!r} must be an array, or an object of keyword arguments.")
    app = args.application or Boilermaker(None, bus)
    payload = {"args": arguments} if isinstance(arguments, list) else {"kwargs": arguments}
    task = Task.default(args.name, payload=payload)
    kept = False
    if args.application is not None:
        registration = app.registration(args.name)
        if registration is None:
            raise UsageError(
                f"the application has no task {args.name!r}; it has {', '.join(app.task_names) or 'none'}."
            )
        task._function, kept = registration.function, registration.result_ttl is not None
    result_ttl = None if args.wait is None or kept else WAITER_TTL
    await app.publish_task(task, delay=args.delay, task_id=args.task_id, result_ttl=result_ttl)
    number = "" if task.sequence_number is None else f" sequence_number={task.sequence_number}"
    published = f"Published {_printable(args.name)} task_id={_printable(task.task_id)}{number}"
    if args.wait is None:
        print(published)
        return DONE
    print(published, file=sys.stderr)  # standard output is for the result
    try:
        result = await task.result(None if args.wait == math.inf else args.wait)
    except (TaskFailed, TimeoutError) as error:
        print(f"{args.program}: {_printable(str(error))}", file=sys.stderr)
        return WRONG
    print(json.dumps(result))
    return DONE


def _schedules(args: argparse.Namespace) -> int:
    app = args.application
    if not app.schedules:
        print("The application has no periodic tasks.")
    for name, schedule in app.schedules.items():
        times = ", ".join(f"{moment:%Y-%m-%d %H:%M:%S %Z}" for moment in schedule.next_times(args.n))
        print(f"{_printable(name)}: {schedule.when}: {times}")
    return DONE


# -- working


def _worker(args: argparse.Namespace) -> int:
    if args.reload and args.processes > 1:
        raise UsageError("--reload is for one process: leave out --processes.")
    if args.web is not None and args.processes > 1:
        raise UsageError("--web is for one process, which listens on the port: leave out --processes.")
    if args.web is None and (args.auth is not None or args.allow_host):
        raise UsageError("--auth and --allow-host are of the page: give --web too.")
    logging.basicConfig(level=args.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("azure").setLevel(logging.WARNING)
    if args.reload:
        return _reload(args)
    if args.processes > 1:
        return Supervisor(args).run()

    page: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
    if args.web is not None:
        page = _dashboard().beside(args.application, args.web, args.auth, args.allow_host)

    async def work() -> None:
        async with args.application as app, page:
            await app.run(
                args.concurrency,
                args.burst,
                grace_period=args.grace_period,
                schedules=False if args.no_schedules else None,
            )

    asyncio.run(work())
    return DONE


def _dashboard() -> Any:
    """The page's module: in the installed package, beside this file, or in the checkout's folder of examples."""
    name, folder = f"{__name__}.dashboard", Path(__file__).resolve().parent
    for path in (folder / "dashboard.py", folder / "examples" / "dashboard.py"):
        if path.with_suffix(".html").is_file() and name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[name])
            except BaseException:
                del sys.modules[name]
                raise
    if name not in sys.modules:
        raise UsageError(f"--web needs dashboard.py and dashboard.html, in {folder}.")
    return sys.modules[name]


def _arguments_of_child(args: argparse.Namespace) -> list[str]:
    """The command line of one worker process."""
    options = [
        args.app,
        f"-c{args.concurrency}",
        f"--grace-period={args.grace_period}",
        f"--log-level={args.log_level}",
    ]
    page = {"--web": args.web, "--auth": args.auth}
    options += [f"{name}={value}" for name, value in page.items() if value is not None]
    options += [f"--allow-host={host}" for host in args.allow_host]
    flags = {"--burst": args.burst, "--no-schedules": args.no_schedules}
    return ["worker", *options, *(flag for flag, given in flags.items() if given)]


def _child(arguments: Sequence[str]) -> None:
    sys.exit(main(arguments))


def _reload(args: argparse.Namespace) -> int:
    """A worker process that is started again when a file changes; one that fails waits for the next change."""
    try:
        import watchfiles
    except ImportError as error:
        raise UsageError(f"--reload needs watchfiles: pip install watchfiles ({error}).") from None

    def tell(changes: Iterable[tuple[object, str]]) -> None:
        logger.info("Changed: %s; starting again", ", ".join(sorted(os.path.relpath(path) for _, path in changes)))

    watchfiles.run_process(
        os.getcwd(),
        target=_child,
        args=(_arguments_of_child(args),),
        target_type="function",
        callback=tell,
        watch_filter=watchfiles.PythonFilter(),
        sigint_timeout=math.ceil(args.grace_period) + 10,  # it has its own: see `Boilermaker.run`
    )
    return DONE


class Supervisor:
    """Keeps worker processes running: passes signals on, and starts anew what died, after a pause that grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        import multiprocessing.connection

        self._start_process = multiprocessing.get_context("spawn").Process
        self._wait = multiprocessing.connection.wait
        self._arguments = _arguments_of_child(args)
        self._count = args.processes
        self._processes: dict[Any, float] = {}  # and when they were started
        self._stopping = False
        self._failures = 0
        self._start_at = 0.0
        self._exit_code = DONE

    def run(self) -> int:
        """Until all have ended, each by itself or by a signal; the exit code of one that could not begin."""
        previous = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._start(self._count)
            while self._processes or (self._count and not self._stopping):
                self._wait([process.sentinel for process in self._processes], timeout=RESTART_PAUSE / 2)
                for process in [each for each in self._processes if not each.is_alive()]:
                    self._see_to(process, time.monotonic() - self._processes.pop(process))
                if len(self._processes) < self._count and not self._stopping and time.monotonic() >= self._start_at:
                    self._start(self._count - len(self._processes))
            return self._exit_code
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self, count: int) -> None:
        for _ in range(count):
            process = self._start_process(target=_child, args=(self._arguments,))
            process.start()
            self._processes[process] = time.monotonic()
            logger.info("Worker process %d started", process.pid)

    def _see_to(self, process: Any, lived: float) -> None:
        """What one that has ended means for the others."""
        if self._stopping:
            return
        if process.exitcode == DONE:  # a burst
            self._count -= 1
        elif process.exitcode == USAGE or (process.exitcode == UNREACHABLE and not self._failures):
            self._exit_code = process.exitcode
            self._pass_on(signal.SIGTERM)
        else:
            self._failures = 1 if lived > LONGEST_RESTART_PAUSE else self._failures + 1
            pause = min(RESTART_PAUSE * 2 ** (self._failures - 1), LONGEST_RESTART_PAUSE)
            self._start_at = time.monotonic() + pause
            logger.error("Worker process %d died (exit code %s); another in %g s", process.pid, process.exitcode, pause)

    def _pass_on(self, number: int, frame: object = None) -> None:
        self._stopping = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


if __name__ == "__main__":  # the application imports the module by its name: that one, not this, has its class
    sys.exit(importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem).main())
