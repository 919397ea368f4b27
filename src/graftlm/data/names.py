"""What column names say: which column holds prompts, which the answers to them, and what must not be left unused.

Names are compared without case, spaces and plural: `Prompt`, `prompts` and `prompt_text` are `prompt`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftlm.errors import DataError

if TYPE_CHECKING:
    from graftlm.data._base import Format

# A name of the first list is a prompt whatever stands beside it; those of the second are where none of the first is there.
PROMPTS = ("prompt", "question", "instruction", "query")
SOURCES = ("input", "source", "src", "document", "article", "dialogue", "dialog", "passage", "context", "text")
ANSWERS = (
    "completion", "response", "answer", "output", "target", "reply", "summary", "highlight", "tgt", "translation", "chosen",
)  # fmt: skip
LABELS = ("label", "class", "sentiment", "intent")
CONTEXTS = ("input", "context", "passage", "document", "article")  # belong to the question beside them
DESCRIPTIONS = (  # say something about a prompt; nobody trains on them
    "act", "id", "idx", "index", "title", "url", "category", "topic", "tag", "author", "source", "language", "lang", "date",
    "split", "score", "for_dev", "type",
)  # fmt: skip


def plain(column: str) -> str:
    """A name to compare: `Target Texts` is `target`."""
    name = re.sub(r"\W+", "_", column.strip().lower()).strip("_")
    name = re.sub(r"_texts?$", "", name)
    return name[:-1] if name.endswith("s") and name[:-1] in {*PROMPTS, *SOURCES, *ANSWERS, *LABELS, *DESCRIPTIONS} else name


def looks_like(column: str, names: Sequence[str]) -> bool:
    """Whether a column is called so, or a kind of it: `gold_answer`, `model_response`."""
    name = plain(column)
    return name in names or plain(name.rpartition("_")[2]) in names


def answer_among(columns: Sequence[str], usual: str) -> str | None:
    """The column with the answers: the usual one, or else the only one that is called like an answer.

    Raises:
        DataError: several, and none of them is the usual one.
    """
    if usual in columns:
        return usual
    found = [c for c in columns if plain(c) in ANSWERS]
    if len(found) > 1:
        raise DataError(
            f"{' and '.join(map(repr, found))} all look like the answers to train on; name one, as in "
            f"columns={{'completion': {found[0]!r}}} with format='completion' and its prompt column. The data set has "
            f"{list(columns)}"
        )
    return found[0] if found else None


def likely_pair(columns: Sequence[str]) -> tuple[str, str] | None:
    """The columns with prompts and with answers, by their names; None where one of them is not there.

    Raises:
        DataError: several columns that may be the prompt, or the answer.
    """
    if {"prompt", "completion"} <= set(columns):
        return "prompt", "completion"
    strong = [c for c in columns if plain(c) in PROMPTS]
    sources = [c for c in columns if plain(c) in SOURCES]
    prompts = strong + [c for c in sources if plain(c) in CONTEXTS] if strong else sources
    if [plain(c) for c in prompts] == ["text"] and any(looks_like(c, LABELS) for c in columns):
        return None  # a labelled text, with something beside it
    answer = answer_among(columns, "completion") if prompts else None
    if answer is None:
        return None
    if len(prompts) > 1:
        first, second = prompts[:2]
        raise DataError(
            f"{' and '.join(map(repr, prompts))} all look like what {answer!r} answers. Name what is read: "
            f"format='completion' with columns={{'prompt': {first!r}, 'completion': {answer!r}}} reads one of them, "
            f"format='alpaca' with columns={{'instruction': {first!r}, 'input': {second!r}, 'output': {answer!r}}} two"
        )
    return prompts[0], answer


def check_unused(fmt: Format, columns: Sequence[str]) -> None:
    """What the names of columns say about those that a format, chosen by names, does not read.

    Raises:
        DataError: running text, and a column that looks like the answers would not be trained on.
    """
    used = set(fmt.columns().values())
    left = [c for c in columns if c not in used]
    answers = [c for c in left if looks_like(c, ANSWERS)]
    if fmt.name == "text":
        read = next(iter(fmt.columns().values()))
        answers = answers or [c for c in left if looks_like(c, LABELS)]
        if answers:
            raise DataError(
                f"{answers[0]!r} looks like the answers to train on, and format 'text' would train on {read!r} alone. "
                f"Name the columns: format='completion' with columns={{'prompt': {read!r}, 'completion': {answers[0]!r}}}; "
                f"or format='text' with columns={{'text': {read!r}}}, if that alone is meant"
            )
        others = [c for c in left if not looks_like(c, DESCRIPTIONS)]
        if others and plain(read) in PROMPTS:
            warnings.warn(
                f"training on {read!r} alone, as running text; {', '.join(map(repr, others))} is not read. If it holds "
                f"the answers, use format='completion' with columns={{'prompt': {read!r}, 'completion': {others[0]!r}}}; if "
                f"not, columns={{'text': {read!r}}} says so",
                UserWarning,
                stacklevel=4,
            )
    elif answers:
        warnings.warn(
            f"{', '.join(map(repr, answers))} looks like answers to train on, and format {fmt.name!r} reads "
            f"{', '.join(map(repr, sorted(used & set(columns))))} only; name the columns if that is not meant",
            UserWarning,
            stacklevel=4,
        )
