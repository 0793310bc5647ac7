"""One headless Chromium for the tests of this folder, which are skipped without Chromium."""

import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

NO_PLAYWRIGHT = "Playwright is not installed"
TIMEOUT_MS = 60_000  # for any one step on a slow machine


@pytest.fixture(scope="package")  # not "session": while Playwright runs, no event loop can run in this thread
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason=NO_PLAYWRIGHT, exc_type=ImportError)
    sync_api.expect.set_options(timeout=TIMEOUT_MS)
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses to run as root, such as in a container, with its sandbox. It only opens our own pages.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    """The browser context of a module, with the cookies, connections and locks that its pages share."""
    with browser.new_context() as context:
        yield context


@pytest.fixture
def open_page(browser: Any, context: Any) -> Iterator[Callable[..., Any]]:
    """Open a page with ``open_page(url)``, or in a context of its own with ``open_page(url, **options)``.

    A test fails if a page reports an error, unless the test removes the error from ``page.errors``.
    """
    contexts, pages = [], []

    def open_url(url: str, **options: Any) -> Any:
        if options:
            contexts.append(browser.new_context(**options))
        page = (contexts[-1] if options else context).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on(
            "console",
            lambda message: page.errors.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.goto(url)
        pages.append(page)
        return page

    yield open_url
    errors = [page.errors for page in pages]
    for opened in (*pages, *contexts):
        opened.close()
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
        """Log nothing."""


@pytest.fixture(scope="module")
def other_origin() -> Iterator[str]:
    """The URL of a blank page of another origin."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BlankPage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()
