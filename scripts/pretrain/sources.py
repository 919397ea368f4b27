"""Which Debian packages the base model reads, how, and how often.

A source is a package, a reader (see `extract.READERS`), glob patterns below the unpacked package, and a weight: how
many times a pass over the text sees it (a fraction is a random share). Weights above one are for running prose.
Left out, because their licence or content does not fit, is listed in `LEFT_OUT` and goes into the model card.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

DOC = "usr/share/doc"
WESNOTH = "usr/share/games/wesnoth/1.16/locale"
WESNOTH_CAMPAIGNS = "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One package: `reader` names the extractor, `globs` its files, `weight` its share of the mix."""

    package: str
    reader: str
    globs: tuple[str, ...]
    weight: float = 1.0


def _source(package: str, reader: str, *globs: str, weight: float = 1.0) -> Source:
    return Source(package=package, reader=reader, globs=globs, weight=weight)


SOURCES: tuple[Source, ...] = (
    # English prose, stories, dialogue
    _source("anarchism", "html", f"{DOC}/anarchism/html/*.html", weight=1.0),
    _source(
        "r-cran-janeaustenr",
        "rdb",
        "usr/lib/R/site-library/janeaustenr/R/*.rdb",
        "usr/lib/R/site-library/janeaustenr/data/*.rdb",
        weight=2.0,
    ),
    _source("sword-text-web", "sword", "usr/share/sword/modules/texts/ztext/*/*.bzz", weight=0.7),
    _source("sword-comm-mhcc", "sword", "usr/share/sword/modules/comments/zcom/*/*.bzz", weight=0.7),
    _source("fortunes", "fortune", "usr/share/games/fortunes/*", weight=2.0),
    _source("fortunes-min", "fortune", "usr/share/games/fortunes/*", weight=2.0),
    _source("fortune-anarchism", "fortune", "usr/share/games/fortunes/*", weight=1.0),
    _source("display-dhammapada", "text", "usr/share/display-dhammapada/dhammapada-english-transl.txt", weight=1.0),
    _source(
        "endless-sky-data",
        "backtick",
        "usr/share/games/endless-sky/data/*.txt",
        "usr/share/games/endless-sky/data/*/*.txt",
        weight=3.0,
    ),
    _source(
        "wesnoth-1.16-data",
        "gettext",
        f"{WESNOTH}/zh_CN/LC_MESSAGES/*.mo",
        f"{WESNOTH}/de/LC_MESSAGES/*.mo",
        weight=3.0,
    ),
    *(
        _source(
            f"wesnoth-1.16-{name}",
            "gettext",
            f"{WESNOTH}/zh_CN/LC_MESSAGES/*.mo",
            f"{WESNOTH}/de/LC_MESSAGES/*.mo",
            weight=3.0,
        )
        for name in WESNOTH_CAMPAIGNS.split()
    ),
    _source("naev-data", "gettext", "usr/share/naev/dat/gettext/de/LC_MESSAGES/*.mo", weight=3.0),
    _source("freedroidrpg-data", "gettext", "usr/share/locale/de/LC_MESSAGES/freedroidrpg-d*.mo", weight=3.0),
    _source("freeciv-data", "gettext", "usr/share/locale/pl/LC_MESSAGES/freeciv-nations.mo", weight=2.0),
    _source("crawl-common", "text", "usr/share/crawl/dat/descript/*.txt", "usr/share/crawl/dat/database/*.txt", weight=1.5),
    _source("colobot-common", "text", "usr/share/games/colobot/help/E/**/*.txt", weight=1.0),
    _source("golang-1.19-src", "text", "usr/share/go-1.19/src/testdata/*.txt", weight=0.7),
    _source("miscfiles", "text", "usr/share/state/*.gz", weight=1.0),
    # dictionaries
    _source("dict-wn", "wordnet", "usr/share/dictd/wn.dict.dz", weight=1.0),
    _source("dict-gcide", "webster", "usr/share/dictd/gcide.dict.dz", weight=0.1),
    _source("dict-foldoc", "dict", "usr/share/dictd/foldoc.dict.dz", weight=0.5),
    _source("dict-jargon", "dict", "usr/share/dictd/jargon.dict.dz", weight=1.5),
    # English manuals
    _source("gnome-user-docs", "html", "usr/share/help/C/**/*.page", "usr/share/help/zh_CN/**/*.page", weight=1.5),
    _source(
        "debian-handbook",
        "html",
        f"{DOC}/debian-handbook/html/en-US/*.html",
        f"{DOC}/debian-handbook/html/zh-CN/*.html",
        weight=1.0,
    ),
    _source("libreoffice-help-en-us", "html", "usr/share/libreoffice/help/en-US/**/*.html", weight=0.4),
    _source("developers-reference", "html", "usr/share/developers-reference/*.html", weight=0.7),
    _source("debian-faq", "html", f"{DOC}/debian/FAQ/*.en.html", weight=1.0),
    _source("debian-history", "html", f"{DOC}/debian-history/docs/*.en.html", weight=1.0),
    _source("harden-doc", "html", f"{DOC}/harden-doc/html/en-US/*.html", f"{DOC}/harden-doc/html/zh-CN/*.html", weight=0.7),
    _source("rust-doc", "html", f"{DOC}/rust-doc/html/book/*.html", weight=0.7),
    _source(
        "installation-guide-amd64",
        "html",
        f"{DOC}/installation-guide-amd64/en/*.html",
        f"{DOC}/installation-guide-amd64/zh_CN/*.html",
        weight=0.5,
    ),
    _source("debian-edu-doc-en", "html", f"{DOC}/**/*.html", weight=0.7),
    _source("gimp-help-en", "html", "usr/share/gimp/2.0/help/en/**/*.html", weight=0.3),
    _source(
        "python3.11-doc",
        "html",
        f"{DOC}/python3.11/html/tutorial/*.html",
        f"{DOC}/python3.11/html/howto/*.html",
        f"{DOC}/python3.11/html/faq/*.html",
        weight=0.6,
    ),
    _source("perl-doc", "pod", "usr/share/perl/5.36*/pod/perlfaq*.pod", weight=0.6),
    # Chinese
    _source(
        "fortunes-zh",
        "fortune",
        "usr/share/games/fortunes/chinese",
        "usr/share/games/fortunes/tang300",
        "usr/share/games/fortunes/song100",
        weight=2.0,
    ),
    _source("libreoffice-help-zh-cn", "html", "usr/share/libreoffice/help/zh-CN/**/*.html", weight=1.2),
    _source("debian-reference-zh-cn", "html", "usr/share/**/*.zh-cn.html", weight=1.5),
    _source("maint-guide-zh-cn", "html", "usr/share/**/*.zh-cn.html", weight=1.0),
    _source("debian-edu-doc-zh-cn", "html", f"{DOC}/**/*.html", weight=1.0),
    _source("debian-faq-zh-cn", "html", "usr/share/**/*.zh-cn.html", weight=2.0),
    _source("kicad-doc-zh", "html", f"{DOC}/kicad/help/zh/**/*.html", weight=1.0),
    _source("debmake-doc", "html", f"{DOC}/debmake-doc/**/*.zh-cn.html", weight=1.0),
    _source("manpages-zh", "man", "usr/share/man/zh_CN/man*/*.gz", weight=1.2),
    _source("gimp-help-zh-cn", "html", "usr/share/gimp/2.0/help/zh_CN/**/*.html", weight=1.0),
    _source("lilypond-doc-html-zh", "html", "usr/share/**/zh/**/*.html", "usr/share/**/*.zh.html", weight=1.0),
    *(
        _source(name, "gettext", "usr/share/locale/zh_CN/LC_MESSAGES/*.mo", weight=1.0)
        for name in ("gnucash-common", "gramps", "kstars-data", "evolution-common")
    ),
)

