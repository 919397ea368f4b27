"""A step of a Llama-like decoder as one function over its layers, without its modules' calls: Llama, Mistral, Qwen2, Qwen3.

Products that read the same are made in one. Numbers are those of the modules up to rounding; whoever uses this tries it out
first, and asks before each step whether the base is still `unchanged` and `free`: a stranger's hook would not be called.

Shapes: N tokens, H hidden size, Q query and G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import product
from ..kernels.packed import Joint, block_product
from ..routing import Attention
from .gated import plain
from .walk import base_modules, innermost

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: what is beside a product: writes into y [N, out], x [N, in]
Acts = Callable[[Tensor, Tensor], None]
#: the same for a whole step, by layer and site
Beside = Mapping[tuple[int, str], Sequence[Acts]]


class Site:
    """Linear layers that read the same and are computed in one.

    Attributes:
        modules: as they stand in the base, adapters and all.
        columns: of the joint output, each one's.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.layers: list[Any] = [innermost(module) for module in modules]
        ends = torch.tensor([layer.weight.shape[0] for layer in self.layers]).cumsum(0).tolist()
        self.columns = [slice(end - layer.weight.shape[0], end) for layer, end in zip(self.layers, ends, strict=True)]
        self.biased = self.layers[0].bias is not None
        self.joint = Joint()

    def usable(self) -> bool:
        """Whether all are plain linear layers of one dtype, with a bias each or none."""
        first = self.layers[0]
        return all(
            plain(type(layer)) is nn.Linear
            and type(layer.weight) is nn.Parameter
            and layer.weight.dtype is first.weight.dtype
            and layer.weight.device == first.weight.device
            and (layer.bias is None) == (first.bias is None)
            for layer in self.layers
        )

    def __call__(self, x: Tensor, beside: Sequence[Acts] = ()) -> Tensor:
        """x [N, in] -> [N, out], in memory of its own, what is `beside` included."""
        layers = self.layers
        biases = [layer.bias for layer in layers] if self.biased else []
        blocks = self.joint.of([layer.weight for layer in layers])
        if blocks is not None and x.dtype is blocks.dtype:
            y = block_product(x, blocks, torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None)
        elif len(layers) == 1:
            y = product(x, layers[0].weight, layers[0].bias)
        else:
            y = torch.cat([product(x, layer.weight, layer.bias) for layer in layers], dim=1)
        for act in beside:
            act(y, x)
        return y


@dataclass(frozen=True)
class Layer:
    """One layer's parts.

    Args:
        values: heads of values, and of keys.
        head_norms: of queries and of keys; none in most families.
        norms: before the attention and before the MLP.
    """

    sites: dict[str, Site]
    norms: tuple[Any, Any]
    head_norms: tuple[Any, ...]
    activation: Any
    size: int
    values: int
    scale: float


