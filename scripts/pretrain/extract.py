"""Readers: from a package's files to documents, and a document to clean paragraphs.

Every reader yields one list of raw paragraphs per document; `clean_paragraphs` then keeps running sentences and drops
tables, code, menus and boilerplate. The language of a paragraph is decided by its letters, not by its package.
"""

from __future__ import annotations

import gettext
import gzip
import html
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

Document = list[str]

_BLOCK = re.compile(
    r"</?(?:p|div|li|dd|dt|dl|ul|ol|h[1-6]|tr|td|th|br|title|item|section|blockquote|note|body|steps|list|info|page)\b[^>]*>",
    re.I,
)
_DROP = re.compile(
    r"<(script|style|pre|table|head|nav|code|screen|media|svg|info|links|footer)\b[^>]*>.*?</\1\s*>", re.I | re.S
)
_INLINE_CODE = re.compile(r"</?(?:code|tt|kbd|samp)\b[^>]*>", re.I)
_TAG = re.compile(r"<[^>]+>")
_ANSI = re.compile(r"\x1b?\[[0-9;]*m")
_SPACES = re.compile(r"[ \t\r\n\u00a0\u3000]+")
_CJK = re.compile(r"[\u4e00-\u9fff]")
_CJK_GAP = re.compile(r"(?<=[\u4e00-\u9fff，。、；：！？）】”]) (?=[\u4e00-\u9fff（【“，。、；：！？])")
_FOREIGN = re.compile(r"[\u0370-\u1fff\u3040-\u30ff\uac00-\ud7ff]")
_COMMON = re.compile(
    r"\b(?:the|a|an|of|to|and|in|is|it|you|that|i|he|she|we|they|for|was|are|be|with|as|on|not|have|this|but|or|if|"
    r"his|her|my|your|at|by|from|what|do|me|so|no|all|there|who|when|will|can|our|their|him|them|us|has|had)\b",
    re.I,
)
_CODE_MARKS = re.compile(r"[{}\\|<>=_$#~^*@]|--|::|//|\(\)|\.\.\.\.|\[[0-9]+\]|\w\.\w+\.\w|/\w+/")
_BLOCKED = re.compile(
    r"n[i]gg[e]r|f[a]gg[o]t|copyright ©|all rights reserved|http|www\.|GNU Free Documentation|This file is part of|"
    r"General Public License|通用公共许可证|授权|%[sdiu1-9]|Table of Contents|Prev Next|版权所有|自由文档|E-?mail",
    re.I,
)


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _strip_tags(markup: str) -> str:
    return html.unescape(_TAG.sub("", markup))


def read_html(path: Path) -> Iterator[Document]:
    """HTML, DocBook-as-HTML and Mallard pages; inline code stays in its sentence, code blocks go."""
    markup = _INLINE_CODE.sub("", re.sub(r"<!--.*?-->", "", _read_text(path), flags=re.S))
    yield [_strip_tags(part) for part in _BLOCK.split(_DROP.sub(" <br> ", markup))]


def read_text(path: Path) -> Iterator[Document]:
    """Plain text, paragraphs separated by blank lines."""
    yield re.split(r"\n\s*\n|%{4,}", _read_text(path))


def read_fortune(path: Path) -> Iterator[Document]:
    """Fortune cookies: one document per cookie; attributions (`-- Somebody`) are cut."""
    if path.suffix in {".dat", ".u8"} or not path.is_file():
        return
    for cookie in re.split(r"\n%\n", _ANSI.sub("", _read_text(path))):
        yield re.split(r"\n\s*\n|\n\s*-- [^\n]*|\n(?=[A-Z]\w*:|\t)", cookie)


def read_backtick(path: Path) -> Iterator[Document]:
    """Game data whose spoken lines stand in back-ticks; a line that names a section starts a new document."""
    document: Document = []
    for line in _read_text(path).splitlines():
        if line and not line[0].isspace() and document:
            yield document
            document = []
        document += [re.sub(r"<\w+>", "Robin", part) for part in re.findall(r"`([^`]*)`", line)]
    yield document


