# mypy: disable-error-code="import-not-found"
# pyright: basic, reportMissingImports=false
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
is lost. Deciding what follows is pure (section 5); only the worker (section 11) talks to a bus.

    1.  Vocabulary      errors, limits, clocks
    2.  Retries         policies and the exceptions that carry them
    3.  Tasks           a task, its callbacks, chains; the decorated function
    4.  Wire format     a task as JSON, compatible with boilermaker-servicebus 1.x
    5.  Decisions       what happens to a message: a table and a pure function
    6.  Messages        what travels between the application and a bus
    7.  Store           the embedded queue as SQL
    8.  Local bus       group commit, waking up, lock renewal around the store
    9.  Azure bus       the same protocol over azure-servicebus
    10. Tracing         OpenTelemetry, when asked for
    11. Worker          receive, run, settle, shut down
    12. Application     registering and publishing
    13. Old names       the modules of the multi-file original
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
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import reprlib
import signal
import sqlite3
import sys
import threading
import time
import traceback
import types
import uuid
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    overload,
)

if TYPE_CHECKING:
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
    "InvalidArguments",
    "LocalServiceBus",
    "MessageLockLost",
    "MessageNotFound",
    "MessageTooLarge",
    "NoRetry",
    "RetryException",
    "RetryExceptionDefault",
    "RetryExceptionDefaultExponential",
    "RetryExceptionDefaultLinear",
    "RetryMode",
    "RetryPolicy",
    "ServiceBusUnavailable",
    "Task",
    "TaskFailureResult",
    "TaskFunction",
    "UsageError",
    "current_task",
    "retries",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# ======================================================================================================================
# 1. Vocabulary: errors, limits, clocks
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


class BoilermakerError(Exception):
    """The root of every error of this module."""


class UsageError(BoilermakerError, ValueError):
    """The calling code has to change: a wrong argument, name or combination."""


class InvalidArguments(UsageError, TypeError):
    """A task's arguments do not fit its function, or JSON cannot carry them."""


class MessageTooLarge(UsageError):
    """A message is over the size limit of the bus."""


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


def _utc(timestamp: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC)


def _due_time(delay: float | datetime.timedelta | None, eta: datetime.datetime | None) -> float | None:
    """When a message is due, as a Unix timestamp; None for now."""
    if delay is not None and eta is not None:
        raise UsageError(f"Both delay={delay!r} and eta={eta!r} are given: choose one.")
    if eta is not None:
        return _timestamp(eta)
    if delay is None:
        return None
    seconds = delay.total_seconds() if isinstance(delay, datetime.timedelta) else delay
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_SECONDS:
        raise UsageError(f"delay={delay!r} must be seconds from now, 0 to {MAX_SECONDS}, or a timedelta.")
    return time.time() + seconds if seconds else None


def _timestamp(eta: datetime.datetime) -> float:
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
        delay_max: the longest delay, in seconds.
        retry_mode: `Fixed`, `Linear` or `Exponential`, see `get_delay_interval`.

    Raises:
        ValueError: a value is negative, too large, or not an int.
    """

    max_tries: int = 5
    delay: int = 0
    delay_max: int = 3600
    retry_mode: RetryMode = RetryMode.Fixed

    def __post_init__(self) -> None:
        for name, limit in (("max_tries", MAX_TRIES), ("delay", MAX_SECONDS), ("delay_max", MAX_SECONDS)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= limit:
                raise UsageError(f"RetryPolicy: {name}={_short(value)} must be an int from 0 to {limit}.")
        if type(self.retry_mode) is not RetryMode:
            object.__setattr__(self, "retry_mode", self._mode(self.retry_mode))

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
        return self.max_tries, self.delay, self.delay_max, self.retry_mode

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
            return min(self.delay, self.delay_max)
        if self.retry_mode is RetryMode.Linear:
            return min(self.delay * (attempts_so_far + 1), self.delay_max)
        longest = min(self.delay * 2 ** min(attempts_so_far, 31), self.delay_max)  # 2**31 is over any delay_max
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


def _untried() -> RetryAttempts:
    """No attempts so far; what is made within the same millisecond shares the time, and its text in the message."""
    return _untried_at(int(time.time() * 1000))


@functools.lru_cache(maxsize=1)
def _untried_at(millisecond: int) -> RetryAttempts:
    return RetryAttempts.default()


class RetryException(BoilermakerError):
    """Raised by a task that wants to run again later.

    Args:
        msg: why, for the log and the dead letter.
        policy: the policy for this retry; None for the task's own.
    """

    msg: str = ""
    policy: RetryPolicy | None = None

    def __init__(self, msg: str = "", policy: RetryPolicy | None = None) -> None:
        if policy is not None and not isinstance(policy, RetryPolicy):
            raise UsageError(f"{type(self).__name__}: policy={policy!r} must be a RetryPolicy.")
        if isinstance(msg, RetryPolicy):
            raise UsageError(f"{type(self).__name__}: the message comes first, then the policy: policy={msg!r}.")
        super().__init__(msg)
        self.msg = msg
        self.policy = policy


class RetryExceptionDefault(RetryException):
    """Retry by `RetryPolicy.default()`."""

    def __init__(self, msg: str = "") -> None:
        super().__init__(msg, RetryPolicy.default())


class RetryExceptionDefaultLinear(RetryException):
    """Retry after 30 s, 60 s, 90 s ... up to 600 s, five tries in all; keywords override the policy's fields."""

    def __init__(self, msg: str = "", **override: Any) -> None:
        defaults = {"max_tries": 5, "delay": 30, "delay_max": 600, "retry_mode": RetryMode.Linear}
        super().__init__(msg, RetryPolicy(**{**defaults, **override}))


class RetryExceptionDefaultExponential(RetryException):
    """Retry after 30 s, 60 s, 120 s ... with jitter, up to 600 s; keywords override the policy's fields."""

    def __init__(self, msg: str = "", **override: Any) -> None:
        defaults = {"max_tries": 5, "delay": 30, "delay_max": 600, "retry_mode": RetryMode.Exponential}
        super().__init__(msg, RetryPolicy(**{**defaults, **override}))


# ======================================================================================================================
# 3. Tasks: a task, its callbacks, chains; the decorated function
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


@dataclass(frozen=True, slots=True)
class Registration:
    """A function under its name, with what applies where scheduling says nothing else."""

    name: str
    function: Callable[..., Coroutine[Any, Any, Any]]
    policy: RetryPolicy = DEFAULT_POLICY
    should_dead_letter: bool = True
    acks_late: bool = True

    def apply_to(self, task: Task) -> None:
        """Fill in what a task made by name alone could not know, and was not given, nor set by hand."""
        if task.policy_is_default:
            task.policy_is_default = False
            if task.policy == DEFAULT_POLICY:
                task.policy = self.policy
        for option in task.default_options:
            if getattr(task, option) is True:
                setattr(task, option, getattr(self, option))
        task.default_options = ()


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Task:
    """A call of a registered function, to be run by a worker.

    Make one with `fn.si(...)`, `Task.si(fn, ...)` or `app.create_task(fn, ...)`; until it is published, every field may
    be set. `sequence_number` and `message_id` are set by publishing, and by receiving.

    Args:
        function_name: the name the function is registered under.
        args: positional arguments after `state`; JSON values.
        kwargs: keyword arguments; JSON values.
        task_id: identifies the task through its retries; also the message id of the first publish.
        policy: when and how often to retry.
        policy_is_default: nobody gave a policy, so the registration at the receiver applies.
        default_options: which of `should_dead_letter` and `acks_late` nobody gave, likewise.
        scheduled_policy: in a retry by an exception's own policy, the one that was given when scheduling.
        attempts: the runs so far.
        should_dead_letter: a failed message goes to the dead-letter queue; else it is completed.
        acks_late: the message is settled after the function ran; else completed before it.
        on_success: the task to publish when this one has returned.
        on_failure: the task to publish when this one has failed for good.
        graph_id: kept for boilermaker-servicebus.
        queue: the queue it belongs on; None for that of the application that publishes it.
        takes_result: made by `.s()`: its parent's result, or failure, becomes the first argument.
    """

    function_name: str
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    task_id: str = field(default_factory=new_task_id)
    policy: RetryPolicy = DEFAULT_POLICY
    policy_is_default: bool = False
    default_options: tuple[str, ...] = ()
    scheduled_policy: RetryPolicy | None = None
    attempts: RetryAttempts = field(default_factory=_untried)
    should_dead_letter: bool = True
    acks_late: bool = True
    on_success: Task | None = None
    on_failure: Task | None = None
    graph_id: str | None = None
    queue: str | None = None
    takes_result: bool = False
    sequence_number: int | None = field(default=None, init=False)
    message_id: str | None = field(default=None, init=False)
    _app: Boilermaker | None = field(default=None, init=False)
    _function: Callable[..., Any] | None = field(default=None, init=False)
    _predecessor: Task | None = field(default=None, init=False)

    def __repr__(self) -> str:
        return f"<Task {self.function_name} {self.task_id}>"

    @classmethod
    def default(cls, function_name: str, *, payload: Mapping[str, Any] | None = None, **fields: Any) -> Task:
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
        fn: TaskFunction[..., Any] | TaskCallable[..., Any],
        /,
        *args: Any,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool | None = None,
        acks_late: bool | None = None,
        **kwargs: Any,
    ) -> Task:
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
        fn: TaskFunction[..., Any] | TaskCallable[..., Any],
        /,
        *args: Any,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool | None = None,
        acks_late: bool | None = None,
        **kwargs: Any,
    ) -> Task:
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

    def copy(self) -> Task:
        """The same work as new work: this task and its callbacks with fresh ids, unpublished."""
        twin = _replica(self)
        for task in _workflow(twin):
            task.task_id, task.attempts = new_task_id(), _untried()
        return twin

    async def publish(
        self,
        *,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int = 1,
    ) -> Task:
        """`app.publish_task(self, ...)` of the application the task was made by."""
        if self._app is None:
            raise UsageError(f"{self!r} belongs to no application: use `await app.publish_task(task)`.")
        return await self._app.publish_task(self, delay=delay, eta=eta, publish_attempts=publish_attempts)

    def __rshift__(self, other: TaskLike) -> Task:
        """`a >> b` runs b when a has returned, and gives b, so that `a >> b >> c` reads on. Publish a."""
        following = _as_task(other)
        self.on_success, following._predecessor = following, self
        return following

    def __lshift__(self, other: TaskLike) -> Task:
        """`a << b` runs a when b has returned, and gives a. Publish b."""
        preceding = _as_task(other)
        preceding.on_success, self._predecessor = self, preceding
        return self

    def __or__(self, other: TaskLike) -> Task:
        """`a | b`: a new workflow, copies with fresh ids, b at the end of a's chain. Publish the whole."""
        following = _as_task(other)
        _check_beginning(self)
        _check_beginning(following)
        head = self.copy()
        _last(head).on_success = following.copy()
        return head


