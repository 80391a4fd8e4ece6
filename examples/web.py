"""A web application that publishes tasks, the worker that runs them, and one context manager that serves both.

    pip install fastapi uvicorn
    uvicorn examples.web:api            # the web application
    python -m examples.web              # the worker, in another terminal: any number of them
    curl -X POST 'http://127.0.0.1:8000/resize?image=cat.png&width=200'

The answer comes at once, when the task is on the disk:

    {"task_id":"01a1fd4d-d23f-74ef-b2da-1cd2b8fe21b0"}

The worker prints

    resized cat.png to 200 pixels

and `curl http://127.0.0.1:8000/images` shows what it has stored: `{"cat.png":200}`.

Both open the same queue file, `web.db` unless the environment has another QUEUE_FILE, and `images.db` beside it. The
order of starting them does not matter: tasks wait for a worker. Or the web application has a worker in its own process,
whose tasks have a while to end when the server does:

    WORKER=1 uvicorn examples.web:api
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypedDict

from fastapi import FastAPI, Request

from boilermaker import Boilermaker, LocalServiceBus

QUEUE_FILE = Path(os.environ.get("QUEUE_FILE", "web.db"))


class State(TypedDict):
    """What a task gets as its `state`, and a request as `request.state`."""

    images: sqlite3.Connection


@contextlib.asynccontextmanager
async def opened(owner: FastAPI | Boilermaker) -> AsyncIterator[State]:
    """What requests and tasks need, opened once in each server, by `lifespan`, and once in each worker, by `run`."""
    path = QUEUE_FILE.with_name("images.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as images:
        images.execute("CREATE TABLE IF NOT EXISTS image (name TEXT PRIMARY KEY, width INTEGER)")
        yield {"images": images}


app = Boilermaker(None, LocalServiceBus(QUEUE_FILE), lifespan=opened)


@app.task
async def resize(state: State, image: str, width: int = 800) -> None:
    state["images"].execute("INSERT OR REPLACE INTO image VALUES (?, ?)", (image, width))
    print(f"resized {image} to {width} pixels", flush=True)


@contextlib.asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[State]:
    async with app, opened(api) as state:  # at the end the queue is closed, too
        worker = asyncio.create_task(app.run(grace_period=15)) if os.environ.get("WORKER") else None
        if worker is not None:
            worker.add_done_callback(end_server)
        yield state
        if worker is not None:
            await app.stop()  # the server has the signals; what runs has the grace period to end
            await worker  # raises what ended it


def end_server(worker: asyncio.Task[None]) -> None:
    """Rather no server than one that takes tasks and runs none."""
    if not worker.cancelled() and worker.exception() is not None:
        signal.raise_signal(signal.SIGTERM)


api = FastAPI(lifespan=lifespan)


@api.post("/resize", status_code=202)
async def post_resize(image: str, width: int = 800) -> dict[str, str]:
    task = await resize.delay(image, width)
    return {"task_id": task.task_id}


@api.get("/images")
async def get_images(request: Request) -> dict[str, int]:
    return dict(request.state.images.execute("SELECT name, width FROM image"))


if __name__ == "__main__":
    asyncio.run(app.run())
