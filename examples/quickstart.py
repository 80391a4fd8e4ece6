"""Index the text files of a folder: real work, through a durable queue, by two worker processes.

    python -m examples.quickstart [FOLDER]

Run it from the checkout; Python 3.11 is all it needs. FOLDER is this repository if it is not given. Each file is a
chain of tasks, fetch -> count -> store; when all have ended, another task writes the report. So that something goes
wrong, two files are added: `late.txt` is not there yet when it is fetched first, and is retried; `not-text.bin` fails
for good, and `cleanup` removes what was left of it. Publisher and workers share a temporary directory with the queue
and the index; the publisher knows the end when the index has every file as stored or failed. It prints:

    Publisher 4242, workers 4243, 4244: 13 files of /home/you/boilermaker, 2 added
    0.0 s: 0 task runs; files: 15 waiting
    1.0 s: 43 task runs; files: 1 failed, 13 stored, 1 to be retried
    1.3 s: 47 task runs; files: 1 failed, 14 stored
    Dead letter: TaskFailed: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte

    task        runs  retries     by 4243     by 4244
    fetch         16        1          10           6
    count         15        0           8           7
    store         14        0           6           8
    cleanup        1        0           1           0
    report         1        0           0           1
    exit code                           0           0

    14 files stored, 21151 words of four letters or more. The most frequent:
      self              1186 times in 3 files
      none               619 times in 9 files
      ...
    Failed: not-text.bin: count: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid ...
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from boilermaker import Boilermaker, BoilermakerError, LocalServiceBus, RetryException, RetryPolicy, current_task

WORKERS = 2
MAX_FILE_BYTES = 20_000_000
PATIENCE = 60  # seconds without any progress, after which the publisher gives up

# The publisher makes this directory, and removes it at the end; the workers know it from the environment.
HOME = Path(os.environ.get("QUICKSTART_HOME") or f"{tempfile.gettempdir()}/boilermaker-{uuid.uuid4()}")

# --- The index: the state that every task gets as its first argument --------------------------------------------------


class Index:
    """A SQLite file that all workers write to."""

    SCHEMA = """
        PRAGMA journal_mode = WAL;
        CREATE TABLE file   (number INTEGER PRIMARY KEY, name TEXT, state TEXT, words INTEGER, reason TEXT);
        CREATE TABLE word   (word TEXT, number INTEGER, times INTEGER, PRIMARY KEY (word, number));
        CREATE TABLE run    (task TEXT, worker INTEGER, attempt INTEGER);
        CREATE TABLE report (text TEXT);
    """

    @functools.cached_property
    def db(self) -> sqlite3.Connection:
        return sqlite3.connect(HOME / "index.db", timeout=30)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.db.execute(sql).fetchall()

    def write(self, sql: str, *rows: tuple[Any, ...]) -> None:
        with self.db:
            self.db.executemany(sql, rows)

    def set_state(self, number: int, state: str, words: int = 0, reason: str = "") -> None:
        self.write("UPDATE file SET state = ?, words = ?, reason = ? WHERE number = ?", (state, words, reason, number))

    def note_run(self) -> None:
        """Each task calls it, to tell what ran where."""
        task = current_task()
        self.write("INSERT INTO run VALUES (?, ?, ?)", (task.function_name, os.getpid(), task.attempts.attempts))


index = Index()
app = Boilermaker(index, LocalServiceBus(HOME / "queue.db"))

# --- The tasks --------------------------------------------------------------------------------------------------------


@app.task(policy=RetryPolicy(max_tries=5, delay=1))
async def fetch(index: Index, number: int, path: str) -> str:
    """Copy a file; the copy's path. One that is not there is looked for again a second later."""
    index.note_run()
    copy = HOME / f"{number}.copy"
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        await asyncio.to_thread(shutil.copyfile, path, copy)
    except FileNotFoundError as error:
        index.set_state(number, "to be retried")
        raise RetryException(f"{path!r} is not there") from error
    return str(copy)


@app.task
async def count(index: Index, copy: str) -> tuple[int, dict[str, int]]:
    """The number of words, and the most frequent ones. A file that is not UTF-8 fails for good."""
    index.note_run()
    text = await asyncio.to_thread(Path(copy).read_text, "utf-8")
    words = Counter(re.findall(r"[^\W\d_]{4,30}", text.lower()))
    return words.total(), dict(words.most_common(500))


@app.task
async def store(index: Index, counted: tuple[int, dict[str, int]], number: int) -> None:
    """Put words into the index. A task runs again if its worker dies, so it replaces what is there."""
    index.note_run()
    total, words = counted
    index.write("REPLACE INTO word VALUES (?, ?, ?)", *[(word, number, times) for word, times in words.items()])
    index.set_state(number, "stored", words=total)
    (HOME / f"{number}.copy").unlink(missing_ok=True)


@app.task
async def cleanup(index: Index, failure: dict[str, Any], number: int) -> None:
    """Runs when one of the three has failed for good; `failure` says which, and why."""
    index.note_run()
    (HOME / f"{number}.copy").unlink(missing_ok=True)
    index.set_state(number, "failed", reason=f"{failure['function_name']}: {failure['error']}: {failure['message']}")