class Lean:
    """The form of one base as it stands.

    Args:
        base: with a head.
        own: hooks that need not be called, each by its dictionary's id and its key there.
    """

    def __init__(self, base: Any, own: Collection[tuple[int, int]] = ()) -> None:
        self.base = base
        self.backbone = base.model
        self.layers = [self._layer(block) for block in self.backbone.layers[: base.config.num_hidden_layers]]
        called = [self.backbone.embed_tokens, self.backbone.rotary_emb, self.backbone.norm, base.get_output_embeddings()]
        called += [m for layer in self.layers for m in (layer.activation, *layer.head_norms)]
        inside = {id(m) for module in called for m in module.modules()}
        self._watched: list[Any] = [m for _, m in base_modules(base) if id(m) not in inside]
        self._tables = [m.__dict__[name] for m in self._watched for name in _HOOKS]
        self._sizes = [len(table) for table in self._tables]
        self._children = [(m._modules, list(m._modules.values())) for m in self._watched]
        self.strange = any((id(table), key) not in own for table in self._tables for key in table)
        self._plain_norms = {id(norm) for layer in self.layers for norm in layer.norms if _is_plain(norm)}

    @staticmethod
    def _layer(block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        sites = {
            "qkv": Site([attention.q_proj, attention.k_proj, attention.v_proj]), "o": Site([attention.o_proj]),
            "gate_up": Site([mlp.gate_proj, mlp.up_proj]), "down": Site([mlp.down_proj]),
        }  # fmt: skip
        size = attention.head_dim
        return Layer(
            sites, (block.input_layernorm, block.post_attention_layernorm),
            (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else (),
            mlp.act_fn, size, sites["qkv"].layers[1].weight.shape[0] // size, attention.scaling,
        )  # fmt: skip

    def unchanged(self) -> bool:
        """Whether the base consists of the modules, with the hooks, that it had."""
        return [len(table) for table in self._tables] == self._sizes and all(
            list(now.values()) == before for now, before in self._children
        )

    def free(self) -> bool:
        """Whether no hook, no forward of a stranger and no autocast would be passed over."""
        everyones = vars(nn.modules.module)
        return (
            not self.strange
            and not any("forward" in m.__dict__ for m in self._watched)
            and not any(everyones[f"_global{name}"] for name in _HOOKS)
            and not torch.is_autocast_enabled(self.layers[0].sites["o"].layers[0].weight.device.type)
        )

    def __call__(self, ids: Tensor, places: Tensor, attention: Attention, last: Tensor, beside: Beside) -> Tensor:
        """Hidden states [R, H] that reach the head, of the tokens `last` [R] of ids [N] at `places` [N]."""
        x = self.backbone.embed_tokens(ids[None])[0]
        cos, sin = (t[0][:, None] for t in self.backbone.rotary_emb(x[None], position_ids=places[None]))
        half = cos.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)  # the turned half's sign
        for index, layer in enumerate(self.layers):
            qkv, o, gate_up, down = ((site, beside.get((index, name), ())) for name, site in layer.sites.items())
            z = qkv[0](self._norm(layer.norms[0], x), qkv[1])
            x = x + o[0](self._attend(layer, z, cos, sin, half, attention, index), o[1])
            gate, up = gate_up[0](self._norm(layer.norms[1], x), gate_up[1]).chunk(2, dim=1)
            x = x + down[0](layer.activation(gate) * up, down[1])
        return self.backbone.norm(x[last][None])[0]

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        if x.dtype is torch.float32 and id(norm) in self._plain_norms:
            return F.rms_norm(x, x.shape[1:], norm.weight, norm.variance_epsilon)
        return norm(x[None])[0]

    def _attend(
        self, layer: Layer, z: Tensor, cos: Tensor, sin: Tensor, half: int, attention: Attention, index: int
    ) -> Tensor:
        """z [N, (Q + 2 G) D] -> [N, Q D]."""
        z = z.view(len(z), -1, layer.size)
        turned, v = z[:, : -layer.values], z[:, -layer.values :]
        if layer.head_norms:
            parts = turned[:, : -layer.values], turned[:, -layer.values :]
            turned = torch.cat([norm(part[None])[0] for norm, part in zip(layer.head_norms, parts, strict=True)], dim=1)
        turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin).transpose(0, 1)
        q, k = turned[: -layer.values], turned[-layer.values :]
        return attention.attend(q, k, v.transpose(0, 1), index, layer.scale).reshape(len(z), -1)


def _is_plain(norm: Any) -> bool:
    """Whether a norm is its family's own, untouched."""
    hooked = any(norm.__dict__[name] for name in _HOOKS) or "forward" in norm.__dict__
    return not hooked and plain(type(norm)).__name__.endswith("RMSNorm") and isinstance(norm.variance_epsilon, float)


def lean(base: Any, own: Collection[tuple[int, int]] = ()) -> Lean | None:
    """The form of a base; None for a family without, and for layers that are no plain linear ones."""
    kind = getattr(getattr(base, "config", None), "model_type", "")
    backbone: Any = getattr(base, "model", None)
    if kind not in FAMILIES or not hasattr(backbone, "layers") or base.get_output_embeddings() is None:
        return None
    home = f"transformers.models.{kind}.modeling_{kind}"
    kinds = {plain(type(m)) for block in backbone.layers for m in (block, block.self_attn, block.mlp)}
    if {k.__module__ for k in (*kinds, type(base), type(backbone))} != {home} or len(kinds) != 3:
        return None
    found = Lean(base, own)
    sites = [site for layer in found.layers for site in layer.sites.values()]
    return found if all(site.usable() for site in sites) else None
