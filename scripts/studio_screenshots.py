"""Take the pictures of docs/studio.md: a studio in which one has trained and chatted, in headless Chromium.

python scripts/studio_screenshots.py [FOLDER]       default: docs/figures/studio; needs Playwright and Chromium
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures" / "studio"
LONG = 1_800_000  # ms
RECIPE = "data: {source: tweets}\ntraining: {epochs: 3}\n"
PROMPT = "Tweet text : my train was late again, and nobody said why Label :"


def main(folder: Path) -> None:
    """Start a studio, train, and take a picture of each page."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "graftlm", "studio", "-w", f"{root}/my-work", "--port", "0", "--no-browser"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            address = re.search(r"http://\S+", process.stdout.readline())[0]  # type: ignore[union-attr, index]
            pictures(address, folder)
        finally:
            process.terminate()
            process.wait()


def pictures(address: str, folder: Path) -> None:
    """Go through the pages as a user does."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        page.set_default_timeout(LONG)
        expect.set_options(timeout=LONG)
        home = address.partition("?")[0]

        def shot(name: str) -> None:
            page.screenshot(path=folder / f"{name}.png")

        page.goto(address)
        name = train(page, shot)
        page.goto(f"{home}data/tweets")
        expect(page.locator("#rows svg")).to_be_visible()
        shot("data")
        page.goto(f"{home}compare/runs?run=lora-tweets&run=ia3-tweets")
        expect(page.locator(".chart canvas")).to_be_visible()
        shot("compare")
        page.goto(f"{home}adapters/{name}")
        page.click("#load")
        expect(page.locator("#server dl")).to_be_visible()
        shot("adapters")
        chat(page, home, name)
        shot("chat")
        page.goto(home)
        shot("start")
        small = {"viewport": {"width": 375, "height": 760}, "color_scheme": "dark", "locale": "zh"}
        page = browser.new_context(**small, storage_state=page.context.storage_state()).new_page()
        page.goto(f"{home}runs/{name}")
        expect(page.locator("#curve canvas")).to_be_visible()
        shot("narrow")
        browser.close()


def train(page: Page, shot: Callable[[str], None]) -> str:
    """Two runs together; the name of one."""
    page.click("#example-tweets")
    expect(page.locator("#f-method")).to_be_visible()
    page.fill("#yaml", RECIPE)
    page.click("#put-beside")
    expect(page.locator("#together li")).to_have_count(1)
    page.fill("#yaml", RECIPE + "method: ia3\n")
    expect(page.locator("#plan")).to_contain_text("2 ")
    shot("train")
    page.click("#start")
    expect(page.locator("#state .badge.done")).to_be_visible()
    page.reload()
    shot("run")
    return page.url.rpartition("/")[2]


def chat(page: Page, home: str, name: str) -> None:
    """The base and two adapters on one message, with a vote."""
    page.goto(f"{home}chat?adapter={name}")
    for box in page.locator("input[name=adapter]").all():
        box.check()
    page.fill("#message", PROMPT)
    page.click("#send")
    expect(page.locator(".answer button")).to_have_count(3)
    page.locator(".answer", has_text=name).locator("button").click()
    expect(page.locator(".answer.best")).to_have_count(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES)
