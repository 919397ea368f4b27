"""Several runs over one frozen base at the same time, each exactly as if it were alone.

Every run is a whole run (`recipes.run`): its own wrapper, data, batches, optimizer, schedule, clipping, evaluation,
checkpoints, early stop. They are greenlets: one of them runs at a time, in one thread. A run that comes to a training pass
waits; when all of them wait, one joint pass over all their batches gives every run its loss and its gradients::

    run a   data  pass......  clip  step  data  pass......  clip  step  evaluate  data  pass…
    run b         pass......  clip  step  data  pass......  clip  step  data            pass…
    pass          a and b in one batch          a and b in one batch                    a and b

Random numbers are a run's own: torch's, numpy's and Python's generators change with the run that goes on, and in the joint
pass each run's dropout comes from its own. (Only the base's own dropout is drawn for all rows at once.)

Among several processes each has its share of every run's rows. All of them go through the same turns and passes, so what
decides about these is agreed on; an error that one process meets alone ends all of them.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..architectures import base_modules
from ..errors import GraftError, RecipeError
from ..joint import Share, adapters_drop, dropout_off, joinable, joint_losses
from ..kernels import release_freed_memory
from ..mixing import plan_of
from ..routing import Draws, Plan, Switch, running
from .bases import resolve_base
from .callbacks import Request, TrainingInterrupted
from .evaluation import Evaluation
from .measuring import measure
from .members import Member, Outcome, State
from .meters import memory_now, peak_memory, real_tokens, reset_peak_memory
from .results import RunResult
from .runs import made_ready, over, run
from .schema import Recipe
from .setup import RunData
from .surroundings import interrupts_go_to, join_processes, only_the_first_speaks, threads

log = logging.getLogger(__name__)

# What all runs over one base must have in common.
COMMON = (
    "base", "quantization", "task", "dtype", "training.threads", "training.gradient_checkpointing", "training.prepacked",
    "training.strategy",
)  # fmt: skip


def common_parts(recipe: Recipe) -> tuple:
    """The values of `COMMON` in a recipe."""
    values = recipe.model_dump()
    sections = ((values[n.partition(".")[0]] if "." in n else values, n.rpartition(".")[2]) for n in COMMON)
    return tuple(section[key] for section, key in sections)


class Together:
    """Runs over one base that train at the same time. Build it, `add` runs (also from a run's callback, while others train),
    then `run()`.

    Args:
        base, tokenizer: loaded; None loads the recipes' own.
        at_once: how many runs are active at a time; the others join when one ends. None: all.
        quiet: no lines of progress.
        say: what shows a line of progress; None prints it.
    """

    def __init__(
        self, base: Any = None, tokenizer: Any = None, *, at_once: int | None = None, quiet: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        if at_once is not None and at_once < 1:
            raise RecipeError(f"at_once={at_once}: expected at least 1")
        self.base, self.tokenizer = base, tokenizer
        self.at_once = at_once
        self.say = (lambda text: None) if quiet else say or print
        self.outcomes: list[Outcome] = []
        self.passes = {"joint": 0, "alone": 0}
        self._waiting: list[Member] = []
        self._live: list[Member] = []
        self._checked: dict[tuple[int, ...], bool] = {}
        self._baselines: dict[tuple[str, int, int], Evaluation | None] = {}
        self._interrupted = self._stopping = False  # asked for; and known to all processes
        self._floor = self._base_bytes = 0  # memory before the first run, and the base's part of it

    def add(
        self, recipe: Recipe, *, callbacks: Sequence[Any] = (), baseline: Evaluation | None = None,
        data: RunData | None = None, also: Callable[[Any, Any], dict[str, Any]] | None = None,
        done: Callable[[Outcome], None] | None = None, progress: bool = False,
    ) -> Outcome:  # fmt: skip
        """Take in a run; its outcome is filled in when it has ended, and then given to `done`. The rest as in `recipes.run`.

        Raises:
            RecipeError: another base, or form of it, than the other runs'; the output directory of another one.
        """
        self._check_common(recipe)
        outcome = Outcome(recipe)

        def work(member: Member) -> RunResult:
            return run(
                recipe, model=self.base, tokenizer=self.tokenizer, callbacks=callbacks, quiet=True,
                baseline=baseline or (self._baseline(recipe) if data is None else None), member=member, data=data, also=also,
                progress=progress,
            )  # fmt: skip

        self.outcomes.append(outcome)
        self._waiting.append(Member(outcome, work, done))
        return outcome

    def _baseline(self, recipe: Recipe) -> Evaluation | None:
        """What the plain base gives on the run's held-out rows, measured once for all runs that have the same."""
        key = recipe.data.model_dump_json(), recipe.training.eval_batch_size, recipe.training.seed
        if key not in self._baselines:
            with running(Plan(Switch(), ())):
                self._baselines[key] = measure(recipe, self.base, self.tokenizer)
        return self._baselines[key]

    def _check_common(self, recipe: Recipe) -> None:
        if recipe.training.torch_compile:
            raise RecipeError(
                f"training.torch_compile in the run of {recipe.output_dir}: it is for runs that train alone; leave it out"
            )
        if recipe.training.learning_rate == "search":
            raise RecipeError(
                f"training.learning_rate: search in the run of {recipe.output_dir}: runs that train together do not search. "
                "Run it alone, or search for all of them at once: graftlm compare --budget 10m"
            )
        for other in self.outcomes:
            for name, a, b in zip(COMMON, common_parts(recipe), common_parts(other.recipe), strict=True):
                if a != b:
                    raise RecipeError(
                        f"{name}: {a!r} in the run of {recipe.output_dir}, {b!r} in that of {other.recipe.output_dir}: runs "
                        "that train together share one base in one form"
                    )
            if recipe.output_dir == other.recipe.output_dir:
                raise RecipeError(f"output_dir: {recipe.output_dir!r} is that of two runs; give each its own")

    def run(self) -> list[Outcome]:
        """Train all runs to their ends.

        Raises:
            TrainingInterrupted: Ctrl-C; every run that had begun has saved its adapter and a checkpoint.
            BaseModelError, RecipeError: the base.
            UnsupportedError: several processes that do not find each other.
        """
        if not self.outcomes:
            return []
        join_processes()
        first = self.outcomes[0].recipe
        if self.base is None:
            self.base, self.tokenizer = resolve_base(
                first.base, task=first.task, dtype=first.dtype, quantization=first.quantization
            )
        over(self.base, first)
        made_ready(self.base, bool(first.training.gradient_checkpointing), quiet=True)
        gc.collect()
        release_freed_memory()
        self._floor, self._base_bytes = memory_now(), self.base.get_memory_footprint()
        with threads(first.training.threads), only_the_first_speaks(), interrupts_go_to(self._ask):
            while self._live or (self._waiting and not self._stopping):
                self._stopping = processes.anywhere(self._interrupted)
                self._fill()
                for member in list(self._live):
                    if member.request is None or member.request.answered:
                        self._turn(member)
                waiting = [m for m in self._live if m.request is not None]
                if waiting:
                    self._pass([m.request for m in waiting])  # type: ignore[misc]
        if first.training.gradient_checkpointing:
            getattr(self.base, "activation_checkpointing_disable", self.base.gradient_checkpointing_disable)()
        if self._stopping or processes.anywhere(self._interrupted):  # Ctrl-C may have come in the last runs' last turn
            raise TrainingInterrupted(
                "Stopped. Every run that had begun has saved its adapter and a checkpoint; the same recipes with resume go "
                "on from there."
            )
        return self.outcomes

    def _fill(self) -> None:
        """Let waiting runs join."""
        while self._waiting and not self._stopping and (self.at_once is None or len(self._live) < self.at_once):
            member = self._waiting.pop(0)
            member.base_bytes = self._base_bytes
            self._live.append(member)
            self.say(f"{member.outcome.recipe.output_dir}: starts")

    def _turn(self, member: Member) -> None:
        member.turn()
        if not member.ended:
            if self._stopping and not member.trainer.stop.asked:  # it was being set up then
                member.trainer.stop.ask()
            return
        self._live.remove(member)
        outcome = member.outcome
        if outcome.error is not None and processes.count() > 1 and not agreed(outcome.error):
            raise outcome.error
        if outcome.error is None:
            loss = outcome.result.metrics.get("loss") if outcome.result else None
            self.say(f"{outcome.recipe.output_dir}: done" + ("" if loss is None else f", held-out loss {loss:.4f}"))
        elif not isinstance(outcome.error, TrainingInterrupted):
            self.say(
                f"{outcome.recipe.output_dir}: failed, the others go on. {type(outcome.error).__name__}: {outcome.error}"
            )
        if member.done is not None:
            member.done(outcome)

    def _ask(self) -> None:
        """The handler of Ctrl-C: every run stops after its step; a second one interrupts at once."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        log.warning("Stopping every run after its step; checkpoints are saved. Ctrl-C again stops at once, without them.")
        for member in self._live:
            if member.trainer is not None and not member.trainer.stop.asked:
                member.trainer.stop.ask()

    # -- passes ------------------------------------------------------------------------------------------------------
    def _pass(self, requests: list[Request]) -> None:
        """One pass for all that can share it, one for each of the others."""
        shared = [r for r in requests if joinable(r.model, r.inputs) and self._of(r).peak_memory is not None]
        if len(shared) < 2 or not self._joins(shared):
            shared = []
        for request in requests:
            if request not in shared:
                self._alone(request)
        if shared:
            self._joint(shared)

    def _alone(self, request: Request) -> None:
        member = self._of(request)
        self.passes["alone"] += 1
        first, start = member.peak_memory is None, time.perf_counter()
        if first:
            release_freed_memory()
            reset_peak_memory()
            before = memory_now()
        with member.state.in_place():
            try:
                request.loss = request.trainer.own_step(request)
            except Exception as error:  # of this run only
                request.error = error
        if first:
            member.peak_memory = self._floor + max(peak_memory() - before, 0)
        member.charge(time.perf_counter() - start)

    def _joint(self, requests: list[Request]) -> None:
        members, start = [self._of(r) for r in requests], time.perf_counter()
        draws = [Draws(m.state.parts[0]) for m in members]
        shares = [Share(r.model, r.inputs, d, adapters_drop(r.model)) for r, d in zip(requests, draws, strict=True)]
        parameters = [p for r in requests for p in r.model.parameters() if p.requires_grad]
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        try:
            found = joint_losses(shares)
            losses = [] if found is None else [scaled(r, *own) for r, own in zip(requests, found, strict=True)]
            finite = [loss for loss in losses if bool(torch.isfinite(loss.detach()))]
            if finite:
                torch.stack(finite).sum().backward()
        except Exception as error:
            log.warning("A joint pass failed (%s); its runs go by themselves this time.", error)
            losses = []
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            found = []
        if found is None:  # not with these runs, at no step: no pass is begun for it again
            self._checked[self._key(requests)] = False
        if not losses:
            for request in requests:
                self._alone(request)
            return
        self.passes["joint"] += 1
        for request, member, draw, loss in zip(requests, members, draws, losses, strict=True):
            member.state.parts = (draw.state, *member.state.parts[1:])
            request.loss = loss.detach()
        sizes = [real_tokens(r.inputs) for r in requests]
        seconds = time.perf_counter() - start
        for member, size in zip(members, sizes, strict=True):
            member.charge(seconds * size / max(sum(sizes), 1))

    def _of(self, request: Request) -> Member:
        return next(m for m in self._live if m.request is request)

    def _key(self, requests: list[Request]) -> tuple[int, ...]:
        """A set of runs. (By their outcomes, which are kept; another model may come to lie where one has gone.)"""
        return tuple(id(self._of(r).outcome) for r in requests)

    def _joins(self, requests: list[Request]) -> bool:
        """Whether these runs' losses in a joint pass are those alone; tried once for each set of runs, without dropout."""
        base = requests[0].model.base
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for _, m in base_modules(base))
        if (checkpointed or base.device.type != "cpu") and any(adapters_drop(r.model) for r in requests):
            return False  # masks are made again in the backward pass, or come from a generator that all share
        key = self._key(requests)
        if key not in self._checked:
            found: bool | None = None
            try:
                found = self._agree(requests)
            except Exception as error:  # a batch that cannot be run: alone it fails its own run only
                log.warning("A joint pass failed (%s); its runs go by themselves this time.", error)
            every = processes.gathered(found)
            if None in every:
                return False
            self._checked[key] = all(every)
        return self._checked[key]

    def _agree(self, requests: list[Request]) -> bool:
        models = [r.model for r in requests]
        before = State.now()
        try:
            for model in models:
                if model.entry.shortcuts.form(plan_of(model)) is None:
                    return False
            with dropout_off(models), torch.no_grad():
                joint = joint_losses([Share(r.model, r.inputs) for r in requests])
                alone = [joint_losses([Share(r.model, r.inputs)]) for r in requests]
        finally:
            before.put()
        if joint is None or any(a is None for a in alone):
            log.warning("This base does not allow joint passes; runs take turns.")
            return False
        precise = models[0]._float_dtype() is torch.float32
        for (total, count), own in zip(joint, alone, strict=True):
            a, b = float(total) / max(count, 1), float(own[0][0]) / max(own[0][1], 1)  # type: ignore[index]
            # small losses are differences of large logits: their rounding does not shrink with them
            if abs(a - b) > (1e-4 * max(b, 1.0) if precise else 3e-2 * max(b, 0.1)):
                log.warning("A joint pass gives a loss of %.6f where it is %.6f alone; runs take turns.", a, b)
                return False
        return True


