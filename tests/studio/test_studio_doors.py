"""Each attack on the studio's door is refused, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.websockets import WebSocketDisconnect
from studio_helpers import ADDRESS, PORT, TOKEN, client, studio

from graftlm.studio import records
from graftlm.studio.doors import POLICY


@pytest.fixture
def made(tmp_path):
    return studio(tmp_path / "workspace")


def test_without_the_token_nothing_is_seen(made):
    browser = client(made, inside=False)
    for place in ("/", "/runs", "/train", "/nothing", "/?token=wrong", "/?token=", "/runs?token=x"):
        answer = browser.get(place)
        assert answer.status_code == 403 and "token" in answer.text and str(made.workspace.root) not in answer.text
    assert browser.get("/", cookies={f"graftlm-studio-{PORT}": "guessed"}).status_code == 403
    assert browser.get("/static/studio.css").status_code == 200


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(made):
    browser = client(made, inside=False)
    answer = browser.get(f"/runs?token={TOKEN}&q=a%26b")
    assert answer.status_code == 303 and answer.headers["location"] == "/runs?q=a%26b"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and TOKEN not in cookie
    assert browser.get("/").status_code == 200
    assert browser.get(f"{ADDRESS}//evil.example/?token={TOKEN}").headers["location"] == "/evil.example/"


def test_a_cookie_outlives_the_studio(made):
    browser = client(made)
    again = client(studio(made.workspace.root), inside=False)
    again.cookies = browser.cookies
    assert again.get("/").status_code == 200
    assert made.workspace.key() and (made.workspace.own / "key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1:1", "127.0.0.1", "", f"0.0.0.0:{PORT}"])
def test_other_names_are_refused(made, host):
    """DNS rebinding: a page of another name that points to this machine."""
    assert client(made).get("/", headers={"Host": host}).status_code == 403


def test_the_machines_own_names_are_let_in(made):
    assert client(made).get("/", headers={"Host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", f"https://127.0.0.1:{PORT}", f"http://127.0.0.1:{PORT + 1}"]
)
def test_other_sites_are_refused(made, origin):
    browser = client(made)
    for ask in (browser.get, browser.post):
        assert ask("/preferences", headers={"Origin": origin}).status_code == 403
    assert browser.post("/preferences", headers={"Origin": ADDRESS}).status_code == 204


@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_forms_of_other_sites_are_refused(made, token):
    browser = client(made)
    browser.headers.pop("X-CSRF-Token")
    headers = {} if token is None else {"X-CSRF-Token": token}
    for place in ("/preferences", "/train/start", "/runs/x/delete"):
        assert browser.post(place, headers=headers, data={"theme": "dark"}).status_code == 403


def test_pictures_and_scripts_of_other_sites_are_refused(made):
    """A cross-site `<img src=…>` carries the cookie in some browsers; a link that is followed may."""
    browser = client(made)
    there = {"Sec-Fetch-Site": "cross-site"}
    assert browser.get("/runs", headers=there | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert browser.get("/runs", headers=there | {"Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert browser.post("/preferences", headers=there | {"Sec-Fetch-Mode": "navigate"}).status_code == 403


def test_every_answer_carries_the_policy(made):
    browser = client(made)
    for place in ("/", "/nothing", "/static/studio.css", "/runs", f"/?token={TOKEN}"):
        headers = browser.get(place).headers
        assert headers["content-security-policy"] == POLICY and headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert "unsafe" not in POLICY and "script-src 'self'" in POLICY and "frame-ancestors 'none'" in POLICY


def test_no_page_has_a_script_or_style_in_it(made):
    """What the policy would refuse, and htmx would need `eval` for."""
    found = list(Path(made.templates.loader.searchpath[0]).glob("*.html"))
    assert len(found) > 10
    for template in found:
        text = template.read_text()
        for forbidden in ("<style", " style=", "onclick", "hx-on", "javascript:", "|safe", "| safe", "autoescape false"):
            assert forbidden not in text, (template.name, forbidden)
        assert text.count("<script") == text.count("<script src=")


def test_large_bodies_are_refused(tmp_path):
    browser = client(studio(tmp_path, max_upload=1000))
    assert browser.post("/preferences", content=b"x" * (2**20 + 1001)).status_code == 413

    def endless():
        for _ in range(40):
            yield b"x" * 2**16

    answer = browser.post("/preferences", content=endless(), headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 413 and "1 MiB" in answer.text


def test_there_are_no_websockets_and_no_api_pages(made):
    browser = client(made)
    for place in ("/docs", "/openapi.json", "/redoc"):
        assert browser.get(place).status_code == 404
    with pytest.raises(WebSocketDisconnect), browser.websocket_connect("/"):
        raise AssertionError("it was let in")


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd"]
)
def test_nothing_beside_the_static_files_is_served(made, path):
    assert client(made).get(path).status_code in (403, 404)


def test_names_are_escaped(made):
    """A run's name, recipe, log and error are texts of users and models."""
    folder = made.workspace.runs / "evil"
    folder.mkdir()
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    records.write(folder / "state.json", {"state": "failed", "error": bad})
    (folder / "log.txt").write_text(bad)
    (folder / "settings.yaml").write_text(f"method: '{bad}'\ndata: {{source: '{bad}'}}\n")
    browser = client(made)
    for place in (
        "/",
        "/runs",
        "/runs/evil",
        "/runs?q=" + bad,
        "/train?from=evil",
        "/train?data=" + bad,
        "/runs/evil/events",
    ):
        text = browser.get(place).text
        assert "<script>alert" not in text and "<img src=x" not in text, place
        assert "alert(1)" in text or place.startswith("/runs?q"), place
