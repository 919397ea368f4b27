"""Trained rows of the vocabulary: a layer's change, and what Trainable Tokens and LoRA's `trainable_token_indices` share.

Shapes: V tokens of the vocabulary, H hidden size, n trained tokens; `trainable_tokens_delta` [n, H], in the order in which
the tokens are named. ``E'[t] = delta[i]`` for the i-th of them, ``E'[t] = E[t]`` for all others; a head's rows likewise.

The values are the rows themselves, not differences: rows of new tokens are random in every base that is resized anew.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import clean_path, innermost, is_encoder_decoder, token_embeddings
from ..errors import CompositionError, ConfigError, TargetError, UnsupportedError, nearest
from ..layers import Adapted, Change, Frozen, Held, as_it_was
from ..quantization import dequantize
from .base import Site
from .layered import LayerMethod, adapted_at
from .targets import module_names

TABLE = "trainable_tokens_delta"


class TokenChange(Change):
    """Of an embedding or of a head.

    Args:
        ids: of the trained tokens.
        from_base: start as the base's own rows; else at random.
        within: what HF PEFT's files have in front of the table's name.
    """

    tables: ClassVar[tuple[str, ...]] = (TABLE,)
    numbers: ClassVar[tuple[str, ...]] = ("token_indices",)

    def __init__(self, ids: list[int], from_base: bool = True, within: str = "") -> None:
        self.ids = self.token_indices = ids
        self.from_base = from_base
        self.files = {TABLE: f"{within}{TABLE}"}
        self.places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        size = vocabulary(frozen)
        for token in self.ids:
            if not 0 <= token < size:
                raise ConfigError(
                    f"Token index {token} is outside of the vocabulary, 0 to {size - 1}. For new tokens call "
                    "resize_token_embeddings on the base before the adapter is attached."
                )
        with torch.no_grad():
            rows = token_rows(frozen, self.ids).to(dtype, copy=True)
            t[TABLE] = nn.Parameter(rows if self.from_base or not initialise else torch.randn_like(rows))

    def originals(self, frozen: Frozen) -> Tensor:
        """The base's rows of these tokens [n, H]."""
        return token_rows(frozen, self.ids)

    def rows(self, t: Held) -> Tensor:
        """The trained rows [n, H]."""
        return t[TABLE]

    def sorted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ids in ascending order, and which row is whose [n]."""
        if device not in self.places:
            self.places[device] = torch.tensor(self.ids, device=device).sort()
        return self.places[device]

    def leave(self, t: Held, x: Tensor, y: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        rows, (ids, order) = self.rows(t), self.sorted(y.device)
        if frozen.kind != "embedding":
            own = F.linear(x.to(rows.dtype), rows[order])
            own = own if bias is None else own + bias[ids].to(own.dtype)
            return y.index_copy(-1, ids, own.to(y.dtype))
        at = torch.searchsorted(ids, x).clamp_(max=len(ids) - 1)
        found = F.embedding(order[at], rows)
        found = found if frozen.scale is None else found * frozen.scale
        return torch.where((ids[at] == x)[..., None], found.to(y.dtype), y)

    def fold(self, t: Held, weight: Tensor, frozen: Frozen) -> Tensor:
        (ids, order), rows = self.sorted(weight.device), self.rows(t).to(weight.dtype)
        if frozen.kind == "embedding":
            return weight.index_copy(1, ids, rows[order].T)
        return weight.index_copy(0, ids, rows[order])

    def refuse_beside(self, other: Change) -> None:
        both = sorted(set(self.ids) & set(other.ids)) if isinstance(other, TokenChange) else []
        if both:
            raise CompositionError(f"Both adapters train the rows of tokens {both}; only one of them can be active.")


class TiedTokens(TokenChange):
    """Of a layer whose weight is tied to another one's, which holds the rows.

    Args:
        home: the other layer's tensors.
    """

    tables = ()
    numbers = ("token_indices", TABLE)

    def __init__(self, ids: list[int], home: Held) -> None:
        super().__init__(ids)
        self.home = home

    @property
    def trainable_tokens_delta(self) -> Tensor:
        return self.home[TABLE]

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        pass

    def rows(self, t: Held) -> Tensor:
        return self.home[TABLE]

    def values(self, t: Held) -> list[nn.Parameter]:
        return [self.home[TABLE]]


def vocabulary(frozen: Frozen) -> int:
    """How many tokens a layer has rows for."""
    return frozen.shape[1] if frozen.kind == "embedding" else frozen.shape[0]


def token_rows(frozen: Frozen, ids: list[int]) -> Tensor:
    """The base's own rows of some tokens [n, H]."""
    weight = frozen.rows(dequantize(frozen.plain))
    return (weight.T if frozen.kind == "embedding" else weight)[ids]


def check_ids(field: str, ids: list[int]) -> None:
    """ConfigError for no tokens, and for one that is named twice."""
    twice = sorted({token for token in ids if ids.count(token) > 1}) if len(set(ids)) < len(ids) else []
    if twice or not ids:
        raise ConfigError(f"{field}={ids}: expected tokens, each once{f'; {twice} more than once' if twice else ''}.")


