"""How fast the embedded queue is, beside a bare sqlite3 loop that does the same, and beside other task runners.

    python -m examples.benchmark [--rounds 5] [--tasks 20000] [--only drain,publish] [--picture benchmark.svg]

Part by part, the medians of the rounds, with the lowest and the highest; rounds alternate between the contestants, so
that all meet the same machine, and every measurement runs in new processes, on an empty queue:

    drain      No-op tasks a second in one worker process, on a queue filled before. The tasks write down the time:
               the rate is (N - 1) / (last - first).
    publish    Tasks a second from one process: each awaited before the next, in lists of 100, and by 100 coroutines at
               once. One by one, a tenth of the tasks.
    latency    From `delay()` in one process to the first line of the task in another, both idle before, 50 tasks a
               second: p50 and p99. Before that, what an idle worker costs: processor time and resident memory.
    results    No-op tasks whose results are awaited from another process than the worker's: one after the other, from
               `delay()` to the result, p50 and p99; and 1,000 published at once and awaited together, beside as many
               whose results nobody keeps, from publishing to the last task's run. Of boilermaker only.
    groups     A group of 10,000 no-op tasks, from publishing to its result in another process than the worker's, beside
               as many tasks, to the last one's run; on Azure, over the emulator, of 500. Of boilermaker only.
    io         1,000 tasks that sleep 0.1 s, 100 at once: ideally 1 s.
    processes  1, 2 and 4 worker processes of boilermaker on one file, started at once, four times the tasks.
    import     Starting Python and importing boilermaker, beside `import asyncio, sqlite3, json`, and nothing.
    kill       From `kill -9` of a worker to the task's second start in another one that runs already, both at their
               default settings. Of boilermaker only, unless --kill: others take minutes, or never start it again.
    growth     Only with --growth: drain and publish with 1,000,000 messages waiting, 100,000 scheduled and 100,000
               dead-lettered, and with 1,000 waiting; the memory this takes, and the size of the file.
    operating  With 300,000 dead letters, beside a worker that works and a publisher: how long `counts()` takes, how
               many tasks a second `replay` puts back by a predicate that looks at the reason, and by one that looks at
               the task, each in a process of its own, and the longest time for which the event loop of each stood
               still. The same while the worker buries 100,000 messages that have expired. Of boilermaker only.
    azure      The Azure bus over examples.servicebus_emulator, 32 tasks at once, beside the loop that one would write
               with the SDK alone, and beside boilermaker-servicebus 1.4.1. A tenth of the tasks; half to publish.
    replies    The same emulator: from publishing a no-op task to its result in the process that published it, one after
               the other, 500 of them, beside request and response by the SDK alone: p50 and p99.

Each task must run exactly once (in `kill`, twice): where one does not, or a worker of boilermaker says that the
database is locked, this script says so at the end and exits with 1.

The bare loop has boilermaker's schema, rows, batches and durability (synchronous=FULL to publish, NORMAL to claim and
delete), and nothing around them: no JSON, no event loop, no tasks. The peers run at the best setting that their
documentation has for the task; `python -m examples.peers` lists them. A peer that is not installed, or whose server
does not answer, is skipped. To install them, each at its newest release:

    pip install huey "pgqueuer[asyncpg]" uvloop "dramatiq[redis]" "celery[redis]" taskiq-redis streaq rq redis hiredis
    pip install arq "saq[redis]"          # in a second environment: they demand an older client of Redis

    pip install boilermaker-servicebus==1.4.1     # in a third one: it has the same name

    python -m examples.benchmark --python Saq,Arq=second/bin/python --python Original=third/bin/python

Give an empty Redis database and a PostgreSQL database without tables of pgqueuer: both are emptied again and again.
The servers keep their own settings, and with them their own durability: PostgreSQL as installed commits to the disk,
Redis as installed writes a snapshot now and then, so that a crash loses the tasks of the last minutes.

Where the microseconds go
-------------------------

Counted in thousands of instructions, which no neighbour disturbs (`valgrind --tool=cachegrind`, Debian's Python 3.11):

    drain at 100     290 a message. Decoding 83, of which its JSON 31 and the Task 7. From a message to its settlement,
                     decoding included, 123. Its asyncio task 18. The rest is SQLite, the event loop and the pump.
    publish_many     147 a task. Making the task 40; checking it 18; making its message 52; inserting it the rest.

So what bounds it is how many Python objects a message becomes, and how many functions look at it: to come nearer to
the bare loop there is no one thing to do; it would take a second, shorter reader of the wire format, and one asyncio
task for many messages, which the module does without. Publishing one by one is bounded by the disk, a fdatasync in a
thread for each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import html
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.peers import AZURE_PEERS, DOZE, NAP, PEERS, Ledger, Peer, memory, peak_memory

PATIENCE = 300
"""Seconds to wait for all tasks of a measurement."""

PACE = 50
"""Tasks a second, where latency is measured."""

Figures = dict[str, float]


class Failed(Exception):
    """A measurement that cannot count."""


# -- contestants


@dataclass(frozen=True)
class Contestant:
    """A peer with a setting."""

    name: str
    place: str = ""  # a URL; if empty, a new file each time
    python: str = sys.executable
    variant: str = ""
    concurrency: int = 0  # the peer's own if 0
    logging: bool = False

    @property
    def peer(self) -> type[Peer]:
        return PEERS[self.name]

    @property
    def label(self) -> str:
        return f"{self.peer.label}, {self.variant}" if self.variant else self.peer.label

    @property
    def group(self) -> str:
        """For the picture's colours."""
        groups = {"Boilermaker": "ours", "BoilermakerOnAzure": "ours", "Bare": "bare", "BareSdk": "bare"}
        return groups.get(self.name, "peer")


