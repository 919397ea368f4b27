"""EVA (arXiv:2410.07170): A starts as the directions along which a layer's inputs vary most, and ranks go where they explain
most. B = 0, so that the base is as it was.

    model = get_peft_model(base, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)))
    initialize_lora_eva_weights(model, dataloader)

Shapes: X [n, in] the tokens that come to a layer, less their mean; A [r, in] its first r right-singular vectors, found batch
by batch (incremental PCA). Each layer has up to rho r directions; of all layers' the r L with the largest share of explained
variance are taken, which gives the ranks.

What differs from HF PEFT: nothing is gathered from other processes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..architectures import replace_module
from ..errors import AdapterError, ConfigError, UnsupportedError
from ..layers import Adapted, adapted_layers
from ..modes import evaluating
from .lora_change import LoraChange
from .lora_data_init import hooks_on
from .targets import find_targets, pattern_value


class RunningPca:
    """The first k principal directions of rows that come in batches (incremental PCA, Ross et al. 2008)."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.count = 0
        self.total: Any = 0.0  # summed squared distances from the mean
        self.mean: Tensor | None = None
        self.components: Tensor | None = None  # [k, in]
        self.values: Tensor | None = None  # singular values [k]
        self.explained: Tensor | None = None  # share of the variance [k]

    def update(self, rows: Tensor) -> None:
        """Take in rows [n, in]."""
        n, count = len(rows), self.count
        mean = rows.double().mean(0)
        self.total = self.total + (rows.double() - mean).square().sum()
        if self.mean is None:
            stacked = (rows - mean).to(rows.dtype)
            self.mean = mean
        else:
            assert self.values is not None
            assert self.components is not None
            shift = self.mean - mean
            self.total = self.total + count * n / (count + n) * shift.square().sum()
            correction = (count / (count + n) * n) ** 0.5 * shift
            stacked = torch.vstack((self.values[:, None] * self.components, rows - rows.mean(0), correction))
            self.mean = (count * self.mean + n * mean) / (count + n)
        self.count = count + n
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(42)
            _, s, v = torch.svd_lowrank(stacked, q=2 * self.k, niter=4)
        largest = v.abs().argmax(0)
        v = v * v[largest, range(v.shape[1])].sign()  # signs that do not depend on the decomposition
        self.components, self.values = v.T[: self.k], s[: self.k]
        self.explained = (s.square() / self.total)[: self.k]


class Layer:
    """What is found for one layer, and for those that get the same inputs."""

    def __init__(self, name: str, k: int, tau: float, prepare: Callable | None) -> None:
        self.name, self.tau = name, tau
        self.pca = RunningPca(k)
        self.prepare = prepare or flattened
        self.converged = torch.zeros(k, dtype=torch.bool)
        self.done = False
        self.seen: Any = None  # what `prepare_model_inputs_fn` made of the batch

    def see(self, module: Any, args: tuple, output: Any) -> None:
        """Forward hook."""
        if self.done:
            return
        rows = self.prepare(args, self.seen, self.name)
        if len(rows) < self.pca.k:
            print(f"skipping SVD for {self.name} because there are less than {self.pca.k} examples")
            return
        before = self.pca.components
        self.pca.update(rows.detach().float())
        if before is not None:
            self.converged = torch.cosine_similarity(self.pca.components, before) >= self.tau  # type: ignore[arg-type]

    def check(self, rank: int) -> None:
        """Whether it need not look at the next batch."""
        converged = bool(self.converged[:rank].all())
        self.done = converged


def flattened(args: Any, seen: Any, name: str) -> Tensor:
    """All rows that come to a layer [n, in]."""
    x = args[0] if isinstance(args, (tuple, list)) else args
    return x.flatten(0, -2)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Places of the tokens that count: not padding, and, by `use_label_mask`, those with a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    settings = peft_config.eva_config
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The inputs of these tokens [n, in]."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x[model_input.T.unbind()]


