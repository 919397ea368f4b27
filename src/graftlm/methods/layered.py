"""What methods that change layers share: which layers, the modules in their places, files. A method adds its `Change`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architectures import (
    LORA_TARGETS,
    Targets,
    base_modules,
    clean_path,
    default_targets,
    is_encoder_decoder,
    replace_module,
    token_embeddings,
)
from ..errors import ConfigError, TargetError, UnsupportedError
from ..layers import Adapted, Change, Frozen, adapted_layers, around, is_product
from .base import Method, PeftConfig, Site
from .fields import check_expressions
from .targets import find_targets, is_uncalled, report_read, without_uncalled

#: ranks up to here are defaults or habit, and are taken on layers of toys too
USUAL_RANKS = 32


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """Fields that say which layers are changed.

    Args:
        target_modules: module names (endings), a regular expression over whole names, or "all-linear"; None takes the
            family's default.
        exclude_modules: the same, to leave out.
        modules_to_save: modules that are trained in full and saved along.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            check_expressions(name, getattr(self, name, None))


class LayerMethod(Method):
    """One adapter that changes layers of a host. A subclass has `change`."""

    mergeable = True
    #: kinds of layers that it can change (see `Frozen.kind`), and what they are in words
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    takes: ClassVar[str] = "linear layers (torch's, bitsandbytes', Conv1D)"
    title: ClassVar[str]
    #: whether `r` is the rank of the update, and more of it than a layer has is refused
    ranked: ClassVar[bool] = False
    #: the layers that it changes where the configuration names none, by `config.model_type`
    families: ClassVar[Targets] = LORA_TARGETS

    @property
    def bound(self) -> bool:
        return False

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        """What this adapter does to the layer at a dotted path of the bare base."""
        raise NotImplementedError

    def prepare(self, host: Site, layers: list[Frozen]) -> None:
        """Make what the changes of all these layers share. `detach` takes it away."""

    # -- attaching -------------------------------------------------------------------------------------------------------
    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        try:
            self.attach_layers(host, for_loading=for_loading)
        except Exception:
            self.detach(host)
            raise

    def attach_layers(self, host: Site, *, for_loading: bool) -> None:
        """Put this adapter's changes into the layers that the configuration names."""
        config: Any = self.config
        if config.target_modules is None:
            config.target_modules = default_targets(host.base, self.families, type(config).__name__)
        found = find_targets(host.base, config, skip=(Adapted, *host.container_types))
        targets = without_uncalled(config, found, for_loading)
        self._refuse_shared(host, targets)
        self.prepare(host, self._taken(targets))
        report_read(host.base, targets)
        for path, module in targets.items():
            frozen = self._place(host, host.base, path, module, clean_path(path), not for_loading)
            if frozen.kind == "attention":  # its projection of the output is changed along
                self._place(host, frozen.layer, "out_proj", frozen.layer.out_proj, clean_path(path), not for_loading)

    def _place(self, host: Site, root: nn.Module, path: str, module: Any, name: str, initialise: bool) -> Frozen:
        """Put this adapter's change of a layer in; `path` is the layer's place below `root`, `name` what it is called."""
        layer = adapted_at(host, path, module, root)
        change: Any = self.change(host, name, layer.frozen)
        if self.ranked and initialise:
            check_rank(change.r, name, type(layer.frozen.layer).__name__, layer.frozen.shape)
        layer.add(self.name, change, host.adapter_dtype(layer.frozen.layer), initialise=initialise)
        return layer.frozen

    def _taken(self, targets: dict[str, Any]) -> list[Frozen]:
        """The layers; UnsupportedError for one that this method has no change for, TargetError for one that never runs."""
        layers = []
        for path, module in targets.items():
            frozen = module.frozen if isinstance(module, Adapted) else Frozen(module)
            layers.append(frozen)
            if is_uncalled(module):
                attention, _, name = clean_path(path).rpartition(".")
                raise TargetError(
                    f"target_modules selects {name!r} of {attention!r}, a MultiheadAttention of torch's, which reads its "
                    f"weight without calling it: an adapter of it would never act. Name {attention!r} instead, which "
                    "brings this projection along."
                )
            if frozen.kind == "linear" and not is_product(frozen.layer):
                raise UnsupportedError(
                    f"{clean_path(path)!r} is a {type(frozen.layer).__name__}, a linear layer that does not compute a plain "
                    "product, so there is nothing that an adapter could be added to. Leave it out of target_modules."
                )
            if frozen.kind == "attention" and not frozen.layer._qkv_same_embed_dim:
                raise UnsupportedError(
                    f"{clean_path(path)!r} is a MultiheadAttention whose keys or values have another width than its queries "
                    "(kdim, vdim): it has no weight that adapters could change. Name other modules in target_modules."
                )
            if frozen.kind not in self.kinds:
                raise UnsupportedError(
                    f"{self.title} has no form for {path!r}, a {type(frozen.layer).__name__}; it takes {self.takes}. Name "
                    "other modules in target_modules."
                )
        return layers

    def _refuse_shared(self, host: Site, targets: dict[str, nn.Module]) -> None:
        """T5 and BART keep a module that only holds the embeddings' weight and never runs: an update there is lost."""
        if not is_encoder_decoder(host.base):
            return
        if (used := token_embeddings(host.base)) is None:
            return
        holder = host.base.get_input_embeddings()
        for path, module in targets.items():
            if module is holder and holder is not used:
                raise TargetError(
                    f"target_modules selects {path!r}, which only holds the weight of both halves' embeddings "
                    "and computes nothing. Name 'embed_tokens' instead."
                )

    def detach(self, host: Site) -> None:
        for path, layer in reversed(list(adapted_layers(host.base, host.switch))):  # those inside of others first
            if self.name in layer.changes:
                layer.remove(self.name)
            if not layer.changes:
                replace_module(host.base, path, layer.leave_place())

    def layers(self, host: Site) -> Iterator[tuple[str, Adapted]]:
        """This adapter's layers with their dotted names in the bare base."""
        for path, layer in adapted_layers(host.base, host.switch):
            if self.name in layer.changes:
                yield clean_path(path), layer

    def refuse_beside(self, host: Site, other: Method) -> None:
        for _, layer in self.layers(host) if isinstance(other, LayerMethod) else ():
            if other.name in layer.changes:
                layer.changes[self.name].refuse_beside(layer.changes[other.name])

    # -- tensors ---------------------------------------------------------------------------------------------------------
    def named_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in adapted_layers(host.base, host.switch):
            for key, parameter in layer.parts(self.name):
                yield f"base_model.model.{path}.{key}", parameter

    def file_parameters(self, host: Site) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under their keys in the file."""
        for path, layer in self.layers(host):
            if is_uncalled(layer):  # HF PEFT names it by its place in the attention that stands in the adapter's module
                path = re.sub(r"(^|\.)(\w+)$", r"\1base_layer.\2", path)
            change = layer.changes[self.name]
            for table, key, parameter in change.parts(layer.held(self.name)):
                known = change.files.get(table, table)
                short = f"{known}.{key}" if key and table not in change.bare else known
                yield f"{self.file_prefix}{path}.{short}", parameter

    def tensors(self, host: Site) -> dict[str, Tensor]:
        return {key: parameter.detach() for key, parameter in self.file_parameters(host)}

    def completed(self, host: Site, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without what HF PEFT keeps for weights that are never called, which `without_uncalled` leaves out."""
        own = {path for path, _ in self.layers(host)}
        paths = [clean_path(path) for path, module in base_modules(host.base) if is_uncalled(module)]
        idle = [f"{self.file_prefix}{path}." for path in paths if path not in own]
        gone = [k for k in tensors if k.startswith(tuple(idle)) and not k.endswith((".out_proj.weight", ".out_proj.bias"))]
        if gone:
            names = sorted({f"{k.rpartition('.out_proj.')[0]}.out_proj" for k in gone})
            warnings.warn(
                f"Tensors of {', '.join(names)} are left out: MultiheadAttention reads its weight without calling it, "
                "so they did nothing.",
                stacklevel=2,
            )
        return {k: v for k, v in tensors.items() if k not in gone}

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self.file_parameters(host):
                parameter.copy_(tensors[key])


def check_rank(r: int, path: str, kind: str, shape: tuple[int, ...]) -> None:
    """ConfigError where a new update would have a rank over both sizes of its layer (a file's is taken as it is)."""
    if r > USUAL_RANKS and r > (most := max(shape)):
        raise ConfigError(
            f"r={r} is over both sizes of {path!r}, a {kind} of {shape[0]} x {shape[1]}: its update would have more "
            f"parameters than the layer, and no more to say. Take at most {most} (for this layer alone: rank_pattern), or "
            "leave the layer out of target_modules."
        )


def adapted_at(host: Site, path: str, module: nn.Module, root: nn.Module | None = None) -> Adapted:
    """The module of this host's adapters at a dotted path below `root` (the base), where `module` stands now; put there if
    there is none."""
    if isinstance(module, Adapted) and module.switch is host.switch:
        return module
    layer = around(module, host.switch)
    replace_module(host.base if root is None else root, path, layer)
    return layer