# -- attaching -----------------------------------------------------------------------------------------------------------
def attach_tokens(
    method: LayerMethod, host: Site, wanted: dict[str, list[int]], initialise: bool, from_base: bool = True,
    within: str = "", tie: bool = False,
) -> None:  # fmt: skip
    """Let an adapter train rows of layers. Modules whose weight is tied to the input embeddings' follow these.

    Args:
        wanted: tokens by dotted path in the bare base.
        initialise, from_base, within: see `TokenChange`.
        tie: refuse other tokens for a tied module (else they are trained apart).

    Raises:
        UnsupportedError: a module that is neither linear nor an embedding. TargetError: one that never runs.
        ConfigError: a token outside of the vocabulary, or a layer that the adapter changes otherwise.
    """
    modules = own_modules(host)
    holder, tied = tied_modules(host, modules)
    follow = tied if holder in wanted else []
    if (
        holder in wanted
        and not follow
        and is_encoder_decoder(host.base)
        and token_embeddings(host.base) is not modules[holder]
    ):
        raise TargetError(
            f"{holder!r} only holds a weight, which on this model neither half's embeddings share, and computes nothing. "
            "Name 'encoder.embed_tokens' and 'decoder.embed_tokens'."
        )
    apart = [path for path in follow if path in wanted and wanted[path] != wanted[holder]]
    if apart and tie:
        raise ConfigError(
            f"ensure_weight_tying=True, but {holder!r} and {apart[0]!r}, whose weights are tied, have different tokens. "
            "Name the same ones, or leave ensure_weight_tying out."
        )
    layers = {}
    for path, ids in wanted.items():
        if path not in follow or path in apart:
            layers[path] = _put(method, host, path, modules[path], TokenChange(ids, from_base, within), initialise)
    for path in follow:
        if path not in layers:
            home = layers[holder].held(method.name)
            _put(method, host, path, modules[path], TiedTokens(wanted[holder], home), initialise)


def _put(method: LayerMethod, host: Site, path: str, module: Any, change: TokenChange, initialise: bool) -> Adapted:
    frozen = module.frozen if isinstance(module, Adapted) else Frozen(module)
    full = path.removesuffix(".original_module")
    if frozen.kind not in ("linear", "embedding") or (
        full != path and method.name in host.base.get_submodule(full).modules_to_save
    ):
        raise UnsupportedError(
            f"Rows of {clean_path(path)!r}, a {type(module).__name__}, cannot be trained: only embeddings and linear layers "
            "have a row a token (and none that is trained in full, modules_to_save)."
        )
    layer = adapted_at(host, path, module)
    if method.name in layer.changes:
        raise ConfigError(
            f"{clean_path(path)!r} is changed by this adapter already. Take it out of target_modules, or train no rows."
        )
    layer.add(method.name, change, host.adapter_dtype(layer.frozen.layer), initialise=initialise)
    return layer


def own_modules(host: Site) -> dict[str, nn.Module]:
    """The base's modules as they stand now, by their dotted names in it."""
    return module_names(host.base, (Adapted, *host.container_types))


def input_name(host: Site, modules: dict[str, nn.Module]) -> str:
    """The dotted name of the input embeddings (HF PEFT's choice; on T5 and BART what both halves' are tied to)."""
    try:
        embeddings = host.base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    embeddings = getattr(embeddings, "original_module", embeddings)  # beside copies that other adapters train in full
    found = next((path for path, module in modules.items() if module is embeddings), None)
    if found is None:
        raise TargetError(f"{type(host.base).__name__} has no input embeddings of tokens; name the modules to train.")
    return found


def tied_modules(host: Site, modules: dict[str, nn.Module]) -> tuple[str, list[str]]:
    """The input embeddings' name ("" where there are none), and those of modules that share their weight."""
    try:
        holder = input_name(host, modules)
    except TargetError:
        return "", []
    weight = _weight(modules[holder])
    return holder, [path for path, m in modules.items() if weight is not None and path != holder and _weight(m) is weight]


def _weight(module: nn.Module) -> Any:
    return as_it_was(innermost(module))._parameters.get("weight")


def token_paths(host: Site, given: list[int] | dict[str, list[int]]) -> dict[str, list[int]]:
    """`trainable_token_indices` by dotted path: a list is of the input embeddings, a key is the ending of module names."""
    modules = own_modules(host)
    if not isinstance(given, dict):
        return {input_name(host, modules): given}
    wanted: dict[str, list[int]] = {}
    for entry, ids in given.items():
        found = [path for path in modules if clean_path(path).endswith(entry)] if entry else []
        if not found:
            leaves = {clean_path(path).rpartition(".")[2] for path in modules}
            raise TargetError(
                f"trainable_token_indices: no module of this model is called {entry!r}{nearest(entry, leaves)}"
            )
        wanted |= dict.fromkeys(found, ids)
    return wanted


def repeated_tokens(method: LayerMethod, host: Site) -> dict[str, str]:
    """Keys of tied modules, and those of the modules that hold the rows: HF PEFT writes both."""
    layers = dict(method.layers(host))
    names = {id(layer): path for path, layer in layers.items()}
    found = {}
    for path, layer in layers.items():
        change = layer.changes[method.name]
        if isinstance(change, TiedTokens):
            home = change.home.layer
            table = home.changes[method.name].files[TABLE]
            found[f"{method.file_prefix}{path}.{table}"] = f"{method.file_prefix}{names[id(home)]}.{table}"
    return found


def lora_tokens(method: LayerMethod, host: Site, initialise: bool) -> None:
    """LoRA's `trainable_token_indices`, attached beside its own changes; where that fails, all of it is taken off."""
    config: Any = method.config
    given = config.trainable_token_indices
    if given is None:
        return
    try:
        wanted = token_paths(host, given)
        for ids in wanted.values():
            check_ids("trainable_token_indices", ids)
        tie = bool(getattr(config, "ensure_weight_tying", False))
        attach_tokens(method, host, wanted, initialise, within="token_adapter.", tie=tie)
    except Exception:
        method.detach(host)
        raise
