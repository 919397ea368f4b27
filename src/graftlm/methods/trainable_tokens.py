"""Trainable Tokens: only the rows of some tokens are trained, of the input embeddings and of a head that is tied to them.

``E'[t] = delta[i]`` for the i-th named token t, ``E'[t] = E[t]`` otherwise (see `tokens`). Field names, defaults, maths and
files are HF PEFT's (its `TrainableTokensConfig`); what differs from it:
* the table of the vocabulary is not copied in every pass: only rows of tokens that occur are exchanged;
* what is tied is found by the weight that it shares; a head keeps its bias; a module that never runs (T5's `shared` without
  tied halves) raises;
* merging keeps weights tied; the file holds the rows once, and no embeddings beside them where all new tokens are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..layers import Adapted, Change, Frozen
from .base import PeftType, Site, register
from .fields import also_takes
from .layered import LayerConfig, LayerMethod
from .targets import find_targets
from .tokens import TokenChange, attach_tokens, check_ids, input_name, own_modules, repeated_tokens


@also_takes({"peft_version": ...})
@dataclass(kw_only=True)
class TrainableTokensConfig(LayerConfig):
    """Configuration of Trainable Tokens.

    Args:
        token_indices: the tokens whose rows are trained, each once; their order is that of the file's rows.
        target_modules: embeddings (or heads): module names (endings), or a regular expression over whole names; None is the
            input embeddings, and what is tied to them.
        init_weights: start as the base's rows; False starts at random.
    """

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    own_fields: ClassVar[frozenset[str]] = frozenset({"exclude_modules", "modules_to_save"})  # HF PEFT's has neither
    neutral_fields: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS


class TrainableTokens(LayerMethod):
    """One set of trained tokens in a host."""

    title = "Trainable Tokens"
    kinds = ("linear", "embedding")
    takes = "embeddings and heads"

    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        config: TrainableTokensConfig = self.config  # type: ignore[assignment]
        check_ids("token_indices", config.token_indices)
        if config.target_modules is None:
            config.target_modules = input_name(host, own_modules(host))
        targets = find_targets(host.base, config, skip=(Adapted, *host.container_types))
        try:
            wanted = dict.fromkeys(targets, config.token_indices)
            attach_tokens(self, host, wanted, initialise=not for_loading, from_base=config.init_weights)
        except Exception:
            self.detach(host)
            raise

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        config: TrainableTokensConfig = self.config  # type: ignore[assignment]
        return TokenChange(config.token_indices, config.init_weights)

    def repeated_keys(self, host: Site) -> dict[str, str]:
        return repeated_tokens(self, host)


register(PeftType.TRAINABLE_TOKENS, TrainableTokensConfig, TrainableTokens)
