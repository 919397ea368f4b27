"""What several commands share: options, quiet libraries, loading of bases and adapters."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AdapterError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

BASE_HELP = "Base model: graftlm-base (bundled), smollm2, a directory, a GGUF file, or a hub id."
BaseOption = Annotated[str | None, typer.Option("--base", "-b", help=BASE_HELP + " Default: what the adapter names.")]
AdapterOption = Annotated[
    list[str] | None, typer.Option("--adapter", "-a", help="Adapter directory, or NAME=DIRECTORY. May be repeated.")
]
QuantizationOption = Annotated[
    str | None, typer.Option("--quantization", help="Hold the base in int8, nf4 or fp4. Default: as it was saved.")
]
DEFAULT_BASE = "graftlm-base"


def console(stderr: bool = False) -> Console:
    """A rich console on the stream of the moment."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def quiet_libraries() -> None:
    """Leave progress bars and advice of the libraries below to the libraries' own users."""
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as hf

    hf.disable_progress_bar()
    hf.set_verbosity_error()


@contextlib.contextmanager
def notices_on_stderr() -> Iterator[None]:
    """Notices that are printed inside go to stderr, so that stdout holds results only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def named_adapters(values: Sequence[str] | None) -> dict[str, str]:
    """`DIR` and `NAME=DIR` as {name: directory}; names come from the directories where not given.

    Raises:
        AdapterError: one name twice, or a directory that does not exist.
    """
    found: dict[str, str] = {}
    for value in values or ():
        name, given, folder = value.partition("=")
        if not given or os.path.isdir(value):
            name, folder, given = "", value, ""
        if not Path(folder).exists() and Path(folder).expanduser().exists():
            folder = str(Path(folder).expanduser())
        name = name or free_name(re.sub(r"[^\w-]+", "-", Path(folder).resolve().name) or "adapter", found)
        if name in found:
            raise AdapterError(f"Two adapters are called {name!r}; give them names: --adapter NAME=DIRECTORY.")
        found[name] = folder
    return found


def free_name(name: str, taken: dict[str, str]) -> str:
    """`name`, or with the first number behind it that is not taken."""
    numbers = iter(range(2, len(taken) + 3))
    free = name
    while free in taken:
        free = f"{name}-{next(numbers)}"
    return free


def base_for(base: str | None, adapters: dict[str, str]) -> str:
    """The base that was asked for; else the one that the first adapter names; else the bundled one.

    Raises:
        ConfigError: the adapter names a local base that is not there.
    """
    if base:
        return base
    if not adapters:
        return DEFAULT_BASE
    from ..bundled import NAMES
    from ..methods import PeftConfig

    folder = next(iter(adapters.values()))
    named = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not named:
        raise ConfigError(f"{folder} does not name its base model; pass --base.")
    if os.path.isabs(named) and not os.path.exists(named):
        if Path(named).name in NAMES:
            return Path(named).name
        raise ConfigError(f"{folder} was trained on {named}, which is not here; pass --base.")
    return str(named)


def load_base(base: str, quantization: str | None = None) -> tuple[Any, Any]:
    """Model in eval mode, quantised where asked for, and tokenizer."""
    quiet_libraries()
    from ..training.bases import resolve_base

    with notices_on_stderr():
        model, tokenizer = resolve_base(base, quantization=quantization)
    return model.eval(), tokenizer


def attach(model: Any, adapters: dict[str, str], allow_base_mismatch: bool = False) -> Any:
    """The base with every adapter loaded under its name, for use; the base itself where there is none."""
    from ..model import PeftModel

    wrapped: Any = None
    for name, folder in adapters.items():
        with notices_on_stderr():
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, folder, name, allow_base_mismatch=allow_base_mismatch)
            else:
                wrapped.load_adapter(folder, name, allow_base_mismatch=allow_base_mismatch)
    return model if wrapped is None else wrapped.eval()


def ready_to_generate(model: Any) -> AbstractContextManager:
    """Weights kept as this processor multiplies by them fastest, where that takes less than half of the free memory."""
    from ..architectures.prepacked import prepacked_if_free

    return prepacked_if_free(model, copies=1)


def directory(path: str) -> Path:
    """An existing directory; CheckpointError otherwise."""
    found = Path(path).expanduser()
    if not found.is_dir():
        what = "is a file" if found.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}. Pass the folder that `graftlm train` or `save_pretrained` wrote.")
    return found


def shown(name: str, value: float | None) -> str:
    """A measure for people."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.4g}"
