"""New LoRA adapters out of several: the arithmetic behind `add_weighted_adapter`.

Shapes: each task's tensors are stacked to [tasks, ...]; weights [tasks].

linear: weighted sums of A and of B, each with the square root of weight and scale (so that the product carries both).
cat: ranks side by side, exact: ``sum_i w_i * scale_i * B_i A_i``. svd: that sum, cut to a rank.
TIES (arXiv:2306.01708): keep the largest, elect a sign, average those that agree. DARE (arXiv:2311.03099): drop at
random and rescale. magnitude_prune: keep the largest, then the weighted sum. Each of them with `_svd` mixes the products
``scale_i * B_i A_i`` and cuts the result to a rank.

Of trained rows of tokens [n, H] what differs from the base's rows is mixed in the same way (there are no ranks: `cat` and
`svd` are the sum); a token that a source does not train is the base's there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..errors import AdapterError, ConfigError, nearest
from ..layers import Adapted
from .lora_change import LoraChange
from .tokens import TABLE, TiedTokens, TokenChange

MIXED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # elementwise, of A and of B, or (`_svd`) of their products
KINDS = ("linear", "cat", "svd", *MIXED, *(f"{kind}_svd" for kind in MIXED))


def check_options(
    kind: str, weights: Sequence[float], svd_rank: int | None, svd_clamp: float | None, density: float | None,
    majority_sign_method: str,
) -> None:  # fmt: skip
    """ConfigError for options that cannot be meant."""
    if kind not in KINDS:
        raise ConfigError(f"combination_type={kind!r}: expected one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ConfigError(f"weights={list(weights)!r}: expected finite numbers.")
    if svd_rank is not None and (isinstance(svd_rank, bool) or not isinstance(svd_rank, int) or svd_rank <= 0):
        raise ConfigError(f"svd_rank={svd_rank!r}: expected a whole number above 0.")
    if svd_clamp is not None and not (isinstance(svd_clamp, Real) and 0 <= svd_clamp <= 1):
        raise ConfigError(f"svd_clamp={svd_clamp!r}: expected a quantile, between 0 and 1.")
    if kind not in ("linear", "cat", "svd") and not (isinstance(density, Real) and 0 <= density <= 1):
        raise ConfigError(f"density={density!r}: combination_type={kind!r} needs the kept share, between 0 and 1.")
    if majority_sign_method not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method={majority_sign_method!r}: expected 'total' or 'frequency'.")


def check_layer(path: str, layer: Adapted, sources: Sequence[str], kind: str) -> None:
    """That the sources' updates of one layer can be combined.

    Raises:
        AdapterError: one is not a plain product BA.
        ConfigError: their ranks differ (patterns may do that) where this kind mixes A with A and B with B; ranks that belong
            to groups of channels, where it mixes products.
    """
    own = changes(layer, sources)
    if any(change.dora or change.started for change in own.values()):
        raise AdapterError("Adapters with DoRA, PiSSA or OLoRA are not a plain product BA; merge them one by one instead.")
    if (kind == "cat" or kind.endswith("svd")) and any(change.groups > 1 for change in own.values()):
        raise ConfigError(
            f"combination_type={kind!r}: {path!r} is a convolution of several groups, whose ranks belong to its groups; "
            "choose 'linear', or leave the layer out of the adapters."
        )
    ranks = {n: change.r for n, change in own.items()}
    if kind != "cat" and not kind.endswith("svd") and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{n!r} r={r}" for n, r in ranks.items())
        raise ConfigError(
            f"combination_type={kind!r} needs adapters of one rank, got {listed} in {path!r}; use 'cat' or 'svd'."
        )


def changes(layer: Adapted, names: Sequence[str]) -> dict[str, LoraChange]:
    """What those of the adapters that a layer has do to it."""
    return {n: layer.changes[n] for n in names if n in layer.changes}  # type: ignore[misc]


def parted(layers: dict[str, Adapted], sources: Sequence[str]) -> tuple[dict[str, Adapted], dict[str, Adapted]]:
    """Layers by path: those whose products are combined, and those of which rows of tokens are (what is tied to such a layer
    follows it)."""
    products, tokens = {}, {}
    for path, layer in layers.items():
        own = [layer.changes[n] for n in sources if n in layer.changes]
        rows = [change for change in own if isinstance(change, TokenChange)]
        if not rows:
            products[path] = layer
        elif not all(isinstance(change, TiedTokens) for change in rows):
            tokens[path] = layer
    return products, tokens


def all_ids(layer: Adapted, sources: Sequence[str]) -> list[int]:
    """The tokens of which one of the adapters trains rows at a layer.

    Raises:
        AdapterError: another one changes the layer otherwise.
    """
    own = {n: layer.changes[n] for n in sources if n in layer.changes}
    if others := [n for n, change in own.items() if not isinstance(change, TokenChange)]:
        raise AdapterError(
            f"Adapter {others[0]!r} has a low-rank change of a layer of which another one trains rows of tokens; they "
            "cannot be combined."
        )
    return sorted({token for change in own.values() for token in change.ids})  # type: ignore[attr-defined]


def combine_rows(
    layer: Adapted, target: str, sources: Sequence[str], weights: Sequence[float], kind: str, **options
) -> None:
    """Fill the rows of tokens of adapter `target` at a layer from those of the adapters `sources`."""
    new: TokenChange = layer.changes[target]  # type: ignore[assignment]
    base = new.originals(layer.frozen).float()
    place = {token: i for i, token in enumerate(new.ids)}
    names = [n for n in sources if n in layer.changes]
    tasks = torch.zeros(len(names), *base.shape, device=base.device)
    for task, name in zip(tasks, names, strict=True):
        change: TokenChange = layer.changes[name]  # type: ignore[assignment]
        at = torch.tensor([place[token] for token in change.ids], device=base.device)
        task[at] = change.rows(layer.held(name)).detach().float() - base[at]
    shares = torch.tensor([w for n, w in zip(sources, weights, strict=True) if n in names], device=base.device)
    mixed = mix(tasks, shares, of_whole(kind), **options)
    with torch.no_grad():
        layer.held(target)[TABLE].copy_(base + mixed)


def of_whole(kind: str) -> str:
    """How a kind mixes what is no factor of a product: whole updates, rows, biases."""
    return "linear" if kind in ("cat", "svd") else kind.removesuffix("_svd")


def new_rank(kind: str, layers: Sequence[Adapted], sources: Sequence[str], svd_rank: int | None) -> int:
    """Rank of the combined adapter: that of its largest layer."""
    largest = [max((layer.r[n] for layer in layers if n in layer.changes), default=0) for n in sources]
    return sum(largest) if kind == "cat" else svd_rank if kind.endswith("svd") and svd_rank else max(largest)


def combine(layer: Adapted, target: str, sources: Sequence[str], weights: Sequence[float], kind: str, **options) -> None:
    """Fill adapter `target` of a layer (scale 1) from the adapters `sources` that the layer has (and that are checked)."""
    if isinstance(layer.changes[target], TokenChange):
        if not isinstance(layer.changes[target], TiedTokens):
            combine_rows(layer, target, sources, weights, kind, **options)
        return
    own, factors = changes(layer, [target, *sources]), {}
    for name, change in own.items():
        factors[name] = change.factors(layer.held(name))
    pairs = [(n, w * own[n].scaling) for n, w in zip(sources, weights, strict=True) if n in own]
    a, b = factors[target]
    with torch.no_grad():
        a.zero_()
        b.zero_()
        if kind == "cat":
            new_a = torch.cat([factors[n][0] * w for n, w in pairs], dim=0)
            new_b = torch.cat([factors[n][1] for n, _ in pairs], dim=1)
        elif kind.endswith("svd"):
            tasks = torch.stack([own[n].update(layer.held(n), torch.float32).detach() for n, _ in pairs])
            shares = torch.tensor([w / own[n].scaling for n, w in pairs], device=tasks.device)
            total = mix(tasks, shares, of_whole(kind), **options)
            new_a, new_b = truncated_svd(total, a.shape[0], options.get("svd_clamp"))
            new_a, new_b = new_a.view(-1, *a.shape[1:]), new_b.view(-1, new_b.shape[1], *b.shape[2:])
        else:
            roots = torch.tensor([math.sqrt(abs(w)) for _, w in pairs], device=a.device)
            signs = torch.tensor([math.copysign(1.0, w) for _, w in pairs], device=a.device)
            new_a = mix(torch.stack([factors[n][0] for n, _ in pairs]), roots * signs, kind, **options)
            new_b = mix(torch.stack([factors[n][1] for n, _ in pairs]), roots, kind, **options)
        a[: new_a.shape[0]] = new_a.to(a.dtype)
        b[:, : new_b.shape[1]] = new_b.to(b.dtype)
        if own[target].biased:  # scale 1: what the sources' biases add to the output
            bias = layer.held(target)["lora_B"].bias
            tasks = torch.stack(
                [own[n].own_bias(layer.held(n)) if own[n].biased else torch.zeros_like(bias) for n, _ in pairs]
            )
            shares = torch.tensor([w / own[n].scaling for n, w in pairs], device=tasks.device)
            bias.copy_(mix(tasks, shares, of_whole(kind), **options))


def truncated_svd(matrix: Tensor, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with BA the best approximation of a matrix [out, in]; `clamp` is a quantile."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, vh = u[:, :rank] * s[:rank], vh[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat((u.flatten(), vh.flatten())), clamp)
        u, vh = u.clamp(-limit, limit), vh.clamp(-limit, limit)
    return vh, u


def mix(
    tasks: Tensor, weights: Tensor, kind: str, density: float | None = None, majority_sign_method: str = "total", **_: object
) -> Tensor:
    """One tensor out of [tasks, ...] by "linear" or one of `MIXED`."""
    if kind != "linear" and density is not None:
        tasks = keep_largest(tasks, density) if kind in ("ties", "magnitude_prune") else drop_random(tasks, density)
    weighted = tasks * weights.view(-1, *(1,) * (tasks.dim() - 1)).to(tasks.dtype)
    if kind in ("linear", "dare_linear", "magnitude_prune"):
        return weighted.sum(0)
    agree = tasks.sign() == elected_sign(tasks, majority_sign_method)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def keep_largest(tasks: Tensor, density: float) -> Tensor:
    """Zero all but the share `density` of largest magnitude, task by task."""
    flat = tasks.flatten(1)
    kept = torch.zeros_like(flat).scatter_(1, flat.abs().topk(int(density * flat.shape[1]), dim=1).indices, 1)
    return (flat * kept).view_as(tasks)


def drop_random(tasks: Tensor, density: float) -> Tensor:
    """Keep each value with probability `density`, rescaled by 1/density."""
    if density == 1:
        return tasks
    return torch.stack([task * torch.bernoulli(torch.full_like(task, density)) / density for task in tasks])


def elected_sign(tasks: Tensor, method: str) -> Tensor:
    """+1 or -1 a place: the sign of the sum ("total") or of the count ("frequency")."""
    votes = tasks if method == "total" else tasks.sign()
    return torch.where(votes.sum(0) >= 0, 1, -1)
