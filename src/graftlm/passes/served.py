"""Serving: rows of many adapters go through the base token by token, over keys and values that somebody else keeps.

Shapes: N new tokens of all rows, R rows, H hidden size, V vocabulary; K prefix entries and P virtual tokens of a front.

    rows     a: x0 x1 x2 (prefill)   b: y7 (decode)   c: z4 (decode)
    step     [1, N]  x0 x1 x2 y7 z4   routes by token, explicit positions, attention row by row over the cache
    logits   [R, V]  of x2, y7, z4

What stands in front of a row (virtual tokens, a prefix) is causal and comes first, so its keys and values are constants of
the adapter: `admit` computes them once, a row starts behind them, and decoding knows nothing of them. Nothing is tried out
or switched at a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures import blank_ids, is_encoder_decoder, model_dims, per_layer_inputs
from ..architectures.fast import alibi_slopes, attention_configs
from ..errors import AdapterError, UnsupportedError
from ..kernels import HeadForm
from ..routing import Group, Plan, Routes, Scope, StepAttention, running
from .facts import decoder_config
from .lean import LeanSteps
from .plain_cache import FrontMemory, PlainCache
from .refusals import check_room
from .run import run
from .state import Call, Pass, Probe, Run, Step
from .trial import Trial, kind_of, log

if TYPE_CHECKING:
    from ..adapters import AdapterSet


@dataclass(frozen=True)
class Row:
    """What is new of a row.

    Args:
        group: the adapters that it goes through; () for the base.
        tokens: ids [n], at least one; a tensor or plain numbers.
        start: places before them, its front included.
    """

    group: Group
    tokens: Tensor | Sequence[int]
    start: int


@dataclass(frozen=True)
class Laid:
    """How the rows of a step lie: the plan, its routes by token (None: all go the same way), each row's last token [R]."""

    plan: Plan
    routes: Routes | None
    last: Tensor


