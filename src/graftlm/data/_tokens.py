"""The one tokenise step: texts to token ids and labels.

    ids     prefix  prompt ...          answer ...      end
    labels  -100    -100 ...            answer ...      end        (-100 = no loss)

``prefix`` is what the tokenizer puts before every text (BOS, ``[gMASK] sop``), once at the start. The
documents call the tokenizer on prompt and answer separately; with BLOOM, which adds nothing, that gives the
same ids. With a tokenizer that adds BOS it would put a second BOS in the middle, so here the answer is
encoded without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftlm.data._pair import IGNORE_INDEX, End, Pair, end_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens:
    """A tokenizer with its leading and trailing special tokens known.

    Attributes: ``prefix`` and ``suffix`` are the ids that the tokenizer puts around every text;
    ``is_chatglm`` says that ``build_inputs_with_special_tokens(question, answer)`` is ``[gMASK] sop
    question answer eos``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        plain, full = self.plain("a"), list(tokenizer("a")["input_ids"])
        starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
        start = starts[0] if starts else 0
        self.prefix = full[:start]
        self.suffix = full[start + len(plain) :] if starts else []
        self.is_chatglm = _is_chatglm(tokenizer, plain)
        if self.is_chatglm:
            self.prefix = self._build(plain, plain)[:2]

    def plain(self, text: str) -> list[int]:
        """Ids of the text alone, [T]."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, pair: Pair, limit: int | None = None) -> list[int]:
        """Ids of the prompt with the leading special tokens, [T]; cut on the left to ``limit`` where longer.

        The left is cut so that the end of the prompt, where the answer is asked for, stays.
        """
        prefix = self.prefix if pair.special_tokens else []
        ids = self._question(pair)
        excess = 0 if limit is None else len(prefix) + len(ids) - limit
        return prefix + ids[max(excess, 0) :]

    def join(
        self, pair: Pair, end: End, *, max_input: int | None = None, max_output: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and labels, both [T]: prefix and prompt masked, answer and end token labelled.

        With an empty prompt everything is labelled, the prefix too. ``max_input`` limits prefix + prompt and
        ``max_output`` answer + end token, each cut at its end.
        """
        prefix = self.prefix if pair.special_tokens else []
        tail = self.tail(end)
        question, answer = self.plain(pair.prompt), self.plain(pair.target)
        if max_input is not None:
            question = question[: max(max_input - len(prefix), 0)]
        if max_output is not None:
            answer = answer[: max(max_output - len(tail), 0)]
        head = prefix + question
        if self.is_chatglm and end == "eos" and pair.special_tokens:
            ids = self._build(question, answer)
        else:
            ids = head + answer + tail
        masked = len(head) if pair.prompt else 0
        return ids, [IGNORE_INDEX] * masked + ids[masked:]

    def tail(self, end: End) -> list[int]:
        """Ids after the answer: the eos or pad token, or for ``none`` what the tokenizer appends itself."""
        found = end_token_id(self.tokenizer, end)
        return self.suffix if found is None else [found]

    def encoder_decoder(self, pair: Pair, max_input: int, max_output: int, cut_left: bool) -> dict[str, list[int]]:
        """For encoder-decoder models: the prompt is the encoder's input, the answer (with eos) the labels."""
        room = max(max_input - len(self.prefix) - len(self.suffix), 0)
        question = self._question(pair)
        if len(question) > room:
            question = question[len(question) - room :] if cut_left else question[:room]
        ids = self.prefix + question + self.suffix
        labels = list(self.tokenizer(text_target=pair.target)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not labels or labels[-1] != eos):
            labels.append(eos)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[:max_output]}

    def _question(self, pair: Pair) -> list[int]:
        """Ids of the prompt alone, [T]."""
        return self.plain(pair.prompt) if pair.prompt_ids is None else list(pair.prompt_ids)

    def _build(self, question: list[int], answer: list[int]) -> list[int]:
        tokenizer: Any = self.tokenizer
        return list(tokenizer.build_inputs_with_special_tokens(question, answer))


def cut(
    ids: list[int], labels: list[int], max_length: int, *, keep_answer: bool = False, prefix: int = 0
) -> tuple[list[int], list[int]]:
    """Cuts ids and labels [T] to ``max_length``: at the end, or with ``keep_answer`` first in the prompt.

    The prompt is cut at its beginning, after the ``prefix`` leading special tokens.
    """
    excess = len(ids) - max_length
    if excess > 0 and keep_answer:
        prompt_length = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        gone = slice(prefix, prefix + min(excess, max(prompt_length - prefix, 0)))
        ids, labels = ids[: gone.start] + ids[gone.stop :], labels[: gone.start] + labels[gone.stop :]
    return ids[:max_length], labels[:max_length]


def _is_chatglm(tokenizer: Any, sample: list[int]) -> bool:
    """Whether the tokenizer joins a question and an answer as ``[gMASK] sop question answer eos``."""
    if not sample or not hasattr(tokenizer, "build_inputs_with_special_tokens"):
        return False
    first = tokenizer.convert_ids_to_tokens(tokenizer.build_inputs_with_special_tokens(sample, sample)[:2])
    return "gMASK" in str(first[0]) and "sop" in str(first[-1])