def read_gettext(path: Path) -> Iterator[Document]:
    """A translation catalogue: the English messages, then (of a `zh_CN` one) the Chinese, in catalogue order."""
    with path.open("rb") as handle:
        catalogue = gettext.GNUTranslations(handle)._catalog  # noqa: SLF001 (no public accessor)
    pairs = [(key, value) for key, value in catalogue.items() if isinstance(key, str) and key]
    for column in (0, 1) if "zh_CN" in path.parts else (0,):
        for pair in pairs:
            message = re.sub(r"<[^>]*>|\$\|?[a-z_.]+\|?", "", pair[column].split("\x04")[-1].split("^")[-1])
            yield re.split(r"\n+", message)


def read_rdb(path: Path) -> Iterator[Document]:
    """An R lazy-load database: character vectors of 70-column lines, one novel after another."""
    raw, offset, lines = path.read_bytes(), 0, []
    while offset + 4 < len(raw):
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(raw[offset + 4 :])
        except zlib.error:
            break
        offset = len(raw) - len(stream.unused_data)
        for match in re.finditer(rb"\x00[\x04\x00][\x00\x01]?[\x00\x08]?\x09(?=\x00\x00)", block):
            start = match.end()
            size = int.from_bytes(block[start : start + 4], "big")
            lines.append(block[start + 4 : start + 4 + size].decode("utf-8", "ignore"))
    for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME)\b)", "\n".join(lines)):
        yield re.split(r"\n\s*\n", chapter)


def read_sword(path: Path) -> Iterator[Document]:
    """A SWORD module: zlib blocks, their offsets in the `.bzs` file beside; verses of OSIS mark-up."""
    blocks, table = path.read_bytes(), path.with_suffix(".bzs").read_bytes()
    for row in range(0, len(table) - 11, 12):
        start, size = (int.from_bytes(table[row + shift : row + shift + 4], "little") for shift in (0, 4))
        if not size:
            continue
        text = zlib.decompress(blocks[start : start + size]).decode("utf-8", "ignore")
        text = re.sub(r"<(note|title|table)\b.*?</\1>", " ", text.replace("\x00", " "), flags=re.S)
        chapters = re.split(r"<chapter [^>]*osisID[^>]*>", text)
        yield from (
            [_strip_tags(part) for part in re.split(r'<div [^>]*type="x-p"[^>]*>|<lb[^>]*>|<l [^>]*>(?=<l )', c)]
            for c in chapters
        )


def read_dict(path: Path) -> Iterator[Document]:
    """A dictd dictionary of prose entries: a head word at column 0, its text indented."""
    for entry in re.split(r"\n(?=\S)", _read_text(path)):
        body = re.sub(r"[{}]", "", entry.partition("\n")[2])
        body = re.sub(r"(?m)^\s*<[^>]*>\s*|^\s*\[[^\]]*\]\s*|\(\d{4}-\d\d-\d\d\)", "", body)
        yield re.split(r"\n\s*\n", body)


def read_wordnet(path: Path) -> Iterator[Document]:
    """WordNet: example sentences, and noun definitions turned into sentences (`An ambo is a platform ...`)."""
    for entry in re.split(r"\n(?=\S)", _read_text(path)):
        word, _, body = entry.partition("\n")
        body = _SPACES.sub(" ", re.sub(r"\[[^\]]*\]", "", body))
        document: Document = []
        for sense in re.split(r" (?:(?:n|v|adj|adv) )?\d+: ", body):
            gloss, *examples = re.split(r'; "|"; "|"', sense.strip())
            if " n 1: " in body and re.match(r"(?:a|an|the) \w+ \w+ \w+", gloss) and word.islower() and "(" not in gloss:
                article = "An" if word[0] in "aeiou" else "A"
                document.append(f"{article} {word} is {gloss.split(';')[0].strip()}.")
            for example in (part.strip(' ;"') for part in examples):
                if len(example.split()) >= 5 and example[:1].isalpha():
                    document.append(example[0].upper() + example[1:] + ("" if example[-1] in ".?!" else "."))
        yield document


