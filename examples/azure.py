"""A program on Azure Service Bus. What tells it from one on a local file is the bus:

    -from boilermaker import Boilermaker, LocalServiceBus
    +from boilermaker import AzureServiceBus, Boilermaker, Config

    -app = Boilermaker("Hello", LocalServiceBus("tasks.db"))
    +app = Boilermaker("Hello", AzureServiceBus.from_config(Config()))

It needs `pip install azure-servicebus azure-identity`, and a queue. The environment says which:

    export SERVICE_BUS_NAMESPACE_URL=example.servicebus.windows.net     # and `az login`, or another credential,
    export SERVICE_BUS_QUEUE_NAME=tasks                                 # that may send to the queue and receive
    python -m examples.azure publish Ada Bob
    python -m examples.azure work

or SERVICEBUS_CONNECTION_STRING in place of the first. In Azure itself, AZURE_CREDENTIAL_INCLUDE_MSI=true lets it use
the managed identity. (Run it with `-m`: as a script it would hide the package `azure`.) The two print:

    published greet('Ada')
    published greet('Bob')

    Hello, Ada!
    Hello, Bob!
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from boilermaker import AzureServiceBus, Boilermaker, Config

app = Boilermaker("Hello", AzureServiceBus.from_config(Config()))


@app.task
async def greet(greeting: str, name: str) -> None:
    print(f"{greeting}, {name}!", flush=True)


async def publish(names: Sequence[str]) -> None:
    async with app:
        for name in names:
            await greet.delay(name)
            print(f"published greet({name!r})")


async def work() -> None:
    async with app:
        await app.run()  # until Ctrl-C or SIGTERM


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["publish", *names]:
            asyncio.run(publish(names or ["world"]))
        case ["work"]:
            asyncio.run(work())
        case _:
            sys.exit("usage: python -m examples.azure publish [NAME ...] | work")
