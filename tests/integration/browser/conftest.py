"""One headless Chromium for the tests of this folder; they are skipped where there is none."""

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

NO_PLAYWRIGHT = "the browser is driven by Playwright, which is not installed"
ENOUGH = 60_000  # milliseconds for whatever a test waits for, on a slow machine


@pytest.fixture(scope="package")  # not of the session: while it is driven, no event loop can run in this thread
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium or google-chrome on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason=NO_PLAYWRIGHT, exc_type=ImportError)
    sync_api.expect.set_options(timeout=ENOUGH)
    with sync_api.sync_playwright() as playwright:
        # Without its sandbox it runs as root, too, as in a container; it opens our own pages alone.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """What the pages of a module share: cookies, connections, locks."""
    with browser.new_context() as context:
        yield context


@pytest.fixture
def open_page(browser: Any, context: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page: ``open_page(url)``, or ``open_page(url, **options)`` for one with a context of its own.

    At the end of the test no page may have told of an error, but those that were taken out of ``page.errors``.
    """
    own, pages = [], []

    def open_one(url: str, **options: Any) -> Any:
        if options:
            own.append(browser.new_context(**options))
        page = (own[-1] if options else context).new_page()
        page.set_default_timeout(ENOUGH)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda told: page.errors.append(told.text) if told.type in ("error", "warning") else None)
        page.goto(url)
        pages.append(page)
        return page

    yield open_one
    errors = [page.errors for page in pages]
    for thing in (*pages, *own):
        thing.close()
    assert errors == [[] for _ in pages]


class BlankPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<!doctype html><link rel=icon href=data:,><title>blank</title>"
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def other_origin() -> Iterator[str]:
    """A server of a blank page, at an origin of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BlankPage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()
