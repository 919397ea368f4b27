"""Start values of LoRA that come from data: what CorDA and LoRA-GA do before an adapter is attached.

    preprocess_corda(base, config, run_model)        base modules get `eigens`        (arXiv:2406.05223)
    preprocess_loraga(base, config, train_step)      base modules get a mean gradient (arXiv:2407.05000)
    get_peft_model(base, config)                     A0 and B0 out of them; they are taken away again

As with PiSSA the adapter acts against its start, ``W - scale * B0 A0 + scale * B A`` (see `lora_change`); HF PEFT overwrites
W. The start cannot be found again from W, so it is in the adapter's file: there the adapter has twice its rank,
``[A; A0]`` and ``[B, -B0]``, which is plain LoRA, equal for any reader. EVA (see `lora_eva`) changes nothing of W.

Shapes: W, gradients [out, in]; A0 [r, in]; B0 [out, r]; covariances [in, in].
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import LORA_TARGETS, default_targets
from ..errors import CheckpointError, ConfigError, TargetError, UnsupportedError
from ..modes import evaluating
from ..quantization import quantized_kind
from .lora_data_config import LoraGAConfig
from .targets import find_targets, pattern_value


# -- what the passes over data find ------------------------------------------------------------------------------------
@dataclass
class CordaEigens:
    """Of a module: S_WC [r], U_WC [out, r], V_WC [in, r]."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def targets_of(model: nn.Module, config: Any, title: str) -> dict[str, Any]:
    """The linear layers that a configuration names, by dotted name."""
    if config.target_modules is None:
        config.target_modules = default_targets(model, LORA_TARGETS, "LoraConfig")
    found = {n: m for n, m in find_targets(model, config).items() if isinstance(m, (nn.Linear, Conv1D))}
    if not found:
        raise TargetError(f"{title}: No supported layers found; it takes linear layers, and target_modules names none.")
    for name, module in found.items():
        if quantized_kind(module) is not None:
            raise UnsupportedError(f"{title} does not support quantized models: {name!r} is {quantized_kind(module)}.")
    return found


def turned(module: Any, weight: Tensor) -> Tensor:
    """Between a module's own layout and [out, in]."""
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def preprocess_corda(
    model: nn.Module, lora_config: Any, run_model: Callable[[], None] | None = None, hooked_model: nn.Module | None = None
) -> None:
    """Find CorDA's factors of every layer that the configuration names: the singular directions of ``W C``, C the covariance
    of what comes to the layer.

    Args:
        run_model: runs the model on sample data; only without a file of covariances or factors.
        hooked_model: another model that `run_model` runs, with modules of the same names.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ConfigError("preprocess_corda needs LoraConfig(init_lora_weights='corda', corda_config=CordaConfig(...)).")
    layers = targets_of(model, lora_config, "CorDA")
    if cached := read_cache(settings.cache_file):
        for name, module in layers.items():
            module.eigens = CordaEigens(*(cached[f"{name}.eigens.{part}"] for part in ("S_WC", "U_WC", "V_WC")))
        return
    covariances = read_cache(settings.covariance_file)
    if not covariances:
        if run_model is None:
            raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
        covariances = covariances_of(hooked_model or model, lora_config, run_model)
        write_cache(settings.covariance_file, covariances)
    for name, module in layers.items():
        r = pattern_value(lora_config.rank_pattern, name, lora_config.r)
        module.eigens = corda_eigens(module, covariances[name].to(module.weight.device), r, settings.corda_method)
        if not settings.prune_temporary_fields:
            module.covariance_matrix = covariances[name]
    parts = {f"{n}.eigens.{p}": getattr(m.eigens, p) for n, m in layers.items() for p in ("S_WC", "U_WC", "V_WC")}
    write_cache(settings.cache_file, parts)


def covariances_of(model: nn.Module, config: Any, run_model: Callable[[], None]) -> dict[str, Tensor]:
    """The mean over calls of ``x^T x`` [in, in], x [tokens, in] being what comes to a layer, over its largest value."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    half = config.corda_config.use_float16_for_covariance

    def hook(name: str) -> Callable:
        def see(module: Any, args: tuple, output: Any) -> None:
            x = args[0].detach().flatten(0, -2)
            x = x if half else x.float()
            x = x / x.max().abs()
            if not bool(torch.isfinite(x).all()):
                raise ConfigError("Invalid value found in input, please check your input data.")
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + 1

        return see

    layers = targets_of(model, config, "CorDA")
    with evaluating(model), hooks_on({m: hook(n) for n, m in layers.items()}):
        run_model()
    if missing := [name for name in layers if name not in counts]:
        raise ConfigError(f"run_model has not run {missing[0]!r}; it must call the model on sample data.")
    return {name: total / counts[name] for name, total in sums.items()}


