"""The time of a run, from its operations and the rates that this machine was seen to reach.

What a step computes is counted when it is traced; how fast products, other operations and calls are is measured once.
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
from .step import Work

LEAST, SLOWEST = 0.7, 1.5  # of what is expected, the range
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


def run_times(
    recipe: Recipe, rows: Rows, made: Skeleton, size: Sizes, own: Machine, work: Work
) -> tuple[float, float, float]:
    """Seconds of a run, with its evaluations and saves, without starting and loading: the least, expected, the most.

    Args:
        work: of the step of the longest rows.
    """
    t = recipe.training
    total = updates(recipe, rows)
    steps = total * t.accumulation
    often = {"no": 0, "epoch": steps / steps_an_epoch(recipe, rows), "steps": total / t.interval}
    checks = (2 + often[t.eval_strategy]) if rows.held.count else 0
    batches = -(-rows.held.count // t.eval_batch_size)
    samples = 2 * SAMPLE_TOKENS * (rows.held.count > 0 and rows.prompts)
    # a forward pass has a third of a step's calls, and moves a third of its bytes
    passes = seconds_of(Work(0, work.moved / 3, work.calls / 3, work.tokens), own)
    evaluations = checks * (operations_of(made, rows.held, 2) / own.step_operations + batches * passes)
    saves = (often[t.save_strategy] + 1) * size.checkpoint / DISK
    training = steps * step_time(recipe, rows, made, own, work)
    expected = training + evaluations + samples * passes + saves
    return LEAST * expected, expected, SLOWEST * expected


def step_time(recipe: Recipe, rows: Rows, made: Skeleton, own: Machine, work: Work) -> float:
    """Seconds that a step is expected to take, the mean over the rows.

    Of what the step of the longest rows computes, that is less which other rows have less of: 2 operations for every weight
    and token forward and 2 backward, again 2 where activations are computed again; the head's for labelled tokens only.
    """
    passes = 4 + 2 * bool(recipe.training.gradient_checkpointing)
    steps = steps_an_epoch(recipe, rows)
    mean = rows.train.tokens / steps
    share = min(mean / max(work.tokens, 1), 1.0)
    usual = operations_of(made, rows.train, passes) / steps
    longest = usual / share
    operations = max(work.operations - (longest - usual), min(usual, work.operations) * share)
    return seconds_of(Work(operations, work.moved * share, work.calls, round(mean)), own)


def seconds_of(work: Work, own: Machine) -> float:
    """The time of products, of all else by the bytes that it moves, and of calls."""
    return work.operations / own.step_operations + work.moved / own.bandwidth + work.calls * own.call_seconds


def operations_of(made: Skeleton, rows: Part, passes: int) -> float:
    """Operations of `passes` / 2 passes over rows: the base's products (a decoder's that follows an encoder are over the
    labels), the head's, and attention's two."""
    config = made.config
    width: Any = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or getattr(config, "d_model", 0)
    head = config.vocab_size * width if made.model.base.get_output_embeddings() is not None else 0
    attention = 2 * blocks_of(config) * width * rows.pairs
    base = multiplied(made.model, made.model.base)
    decoder = base - multiplied(made.model, made.model.base.get_encoder()) if config.is_encoder_decoder else 0
    return passes * ((base - decoder) * rows.tokens + (decoder + head) * rows.labelled + attention)


def blocks_of(config: Any) -> int:
    """Layers, of both halves where there are two."""
    names = ("num_hidden_layers", "num_layers", "n_layer")
    blocks = next((v for n in names if isinstance(v := getattr(config, n, None), int)), 1)
    return blocks + (getattr(config, "num_decoder_layers", None) or 0)


def multiplied(host: Any, part: Any) -> int:
    """Weights of a part of the base that its tokens are multiplied by: those of linear layers, without the head (labelled
    tokens)."""
    wanted, head = base_ids(host), host.base.get_output_embeddings()
    layers: list[Any] = [m for m in part.modules() if isinstance(m, KINDS["linear"]) and m is not head]
    own = {id(m.weight): m for m in layers if id(m.weight) in wanted}.values()
    return sum(m.in_features * m.out_features if quantized_kind(m) else m.weight.numel() for m in own)