@app.task
async def report(index: Index) -> None:
    index.note_run()
    [(files, total)] = index.rows("SELECT count(*), ifnull(sum(words), 0) FROM file WHERE state = 'stored'")
    text = f"{files} files stored, {total} words of four letters or more. The most frequent:\n"
    for row in index.rows("SELECT word, sum(times), count(*) FROM word GROUP BY word ORDER BY 2 DESC, 1 LIMIT 8"):
        text += "  {:<16}{:>6} times in {} files\n".format(*row)
    for row in index.rows("SELECT name, reason FROM file WHERE state = 'failed' ORDER BY number DESC LIMIT 8"):
        text += "Failed: {}: {}\n".format(*row)
    index.write("INSERT INTO report VALUES (?)", (text,))


# --- The processes ----------------------------------------------------------------------------------------------------


def work() -> None:
    """A worker: runs tasks until SIGTERM."""
    logging.basicConfig(filename=HOME / "worker.log", level=logging.INFO)
    asyncio.run(app.run(concurrency=4))


@contextlib.contextmanager
def running_workers() -> Iterator[list[BaseProcess]]:
    spawn = multiprocessing.get_context("spawn")
    workers: list[BaseProcess] = []
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the publisher, who tells them
    try:
        for _ in range(WORKERS):
            workers.append(spawn.Process(target=work))
            workers[-1].start()
        signal.signal(signal.SIGINT, interrupt)
        yield workers
    finally:
        for worker in workers:
            worker.terminate()  # SIGTERM: it finishes what it is doing
        for worker in workers:
            worker.join()


async def publish(paths: Sequence[Path], workers: Sequence[BaseProcess]) -> None:
    """The publisher: a chain for each file, and at the end the report."""
    progress = Progress(workers)
    async with app:
        await app.publish_many(
            app.chain(fetch.si(number, str(path)), count.s(), store.s(number), on_failure=cleanup.s(number))
            for number, path in enumerate(paths)
        )
        await progress.until(all_ended)
        await report.delay()
        await progress.until(lambda: bool(index.rows("SELECT * FROM report")))
        progress.show(last=True)
        for message in await app.service_bus_client.peek(3, dead_letter=True):
            print(f"Dead letter: {message.dead_letter_reason}: {message.dead_letter_error_description}")


def all_ended() -> bool:
    states = {state for (state,) in index.rows("SELECT DISTINCT state FROM file")}
    if "to be retried" in states and (draft := HOME / "late.draft").exists():
        draft.rename(HOME / "late.txt")
    return states <= {"stored", "failed"}


class Progress:
    """A line that is written over on a terminal, a line per second elsewhere."""

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self.workers = workers
        self.started = self.changed = time.monotonic()
        self.text = ""
        self.second = -1

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.show()
            if time.monotonic() - self.changed > PATIENCE or not any(worker.is_alive() for worker in self.workers):
                raise RuntimeError("The workers do not go on.")
            await asyncio.sleep(0.05)

    def show(self, last: bool = False) -> None:
        [(runs,)] = index.rows("SELECT count(*) FROM run")
        states = index.rows("SELECT count(*), state FROM file GROUP BY state ORDER BY state")
        text = f"{runs} task runs; files: {', '.join(f'{files} {state}' for files, state in states)}"
        now = time.monotonic()
        if text != self.text:
            self.text, self.changed = text, now
        seconds = now - self.started
        if sys.stdout.isatty():
            print(f"\r\033[K{seconds:.1f} s: {text}", end="\n" if last else "", flush=True)
        elif last or int(seconds) > self.second:
            print(f"{seconds:.1f} s: {text}", flush=True)
        self.second = int(seconds)


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, without hidden ones and caches."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name not in ("__pycache__", "node_modules")]
        found += [Path(root, name) for name in names if name[0] != "." and name.isprintable()]
    return sorted(path for path in found if path.is_file())


def quickstart(folder: Path, found: Sequence[Path]) -> None:
    (HOME / "late.draft").write_text("Better late than never.")
    (HOME / "not-text.bin").write_bytes(b"\xff\xfe\xff")
    paths = [*found, HOME / "late.txt", HOME / "not-text.bin"]
    index.db.executescript(Index.SCHEMA)
    index.write("INSERT INTO file (number, name, state) VALUES (?, ?, 'waiting')", *enumerate(p.name for p in paths))
    with running_workers() as workers:
        pids = [worker.pid for worker in workers]
        print(f"Publisher {os.getpid()}, workers {', '.join(map(str, pids))}: {len(found)} files of {folder}, 2 added")
        asyncio.run(publish(paths, workers))
    print(f"\n{'task':<10}{'runs':>6}{'retries':>9}" + "".join(f"{f'by {pid}':>12}" for pid in pids))
    runs = Counter(index.rows("SELECT task, worker FROM run"))
    for row in index.rows("SELECT task, count(*), sum(attempt > 0) FROM run GROUP BY task ORDER BY min(rowid)"):
        print("{:<10}{:>6}{:>9}".format(*row) + "".join(f"{runs[row[0], pid]:>12}" for pid in pids))
    print(f"{'exit code':<25}" + "".join(f"{worker.exitcode:>12}" for worker in workers))
    print("\n" + index.rows("SELECT text FROM report")[0][0], end="")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description="Index the files of a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent)
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    if not (found := files_in(folder.absolute())):
        parser.error(f"there are no files in {folder}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # it ends as by Ctrl-C
    os.environ["QUICKSTART_HOME"] = str(HOME)
    HOME.mkdir(mode=0o700)
    try:
        with contextlib.closing(index.db):
            quickstart(folder, found)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (BoilermakerError, RuntimeError) as error:
        log = HOME / "worker.log"
        print(f"\n{error}\nThe workers' log:\n{log.read_text()[-4000:] if log.exists() else ''}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(HOME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
