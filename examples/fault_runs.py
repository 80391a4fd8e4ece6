"""Tasks while things go wrong: what ran again, what was published twice, what was lost.

    python -m examples.fault_runs [NAME ...] [--chains 500] [--seconds 60]

Each run publishes chains of two tasks, of which every tenth asks for a retry, to two worker processes. They work
through the unmodified Azure SDK on the emulator of this folder, which needs the packages of the extra `test`, or, in
the run `kill-local`, on the embedded queue. Meanwhile

    drop        all connections are cut, ten times
    away        the service cannot be reached, for a quarter of --seconds
    detach      all links are detached, ten times
    idle        nothing is published for --seconds, and in turn links are detached and connections cut every few
                seconds, as Azure does after minutes
    busy        sends are turned down as throttled, ten times three
    lose        settlements are applied, but their answers lost with the connection, ten times
    steal       all locks are taken away, ten times
    unlock      all connections are cut, ten times, and their locks go with them
    kill        workers are killed by SIGKILL at random for --seconds, on Azure ...
    kill-local  ... and on the embedded queue

A run is bad if a task never ran, a message was published twice, one is left, or a worker ended by itself. Then its
line says so, the log of its workers is printed, and the exit status is 1.
"""

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from boilermaker import (
    AzureServiceBus,
    Boilermaker,
    LocalServiceBus,
    RetryException,
    RetryPolicy,
    Task,
    TaskFunction,
    current_task,
)
from examples.servicebus_emulator import ServiceBusEmulator

WORKERS = 2
WORK = 0.05  # seconds that a task takes
LOCK_DURATION = 5  # seconds, the shortest on Azure
PATIENCE = 120  # seconds for all to be done once nothing goes wrong any more


class Tasks(NamedTuple):
    app: Boilermaker
    fetch: TaskFunction[[int], int]
    store: TaskFunction[[int], None]

    def chain(self, number: int) -> Task:
        return self.fetch.si(number) | self.store.s()


def tasks_on(address: str, journal: Path) -> Tasks:
    """The tasks, on the queue of a connection string or in a file; every run of one is a line of the journal."""
    bus = (
        AzureServiceBus.from_connection_string(address, "tasks")
        if address.startswith("Endpoint=")
        else LocalServiceBus(address, lock_duration=LOCK_DURATION, max_delivery_count=None, duplicate_detection=3600)
    )
    app = Boilermaker(None, bus)

    async def work(number: int) -> None:
        await asyncio.sleep(WORK)
        task = current_task()
        with journal.open("ab", buffering=0) as file:
            file.write(f"{task.function_name} {number} {task.attempts.attempts} {task.sequence_number}\n".encode())

    @app.task(policy=RetryPolicy(max_tries=3, delay=1))
    async def fetch(state: None, number: int) -> int:
        await work(number)
        if number % 10 == 0 and current_task().attempts.attempts == 0:
            raise RetryException("every tenth, once")
        return number

    @app.task
    async def store(state: None, number: int) -> None:
        await work(number)

    return Tasks(app, fetch, store)