@contextmanager
def hooks_on(hooks: dict[Any, Callable]) -> Iterator[None]:
    """Forward hooks for the length of a block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def corda_eigens(module: Any, covariance: Tensor, r: int, method: str) -> CordaEigens:
    """r singular directions of ``W C``: the first ("ipm") or the last ("kpm"). C is damped until its inverse is exact."""
    weight, damp = turned(module, module.weight.detach().float()), 0.01
    covariance = covariance.float()
    one = torch.eye(len(covariance), device=covariance.device)
    while True:
        fixed = covariance + one * covariance.diag().mean() * damp
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, one) < 0.05:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ fixed, full_matrices=False)
    v = (vh @ inverse).T
    own = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    return CordaEigens(s[own].clone(), u[:, own].clone(), v[:, own].clone())


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Find the mean gradient of every layer that the configuration names.

    Args:
        train_step: runs forward and backward passes of the model on training data, as often as it likes; no optimiser step.
        cache_file: where gradients are kept and found again (safetensors).
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "preprocess_loraga needs LoraConfig(init_lora_weights='lora_ga', lora_ga_config=LoraGAConfig(...))."
        )
    layers = targets_of(model, lora_config, "LoRA-GA")
    found = read_cache(cache_file)
    if not found:
        means = gradients_of(model, layers, train_step)
        found = {f"{name}._peft_loraga_grad": mean for name, mean in means.items()}
        write_cache(cache_file, found)
    for name, module in layers.items():
        module._peft_loraga_grad = found[f"{name}._peft_loraga_grad"].to(module.weight.device)


def gradients_of(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], None]) -> dict[str, Tensor]:
    """Mean gradients of the layers' weights over backward passes; only these take gradients meanwhile."""
    counts = dict.fromkeys(layers, 0)
    before = {p: p.requires_grad for p in model.parameters()}
    training = model.training

    def counted(name: str) -> Callable:
        def see(module: Any, to_input: Any, to_output: Any) -> None:
            counts[name] += 1

        return see

    handles = [module.register_full_backward_hook(counted(name)) for name, module in layers.items()]
    try:
        model.train()
        model.requires_grad_(False)
        for module in layers.values():
            module.weight.requires_grad_(True)
        with torch.enable_grad():
            train_step()
        if missing := [name for name in layers if not counts[name] or layers[name].weight.grad is None]:
            raise ConfigError(f"train_step has given {missing[0]!r} no gradient; it must call backward() on a loss.")
        return {name: module.weight.grad.detach() / counts[name] for name, module in layers.items()}
    finally:
        for handle in handles:
            handle.remove()
        for module in layers.values():
            module.weight.grad = None
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
        model.train(training)


def read_cache(file: str | None) -> dict[str, Tensor]:
    """Tensors that were kept; {} where there is no such file yet."""
    if file is None or not os.path.exists(file) or not os.path.getsize(file):
        return {}
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is no safetensors file ({error}). HF PEFT keeps pickles there, which are not read; remove it, or name "
            "another file."
        ) from error


def write_cache(file: str | None, tensors: dict[str, Tensor]) -> None:
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)


