"""Mixed batches: rows that go through different adapters, and the trial that shows a model allows them.

`adapter_names` has an entry for each row: an adapter's name, `"__base__"` for none, or a list of names for a composition.

    model(**batch, adapter_names=["tweets", "__base__", ["style", "facts"], "tweets"])

Every row equals itself alone. That is not assumed of a model: before the first mixed batch of adapters of some kind, a small
random batch of them goes through it mixed and row by row, with the adapters' values disturbed (untrained ones change nothing
and would prove nothing).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .adapters import AdapterSet
from .architectures import base_modules, is_encoder_decoder, token_embeddings
from .errors import AdapterError, CompositionError, ConfigError, GraftError, UnsupportedError
from .layers import ModulesToSaveWrapper
from .passes.inputs import chosen_rows, tensors_in
from .passes.prefix import pour
from .passes.run import run
from .passes.trial import Trial, kind_of
from .quantization import holds_quantized
from .routing import BASE_NAME, Group, Plan, Routes, running

TRIED = 4  # compositions of one trial

AdapterNames = str | Sequence[str | Sequence[str]]


def plan_of(
    host: AdapterSet, names: AdapterNames | None = None, batch: int | None = None, call: tuple[tuple, dict] | None = None
) -> Plan:
    """The plan of a call of `batch` rows: through the active adapters where `names` is None."""
    if names is None:
        return Plan(host.switch, host.switch.active if host.switch.enabled else ())
    return mixed_plan(host, names, batch, call)


def mixed_plan(
    host: AdapterSet, names: AdapterNames, batch: int | None = None, call: tuple[tuple, dict] | None = None
) -> Plan:
    """The plan of a call whose rows go through `names`; `batch` is the number of rows, `call` its arguments, on which rows
    are tried out where the base reads no tokens.

    Raises:
        AdapterError: an unknown name, a wrong number of names.
        CompositionError: a row's adapters cannot be active together.
        UnsupportedError: on this model rows would not equal themselves alone.
    """
    if isinstance(names, str):
        names = [names] * (batch or 1)
    if not isinstance(names, Sequence):
        raise AdapterError(f"adapter_names={names!r}: expected a list with an entry a row.")
    rows = [_group(host, entry, row) for row, entry in enumerate(names)]
    if not rows or (batch is not None and batch != len(rows)):
        raise AdapterError(
            f"adapter_names has {len(rows)} entries, the batch {batch} rows: expected one a row "
            f"(an adapter's name, {BASE_NAME!r}, or a list of names for a composition)."
        )
    if not host.switch.enabled:  # within `disable_adapter()`
        return Plan(host.switch, ())
    if len(set(rows)) == 1:
        return Plan(host.switch, rows[0])
    routes = Routes.by_row(rows)
    adapters = tuple(dict.fromkeys(n for row in rows for n in row))
    plan = Plan(host.switch, adapters, routes=routes)
    try_mixed(host, routes.groups, plan, call)
    return plan


def with_tasks(host: AdapterSet, plan: Plan, tasks: Any, batch: int) -> Plan:
    """A plan whose rows have tasks, for adapters that know several: rows of different ones are in groups of their own.

    Args:
        tasks: `task_ids`, one of each of `batch` rows; without meaning where no such adapter takes part.

    Raises:
        ConfigError: no task, or one that an adapter does not have.
    """
    known = {n: host.methods[n].tasks for n in plan.adapters if host.methods[n].tasks}
    if not known or (tasks is None and max(known.values()) == 1):
        return plan
    name = max(known, key=lambda n: known[n])
    ids = tasks.tolist() if isinstance(tasks, Tensor) else list(tasks) if isinstance(tasks, Sequence) else tasks
    if not isinstance(ids, list) or len(ids) != batch or not all(type(i) is int for i in ids):
        raise ConfigError(
            f"task_ids={ids!r}: adapter {name!r} has {known[name]} tasks, so a call needs the number of each row's, one a "
            f"row of {batch}."
        )
    rows = []
    for row, (group, task) in enumerate(zip(plan.by_row * (batch if plan.routes is None else 1), ids, strict=True)):
        own = [n for n in group if n in known]
        for name in own:
            if not 0 <= task < known[name]:
                raise ConfigError(f"task_ids, row {row}: {task}; adapter {name!r} has tasks 0 to {known[name] - 1}.")
        rows.append((group, task if own else None))
    different = list(dict.fromkeys(rows))
    if len(different) == 1:
        return Plan(host.switch, plan.adapters, tasks=(different[0][1],))
    routes = Routes([group for group, _ in different], torch.tensor([different.index(row) for row in rows]))
    try_mixed(host, list(dict.fromkeys(routes.groups)))
    return Plan(host.switch, plan.adapters, routes=routes, tasks=tuple(task for _, task in different))


def prompt_of(host: AdapterSet, batch: int, tasks: Any = None) -> Tensor | Cache:
    """What the active adapters put in front of each of `batch` rows: virtual tokens [B, P, H], or the keys and values of a
    prefix in a cache.

    Raises:
        AdapterError: they put nothing there, or both.
    """
    plan = plan_of(host)
    plan = with_tasks(host, plan, tasks, batch) if host.has_tasks else plan
    tokens, prefixed = map(bool, host.counts(plan.adapters))
    if tokens == prefixed:
        found = "both virtual tokens and a prefix" if tokens else "neither virtual tokens nor a prefix"
        raise AdapterError(f"get_prompt: the active adapters ({', '.join(plan.adapters) or 'none'}) have {found}.")
    return host.virtual_rows(plan, batch) if tokens else pour(DynamicCache(), host.memory_rows(plan, batch), batch)


def _group(host: AdapterSet, entry: Any, row: int) -> Group:
    """The adapters of one row."""
    named = [entry] if isinstance(entry, str) else entry
    if not isinstance(named, (list, tuple)) or not all(isinstance(n, str) for n in named):
        raise AdapterError(f"adapter_names, row {row}: expected a name or a list of names, got {entry!r}.")
    group = tuple(n for n in named if n != BASE_NAME)
    try:
        host._known(*group)
    except AdapterError as error:
        raise AdapterError(f"adapter_names, row {row}: {error}") from None
    if len(set(group)) != len(group):
        raise AdapterError(f"adapter_names, row {row}: {entry!r} names an adapter twice.")
    host._refuse_together(group)
    for _, module in base_modules(host.base) if len(group) > 1 else ():
        if not isinstance(module, ModulesToSaveWrapper) or module.switch is not host.switch or module.is_head:
            continue
        if sum(n in module.modules_to_save for n in group) > 1:
            raise CompositionError(
                f"adapter_names, row {row}: {', '.join(group)} each bring their own copy of one module (modules_to_save); "
                "they cannot be active together."
            )
    return group


# -- the trial -----------------------------------------------------------------------------------------------------------
def try_out(host: AdapterSet, names: Sequence[str | Sequence[str]] | None = None) -> None:
    """Try out now what passes under these compositions (every adapter by itself) would try out when they first come: the
    short cuts of training, and batches that mix them.

    Raises:
        AdapterError, CompositionError, UnsupportedError: as `mixed_plan` for a batch with a row of each.
    """
    groups = [_group(host, entry, i) for i, entry in enumerate(host.methods if names is None else names)]
    for group in groups:
        host.entry.shortcuts.training_form(Plan(host.switch, group))
    if len(set(groups)) > 1:
        try_mixed(host, list(dict.fromkeys(groups)))


def try_mixed(
    host: AdapterSet, groups: list[Group], plan: Plan | None = None, call: tuple[tuple, dict] | None = None
) -> None:
    """UnsupportedError unless rows of such compositions, mixed, equal themselves alone on this model. Tried once a kind."""
    methods = {tuple(host.methods[n] for n in group) for group in groups}
    if methods <= host.mixed:
        return
    kinds = {kind_of(host, group): group for group in groups}
    fresh = [group for kind, group in kinds.items() if kind not in host.mixes]
    if plan is not None and call is not None and token_embeddings(host.base) is None:
        if fresh:
            _Given(host, plan, call).run()
            host.mixes |= set(kinds)
        host.mixed |= methods
        return
    others = [g for g in groups if g not in fresh]
    for start in range(0, len(fresh), TRIED - 1):
        tried = fresh[start : start + TRIED - 1]
        rows = [*tried, *(others[:1] or [()])] if len(tried) < 2 else tried
        _Rows(host, rows).run()
        host.mixes |= {kind_of(host, group) for group in tried}
    host.mixed |= methods


class _Given(Trial):
    """The call's own batch, where nothing is known of what a base reads: mixed, and the rows of each composition alone."""

    def __init__(self, host: AdapterSet, plan: Plan, call: tuple[tuple, dict]) -> None:
        super().__init__(host)
        assert plan.routes is not None
        self.routes = Routes.by_row(plan.by_row)  # its own: what layers keep of these is of disturbed values
        self.plan, self.call = replace(plan, routes=self.routes), call

    def run(self) -> None:
        name, of, groups = type(self.host.base).__name__, self.routes.of.tolist(), self.routes.groups
        with self.quiet(), torch.no_grad(), self.disturbed(groups):
            mixed = self.outputs(self.plan, self.call, len(of))
            for i, group in enumerate(groups):
                rows = [row for row, g in enumerate(of) if g == i]
                call = chosen_rows(self.call, rows, len(of))
                alone = self.outputs(Plan(self.host.switch, group), call, len(rows))
                own = [t[rows] for t in mixed]
                if len(own) != len(alone) or not own or not all(map(self.same, own, alone)):
                    raise UnsupportedError(
                        f"{name}: in a batch with other adapters, rows of {'+'.join(group) or 'the base'} give other values "
                        "than alone (or nothing by row). Run one adapter a batch on this model."
                    )

    def outputs(self, plan: Plan, call: tuple[tuple, dict], count: int) -> list[Tensor]:
        """What a call of `count` rows gives by row."""
        args, kwargs = call
        if self.host.plain:
            with running(plan):
                output = self.host.base_model(*args, **kwargs)
        else:
            output = run(self.host, plan, dict(kwargs), *args)[1]
        return [t for t in tensors_in(output) if t.shape[0] == count]

    def same(self, a: Tensor, b: Tensor) -> bool:
        limit = (1e-4 if self.precise else 0.1) * float(b.float().abs().max()) + 1e-6 if b.numel() else 0.0
        return a.shape == b.shape and bool(torch.isclose(a.float(), b.float(), rtol=0, atol=limit, equal_nan=True).all())


