"""A sample of a large file of texts, in one pass over it: planning needs the lengths of rows, not the rows."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data.tables import DELIMITERS
from ..errors import DataError
from ..training.schema import DataSection

LARGE = 32 << 20  # bytes of a file from which a sample is planned for
SAMPLE, LONGEST = 4000, 64  # rows drawn at random; rows of the most characters, among which are those of the most tokens


@dataclass(frozen=True)
class Sample:
    """Files with some rows of a file, and how many it has."""

    rows: int
    drawn: Path
    longest: Path


def may_sample(section: DataSection) -> bool:
    """Whether the data is one large file that can be read row by row, all of which is the split to train on."""
    path = Path(section.source)
    kind = path.suffix.lower() in (".jsonl", *DELIMITERS)
    return kind and section.split == "train" and path.is_file() and path.stat().st_size >= LARGE


def sample(path: Path, folder: Path) -> Sample:
    """Draw rows of a file into files of the same kind.

    Args:
        folder: where these files are written.

    Raises:
        DataError: it is no UTF-8 text.
    """
    table, random_ = path.suffix.lower() in DELIMITERS, random.Random(0)
    drawn: list[str] = []
    longest: list[tuple[int, int, str]] = []  # a heap by length
    header, count = "", 0
    try:
        for record in records(path, table):
            if table and not header:
                header = record
                continue
            if count < SAMPLE:
                drawn.append(record)
            elif (place := random_.randrange(count + 1)) < SAMPLE:  # Vitter's algorithm R
                drawn[place] = record
            if len(longest) < LONGEST:
                heapq.heappush(longest, (len(record), -count, record))
            elif len(record) > longest[0][0]:
                heapq.heapreplace(longest, (len(record), -count, record))
            count += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    found = Sample(count, folder / f"drawn{path.suffix}", folder / f"longest{path.suffix}")
    for file, rows in ((found.drawn, drawn), (found.longest, [record for *_, record in sorted(longest, reverse=True)])):
        with file.open("w", encoding="utf-8", newline="") as out:
            out.writelines([header, *rows])
    return found


def records(path: Path, table: bool) -> Iterator[str]:
    """The rows of a file as it writes them, one after the other; empty lines are none. In tables a quoted value may hold
    line ends."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        whole = ""
        for line in lines:
            whole += line if line.endswith("\n") else line + "\n"
            if not (table and whole.count('"') % 2):
                if whole.strip():
                    yield whole
                whole = ""
        if whole.strip():
            raise DataError(f"{str(path)!r} ends within a quoted value")
