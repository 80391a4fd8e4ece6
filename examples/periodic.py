"""Periodic tasks: a workflow every second, published by two workers and run once.

    python -m examples.periodic

There is no scheduler. Each worker publishes the ticks of the next minutes as scheduled messages, under ids made of the
schedule's name and their time, and the queue keeps one of each. The first tick is the latest one that nobody has run.
`cron="30 2 * * *", timezone="Europe/Berlin"` in place of `every` goes by a clock; it needs `pip install cronsim`. What
it prints, but for the times:

    09:41:06 measured 6 degrees, within the limit
    09:41:07 measured 7 degrees, above the limit
    09:41:08 measured 8 degrees, above the limit
    3 ticks in 2 workers, each run once
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

from boilermaker import Boilermaker, LocalServiceBus, current_task

LIMIT = 6


def make_worker(path: Path, ticks: Counter[str], enough: asyncio.Event) -> Boilermaker:
    app = Boilermaker(None, LocalServiceBus(path))

    # timeout and expires are for periodic tasks what they are for others: here a run ends before the next tick, and
    # ticks do not pile up while no worker is there.
    @app.task(timeout=1, expires=timedelta(minutes=1))
    async def measure(state: None) -> tuple[str, int]:
        eta = current_task().eta  # when the tick was due, not when it runs
        assert eta is not None
        return f"{eta:%H:%M:%S}", eta.second % 10

    @app.task
    async def compare(state: None, measured: tuple[str, int], limit: int) -> None:
        time, degrees = measured
        ticks[time] += 1
        print(time, f"measured {degrees} degrees,", "above the limit" if degrees > limit else "within the limit")
        if len(ticks) == 3:
            enough.set()

    app.schedule(measure.si() | compare.s(LIMIT), every=timedelta(seconds=1), name="cellar")
    return app


async def main() -> None:
    ticks: Counter[str] = Counter()
    enough = asyncio.Event()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "periodic.db")
        async with make_worker(path, ticks, enough) as one, make_worker(path, ticks, enough) as other:
            workers = asyncio.gather(one.run(), other.run())
            await enough.wait()
            await asyncio.gather(one.stop(), other.stop())
            await workers
    again = sum(runs > 1 for runs in ticks.values())
    print(len(ticks), "ticks in 2 workers,", f"{again} run more than once" if again else "each run once")


if __name__ == "__main__":
    asyncio.run(main())
