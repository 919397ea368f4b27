"""A step of a decoder as one function over its layers, without its modules' calls, for families described in `decoders`.

Products that read the same are made in one. Numbers are those of the modules up to rounding; whoever uses this tries it out
first, and asks before each step whether the base is still `unchanged` and `free`: a stranger's hook would not be called.

Shapes: N tokens, H hidden size, Q query and G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import activations
from transformers.pytorch_utils import Conv1D

from ..kernels.blocks import Form
from ..kernels.linear import product
from ..kernels.packed import Joint, openings
from ..routing import StepAttention
from .decoders import Decoder, decoder, part
from .gated import plain
from .walk import base_modules, innermost

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_version = attrgetter("_version")

#: what is beside a product: writes into y [N, out], x [N, in]
Acts = Callable[[Tensor, Tensor], None]
#: the same for a whole step, by layer and site
Beside = Mapping[tuple[int, str], Sequence[Acts]]
#: cosines and signed sines [N, 1, D] of the tokens' places, and how far a half is
Turn = tuple[Tensor, Tensor, int]


class Site:
    """Linear layers that read the same and are computed in one.

    Attributes:
        modules: as they stand in the base, adapters and all.
        columns: of the joint output, each one's.
        form, bias: all weights and biases together as they last were, for the processor; None where nobody keeps them.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.layers: list[Any] = [innermost(module) for module in modules]
        self.turned = [plain(type(layer)) is Conv1D for layer in self.layers]  # weights that lie [in, out]
        sizes = [layer.weight.shape[turned] for layer, turned in zip(self.layers, self.turned, strict=True)]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.columns = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.joint = Joint()
        self.form: Form | None = None
        self.bias: Tensor | None = None

    def usable(self) -> bool:
        """Whether all are plain linear layers of one dtype, with a bias each or none."""
        first = self.layers[0]
        return all(
            plain(type(layer)) in (nn.Linear, Conv1D)
            and type(layer.weight) is nn.Parameter
            and layer.weight.dtype is first.weight.dtype
            and layer.weight.device == first.weight.device
            and (layer.bias is None) == (first.bias is None)
            for layer in self.layers
        )

    def take(self) -> list[tuple[dict, str]]:
        """Take up what is kept of the weights now; where the parameters stand that it was made of."""
        self.form, self.bias = self.joint.of([layer.weight for layer in self.layers]), None
        if self.form is None:
            return []
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self.bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
        return [(m._parameters, name) for m in self.layers for name, p in m._parameters.items() if p is not None]

    def __call__(self, x: Tensor, beside: Sequence[Acts]) -> Tensor:
        """x [N, in] -> [N, out], in memory of its own, what is `beside` included."""
        if self.form is not None and x.dtype is self.form.dtype:
            y = self.form(x, self.bias)
        else:
            layers = zip(self.layers, self.turned, strict=True)
            parts = [product(x, layer.weight.t() if turned else layer.weight, layer.bias) for layer, turned in layers]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        for act in beside:
            act(y, x)
        return y


class Norm:
    """A norm: by itself where it is its family's own, untouched; else by its module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        kind = plain(type(module))
        touched = any(module.__dict__[name] for name in _HOOKS) or "forward" in module.__dict__
        epsilon = getattr(module, "variance_epsilon", None)
        self.layer = kind is nn.LayerNorm and not touched
        self.rms = kind.__name__.endswith("RMSNorm") and isinstance(epsilon, float) and not touched
        self.epsilon = epsilon if self.rms else None

    def __call__(self, x: Tensor, wide: Tensor | None) -> Tensor:
        """x [N, H], and the same with its epsilon beside it (see `widened`); the result is new memory."""
        module: Any = self.module
        if self.layer:
            return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
        if not self.rms or x.dtype is not torch.float32 or module.weight.dtype is not torch.float32:
            return module(x[None])[0]
        if wide is None:
            return F.rms_norm(x, x.shape[1:], module.weight, module.variance_epsilon)
        length = torch.linalg.vector_norm(wide, 2, -1, True)  # sqrt(H) times what x is divided by: see `widened`
        return torch.addcdiv(_ZERO, x, length, value=x.shape[1] ** 0.5).mul_(module.weight)


_ZERO = torch.zeros(())
_FEW = 64  # rows of which columns are taken faster one by one than rolled
_silu: Any = torch.ops.aten.silu.default


def widened(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x [N, H] within [N, H + 1], whose last column makes an RMSNorm's root a vector's length: sum(x^2) + H epsilon. Torch's
    own RMSNorm is nine calls on a CPU; of this three are left."""
    wide = x.new_full((x.shape[0], x.shape[1] + 1), (x.shape[1] * epsilon) ** 0.5)
    inner = wide[:, :-1]
    return inner.copy_(x), wide


