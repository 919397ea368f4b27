"""Which base model an adapter was trained on: a few of its numbers, kept in the weights file's header.

Shapes alone do not tell two bases of one family apart. A fingerprint holds sampled values of the input embeddings, of
a norm and of a middle layer; comparing values (not a hash) lets the same base pass in another precision.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .architectures import base_modules, innermost
from .errors import BaseMismatchError
from .layers import as_it_was
from .quantization import is_quantized, quantized_kind, scheme_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SAMPLES = 32
TOLERANCE = 0.03  # relative: bf16 rounding is 0.4 %, int8 embeddings do not occur
SHARE = 0.1  # of the samples that may differ
KEPT: WeakKeyDictionary[nn.Module, dict[str, Any] | None] = WeakKeyDictionary()


def sampled_modules(base: Any) -> dict[str, nn.Module]:
    """The modules whose weights are looked at, by role."""
    found: dict[str, nn.Module] = {}
    try:
        embeddings = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model that reads no tokens
        embeddings = None
    if embeddings is not None:
        found["embeddings"] = innermost(embeddings)
    own = [m for _, m in base_modules(base)]
    linears: list[nn.Module] = [m for m in own if isinstance(m, nn.Linear)]
    linears = linears or [m for m in own if isinstance(m, CONVOLUTIONS)]
    norms = [m for m in own if "norm" in type(m).__name__.lower()]
    if linears:
        found["middle"] = linears[len(linears) // 2]
    if norms:
        found["norm"] = norms[len(norms) // 2]
    return found


def keep(base: nn.Module) -> None:
    """Take a base's fingerprint now, for later: its weights are about to be shared out to several processes."""
    KEPT[base] = of(base)


def of(base: nn.Module) -> dict[str, Any] | None:
    """Fingerprint of a base model: model type, embedding shape and samples. None on the meta device."""
    if base in KEPT:
        return KEPT[base]
    values: dict[str, Any] = {"model_type": getattr(getattr(base, "config", None), "model_type", None), "samples": {}}
    for role, module in sampled_modules(base).items():
        module = as_it_was(module)
        weight = getattr(module, "weight", None)
        if weight is None or quantized_kind(module) is not None or not weight.is_floating_point():
            continue
        if weight.device.type == "meta":
            return None
        values["samples"][role] = sample(weight)
    values["quantized"] = is_quantized(base)
    values["form"] = scheme_of(base) or str(getattr(base, "dtype", "float32")).removeprefix("torch.")
    return values


def sample(weight: torch.Tensor) -> list[float]:
    """Values spread over the first rows (so that a vocabulary that grew keeps its fingerprint)."""
    matrix = weight.detach().reshape(weight.shape[0], -1)
    rows = torch.arange(SAMPLES) * 7 % min(matrix.shape[0], 256)
    columns = torch.arange(SAMPLES) * 31 % matrix.shape[1]
    return matrix[rows.to(weight.device), columns.to(weight.device)].float().cpu().tolist()


def check(base: nn.Module, stored: dict[str, Any] | None, where: str, allowed: bool) -> None:
    """Compare a file's fingerprint with the base at hand.

    Files of HF PEFT have none, which is said in one line. A base in another precision or quantised passes, and is said.

    Raises:
        BaseMismatchError: another base, unless `allowed`.
    """
    own = of(base)
    if not stored or own is None:
        if stored is None:
            print(f"{where}: no base fingerprint in this file (HF PEFT writes none); keys and shapes were checked.")
        return
    different = []
    if stored.get("model_type") != own["model_type"]:
        different.append(f"model type {stored.get('model_type')!r}, here {own['model_type']!r}")
    for role, values in stored.get("samples", {}).items():
        mine = own["samples"].get(role)
        if mine is not None and share_that_differs(values, mine) > SHARE:
            different.append(f"{role} values {[round(v, 4) for v in values[:3]]}…, here {[round(v, 4) for v in mine[:3]]}…")
    if different and not allowed:
        raise BaseMismatchError(
            f"{where} was trained on another base model ({'; '.join(different)}). Load that base; or, if you are sure, pass "
            "allow_base_mismatch=True."
        )
    if different:
        return
    before, now = stored.get("form", "quantised" if stored.get("quantized") else "unquantised"), own["form"]
    if stored.get("quantized") != own["quantized"] or (own["quantized"] and before != now and "form" in stored):
        print(f"{where}: trained on the same base in another form ({before}); here it is {now}, so outputs differ slightly.")


def share_that_differs(a: list[float], b: list[float]) -> float:
    """Share of places where two samples differ by more than the tolerance."""
    x, y = torch.tensor(a), torch.tensor(b)
    if x.shape != y.shape:
        return 1.0
    return ((x - y).abs() > TOLERANCE * torch.maximum(x.abs(), y.abs()) + 1e-5).float().mean().item()
