"""Boards as PNG files: the page that esbuild made of `board.jsx`, filled with answers, photographed by Chromium."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Route, sync_playwright

BUILT = Path(__file__).parent / "build"
WIDTH = 1320
_WAIT_MS = 30_000
_PAINT_MS = 1_000  # charts paint in frames after the layout
_ADDRESS = "http://drawing.invalid/"  # the components want an origin, for its storage
_PAGE = """<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="board.css">
<body style="margin:0"><div id="root"></div><script src="board.js"></script></body>"""


class CannotDraw(Exception):
    """Something that is needed is missing, or a panel failed; says what."""


def draw(boards: Mapping[Path, Mapping[str, Any]]) -> None:
    """Write each board to its path. Raises CannotDraw."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        raise CannotDraw("There is no chromium on the PATH; name one with $CHROMIUM.")
    if not (BUILT / "board.js").is_file():
        raise CannotDraw(f"{BUILT}/board.js is missing; `make pictures` builds it.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            for path, board in boards.items():
                _draw_one(browser, path, board)
        finally:
            browser.close()


def _draw_one(browser: Browser, path: Path, board: Mapping[str, Any]) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": 800})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route("**/*", _serve)
    page.goto(_ADDRESS)
    if not errors:
        page.evaluate("board => window.draw(board)", {**board, "width": WIDTH})
        page.wait_for_selector("#board", timeout=_WAIT_MS)
        page.wait_for_timeout(_PAINT_MS)
    if errors:
        raise CannotDraw(f"{board['title']}: {errors[0]}")
    page.locator("#board").screenshot(path=path)
    page.close()


def _serve(route: Route) -> None:
    """The page and what esbuild made; nothing leaves this machine. The components also ask for icons, which a picture does without."""
    name = route.request.url.removeprefix(_ADDRESS)
    if name == "":
        route.fulfill(body=_PAGE, content_type="text/html")
    elif name in ("board.js", "board.css"):
        route.fulfill(path=BUILT / name)
    else:
        route.abort()
