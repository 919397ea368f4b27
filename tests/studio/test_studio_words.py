"""The catalogue holds every text of the pages; numbers and times for people."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import graftlm.studio
from graftlm.studio import doors, shown, words
from graftlm.studio.errors import LARGE
from graftlm.studio.jobs import ENDED, EXHAUSTED, LOST, UNFINISHED
from graftlm.studio.recipes import EXAMPLES

TEMPLATES = sorted((Path(graftlm.studio.__file__).parent / "templates").glob("*.html"))


def texts() -> set[str]:
    found = {m[1] for t in TEMPLATES for m in re.finditer(r'\b_\("((?:[^"\\]|\\.)*)"', t.read_text())}
    found |= {e[k] for e in EXAMPLES.values() for k in ("title", "about")} | {*ENDED, *UNFINISHED, *refusals()}
    return found | {"unknown", "bundled", "folder", "cache", "merge", "convert", "compare", "import"}  # of runs and bases


def refusals() -> set[str]:
    """What the studio refuses with, and the texts that are told under a name."""
    found = {LOST, EXHAUSTED, doors.LOST, LARGE, "There is no such page."}
    for module in TEMPLATES[0].parent.parent.rglob("*.py"):
        for call in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "PageError":
                text = call.args[1]
                assert not isinstance(text, ast.JoinedStr), (module.name, ast.unparse(call))  # not to be translated
                found |= {text.value} if isinstance(text, ast.Constant) else set()
    return found


def test_every_text_is_in_the_catalogue():
    known = words.catalogue("zh")
    assert len(texts()) > 150 and not texts() - known.keys()
    for text, translation in known.items():
        assert sorted(re.findall(r"{\w+[^} ]*}", text)) == sorted(re.findall(r"{\w+[^} ]*}", translation)), text


def test_every_help_of_the_form_is_in_the_catalogue():
    from graftlm.studio import forms
    from graftlm.training.defaults import method_names

    known = words.catalogue("zh")
    options = [f for name in method_names() for f in forms.option_fields(name)]
    assert all(f["help"] for f in [*forms.fields(), *options])
    wanted = {f["help"] for f in [*forms.fields(), *options]}
    assert wanted - known.keys() == known.keys() - wanted - texts() == set()  # nor is there one that nothing says
    assert forms.helps(forms.config_type("lora"))["r"] == "rank of the update."


def test_no_text_of_a_page_is_left_untranslated():
    """Words that stand in a template outside of tags and of `_(…)`."""
    for template in TEMPLATES:
        plain = re.sub(r"{#.*?#}|{%.*?%}|{{.*?}}", "", template.read_text(), flags=re.S)
        plain = re.sub(r"<code>.*?</code>|<[^>]*>", "", plain, flags=re.S)
        assert not set(re.findall(r"[A-Za-z]{2,}", plain)) - {"GraftLM", "Studio", "top"}, template.name


@pytest.mark.parametrize(
    ("cookie", "accepted", "wanted"),
    [(None, "", "en"), (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"), (None, "zh-TW", "zh"), (None, "de,en;q=0.5", "en"),
     ("en", "zh", "en"), ("zh", "en", "zh"), ("xx", "zh", "zh"), ("../x", "de", "en"), (None, "*;;,,", "en")],
)  # fmt: skip
def test_the_language_of_a_request(cookie, accepted, wanted):
    assert words.chosen(cookie, accepted) == wanted


def test_refusals_are_told_in_the_pages_language(browser):
    chinese = {"Accept-Language": "zh"}
    page, part = (browser.get("/runs/<no>", headers=chinese | more) for more in ({}, {"HX-Request": "true"}))
    assert page.status_code == part.status_code == 404 and "&lt;no&gt;" in page.text and "<no>" not in page.text
    assert part.text == "这里没有运行 '<no>'。" and part.headers["content-type"].startswith("text/plain")
    browser.headers["X-CSRF-Token"] = "wrong"
    page, part = (browser.post("/preferences", headers=chinese | more) for more in ({}, {"HX-Request": "true"}))
    assert page.status_code == part.status_code == 403 and part.text in page.text and part.text.startswith("已拒绝")


def test_numbers_for_people():
    assert [shown.size(n) for n in (None, 0, 1023, 2048, 5 * 2**20, 3 * 2**30)] == [
        "–", "0 B", "1023 B", "2 KiB", "5 MiB", "3.00 GiB",
    ]  # fmt: skip
    assert [shown.duration(s) for s in (None, 3.4, 200, 7500)] == ["–", "3 s", "3 min 20 s", "2 h 5 min"]
    assert (shown.number(2650.4, 3), shown.span((40, 200)), shown.span(None)) == ("2,650", "40 s – 3 min 20 s", "–")
    assert (shown.number(None), shown.number(1.23456), shown.share(0.5), shown.whole(12345)) == (
        "–",
        "1.235",
        "50.0 %",
        "12,345",
    )
    assert shown.moment(None) == "–" and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", shown.moment(1e9))
