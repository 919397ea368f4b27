"""Whether a file's tensors fit an attached adapter and its base: every key, every shape, the base's own embeddings."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..adapters import AdapterSet
from ..architectures import innermost
from ..errors import CheckpointError
from ..layers import as_it_was, frozen_of, saved_modules

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out")


def expected(host: AdapterSet, name: str) -> dict[str, torch.Size]:
    """Keys and shapes of the file that adapter `name` needs."""
    method = host.methods[name]
    shapes = dict(method.expected_shapes(host))
    for path, module in saved_modules(host.base, host.switch, name):
        start = method.file_prefix + method.saved_place(path)
        shapes |= {f"{start}.{k}": v.shape for k, v in module.state_dict().items()}
    return shapes


def normalise(key: str, name: str, wanted: dict[str, torch.Size], prefix: str) -> str:
    """A file's key as this version writes it: other versions differ in the prefix, the adapter's name, and DoRA's suffix."""
    for candidate in (key, key.removesuffix(".weight"), key.replace(f".{name}.", "."), key.replace(".default.", ".")):
        bare = re.sub(r"^base_model\.(model\.)?", "", candidate)
        for full in (candidate, prefix + bare, f"{prefix}model.{bare}", "base_model." + bare):
            if full in wanted:
                return full
    return key


def checked(host: AdapterSet, name: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The file's tensors under our keys.

    Raises:
        CheckpointError: lists every missing key, every unexpected key, and both shapes where they differ.
    """
    wanted = expected(host, name)
    prefix = host.methods[name].file_prefix
    found = {normalise(k, name, wanted, prefix): v for k, v in host.methods[name].as_written(tensors).items()}
    found = host.methods[name].completed(host, found)
    extra = base_tensors(host, {k: v for k, v in found.items() if k not in wanted})
    extra |= doubled(found, wanted) | repeated(host, name, found)
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted) - set(extra))
    shapes = [
        f"{k}: the file has {tuple(found[k].shape)}, this model needs {tuple(wanted[k])}"
        for k in sorted(wanted) if k in found and found[k].shape != wanted[k]
    ]  # fmt: skip
    broken = [k for k in wanted if k in found and found[k].is_floating_point() and not torch.isfinite(found[k]).all()]
    problems = [("missing keys", missing), ("unexpected keys", unexpected), ("shapes that differ", shapes),
                ("keys with NaN or infinite values", broken)]  # fmt: skip
    if any(items for _, items in problems):
        lines = "".join(f"\n  {title} ({len(items)}):\n    " + "\n    ".join(items) for title, items in problems if items)
        raise CheckpointError(
            f"{where} does not fit this model as adapter {name!r}; nothing was loaded.{lines}\n"
            "Is this the base model (and version) that the adapter was trained on?"
        )
    return found


def base_tensors(host: AdapterSet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the unexpected tensors those that are copies of the base's embeddings, which HF PEFT may save along.

    Raises:
        CheckpointError: such a copy differs from the base's (its vocabulary was resized or trained).
    """
    copies = {}
    for key, value in tensors.items():
        path = re.sub(r"^base_model\.(model\.)?", "", key).replace(".token_adapter", "").replace(".base_layer", "")
        module_path, _, part = path.rpartition(".")
        try:
            module = host.base.get_submodule(module_path)
        except AttributeError:
            continue
        module = as_it_was(getattr(getattr(module, "frozen", None), "layer", module))
        own = getattr(module, part, None)
        if module_path.rpartition(".")[2] not in EMBEDDINGS or not isinstance(own, Tensor) or own.dim() != 2:
            continue
        if isinstance(own, Tensor) and own.shape == value.shape and share_of_equal_rows(own, value) > 0.5:
            copies[key] = value
            continue
        if own.shape != value.shape or not torch.allclose(own.float(), value.to(own.device).float(), rtol=0.02, atol=1e-4):
            raise CheckpointError(
                f"{key} {tuple(value.shape)} is an embedding of another base model: this model's "
                f"{tuple(own.shape)} differs. "
                "Resize and load the base as it was when the adapter was trained (its embeddings included)."
            )
        copies[key] = value
    return copies


def share_of_equal_rows(a: Tensor, b: Tensor) -> float:
    """Share of rows of two tables [rows, width] that are equal up to rounding."""
    return rows_that_differ(a, b).logical_not().float().mean().item()


def rows_that_differ(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.detach().float().flatten(1), b.to(a.device).float().flatten(1)
    return ((x - y).abs() > 0.02 * torch.maximum(x.abs(), y.abs()) + 1e-4).any(dim=1)


def restore_embeddings(host: AdapterSet, tensors: dict[str, Tensor], where: str) -> None:
    """Rows of the base's embeddings that the file brings along and that differ here (new tokens) are taken from it."""
    for key, value in tensors.items():
        path = re.sub(r"^base_model\.(model\.)?", "", key).replace(".token_adapter", "").replace(".base_layer", "")
        module_path, _, part = path.rpartition(".")
        if module_path.rpartition(".")[2] not in EMBEDDINGS or part != "weight":
            continue
        module = host.base.get_submodule(module_path)
        if hasattr(module, "original_module"):  # the adapter's own copy was filled already
            continue
        layer = innermost(module)
        weight = as_it_was(layer).weight
        rows = rows_that_differ(weight, value)
        if rows.any():
            with torch.no_grad():
                weight[rows] = value.to(weight.device, weight.dtype)[rows]
            if (frozen := frozen_of(layer)) is not None:
                frozen.stale()  # the merged weight has the old rows
            print(f"{where}: {int(rows.sum())} rows of {module_path} (new tokens) were taken from the adapter's file.")


def doubled(found: dict[str, Tensor], wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors that HF PEFT writes twice with bias="all": a trained head's biases, also under the wrapper's names."""
    twice = {}
    for key, value in found.items():
        plain = re.sub(r"\.(modules_to_save(\.default)?|original_module)(?=\.)", "", key)
        if key in wanted or plain not in wanted or plain not in found:
            continue
        if ".original_module." in key or torch.equal(found[plain], value):
            twice[key] = value
    return twice


def repeated(host: AdapterSet, name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that HF PEFT writes again under the names of other modules, with the same values."""
    again = host.methods[name].repeated_keys(host)
    return {k: found[k] for k, own in again.items() if k in found and own in found and torch.equal(found[k], found[own])}