def read_webster(path: Path) -> Iterator[Document]:
    """GCIDE: definitions that are sentences; quotations, etymologies and labels go."""
    for entry in re.split(r"\n(?=\S)", _read_text(path)):
        body = re.sub(r"\[[^\]]*\]|--\s*[A-Z][^.\n]*\.|[{}]|\(\w+\.?\)", "", entry.partition("\n")[2])
        yield [re.sub(r"^\s*(?:\d+|\(\w\))\.?\s*", "", part) for part in re.split(r"\n\s*\n", body)]


def read_pod(path: Path) -> Iterator[Document]:
    """Perl documentation: ordinary paragraphs; commands and verbatim blocks go."""
    parts = re.split(r"\n\s*\n", _read_text(path))
    kept = [part for part in parts if part[:1] not in ("=", " ", "\t")]
    yield [re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", part) for part in kept]


def read_man(path: Path) -> Iterator[Document]:
    """Manual pages: filled text between requests."""
    text = re.sub(r"(?ms)^\.(?:nf|TS|EX)\b.*?^\.(?:fi|TE|EE)\b", "", _read_text(path))
    text = re.sub(r"(?m)^\.(?:B|I|BR|IR|RB|RI|BI|IB)\s+", "", text)
    text = re.sub(r"\\f[A-Z0-9]|\\f\([A-Z]{2}|\\&|\\s[-+]?\d", "", text).replace("\\-", "-").replace("\\", "")
    yield re.split(r"(?m)^[.'].*$|\n\s*\n", text)


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "html": read_html, "text": read_text, "fortune": read_fortune, "backtick": read_backtick, "gettext": read_gettext,
    "rdb": read_rdb, "sword": read_sword, "dict": read_dict, "wordnet": read_wordnet, "webster": read_webster,
    "pod": read_pod, "man": read_man,
}  # fmt: skip


def language(paragraph: str) -> str | None:
    """`zh` or `en` if the paragraph is running text of that language, else None."""
    cjk = len(_CJK.findall(paragraph))
    if _BLOCKED.search(paragraph) or _FOREIGN.search(paragraph):
        return None
    if cjk:
        dense = cjk / len(paragraph.replace(" ", ""))
        ok = cjk >= 8 and dense > 0.4 and re.search(r"[。！？：”」）]$", paragraph)
        return "zh" if ok else None
    words = paragraph.split()
    if len(words) < 4 or not re.match(r"[A-Z\"'“‘]", paragraph) or not re.search(r"[.!?:,;][\"'”’)]*$", paragraph):
        return None
    letters = sum(ch.isalpha() or ch in " ,.'\"!?;-’“”" for ch in paragraph) / len(paragraph)
    capitals = sum(word[0].isupper() for word in words) / len(words)
    common = len(_COMMON.findall(paragraph)) / len(words)
    marks = len(_CODE_MARKS.findall(paragraph)) / len(words)
    ok = letters > 0.95 and common > 0.25 and marks < 0.02 and capitals < 0.4 and not re.search(r"[À-ɏ]{2}", paragraph)
    return "en" if ok else None


def clean_paragraphs(document: Document) -> list[tuple[str, str]]:
    """`(language, paragraph)` for the paragraphs worth reading; white space is one blank, none between Chinese."""
    kept = []
    for raw in document:
        text = _SPACES.sub(" ", raw).strip()
        text = re.sub(r" ?\[\d+\]", "", text).replace("_", "").replace("``", '"').replace("''", '"')
        text = re.sub(r" +([,.;!?])", r"\1", text)
        text = _CJK_GAP.sub("", text)
        found = language(text) if 12 <= len(text) <= 6000 else None
        if found:
            kept.append((found, text))
    return kept
