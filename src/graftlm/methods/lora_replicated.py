"""`layer_replication`: a deeper model out of a base's own blocks; their copies share weights and have adapters of their own.

    [[0, 4], [2, 5]]   blocks 0 1 2 3 2 3 4     (each pair: from, up to but not with)

What differs from HF PEFT: blocks are found in every decoder-only or encoder-only model of transformers; `layer_types` of the
configuration follow; when the last adapter that needs it goes, the base is as it was. Such adapters cannot be merged
(copies that share a weight would each need their own).
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..architectures import base_modules, is_encoder_decoder, replace_module
from ..errors import ConfigError, UnsupportedError
from .base import Site


class Replicated:
    """A base whose blocks are replicated.

    Args:
        base: the base.
        pairs: from and up to, of blocks.
    """

    def __init__(self, base: Any, pairs: list[list[int]]) -> None:
        self.pairs = pairs
        self.users: list[int] = []  # adapters (by the identity of their `Method`) that need it
        self.path, self.blocks = blocks_of(base)
        count = len(self.blocks)
        for start, end in pairs:
            if not 0 <= start < end <= count:
                raise ConfigError(
                    f"layer_replication={pairs!r}: [{start}, {end}] is no range of this model's {count} blocks; expected "
                    f"[from, up to] with 0 <= from < up to <= {count}."
                )
        order = [i for start, end in pairs for i in range(start, end)]
        replace_module(base, self.path, nn.ModuleList(replica(self.blocks[i], at) for at, i in enumerate(order)))
        text = base.config.get_text_config()
        self.before = {name: getattr(text, name) for name in ("num_hidden_layers", "layer_types") if hasattr(text, name)}
        text.num_hidden_layers = len(order)
        if isinstance(self.before.get("layer_types"), list):
            text.layer_types = [self.before["layer_types"][i] for i in order]

    def undo(self, base: Any) -> None:
        """The base as it was."""
        replace_module(base, self.path, self.blocks)
        for name, value in self.before.items():
            setattr(base.config.get_text_config(), name, value)


_REPLICATED: WeakKeyDictionary[nn.Module, Replicated] = WeakKeyDictionary()


def replicate(host: Site, method: Any, pairs: list[list[int]]) -> None:
    """Replicate the base's blocks for an adapter, where another one has not done so alike.

    Raises:
        ConfigError: the base is replicated otherwise, or has adapters already.
    """
    found = _REPLICATED.get(host.base)
    if found is not None and found.pairs != pairs:
        raise ConfigError(
            f"layer_replication={pairs!r}: an adapter of this base has {found.pairs!r} already; they must be alike."
        )
    if found is None:
        inside = blocks_of(host.base)[1].modules()
        if host.methods or any(hasattr(m, "base_layer") or hasattr(m, "original_module") for m in inside):
            raise ConfigError(
                "layer_replication changes the base's blocks, which have adapters (or modules_to_save) already: the adapter "
                "with it must be the first one."
            )
        found = _REPLICATED[host.base] = Replicated(host.base, pairs)
    found.users.append(id(method))


def release(host: Site, method: Any) -> None:
    """Take an adapter's need for the replicated blocks back; the last one's leaves the base as it was."""
    found = _REPLICATED.get(host.base)
    if found is None or id(method) not in found.users:
        return
    found.users.remove(id(method))
    if not found.users:
        found.undo(_REPLICATED.pop(host.base) and host.base)


def blocks_of(base: Any) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and its dotted path."""
    if is_encoder_decoder(base):
        raise UnsupportedError(
            "layer_replication is for decoder-only and encoder-only models, which have one list of blocks."
        )
    count = getattr(getattr(getattr(base, "config", None), "get_text_config", dict)(), "num_hidden_layers", None)
    for path, module in base_modules(base):
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UnsupportedError(
        f"layer_replication: {type(base).__name__} has no list of {count} blocks that could be replicated."
    )


def replica(block: nn.Module, index: int) -> nn.Module:
    """A copy of a block that shares its weights and is at another place."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    states = (vars(module).get("state") for module in block.modules())
    shared |= {id(s): s for s in states if type(s).__name__ == "MatmulLtState"}  # bitsandbytes' int8 weights go over to it
    made = copy.deepcopy(block, shared)
    for module in made.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index  # type: ignore[assignment]
    return made
