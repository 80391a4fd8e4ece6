"""The tests, in the order of the module's sections; then what is installed, the examples and the README."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import contextvars
import copy
import dataclasses
import datetime
import decimal
import enum
import fcntl
import functools
import gc
import importlib
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import pickle
import pty
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import types
import urllib.parse
import uuid
import venv
import weakref
import zipfile
import zoneinfo
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fastapi
import freezegun
import httpx
import prometheus_client.parser
import pytest
import uvicorn
from azure.core.credentials import AccessToken
from azure.servicebus import NEXT_AVAILABLE_SESSION, ServiceBusMessage, ServiceBusReceiveMode, ServiceBusSubQueue
from azure.servicebus import exceptions as sdk_errors
from azure.servicebus._common import mgmt_handlers
from azure.servicebus.aio import ServiceBusClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

import boilermaker
from boilermaker import Action as Do
from boilermaker import (
    AzureServiceBus,
    Boilermaker,
    BoilermakerAppException,
    BoilermakerError,
    Config,
    ConfigurationError,
    InvalidArguments,
    InvalidTaskFormat,
    LocalServiceBus,
    MessageLockLost,
    MessageNotFound,
    MessageTooLarge,
    NoRetry,
    Options,
    Outcome,
    Registration,
    RetryAttempts,
    RetryException,
    RetryExceptionDefault,
    RetryExceptionDefaultExponential,
    RetryExceptionDefaultLinear,
    RetryMode,
    RetryPolicy,
    Run,
    ServiceBusUnavailable,
    Task,
    TaskFailed,
    TaskFailureResult,
    UsageError,
    current_task,
    decide,
    decode,
    encode,
    group,
    may_run,
    outcome_of,
    retries,
    root_of,
)
from examples import dashboard
from examples.servicebus_emulator import ServiceBusEmulator

# ======================================================================================================================
# Helpers of the pure part: functions to register, workflows, bodies, a fresh interpreter
# ======================================================================================================================

MODULE = Path(boilermaker.__file__)


async def fetch_page(state, url, depth=1):
    """Fetch a page."""
    return f"{state}: {url} {depth}"


async def parse_page(state): ...


async def store_rows(state): ...


async def clean_up(state): ...


async def take_anything(state, *args, **kwargs): ...


def app_with_pages(path=":memory:", **bus_options):
    """An application with the functions above registered as they are."""
    app = Boilermaker("state", LocalServiceBus(path, **bus_options))
    return app.register_many_async([fetch_page, parse_page, store_rows, clean_up, take_anything])


def named(name, **fields):
    """A task by name alone."""
    return Task(function_name=name, **fields)


def tried(attempts):
    """Attempts so far, the last one now."""
    return RetryAttempts(attempts, datetime.datetime.now(datetime.UTC))


def names_along(head):
    """The function names of a chain, head first."""
    names = []
    while head is not None:
        names.append(head.function_name)
        head = head.on_success
    return names


def chain_of(length):
    """A chain of that many tasks by `>>`: its head."""
    head = last = named("step", args=[0])
    for number in range(1, length):
        last = last >> named("step", args=[number])
    return head


def nested_list(depth):
    """A list in a list in a list ..."""
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


def body_with(**fields):
    """A body that decodes, but for what the fields make of it."""
    return json.dumps({"task_id": "id-1", "function_name": "fetch_page", **fields})


def body_with_field(path, value):
    """A body that decodes, but for the value of one field, as "policy.delay"."""
    document = {
        "task_id": "id-1",
        "function_name": "fetch_page",
        "payload": {"args": [], "kwargs": {}},
        "policy": {"max_tries": 5, "delay": 120, "delay_max": 120, "retry_mode": 0},
        "scheduled_policy": {"max_tries": 5, "delay": 120, "delay_max": 120, "retry_mode": 0},
        "attempts": {"attempts": 0, "last_retry": "2026-11-21T08:27:24.491534Z"},
    }
    outer, _, inner = path.rpartition(".")
    (document[outer] if outer else document)[inner] = value
    return json.dumps(document)


def fresh_python(code, *options, path=MODULE.parent):
    """What a new interpreter prints that finds the module on `path`."""
    run = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ======================================================================================================================
# 1. Vocabulary
# ======================================================================================================================


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (UsageError, {ValueError}),
        (InvalidArguments, {UsageError, ValueError, TypeError}),
        (MessageTooLarge, {UsageError, ValueError}),
        (ConfigurationError, {UsageError, ValueError}),
        (ServiceBusUnavailable, set()),
        (BoilermakerAppException, {ServiceBusUnavailable}),
        (MessageLockLost, set()),
        (MessageNotFound, set()),
        (RetryException, set()),
        (boilermaker.InvalidTaskFormat, set()),
    ],
)
def test_every_error_has_the_one_root_and_the_branch_of_who_was_wrong(error, bases):
    usual = {UsageError, ServiceBusUnavailable, ValueError, TypeError}
    assert issubclass(error, BoilermakerError)
    assert {base for base in usual if issubclass(error, base) and base is not error} == bases


def test_a_publishing_error_holds_and_shows_the_error_of_each_attempt():
    first, second = ServiceBusUnavailable("throttled"), ServiceBusUnavailable("gone")
    error = BoilermakerAppException("Publishing failed", [first, second])
    assert error.errors == [first, second]
    assert "throttled" in str(error)
    assert "gone" in str(error)


def test_all_names_that_are_exported_exist():
    assert [name for name in boilermaker.__all__ if not hasattr(boilermaker, name)] == []


def test_importing_the_module_needs_and_touches_only_the_standard_library():
    foreign = """
        import sys
        import boilermaker
        names = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
        print(*sorted(name for name in names if name not in ("boilermaker", "__main__") and "site" not in name))
    """
    assert fresh_python(foreign, "-S") == ""
    assert set(fresh_python(foreign).split()) & {"azure", "opentelemetry", "aiohttp", "pydantic"} == set()


def test_a_task_failure_result_is_one_object_however_it_is_written_copied_or_pickled():
    assert TaskFailureResult() is TaskFailureResult
    assert copy.deepcopy(TaskFailureResult) is TaskFailureResult
    assert pickle.loads(pickle.dumps(TaskFailureResult)) is TaskFailureResult


# ======================================================================================================================
# 2. Retries
# ======================================================================================================================


@pytest.mark.parametrize(
    ("delay", "delay_max", "expected"),
    [(30, 3600, [30, 30, 30]), (30, 30, [30, 30, 30]), (0, 3600, [0, 0, 0]), (86_400, None, [86_400] * 3)],
)
def test_a_fixed_delay_stays_the_same_and_under_its_maximum(delay, delay_max, expected):
    policy = RetryPolicy(delay=delay, delay_max=delay_max, retry_mode=RetryMode.Fixed)
    assert [policy.get_delay_interval(n) for n in range(3)] == expected


@pytest.mark.parametrize(
    ("delay", "delay_max", "expected"),
    [(30, 600, [30, 60, 90, 120]), (30, 70, [30, 60, 70, 70]), (0, 600, [0, 0, 0, 0])],
)
def test_a_linear_delay_begins_with_the_delay_and_grows_by_it(delay, delay_max, expected):
    policy = RetryPolicy(delay=delay, delay_max=delay_max, retry_mode=RetryMode.Linear)
    assert [policy.get_delay_interval(n) for n in range(4)] == expected


@pytest.mark.parametrize(
    ("delay", "delay_max", "n", "expected"),
    [
        (2, 600, 0, {1, 2}),
        (5, 600, 0, {2, 3, 4, 5}),
        (1, 600, 2, {2, 3, 4}),
        (1, 3, 9, {1, 2, 3}),
        (1, 600, 0, {0, 1}),
        (0, 600, 3, {0}),
    ],
)
def test_an_exponential_delay_is_anything_from_half_to_the_whole(delay, delay_max, n, expected):
    policy = RetryPolicy(delay=delay, delay_max=delay_max, retry_mode=RetryMode.Exponential)
    assert {policy.get_delay_interval(n) for _ in range(300)} == expected


@pytest.mark.parametrize("n", range(12))
def test_an_exponential_delay_doubles_up_to_its_maximum(n):
    policy = RetryPolicy(delay=30, delay_max=600, retry_mode=RetryMode.Exponential)
    longest = min(30 * 2**n, 600)
    assert all(longest // 2 <= policy.get_delay_interval(n) <= longest for _ in range(50))


def test_a_delay_is_quick_to_tell_even_after_a_billion_tries():
    policy = RetryPolicy(delay=1, delay_max=2**31 - 1, retry_mode=RetryMode.Exponential)
    assert 2**30 - 1 <= policy.get_delay_interval(10**9) <= 2**31 - 1


@pytest.mark.parametrize("mode", RetryMode)
def test_a_delay_is_a_whole_number_of_seconds_even_after_a_hundred_tries(mode):
    delay = RetryPolicy(delay=30, delay_max=600, retry_mode=mode).get_delay_interval(100)
    assert type(delay) is int
    assert 0 <= delay <= 600


def values_of(policy):
    return policy.max_tries, policy.delay, policy.delay_max, policy.retry_mode


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (RetryPolicy(), (5, 0, 3600, RetryMode.Fixed)),
        (RetryPolicy.default(), (5, 120, 120, RetryMode.Fixed)),
        (RetryPolicy.no_retry(), (1, 5, 5, RetryMode.Fixed)),
        (NoRetry(), (1, 5, 5, RetryMode.Fixed)),
        (NoRetry.default(), (5, 120, 120, RetryMode.Fixed)),
        (RetryPolicy(max_tries=0), (0, 0, 3600, RetryMode.Fixed)),
        (RetryPolicy(max_tries=100), (100, 0, 3600, RetryMode.Fixed)),
        (RetryExceptionDefault("x").policy, (5, 120, 120, RetryMode.Fixed)),
        (RetryExceptionDefaultLinear("x").policy, (5, 30, 600, RetryMode.Linear)),
        (RetryExceptionDefaultExponential("x").policy, (5, 30, 600, RetryMode.Exponential)),
        (RetryExceptionDefaultLinear("x", max_tries=9, delay_max=60).policy, (9, 30, 60, RetryMode.Linear)),
        (RetryExceptionDefaultExponential("x", delay=7).policy, (5, 7, 600, RetryMode.Exponential)),
    ],
)
def test_every_ready_made_policy_has_its_values(policy, values):
    assert values_of(policy) == values


@pytest.mark.parametrize("name", ["max_tries", "delay", "delay_max", "retry_mode"])
@pytest.mark.parametrize(
    "value", [-1, None, "5", 1.0, 1.5, True, float("nan"), [], 2**31, datetime.timedelta(1)], ids=repr
)
def test_a_policy_of_any_other_value_is_an_error_that_names_field_and_value(name, value):
    if (name, value) == ("delay_max", None):
        assert RetryPolicy(delay_max=None).delay_max == 3600
        return
    with pytest.raises(UsageError, match=name) as caught:
        RetryPolicy(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("mode", RetryMode)
@pytest.mark.parametrize("delay", [0, 3600, 3601, 86_400, 2**31 - 1])
def test_a_delay_over_the_usual_maximum_is_not_cut(mode, delay):
    policy = RetryPolicy(delay=delay, retry_mode=mode)
    assert policy.delay_max == max(3600, delay)
    assert policy.get_delay_interval(0) >= delay // 2


def test_a_maximum_under_the_delay_is_an_error_but_read_in_a_message_as_it_stands():
    with pytest.raises(UsageError, match=r"delay_max=20 must not be under delay=30"):
        RetryPolicy(delay=30, delay_max=20)
    text = '{"max_tries":3,"delay":30,"delay_max":20,"retry_mode":0}'
    task = decode(body_with(policy=json.loads(text)), "q")
    assert [task.policy.get_delay_interval(n) for n in range(3)] == [20, 20, 20]
    assert text in encode(task, "q", "q")
    assert pickle.loads(pickle.dumps(copy.deepcopy(task.policy))) == task.policy


@pytest.mark.parametrize("kind", [RetryExceptionDefaultLinear, RetryExceptionDefaultExponential])
def test_a_longer_delay_of_a_ready_made_exception_is_not_cut(kind):
    assert kind("x", delay=9000).policy.delay_max == 9000
    with pytest.raises(UsageError, match="delay_max=60 must not be under delay=90"):
        kind("x", delay=90, delay_max=60)


def test_a_policy_of_more_than_a_hundred_tries_is_an_error_that_says_the_limit():
    with pytest.raises(ValueError, match=r"max_tries=101 .*100"):
        RetryPolicy(max_tries=101)


def test_a_policy_cannot_be_changed():
    with pytest.raises(AttributeError):
        RetryPolicy().delay = 3


def test_policies_of_the_same_values_are_equal_and_hash_alike():
    assert NoRetry() == RetryPolicy.no_retry()
    assert hash(NoRetry()) == hash(RetryPolicy.no_retry())
    assert RetryPolicy(delay=1) != RetryPolicy(delay=2)
    assert RetryPolicy() != (5, 0, 3600, RetryMode.Fixed)


def test_the_retry_modes_have_the_values_of_the_wire_format():
    assert {mode.name: mode.value for mode in RetryMode} == {"Fixed": 0, "Exponential": 1, "Linear": 2}


def test_a_retry_exception_says_why_and_carries_a_policy_or_none():
    error = RetryException("busy", NoRetry())
    assert (str(error), error.msg, error.policy) == ("busy", "busy", NoRetry())
    assert RetryException("busy").policy is None


@pytest.mark.parametrize("policy", [3, "fixed", RetryPolicy, {"max_tries": 3}])
def test_a_retry_exception_with_something_else_for_a_policy_is_an_error(policy):
    with pytest.raises(UsageError, match="policy"):
        RetryException("busy", policy)


@pytest.mark.parametrize("error", [RetryExceptionDefaultLinear, RetryExceptionDefaultExponential])
def test_a_retry_exception_with_an_override_out_of_range_is_an_error(error):
    with pytest.raises(UsageError, match="max_tries=-1"):
        error("busy", max_tries=-1)


@pytest.mark.parametrize(
    "original",
    [
        RetryException("busy", RetryPolicy(delay=3)),
        RetryExceptionDefault("busy"),
        RetryExceptionDefaultLinear("busy", delay=3),
        RetryExceptionDefaultExponential("busy", max_tries=2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_retry_exception_survives_pickling_with_its_policy(original):
    again = pickle.loads(pickle.dumps(original))
    assert type(again) is type(original)
    assert (str(again), again.msg, again.policy) == (str(original), original.msg, original.policy)


@pytest.mark.parametrize("policy", [RetryPolicy(3, 4, 5, RetryMode.Linear), NoRetry()], ids=repr)
def test_a_policy_survives_pickling_and_copying(policy):
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy


def test_a_publishing_error_survives_pickling_with_its_errors():
    again = pickle.loads(pickle.dumps(BoilermakerAppException("failed", [ServiceBusUnavailable("gone")])))
    assert str(again) == "failed: gone"
    assert [str(error) for error in again.errors] == ["gone"]


# ======================================================================================================================
# 3. Tasks
# ======================================================================================================================


async def test_a_decorated_function_is_still_called_inline():
    fetch = app_with_pages().task(name="fetch")(fetch_page)
    assert await fetch("inline", "http://x", depth=2) == "inline: http://x 2"


def test_a_decorated_function_keeps_its_name_and_its_docstring():
    fetch = app_with_pages().task(name="fetch")(fetch_page)
    assert (fetch.__name__, fetch.__doc__) == ("fetch_page", "Fetch a page.")


def test_si_binds_all_arguments_and_sends_nothing():
    task = app_with_pages().task(name="fetch")(fetch_page).si("http://x", depth=2)
    assert (task.function_name, task.args, task.kwargs) == ("fetch", ["http://x"], {"depth": 2})
    assert task.payload == {"args": ["http://x"], "kwargs": {"depth": 2}}
    assert (task.takes_result, task.sequence_number, task.message_id) == (False, None, None)


def test_s_leaves_room_for_the_result_of_the_parent():
    fetch = app_with_pages().task(name="fetch")(fetch_page)
    assert fetch.s().takes_result
    assert fetch.s(depth=2).kwargs == {"depth": 2}


def test_every_signature_has_an_id_of_its_own():
    fetch = app_with_pages().task(name="fetch")(fetch_page)
    assert len({fetch.si("http://x").task_id for _ in range(100)}) == 100


def test_a_signature_has_no_options_but_those_that_were_given():
    app = app_with_pages()
    options = {"policy": NoRetry(), "should_dead_letter": False, "acks_late": False}
    task = app.task(name="fetch", **options)(fetch_page).si("http://x")
    assert (task.policy, task.should_dead_letter, task.acks_late) == (None, None, None)


def test_a_signature_overrides_the_options_of_its_registration():
    fetch = app_with_pages().task(name="fetch", policy=NoRetry(), acks_late=False)(fetch_page)
    task = Task.si(fetch, "http://x", policy=RetryPolicy(delay=9), should_dead_letter=False, acks_late=True)
    assert (task.policy, task.should_dead_letter, task.acks_late) == (RetryPolicy(delay=9), False, True)


def test_a_signature_of_a_plain_function_takes_its_name():
    assert Task.si(fetch_page, "http://x").function_name == "fetch_page"
    assert Task.s(fetch_page, depth=2).takes_result


@pytest.mark.parametrize("make", [Task.si, Task.s])
def test_a_signature_with_something_else_for_a_policy_is_an_error(make):
    with pytest.raises(UsageError, match=r"take_anything: policy=3 must be a RetryPolicy"):
        make(take_anything, policy=3)


@pytest.mark.parametrize("fn", [len, print, "fetch_page", None, lambda state: None], ids=repr)
def test_a_signature_of_what_is_not_async_is_an_error(fn):
    with pytest.raises(UsageError, match="must be async"):
        Task.si(fn)


async def take_one_positional(state, number, /): ...


async def take_one_keyword(state, *, number): ...


CALLS_THAT_DO_NOT_FIT = [
    (fetch_page, (), {}, "url"),
    (fetch_page, ("a", 1, 2), {}, "too many positional arguments"),
    (fetch_page, ("a",), {"height": 1}, "height"),
    (fetch_page, ("a",), {"url": "b"}, "url"),
    (parse_page, ("a",), {}, "too many positional arguments"),
    (take_one_positional, (), {"number": 1}, "number"),
    (take_one_keyword, (1,), {}, "too many positional arguments"),
    (take_one_keyword, (), {}, "number"),
]


@pytest.mark.parametrize(("fn", "args", "kwargs", "says"), CALLS_THAT_DO_NOT_FIT)
def test_arguments_that_do_not_fit_the_function_are_an_error_of_the_signature(fn, args, kwargs, says):
    app = Boilermaker(None, LocalServiceBus())
    for make in (app.task(fn).si, partial(Task.si, fn), partial(app.create_task, fn)):
        with pytest.raises(InvalidArguments, match=rf"{fn.__name__}\(state.*{says}"):
            make(*args, **kwargs)


@pytest.mark.parametrize(("fn", "args", "kwargs", "says"), CALLS_THAT_DO_NOT_FIT)
async def test_arguments_that_do_not_fit_the_function_are_an_error_before_anything_is_sent(fn, args, kwargs, says):
    async with Boilermaker(None, LocalServiceBus()) as app:
        for schedule in (app.task(fn).delay, partial(app.apply_async, fn)):
            with pytest.raises(InvalidArguments, match=rf"{fn.__name__}\(state.*{says}"):
                await schedule(*args, **kwargs)
        assert await app.service_bus_client.peek() == []


def test_s_counts_the_result_as_the_first_argument():
    Task.s(fetch_page)
    Task.s(fetch_page, 2)
    Task.si(fetch_page, "a", 2)
    with pytest.raises(InvalidArguments, match="too many positional arguments"):
        Task.s(fetch_page, "a", 2)
    with pytest.raises(InvalidArguments, match="url"):
        Task.s(fetch_page, url="a")


NOT_JSON = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "NaN inside": {"a": [1, float("nan")]},
    "set": {1},
    "bytes": b"x",
    "object": object(),
    "Decimal": decimal.Decimal(1),
    "datetime": datetime.datetime(2026, 1, 1),
    "tuple key": {(1, 2): 3},
    "exception": ValueError("x"),
    "task": named("f"),
    "an integer of 5,000 digits": 10**4999,
    "a list of 100,000 lists": nested_list(100_000),
}


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON)
def test_an_argument_that_json_cannot_carry_is_an_error_that_names_task_and_argument(value):
    with pytest.raises(InvalidArguments, match=r"take_anything: .*argument 2\b"):
        Task.si(take_anything, "fine", value)
    with pytest.raises(InvalidArguments, match=r"take_anything: .*argument size\b"):
        Task.si(take_anything, "fine", size=value)


def test_a_list_that_contains_itself_is_an_argument_that_json_cannot_carry():
    itself = []
    itself.append(itself)
    with pytest.raises(InvalidArguments, match="argument 1"):
        Task.si(take_anything, itself)


def test_the_error_for_a_huge_argument_is_short():
    with pytest.raises(InvalidArguments) as caught:
        Task.si(take_anything, {str(number): b"x" * 1000 for number in range(1000)})
    assert len(str(caught.value)) < 1000


async def test_an_argument_changed_to_what_json_cannot_carry_is_an_error_at_publishing():
    async with app_with_pages() as app:
        task = app.create_task(take_anything, [])
        task.args.append({1, 2})
        with pytest.raises(InvalidArguments, match="argument 2"):
            await app.publish_task(task)
        assert await app.service_bus_client.peek() == []


def test_rshift_sets_on_success_and_gives_the_right_side():
    a, b, c = named("a"), named("b"), named("c")
    assert (a >> b >> c) is c
    assert (a.on_success, b.on_success, c.on_success) == (b, c, None)


def test_lshift_sets_on_success_of_the_right_side_and_gives_the_left_side():
    a, b = named("a"), named("b")
    assert (a << b) is a
    assert b.on_success is a


@pytest.mark.parametrize("operator", ["__rshift__", "__lshift__", "__or__"])
@pytest.mark.parametrize("operand", [None, 3, "fetch_page", parse_page], ids=repr)
def test_an_operand_that_is_no_task_is_an_error_that_shows_it(operator, operand):
    with pytest.raises(UsageError, match=re.escape(repr(operand))):
        getattr(named("a"), operator)(operand)


def test_decorated_functions_as_operands_stand_for_their_signatures():
    app = Boilermaker(None, LocalServiceBus())
    parse, store = app.task(parse_page), app.task(store_rows)
    assert names_along(named("a") | parse | store) == ["a", "parse_page", "store_rows"]
    assert names_along(parse | store) == ["parse_page", "store_rows"]
    assert (parse >> store).function_name == "store_rows"
    assert (parse << store).function_name == "parse_page"


async def test_decorated_functions_as_callbacks_stand_for_their_signatures():
    async with Boilermaker(None, LocalServiceBus()) as app:
        task, parse = app.task(fetch_page).si("a"), app.task(parse_page)
        task.on_success = task.on_failure = parse
        await app.publish_task(task)
        assert (task.on_success.function_name, task.on_failure.function_name) == ("parse_page", "parse_page")


async def test_a_callback_that_is_no_task_is_an_error_that_names_the_parent():
    async with app_with_pages() as app:
        task = app.create_task(parse_page)
        task.on_failure = clean_up
        with pytest.raises(UsageError, match=r"on_failure of <Task parse_page .* must be a Task"):
            await app.publish_task(task)


def test_or_appends_copies_at_the_end_of_the_chain():
    a, b, c, d = (named(name) for name in "abcd")
    a >> b
    whole = a | c | d
    assert names_along(whole) == ["a", "b", "c", "d"]


def test_or_leaves_its_operands_as_they_were():
    a, b, c = (named(name) for name in "abc")
    a.on_failure = c
    whole = a | b
    assert (a.on_success, b.on_success, a.on_failure) == (None, None, c)
    assert whole.on_failure.function_name == "c"
    assert {a.task_id, b.task_id, c.task_id}.isdisjoint(
        {whole.task_id, whole.on_success.task_id, whole.on_failure.task_id}
    )


def test_or_begins_two_workflows_with_one_prefix():
    prefix = named("a") | named("b")
    assert names_along(prefix | named("c")) == ["a", "b", "c"]
    assert names_along(prefix | named("d")) == ["a", "b", "d"]
    assert names_along(prefix) == ["a", "b"]


def test_or_with_itself_is_the_same_work_twice():
    a = named("a")
    twice = a | a
    assert names_along(twice) == ["a", "a"]
    assert twice.task_id != twice.on_success.task_id


def test_or_keeps_what_the_copies_were_given():
    a = named("a", args=[1], kwargs={"b": 2}, policy=NoRetry(), should_dead_letter=False, queue="q", takes_result=True)
    twin = (named("z") | a).on_success
    assert (twin.args, twin.kwargs, twin.policy) == ([1], {"b": 2}, NoRetry())
    assert (twin.should_dead_letter, twin.acks_late, twin.queue, twin.takes_result) == (False, None, "q", True)


def test_a_copy_has_fresh_ids_throughout():
    a, b, c = (named(name) for name in "abc")
    a.on_success, b.on_failure = b, c
    twin = a.copy()
    assert twin.on_success.on_failure.function_name == "c"
    ids = {task.task_id for task in (a, b, c, twin, twin.on_success, twin.on_success.on_failure)}
    assert len(ids) == 6


def test_a_copy_is_changed_without_its_original():
    a = named("a", args=[1], kwargs={"x": 1})
    twin = a.copy()
    twin.args.append(2)
    twin.kwargs["y"] = 2
    twin.policy = NoRetry()
    assert (a.args, a.kwargs, a.policy) == ([1], {"x": 1}, None)


async def test_a_copy_of_a_published_task_is_not_published():
    async with app_with_pages() as app:
        task = await app.apply_async(parse_page)
        twin = task.copy()
        assert (twin.sequence_number, twin.message_id) == (None, None)
        await twin.publish()
        assert len({message.message_id for message in await app.service_bus_client.peek()}) == 2


def test_a_copy_of_a_retry_has_its_tries_before_it():
    assert named("a", attempts=tried(3)).copy().attempts.attempts == 0


def test_a_callback_of_two_parents_is_one_callback_in_a_copy_too():
    a, b, shared = (named(name) for name in "abc")
    a.on_success, a.on_failure, b.on_failure = b, shared, shared
    twin = a.copy()
    assert twin.on_failure is twin.on_success.on_failure


def test_chain_links_its_members_and_gives_the_first():
    app, members = app_with_pages(), [named(name) for name in "abcd"]
    assert app.chain(*members) is members[0]
    assert names_along(members[0]) == ["a", "b", "c", "d"]


def test_chain_takes_decorated_functions():
    app = Boilermaker(None, LocalServiceBus())
    head = app.chain(app.task(parse_page), app.task(store_rows), on_failure=app.task(clean_up))
    assert names_along(head) == ["parse_page", "store_rows"]
    assert head.on_success.on_failure.function_name == "clean_up"


def test_chain_sets_on_failure_on_each_member():
    a, b, f = named("a"), named("b"), named("f")
    a.on_failure = named("mine")
    app_with_pages().chain(a, b, on_failure=f)
    assert (a.on_failure, b.on_failure) == (f, f)


def test_chain_without_on_failure_leaves_each_member_its_own():
    a, b, mine = named("a"), named("b"), named("mine")
    a.on_failure = mine
    app_with_pages().chain(a, b)
    assert (a.on_failure, b.on_failure) == (mine, None)


def test_chain_goes_on_after_what_its_last_member_had():
    b, c = named("b"), named("c")
    b >> c
    assert names_along(app_with_pages().chain(named("a"), b)) == ["a", "b", "c"]


@pytest.mark.parametrize("count", [0, 1])
def test_chain_of_fewer_than_two_is_an_error_that_says_how_many(count):
    with pytest.raises(UsageError, match=f"at least two tasks, not {count}"):
        app_with_pages().chain(*[named("a")] * count)


def test_chain_of_something_else_is_an_error_that_shows_it():
    with pytest.raises(UsageError, match="not 3"):
        app_with_pages().chain(named("a"), 3)
    with pytest.raises(UsageError, match=r"on_failure .*not 3"):
        app_with_pages().chain(named("a"), named("b"), on_failure=3)


def test_chain_of_the_same_task_twice_is_a_cycle():
    a = named("a")
    with pytest.raises(UsageError, match=r"<Task a .*cycle"):
        app_with_pages().chain(a, named("b"), a)


def cycle_of_two():
    a, b = named("a"), named("b")
    a >> b >> a
    return a


def cycle_of_failure():
    a, b = named("a"), named("b")
    a.on_success, b.on_failure = b, a
    return a


def cycle_of_one():
    a = named("a")
    a.on_failure = a
    return a


CYCLES = [cycle_of_one, cycle_of_two, cycle_of_failure]


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize(
    "use",
    [Task.copy, lambda a: a | named("c"), lambda a: encode(a, "q", "q"), lambda a: app_with_pages().bound(a)],
    ids=["copy", "or", "encode", "publish"],
)
def test_a_cycle_is_an_error_that_names_a_task_in_it(cycle, use):
    with pytest.raises(UsageError, match=r"<Task [ab] .*cycle"):
        use(cycle())


def test_a_callback_of_two_parents_is_no_cycle():
    a, b, shared = (named(name) for name in "abc")
    a >> b
    a.on_failure = b.on_failure = shared
    again = decode(encode(a, "q", "q"), "q")
    assert again.on_failure.task_id == again.on_success.on_failure.task_id == shared.task_id


def test_a_task_shows_its_name_and_id_but_not_its_arguments():
    task = named("login", kwargs={"password": "secret"})
    assert repr(task) == f"<Task login {task.task_id}>"


def test_the_current_task_outside_of_a_task_is_an_error():
    with pytest.raises(UsageError, match="outside of a running task"):
        current_task()


# ======================================================================================================================
# 4. Wire format
# ======================================================================================================================

# What boilermaker-servicebus 1.4.1 wrote for `Task.default("ping")`, a Task with arguments, a chain with callbacks, and
# a retry in a graph, by `model_dump_json()`.

WIRE_DEFAULT = (
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b09d4693daaf","should_dead_letter":true,"acks_late":true,'
    '"function_name":"ping","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491534Z"},'
    '"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"payload":{},"graph_id":null,'
    '"on_success":null,"on_failure":null}'
)
WIRE_ARGUMENTS = (
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b09e984c3151","should_dead_letter":true,"acks_late":true,'
    '"function_name":"greet","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491704Z"},'
    '"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},'
    '"payload":{"args":["Zoë ☃",null,1.5,[1,{"a":true}]],"kwargs":{"width":800}},"graph_id":null,'
    '"on_success":null,"on_failure":null}'
)
WIRE_CHAIN = (
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b09fa8510289","should_dead_letter":true,"acks_late":true,'
    '"function_name":"fetch","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491772Z"},'
    '"policy":{"max_tries":3,"delay":30,"delay_max":300,"retry_mode":1},'
    '"payload":{"args":["http://x"],"kwargs":{"n":2}},"graph_id":null,"on_success":'
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b0a09fff5bae","should_dead_letter":false,"acks_late":true,'
    '"function_name":"store","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491793Z"},'
    '"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"payload":{"args":[],"kwargs":{}},'
    '"graph_id":null,"on_success":'
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b0a1f2fecb10","should_dead_letter":true,"acks_late":false,'
    '"function_name":"store","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491827Z"},'
    '"policy":{"max_tries":1,"delay":5,"delay_max":5,"retry_mode":0},"payload":{"args":[],"kwargs":{}},'
    '"graph_id":null,"on_success":null,"on_failure":null},"on_failure":'
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b0a30f924460","should_dead_letter":true,"acks_late":true,'
    '"function_name":"cleanup","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491899Z"},'
    '"policy":{"max_tries":100,"delay":1,"delay_max":2,"retry_mode":2},"payload":{"args":[],"kwargs":{}},'
    '"graph_id":null,"on_success":null,"on_failure":null}},"on_failure":'
    '{"task_id":"01a1fd37-a3cb-7052-87b6-b0a2946ad310","should_dead_letter":true,"acks_late":true,'
    '"function_name":"cleanup","attempts":{"attempts":0,"last_retry":"2026-11-21T08:27:24.491866Z"},'
    '"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"payload":{"args":[],"kwargs":{}},'
    '"graph_id":null,"on_success":null,"on_failure":null}}'
)
WIRE_RETRY = (
    '{"task_id":"01a1fd37-a3cc-7199-b16c-5f6059ae9e8e","should_dead_letter":true,"acks_late":true,'
    '"function_name":"again","attempts":{"attempts":2,"last_retry":"2026-11-21T08:27:24.492101Z"},'
    '"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"payload":{},"graph_id":"g-1",'
    '"on_success":null,"on_failure":null}'
)
WIRE_POLICIES = [  # and for these policies
    ('{"max_tries":5,"delay":0,"delay_max":3600,"retry_mode":0}', RetryPolicy()),
    ('{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0}', RetryPolicy.default()),
    ('{"max_tries":1,"delay":5,"delay_max":5,"retry_mode":0}', RetryPolicy.no_retry()),
    ('{"max_tries":1,"delay":5,"delay_max":5,"retry_mode":0}', NoRetry()),
    ('{"max_tries":5,"delay":30,"delay_max":600,"retry_mode":2}', RetryExceptionDefaultLinear("x").policy),
    ('{"max_tries":5,"delay":30,"delay_max":600,"retry_mode":1}', RetryExceptionDefaultExponential("x").policy),
]


def test_the_default_task_of_the_original_decodes():
    task = decode(WIRE_DEFAULT, "q")
    assert (task.function_name, task.task_id) == ("ping", "01a1fd37-a3cb-7052-87b6-b09d4693daaf")
    assert (task.args, task.kwargs, task.graph_id) == ([], {}, None)
    assert task.policy == RetryPolicy.default()
    assert (task.should_dead_letter, task.acks_late) == (True, True)
    assert (task.on_success, task.on_failure) == (None, None)


def test_the_arguments_of_the_original_decode_from_text_and_from_bytes():
    for body in (WIRE_ARGUMENTS, WIRE_ARGUMENTS.encode()):
        task = decode(body, "q")
        assert (task.args, task.kwargs) == (["Zoë ☃", None, 1.5, [1, {"a": True}]], {"width": 800})


def test_a_chain_of_the_original_decodes_with_all_its_callbacks():
    head = decode(WIRE_CHAIN, "q")
    assert names_along(head) == ["fetch", "store", "store"]
    second, third = head.on_success, head.on_success.on_success
    assert values_of(head.policy) == (3, 30, 300, RetryMode.Exponential)
    assert (second.should_dead_letter, third.acks_late, values_of(third.policy)) == (False, False, (1, 5, 5, 0))
    assert (head.on_failure.function_name, third.on_failure) == ("cleanup", None)
    assert values_of(second.on_failure.policy) == (100, 1, 2, RetryMode.Linear)


def test_a_retry_of_the_original_decodes_with_its_attempts():
    task = decode(WIRE_RETRY, "q")
    assert (task.attempts.attempts, task.graph_id) == (2, "g-1")
    assert task.attempts.last_retry == datetime.datetime(2026, 11, 21, 8, 27, 24, 492101, datetime.UTC)


@pytest.mark.parametrize(("text", "policy"), WIRE_POLICIES)
def test_every_policy_is_written_and_read_as_by_the_original(text, policy):
    assert json.dumps(json.loads(encode(named("f", policy=policy), "q", "q"))["policy"], separators=(",", ":")) == text
    assert decode(body_with(policy=json.loads(text)), "q").policy == policy


@pytest.mark.parametrize("body", [WIRE_DEFAULT, WIRE_ARGUMENTS, WIRE_CHAIN, WIRE_RETRY])
def test_a_body_of_the_original_is_written_again_with_the_same_fields(body):
    def fields(document):
        document["payload"] = {"args": [], "kwargs": {}, **document["payload"]}
        document["attempts"]["last_retry"] = document["attempts"]["last_retry"].replace("Z", "+00:00")
        for callback in filter(None, (document["on_success"], document["on_failure"])):
            fields(callback)
        return document

    assert json.loads(encode(decode(body, "q"), "q", "q")) == fields(json.loads(body))


def test_a_body_has_exactly_the_fields_and_types_of_the_original():
    task = Task.si(fetch_page, "a", policy=NoRetry(), acks_late=True, should_dead_letter=True)
    document = json.loads(encode(task, "q", "q"))
    assert {name: type(value) for name, value in document.items()} == {
        "task_id": str,
        "should_dead_letter": bool,
        "acks_late": bool,
        "function_name": str,
        "attempts": dict,
        "policy": dict,
        "payload": dict,
        "graph_id": type(None),
        "on_success": type(None),
        "on_failure": type(None),
    }
    assert {name: type(value) for name, value in document["attempts"].items()} == {"attempts": int, "last_retry": str}
    assert datetime.datetime.fromisoformat(document["attempts"]["last_retry"]).utcoffset() == datetime.timedelta(0)
    assert document["policy"] == {"max_tries": 1, "delay": 5, "delay_max": 5, "retry_mode": 0}
    assert document["payload"] == {"args": ["a"], "kwargs": {}}


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"takes_result": True}, {"takes_result": True}),
        ({"root": "r"}, {"root": "r"}),
        ({"policy": None}, {"policy_is_default": True}),
        ({"acks_late": None, "policy": None}, {"policy_is_default": True, "default_options": ["acks_late"]}),
        (
            {"policy": NoRetry(), "retry_policy": RetryPolicy(max_tries=9)},
            {"scheduled_policy": {"max_tries": 1, "delay": 5, "delay_max": 5, "retry_mode": 0}},
        ),
        ({}, {}),
    ],
)
def test_what_is_new_on_the_wire_is_written_only_where_it_is_used(fields, written):
    task = named("f", **{"policy": RetryPolicy(), "should_dead_letter": True, "acks_late": True, **fields})
    document = json.loads(encode(task, "q", "q"))
    assert {name: document[name] for name in document.keys() - json.loads(WIRE_DEFAULT).keys()} == written
    again = decode(encode(task, "q", "q"), "q")
    assert {name: getattr(again, name) for name in fields} == fields


def test_a_body_is_ascii_so_that_its_length_is_its_size():
    body = encode(named("f", args=["Zoë ☃ 🎈"]), "q", "q")
    assert body.isascii()
    assert decode(body, "q").args == ["Zoë ☃ 🎈"]


JSON_VALUES = [None, True, False, 0, -1, 10**300, 1.5, -0.0, "", "ü\u2028\x00", "\ud800", [], {}, [[{"a": [None]}]]]


@pytest.mark.parametrize("value", JSON_VALUES, ids=ascii)
def test_every_json_value_comes_back_as_it_was(value):
    again = decode(encode(named("f", args=[value], kwargs={"value": value}), "q", "q"), "q")
    assert (repr(again.args), repr(again.kwargs)) == (repr([value]), repr({"value": value}))


def test_a_task_comes_back_with_all_its_fields():
    task = named("f", graph_id="g", should_dead_letter=False, acks_late=False, attempts=tried(7))
    again = decode(encode(task, "q", "q"), "q")
    for name in ("task_id", "graph_id", "should_dead_letter", "acks_late", "attempts", "policy", "takes_result"):
        assert getattr(again, name) == getattr(task, name)


@pytest.mark.parametrize("queue", ["here", "there"])
def test_a_task_belongs_on_the_queue_it_came_from_and_its_callbacks_on_that_of_their_publisher(queue):
    task = named("f", on_success=named("home"), on_failure=named("elsewhere", queue="elsewhere"))
    received = decode(encode(task, queue, "here"), queue)
    assert (received.queue, received.on_success.queue, received.on_failure.queue) == (queue, "here", "elsewhere")


def test_a_callback_keeps_its_queue_over_two_hops():
    task = named("f", queue="there", on_success=named("g", queue="there", on_success=named("h")))
    second = decode(encode(task, "there", "home"), "there").on_success
    third = decode(encode(second, second.queue, "there"), second.queue).on_success
    assert (second.queue, third.queue) == ("there", "home")


def test_unknown_fields_are_ignored():
    assert decode(body_with(priority=9, headers={"a": [1]}, Policy="x"), "q").function_name == "fetch_page"


@pytest.mark.parametrize(
    "name",
    [
        "payload",
        "policy",
        "attempts",
        "should_dead_letter",
        "acks_late",
        "graph_id",
        "on_success",
        "on_failure",
        "queue",
        "takes_result",
        "policy_is_default",
        "scheduled_policy",
        "default_options",
        "root",
    ],
)
def test_a_field_that_is_null_has_its_default_as_if_it_were_absent(name):
    with_null = decode(body_with(**{name: None}), "q")
    assert (with_null.payload, with_null.policy, with_null.retry_policy) == ({"args": [], "kwargs": {}}, None, None)
    assert (with_null.attempts.attempts, with_null.queue, with_null.takes_result) == (0, "q", False)
    assert (with_null.should_dead_letter, with_null.acks_late, with_null.root) == (None, None, None)
    assert json.loads(encode(with_null, "q", "q"))["policy"]["max_tries"] == RetryPolicy.default().max_tries


SURPRISING_ARGUMENTS = [
    [],
    [None, True, 1.5, -1, "text"],
    [{"payload": {"args": [1]}}],
    ['},"policy":{"max_tries":1,"delay":0,"delay_max":0,"retry_mode":0}'],
    ['"},"policy":{},"attempts":{"attempts":9,"last_retry":"x"}'],
    ['Zoë ☃\n\x00"\\\ud800'],
    [[[[{}]]], {"": {"args": [], "kwargs": {}}}],
]


@pytest.mark.parametrize("arguments", SURPRISING_ARGUMENTS, ids=ascii)
@pytest.mark.parametrize(
    "options", [{}, {"should_dead_letter": False}, {"acks_late": False, "policy": NoRetry()}], ids=str
)
def test_a_task_reads_the_same_however_its_body_is_laid_out(arguments, options):
    task = named("f", args=arguments, kwargs={"k": arguments}, **options)
    body = encode(task, "q", "q")
    shuffled = json.dumps(dict(reversed(json.loads(body).items())), indent=1, ensure_ascii=False)
    for text in (body, f" {body}", shuffled):
        again = decode(text, "q")
        assert dataclasses.asdict(again) == dataclasses.asdict(task) | {"queue": "q"}


@pytest.mark.parametrize("text", ["1e999", "-1e999", '[{"a":1e400}]'])
def test_a_number_that_is_no_number_any_more_is_no_json(text):
    with pytest.raises(InvalidTaskFormat, match="out of range"):
        decode(encode(named("f", args=[7]), "q", "q").replace("[7]", f"[{text}]"), "q")


@pytest.mark.parametrize("name", [each.name for each in boilermaker.FIELDS])
def test_what_is_set_by_hand_comes_back(name):
    values = {
        "task_id": "t", "function_name": "g", "args": [1], "kwargs": {"a": 1}, "queue": "q", "graph_id": "g",
        "attempts": RetryAttempts(3, datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)), "root": "r",
        "policy": NoRetry(), "should_dead_letter": False, "acks_late": False, "takes_result": True,
    }  # fmt: skip
    if name not in values:
        pytest.skip("is not set by itself")
    task = named("f", **{name: values[name]}) if name != "function_name" else named("g")
    assert getattr(decode(encode(task, "q", "q"), "q"), name) == values[name]


NOT_A_TASK = {
    "nothing": "",
    "no bytes": b"",
    "spaces": "  \n",
    "prose": "hello",
    "null": "null",
    "a number": "1",
    "a string": '"{}"',
    "an array": "[]",
    "an array of objects": "[{}]",
    "cut off": body_with()[:-1],
    "more after the end": body_with() + "x",
    "single quotes": "{'task_id': 'x'}",
    "invalid UTF-8": b'{"task_id": "\xff"}',
    "UTF-16": body_with().encode("utf-16"),
    "zeros": b"\x00" * 100,
    "NaN": '{"task_id": "a", "function_name": "f", "payload": {"args": [NaN]}}',
    "Infinity": '{"task_id": "a", "function_name": "f", "payload": {"args": [Infinity]}}',
    "-Infinity": '{"task_id": "a", "function_name": "f", "payload": {"kwargs": {"x": -Infinity}}}',
    "a number of 5,000 digits": '{"task_id": "a", "function_name": "f", "x": ' + "9" * 5000 + "}",
    "100,000 brackets": "[" * 100_000,
    "100,000 pairs of brackets": "[" * 100_000 + "]" * 100_000,
    "100,000 objects": '{"on_success":' * 100_000,
    "100,000 brackets in an argument": body_with(payload={"args": ["@"]}).replace('"@"', "[" * 100_000 + "]" * 100_000),
}


@pytest.mark.parametrize("body", NOT_A_TASK.values(), ids=NOT_A_TASK)
def test_a_body_that_is_no_task_is_an_error_with_a_short_description(body):
    with pytest.raises(boilermaker.InvalidTaskFormat, match=r"[Tt]he body") as caught:
        decode(body, "q")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["task_id", "function_name"])
def test_a_body_without_id_or_name_is_an_error_that_says_which(name):
    document = json.loads(body_with())
    del document[name]
    for body in (json.dumps(document), body_with(**{name: None})):
        with pytest.raises(boilermaker.InvalidTaskFormat, match=f"{name} of the body is missing"):
            decode(body, "q")


NO_STRING = [0, 1.5, True, [], {}]
NO_OBJECT = ["", "x", 0, 1, False, [], [{}]]
NO_BOOLEAN = [0, 1, "true", [], {}]
NO_COUNT = ["5", "", 1.0, 1.5, True, [], {}, -1, 2**31, 10**30, "9" * 100]

WRONG_VALUES = {
    "task_id": NO_STRING,
    "function_name": NO_STRING,
    "payload": NO_OBJECT,
    "payload.args": ["", "x", 0, False, {}, {"0": 1}],
    "payload.kwargs": NO_OBJECT,
    "policy": NO_OBJECT,
    "policy.max_tries": [*NO_COUNT, 101],
    "policy.delay": NO_COUNT,
    "policy.delay_max": NO_COUNT,
    "policy.retry_mode": [*NO_COUNT, 3, "Fixed"],
    "policy_is_default": NO_BOOLEAN,
    "scheduled_policy": NO_OBJECT,
    "scheduled_policy.max_tries": [-1, 101, "5"],
    "attempts": NO_OBJECT,
    "attempts.attempts": NO_COUNT,
    "attempts.last_retry": [0, 1.5, True, [], {}, "", "yesterday", "2026-13-01T00:00:00Z", "2026"],
    "should_dead_letter": NO_BOOLEAN,
    "acks_late": NO_BOOLEAN,
    "graph_id": NO_STRING,
    "queue": [*NO_STRING, " ", "a queue?", "\ud800", "x" * 300],
    "takes_result": NO_BOOLEAN,
    "on_success": NO_OBJECT,
    "on_failure": NO_OBJECT,
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(path, value, id=f"{path}={ascii(value)[:20]}")
        for path, values in WRONG_VALUES.items()
        for value in values
    ],
)
def test_a_field_of_the_wrong_type_or_out_of_range_is_an_error_that_names_it(path, value):
    with pytest.raises(boilermaker.InvalidTaskFormat) as caught:
        decode(body_with_field(path, value), "q")
    outer, _, inner = path.rpartition(".")
    assert re.search(rf"\b{inner}\b", str(caught.value))
    assert outer != "scheduled_policy" or outer in str(caught.value)


def test_a_wrong_field_of_a_callback_is_named_with_its_place():
    callback = json.loads(body_with(on_failure=json.loads(body_with(acks_late="yes"))))
    with pytest.raises(boilermaker.InvalidTaskFormat, match=r"acks_late of on_success\.on_failure .*'yes'"):
        decode(body_with(on_success=callback), "q")


@pytest.mark.parametrize(
    "path", ["task_id", "payload", "policy.max_tries", "policy.retry_mode", "attempts.attempts", "attempts.last_retry"]
)
@pytest.mark.parametrize("value", ["x" * 100_000, list(range(10_000))], ids=["a long string", "a long array"])
def test_the_description_of_a_huge_wrong_value_fits_into_a_dead_letter(path, value):
    if path == "task_id":
        value = [value]
    with pytest.raises(boilermaker.InvalidTaskFormat) as caught:
        decode(body_with_field(path, value), "q")
    assert len(str(caught.value)) <= 1000


def test_the_description_of_a_wrong_value_far_down_a_chain_fits_into_a_dead_letter():
    body = body_with()[:-1] + ', "on_success": @}'
    document = "0"
    for _ in range(700):
        document = body.replace("@", document)
    with pytest.raises(boilermaker.InvalidTaskFormat, match="on_success") as caught:
        decode(document, "q")
    assert len(str(caught.value)) <= boilermaker.MAX_DESCRIPTION_LENGTH


def test_a_chain_of_750_decodes_again():
    head = chain_of(750)
    again = decode(encode(head, "q", "q"), "q")
    assert len(names_along(again)) == 750
    while again.on_success is not None:
        again = again.on_success
    assert again.args == [749]


@pytest.mark.parametrize("length", [751, 2000])
def test_a_longer_chain_is_an_error_that_says_how_long_and_the_limit(length):
    with pytest.raises(UsageError, match=rf"<Task step .* {length} .*750"):
        encode(chain_of(length), "q", "q")


async def test_a_chain_of_2000_is_an_error_at_publishing_and_nothing_is_sent():
    async with app_with_pages() as app:
        with pytest.raises(UsageError, match=r"2000 .*750"):
            await app.publish_task(chain_of(2000))
        assert await app.service_bus_client.peek() == []


def test_a_chain_of_2000_can_be_copied_and_appended_to():
    assert len(names_along(chain_of(2000) | named("last"))) == 2001


@pytest.mark.parametrize(("length", "depth"), [(1, 900), (750, 400), (400, 750)])
def test_what_can_be_encoded_can_be_decoded_or_else_it_is_an_error_at_the_call(length, depth):
    head = last = chain_of(length)
    while last.on_success is not None:
        last = last.on_success
    last.args = [nested_list(depth)]
    with contextlib.suppress(UsageError):
        assert len(names_along(decode(encode(head, "q", "q"), "q"))) == length


def test_a_workflow_that_doubles_at_every_step_is_an_error_before_it_fills_the_memory():
    task = named("last")
    for _ in range(40):
        task = named("step", on_success=task, on_failure=task)
    with pytest.raises(MessageTooLarge, match=f"<Task step .* {boilermaker.MAX_WORKFLOW_BYTES} bytes"):
        encode(task, "q", "q")


# ======================================================================================================================
# 6. Decisions
# ======================================================================================================================

NOTHING = None

DECISIONS = [
    # The four actions: as it is by default, should_dead_letter=False, acks_late=False, and both.
    (Outcome.RETURNED, "", "on_success", Do.COMPLETE, Do.COMPLETE, Do.LEAVE, Do.LEAVE),
    (Outcome.FAILED, "TaskFailed", "on_failure", Do.DEAD_LETTER, Do.COMPLETE, Do.LEAVE, Do.LEAVE),
    (Outcome.RETRY, "", "f", Do.COMPLETE, Do.COMPLETE, Do.LEAVE, Do.LEAVE),
    (Outcome.EXHAUSTED, "RetriesExhausted", "on_failure", Do.DEAD_LETTER, Do.COMPLETE, Do.LEAVE, Do.LEAVE),
    (Outcome.NO_TRY_LEFT, "RetriesExhausted", "on_failure", Do.DEAD_LETTER, Do.COMPLETE, Do.DEAD_LETTER, Do.COMPLETE),
    (Outcome.KILLER, "MaxDeliveryCountExceeded", "on_failure", *[Do.DEAD_LETTER] * 4),
    (Outcome.EXPIRED, "Expired", "on_failure", Do.DEAD_LETTER, Do.COMPLETE, Do.DEAD_LETTER, Do.COMPLETE),
    (Outcome.UNREGISTERED, "UnregisteredFunction", "on_failure", *[Do.DEAD_LETTER] * 4),
    (Outcome.STOPPED, "", NOTHING, Do.ABANDON, Do.ABANDON, Do.LEAVE, Do.LEAVE),
    (Outcome.LOCK_LOST, "", NOTHING, Do.LEAVE, Do.LEAVE, Do.LEAVE, Do.LEAVE),
]

FLAGS = [(True, True), (False, True), (True, False), (False, False)]


def task_with_callbacks(**fields):
    return named("f", on_success=named("on_success"), on_failure=named("on_failure"), **fields)


def delivered(task, queue="tasks", sequence_number=7, message_id="m", delivery_count=0):
    """The message of a task, as a worker receives it."""
    body = encode(task, queue, queue)
    return boilermaker.Delivery(sequence_number, delivery_count, message_id, body, {}, locked_until=math.inf)


def received(task, registration=None, queue="tasks"):
    """A task as a worker has it: out of its message, with the options in force."""
    task = decode(delivered(task, queue).body, queue)
    (registration or Registration("f", parse_page, Options())).fill_in(task)
    return task


def decided(task, outcome, result=None, error=None, *, queue="tasks", registration=None, **delivery):
    """What is decided of a task after a run."""
    message = delivered(task, queue, **delivery)
    in_force = received(task, registration, queue)
    return decide(Run(message, in_force, registration, outcome, result, error), queue)


def follow_up_of(task, outcome, result=None, error=None, **options):
    """The one task that follows."""
    [follow_up] = decided(task, outcome, result, error, **options).follow_ups
    return follow_up.task


@pytest.mark.parametrize(
    ("outcome", "reason", "follow_up", "should_dead_letter", "acks_late", "action"),
    [
        pytest.param(*row[:3], *flags, action, id=f"{row[0].name} {flags}")
        for row in DECISIONS
        for flags, action in zip(FLAGS, row[3:], strict=True)
    ],
)
def test_a_message_is_settled_and_followed_as_the_table_says(
    outcome, reason, follow_up, should_dead_letter, acks_late, action
):
    task = task_with_callbacks(should_dead_letter=should_dead_letter, acks_late=acks_late)
    settlement = decided(task, outcome, error=RetryException("x"))
    assert (settlement.action, settlement.reason) == (action, reason)
    assert [each.task.function_name for each in settlement.follow_ups] == ([follow_up] if follow_up else [])
    assert all(each.message_id for each in settlement.follow_ups)


def test_the_table_has_a_row_for_every_outcome():
    assert {row[0] for row in DECISIONS} == set(Outcome) - {Outcome.UNDECODABLE}


def test_what_is_no_task_is_dead_lettered_and_nothing_follows():
    message = delivered(named("f"))
    settlement = decide(Run(message, outcome=Outcome.UNDECODABLE, error=InvalidTaskFormat("no task")), "tasks")
    assert (settlement.action, settlement.reason, settlement.follow_ups) == (Do.DEAD_LETTER, "InvalidTaskFormat", [])


def test_an_outcome_that_is_added_is_one_row(monkeypatch):
    rows = {outcome.name: outcome.value for outcome in Outcome}
    rows["FROZEN"] = ("is frozen", Do.DEAD_LETTER, "Frozen", "on_failure", boilermaker._NOT_RUN)
    more = enum.Enum("Outcome", rows, type=_OutcomeRow)
    settlement = decided(task_with_callbacks(acks_late=False), more.FROZEN)
    assert (settlement.action, settlement.reason) == (Do.DEAD_LETTER, "Frozen")
    assert [each.task.function_name for each in settlement.follow_ups] == ["on_failure"]


class _OutcomeRow:
    __init__ = Outcome.__init__


DEAD = "tasks/$DeadLetterQueue"


@pytest.mark.parametrize("outcome", [row[0] for row in DECISIONS if row[3] is Do.DEAD_LETTER], ids=lambda row: row.name)
def test_a_dead_letter_is_never_dead_lettered_anew(outcome):
    settlement = decided(task_with_callbacks(), outcome, queue=DEAD)
    assert settlement.action is Do.KEEP
    assert list(settlement.follow_ups) == []  # they followed when it died


def test_what_follows_a_dead_letter_has_ids_of_its_own():
    task = task_with_callbacks(root="a-root", attempts=tried(1))
    ids = [decided(task, Outcome.RETURNED, queue=queue).follow_ups[0].message_id for queue in ("tasks", DEAD, "other")]
    assert ids[0] == "a-root"
    assert ids[1] == root_of(delivered(task), DEAD)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.RETRY])
def test_without_callbacks_nothing_follows(outcome):
    assert decided(named("f"), outcome).follow_ups == []


@pytest.mark.parametrize(
    ("error", "attempts", "max_tries", "expected"),
    [
        (ValueError("x"), 0, 5, Outcome.FAILED),
        (asyncio.CancelledError(), 0, 5, Outcome.FAILED),
        (RetryException("x"), 0, 0, Outcome.EXHAUSTED),
        (RetryException("x"), 0, 1, Outcome.EXHAUSTED),
        (RetryException("x"), 0, 2, Outcome.RETRY),
        (RetryException("x"), 1, 2, Outcome.EXHAUSTED),
        (RetryException("x"), 3, 5, Outcome.RETRY),
        (RetryException("x"), 4, 5, Outcome.EXHAUSTED),
        (RetryException("x"), 98, 100, Outcome.RETRY),
        (RetryException("x"), 99, 100, Outcome.EXHAUSTED),
        (RetryException("x", NoRetry()), 0, 5, Outcome.EXHAUSTED),
        (RetryException("x", RetryPolicy(max_tries=9)), 4, 5, Outcome.RETRY),
        (RetryException("x", delay=5), 4, 5, Outcome.EXHAUSTED),
        (RetryExceptionDefault("x"), 3, 1, Outcome.RETRY),
        (RetryExceptionDefault("x"), 4, 9, Outcome.EXHAUSTED),
        (ExceptionGroup("tasks", [RetryException("x"), RetryException("y")]), 0, 5, Outcome.RETRY),
        (ExceptionGroup("tasks", [ExceptionGroup("", [RetryException("x")])]), 4, 5, Outcome.EXHAUSTED),
        (ExceptionGroup("tasks", [RetryException("x"), ValueError("y")]), 0, 5, Outcome.FAILED),
    ],
    ids=lambda value: value.name if isinstance(value, Outcome) else repr(value),
)
def test_a_retry_exception_means_a_retry_until_the_tries_are_used_up(error, attempts, max_tries, expected):
    task = named("f", attempts=tried(attempts), policy=RetryPolicy(max_tries=max_tries))
    assert outcome_of(task, error) is expected


@pytest.mark.parametrize(
    ("attempts", "max_tries", "expected"),
    [(0, 0, False), (0, 1, True), (1, 1, False), (4, 5, True), (5, 5, False), (2**31 - 1, 100, False)],
)
def test_a_task_may_run_as_often_as_its_policy_says(attempts, max_tries, expected):
    task = named("f", attempts=tried(attempts), policy=RetryPolicy(max_tries=max_tries))
    assert may_run(task) is expected


@pytest.mark.parametrize("max_tries", [1, 2, 5])
def test_max_tries_is_how_often_the_function_runs(max_tries):
    task, runs = named("f", policy=RetryPolicy(max_tries=max_tries)), 0
    while task is not None and may_run(received(task)):
        runs += 1
        error = RetryException("again")
        follow_ups = decided(task, outcome_of(received(task), error), error=error).follow_ups
        task = follow_ups[0].task if follow_ups else None
    assert runs == max_tries


@pytest.mark.parametrize(
    ("own", "scheduled", "expected"), [(None, None, 1), (None, 2, 2), (3, None, 3), (3, 2, 3)], ids=repr
)
def test_the_policy_in_force_is_that_of_the_exception_else_that_of_the_call_else_that_of_the_registration(
    own, scheduled, expected
):
    policies = {delay: RetryPolicy(delay=delay) for delay in (1, 2, 3)}
    app = Boilermaker(None, LocalServiceBus()).register_async(parse_page, policy=policies[1])
    task = app.bound(app.create_task(parse_page, policy=policies.get(scheduled)))
    error = RetryException("busy", policies.get(own))
    settlement = decided(task, Outcome.RETRY, error=error, registration=app.registration("parse_page"))
    assert settlement.follow_ups[0].delay == expected


@pytest.mark.parametrize("delay", [0, 7, 0.5, datetime.timedelta(seconds=7)], ids=repr)
def test_a_delay_of_the_exception_changes_when_it_runs_again_but_not_how_often(delay):
    task = named("f", policy=RetryPolicy(max_tries=3, delay=100), attempts=tried(1))
    error = RetryException("busy", delay=delay)
    [follow_up] = decided(task, outcome_of(received(task), error), error=error).follow_ups
    assert follow_up.delay == (delay.total_seconds() if isinstance(delay, datetime.timedelta) else delay)
    assert not may_run(dataclasses.replace(received(follow_up.task), attempts=tried(3)))


@pytest.mark.parametrize("delay", [-1, "5", True, float("nan"), 2**31], ids=repr)
def test_a_delay_of_the_exception_that_is_none_is_an_error_that_shows_it(delay):
    with pytest.raises(UsageError, match=re.escape(f"delay={delay!r} must be seconds")):
        RetryException("busy", delay=delay)


def test_a_task_by_name_alone_has_the_policy_of_the_registration_at_its_receiver():
    app = Boilermaker(None, LocalServiceBus()).register_async(parse_page, policy=NoRetry(), acks_late=False)
    task = received(Task.si(parse_page), app.registration("parse_page"))
    assert (task.policy, task.acks_late) == (NoRetry(), False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"policy": RetryPolicy()}, (RetryPolicy(), False, False)),
        ({"acks_late": True}, (NoRetry(), True, False)),
        ({"should_dead_letter": True}, (NoRetry(), False, True)),
        ({"acks_late": False, "should_dead_letter": True, "policy": RetryPolicy()}, (RetryPolicy(), False, True)),
    ],
)
def test_what_is_given_to_a_task_stands_and_the_rest_comes_from_the_registration(given, expected):
    options = {"policy": NoRetry(), "acks_late": False, "should_dead_letter": False}
    app = Boilermaker(None, LocalServiceBus()).register_async(parse_page, **options)
    task = received(Task.si(parse_page, **given), app.registration("parse_page"))
    assert (task.policy, task.acks_late, task.should_dead_letter) == expected


def test_the_options_of_the_publisher_stand_in_the_message_and_those_of_the_receiver_apply():
    publisher = Boilermaker(None, LocalServiceBus()).register_async(parse_page, policy=NoRetry(), acks_late=False)
    document = json.loads(encode(publisher.bound(Task.si(parse_page)), "q", "q"))
    assert (document["policy"]["max_tries"], document["acks_late"]) == (1, False)
    assert (document["policy_is_default"], document["default_options"]) == (True, ["should_dead_letter", "acks_late"])
    receiver = Boilermaker(None, LocalServiceBus()).register_async(parse_page, policy=RetryPolicy(max_tries=9))
    task = decode(json.dumps(document), "q")
    assert json.loads(encode(task, "q", "q")) == document  # what passes through a worker on its way stays as it is
    receiver.registration("parse_page").fill_in(task)
    assert (task.policy.max_tries, task.acks_late, may_run(task)) == (9, True, True)


def test_equal_times_of_two_zones_are_each_written_as_they_are():
    noon = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)
    elsewhere = noon.astimezone(datetime.timezone(datetime.timedelta(hours=1)))
    for moment, text in ((noon, "2026-01-01T12:00:00+00:00"), (elsewhere, "2026-01-01T13:00:00+01:00")):
        task = named("f", attempts=boilermaker.RetryAttempts(0, moment))
        assert json.loads(boilermaker.encode(task, "tasks", "tasks"))["attempts"]["last_retry"] == text


@pytest.mark.parametrize(
    "name", [each.name for each in boilermaker.FIELDS if each.types and each.name not in ("payload", "expires")]
)
async def test_a_field_that_is_set_by_hand_to_another_type_is_refused(name):
    app = Boilermaker(None, LocalServiceBus())
    task = Task.default("work")
    setattr(task, name, 0.5)
    with pytest.raises(UsageError, match=f"{name}=0.5 must be of type " if name != "takes_result" else r"\.s\(\)"):
        await app.publish_task(task)
    assert await app.service_bus_client.peek() == []
    await app.close()


async def test_what_is_set_by_hand_stands_as_if_it_had_been_given():
    async with app_with_pages() as app:
        task = Task.si(parse_page)
        task.policy, task.should_dead_letter, task.acks_late = NoRetry(), False, False
        await app.publish_task(task)
        [message] = await app.service_bus_client.peek()
    received = decode(message.body, "tasks")
    assert (received.policy, received.should_dead_letter, received.acks_late) == (NoRetry(), False, False)


def test_a_retry_exception_of_ones_own_needs_no_super_init():
    class Throttled(RetryException):
        def __init__(self, seconds):
            self.seconds = seconds

    assert outcome_of(named("f"), Throttled(5)) is Outcome.RETRY
    [follow_up] = decided(named("f"), Outcome.RETRY, error=Throttled(5)).follow_ups
    assert follow_up.delay == RetryPolicy.default().delay


def test_a_long_message_of_an_exception_is_cut_for_the_failure_callback():
    task = named("f", on_failure=named("g", takes_result=True))
    assert len(json.dumps(follow_up_of(task, Outcome.FAILED, error=ValueError("x" * 300_000)).args)) < 20_000


def test_a_task_twice_in_a_row_in_a_chain_is_an_error():
    app = Boilermaker(None, LocalServiceBus())
    task = named("f")
    with pytest.raises(UsageError, match="twice in a row"):
        app.chain(task, task)


async def test_a_function_may_have_parameters_of_any_name():
    app = Boilermaker(None, LocalServiceBus())

    async def anything(state, **kwargs): ...

    function = app.task(anything)
    assert (await app.send_task("anything", name="a", fn="b")).kwargs == {"name": "a", "fn": "b"}
    assert Task.si(anything, fn="a", cls="b").kwargs == {"fn": "a", "cls": "b"}
    assert app.create_task(anything, fn="a", self="b").kwargs == {"fn": "a", "self": "b"}
    assert function.si(self="a").kwargs == {"self": "a"}


async def test_a_published_task_is_checked_again_when_it_is_published_again():
    app = app_with_pages()
    task = await app.publish_task(Task.si(fetch_page, "a"))
    task.args = []
    with pytest.raises(InvalidArguments, match="url"):
        await app.publish_task(task)


@pytest.mark.parametrize("name", [5, "", b"f"])
def test_a_name_that_is_no_text_is_an_error_at_registration(name):
    with pytest.raises(UsageError, match="name="):
        Boilermaker(None, LocalServiceBus()).register_async(parse_page, name=name)


def test_a_function_without_room_for_the_state_is_an_error_at_registration():
    async def stateless(): ...

    with pytest.raises(UsageError, match="must take the application's state"):
        Boilermaker(None, LocalServiceBus()).register_async(stateless)


@pytest.mark.parametrize("grace_period", [None, -1, "25"])
async def test_a_wrong_grace_period_is_an_error_at_the_start(grace_period):
    with pytest.raises(ConfigurationError, match="grace_period"):
        await Boilermaker(None, LocalServiceBus()).run(burst=True, grace_period=grace_period)


def test_a_policy_given_to_a_task_by_name_stands_at_its_receiver():
    app = Boilermaker(None, LocalServiceBus()).register_async(parse_page, policy=NoRetry())
    task = received(named("parse_page", policy=RetryPolicy(delay=9)), app.registration("parse_page"))
    assert task.policy == RetryPolicy(delay=9)


def retried(task, error):
    """The retry of a task, as its message has it."""
    [follow_up] = decided(task, outcome_of(received(task), error), error=error).follow_ups
    return decode(encode(follow_up.task, "tasks", "tasks"), "tasks")


def test_a_retry_is_the_same_task_with_one_attempt_more():
    task = task_with_callbacks(args=[1], kwargs={"a": 2}, graph_id="g", attempts=tried(2), policy=RetryPolicy())
    again = retried(task, RetryException("x"))
    assert (again.task_id, again.attempts.attempts) == (task.task_id, 3)
    assert (again.args, again.kwargs, again.graph_id, again.policy) == ([1], {"a": 2}, "g", task.policy)
    assert (again.on_success.function_name, again.on_failure.function_name) == ("on_success", "on_failure")


def test_a_retry_notes_when_it_was_sent_back():
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    again = retried(named("f", attempts=RetryAttempts(1, long_ago)), RetryException("x"))
    assert datetime.datetime.now(datetime.UTC) - again.attempts.last_retry < datetime.timedelta(minutes=1)


@pytest.mark.parametrize(("attempts", "delay"), [(0, 10), (1, 20), (2, 30), (3, 35)])
def test_a_retry_waits_as_its_policy_says_for_the_retries_so_far(attempts, delay):
    policy = RetryPolicy(max_tries=9, delay=10, delay_max=35, retry_mode=RetryMode.Linear)
    task = named("f", policy=policy, attempts=tried(attempts))
    assert decided(task, Outcome.RETRY, error=RetryException("x")).follow_ups[0].delay == delay


@pytest.mark.parametrize("given", [RetryPolicy(max_tries=3, delay=1), None], ids=["given", "of the registration"])
def test_a_policy_of_an_exception_governs_one_retry_and_then_that_of_the_call_again(given):
    registration = Registration("f", parse_page, Options(RetryPolicy(max_tries=3, delay=1)))
    task = named("f", policy=given)
    task._published = registration.options
    error = RetryException("x", RetryPolicy(max_tries=9, delay=50))
    [second] = decided(task, Outcome.RETRY, error=error, registration=registration).follow_ups
    assert (second.delay, second.task.policy) == (50, given)
    assert json.loads(encode(second.task, "q", "q"))["policy"]["max_tries"] == 9  # so another worker may run it too
    assert may_run(received(second.task, registration))
    [third] = decided(second.task, Outcome.RETRY, error=RetryException("x"), registration=registration).follow_ups
    assert (third.delay, third.task.policy, third.task.retry_policy) == (1, given, None)


def test_a_policy_of_an_exception_allows_more_tries_than_the_call_gave():
    again = received(retried(named("f", policy=NoRetry()), RetryExceptionDefault("x")))
    assert may_run(again)
    assert outcome_of(again, RetryException("x")) is Outcome.EXHAUSTED
    assert outcome_of(again, RetryExceptionDefault("x")) is Outcome.RETRY


def test_a_retry_that_gives_room_for_a_result_keeps_what_it_was_given():
    following = follow_up_of(named("f", on_success=named("g", args=[2], takes_result=True)), Outcome.RETURNED, 1)
    assert retried(following, RetryException("x")).args == [1, 2]


@pytest.mark.parametrize("result", [None, 0, "text", [1, 2], {"a": None}], ids=repr)
def test_a_result_becomes_the_first_argument_of_a_callback_that_takes_it(result):
    task = named("f", on_success=named("g", args=["mine"], kwargs={"a": 1}, takes_result=True))
    following = follow_up_of(task, Outcome.RETURNED, result)
    assert (following.args, following.kwargs, following.takes_result) == ([result, "mine"], {"a": 1}, False)


def test_a_result_does_not_change_the_arguments_of_an_immutable_callback():
    task = named("f", on_success=named("g", args=["mine"]))
    assert follow_up_of(task, Outcome.RETURNED, "result").args == ["mine"]


def test_a_decision_leaves_the_task_as_it_was():
    task = named("f", on_success=named("g", takes_result=True), on_failure=named("h", takes_result=True))
    message, task = delivered(task), received(task)
    before = encode(task, "q", "q")
    for outcome in (Outcome.RETURNED, Outcome.FAILED, Outcome.RETRY):
        decide(Run(message, task, None, outcome, "result", RetryException("x")), "tasks")
    assert encode(task, "q", "q") == before


def raised(error):
    """The error as it is after it was raised."""
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_failure_is_a_dict_for_the_callback_that_takes_it():
    task = named("f", attempts=tried(2), on_failure=named("g", args=["mine"], takes_result=True))
    failure, mine = follow_up_of(task, Outcome.FAILED, error=raised(ZeroDivisionError("by zero"))).args
    assert mine == "mine"
    assert "raise error" in failure.pop("traceback")
    assert failure == {
        "task_id": task.task_id,
        "function_name": "f",
        "error": "ZeroDivisionError",
        "message": "by zero",
        "attempts": 3,
    }


@pytest.mark.parametrize(
    ("outcome", "raised", "error", "message", "attempts"),
    [
        (Outcome.FAILED, None, "TaskFailureResult", "", 1),
        (Outcome.EXHAUSTED, RetryException("busy"), "RetryException", "busy", 1),
        (Outcome.UNREGISTERED, UsageError("unknown"), "UnregisteredFunction", "unknown", 0),
        (Outcome.EXPIRED, BoilermakerError("late"), "Expired", "late", 0),
    ],
)
def test_a_failure_that_is_no_exception_of_the_task_is_told_in_the_same_dict(outcome, raised, error, message, attempts):
    failure = follow_up_of(named("f", on_failure=named("g", takes_result=True)), outcome, error=raised).args[0]
    assert failure.keys() == {"task_id", "function_name", "error", "message", "traceback", "attempts"}
    assert (failure["error"], failure["message"], failure["attempts"]) == (error, message, attempts)


@pytest.mark.parametrize(
    ("outcome", "error", "description"),
    [
        (Outcome.FAILED, None, "The task returned TaskFailureResult."),
        (Outcome.FAILED, ValueError("no such image"), "ValueError: no such image"),
        (Outcome.EXHAUSTED, RetryException("busy"), "boilermaker.RetryException: busy"),
        (Outcome.UNREGISTERED, UsageError("unknown"), "boilermaker.UsageError: unknown"),
        (
            Outcome.FAILED,
            ExceptionGroup("tasks", [KeyError("a"), ExceptionGroup("more", [ValueError("b")])]),
            "ExceptionGroup: tasks (2 sub-exceptions): KeyError: 'a'; ValueError: b",
        ),
        (Outcome.RETURNED, None, ""),
        (Outcome.RETRY, RetryException("busy"), ""),
    ],
)
def test_a_dead_letter_is_described_by_its_error(outcome, error, description):
    assert decided(named("f"), outcome, error=error).description == description


class BrokenError(Exception):
    def __str__(self):
        raise KeyError("no text")


@pytest.mark.parametrize(
    "error",
    [ValueError("x" * 100_000), BrokenError(), ValueError(), ValueError("\ud800"), ValueError("a\x00b"), SystemExit(3)],
    ids=["long", "broken", "empty", "lone surrogate", "zero", "SystemExit"],
)
def test_any_error_can_be_described_dead_lettered_and_passed_on(error):
    task = named("f", on_failure=named("g", takes_result=True))
    settlement = decided(task, Outcome.FAILED, error=raised(error))
    assert type(error).__name__ in settlement.description
    assert len(settlement.description.encode("utf-8")) <= boilermaker.MAX_DESCRIPTION_LENGTH
    follow_up = settlement.follow_ups[0].task
    assert decode(encode(follow_up, "q", "q"), "q").args[0]["error"] == type(error).__name__


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Do.COMPLETE, Do.DEAD_LETTER),
        (Do.DEAD_LETTER, Do.DEAD_LETTER),
        (Do.LEAVE, Do.LEAVE),
        (Do.KEEP, Do.KEEP),
    ],
)
def test_a_follow_up_that_can_never_be_published_dead_letters_its_parent_with_the_cause(before, after):
    settlement = boilermaker.Settlement(delivered(named("f")), before, messages=["too large"])
    instead = boilermaker.rejected(settlement, MessageTooLarge("300000 bytes"), "tasks")
    assert (instead.action, instead.reason, list(instead.messages)) == (after, "FollowUpRejected", [])
    assert "300000 bytes" in instead.description


def test_what_cannot_be_followed_after_the_function_has_returned_does_not_run_again():
    task = named("f")
    task.on_success = "no task"  # set by the function itself, on its current task
    message = delivered(named("f"))
    settlement = decide(Run(message, task, None, Outcome.RETURNED), "tasks")
    task.acks_late = True
    settlement = decide(Run(message, task, None, Outcome.RETURNED), "tasks")
    assert (settlement.action, settlement.reason) == (Do.DEAD_LETTER, "FollowUpRejected")
    assert "'no task'" in settlement.description


def test_a_returned_task_takes_over():
    task = task_with_callbacks()
    [follow_up] = decided(task, Outcome.RETURNED, named("other")).follow_ups
    assert names_along(follow_up.task) == ["other", "on_success"]
    assert follow_up.task.on_failure.function_name == "on_failure"
    assert follow_up.message_id == root_of(delivered(task), "tasks")


def test_what_follows_the_returner_follows_at_the_end_of_the_returned_chain():
    first, second = named("first"), named("second", on_failure=named("own"))
    first >> second
    head = follow_up_of(task_with_callbacks(), Outcome.RETURNED, first)
    assert names_along(head) == ["first", "second", "on_success"]
    assert (head.on_failure.function_name, head.on_success.on_failure.function_name) == ("on_failure", "own")
    assert head.on_success.on_success.on_failure is None


def test_a_returned_task_is_left_as_it_was():
    returned = named("other")
    decided(task_with_callbacks(), Outcome.RETURNED, returned)
    assert (returned.on_success, returned.on_failure) == (None, None)


def test_a_task_that_returns_a_task_without_callbacks_of_its_own_adds_none():
    head = follow_up_of(named("f"), Outcome.RETURNED, named("other"))
    assert (head.function_name, head.on_success, head.on_failure) == ("other", None, None)


async def test_a_returned_task_that_was_published_already_is_not_published_again():
    async with app_with_pages() as app:
        published = await app.apply_async(parse_page)
        assert follow_up_of(task_with_callbacks(), Outcome.RETURNED, published).function_name == "on_success"


def test_success_and_failure_share_one_id_so_that_only_one_of_them_is_enqueued():
    task = task_with_callbacks()
    ids = {decided(task, outcome).follow_ups[0].message_id for outcome in (Outcome.RETURNED, Outcome.FAILED)}
    assert ids == {root_of(delivered(task), "tasks")}


@pytest.mark.parametrize("change", [{"sequence_number": 8}, {"message_id": "n"}, {"message_id": "m:1"}], ids=str)
def test_no_two_tasks_share_a_root(change):
    task = task_with_callbacks()
    assert root_of(delivered(task, **change), "tasks") != root_of(delivered(task), "tasks")
    assert root_of(delivered(task), "tasks") != root_of(delivered(task), "other")


def test_a_root_stays_the_same_over_deliveries_and_in_every_process():
    task = named("f")
    code = """
        from boilermaker import Delivery, root_of
        print(root_of(Delivery(7, 0, "m", "", {}, 0), "tasks"))
    """
    assert fresh_python(code) == root_of(delivered(task, delivery_count=5), "tasks")


def test_whichever_try_ends_a_task_its_continuation_has_the_id_of_the_root():
    task = task_with_callbacks(policy=RetryPolicy(max_tries=9))
    root = root_of(delivered(task), "tasks")
    for attempt in range(1, 5):
        [retry] = decided(task, Outcome.RETRY, error=RetryException("x"), sequence_number=6 + attempt).follow_ups
        assert (retry.message_id, retry.task.root) == (f"{root}:{attempt}", root)
        task = retry.task
    for outcome in (Outcome.RETURNED, Outcome.FAILED, Outcome.EXHAUSTED):
        assert decided(task, outcome, sequence_number=99).follow_ups[0].message_id == root


def test_a_copy_of_a_retry_is_new_work_with_a_root_of_its_own():
    again = retried(named("f"), RetryException("x", RetryPolicy(max_tries=9)))
    assert (again.copy().root, again.copy().retry_policy) == (None, None)


def dead_letter_of(body, queue="tasks"):
    text, raw_body = boilermaker.text_of(body)
    nothing = dict.fromkeys(("enqueued_time_utc", "scheduled_enqueue_time_utc", "dead_letter_error_description"))
    return boilermaker.Message(
        **nothing,
        body=text,
        raw_body=raw_body,
        message_id="m",
        sequence_number=7,
        delivery_count=1,
        dead_letter_reason="TaskFailed",
        application_properties={"traceparent": "00-1"},
        queue_name=f"{queue}/$DeadLetterQueue",
    )


@pytest.mark.parametrize("number", range(20))
def test_an_id_that_is_derived_is_the_uuid_of_version_5(number):
    namespace = uuid.UUID("5f6a1c1e-7b5c-5a53-9d0c-6d1f2f3c7b10")
    text = f"tasks\n{number}\n\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert boilermaker.derived_id(text) == str(uuid.uuid5(namespace, text))


BODIES_LEFT_AS_THEY_ARE = [
    b"\xff\x00 no text",
    "no task",
    body_with(payload={"args": ["\u00e9"], "kwargs": {}}, of_a_later_version=[1]),
    ' { "task_id" : "a",\n "function_name" : "f" } ',
]


@pytest.mark.parametrize("body", BODIES_LEFT_AS_THEY_ARE, ids=repr)
def test_a_replay_leaves_a_body_as_it_is_where_nothing_counts_its_tries(body):
    replay = boilermaker.replay_of(dead_letter_of(body))
    assert (replay.body, replay.queue, replay.application_properties) == (body, "tasks", {"traceparent": "00-1"})


def test_what_is_no_text_is_no_task_whatever_it_looks_like():
    body = body_with(payload={"args": ["x"], "kwargs": {}}).encode().replace(b'"x"', b'"\xff"')
    message = dead_letter_of(body)
    assert (message.task, message.raw_body) == (None, body)
    assert boilermaker.replay_of(message).body == body


def test_a_replay_has_all_its_tries_and_else_all_that_the_dead_letter_had():
    policy, own = RetryPolicy(max_tries=2, delay=1), RetryPolicy(max_tries=9, delay=5)
    task = named("f", policy=policy, retry_policy=own, attempts=tried(4), root="root", on_failure=named("g"))
    document = json.loads(encode(task, "tasks", "tasks"))
    document["later"] = document["on_failure"]["later"] = {"kept": 1}
    replay = boilermaker.replay_of(dead_letter_of(json.dumps(document)))
    again = json.loads(replay.body)
    assert (again["attempts"]["attempts"], "root" in again, again["policy"]["max_tries"]) == (0, False, 2)
    assert again["later"] == again["on_failure"]["later"] == {"kept": 1}
    changed = {"attempts", "root", "policy", "scheduled_policy"}
    assert {k: v for k, v in again.items() if k not in changed} == {
        k: v for k, v in document.items() if k not in changed
    }
    decoded = decode(replay.body, "tasks")
    assert (decoded.policy, decoded.retry_policy, decoded.root) == (policy, None, None)
    assert replay.function_name == "f"


def test_a_chain_as_deep_as_can_be_is_replayed():
    head = chain_of(boilermaker.MAX_WORKFLOW_DEPTH)
    head.attempts, head.root = tried(1), "root"
    again = decode(boilermaker.replay_of(dead_letter_of(encode(head, "tasks", "tasks"))).body, "tasks")
    assert again.attempts.attempts == 0
    assert len(names_along(again)) == boilermaker.MAX_WORKFLOW_DEPTH


# ======================================================================================================================
# 9. Azure bus: what needs no network
# ======================================================================================================================

NAMESPACE = "example.servicebus.windows.net"
CONNECTION_STRING = f"Endpoint=sb://{NAMESPACE}/;SharedAccessKeyName=Root;SharedAccessKey=c2VjcmV0LWtleQ=="

AZURE_SETTINGS = {
    "SERVICE_BUS_NAMESPACE_URL": "service_bus_namespace_url",
    "SERVICEBUS_FULLY_QUALIFIED_NAMESPACE": "service_bus_namespace_url",
    "SERVICE_BUS_QUEUE_NAME": "service_bus_queue_name",
    "SERVICEBUS_QUEUE_NAME": "service_bus_queue_name",
    "SERVICEBUS_CONNECTION_STRING": "service_bus_connection_string",
}


@pytest.fixture
def azure_settings(monkeypatch):
    """Sets environment variables, in an environment that has none of ours."""
    for name in (*AZURE_SETTINGS, "AZURE_CREDENTIAL_INCLUDE_MSI"):
        monkeypatch.delenv(name, raising=False)
    return lambda **settings: [monkeypatch.setenv(name, value) for name, value in settings.items()]


@pytest.mark.parametrize(("name", "attribute"), AZURE_SETTINGS.items())
def test_a_setting_is_read_from_the_environment(azure_settings, name, attribute):
    given = (
        {"service_bus_queue_name": "given"} if "queue" not in attribute else {"service_bus_namespace_url": NAMESPACE}
    )
    azure_settings(**{name: "from-environment"})
    assert getattr(Config(**given), attribute) == "from-environment"


@pytest.mark.parametrize(("name", "attribute"), AZURE_SETTINGS.items())
def test_an_argument_wins_over_the_environment(azure_settings, name, attribute):
    azure_settings(**{name: "from-environment"})
    given = {"service_bus_namespace_url": NAMESPACE, "service_bus_queue_name": "q", attribute: "given"}
    assert getattr(Config(**given), attribute) == "given"


def test_a_given_namespace_wins_over_a_connection_string_of_the_environment(azure_settings):
    azure_settings(SERVICEBUS_CONNECTION_STRING=CONNECTION_STRING)
    config = Config(service_bus_namespace_url="mine.servicebus.windows.net", service_bus_queue_name="q")
    assert AzureServiceBus.from_config(config).namespace == "mine.servicebus.windows.net"


def test_the_names_of_the_original_win_over_those_of_the_sdk(azure_settings):
    azure_settings(SERVICE_BUS_NAMESPACE_URL="a.example", SERVICEBUS_FULLY_QUALIFIED_NAMESPACE="b.example")
    azure_settings(SERVICE_BUS_QUEUE_NAME="a", SERVICEBUS_QUEUE_NAME="b")
    config = Config()
    assert (config.service_bus_namespace_url, config.service_bus_queue_name) == ("a.example", "a")


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on", "false", "False", "0", "no", "off", ""])
def test_managed_identity_is_switched_by_the_environment(azure_settings, value):
    azure_settings(AZURE_CREDENTIAL_INCLUDE_MSI=value)
    config = Config(service_bus_namespace_url=NAMESPACE, service_bus_queue_name="q")
    assert config.azure_credential_include_msi is (value.lower() in ("true", "1", "yes", "on"))


def test_managed_identity_as_an_argument_wins_over_the_environment(azure_settings):
    azure_settings(AZURE_CREDENTIAL_INCLUDE_MSI="true")
    config = Config(service_bus_namespace_url=NAMESPACE, service_bus_queue_name="q", azure_credential_include_msi=False)
    assert config.azure_credential_include_msi is False


def test_managed_identity_switched_by_something_else_is_an_error_that_names_it(azure_settings):
    azure_settings(AZURE_CREDENTIAL_INCLUDE_MSI="maybe")
    with pytest.raises(ConfigurationError, match="AZURE_CREDENTIAL_INCLUDE_MSI='maybe'"):
        Config(service_bus_namespace_url=NAMESPACE, service_bus_queue_name="q")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {"service_bus_queue_name": "q"},
            ["SERVICE_BUS_NAMESPACE_URL", "SERVICEBUS_FULLY_QUALIFIED_NAMESPACE", "SERVICEBUS_CONNECTION_STRING"],
        ),
        ({"service_bus_namespace_url": NAMESPACE}, ["SERVICE_BUS_QUEUE_NAME", "SERVICEBUS_QUEUE_NAME"]),
        ({"service_bus_connection_string": CONNECTION_STRING}, ["SERVICE_BUS_QUEUE_NAME"]),
        ({}, ["SERVICE_BUS_NAMESPACE_URL"]),
    ],
)
def test_a_setting_that_is_missing_is_named(azure_settings, given, names):
    azure_settings()
    with pytest.raises(ConfigurationError) as caught:
        Config(**given)
    assert [name for name in names if name not in str(caught.value)] == []


def test_the_queue_can_stand_in_the_connection_string(azure_settings):
    azure_settings(SERVICEBUS_CONNECTION_STRING=CONNECTION_STRING + ";EntityPath=orders")
    bus = AzureServiceBus.from_config(Config())
    assert (bus.namespace, bus.queue_name) == (NAMESPACE, "orders")


@pytest.mark.parametrize(
    "made",
    [
        lambda: Config(service_bus_connection_string=CONNECTION_STRING, service_bus_queue_name="q"),
        lambda: Config(
            service_bus_namespace_url=NAMESPACE, service_bus_queue_name="q", service_bus_credential=CONNECTION_STRING
        ),
        lambda: AzureServiceBus.from_connection_string(CONNECTION_STRING, "q"),
        lambda: AzureServiceBus(NAMESPACE, "q", CONNECTION_STRING),
    ],
    ids=["connection string", "credential", "bus of a connection string", "bus of a credential"],
)
def test_no_secret_is_shown(azure_settings, made):
    azure_settings()
    shown = repr(made())
    assert "SharedAccessKey" not in shown
    assert "c2VjcmV0" not in shown


@pytest.mark.parametrize(
    "secret", [CONNECTION_STRING, f"Endpoint=sb://{NAMESPACE}/;SharedAccessSignature=sig=c2VjcmV0", "Key=c2VjcmV0"]
)
def test_a_connection_string_given_for_a_namespace_is_an_error_that_does_not_show_it(secret):
    with pytest.raises(ConfigurationError) as caught:
        AzureServiceBus(secret, "q")
    assert "c2VjcmV0" not in str(caught.value)
    assert "from_connection_string" in str(caught.value)


def test_a_connection_string_given_to_the_config_for_a_namespace_is_not_shown(azure_settings):
    azure_settings(SERVICE_BUS_NAMESPACE_URL=CONNECTION_STRING, SERVICE_BUS_QUEUE_NAME="q")
    try:
        shown = repr(Config())
    except ConfigurationError as error:
        shown = str(error)
    assert "c2VjcmV0" not in shown


@pytest.mark.parametrize(
    "url",
    [
        NAMESPACE,
        f"sb://{NAMESPACE}",
        f"sb://{NAMESPACE}/",
        f"https://{NAMESPACE}",
        f"https://{NAMESPACE}/",
        f"https://{NAMESPACE}:443/",
        f"HTTPS://{NAMESPACE}:443/",
        f"amqps://{NAMESPACE}:5671",
        f" {NAMESPACE}\n",
    ],
)
def test_every_way_to_write_a_namespace_is_the_same(url):
    bus = AzureServiceBus(url, "orders")
    assert (bus.namespace, bus.queue_name) == (NAMESPACE, "orders")
    assert repr(bus) == f"AzureServiceBus('{NAMESPACE}', 'orders')"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("my_bus:5672", "my_bus"),
        ("sb://under_score.example/", "under_score.example"),
        ("[::1]:5672", "[::1]"),
        ("amqp://[FE80::1]", "[FE80::1]"),
    ],
)
def test_a_host_may_be_one_of_a_compose_file_or_an_address(url, host):
    assert AzureServiceBus(url, "orders").namespace == host
    bus = AzureServiceBus.from_connection_string(f"Endpoint={url};SharedAccessKeyName=Root;SharedAccessKey=k", "orders")
    assert bus.namespace == host


@pytest.mark.parametrize(
    "endpoint", ["Endpoint=sb://b_us.example", "HostName=b_us.example", "hostname=sb://b_us.example/"]
)
async def test_the_host_of_a_connection_string_may_be_given_by_either_name(endpoint):
    bus = AzureServiceBus.from_connection_string(f"{endpoint};SharedAccessKeyName=Root;SharedAccessKey=k;", "orders")
    assert bus.namespace == bus.sender_link("orders").sdk.fully_qualified_namespace == "b_us.example"
    await bus.close()


@pytest.mark.parametrize(
    "url", [None, "", " ", 3, "https://", "two words", "a/b", "https://a.example/path", b"a.example"]
)
def test_a_namespace_that_is_no_host_is_an_error_that_shows_one(url):
    with pytest.raises(ConfigurationError, match=r"namespace .*example\.servicebus\.windows\.net"):
        AzureServiceBus(url, "orders")


@pytest.mark.parametrize("name", [None, "", " ", "a b", "-a", "a/", "a?b", "ü" * 3, "aü9", "a_", "a~b", "x" * 261, 3])
@pytest.mark.parametrize(
    "make", [lambda name: AzureServiceBus(NAMESPACE, name), lambda name: LocalServiceBus(":memory:", name)]
)
def test_a_queue_name_that_service_bus_would_not_take_is_an_error_that_shows_it(make, name):
    with pytest.raises(ConfigurationError, match=re.escape(repr(name)[:8])):
        make(name)


@pytest.mark.parametrize("name", ["q", "Orders-2.new_ones", "team/orders", "x" * 260, "9"])
def test_a_queue_name_that_service_bus_takes_is_taken(name):
    assert AzureServiceBus(NAMESPACE, name).queue_name == name


@pytest.mark.parametrize("limit", [0, -1, None, "1", True, 0.5, 1e6, float("nan")])
def test_a_size_limit_that_is_none_is_an_error_that_shows_it(limit):
    with pytest.raises(ConfigurationError, match=rf"max_message_bytes={limit!r} "):
        AzureServiceBus(NAMESPACE, "q", max_message_bytes=limit)


@pytest.mark.parametrize("name", ["max_delivery_count", "duplicate_detection", "time_to_live", "lock_duration"])
@pytest.mark.parametrize("value", [0, -1, "1", True, float("nan")])
def test_a_setting_of_the_local_bus_that_cannot_be_is_an_error_that_shows_it(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name}={value!r} "):
        LocalServiceBus(**{name: value})


def test_deliveries_are_counted_in_whole_numbers():
    with pytest.raises(ConfigurationError, match=r"max_delivery_count=0\.5 "):
        LocalServiceBus(max_delivery_count=0.5)


@pytest.mark.parametrize("path", ["", b"tasks.db", None, 3], ids=repr)
def test_a_path_that_cannot_be_is_an_error_that_shows_it(path):
    with pytest.raises(ConfigurationError, match=re.escape(f"path={path!r} ")):
        LocalServiceBus(path)


def test_a_bus_is_made_of_a_connection_string():
    bus = AzureServiceBus.from_connection_string(CONNECTION_STRING, "orders", max_message_bytes=1_000_000)
    assert (bus.namespace, bus.queue_name, bus.max_message_bytes) == (NAMESPACE, "orders", 1_000_000)


@pytest.mark.parametrize("text", [None, "", "hello", "SharedAccessKey=x", "Endpoint=;SharedAccessKey=x"])
def test_a_connection_string_without_an_endpoint_is_an_error_that_says_so(text):
    with pytest.raises(ConfigurationError, match="Endpoint"):
        AzureServiceBus.from_connection_string(text, "orders")


async def test_a_connection_string_without_a_key_is_an_error_that_says_so():
    bus = AzureServiceBus.from_connection_string(f"Endpoint=sb://{NAMESPACE}/", "orders")
    with pytest.raises(ConfigurationError, match="SharedAccessKey"):
        await bus.peek()
    await bus.close()


def test_a_given_credential_is_the_credential_of_the_config(azure_settings):
    azure_settings()
    credential = object()
    config = Config(service_bus_namespace_url=NAMESPACE, service_bus_queue_name="q", service_bus_credential=credential)
    assert config.az_credential() is credential


class CredentialOfOnesOwn:
    def get_token(self, *scopes, **options): ...


@pytest.mark.parametrize("given", [CredentialOfOnesOwn, lambda: CredentialOfOnesOwn()], ids=["class", "function"])
def test_a_credential_may_be_given_as_what_makes_it(azure_settings, given):
    azure_settings()
    config = Config(service_bus_namespace_url=NAMESPACE, service_bus_queue_name="q", service_bus_credential=given)
    assert isinstance(config.az_credential(), CredentialOfOnesOwn)
    assert isinstance(boilermaker._made_credential(given), CredentialOfOnesOwn)


def test_a_connection_string_of_another_queue_is_an_error_that_names_both():
    with pytest.raises(ConfigurationError, match=r"'orders'.*EntityPath.*'tasks'"):
        AzureServiceBus.from_connection_string(f"{CONNECTION_STRING};EntityPath=orders", "tasks")


async def test_a_connection_string_of_a_queue_is_for_its_dead_letter_queue_too():
    for queue in ("orders", "orders/$DeadLetterQueue"):
        bus = AzureServiceBus.from_connection_string(f"{CONNECTION_STRING};EntityPath=orders", queue)
        assert (bus.entity_path, bus.queue_name) == ("orders", queue)
        bus.check_queue("orders")
        bus.check_queue("orders/$DeadLetterQueue")
        assert bus.receiver_link().sdk.entity_path.startswith("orders")
        with pytest.raises(UsageError, match=r"'mail'.*'orders' only \(EntityPath\)"):
            bus.check_queue("mail")
        await bus.close()


def test_a_bus_without_an_entity_path_sends_to_any_queue():
    bus = AzureServiceBus(NAMESPACE, "orders")
    assert bus.entity_path is None
    bus.check_queue("mail")


def test_what_the_queue_was_made_with_is_said_to_every_kind_of_bus(azure_settings):
    azure_settings(SERVICEBUS_CONNECTION_STRING=CONNECTION_STRING, SERVICE_BUS_QUEUE_NAME="q")
    options = {"max_message_bytes": 1_000_000, "duplicate_detection": 0, "max_delivery_count": 3}
    for bus in (
        AzureServiceBus(NAMESPACE, "q", **options),
        AzureServiceBus.from_config(Config(), **options),
        AzureServiceBus.from_config(Config(service_bus_namespace_url=NAMESPACE), **options),
        AzureServiceBus.from_connection_string(CONNECTION_STRING, "q", **options),
    ):
        assert {name: getattr(bus, name) for name in options} == options
    bus = AzureServiceBus(NAMESPACE, "q")
    assert (bus.duplicate_detection, bus.max_delivery_count) == (600, 10)


@pytest.mark.parametrize(
    "option", [{"duplicate_detection": -1}, {"max_delivery_count": 0}, {"max_delivery_count": 1.5}]
)
def test_what_a_queue_cannot_be_made_with_is_an_error_that_shows_it(option):
    [(name, value)] = option.items()
    with pytest.raises(ConfigurationError, match=re.escape(f"{name}={value!r} ")):
        AzureServiceBus(NAMESPACE, "q", **option)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: AzureServiceBus(NAMESPACE, "q", CredentialOfOnesOwn, **options),
        lambda **options: AzureServiceBus.from_connection_string(CONNECTION_STRING, "q", **options),
        lambda **options: AzureServiceBus.from_config(
            Config(service_bus_connection_string=CONNECTION_STRING, service_bus_queue_name="q"), **options
        ),
    ],
    ids=["namespace", "connection string", "config"],
)
class TestClientOptions:
    async def test_reach_the_client_of_the_sdk(self, make):
        from azure.servicebus import TransportType

        options = {"transport_type": TransportType.AmqpOverWebsocket, "user_agent": "tests", "connection_verify": "ca"}
        bus = make(**options)
        client = bus._of_this_loop().client
        assert {name: getattr(client._config, name) for name in options} == options
        assert (client._config.retry_total, client._config.try_timeout) == (0, boilermaker.ATTEMPT_TIMEOUT)
        await bus.close()

    @pytest.mark.parametrize("option", ["transport", "retry_total", "try_timeout", "max_messages_bytes"])
    def test_that_are_none_are_an_error_that_names_them(self, make, option):
        with pytest.raises(ConfigurationError, match=rf"no option {option}=; .*transport_type"):
            make(**{option: 1})

    async def test_with_a_value_that_cannot_be_are_an_error_that_says_so(self, make):
        bus = make(transport_type="websocket")
        with pytest.raises(
            ConfigurationError, match=r"options,? cannot be read: 'str' object has no attribute 'value'"
        ):
            await bus.peek()


@pytest.mark.parametrize(
    ("version", "works"), [("7.14.3", False), ("6.99", False), ("7.15.0", True), ("8.0.0b1", True)]
)
def test_an_sdk_that_is_too_old_is_refused_by_its_version(monkeypatch, version, works):
    monkeypatch.setattr("azure.servicebus.__version__", version)
    if works:
        AzureServiceBus(NAMESPACE, "q")
        return
    with pytest.raises(ConfigurationError, match=rf"{version} is too old: pip install 'azure-servicebus>=7\.15'"):
        AzureServiceBus(NAMESPACE, "q")


def test_the_azure_bus_without_the_sdk_is_an_error_that_says_what_to_install():
    assert "pip install azure-servicebus azure-identity" in fresh_python(
        f"""
        import boilermaker
        try:
            boilermaker.AzureServiceBus("{NAMESPACE}", "q")
        except boilermaker.ConfigurationError as error:
            print(error)
        """,
        "-S",
    )


# ======================================================================================================================
# 11. Schedules
# ======================================================================================================================

SECOND, MINUTE, HOUR, DAY = (datetime.timedelta(**{unit: 1}) for unit in ("seconds", "minutes", "hours", "days"))
WINDOW = 10 * MINUTE
Cron, Every = boilermaker.Cron, boilermaker.Every


def utc(text):
    """A moment, as "2026-11-25 04:00", in UTC."""
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)


def next_of(when, moment, count=3):
    return list(itertools.islice(when.after(utc(moment)), count))


@pytest.mark.parametrize(
    ("interval", "moment", "expected"),
    [
        (SECOND, "2026-11-25 04:00", ["04:00:01", "04:00:02", "04:00:03"]),
        (SECOND, "2026-11-25 03:59:59.999999", ["04:00:00", "04:00:01", "04:00:02"]),
        (5 * MINUTE, "2026-11-25 03:59:59", ["04:00:00", "04:05:00", "04:10:00"]),
        (5 * MINUTE, "2026-11-25 04:00", ["04:05:00", "04:10:00", "04:15:00"]),
        (1.5 * SECOND, "2026-11-25 04:00:01", ["04:00:01.500000", "04:00:03", "04:00:04.500000"]),
        (7 * HOUR, "2026-11-25 00:00", ["03:00:00", "10:00:00", "17:00:00"]),
    ],
    ids=str,
)
def test_an_interval_is_counted_from_the_epoch_whoever_asks_when(interval, moment, expected):
    assert next_of(Every(interval), moment) == [utc(f"2026-11-25 {time}") for time in expected]


def test_an_interval_of_days_and_weeks_has_the_days_of_the_epoch():
    assert next_of(Every(DAY), "2026-11-25 04:00", 1) == [utc("2026-11-26")]
    assert next_of(Every(7 * DAY), "2026-11-25 04:00", 1) == [utc("2026-11-26")]  # 1970 began with a Thursday too


@pytest.mark.parametrize(
    ("expression", "zone", "moment", "expected"),
    [
        ("0 4 * * *", "UTC", "2026-11-25 03:59:59.5", ["2026-11-25 04:00", "2026-11-26 04:00", "2026-11-27 04:00"]),
        ("0 4 * * *", "UTC", "2026-11-25 04:00", ["2026-11-26 04:00", "2026-11-27 04:00", "2026-11-28 04:00"]),
        ("0 4 * * *", "Europe/Berlin", "2026-11-25 04:00", ["2026-11-26 03:00", "2026-11-27 03:00"]),
        ("*/20 9-10 * * 1-5", "UTC", "2026-11-27 10:30", ["2026-11-27 10:40", "2026-11-30 09:00", "2026-11-30 09:20"]),
        ("0 0 29 2 *", "UTC", "2026-01-01", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        ("0 0 1,15 * fri", "UTC", "2026-05-01", ["2026-05-08", "2026-05-15", "2026-05-22"]),  # either day
        ("0 0 * jan,jul mon#1", "UTC", "2026-01-01", ["2026-01-05", "2026-07-06"]),
    ],
)
def test_a_cron_expression_has_the_times_of_debians_cron(expression, zone, moment, expected):
    assert next_of(Cron(expression, zone), moment, len(expected)) == [utc(text) for text in expected]


CHANGES_OF_CLOCKS = {  # (zone, a day around the change, in UTC, the time that is skipped or shown twice)
    "Berlin, forward": ("Europe/Berlin", "2026-03-28 12:00", (2, 30)),
    "Berlin, back": ("Europe/Berlin", "2026-10-24 12:00", (2, 30)),
    "New York, forward": ("America/New_York", "2026-03-07 18:00", (2, 30)),
    "New York, back": ("America/New_York", "2026-10-31 18:00", (1, 30)),
    "Lord Howe, forward": ("Australia/Lord_Howe", "2026-10-03 02:00", (2, 15)),  # by half an hour
    "Lord Howe, back": ("Australia/Lord_Howe", "2026-04-04 02:00", (1, 45)),
}


def local_minutes(zone, start, days=2):
    """What the clocks of a zone show, minute by minute, with the moments at which they do."""
    for n in range(int(days * DAY / MINUTE)):
        moment = utc(start) + n * MINUTE
        yield moment.astimezone(zoneinfo.ZoneInfo(zone)), moment


def daily(zone, start, hour, minute):
    """The first moment of each day at which clocks show a time, or, where they skip it, the next that they show."""
    found = {}
    for local, moment in local_minutes(zone, start):
        if (local.hour, local.minute) >= (hour, minute):
            found.setdefault(local.date(), moment)
    return [moment for moment in found.values() if moment > utc(start)]


@pytest.mark.parametrize(("zone", "start", "time"), CHANGES_OF_CLOCKS.values(), ids=CHANGES_OF_CLOCKS)
def test_the_days_of_the_table_have_a_change_of_clocks_at_that_time(zone, start, time):
    shown = [local for local, _ in local_minutes(zone, start) if (local.hour, local.minute) == time]
    days = {local.date() for local, _ in local_minutes(zone, start, 1.9)}
    assert len(shown) != len(days) - (next(local_minutes(zone, start))[0].time() > datetime.time(*time))


@pytest.mark.parametrize(("zone", "start", "time"), CHANGES_OF_CLOCKS.values(), ids=CHANGES_OF_CLOCKS)
@pytest.mark.parametrize("at", ["2:30", "that", "hourly", "half-hourly", "half-hourly, by a step"])
def test_at_a_change_of_clocks_each_time_comes_once_and_none_is_missed(zone, start, time, at):
    if at in ("2:30", "that"):
        hour, minute = (2, 30) if at == "2:30" else time
        expression, expected = f"{minute} {hour} * * *", daily(zone, start, hour, minute)
        assert len(expected) == 2
    else:
        minutes = {0} if at == "hourly" else {0, 30}
        expression = {"hourly": "0 * * * *", "half-hourly": "0,30 * * * *"}.get(at, "*/30 * * * *")
        expected = [moment for local, moment in local_minutes(zone, start) if local.minute in minutes]
        expected = [moment for moment in expected if moment > utc(start)]
    when, end = Cron(expression, zone), utc(start) + 2 * DAY - SECOND
    assert list(itertools.takewhile(end.__ge__, when.after(utc(start)))) == expected
    for minute in range(0, 2 * 24 * 60, 7):  # and to whoever asks at another moment
        moment = utc(start) + minute * MINUTE
        assert next(when.after(moment)) == next((tick for tick in expected if tick > moment), next(when.after(end)))


WRONG_TIMES_OF_SCHEDULES = {
    "both": ({"cron": "0 4 * * *", "every": HOUR}, "Both .* choose one"),
    "four fields": ({"cron": "0 4 * *"}, "'0 4 \\* \\*' must have five fields"),
    "six fields": ({"cron": "0 0 4 * * *"}, "five fields.*every=timedelta"),
    "no field": ({"cron": ""}, "five fields"),
    "no text": ({"cron": 4}, "cron=4 must have five fields"),
    "a name": ({"cron": "@daily"}, "five fields"),
    "minute 60": ({"cron": "60 4 * * *"}, "'60 4 .* is no cron expression.*minute"),
    "an odd one": ({"cron": "* * * * 1#6"}, "is no cron expression.*day-of-week"),
    "never, says one way": ({"cron": "0 0 30 2 *"}, "never comes"),
    "never, says another": ({"cron": "* * */20 * 1L"}, "never comes"),
    "no zone": ({"cron": "0 4 * * *", "timezone": "Europe/Colditz"}, "'Europe/Colditz' is not known.*tzdata"),
    "a folder of zones": ({"cron": "0 4 * * *", "timezone": "Europe"}, "'Europe' is not known"),
    "a path": ({"cron": "0 4 * * *", "timezone": "../zone"}, "'../zone' is not known"),
    "no name of a zone": ({"cron": "0 4 * * *", "timezone": datetime.UTC}, "is not known here: give a name"),
    "a zone for an interval": (
        {"every": HOUR, "timezone": "Europe/Berlin"},
        "timezone='Europe/Berlin' goes with cron=",
    ),
    "half a second": ({"every": SECOND / 2}, "at least a second"),
    "backwards": ({"every": -HOUR}, "at least a second"),
    "for ever": ({"every": datetime.timedelta.max}, "at most 2147483647"),
    "a number": ({"every": 300}, "every=300 must be a timedelta"),
}


@pytest.mark.parametrize(("times", "says"), WRONG_TIMES_OF_SCHEDULES.values(), ids=WRONG_TIMES_OF_SCHEDULES)
def test_times_that_make_no_sense_are_an_error_where_they_are_declared(times, says):
    app = app_with_pages()
    with pytest.raises(UsageError, match=says):
        app.schedule(parse_page, **times)
    with pytest.raises(UsageError, match=says):
        app.task(**times)
    assert dict(app.schedules) == {}


def test_without_cronsim_an_expression_is_an_error_that_says_what_to_install_and_an_interval_none():
    code = """
        import datetime
        from boilermaker import Boilermaker, ConfigurationError, LocalServiceBus
        app = Boilermaker(None, LocalServiceBus())

        @app.task(every=datetime.timedelta(hours=1))
        async def tidy(state): ...

        try:
            app.schedule(tidy, cron="0 4 * * *", name="daily")
        except ConfigurationError as error:
            print(*app.schedules, error)
    """
    assert fresh_python(code, "-S") == "tidy cron='0 4 * * *' needs a package: pip install cronsim."


def test_a_time_zone_without_time_zone_data_is_utc_or_an_error_that_says_what_to_install():
    code = """
        import zoneinfo
        zoneinfo.reset_tzpath([])
        from boilermaker import _time_zone
        try:
            print(_time_zone("UTC"), _time_zone("Europe/Berlin"))
        except ValueError as error:
            print(_time_zone("UTC"), error)
    """
    assert re.match(r"UTC timezone='Europe/Berlin' is not known .* pip install tzdata", fresh_python(code, "-S"))


def test_a_schedule_tells_its_next_times_in_its_time_zone():
    app = app_with_pages()
    daily = app.schedule(parse_page, cron="0 4 * * *", timezone="Europe/Berlin")
    hourly = app.schedule(store_rows, every=HOUR, name="hourly")
    [first, second] = daily.next_times(2, utc("2026-10-24 12:00"))
    assert [first.isoformat(), second.isoformat()] == ["2026-10-25T04:00:00+01:00", "2026-10-26T04:00:00+01:00"]
    assert hourly.next_times(1, first) == [first.astimezone(datetime.UTC) + HOUR]
    assert datetime.timedelta(0) < hourly.next_times(1)[0] - datetime.datetime.now(datetime.UTC) <= HOUR
    assert {name: str(each.when) for name, each in app.schedules.items()} == {
        "parse_page": "cron '0 4 * * *' Europe/Berlin",
        "hourly": "every 1:00:00",
    }


def test_a_ticks_id_is_its_schedule_and_its_time_in_utc_whatever_the_zone():
    berlin = utc("2026-11-25 03:00").astimezone(zoneinfo.ZoneInfo("Europe/Berlin"))
    assert boilermaker.tick_id("daily", berlin) == "cron:daily:2026-11-25T03:00:00+00:00"


@pytest.mark.parametrize("length", [96, 97, 98, 1000])
def test_a_ticks_id_is_short_enough_however_long_its_schedules_name(length):
    moment = utc("2026-11-25 03:00")
    names = ["x" * length, "x" * (length - 1) + "y"]
    ids = {boilermaker.tick_id(name, moment) for name in names} | {boilermaker.tick_id(names[0], moment + HOUR)}
    assert len(ids) == 3
    assert all(len(message_id) <= 128 and message_id.startswith("cron:") for message_id in ids)
    assert all(message_id[-25:] in ("2026-11-25T03:00:00+00:00", "2026-11-25T04:00:00+00:00") for message_id in ids)
    assert any("xxx" in message_id for message_id in ids) == (length < 98)


def test_a_tick_is_the_workflow_as_new_work_under_the_ticks_own_id():
    app = app_with_pages()
    workflow = app.create_task(fetch_page, "x", policy=NoRetry()) | app.create_task(store_rows)
    schedule = app.schedule(workflow, every=HOUR, name="pages")
    first, again, next_one = (schedule.tick(utc(f"2026-11-25 0{hour}:00")) for hour in (3, 3, 4))
    assert (first.task_id, again.task_id) == ("cron:pages:2026-11-25T03:00:00+00:00",) * 2
    assert next_one.task_id == "cron:pages:2026-11-25T04:00:00+00:00"
    assert names_along(first) == ["fetch_page", "store_rows"]
    assert (first.args, first.policy) == (["x"], NoRetry())
    assert len({task.on_success.task_id for task in (first, again, next_one, workflow)}) == 4
    workflow.args.append("changed after that")
    assert schedule.tick(utc("2026-11-25 03:00")).args == ["x"]


NOW = "2026-11-25 04:00:30"


@pytest.mark.parametrize(
    ("when", "published", "expected"),
    [  # the window is ten minutes: five ahead, two and a half behind
        (Every(MINUTE), NOW, ["04:01", "04:02", "04:03", "04:04", "04:05"]),
        (Every(MINUTE), "2026-11-25 04:03", ["04:04", "04:05"]),
        (Every(MINUTE), "2026-11-25 04:05", []),
        (Every(MINUTE), "2026-11-25 04:09", []),
        (Every(MINUTE), "2026-11-25 03:58:00", ["03:59", "04:00", "04:01", "04:02", "04:03", "04:04", "04:05"]),
        (Every(MINUTE), "2026-11-25 03:00", ["03:58", "03:59", "04:00", "04:01", "04:02", "04:03", "04:04", "04:05"]),
        (Every(HOUR), NOW, []),
        (Every(HOUR), "2026-11-25 03:00", ["04:00"]),
        (Cron("0 4 * * *"), "2026-11-25 03:00", ["04:00"]),
        (Cron("0 4 * * *"), "2026-11-25 04:00", []),
        (Cron("*/2 * * * *"), NOW, ["04:02", "04:04"]),
        (Every(SECOND), NOW, None),  # a hundred
    ],
    ids=str,
)
def test_ticks_are_published_half_a_window_ahead_and_those_that_were_not_a_quarter_back(when, published, expected):
    ticks = boilermaker.ticks_to_publish(when, utc(published), utc(NOW), WINDOW)
    if expected is None:
        assert ticks == [utc(NOW) + n * SECOND for n in range(1, 101)]
    else:
        assert ticks == [utc(f"2026-11-25 {time}") for time in expected]


def test_no_more_than_a_hundred_ticks_of_a_schedule_are_ahead_however_often_a_worker_looks():
    now = published = utc(NOW)
    for _ in range(50):
        ticks = boilermaker.ticks_to_publish(Every(SECOND), published, now, WINDOW)
        published = ticks[-1]
        assert published - now == 100 * SECOND
        now += 7 * SECOND


def test_many_ticks_that_are_late_are_published_a_hundred_at_a_time():
    now, published = utc(NOW), utc(NOW) - HOUR
    found = []
    for _ in range(4):
        ticks = boilermaker.ticks_to_publish(Every(SECOND), published, now, WINDOW)
        assert len(ticks) <= 100
        found += ticks
        published = found[-1]
    assert found == [now + n * SECOND for n in range(-150, 101)]


@pytest.mark.parametrize(
    ("when", "now", "expected"),
    [
        (Every(MINUTE), "2026-11-25 04:00:30", "2026-11-25 04:00"),
        (Every(MINUTE), "2026-11-25 04:00", "2026-11-25 04:00"),
        (Every(SECOND), "2026-11-25 04:00:30.5", "2026-11-25 04:00:30"),
        (Every(HOUR), "2026-11-25 04:02:30", "2026-11-25 04:00"),
        (Every(HOUR), "2026-11-25 04:02:30.000001", None),
        (Cron("0 4 * * *", "Europe/Berlin"), "2026-11-25 03:02", "2026-11-25 03:00"),
        (Cron("0 4 * * *", "Europe/Berlin"), "2026-11-25 04:02", None),
    ],
    ids=str,
)
def test_a_worker_that_starts_makes_up_for_the_latest_tick_if_that_is_no_older_than_a_quarter(when, now, expected):
    begun = boilermaker.first_progress(when, utc(now), WINDOW)
    assert begun.look_at == utc(now)
    late = [tick for tick in boilermaker.ticks_to_publish(when, begun.published, utc(now), WINDOW) if tick <= utc(now)]
    assert late == ([] if expected is None else [utc(expected)])


@pytest.mark.parametrize(
    "when", [Every(SECOND), Every(MINUTE), Every(DAY), Cron("* * * * *"), Cron("0 4 * * *")], ids=str
)
def test_the_latest_tick_is_found_in_a_window_of_seven_days_too(when):
    now = utc(NOW)
    assert boilermaker.latest_tick(when, now - 7 * DAY / 4, now) == max(
        itertools.takewhile(now.__ge__, when.after(now - DAY - SECOND))
    )


@pytest.mark.parametrize(
    ("when", "published", "expected"),
    [
        (Every(MINUTE), "2026-11-25 04:05", "2026-11-25 04:02:45"),  # half of them are due: more at once
        (Every(5 * MINUTE), "2026-11-25 04:05", "2026-11-25 04:05"),  # the next is near enough
        (Every(4 * MINUTE), "2026-11-25 04:04", "2026-11-25 04:03"),
        (Every(HOUR), NOW, "2026-11-25 04:55"),
        (Cron("0 4 * * *"), NOW, "2026-11-26 03:55"),
        (Every(SECOND), "2026-11-25 04:02:10", "2026-11-25 04:01:20"),
    ],
    ids=str,
)
def test_a_worker_looks_again_when_the_next_tick_is_near_enough_or_half_of_many_are_due(when, published, expected):
    progress = boilermaker.next_progress(when, utc(published), utc(NOW), WINDOW)
    assert progress == (utc(published), utc(expected))


@pytest.mark.parametrize("interval", [SECOND, 7 * SECOND, MINUTE, 4 * MINUTE, 299 * SECOND, 5 * MINUTE], ids=str)
def test_of_a_schedule_that_is_no_rarer_than_half_a_window_one_tick_is_ahead_at_all_times(interval):
    now = utc(NOW)
    progress = boilermaker.first_progress(Every(interval), now, WINDOW)
    for _ in range(200):
        ticks = boilermaker.ticks_to_publish(Every(interval), progress.published, now, WINDOW)
        progress = boilermaker.next_progress(Every(interval), ticks[-1], now, WINDOW)
        assert progress.published >= progress.look_at > now
        now = progress.look_at


@pytest.mark.parametrize("window", [20 * SECOND, WINDOW, 7 * DAY], ids=str)
@pytest.mark.parametrize("when", [Every(SECOND), Every(MINUTE), Every(HOUR), Cron("0 4 * * *")], ids=str)
def test_from_the_first_to_the_last_moment_that_anybody_sends_a_tick_a_quarter_of_the_window_is_left(when, window):
    tick, step = utc("2026-11-25 04:00"), window / 400

    def sent_at(now):
        begun = boilermaker.first_progress(when, now, window)
        behind_all = min(begun.published, now - DAY)  # of a worker that runs, and could not publish anything for long
        return tick in boilermaker.ticks_to_publish(when, begun.published, now, window) or tick in (
            boilermaker.ticks_to_publish(when, behind_all, now, window)
        )

    moments = [moment for n in range(-240, 140) if sent_at(moment := tick + n * step)]
    assert tick in moments
    assert moments[-1] - moments[0] <= 0.75 * window


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (Every(5 * MINUTE), False),
        (Every(5 * MINUTE + SECOND), True),
        (Every(SECOND), False),
        (Cron("* * * * *"), False),
        (Cron("*/5 * * * *", "Europe/Berlin"), False),
        (Cron("*/6 * * * *"), True),
        (Cron("0-30 * * * *"), True),  # half an hour without
        (Cron("* 8-17 * * *"), True),  # nights
        (Cron("* * * * 1-5"), True),  # weekends
        (Cron("* * 1-28 * *"), True),  # the last days of the month
        (Cron("0 4 * * *"), True),
        (Cron("0 0 29 2 *"), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("now", ["2026-11-25 04:00:30", "2026-12-31 23:59:59", "2028-02-28 12:00"])
def test_a_schedule_is_rare_if_somewhere_more_than_half_a_window_lies_between_its_ticks(when, expected, now):
    assert boilermaker.is_rarer_than(when, WINDOW / 2, utc(now)) is expected


# ======================================================================================================================
# 13. Application: registering
# ======================================================================================================================


@pytest.mark.parametrize("bus", [None, "tasks.db", object(), LocalServiceBus], ids=["None", "text", "object", "class"])
def test_an_application_without_a_bus_is_an_error_that_says_what_one_is(bus):
    with pytest.raises(UsageError, match="LocalServiceBus or an AzureServiceBus"):
        Boilermaker(None, bus)


def test_an_application_has_the_state_and_the_bus_it_was_given():
    state, bus = {"a": 1}, LocalServiceBus()
    app = Boilermaker(state=state, service_bus_client=bus)
    assert app.state is state
    assert app.service_bus_client is bus


def test_tracing_without_opentelemetry_is_an_error_that_says_what_to_install():
    assert "opentelemetry-api" in fresh_python(
        """
        from boilermaker import Boilermaker, ConfigurationError, LocalServiceBus
        try:
            Boilermaker(None, LocalServiceBus(), enable_opentelemetry=True)
        except ConfigurationError as error:
            print(error)
        """,
        "-S",
    )


def registered(app, name):
    """The options of a registration."""
    found = app.registration(name)
    return found and (found.function, *found.options)


@pytest.mark.parametrize(
    "register",
    [
        lambda app: app.task(parse_page),
        lambda app: app.task()(parse_page),
        lambda app: app.register_async(parse_page),
        lambda app: app.register_many_async([parse_page]),
    ],
    ids=["bare", "()", "register_async", "register_many_async"],
)
def test_a_function_is_registered_under_its_name_with_the_defaults(register):
    app = Boilermaker(None, LocalServiceBus())
    register(app)
    assert registered(app, "parse_page") == (parse_page, RetryPolicy.default(), True, True)


OPTIONS = {"policy": NoRetry(), "should_dead_letter": False, "acks_late": False}


@pytest.mark.parametrize(
    "register",
    [
        lambda app: app.task(**OPTIONS)(parse_page),
        lambda app: app.register_async(parse_page, **OPTIONS),
        lambda app: app.register_many_async([parse_page], **OPTIONS),
    ],
    ids=["task", "register_async", "register_many_async"],
)
def test_a_function_is_registered_with_its_options(register):
    app = Boilermaker(None, LocalServiceBus())
    register(app)
    assert registered(app, "parse_page") == (parse_page, NoRetry(), False, False)


def test_a_function_is_registered_under_the_name_it_is_given():
    app = Boilermaker(None, LocalServiceBus())
    app.task(name="pages.parse")(parse_page)
    app.register_async(store_rows, name="rows.store")
    assert registered(app, "pages.parse")[0] is parse_page
    assert registered(app, "rows.store")[0] is store_rows
    assert registered(app, "parse_page") is None


def test_a_function_without_a_name_is_an_error_that_says_so():
    with pytest.raises(UsageError, match=r"has no name: functools\.partial"):
        Boilermaker(None, LocalServiceBus()).register_async(partial(fetch_page, width=3))


@pytest.mark.parametrize("options", [{}, {"name": "parse_page"}])
def test_a_name_taken_twice_is_an_error_that_says_which(options):
    app = Boilermaker(None, LocalServiceBus()).register_async(parse_page)

    with pytest.raises(UsageError, match=r"already registered: parse_page\b"):
        app.task(**options)(parse_page)
    with pytest.raises(UsageError, match=r"already registered: parse_page\b"):
        app.register_async(store_rows, name="parse_page")
    assert registered(app, "parse_page")[0] is parse_page


def test_a_function_that_is_not_async_is_an_error_that_says_which():
    def resize_image(state): ...

    app = Boilermaker(None, LocalServiceBus())
    for register in (app.task, app.task(), app.register_async, lambda fn: app.register_many_async([fn])):
        with pytest.raises(UsageError, match=r"must be async: resize_image\. .*async def resize_image"):
            register(resize_image)
    assert app.registration("resize_image") is None


@pytest.mark.parametrize(
    ("thing", "says"),
    [("fetch", r"@app.task\(name='fetch'\)"), (3, "async"), (print, "async"), (LocalServiceBus, "async")],
    ids=repr,
)
def test_what_is_no_function_cannot_be_registered(thing, says):
    with pytest.raises(UsageError, match=says):
        Boilermaker(None, LocalServiceBus()).task(thing)


@pytest.mark.parametrize("policy", [3, "fixed", RetryMode.Fixed, {"max_tries": 3}], ids=repr)
def test_registering_with_something_else_for_a_policy_is_an_error_that_names_the_function(policy):
    with pytest.raises(UsageError, match="parse_page: policy="):
        Boilermaker(None, LocalServiceBus()).register_async(parse_page, policy=policy)


@pytest.mark.parametrize("option", ["should_dead_letter", "acks_late"])
@pytest.mark.parametrize("value", [None, 0, "no"])
def test_registering_with_something_else_for_a_flag_is_an_error_that_names_it(option, value):
    with pytest.raises(UsageError, match=re.escape(f"parse_page: {option}={value!r} must be True or False")):
        Boilermaker(None, LocalServiceBus()).register_async(parse_page, **{option: value})


def test_a_decorated_function_can_be_decorated_again_under_another_name():
    app = Boilermaker(None, LocalServiceBus())
    once = app.task(fetch_page)
    twice = app.task(name="again")(once)
    assert (twice.registration.name, twice.function) == ("again", fetch_page)


def test_one_function_under_two_names_is_two_tasks():
    app = Boilermaker(None, LocalServiceBus())
    often = app.task(name="often", policy=RetryPolicy(max_tries=9))(parse_page)
    once = app.task(name="once", policy=NoRetry())(parse_page)
    for fn, name, tries in ((often, "often", 9), (once, "once", 1)):
        for task in (fn.si(), Task.si(fn), app.create_task(fn)):
            document = json.loads(encode(app.bound(task), "q", "q"))
            assert (document["function_name"], document["policy"]["max_tries"]) == (name, tries)


def test_a_decorated_function_can_be_registered_with_another_application():
    fetch = app_with_pages().task(name="fetch")(fetch_page)
    other = Boilermaker(None, LocalServiceBus()).register_async(fetch)
    assert registered(other, "fetch_page")[0] is fetch_page


def test_each_registration_is_logged(caplog):
    caplog.set_level(logging.INFO, "boilermaker.app")
    Boilermaker(None, LocalServiceBus()).register_many_async([parse_page, store_rows])
    assert [record.getMessage() for record in caplog.records if record.name == "boilermaker.app"] == [
        "Registered background function fn=parse_page",
        "Registered background function fn=store_rows",
    ]


# ======================================================================================================================
# 13. Application: publishing
# ======================================================================================================================


async def test_delay_publishes_and_gives_the_task():
    async with Boilermaker(None, LocalServiceBus()) as app:
        task = await app.task(fetch_page).delay("http://x", depth=2)
        [message] = await app.service_bus_client.peek()
        assert (message.message_id, message.sequence_number) == (task.task_id, task.sequence_number)
        assert decode(message.body, "tasks").payload == {"args": ["http://x"], "kwargs": {"depth": 2}}


async def test_every_way_of_scheduling_sends_the_same_message():
    async with Boilermaker(None, LocalServiceBus()) as app:
        fetch = app.task(fetch_page)
        tasks = [
            await fetch.delay("x"),
            await app.apply_async(fetch, "x"),
            await app.apply_async(fetch_page, "x"),
            await app.publish_task(app.create_task(fetch, "x")),
            await app.publish_task(Task.si(fetch_page, "x")),
            await fetch.si("x").publish(),
            *await app.publish_many([fetch.si("x"), Task.si(fetch, "x")]),
        ]
        bodies = [json.loads(message.body) for message in await app.service_bus_client.peek()]
        assert [body["task_id"] for body in bodies] == [task.task_id for task in tasks]
        for body in bodies:
            del body["task_id"], body["attempts"]
        assert bodies == [bodies[0]] * len(tasks)


async def test_a_task_made_before_its_function_is_registered_has_the_options_of_the_registration():
    task = Task.si(parse_page)
    async with Boilermaker(None, LocalServiceBus()) as app:
        app.register_async(parse_page, name="pages.parse", policy=NoRetry())
        await app.publish_task(task)
        [message] = await app.service_bus_client.peek()
        assert (task.function_name, json.loads(message.body)["policy"]["max_tries"]) == ("pages.parse", 1)


async def test_a_policy_of_the_call_is_in_the_message():
    async with app_with_pages() as app:
        await app.apply_async(parse_page, policy=NoRetry())
        [message] = await app.service_bus_client.peek()
        assert json.loads(message.body)["policy"]["max_tries"] == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda app: app.create_task(clean_up),
        lambda app: app.apply_async(clean_up),
        lambda app: app.publish_task(Task.si(clean_up)),
        lambda app: app.publish_task(app.chain(app.create_task(parse_page), Task.si(clean_up))),
    ],
    ids=["create_task", "apply_async", "publish_task", "callback"],
)
async def test_an_unregistered_function_is_an_error_that_names_it_and_the_ways_out(use):
    async with Boilermaker(None, LocalServiceBus()) as app:
        app.register_async(parse_page)
        with pytest.raises(UsageError, match=r"clean_up.*@app\.task.*register_async.*send_task"):
            await use(app)
        assert await app.service_bus_client.peek() == []


@pytest.mark.parametrize("fn", [None, 3, "parse_page"], ids=repr)
async def test_scheduling_what_is_no_function_is_an_error_that_shows_it(fn):
    with pytest.raises(UsageError, match=re.escape(repr(fn))):
        await app_with_pages().apply_async(fn)


async def test_a_task_of_no_application_cannot_publish_itself():
    with pytest.raises(UsageError, match=r"<Task f .*app\.publish_task"):
        await named("f").publish()


@pytest.mark.parametrize("thing", [None, 3, "parse_page", parse_page], ids=repr)
async def test_publishing_what_is_no_task_is_an_error_that_shows_it(thing):
    with pytest.raises(UsageError, match=re.escape(repr(thing))):
        await app_with_pages().publish_task(thing)


WRONG_TIMES = {
    "negative": {"delay": -1},
    "a little negative": {"delay": -0.001},
    "a negative timedelta": {"delay": datetime.timedelta(seconds=-1)},
    "NaN": {"delay": float("nan")},
    "infinity": {"delay": float("inf")},
    "minus infinity": {"delay": float("-inf")},
    "a bool": {"delay": True},
    "text": {"delay": "60"},
    "a Decimal": {"delay": decimal.Decimal(60)},
    "a datetime for a delay": {"delay": datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)},
    "more than 68 years": {"delay": 2**31},
    "an endless timedelta": {"delay": datetime.timedelta.max},
    "naive": {"eta": datetime.datetime(2100, 1, 1)},
    "a date": {"eta": datetime.date(2100, 1, 1)},
    "the end of time": {"eta": datetime.datetime.max.replace(tzinfo=datetime.UTC)},
    "a number for an eta": {"eta": 4_000_000_000.0},
    "text for an eta": {"eta": "2100-01-01T00:00:00Z"},
    "both": {"delay": 60, "eta": datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)},
    "both, now": {"delay": 0, "eta": datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)},
}


WAYS_TO_SCHEDULE = {
    "apply_async": lambda app, **when: app.apply_async(parse_page, **when),
    "publish_task": lambda app, **when: app.publish_task(app.create_task(parse_page), **when),
    "publish_many": lambda app, **when: app.publish_many([app.create_task(parse_page)], **when),
    "publish": lambda app, **when: app.create_task(parse_page).publish(**when),
    "send_task": lambda app, **when: app.send_task("parse_page", **when),
}


@pytest.mark.parametrize("when", WRONG_TIMES.values(), ids=WRONG_TIMES)
@pytest.mark.parametrize("schedule", WAYS_TO_SCHEDULE.values(), ids=WAYS_TO_SCHEDULE)
async def test_a_time_that_makes_no_sense_is_an_error_that_shows_it_and_nothing_is_sent(schedule, when):
    async with app_with_pages() as app:
        with pytest.raises(UsageError) as caught:
            await schedule(app, **when)
        assert [name for name, value in when.items() if f"{name}={value!r}" not in str(caught.value)] == []
        assert await app.service_bus_client.peek() == []


@pytest.mark.parametrize("delay", [60, 60.0, datetime.timedelta(minutes=1)], ids=repr)
async def test_a_delay_is_seconds_from_now(delay):
    async with app_with_pages() as app:
        before = time.time()
        await app.apply_async(parse_page, delay=delay)
        after = time.time()
        [message] = await app.service_bus_client.peek()
        assert before + 60 - 0.01 <= message.scheduled_enqueue_time_utc.timestamp() <= after + 60 + 0.01


@pytest.mark.parametrize("offset", [0, 5.5, -8])
async def test_an_eta_is_a_point_in_time_in_any_time_zone(offset):
    eta = datetime.datetime(2060, 1, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=offset)))
    async with app_with_pages() as app:
        await app.apply_async(parse_page, eta=eta)
        [message] = await app.service_bus_client.peek()
        assert message.scheduled_enqueue_time_utc == eta


@pytest.mark.parametrize("delay", [None, 0, 0.0, datetime.timedelta(0)], ids=repr)
async def test_no_delay_is_not_scheduled(delay):
    async with app_with_pages() as app:
        await app.apply_async(parse_page, delay=delay)
        [message] = await app.service_bus_client.peek()
        assert message.scheduled_enqueue_time_utc is None


@pytest.mark.parametrize("attempts", [0, -1, 1.5, True, "3"], ids=repr)
async def test_a_number_of_publish_attempts_that_is_none_is_an_error_that_shows_it(attempts):
    with pytest.raises(UsageError, match=f"publish_attempts={re.escape(repr(attempts))} "):
        await app_with_pages().apply_async(parse_page, publish_attempts=attempts)


async def test_publishing_that_fails_at_every_attempt_is_one_error_with_the_error_of_each(tmp_path):
    async with app_with_pages(tmp_path / "missing" / "tasks.db") as app:
        with pytest.raises(BoilermakerAppException, match="missing") as caught:
            await app.apply_async(parse_page, publish_attempts=2)
        assert [type(error) for error in caught.value.errors] == [ConfigurationError] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("function_name", None),
        ("task_id", 7),
        ("args", "ab"),
        ("kwargs", [1]),
        ("policy", {"max_tries": 1}),
        ("function_name", ""),
        ("task_id", ""),
        ("retry_policy", 3),
        ("root", 5),
        ("takes_result", None),
        ("queue", 5),
        ("attempts", 0),
        ("attempts", RetryAttempts(-1, datetime.datetime.now(datetime.UTC))),
        ("attempts", RetryAttempts(0, None)),
        ("should_dead_letter", "no"),
        ("acks_late", "yes"),
        ("graph_id", 5),
    ],
)
async def test_a_field_set_to_what_cannot_be_is_an_error_that_shows_it(field, value):
    async with app_with_pages() as app:
        task, head = app.create_task(parse_page), app.create_task(parse_page)
        setattr(task, field, value)
        head.on_failure = task
        for published in (task, head):
            with pytest.raises(UsageError, match=f"{field}={re.escape(boilermaker._short(value))} must "):
                await app.publish_task(published)
        assert await app.service_bus_client.peek() == []


async def test_a_queue_set_to_what_cannot_be_is_an_error_that_shows_it():
    async with app_with_pages() as app:
        task = app.create_task(parse_page)
        task.queue = 7
        with pytest.raises(UsageError, match="queue=7 must be of type str"):
            await app.publish_task(task)
        task.queue = "no queue"
        with pytest.raises(ConfigurationError, match="queue name 'no queue' "):
            await app.publish_task(task)


async def test_a_task_that_was_not_published_has_no_number(tmp_path):
    async with app_with_pages(tmp_path / "missing" / "tasks.db") as app:
        task = app.create_task(parse_page)
        with pytest.raises(BoilermakerAppException):
            await app.publish_task(task)
        assert (task.sequence_number, task.message_id) == (None, None)


async def test_publishing_what_rshift_gave_is_an_error_that_names_the_head():
    async with app_with_pages() as app:
        a, b, c = (app.create_task(fn) for fn in (parse_page, store_rows, clean_up))
        last = a >> b >> c
        for task in (last, b):
            with pytest.raises(UsageError, match=f"{re.escape(repr(task))}.*{re.escape(repr(a))}"):
                await app.publish_task(task)
        assert await app.service_bus_client.peek() == []
        await app.publish_task(a)
        [message] = await app.service_bus_client.peek()
        assert names_along(decode(message.body, "tasks")) == ["parse_page", "store_rows", "clean_up"]


async def test_publishing_what_rshift_gave_is_such_an_error_for_s_too():
    async def with_page(state, page): ...

    app = app_with_pages()
    head = app.create_task(parse_page)
    with pytest.raises(UsageError, match=rf"take the chain's head, {re.escape(repr(head))}"):
        await app.publish_task(head >> Task.s(with_page))


async def test_a_bare_function_that_lacks_arguments_is_an_error_that_names_s():
    app = Boilermaker(None, LocalServiceBus())

    @app.task
    async def parse(state, page): ...

    with pytest.raises(InvalidArguments, match=r"parse\.s\(\) receives its parent's result"):
        _ = parse.si("page") | parse


@pytest.mark.parametrize("coroutine", [True, False])
async def test_publishing_what_has_another_way_says_which(coroutine):
    app = Boilermaker(None, LocalServiceBus())

    @app.task
    async def work(state): ...

    async def plain(state): ...

    with pytest.raises(UsageError, match=r"await it" if coroutine else r"Use Task\.si\(plain, \.\.\.\)"):
        await app.publish_task(work.delay() if coroutine else plain)


async def test_one_task_where_a_list_is_asked_for_is_an_error_that_shows_it():
    app = app_with_pages()
    with pytest.raises(UsageError, match=r"publish_many takes a list, not <Task parse_p"):
        await app.publish_many(app.create_task(parse_page))
    with pytest.raises(UsageError, match="register_many_async takes a list, not <function"):
        app.register_many_async(parse_page)


def test_a_list_where_tasks_are_asked_for_is_an_error_that_says_so():
    app = app_with_pages()
    with pytest.raises(UsageError, match=r"app\.chain\(\*tasks\)"):
        app.chain([app.create_task(parse_page), app.create_task(parse_page)])


@pytest.mark.parametrize("thing", ["parse_page", Task(function_name="parse_page")], ids=["a name", "a task"])
async def test_scheduling_a_name_or_a_task_says_by_what_to_publish_it(thing):
    with pytest.raises(UsageError, match=r"publish_task, .*send_task"):
        await app_with_pages().apply_async(thing)


def test_a_policy_in_place_of_the_message_is_an_error():
    with pytest.raises(UsageError, match="the message comes first"):
        RetryException(RetryPolicy(delay=3))


async def test_publishing_what_lshift_gave_is_an_error_that_names_the_head():
    async with app_with_pages() as app:
        a, b = app.create_task(parse_page), app.create_task(store_rows)
        with pytest.raises(UsageError, match=re.escape(repr(b))):
            await app.publish_task(a << b)


async def test_the_tail_of_a_published_chain_is_still_refused():
    async with app_with_pages() as app:
        a, b = app.create_task(parse_page), app.create_task(store_rows)
        a >> b
        await app.publish_task(a)
        with pytest.raises(UsageError, match=re.escape(repr(a))):
            await app.publish_task(b)


@pytest.mark.parametrize(
    "use",
    [
        lambda app, last, other: last | other,
        lambda app, last, other: other | last,
        lambda app, last, other: app.chain(last, other),
        lambda app, last, other: app.chain(other, last),
    ],
    ids=["a >> b | c", "c | a >> b", "chain(a >> b, c)", "chain(c, a >> b)"],
)
def test_beginning_a_part_of_a_workflow_with_what_rshift_gave_is_an_error_that_names_the_head(use):
    app = app_with_pages()
    head, last, other = (app.create_task(fn) for fn in (parse_page, store_rows, clean_up))
    with pytest.raises(UsageError, match=re.escape(repr(head))):
        use(app, head >> last, other)
    assert names_along(use(app, last.copy(), other))


def test_a_chain_goes_on_along_what_rshift_has_linked():
    app = app_with_pages()
    a, b, c = (app.create_task(fn) for fn in (parse_page, store_rows, clean_up))
    a >> b
    assert names_along(app.chain(a, b, c)) == ["parse_page", "store_rows", "clean_up"]


async def test_a_task_that_follows_no_other_any_more_can_be_published():
    async with app_with_pages() as app:
        a, b = app.create_task(parse_page), app.create_task(store_rows)
        a >> b
        a.on_success = None
        await app.publish_task(b)
        await app.publish_task((a >> app.create_task(clean_up)).copy())
        assert len(await app.service_bus_client.peek()) == 2


async def test_publishing_what_or_or_chain_gave_publishes_the_whole():
    async with app_with_pages() as app:
        a, b, c = (app.create_task(fn) for fn in (parse_page, store_rows, clean_up))
        await app.publish_task(a | b | c)
        await app.publish_task(app.chain(a, b, c))
        for message in await app.service_bus_client.peek():
            assert names_along(decode(message.body, "tasks")) == ["parse_page", "store_rows", "clean_up"]


@pytest.mark.parametrize("cycle", CYCLES)
async def test_publishing_a_cycle_is_an_error_and_nothing_is_sent(cycle):
    async with app_with_pages() as app:
        with pytest.raises(UsageError, match="cycle"):
            await app.publish_task(cycle())
        assert await app.service_bus_client.peek() == []


def size_and_limit(error):
    """The two numbers of the message."""
    return [
        int(number) for number in re.findall(r"\b(\d+) bytes|limit is (\d+)", str(error)) for number in number if number
    ]


@pytest.mark.parametrize("in_callback", [False, True])
async def test_a_message_too_large_is_an_error_with_its_size_and_the_limit_and_nothing_is_sent(in_callback):
    async with app_with_pages(max_message_bytes=2000) as app:
        task = app.create_task(take_anything, *([] if in_callback else ["x" * 2000]))
        if in_callback:
            task.on_success = app.create_task(take_anything, "x" * 1000)
            task.on_failure = app.create_task(take_anything, "x" * 1000)
        size = len(encode(task, "tasks", "tasks"))
        with pytest.raises(MessageTooLarge, match="take_anything") as caught:
            await app.publish_task(task)
        assert size_and_limit(caught.value) == [size, 2000]
        assert await app.service_bus_client.peek() == []


async def test_a_message_of_exactly_the_limit_is_sent():
    async with app_with_pages() as app:
        task = app.create_task(take_anything, "x")
        task.args = ["x" * (262_144 - len(encode(task, "tasks", "tasks")) + 1)]
        await app.publish_task(task)
        [message] = await app.service_bus_client.peek()
        assert len(message.body) == 262_144
        task = task.copy()
        task.args[0] += "x"
        with pytest.raises(MessageTooLarge, match=r"262145 .*262144"):
            await app.publish_task(task)


async def test_a_chain_of_750_is_published_where_it_fits():
    async with app_with_pages(max_message_bytes=10**6) as app:
        await app.publish_task(chain_of(750))
        [message] = await app.service_bus_client.peek()
        assert len(names_along(decode(message.body, "tasks"))) == 750


async def test_publish_many_sends_in_order():
    async with app_with_pages() as app:
        tasks = [app.create_task(take_anything, number) for number in range(250)]
        assert await app.publish_many(tasks) == tasks
        bodies = [message.body for message in await app.service_bus_client.peek(1000)]
        assert [decode(body, "tasks").args for body in bodies] == [[number] for number in range(250)]


async def test_publish_many_of_nothing_sends_nothing():
    async with app_with_pages() as app:
        assert await app.publish_many([]) == []


@pytest.mark.parametrize(
    "wrong", [named("f", args=[{1}]), named("f", args=["x" * 300_000]), Task.si(take_one_keyword, number=1), 3]
)
async def test_publish_many_checks_all_before_it_sends_the_first(wrong):
    async with app_with_pages() as app:
        tasks = [app.create_task(parse_page), wrong]
        with pytest.raises(UsageError):
            await app.publish_many(tasks)
        assert await app.service_bus_client.peek() == []
        assert tasks[0].sequence_number is None


async def test_a_task_is_sent_by_name_alone_to_another_queue(tmp_path):
    file = tmp_path / "tasks.db"
    async with app_with_pages(file, queue_name="home") as app:
        callback = app.create_task(clean_up)
        sent = await app.send_task("theirs", "x", queue="there", on_success=callback, on_failure=callback, width=2)
        assert await app.service_bus_client.peek() == []
        there = LocalServiceBus(file, "there")
        [message] = await there.peek()
        await there.close()
    received = decode(message.body, "there")
    assert (received.task_id, received.function_name) == (sent.task_id, "theirs")
    assert (received.args, received.kwargs) == (["x"], {"width": 2})
    assert (received.queue, received.on_success.queue, received.on_failure.queue) == ("there", "home", "home")
    assert received.policy is None
    assert json.loads(message.body)["policy"] == {"max_tries": 5, "delay": 120, "delay_max": 120, "retry_mode": 0}


async def test_a_task_by_name_with_a_policy_keeps_it():
    async with app_with_pages() as app:
        await app.send_task("theirs", policy=NoRetry())
        [message] = await app.service_bus_client.peek()
        received = decode(message.body, "tasks")
        assert received.policy == NoRetry()


@pytest.mark.parametrize("name", [None, 3, "", b"theirs", fetch_page], ids=repr)
async def test_a_task_by_something_else_than_a_name_is_an_error(name):
    async with app_with_pages() as app:
        with pytest.raises(UsageError):
            await app.send_task(name)
        assert await app.service_bus_client.peek() == []


@pytest.mark.parametrize("queue", ["", "a b", 3], ids=repr)
async def test_a_task_for_a_queue_that_cannot_be_is_an_error_that_shows_it(queue):
    with pytest.raises(ConfigurationError, match=re.escape(repr(queue))):
        await app_with_pages().send_task("theirs", queue=queue)


# ======================================================================================================================
# 14. Old names
# ======================================================================================================================

OLD_IMPORTS = """\
from boilermaker import Boilermaker, Task, retries
from boilermaker.app import Boilermaker, BoilermakerAppException
from boilermaker.task import Task
from boilermaker.retries import NoRetry, RetryAttempts, RetryPolicy, RetryMode, RetryException, RetryExceptionDefault
from boilermaker.retries import RetryExceptionDefaultExponential, RetryExceptionDefaultLinear
from boilermaker.failure import TaskFailureResult
from boilermaker.config import Config
from boilermaker.service_bus import AzureServiceBus
import boilermaker.retries as old_retries
""".splitlines()


@pytest.mark.parametrize("line", OLD_IMPORTS)
def test_an_old_import_works_as_the_first_import_on_a_bare_python(line):
    assert fresh_python(f"{line}\nprint('imported')", "-S") == "imported"


def test_the_old_names_are_the_new_ones():
    names = [name for name in vars(retries) if not name.startswith("_")]
    assert {"NoRetry", "RetryPolicy", "RetryMode", "RetryException", "RetryExceptionDefault"} <= set(names)
    assert [name for name in names if getattr(retries, name) is not getattr(boilermaker, name)] == []


@pytest.mark.parametrize("name", ["queueing", "acme.vendored.queueing"])
def test_the_old_imports_and_pickling_work_vendored_under_any_name(tmp_path, name):
    target = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODULE, target)
    code = f"""
        import pickle, sys
        from {name}.retries import NoRetry, RetryException, RetryPolicy
        from {name}.app import Boilermaker
        from {name}.task import Task
        from {name}.failure import TaskFailureResult
        from {name}.config import Config
        from {name}.service_bus import AzureServiceBus
        from {name} import retries
        assert retries.RetryPolicy is RetryPolicy
        assert pickle.loads(pickle.dumps(RetryPolicy(max_tries=3))).max_tries == 3
        error = pickle.loads(pickle.dumps(RetryException("busy", NoRetry())))
        assert (type(error), error.msg, error.policy) == (RetryException, "busy", NoRetry())
        assert "boilermaker" not in sys.modules
        print("works")
    """
    assert fresh_python(code, "-S", path=tmp_path) == "works"


# ======================================================================================================================
# Helpers of the local bus and the worker
# ======================================================================================================================

PATIENCE = 60
"""Seconds after which a condition that should come true soon is given up."""

COMPLETE, ABANDON, DEAD_LETTER = Do.COMPLETE, Do.ABANDON, Do.DEAD_LETTER


@pytest.fixture
async def open_bus(tmp_path):
    """Makes local buses on `queue.db`, and closes them at the end."""
    buses = []

    def make(queue_name="tasks", *, path=None, **settings):
        buses.append(LocalServiceBus(path or tmp_path / "queue.db", queue_name, **settings))
        return buses[-1]

    yield make
    for bus in buses:
        await bus.close()


@pytest.fixture
def start_program(tmp_path):
    """Starts Python programs, gives the process and the file of its output, and kills what is left at the end."""
    started = []

    def start(source, *arguments):
        program = tmp_path / f"program{len(started)}.py"
        program.write_text(source)
        output = program.with_suffix(".log")
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(boilermaker.__file__)}
        with output.open("wb") as stream:
            started.append(
                subprocess.Popen(
                    [sys.executable, str(program), *map(str, arguments)],
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                    cwd=tmp_path,
                )
            )
        return started[-1], output

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


@contextlib.asynccontextmanager
async def receiving(bus, on_lock_lost=lambda delivery: None, max_renewal=3600):
    receiver = await bus.open_receiver(on_lock_lost, max_renewal)
    try:
        yield receiver
    finally:
        await receiver.close()


def letter(text="x", *, message_id=None, queue="tasks", due=None):
    return boilermaker.Outgoing(text, message_id or text, queue, due)


async def settle(receiver, delivery, action=COMPLETE, **options):
    """The error, if there was one."""
    settlement = boilermaker.Settlement(delivery, action, **options)
    await receiver.settle([settlement])
    return settlement.error


async def take_and_drop(bus, count=1):
    """Receive by a receiver that dies: it never settles, and renews no more."""
    async with receiving(bus) as receiver:
        return await receiver.receive(count, PATIENCE)


async def until(condition, what="the condition"):
    """Wait until a function, or a coroutine function, gives something true; that."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"{what} has not come true in {PATIENCE} s")


async def exit_code(program):
    process, output = program
    await until(lambda: process.poll() is not None, f"the end of a program: {output.read_text()}")
    return process.returncode


async def ids_of(bus, dead_letter=False):
    return [message.message_id for message in await bus.peek(1000, dead_letter=dead_letter)]


async def work_off(app, **options):
    await asyncio.wait_for(app.run(burst=True, **options), PATIENCE)


@contextlib.asynccontextmanager
async def working(app, **options):
    """A worker in the background, cancelled at the end; that it ended earlier is an error."""
    worker = asyncio.create_task(app.run(**options))
    try:
        yield worker
        assert not worker.done()
    finally:
        worker.cancel()
        await asyncio.wait([worker])


def moved_clock(at=None):
    """A clock that stands still, now or at a moment, and is moved by `tick(seconds)`; the event loop's goes on."""
    return freezegun.freeze_time(at or datetime.datetime.now(datetime.UTC), real_asyncio=True)


# ======================================================================================================================
# Local bus: sending, receiving, settling
# ======================================================================================================================


async def test_messages_are_received_in_the_order_they_were_sent(open_bus):
    bus = open_bus()
    await bus.send([letter("a"), letter("b")])
    await bus.send([letter("c")])
    async with receiving(bus) as receiver:
        first = await receiver.receive(2, 0)
        second = await receiver.receive(2, 0)
    assert [delivery.body for delivery in first + second] == ["a", "b", "c"]


async def test_sending_gives_sequence_numbers_that_grow(open_bus):
    bus = open_bus()
    assert await bus.send([letter("a"), letter("b")]) + await bus.send([letter("c")]) == [1, 2, 3]


async def test_a_received_message_is_locked_until_it_is_settled(open_bus):
    bus = open_bus()
    await bus.send([letter("a")])
    async with receiving(bus) as receiver, receiving(bus) as other:
        [delivery] = await receiver.receive(5, 0)
        assert (delivery.message_id, delivery.body, delivery.delivery_count) == ("a", "a", 0)
        assert await other.receive(5, 0) == []
        assert await settle(receiver, delivery) is None
        assert await other.receive(5, 0) == []
    assert await bus.peek() == []


async def test_a_receive_waits_for_a_message_of_the_same_event_loop(open_bus):
    bus = open_bus()
    async with receiving(bus) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, 2 * PATIENCE))
        await asyncio.sleep(0.05)
        await bus.send([letter("a")])
        [delivery] = await asyncio.wait_for(waiting, PATIENCE)
    assert delivery.body == "a"


@pytest.mark.parametrize("notified", [True, False], ids=["by the system", "by polling"])
async def test_a_receive_waits_for_a_message_of_another_process(open_bus, start_program, monkeypatch, notified):
    if not notified:
        monkeypatch.setattr(boilermaker, "_inotify", lambda path: None)
    bus = open_bus()
    async with receiving(bus) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, 2 * PATIENCE))
        await asyncio.sleep(0.05)
        program = start_program("""
import asyncio, boilermaker
bus = boilermaker.LocalServiceBus("queue.db")
asyncio.run(bus.send([boilermaker.Outgoing("hello", "1", "tasks")]))
""")
        [delivery] = await asyncio.wait_for(waiting, PATIENCE)
    assert delivery.body == "hello"
    assert await exit_code(program) == 0


async def test_a_receive_gives_up_after_its_wait(open_bus):
    async with receiving(open_bus()) as receiver:
        assert await receiver.receive(1, 0.02) == []


async def test_a_lock_that_expired_delivers_the_message_again_with_one_delivery_more(open_bus):
    bus = open_bus(lock_duration=0.1)
    await bus.send([letter("a")])
    for count in range(3):
        [delivery] = await take_and_drop(bus)
        assert (delivery.body, delivery.delivery_count) == ("a", count)


async def test_expired_locks_come_before_newer_messages(open_bus):
    bus = open_bus(lock_duration=0.1)
    await bus.send([letter("a"), letter("b")])
    [first] = await take_and_drop(bus)
    await until(lambda: time.time() > first.locked_until)
    async with receiving(bus) as receiver:
        assert [delivery.body for delivery in await receiver.receive(1, 0)] == ["a"]


async def test_locks_are_renewed_while_the_event_loop_is_blocked(open_bus):
    bus = open_bus(lock_duration=1)
    await bus.send([letter("a")])
    async with receiving(bus) as receiver, receiving(bus) as other:
        [delivery] = await receiver.receive(1, 0)
        time.sleep(1.6)
        assert await other.receive(1, 0) == []
        assert await settle(receiver, delivery) is None


async def test_a_receiver_that_is_closed_renews_no_more(open_bus):
    bus = open_bus(lock_duration=0.2)
    await bus.send([letter("a")])
    await take_and_drop(bus)
    async with receiving(bus) as receiver:
        assert len(await receiver.receive(1, PATIENCE)) == 1


async def test_a_lock_that_was_renewed_for_long_enough_is_reported_as_lost_once(open_bus):
    lost = []
    bus = open_bus(lock_duration=0.1)
    await bus.send([letter("a")])
    async with receiving(bus, lost.append, max_renewal=0.2) as receiver:
        [delivery] = await receiver.receive(1, 0)
        await until(lambda: lost)
        [again] = await receiver.receive(1, PATIENCE)
        assert again.delivery_count == 1
        assert isinstance(await settle(receiver, delivery), MessageLockLost)
    assert lost == [delivery]


async def test_settling_a_lost_delivery_leaves_the_lock_of_the_same_message_renewed(open_bus):
    lost = []
    bus = open_bus(lock_duration=0.2)
    await bus.send([letter("a")])
    async with receiving(bus, lost.append, max_renewal=0.3) as receiver, receiving(bus) as other:
        [old] = await receiver.receive(1, 0)
        [new] = await until(lambda: receiver.receive(1, 0))
        receiver._max_renewal = 3600
        await settle(receiver, old, Do.LEAVE)
        await asyncio.sleep(0.5)
        assert await other.receive(1, 0) == []
        assert await settle(receiver, new) is None
    assert lost == [old]


@pytest.mark.parametrize("action", [COMPLETE, ABANDON, DEAD_LETTER])
async def test_settling_an_old_delivery_is_rejected_and_its_follow_up_is_not_sent(open_bus, action):
    bus = open_bus(lock_duration=0.1)
    await bus.send([letter("a")])
    [old] = await take_and_drop(bus)
    bus.lock_duration = 600
    async with receiving(bus) as receiver:
        [new] = await receiver.receive(1, PATIENCE)
        assert isinstance(await settle(receiver, old, action, messages=[letter("b")]), MessageLockLost)
        assert await ids_of(bus) == ["a"]
        assert await ids_of(bus, dead_letter=True) == []
        assert await settle(receiver, new, messages=[letter("c")]) is None
    assert await ids_of(bus) == ["c"]


async def test_completing_an_old_delivery_leaves_the_message_to_its_new_holder(open_bus):
    bus = open_bus(lock_duration=0.1)
    await bus.send([letter("a")])
    [old] = await take_and_drop(bus)
    bus.lock_duration = 600
    async with receiving(bus) as receiver:
        [_] = await receiver.receive(1, PATIENCE)
        error = await settle(receiver, old)
    assert isinstance(error, MessageLockLost)
    assert await ids_of(bus) == ["a"]


async def test_an_abandoned_message_returns_at_once_before_newer_ones(open_bus):
    bus = open_bus(lock_duration=600)
    await bus.send([letter("a"), letter("b")])
    async with receiving(bus) as receiver:
        [first] = await receiver.receive(1, 0)
        await settle(receiver, first, ABANDON)
        again = await receiver.receive(2, 0)
    assert [(delivery.body, delivery.delivery_count) for delivery in again] == [("a", 1), ("b", 0)]


async def test_a_dead_lettered_message_keeps_its_body_with_reason_and_description(open_bus):
    bus = open_bus()
    await bus.send([letter("a")])
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, 0)
        assert await settle(receiver, delivery, DEAD_LETTER, reason="Broken", description="It was broken.") is None
        assert await receiver.receive(1, 0) == []
    assert await bus.peek() == []
    [dead] = await bus.peek(dead_letter=True)
    assert (dead.body, dead.message_id, dead.sequence_number) == ("a", "a", delivery.sequence_number)
    assert (dead.dead_letter_reason, dead.dead_letter_error_description) == ("Broken", "It was broken.")


async def test_the_dead_letter_queue_can_be_received_from(open_bus):
    bus = open_bus()
    await bus.send([letter("a")])
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, 0)
        await settle(receiver, delivery, DEAD_LETTER, reason="Broken")
    dead_letters = open_bus("tasks/$DeadLetterQueue")
    async with receiving(dead_letters) as receiver:
        [delivery] = await receiver.receive(1, 0)
        assert await settle(receiver, delivery, messages=[letter("a")]) is None
    assert await ids_of(bus, dead_letter=True) == []
    assert await ids_of(bus) == ["a"]


async def test_what_fails_again_out_of_the_dead_letter_queue_waits_for_the_end_of_its_lock(open_bus):
    app = Boilermaker([], open_bus())
    app_of_dead_letters = Boilermaker(
        [], open_bus(queue_name=f"tasks{boilermaker.DEAD_LETTER_SUFFIX}", lock_duration=600)
    )

    async def broken(state):
        state.append("ran")
        raise ValueError("again")

    for one in (app, app_of_dead_letters):
        one.register_async(broken)
    await app.apply_async(broken)
    await work_off(app)
    await work_off(app_of_dead_letters)
    [message] = await app.service_bus_client.peek(dead_letter=True)
    assert app_of_dead_letters.state == ["ran"]
    assert (message.dead_letter_reason, message.dead_letter_error_description) == ("TaskFailed", "ValueError: again")


async def test_what_is_delivered_too_often_is_dead_lettered(open_bus):
    bus = open_bus(lock_duration=0.05, max_delivery_count=2)
    await bus.send([letter("a"), letter("b", due=time.time() + 3600)])
    assert [(await take_and_drop(bus))[0].delivery_count for _ in range(2)] == [0, 1]
    async with receiving(bus) as receiver:
        assert await receiver.receive(1, 0.2) == []
    [dead] = await bus.peek(dead_letter=True)
    assert dead.dead_letter_reason == "MaxDeliveryCountExceeded"
    assert "2 times" in dead.dead_letter_error_description
    assert dead.delivery_count == 2
    assert await ids_of(bus) == ["b"]


async def test_without_a_maximum_messages_are_delivered_for_ever(open_bus):
    bus = open_bus(max_delivery_count=None)
    await bus.send([letter("a")])
    async with receiving(bus) as receiver:
        for count in range(30):
            [delivery] = await receiver.receive(1, 0)
            assert delivery.delivery_count == count
            await settle(receiver, delivery, ABANDON)


@pytest.mark.parametrize("setting", [{"max_delivery_count": 1}, {"time_to_live": 0.01}], ids=["too often", "too old"])
async def test_a_dead_letter_queue_never_dead_letters(tmp_path, start_program, setting):
    program = start_program(
        """
import asyncio, json, sys, time
from boilermaker import *
from boilermaker import Action, Outgoing, Settlement

async def receive(bus):
    receiver = await bus.open_receiver(lambda delivery: None, 60)
    try:
        return await receiver.receive(1, 0)
    finally:
        await receiver.close()

async def main():
    setting = json.loads(sys.argv[1])
    bus = LocalServiceBus("queue.db", lock_duration=0.05, **setting)
    await bus.send([Outgoing("a", "a", "tasks")])
    while not await bus.peek(dead_letter=True):
        await receive(bus)
        await asyncio.sleep(0.06)
    await bus.close()
    dead_letters = LocalServiceBus("queue.db", "tasks/$DeadLetterQueue", lock_duration=0.05, **setting)
    for _ in range(3):
        assert len(await receive(dead_letters)) == 1
        await asyncio.sleep(0.06)
    await dead_letters.close()

asyncio.run(asyncio.wait_for(main(), 30))
""",
        json.dumps(setting),
    )
    process, output = program
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    assert process.returncode == 0, output.read_text() or "it hangs"


# ======================================================================================================================
# Local bus: time
# ======================================================================================================================


async def test_a_scheduled_message_is_received_when_it_is_due(open_bus):
    with moved_clock() as clock:
        bus = open_bus(lock_duration=3600)
        await bus.send([letter("later", due=time.time() + 100), letter("now")])
        async with receiving(bus) as receiver:
            assert [delivery.body for delivery in await receiver.receive(5, 0)] == ["now"]
            clock.tick(99)
            assert await receiver.receive(5, 0) == []
            clock.tick(2)
            assert [delivery.body for delivery in await receiver.receive(5, 0)] == ["later"]


async def test_a_waiting_receive_gets_a_scheduled_message_when_it_is_due(open_bus):
    bus = open_bus()
    due = time.time() + 0.2
    await bus.send([letter("a", due=due)])
    async with receiving(bus) as receiver:
        [_] = await asyncio.wait_for(receiver.receive(1, 2 * PATIENCE), PATIENCE)
    assert time.time() >= due


async def test_a_scheduled_message_can_be_cancelled(open_bus):
    with moved_clock():
        bus = open_bus()
        [number] = await bus.send([letter("a", due=time.time() + 100)])
        await bus.cancel(number)
        assert await bus.peek() == []
        with pytest.raises(MessageNotFound, match=f"tasks has no scheduled message with sequence number {number}"):
            await bus.cancel(number)


@pytest.mark.parametrize("number", [0, -1, 99, 2**62, 2**70])
async def test_cancelling_a_number_that_is_not_there_says_so(open_bus, number):
    with pytest.raises(MessageNotFound, match=str(number)):
        await open_bus().cancel(number)


@pytest.mark.parametrize("number", [None, "1", 1.0, True])
async def test_cancelling_what_is_no_number_is_an_error_that_shows_it(open_bus, number):
    for bus in (open_bus(), AzureServiceBus(NAMESPACE, "q", object())):
        with pytest.raises(UsageError, match=f"sequence_number={number!r} "):
            await bus.cancel(number)


async def test_what_waits_can_be_cancelled_and_what_runs_or_is_dead_cannot_as_it_says(open_bus):
    with moved_clock() as clock:
        bus = open_bus(lock_duration=10)
        numbers = await bus.send([letter("plain"), letter("due", due=time.time() + 1), letter("held"), letter("dead")])
        clock.tick(2)
        for number in numbers[:2]:
            await bus.cancel(number)
        async with receiving(bus) as receiver:
            held, dead = await receiver.receive(5, 0)
            with pytest.raises(MessageNotFound, match=r"sequence number 3, nor one that waits: it runs at the moment"):
                await bus.cancel(numbers[2])
            await settle(receiver, dead, DEAD_LETTER, reason="Bad")
            with pytest.raises(MessageNotFound, match=r"it is a dead letter, which discard\(\) deletes"):
                await bus.cancel(numbers[3])
            clock.tick(11)
            await bus.cancel(numbers[2])
            with pytest.raises(MessageNotFound, match="it is gone, if it ever was"):
                await bus.cancel(numbers[2])
            assert isinstance(await settle(receiver, held), MessageLockLost)


async def test_a_bus_cancels_only_in_its_own_queue(open_bus):
    bus, other = open_bus(), open_bus("other")
    [number] = await other.send([letter("a", queue="other", due=time.time() + 100)])
    with pytest.raises(MessageNotFound):
        await bus.cancel(number)
    assert await ids_of(other) == ["a"]


async def test_a_message_whose_time_to_live_has_passed_is_dead_lettered(open_bus):
    with moved_clock() as clock:
        bus = open_bus(time_to_live=60)
        await bus.send([letter("old"), letter("scheduled", due=time.time() + 30)])
        clock.tick(61)
        async with receiving(bus) as receiver:
            assert [delivery.body for delivery in await receiver.receive(5, 0)] == ["scheduled"]
        [dead] = await bus.peek(dead_letter=True)
        assert (dead.body, dead.dead_letter_reason) == ("old", "TTLExpiredException")
        assert dead.dead_letter_error_description
        assert dead.delivery_count == 0


async def test_what_was_received_in_time_may_be_settled_after_its_time_to_live(open_bus):
    with moved_clock() as clock:
        bus = open_bus(time_to_live=60, lock_duration=600)
        await bus.send([letter("a")])
        async with receiving(bus) as receiver:
            [delivery] = await receiver.receive(1, 0)
            clock.tick(61)
            assert await settle(receiver, delivery) is None
        assert await bus.peek(dead_letter=True) == []


@pytest.mark.parametrize("scheduled", [False, True])
async def test_a_second_message_of_the_same_id_is_dropped_within_the_window(open_bus, scheduled):
    with moved_clock() as clock:
        bus = open_bus(duplicate_detection=60)
        original = letter("first", message_id="id", due=time.time() + 10 if scheduled else None)
        [number] = await bus.send([original])
        async with receiving(bus) as receiver:
            clock.tick(30)
            [delivery] = await receiver.receive(1, 0)
            await settle(receiver, delivery)
            assert await bus.send([letter("second", message_id="id")]) == [number]
            assert await bus.send([letter("third", message_id="id", due=time.time() + 10)]) == [number]
            assert await receiver.receive(5, 0) == []
            clock.tick(31)
            await bus.send([letter("fourth", message_id="id")])
            assert [delivery.body for delivery in await receiver.receive(5, 0)] == ["fourth"]


async def test_duplicates_within_one_send_and_among_follow_ups_are_dropped(open_bus):
    bus = open_bus(duplicate_detection=60)
    await bus.send([letter("a"), letter("a"), letter("b")])
    async with receiving(bus) as receiver:
        for delivery in await receiver.receive(5, 0):
            assert await settle(receiver, delivery, messages=[letter("c")]) is None
    assert await ids_of(bus) == ["c"]


async def test_ids_are_compared_within_one_queue(open_bus):
    bus, other = open_bus(duplicate_detection=60), open_bus("other", duplicate_detection=60)
    await other.peek()
    await bus.send([letter("a"), letter("a", queue="other")])
    assert await ids_of(bus) == await ids_of(other) == ["a"]


async def test_without_duplicate_detection_an_id_may_be_used_again(open_bus):
    bus = open_bus()
    await bus.send([letter("a"), letter("a")])
    assert await ids_of(bus) == ["a", "a"]


@pytest.mark.parametrize(("window", "seconds"), [(None, 600), (60, 600), (3600, 3600)])
@pytest.mark.parametrize("due", [None, 300, -100], ids=str)
async def test_an_id_that_was_given_is_remembered_for_ten_minutes_or_the_window_from_the_sending_on(
    open_bus, window, seconds, due
):
    with moved_clock() as clock:
        bus = open_bus(duplicate_detection=window)
        message = letter("a", due=None if due is None else time.time() + due)._replace(given_id=True)
        [number] = await bus.send([message])
        clock.tick(seconds - 1)
        assert await bus.send([message, letter("b"), message, letter("b")]) == [
            *(number, number + 1, number, number + (1 if window else 2)),
        ]
        clock.tick(2)
        await bus.send([message])
    assert await ids_of(bus) == (["a", "b", "a"] if window else ["a", "b", "b", "a"])


async def test_a_given_id_is_compared_with_given_ids_of_its_queue(open_bus):
    bus, other = open_bus(), open_bus("other")
    given, given_elsewhere = (letter("a", queue=name)._replace(given_id=True) for name in ("tasks", "other"))
    await bus.send([letter("a"), given, given_elsewhere, letter("a")])
    assert (await ids_of(bus), await ids_of(other)) == (["a"] * 3, ["a"])


# ======================================================================================================================
# Local bus: operating a queue
# ======================================================================================================================


async def dead_letters(bus, *bodies, reason="TaskFailed", description="It failed."):
    """Send messages that die; their sequence numbers."""
    numbers = await bus.send([letter(body, message_id=f"{place} {body}"[:128]) for place, body in enumerate(bodies)])
    async with receiving(bus) as receiver:
        for delivery in await receiver.receive(len(bodies), PATIENCE):
            assert await settle(receiver, delivery, DEAD_LETTER, reason=reason, description=description) is None
    return numbers


async def numbers_in(bus, dead_letter=False):
    return [message.sequence_number for message in await bus.peek(1000, dead_letter=dead_letter)]


async def test_messages_of_a_file_are_counted_by_their_state(open_bus):
    with moved_clock() as clock:
        bus = open_bus(lock_duration=10)
        assert await bus.counts() == boilermaker.Counts(active=0, running=0, scheduled=0, dead_letter=0, oldest=None)
        await dead_letters(bus, "dead", "dead too")
        await bus.send([letter("expired")])
        await take_and_drop(bus)
        clock.tick(20)
        await bus.send([letter("running")])
        await take_and_drop(bus, 2)
        await bus.send([letter("waiting"), letter("later", due=time.time() + 100)])
        clock.tick(5)
        counts = await bus.counts()
        assert (counts.active, counts.running, counts.scheduled, counts.dead_letter) == (1, 2, 1, 2)
        assert counts.oldest == pytest.approx(5)
        clock.tick(6)
        counts = await bus.counts()
        assert (counts.active, counts.running, counts.scheduled, counts.dead_letter) == (3, 0, 1, 2)
        assert counts.oldest == pytest.approx(31)


async def test_messages_of_a_file_are_counted_by_task_with_the_last_error(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task
    async def divide(state, a, b):
        return a / b

    @app.task
    async def other(state): ...

    await divide.delay(1, 0)
    await divide.delay("x", 1)
    await app.service_bus_client.send([letter("no task")])
    await work_off(app)
    await divide.delay(1, 2)
    await app.apply_async(other, delay=100)
    counts = await app.counts_by_task()
    assert set(counts) == {"divide", "other", ""}
    assert (counts["divide"].active, counts["divide"].dead_letter, counts["other"].scheduled) == (1, 2, 1)
    assert counts["divide"].last_error.startswith("TypeError")
    assert counts[""].last_error.startswith("boilermaker.InvalidTaskFormat")
    assert counts["other"].last_error is None


async def test_messages_with_and_without_their_name_beside_them_are_counted_together(open_bus):
    """Those without are of a former version, or of another program."""
    bus, later = open_bus(), time.time() + 100
    body = encode(named("f"), "tasks", "tasks")
    sent = [letter(body, message_id=str(number), due=due) for number, due in enumerate((None, later))]
    await dead_letters(bus, body, description="the first")
    await bus.send([message._replace(function_name="f") for message in sent])
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        await settle(receiver, delivery, DEAD_LETTER, description="the last")
    await bus.send([*(message._replace(function_name="f") for message in sent), *sent])
    counts = (await bus.counts_by_task())["f"]
    assert (counts.active, counts.scheduled, counts.dead_letter, counts.last_error) == (2, 3, 2, "the last")


@pytest.mark.parametrize("path", [None, ":memory:"])
async def test_dead_letters_of_which_a_function_returns_true_run_again(open_bus, path):
    app = Boilermaker([], open_bus(path=path))

    @app.task
    async def work(state, number):
        if number not in state:
            state.append(number)
            raise ValueError(number)
        state.append(-number)

    for number in (1, 2, 3):
        await work.delay(number)
    await work_off(app)
    before = await app.peek(dead_letter=True)
    assert [message.sequence_number for message in before] == [1, 2, 3]
    dry = await app.replay(lambda message: message.task.args != [2], dry_run=True)
    assert await app.peek(dead_letter=True) == before
    progress = []
    done = await app.replay(lambda message: message.task.args != [2], on_progress=progress.append)
    assert dry == done == [before[0], before[2]]
    assert progress == [2]
    assert await app.peek(dead_letter=True) == [before[1]]
    await work_off(app)
    assert app.state == [1, 2, 3, -1, -3]


async def test_dead_letters_are_discarded_by_number(open_bus):
    bus = open_bus()
    numbers = await dead_letters(bus, "a", "b", "c")
    assert [message.body for message in await bus.discard([numbers[2], 99, numbers[0], 2**70])] == ["a", "c"]
    assert await numbers_in(bus, dead_letter=True) == [numbers[1]]


async def test_what_waits_or_is_scheduled_is_purged_and_what_runs_is_not(open_bus):
    bus = open_bus()
    await dead_letters(bus, "dead")
    await bus.send([letter("held"), letter("waiting"), letter("later", due=time.time() + 100)])
    await take_and_drop(bus)
    assert [message.body for message in await bus.purge(lambda message: True)] == ["waiting", "later"]
    assert await ids_of(bus) == ["held"]
    assert len(await bus.peek(dead_letter=True)) == 1


async def no_predicate(message): ...


@pytest.mark.parametrize("which", ["12", b"12", 7, [1.0], [True], [None], ["1"], None, no_predicate])
async def test_which_messages_is_a_function_or_numbers_and_else_an_error_that_says_so(open_bus, which):
    bus = open_bus()
    for operation in (bus.replay, bus.discard, bus.purge):
        with pytest.raises(UsageError, match=r"must be a function Message -> bool, or a list of sequence numbers"):
            await operation(which)


@pytest.mark.parametrize("operation", ["replay", "discard", "purge"])
async def test_an_operation_on_a_file_that_is_not_there_yet_finds_nothing(open_bus, operation):
    assert await getattr(open_bus(), operation)(lambda message: True) == []


@pytest.mark.parametrize("operation", ["replay", "discard", "purge"])
async def test_an_operation_on_a_file_that_was_deleted_says_so_and_the_next_goes_on_with_a_new_one(open_bus, operation):
    bus = open_bus()
    await dead_letters(bus, "a")
    for ending in ("", "-wal", "-shm"):
        Path(f"{bus.path}{ending}").unlink()
    with pytest.raises(boilermaker.OperationStopped, match="was deleted or replaced"):
        await getattr(bus, operation)(lambda message: True)
    assert await getattr(bus, operation)(lambda message: True) == []


@pytest.mark.parametrize("dry_run", [False, True])
async def test_of_the_tasks_that_a_predicate_looks_at_one_is_held_at_a_time(open_bus, dry_run):
    bus, tasks = open_bus(), []
    await dead_letters(bus, *(encode(named("f", args=[number]), "tasks", "tasks") for number in range(5)))

    def which(message):
        assert not any(task() for task in tasks)
        assert message.task is message.task
        tasks.append(weakref.ref(message.task))
        return True

    assert len(await bus.replay(which, dry_run=dry_run)) == len(tasks) == 5


@pytest.mark.parametrize("error", [StopIteration, RecursionError, ValueError])
async def test_an_error_of_a_predicate_comes_out_and_what_was_done_before_is_whole(open_bus, monkeypatch, error):
    monkeypatch.setattr(boilermaker, "READ_AT_ONCE", 2)
    bus = open_bus()
    await dead_letters(bus, *"abcde")

    def which(message):
        if message.body == "d":
            raise error("no")
        return True

    with pytest.raises(RuntimeError if error is StopIteration else error):
        await asyncio.wait_for(bus.replay(which), PATIENCE)
    assert [message.body for message in await bus.peek()] == ["a", "b"]
    assert [message.body for message in await bus.peek(dead_letter=True)] == ["c", "d", "e"]


async def test_dead_letters_that_a_worker_holds_are_neither_replayed_nor_discarded(open_bus):
    bus, numbers = open_bus(), []
    numbers = await dead_letters(bus, *"abc")
    async with receiving(open_bus("tasks" + boilermaker.DEAD_LETTER_SUFFIX)) as receiver:
        [held] = await receiver.receive(1, PATIENCE)
        assert [message.body for message in await bus.replay(numbers[:2])] == ["b"]
        assert [message.body for message in await bus.discard(lambda message: True)] == ["c"]
        assert await settle(receiver, held) is None
    assert (await numbers_in(bus), await numbers_in(bus, dead_letter=True)) == ([4], [])


async def test_what_a_worker_takes_while_a_predicate_looks_is_left_to_it(open_bus):
    bus, taken = open_bus(), []
    await dead_letters(bus, *"abc")

    async def take():
        other = LocalServiceBus(bus.path, "tasks" + boilermaker.DEAD_LETTER_SUFFIX)
        taken.extend(await take_and_drop(other))
        await other.close()

    def which(message):
        if message.body == "c":
            asyncio.run(take())
        return True

    assert [message.body for message in await bus.replay(which)] == ["b", "c"]
    assert [delivery.body for delivery in taken] == ["a"]
    assert await ids_of(bus, dead_letter=True) == ["0 a"]


@pytest.mark.parametrize("noticed", [False, True], ids=["unnoticed", "noticed"])
@pytest.mark.parametrize("operation", ["replay", "discard"])
async def test_messages_of_a_file_that_is_replaced_meanwhile_are_left_alone(open_bus, tmp_path, noticed, operation):
    bus, other = open_bus(), open_bus(path=tmp_path / "other.db")
    await dead_letters(bus, *"abc")
    await dead_letters(other, *"xyz")
    await other.close()

    def which(message):
        if message.body == "c":
            for ending in ("-wal", "-shm"):
                Path(f"{bus.path}{ending}").unlink()
            os.replace(tmp_path / "other.db", bus.path)
            if noticed:
                with pytest.raises(ServiceBusUnavailable, match="replaced"):
                    bus.open().check()
        return True

    with pytest.raises(boilermaker.OperationStopped, match=r"after 0 messages: .*replaced"):
        await getattr(bus, operation)(which)
    assert [message.body for message in await bus.peek(dead_letter=True)] == ["x", "y", "z"]
    assert await bus.peek() == []


@pytest.mark.parametrize("path", [None, ":memory:"])
async def test_a_bus_that_is_closed_in_the_middle_of_an_operation_loses_nothing(open_bus, monkeypatch, path):
    monkeypatch.setattr(boilermaker, "READ_AT_ONCE", 2)
    bus, closing = open_bus(path=path), []
    await dead_letters(bus, *"abcde")

    def close(count):
        closing.append(asyncio.ensure_future(bus.close()))

    for _ in range(1 if path else 10):
        try:
            await bus.replay(lambda message: True, on_progress=close)
            break
        except boilermaker.OperationStopped:  # as it says: called again, it goes on
            await asyncio.gather(*closing)
    await asyncio.gather(*closing)
    if path is None:
        assert [message.body for message in await bus.peek()] == [*"abcde"]
        assert await bus.peek(dead_letter=True) == []


@pytest.mark.parametrize("turns", range(12))
async def test_an_operation_that_is_cancelled_anywhere_has_done_whole_steps(open_bus, monkeypatch, turns):
    monkeypatch.setattr(boilermaker, "READ_AT_ONCE", 2)
    bus = open_bus()
    await dead_letters(bus, *"abcdefgh")
    replaying, said = (
        asyncio.create_task(bus.replay(lambda message: True, on_progress=lambda count: said.append(count))),
        [],
    )
    if turns:
        await until(lambda: len(said) * 3 >= turns // 2)
    for _ in range(turns):
        await asyncio.sleep(0)
    replaying.cancel()
    await asyncio.wait([replaying])
    await bus.send([])  # after what was asked for
    waiting, dead = await bus.peek(), await bus.peek(dead_letter=True)
    assert [message.body for message in (*waiting, *dead)] == [*"abcdefgh"]
    assert len(waiting) % 2 == 0
    assert len(await bus.replay(lambda message: True)) == len(dead)
    assert [message.body for message in await bus.peek()] == [*"abcdefgh"]


@pytest.mark.parametrize("by", ["predicate", "numbers"])
@pytest.mark.parametrize("operation", ["replay", "discard", "purge"])
async def test_a_transaction_of_an_operation_has_no_more_than_so_many_rows_and_bytes(
    open_bus, monkeypatch, by, operation
):
    monkeypatch.setattr(boilermaker, "READ_AT_ONCE", 10)
    monkeypatch.setattr(boilermaker, "READ_BYTES", 5000)
    bus, steps, replace = open_bus(), [], boilermaker.Store.replace

    def counted(store, queue, successors, *rest):
        replaced = replace(store, queue, successors, *rest)
        steps.append((len(replaced), sum(len(bodies[number]) for number in replaced)))
        return replaced

    monkeypatch.setattr(boilermaker.Store, "replace", counted)
    texts = [*["x"] * 35, *["y" * 2000] * 15]
    sending = [letter(text, message_id=str(place)) for place, text in enumerate(texts)]
    numbers = await (bus.send(sending) if operation == "purge" else dead_letters(bus, *texts))
    bodies = dict(zip(numbers, texts, strict=True))
    which = numbers if by == "numbers" else lambda message: True
    assert len(await getattr(bus, operation)(which)) == 50
    assert sum(rows for rows, _ in steps) == 50
    assert max(rows for rows, _ in steps) <= 10
    assert max(size for _, size in steps) <= 5000 + 2000


@pytest.mark.parametrize("operation", ["replay", "discard"])
async def test_to_find_messages_by_number_takes_no_longer_in_a_long_queue(open_bus, monkeypatch, operation):
    """By the instructions of SQLite's machine, in hundreds."""
    bus, counts, connect = open_bus(), [], boilermaker.connect

    def counting(path, mode=None):
        connection = connect(path, mode)
        connection.set_progress_handler(lambda: counts.append(1), 100)
        return connection

    async def cost():
        numbers = await dead_letters(bus, *"abcde")
        counts.clear()
        assert len(await getattr(bus, operation)(numbers)) == 5
        spent = len(counts)
        await bus.purge(lambda message: message.state == "active")
        return spent

    monkeypatch.setattr(boilermaker, "connect", counting)
    short = await cost()
    for _ in range(20):
        await dead_letters(bus, *["x"] * 100)
    await bus.send([letter(str(number), due=time.time() + 3600) for number in range(2000)])
    assert await cost() <= short + 10


REPLAYING_PROGRAM = """
import asyncio, os, signal, sys
import boilermaker

left, when, boilermaker.READ_AT_ONCE = int(sys.argv[2]), sys.argv[3], 20

def killing(owner, name):
    original = getattr(owner, name)
    def counted(*arguments):
        global left
        result = original(*arguments)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, counted)

if left:
    killing(*((boilermaker.Store, "replace") if when == "within" else (boilermaker.QueueFile, "sync")))
done = asyncio.run(boilermaker.LocalServiceBus(sys.argv[1]).replay(lambda message: int(message.body) % 2 == 0))
print(len(done))
"""


@pytest.mark.parametrize("when", ["within", "after"])
@pytest.mark.parametrize("step", [1, 3])
async def test_a_replay_that_is_killed_loses_nothing_and_does_nothing_twice(open_bus, start_program, when, step):
    """In a transaction, and after one, before it was answered."""
    bus = open_bus()
    await dead_letters(bus, *map(str, range(160)))
    assert await exit_code(start_program(REPLAYING_PROGRAM, bus.path, step, when)) == -signal.SIGKILL
    waiting = [int(message.body) for message in await bus.peek(1000)]
    assert waiting == list(range(0, 2 * len(waiting), 2))
    assert 0 <= len(waiting) <= 20 * step
    dead = [int(message.body) for message in await bus.peek(1000, dead_letter=True)]
    assert sorted(waiting + dead) == list(range(160))
    assert await exit_code(program := start_program(REPLAYING_PROGRAM, bus.path, 0, when)) == 0
    assert int(program[1].read_text()) == 80 - len(waiting)
    assert [int(message.body) for message in await bus.peek(1000)] == list(range(0, 160, 2))
    assert [int(message.body) for message in await bus.peek(1000, dead_letter=True)] == list(range(1, 160, 2))


async def test_replays_of_two_processes_at_once_replay_each_dead_letter_once(open_bus, start_program):
    bus = open_bus()
    await dead_letters(bus, *map(str, range(400)))
    programs = [start_program(REPLAYING_PROGRAM, bus.path, 0, "never") for _ in range(2)]
    for program in programs:
        assert await exit_code(program) == 0
    assert sum(int(output.read_text()) for _, output in programs) == 200
    assert sorted(int(message.body) for message in await bus.peek(1000)) == list(range(0, 400, 2))


async def test_a_replay_by_another_process_wakes_a_worker(open_bus, start_program):
    bus = open_bus()
    await dead_letters(bus, "2")
    async with receiving(bus) as receiver:
        receive = asyncio.create_task(receiver.receive(1, 2 * PATIENCE))
        assert await exit_code(start_program(REPLAYING_PROGRAM, bus.path, 0, "never")) == 0
        [delivery] = await asyncio.wait_for(receive, PATIENCE)
    assert delivery.body == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_process_that_is_forked_while_a_predicate_looks_and_its_child_go_on(open_bus):
    bus, children = open_bus(), []
    await dead_letters(bus, *"abc")

    def which(message):
        if not children:
            children.append(os.fork())
            if not children[0]:
                os._exit(0)
        return True

    assert len(await bus.replay(which)) == 3
    assert os.waitpid(children[0], 0)[1] == 0
    assert [message.body for message in await bus.peek()] == [*"abc"]


# ======================================================================================================================
# Local bus: queues, peeking, the file
# ======================================================================================================================


async def test_queues_of_one_file_do_not_mix(open_bus):
    bus, other = open_bus(), open_bus("other")
    await bus.send([letter("a"), letter("b", queue="other"), letter("c")])
    assert await ids_of(bus) == ["a", "c"]
    assert await ids_of(other) == ["b"]
    async with receiving(other) as receiver:
        assert [delivery.body for delivery in await receiver.receive(5, 0)] == ["b"]


async def test_settings_belong_to_the_queue_not_to_who_sends(open_bus):
    bus, other = open_bus(), open_bus("other", duplicate_detection=60)
    await other.peek()
    await bus.send([letter("a", queue="other"), letter("a", queue="other")])
    assert await ids_of(other) == ["a"]


async def test_the_last_to_open_a_queue_decides_on_its_settings(open_bus):
    strict = open_bus(duplicate_detection=60)
    await strict.send([letter("a"), letter("a")])
    await strict.close()
    await open_bus().send([letter("b"), letter("b")])
    assert await ids_of(strict) == ["a", "b", "b"]


async def test_sequence_numbers_are_never_used_again(open_bus):
    bus = open_bus()
    numbers = await bus.send([letter("a"), letter("b")])
    async with receiving(bus) as receiver:
        for delivery in await receiver.receive(5, 0):
            await settle(receiver, delivery)
    assert await bus.peek() == []
    await bus.close()
    numbers += await bus.send([letter("c")])
    assert numbers == [1, 2, 3]


async def test_a_message_over_the_limit_is_refused_with_its_size_and_the_limit(open_bus):
    app = Boilermaker(None, open_bus(max_message_bytes=1000))

    @app.task
    async def store(state, text): ...

    await store.delay("x" * 100)
    with pytest.raises(MessageTooLarge, match=r"makes a message of \d{4} bytes, the limit is 1000"):
        await store.delay("x" * 1000)
    with pytest.raises(MessageTooLarge, match="callbacks"):
        await app.publish_task(store.si("x" * 100) | store.si("x" * 100) | store.si("x" * 100) | store.si("x" * 100))
    assert len(await app.service_bus_client.peek()) == 1


async def test_peek_shows_what_waits_is_locked_or_scheduled_without_locking(open_bus):
    bus = open_bus()
    before = time.time()
    await bus.send([letter("locked"), letter("waiting"), letter("scheduled", due=before + 100)])
    async with receiving(bus) as receiver:
        await receiver.receive(1, 0)
        locked, waiting, scheduled = await bus.peek()
        assert await bus.peek() == [locked, waiting, scheduled]
        assert len(await receiver.receive(5, 0)) == 1
    assert [message.body for message in (locked, waiting, scheduled)] == ["locked", "waiting", "scheduled"]
    assert [message.message_id for message in (locked, waiting)] == ["locked", "waiting"]
    assert [message.sequence_number for message in (locked, waiting, scheduled)] == [1, 2, 3]
    assert [message.delivery_count for message in (locked, waiting, scheduled)] == [1, 0, 0]
    assert before <= waiting.enqueued_time_utc.timestamp() <= time.time()
    assert waiting.enqueued_time_utc.tzinfo is datetime.UTC
    assert waiting.scheduled_enqueue_time_utc is None
    assert scheduled.scheduled_enqueue_time_utc.timestamp() == pytest.approx(before + 100, abs=0.001)
    assert (waiting.dead_letter_reason, waiting.dead_letter_error_description) == (None, None)


async def test_peek_shows_as_many_as_asked_for_the_first_ones(open_bus):
    bus = open_bus()
    await bus.send([letter(str(number)) for number in range(150)])
    assert await bus.peek(3) == (await bus.peek())[:3]
    assert [message.body for message in await bus.peek()] == [str(number) for number in range(100)]


@pytest.mark.parametrize("few", [1, boilermaker.FEW])
@pytest.mark.parametrize("between", [0, 10, 100])
async def test_peek_finds_the_messages_of_a_queue_however_many_of_others_are_between(
    open_bus, between, few, monkeypatch
):
    monkeypatch.setattr(boilermaker, "FEW", few)
    bus, others = open_bus(), [letter("other", queue="other")] * between
    for number in range(4):
        await bus.send([letter(str(number)), *others])
    shown = await bus.peek(2)
    assert [message.body for message in shown] == ["0", "1"]
    shown = await bus.peek(2, sequence_number=shown[-1].sequence_number + 1)
    assert [message.body for message in shown] == ["2", "3"]
    assert [message.body for message in await bus.peek(2, sequence_number=shown[-1].sequence_number)] == ["3"]


async def test_to_peek_takes_no_longer_in_a_long_queue(open_bus, monkeypatch):
    """By the instructions of SQLite's machine, in hundreds."""
    bus, counts, connect = open_bus(), [], boilermaker.connect

    def counting(path, mode=None):
        connection = connect(path, mode)
        connection.set_progress_handler(lambda: counts.append(1), 100)
        return connection

    async def cost():
        counts.clear()
        assert len(await bus.peek(5)) == 5
        return len(counts)

    monkeypatch.setattr(boilermaker, "connect", counting)
    await bus.send([letter(str(number)) for number in range(200)])
    short = await cost()
    await bus.send([letter(str(number)) for number in range(5000)])
    assert await cost() <= short + 10


@pytest.mark.parametrize("count", [0, -1, 2.5, None, "3"])
async def test_peeking_at_no_number_of_messages_is_an_error_that_shows_it(open_bus, count):
    for bus in (open_bus(), AzureServiceBus(NAMESPACE, "q", object())):
        with pytest.raises(UsageError, match=f"max_message_count={count!r} "):
            await bus.peek(count)


async def test_peek_shows_text_whatever_the_body_is(open_bus):
    bus = open_bus()
    await bus.send(
        [letter(b"caf\xc3\xa9", message_id="1"), letter(b"\xff", message_id="2"), letter("", message_id="3")]
    )
    assert [message.body for message in await bus.peek()] == ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "\ufffd", ""]


async def test_application_properties_travel_with_the_message(open_bus):
    bus = open_bus()
    await bus.send([boilermaker.Outgoing("a", "a", "tasks", None, {"traceparent": "00-1"})])
    [seen] = await bus.peek()
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, 0)
    assert seen.application_properties == delivery.application_properties == {"traceparent": "00-1"}


async def test_a_cancelled_receive_leaves_nothing_locked(open_bus):
    bus = open_bus(lock_duration=3600, max_delivery_count=None)
    async with receiving(bus) as receiver:
        for turn in range(60):
            waiting = asyncio.create_task(receiver.receive(1, PATIENCE))
            for _ in range(turn % 6):
                await asyncio.sleep(0)
            sending = asyncio.create_task(bus.send([letter("a")]))
            for _ in range(turn % 10):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting, sending])
            received = [] if waiting.cancelled() else waiting.result()
            received += await receiver.receive(5, 0)
            assert [delivery.body for delivery in received] == ["a"]
            await settle(receiver, received[0])


@pytest.mark.parametrize("turns", range(8))
async def test_a_receive_that_is_cancelled_with_messages_there_gives_them_back(open_bus, turns):
    bus = open_bus(lock_duration=3600)
    await bus.send([letter("a"), letter("b")])
    async with receiving(bus) as receiver:
        waiting = asyncio.create_task(receiver.receive(2, PATIENCE))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        received = [] if waiting.cancelled() else waiting.result()
        received += await receiver.receive(2, 0)
    assert [delivery.body for delivery in received] == ["a", "b"]


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancelled_receive_ends_whatever_is_committed_at_that_moment(open_bus, turns):
    bus = open_bus()
    async with receiving(bus) as receiver:
        waiting = asyncio.create_task(receiver.receive(1, PATIENCE))
        await asyncio.sleep(0.02)
        sending = asyncio.create_task(bus.send([letter("a", queue="other")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await sending
        done, _ = await asyncio.wait([waiting], timeout=5)
        assert done, "receive() goes on"
    assert waiting.cancelled()


async def test_a_bus_can_be_used_again_after_closing(open_bus):
    bus = open_bus()
    await bus.send([letter("a")])
    await bus.close()
    await bus.close()
    await bus.send([letter("b")])
    assert await ids_of(bus) == ["a", "b"]


async def test_closing_the_application_ends_its_workers_first(open_bus):
    app, begun, go = Boilermaker([], open_bus()), asyncio.Event(), asyncio.Event()

    @app.task
    async def slow(state):
        begun.set()
        await go.wait()
        state.append("ended")

    await slow.delay()
    worker = asyncio.create_task(app.run())
    await begun.wait()
    closing = asyncio.create_task(app.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    go.set()
    await closing
    assert app.state == ["ended"]
    await worker
    assert await ids_of(app.service_bus_client) == []


async def test_a_bus_that_is_closed_under_a_worker_is_an_error_that_ends_it(open_bus, caplog, monkeypatch):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.1)
    app = Boilermaker(None, open_bus()).register_async(parse_page)
    worker = asyncio.create_task(app.run())
    await until(lambda: app.workers)
    await app.service_bus_client.send([letter("a", queue="other")])
    await app.service_bus_client.close()
    with pytest.raises(UsageError, match=r"closed under a worker: app\.close\(\) ends its workers first"):
        await worker
    assert "cannot go on" in caplog.text


def test_a_bus_can_be_used_by_one_event_loop_after_the_other(tmp_path):
    bus = LocalServiceBus(tmp_path / "queue.db")
    assert asyncio.run(bus.send([letter("a")])) == [1]
    assert asyncio.run(bus.send([letter("b")])) == [2]
    assert asyncio.run(ids_of(bus)) == ["a", "b"]
    asyncio.run(bus.close())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere any commit wakes")
async def test_a_receiver_that_waits_hears_of_what_is_sent_once_and_not_of_what_is_completed(open_bus, monkeypatch):
    heard = []

    add_reader = asyncio.get_running_loop().add_reader
    monkeypatch.setattr(
        asyncio.get_running_loop(), "add_reader", lambda fd, f, *a: add_reader(fd, lambda: (heard.append(fd), f(*a)))
    )
    bus, other = open_bus(), open_bus()
    await other.send([letter("a")])
    async with receiving(other) as busy, receiving(bus) as idle:
        [held] = await busy.receive(1, PATIENCE)
        waiting = asyncio.create_task(idle.receive(1, PATIENCE))
        await asyncio.sleep(0.1)
        heard.clear()
        assert await settle(busy, held) is None
        await asyncio.sleep(0.1)
        assert heard == []
        await other.send([letter("b")])
        [received] = await waiting
    assert received.body == "b"
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("queue", "settlement"),
    [
        ("tasks", {"action": ABANDON}),
        (f"tasks{boilermaker.DEAD_LETTER_SUFFIX}", {"action": DEAD_LETTER}),
        ("others", {"messages": [letter("b", queue="others")]}),
    ],
    ids=["given back", "dead-lettered", "followed elsewhere"],
)
async def test_a_receiver_that_waits_hears_of_what_a_settlement_leaves_to_it(open_bus, queue, settlement):
    bus, others = open_bus(lock_duration=3600), open_bus(queue_name=queue, lock_duration=3600)
    await bus.send([letter("a")])
    async with receiving(bus) as busy, receiving(others) as idle:
        [held] = await busy.receive(1, PATIENCE)
        waiting = asyncio.create_task(idle.receive(1, 3600))
        await asyncio.sleep(0.1)
        assert await settle(busy, held, **settlement) is None
        await until(waiting.done)
        assert len(waiting.result()) == 1


@pytest.mark.parametrize("setting", [{"max_delivery_count": 1}, {"time_to_live": 0.01}], ids=["too often", "too old"])
async def test_a_receiver_of_dead_letters_hears_of_one_that_somebody_else_finds_while_receiving(open_bus, setting):
    bus = open_bus(lock_duration=0.05, **setting)
    dead_letters = open_bus(queue_name=f"tasks{boilermaker.DEAD_LETTER_SUFFIX}")
    await bus.send([letter("a")])
    if "max_delivery_count" in setting:
        await take_and_drop(bus)
    async with receiving(bus) as receiver, receiving(dead_letters) as idle:
        waiting = asyncio.create_task(idle.receive(1, 3600))
        await asyncio.sleep(0.1)
        assert await receiver.receive(1, 0) == []
        await until(waiting.done)
        assert [delivery.body for delivery in waiting.result()] == ["a"]


def opened_in(folder):
    """The descriptors that this process has open on files of a folder."""
    descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return [path for one in descriptors if os.path.exists(one) and str(folder) in (path := os.readlink(one))]


LIKE_LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists the open files as Linux does")


@LIKE_LINUX
def test_a_bus_that_is_forgotten_lets_go_of_its_file(tmp_path):
    def forget():
        bus = LocalServiceBus(tmp_path / "queue.db")
        asyncio.run(bus.send([letter("a")]))
        assert opened_in(tmp_path)

    forget()
    gc.collect()
    assert opened_in(tmp_path) == []


@LIKE_LINUX
@pytest.mark.parametrize("turns", range(4))
async def test_a_close_that_is_cancelled_closes_all_the_same(open_bus, tmp_path, turns):
    bus = open_bus()
    await bus.send([letter("a")])
    assert opened_in(tmp_path)
    closing = asyncio.create_task(bus.close())
    for _ in range(turns):
        await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    await bus.close()
    await until(lambda: not opened_in(tmp_path))


async def test_a_sqlite_that_is_too_old_is_named_with_what_is_needed(open_bus, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 23, 1))
    with pytest.raises(ConfigurationError, match=r"too old: boilermaker needs 3\.24"):
        await open_bus().peek()


async def test_a_file_that_cannot_be_opened_for_now_is_tried_again(open_bus, monkeypatch):
    opens, tries = os.open, []

    def crowded(path, *arguments, **options):
        if str(path).endswith("-wal") and len(tries) < 2:
            tries.append(path)
            raise OSError(24, "Too many open files")
        return opens(path, *arguments, **options)

    monkeypatch.setattr(os, "open", crowded)
    app = Boilermaker(None, open_bus())
    with pytest.raises(BoilermakerAppException, match=r"queue\.db cannot be opened: .*Too many open files"):
        await app.send_task("work")
    await app.send_task("work", publish_attempts=2)
    assert len(tries) == 2


def test_the_locks_of_an_event_loop_that_was_closed_are_not_kept(tmp_path):
    bus = LocalServiceBus(tmp_path / "queue.db", lock_duration=0.2)
    app = Boilermaker([], bus)

    @app.task
    async def slow(state):
        state.append("ran")
        await asyncio.sleep(PATIENCE)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(slow.delay())
    worker = loop.create_task(app.run())  # a reference, or it would be noticed that it never ended
    loop.call_later(0.1, loop.stop)
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False
    loop.close()

    async def take():
        async with receiving(bus) as receiver:
            [delivery] = await receiver.receive(1, PATIENCE)
            await settle(receiver, delivery)
        await bus.close()

    assert app.state == ["ran"]
    asyncio.run(asyncio.wait_for(take(), PATIENCE))
    assert not worker.done()


@pytest.mark.parametrize("turns", range(6))
async def test_closing_while_something_is_sent_leaves_nobody_waiting(open_bus, turns):
    bus = open_bus()
    await bus.send([letter("a")])
    sending = asyncio.create_task(bus.send([letter("b")]))
    for _ in range(turns):
        await asyncio.sleep(0)
    await bus.close()
    done, _ = await asyncio.wait([sending], timeout=5)
    assert done, "send() hangs"
    if sending.exception() is None:
        assert await ids_of(bus) == ["a", "b"]
    else:
        assert isinstance(sending.exception(), BoilermakerError)


async def test_a_queue_in_memory_has_it_all_and_is_its_own(open_bus):
    bus, other = open_bus(path=":memory:"), open_bus(path=":memory:")
    await bus.send([letter("a"), letter("b", due=time.time() + 0.1)])
    async with receiving(bus) as receiver:
        [first] = await receiver.receive(5, 0)
        assert await settle(receiver, first, messages=[letter("c")]) is None
        later = [(await receiver.receive(1, PATIENCE))[0].body for _ in range(2)]
    assert later == ["c", "b"]
    assert await other.peek() == []


async def test_a_queue_in_memory_leaves_no_file(open_bus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    await open_bus(path=":memory:").send([letter("a")])
    assert os.listdir(tmp_path) == []


async def test_a_queue_file_may_be_a_symbolic_link(open_bus, tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "queue.db")
    linked = open_bus(path=tmp_path / "link.db")
    await linked.send([letter("a")])
    assert await ids_of(open_bus()) == ["a"]


async def test_a_bus_stays_with_its_file_when_the_working_directory_changes(open_bus, tmp_path, monkeypatch):
    monkeypatch.setattr(boilermaker, "CHECKPOINT_BYTES", 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    bus = open_bus(path="queue.db")
    await bus.send([letter("a")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(20):
        await bus.send([letter("b")])
        await asyncio.sleep(0.005)
    await bus.close()
    assert await ids_of(open_bus(path=tmp_path / "queue.db")) == ["a"] + 20 * ["b"]
    assert os.listdir(tmp_path / "elsewhere") == []
    assert bus.path == "queue.db"


def test_path_and_queue_name_can_be_read(tmp_path):
    bus = LocalServiceBus(tmp_path / "queue.db", "orders")
    assert (bus.path, bus.queue_name) == (str(tmp_path / "queue.db"), "orders")
    assert (LocalServiceBus().path, LocalServiceBus().queue_name) == (":memory:", "tasks")
    assert not (tmp_path / "queue.db").exists()


# ======================================================================================================================
# Local bus: transactions
# ======================================================================================================================


@pytest.fixture
def transactions(monkeypatch):
    """The numbers of requests that were tried in one transaction."""
    sizes = []
    flush = boilermaker.GroupCommit._flush

    def counted(commit):
        sizes.append(len(commit._requests))
        flush(commit)

    monkeypatch.setattr(boilermaker.GroupCommit, "_flush", counted)
    return sizes


async def test_what_is_sent_at_the_same_time_is_committed_together(open_bus, transactions):
    bus = open_bus()
    await bus.send([letter("first")])
    transactions.clear()
    numbers = await asyncio.gather(*[bus.send([letter(str(number))]) for number in range(100)])
    assert numbers == [[number] for number in range(2, 102)]
    assert sum(transactions) == 100
    assert len(transactions) < 10


async def test_a_request_that_fails_does_not_take_its_neighbours_with_it(open_bus, transactions):
    bus = open_bus()
    await bus.send([letter("first")])
    transactions.clear()
    letters = [letter("a"), letter("bad", message_id="\ud800"), letter("c")]
    results = await asyncio.gather(*[bus.send([one]) for one in letters], return_exceptions=True)
    assert transactions == [3]
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert await ids_of(bus) == ["first", "a", "c"]


async def test_a_message_that_fails_takes_all_of_its_send_with_it(open_bus):
    bus = open_bus()
    with pytest.raises(ValueError, match="surrogates"):
        await bus.send([letter("a"), letter("bad", message_id="\ud800")])
    assert await bus.peek() == []


async def test_a_follow_up_that_can_never_be_sent_dead_letters_its_parent_and_leaves_its_neighbours(open_bus):
    bus = open_bus()
    await bus.send([letter("a"), letter("b")])
    async with receiving(bus) as receiver:
        parent, neighbour = await receiver.receive(2, 0)
        good = asyncio.ensure_future(settle(receiver, neighbour, messages=[letter("c")]))
        error = await settle(receiver, parent, messages=[letter("bad", message_id="\ud800")])
        assert isinstance(error, ValueError)
        assert await good is None
    assert await ids_of(bus) == ["c"]
    [message] = await bus.peek(dead_letter=True)
    assert (message.message_id, message.dead_letter_reason) == ("a", "FollowUpRejected")
    assert "surrogates" in message.dead_letter_error_description


@pytest.mark.parametrize("statement", ["complete", "insert"])
async def test_a_kill_between_publishing_and_settling_leaves_nothing_half_done(open_bus, start_program, statement):
    bus = open_bus(lock_duration=0.2)
    await bus.send([letter("parent")])
    program = start_program(
        """
import asyncio, os, signal, sys
import boilermaker
from boilermaker import Action, LocalServiceBus, Outgoing, Settlement, Store

original = getattr(Store, sys.argv[1])

def killing(*arguments):
    original(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    bus = LocalServiceBus("queue.db", lock_duration=0.2)
    receiver = await bus.open_receiver(lambda delivery: None, 60)
    [delivery] = await receiver.receive(1, 30)
    setattr(Store, sys.argv[1], killing)
    await receiver.settle([Settlement(delivery, Action.COMPLETE, messages=[Outgoing("child", "child", "tasks")])])

asyncio.run(main())
""",
        statement,
    )
    assert await exit_code(program) == -signal.SIGKILL
    assert await ids_of(bus) == ["parent"]
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(2, PATIENCE)
        assert delivery.delivery_count == 1
        assert await settle(receiver, delivery, messages=[letter("child")]) is None
    assert await ids_of(bus) == ["child"]


async def test_a_send_is_answered_when_it_is_on_the_disk_and_the_event_loop_does_not_wait(open_bus, monkeypatch):
    bus = open_bus()
    await bus.peek()
    slow_disk = threading.Event()
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda file: synced.append(slow_disk.wait(PATIENCE)), raising=False)
    sending = asyncio.create_task(bus.send([letter("a")]))
    for _ in range(20):
        await asyncio.sleep(0.005)
        assert await ids_of(bus) in ([], ["a"])
    assert not sending.done()
    slow_disk.set()
    assert await asyncio.wait_for(sending, PATIENCE) == [1]
    assert synced == [True]


async def test_the_event_loop_never_waits_for_a_disk_itself_however_quick_it_was(open_bus, monkeypatch):
    bus, threads = open_bus(), []
    monkeypatch.setattr(os, "fdatasync", lambda file: threads.append(threading.current_thread()), raising=False)
    for _ in range(10):
        await bus.send([letter()])
    assert len(threads) == 10
    assert threading.main_thread() not in threads


async def test_a_disk_that_cannot_sync_fails_the_send(open_bus, monkeypatch):
    def broken(file):
        raise OSError(5, "Input/output error")

    bus = open_bus()
    await bus.peek()
    monkeypatch.setattr(os, "fdatasync", broken, raising=False)
    with pytest.raises(ServiceBusUnavailable, match=r"queue\.db .*Input/output error"):
        await bus.send([letter("a")])


async def test_a_task_whose_early_completion_cannot_be_synced_does_not_run_and_the_log_says_why(
    open_bus, monkeypatch, caplog
):
    def broken(file):
        raise OSError(5, "Input/output error")

    app = Boilermaker([], open_bus())

    @app.task(acks_late=False)
    async def work(state):
        state.append("ran")

    await work.delay()
    monkeypatch.setattr(os, "fdatasync", broken, raising=False)
    await work_off(app)
    assert app.state == []
    assert "could not be synced to the disk: [Errno 5] Input/output error" in caplog.text
    assert "it will run again" not in caplog.text


async def test_after_a_disk_that_could_not_sync_the_log_is_written_to_the_file(open_bus, monkeypatch, tmp_path):
    def broken(file):
        raise OSError(5, "Input/output error")

    bus = open_bus()
    await bus.peek()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken, raising=False)
        with pytest.raises(ServiceBusUnavailable):
            await bus.send([letter("a")])
    await bus.send([letter("b")])
    shutil.copy(tmp_path / "queue.db", tmp_path / "copy.db")  # without the log
    assert await ids_of(open_bus(path=tmp_path / "copy.db")) == ["a"]
    assert await ids_of(bus) == ["a", "b"]


def test_a_failure_to_sync_is_met_by_all_event_loops_although_the_system_tells_only_one(monkeypatch, tmp_path):
    async def both():
        sending = [asyncio.to_thread(asyncio.run, bus.send([letter(name)])) for name in "bc"]
        return await asyncio.gather(*sending, return_exceptions=True)

    bus = LocalServiceBus(tmp_path / "queue.db")
    asyncio.run(bus.send([letter("a")]))
    both_are_there = threading.Barrier(2)
    sync = boilermaker.QueueFile.sync

    failed = threading.Lock()

    def fdatasync(file):
        if failed.acquire(blocking=False):
            raise OSError(5, "Input/output error")

    def sync_together(file):
        with contextlib.suppress(threading.BrokenBarrierError):
            both_are_there.wait(PATIENCE)
        sync(file)

    monkeypatch.setattr(os, "fdatasync", fdatasync, raising=False)
    monkeypatch.setattr(boilermaker.QueueFile, "sync", sync_together)
    results = asyncio.run(both())
    assert [type(result) for result in results] == [ServiceBusUnavailable] * 2
    both_are_there.abort()
    asyncio.run(bus.send([letter("d")]))
    assert sorted(asyncio.run(ids_of(bus))) == ["a", "b", "c", "d"]
    asyncio.run(bus.close())


async def test_closing_lets_go_of_the_file_even_if_the_disk_fails(open_bus, monkeypatch):
    def broken(file):
        raise OSError(5, "Input/output error")

    before = set(threading.enumerate())
    bus = open_bus()
    await bus.send([letter("a")])
    assert set(threading.enumerate()) - before
    monkeypatch.setattr(os, "fdatasync", broken, raising=False)
    with contextlib.suppress(ServiceBusUnavailable):
        await bus.close()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("boilermaker")]


async def test_the_log_stays_small_while_the_queue_is_in_use(open_bus, tmp_path, monkeypatch):
    monkeypatch.setattr(boilermaker, "CHECKPOINT_BYTES", 20_000)
    monkeypatch.setattr(boilermaker, "FULL_LOG_BYTES", 100_000)
    monkeypatch.setattr(boilermaker, "LOOK_BYTES", 0)
    bus, sent, sizes = open_bus(), [], []
    for turn in range(50):
        bodies = ["x" * 40_000] if turn % 2 else ["y"] * 40
        sent += await bus.send([letter(body, message_id=str(turn)) for body in bodies])
        sizes.append((tmp_path / "queue.db-wal").stat().st_size)
    assert max(sizes) < 100_000 + 70_000  # what one transaction adds to a log that is not full
    assert [message.sequence_number for message in await bus.peek(len(sent) + 1)] == sent
    async with receiving(bus) as receiver:
        assert len(await receiver.receive(len(sent) + 1, 0)) == len(sent)


def test_two_threads_with_an_event_loop_each_share_a_bus(tmp_path):
    bus = LocalServiceBus(tmp_path / "queue.db")
    app = Boilermaker([], bus)
    finished = threading.Event()

    @app.task
    async def collect(state, number):
        state.append((threading.current_thread().name, number))
        if len(state) == 200:
            finished.set()

    async def publish():
        for number in range(100):
            await asyncio.gather(collect.delay(number), collect.delay(-number))

    async def work():
        async with working(app):
            await until(finished.is_set)

    threads = [
        threading.Thread(target=lambda: asyncio.run(work()), name="worker"),
        threading.Thread(target=lambda: asyncio.run(publish()), name="publisher"),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert {name for name, _ in app.state} == {"worker"}
    assert sorted(number for _, number in app.state) == sorted([*range(100), *range(0, -100, -1)])
    assert asyncio.run(bus.peek()) == []
    asyncio.run(bus.close())


@pytest.mark.parametrize("closes", [False, True], ids=["stays open", "closes"])
async def test_a_forked_child_loses_nothing_whatever_its_parent_does(open_bus, start_program, closes):
    program = start_program(
        """
import asyncio, multiprocessing, sys
from boilermaker import LocalServiceBus, Outgoing

bus = LocalServiceBus("queue.db")

def send(name):
    asyncio.run(bus.send([Outgoing("x", name, "tasks")]))

def child(sent, go):
    send("child")
    sent.set()
    assert go.wait(30)
    send("child again")

send("parent")
context = multiprocessing.get_context("fork")
sent, go = context.Event(), context.Event()
process = context.Process(target=child, args=(sent, go))
process.start()
assert sent.wait(30)
if sys.argv[1] == "True":
    asyncio.run(bus.close())
else:
    send("parent again")
go.set()
process.join(30)
sys.exit(process.exitcode)
""",
        closes,
    )
    assert await exit_code(program) == 0, program[1].read_text()
    expected = ["parent", "child", "child again"] + ["parent again"] * (not closes)
    assert sorted(await ids_of(open_bus())) == sorted(expected)


async def test_a_process_that_forks_while_it_opens_the_file_hangs_neither_itself_nor_its_child(open_bus, start_program):
    bus = open_bus()
    await bus.send([letter("first")])
    await bus.close()
    holder = sqlite3.connect(bus.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    process, output = start_program(
        """
import asyncio, os, threading, time
from boilermaker import LocalServiceBus, Outgoing

bus = LocalServiceBus("queue.db")

def send(name):
    asyncio.run(bus.send([Outgoing("x", name, "tasks")]))

thread = threading.Thread(target=send, args=["parent"])
thread.start()
time.sleep(0.3)
child = os.fork()
if child == 0:
    print("forked", flush=True)
    send("child")
    os._exit(0)
thread.join()
os.waitpid(child, 0)
"""
    )
    await until(lambda: "forked" in output.read_text())
    holder.execute("COMMIT")
    holder.close()
    assert await exit_code((process, output)) == 0, output.read_text()
    assert sorted(await ids_of(open_bus())) == ["child", "first", "parent"]


async def test_processes_that_open_and_close_the_file_all_the_time_never_see_it_locked(open_bus, start_program):
    source = """
import asyncio, sys
from boilermaker import LocalServiceBus, Outgoing

async def main():
    for number in range(60):
        bus = LocalServiceBus("queue.db")
        await bus.send([Outgoing("x", f"{sys.argv[1]}-{number}", "tasks")])
        await bus.close()

asyncio.run(main())
"""
    programs = [start_program(source, number) for number in range(4)]
    for program in programs:
        assert await exit_code(program) == 0, program[1].read_text()
    assert len(await open_bus().peek(1000)) == 240


# ======================================================================================================================
# Local bus: what is wrong with a file
# ======================================================================================================================


def not_a_database(path):
    path.write_text("This is a letter to my aunt, and not a database at all. " * 100)


def another_programs_database(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE recipe (name); INSERT INTO recipe VALUES ('soup')")


def a_newer_schema(path):
    asyncio.run(make_queue_file(path))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def a_directory(path):
    path.mkdir()


def a_missing_directory(path):
    path.parent.rmdir()


async def make_queue_file(path, *bodies):
    bus = LocalServiceBus(path)
    await bus.send([letter(body) for body in bodies])
    await bus.close()


FILE_ERRORS = [
    (not_a_database, r"is not a SQLite database: choose another path"),
    (another_programs_database, r"is the database of another program: choose another path"),
    (a_newer_schema, r"has schema version 99, .* newer one. Update boilermaker, or choose another path"),
    (a_directory, r"cannot be opened: it must be a file, in a directory that exists"),
    (a_missing_directory, r"cannot be opened: it must be a file, in a directory that exists"),
]


@pytest.mark.parametrize(("damage", "message"), FILE_ERRORS, ids=[damage.__name__ for damage, _ in FILE_ERRORS])
def test_a_file_that_cannot_hold_a_queue_is_an_error_that_names_it_and_the_way_out(tmp_path, damage, message):
    path = tmp_path / "folder" / "queue.db"
    path.parent.mkdir()
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    app = Boilermaker(None, LocalServiceBus(path))

    @app.task
    async def work(state): ...

    with pytest.raises(ConfigurationError, match=re.escape(str(path)) + " " + message):
        asyncio.run(app.service_bus_client.peek())
    with pytest.raises(ConfigurationError, match=message):
        asyncio.run(app.run(burst=True))
    with pytest.raises(BoilermakerAppException, match=message):
        asyncio.run(work.delay())
    asyncio.run(app.close())
    assert before is None or path.read_bytes() == before


@contextlib.contextmanager
def unprivileged():
    """Without root's right to write everywhere."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody may look into, other than tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)
        os.chmod(name, 0o755)


async def test_a_read_only_file_is_an_error_that_names_it_and_the_way_out(open_folder):
    path = open_folder / "queue.db"
    await make_queue_file(path, "a")
    path.chmod(0o444)
    open_folder.chmod(0o555)
    bus = LocalServiceBus(path)
    with unprivileged(), pytest.raises(ConfigurationError, match=re.escape(str(path)) + " .*writable"):
        await bus.send([letter("b")])
    open_folder.chmod(0o755)
    path.chmod(0o644)
    assert await ids_of(bus) == ["a"]
    await bus.close()


async def test_a_full_disk_is_an_error_and_nothing_is_lost(open_bus, connections):
    bus = open_bus()
    await bus.send([letter("a")])
    fill_the_disk(connections)
    with pytest.raises(ServiceBusUnavailable, match=re.escape(bus.path) + ": the disk is full.* free some space"):
        await send_for_ever(bus, "accepted")
    accepted = await ids_of(bus)
    with pytest.raises(ServiceBusUnavailable):
        await bus.send([letter("small"), letter("x" * 10_000, message_id="large")])
    assert await ids_of(bus) == accepted
    empty_the_disk(connections)
    await bus.send([letter("b")])
    assert await ids_of(bus) == [*accepted, "b"]


@pytest.fixture
def connections(monkeypatch):
    """The connections that are opened to queue files."""
    opened = []
    connect = boilermaker.connect

    def remembered(path, mode=None):
        connection = connect(path, mode)
        if mode is None:
            opened.append(connection)
        return connection

    monkeypatch.setattr(boilermaker, "connect", remembered)
    return opened


async def send_for_ever(bus, name):
    while True:
        await bus.send([letter("x" * 1000, message_id=name)])


def fill_the_disk(connections):
    (pages,) = connections[0].execute("PRAGMA page_count").fetchone()
    connections[0].execute(f"PRAGMA max_page_count = {pages + 3}")


def empty_the_disk(connections):
    connections[0].execute("PRAGMA max_page_count = 1000000")


@pytest.mark.parametrize("acks_late", [True, False])
async def test_a_worker_survives_a_full_disk_and_what_follows_is_published_later(
    open_bus, connections, monkeypatch, caplog, acks_late
):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.05)
    app = Boilermaker([], open_bus(lock_duration=0.3, max_delivery_count=None))

    @app.task(acks_late=acks_late)
    async def produce(state):
        if not state:
            fill_the_disk(connections)
        state.append("produced")
        return "x" * 100_000

    @app.task
    async def consume(state, text):
        state.append(len(text))

    task = produce.si()
    task.on_success = consume.s()
    await app.publish_task(task)
    async with working(app):
        await until(lambda: "disk is full" in caplog.text)
        assert 100_000 not in app.state
        empty_the_disk(connections)
        await until(lambda: 100_000 in app.state)
        await until(lambda: nothing_is_left(app.service_bus_client))
    assert acks_late or app.state.count("produced") == 1
    assert "never retrieved" not in caplog.text


async def nothing_is_left(bus):
    return await bus.peek() == []


HOLD_THE_WRITE_LOCK = """
import os, pathlib, sqlite3, time
connection = sqlite3.connect("queue.db", isolation_level=None, timeout=30)
connection.execute("BEGIN IMMEDIATE")
pathlib.Path("locked").touch()
while not os.path.exists("release"):
    time.sleep(0.01)
connection.execute("ROLLBACK")
"""


@pytest.mark.parametrize("notified", [True, False], ids=["notified", "polling"])
async def test_a_process_that_holds_the_write_lock_does_not_stall_the_event_loop(
    open_bus, start_program, tmp_path, monkeypatch, caplog, notified
):
    if not notified:
        monkeypatch.setattr(boilermaker, "_inotify", lambda path: None)
    monkeypatch.setattr(boilermaker, "LOCK_PATIENCE", 10)
    app = Boilermaker([], open_bus(lock_duration=0.2, max_delivery_count=None))

    @app.task
    async def work(state, number):
        state.append(number)

    async with working(app):
        await work.delay(0)
        await until(lambda: app.state == [0])
        program = start_program(HOLD_THE_WRITE_LOCK)
        await until((tmp_path / "locked").exists)
        publishing = [asyncio.create_task(work.delay(number)) for number in range(1, 4)]
        for _ in range(60):
            await asyncio.sleep(0.01)
        assert app.state == [0]
        assert not any(publish.done() for publish in publishing)
        (tmp_path / "release").touch()
        await asyncio.gather(*publishing)
        await until(lambda: len(app.state) == 4)
    assert await exit_code(program) == 0
    assert sorted(app.state) == [0, 1, 2, 3]
    assert "locked" not in caplog.text


async def test_a_write_lock_that_is_never_released_is_an_error_after_a_while(
    open_bus, start_program, tmp_path, monkeypatch
):
    bus = open_bus()
    await bus.peek()
    monkeypatch.setattr(boilermaker, "LOCK_PATIENCE", 1)
    start_program(HOLD_THE_WRITE_LOCK)
    await until((tmp_path / "locked").exists)
    with pytest.raises(ServiceBusUnavailable, match=r"locked .*queue\.db"):
        await bus.send([letter("a")])
    monkeypatch.setattr(boilermaker, "LOCK_PATIENCE", PATIENCE)
    (tmp_path / "release").touch()
    await bus.send([letter("b")])
    assert await ids_of(bus) == ["b"]


async def test_publish_attempts_end_in_an_error_that_holds_each_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    await make_queue_file(folder / "queue.db")
    shutil.rmtree(folder)
    app = Boilermaker(None, LocalServiceBus(folder / "queue.db"))

    @app.task
    async def work(state): ...

    with pytest.raises(BoilermakerAppException, match=re.escape(str(folder))) as caught:
        await app.apply_async(work, publish_attempts=3)
    assert [type(error) for error in caught.value.errors] == [ConfigurationError] * 3


async def test_publish_attempts_go_on_until_one_works(tmp_path, caplog):
    folder = tmp_path / "folder"
    app = Boilermaker(None, LocalServiceBus(folder / "queue.db"))

    @app.task
    async def work(state): ...

    publishing = asyncio.create_task(app.apply_async(work, publish_attempts=10))
    await until(lambda: "attempt 1 of 10" in caplog.text)
    folder.mkdir()
    task = await publishing
    assert await ids_of(app.service_bus_client) == [task.task_id]
    await app.close()


async def test_publishing_into_a_file_that_was_deleted_is_an_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    app = Boilermaker(None, LocalServiceBus(folder / "queue.db"))

    @app.task
    async def work(state): ...

    await work.delay()
    shutil.rmtree(folder)
    with pytest.raises(BoilermakerAppException, match=re.escape(str(folder / "queue.db"))):
        await work.delay()
    await app.close()


@pytest.mark.parametrize("name", ["queue.db", "queue.db-wal"])
async def test_publishing_into_a_file_of_which_a_part_is_gone_is_an_error(open_bus, tmp_path, name):
    bus = open_bus()
    await bus.send([letter("a")])
    (tmp_path / name).unlink()
    with pytest.raises(ServiceBusUnavailable, match=r"queue\.db"):
        await bus.send([letter("b")])


# ======================================================================================================================
# Worker: what happens to a message
# ======================================================================================================================


def table_app(bus):
    """An application with a task for each row of the table; its state is what ran."""
    app = Boilermaker([], bus)

    @app.task
    async def note(state, *values):
        state.append((current_task().message_id, *values))

    async def returns(state):
        state.append("ran")
        return 42

    async def gives_up(state):
        state.append("ran")
        return TaskFailureResult

    async def raises(state):
        state.append("ran")
        raise ValueError("it is broken")

    async def asks_again(state):
        state.append("ran")
        raise RetryException("come back later")

    app.register_many_async([returns, gives_up, raises, asks_again])
    functions = {function.__name__: function for function in (returns, gives_up, raises, asks_again)}
    return app, functions, note


TABLE = [
    ("returns", {}, None, None, "success"),
    ("gives_up", {}, "TaskFailed", "TaskFailureResult", "failure"),
    ("raises", {}, "TaskFailed", "ValueError: it is broken", "failure"),
    ("asks_again", {"policy": NoRetry()}, "RetriesExhausted", "come back later", "failure"),
    ("returns", {"should_dead_letter": False}, None, None, "success"),
    ("gives_up", {"should_dead_letter": False}, None, None, "failure"),
    ("raises", {"should_dead_letter": False}, None, None, "failure"),
    ("asks_again", {"should_dead_letter": False, "policy": NoRetry()}, None, None, "failure"),
    ("returns", {"acks_late": False}, None, None, "success"),
    ("gives_up", {"acks_late": False}, None, None, "failure"),
    ("raises", {"acks_late": False}, None, None, "failure"),
    ("asks_again", {"acks_late": False, "policy": NoRetry()}, None, None, "failure"),
]


@pytest.mark.parametrize(("function", "options", "reason", "description", "follows"), TABLE)
async def test_a_worker_settles_and_publishes_as_the_table_says(
    new_bus, function, options, reason, description, follows
):
    app, functions, note = table_app(new_bus())
    task = Task.si(functions[function], **options)
    task.on_success, task.on_failure = note.si("success"), note.si("failure")
    await app.publish_task(task)
    await work_off(app)
    first, (message_id, followed) = app.state
    assert (first, followed) == ("ran", follows)
    assert message_id not in (task.task_id, task.on_success.task_id, task.on_failure.task_id)
    assert await ids_of(app.service_bus_client) == []
    dead = await app.service_bus_client.peek(dead_letter=True)
    assert [letter.dead_letter_reason for letter in dead] == ([reason] if reason else [])
    assert [letter.message_id for letter in dead] == ([task.task_id] if reason else [])
    assert all(description in letter.dead_letter_error_description for letter in dead)


async def test_what_follows_has_one_id_by_its_parents_for_success_and_failure_alike(open_bus, tmp_path):
    ids = []
    for number, function in enumerate(["returns", "raises", "gives_up"]):
        app, functions, note = table_app(open_bus(path=tmp_path / f"{number}.db"))
        task = Task.si(functions[function])
        task.task_id = "the-same"
        task.on_success, task.on_failure = note.si(), note.si()
        await app.publish_task(task)
        await work_off(app)
        ids.append(app.state[1][0])
    assert len(set(ids)) == 1
    assert "the-same" not in ids


async def test_one_callback_under_two_parents_is_enqueued_twice(open_bus):
    app, functions, note = table_app(open_bus(duplicate_detection=60))
    callback = note.si()
    for _ in range(2):
        task = Task.si(functions["returns"])
        task.on_success = callback
        await app.publish_task(task)
    await work_off(app)
    assert len({entry for entry in app.state if entry != "ran"}) == 2


async def test_a_message_id_is_never_longer_than_128_characters(new_bus):
    app = Boilermaker([], new_bus())

    @app.task(policy=RetryPolicy(max_tries=12, delay=0))
    async def again(state):
        task = current_task()
        state.append(task.message_id)
        if task.attempts.attempts < 11:
            raise RetryException("again")

    task = again.si()
    task.task_id = "i" * 128
    task.on_success = again.si()
    await app.publish_task(task)
    await work_off(app)
    assert len(set(app.state)) == 24
    assert max(map(len, app.state)) <= 128


async def test_a_retry_is_a_copy_with_one_attempt_more_scheduled_after_the_delay(new_bus):
    app, functions, note = table_app(new_bus())
    task = Task.si(functions["asks_again"], policy=RetryPolicy(max_tries=3, delay=30))
    task.on_success, task.on_failure = note.si("success"), note.si("failure")
    await app.publish_task(task)
    before = time.time()
    await work_off(app)
    [message] = await app.service_bus_client.peek()
    assert before + 30 <= message.scheduled_enqueue_time_utc.timestamp() + 0.001 <= time.time() + 30.002
    document = json.loads(message.body)
    assert (document["task_id"], document["attempts"]["attempts"]) == (task.task_id, 1)
    assert message.message_id == f"{document['root']}:1"
    assert uuid.UUID(document["root"]).version == 5
    assert document["on_failure"]["payload"]["args"] == ["failure"]
    assert app.state == ["ran"]
    assert await ids_of(app.service_bus_client, dead_letter=True) == []


@pytest.mark.parametrize("acks_late", [True, False])
async def test_retries_end_after_max_tries_runs_and_then_on_failure_follows_at_once(open_bus, acks_late):
    with moved_clock() as clock:
        app = Boilermaker([], open_bus())

        @app.task(policy=RetryPolicy(max_tries=3, delay=30), acks_late=acks_late)
        async def again(state):
            task = current_task()
            state.append((task.message_id, task.attempts.attempts))
            raise RetryException("not yet")

        @app.task
        async def mourn(state, failure):
            state.append(failure["attempts"])

        task = again.si()
        task.on_failure = mourn.s()
        await app.publish_task(task)
        for runs in (1, 2, 4, 4):
            await work_off(app)
            assert len(app.state) == runs
            clock.tick(31)
        first = boilermaker.Delivery(1, 0, task.task_id, "", {}, 0)
        root = root_of(first, "tasks")
        assert app.state == [(task.task_id, 0), (f"{root}:1", 1), (f"{root}:2", 2), 3]
        dead = await app.service_bus_client.peek(dead_letter=True)
        assert [(letter.message_id, letter.dead_letter_reason) for letter in dead] == (
            [(f"{root}:2", "RetriesExhausted")] if acks_late else []
        )


async def test_a_task_that_may_not_run_even_once_does_not(new_bus):
    app, functions, note = table_app(new_bus())
    task = Task.si(functions["returns"], policy=RetryPolicy(max_tries=0))
    task.on_failure = note.si("failure")
    await app.publish_task(task)
    await work_off(app)
    assert [entry[1] for entry in app.state] == ["failure"]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "RetriesExhausted"


@pytest.mark.parametrize("by_name", [False, True], ids=["by function", "by name"])
@pytest.mark.parametrize(
    ("scheduled", "raised", "runs"),
    [(None, None, 2), (3, None, 3), (None, 4, 4), (3, 4, 4), (4, 1, 1)],
)
async def test_the_exceptions_policy_comes_before_schedulings_before_registrations(
    open_bus, scheduled, raised, runs, by_name
):
    app = Boilermaker([], open_bus())
    policies = {tries: RetryPolicy(max_tries=tries, delay=0) for tries in range(1, 6)} | {None: None}

    @app.task(policy=policies[2])
    async def again(state):
        state.append("ran")
        raise RetryException("again", policy=policies[raised])

    if by_name:
        await app.send_task("again", policy=policies[scheduled])
    else:
        await app.apply_async(again, policy=policies[scheduled])
    await work_off(app)
    assert len(app.state) == runs
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "RetriesExhausted"


async def test_with_acks_late_off_the_message_is_gone_before_the_function_runs(new_bus):
    app = Boilermaker([], new_bus())

    @app.task(acks_late=False)
    async def look(state):
        state.append(await ids_of(app.service_bus_client))

    @app.task
    async def look_late(state):
        state.append(await ids_of(app.service_bus_client))

    await look.delay()
    await work_off(app)
    task = await look_late.delay()
    await work_off(app)
    assert app.state == [[], [task.task_id]]


@pytest.mark.parametrize("acks_late", [True, False])
async def test_an_unregistered_function_is_dead_lettered_and_on_failure_follows(new_bus, acks_late):
    app = Boilermaker([], new_bus())

    @app.task
    async def mourn(state, failure):
        state.append(failure)

    task = Task(function_name="nobody_knows", acks_late=acks_late)
    task.on_success, task.on_failure = mourn.s(), mourn.s()
    await app.publish_task(task)
    await work_off(app)
    [failure] = app.state
    assert (failure["task_id"], failure["function_name"], failure["attempts"]) == (task.task_id, "nobody_knows", 0)
    assert "nobody_knows" in failure["message"]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "UnregisteredFunction"
    assert "nobody_knows" in dead.dead_letter_error_description


HOSTILE_BODIES = {
    "empty": "",
    "empty bytes": b"",
    "not JSON": "hello",
    "half": '{"task_id": "1", "function_name": "neighbour"',
    "invalid UTF-8": b'{"task_id": "\xff", "function_name": "neighbour"}',
    "an array": "[]",
    "null": "null",
    "a number": "7",
    "a string": '"neighbour"',
    "100,000 brackets": "[" * 100_000,
    "100,000 objects": '{"on_success":' * 100_000,
    "a number of 10,000 digits": '{"task_id": "1", "function_name": "neighbour", "x": ' + "9" * 10_000 + "}",
    "no function_name": '{"task_id": "1"}',
    "no task_id": '{"function_name": "neighbour"}',
} | {
    f"{name} = {value}": json.dumps({"task_id": "1", "function_name": "neighbour", name: value})
    for name, value in [
        ("task_id", 7),
        ("function_name", ["neighbour"]),
        ("function_name", {}),
        ("payload", []),
        ("payload", "x"),
        ("payload", {"args": {}}),
        ("payload", {"kwargs": []}),
        ("payload", {"args": [float("nan")]}),
        ("attempts", 3),
        ("attempts", {"attempts": -1}),
        ("attempts", {"attempts": 10**30}),
        ("attempts", {"attempts": "1"}),
        ("attempts", {"attempts": 1.5}),
        ("attempts", {"attempts": True}),
        ("attempts", {"attempts": 0, "last_retry": "yesterday"}),
        ("attempts", {"attempts": 0, "last_retry": 7}),
        ("policy", "often"),
        ("policy", {}),
        ("policy", {"max_tries": 101, "delay": 0, "delay_max": 0, "retry_mode": 0}),
        ("policy", {"max_tries": -1, "delay": 0, "delay_max": 0, "retry_mode": 0}),
        ("policy", {"max_tries": [], "delay": 0, "delay_max": 0, "retry_mode": 0}),
        ("policy", {"max_tries": 1, "delay": 10**30, "delay_max": 0, "retry_mode": 0}),
        ("policy", {"max_tries": 1, "delay": 0, "delay_max": 1.5, "retry_mode": 0}),
        ("policy", {"max_tries": 1, "delay": 0, "delay_max": 0, "retry_mode": 9}),
        ("should_dead_letter", "yes"),
        ("acks_late", 0),
        ("on_success", "neighbour"),
        ("on_failure", []),
        ("on_failure", {"task_id": "2", "function_name": 7}),
        ("graph_id", 7),
    ]
}


async def test_bodies_that_are_no_task_are_dead_lettered_while_their_neighbours_run(new_bus):
    app = Boilermaker([], new_bus())
    bus = app.service_bus_client
    bodies = [
        body for body in HOSTILE_BODIES.values() if len(body) < bus.max_message_bytes or bus.system != "servicebus"
    ]
    names = [str(number) for number in range(len(bodies))]

    @app.task
    async def neighbour(state, name):
        state.append(name)

    for name, body in zip(names, bodies, strict=True):
        await bus.send([letter(body, message_id=name, queue=bus.queue_name)])
        await neighbour.delay(name)
    await work_off(app, concurrency=3)
    assert sorted(app.state) == sorted(names)
    dead = await bus.peek(1000, dead_letter=True)
    assert [letter.message_id for letter in dead] == names
    assert {letter.dead_letter_reason for letter in dead} == {"InvalidTaskFormat"}
    assert all(10 < len(letter.dead_letter_error_description) <= 4096 for letter in dead)
    assert await ids_of(bus) == []


@pytest.mark.parametrize("payload", [{"args": [1, 2, 3]}, {"kwargs": {"colour": "red"}}, {"kwargs": {"state": 1}}])
async def test_arguments_that_do_not_fit_fail_the_task(open_bus, payload):
    app = Boilermaker([], open_bus())

    @app.task
    async def work(state, number=0): ...

    await app.publish_task(Task.default("work", payload=payload))
    await work_off(app)
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "TaskFailed"
    assert "TypeError" in dead.dead_letter_error_description


class Rude(BaseException):
    """What derives from no Exception."""

    def __str__(self):
        raise ValueError("no text either")


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError("by myself"), Rude(), StopAsyncIteration()])
async def test_whatever_a_task_raises_the_worker_goes_on(open_bus, error):
    app = Boilermaker([], open_bus())

    @app.task
    async def explode(state):
        raise error

    @app.task
    async def neighbour(state, failure=None):
        state.append(failure and failure["error"])

    task = explode.si()
    task.on_failure = neighbour.s()
    await app.publish_many([task, neighbour.si()])
    await work_off(app, concurrency=1)
    assert app.state == [None, type(error).__name__]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "TaskFailed"
    assert type(error).__name__ in dead.dead_letter_error_description


async def test_a_task_that_raises_keyboard_interrupt_does_not_end_the_worker(open_bus, start_program):
    bus = open_bus()
    program = start_program("""
import asyncio
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("queue.db"))

@app.task
async def interrupt(state):
    raise KeyboardInterrupt

@app.task
async def neighbour(state):
    print("the neighbour ran")

async def main():
    async with app:
        await app.publish_many([interrupt.si(), neighbour.si()])
        await app.run(burst=True, concurrency=1)

asyncio.run(main())
""")
    assert await exit_code(program) == 0, program[1].read_text()
    assert "the neighbour ran" in program[1].read_text()
    [dead] = await bus.peek(dead_letter=True)
    assert "KeyboardInterrupt" in dead.dead_letter_error_description


async def test_a_task_that_cancels_itself_has_failed(new_bus):
    app = Boilermaker([], new_bus())

    @app.task
    async def suicidal(state, then_wait):
        asyncio.current_task().cancel()
        if then_wait:
            await asyncio.sleep(0)

    await suicidal.delay(True)
    await suicidal.delay(False)
    await work_off(app)
    assert await ids_of(app.service_bus_client) == []
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert "CancelledError" in dead.dead_letter_error_description


async def test_boilermaker_servicebuss_debug_task_completes(new_bus):
    app = Boilermaker(None, new_bus())
    body = {
        "task_id": "1",
        "should_dead_letter": True,
        "acks_late": True,
        "function_name": "debug_task",
        "attempts": {"attempts": 0, "last_retry": "2025-01-01T00:00:00Z"},
        "payload": {"args": [], "kwargs": {}},
        "policy": {"max_tries": 1, "delay": 5, "delay_max": 5, "retry_mode": 0},
        "on_success": None,
        "on_failure": None,
        "graph_id": None,
    }
    await app.service_bus_client.send(
        [letter(json.dumps(body), message_id="1", queue=app.service_bus_client.queue_name)]
    )
    await work_off(app)
    assert await ids_of(app.service_bus_client) == await ids_of(app.service_bus_client, dead_letter=True) == []


async def test_current_task_is_the_one_that_runs_and_an_error_elsewhere(new_bus):
    app = Boilermaker({}, new_bus())

    @app.task
    async def look(state, number):
        await asyncio.sleep(0)
        state[number] = current_task()

    tasks = [await look.delay(number) for number in range(5)]
    await work_off(app)
    for number, task in enumerate(tasks):
        seen = app.state[number]
        assert (seen.task_id, seen.args) == (task.task_id, [number])
        assert task.sequence_number in (None, seen.sequence_number), "which a bus may not tell"
        assert seen.message_id == task.task_id
    with pytest.raises(UsageError, match="outside of a running task"):
        current_task()


async def test_a_task_can_publish_tasks_and_read_its_state(new_bus):
    app = Boilermaker({"seen": []}, new_bus())

    @app.task
    async def count_down(state, number):
        state["seen"].append(number)
        if number:
            await count_down.delay(number - 1)

    await count_down.delay(5)
    await work_off(app)
    assert app.state["seen"] == [5, 4, 3, 2, 1, 0]


# ======================================================================================================================
# Worker: callbacks, chains, routing
# ======================================================================================================================


async def test_s_receives_the_result_and_si_does_not(new_bus):
    app = Boilermaker([], new_bus())

    @app.task
    async def add(state, x, y=0):
        state.append((x, y))
        return {"sum": x + y} if y else x

    await app.publish_task(add.si(1, 2) | add.si(5) | add.s(7) | add.s())
    await work_off(app)
    assert app.state == [(1, 2), (5, 0), (5, 7), ({"sum": 12}, 0)]


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [("raises", "ValueError", "it is broken"), ("gives_up", "TaskFailureResult", "")],
)
async def test_on_failure_by_s_receives_the_failure(new_bus, behaviour, error, message):
    app, functions, note = table_app(new_bus())
    task = Task.si(functions[behaviour])
    task.on_failure = note.s("more")
    await app.publish_task(task)
    await work_off(app)
    _, (_, failure, more) = app.state
    assert more == "more"
    assert set(failure) == {"task_id", "function_name", "error", "message", "traceback", "attempts"}
    assert (failure["task_id"], failure["function_name"]) == (task.task_id, behaviour)
    assert (failure["error"], failure["message"], failure["attempts"]) == (error, message, 1)
    assert ("raise ValueError" in failure["traceback"]) == (behaviour == "raises")


async def test_a_chain_stops_at_its_first_failure_and_its_on_failure_runs_once(new_bus):
    app, functions, note = table_app(new_bus())
    chain = app.chain(note.si(1), note.si(2), Task.si(functions["raises"]), note.si(4), on_failure=note.si("failed"))
    await app.publish_task(chain)
    await work_off(app)
    assert [entry if entry == "ran" else entry[1] for entry in app.state] == [1, 2, "ran", "failed"]


async def test_a_failed_callback_has_its_own_on_failure(new_bus):
    app, functions, note = table_app(new_bus())
    first, second = note.si(1), Task.si(functions["raises"])
    first.on_failure, second.on_failure = note.si("of the first"), note.si("of the second")
    first >> second
    await app.publish_task(first)
    await work_off(app)
    assert [entry if entry == "ran" else entry[1] for entry in app.state] == [1, "ran", "of the second"]


async def test_a_returned_task_takes_over_and_what_would_have_followed_comes_after_it(new_bus):
    app = Boilermaker([], new_bus())

    @app.task
    async def step(state, name, result=None):
        state.append(name)
        return name

    @app.task
    async def report(state, result, name):
        state.append((name, result))

    @app.task
    async def route(state, way):
        state.append("route")
        return step.si(f"{way} 1") | step.si(f"{way} 2")

    task = route.si("left")
    task.on_success, task.on_failure = report.s("success"), report.s("failure")
    await app.publish_task(task)
    await work_off(app)
    assert app.state == ["route", "left 1", "left 2", ("success", "left 2")]


@pytest.mark.parametrize("own", [False, True])
async def test_a_returned_task_has_the_returners_on_failure_where_it_has_none(new_bus, own):
    app, functions, note = table_app(new_bus())

    @app.task
    async def route(state):
        last = Task.si(functions["raises"])
        last.on_failure = note.si("its own") if own else None
        return note.si("first") | last

    task = route.si()
    task.on_success, task.on_failure = note.si("success"), note.si("the returner's")
    await app.publish_task(task)
    await work_off(app)
    assert [entry if entry == "ran" else entry[1] for entry in app.state] == [
        *("first", "ran", "its own" if own else "the returner's")
    ]


async def test_a_decorated_function_may_be_returned_too(new_bus):
    app, _, note = table_app(new_bus())

    @app.task
    async def route(state):
        return note

    await route.delay()
    await work_off(app)
    assert len(app.state) == 1


async def test_a_task_for_another_queue_runs_there_and_its_callbacks_come_home(open_bus):
    home, abroad = Boilermaker([], open_bus("home")), Boilermaker([], open_bus("abroad"))
    await home.service_bus_client.peek()

    @abroad.task
    async def double(state, number):
        state.append(number)
        return 2 * number

    @home.task
    async def store(state, number):
        state.append(number)
        return number

    @home.task
    async def mourn(state, failure):
        state.append(failure["function_name"])

    await home.send_task("double", 21, queue="abroad", on_success=store.s() | store.s(), on_failure=mourn.s())
    await home.send_task("missing", queue="abroad", on_success=store.s(), on_failure=mourn.s())
    await work_off(home)
    assert home.state == []
    await work_off(abroad)
    assert abroad.state == [21]
    assert await ids_of(abroad.service_bus_client) == []
    await work_off(home)
    assert sorted(home.state, key=str) == [42, 42, "missing"]
    [dead] = await abroad.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "UnregisteredFunction"


async def test_a_retry_abroad_still_sends_its_callbacks_home(open_bus):
    home, abroad = Boilermaker([], open_bus("home")), Boilermaker([], open_bus("abroad"))

    @abroad.task(policy=RetryPolicy(max_tries=2, delay=0))
    async def stubborn(state):
        if current_task().attempts.attempts == 0:
            raise RetryException("once more")
        return "done"

    @home.task
    async def store(state, result):
        state.append(result)

    await home.send_task("stubborn", queue="abroad", on_success=store.s())
    await work_off(abroad)
    await work_off(home)
    assert home.state == ["done"]


@pytest.mark.parametrize(
    ("result", "cause"),
    [
        (object(), "JSON cannot carry"),
        (float("nan"), "JSON cannot carry"),
        ("x" * 2000, r"makes a message of \d+ bytes, the limit is 2000"),
    ],
    ids=["not JSON", "NaN", "too large"],
)
@pytest.mark.parametrize("should_dead_letter", [True, False])
async def test_a_follow_up_that_can_never_be_published_dead_letters_its_parent(
    open_bus, result, cause, should_dead_letter
):
    app = Boilermaker([], open_bus(max_message_bytes=2000))

    @app.task(should_dead_letter=should_dead_letter)
    async def produce(state):
        state.append("produced")
        return result

    @app.task
    async def consume(state, value):
        state.append("consumed")

    task = produce.si()
    task.on_success = consume.s()
    await app.publish_task(task)
    await work_off(app)
    assert app.state == ["produced"]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert (dead.message_id, dead.dead_letter_reason) == (task.task_id, "FollowUpRejected")
    assert re.search(cause, dead.dead_letter_error_description)
    assert "consume" in dead.dead_letter_error_description
    assert await ids_of(app.service_bus_client) == []


async def test_a_result_that_nobody_takes_may_be_anything(new_bus):
    app, _, note = table_app(new_bus())

    @app.task
    async def produce(state):
        return object()

    await app.publish_task(produce.si() | note.si("next"))
    await work_off(app)
    assert [entry[1] for entry in app.state] == ["next"]


# ======================================================================================================================
# Worker: publishing many, bursts, concurrency, the log
# ======================================================================================================================


async def test_many_tasks_are_published_in_order_in_one_transaction(open_bus, transactions):
    app, _, note = table_app(open_bus())
    await app.service_bus_client.peek()
    transactions.clear()
    tasks = await app.publish_many(note.si(number) for number in range(200))
    assert transactions == [1]
    assert [task.sequence_number for task in tasks] == list(range(1, 201))
    await work_off(app, concurrency=1)
    assert [entry[1] for entry in app.state] == list(range(200))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(lambda note: note.si("x" * 2000), MessageTooLarge), (lambda note: note.si(1) >> note.si(2), UsageError)],
    ids=["too large", "not the head"],
)
async def test_many_tasks_are_all_checked_before_the_first_is_sent(open_bus, wrong, error):
    app, _, note = table_app(open_bus(max_message_bytes=2000))
    with pytest.raises(error):
        await app.publish_many([note.si(1), note.si(2), wrong(note)])
    assert await app.service_bus_client.peek() == []


async def test_a_burst_does_not_wait_for_what_is_scheduled(open_bus):
    app, _, note = table_app(open_bus())
    await app.apply_async(note, "later", delay=3600)
    await note.delay("now")
    await work_off(app)
    assert [entry[1] for entry in app.state] == ["now"]
    assert len(await app.service_bus_client.peek()) == 1


async def test_a_burst_does_not_wait_for_what_another_worker_holds(open_bus):
    app, _, note = table_app(open_bus(lock_duration=3600))
    await note.delay("held")
    async with receiving(app.service_bus_client) as receiver:
        [delivery] = await receiver.receive(1, 0)
        await note.delay("free")
        await work_off(app)
        assert [entry[1] for entry in app.state] == ["free"]
        assert await settle(receiver, delivery) is None


async def test_a_burst_waits_for_what_its_own_tasks_publish(open_bus):
    app, _, note = table_app(open_bus())

    @app.task
    async def slow(state):
        await asyncio.sleep(0.2)
        await note.delay("published")

    await app.publish_task(slow.si() | note.si("followed"))
    await work_off(app)
    assert sorted(entry[1] for entry in app.state) == ["followed", "published"]


async def test_as_many_tasks_run_at_once_as_asked_for_and_no_more(open_bus):
    app = Boilermaker([], open_bus())
    together = asyncio.Barrier(3)

    @app.task
    async def meet(state):
        state.append(1)
        assert sum(state) <= 3
        await together.wait()
        await asyncio.sleep(0.01)
        state.append(-1)

    await app.publish_many(meet.si() for _ in range(12))
    await work_off(app, concurrency=3)
    assert len(app.state) == 24
    assert await app.service_bus_client.peek(dead_letter=True) == []


@pytest.mark.parametrize("waits", [False, True], ids=["never waits", "waits"])
async def test_what_a_task_sets_in_its_context_is_not_seen_by_the_next(open_bus, waits):
    user = contextvars.ContextVar("user", default="nobody")
    app = Boilermaker([], open_bus())

    @app.task
    async def work(state, name):
        state.append(user.get())
        user.set(name)
        if waits:
            await asyncio.sleep(0)
        state.append(user.get())

    await app.publish_many([work.si("a"), work.si("b")])
    await work_off(app, concurrency=2)
    assert sorted(app.state) == ["a", "b", "nobody", "nobody"]


async def test_a_task_that_waits_has_an_asyncio_task_of_its_own(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def work(state):
        before = asyncio.current_task()
        await asyncio.sleep(0)
        assert asyncio.current_task() is before
        state.append(before)

    await app.publish_many([work.si() for _ in range(5)])
    await work_off(app)
    assert len(set(app.state)) == 5


async def test_many_tasks_that_wait_take_no_more_asyncio_tasks_than_they_are(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def work(state):
        state.append(len(asyncio.all_tasks()))
        await asyncio.sleep(0)
        state.append(len(asyncio.all_tasks()))

    await app.publish_many([work.si() for _ in range(300)])
    await work_off(app, concurrency=300)
    assert len(app.state) == 600
    assert max(app.state) < 320


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="Python 3.12 has it")
async def test_tasks_may_begin_eagerly(open_bus):
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    app = Boilermaker([], open_bus())

    @app.task
    async def work(state):
        await asyncio.sleep(0)
        state.append("done")

    await app.publish_many([work.si() for _ in range(600)])
    await work_off(app, concurrency=600)
    assert app.state == ["done"] * 600


async def test_a_task_may_limit_its_time(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def work(state, number):
        try:
            async with asyncio.timeout(0.01 if number % 2 else 60):
                await asyncio.sleep(0.1)
            state.append("done")
        except TimeoutError:
            state.append("too late")

    await app.publish_many([work.si(number) for number in range(6)])
    await work_off(app)
    assert Counter(app.state) == {"done": 3, "too late": 3}


@pytest.mark.parametrize("changes_its_mind", [False, True])
async def test_a_task_that_asks_to_be_cancelled_and_returns_does_not_harm_the_next(open_bus, changes_its_mind):
    app = Boilermaker([], open_bus())

    @app.task
    async def suicidal(state):
        asyncio.current_task().cancel()
        if changes_its_mind:
            asyncio.current_task().uncancel()

    @app.task
    async def patient(state):
        await asyncio.sleep(0)
        state.append("done")

    await app.publish_many([suicidal.si(), patient.si(), suicidal.si(), patient.si()])
    await work_off(app)
    assert app.state == ["done", "done"]
    assert await ids_of(app.service_bus_client, dead_letter=True) == []


def test_a_program_that_ends_around_its_worker_gives_running_tasks_back(tmp_path):
    bus = LocalServiceBus(tmp_path / "queue.db")
    app = Boilermaker([], bus)

    @app.task
    async def slow(state):
        state.append(asyncio.create_task(app.run()))  # any asyncio task: all are cancelled at the same time
        await asyncio.sleep(PATIENCE)

    async def program():
        await slow.delay()
        app.state.append(asyncio.create_task(app.run()))
        await until(lambda: len(app.state) == 2)

    async def left():
        waiting, dead = await bus.peek(), await bus.peek(dead_letter=True)
        await bus.close()
        return [message.delivery_count for message in waiting], dead

    asyncio.run(program())
    assert asyncio.run(left()) == ([1], [])


async def test_what_a_task_leaves_behind_does_not_cancel_the_next(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def leaves(state):
        asyncio.get_running_loop().call_later(0.02, asyncio.current_task().cancel)

    @app.task
    async def patient(state):
        await asyncio.sleep(0.1)
        state.append("done")

    await app.publish_many([leaves.si(), patient.si()])
    await work_off(app)
    assert app.state == ["done"]
    assert await ids_of(app.service_bus_client, dead_letter=True) == []


@pytest.mark.parametrize(("wrong", "says"), [("exception", "raise it"), ("coroutine", "await it")])
async def test_returning_what_has_to_be_raised_or_awaited_fails_the_task(open_bus, wrong, says):
    app = Boilermaker([], open_bus())

    @app.task
    async def forgetful(state):
        return RetryException("later") if wrong == "exception" else forgetful.delay()

    await forgetful.delay()
    await work_off(app)
    [message] = await app.service_bus_client.peek(dead_letter=True)
    assert message.dead_letter_reason == "TaskFailed"
    assert says in message.dead_letter_error_description


async def test_a_worker_without_tasks_says_so(open_bus, caplog):
    await work_off(Boilermaker(None, open_bus()))
    assert any("No task is registered" in message for message in caplog.messages)


async def test_a_worker_that_stops_gives_back_what_it_has_not_begun(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def block(state):
        time.sleep(boilermaker.LONGEST_TURN * 2)
        state.append("ran")
        if len(state) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    await app.publish_many([block.si() for _ in range(30)])
    await app.run(concurrency=30)
    assert 1 <= len(app.state) < 10
    assert [message.delivery_count for message in await app.service_bus_client.peek()] == [1] * (30 - len(app.state))


async def test_a_worker_holds_only_what_it_runs(open_bus):
    app = Boilermaker(asyncio.Event(), open_bus())

    @app.task
    async def wait(state):
        await state.wait()

    await app.publish_many(wait.si() for _ in range(5))
    bus = app.service_bus_client
    async with working(app, concurrency=2), receiving(bus) as receiver:
        await until(lambda: locked_count_is(bus, 2))
        assert len(await receiver.receive(5, 0)) == 3
        app.state.set()


async def locked_count_is(bus, count):
    return sum(message.delivery_count for message in await bus.peek()) == count


async def test_the_log_tells_of_begin_and_completion(open_bus, caplog):
    caplog.set_level(logging.INFO, "boilermaker.app")
    app, functions, _ = table_app(open_bus())
    assert "Registered background function fn=returns" in caplog.messages
    task = await app.apply_async(functions["returns"])
    await work_off(app)
    number = task.sequence_number
    assert f"[returns] Begin Task sequence_number={number}" in caplog.messages
    pattern = rf"\[returns\] Completed Task sequence_number={number} in \d+\.\d{{5}}s"
    assert [record.levelname for record in caplog.records if re.fullmatch(pattern, record.getMessage())] == ["INFO"]
    assert {record.name for record in caplog.records} == {"boilermaker.app"} | {"asyncio"} & {
        record.name for record in caplog.records
    }
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_the_log_tells_of_retries_as_warnings(open_bus, caplog):
    app, functions, _ = table_app(open_bus())
    await app.apply_async(functions["asks_again"], policy=RetryPolicy(max_tries=7, delay=33))
    await work_off(app)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("[asks_again] ")
    assert re.search(r"attempt 1 of 7.* 33 s.*come back later", record.getMessage())


async def test_the_log_tells_of_failures_as_errors_with_the_traceback(open_bus, caplog):
    app, functions, _ = table_app(open_bus())
    task = await app.apply_async(functions["raises"])
    await work_off(app)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("[raises] ")
    assert f"sequence_number={task.sequence_number}" in record.getMessage()
    assert 'raise ValueError("it is broken")' in caplog.text


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "2", None, True])
async def test_a_concurrency_that_is_no_number_over_zero_is_refused(open_bus, concurrency):
    with pytest.raises(UsageError, match=f"concurrency={concurrency!r}"):
        await Boilermaker(None, open_bus()).run(concurrency, burst=True)


async def test_a_task_that_runs_for_too_long_is_cancelled_and_delivered_again(open_bus, caplog):
    app = Boilermaker([], open_bus(lock_duration=0.2, max_delivery_count=3))

    @app.task
    async def never_ends(state):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            state.append("cancelled")
            return "as if nothing had been"

    @app.task
    async def after(state):
        state.append("after")

    await app.publish_task(never_ends.si() | after.si())
    async with working(app, max_lock_renewal=0.1):
        [dead] = await until(lambda: app.service_bus_client.peek(dead_letter=True))
    assert dead.dead_letter_reason == "MaxDeliveryCountExceeded"
    assert app.state == ["cancelled", "cancelled"]
    assert "[never_ends] Lock lost" in caplog.text


# ======================================================================================================================
# Worker: shutdown
# ======================================================================================================================

WORKER_PROGRAM = """
import asyncio, json, logging, os, sys
from boilermaker import Boilermaker, LocalServiceBus, current_task

settings, options = map(json.loads, sys.argv[1:])
logging.basicConfig(level=logging.INFO)
app = Boilermaker(None, LocalServiceBus("queue.db", **settings))
journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(*words):
    os.write(journal, (" ".join(map(str, words)) + "\\n").encode())

@app.task
async def hold(state):
    note("begun", os.getpid())
    try:
        while not os.path.exists("release"):
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        note("cancelled", os.getpid())
        raise
    note("ended", os.getpid())

@app.task
async def tidy_up(state):
    note("begun", os.getpid())
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        note("cancelled", os.getpid())
        while not os.path.exists("release"):
            await asyncio.sleep(0.01)
        raise

@app.task
async def step(state, chain, number):
    task = current_task()
    note("step", chain, number, task.message_id, task.sequence_number)
    await asyncio.sleep(0.01)

async def main():
    async with app:
        await app.run(**options)

asyncio.run(main())
"""


@pytest.fixture
def start_worker(start_program):
    def start(settings, **options):
        return start_program(WORKER_PROGRAM, json.dumps(settings), json.dumps(options))

    return start


@pytest.fixture
def journal(tmp_path):
    """Gives the words of the lines that worker programs wrote, those that begin with one word."""

    def read(first):
        with contextlib.suppress(FileNotFoundError):
            lines = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
            return [words for words in lines if words[0] == first]
        return []

    return read


SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("by_loop", [False, True], ids=["of the process", "of the event loop"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_where_the_program_has_a_handler_of_its_own_the_worker_does_not_listen(
    start_program, number, by_loop, loop
):
    pytest.importorskip(loop)
    program = start_program(
        """
import asyncio, importlib, signal, sys
from boilermaker import Boilermaker, LocalServiceBus

number, by_loop = int(sys.argv[1]), sys.argv[2] == "True"
app = Boilermaker([], LocalServiceBus("queue.db"))

@app.task
async def work(state):
    signal.raise_signal(number)
    await asyncio.sleep(0.1)
    state.append("finished")

def heard(*arguments):
    app.state.append("heard")

async def main():
    if by_loop:
        asyncio.get_running_loop().add_signal_handler(number, heard)
    else:
        signal.signal(number, heard)
    for _ in range(2):
        await work.delay()
        await app.run(burst=True)
    worker = asyncio.create_task(app.run())
    await asyncio.sleep(0.1)
    signal.raise_signal(number)
    await asyncio.sleep(0.1)
    assert not worker.done()
    await app.stop()
    assert worker.done()
    print(*app.state)

with asyncio.Runner(loop_factory=importlib.import_module(sys.argv[3]).new_event_loop) as runner:
    runner.run(main())
""",
        int(number),
        by_loop,
        loop,
    )
    assert await exit_code(program) == 0, program[1].read_text()
    assert program[1].read_text().splitlines()[-1] == "heard finished heard finished heard"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
async def test_a_signal_lets_running_tasks_finish_and_takes_no_more(open_bus, start_worker, journal, tmp_path, number):
    app = Boilermaker(None, open_bus(lock_duration=3600))
    await app.send_task("hold")
    process, output = start_worker({"lock_duration": 3600}, grace_period=PATIENCE)
    await until(lambda: journal("begun"))
    process.send_signal(number)
    await until(lambda: "shutting down" in output.read_text())
    waiting = await app.send_task("hold")
    (tmp_path / "release").touch()
    assert await exit_code((process, output)) == 0
    assert len(journal("begun")) == len(journal("ended")) == 1
    assert await ids_of(app.service_bus_client) == [waiting.task_id]
    async with receiving(app.service_bus_client) as receiver:
        [_] = await receiver.receive(1, 0)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
async def test_after_the_grace_period_messages_are_given_back_at_once(open_bus, start_worker, journal, number):
    app = Boilermaker(None, open_bus(lock_duration=3600))
    task = await app.send_task("hold")
    process, output = start_worker({"lock_duration": 3600}, grace_period=0.2)
    await until(lambda: journal("begun"))
    process.send_signal(number)
    assert await exit_code((process, output)) == 0
    assert len(journal("cancelled")) == 1
    assert "given back" in output.read_text()
    async with receiving(app.service_bus_client) as receiver:
        [delivery] = await receiver.receive(1, 0)
    assert (delivery.message_id, delivery.delivery_count) == (task.task_id, 1)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
async def test_a_second_signal_ends_at_once_and_messages_are_given_back(open_bus, start_worker, journal, number):
    app = Boilermaker(None, open_bus(lock_duration=3600))
    await app.send_task("hold")
    process, output = start_worker({"lock_duration": 3600}, grace_period=3600)
    await until(lambda: journal("begun"))
    process.send_signal(number)
    await until(lambda: "shutting down" in output.read_text())
    process.send_signal(number)  # the supervisor's and the terminal's are one
    await asyncio.sleep(2 * boilermaker.SIGNAL_GAP)
    assert process.poll() is None
    process.send_signal(number)
    assert await exit_code((process, output)) == 0
    async with receiving(app.service_bus_client) as receiver:
        [delivery] = await receiver.receive(1, 0)
    assert delivery.delivery_count == 1


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
async def test_a_signal_while_messages_are_given_back_does_not_keep_them_from_it(
    open_bus, start_worker, journal, tmp_path, number
):
    app = Boilermaker(None, open_bus(lock_duration=3600))
    await app.send_task("tidy_up")
    process, output = start_worker({"lock_duration": 3600}, grace_period=0.1)
    await until(lambda: journal("begun"))
    process.send_signal(number)
    await until(lambda: journal("cancelled"))
    process.send_signal(number)
    (tmp_path / "release").touch()
    assert await exit_code((process, output)) == 0
    async with receiving(app.service_bus_client) as receiver:
        [_] = await receiver.receive(1, 0)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
async def test_an_idle_worker_ends_at_a_signal(open_bus, start_worker, journal, number):
    app = Boilermaker(None, open_bus())
    await app.send_task("step", 0, 0)
    process, output = start_worker({})
    await until(lambda: journal("step"))
    await until(lambda: nothing_is_left(app.service_bus_client))
    process.send_signal(number)
    assert await exit_code((process, output)) == 0


async def test_cancelling_the_run_gives_messages_back_at_once(open_bus):
    app = Boilermaker([], open_bus(lock_duration=3600))

    @app.task
    async def hold(state):
        state.append("begun")
        await asyncio.Event().wait()

    await app.publish_many([hold.si(), hold.si()])
    worker = asyncio.create_task(app.run(concurrency=1))
    await until(lambda: app.state)
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
    async with receiving(app.service_bus_client) as receiver:
        assert [delivery.delivery_count for delivery in await receiver.receive(5, 0)] == [1, 0]


async def test_a_task_that_will_not_end_is_given_back_all_the_same(open_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "STOP_PATIENCE", 0.1)
    app = Boilermaker([], open_bus(lock_duration=3600))
    release = asyncio.Event()

    @app.task
    async def stubborn(state):
        state.append("begun")
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        state.append("ended")

    await stubborn.delay()
    worker = asyncio.create_task(app.run())
    await until(lambda: app.state)
    worker.cancel()
    await asyncio.wait([worker])
    async with receiving(app.service_bus_client) as receiver:
        [_] = await receiver.receive(1, 0)
    release.set()
    await until(lambda: app.state[1:] == ["ended"])


async def test_a_task_that_was_acknowledged_early_and_will_not_end_is_not_given_back(open_bus, monkeypatch, caplog):
    monkeypatch.setattr(boilermaker, "STOP_PATIENCE", 0.1)
    app = Boilermaker([], open_bus())
    release = asyncio.Event()

    @app.task(acks_late=False)
    async def stubborn(state):
        state.append("begun")
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
        state.append("ended")

    await stubborn.delay()
    worker = asyncio.create_task(app.run())
    await until(lambda: app.state)
    worker.cancel()
    await asyncio.wait([worker])
    assert caplog.messages == ["[stubborn] Would not stop sequence_number=1"]
    release.set()
    await until(lambda: app.state[1:] == ["ended"])
    assert await ids_of(app.service_bus_client) == []


async def test_a_task_stopped_while_it_is_acknowledged_early_is_logged_as_what_it_is(open_bus, monkeypatch, caplog):
    app = Boilermaker([], open_bus())
    settle_now, settling = boilermaker.LocalReceiver.settle, asyncio.Event()

    def settle(receiver, settlements, durable=False):
        if durable:
            settling.set()
        return settle_now(receiver, settlements, durable)

    @app.task(acks_late=False)
    async def work(state):
        state.append("ran")

    monkeypatch.setattr(boilermaker.LocalReceiver, "settle", settle)
    await work.delay()
    worker = asyncio.create_task(app.run())
    await settling.wait()
    worker.cancel()
    await asyncio.wait([worker])
    assert caplog.messages == ["[work] Stopped with the worker, not to run again, as acks_late=False sequence_number=1"]
    assert (app.state, await ids_of(app.service_bus_client)) == ([], [])


async def test_a_task_that_returns_when_it_is_stopped_counts_as_done(open_bus):
    app = Boilermaker([], open_bus(lock_duration=3600))

    @app.task
    async def tidy(state):
        state.append("begun")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    await tidy.delay()
    worker = asyncio.create_task(app.run())
    await until(lambda: app.state)
    worker.cancel()
    await asyncio.wait([worker])
    assert await ids_of(app.service_bus_client) == await ids_of(app.service_bus_client, dead_letter=True) == []


def mine(number, frame): ...


@pytest.mark.parametrize(
    ("before", "listens"),
    [(signal.SIG_DFL, True), (signal.default_int_handler, True), (signal.SIG_IGN, False), (mine, False)],
    ids=repr,
)
async def test_a_worker_listens_where_the_program_does_not_and_leaves_handlers_as_they_were(open_bus, before, listens):
    app = Boilermaker([], open_bus())

    @app.task
    async def look(state):
        state.append(signal.getsignal(signal.SIGTERM))

    former = signal.signal(signal.SIGTERM, before)
    try:
        await look.delay()
        await work_off(app)
        assert (app.state[0] == before) is not listens
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, former)


async def test_a_handler_that_is_set_during_a_run_is_left_in_place(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task
    async def replace(state):
        signal.signal(signal.SIGTERM, mine)

    former = signal.getsignal(signal.SIGTERM)
    try:
        await replace.delay()
        await work_off(app)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, former)


def test_the_handler_of_asyncio_run_counts_as_none(open_bus_path):
    app = Boilermaker([], LocalServiceBus(open_bus_path))

    @app.task
    async def look(state):
        state.append(signal.getsignal(signal.SIGINT))

    async def main():
        before = signal.getsignal(signal.SIGINT)
        await look.delay()
        await app.run(burst=True)
        await app.close()
        return before, signal.getsignal(signal.SIGINT)

    before, after = asyncio.run(main())
    assert before == after
    assert app.state[0] != before


@pytest.fixture
def open_bus_path(tmp_path):
    return tmp_path / "queue.db"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
async def test_a_forked_child_has_the_handlers_of_before_at_once(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def fork(state):
        child = os.fork()
        if child == 0:
            default = [signal.getsignal(number) for number in SIGNALS] == state
            os._exit(0 if default else 1)
        state.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    app.state += [signal.getsignal(number) for number in SIGNALS]
    await fork.delay()
    await work_off(app)
    assert app.state[2:] == [0]


# ======================================================================================================================
# Worker: several processes
# ======================================================================================================================


async def test_workers_share_the_work_and_nothing_is_lost_or_run_twice(open_bus, start_worker, journal):
    app = Boilermaker(None, open_bus(lock_duration=60))
    workers = [start_worker({"lock_duration": 60}, concurrency=5) for _ in range(2)]
    for _, output in workers:
        await until(lambda output=output: "Worker started" in output.read_text())
    for number in range(0, 200, 20):
        await asyncio.gather(*[app.send_task("step", 0, number + offset) for offset in range(20)])
    await until(lambda: nothing_is_left(app.service_bus_client))
    assert sorted(int(words[2]) for words in journal("step")) == list(range(200))
    for process, output in workers:
        assert "Completed Task" in output.read_text()
        process.terminate()
        assert await exit_code((process, output)) == 0
    assert await ids_of(app.service_bus_client, dead_letter=True) == []


async def test_killing_workers_loses_no_step_of_a_chain_and_publishes_none_twice(open_bus, start_worker, journal):
    chains, steps = 20, 8
    settings = {"lock_duration": 0.5, "max_delivery_count": None}
    bus = open_bus(**settings)
    app = Boilermaker(None, bus)
    for chain in range(chains):
        tasks = [Task.default("step", payload={"args": [chain, number]}) for number in range(steps)]
        await app.publish_task(app.chain(*tasks))
    workers = [start_worker(settings, concurrency=5) for _ in range(2)]
    for kill in range(4):
        enough = 25 * (kill + 1)
        await until(lambda enough=enough: len(journal("step")) >= enough)
        victim, _ = workers.pop(0)
        victim.kill()
        victim.wait()
        workers.append(start_worker(settings, concurrency=5))
    await until(lambda: nothing_is_left(bus))
    for process, output in workers:
        process.terminate()
        await exit_code((process, output))
    messages = {}
    for _, chain, number, message_id, sequence_number in journal("step"):
        messages.setdefault((int(chain), int(number)), set()).add((message_id, sequence_number))
    assert set(messages) == {(chain, number) for chain in range(chains) for number in range(steps)}
    assert [found for found in messages.values() if len(found) > 1] == []
    assert await bus.peek(dead_letter=True) == []


def stopped_between_transactions(process, path):
    """Stop a process; if it holds the lock of the file just then, let it go on, to be tried again."""
    process.send_signal(signal.SIGSTOP)
    with contextlib.closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            process.send_signal(signal.SIGCONT)
            return False
        connection.execute("ROLLBACK")
    return True


async def test_two_workers_of_one_event_loop_are_both_stopped_by_a_signal(open_bus):
    workers = [Boilermaker(None, open_bus(queue_name)).run() for queue_name in ("shop", "mailer")]
    before = signal.getsignal(signal.SIGTERM)
    running = asyncio.gather(*workers)
    await until(lambda: signal.getsignal(signal.SIGTERM) is not before)
    await asyncio.sleep(0.1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.wait_for(running, PATIENCE)
    assert signal.getsignal(signal.SIGTERM) is before


async def test_a_task_that_changes_its_arguments_is_retried_with_those_it_was_given(open_bus):
    app, seen = Boilermaker(None, open_bus()), []

    @app.task(policy=RetryPolicy(max_tries=3))
    async def eat(state, items):
        seen.append(list(items))
        items.pop()
        raise RetryException("hungry")

    await eat.delay([1, 2, 3])
    await work_off(app)
    assert seen == [[1, 2, 3]] * 3


async def test_an_early_completion_that_another_worker_was_first_with_does_not_run_the_task(open_bus):
    bus = open_bus(lock_duration=0.2)
    await bus.send([letter("a")])
    async with receiving(bus) as slow:
        [first] = await slow.receive(1, 0)
        slow._held.clear()  # as if it had been stopped, and could not renew
        async with receiving(bus) as quick:
            [second] = await quick.receive(1, PATIENCE)
            assert await settle(quick, second) is None
        assert isinstance(await settle(slow, first), MessageLockLost)


async def test_a_worker_that_slept_over_its_lock_settles_nothing_and_says_so(open_bus, start_worker, journal, tmp_path):
    bus = open_bus(lock_duration=0.3)
    app = Boilermaker(None, bus)
    task, following = Task.default("hold"), Task.default("step", payload={"args": [0, 0]})
    task.on_success = following
    await app.publish_task(task)
    process, output = start_worker({"lock_duration": 0.3})
    await until(lambda: journal("begun"))
    await until(lambda: stopped_between_transactions(process, tmp_path / "queue.db"))
    bus.lock_duration = 3600
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        assert (delivery.message_id, delivery.delivery_count) == (task.task_id, 1)
        process.send_signal(signal.SIGCONT)
        await until(lambda: journal("cancelled"))
        await until(lambda: "[hold] Lock lost" in output.read_text())
        assert await ids_of(bus) == [task.task_id]
        assert await settle(receiver, delivery) is None
    process.terminate()
    assert await exit_code((process, output)) == 0
    assert journal("step") == journal("ended") == []
    assert await ids_of(bus) == await ids_of(bus, dead_letter=True) == []


# ======================================================================================================================
# Options: what a registration says, and what is said at publishing
# ======================================================================================================================


def registration_with(**options):
    """The registration of a function with these options."""
    app = Boilermaker(None, LocalServiceBus())
    app.register_async(parse_page, **options)
    return app.registration("parse_page")


@pytest.mark.parametrize("value", [0, -1, True, "5", float("nan"), 2**31, datetime.timedelta(0)], ids=repr)
@pytest.mark.parametrize("option", ["timeout", "expires"])
def test_a_time_limit_that_is_none_is_an_error_that_names_it(option, value):
    with pytest.raises(UsageError, match=re.escape(f"parse_page: {option}={value!r} must be seconds over 0")):
        registration_with(**{option: value})


@pytest.mark.parametrize("given", [90, 90.0, datetime.timedelta(minutes=1.5)], ids=repr)
def test_a_time_limit_is_seconds_or_a_timedelta(given):
    registration = registration_with(timeout=given, expires=given)
    assert (registration.timeout, registration.expires) == (90.0, 90.0)
    assert (registration_with().timeout, registration_with().expires) == (None, None)


async def an_async_predicate(error): ...


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("retry_on", int),
        ("retry_on", (OSError, int)),
        ("retry_on", OSError()),
        ("retry_on", "OSError"),
        ("retry_on", KeyboardInterrupt),
        ("retry_on", an_async_predicate),
        ("dont_retry_on", int),
        ("dont_retry_on", [OSError]),
        ("dont_retry_on", lambda error: True),
        ("dont_retry_on", (asyncio.CancelledError,)),
    ],
    ids=repr,
)
def test_errors_to_retry_on_that_are_none_are_an_error_that_names_them(option, value):
    with pytest.raises(UsageError, match=f"parse_page: {option}=.* must be a type of Exception"):
        registration_with(**{option: value})


def test_an_option_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(TypeError, match=r"no option retries= of a task; there are .*retry_on.*timeout"):
        registration_with(retries=3)
    with pytest.raises(TypeError, match=r"fetch_page: there is no option ttl= of publishing; there are .*expires"):
        Boilermaker(None, LocalServiceBus()).task(fetch_page).options(ttl=3)


def test_several_functions_cannot_have_one_name():
    with pytest.raises(UsageError, match=r"name= can be that of one function only"):
        Boilermaker(None, LocalServiceBus()).register_many_async([fetch_page, parse_page], name="page")


TIMEOUT, LOST = TimeoutError("late"), ConnectionResetError("lost")


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({}, LOST, Outcome.FAILED),
        ({"retry_on": OSError}, LOST, Outcome.RETRY),
        ({"retry_on": OSError}, ValueError("x"), Outcome.FAILED),
        ({"retry_on": (KeyError, OSError)}, LOST, Outcome.RETRY),
        ({"retry_on": lambda error: "lost" in str(error)}, LOST, Outcome.RETRY),
        ({"retry_on": lambda error: "lost" in str(error)}, ValueError("x"), Outcome.FAILED),
        ({"retry_on": OSError, "dont_retry_on": ConnectionResetError}, LOST, Outcome.FAILED),
        ({"retry_on": OSError, "dont_retry_on": (KeyError, ConnectionResetError)}, LOST, Outcome.FAILED),
        ({"retry_on": OSError, "dont_retry_on": KeyError}, LOST, Outcome.RETRY),
        ({"dont_retry_on": OSError}, LOST, Outcome.FAILED),
        ({"retry_on": Exception}, TIMEOUT, Outcome.RETRY),
        ({"retry_on": Exception}, UsageError("wrong"), Outcome.FAILED),
        ({"retry_on": Exception}, asyncio.CancelledError(), Outcome.FAILED),
        ({"retry_on": lambda error: True}, KeyboardInterrupt(), Outcome.FAILED),
        ({"retry_on": OSError}, ExceptionGroup("all", [LOST, ExceptionGroup("", [TIMEOUT])]), Outcome.RETRY),
        ({"retry_on": OSError}, ExceptionGroup("some", [LOST, ValueError("x")]), Outcome.FAILED),
        ({"dont_retry_on": Exception}, RetryException("asked for"), Outcome.RETRY),
    ],
    ids=repr,
)
def test_an_error_is_retried_where_retry_on_says_so_and_dont_retry_on_does_not(options, error, expected):
    assert outcome_of(received(named("f")), error, registration_with(**options)) is expected


def test_an_error_is_retried_by_the_policy_in_force_until_the_tries_are_used_up():
    registration = registration_with(retry_on=OSError, policy=RetryPolicy(max_tries=3, delay=7))
    outcomes, task = [], named("parse_page")
    for _ in range(3):
        in_force = received(task, registration)
        outcomes.append(outcome_of(in_force, LOST, registration))
        settlement = decided(task, outcomes[-1], error=LOST, registration=registration)
        if settlement.follow_ups:
            [(task, _, delay)] = settlement.follow_ups
            assert delay == 7
    assert outcomes == [Outcome.RETRY, Outcome.RETRY, Outcome.EXHAUSTED]
    assert settlement.description == "ConnectionResetError: lost"


def test_a_predicate_that_fails_says_no_and_is_named():
    def broken(error):
        raise LookupError("no such code")

    error = OSError("lost")
    assert outcome_of(received(named("f")), error, registration_with(retry_on=broken)) is Outcome.FAILED
    assert error.__notes__ == ["retry_on of parse_page failed: LookupError: no such code"]


async def test_what_is_retried_by_its_type_runs_again(new_bus, caplog):
    app, runs = Boilermaker(None, new_bus()), []

    @app.task(retry_on=OSError, policy=RetryPolicy(max_tries=3, delay=0))
    async def flaky(state):
        runs.append(current_task().attempts.attempts)
        if len(runs) < 3:
            raise ConnectionResetError("lost")

    await flaky.delay()
    async with working(app):
        await until(lambda: len(runs) == 3)
    assert runs == [0, 1, 2]
    assert "[flaky] Retry sequence_number=" in caplog.text
    assert "[attempt 1 of 3] in 0 s: ConnectionResetError: lost" in caplog.text


async def test_a_run_over_its_timeout_is_cancelled_and_has_failed(new_bus):
    app, seen = Boilermaker(None, new_bus()), []

    @app.task(timeout=0.05)
    async def hang(state):
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    @app.task
    async def note(state, failure):
        seen.append((failure["error"], failure["message"]))

    task = hang.si()
    task.on_failure = note.s()
    await task.publish()
    await work_off(app)
    assert seen == ["cancelled", ("TimeoutError", "hang ran into its timeout of 0.05 s")]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "TaskFailed"
    assert dead.dead_letter_error_description == "TimeoutError: hang ran into its timeout of 0.05 s"


async def test_a_function_that_catches_the_cancellation_of_its_timeout_and_returns_has_returned(open_bus):
    app, results = Boilermaker(None, open_bus()), []

    @app.task(timeout=0.05)
    async def tidy(state):
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            return "what there was"

    @app.task
    async def store(state, result):
        results.append(result)

    await (tidy.si() | store.s()).publish()
    await work_off(app)
    assert results == ["what there was"]


async def test_a_timeout_of_the_functions_own_stays_its_own(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task(timeout=PATIENCE)
    async def ask(state):
        raise TimeoutError("the database did not answer")

    await ask.delay()
    await work_off(app)
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_error_description == "TimeoutError: the database did not answer"


async def test_a_timeout_is_retried_where_retry_on_says_so(open_bus):
    app, runs = Boilermaker(None, open_bus()), []

    @app.task(timeout=0.05, retry_on=TimeoutError, policy=RetryPolicy(max_tries=2))
    async def slow_at_first(state):
        runs.append(1)
        if len(runs) == 1:
            await asyncio.sleep(PATIENCE)

    await slow_at_first.delay()
    await work_off(app)
    assert len(runs) == 2
    assert await app.service_bus_client.peek(dead_letter=True) == []


async def test_a_task_that_is_begun_too_late_has_expired(open_bus):
    app, ran, failures = Boilermaker(None, open_bus()), [], []

    @app.task(expires=60)
    async def remind(state, whom):
        ran.append(whom)

    @app.task
    async def note(state, failure):
        failures.append((failure["error"], failure["attempts"]))

    with moved_clock() as clock:
        late, quiet = remind.si("late"), Task.si(remind, "quiet", should_dead_letter=False)
        late.on_failure = note.s()
        await app.publish_many([late, quiet])
        await remind.options(expires=datetime.timedelta(hours=1)).delay("in time")
        await remind.options(delay=100).delay("scheduled")
        clock.tick(100)
        await remind.delay("fresh")
        await work_off(app)
    assert sorted(ran) == ["fresh", "in time", "scheduled"]
    assert failures == [("Expired", 0)]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "Expired"
    assert "It was to begin 100 s after it was due, and expires after 60." in dead.dead_letter_error_description


async def test_a_retry_expires_anew(open_bus):
    app, runs = Boilermaker(None, open_bus()), []

    @app.task(expires=60, policy=RetryPolicy(max_tries=3, delay=50))
    async def flaky(state):
        runs.append(1)
        if len(runs) < 3:
            raise RetryException("busy")

    await flaky.delay()
    with moved_clock() as clock:
        for _ in range(3):
            await work_off(app)
            clock.tick(50)
    assert len(runs) == 3


async def test_what_is_sent_by_name_expires_as_its_sender_says(open_bus):
    sender, app, ran = Boilermaker(None, open_bus("web")), Boilermaker(None, open_bus("tasks")), []

    @app.task
    async def remind(state, whom):
        ran.append((whom, current_task().expires))

    with moved_clock() as clock:
        await sender.send_task("remind", "late", queue="tasks", expires=5, should_dead_letter=False)
        await sender.send_task("remind", "in time", queue="tasks", expires=50)
        clock.tick(10)
        await work_off(app)
    assert ran == [("in time", 50)]
    assert await app.service_bus_client.peek(dead_letter=True) == []


@pytest.mark.parametrize("wrong", ["soon", -1, 0, True, [], float("inf")], ids=repr)
def test_an_expiry_in_a_message_that_is_none_is_an_invalid_format(wrong):
    text = body_with(expires=wrong).replace("Infinity", "1e400")
    with pytest.raises(boilermaker.InvalidTaskFormat):
        decode(text, "tasks")


def test_an_expiry_travels_with_its_task_and_with_its_callbacks():
    task = named("a", expires=5, on_success=named("b", expires=0.5))
    again = decode(encode(task, "q", "q"), "q")
    assert (again.expires, again.on_success.expires) == (5, 0.5)
    assert "expires" not in encode(named("a"), "q", "q")


async def test_an_expiry_set_by_hand_is_checked_when_it_is_published():
    async with app_with_pages() as app:
        task = Task.si(parse_page)
        task.expires = -1
        with pytest.raises(UsageError, match=r"<Task parse_page .*>: expires=-1 must be seconds over 0"):
            await app.publish_task(task)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"delay": -1}, r"delay=-1 must be seconds"),
        ({"delay": 1, "eta": datetime.datetime.now(datetime.UTC)}, r"Both delay=1 and eta="),
        ({"eta": datetime.datetime(2030, 1, 1)}, r"has no time zone"),
        ({"policy": 5}, r"parse_page: policy=5 must be a RetryPolicy"),
        ({"publish_attempts": 0}, r"publish_attempts=0 must be an int of at least 1"),
        ({"publish_attempts": True}, r"publish_attempts=True must be an int"),
        ({"expires": 0}, r"expires=0 must be seconds over 0"),
        ({"task_id": ""}, r"task_id='' must be a string of 1 to 128 characters"),
        ({"task_id": "x" * 129}, r"task_id='x+\.\.\.x+' must be"),
        ({"task_id": "cron:mine"}, r"task_id='cron:mine' must be .* not begin with 'cron:'"),
        ({"task_id": 5}, r"task_id=5 must be a string"),
    ],
    ids=repr,
)
async def test_an_option_of_publishing_that_is_wrong_is_named_by_whoever_takes_it(options, error):
    async with app_with_pages() as app:
        function = boilermaker.TaskFunction(app, app.registration("parse_page"))
        with pytest.raises(UsageError, match=error):
            function.options(**options)
        with pytest.raises(UsageError, match=error):
            await app.publish_task(Task.si(parse_page), **options)
        with pytest.raises(UsageError, match=error):
            await app.create_task(parse_page).publish(**options)
        with pytest.raises(UsageError, match=error):
            await app.send_task("parse_page", **options)
        assert await app.service_bus_client.peek() == []


async def test_options_of_a_function_are_those_of_what_is_published_of_it(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task
    async def fetch(state, url, expires="never", task_id=0, timeout=1):
        """Fetch."""

    given = fetch.options(delay=3600, policy=NoRetry(), expires=5, task_id="mine")
    assert (given.__name__, given.__doc__, inspect.iscoroutinefunction(given)) == ("fetch", "Fetch.", True)
    published = [
        await given.delay("a", expires="ever", task_id=7, timeout=2),
        await given.options(task_id="other", delay=None).si("b").publish(),
        await app.apply_async(given.options(task_id="third"), "c", task_id=9),
        await app.publish_task(given.options(task_id="fourth").si("d"), eta=datetime.datetime.now(datetime.UTC)),
        await fetch.delay("plain"),
    ]
    messages = await app.service_bus_client.peek()
    assert [message.message_id for message in messages] == [task.task_id for task in published]
    tasks = [decode(message.body, "tasks") for message in messages]
    assert [task.task_id for task in tasks[:4]] == ["mine", "other", "third", "fourth"]
    assert [(task.policy, task.expires) for task in tasks] == [(NoRetry(), 5)] * 4 + [(None, None)]
    assert tasks[0].kwargs == {"expires": "ever", "task_id": 7, "timeout": 2}
    assert tasks[2].kwargs == {"task_id": 9}
    scheduled = [message.scheduled_enqueue_time_utc is not None for message in messages]
    assert (scheduled[:3], scheduled[4]) == ([True, True, True], False)


async def test_of_two_tasks_of_one_given_id_one_is_enqueued(new_bus):
    app, ran = Boilermaker(None, new_bus()), []

    @app.task
    async def fetch(state, number):
        ran.append(number)
        return number

    @app.task
    async def store(state, number):
        ran.append(f"stored {number}")

    for number in range(2):
        published = await (fetch.si(number) | store.s()).publish(task_id="the report of today")
        assert published.task_id == published.message_id == "the report of today"
    await work_off(app)
    await fetch.options(task_id="the report of today").delay(2)
    await work_off(app)
    assert ran == [0, "stored 0"]


@pytest.mark.parametrize("window", [None, 60, 900], ids=["off", "short", "long"])
async def test_a_given_id_is_remembered_for_600_s_at_least_and_the_next_runs_its_whole_chain(open_bus, window):
    app, ran = Boilermaker(None, open_bus(duplicate_detection=window)), []

    @app.task
    async def fetch(state, number):
        ran.append(number)

    @app.task
    async def store(state):
        ran.append("stored")

    async def publish_and_run(number):
        workflow = fetch.si(number) | store.si()
        await workflow.publish(task_id="mine")
        await work_off(app)

    remembered = max(600, window or 0)
    with moved_clock() as clock:
        await publish_and_run(1)
        clock.tick(remembered - 1)
        await publish_and_run(2)
        clock.tick(2)
        await publish_and_run(3)
        await fetch.delay(4)  # one that is not given is remembered for what the queue says
        await work_off(app)
    assert ran == [1, "stored", 3, "stored", 4]


async def test_a_delay_that_was_said_once_is_not_that_of_the_next_publish(open_bus):
    app = app_with_pages()
    task = app.create_task(parse_page)
    await app.publish_task(task, delay=3600)
    await app.publish_task(task)
    first, second = await app.service_bus_client.peek()
    assert first.scheduled_enqueue_time_utc is not None
    assert second.scheduled_enqueue_time_utc is None
    await app.close()


async def test_what_is_for_the_head_is_refused_of_what_follows():
    async with app_with_pages() as app:
        fetch, parse = app.task(name="fetch")(fetch_page), app.task(name="parse")(parse_page)
        with pytest.raises(UsageError, match=r"<Task parse .*> is a part of a workflow: delay= is for the head"):
            await (fetch.si("x") | parse.options(delay=5)).publish()
        with pytest.raises(UsageError, match=r"a \| b makes copies with fresh ids; .*publish\(task_id=...\)"):
            fetch.options(task_id="mine").si("x") | parse
        head = fetch.options(delay=3600).si("x") | parse.options(expires=5, policy=NoRetry())
        published = await head.publish(task_id="the whole")
        [message] = await app.service_bus_client.peek()
        following = decode(message.body, "tasks").on_success
        assert (message.message_id, published.task_id) == ("the whole", "the whole")
        assert message.scheduled_enqueue_time_utc is not None
        assert (following.expires, following.policy) == (5, NoRetry())


async def test_a_returned_task_waits_as_long_as_it_was_told_to(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task
    async def later(state): ...

    @app.task
    async def route(state):
        return later.options(delay=3600)

    await route.delay()
    await work_off(app)
    [message] = await app.service_bus_client.peek()
    now = datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(minutes=50) < message.scheduled_enqueue_time_utc - now <= datetime.timedelta(hours=1)


async def test_many_are_published_with_the_options_of_each_but_not_with_one_id():
    async with app_with_pages() as app:
        parse = app.task(name="parse")(parse_page)
        await app.publish_many([parse.options(delay=3600).si(), parse.si(), parse], expires=9)
        messages = await app.service_bus_client.peek()
        assert [message.scheduled_enqueue_time_utc is not None for message in messages] == [True, False, False]
        assert [decode(message.body, "tasks").expires for message in messages] == [9, 9, 9]
        with pytest.raises(UsageError, match=r"publish_many: task_id= can be that of one task only"):
            await app.publish_many([parse.si()], task_id="x")


async def test_a_task_knows_when_it_was_due(new_bus):
    app, etas = Boilermaker(None, new_bus()), []

    @app.task
    async def work(state):
        etas.append(current_task().eta)

    before = datetime.datetime.now(datetime.UTC)
    eta = before + datetime.timedelta(seconds=1)
    await work.delay()
    await app.apply_async(work, eta=eta)
    async with working(app):
        await until(lambda: len(etas) == 2)
    at_once, scheduled = etas
    assert abs(at_once - before) < datetime.timedelta(seconds=PATIENCE)
    assert abs(scheduled - eta) < datetime.timedelta(milliseconds=2)


async def test_a_task_that_blocks_the_event_loop_is_named_in_the_log(open_bus, caplog, monkeypatch):
    monkeypatch.setattr(boilermaker, "LONGEST_BLOCK", 0.05)
    app = Boilermaker(None, open_bus())

    def spin():
        deadline = time.monotonic() + PATIENCE
        while "Blocks the event loop" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)

    @app.task
    async def crunch(state):
        spin()

    @app.task
    async def wait(state):
        await asyncio.sleep(0.3)

    await app.publish_many([wait.si(), crunch.si()])
    await work_off(app)
    [record] = [record for record in caplog.records if "Blocks the event loop" in record.getMessage()]
    assert record.getMessage().startswith("[crunch] Blocks the event loop sequence_number=2 for over 0.05 s")
    assert "in spin\n" in record.getMessage()
    assert record.task == "crunch"


# ======================================================================================================================
# Lifecycle: lifespan, middleware, what is called after a settlement
# ======================================================================================================================


def recorded_lifespan(events, state="state of the worker"):
    """A lifespan that notes when it is entered and left."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        events.append("entered")
        try:
            yield state
        finally:
            await asyncio.sleep(0)
            events.append("left")

    return lifespan


async def test_a_worker_enters_the_lifespan_before_the_first_message_and_leaves_it_after_the_last_settlement(new_bus):
    events, bus = [], new_bus()
    app = Boilermaker("state of the application", bus, lifespan=recorded_lifespan(events))
    app.on_settled(lambda task, outcome, seconds, waited: events.append(f"settled {outcome}"))

    @app.task
    async def work(state):
        events.append(state)

    await work.delay()
    assert events == []  # publishers never enter it
    await work_off(app)
    assert events == ["entered", "state of the worker", "settled returned", "left"]


async def test_a_lifespan_that_yields_nothing_leaves_the_state_of_the_application(open_bus):
    states = []
    app = Boilermaker("state of the application", open_bus(), lifespan=recorded_lifespan([], None))

    @app.task
    async def work(state):
        states.append(state)

    await work.delay()
    await work_off(app)
    assert states == ["state of the application"]


async def test_each_run_enters_a_lifespan_of_its_own(open_bus):
    app = Boilermaker(None, open_bus(), lifespan=lambda app: contextlib.nullcontext(next(numbers)))
    numbers, states, both = iter(range(9)), [], asyncio.Event()

    @app.task
    async def work(state):
        states.append(state)
        if len(states) == 2:
            both.set()
        await both.wait()

    await app.publish_many([work, work])
    async with working(app, concurrency=1), working(app, concurrency=1):
        await until(lambda: len(states) == 2)
    assert sorted(states) == [0, 1]


async def test_an_error_on_entering_the_lifespan_is_that_of_the_run_and_nothing_was_received(new_bus, caplog):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        raise LookupError("no database")
        yield

    bus = new_bus()
    app = Boilermaker(None, bus, lifespan=lifespan)
    app.register_async(parse_page)
    await app.publish_task(Task.si(parse_page))
    with pytest.raises(LookupError, match="no database"):
        await app.run()
    assert "cannot start: no database" in caplog.text
    [message] = await bus.peek()
    assert message.delivery_count == 0
    assert app.workers == set()


async def test_an_error_on_leaving_the_lifespan_is_that_of_the_run_and_what_it_did_stays_done(open_bus, caplog):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        raise LookupError("the pool is stuck")

    app = Boilermaker(None, open_bus(), lifespan=lifespan)
    app.register_async(parse_page)
    await app.publish_task(Task.si(parse_page))
    with pytest.raises(LookupError, match="the pool is stuck"):
        await app.run(burst=True)
    assert "was ended by an error: the pool is stuck" in caplog.text
    assert await is_empty(app.service_bus_client)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_run_leaves_the_lifespan_after_its_tasks(new_bus, times):
    events, started = [], asyncio.Event()
    bus = new_bus()
    app = Boilermaker(None, bus, lifespan=recorded_lifespan(events))

    @app.task
    async def work(state):
        started.set()
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            events.append("task ended")

    await work.delay()
    run = asyncio.create_task(app.run())
    await started.wait()
    for _ in range(times):
        run.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([run])
    assert run.cancelled()
    assert events == ["entered", "task ended", "left"]
    assert [each.delivery_count for each in await bus.peek()] == [1]


async def test_a_run_that_is_cancelled_while_it_enters_the_lifespan_ends(open_bus):
    events, entering = [], asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        try:
            entering.set()
            await asyncio.sleep(PATIENCE)
            yield
        finally:
            events.append("cleaned up")

    app = Boilermaker(None, open_bus(), lifespan=lifespan)
    run = asyncio.create_task(app.run())
    await entering.wait()
    run.cancel()
    run.cancel()
    await asyncio.wait([run])
    assert run.cancelled()
    assert events == ["cleaned up"]


async def test_a_worker_that_is_stopped_while_it_enters_the_lifespan_receives_nothing(open_bus):
    entering, go_on, ran = asyncio.Event(), asyncio.Event(), []

    @contextlib.asynccontextmanager
    async def lifespan(app):
        entering.set()
        await go_on.wait()
        yield

    app = Boilermaker(None, open_bus(), lifespan=lifespan)

    @app.task
    async def work(state):
        ran.append(1)

    await work.delay()
    run = asyncio.create_task(app.run())
    await entering.wait()
    stopping = asyncio.create_task(app.stop())
    await asyncio.sleep(0)
    go_on.set()
    await stopping
    await run
    assert ran == []


async def test_a_lifespan_cannot_close_its_own_application(open_bus):
    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with app:
            yield

    with pytest.raises(UsageError, match=r"close\(\) was called by a task, or a worker's lifespan"):
        await asyncio.wait_for(Boilermaker(None, open_bus(), lifespan=lifespan).run(burst=True), PATIENCE)


@pytest.mark.parametrize("wrong", [5, an_async_predicate], ids=repr)
def test_a_lifespan_that_is_no_function_of_a_context_manager_is_an_error(wrong):
    with pytest.raises(UsageError, match=r"lifespan=.* decorate it with @contextlib.asynccontextmanager"):
        Boilermaker(None, LocalServiceBus(), lifespan=wrong)


async def test_a_bare_generator_as_lifespan_is_told_of_its_decorator():
    async def lifespan(app):
        yield

    with pytest.raises(UsageError, match=r"asynccontextmanager"):
        Boilermaker(None, LocalServiceBus(), lifespan=lifespan)


async def test_middleware_is_around_every_run_the_first_registered_outermost(new_bus):
    app, events = Boilermaker("state", new_bus()), []

    def around(name):
        async def middleware(task, state, call_next):
            events.append(f"{name} {task.function_name} {state}")
            result = await call_next()
            events.append(f"{name} got {result}")
            return [*result, name]

        return app.middleware(middleware)

    outer, inner = around("outer"), around("inner")
    assert inspect.iscoroutinefunction(outer)
    assert outer is not inner

    @app.task
    async def work(state, *args):
        events.append(f"work {args}")
        return []

    @app.task
    async def store(state, result):
        events.append(f"stored {result}")
        return result

    assert await work("inline") == []
    await (work.si(1) | store.s()).publish()
    await work_off(app)
    assert events == [
        *("work ()", "outer work state", "inner work state", "work (1,)", "inner got []", "outer got ['inner']"),
        *("outer store state", "inner store state", "stored ['inner', 'outer']"),
        *("inner got ['inner', 'outer']", "outer got ['inner', 'outer', 'inner']"),
    ]


async def test_what_middleware_raises_or_returns_is_the_runs(open_bus):
    app, seen = Boilermaker(None, open_bus()), []

    @app.middleware
    async def shield(task, state, call_next):
        try:
            return await call_next()
        except ValueError:
            return "instead"
        except RetryException as retry:
            seen.append(retry.msg)
            raise LookupError("no retries here") from retry

    @app.task
    async def fail(state):
        raise ValueError

    @app.task
    async def again(state):
        raise RetryException("busy")

    @app.task
    async def store(state, result):
        seen.append(result)

    await (fail.si() | store.s()).publish()
    await again.delay()
    await work_off(app)
    assert sorted(seen) == ["busy", "instead"]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_error_description == "LookupError: no retries here"


async def test_middleware_counts_towards_the_timeout_and_sees_its_cancellation(open_bus):
    app, seen = Boilermaker(None, open_bus()), []

    @app.middleware
    async def slow(task, state, call_next):
        result = await call_next()
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return result

    @app.task(timeout=0.05)
    async def quick(state): ...

    await quick.delay()
    await work_off(app)
    assert seen == ["cancelled"]
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_error_description.startswith("TimeoutError: quick ran into its timeout")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (
            lambda task, state, call_next: None,
            r"Middleware must be async: async def <lambda>\(task, state, call_next\)",
        ),
        (parse_page, r"Middleware parse_page must take \(task, state, call_next\): too many positional arguments"),
        (5, r"Middleware must be async: async def 5"),
    ],
    ids=["not async", "other arguments", "no function"],
)
def test_middleware_of_the_wrong_shape_is_an_error(function, error):
    with pytest.raises(UsageError, match=error):
        Boilermaker(None, LocalServiceBus()).middleware(function)


async def test_a_timer_a_session_and_a_scope_as_middleware(open_bus):
    """What people write: the time a task takes, a database session for each, and Sentry's scopes."""
    app, log, current = Boilermaker({"open": 0}, open_bus()), [], contextvars.ContextVar("session")

    @app.middleware
    async def timed(task, state, call_next):
        started = time.perf_counter()
        try:
            return await call_next()
        finally:
            log.append((task.function_name, time.perf_counter() >= started))

    @app.middleware
    async def session_of_its_own(task, state, call_next):
        state["open"] += 1
        token = current.set(f"session {task.args}")
        try:
            return await call_next()
        finally:
            current.reset(token)
            state["open"] -= 1

    @app.task
    async def save(state, number):
        await asyncio.sleep(0)
        log.append((current.get(), state["open"] > 0))
        if number == 2:
            raise ValueError

    await app.publish_many([save.si(number) for number in range(3)])
    await work_off(app)
    assert {entry for entry in log if entry[0] != "save"} == {(f"session [{number}]", True) for number in range(3)}
    assert log.count(("save", True)) == 3
    assert app.state == {"open": 0}


async def test_what_is_called_after_a_settlement_hears_of_every_ending(new_bus):
    app, heard = Boilermaker(None, new_bus()), []

    @app.on_settled
    def note(task, outcome, seconds, waited):
        heard.append((task and task.function_name, str(outcome)))
        assert seconds >= 0
        assert waited >= 0

    @app.task
    async def work(state): ...

    @app.task
    async def fail(state):
        raise ValueError

    @app.task(policy=RetryPolicy(max_tries=2, delay=3600))
    async def again(state):
        raise RetryException("later")

    bus = app.service_bus_client
    await app.publish_many([work, fail, again])
    await app.send_task("unknown")
    await bus.send([letter("no task", queue=bus.queue_name)])
    await work_off(app)
    assert sorted(heard, key=str) == [
        *(("again", "retry"), ("fail", "failed"), ("unknown", "unregistered"), ("work", "returned")),
        (None, "undecodable"),
    ]


async def test_what_is_called_after_a_settlement_and_fails_stops_nothing(open_bus, caplog):
    app, heard = Boilermaker(None, open_bus()), []
    app.register_async(parse_page)

    @app.on_settled
    def broken(task, outcome, seconds, waited):
        raise LookupError("no such metric")

    app.on_settled(lambda *facts: heard.append(facts))
    await app.publish_many([Task.si(parse_page), Task.si(parse_page)])
    await work_off(app)
    assert len(heard) == 2
    assert "What on_settled was given has failed" in caplog.text
    assert "no such metric" in caplog.text


@pytest.mark.parametrize("wrong", [5, an_async_predicate], ids=repr)
def test_what_is_called_after_a_settlement_is_a_plain_function(wrong):
    with pytest.raises(UsageError, match=r"on_settled takes a function, not async"):
        Boilermaker(None, LocalServiceBus()).on_settled(wrong)


# ======================================================================================================================
# Results
# ======================================================================================================================

# What takes `open_bus` is about the embedded queue; what takes `local_bus` has to hold on any.


def keeping_app(bus, **options):
    """An application whose tasks keep their results for a minute."""
    app = Boilermaker([], bus)
    keep = partial(app.task, result_ttl=60, **options)

    @keep()
    async def give(state, value=None):
        return value

    @keep()
    async def double(state, number):
        return 2 * number

    @keep()
    async def fail(state, message="no"):
        raise LookupError(message)

    @keep()
    async def ask(state, task_id, timeout=PATIENCE):
        return await app.result(task_id, timeout)

    @app.task
    async def forget(state, value=None):
        return value

    return app, SimpleNamespace(give=give, double=double, fail=fail, ask=ask, forget=forget)


async def failure_of_result(awaited):
    """The failure that awaiting a result ends in."""
    with pytest.raises(TaskFailed) as caught:
        await asyncio.wait_for(awaited, PATIENCE)
    return caught.value


def kept_outcomes(bus):
    """The outcomes in a queue's file, by task id."""
    return dict(rows_of(bus.path, "SELECT task_id, value FROM outcome"))


# -- decisions: what is told to whom


TO = boilermaker.Address("head", 60.0)


def awaited(**fields):
    return named("f", outcome_to=TO, **fields)


def told(settlement):
    """Of an answer: whether it failed, and the value, or of a failure its name."""
    answer = settlement.answer
    if answer is None:
        return None
    assert answer.to == TO
    value = json.loads(answer.value)
    return (answer.failed, value["error"] if answer.failed else value)


@pytest.mark.parametrize(
    ("outcome", "error", "answer"),
    [
        (Outcome.RETURNED, None, (False, 42)),
        (Outcome.FAILED, LookupError("x"), (True, "LookupError")),
        (Outcome.FAILED, None, (True, "TaskFailureResult")),
        (Outcome.RETRY, RetryException("x"), None),
        (Outcome.EXHAUSTED, RetryException("x"), (True, "RetryException")),
        (Outcome.NO_TRY_LEFT, RetryException("x"), (True, "RetriesExhausted")),
        (Outcome.KILLER, BoilermakerError("x"), (True, "MaxDeliveryCountExceeded")),
        (Outcome.EXPIRED, BoilermakerError("x"), (True, "Expired")),
        (Outcome.UNREGISTERED, UsageError("x"), (True, "UnregisteredFunction")),
        (Outcome.STOPPED, None, None),
        (Outcome.LOCK_LOST, None, None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize(("should_dead_letter", "acks_late"), FLAGS)
def test_who_awaits_is_told_as_the_table_says_however_the_message_is_settled(
    outcome, error, answer, should_dead_letter, acks_late
):
    flags = {"should_dead_letter": should_dead_letter, "acks_late": acks_late}
    assert told(decided(awaited(**flags), outcome, 42, error)) == answer
    failing = awaited(on_failure=named("g"), **flags)
    assert told(decided(failing, outcome, 42, error)) == answer
    assert decided(named("f", **flags), outcome, 42, error).answer is None


@pytest.mark.parametrize(
    ("task", "result"),
    [(awaited(on_success=named("g")), 42), (awaited(), named("g"))],
    ids=["on_success", "a returned task"],
)
def test_what_goes_on_tells_nothing_and_hands_on_the_address(task, result):
    settlement = decided(task, Outcome.RETURNED, result)
    assert settlement.answer is None
    [following] = settlement.follow_ups
    assert (following.task.function_name, following.task.outcome_to) == ("g", TO)


def test_a_retry_carries_the_address_and_the_callback_of_a_failure_does_not():
    assert follow_up_of(awaited(), Outcome.RETRY, error=RetryException("later")).outcome_to == TO
    failing = awaited(on_failure=named("g"))
    assert follow_up_of(failing, Outcome.FAILED, error=ValueError()).outcome_to is None


def test_the_callback_of_a_failure_is_told_of_at_an_address_of_its_own():
    own = boilermaker.Address("callback", 5.0)
    failing = awaited(on_failure=named("g", outcome_to=own))
    assert follow_up_of(failing, Outcome.FAILED, error=ValueError()).outcome_to == own


@pytest.mark.parametrize("name", [name for name in NOT_JSON if name != "task"])  # which would take over
def test_a_value_that_json_cannot_carry_is_a_failure_with_the_cause(name):
    value = NOT_JSON[name]
    settlement = decided(awaited(), Outcome.RETURNED, value)
    assert (settlement.action, settlement.reason) == (Do.DEAD_LETTER, "FollowUpRejected")
    assert "f returned " in settlement.description
    assert told(settlement) == (True, "InvalidArguments")
    plain = decided(named("f"), Outcome.RETURNED, value)
    assert (plain.action, plain.answer) == (Do.COMPLETE, None)


def test_a_follow_up_that_cannot_be_made_is_a_failure_with_the_cause():
    settlement = decided(awaited(on_success=named("g")), Outcome.RETURNED, 1)
    settlement = boilermaker.rejected(settlement, MessageTooLarge("too large"), "tasks")
    assert told(settlement) == (True, "MessageTooLarge")
    assert (settlement.action, settlement.follow_ups) == (Do.DEAD_LETTER, ())


def test_a_dead_letter_that_stays_one_tells_nothing_anew():
    settlement = decided(awaited(), Outcome.FAILED, error=ValueError(), queue=DEAD)
    assert (settlement.action, settlement.answer) == (Do.KEEP, None)
    again = boilermaker.rejected(decided(awaited(), Outcome.RETURNED, 1, queue=DEAD), ValueError(), DEAD)
    assert (again.action, again.answer) == (Do.KEEP, None)


def test_all_endings_of_a_task_are_sent_under_one_id_and_those_of_two_under_two():
    def sent_as(outcome, error=None, message_id="m", **fields):
        task = named("f", outcome_to=TO._replace(queue="replies"), **fields)
        return decided(task, outcome, 1, error, message_id=message_id).answer.message_id

    ids = {sent_as(Outcome.RETURNED), sent_as(Outcome.FAILED, ValueError()), sent_as(Outcome.EXPIRED, ValueError())}
    assert len(ids) == 1
    assert sent_as(Outcome.RETURNED, message_id="another") not in ids
    assert sent_as(Outcome.RETURNED, attempts=tried(1), root="r") == "r:outcome"


def test_what_is_told_of_a_message_that_ends_without_a_run():
    body = encode(awaited(attempts=tried(2)), "tasks", "tasks")
    answer = boilermaker.ended_by(body, "tasks", "Cancelled", "The message was removed.")
    assert answer.to == TO
    assert json.loads(answer.value) == {
        "task_id": decode(body, "tasks").task_id,
        "function_name": "f",
        "error": "Cancelled",
        "message": "The message was removed.",
        "traceback": "",
        "attempts": 2,
    }
    assert boilermaker.ended_by(body.encode(), "tasks", "Cancelled", "") is not None
    for other in (encode(named("f", args=["outcome_to"]), "tasks", "tasks"), "outcome_to", b"\xffoutcome_to"):
        assert boilermaker.ended_by(other, "tasks", "Cancelled", "") is None


# -- values


@pytest.mark.parametrize("value", JSON_VALUES, ids=ascii)
async def test_what_a_task_returned_is_what_awaits_it(local_bus, value):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay(value)
    await work_off(app)
    assert repr(await published.result(PATIENCE)) == repr(value)


async def test_what_json_changes_is_changed_as_in_arguments(open_bus):
    app, _ = keeping_app(open_bus())

    @app.task(result_ttl=60)
    async def tuples(state):
        return {1: (2, 3)}

    published = await tuples.delay()
    await work_off(app)
    assert await published.result(0) == {"1": [2, 3]}


async def test_a_result_that_is_awaited_before_the_task_runs_comes_when_it_has(local_bus):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay("late")
    waiting = [asyncio.create_task(published.result(timeout)) for timeout in (None, PATIENCE)]
    by_id = asyncio.create_task(app.result(published.task_id, datetime.timedelta(seconds=PATIENCE)))
    await asyncio.sleep(0.05)
    assert not any(each.done() for each in [*waiting, by_id])
    async with working(app):
        assert await asyncio.wait_for(asyncio.gather(*waiting, by_id), PATIENCE) == ["late"] * 3


WORKFLOWS = {
    "a | b": lambda tasks: tasks.give.si(4) | tasks.double.s(),
    "a | b | c": lambda tasks: tasks.give.si(2) | tasks.double.s() | tasks.double.s(),
    "a >> b": lambda tasks: linked(tasks.give.si(4), tasks.double.s()),
    "chain": lambda tasks: tasks.app.chain(tasks.give.si(4), tasks.double.s()),
    "a step that keeps nothing": lambda tasks: tasks.give.si(4) | tasks.forget.s() | tasks.double.s(),
    "a head that keeps nothing": lambda tasks: tasks.forget.si(4) | tasks.double.s(),
    "an end that keeps nothing": lambda tasks: tasks.double.si(4) | tasks.forget.s(),
    "a returned task": lambda tasks: tasks.route.si(),
    "a task returned by a step": lambda tasks: tasks.give.si(None) | tasks.route.si(),
    "a returned chain": lambda tasks: tasks.route_to_chain.si(),
    "a returned task, and what follows": lambda tasks: tasks.route_to_four.si() | tasks.double.s(),
    "retries": lambda tasks: tasks.third_time.si(),
    "acks_late=False": lambda tasks: Task.si(tasks.double, 4, acks_late=False),
}


def linked(first, *others):
    for before, after in itertools.pairwise((first, *others)):
        before.on_success = after
    return first


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
async def test_the_result_of_a_workflow_is_that_of_its_last_step(local_bus, workflow):
    app, tasks = keeping_app(local_bus())

    @app.task(result_ttl=60)
    async def route(state):
        return tasks.double.si(4)

    @app.task(result_ttl=60)
    async def route_to_chain(state):
        return tasks.give.si(2) | tasks.double.s() | tasks.forget.s() | tasks.double.s()

    @app.task
    async def route_to_four(state):
        return tasks.give.si(4)

    @app.task(result_ttl=60, policy=RetryPolicy(max_tries=3, delay=0))
    async def third_time(state):
        if current_task().attempts.attempts < 2:
            raise RetryException("not yet")
        return 8

    more = {"app": app, "route": route, "route_to_chain": route_to_chain, "route_to_four": route_to_four}
    vars(tasks).update(more, third_time=third_time)
    published = await app.publish_task(workflow(tasks))
    waiting = asyncio.create_task(published.result(PATIENCE))
    await work_off(app)
    assert await waiting == 8
    assert await app.result(published.task_id, PATIENCE) == 8


async def test_of_a_workflow_there_is_one_outcome_and_nothing_of_what_is_retried(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)

    @app.task(result_ttl=60, policy=RetryPolicy(max_tries=2, delay=3600))
    async def later(state):
        raise RetryException("later")

    chain = await (tasks.give.si(1) | tasks.double.s() | tasks.double.s()).publish()
    retried = await later.delay()
    await work_off(app)
    assert kept_outcomes(bus) == {chain.task_id: "4"}
    with pytest.raises(TimeoutError):
        await retried.result(0)


# -- how long an outcome is kept


async def ttl_in_message(app):
    [message] = await app.service_bus_client.peek()
    address = message.task.outcome_to
    if address is None:
        assert "outcome_to" not in message.body
        return None
    assert address.id == message.task.task_id
    return address.ttl


PUBLISHED_WITH_A_TTL = {
    "nothing": (lambda app, keep, forget: forget.delay(), None),
    "registration": (lambda app, keep, forget: keep.delay(), 60),
    "options": (lambda app, keep, forget: forget.options(result_ttl=5).delay(), 5),
    "options of si": (lambda app, keep, forget: forget.options(result_ttl=5).si().publish(), 5),
    "publish, over options": (lambda app, keep, forget: forget.options(result_ttl=5).si().publish(result_ttl=6), 6),
    "shorter than the registration": (lambda app, keep, forget: keep.si().publish(result_ttl=5), 5),
    "a timedelta": (lambda app, keep, forget: forget.si().publish(result_ttl=datetime.timedelta(minutes=2)), 120),
    "publish_task": (lambda app, keep, forget: app.publish_task(forget, result_ttl=5), 5),
    "publish_many": (lambda app, keep, forget: app.publish_many([forget.si()], result_ttl=5), 5),
    "apply_async": (lambda app, keep, forget: app.apply_async(keep), 60),
    "create_task": (lambda app, keep, forget: app.create_task(keep).publish(), 60),
    "by function": (lambda app, keep, forget: app.publish_task(Task.si(keep.function)), 60),
    "send_task": (lambda app, keep, forget: app.send_task("unknown", result_ttl=5), 5),
    "send_task, which has what the sender gives": (lambda app, keep, forget: app.send_task("keep"), None),
    "a chain's end": (lambda app, keep, forget: (forget.si() | forget.si() | keep.si()).publish(), 60),
    "the longest of a chain": (lambda app, keep, forget: (forget.si() | keep.si() | longest_of(app)).publish(), 90),
    "a chain, given": (lambda app, keep, forget: (keep.si() | forget.si()).publish(result_ttl=5), 5),
    "only a callback keeps": (lambda app, keep, forget: failing_into(forget.si(), keep.si()).publish(), None),
}


def longest_of(app):
    return Task.si(app.registration("longest").function)


def failing_into(task, callback):
    task.on_failure = callback
    return task


@pytest.mark.parametrize(("publish", "ttl"), PUBLISHED_WITH_A_TTL.values(), ids=PUBLISHED_WITH_A_TTL)
async def test_an_outcome_is_kept_for_as_long_as_was_said_or_the_longest_that_a_step_says(local_bus, publish, ttl):
    app = Boilermaker(None, local_bus())

    @app.task(result_ttl=60)
    async def keep(state): ...

    @app.task
    async def forget(state): ...

    @app.task(result_ttl=90)
    async def longest(state): ...

    await publish(app, keep, forget)
    if ttl is None:
        [message] = await app.service_bus_client.peek()
        assert message.task.outcome_to is None
    else:
        assert await ttl_in_message(app) == ttl


@pytest.mark.parametrize("role", ["on_success", "on_failure"])
async def test_how_long_an_outcome_is_kept_is_said_of_the_head(open_bus, role):
    app, tasks = keeping_app(open_bus())
    head, step = tasks.give.si(), tasks.forget.options(result_ttl=5).si()
    setattr(head, role, step)
    with pytest.raises(UsageError, match="is a part of a workflow: result_ttl= is for the head of what is published"):
        await app.publish_task(head)


async def test_a_tick_keeps_no_result(open_bus):
    app, tasks = keeping_app(open_bus())
    schedule = app.schedule(tasks.give.si(), every=datetime.timedelta(hours=1), name="hourly")
    await app.publish_ticks(schedule, schedule.next_times(1))
    assert [message.task.outcome_to for message in await app.service_bus_client.peek()] == [None]


async def test_where_nothing_is_kept_nothing_appears(open_bus):
    """No field in a message, no row in the file, nobody who looks."""
    bus = open_bus()
    app = Boilermaker([], bus)

    @app.task(policy=RetryPolicy(max_tries=2, delay=0))
    async def work(state, number):
        state.append(number)
        if number == 1 and current_task().attempts.attempts == 0:
            raise RetryException("again")
        return object()

    workflow = work.si(0) | work.si(1) | failing_into(work.si(2), work.si(3))
    await app.publish_many([workflow, work.si(4)])
    assert not any("outcome_to" in message.body for message in await bus.peek())
    threads = threading.active_count()
    await work_off(app)
    assert sorted(app.state) == [0, 1, 1, 2, 4]
    assert (kept_outcomes(bus), bus._outcomes) == ({}, {})
    assert threading.active_count() <= threads + 1


async def test_a_result_is_given_as_often_as_one_asks_until_it_expires(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    with moved_clock() as clock:
        short = await tasks.give.options(result_ttl=10).delay("short")
        failed = await tasks.fail.delay()
        await work_off(app)
        for _ in range(3):
            assert await short.result(0) == "short"
            assert (await failure_of_result(failed.result(0))).message == "no"
        clock.tick(9.9)
        assert await short.result(0) == "short"
        clock.tick(0.2)
        with pytest.raises(TimeoutError, match="or has expired"):
            await short.result(0)
        assert set(kept_outcomes(bus)) == {short.task_id, failed.task_id}  # to ask deletes nothing
        another = await tasks.give.delay()
        await work_off(app)
        assert set(kept_outcomes(bus)) == {failed.task_id, another.task_id}


async def test_what_has_expired_goes_also_by_what_writes_failures_of_removed_messages(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    with moved_clock() as clock:
        await tasks.give.delay()
        await work_off(app)
        waiting = await tasks.give.delay()
        clock.tick(61)
        await bus.cancel(waiting.sequence_number)
        assert set(kept_outcomes(bus)) == {waiting.task_id}


# -- what is wrong with a question


async def test_a_result_that_is_not_kept_is_an_error_that_says_what_to_write(local_bus):
    _, tasks = keeping_app(local_bus())
    with pytest.raises(UsageError, match=r"forget .* is not published yet: what publishing gives has the result"):
        await tasks.forget.si().result(1)
    with pytest.raises(UsageError, match="is not published yet"):
        await named("f").result(1)
    published = await tasks.forget.delay()
    with pytest.raises(
        UsageError,
        match=r"The result of .*forget.* is not kept: @app.task\(result_ttl=600\) above forget, or "
        r"publish\(result_ttl=600\), keeps it for ten minutes",
    ):
        await published.result(1)


async def test_the_result_of_a_step_is_that_of_its_workflow(local_bus):
    _, tasks = keeping_app(local_bus())
    published = await (tasks.give.si(1) | tasks.double.s()).publish()
    with pytest.raises(UsageError, match="is not published yet"):
        await published.on_success.result(1)


@pytest.mark.parametrize("wrong", [-1, -0.5, "5", True, float("nan"), 2**31, [], datetime.timedelta(-1)], ids=repr)
async def test_a_timeout_that_is_none_is_an_error_that_shows_it(local_bus, wrong):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay()
    for ask in (published.result, partial(app.result, published.task_id)):
        with pytest.raises(UsageError, match=re.escape(f"timeout={wrong!r} must be seconds")):
            await ask(wrong)


async def test_to_ask_without_a_timeout_is_an_error(local_bus):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay()
    with pytest.raises(TypeError, match="timeout"):
        await published.result()
    with pytest.raises(TypeError, match="timeout"):
        await app.result(published.task_id)


@pytest.mark.parametrize("task_id", [None, "", 5, b"id", ["id"], parse_page, "\ud800"], ids=ascii)
async def test_an_id_that_is_none_is_an_error_that_shows_it(local_bus, task_id):
    app, _ = keeping_app(local_bus())
    with pytest.raises(UsageError, match=r"task_id=.* must be that of a published task, a string"):
        await app.result(task_id, 0)


@pytest.mark.parametrize("value", [0, -1, True, "5", float("nan"), 2**31, datetime.timedelta(0)], ids=repr)
async def test_a_ttl_that_cannot_be_is_an_error_that_shows_it(value):
    with pytest.raises(UsageError, match=re.escape(f"result_ttl={value!r} must be seconds over 0")):
        registration_with(result_ttl=value)
    app, tasks = keeping_app(LocalServiceBus())
    with pytest.raises(UsageError, match=re.escape(f"result_ttl={value!r} must be seconds over 0")):
        tasks.give.options(result_ttl=value)
    with pytest.raises(UsageError, match=re.escape(f"result_ttl={value!r} must be seconds over 0")):
        await app.publish_task(tasks.give.si(), result_ttl=value)


@pytest.mark.parametrize("task_id", ["unknown", "nul\0", "x" * 100_000], ids=["unknown", "nul", "long"])
@pytest.mark.parametrize("timeout", [0, 0.05, datetime.timedelta(milliseconds=20)], ids=repr)
async def test_what_nobody_has_published_has_no_outcome_in_time(open_bus, task_id, timeout):
    app, tasks = keeping_app(open_bus())
    with pytest.raises(TimeoutError, match=r"has no outcome after .* s: it waits or runs, its outcome is not kept"):
        await app.result(task_id, timeout)
    published = await tasks.give.delay("there")
    await work_off(app)
    assert await published.result(PATIENCE) == "there"  # whoever asked before


async def test_a_timeout_leaves_the_task_alone(local_bus):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay("there")
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError):
            await published.result(timeout)
    await work_off(app)
    assert await published.result(datetime.timedelta(seconds=PATIENCE)) == "there"


async def test_a_question_that_is_cancelled_leaves_the_others_alone(local_bus):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay("there")
    first, second = (asyncio.create_task(published.result(None)) for _ in range(2))
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    await work_off(app)
    assert await asyncio.wait_for(second, PATIENCE) == "there"


# -- failures


FAILURES = {
    # The fields of the failure, and the reason of the dead letter where there is one.
    "raises": (lambda tasks: tasks.fail.si("broken"), "LookupError", "broken", 1, "TaskFailed"),
    "should_dead_letter=False": (
        lambda tasks: Task.si(tasks.fail, "broken", should_dead_letter=False),
        *("LookupError", "broken", 1, None),
    ),
    "acks_late=False": (
        lambda tasks: Task.si(tasks.fail, "broken", acks_late=False),
        *("LookupError", "broken", 1, None),
    ),
    "TaskFailureResult": (lambda tasks: tasks.give_up.si(), "TaskFailureResult", "", 1, "TaskFailed"),
    "its timeout": (
        lambda tasks: tasks.dawdle.si(),
        *("TimeoutError", "dawdle ran into its timeout of 0.05 s", 1, "TaskFailed"),
    ),
    "retries exhausted": (lambda tasks: tasks.insist.si(), "RetryException", "once more", 2, "RetriesExhausted"),
    "no try": (
        lambda tasks: Task.si(tasks.give, policy=RetryPolicy(max_tries=0)),
        *("RetriesExhausted", "no try left: 0 made, ", 0, "RetriesExhausted"),
    ),
    "unregistered": (
        lambda tasks: named("nobody"),
        *("UnregisteredFunction", "'nobody' is not registered", 0, "UnregisteredFunction"),
    ),
    "no JSON": (
        lambda tasks: tasks.give_what_is_no_json.si(),
        *("InvalidArguments", "give_what_is_no_json returned <object", 1, "FollowUpRejected"),
    ),
    "too large": (
        lambda tasks: tasks.give_much.si(),
        *("MessageTooLarge", "it makes an outcome of 300002 bytes, the limit is 262144", 1, "FollowUpRejected"),
    ),
    "too large for the next step": (
        lambda tasks: tasks.give_much.si() | tasks.give.s(),
        *("MessageTooLarge", "makes a message of 300", 1, "FollowUpRejected"),
    ),
    "the second step": (
        lambda tasks: tasks.give.si("of the chain") | tasks.fail.s() | tasks.give.s(),
        *("LookupError", "of the chain", 1, "TaskFailed"),
    ),
    "a returned task": (lambda tasks: tasks.route_to_fail.si(), "LookupError", "taken over", 1, "TaskFailed"),
    "a returned task that is published": (
        lambda tasks: tasks.publish_and_return.si(),
        *("UsageError", "is published already, so its outcome is not that of publish_and_return", 1, "TaskFailed"),
    ),
}


@pytest.mark.parametrize(("make", "error", "message", "attempts", "reason"), FAILURES.values(), ids=FAILURES)
async def test_a_workflow_that_has_failed_for_good_raises_what_on_failure_would_get(
    local_bus, make, error, message, attempts, reason
):
    app, tasks = keeping_app(local_bus())
    bus = app.service_bus_client

    @app.task
    async def give_up(state):
        return TaskFailureResult

    @app.task(timeout=0.05)
    async def dawdle(state):
        await asyncio.sleep(PATIENCE)

    @app.task(policy=RetryPolicy(max_tries=2, delay=0))
    async def insist(state):
        raise RetryException("once more")

    @app.task
    async def give_what_is_no_json(state):
        return object()

    @app.task
    async def give_much(state):
        return "x" * 300_000

    @app.task
    async def route_to_fail(state):
        return tasks.fail.si("taken over")

    @app.task
    async def publish_and_return(state):
        return await tasks.give.delay()

    vars(tasks).update(locals())
    published = await app.publish_task(make(tasks), result_ttl=60)
    waiting = asyncio.create_task(published.result(None))
    await work_off(app)
    failure = await failure_of_result(waiting)
    again = await failure_of_result(app.result(published.task_id, PATIENCE))
    assert vars(again) == vars(failure)
    assert (failure.error, failure.attempts) == (error, attempts)
    assert message in failure.message
    assert isinstance(failure.message, str)
    assert str(failure).startswith(f"{failure.function_name} {failure.task_id}: {error}")
    assert getattr(failure, "__notes__", []) == ([failure.traceback] if failure.traceback else [])
    dead = await bus.peek(dead_letter=True)
    assert [each.dead_letter_reason for each in dead] == ([reason] if reason else [])
    if dead:
        assert (dead[0].task.task_id, dead[0].task.function_name) == (failure.task_id, failure.function_name)


async def test_a_failure_is_what_its_on_failure_receives_and_carries_the_traceback(local_bus):
    app, tasks = keeping_app(local_bus())

    @app.task
    async def mourn(state, failure):
        state.append(failure)

    published = await failing_into(tasks.fail.si("broken"), mourn.s()).publish()
    await work_off(app)
    failure = await failure_of_result(published.result(PATIENCE))
    assert app.state == [{name: getattr(failure, name) for name in app.state[0]}]
    assert set(app.state[0]) == {"task_id", "function_name", "error", "message", "traceback", "attempts"}
    shown = "".join(traceback.format_exception(failure))
    assert "raise LookupError(message)\nLookupError: broken" in shown
    assert f"boilermaker.TaskFailed: fail {published.task_id}: LookupError: broken" in shown


def test_a_failure_shows_what_it_has():
    failure = TaskFailed({"function_name": "f", "task_id": "id", "error": "Expired"})
    assert str(failure) == "f id: Expired"
    assert (failure.message, failure.traceback, failure.attempts) == ("", "", 0)
    again = pickle.loads(pickle.dumps(failure))
    assert (vars(again), str(again)) == (vars(failure), "f id: Expired")


async def test_a_task_that_is_begun_too_late_has_failed_for_who_awaits_it(local_bus):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.options(expires=0.01).delay()
    waiting = asyncio.create_task(published.result(None))
    await asyncio.sleep(0.05)
    await work_off(app)
    failure = await failure_of_result(waiting)
    assert (failure.error, failure.attempts) == ("Expired", 0)
    assert "expires after 0.01" in failure.message


@pytest.mark.parametrize("by", ["by us", "by the bus"])
async def test_a_task_that_ends_its_workers_has_failed_for_who_awaits_it(open_bus, by):
    bus = open_bus(max_delivery_count=1 if by == "by the bus" else 10, lock_duration=0.05)
    app, tasks = keeping_app(bus)
    published = await tasks.give.delay()
    waiting = asyncio.create_task(published.result(None))
    await take_and_drop(bus)
    await asyncio.sleep(0.1)
    await work_off(app, max_deliveries=1 if by == "by us" else None)
    failure = await failure_of_result(waiting)
    assert (failure.error, failure.message) == (
        "MaxDeliveryCountExceeded",
        "It was delivered 1 times, never settled.",
    )
    assert [each.dead_letter_reason for each in await bus.peek(dead_letter=True)] == ["MaxDeliveryCountExceeded"]


async def test_a_task_that_outlives_its_queues_time_to_live_has_failed_for_who_awaits_it(open_bus):
    bus = open_bus(time_to_live=0.02)
    app, tasks = keeping_app(bus)
    published = await (tasks.give.si() | tasks.double.s()).publish()
    waiting = asyncio.create_task(published.result(None))
    await asyncio.sleep(0.05)
    await work_off(app)
    failure = await failure_of_result(waiting)
    assert (failure.error, failure.function_name) == ("TTLExpiredException", "give")
    assert [each.dead_letter_reason for each in await bus.peek(dead_letter=True)] == ["TTLExpiredException"]


async def test_a_failure_whose_text_is_long_is_cut_as_a_dead_letters_is(open_bus):
    app = Boilermaker(None, open_bus(max_message_bytes=120_000))

    @app.task(result_ttl=60)
    async def fail(state):
        raise LookupError("\U0001f388" * 20_000)

    published = await fail.delay()
    await work_off(app)
    failure = await failure_of_result(published.result(0))
    assert (failure.error, failure.message) == ("LookupError", "\U0001f388" * 4096)
    assert len(failure.traceback) == 4096


async def test_the_callback_of_a_failure_has_a_result_of_its_own(local_bus):
    app, tasks = keeping_app(local_bus())

    @app.task(result_ttl=60)
    async def mourn(state, failure):
        return f"mourned {failure['message']}"

    @app.task(result_ttl=60)
    async def carve(state, text):
        return f"{text}, carved"

    head = tasks.give.si("ada") | tasks.fail.s()
    head.on_success.on_failure = mourn.s() | carve.s()
    published = await head.publish()
    await work_off(app)
    assert (await failure_of_result(published.result(PATIENCE))).message == "ada"
    callback = published.on_success.on_failure
    assert await app.result(callback.task_id, PATIENCE) == "mourned ada, carved"


async def test_a_failure_that_nobody_keeps_may_have_a_callback_that_does(local_bus):
    app, tasks = keeping_app(local_bus())

    @app.task
    async def break_down(state):
        raise ValueError

    published = await failing_into(break_down.si(), tasks.give.si("kept")).publish()
    with pytest.raises(UsageError, match="is not kept"):
        await published.result(0)
    await work_off(app)
    assert await app.result(published.on_failure.task_id, PATIENCE) == "kept"


# -- what removes a message


async def removed(bus, how):
    """Remove the one message that there is."""
    if how == "cancel":
        [message] = await bus.peek()
        await bus.cancel(message.sequence_number)
    else:
        assert len(await getattr(bus, how)(lambda message: True)) == 1


@pytest.mark.parametrize(("how", "scheduled"), [("cancel", True), ("cancel", False), ("purge", True), ("purge", False)])
async def test_who_awaits_a_message_that_is_removed_hears_of_it(open_bus, start_program, how, scheduled):
    """In the process that removes it, and in another."""
    bus = open_bus()
    _, tasks = keeping_app(bus)
    workflow = tasks.give.si(1) | tasks.double.s()
    published = await workflow.publish(delay=3600 if scheduled else None)
    waiting = asyncio.create_task(published.result(None))
    program = start_program(AWAITING_PROGRAM, published.task_id)
    await until(lambda: "awaits" in program[1].read_text())
    await removed(bus, how)
    failure = await failure_of_result(waiting)
    assert (failure.error, failure.function_name, failure.attempts) == ("Cancelled", "give", 0)
    assert failure.message == "The message was removed."
    assert await exit_code(program) == 0
    assert program[1].read_text().splitlines()[1:] == [f"failed: give {published.task_id}: Cancelled"]


AWAITING_PROGRAM = """
import asyncio, sys
from boilermaker import Boilermaker, LocalServiceBus, TaskFailed

async def main():
    async with Boilermaker(None, LocalServiceBus("queue.db")) as app:
        waiting = asyncio.create_task(app.result(sys.argv[1], None))
        await asyncio.sleep(0)
        print("awaits", flush=True)
        try:
            print("returned:", await waiting)
        except TaskFailed as failure:
            print("failed:", str(failure).partition(": The message")[0])

asyncio.run(main())
"""


async def test_who_awaits_a_dead_letter_that_is_discarded_hears_of_it(open_bus, start_program):
    """One that told nothing when it died, as where a former version buried it."""
    bus = open_bus()
    app, tasks = keeping_app(bus)
    published = await tasks.give.delay()
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        await settle(receiver, delivery, DEAD_LETTER)
    waiting = asyncio.create_task(app.result(published.task_id, None))
    program = start_program(AWAITING_PROGRAM, published.task_id)
    await until(lambda: "awaits" in program[1].read_text())
    await removed(bus, "discard")
    assert (await failure_of_result(waiting)).error == "Discarded"
    assert await exit_code(program) == 0
    assert program[1].read_text().splitlines()[1:] == [f"failed: give {published.task_id}: Discarded"]


async def test_a_retry_that_is_cancelled_ends_the_workflow(open_bus):
    app, _ = keeping_app(open_bus())

    @app.task(result_ttl=60, policy=RetryPolicy(max_tries=3, delay=3600))
    async def later(state):
        raise RetryException("later")

    published = await later.delay()
    await work_off(app)
    await removed(app.service_bus_client, "cancel")
    failure = await failure_of_result(published.result(0))
    assert (failure.error, failure.task_id, failure.attempts) == ("Cancelled", published.task_id, 1)


async def test_to_remove_a_dead_letter_tells_only_who_has_not_heard_of_it(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    with moved_clock() as clock:
        heard, late = await tasks.fail.delay(), await tasks.fail.options(result_ttl=5).delay()
        await work_off(app)
        clock.tick(6)
        waiting = asyncio.create_task(late.result(None))
        await asyncio.sleep(0.02)
        assert len(await bus.discard(lambda message: True)) == 2
        assert (await failure_of_result(heard.result(0))).error == "LookupError"
        assert (await failure_of_result(waiting)).error == "Discarded"


async def test_to_remove_what_nobody_awaits_tells_nothing(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    await app.publish_many([tasks.forget.si("outcome_to"), tasks.forget.si()])
    await bus.send([letter('{"outcome_to": 5}'), letter("outcome_to: no task")])
    assert len(await bus.purge(lambda message: True)) == 4
    assert kept_outcomes(bus) == {}


async def test_what_is_told_of_a_removal_is_in_its_transaction(open_bus, monkeypatch):
    bus = open_bus()
    _, tasks = keeping_app(bus)
    published = await tasks.give.delay()
    with monkeypatch.context() as patched:
        patched.setattr(boilermaker.Store, "tell", broken_disk)
        with pytest.raises(BoilermakerError):
            await bus.purge(lambda message: True)
    assert await ids_of(bus) == [published.task_id]
    assert kept_outcomes(bus) == {}


def broken_disk(*arguments, **options):
    raise sqlite3.OperationalError("disk I/O error")


# -- outcomes that are replaced


async def test_a_replay_takes_back_the_failure_and_tells_what_becomes_of_it(open_bus):
    bus = open_bus()
    app, works = Boilermaker(None, bus), []

    @app.task(result_ttl=60)
    async def work(state, number):
        if not works:
            raise ValueError("not yet")
        return number

    @app.task(result_ttl=60)
    async def double(state, number):
        return 2 * number

    published = await (work.si(4) | double.s()).publish()
    await work_off(app)
    assert (await failure_of_result(published.result(0))).error == "ValueError"
    assert len(await bus.replay(lambda message: True)) == 1
    with pytest.raises(TimeoutError):
        await published.result(0)
    waiting = asyncio.create_task(published.result(None))
    works.append(True)
    await work_off(app)
    assert await waiting == await published.result(0) == 8


async def test_a_replay_of_a_later_step_takes_back_the_failure_of_the_workflow(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    published = await (tasks.give.si("x") | tasks.fail.s()).publish()
    await work_off(app)
    assert len(await bus.replay(lambda message: True)) == 1
    assert kept_outcomes(bus) == {}
    await work_off(app)
    assert (await failure_of_result(published.result(0))).message == "x"


async def test_a_worker_on_the_dead_letter_queue_tells_what_becomes_of_a_dead_letter(open_bus):
    app, tasks = keeping_app(open_bus())
    published = await (tasks.fail.si() | tasks.double.s()).publish()
    await work_off(app)
    assert (await failure_of_result(published.result(0))).error == "LookupError"
    mended = Boilermaker(None, open_bus(DEAD))

    @mended.task(name="fail")
    async def succeed(state):
        return 4

    await work_off(mended)
    await work_off(app)
    assert await published.result(0) == 8


async def test_who_has_lost_the_lock_tells_nothing(open_bus):
    """Nor do those whose messages are settled together with one of which the lock is lost: they tell their own."""
    bus = open_bus(lock_duration=0.2)
    await bus.send([letter(name) for name in "abc"])
    [lost] = await take_and_drop(bus)
    await asyncio.sleep(0.3)
    async with receiving(bus) as receiver:
        held = {each.body: each for each in await receiver.receive(3, PATIENCE)}
        settlements = [
            boilermaker.Settlement(each, COMPLETE, answer=boilermaker.Answer(TO._replace(id=each.body), False, "1"))
            for each in (held["b"], lost, held["c"])
        ]
        await receiver.settle(settlements)
        assert [type(each.error) for each in settlements] == [type(None), MessageLockLost, type(None)]
    assert lost.body == "a"
    assert kept_outcomes(bus) == {"b": "1", "c": "1"}


async def test_the_next_publish_of_a_given_id_takes_back_the_outcome_and_a_duplicate_does_not(open_bus):
    app, tasks = keeping_app(open_bus())
    publish = tasks.give.options(task_id="mine", result_ttl=3600).delay
    with moved_clock() as clock:
        first = await publish("first")
        duplicate = await publish("duplicate")
        assert first.sequence_number == duplicate.sequence_number
        await work_off(app)
        assert await first.result(0) == await duplicate.result(0) == await app.result("mine", 0) == "first"
        await publish("another duplicate")
        assert await app.result("mine", 0) == "first"
        clock.tick(601)
        again = await publish("again")
        with pytest.raises(TimeoutError):
            await again.result(0)
        await work_off(app)
        assert await again.result(0) == await first.result(0) == "again"


async def test_a_publish_without_a_result_under_a_given_id_takes_back_the_former_outcome(open_bus):
    app, tasks = keeping_app(open_bus())
    with moved_clock() as clock:
        await tasks.give.options(task_id="mine", result_ttl=3600).delay("first")
        await work_off(app)
        clock.tick(601)
        await tasks.forget.options(task_id="mine").delay()
        with pytest.raises(TimeoutError):
            await app.result("mine", 0)


async def test_a_copy_has_a_result_of_its_own(local_bus):
    app, tasks = keeping_app(local_bus())
    published = await tasks.give.delay("x")
    twin = published.copy()
    assert twin.outcome_to is None
    with pytest.raises(UsageError, match="is not published yet"):
        await twin.result(1)
    again = await twin.publish()
    await work_off(app)
    assert await published.result(PATIENCE) == await again.result(PATIENCE) == "x"
    assert published.task_id != again.task_id


async def test_a_task_that_runs_twice_tells_its_outcome_twice(open_bus):
    """The last one stands: it lost its lock the first time, or was published by hand."""
    bus = open_bus()
    app, tasks = keeping_app(bus)
    published = await tasks.give.delay("x")
    [message] = await bus.peek()
    await bus.send([letter(message.body.replace('"x"', '"y"'), message_id="twin")])
    await work_off(app, concurrency=1)
    assert await published.result(0) == "y"


# -- hostile messages


HOSTILE_ADDRESSES = [
    *(5, [], "head", True),
    *({}, {"id": "x"}, {"ttl": 5}),
    *({"id": None, "ttl": 5}, {"id": "", "ttl": 5}, {"id": 5, "ttl": 5}, {"id": ["x"], "ttl": 5}),
    *({"id": "\ud800", "ttl": 5}, {"id": "x", "ttl": 5, "session": "\ud800"}),
    *({"id": "x", "ttl": ttl} for ttl in (None, 0, -5, True, "5", [], 2**31, 10**400)),
    *({"id": "x", "ttl": 5, "queue": queue} for queue in (5, "", "a b", [], "\ud800")),
    *({"id": "x", "ttl": 5, "session": session} for session in (5, "", {})),
    *({"id": "x", "ttl": 5, "position": position} for position in (-1, 2**31, 10**400, 0.5, True, "1", [])),
    *({"id": "x", "position": 0, "ttl": ttl} for ttl in (None, -1, "5", 10**400)),
]


@pytest.mark.parametrize("address", HOSTILE_ADDRESSES, ids=lambda value: ascii(value)[:60])
async def test_an_address_that_is_none_makes_a_message_no_task(open_bus, caplog, address):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    body = json.dumps({"task_id": "x", "function_name": "give", "outcome_to": address})
    await bus.send([letter(body, message_id="hostile")])
    published = await tasks.give.delay("neighbour")
    await work_off(app)
    [dead] = await bus.peek(dead_letter=True)
    assert (dead.message_id, dead.dead_letter_reason) == ("hostile", "InvalidTaskFormat")
    assert "outcome_to of the body" in dead.dead_letter_error_description
    assert "Internal error" not in caplog.text
    assert kept_outcomes(bus) == {published.task_id: '"neighbour"'}
    assert len(await bus.discard([dead.sequence_number])) == 1


async def test_an_address_with_more_than_is_known_here_is_read(open_bus):
    bus = open_bus()
    app, _ = keeping_app(bus)
    address = {"id": "x" * 1000, "ttl": 5, "queue": "elsewhere", "session": "s", "what comes": "later"}
    await bus.send([letter(json.dumps({"task_id": "x", "function_name": "give", "outcome_to": address}))])
    await work_off(app)
    assert await app.result("x" * 1000, 0) is None


def test_an_address_comes_back_as_it_was():
    for address in (TO, TO._replace(id="ü\0", queue="queue", session="session"), TO._replace(position=0, ttl=0)):
        assert decode(encode(named("f", outcome_to=address), "q", "q"), "q").outcome_to == address


# -- tasks that await results


async def test_a_task_that_awaits_what_needs_its_place_ends(local_bus):
    """Fibonacci with one task at a time, each awaiting two."""
    app = Boilermaker(None, local_bus())

    @app.task(result_ttl=60)
    async def fibonacci(state, n: int):
        if n < 2:
            return n
        one, other = await fibonacci.delay(n - 1), await fibonacci.delay(n - 2)
        return await one.result(PATIENCE) + await other.result(PATIENCE)

    published = await fibonacci.delay(4)
    await work_off(app, concurrency=1)
    assert await published.result(PATIENCE) == 3


async def test_a_task_may_await_several_results_at_once(local_bus):
    app, tasks = keeping_app(local_bus())

    @app.task(result_ttl=60)
    async def total(state, numbers):
        parts = await app.publish_many([tasks.double.si(number) for number in numbers])
        doubled = await asyncio.gather(*[part.result(PATIENCE) for part in parts])
        async with asyncio.TaskGroup() as group:
            again = [group.create_task(app.result(part.task_id, PATIENCE)) for part in parts]
        assert [each.result() for each in again] == doubled
        return sum(doubled)

    published = await total.delay([1, 2, 3, 4])
    async with working(app, concurrency=1):
        assert await published.result(PATIENCE) == 20
        assert await idle_places(app) == 1


async def idle_places(app):
    """How many may run in the one worker, once nothing does."""
    [worker] = app.workers
    await until(lambda: not worker.running)
    assert (list(worker._awaiting), list(worker._going_on)) == ([], [])
    return worker._free_places()


async def test_a_failure_that_a_task_awaits_is_raised_in_it_and_may_be_its_own(local_bus):
    app, tasks = keeping_app(local_bus())

    @app.task(result_ttl=60)
    async def wrap(state):
        failing = await tasks.fail.delay("inner")
        return await failing.result(PATIENCE)

    published = await wrap.delay()
    async with working(app, concurrency=1):
        failure = await failure_of_result(published.result(None))
    assert (failure.function_name, failure.error) == ("wrap", "TaskFailed")
    assert re.fullmatch(r"fail \S+: LookupError: inner", failure.message)
    assert "LookupError: inner" in failure.traceback


async def test_never_more_run_than_may_and_all_end(open_bus):
    bus, running, most = open_bus(), 0, 0
    app = Boilermaker(None, bus)

    @contextlib.contextmanager
    def counted():
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            yield
        finally:
            running -= 1

    @app.task(result_ttl=60)
    async def child(state, number):
        with counted():
            await asyncio.sleep(0.002 * (number % 3))
        return number

    @app.task(result_ttl=60)
    async def parent(state, number):
        with counted():
            published = await child.delay(number)
        result = await published.result(None)
        with counted():
            await asyncio.sleep(0.001)
        return result

    parents = await app.publish_many([parent.si(number) for number in range(30)])
    async with working(app, concurrency=3):
        assert await asyncio.gather(*[each.result(PATIENCE) for each in parents]) == list(range(30))
        assert await idle_places(app) == 3
    assert most == 3


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_ten_times_as_many_as_may_run_may_await_and_no_more(open_bus, concurrency):
    app, tasks = keeping_app(open_bus())
    awaited = await tasks.give.options(delay=3600).delay("at last")
    asking = await app.publish_many([tasks.ask.si(awaited.task_id) for _ in range(10 * concurrency + 2)])
    waiting = [asyncio.create_task(failure_of_result(each.result(None))) for each in asking]
    async with working(app, concurrency=concurrency):
        refused = await until(lambda: len(done := [each for each in waiting if each.done()]) == 2 and done)
        for each in refused:
            assert each.result().error == "UsageError"
            expected = f"{10 * concurrency} tasks of this worker await results, 10 times its concurrency, so no more"
            assert each.result().message.startswith(expected)
            assert "a chain, a | b.s(), hands on a result without waiting" in each.result().message
        await app.service_bus_client.cancel(awaited.sequence_number)
        failures = await asyncio.gather(*waiting)
        assert Counter(each.error for each in failures) == {"TaskFailed": 10 * concurrency, "UsageError": 2}
        assert await idle_places(app) == concurrency


async def test_a_task_that_has_its_result_goes_on_before_new_work_begins(open_bus):
    app, other, order = Boilermaker(None, open_bus()), Boilermaker(None, open_bus("other")), []
    go = asyncio.Event()

    @other.task(result_ttl=60)
    async def child(state):
        return "result"

    @app.task
    async def parent(state):
        published = await app.send_task("child", queue="other", result_ttl=60)
        order.append(await published.result(None))

    @app.task
    async def work(state, name):
        order.append(name)
        await go.wait()

    await app.publish_many([parent.si(), work.si("runs"), work.si("new")])
    async with working(app, concurrency=1):
        await until(lambda: order == ["runs"])
        await work_off(other)
        [worker] = app.workers
        await until(lambda: worker._going_on, "the result")
        assert order == ["runs"]
        go.set()
        await until(lambda: len(order) == 3)
    assert order == ["runs", "result", "new"]


async def test_what_was_received_before_waits_for_who_goes_on(open_bus):
    """More were received than there are places now, since a task went on meanwhile: none runs too many."""
    app, running, most = Boilermaker(None, open_bus()), set(), []

    @app.task(result_ttl=60)
    async def child(state):
        running.add("child")
        most.append(len(running))
        running.discard("child")

    @app.task(result_ttl=60)
    async def parent(state, number):
        published = await child.delay()
        await published.result(None)
        running.add(number)
        most.append(len(running))
        time.sleep(0.02)
        await asyncio.sleep(0.02)
        running.discard(number)

    parents = await app.publish_many([parent.si(number) for number in range(8)])
    async with working(app, concurrency=2):
        await asyncio.gather(*[each.result(PATIENCE) for each in parents])
    assert max(most) <= 2


async def test_what_is_there_is_asked_without_giving_up_a_place(open_bus):
    app, tasks = keeping_app(open_bus())
    published = await tasks.give.delay("there")
    await work_off(app)
    asking = await tasks.ask.delay(published.task_id, 0)
    await work_off(app, concurrency=1)
    assert await asking.result(0) == "there"
    missing = await tasks.ask.delay("unknown", 0)
    await work_off(app, concurrency=1)
    assert (await failure_of_result(missing.result(0))).error == "TimeoutError"


async def test_a_task_may_await_a_result_in_another_event_loop_where_it_keeps_its_place(open_bus):
    app, tasks = keeping_app(open_bus())
    awaited, begun = await tasks.give.options(delay=3600).delay(), threading.Event()

    async def ask():
        waiting = asyncio.create_task(awaited.result(None))
        await asyncio.sleep(0)  # it has begun to wait
        begun.set()
        return await waiting

    @app.task(result_ttl=60)
    async def ask_in_a_thread(state):
        return await asyncio.to_thread(lambda: asyncio.run(ask()))

    asking = await ask_in_a_thread.delay()
    async with working(app, concurrency=2):
        await until(begun.is_set)
        [worker] = app.workers
        assert (list(worker._awaiting), worker._free_places()) == ([], 1)
        await app.service_bus_client.cancel(awaited.sequence_number)
        assert (await failure_of_result(asking.result(PATIENCE))).error == "TaskFailed"
        assert await idle_places(app) == 2


@pytest.mark.parametrize("ends_by", ["its own timeout", "the option", "the middleware's", "wait_for"])
async def test_a_task_that_gives_up_awaiting_has_its_place_again(open_bus, ends_by):
    app, tasks = keeping_app(open_bus())
    if ends_by == "the middleware's":

        @app.middleware
        async def hurry(task, state, call_next):
            async with asyncio.timeout(0.05):
                return await call_next()

    @app.task(result_ttl=60, timeout=0.05 if ends_by == "the option" else None)
    async def impatient(state):
        if ends_by == "wait_for":
            await asyncio.wait_for(app.result("unknown", None), 0.05)
        await app.result("unknown", 0.05 if ends_by == "its own timeout" else None)

    async with working(app, concurrency=1):
        published = await app.publish_many([impatient.si(), impatient.si()])
        for each in published:
            assert (await failure_of_result(each.result(PATIENCE))).error == "TimeoutError"
        assert await (await tasks.give.delay(5)).result(PATIENCE) == 5
        assert await idle_places(app) == 1


async def test_a_task_that_gives_up_awaiting_goes_on_at_once_though_another_has_its_place(open_bus):
    app, order, go = Boilermaker(asyncio.timeout(None), open_bus()), [], asyncio.Event()

    @app.task
    async def impatient(limit):
        try:
            async with limit:
                await app.result("unknown", None)
        except TimeoutError:
            order.append("gave up")
            go.set()

    @app.task
    async def hold(limit):
        order.append("holds")
        limit.reschedule(0)
        await go.wait()
        order.append("ends")

    await app.publish_many([impatient.si(), hold.si()])
    await work_off(app, concurrency=1)
    assert order == ["holds", "gave up", "ends"]


async def test_what_a_task_leaves_behind_holds_no_place(open_bus):
    app, tasks = keeping_app(open_bus())
    awaited, left = await tasks.give.options(delay=3600).delay(), []

    @app.task(result_ttl=60)
    async def leave(state):
        left.append(asyncio.create_task(app.result(awaited.task_id, None)))
        await asyncio.sleep(0)  # it has begun to wait
        left.append(asyncio.create_task(app.result(awaited.task_id, None)))  # this one will, when the task has ended

    async with working(app, concurrency=1):
        await (await leave.delay()).result(PATIENCE)
        assert await idle_places(app) == 1
        assert await (await tasks.give.delay(5)).result(PATIENCE) == 5
        await app.service_bus_client.cancel(awaited.sequence_number)
        for each in left:
            assert (await failure_of_result(each)).error == "Cancelled"
        assert await idle_places(app) == 1


async def test_a_task_that_awaits_keeps_its_lock(open_bus):
    bus = open_bus(lock_duration=0.2)
    app, tasks = keeping_app(bus)
    awaited = await tasks.give.options(delay=1).delay("late")
    asking = await tasks.ask.delay(awaited.task_id)
    async with working(app, concurrency=1):
        assert await asking.result(PATIENCE) == "late"
    assert await ids_of(bus) == await ids_of(bus, dead_letter=True) == []


async def test_a_suspect_runs_while_others_await_and_may_await_itself(open_bus, caplog):
    app, tasks = keeping_app(open_bus())
    awaited = await tasks.give.options(delay=3600).delay()

    @app.task(result_ttl=60)
    async def suspect(state):
        return await (await tasks.double.delay(4)).result(PATIENCE)

    asking = await tasks.ask.delay(awaited.task_id)
    async with working(app, concurrency=2):
        await until(lambda: app.workers and len(next(iter(app.workers))._awaiting) == 1)
        published = await app.publish_task(suspect, delay=0.2)
        with contextlib.closing(sqlite3.connect(app.service_bus_client.path, isolation_level=None)) as connection:
            change = "UPDATE message SET delivery_count = 5 WHERE message_id = ?"
            assert connection.execute(change, (published.task_id,)).rowcount == 1
        assert await published.result(PATIENCE) == 8
        assert "it runs alone" in caplog.text
        await app.service_bus_client.cancel(awaited.sequence_number)
        assert (await failure_of_result(asking.result(PATIENCE))).error == "TaskFailed"
        assert await idle_places(app) == 2


# -- the end of a worker


async def test_a_worker_that_is_stopped_lets_a_task_that_awaits_end(open_bus):
    app, other = Boilermaker([], open_bus()), Boilermaker(None, open_bus("other"))

    @other.task
    async def child(state):
        return "result"

    @app.task
    async def parent(state):
        published = await app.send_task("child", queue="other", result_ttl=60)
        state.append(published)
        state.append(await published.result(None))

    await parent.delay()
    async with app:
        run = asyncio.create_task(app.run(concurrency=1))
        await until(lambda: app.state)
        stopping = asyncio.create_task(app.stop())
        await asyncio.sleep(0.05)
        await work_off(other)
        await asyncio.wait_for(asyncio.gather(stopping, run), PATIENCE)
        assert app.state[1:] == ["result"]
        assert await is_empty(app.service_bus_client)


@pytest.mark.parametrize("cancelled", [False, True], ids=["stopped", "cancelled"])
async def test_a_task_that_awaits_for_too_long_is_given_back_at_the_end_and_awaits_again(open_bus, cancelled):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    awaited = await tasks.give.options(delay=3600).delay()
    asking = [await tasks.ask.delay(awaited.task_id) for _ in range(3)]
    run = asyncio.create_task(app.run(concurrency=1, grace_period=0.1))
    await until(lambda: app.workers and len(next(iter(app.workers))._awaiting) == 3)
    if cancelled:
        run.cancel()
    else:
        await app.stop()
    await asyncio.wait([run])
    assert [message.delivery_count for message in await bus.peek() if message.task.function_name == "ask"] == [1] * 3
    assert all(message.state != "running" for message in await bus.peek())
    await bus.cancel(awaited.sequence_number)
    async with working(app, concurrency=1):
        for each in asking:
            assert (await failure_of_result(each.result(PATIENCE))).error == "TaskFailed"


async def test_those_that_wait_to_go_on_end_in_the_grace_period(open_bus):
    """Their results are there, but not their places: one after the other."""
    app, tasks = keeping_app(open_bus())
    go = asyncio.Event()

    @app.task
    async def hold(state):
        await go.wait()

    awaited = await tasks.give.options(delay=3600).delay()
    asking = [await tasks.ask.delay(awaited.task_id) for _ in range(3)]
    run = asyncio.create_task(app.run(concurrency=1))
    await until(lambda: app.workers and len(next(iter(app.workers))._awaiting) == 3)
    [worker] = app.workers
    await hold.delay()
    await until(lambda: worker.running == 4)
    await app.service_bus_client.cancel(awaited.sequence_number)
    await until(lambda: len(worker._going_on) == 3)
    stopping = asyncio.create_task(app.stop())
    await asyncio.sleep(0.02)
    go.set()
    await asyncio.wait_for(asyncio.gather(stopping, run), PATIENCE)
    for each in asking:
        assert (await failure_of_result(each.result(0))).error == "TaskFailed"


# -- several event loops, processes, files


async def test_who_waits_is_woken_and_does_not_look_from_time_to_time(open_bus, start_program, monkeypatch):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 1000)
    app, tasks = keeping_app(open_bus())
    published = await tasks.give.delay("x")
    here = asyncio.create_task(published.result(None))
    there = start_program(AWAITING_PROGRAM.replace("import asyncio", WITHOUT_LOOKING), published.task_id)
    await until(lambda: "awaits" in there[1].read_text())
    await work_off(app)
    assert await asyncio.wait_for(here, PATIENCE) == "x"
    assert await exit_code(there) == 0
    assert there[1].read_text() == "awaits\nreturned: x\n"
    never = asyncio.create_task(app.result("unknown", None))
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(published.result(None), PATIENCE) == "x"  # although a look for another has ended
    never.cancel()


WITHOUT_LOOKING = "import boilermaker; boilermaker.MAX_WAIT = 1000\nimport asyncio"


async def test_several_event_loops_await_the_same_results(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    published = await app.publish_many([tasks.give.si(number) for number in range(5)])

    async def ask(task):
        return await app.result(task.task_id, PATIENCE)

    def ask_all():
        return [asyncio.run(ask(task)) for task in published]

    threads = [asyncio.create_task(asyncio.to_thread(ask_all)) for _ in range(4)]
    await asyncio.sleep(0.05)
    await work_off(app)
    assert await asyncio.gather(*threads) == [[0, 1, 2, 3, 4]] * 4
    assert await ask(published[0]) == 0
    assert all(not loop.is_closed() for loop in bus._outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
async def test_a_forked_child_and_its_parent_await_results(open_bus, start_program):
    program = start_program(
        """
import asyncio, multiprocessing, sys
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("queue.db"))

@app.task(result_ttl=60)
async def double(state, number):
    return 2 * number

async def ask(published):
    return await published.result(30)

async def publish():
    published = await double.delay(4)
    await asyncio.wait([asyncio.create_task(published.result(30))], timeout=0.05)
    return published

def child(published_id):
    async def main():
        return await app.result(published_id, 30), await (await double.delay(5)).result(30)
    sys.exit(asyncio.run(main()) != (8, 10))

published = asyncio.run(publish())
process = multiprocessing.get_context("fork").Process(target=child, args=[published.task_id])
process.start()
assert asyncio.run(ask(published)) == 8
process.join(30)
sys.exit(process.exitcode)
"""
    )
    app, _ = keeping_app(open_bus())
    async with working(app):
        assert await exit_code(program) == 0, program[1].read_text()


async def test_who_awaits_when_the_bus_is_closed_hears_of_it_and_may_ask_again(open_bus):
    app, tasks = keeping_app(open_bus())
    published = await tasks.give.delay("x")
    waiting = [asyncio.create_task(published.result(None)) for _ in range(2)]
    await asyncio.sleep(0.05)
    await app.close()
    for each in waiting:
        with pytest.raises(ServiceBusUnavailable, match="was closed while a result was awaited"):
            await asyncio.wait_for(each, PATIENCE)
    waiting = asyncio.create_task(published.result(None))
    await work_off(app)
    assert await asyncio.wait_for(waiting, PATIENCE) == await published.result(0) == "x"


async def test_who_awaits_while_another_event_loop_closes_the_bus_goes_on(open_bus):
    bus = open_bus()
    app, tasks = keeping_app(bus)
    published = await tasks.give.delay("x")
    waiting = asyncio.create_task(published.result(None))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(lambda: asyncio.run(bus.close()))
    await work_off(app)
    assert await asyncio.wait_for(waiting, PATIENCE) == "x"


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
async def test_who_awaits_goes_on_with_the_file_that_is_there_now(open_bus, monkeypatch, caplog, tmp_path, replaced):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.1)
    monkeypatch.setattr(boilermaker, "CHECK_INTERVAL", 0.1)
    app, tasks = keeping_app(open_bus())
    published = await tasks.give.options(task_id="mine").delay("lost")
    waiting = asyncio.create_task(published.result(None))
    await asyncio.sleep(0.05)
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        (tmp_path / name).unlink()
    if replaced:
        other, theirs = keeping_app(LocalServiceBus(tmp_path / "queue.db"))
        await theirs.give.options(task_id="mine").delay("found")
        await work_off(other)
        await other.close()
    else:
        await until(lambda: "was deleted or replaced" in caplog.text)
        await tasks.give.options(task_id="mine").delay("found")
        await work_off(app)
    assert await asyncio.wait_for(waiting, PATIENCE) == "found"


async def test_who_awaits_while_the_disk_is_in_trouble_goes_on(open_bus, monkeypatch, caplog):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.05)
    app, tasks = keeping_app(open_bus())
    published = await tasks.give.delay("x")
    await work_off(app)
    with monkeypatch.context() as patched:
        patched.setattr(boilermaker.Store, "outcomes", broken_disk)
        waiting = asyncio.create_task(published.result(None))
        await until(lambda: "Looking for results failed, will try again" in caplog.text)
        assert not waiting.done()
    assert await asyncio.wait_for(waiting, PATIENCE) == "x"


async def test_more_results_than_sqlite_takes_parameters_are_awaited_at_once(open_bus):
    app, tasks = keeping_app(open_bus())
    published = await app.publish_many([tasks.give.si(number) for number in range(1200)])
    waiting = asyncio.gather(*[each.result(PATIENCE) for each in published])
    async with working(app, concurrency=100):
        assert await waiting == list(range(1200))


KILLED_PROGRAM = """
import asyncio, os, signal, sys
import boilermaker
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("queue.db", lock_duration=0.3))

@app.task(result_ttl=60)
async def give(state, value):
    return value

def killing(owner, name, before):
    original = getattr(owner, name)
    def killed(*arguments, **options):
        if not before:
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, killed)

if sys.argv[1] == "before it is told":
    killing(boilermaker.Store, "tell", before=True)
elif sys.argv[1] == "when it is told":
    killing(boilermaker.Store, "tell", before=False)
else:
    killing(boilermaker.Worker, "_settled", before=True)
asyncio.run(app.run(burst=True))
"""


@pytest.mark.parametrize("when", ["before it is told", "when it is told", "when it is settled"])
async def test_a_worker_that_is_killed_has_told_and_settled_or_neither(open_bus, start_program, when):
    bus = open_bus(lock_duration=0.3)
    app, tasks = keeping_app(bus)
    published = await tasks.give.delay("x")
    assert await exit_code(start_program(KILLED_PROGRAM, when)) == -signal.SIGKILL
    if when == "when it is settled":
        assert (await ids_of(bus), kept_outcomes(bus)) == ([], {published.task_id: '"x"'})
    else:
        assert (await ids_of(bus), kept_outcomes(bus)) == ([published.task_id], {})
        async with working(app):
            assert await published.result(PATIENCE) == "x"
    assert await published.result(0) == "x"


async def test_a_process_that_is_killed_while_it_awaits_leaves_the_result_to_whoever_asks(open_bus, start_program):
    app, tasks = keeping_app(open_bus())
    published = await tasks.give.delay("x")
    program = start_program(AWAITING_PROGRAM, published.task_id)
    await until(lambda: "awaits" in program[1].read_text())
    program[0].kill()
    await exit_code(program)
    await work_off(app)
    assert await app.result(published.task_id, 0) == "x"
    assert await exit_code(again := start_program(AWAITING_PROGRAM, published.task_id)) == 0
    assert again[1].read_text() == "awaits\nreturned: x\n"


async def test_a_task_whose_worker_is_killed_while_it_awaits_awaits_again(open_bus, start_program):
    app, tasks = keeping_app(open_bus(lock_duration=0.3))
    awaited = await tasks.give.options(delay=3600).delay("x")
    asking = await tasks.ask.delay(awaited.task_id)
    program = start_program(
        """
import asyncio
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("queue.db", lock_duration=0.3))

@app.task
async def ask(state, task_id):
    print("awaits", flush=True)
    await app.result(task_id, None)

asyncio.run(app.run(concurrency=1))
"""
    )
    await until(lambda: "awaits" in program[1].read_text())
    program[0].kill()
    await exit_code(program)
    await app.service_bus_client.cancel(awaited.sequence_number)
    async with working(app, concurrency=1):
        assert (await failure_of_result(asking.result(PATIENCE))).error == "TaskFailed"


async def test_an_answer_is_awaited_across_applications_of_one_file(open_bus):
    shop, mailer = Boilermaker(None, open_bus("shop")), Boilermaker(None, open_bus("mailer"))

    @mailer.task
    async def send(state, address):
        if "@" not in address:
            raise ValueError(f"{address!r} is no address")
        return f"sent to {address}"

    @shop.task(result_ttl=60)
    async def order(state, address):
        mail = await shop.send_task("send", address, queue="mailer", result_ttl=60)
        return await mail.result(PATIENCE)

    good, bad = await shop.publish_many([order.si("ann@example.com"), order.si("bob")])
    async with working(shop, concurrency=1), working(mailer, concurrency=1):
        assert await mailer.result(good.task_id, PATIENCE) == "sent to ann@example.com"
        assert "'bob' is no address" in (await failure_of_result(bad.result(PATIENCE))).message


async def test_results_of_a_queue_in_memory(open_bus):
    app, tasks = keeping_app(LocalServiceBus())
    async with app:
        published = await (tasks.give.si(4) | tasks.double.s()).publish()
        waiting = asyncio.create_task(published.result(None))
        await work_off(app)
        assert await waiting == await app.result(published.task_id, 0) == 8
        awaited = await tasks.give.options(delay=3600).delay()
        await app.service_bus_client.cancel(awaited.sequence_number)
        assert (await failure_of_result(awaited.result(0))).error == "Cancelled"


# -- the original


def test_the_original_ignores_whom_to_tell(original):
    tasks = [awaited(args=[1]), awaited(on_success=named("g"), on_failure=named("h", outcome_to=TO))]
    answers = original(READ_AND_WRITE_AGAIN, [encode(task, "q", "q") for task in tasks])
    for task, (read, written) in zip(tasks, answers, strict=True):
        assert read == known_to_the_original(task)
        assert "outcome_to" not in written


async def test_what_the_original_writes_runs_where_results_are_kept_and_tells_nobody(original, open_bus):
    bus = open_bus()
    app = Boilermaker(None, bus)

    @app.task(result_ttl=60)
    async def fetch(state, page, width=1):
        return page

    @app.task(result_ttl=60)
    async def store(state): ...

    @app.task(result_ttl=60)
    async def clean_up(state): ...

    bodies = original(WRITE)
    assert not any("outcome_to" in body for body in bodies)
    await bus.send([letter(body, message_id=str(number)) for number, body in enumerate(bodies)])
    await work_off(app)
    assert await is_empty(bus)
    assert await bus.peek(dead_letter=True) == []
    assert kept_outcomes(bus) == {}


# ======================================================================================================================
# Results and groups: where they might have waited for ever
# ======================================================================================================================


async def test_what_a_task_began_and_left_awaiting_is_woken_while_the_worker_is_busy(open_bus):
    app, left, release = Boilermaker(None, open_bus()), [], asyncio.Event()

    @app.task(result_ttl=60)
    async def slow(state):
        await release.wait()
        return "there"

    @app.task
    async def parent(state):
        child = await slow.delay()
        left.append(asyncio.create_task(child.result(PATIENCE)))
        while app_worker().running != 2:
            await asyncio.sleep(0.01)

    @app.task
    async def busy(state):
        await ended.wait()

    def app_worker():
        [worker] = app.workers
        return worker

    ended = asyncio.Event()
    await parent.delay()
    async with working(app, concurrency=2):
        await until(lambda: left and app_worker().running == 1)
        await busy.delay()
        await until(lambda: app_worker().running == 2)  # slow, and one in the place of the parent, which has ended
        release.set()
        await busy.delay()
        assert await asyncio.wait_for(left[0], PATIENCE) == "there"
        ended.set()


async def test_a_group_of_an_application_without_a_worker_is_seen_to_by_the_workers_of_others(open_bus):
    web, work = Boilermaker(None, open_bus("web")), Boilermaker(None, open_bus("work"))

    @work.task
    async def size(state, x):
        return x

    def members(queue):
        return [Task(function_name="size", args=[x], queue=queue) for x in range(2)]

    ended = await web.publish_task(boilermaker.group(members("work")), result_ttl=60)
    lost = await web.publish_task(boilermaker.group(members("nobody"), timeout=1), result_ttl=600)
    await work_off(work)
    assert await ended.result(0) == [0, 1]
    with moved_clock() as clock:
        clock.tick(1000)
        async with working(work):
            with pytest.raises(boilermaker.TaskFailed, match="TimeoutError: 2 of 2 members"):
                await lost.result(PATIENCE)
            await until(lambda: forgotten(web, ended))


async def forgotten(app, published):
    with contextlib.suppress(UsageError):
        await published.progress()
        return False
    return True


async def test_a_replay_that_comes_second_leaves_the_outcome_of_the_first(open_bus):
    bus, runs = open_bus(), []
    app = Boilermaker(None, bus)

    @app.task(result_ttl=60)
    async def flaky(state):
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("not yet")
        return "well"

    task = await flaky.delay()
    await work_off(app)
    [dead] = await bus.peek(dead_letter=True)
    commit = await bus.commit()
    queue, successors = boilermaker.dead_letter_queue("tasks"), {dead.sequence_number: boilermaker.replay_of(dead)}
    assert len(await app.replay([dead.sequence_number])) == 1
    await work_off(app)
    assert await commit.do(partial(commit.file.store.replace, queue, successors, time.time())) == set()
    assert await task.result(0) == "well"


async def test_a_group_of_a_given_id_that_still_runs_does_not_mix_with_the_next(open_bus):
    app, done, release = Boilermaker(None, open_bus()), [], asyncio.Event()

    @app.task
    async def size(state, run, slow):
        if slow:
            await release.wait()
        return run

    @app.task
    async def report(state, sizes):
        done.append(sizes)

    def work(run, slow):
        return boilermaker.group(size.si(run, False), size.si(run, slow)) | report.s()

    with moved_clock() as clock:
        first = await app.publish_task(work(1, True), task_id="nightly")
        async with working(app):
            await until(lambda: progressed(first, 1))
            again = await app.publish_task(work(1, False), task_id="nightly")  # a second one, within the window
            clock.tick(601)
            await app.publish_task(work(2, False), task_id="nightly")
            await until(lambda: done == [[2, 2]])
            release.set()
            await until(lambda: done == [[2, 2], [1, 1]])
            with pytest.raises(UsageError, match="had been published before"):
                await again.progress()


async def test_of_groups_of_one_given_id_in_one_call_the_first_is_published(open_bus):
    app, done = Boilermaker(None, open_bus()), []

    @app.task
    async def size(state, run):
        done.append(run)

    nightly = size.options(task_id="nightly")
    await app.publish_many([nightly.map([1, 1]), nightly.map([2, 2]), size.si(3)])
    await app.publish_many([size.si(4), nightly.map([5, 5]), size.si(6)])
    assert len(await app.service_bus_client.peek(10)) == 5  # no member of what was sent again
    await work_off(app)
    assert sorted(done) == [1, 1, 3, 4, 6]


async def progressed(published, members):
    return (await published.progress()).done == members


def test_a_joiner_that_takes_over_at_the_timeout_ends_the_group_as_the_first_one_did():
    bus = AzureServiceBus("example", "tasks")
    group = boilermaker.Group(group=boilermaker.GroupSettings(False, 1, (("size", 2),)), root="root")
    group.on_success, group.on_failure = named("store"), named("alert")
    member = [json.dumps({"failed": False, "value": 1, "position": position}) for position in range(2)]
    state = boilermaker.GroupState()
    for body in (encode(group, "tasks", "tasks"), member[0], '{"timeout":true}'):
        state = state.with_message(body, "tasks")
    kept = boilermaker.GroupState.read(state.write(), "tasks").with_message(member[1], "tasks")
    for each in (state, kept):
        outcomes = {position: (failed, json.dumps(value)) for position, (failed, value) in each.outcomes.items()}
        [message] = boilermaker.ending_of(bus, "tasks", each.definition, outcomes).messages
        assert (message.message_id, message.function_name) == ("root", "alert")


async def test_what_members_return_keeps_no_group_from_its_end_however_deep_it_is(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task
    async def deep(state):
        return nested_list(980)

    @app.task
    async def shallow(state): ...

    published = await app.publish_task(boilermaker.group(deep.si(), shallow.si()), result_ttl=60)
    await work_off(app)
    with contextlib.suppress(boilermaker.TaskFailed):  # where Python cannot write it
        assert len(await published.result(0)) == 2
    assert (await published.progress()).done == 2


async def test_a_wait_that_runs_out_does_not_wait_for_a_place(open_bus):
    app, ended, hold = Boilermaker(None, open_bus()), [], asyncio.Event()

    @app.task(result_ttl=60)
    async def later(state): ...

    @app.task
    async def busy(state):
        await hold.wait()

    @app.task
    async def asks(state):
        task = await app.publish_task(later.si(), delay=3600)
        await busy.delay()
        with pytest.raises(TimeoutError):
            await task.result(0.3)
        ended.append(hold.is_set())

    await asks.delay()
    async with working(app, concurrency=1):
        await until(lambda: ended)
        assert ended == [False]  # while another had its place
        hold.set()


async def test_a_group_has_no_sequence_number(open_bus):
    app = Boilermaker(None, open_bus())
    published = await app.publish_task(boilermaker.group(named("f")))
    assert (published.sequence_number, published.message_id) == (None, published.task_id)


def test_what_follows_an_empty_group_out_of_a_dead_letter_queue_goes_to_the_queue_itself():
    bus = AzureServiceBus("example", boilermaker.dead_letter_queue("tasks"))
    group = boilermaker.group(())
    group.on_success = named("store")
    make = partial(boilermaker.outgoing_of, bus, "tasks")
    [message] = boilermaker.messages_of(bus, make, group, "id", None)
    assert (message.queue, message.function_name) == ("tasks", "store")


@pytest.mark.parametrize("depth", range(960, 1000, 5))
async def test_results_nested_too_deeply_to_be_kept_end_their_group_on_azure_too(depth):
    state = boilermaker.GroupState('{"group": "its definition"}', {0: (False, nested_list(depth))})
    joiner = boilermaker.AzureJoiner.__new__(boilermaker.AzureJoiner)
    joiner._bus = AzureServiceBus("example", "tasks")
    try:
        assert state.write()
        assert joiner._too_large(state) is None
    except RecursionError:
        assert "nested too deeply" in str(joiner._too_large(state))


async def test_a_group_whose_members_another_application_runs_is_joined_by_who_published_it(azure_bus):
    app, other, done = Boilermaker(None, azure_bus()), Boilermaker(None, azure_bus()), []

    @other.task(name="foreign")
    async def foreign(state, x):
        return x

    @app.task
    async def report(state, sizes):
        done.append(sizes)

    members = [Task(function_name="foreign", args=[x], queue=other.queue_name) for x in range(2)]
    await app.publish_task(boilermaker.group(members) | report.s())
    async with working(app), working(other):
        await until(lambda: done == [[0, 1]])


async def test_a_token_that_cannot_be_had_for_a_moment_ends_no_joiner(azure_bus, emulator, monkeypatch, caplog):
    monkeypatch.setattr(boilermaker, "ACCEPT_WAIT", 0.5)
    queue, done, refused = fresh_queue(), [], []
    bus = AzureServiceBus.from_connection_string(emulator.connection_string, queue, join_queue_name=f"{queue}-join")
    app, make = Boilermaker(None, bus), bus.session_link

    @app.task
    async def size(state, x):
        return x

    @app.task
    async def report(state, sizes):
        done.append(sizes)

    class Refused:
        async def __aenter__(self):
            refused.append(1)
            raise ConfigurationError("the identity's endpoint is away")

    async with app, working(app):
        await until(lambda: any(worker._receiver._joiner for worker in app.workers if worker.started))
        monkeypatch.setattr(bus, "session_link", lambda *args, **options: Refused())
        await until(lambda: len(refused) > 1)
        monkeypatch.setattr(bus, "session_link", make)
        await app.publish_task(size.map([1, 2]) | report.s())
        await until(lambda: done == [[1, 2]])


async def test_a_bus_that_is_closed_as_it_opens_its_session_leaves_no_publisher_waiting(azure_bus):
    bus = azure_bus()
    app = Boilermaker(None, bus)

    @app.task(result_ttl=60)
    async def size(state, x): ...

    await size.delay(1)
    await bus.close()
    for turns in range(4):

        async def publish(turns=turns):
            for _ in range(turns):
                await asyncio.sleep(0)
            await size.delay(2)

        publishing = asyncio.create_task(publish())
        await bus.close()
        await asyncio.wait([publishing], timeout=PATIENCE)
        assert publishing.done()
        assert publishing.exception() is None or isinstance(publishing.exception(), ServiceBusUnavailable)
        await bus.close()


# ======================================================================================================================
# Worker: periodic tasks
# ======================================================================================================================


def periodic(bus, ran=None, **schedules):
    """An application with a task that notes its runs, published by schedules, as if in a process of its own."""
    app = Boilermaker([] if ran is None else ran, bus)

    @app.task
    async def tick(state, name):
        state.append(current_task().task_id)

    for name, when in schedules.items():
        times = {"cron": when.expression, "timezone": when.zone} if isinstance(when, Cron) else {"every": when.interval}
        app.schedule(tick.si(name), name=name, **times)
    return app


def ticks_of(name, *moments):
    return [boilermaker.tick_id(name, moment) for moment in moments]


async def tick_along(ticker, clock, seconds, times):
    """Let a worker publish that goes on working while the clock moves."""
    for _ in range(times):
        clock.tick(seconds)
        await ticker.publish()


@pytest.mark.parametrize(("zone", "start", "time"), CHANGES_OF_CLOCKS.values(), ids=CHANGES_OF_CLOCKS)
async def test_over_a_change_of_clocks_each_tick_runs_once_whoever_publishes_it(open_bus, zone, start, time):
    hour, minute = time
    schedules = {"230": "30 2 * * *", "that": f"{minute} {hour} * * *", "hourly": "0 * * * *", "halves": "*/30 * * * *"}
    expected = [*ticks_of("230", *daily(zone, start, 2, 30)), *ticks_of("that", *daily(zone, start, hour, minute))]
    for local, moment in local_minutes(zone, start):
        expected += ticks_of("hourly", moment) if local.minute == 0 else []
        expected += ticks_of("halves", moment) if local.minute in (0, 30) else []
    with moved_clock(utc(start)) as clock:
        ran = []
        apps = [periodic(open_bus(), ran, **{n: Cron(each, zone) for n, each in schedules.items()}) for _ in range(2)]
        tickers = [boilermaker.Ticker(app) for app in apps]
        for step in range(int(2 * DAY / (4 * MINUTE)) - 1):
            for ticker in tickers:
                await ticker.publish()
            clock.tick(4 * MINUTE)
            if step % 50 == 49:
                tickers[step % 2] = boilermaker.Ticker(apps[step % 2])  # a deploy
                await work_off(apps[0])
        await work_off(apps[0])
    last = boilermaker.tick_id("", utc(start) + 2 * DAY - 4 * MINUTE).removeprefix("cron::")
    assert Counter(ran) == Counter(each for each in expected if each[-len(last) :] <= last)


async def test_a_tick_runs_when_it_is_due_once_with_however_many_workers(open_bus):
    apps = [periodic(open_bus(), every_second=Every(SECOND)) for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        for app in apps:
            await stack.enter_async_context(working(app))
        await until(lambda: sum(len(app.state) for app in apps) > 4)
    ran = sorted(itertools.chain(*[app.state for app in apps]))
    first = datetime.datetime.fromisoformat(ran[0].removeprefix("cron:every_second:"))
    assert ran == ticks_of("every_second", *[first + n * SECOND for n in range(len(ran))])


async def test_a_tick_is_a_message_that_is_due_then_with_the_options_of_its_registration(open_bus):
    with moved_clock(utc("2026-11-25 04:00:10")) as clock:
        app = Boilermaker([], open_bus())

        @app.task(every=MINUTE, policy=NoRetry(), acks_late=False)
        async def work(state):
            task = current_task()
            state.append((task.task_id, task.message_id, task.policy, task.acks_late))

        await boilermaker.Ticker(app).publish()
        late, *ahead = await app.service_bus_client.peek()
        clock.tick(MINUTE)
        await work_off(app)
    ids = ticks_of("work", utc("2026-11-25 04:00"), utc("2026-11-25 04:01"))
    assert app.state == [(each, each, NoRetry(), False) for each in ids]
    assert late.scheduled_enqueue_time_utc == utc("2026-11-25 04:00")
    assert [each.scheduled_enqueue_time_utc for each in ahead] == [utc(f"2026-11-25 04:0{n}") for n in range(1, 6)]
    body = json.loads(late.body)
    assert (body["policy_is_default"], body["default_options"]) == (True, ["should_dead_letter", "acks_late"])


async def test_a_worker_that_knows_the_function_and_not_the_schedule_runs_its_ticks(open_bus):
    with moved_clock(utc(NOW)):
        await boilermaker.Ticker(periodic(open_bus(), second=Every(SECOND))).publish()
        other = periodic(open_bus())
        await work_off(other)
    assert other.state == ticks_of("second", utc(NOW))


async def test_a_tick_is_a_whole_workflow(open_bus):
    with moved_clock(utc("2026-11-25 04:00")):
        app = Boilermaker([], open_bus())

        @app.task
        async def count(state, region):
            state.append(current_task().task_id)
            return len(region)

        @app.task
        async def report(state, size):
            state.append(size)

        app.schedule(count.si("eu") | report.s(), every=HOUR, name="sync-eu")
        app.schedule(app.chain(count.si("asia"), report.s()), cron="0 * * * *", name="sync-asia")
        for _ in range(2):
            await work_off(app, schedules=True)
    assert Counter(app.state) == Counter(
        [2, 4, *(f"cron:sync-{each}:2026-11-25T04:00:00+00:00" for each in ("eu", "asia"))]
    )


async def test_a_new_schedules_latest_tick_runs_at_the_first_start_and_at_no_other(open_bus):
    with moved_clock(utc("2026-11-25 04:02")) as clock:
        apps = [periodic(open_bus(), hourly=Every(HOUR), too_old=Cron("59 3 * * *")) for _ in range(3)]
        for app in apps:
            await work_off(app, schedules=True)
            clock.tick(SECOND)
    assert [app.state for app in apps] == [ticks_of("hourly", utc("2026-11-25 04:00")), [], []]


@pytest.mark.parametrize("window", [None, 60, 3600], ids=str)
async def test_a_tick_that_ran_does_not_run_again_as_long_as_anybody_makes_up_for_it(open_bus, window):
    tick, longest = utc("2026-11-25 04:00"), max(window or 0, 600) * SECOND
    with moved_clock(tick - longest / 2) as clock:
        early, late, too_late = (periodic(open_bus(duplicate_detection=window), daily=Every(DAY / 6)) for _ in range(3))
        await boilermaker.Ticker(early).publish()  # the earliest that there can be
        assert await ids_of(early.service_bus_client) == ticks_of("daily", tick)
        clock.move_to(tick)
        await work_off(early)
        clock.move_to(tick + longest / 4)
        await work_off(late, schedules=True)  # the latest
        clock.move_to(tick + longest)
        await work_off(too_late, schedules=True)
    assert (early.state, late.state, too_late.state) == (ticks_of("daily", tick), [], [])


async def test_what_is_ahead_runs_when_workers_are_back_and_of_what_was_missed_the_latest(open_bus):
    with moved_clock(utc(NOW)) as clock:
        app = periodic(open_bus(), minutely=Every(MINUTE))
        await work_off(app, schedules=True)
        clock.tick(15 * MINUTE)  # nobody was there
        await work_off(app, schedules=True)
    moments = [utc("2026-11-25 04:00") + n * MINUTE for n in (0, 1, 2, 3, 4, 5, 15)]
    assert sorted(app.state) == ticks_of("minutely", *moments)


async def test_a_worker_publishes_each_tick_once_however_long_it_works(open_bus):
    sent, begin, seconds = [], utc(NOW), 4000
    with moved_clock(begin) as clock:
        bus = open_bus()
        send = bus.send
        bus.send = lambda messages: sent.extend(messages) or send(messages)
        app = periodic(bus, second=Every(SECOND), minute=Every(MINUTE), hour=Cron("0 * * * *"))
        await tick_along(boilermaker.Ticker(app), clock, 10, seconds // 10)
    for name, interval in (("second", SECOND), ("minute", MINUTE), ("hour", HOUR)):
        due = [boilermaker._utc(message.due) for message in sent if message.message_id.startswith(f"cron:{name}:")]
        every = list(itertools.takewhile(due[-1].__ge__, Every(interval).after(begin + 10 * SECOND - interval)))
        assert due == every
        assert due[-1] > begin + seconds * SECOND - (interval == HOUR) * HOUR


async def test_a_worker_that_was_suspended_goes_on_with_what_is_not_too_old(open_bus):
    with moved_clock(utc(NOW)) as clock:
        app = periodic(open_bus(), minutely=Every(MINUTE), rare=Every(5 * HOUR))
        ticker = boilermaker.Ticker(app)
        await ticker.publish()
        clock.tick(5 * HOUR)
        assert await ticker.publish() > 0
        assert await ticker.publish() > 0
        await work_off(app)
    behind = [utc("2026-11-25 04:00") + n * MINUTE for n in range(6)]
    now = [utc("2026-11-25 09:00") + n * MINUTE for n in (-2, -1, 0)]
    assert sorted(app.state) == ticks_of("minutely", *behind, *now)


@pytest.mark.parametrize("step", [-3, -299, 100, 299])
async def test_a_step_of_the_clock_by_less_than_half_the_window_neither_doubles_nor_loses_a_tick(open_bus, step):
    with moved_clock(utc(NOW)) as clock:
        app = periodic(open_bus(), minutely=Every(MINUTE))
        ticker, other = boilermaker.Ticker(app), boilermaker.Ticker(app)
        await ticker.publish()
        clock.tick(step)
        for _ in range(100):
            await ticker.publish()
            await other.publish()
            clock.tick(6)
        await work_off(app)
    first, last = utc("2026-11-25 04:00"), utc(NOW) + (step + 594) * SECOND
    moments = [first + n * MINUTE for n in range(30) if first + n * MINUTE <= last + 6 * SECOND]
    if step == -299:  # a worker that starts makes up for what it takes for the latest
        moments.insert(0, utc("2026-11-25 03:55"))
        moments[1:1] = [utc(f"2026-11-25 03:5{n}") for n in range(6, 10)]
    assert sorted(app.state) == ticks_of("minutely", *moments)


async def test_when_the_clock_is_set_back_by_hours_ticks_begin_anew_and_the_log_says_so(open_bus, caplog):
    with moved_clock(utc(NOW)) as clock:
        app = periodic(open_bus(), minutely=Every(MINUTE))
        ticker = boilermaker.Ticker(app)
        await ticker.publish()
        clock.tick(-5 * HOUR)
        await ticker.publish()
        clock.tick(MINUTE)
        await work_off(app)
    assert app.state == ticks_of("minutely", utc("2026-11-24 23:01"))
    assert caplog.messages == ["The clock was set back: ticks of minutely begin anew"]


async def test_a_bus_that_takes_nothing_for_a_while_costs_no_tick_and_no_worker(open_bus, caplog, monkeypatch):
    monkeypatch.setattr(boilermaker, "TICKER_PAUSE", 0.01)
    bus = open_bus()
    app = periodic(bus, second=Every(SECOND), other=Every(SECOND))
    attempts, send = [], bus.send

    async def fail(messages):
        attempts.append(messages)
        raise ServiceBusUnavailable("the disk is full")

    bus.send = fail
    async with working(app):
        await until(lambda: len(attempts) > 2)
        assert app.state == []
        bus.send = send
        await until(lambda: len(app.state) > 4)
    by_name = Counter(each.split(":")[1] for each in app.state)
    assert set(by_name) == {"second", "other"}
    assert max(Counter(app.state).values()) == 1
    assert "Ticks of second are not published, will try again: Publishing failed: the disk is full" in caplog.messages
    assert {message.message_id.split(":")[1] for messages in attempts for message in messages} == {"second"}


async def test_what_is_due_while_the_bus_takes_nothing_is_published_later_from_the_workers_start_on(open_bus):
    with moved_clock(utc(NOW)) as clock:
        bus = open_bus()
        app = periodic(bus, one=Every(MINUTE), other=Every(MINUTE))
        ticker, send = boilermaker.Ticker(app), bus.send

        async def fail(messages):
            raise ServiceBusUnavailable("the disk is full")

        bus.send = fail
        assert await ticker.publish() == boilermaker.TICKER_PAUSE
        clock.tick(2 * MINUTE)
        assert await ticker.publish() == boilermaker.TICKER_PAUSE
        bus.send = send
        assert 0 < await ticker.publish() <= boilermaker.TICKER_PAUSE
        await work_off(app)
    moments = [utc("2026-11-25 04:00") + n * MINUTE for n in range(3)]
    assert sorted(app.state) == ticks_of("one", *moments) + ticks_of("other", *moments)


@pytest.mark.parametrize(("before", "pause"), [(600, 10), (11, 10), (10, 10), (7, 7), (1, 1)])
async def test_a_worker_looks_when_the_next_tick_is_near_enough_and_now_and_then_at_the_clock(open_bus, before, pause):
    with moved_clock(utc("2026-11-25 04:30")) as clock:
        app = periodic(open_bus(), rare=Every(30 * DAY), hourly=Every(HOUR))
        ticker = boilermaker.Ticker(app)
        await ticker.publish()
        clock.move_to(utc("2026-11-25 04:55") - before * SECOND)
        assert [await ticker.publish() for _ in range(2)] == [pause] * 2
        assert await ids_of(app.service_bus_client) == []
        clock.tick(before)
        assert await ticker.publish() == 10
    assert await ids_of(app.service_bus_client) == ticks_of("hourly", utc("2026-11-25 05:00"))


async def test_a_schedule_that_cannot_be_published_keeps_no_other_from_it(open_bus, caplog):
    with moved_clock(utc(NOW)):
        app = periodic(open_bus(max_message_bytes=500))
        [tick] = [app.registration("tick").function]
        app.schedule(Task.si(tick, "x" * 500), every=SECOND, name="large")
        app.schedule(Task.si(tick, "x"), every=SECOND, name="small")
        await work_off(app, schedules=True)
    assert app.state == ticks_of("small", utc(NOW))
    assert {message[:37] for message in caplog.messages} == {"Ticks of large cannot be published, w"}
    assert "message of" in caplog.text


async def test_many_schedules_are_published_without_keeping_others_from_their_turn(open_bus):
    with moved_clock(utc(NOW)):
        app = periodic(open_bus(), **{f"s{n}": Every(SECOND) for n in range(20)})
        publishing, turns = asyncio.create_task(boilermaker.Ticker(app).publish()), 0
        while not publishing.done():
            await asyncio.sleep(0)
            turns += 1
    assert turns > 20
    assert len(await app.service_bus_client.peek(5000)) == 20 * 100


@pytest.mark.parametrize(
    ("options", "ticks"),
    [
        ({"burst": True}, False),
        ({"burst": True, "schedules": False}, False),
        ({"burst": True, "schedules": True}, True),
        ({}, True),
        ({"schedules": True}, True),
        ({"schedules": False}, False),
    ],
    ids=str,
)
async def test_a_worker_publishes_ticks_unless_it_is_a_burst_or_told_otherwise(open_bus, options, ticks):
    app = periodic(open_bus(), yearly=Cron("0 0 1 1 *"), second=Every(SECOND))
    await app.send_task("tick", "to see that it works")
    running = asyncio.create_task(app.run(**options))
    await until(lambda: app.state)
    await until(lambda: any(each.startswith("cron:") for each in app.state)) if ticks else await app.stop()
    await app.stop()
    await running
    assert any(each.startswith("cron:") for each in await ids_of(app.service_bus_client)) is ticks


@pytest.mark.parametrize("schedules", ["no", 1.5, []])
async def test_a_choice_of_schedules_that_is_none_is_an_error_that_shows_it(open_bus, schedules):
    with pytest.raises(UsageError, match=re.escape(f"schedules={schedules!r} must be True, False or None")):
        await Boilermaker(None, open_bus()).run(schedules=schedules)


async def test_a_worker_on_dead_letters_publishes_no_ticks(open_bus):
    app = periodic(open_bus("tasks/$DeadLetterQueue"), second=Every(SECOND))
    async with working(app):
        await asyncio.sleep(0.1)
    assert await ids_of(open_bus()) == []


async def test_without_schedules_a_worker_has_nothing_that_ticks(open_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "Ticker", None)
    app = periodic(open_bus())
    await app.send_task("tick", "x")
    async with working(app):
        await until(lambda: app.state)


async def test_a_worker_that_ends_leaves_no_ticker_behind(open_bus):
    app = periodic(open_bus(), second=Every(SECOND))
    for end in (app.stop, lambda: None):
        before = asyncio.all_tasks()
        running = asyncio.create_task(app.run())
        await until(lambda: app.state)
        if (stopping := end()) is not None:
            await stopping
        running.cancel()
        await asyncio.wait([running])
        assert asyncio.all_tasks() == before
        app.state.clear()


async def test_a_worker_says_at_its_start_which_schedules_end_when_none_is_there(open_bus, caplog):
    caplog.set_level(logging.INFO, "boilermaker.app")
    bus = open_bus()
    app = periodic(bus, second=Every(SECOND), daily=Cron("0 4 * * *"), hourly=Every(HOUR))
    async with working(app):
        await until(lambda: "rarer than" in caplog.text)
    [line] = [each for each in caplog.messages if "rarer than" in each]
    assert line.startswith("Schedules daily, hourly are rarer than every 300 s, half of the queue's window")
    assert "duplicate_detection=" in line
    assert "KEDA" in line
    assert {name: each.is_rare(bus.id_window) for name, each in app.schedules.items()} == {
        "second": False,
        "daily": True,
        "hourly": True,
    }


# -- declaring


def test_a_schedule_is_called_by_its_function_or_otherwise():
    app = app_with_pages()
    assert app.schedule(parse_page, every=HOUR) is app.schedules["parse_page"]
    assert app.schedule(app.create_task(fetch_page, "x"), every=HOUR) is app.schedules["fetch_page"]
    assert app.schedule(app.task(name="tidy")(fetch_page).si("x"), every=HOUR, name="other").name == "other"

    @app.task(every=HOUR, name="named")
    async def work(state, of="x"): ...

    assert list(app.schedules) == ["parse_page", "fetch_page", "other", "named"]
    with pytest.raises(TypeError):
        app.schedules["x"] = app.schedules["other"]


@pytest.mark.parametrize(
    ("workflow", "says"),
    [
        (
            lambda app: fetch_page,
            r"missing a required argument: 'url'\. A schedule gives no arguments.*fn\.si\(\.\.\.\)",
        ),
        (
            lambda app: app.task(name="x")(fetch_page),
            r"missing a required argument: 'url'.*A schedule gives no arguments",
        ),
        (lambda app: app.task(name="x")(fetch_page).s(), "made by .s()"),
        (lambda app: app.create_task(parse_page) >> app.create_task(store_rows), "follows another task"),
        (lambda app: define(), "Unregistered function: resize"),
        (lambda app: Task.si(define()), "Unregistered function: resize"),
        (lambda app: Task.si(parse_page) | Task.si(define()), "Unregistered function: resize"),
        (lambda app: named("parse_page", args=[object()]), "JSON cannot carry argument 1"),
        (lambda app: named("parse_page", args=3), "args=3"),
        (lambda app: "parse_page", "What is scheduled must be a Task or a decorated function, not 'parse_page'"),
        (lambda app: app.task(name="x")(parse_page).delay(), "si\\(\\) makes a task"),
    ],
)
def test_what_cannot_be_published_without_more_is_an_error_where_it_is_declared(workflow, says):
    app = app_with_pages()
    with pytest.raises(UsageError, match=says):
        app.schedule(workflow(app), every=HOUR)
    assert dict(app.schedules) == {}


def test_a_decorated_function_that_needs_arguments_is_an_error_where_it_is_declared():
    with pytest.raises(InvalidArguments, match=r"x\(.*missing a required argument: 'url'.* A schedule gives no"):
        app_with_pages().task(every=HOUR, name="x")(fetch_page)


def test_a_schedule_without_times_or_name_is_an_error_that_says_what_to_give():
    app = app_with_pages()
    with pytest.raises(UsageError, match=r"one of cron='0 4 \* \* \*' and every=timedelta\(minutes=5\)"):
        app.schedule(parse_page)
    for name in ("", 3):
        with pytest.raises(UsageError, match=f"name={name!r} of a schedule must be a string"):
            app.schedule(parse_page, every=HOUR, name=name)
    with pytest.raises(UsageError, match="text that can be encoded"):
        app.schedule(parse_page, every=HOUR, name="\ud800")


def test_a_schedules_name_that_is_taken_is_an_error_that_says_so():
    app = app_with_pages()
    first = app.schedule(app.create_task(fetch_page, "a"), every=HOUR)
    with pytest.raises(UsageError, match=r"Schedule already there: fetch_page\. Give one of the two another name"):
        app.schedule(app.create_task(fetch_page, "b"), every=HOUR)
    with pytest.raises(UsageError, match="already there: fetch_page"):
        app.schedule(parse_page, every=HOUR, name="fetch_page")
    assert dict(app.schedules) == {"fetch_page": first}


def test_a_function_that_is_registered_anew_brings_its_schedule_with_a_warning_or_takes_it_away(caplog):
    app = Boilermaker(None, LocalServiceBus())
    app.task(every=HOUR)(define())
    app.schedule(app.registration("resize").function, every=DAY, name="daily")
    app.task(every=MINUTE)(define())
    assert {name: str(each.when) for name, each in app.schedules.items()} == {
        "resize": "every 0:01:00",
        "daily": "every 1 day, 0:00:00",
    }
    assert caplog.messages[-1] == "Scheduled anew: resize, every 0:01:00 replaces every 1:00:00"
    app.schedule(app.registration("resize").function, every=HOUR, name="daily")
    assert caplog.messages[-1].startswith("Scheduled anew: daily")
    app.task(define())
    assert list(app.schedules) == ["daily"]


# -- several processes

TICKING_PROGRAM = """
import asyncio, datetime, json, logging, os, sys
from boilermaker import AzureServiceBus, Boilermaker, LocalServiceBus, current_task

address, queue, schedules = *sys.argv[1:3], json.loads(sys.argv[3])
logging.basicConfig(level=logging.INFO)
if address.startswith("Endpoint="):
    bus = AzureServiceBus.from_connection_string(address, queue)
else:
    bus = LocalServiceBus(address, queue, lock_duration=1)
app = Boilermaker(None, bus)
journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

@app.task
async def tick(state):
    task = current_task()
    os.write(journal, f"{task.task_id} {task.sequence_number}\\n".encode())

for name, seconds in schedules.items():
    app.schedule(tick, every=datetime.timedelta(seconds=seconds), name=name)

async def main():
    async with app:
        await app.run()

asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["local", "azure"])
async def test_each_tick_is_one_message_while_workers_are_killed_restarted_and_replaced(
    request, start_program, tmp_path, where
):
    address = tmp_path / "queue.db" if where == "local" else request.getfixturevalue("emulator").connection_string
    queue = fresh_queue()

    def start(**schedules):
        return start_program(TICKING_PROGRAM, address, queue, json.dumps(schedules))

    def runs():
        with contextlib.suppress(FileNotFoundError):
            return [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
        return []

    async def ticks_of_another_second(count=1):
        enough = len(runs()) + count
        await until(lambda: len(runs()) >= enough, "\n".join(output.read_text() for _, output in workers))

    workers = [start(first=1) for _ in range(3)]
    await ticks_of_another_second(2)
    for schedules in ({"first": 1}, {"first": 1, "second": 2}, {"second": 2, "first": 1}):
        victim, _ = workers.pop(0)
        victim.kill()
        victim.wait()
        workers.append(start(**schedules))
        await ticks_of_another_second(2)
    process, output = workers.pop(0)
    process.terminate()
    assert await exit_code((process, output)) == 0
    for process, _ in workers:  # nobody is left
        process.kill()
        process.wait()
    gone = time.time()
    await until(lambda: time.time() > gone + 3)
    workers = [start(second=2)]  # and who comes back does not even know the first schedule
    await until(lambda: any(float_of(each) > gone + 3 for each, _ in runs() if each.startswith("cron:first:")))
    process, output = workers.pop()
    process.terminate()
    assert await exit_code((process, output)) == 0

    messages = {}
    for tick, sequence_number in runs():
        messages.setdefault(tick, set()).add(sequence_number)
    assert {tick: found for tick, found in messages.items() if len(found) > 1} == {}
    for name, seconds in (("first", 1), ("second", 2)):
        moments = sorted(float_of(tick) for tick in messages if tick.startswith(f"cron:{name}:"))
        assert [later - moment for moment, later in itertools.pairwise(moments)] == [seconds] * (len(moments) - 1)


def float_of(tick_id):
    return datetime.datetime.fromisoformat(tick_id.split(":", 2)[2]).timestamp()


# ======================================================================================================================
# What users of other task runners met with, and its kin
# ======================================================================================================================


def test_the_way_of_a_message_in_the_docstring_names_what_there_is():
    way = boilermaker.__doc__.split("The way of a message")[1]
    names = re.findall(r"\b(?:[A-Z]\w+\.\w+|decode|decide)\b", way)
    assert len(set(names)) >= 14
    for name in names:
        owner, _, attribute = name.rpartition(".")
        assert hasattr(getattr(boilermaker, owner) if owner else boilermaker, attribute), name
    assert max(map(int, re.findall(r"(?m)^ +(\d+)\. ", way))) <= 15


def test_a_field_that_is_added_is_one_row(tmp_path):
    """The module with one more field, in one more line each where it is declared and in the table."""
    source = MODULE.read_text()
    changed = source.replace(
        "    root: str | None = None\n", "    root: str | None = None\n    colour: str | None = None\n"
    )
    changed = changed.replace(
        '    Field("root", (str, _NONE), str),\n',
        '    Field("root", (str, _NONE), str),\n    Field("colour", (str, _NONE), str),\n',
    )
    assert changed.count("\n") == source.count("\n") + 2
    (tmp_path / "boilermaker.py").write_text(changed)
    code = """
        import sys
        sys.path.pop(0)  # the current folder
        from boilermaker import Task, UsageError, _check_fields, decode, encode
        task = Task(function_name="f", colour="red")
        assert decode(encode(task, "q", "q"), "q").colour == "red"
        assert "colour" not in encode(Task(function_name="f"), "q", "q")
        try:
            _check_fields(Task(function_name="f", colour=7))
        except UsageError as error:
            print(str(error).partition(": ")[2])
    """
    assert fresh_python(code, path=tmp_path) == "colour=7 must be of type str or NoneType."


# -- registering


async def rows_of_pages(state, n: int):
    for row in range(n):
        yield row


class Pages:
    @staticmethod
    async def static(state): ...

    @classmethod
    async def of_class(cls, state): ...


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (rows_of_pages, r"rows_of_pages is an async generator\. Return its result instead"),
        (vars(Pages)["static"], r"static is a staticmethod here\. Put @staticmethod above @app\.task"),
        (vars(Pages)["of_class"], r"of_class is a classmethod here\. Put @classmethod above @app\.task"),
        (functools.partial(fetch_page, depth=2), r"has no name: .*Give it one with name='\.\.\.'"),
        (lambda state: None, "must be async: <lambda>"),
    ],
    ids=["async generator", "staticmethod", "classmethod", "partial", "lambda"],
)
def test_what_is_wrong_with_a_function_is_said(thing, says):
    with pytest.raises(UsageError, match=says):
        Boilermaker(None, LocalServiceBus()).task(thing)


async def test_a_partial_with_a_name_is_a_task():
    app = Boilermaker([], LocalServiceBus())

    async def notify(state, channel: str, text: str):
        state.append((channel, text))

    sms = app.task(name="sms")(functools.partial(notify, channel="sms"))
    app.register_async(functools.partial(notify, channel="mail"), name="mail")
    await sms.delay(text="hello")
    await app.send_task("mail", text="there")
    with pytest.raises(InvalidArguments, match="sms"):
        await sms.delay(title="hello")
    await work_off(app)
    await app.close()
    assert app.state == [("sms", "hello"), ("mail", "there")]


def injecting(function):
    @functools.wraps(function)
    async def wrapper(state, *args, **kwargs):
        return await function(state, *args, session="a session", **kwargs)

    return wrapper


def without_state(function):
    @functools.wraps(function)
    async def wrapper(state, *args, **kwargs):
        state.append((function.__name__, *args))
        return await function(*args, **kwargs)

    return wrapper


async def test_the_signature_that_counts_is_that_of_what_is_called():
    app = Boilermaker([], LocalServiceBus())

    @app.task
    @injecting
    async def save(state, user_id: int, session):
        state.append(("save", user_id, session))

    @app.task
    @without_state
    async def resize(name): ...

    @app.task
    @without_state
    async def cleanup(): ...

    await save.delay(7)
    await resize.delay("cat")
    await cleanup.delay()
    await app.run(concurrency=1, burst=True)
    await app.close()
    assert app.state == [("save", 7, "a session"), ("resize", "cat"), ("cleanup",)]


def test_annotations_are_never_evaluated():
    async def resize(state, image: NoSuchType): ...  # noqa: F821

    app = Boilermaker(None, LocalServiceBus())
    assert app.task(resize).si("x").args == ["x"]
    with pytest.raises(InvalidArguments, match="resize"):
        app.create_task(resize, 1, 2)


@pytest.mark.parametrize("asks", [inspect.iscoroutinefunction, asyncio.iscoroutinefunction])
@pytest.mark.filterwarnings("ignore:.*iscoroutinefunction:DeprecationWarning")
def test_a_decorated_function_is_a_coroutine_function_to_who_asks(asks):
    app = Boilermaker(None, LocalServiceBus())
    assert asks(app.task(fetch_page))
    assert asks(app.task(name="partial")(functools.partial(fetch_page, depth=2)))


async def test_background_tasks_of_a_web_framework_run_a_decorated_function():
    from starlette.background import BackgroundTask

    app = Boilermaker(None, LocalServiceBus())
    ran = []

    @app.task
    async def mail(state, address):
        ran.append(address)

    await BackgroundTask(mail, None, "ann@example.com")()
    assert ran == ["ann@example.com"]


PICKLED = Boilermaker(None, LocalServiceBus())


@PICKLED.task
async def picklable(state): ...


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_bound_task_is_a_dataclass_of_plain_values(again):
    task = PICKLED.bound(picklable.si() | picklable.si())
    twin = again(task)
    assert dataclasses.asdict(twin) == dataclasses.asdict(task)
    assert twin.on_success.function_name == "picklable"
    assert again(picklable) is picklable


def define(module="tests", qualified="resize", name="resize"):
    async def resize(state): ...

    resize.__module__, resize.__qualname__, resize.__name__ = module, qualified, name
    return resize


def test_a_function_that_is_registered_anew_replaces_the_former_with_a_warning(caplog):
    app = Boilermaker(None, LocalServiceBus())
    first, second = define(), define()
    former = app.task(first)
    app.task(second)
    assert app.registration("resize").function is second
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(re.findall(rf"{re.escape(__file__)}:\d+", warning)) == 2
    assert app.bound(former.si()).function_name == "resize"  # who has the former still publishes


@pytest.mark.parametrize(
    "other",
    [define(module="others"), define(qualified="Images.resize"), functools.partial(define())],
    ids=["another module", "another name", "a partial"],
)
def test_a_name_that_is_taken_by_another_function_stays_taken(other):
    app = Boilermaker(None, LocalServiceBus()).register_async(define())
    with pytest.raises(UsageError, match=r"already registered: resize\. Give one of the two another name"):
        app.register_async(other, name="resize")


def test_what_a_factory_makes_twice_is_a_name_taken_twice():
    app = Boilermaker(None, LocalServiceBus()).register_async(define(qualified="make.<locals>.resize"))
    with pytest.raises(UsageError, match="already registered: resize"):
        app.register_async(define(qualified="make.<locals>.resize"))
    with pytest.raises(UsageError, match="resize, this very one"):
        app.register_async(app.registration("resize").function)


def test_a_client_of_the_sdk_for_a_bus_names_the_class_to_use():
    client = type("ServiceBusClient", (), {"__module__": "azure.servicebus.aio._servicebus_client_async"})()
    with pytest.raises(UsageError, match="Give that one's settings to AzureServiceBus"):
        Boilermaker(None, client)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda app, b: b.s(), r"b\.s\(\) passes its parent's result as the first argument; b\.si\(\) passes none"),
        (lambda app, b: app.create_task(b, on_success=b.si()), r"A callback is set on a task: .*on_success"),
        (lambda app, b: app.create_task(b, countdown=5), "called delay"),
        (lambda app, b: app.create_task(b, queue="x"), r"send_task\('name', \.\.\., queue"),
    ],
    ids=["s", "on_success", "countdown", "queue"],
)
def test_what_people_try_first_is_answered_by_the_way_it_is_done(make, says):
    app = Boilermaker(None, LocalServiceBus())

    @app.task
    async def b(state): ...

    with pytest.raises(InvalidArguments, match=says):
        make(app, b)


# -- running


@pytest.mark.parametrize("role", ["on_success", "on_failure"])
async def test_a_decorated_function_set_on_the_running_task_follows_it(role):
    app = Boilermaker([], LocalServiceBus())

    @app.task
    async def a(state):
        setattr(current_task(), role, b)
        if role == "on_failure":
            raise ValueError

    @app.task
    async def b(state):
        state.append("b")

    await a.delay()
    await work_off(app)
    await app.close()
    assert app.state == ["b"]


async def test_the_policy_of_the_running_task_is_the_one_in_force(open_bus):
    app = Boilermaker([], open_bus())

    @app.task(policy=RetryPolicy(max_tries=7), acks_late=False, should_dead_letter=False)
    async def look(state):
        task = current_task()
        state.append((task.policy.max_tries, task.acks_late, task.should_dead_letter))

    await look.delay()
    await app.apply_async(look, policy=NoRetry())
    await work_off(app)
    assert sorted(app.state) == [(1, False, False), (7, False, False)]


async def test_state_kept_by_asyncio_task_does_not_pass_from_message_to_message(open_bus):
    app, local, seen = Boilermaker(None, open_bus()), weakref.WeakKeyDictionary(), []

    @app.task
    async def handle(state, user):
        me = asyncio.current_task()
        seen.append((local.get(me), me.get_name().startswith("user ")))
        local[me] = user
        me.set_name(f"user {user}")

    await app.publish_many([handle.si(user) for user in ("ann", "bob", "cid")])
    await work_off(app)
    assert seen == [(None, False)] * 3


async def test_a_task_factory_of_the_event_loop_makes_the_tasks_of_messages(open_bus):
    app, made = Boilermaker([], open_bus()), []
    loop = asyncio.get_running_loop()

    def factory(loop, coroutine, **options):
        made.append(coroutine.__name__)
        return asyncio.Task(coroutine, loop=loop, **options)

    @app.task
    async def work(state): ...

    await work.delay()
    loop.set_task_factory(factory)
    try:
        await work_off(app)
    finally:
        loop.set_task_factory(None)
    assert "_process" in made


async def test_the_log_has_fields_and_the_current_task_from_begin_to_settlement(open_bus):
    app, lines = Boilermaker(None, open_bus()), []

    class Handler(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("[work]"):
                lines.append((record, current_task().task_id))

    @app.task(policy=RetryPolicy(max_tries=2))
    async def work(state):
        raise RetryException("again\nand again")

    handler, logger = Handler(), logging.getLogger("boilermaker.app")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        task = await work.delay()
        await work_off(app)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    texts = [record.getMessage() for record, _ in lines]
    assert [text.split("sequence_number")[0] for text in texts] == [
        "[work] Begin Task ",
        "[work] Retry ",
        "[work] Begin Task ",
        "[work] Task used up its tries ",
    ]
    assert {task_id for _, task_id in lines} == {task.task_id}
    assert not any("\n" in text for text in texts)
    for (record, _), attempt, number in zip(lines, [1, 1, 2, 2], [1, 1, 2, 2], strict=True):
        assert (record.task, record.task_id, record.queue) == ("work", task.task_id, "tasks")
        assert (record.attempt, record.sequence_number, record.delivery_count) == (attempt, number, 0)


@pytest.mark.parametrize("field", ["function_name", "task_id"])
async def test_foreign_text_forges_no_line_of_the_log(open_bus, caplog, field):
    forged = "x] ok\n2031-01-01 INFO [pay] Completed Task\u2028\x1b[31m"
    app = Boilermaker(None, open_bus())
    fields = {"function_name": "unknown", "task_id": "t", field: forged}
    await app.service_bus_client.send([letter(encode(Task(**fields), "tasks", "tasks"))])
    await work_off(app)
    text = "".join(record.getMessage() for record in caplog.records)
    assert not re.search("[\n\u2028\x1b]", text)


async def test_a_worker_that_cannot_start_says_so_in_the_log(caplog):
    app = Boilermaker(None, LocalServiceBus("/no/such/directory/tasks.db"))
    worker = asyncio.create_task(app.run())
    await asyncio.wait([worker])
    assert "/no/such/directory" in caplog.text
    assert isinstance(worker.exception(), ConfigurationError)


# -- stopping


async def test_stop_returns_when_the_workers_have_ended_with_what_they_ran(open_bus):
    app, begun, go = Boilermaker([], open_bus()), asyncio.Event(), asyncio.Event()

    @app.task
    async def slow(state):
        begun.set()
        await go.wait()
        state.append("ended")

    await slow.delay()
    workers = [asyncio.create_task(app.run()) for _ in range(2)]
    await begun.wait()
    stopping = asyncio.create_task(app.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    go.set()
    await stopping
    assert app.state == ["ended"]
    await asyncio.gather(*workers)
    assert app.workers == set()
    await app.stop()


async def test_a_task_that_stops_its_worker_only_asks(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def last(state):
        await app.stop()
        with pytest.raises(UsageError, match=r"stop\(\) asks that to end"):
            await app.close()
        state.append("ended")

    await last.delay()
    await app.run()
    assert app.state == ["ended"]


@pytest.mark.parametrize("times", [1, 2, 50])
async def test_however_often_a_run_is_cancelled_it_gives_back(open_bus, times):
    app, begun = Boilermaker(None, open_bus(lock_duration=3600)), asyncio.Event()

    @app.task
    async def hold(state):
        begun.set()
        await asyncio.Event().wait()

    await app.publish_many([hold.si(), hold.si()])
    worker = asyncio.create_task(app.run(concurrency=1))
    await begun.wait()
    for _ in range(times):
        worker.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await worker
    async with receiving(app.service_bus_client) as receiver:
        assert len(await receiver.receive(5, 0)) == 2


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_whenever_a_run_is_cancelled_nothing_stays_locked(open_bus, turns):
    app = Boilermaker(None, open_bus(lock_duration=3600))

    @app.task
    async def hold(state):
        await asyncio.Event().wait()

    await app.publish_many([hold.si() for _ in range(5)])
    worker = asyncio.create_task(app.run(concurrency=3))
    for _ in range(turns):
        await asyncio.sleep(0)
    worker.cancel()
    await asyncio.wait([worker])
    async with receiving(app.service_bus_client) as receiver:
        assert len(await receiver.receive(9, 0)) == 5


async def test_a_cancel_scope_that_cancels_at_every_await_gets_messages_given_back(open_bus):
    import anyio

    app, begun = Boilermaker(None, open_bus(lock_duration=3600)), asyncio.Event()

    @app.task
    async def hold(state):
        begun.set()
        await asyncio.Event().wait()

    await hold.delay()
    async with anyio.create_task_group() as group:
        group.start_soon(app.run)
        await begun.wait()
        group.cancel_scope.cancel()
    async with receiving(app.service_bus_client) as receiver:
        assert len(await receiver.receive(5, 0)) == 1


async def test_a_limit_of_time_around_a_run_is_a_timeout(open_bus):
    app = Boilermaker(None, open_bus())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await app.run()
    assert app.workers == set()


async def test_a_task_that_raises_a_cancellation_by_itself_has_failed(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task
    async def odd(state):
        raise asyncio.CancelledError

    await odd.delay()
    await work_off(app)
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_reason == "TaskFailed"
    assert dead.dead_letter_error_description == "asyncio.exceptions.CancelledError"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
async def test_a_helper_process_that_a_task_terminates_ends_and_the_worker_goes_on(open_bus):
    app = Boilermaker([], open_bus())

    @app.task
    async def render(state):
        helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
        helper.start()
        helper.terminate()
        await asyncio.to_thread(helper.join, PATIENCE)
        state.append(helper.exitcode)

    async with working(app):
        for _ in range(2):
            await render.delay()
        await until(lambda: len(app.state) == 2)
    assert app.state == [-signal.SIGTERM] * 2


def test_a_web_server_ends_its_worker_by_the_lifespan(start_program, tmp_path):
    process, output = start_program(
        """
import asyncio, contextlib, logging, os, signal, threading, time
import fastapi, uvicorn
from boilermaker import Boilermaker, LocalServiceBus

logging.basicConfig(level=logging.INFO)
app = Boilermaker(None, LocalServiceBus("queue.db"))

@app.task
async def slow(state):
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.3)
    print("finished", flush=True)

@contextlib.asynccontextmanager
async def lifespan(api):
    async with app:
        worker = asyncio.create_task(app.run())
        await slow.delay()
        yield
        await app.stop()
        await worker
        print("left", flush=True)

uvicorn.run(fastapi.FastAPI(lifespan=lifespan), port=0)
"""
    )
    assert process.wait(PATIENCE) in (0, -signal.SIGTERM), output.read_text()
    lines = output.read_text().splitlines()
    assert lines.index("finished") < lines.index("left")
    assert await_no_locks(tmp_path / "queue.db") == 0


def await_no_locks(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT count(*) FROM message").fetchone()[0]


# -- locks, suspects, dead letters


async def test_a_message_whose_lock_ran_out_before_its_task_began_is_not_run(open_bus, caplog):
    app = Boilermaker([], open_bus(lock_duration=0.2))

    @app.task
    async def work(state):
        state.append(current_task().sequence_number)

    await work.delay()
    receive = boilermaker.LocalReceiver.receive
    late = []

    async def received_late(receiver, *arguments):
        deliveries = await receive(receiver, *arguments)
        for delivery in deliveries:
            if not late:
                late.append(delivery)
                delivery.locked_until = time.time() - 1  # the event loop stood still in between
                await app.service_bus_client.send([])
        return deliveries

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boilermaker.LocalReceiver, "receive", received_late)
        async with working(app):
            await until(lambda: app.state)
    assert len(app.state) == 1
    assert "Lock lost, not begun" in caplog.text


async def test_one_failed_renewal_is_tried_again_long_before_the_lock_runs_out(open_bus, monkeypatch):
    bus, attempts = open_bus(lock_duration=2), []
    renew = boilermaker.Store.renew

    def flaky(store, *arguments):
        attempts.append(time.monotonic())
        if len(attempts) == 1:
            raise sqlite3.OperationalError("disk I/O error")
        return renew(store, *arguments)

    monkeypatch.setattr(boilermaker.Store, "renew", flaky)
    await bus.send([letter("a")])
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, 0)
        await until(lambda: len(attempts) >= 2)
        assert await settle(receiver, delivery) is None
    assert attempts[1] - attempts[0] < 1


async def deliver_often(bus, times):
    """Deliver everything that often, without settling it."""
    with contextlib.closing(sqlite3.connect(bus.path, isolation_level=None)) as connection:
        connection.execute("UPDATE message SET delivery_count = ?", (times,))


@pytest.mark.parametrize("max_deliveries", [9, 6, None], ids=repr)
async def test_a_suspect_runs_with_nothing_else(open_bus, caplog, max_deliveries):
    app, running = Boilermaker([], open_bus()), set()

    @app.task
    async def work(state, name):
        running.add(name)
        await asyncio.sleep(0.02)
        state.append(sorted(running))
        running.discard(name)

    await app.publish_many([work.si("suspect 1"), work.si("suspect 2")])
    await deliver_often(app.service_bus_client, 5)
    await app.publish_many([work.si(name) for name in "abc"])
    await app.run(burst=True, max_deliveries=max_deliveries)
    alone = [names for names in app.state if any(name.startswith("suspect") for name in names)]
    assert sorted(alone) == [["suspect 1"], ["suspect 2"]]
    assert len(app.state) == 5
    assert caplog.text.count("it runs alone") == 2


async def test_a_suspect_is_given_back_where_others_run_for_longer_than_a_lock_lasts(open_bus, caplog):
    app, go = Boilermaker([], open_bus(lock_duration=0.3)), asyncio.Event()

    @app.task
    async def work(state, name):
        state.append(name)
        if name == "long":
            await go.wait()

    await work.delay("long")
    async with working(app, max_deliveries=None):
        await until(lambda: app.state)
        await app.apply_async(work, "suspect", delay=0.3)
        with contextlib.closing(sqlite3.connect(app.service_bus_client.path, isolation_level=None)) as connection:
            connection.execute("UPDATE message SET delivery_count = 5 WHERE state = 1")
        await until(lambda: "others still run" in caplog.text)
        assert app.state == ["long"]
        go.set()
        await until(lambda: app.state == ["long", "suspect"])


async def test_a_message_that_ends_its_workers_is_dead_lettered_with_its_callback_once(open_bus, start_program):
    bus = open_bus(lock_duration=0.3)
    app = Boilermaker([], bus)

    @app.task
    async def mourn(state, failure):
        state.append((failure["function_name"], failure["attempts"]))

    @app.task
    async def neighbour(state):
        state.append("neighbour")

    task = Task.default("kill")
    task.on_failure = mourn.s()
    await app.publish_task(task)
    for kill in range(3):
        process = start_program(
            """
import asyncio, os, signal
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("queue.db", lock_duration=0.3))

@app.task
async def kill(state):
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(app.run(max_deliveries=3))
"""
        )
        assert await exit_code(process) == -signal.SIGKILL, kill
    app.register_async(take_anything, name="kill")
    await neighbour.delay()
    async with working(app, max_deliveries=3):
        await until(lambda: len(app.state) == 2)
    assert sorted(app.state, key=str) == [("kill", 0), "neighbour"]
    [dead] = await bus.peek(dead_letter=True)
    assert (dead.dead_letter_reason, dead.delivery_count) == ("MaxDeliveryCountExceeded", 4)


async def test_on_azure_too_a_message_that_ends_its_workers_is_dead_lettered_with_its_callback_once(
    quick_azure_bus, quick_emulator, start_program
):
    bus = quick_azure_bus()
    app = Boilermaker([], bus)

    @app.task
    async def mourn(state, failure):
        state.append((failure["function_name"], failure["error"]))

    task = Task.default("kill")
    task.on_failure = mourn.s()
    await app.publish_task(task)
    for kill in range(5):
        process = start_program(
            """
import asyncio, os, signal, sys
from boilermaker import AzureServiceBus, Boilermaker

app = Boilermaker(None, AzureServiceBus.from_connection_string(sys.argv[1], sys.argv[2]))

@app.task
async def kill(state):
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(app.run(max_deliveries=5))
""",
            quick_emulator.connection_string,
            bus.queue_name,
        )
        assert await exit_code(process) == -signal.SIGKILL, kill
    app.register_async(take_anything, name="kill")
    async with working(app, max_deliveries=5):
        await until(lambda: app.state)
    assert app.state == [("kill", "MaxDeliveryCountExceeded")]
    [dead] = await bus.peek(dead_letter=True)
    assert dead.dead_letter_reason == "MaxDeliveryCountExceeded"


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "3", True])
async def test_a_number_of_deliveries_that_is_none_is_an_error(wrong):
    with pytest.raises(ConfigurationError, match=f"max_deliveries={re.escape(repr(wrong))}"):
        await Boilermaker(None, LocalServiceBus()).run(burst=True, max_deliveries=wrong)


async def test_a_worker_on_a_dead_letter_queue_leaves_alone_what_it_does_not_know(open_bus, caplog):
    app = Boilermaker(None, open_bus())
    await app.service_bus_client.send([letter("no task", message_id="a")])
    await app.send_task("unknown")
    await app.send_task("fails")
    await work_off(app)
    before = await app.service_bus_client.peek(dead_letter=True)
    assert len(before) == 3
    again = Boilermaker([], open_bus(queue_name="tasks/$DeadLetterQueue"))

    async def fails(state):
        state.append("ran")
        raise ValueError("still")

    again.register_async(fails)
    await work_off(again)
    after = await app.service_bus_client.peek(dead_letter=True)
    assert again.state == ["ran"]
    assert [(each.body, each.dead_letter_reason, each.dead_letter_error_description) for each in after] == [
        (each.body, each.dead_letter_reason, each.dead_letter_error_description) for each in before
    ]
    async with receiving(open_bus(queue_name="tasks/$DeadLetterQueue")) as receiver:
        assert len(await receiver.receive(9, 0)) == 3  # nothing stayed locked
    assert caplog.text.count("left as it is") == 2


async def test_a_dead_letter_whose_follow_up_can_never_be_published_runs_once_and_stays_what_it_is(new_bus):
    bus = new_bus()
    app = Boilermaker(None, bus)
    dead_letters = Boilermaker([], new_bus(f"{bus.queue_name}{boilermaker.DEAD_LETTER_SUFFIX}"))

    async def odd(state):
        state.append("ran")
        return object()

    dead_letters.register_many_async([odd, take_anything])
    await dead_letters.publish_task(Task.si(odd) | Task.s(take_anything))
    app.register_async(parse_page)
    await work_off(app)  # which does not know it
    await work_off(dead_letters)
    [dead] = await bus.peek(dead_letter=True)
    assert (dead_letters.state, dead.dead_letter_reason) == (["ran"], "UnregisteredFunction")


@pytest.mark.parametrize("attempt", [1, 2], ids=["first", "again"])
async def test_a_failure_that_stays_a_dead_letter_is_not_followed_again(open_bus, attempt):
    app = Boilermaker([], open_bus())
    dead_letters = Boilermaker([], open_bus(queue_name=DEAD))

    async def fails(state):
        raise ValueError

    async def alert(state):
        state.append("alert")

    for each in (app, dead_letters):
        each.register_many_async([fails, alert])
    task = app.create_task(fails)
    task.on_failure = app.create_task(alert)
    await app.publish_task(task)
    await work_off(app)
    for _ in range(attempt):
        await work_off(dead_letters)
        await work_off(app)
    assert app.state == ["alert"]


async def test_a_suspect_is_never_given_back_so_often_that_it_dies_without_having_run(open_bus):
    app, go = Boilermaker([], open_bus(lock_duration=0.2)), asyncio.Event()

    @app.task
    async def work(state, name):
        state.append(name)
        if name == "long":
            await go.wait()

    await work.delay("long")
    async with working(app, max_deliveries=6):
        await until(lambda: app.state)
        await app.apply_async(work, "suspect", delay=0.2)
        with contextlib.closing(sqlite3.connect(app.service_bus_client.path, isolation_level=None)) as connection:
            connection.execute("UPDATE message SET delivery_count = 4 WHERE state = 1")
        await asyncio.sleep(1.5)
        go.set()
        await until(lambda: app.state == ["long", "suspect"])
    assert await ids_of(app.service_bus_client, dead_letter=True) == []


async def test_a_suspect_begins_when_what_ended_before_it_is_settled(open_bus):
    app, left = Boilermaker([], open_bus()), []

    @app.task
    async def work(state, name):
        if name == "suspect":
            left.append(len(await app.service_bus_client.peek()))
        else:
            await asyncio.sleep(0.05)

    await work.delay("suspect")
    await deliver_often(app.service_bus_client, 5)
    await app.publish_many([work.si(name) for name in "abc"])
    await work_off(app, concurrency=2)
    assert left[0] in (1, 4)  # its neighbours not begun, or gone


@pytest.mark.parametrize(
    "error",
    [
        ValueError("caf\udce9"),
        functools.reduce(lambda inner, _: ExceptionGroup("g", [inner]), range(2000), ValueError()),
    ],
    ids=["lone surrogate", "groups in groups"],
)
async def test_whatever_is_raised_the_function_runs_once_and_is_followed(open_bus, error):
    app = Boilermaker([], open_bus())

    @app.task
    async def odd(state):
        state.append("ran")
        raise error

    @app.task
    async def alert(state, failure):
        state.append(failure["error"])

    task = odd.si()
    task.on_failure = alert.s()
    await app.publish_task(task)
    await work_off(app)
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert (app.state, dead.dead_letter_reason) == (["ran", type(error).__name__], "TaskFailed")


async def test_a_function_that_changes_its_attempts_is_not_retried_more_often(open_bus):
    app = Boilermaker([], open_bus())

    @app.task(policy=RetryPolicy(max_tries=3))
    async def work(state):
        state.append(current_task().attempts.attempts)
        current_task().attempts, current_task().policy = RetryAttempts.default(), RetryPolicy(max_tries=9)
        raise RetryException("again")

    await work.delay()
    await work_off(app)
    assert app.state == [0, 1, 2]


@pytest.mark.parametrize("field", ["task_id", "function_name"])
async def test_text_that_cannot_be_encoded_is_an_error_before_it_is_sent(field):
    async with Boilermaker(None, LocalServiceBus()) as app:
        with pytest.raises(UsageError, match="can be encoded"):
            await app.publish_task(Task(**{"function_name": "f", field: "x\udce9"}))


async def test_a_worker_goes_on_when_a_publisher_was_the_first_to_see_that_the_disk_failed(open_bus, monkeypatch):
    app, go = Boilermaker([], open_bus()), asyncio.Event()

    @app.task
    async def work(state, number):
        state.append(number)
        await go.wait()

    def fails_once(file, failed=[]):  # noqa: B006
        if not failed:
            failed.append(file)
            raise OSError(5, "Input/output error")

    await work.delay(1)
    async with working(app):
        await until(lambda: app.state == [1])
        monkeypatch.setattr(os, "fdatasync", fails_once, raising=False)
        with pytest.raises(BoilermakerAppException):
            await work.delay(2)
        await work.delay(3)
        await until(lambda: len(app.state) == 3)
        go.set()
        await until(lambda: nothing_is_left(app.service_bus_client))
    assert app.state == [1, 2, 3]


async def test_a_run_from_a_replaced_file_settles_nothing_of_the_file_that_replaced_it(open_bus, tmp_path):
    old = open_bus()
    await old.send([letter("old")])
    async with receiving(old) as receiver:
        [held] = await receiver.receive(1, 0)
        for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
            (tmp_path / name).unlink()
        new = open_bus()
        await new.send([letter("new")])
        async with receiving(new) as other:
            [theirs] = await other.receive(1, 0)
            assert (theirs.sequence_number, theirs.delivery_count) == (held.sequence_number, held.delivery_count)
            assert isinstance(await settle(other, held), MessageLockLost)
            assert await settle(other, theirs) is None


async def test_a_task_that_is_to_run_once_does_not_if_its_message_could_not_be_completed(open_bus, monkeypatch):
    app = Boilermaker([], open_bus(lock_duration=0.3))

    @app.task(acks_late=False)
    async def work(state):
        state.append("ran")

    def broken(store, *arguments):
        raise sqlite3.OperationalError("disk I/O error")

    await work.delay()
    with monkeypatch.context() as patch:
        patch.setattr(boilermaker.Store, "complete", broken)
        async with working(app):
            await asyncio.sleep(0.6)
            assert app.state == []
    async with working(app):
        await until(lambda: app.state == ["ran"])


async def test_a_worker_that_holds_too_many_dead_letters_ends(open_bus, monkeypatch, caplog):
    monkeypatch.setattr(boilermaker, "MOST_KEPT", 5)
    dead = open_bus(queue_name="tasks/$DeadLetterQueue")
    await dead.send([letter(str(number), queue="tasks/$DeadLetterQueue") for number in range(20)])
    app = Boilermaker(None, dead).register_async(parse_page)
    await app.run(concurrency=2)
    assert "it holds 5 dead letters" in caplog.text
    assert len(await dead.peek()) == 20


async def test_no_retry_shares_an_id_with_a_task_that_somebody_named(open_bus, caplog):
    app = Boilermaker([], open_bus(duplicate_detection=600))

    @app.task(policy=RetryPolicy(3, 0))
    async def work(state):
        task = current_task()
        if task.task_id == "report" and not task.attempts.attempts:
            raise RetryException("again")
        state.append(task.task_id)

    for task_id in ("report:1", "report"):
        task = work.si()
        task.task_id = task_id
        await app.publish_task(task)
    await work_off(app)
    assert sorted(app.state) == ["report", "report:1"]


async def test_a_follow_up_that_is_dropped_as_a_duplicate_is_logged(open_bus, caplog):
    app = Boilermaker([], open_bus(duplicate_detection=600))

    @app.task
    async def first(state): ...

    task = await app.publish_task(first.si() | first.si())
    root = root_of(boilermaker.Delivery(task.sequence_number, 0, task.message_id, "", {}, 0), "tasks")
    await app.service_bus_client.send([letter("x", message_id=root)])
    await work_off(app)
    assert f"[first] Follow-up dropped as a duplicate sequence_number=1 message_id={root}" in caplog.text


# -- the queue file


async def test_an_expired_backlog_is_dead_lettered_some_at_a_time(open_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "BURIED_AT_ONCE", 10)
    with moved_clock() as clock:
        bus, buried = open_bus(time_to_live=5), []
        bury = boilermaker.Store._bury

        def counted(store, *arguments):
            buried.append(bury(store, *arguments))
            return buried[-1]

        claim = boilermaker.Store.claim
        by_claim = []

        def claimed(store, *arguments):
            before = sum(buried)
            result = claim(store, *arguments)
            by_claim.append(sum(buried) - before)
            return result

        monkeypatch.setattr(boilermaker.Store, "_bury", counted)
        monkeypatch.setattr(boilermaker.Store, "claim", claimed)
        await bus.send([letter(str(number)) for number in range(95)])
        clock.tick(6)
        await bus.send([letter("fresh")])
        async with receiving(bus) as receiver:
            [delivery] = await receiver.receive(3, 0)
            await settle(receiver, delivery)
        assert delivery.body == "fresh"
        assert len(await bus.peek(200, dead_letter=True)) == 95
    assert max(by_claim) <= 10 + 3


async def test_a_backlog_that_was_delivered_too_often_is_dead_lettered_some_at_a_time(open_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "BURIED_AT_ONCE", 10)
    bus = open_bus(max_delivery_count=2)
    await bus.send([letter(str(number)) for number in range(45)])
    await deliver_often(bus, 2)
    async with receiving(bus) as receiver:
        assert await receiver.receive(5, 0) == []
    dead = await bus.peek(100, dead_letter=True)
    assert [message.dead_letter_reason for message in dead] == ["MaxDeliveryCountExceeded"] * 45
    assert {message.delivery_count for message in dead} == {2}


async def test_peeking_waits_for_no_writer_and_keeps_none_waiting(open_bus):
    bus = open_bus()
    await bus.send([letter("a")])
    with contextlib.closing(sqlite3.connect(bus.path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert await ids_of(bus) == ["a"]
        writer.execute("ROLLBACK")
    await bus.peek()
    assert await bus.send([letter("b")]) == [2]


async def test_to_look_changes_nothing_about_a_queue(open_bus):
    bus, shop = open_bus(duplicate_detection=600), open_bus("shop")
    await bus.send([letter("a")])
    look = open_bus()
    await look.peek()
    with contextlib.suppress(MessageNotFound):
        await look.cancel(77)
    await shop.send([letter("a")])  # to `tasks`, a duplicate
    assert await ids_of(bus) == ["a"]
    await look.send([])  # who sends decides
    await shop.send([letter("a")])
    assert await ids_of(bus) == ["a", "a"]


VERSION_1 = MODULE.parent / ".ci" / "version1.sql"


@pytest.fixture
def file_of_version_1(tmp_path):
    path = tmp_path / "queue.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1.read_text())
        connection.execute("PRAGMA journal_mode = WAL")
    return path


def version_of(path):
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


async def test_a_file_of_version_1_is_read_as_it_is_and_migrated_by_who_sends(file_of_version_1, open_bus):
    bus = open_bus(path=file_of_version_1, duplicate_detection=10_000_000)
    before = await bus.peek(), await bus.peek(dead_letter=True)
    assert version_of(file_of_version_1) == 1
    assert [message.dead_letter_reason for message in before[1]] == [
        "TaskFailed",
        "UnregisteredFunction",
        "RetriesExhausted",
    ]
    [number] = await bus.send([letter("new")])
    assert (version_of(file_of_version_1), number) == (boilermaker.SCHEMA_VERSION, 10)
    assert (await bus.peek())[:-1] == before[0]
    assert await bus.peek(dead_letter=True) == before[1]


async def test_what_an_operation_would_do_in_a_file_of_version_1_is_told_and_leaves_it_so(file_of_version_1, open_bus):
    bus = open_bus(path=file_of_version_1)
    dead = await bus.peek(dead_letter=True)
    assert await bus.replay(lambda message: True, dry_run=True) == dead
    assert await bus.discard([message.sequence_number for message in dead], dry_run=True) == dead
    assert (
        (await bus.counts()).dead_letter == sum(each.dead_letter for each in (await bus.counts_by_task()).values()) == 3
    )
    assert version_of(file_of_version_1) == 1
    assert len(await bus.replay(lambda message: True)) == 3
    assert version_of(file_of_version_1) == boilermaker.SCHEMA_VERSION


async def test_what_waits_in_a_file_of_version_1_runs(file_of_version_1, open_bus):
    app = Boilermaker([], open_bus(path=file_of_version_1))

    async def resize(state, image_id, width=800):
        state.append((image_id, width, current_task().policy.max_tries))
        return image_id

    async def store(state, result):
        state.append(result)

    app.register_many_async([resize, store])
    await work_off(app)
    assert sorted(app.state, key=str) == [("cat.png", 800, 5), ("dog.png", 100, 5), "cat.png"]
    [later] = await app.service_bus_client.peek()
    assert later.scheduled_enqueue_time_utc.year == 2090


async def test_a_process_of_the_former_version_goes_on_with_a_file_that_was_migrated(file_of_version_1, open_bus):
    with contextlib.closing(sqlite3.connect(file_of_version_1, isolation_level=None)) as former:
        former.execute("SELECT * FROM message").fetchall()
        bus = open_bus(path=file_of_version_1)
        await bus.send([letter("new")])
        former.execute(
            "INSERT INTO message (queue_id, state, due, enqueued_time, message_id, body) VALUES (1, 1, 0, 0, 'm', 'x')"
        )
        former.execute("DELETE FROM message WHERE message_id = 'new'")
    ids = await ids_of(bus)
    assert "m" in ids
    assert "new" not in ids


async def test_a_file_from_the_future_is_refused_also_to_be_read(file_of_version_1, open_bus):
    with contextlib.closing(sqlite3.connect(file_of_version_1)) as connection:
        connection.execute("PRAGMA user_version = 99")
    bus = open_bus(path=file_of_version_1)
    for use in (bus.peek(), bus.send([letter("a")])):
        with pytest.raises(ConfigurationError, match="schema version 99"):
            await use


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root")
def test_a_file_in_a_folder_that_cannot_be_written_to_is_read(file_of_version_1, tmp_path):
    with contextlib.closing(sqlite3.connect(file_of_version_1)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(MODULE.parent)!r})
from boilermaker import LocalServiceBus
print(len(asyncio.run(LocalServiceBus({str(file_of_version_1)!r}).peek(dead_letter=True))))
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        copied = Path(folder) / "q" / "queue.db"
        copied.parent.mkdir()
        shutil.copy(file_of_version_1, copied)
        module = Path(folder) / "boilermaker.py"
        shutil.copy(MODULE, module)
        code = code.replace(str(file_of_version_1), str(copied)).replace(str(MODULE.parent), folder)
        copied.chmod(0o444)
        copied.parent.chmod(0o555)
        Path(folder).chmod(0o755)
        ended = subprocess.run(
            ["setpriv", "--reuid", "65534", "--clear-groups", "/usr/bin/env", "python3", "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
        )
        if "can't open" in ended.stderr or "Permission denied: " in ended.stderr or "No such file" in ended.stderr:
            pytest.skip("another user cannot start this Python")
        assert ended.stdout.strip() == "3", ended.stderr
        assert sorted(path.name for path in copied.parent.iterdir()) == ["queue.db"]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
async def test_a_worker_goes_on_with_the_file_that_is_there_now(
    open_bus, monkeypatch, caplog, tmp_path, busy, replaced
):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.1)
    monkeypatch.setattr(boilermaker, "CHECK_INTERVAL", 0.1)
    app, go = Boilermaker([], open_bus()), asyncio.Event()

    @app.task
    async def work(state, number):
        state.append(number)
        if number == 1:
            await go.wait()

    await work.delay(1 if busy else 0)
    async with working(app):
        await until(lambda: app.state)
        for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
            (tmp_path / name).unlink()
        if replaced:
            other = LocalServiceBus(tmp_path / "queue.db")
            await Boilermaker(None, other).send_task("work", 2)
            await other.close()
        else:
            await until(lambda: "was deleted or replaced" in caplog.text)
            await work.delay(2)
        await until(lambda: app.state[1:] == [2])
        go.set()
    assert "was deleted or replaced while open" in caplog.text


async def test_a_worker_on_a_file_that_another_program_replaced_ends_with_the_error(
    open_bus, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.1)
    monkeypatch.setattr(boilermaker, "CHECK_INTERVAL", 0.1)
    app = Boilermaker(None, open_bus()).register_async(parse_page)
    await app.service_bus_client.send([])
    worker = asyncio.create_task(app.run())
    await asyncio.sleep(0.05)
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        (tmp_path / name).unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(ConfigurationError, match="the database of another program"):
        await worker
    assert "cannot go on" in caplog.text


def test_an_interrupt_in_a_transaction_leaves_nobody_waiting(tmp_path, monkeypatch):
    app = Boilermaker(None, LocalServiceBus(tmp_path / "queue.db")).register_async(parse_page)
    insert, armed = boilermaker.Store.insert, [True]

    def interrupted(store, *arguments):
        if armed and armed.pop():
            raise KeyboardInterrupt
        return insert(store, *arguments)

    monkeypatch.setattr(boilermaker.Store, "insert", interrupted)
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(app.send_task("parse_page"))
        left = asyncio.all_tasks(loop)
        answers = loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        assert [type(answer) for answer in answers] == [BoilermakerAppException]
        loop.run_until_complete(asyncio.wait_for(app.send_task("parse_page"), PATIENCE))
        loop.run_until_complete(app.close())
    finally:
        loop.close()


async def test_the_log_stays_small_with_large_bodies(open_bus, tmp_path):
    bus, sizes = open_bus(), []
    for turn in range(12):
        await bus.send([letter("x" * 200_000, message_id=f"{turn} {number}") for number in range(25)])
        sizes.append((tmp_path / "queue.db-wal").stat().st_size)
    assert max(sizes) < 32 * 1024 * 1024


async def test_the_log_stays_small_with_short_lived_publishers_beside_an_idle_one(open_bus, tmp_path, monkeypatch):
    monkeypatch.setattr(boilermaker, "FULL_LOG_BYTES", 200_000)
    idle = open_bus()
    await idle.send([letter("idle")])
    for turn in range(20):
        bus = LocalServiceBus(tmp_path / "queue.db")
        await bus.send([letter("x" * 40_000, message_id=str(turn))])
        await bus.close()
    assert (tmp_path / "queue.db-wal").stat().st_size < 300_000


def test_a_queue_in_memory_is_heard_of_between_threads():
    app, began = Boilermaker(None, LocalServiceBus()), threading.Event()

    @app.task
    async def hello(state):
        began.set()

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(boilermaker, "MAX_WAIT", PATIENCE)  # so that only hearing of it helps
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        worker = asyncio.run_coroutine_threadsafe(app.run(), loop)
        time.sleep(0.2)
        asyncio.run(hello.delay())
        assert began.wait(PATIENCE / 2)
        asyncio.run_coroutine_threadsafe(app.stop(), loop).result(PATIENCE)
        worker.result(PATIENCE)
        asyncio.run_coroutine_threadsafe(app.close(), loop).result(PATIENCE)
    finally:
        monkeypatch.undo()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# -- tracing


async def test_what_the_configured_propagators_carry_travels_with_the_message(open_bus, monkeypatch):
    from opentelemetry import baggage, context, propagate
    from opentelemetry.propagators.textmap import TextMapPropagator

    class Shop(TextMapPropagator):
        fields = frozenset({"x-own"})

        def extract(self, carrier, context=None, getter=None):
            return baggage.set_baggage("own", carrier.get("x-own"), context)

        def inject(self, carrier, context=None, setter=None):
            carrier["x-own"] = str(baggage.get_baggage("own", context))

    async def published_with(key):
        app, seen = Boilermaker(None, open_bus(), enable_opentelemetry=True), []

        @app.task
        async def handle(state):
            seen.append(baggage.get_baggage(key))
            if len(seen) == 1:
                raise RetryException("once more", delay=0)

        token = context.attach(baggage.set_baggage(key, "42"))
        try:
            await handle.delay()
        finally:
            context.detach(token)
        await work_off(app)
        return seen

    assert await published_with("tenant") == ["42", "42"]
    monkeypatch.setattr(propagate, "get_global_textmap", Shop)
    assert await published_with("own") == ["42", "42"]


# ======================================================================================================================
# Helpers of the buses
# ======================================================================================================================


LOCK_DURATION = 5
QUEUES = [f"queue{number}" for number in range(1000)]
QUEUE_WITH_SESSIONS = "with-sessions"
SESSION_QUEUES = [QUEUE_WITH_SESSIONS, *(f"{queue}-{what}" for queue in QUEUES for what in ("replies", "join"))]
_fresh_queues = iter(QUEUES)


def service_bus(*args, **options):
    """An emulator; where the tests are run a second time, on another Python, they do without."""
    if os.environ.get("NETWORK_TESTS") == "skipped":
        pytest.skip("needs the emulator")
    return ServiceBusEmulator(*args, **options)


@pytest.fixture(scope="session")
def emulator():
    """A Service Bus on loopback, with more queues than there are tests."""
    options = {"lock_duration": LOCK_DURATION, "duplicate_detection": 600}
    with service_bus(queues=QUEUES, session_queue=SESSION_QUEUES, **options) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def quick_emulator():
    """Another, whose locks are the shortest there can be on Azure but for a factor."""
    options = {"lock_duration": 2, "duplicate_detection": 600}
    with service_bus(queues=QUEUES, session_queue=SESSION_QUEUES, **options) as emulator:
        yield emulator


@contextlib.asynccontextmanager
async def azure_buses(emulator):
    """Makes buses on a fresh queue, or on the one that is named; that one of them leaves a connection is an error."""
    buses = []
    for fault in ("busy", "lose", "mute", "slow", "unlock"):  # that an earlier test has left
        emulator.control(f"{fault} 0")

    def make(queue_name=None):
        buses.append(AzureServiceBus.from_connection_string(emulator.connection_string, queue_name or fresh_queue()))
        return buses[-1]

    yield make
    for bus in buses:
        await bus.close()
    await until(lambda: emulator.control("stats")["connections"] == 0, "the end of all connections")


def fresh_queue():
    return next(_fresh_queues)


@pytest.fixture
def impatient(monkeypatch):
    """Loopback is quick: so are the waits at the end of a worker, and those between attempts to send."""
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.2)
    monkeypatch.setattr(boilermaker, "EMPTY_WAIT", 0.3)
    monkeypatch.setattr(boilermaker, "SEND_PAUSES", (0.1, 0.2, 0.4))


@pytest.fixture
async def azure_bus(emulator, impatient):
    """Makes Azure buses over the wire."""
    async with azure_buses(emulator) as make:
        yield make


@pytest.fixture
async def quick_azure_bus(quick_emulator, impatient):
    async with azure_buses(quick_emulator) as make:
        yield make


@pytest.fixture
async def local_bus(tmp_path):
    """Makes local buses on `queue.db`."""
    buses = []

    def make(queue_name=None):
        queue_name = queue_name or fresh_queue()
        settings = {"lock_duration": LOCK_DURATION, "duplicate_detection": 600}
        buses.append(LocalServiceBus(tmp_path / "queue.db", queue_name, **settings))
        return buses[-1]

    yield make
    for bus in buses:
        await bus.close()


@pytest.fixture(params=["local", "azure"])
async def new_bus(request, local_bus, impatient):
    """Makes buses of either kind: what holds on one holds on the other."""
    if request.param == "local":
        yield local_bus
    else:
        async with azure_buses(request.getfixturevalue("emulator")) as make:
            yield make


async def is_empty(bus):
    return await bus.peek() == []


# ======================================================================================================================
# The contract, on both buses
# ======================================================================================================================


async def test_a_published_task_runs_once_and_leaves_nothing(new_bus):
    app = Boilermaker("state", new_bus())
    ran = []

    @app.task
    async def work(state, *args, **kwargs):
        task = current_task()
        ran.append((state, args, kwargs, task.task_id, task.message_id))

    task = await work.delay(1, "é", flag=None)
    await work_off(app)
    assert ran == [("state", (1, "é"), {"flag": None}, task.task_id, task.task_id)]
    assert await is_empty(app.service_bus_client)


async def test_peek_shows_what_waits_without_locking_it(new_bus):
    app = Boilermaker(None, new_bus())

    @app.task
    async def work(state, text): ...

    now, later = (await work.delay("é"), await app.apply_async(work, "later", delay=3600))
    [first, second] = await app.service_bus_client.peek()
    assert [first] == await app.service_bus_client.peek(1)
    assert (first.message_id, second.message_id) == (now.task_id, later.task_id)
    assert json.loads(first.body)["payload"] == {"args": ["é"], "kwargs": {}}
    assert first.sequence_number < second.sequence_number == later.sequence_number
    assert (first.delivery_count, first.dead_letter_reason, first.dead_letter_error_description) == (0, None, None)
    now_utc = datetime.datetime.now(datetime.UTC)
    assert abs(now_utc - first.enqueued_time_utc) < datetime.timedelta(minutes=5)
    assert first.scheduled_enqueue_time_utc is None
    expected = datetime.timedelta(minutes=55), datetime.timedelta(minutes=60)
    assert expected[0] < second.scheduled_enqueue_time_utc - now_utc < expected[1]


async def test_results_and_failures_are_passed_along(new_bus):
    app = Boilermaker(None, new_bus())
    seen = []

    @app.task
    async def double(state, x):
        return 2 * x

    @app.task
    async def store(state, x):
        seen.append(x)
        raise ValueError(f"no room for {x}")

    @app.task
    async def clean_up(state, failure):
        seen.append((failure["error"], failure["message"], failure["function_name"], failure["attempts"]))

    await app.publish_task(app.chain(double.si(3), double.s(), store.s(), on_failure=clean_up.s()))
    await work_off(app)
    assert seen == [12, ("ValueError", "no room for 12", "store", 1)]


async def test_a_retry_waits_as_its_policy_says(new_bus):
    app = Boilermaker(None, new_bus())
    runs = []

    @app.task(policy=RetryPolicy(max_tries=2, delay=1))
    async def flaky(state):
        runs.append((time.monotonic(), current_task().attempts.attempts, current_task().message_id))
        if len(runs) == 1:
            raise RetryException("not yet")

    task = await flaky.delay()
    async with working(app):
        await until(lambda: len(runs) == 2)
    (first, *facts), (second, *retry_facts) = runs
    assert facts == [0, task.task_id]
    assert retry_facts[0] == 1
    assert re.fullmatch(r"[0-9a-f-]{36}:1", retry_facts[1])
    assert second - first > 0.9
    await until(lambda: is_empty(app.service_bus_client))


async def test_what_fails_is_dead_lettered_with_its_reason(new_bus):
    app = Boilermaker(None, new_bus())

    @app.task
    async def fails(state):
        raise ValueError("the disk is full")

    @app.task(policy=RetryPolicy(max_tries=1))
    async def gives_up(state):
        raise RetryException("still no answer")

    @app.task
    async def returns_failure(state):
        return TaskFailureResult

    @app.task(should_dead_letter=False)
    async def is_completed(state):
        raise ValueError

    bus = app.service_bus_client
    for task in (fails, gives_up, returns_failure, is_completed):
        await task.delay()
    await app.send_task("unheard_of")
    await bus.send([boilermaker.Outgoing("{", "not a task", bus.queue_name)])
    await work_off(app)
    dead = {m.dead_letter_reason: m.dead_letter_error_description for m in await bus.peek(dead_letter=True)}
    assert await is_empty(bus)
    assert set(dead) == {"TaskFailed", "RetriesExhausted", "UnregisteredFunction", "InvalidTaskFormat"}
    assert "still no answer" in dead["RetriesExhausted"]
    assert "'unheard_of'" in dead["UnregisteredFunction"]
    assert len(await bus.peek(dead_letter=True)) == 5


async def test_a_scheduled_task_can_be_taken_back_once(new_bus):
    app = Boilermaker(None, new_bus())

    @app.task
    async def work(state): ...

    task = await app.apply_async(work, delay=3600)
    await app.service_bus_client.cancel(task.sequence_number)
    assert await is_empty(app.service_bus_client)
    with pytest.raises(MessageNotFound, match=app.service_bus_client.queue_name):
        await app.service_bus_client.cancel(task.sequence_number)


async def test_many_tasks_are_sent_in_order_in_full_batches(new_bus):
    app = Boilermaker(None, new_bus())

    @app.task
    async def work(state, number, filling): ...

    tasks = [work.si(number, "x" * 4000) for number in range(300)]
    assert await app.publish_many(tasks) == tasks
    peeked = await app.service_bus_client.peek(1000)
    assert sum(len(message.body) for message in peeked) > 4 * boilermaker.DEFAULT_MAX_MESSAGE_BYTES
    assert [message.message_id for message in peeked] == [task.task_id for task in tasks]
    assert sorted(peeked, key=lambda message: message.sequence_number) == peeked


async def test_what_is_too_large_is_refused_before_anything_is_sent(new_bus):
    app = Boilermaker(None, new_bus())

    @app.task
    async def work(state, data): ...

    with pytest.raises(MessageTooLarge, match="limit is 262144"):
        await app.publish_many([work.si("small"), work.si("x" * 262_144)])
    with pytest.raises(MessageTooLarge, match="with its callbacks"):
        await app.publish_task(work.si("x" * 140_000) | work.si("y" * 140_000))
    assert await is_empty(app.service_bus_client)
    await work.delay("x" * 261_000)
    assert len(await app.service_bus_client.peek()) == 1


async def test_a_message_id_is_taken_once(new_bus):
    app = Boilermaker(None, new_bus())
    ran = []

    @app.task
    async def work(state):
        ran.append(current_task().task_id)

    task = await work.delay()
    await app.publish_task(task)
    other = await app.publish_task(task.copy())
    await work_off(app)
    assert ran == [task.task_id, other.task_id]


async def test_a_task_of_another_queue_sends_its_callbacks_home(new_bus):
    home, away = Boilermaker("home", new_bus()), Boilermaker("away", new_bus())
    ran = []

    @away.task
    async def resize(state, width):
        ran.append((state, current_task().queue, width))
        return width // 2

    @home.task
    async def resized(state, width):
        ran.append((state, current_task().queue, width))

    queues = home.service_bus_client.queue_name, away.service_bus_client.queue_name
    await home.send_task("resize", 800, queue=queues[1], on_success=resized.s())
    async with working(home), working(away):
        await until(lambda: len(ran) == 2)
    assert ran == [("away", queues[1], 800), ("home", queues[0], 400)]


async def test_what_is_acknowledged_early_is_gone_while_it_runs(new_bus):
    app = Boilermaker(None, new_bus())
    seen = []

    @app.task(acks_late=False)
    async def work(state):
        seen.append(await app.service_bus_client.peek())

    @app.task
    async def after(state):
        seen.append("after")

    await app.publish_task(work.si() | after)
    await work_off(app)
    assert seen == [[], "after"]


async def test_what_follows_a_task_out_of_the_dead_letter_queue_goes_to_the_queue_itself(new_bus):
    bus = new_bus()
    app = Boilermaker([], bus)
    app_of_dead_letters = Boilermaker([], new_bus(f"{bus.queue_name}{boilermaker.DEAD_LETTER_SUFFIX}"))

    async def fixed(state):
        return "fixed"

    async def note(state, result):
        state.append(result)

    app.register_async(note)
    app_of_dead_letters.register_many_async([fixed, note])
    await app_of_dead_letters.publish_task(Task.si(fixed) | Task.s(note))  # a worker that does not know it yet
    await work_off(app)
    assert len(await app.service_bus_client.peek(dead_letter=True)) == 1
    await work_off(app_of_dead_letters)
    await work_off(app)
    assert app.state == ["fixed"]
    assert await ids_of(app.service_bus_client, dead_letter=True) == []


async def test_a_burst_ends_without_what_is_due_later_or_held_elsewhere(new_bus):
    bus = new_bus()
    app, other = Boilermaker(None, bus), Boilermaker(None, new_bus(bus.queue_name))
    held = asyncio.Event()

    @other.task
    async def work(state, name):
        held.set()
        await asyncio.sleep(PATIENCE)

    @app.task(name="work")
    async def here(state, name):
        raise AssertionError(name)

    await app.apply_async(here, "later", delay=3600)
    await here.delay("elsewhere")
    async with working(other):
        await held.wait()
        await work_off(app)
    assert len(await bus.peek()) == 2


async def test_a_worker_that_stops_gives_its_messages_back(new_bus):
    bus = new_bus()
    app = Boilermaker(None, bus)
    started = asyncio.Event()

    @app.task
    async def endless(state):
        started.set()
        await asyncio.sleep(PATIENCE)

    await endless.delay()
    async with working(app):
        await started.wait()
    [message] = await bus.peek()
    assert message.delivery_count == 1
    started.clear()
    async with working(app):
        await asyncio.wait_for(started.wait(), PATIENCE)


async def test_an_id_that_was_given_is_enqueued_once(new_bus):
    bus = new_bus()
    first, later = (letter(name, queue=bus.queue_name)._replace(given_id=True) for name in ("first", "later"))
    later = later._replace(due=time.time() + 60)
    for _ in range(2):
        await bus.send([first, later, later, letter("other", queue=bus.queue_name), first])
    assert Counter(await ids_of(bus)) == {"first": 1, "later": 1, "other": 1}
    assert bus.id_window == 600


async def test_ticks_are_published_once_and_come_when_no_worker_is_left(new_bus):
    bus = new_bus()
    workers = [periodic(bus, second=Every(SECOND)), periodic(new_bus(bus.queue_name), second=Every(SECOND))]
    async with working(workers[0]), working(workers[1]):
        await until(lambda: sum(len(app.state) for app in workers) > 2)
    ran = sorted(workers[0].state + workers[1].state)
    ahead = await ids_of(bus)
    assert len(ahead) > 90
    first = datetime.datetime.fromisoformat(ran[0].removeprefix("cron:second:"))
    assert sorted(ran + ahead) == ticks_of("second", *[first + n * SECOND for n in range(len(ran + ahead))])
    async with receiving(bus) as receiver:  # as whoever wakes workers sees it
        [delivery] = await receiver.receive(1, PATIENCE)
    assert delivery.message_id in ahead
    assert float_of(delivery.message_id) <= time.time()


# ======================================================================================================================
# Azure bus: over the wire, by the real SDK
# ======================================================================================================================


async def test_only_what_is_scheduled_has_a_sequence_number(azure_bus):
    app = Boilermaker(None, azure_bus())

    @app.task
    async def work(state): ...

    [now, both] = await app.publish_many([work.si(), work.si()])
    [first, second] = await app.publish_many([work.si(), work.si()], delay=60)
    assert (now.sequence_number, both.sequence_number) == (None, None)
    assert 0 < first.sequence_number < second.sequence_number


async def test_application_properties_arrive_as_text(azure_bus):
    bus = azure_bus()
    properties = {"traceparent": "00-1-2-01", "é": "ü"}
    await bus.send([boilermaker.Outgoing("{}", "a", bus.queue_name, None, properties)])
    [peeked] = await bus.peek()
    receiver = await bus.open_receiver(lambda delivery: None, 60)
    [received] = await receiver.receive(1, PATIENCE)
    await receiver.close()
    assert peeked.application_properties == received.application_properties == properties
    assert (received.body, received.message_id, received.delivery_count) == (b"{}", "a", 0)


async def test_messages_for_different_times_go_together_where_nobody_wants_their_numbers(azure_bus, caplog):
    bus, now = azure_bus(), int(time.time())
    messages = [letter(str(n), queue=bus.queue_name, due=now + n)._replace(numbered=False) for n in range(-50, 200)]
    requests = []
    send_some = boilermaker.AzureSender._send_some

    async def counted(sender, waiting):
        numbers = await send_some(sender, waiting)
        requests.append(len(numbers))
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boilermaker.AzureSender, "_send_some", counted)
        assert await bus.send(messages) == [None] * 250
        assert requests == [250]
        [number] = await bus.send([messages[-1]._replace(message_id="numbered", numbered=True)])
    assert number > 0
    peeked = {each.message_id: each.scheduled_enqueue_time_utc.timestamp() for each in await bus.peek(1000)}
    assert peeked == {str(n): now + n for n in range(-50, 200)} | {"numbered": now + 199}
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        assert await settle(receiver, delivery) is None
    assert int(delivery.message_id) <= time.time() - now


async def test_without_duplicate_detection_a_schedule_is_an_error_at_the_workers_start(emulator, impatient, caplog):
    queue = fresh_queue()
    bus = AzureServiceBus.from_connection_string(emulator.connection_string, queue, duplicate_detection=0)
    app = periodic(bus, hourly=Every(HOUR))
    with pytest.raises(ConfigurationError, match=r"Make the queue with it, or run\(schedules=False\)"):
        await app.run()
    assert "cannot start" in caplog.text
    await app.send_task("tick", "x")
    await work_off(app)
    async with working(app, schedules=False):
        await app.send_task("tick", "x")
        await until(lambda: len(app.state) == 2)
    await app.close()


@pytest.mark.parametrize("size", [417, 423, 464])
async def test_a_batch_of_the_sdk_that_is_full_to_the_last_bytes_is_not_too_large_for_the_service(azure_bus, size):
    bus = azure_bus()
    messages = [boilermaker.Outgoing("x" * size, boilermaker.new_task_id(), bus.queue_name) for _ in range(600)]
    await bus.send(messages)
    assert [message.message_id for message in await bus.peek(1000)] == [message.message_id for message in messages]


def unaware_of_the_limit(bus):
    """A bus that sends what the service will refuse as too large."""
    bus.max_message_bytes = 10**6
    return bus


async def test_a_message_that_the_service_finds_too_large_does_not_take_its_neighbours_with_it(azure_bus):
    bus = unaware_of_the_limit(azure_bus())
    sizes = [10, 300_000, 10, 10, 300_000, 10]
    sending = [bus.send([letter("x" * size, message_id=str(i), queue=bus.queue_name)]) for i, size in enumerate(sizes)]
    results = await asyncio.gather(*sending, return_exceptions=True)
    assert [isinstance(result, MessageTooLarge) for result in results] == [size > 10 for size in sizes]
    assert await ids_of(bus) == ["0", "2", "3", "5"]


@pytest.mark.parametrize("acks_late", [True, False])
async def test_a_follow_up_that_the_service_finds_too_large_dead_letters_its_parent_once(azure_bus, acks_late, caplog):
    app = Boilermaker([], unaware_of_the_limit(azure_bus()))

    @app.task(acks_late=acks_late)
    async def parent(state):
        state.append("ran")
        return "x" * 300_000

    @app.task
    async def child(state, text):
        state.append("child")

    await app.publish_task(parent.si() | child.s())
    await work_off(app)
    assert app.state == ["ran"]
    assert await ids_of(app.service_bus_client) == []
    dead = [message.dead_letter_reason for message in await app.service_bus_client.peek(dead_letter=True)]
    assert dead == ["FollowUpRejected"] * acks_late
    assert [text for text in caplog.messages if "refused a message as too large" in text] == caplog.messages[:1]


async def test_many_publishers_share_one_link(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())

    @app.task
    async def work(state, number): ...

    await asyncio.gather(*[app.apply_async(work, number, delay=number % 2 * 3600) for number in range(200)])
    assert emulator.control("stats")["connections"] == 1
    assert len({message.message_id for message in await app.service_bus_client.peek(1000)}) == 200


async def test_a_thousand_tasks_leave_no_more_behind_than_a_hundred(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    done = []

    @app.task
    async def work(state):
        done.append(1)

    def held():
        stats = emulator.control("stats")
        return len(asyncio.all_tasks()), stats["connections"], stats["links"], stats["locked"]

    async def idle():
        """What is held when nothing is under way: the least of some looks, since the SDK has tasks that come and go."""
        return min([held() for _ in range(20) if not await asyncio.sleep(0.02)]), objects()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    async with working(app, concurrency=50):
        await app.publish_many([work.si() for _ in range(100)])
        await until(lambda: len(done) == 100)
        after_100, objects_after_100 = await idle()
        await app.publish_many([work.si() for _ in range(900)])
        await until(lambda: len(done) == 1000)
        after_1000, objects_after_1000 = await idle()
    assert after_1000 <= after_100
    assert objects_after_1000 - objects_after_100 < 450, "half an object for each task more"


async def test_in_quiet_operation_nothing_is_logged_as_a_warning(azure_bus, caplog):
    caplog.set_level(logging.WARNING)
    app = Boilermaker(None, azure_bus())

    @app.task
    async def work(state): ...

    await app.publish_many([work.si() | work.si() for _ in range(50)])
    await work_off(app)
    assert caplog.messages == []


async def test_the_environment_says_where_the_queue_is(emulator, azure_bus, monkeypatch):
    bus = azure_bus()
    monkeypatch.setenv("SERVICEBUS_CONNECTION_STRING", emulator.connection_string)
    monkeypatch.setenv("SERVICE_BUS_QUEUE_NAME", bus.queue_name)
    ran = []
    async with Boilermaker(None, AzureServiceBus.from_config(Config())) as app:

        @app.task
        async def work(state):
            ran.append(current_task().queue)

        await work.delay()
        assert len(await bus.peek()) == 1
        await work_off(app)
    assert ran == [bus.queue_name]


async def test_a_bus_that_was_closed_can_be_used_again(azure_bus):
    app = Boilermaker(None, azure_bus())

    @app.task
    async def work(state): ...

    for count in (1, 2):
        await work.delay()
        assert len(await app.service_bus_client.peek()) == count
        await app.close()


async def test_event_loops_in_several_threads_publish_by_one_bus(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())

    @app.task
    async def work(state, number): ...

    async def publish(name):
        async with app:
            for number in range(10):
                await work.delay(f"{name}{number}")
                await asyncio.sleep(0.01)
            assert emulator.control("stats")["connections"] <= 3

    await asyncio.gather(*[asyncio.to_thread(asyncio.run, publish(name)) for name in "abc"])
    arguments = [json.loads(message.body)["payload"]["args"][0] for message in await app.service_bus_client.peek()]
    assert sorted(arguments) == sorted(f"{name}{number}" for name in "abc" for number in range(10))


class SynchronousCredential:
    """What azure-identity's credentials look like from the outside."""

    closed = False

    def get_token(self, *scopes, **options):
        return scopes, options, threading.current_thread()

    def close(self):
        self.closed = True


async def test_a_synchronous_credential_is_asked_in_a_thread():
    credential = SynchronousCredential()
    async with boilermaker.ThreadedCredential(credential) as threaded:
        scopes, options, thread = await threaded.get_token("scope", tenant_id="t")
    assert (scopes, options) == (("scope",), {"tenant_id": "t"})
    assert thread is not threading.current_thread()
    assert credential.closed


# ======================================================================================================================
# Azure bus: errors at the start
# ======================================================================================================================


@pytest.fixture
def closed_port():
    """A port that nobody listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield unused.getsockname()[1]


def wrong_key(connection_string):
    return connection_string.replace("SharedAccessKey=", "SharedAccessKey=AAAA")


@pytest.mark.parametrize(
    "asks",
    [
        lambda app: app.run(),
        lambda app: app.send_task("work"),
        lambda app: app.service_bus_client.peek(),
    ],
    ids=["a worker", "a publisher", "a look"],
)
@pytest.mark.parametrize(
    ("change", "queue", "error", "text"),
    [
        (wrong_key, QUEUES[0], ConfigurationError, "Access to queue 'queue0' of 127.0.0.1 was refused: check the key"),
        (str, "no-such-queue", ConfigurationError, "There is no queue 'no-such-queue' of 127.0.0.1: create it"),
        (None, "tasks", ServiceBusUnavailable, "queue 'tasks' of 127.0.0.1 cannot be reached: check the namespace"),
    ],
    ids=["a wrong key", "a missing queue", "an unreachable host"],
)
async def test_a_wrong_setting_is_an_error_that_says_what_to_do(
    emulator, closed_port, monkeypatch, asks, change, queue, error, text
):
    monkeypatch.setattr(boilermaker, "SEND_PAUSES", (0.1,))
    unreachable = f"Endpoint=sb://127.0.0.1:{closed_port};SharedAccessKeyName=n;SharedAccessKey=k;"
    text_of_connection = change(emulator.connection_string) if change else f"{unreachable}UseDevelopmentEmulator=true;"
    async with Boilermaker(None, AzureServiceBus.from_connection_string(text_of_connection, queue)) as app:
        started = time.monotonic()
        with pytest.raises((error, BoilermakerAppException), match=text) as caught:
            await asks(app)
        assert time.monotonic() - started < 20
    publishes = caught.type is BoilermakerAppException
    assert [type(one) for one in caught.value.errors] == [error] if publishes else caught.type is error


async def test_a_worker_on_a_queue_with_sessions_is_an_error_at_once_that_says_so(azure_bus, caplog):
    with pytest.raises(ConfigurationError, match="Tasks have no sessions: use a queue without"):
        await Boilermaker(None, azure_bus(QUEUE_WITH_SESSIONS)).run()
    assert "reconnecting" not in caplog.text


@contextlib.asynccontextmanager
async def mute_port():
    """A port that accepts connections and says nothing; and how many it has accepted."""
    accepted = []

    async def accept(reader, writer):
        accepted.append(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], accepted


async def test_a_port_that_says_nothing_is_named_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(boilermaker, "ATTEMPT_TIMEOUT", 0.5)
    monkeypatch.setattr(boilermaker, "SEND_PATIENCE", 0.7)
    async with mute_port() as (port, accepted):
        address = f"Endpoint=sb://127.0.0.1:{port};SharedAccessKeyName=n;SharedAccessKey=k;UseDevelopmentEmulator=true;"
        async with Boilermaker(None, AzureServiceBus.from_connection_string(address, "tasks")) as app:
            publishing = [app.send_task("work", number) for number in range(20)]
            errors = await asyncio.gather(*publishing, return_exceptions=True)
            assert {type(error) for error in errors} == {BoilermakerAppException}
            assert all("did not answer in time" in str(error) and "5671" in str(error) for error in errors)
            assert len(accepted) <= 2, "all that waits is answered together"
            with pytest.raises(ServiceBusUnavailable, match="5671"):
                await app.run()


# ======================================================================================================================
# Azure bus: faults
# ======================================================================================================================


def chains(app, run_for=0.01):
    """A task `work` and its successor `step`; how often each ran, by the task's argument."""
    runs, steps = Counter(), Counter()

    @app.task
    async def work(state, number):
        await asyncio.sleep(run_for)
        runs[number] += 1
        return number

    @app.task
    async def step(state, number):
        steps[number] += 1

    return runs, steps, [work.si(number) | step.s() for number in range(100)]


async def test_a_worker_that_is_cancelled_while_it_connects_ends(azure_bus):
    for turn in range(40):
        app = Boilermaker(None, azure_bus())
        worker = asyncio.create_task(app.run())
        await asyncio.sleep(0.02 + turn * 0.001)
        worker.cancel()
        done, _ = await asyncio.wait([worker], timeout=PATIENCE)
        assert done
        await app.close()


async def test_a_worker_that_is_cancelled_while_it_stops_leaves_nothing_locked(azure_bus):
    bus = azure_bus()
    app, publisher = Boilermaker(None, bus), Boilermaker(None, azure_bus(bus.queue_name))

    @app.task
    async def work(state): ...

    publisher.register_async(work)
    await publisher.apply_async(work)
    worker = asyncio.create_task(app.run())
    await until(lambda: is_empty(bus))
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    worker.cancel()
    await publisher.apply_async(work)
    await asyncio.wait([worker])
    await work_off(publisher)
    assert await is_empty(bus)


async def test_a_worker_stops_although_the_service_is_away(monkeypatch):
    monkeypatch.setattr(boilermaker, "STOP_PATIENCE", 0.5)
    with service_bus(queues=["tasks"]) as emulator:
        app = Boilermaker([], AzureServiceBus.from_connection_string(emulator.connection_string, "tasks"))

        @app.task
        async def slow(state):
            state.append("begun")
            await asyncio.sleep(PATIENCE)

        await slow.delay()
        worker = asyncio.create_task(app.run(grace_period=0))
        await until(lambda: app.state == ["begun"])
        emulator.control("refuse 600")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(worker, PATIENCE)
        await app.close()


async def test_an_id_that_is_no_text_is_read_as_text(azure_bus, emulator):
    from azure.servicebus.aio import ServiceBusClient
    from azure.servicebus.amqp import AmqpAnnotatedMessage, AmqpMessageProperties

    app = Boilermaker([], azure_bus())

    @app.task
    async def work(state):
        state.append(current_task().message_id)

    @app.task
    async def then(state):
        state.append("then")

    number = uuid.uuid4()
    queue = app.service_bus_client.queue_name
    body = boilermaker.encode(work.si() | then, queue, queue)
    message = AmqpAnnotatedMessage(data_body=body.encode(), properties=AmqpMessageProperties(message_id=number))
    async with (
        ServiceBusClient.from_connection_string(emulator.connection_string) as client,
        client.get_queue_sender(queue) as sender,
    ):
        await sender.send_messages(message)
    assert [message.message_id for message in await app.service_bus_client.peek()] == [str(number)]
    await work_off(app)
    assert app.state == [str(number), "then"]


async def test_a_close_that_is_cancelled_leaves_no_connection(azure_bus):
    bus = azure_bus()  # that none is left the fixture checks
    await bus.send([letter(queue=bus.queue_name)])
    closing = asyncio.create_task(bus.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])


async def test_cancelling_a_number_that_cannot_be_is_message_not_found(azure_bus):
    with pytest.raises(MessageNotFound):
        await azure_bus().cancel(2**70)


async def test_a_lock_is_renewed_for_as_long_as_its_task_runs(quick_azure_bus):
    app = Boilermaker(None, quick_azure_bus())
    runs = []

    @app.task
    async def slow(state):
        runs.append(current_task().sequence_number)
        await asyncio.sleep(5)

    await slow.delay()
    await work_off(app)
    assert len(runs) == 1
    assert await is_empty(app.service_bus_client)


async def test_a_worker_whose_clock_is_behind_by_more_than_a_lock_works_off_a_backlog(
    quick_azure_bus, caplog, monkeypatch
):
    """Its messages seem old, whatever the clock: they say nothing about it."""
    monkeypatch.setattr(boilermaker, "SHORTEST_LOCK", 1)
    app = Boilermaker([], quick_azure_bus())

    @app.task
    async def slow(state, number):
        state.append(f"{number} begins")
        await asyncio.sleep(5)
        state.append(f"{number} ends")

    await app.publish_many([slow.si(number) for number in range(3)])
    await asyncio.sleep(4)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3)
    monkeypatch.setattr(
        "azure.servicebus._common.message.utc_now", lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    )
    await work_off(app)
    assert sorted(app.state) == sorted(f"{number} {what}" for number in range(3) for what in ("begins", "ends"))
    assert "Lock lost" not in caplog.text
    assert await is_empty(app.service_bus_client)


async def test_a_clock_that_is_set_while_a_task_runs_costs_no_lock(quick_azure_bus, caplog, monkeypatch):
    app = Boilermaker([], quick_azure_bus())
    now, step = time.time, 0.0

    @app.task
    async def slow(state):
        nonlocal step
        step = 3600
        await asyncio.sleep(3)
        state.append("ends")

    await slow.delay()
    monkeypatch.setattr(time, "time", lambda: now() + step)
    await work_off(app)
    assert app.state == ["ends"]
    assert "Lock lost" not in caplog.text
    assert await is_empty(app.service_bus_client)


async def test_a_lock_that_the_event_loop_was_too_busy_to_renew_is_lost_by_the_service_s_word(azure_bus, caplog):
    """Not by the clock alone: the service may have kept it."""
    bus = azure_bus()
    await bus.send([letter("a", queue=bus.queue_name)])
    lost = []
    async with receiving(bus, lost.append) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        lock = receiver._locks[delivery]
        lock.renew_at = lock.lost_at = time.monotonic() - 1
        await until(lambda: receiver._locks[delivery] is not lock)
        assert lost == []
        assert await settle(receiver, delivery) is None


@pytest.mark.parametrize("seconds", [60, -60], ids=["ahead", "behind"])
async def test_a_worker_whose_clock_is_wrong_keeps_its_locks_and_says_so(quick_azure_bus, caplog, monkeypatch, seconds):
    monkeypatch.setattr(boilermaker, "SHORTEST_LOCK", 1)
    app = Boilermaker([], quick_azure_bus())

    @app.task
    async def slow(state):
        await asyncio.sleep(3)
        state.append("slow")

    @app.task
    async def step(state):
        state.append("step")

    await app.publish_task(slow.si() | step.si())
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    monkeypatch.setattr(
        "azure.servicebus._common.message.utc_now", lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    )
    await work_off(app)
    assert app.state == ["slow", "step"]
    assert await is_empty(app.service_bus_client)
    assert sum("set the clock" in message for message in caplog.messages) == 1


async def test_a_task_whose_lock_is_taken_away_is_cancelled_and_runs_again(quick_azure_bus, quick_emulator, caplog):
    bus = quick_azure_bus()
    app = Boilermaker(None, bus)
    events = []

    @app.task
    async def work(state):
        number = current_task().sequence_number
        events.append("begin")
        if len(events) > 1:
            return number
        try:
            quick_emulator.control(f"steal {number}")
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    @app.task
    async def step(state, number):
        events.append("step")

    await app.publish_task(work.si() | step.s())
    async with working(app, concurrency=1):  # so that the message waits until the first run has been cancelled
        await until(lambda: "step" in events)
    assert events == ["begin", "cancelled", "begin", "step"]
    assert "[work] Lock lost, cancelled" in caplog.text
    await until(lambda: is_empty(bus))
    assert await bus.peek(dead_letter=True) == []


async def test_what_follows_is_not_published_when_the_lock_has_run_out(azure_bus):
    bus = azure_bus()
    await bus.send([letter("a", queue=bus.queue_name)])
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        delivery.locked_until = time.time() - 1
        error = await settle(receiver, delivery, messages=[letter("b", queue=bus.queue_name)])
        assert isinstance(error, MessageLockLost)
        assert await ids_of(bus) == ["a"]


async def test_a_service_far_away_is_given_the_time_to_answer(azure_bus, emulator, monkeypatch):
    """A receive that gave up before the answer could come would find nothing, again and again."""
    from azure.servicebus.aio import ServiceBusReceiver

    receive_messages, counts = ServiceBusReceiver.receive_messages, []

    async def counted(receiver, *args, **options):
        messages = await receive_messages(receiver, *args, **options)
        counts.append(len(messages))
        return messages

    async with slow_proxy(emulator, 0.05) as connection_string:
        app = Boilermaker(None, AzureServiceBus.from_connection_string(connection_string, azure_bus().queue_name))
        runs, steps, tasks = chains(app)
        await app.publish_many(tasks)
        monkeypatch.setattr(ServiceBusReceiver, "receive_messages", counted)
        async with working(app, concurrency=20):
            await until(lambda: len(steps) == 100)
        await app.close()
    assert set(runs.values()) == {1}
    assert counts.count(0) < len(counts) / 4


@contextlib.asynccontextmanager
async def slow_proxy(emulator, delay, **options):
    """The emulator's connection string by way of a proxy that hands on everything, either way, that much later."""

    emulators_port = re.search(r":(\d+)", emulator.connection_string)[1]
    serving = []

    async def hand_on(reader, writer):
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue()

        async def read():
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(65536):
                    loop.call_later(delay, chunks.put_nowait, data)
            loop.call_later(delay, chunks.put_nowait, b"")

        reading = asyncio.create_task(read())
        while data := await chunks.get():
            writer.write(data)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await reading

    async def serve(reader, writer):
        serving.append(asyncio.current_task())
        reader_there, writer_there = await asyncio.open_connection("127.0.0.1", emulators_port)
        await asyncio.gather(hand_on(reader, writer_there), hand_on(reader_there, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, **options) as server:
        port = server.sockets[0].getsockname()[1]
        yield emulator.connection_string.replace(f":{emulators_port}", f":{port}")
        await asyncio.gather(*serving)


async def test_connections_dropped_again_and_again_lose_nothing(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app, run_for=0.1)
    await app.publish_many(tasks)
    async with working(app, concurrency=10):
        for count in (5, 25, 45, 65):
            await until(lambda count=count: len(steps) + len(runs) >= 2 * count)
            emulator.control("drop")
        await until(lambda: len(steps) == 100)
        await until(lambda: is_empty(app.service_bus_client))
    assert len(runs) == 100
    assert runs.total() < 200, "only what was in flight may run again"


async def test_the_service_may_be_away_for_a_while(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app)
    async with working(app):
        await app.publish_many(tasks[:20])
        await until(lambda: runs)
        emulator.control("refuse 2")
        emulator.control("drop")
        await asyncio.sleep(1)
        publishing = asyncio.create_task(app.publish_many(tasks[20:], publish_attempts=10))
        await until(lambda: len(steps) == 100)
        await publishing


async def test_a_worker_may_start_while_the_service_is_away_for_a_moment(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    runs, _, [task, *_] = chains(app)
    await app.publish_task(task)
    await app.close()
    emulator.control("refuse 0.5")
    await work_off(app)
    assert runs == {0: 1}


async def test_a_link_that_is_worn_out_while_the_service_is_away_is_replaced_with_pauses(
    azure_bus, emulator, caplog, monkeypatch
):
    app = Boilermaker(None, azure_bus())
    runs, _, [first, second, *_] = chains(app)
    await app.publish_task(first)
    async with working(app):
        await until(lambda: runs[0] == 1)
        monkeypatch.setattr(boilermaker, "MAX_REQUESTS", 0)
        emulator.control("refuse 1")
        emulator.control("drop")
        await until(lambda: "was lost, reconnecting" in caplog.text)
        monkeypatch.setattr(boilermaker, "MAX_REQUESTS", 5_000)
        await app.publish_task(second, publish_attempts=10)
        await until(lambda: runs[1] == 1)
    assert caplog.text.count("was lost, reconnecting") < 20


async def test_links_detached_while_idle_are_opened_again(azure_bus, emulator, caplog):
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app)
    async with working(app):
        for task in tasks[:3]:
            await app.publish_task(task)
            await until(lambda task=task: steps[task.args[0]] == 1)
            emulator.control("detach")
    assert runs == {0: 1, 1: 1, 2: 1}
    assert "was lost, reconnecting" in caplog.text


async def test_a_publisher_whose_token_has_run_out_while_it_was_idle_sends_at_the_next_call(
    azure_bus, emulator, monkeypatch
):
    monkeypatch.setattr(boilermaker, "FRESH_LINK", 0)
    app = Boilermaker(None, azure_bus())
    _, _, [first, second, third, *_] = chains(app)
    await app.publish_task(first)
    emulator.control("expire")
    await app.publish_task(second)
    emulator.control("expire")
    await app.publish_task(third, delay=3600)
    assert len(await app.service_bus_client.peek()) == 3


async def test_a_worker_whose_token_has_run_out_goes_on(azure_bus, emulator, monkeypatch):
    monkeypatch.setattr(boilermaker, "FRESH_LINK", 0)
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app)
    async with working(app):
        for task in tasks[:3]:
            await app.publish_task(task)
            await until(lambda task=task: steps[task.args[0]] == 1)
            emulator.control("expire")
    assert runs == {0: 1, 1: 1, 2: 1}


async def test_a_connection_that_stays_up_and_passes_nothing_on_is_found_by_an_idle_worker(
    azure_bus, emulator, caplog, monkeypatch
):
    monkeypatch.setattr(boilermaker, "SILENCE", 0.5)
    monkeypatch.setattr(boilermaker, "ATTEMPT_TIMEOUT", 1)
    app, publisher = Boilermaker([], azure_bus()), Boilermaker(None, azure_bus(QUEUES[0]))
    queue = app.service_bus_client.queue_name

    @app.task
    async def work(state, number):
        state.append(number)

    async with working(app):
        await work.delay(1)
        await until(lambda: app.state == [1])
        emulator.control("freeze")
        await publisher.send_task("work", 2, queue=queue)
        await until(lambda: app.state == [1, 2])
    assert "did not answer in time" in caplog.text


async def test_a_publisher_finds_that_its_connection_passes_nothing_on(azure_bus, emulator, monkeypatch):
    monkeypatch.setattr(boilermaker, "ATTEMPT_TIMEOUT", 1)
    app = Boilermaker(None, azure_bus())
    _, _, [first, second, *_] = chains(app)
    await app.publish_task(first)
    emulator.control("freeze")
    await app.publish_task(second)
    assert await ids_of(app.service_bus_client) == [first.task_id, second.task_id]


async def test_a_quiet_queue_is_asked_for_a_word_only_now_and_then(azure_bus, monkeypatch):
    from azure.servicebus.aio import ServiceBusReceiver

    monkeypatch.setattr(boilermaker, "SILENCE", 0.5)
    peek_messages, times = ServiceBusReceiver.peek_messages, []

    async def timed(receiver, *args, **options):
        times.append(time.monotonic())
        return await peek_messages(receiver, *args, **options)

    app = Boilermaker(None, azure_bus())
    app.register_async(take_anything)
    monkeypatch.setattr(ServiceBusReceiver, "peek_messages", timed)
    async with working(app):
        await until(lambda: len(times) == 4)
    assert min(later - earlier for earlier, later in itertools.pairwise(times)) > 0.4


async def test_locks_that_go_with_their_connection_cost_no_message(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app, run_for=0.1)
    await app.publish_many(tasks[:40])
    emulator.control("unlock 1")
    try:
        async with working(app, concurrency=10):
            for count in (5, 15, 25):
                await until(lambda count=count: len(steps) + len(runs) >= 2 * count)
                emulator.control("drop")
            await until(lambda: len(steps) == 40)
            await until(lambda: is_empty(app.service_bus_client))
    finally:
        emulator.control("unlock 0")
    assert len(runs) == 40


async def test_a_request_that_is_refused_for_good_fails_alone_and_at_once(azure_bus, emulator, caplog):
    caplog.set_level(logging.INFO, "boilermaker.app")
    bus = azure_bus()
    with pytest.raises(boilermaker.RequestRefused, match=r"'with-sessions'.*SessionId was not set"):
        await bus.send([letter(queue=QUEUE_WITH_SESSIONS)])
    with pytest.raises(boilermaker.RequestRefused, match="message_id"):
        await bus.send([letter(message_id="x" * 129, queue=bus.queue_name)])
    sending = [bus.send([letter(message_id=name, queue=bus.queue_name)]) for name in ("a", "y" * 200, "b")]
    results = await asyncio.gather(*sending, return_exceptions=True)
    assert [type(result) for result in results] == [list, boilermaker.RequestRefused, list]
    assert await ids_of(bus) == ["a", "b"]
    assert emulator.control("stats")["connections"] == 2, "one for each queue"
    assert caplog.messages == []


async def test_nothing_is_dead_lettered_out_of_a_dead_letter_queue_and_the_link_stays(azure_bus, caplog):
    bus = azure_bus()
    await bus.send([letter(name, queue=bus.queue_name) for name in "ab"])
    async with receiving(bus) as receiver:
        for delivery in await receiver.receive(1, PATIENCE) + await receiver.receive(1, PATIENCE):
            assert await settle(receiver, delivery, Do.DEAD_LETTER, reason="R") is None
    async with receiving(azure_bus(f"{bus.queue_name}{boilermaker.DEAD_LETTER_SUFFIX}")) as receiver:
        [first], [second] = await receiver.receive(1, PATIENCE), await receiver.receive(1, PATIENCE)
        link = receiver._link
        refused = await settle(receiver, first, Do.DEAD_LETTER, reason="again")
        assert isinstance(refused, boilermaker.RequestRefused)
        assert await settle(receiver, second) is None
        assert receiver._link is link
        assert link.works
    assert "reconnecting" not in caplog.text
    assert [message.dead_letter_reason for message in await bus.peek(dead_letter=True)] == ["R"]


async def test_follow_ups_are_sent_again_to_a_server_that_is_busy(azure_bus, emulator, caplog):
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app)
    await app.publish_many(tasks)
    emulator.control("busy 3")
    async with working(app, concurrency=20):
        await until(lambda: len(steps) == 100)
        await until(lambda: is_empty(app.service_bus_client))
    assert set(runs.values()) == set(steps.values()) == {1}
    assert caplog.messages == []


async def test_a_publisher_is_told_after_the_last_attempt(azure_bus, emulator, monkeypatch):
    monkeypatch.setattr(boilermaker, "SEND_PAUSES", (0.01,))
    app = Boilermaker(None, azure_bus())
    _, _, [first, second, *_] = chains(app)
    emulator.control("busy 3")
    with pytest.raises(BoilermakerAppException, match="throttled") as caught:
        await app.publish_task(first)
    assert [type(error) for error in caught.value.errors] == [boilermaker.Throttled]
    await app.publish_task(second, publish_attempts=2)
    assert [message.message_id for message in await app.service_bus_client.peek()] == [second.task_id]


async def test_a_settlement_whose_answer_is_lost_costs_no_second_run(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    runs, steps, tasks = chains(app)
    async with working(app, concurrency=1):
        for task in tasks[:3]:
            emulator.control("lose 1")
            await app.publish_task(task)
            await until(lambda task=task: steps[task.args[0]] == 1)
        await until(lambda: is_empty(app.service_bus_client))
    assert runs == steps == {0: 1, 1: 1, 2: 1}


async def test_no_step_is_published_twice_whatever_happens(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    _, _, tasks = chains(app)
    messages = {}

    @app.task
    async def counted(state, number):
        messages.setdefault(number, set()).add(current_task().sequence_number)

    for task in tasks:
        task.on_success = counted.s()
    await app.publish_many(tasks)
    async with working(app, concurrency=20):
        for count, fault in enumerate(["drop", "busy 3", "detach", "lose 2", "drop", "detach"]):
            await until(lambda count=count: len(messages) > 15 * count)
            emulator.control(fault)
        await until(lambda: len(messages) == 100)
        await until(lambda: is_empty(app.service_bus_client))
    assert {len(numbers) for numbers in messages.values()} == {1}


def test_ticks_run_once_each_while_their_workers_come_and_go():
    ended = run_example("tick_runs", "short", "--seconds", "4")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    heading, (name, *numbers) = [re.split(r"  +", line.strip()) for line in ended.stdout.splitlines()]
    figures = dict(zip(heading, map(int, numbers), strict=True))
    assert name == "short"
    assert figures["never ran"] == figures["published twice"] == figures["ended"] == 0
    assert figures["ticks"] > 5
    assert figures["killed"] >= 3


@pytest.mark.parametrize(("fault", "kills"), [("kill", 1), ("kill-local", 1), ("idle", 0)])
def test_random_kills_and_idle_connections_lose_nothing(fault, kills):
    ended = run_example("fault_runs", fault, "--chains", "40", "--seconds", "3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    heading, (name, *numbers) = [re.split(r"  +", line.strip()) for line in ended.stdout.splitlines()]
    figures = dict(zip(heading, map(int, numbers), strict=True))
    assert (name, figures["chains"]) == (fault, 40)
    assert figures["never ran"] == figures["published twice"] == figures["left"] == figures["ended"] == 0
    assert figures["killed"] >= kills


# ======================================================================================================================
# Azure bus: results
# ======================================================================================================================


def calculator(bus, **options):
    """An application with tasks whose results are kept for ten minutes."""
    app = Boilermaker([], bus)

    @app.task(result_ttl=600, **options)
    async def double(state, number):
        state.append(number)
        return 2 * number

    @app.task(result_ttl=600, policy=RetryPolicy(max_tries=2, delay=0))
    async def fail(state, retry=False):
        if retry and current_task().attempts.attempts == 0:
            raise RetryException("once more")
        raise ValueError("of no use")

    return app, double, fail


async def sent_to(bus, work, address, message_id="x"):
    """Publish a task whose outcome is told wherever one likes."""
    task = work.si(1)
    task.outcome_to = address
    await bus.send([letter(encode(task, bus.queue_name, bus.queue_name), message_id=message_id, queue=bus.queue_name)])


async def test_a_result_is_awaited_as_often_as_one_likes_by_its_handle_and_by_its_id(azure_bus):
    app, double, _ = calculator(azure_bus())
    task = await double.delay(21)
    with pytest.raises(TimeoutError):
        await task.result(0)
    with pytest.raises(TimeoutError, match=r"no outcome after 0.01 s"):
        await task.result(0.01)
    async with working(app):
        assert await asyncio.gather(task.result(PATIENCE), app.result(task.task_id, None)) == [42, 42]
    assert [await task.result(0), await app.result(task.task_id, 0)] == [42, 42]
    assert app.state == [21]
    assert await is_empty(app.service_bus_client)


@pytest.mark.parametrize("value", [None, 0, "", [], {"é": [1.5, None, True]}, "x" * 200_000])
async def test_every_value_of_json_is_a_result(azure_bus, value):
    app = Boilermaker(None, azure_bus())

    @app.task(result_ttl=60)
    async def give(state):
        return value

    async with working(app):
        assert await (await give.delay()).result(PATIENCE) == value


async def test_a_workflow_s_last_step_is_told_to_who_awaits_its_head(azure_bus):
    app, double, _ = calculator(azure_bus())
    workflow = await (double.si(1) | double.s() | double.s()).publish()
    async with working(app):
        assert await app.result(workflow.task_id, PATIENCE) == 8
    assert app.state == [1, 2, 4]


async def test_a_group_is_awaited_on_azure_too(azure_bus):
    app, double, _ = calculator(azure_bus())

    @app.task
    async def total(state, numbers):
        return sum(numbers)

    work = await (double.map([1, 2, 3]) | total.s()).publish()
    async with working(app):
        assert await work.result(PATIENCE) == 12


async def test_a_failure_is_told_after_the_last_try_with_all_that_a_callback_gets(azure_bus):
    app, _, fail = calculator(azure_bus())
    task = await fail.delay(retry=True)
    async with working(app):
        with pytest.raises(boilermaker.TaskFailed, match=r"fail .*: ValueError: of no use") as failed:
            await task.result(PATIENCE)
    error = failed.value
    assert (error.task_id, error.function_name, error.error, error.message, error.attempts) == (
        *(task.task_id, "fail", "ValueError", "of no use", 2),
    )
    assert "raise ValueError" in error.__notes__[0]


@pytest.mark.parametrize(
    ("value", "error"),
    [("x" * 300_000, "MessageTooLarge"), ({1, 2}, "InvalidArguments"), (math.nan, "InvalidArguments")],
    ids=["too large", "a set", "NaN"],
)
async def test_a_result_that_cannot_be_told_is_a_failure_and_runs_no_second_time(azure_bus, value, error):
    app = Boilermaker([], azure_bus())

    @app.task(result_ttl=60)
    async def give(state):
        state.append("ran")
        return value

    task = await give.delay()
    async with working(app):
        with pytest.raises(boilermaker.TaskFailed) as failed:
            await task.result(PATIENCE)
    assert failed.value.error == error
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert (dead.dead_letter_reason, app.state) == ("FollowUpRejected", ["ran"])


async def test_what_the_service_finds_too_large_to_be_told_is_a_failure_that_is_told(azure_bus):
    """Its limit is smaller than that of which this side knows."""
    bus = azure_bus()
    bus.max_message_bytes = 1_000_000
    app = Boilermaker([], bus)

    @app.task(result_ttl=60)
    async def give(state):
        state.append("ran")
        return "x" * 300_000

    task = await give.delay()
    async with working(app):
        with pytest.raises(boilermaker.TaskFailed, match="MessageTooLarge"):
            await task.result(PATIENCE)
    assert [dead.dead_letter_reason for dead in await bus.peek(dead_letter=True)] == ["FollowUpRejected"]
    assert app.state == ["ran"]


async def test_a_result_that_has_expired_is_forgotten(azure_bus):
    app, double, _ = calculator(azure_bus())
    task = await double.options(result_ttl=1).delay(1)
    async with working(app):
        assert await task.result(PATIENCE) == 2
        await asyncio.sleep(1.1)
        with pytest.raises(TimeoutError):
            await task.result(0)
    [outcomes] = app.service_bus_client._outcomes.values()
    assert outcomes._outcomes == {}
    assert outcomes._ends == []


async def test_a_task_that_awaits_another_s_result_lets_it_run_in_its_place(azure_bus):
    app, double, _ = calculator(azure_bus())

    @app.task(result_ttl=60)
    async def outer(state, number):
        return 1 + await (await double.delay(number)).result(PATIENCE)

    async with working(app, concurrency=1):
        assert await (await outer.delay(4)).result(PATIENCE) == 9


async def test_many_results_come_each_to_its_own_and_are_deleted(azure_bus, emulator):
    before = stored(emulator)
    app, double, _ = calculator(azure_bus())
    tasks = await app.publish_many([double.si(number) for number in range(300)])
    async with working(app, concurrency=50):
        results = await asyncio.gather(*[task.result(PATIENCE) for task in tasks])
    assert results == [2 * number for number in range(300)]
    await until(lambda: stored(emulator) == before)


def stored(emulator):
    """How many messages there are in all its queues."""
    stats = emulator.control("stats")
    return stats["active"] + stats["locked"]


@pytest.mark.parametrize("fault", ["drop", "detach", "expire", "steal", "lose 2", "mute 1"])
async def test_whatever_happens_to_the_link_of_who_waits_the_result_comes(azure_bus, emulator, fault):
    bus = azure_bus()
    _, double, _ = calculator(bus)
    worker, *_ = calculator(azure_bus(bus.queue_name))
    first, second = await double.delay(1), await double.delay(2)
    waiting = asyncio.gather(first.result(PATIENCE), second.result(PATIENCE))
    await asyncio.sleep(0.05)
    [outcomes] = bus._outcomes.values()
    former = outcomes._link
    emulator.control(f"steal {outcomes.session}" if fault == "steal" else fault)
    async with working(worker):
        assert await waiting == [2, 4]
        for number in range(3, 6):
            assert await (await double.delay(number)).result(PATIENCE) == 2 * number
    emulator.control("mute 0")
    assert outcomes._link is not former or fault in ("lose 2", "mute 1")


async def test_a_session_s_link_that_is_worn_out_is_replaced_without_a_word(azure_bus, monkeypatch, caplog):
    monkeypatch.setattr(boilermaker, "SILENCE", 0.05)
    monkeypatch.setattr(boilermaker, "MAX_REQUESTS", 2)
    bus = azure_bus()
    app, double, _ = calculator(bus)
    task = await double.delay(1)
    [outcomes] = bus._outcomes.values()
    former = outcomes._link
    await until(lambda: outcomes._link is not former)
    async with working(app):
        assert await task.result(PATIENCE) == 2
    assert "was lost" not in caplog.text


async def test_a_connection_that_passes_nothing_on_is_found_by_who_waits(quick_azure_bus, quick_emulator, monkeypatch):
    monkeypatch.setattr(boilermaker, "SILENCE", 0.3)
    monkeypatch.setattr(boilermaker, "ATTEMPT_TIMEOUT", 0.7)
    bus = quick_azure_bus()
    _, double, _ = calculator(bus)
    task = await double.delay(1)
    waiting = asyncio.create_task(task.result(PATIENCE))
    await asyncio.sleep(0.05)
    quick_emulator.control("freeze")
    worker, *_ = calculator(quick_azure_bus(bus.queue_name))
    async with working(worker):
        assert await waiting == 2


async def test_the_session_of_who_waits_is_kept_beyond_its_lock(quick_azure_bus, quick_emulator, caplog):
    app, double, _ = calculator(quick_azure_bus())
    task = await double.delay(1)
    ends = time.monotonic() + 4.5
    while time.monotonic() < ends:
        assert quick_emulator.control("stats")["sessions"] == 1
        await asyncio.sleep(0.1)
    async with working(app):
        assert await task.result(PATIENCE) == 2
    assert "was lost" not in caplog.text


async def test_a_clock_that_is_behind_costs_a_session_once(quick_azure_bus, quick_emulator, caplog, monkeypatch):
    monkeypatch.setattr(boilermaker, "SHORTEST_LOCK", 1)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 60)
    app, double, _ = calculator(quick_azure_bus())
    task = await double.delay(1)
    await until(lambda: "the lock of the session ran out" in caplog.text)
    await until(lambda: quick_emulator.control("stats")["sessions"] == 1)
    await asyncio.sleep(3)
    assert caplog.text.count("was lost") == 1
    monkeypatch.undo()
    async with working(app):
        assert await task.result(PATIENCE) == 2


AZURE_WORKER_THAT_DIES = """
import asyncio, os, signal, sys
from boilermaker import AzureReceiver, AzureServiceBus, Boilermaker

async def dies(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

AzureReceiver._dispose = dies
app = Boilermaker(None, AzureServiceBus.from_connection_string(sys.argv[1], "tasks"))

@app.task(result_ttl=600)
async def double(state, number):
    return 2 * number

asyncio.run(app.run())
"""


async def test_a_worker_that_dies_between_telling_and_settling_tells_twice_and_is_heard_once(
    impatient, start_program, monkeypatch
):
    told, keep = [], boilermaker.AzureOutcomes._keep
    monkeypatch.setattr(
        boilermaker.AzureOutcomes, "_keep", lambda self, reply: (told.append(reply.message_id), keep(self, reply))
    )
    with service_bus(["tasks"], session_queue=["tasks-replies"], lock_duration=2) as emulator:
        bus = AzureServiceBus.from_connection_string(emulator.connection_string, "tasks")
        app, double, _ = calculator(bus)
        task = await double.delay(1)
        dying = start_program(AZURE_WORKER_THAT_DIES, emulator.connection_string)
        assert await task.result(PATIENCE) == 2
        assert await exit_code(dying) == -signal.SIGKILL
        async with working(app):
            await until(lambda: len(told) == 2)
        assert await task.result(0) == 2
        assert told[0] == told[1]  # so that a reply queue that drops duplicates would drop it
        await app.close()


ASKING_PROGRAM = """
import asyncio, sys
from boilermaker import AzureServiceBus, Boilermaker, UsageError

async def main():
    app = Boilermaker(None, AzureServiceBus.from_connection_string(*sys.argv[1:3]))
    try:
        await app.result(sys.argv[3], 1)
    except UsageError as error:
        print(error)
    print(await (await app.send_task("double", 4, result_ttl=60)).result(60))
    # It is not closed: the program ends all the same.

asyncio.run(main())
"""


async def test_another_process_has_a_session_of_its_own_and_cannot_ask_for_what_it_did_not_publish(
    azure_bus, emulator, start_program
):
    app, double, _ = calculator(azure_bus())
    task = await double.delay(3)
    program = start_program(ASKING_PROGRAM, emulator.connection_string, app.service_bus_client.queue_name, task.task_id)
    async with working(app):
        assert await exit_code(program) == 0
        assert await task.result(PATIENCE) == 6
    refusal, result = program[1].read_text().splitlines()
    assert re.search(rf"{task.task_id} was not published here.* only the process and event loop that", refusal)
    assert result == "8"


FORKING_ASKER = """
import asyncio, os, sys
from boilermaker import AzureServiceBus, Boilermaker, UsageError

app = Boilermaker(None, AzureServiceBus.from_connection_string(*sys.argv[1:3]))

async def ask(number):
    return await (await app.send_task("double", number, result_ttl=60)).result(60)

async def parent():
    task = await app.send_task("double", 1, result_ttl=60)
    child = os.fork()
    if not child:
        return task
    assert await task.result(60) == 2
    assert await ask(2) == 4
    assert os.waitpid(child, 0)[1] == 0
    await app.close()

async def in_child(task):
    try:
        await task.result(1)
    except UsageError as error:
        assert "only the process" in str(error)
    assert await ask(3) == 6
    await app.close()

loop = asyncio.new_event_loop()
task = loop.run_until_complete(parent())
if task is not None:
    asyncio.set_event_loop(None)
    import threading
    threading.Thread(target=lambda: (asyncio.run(in_child(task)), os._exit(0))).start()
    threading.Event().wait(60)
    os._exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
async def test_a_forked_child_and_its_parent_each_have_their_own_results(azure_bus, emulator, start_program):
    app, *_ = calculator(azure_bus())
    program = start_program(FORKING_ASKER, emulator.connection_string, app.service_bus_client.queue_name)
    async with working(app):
        assert await exit_code(program) == 0, program[1].read_text()


async def test_every_event_loop_has_its_own_results(azure_bus):
    app, double, _ = calculator(azure_bus())
    here = await double.delay(1)

    async def elsewhere(number):
        with pytest.raises(UsageError, match="only the process and event loop that published"):
            await here.result(PATIENCE)
        with pytest.raises(UsageError, match="was not published here"):
            await app.result(here.task_id, PATIENCE)
        try:
            return await (await double.delay(number)).result(PATIENCE)
        finally:
            await app.service_bus_client.close()

    async with working(app):
        results = asyncio.gather(*[asyncio.to_thread(asyncio.run, elsewhere(number)) for number in (2, 3)])
        assert await results == [4, 6]
        assert await here.result(PATIENCE) == 2


async def test_who_waits_when_the_bus_is_closed_is_told_and_may_ask_again_when_it_is_open_again(azure_bus):
    bus = azure_bus()
    app, double, _ = calculator(bus)
    task = await double.delay(1)
    waiting = [asyncio.create_task(each) for each in (task.result(PATIENCE), app.result(task.task_id, None))]
    await asyncio.sleep(0.05)
    await bus.close()
    for each in waiting:
        with pytest.raises(ServiceBusUnavailable, match="was closed while a result was awaited"):
            await each
    worker, *_ = calculator(azure_bus(bus.queue_name))
    async with working(worker):
        assert await task.result(PATIENCE) == 2
        await bus.close()
        assert await task.result(0) == 2
        assert await (await double.delay(2)).result(PATIENCE) == 4


async def test_a_bus_that_is_closed_while_its_session_is_opened_tells_who_publishes(azure_bus):
    bus = azure_bus()
    _, double, _ = calculator(bus)
    publishing = asyncio.create_task(double.delay(1))
    await until(lambda: bus._outcomes)
    await asyncio.sleep(0)
    await bus.close()
    with pytest.raises(ServiceBusUnavailable, match="was closed"):
        await publishing


@pytest.mark.parametrize(
    ("queue", "text"),
    [("nowhere", "There is no queue 'nowhere'"), (fresh_queue(), "does not require sessions")],
    ids=["no such queue", "a queue without sessions"],
)
async def test_where_results_cannot_be_told_nothing_is_published_and_the_command_is_said(
    emulator, impatient, queue, text
):
    bus = AzureServiceBus.from_connection_string(emulator.connection_string, fresh_queue(), reply_queue_name=queue)
    async with Boilermaker(None, bus) as app:
        command = f"az servicebus queue create --namespace-name 127 .* --name {queue} --enable-session true"
        for task_id in "ab":
            with pytest.raises(ConfigurationError, match=f"Results of {bus.queue_name!r} need .*{command}.*{text}"):
                await app.send_task("work", task_id=task_id, result_ttl=60)
        assert await is_empty(bus)


async def test_a_connection_string_of_the_one_queue_is_an_error_where_a_result_is_asked_for(emulator, impatient):
    queue = fresh_queue()
    bus = AzureServiceBus.from_connection_string(f"{emulator.connection_string}EntityPath={queue}", queue)
    async with Boilermaker(None, bus) as app:
        with pytest.raises(UsageError, match=f"cannot send to queue '{queue}-replies'.*EntityPath"):
            await app.send_task("work", result_ttl=60)


async def test_a_session_that_somebody_else_holds_is_an_error_that_says_so(azure_bus, emulator):
    bus = azure_bus()
    app, double, _ = calculator(bus)
    session = bus.address("x", 60).session
    async with talks_on(emulator, bus.reply_queue) as talks, talks.accept(session):
        with pytest.raises(ServiceBusUnavailable, match=f"Another receiver holds that session of .*{session}"):
            await double.delay(1)
        assert await is_empty(bus)
    task = await double.delay(1)
    async with working(app):
        assert await task.result(PATIENCE) == 2


async def test_the_service_may_be_away_for_a_moment_when_the_first_result_is_asked_for(azure_bus, emulator):
    app, double, _ = calculator(azure_bus())
    emulator.control("refuse 0.3")
    task = await double.delay(1)
    async with working(app):
        assert await task.result(PATIENCE) == 2


async def test_what_cannot_be_asked_for_is_an_error_that_says_why(azure_bus):
    app, *_ = calculator(azure_bus())

    @app.task
    async def plain(state): ...

    _, elsewhere, _ = calculator(azure_bus())
    theirs = await elsewhere.delay(1)
    for task_id in ("never", theirs.task_id, (await plain.delay()).task_id):
        with pytest.raises(UsageError, match=rf"Task {task_id} was not published here with a result_ttl"):
            await app.result(task_id, 1)
    for malformed in (7, None, b"x", ["x"], ""):
        with pytest.raises(UsageError, match="must be that of a published task, a string"):
            await app.result(malformed, 1)
    with pytest.raises(UsageError):
        await theirs.result(-1)
    with pytest.raises(UsageError, match=r"The result of .* is not kept"):
        await (await plain.delay()).result(1)
    with pytest.raises(UsageError, match="only the process and event loop"):
        await app.service_bus_client.outcome(boilermaker.Address("x", 60), 1)  # one of a local bus


async def test_only_so_many_ids_are_remembered_and_a_handle_needs_none(azure_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "PUBLISHED_KEPT", 2)
    app, double, _ = calculator(azure_bus())
    tasks = [await double.delay(number) for number in range(3)]
    async with working(app):
        with pytest.raises(UsageError, match="or too long ago"):
            await app.result(tasks[0].task_id, PATIENCE)
        assert [await task.result(PATIENCE) for task in tasks] == [0, 2, 4]
        assert [await app.result(task.task_id, PATIENCE) for task in tasks[1:]] == [2, 4]


async def test_an_id_that_is_given_again_is_the_first_one_s_within_the_window_and_later_its_own(azure_bus):
    app, double, _ = calculator(azure_bus())
    mine = double.options(task_id="mine")
    async with working(app):
        assert await (await mine.delay(1)).result(PATIENCE) == 2
        again = await mine.delay(2)
        assert await again.result(0) == 2
        app.service_bus_client.id_window = 0
        again = await mine.delay(3)
        with pytest.raises(TimeoutError):
            await again.result(0)


async def test_a_replay_replaces_the_outcome(azure_bus):
    bus = azure_bus()
    app = Boilermaker(["broken"], bus)

    @app.task(result_ttl=60)
    async def work(state):
        if state == ["broken"]:
            raise ValueError("broken")
        return "mended"

    task = await work.delay()
    async with working(app):
        with pytest.raises(boilermaker.TaskFailed, match="broken"):
            await task.result(PATIENCE)
        app.state.clear()
        await until(lambda: bus.replay(anything))
        await until(lambda: is_empty(bus))

        async def is_mended():
            with contextlib.suppress(boilermaker.TaskFailed):
                return await task.result(0)

        assert await until(is_mended) == "mended"


@pytest.mark.parametrize(
    "address",
    [
        boilermaker.Address("x", 60, queue="gone", session="s"),
        boilermaker.Address("x", 60, queue="with-sessions", session="s" * 200),
        boilermaker.Address("x", 60, queue="with-sessions"),
    ],
    ids=["a queue that is gone", "no session's id", "no session"],
)
@pytest.mark.parametrize("acks_late", [True, False])
async def test_who_can_never_be_told_is_no_reason_to_run_a_task_again(azure_bus, caplog, address, acks_late):
    bus = azure_bus()
    app, double, _ = calculator(bus, acks_late=acks_late)
    await sent_to(bus, double, address)
    await work_off(app)
    assert app.state == [1]
    assert await is_empty(bus)
    assert await bus.peek(dead_letter=True) == []
    assert "Outcome cannot be told task_id=x: " in caplog.text


async def test_an_outcome_that_a_local_bus_would_keep_is_told_nobody(azure_bus, caplog):
    bus = azure_bus()
    app, double, _ = calculator(bus)
    await sent_to(bus, double, boilermaker.Address("x", 60))
    await work_off(app)
    assert (app.state, await is_empty(bus)) == ([1], True)
    assert "ERROR" not in caplog.text


async def test_a_long_time_to_live_is_as_long_as_can_be_said(azure_bus):
    bus = azure_bus()
    app, double, _ = calculator(bus)
    task = await double.options(result_ttl=datetime.timedelta(days=10_000)).delay(1)
    async with working(app):
        assert await task.result(PATIENCE) == 2
    reply = bus.reply(boilermaker.Answer(boilermaker.Address("x", 0.5, queue="q", session="s"), False, "1", "m"))
    assert (reply.time_to_live, reply.session, reply.correlation_id, reply.message_id) == (1, "s", "x", "m")
    assert json.loads(reply.body) == {"failed": False, "value": 1}


async def test_a_member_s_outcome_goes_to_its_group(azure_bus):
    bus = azure_bus()
    member = boilermaker.Address("group", 60, position=3, queue="q-join")
    reply = bus.reply(boilermaker.Answer(member, True, '{"error":"E"}', "m"))
    assert (reply.queue, reply.session, reply.message_id) == ("q-join", "group", "group:3")
    assert (reply.correlation_id, reply.time_to_live) == (None, None)
    assert json.loads(reply.body) == {"failed": True, "value": {"error": "E"}, "position": 3}


async def test_what_is_no_outcome_is_dropped_from_a_session(azure_bus, emulator, caplog):
    before = stored(emulator)
    bus = azure_bus()
    app, double, _ = calculator(bus)
    task = await double.delay(1)
    async with talks_on(emulator, bus.reply_queue) as talks:
        texts = ["", "{", "[]", "{}", '{"failed":true}', '{"failed":false,"value":NaN}']
        await talks.send(task.outcome_to.session, *texts, correlation_id=task.task_id)
        async with working(app):
            assert await task.result(PATIENCE) == 2
    assert caplog.text.count("What came as an outcome is none") == len(texts)
    await until(lambda: stored(emulator) == before)


@pytest.mark.parametrize("how", ["cancel", "purge scheduled", "purge"])
async def test_what_is_taken_back_is_told_to_who_waits(azure_bus, how):
    bus = azure_bus()
    _, double, _ = calculator(bus)
    operator = azure_bus(bus.queue_name)
    task, other = await double.options(delay=0 if how == "purge" else 3600).delay(1), await double.delay(2)
    waiting = asyncio.create_task(task.result(PATIENCE))
    [number] = [message.sequence_number for message in await bus.peek() if message.message_id == task.task_id]
    if how == "cancel":
        await operator.cancel(number)
    else:
        assert len(await operator.purge([number])) == 1
    with pytest.raises(boilermaker.TaskFailed) as failed:
        await waiting
    error = failed.value
    assert (error.error, error.function_name, error.task_id) == ("Cancelled", "double", task.task_id)
    with pytest.raises(TimeoutError):
        await other.result(0)


async def test_a_purge_of_many_tells_each(azure_bus):
    app, double, _ = calculator(azure_bus())
    tasks = await app.publish_many([double.options(delay=3600 * (number % 2)).si(number) for number in range(60)])
    waiting = asyncio.gather(*[task.result(PATIENCE) for task in tasks], return_exceptions=True)
    assert len(await app.service_bus_client.purge(anything)) == 60
    assert {error.error for error in await waiting} == {"Cancelled"}
    assert {error.task_id for error in await waiting} == {task.task_id for task in tasks}


async def test_a_cancellation_is_told_although_the_queue_cannot_be_looked_at_and_a_wrong_number_tells_nobody(
    azure_bus, monkeypatch
):
    bus = azure_bus()
    _, double, _ = calculator(bus)
    task = await double.options(delay=3600).delay(1)
    [message] = await bus.peek()
    with pytest.raises(MessageNotFound):
        await bus.cancel(message.sequence_number - 1)

    async def refused(*arguments, **options):
        raise ConfigurationError("Listen is not allowed")

    monkeypatch.setattr(bus, "peek", refused)
    await bus.cancel(message.sequence_number)
    monkeypatch.undo()
    assert await is_empty(bus)
    with pytest.raises(TimeoutError):
        await task.result(0.2)


async def test_a_discard_tells_of_what_azure_has_dead_lettered_and_of_nothing_else(azure_bus):
    bus = azure_bus()
    app, double, fail = calculator(bus)
    failing = await fail.delay()
    async with working(app):
        with pytest.raises(boilermaker.TaskFailed):
            await failing.result(PATIENCE)
    await until(lambda: is_empty(bus))
    worn = await double.delay(1)
    async with receiving(bus) as receiver:
        for _ in range(10):
            [delivery] = await receiver.receive(1, PATIENCE)
            await settle(receiver, delivery, ABANDON)
    await until(lambda: is_empty(bus))
    with pytest.raises(TimeoutError):
        await worn.result(0)
    assert len(await azure_bus(bus.queue_name).discard(anything)) == 2
    with pytest.raises(boilermaker.TaskFailed) as failed:
        await worn.result(PATIENCE)
    assert (failed.value.error, failed.value.function_name) == ("Discarded", "double")
    with pytest.raises(boilermaker.TaskFailed, match="of no use"):
        await failing.result(0)


async def test_a_reply_queue_that_is_gone_stops_no_operation(azure_bus, caplog):
    bus = azure_bus()
    _, double, _ = calculator(bus)
    await sent_to(bus, double, boilermaker.Address("x", 60, queue="gone", session="s"))
    assert len(await bus.purge(anything)) == 1
    assert await is_empty(bus)
    assert "Outcome cannot be told task_id=x: There is no queue 'gone'" in caplog.text


async def test_a_service_that_is_busy_is_told_the_outcome_later(azure_bus, emulator, caplog):
    app, double, _ = calculator(azure_bus())
    task = await double.delay(1)
    emulator.control("busy 6")
    async with working(app):
        assert await task.result(PATIENCE) == 2
    emulator.control("busy 0")
    assert app.state == [1]


async def test_where_one_message_follows_the_other_a_worker_looks_for_many_ever_more_rarely(azure_bus, monkeypatch):
    app, double, _ = calculator(azure_bus())
    looks, receive = Counter(), boilermaker.AzureReceiver._receive_over

    async def counted(self, link, max_message_count, max_wait_time):
        looks[self._busy] += 1
        return await receive(self, link, max_message_count, max_wait_time)

    monkeypatch.setattr(boilermaker.AzureReceiver, "_receive_over", counted)
    async with working(app):
        for number in range(40):
            assert await (await double.delay(number)).result(PATIENCE) == 2 * number
        assert looks[True] <= 7  # after 1, 3, 7 and 15 messages, and every 15
        looks.clear()
        tasks = await app.publish_many([double.si(number) for number in range(300)])
        await asyncio.gather(*[task.result(PATIENCE) for task in tasks])
        assert sum(looks.values()) < 150


async def test_who_asks_for_no_result_has_no_session(azure_bus, emulator):
    bus = azure_bus()
    app = Boilermaker([], bus)

    @app.task
    async def work(state):
        state.append("ran")

    await work.delay()
    assert emulator.control("stats")["connections"] == 1
    await work_off(app)
    assert (bus._outcomes, app.state) == ({}, ["ran"])


# ======================================================================================================================
# Emulator: queues with sessions, by the real SDK
# ======================================================================================================================


class Talks:
    """A queue with sessions, and a client that tries nothing twice."""

    def __init__(self, emulator, name):
        self.emulator, self.name = emulator, name
        self.client = ServiceBusClient.from_connection_string(emulator.connection_string, retry_total=0)
        self.sender = self.client.get_queue_sender(name, socket_timeout=0.01)

    async def send(self, session_id, *texts, **options):
        await self.sender.send_messages([ServiceBusMessage(text, session_id=session_id, **options) for text in texts])

    @contextlib.asynccontextmanager
    async def accept(self, session_id=NEXT_AVAILABLE_SESSION, **options):
        """A receiver, on a connection of its own, which the SDK leaves open where the service has cut it."""
        with contextlib.ExitStack() as stack:
            options = {"session_id": session_id, "socket_timeout": 0.01, **options}
            async with self.client.get_queue_receiver(self.name, **options) as receiver:
                stack.callback(receiver._handler._connection._transport.writer.close)
                yield receiver

    def dead_letters(self):
        options = {"sub_queue": ServiceBusSubQueue.DEAD_LETTER, "socket_timeout": 0.01}
        return self.client.get_queue_receiver(self.name, **options)


@contextlib.asynccontextmanager
async def talks_on(emulator, name):
    talks = Talks(emulator, name)
    async with talks.client:
        yield talks


@pytest.fixture
async def talks(emulator):
    """A queue with sessions, made for replies to one without."""
    emulator.control("busy 0")  # that an earlier test has left
    async with talks_on(emulator, f"{fresh_queue()}-replies") as talks:
        yield talks


@pytest.fixture
async def short_talks():
    """Another, with short locks and few deliveries, on an emulator without anything else."""
    options = {"session_queue": ["tasks-join"], "lock_duration": 2, "max_delivery_count": 2}
    with service_bus(["tasks"], **options) as emulator:
        async with talks_on(emulator, "tasks-join") as talks:
            yield talks


async def take(receiver, most=1, wait=PATIENCE):
    """The texts of so many messages, one after the other, which are completed."""
    texts = []
    for _ in range(most):
        for message in await receiver.receive_messages(1, wait):
            await receiver.complete_message(message)
            texts.append(str(message))
    return texts


async def test_the_messages_of_a_session_come_in_order_and_those_of_others_do_not(talks):
    await talks.send("a", "a1", "a2")
    await talks.send("b", "b1")
    await talks.send("a", "a3", "a4")
    async with talks.accept("a") as receiver:
        first, second = await receiver.receive_messages(1) + await receiver.receive_messages(1)
        assert (first.session_id, first.delivery_count) == ("a", 0)
        await receiver.complete_message(second)
        await receiver.abandon_message(first)
        assert await take(receiver, 3) == ["a1", "a3", "a4"]
        assert await receiver.receive_messages(1, 0.1) == []
    async with talks.accept("b") as receiver:
        assert await take(receiver) == ["b1"]


async def test_what_is_sent_to_a_session_reaches_the_one_that_waits_in_it(talks):
    await talks.send("other", "not this")
    async with talks.accept("a") as receiver:  # there need be no message in it
        waiting = asyncio.create_task(take(receiver, 2))
        await until(lambda: receiver._receive_context.is_set())
        await talks.send("a", "one")
        await talks.send("a", "two")
        assert await waiting == ["one", "two"]


@pytest.mark.parametrize("with_sessions", [True, False])
async def test_a_receiver_has_to_be_of_the_queues_kind(talks, with_sessions):
    name, options = (talks.name, {}) if with_sessions else (talks.name.removesuffix("-replies"), {"session_id": "a"})
    text = "non-sessionful.* requires sessions" if with_sessions else "sessionful.*does not require sessions"
    with pytest.raises(sdk_errors.ServiceBusError, match=f"{text}.*amqp:not-allowed"):
        await talks.client.get_queue_receiver(name, **options).__aenter__()


async def test_a_message_without_a_session_is_refused_where_sessions_are_required(talks):
    refused = pytest.raises(sdk_errors.ServiceBusError, match=r"SessionId was not set.*amqp:not-allowed")
    with refused:
        await talks.sender.schedule_messages(ServiceBusMessage("x", session_id=""), utc_in(60))
    with refused:
        await talks.send(None, "x")


def utc_in(seconds):
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


@pytest.mark.parametrize("end", ["close", "drop", "detach"])
async def test_a_session_has_one_holder_until_its_link_is_gone_and_nothing_counts_as_delivered(talks, end):
    await talks.send("a", "1", "2", "3")
    async with talks.accept("a") as holder:
        held = await holder.receive_messages(1) + await holder.receive_messages(1)
        assert [str(message) for message in held] == ["1", "2"]
        with pytest.raises(sdk_errors.SessionCannotBeLockedError, match="'a' cannot be accepted"):
            await talks.accept("a").__aenter__()
        if end == "close":
            await holder.close()
        else:
            talks.emulator.control(end)
        async with talks.accept("a") as next_holder:
            [again] = await next_holder.receive_messages(1)
            assert (str(again), again.delivery_count) == ("1", 0)
            if end != "close":
                with pytest.raises(sdk_errors.ServiceBusError):
                    await holder.complete_message(held[0])
            await next_holder.complete_message(again)
            assert await take(next_holder, 2) == ["2", "3"]


async def test_the_next_session_is_the_one_that_waits_longest_of_those_that_are_free(talks):
    for session_id in "abc":
        await talks.send(session_id, session_id)
    async with talks.accept("a"), talks.accept() as second, talks.accept() as third:
        assert [second.session.session_id, third.session.session_id] == ["b", "c"]
        started = time.monotonic()
        with pytest.raises(sdk_errors.OperationTimeoutError, match=r"com.microsoft:timeout"):
            await talks.accept(max_wait_time=1).__aenter__()
        assert time.monotonic() - started > 0.9


@pytest.mark.parametrize("what", ["a message", "a scheduled message", "the end of its holder"])
async def test_who_waits_for_a_session_gets_the_one_that_becomes_available(talks, what):
    async def next_one():
        async with talks.accept(max_wait_time=PATIENCE) as receiver:
            return receiver.session.session_id, await take(receiver)

    await talks.send("a", "x")
    async with talks.accept("a") as holder:
        links = talks.emulator.control("stats")["links"]
        waiting = asyncio.create_task(next_one())
        await until(lambda: talks.emulator.control("stats")["links"] == links + 3)  # two lead to the node for tokens
        assert talks.emulator.control("stats")["sessions"] == 1
        match what:
            case "a message":
                await talks.send("b", "x")
            case "a scheduled message":
                await talks.sender.schedule_messages(ServiceBusMessage("x", session_id="b"), utc_in(0.3))
            case _:
                await holder.close()
        assert await waiting == ("a" if what == "the end of its holder" else "b", ["x"])


async def test_a_session_keeps_its_state_without_holder_and_without_messages(talks):
    async with talks.accept("a") as receiver:
        assert await receiver.session.get_state() is None
        await receiver.session.set_state(b"one")
        await receiver.session.set_state("two é")
    async with talks.accept("a") as receiver, talks.accept("b") as other:
        assert (await receiver.session.get_state()).decode() == "two é"
        assert await other.session.get_state() is None
        await receiver.session.set_state(None)
        assert await receiver.session.get_state() is None


async def test_a_sessions_state_may_be_as_large_as_a_message(talks):
    async with talks.accept("a") as receiver:
        await receiver.session.set_state(bytes(256 * 1024))
        with pytest.raises(sdk_errors.MessageSizeExceededError, match=r"262145 bytes.*exceeds"):
            await receiver.session.set_state(bytes(256 * 1024 + 1))
        assert await receiver.session.get_state() == bytes(256 * 1024)


async def test_a_session_lock_that_is_renewed_outlives_its_duration_with_what_was_received(short_talks):
    await short_talks.send("a", "1", "2")
    async with short_talks.accept("a") as receiver:
        [message] = await receiver.receive_messages(1)
        until_utc, started = receiver.session.locked_until_utc, time.monotonic()
        assert 0 < (until_utc - datetime.datetime.now(datetime.UTC)).total_seconds() <= 2
        while time.monotonic() - started < 2.5:
            renewed = await receiver.session.renew_lock()
            assert until_utc < renewed == receiver.session.locked_until_utc
            until_utc = renewed
            await asyncio.sleep(0.05)
        assert short_talks.emulator.control("stats")["locked"] == 1
        await receiver.complete_message(message)
        assert await take(receiver) == ["2"]


async def test_a_session_lock_that_runs_out_is_lost_with_all_that_it_held_which_counts(short_talks, monkeypatch):
    await short_talks.send("a", "1", "2")
    async with short_talks.accept("a") as receiver:
        await receiver.session.set_state(b"kept")
        [message] = await receiver.receive_messages(1)
        # The SDK would not even ask: what the service says is asked for here.
        monkeypatch.setattr(type(receiver.session), "_lock_expired", False)
        await until(lambda: short_talks.emulator.control("stats")["sessions"] == 0)
        for attempt in (
            receiver.complete_message(message),
            receiver.session.set_state(b"late"),
            receiver.session.renew_lock(),
        ):
            with pytest.raises(sdk_errors.SessionLockLostError):
                await attempt
    monkeypatch.undo()
    async with short_talks.accept("a") as receiver:
        [again] = await receiver.receive_messages(1)
        assert (str(again), again.delivery_count) == ("1", 1)
        assert await receiver.session.get_state() == b"kept"
        short_talks.emulator.control("steal a")
    async with short_talks.accept() as receiver:
        assert await take(receiver) == ["2"]
    async with short_talks.dead_letters() as receiver:
        [dead] = await receiver.receive_messages(1)
        assert (str(dead), dead.dead_letter_reason) == ("1", "MaxDeliveryCountExceeded")


async def test_a_message_of_a_session_whose_lock_is_taken_away_is_not_completed(talks):
    await talks.send("stolen", "1", "2")
    async with talks.accept("stolen") as receiver:
        [message] = await receiver.receive_messages(1)
        talks.emulator.control("steal stolen")
        with pytest.raises(sdk_errors.SessionLockLostError, match=r"com.microsoft:session-lock-lost"):
            await receiver.complete_message(message)
    async with talks.accept() as receiver:
        assert await take(receiver, 2) == ["1", "2"]
    with pytest.raises(ValueError, match="nothing is locked: stolen"):
        talks.emulator.control("steal stolen")


async def test_what_is_asked_of_a_session_only_its_holder_may_ask(talks):
    await talks.send("a", "1")
    async with talks.accept("a") as holder, talks.accept("b") as other:
        [message] = await holder.receive_messages(1)
        await holder.session.set_state(b"secret")
        for operation, fields in {
            "get-session-state": {},
            "set-session-state": {"session-state": bytearray(b"changed")},
            "renew-session-lock": {},
            "receive-by-sequence-number": {"sequence-numbers": [message.sequence_number], "receiver-settle-mode": 1},
            "update-disposition": {"disposition-status": "completed", "lock-tokens": [message.lock_token]},
        }.items():
            request = f"com.microsoft:{operation}".encode(), {"session-id": "a", **fields}, mgmt_handlers.default
            with pytest.raises(sdk_errors.SessionLockLostError):
                await other._mgmt_request_response(*request, timeout=PATIENCE)
        assert await holder.session.get_state() == b"secret"
        await holder.complete_message(message)


@pytest.mark.parametrize("fault", ["lose 1", "mute 1"])
async def test_a_settlement_in_a_session_whose_answer_is_lost_was_made(talks, fault):
    await talks.send("a", "1", "2")
    async with talks.accept("a") as receiver:
        [message] = await receiver.receive_messages(1)
        talks.emulator.control(fault)
        settling = asyncio.create_task(receiver.complete_message(message))
        if fault == "lose 1":
            with pytest.raises(sdk_errors.ServiceBusError):
                await settling
        else:
            await until(lambda: talks.emulator.control("stats")["locked"] == 0)
            settling.cancel()
            await asyncio.wait([settling])
    async with talks.accept("a") as receiver:
        assert await take(receiver) == ["2"]
        assert await receiver.peek_messages(10) == []


async def test_a_late_settlement_of_a_session_that_was_given_back_does_not_touch_the_next_holders(talks):
    await talks.send("a", "1")
    talks.emulator.control("slow 0.5")
    async with talks.accept("a") as receiver:
        [message] = await receiver.receive_messages(1)
        settling = asyncio.create_task(receiver.complete_message(message))
        await asyncio.sleep(0.1)
        talks.emulator.control("drop")
        with pytest.raises(sdk_errors.ServiceBusError):
            await settling
    talks.emulator.control("slow 0")
    async with talks.accept("a") as receiver:
        [message] = await receiver.receive_messages(1)
        await asyncio.sleep(0.5)
        await receiver.complete_message(message)


async def test_a_connection_that_passes_nothing_on_keeps_its_session_until_the_lock_runs_out(short_talks):
    await short_talks.send("a", "1")
    async with short_talks.accept("a") as holder:
        await holder.receive_messages(1)
        short_talks.emulator.control("freeze")
        assert short_talks.emulator.control("stats")["sessions"] == 1
        async with short_talks.accept(max_wait_time=PATIENCE) as receiver:
            [message] = await receiver.receive_messages(1)
            assert (str(message), message.delivery_count) == ("1", 1)


async def test_dead_letters_of_a_session_are_in_a_queue_without_sessions(talks):
    await talks.send("a", "1", "2", "3", subject="kept")
    async with talks.accept("a") as receiver:
        [message] = await receiver.receive_messages(1)
        await receiver.dead_letter_message(message, "R", "D")
        for delivery in range(10):
            [message] = await receiver.receive_messages(1)
            assert (str(message), message.delivery_count) == ("2", delivery)
            await receiver.abandon_message(message)
        assert await take(receiver) == ["3"]
    async with talks.dead_letters() as receiver:
        first, second = await receiver.receive_messages(1) + await receiver.receive_messages(1)
        assert [str(first), first.dead_letter_reason, first.session_id, first.subject] == ["1", "R", "a", "kept"]
        assert [str(second), second.dead_letter_reason] == ["2", "MaxDeliveryCountExceeded"]
        await receiver.complete_message(first)
        await receiver.complete_message(second)


async def test_what_outlives_its_time_in_a_session_is_dead_lettered_not_delivered(talks):
    await talks.send("a", "old", time_to_live=datetime.timedelta(milliseconds=1))
    await talks.send("a", "new", time_to_live=datetime.timedelta(hours=1))
    async with talks.accept("a") as receiver:
        assert await take(receiver) == ["new"]
        assert await receiver.peek_messages(10) == []
    async with talks.dead_letters() as receiver:
        [message] = await receiver.receive_messages(1)
        assert (str(message), message.dead_letter_reason) == ("old", "TTLExpiredException")


async def test_a_session_can_be_looked_into_and_its_scheduled_messages_be_taken_back(talks):
    await talks.send("b", "b1")
    numbers = await talks.sender.schedule_messages(
        [ServiceBusMessage(text, session_id="a") for text in ("later", "never")], utc_in(3600)
    )
    await talks.send("a", "a1")
    async with talks.accept("a") as receiver:
        seen = await receiver.peek_messages(10)
        assert [(str(each), each.state.name) for each in seen] == [
            *(("later", "SCHEDULED"), ("never", "SCHEDULED"), ("a1", "ACTIVE"))
        ]
        await talks.sender.cancel_scheduled_messages(numbers[1])
        assert [str(each) for each in await receiver.peek_messages(10, sequence_number=1)] == ["later", "a1"]
        assert await take(receiver) == ["a1"]
        soon = await talks.sender.schedule_messages(ServiceBusMessage("soon", session_id="a"), utc_in(0.3))
        [message] = await receiver.receive_messages(1)
        assert (str(message), message.sequence_number) == ("soon", soon[0])


async def test_an_id_that_was_there_before_is_dropped_in_whichever_session(talks):
    await talks.send("a", "first", message_id="x")
    await talks.send("b", "second", message_id="x")
    await talks.send("b", "third", message_id="y")
    async with talks.accept("a") as a, talks.accept("b") as b:
        assert (await take(a), await take(b)) == (["first"], ["third"])
        await talks.send("a", "late", message_id="x")
        assert await a.peek_messages(10) == await b.peek_messages(10) == []


async def test_what_was_deferred_in_a_session_is_received_by_its_number_by_the_sessions_holder(talks):
    await talks.send("a", "1", "2")
    async with talks.accept("a") as receiver, talks.accept("b") as other:
        [message] = await receiver.receive_messages(1)
        await receiver.defer_message(message)
        assert await take(receiver) == ["2"]
        with pytest.raises(sdk_errors.MessageNotFoundError):
            await other.receive_deferred_messages(message.sequence_number)
        [deferred] = await receiver.receive_deferred_messages(message.sequence_number)
        assert str(deferred) == "1"
        await receiver.complete_message(deferred)
        assert await receiver.peek_messages(10) == []


async def test_a_session_can_be_received_and_deleted(talks):
    await talks.send("a", "1", "2")
    async with talks.accept("a", receive_mode=ServiceBusReceiveMode.RECEIVE_AND_DELETE) as receiver:
        assert [str(each) for _ in range(2) for each in await receiver.receive_messages(1)] == ["1", "2"]
        assert await receiver.peek_messages(10) == []


async def test_the_figures_count_the_messages_of_sessions_too(short_talks):
    def figures(*names):
        stats = short_talks.emulator.control("stats")
        return [stats[name] for name in names]

    await short_talks.send("a", "1", "2", "3")
    await short_talks.sender.schedule_messages(ServiceBusMessage("later", session_id="a"), utc_in(3600))
    assert figures("sessions", "active", "locked", "scheduled", "dead") == [0, 3, 0, 1, 0]
    async with short_talks.accept("a") as receiver:
        first, second = await receiver.receive_messages(1) + await receiver.receive_messages(1)
        await receiver.session.renew_lock()
        await receiver.dead_letter_message(first)
        assert figures("sessions", "active", "locked", "scheduled", "dead") == [1, 1, 1, 1, 1]
        await receiver.complete_message(second)
    await until(lambda: figures("sessions") == [0])
    assert figures("active", "locked", "scheduled", "dead") == [1, 0, 1, 1]


# ======================================================================================================================
# Groups
# ======================================================================================================================


def group_tasks(bus, **options):  # noqa: C901
    """An application whose state is a dict of what was noted, by label; and its tasks, as attributes."""
    app = Boilermaker({}, bus, **options)

    @app.task
    async def add(state, x, y=1):
        return x + y

    @app.task
    async def total(state, numbers):
        return sum(numbers)

    @app.task
    async def note(state, value, label="body"):
        state.setdefault(label, []).append(value)
        return value

    @app.task
    async def nothing(state): ...

    @app.task
    async def fail(state, text="no", after=0):
        await asyncio.sleep(after)
        raise ValueError(text)

    @app.task(policy=RetryPolicy(max_tries=3))
    async def third_time(state, x):
        if current_task().attempts.attempts < 2:
            raise RetryException("again")
        return x

    @app.task
    async def fan(state, *numbers, label=None):
        return add.map(numbers) if label is None else add.map(numbers) | note.s(label)

    @app.task
    async def count_runs(state, number):
        state.setdefault(number, []).append(None)
        return [number, len(state[number])]

    @app.task
    async def hold(state):
        await release.wait()

    release, tasks = asyncio.Event(), (add, total, note, nothing, fail, third_time, fan, count_runs, hold)
    return types.SimpleNamespace(app=app, release=release, **{task.registration.name: task for task in tasks})


def local_tasks():
    return group_tasks(LocalServiceBus())


LISTS = {
    "one by one": (lambda t: group(t.add.si(1), t.add.si(2, 3)), [2, 5]),
    "an iterable": (lambda t: group(t.add.si(n) for n in range(3)), [1, 2, 3]),
    "functions": (lambda t: group(t.nothing, t.nothing), [None, None]),
    "none": (lambda t: group(), []),
    "an empty iterable": (lambda t: group([]), []),
    "one": (lambda t: group(t.add.si(1)), [2]),
    "one function": (lambda t: group(t.nothing), [None]),
    "a map": (lambda t: t.add.map(range(4)), [1, 2, 3, 4]),
    "a map of nothing": (lambda t: t.add.map(iter(())), []),
    "a map with arguments": (lambda t: t.add.map([1, 2], 10), [11, 12]),
    "a map with keywords": (lambda t: t.add.map([1, 2], y=20), [21, 22]),
    "a map with options": (lambda t: t.third_time.options(policy=RetryPolicy(max_tries=4)).map([1, 2]), [1, 2]),
    "nested": (lambda t: group(t.add.map([1, 2]), t.add.si(3)), [[2, 3], 4]),
    "nested, with nothing": (lambda t: group(group(), t.add.si(1), t.add.map([])), [[], 2, []]),
    "nested, one by one": (lambda t: group(group(group(t.add.si(1)))), [[[2]]]),
    "nested in order": (lambda t: group(group(t.add.si(n), group(t.add.si(n))) for n in range(3)),
        [[1, [1]], [2, [2]], [3, [3]]]),
    "chains": (lambda t: group(t.add.si(1) | t.add.s(10), t.add.si(0)), [12, 1]),
    "a chain of groups": (lambda t: group(t.add.map([1, 2]) | t.total.s(), t.add.si(0)), [5, 1]),
    "after a group": (lambda t: t.add.map([1, 2]) | group(t.total.s(), t.add.si(5)), [5, 6]),
    "after a task": (lambda t: t.add.si(5) | group(t.add.s(1), t.add.s(y=2), t.add.si(0)), [7, 8, 1]),
    "nested after a task": (lambda t: t.add.si(5) | group(t.add.s(1), group(t.add.s(2), group())), [7, [8, []]]),
    "a step": (lambda t: t.add.si(1) | group(t.add.s(), t.add.s(2)) | t.total.s(), 7),
    "returned": (lambda t: t.fan.si(1, 2), [2, 3]),
    "returned by a member": (lambda t: group(t.fan.si(1, 2), t.add.si(3)), [[2, 3], 4]),
    "a member's follow-up": (lambda t: group(t.add.si(1) | t.add.map([5]), t.add.si(0)), [[6], 1]),
    "retries": (lambda t: t.third_time.map([1, 2]), [1, 2]),
    "app.chain": (lambda t: t.app.chain(t.add.map([1]), t.total.s()), 2),
    "a copy": (lambda t: t.add.map([1, 2]).copy(), [2, 3]),
    "without exceptions": (lambda t: group(t.add.si(1), return_exceptions=True), [2]),
}  # fmt: skip


@pytest.fixture
def many_sessions(monkeypatch):
    """On Azure, half a second for each group is most of what a test of many takes."""
    monkeypatch.setattr(boilermaker, "JOINED_SESSIONS", 20)


async def test_what_follows_a_group_gets_the_list_of_the_results_in_order_once(new_bus, many_sessions):
    tasks = group_tasks(new_bus())
    works = [work(tasks) | tasks.note.s(label) for label, (work, _) in LISTS.items()]
    async with working(tasks.app, concurrency=50):
        await tasks.app.publish_many(works)
        await until(lambda: len(tasks.app.state) == len(LISTS), "the bodies")
        await until(partial(is_empty, tasks.app.service_bus_client))
    assert tasks.app.state == {label: [values] for label, (_, values) in LISTS.items()}


FAILURES = {
    "one": (lambda t: t.fail.map(["a"]), ("fail", "ValueError", "1 of 1 members failed, the first: a")),
    "the first in order": (
        lambda t: group(t.add.si(1), t.fail.si("late", 0.1), t.fail.si("early")),
        ("fail", "ValueError", "2 of 3 members failed, the first: late"),
    ),
    "in a chain": (
        lambda t: group(t.add.si(1) | t.fail.si("b") | t.add.s(), t.add.si(0)),
        ("fail", "ValueError", "1 of 2 members failed, the first: b"),
    ),
    "nested": (
        lambda t: group(t.add.si(1), group(t.fail.si("c"), group())),
        ("fail", "ValueError", "1 of 2 members failed, the first: 1 of 2 members failed, the first: c"),
    ),
    "no function": (
        lambda t: group(named("missing"), t.add.si(1)),
        (
            *("missing", "UnregisteredFunction"),
            "1 of 2 members failed, the first: 'missing' is not registered: import its module before run().",
        ),
    ),
    "tries": (
        lambda t: t.third_time.options(policy=RetryPolicy(max_tries=2)).map([1, 2]),
        ("third_time", "RetryException", "2 of 2 members failed, the first: again"),
    ),
    "too late": (
        lambda t: group(t.add.options(expires=1e-6).si(1)),
        ("add", "Expired", "1 of 1 members failed, the first: It was to begin ... and expires after 1e-06."),
    ),
    "its time, nested": (
        lambda t: group(t.add.si(1), group(elsewhere("a"), timeout=datetime.timedelta(seconds=0.5))),
        ("group", "TimeoutError", "1 of 2 members failed, the first: 1 of 1 members have not ended after 0.5 s: 0 (a)"),
    ),
}  # fmt: skip


def elsewhere(name):
    """A task that nobody runs."""
    return named(name, queue=QUEUES[-1])


async def test_a_group_with_a_member_that_failed_calls_back_once_with_the_first_and_its_body_does_not_run(
    new_bus, many_sessions
):
    tasks = group_tasks(new_bus())
    works = [work(tasks) | tasks.note.s("body") for work, _ in FAILURES.values()]
    for label, work in zip(FAILURES, works, strict=True):
        work.on_failure = tasks.note.s(label)
    async with working(tasks.app, concurrency=50):
        await tasks.app.publish_many(works)
        await until(lambda: len(tasks.app.state) == len(FAILURES), "the callbacks")
        await until(partial(is_empty, tasks.app.service_bus_client))
    told = {
        label: [
            (each["function_name"], each["error"], re.sub(r"begin .*,", "begin ...", each["message"]))
            for each in failures
        ]
        for label, failures in tasks.app.state.items()
    }
    assert told == {label: [failure] for label, (_, failure) in FAILURES.items()}


async def test_a_group_that_has_not_ended_in_its_time_has_failed_and_names_the_members_that_are_missing(new_bus):
    tasks = group_tasks(new_bus())
    work = group(tasks.add.si(1), elsewhere("a"), tasks.add.si(2), elsewhere("b"), timeout=3) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    async with working(tasks.app):
        await (tasks.add.map([1]) | tasks.note.s("before")).publish()
        await until(lambda: tasks.app.state, "a group, after which all links are open")
        await work.publish()
        await until(lambda: "failure" in tasks.app.state)
    [failure] = tasks.app.state["failure"]
    assert failure["message"] == "2 of 4 members have not ended after 3 s: 1 (a), 3 (b)"
    assert (failure["error"], failure["function_name"], failure["task_id"]) == ("TimeoutError", "group", work.task_id)
    assert "body" not in tasks.app.state


async def test_a_failure_stands_in_the_list_as_its_dict_where_exceptions_are_to_be_returned(new_bus):
    tasks = group_tasks(new_bus())
    member, nested = tasks.fail.si("a"), tasks.fail.si("b")
    work = group(tasks.add.si(1), member, group(nested, return_exceptions=True), return_exceptions=True)
    work = work | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: tasks.app.state)
    [[one, failure, [inner]]] = tasks.app.state["body"]
    assert one == 2
    assert {name: failure[name] for name in ("function_name", "error", "message", "attempts")} == {
        "function_name": "fail",
        "error": "ValueError",
        "message": "a",
        "attempts": 1,
    }
    assert (failure["task_id"], inner["task_id"]) == (work.members[1].task_id, work.members[2].members[0].task_id)
    assert failure["traceback"].endswith("ValueError: a\n")
    assert inner["message"] == "b"
    assert "failure" not in tasks.app.state


async def test_members_callbacks_run_as_ever_and_each_failure_callback_is_its_own(new_bus):
    tasks = group_tasks(new_bus())
    good, bad = tasks.add.si(1) | tasks.note.s("member"), tasks.fail.si("a")
    bad.on_failure = tasks.note.s("member's failure")
    whole = group(good, bad, return_exceptions=True)
    whole.on_failure = tasks.note.s("group's failure")
    work = whole | tasks.fail.si("body") | tasks.note.s("never")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: len(tasks.app.state) == 2)

        async def failures():
            return len(await tasks.app.peek(dead_letter=True)) == 2  # a member, and the body

        await until(failures)
        await until(partial(is_empty, tasks.app.service_bus_client))
    assert tasks.app.state["member"] == [2]
    assert [each["message"] for each in tasks.app.state["member's failure"]] == ["a"]
    assert set(tasks.app.state) == {"member", "member's failure"}  # the group's is not the body's


@pytest.mark.parametrize(("member", "body"), [("fail", "note"), ("add", "fail")])
async def test_a_chain_with_a_group_has_one_failure_callback_for_the_group_and_for_what_follows(new_bus, member, body):
    tasks = group_tasks(new_bus())
    member, body = getattr(tasks, member), getattr(tasks, body)
    async with working(tasks.app):
        await tasks.app.chain(member.map([1, 2]), body.s(), on_failure=tasks.note.s("failure")).publish()
        await until(lambda: tasks.app.state)
        await until(partial(is_empty, tasks.app.service_bus_client))
    [failure] = tasks.app.state.pop("failure")
    assert failure["function_name"] == "fail"
    assert tasks.app.state == {}


async def test_a_group_may_follow_a_failure_whose_dict_its_members_receive(new_bus):
    tasks = group_tasks(new_bus())
    work = tasks.fail.si("a")
    work.on_failure = group(tasks.note.s("one"), tasks.note.si(1, "two")) | tasks.note.s("after")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: "after" in tasks.app.state)
    [failure] = tasks.app.state["one"]
    assert (failure["message"], tasks.app.state["two"]) == ("a", [1])
    assert tasks.app.state["after"] == [[failure, 1]]


async def test_a_returned_workflow_with_a_group_is_followed_by_what_would_have_followed(new_bus):
    tasks = group_tasks(new_bus())
    work = group(tasks.fan.si(1, 2, label="inner"), tasks.fan.si()) | tasks.note.s("outer")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: "outer" in tasks.app.state)
    assert tasks.app.state == {"inner": [[2, 3]], "outer": [[[2, 3], []]]}


async def test_a_group_that_a_task_returns_takes_its_failure_callback(new_bus):
    tasks = group_tasks(new_bus())

    @tasks.app.task
    async def returns(state):
        return tasks.fail.map(["a", "b"])

    work = returns.si() | tasks.note.s("never")
    work.on_failure = tasks.note.s("failure")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: tasks.app.state)
    assert [each["message"] for each in tasks.app.state["failure"]] == ["2 of 2 members failed, the first: a"]


@contextlib.asynccontextmanager
async def resending(bus):
    """The bodies of what was published, by function; each goes to the queue again."""
    bodies = {message.task.function_name: message.body for message in await bus.peek(1000)}
    numbers = itertools.count()

    async def send_again(name):
        await bus.send([letter(bodies[name], message_id=f"again-{next(numbers)}", queue=bus.queue_name)])

    yield send_again


async def test_a_member_that_is_delivered_twice_counts_once_and_its_first_outcome_stands(new_bus):
    tasks = group_tasks(new_bus())
    await (group(tasks.count_runs.si(1), tasks.add.si(1), tasks.hold) | tasks.note.s()).publish()
    async with resending(tasks.app.service_bus_client) as send_again, working(tasks.app):
        for number in range(1, 5):
            await until(lambda number=number: len(tasks.app.state.get(1, ())) == number)
            await send_again("count_runs" if number < 4 else "add")
        tasks.release.set()
        await until(lambda: "body" in tasks.app.state)
        await until(partial(is_empty, tasks.app.service_bus_client))
    assert tasks.app.state["body"] == [[[1, 1], 2, None]]


async def test_what_a_member_tells_after_the_end_changes_nothing(new_bus):
    tasks = group_tasks(new_bus())
    work = group(tasks.count_runs.si(1), tasks.hold, timeout=0.5) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    await work.publish()
    async with resending(tasks.app.service_bus_client) as send_again, working(tasks.app):
        await until(lambda: "failure" in tasks.app.state)
        tasks.release.set()
        await until(partial(is_empty, tasks.app.service_bus_client))
        await send_again("hold")
        await send_again("count_runs")
        await until(lambda: len(tasks.app.state[1]) == 2)
        await until(partial(is_empty, tasks.app.service_bus_client))
        await asyncio.sleep(0.1)
    [failure] = tasks.app.state["failure"]
    assert failure["message"].endswith("1 (hold)"), failure["message"]
    assert "body" not in tasks.app.state


async def test_a_failed_member_that_is_replayed_does_not_open_its_group_again(new_bus):
    tasks = group_tasks(new_bus())
    app = tasks.app

    @app.task
    async def mend(state):
        state.setdefault("runs", []).append(None)
        if len(state["runs"]) < 2:
            raise ValueError("not yet")

    work = group(mend, tasks.add.si(1)) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    async with working(app):
        await work.publish()
        await until(lambda: "failure" in app.state)
        await until(partial(is_empty, app.service_bus_client))
        [replayed] = await app.replay(lambda message: message.task.function_name == "mend")
        assert replayed.task.outcome_to.position == 0
        await until(lambda: len(app.state["runs"]) == 2)
        await until(partial(is_empty, app.service_bus_client))
        await asyncio.sleep(0.1)
    assert len(app.state["failure"]) == 1
    assert "body" not in app.state


async def test_a_member_that_is_replayed_while_its_group_is_open_has_failed_all_the_same(new_bus):
    tasks = group_tasks(new_bus())
    app = tasks.app
    work = group(tasks.fail.si("a"), tasks.hold) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    async with working(app):
        await work.publish()

        async def replayed():
            return await app.replay(lambda message: True)

        await until(replayed)
        await until(replayed)
        tasks.release.set()
        await until(lambda: app.state)
    assert [each["message"] for each in app.state["failure"]] == ["1 of 2 members failed, the first: a"]


async def test_members_on_another_applications_queue_are_joined_where_the_group_was_published(new_bus):
    tasks = group_tasks(new_bus())
    other = Boilermaker({}, new_bus())

    @other.task
    async def double(state, x):
        return 2 * x

    away = Task.default("double", payload={"args": [4]}, queue=other.queue_name)
    async with working(tasks.app), working(other):
        await (group(away, tasks.add.si(1), away.copy() | tasks.add.s()) | tasks.note.s()).publish()
        await until(lambda: tasks.app.state)
    assert tasks.app.state == {"body": [[8, 2, 9]]}


async def test_the_members_of_a_delayed_group_wait_as_the_body_of_one_without_does(new_bus):
    tasks = group_tasks(new_bus())
    app = tasks.app
    works = [tasks.add.map([1, 2]) | tasks.note.s("some"), tasks.add.map([]) | tasks.note.s("none")]
    await app.publish_many(works, delay=3600)
    messages = await app.peek()
    assert {message.state for message in messages} == {boilermaker.MessageState.SCHEDULED}
    assert [message.task.function_name for message in messages] == ["add", "add", "note"]
    due = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
    await app.publish_many([work.copy() for work in works], eta=due)
    async with working(app):
        await until(lambda: app.state)
        assert datetime.datetime.now(datetime.UTC) >= due
        await until(lambda: len(app.state) == 2)
    assert app.state == {"some": [[2, 3]], "none": [[]]}


async def test_what_fn_options_says_of_publishing_is_said_of_the_group_and_the_rest_of_its_members(new_bus):
    tasks = group_tasks(new_bus())
    policy = RetryPolicy(max_tries=7)
    await tasks.add.options(delay=3600, policy=policy, expires=60).map([1, 2]).publish(publish_attempts=2)
    messages = await tasks.app.peek()
    assert [message.state for message in messages] == [boilermaker.MessageState.SCHEDULED] * 2
    assert [(message.task.policy, message.task.expires) for message in messages] == [(policy, 60)] * 2


async def test_a_schedule_may_be_of_a_group_whose_ticks_each_run_once_in_however_many_workers(new_bus):
    bus = new_bus()
    everything = [group_tasks(bus), group_tasks(new_bus(bus.queue_name))]
    for tasks in everything:
        tasks.app.schedule(tasks.add.map([1, 2]) | tasks.note.s(), every=datetime.timedelta(seconds=1), name="sums")
    bodies = []
    async with working(everything[0].app), working(everything[1].app):

        def notes():
            return [each for tasks in everything for each in tasks.app.state.get("body", ())]

        began = time.monotonic()
        await until(lambda: len(notes()) >= 2)
        bodies, seconds = notes(), time.monotonic() - began
    assert bodies == [[2, 3]] * len(bodies)
    assert len(bodies) <= seconds + 3  # of those that are due, and one that was


async def test_a_group_is_published_once_and_its_copy_once_more(new_bus):
    tasks = group_tasks(new_bus())
    app = tasks.app
    work = tasks.add.map([1, 2]) | tasks.note.s()
    async with working(app):
        assert await work.publish() is work
        assert work.message_id == work.task_id
        with pytest.raises(UsageError, match=r"<Group of 2 .*> is published already: .* its copy\(\)"):
            await work.publish()
        copy = work.copy()
        assert copy.task_id != work.task_id
        assert {member.task_id for member in copy.members}.isdisjoint(member.task_id for member in work.members)
        with pytest.raises(UsageError, match=r"there twice"):
            await app.publish_many([copy, copy])
        await copy.publish()
        await until(lambda: len(app.state.get("body", ())) == 2)
    assert app.state == {"body": [[2, 3]] * 2}


async def test_an_empty_group_that_nothing_follows_is_nothing(new_bus):
    tasks = group_tasks(new_bus())
    await tasks.app.publish_many([tasks.note.si(1), group(), tasks.note.si(2), tasks.add.map([])])
    alone = await tasks.app.publish_task(group())
    assert alone.message_id == alone.task_id
    async with working(tasks.app):
        await until(lambda: tasks.app.state == {"body": [1, 2]})


async def test_groups_are_published_beside_tasks_whatever_their_order(new_bus):
    tasks = group_tasks(new_bus())
    works = [
        tasks.note.si(1, "first"),
        tasks.add.map([1]) | tasks.note.s("second"),
        tasks.note.si(3, "third"),
        tasks.add.map([]) | tasks.note.s("fourth"),
        tasks.add.map([5, 6]) | tasks.note.s("fifth"),
    ]
    async with working(tasks.app):
        assert await tasks.app.publish_many(works) == works
        await until(lambda: len(tasks.app.state) == 5)
    assert tasks.app.state == {"first": [1], "second": [[2]], "third": [3], "fourth": [[]], "fifth": [[6, 7]]}


async def test_a_result_that_json_cannot_carry_is_its_members_failure(new_bus):
    tasks = group_tasks(new_bus())

    @tasks.app.task
    async def strange(state):
        return {1, 2}

    work = group(strange, tasks.add.si(1))
    work.on_failure = tasks.note.s()
    async with working(tasks.app):
        await work.publish()
        await until(lambda: tasks.app.state)
    [failure] = tasks.app.state["body"]
    assert (failure["function_name"], failure["error"]) == ("strange", "InvalidArguments")
    assert "returned {1, 2}, which is to be kept and JSON cannot carry" in failure["message"]


async def test_results_over_what_a_message_can_hold_fail_the_group_and_say_so(new_bus):
    tasks = group_tasks(new_bus())

    @tasks.app.task
    async def long(state):
        return "x" * 100_000

    work = group(long, long, long) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: tasks.app.state)
        await until(partial(is_empty, tasks.app.service_bus_client))
    [failure] = tasks.app.state.pop("failure")
    assert (failure["function_name"], failure["error"]) == ("group", "MessageTooLarge")
    assert "the limit is 262144" in failure["message"]
    assert tasks.app.state == {}


async def test_many_more_members_than_workers_or_batches(new_bus):
    tasks = group_tasks(new_bus())
    async with working(tasks.app, concurrency=100):
        await (tasks.add.map(range(250)) | tasks.note.s()).publish()
        await until(lambda: tasks.app.state)
    assert tasks.app.state == {"body": [list(range(1, 251))]}


# -- the operators, and what cannot be


async def test_a_group_is_a_task_for_all_that_takes_one_and_operands_stay_as_they_were():
    t = local_tasks()
    members = [t.add.si(1), t.add.si(2)]
    whole = group(members)
    after, before = whole | t.total.s(), t.nothing.si() | whole
    assert isinstance(whole, Task)
    assert (whole.on_success, whole.members, whole.message_id) == (None, members, None)
    assert names_along(after) == ["group", "total"]
    assert names_along(before) == ["nothing", "group"]
    ids = [task.task_id for head in (whole, after, before) for task in boilermaker._workflow(head)]
    assert len(set(ids)) == len(ids) == 3 + 4 + 4
    assert [member.args for member in after.members] == [[1], [2]]
    assert repr(whole) == f"<Group of 2 {whole.task_id}>"
    twin = pickle.loads(pickle.dumps(whole))
    assert (type(twin), twin.group, [each.args for each in twin.members]) == (
        boilermaker.Group,
        whole.group,
        [[1], [2]],
    )


def coroutine_of(fn):
    return fn.delay(1)


NOT_A_GROUP = {
    "no task": (lambda t: group(t.add.si(1), 5), "A group's member must be a Task or a decorated function, not 5"),
    "nothing": (lambda t: group(None), "A group's member must be a Task or a decorated function, not None"),
    "a string": (lambda t: group("ab"), "A group's member must be a Task or a decorated function, not 'a'"),
    "a list too many": (lambda t: group([t.add.si(1)], t.add.si(2)), "A group's member must be a Task"),
    "a coroutine": (lambda t: group(coroutine_of(t.add)), "not <coroutine .*To publish by delay"),
    "coroutines": (lambda t: group([coroutine_of(t.add)]), "not <coroutine .*To publish by delay"),
    "a plain function": (lambda t: group(fetch_page), r"Use Task.si\(fetch_page, ...\)"),
    "a function that takes something": (lambda t: group(t.add), "Alone, a function stands for add.si"),
    "map of nothing that is a list": (lambda t: t.add.map(5), "add.map takes a list, not 5"),
    "map with wrong arguments": (lambda t: t.add.map([1], z=2), "add.* cannot be called like that: .*'z'"),
    "map of what JSON cannot carry": (lambda t: t.add.map([{1}]), "JSON cannot carry argument 1"),
    "one task twice": (lambda t: group([t.add.si(1)] * 2), r"<Task add .*> is in the group twice: use copy\(\)"),
    "not the head": (lambda t: group(t.add.si(1) >> t.add.s()), "follows another task, which would be skipped"),
    "no exceptions": (lambda t: group(return_exceptions="yes"), "return_exceptions='yes' must be True or False"),
    "no time": (lambda t: group(timeout=None), "timeout=None: a group that never ends"),
    "a negative time": (lambda t: group(timeout=-1), "group: timeout=-1 must be seconds over 0"),
    "no time at all": (lambda t: group(timeout=0), "group: timeout=0 must be seconds over 0"),
    "a time of another type": (lambda t: group(timeout="60"), "group: timeout='60' must be seconds over 0"),
    "a flag for a time": (lambda t: group(timeout=True), "group: timeout=True must be seconds over 0"),
    "group >> task": (lambda t: group(t.add.si(1)) >> t.total.s(), r"<Group of 1 .*>.*: use a \| b"),
    "task >> group": (lambda t: t.add.si(1) >> group(t.add.s()), r"<Group of 1 .*>.*: use a \| b"),
    "group << task": (lambda t: group(t.add.si(1)) << t.add.si(1), r"<Group of 1 .*>.*: use a \| b"),
    "task << group": (lambda t: t.total.s() << group(t.add.si(1)), r"<Group of 1 .*>.*: use a \| b"),
    "no head of its own": (lambda t: group(t.add.si(1)) | (t.add.si(1) >> t.add.s()), "would be skipped"),
}


@pytest.mark.parametrize(("wrong", "error"), NOT_A_GROUP.values(), ids=NOT_A_GROUP)
def test_what_is_no_group_is_an_error_that_says_what_to_write(wrong, error):
    with pytest.raises(UsageError, match=error):
        wrong(local_tasks())


async def in_itself(t):
    whole = group(t.add.si(1))
    whole.members.append(whole)
    await whole.publish()


async def skipped_later(t):
    member = t.add.s()
    whole = group(member)
    t.add.si(1) >> member
    await t.app.publish_task(whole)


NOT_PUBLISHED = {
    "in itself": (in_itself, "is its own callback, or member: a workflow cannot have a cycle"),
    "a member that follows another task": (skipped_later, "follows another task, which would be skipped"),
    "a parent's result": (lambda t: t.app.publish_task(group(t.add.s())), r"made by .s\(\), for a parent's result"),
    "nested": (lambda t: t.app.publish_task(group(group(t.add.s()))), r"made by .s\(\), for a parent's result"),
    "a delay of a member": (
        lambda t: group(t.add.options(delay=5).si(1)).publish(),
        "<Task add .*> is a part of a workflow: delay= is for the head of what is published",
    ),
    "a policy": (lambda t: t.add.map([1]).publish(policy=NoRetry()), "policy= is for its members, fn.options"),
    "expires": (lambda t: t.app.publish_many([t.add.map([1])], expires=5), "expires= is for its members, fn.options"),
    "the same twice": (lambda t: t.app.publish_many([t.add.map([1])] * 2), r"there twice: use copy\(\)"),
    "a member that is not registered": (
        lambda t: t.app.publish_task(group(Task.si(fetch_page, "x"))),
        "Unregistered function: fetch_page",
    ),
    "too deep": (lambda t: nested_groups(t, 800).publish(), "nested callbacks, the limit is 750"),
}


def nested_groups(t, depth):
    whole = group(t.add.si(1))
    for _ in range(depth):
        whole = group(whole)
    return t.app.chain(t.nothing.si(), whole)


@pytest.mark.parametrize(("publish", "error"), NOT_PUBLISHED.values(), ids=NOT_PUBLISHED)
async def test_what_cannot_be_published_of_a_group_is_refused_before_anything_is_sent(open_bus, publish, error):
    tasks = group_tasks(open_bus())
    with pytest.raises(UsageError, match=error):
        await publish(tasks)
    assert await tasks.app.peek() == []


async def test_a_function_may_be_called_group(open_bus):
    app = Boilermaker([], open_bus())

    @app.task(name="group")
    async def my_group(state, x):
        state.append(x)
        return x

    await (group(my_group.si(1), my_group.si(2)) | my_group.s()).publish()
    await work_off(app)
    assert app.state == [1, 2, [1, 2]]


# -- progress, results


async def test_progress_counts_the_members_that_ended_until_some_time_after_the_end(open_bus):
    tasks = group_tasks(open_bus())
    with moved_clock() as clock:
        work = group(tasks.add.si(1), tasks.fail.si(), tasks.hold, return_exceptions=True) | tasks.note.s()
        with pytest.raises(UsageError, match="is not published yet: what publishing gives has the progress"):
            await work.progress()
        published = await work.publish()
        assert await published.progress() == (0, 0, 3)
        async with working(tasks.app):

            async def are_done(count):
                return (await published.progress()).done == count

            await until(partial(are_done, 2))
            assert await published.progress() == boilermaker.Progress(done=2, failed=1, total=3)
            tasks.release.set()
            await until(lambda: tasks.app.state)
            assert await published.progress() == (3, 1, 3)
        clock.tick(590)
        await work_off(tasks.app)
        assert await published.progress() == (3, 1, 3)
        clock.tick(11)
        await work_off(tasks.app)
        with pytest.raises(UsageError, match=f"Group {published.task_id} is not known to .*: it ended over 600 s ago"):
            await published.progress()


@pytest.mark.parametrize("members", [3, 4])
async def test_a_large_group_is_forgotten_in_parts(open_bus, monkeypatch, members):
    monkeypatch.setattr(boilermaker, "GROUP_MEMBERS_AT_ONCE", 2)
    tasks = group_tasks(open_bus())
    path, count = tasks.app.service_bus_client.path, "SELECT count(*) FROM "
    with moved_clock() as clock:
        await group(tasks.add.si(1) for _ in range(members)).publish()
        await work_off(tasks.app)
        left = [rows_of(path, count + "group_member")[0][0]]
        clock.tick(601)
        while rows_of(path, count + "task_group") == [(1,)] and len(left) < 9:
            async with receiving(tasks.app.service_bus_client) as receiver:
                await receiver.receive(1, 0)
            left.append(rows_of(path, count + "group_member")[0][0])
    assert left == {3: [3, 1, 0], 4: [4, 2, 0, 0]}[members]


async def test_only_a_group_has_progress(open_bus):
    tasks = group_tasks(open_bus())
    with pytest.raises(UsageError, match=r"<Task add .*> is no group: only the members of one are counted"):
        await (await tasks.add.delay(1)).progress()


async def test_the_result_of_a_group_is_its_list_and_that_of_a_workflow_what_its_last_step_returned(new_bus):
    tasks = group_tasks(new_bus())
    failing = group(tasks.add.si(1), tasks.fail.si("a"), tasks.fail.si("b"))
    async with working(tasks.app):
        list_of, sum_of, last, nothing, failed, late = await tasks.app.publish_many(
            [
                tasks.add.map([1, 2]),
                tasks.add.map([1, 2]) | tasks.total.s(),
                tasks.add.si(1) | group(tasks.add.s(), tasks.add.map([1])),
                group(),
                failing,
                group(tasks.hold, timeout=0.1),
            ],
            result_ttl=60,
        )
        assert await list_of.result(PATIENCE) == await tasks.app.result(list_of.task_id, PATIENCE) == [2, 3]
        assert await sum_of.result(PATIENCE) == 5
        assert await last.result(PATIENCE) == [3, [2]]
        assert await nothing.result(PATIENCE) == []
        with pytest.raises(boilermaker.TaskFailed) as caught:
            await failed.result(PATIENCE)
        error = caught.value
        assert (error.function_name, error.error, error.task_id) == ("fail", "ValueError", failing.members[1].task_id)
        assert error.message == "2 of 3 members failed, the first: a"
        with pytest.raises(boilermaker.TaskFailed, match=r"1 of 1 members have not ended after 0\.1 s: 0 \(hold\)"):
            await late.result(PATIENCE)


async def test_a_results_time_to_live_is_the_longest_of_the_steps_and_of_the_members(open_bus):
    app = Boilermaker(None, open_bus())

    @app.task(result_ttl=60)
    async def short(state): ...

    @app.task(result_ttl=600)
    async def long(state): ...

    @app.task
    async def kept_nowhere(state, value): ...

    def ttl_of(work):
        return work.outcome_to and (work.outcome_to.id == work.task_id, work.outcome_to.ttl)

    works = [
        group(short, group(long)) | kept_nowhere.s(),
        group(kept_nowhere.si(1), kept_nowhere.si(2) | short),
        group(kept_nowhere.si(1)),
        long.si() | group(short),
    ]
    assert list(map(ttl_of, await app.publish_many(works))) == [(True, 600), (True, 60), None, (True, 600)]
    assert [member.outcome_to.position for member in works[0].members] == [0, 1]


async def test_a_group_with_an_id_of_its_own_is_published_once_however_often_it_is_asked_for(open_bus):
    tasks = group_tasks(open_bus())
    for number in range(3):
        published = await tasks.count_runs.options(task_id="sums").map([1, 2]).publish(result_ttl=60)
        assert published.task_id == "sums"
        if number:
            assert [message.task.function_name for message in await tasks.app.peek()] == ["count_runs"] * 2
    published = await (tasks.count_runs.map([3]) | tasks.note.s()).publish(task_id="other", result_ttl=60)
    await work_off(tasks.app)
    assert await tasks.app.result("sums", 0) == [[1, 1], [2, 1]]
    assert await published.result(0) == await tasks.app.result("other", 0) == [[3, 1]]
    assert {each: len(runs) for each, runs in tasks.app.state.items()} == {1: 1, 2: 1, 3: 1, "body": 1}


async def test_an_id_that_the_bus_has_forgotten_is_that_of_a_new_group(open_bus):
    tasks = group_tasks(open_bus())
    with moved_clock() as clock:
        for numbers in ([1, 2, 3], [4]):
            published = await tasks.add.options(task_id="sums").map(numbers).publish(result_ttl=60)
            await work_off(tasks.app)
            assert await tasks.app.result("sums", 0) == [number + 1 for number in numbers]
            assert await published.progress() == (len(numbers), 0, len(numbers))
            clock.tick(601)


REMOVED = {
    "cancel": "Cancelled",
    "purge": "Cancelled",
    "time_to_live": "TTLExpiredException",
    "max_delivery_count": "MaxDeliveryCountExceeded",
}


@pytest.mark.parametrize(("way", "error"), REMOVED.items())
async def test_a_member_whose_message_is_removed_has_failed_by_that(open_bus, way, error):
    bus = open_bus(max_delivery_count=1, time_to_live=60)
    tasks = group_tasks(bus)
    work = tasks.add.map([1, 2]) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    await work.publish()
    first, _ = await bus.peek()
    with moved_clock() as clock:
        if way == "cancel":
            await bus.cancel(first.sequence_number)
        elif way == "purge":
            assert len(await bus.purge([first.sequence_number])) == 1
        elif way == "time_to_live":
            clock.tick(61)
        else:
            await take_and_drop(bus)
            clock.tick(11)
        await work_off(tasks.app, max_deliveries=None)
    [failure] = tasks.app.state["failure"]
    assert (failure["error"], failure["function_name"]) == (error, "add")
    assert "body" not in tasks.app.state


async def test_a_member_that_is_purged_has_failed_by_that_on_either_bus(new_bus):
    tasks = group_tasks(new_bus())
    work = group(tasks.add.si(1), named("a"), tasks.fail.si()) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    await work.publish()
    assert len(await tasks.app.purge(lambda message: message.task.function_name == "a")) == 1
    async with working(tasks.app):
        await until(lambda: tasks.app.state)
    [failure] = tasks.app.state["failure"]
    assert (failure["function_name"], failure["error"]) == ("a", "Cancelled")
    assert failure["message"].startswith("2 of 3 members failed, the first: ")


async def test_a_dead_letter_that_is_discarded_tells_its_group_what_had_been_told(open_bus):
    tasks = group_tasks(open_bus())
    app = tasks.app
    work = group(tasks.fail.si("a"), tasks.hold)
    work.on_failure = tasks.note.s("failure")
    async with working(app):
        await work.publish()
        await until(partial(app.peek, dead_letter=True))
        assert len(await app.discard(lambda message: True)) == 1
        tasks.release.set()
        await until(lambda: app.state)
    assert [each["message"] for each in app.state["failure"]] == ["1 of 2 members failed, the first: a"]


async def test_a_group_times_out_in_an_idle_worker_too_and_not_before(open_bus):
    tasks = group_tasks(open_bus())
    async with working(tasks.app):
        await until(lambda: tasks.app.workers)
        work = group(elsewhere("a"), timeout=1.5) | tasks.note.s()
        work.on_failure = tasks.note.s()
        began = time.monotonic()
        await work.publish()
        await until(lambda: tasks.app.state)
        assert time.monotonic() - began >= 1.5


async def test_results_that_are_nested_too_deeply_together_fail_the_group_and_not_its_worker(open_bus):
    tasks = group_tasks(open_bus())

    @tasks.app.task
    async def deep(state, depth):
        return nested_list(depth)

    depths = range(sys.getrecursionlimit() - 400, sys.getrecursionlimit(), 5)
    async with working(tasks.app, concurrency=50):
        published = await tasks.app.publish_many([deep.map([depth]) for depth in depths], result_ttl=60)
        outcomes = await asyncio.gather(*[each.result(PATIENCE) for each in published], return_exceptions=True)
    assert {type(each) for each in outcomes} <= {list, boilermaker.TaskFailed}
    assert all(boilermaker.InvalidArguments.__name__ == each.error or "Recursion" in each.error
               for each in outcomes if not isinstance(each, list))  # fmt: skip


async def test_bytes_written_grow_with_the_members_and_the_body_is_kept_once(open_bus):
    written = []
    for members in (100, 200, 400):
        bus = open_bus(f"queue{members}")
        tasks = group_tasks(bus)
        body = tasks.add.map(range(members)) | tasks.note.s("mark" * 1000)
        store = (await bus.commit()).file.store
        before = store.bytes_written
        await body.publish()
        assert not any("mark" in message.body for message in await bus.peek(1000))
        await work_off(tasks.app)
        assert tasks.app.state == {"mark" * 1000: [list(range(1, members + 1))]}
        written.append(store.bytes_written - before)
    first, second, third = written
    assert (third - second) / (second - first) == pytest.approx(2, rel=0.1)


# -- decisions, without a bus


def definition_of(names=(("a", 2),), home="tasks", **fields):
    """What opens a group, and what follows it."""
    settings = boilermaker.GroupSettings(fields.pop("return_exceptions", False), fields.pop("timeout", 60.0), names)
    whole = boilermaker.Group(group=settings, task_id="g", root="root", **fields)
    return encode(whole, home, home)


def tells(position, value=None, failed=False):
    return json.dumps({"position": position, "failed": failed, "value": value})


def failure(message="m", **fields):
    return {
        "task_id": "t",
        "function_name": "f",
        "error": "E",
        "message": message,
        "traceback": "",
        "attempts": 1,
    } | fields


def ending(outcomes, **fields):
    """What follows a group: function, arguments, id; and what is told of it."""
    bus = LocalServiceBus()
    texts = {position: (failed, json.dumps(value)) for position, (failed, value) in outcomes.items()}
    found = boilermaker.ending_of(bus, "tasks", definition_of(**fields), texts)
    tasks = [(decode(message.body, "tasks"), message.message_id) for message in found.messages]
    return [(task.function_name, task.args, message_id) for task, message_id in tasks], found.answer


GOOD, BAD = (False, 7), (True, failure("first"))
BODY = named("body", takes_result=True)
ALARM = named("alarm", takes_result=True)
WORD = "1 of 2 members failed, the first: first"
ENDINGS = {
    "results": ({}, {0: GOOD, 1: (False, None)}, ("body", [[7, None]])),
    "none": ({"names": ()}, {}, ("body", [[]])),
    "one": ({"names": (("a", 1),)}, {0: GOOD}, ("body", [[7]])),
    "a failure": ({}, {0: GOOD, 1: BAD}, ("alarm", [failure(WORD)])),
    "the first failure": (
        {}, {0: BAD, 1: (True, failure("second"))}, ("alarm", [failure("2 of 2 members failed, the first: first")])
    ),
    "as results": ({"return_exceptions": True}, {0: BAD, 1: GOOD}, ("body", [[failure("first"), 7]])),
    "late, all the same": (
        {"return_exceptions": True, "timeout": 0.5}, {1: GOOD},
        ("alarm", "1 of 2 members have not ended after 0.5 s: 0 (a)"),
    ),
    "late, with a failure": ({}, {0: BAD}, ("alarm", "1 of 2 members have not ended after 60 s: 1 (a)")),
    "late, of several names": (
        {"names": (("a", 1), ("b", 2), ("a", 1))}, {2: GOOD},
        ("alarm", "3 of 4 members have not ended after 60 s: 0 (a), 1 (b), 3 (a)"),
    ),
    "late, of many": (
        {"names": (("a", 10**9),)}, {0: GOOD, 10**9: GOOD},
        ("alarm", "999999999 of 1000000000 members have not ended after 60 s: "
                  + ", ".join(f"{n} (a)" for n in range(1, 11)) + ", ..."),
    ),
    "of members that there are not": ({}, {0: GOOD, 1: GOOD, 2: BAD, 7: GOOD}, ("body", [[7, 7]])),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "outcomes", "expected"), ENDINGS.values(), ids=ENDINGS)
def test_what_follows_a_group(settings, outcomes, expected):
    following, answer = ending(outcomes, on_success=BODY.copy(), on_failure=ALARM.copy(), **settings)
    name, arguments = expected
    if isinstance(arguments, str):
        [(_, [told], _)] = following
        assert (told["error"], told["message"], told["task_id"], told["function_name"]) == (
            *("TimeoutError", arguments, "g", "group"),
        )
        arguments = [told]
    assert following == [(name, arguments, "root")]
    assert answer is None


TOLD = {
    "what follows goes on": ({"on_success": BODY}, {0: GOOD, 1: GOOD}, ["body"], None),
    "nothing follows": ({}, {0: GOOD, 1: GOOD}, [], (False, [7, 7])),
    "a failure": ({"on_success": BODY}, {0: GOOD, 1: BAD}, [], (True, failure(WORD))),
    "a failure with a callback": ({"on_failure": ALARM}, {0: GOOD, 1: BAD}, ["alarm"], (True, failure(WORD))),
}


@pytest.mark.parametrize(("fields", "outcomes", "names", "told"), TOLD.values(), ids=TOLD)
def test_who_awaits_the_result_of_a_group_is_told_where_nothing_goes_on(fields, outcomes, names, told):
    address = boilermaker.Address("head", 60.0)
    following, answer = ending(outcomes, outcome_to=address, **fields)
    assert [name for name, _, _ in following] == names
    assert (answer and (answer.failed, json.loads(answer.value))) == told
    if answer:
        assert (answer.to, answer.message_id) == (address, "root:outcome")


def test_the_outcome_of_a_group_goes_along_with_what_follows_a_success_and_not_a_failure():
    address = boilermaker.Address("outer", 0, 3)
    for outcomes, name, expected in (({0: GOOD, 1: GOOD}, "body", address), ({0: GOOD, 1: BAD}, "alarm", None)):
        texts = {position: (failed, json.dumps(value)) for position, (failed, value) in outcomes.items()}
        definition = definition_of(outcome_to=address, on_success=BODY.copy(), on_failure=ALARM.copy())
        found = boilermaker.ending_of(LocalServiceBus(), "tasks", definition, texts)
        [task] = [decode(message.body, "tasks") for message in found.messages]
        assert (task.function_name, task.outcome_to) == (name, expected)


def test_results_that_make_no_message_fail_the_group_and_what_follows_that_too_only_once(caplog):
    body = named("body", takes_result=True)
    texts = {0: (False, json.dumps("x" * 9000)), 1: (False, "1")}
    for size, expected in ((9000, ["alarm"]), (600, [])):  # too small for the list, or for the failure too
        bus = LocalServiceBus(max_message_bytes=size)
        definition = definition_of(on_success=body, on_failure=ALARM)
        found = boilermaker.ending_of(bus, "tasks", definition, texts)
        assert [decode(message.body, "tasks").function_name for message in found.messages] == expected
    assert "What follows the failure of <Group of 0 g> cannot be published" in caplog.text


def state_after(*bodies, since=None):
    state = since or boilermaker.GroupState()
    for body in bodies:
        state = state.with_message(body, "tasks")
    return state


OPENING, TIMER = definition_of(), boilermaker.GROUP_TIMER
STATES = {  # the messages; the outcomes by position, ended, timed out, and whether something follows
    "nothing": ([], {}, False, False, False),
    "opened": ([OPENING], {}, False, False, False),
    "one": ([OPENING, tells(1, 5)], {1: 5}, False, False, False),
    "both": ([OPENING, tells(1, 5), tells(0)], {1: 5, 0: None}, False, False, True),
    "one twice": ([OPENING, tells(1, 5), tells(1, 6)], {1: 5}, False, False, False),
    "its first outcome": ([OPENING, tells(1, 5), tells(1, {}, True), tells(0)], {1: 5, 0: None}, False, False, True),
    "opened twice": ([OPENING, tells(1, 5), OPENING], {1: 5}, False, False, False),
    "before it was opened": ([tells(1, 5)], {}, False, False, False),
    "the time": ([OPENING, tells(1, 5), TIMER], {1: 5}, False, True, True),
    "the time, and one more": ([OPENING, tells(1, 5), TIMER, tells(0)], {1: 5}, False, True, True),
    "the time of none": ([TIMER], {}, False, True, False),
    "no member of it": ([OPENING, tells(0), tells(2)], {0: None, 2: None}, False, False, False),
    "none": ([definition_of(())], {}, False, False, True),
}  # fmt: skip


@pytest.mark.parametrize(("bodies", "values", "ended", "timed_out", "ends"), STATES.values(), ids=STATES)
def test_what_is_known_of_a_group_by_its_messages_and_when_it_ends(bodies, values, ended, timed_out, ends):
    state = state_after(*bodies)
    assert {position: value for position, (_, value) in state.outcomes.items()} == values
    assert (state.ended, state.timed_out, state.ends("tasks")) == (ended, timed_out, ends)
    written = state.write()
    again = boilermaker.GroupState.read(written if written is None else written.encode(), "tasks")
    assert again == state
    assert state_after(*[body.encode() for body in bodies]) == state


def test_what_is_left_of_a_group_that_has_ended_is_that_it_has_until_its_timer_comes():
    over = state_after(OPENING, tells(0), tells(1)).after_the_end()
    assert over == boilermaker.GroupState(ended=True)
    assert boilermaker.GroupState.read(over.write(), "tasks") == over
    for body in (OPENING, tells(0), tells(1)):
        assert state_after(body, since=over) == over
        assert not over.ends("tasks")
    late = state_after(TIMER, since=over)
    assert late.timed_out
    assert not late.ends("tasks")
    assert state_after(OPENING, TIMER).after_the_end().write() is None


NO_MESSAGES = {
    "not JSON": "{",
    "not text": b"\xff",
    "a list": "[]",
    "a number": "5",
    "a string": '"group timeout position"',
    "nothing": "{}",
    "too deep": "[" * 100_000,
    "a task": encode(named("a"), "tasks", "tasks"),
    "no group": body_with(group=None),
    "a group of nothing": body_with(group={}),
    "no position": json.dumps({"failed": False, "value": 1}),
    "no value": json.dumps({"failed": False, "position": 1}),
    "a position before the first": tells(-1),
    "a position in between": tells(0.5),
    "a position of another type": tells("1"),
    "a flag for a position": tells(True),
    "neither failed nor not": tells(1, failed="no"),
    "a failure that is none": tells(1, "no", failed=True),
}


@pytest.mark.parametrize("body", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_tells_nothing_of_a_group_is_no_message_of_one(body):
    with pytest.raises(InvalidTaskFormat):
        state_after(OPENING, body)


NO_STATES = {
    **{name: body for name, body in NO_MESSAGES.items() if name != "nothing"},
    "nothing": "{}",
    "no outcomes": json.dumps({"definition": "", "ended": True}),
    "outcomes in a list": json.dumps({"definition": "", "ended": True, "outcomes": []}),
    "an outcome alone": json.dumps({"definition": "", "ended": True, "outcomes": {"1": 5}}),
    "no position": json.dumps({"definition": "", "ended": True, "outcomes": {"x": [False, 5]}}),
    "a task's definition": json.dumps({"definition": body_with(), "ended": False, "outcomes": {}}),
    "a definition that is none": json.dumps({"definition": "x", "ended": False, "outcomes": {}}),
    "a definition that is no text": json.dumps({"definition": 5, "ended": False, "outcomes": {}}),
}


@pytest.mark.parametrize("text", NO_STATES.values(), ids=NO_STATES)
def test_what_another_program_left_in_a_session_is_no_state_of_a_group(text):
    with pytest.raises(InvalidTaskFormat):
        boilermaker.GroupState.read(text, "tasks")


def test_a_group_is_sent_as_what_opens_it_and_its_members_nested_ones_likewise():
    t = local_tasks()
    work = group(t.add.si(1), group(t.add.si(2), t.nothing.si()), t.add.si(3) | t.add.s()) | t.note.s()
    messages = t.app.messages_of(work, "head")
    opened = {message.message_id: decode(message.body, "tasks") for message in messages if message.opens_group}
    members = {message.message_id: decode(message.body, "tasks") for message in messages if not message.opens_group}
    head = opened["head"]
    inner_id = f"{head.root}:1"
    inner = opened[inner_id]
    assert list(opened) == ["head", inner_id]
    assert list(members) == [f"{head.root}:0", f"{inner.root}:0", f"{inner.root}:1", f"{head.root}:2"]
    assert [message.message_id for message in messages] == [
        *("head", f"{head.root}:0", inner_id, f"{inner.root}:0", f"{inner.root}:1", f"{head.root}:2"),
    ]
    address = boilermaker.Address
    assert [task.outcome_to for task in members.values()] == [
        *(address("head", position=0), address(inner_id, position=0), address(inner_id, position=1)),
        address("head", position=2),
    ]
    assert (head.outcome_to, inner.outcome_to) == (None, address("head", position=1))
    assert head.group == (False, 86_400.0, (("add", 1), ("group", 1), ("add", 1)))
    assert inner.group.names == (("add", 1), ("nothing", 1))
    assert (head.on_success.function_name, inner.on_success, head.members, inner.members) == ("note", None, [], [])
    # The group's id decides on all of them, whoever makes them anew.
    assert [message.message_id for message in t.app.messages_of(work.copy(), "head")] == [
        message.message_id for message in messages
    ]


# -- the wire format


def test_a_group_in_a_workflow_is_read_as_it_was_written():
    t = local_tasks()
    inner = group(t.add.s(1), t.nothing.si() | group(), return_exceptions=True, timeout=5)
    inner.on_failure = t.note.s("failure")
    head = t.add.si(1) | inner | t.note.s()
    again = decode(encode(head, "tasks", "tasks"), "tasks")

    def tree(task):
        return task and (
            *(task.function_name, task.task_id, task.args, task.takes_result, task.group, task.outcome_to),
            *(tree(task.on_success), tree(task.on_failure), list(map(tree, task.members))),
        )

    assert tree(again) == tree(head)
    assert isinstance(again.on_success, boilermaker.Group)


def test_where_no_group_is_used_nothing_is_written_of_one():
    t = local_tasks()
    never = RetryAttempts(0, datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
    task = named("add", task_id="t", args=[1], attempts=never)
    assert encode(task, "tasks", "tasks") == (
        '{"task_id":"t","function_name":"add","payload":{"args":[1],"kwargs":{}},'
        '"attempts":{"attempts":0,"last_retry":"2026-01-02T00:00:00+00:00"},"graph_id":null,'
        '"policy":{"max_tries":5,"delay":120,"delay_max":120,"retry_mode":0},"should_dead_letter":true,'
        '"acks_late":true,"policy_is_default":true,"default_options":["should_dead_letter","acks_late"],'
        '"on_success":null,"on_failure":null}'
    )
    assert t.app.messages_of(t.add.si(1) | t.add.s(), "id")[0].opens_group is False


HOSTILE = {
    "group": [5, "x", [], True, {}, {"names": []}, {"return_exceptions": True},
              *({"return_exceptions": False, "names": [], "timeout": each} for each in (0, -1, "1", True, [], 1e300)),
              *({"return_exceptions": False, "timeout": 1, "names": each}
                for each in (5, None, ["a"], [["a"]], [["a", 1, 2]], [["a", 0]], [["a", -1]], [["a", 1.5]],
                             [["a", "1"]], [["a", True]], [["a", 10**300]], [["a", 2**30]] * 3, [[]], {"a": 1}))],
    "members": [5, "x", {}, [5], [None], [{}], [[]], ["x"], [{"task_id": "t"}], True,
                [{"task_id": "t", "function_name": "f", "group": 5}]],
    "outcome_to": [5, "x", [], True, {"id": 5}, {"id": []}, {"id": "x", "ttl": "1"}, {"id": "x", "ttl": -1},
                   {"id": "x", "position": -1}, {"id": "x", "position": 1.5}, {"id": "x", "position": "1"},
                   {"id": "x", "position": 2**40}, {"id": "x", "queue": 5}],
}  # fmt: skip
A_GROUP = {"return_exceptions": False, "timeout": 1, "names": []}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in HOSTILE for value in HOSTILE[field]], ids=str)
def test_hostile_fields_of_a_group_are_no_task_and_never_an_internal_error(field, value):
    fields = {field: value} if field != "members" else {"group": A_GROUP, "members": value}
    for body in (body_with(**fields), body_with(on_success=json.loads(body_with(**fields)))):
        with pytest.raises(InvalidTaskFormat):
            decode(body, "tasks")


@pytest.mark.parametrize("fields", [{"members": 5}, {"group": None, "members": [1]}, {"group": A_GROUP}])
def test_members_of_what_is_no_group_are_a_field_that_nobody_knows(fields):
    assert decode(body_with(**fields), "tasks").members in ((), [])


async def test_a_group_that_somebody_sent_to_a_worker_is_dead_lettered(new_bus):
    tasks = group_tasks(new_bus())
    bus = tasks.app.service_bus_client
    await bus.send([letter(OPENING, message_id="1", queue=bus.queue_name)])
    await work_off(tasks.app)
    [dead] = await tasks.app.peek(dead_letter=True)
    assert dead.dead_letter_reason == "UnregisteredFunction"


async def test_an_outcome_for_a_group_that_there_is_not_is_dropped(open_bus):
    tasks = group_tasks(open_bus())
    for number, to in enumerate(({"id": "nobody", "position": 0}, {"id": "nobody", "position": 2**31 - 1})):
        body = json.dumps({"task_id": "t", "function_name": "nothing", "outcome_to": to})
        await tasks.app.service_bus_client.send([letter(body, message_id=f"{number}")])
    await work_off(tasks.app)
    assert await ids_of(tasks.app.service_bus_client) == await ids_of(tasks.app.service_bus_client, True) == []


# -- types

TYPED_GROUPS = """\
from typing import assert_type

from boilermaker import Boilermaker, Group, LocalServiceBus, Progress, Task, group

app = Boilermaker(None, LocalServiceBus())


@app.task
async def size(state: None, url: str, factor: int = 1) -> int:
    return factor


@app.task
async def report(state: None, sizes: list[int], name: str = "") -> str:
    return name


async def publish() -> None:
    assert_type(size.map(["a"], factor=2), Group[int])
    assert_type(group(size.si("a"), size.si("b")), Group[int])
    assert_type(group(size.si(url) for url in ("a", "b")), Group[int])
    work = group(size.si("a"), size.si("b"), timeout=5, return_exceptions=True) | report.s()
    assert_type(work, Task[str])
    work.on_failure = report.s("failed")
    published = await work.publish()
    assert_type(await published.result(1), str)
    assert_type(await published.progress(), Progress)
    assert_type(await (await size.map(["a"]).publish()).result(1), list[int])
    assert_type(size.si("a") | size.map(["a"]), Task[list[int]])
    await app.publish_many([size.map(["a"]), work.copy()])
    app.schedule(size.map(["a"]) | report, cron="0 4 * * *", name="sizes")
"""


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_the_types_of_groups_follow_their_members(tool, clean_python, tmp_path):
    (tmp_path / "consumer.py").write_text(TYPED_GROUPS)
    code, findings = checked(tool, clean_python, tmp_path)
    assert code == 0, findings


# -- on Azure: the queue that joins


@pytest.fixture
async def joining(emulator, impatient):
    """Tasks on a fresh queue, and what is in its join queue, by the real SDK."""
    async with azure_buses(emulator) as make:
        tasks = group_tasks(make())
        tasks.new_bus = make
        async with talks_on(emulator, tasks.app.service_bus_client.join_queue) as talks:
            yield tasks, talks


async def dead_letters_of(talks, count=1):
    """The dead letters of a queue with sessions, when there are that many."""
    found = []
    async with talks.dead_letters() as receiver:
        while len(found) < count:
            for message in await receiver.receive_messages(count, PATIENCE):
                found.append(message)
                await receiver.complete_message(message)
    return found


def test_a_member_tells_its_groups_session_under_an_id_of_its_own_that_is_never_too_long():
    bus = AzureServiceBus("example.servicebus.windows.net", "tasks")

    def reply(group_id, position):
        return bus.reply(boilermaker.Answer(bus.member_address(group_id, position), False, "7"))

    one = reply("g", 3)
    assert (one.message_id, one.session, one.queue, json.loads(one.body)) == (
        *("g:3", "g", "tasks-join"),
        {"failed": False, "value": 7, "position": 3},
    )
    longest = {reply("x" * 127, position).message_id for position in (3, 33, 333, 333)}
    assert len(longest) == 3
    assert all(len(message_id) <= 128 for message_id in longest)


async def test_how_far_a_group_is_azure_does_not_tell(joining):
    tasks, _ = joining
    published = await tasks.add.map([1]).publish()
    with pytest.raises(UsageError, match=r"AzureServiceBus.* does not tell how far a group is: only a local bus does"):
        await published.progress()


@pytest.mark.parametrize("given", ["publish", "options"])
async def test_an_id_of_its_own_is_for_a_group_on_the_local_bus_only(joining, given):
    tasks, _ = joining
    fn = tasks.add.options(task_id="sums") if given == "options" else tasks.add
    with pytest.raises(UsageError, match=r"task_id= of a group is for the local bus only, not for AzureServiceBus"):
        await fn.map([1]).publish(**({} if given == "options" else {"task_id": "sums"}))
    assert await tasks.app.peek() == []


@pytest.mark.parametrize("kind", ["no queue", "no sessions"])
async def test_without_a_queue_for_groups_publishing_one_says_how_to_make_it_and_sends_nothing(azure_bus, kind):
    app = Boilermaker(None, azure_bus())
    bus = app.service_bus_client
    bus.join_queue = "missing" if kind == "no queue" else fresh_queue()
    app.register_async(fetch_page)
    work = group(Task.si(fetch_page, "x"))
    for publish in (app.publish_task(work, publish_attempts=3), app.publish_many([work, work.copy()])):
        with pytest.raises(ConfigurationError) as caught:
            await publish
        assert f"Groups of '{bus.queue_name}' need the queue '{bus.join_queue}'" in str(caught.value)
        assert (
            f"az servicebus queue create --namespace-name 127 --resource-group ... --name {bus.join_queue} "
            "--enable-session true --enable-duplicate-detection true"
        ) in str(caught.value)
    callback = Task.si(fetch_page, "x") | work
    with pytest.raises(ConfigurationError, match="--enable-session true"):
        await app.publish_task(callback)
    assert work.message_id is None
    assert await app.peek() == []


@pytest.mark.parametrize("kind", ["no queue", "no sessions"])
async def test_a_worker_that_is_given_a_queue_for_groups_says_at_its_start_if_it_is_none(azure_bus, kind):
    app = Boilermaker(None, azure_bus())
    app.service_bus_client.join_queue = "missing" if kind == "no queue" else fresh_queue()
    app.service_bus_client.joins = True
    with pytest.raises(ConfigurationError, match="--enable-session true --enable-duplicate-detection true"):
        await app.run()


@pytest.mark.parametrize(
    "names",
    [
        {"join_queue_name": "tasks"},
        {"reply_queue_name": "a", "join_queue_name": "a"},
        {"join_queue_name": "tasks-replies"},
    ],
    ids=str,
)
def test_groups_and_replies_and_tasks_each_need_a_queue_of_their_own(names):
    with pytest.raises(ConfigurationError, match="must be three queues"):
        AzureServiceBus("example.servicebus.windows.net", "tasks", **names)


async def test_a_poisoned_message_for_a_group_is_dead_lettered_once_and_harms_nobody(joining, caplog):
    tasks, talks = joining
    bodies = ["{", "[]", "x" * 5000, encode(named("a"), "tasks", "tasks"), tells(-1), tells(0, "no", failed=True)]
    async with working(tasks.app):
        work = await (group(tasks.add.si(1), tasks.hold) | tasks.note.s()).publish()
        await talks.send(work.task_id, *bodies)
        await talks.send("nobody", "{")
        letters = await dead_letters_of(talks, len(bodies) + 1)
        tasks.release.set()
        await until(lambda: tasks.app.state)
    assert {message.dead_letter_reason for message in letters} == {"InvalidTaskFormat"}
    assert sorted(str(message) for message in letters) == sorted([*bodies, "{"])
    assert tasks.app.state == {"body": [[2, None]]}
    assert caplog.text.count("Dead-lettered what is no message of a group") == len(letters)


async def test_a_state_that_is_none_is_removed_and_its_worker_goes_on(joining, caplog):
    tasks, talks = joining
    async with talks.accept("another") as receiver:
        await receiver.session.set_state(b"\xff")
    await talks.send("another", tells(0))
    async with working(tasks.app):
        await (tasks.add.map([1]) | tasks.note.s()).publish()
        await until(lambda: tasks.app.state and "Removed a state" in caplog.text)
    async with talks.accept("another") as receiver:
        assert await receiver.session.get_state() is None
        assert await receiver.receive_messages(1, 0.1) == []


@pytest.fixture
def own_emulator():
    """An emulator without anything else, whose figures are of one test."""
    options = {"session_queue": ["tasks-join"], "lock_duration": LOCK_DURATION, "duplicate_detection": 600}
    with service_bus(["tasks", "other"], **options) as emulator:
        yield emulator


async def test_outcomes_of_groups_that_there_are_not_are_completed_and_leave_no_state(own_emulator, impatient):
    async with azure_buses(own_emulator) as make, talks_on(own_emulator, "tasks-join") as talks:
        bus = make("tasks")
        bus.joins = True
        await talks.send("nobody", tells(0), TIMER, tells(1))
        async with working(Boilermaker(None, bus)):
            await until(lambda: own_emulator.control("stats")["active"] == own_emulator.control("stats")["locked"] == 0)
        async with talks.accept("nobody") as receiver:
            assert await receiver.session.get_state() is None


async def test_the_timer_of_a_group_that_has_ended_removes_what_was_left_of_it(own_emulator, impatient):
    async with azure_buses(own_emulator) as make, talks_on(own_emulator, "tasks-join") as talks:
        tasks = group_tasks(make("tasks"))
        work = group(tasks.add.si(1)) | tasks.note.s()

        def messages_left():
            stats = own_emulator.control("stats")
            return stats["active"], stats["locked"], stats["scheduled"]

        async with working(tasks.app):
            await work.publish()
            await until(lambda: tasks.app.state)
            await until(lambda: messages_left() == (0, 0, 1), "the end of all but the timer")
            await talks.send(work.task_id, TIMER)
            await until(lambda: messages_left() == (0, 0, 1))
        async with talks.accept(work.task_id) as receiver:
            assert await receiver.session.get_state() is None
    assert tasks.app.state == {"body": [[2]]}


async def test_a_worker_on_another_queue_takes_members_and_joins_nothing(joining, monkeypatch):
    tasks, _ = joining
    app, other = tasks.app, Boilermaker({}, tasks.new_bus())
    joiners = []
    start = boilermaker.AzureJoiner.__init__

    def started(joiner, bus):
        joiners.append(bus.queue_name)
        start(joiner, bus)

    monkeypatch.setattr(boilermaker.AzureJoiner, "__init__", started)

    @other.task
    async def double(state, x):
        state[x] = 2 * x
        return state[x]

    await (group(Task.default("double", payload={"args": [4]}, queue=other.queue_name)) | tasks.note.s()).publish()
    async with working(other):
        await until(lambda: other.state)
        await until(partial(is_empty, other.service_bus_client))
    assert joiners == []
    app.service_bus_client.joins = True  # who is given the queue's name does so from its start on
    async with working(app):
        await until(lambda: app.state)
    assert joiners == [app.queue_name]
    assert app.state == {"body": [[8]]}


async def test_a_worker_that_waits_for_groups_asks_once_in_a_while_and_survives_an_outage(
    joining, emulator, monkeypatch
):
    tasks, _ = joining
    tasks.app.service_bus_client.joins = True
    asked = []
    session_link = AzureServiceBus.session_link

    def link(bus, queue, session, wait):
        asked.append(wait)
        return session_link(bus, queue, session, wait)

    monkeypatch.setattr(AzureServiceBus, "session_link", link)
    async with working(tasks.app):
        await until(lambda: tasks.app.workers)
        await until(lambda: asked[1:])
        await asyncio.sleep(1)
        assert asked == [boilermaker.ATTEMPT_TIMEOUT, boilermaker.ACCEPT_WAIT]  # whether there is a queue; the next
        emulator.control("refuse 0.5")
        emulator.control("drop")
        await until(lambda: len(asked) > 2)
        await (tasks.add.map([1, 2]) | tasks.note.s()).publish(publish_attempts=5)
        await until(lambda: tasks.app.state)
    assert tasks.app.state == {"body": [[2, 3]]}


async def test_a_joiner_that_is_idle_goes_on_after_each_wait(joining, monkeypatch):
    monkeypatch.setattr(boilermaker, "ACCEPT_WAIT", 0.2)
    tasks, _ = joining
    tasks.app.service_bus_client.joins = True
    async with working(tasks.app):
        await until(lambda: tasks.app.workers)
        await asyncio.sleep(1.5)
        await (tasks.add.map([1, 2]) | tasks.note.s()).publish()
        await until(lambda: tasks.app.state)


async def test_a_burst_ends_when_the_groups_of_its_tasks_have_ended(joining):
    tasks, _ = joining
    await tasks.app.publish_many([tasks.add.map([n]) | tasks.note.s() for n in range(3)])
    await work_off(tasks.app)
    assert sorted(tasks.app.state["body"]) == [[1], [2], [3]]


STEPS = {"_set": ["before", "after"], "_publish": ["before", "after"], "complete_message": ["before", "after"]}


@pytest.mark.parametrize("fault", ["drop", "detach", "steal"])
async def test_a_joiner_that_loses_its_session_or_its_connection_at_any_step_is_followed_by_another(
    joining, emulator, monkeypatch, fault
):
    tasks, _ = joining
    left = [(step, when) for step, times in STEPS.items() for when in times]

    async def suffer(step, when):
        if (step, when) in left:
            left.remove((step, when))
            with contextlib.suppress(ValueError):  # nothing is locked
                emulator.control(f"steal {work.task_id}" if fault == "steal" else fault)

    def suffering(name, call):
        async def step(*args, **options):
            await suffer(name, "before")
            result = await call(*args, **options)
            await suffer(name, "after")
            return result

        return step

    for name in ("_set", "_publish"):
        step = suffering(name, getattr(boilermaker.AzureJoiner, name))
        monkeypatch.setattr(boilermaker.AzureJoiner, name, step)
    call = boilermaker.AzureLink.call

    async def call_of_link(link, operation, *args, **options):
        of_joiner = link._queue.endswith("-join") and operation.__name__ == "complete_message"
        step = suffering(operation.__name__, call) if of_joiner else call
        return await step(link, operation, *args, **options)

    monkeypatch.setattr(boilermaker.AzureLink, "call", call_of_link)
    work = tasks.add.map([1, 2]) | tasks.note.s()
    work.on_failure = tasks.note.s("failure")
    async with working(tasks.app):
        await work.publish()
        await until(lambda: not left, "a fault at each step")
        await until(lambda: tasks.app.state)
        await until(partial(is_empty, tasks.app.service_bus_client))
    assert tasks.app.state == {"body": [[2, 3]]}


# -- several processes

GROUP_PROGRAM = """
import asyncio, itertools, json, logging, os, signal, sys
import boilermaker
from boilermaker import AzureServiceBus, Boilermaker, LocalServiceBus, current_task

address, queue, die_at = *sys.argv[1:3], json.loads(sys.argv[3])
logging.basicConfig(level=logging.INFO)
logging.getLogger("azure").setLevel(logging.WARNING)
boilermaker.EMPTY_WAIT = 0.3
if address.startswith("Endpoint="):
    bus = AzureServiceBus.from_connection_string(address, queue, join_queue_name=f"{queue}-join")
else:
    bus = LocalServiceBus(address, queue, lock_duration=0.5, max_delivery_count=None)
app = Boilermaker(None, bus)
journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

@app.task
async def add(state, x, y):
    await asyncio.sleep(0.05)
    return x + y

@app.task
async def note(state, value, label):
    task = current_task()
    words = ("note", label, json.dumps(value, separators=(",", ":")), task.message_id)
    os.write(journal, (" ".join(map(str, words)) + "\\\\n").encode())

def killing(call, when, number, is_step=lambda *arguments: True):
    # A function that kills its process before, or after, a call of so high a number.
    numbers = itertools.count(1)

    async def step(*arguments, **options):
        dies = is_step(*arguments) and next(numbers) == number
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await call(*arguments, **options)
        if dies and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return step

def completes(link, operation, *arguments):
    return link._queue.endswith("-join") and operation.__name__ == "complete_message"

if die_at and die_at[0] == "complete":
    boilermaker.AzureLink.call = killing(boilermaker.AzureLink.call, *die_at[1:], completes)
elif die_at:
    name, *moment = die_at
    setattr(boilermaker.AzureJoiner, name, killing(getattr(boilermaker.AzureJoiner, name), *moment))

async def main():
    async with app:
        await app.run(concurrency=20)

asyncio.run(main())
""".replace("\\\\n", "\\n")


@pytest.mark.parametrize("where", ["local", "azure"])
async def test_of_workers_that_are_killed_at_random_each_group_has_one_body_with_the_right_list(
    request, start_program, journal, tmp_path, where
):
    groups, members = 50, 20
    if where == "local":
        address = tmp_path / "queue.db"
        bus = LocalServiceBus(address, queue := fresh_queue(), lock_duration=0.5, max_delivery_count=None)
    else:
        address, queue = request.getfixturevalue("quick_emulator").connection_string, fresh_queue()
        bus = AzureServiceBus.from_connection_string(address, queue)
    app = Boilermaker(None, bus)
    works = [
        group(Task.default("add", payload={"args": [n, 100 * label]}) for n in range(members))
        | Task.default("note", payload={"args": [str(label)]}, takes_result=True)
        for label in range(groups)
    ]
    await app.publish_many(works)
    bodies = [message.body for message in await bus.peek(100)]
    await bus.send([letter(body, message_id=f"again {n}", queue=queue) for n, body in enumerate(bodies)])
    workers = [start_program(GROUP_PROGRAM, address, queue, "null") for _ in range(2)]

    def labels():
        return {label for _, label, _, _ in journal("note")}

    for kill in range(1, 5):
        await until(lambda kill=kill: len(labels()) >= groups * kill // 6, "\n".join(o.read_text() for _, o in workers))
        victim, _ = workers.pop(0)
        victim.kill()
        victim.wait()
        workers.append(start_program(GROUP_PROGRAM, address, queue, "null"))
    await until(lambda: len(labels()) == groups, "the bodies")
    await until(partial(is_empty, bus), "the end of all members")
    for process, output in workers:
        process.terminate()
        await exit_code((process, output))
    await bus.close()
    found = {(label, value, message_id) for _, label, value, message_id in journal("note")}
    assert sorted((int(label), json.loads(value)) for label, value, _ in found) == [
        (label, [n + 100 * label for n in range(members)]) for label in range(groups)
    ]


DEATHS = [
    ("_set", "before", 1),
    ("_set", "after", 1),
    ("_publish", "after", 1),
    ("_set", "after", 2),
    ("complete", "before", 2),
]
"""Of the steps of a joiner: the state is set, what follows published, that it has ended is set, messages completed."""


async def test_of_joiners_that_are_killed_between_two_steps_each_group_has_one_body(
    own_emulator, impatient, start_program, journal
):
    async with azure_buses(own_emulator) as make:
        tasks, other = group_tasks(make("tasks")), Boilermaker(None, make("other"))
        other.register_async(tasks.add.function)
        labels, numbers = range(len(DEATHS)), range(3)
        for label in labels:
            away = [Task.default("add", payload={"args": [n, label]}, queue="other") for n in numbers]
            await (group(away) | tasks.note.s(str(label))).publish()
        async with working(other):  # which joins nothing
            await until(partial(is_empty, other.service_bus_client))
        arguments = own_emulator.connection_string, "tasks"
        programs = [start_program(GROUP_PROGRAM, *arguments, json.dumps(death)) for death in DEATHS]
        for program in programs:
            assert await exit_code(program) == -signal.SIGKILL, program[1].read_text()

        def messages_left():
            stats = own_emulator.control("stats")
            return stats["active"] + stats["locked"]

        assert messages_left() > 0
        process, output = start_program(GROUP_PROGRAM, *arguments, "null")
        await until(lambda: messages_left() == 0, "the end of what the dead have left")
        process.terminate()
        assert await exit_code((process, output)) == 0
    found = {(int(label), value, message_id) for _, label, value, message_id in journal("note")}
    assert sorted((label, json.loads(value)) for label, value, _ in found) == [
        (label, [n + label for n in numbers]) for label in labels
    ]


# ======================================================================================================================
# Operating a queue: what holds on both buses
# ======================================================================================================================


@pytest.fixture
def operated_bus(azure_bus):
    return azure_bus


def bodies_of(bus, *names, **fields):
    """Messages of tasks with these names, each with an id of its own."""
    queue = bus.queue_name.removesuffix(boilermaker.DEAD_LETTER_SUFFIX)
    tasks = [named(name, args=[number], **fields) for number, name in enumerate(names)]
    return [letter(encode(task, queue, queue), message_id=task.task_id, queue=queue) for task in tasks]


async def bury(bus, messages, **why):
    """Publish messages and dead-letter them."""
    await bus.send(messages)
    why = {"reason": "TaskFailed", "description": "ValueError: no", "traceback": "Traceback: no"} | why
    async with receiving(bus) as receiver:
        buried = 0
        while buried < len(messages):
            deliveries = await receiver.receive(100, PATIENCE)
            settlements = [boilermaker.Settlement(delivery, DEAD_LETTER, **why) for delivery in deliveries]
            await receiver.settle(settlements)
            assert [settlement.error for settlement in settlements if settlement.error] == []
            buried += len(deliveries)


def numbers_of(messages):
    return [message.sequence_number for message in messages]


def names_of(messages):
    return [message.task.function_name for message in messages]


def is_named(name):
    return lambda message: message.task is not None and message.task.function_name == name


def anything(message):
    return True


async def test_messages_are_counted_by_their_state(operated_bus):
    bus = operated_bus()
    app = Boilermaker(None, bus)
    app.register_async(take_anything)
    assert dataclasses.astuple(await bus.counts())[:1] == (0,)
    assert (await bus.counts()).oldest is None
    await bury(bus, bodies_of(bus, *"abc"))
    await app.publish_many([app.create_task(take_anything) for _ in range(2)])
    await app.apply_async(take_anything, delay=3600)
    counts = await bus.counts()
    assert (counts.active, counts.scheduled, counts.dead_letter) == (2, 1, 3)
    assert 0 <= counts.oldest < 60


async def test_messages_are_counted_by_task_with_the_last_error(operated_bus):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, "fetch"), description="ValueError: the first")
    await bury(bus, bodies_of(bus, "fetch"), description="ValueError: the last")
    await bury(bus, [letter("no task", queue=bus.queue_name)], description="InvalidTaskFormat: no")
    await bus.send([*bodies_of(bus, "store"), bodies_of(bus, "fetch")[0]._replace(due=time.time() + 3600)])
    counts = await bus.counts_by_task()
    states = {name: (each.active, each.scheduled, each.dead_letter) for name, each in counts.items()}
    assert states == {"fetch": (0, 1, 2), "store": (1, 0, 0), "": (0, 0, 1)}
    last_errors = {name: each.last_error for name, each in counts.items()}
    assert last_errors == {"fetch": "ValueError: the last", "store": None, "": "InvalidTaskFormat: no"}
    assert [name for name, each in counts.items() if each.oldest is not None] == ["store"]
    assert all(each.exact for each in counts.values())


async def test_a_look_begins_at_a_sequence_number(operated_bus):
    bus = operated_bus()
    await bus.send(bodies_of(bus, *"abcd"))
    numbers = numbers_of(await bus.peek())
    assert numbers_of(await bus.peek(2, sequence_number=numbers[1])) == numbers[1:3]
    assert numbers_of(await bus.peek(sequence_number=numbers[2])) == numbers[2:]
    for beyond in (numbers[3] + 1, 2**63 - 1, 2**63, 2**70):
        assert await bus.peek(sequence_number=beyond) == []
    assert numbers_of(await bus.peek(sequence_number=-5)) == numbers
    with pytest.raises(UsageError, match=r"sequence_number='1'"):
        await bus.peek(sequence_number="1")


async def test_a_message_says_its_state_and_its_task(operated_bus):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, "fetch"), traceback="Traceback (most recent call last): é")
    await bus.send([letter("no task", queue=bus.queue_name), letter("{}", queue=bus.queue_name, due=time.time() + 600)])
    [dead] = await bus.peek(dead_letter=True)
    active, scheduled = await bus.peek()
    assert [each.state for each in (dead, active, scheduled)] == ["dead_letter", "active", "scheduled"]
    assert (dead.task.function_name, dead.task.args, active.task) == ("fetch", [0], None)
    assert (dead.dead_letter_reason, dead.dead_letter_error_description) == ("TaskFailed", "ValueError: no")
    assert dead.dead_letter_traceback == "Traceback (most recent call last): é"
    assert dead.application_properties == {}
    assert active.dead_letter_traceback is None


async def test_a_worker_leaves_the_end_of_the_traceback_with_the_dead_letter(operated_bus):
    app = Boilermaker(None, operated_bus())

    @app.task
    async def fails(state):
        try:
            raise KeyError("x" * 5000)
        except KeyError as error:
            raise IndexError("the cause") from error

    await fails.delay()
    await work_off(app)
    [dead] = await app.service_bus_client.peek(dead_letter=True)
    assert dead.dead_letter_error_description == "IndexError: the cause"
    assert dead.dead_letter_traceback.endswith("IndexError: the cause\n")
    assert len(dead.dead_letter_traceback) == boilermaker.MAX_DESCRIPTION_LENGTH


async def test_a_replay_runs_what_matches_again_and_leaves_the_rest_as_it_was(operated_bus):
    app = Boilermaker([], operated_bus())
    bus = app.service_bus_client

    @app.task
    async def fetch(state, number):
        state.append((number, current_task().attempts.attempts))

    await bury(bus, bodies_of(bus, *["fetch", "store"] * 5, attempts=tried(3)), reason="RetriesExhausted")
    before = await bus.peek(dead_letter=True)
    replayed = await bus.replay(is_named("fetch"))
    assert numbers_of(replayed) == numbers_of(filter(is_named("fetch"), before))
    assert await bus.peek(dead_letter=True) == list(filter(is_named("store"), before))
    assert not {message.message_id for message in await bus.peek()} & {message.message_id for message in before}
    await work_off(app)
    assert sorted(app.state) == [(number, 0) for number in range(0, 10, 2)]
    assert await bus.replay(is_named("fetch")) == []


async def test_what_a_replay_would_do_is_told_without_doing_it(operated_bus):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, *"abca"))
    await bus.send(bodies_of(bus, *"aba"))
    dead, waiting = await bus.peek(dead_letter=True), await bus.peek()
    for operation, messages in ((bus.replay, dead), (bus.discard, dead), (bus.purge, waiting)):
        asked_for = [message for message in messages if is_named("a")(message)]
        assert await operation(is_named("a"), dry_run=True) == asked_for
        assert await operation(numbers_of(asked_for), dry_run=True) == asked_for
        assert await operation([], dry_run=True) == await operation([]) == await operation([10**15]) == []
    assert await bus.peek(dead_letter=True) == dead
    assert await bus.peek() == waiting


async def test_dead_letters_are_replayed_and_discarded_by_number(operated_bus):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, *"abcde"))
    numbers = numbers_of(await bus.peek(dead_letter=True))
    assert names_of(await bus.replay(iter([numbers[3], numbers[1], numbers[1], 2**70]))) == ["b", "d"]
    assert names_of(await bus.discard({numbers[2]})) == ["c"]
    assert names_of(await bus.peek()) == ["b", "d"]
    assert names_of(await bus.peek(dead_letter=True)) == ["a", "e"]


async def test_what_waits_and_what_is_scheduled_is_purged(operated_bus):
    bus = operated_bus()
    later = time.time() + 3600
    scheduled = [message._replace(due=later) for message in bodies_of(bus, *["fetch", "store"] * 3)]
    await bus.send([*bodies_of(bus, *["fetch", "store"] * 3), *scheduled])
    before = await bus.peek()
    purged = await bus.purge(is_named("fetch"))
    assert purged == list(filter(is_named("fetch"), before))
    assert {message.state for message in purged} == {"active", "scheduled"}
    assert await bus.peek() == list(filter(is_named("store"), before))
    assert len(await bus.purge(numbers_of(before))) == 6
    assert await is_empty(bus)


async def test_a_purge_leaves_dead_letters_alone_and_a_discard_what_waits(operated_bus):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, "a"))
    await bus.send(bodies_of(bus, "a"))
    assert len(await bus.purge(anything)) == 1
    assert len(await bus.peek(dead_letter=True)) == 1
    await bus.send(bodies_of(bus, "a"))
    assert len(await bus.discard(anything)) == 1
    assert len(await bus.peek()) == 1


async def takes_time(message): ...


class TakesTime:
    async def __call__(self, message): ...


@pytest.mark.parametrize("operation", ["replay", "discard", "purge"])
@pytest.mark.parametrize(
    "which",
    [None, 3, "12", b"12", ["1"], [True], [1.0], takes_time, TakesTime(), lambda message: takes_time(message)],
    ids=repr,
)
async def test_what_says_not_which_messages_is_an_error_and_changes_nothing(operated_bus, operation, which):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, "a"))
    await bus.send(bodies_of(bus, "b"))
    before = await bus.peek(), await bus.peek(dead_letter=True)
    with pytest.raises(UsageError, match="which="):
        await getattr(bus, operation)(which)
    assert (await bus.peek(), await bus.peek(dead_letter=True)) == before


@pytest.mark.parametrize("operation", ["replay", "discard", "purge"])
async def test_an_error_in_the_question_which_messages_changes_nothing(operated_bus, operation):
    bus = operated_bus()
    await bury(bus, bodies_of(bus, *"ab"))
    await bus.send(bodies_of(bus, *"ab"))
    before = await bus.peek(), await bus.peek(dead_letter=True)

    def which(message):
        return message.task.function_name == "a" or 1 / 0

    with pytest.raises(ZeroDivisionError):
        await getattr(bus, operation)(which)
    assert (await bus.peek(), await bus.peek(dead_letter=True)) == before


@pytest.mark.parametrize("operation", ["replay", "discard", "purge"])
async def test_an_operation_says_how_far_it_is_in_the_event_loop(operated_bus, operation):
    bus = operated_bus()
    messages = bodies_of(bus, *["task"] * 600)
    await (bus.send(messages) if operation == "purge" else bury(bus, messages))
    said = []
    done = await getattr(bus, operation)(
        anything, on_progress=lambda count: said.append((count, threading.get_ident()))
    )
    assert len(done) == 600
    counts = [count for count, _ in said]
    assert counts == sorted(counts)
    assert len(counts) > 1
    assert counts[-1] == 600
    assert {thread for _, thread in said} == {threading.get_ident()}


async def test_application_properties_travel_with_a_replay(operated_bus):
    bus = operated_bus()
    [message] = bodies_of(bus, "a")
    await bury(bus, [message._replace(application_properties={"traceparent": "00-1-2-01", "é": "ü"})])
    await bus.replay(anything)
    [again] = await bus.peek()
    assert again.application_properties == {"traceparent": "00-1-2-01", "é": "ü"}
    assert (again.dead_letter_reason, again.dead_letter_error_description) == (None, None)


async def test_the_bus_of_a_dead_letter_queue_replays_and_discards_what_is_in_it(operated_bus):
    bus = operated_bus()
    bus_of_dead_letters = operated_bus(f"{bus.queue_name}{boilermaker.DEAD_LETTER_SUFFIX}")
    await bury(bus, bodies_of(bus, *"abc"))
    await bus.send(bodies_of(bus, "d"))
    counts = await bus_of_dead_letters.counts()
    assert (counts.active, counts.scheduled, counts.dead_letter, counts.oldest) == (0, 0, 3, None)
    assert {name: each.dead_letter for name, each in (await bus_of_dead_letters.counts_by_task()).items()} == {
        "a": 1,
        "b": 1,
        "c": 1,
    }
    assert names_of(await bus_of_dead_letters.replay(is_named("a"))) == ["a"]
    assert names_of(await bus_of_dead_letters.discard(is_named("b"))) == ["b"]
    with pytest.raises(UsageError, match="discard"):
        await bus_of_dead_letters.purge(anything)
    with pytest.raises(MessageNotFound):
        await bus_of_dead_letters.cancel(1)
    assert names_of(await bus.peek()) == ["d", "a"]
    assert names_of(await bus.peek(dead_letter=True)) == ["c"]


async def test_a_replay_is_byte_for_byte_what_was_dead_lettered(new_bus):
    bus = new_bus()
    bodies = [body if isinstance(body, bytes) else body.encode() for body in BODIES_LEFT_AS_THEY_ARE]
    await bury(bus, [letter(body, message_id=str(place), queue=bus.queue_name) for place, body in enumerate(bodies)])
    assert len(await bus.replay(lambda message: True)) == len(bodies)
    assert await bus.peek(dead_letter=True) == []
    async with receiving(bus) as receiver:
        received = []
        while len(received) < len(bodies):
            received += await receiver.receive(10, PATIENCE)
    found = [each.body if isinstance(each.body, bytes) else each.body.encode() for each in received]
    assert sorted(found) == sorted(bodies)


async def test_a_dead_letter_whose_body_is_no_data_stays_what_it_is(azure_bus, emulator):
    from azure.servicebus.aio import ServiceBusClient
    from azure.servicebus.amqp import AmqpAnnotatedMessage

    bus = azure_bus()
    client = ServiceBusClient.from_connection_string(emulator.connection_string)
    async with client, client.get_queue_sender(bus.queue_name) as sender:
        await sender.send_messages(AmqpAnnotatedMessage(value_body={"a": 1}))
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        assert await settle(receiver, delivery, DEAD_LETTER, reason="R", description="D") is None
    with pytest.raises(boilermaker.OperationStopped, match="its body is an AMQP value, and would go back as text"):
        await bus.replay(lambda message: True)
    [dead] = await bus.peek(dead_letter=True)
    assert dead.dead_letter_reason == "R"
    assert len(await bus.discard(lambda message: True)) == 1


async def test_the_whole_chain_follows_a_replay_although_its_failure_was_followed(operated_bus):
    app = Boilermaker([], operated_bus())
    failures = 2

    @app.task
    async def first(state):
        state.append("first")
        return 1

    @app.task
    async def second(state, number):
        state.append("second")
        if len([name for name in state if name == "second"]) <= failures:
            raise ValueError("not yet")
        return number + 1

    @app.task
    async def third(state, number):
        state.append(f"third {number}")

    @app.task
    async def alert(state, failure):
        state.append(f"alert: {failure['message']}")

    await app.publish_task(app.chain(first.si(), second.s(), third.s(), on_failure=alert.s()))
    await work_off(app)
    assert app.state == ["first", "second", "alert: not yet"]
    for _ in range(failures):
        assert len(await app.service_bus_client.replay(anything)) == 1
        await work_off(app)
    assert app.state[3:] == ["second", "alert: not yet", "second", "third 2"]
    assert await app.service_bus_client.peek(dead_letter=True) == []


async def test_what_fails_again_while_others_are_replayed_is_not_replayed_twice(operated_bus):
    app = Boilermaker(Counter(), operated_bus())
    publisher = operated_bus(app.service_bus_client.queue_name)

    @app.task
    async def fails(state, number):
        state[number] += 1
        raise ValueError(number)

    await bury(publisher, bodies_of(publisher, *["fails"] * 600))
    async with working(app, concurrency=50):
        replayed = await publisher.replay(anything)
        await until(lambda: app.state.total() == 600)
    assert len(replayed) == 600
    assert set(app.state.values()) == {1}
    await until(lambda: is_empty(publisher))
    assert len(await publisher.peek(1000, dead_letter=True)) == 600


# ======================================================================================================================
# Azure bus: operating a queue
# ======================================================================================================================


async def test_what_the_service_does_not_count_is_peeked_at_and_said_to_be_inexact(azure_bus):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *["a"] * 3))
    counts = await bus.counts()
    assert (counts.dead_letter, counts.running, counts.exact) == (3, None, False)


async def test_counts_by_task_are_said_to_be_inexact_where_there_is_more_than_is_peeked_at(azure_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "COUNTED", 5)
    bus = azure_bus()
    await bus.send(bodies_of(bus, *["a"] * 4))
    assert (await bus.counts_by_task())["a"].exact
    await bus.send(bodies_of(bus, *["b"] * 4))
    counts = await bus.counts_by_task()
    assert {name: (each.active, each.exact) for name, each in counts.items()} == {"a": (4, False), "b": (1, False)}


async def test_a_look_goes_on_where_the_service_gives_no_more_at_once(azure_bus):
    bus = azure_bus()
    await bus.send(bodies_of(bus, *["a"] * 600))
    messages = await bus.peek(1000)
    assert len(messages) == 600
    assert numbers_of(messages) == sorted(numbers_of(messages))
    assert messages[:550] == await bus.peek(550)
    assert len(await bus.purge(numbers_of(messages)[::3])) == 200


async def test_a_look_goes_on_over_another_link_when_one_is_worn_out(azure_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "MAX_REQUESTS", 2)
    monkeypatch.setattr(boilermaker, "PEEKED_AT_ONCE", 3)
    bus = azure_bus()
    await bus.send([message._replace(due=time.time() + 3600) for message in bodies_of(bus, *"abcdefghijklmnop")])
    assert "".join(names_of(await bus.peek())) == "abcdefghijklmnop"
    monkeypatch.setattr(boilermaker, "TAKEN_AT_ONCE", 2)
    assert len(await bus.purge(anything)) == 16


async def test_the_traceback_is_cut_where_the_dead_letter_would_be_too_large(azure_bus):
    bus = azure_bus()
    for size, length in ((250_000, 9_000), (260_000, 1_600), (261_600, 0)):
        await bury(bus, [letter("x" * size, message_id=str(size), queue=bus.queue_name)], traceback="é" * 4_500)
        [dead] = await bus.discard(anything)
        assert abs(len((dead.dead_letter_traceback or "").encode()) - length) < 100
        assert dead.dead_letter_reason == "TaskFailed"


async def test_a_dead_letter_of_a_lost_link_has_its_traceback_too(azure_bus, emulator):
    bus = azure_bus()
    await bus.send(bodies_of(bus, "a"))
    async with receiving(bus) as receiver:
        [delivery] = await receiver.receive(1, PATIENCE)
        emulator.control("drop")
        error = await settle(receiver, delivery, DEAD_LETTER, reason="R", description="D", traceback="T")
        assert error is None
    [dead] = await bus.peek(dead_letter=True)
    found = dead.dead_letter_reason, dead.dead_letter_error_description, dead.dead_letter_traceback
    assert found == ("R", "D", "T")


async def test_another_release_of_the_sdk_dead_letters_without_the_traceback(azure_bus, monkeypatch):
    from azure.servicebus.aio import ServiceBusReceiver

    bus = azure_bus()
    with monkeypatch.context() as patch:
        patch.delattr(ServiceBusReceiver, "_settle_message_via_mgmt_link")
        await bury(bus, bodies_of(bus, "a"))
    [dead] = await bus.peek(dead_letter=True)
    assert (dead.dead_letter_reason, dead.dead_letter_traceback) == ("TaskFailed", None)


async def test_the_connection_string_of_one_queue_will_do_for_its_dead_letters(emulator, azure_bus):
    queue = azure_bus().queue_name
    bus = AzureServiceBus.from_connection_string(f"{emulator.connection_string}EntityPath={queue}", queue)
    await bury(bus, bodies_of(bus, *"abc"))
    assert names_of(await bus.replay(is_named("a"))) == ["a"]
    assert names_of(await bus.discard(is_named("b"))) == ["b"]
    assert names_of(await bus.purge(anything)) == ["a"]
    counts = await bus.counts()
    assert (counts.active, counts.dead_letter) == (0, 1)
    await bus.close()


async def test_nothing_is_locked_where_nothing_matches(azure_bus, monkeypatch):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *"abc"))
    monkeypatch.setattr(boilermaker.AzureReceiver, "open", None)
    assert await bus.replay(is_named("x")) == await bus.discard([1]) == await bus.purge(anything) == []


async def test_what_an_operation_held_goes_back_at_once_and_as_if_nobody_had_received_it(azure_bus, emulator):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *["a"] * 300, "b"))
    before = [message for message in await bus.peek(1000, dead_letter=True) if is_named("a")(message)]
    assert len(await bus.replay(is_named("b"))) == 1
    assert await bus.peek(1000, dead_letter=True) == before
    assert len(await bus.discard(anything)) == 300
    assert len(await bus.purge(anything)) == 1
    await bus.send(bodies_of(bus, *["a"] * 5, "b", "a"))
    assert len(await bus.purge(numbers_of(await bus.peek())[-2:])) == 2
    assert [message.delivery_count for message in await bus.peek()] == [0] * 5
    async with receiving(bus) as receiver:
        assert len(await receiver.receive(1, 0) + await receiver.receive(10, 0)) == 5
    assert emulator.control("stats")["locked"] == 5


async def test_a_purge_that_meets_others_again_and_again_kills_none_of_them(azure_bus):
    bus = azure_bus()
    await bus.send(bodies_of(bus, "a"))
    for _ in range(12):  # the service's limit is ten deliveries
        await bus.send(bodies_of(bus, "b"))
        assert names_of(await bus.purge(is_named("b"))) == ["b"]
    assert names_of(await bus.peek()) == ["a"]


async def test_more_than_it_may_hold_stops_an_operation_which_says_what_it_did(azure_bus, monkeypatch):
    monkeypatch.setattr(boilermaker, "MAX_HELD", 10)
    monkeypatch.setattr(boilermaker, "TAKEN_AT_ONCE", 4)
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *"aabaaaaaaaa", *"bb"))
    assert names_of(await bus.replay(is_named("b"))) == ["b"] * 3
    assert names_of(await bus.purge(anything)) == ["b"] * 3
    await bury(bus, bodies_of(bus, *"baaaaaaaaab"))
    with pytest.raises(boilermaker.OperationStopped, match=r"1 of 2 .*over 10 others come before") as caught:
        await bus.replay(is_named("b"))
    assert names_of(caught.value.messages) == ["b"]
    assert names_of(await bus.peek()) == ["b"]
    assert names_of(await bus.peek(dead_letter=True)) == ["a"] * 19 + ["b"]
    with pytest.raises(boilermaker.OperationStopped, match="0 of 1"):
        await bus.replay(is_named("b"))
    assert len(await bus.discard(is_named("a"))) == 19
    assert names_of(await bus.replay(is_named("b"))) == ["b"]


async def test_the_locks_of_what_is_held_are_renewed(azure_bus, monkeypatch):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *["a"] * 300, "b"))
    before = [message for message in await bus.peek(1000, dead_letter=True) if is_named("a")(message)]
    renew, complete, renewed = boilermaker.AzureLink.renew, boilermaker.AzureReceiver.complete, Counter()

    async def counted(link, raws, timeout):
        ends = await renew(link, raws, timeout)
        renewed.update(raw.sequence_number for raw in raws)
        return ends

    async def late(receiver, settlements):
        if settlements:  # then over one and a half locks later
            await until(lambda: all(renewed[delivery.sequence_number] >= 3 for delivery in receiver._locks))
        await complete(receiver, settlements)

    monkeypatch.setattr(boilermaker.AzureLink, "renew", counted)
    monkeypatch.setattr(boilermaker.AzureReceiver, "complete", late)
    assert names_of(await bus.discard(is_named("b"))) == ["b"]
    assert len(renewed) > 200
    assert await bus.peek(1000, dead_letter=True) == before


async def test_what_was_held_and_lost_its_lock_stays_what_it_was(azure_bus, emulator):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *"aaabaab"))

    def steal(count):
        if count == 1:
            emulator.control("steal all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boilermaker, "TAKEN_AT_ONCE", 4)
        assert names_of(await bus.replay(is_named("b"), on_progress=steal)) == ["b", "b"]
    assert names_of(await bus.peek()) == ["b", "b"]
    dead = await bus.peek(dead_letter=True)
    assert names_of(dead) == ["a"] * 5
    assert {message.dead_letter_reason for message in dead} == {"TaskFailed"}


async def until_done(operation, *arguments):
    """An operation, called again for as long as it is stopped; all that it did."""
    deadline, done = time.monotonic() + PATIENCE, []
    while time.monotonic() < deadline:
        try:
            return done + await operation(*arguments)
        except ServiceBusUnavailable as stopped:
            done += getattr(stopped, "messages", [])
        await asyncio.sleep(0.1)
    raise AssertionError(f"{operation} was stopped for {PATIENCE} s")


@pytest.mark.parametrize("fault", ["drop", "detach", "expire", "lose 1", "busy 2", "steal all"])
async def test_whatever_goes_wrong_a_replay_loses_nothing_and_repeats_nothing(azure_bus, emulator, fault, monkeypatch):
    for name, value in {"TAKEN_AT_ONCE": 20, "ATTEMPT_TIMEOUT": 2, "CLOSE_TIMEOUT": 1}.items():
        monkeypatch.setattr(boilermaker, name, value)
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *["a", "b"] * 60))
    dead = await bus.peek(1000, dead_letter=True)
    faults = iter([fault] * 3)

    def disturb(count):
        for one in itertools.islice(faults, 1):
            with contextlib.suppress(ValueError):  # nothing is locked
                emulator.control(one)

    replayed = await until_done(bus.replay, is_named("a"), False, disturb)
    emulator.control("lose 0")
    assert len(numbers_of(replayed)) == len(set(numbers_of(replayed))) <= 60
    expected = [boilermaker.replay_of(message).message_id for message in filter(is_named("a"), dead)]
    assert sorted(await ids_of(bus)) == sorted(expected)
    left = await bus.peek(1000, dead_letter=True)
    assert numbers_of(left) == numbers_of(filter(is_named("b"), dead))
    assert {message.dead_letter_error_description for message in left} == {"ValueError: no"}


@pytest.mark.parametrize("fault", ["drop", "busy 2", "steal all"])
async def test_whatever_goes_wrong_a_purge_deletes_what_it_should_and_nothing_else(
    azure_bus, emulator, fault, monkeypatch
):
    monkeypatch.setattr(boilermaker, "TAKEN_AT_ONCE", 20)
    bus = azure_bus()
    later = [message._replace(due=time.time() + 3600) for message in bodies_of(bus, *["a", "b"] * 30)]
    await bus.send(bodies_of(bus, *["a", "b"] * 30) + later)
    faults = iter([fault] * 3)

    def disturb(count):
        for one in itertools.islice(faults, 1):
            with contextlib.suppress(ValueError):
                emulator.control(one)

    async def purged():
        await until_done(bus.purge, is_named("a"), False, disturb)
        return len(await bus.peek(1000)) == 60

    await until(purged)
    emulator.control("lose 0")
    emulator.control("busy 0")
    assert set(names_of(await bus.peek(1000))) == {"b"}


async def test_a_replay_that_is_cancelled_gives_back_what_it_held(azure_bus, emulator):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *["b", "a"] * 200))
    dead = await bus.peek(1000, dead_letter=True)
    operation = None

    def cancel(count):
        operation.cancel()

    for _ in range(2):
        operation = asyncio.create_task(bus.replay(is_named("a"), False, cancel))
        await asyncio.wait([operation], timeout=PATIENCE)
        assert operation.cancelled()
    assert emulator.control("stats")["locked"] == 0
    replayed = len(await bus.peek(1000))
    assert 0 < replayed < 200
    left = await bus.peek(1000, dead_letter=True)
    assert len(left) == 400 - replayed
    assert [message for message in left if is_named("b")(message)] == list(filter(is_named("b"), dead))
    assert len(await bus.replay(is_named("a"))) == 200 - replayed
    assert len(set(await ids_of(bus))) == 200


async def test_a_replay_says_that_somebody_else_holds_what_is_left(azure_bus):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *"aaa"))
    async with receiving(azure_bus(f"{bus.queue_name}{boilermaker.DEAD_LETTER_SUFFIX}")) as other:
        [held] = await other.receive(1, PATIENCE)
        with pytest.raises(boilermaker.OperationStopped, match=r"2 of 3 .*another receiver") as caught:
            await bus.replay(anything)
        assert len(caught.value.messages) == 2
        assert await settle(other, held, ABANDON) is None
    assert numbers_of(await bus.replay(anything)) == [held.sequence_number]


async def test_what_a_worker_holds_stays_when_the_queue_is_purged(azure_bus):
    bus = azure_bus()
    await bus.send(bodies_of(bus, *"aaa"))
    async with receiving(azure_bus(bus.queue_name)) as worker:
        [held] = await worker.receive(1, PATIENCE)
        await bus.send(bodies_of(bus, *"b"))
        assert names_of(await bus.purge(is_named("a"))) == ["a", "a"]
        assert names_of(await bus.peek()) == ["a", "b"]
        assert await settle(worker, held) is None


async def test_what_becomes_due_while_a_queue_is_purged_is_purged_too(azure_bus, monkeypatch):
    bus = azure_bus()
    await bus.send(bodies_of(bus, *"ab"))
    later = bodies_of(bus, *"aaaa")
    await bus.send([message._replace(due=time.time() + 3600) for message in later[:2]])
    await bus.send([later[2]._replace(due=time.time() + 1.5)])
    await bus.send([later[3]._replace(due=time.time() + 7200)])
    cancel = boilermaker.AzureOperation.cancel

    async def cancel_later(operation):
        await until(lambda: no_more_scheduled_than(bus, 3))
        return await cancel(operation)

    monkeypatch.setattr(boilermaker.AzureOperation, "cancel", cancel_later)
    assert len(await bus.purge(is_named("a"))) == 5
    assert names_of(await bus.peek()) == ["b"]


async def no_more_scheduled_than(bus, count):
    return (await bus.counts()).scheduled <= count


def nearly_too_large(size):
    """A task of so many bytes that was tried, and does not say when: its replay does, and so has some 50 more."""
    payload, attempts = {"args": [""]}, {"attempts": 1}
    task = {"task_id": "large", "function_name": "a", "payload": payload, "attempts": attempts}
    payload["args"] = ["x" * (size - len(boilermaker._to_json(task)))]
    return boilermaker._to_json(task)


@pytest.mark.parametrize("unaware", [False, True], ids=["by us", "by the service"])
async def test_a_replay_that_is_too_large_stays_a_dead_letter_and_the_others_are_replayed(azure_bus, unaware):
    bus = azure_bus()
    bus.max_message_bytes = 10**6 if unaware else bus.max_message_bytes
    text = nearly_too_large(262_080 if unaware else 261_600)
    large = letter(text, message_id="large", queue=bus.queue_name)
    assert bus.size(large) <= bus.max_message_bytes
    [first, last] = bodies_of(bus, *"aa")
    await bury(bus, [first, large, last], traceback="")
    before = await bus.peek(dead_letter=True)
    with pytest.raises(boilermaker.OperationStopped, match=r"2 of 3 .* 1 were refused") as caught:
        await bus.replay(anything)
    assert len(caught.value.messages) == 2
    assert isinstance(caught.value.__cause__, MessageTooLarge)
    assert before[1].message_id == "large"
    assert await bus.peek(dead_letter=True) == before[1:2]


async def test_a_replay_with_a_wrong_setting_is_an_error_that_says_what_to_do(emulator):
    bus = AzureServiceBus.from_connection_string(wrong_key(emulator.connection_string), QUEUES[0])
    for operation in (bus.replay, bus.discard, bus.purge):
        with pytest.raises(ConfigurationError, match="check the key"):
            await operation(anything)
    await bus.close()


async def test_no_answer_stops_a_replay(impatient, monkeypatch):
    for name, value in {"OPERATION_PATIENCE": 1, "ATTEMPT_TIMEOUT": 1, "CLOSE_TIMEOUT": 1}.items():
        monkeypatch.setattr(boilermaker, name, value)
    with service_bus(queues=["tasks"], duplicate_detection=600) as emulator:
        bus = AzureServiceBus.from_connection_string(emulator.connection_string, "tasks")
        await bury(bus, bodies_of(bus, *["a"] * 300))
        with pytest.raises(boilermaker.OperationStopped, match=r"of 300 messages: .*"):
            await bus.replay(anything, on_progress=lambda count: emulator.control("refuse 600\ndrop"))
        await bus.close()


REPLAY_AND_DIE = """
import asyncio, os, signal, sys
import boilermaker

complete, left = boilermaker.AzureLink.complete, int(sys.argv[3])

async def complete_and_die(link, raws):
    global left
    left -= 1
    if not left:
        await complete(link, raws[: int(sys.argv[4])])
        os.kill(os.getpid(), signal.SIGKILL)
    await complete(link, raws)

async def main():
    bus = boilermaker.AzureServiceBus.from_connection_string(sys.argv[1], sys.argv[2])
    await bus.replay(lambda message: message.task.function_name == "a")

boilermaker.TAKEN_AT_ONCE = 20
boilermaker.AzureLink.complete = complete_and_die
asyncio.run(main())
"""


@pytest.mark.parametrize(("batch", "deleted"), [(1, 1), (2, 1), (3, 7), (4, 100)])
async def test_a_replay_that_is_killed_between_publishing_and_deleting_goes_on_when_it_is_called_again(
    azure_bus, emulator, start_program, batch, deleted
):
    bus = azure_bus()
    await bury(bus, bodies_of(bus, *["a", "b"] * 60))
    dead = await bus.peek(1000, dead_letter=True)
    program = start_program(REPLAY_AND_DIE, emulator.connection_string, bus.queue_name, batch, deleted)
    assert await exit_code(program) == -signal.SIGKILL
    assert 0 < len(await bus.peek(1000)) <= 60
    assert len(await bus.peek(1000, dead_letter=True)) > 60
    await until_done(bus.replay, is_named("a"))
    expected = [boilermaker.replay_of(message).message_id for message in filter(is_named("a"), dead)]
    assert sorted(await ids_of(bus)) == sorted(expected)
    assert numbers_of(await bus.peek(1000, dead_letter=True)) == numbers_of(filter(is_named("b"), dead))


# -- exact counts, which the service tells over HTTPS

QUEUE_ENTRY = """<?xml version="1.0" encoding="utf-8"?>
<entry xmlns="http://www.w3.org/2005/Atom"><title type="text">{queue}</title><content type="application/xml">
<QueueDescription xmlns="http://schemas.microsoft.com/netservices/2010/10/servicebus/connect">
<MessageCount>9000</MessageCount>
<CountDetails xmlns:d="http://schemas.microsoft.com/netservices/2011/06/servicebus">
<d:ActiveMessageCount>{active}</d:ActiveMessageCount><d:DeadLetterMessageCount>4000</d:DeadLetterMessageCount>
<d:ScheduledMessageCount>3000</d:ScheduledMessageCount>
</CountDetails></QueueDescription></content></entry>"""


class AdministrationServer(ThreadingHTTPServer):
    """The HTTPS side of a namespace, which tells of 4,000 dead letters and 3,000 scheduled messages."""

    daemon_threads = True

    def __init__(self, certificate):
        super().__init__(("127.0.0.1", 0), AdministrationHandler)
        self.status, self.active, self.asked, self.answering = 200, 2000, [], threading.Event()
        self.answering.set()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)


class AdministrationHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path.partition("?")[0], self.headers["Authorization"]))
        self.server.answering.wait(PATIENCE)
        body = QUEUE_ENTRY.format(queue="tasks", active=self.server.active).encode()
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # who asked has gone
            self.send_response(self.server.status)
            self.send_header("Content-Type", "application/atom+xml")
            self.send_header("Content-Length", len(body))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments): ...


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for NAMESPACE that vouches for itself, and its key, in one file."""
    file, key = [str(tmp_path_factory.mktemp("tls") / name) for name in ("certificate.pem", "key.pem")]
    request = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={NAMESPACE} -addext subjectAltName=DNS:{NAMESPACE}"
    subprocess.run(["openssl", *request.split(), "-keyout", key, "-out", file], check=True, capture_output=True)
    with open(file, "a") as stream:
        stream.write(Path(key).read_text())
    return file


@pytest.fixture
async def namespace(certificate, emulator, impatient, monkeypatch):
    """A Service Bus under the name NAMESPACE: AMQP with TLS by the emulator, HTTPS; and what makes buses there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    administration = AdministrationServer(certificate)
    threading.Thread(target=administration.serve_forever, daemon=True).start()
    async with slow_proxy(emulator, 0, ssl=context) as connection_string:
        amqp = int(re.search(r"Endpoint=sb://127\.0\.0\.1:(\d+)", connection_string)[1])
        ports = {443: administration.server_port, 5671: amqp}
        look_up = socket.getaddrinfo

        def look_up_here(host, port, *arguments, **options):
            there = (host, port) != (NAMESPACE, port)
            return look_up(*((host, port) if there else ("127.0.0.1", ports[port])), *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
        secrets = connection_string.replace("UseDevelopmentEmulator=true;", "").partition(";")[2]
        buses = []

        def make(queue=None, **options):
            there = f"Endpoint=sb://{NAMESPACE}/;{secrets}"
            options = {"connection_verify": certificate} | options
            buses.append(AzureServiceBus.from_connection_string(there, queue or fresh_queue(), **options))
            return buses[-1]

        make.administration = administration
        yield make
        for bus in buses:
            await bus.close()
    administration.answering.set()
    administration.shutdown()
    administration.server_close()


async def test_counts_are_exact_where_the_service_tells_them(namespace):
    bus = namespace()
    await bus.send([bodies_of(bus, "a")[0]._replace(due=time.time() + 3600), *bodies_of(bus, *"bc")])
    for _ in range(2):
        counts = await bus.counts()
        assert (counts.active, counts.scheduled, counts.dead_letter) == (2000, 3000, 4000)
        assert (counts.running, counts.exact) == (None, True)
        assert 0 <= counts.oldest < 60
    assert [path for path, _ in namespace.administration.asked] == [f"/{bus.queue_name}"] * 2
    assert all(authorization.startswith("SharedAccessSignature") for _, authorization in namespace.administration.asked)
    of_dead_letters = namespace(f"{bus.queue_name}{boilermaker.DEAD_LETTER_SUFFIX}")
    counts = await of_dead_letters.counts()
    assert dataclasses.astuple(counts) == (0, None, 0, 4000, None, True)


class AsynchronousCredential:
    async def get_token(self, *scopes, **options):
        await asyncio.sleep(0)
        return AccessToken("asynchronous", time.time() + 3600)


class CredentialInAThread:
    def get_token(self, *scopes, **options):
        assert threading.current_thread() is not threading.main_thread()
        return AccessToken("in a thread", time.time() + 3600)


@pytest.mark.parametrize("credential", [AsynchronousCredential(), CredentialInAThread])
async def test_a_credential_may_ask_for_counts_too(namespace, certificate, credential):
    namespace.administration.active = 0
    bus = AzureServiceBus(NAMESPACE, "tasks", credential, connection_verify=certificate)
    assert dataclasses.astuple(await bus.counts()) == (0, None, 3000, 4000, None, True)
    assert "thread" in namespace.administration.asked[0][1] or "asynchronous" in namespace.administration.asked[0][1]
    await bus.close()
    assert (await bus.counts()).exact
    await bus.close()


@pytest.mark.parametrize("status", [401, 403, 404, 500])
async def test_who_may_not_ask_for_counts_is_not_made_to_wait_for_them_each_time(namespace, status, monkeypatch):
    namespace.administration.status = status
    bus = namespace()
    await bus.send(bodies_of(bus, *"ab"))
    for _ in range(3):
        counts = await bus.counts()
        assert (counts.active, counts.exact) == (2, False)
    assert len(namespace.administration.asked) == 1
    monkeypatch.setattr(bus._of_this_loop().administration, "_ask_from", 0)
    namespace.administration.status = 200
    assert (await bus.counts()).exact


async def test_no_answer_for_counts_is_waited_for_once(namespace, monkeypatch):
    monkeypatch.setattr(boilermaker, "ADMINISTRATION_TIMEOUT", 0.3)
    namespace.administration.answering.clear()
    bus = namespace()
    for _ in range(3):
        counts = await bus.counts()
        assert (counts.active, counts.exact) == (0, False)
    namespace.administration.answering.set()
    assert len(namespace.administration.asked) == 1


async def test_where_there_is_no_other_side_it_is_not_asked(namespace, azure_bus):
    assert not (await azure_bus().counts()).exact
    bus = namespace(custom_endpoint_address=f"sb://{NAMESPACE}:5671")
    assert await bus._of_this_loop().administration.counts(bus.queue_name) is None
    assert namespace.administration.asked == []


async def test_a_queue_that_is_not_there_cannot_be_counted(namespace):
    namespace.administration.status = 404
    with pytest.raises(ConfigurationError, match="There is no queue 'no-such-queue'"):
        await namespace("no-such-queue").counts()


# ======================================================================================================================
# boilermaker-servicebus: messages in both directions, by its own code
# ======================================================================================================================

ORIGINAL = "boilermaker-servicebus==1.4.1"

READ_AND_WRITE_AGAIN = """
import json, sys
from boilermaker.task import Task

def summary(task):
    return task and {
        "function_name": task.function_name,
        "payload": task.payload,
        "attempts": task.attempts.attempts,
        "policy": task.policy.model_dump(mode="json"),
        "flags": [task.should_dead_letter, task.acks_late],
        "on_success": summary(task.on_success),
        "on_failure": summary(task.on_failure),
    }

tasks = [Task.model_validate_json(body) for body in json.load(sys.stdin)]
json.dump([(summary(task), task.model_dump_json()) for task in tasks], sys.stdout)
"""

WRITE = """
import json, sys
from boilermaker import Boilermaker, NoRetry, RetryPolicy, Task
from boilermaker.retries import RetryMode

class State: ...

async def fetch(state, page, width=1): ...
async def store(state): ...
async def clean_up(state): ...

state = State()  # the original holds it by a weak reference
app = Boilermaker(state, None)
app.register_many_async([fetch, store, clean_up], policy=RetryPolicy.default())
plain = app.create_task(fetch, "Zoë", width=2)
chain = app.chain(Task.si(fetch, "a"), Task.si(store), on_failure=Task.si(clean_up))
retried = app.create_task(fetch, "b", policy=RetryPolicy(max_tries=3, delay=1, retry_mode=RetryMode.Linear))
retried.record_attempt()
once = app.create_task(store, policy=NoRetry())
once.acks_late, once.should_dead_letter = False, False
json.dump([task.model_dump_json() for task in (plain, chain, retried, once)], sys.stdout)
"""


@pytest.fixture(scope="session", autouse=True)
def installing_the_original(request, tmp_path_factory):
    """Begins to make an environment with boilermaker-servicebus, if a test will want it, while others run."""
    if not any("original" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("original")
    python = folder / "bin" / "python"
    command = f'"{sys.executable}" -m venv "{folder}" && "{python}" -m pip install --quiet {ORIGINAL}'
    with subprocess.Popen(command, shell=True, start_new_session=True) as installing:
        yield python, installing
        with contextlib.suppress(ProcessLookupError):
            os.killpg(installing.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def original(installing_the_original):
    """Runs programs with boilermaker-servicebus, in an environment of its own; gives what they print as JSON."""
    python, installing = installing_the_original
    assert installing.wait(300) == 0

    def run(program, documents=None):
        ended = subprocess.run(
            [python, "-c", program], input=json.dumps(documents), capture_output=True, text=True, check=True, cwd="/"
        )
        return json.loads(ended.stdout)

    return run


def workflows_of_ours():
    """A task for every field of the wire format, those that the original does not know included."""
    policies = [policy for _, policy in WIRE_POLICIES]
    retried = [named("retried", attempts=tried(number), policy=policy) for number, policy in enumerate(policies, 1)]
    again = named("again", policy=RetryPolicy(max_tries=9))
    retry = follow_up_of(again, Outcome.RETRY, error=RetryException("later", NoRetry()))
    chain = named("a", on_failure=named("f")) | named("b", queue="elsewhere") | named("c", on_failure=named("g"))
    return [
        named("plain", args=["Zoë ☃", None, 1.5, [1, {"a": True}]], kwargs={"width": 800}),
        named("options", should_dead_letter=False, acks_late=False, graph_id="g-1"),
        named("additions", acks_late=True, takes_result=True, root="r"),
        chain,
        retry,
        *retried,
    ]


def known_to_the_original(task):
    """The fields of a task that the original has, callbacks included."""
    if task is None:
        return None
    policy = task.retry_policy or task.policy or RetryPolicy.default()
    return {
        "function_name": task.function_name,
        "payload": task.payload,
        "attempts": task.attempts.attempts,
        "policy": {**dataclasses.asdict(policy), "retry_mode": policy.retry_mode.value},
        "flags": [task.should_dead_letter is not False, task.acks_late is not False],
        "on_success": known_to_the_original(task.on_success),
        "on_failure": known_to_the_original(task.on_failure),
    }


def test_the_original_reads_what_we_write_and_we_read_what_it_writes_of_that(original):
    tasks = workflows_of_ours()
    answers = original(READ_AND_WRITE_AGAIN, [encode(task, "q", "q") for task in tasks])
    assert len(answers) == len(tasks)
    for task, (read, written) in zip(tasks, answers, strict=True):
        again = decode(written, "q")
        assert read == known_to_the_original(task) == known_to_the_original(again)
        assert (again.task_id, again.graph_id) == (task.task_id, task.graph_id)


async def test_what_the_original_writes_runs_here(original, new_bus):
    app = Boilermaker(None, new_bus())
    ran = []

    @app.task
    async def fetch(state, page, width=1):
        ran.append(("fetch", page, width, current_task().attempts.attempts, current_task().policy.max_tries))
        if page == "a" and len(ran) > 4:
            raise ValueError

    @app.task
    async def store(state):
        ran.append(("store", current_task().acks_late, current_task().should_dead_letter))

    @app.task
    async def clean_up(state):
        ran.append(("clean_up",))

    bus = app.service_bus_client
    bodies = original(WRITE)
    await bus.send([boilermaker.Outgoing(body, boilermaker.new_task_id(), bus.queue_name) for body in bodies])
    await work_off(app)
    assert sorted(ran) == [
        ("fetch", "Zoë", 2, 0, 5),
        ("fetch", "a", 1, 0, 5),
        ("fetch", "b", 1, 1, 3),
        ("store", False, False),
        ("store", True, True),
    ]
    await bus.send([boilermaker.Outgoing(bodies[1], boilermaker.new_task_id(), bus.queue_name)])
    await work_off(app)
    assert ran[5:] == [("fetch", "a", 1, 0, 5), ("clean_up",)]


# ======================================================================================================================
# Tracing: with the real OpenTelemetry SDK
# ======================================================================================================================


@pytest.fixture(scope="session")
def exporter():
    """Where all spans of this process go: there can be only one provider."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def finished_spans(exporter):
    """Gives the spans that have ended, by when they began."""
    exporter.clear()
    return lambda: sorted(exporter.get_finished_spans(), key=lambda span: span.start_time)


def line_of(spans):
    """Names, functions and attempts of spans, each of which must be the child of the one before."""
    for parent, child in itertools.pairwise(spans):
        assert child.parent.span_id == parent.context.span_id
        assert child.context.trace_id == parent.context.trace_id
    return [
        (
            span.name.split()[0],
            span.attributes["boilermaker.function_name"],
            span.attributes["boilermaker.attempts"],
        )
        for span in spans
    ]


async def test_a_chain_with_a_retry_is_one_trace_from_its_publisher_on(new_bus, finished_spans):
    app = Boilermaker(None, new_bus(), enable_opentelemetry=True)
    ids = []

    @app.task(policy=RetryPolicy(max_tries=2, delay=0))
    async def fetch(state):
        ids.append(trace.get_current_span().get_span_context().span_id)
        if current_task().attempts.attempts == 0:
            raise RetryException("once more")

    @app.task
    async def store(state):
        ids.append(trace.get_current_span().get_span_context().span_id)

    with trace.get_tracer("test").start_as_current_span("request") as request:
        await app.publish_task(fetch.si() | store)
    await work_off(app)
    spans = [span for span in finished_spans() if span.name != "request"]
    assert spans[0].parent.span_id == request.get_span_context().span_id
    assert line_of(spans) == [
        ("publish", "fetch", 0),
        ("process", "fetch", 0),
        ("publish", "fetch", 1),
        ("process", "fetch", 1),
        ("publish", "store", 0),
        ("process", "store", 0),
    ]
    assert [span.kind for span in spans] == [SpanKind.PRODUCER, SpanKind.CONSUMER] * 3
    assert ids == [span.context.span_id for span in spans if span.kind is SpanKind.CONSUMER]
    assert [event.name for event in spans[1].events] == ["exception"]


async def test_a_tick_is_a_trace_from_the_worker_that_published_it_on(new_bus, finished_spans):
    app = Boilermaker(None, new_bus(), enable_opentelemetry=True)

    @app.task(every=SECOND)
    async def work(state): ...

    assert finished_spans() == []
    await work_off(app, schedules=True)
    processed = [span for span in finished_spans() if span.name == "process work"]
    published = {span.context.span_id: span for span in finished_spans() if span.name == "publish work"}
    assert processed
    for span in processed:
        [publishing] = line_of([published[span.parent.span_id], span])[:1]
        assert publishing == ("publish", "work", 0)
        assert span.attributes["messaging.message.id"].startswith("cron:work:")


async def test_spans_have_the_attributes_for_messaging(new_bus, finished_spans):
    app = Boilermaker(None, new_bus(), enable_opentelemetry=True)

    @app.task
    async def work(state):
        raise ValueError("the disk is full")

    task = await work.delay()
    [message] = await app.service_bus_client.peek()
    await work_off(app)
    bus = app.service_bus_client
    [publishing, processing] = finished_spans()
    for span, operation, kind in ((publishing, "publish", "send"), (processing, "process", "process")):
        assert span.name == f"{operation} work"
        assert span.attributes == {
            "messaging.system": "servicebus" if isinstance(bus, AzureServiceBus) else "boilermaker",
            "messaging.destination.name": bus.queue_name,
            "messaging.operation.name": operation,
            "messaging.operation.type": kind,
            "messaging.message.id": task.message_id,
            "boilermaker.function_name": "work",
            "boilermaker.task_id": task.task_id,
            "boilermaker.attempts": 0,
        }
    ids = f"{publishing.context.trace_id:032x}-{publishing.context.span_id:016x}"
    assert list(message.application_properties) == ["traceparent"]
    assert message.application_properties["traceparent"].startswith(f"00-{ids}-")
    assert (publishing.status.status_code, processing.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert processing.status.description == "ValueError: the disk is full"


async def test_what_is_not_published_as_another_is_wrong_has_no_span(local_bus, finished_spans):
    app = Boilermaker(None, local_bus(), enable_opentelemetry=True)

    @app.task
    async def work(state): ...

    wrong = work.si()
    wrong.task_id = ""
    with pytest.raises(UsageError, match="task_id=''"):
        await app.publish_many([work.si(), wrong])
    assert finished_spans() == []


async def test_without_tracing_there_are_no_spans_and_no_properties(local_bus, finished_spans):
    app = Boilermaker(None, local_bus())

    @app.task
    async def work(state): ...

    await work.delay()
    [message] = await app.service_bus_client.peek()
    await work_off(app)
    assert message.application_properties == {}
    assert finished_spans() == []


# ======================================================================================================================
# 15. Command line
# ======================================================================================================================

NIGHT_APP = """
from datetime import timedelta
from MODULE import Boilermaker, LocalServiceBus, RetryPolicy

app = Boilermaker(None, LocalServiceBus("night.db"))
not_an_app = 5


@app.task
async def resize(state, image, width=800):
    if image.startswith("lost"):
        raise FileNotFoundError(f"no such image: {image}")
    if width < 0:
        raise ValueError(f"width {width} of {image}")


@app.task
async def mail(state, address, *, subject="hello"):
    raise ConnectionError("no \\x1b[31mrelay\\nat all")


@app.task(every=timedelta(minutes=5))
async def tidy(state): ...
"""


@pytest.fixture
def night(tmp_path, monkeypatch):
    """A folder in which an application ran all night, and failed for three reasons."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"night{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(NIGHT_APP.replace("MODULE", "boilermaker"))
    app = importlib.import_module(name).app

    async def work_through_the_night():
        async with app:
            make = app.create_task
            resize, mail = (app.registration(each).function for each in ("resize", "mail"))
            lost = [make(resize, f"lost{number}.png") for number in range(3)]
            bad = [make(resize, "cat.png", -1), make(resize, "dog.png", width=-2)]
            await app.publish_many([*lost, *bad, make(mail, "ada@example.org", subject="<hi>")])
            await app.run(burst=True)
            await app.publish_task(make(resize, "later.png"), delay=3600)
            await app.publish_task(make(resize, "now.png"))

    asyncio.run(work_through_the_night())
    yield name
    sys.modules.pop(name, None)


def ran(capsys, *arguments):
    """The exit code of a command, and what it wrote to its two streams."""
    code = boilermaker.main([str(each) for each in arguments])
    return (code, *capsys.readouterr())


def rows_of(path, sql):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def numbers_listed(capsys, *arguments):
    code, out, _ = ran(capsys, "dead", "night.db", "list", "--json", *arguments)
    assert code == 0
    return [json.loads(line)["sequence_number"] for line in out.splitlines()]


@pytest.mark.parametrize("spelling", ["night.db", "night.db#tasks", "{app}:app", "{app}"])
def test_inspect_counts_by_state_and_by_task(night, capsys, spelling):
    bus = spelling.format(app=night)
    code, out, err = ran(capsys, "inspect", bus)
    assert (code, err) == (0, "")
    heading, columns, first, second = out.splitlines()
    assert re.fullmatch(
        rf"{re.escape(bus)}: 1 waiting, 0 running, 1 scheduled, 6 dead; the oldest waits for \d+ s", heading
    )
    assert columns.split() == ["TASK", "WAITING", "RUNNING", "SCHEDULED", "DEAD", "OLDEST", "LAST", "ERROR"]
    assert first.split()[:5] == ["resize", "1", "0", "1", "5"]
    assert re.search("(FileNotFoundError: no such image: lost|ValueError: width -)", first)  # all died in one moment
    assert second.split()[:5] == ["mail", "0", "0", "0", "1"]
    assert second.endswith(r"ConnectionError: no \x1b[31mrelay\nat all")


def test_inspect_gives_json_and_an_exit_code_for_dead_letters(night, capsys):
    code, out, _ = ran(capsys, "inspect", "night.db", "--json", "--fail-on-dead")
    assert code == 1
    counts = json.loads(out)
    assert {**counts, "tasks": None, "oldest": None} == {
        "active": 1,
        "running": 0,
        "scheduled": 1,
        "dead_letter": 6,
        "oldest": None,
        "exact": True,
        "tasks": None,
    }
    assert counts["tasks"]["mail"]["dead_letter"] == 1
    assert ran(capsys, "inspect", "night.db", "--task", "tidy", "--fail-on-dead")[0] == 0
    assert ran(capsys, "inspect", "night.db", "--task", "mail", "--fail-on-dead")[0] == 1
    assert "... and 1 more tasks: -n 2" in ran(capsys, "inspect", "night.db", "-n", 1)[1]


def test_dead_letters_are_listed_by_cause_and_one_by_one(night, capsys):
    code, out, err = ran(capsys, "dead", "night.db", "list")
    assert (code, err) == (0, "")
    causes, letters = out.split("\n\n")
    assert [" ".join(line.split()) for line in causes.splitlines()] == [
        "DEAD TASK REASON LAST ERROR",
        "3 resize TaskFailed FileNotFoundError: no such image: lost2.png",
        "2 resize TaskFailed ValueError: width -2 of dog.png",
        r"1 mail TaskFailed ConnectionError: no \x1b[31mrelay\nat all",
    ]
    assert len(letters.splitlines()) == 7
    assert re.search(r'1  20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ  resize  "lost0.png" ', letters)
    assert '"ada@example.org", subject="<hi>"' in letters
    assert "These are the last 2 of 6: --all shows all." in ran(capsys, "dead", "night.db", "list", "-n", 2)[1]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], [1, 2, 3, 4, 5, 6]),
        (["--task", "mail"], [6]),
        (["--error", "no such IMAGE"], [1, 2, 3]),
        (["--error", "width", "--task", "mail"], []),
        (["--reason", "TaskFailed", "--since", "1h", "--error", "lost1"], [2]),
        (["--reason", "Expired"], []),
        (["2", "4", "--error", "width"], [4]),
    ],
    ids=str,
)
def test_filters_combine(night, capsys, filters, expected):
    if "2" in filters:
        code, out, err = ran(capsys, "dead", "night.db", "list", "--json", *filters)
        assert code == 1
        assert "No such dead letter, or none that matches: 2" in err
        assert [json.loads(line)["sequence_number"] for line in out.splitlines()] == expected
    else:
        assert numbers_listed(capsys, *filters) == expected


def test_since_is_about_when_a_message_died(night, capsys):
    with moved_clock() as clock:
        clock.tick(7200)
        assert numbers_listed(capsys, "--since", "90m") == []
        assert numbers_listed(capsys, "--since", "3h") == [1, 2, 3, 4, 5, 6]


def test_a_dead_letter_is_shown_in_full(night, capsys):
    code, out, _ = ran(capsys, "dead", "night.db", "show", 6)
    assert code == 0
    for line in ("task: mail", "dead_letter_reason: TaskFailed", 'argument 1: "ada@example.org"', 'subject: "<hi>"'):
        assert line in out
    assert "    Traceback (most recent call last):" in out
    assert "\x1b" not in out
    assert ran(capsys, "dead", "night.db", "show")[0] == 2
    assert ran(capsys, "dead", "night.db", "show", 99)[0] == 1


def test_dead_letters_are_exported_one_json_object_a_line(night, capsys):
    code, out, _ = ran(capsys, "dead", "night.db", "export", "--task", "mail")
    [line] = out.splitlines()
    exported = json.loads(line)
    assert code == 0
    assert decode(exported["body"], "tasks").function_name == exported["task"] == "mail"
    assert exported["args"] == ["ada@example.org"]
    assert exported["kwargs"] == {"subject": "<hi>"}
    assert exported["dead_letter_traceback"].endswith("at all\n")
    assert datetime.datetime.fromisoformat(exported["dead_lettered_time_utc"]).tzinfo is not None


def test_those_of_one_cause_run_again_and_the_others_stay(night, capsys):
    dry = ran(capsys, "dead", "night.db", "replay", "--error", "no such image", "--dry-run")
    assert dry == (0, "3 of resize\n3 dead letters would be replayed.\n", "")
    code, out, err = ran(capsys, "dead", "night.db", "replay", "--error", "no such image")
    assert (code, out) == (2, "")
    assert "give --all, or their numbers, or --dry-run" in err
    code, out, err = ran(capsys, "dead", "night.db", "replay", "--error", "no such image", "--all")
    assert (code, out) == (2, "")
    assert "3 dead letters would be replayed: without a terminal to ask, give -y." in err
    assert numbers_listed(capsys) == [1, 2, 3, 4, 5, 6]
    replayed = ran(capsys, "dead", "night.db", "replay", "--error", "no such image", "--all", "-y")
    assert replayed == (0, "3 dead letters replayed.\n", "")
    assert numbers_listed(capsys) == [4, 5, 6]
    assert json.loads(ran(capsys, "inspect", "night.db", "--json")[1])["active"] == 4


def test_numbers_are_done_without_asking_and_those_that_are_gone_are_named(night, capsys):
    assert ran(capsys, "dead", "night.db", "discard", 2, 3) == (0, "2 dead letters discarded.\n", "")
    again = ran(capsys, "dead", "night.db", "discard", 3, 4)
    assert again == (1, "1 dead letter discarded.\n", "Not there, or not matching: 3\n")
    assert numbers_listed(capsys) == [1, 5, 6]


def test_filters_that_match_nothing_say_so(night, capsys):
    for command in (["dead", "night.db", "replay"], ["dead", "night.db", "discard"], ["purge", "night.db"]):
        code, out, _ = ran(capsys, *command, "--task", "unknown", "--all", "-y")
        assert code == 0
        assert re.fullmatch(r"No (dead letter|message) matches: nothing was done.\n", out)
    assert ran(capsys, "dead", "night.db", "list", "--task", "unknown") == (0, "No dead letter matches.\n", "")


def test_messages_are_published_cancelled_and_purged(night, capsys):
    code, out, _ = ran(capsys, "publish", night, "resize", '["a.png", 7]', "--delay", "60", "--task-id", "mine")
    assert (code, out) == (0, "Published resize task_id=mine sequence_number=9\n")
    code, out, _ = ran(capsys, "publish", "night.db", "anything", '{"queue": 1, "delay": 2}')
    assert code == 0
    assert out.startswith("Published anything task_id=")
    assert ran(capsys, "cancel", "night.db", 9) == (0, "9 cancelled.\n", "")
    code, out, err = ran(capsys, "cancel", "night.db", 9, 10)
    assert (code, out) == (1, "10 cancelled.\n")
    assert "sequence number 9" in err
    assert ran(capsys, "purge", "night.db", "--scheduled", "--all", "-y") == (0, "1 message deleted.\n", "")
    counts = json.loads(ran(capsys, "inspect", "night.db", "--json")[1])
    assert (counts["active"], counts["scheduled"], counts["dead_letter"]) == (1, 0, 6)
    assert ran(capsys, "purge", "night.db", "--all", "-y")[:2] == (0, "1 message deleted.\n")


def test_periodic_tasks_are_shown_with_their_next_times(night, capsys):
    code, out, _ = ran(capsys, "schedules", night, "-n", 2)
    assert code == 0
    assert re.fullmatch(r"tidy: every 0:05:00: 20\S+ \d\d:\d[05]:00 UTC, 20\S+ \d\d:\d[05]:00 UTC\n", out)


def test_to_look_neither_makes_nor_changes_a_file(night, capsys, tmp_path):
    bus = LocalServiceBus(tmp_path / "own.db", "own", max_delivery_count=3, duplicate_detection=77)
    asyncio.run(bus.send([letter(queue="own")]))
    asyncio.run(bus.close())
    before = rows_of(tmp_path / "own.db", "SELECT * FROM queue")
    assert ran(capsys, "publish", "own.db#own", "work")[0] == 0
    assert ran(capsys, "inspect", "own.db#own")[0] == 0
    assert rows_of(tmp_path / "own.db", "SELECT * FROM queue") == before
    assert ran(capsys, "inspect", "missing.db")[0] == 2
    assert not (tmp_path / "missing.db").exists()


def wrong_commands(app):
    return [
        (["inspect", "missing.db"], 2, r"there is no file 'missing.db'"),
        (["inspect", "night.db#other"], 2, r"'night.db' has no queue 'other'. There are: night.db#tasks"),
        (["inspect", "foreign.db"], 3, r"foreign.db is the database of another program"),
        (["inspect", "empty.db"], 2, r"'empty.db' is empty"),
        (["inspect", "text.db"], 3, r"text.db is not a SQLite database"),
        (["inspect", "azure"], 3, r"The Service Bus namespace is missing"),
        (["inspect", "nomodule:app"], 2, r"there is no module 'nomodule'"),
        (["inspect", "!"], 2, r"'!' is no file that is there, and no application"),
        (["worker", f"{app}:nothing"], 2, rf"module '{app}' has no attribute 'nothing'"),
        (["worker", f"{app}:not_an_app"], 2, r"is 5, and no Boilermaker application"),
        (["worker", f"{app}:app", "--processes", "2", "--reload"], 2, r"--reload is for one process"),
        (["publish", app, "unknown"], 2, r"no task 'unknown'; it has resize, mail, tidy"),
        (["publish", app, "resize"], 2, r"missing a required argument: 'image'"),
        (["publish", app, "resize", "{"], 2, r"ARGS_JSON '{' is no JSON"),
        (["publish", app, "resize", "5"], 2, r"must be an array, or an object"),
        (["publish", app, "resize", "[1]", "--task-id", "cron:x"], 2, r"task_id='cron:x'"),
    ]


def test_what_a_user_can_get_wrong_is_a_line_and_an_exit_code(night, capsys, tmp_path, monkeypatch):
    for name in ("SERVICE_BUS_NAMESPACE_URL", "SERVICEBUS_CONNECTION_STRING", "SERVICEBUS_FULLY_QUALIFIED_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    rows_of(tmp_path / "foreign.db", "CREATE TABLE t (x)")
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("no database at all " * 100)
    for command, expected, message in wrong_commands(night):
        code, out, err = ran(capsys, *command)
        assert (code, out) == (expected, ""), command
        assert re.search(message, err), (command, err)
        assert err.startswith(f"boilermaker {command[0]}: ")
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "the following arguments are required: BUS"),
        (
            ["dead", "x.db", "list", "--since", "2 hours"],
            "'2 hours' must be a number with its unit: 90s, 30m, 2h or 7d",
        ),
        (["worker", "app", "-c", "0"], "'0' must be a number over 0"),
        (["worker", "app", "--grace-period", "-1"], "'-1' must be seconds, 0 or more"),
        (["dead", "x.db", "revive"], "invalid choice: 'revive'"),
        (["publish", "x.db", "f", "--wait", "-1"], "'-1' must be seconds, 0 or more"),
        (["publish", "x.db", "f", "--wait", '["x"]'], """'["x"]' must be seconds, 0 or more"""),
    ],
    ids=str,
)
def test_a_wrong_command_line_shows_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        boilermaker.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_every_command_says_what_it_does_and_gives_an_example(capsys):
    commands = ["worker", "inspect", "dead", "publish", "cancel", "purge", "schedules"]
    for command in commands:
        with pytest.raises(SystemExit):
            boilermaker.main([command, "--help"])
        text = capsys.readouterr().out
        assert f"example: boilermaker {command} " in " ".join(text.split())
    with pytest.raises(SystemExit):
        boilermaker.main(["--help"])
    listed = re.findall(r"^    (\w+)\s+\S", capsys.readouterr().out, re.MULTILINE)
    assert listed == commands


def test_the_error_of_an_applications_own_code_is_shown_without_ours_around_it(night, capsys, tmp_path):
    for name, code, error in (
        ("broken_app", "def deep():\n    1 / 0\ndeep()", "ZeroDivisionError: division by zero"),
        ("needy_app", "import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("typo_app", "def f(:", "SyntaxError: invalid syntax"),
        ("wrong_app", "int('x')", "ValueError: invalid literal for int()"),
        ("leaving_app", "raise SystemExit('no settings')", "SystemExit: no settings"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
        exit_code, _, err = ran(capsys, "worker", name)
        assert exit_code == 2
        assert error in err
        assert "boilermaker.py" not in err.replace("boilermaker worker", "")
        assert "importlib" not in err
        assert err.endswith(f"boilermaker worker: {name} cannot be imported.\n")


def test_a_file_that_is_read_only_can_be_looked_at_but_not_changed(night, capsys, tmp_path, open_folder):
    shutil.copy(tmp_path / "night.db", open_folder / "night.db")
    (open_folder / "night.db").chmod(0o444)
    open_folder.chmod(0o555)
    with unprivileged():
        look = ran(capsys, "inspect", open_folder / "night.db")
        change = ran(capsys, "dead", open_folder / "night.db", "discard", 1)
    assert look[0] == 0
    assert "6 dead" in look[1]
    assert change[:2] == (3, "")
    assert re.search(r"night\.db (is read-only|cannot be opened): .* writable", change[2])


# -- as a process


def command_line(*arguments):
    return [sys.executable, str(MODULE), *map(str, arguments)]


@pytest.mark.parametrize("way", ["module", "script", "vendored module", "vendored script", "vendored, by another"])
def test_whatever_it_is_started_as_there_is_one_module(tmp_path, way):
    (tmp_path / "vendored").mkdir()
    shutil.copy(MODULE, tmp_path / "vendored" / "queueing.py")
    module = "vendored.queueing" if "vendored" in way else "boilermaker"
    (tmp_path / "night.py").write_text(NIGHT_APP.replace("MODULE", module))
    python, vendored = [sys.executable, "-B"], str(tmp_path / "vendored" / "queueing.py")
    command = {
        "module": [*python, "-m", "boilermaker"],
        "script": [*python, str(MODULE)],
        "vendored module": [*python, "-m", "vendored.queueing"],
        "vendored script": [*python, vendored],
        "vendored, by another": [*python, str(MODULE)],
    }[way]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE)
    environment = {**os.environ, "PYTHONPATH": str(MODULE.parent)}
    published = run([*command, "publish", "night", "resize", '["cat.png"]'], env=environment)
    assert (published.returncode, published.stderr) == (0, "")
    worked = run([*command, "worker", "night:app", "--burst"], env=environment)
    assert worked.returncode == 0
    assert "[resize] Completed Task" in worked.stderr
    assert worked.stdout == ""


WAITED_FOR_APP = """
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("waited.db"))


@app.task
async def add(state, *numbers, to=0):
    return {"sum": sum(numbers, to)}


@app.task(result_ttl=5)
async def keep(state, value):
    return value


@app.task
async def fail(state):
    raise ValueError("no \\x1b[31mrelay\\nat all")
"""


async def test_a_publish_waits_for_the_result_and_prints_it_as_json(tmp_path):
    (tmp_path / "waited.py").write_text(WAITED_FOR_APP)
    environment = {**os.environ, "PYTHONPATH": str(MODULE.parent)}

    async def publish(*arguments):
        process = await asyncio.create_subprocess_exec(
            *command_line("publish", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment,
        )
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        published, *rest = err.decode().splitlines()
        assert re.match(r"Published \w+ task_id=\S+ sequence_number=\d+$", published)
        return process.returncode, out.decode(), rest

    code, out, err = await publish("waited", "add", "[1]", "--wait", 0)
    assert (code, out) == (1, "")
    assert re.match(r"boilermaker publish: Task '\S+' has no outcome after 0.0 s: it waits or runs, ", err[0])
    with command_running(tmp_path, "worker", "waited"):
        answers = await asyncio.gather(
            publish("waited", "add", "[1, 2]", "--wait"),
            publish("waited.db", "add", '{"to": 4}', "--wait", PATIENCE),
            publish("waited.db", "keep", '["Zoë"]', "--task-id", "mine", "--wait"),
            publish("waited:app", "keep", "[null]", "--delay", "0.2", "--wait"),
        )
        assert answers == [
            (0, '{"sum": 3}\n', []),
            (0, '{"sum": 4}\n', []),
            (0, '"Zo\\u00eb"\n', []),
            (0, "null\n", []),
        ]
        for bus in ("waited", "waited.db"):
            code, out, [line] = await publish(bus, "fail", "--wait")
            assert (code, out) == (1, "")
            assert re.fullmatch(r"boilermaker publish: fail \S+: ValueError: no \\x1b\[31mrelay\\nat all", line)
        assert (await publish("waited.db", "unknown", "--wait"))[0] == 1
    kept = rows_of(tmp_path / "waited.db", "SELECT expires FROM outcome WHERE value = 'null'")
    assert kept[0][0] < time.time() + 6  # as the registration says, where there is one that says it


async def test_a_publish_that_is_interrupted_while_it_waits_leaves_the_task(night, tmp_path):
    with command_running(tmp_path, "publish", "night.db", "later", "--task-id", "mine", "--wait") as (process, log):
        await until(lambda: "Published later task_id=mine" in log.read_text())
        await asyncio.sleep(0.1)
        process.send_signal(signal.SIGINT)
        await until(lambda: process.poll() is not None, "the end")
        assert (process.returncode, "Traceback" in log.read_text()) == (130, False)
        assert "Interrupted" in log.read_text()
    [(function_name,)] = rows_of(tmp_path / "night.db", "SELECT function_name FROM message WHERE message_id = 'mine'")
    assert function_name == "later"


def test_the_command_looks_at_a_queue_through_a_pipe_that_is_closed_early(night, tmp_path):
    listing = shlex.join(command_line("dead", "night.db", "list"))
    piped = ["bash", "-o", "pipefail", "-c", f"{listing} | head -n 1"]
    run = subprocess.run(piped, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.stderr, run.returncode) == ("", 0)
    assert run.stdout.startswith("DEAD")


def on_a_terminal(command, cwd, answer, columns=60):
    """What a command prints on a terminal of so many columns, and its exit code, given an answer to its question."""
    its_end, our_end = pty.openpty()[::-1]
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        ["env", "-u", "COLUMNS", *command],
        cwd=cwd,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
        preexec_fn=take_the_terminal,
    )
    os.close(its_end)
    too_long = threading.Timer(PATIENCE, process.kill)
    too_long.start()
    shown = b""
    with contextlib.suppress(OSError):  # its end is closed
        while data := os.read(our_end, 65536):
            shown += data
            if answer is not None and b"[y/N]" in shown:
                threading.Thread(target=press, args=(process, our_end, answer)).start()
                answer = None
    os.close(our_end)
    too_long.cancel()
    return process.wait(PATIENCE), shown.decode().replace("\r\n", "\n")


def press(process, our_end, keys):
    """Ctrl-C again and again: Python does not see one that comes between its question and its wait for the answer."""
    os.write(our_end, keys)
    while keys == b"\x03" and process.poll() is None:
        time.sleep(0.5)
        if process.poll() is None:
            os.write(our_end, keys)


def take_the_terminal():
    """In a child: its terminal is that of its session, and Ctrl-C interrupts it, whatever it has inherited."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@pytest.mark.parametrize(
    ("answer", "code", "left", "says"),
    [
        (b"y\n", 0, 0, "6 dead letters replayed."),
        (b"\n", 0, 6, "Nothing was done."),
        (b"\x04", 0, 6, "Nothing was done."),  # Ctrl-D
        (b"\x03", 130, 6, "Interrupted"),  # Ctrl-C
    ],
    ids=["yes", "no", "Ctrl-D", "Ctrl-C"],
)
def test_on_a_terminal_it_asks(night, tmp_path, answer, code, left, says):
    command = command_line("dead", "night.db", "replay", "--all")
    exit_code_, shown = on_a_terminal(command, tmp_path, answer)
    assert exit_code_ == code
    assert "6 dead letters to be replayed. Go on? [y/N]" in shown
    assert says in shown
    assert ("6 of 6" in shown) == (left == 0)
    look = LocalServiceBus(tmp_path / "night.db")
    assert len(asyncio.run(look.peek(dead_letter=True))) == left


def test_on_a_terminal_no_line_is_longer_than_that_is_wide(night, tmp_path):
    _, shown = on_a_terminal(command_line("dead", "night.db", "list"), tmp_path, None, columns=70)
    assert max(map(len, shown.splitlines())) == 70
    assert "..." in shown


def test_a_replay_that_is_interrupted_leaves_nothing_half_done(tmp_path):
    bus = LocalServiceBus(tmp_path / "many.db")
    count = 30_000

    async def bury_many():
        await bus.send(
            [boilermaker.Outgoing(body_with(task_id=f"t{number}"), f"t{number}", "tasks") for number in range(count)]
        )
        await bus.close()

    asyncio.run(bury_many())
    with contextlib.closing(sqlite3.connect(tmp_path / "many.db")) as connection:
        connection.execute("INSERT INTO queue (name) VALUES ('tasks/$DeadLetterQueue')")
        connection.execute("UPDATE message SET queue_id = (SELECT max(queue_id) FROM queue), dead_letter_reason = 'x'")
        connection.commit()
    process = subprocess.Popen(
        command_line("dead", "many.db", "replay", "--all", "-y"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if asyncio.run(bus.counts()).active:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, 0)  # it may have been quicker
    assert "Traceback" not in err
    counts = asyncio.run(bus.counts())
    assert counts.active + counts.dead_letter == count
    again = subprocess.run(command_line("dead", "many.db", "replay", "--all", "-y"), cwd=tmp_path, check=False)
    assert again.returncode == 0
    assert asyncio.run(bus.counts()).active == count
    ids = {decode(message.body, "tasks").task_id for message in asyncio.run(bus.peek(2 * count))}
    assert len(ids) == count
    asyncio.run(bus.close())


@contextlib.contextmanager
def command_running(folder, *arguments):
    """A command in the background, and the file of its log."""
    log = folder / "command.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command_line(*arguments), cwd=folder, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        yield process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def test_worker_processes_are_started_again_when_they_die_and_end_by_a_signal(night, tmp_path):
    with command_running(tmp_path, "worker", night, "--processes", 2) as (supervisor, log):
        await until(lambda: log.read_text().count("INFO Worker started") == 2, "two workers")
        [first, _] = re.findall(r"Worker process (\d+) started", log.read_text())
        os.kill(int(first), signal.SIGKILL)
        await until(lambda: log.read_text().count("INFO Worker started") == 3, "a third worker")
        assert f"Worker process {first} died (exit code -9); another in 0.5 s" in log.read_text()
        supervisor.send_signal(signal.SIGTERM)
        await until(lambda: supervisor.poll() is not None, "the end")
        assert supervisor.returncode == 0
        assert log.read_text().count("INFO Worker ended") == 2


async def test_a_burst_of_several_processes_ends_and_one_that_cannot_begin_ends_all(night, tmp_path):
    with command_running(tmp_path, "worker", night, "--processes", 2, "--burst") as (supervisor, log):
        await until(lambda: supervisor.poll() is not None, "the end of a burst")
        assert (supervisor.returncode, "[resize] Completed Task" in log.read_text()) == (0, True)
    (tmp_path / "nowhere.py").write_text(NIGHT_APP.replace("MODULE", "boilermaker").replace("night.db", "no/folder.db"))
    with command_running(tmp_path, "worker", "nowhere", "--processes", 2) as (supervisor, log):
        await until(lambda: supervisor.poll() is not None, "the end of what cannot begin")
        assert supervisor.returncode == 3
        assert "no/folder.db cannot be opened" in log.read_text()


async def test_a_worker_is_started_again_when_its_code_changes_also_after_a_syntax_error(tmp_path):
    source = tmp_path / "changing.py"
    text = NIGHT_APP.replace("MODULE", "boilermaker") + "print('version 1', flush=True)\n"
    source.write_text(text)
    with command_running(tmp_path, "worker", "changing", "--reload", "--grace-period", 1) as (process, log):
        await until(lambda: "Worker started" in log.read_text(), "the first start")

        async def save(content, sign):
            async def saved():  # again, should the watch not have begun yet
                source.write_text(content)
                await asyncio.sleep(0.5)
                return sign in log.read_text()

            await until(saved, sign)

        await save(text.replace("version 1", "version 2"), "version 2")
        await save("def broken(:\n", "changing cannot be imported")
        await save(text.replace("version 1", "version 3"), "version 3")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None, "the end")
        assert process.returncode == 0


async def test_a_queue_on_azure_is_operated_by_the_same_commands(azure_bus, emulator, monkeypatch, capsys):
    bus = azure_bus()
    app = Boilermaker(None, bus)

    @app.task
    async def fail(state, number):
        raise ValueError(f"no {number}")

    await app.publish_many([fail.si(number) for number in range(3)])
    await work_off(app)
    environment = {**os.environ, "SERVICEBUS_CONNECTION_STRING": emulator.connection_string}
    environment.pop("SERVICE_BUS_NAMESPACE_URL", None)

    async def ran_on_azure(command, *arguments):
        process = await asyncio.create_subprocess_exec(
            *command_line(command, f"azure:{bus.queue_name}", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        return process.returncode, out.decode(), err.decode()

    code, out, err = await ran_on_azure("inspect", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tasks"]["fail"]["dead_letter"] == 3
    assert (await ran_on_azure("dead", "replay", "--error", "no 1", "--all", "-y"))[:2] == (
        0,
        "1 dead letter replayed.\n",
    )
    code, out, _ = await ran_on_azure("dead", "list", "--json")
    assert [json.loads(line)["args"] for line in out.splitlines()] == [[0], [2]]
    assert (await ran_on_azure("purge", "--all", "-y"))[:2] == (0, "1 message deleted.\n")


# ======================================================================================================================
# The page, probes and metrics
# ======================================================================================================================

ACTION = {"Boilermaker-Action": "test"}


@pytest.fixture(autouse=True)
def no_password_in_the_environment(monkeypatch):
    monkeypatch.delenv("BOILERMAKER_WEB_AUTH", raising=False)


@contextlib.asynccontextmanager
async def page_of(app_or_bus, **options):
    """A client of the page that is served beside."""
    options = {"has_worker": False} | options
    async with (
        dashboard.beside(app_or_bus, options.pop("address", "0"), **options) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


def shop_app(bus):
    """An application whose tasks fail in several ways, and which has a schedule."""
    app = Boilermaker(None, bus)

    @app.task
    async def resize(state, image, width=800):
        if image.startswith("lost"):
            raise FileNotFoundError(f"no such image: {image}")

    @app.task
    async def mail(state, address):
        raise ConnectionError("connection refused")

    @app.task(every=datetime.timedelta(minutes=5))
    async def tidy(state): ...

    app.resize, app.mail = resize, mail
    return app


async def shop_after_a_night(bus):
    """Its application after three resizes and two mails have failed, with two messages scheduled and one waiting."""
    app = shop_app(bus)
    await app.publish_many([app.resize.si(f"lost{number}.png", width=number) for number in range(3)])
    await app.publish_many([app.mail.si(f"{name}@example.org") for name in ("ada", "bob")])
    await work_off(app)
    await app.publish_task(app.resize.si("later.png"), delay=7200)
    await app.publish_task(app.mail.si("soon@example.org"), delay=3600)
    await app.publish_task(app.resize.si("now.png"))
    return app


async def shown_by(client, **query):
    """What the page shows, once all of it was read."""

    async def answer():
        shown = (await client.get("api", params=query)).json()
        return None not in shown.values() and shown

    return await until(answer, "an answer with all its parts")


def column(part, name):
    return [row[name] for row in part["rows"]]


async def test_the_page_shows_counts_tasks_messages_and_schedules(open_bus):
    app = await shop_after_a_night(open_bus())
    async with page_of(app) as client:
        shown = await shown_by(client)
    counts = shown["counts"]
    assert (counts["active"], counts["running"], counts["scheduled"], counts["dead_letter"]) == (1, 0, 2, 5)
    assert counts["oldest"] >= 0
    by_task = {row["task"]: (row["active"], row["scheduled"], row["dead_letter"]) for row in shown["tasks"]["rows"]}
    assert by_task == {"resize": (1, 1, 3), "mail": (0, 1, 2)}
    dead = shown["dead"]
    assert (dead["matching"], dead["complete"]) == (5, True)
    assert sorted(column(dead, "arguments")) == [
        '"ada@example.org"',
        '"bob@example.org"',
        *[f'"lost{number}.png", width={number}' for number in range(3)],
    ]
    assert column(dead, "time") == sorted(column(dead, "time"), reverse=True)
    assert set(column(dead, "reason")) == {"TaskFailed"}
    assert column(shown["scheduled"], "task") == ["mail", "resize"]  # what is due first comes first
    [schedule] = shown["schedules"]["rows"]
    assert (schedule["name"], schedule["task"], len(schedule["next"])) == ("tidy", "tidy", 3)
    assert (shown["queue"], shown["read_only"], shown["errors"]) == ("tasks", False, [])


async def test_the_filter_of_the_page_is_over_all(open_bus):
    app = await shop_after_a_night(open_bus())
    async with page_of(app) as client:
        shown = await shown_by(client, text="REFUSED")
        assert column(shown["dead"], "task") == ["mail", "mail"]
        assert (column(shown["tasks"], "task"), shown["scheduled"]["rows"], shown["schedules"]["rows"]) == (
            ["mail"],
            [],
            [],
        )
        shown = await shown_by(client, task="resize", text="lost1")
        assert column(shown["dead"], "arguments") == ['"lost1.png", width=1']
        assert (await shown_by(client, task="nobody"))["dead"]["matching"] == 0


async def test_the_page_turns_pages(open_bus):
    bus = open_bus()
    await bury(bus, bodies_of(bus, *["a"] * 60))
    async with page_of(bus) as client:
        pages = [(await shown_by(client, dead_from=start))["dead"] for start in (0, 25, 50, 9_999)]
        wrong = await client.get("api?dead_from=first")
    assert [len(page["rows"]) for page in pages] == [25, 25, 10, 10]
    assert len({number for page in pages for number in column(page, "number")}) == 60
    assert pages[3]["from"] == 50  # the last there is
    assert wrong.status_code == 400


async def test_one_message_is_shown_in_full(open_bus):
    bus = open_bus()
    await bury(bus, bodies_of(bus, "a"), description="ValueError: " + "x" * 1000)
    async with page_of(bus) as client:
        [row] = (await shown_by(client))["dead"]["rows"]
        full = (await client.get("api/message", params={"number": row["number"], "dead_letter": 1})).json()
        assert len(row["error"]) == dashboard.SHOWN
        assert (full["error"], full["traceback"]) == ("ValueError: " + "x" * 1000, "Traceback: no")
        assert json.loads(full["arguments"]) == {"args": [0], "kwargs": {}}
        for query, status in ({"number": row["number"]}, 404), ({"number": 99}, 404), ({"number": "x"}, 400), ({}, 400):
            assert (await client.get("api/message", params=query)).status_code == status


async def test_dead_letters_are_replayed_and_discarded_by_number_or_as_they_match(open_bus, caplog):
    app = await shop_after_a_night(bus := open_bus())
    caplog.set_level(logging.INFO, "boilermaker.dashboard")
    async with page_of(app) as client:

        async def post(action, **body):
            answer = await client.post(f"api/{action}", json=body, headers=ACTION)
            return answer.status_code, answer.json()["count"]

        first, second, *_ = [message.sequence_number for message in await bus.peek(dead_letter=True)]
        assert await post("replay", numbers=[first, str(second), 999]) == (200, 2)
        assert await post("replay", numbers=[first]) == (404, 0)
        assert await post("discard", matching={"task": "mail", "text": "ada"}) == (200, 1)
        assert column((await shown_by(client))["dead"], "arguments") == ['"bob@example.org"', '"lost2.png", width=2']
        assert await post("replay", matching={}) == (200, 2)
        assert (await shown_by(client))["counts"]["dead_letter"] == 0
        assert await post("discard", matching={"text": "nothing"}) == (200, 0)
    assert [len(task.args) for task in [message.task for message in await bus.peek()] if task] == [1] * 7
    lines = [record.getMessage() for record in caplog.records if "Page: " in record.getMessage()]
    assert lines[0].startswith(f"Page: replay [{first}, {second}, 999] by anybody (127.0.0.1): messages=2")
    assert len(lines) == 5


async def test_what_is_scheduled_is_cancelled_by_number_or_as_it_matches_and_nothing_else_is(open_bus):
    app = await shop_after_a_night(bus := open_bus())
    async with page_of(app) as client:
        soon = max(message.sequence_number for message in await bus.peek() if message.state == "scheduled")
        answer = await client.post("api/cancel", json={"numbers": [soon, 999]}, headers=ACTION)
        assert (answer.status_code, answer.json()["count"]) == (200, 1)
        answer = await client.post("api/cancel", json={"numbers": [soon]}, headers=ACTION)
        assert answer.status_code == 404
        answer = await client.post("api/cancel", json={"matching": {}}, headers=ACTION)
        assert (answer.status_code, answer.json()["count"]) == (200, 1)
        assert (await shown_by(client))["scheduled"]["rows"] == []
    assert [message.task.args for message in await bus.peek()] == [["now.png"]]
    assert (await bus.counts()).dead_letter == 5


BODIES = {
    "no JSON": b"numbers",
    "no text": b"\xff",
    "nothing": b"",
    "no object": b"[1]",
    "neither": b"{}",
    "something else": b'{"all": true}',
    "both": b'{"numbers": [1], "matching": {}}',
    "a number that is no list": b'{"numbers": 1}',
    "a float": b'{"numbers": [1.0]}',
    "a truth": b'{"numbers": [true]}',
    "a negative number": b'{"numbers": [-1]}',
    "a filter that is none": b'{"matching": "all"}',
    "a filter by something else": b'{"matching": {"reason": "TaskFailed"}}',
    "a filter by no text": b'{"matching": {"text": null}}',
    "nested without end": b"[" * 100_000,
    "too large": b'{"numbers": [' + b"1," * 1_000_000 + b"1]}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_body_that_is_wrong_is_refused_and_nothing_is_done(open_bus, body):
    bus = open_bus()
    await bury(bus, bodies_of(bus, "a"))
    async with page_of(bus) as client:
        answer = await client.post("api/discard", content=body, headers=ACTION)
        assert (answer.status_code, answer.json()["error"][:18]) == (400, "the body is wrong:")
    assert (await bus.counts()).dead_letter == 1


async def test_an_action_needs_the_header_that_no_foreign_page_can_send(open_bus):
    bus = open_bus()
    await bury(bus, bodies_of(bus, "a"))
    async with page_of(bus) as client:
        for action in ("replay", "discard", "cancel"):
            answer = await client.post(f"api/{action}", json={"matching": {}})
            assert answer.status_code == 403
            assert "Boilermaker-Action" in answer.json()["error"]
        preflight = await client.options(
            "api/discard", headers={"Access-Control-Request-Headers": "boilermaker-action"}
        )
        assert not any(name.startswith("access-control") for name in preflight.headers)
    assert (await bus.counts()).dead_letter == 1


async def test_who_comes_by_a_foreign_name_is_refused_but_for_probes(open_bus):
    async with page_of(bus := open_bus(), allow_hosts=["Tasks.Example.org"]) as client:
        port = client.base_url.port

        async def status(host, path, method="GET"):
            return (await client.request(method, path, headers={"Host": host} | ACTION)).status_code

        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            for path in ("/", "api", "api/message", "nowhere"):
                assert await status(host, path) == 403, (host, path)
            assert await status(host, "api/replay", "POST") == 403
            assert [await status(host, path) for path in ("healthz", "readyz", "metrics")] == [200] * 3
        for host in (
            "localhost",
            f"localhost:{port}",
            "127.0.0.1",
            f"[::1]:{port}",
            "tasks.example.org",
            "TASKS.example.org.",
        ):
            assert await status(host, "/") == 200, host
    assert await bus.peek() == []


async def test_the_password_is_asked_for_but_by_probes(open_bus):
    async with page_of(open_bus(), auth="ann:se:cret") as client:
        wrong = [None, "ann:se", "ann:se:cret ", "bob:se:cret", ":", "ann"]
        for path in ("/", "api", "api/message", "metrics", "nowhere"):
            for pair in wrong:
                header = {} if pair is None else {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
                answer = await client.get(path, headers=header)
                assert (answer.status_code, answer.headers["WWW-Authenticate"][:6]) == (401, "Basic "), (path, pair)
        for header in ("Basic", "Basic *", "Bearer YW5uOnNlOmNyZXQ=", "Basic ünlaut".encode()):
            assert (await client.get("api", headers={"Authorization": header})).status_code == 401
        for path in ("/", "api", "metrics"):
            assert (await client.get(path, auth=("ann", "se:cret"))).status_code == 200
        assert (await client.get("metrics", auth=("ann", "se:cret"), headers={"Host": "10.1.2.3"})).status_code == 200
        for path in ("healthz", "readyz"):
            assert (await client.get(path, headers={"Host": "10.1.2.3:8080"})).status_code == 200


async def test_a_page_that_is_read_only_changes_nothing(open_bus):
    bus = open_bus()
    await bury(bus, bodies_of(bus, "a"))
    async with page_of(bus, read_only=True) as client:
        for action in ("replay", "discard", "cancel"):
            answer = await client.post(f"api/{action}", json={"matching": {}}, headers=ACTION)
            assert (answer.status_code, answer.json()) == (403, {"error": "this page is read-only"})
        assert (await shown_by(client))["read_only"] is True
    assert (await bus.counts()).dead_letter == 1


async def test_an_unknown_path_is_not_found_and_an_action_is_no_page(open_bus):
    async with page_of(open_bus()) as client:
        paths = ("nowhere", "api/nothing", "dashboard.py", "..%2fdashboard.py", "healthz/x")
        assert [(await client.get(path)).status_code for path in paths] == [404] * len(paths)
        assert (await client.post("api/purge", headers=ACTION)).status_code == 404
        assert (await client.get("api/replay")).status_code == 405


async def test_the_page_allows_itself_nothing_but_its_own_text_and_its_own_api(open_bus):
    async with page_of(open_bus()) as client:
        answer = await client.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", policy["script-src"])
    assert re.findall(r"(?:src|href)=.(?:https?:)?//", answer.text) == []


@pytest.mark.parametrize("place", ["/tasks", "/deeper/inside/tasks"])
async def test_the_page_can_be_mounted_at_any_path_of_another_application(open_bus, place):
    app = await shop_after_a_night(open_bus())
    api = fastapi.FastAPI()
    api.mount(place, dashboard.asgi(app))
    api.mount("/open", dashboard.asgi(app, read_only=False))
    api.mount("/closed", dashboard.asgi(app, auth="ann:secret"))
    transport = httpx.ASGITransport(api)
    async with httpx.AsyncClient(transport=transport, base_url="https://api.example.org", follow_redirects=True) as web:
        page = await web.get(place)
        assert (page.status_code, str(page.url)) == (200, f"https://api.example.org{place}/")
        assert (await shown_by(web_at := Under(web, place)))["read_only"] is True
        assert (await web_at.get("readyz")).text == "ok"
        refused = await web.post(f"{place}/api/replay", json={"matching": {}}, headers=ACTION)
        assert refused.status_code == 403
        assert (await web.get("/closed/")).status_code == 401
        done = await web.post("/open/api/replay", json={"matching": {"task": "mail"}}, headers=ACTION)
        assert done.json()["count"] == 2
        shown = (await web.get("/closed/api", auth=("ann", "secret"))).json()
        assert shown["read_only"] is False


class Under:
    """A client, below a path."""

    def __init__(self, client, place):
        self.client, self.place = client, place

    def get(self, path, **options):
        return self.client.get(f"{self.place}/{path}", **options)


async def test_what_messages_hold_comes_as_text_whatever_it_is(open_bus):
    bus = open_bus()
    names = ["<img src=x onerror=alert(1)>", "\u202eevil", "x" * 128]
    tasks = [named(name, args=["<script>alert(2)</script>", "\x00\x1b[31m", "y" * 100_000, 2**70]) for name in names]
    await bury(bus, [letter(encode(task, "tasks", "tasks"), message_id=task.task_id) for task in tasks])
    surrogate = body_with(payload={"args": ["\ud800"], "kwargs": {"\udfff": "\ud83d"}})
    await bury(bus, [letter(surrogate), letter("no task <b>"), letter('{"function_name": 5}')], description="<b>")
    async with page_of(bus) as client:
        shown = await shown_by(client)
        rows = shown["dead"]["rows"]
        assert sorted(str(row["task"]) for row in rows) == sorted([*names, "None", "None", "fetch_page"])
        assert max(len(row["arguments"]) for row in rows) == dashboard.SHOWN
        for row in rows:
            full = await client.get("api/message", params={"number": row["number"], "dead_letter": 1})
            assert full.headers["Content-Type"] == "application/json"
            assert full.headers["X-Content-Type-Options"] == "nosniff"
            assert row["task"] not in names or json.loads(full.json()["arguments"])["args"][2:] == [
                "y" * 100_000,
                2**70,
            ]
        answer = await client.post("api/discard", json={"matching": {"task": ""}}, headers=ACTION)
        assert answer.json()["count"] == 2  # what is no task


async def test_numbers_larger_than_javascript_counts_come_back_as_they_are(open_bus, tmp_path):
    bus = open_bus()
    await bury(bus, bodies_of(bus, "a", "b"))
    large = 2**60 + 1
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as connection, connection:
        connection.execute("UPDATE message SET sequence_number = sequence_number + ?", [large - 1])
    async with page_of(bus) as client:
        numbers = column((await shown_by(client))["dead"], "number")
        assert sorted(numbers) == [str(large), str(large + 1)]
        answer = await client.post("api/discard", json={"numbers": [str(large)]}, headers=ACTION)
        assert answer.json()["count"] == 1
    assert numbers_of(await bus.peek(dead_letter=True)) == [large + 1]


async def test_a_queue_that_cannot_be_read_is_said_to_be_so_and_the_page_goes_on(tmp_path):
    path = tmp_path / "queue.db"
    path.write_text("This is no queue's file, but a letter. " * 100)
    bus = LocalServiceBus(path)
    async with page_of(bus) as client:
        shown = (await client.get("api")).json()
        assert (shown["counts"], shown["tasks"], shown["dead"]) == (None, None, None)
        assert str(path) in shown["errors"][0]
        answer = await client.post("api/replay", json={"matching": {}}, headers=ACTION)
        assert (answer.status_code, answer.json()["count"]) == (503, 0)
        assert (await client.get("api/message?number=1")).status_code == 503
        assert (await client.get("healthz")).status_code == 200
        assert "boilermaker_messages{" not in (await client.get("metrics")).text
        path.unlink()
        await until(lambda: shown_by(client), "a queue that can be read")
    await bus.close()


async def test_what_is_read_is_read_once_at_a_time_and_the_less_often_the_longer_it_takes():
    reads, go_on = [], asyncio.Event()

    async def read():
        reads.append(len(reads))
        await go_on.wait()
        if len(reads) == 3:
            raise ServiceBusUnavailable("away")
        return reads[-1]

    cached = dashboard.Cached(read, pause=0)
    asking = [asyncio.create_task(cached.get()) for _ in range(20)]
    await asyncio.sleep(0.1)
    assert reads == [0]
    go_on.set()
    assert await asyncio.gather(*asking) == [0] * 20
    assert await cached.get() == 0  # it took a tenth of a second, and so is not read again for two
    assert reads == [0]
    cached.forget()
    assert await cached.get() == 1
    cached.forget()
    assert (await cached.get(), cached.error) == (1, "away")  # what was known stays
    cached.forget()
    assert (await cached.get(), cached.error) == (3, "")


async def test_an_answer_does_not_wait_for_what_takes_long_to_read(monkeypatch):
    monkeypatch.setattr(dashboard, "PATIENCE", 0.05)
    go_on = asyncio.Event()
    cached = dashboard.Cached(go_on.wait, pause=0)
    assert await cached.get() is None
    go_on.set()
    assert await until(cached.get) is True


# -- probes and metrics


async def statuses(client):
    return [(await client.get(path)).status_code for path in ("healthz", "readyz")]


async def test_a_worker_is_ready_from_its_start_to_its_stop_and_healthy_all_the_while(open_bus):
    may_start, may_end, running = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        await may_start.wait()
        yield

    app = Boilermaker(None, open_bus(), lifespan=lifespan)

    @app.task
    async def work(state):
        running.set()
        await may_end.wait()

    await work.delay()
    async with page_of(app, has_worker=True) as client:
        assert ((await client.get("readyz")).text, await statuses(client)) == ("no worker", [200, 503])
        worker = asyncio.create_task(app.run())
        await until(lambda: app.workers)
        assert ((await client.get("readyz")).text, await statuses(client)) == ("connecting", [200, 503])
        may_start.set()
        await running.wait()
        assert ((await client.get("readyz")).text, await statuses(client)) == ("ok", [200, 200])
        stopping = asyncio.create_task(app.stop())
        await until(lambda: [each.phase for each in app.workers] == [boilermaker.Phase.STOPPING])
        assert ((await client.get("readyz")).text, await statuses(client)) == ("stopping", [200, 503])
        may_end.set()
        await asyncio.gather(worker, stopping)
        assert await statuses(client) == [200, 503]


async def test_through_an_outage_of_the_bus_a_worker_is_healthy_and_not_ready(azure_bus, emulator):
    app = Boilermaker(None, azure_bus())
    ran = []

    @app.task
    async def work(state):
        ran.append(1)

    async with page_of(app, has_worker=True) as client, working(app):
        await until(lambda: app.workers)
        await until_phase(client, "ok")
        emulator.control("refuse 2")
        emulator.control("drop")

        async def is_reconnecting():
            assert (await client.get("healthz")).status_code == 200
            return (await client.get("readyz")).text == "reconnecting"

        await until(is_reconnecting)
        await until_phase(client, "ok")
        assert (await client.get("healthz")).status_code == 200
        await work.delay()
        await until(lambda: ran)


async def until_phase(client, phase):
    async def is_there():
        return (await client.get("readyz")).text == phase

    await until(is_there, phase)


async def test_a_worker_whose_receives_fail_is_not_ready_until_one_succeeds(open_bus, tmp_path, monkeypatch):
    monkeypatch.setattr(boilermaker, "MAX_WAIT", 0.05)
    monkeypatch.setattr(boilermaker, "LOCK_PATIENCE", 1)
    app = Boilermaker(None, open_bus())
    app.register_async(clean_up)
    async with page_of(app, has_worker=True) as client, working(app):
        await until_phase(client, "ok")
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await until_phase(client, "reconnecting")
            assert (await client.get("healthz")).status_code == 200
        await until_phase(client, "ok")


async def test_a_worker_whose_event_loop_is_stuck_is_not_healthy(open_bus, monkeypatch):
    monkeypatch.setattr(dashboard, "UNRESPONSIVE", 0.2)
    app = Boilermaker(None, open_bus())
    codes = []

    @app.task
    async def block(state):
        deadline = time.monotonic() + PATIENCE
        while 503 not in codes and time.monotonic() < deadline:
            time.sleep(0.01)

    async with page_of(app) as client, working(app):
        ended = threading.Event()

        def probe():
            while not ended.is_set():
                codes.append(httpx.get(f"{client.base_url}healthz").status_code)
                time.sleep(0.05)

        prober = threading.Thread(target=probe)
        prober.start()
        try:
            await until(lambda: codes)
            await block.delay()
            await until(lambda: 503 in codes and codes[-1] == 200)
        finally:
            ended.set()
            await asyncio.to_thread(prober.join)
    assert codes[0] == 200


async def test_a_worker_that_was_ended_by_an_error_is_not_healthy_until_another_works(open_bus):
    app = Boilermaker(None, open_bus())
    app.register_async(clean_up)
    transport = httpx.ASGITransport(dashboard.asgi(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert await statuses(client) == [200, 200]  # a process that only publishes
        worker = asyncio.create_task(app.run())
        await until(lambda: [each.phase for each in app.workers] == [boilermaker.Phase.WORKING])
        assert await statuses(client) == [200, 200]
        await app.service_bus_client.close()
        await asyncio.wait([worker], timeout=PATIENCE)
        assert isinstance(worker.exception(), UsageError)
        assert await statuses(client) == [503, 503]
        async with working(app):
            await until_phase(client, "ok")
            assert await statuses(client) == [200, 200]


async def samples_of(client):
    """The values of the metrics, by name and labels, as Prometheus reads them."""
    answer = await client.get("metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = prometheus_client.parser.text_string_to_metric_families(answer.text)
    return {
        (sample.name.removeprefix("boilermaker_"), *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def test_metrics_count_what_was_settled_how_long_it_ran_and_what_is_there(open_bus):
    app = await shop_after_a_night(bus := open_bus())
    going_on = asyncio.Event()

    @app.task
    async def wait(state):
        await going_on.wait()

    async with page_of(app) as client:
        assert (await samples_of(client))["concurrency",] == 0
        await wait.delay()
        await app.publish_task(app.mail.si("eve@example.org"))
        await bus.send([letter(body_with(function_name=f"foreign{number}"), message_id=str(number)) for number in "12"])
        await bus.send([letter("no task")])
        async with working(app, concurrency=7, schedules=False):
            await until(lambda: bus.counts(), "counts")

            async def is_settled():
                samples = await samples_of(client)
                return samples.get(("messages", "dead_letter", "tasks")) == 9 and samples

            samples = await until(is_settled)
            assert (samples["tasks_running",], samples["concurrency",]) == (1, 7)
            assert samples["messages", "running", "tasks"] == 1
            going_on.set()

            async def has_ended():
                samples = await samples_of(client)
                return samples.get(("tasks_total", "returned", "wait")) and samples

            samples = await until(has_ended)
    assert samples["tasks_total", "resize", "returned"] == 1
    assert samples["tasks_total", "failed", "mail"] == 1
    assert samples["tasks_total", "?", "unregistered"] == 2
    assert samples["tasks_total", "?", "undecodable"] == 1
    assert not [key for key in samples if any("foreign" in label for label in key)]
    assert samples["task_duration_seconds_count", "mail"] == samples["task_wait_seconds_count", "mail"] == 1
    assert samples["task_duration_seconds_bucket", "+Inf", "wait"] == 1
    assert samples["task_wait_seconds_sum", "wait"] >= 0
    assert ("task_duration_seconds_count", "?") not in samples  # they did not run
    assert samples["messages", "scheduled", "tasks"] == 2


# -- started as a command


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--web", "TAKEN"], "--web TAKEN: cannot listen there: Address already in use."),
        (["--web", "0", "--auth", "secret"], "auth must be USER:PASSWORD, with a colon."),
        (["--web", "0", "--auth", ":secret"], "auth must be USER:PASSWORD, with a colon."),
        (["--web", "0", "--auth", ""], "auth must be USER:PASSWORD, with a colon."),
        (["--web", "0.0.0.0:0"], "--web 0.0.0.0:0: any host but loopback wants --auth USER:PASSWORD"),
        (["--web", "[::]:0"], "--web [::]:0: any host but loopback wants --auth USER:PASSWORD"),
        (["--web", "example.org:0"], "--web example.org:0: any host but loopback wants --auth USER:PASSWORD"),
        (["--web", "eighty"], "--web 'eighty' must be [HOST:]PORT"),
        (["--web", "70000"], "--web '70000' must be [HOST:]PORT"),
        (["--web", "nowhere.invalid:0", "--auth", "a:b"], "--web nowhere.invalid:0: cannot listen there: "),
    ],
)
@pytest.mark.parametrize("command", ["worker", "dashboard"])
def test_where_the_page_cannot_be_served_one_is_told_why(night, capsys, command, options, problem):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = [option.replace("TAKEN", port) for option in options]
        if command == "worker":
            code, _, err = ran(capsys, "worker", night, *options)
        else:
            code, err = dashboard.main(["night.db", *options]), capsys.readouterr().err
    assert code == boilermaker.USAGE
    assert problem.replace("TAKEN", port) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--web", "0", "--processes", 2], "--web is for one process, which listens on the port"),
        (["--auth", "a:b"], "--auth and --allow-host are of the page: give --web too."),
        (["--allow-host", "example.org"], "--auth and --allow-host are of the page: give --web too."),
    ],
)
def test_options_of_the_page_that_do_not_fit_are_told(night, capsys, options, problem):
    code, _, err = ran(capsys, "worker", night, *options)
    assert (code, problem in err) == (boilermaker.USAGE, True)


@pytest.mark.parametrize("bus", ["nowhere.db", "night.db#nothing", "nomodule"])
def test_the_page_of_what_is_not_there_is_an_error_that_says_so(night, capsys, bus):
    assert dashboard.main([bus, "--web", "0"]) == boilermaker.USAGE
    assert capsys.readouterr().err.startswith("dashboard: ")
    assert not os.path.exists("nowhere.db")


PACKAGES_OF_THE_PAGE = ("starlette", "uvicorn", "prometheus_client")


@pytest.mark.parametrize("missing", [*[(name,) for name in PACKAGES_OF_THE_PAGE], PACKAGES_OF_THE_PAGE])
@pytest.mark.parametrize("command", ["dashboard", "worker", "import"])
def test_packages_that_the_page_lacks_are_named(night, missing, command):
    code = {
        "dashboard": "sys.argv = ['', 'night.db']; runpy.run_module('examples.dashboard', run_name='__main__')",
        "worker": f"sys.exit(boilermaker.main(['worker', '{night}', '--web', '0']))",
        "import": "import examples.dashboard",
    }[command]
    hidden = f"import runpy, sys, boilermaker; sys.modules |= dict.fromkeys({missing}); {code}"
    environment = example_environment(PYTHONWARNINGS="ignore")
    run = subprocess.run([sys.executable, "-c", hidden], env=environment, capture_output=True, text=True)
    assert f"The page needs {', '.join(missing)}: pip install {' '.join(missing)}" in run.stderr.splitlines()[-1]
    assert (run.returncode, "Traceback" in run.stderr) == ((1, True) if command == "import" else (2, False))


def test_the_page_is_found_beside_the_module_under_whatever_name_that_is_vendored(tmp_path, monkeypatch):
    folder = tmp_path / f"vendored{uuid.uuid4().hex}"
    folder.mkdir()
    shutil.copy(MODULE, folder / "queueing.py")
    monkeypatch.syspath_prepend(tmp_path)
    queueing = importlib.import_module(f"{folder.name}.queueing")
    with pytest.raises(queueing.UsageError, match=f"--web needs dashboard.py and dashboard.html, in {folder}"):
        queueing._dashboard()
    source = Path(dashboard.__file__).read_text()
    (folder / "dashboard.py").write_text(
        source.replace("import boilermaker  #", f"from {folder.name} import queueing as boilermaker  #")
    )
    shutil.copy(Path(dashboard.__file__).with_suffix(".html"), folder)
    assert queueing._dashboard().boilermaker is queueing
    assert queueing._dashboard() is queueing._dashboard()


def test_a_worker_that_is_started_again_keeps_its_page(night):
    given = ["worker", night, "--web", "0.0.0.0:80", "--auth=a:-b", "--allow-host", "x.org", "--allow-host", "y.org"]
    parser = boilermaker._parser()
    again = parser.parse_args(boilermaker._arguments_of_child(parser.parse_args(given)))
    assert (again.web, again.auth, again.allow_host) == ("0.0.0.0:80", "a:-b", ["x.org", "y.org"])


async def url_in(log):
    """Where a page is, as its log says."""

    def found():
        return re.search(r"The page of .* is at (http://\S+/)", log.read_text())

    return (await until(found, f"the page: {log.read_text()}"))[1]


async def test_a_worker_has_its_page_beside_it_until_it_has_ended(night, tmp_path, monkeypatch):
    monkeypatch.setenv("BOILERMAKER_WEB_AUTH", "ann:secret")
    with command_running(tmp_path, "worker", night, "--web", "0", "--allow-host", "tasks.example") as (process, log):
        async with httpx.AsyncClient(base_url=await url_in(log), auth=("ann", "secret")) as client:
            await until_phase(client, "ok")
            shown = await shown_by(client)
            assert [row["name"] for row in shown["schedules"]["rows"]] == ["tidy"]
            assert (await samples_of(client))["concurrency",] == 10
            assert (await client.get("api", headers={"Host": "tasks.example"})).status_code == 200
            answer = await client.post("api/discard", json={"matching": {"task": "mail"}}, headers=ACTION)
            assert answer.json()["count"] == 1
            assert (await client.get("api", auth=("ann", "Secret"))).status_code == 401
            process.send_signal(signal.SIGTERM)
            await until(lambda: process.poll() is not None, "the end")
    assert process.returncode == 0
    assert "Page: discard Matching(text='', task='mail') by ann (127.0.0.1): messages=1" in log.read_text()
    assert "secret" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_page_alone_serves_until_a_signal(night, tmp_path, number):
    log = tmp_path / "page.log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "examples.dashboard", "night.db", "--web", "localhost:0", "--read-only"]
        process = subprocess.Popen(command, env=example_environment(), stdout=stream, stderr=stream)
    try:
        async with httpx.AsyncClient(base_url=await url_in(log)) as client:
            shown = await shown_by(client)
            assert (shown["read_only"], shown["counts"]["dead_letter"]) == (True, 6)
            assert await statuses(client) == [200, 200]
        process.send_signal(number)
        await until(lambda: process.poll() is not None, "the end")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_the_installed_package_has_the_page(clean_python, tmp_path):
    [packages] = clean_python.parent.parent.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "boilermaker.dashboard", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("usage: dashboard [-h] [--web [HOST:]PORT]"), run.stderr
    code = "import boilermaker; print(boilermaker._dashboard().__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == f"{packages}/boilermaker/dashboard.py\n", run.stderr


# -- in a browser

CHROMIUM, CHROMEDRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
CHROMIUM_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1000"
)


class Browser:
    """Headless Chromium, and what somebody sees and does there."""

    def __init__(self, profile):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for option in [*CHROMIUM_OPTIONS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=ChromeService(CHROMEDRIVER))

    async def open(self, url):
        self.driver.get(str(url))
        await self.until_text("#status", "Live")
        await until(lambda: "\u2013" not in self.text("#dead_letter b"), "the first counts")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector):
        """What is shown there: nothing where it is hidden."""
        visible = "[...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())"
        return self.run(f"return {visible}.map(e => e.innerText).join('|')", selector)

    def count(self, selector):
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    async def until_text(self, selector, expected):
        try:
            await until(lambda: re.search(expected, self.text(selector)))
        except AssertionError:
            raise AssertionError(f"{selector} shows {self.text(selector)!r}, not {expected!r}") from None

    def click(self, selector):
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def type(self, *keys):
        """Type where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def focus(self):
        return self.run("return document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")

    async def act(self, selector, question, done):
        """Press a button, read the question, agree, and wait for what is said then."""
        self.click(selector)
        await self.until_text("dialog[open]", question)
        self.click("dialog .go")
        await self.until_text("#done", done)

    def complaints(self):
        """What the console has of warnings and errors since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def foreign_requests(self):
        names = self.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        return [name for name in names if not name.startswith((self.run("return location.origin"), "data:"))]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if not (os.path.exists(CHROMIUM) and os.path.exists(CHROMEDRIVER)):
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(f"There is no {CHROMIUM}, or no {CHROMEDRIVER}.")
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser, of which a test must leave no complaint."""
    chromium.complaints()
    yield chromium
    complaints, foreign = chromium.complaints(), chromium.foreign_requests()
    chromium.driver.get("about:blank")
    assert (complaints, foreign) == ([], [])


async def test_counts_change_on_the_page_without_a_reload(browser, open_bus):
    app = await shop_after_a_night(open_bus())
    going_on = asyncio.Event()

    @app.task
    async def wait(state):
        await going_on.wait()

    async with page_of(app) as client:
        await browser.open(client.base_url)
        browser.run("window.same = true")
        tiles = [browser.text(f"#{name} b") for name in ("active", "running", "scheduled-count", "dead_letter")]
        assert tiles == ["1", "0", "2", "5"]
        assert browser.text("#tasks tbody tr:first-child button") == "resize"
        async with working(app):
            await wait.delay()
            await browser.until_text("#running b", "^1$")
            await browser.until_text("#tasks", r"wait\s+0\s+1\s+0\s+0")
            await app.mail.delay("eve@example.org")
            await browser.until_text("#dead_letter b", "^6$")
            await browser.until_text("#dead tbody:nth-of-type(1)", "eve@example.org")
            going_on.set()
            await browser.until_text("#running b", "^0$")
        assert browser.count("#tiles svg path.line[d^=M]") == 5
        assert browser.driver.title == "(6 dead) tasks · boilermaker"
        assert browser.run("return window.same") is True


async def test_the_page_is_filtered_by_text_and_by_task_and_a_traceback_is_unfolded(browser, open_bus):
    app = await shop_after_a_night(open_bus())
    async with page_of(app) as client:
        await browser.open(client.base_url)
        browser.click("#text")
        browser.type("lost2")
        await browser.until_text("#dead-note", "^1 match")
        assert browser.count("#dead tbody") == 1
        assert browser.text("#scheduled-note") == browser.text("#schedules tbody") == ""
        browser.click("#dead .unfold")
        await browser.until_text("#dead .detail", r"Traceback \(most recent call last\)")
        await browser.until_text("#dead .detail", "FileNotFoundError: no such image: lost2.png")
        await browser.until_text("#dead .detail", r'"width": 2')
        browser.run("document.querySelector('#dead .detail').dataset.same = 1")
        await app.mail.delay("eve@example.org")
        await browser.until_text("#active b", "^2$")  # a poll later
        assert browser.count("#dead .detail[data-same]:not([hidden])") == 1
        browser.click("#dead .unfold")
        assert browser.text("#dead .detail") == ""

        browser.run("document.querySelector('#text').select()")
        browser.type(Keys.BACKSPACE)
        await browser.until_text("#dead-note", "^5$")
        browser.click("#tasks tbody tr:nth-child(2) button")
        await browser.until_text("#dead-note", "^2 match")
        assert set(browser.text("#dead tbody td[data-label=Task]").split("|")) == {"mail"}
        assert browser.run("return location.search") == "?task=mail"
        browser.driver.refresh()
        await browser.until_text("#dead-note", "^2 match")
        browser.click("#task")
        await browser.until_text("#dead-note", "^5$")


async def test_dead_letters_are_replayed_and_discarded_and_what_is_scheduled_is_cancelled_on_the_page(
    browser, open_bus
):
    app = await shop_after_a_night(bus := open_bus())
    async with page_of(app) as client:
        await browser.open(client.base_url)
        browser.click("#dead tbody [aria-label^='Replay ']")
        await browser.until_text("dialog[open]", r"Replay this dead letter[?]\s+(mail|resize)\(.*\), number \d")
        browser.type(Keys.ESCAPE)
        assert browser.count("dialog[open]") == 0
        browser.click("#dead tbody [aria-label^='Replay ']")
        browser.click("dialog [value=no]")
        await asyncio.sleep(0.1)
        assert (await bus.counts()).dead_letter == 5

        await browser.act("#dead [aria-label^='Replay ']", "Replay this dead letter[?]", "^1 dead letter replayed.$")
        await browser.until_text("#dead-note", "^4$")
        await browser.act("#dead [aria-label^='Discard ']", "deleted for good", "^1 dead letter discarded.$")
        await browser.until_text("#dead-note", "^3$")
        browser.click("#text")
        browser.type("lost")
        await browser.until_text("#dead-note", "^(\\d) match")
        left = int(browser.text("#dead-note").split()[0])
        await browser.act("[data-all=replay]", "with “lost”", f"^{left} dead letters? replayed.$")
        await browser.until_text("#dead-note", "^$")
        assert browser.text("#dead ~ p") in ("No dead letter matches.", "None: all is well.")
        browser.run("document.querySelector('#text').select()")
        browser.type(Keys.BACKSPACE)
        await browser.until_text("#scheduled-note", "^2$")
        await browser.act("#scheduled [aria-label^='Cancel ']", "Cancel this", "^1 scheduled message cancelled.$")
        await browser.act("[data-all=cancel]", "Cancel all scheduled messages[?]", "^1 scheduled message cancelled.$")
        await browser.until_text("#scheduled ~ p", "^Nothing is scheduled.$")
    counts = await bus.counts()
    assert (counts.active, counts.scheduled, counts.dead_letter) == (2 + left, 0, 3 - left)


async def test_what_is_gone_already_is_said_to_be(browser, open_bus):
    app = await shop_after_a_night(bus := open_bus())
    async with page_of(app) as client:
        await browser.open(client.base_url)
        browser.click("#dead tbody [aria-label^='Replay ']")
        await browser.until_text("dialog[open]", "Replay this")
        await bus.discard(lambda message: True)
        browser.click("dialog .go")
        await browser.until_text("#done", "^Replay did not work: Gone")
        await browser.until_text("#dead ~ p", "^None: all is well.$")
    assert [message for message in browser.complaints() if "404" not in message] == []


async def test_a_server_that_goes_away_is_said_to_be_and_found_again(browser, open_bus):
    app = await shop_after_a_night(open_bus())
    async with page_of(app) as client:
        await browser.open(client.base_url)
    await browser.until_text("#status", r"^No connection to the server since \d\d:\d\d:\d\d, trying again$")
    assert browser.text("#dead_letter b") == "5"  # what was last seen
    await app.mail.delay("eve@example.org")
    await work_off(app, schedules=False)
    async with page_of(app, address=str(client.base_url.port)):
        await browser.until_text("#status", "^Live$")
        await browser.until_text("#dead_letter b", "^6$")
    assert [message for message in browser.complaints() if "net::ERR" not in message] == []


async def test_a_hidden_page_does_not_ask(browser, open_bus, monkeypatch):
    asked = []
    show = dashboard.Queue.show

    async def counted(*arguments):
        asked.append(arguments)
        return await show(*arguments)

    monkeypatch.setattr(dashboard.Queue, "show", counted)
    async with page_of(open_bus()) as client:
        await browser.open(client.base_url)
        await until(lambda: len(asked) >= 2)
        page = browser.driver.current_window_handle
        browser.driver.switch_to.new_window("tab")
        await asyncio.sleep(0.5)
        seen = len(asked)
        await asyncio.sleep(5)
        assert len(asked) == seen
        browser.driver.close()
        browser.driver.switch_to.window(page)
        await until(lambda: len(asked) > seen)
        await browser.until_text("#status", "^Live$")


async def test_ten_thousand_dead_letters_are_shown_page_by_page(browser, open_bus):
    bus = open_bus()
    await bury(bus, bodies_of(bus, *["a", "b"] * 5000))
    async with page_of(bus) as client:
        await browser.open(client.base_url)
        await browser.until_text("#dead-note", "^10,000$")
        assert browser.count("#dead tbody") == dashboard.ROWS
        answer = await client.get("api")
        assert len(answer.content) < 100_000
        browser.click("[aria-label='Pages of dead letters'] [data-turn='1']")
        await browser.until_text("[aria-label='Pages of dead letters']", "26 to 50 of 10,000")
        assert browser.count("#dead tbody") == dashboard.ROWS
        browser.click("#text")
        browser.type("4321")
        await browser.until_text("#dead-note", "^[1-9] match")
        await browser.act("[data-all=discard]", "with “4321”", "^[1-9] dead letters? discarded.$")
        await browser.until_text("#dead_letter b", "^9,99[0-9]$")


async def test_what_is_hostile_is_shown_as_text(browser, open_bus):
    bus = open_bus()
    name, argument = "<img src=x onerror='window.bad=1'>", "<script>window.bad=2</script>\u202egnp.exe\u0000"
    tasks = [named(name, args=[argument]), named("large", args=["y" * 100_000])]
    messages = [letter(encode(task, "tasks", "tasks"), message_id=task.task_id) for task in tasks]
    await bury(bus, messages, description="<b onclick=alert(3)>bold</b>", traceback="<i>slanted</i>" * 3)
    async with page_of(bus) as client:
        await browser.open(client.base_url)
        rows = browser.text("#dead tbody")
        assert name in rows
        assert r"<script>window.bad=2</script>\u202egnp.exe" in rows
        assert "<b onclick=alert(3)>bold</b>" in rows
        browser.click("#dead tbody:nth-of-type(1) .unfold")
        browser.click("#dead tbody:nth-of-type(2) .unfold")
        await until(lambda: browser.text("#dead .detail").count("<i>slanted</i>") == 6)
        assert "y" * 100_000 in browser.text("#dead .detail").replace("\n", "")
        browser.click("#dead tbody:nth-of-type(1) [aria-label^='Discard ']")
        await browser.until_text("dialog[open]", "Discard this")
        browser.type(Keys.ESCAPE)
        browser.driver.get(f"{client.base_url}?task={urllib.parse.quote(name)}&text=%3Cb")
        await browser.until_text("#dead-note", "^1 match")
        assert name in browser.text("#task")
        assert browser.run("return window.bad") is None
        assert browser.count("main img, main script, main i, td b") == 0
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")


async def test_the_page_works_at_a_path_of_another_application_with_a_password(browser, open_bus):
    app = await shop_after_a_night(open_bus())
    api = fastapi.FastAPI()
    api.mount("/deep/tasks", dashboard.asgi(app, auth="ann:secret"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api, log_config=None, ws="none"))
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[listening]),))
        thread.start()
        try:
            place = f"127.0.0.1:{listening.getsockname()[1]}/deep/tasks/"
            browser.driver.get(f"http://ann:secret@{place}")
            await browser.until_text("#dead-note", "^5$")
            await browser.act("#dead [aria-label^='Replay ']", "Replay this", "^1 dead letter replayed.$")
            await browser.until_text("#dead-note", "^4$")
        finally:
            server.should_exit = True
            await asyncio.to_thread(thread.join)
    browser.complaints()  # the server is gone


async def test_a_page_that_is_read_only_has_no_buttons_for_actions(browser, open_bus):
    app = await shop_after_a_night(open_bus())
    async with page_of(app, read_only=True) as client:
        await browser.open(client.base_url)
        await browser.until_text("#dead-note", "^5$")
        assert "read-only" in browser.text("#footer")
        buttons = browser.run(
            "return [...document.querySelectorAll('main button')].filter(b => b.checkVisibility())"
            ".map(b => b.className)"
        )
        assert set(buttons) == {"link", "unfold"}


async def test_the_page_can_be_used_by_keyboard_alone(browser, open_bus):
    app = await shop_after_a_night(bus := open_bus())
    async with page_of(app) as client:
        await browser.open(client.base_url)
        await browser.until_text("#dead-note", "^5$")
        browser.type(Keys.TAB)
        assert browser.focus() == "Skip to the content"

        def tab_to(label):
            for _ in range(40):
                browser.type(Keys.TAB)
                if browser.focus().startswith(label):
                    return
            raise AssertionError(f"no way by Tab to {label}")

        tab_to("resize")
        tab_to("Details of ")
        browser.type(Keys.ENTER)
        await browser.until_text("#dead .detail", "Traceback")
        browser.type(Keys.SPACE)
        tab_to("Discard ")
        label = browser.focus()
        browser.type(Keys.ENTER)
        await browser.until_text("dialog[open]", "Discard this dead letter")
        assert browser.focus() == "Leave as is"
        browser.type(Keys.ESCAPE)
        assert browser.focus() == label
        browser.type(Keys.ENTER)
        await browser.until_text("dialog[open]", "Discard this dead letter")
        browser.type(Keys.TAB, Keys.ENTER)
        await browser.until_text("#done", "^1 dead letter discarded.$")
        await browser.until_text("#dead-note", "^4$")
        assert browser.focus() == "Dead letters"  # what had the focus is gone
    assert (await bus.counts()).dead_letter == 4


@pytest.mark.parametrize("width", [390, 1280])
async def test_the_page_fits_a_phone_and_its_tables_stay_tables_for_screen_readers(browser, open_bus, width):
    app = await shop_after_a_night(open_bus())
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        async with page_of(app) as client:
            await browser.open(client.base_url)
            await browser.until_text("#dead-note", "^5$")
            browser.click("#dead .unfold")
            await browser.until_text("#dead .detail", "Traceback")
            assert browser.run("return document.documentElement.scrollWidth") <= width
            nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
            seen = [
                (each["role"]["value"], each.get("name", {}).get("value", "")) for each in nodes if not each["ignored"]
            ]
            roles = Counter(role for role, _ in seen)
            assert (roles["table"], roles["columnheader"]) == (4, 7 + 5 + 4 + 4)
            assert roles["row"] >= 4 + 2 + 5 + 2 + 1
            assert [role for role, name in seen if role in ("button", "searchbox", "table", "image") and not name] == []
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_has_enough_contrast(browser, open_bus, scheme):
    app = await shop_after_a_night(open_bus())
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        async with page_of(app) as client:
            await browser.open(client.base_url)
            await browser.until_text("#dead-note", "^5$")
            browser.click("#dead .unfold")
            await browser.until_text("#dead .detail", "Traceback")
            assert browser.run(LOW_CONTRAST) == []
            browser.click("[data-all=discard]")
            await browser.until_text("dialog[open]", "Discard all")
            assert browser.run(LOW_CONTRAST) == []
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


LOW_CONTRAST = """
const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => numbers(color).slice(0, 3).map((value) => value / 255)
  .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = getComputedStyle(each).backgroundColor;
    if (numbers(color)[3] !== 0) return color;
  }
};
return [...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => [e.innerText, light(getComputedStyle(e).color), light(behind(e))])
  .map(([text, a, b]) => [text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)])
  .filter(([, contrast]) => contrast < 4.5);
"""


async def test_a_queue_on_azure_is_shown_and_acted_on_and_asked_sparingly(browser, azure_bus, monkeypatch):
    app = shop_app(bus := azure_bus())
    await app.publish_many([app.resize.si(f"lost{number}.png") for number in range(3)])
    await work_off(app, schedules=False)
    await app.publish_task(app.mail.si("soon@example.org"), delay=3600)
    looked = Counter()
    for name in ("counts", "counts_by_task"):
        monkeypatch.setattr(bus, name, counting(looked, name, getattr(bus, name)))
    async with page_of(app) as client:
        await browser.open(client.base_url)
        await browser.until_text("#dead-note", "^3$")
        assert (browser.text("#dead_letter b"), browser.text("#running b")) == ("≥ 3", "\u2013")
        await browser.until_text("#tasks", "resize.*3")
        await browser.until_text("#scheduled-note", "^1$")
        await browser.act("#dead [aria-label^='Replay ']", "Replay this", "^1 dead letter replayed.$")
        await browser.until_text("#dead-note", "^2$")
        await browser.act("[data-all=cancel]", "Cancel all", "^1 scheduled message cancelled.$")
        await browser.until_text("#scheduled ~ p", "^Nothing is scheduled.$")
        await browser.until_text("#dead_letter b", "^≥ 2$")
    assert looked["counts_by_task"] == 1
    assert looked["counts"] <= 5


def counting(counts, name, function):
    async def counted():
        counts[name] += 1
        return await function()

    return counted


# ======================================================================================================================
# Examples: each runs as its docstring says
# ======================================================================================================================

CHECKOUT = Path(boilermaker.__file__).parent
BARE = ("-S", "-E")  # no site-packages, no PYTHONPATH: what is not in the checkout is the standard library's


def example_environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE", "AZURE", "QUEUE"))}
    return kept | {"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"} | settings


def run_example(name, *arguments, flags=(), **settings):
    return subprocess.run(
        [sys.executable, *flags, "-m", f"examples.{name}", *map(str, arguments)],
        cwd=CHECKOUT,
        env=example_environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
    )


def output_of_example(name, flags=()):
    """What an example prints, when it works."""
    ended = run_example(name, flags=flags)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def docstring_of_example(name):
    return ast.get_docstring(ast.parse((CHECKOUT / "examples" / f"{name}.py").read_text()))


def documented_output(name):
    """The last indented block of an example's docstring."""
    blocks = re.split(r"\n(?=\S)", docstring_of_example(name))
    return textwrap.dedent(blocks[-1].split("\n\n", 1)[1]).strip() + "\n"


def lines_of_worker(command, count, cwd=CHECKOUT, **settings):
    """The first lines that a worker prints; then it gets SIGTERM, and has to end well."""
    worker = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=example_environment(**settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(30, worker.kill)
    timer.start()
    try:
        lines = [worker.stdout.readline() for _ in range(count)]
        worker.terminate()
        rest, _ = worker.communicate(timeout=30)
    finally:
        timer.cancel()
        worker.kill()
        worker.communicate()
    assert (rest, worker.returncode) == ("", 0)
    return "".join(lines)


def test_every_example_says_what_it_shows_and_how_to_run_it():
    for path in CHECKOUT.glob("examples/[!_]*.py"):
        assert re.search(rf"examples[./]{path.stem}\b", docstring_of_example(path.stem)), path.name


# -- quickstart


class QuickstartOutput:
    def __init__(self, text):
        self.text = text
        publisher, workers = re.match(r"Publisher (\d+), workers (.+?): ", text).groups()
        self.publisher, self.workers = int(publisher), [int(pid) for pid in workers.split(", ")]
        self.progress = re.findall(r"^(\d+\.\d) s: \d+ task runs; files: (.+)$", text, re.MULTILINE)
        rows = re.findall(r"^(fetch|count|store|cleanup|report) +(\d+) +(\d+) +(\d+) +(\d+)$", text, re.MULTILINE)
        self.runs = {task: int(runs) for task, runs, *_ in rows}
        self.retries = {task: int(retries) for task, _, retries, *_ in rows}
        self.by_worker = {task: [int(runs) for runs in where] for task, _, _, *where in rows}
        self.exit_codes = re.search(r"^exit code +(.+)$", text, re.MULTILINE)[1].split()
        self.failed = re.findall(r"^Failed: (.+?): (.+)$", text, re.MULTILINE)


def make_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "one.txt").write_text("An apple, a Pear. APPLE!\n")
    (folder / "inner" / "two.txt").write_text("apple")
    (folder / "image.png").write_bytes(bytes(range(128, 256)))
    (folder / ".hidden").write_text("apple")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return folder, temporary


def test_the_quickstart_indexes_this_repository_with_nothing_installed(tmp_path):
    ended = run_example("quickstart", flags=BARE, TMPDIR=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    output = QuickstartOutput(ended.stdout)
    files = int(re.search(r": (\d+) files of (.+), 2 added", output.text)[1]) + 2
    assert f"files of {CHECKOUT}, 2 added" in output.text
    assert len({output.publisher, *output.workers}) == 3
    assert output.runs["fetch"] == files + 1
    assert output.retries == {"fetch": 1, "count": 0, "store": 0, "cleanup": 0, "report": 0}
    assert output.runs["store"] + output.runs["cleanup"] == output.runs["count"] == files
    assert all(sum(where) == output.runs[task] for task, where in output.by_worker.items())
    assert output.exit_codes == ["0", "0"]
    assert len(re.findall(r"^  \w+ +\d+ times in \d+ files$", output.text, re.MULTILINE)) == 8
    assert "not-text.bin" in dict(output.failed)
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_counts_the_words_of_a_folder_and_names_what_is_not_text(tmp_path):
    folder, temporary = make_folder(tmp_path)
    ended = run_example("quickstart", folder, TMPDIR=str(temporary))
    assert (ended.returncode, ended.stderr) == (0, "")
    output = QuickstartOutput(ended.stdout)
    assert f": 3 files of {folder}, 2 added\n" in output.text
    assert output.runs == {"fetch": 6, "count": 5, "store": 3, "cleanup": 2, "report": 1}
    assert output.progress[-1][1] == "2 failed, 3 stored"
    seconds = [float(second) for second, _ in output.progress]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 1, "the retry waits for a second"
    assert "3 files stored, 8 words of four letters or more. The most frequent:\n  apple" in output.text
    assert re.search(r"^  apple +3 times in 2 files\n  better +1 times in 1 files$", output.text, re.MULTILINE)
    assert [name for name, _ in output.failed] == ["not-text.bin", "image.png"]
    assert all(reason.startswith("count: UnicodeDecodeError: 'utf-8' codec") for _, reason in output.failed)
    assert output.text.count("\nDead letter: TaskFailed: UnicodeDecodeError: ") == 2
    assert list(temporary.iterdir()) == []


def test_the_quickstart_shows_progress_on_one_line_of_a_terminal(tmp_path):
    folder, temporary = make_folder(tmp_path)
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "examples.quickstart", str(folder)]
    environment = example_environment(TMPDIR=str(temporary))
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=its_end)
    os.close(its_end)
    text = b""
    try:
        while part := os.read(terminal, 65536):
            text += part
    except OSError:  # how Linux tells that the other side has closed it
        pass
    finally:
        os.close(terminal)
    assert process.wait(30) == 0
    progress = [line for line in text.decode().splitlines() if "\x1b[K" in line]
    assert any("1 to be retried" in line for line in progress)
    assert progress[-1].endswith("2 failed, 3 stored")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing", "missing is not a folder"),
        ("file.txt", "file.txt is not a folder"),
        ("empty", "there are no files in"),
        ("hidden", "there are no files in"),
    ],
)
def test_the_quickstart_refuses_what_it_cannot_index(tmp_path, argument, message):
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".git").touch()
    ended = run_example("quickstart", tmp_path / argument)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_quickstart_leaves_neither_workers_nor_files(tmp_path, signal_number):
    folder, temporary = make_folder(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.quickstart", str(folder)],
        cwd=CHECKOUT,
        env=example_environment(TMPDIR=str(temporary)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first = process.stdout.readline()
    send = os.killpg if signal_number == signal.SIGINT else os.kill  # Ctrl-C goes to all processes of a terminal
    send(process.pid, signal_number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted." in errors
    for pid in map(int, re.search(r"workers (\d+), (\d+)", first).groups()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert list(temporary.iterdir()) == []


# -- the others


@pytest.mark.parametrize("name", ["chains", "two_apps"])
def test_an_example_prints_what_its_docstring_says(name):
    assert output_of_example(name, flags=BARE) == documented_output(name)


def test_the_example_of_groups_counts_a_folder_in_two_processes_and_names_what_it_cannot_read(tmp_path):
    for name, text in {"a.txt": b"one", "b.txt": b"one two", "c.txt": b"one two three", "d.bin": b"\xff"}.items():
        (tmp_path / name).write_bytes(text)
    *lines, processes = run_example("groups", str(tmp_path)).stdout.splitlines()
    assert lines == [
        f"[{'#' * 50}] 4 of 4, 1 failed",
        "3 files, 6 words",
        "       3 c.txt",
        "       2 b.txt",
        "       1 a.txt",
        "not read: d.bin: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ]
    assert re.fullmatch("by [12] processes", processes)
    shapes = [re.sub(r"\w+", "x", line) for line in documented_output("groups").splitlines()]
    assert len(shapes) == len(lines) + 1
    assert shapes[0] == re.sub(r"\w+", "x", lines[0])


def test_retries_come_when_they_are_due_and_failures_end_among_the_dead_letters():
    time = re.compile(r"^(\d+) s  ", re.MULTILINE)
    output = output_of_example("retries_and_routing", flags=BARE)
    assert sorted(time.sub("", output).splitlines()) == sorted(
        time.sub("", documented_output("retries_and_routing")).splitlines()
    )
    seconds = {line: int(second) for second, line in re.findall(r"^(\d+) s  (.+?):", output, re.MULTILINE)}
    assert seconds["upload, attempt 2"] - seconds["upload, attempt 1"] >= 1
    assert seconds["upload, attempt 3"] - seconds["upload, attempt 2"] >= 1
    assert "call_partner: RetriesExhausted: " in output.partition("Dead letters:")[2]


async def test_the_web_application_publishes_what_its_worker_runs(tmp_path, monkeypatch):
    import httpx

    queue_file = tmp_path / "web.db"
    monkeypatch.setenv("QUEUE_FILE", str(queue_file))
    sys.modules.pop("examples.web", None)
    web = importlib.import_module("examples.web")
    async with web.lifespan(web.api) as state:

        async def api(scope, receive, send):
            await web.api({**scope, "state": dict(state)}, receive, send)

        client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test")
        refused = await client.post("/resize", params={"image": "cat.png", "width": "wide"})
        response = await client.post("/resize", params={"image": "cat.png", "width": 200})
        [waiting] = await web.app.service_bus_client.peek()
    assert refused.status_code == 422
    assert response.status_code == 202
    assert response.json() == {"task_id": json.loads(waiting.body)["task_id"]}
    printed = lines_of_worker(["-m", "examples.web"], 1, QUEUE_FILE=str(queue_file))
    assert printed == "resized cat.png to 200 pixels\n"


async def test_the_web_application_shows_what_a_worker_in_its_own_process_has_stored(start_program):
    import httpx

    server, output = start_program(
        """
import os
os.environ["WORKER"] = "1"
import uvicorn
from examples.web import api

uvicorn.run(api, port=0)
"""
    )
    address = await until(lambda: re.search(r"running on (http://\S+)", output.read_text()))
    async with httpx.AsyncClient(base_url=address[1]) as client:
        assert (await client.get("/images")).json() == {}
        await client.post("/resize", params={"image": "cat.png", "width": 200})

        async def stored():
            return (await client.get("/images")).json()

        assert await until(stored) == {"cat.png": 200}
    server.terminate()
    assert await exit_code((server, output)) in (0, -signal.SIGTERM)
    assert "resized cat.png to 200 pixels\n" in output.read_text()
    assert "Traceback" not in output.read_text()


SERVER_PROGRAM = """
import sys
import uvicorn
import examples.web as web

web.PATIENCE = float(sys.argv[1])
uvicorn.run(web.api, port=0)
"""


async def test_two_servers_on_one_file_await_results_and_are_asked_by_id(start_program):
    import httpx

    servers = [start_program(SERVER_PROGRAM, patience) for patience in (PATIENCE, 0.2)]
    addresses = [
        (await until(lambda output=output: re.search(r"running on (http://\S+)", output.read_text())))[1]
        for _, output in servers
    ]
    async with httpx.AsyncClient(base_url=addresses[0]) as one, httpx.AsyncClient(base_url=addresses[1]) as other:
        image = {"image": "cat.png"}
        started = (await one.post("/resize", params={**image, "width": 200})).json()["task_id"]
        failing = (await one.post("/resize", params={**image, "width": 0})).json()["task_id"]
        late = await other.post("/thumbnail", params=image)
        assert (late.status_code, set(late.json())) == (202, {"task_id"})
        for client in (one, other):
            assert (await client.get("/resize/unknown")).status_code == 404
            waiting = await client.get(f"/resize/{started}")
            assert (waiting.status_code, waiting.json()) == (202, {"task_id": started})

        start_program("import examples.web as web; web.asyncio.run(web.app.run())")

        async def answered():
            return (await other.get(f"/resize/{late.json()['task_id']}")).status_code == 200

        await until(answered)
        for client in (one, other):
            there = await client.get(f"/resize/{started}")
            assert (there.status_code, there.json()) == (200, {"url": "/images/cat-200.png"})
            failed = await client.get(f"/resize/{failing}")
            assert (failed.status_code, failed.json()) == (
                500,
                {"detail": "ValueError: cat.png cannot have 0 pixels"},
            )
        awaited = [
            one.post("/thumbnail", params={"image": f"{number}.png"}, timeout=2 * PATIENCE) for number in range(9)
        ]
        for number, response in enumerate(await asyncio.gather(*awaited)):
            assert (response.status_code, response.json()) == (200, {"url": f"/images/{number}-64.png"})
    for server, output in servers:
        server.terminate()
        assert await exit_code((server, output)) in (0, -signal.SIGTERM)
        assert "Traceback" not in output.read_text()


def test_the_periodic_workflow_runs_once_for_each_second_in_two_workers():
    *ticks, end = output_of_example("periodic", flags=BARE).splitlines()
    seconds = []
    for tick in ticks:
        line = r"(\d\d):(\d\d):(\d(\d)) measured (\d) degrees, (within|above) the limit"
        hour, minute, second, last_digit, degrees, which = re.fullmatch(line, tick).groups()
        assert (degrees, which) == (last_digit, "above" if int(degrees) > 6 else "within")
        seconds.append(int(hour) * 3600 + int(minute) * 60 + int(second))
    passed = sorted((each - seconds[0] + 43200) % 86400 for each in seconds)  # midnight may be among them
    assert len(passed) >= 3
    assert {later - earlier for earlier, later in itertools.pairwise(passed)} == {1}
    assert end == f"{len(ticks)} ticks in 2 workers, each run once"


def test_the_azure_program_publishes_and_works_over_the_wire():
    from examples.servicebus_emulator import ServiceBusEmulator

    with ServiceBusEmulator(queues=["tasks"]) as emulator:
        settings = {"SERVICEBUS_CONNECTION_STRING": emulator.connection_string, "SERVICE_BUS_QUEUE_NAME": "tasks"}
        published = run_example("azure", "publish", "Ada", "Bob", **settings)
        assert (published.returncode, published.stderr) == (0, "")
        greeted = lines_of_worker(["-m", "examples.azure", "work"], 2, **settings)
    assert f"{published.stdout}\n{greeted}" == documented_output("azure")


def test_the_local_program_differs_from_the_azure_one_by_the_bus(tmp_path):
    source = (CHECKOUT / "examples" / "azure.py").read_text()
    program = source.partition('"""\n\n')[2]
    changes = re.findall(r"^ +-(.+)\n +\+(.+)$", docstring_of_example("azure"), re.MULTILINE)
    assert len(changes) == 2
    for local, azure in changes:
        assert program.count(azure) == 1
        program = program.replace(azure, local)
    (tmp_path / "local.py").write_text(program)
    command = [sys.executable, "local.py", "publish", "Ada", "Bob"]
    subprocess.run(command, cwd=tmp_path, env=example_environment(), check=True, timeout=30, stdout=subprocess.DEVNULL)
    assert lines_of_worker(["local.py", "work"], 2, cwd=tmp_path) == "Hello, Ada!\nHello, Bob!\n"


def test_the_azure_program_says_what_the_environment_lacks():
    ended = run_example("azure", "publish")
    assert ended.returncode == 1
    assert "ConfigurationError: The Service Bus namespace is missing" in ended.stderr
    ended = run_example("azure", "publish", SERVICE_BUS_NAMESPACE_URL="example.servicebus.windows.net")
    assert "ConfigurationError: The queue is missing" in ended.stderr


# ======================================================================================================================
# Packaging, types, README
# ======================================================================================================================

CONSUMER = """\
from datetime import timedelta

from MODULE import Boilermaker, LocalServiceBus, RetryPolicy, Schedule, Task, TaskFailed, TaskFailureResult, retries

app = Boilermaker({"count": 0}, LocalServiceBus())


@app.task
async def resize(state: dict[str, int], image_id: str, width: int = 800) -> int:
    return width


@app.task(name="mail", policy=RetryPolicy(max_tries=3), acks_late=False)
async def send_mail(state: dict[str, int], address: str) -> object:
    return TaskFailureResult


async def plain(state: dict[str, int]) -> None: ...


app.register_async(plain, policy=retries.NoRetry())


@app.task(policy=RetryPolicy(max_tries=3), every=timedelta(minutes=5))
async def tidy(state: dict[str, int], of: int = 3) -> int:
    return of


@app.task(cron="0 4 * * *", timezone="Europe/Berlin")
async def report(state: dict[str, int]) -> None: ...


hourly: Schedule = app.schedule(resize.si("x") | send_mail.s(), every=timedelta(hours=1), name="hourly")
app.schedule(plain, cron="0 5 * * *")
names: list[str] = [name for name, each in app.schedules.items() if each.next_times(1)[0] < hourly.next_times(1)[0]]


async def work() -> None:
    await tidy.delay(of=4)
    await app.run(schedules=False)


@app.task(result_ttl=600)
async def thumbnail(state: dict[str, int], image: str) -> str:
    return image


@app.task(result_ttl=timedelta(minutes=10))
async def is_large(state: dict[str, int]) -> bool:
    return True


@app.task
async def route(state: dict[str, int], large: bool) -> Task[int]:
    return resize.si("x", 1) | is_large.si() if large else resize.si("y")


def same(task: Task) -> Task:  # of any result
    return task


async def width_of(task: Task[int]) -> int:
    return await task.result(timeout=5)


async def results() -> None:
    width: int = await (await resize.delay("x")).result(5)
    text: str = await (await (resize.si("x") | thumbnail.s()).publish()).result(timedelta(seconds=5))
    text = await (await app.publish_task(resize.si("x") >> thumbnail.s())).result(None)
    text = await (await (resize | thumbnail).publish()).result(0)
    width = await (await route.options(result_ttl=60).delay(True)).result(5)
    width = await (await app.publish_task(route.si(False) | route.s())).result(5)
    width = await (await app.apply_async(resize, "x", delay=1)).result(5)
    width = await (await app.apply_async(route, True)).result(5)
    width = await (await app.publish_task(app.create_task(resize, "x"))).result(5)
    width = await (await Task.si(resize, "x").copy().publish(result_ttl=60)).result(5)
    await (await app.publish_task(Task.si(plain))).result(5)
    width = await width_of(await is_large.delay()) + await width_of(await route.delay(False))
    try:
        anything = await same(await resize.delay("x")).result(5)
        by_id = await app.result("id", timeout=timedelta(seconds=5))
        by_name = await (await app.send_task("resize", "x", queue="theirs", result_ttl=5)).result(5)
        print(anything, by_id, by_name, text, width)
    except TaskFailed as failure:
        message: str = failure.error + failure.function_name + failure.message + failure.traceback + failure.task_id
        print(message, failure.attempts + 1)


async def publish() -> None:
    task: Task = await resize.delay("x", width=1)
    await app.publish_task(resize.si("x") | send_mail.s() | resize)
    await app.publish_many([task.copy(), resize.si("y")])
    await app.apply_async(resize, "x", width=1, delay=60, publish_attempts=3)
    width: int = await resize({}, "x")
    print(width + 1)
"""

MISTAKES = {
    "await resize.delay(1)": "a wrong type",
    'await resize.delay("x", height=1)': "an unknown keyword",
    "await resize.delay()": "a missing argument",
    'resize.si("x", "y")': "a wrong type, positional",
    'await send_mail.delay("x", "y")': "too many arguments",
    "wrong: str = await resize({}, 'x')": "a wrong result",
    "app.schedule(tidy, every=300)": "an interval that is none",
    "await tidy.delay('x')": "a wrong type, of a task with a schedule",
    'result: str = await (await resize.delay("x")).result(5)': "a wrong result, awaited",
    'another: int = await (await (resize.si("x") | thumbnail.s()).publish()).result(5)': "the first step's result",
    "returned: Task[int] = await (await route.delay(True)).result(5)": "the task returned, in place of its result",
    'await width_of(thumbnail.si("x"))': "a task of another result",
    "await task.result()": "no timeout",
    'await task.result("5")': "a timeout of a wrong type",
    'await app.result("id")': "no timeout, by id",
    'await app.publish_task(resize.si("x"), result_ttl="60")': "a time of a wrong type",
    'resize.options(results="x")': "an unknown option",
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=CHECKOUT, check=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has this package from its wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    return folder / "bin" / "python"


def consumer(folder: Path, module: str, *extra: str) -> Path:
    path = folder / "consumer.py"
    path.write_text(CONSUMER.replace("MODULE", module) + "".join(f"    {line}\n" for line in extra))
    return path


def checked(tool: str, python: Path, folder: Path) -> tuple[int, str]:
    """The exit code and the findings of a type checker, run in a folder as a user would."""
    if tool == "mypy":
        command = ["mypy", "--strict", "--python-executable", str(python), "."]
    else:
        (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "reportMissingTypeStubs": false}')
        command = ["pyright", "--pythonpath", str(python), "."]
    run = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_the_tests_test_this_checkout():
    assert Path(boilermaker.__file__) == CHECKOUT / "boilermaker.py"


def test_the_wheel_holds_the_module_and_its_types_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = ("__init__.py", "__main__.py", "dashboard.py", "dashboard.html", "py.typed")
    assert names == {f"boilermaker/{name}" for name in files}


def test_the_wheel_names_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    [metadata] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA")]
    assert "Requires-Dist: azure-servicebus>=7.15" in metadata
    assert "Requires-Dist: azure-identity" in metadata
    assert f"Version: {boilermaker.__version__}" in metadata


def test_the_installed_package_runs_without_azure(clean_python, tmp_path):
    code = "from boilermaker.app import Boilermaker; from boilermaker import retries; print('imported')"
    run = subprocess.run([clean_python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "imported\n", run.stderr


def test_the_installed_package_is_a_command_too(clean_python, wheel, tmp_path):
    command = [clean_python, "-I", "-m", "boilermaker", "--version"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == f"boilermaker {boilermaker.__version__}\n", run.stderr
    archive = zipfile.ZipFile(wheel)
    [scripts] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "boilermaker = boilermaker:main" in scripts


def test_without_azure_the_azure_bus_says_what_to_install(clean_python, tmp_path):
    code = "from boilermaker import AzureServiceBus; AzureServiceBus('example.servicebus.windows.net', 'tasks')"
    run = subprocess.run([clean_python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ConfigurationError" in run.stderr
    assert "pip install azure-servicebus azure-identity" in run.stderr


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_a_consumer_of_the_installed_package_type_checks(tool, clean_python, tmp_path):
    consumer(tmp_path, "boilermaker")
    code, findings = checked(tool, clean_python, tmp_path)
    assert code == 0, findings


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_wrong_arguments_are_found_by_type_checkers(tool, clean_python, tmp_path):
    path = consumer(tmp_path, "boilermaker", *MISTAKES)
    code, findings = checked(tool, clean_python, tmp_path)
    first = path.read_text().splitlines().index(f"    {next(iter(MISTAKES))}") + 1
    found = {int(line) for line in re.findall(r"consumer\.py:(\d+)[:\d]*(?: -)? error", findings)}
    assert code == 1
    assert found == set(range(first, first + len(MISTAKES))), findings


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_a_vendored_copy_and_its_consumer_type_check(tool, clean_python, tmp_path):
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "__init__.py").touch()
    shutil.copy(CHECKOUT / "boilermaker.py", tmp_path / "vendor" / "queueing.py")
    consumer(tmp_path, "vendor.queueing")
    bare = tmp_path.parent / f"{tmp_path.name}-python"
    venv.create(bare, with_pip=False, symlinks=True)
    code, findings = checked(tool, bare / "bin" / "python", tmp_path)
    assert code == 0, findings


def readme_programs() -> list[tuple[str, str]]:
    """The README's programs, each with the output that is shown below it."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    following = [*blocks[1:], ("", "")]
    return [
        (code, output if kind == "text" else "")
        for (language, code), (kind, output) in zip(blocks, following, strict=True)
        if language == "python"
    ]


@pytest.mark.parametrize(("program", "output"), readme_programs())
def test_a_program_of_the_readme_prints_what_it_shows(program, output, tmp_path):
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == output, run.stderr
    assert run.returncode == 0


SHOP = """
import asyncio, logging
from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus("shop.db"))


@app.task
async def resize(state, image):
    raise FileNotFoundError(f"no such image: {image}")


@app.task
async def mail(state, address):
    raise ConnectionError("relay.example: connection refused")


@app.task
async def charge(state, order):
    raise KeyError("currency")


async def night():
    for number in range(1, 31):
        images = [resize.si(f"{number}-{side}.png") for side in ("front", "left", "right", "back", "top", "inside")]
        await app.publish_many([*images, *[mail.si(f"{name}{number}@example.org") for name in ("ada", "bob", "eve")]])
        await charge.delay(1000 + number)
    await app.run(burst=True)
    await app.publish_many([mail.si("ada@example.org"), resize.si("new.png")])
    await app.apply_async(mail, "everybody@example.org", delay=3600)


if __name__ == "__main__":
    logging.disable()
    asyncio.run(night())
"""


def test_the_operators_evening_of_the_readme_goes_as_it_shows(tmp_path):
    [transcript] = re.findall(r"^```console\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "boilermaker").write_text(f'#!/bin/sh\nexec {sys.executable} {MODULE} "$@"\n')
    (tmp_path / "boilermaker").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, "shop.py"], cwd=tmp_path, env=environment, check=True)

    def masked(text):
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", "MOMENT", text)
        return re.sub(r" +", " ", re.sub(r"\b\d+(\.\d+)? (s|min)\b", "SPAN", text))

    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", transcript, re.MULTILINE)
    assert len(steps) >= 6
    for command, expected in steps:
        run = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert masked(run.stdout).splitlines() == masked(expected).splitlines(), (command, run.stderr)
        assert run.stderr == ""


def test_the_readme_shows_the_program_of_the_docstring():
    program, _ = readme_programs()[0]
    assert 'LocalServiceBus("tasks.db")' in program
    assert 'LocalServiceBus("tasks.db")' in (boilermaker.__doc__ or "")
