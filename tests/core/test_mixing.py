"""Mixed batches: every row equals itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CAUSAL, ENCODERS, SEQ2SEQ, VOCAB, build, randomise
from helpers import CONFIGS, TARGETS, cases, close, fresh, head_name, pairs, still, task
from test_quantized import WIDER, load
from torch import Tensor

import graftlm
from graftlm.errors import AdapterError, CompositionError, UnsupportedError
from graftlm.mixing import plan_of

BOTTLENECKS = ("houlsby", "parallel")


def everything(name: str, **options: Any) -> dict[str, Any]:
    """One configuration of every kind for a family: several ranks, targets, lengths."""
    common = {"task_type": task(name)} | options
    lora = {"target_modules": TARGETS.get(name)} | common
    every = "all-linear"
    kinds = {
        "lora": graftlm.LoraConfig(r=4, **lora),
        "wide": graftlm.LoraConfig(r=9, lora_alpha=3, **lora | {"target_modules": every}),
        "dora": graftlm.LoraConfig(r=2, use_dora=True, **lora),
        "pissa": graftlm.LoraConfig(r=2, init_lora_weights="pissa", **lora),
        "prompt": graftlm.PromptTuningConfig(num_virtual_tokens=3, **common),
        "longer": graftlm.PromptTuningConfig(num_virtual_tokens=6, **common),
        "p_mlp": graftlm.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **common),
        "p_lstm": graftlm.PromptEncoderConfig(
            num_virtual_tokens=4, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **common
        ),
        "prefix": graftlm.PrefixTuningConfig(num_virtual_tokens=5, **common),
        "prefix_mlp": graftlm.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, **common),
    }
    return kinds | {k: graftlm.BottleneckConfig(placement=k, reduction_factor=4, **common) for k in BOTTLENECKS}


def crowd(name: str, kinds: list[str] | None = None, base: Any = None, **options: Any) -> Any:
    """A model with adapters of many kinds."""
    model: Any = None
    for kind, config in everything(name, **options).items():
        if kinds is not None and kind not in kinds:
            continue
        if model is None:
            model = graftlm.get_peft_model(fresh(name) if base is None else base, config, kind)
        else:
            model.add_adapter(kind, config)
    model.set_requires_grad(list(model.methods), True)
    randomise(model)
    return model.eval()


LENGTHS = [7, 4, 6, 5, 7, 3, 5, 6, 2, 7, 4, 5, 6, 3, 5]


def rows_of(model: Any, compositions: bool = True) -> list[Any]:
    """A row of every adapter, of none, twice of one, and of compositions."""
    names = list(model.methods)
    rows: list[Any] = [*names, "__base__", names[0]]
    return rows + [["lora", "prompt"], ["prefix", "wide", "prompt"]] * compositions


def padded(count: int, side: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    ids = torch.randint(3, VOCAB, (count, width), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(count):
        n = LENGTHS[row % len(LENGTHS)]
        mask[row, slice(width - n, width) if side == "left" else slice(0, n)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    real = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][real][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | {
        k: v[row : row + 1] for k, v in inputs.items() if k.startswith("decoder")
    }


def same_logits(model: Any, rows: list[Any], inputs: dict[str, Tensor], tokens: bool = False) -> None:
    """Each row's logits in the batch are those that it has alone; with `tokens` they are one a given token."""
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=rows).logits
        for i, entry in enumerate(rows):
            own = alone(inputs, i)
            got, wanted = mixed[i], model(**own, adapter_names=[entry]).logits[0]
            if tokens:
                got = got[-inputs["input_ids"].shape[1] :][inputs["attention_mask"][i].bool()]
                wanted = wanted[-own["input_ids"].shape[1] :]
            assert (got - wanted).abs().max() <= 1e-5, (entry, float((got - wanted).abs().max()))


SIDES = ("left", "right")


@pytest.mark.parametrize(
    ("name", "side"),  # quick: both sides of two families that count places in different ways, of the others one in turn
    cases(CAUSAL, SIDES, lambda n, side: n in ("bloom", "llama") or side == SIDES[list(CAUSAL).index(n) % 2]),
)
def test_each_row_equals_itself_alone(name: str, side: str) -> None:
    model = crowd(name)
    rows = rows_of(model)
    same_logits(model, rows, padded(len(rows), side), tokens=True)


def test_rows_of_embeddings_narrower_than_the_hidden_size() -> None:
    model = crowd("opt", ["lora", "prompt", "longer", "p_mlp", "prefix"], base=build("opt", word_embed_proj_dim=16))
    rows = ["lora", "prompt", "longer", "p_mlp", "prefix", "__base__", ["lora", "prompt"]]
    same_logits(model, rows, padded(len(rows), "left"), tokens=True)


