"""Each row's token by its own request: transformers' processors are the oracle."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation import logits_process as hf

from graftlm.bundled import base_path
from graftlm.errors import ConfigError, UnsupportedError
from graftlm.inference.constraints import Constraints
from graftlm.inference.requests import SamplingParams
from graftlm.inference.sampling import Chooser, choose, logprob

VOCAB, ENDS, CPU = 300, (2, 5), torch.device("cpu")


def oracle(p: SamplingParams, prompt: list[int], written: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The scores by transformers' processors, in the order in which `generate` has them."""
    steps: list[Any] = []
    if p.logit_bias:
        steps.append(hf.SequenceBiasLogitsProcessor([[[k], float(v)] for k, v in p.logit_bias.items()]))
    if p.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    counts = torch.zeros(VOCAB)
    for token, n in Counter(written).items():
        counts[token] = n * p.frequency_penalty + p.presence_penalty
    steps.append(lambda ids, scores: scores - counts)
    if p.min_new_tokens:
        steps.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), p.min_new_tokens, list(ENDS)))
    if p.temperature not in (0, 1):
        steps.append(hf.TemperatureLogitsWarper(p.temperature))
    if p.temperature:
        steps += [hf.TopKLogitsWarper(p.top_k)] if p.top_k else []
        steps += [hf.TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
        steps += [hf.MinPLogitsWarper(p.min_p)] if p.min_p else []
    ids, scores = torch.tensor([[*prompt, *written]]), logits[None].clone()
    for step in steps:
        scores = step(ids, scores)
    return scores[0]


def some(rng: random.Random) -> SamplingParams:
    pick = rng.choice
    return SamplingParams(
        temperature=pick([0.0, 0.7, 1.0, 2.5]), top_k=pick([0, 1, 7, 1000]), top_p=pick([1.0, 0.9, 0.3, 0.01]),
        min_p=pick([0.0, 0.1, 1.0]), repetition_penalty=pick([1.0, 1.4, 0.8]), presence_penalty=pick([0.0, 1.5, -1.0]),
        frequency_penalty=pick([0.0, 0.4]), logit_bias=pick([{}, {7: 4.0, 250: -100.0}]), seed=rng.randrange(2**60),
        min_new_tokens=pick([0, 3]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_scores_and_draws_are_those_of_transformers(seed: int) -> None:
    """Many rows in one batch that shrinks and grows; each draws what torch's generator would draw for it alone."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(40):
        if rng.random() < 0.7:
            p, prompt = some(rng), [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
            alone = torch.Generator().manual_seed(p.seed)
            rows.append({"p": p, "prompt": prompt, "written": [], "alone": alone,
                         "chooser": Chooser(p, prompt, ENDS, p.seed, VOCAB, CPU)})  # fmt: skip
        rows = [r for r in rows if rng.random() < 0.9]
        rng.shuffle(rows)
        if not rows:
            continue
        logits = torch.randn(len(rows), VOCAB, generator=generator) * 3
        before = logits.clone()
        wanted = []
        for row, own in zip(rows, logits, strict=True):
            scores = oracle(row["p"], row["prompt"], row["written"], own)
            torch.testing.assert_close(row["chooser"].scores(own), scores)
            drawn = row["p"].temperature > 0
            wanted.append(
                int(torch.multinomial(scores.softmax(-1), 1, generator=row["alone"]) if drawn else scores.argmax())
            )
        got = choose([row["chooser"] for row in rows], logits)
        assert got == wanted and torch.equal(logits, before)
        for row, token in zip(rows, got, strict=True):
            row["written"].append(token)


def test_logits_that_are_no_numbers_fail_in_their_row_only() -> None:
    logits = torch.randn(4, VOCAB)
    logits[1, 7], logits[2, 3] = torch.nan, torch.inf
    p = SamplingParams(temperature=1.0)
    made = choose([Chooser(p, [1], ENDS, 0, VOCAB, CPU) for _ in range(4)], logits)
    assert made[1] is made[2] is None and None not in (made[0], made[3])


def test_log_probabilities() -> None:
    logits = torch.randn(VOCAB)
    found = logprob(logits, 9, 3)
    assert found.logprob == pytest.approx(float(logits.log_softmax(-1)[9]))
    assert list(found.top) == logits.topk(3).indices.tolist()
    assert logprob(logits, 9, 0).top == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k=-1: expected 0"), ({"min_p": 1.5}, "min_p=1.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias"), ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9"),
        ({"logprobs": 101}, "logprobs=101"), ({"response_format": {"type": "xml"}}, "expected one of"),
        ({"response_format": {"type": "regex"}}, "expected one of"), ({"response_format": "json"}, "expected one of"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "expected one of"),
    ],
)  # fmt: skip
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


# -- forms ---------------------------------------------------------------------------------------------------------------
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "age"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
}  # fmt: skip


def written(form: dict[str, Any], seed: int, temperature: float = 1.0, most: int = 400) -> tuple[str, bool]:
    """What random logits write in a form, and whether it came to its end."""
    pytest.importorskip("llguidance")
    names = AutoTokenizer.from_pretrained(base_path())
    ends = [names.eos_token_id]
    p = SamplingParams(temperature=temperature, response_format=form)
    made: list[int] = []
    chooser = Chooser(p, [1], ends, seed, len(names), CPU, Constraints(names).of(form, ends, 2)[seed % 2])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(most):
        logits = torch.randn(len(names), generator=generator)
        logits[names('"}', add_special_tokens=False)["input_ids"]] += 6  # so that strings end
        logits[ends] += 6
        token = choose([chooser], logits[None])[0]
        assert token is not None
        if token in ends:
            return names.decode(made), True
        made.append(token)
        if chooser.constraint.complete:  # type: ignore[union-attr]
            return names.decode(made), True
    return names.decode(made), False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_completions_have_their_form(seed: int, temperature: float) -> None:
    text, ended = written({"type": "json_schema", "schema": SCHEMA}, seed, temperature)
    if ended:
        value = json.loads(text)
        assert set(value) == {"name", "age"} and 0 <= value["age"] <= 150 and len(value["name"]) <= 12
    assert ended
    text, ended = written({"type": "regex", "pattern": "[a-f]{3}-[0-9]{2}(好|🙂)"}, seed, temperature)
    assert ended and re.fullmatch("[a-f]{3}-[0-9]{2}(好|🙂)", text)
    text, ended = written({"type": "grammar", "grammar": 'start: "yes" | "no"'}, seed, temperature)
    assert ended and text in ("yes", "no")


def test_json_objects() -> None:
    text, ended = written({"type": "json_object"}, 0)
    assert text.lstrip().startswith("{")
    if ended:
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "form",
    [{"type": "regex", "pattern": "(["}, {"type": "json_schema", "schema": {"type": "nonsense"}},
     {"type": "grammar", "grammar": "start: ("}],
)  # fmt: skip
def test_forms_that_cannot_be_read(form: dict[str, Any]) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match="response_format of type"):
        Constraints(AutoTokenizer.from_pretrained(base_path())).of(form, [1])


def test_completions_of_one_request_are_in_places_of_their_own() -> None:
    pytest.importorskip("llguidance")
    names = AutoTokenizer.from_pretrained(base_path())
    first, second = Constraints(names).of({"type": "grammar", "grammar": 'start: "yes" | "no"'}, [1], 2)
    first.took(names("y", add_special_tokens=False)["input_ids"][-1])
    allowed = [torch.zeros(len(names)) for _ in range(2)]
    for constraint, logits in zip((first, second), allowed, strict=True):
        constraint.mask(logits)
    assert not torch.equal(*allowed)
    assert allowed[1][names("n", add_special_tokens=False)["input_ids"][-1]] == 0


def test_a_tokenizer_that_cannot_be_read() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(UnsupportedError, match="tokenizers library"):
        Constraints(object()).of({"type": "json_object"}, [1])
