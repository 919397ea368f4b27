"""The objects of a pass: what they hold, how long they live, and what is left when a pass fails."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from families import SEQ2SEQ, batch
from helpers import attach, close, left_behind, padded, rows, still
from torch import Tensor

from graftlm.errors import UnsupportedError
from graftlm.mixing import plan_of
from graftlm.passes.packed import SequenceAttention
from graftlm.passes.run import run
from graftlm.passes.state import Call, Packed, Pass, Placed, Step, Targets, current_pass, current_run
from graftlm.routing import Plan, Scope, current_scope, running


def ragged(side: str = "right") -> dict[str, Tensor]:
    inputs = padded(rows("llama", (9, 4, 6)), side)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trained(name: str, method: Any) -> Any:
    return attach(name, method, base=still(name)).train()


@pytest.mark.parametrize("kind", [Plan, Scope, Call, Placed, Packed, Targets, Step])
def test_only_passes_and_runs_change(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    held = {str(f.type) for f in dataclasses.fields(kind)}
    assert not any("Pass" in text or "Run" in text for text in held), "it would keep a whole pass"


def test_a_run_returns_what_its_pass_made() -> None:
    model, inputs = trained("llama", "prompt"), ragged()
    now, output = run(model, plan_of(model), inputs)
    assert isinstance(now.layout, Packed) and isinstance(now.scope.attention, SequenceAttention)
    assert now.targets is not None and now.losses is not None and now.hidden is not None
    assert len(now.losses) == len(now.targets.targets)
    close(now.losses.mean(), output.loss)
    logits = model.base.lm_head(now.layout.restore(now.hidden))
    close(logits, output.logits)
    model.packs = False
    again, output = run(model, plan_of(model), inputs)
    assert isinstance(again.layout, Placed) and again.scope.attention is None
    real = torch.cat((torch.ones(3, 3), inputs["attention_mask"]), dim=1).bool()
    close(again.layout.restore(again.hidden)[real], now.layout.restore(now.hidden)[real])
    model.eval()
    now, _ = run(model, plan_of(model), inputs)
    assert now.losses is None and now.hidden is None, "nobody needs what an evaluation pass computes on its way"


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", ("prompt", "prefix")])
def test_checkpointing_keeps_no_graph_of_a_pass_that_nobody_goes_back_through(name: str, method: Any) -> None:
    """Recomputing needs the layout of a pass. If it held the hidden states, they would hold it."""
    model, inputs = trained(name, method), batch(name) if name in SEQ2SEQ else ragged()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs).loss.backward()
    model.zero_grad(set_to_none=False)

    with left_behind() as left:
        model(**inputs)
    assert [tuple(o.shape) for o in left] == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_pass_that_fails_leaves_nothing_behind(name: str, error: type[BaseException]) -> None:
    """Ctrl-C too, after which torch calls no hook."""
    model, inputs = trained(name, "prompt"), batch(name) if name in SEQ2SEQ else ragged()
    wanted = model(**inputs).loss
    place = model.base.encoder.block[1] if name in SEQ2SEQ else model.base.model.layers[1]
    seen: list[Pass | None] = []

    def broken(*args: Any) -> None:
        seen.append(current_pass(model.switch))
        raise error("on purpose")

    handle = place.register_forward_pre_hook(broken)
    for call in (model, model.generate):
        given = inputs if call is model else {k: v for k, v in inputs.items() if k != "labels"}
        with pytest.raises(error, match="on purpose"):
            call(**given)
        assert seen.pop() is not None
        assert current_scope() is None and current_pass(model.switch) is None and current_run().ended is None
        assert model.base.config._attn_implementation != "graftlm_segments"
    handle.remove()
    close(model(**inputs).loss, wanted)


def test_a_pass_that_is_refused_never_begins() -> None:
    model = attach("llama", "prompt")
    with running(plan_of(model)):
        with pytest.raises(UnsupportedError, match="does not fit the inputs"):
            model.base(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 3))
        assert current_pass(model.switch) is None
        assert model.base(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape[1] == 7


def test_a_pass_within_another_is_its_own() -> None:
    """A trial runs while its caller is on the way in; an encoder's pass lies within its model's."""
    model = trained("t5", ("prompt", "prefix"))
    seen: list[Any] = []
    note = lambda *_: seen.append(current_pass(model.switch))  # noqa: E731
    model.base.encoder.block[0].register_forward_pre_hook(note)
    model.base.decoder.block[0].register_forward_pre_hook(note)
    model(**batch("t5"))
    encoder, decoder = seen[-2:]
    assert encoder.encodes and not decoder.encodes and encoder is not decoder
    assert encoder.layout.order is not None and decoder.layout.order is None
    assert decoder.layout.memory is not None and decoder.layout.masked == 3