@dataclass(frozen=True)
class Layer:
    """One layer's parts.

    Args:
        sites: by "qkv", "o", "up", "down".
        norms: before the attention and before the MLP.
        head_norms: of queries and of keys; none in most families.
        heads, values: heads of queries; of keys, and of values.
        by_head: whether qkv lies head by head.
        size: D.
        turned: columns of qkv whose queries and keys have their halves exchanged [(Q + G) D].
    """

    sites: dict[str, Site]
    norms: tuple[Norm, Norm]
    head_norms: tuple[Any, ...]
    activation: Any
    heads: int
    values: int
    by_head: bool
    size: int
    scale: float
    turned: Tensor

    def split(self, joint: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """joint [N, (Q + 2 G) D] -> q [Q, N, D], k and v [G, N, D], and these two where they lie side by side [N, 2 G, D];
        all in its memory."""
        count = joint.shape[0]
        if self.by_head:
            return *joint.view(count, self.heads, 3, self.size).transpose(0, 1).unbind(2), None  # type: ignore[return-value]
        z = joint.view(count, -1, self.size)
        for norm, first, count in zip(self.head_norms, (0, self.heads), (self.heads, self.values), strict=False):
            part = z[:, first : first + count]
            part.copy_(norm(part[None])[0])
        if turn is not None:
            cos, sin, half = turn
            turned = z[:, : self.heads + self.values]
            if count <= _FEW:
                other = joint.index_select(1, self.turned).view(turned.shape)
            else:
                other = turned.roll(half, -1)
            turned.mul_(cos).addcmul_(other, sin)
        q, k, v = z.transpose(0, 1).split_with_sizes((self.heads, self.values, self.values))
        return q, k, v, z[:, self.heads :]

    def activated(self, z: Tensor) -> Tensor:
        """What is between the MLP's two products."""
        if len(self.sites["up"].modules) == 1:
            return self.activation(z)
        size = z.shape[1] // 2
        gate, up = z.split_with_sizes((size, size), 1)
        return _silu(gate).mul_(up) if self.activation is F.silu else self.activation(gate) * up


class Lean:
    """The form of one base as it stands.

    Args:
        base: with a head.
        family: its description.
        own: hooks that need not be called, each by its dictionary's id and its key there.

    Attributes:
        called: modules that a step calls as they stand, adapters and all.
    """

    def __init__(self, base: Any, family: Decoder, own: Collection[tuple[int, int]] = ()) -> None:
        self.base = base
        self.embed, self.norm = part(base, family.embed), part(base, family.norm)
        self.embed_norm = None if family.embed_norm is None else part(base, family.embed_norm)
        self.rotary = None if family.rotary is None else part(base, family.rotary)
        table, self.first = (None, 0) if family.positions is None else family.positions
        self.positions = None if table is None else part(base, table)
        self.layers = [_layer(block, family) for block in part(base, family.layers)[: base.config.num_hidden_layers]]
        epsilons = {norm.epsilon for layer in self.layers for norm in layer.norms if norm.rms}
        self.epsilon = epsilons.pop() if len(epsilons) == 1 else None
        self.called = [self.embed, self.norm, base.get_output_embeddings(), self.embed_norm, self.rotary]
        self.called += [m for layer in self.layers for m in (layer.activation, *layer.head_norms)]
        self.called = [m for m in self.called if isinstance(m, nn.Module)]
        inside = {id(m) for module in self.called for m in module.modules()}
        self._watched: list[Any] = [m for _, m in base_modules(base) if id(m) not in inside]
        self._own = [vars(m) for m in self._watched]
        self._tables = [m.__dict__[name] for m in self._watched for name in _HOOKS]
        self._sizes = [len(table) for table in self._tables]
        self._handles = RemovableHandle.next_id
        self._held = [m._modules for m in self._watched if m._modules]
        self._children = [dict(held) for held in self._held]
        self.strange = any((id(table), key) not in own for table in self._tables for key in table)
        self._taken: list[Any] = []  # what sites have taken up, as it then was
        self._read: tuple[Sequence[dict], Sequence[str]] = (), ()  # and where it stands

    def unchanged(self) -> bool:
        """Whether the base consists of the modules, with the hooks, that it had."""
        # thousands of them at every step: no loop of ours, and none where nobody has registered a hook since
        if self.strange or RemovableHandle.next_id != self._handles:
            if [*map(len, self._tables)] != self._sizes:
                return False
            self._handles = RemovableHandle.next_id
        return self._held == self._children

    def free(self) -> bool:
        """Whether no hook, no forward of a stranger and no autocast would be passed over."""
        everyones = vars(nn.modules.module)
        return (
            not self.strange
            and not any(map(contains, self._own, repeat("forward")))
            and not any(everyones[f"_global{name}"] for name in _HOOKS)
            and not torch.is_autocast_enabled(self.layers[0].sites["o"].layers[0].weight.device.type)
        )

    def usable(self) -> bool:
        """Whether the parts are such as a step knows."""
        sites = [site for layer in self.layers for site in layer.sites.values()]
        positions = innermost(self.positions) is self.positions  # no adapter of theirs would be called
        return positions and all(site.usable() for site in sites)

    def __call__(self, ids: Tensor, places: Tensor, attention: StepAttention, last: Tensor, beside: Beside) -> Tensor:
        """Hidden states [R, H] that reach the head, of the tokens `last` [R] of ids [N] at `places` [N]."""
        self._take()
        x = self._enter(ids, places)
        turn, wide = self._turn(x, places), None
        if self.epsilon is not None and x.dtype is torch.float32 and x.device.type == "cpu":
            x, wide = widened(x, self.epsilon)
        else:
            x = x.clone()  # hooks of the embeddings may have kept it
        for index, layer in enumerate(self.layers):
            qkv, o, up, down = ((site, beside.get((index, name), ())) for name, site in layer.sites.items())
            q, k, v, both = layer.split(qkv[0](layer.norms[0](x, wide), qkv[1]), turn)
            y = attention.attend(q, k, v, index, layer.scale, both=both).reshape(x.shape[0], -1)
            x += o[0](y, o[1])
            y = layer.activated(up[0](layer.norms[1](x, wide), up[1]))
            x += down[0](y, down[1])
        return self.norm(x[last][None])[0]

    def _take(self) -> None:
        """Take up weights that were exchanged, written into or packed since the last step."""
        if self._stand() != self._taken:
            places = [place for layer in self.layers for site in layer.sites.values() for place in site.take()]
            self._read = tuple(zip(*places, strict=True)) if places else ((), ())  # type: ignore[assignment]
            self._taken = self._stand()

    def _stand(self) -> list[Any]:
        kept = [*map(dict.__getitem__, *self._read)]
        return [openings(), *map(Tensor.data_ptr, kept), *map(_version, kept)]

    def _enter(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.embed(ids[None])[0]
        if self.positions is not None:
            x = x + F.embedding(places + self.first, self.positions.weight)
        return x if self.embed_norm is None else self.embed_norm(x[None])[0]

    def _turn(self, x: Tensor, places: Tensor) -> Turn | None:
        if self.rotary is None:
            return None
        cos, sin = (t[0][:, None] for t in self.rotary(x[None], position_ids=places[None]))
        half = cos.shape[-1] // 2
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1), half  # the turned half's sign


def _layer(block: Any, family: Decoder) -> Layer:
    names = {"qkv": family.qkv, "o": (family.o,), "up": family.up, "down": (family.down,)}
    sites = {site: Site([part(block, name) for name in own]) for site, own in names.items()}
    attention, columns = part(block, family.attention), sites["qkv"].columns
    size, width = attention.head_dim, columns[-1].stop
    values = (width // 3 if len(columns) == 1 else columns[1].stop - columns[1].start) // size
    head_norms = [part(block, name) for name in family.head_norms or ()]
    first, second = (Norm(part(block, name)) for name in family.norms)
    return Layer(
        sites=sites, norms=(first, second), head_norms=tuple(m for m in head_norms if m is not None),
        activation=_activation(part(block, family.activation)), heads=width // size - 2 * values, values=values,
        by_head=family.by_head, size=size, scale=getattr(attention, family.scale),
        turned=_exchanged(0 if family.rotary is None else columns[-1].stop - values * size, size, sites["o"]),
    )  # fmt: skip


def _exchanged(width: int, size: int, beside: Site) -> Tensor:
    """Columns up to `width` with the halves of each head exchanged."""
    columns = torch.arange(width, device=beside.layers[0].weight.device)
    return columns.view(-1, 2, size // 2).flip(1).flatten()


def _activation(module: Any) -> Any:
    """A module, or the function that it calls."""
    silu = plain(type(module)) in (nn.SiLU, activations.SiLUActivation) and not any(module.__dict__[n] for n in _HOOKS)
    return F.silu if silu and "forward" not in module.__dict__ else module


def lean(base: Any, own: Collection[tuple[int, int]] = ()) -> Lean | None:
    """The form of a base; None for a family without, and for layers that are no plain linear ones."""
    family = decoder(base)
    found = None if family is None else Lean(base, family, own)
    return found if found is not None and found.usable() else None