class TaskFunction(Generic[P, R]):
    """A function that `@app.task` registered: call it inline, or make tasks of it.

    `await fn(state, ...)` runs it here and now, without a queue.
    """

    def __init__(self, app: Boilermaker, registration: Registration, function: TaskCallable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self.app = app
        self.registration = registration
        self.function = function

    def __call__(self, state: Any, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return self.function(state, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<TaskFunction {self.registration.name}>"

    def si(self, /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """An immutable signature, see `Task.si`."""
        task = self._call(args, kwargs)
        _check_arguments(task)
        return task

    def s(self, /, *args: Any, **kwargs: Any) -> Task:
        """A signature with room for the parent's result, see `Task.s`."""
        task = self._call(args, kwargs)
        task.takes_result = True
        _check_arguments(task)
        return task

    async def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> Task:
        """Publish a call of this function, to run as soon as a worker is free; the published `Task`.

        Raises:
            InvalidArguments: the arguments do not fit the function, or JSON cannot carry them.
            MessageTooLarge: the message is over the limit of the bus.
            BoilermakerAppException: the bus did not take it.
        """
        return await self.app.publish_task(self._call(args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Task:
        return _task_of(self.registration, self.app, args, kwargs)

    def __rshift__(self, other: TaskLike) -> Task:
        return self._call((), {}) >> other

    def __lshift__(self, other: TaskLike) -> Task:
        return self._call((), {}) << other

    def __or__(self, other: TaskLike) -> Task:
        return self._call((), {}) | other


TaskLike: TypeAlias = Task | TaskFunction[..., Any]
"""What a workflow is made of: a task, or a decorated function, which stands for `fn.si()`."""


def _as_task(operand: object, role: str = "A workflow's member") -> Task:
    if isinstance(operand, Task):
        return operand
    if isinstance(operand, TaskFunction):
        return _alone(operand)
    hint = ""
    if inspect.iscoroutine(operand):
        operand.close()
        hint = " To publish by delay(), await it; si() makes a task to be published later."
    elif inspect.iscoroutinefunction(operand):
        hint = f" Use Task.si({operand.__name__}, ...)."
    raise UsageError(f"{role} must be a Task or a decorated function, not {operand!r}.{hint}")


def _alone(function: TaskFunction[..., Any]) -> Task:
    """What a decorated function by itself stands for."""
    try:
        return function.si()
    except InvalidArguments as error:
        name = function.registration.name
        raise InvalidArguments(
            f"{error} Alone, a function stands for {name}.si(); {name}.s() receives its parent's result."
        ) from None


def _task_of(registration: Registration, app: Boilermaker, args: Sequence[Any], kwargs: dict[str, Any]) -> Task:
    task = Task(
        function_name=registration.name,
        args=list(args),
        kwargs=kwargs,
        policy=registration.policy,
        should_dead_letter=registration.should_dead_letter,
        acks_late=registration.acks_late,
    )
    task._app, task._function = app, registration.function
    return task


def _signature_of(
    fn: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    policy: RetryPolicy | None,
    should_dead_letter: bool | None,
    acks_late: bool | None,
) -> Task:
    """The task of `Task.si` and `Task.s`; options that are None come from the registration."""
    if isinstance(fn, TaskFunction):
        task = fn._call(args, kwargs)
    else:
        task = _task_by_name(_function_name(fn), args, kwargs)
        task._function = fn  # type: ignore[assignment]
    if policy is not None:
        _set_policy(task, policy)
    for option, value in (("should_dead_letter", should_dead_letter), ("acks_late", acks_late)):
        if value is not None:
            setattr(task, option, value)
            task.default_options = tuple(name for name in task.default_options if name != option)
    return task


def _task_by_name(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Task:
    """A task for whose options the registration at the receiver has to be asked."""
    return Task(function_name=name, args=list(args), kwargs=kwargs, policy_is_default=True, default_options=_OPTIONS)


_OPTIONS = ("should_dead_letter", "acks_late")


def _set_policy(task: Task, policy: object) -> None:
    if not isinstance(policy, RetryPolicy):
        raise UsageError(f"{task.function_name}: policy={policy!r} must be a RetryPolicy.")
    task.policy, task.policy_is_default = policy, False


def _function_name(fn: object) -> str:
    """The name of an `async def`; anything else is an error that says so."""
    name = getattr(fn, "__name__", None)
    if not inspect.iscoroutinefunction(fn):
        name = name or repr(fn)
        raise UsageError(f"Function must be async: {name}. Declare it with `async def {name}(state, ...)`.")
    if name is None:
        raise UsageError(f"Function has no name: {fn!r}. Call it from an `async def` that has one.")
    return str(name)


def _workflow(head: Task) -> list[Task]:
    """The task and all its callbacks, each once, callbacks before their parents.

    Without recursion, so that a long chain is no deeper than a short one.

    Raises:
        UsageError: a task is, by way of its callbacks, its own callback.
    """
    finished: dict[int, Task] = {}
    entered: set[int] = set()
    pending = [head]
    while pending:
        task = pending[-1]
        following = [c for c in _callbacks(task) if id(c) not in finished] if id(task) not in finished else []
        if not following:
            finished[id(task)] = pending.pop()
            continue
        entered.add(id(task))
        for callback in following:
            if id(callback) in entered:
                raise UsageError(f"{callback!r} is its own callback: a workflow cannot have a cycle, use copy().")
        pending += following
    return list(finished.values())


def _callbacks(task: Task) -> list[Task]:
    """A task's callbacks, those given as decorated functions made tasks."""
    if task.on_success is not None:
        task.on_success = _as_task(task.on_success, f"on_success of {task!r}")
    if task.on_failure is not None:
        task.on_failure = _as_task(task.on_failure, f"on_failure of {task!r}")
    return [callback for callback in (task.on_success, task.on_failure) if callback is not None]


def _replica(head: Task) -> Task:
    """A copy of a workflow, ids included, that can be changed without the original."""
    replicas: dict[int, Task] = {}
    for task in _workflow(head):
        replicas[id(task)] = replica = dataclasses.replace(
            task,
            args=list(task.args),
            kwargs=dict(task.kwargs),
            on_success=replicas.get(id(task.on_success)),
            on_failure=replicas.get(id(task.on_failure)),
        )
        replica._app, replica._function = task._app, task._function
    return replicas[id(head)]


def _chain_of(head: Task) -> Iterator[Task]:
    """The task, its `on_success`, and so on."""
    seen: set[int] = set()
    step: Task | None = head
    while step is not None:
        if id(step) in seen:
            raise UsageError(f"{step!r} is its own callback: a workflow cannot have a cycle, use copy().")
        seen.add(id(step))
        yield step
        step = step.on_success


def _last(head: Task) -> Task:
    return list(_chain_of(head))[-1]


_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "function_name": (str,),
    "task_id": (str,),
    "args": (list, tuple),
    "kwargs": (dict,),
    "policy": (RetryPolicy,),
    "policy_is_default": (bool,),
    "default_options": (tuple,),
    "scheduled_policy": (RetryPolicy, type(None)),
    "attempts": (RetryAttempts,),
    "should_dead_letter": (bool,),
    "acks_late": (bool,),
    "graph_id": (str, type(None)),
    "takes_result": (bool,),
}


def _check_fields(task: Task) -> None:
    """Refuse what was set by hand and cannot be."""
    if not _has_usual_types(task):
        _check_types_of_fields(task)
    if not task.function_name or not task.task_id:
        name = "task_id" if task.function_name else "function_name"
        raise UsageError(f"{task!r}: {name}='' must not be empty.")
    attempts, last_retry = task.attempts
    if type(attempts) is not int or not 0 <= attempts <= MAX_SECONDS or not isinstance(last_retry, datetime.datetime):
        raise UsageError(f"{task!r}: attempts={_short(task.attempts)} must be a count from 0, and a datetime.")
    if task.default_options and not all(option in _OPTIONS for option in task.default_options):
        raise UsageError(f"{task!r}: default_options={_short(task.default_options)} must be among {_OPTIONS}.")
    if task.queue is not None:
        _checked_queue_name(task.queue)


def _has_usual_types(task: Task) -> bool:
    """Whether all of `_FIELD_TYPES` are of the types that nearly all tasks have: asked so, it takes half the time."""
    return (
        type(task.function_name) is type(task.task_id) is str
        and type(task.args) is list
        and type(task.kwargs) is dict
        and type(task.policy) is RetryPolicy
        and type(task.attempts) is RetryAttempts
        and type(task.should_dead_letter) is type(task.acks_late) is bool
        and type(task.policy_is_default) is type(task.takes_result) is bool
        and type(task.default_options) is tuple
        and task.scheduled_policy is None
        and task.graph_id is None
    )


def _check_types_of_fields(task: Task) -> None:
    for name, allowed in _FIELD_TYPES.items():
        value = getattr(task, name)
        if not isinstance(value, allowed):
            expected = " or ".join(kind.__name__ for kind in allowed)
            raise UsageError(f"{task!r}: {name}={_short(value)} must be of type {expected}.")


def _check_head(task: Task) -> None:
    """Refuse what cannot be published by itself."""
    _check_beginning(task)
    if task.takes_result:
        raise UsageError(f"{task!r} was made by .s(), for a parent's result, but has no parent: make it by .si().")


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
        _check_call(task)
    _encode_payload(task)


def _check_call(task: Task) -> None:
    assert task._function is not None
    positional = len(task.args) + task.takes_result
    least, most = _arity(task._function)
    if not task.kwargs and least <= positional <= most:
        return
    signature = _signature(task._function)
    try:
        signature.bind(*[None] * (1 + positional), **task.kwargs)
    except TypeError as error:
        raise InvalidArguments(f"{task.function_name}{signature} cannot be called like that: {error}.") from None


_signature = functools.lru_cache(maxsize=4096)(inspect.signature)


@functools.lru_cache(maxsize=4096)
def _arity(function: Callable[..., Any]) -> tuple[float, float]:
    """The least and the most positional arguments after `state` that make a call without keywords."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        return float("inf"), 0
    unlimited = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return len(required) - 1, float("inf") if unlimited else len(positional) - 1


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

# What is new here is optional, and ignored by the other side: `takes_result`, `policy_is_default`, `default_options`,
# `scheduled_policy`, and `queue`, in a callback that goes to another queue than the message which carries it.


_text_to_json: Callable[[str], str] = json.encoder.encode_basestring_ascii


def _json_encoder() -> Callable[[object], str]:
    """Compact JSON, strict about NaN; `JSONEncoder.encode`, but with its C part made once instead of for each call."""
    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return encoder.encode
    chunks_of = make(None, encoder.default, _text_to_json, None, ":", ",", False, False, False)
    return lambda value: "".join(chunks_of(value, 0))


_to_json = _json_encoder()

MAX_WORKFLOW_BYTES = 100 * 1024 * 1024
"""The largest message of any Service Bus tier (Premium): where encoding a workflow gives up."""


class InvalidTaskFormat(BoilermakerError):
    """A message body is not a task; says where and why."""


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
    if task.on_success is None and task.on_failure is None:
        return _encode_one(task, None, "null", "null")
    members = _workflow(task)
    _check_depth(task, members)
    texts: dict[int, str] = {}
    for member in members:
        own_queue = queue if member is task else member.queue or home
        callbacks = texts.get(id(member.on_success), "null"), texts.get(id(member.on_failure), "null")
        texts[id(member)] = _encode_one(member, own_queue if own_queue != queue else None, *callbacks)
        if len(texts[id(member)]) > MAX_WORKFLOW_BYTES:
            raise MessageTooLarge(f"{task!r} and its callbacks are over {MAX_WORKFLOW_BYTES} bytes: no bus takes that.")
    if len(members) > 100:  # with deep arguments, it may still be too deep together
        try:
            _from_json(texts[id(task)])
        except RecursionError as error:
            raise UsageError(f"{task!r}: its callbacks and arguments are nested too deeply to be read.") from error
    return texts[id(task)]


def _check_depth(head: Task, members: Sequence[Task]) -> None:
    depths: dict[int, int] = {}
    for member in members:
        depths[id(member)] = 1 + max(depths.get(id(callback), 0) for callback in (member.on_success, member.on_failure))
    if depths[id(head)] > MAX_WORKFLOW_DEPTH:
        raise UsageError(
            f"{head!r} is the head of {depths[id(head)]} nested callbacks, the limit is {MAX_WORKFLOW_DEPTH}: "
            "let a task of the chain publish the rest."
        )


def _encode_one(task: Task, queue: str | None, on_success: str, on_failure: str) -> str:
    """One task around the JSON of its callbacks; a template is twice as fast as a dict."""
    attempts, last_retry = task.attempts
    sent = _encode_time(last_retry) if last_retry.tzinfo is datetime.UTC else last_retry.isoformat()
    graph_id = "null" if task.graph_id is None else _text_to_json(task.graph_id)
    return (
        f'{{"task_id":{_text_to_json(task.task_id)},"function_name":{_text_to_json(task.function_name)}'
        f',"payload":{_encode_payload(task)},"policy":{_encode_policy(task.policy)}'
        f',"attempts":{{"attempts":{attempts},"last_retry":"{sent}"}}'
        f',"should_dead_letter":{_FLAGS[task.should_dead_letter]},"acks_late":{_FLAGS[task.acks_late]}'
        f',"graph_id":{graph_id}{_encode_additions(task, queue)}'
        f',"on_success":{on_success},"on_failure":{on_failure}}}'
    )


_FLAGS = {True: "true", False: "false"}


def _encode_payload(task: Task) -> str:
    try:
        return f'{{"args":{_to_json(task.args)},"kwargs":{_to_json(task.kwargs) if task.kwargs else "{}"}}}'
    except (TypeError, ValueError, RecursionError) as error:
        raise _explain_arguments(task, error) from error


@functools.lru_cache(maxsize=8)
def _encode_time(moment_in_utc: datetime.datetime) -> str:
    """Remembered, as tasks made together share it. (In other zones, equal times can have two texts.)"""
    return moment_in_utc.isoformat()


@functools.lru_cache(maxsize=1024)
def _encode_policy(policy: RetryPolicy) -> str:
    return _to_json(dataclasses.asdict(policy))


def _encode_additions(task: Task, queue: str | None) -> str:
    """The fields that boilermaker-servicebus does not know, where they say something."""
    additions: dict[str, Any] = {}
    if task.policy_is_default:
        additions["policy_is_default"] = True
    if task.default_options:
        additions["default_options"] = task.default_options
    if task.scheduled_policy is not None:
        additions["scheduled_policy"] = dataclasses.asdict(task.scheduled_policy)
    if task.takes_result:
        additions["takes_result"] = True
    if queue is not None:
        additions["queue"] = queue
    return f",{_to_json(additions)[1:-1]}" if additions else ""


def decode(body: str | bytes, queue: str) -> Task:
    """The task of a message body that was received from `queue`.

    Raises:
        InvalidTaskFormat: it is no task; unknown fields are no reason.
    """
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        return _decode_plain(text, queue) or _decode_workflow(_from_json(text), queue)
    except (ValueError, RecursionError) as error:
        raise InvalidTaskFormat(f"The body is not JSON that can be read: {error}.") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)

_value_at: Callable[[str, int], tuple[Any, int]] = getattr(_decoder, "scan_once", _decoder.raw_decode)
"""The JSON value at an index, and the index behind it."""


def _from_json(text: str) -> Any:
    """As `json.loads`, strict about NaN, and faster where there is no white space around the value."""
    try:
        document, end = _decoder.raw_decode(text)
    except ValueError:
        return _decoder.decode(text)
    return document if end == len(text) else _decoder.decode(text)


# Most messages are plain: a task without callbacks, as `encode` writes it. Two of them differ by id, arguments and
# time, and hardly ever by what is around these, the frame, which is read once. That takes half the time of reading all.


class _Frame(NamedTuple):
    """What a plain body says besides id, arguments and time."""

    function_name: str
    policy: RetryPolicy
    attempts: int
    should_dead_letter: bool
    acks_late: bool


_PLAIN_END = ',"graph_id":null,"on_success":null,"on_failure":null}'

_FRAME = re.compile(
    r'{"task_id":\0,"function_name":"([\w.-]+)","payload":\0,"policy":({[^{}]*})'
    r',"attempts":{"attempts":(0|[1-9][0-9]{0,8}),"last_retry":\0}'
    r',"should_dead_letter":(true|false),"acks_late":(true|false)' + _PLAIN_END
)
"""A plain body with a NUL wherever id, arguments and time were cut out."""

MAX_FRAME = 1000
"""Characters of a frame that is worth keeping."""

_TO_ID, _TO_NAME, _TO_TIME = (len(text) for text in ('{"task_id":', ',"function_name":', '"last_retry":'))


@functools.lru_cache(maxsize=1024)
def _frame_of(*pieces: str) -> _Frame | None:
    match = _FRAME.fullmatch("\0".join(pieces))
    if match is None:
        return None
    name, policy, attempts, should_dead_letter, acks_late = match.groups()
    policy = _decode_policy(_from_json(policy), "policy", "")
    return _Frame(name, policy, int(attempts), should_dead_letter == "true", acks_late == "true")


def _decode_plain(text: str, queue: str) -> Task | None:
    """The task, or None if the body is not plain or something is wrong with it: to be found the long way."""
    if not text.endswith(_PLAIN_END):
        return None
    try:
        task_id, id_end = _value_at(text, _TO_ID)
        payload_start = text.index(":", id_end + _TO_NAME) + 1
        payload, payload_end = _value_at(text, payload_start)
        time_start = text.index('"last_retry":', payload_end) + _TO_TIME
        last_retry, time_end = _value_at(text, time_start)
        if len(text) - (payload_end - payload_start) > MAX_FRAME or type(task_id) is not str:
            return None
        frame = _frame_of(text[:_TO_ID], text[id_end:payload_start], text[payload_end:time_start], text[time_end:])
        if frame is None:
            return None
        args, kwargs = _decode_payload(payload, "")
        attempts = RetryAttempts(frame.attempts, datetime.datetime.fromisoformat(last_retry))
    except (ValueError, TypeError, AttributeError, StopIteration, RecursionError, InvalidTaskFormat):
        return None
    return Task(
        function_name=frame.function_name,
        args=args,
        kwargs=kwargs,
        task_id=task_id,
        policy=frame.policy,
        attempts=attempts,
        should_dead_letter=frame.should_dead_letter,
        acks_late=frame.acks_late,
        queue=queue,
    )


def _decode_workflow(document: Any, queue: str) -> Task:
    """A task with all its callbacks. Without recursion, so that a long chain is no deeper than a short one."""
    head = _decode_one(document, queue, "the body")
    pending = [(head, document, "")]
    while pending:
        parent, fields, path = pending.pop()
        for name in ("on_success", "on_failure"):
            if (nested := fields.get(name)) is not None:
                callback = _decode_one(nested, queue, _place(path + name))
                setattr(parent, name, callback)
                pending.append((callback, nested, f"{path}{name}."))
    return head


def _place(path: str) -> str:
    """Where a callback stands, in short where it is far down."""
    return path if len(path) <= 200 else f"{path[:80]}...{path[-80:]}"


_FIELDS: Mapping[str, type] = {
    "task_id": str,
    "function_name": str,
    "payload": dict,
    "policy": dict,
    "policy_is_default": bool,
    "default_options": list,
    "scheduled_policy": dict,
    "attempts": dict,
    "should_dead_letter": bool,
    "acks_late": bool,
    "graph_id": str,
    "queue": str,
    "takes_result": bool,
}

_JSON_NAMES: Mapping[type, str] = {str: "a string", bool: "true or false", list: "an array", dict: "an object"}


def _decode_one(document: Any, queue: str, where: str) -> Task:
    """One task without its callbacks. A field that is absent or null has its default."""
    if type(document) is not dict:
        raise InvalidTaskFormat(f"{where} must be an object, not {_short(document)}.")
    _check_types(document, where)
    get = document.get
    task_id: Any = get("task_id")
    function_name: Any = get("function_name")
    if task_id is None or function_name is None:
        raise InvalidTaskFormat(f"{'task_id' if task_id is None else 'function_name'} of {where} is missing.")
    args, kwargs = _decode_payload(get("payload") or {}, where)
    policy, scheduled = get("policy"), get("scheduled_policy")
    return Task(
        function_name=function_name,
        args=args,
        kwargs=kwargs,
        task_id=task_id,
        policy=DEFAULT_POLICY if policy is None else _decode_policy(policy, "policy", where),
        policy_is_default=policy is None or get("policy_is_default") is True,
        default_options=() if get("default_options") is None else _decode_options(get("default_options")),
        scheduled_policy=None if scheduled is None else _decode_policy(scheduled, "scheduled_policy", where),
        attempts=_decode_attempts(get("attempts") or {}, where),
        should_dead_letter=get("should_dead_letter") is not False,
        acks_late=get("acks_late") is not False,
        graph_id=get("graph_id"),
        queue=queue if get("queue") is None else _decode_queue(get("queue"), where),
        takes_result=get("takes_result") is True,
    )


def _check_types(document: dict[str, Any], where: str) -> None:
    for name, value in document.items():
        kind = _FIELDS.get(name)
        if kind is not None and type(value) is not kind and value is not None:
            raise _wrong_type(name, kind, value, where)


def _wrong_type(name: str, kind: type, value: object, where: str) -> InvalidTaskFormat:
    return InvalidTaskFormat(f"{name} of {where} must be {_JSON_NAMES[kind]}, not {_short(value)}.")


def _decode_options(names: Any) -> tuple[str, ...]:
    return tuple(option for option in _OPTIONS if option in names)


def _decode_queue(name: object, where: str) -> str:
    try:
        return _checked_queue_name(name)
    except ConfigurationError as error:
        raise InvalidTaskFormat(f"queue of {where}: {error}") from error


def _decode_payload(document: dict[str, Any], where: str) -> tuple[list[Any], dict[str, Any]]:
    args, kwargs = document.get("args"), document.get("kwargs")
    if args is not None and type(args) is not list:
        raise _wrong_type("payload.args", list, args, where)
    if kwargs is not None and type(kwargs) is not dict:
        raise _wrong_type("payload.kwargs", dict, kwargs, where)
    return args or [], kwargs or {}


def _decode_policy(document: dict[str, Any], name: str, where: str) -> RetryPolicy:
    values: list[Any] = [document.get(key) for key in ("max_tries", "delay", "delay_max", "retry_mode")]
    cacheable = all(type(value) is int for value in values)
    try:
        return (_cached_policy if cacheable else RetryPolicy)(*values)
    except UsageError as error:
        raise InvalidTaskFormat(f"{name} of {where}: {error}") from error


_cached_policy = functools.lru_cache(maxsize=1024)(RetryPolicy)


def _decode_attempts(document: dict[str, Any], where: str) -> RetryAttempts:
    attempts, last_retry = document.get("attempts"), document.get("last_retry")
    attempts = 0 if attempts is None else attempts
    if type(attempts) is not int or not 0 <= attempts <= MAX_SECONDS:
        raise InvalidTaskFormat(f"attempts of {where}: {_short(attempts)} is no integer from 0 to {MAX_SECONDS}.")
    if last_retry is None:
        return RetryAttempts.default(attempts)
    try:
        return RetryAttempts(attempts, datetime.datetime.fromisoformat(last_retry))
    except (ValueError, TypeError) as error:
        raise InvalidTaskFormat(f"last_retry of {where}: {_short(last_retry)} is no ISO 8601 time.") from error


# ======================================================================================================================
# 5. Decisions: what happens to a message
# ======================================================================================================================

# The handling of a message ends in one of the ways that `Ending` lists, as a table: how the message is settled, by
# which reason, and what is published before that. All of it is pure: the worker gathers the facts, `decide` says what
# to do, a receiver does it.


class Disposition(enum.Enum):
    """What a receiver does with a message; the names are those of the Azure SDK."""

    COMPLETE = "complete"
    ABANDON = "abandon"
    DEAD_LETTER = "dead_letter"
    LEAVE = "leave"
    """Nothing: it is settled already, or its lock has to run out."""


class FollowUp(enum.Enum):
    """What is published when a run has ended."""

    NOTHING = "nothing"
    ON_SUCCESS = "on_success"
    ON_FAILURE = "on_failure"
    RETRY = "retry"


class Ending(enum.Enum):
    """How the handling of a message ended, and by that what becomes of it: the task ..."""

    RETURNED = ("returned", Disposition.COMPLETE, "", FollowUp.ON_SUCCESS)
    FAILED = ("failed", Disposition.DEAD_LETTER, "TaskFailed", FollowUp.ON_FAILURE)
    RETRY = ("asked for a retry", Disposition.COMPLETE, "", FollowUp.RETRY)
    EXHAUSTED = ("used up its tries", Disposition.DEAD_LETTER, "RetriesExhausted", FollowUp.ON_FAILURE)
    NO_TRY_LEFT = ("has no try left", Disposition.DEAD_LETTER, "RetriesExhausted", FollowUp.ON_FAILURE)
    UNREGISTERED = ("is not registered here", Disposition.DEAD_LETTER, "UnregisteredFunction", FollowUp.ON_FAILURE)
    UNDECODABLE = ("cannot be decoded", Disposition.DEAD_LETTER, "InvalidTaskFormat", FollowUp.NOTHING)
    STOPPED = ("was stopped with its worker", Disposition.ABANDON, "", FollowUp.NOTHING)
    LOCK_LOST = ("lost its lock", Disposition.LEAVE, "", FollowUp.NOTHING)

    def __init__(self, text: str, disposition: Disposition, reason: str, follow_up: FollowUp) -> None:
        self.text = text
        self.disposition = disposition
        self.reason = reason
        self.follow_up = follow_up

    @property
    def ran(self) -> bool:
        """Whether the function was called, and so, with `acks_late=False`, the message completed."""
        return self not in (Ending.NO_TRY_LEFT, Ending.UNREGISTERED, Ending.UNDECODABLE)


@dataclass(slots=True, eq=False)
class Outcome:
    """One run: how it ended, with the result it returned or the error it raised."""

    ending: Ending
    result: Any = None
    error: BaseException | None = None


_RETURNED = Outcome(Ending.RETURNED)


class Decision(NamedTuple):
    """What to do with a message, and the task to publish before that, if any."""

    disposition: Disposition
    reason: str = ""
    description: str = ""
    follow_up: Task | None = None
    follow_up_id: str = ""
    delay: int = 0


_COMPLETED = Decision(Disposition.COMPLETE)

MAX_DESCRIPTION_LENGTH = 4096
"""Characters of a dead letter's description: Service Bus takes 4 KiB
(https://learn.microsoft.com/azure/service-bus-messaging/service-bus-dead-letter-queues)."""


def decide(task: Task, outcome: Outcome, message_id: str) -> Decision:
    """What happens to the message of a task after a run.

    Args:
        task: as it was received.
        outcome: how the run ended.
        message_id: the message's; what follows derives its own from it.
    """
    ending = outcome.ending
    if (
        ending is Ending.RETURNED
        and task.on_success is None
        and task.acks_late
        and not isinstance(outcome.result, Task)
    ):
        return _COMPLETED  # most messages
    retried = task.attempts.attempts
    first_id = first_try_id(message_id, retried)
    description = describe(outcome.error) if ending.reason else ""
    decision = Decision(_disposition(task, ending), ending.reason, description)
    match ending.follow_up:
        case FollowUp.RETRY:
            delay = policy_in_force(task, outcome.error).get_delay_interval(retried)
            retry = _retry_of(task, outcome.error)
            return decision._replace(follow_up=retry, follow_up_id=retry_id(first_id, retried + 1), delay=delay)
        case FollowUp.ON_SUCCESS if (following := _successor(task, outcome.result)) is not None:
            return decision._replace(follow_up=following, follow_up_id=continuation_id(first_id))
        case FollowUp.ON_FAILURE if task.on_failure is not None:
            following = _given(task.on_failure, lambda: failure_of(task, outcome))
            return decision._replace(follow_up=following, follow_up_id=continuation_id(first_id))
    return decision


def _disposition(task: Task, ending: Ending) -> Disposition:
    """The table's, but for the task's own wishes."""
    if not task.acks_late and ending.ran:
        return Disposition.LEAVE  # completed before it ran
    if not task.should_dead_letter and ending in (Ending.FAILED, Ending.EXHAUSTED, Ending.NO_TRY_LEFT):
        return Disposition.COMPLETE
    return ending.disposition


def reject(error: Exception) -> Decision:
    """The decision in place of one whose follow-up can never be published."""
    return Decision(Disposition.DEAD_LETTER, "FollowUpRejected", describe(error))


def ending_of(task: Task, error: BaseException) -> Ending:
    """How a run ended that raised."""
    if not isinstance(error, RetryException):
        return Ending.FAILED
    again = task.attempts.attempts + 1 < policy_in_force(task, error).max_tries
    return Ending.RETRY if again else Ending.EXHAUSTED


def may_run(task: Task) -> bool:
    """Whether a received task has a try left: one that was published with too few, or by another hand, may not."""
    tries = task.policy.max_tries
    if task.scheduled_policy is not None:
        tries = max(tries, task.scheduled_policy.max_tries)
    return task.attempts.attempts < tries


def policy_in_force(task: Task, error: BaseException | None) -> RetryPolicy:
    """The exception's policy, else the one given when scheduling, else the registration's."""
    own = error.policy if isinstance(error, RetryException) else None
    return own or task.scheduled_policy or task.policy


def _retry_of(task: Task, error: BaseException | None) -> Task:
    """The task with one attempt more. It carries the policy in force, by which a worker judges whether it may run."""
    scheduled = task.scheduled_policy or task.policy
    policy = policy_in_force(task, error)
    return dataclasses.replace(
        task,
        attempts=RetryAttempts.default(task.attempts.attempts + 1),
        policy=policy,
        scheduled_policy=scheduled if policy != scheduled else None,
    )


def _successor(task: Task, result: Any) -> Task | None:
    """The task to publish after a success: a returned task that was not published yet takes over."""
    if isinstance(result, Task) and result.message_id is None:
        return _taken_over(task, result)
    return None if task.on_success is None else _given(task.on_success, lambda: result)


def _taken_over(task: Task, returned: Task) -> Task:
    """The returned workflow, followed by what would have followed the task that returned it."""
    head = _replica(returned)
    for step in _chain_of(head):
        step.on_failure = step.on_failure or task.on_failure
    _last(head).on_success = task.on_success
    return head


def _given(callback: Task, value: Callable[[], Any]) -> Task:
    """The callback with the value as its first argument, where it takes one."""
    if not callback.takes_result:
        return callback
    return dataclasses.replace(callback, args=[value(), *callback.args], takes_result=False)


def failure_of(task: Task, outcome: Outcome) -> dict[str, Any]:
    """What an `on_failure` callback made by `.s()` receives."""
    error = outcome.error
    return {
        "task_id": task.task_id,
        "function_name": task.function_name,
        "error": type(error).__name__ if error is not None else "TaskFailureResult",
        "message": _message_of(error)[:MAX_DESCRIPTION_LENGTH] if error is not None else "",
        "traceback": "".join(traceback.format_exception(error))[-MAX_DESCRIPTION_LENGTH:] if error is not None else "",
        "attempts": task.attempts.attempts + outcome.ending.ran,
    }


def describe(error: BaseException | None) -> str:
    """An error in one readable text, short enough for a dead letter."""
    if error is None:
        return "The task returned TaskFailureResult."
    text = "".join(traceback.format_exception_only(error)).strip()
    return text.encode("utf-8", "backslashreplace")[:MAX_DESCRIPTION_LENGTH].decode("utf-8", "ignore")


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # an exception's own __str__ may fail
        return f"<{type(error).__name__}: str() failed: {type(broken).__name__}>"


_ID_NAMESPACE = uuid.UUID("5f6a1c1e-7b5c-5a53-9d0c-6d1f2f3c7b10")


def first_try_id(message_id: str, attempts: int) -> str:
    """The message id of a task's first try, by that of its nth retry."""
    return message_id.removesuffix(f":{attempts}") if attempts else message_id


def retry_id(first_id: str, attempt: int) -> str:
    """The message id of a task's nth retry: `<message id of the first try>:<attempt>`."""
    retry = f"{first_id}:{attempt}"
    return retry if len(retry) <= MAX_MESSAGE_ID_LENGTH else f"{continuation_id(first_id)}:{attempt}"


def continuation_id(first_id: str) -> str:
    """The message id of what follows a task, success or failure alike, whichever of its tries it is that ends it.

    So only one of all these can ever be enqueued, even when a worker died between publishing a retry and completing.
    """
    return str(uuid.uuid5(_ID_NAMESPACE, first_id))


# ======================================================================================================================
# 6. Messages: what travels between the application and a bus
# ======================================================================================================================


class Outgoing(NamedTuple):
    """A message to send. `due` is a Unix timestamp, None for at once."""

    body: str | bytes
    message_id: str
    queue: str
    due: float | None = None
    application_properties: Mapping[str, str] = {}


@dataclass(slots=True, eq=False)
class Delivery:
    """A message received under a lock. `delivery_count` is how often it had been delivered before."""

    sequence_number: int
    delivery_count: int
    message_id: str | None
    body: str | bytes
    application_properties: Mapping[str, str]
    locked_until: float
    raw: Any = None
    received: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class Settlement:
    """What to do with a delivery, and the message to send before that, or with it."""

    delivery: Delivery
    disposition: Disposition
    reason: str = ""
    description: str = ""
    follow_up: Outgoing | None = None


class Rejection(NamedTuple):
    """A settlement that did not happen."""

    settlement: Settlement
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message as `peek` shows it, without a lock; names and meanings are those of the Azure SDK."""

    body: str
    message_id: str | None
    sequence_number: int
    delivery_count: int
    enqueued_time_utc: datetime.datetime | None
    scheduled_enqueue_time_utc: datetime.datetime | None
    dead_letter_reason: str | None
    dead_letter_error_description: str | None
    application_properties: Mapping[str, str]


class Receiver(Protocol):
    """The receiving side of a bus: messages under locks, which it renews by itself until they are settled."""

    async def receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        """Lock and return what is there, or what comes first within `max_wait_time` seconds.

        A cancelled receive leaves nothing locked. A lost connection is waited out and is no error.
        """
        ...

    def settle(self, settlements: Sequence[Settlement], durable: bool = False) -> asyncio.Future[list[Rejection]]:
        """Begin to settle, follow-ups first or together with it; gives those that were not settled, and why.

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
    system: str
    """OpenTelemetry's `messaging.system`."""

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        """Send in order, in as few round trips as there can be; the sequence numbers where the bus tells them."""
        ...

    def size(self, message: Outgoing) -> int:
        """The bytes of a message that count towards `max_message_bytes`."""
        ...

    async def open_receiver(self, on_lock_lost: Callable[[Delivery], None], max_renewal: float) -> Receiver:
        """A receiver that works; ConfigurationError where that needs another setting.

        Args:
            on_lock_lost: called in the event loop when a delivery's lock is gone.
            max_renewal: seconds after which a lock is renewed no more, and so counts as lost.
        """
        ...

    async def peek(self, max_message_count: int = 100, dead_letter: bool = False) -> list[Message]:
        """List messages without locking them."""
        ...

    async def cancel(self, sequence_number: int) -> None:
        """Take back a scheduled message."""
        ...

    async def close(self) -> None:
        """Let go of files and connections."""
        ...


# ======================================================================================================================
# 7. Store: the embedded queue as SQL
# ======================================================================================================================

# A row is a message. `due` is when it can be received: when it was enqueued, when it is scheduled for, or, while it is
# locked, when the lock runs out. So the query that receives is also what expires locks, by the same index, and those
# come first. A delivery is told from an earlier one of the same message by its delivery count, which no two share: who
# settles or renews names both numbers, and finds no row if another receiver has the message. The dead-letter queue is
# a queue like any other, under Service Bus's own name for it.

SCHEMA_VERSION = 1
APPLICATION_ID = 0x424F494C  # "BOIL"
LOCKED, READY, DEFERRED = 0, 1, 2  # the SQL below has the numbers; nothing here defers a message, the emulator does
DEAD_LETTER_SUFFIX = "/$DeadLetterQueue"

SCHEMA = f"""
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
    CREATE INDEX duplicate_expires ON duplicate (queue_id, expires);
    PRAGMA application_id = {APPLICATION_ID};
    PRAGMA user_version = {SCHEMA_VERSION};
"""


_DUE = """
    FROM     message
    WHERE    queue_id = ? AND state IN (0, 1) AND due <= ?
    ORDER BY state, due, sequence_number
    LIMIT    ?
"""

SELECT_DUE = f"SELECT sequence_number, delivery_count, message_id, body, application_properties, expires {_DUE}"

LOCK_DUE = f"""
    UPDATE message
    SET    state = 0, due = ?, delivery_count = delivery_count + 1
    WHERE  sequence_number IN (SELECT sequence_number {_DUE})
"""
"""Two statements that find the same messages, as RETURNING would copy every one once more."""


class QueueSettings(NamedTuple):
    """The properties of a queue, in seconds, None for off."""

    max_delivery_count: int | None = 10
    duplicate_detection: float | None = None
    time_to_live: float | None = None


class Store:
    """Queues in one SQLite file. The methods are statements, to be run inside `transaction()`.

    One connection, one transaction at a time, from any thread.

    Raises:
        ConfigurationError: the path cannot hold a queue, and will not by waiting.
        ServiceBusUnavailable: the file is locked for too long, the disk is full, or failed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.additions = 0
        """Counts up when there may be more to receive than before, at once or later."""
        self._mutex = threading.Lock()
        self.checkpointing = threading.Lock()
        self._queues: dict[str, tuple[int, QueueSettings]] = {}
        with _explained(path):
            _patiently(path, self._connect)
            try:
                _patiently(path, self._prepare)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with self._mutex:
            self._connection.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, sqlite3.Error):  # it was never opened, or is closed
            self._connection.close()

    def _connect(self) -> None:
        with _connecting:
            self._connection = connect(self.path)
            _stores.add(self)

    # SQLite keeps in memory which locks the process has on a file. A child inherits that, but not the locks. So it
    # closes its copy at once, while its parent still has the file open, and opens the file for itself.

    def before_fork(self) -> None:
        self.checkpointing.acquire()
        self._mutex.acquire()

    def after_fork_in_parent(self) -> None:
        self._mutex.release()
        self.checkpointing.release()

    def after_fork_in_child(self) -> None:
        self._connection.close()
        self.after_fork_in_parent()

    def _prepare(self) -> None:
        """Make sure that the file is ours before changing anything about it."""
        with self._mutex:
            self._check_file()
        with self.transaction():
            if not self._one("SELECT count(*) FROM sqlite_master")[0]:
                for statement in SCHEMA.split(";")[:-1]:
                    self._connection.execute(statement)

    def _check_file(self) -> None:
        (tables,) = self._one("SELECT count(*) FROM sqlite_master")
        (application,) = self._one("PRAGMA application_id")
        (version,) = self._one("PRAGMA user_version")
        if tables and application != APPLICATION_ID:
            raise ConfigurationError(f"{self.path} is the database of another program: choose another path.")
        if version > SCHEMA_VERSION:
            raise ConfigurationError(
                f"{self.path} has schema version {version}, this boilermaker knows {SCHEMA_VERSION}: "
                "it was written by a newer one. Update boilermaker, or choose another path."
            )
        (mode,) = self._one("PRAGMA journal_mode = WAL")
        if mode != "wal" and self.path != ":memory:":
            raise ConfigurationError(f"{self.path}: SQLite cannot keep a write-ahead log on this file system.")

    def _one(self, sql: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._connection.execute(sql, parameters).fetchone()
        return row

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
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        finally:
            self._mutex.release()  # which `_begin` acquired

    def _begin(self, wait: bool) -> None:
        """Begin, and keep other threads away; they are not while this one waits for another process."""
        if not self._mutex.acquire(blocking=wait):
            raise sqlite3.OperationalError("database is locked")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._mutex.release()
            raise

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """Statements inside of a transaction that are undone together on an error."""
        self._connection.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO part")
            raise
        finally:
            if self._connection.in_transaction:
                self._connection.execute("RELEASE part")

    def insist(self, works: Sequence[Callable[[Store], Any]]) -> list[Any]:
        """Run statements in one transaction, or, if one of them fails, each in its own; errors among the results."""
        try:
            with _explained(self.path), self.transaction():
                return [work(self) for work in works]
        except Exception as error:
            if len(works) == 1 or _is_about_the_file(error):
                return [error] * len(works)
        return [result for work in works for result in self.insist([work])]

    def changes(self) -> int:
        """The rows changed so far by this connection."""
        return self._connection.total_changes

    def data_version(self) -> int:
        """A number that differs when another connection has committed."""
        with self._mutex:
            version: int = self._one("PRAGMA data_version")[0]
        return version

    def open_queue(self, name: str, settings: QueueSettings) -> None:
        """Create the queue, or give it other settings, in a transaction of its own."""
        with _explained(self.path), self.transaction():
            self._save_queue(name, settings)
            opened = self._queue(name)
        self._queues[name] = opened

    def _save_queue(self, name: str, settings: QueueSettings) -> None:
        self._connection.execute(
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
        while (row := self._queue_row(name)) is None:
            self._save_queue(name, QueueSettings(None) if name.endswith(DEAD_LETTER_SUFFIX) else QueueSettings())
        return row[0], QueueSettings(*row[1:])

    def _queue_row(self, name: str) -> tuple[Any, ...] | None:
        return self._one(
            """
            SELECT queue_id, max_delivery_count, duplicate_detection, time_to_live
            FROM   queue
            WHERE  name = ?
            """,
            (name,),
        )

    def insert(self, messages: Sequence[Outgoing], now: float) -> list[int]:
        """Enqueue messages; their sequence numbers. A duplicate is dropped, and gets the original's."""
        self.additions += len(messages)
        numbers: list[int] = []
        for queue, group in itertools.groupby(messages, key=lambda message: message.queue):
            _, settings = self._queue(queue)
            if settings.duplicate_detection is None:
                numbers += self._insert_all(queue, list(group), now)
            else:
                numbers += [self._insert_once(queue, message, now) for message in group]
        return numbers

    def _insert_all(self, queue: str, messages: Sequence[Outgoing], now: float) -> range:
        queue_id, settings = self._queue(queue)
        self._connection.executemany(
            """
            INSERT INTO message (queue_id, state, due, enqueued_time, scheduled_enqueue_time, expires,
                                 message_id, body, application_properties)
            VALUES              (?,        1,     ?,   ?,             nullif(?, 0),           nullif(?, 0),
                                 ?,          ?,    nullif(?, ''))
            """,
            [self._row(queue_id, settings.time_to_live, message, now) for message in messages],
        )
        (last,) = self._one("SELECT last_insert_rowid()")
        return range(last - len(messages) + 1, last + 1)

    @staticmethod
    def _row(queue_id: int, time_to_live: float | None, message: Outgoing, now: float) -> tuple[Any, ...]:
        """What to insert; 0 and '' stand for NULL, as sqlite3 takes ten times as long to pass on None."""
        scheduled = message.due if message.due is not None and message.due > now else 0
        enqueued = scheduled or now
        expires = 0 if time_to_live is None else enqueued + time_to_live
        properties = _to_json(message.application_properties) if message.application_properties else ""
        return queue_id, enqueued, enqueued, scheduled, expires, message.message_id, message.body, properties

    def _insert_once(self, queue: str, message: Outgoing, now: float) -> int:
        """Enqueue a message unless its id was enqueued within the window of duplicate detection."""
        queue_id, settings = self._queue(queue)
        assert settings.duplicate_detection is not None
        self._connection.execute("DELETE FROM duplicate WHERE queue_id = ? AND expires <= ?", (queue_id, now))
        original = self._one(
            "SELECT sequence_number FROM duplicate WHERE queue_id = ? AND message_id = ?",
            (queue_id, message.message_id),
        )
        if original is not None:
            return int(original[0])
        (number,) = self._insert_all(queue, [message], now)
        expires = now + settings.duplicate_detection
        self._connection.execute(
            "INSERT INTO duplicate (queue_id, message_id, expires, sequence_number) VALUES (?, ?, ?, ?)",
            (queue_id, message.message_id, expires, number),
        )
        return number

    def claim(self, queue: str, max_message_count: int, lock_duration: float, now: float) -> list[Delivery]:
        """Lock what is due, expired locks first; what has outlived its settings goes to the dead-letter queue."""
        queue_id, settings = self._queue(queue)
        most = MAX_SECONDS if settings.max_delivery_count is None else settings.max_delivery_count
        locked_until, received = now + lock_duration, time.monotonic()
        claimed: list[Delivery] = []
        while (missing := max_message_count - len(claimed)) > 0:
            due = (queue_id, now, missing)
            rows = self._connection.execute(SELECT_DUE, due).fetchall()
            if rows:
                self._connection.execute(LOCK_DUE, (locked_until, *due))
            kept = []
            for number, count, message_id, body, text, expires in rows:
                properties = _properties(text)
                delivery = Delivery(number, count, message_id, body, properties, locked_until, None, received)
                if (expires is None and count < most) or not self._bury(queue, delivery, most, expires, now):
                    kept.append(delivery)
            claimed += kept
            if len(kept) == len(rows):
                break
        return claimed

    def _bury(self, queue: str, delivery: Delivery, most: int, expires: float | None, now: float) -> bool:
        """Dead-letter a message that may not be delivered any more; whether it was one."""
        if queue.endswith(DEAD_LETTER_SUFFIX):
            return False
        if expires is not None and expires <= now:
            reason, text = "TTLExpiredException", "Its time to live has passed."
        elif delivery.delivery_count >= most:
            reason, text = (
                "MaxDeliveryCountExceeded",
                f"It was delivered {delivery.delivery_count} times, never settled.",
            )
        else:
            return False
        self.dead_letter(queue, delivery, reason, text, now)
        self._connection.execute(  # claiming it was no delivery
            "UPDATE message SET delivery_count = delivery_count - 1 WHERE sequence_number = ?",
            (delivery.sequence_number,),
        )
        return True

    def complete(self, deliveries: Sequence[Delivery]) -> int:
        """Delete messages; how many of them were still held."""
        return self._connection.executemany(
            "DELETE FROM message WHERE sequence_number = ? AND delivery_count = ? AND state = 0",
            [(delivery.sequence_number, delivery.delivery_count + 1) for delivery in deliveries],
        ).rowcount

    def abandon(self, delivery: Delivery) -> bool:
        """Give a message back, to where it was in the queue; False if the lock was lost."""
        self.additions += 1
        return self._changed(
            """
            UPDATE message
            SET    state = 1, due = enqueued_time
            WHERE  sequence_number = ? AND delivery_count = ? AND state = 0
            """,
            (delivery.sequence_number, delivery.delivery_count + 1),
        )

    def renew(self, delivery: Delivery, lock_duration: float, now: float) -> bool:
        """Lock a held message anew; False if the lock was lost."""
        return self._changed(
            "UPDATE message SET due = ? WHERE sequence_number = ? AND delivery_count = ? AND state = 0",
            (now + lock_duration, delivery.sequence_number, delivery.delivery_count + 1),
        )

    def dead_letter(self, queue: str, delivery: Delivery, reason: str, description: str, now: float) -> bool:
        """Move a held message to the queue's dead-letter queue; False if the lock was lost.

        One that came from there stays locked: given back, it would be received again at once, and for ever.
        """
        self.additions += 1
        queue_id, _ = self._queue(dead_letter_queue(queue))
        state, due = (LOCKED, None) if queue.endswith(DEAD_LETTER_SUFFIX) else (READY, now)
        return self._changed(
            """
            UPDATE message
            SET    queue_id = ?, state = ?, due = coalesce(?, due), expires = NULL,
                   dead_letter_reason = ?, dead_letter_error_description = ?
            WHERE  sequence_number = ? AND delivery_count = ? AND state = 0
            """,
            (queue_id, state, due, reason, description, delivery.sequence_number, delivery.delivery_count + 1),
        )

    def _changed(self, sql: str, parameters: Sequence[Any]) -> bool:
        return self._connection.execute(sql, parameters).rowcount == 1

    def next_due(self, queue: str) -> float | None:
        """When the next message can be received: it is scheduled for then, or its lock runs out."""
        queue_id, _ = self._queue(queue)
        dues = [
            self._one("SELECT min(due) FROM message WHERE queue_id = ? AND state = ?", (queue_id, state))[0]
            for state in (LOCKED, READY)
        ]
        return min((due for due in dues if due is not None), default=None)

    def peek(self, queue: str, max_message_count: int) -> list[Message]:
        """The messages that would be received first, locked and scheduled ones included, by sequence number."""
        queue_id, _ = self._queue(queue)
        rows = self._connection.execute(
            """
            SELECT   sequence_number, delivery_count, message_id, body, application_properties, enqueued_time,
                     scheduled_enqueue_time, dead_letter_reason, dead_letter_error_description
            FROM     message
            WHERE    queue_id = ?
            ORDER BY state, due
            LIMIT    ?
            """,
            (queue_id, max_message_count),
        )
        return [_message_of_row(row) for row in sorted(rows)]

    def cancel(self, queue: str, sequence_number: int, now: float) -> bool:
        """Delete a message that is scheduled and not due yet; False if there is none."""
        queue_id, _ = self._queue(queue)
        return self._changed(
            "DELETE FROM message WHERE sequence_number = ? AND queue_id = ? AND state = 1 AND due > ?",
            (sequence_number, queue_id, now),
        )


_connecting = threading.Lock()
_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_forking: list[Store] = []


def _before_fork() -> None:
    _connecting.acquire()
    _forking[:] = _stores
    for store in _forking:
        store.before_fork()


def _after_fork(action: Callable[[Store], None]) -> None:
    for store in _forking:
        action(store)
    _forking.clear()
    _connecting.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=functools.partial(_after_fork, Store.after_fork_in_parent),
        after_in_child=functools.partial(_after_fork, Store.after_fork_in_child),
    )


def dead_letter_queue(queue: str) -> str:
    """The path of a queue's dead-letter queue; that of a dead-letter queue is itself."""
    return queue if queue.endswith(DEAD_LETTER_SUFFIX) else queue + DEAD_LETTER_SUFFIX


_NO_PROPERTIES: Mapping[str, str] = {}


def _properties(text: str | None) -> Mapping[str, str]:
    properties: Mapping[str, str] = json.loads(text) if text else _NO_PROPERTIES
    return properties


def _message_of_row(row: tuple[Any, ...]) -> Message:
    number, count, message_id, body, properties, enqueued, scheduled, reason, description = row
    return Message(
        body=body if isinstance(body, str) else body.decode("utf-8", "replace"),
        message_id=message_id,
        sequence_number=number,
        delivery_count=count,
        enqueued_time_utc=_utc(enqueued),
        scheduled_enqueue_time_utc=_utc(scheduled) if scheduled is not None else None,
        dead_letter_reason=reason,
        dead_letter_error_description=description,
        application_properties=_properties(properties),
    )


def connect(path: str) -> sqlite3.Connection:
    """A connection for short write transactions that never wait, and never checkpoint, by themselves."""
    if sqlite3.sqlite_version_info < (3, 24):
        raise ConfigurationError(f"SQLite {sqlite3.sqlite_version} is too old: boilermaker needs 3.24, for upserts.")
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        for pragma in ("synchronous = NORMAL", "wal_autocheckpoint = 0", "secure_delete = OFF", "cache_size = -16000"):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


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


def _is_about_the_file(error: Exception) -> bool:
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
# the write-ahead log: what `synchronous=FULL` does, but outside the lock and for many publishers at once. It runs in a
# thread too, but where the disk has lately been so quick that handing over to a thread takes longer. Checkpoints, which
# write and sync the file itself, have a thread and a connection of their own.

CHECKPOINT_PAGES = 2_000
"""Pages, roughly, in the write-ahead log between two checkpoints, after each of which it is written from its beginning
again: to sync a file that grows takes the disk twice as long."""

MAX_LOG_BYTES = 32 * 1024 * 1024
"""The size from which a checkpoint makes the log a short file again: somebody read for long, and kept it growing."""

CHECKPOINT_PATIENCE = 100
"""Milliseconds for which a checkpoint keeps writers waiting for somebody who reads, before it leaves it to the next."""

QUICK_SYNC = 0.003
"""Seconds that an fdatasync may take for the event loop to wait for it, and ..."""

QUICK_SYNCS = 3
"""... how many in a row have to have been so quick, before the event loop does."""

POLL_INTERVAL = 0.025
"""Seconds between two looks at the file where the operating system does not tell of changes."""


class QueueFile:
    """A store, opened in this process, with what keeps it durable."""

    def __init__(self, path: str, queue: str, settings: QueueSettings) -> None:
        self.pid = os.getpid()
        self.closed = False
        self._log: int | None = None
        self._inode: int | None = None
        self.log_path = None if path == ":memory:" else path + "-wal"
        self.store = Store(path)
        try:
            self.store.open_queue(queue, settings)
            if self.log_path is not None:
                self._inode, self._log = os.stat(path).st_ino, os.open(self.log_path, os.O_RDWR)
        except OSError as error:
            self.store.close()
            raise ServiceBusUnavailable(f"{path} cannot be opened: {error}") from error
        except BaseException:
            self.store.close()
            raise
        self.threads = ThreadPoolExecutor(3, thread_name_prefix="boilermaker")
        self._syncing = threading.Lock()
        self._sync_failed = False
        self._seen_changes = 0
        self._logged_pages = 0
        self._quick_syncs = 0

    def in_a_thread(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Call where waiting does no harm; the future fails if the file has been closed."""
        loop = asyncio.get_running_loop()
        try:
            return loop.run_in_executor(self.threads, function, *arguments)
        except RuntimeError:
            closed: asyncio.Future[T] = loop.create_future()
            closed.set_exception(ServiceBusUnavailable(f"{self.store.path} has been closed."))
            return closed

    @property
    def syncs_quickly(self) -> bool:
        busy = self._syncing.locked() or self.store.checkpointing.locked()
        return self._quick_syncs >= QUICK_SYNCS and not busy

    def sync(self) -> ServiceBusUnavailable | None:
        """Wait until all that is committed is on the disk; the error if that failed."""
        if self._log is None:
            return None
        started = time.perf_counter()
        with self._syncing:  # after another's that may fail: the system reports a failure once
            try:
                self._check_files()
                if self._sync_failed:
                    self._mend()
                getattr(os, "fdatasync", os.fsync)(self._log)
            except FileNotFoundError:
                path = self.store.path
                return ServiceBusUnavailable(f"{path} was deleted or replaced while open: close the bus, or restart.")
            except (OSError, sqlite3.Error) as error:
                self._sync_failed, self._quick_syncs = True, 0
                return ServiceBusUnavailable(f"{self.store.path} could not be synced to the disk: {error}")
            self._sync_failed = False
            self._quick_syncs = self._quick_syncs + 1 if time.perf_counter() - started < QUICK_SYNC else 0
        return None

    def _mend(self) -> None:
        """Write again what an fdatasync could not: the system does not do that by itself."""
        mended = False
        if self.store.checkpointing.acquire(blocking=False):
            try:
                mended = self._move_log_to_file("TRUNCATE")
            finally:
                self.store.checkpointing.release()
        if not mended:
            raise OSError("an earlier failure is not mended yet")

    def announce(self) -> None:
        """Wake those who wait for messages in other processes, or event loops: see FileWatcher.

        By the log, not by the file: to close any descriptor of that would let go of the locks SQLite has on it.
        """
        if self.log_path is not None and _HAS_INOTIFY:
            with contextlib.suppress(OSError):  # it is gone, or no descriptor is free: they look again by themselves
                os.close(os.open(self.log_path, os.O_RDONLY))

    def _check_files(self) -> None:
        """Notice that the file was deleted or replaced, and not write on into nothing.

        The log is not asked for its inode: to Linux that is to read its time of change, which it then writes more
        exactly, and so more often; a publish would take a tenth longer.
        """
        assert self.log_path is not None
        if os.stat(self.store.path).st_ino != self._inode or not os.access(self.log_path, os.F_OK):
            raise FileNotFoundError("the file was replaced")

    def checkpoint_soon(self) -> None:
        """After a transaction, let a thread move the log's content to the file if there is much of it."""
        if self._log is None:
            return
        changes = self.store.changes()
        if changes == self._seen_changes:
            return
        self._logged_pages += 3 + (changes - self._seen_changes) // 8
        self._seen_changes = changes
        if self._logged_pages >= CHECKPOINT_PAGES and self.store.checkpointing.acquire(blocking=False):
            self._logged_pages = 0
            try:
                self.threads.submit(self._checkpoint)
            except RuntimeError:  # it has been closed
                self.store.checkpointing.release()

    def _checkpoint(self) -> None:
        assert self._log is not None
        try:
            self._move_log_to_file("RESTART" if os.fstat(self._log).st_size < MAX_LOG_BYTES else "TRUNCATE")
        except sqlite3.Error as error:
            logger.warning("Checkpoint of %s failed, the next will try again: %s", self.store.path, error)
        finally:
            self.store.checkpointing.release()

    def _move_log_to_file(self, mode: str) -> bool:
        """Copy without hindering anybody, then, with writers waiting for a moment, what they wrote meanwhile.

        False if somebody read for too long: then the log goes on.
        """
        with contextlib.closing(connect(self.store.path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            connection.execute(f"PRAGMA busy_timeout = {CHECKPOINT_PATIENCE}")
            blocked, _, _ = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            if not blocked:  # the log begins anew, and the first to write to it has to sync it: here, not there
                with contextlib.suppress(sqlite3.OperationalError):  # somebody else was the first
                    connection.execute("UPDATE queue SET name = name")
        return not blocked

    def close(self) -> None:
        self.closed = True
        self.threads.shutdown(wait=True)
        self.store.close()
        self._close_log()

    def __del__(self) -> None:
        self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            os.close(log)


class _Request(NamedTuple):
    """Something to do in a transaction.

    If it only sends, `messages` is what: that is inserted in one statement with what others send.
    """

    work: Callable[[Store], Any]
    future: asyncio.Future[Any]
    durable: bool = False
    committed: Callable[[Any, bool], object] | None = None
    messages: Sequence[Outgoing] = ()


_Unsynced: TypeAlias = tuple["asyncio.Future[Any]", Any]


class GroupCommit:
    """The transactions of one event loop on a queue file."""

    def __init__(self, file: QueueFile) -> None:
        self.file = file
        self.listeners: set[Callable[[], None]] = set()
        self._requests: list[_Request] = []
        self._unsynced: list[_Unsynced] = []
        self._seen_additions = 0
        self._flushing = False
        self._syncing = False

    def submit(
        self,
        work: Callable[[Store], T],
        durable: bool = False,
        committed: Callable[[T, bool], object] | None = None,
    ) -> asyncio.Future[T]:
        """Run statements in the next transaction.

        Args:
            work: the statements; run again from the start if the transaction has to be.
            durable: answer when the transaction is on the disk, not when it is committed.
            committed: called at once with the result, and whether the future was cancelled in the meantime.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._request(_Request(work, future, durable, committed))
        return future

    def send(self, messages: Sequence[Outgoing]) -> asyncio.Future[list[int | None]]:
        """Enqueue messages in the next transaction, in one statement with what others send; their sequence numbers."""
        future: asyncio.Future[list[int | None]] = asyncio.get_running_loop().create_future()
        self._request(_Request(functools.partial(_insert, messages), future, durable=True, messages=messages))
        return future

    def _request(self, request: _Request) -> None:
        self._requests.append(request)
        if not self._flushing:
            self._flushing = True
            request.future.get_loop().call_soon(self._flush)

    def _flush(self) -> None:
        requests = [request for request in self._requests if not request.future.done()]
        self._requests.clear()
        try:
            with self.file.store.transaction(wait=False):
                results = self._results(requests)
        except Exception:  # whatever it is, the thread meets it again, and has the time to deal with it
            thread = self.file.in_a_thread(self.file.store.insist, [request.work for request in requests])
            thread.add_done_callback(functools.partial(self._thread_done, requests))
        else:
            self._flushing = False
            self._answer(requests, results)

    def _results(self, requests: Sequence[_Request]) -> list[Any]:
        """Do the work of all, in order, but for what is sent: that comes first, in one statement."""
        store = self.file.store
        numbers = iter(_insert([message for request in requests for message in request.messages], store))
        return [
            list(itertools.islice(numbers, len(request.messages))) if request.messages else request.work(store)
            for request in requests
        ]

    def _thread_done(self, requests: Sequence[_Request], thread: asyncio.Future[list[Any]]) -> None:
        self._flushing = bool(self._requests)
        if self._requests:
            asyncio.get_running_loop().call_soon(self._flush)
        error = thread.exception()
        self._answer(requests, thread.result() if error is None else [error] * len(requests))

    def _answer(self, requests: Sequence[_Request], results: Sequence[Any]) -> None:
        if self.file.store.additions != self._seen_additions:
            self._seen_additions = self.file.store.additions
            self._announce()
        for request, result in zip(requests, results, strict=True):
            if request.committed is not None and not isinstance(result, Exception):
                request.committed(result, request.future.cancelled())
            if request.durable and not isinstance(result, Exception):
                self._unsynced.append((request.future, result))
            else:
                _resolve(request.future, result)
        if self._unsynced and not self._syncing:
            self._sync()
        if not self.file.closed:
            self.file.checkpoint_soon()

    def _announce(self) -> None:
        """Tell those who wait for messages, here and elsewhere, that there may be some."""
        for listener in list(self.listeners):
            listener()
        self.file.announce()

    def _sync(self) -> None:
        waiting, self._unsynced = self._unsynced, []
        if self.file.syncs_quickly and not self.file.closed:
            self._synced(waiting, self.file.sync())
        else:
            self._syncing = True
            thread = self.file.in_a_thread(self.file.sync)
            thread.add_done_callback(functools.partial(self._thread_synced, waiting))

    def _thread_synced(
        self, waiting: Sequence[_Unsynced], thread: asyncio.Future[ServiceBusUnavailable | None]
    ) -> None:
        self._syncing = False
        self._synced(waiting, thread.exception() or thread.result())
        if self._unsynced:
            self._sync()

    def _synced(self, waiting: Sequence[_Unsynced], failure: BaseException | None) -> None:
        for future, result in waiting:
            _resolve(future, failure or result)


def _insert(messages: Sequence[Outgoing], store: Store) -> list[int]:
    return store.insert(messages, time.time())


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


class LocalServiceBus:
    """A durable queue in a SQLite file, for as many processes of one machine as like to open it.

    It has Service Bus's semantics: peek-lock with expiry and renewal, delivery count, scheduled messages, time to live,
    dead-letter queue, duplicate detection, size limit, several queues in one file. The settings are kept with the
    queue, for those who send to it from another: give the same in all its processes. The file is opened at the first
    use, and must be on a local disk.

    Args:
        path: the file, made where there is none; ":memory:" for a queue that ends with `close()`.
        queue_name: the queue in the file.
        lock_duration: seconds before an unsettled message is delivered again, unless its lock is renewed.
        max_delivery_count: deliveries before a message is dead-lettered, None for no limit.
        duplicate_detection: seconds in which a second message of the same id is dropped, None for off.
        time_to_live: seconds before a message that nobody received is dead-lettered, None for never.
        max_message_bytes: the size limit of a message body.

    Raises:
        ConfigurationError: an argument is out of range; at the first use, the file cannot hold a queue.
        ServiceBusUnavailable: at use, the disk is full or the file locked for long: nothing was changed then. Or what
            was sent could not be synced to the disk: then it may be there all the same.
    """

    system = "boilermaker"

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
        self.path = _checked_path(path)
        self.queue_name = _checked_queue_name(queue_name)
        self.lock_duration = _positive("lock_duration", lock_duration)
        self.max_message_bytes = _count("max_message_bytes", max_message_bytes)
        self._settings = QueueSettings(
            None if max_delivery_count is None else _count("max_delivery_count", max_delivery_count),
            None if duplicate_detection is None else _positive("duplicate_detection", duplicate_detection),
            None if time_to_live is None else _positive("time_to_live", time_to_live),
        )
        self._real_path = self.path if self.path == ":memory:" else os.path.realpath(self.path)
        self._file: QueueFile | None = None
        self._opening: dict[int, threading.Lock] = {}  # by process: a child must not wait for its parent's threads
        self._commits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, GroupCommit] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"LocalServiceBus({self.path!r}, {self.queue_name!r})"

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        commit = await self._commit()
        return await commit.send(messages)

    def size(self, message: Outgoing) -> int:
        return len(message.body)

    async def peek(self, max_message_count: int = 100, dead_letter: bool = False) -> list[Message]:
        """List messages without locking them: those that would be received first, locked and scheduled ones too."""
        _count("max_message_count", max_message_count)
        commit = await self._commit()
        queue = dead_letter_queue(self.queue_name) if dead_letter else self.queue_name
        return await commit.submit(lambda store: store.peek(queue, max_message_count))

    async def cancel(self, sequence_number: int) -> None:
        """Take back a scheduled message.

        Raises:
            MessageNotFound: none is waiting under that number; it may be due already.
        """
        _check_sequence_number(sequence_number)
        commit = await self._commit()

        def cancel(store: Store) -> bool:
            return _is_64_bit(sequence_number) and store.cancel(self.queue_name, sequence_number, time.time())

        if not await commit.submit(cancel, durable=True):
            raise MessageNotFound(f"{self.queue_name} has no scheduled message with sequence number {sequence_number}.")

    async def open_receiver(self, on_lock_lost: Callable[[Delivery], None], max_renewal: float) -> LocalReceiver:
        return LocalReceiver(self, await self._commit(), on_lock_lost, max_renewal)

    async def close(self) -> None:
        """Close the file. The bus opens it again if it is used again."""
        file, self._file = self._file, None
        commit = self._commits.get(asyncio.get_running_loop())
        try:
            if commit is not None and commit.file is file:
                with contextlib.suppress(ServiceBusUnavailable):
                    await commit.submit(lambda store: None, durable=True)  # after all that was asked for before
        finally:
            if file is not None and file.pid == os.getpid():
                await asyncio.to_thread(file.close)

    async def _commit(self) -> GroupCommit:
        """This event loop's transactions, on the file as this process has it open."""
        loop = asyncio.get_running_loop()
        commit = self._commits.get(loop)
        if commit is not None and commit.file is self._file and commit.file.pid == os.getpid():
            return commit
        file = await asyncio.to_thread(self._open)
        commit = self._commits.get(loop)  # somebody else may have been first
        if commit is None or commit.file is not file:
            commit = self._commits[loop] = GroupCommit(file)
        return commit

    def _open(self) -> QueueFile:
        """Open the file, anew after a fork: a connection must not be shared, nor closed, by a child."""
        with self._opening.setdefault(os.getpid(), threading.Lock()):
            file = self._file  # another event loop may close the bus meanwhile
            if file is None or file.pid != os.getpid():
                if file is not None:
                    _inherited.append(file)  # a child must not even close what it inherited
                file = self._file = QueueFile(self._real_path, self.queue_name, self._settings)
            return file


_inherited: list[QueueFile] = []


def _positive(name: str, value: float, or_zero: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_SECONDS or (value == 0 and not or_zero):
        least = "from 0" if or_zero else "over 0,"
        raise ConfigurationError(f"{name}={value!r} must be a number {least} up to {MAX_SECONDS}.")
    return value


def _checked_path(path: object) -> str:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigurationError(f"path={path!r} must be that of a file, or ':memory:'.")
    return text


def _count(name: str, value: int) -> int:
    if type(value) is not int or not 0 < value <= MAX_SECONDS:
        raise ConfigurationError(f"{name}={value!r} must be an int over 0, up to {MAX_SECONDS}.")
    return value


def _check_sequence_number(number: object) -> None:
    if type(number) is not int:
        raise UsageError(f"sequence_number={number!r} must be an int: that of a task published with delay or eta.")


def _is_64_bit(number: int) -> bool:
    """Whether SQLite and AMQP can hold a number, and so whether a message can have it."""
    return abs(number) < 2**63


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


class LocalReceiver:
    """Receives from a `LocalServiceBus`, and keeps the locks of what it received."""

    def __init__(
        self,
        bus: LocalServiceBus,
        commit: GroupCommit,
        on_lock_lost: Callable[[Delivery], None],
        max_renewal: float,
    ) -> None:
        self._queue = bus.queue_name
        self._lock_duration = bus.lock_duration
        self._commit = commit
        self._on_lock_lost = on_lock_lost
        self._max_renewal = max_renewal
        self._held: set[Delivery] = set()
        self._closed = threading.Event()
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._watcher = FileWatcher(commit.file.log_path, commit.file.store)
        self._renewer = threading.Thread(target=self._keep_locks, name="boilermaker-locks", daemon=True)
        self._renewer.start()

    async def receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        if self._commit.file.closed:
            await self._reopen()
        deliveries, _ = await self._claim(max_message_count)
        if deliveries or max_wait_time <= 0:
            return deliveries
        deadline = self._loop.time() + max_wait_time
        changed = asyncio.Event()
        with self._watching(changed.set):
            while not self._commit.file.closed:
                changed.clear()
                deliveries, next_due = await self._claim(max_message_count)
                remaining = deadline - self._loop.time()
                if deliveries or remaining <= 0:
                    return deliveries
                if next_due is not None:
                    remaining = min(remaining, max(next_due - time.time(), 0.001))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(remaining):
                        await changed.wait()
        return []

    async def _reopen(self) -> None:
        """Go on with the bus, which was closed, and is used again by that."""
        commit = await self._bus._commit()
        self._watcher.close()
        self._commit = commit
        self._watcher = FileWatcher(commit.file.log_path, commit.file.store)

    async def _claim(self, max_message_count: int) -> tuple[list[Delivery], float | None]:
        """Lock messages; none, and when to look again. What a cancelled claim locked is given back."""
        claim = functools.partial(self._claim_now, max_message_count)
        claiming = self._commit.submit(claim, committed=self._claimed)
        try:
            return await claiming
        except asyncio.CancelledError:
            if not claiming.cancelled() and claiming.exception() is None:
                self._claimed(claiming.result(), True)
            raise

    def _claimed(self, claim: tuple[list[Delivery], float | None], cancelled: bool) -> None:
        """Keep the locks from now on, before any task can block the event loop; or give them back."""
        if cancelled:
            self.settle([Settlement(delivery, Disposition.ABANDON) for delivery in claim[0]])
        else:
            self._held.update(claim[0])

    def _claim_now(self, max_message_count: int, store: Store) -> tuple[list[Delivery], float | None]:
        deliveries = store.claim(self._queue, max_message_count, self._lock_duration, time.time())
        return deliveries, None if deliveries else store.next_due(self._queue)

    @contextlib.contextmanager
    def _watching(self, changed: Callable[[], None]) -> Iterator[None]:
        """Hear of added messages: of this loop's own from the group commit, of all others' from the file."""
        self._commit.listeners.add(changed)
        self._watcher.start(changed)
        try:
            yield
        finally:
            self._watcher.stop()
            self._commit.listeners.discard(changed)

    def settle(self, settlements: Sequence[Settlement], durable: bool = False) -> asyncio.Future[list[Rejection]]:
        self._held.difference_update(settlement.delivery for settlement in settlements)
        if self._commit.file.closed:
            return asyncio.ensure_future(self._settle_anew(settlements, durable))
        return self._commit.submit(functools.partial(self._settle_now, settlements), durable=durable)

    async def _settle_anew(self, settlements: Sequence[Settlement], durable: bool) -> list[Rejection]:
        """Settle by the bus as it is opened again; the next receive goes on with that too."""
        commit = await self._bus._commit()
        return await commit.submit(functools.partial(self._settle_now, settlements), durable=durable)

    def _settle_now(self, settlements: Sequence[Settlement], store: Store) -> list[Rejection]:
        """All in the one transaction; those that only delete, together."""
        now = time.time()
        plain: list[Settlement] = []
        others: list[Settlement] = []
        for one in settlements:
            only_deletes = one.disposition is Disposition.COMPLETE and one.follow_up is None
            (plain if only_deletes else others).append(one)
        if not self._complete_all(store, plain):
            others += plain  # one by one, to know which
        return [rejection for one in others if (rejection := self._settle_one(store, one, now)) is not None]

    def _complete_all(self, store: Store, settlements: Sequence[Settlement]) -> bool:
        """Complete, all or none; False if one was not held any more."""
        if not settlements:
            return True
        try:
            with store.savepoint():
                if store.complete([one.delivery for one in settlements]) < len(settlements):
                    raise MessageLockLost
        except MessageLockLost:
            return False
        return True

    def _settle_one(self, store: Store, settlement: Settlement, now: float) -> Rejection | None:
        """Settle and publish what follows, both or, if the lock was lost or something is wrong with them, neither."""
        try:
            with store.savepoint():
                if not self._dispose(store, settlement, now):
                    return _lock_lost(settlement)
                if settlement.follow_up is not None:
                    store.insert([settlement.follow_up], now)
        except (ValueError, OverflowError) as error:  # text or a number that SQLite cannot hold
            return Rejection(settlement, error)
        return None

    def _dispose(self, store: Store, settlement: Settlement, now: float) -> bool:
        """Whether the message was still held."""
        delivery = settlement.delivery
        match settlement.disposition:
            case Disposition.COMPLETE:
                return store.complete([delivery]) == 1
            case Disposition.DEAD_LETTER:
                return store.dead_letter(self._queue, delivery, settlement.reason, settlement.description, now)
            case Disposition.ABANDON:
                return store.abandon(delivery)
            case Disposition.LEAVE:
                return True

    def _keep_locks(self) -> None:
        """Renew in a thread, so that a task which blocks the event loop keeps its lock."""
        while not self._closed.wait(self._lock_duration / 2) and not self._loop.is_closed():
            try:
                lost = self._renew(list(self._held))
            except Exception as error:
                logger.warning("Renewing the locks of %s failed, will try again: %s", self._queue, error)
                continue
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                for delivery in lost:
                    self._loop.call_soon_threadsafe(self._lose, delivery)

    def _renew(self, held: Sequence[Delivery]) -> list[Delivery]:
        """Renew locks; those that are lost, or were renewed for long enough."""
        latest = time.monotonic() - self._max_renewal
        if not held:
            return []
        store = self._commit.file.store
        with _explained(store.path), store.transaction():
            now = time.time()
            return [d for d in held if d.received < latest or not store.renew(d, self._lock_duration, now)]

    def _lose(self, delivery: Delivery) -> None:
        if delivery in self._held:
            self._held.remove(delivery)
            self._on_lock_lost(delivery)

    async def close(self) -> None:
        self._closed.set()
        try:
            with contextlib.suppress(ServiceBusUnavailable):
                await self._commit.submit(lambda store: None)  # what was given back just now comes before
        finally:
            await asyncio.to_thread(self._renewer.join)
            self._watcher.close()


def _lock_lost(settlement: Settlement, how: str = "and another receiver had it") -> Rejection:
    number = settlement.delivery.sequence_number
    return Rejection(settlement, MessageLockLost(f"the lock of message {number} ran out {how}"))


class FileWatcher:
    """Calls back in the event loop when somebody may have added messages to the file.

    Linux tells by inotify, within a fraction of a millisecond and without costing anything in between: who has added
    some opens and closes the write-ahead log after the commit, for that to be heard. (That it is written to can be
    heard too, but in the middle of the commit, too soon to receive anything.) Elsewhere the file's change counter is
    read every POLL_INTERVAL. The callback may come for nothing, and nothing depends on it: a worker looks for itself
    every MAX_WAIT, should somebody have died in between.
    """

    def __init__(self, log_path: str | None, store: Store) -> None:
        self._store = store
        self._inotify = None if log_path is None else _inotify(log_path)
        self._polls = log_path is not None and self._inotify is None
        self._changed: Callable[[], None] = lambda: None
        self._poll_handle: asyncio.TimerHandle | None = None
        self._version = 0

    def start(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        if self._inotify is not None:
            asyncio.get_running_loop().add_reader(self._inotify, self._heard)
        elif self._polls:
            self._version = self._store.data_version()
            self._poll()

    def stop(self) -> None:
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify)
        if self._poll_handle is not None:
            self._poll_handle.cancel()

    def close(self) -> None:
        inotify, self._inotify = self._inotify, None
        if inotify is not None:
            os.close(inotify)

    def _heard(self) -> None:
        assert self._inotify is not None
        with contextlib.suppress(BlockingIOError):
            os.read(self._inotify, 65536)
        self._changed()

    def _poll(self) -> None:
        try:
            version = self._store.data_version()
        except sqlite3.Error:  # it has been closed: the next receive opens it again
            return
        self._poll_handle = asyncio.get_running_loop().call_later(POLL_INTERVAL, self._poll)
        if version != self._version:
            self._version = version
            self._changed()


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

ATTEMPT_TIMEOUT = 15
"""Seconds for one attempt to send, to settle, to renew or to open a link."""

CALL_TIMEOUT = 40
"""Seconds after which a call of the SDK is given up: some wait without end for a connection that passes nothing on."""

SEND_PAUSES = (0.25, 1.0, 4.0)
"""Seconds, at most, between attempts to send."""

SEND_PATIENCE = 18
"""Seconds after which a publisher is told that it did not work, whatever the attempts are waiting for."""

RETRY_PAUSE = 0.25
"""Seconds between two attempts to settle."""

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


class RequestRefused(UsageError):
    """The service refuses it, and will again."""


class Throttled(ServiceBusUnavailable):
    """The service asks to slow down; the link is fine."""


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

    Raises:
        ConfigurationError: names what is missing or cannot be read.
    """

    service_bus_namespace_url: str | None = None
    service_bus_queue_name: str | None = None
    service_bus_connection_string: str | None = field(default=None, repr=False)
    service_bus_credential: Any = field(default=None, repr=False)
    azure_credential_include_msi: bool | None = None

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
        client_options: for the SDK's `ServiceBusClient`: `transport_type`, `http_proxy`, `custom_endpoint_address`,
            `connection_verify` and others.

    Raises:
        ConfigurationError: an argument is wrong, or a package is missing.
    """

    system = "servicebus"

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
        **client_options: Any,
    ) -> None:
        self.namespace = _namespace_of(namespace_url)
        self.queue_name = _checked_queue_name(queue_name)
        self.max_message_bytes = _count("max_message_bytes", max_message_bytes)
        self.duplicate_detection = _positive("duplicate_detection", duplicate_detection, or_zero=True)
        self.max_delivery_count = _count("max_delivery_count", max_delivery_count)
        self.entity_path: str | None = None
        self._credential = credential
        self._connection_string: str | None = None
        self._client_options = client_options
        self._opened: dict[tuple[int, asyncio.AbstractEventLoop], tuple[ServiceBusClient, dict[str, AzureSender]]] = {}

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
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        duplicate_detection: float = 600,
        max_delivery_count: int = 10,
        **client_options: Any,
    ) -> AzureServiceBus:
        """The bus of a `Config`: by its connection string where it has one, else by namespace and credential."""
        options = {
            "max_message_bytes": max_message_bytes,
            "duplicate_detection": duplicate_detection,
            "max_delivery_count": max_delivery_count,
            **client_options,
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
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        duplicate_detection: float = 600,
        max_delivery_count: int = 10,
        **client_options: Any,
    ) -> AzureServiceBus:
        """The bus of a connection string, as the Azure portal shows it under "Shared access policies".

        One with an `EntityPath` is for that queue and its dead-letter queue only.
        """
        text = conn_str.strip() if isinstance(conn_str, str) else ""
        endpoint = _connection_setting(text, "Endpoint") or _connection_setting(text, "HostName")
        if not endpoint:
            raise ConfigurationError("The connection string has no Endpoint: it begins with 'Endpoint=sb://...'.")
        bus = cls(
            endpoint,
            queue_name,
            max_message_bytes=max_message_bytes,
            duplicate_detection=duplicate_detection,
            max_delivery_count=max_delivery_count,
            **client_options,
        )
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

    def _of_this_loop(self) -> tuple[ServiceBusClient, dict[str, AzureSender]]:
        """The SDK's client, and the senders by queue: neither can be shared by event loops, or across a fork."""
        here = os.getpid(), asyncio.get_running_loop()
        if here not in self._opened:
            for closed in [other for other in list(self._opened) if other[1].is_closed()]:
                self._opened.pop(closed, None)
            self._opened[here] = self._make_client(), {}
        return self._opened[here]

    def _make_client(self) -> ServiceBusClient:
        make = _import_azure().aio.ServiceBusClient
        options = {"retry_total": 0, "try_timeout": ATTEMPT_TIMEOUT, **self._client_options}
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
        return client

    async def send(self, messages: Sequence[Outgoing]) -> list[int | None]:
        numbers: list[int | None] = []
        for queue, group in itertools.groupby(messages, key=lambda message: message.queue):
            _, senders = self._of_this_loop()
            if queue not in senders:
                senders[queue] = AzureSender(self, queue)
            numbers += await senders[queue].send(list(group))
        return numbers

    def size(self, message: Outgoing) -> int:
        """The body, the ids and properties, and 512 bytes for what AMQP adds to them."""
        properties = sum(len(key) + len(value) for key, value in message.application_properties.items())
        return len(message.body) + len(message.message_id) + properties + 512

    async def open_receiver(self, on_lock_lost: Callable[[Delivery], None], max_renewal: float) -> AzureReceiver:
        receiver = AzureReceiver(self, on_lock_lost, max_renewal)
        await receiver.open()
        return receiver

    def receiver_link(self, dead_letter: bool = False) -> AzureLink:
        queue = dead_letter_queue(self.queue_name) if dead_letter else self.queue_name
        options: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT, "timeout": ATTEMPT_TIMEOUT}
        if queue.endswith(DEAD_LETTER_SUFFIX):  # by its own name, a connection string for the queue would not do
            options["sub_queue"] = "deadletter"
        client, _ = self._of_this_loop()
        return AzureLink(self, queue, client.get_queue_receiver(queue.removesuffix(DEAD_LETTER_SUFFIX), **options))

    def sender_link(self, queue: str) -> AzureLink:
        client, _ = self._of_this_loop()
        return AzureLink(self, queue, client.get_queue_sender(queue, socket_timeout=SOCKET_TIMEOUT))

    async def peek(self, max_message_count: int = 100, dead_letter: bool = False) -> list[Message]:
        """List messages without locking them, by sequence number: locked, scheduled and deferred ones too."""
        _count("max_message_count", max_message_count)
        messages: list[Message] = []
        async with self.receiver_link(dead_letter) as link:
            peek = functools.partial(link.request, link.sdk.peek_messages, timeout=ATTEMPT_TIMEOUT)
            while (missing := max_message_count - len(messages)) > 0:
                start = messages[-1].sequence_number + 1 if messages else 1
                batch = await peek(missing, sequence_number=start)
                messages += [_message_of_sdk(raw) for raw in batch]
                if not batch:
                    break
        return messages

    async def cancel(self, sequence_number: int) -> None:
        """Take back a scheduled message.

        Raises:
            MessageNotFound: none is waiting under that number; it may be due already.
        """
        _check_sequence_number(sequence_number)
        if not _is_64_bit(sequence_number):
            raise MessageNotFound(f"{self!r} has no scheduled message with sequence number {sequence_number}.")
        async with self.sender_link(self.queue_name) as link:
            await link.request(link.sdk.cancel_scheduled_messages, sequence_number, timeout=ATTEMPT_TIMEOUT)

    async def close(self) -> None:
        """Close all connections of this event loop. The bus opens new ones if it is used again."""
        opened = self._opened.pop((os.getpid(), asyncio.get_running_loop()), None)
        if opened is not None:
            client, senders = opened

            async def close_all() -> None:
                await asyncio.gather(*[sender.close() for sender in senders.values()])
                await client.close()

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
        self._credential = credential

    async def get_token(self, *scopes: str, **options: Any) -> Any:
        return await asyncio.to_thread(self._credential.get_token, *scopes, **options)

    async def close(self) -> None:
        await asyncio.to_thread(getattr(self._credential, "close", lambda: None))

    async def __aenter__(self) -> ThreadedCredential:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


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


def _message_of_sdk(raw: ServiceBusReceivedMessage) -> Message:
    body = _body_of(raw)
    return Message(
        body=body if isinstance(body, str) else body.decode("utf-8", "replace"),
        message_id=_message_id_of(raw),
        sequence_number=raw.sequence_number or 0,
        delivery_count=raw.delivery_count or 0,
        enqueued_time_utc=raw.enqueued_time_utc,
        scheduled_enqueue_time_utc=raw.scheduled_enqueue_time_utc,
        dead_letter_reason=raw.dead_letter_reason,
        dead_letter_error_description=raw.dead_letter_error_description,
        application_properties=_properties_of(raw),
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


class AzureLink:
    """A sender or receiver of the SDK that is opened once, and given up after a failure.

    By itself the SDK (7.15) opens and closes it inside of any call, which goes wrong as soon as several coroutines use
    one: each that finds the connection lost opens another, one that has little time left closes what the others use,
    and a settlement under way opens again what was closed. So here a failure only marks the link as lost, and its user
    opens another. All that is done to internals of the SDK is done in this class.
    """

    def __init__(self, bus: AzureServiceBus, queue: str, sdk: Any) -> None:
        self.sdk = sdk
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
                hint = "Tasks have no sessions: use a queue without." if "session" in str(error) else ""
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
        """Send until nothing waits, by turns the first ones that are due at the same time."""
        while self._waiting:
            waiting = [(message, request) for message, request in self._waiting if not request.future.done()]
            due = waiting[0][0].due if waiting else None
            count = next((i for i, (message, _) in enumerate(waiting) if message.due != due), len(waiting))
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
        due, link = messages[0].due, self._link
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


def _sdk_message(message: Outgoing) -> ServiceBusMessage:
    try:
        sdk_message: ServiceBusMessage = _import_azure().ServiceBusMessage(
            message.body,
            message_id=message.message_id,
            content_type="application/json",
            application_properties=dict(message.application_properties) or None,
        )
    except (TypeError, ValueError) as error:
        raise RequestRefused(f"Message {message.message_id!r} cannot be sent: {error}") from error
    return sdk_message


@dataclass(slots=True, eq=False)
class _Lock:
    """When a lock is to be renewed, and when it is given up; of the monotonic clock."""

    renew_at: float
    lost_at: float
    asked: bool = False
    renewing: bool = False


class AzureReceiver:
    """Receives from an `AzureServiceBus`, reconnects for as long as it takes, and renews the locks of what it received.

    Everything waits for a link that works, which one task opens when the former is lost: by management requests, the
    messages of one link can be settled and renewed over another. A receive is never cancelled, since its credit would
    stay on the link and lock messages that nobody looks at. It asks for one message when the queue was empty, and for
    all the free slots when it was not: either way it returns as soon as there is something to do.
    """

    RENEWAL_TICK = 0.25

    def __init__(self, bus: AzureServiceBus, on_lock_lost: Callable[[Delivery], None], max_renewal: float) -> None:
        self._bus = bus
        self._on_lock_lost = on_lock_lost
        self._max_renewal = max_renewal
        self._link: AzureLink
        self._connecting: asyncio.Task[None] | None = None
        self._failures = 0
        self._busy = False
        self._youngest = -math.inf  # how far ahead of this machine's clock a message's time of enqueueing was, at most
        self._warned_of_clock = False
        self._closing = False
        self._settling: set[asyncio.Future[None]] = set()
        self._locks: dict[Delivery, _Lock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Connect, so that what is wrong with the settings shows at the start; a failure that may pass, soon after."""
        deadline = time.monotonic() + START_PATIENCE
        while True:
            try:
                self._link = await self._bus.receiver_link().__aenter__()
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
        if former.heard > former.opened or time.monotonic() - former.opened > 1:
            self._failures = 0
        while True:
            if error is not None:
                pause = random.uniform(0.5, 1.0) * min(2.0 ** min(self._failures, 10) / 16, MAX_BACKOFF)
                self._failures += 1
                logger.warning("The connection to %r was lost, reconnecting in %.1f s: %s", self._bus, pause, error)
                await asyncio.sleep(pause)
            try:
                self._link = await self._bus.receiver_link().__aenter__()
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
            await self.settle([Settlement(delivery, Disposition.ABANDON) for delivery in receiving.result()])

    async def _receive(self, max_message_count: int, max_wait_time: float) -> list[Delivery]:
        if self._settling:  # to receive meanwhile would slow down both
            await asyncio.wait(self._settling, timeout=SETTLE_WAIT)
        while not self._closing:
            link = await self._working_link()
            receive = functools.partial(link.call, link.sdk.receive_messages)
            try:
                messages: list[ServiceBusReceivedMessage] = []
                if self._busy:
                    wait = max(BATCH_WAIT, 2 * link.round_trip)
                    messages = await receive(max_message_count, max_wait_time=wait)
                if not messages:
                    messages = await receive(1, max_wait_time=max_wait_time or EMPTY_WAIT)
                if not messages and time.monotonic() - link.heard > SILENCE:
                    await link.request(link.sdk.peek_messages, 1, timeout=ATTEMPT_TIMEOUT)
            except Throttled:
                await asyncio.sleep(RETRY_PAUSE)
            except BoilermakerError as error:
                link.error = link.error or error  # go on with another
            else:
                self._busy = bool(messages)
                if messages:
                    link.heard = time.monotonic()
                return [self._hold(raw) for raw in messages]
        return []

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
            raw=raw,
        )
        self._locks[delivery] = self._granted(delivery, raw.locked_until_utc)
        return delivery

    # -- settling

    def settle(self, settlements: Sequence[Settlement], durable: bool = False) -> asyncio.Future[list[Rejection]]:
        # A future, not the task: who waits for it may be cancelled, and the settling goes on.
        rejections: list[Rejection] = []
        settled: asyncio.Future[list[Rejection]] = asyncio.get_running_loop().create_future()
        settling = self._spawn(self._settle_all(settlements, rejections))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        settling.add_done_callback(lambda _: _resolve(settled, rejections))
        return settled

    async def _settle_all(self, settlements: Sequence[Settlement], rejections: list[Rejection]) -> None:
        await asyncio.gather(*[self._settle(settlement, rejections) for settlement in settlements])

    async def _settle(self, settlement: Settlement, rejections: list[Rejection]) -> None:
        """Publish what follows, then settle: there is no transaction over both."""
        delivery, follow_up = settlement.delivery, settlement.follow_up
        if settlement.disposition is not Disposition.LEAVE and delivery.locked_until <= time.time():
            self._locks.pop(delivery, None)
            why = "before it was renewed: is the connection lost, or the event loop blocked?"
            rejections.append(_lock_lost(settlement, why))
            return
        try:
            if follow_up is not None:
                await self._insist(settlement, functools.partial(self._bus.send, [follow_up]))
            if settlement.disposition is not Disposition.LEAVE:
                await self._insist(settlement, functools.partial(self._dispose, settlement))
        except BoilermakerError as error:
            rejections.append(Rejection(settlement, error))
        finally:
            self._locks.pop(delivery, None)

    async def _insist(self, settlement: Settlement, action: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Do something about a message, if need be again: until it works, or the lock has run out.

        What follows a message that is gone already nobody else would publish: that is tried until the receiver closes.
        """
        gone = settlement.disposition is Disposition.LEAVE
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
            except ServiceBusUnavailable:
                if not gone and time.time() + RETRY_PAUSE > settlement.delivery.locked_until:
                    raise
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
        match settlement.disposition:
            case Disposition.COMPLETE:
                await call(link.sdk.complete_message, raw)
            case Disposition.ABANDON:
                await call(link.sdk.abandon_message, raw)
            case Disposition.DEAD_LETTER:
                why = {"reason": settlement.reason, "error_description": settlement.description}
                await call(link.sdk.dead_letter_message, raw, **why)
        link.round_trip = min(link.round_trip or ATTEMPT_TIMEOUT, time.monotonic() - started)

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
            for delivery, lock in list(self._locks.items()):
                if now - delivery.received > self._max_renewal or (lock.asked and now > lock.lost_at):
                    self._lose(delivery)
                elif now >= lock.renew_at and not lock.renewing:
                    if not lock.asked and now > lock.lost_at:  # the event loop was blocked: the service may yet know it
                        lock.lost_at = now + 1
                    lock.asked = lock.renewing = True
                    self._spawn(self._renew(delivery, lock))

    async def _renew(self, delivery: Delivery, lock: _Lock) -> None:
        """Renew one lock; after a failure, again when half of what is left has passed."""
        timeout = min(max((lock.lost_at - time.monotonic()) / 2, 1), ATTEMPT_TIMEOUT)
        delivery.raw._expiry = None
        try:
            link = await self._working_link()
            until = await link.request(link.sdk.renew_message_lock, delivery.raw, timeout=timeout)
        except MessageLockLost:
            if time.monotonic() < lock.lost_at:
                self._youngest = math.inf  # taken from us, or else the clocks are not what they seemed
            self._lose(delivery)
        except BoilermakerError as error:
            logger.info("Renewing a lock of %r failed, will try again: %s", self._bus, error)
            lock.renewing = False
            lock.renew_at = time.monotonic() + max((lock.lost_at - time.monotonic()) / 2, RETRY_PAUSE)
        else:
            if delivery in self._locks:
                self._locks[delivery] = self._granted(delivery, until)

    def _lose(self, delivery: Delivery) -> None:
        if self._locks.pop(delivery, None) is not None:
            self._on_lock_lost(delivery)


# ======================================================================================================================
# 10. Tracing: OpenTelemetry, when asked for
# ======================================================================================================================


class Tracing:
    """Spans for publishing and processing, by OpenTelemetry's conventions for messaging.

    https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/. The W3C `traceparent` travels in the
    message's application properties, so that a task's span is a child of its publisher's.
    """

    def __init__(self, bus: ServiceBus) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigurationError(
                "enable_opentelemetry=True needs opentelemetry-api: pip install opentelemetry-api."
            ) from error
        self._bus = bus
        self._trace = trace
        self._tracer = trace.get_tracer("boilermaker", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def publishing(self, task: Task, queue: str, message_id: str) -> tuple[Span, Mapping[str, str]]:
        """A PRODUCER span, to be ended when the message is sent, and the properties that carry it."""
        span = self._tracer.start_span(
            f"publish {queue}",
            kind=self._trace.SpanKind.PRODUCER,
            attributes=self._attributes("publish", "send", task, queue, message_id),
        )
        properties: dict[str, str] = {}
        self._propagator.inject(properties, self._trace.set_span_in_context(span))
        return span, properties

    @contextlib.contextmanager
    def processing(self, task: Task, delivery: Delivery) -> Iterator[Callable[[BaseException], None]]:
        """A CONSUMER span, child of the publisher's; gives a function to record the task's error."""
        queue = self._bus.queue_name
        with self._tracer.start_as_current_span(
            f"process {queue}",
            context=self._propagator.extract(dict(delivery.application_properties)),
            kind=self._trace.SpanKind.CONSUMER,
            attributes=self._attributes("process", "process", task, queue, delivery.message_id or ""),
        ) as span:

            def record(error: BaseException) -> None:
                span.record_exception(error)
                span.set_status(self._trace.StatusCode.ERROR, describe(error))

            yield record

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


_NO_SPANS = contextlib.nullcontext()


def _end_span(span: Span, kind: object, error: BaseException | None, trace: object) -> None:
    if error is not None:
        span.record_exception(error)
    span.end()


# ======================================================================================================================
# 11. Worker: receive, run, settle, shut down
# ======================================================================================================================

MAX_WAIT = 1.0
"""Seconds that one receive waits at most, after which a worker looks around."""

BURST_PAUSE = 0.05
"""Seconds after which a worker that is to end when all is done looks for more, while its last tasks run."""

STOP_PATIENCE = 2.0
"""Seconds that a cancelled task may take to end, and a last settlement, before a worker ends without it."""


LONGEST_TURN = 0.01
"""Seconds for which tasks that never wait are run one after the other, before the event loop has its turn."""

MOST_STARTING = 5
"""Runners that are made before one of them has begun: often the first runs all that is lined up."""


@dataclass(slots=True, eq=False)
class Run:
    """A message whose task is running. `stopped` is how it ended, if something other than the task ended it."""

    delivery: Delivery
    task: Task
    runner: asyncio.Task[None] | None = None
    stopped: Ending | None = None


class Worker:
    """One `app.run()`: keeps up to `concurrency` tasks running, and settles what has ended.

    A turn of the pump settles all that has finished and receives as many as there are free slots, both at the same
    time: on the local bus they become one transaction.
    """

    def __init__(
        self, app: Boilermaker, concurrency: int, burst: bool, grace_period: float, max_renewal: float
    ) -> None:
        self._app = app
        self._bus = app.service_bus_client
        self._queue = app.queue_name
        self._concurrency = concurrency
        self._burst = burst
        self._grace_period = grace_period
        self._max_renewal = max_renewal
        self._receiver: Receiver
        self._running: dict[Delivery, Run] = {}
        self._ready: collections.deque[Run] = collections.deque()
        self._starting = 0
        self._finished: list[Settlement] = []
        self._settling: set[asyncio.Future[list[Rejection]]] = set()
        self._resending: list[Settlement] = []
        self._receiving: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._signals = 0
        self._stopping = False

    async def run(self) -> None:
        """Work until a signal, until cancelled, or, in a burst, until there is nothing to do."""
        self._loop, self._own = asyncio.get_running_loop(), asyncio.current_task()
        self._receiver = await self._bus.open_receiver(self._lock_lost, self._max_renewal)
        with _on_signals(self._signalled):
            names = self._app.task_names
            logger.info("Worker started: %r, concurrency=%d, tasks: %s", self._bus, self._concurrency, ", ".join(names))
            if not names:
                logger.warning("No task is registered: import the modules that register some before app.run()")
            try:
                await self._pump()
                await self._stop_receiving()
                for run in list(self._ready):
                    self._cancel(run, Ending.STOPPED)
                await self._finish_running()
            finally:
                await asyncio.shield(asyncio.ensure_future(self._end()))

    # -- the pump

    async def _pump(self) -> None:
        while not self._stopping:
            self._wake.clear()
            free = self._concurrency - len(self._running)
            if free > 0 and self._receiving is None and len(self._settling) < self._concurrency:
                self._receiving = self._loop.create_task(self._receive(free))
            self._settle_finished()
            await self._wake.wait()

    async def _receive(self, free: int) -> None:
        alone = self._is_idle()
        try:
            deliveries = await self._receiver.receive(free, 0 if self._burst else MAX_WAIT)
            for delivery in deliveries:
                self._line_up(delivery)
            self._make_runners(1)
            if self._burst and not deliveries:
                await self._end_of_burst(alone)
        except Exception as error:
            logger.error("Receiving from %r failed, will try again: %s", self._bus, error)
            await asyncio.sleep(MAX_WAIT)
        finally:
            self._receiving = None
            self._wake.set()

    async def _end_of_burst(self, alone: bool) -> None:
        """Stop if nothing was there, nor was on its way; else look again soon, at the latest when all has settled."""
        self._stopping = self._stopping or alone
        self._idle.clear()
        if not self._stopping and not self._is_idle():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), BURST_PAUSE)

    def _is_idle(self) -> bool:
        return not (self._running or self._finished or self._settling or self._resending)

    def _settle_finished(self) -> None:
        if self._finished:
            settlements, self._finished = self._finished, []
            settling = self._receiver.settle(settlements)
            self._settling.add(settling)
            settling.add_done_callback(functools.partial(self._settled, settlements))

    def _settled(self, settlements: Sequence[Settlement], settling: asyncio.Future[list[Rejection]]) -> None:
        """Log what was not settled; publish again what has no message any more that would be delivered again."""
        self._settling.discard(settling)
        self._wake.set()
        if self._is_idle():
            self._idle.set()
        for settlement, error in _rejections(settlements, settling):
            logger.error("Settling failed sequence_number=%s: %s", settlement.delivery.sequence_number, error)
            if isinstance(error, MessageTooLarge):
                self._reject(settlement, error)
            elif settlement.disposition is Disposition.LEAVE and settlement.follow_up is not None:
                self._resending.append(settlement)
                self._loop.call_later(MAX_WAIT, self._resend)

    def _reject(self, settlement: Settlement, error: MessageTooLarge) -> None:
        """Dead-letter the message, if it is still there, of a follow-up that the service will never take."""
        if settlement.disposition is not Disposition.LEAVE:
            decision = reject(error)
            self._finished.append(
                Settlement(settlement.delivery, decision.disposition, decision.reason, decision.description)
            )

    def _resend(self) -> None:
        if self._resending:
            self._finished.append(self._resending.pop(0))
            self._wake.set()

    # -- one message

    # A task that ends without having waited needs no asyncio task of its own: one runs message after message, each in
    # a context of its own, until one has to wait. From then on it is that message's, and others are made for the rest.

    def _line_up(self, delivery: Delivery) -> None:
        try:
            task = decode(delivery.body, self._queue)
        except InvalidTaskFormat as error:
            logger.error("Invalid task sequence_number=%s: %s", delivery.sequence_number, error)
            ending = Ending.UNDECODABLE
            self._finished.append(Settlement(delivery, ending.disposition, ending.reason, str(error)))
            return
        task.sequence_number, task.message_id = delivery.sequence_number, delivery.message_id
        task._app = self._app
        self._running[delivery] = run = Run(delivery, task)
        self._ready.append(run)

    async def _run_ready(self) -> None:
        """Run what is lined up, one after the other, until one has to wait or it is the event loop's turn."""
        self._starting -= 1
        runner = asyncio.current_task()
        assert runner is not None
        latest = self._loop.time() + LONGEST_TURN
        while self._ready:
            run = self._ready.popleft()
            run.runner = runner
            context, coroutine = contextvars.copy_context(), self._process(run)
            references = _references(runner)
            try:
                awaited = context.run(coroutine.send, None)
            except StopIteration:
                kept = _references(runner) > references  # somebody may yet cancel it, or wait for its end
                if kept or _cancels_itself(runner) or self._loop.time() > latest:
                    self._make_runners(1)
                    return
            else:
                self._make_runners(MOST_STARTING)
                await _go_on(context, coroutine, awaited)
                return

    def _make_runners(self, most: int) -> None:
        """Have as many that are about to begin as there are messages to run, up to a limit."""
        for _ in range(min(most, len(self._ready)) - self._starting):
            self._starting += 1
            asyncio.Task(self._run_ready(), loop=self._loop)  # begins later, whatever task factory the loop has

    async def _process(self, run: Run) -> None:
        """Run a task and leave its settlement with the pump."""
        delivery, task = run.delivery, run.task
        try:
            if self._app.tracing is None:
                settlement = self._settlement(run, await self._outcome(run))
            else:
                with self._app.tracing.processing(task, delivery) as record:
                    outcome = await self._outcome(run)
                    if outcome.error is not None:
                        record(outcome.error)
                    settlement = self._settlement(run, outcome)
            if self._running.pop(delivery, None) is not None:
                self._finished.append(settlement)
        except Exception:
            logger.exception("[%s] Internal error sequence_number=%s", task.function_name, task.sequence_number)
            self._running.pop(delivery, None)
            self._finished.append(Settlement(delivery, Disposition.LEAVE))  # again when its lock has run out
        self._wake.set()

    async def _outcome(self, run: Run) -> Outcome:
        """Run the task, unless something speaks against it; whatever it does, the worker goes on."""
        task = run.task
        registration = self._app.registration(task.function_name)
        if registration is None:
            name = task.function_name
            unknown = UsageError(f"{name!r} is not registered: import its module before run().")
            return Outcome(Ending.UNREGISTERED, error=unknown)
        if task.policy_is_default or task.default_options:
            registration.apply_to(task)
        if not may_run(task):
            exhausted = RetryException(f"no try left: {task.attempts.attempts} made, {task.policy}")
            return Outcome(Ending.NO_TRY_LEFT, error=exhausted)
        if not task.acks_late and (refusal := await self._complete_early(run)) is not None:
            return refusal
        started = _log_begin(task)
        _current_task.set(task)
        try:
            outcome = self._returned(await registration.function(self._app.state, *task.args, **task.kwargs), task)
        except BaseException as error:
            outcome = Outcome(ending_of(task, error), error=error)
            if isinstance(error, asyncio.CancelledError) and self._program_ends():
                run.stopped = run.stopped or Ending.STOPPED
        if run.stopped is Ending.LOCK_LOST or (run.stopped is not None and outcome.ending is not Ending.RETURNED):
            return Outcome(run.stopped)
        if started is not None and outcome.ending is Ending.RETURNED:
            _log_completion(task, time.perf_counter() - started)
        return outcome

    def _program_ends(self) -> bool:
        """Whether the worker is cancelled: `asyncio.run`, when it ends, cancels a task and its worker at once."""
        return self._own is not None and self._own.cancelling() > 0

    async def _complete_early(self, run: Run) -> Outcome | None:
        """Complete the message of a task that is to run at most once; how it ended if that came in between."""
        settlements = [Settlement(run.delivery, Disposition.COMPLETE)]
        settling = self._receiver.settle(settlements, durable=True)
        try:
            await asyncio.wait([settling])
        except asyncio.CancelledError:
            return Outcome(run.stopped or Ending.STOPPED)
        rejections = _rejections(settlements, settling)
        if rejections and not isinstance(rejections[0].error, MessageLockLost):
            logger.error("Settling failed sequence_number=%s: %s", run.delivery.sequence_number, rejections[0].error)
        return Outcome(Ending.LOCK_LOST) if rejections else None

    def _returned(self, result: Any, task: Task) -> Outcome:
        """What a task's result means; a task that it returned is checked."""
        if result is None:
            return _RETURNED
        if result is TaskFailureResult:
            return Outcome(Ending.FAILED, result)
        if isinstance(result, RetryException):
            raise UsageError(f"{task.function_name} returned {_short(result)}: raise it.")
        if inspect.iscoroutine(result):
            result.close()
            raise UsageError(f"{task.function_name} returned {_short(result)}: await it.")
        if isinstance(result, (Task, TaskFunction)):
            result = self._successor(_as_task(result), task)
        return Outcome(Ending.RETURNED, result)

    def _successor(self, returned: Task, task: Task) -> Task:
        """A returned task, bound; one that is published already has its own life, and no say here."""
        if returned.message_id is None:
            return self._app.bound(returned)
        if task.on_success is not None and task.on_success.takes_result:
            raise UsageError(
                f"{returned!r} is published already and cannot take over: return {returned.function_name}.si(...)."
            )
        return returned

    def _settlement(self, run: Run, outcome: Outcome) -> Settlement:
        """What to do with the message, its follow-up ready to be sent."""
        delivery, task = run.delivery, run.task
        message_id = delivery.message_id or f"{self._bus.queue_name}:{delivery.sequence_number}"
        follow_up = None
        try:
            if outcome.ending is Ending.RETRY:  # with the arguments as they came, whatever the function did to them
                original = decode(delivery.body, self._queue)
                task.args, task.kwargs = original.args, original.kwargs
            decision = decide(task, outcome, message_id)
            if decision.follow_up is not None:
                due = time.time() + decision.delay if decision.delay else None
                follow_up = self._app.outgoing(decision.follow_up, decision.follow_up_id, due)
        except UsageError as error:
            logger.error(
                "[%s] Follow-up rejected sequence_number=%s: %s", task.function_name, task.sequence_number, error
            )
            decision = reject(error)
            if not task.acks_late and outcome.ending.ran:
                decision = decision._replace(disposition=Disposition.LEAVE)
        if outcome.ending is not Ending.RETURNED:
            _log_ending(task, outcome, decision)
        return Settlement(delivery, decision.disposition, decision.reason, decision.description, follow_up)

    def _lock_lost(self, delivery: Delivery) -> None:
        if delivery in self._running:
            self._cancel(self._running[delivery], Ending.LOCK_LOST)

    def _cancel(self, run: Run, ending: Ending) -> None:
        run.stopped = run.stopped or ending
        if run.runner is not None:
            run.runner.cancel()
            return
        self._ready.remove(run)
        del self._running[run.delivery]
        name, number = run.task.function_name, run.delivery.sequence_number
        logger.warning("[%s] Task %s before it began sequence_number=%s", name, ending.text, number)
        self._finished.append(Settlement(run.delivery, ending.disposition))
        self._wake.set()

    # -- the end

    def _signalled(self, number: int) -> None:
        """The first signal stops the worker, the second ends the grace period."""
        self._signals += 1
        self._stopping = True
        name = signal.Signals(number).name
        if self._signals == 1:
            logger.warning(
                "Received %s: shutting down; tasks running: %d, for %g s at most; a second signal ends them at once",
                *(name, len(self._running) - len(self._ready), self._grace_period),
            )
        else:
            logger.warning("Received %s: ending at once", name)
        self._wake.set()

    async def _stop_receiving(self) -> None:
        if self._receiving is not None:
            if not self._receiving.cancelling():  # a second time would keep it from giving back what just arrived
                self._receiving.cancel()
            await asyncio.wait([self._receiving], timeout=MAX_WAIT + STOP_PATIENCE)

    async def _finish_running(self) -> None:
        """Give running tasks the grace period."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_period
        while not self._is_idle() and self._signals < 2:
            self._wake.clear()
            self._settle_finished()
            remaining = deadline - loop.time()
            if remaining <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(remaining):
                    await self._wake.wait()

    async def _end(self) -> None:
        """Give back what is left, and close."""
        await self._stop_receiving()
        await self._stop_running()
        self._settle_finished()
        if self._settling:
            _, unsettled = await asyncio.wait(self._settling, timeout=STOP_PATIENCE)
            for settling in unsettled:
                logger.error("A settlement did not end: its messages will be delivered again when their locks run out.")
                settling.cancel()
        for settlement in self._resending:
            assert settlement.follow_up is not None
            logger.error(
                "A follow-up could not be published: message %s for queue %r",
                *(settlement.follow_up.message_id, settlement.follow_up.queue),
            )
        await self._receiver.close()
        logger.info("Worker ended: %r", self._bus)

    async def _stop_running(self) -> None:
        """Cancel what runs, and wait for it to end; not for ever."""
        for run in list(self._running.values()):
            self._cancel(run, Ending.STOPPED)
        runners = [run.runner for run in self._running.values() if run.runner is not None]
        if runners:
            await asyncio.wait(runners, timeout=STOP_PATIENCE)
        while self._running:
            delivery, run = self._running.popitem()
            logger.error("[%s] Would not stop sequence_number=%s", run.task.function_name, delivery.sequence_number)
            held = run.task.acks_late and run.stopped is Ending.STOPPED
            self._finished.append(Settlement(delivery, Disposition.ABANDON if held else Disposition.LEAVE))


_references: Callable[[object], int] = getattr(sys, "getrefcount", lambda thing: 0)  # PyPy does not count


def _cancels_itself(runner: asyncio.Task[None]) -> bool:
    """Whether a task that has ended cancelled what it ran in: the next must not be met by that."""
    return bool(runner.cancelling() or getattr(runner, "_must_cancel", False))


@types.coroutine
def _go_on(
    context: contextvars.Context, coroutine: Coroutine[Any, Any, None], awaited: Any
) -> Generator[Any, Any, None]:
    """Take a coroutine that waits for something to its end, by the present asyncio task, in a context of its own."""
    while True:
        try:
            step = functools.partial(coroutine.send, (yield awaited))
        except BaseException as error:  # its own, such as a cancellation
            step = functools.partial(coroutine.throw, error)
        try:
            awaited = context.run(step)
        except StopIteration:
            return


def _rejections(settlements: Sequence[Settlement], settling: asyncio.Future[list[Rejection]]) -> list[Rejection]:
    """What was not settled: all, if the transaction over them failed."""
    if settling.cancelled():
        return []
    error = settling.exception()
    if isinstance(error, Exception):
        return [Rejection(settlement, error) for settlement in settlements]
    return settling.result()


def _log_begin(task: Task) -> float | None:
    """Say that a task begins; when that was, or None if nobody wants to know."""
    if not logger.isEnabledFor(logging.INFO):
        return None
    logger.info("[%s] Begin Task sequence_number=%s", task.function_name, task.sequence_number)
    return time.perf_counter()


def _log_completion(task: Task, seconds: float) -> None:
    logger.info("[%s] Completed Task sequence_number=%s in %.5fs", task.function_name, task.sequence_number, seconds)


def _log_ending(task: Task, outcome: Outcome, decision: Decision) -> None:
    """Say how a run ended that did not return."""
    name, number, error = task.function_name, task.sequence_number, outcome.error
    match outcome.ending:
        case Ending.RETRY:
            tries = policy_in_force(task, error).max_tries
            logger.warning(
                "[%s] Retry sequence_number=%s [attempt %d of %d] in %d s: %s",
                *(name, number, task.attempts.attempts + 1, tries, decision.delay, error),
            )
        case Ending.STOPPED:
            fate = "given back" if task.acks_late else "not to run again, as acks_late=False"
            logger.warning("[%s] Stopped with the worker, %s sequence_number=%s", name, fate, number)
        case Ending.LOCK_LOST:
            again = "it will run again" if task.acks_late else "it may not run again, as acks_late=False"
            logger.error("[%s] Lock lost, cancelled: %s sequence_number=%s", name, again, number)
        case _:
            logger.error(
                "[%s] Task %s sequence_number=%s: %s",
                *(name, outcome.ending.text, number, describe(error)),
                exc_info=error if getattr(error, "__traceback__", None) else None,  # only what was raised has one
            )


class SignalHandlers:
    """Tells all workers of an event loop of SIGINT and SIGTERM (in the main thread, on Unix).

    A handler of the program's own, such as a web server's, hears of them when the last worker has ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.listeners: list[Callable[[int], None]] = []
        self._loop = loop
        self._previous: dict[int, tuple[Any, Any]] = {}  # the process's handler, and the event loop's behind it
        self._received: set[int] = set()

    def take_over(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                previous = signal.getsignal(number), getattr(self._loop, "_signal_handlers", {}).get(number)
                self._loop.add_signal_handler(number, self._tell, number)
                self._previous[number] = previous

    def _tell(self, number: int) -> None:
        self._received.add(number)
        for listener in list(self.listeners):
            listener(number)

    def give_back(self) -> None:
        for number, (handler, handle) in self._previous.items():
            self._loop.remove_signal_handler(number)
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            if handle is not None:
                self._loop.add_signal_handler(number, handle._callback, *handle._args)
        for number in self._received:
            if _is_of_the_program(self._previous[number][0]):
                signal.raise_signal(number)


def _is_of_the_program(handler: Any) -> bool:
    """Whether a signal handler is neither the system's nor Python's nor that of `asyncio.run`."""
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return callable(handler) and handler is not signal.default_int_handler and not isinstance(owner, asyncio.Runner)


_signals: dict[asyncio.AbstractEventLoop, SignalHandlers] = {}


@contextlib.contextmanager
def _on_signals(listener: Callable[[int], None]) -> Iterator[None]:
    """Have a worker told of signals."""
    loop = asyncio.get_running_loop()
    signals = _signals.setdefault(loop, SignalHandlers(loop))
    signals.listeners.append(listener)
    if len(signals.listeners) == 1:
        signals.take_over()
    try:
        yield
    finally:
        signals.listeners.remove(listener)
        if not signals.listeners:
            del _signals[loop]
            signals.give_back()


# ======================================================================================================================
# 12. Application: registering and publishing
# ======================================================================================================================


class Boilermaker:
    """Tasks, the state they share, and the queue they go through.

    Args:
        state: any object; every task gets it as its first argument.
        service_bus_client: a `LocalServiceBus` or an `AzureServiceBus`.
        enable_opentelemetry: trace publishing and processing; needs opentelemetry-api.

    `async with app:` closes the bus at the end.
    """

    def __init__(self, state: Any, service_bus_client: ServiceBus, enable_opentelemetry: bool = False) -> None:
        if isinstance(service_bus_client, type) or not hasattr(service_bus_client, "open_receiver"):
            raise UsageError(
                f"service_bus_client={service_bus_client!r} must be a LocalServiceBus or an AzureServiceBus."
            )
        self.state = state
        self.service_bus_client = service_bus_client
        self.tracing = Tracing(service_bus_client) if enable_opentelemetry else None
        self._registry: dict[str, Registration] = {}
        self._by_function: dict[Callable[..., Any], Registration] = {}

    async def __aenter__(self) -> Boilermaker:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the bus."""
        await self.service_bus_client.close()

    # -- registering

    @overload
    def task(self, function: TaskCallable[P, R], /) -> TaskFunction[P, R]: ...

    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool = True,
        acks_late: bool = True,
    ) -> Callable[[TaskCallable[P, R]], TaskFunction[P, R]]: ...

    def task(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool = True,
        acks_late: bool = True,
    ) -> Any:
        """Register an `async def` as a task: `@app.task`, `@app.task()` or `@app.task(policy=...)`.

        Args:
            name: the name in messages, `function.__name__` if None. A worker finds the function by it, so it must not
                change while messages are waiting.
            policy: when and how often a `RetryException` runs it again; `RetryPolicy.default()` if None.
            should_dead_letter: keep what failed in the dead-letter queue.
            acks_late: settle the message after the function ran, so that it runs at least once; False: before, so that
                it runs at most once.

        Raises:
            UsageError: the name is taken, or the function is not `async def`.
        """

        if isinstance(function, str):
            raise UsageError(f"Options are given by keyword: @app.task(name={function!r}).")

        def decorate(function: TaskCallable[P, R]) -> TaskFunction[P, R]:
            registration = self._register(
                function, name=name, policy=policy, should_dead_letter=should_dead_letter, acks_late=acks_late
            )
            return TaskFunction(self, registration, registration.function)

        return decorate if function is None else decorate(function)

    def register_async(
        self,
        fn: TaskCallable[..., Any] | TaskFunction[..., Any],
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool = True,
        acks_late: bool = True,
    ) -> Boilermaker:
        """Register a function without changing it; options as for `task`. Returns the application."""
        self._register(fn, name=name, policy=policy, should_dead_letter=should_dead_letter, acks_late=acks_late)
        return self

    def register_many_async(
        self,
        fns: Iterable[TaskCallable[..., Any] | TaskFunction[..., Any]],
        *,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool = True,
        acks_late: bool = True,
    ) -> Boilermaker:
        """Register several functions with the same options."""
        for fn in _listed(fns, "register_many_async"):
            self.register_async(fn, policy=policy, should_dead_letter=should_dead_letter, acks_late=acks_late)
        return self

    def _register(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        policy: RetryPolicy | None = None,
        should_dead_letter: bool = True,
        acks_late: bool = True,
    ) -> Registration:
        if isinstance(function, TaskFunction):
            function = function.function
        function_name = _function_name(function)
        name = function_name if name is None else name
        if not isinstance(name, str) or not name:
            raise UsageError(f"name={name!r} of {function_name} must be a string that is not empty.")
        if _arity(function)[1] < 0:
            raise UsageError(
                f"{name} must take the application's state as its first argument: async def {name}(state)."
            )
        if name in self._registry:
            raise UsageError(f"Function already registered: {name}. Give one of the two another name with name='...'.")
        _check_options(name, policy, should_dead_letter=should_dead_letter, acks_late=acks_late)
        registration = Registration(name, function, policy or DEFAULT_POLICY, should_dead_letter, acks_late)
        self._registry[name] = self._by_function[function] = registration
        logger.info("Registered background function fn=%s", name)
        return registration

    @property
    def task_names(self) -> list[str]:
        """The names of what is registered."""
        return list(self._registry)

    @property
    def queue_name(self) -> str:
        """The queue to publish to: of an application that works on a dead-letter queue, the one it belongs to."""
        return self.service_bus_client.queue_name.removesuffix(DEAD_LETTER_SUFFIX)

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

    # -- making tasks

    def create_task(self, fn: Any, /, *args: Any, policy: RetryPolicy | None = None, **kwargs: Any) -> Task:
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
        registration = self._registration_of(function, name)
        if registration is None:
            if not callable(fn):
                raise UsageError(
                    f"What is to be run must be a function, not {_short(fn)}: a Task is published by publish_task, "
                    "a task known by name alone by send_task."
                )
            raise _unregistered(getattr(fn, "__name__", repr(fn)))
        task = _task_of(registration, self, args, kwargs)
        if policy is not None:
            _set_policy(task, policy)
        return task

    def chain(self, *tasks: TaskLike, on_failure: TaskLike | None = None) -> Task:
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
            if following not in _chain_of(member):
                _check_beginning(following)
                _last(member).on_success = following
        for step in _chain_of(members[0]):
            step.on_failure = failure or step.on_failure
        _workflow(members[0])
        return members[0]

    # -- publishing

    async def apply_async(
        self,
        fn: Any,
        /,
        *args: Any,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int = 1,
        policy: RetryPolicy | None = None,
        **kwargs: Any,
    ) -> Task:
        """Make a task and publish it: `create_task` and `publish_task` in one."""
        task = self._new_task(fn, args, kwargs, policy)
        return await self.publish_task(task, delay=delay, eta=eta, publish_attempts=publish_attempts)

    async def send_task(
        self,
        name: str,
        /,
        *args: Any,
        queue: str | None = None,
        on_success: TaskLike | None = None,
        on_failure: TaskLike | None = None,
        policy: RetryPolicy | None = None,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int = 1,
        **kwargs: Any,
    ) -> Task:
        """Publish a task by its name alone, for another application to run.

        Args:
            name: what it is registered under there.
            queue: that application's queue; this one's own if None.
            on_success: published, to this application's queue, when it has returned; so is `on_failure` when it failed.
            policy: overrides the policy of the registration there.
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"send_task: name={_short(name)} must be the name a task is registered under.")
        task = _task_by_name(name, args, kwargs)
        task.queue = None if queue is None else _checked_queue_name(queue)
        task.on_success = None if on_success is None else _as_task(on_success, "on_success")
        task.on_failure = None if on_failure is None else _as_task(on_failure, "on_failure")
        if policy is not None:
            _set_policy(task, policy)
        return await self.publish_task(task, delay=delay, eta=eta, publish_attempts=publish_attempts)

    async def publish_task(
        self,
        task: TaskLike,
        delay: float | datetime.timedelta | None = None,
        publish_attempts: int = 1,
        *,
        eta: datetime.datetime | None = None,
    ) -> Task:
        """Send a task; its `sequence_number` is set where the bus tells it.

        Args:
            task: the head of its workflow.
            delay: seconds from now, or a timedelta; or else
            eta: an aware datetime.
            publish_attempts: how often to try. Every try has the same message id, the task's id, so that a queue with
                duplicate detection takes one.

        Raises:
            UsageError: `delay` and `eta` are both given, or no time; the task is not the head; a function of
                the workflow is not registered.
            InvalidArguments: the arguments do not fit the function, or JSON cannot carry them.
            MessageTooLarge: the message with all its callbacks is over the limit of the bus.
            BoilermakerAppException: no try worked; `.errors` holds the error of each.
        """
        [published] = await self.publish_many([task], delay=delay, eta=eta, publish_attempts=publish_attempts)
        return published

    async def publish_many(
        self,
        tasks: Iterable[TaskLike],
        *,
        delay: float | datetime.timedelta | None = None,
        eta: datetime.datetime | None = None,
        publish_attempts: int = 1,
    ) -> list[Task]:
        """Send many tasks in order, in as few round trips as the bus allows; all are checked before the first is sent.

        Arguments and errors are those of `publish_task`. On the local bus it is all or nothing; on Azure a batch may
        fail after others were sent.
        """
        if type(publish_attempts) is not int or publish_attempts < 1:
            raise UsageError(f"publish_attempts={publish_attempts!r} must be an int of at least 1.")
        due = _due_time(delay, eta)
        heads = [self.bound(_as_task(task, "What is published")) for task in _listed(tasks, "publish_many")]
        with _NO_SPANS if self.tracing is None else contextlib.ExitStack() as spans:
            messages = [self.outgoing(head, head.task_id, due, spans) for head in heads]
            numbers = await self._send(messages, publish_attempts)
        for head, message, number in zip(heads, messages, numbers, strict=True):
            head.sequence_number, head.message_id = number, message.message_id
        return heads

    def bound(self, head: Task) -> Task:
        """A workflow as this application would publish it: complete, and all its functions known.

        Raises:
            UsageError: the task is not the head, or a function is not registered.
        """
        _check_head(head)
        single = head.on_success is None and head.on_failure is None
        for task in [head] if single else _workflow(head):
            _check_fields(task)
            registration = self._registration_of(task._function, task.function_name)
            if registration is not None:
                task.function_name = registration.name
                if task.policy_is_default or task.default_options:
                    registration.apply_to(task)
                _check_call(task)
            elif task._function is not None and task.queue in (None, self.queue_name):
                raise _unregistered(task.function_name)
            task._app = task._app or self
        return head

    def outgoing(
        self, task: Task, message_id: str, due: float | None = None, spans: contextlib.ExitStack | None = None
    ) -> Outgoing:
        """A task's message, checked against the limits of the bus.

        Args:
            spans: where a span that covers the sending is ended; if None, it covers only the making.
        """
        bus = self.service_bus_client
        home = self.queue_name
        queue = task.queue or home
        if len(message_id) > MAX_MESSAGE_ID_LENGTH:
            raise UsageError(f"{task!r}: a message id has at most {MAX_MESSAGE_ID_LENGTH} characters.")
        properties = _NO_PROPERTIES if self.tracing is None else self._traced(task, queue, message_id, spans)
        message = Outgoing(encode(task, queue, home), message_id, queue, due, properties)
        if (size := bus.size(message)) > bus.max_message_bytes:
            raise MessageTooLarge(
                f"{task!r} with its callbacks makes a message of {size} bytes, the limit is {bus.max_message_bytes}: "
                "store the data elsewhere and pass its id."
            )
        return message

    def _traced(self, task: Task, queue: str, message_id: str, spans: contextlib.ExitStack | None) -> Mapping[str, str]:
        assert self.tracing is not None
        span, properties = self.tracing.publishing(task, queue, message_id)
        if spans is None:
            span.end()
        else:
            spans.push(functools.partial(_end_span, span))
        return properties

    async def _send(self, messages: Sequence[Outgoing], attempts: int) -> list[int | None]:
        errors: list[Exception] = []
        while True:
            try:
                return await self.service_bus_client.send(messages)
            except (ServiceBusUnavailable, ConfigurationError) as error:
                errors.append(error)
                if len(errors) == attempts:
                    raise BoilermakerAppException("Publishing failed", errors) from error
                logger.warning("Publishing failed [attempt %d of %d]: %s", len(errors), attempts, error)
            await asyncio.sleep(min(0.1 * 2 ** len(errors), MAX_WAIT))

    # -- working

    async def run(
        self,
        concurrency: int = 10,
        burst: bool = False,
        *,
        grace_period: float = 25,
        max_lock_renewal: float = 24 * 3600,
    ) -> None:
        """Receive and run tasks until SIGINT or SIGTERM, or until cancelled.

        On a signal the worker takes no more, gives running tasks the grace period, and then gives their messages back;
        a second signal ends the grace period. Handlers that the program had set hear of it afterwards. Cancelling gives
        them back at once. A lost connection is reconnected without end.

        Args:
            concurrency: how many tasks run at the same time.
            burst: end when nothing is waiting or running, here or due; what is scheduled for later, or held by another
                worker, is not waited for.
            grace_period: seconds; less than the 30 after which Kubernetes kills.
            max_lock_renewal: seconds after which a task that still runs is cancelled, to be delivered again.

        Raises:
            ConfigurationError: at the start, the queue, the credential or the file is not right; says what to do.
            ServiceBusUnavailable: at the start, the bus cannot be reached.
        """
        if type(concurrency) is not int or concurrency < 1:
            raise UsageError(f"concurrency={concurrency!r} must be an int of at least 1.")
        _positive("max_lock_renewal", max_lock_renewal)
        _positive("grace_period", grace_period, or_zero=True)
        await Worker(self, concurrency, burst, grace_period, max_lock_renewal).run()


def _check_options(name: str, policy: object, **flags: object) -> None:
    if policy is not None and not isinstance(policy, RetryPolicy):
        raise UsageError(f"{name}: policy={policy!r} must be a RetryPolicy.")
    for option, value in flags.items():
        if type(value) is not bool:
            raise UsageError(f"{name}: {option}={value!r} must be True or False.")


def _listed(things: Iterable[T], taker: str) -> list[T]:
    if not isinstance(things, Iterable):
        raise UsageError(f"{taker} takes a list, not {_short(things)}.")
    return list(things)


def _unregistered(name: str) -> UsageError:
    return UsageError(
        f"Unregistered function: {name}. Decorate it with @app.task or use app.register_async({name}); "
        "for a function of another application, use app.send_task(name, ..., queue=...)."
    )


async def _debug_task(state: Any) -> int:
    """What boilermaker-servicebus publishes to see whether its connection works."""
    return 0


_BUILT_IN = {"debug_task": Registration("debug_task", _debug_task)}


# ======================================================================================================================
# 13. Old names: the modules of the multi-file original
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