class Served:
    """A base and its adapters, as a server runs them. In evaluation mode; adapters whose values change are admitted anew."""

    def __init__(self, host: AdapterSet) -> None:
        if host.plain:
            raise UnsupportedError(f"{type(host.base).__name__} is no language model of transformers: it cannot be served.")
        self.host = host
        base = host.base
        self.configs = attention_configs(base)
        self.slopes = alibi_slopes(base)
        self.windows = None if is_encoder_decoder(base) else layer_windows(base)
        self.form: HeadForm | None = None
        self.tried: set[str] = set()
        self.lean = LeanSteps(host)
        self._sets: OrderedDict[tuple[Group, ...], Routes] = OrderedDict()  # what layers keep of their factors
        self._laid: OrderedDict[tuple, Laid] = OrderedDict()

    def admit(self, group: Group) -> FrontMemory:
        """Make a composition ready for steps: tried out (once a kind), and its front computed. An adapter that waits for its
        invocation acts on all tokens of a row that goes through it: what is before the invocation goes without it.

        Raises:
            UnsupportedError: on this base steps do not give what passes give.
            AdapterError: an unknown name, or values that are no finite numbers.
        """
        self.host._known(*group)
        self.forget(*group)
        self.refuse()
        if len([name for name in group if self.host.methods[name].invocation]) > 1:
            raise UnsupportedError(
                "Adapters with alora_invocation_tokens are not composed with each other here: use generate."
            )
        for name in group:
            if self.host.methods[name].tasks > 1:
                raise UnsupportedError(f"Adapter {name!r} has several tasks, which steps do not tell apart: use generate.")
        kind = kind_of(self.host, group)
        if kind not in self.tried:
            try:
                self.form = Steps(self, group).run()
            finally:
                self.forget(*group)  # what was kept is of the trial's values
            self.tried.add(kind)
        if kind in self.lean.kinds:  # with soft prompts in the cache, rows go through the rest
            self.lean.trust(group, tuple(n for n in group if not any(self.host.counts((n,)))), ())
        return self.front(group)

    @torch.no_grad()
    def step(self, rows: Sequence[Row], attention: StepAttention) -> Tensor:
        """Logits [R, V] behind each row's new tokens, all of which go through the base at once.

        Args:
            attention: attends row by row, in their order: to what it keeps of the row, and to the new tokens up to each.
        """
        if self.host.base.training:
            raise UnsupportedError("Serving is for evaluation mode: call eval() first.")
        if self.form is None:
            raise UnsupportedError("Nothing has been admitted to this server: call admit(group) for each composition first.")
        tokens = [t for row in rows for t in (row.tokens.tolist() if isinstance(row.tokens, Tensor) else row.tokens)]
        counts = tuple(len(row.tokens) for row in rows)
        places = [p for row, count in zip(rows, counts, strict=True) for p in range(row.start, row.start + count)]
        groups, ids, at = tuple(row.group for row in rows), torch.tensor(tokens), torch.tensor(places)
        laid = self.laid(groups, counts)
        if (beside := self.lean.rows(groups, counts)) is not None:
            device = self.host.adapter_device
            at = (at + self.host.entry.facts.offset).to(device)
            hidden = self.lean.step(beside, laid.plan, laid.routes, ids.to(device), at, attention, laid.last)
        elif self.lean.forced:
            raise RuntimeError("there is no lean form for these rows")
        else:
            now = self.forward(laid, {"input_ids": ids[None]}, at, attention)
            assert now.hidden is not None
            hidden = now.layout.restore(now.hidden)
        with running(laid.plan):
            return self.form.apply(self.host.entry.head(hidden[:, None]))[:, 0]

    def laid(self, groups: tuple[Group, ...], counts: tuple[int, ...]) -> Laid:
        """The plan of a step of rows that go through `groups` and have so many new tokens: the last ones are kept, and what
        layers keep of a plan for any rows of the same adapters."""
        key = groups, counts
        if key in self._laid:
            self._laid.move_to_end(key)
            return self._laid[key]
        last = torch.tensor(counts).cumsum(0) - 1
        different = tuple(sorted(set(groups)))
        if len(different) == 1:
            made = Laid(Plan(self.host.switch, different[0]), None, last.to(self.host.adapter_device))
        else:
            if different not in self._sets:
                self._sets[different] = Routes(list(different), torch.zeros(0, dtype=torch.long))
            self._sets.move_to_end(different)
            of = torch.tensor([different.index(group) for group in groups])
            adapters = tuple(dict.fromkeys(name for group in different for name in group))
            rows = self._sets[different].over(of, packed=False)
            tokens = rows.over(of.repeat_interleave(torch.tensor(counts)))
            made = Laid(Plan(self.host.switch, adapters, rows), tokens, last.to(self.host.adapter_device))
        self._laid[key] = made
        while len(self._laid) > 16:
            self._laid.popitem(last=False)
        while len(self._sets) > 2:  # they hold the adapters' factors a second time
            gone = self._sets.popitem(last=False)[0]
            self._laid = OrderedDict((k, v) for k, v in self._laid.items() if tuple(sorted(set(k[0]))) != gone)
        return made

    def forget(self, *names: str) -> None:
        """Keep nothing of these adapters, whose values change or which go."""
        gone = set(names)
        if names:
            self.lean.forget(*names)
        self._sets = OrderedDict((k, v) for k, v in self._sets.items() if not gone & {n for group in k for n in group})
        self._laid = OrderedDict((k, v) for k, v in self._laid.items() if not gone & set(v.plan.adapters))

    def forward(self, laid: Laid, inputs: dict, places: Tensor, attention: StepAttention) -> Pass:
        """One pass of the base over rows side by side; places [N]: where their new tokens stand."""
        facts, device, plan = self.host.entry.facts, self.host.adapter_device, laid.plan
        inputs = {name: value.to(device) for name, value in inputs.items()}
        if facts.takes_positions:
            inputs["position_ids"] = (places + facts.offset)[None].to(device)
        options: dict[str, Any] = {"use_cache": False} if facts.takes("use_cache") else {}
        call = Call(batch=1)
        check_room(self.host, facts, plan, call, inputs)
        passing = Run(laid=Pass(Scope(plan, laid.routes, attention), call, Step(laid.last)))
        with running(plan), passing.going():
            self.host.base_model(**inputs, **options)
        assert passing.ended is not None
        return passing.ended

    @torch.no_grad()
    def front(self, group: Group) -> FrontMemory:
        """Keys and values of a composition's whole front: the prefix as it is, the virtual tokens behind it."""
        prefix, virtual = self.host.memory(group), self.host.virtual_tokens(group)
        start = 0 if prefix is None else prefix[0][0].shape[1]
        cache = PlainCache(self)
        cache.join(0, FrontMemory(prefix or [], start))
        if virtual is not None:
            places = torch.arange(start, start + len(virtual))
            acting = tuple(n for n in group if not self.host.methods[n].invocation)  # these come before every invocation
            embeds = virtual.to(self.host._compute_dtype())[None]
            laid = self.laid((acting,), (len(virtual),))
            table = self.host.entry.facts.per_layer
            by_layer = {} if table is None else per_layer_inputs(table, blank_ids(table, 1, len(virtual)))
            self.forward(laid, {"inputs_embeds": embeds, **by_layer}, places, cache.over([(0, len(virtual))]))
        return FrontMemory(cache.kept[0], start + (0 if virtual is None else len(virtual)))

    @property
    def longest_row_matters(self) -> bool:
        """Whether what a row computes depends on the longest one beside it."""
        return any(_rope_kinds(c) & {"dynamic", "longrope"} for c in self.configs)

    def refuse(self) -> None:
        """UnsupportedError for a base whose rows depend on more than their own tokens and places."""
        base, facts = self.host.base, self.host.entry.facts
        if self.host.entry.stale():
            self.host._connect()
        why = None
        if facts.encoder_decoder or self.host.entry.head is None or not getattr(base, "can_generate", lambda: False)():
            why = "is no decoder-only language model"
        elif self.longest_row_matters:
            why = "turns positions by the length of the longest row"
        elif self.windows is None:
            why = "attends in chunks"
        if why:
            raise UnsupportedError(f"{type(base).__name__} {why}; serve it through generate, in batches.")