class Run:
    """A queue, its workers, and the journal of what they ran."""

    def __init__(self, address: str, folder: Path, chains: int, seconds: float) -> None:
        self.address = address
        self.journal = folder / "journal"
        self.journal.touch()
        self.chains = chains
        self.seconds = seconds
        self.published = 0
        self.killed = 0
        self.tasks = tasks_on(address, self.journal)
        self.workers = [self.worker() for _ in range(WORKERS)]

    def worker(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "FAULT_RUNS_ADDRESS": self.address}
        command = [sys.executable, "-m", "examples.fault_runs", "--worker", str(self.journal)]
        with self.journal.with_name("log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stderr=log)

    async def publish(self, count: int) -> None:
        numbers = range(self.published, self.published + count)
        self.published += count
        await self.tasks.app.publish_many([self.tasks.chain(number) for number in numbers], publish_attempts=5)

    async def kill_one(self) -> None:
        victim = self.workers.pop(0)
        victim.kill()
        await asyncio.to_thread(victim.wait)
        self.killed += 1
        self.workers.append(self.worker())

    def runs(self) -> dict[tuple[str, ...], list[str]]:
        """The sequence numbers of the messages that each try of each task ran from."""
        runs = defaultdict(list)
        for line in self.journal.read_text().splitlines():
            *which, sequence_number = line.split()
            runs[tuple(which)].append(sequence_number)
        return runs

    def stored(self) -> int:
        return sum(name == "store" for name, *_ in self.runs())

    async def until_stored(self, count: float) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.stored() < count and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def left(self) -> int:
        bus = self.tasks.app.service_bus_client
        return len([*await bus.peek(1000), *await bus.peek(1000, dead_letter=True)])

    async def finish(self) -> None:
        """Wait until all has run and is settled."""
        await self.until_stored(self.published)
        deadline = time.monotonic() + LOCK_DURATION * 3
        while await self.left() and time.monotonic() < deadline:
            await asyncio.sleep(0.2)


# --- What goes wrong --------------------------------------------------------------------------------------------------

Control = Callable[[str], object]
Fault = Callable[[Run, Control], Awaitable[None]]


def ten_times(command: str) -> Fault:
    """Publish all at once; then disturb whenever another part of it is done."""

    async def fault(run: Run, control: Control) -> None:
        await run.publish(run.chains)
        for part in range(10):
            await run.until_stored(run.chains * (part + 0.5) / 11)
            with contextlib.suppress(ValueError):  # nothing is locked just now
                await asyncio.to_thread(control, command)

    return fault


async def unlock(run: Run, control: Control) -> None:
    await asyncio.to_thread(control, "unlock 1")
    await ten_times("drop")(run, control)


async def away(run: Run, control: Control) -> None:
    await run.publish(run.chains)
    await run.until_stored(run.chains / 3)
    await asyncio.to_thread(control, f"refuse {run.seconds / 4}")
    await asyncio.to_thread(control, "drop")
    await asyncio.sleep(run.seconds / 4)


async def idle(run: Run, control: Control) -> None:
    await run.publish(10)
    await run.until_stored(10)
    for command in ["detach", "drop"] * 6:
        await asyncio.sleep(run.seconds / 12)
        await asyncio.to_thread(control, command)
    await run.publish(run.chains - 10)


async def kill(run: Run, control: Control) -> None:
    publishing = asyncio.create_task(publish_slowly(run))
    deadline = time.monotonic() + run.seconds
    while time.monotonic() < deadline:
        await asyncio.sleep(random.uniform(0.5, 3))
        await run.kill_one()
    await publishing


async def publish_slowly(run: Run) -> None:
    """Spread over the time, so that there is always something to do."""
    for _ in range(run.chains // 10):
        await run.publish(10)
        await asyncio.sleep(run.seconds * 10 / run.chains)


FAULTS: dict[str, Fault] = {
    "drop": ten_times("drop"),
    "away": away,
    "detach": ten_times("detach"),
    "idle": idle,
    "busy": ten_times("busy 3"),
    "lose": ten_times("lose 1"),
    "steal": ten_times("steal all"),
    "unlock": unlock,
    "kill": kill,
    "kill-local": kill,
}


# --- Runs and their figures -------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    chains: int
    never_ran: int  # tasks
    ran_again: int  # messages that were delivered to a task more than once
    published_twice: int  # tries of tasks that had several messages
    left: int  # messages, dead letters among them
    killed: int  # workers
    ended: int  # workers that ended by themselves
    seconds: float

    @property
    def bad(self) -> bool:
        return bool(self.never_ran or self.published_twice or self.left or self.ended)


async def figures_of(name: str, address: str, control: Control, chains: int, seconds: float) -> Figures:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(address or f"{folder}/tasks.db", Path(folder), chains, seconds)
        try:
            await FAULTS[name](run, control)
            await run.finish()
            tries = run.runs()
            expected = {("fetch", str(n), str(int(n % 10 == 0))) for n in range(run.published)}
            expected |= {("store", str(n), "0") for n in range(run.published)}
            figures = Figures(
                chains=run.published,
                never_ran=len(expected - set(tries)),
                ran_again=sum(len(numbers) - len(set(numbers)) for numbers in tries.values()),
                published_twice=sum(len(set(numbers)) > 1 for numbers in tries.values()),
                left=await run.left(),
                killed=run.killed,
                ended=sum(worker.poll() is not None for worker in run.workers),
                seconds=time.monotonic() - started,
            )
        finally:
            for worker in run.workers:
                worker.kill()
                worker.wait()
            await run.tasks.app.close()
        if figures.bad:
            print(run.journal.with_name("log").read_text()[-5000:], file=sys.stderr)
    return figures


@contextlib.contextmanager
def place(name: str) -> Iterator[tuple[str, Control]]:
    """Where a run takes place: the address, empty for a new file, and what makes faults there."""
    if name.endswith("-local"):
        yield "", lambda command: None
    else:
        with ServiceBusEmulator(
            ["tasks"], lock_duration=LOCK_DURATION, duplicate_detection=3600, max_delivery_count=1000
        ) as emulator:
            yield emulator.connection_string, emulator.control


def main() -> None:
    parser = argparse.ArgumentParser(description="Tasks while things go wrong.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}; all of them by default")
    parser.add_argument("--chains", type=int, default=500, metavar="N", help="of each run, a multiple of 10")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of away, idle, kill and kill-local")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asyncio.run(tasks_on(os.environ["FAULT_RUNS_ADDRESS"], Path(options.worker)).app.run())
        return
    if unknown := set(options.names) - set(FAULTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the runs are {', '.join(FAULTS)}")
    if options.chains < 10 or options.chains % 10:
        parser.error(f"argument --chains: {options.chains} is not a multiple of 10")
    if not 0 < options.seconds < 2**31:
        parser.error(f"argument --seconds: {options.seconds} is not above 0 and below 2**31")
    print(f"{'':<12}" + "".join(f"{name.replace('_', ' '):>17}" for name in Figures._fields), flush=True)
    bad = False
    for name in options.names or FAULTS:
        with place(name) as (address, control):
            figures = asyncio.run(figures_of(name, address, control, options.chains, options.seconds))
        print(f"{name:<12}" + "".join(f"{figure:>17.0f}" for figure in figures) + "  bad" * figures.bad, flush=True)
        bad |= figures.bad
    sys.exit(bad)


if __name__ == "__main__":
    main()
