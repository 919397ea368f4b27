"""LoRA on parameters that are in no linear layer: `target_parameters`, made for experts stacked in one tensor.

Shapes: E experts; a parameter is [E, out, in] (Mixtral, Qwen3-MoE, DeepSeek), [E, in, out] where its module says
`is_transposed` (gpt-oss), or [out, in] (a router), which is E = 1. A [r E, in], B [out, r E]; HF PEFT's layout: expert e has
the rows ``e r … e r + r`` of A, and of B each E-th column, from the e-th on.

    W'[e] = W[e] + scale * B[e] A[e],   B[e] [out, r], A[e] [r, in]

The update is no product of its own beside a layer (what comes to an expert is made inside its module): the module runs on
``W'``, as with HF PEFT, so there is no dropout, no DoRA and no `lora_bias`.

What differs from HF PEFT: adapters of one model may target different parameters; mixed batches work; merging is undone bit
for bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import base_modules, clean_path, replace_module
from ..errors import ConfigError, TargetError, UnsupportedError, nearest
from ..layers import Adapted, AdaptedParameter, Frozen, Held, module_of, parameters_of
from .lora_change import LoraChange

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class ExpertsChange(LoraChange):
    """Of one parameter."""

    tables = ("lora_dropout", "lora_A", "lora_B")

    def make(self, t: Held, frozen: Frozen, dtype: torch.dtype) -> None:
        self.experts, out, size = sizes(frozen)
        options: Any = {"bias": False, "device": frozen.device, "dtype": dtype}
        t["lora_A"] = nn.utils.skip_init(nn.Linear, size, self.r * self.experts, **options)
        t["lora_B"] = nn.utils.skip_init(nn.Linear, self.r * self.experts, out, **options)

    def initialise(self, t: Held, frozen: Frozen, init: bool | str) -> None:
        a, b = self.factors(t)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b) if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    def low_rank(self, t: Held) -> None:
        return None

    def update(self, t: Held, dtype: torch.dtype) -> Tensor:
        """``scale * B[e] A[e]`` in the parameter's own layout."""
        a, b = (factor.to(dtype) for factor in self.factors(t))
        a = a.view(self.experts, self.r, -1)
        b = b.view(-1, self.r, self.experts).permute(2, 0, 1)
        delta = (b @ a) * self.scaling
        layout = t.layer.frozen
        return (delta.mT if turned(layout) else delta).view(layout.shape)


def turned(frozen: Any) -> bool:
    """Whether a parameter is [E, in, out]."""
    return len(frozen.shape) == 3 and bool(getattr(frozen.layer, "is_transposed", False))


def sizes(frozen: Any) -> tuple[int, int, int]:
    """Experts, output and input width."""
    *experts, out, size = frozen.shape
    if turned(frozen):
        out, size = size, out
    return (experts or [1])[0], out, size


def check_settings(config: Any) -> None:
    """ConfigError for what does not go with `target_parameters`."""
    if not config.target_parameters:
        return
    init = config.init_lora_weights
    refused = {
        f"lora_dropout={config.lora_dropout}": config.lora_dropout,
        "fan_in_fan_out=True": config.fan_in_fan_out,
        "lora_bias=True": config.lora_bias,
        "use_dora=True": config.use_dora,
        f"init_lora_weights={init!r}": isinstance(init, str) and init != "gaussian",
    }
    for text in (text for text, on in refused.items() if on):
        raise ConfigError(f"target_parameters does not work with {text}: the parameters' module runs on the summed weight.")


def find_parameters(base: nn.Module, config: Any) -> list[tuple[str, str, str]]:
    """Parameters that `target_parameters` selects: the dotted name in the bare base, the path of the module now, and the
    parameter's own name; in the order of the model. An entry selects by the ending of names, as with HF PEFT.

    Raises:
        TargetError: nothing matches. UnsupportedError: what matches is quantised, or is in a layer that is adapted already.
    """
    found, used, names, wanted = [], set(), [], config.target_parameters
    for path, module in base_modules(base):
        if isinstance(module, Adapted):
            continue  # its own module comes further inside
        for name, full in own_parameters(path, module):
            names.append(full)
            entries = {entry for entry in wanted if full == entry or full.endswith(f".{entry}")}
            if entries:
                used |= entries
                found.append((full, clean_path(path), name))
    missing = [entry for entry in wanted if entry not in used]
    leaves = sorted({".".join(name.split(".")[-2:]) for name in names})
    listed = ", ".join(f"{m!r}{nearest(m, [*leaves, *names])}" for m in missing)
    if not found:
        raise TargetError(f"target_parameters={list(wanted)!r} matches no parameter of this model: {listed}.")
    if missing:
        warnings.warn(f"target_parameters: no parameter of this model matches {listed}. The others were used.", stacklevel=2)
    return found


def own_parameters(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a module's own parameters, those behind a parametrization too, and their dotted names in the bare base."""
    for name in (*module._parameters, *getattr(module, "parametrizations", {})):
        yield name, f"{clean_path(path)}.{name}".lstrip(".")


def adapted_parameter(host: Any, path: str, name: str) -> AdaptedParameter:
    """What stands around a module of the bare base for one of its parameters; put there where nothing does yet."""
    place, around = next((p, m) for p, m in base_modules(host.base) if clean_path(p) == path)
    module = module_of(around)
    check_parameter(f"{path}.{name}", module, name)
    own = [part for part in parameters_of(around) if part.switch is host.switch and part.parameter_name == name]
    if own:
        return own[0]
    made = AdaptedParameter(around, host.switch, name)
    replace_module(host.base, place, made)
    return made


def check_parameter(full: str, module: nn.Module, name: str) -> None:
    """UnsupportedError for a parameter that cannot be changed, ConfigError for one that is changed otherwise already."""
    kind = type(module).__name__
    if isinstance(module, Adapted):
        raise ConfigError(
            f"target_parameters selects {full!r}, whose layer is changed through target_modules. Leave one of the two out "
            "(target_modules=[] takes no family's default)."
        )
    if "." not in full:
        raise ConfigError(
            f"target_parameters selects {full!r}, a parameter of the base itself; name one of a module inside."
        )
    value = module._parameters.get(name)
    if value is None or value.dtype not in FLOATS or type(value).__name__ in ("Params4bit", "Int8Params"):
        stored = "behind a parametrization" if value is None else f"as {value.dtype}".replace("torch.", "")
        raise UnsupportedError(
            f"target_parameters selects {full!r} of a {kind}, which a quantiser keeps {stored}; it takes plain "
            "floating-point parameters. Load the base with its experts unquantised (bitsandbytes leaves them so unless told "
            "otherwise; gpt-oss: Mxfp4Config(dequantize=True)), or name its linear layers in target_modules."
        )
    if value.dim() not in (2, 3):
        raise UnsupportedError(
            f"target_parameters selects {full!r} of a {kind}, of shape {tuple(value.shape)}; it takes matrices and stacks "
            "of them (2 or 3 axes)."
        )