NOWHERE = "Endpoint=sb://localhost;SharedAccessKeyName=x;SharedAccessKey=x"
"""In place of an emulator's connection string, until there is one."""

OURS = Contestant("Boilermaker")
BARE = Contestant("Bare")


def found(options: argparse.Namespace) -> list[Contestant]:
    """The peers that can run here; a line for each other."""
    pythons = {name: path for names, path in options.python for name in names.split(",")}
    places = {"file": "", "redis": options.redis, "postgres": options.postgres, "rabbitmq": options.rabbitmq}
    contestants = [
        Contestant(name, places[peer.server], pythons.get(name, sys.executable))
        for name, peer in PEERS.items()
        if peer.server in places
    ]
    wanted = options.peers or list(PEERS)
    return [
        contestant
        for contestant in contestants
        if contestant.group != "peer" or (contestant.name in wanted and is_there(contestant))
    ]


def is_there(contestant: Contestant) -> bool:
    try:
        reason = call(contestant, "check", contestant.place or ":memory:")
    except Failed as error:
        reason = str(error)
    if reason:
        print(f"Skipped: {contestant.label}: {reason}.")
    return not reason


# -- processes

ROLE = "import examples.peers as peers; peers.main()"
ROOT = Path(__file__).resolve().parent.parent


def compile_for(python: str) -> None:
    """Write bytecode, as an installation does: else every process might compile for itself, which takes memory too."""
    subprocess.run([python, "-m", "compileall", "-q", "boilermaker.py", "examples/peers.py"], cwd=ROOT, check=True)


def command(contestant: Contestant, role: str, place: str, arguments: Mapping[str, Any]) -> list[str]:
    name = contestant.name
    return [contestant.python, "-c", ROLE, role, name, json.dumps({"place": place, **arguments})]