HOW: dict[str, dict[str, int]] = {
    "greedy": {}, "beams": {"num_beams": 3}, "groups": {"num_beams": 2, "num_return_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize(("name", "how"), pairs(["bloom", "opt", "gpt2", "llama", "gemma3", "falcon", "chatglm"], HOW))
def test_generation_of_each_row_equals_itself_alone(name: str, how: str) -> None:
    model = crowd(name)
    rows = rows_of(model)
    inputs = padded(len(rows), "left")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, **HOW[how]}
    mixed = model.generate(**inputs, adapter_names=rows, **options)[:, inputs["input_ids"].shape[1] :]
    times = options.get("num_return_sequences", 1)
    for i, entry in enumerate(rows):
        own = alone(inputs, i)
        wanted = model.generate(**own, adapter_names=[entry], **options)[:, own["input_ids"].shape[1] :]
        assert torch.equal(mixed[i * times : (i + 1) * times], wanted), entry


def test_sampling_draws_for_each_row_from_its_own_distribution() -> None:
    model = crowd("llama", ["lora", "prompt"])
    inputs = padded(3, "left")
    rows = ["lora", "__base__", "prompt"]
    torch.manual_seed(0)
    drawn = model.generate(**inputs, adapter_names=rows, max_new_tokens=1, do_sample=True, num_return_sequences=400)
    for i, entry in enumerate(rows):
        own = alone(inputs, i)
        with torch.no_grad():
            shares = model(**own, adapter_names=[entry]).logits[0, -1].softmax(-1)
        counts = torch.bincount(drawn[i * 400 : (i + 1) * 400, -1], minlength=VOCAB) / 400
        assert (counts - shares).abs().max() < 0.1


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder_rows(name: str) -> None:
    model = crowd(name)
    rows = rows_of(model)
    inputs = padded(len(rows), "right")
    inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (len(rows), 4), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "num_beams": 2}
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    same_logits(model, rows, inputs)
    written = model.generate(**given, adapter_names=rows, **options)
    for i, entry in enumerate(rows):
        assert torch.equal(written[i], model.generate(**alone(given, i), adapter_names=[entry], **options)[0]), entry


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_classifier_rows(name: str, side: str) -> None:
    """Each adapter's own trained head included."""
    model = crowd(name)
    rows = rows_of(model)
    same_logits(model, rows, padded(len(rows), side))


