"""`graftlm export`: an adapter in the form of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError, ConfigError, nearest
from . import _base
from .merge import load, refuse_unmergeable

FORMS = ("vllm", "gguf", "ollama")


def export(
    adapter: Annotated[str, typer.Argument(help="Adapter directory.")],
    to: Annotated[str, typer.Option("--to", "-t", help="vllm, gguf or ollama.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory of what is written.")],
    base: _base.BaseOption = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="vllm: rank of the LoRA that another method becomes.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="gguf, ollama: auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Export although it was trained on another base.")
    ] = False,
) -> None:
    """Write an adapter for a program that knows nothing of GraftLM.

    vllm: plain LoRA as it is; other methods that merge as LoRA of --rank, with the error that it costs; virtual tokens
    (prompt tuning, P-Tuning) as prompt embeddings with the lines of a client. gguf: base and adapter, merged, for llama.cpp
    (Llama, Qwen2, GPT-2, Bloom). ollama: the same with a Modelfile. What was written is read back and compared.
    """
    form = to.lower()
    if form not in FORMS:
        raise ConfigError(f"--to {to!r}: expected one of {', '.join(FORMS)}{nearest(form, FORMS)}")
    if form == "vllm" and dtype != "auto":
        raise ConfigError("--dtype is for gguf and ollama; vllm gets the adapter's own dtype.")
    if form != "vllm" and rank is not None:
        raise ConfigError(f"--rank is for vllm; {form} gets base and adapter merged.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty directory; choose another --output.")
    folder = str(_base.directory(adapter))

    def wrapped(precision: str = "float32") -> tuple[Any, Any]:
        model, tokenizer = load(_base.base_for(base, {"default": folder}), precision)
        return _base.attach(model, {"default": folder}, allow_base_mismatch), tokenizer

    if form == "vllm":
        from ..exporting.vllm import export_vllm

        lines = export_vllm(folder, output, lambda: wrapped()[0], rank)
    else:
        refuse_unmergeable({"default": folder})
        lines = as_gguf(output, form == "ollama", dtype, *wrapped("auto" if dtype == "auto" else "float32"))
    for line in lines:
        _base.console().print(line, markup=False, soft_wrap=True)


def as_gguf(output: Path, modelfile: bool, dtype: str, model: Any, tokenizer: Any) -> list[str]:
    """The merged model as a GGUF file in a new directory, with a Modelfile where it is asked for; lines about them."""
    from ..exporting import gguf_file, ollama

    model.set_adapter("default", inference_mode=True)
    merged = model.merge_and_unload(safe_merge=True)
    output.mkdir(parents=True, exist_ok=True)
    written = gguf_file.write_gguf(merged, tokenizer, output / "model.gguf", dtype, name=output.resolve().name)
    lines = [
        f"{written.path} ({gguf_file.size_of(written.path):.1f} MB, {written.dtype}; texts split as {written.rule!r}).",
        f"Read back: weights and tokens the same, logits up to {written.difference:.3g} apart (largest "
        f"{written.largest:.3g}).",
    ]
    if modelfile:
        context = getattr(merged.config, "max_position_embeddings", None)
        text, note = ollama.modelfile(written.path.name, tokenizer, context)
        (output / "Modelfile").write_text(text, encoding="utf-8")
        lines += [note, f"ollama create {output.resolve().name} -f {output / 'Modelfile'}"]
    return lines
