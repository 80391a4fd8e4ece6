"""A group: count the words of many files at the same time, in two worker processes, then report.

    python -m examples.groups [FOLDER]

`group(...)` runs tasks at the same time; what follows it by `|` runs when all have ended, with the list of their
results. Here a file that cannot be read leaves its failure in the list, by `return_exceptions=True`; else it would be
the end of the group. The queue is a file in a temporary folder. It prints, but for the numbers:

    [##################################################] 22 of 22, 1 failed
    21 files, 151617 words
       59690 test_boilermaker.py
       51490 boilermaker.py
       10539 README.md
    not read: dashboard.png: 'utf-8' codec can't decode byte 0x89 in position 0: invalid start byte
    by 2 processes
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from boilermaker import Boilermaker, LocalServiceBus, Progress, Task, group

WORKERS = 2
WIDTH = 50


def make_app(queue_file: Path) -> Boilermaker:
    app = Boilermaker(None, LocalServiceBus(queue_file))
    return app.register_async(count).register_async(report, result_ttl=60)


async def count(state: None, path: str) -> dict[str, Any]:
    await asyncio.sleep(0.1)  # as if it came from far away
    text = await asyncio.to_thread(Path(path).read_text, "utf-8")
    return {"words": len(text.split()), "process": os.getpid()}


async def report(state: None, counts: list[dict[str, Any]], paths: list[str]) -> str:
    """What the members returned, in their order; of one that failed, what an `on_failure` callback would get."""
    found = list(zip(counts, (Path(path).name for path in paths), strict=True))
    read = sorted(((each["words"], name) for each, name in found if "error" not in each), reverse=True)
    failed = [(name, each["message"]) for each, name in found if "error" in each]
    lines = [f"{len(read)} files, {sum(words for words, _ in read)} words"]
    lines += [f"{words:>8} {name}" for words, name in read[:3]]
    lines += [f"not read: {name}: {message}" for name, message in failed]
    return "\n".join([*lines, f"by {len({each.get('process') for each in counts} - {None})} processes"])


def work(queue_file: Path) -> None:
    logging.disable()  # the file that cannot be read would be logged, with its traceback
    asyncio.run(make_app(queue_file).run(concurrency=4))


async def count_all(queue_file: Path, paths: list[str]) -> str:
    async with make_app(queue_file) as app:
        counting = group((Task.si(count, path) for path in paths), return_exceptions=True)
        published = await app.publish_task(counting | Task.s(report, paths))
        while (progress := await published.progress()).done < progress.total:
            if sys.stdout.isatty():
                print(bar(progress), end="\r", flush=True)
            await asyncio.sleep(0.05)
        print(bar(progress))
        return await published.result(timeout=60)


def bar(progress: Progress) -> str:
    filled = WIDTH * progress.done // max(progress.total, 1)
    return f"[{'#' * filled:<{WIDTH}}] {progress.done} of {progress.total}, {progress.failed} failed"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.groups", description="Count the words of files.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent)
    folder = parser.parse_args().folder.absolute()
    paths = [path for each in (folder, folder / "examples") for path in sorted(each.glob("*.*")) if path.is_file()]
    with tempfile.TemporaryDirectory() as scratch:
        queue_file = Path(scratch, "tasks.db")
        start = multiprocessing.get_context("spawn").Process
        workers = [start(target=work, args=(queue_file,)) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        try:
            print(asyncio.run(count_all(queue_file, [str(path) for path in paths])))
        finally:
            for worker in workers:
                worker.terminate()  # SIGTERM, on which it ends when its tasks have
                worker.join()


if __name__ == "__main__":
    main()
