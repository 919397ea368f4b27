"""AdaLoRA: LoRA as a singular value decomposition whose ranks are shared out among layers in training (arXiv:2303.10512).

``y = W x + b + scale * B (e * A dropout(x))``, A [r, in], e [r, 1], B [out, r], scale = lora_alpha / init_r (over
init_r + 1e-5, as in HF PEFT). e starts at zero, so an untrained adapter changes nothing. In training

* the loss has a penalty (sect. 3.1): the mean over all A and B of ``||A A^T - I||`` and ``||B^T B - I||``, times
  `orth_reg_weight`;
* after each step every triplet (a row of A, its e, a column of B) is rated by sensitivity times uncertainty of its elements
  (eqs. 7 to 10), and the e of the worst are set to zero, down to a budget that falls by a cubic from `init_r` a layer to
  `target_r` (eq. 12) between step `tinit` and step `total_step - tfinal`; thereafter the ranks stay.

Field names, defaults, maths and files (ranks in `rank_pattern`) are HF PEFT's; what differs from it:
* the penalty is in the training loss only, so that evaluation gives the task's own loss;
* a file has every triplet that acts, also those that came back between two allocations (HF PEFT drops these);
* full factors and ratings are kept in the training-state file, so that resumed training goes on exactly;
* several adapters train at the same time, each by its own schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architectures import LORA_TARGETS, Targets
from ..errors import AdapterError, CheckpointError, ConfigError
from ..layers import Change, Frozen, Held, LowRank
from .base import PeftConfig, PeftType, Site, register
from .fields import Count, Number, Probability, Whole, also_takes
from .lora import ELSEWHERE, Lora, LoraConfig

# Default targets by `config.model_type`: HF PEFT's table, and LoRA's for families that it lacks.
TARGETS: Targets = LORA_TARGETS | {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"], "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "roberta": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}  # fmt: skip
FACTORS = ("lora_A", "lora_B", "lora_E")
_SCHEDULE = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}


# LoRA's fields that AdaLoRA's triplets have no form of
NOT_HERE = (
    "use_dora", "use_rslora", "alpha_pattern", "init_lora_weights", "lora_bias", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "ensure_weight_tying", "trainable_token_indices", "eva_config", "corda_config",
    "lora_ga_config",
)  # fmt: skip


@also_takes(ELSEWHERE)
@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA; fields that it shares with LoRA are described there.

    Args:
        target_r: average rank of a layer in the end.
        init_r: rank of every layer at first.
        tinit: steps before ranks begin to fall.
        tfinal: steps at the end, in which they stay.
        deltaT: steps from one allocation to the next.
        beta1, beta2: how slowly sensitivity and uncertainty change.
        orth_reg_weight: weight of the penalty.
        total_step: steps of the training; None takes those of the Trainer that it is trained by.
        rank_pattern: which triplets of each layer are left; filled in by training.
        r: of LoRA; not used here.
    """

    target_r: Count = 8
    init_r: Count = 12
    tinit: Whole = 0
    tfinal: Whole = 0
    deltaT: Count = 1
    beta1: Probability = 0.85
    beta2: Probability = 0.85
    orth_reg_weight: Number = 0.5
    total_step: Count | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    neutral_fields: ClassVar[frozenset[str]] = frozenset({*_SCHEDULE, "rank_pattern"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. Give init_r and target_r.", stacklevel=3
            )
        for name in NOT_HERE:
            value = getattr(self, name)
            if isinstance(value, str) if name == "init_lora_weights" else bool(value):
                raise ConfigError(f"{name}={getattr(self, name)!r}: AdaLoRA does not support it. Leave it out.")
        if self.orth_reg_weight < 0:
            raise ConfigError(f"orth_reg_weight={self.orth_reg_weight}: expected at least 0.")
        self.check_schedule()

    def check_schedule(self) -> None:
        """ConfigError where there is no step between the first phase and the last."""
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}: no step is left in which ranks "
                "could fall. Lower tinit or tfinal, or train for more steps."
            )

    @property
    def own_fields(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"total_step"}) if self.total_step is None else frozenset()

    def save_pretrained(self, save_directory: Any, auto_mapping_dict: dict | None = None, **overrides: Any) -> None:
        """HF PEFT refuses a file without `total_step`: it gets one, and the weights file's header has ours."""
        if self.total_step is None:
            overrides.setdefault("total_step", self.tinit + self.tfinal + 1)
        super().save_pretrained(save_directory, auto_mapping_dict, **overrides)