def test_heads_embeddings_and_biases_of_one_row_only() -> None:
    base = fresh("llama")
    targets = ["q_proj", "embed_tokens", head_name("llama")]
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets), "ends")
    model.add_adapter("head", graftlm.LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]))
    model.add_adapter("words", graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    gpt2 = graftlm.get_peft_model(fresh("gpt2"), graftlm.LoraConfig(task_type="CAUSAL_LM", r=2, bias="all"), "biased")
    gpt2.add_adapter("other", graftlm.LoraConfig(task_type="CAUSAL_LM", r=3))
    for made in (model, gpt2):
        made.set_requires_grad(list(made.methods), True)
        randomise(made)
        made.eval()
        rows = [*made.methods, "__base__", next(iter(made.methods))]
        same_logits(made, rows, padded(len(rows), "left"), tokens=True)


# -- training ------------------------------------------------------------------------------------------------------------
def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "way"),
    cases(
        ["bloom", "opt", "llama", "gemma3", "gpt2", "t5", "bart"], ["packed", "plain"],
        lambda n, way: n in ("llama", "t5") or way == ("plain" if n == "bart" else "packed"),
    ),
)  # fmt: skip
def test_gradients_of_a_mixed_batch(name: str, way: str) -> None:
    """Each adapter's gradient is that of its own rows."""
    model = crowd(name, base=still(name))
    rows = rows_of(model)[:-2]
    inputs = padded(len(rows), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :1] = -100
    inputs["labels"] = labels
    model.set_requires_grad(list(model.methods), True)
    model.train()
    model.lean = way == "packed"
    output = model(**inputs, adapter_names=rows)
    places = labels if name in SEQ2SEQ else labels[:, 1:]
    counted = int((places != -100).sum())
    output.loss.backward()
    mixed = gradients(model)
    total, wanted = 0.0, {}
    for i, entry in enumerate(rows):
        own = alone({k: v for k, v in inputs.items() if k != "labels"}, i)
        own["labels"] = labels[i : i + 1] if name in SEQ2SEQ else labels[i][inputs["attention_mask"][i].bool()][None]
        mine = own["labels"] if name in SEQ2SEQ else own["labels"][:, 1:]
        loss = model(**own, adapter_names=[entry]).loss * int((mine != -100).sum()) / counted
        total += float(loss.detach())
        if loss.requires_grad:
            loss.backward()
        for key, value in gradients(model).items():
            wanted[key] = wanted.get(key, 0) + value
    assert abs(float(output.loss.detach()) - total) <= 1e-5 * abs(total)
    shown = {k for k, v in wanted.items() if v.abs().max() > 0}
    assert shown <= set(mixed)
    for key in shown:
        torch.testing.assert_close(mixed[key], wanted[key], rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_logits_of_a_mixed_training_pass() -> None:
    model = crowd("llama", base=still("llama"))
    rows = rows_of(model)
    inputs = padded(len(rows), "left")
    with torch.no_grad():
        wanted = model(**inputs, adapter_names=rows).logits
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    got = model(**inputs, labels=labels, adapter_names=rows).logits
    real = inputs["attention_mask"].bool()
    assert (got[:, -7:][real] - wanted[:, -7:][real]).abs().max() <= 1e-5


def test_activation_checkpointing_keeps_the_rows() -> None:
    model = crowd("llama", ["lora", "wide", "prompt", "prefix", "houlsby"], base=still("llama"))
    rows = ["wide", "prefix", "houlsby", "prompt", "lora", "prefix"]
    inputs = padded(len(rows), "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, adapter_names=rows).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and found[0]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-7)


# -- quantised bases -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rows_on_a_quantised_base(kind: str, tmp_path: Any) -> None:
    build("llama", **WIDER["llama"]).save_pretrained(tmp_path)
    base = load(tmp_path, kind)
    model = crowd("llama", ["lora", "wide", "prompt", "prefix", "houlsby"], base=base)
    rows = ["wide", "prefix", "houlsby", "prompt", "lora", "__base__"]
    inputs = padded(len(rows), "left")
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=rows).logits.float()
        for i, entry in enumerate(rows):
            own = alone(inputs, i)
            length = own["input_ids"].shape[1]
            wanted = model(**own, adapter_names=[entry]).logits[0, -length:].float()
            error = (mixed[i, -length:] - wanted).abs().max()
            assert error <= (1e-4 if kind == "nf4" else 0.15) * wanted.abs().max(), (entry, float(error))


# -- bad input -----------------------------------------------------------------------------------------------------------
def test_adapters_of_other_bases_and_wrappers() -> None:
    model, other = (
        crowd("llama", ["lora", "prompt"]),
        graftlm.get_peft_model(fresh("bloom"), CONFIGS["lora"](graftlm, "bloom"), "foreign"),
    )
    second = graftlm.get_peft_model(model.base, CONFIGS["prompt"](graftlm, "llama"), "second")
    inputs = padded(2, "left")
    with pytest.raises(AdapterError, match=r"row 1: .*'foreign' is attached to another base \(BloomForCausalLM\)"):
        model(**inputs, adapter_names=["lora", "foreign"])
    with pytest.raises(AdapterError, match="row 0: .*'second' belongs to another wrapper over this base"):
        model(**inputs, adapter_names=["second", "lora"])
    assert other.methods and second.methods


def test_bad_names() -> None:
    model = crowd("llama", ["lora", "prompt"])
    inputs = padded(3, "left")
    with pytest.raises(AdapterError, match="row 1: There is no adapter 'lorra'.*did you mean 'lora'"):
        model(**inputs, adapter_names=["lora", "lorra", "prompt"])
    with pytest.raises(AdapterError, match="2 entries, the batch 3 rows"):
        model(**inputs, adapter_names=["lora", "prompt"])
    with pytest.raises(AdapterError, match="2 entries, the batch 3 rows"):
        model.generate(**inputs, adapter_names=["lora", "prompt"], max_new_tokens=2)
    with pytest.raises(AdapterError, match="adapter_names=5: expected a list"):
        model(**inputs, adapter_names=5)
    with pytest.raises(AdapterError, match="row 2: expected a name"):
        model(**inputs, adapter_names=["lora", "prompt", None])
    with pytest.raises(AdapterError, match="row 0: .* names an adapter twice"):
        model(**inputs, adapter_names=[["lora", "lora"], "prompt", "prompt"])


def test_rows_that_cannot_compose() -> None:
    options = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    model = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(**options), "a")
    model.add_adapter("b", graftlm.LoraConfig(**options))
    with pytest.raises(CompositionError, match="row 1: a, b each bring their own copy"):
        model(**padded(2, "left"), adapter_names=["a", ["a", "b"]])


