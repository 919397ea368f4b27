"""`graftlm merge`: fold an adapter into its base; the result is a plain model, and is checked to be the same."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, ConfigError, UnsupportedError, nearest
from . import _base

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # of the largest logit
PROBE = 32  # tokens of the check


def merge(
    adapter: Annotated[list[str], typer.Option("--adapter", "-a", help="Adapter directory; several merge together.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory of the merged model.")],
    base: _base.BaseOption = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge although it was trained on another base.")
    ] = False,
) -> None:
    """Fold an adapter into its base and save a plain transformers model with its tokenizer.

    The saved model is loaded again without GraftLM and must give the adapter's logits; the largest difference is shown.
    Soft prompts and bottleneck adapters are no change of weights and are refused.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty directory; choose another --output.")
    adapters = _base.named_adapters(adapter)
    for folder in adapters.values():
        _base.directory(folder)
    refuse_unmergeable(adapters)
    model, tokenizer = load(_base.base_for(base, adapters), dtype)
    model = _base.attach(model, adapters, allow_base_mismatch)
    model.set_adapter(list(adapters), inference_mode=True)
    probe = probe_ids(tokenizer, model.config)
    wanted = logits(model, probe)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report(output, type(merged), probe, wanted)


def refuse_unmergeable(adapters: dict[str, str]) -> None:
    """UnsupportedError for methods without a merge, before the base is loaded."""
    from ..methods import PeftConfig, method_for

    for name, folder in adapters.items():
        config = PeftConfig.from_pretrained(folder)
        if not method_for(config, name).mergeable:
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedError(
                f"{folder} is {kind}: it is no change of weights, so it cannot be merged. Keep it attached: "
                f"PeftModel.from_pretrained(base, {folder!r}), or graftlm generate --adapter {folder}."
            )


def load(base: str, dtype: str) -> tuple[Any, Any]:
    """Base in a dtype, by the class that its configuration names, and its tokenizer."""
    import transformers

    from ..bundled import resolve

    _base.quiet_libraries()
    path = resolve(base)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        refuse_quantized(base, config)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
        model = kind.from_pretrained(path, dtype=dtype)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base {base!r} cannot be loaded: {error}") from error


def refuse_quantized(base: str, config: Any) -> None:
    """UnsupportedError for a checkpoint that is quantised, before its weights are loaded."""
    from ..quantization import config_scheme

    if scheme := config_scheme(config):
        raise UnsupportedError(
            f"The base {base!r} is saved in {scheme}: what quantising took away is lost there. Merge into the unquantised "
            "checkpoint: pass it as --base. The adapter fits it, whatever form it was trained over. (In Python "
            "merge_and_unload() makes bf16 copies of the quantised layers.)"
        )


def probe_ids(tokenizer: Any, config: Any) -> Tensor:
    """Token ids [1, T] for the check: the same for every run, spread over the vocabulary."""
    import torch

    size = min(config.get_text_config().vocab_size, len(tokenizer))
    return torch.randint(0, size, (1, PROBE), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits in fp32; an encoder-decoder reads the same ids on both sides."""
    import torch

    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model(input_ids=ids.to(model.device), **more).logits.float().cpu()


def report(output: Path, kind: type, probe: Tensor, wanted: Tensor) -> None:
    """Load the saved model in plain transformers, compare, and say how it went.

    Raises:
        CheckpointError: the logits differ by more than rounding.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        again = kind.from_pretrained(output, dtype="auto").eval()  # type: ignore[attr-defined]
    name = str(again.dtype).removeprefix("torch.")
    got = logits(again, probe)
    difference = (got - wanted).abs().max().item()
    largest = wanted.abs().max().item()
    same = (got.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    if not difference <= TOLERANCE.get(name, 1e-1) * max(largest, 1.0):
        raise CheckpointError(
            f"The model in {output}, loaded again, differs by up to {difference:.3g} from base and adapter (largest logit "
            f"{largest:.3g}, {name}). Merge in a wider type: --dtype float32."
        )
    out = _base.console()
    out.print(f"Merged model in {output} ({size / 1e6:.1f} MB, {name}).", markup=False, soft_wrap=True)
    out.print(
        f"Loaded again in plain transformers: largest difference of logits {difference:.3g} (largest logit {largest:.3g}); "
        f"{same:.0%} of the likeliest tokens are the same.", markup=False, soft_wrap=True,
    )  # fmt: skip