class _Rows(Trial):
    """Random rows of different lengths, once as one batch and once each alone."""

    LENGTHS = (5, 7, 4, 6)

    def __init__(self, host: AdapterSet, groups: list[Group]) -> None:
        super().__init__(host)
        self.groups, base = groups, host.base
        if token_embeddings(base) is None:
            raise UnsupportedError(
                f"{type(base).__name__} reads no token ids, on which rows of different adapters are tried out. Run one "
                "adapter a batch."
            )
        self.rows = [self.ids(n) for n in self.LENGTHS[: len(groups)]]
        self.decoder_ids = self.ids(len(groups), 3)
        self.left = not is_encoder_decoder(base) and "position_ids" in host.entry.facts.signature.parameters

    def run(self) -> None:
        name = type(self.host.base).__name__
        try:
            with self.quiet(), torch.no_grad(), nullcontext() if self.all_matter() else self.disturbed(self.groups):
                alone = [self.logits([i], [group]) for i, group in enumerate(self.groups)]
                mixed = self.logits(list(range(len(self.groups))), self.groups)
        except GraftError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UnsupportedError(
                f"{name}: a batch of rows of different adapters could not be tried out ({error}). Run one adapter a batch."
            ) from error
        for i, group in enumerate(self.groups):
            apart, limit = (mixed[i] - alone[i][0]).abs().max(), self.tolerance * alone[i][0].abs().max() + 1e-6
            if not bool(apart <= limit):
                raise UnsupportedError(
                    f"{name}: in a batch with other adapters, a row of {'+'.join(group) or 'the base'} gives other values "
                    f"than alone (by {float(apart):.1e}, allowed {float(limit):.1e}). Run one adapter a batch on this model."
                )

    def all_matter(self) -> bool:
        """Whether every composition changes its row by far more than what is allowed: then nothing need be disturbed."""
        for i, group in enumerate(self.groups):
            if group:
                own, plain = self.logits([i], [group])[0], self.logits([i], [()])[0]
                same = own.shape == plain.shape
                if not same or not bool((own - plain).abs().max() > 100 * self.tolerance * plain.abs().max()):
                    return False
        return True

    def logits(self, rows: list[int], groups: list[Group]) -> list[Tensor]:
        """First outputs of each row, at its own tokens where there is one a token."""
        base, device = self.host.base, self.host.adapter_device
        length = max(len(self.rows[i]) for i in rows)
        ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
        places = []
        for at, i in enumerate(rows):
            own = slice(length - len(self.rows[i]), length) if self.left else slice(0, len(self.rows[i]))
            ids[at, own], mask[at, own] = self.rows[i], 1
            places.append(own)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if is_encoder_decoder(base):
            inputs["decoder_input_ids"] = self.decoder_ids[rows].to(device)
        routes = Routes.by_row(groups) if len(groups) > 1 else None
        adapters = tuple(dict.fromkeys(n for g in groups for n in g))
        plan = Plan(self.host.switch, adapters, routes=routes)
        _, output = run(self.host, plan, inputs | {"return_dict": True})
        name = next((n for n in ("logits", "start_logits", "last_hidden_state") if output.get(n) is not None), None)
        if name is None:
            raise ValueError(f"no output of {', '.join(output)} to compare")
        found = output[name].float()
        if is_encoder_decoder(base) and found.dim() == 3:  # virtual tokens of the decoder come first
            found = found[:, -inputs["decoder_input_ids"].shape[1] :]
        per_token = not is_encoder_decoder(base) and found.dim() > 1 and found.shape[1] >= length
        extra = found.shape[1] - length if per_token else 0
        return [row[extra:][own] if per_token else row for row, own in zip(found, places, strict=True)]

    @property
    def precise(self) -> bool:
        return super().precise and not holds_quantized(self.host.base)

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.precise else 0.1
