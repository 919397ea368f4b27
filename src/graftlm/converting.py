"""Any mergeable adapter as LoRA, for servers that know nothing else: what it adds to each weight, cut off at a rank by SVD.

``fold(W) - W = U S V^T``, B = U_k S_k [out, k], A = V_k^T [k, in], scale 1: the best approximation of rank k there is,
which loses the share ``sum_{i>k} s_i^2 / sum_i s_i^2`` of the update's energy.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import AdapterSet
from .checkpoint.states import set_peft_model_state_dict
from .checkpoint.write import write_adapter
from .errors import ConfigError, KindError
from .layers import Adapted, saved_modules
from .methods.layered import LayerMethod
from .methods.lora import LoraConfig


def convert_to_lora(
    model: Any, rank: int | float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An attached adapter as LoRA: its configuration, and its tensors under the keys of a LoRA file (HF PEFT's function).

    What is lost is printed. Modules that the adapter trains in full come along as they are.

    Args:
        model: a wrapped model.
        rank: a whole number, for all layers; or the share of the update's energy, 0 < rank <= 1, that is kept in each layer,
            by the lowest rank that does.
        progressbar: show how far it is.
        compile_kwargs: HF PEFT's; without meaning here.

    Raises:
        ConfigError: a rank below 1, above a layer's size, or no share.
        KindError: the adapter changes more than the weights of layers, or nothing of them.
    """
    if not isinstance(model, AdapterSet):
        raise TypeError(f"convert_to_lora takes what get_peft_model or PeftModel gives; got {type(model).__name__}.")
    model._known(adapter_name)
    check_rank(rank)
    if why := hindrance(model, adapter_name):
        raise KindError(f"Adapter {adapter_name!r} {why}, which LoRA's factors cannot hold. Keep it as it is.")
    method: Any = model.methods[adapter_name]
    if type(method.config) is LoraConfig:
        warnings.warn(f"Adapter {adapter_name!r} is LoRA already: this only makes its rank another one.", stacklevel=2)
    layers = list(method.layers(model))
    if progressbar:
        from tqdm import tqdm

        layers = tqdm(layers, desc="Converting to LoRA")
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost = total = worst = 0.0
    for path, layer in layers:
        (a, b), energies = factors(path, layer, adapter_name, rank)
        ranks[path] = len(a)
        state |= dict(zip(keys(path, layer), (a, b), strict=True))
        own, missing = energies.sum().item(), energies[len(a) :].sum().item()
        lost, total, worst = lost + missing, total + own, max(worst, missing / own if own else 0.0)
    config: Any = method.config
    saved = list(saved_modules(model.base, model.switch, adapter_name))
    for path, module in saved:
        state |= {f"base_model.model.{path}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
    r = rank if isinstance(rank, int) else 1
    patterns: dict[str, Any] = {} if isinstance(rank, int) else ranks
    made = LoraConfig(
        r=r, lora_alpha=r, rank_pattern=patterns, alpha_pattern=dict(patterns), target_modules=list(ranks),
        modules_to_save=config.modules_to_save if saved else None, task_type=config.task_type, revision=config.revision,
        base_model_name_or_path=config.base_model_name_or_path,
    )  # fmt: skip
    span = " to ".join(dict.fromkeys(map(str, (min(ranks.values()), max(ranks.values())))))
    mean = math.sqrt(lost / total) if total else 0.0
    print(
        f"convert: {len(ranks)} layers as LoRA of rank {span}; relative error of what is added to their weights {mean:.3g}, "
        f"in the worst of them {math.sqrt(worst):.3g}."
    )
    return made, state


def save_as_lora(
    path: str | os.PathLike, model: Any, rank: int | float, adapter_name: str = "default", progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:  # fmt: skip
    """`convert_to_lora`, written as an adapter directory (HF PEFT's function)."""
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    with_lora = next(n for n in map("lora_{}".format, range(len(model.methods) + 1)) if n not in model.methods)
    model.add_adapter(with_lora, config)
    try:
        set_peft_model_state_dict(model, state, with_lora)
        write_adapter(model, with_lora, Path(path), {})
    finally:
        model.delete_adapter(with_lora)


def hindrance(host: AdapterSet, name: str) -> str | None:
    """What an adapter does beside changing layers' weights, in words; None where that is all."""
    method, config = host.methods[name], host.methods[name].config
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(method, LayerMethod) or not method.mergeable:
        return f"is {kind}: it does not change layers' weights"
    if getattr(config, "bias", "none") != "none":
        return f"trains biases (bias={config.bias!r})"  # type: ignore[attr-defined]
    for path, layer in method.layers(host):
        own = layer.frozen.bias
        if own is not None and layer.changes[name].bias(layer.held(name), own) is not own:
            return f"is {kind} and changes the bias of {path!r}"
    return None


def check_rank(rank: Any) -> None:
    """ConfigError for what is neither a whole number above 0 nor a share."""
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not (rank >= 1 if whole else isinstance(rank, float) and 0 < rank <= 1):
        raise ConfigError(f"rank={rank!r}: expected a whole number above 0, or a share of energy (a float), 0 < rank <= 1.")


def factors(path: str, layer: Adapted, name: str, rank: int | float) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A [k, in] and B [out, k] of an adapter in a layer, and the squares of all singular values."""
    change, t, frozen = layer.changes[name], layer.held(name), layer.frozen
    with torch.no_grad():
        low = change.low_rank(t)
        dtype = change.dtype(t) if change.tables else frozen.weight().dtype  # a tied head's tensors are the embeddings'
        if low is not None and len(low.a) < min(frozen.shape):  # of the small product of its triangles
            (left, upper), (right, lower) = torch.linalg.qr(low.b.float()), torch.linalg.qr(low.a.float().T)
            u, s, v = torch.linalg.svd(low.scale * (upper @ lower.T), full_matrices=False)
            u, v = left @ u, v @ right.T
        else:
            added = frozen.rows(layer.get_delta_weight(name)).float()
            u, s, v = torch.linalg.svd(added, full_matrices=False)
        energies = s.double() ** 2
        k = rank if isinstance(rank, int) else share_at(energies, rank)
        if k > min(frozen.shape):
            raise ConfigError(
                f"rank={rank}: {path!r} is {frozen.shape[0]} x {frozen.shape[1]}, so {min(frozen.shape)} is the most."
            )
        short = k - len(s)  # a rank above the update's own: the rest is zero
        a, b = v[:k], u[:, :k] * s[:k]
        if short > 0:
            a, b = torch.cat([a, a.new_zeros(short, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), short)], dim=1)
        return (a.to(dtype).contiguous(), b.to(dtype).contiguous()), energies


def share_at(energies: Tensor, share: float) -> int:
    """The lowest rank that keeps a share of the energy; 1 for an update that is zero."""
    sums = energies.cumsum(0)
    return min(int(torch.searchsorted(sums, share * sums[-1])) + 1, len(sums))


def keys(path: str, layer: Adapted) -> Iterator[str]:
    """The names of A and B in a LoRA file."""
    embedding = layer.frozen.kind == "embedding"
    for factor in "AB":
        yield (
            f"base_model.model.{path}.lora_embedding_{factor}"
            if embedding
            else f"base_model.model.{path}.lora_{factor}.weight"
        )
