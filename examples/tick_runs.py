"""One-second ticks while their workers come and go: each once, from first to last.

    python -m examples.tick_runs [local] [azure] [short] [--seconds 60]

Three worker processes know a schedule of one-second ticks. For --seconds, every few seconds one of them is killed by
SIGKILL, or ended by SIGTERM, and replaced, now and then by one that knows another schedule besides, of every two
seconds. Half-way, all are killed, and none is there for ten ticks. The queue is the embedded one (`local`), or, by the
unmodified Azure SDK, one of the emulator of this folder, with duplicate detection for ten minutes (`azure`) or for
twenty seconds, the shortest window that Azure has (`short`).

While nobody is there nothing is lost that was published ahead; of the rest, who comes first makes up for the latest
tick. Ticks that are older then are counted as `skipped`: with a window of ten minutes there are none.

A run is bad if any other tick never ran, if one was two messages, or if a worker ended by itself. Then its line says
so, the log of its workers is printed, and the exit status is 1.
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from boilermaker import AzureServiceBus, Boilermaker, LocalServiceBus, current_task
from examples.servicebus_emulator import ServiceBusEmulator

WORKERS = 3
LOCK_DURATION = 5  # seconds, the shortest on Azure
AWAY = 10  # seconds without a worker
WINDOWS = {"local": 600, "azure": 600, "short": 20}  # seconds
START = 2  # seconds that a worker may take to publish its first ticks
PATIENCE = 60  # seconds for all that is due to run at the end
INTERVALS = {"second": 1, "other": 2}  # seconds, by the schedule's name


def app_of(address: str, window: float, journal: Path, schedules: list[str]) -> Boilermaker:
    """A worker's application; every run of a tick is a line of the journal."""
    if address.startswith("Endpoint="):
        bus = AzureServiceBus.from_connection_string(address, "tasks", duplicate_detection=window)
        app = Boilermaker(None, bus)
    else:
        app = Boilermaker(None, LocalServiceBus(address, lock_duration=LOCK_DURATION, max_delivery_count=None))

    @app.task
    async def tick(state: None) -> None:
        task = current_task()
        _, name, moment = task.task_id.split(":", 2)
        due = datetime.datetime.fromisoformat(moment).timestamp()
        with journal.open("ab", buffering=0) as file:
            file.write(f"{name} {due:.0f} {task.sequence_number}\n".encode())

    for name in schedules:
        app.schedule(tick, every=datetime.timedelta(seconds=INTERVALS[name]), name=name)
    return app


class Run:
    """A queue, its workers, and the journal of what they ran."""

    def __init__(self, address: str, window: float, folder: Path) -> None:
        self.address = address
        self.window = window
        self.journal = folder / "journal"
        self.journal.touch()
        self.log = folder / "log"
        self.killed = self.ended = 0
        self.workers: list[subprocess.Popen[bytes]] = []

    def start(self, *schedules: str) -> None:
        environment = {**os.environ, "TICK_RUNS_ADDRESS": self.address}
        command = [sys.executable, "-m", "examples.tick_runs", "--worker", str(self.journal), *schedules]
        with self.log.open("ab") as log:
            command += ["--window", str(self.window)]
            self.workers.append(subprocess.Popen(command, env=environment, stderr=log))

    async def end(self, kill: bool) -> None:
        worker = self.workers.pop(0)
        self.ended += worker.poll() is not None
        worker.kill() if kill else worker.terminate()
        await asyncio.to_thread(worker.wait)
        self.killed += kill

    async def replace_some(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        others = itertools.cycle([["second"], ["second", "other"]])  # of three workers, one knows both
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(random.uniform(1, 5), left))
            await self.end(kill=random.random() < 0.7)
            self.start(*next(others))

    def ticks(self) -> dict[str, dict[int, list[str]]]:
        """The sequence numbers of the messages that each tick of each schedule ran from."""
        ticks: dict[str, dict[int, list[str]]] = {name: defaultdict(list) for name in INTERVALS}
        for line in self.journal.read_text().splitlines():
            name, due, sequence_number = line.split()
            ticks[name][int(due)].append(sequence_number)
        return ticks

    async def until_ran(self, moment: float) -> None:
        """Wait until the ticks of every second up to a moment have had the time to run."""
        deadline = time.monotonic() + PATIENCE
        while max(self.ticks()["second"], default=0) < moment and time.monotonic() < deadline:
            await asyncio.sleep(0.05)


