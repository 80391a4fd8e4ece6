"""Two applications on two queues of one file, that call each other's tasks by name.

    python -m examples.two_apps

Neither imports the other: `send_task` needs the name of a task and that of a queue. A callback is a task of the caller,
and comes home to the caller's queue, wherever its parent ran. And with `result_ttl` the caller may await the answer; a
task that does lets another run in its place. In production each application is a process of its own; here they take
turns, and then work beside each other, so that the output is always the same:

    shop: ada@example.com orders a kettle
    shop: bob orders a lamp
    mailer: ada@example.com has had enough
    mailer: to ada@example.com: Your kettle is on its way
    shop: forgot ada@example.com, customers: ['bob']
    shop: shipped the kettle, as mail 1 says
    shop: calling bob: the mailer says that 'bob' is no address
    mailer: to eve@example.com: Welcome
    shop: greeted eve@example.com by mail 2
    shop: cannot greet bob: ValueError: 'bob' is no address
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any

from boilermaker import Boilermaker, LocalServiceBus, TaskFailed


def make_shop(path: Path) -> Boilermaker:
    app = Boilermaker({"ada@example.com", "bob"}, LocalServiceBus(path, "shop"))

    @app.task
    async def order(customers: set[str], item: str, address: str) -> None:
        print(f"shop: {address} orders a {item}")
        await app.send_task(
            "send_mail",
            address,
            subject=f"Your {item} is on its way",
            queue="mailer",
            on_success=shipped.s(item),
            on_failure=call_customer.s(address),
        )

    @app.task
    async def shipped(customers: set[str], mail_id: int, item: str) -> None:
        print(f"shop: shipped the {item}, as mail {mail_id} says")

    @app.task
    async def call_customer(customers: set[str], failure: dict[str, Any], address: str) -> None:
        print(f"shop: calling {address}: the mailer says that {failure['message']}")

    @app.task(result_ttl=60)
    async def greet(customers: set[str], address: str) -> str:
        mail = await app.send_task("send_mail", address, subject="Welcome", queue="mailer", result_ttl=60)
        try:
            return f"greeted {address} by mail {await mail.result(timeout=20)}"
        except TaskFailed as failure:
            return f"cannot greet {address}: {failure.error}: {failure.message}"

    @app.task
    async def forget_customer(customers: set[str], address: str) -> None:
        customers.discard(address)
        print(f"shop: forgot {address}, customers: {sorted(customers)}")

    return app


def make_mailer(path: Path) -> Boilermaker:
    app = Boilermaker([], LocalServiceBus(path, "mailer"))

    @app.task
    async def send_mail(sent: list[str], address: str, subject: str) -> int:
        if "@" not in address:
            raise ValueError(f"{address!r} is no address")
        print(f"mailer: to {address}: {subject}")
        sent.append(subject)
        return len(sent)

    @app.task
    async def unsubscribe(sent: list[str], address: str) -> None:
        print(f"mailer: {address} has had enough")
        await app.send_task("forget_customer", address, queue="shop")

    return app


async def main() -> None:
    logging.disable()  # the failure would be logged
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "queues.db")
        async with make_shop(path) as shop, make_mailer(path) as mailer:
            await shop.send_task("order", "kettle", "ada@example.com")
            await shop.send_task("order", "lamp", "bob")
            await shop.send_task("unsubscribe", "ada@example.com", queue="mailer")
            while any([await app.service_bus_client.peek(1) for app in (shop, mailer)]):
                await shop.run(burst=True)
                await mailer.run(burst=True)

            workers = [asyncio.create_task(app.run()) for app in (shop, mailer)]
            for address in ("eve@example.com", "bob"):
                greeting = await shop.send_task("greet", address, result_ttl=60)
                print(f"shop: {await greeting.result(timeout=20)}")
            await asyncio.gather(shop.stop(), mailer.stop(), *workers)


if __name__ == "__main__":
    asyncio.run(main())