class AdaLoraChange(Change):
    """Of a linear layer: `lora_A` [r, in], `lora_E` [r, 1], `lora_B` [out, r]."""

    tables: ClassVar[tuple[str, ...]] = ("lora_dropout", *FACTORS)
    numbers = ("r", "lora_alpha", "scaling", "ranknum")

    def __init__(self, config: AdaLoraConfig, r: int) -> None:
        self.r = r
        self.lora_alpha = config.lora_alpha
        self.ranknum = float(config.init_r)
        self.scaling = config.lora_alpha if config.lora_alpha > 0 else self.ranknum
        self.rate, self.random = config.lora_dropout, not config.init_lora_weights

    def create(self, t: Held, frozen: Frozen, dtype: torch.dtype, initialise: bool) -> None:
        t["lora_dropout"] = nn.Dropout(self.rate) if self.rate > 0 else nn.Identity()
        (out, size), options = frozen.shape, {"dtype": dtype, "device": frozen.device}
        shapes = {"lora_A": (self.r, size), "lora_E": (self.r, 1), "lora_B": (out, self.r)}
        for table, shape in shapes.items():
            t[table] = nn.Parameter(torch.zeros(shape, **options))  # type: ignore[call-overload]
            if initialise and (self.random or table != "lora_E"):
                nn.init.normal_(t[table], std=1.0 if self.random else 0.02)

    def low_rank(self, t: Held) -> LowRank:
        drop = t["lora_dropout"]
        p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        return LowRank(t["lora_A"] * t["lora_E"], t["lora_B"], self.scaling / (self.ranknum + 1e-5), p)


