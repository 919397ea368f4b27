"""Memory of a training step, by kind, from a pass of the engine over fake tensors.

Of many blocks that are all alike a few are run, and what grows by block is carried on to all; else all of them run.
Short cuts (packed rows, the loss in tiles) are tried out on a model of the same kind with tiny widths, as training tries
them out on the base itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.fast import speed_up
from ..errors import GraftError, PlanError
from ..kernels import linear
from ..model import PeftModel
from ..preparation import enable_checkpointing
from ..training.bases import auto_class
from ..training.schema import Recipe
from .allocators import STATES, CudaCache, Training, held_in_training, within
from .glibc import Heap
from .sizes import bytes_of, sizes
from .skeleton import Skeleton, attached, config_of, skeleton, without_quantization
from .tracing import Account

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "encoder_layers", "decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
INNER = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim")
HEADS = ("head_dim", "kv_channels", "d_kv")
VOCABULARY = ("vocab_size", "padded_vocab_size")
ALL = 12  # blocks up to which all are run: what a heap holds under checkpointing grows with them
TINY = {**dict.fromkeys(LAYERS, 2), **dict.fromkeys(INNER, 64), **dict.fromkeys(HEADS, 8), **dict.fromkeys(VOCABULARY, 512)}


@dataclass(frozen=True)
class Work:
    """What a step computes: operations of products, bytes that all else reads and writes, calls, tokens of its batch."""

    operations: float
    moved: float
    calls: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a step, all alive at its highest moment but `loss`.

    Attributes:
        base, adapter, gradients, optimizer: weights, and what training keeps beside those it trains.
        kept: activations kept for the backward pass.
        workspace: what else is alive at the highest moment of the forward or backward pass.
        allocator: what the allocator holds besides, between storages that come and go (see `allocators`).
        loss: highest in head and loss, above what was alive before (it counts where it is the highest moment).
        work: of the step.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    kept: int
    workspace: int
    allocator: int
    loss: int
    work: Work

    @property
    def total(self) -> int:
        weights = self.base + self.adapter + self.gradients + self.optimizer
        return weights + self.kept + self.workspace + self.allocator


@dataclass(frozen=True)
class Heights:
    """What one traced step shows, in bytes above the weights: kept activations; highest in forward and backward pass; in the
    loss; held by the allocator (without AdamW's states). Its work: operations, bytes moved, calls. And what the allocator
    holds as a share of the highest."""

    kept: float
    highest: float
    loss: float
    held: float
    operations: float = 0
    moved: float = 0
    calls: float = 0
    share: float = 0

    def at(self, other: Heights, blocks: float) -> Heights:
        """Carried on by `blocks` times the difference to `other`, which has one unit more; of what the heap holds the mean
        is taken: how storages come to lie there is chance, and a difference carried on would be many times that chance."""
        made = Heights(*(max(a + blocks * (b - a), 0) for a, b in zip(astuple(self), astuple(other), strict=True)))
        return replace(made, share=(self.share + other.share) / 2)


def step_memory(
    recipe: Recipe, batch: dict[str, Tensor], config: Any = None, path: str = "", whole: Skeleton | None = None,
    forms: ShortCuts | None = None, gpu: Training | None = None,
) -> StepMemory:  # fmt: skip
    """The memory of a step on a batch.

    Args:
        batch: `input_ids`, `labels` and perhaps `attention_mask`, `position_ids`, as the collator gives them.
        config: of the base, in place of the recipe's.
        whole: the recipe's skeleton, where there is one already.
        forms: which short cuts hold, where it is known.
        gpu: how a GPU trains it; None: a CPU does.

    Raises:
        PlanError: this model cannot be run over fake tensors.
    """
    if config is None:
        config, path = config_of(recipe)
    whole = whole or skeleton(recipe, config, path)
    try:
        forms = forms or short_cuts(recipe, config)
        found = heights(recipe, whole, batch, forms, gpu)
    except GraftError:
        raise
    except Exception as error:
        raise PlanError(
            f"the memory of a step of {config.model_type} with {recipe.method} cannot be planned: its pass does not run "
            f"over tensors without values ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    size = sizes(whole)
    trained = [p for p in whole.model.parameters() if p.requires_grad]
    gradients = sum(map(bytes_of, trained))
    if gpu:
        beyond = found.held - found.highest
    else:
        others = found.highest + STATES * gradients
        held = found.share * found.highest + STATES * gradients
        beyond = max(held, timed_products(whole.dtype)) - others
    return StepMemory(
        base=size.base_bytes, adapter=size.adapter_bytes, gradients=gradients, optimizer=2 * gradients,
        kept=round(found.kept), workspace=max(round(found.highest - found.kept) - gradients, 0),
        allocator=max(round(beyond), 0), loss=round(found.loss),
        work=Work(found.operations, found.moved, found.calls, tokens_of(batch)),
    )  # fmt: skip


def tokens_of(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch, without padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


# -- tracing --------------------------------------------------------------------------------------------------------------
def heights(
    recipe: Recipe, whole: Skeleton, batch: dict[str, Tensor], forms: ShortCuts, gpu: Training | None = None
) -> Heights:
    """Those of a step of the whole model."""
    every = max(int(recipe.training.gradient_checkpointing), 1)
    return of_all_blocks(recipe, whole, lambda found: traced(recipe, found, batch, forms, gpu), 2 * every, every)


def of_all_blocks(recipe: Recipe, whole: Skeleton, traced: Callable[[Skeleton], Heights], few: int, more: int) -> Heights:
    """Heights of the whole model: of many blocks that are all alike those of `few`, carried on by what `more` of them add.
    The skeletons are used up."""
    config = whole.config
    blocks = block_count(config)
    if blocks > ALL and alike(whole.model):
        for first in (few, few + 2 * more):  # LLaMA-Adapter leaves the lowest two blocks out
            if blocks > first + more and (pair := smaller(recipe, whole, blocks, first, more)):
                low, high = map(traced, pair)
                return low.at(high, (blocks - first) / more)
    return traced(skeleton(recipe, config, whole.path))


def smaller(recipe: Recipe, whole: Skeleton, blocks: int, few: int, more: int) -> list[Skeleton]:
    """Skeletons of `few` blocks and of `more` besides; none where the adapter does not grow by block as it does from there
    to the whole model's, or has no place on so few."""
    try:
        found = [skeleton(recipe, with_layers(whole.config, n)) for n in (few, few + more)]
    except GraftError:
        return []
    low, high, all_of_them = (trained_in(each.model) for each in (*found, whole))
    return found if (high - low) * (blocks - few) == (all_of_them - low) * more else []


def trained_in(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def block_count(config: Any) -> int:
    return next((getattr(config, k) for k in LAYERS if getattr(config, k, None)), 0)


def with_layers(config: Any, count: int) -> Any:
    """The configuration with fewer layers."""
    made = copy.deepcopy(config)
    if isinstance(getattr(made, "layer_types", None), list):
        made.layer_types = made.layer_types[:count]
    for name in LAYERS:
        if getattr(made, name, None):
            setattr(made, name, count)
    return made


def alike(model: nn.Module) -> bool:
    """Whether all blocks of each stack hold the same modules and tensors (T5's first one has a table more)."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    if kinds and len(set(kinds)) > 1:
        return False
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 2 and not small(m)]
    return all(len({outline(block) for block in stack[1:]}) == 1 for stack in map(list, stacks))


def small(stack: nn.ModuleList) -> bool:
    """Whether a list is within a block (T5's halves)."""
    return len(stack) <= 3 and all(not list(m.children()) for m in stack)


def outline(block: nn.Module) -> tuple:
    """Kinds of modules, and shapes of tensors, of a block."""
    named = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
    return named, tuple((n, type(m).__name__) for n, m in block.named_modules())


def traced(
    recipe: Recipe, found: Skeleton, batch: dict[str, Tensor], forms: ShortCuts, gpu: Training | None = None
) -> Heights:
    """A step of a skeleton, traced; the skeleton is used up."""
    model, account = found.model, Account()
    checkpointing = recipe.training.gradient_checkpointing
    if checkpointing:
        options = {"use_reentrant": False} | ({"every_n_layers": int(checkpointing)} if int(checkpointing) > 1 else {})
        enable_checkpointing(model, options)
    model.train()
    account.take(model)
    if gpu is None:
        speed_up(model)  # fast forms go by where weights are, and so far these were on the meta device
    ways_known(found.dtype)
    model.entry.shortcuts.trials.forms = forms.forms
    model.entry.shortcuts.trials.divides = forms.divides
    model.lean = forms.lean
    loss_of, lost = model.entry.loss.of, [0]

    def watched(*args: Any) -> Any:
        start = account.live
        with account.peak() as top:
            made = loss_of(*args)
        lost[0] = top[0] - start
        return made

    model.entry.loss.of = watched
    trained = [bytes_of(p) for p in model.parameters() if p.requires_grad]
    with buffers_apart(), account:
        weights, before = account.live, list(account.events)
        with account.peak() as top:
            output = model(**batch)
            loss = output.loss
            del output
            kept = account.live - weights
            loss.backward()
        del loss
        account.end_graph()
        step = within(account.events[len(before) :])
    if gpu is None:
        held = held_in_training(Heap(), [], trained, step, Training())
    else:
        held = held_in_training(CudaCache(), before, trained, step, gpu) - weights
    held, highest = held - STATES * sum(trained), top[0] - weights
    work = account.operations, account.moved, account.calls
    return Heights(kept, highest, lost[0], held, *work, held / max(highest, 1))


def timed_products(dtype: torch.dtype) -> int:
    """Bytes of the weights on which ways of products are timed (`kernels.linear.way`) before and in the first step, whose
    storages take their place."""
    if dtype is not torch.float32 or not (linear.takes_stripes() or linear.onednn_multiplies(dtype)):
        return 0
    width, count = linear.timed_weights(dtype)
    return count * width * width * dtype.itemsize


def ways_known(dtype: torch.dtype) -> None:
    """Let the ways of products be timed on real tensors before fake ones ask for them."""
    for kind in {torch.float32, dtype}:
        for rows in linear.MAGNITUDES if kind is torch.float32 else linear.MAGNITUDES[:-1]:
            for transposed in (False, True):
                linear.way(kind, rows, transposed)
    linear.working_dtype(dtype, torch.device("cpu"))


@contextmanager
def buffers_apart() -> Iterator[None]:
    """Within the block the buffer in which 16-bit weights are multiplied is not the process's own."""
    before = vars(linear._kept).pop("buffer", None)
    try:
        yield
    finally:
        vars(linear._kept).pop("buffer", None)
        if before is not None:
            linear._kept.buffer = before


# -- short cuts -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ShortCuts:
    """Which short cuts of training hold.

    Attributes:
        forms, divides: what the engine's trials have shown (see `passes.shortcuts.Trials`).
        packs: rows can be packed on a CPU.
        flash: on a GPU they are tried too: its flash kernel could do all of the attention.
        lean: the engine takes any.
    """

    forms: dict[Any, Any]
    divides: bool
    packs: bool
    flash: bool = False
    lean: bool = True

    def on_gpu(self, dtype: torch.dtype) -> ShortCuts:
        """Those that hold on a GPU for a base in this dtype."""
        packs = self.packs and self.flash and dtype in (torch.float16, torch.bfloat16)
        forms = {key: form and replace(form, packs=form.packs and packs) for key, form in self.forms.items()}
        return replace(self, forms=forms, packs=packs)


def short_cuts(recipe: Recipe, config: Any) -> ShortCuts:
    """What trials show of a tiny model of this kind with the recipe's adapter.

    Raises:
        PlanError: there is no tiny model of this kind.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            model = tiny_model(recipe, config)
            model.try_out()
            trials, packing = model.entry.shortcuts.trials, model.entry.packing
            return ShortCuts(
                trials.forms, model.heeds_items(), model.can_pack(), packing.shares_virtual and packing.slopes is None
            )
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise PlanError(
            f"the memory of a step cannot be planned for {config.model_type}: no small model of its kind could be made to "
            f"see which short cuts hold ({type(error).__name__}: {error})"
        ) from error


def tiny_model(recipe: Recipe, config: Any) -> PeftModel:
    """A tiny model of two layers with the recipe's adapter; of all layers, where the adapter has no place on two."""
    loader = auto_class(config, recipe.task, recipe.base)

    def made(layers: int) -> PeftModel:
        base = loader.from_config(tiny(without_quantization(config), layers), dtype=torch.float32)
        return attached(recipe, base).train()

    try:
        return made(2)
    except GraftError:
        return made(block_count(config))


def tiny(config: Any, layers: int) -> Any:
    """A configuration of the same kind with tiny widths."""
    made = copy.deepcopy(config)
    heads = getattr(config, "num_attention_heads", None) or 4
    for name, value in {**TINY, **dict.fromkeys(WIDTHS, heads * 8)}.items():
        if isinstance(getattr(made, name, None), int):
            setattr(made, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(made, name, None), int):
            setattr(made, name, min(getattr(made, name), 511))
    return with_layers(made, layers)
