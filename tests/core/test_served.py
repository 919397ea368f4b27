"""Rows of many adapters step by step over a cache in plain tensors: each equals itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from families import CAUSAL, SEQ2SEQ, SPECIAL, VOCAB, build, randomise
from helpers import CONFIGS, close, embedding_name, fresh
from test_mixing import crowd, rows_of
from torch import Tensor

import graftlm
from graftlm.errors import AdapterError, UnsupportedError
from graftlm.passes.served import FrontMemory, PlainCache, Row, Served

NEW = 4  # tokens that a row generates
STEPPED = [name for name in CAUSAL if name != "falcon"]
QUICK = ("bloom", "opt", "gpt2", "llama", "gemma3", "chatglm", "phi3")  # the others are laid out as one of these


def group_of(entry: Any) -> tuple[str, ...]:
    named = [entry] if isinstance(entry, str) else entry
    return tuple(n for n in named if n != "__base__")


def prompts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (1 + (5 * i + 2) % 7,), generator=generator) for i in range(count)]


class Server:
    """Rows that join one by one, are prefilled and decoded in the same steps, and leave."""

    def __init__(self, model: Any) -> None:
        self.served = Served(model)
        self.cache = PlainCache(self.served)
        self.waiting: list[tuple[int, tuple[str, ...], Tensor]] = []
        self.running: dict[int, dict[str, Any]] = {}
        self.seen: dict[int, list[Tensor]] = {}  # logits by row, a step each
        self.written: dict[int, list[int]] = {}

    def join(self, row: int, group: tuple[str, ...], tokens: Tensor) -> None:
        front = self.served.admit(group)
        self.cache.join(row, front)
        self.running[row] = {"group": group, "tokens": tokens, "start": front.length}
        self.seen[row], self.written[row] = [], []

    def step(self) -> None:
        rows = {key: Row(**state) for key, state in self.running.items()}
        attention = self.cache.over([(key, len(row.tokens)) for key, row in rows.items()])
        for (key, row), logits in zip(rows.items(), self.served.step(list(rows.values()), attention), strict=True):
            self.seen[key].append(logits)
            self.written[key].append(int(logits.argmax()))
            state = self.running[key]
            state["start"] += len(row.tokens)
            state["tokens"] = torch.tensor([self.written[key][-1]])
            if len(self.written[key]) == NEW:
                self.cache.leave(key)
                del self.running[key]


def check(model: Any, entries: list[Any], texts: list[Tensor], server: Server) -> None:
    """Logits of every step are those of a whole pass, and so are the tokens."""
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        ids = torch.cat((text, torch.tensor(server.written[i][:-1], dtype=torch.long)))[None]
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[entry]).logits[0, -NEW:]
        close(torch.stack(server.seen[i]), wanted)
        text = text[None]
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "attention_mask": torch.ones_like(text)}
        made = model.generate(input_ids=text, adapter_names=[entry], **options)
        assert made[0, text.shape[1] :].tolist() == server.written[i], entry


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in STEPPED])
def test_each_row_equals_itself_alone(name: str) -> None:
    """Two rows join a step, so that prefill and decoding of rows at different places share every step."""
    model = crowd(name)
    entries, server = rows_of(model), Server(model)
    texts = prompts(len(entries))
    waiting = list(enumerate(zip(entries, texts, strict=True)))
    while waiting or server.running:
        for i, (entry, text) in waiting[:2]:
            server.join(i, group_of(entry), text)
        del waiting[:2]
        server.step()
    assert not server.cache.kept
    check(model, entries, texts, server)


def test_windows_are_kept() -> None:
    """Rows longer than a layer's sliding window, with a prefix and virtual tokens in front."""
    base = build("gemma3", sliding_window=6)
    model = crowd("gemma3", ["lora", "prompt", "prefix"], base=base)
    entries, server = ["lora", "prompt", "prefix", "__base__"], Server(model)
    texts = [torch.cat((text, text, text, text)) for text in prompts(4)]
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        server.join(i, group_of(entry), text)
    while server.running:
        server.step()
    check(model, entries, texts, server)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_embeddings_and_biases_of_one_row_only(name: str) -> None:
    common = {"task_type": "CAUSAL_LM"}
    configs = {
        "ends": graftlm.LoraConfig(**common, r=3, target_modules=[embedding_name(name), "lm_head"]),
        "head": graftlm.LoraConfig(**common, r=2, modules_to_save=["lm_head"]),
        "words": graftlm.PromptTuningConfig(**common, num_virtual_tokens=2),
    } | ({"biased": graftlm.LoraConfig(**common, r=2, bias="all")} if name == "gpt2" else {})
    model: Any = None
    for key, settings in configs.items():
        if model is None:
            model = graftlm.get_peft_model(fresh(name), settings, key)
        else:
            model.add_adapter(key, settings)
    model.set_requires_grad(list(model.methods), True)
    randomise(model)
    entries, server = [*model.eval().methods, "__base__"], Server(model)
    texts = prompts(len(entries))
    for i, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        server.join(i, group_of(entry), text)
    while server.running:
        server.step()
    check(model, entries, texts, server)


