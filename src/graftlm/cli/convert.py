"""`graftlm convert`: an adapter as LoRA, for servers that know nothing else, with the error that it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import CheckpointError, ConfigError
from . import _base
from .merge import load, logits, probe_ids, refuse_unmergeable


def convert(
    adapter: Annotated[str, typer.Argument(help="Adapter directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory of the LoRA adapter.")],
    rank: Annotated[
        str,
        typer.Option("--rank", "-r", help="Rank; or a share of the update's energy to keep, as in 0.95, a rank a layer."),
    ],
    to: Annotated[str, typer.Option("--to", help="What it becomes: lora.")] = "lora",
    base: _base.BaseOption = None,
    dtype: Annotated[str, typer.Option(help="Of the base: auto (its own), float32, bfloat16 or float16.")] = "float32",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Convert although it was trained on another base.")
    ] = False,
) -> None:
    """Turn an adapter of any method that merges into a LoRA adapter, by singular values.

    What it adds to each weight is cut off at the rank. The error that this costs is printed: of the weights, and of the
    logits of a probe. Methods that change more than weights (soft prompts, bottleneck adapters, norms, biases) are refused.
    """
    if to.lower() != "lora":
        raise ConfigError(f"--to {to!r}: adapters can become lora only.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty directory; choose another --output.")
    wanted = rank_of(rank)
    adapters = {"default": adapter}
    _base.directory(adapter)
    refuse_unmergeable(adapters)
    from ..converting import save_as_lora

    model, tokenizer = load(_base.base_for(base, adapters), dtype)
    model = _base.attach(model, adapters, allow_base_mismatch)
    save_as_lora(output, model, wanted)
    probe = probe_ids(tokenizer, model.config)
    before = logits(model, probe)
    with model.disable_adapter():
        plain = logits(model, probe)
    model.load_adapter(output, "lora")
    model.set_adapter("lora", inference_mode=True)
    after = logits(model, probe)
    moved, effect = (after - before).abs().max().item(), (before - plain).abs().max().item()
    same = (after.argmax(-1) == before.argmax(-1)).float().mean().item()
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    out = _base.console()
    out.print(f"LoRA adapter in {output} ({size / 1e6:.2f} MB).", markup=False, soft_wrap=True)
    out.print(
        f"Logits differ from the adapter's by up to {moved:.3g} (the adapter moves the base's by up to {effect:.3g}); "
        f"{same:.0%} of the likeliest tokens are the same.", markup=False, soft_wrap=True,
    )  # fmt: skip


def rank_of(text: str) -> int | float:
    """A whole number, or a number with a point as a share. ConfigError for anything else."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--rank {text!r}: expected a whole number, or a share as in 0.95.") from None
