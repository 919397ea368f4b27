"""Measures on held-out data: loss and perplexity over labelled tokens, exact-match accuracy for label tasks.

B rows, T tokens. Batches hold rows of about equal length; what comes back is in the order of the data.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..architectures import end_ids
from ..data import CausalLMCollator, Format, Seq2SeqCollator, get_format, prepare
from ..errors import DataError
from ..modes import evaluating
from .meters import IGNORE_INDEX, perplexity

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LABEL_FORMAT = "label"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, and for label tasks what was generated.

    Attributes:
        metrics: `loss` (nats a labelled token), `perplexity`, `accuracy` (None where the data has no labels),
            `tokens` (labelled tokens), `examples`.
        prompts, targets, outputs: texts, row by row; empty without generation.
    """

    metrics: dict[str, Any]
    prompts: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, format: str | Format | None = None, **options: Any
) -> dict[str, Any]:
    """The metrics of `evaluation`, whose arguments it takes."""
    return evaluation(model, tokenizer, dataset, format, **options).metrics


def evaluation(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    format: str | Format | None = None,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    accuracy: bool | None = None,
    truncation: str = "end",
    **options: Any,
) -> Evaluation:
    """Measure a language model (causal or encoder-decoder, with adapters or without) on a data set.

    Args:
        dataset: one split, raw (it is tokenised by `format`) or already prepared (columns `input_ids` and `labels`; then
            only the loss is measured).
        format: name or object; None guesses it from the columns.
        batch_size: rows a batch.
        max_new_tokens: longest answer that is generated for the accuracy; None takes the longest reference plus its end.
        accuracy: generate greedily up to the end token and compare with the label; None does it for the format `label`.
        truncation: what is cut from examples over the limit, "end" or "prompt".
        options: `columns`, `max_length` and other fields of the format.

    Raises:
        DataError: a data set without rows, or what `prepare` raises.
    """
    if isinstance(dataset, dict):
        raise DataError(f"evaluate needs one split, got all of {list(dataset)}; pass data['test'], for example")
    if not len(dataset):
        raise DataError("the data set to evaluate on is empty")
    seq2seq = is_encoder_decoder(model)
    if {"input_ids", "labels"} <= set(dataset.column_names):
        return Evaluation(metrics=loss_metrics(model, tokenizer, dataset, batch_size, seq2seq) | {"accuracy": None})
    columns = options.pop("columns", None)
    fmt = get_format(format, available=dataset.column_names, columns=columns, **options).bind(dataset)
    truncation = "end" if fmt.name == "chat" else truncation
    with no_bars():
        prepared = prepare(dataset, tokenizer, fmt, truncation=truncation, seq2seq=seq2seq)  # type: ignore[arg-type]
    right: set[int] = set()
    metrics = loss_metrics(model, tokenizer, prepared, batch_size, seq2seq, right) | {"accuracy": None}
    if not (fmt.name == LABEL_FORMAT if accuracy is None else accuracy):
        return Evaluation(metrics=metrics)
    with no_bars():
        rows = prepare(dataset, tokenizer, fmt, seq2seq=seq2seq, for_generation=True)
    targets = list(rows["target"])
    known = known_answers(prepared, rows, right) if greedy_only(model) and max_new_tokens is None else {}
    outputs = answers(model, tokenizer, rows, fmt, batch_size, max_new_tokens, known)
    hits = sum(o.strip() == t.strip() for o, t in zip(outputs, targets, strict=True))
    metrics["accuracy"] = hits / len(targets)
    return Evaluation(metrics=metrics, prompts=tuple(rows["prompt"]), targets=tuple(targets), outputs=tuple(outputs))