@pytest.mark.parametrize(
    "rows", [["lora", "wide", "prompt"], ["wide", "__base__", ["wide", "lora"]], "lora", "wide", "__base__"]
)
def test_rows_of_a_merged_base(rows: Any) -> None:
    """What is merged is in no row that does not name it, and once in those that do."""
    model, inputs = crowd("llama", ["lora", "wide", "prompt"]), padded(3, "left")
    with torch.no_grad():
        wanted = model(**inputs, adapter_names=rows).logits
        model.merge_adapter(["lora"])
        close(model(**inputs, adapter_names=rows).logits, wanted)


def test_within_disable_adapter_every_row_is_the_base() -> None:
    model = crowd("llama", ["lora", "wide"])
    inputs = padded(2, "left")
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs, adapter_names=["lora", "wide"]).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["bloom", "llama", "gpt2", "opt"])
def test_the_loss_in_evaluation_is_that_of_the_rows_alone(name: str) -> None:
    """Filling in front of a row without virtual tokens predicts nothing."""
    model = crowd(name, ["lora", "prompt", "prefix", "longer"])
    rows = ["lora", "prompt", "__base__", "prefix", "longer"]
    inputs = padded(len(rows), "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    total, count = 0.0, 0
    with torch.no_grad():
        mixed = float(model(**inputs, adapter_names=rows).loss)
        for i, entry in enumerate(rows):
            own = alone(inputs, i)
            own["labels"] = own["input_ids"]
            labels = own["input_ids"].shape[1] - (entry not in ("prompt", "longer"))
            total, count = total + float(model(**own, adapter_names=[entry]).loss) * labels, count + labels
    assert mixed == pytest.approx(total / count, rel=1e-5)


def test_values_written_past_autograd_are_seen() -> None:
    model = crowd("llama", ["lora", "wide"])
    inputs = padded(2, "left")
    with torch.no_grad():
        model(**inputs, adapter_names=["lora", "wide"])
        for _, p in model.adapter_parameters("lora"):
            p.data.mul_(2)
        mixed = model(**inputs, adapter_names=["lora", "wide"]).logits[0]
        assert (mixed - model(**inputs, adapter_names="lora").logits[0]).abs().max() <= 1e-5


def test_a_trial_between_a_pass_and_its_gradient() -> None:
    model = graftlm.get_peft_model(still("llama"), everything("llama")["lora"], "lora")
    model.add_adapter("wide", everything("llama")["wide"])
    inputs = padded(2, "left")
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    with torch.no_grad():
        model(**inputs, adapter_names=["lora", "wide"])
    loss.backward()


def test_prefill_in_chunks() -> None:
    model = crowd("llama", ["lora", "prompt"])
    with pytest.raises(UnsupportedError, match="prefill_chunk_size"):
        model.generate(**padded(2, "left"), adapter_names=["lora", "prompt"], prefill_chunk_size=2, max_new_tokens=2)


def test_adapters_of_different_precision() -> None:
    model = crowd("llama", ["lora", "wide"])
    inputs = padded(2, "left")
    with torch.no_grad():
        model(**inputs, adapter_names=["lora", "wide"])
        for _, p in model.adapter_parameters("lora"):
            p.data = p.data.bfloat16()
        mixed = model(**inputs, adapter_names=["lora", "wide"]).logits[1]
        assert (mixed - model(**inputs, adapter_names="wide").logits[1]).abs().max() <= 1e-5


def test_a_model_on_which_rows_touch_is_refused() -> None:
    base = fresh("llama")
    inner = base.model.layers[0].mlp

    def leak(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + output.mean(0, keepdim=True)

    inner.register_forward_hook(leak)
    model = crowd("llama", ["lora", "wide"], base=base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="gives other values than alone"):
        model(**padded(2, "left"), adapter_names=["lora", "wide"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_trial_leaves_everything_as_it_was() -> None:
    model = crowd("llama", ["lora", "prompt"]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        plan_of(model, ["lora", "prompt"])
    assert torch.equal(torch.rand(1), expected)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_names_of_one_kind_are_a_plain_pass() -> None:
    model = crowd("llama", ["lora", "prompt"])
    inputs = padded(3, "left")
    with torch.no_grad():
        wanted = model(**inputs, adapter_names=["prompt"] * 3).logits
        assert torch.equal(model(**inputs, adapter_names="prompt").logits, wanted)
        assert torch.equal(model(**inputs, adapter_names=[["prompt"], "prompt", "prompt"]).logits, wanted)
