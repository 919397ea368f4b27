"""The language of the pages: English as it is written in the templates, others from catalogues (`locale/NAME.po`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from babel import Locale, negotiate_locale
from babel.messages.pofile import read_po

FOLDER = Path(__file__).parent / "locale"
LANGUAGES = {"en": "English", "zh": "中文"}
COOKIE = "graftlm-language"


@cache
def catalogue(language: str) -> dict[str, str]:
    """What each text is called in a language; those without a translation stay English."""
    file = FOLDER / f"{language}.po"
    if not file.exists():
        return {}
    with file.open("rb") as source:
        found: Any = read_po(source, Locale.parse(language))
    return {m.id: m.string for m in found if isinstance(m.id, str) and m.id and m.string}


def chosen(cookie: str | None, accepted: str) -> str:
    """The language of a request: what was chosen, else what the browser asks for."""
    if cookie in LANGUAGES:
        return str(cookie)
    wanted = [part.partition(";")[0].strip() for part in accepted.split(",")]
    found = negotiate_locale([w.replace("-", "_") for w in wanted if w], list(LANGUAGES))
    return str(found) if found else next((w[:2].lower() for w in wanted if w[:2].lower() in LANGUAGES), "en")


def translator(language: str) -> Any:
    """`_` of the templates: a text in a language, with values filled in."""
    known = catalogue(language)

    def translate(text: str, /, **values: Any) -> str:
        found = known.get(text, text)
        return found.format(**values) if values else found

    return translate
