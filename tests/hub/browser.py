"""A headless Chromium, driven by Playwright, where both are there."""

from __future__ import annotations

import os
import shutil

import pytest


def chromium() -> str | None:
    """Path of a Chromium: $CHROMIUM, Debian's, or None."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = chromium()
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set CHROMIUM")
    with playwright.sync_playwright() as driver:
        # --no-sandbox: tests often run as root in a container, where Chromium's sandbox cannot start
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """open_page(path, width, scheme) -> (page, complaints): what the console says goes into the list."""
    pages = []

    def open_it(path, width: int = 1400, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(f"request {r.url}"))
        page.goto(f"file://{path}")
        return page, complaints

    yield open_it
    for page in pages:
        page.close()