def test_fronts_are_computed_once_and_not_touched() -> None:
    model = crowd("llama", ["prompt", "prefix"])
    served = Served(model)
    front = served.admit(("prefix", "prompt"))
    assert front.length == 5 + 3 and {k.shape[1] for layer in front.memory for k in layer} == {8}
    before = [k.clone() for layer in front.memory for k in layer]
    runs: list[int] = []
    model.base.model.register_forward_pre_hook(lambda *_: runs.append(1))
    cache = PlainCache(served)
    for key in (0, 1):
        cache.join(key, front)
    rows = [Row(("prefix", "prompt"), text, front.length) for text in prompts(2)]
    served.step(rows, cache.over([(i, len(row.tokens)) for i, row in enumerate(rows)]))
    assert len(runs) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, (k for layer in front.memory for k in layer), strict=True))
    served.admit(("prompt",))
    runs.clear()
    served.admit(("prompt",))
    assert len(runs) == 1  # its virtual tokens; nothing is tried out again


@pytest.mark.parametrize("lean", [True, False])
def test_nothing_of_a_plan_is_made_anew_while_the_rows_stay(lean: bool) -> None:
    model = crowd("llama", ["lora", "wide", "prompt"])
    served = Served(model)
    for group in (("lora",), ("wide",)):
        served.admit(group)
    served.lean.forced = lean
    cache = PlainCache(served)

    def step() -> Tensor:
        rows = [Row(group, [7], 0) for group in (("lora",), ("wide",), (), ("lora",))]
        for i in range(len(rows)):
            cache.join(i, FrontMemory([], 0))
        return served.step(rows, cache.over([(i, 1) for i in range(len(rows))]))

    before = step()

    def factors() -> set[int]:
        if lean:
            stack = served.lean._stack
            return {stack.changes, *(id(a) for pair in stack._factors.values() for a in pair)}
        return {id(layer["a"]) for routes in served._sets.values() for layer in routes._kept.values() if layer}

    kept = factors()
    assert kept and torch.equal(step(), before)
    assert kept == factors()
    laid = served.laid((("lora",), ("wide",), (), ("lora",)), (1, 1, 1, 1))
    assert laid is served.laid((("lora",), ("wide",), (), ("lora",)), (1, 1, 1, 1))
    with torch.no_grad():
        for _, parameter in model.adapter_parameters("wide"):
            parameter.add_(0.2)
    served.lean.forced = None
    served.admit(("wide",))
    served.lean.forced = lean
    after = step()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]]) and not torch.allclose(after[1], before[1])


def test_admitting_leaves_the_model_as_it_was() -> None:
    model = crowd("llama", ["lora", "prompt"]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    served = Served(model)
    served.admit(("lora", "prompt"))
    assert torch.equal(torch.rand(1), expected)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(UnsupportedError, match="call eval"):
        served.step([Row((), torch.tensor([5]), 0)], PlainCache(served).over([(0, 1)]))


@pytest.mark.parametrize("name", ["falcon", *SEQ2SEQ])
def test_bases_without_steps_say_so(name: str) -> None:
    model = graftlm.get_peft_model(fresh(name), CONFIGS["lora"](graftlm, name), "lora").eval()
    with pytest.raises(UnsupportedError, match="through generate, in batches"):
        Served(model).admit(("lora",))


def test_positions_that_depend_on_the_longest_row_are_refused() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = t.LlamaForCausalLM(t.LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=16, rope_parameters=rope))
    model = graftlm.get_peft_model(base, CONFIGS["lora"](graftlm, "llama"), "lora").eval()
    with pytest.raises(UnsupportedError, match="turns positions by the length"):
        Served(model).admit(("lora",))


def test_what_was_not_admitted() -> None:
    model = crowd("llama", ["lora"])
    served = Served(model)
    with pytest.raises(AdapterError, match="There is no adapter 'lorra'"):
        served.admit(("lorra",))
    with pytest.raises(UnsupportedError, match="call admit"):
        served.step([Row((), torch.tensor([5]), 0)], PlainCache(served).over([(0, 1)]))