def agreed(error: BaseException) -> bool:
    """Whether all processes of a run meet this error at the same place, so that the other runs go on together."""
    return isinstance(error, (GraftError, TrainingInterrupted))


def scaled(request: Request, total: Tensor, count: int) -> Tensor:
    """A run's loss as its Trainer has it, from the sum over its labels."""
    penalty = request.model.penalty(request.model.switch.active)
    divisor = max(count, 1) if request.items is None else request.items
    return (total / divisor + (0.0 if penalty is None else penalty)) / request.parts


def train_together(
    recipes: Sequence[Recipe],
    *,
    model: Any = None,
    tokenizer: Any = None,
    at_once: int | None = None,
    quiet: bool = False,
    progress: bool = False,
) -> list[Outcome]:
    """Train the recipes' adapters at the same time over one base, each as `graftlm.training.run` would alone.

    Args:
        recipes: runs over one base; each with its own `output_dir`.
        model, tokenizer: a loaded base, else the recipes' own is loaded once.
        at_once: how many train at a time (memory grows with it); the others join as these end.
        quiet: no lines of progress.
        progress: write `progress.jsonl` into each output directory.

    Returns:
        An outcome each, in the order of the recipes: a result, or the error that ended that run alone.

    Raises:
        RecipeError: the recipes do not share a base, or share an output directory.
        TrainingInterrupted: Ctrl-C; all runs are saved, `resume` goes on.
    """
    if (model is None) != (tokenizer is None):
        raise RecipeError("train_together(model=…, tokenizer=…): give both, or neither")
    together = Together(model, tokenizer, at_once=at_once, quiet=quiet)
    for recipe in recipes:
        together.add(recipe, progress=progress)
    return together.run()