def forward_fn_dict(model: Any, inputs: Any) -> Any:
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Any,
    peft_config: Any = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """EVA's start of every layer that the configuration names: A0 [rank, in] by the layer's name in `model`.

    Args:
        model: a base, with `peft_config`, or a wrapper with the adapter attached.
        dataloader: batches, which are run through again and again until the directions stand still.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: (batch, config) -> what `prepare_layer_inputs_fn` gets of the batch.
        prepare_layer_inputs_fn: (layer's inputs, that, layer's name) -> rows [n, in]; one function, or one a layer.
        gather_distributed_inputs, show_progress_bar: HF PEFT's; without meaning here.
    """
    wrapped = hasattr(model, "peft_config")
    config = model.peft_config[adapter_name] if wrapped and peft_config is None else peft_config
    if config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    if not len(dataloader):
        raise ConfigError("dataloader is empty")
    if gather_distributed_inputs and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UnsupportedError("EVA gathers nothing from other processes; find its start in one, and pass eva_state_dict.")
    if wrapped:
        layers: dict[str, Any] = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, Adapted) and adapter_name in m.changes and m.frozen.kind == "linear"
        }
        with model.disable_adapter():
            return Search(model, layers, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn).run(
                dataloader
            )
    layers = {n: m for n, m in find_targets(model, config).items() if isinstance(m, (nn.Linear, Conv1D))}
    return Search(model, layers, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn).run(dataloader)