class AdaLora(Lora):
    """One AdaLoRA adapter in a host."""

    title = "AdaLoRA"
    kinds = ("linear",)
    takes = "linear layers (torch's, bitsandbytes', Conv1D)"
    families = TARGETS
    scheduled = True
    config: AdaLoraConfig

    def __init__(self, config: PeftConfig, name: str) -> None:
        super().__init__(config, name)
        #: by file key: smoothed sensitivity and uncertainty of every element
        self.ratings: dict[str, tuple[Tensor, Tensor]] = {}
        #: by layer: the triplets [r] that the last allocation has left; none before the first
        self.kept: dict[str, Tensor] = {}

    # -- attaching -------------------------------------------------------------------------------------------------------
    def attach(self, host: Site, *, for_loading: bool = False) -> None:
        """An adapter for use only has the ranks of its file; one that is trained has `init_r` rows, those of the file among
        them."""
        if not for_loading:
            self.config.rank_pattern = None
        super().attach(host, for_loading=for_loading and self.config.inference_mode)
        if not self.config.inference_mode:
            if for_loading:
                self.mask_all(host)
            found = {path: self.pattern(path) for path, _ in self.layers(host)}
            self.kept = {path: torch.tensor(rows) for path, rows in found.items() if rows is not None}

    def mask_all(self, host: Site) -> None:
        """Let no triplet act: a file's come."""
        with torch.no_grad():
            for _, t in self.held(host):
                t["lora_E"].zero_()

    def pattern(self, path: str) -> list[bool] | None:
        """The entry of `rank_pattern` for a layer."""
        return (self.config.rank_pattern or {}).get(f"{path}.lora_E")

    def change(self, host: Site, path: str, frozen: Frozen) -> Change:
        rows = self.pattern(path) if self.config.inference_mode else None
        return AdaLoraChange(self.config, self.config.init_r if rows is None else sum(rows))

    def held(self, host: Site) -> Iterator[tuple[str, Held]]:
        """Its layers and the tensors that it has there."""
        for path, layer in self.layers(host):
            yield path, layer.held(self.name)

    # -- files -----------------------------------------------------------------------------------------------------------
    def rows(self, host: Site) -> dict[str, Tensor]:
        """By layer, the triplets [r] that a file has: those that are kept, and those that act. None where it has all."""
        if not self.kept:
            return {}
        return {path: self.kept[path] | (t["lora_E"].detach() != 0).flatten().cpu() for path, t in self.held(host)}

    def note(self, rows: dict[str, Tensor]) -> None:
        """Say in the configuration which triplets there are, if they are not all."""
        if rows:
            self.config.rank_pattern = {f"{path}.lora_E": left.tolist() for path, left in rows.items()}

    def tensors(self, host: Site) -> dict[str, Tensor]:
        found, rows = super().tensors(host), self.rows(host)
        self.note(rows)
        for path, left in rows.items():
            for table in FACTORS:
                key, own = f"{self.file_prefix}{path}.{table}", left.to(found[f"{self.file_prefix}{path}.{table}"].device)
                found[key] = found[key][:, own] if table == "lora_B" else found[key][own]
        return found

    def load(self, host: Site, tensors: dict[str, Tensor]) -> None:
        rows = self.rows(host)
        whole = dict(tensors)
        for path, t in self.held(host) if rows else ():
            for table in FACTORS:
                key, left = f"{self.file_prefix}{path}.{table}", rows[path].to(t[table].device)
                full = torch.zeros_like(t[table]) if table == "lora_E" else t[table].detach().clone()
                (full.T if table == "lora_B" else full)[left] = (tensors[key].T if table == "lora_B" else tensors[key]).to(
                    full
                )
                whole[key] = full
        super().load(host, whole)

    def training_tensors(self, host: Site) -> dict[str, Tensor]:
        """Whole factors, ratings and what is kept, under keys of their own."""
        if self.config.inference_mode:
            return {}
        found = {}
        for path, t in self.held(host):
            for table in FACTORS:
                key = f"adalora.{path}.{table}"
                found[key] = t[table].detach()
                if key in self.ratings:
                    found[f"{key}.sensitivity"], found[f"{key}.uncertainty"] = self.ratings[key]
            if path in self.kept:
                found[f"adalora.{path}.kept"] = self.kept[path]
        return found

    def load_training(self, host: Site, tensors: dict[str, Tensor]) -> None:
        own = {f"adalora.{path}.{table}": t[table] for path, t in self.held(host) for table in FACTORS}
        wrong = [key for key, value in own.items() if key not in tensors or tensors[key].shape != value.shape]
        if wrong:
            raise CheckpointError(
                f"The training state does not fit adapter {self.name!r}: {', '.join(wrong)} missing or of another shape. "
                f"Was it trained with init_r={self.config.init_r}?"
            )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(tensors[key])
        parts = ("sensitivity", "uncertainty")
        self.ratings = {
            key: tuple(tensors[f"{key}.{part}"].to(value.device, copy=True) for part in parts)  # type: ignore[misc]
            for key, value in own.items()
            if f"{key}.sensitivity" in tensors
        }
        kept = {path: tensors.get(f"adalora.{path}.kept") for path, _ in self.held(host)}
        self.kept = {path: left.cpu() for path, left in kept.items() if left is not None}
        self.note(self.kept)

    # -- training --------------------------------------------------------------------------------------------------------
    @property
    def penalised(self) -> bool:
        return self.config.orth_reg_weight > 0

    def penalty(self, host: Site) -> Tensor:
        """The mean distance of all A and B from orthogonal ones, weighted."""
        distances = []
        for _, t in self.held(host):
            for rows in (t["lora_A"], t["lora_B"].T):
                products = rows @ rows.T
                distances.append(torch.linalg.norm(products - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)))
        first = distances[0].device
        return self.config.orth_reg_weight * torch.stack([d.to(first) for d in distances]).mean()

    def before_steps(self, host: Site, steps: int) -> None:
        config = self.config
        if config.total_step is None:
            config.total_step = steps
            config.check_schedule()
        elif config.total_step - config.tfinal > steps:
            warnings.warn(
                f"AdaLoRA's ranks come to their ends at step {config.total_step - config.tfinal} (total_step="
                f"{config.total_step}, tfinal={config.tfinal}), and training ends at step {steps}. Leave total_step out.",
                stacklevel=2,
            )

    def after_step(self, host: Site, step: int) -> None:
        """Rate the triplets, and set the e of those that are over the budget to zero. As HF PEFT's `update_and_allocate`:
        after the optimizer's step, gradients still in place; steps count from 0."""
        config = self.config
        if config.total_step is None:
            raise ConfigError("AdaLoRA's schedule needs total_step, the steps of the whole training: name it.")
        last = config.total_step - config.tfinal
        if step < last:
            self.rate(host)
        if step == last or (config.tinit < step < last and step % config.deltaT == 0):
            self.allocate(host, step)
        elif step > last:
            self.mask(host)
        if step == last:
            self.ratings = {}

    def rate(self, host: Site) -> None:
        """Take the last gradients into the ratings (eqs. 8 to 10)."""
        config = self.config
        own = {f"adalora.{path}.{table}": t[table] for path, t in self.held(host) for table in FACTORS}
        if all(value.grad is None for value in own.values()):
            raise AdapterError(
                f"Adapter {self.name!r} has no gradients: call update_and_allocate after loss.backward() and "
                "optimizer.step(), before optimizer.zero_grad()."
            )
        with torch.no_grad():
            for key, value in own.items():
                now = torch.zeros_like(value) if value.grad is None else (value * value.grad).abs()
                before, unsure = self.ratings.get(key) or (torch.zeros_like(value), torch.zeros_like(value))
                smooth = config.beta1 * before + (1 - config.beta1) * now
                unsure = config.beta2 * unsure + (1 - config.beta2) * (now - smooth).abs()
                self.ratings[key] = smooth, unsure

    def budget(self, ranks: int, layers: int, step: int) -> int:
        """How many triplets there may be at a step (eq. 12), of `ranks` in all."""
        config, wanted = self.config, self.config.target_r * layers
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)  # type: ignore[operator]
        return int((ranks - wanted) * left**3 + wanted)

    def allocate(self, host: Site, step: int) -> None:
        """Keep the best triplets, as many as the step's budget allows (eq. 7)."""
        if not self.ratings:
            raise AdapterError(
                f"update_and_allocate({step}) ends a schedule whose earlier steps were not made. Call it each step."
            )
        scores = {}
        for path, _ in self.held(host):
            a, b, e = (s * u for s, u in (self.ratings[f"adalora.{path}.{table}"] for table in FACTORS))
            scores[path] = (e.flatten() + (a.mean(1) + b.mean(0))).cpu()
        every = torch.cat(list(scores.values()))
        over = len(every) - self.budget(len(every), len(scores), step)
        worst = torch.kthvalue(every, over)[0] if over > 0 else every.new_tensor(-1.0)
        self.kept = {path: score > worst for path, score in scores.items()}
        self.note(self.kept)
        self.mask(host)

    def mask(self, host: Site) -> None:
        """Set the e of triplets that are not kept to zero."""
        with torch.no_grad():
            for path, t in self.held(host) if self.kept else ():
                t["lora_E"].masked_fill_(~self.kept[path].to(t["lora_E"].device)[:, None], 0.0)


register(PeftType.ADALORA, AdaLoraConfig, AdaLora)