def _rope_kinds(config: Any) -> set[str]:
    """The kinds of rotary positions of a configuration, perhaps several by the kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [found, *(v for v in found.values() if isinstance(v, dict))]
    return {str(part.get("rope_type", part.get("type"))) for part in parts}


def layer_windows(base: Any) -> list[int | None] | None:
    """How many places back each layer sees, itself included; None for all. None instead of the list for other patterns."""
    config = decoder_config(base)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * model_dims(base).layers
    if not set(kinds) <= {"sliding_attention", "full_attention"}:
        return None
    return [window if kind == "sliding_attention" else None for kind in kinds]


# -- the trial -----------------------------------------------------------------------------------------------------------
class Steps(Trial):
    """A row of a composition beside one of the base, in two steps, against each alone in one pass."""

    LENGTHS = (5, 3)

    def __init__(self, served: Served, group: Group) -> None:
        super().__init__(served.host)
        self.served, self.groups = served, [group, ()]
        self.tokens = [self.ids(n).to(self.host.adapter_device) for n in self.LENGTHS]
        for call in (self.host.methods[name].invocation for name in group):
            if call:  # at the start, so that it acts on the whole row
                rest, invocation = self.tokens[0], torch.tensor(call).to(self.tokens[0])
                self.tokens[0] = torch.cat((invocation, rest[~torch.isin(rest, invocation)]))

    def run(self) -> HeadForm:
        """What the model does to its head's output; and whether lean steps give the same. UnsupportedError where plain ones
        give something else."""
        name = type(self.host.base).__name__
        advice = "Serve it through generate, in batches."
        with self.quiet(), torch.no_grad(), self.disturbed(self.groups):
            wanted, form = self.alone()
            if not bool(torch.isfinite(wanted).all()):
                names = "+".join(self.groups[0]) or "no adapter"
                raise AdapterError(
                    f"Under {names} the logits of {name} are no finite numbers. Train it anew, or load it again."
                )
            if form is None:
                raise UnsupportedError(f"{name} makes its logits in an unknown way. {advice}")
            before, self.served.form = self.served.form, form
            try:
                found = self.steps(lean=False)
                self.try_lean(wanted)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
                raise UnsupportedError(f"{name} could not be tried out step by step ({error}). {advice}") from error
            finally:
                self.served.form = before
        if not self.near(found, wanted):
            off, most = float((found - wanted).abs().max()), float(wanted.abs().max())
            raise UnsupportedError(
                f"{name}: steps give other values than whole passes (by {off:.1e} of {most:.1e}). {advice}"
            )
        return form

    def near(self, found: Tensor, wanted: Tensor) -> bool:
        most = wanted.abs().max()
        return bool((found - wanted).abs().max() <= (1e-4 if self.precise else 0.1) * most + 1e-6)

    def try_lean(self, wanted: Tensor) -> None:
        """Let steps of this kind go by the lean form, if that gives the same."""
        kinds, kind = self.served.lean.kinds, kind_of(self.host, self.groups[0])
        try:
            same = self.near(self.steps(lean=True), wanted)
        except Exception as error:  # whatever it is, the base's own layers do it
            log.info("%s is served by its own layers: %r", type(self.host.base).__name__, error)
            same = False
        kinds.add(kind) if same else kinds.discard(kind)

    def alone(self) -> tuple[Tensor, HeadForm | None]:
        """Logits [2, R, V] of the last two tokens of each row, and how the model made them."""
        made, form = [], None
        for group, ids in zip(self.groups, self.tokens, strict=True):
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "return_dict": True}
            now, output = run(self.host, Plan(self.host.switch, group), inputs, probe=Probe(None))
            assert now.raw is not None
            softcap = getattr(decoder_config(self.host.base), "final_logit_softcapping", None)
            form = HeadForm.recognise(now.raw, output.logits, softcap)
            made.append(output.logits[0, -2:].float())
        return torch.stack(made, dim=1), form

    def steps(self, lean: bool) -> Tensor:
        """The same step by step, by the base's lean form or its own layers."""
        self.served.lean.forced = lean
        try:
            return self._steps()
        finally:
            self.served.lean.forced = None

    def _steps(self) -> Tensor:
        cache, starts = PlainCache(self.served), []
        for row, group in enumerate(self.groups):
            front = self.served.front(group)
            cache.join(row, front)
            starts.append(front.length)
        made = []
        for part in (slice(0, -1), slice(-1, None)):
            rows = [Row(g, ids[part], s) for g, ids, s in zip(self.groups, self.tokens, starts, strict=True)]
            made.append(self.served.step(rows, cache.over([(i, len(row.tokens)) for i, row in enumerate(rows)])).float())
            starts = [row.start + len(row.tokens) for row in rows]
        return torch.stack(made)