class Figures(NamedTuple):
    ticks: int
    never_ran: int
    skipped: int  # while nobody was there
    ran_again: int  # messages that were delivered to a task more than once
    published_twice: int  # ticks that had several messages
    killed: int  # workers
    ended: int  # workers that ended by themselves
    seconds: float

    @property
    def bad(self) -> bool:
        return bool(self.never_ran or self.published_twice or self.ended or not self.ticks)


async def figures_of(run: Run, seconds: float) -> Figures:
    started = time.monotonic()
    for _ in range(WORKERS):
        run.start("second", "other")
    await run.until_ran(1)
    await run.replace_some(seconds / 2)
    for _ in range(WORKERS):
        await run.end(kill=True)
    gone = time.time()
    await asyncio.sleep(AWAY)
    back = time.time()
    for _ in range(WORKERS):
        run.start("second", "other")
    await run.until_ran(back + START)
    await run.replace_some(seconds / 2)
    await run.until_ran(time.time() + START)
    for _ in range(WORKERS):
        await run.end(kill=False)

    never_ran = skipped = 0
    ticks = run.ticks()
    for name, interval in INTERVALS.items():
        missing = set(range(min(ticks[name]), max(ticks[name]), interval)) - set(ticks[name])
        # Published ahead were those of half the window; the first that ran since tells when somebody was there again.
        back_again = min((due for due in ticks[name] if due >= back), default=back)
        old = {due for due in missing if gone < due < back_again} if run.window / 2 < AWAY + START else set()
        skipped += len(old)
        never_ran += len(missing - old)
    messages = [numbers for name in INTERVALS for numbers in ticks[name].values()]
    return Figures(
        ticks=len(messages),
        never_ran=never_ran,
        skipped=skipped,
        ran_again=sum(len(numbers) - len(set(numbers)) for numbers in messages),
        published_twice=sum(len(set(numbers)) > 1 for numbers in messages),
        killed=run.killed,
        ended=run.ended,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def place(name: str, folder: str) -> Iterator[str]:
    """The address of a new queue."""
    if name == "local":
        yield f"{folder}/tasks.db"
    else:
        settings = {"duplicate_detection": WINDOWS[name], "lock_duration": LOCK_DURATION, "max_delivery_count": 1000}
        with ServiceBusEmulator(["tasks"], **settings) as emulator:
            yield emulator.connection_string


def main() -> None:
    parser = argparse.ArgumentParser(description="One-second ticks while their workers come and go.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WINDOWS)}; all of them by default")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="for which workers come and go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--window", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        address = os.environ["TICK_RUNS_ADDRESS"]
        asyncio.run(app_of(address, options.window, Path(options.worker), options.names).run())
        return
    if unknown := set(options.names) - set(WINDOWS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the runs are {', '.join(WINDOWS)}")
    if not 0 < options.seconds < 2**31:
        parser.error(f"argument --seconds: {options.seconds} is not above 0 and below 2**31")
    print(f"{'':<8}" + "".join(f"{name.replace('_', ' '):>17}" for name in Figures._fields), flush=True)
    bad = False
    for name in options.names or WINDOWS:
        with tempfile.TemporaryDirectory() as folder, place(name, folder) as address:
            run = Run(address, WINDOWS[name], Path(folder))
            try:
                figures = asyncio.run(figures_of(run, options.seconds))
            finally:
                for worker in run.workers:
                    worker.kill()
                    worker.wait()
            if figures.bad:
                print(run.log.read_text()[-5000:], file=sys.stderr)
        print(f"{name:<8}" + "".join(f"{figure:>17.0f}" for figure in figures) + "  bad" * figures.bad, flush=True)
        bad |= figures.bad
    sys.exit(bad)


if __name__ == "__main__":
    main()