# -- start values ------------------------------------------------------------------------------------------------------
def data_factors(config: Any, frozen: Any, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] out of what was found for a layer, which is taken off it.

    Raises:
        ConfigError: nothing was found, or for another rank.
    """
    layer, kind = frozen.plain, config.init_lora_weights
    field, run = ("eigens", "preprocess_corda") if kind == "corda" else ("_peft_loraga_grad", "preprocess_loraga")
    found = vars(layer).pop(field, None)
    if found is None:
        raise ConfigError(
            f"init_lora_weights={kind!r}: a layer ({type(layer).__name__}) has no start values; call {run}(model, config, "
            "...) on the base before the adapter is attached."
        )
    if kind == "lora_ga":
        return gradient_factors(config.lora_ga_config, turned(layer, found).float(), layer, r, scale)
    if found.S_WC.shape[0] != r:
        raise ConfigError(
            f"CorDA's start values are of rank {found.S_WC.shape[0]}, the layer's is {r}; run {run} with this config."
        )
    root = (found.S_WC / scale).sqrt()
    return root[:, None] * found.V_WC.T, found.U_WC * root


def gradient_factors(settings: LoraGAConfig, gradient: Tensor, layer: Any, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 and B0 from the first 2r singular directions of a gradient [out, in]; B0's carry the singular values."""
    if 2 * r > min(gradient.shape):
        raise ConfigError(
            f"init_lora_weights='lora_ga' needs 2r = {2 * r} directions of a gradient {tuple(gradient.shape)}; lower r, for "
            "this layer by rank_pattern."
        )
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    odd, even, first, second = slice(1, 2 * r, 2), slice(0, 2 * r, 2), slice(0, r), slice(r, 2 * r)
    drawn = torch.randperm(2 * r)[:r] if settings.direction == "random" else None
    to_a, to_b = {"ArBr": (odd, even), "A2rBr": (second, first), "ArB2r": (first, second), "random": (drawn, drawn)}[
        settings.direction
    ]
    a, b = v.T[to_a], u[:, to_b] * s[to_b]
    if settings.scale == "stable":
        b = b * layer.weight.shape[0] ** 0.25 / settings.stable_gamma**0.5  # of a Conv1D its inputs, as HF PEFT has it
    elif settings.scale == "weight_svd" and s[to_b][0] > 0:
        weight = turned(layer, layer.weight.detach().float())
        b = b * torch.svd_lowrank(weight, q=r, niter=4)[1][0] / s[to_b][0]
    elif settings.scale == "gd_scale":
        a, b = a / scale, b / scale
    return a, b


# -- the file ----------------------------------------------------------------------------------------------------------
def doubled(config: Any) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter whose file holds its start as well: plain LoRA of twice the rank."""
    more = 2**0.5 if config.use_rslora else 2
    return {
        "r": 2 * config.r,
        "lora_alpha": config.lora_alpha * more,
        "rank_pattern": {k: 2 * r for k, r in config.rank_pattern.items()},
        "alpha_pattern": {k: a * more for k, a in config.alpha_pattern.items()},
        "init_lora_weights": True,
    }


def with_starts(tensors: dict[str, Tensor], starts: dict[str, Any]) -> dict[str, Tensor]:
    """A file's tensors with the starts in them, by the name of their layer there."""
    for path, start in starts.items():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        tensors |= {a: torch.cat((tensors[a], start.a)), b: torch.cat((tensors[b], -start.b), dim=1)}
    return tensors


def take_starts(tensors: dict[str, Tensor], starts: dict[str, Any]) -> dict[str, Tensor]:
    """Fill the starts from such a file's tensors; what is left is the adapter's."""
    left = dict(tensors)
    for path, start in starts.items():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        r = len(start.a)
        start.a.copy_(tensors[a][r:])
        start.b.copy_(-tensors[b][:, r:])
        left |= {a: tensors[a][:r], b: tensors[b][:, :r]}
    return left


def without_starts(tensors: dict[str, Tensor], starts: dict[str, Any]) -> dict[str, Tensor]:
    """HF PEFT's file, which holds no starts, as one with starts of zero; said in a warning."""
    made = dict(tensors)
    for path, start in starts.items():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        if a in made and b in made and made[a].shape == start.a.shape and made[b].shape == start.b.shape:
            made |= {a: F.pad(made[a], (0, 0, 0, len(start.a))), b: F.pad(made[b], (0, len(start.a)))}
    if any(made[key] is not tensors[key] for key in tensors):
        warnings.warn(
            "This adapter started from data, and its file, HF PEFT's, holds no start values. It belongs on the base whose "
            "weights HF PEFT changed by them (get_base_model().save_pretrained); on another one its output is wrong.",
            stacklevel=2,
        )
    return made
