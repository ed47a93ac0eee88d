"""The live page in a real browser, against `loopserve observe` as a user starts it: Ray, two replicas, Prometheus, a load."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from monitoring.tools import find_tool

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
START_S_MAX, STOP_S_MAX, SHOWN_MS_MAX = 300.0, 90.0, 60_000.0
ENDED = ".turn.answer:not([aria-busy])"

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not here: install Debian's package chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running demo. At the end Ctrl-C ends it, and nothing of it is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("observe")
    log, temporary = folder / "log", folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "loopserve", "observe", "--port", str(port), "--dialogues", "4"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(temporary), "LOOPSERVE_TORCH_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Runners of tests may ignore SIGINT, and children inherit that; a terminal's do not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + START_S_MAX
            while "/observe" not in log.read_text():
                assert process.poll() is None, f"it ended by itself:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"it was not ready in time:\n{log.read_text()}"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                status = process.wait(STOP_S_MAX)
            finally:
                process.kill()
                process.wait()
    told = log.read_text()
    assert status == 0 and "Traceback" not in told, told
    assert re.search(r"The load is over: [1-9]\d* turns answered, 0 failed", told), told
    assert [path.name for path in temporary.glob("ls-*")] == []
    for url in re.findall(r"http://127\.0\.0\.1:\d+", told):  # the service and Prometheus
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=SHOWN_MS_MAX)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, *, width: int = 1280, height: int = 800) -> Iterator[Page]:
    """The page; it must ask nobody but its server and have nothing to complain about."""
    context = browser.new_context(viewport={"width": width, "height": height})
    complaints: list[str] = []
    asked: set[str] = set()
    page = context.new_page()
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    page.set_default_timeout(SHOWN_MS_MAX)
    page.goto(f"{address}/observe")
    yield page
    context.close()
    assert complaints == []
    assert asked and all(url.startswith(f"{address}/") for url in asked), asked


def wait_live(page: Page) -> None:
    expect(page.locator("#link")).to_have_text("live")


def until(page: Page, expression: str) -> None:
    """Wait for an expression to be true. Playwright's own wait evaluates text inside the page, which the page's policy forbids."""
    deadline = time.monotonic() + SHOWN_MS_MAX / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(100)


def figure(page: Page, name: str) -> str:
    return page.locator(".figure", has_text=name).locator(".value").inner_text()


def test_the_charts_show_what_the_load_does(browser: Browser, address: str):
    with opened(browser, address) as page:
        wait_live(page)
        until(page, "document.querySelectorAll('#replicas .cell').length >= 4")
        until(page, "document.querySelectorAll('#charts path.curve').length >= 4")
        until(
            page,
            "[...document.querySelectorAll('#ttft tbody tr')].some((row) => row.cells[2].textContent.includes('s'))",
        )
        until(
            page,
            "Number([...document.querySelectorAll('.figure')][0].querySelector('.value').textContent.replace(',', '')) > 0",
        )
        assert page.locator("#replicas .replica").count() == 2
        assert page.locator("#charts .lanes path.area").count() >= 8  # four kinds of two pools
        assert page.locator("#model").inner_text() == "loopserve-recall"
        assert figure(page, "Turns failed") == "0"
        assert page.locator("#pilot-note").inner_text().startswith("on")
        expect(page.locator("#decisions li").first).to_be_visible()


@pytest.mark.skipif(find_tool("prometheus") is None, reason="Prometheus is not here; `make tools` fetches it")
def test_a_page_that_is_opened_later_shows_what_was_before(browser: Browser, address: str):
    with opened(browser, address) as page:
        wait_live(page)
        page.wait_for_timeout(15_000)
    with opened(browser, address) as page:
        wait_live(page)
        # How far the first pool's chart reaches back, in seconds of its axis of five minutes, beyond the moment when the page was opened.
        until(page, "document.querySelector('.lanes rect.base') !== null")
        before_s = page.evaluate(
            """() => {
              const plot = document.querySelector('.lanes svg');
              const end = plot.querySelector('line.grid').getAttribute('x2');
              const start = plot.querySelector('rect.base').getAttribute('x');
              return 300 * (end - start) / (end - plot.querySelector('line.grid').getAttribute('x1')) - performance.now() / 1000;
            }"""
        )
        assert before_s > 10


def test_a_conversation_by_keyboard_alone_reuses_what_was_said(browser: Browser, address: str):
    with opened(browser, address) as page:
        wait_live(page)
        page.keyboard.press("Tab")  # the way past all charts
        assert page.evaluate("document.activeElement.textContent") == "Skip to the chat"
        page.keyboard.press("Enter")
        until(page, "document.activeElement.id === 'message'")
        for num_ended, text in enumerate(("Remember: locker 4417.", "What is my locker?"), start=1):
            page.keyboard.type(text)
            page.keyboard.press("Enter")
            expect(page.locator(ENDED)).to_have_count(num_ended)
        first, second = page.locator(".turn.answer").all()
        assert "4417" in second.locator(".said").inner_text()
        reused = [turn.locator("dd").first.inner_text() for turn in (first, second)]
        cached, prompt = (int(number) for number in re.findall(r"\d+", reused[1])[:2])
        assert reused[0].startswith("0 of ") and 0 < cached < prompt
        told = dict(zip(second.locator("dt").all_inner_texts(), second.locator("dd").all_inner_texts(), strict=True))
        assert list(told) == ["Reused", "Kept", "Coverage", "Budget", "Replica", "First token"]
        assert re.match(r"[01]\.\d{3}, worst head", told["Coverage"]), "the mode is sparse, so coverage is measured"
        until(page, "document.querySelectorAll('#replicas .cell.mine').length === 1")
        page.keyboard.press("Shift+Tab")  # budget
        page.keyboard.type("8")
        page.keyboard.press("Shift+Tab")  # mode
        page.keyboard.press("e")
        assert page.locator("#mode").input_value() == "exact"
        page.locator("#new").focus()
        page.keyboard.press("Enter")
        assert page.locator(".turn").count() == 0
        assert page.evaluate("document.activeElement.id") == "message"


def test_a_budget_is_kept_and_an_exact_turn_is_dense(browser: Browser, address: str):
    with opened(browser, address) as page:
        wait_live(page)
        page.fill("#budget", "8")
        _say(page, "Remember: locker 4417. " + "We talked about the weather and about a new bridge. " * 8)
        told = page.locator(".turn.answer .told").inner_text()
        kept, context = (int(number) for number in re.findall(r"(\d+) of (\d+) context", told)[0])
        assert kept < context and "8 tokens, as asked for" in told
        page.fill("#budget", "")
        page.select_option("#mode", "exact")
        _say(page, "What is my locker?")
        assert "dense; exact" in page.locator(".turn.answer .told").last.inner_text()


def _say(page: Page, text: str) -> None:
    num_ended = page.locator(ENDED).count()
    page.fill("#message", text)
    page.press("#message", "Enter")
    expect(page.locator(ENDED)).to_have_count(num_ended + 1)


def test_the_keyboard_moves_one_line_through_all_charts(browser: Browser, address: str):
    with opened(browser, address) as page:
        wait_live(page)
        until(page, "document.querySelectorAll('#charts path.curve').length >= 4")
        page.focus("#charts")
        page.keyboard.press("ArrowLeft")
        lines = page.locator("#charts line.now").evaluate_all("(lines) => lines.map((line) => line.getAttribute('x1'))")
        assert len(lines) == 6 and len(set(lines)) == 1  # four charts, two pools, one time
        assert re.match(r"\d\d:\d\d:\d\d: .*Tokens/s decode", page.locator("#time-spoken").inner_text())
        page.keyboard.press("Escape")
        assert page.locator("#charts line.now").count() == 0


def test_a_refused_turn_says_why_and_keeps_the_message(browser: Browser, address: str):
    with opened_with(browser, address, lambda page: page.route("**/v1/chat/completions", _overloaded)) as page:
        wait_live(page)
        page.fill("#message", "hello")
        page.press("#message", "Enter")
        expect(page.locator(".trouble")).to_have_text("too many turns wait")
        assert page.locator("#message").input_value() == "hello"


def _overloaded(route: Route) -> None:
    route.fulfill(status=429, json={"error": {"message": "too many turns wait"}})


@contextmanager
def opened_with(browser: Browser, address: str, prepare: Callable[[Page], None]) -> Iterator[Page]:
    """The page with something wrong about its server, of which the browser itself complains."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(SHOWN_MS_MAX)
    prepare(page)
    page.goto(f"{address}/observe")
    yield page
    context.close()


