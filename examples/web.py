"""A web application that publishes tasks and awaits results, their worker, and one context manager that serves both.

    pip install fastapi uvicorn
    uvicorn examples.web:api            # the web application
    python -m examples.web              # the worker, in another terminal: any number of them
    curl -X POST 'http://127.0.0.1:8000/resize?image=cat.png&width=200'

The answer comes at once, when the task is on the disk:

    {"task_id":"01a1fd4d-d23f-74ef-b2da-1cd2b8fe21b0"}

The worker prints

    resized cat.png to 200 pixels

and `curl http://127.0.0.1:8000/images` shows what it has stored: `{"cat.png":200}`. What the task returned is there for
a day, for whoever asks by the id:

    curl http://127.0.0.1:8000/resize/01a1fd4d-d23f-74ef-b2da-1cd2b8fe21b0

answers 200 and `{"url":"/images/cat-200.png"}`; 202 as long as there is no result; 404 where nobody was given that id;
500 and the error where the task has failed. This one waits for its result:

    curl -X POST 'http://127.0.0.1:8000/thumbnail?image=cat.png'

200 and `{"url":"/images/cat-64.png"}`; 202 and the id, to be asked for, where it takes longer than 20 seconds.

Run as many servers as you like, `uvicorn --workers 2` too: any of them may be asked. All open the same queue file,
`web.db` unless the environment has another QUEUE_FILE, and `images.db` beside it. The order of starting servers and
workers does not matter: tasks wait for a worker. Or the web application has a worker in its own process, whose tasks
have a while to end when the server does:

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

from fastapi import FastAPI, HTTPException, Request, Response

from boilermaker import Boilermaker, LocalServiceBus, TaskFailed

QUEUE_FILE = Path(os.environ.get("QUEUE_FILE", "web.db"))
PATIENCE = 20.0
"""Seconds for which a request waits."""


class State(TypedDict):
    """What a task gets as its `state`, and a request as `request.state`."""

    images: sqlite3.Connection


@contextlib.asynccontextmanager
async def opened(owner: FastAPI | Boilermaker) -> AsyncIterator[State]:
    """What requests and tasks need, opened once in each server, by `lifespan`, and once in each worker, by `run`."""
    path = QUEUE_FILE.with_name("images.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as images:
        images.execute("CREATE TABLE IF NOT EXISTS image (name TEXT PRIMARY KEY, width INTEGER)")
        images.execute("CREATE TABLE IF NOT EXISTS given_id (task_id TEXT PRIMARY KEY)")
        yield {"images": images}


app = Boilermaker(None, LocalServiceBus(QUEUE_FILE), lifespan=opened)


@app.task(result_ttl=24 * 3600)
async def resize(state: State, image: str, width: int = 800) -> str:
    if width < 1:
        raise ValueError(f"{image} cannot have {width} pixels")
    state["images"].execute("INSERT OR REPLACE INTO image VALUES (?, ?)", (image, width))
    print(f"resized {image} to {width} pixels", flush=True)
    name = Path(image)
    return f"/images/{name.stem}-{width}{name.suffix}"


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
async def post_resize(request: Request, image: str, width: int = 800) -> dict[str, str]:
    """Start work, and say by which id to ask for its result."""
    task = await resize.delay(image, width)
    request.state.images.execute("INSERT INTO given_id VALUES (?)", (task.task_id,))
    return {"task_id": task.task_id}


@api.get("/resize/{task_id}")
async def get_resize(request: Request, response: Response, task_id: str) -> dict[str, str]:
    """The result, if it is there; the bus does not tell whether an id was ever given."""
    if request.state.images.execute("SELECT 1 FROM given_id WHERE task_id = ?", (task_id,)).fetchone() is None:
        raise HTTPException(404, f"no resizing has the id {task_id}")
    return await result_of(task_id, 0, response)


@api.post("/thumbnail")
async def post_thumbnail(request: Request, response: Response, image: str) -> dict[str, str]:
    """Start work, and wait for its result."""
    started = await post_resize(request, image, width=64)
    return await result_of(started["task_id"], PATIENCE, response)


async def result_of(task_id: str, timeout: float, response: Response) -> dict[str, str]:
    try:
        return {"url": await app.result(task_id, timeout)}
    except TimeoutError:
        response.status_code = 202
        return {"task_id": task_id}
    except TaskFailed as failure:
        raise HTTPException(500, f"{failure.error}: {failure.message}") from failure


@api.get("/images")
async def get_images(request: Request) -> dict[str, int]:
    return dict(request.state.images.execute("SELECT name, width FROM image"))


if __name__ == "__main__":
    asyncio.run(app.run())
