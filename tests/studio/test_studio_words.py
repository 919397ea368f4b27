"""The catalogue holds every text of the pages; numbers and times for people."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import graftlm.studio
from graftlm.studio import shown, words
from graftlm.studio.jobs import ENDED, LOST, UNFINISHED
from graftlm.studio.recipes import EXAMPLES

TEMPLATES = sorted((Path(graftlm.studio.__file__).parent / "templates").glob("*.html"))


def texts() -> set[str]:
    found = {m[1] for t in TEMPLATES for m in re.finditer(r'\b_\("((?:[^"\\]|\\.)*)"', t.read_text())}
    return found | {e[k] for e in EXAMPLES.values() for k in ("title", "about")} | {*ENDED, *UNFINISHED, LOST}


def test_every_text_is_in_the_catalogue():
    known = words.catalogue("zh")
    assert len(texts()) > 150 and not texts() - known.keys()
    for text, translation in known.items():
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", translation)), text


def test_every_help_of_the_form_is_in_the_catalogue():
    from graftlm.studio import forms
    from graftlm.training.defaults import method_names

    known = words.catalogue("zh")
    options = [f for name in method_names() for f in forms.option_fields(name)]
    assert all(f["help"] for f in [*forms.fields(), *options])
    assert not {f["help"] for f in [*forms.fields(), *options]} - known.keys()
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


def test_numbers_for_people():
    assert [shown.size(n) for n in (None, 0, 1023, 2048, 5 * 2**20, 3 * 2**30)] == [
        "–", "0 B", "1023 B", "2 KiB", "5 MiB", "3.00 GiB",
    ]  # fmt: skip
    assert [shown.duration(s) for s in (None, 3.4, 200, 7500)] == ["–", "3 s", "3 min 20 s", "2 h 5 min"]
    assert (shown.number(None), shown.number(1.23456), shown.share(0.5), shown.whole(12345)) == (
        "–",
        "1.235",
        "50.0 %",
        "12,345",
    )
    assert shown.moment(None) == "–" and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", shown.moment(1e9))
