"""Take the pictures of docs/studio.md: a studio with one finished run, in headless Chromium.

python scripts/studio_screenshots.py [FOLDER]       default: docs/figures/studio; needs Playwright and Chromium
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures" / "studio"
LONG = 600_000  # ms
RECIPE = "data: {source: tweets}\ntraining: {epochs: 6}\n"


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
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1200, "height": 900}, bypass_csp=True).new_page()
        page.set_default_timeout(LONG)

        def shot(name: str) -> None:
            page.screenshot(path=folder / f"{name}.png")

        page.goto(address)
        page.click("#example-tweets")
        page.fill("#yaml", RECIPE)
        expect(page.locator("#plan dl")).to_be_visible(timeout=LONG)
        shot("train")
        page.click("#start")
        expect(page.locator("#state .badge.done")).to_be_visible(timeout=LONG)
        page.reload()
        shot("run")
        home = address.partition("?")[0]
        page.goto(home)
        shot("start")
        page.goto(f"{home}data/tweets")
        expect(page.locator("#rows svg")).to_be_visible(timeout=LONG)
        shot("data")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES)
