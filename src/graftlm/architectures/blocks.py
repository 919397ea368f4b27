"""Where bottleneck adapters attach: the ends of a block's halves, and where its feed-forward half begins."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from .walk import base_modules

# The last linear layers of a block's two halves, and the first of its feed-forward half: the last parts of module names.
_LAYERS = {
    "attention": (
        r"self_attention\.dense|attention\.dense|self_attn\.o_proj|self_attn\.out_proj|attn\.c_proj|attn\.out_proj|"
        r"attention\.o_proj|attention\.out_proj|SelfAttention\.o|attention\.output\.dense|attention\.out_lin|self_attn\.dense"
    ),
    "feed_forward": (
        r"dense_4h_to_h|mlp\.down_proj|fc2|mlp\.c_proj|mlp\.fc_out|DenseReluDense\.wo|(?<!attention\.)output\.dense|"
        r"ffn\.lin2|mlp\.w2|w2"
    ),
    "feed_forward_in": (
        r"dense_h_to_4h|mlp\.gate_up_proj|mlp\.gate_proj|fc1|mlp\.c_fc|mlp\.fc_in|DenseReluDense\.(?:wi|wi_0)|"
        r"intermediate\.dense|ffn\.lin1"
    ),
}
# The halves themselves, as blocks call them: what mixes tokens (attention, or what stands for it in hybrid models), and
# what works on each token. Mixtures of experts have no last linear layer; their whole half is the place.
_FEED_FORWARD = "mlp|feed_forward|feedforward|ff|ffn|ffn_layer|block_sparse_moe|moe"
_HALVES = {
    "attention": "self_attn|self_attention|attention|attn|linear_attn|mamba|conv|short_conv|temporal_block|time_mixer",
    "feed_forward": _FEED_FORWARD,
    "feed_forward_in": _FEED_FORWARD,
}
_EXPERT = re.compile(r"(^|\.)experts?\.")  # an expert sees the tokens that are sent to it, not the rows


def block_sites(base: nn.Module, wanted: Collection[str] = tuple(_LAYERS)) -> dict[str, list[str]]:
    """Module names by kind of place: "attention" and "feed_forward" outputs, "feed_forward_in" inputs, in the base's order.

    A half's last (first) linear layer where families' names tell it, else the half itself: its output (input) is the
    same. A block without a half of a kind (hybrid models have such) has no place of it.

    Raises:
        UnsupportedError: no block has a half of a wanted kind by the names that families use.
    """
    found: dict[str, list[str]] = {site: [] for site in wanted}
    names = [n for n, m in base_modules(base) if not n.endswith(".base_layer") and _counts(m)]
    for site, places in found.items():
        layer = re.compile(rf"(^|\.)(?:{_LAYERS[site]})$")
        half = re.compile(rf"(^|\.)\d+\.(?:{_HALVES[site]})$")
        layers = [n for n in names if layer.search(n) and not _EXPERT.search(n) and _has_weight(base.get_submodule(n))]
        halves = [n for n in names if half.search(n) and not any(inner.startswith(f"{n}.") for inner in layers)]
        chosen = {*layers, *(n for n in halves if n not in layers)}
        places += [n for n in names if n in chosen]
    if missing := [site for site, places in found.items() if not places]:
        raise UnsupportedError(
            f"{type(base).__name__}: cannot find the {' and '.join(missing)} modules of its blocks. "
            "Name them in BottleneckConfig(attention_modules=..., feed_forward_modules=..., feed_forward_input_modules=...)."
        )
    return found


def _counts(module: Any) -> bool:
    return next(module.parameters(), None) is not None


def _has_weight(module: Any) -> bool:
    return getattr(getattr(module, "base_layer", module), "weight", None) is not None