@contextmanager
def no_bars() -> Iterator[None]:
    """Within the block `datasets` draws no progress bars."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of about equal length, longest first (so that a lack of memory shows at once)."""
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: expected at least 1")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def loss_metrics(
    model: Any, tokenizer: PreTrainedTokenizerBase, prepared: Any, batch_size: int, seq2seq: bool,
    right: set[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`loss`, `perplexity`, `tokens` and `examples` of prepared rows.

    right: gets the numbers of the rows whose every labelled token is the likeliest one, where it can be told.
    """
    rows = [{k: row[k] for k in ("input_ids", "attention_mask", "labels") if k in row} for row in prepared]
    collator: Any = Seq2SeqCollator(tokenizer) if seq2seq else CausalLMCollator(tokenizer)
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for batch in by_length([len(r["input_ids"]) for r in rows], batch_size):
            made = collator([rows[i] for i in batch])
            inputs = {k: v.to(device_of(model)) for k, v in (made if seq2seq else without_first(made)).items()}
            labels = inputs["labels"] if seq2seq else inputs["labels"][:, 1:]
            count = int(labels.ne(IGNORE_INDEX).sum())
            if count:
                loss, likeliest = summed_loss(model, inputs, labels, count, told=right is not None)
                total, tokens = total + loss, tokens + count
                if right is not None and likeliest is not None:
                    right.update(batch[i] for i in likeliest.nonzero()[:, 0].tolist())
    if not tokens:
        raise DataError("no labelled token in the data set: there is nothing to measure a loss on")
    loss = total / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens, "examples": len(rows)}


def summed_loss(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, count: int, told: bool = False
) -> tuple[float, torch.Tensor | None]:
    """The losses of `count` labelled tokens, added up; of a causal model only the logits at such places are made.

    labels: [B, T], what each place is compared with (of a causal model [B, T - 1], for the places but the last).
    Beside it, bool [B]: the rows whose labelled tokens are all the likeliest ones; None where the logits are not at hand.
    told: that is wanted (see `places_kept`).
    """
    places = places_kept(model, labels, told)
    if places is not None:
        given = {k: v for k, v in inputs.items() if k != "labels"}
        logits = model(**given, logits_to_keep=places).logits
        if logits.shape[1] == len(places):
            wanted = labels[:, places]
            likeliest = (logits.argmax(-1).eq(wanted) | wanted.eq(IGNORE_INDEX)).all(1)
            return float(F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")), likeliest
    return float(model(**inputs).loss) * count, None


MOST_LOGITS = 1 << 26  # that are held to tell which rows are right: 256 MiB in fp32


def places_kept(model: Any, labels: torch.Tensor, told: bool) -> torch.Tensor | None:
    """The places whose logits a causal model is asked for, to take the loss of labels [B, T] from them; None where the model
    makes the loss itself. It does, in tiles, where most places have a label in some row; those logits are held all the same
    where it is to be told which rows are right (each of these needs no generation), unless they are over `MOST_LOGITS`."""
    places = labels.ne(IGNORE_INDEX).any(0).nonzero()[:, 0]
    if not usual_loss(model) or len(places) == labels.shape[1]:
        return None
    held = len(labels) * len(places) * model.config.get_text_config().vocab_size
    return places if 2 * len(places) < labels.shape[1] or (told and held <= MOST_LOGITS) else None


def usual_loss(model: Any) -> bool:
    """Whether a model's loss is that of the next token, and it can be asked for some places' logits."""
    name = getattr(getattr(model, "loss_function", None), "__name__", "")
    return name == "ForCausalLMLoss" and "logits_to_keep" in inspect.signature(model.forward).parameters


def without_first(batch: dict[str, Any]) -> dict[str, Any]:
    """A causal batch without the label of each row's first real token [B, T].

    Nothing stands before that token, or only padding, so a loss on it would mean something else with each method.
    """
    mask = batch["attention_mask"]
    first = mask.cumsum(-1).eq(1) & mask.bool()
    return batch | {"labels": batch["labels"].masked_fill(first, IGNORE_INDEX)}


@dataclass(frozen=True)
class FirstTokenMasked:
    """A collator whose batches carry no label on a row's first token."""

    collator: Any

    def __call__(self, rows: Any) -> dict[str, Any]:
        return without_first(self.collator(rows))


def known_answers(prepared: Any, rows: Any, right: set[int]) -> dict[int, list[int]]:
    """What greedy generation writes after some prompts, end token and all, by the loss's own pass: the labels that all were
    the likeliest tokens.

    prepared, rows: the same examples with their answers, and as prompts; right: numbers of such rows.
    """
    if len(prepared) != len(rows):  # some were dropped
        return {}
    whole, labels, prompts = prepared["input_ids"], prepared["labels"], rows["input_ids"]
    found = {i: [x for x in labels[i] if x != IGNORE_INDEX] for i in right}
    return {i: answer for i, answer in found.items() if list(whole[i]) == [*prompts[i], *answer]}


# Fields of a generation configuration that change nothing about which token greedy search takes.
IDLE = {
    "transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation",
}  # fmt: skip


def greedy_only(model: Any) -> bool:
    """Whether greedy generation takes the likeliest token at every place: nothing penalises, forbids or forces one."""
    config = getattr(model, "generation_config", None)
    return config is not None and not {k for k, v in config.to_diff_dict().items() if v} - IDLE


def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, fmt: Format, batch_size: int, max_new_tokens: int | None,
    known: dict[int, list[int]] | None = None,
) -> list[str]:  # fmt: skip
    """Greedy answers to prepared prompts (columns `input_ids`, `target`), each up to its end token.

    known: token ids of the answers, by row, that need not be generated; those without an end token are, all the same.
    """
    if max_new_tokens is None:
        longest = max(len(ids) for ids in tokenizer(list(rows["target"]), add_special_tokens=False)["input_ids"])
        max_new_tokens = longest + 1
    others = getattr(tokenizer, "answer_end_ids", None) or []
    ends = [fmt.end_token_id(tokenizer), tokenizer.eos_token_id, *others, *end_ids(model)]
    stops = {e for e in ends if e is not None}
    found = {i: until(ids, stops) for i, ids in (known or {}).items() if stops.intersection(ids)}
    prompts = list(rows["input_ids"])
    left = [i for i in range(len(prompts)) if i not in found]
    made = generate_ids(
        model, tokenizer, [prompts[i] for i in left], batch_size=batch_size, do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
    )  # fmt: skip
    found.update(zip(left, made, strict=True))
    return [tokenizer.decode(found[i], skip_special_tokens=True) for i in range(len(prompts))]


