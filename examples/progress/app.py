"""The progress of a long job: POST starts the job, GET streams its progress and resumes after a reconnect."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.responses import HTMLResponse, PlainTextResponse

from asgi_sse import HTTPError, Request, ServerSentEvent, create_app

PAGE = HTMLResponse(Path(__file__).with_name("index.html").read_text())


class Job:
    def __init__(self) -> None:
        self.percent = 0
        self.changed = asyncio.Condition()
        self.task = asyncio.create_task(self.work())  # the event loop keeps no strong reference to a task

    async def work(self) -> None:
        while self.percent < 100:
            await asyncio.sleep(0.02)
            async with self.changed:
                self.percent += 1
                self.changed.notify_all()


jobs: dict[str, Job] = {}


async def progress(job: Job, seen: int) -> AsyncIterator[ServerSentEvent]:
    if seen >= 100:
        raise HTTPError(204)  # makes an EventSource stop that reconnects after the end
    while seen < 100:
        async with job.changed:
            while job.percent <= seen:
                await job.changed.wait()
        seen = job.percent  # the latest value: a slow client skips the values in between
        yield ServerSentEvent({"percent": seen}, event="progress" if seen < 100 else "done", id=seen)


async def endpoint(request: Request) -> AsyncIterator[ServerSentEvent] | PlainTextResponse:
    name = request.path_params["name"]
    job = jobs.get(name)
    if request.method == "POST":
        if job is not None and job.percent < 100:
            raise HTTPError(409, f"job {name} is already running")
        if len(jobs) >= 1000 or len(name) > 100:
            raise HTTPError(503, "there are too many jobs, or the name is too long")
        jobs[name] = Job()
        return PlainTextResponse(f"job {name} started\n", 202)
    if job is None:
        raise HTTPError(404, f"there is no job {name}")
    last = request.last_event_id or "0"
    return progress(job, int(last) if last.isdecimal() and len(last) <= 3 else 0)


app = create_app({"/": PAGE, "/jobs/{name}": endpoint})
