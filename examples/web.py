"""A web application that publishes tasks, and the worker that runs them.

    pip install fastapi uvicorn
    uvicorn examples.web:api            # the web application
    python -m examples.web              # the worker, in another terminal: any number of them
    curl -X POST 'http://127.0.0.1:8000/resize?image=cat.png&width=200'

The answer comes at once, when the task is on the disk:

    {"task_id":"01a1fd4d-d23f-74ef-b2da-1cd2b8fe21b0"}

and the worker prints:

    resized cat.png to 200 pixels

Both open the same queue file, `web.db` unless the environment has another QUEUE_FILE. The order of starting them does
not matter: tasks wait for a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI

from boilermaker import Boilermaker, LocalServiceBus

app = Boilermaker(None, LocalServiceBus(os.environ.get("QUEUE_FILE", "web.db")))


@app.task
async def resize(state: None, image: str, width: int = 800) -> None:
    print(f"resized {image} to {width} pixels", flush=True)


@contextlib.asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    async with app:  # closes the queue when the server ends
        yield


api = FastAPI(lifespan=lifespan)


@api.post("/resize", status_code=202)
async def post_resize(image: str, width: int = 800) -> dict[str, str]:
    task = await resize.delay(image, width)
    return {"task_id": task.task_id}


if __name__ == "__main__":
    asyncio.run(app.run())
