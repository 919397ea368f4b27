"""LN Tuning: the norms of the base are trained, all else stays frozen (arXiv:2312.11420).

An adapter is a copy of each norm, which computes in the norm's place while the adapter is active: RMS, layer and any
other norm, or whatever modules `target_modules` names. The copies start as the base's, so an untrained adapter changes
nothing. Field names, defaults, maths and files are HF PEFT's; what differs from it:
* copies over a 16-bit base are in fp32, as other adapters are, and give what they make in the base's precision;
* families that HF PEFT has no default modules for take all their norms;
* several such adapters stand in one mixed batch; active together they must not have a module in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..architectures import clean_path, model_type, replace_module
from ..errors import TargetError
from ..layers import Adapted, ModulesToSaveWrapper, unsave_modules
from .base import Method, PeftType, Site, register
from .fields import also_takes
from .layered import LayerConfig
from .targets import find_targets, module_names

_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_FUSED = ["input_layernorm", "post_attention_layernorm", "ln_f"]
_GEMMA = [*_LLAMA[:2], "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"]
# Default targets by `config.model_type`: HF PEFT's table. Other families take all their norms.
TARGETS: dict[str, list[str]] = {
    "llama": _LLAMA, "bloom": _FUSED, "t5": ["layer_norm", "final_layer_norm"], "mt5": ["layer_norm", "final_layer_norm"],
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"], "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"], "falcon": _FUSED, "mistral": _LLAMA, "phi": ["input_layernorm", "final_layernorm"],
    "gemma": _LLAMA, "gemma2": _GEMMA, "gemma3_text": _GEMMA, "qwen2": ["post_attention_layernorm"],
    "qwen3": ["post_attention_layernorm"],
}  # fmt: skip
PLACE = "ln_tuning_layers"


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    """Configuration of LN Tuning: which modules are trained (`target_modules`; None: the family's norms)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING


class LNTuning(Method):
    """One LN Tuning adapter in a host."""

    mergeable = True
    saves = True

    @property
    def bound(self) -> bool:
        return False

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        config: LNTuningConfig = self.config  # type: ignore[assignment]
        skip = (Adapted, *host.container_types)
        if config.target_modules is None:
            config.target_modules = TARGETS.get(model_type(host.base)) or norms(module_names(host.base, skip))
        targets = find_targets(host.base, config, skip=skip)
        self._refuse_nested(targets)
        self.places = {clean_path(path) for path in targets}
        for path, module in targets.items():
            outer = path.removesuffix(".original_module")  # where another adapter has a copy already
            wrapper: Any = host.base.get_submodule(outer) if outer != path else module
            if not isinstance(wrapper, ModulesToSaveWrapper) or wrapper.switch is not host.switch:
                wrapper = ModulesToSaveWrapper(module, host.switch)
                replace_module(host.base, path, wrapper)
            wrapper.keeps_dtype = True
            weight = next((p for p in module.parameters() if p.is_floating_point()), None)
            wrapper.add(self.name, None if weight is None else host.adapter_dtype(module))

    @staticmethod
    def _refuse_nested(targets: dict[str, nn.Module]) -> None:
        for path in targets:
            if outer := next((other for other in targets if path.startswith(f"{other}.")), None):
                raise TargetError(f"target_modules selects {outer!r} and {path!r} within it; name one of them.")

    def detach(self, host: Site) -> None:
        unsave_modules(host.base, host.switch, self.name)

    def saved_place(self, path: str) -> str:
        return f"{path}.{PLACE}" if path in self.places else path

    # -- tensors: the copies are the host's, as those of modules_to_save are ---------------------------------------------
    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())

    def tensors(self, host: Site) -> dict[str, Tensor]:
        return {}

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        pass


def norms(modules: dict[str, nn.Module]) -> list[str]:
    """The last parts of all norms' names, or whole names where other modules are called so, too."""
    found = {name: name.rpartition(".")[2] for name, module in modules.items() if "Norm" in type(module).__name__}
    others = {name.rpartition(".")[2] for name in modules if name not in found}
    return sorted({name if leaf in others else leaf for name, leaf in found.items()})


register(PeftType.LN_TUNING, LNTuningConfig, LNTuning)
