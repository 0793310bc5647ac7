"""The demo page in a browser."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import free_port, serving

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed", exc_type=ImportError).expect

OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("demo") / "log"
    with serving([sys.executable, "-m", "asgi_sse", "--port", str(port)], port, log):
        yield f"http://127.0.0.1:{port}/"
    assert re.fullmatch(r"The demo runs at \S+ \(Ctrl-C ends it\)\n", log.read_text())


def number(page: Any, element_id: str) -> int:
    return int(page.text_content(f"#{element_id}"))


def wait_until(page: Any, condition: Callable[[], bool]) -> None:
    """Poll `condition` here: the page's content security policy forbids Playwright's wait_for_function."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, page.inner_text("main")
        page.wait_for_timeout(20)


def test_page_connects_and_shows_figures(open_page: OpenPage, demo: str) -> None:
    page = open_page(demo)
    expect(page.locator("#state")).to_have_text("Connected")
    expect(page.locator("#cpu")).to_have_text(re.compile(r"\d+ %"))
    expect(page.locator("#memory")).to_have_text(re.compile(r"[\d.]+ [KMGT]iB of [\d.]+ [KMGT]iB"))
    expect(page.locator("#running")).to_contain_text("/live")
    expect(page.locator("#running")).to_contain_text("open")
    first = page.text_content("#event")
    expect(page.locator("#event")).not_to_have_text(first)
    assert re.match(r"id: \w+-\d+\nevent: figures\ndata: \{", page.text_content("#event"))
    page.click("#toggle")
    expect(page.locator("#state")).to_have_text("Disconnected")
    page.click("#toggle")
    expect(page.locator("#state")).to_have_text("Connected")


def test_message_appears_in_every_tab_as_text(open_page: OpenPage, demo: str) -> None:
    one, other = open_page(demo), open_page(demo)
    for page in (one, other):
        expect(page.locator("#here")).to_have_text("2")
    message = "<b onclick=alert(1)>bold</b> \u2713"
    one.fill("#text-to-say", message)
    one.click("#say button")
    for page in (one, other):
        expect(page.locator("#posts li").last).to_have_text(one.text_content("#me") + message)
        assert page.locator("#posts b").last.get_attribute("onclick") is None
    expect(one.locator("#text-to-say")).to_have_value("")
    other.click("text=Bravo!")
    expect(one.locator("#posts li").last).to_have_text(other.text_content("#me") + "Bravo!")
    other.close()
    expect(one.locator("#here")).to_have_text("1")
    late = open_page(demo)
    expect(late.locator("#posts li").first).to_have_text(one.text_content("#me") + message)


def test_text_resumes_at_the_word_where_it_was_cut(open_page: OpenPage, demo: str) -> None:
    page, other = open_page(demo), open_page(demo)
    page.click("#begin")
    expect(other.locator("#begin")).to_have_text("Watch")
    other.click("#begin")  # gets the text from its first word
    wait_until(page, lambda: number(page, "received") >= 4)
    page.click("#cut")
    received, last = number(page, "received"), page.text_content("#story-id")
    wait_until(page, lambda: number(page, "written") >= received + 8)
    assert number(page, "missed") >= 8
    assert number(page, "received") == received
    assert page.text_content("#story-id") == last
    with page.expect_request(lambda request: "/story" in request.url) as request:
        page.click("#cut")
    assert request.value.url.endswith(f"&last_event_id={last}")
    expect(page.locator("#verdict")).to_have_text(
        re.compile(r"Resumed: \d+ missed words arrived at once; 0 lost, 0 repeated")
    )
    assert page.locator("#words .late").count() == number(page, "missed") >= 8
    expect(page.locator("#words .cut")).to_have_count(1)
    wait_until(other, lambda: number(other, "received") >= received + 8)
    words = [re.sub(r"disconnected", "", shown.text_content("#words"), count=1) for shown in (page, other)]
    shorter, longer = sorted(words, key=len)
    assert longer.startswith(shorter)
    assert shorter.startswith("Once upon a time there was a word")
    for shown in (page, other):
        assert "bad" not in shown.get_attribute("#verdict", "class")


def test_ended_streams_reconnect_at_different_times(open_page: OpenPage, demo: str) -> None:
    page = open_page(demo)
    expect(page.locator("#state")).to_have_text("Connected")
    page.click("#drain")
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(page.locator("#drained")).to_have_text(re.compile("All 30 clients are back"))
    expect(page.locator("#state")).to_have_text("Connected")
    first, last, page_time = map(float, re.findall(r"[\d.]+(?= s)", page.text_content("#drained")))
    assert 1 <= first <= last <= 15
    assert last - first > 0.5  # each client got a random time from a range of four seconds
    assert 1 <= page_time
    positions = page.eval_on_selector_all(".lane.back b", "(dots) => dots.map((dot) => dot.style.left)")
    assert len(positions) == 31
    assert len(set(positions)) > 15
    expect(page.locator("#ended")).to_contain_text("drained")
    expect(page.locator("#ended")).to_contain_text("/crowd \u00d7 ")


