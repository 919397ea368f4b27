"""The model card (README.md) beside an adapter's weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .adapters import AdapterSet

MARK = "<!-- written by GraftLM; text below the line 'Notes' is kept -->"
NOTES = "## Notes"


def write_card(host: AdapterSet, name: str, folder: str | os.PathLike) -> None:
    """Write or renew README.md: base, method, sizes, metrics of the last training. A card of someone else's is kept."""
    path = Path(folder) / "README.md"
    notes = ""
    if path.is_file():
        old = path.read_text(encoding="utf-8", errors="surrogateescape")  # notes in another encoding are kept byte for byte
        if MARK not in old:
            return
        notes = old.partition(NOTES)[2].strip()
    text = card_text(host, name) + f"\n{NOTES}\n\n{notes}\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.replace("\n\n\n", "\n\n"), encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)


def card_text(host: AdapterSet, name: str) -> str:
    """The card without its notes."""
    config = host.methods[name].config
    base = config.base_model_name_or_path
    method = str(getattr(config.peft_type, "value", config.peft_type))
    trained = sum(p.numel() for _, p in host.adapter_parameters(name))
    of_base = f"base_model: {base}\n" if base and hasattr(host.base, "config") else ""  # the hub's id of a model
    # the files are HF PEFT's, and by its name the hub knows an adapter and offers to run it
    front = f"---\nlibrary_name: peft\n{of_base}tags:\n- graftlm\n- {method.lower()}\n---\n"
    settings = {k: v for k, v in config.to_dict().items() if v not in (None, {}, [], False) and k not in HIDDEN}
    sections = [
        front,
        MARK,
        f"# Adapter `{name}`\n",
        f"A {method} adapter for `{base or 'a base that is not recorded'}`, {trained:,} parameters. Load it with\n",
        "```python\nfrom graftlm import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, folder)\n```\n",
        "## Configuration\n",
        table(settings),
    ]
    if host.card_metrics:
        sections += ["## Training\n", table(host.card_metrics)]
    return "\n".join(sections) + "\n"


HIDDEN = ("peft_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "revision")


def table(values: dict[str, Any]) -> str:
    """A two-column Markdown table."""
    rows = "".join(f"| {k} | {shown(v)} |\n" for k, v in values.items())
    return f"| | |\n|---|---|\n{rows}"


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
