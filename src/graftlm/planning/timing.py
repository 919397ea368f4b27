"""The time of a run, from its operations and the rates that this machine was seen to reach.

A range: at best every product runs as the fastest one did; at worst half as slow again as the measured whole steps.
"""

from __future__ import annotations

from typing import Any

from ..data.packing import first_fit
from ..layers.frozen import KINDS
from ..quantization import quantized_kind
from ..training.measuring import SAMPLE_TOKENS
from ..training.schema import Recipe
from .machine import Machine
from .rows import Part, Rows
from .sizes import Sizes, base_ids
from .skeleton import Skeleton

SLOWEST = 1.5
DISK = 2e8  # bytes a second at which files are written, at least


def steps_an_epoch(recipe: Recipe, rows: Rows) -> int:
    """Batches, or packs, that the rows make."""
    t = recipe.training
    if t.packing:
        return round(rows.train.share * len(first_fit(rows.train.lengths, t.tokens, t.seed))) or 1
    return -(-rows.train.count // (t.batch_size or 1))


def updates(recipe: Recipe, rows: Rows) -> int:
    """Optimizer steps of a run."""
    t = recipe.training
    return t.max_steps or max(round(-(-steps_an_epoch(recipe, rows) // t.accumulation) * (t.epochs or 1)), 1)


def run_times(recipe: Recipe, rows: Rows, made: Skeleton, size: Sizes, own: Machine) -> tuple[float, float, float]:
    """Seconds of a run, with its evaluations and saves, without starting and loading: the least, expected, the most.

    Of a frozen base every weight takes 2 operations a token forward and 2 backward, again 2 where activations are computed
    again; the head takes them for labelled tokens only. Of adapters in the last blocks alone the forward pass is counted.
    """
    t = recipe.training
    total = updates(recipe, rows)
    steps = total * t.accumulation
    epochs = steps / steps_an_epoch(recipe, rows)
    last = recipe.method == "adaption-prompt" or "layers_to_transform" in recipe.method_options
    passes = (2 if last else 4) + 2 * bool(t.gradient_checkpointing)
    blocks = blocks_of(made.config)
    often = {"no": 0, "epoch": epochs, "steps": total / t.interval}
    checks = (2 + often[t.eval_strategy]) if rows.held.count else 0
    batches = -(-rows.held.count // t.eval_batch_size)
    work = epochs * operations_of(made, rows.train, passes) + checks * operations_of(made, rows.held, 2)
    samples = 2 * SAMPLE_TOKENS * (rows.held.count > 0 and rows.prompts)
    calls = blocks * (steps * passes / 4 + (checks * batches + samples) / 3)  # forward alone: a third of a step
    saves = (often[t.save_strategy] + 1) * size.checkpoint / DISK
    expected = work / own.step_operations + calls * own.block_seconds + saves
    least = work / max(own.operations, own.step_operations) + calls * own.block_seconds / 2
    return min(least, expected), expected, SLOWEST * expected


def step_time(recipe: Recipe, rows: Rows, made: Skeleton, own: Machine) -> float:
    """Seconds that a step is expected to take, the mean over the rows."""
    passes = 4 + 2 * bool(recipe.training.gradient_checkpointing)
    work = operations_of(made, rows.train, passes) / steps_an_epoch(recipe, rows)
    return work / own.step_operations + blocks_of(made.config) * own.block_seconds * passes / 4


def operations_of(made: Skeleton, rows: Part, passes: int) -> float:
    """Operations of `passes` / 2 passes over rows: the base's products, the head's, and attention's two."""
    config = made.config
    width: Any = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or getattr(config, "d_model", 0)
    head = config.vocab_size * width if made.model.base.get_output_embeddings() is not None else 0
    attention = 2 * blocks_of(config) * width * rows.pairs
    return passes * (multiplied(made.model) * rows.tokens + head * rows.labelled + attention)


def blocks_of(config: Any) -> int:
    """Layers, of both halves where there are two."""
    names = ("num_hidden_layers", "num_layers", "n_layer")
    blocks = next((v for n in names if isinstance(v := getattr(config, n, None), int)), 1)
    return blocks + (getattr(config, "num_decoder_layers", None) or 0)


def multiplied(host: Any) -> int:
    """Weights of the base that every token is multiplied by: those of linear layers, without the head (labelled tokens)."""
    wanted, head = base_ids(host), host.base.get_output_embeddings()
    layers: list[Any] = [m for m in host.base.modules() if isinstance(m, KINDS["linear"]) and m is not head]
    own = {id(m.weight): m for m in layers if id(m.weight) in wanted}.values()
    return sum(m.in_features * m.out_features if quantized_kind(m) else m.weight.numel() for m in own)
