"""A Django project in one file: a view that returns a stream, and a route outside Django that streams from the ORM."""

from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import anyio
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.db import connection, models
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.http import require_POST

from asgi_sse import HTTPError, Request, ServerSentEvent, SSEMiddleware
from asgi_sse.adapters.django import EventSourceResponse, endpoint

DATABASE = {"ENGINE": "django.db.backends.sqlite3", "NAME": Path(__file__).with_name("db.sqlite3")}
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="a secret", ALLOWED_HOSTS=["*"], DATABASES={"default": DATABASE})
django = get_asgi_application()  # models can only be defined after this


class Message(models.Model):
    text = models.TextField()

    class Meta:
        app_label = "chat"
        db_table = "messages"


async def ticks() -> AsyncIterator[ServerSentEvent]:
    for number in count(1):
        yield ServerSentEvent({"tick": number}, id=number)
        await anyio.sleep(0.2)


async def clock(request: HttpRequest) -> EventSourceResponse:
    return EventSourceResponse(ticks())


@require_POST
def say(request: HttpRequest) -> HttpResponse:
    message = Message.objects.create(text=request.POST.get("text", ""))
    return HttpResponse(f"message {message.pk}\n", status=201)


@endpoint
async def messages(request: Request) -> AsyncIterator[ServerSentEvent]:
    last = request.last_event_id or "0"  # a message's primary key
    if not last.isdecimal() or len(last) > 9:
        raise HTTPError(400, "Last-Event-ID must be an id of this stream")
    while True:
        async for message in Message.objects.filter(pk__gt=last).order_by("pk").aiterator():
            last = str(message.pk)
            yield ServerSentEvent({"text": message.text}, id=last)
        await anyio.sleep(0.2)


urlpatterns = [path("clock", clock), path("say", say)]
# The middleware answers /messages itself, and passes all other requests to Django.
application = SSEMiddleware(django, routes={"/messages": messages})

if __name__ == "__main__":  # creates the table, in place of "manage.py migrate"
    if "messages" not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(Message)