def generate_ids(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], *, batch_size: int = 8, **options: Any
) -> list[list[int]]:
    """New token ids after each prompt's ids, cut before the end token. `options` go to `generate`."""
    seq2seq = is_encoder_decoder(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options.setdefault("pad_token_id", pad)
    ends = options.get("eos_token_id", tokenizer.eos_token_id)
    stops = set(ends if isinstance(ends, (list, tuple)) else [ends])
    found: dict[int, list[int]] = {}
    with evaluating(model), torch.inference_mode():
        for batch in by_length([len(p) for p in prompts], batch_size):
            ids, mask = left_padded([prompts[i] for i in batch], pad or 0, right=seq2seq)
            device = device_of(model)
            made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
            per_prompt = len(made) // len(batch)
            new = made[::per_prompt, 1 if seq2seq else ids.shape[1] :].tolist()
            found.update((i, until(row, stops)) for i, row in zip(batch, new, strict=True))
    return [found[i] for i in range(len(prompts))]


def until(ids: list[int], stops: set) -> list[int]:
    """The ids in front of the first end token."""
    return next((ids[:i] for i, token in enumerate(ids) if token in stops), ids)


def left_padded(prompts: Sequence[Sequence[int]], pad: int, right: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both int64 [B, T]; padded on the left (encoder inputs: on the right)."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if right else slice(width - len(prompt), width)
        ids[row, place] = torch.tensor(list(prompt))
        mask[row, place] = 1
    return ids, mask


def generate_texts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, batch_size: int = 8, **options: Any
) -> list[str]:
    """What the model writes after each prompt, without the prompt and up to the end token.

    Args:
        prompts: texts; batched by length, padded on the left.
        options: of transformers' `generate` (`max_new_tokens`, `do_sample`, …); greedy, 64 new tokens where nothing is said.

    Raises:
        DataError: a prompt without tokens.
    """
    options = {"max_new_tokens": 64, "do_sample": False} | options
    encoded = [list(tokenizer(text)["input_ids"]) for text in prompts]
    empty = [i for i, ids in enumerate(encoded) if not ids]
    if empty:
        raise DataError(f"prompts {empty} have no tokens; give at least one word each")
    if not encoded:
        return []
    found = generate_ids(model, tokenizer, encoded, batch_size=batch_size, **options)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