def test_a_server_that_goes_away_is_told_and_asked_again(browser: Browser, address: str):
    with opened_with(browser, address, lambda page: None) as page:
        wait_live(page)
        page.route("**/observe/state*", lambda route: route.abort())
        expect(page.locator("#link")).to_have_text("disconnected, trying again")
        assert page.locator("#replicas .replica").count() == 2  # what was known stays
        page.unroute("**/observe/state*")
        wait_live(page)


def test_with_keys_on_the_page_asks_for_one_and_sends_it(browser: Browser, address: str):
    keys: list[str | None] = []

    def ask_for_key(route: Route) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer ls-good":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no"}})

    with opened_with(browser, address, lambda page: page.route("**/observe/state*", ask_for_key)) as page:
        expect(page.locator("#link")).to_have_text("needs an API key")
        page.get_by_label("API key").fill("ls-bad")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#link")).to_have_text("key not accepted")
        page.get_by_label("API key").fill("ls-good")
        page.get_by_label("API key").press("Tab")
        wait_live(page)
    assert keys[0] is None


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (900, 1000), (390, 844)])
def test_nothing_is_cut_off_or_jumps(browser: Browser, address: str, width: int, height: int):
    with opened(browser, address, width=width, height=height) as page:
        page.evaluate(
            """() => {
              window.shift = 0;
              const add = (list) => { for (const entry of list.getEntries()) window.shift += entry.value; };
              new PerformanceObserver(add).observe({ type: 'layout-shift', buffered: true });
            }"""
        )
        wait_live(page)
        page.wait_for_timeout(5000)
        assert page.evaluate("window.shift") < 0.05  # a twentieth of the window; below a tenth counts as good
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        names = page.locator("button:visible, input:visible, select:visible, textarea:visible")
        for control in names.all():
            assert control.evaluate("(c) => c.textContent.trim() || c.labels?.[0]?.textContent.trim()"), (
                "a control without a name"
            )