def test_page_works_with_the_keyboard_alone(open_page: OpenPage, demo: str) -> None:
    page = open_page(demo)
    expect(page.locator("#state")).to_have_text("Connected")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        focused = page.evaluate("""() => { const at = document.activeElement, style = getComputedStyle(at);
            return [at.id || at.textContent.slice(0, 8), style.outlineStyle, parseFloat(style.outlineWidth)] }""")
        assert (focused[1], focused[2] > 1) == ("solid", True), focused
        reached.append(focused[0])
        if focused[0] == "text-to-say":
            page.keyboard.type("by keyboard")
            page.keyboard.press("Enter")
        if focused[0] == "Tea?":
            page.keyboard.press("Space")
            break
    assert reached[:3] == ["toggle", "begin", "text"]
    assert {"drain", "posts", "text-to-say", "Send", "Hello!"} <= set(reached)
    expect(page.locator("#posts li").last).to_have_text(page.text_content("#me") + "Tea?")
    expect(page.locator("#posts")).to_contain_text("by keyboard")


def test_no_content_overflows_its_box(open_page: OpenPage, demo: str) -> None:
    page = open_page(demo, viewport={"width": 360, "height": 740})
    expect(page.locator("#running")).to_contain_text("/live")
    for width in (360, 480, 840, 960, 1000, 1200):  # 960: two windows side by side on a common screen
        page.set_viewport_size({"width": width, "height": 740})
        overflowing = page.evaluate("""() => {
            for (const id of ["in", "out"]) document.getElementById(id).textContent = "99.9 KiB/s";
            document.querySelector("#running td:nth-child(2)").textContent = "disconnected";
            document.querySelector("#running td").textContent = "/crowd \u00d7 30";
            const boxes = [...document.querySelectorAll(".tables, .machine, html")];
            return boxes.filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.className);
        }""")
        assert overflowing == [], width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_mode_on_a_phone_have_enough_contrast(scheme: str, open_page: OpenPage, demo: str) -> None:
    page = open_page(demo, color_scheme=scheme, viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    expect(page.locator("#running")).to_contain_text("/live")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    channels = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(channels[:3]) < 60) == (scheme == "dark")
    assert page.evaluate("document.getAnimations().length") == 0
    too_pale = page.evaluate("""() => {
        const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map((value) => value / 255)
                .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = (element) => {
            for (; element; element = element.parentElement) {
                const { backgroundColor } = getComputedStyle(element);
                if (!backgroundColor.startsWith("rgba")) return light(backgroundColor);
            }
        };
        return [...document.querySelectorAll("h1, h2, p, button:enabled, dt, dd, th, code, summary, td span")]
            .filter((element) => element.checkVisibility() && element.textContent.trim())
            .filter((element) => {
                const [a, b] = [light(getComputedStyle(element).color), behind(element)].sort((a, b) => a - b);
                return (b + 0.05) / (a + 0.05) < 4.5;  // WCAG 2.2, 1.4.3
            })
            .map((element) => element.outerHTML.slice(0, 90));
    }""")
    assert too_pale == []


def test_tabs_share_the_connections_of_the_browser(open_page: OpenPage, demo: str) -> None:
    """Over HTTP/1.1, a browser opens six connections to a server. A page that waits for one says so."""
    pages = [open_page(demo) for _ in range(5)]
    for page in pages[:4]:
        expect(page.locator("#state")).to_have_text("Connected")
    expect(pages[4].locator("#state")).to_have_text("Waiting for a connection")
    expect(pages[4].locator("#notice")).to_contain_text("six connections")
    pages[4].click("text=Hello!")  # two connections are left for requests
    expect(pages[0].locator("#posts")).to_contain_text(pages[4].text_content("#me"))
    # A stream that is closed while it searches for a slot does not wait for one.
    state = pages[4].evaluate("""async () => {
        live.close();
        live.open("live");
        live.close();
        for (let count = 0; count < 30; count++) await navigator.locks.query();
        return document.body.dataset.state;
    }""")
    assert state == "closed"
    pages[4].click("#toggle")
    expect(pages[4].locator("#state")).to_have_text("Waiting for a connection")
    pages[0].click("#toggle")
    expect(pages[4].locator("#state")).to_have_text("Connected")
    expect(pages[4].locator("#notice")).to_be_hidden()
    # A hidden tab closes its stream, and gets the missed events when it is shown again.
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    pages[4].clock.install()
    pages[4].evaluate(hide, True)
    pages[4].clock.fast_forward(6000)
    expect(pages[4].locator("#state")).to_have_text("Paused")
    pages[1].fill("#text-to-say", "sent while hidden")
    pages[1].keyboard.press("Enter")
    expect(pages[2].locator("#posts")).to_contain_text("sent while hidden")
    with pages[4].expect_request(lambda request: "/live?last_event_id=" in request.url):
        pages[4].evaluate(hide, False)
    expect(pages[4].locator("#posts li").last).to_contain_text("sent while hidden")


def test_ctrl_c_stops_the_demo_while_pages_are_open(open_page: OpenPage) -> None:
    port = free_port()
    arguments = [sys.executable, "-m", "asgi_sse", "--port", str(port)]
    with serving(arguments, port) as process:
        pages = [open_page(f"http://127.0.0.1:{port}/") for _ in range(2)]
        for page in pages:
            page.click("#begin")
            expect(page.locator("#verdict")).to_have_text("Receiving")
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 130
        except subprocess.TimeoutExpired:
            pytest.fail("the demo still runs")
        for page in pages:
            expect(page.locator("#state")).to_have_text("Reconnecting")
            expect(page.locator("#verdict")).to_have_text(
                re.compile(r"The server ended the text after word .* \(drained\)")
            )
            page.errors.clear()  # refused connections from now on are expected
            page.goto("about:blank")
            page.errors.clear()