class Search:
    """The passes over data that find the directions of all layers."""

    def __init__(
        self, model: Any, modules: dict[str, Any], config: Any, forward: Callable, of_batch: Callable | None, of_layer: Any
    ) -> None:
        self.model, self.modules, self.config = model, modules, config
        self.forward, self.of_batch = forward, of_batch
        self.device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)
        by_layer = isinstance(of_layer, Mapping)
        if by_layer and (unknown := sorted(of_layer.keys() - modules.keys())):
            raise ConfigError(
                "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                + ", ".join(unknown)
            )
        self.prepare = {name: of_layer.get(name) if by_layer else of_layer for name in modules}
        ranks = {name: pattern_value(config.rank_pattern, name, config.r) for name in modules}
        rho = config.eva_config.rho
        if rho > 1000:
            rho = min(rho, max(max(p.shape) for p in model.parameters() if p.dim()) // config.r)
        self.budget = sum(ranks.values())
        self.most = {name: round(r * rho) for name, r in ranks.items()}

    def run(self, loader: Iterable) -> dict[str, Tensor]:
        with evaluating(self.model):
            lead = self.same_inputs(next(iter(loader)))
            for name, first in lead.items():
                self.most[first] = max(self.most[first], self.most[name])
            self.most = {name: self.most[lead[name]] for name in self.modules}
            tau = self.config.eva_config.tau
            layers = {n: Layer(n, self.most[n], tau, self.prepare[n]) for n in self.modules if lead[n] == n}
            ranks = dict(self.most)
            with hooks_on({self.modules[n]: layer.see for n, layer in layers.items()}):
                for batch in cycle(loader):
                    batch = self.moved(batch)
                    seen = self.of_batch(batch, self.config) if self.of_batch else batch
                    for name, layer in layers.items():
                        layer.check(ranks[name])
                        layer.seen = seen
                    if all(layer.done for layer in layers.values()):
                        break
                    self.forward(self.model, batch)
                    if all(layer.pca.components is not None for layer in layers.values()):
                        ranks = self.shared_out(layers, lead)
        made = {}
        for name in self.modules:
            pca = layers[lead[name]].pca
            a: Any = pca.components[: ranks[name]]  # type: ignore[index]
            if self.config.eva_config.whiten:
                a = a / pca.values[: ranks[name]].sqrt()[:, None]  # type: ignore[index]
            made[name] = a.to(self.device)
        return made

    def same_inputs(self, batch: Any) -> dict[str, str]:
        """For each layer the first one that gets the same inputs."""
        batch = self.moved(batch)
        seen = self.of_batch(batch, self.config) if self.of_batch else batch
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            def see(module: Any, args: tuple, output: Any) -> None:
                found.setdefault(name, (self.prepare[name] or flattened)(args, seen, name))

            return see

        with hooks_on({module: keep(name) for name, module in self.modules.items()}):
            self.forward(self.model, batch)
        first: dict[bytes, str] = {}
        return {
            name: first.setdefault(found[name].detach().float().cpu().contiguous().numpy().tobytes(), name)
            for name in self.modules
        }

    def shared_out(self, layers: dict[str, Layer], lead: dict[str, str]) -> dict[str, int]:
        """The rank of each layer: of all directions those that explain most, as many as the budget has."""
        names = [*layers, *(n for n in self.modules if n not in layers)]
        shares: list[Any] = [(n, share) for n in names for share in layers[lead[n]].pca.explained]  # type: ignore[union-attr]
        order = torch.stack([share for _, share in shares]).argsort(descending=True)
        counts = Counter(shares[i][0] for i in order[: self.budget].tolist())
        ranks = {name: counts.get(name, 0) for name in names}
        for name in names:  # a layer whose directions others use has the most of them
            if ranks[lead[name]] < ranks[name]:
                ranks[lead[name]], ranks[name] = ranks[name], ranks[lead[name]]
        return ranks

    def moved(self, batch: Any) -> Any:
        """A batch on the model's device."""
        if hasattr(batch, "to"):
            return batch.to(self.device)
        if isinstance(batch, Mapping):
            return type(batch)({k: self.moved(v) for k, v in batch.items()})  # type: ignore[call-arg]
        if isinstance(batch, (tuple, list)):
            return type(batch)(self.moved(v) for v in batch)
        return batch


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Any = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an attached adapter EVA's start: ranks, alphas and A. Layers whose rank becomes 0 are left out.

    Args:
        model: a `PeftModel` whose adapter has `init_lora_weights="eva"`.
        dataloader: see `get_eva_state_dict`, as for the rest; or `eva_state_dict`, what that gave.
    """
    if not hasattr(model, "peft_config"):
        raise ConfigError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise AdapterError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    model._known(adapter_name)
    config = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    start = {name.removeprefix("base_model.model."): a for name, a in eva_state_dict.items()}
    give_start(model, adapter_name, start)


def give_start(host: Any, name: str, start: dict[str, Tensor]) -> None:
    """Ranks and A0 [rank, in] by a layer's name in the bare base, into an adapter."""
    method = host.methods[name]
    config = method.config
    layers = dict(method.layers(host))
    places = {layer: path for path, layer in adapted_layers(host.base, host.switch)}
    ranks, alphas, kept, missing = {}, {}, [], []
    for path, layer in layers.items():
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        a = start.get(path)
        if a is None:
            missing.append(path)
        elif len(a) != r:
            alpha = alpha * len(a) / r if config.eva_config.adjust_scaling_factors and len(a) else alpha
            r = len(a)
        if r == 0:
            layer.remove(name)
            if not layer.changes:
                replace_module(host.base, places[layer], layer.leave_place())
            continue
        if a is not None:
            if r != layer.changes[name].r:
                layer.remove(name)
                layer.add(name, LoraChange(config, r, alpha), host.adapter_dtype(layer.frozen.layer))
            layer.changes[name].factors(layer.held(name))[0].copy_(a)
        kept.append(path)
        if r != config.r:
            ranks[path] = r
        if alpha != config.lora_alpha:
            alphas[path] = alpha
    config.target_modules, config.rank_pattern, config.alpha_pattern = kept, ranks, alphas
    host._connect()
    host._reconnect_others()
    host._update_requires_grad([name])
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}",
            stacklevel=3,
        )
