"""Callbacks and chains: what runs when a task has returned, and what when it has failed.

    python -m examples.chains

A callback is a task on the queue like any other, so that it survives the worker that ran its parent. `.si()` binds all
arguments; `.s()` leaves room for the parent's result, or, in an `on_failure` callback, for a dict that describes the
failure. It prints:

    a >> b >> c, and what c calls back
      price: 2 x tea
      add_tax: 25 % on 8.0
      send_invoice: Ada pays 10.0
      archive: Ada's invoice
    a | b, and two ends for it
      price: 2 x coffee
      price: 2 x coffee
      add_tax: 10 % on 13.0
      add_tax: 10 % on 13.0
      send_invoice: Bob pays 14.3
      send_invoice: Cleo pays 14.3
      archive: Cleo's invoice
    on_success and on_failure, and it succeeds
      price: 1 x tea
      archive: Dan's order
    app.chain(a, b, c, on_failure=f), and it fails
      price: 3 x lemonade
      apologise: to Eve, as price raised KeyError: 'lemonade'
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from boilermaker import Boilermaker, LocalServiceBus

PRICES = {"tea": 4.0, "coffee": 6.5}

app = Boilermaker(PRICES, LocalServiceBus())  # a queue in memory: it ends with this process


@app.task
async def price(prices: dict[str, float], item: str, number: int) -> float:
    print(f"  price: {number} x {item}")
    return prices[item] * number


@app.task
async def add_tax(prices: dict[str, float], amount: float, percent: int = 25) -> float:
    print(f"  add_tax: {percent} % on {amount}")
    return amount * (1 + percent / 100)


@app.task
async def send_invoice(prices: dict[str, float], amount: float, customer: str) -> str:
    print(f"  send_invoice: {customer} pays {amount}")
    return f"{customer}'s invoice"


@app.task
async def archive(prices: dict[str, float], document: str) -> None:
    print(f"  archive: {document}")


@app.task
async def apologise(prices: dict[str, float], failure: dict[str, Any], customer: str) -> None:
    print(f"  apologise: to {customer}, as {failure['function_name']} raised {failure['error']}: {failure['message']}")


async def show(title: str) -> None:
    """Work until the queue is empty."""
    print(title)
    await app.run(burst=True)


async def main() -> None:
    logging.disable()  # failures would be logged, with their tracebacks

    # One after the other: each gets the result of the one before. What >> gives is the last; publish the first.
    first = price.si("tea", 2)
    last = first >> add_tax.s() >> send_invoice.s("Ada")
    last.on_success = archive.s()
    await app.publish_task(first)
    await show("a >> b >> c, and what c calls back")

    # `|` makes copies: one beginning, several workflows, and the whole is what one publishes.
    taxed = price.si("coffee", 2) | add_tax.s(percent=10)
    await app.publish_many([taxed | send_invoice.s("Bob"), taxed | send_invoice.s("Cleo") | archive.s()])
    await show("a | b, and two ends for it")

    # One callback for each case; the one that takes no result is made by .si().
    order = price.si("tea", 1)
    order.on_success = archive.si("Dan's order")
    order.on_failure = apologise.s("Dan")
    await order.publish()
    await show("on_success and on_failure, and it succeeds")

    # A chain stops at its first failure, and says so once.
    chain = app.chain(price.si("lemonade", 3), add_tax.s(), send_invoice.s("Eve"), on_failure=apologise.s("Eve"))
    await chain.publish()
    await show("app.chain(a, b, c, on_failure=f), and it fails")


if __name__ == "__main__":
    asyncio.run(main())
