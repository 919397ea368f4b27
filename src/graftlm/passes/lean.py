"""Steps of a server by a family's lean form (`architectures.lean`), where nothing stands in the way; else by the base.

A composition goes this way after its kind was tried out beside the plain step (`Served.admit`). A stranger's hook, a merged
adapter, something of an adapter that the form does not know, autocast: such steps are the base's own.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..architectures.lean import Lean, lean
from ..layers.frozen import Frozen
from ..routing import Group, Plan, Routes, Scope, StepAttention, within
from .beside import Acting, RowsBeside, frozen_in
from .stack import KEPT, Stack

if TYPE_CHECKING:
    from ..adapters import AdapterSet


class LeanSteps:
    """The lean form of a host's base, and what is kept of its adapters.

    Attributes:
        kinds: of adapters, for which it was tried out and gives the same.
        forced: within a trial, whether steps go this way.
    """

    def __init__(self, host: AdapterSet) -> None:
        self.host = host
        self.kinds: set[str] = set()
        self._trusted: dict[Group, list[Any]] = {}  # compositions of such kinds, as their methods were
        self.forced: bool | None = None
        self._known = lean(host.base) is not None
        self._form: Lean | None = None
        self._frozen: list[Frozen] | None = None
        self._acting: OrderedDict[Group, Acting] = OrderedDict()
        self._stack = Stack()
        self._rows: OrderedDict[tuple, RowsBeside] = OrderedDict()

    def trust(self, *groups: Group) -> None:
        """Let rows of these compositions go this way from now on."""
        self._trusted |= {group: [self.host.methods[n] for n in group] for group in groups}

    def trusts(self, group: Group) -> bool:
        """Whether rows of a composition go this way: none where an adapter is another one than was tried out."""
        return group in self._trusted and all(
            self.host.methods.get(n) is method for n, method in zip(group, self._trusted[group], strict=True)
        )

    def form(self) -> Lean | None:
        """The form of the base as it stands now; None where steps are to be the base's own."""
        if not self._known or self.host.base.training:
            return None
        if self._form is None or not self._form.unchanged():
            own = {(id(h.hooks_dict_ref()), h.id) for handles in self.host.handles.values() for h in handles}
            self._form = lean(self.host.base, own)
            self._frozen = None if self._form is None else frozen_in(self._form)
            self.forget()
        form, frozen = self._form, self._frozen
        return form if form is not None and frozen is not None and form.free() and not any(f.folds for f in frozen) else None

    @torch.no_grad()
    def rows(self, groups: tuple[Group, ...], counts: tuple[int, ...]) -> RowsBeside | None:
        """What rows of these compositions with so many tokens do beside products; None where steps are the base's own."""
        if self.forced is False or (self.forced is None and not all(self.trusts(group) for group in set(groups))):
            return None
        if (form := self.form()) is None:
            return None
        key, different = (groups, counts), tuple(sorted(set(groups)))
        acting = [self._acts(form, group) for group in different]
        if not all(a.whole for a in acting):
            return None
        if key not in self._rows or not self._rows[key].current:
            of = [different.index(group) for group in groups]
            self._rows[key] = RowsBeside(self._stack, acting, of, counts, self.host.adapter_device)
        self._rows.move_to_end(key)
        while len(self._rows) > 2:
            self._rows.popitem(last=False)
        gone = [self._acting.popitem(last=False)[1] for _ in range(len(self._acting) - max(KEPT, len(different)))]
        if gone:
            self._stack.drop(gone)
        return self._rows[key]

    def slot(self, group: Group) -> int:
        """Where the low-rank updates of a composition lie; -1 where it has none, or is not known."""
        acting = self._acting.get(group)
        return self._stack.slots.index(acting) if acting is not None and acting in self._stack.slots else -1

    def _acts(self, form: Lean, group: Group) -> Acting:
        if group not in self._acting:
            self._acting[group] = Acting(self.host, form, group)
        self._acting.move_to_end(group)
        return self._acting[group]

    def step(
        self, rows: RowsBeside, plan: Plan, routes: Routes | None, ids: Tensor, places: Tensor, attention: StepAttention,
        last: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [R, H] of the rows' last tokens; ids and places [N]."""
        assert self._form is not None
        # it spares a tenth of what small operations take; not where something of an adapter's might be kept for later passes
        with within(Scope(plan, routes)), torch.inference_mode() if rows.low else torch.no_grad():
            return self._form(ids, places, attention, last, rows)

    def forget(self, *names: str) -> None:
        """Keep nothing of these adapters (of any)."""
        self._rows.clear()
        gone = [group for group in self._acting if not names or set(names) & set(group)]
        self._stack.drop([self._acting.pop(group) for group in gone])
        self._trusted = {g: methods for g, methods in self._trusted.items() if all(n in self.host.methods for n in g)}
