"""Fixtures: a studio without a network; one that runs as its users run it, with headless Chromium by Playwright."""

from __future__ import annotations

import shutil

import pytest
import studio_helpers
from studio_browser import LONG, tiny_base
from studio_helpers import Process, client

CHROMIUM = next((p for c in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(c))), None)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    playwright.expect.set_options(timeout=120_000)
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def studio(tmp_path_factory, chromium):
    """One studio for all tests of a file, with a base in its workspace that trains in a moment, and a folder that was given.
    A test that kills it puts another in its place."""
    root = tmp_path_factory.mktemp("workspace")
    found = {"root": root, "given": tmp_path_factory.mktemp("given")}
    tiny_base(root / "bases" / "tiny")
    found["now"] = Process(root, 0, "--folder", str(found["given"]))
    yield found
    found["now"].end()


@pytest.fixture
def page(chromium, studio):
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    made = context.new_page()
    made.set_default_timeout(LONG)
    wrong: list[str] = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    made.goto(studio["now"].address)
    yield made
    context.close()
    assert not wrong


@pytest.fixture
def made(tmp_path, monkeypatch):
    (tmp_path / "given").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl").write_text('{"text": "secret"}\n')
    found = studio_helpers.studio(tmp_path / "workspace", tmp_path / "given")
    monkeypatch.chdir(found.workspace.root)  # as the worker's process has it
    return found


@pytest.fixture
def browser(made):
    return client(made)
