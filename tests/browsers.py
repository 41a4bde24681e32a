"""The Chromium of the system, without a window, for tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from patience import PATIENCE
from playwright.sync_api import Browser, Page, expect, sync_playwright

TIMEOUT = 1000 * PATIENCE  # milliseconds
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none, except in continuous integration."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is in PATH"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and CI is set: install chromium")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        expect.set_options(timeout=TIMEOUT)
        browser = playwright.chromium.launch(executable_path=path, args=arguments, timeout=TIMEOUT)
        yield browser
        browser.close()


def open_tab(browser: Browser, **options: Any) -> Page:
    """A page of its own; the options are those of ``new_page``."""
    tab = browser.new_page(**options)
    tab.context.set_default_timeout(TIMEOUT)  # of what it requests by itself as well
    return tab
