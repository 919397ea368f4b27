"""The base model inside the package."""

from __future__ import annotations

from importlib.resources import files

BASE_NAME = "graftlm-base"


def base_path() -> str:
    """Directory of the bundled base model, for `AutoModelForCausalLM.from_pretrained`."""
    return str(files("graftlm") / "assets" / BASE_NAME)


def resolve(name: str) -> str:
    """A model id or path as given; "graftlm-base" is the bundled one."""
    return base_path() if name == BASE_NAME else name
