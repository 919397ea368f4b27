"""The report in a real browser (headless Chromium, where there is one)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome", "chrome") if shutil.which(c)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1")


def browse(page: Path, profile: Path, *flags: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_is_drawn(result, tmp_path, dark):
    """Every method's colour, the page's background and its text are to be seen, in both themes."""
    shot = tmp_path / "page.png"
    theme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    browse(result.report_path, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,4200", *theme)
    picture = (imread(shot)[..., :3] * 255).round().astype(int)
    assert picture.shape == (4200, 1200, 3)
    style = result.report_path.read_text()
    schemes = [dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", part)) for part in style.split("prefers-color-scheme:dark")[:2]]

    def seen(colour: str) -> int:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return int((np.abs(picture - wanted).max(-1) <= 6).sum())

    finished = [i for i, row in enumerate(result.rows) if row.done]
    found = [all(seen(scheme[f"c{i % 8}"]) > 200 for i in finished) for scheme in schemes if "c0" in scheme]
    assert any(found)
    rows = picture.reshape(len(picture), -1).std(1) > 8  # lines of the picture on which there is something
    assert rows[:2500].mean() > 0.3


def test_the_browser_reads_what_was_written(result, tmp_path):
    text = browse(result.report_path, tmp_path / "profile", "--dump-dom")
    for word in ("What to take", "Forgetting", "Quality for its memory", "All figures", "To repeat it"):
        assert word in text
    for row in result.rows:
        assert row.label in text
    assert text.count('class="frontier"') == 4
