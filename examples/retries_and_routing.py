"""What a task can do but return: ask for a retry, fail, or hand over to another task; and where dead letters are.

    python -m examples.retries_and_routing

prints, in three seconds:

    0 s  upload, attempt 1: the server is busy
    0 s  call_partner, attempt 1: too many requests
    0 s  refresh_cache, attempt 1: not this time
    0 s  check_age, attempt 1: too young
    0 s  review, attempt 1: 20 is little
    0 s  review, attempt 1: 500 is much
    0 s  approve, attempt 1: 20
    0 s  ask_manager, attempt 1: 500
    0 s  file_away, attempt 1: 20 approved
    0 s  file_away, attempt 1: 500 to be decided
    1 s  upload, attempt 2: the server is busy
    2 s  call_partner, attempt 2: too many requests
    2 s  tell_support, attempt 1: call_partner gave up after 2 attempts
    3 s  upload, attempt 3: cat.png is there

    Dead letters:
      check_age: TaskFailed: The task returned TaskFailureResult.
      refund: UnregisteredFunction: boilermaker.UsageError: 'refund' is not registered: import its module before run().
      call_partner: RetriesExhausted: boilermaker.RetryExceptionDefaultLinear: too many requests
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from boilermaker import (
    Boilermaker,
    LocalServiceBus,
    NoRetry,
    RetryException,
    RetryExceptionDefaultLinear,
    RetryMode,
    RetryPolicy,
    Task,
    TaskFailureResult,
    current_task,
)

bus = LocalServiceBus()
app = Boilermaker(None, bus)
started = time.monotonic()


def say(text: str) -> None:
    task = current_task()
    print(f"{time.monotonic() - started:.0f} s  {task.function_name}, attempt {task.attempts.attempts + 1}: {text}")


# --- Retries ----------------------------------------------------------------------------------------------------------


@app.task(policy=RetryPolicy(max_tries=3, delay=1, retry_mode=RetryMode.Linear))
async def upload(state: None, name: str) -> None:
    """The registration's policy: 1 s after the first try, 2 s after the second."""
    if current_task().attempts.attempts < 2:
        say("the server is busy")
        raise RetryException("the server is busy")
    say(f"{name} is there")


@app.task
async def call_partner(state: None) -> None:
    """The exception's own policy goes first. After the last try: the dead-letter queue, and `on_failure`."""
    say("too many requests")
    raise RetryExceptionDefaultLinear("too many requests", delay=2, max_tries=2)


@app.task(policy=NoRetry(), should_dead_letter=False)
async def refresh_cache(state: None) -> None:
    """Not worth keeping: one try, and no dead letter."""
    say("not this time")
    raise RetryException("not this time")


@app.task
async def tell_support(state: None, failure: dict[str, Any]) -> None:
    say(f"{failure['function_name']} gave up after {failure['attempts']} attempts")


# --- Failing without an exception -------------------------------------------------------------------------------------


@app.task
async def check_age(state: None, age: int) -> object:
    if age < 18:
        say("too young")
        return TaskFailureResult
    return age


# --- Routing: a task that is returned takes over ----------------------------------------------------------------------


@app.task
async def review(state: None, amount: int) -> Task:
    say(f"{amount} is {'little' if amount < 100 else 'much'}")
    return approve.si(amount) if amount < 100 else ask_manager.si(amount)


@app.task
async def approve(state: None, amount: int) -> str:
    say(f"{amount}")
    return f"{amount} approved"


@app.task
async def ask_manager(state: None, amount: int) -> str:
    say(f"{amount}")
    return f"{amount} to be decided"


@app.task
async def file_away(state: None, decision: str) -> None:
    say(decision)


async def main() -> None:
    logging.disable()  # retries and failures would be logged
    partner = call_partner.si()
    partner.on_failure = tell_support.s()
    await app.publish_many([upload.si("cat.png"), partner, refresh_cache.si(), check_age.si(12)])
    await app.publish_many([review.si(amount) | file_away.s() for amount in (20, 500)])
    await app.send_task("refund")

    while await bus.peek(1):  # a burst does not wait for retries that are due later, but they can be seen
        await app.run(burst=True)
        await asyncio.sleep(0.05)

    print("\nDead letters:")
    for message in await bus.peek(dead_letter=True):
        name = json.loads(message.body)["function_name"]
        print(f"  {name}: {message.dead_letter_reason}: {message.dead_letter_error_description}")


if __name__ == "__main__":
    asyncio.run(main())
