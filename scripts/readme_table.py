"""Put a comparison's figures into README.md, between the marks `<!-- demo:begin -->` and `<!-- demo:end -->`.

graftlm demo --output demo && python scripts/readme_table.py demo
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from graftlm.comparison import ComparisonResult, Row
from graftlm.comparison.wording import count, duration, number, percent, share, size

README = Path(__file__).resolve().parent.parent / "README.md"
PAGES = {
    "lora": ("LoRA", "a linear layer's output"),
    "prompt-tuning": ("Prompt Tuning", "input embeddings"),
    "p-tuning": ("P-Tuning", "input embeddings"),
    "prefix-tuning": ("Prefix Tuning", "attention memory"),
    "bottleneck": ("bottleneck adapters", "a block's output"),
}
NAMES = {"lora-int8": "LoRA over int8", "qlora": "QLoRA, over NF4"}  # rows that are a method over a quantised base
HEADER = (
    "| method | enters at | trained | of the base | file | accuracy | loss | time | peak memory |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|"
)
MARKS = re.compile(r"(<!-- demo:begin -->\n).*?(<!-- demo:end -->)", re.DOTALL)


def table(result: ComparisonResult) -> str:
    """The base (before) and every method (after) as a Markdown table, and how it was measured."""
    bases = [
        f"| *{title}, before* | | | | | {percent(m.get('accuracy'))} | {number(m.get('loss'))} | | |"
        for title, m in result.bases.items()
    ]
    lines = [HEADER, *bases, *(row_of(result, row) for row in result.rows)]
    machine = ", ".join(str(v) if k == "device" else f"{k} {v}" for k, v in result.machine.items() if v)
    return "\n".join(lines) + (
        f"\n\n`{result.command or 'graftlm compare'}`: {result.data} on {result.base} "
        f"({result.base_parameters:,} parameters), {result.train_rows} rows to train on, {result.eval_rows} held out; "
        f"{duration(result.seconds)} in all. {machine}.\n"
    )


def row_of(result: ComparisonResult, row: Row) -> str:
    """One method's line; a method that did not finish says so."""
    method = row.runs[0].method
    name, place = PAGES.get(method, (row.label, ""))
    head = f"| [{NAMES.get(row.label, name)}](docs/methods/{method}.md) | {place} "
    if not row.done:
        return head + f"| {row.runs[0].status} | | | | | | |"
    trained = row.mean("trainable_parameters")
    cells = (
        count(trained),
        share(trained, result.base_parameters),
        size(row.mean("file_bytes")),
        percent(row.mean("accuracy")),
        number(row.mean("loss")),
        duration(row.mean("seconds")),
        size(row.mean("peak_memory_bytes")),
    )
    return head + "".join(f"| {cell} " for cell in cells) + "|"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    result = ComparisonResult.load(sys.argv[1])
    text = README.read_text(encoding="utf-8")
    README.write_text(MARKS.sub(lambda m: f"{m[1]}{table(result)}{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