def call(contestant: Contestant, role: str, place: str, **arguments: Any) -> Any:
    """What a role of `examples.peers` gives, in a process of its own."""
    line = command(contestant, role, place, arguments)
    try:
        ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Failed(f"{contestant.label}: {role} took over {PATIENCE} s") from None
    if ended.returncode:
        raise Failed(f"{contestant.label}: {role}: {(ended.stderr.splitlines() or ['no output'])[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


@contextlib.contextmanager
def folder_for(contestant: Contestant) -> Iterator[tuple[Path, str]]:
    """A folder, and where the contestant's queue is."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name), contestant.place or str(Path(name, "queue.db"))


@contextlib.contextmanager
def worker(
    contestant: Contestant, folder: Path, place: str, count: int, concurrency: int = 0, at: float = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process, killed at the end; its ledger and its output are in the folder."""
    arguments: dict[str, Any] = {"path": str(folder / "ledger"), "count": count, "at": at}
    arguments["concurrency"] = concurrency or contestant.concurrency or contestant.peer.concurrency
    arguments["log"] = contestant.logging
    line = command(contestant, "work", place, arguments)
    with (folder / "output").open("ab") as output:
        process = subprocess.Popen(line, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        kill(process)
    if contestant.group == "ours" and b"database is locked" in (folder / "output").read_bytes():
        raise Failed(f"{contestant.label}: a worker says that the database is locked")


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(done: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not done():
        if time.monotonic() > end:
            raise Failed(f"{what} after {patience} s")
        time.sleep(0.05)


def first_ran(contestant: Contestant, times: Ledger, process: subprocess.Popen[bytes]) -> None:
    until(lambda: times.first[0] > 0 or process.poll() is not None, f"{contestant.label}: the first task did not run")
    if process.returncode is not None:
        raise Failed(f"{contestant.label}: the worker ended")


def all_ran(contestant: Contestant, times: Ledger, process: subprocess.Popen[bytes]) -> list[float]:
    """Wait for the last task; when each ran, in order. Each must have run once."""
    first_ran(contestant, times, process)
    count = len(times.first)
    until(lambda: bool(times.first[count - 1]) and min(times.first) > 0, f"{contestant.label}: not all tasks ran")
    time.sleep(0.3)
    if again := sum(1 for moment in times.again if moment):
        raise Failed(f"{contestant.label}: {again} tasks of {count} ran more than once")
    return sorted(times.first)


# -- rounds and tables


@dataclass(frozen=True)
class Row:
    """A contestant's figures, one a round."""

    label: str
    values: tuple[float, ...]
    group: str = "peer"

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Table:
    """Figures of one kind, the first row boilermaker's."""

    title: str
    unit: str
    rows: Sequence[Row]

    def ratio(self, row: Row, other: Row) -> float:
        """The median of the rounds' ratios, or the ratio of the medians if there are not as many rounds."""
        if len(row.values) == len(other.values) and all(other.values):
            return statistics.median(a / b for a, b in zip(row.values, other.values, strict=True))
        return row.median / other.median if other.median else math.nan


@dataclass
class Benchmark:
    """What the parts are given, and what went wrong in them."""

    options: argparse.Namespace
    contestants: Sequence[Contestant]
    failures: list[str] = field(default_factory=list)

    @property
    def peers(self) -> list[Contestant]:
        return [contestant for contestant in self.contestants if contestant.group == "peer"]

    def figures(
        self, part: str, contestants: Sequence[Contestant], measure: Callable[[Contestant], Figures]
    ) -> dict[Contestant, list[Figures]]:
        """Measure each contestant in each round; one that fails is left out."""
        results: dict[Contestant, list[Figures]] = {contestant: [] for contestant in contestants}
        for number in range(self.options.rounds):
            for contestant in list(results):
                try:
                    results[contestant].append(measured := measure(contestant))
                except Failed as error:
                    self.failures.append(f"{part}, round {number + 1}: {error}")
                    del results[contestant]
                else:
                    shown = ", ".join(f"{name} {value:.5g}" for name, value in measured.items())
                    print(f"{part}, round {number + 1}: {contestant.label}: {shown}", file=sys.stderr, flush=True)
        return results


def table(title: str, unit: str, results: Mapping[Contestant, list[Figures]], name: str) -> Table:
    rows = [
        Row(contestant.label, tuple(figures[name] for figures in rounds), contestant.group)
        for contestant, rounds in results.items()
        if rounds and not math.isnan(rounds[0][name])
    ]
    return Table(title, unit, rows)


# -- the parts


def drain(benchmark: Benchmark) -> list[Table]:
    count = benchmark.options.tasks
    contestants = [
        Contestant("Boilermaker", variant="concurrency 100", concurrency=100),
        Contestant("Boilermaker", variant="concurrency 10", concurrency=10),
        Contestant("Boilermaker", variant="100, logs INFO", concurrency=100, logging=True),
        BARE,
        *benchmark.peers,
    ]
    results = benchmark.figures("drain", contestants, functools.partial(drain_one, count=count))
    return [table(f"Drain: {count:,} no-op tasks, one worker process", "tasks/s", results, "rate")]


def drain_one(contestant: Contestant, count: int) -> Figures:
    with folder_for(contestant) as (folder, place):
        call(contestant, "fill", place, task="noop", count=count)
        times = Ledger.create(str(folder / "ledger"), count)
        with worker(contestant, folder, place, count) as process:
            moments = all_ran(contestant, times, process)
    return {"rate": rate(moments)}


def rate(moments: Sequence[float]) -> float:
    return (len(moments) - 1) / (moments[-1] - moments[0])


def publish(benchmark: Benchmark) -> list[Table]:
    many, few = benchmark.options.tasks, max(100, benchmark.options.tasks // 10)
    everybody = [OURS, BARE, *benchmark.peers]
    one = benchmark.figures("publish", everybody, functools.partial(publish_one, how="one", count=few))
    crowd = Contestant("Boilermaker", variant="100 coroutines")
    bulk = benchmark.figures(
        "publish in bulk",
        [
            Contestant("Boilermaker", variant="publish_many"),
            crowd,
            *(contestant for contestant in everybody[1:] if contestant.peer.bulk),
        ],
        lambda contestant: publish_one(contestant, "crowd" if contestant == crowd else "many", many),
    )
    return [
        table(f"Publish: {few:,} tasks one by one, each awaited", "tasks/s", one, "rate"),
        table(f"Publish: {many:,} tasks in bulk, 100 at a time", "tasks/s", bulk, "rate"),
    ]


def publish_one(contestant: Contestant, how: str, count: int) -> Figures:
    with folder_for(contestant) as (_, place):
        return {"rate": call(contestant, "publish", place, how=how, start=0, count=count)["rate"]}


def latency(benchmark: Benchmark) -> list[Table]:
    seconds = benchmark.options.seconds
    measure = functools.partial(latency_one, seconds=seconds)
    results = benchmark.figures("latency", [OURS, *benchmark.peers], measure)
    nothing = Row("Python: asyncio, sqlite3, json", tuple(memory_of_nothing() for _ in range(benchmark.options.rounds)))
    resident = table("An idle worker's resident memory (the server's not counted)", "MB", results, "memory")
    return [
        table(f"Latency, {PACE} tasks a second for {seconds:g} s: p50", "ms", results, "p50"),
        table(f"Latency, {PACE} tasks a second for {seconds:g} s: p99", "ms", results, "p99"),
        table(f"An idle worker's processor time, over {seconds:g} s", "% of a core", results, "processor"),
        Table(resident.title, resident.unit, [*resident.rows, nothing]),
    ]


def latency_one(contestant: Contestant, seconds: float) -> Figures:
    count = 1 + int(PACE * seconds)
    with folder_for(contestant) as (folder, place):
        call(contestant, "fill", place, task="noop", count=1)
        times = Ledger.create(str(folder / "ledger"), count)
        with worker(contestant, folder, place, count) as process:
            first_ran(contestant, times, process)
            time.sleep(2)
            figures = idle(process.pid, seconds)
            call(contestant, "drip", place, path=str(folder / "ledger"), count=count, pace=PACE)
            all_ran(contestant, times, process)
    delays = [(times.first[number] - times.published[number]) * 1000 for number in range(1, count)]
    return {"p50": statistics.median(delays), "p99": sorted(delays)[math.ceil(0.99 * len(delays)) - 1], **figures}


def idle(pid: int, seconds: float) -> Figures:
    """What a process uses that has nothing to do; NaN where there is no /proc."""
    before = processor_seconds(pid)
    time.sleep(seconds)
    return {"processor": (processor_seconds(pid) - before) / seconds * 100, "memory": memory(pid)}


def processor_seconds(pid: int) -> float:
    """By all threads of a process so far."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
    except OSError:
        return math.nan


def memory_of_nothing() -> float:
    code = "import asyncio, sqlite3, json; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = memory(process.pid)
        process.kill()
    return used


def results(benchmark: Benchmark) -> list[Table]:
    measure = functools.partial(results_one, one_by_one=200, together=1000)
    figures = benchmark.figures("results", [OURS], measure)
    together = [
        Row(label, tuple(each[name] for each in figures.get(OURS, [])), "ours")
        for label, name in (("not kept", "without"), ("awaited", "together"))
    ]
    return [
        table("Results: awaited one after the other, from another process: p50", "ms", figures, "p50"),
        table("Results: awaited one after the other, from another process: p99", "ms", figures, "p99"),
        *([Table("Results: 1,000 tasks at once", "ms", together)] if figures else []),
    ]


def results_one(contestant: Contestant, one_by_one: int, together: int) -> Figures:
    count = 1 + one_by_one + 2 * together
    with folder_for(contestant) as (folder, place):
        call(contestant, "fill", place, task="noop", count=1)
        times = Ledger.create(str(folder / "ledger"), count)
        with worker(contestant, folder, place, count) as process:
            first_ran(contestant, times, process)
            path = str(folder / "ledger")
            figures: Figures = call(contestant, "ask", place, path=path, one_by_one=one_by_one, together=together)
            all_ran(contestant, times, process)
    return figures


def groups(benchmark: Benchmark) -> list[Table]:
    tables = []
    for title, contestant, count in (
        ("Groups: 10,000 members", OURS, 10_000),
        ("Groups on Azure, over the emulator: 500 members", Contestant("BoilermakerOnAzure", NOWHERE), 500),
    ):
        if is_there(contestant):
            figures = benchmark.figures(title, [contestant], functools.partial(groups_one, count=count))
            rows = [
                Row(label, tuple(each[name] for each in figures.get(contestant, [])), "ours")
                for label, name in (("as many tasks", "plain"), ("the group, to its result", "group"))
            ]
            tables += [Table(title, "ms", rows)] if figures else []
    return tables


def groups_one(contestant: Contestant, count: int) -> Figures:
    with contextlib.ExitStack() as stack:
        folder, place = stack.enter_context(folder_for(contestant))
        place = stack.enter_context(emulator()) if contestant.place == NOWHERE else place
        path = str(folder / "ledger")
        Ledger.create(path, 1 + 2 * count)
        with worker(contestant, folder, place, 1 + 2 * count):
            figures: Figures = call(contestant, "join", place, path=path, count=count)
    return figures


def io(benchmark: Benchmark) -> list[Table]:
    contestants = [OURS, *(contestant for contestant in benchmark.peers if contestant.peer.parallel)]
    results = benchmark.figures("io", contestants, io_one)
    return [table(f"I/O: 1,000 tasks that sleep {NAP} s, 100 at once", "x the ideal 1.0 s", results, "seconds")]


def io_one(contestant: Contestant) -> Figures:
    with folder_for(contestant) as (folder, place):
        call(contestant, "fill", place, task="nap", count=1000)
        times = Ledger.create(str(folder / "ledger"), 1000)
        with worker(contestant, folder, place, 1000, concurrency=100) as process:
            moments = all_ran(contestant, times, process)
    return {"seconds": moments[-1] - moments[0] + NAP}


def processes(benchmark: Benchmark) -> list[Table]:
    count = 4 * benchmark.options.tasks
    contestants = [Contestant("Boilermaker", variant=f"{number} of them") for number in (1, 2, 4)]
    results = benchmark.figures(
        "processes",
        contestants,
        lambda contestant: processes_one(contestant, int(contestant.variant.split()[0]), count),
    )
    return [table(f"Several worker processes on one file, {count:,} tasks", "tasks/s", results, "rate")]


def processes_one(contestant: Contestant, number: int, count: int) -> Figures:
    with folder_for(contestant) as (folder, place):
        call(contestant, "fill", place, task="noop", count=count)
        times = Ledger.create(str(folder / "ledger"), count)
        with contextlib.ExitStack() as stack:
            at = time.monotonic() + 0.5 + 0.5 * number
            workers = [stack.enter_context(worker(contestant, folder, place, count, at=at)) for _ in range(number)]
            moments = all_ran(contestant, times, workers[0])
    return {"rate": rate(moments)}


def imports(benchmark: Benchmark) -> list[Table]:
    programs = ("import boilermaker", "import asyncio, sqlite3, json", "pass")
    times: dict[str, list[float]] = {program: [] for program in programs}
    for number in range(5 * benchmark.options.rounds + 1):
        for program in programs:
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
            if number:  # the first may have had to compile
                times[program].append((time.perf_counter() - started) * 1000)
    groups = ("ours", "bare", "bare")
    rows = [Row(program, tuple(times[program]), group) for program, group in zip(programs, groups, strict=True)]
    return [Table("Starting Python, with an import", "ms", rows)]


def killed(benchmark: Benchmark) -> list[Table]:
    patience = benchmark.options.patience
    measure = functools.partial(kill_one, patience=patience)
    results = benchmark.figures("kill", [OURS], measure)
    if benchmark.options.kill:
        once = Benchmark(argparse.Namespace(rounds=1), benchmark.contestants, benchmark.failures)
        results.update(once.figures("kill", benchmark.peers, measure))
    rows = table("From kill -9 of a worker to the task's second start", "s", results, "seconds").rows
    never = [row.label for row in rows if math.inf in row.values]
    if never:
        print(f"Not started again within {patience:g} s of kill -9: {'; '.join(never)}.")
    again = [row for row in rows if row.label not in never]
    return [Table("From kill -9 of a worker to the task's second start", "s", again)]


def kill_one(contestant: Contestant, patience: float) -> Figures:
    with folder_for(contestant) as (folder, place):
        call(contestant, "fill", place, task="hold", count=1)
        times = Ledger.create(str(folder / "ledger"), 1)
        with worker(contestant, folder, place, 1) as first:
            first_ran(contestant, times, first)
            with worker(contestant, folder, place, 1):
                time.sleep(3)
                started = time.monotonic()
                kill(first)
                with contextlib.suppress(Failed):
                    until(lambda: times.again[0] > 0, "not run again", patience)
                return {"seconds": times.again[0] - started if times.again[0] else math.inf}


def growth(benchmark: Benchmark) -> list[Table]:
    options = benchmark.options
    few, large = 1000, options.waiting
    contestants = [Contestant("Boilermaker", variant=f"{number:,} waiting") for number in (few, large)]
    results = benchmark.figures(
        "growth", contestants, lambda contestant: growth_one(contestant, few, large, options.tasks)
    )
    return [
        table(f"Growth: draining {options.tasks:,} tasks", "tasks/s", results, "drain"),
        table(f"Growth: publishing {options.tasks // 10:,} tasks one by one", "tasks/s", results, "one"),
        table(f"Growth: publishing {options.tasks:,} tasks in lists of 100", "tasks/s", results, "many"),
        table("Growth: the publisher's peak memory", "MB", results, "publisher"),
        table("Growth: the worker's peak memory", "MB", results, "worker"),
        table("Growth: the file before the drain", "MB", results, "before"),
        table("Growth: the file when all that was due has run", "MB", results, "after"),
    ]


def growth_one(contestant: Contestant, few: int, large: int, count: int) -> Figures:
    """Publish to a queue that is as full as the contestant's variant says, and drain it."""
    waiting = large if contestant.variant == f"{large:,} waiting" else few
    others = 0 if waiting == few else large // 10
    total = waiting + count + count // 10 + 2
    with folder_for(contestant) as (folder, place):
        call(contestant, "grow", place, waiting=waiting, scheduled=others, dead=others)
        publishing = functools.partial(call, contestant, "publish", place, clear=False)
        one = publishing(how="one", start=waiting, count=count // 10)
        many = publishing(how="many", start=waiting + count // 10 + 1, count=count)
        times = Ledger.create(str(folder / "ledger"), total)
        before = megabytes(folder)
        with worker(contestant, folder, place, total) as process:
            moments = all_ran(contestant, times, process)
            ledger = 8 * total / 2**20  # the tasks' own notes of the time
            figures = {"worker": peak_memory(process.pid) - ledger, "before": before, "after": megabytes(folder)}
    figures |= {"one": one["rate"], "many": many["rate"], "publisher": many["memory"]}
    return figures | {"drain": rate(moments[:count])}


def megabytes(folder: Path) -> float:
    """The size of the queue's file, and of those that SQLite has beside it."""
    return sum(path.stat().st_size for path in folder.glob("queue.db*")) / 1e6


def operating(benchmark: Benchmark) -> list[Table]:
    dead, expired = benchmark.options.dead, benchmark.options.dead // 3
    predicates = [Contestant("Boilermaker", variant=f"by {what}") for what in ("reason", "task")]
    figures = benchmark.figures("operating", predicates, functools.partial(operate_one, dead=dead))
    burying = benchmark.figures("operating, burying", [OURS], functools.partial(bury_one, expired=expired))
    return [
        table(f"Operating: counts() of {dead:,} dead letters", "ms", figures, "counts"),
        table(f"Operating: replaying {dead:,} dead letters by a predicate", "tasks/s", figures, "replay"),
        table("Operating: the operator's peak memory", "MB", figures, "memory"),
        table("Operating: longest gap in the worker's event loop during the replay", "ms", figures, "worker"),
        table("Operating: longest gap in the publisher's event loop during the replay", "ms", figures, "publisher"),
        table("Operating: longest gap in the operator's event loop during the replay", "ms", figures, "operator"),
        table(f"Operating: burying {expired:,} expired messages", "messages/s", burying, "rate"),
        table("Operating: longest gap in the worker's event loop during the burying", "ms", burying, "worker"),
        table("Operating: longest gap in the publisher's event loop during the burying", "ms", burying, "publisher"),
    ]


@contextlib.contextmanager
def bystander(contestant: Contestant, folder: Path, place: str, count: int, pace: float = 0) -> Iterator[Ledger]:
    """A worker process, or a publisher of so many tasks a second: what it notes of its event loop."""
    name = "publisher" if pace else "worker"
    gaps = Ledger.create(str(folder / name), 1)
    arguments = {"path": str(folder / "ledger"), "count": count, "gaps": str(folder / name), "pace": pace}
    with (folder / "output").open("ab") as output:
        line = command(contestant, "bystand", place, arguments)
        process = subprocess.Popen(line, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        until(lambda: gaps.first[0] > 0 or process.poll() is not None, f"the {name} did not begin")
        yield gaps
        if process.poll() is not None or b"database is locked" in (folder / "output").read_bytes():
            raise Failed(f"{contestant.label}: the {name}: {(folder / 'output').read_text()[-500:]}")
    finally:
        kill(process)


def operate_one(contestant: Contestant, dead: int) -> Figures:
    with folder_for(contestant) as (folder, place):
        call(contestant, "grow", place, waiting=0, scheduled=0, dead=dead)
        times = Ledger.create(str(folder / "ledger"), dead + 1)
        operator = Ledger.create(str(folder / "operator"), 1)
        bystand = functools.partial(bystander, contestant, folder, place, dead + 1)
        with bystand(pace=PACE) as publisher, bystand() as worker:
            until(lambda: times.again[dead] > 0, f"{contestant.label}: what was published did not run")
            publisher.first[0] = worker.first[0] = 0
            by = contestant.variant.removeprefix("by ")
            figures: Figures = call(contestant, "operate", place, gaps=str(folder / "operator"), by=by)
            for name, gaps in (("worker", worker), ("publisher", publisher), ("operator", operator)):
                figures[name] = 1000 * gaps.first[0]
            if figures.pop("replayed") != dead:
                raise Failed(f"{contestant.label}: not all dead letters were replayed")
            until(lambda: min(times.first) > 0, f"{contestant.label}: not all replayed tasks ran")
        if again := sum(1 for moment in times.again[:dead] if moment):
            raise Failed(f"{contestant.label}: {again} replayed tasks of {dead} ran more than once")
    return figures


def bury_one(contestant: Contestant, expired: int) -> Figures:
    """Start a worker on a queue of which all has expired; what is published meanwhile runs when that is buried."""
    with folder_for(contestant) as (folder, place):
        call(contestant, "grow", place, waiting=0, scheduled=0, dead=0, expired=expired)
        times = Ledger.create(str(folder / "ledger"), expired + 1)
        bystand = functools.partial(bystander, contestant, folder, place, expired + 1)
        with bystand(pace=PACE) as publisher:
            publisher.first[0] = 0
            with bystand() as worker:
                until(lambda: times.first[expired] > 0, f"{contestant.label}: what was published did not run")
                seconds = times.first[expired] - worker.published[0]
                gaps = {"worker": 1000 * worker.first[0], "publisher": 1000 * publisher.first[0]}
        if any(times.first[:expired]):
            raise Failed(f"{contestant.label}: an expired task ran")
    return {"rate": expired / seconds, **gaps}


def azure(benchmark: Benchmark) -> list[Table]:
    count = max(100, benchmark.options.tasks // 10)
    pythons = {name: path for names, path in benchmark.options.python for name in names.split(",")}
    everybody = [Contestant(peer.__name__, NOWHERE, pythons.get(peer.__name__, sys.executable)) for peer in AZURE_PEERS]
    contestants = [contestant for contestant in everybody if is_there(contestant)]
    tables = []
    for task, what in (("noop", "no-op tasks"), ("doze", f"tasks of {DOZE} s")):
        results = benchmark.figures(f"azure, {task}", contestants, functools.partial(azure_one, task=task, count=count))
        tables.append(table(f"Azure, over the emulator: {count:,} {what}, 32 at once", "tasks/s", results, "rate"))
    publishers = [contestant for contestant in contestants if contestant.peer.bulk]
    many = 5 * count
    results = benchmark.figures("azure, publish", publishers, functools.partial(azure_publish, count=many))
    return [
        *tables,
        table(f"Azure, over the emulator: publish {many:,} tasks in lists of 100", "tasks/s", results, "rate"),
    ]


def azure_one(contestant: Contestant, task: str, count: int) -> Figures:
    with tempfile.TemporaryDirectory() as name, emulator() as place:
        folder = Path(name)
        call(Contestant("BareSdk"), "fill", place, task=task, count=count)
        times = Ledger.create(str(folder / "ledger"), count)
        with worker(contestant, folder, place, count) as process:
            moments = all_ran(contestant, times, process)
    return {"rate": rate(moments)}


def azure_publish(contestant: Contestant, count: int) -> Figures:
    with emulator() as place:
        return {"rate": call(contestant, "publish", place, how="many", start=0, count=count)["rate"]}


def replies(benchmark: Benchmark) -> list[Table]:
    everybody = [
        Contestant("BoilermakerOnAzure", NOWHERE),
        Contestant("BareSdk", NOWHERE, variant="one at a time", concurrency=1),
    ]
    contestants = [contestant for contestant in everybody if is_there(contestant)]
    results = benchmark.figures("replies", contestants, functools.partial(replies_one, count=500))
    return [
        table("Azure, over the emulator: a no-op task's result, one after the other: p50", "ms", results, "p50"),
        table("Azure, over the emulator: a no-op task's result, one after the other: p99", "ms", results, "p99"),
    ]


def replies_one(contestant: Contestant, count: int) -> Figures:
    """The first two warm up."""
    with tempfile.TemporaryDirectory() as name, emulator() as place:
        folder = Path(name)
        times = Ledger.create(str(folder / "ledger"), count + 2)
        with worker(contestant, folder, place, count + 2) as process:
            seconds = call(contestant, "request", place, start=0, count=count + 2)[2:]
            all_ran(contestant, times, process)
    delays = sorted(1000 * each for each in seconds)
    return {"p50": statistics.median(delays), "p99": delays[math.ceil(0.99 * len(delays)) - 1]}


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """The connection string of a Service Bus with an empty queue, and those with sessions for replies and groups."""
    queues = ["--queue", "tasks", "--session-queue", "tasks-replies", "--session-queue", "tasks-join"]
    line = [sys.executable, "-m", "examples.servicebus_emulator", *queues, "--port", "0"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            place = next((text for text in process.stdout if text.startswith("Endpoint=")), "")
            if not place:
                raise Failed("examples.servicebus_emulator did not start: pip install python-qpid-proton")
            yield place.strip()
        finally:
            process.kill()


PARTS: dict[str, Callable[[Benchmark], list[Table]]] = {
    "drain": drain,
    "publish": publish,
    "latency": latency,
    "results": results,
    "groups": groups,
    "io": io,
    "processes": processes,
    "import": imports,
    "kill": killed,
    "growth": growth,
    "operating": operating,
    "azure": azure,
    "replies": replies,
}


# -- the report


def number_of(value: float) -> str:
    """With two digits that tell, or more."""
    if math.isnan(value):
        return "-"
    digits = next((places for least, places in ((100, 0), (10, 1), (0.1, 2)) if value >= least), 3)
    return f"{value:,.{digits}f}"


def lines_of(shown: Table) -> Iterator[str]:
    bare = next((row for row in shown.rows if row.group == "bare" and "loop" in row.label), None)
    yield f"{shown.title}, {shown.unit}"
    heads = ("median", "lowest", "highest", "to first", *(["to bare"] if bare else []))
    yield f"  {'':<36}" + "".join(f"{head:>11}" for head in heads)
    for row in shown.rows:
        figures = [number_of(value) for value in (row.median, min(row.values), max(row.values))]
        ratios = [number_of(shown.ratio(row, other)) for other in (shown.rows[0], bare) if other]
        yield f"  {row.label:<36}" + "".join(f"{figure:>11}" for figure in (*figures, *ratios))
    yield ""


def notes(benchmark: Benchmark) -> Iterator[str]:
    yield f"{benchmark.options.rounds} rounds; Python {sys.version.split()[0]}, {os.cpu_count()} processors. Settings:"
    for contestant in benchmark.contestants:
        bulk = f"; in bulk: {contestant.peer.bulk}" if contestant.peer.bulk else ""
        yield f"  {contestant.label}: {contestant.peer.setting}{bulk}"
    for failure in benchmark.failures:
        yield f"FAILED: {failure}"


# -- the picture

WIDTH, MARGIN, GAP, LINE, HEAD, LABEL, NUMBER = 1000, 16, 24, 17, 44, 200, 62
COLOURS = {"ours": "#b7410e", "bare": "#6e7781", "peer": "#8db4d9"}


def picture(tables: Sequence[Table]) -> str:
    """Horizontal bars, a panel for each table, in two columns on a ground of its own."""
    panels: list[str] = []
    heights = [MARGIN, MARGIN]
    width = (WIDTH - 2 * MARGIN - GAP) // 2
    for shown in tables:
        column = heights.index(min(heights))
        panels.append(panel(shown, MARGIN + column * (width + GAP), heights[column], width))
        heights[column] += HEAD + LINE * len(shown.rows) + 14
    height = max(heights)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#1f2328" role="img">\n'
        "<title>boilermaker beside a bare sqlite3 loop and other task runners</title>\n"
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>\n' + "\n".join(panels) + "\n"
        "</svg>\n"
    )


def panel(shown: Table, left: int, top: int, width: int) -> str:
    length, scale = bar_lengths([row.median for row in shown.rows], width - LABEL - NUMBER)
    head = (
        f'<text x="{left}" y="{top + 14}" font-size="13" font-weight="bold">{html.escape(shown.title)}</text>\n'
        f'<text x="{left}" y="{top + 30}" fill="#59636e">{html.escape(shown.unit + scale)}</text>'
    )
    bars = [bar(row, left, top + HEAD - 6 + LINE * place, length(row.median)) for place, row in enumerate(shown.rows)]
    return "\n".join([head, *bars])


def bar(row: Row, left: int, top: int, length: float) -> str:
    weight = ' font-weight="bold"' if row.group == "ours" else ""
    start, base = left + LABEL, top + 11
    return (
        f'<text x="{start - 6}" y="{base}" text-anchor="end"{weight}>{html.escape(row.label)}</text>'
        f'<rect x="{start}" y="{top + 2}" width="{length:.1f}" height="{LINE - 5}" fill="{COLOURS[row.group]}"/>'
        f'<text x="{start + length + 4:.1f}" y="{base}"{weight}>{number_of(row.median)}</text>'
    )


def bar_lengths(values: Sequence[float], width: int) -> tuple[Callable[[float], float], str]:
    """The length of each value's bar, and what to say of the scale: logarithmic if linear bars could not be told."""
    most, least = max(values), min(values)
    if least <= 0 or most / least < 500:
        return lambda value: max(1, width * value / most), ""
    floor = 10 ** math.floor(math.log10(least) - 0.3)
    return lambda value: width * math.log(value / floor) / math.log(most / floor), ", logarithmic"


# -- the command line


def a_python(text: str) -> tuple[str, str]:
    names, separator, path = text.partition("=")
    if not separator or not shutil.which(path) or not set(names.split(",")) <= set(PEERS):
        raise argparse.ArgumentTypeError(f"{text!r} must be PEER[,PEER]=INTERPRETER, peers of {', '.join(PEERS)}")
    return names, os.path.abspath(path) if os.sep in path else path


def some_of(names: Mapping[str, object]) -> Callable[[str], list[str]]:
    def check(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: must be of {', '.join(names)}")
        return text.split(",")

    return check


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="boilermaker beside a bare sqlite3 loop and other task runners.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=4, help="of the latency and of the idle worker")
    parser.add_argument("--only", type=some_of(PARTS), metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--peers", type=some_of(PEERS), metavar="PEERS", help=f"some of {','.join(PEERS)}")
    parser.add_argument("--python", type=a_python, action="append", default=[], metavar="PEERS=INTERPRETER")
    parser.add_argument("--picture", type=Path, help="write an SVG to this path")
    parser.add_argument("--kill", action="store_true", help="kill workers of the peers too, once each")
    parser.add_argument("--patience", type=float, default=700, help="seconds to wait for a task of a killed worker")
    parser.add_argument("--growth", action="store_true", help="measure a queue with many messages")
    parser.add_argument("--waiting", type=int, default=1_000_000, help="messages in it, and a tenth more of each kind")
    parser.add_argument("--dead", type=int, default=300_000, help="dead letters to operate on, a third to expire")
    for server, url in (
        ("redis", "redis://localhost:6379/15"),
        ("postgres", "postgresql://postgres@localhost:5432/postgres"),
        ("rabbitmq", "amqp://guest:guest@localhost:5672//"),
    ):
        variable = f"BENCHMARK_{server.upper()}"
        parser.add_argument(f"--{server}", default=os.environ.get(variable, url), help=f"its URL; or ${variable}")
    return parser.parse_args()


def report(benchmark: Benchmark, tables: Sequence[Table]) -> None:
    for shown in tables:
        print("\n".join(lines_of(shown)))
    print("\n".join(notes(benchmark)))
    if benchmark.options.picture:
        benchmark.options.picture.write_text(picture(tables))


def main() -> None:
    options = parsed()
    chosen = options.only or [name for name in PARTS if name != "growth" or options.growth]
    for python in {sys.executable, *(path for _, path in options.python)}:
        compile_for(python)
    benchmark = Benchmark(options, found(options))
    tables: list[Table] = []
    try:
        for name in chosen:
            tables += [shown for shown in PARTS[name](benchmark) if shown.rows]
    finally:
        for contestant in benchmark.peers:
            with contextlib.suppress(Failed):
                call(contestant, "remove", contestant.place or ":memory:")
    report(benchmark, tables)
    sys.exit(1 if benchmark.failures else 0)


if __name__ == "__main__":
    main()