# The licence of the text that is read, after each package's Debian copyright file (all are in `main`).
LICENCES: dict[str, str] = {
    "anarchism": "GPL-2",
    "r-cran-janeaustenr": "novels in the public domain (package: MIT)",
    "sword-text-web": "public domain",
    "sword-comm-mhcc": "public domain",
    "fortunes": "BSD (collection)",
    "fortunes-min": "BSD (collection)",
    "fortune-anarchism": "GPL-3+ and public domain",
    "display-dhammapada": "public domain and CC-BY-3.0",
    "endless-sky-data": "GPL-3+",
    "naev-data": "GPL-3+",
    "freedroidrpg-data": "GPL-2+",
    "freeciv-data": "GPL-2+",
    "crawl-common": "GPL-2+",
    "colobot-common": "GPL-3+",
    "golang-1.19-src": "BSD-3-clause; the book read from it is in the public domain",
    "miscfiles": "public domain",
    "dict-wn": "WordNet 3.0",
    "dict-gcide": "GPL-2+",
    "dict-foldoc": "GFDL-1.1+ without invariant sections",
    "dict-jargon": "public domain",
    "gnome-user-docs": "CC-BY-SA-3.0",
    "debian-handbook": "GPL-2+ or CC-BY-SA-3.0",
    "libreoffice-help-en-us": "MPL-2.0",
    "developers-reference": "GPL-2+",
    "debian-faq": "free copyleft text of its own (copies and changes under the same notice)",
    "debian-history": "GPL-2+",
    "harden-doc": "GPL-2+",
    "rust-doc": "MIT or Apache-2.0",
    "installation-guide-amd64": "GPL-2",
    "debian-edu-doc-en": "GPL-2+",
    "gimp-help-en": "GFDL-1.2+ without invariant sections",
    "python3.11-doc": "PSF",
    "perl-doc": "GPL-1+ or Artistic",
    "fortunes-zh": "GPL-3+",
    "libreoffice-help-zh-cn": "MPL-2.0",
    "debian-reference-zh-cn": "GPL-2+",
    "maint-guide-zh-cn": "GPL-2+",
    "debian-edu-doc-zh-cn": "GPL-2+",
    "debian-faq-zh-cn": "as debian-faq",
    "kicad-doc-zh": "GPL-2+ or CC-BY-SA-3.0",
    "debmake-doc": "Expat",
    "manpages-zh": "GPL-2+, BSD-2-clause, GFDL-1.2+, public domain",
    "gimp-help-zh-cn": "GFDL-1.2+ without invariant sections",
    "lilypond-doc-html-zh": "GFDL-1.3+ without invariant sections",
    "gnucash-common": "GPL-2+",
    "gramps": "GPL-2+",
    "kstars-data": "GPL-2+",
    "evolution-common": "LGPL-2 or LGPL-3",
}

LEFT_OUT: dict[str, str] = {
    "anything outside Debian main": "licence does not meet the Debian Free Software Guidelines",
    "dict-devil": "entries with slurs",
    "bible-kjv-text, sword-comm-tdavid": "archaic English; sword-text-web has the books in modern English",
    "mplayer-doc, linuxcnc-doc-zh-cn": "no Chinese sentence left after cleaning",
    "golang testdata other than the one book, man pages in English": "poor prose",
}


def licence(package: str) -> str:
    """The licence of the text read from `package`."""
    return LICENCES.get(package) or ("GPL-2+" if package.startswith("wesnoth") else "unknown")


def fetch(package: str, work: Path) -> Path:
    """Download and unpack one package below `work` (nothing is installed); returns the unpacked folder."""
    root = work / "packages" / package
    if (root / ".complete").exists():
        return root
    downloads = work / "debs"
    downloads.mkdir(parents=True, exist_ok=True)
    if not list(downloads.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", package], cwd=downloads, check=True, capture_output=True)
    root.mkdir(parents=True, exist_ok=True)
    archive = sorted(downloads.glob(f"{package}_*.deb"))[-1]
    subprocess.run(["dpkg", "-x", str(archive), str(root)], check=True)
    (root / ".complete").touch()
    return root
