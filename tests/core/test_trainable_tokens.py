"""Trained rows of the vocabulary, as a method and in LoRA: HF PEFT's files and numbers, tied heads, mixed rows, merging."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import ALL, VOCAB, batch, build
from helpers import attach, cases, close, config, fresh, logits_of, padded, randomise, rows, state_of, twenty_steps, unpacked
from safetensors.torch import load_file
from test_parity import both_ways, from_theirs, theirs
from test_quantized import folders, load  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

import graftlm
from graftlm.errors import AdapterError, CheckpointError, CompositionError, ConfigError, TargetError, UnsupportedError
from graftlm.layers import Adapted
from graftlm.methods.tokens import TiedTokens

METHODS = ("tokens", "lora_tokens")
IDS = [5, 90, 17]  # of helpers.CONFIGS
HEADLESS = ("bert", "roberta")


def tied(name: str, tie: bool = True) -> Any:
    """A tiny model of a family whose head is its input embeddings, or not."""
    model = copy.deepcopy(build(name, tie_word_embeddings=tie))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie
    return model


def with_tokens(name: str, **more: Any) -> dict[str, torch.Tensor]:
    """Inputs in which the trained tokens occur, among others."""
    inputs = batch(name, **more)
    inputs["input_ids"][:, 1::3] = torch.tensor(IDS)[: inputs["input_ids"][:, 1::3].shape[1]]
    if inputs["labels"].dim() == 2:
        inputs["labels"][:, 2] = IDS[0]
    return inputs


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune_svd"])
@pytest.mark.parametrize("tie", [True, False])
def test_weighted_sums_of_rows(kind: str, tie: bool, tmp_path: Path) -> None:
    """What adapters add to the base's rows is combined; a token of one of them has that one's share."""
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = graftlm.get_peft_model(tied("llama", tie), graftlm.LoraConfig(trainable_token_indices=[5, 90], **settings), "a")
    model.add_adapter("b", graftlm.LoraConfig(trainable_token_indices=[7, 5], **settings))
    randomise(model)
    layer = model.base.model.embed_tokens
    base, rows_of = layer.base_layer.weight, {n: layer.trainable_tokens_delta[n].detach() for n in "ab"}
    options = {} if kind in ("linear", "cat", "svd") else {"density": 1.0}
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", combination_type=kind, **options)
    change = layer.changes["sum"]
    assert change.ids == [5, 7, 90]
    made = [layer.trainable_tokens_delta["sum"][i] - base[token] for i, token in enumerate(change.ids)]
    added = {"a": rows_of["a"] - base[[5, 90]], "b": rows_of["b"] - base[[7, 5]]}
    if kind != "ties":  # which averages those of one sign
        close(made[0], 0.5 * added["a"][0] + 2 * added["b"][1])
    close(made[1], 2 * added["b"][0])
    close(made[2], 0.5 * added["a"][1])
    assert isinstance(model.base.lm_head, Adapted) == tie
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = graftlm.PeftModel.from_pretrained(tied("llama", tie), tmp_path / "sum")
    close(logits_of(again, **with_tokens("llama")), logits_of(model, **with_tokens("llama")))


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), cases(ALL, METHODS, lambda n, m: n in ("bloom", "gpt2", "llama", "t5", "bert")))
def test_files_both_ways(name: str, method: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), lambda lib: config(method, name, lib), with_tokens(name), tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_a_tied_head_follows(name: str, method: str, tmp_path: Path) -> None:
    """Read and written both ways; HF PEFT's files of the method repeat the rows, ours hold them once."""
    both_ways(lambda: tied(name), lambda lib: config(method, name, lib), with_tokens(name), tmp_path)
    both = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "mine")]
    theirs_, mine = ([k for k in tensors if k.endswith("trainable_tokens_delta")] for tensors in both)
    assert len(mine) == 1 and set(mine) <= set(theirs_)
    assert len(theirs_) > 1 or method == "lora_tokens"


def test_a_file_whose_tied_rows_differ_is_refused(tmp_path: Path) -> None:
    their = theirs(tied("llama"), peft.TrainableTokensConfig(token_indices=IDS))
    tensors = {k: v.clone() for k, v in peft.get_peft_model_state_dict(their).items()}
    model = graftlm.get_peft_model(tied("llama"), graftlm.TrainableTokensConfig(token_indices=IDS))
    graftlm.set_peft_model_state_dict(model, tensors)
    tensors["base_model.model.lm_head.trainable_tokens_delta"] += 1
    with pytest.raises(CheckpointError, match=r"unexpected keys \(1\)"):
        graftlm.set_peft_model_state_dict(model, tensors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_twenty_losses(name: str, method: str, tie: bool) -> None:
    losses: dict[str, list[float]] = {}
    start: dict[str, torch.Tensor] = {}
    for library in (graftlm, peft):
        base = tied(name, tie)
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model = (theirs if library is peft else graftlm.get_peft_model)(base, config(method, name, library))
        start = start or {k: v.clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}
        library.set_peft_model_state_dict(model, start)
        losses[library.__name__] = twenty_steps(model, lambda step: with_tokens(name, seed=step % 4), 0.03)
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-4:]) < sum(losses["graftlm"][:4])


BY_NAME: dict[str, Any] = {
    "embed": ({"embed_tokens": [3, 8]}, False),
    "apart": ({"embed_tokens": [3, 8], "lm_head": [8, 4, 9]}, False),
    "same": ({"embed_tokens": [3, 8], "lm_head": [3, 8]}, False),
    "untied": ({"embed_tokens": [3, 8], "lm_head": [8, 4, 9]}, True),
    "head": ({"lm_head": [8, 4]}, True),
}


@pytest.mark.parametrize("case", BY_NAME)
def test_modules_by_name(case: str, tmp_path: Path) -> None:
    indices, untied = BY_NAME[case]

    def settings(lib: Any) -> Any:
        return lib.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=indices)

    both_ways(lambda: tied("llama", not untied), settings, with_tokens("llama"), tmp_path)
    model = graftlm.get_peft_model(tied("llama", not untied), settings(graftlm))
    head = model.base.lm_head
    follows = hasattr(head, "changes") and isinstance(head.changes["default"], TiedTokens)
    assert follows == (case in ("embed", "same"))


def test_several_targets(tmp_path: Path) -> None:
    def settings(lib: Any) -> Any:
        return lib.TrainableTokensConfig(token_indices=[3, 8], target_modules=["embed_tokens", "lm_head"])

    both_ways(lambda: tied("llama", False), settings, with_tokens("llama"), tmp_path)


def test_random_start() -> None:
    for library in (graftlm, peft):
        torch.manual_seed(0)
        made = library.get_peft_model(fresh("llama"), library.TrainableTokensConfig(token_indices=IDS, init_weights=False))
        rows_ = next(p for p in made.parameters() if p.requires_grad)
        assert not torch.equal(rows_, fresh("llama").model.embed_tokens.weight[IDS])


# -- only those rows ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "tie"),
    [
        (n, t)
        for n in ("llama", "gpt2", "opt", "gemma3", "bart", "t5")
        for t in (True, False)
        if t or n not in ("bart", "t5")
    ],
)
def test_as_a_base_with_these_rows(name: str, tie: bool) -> None:
    """The reference: the base's own tables with the rows written into them. Untrained it changes nothing."""
    model = graftlm.get_peft_model(tied(name, tie), config("tokens", name)).eval()
    inputs = with_tokens(name)
    reference = tied(name, tie)
    close(logits_of(model, **inputs), logits_of(reference, **inputs), 1e-6)
    randomise(model, scale=0.5)
    (_, delta), *more = model.adapter_parameters("default")
    assert not more and delta.shape == (3, reference.get_input_embeddings().weight.shape[1])
    with torch.no_grad():
        reference.get_input_embeddings().weight[IDS] = delta
    wanted = logits_of(reference, **inputs)
    assert (wanted - logits_of(tied(name, tie), **inputs)).abs().max() > 1e-2
    close(logits_of(model, **inputs), wanted)
    generated = [m.generate(inputs["input_ids"][:1], max_new_tokens=5, do_sample=False) for m in (model, reference)]
    assert torch.equal(*generated)


def test_a_head_keeps_its_bias() -> None:
    """HF PEFT leaves it out."""
    base = build("phi3")
    base.lm_head = torch.nn.Linear(32, VOCAB)
    model = graftlm.get_peft_model(base, graftlm.TrainableTokensConfig(token_indices=IDS, target_modules=["lm_head"])).eval()
    plain = copy.deepcopy(base.lm_head.base_layer)
    randomise(model)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        plain.weight[IDS] = next(p for _, p in model.adapter_parameters("default"))
        close(model.base.lm_head(x), plain(x))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_mixed_rows(name: str) -> None:
    """Rows of adapters with other tokens, of LoRA with tokens, compositions and the base: each as alone; left-padded."""
    model = graftlm.get_peft_model(tied(name), config("tokens", name))
    model.add_adapter("other", graftlm.TrainableTokensConfig(token_indices=[6, 7, 8, 9]))
    model.add_adapter("both", config("lora_tokens", name))
    model.add_adapter("lora", config("lora_default", name))
    model.add_adapter("prompt", config("prompt", name))
    for i, adapter in enumerate(model.methods):
        model.set_adapter(adapter)
        randomise(model, seed=i, scale=0.3)
    model.eval()
    names = ["default", "other", ["both", "other"], "__base__", ["prompt", "default", "lora"], "prompt"]
    if name == "t5":
        inputs: dict[str, Any] = batch(name, rows=6)
        inputs["decoder_input_ids"] = inputs.pop("labels")
    else:
        inputs = padded(rows(name, (7, 4, 5, 6, 3, 8)), "left")
    inputs["input_ids"][:, -3:] = torch.tensor([5, 7, 90])
    got = logits_of(model, **inputs, adapter_names=names)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(got[i, -4:], logits_of(model, **own, adapter_names=[row])[0, -4:], 3e-5)


def test_packed_and_mixed_training_gives_the_padded_gradients() -> None:
    """The loss from the hidden states, rows packed, adapters mixed: as each row alone, without short cuts."""
    model = graftlm.get_peft_model(tied("llama"), config("tokens", "llama"))
    model.add_adapter("other", graftlm.TrainableTokensConfig(token_indices=[6, 7]))
    model.set_adapter(["default", "other"])
    randomise(model)
    inputs = with_tokens("llama", rows=4)
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    names = ["default", "other", ["default", "other"], "__base__"]
    found = []
    for lean in (True, False):
        model.lean = lean
        model.zero_grad()
        model.train()(**inputs, adapter_names=names).loss.backward()
        found.append([p.grad.clone() for n in ("default", "other") for _, p in model.adapter_parameters(n)])
        assert all(g.abs().sum() > 0 for g in found[-1])
    for mine, plain in zip(*found, strict=True):
        close(mine, plain)


def test_tokens_of_two_active_adapters_may_not_overlap() -> None:
    model = graftlm.get_peft_model(fresh("llama"), config("tokens", "llama"))
    model.add_adapter("other", graftlm.TrainableTokensConfig(token_indices=[3, 90, 5]))
    with pytest.raises(CompositionError, match=r"tokens \[5, 90\]"):
        model.set_adapter(["default", "other"])
    with pytest.raises(CompositionError, match=r"tokens \[5, 90\]"):
        model(**batch("llama", rows=1), adapter_names=[["other", "default"]])
    logits_of(model, **batch("llama", rows=2), adapter_names=["other", "default"])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(CompositionError, match=r"tokens \[5, 90\]"):
            merge(adapter_names=["default", "other"])
    model.merge_adapter()
    with pytest.raises(CompositionError, match=r"tokens \[5, 90\]"):  # one after the other, as well
        model.merge_adapter(["other"])
    assert model.active_adapters == ["default"]


# -- merged ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "tie"),
    [(n, t) for n in ("llama", "gpt2", "t5", "bart", "bloom") for t in (True, False) if t or n not in ("bart", "t5")],
)
def test_merged_and_unmerged(name: str, tie: bool, tmp_path: Path) -> None:
    model, inputs = attach(name, "lora_tokens", base=tied(name, tie)), with_tokens(name)
    wanted, before = logits_of(model, **inputs), state_of(model)
    model.merge_adapter()
    close(logits_of(model, **inputs), wanted, 2e-5)
    randomise(model, seed=8)  # trained on while it is merged
    again = logits_of(model, **inputs)
    assert (again - wanted).abs().max() > 1e-3
    model.unmerge_adapter()
    close(logits_of(model, **inputs), again, 2e-5)
    base = {k: v for k, v in before.items() if "lora" not in k and "tokens_delta" not in k}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())
    merged = model.merge_and_unload()
    close(logits_of(merged, **inputs), again, 2e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tie
    assert merged.config.tie_word_embeddings == tie
    merged.save_pretrained(tmp_path)
    close(logits_of(type(merged).from_pretrained(tmp_path), **inputs), again, 2e-5)


def test_a_copied_and_a_pickled_wrapper() -> None:
    import pickle

    model, inputs = attach("llama", "tokens", base=tied("llama")), with_tokens("llama")
    wanted = logits_of(model, **inputs)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits_of(made, **inputs), wanted, 0)
        randomise(made, seed=7)
        reference = tied("llama")
        with torch.no_grad():
            reference.model.embed_tokens.weight[IDS] = next(p for _, p in made.adapter_parameters("default"))
        close(logits_of(made, **inputs), logits_of(reference, **inputs))
    close(logits_of(model, **inputs), wanted, 0)
    model.delete_adapter("default")
    close(logits_of(model, **inputs), logits_of(tied("llama"), **inputs), 0)


# -- quantised, new tokens ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_on_a_quantised_base(folders, method, scheme, tmp_path):  # noqa: F811
    base = load(folders["llama"], scheme)
    model = randomise(graftlm.get_peft_model(base, config(method, "llama"))).eval()
    inputs = with_tokens("llama")
    wanted = logits_of(model, **inputs)
    assert (wanted - logits_of(load(folders["llama"], scheme), **inputs)).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    close(logits_of(unpacked(from_theirs(load(folders["llama"], scheme), tmp_path)), **inputs), wanted, 1e-4)
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters("default"))


def test_only_new_rows_are_saved(tmp_path: Path) -> None:
    """The vocabulary grows by tokens that the adapter trains: its file holds their rows alone."""
    tied("llama").save_pretrained(tmp_path / "base")

    def resized(count: int = 2) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base.resize_token_embeddings(VOCAB + count, mean_resizing=False)
        return base

    settings = {"r": 2, "target_modules": ["q_proj"]}
    inputs = batch("llama")
    inputs["input_ids"][:, 2:4] = torch.tensor([VOCAB, VOCAB + 1])
    for make in (
        lambda ids: graftlm.TrainableTokensConfig(token_indices=ids),
        lambda ids: graftlm.LoraConfig(trainable_token_indices=ids, **settings),
    ):
        model = randomise(graftlm.get_peft_model(resized(), make([4, VOCAB, VOCAB + 1]))).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert [k for k in tensors if "lora" not in k] == [k for k in tensors if k.endswith("trainable_tokens_delta")]
        torch.manual_seed(99)
        again = graftlm.PeftModel.from_pretrained(resized(), tmp_path / "adapter")
        close(logits_of(again, **inputs), logits_of(model, **inputs))
        their = from_theirs(resized(), tmp_path / "adapter")
        close(logits_of(their, **inputs), logits_of(model, **inputs))
        with pytest.raises(ConfigError, match=r"Token index 96 is outside of the vocabulary, 0 to 95\. For new tok"):
            graftlm.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    model = randomise(graftlm.get_peft_model(resized(3), graftlm.TrainableTokensConfig(token_indices=[VOCAB]))).eval()
    with pytest.warns(UserWarning, match=r"rows adapter 'default' does not train \(97 to 98\)"):
        model.save_pretrained(tmp_path / "adapter")
    again = graftlm.PeftModel.from_pretrained(resized(3), tmp_path / "adapter")
    close(logits_of(again, **inputs), logits_of(model, **inputs))


def test_a_file_of_hf_peft_with_a_resized_vocabulary(tmp_path: Path) -> None:
    """It holds the whole embeddings beside the rows."""
    tied("llama").save_pretrained(tmp_path / "base")
    inputs = batch("llama")
    inputs["input_ids"][:, 2:4] = torch.tensor([VOCAB, VOCAB + 1])
    for settings in (
        peft.TrainableTokensConfig(token_indices=[VOCAB]),
        peft.LoraConfig(trainable_token_indices=[VOCAB], r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ):
        bases = []
        for seed in range(2):
            torch.manual_seed(seed)
            bases.append(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bases[-1].resize_token_embeddings(VOCAB + 2, mean_resizing=False)
        their = randomise(theirs(bases[0], settings)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their.save_pretrained(tmp_path / "theirs")
        wanted = logits_of(their, **inputs)
        close(logits_of(graftlm.PeftModel.from_pretrained(bases[1], tmp_path / "theirs"), **inputs), wanted)


def test_a_tied_head_shows_the_embeddings_rows() -> None:
    """`token_adapter` as HF PEFT has it; `ensure_weight_tying` asks nothing more of layers that share their rows."""
    for name in ("llama", "t5"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            settings: dict[str, Any] = {"target_modules": "all-linear", "trainable_token_indices": [1, 2]}
            model = graftlm.get_peft_model(tied(name), graftlm.LoraConfig(**settings, ensure_weight_tying=True))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert head.token_adapter.trainable_tokens_delta is embedding.token_adapter.trainable_tokens_delta
        assert head.trainable_tokens_delta["default"] is embedding.trainable_tokens_delta["default"]
        assert head.token_indices["default"] == [1, 2]
    untied = graftlm.get_peft_model(tied("llama", False), graftlm.LoraConfig(**settings))
    assert not hasattr(untied.get_output_embeddings(), "token_adapter")
    with pytest.raises(UnsupportedError, match="ensure_weight_tying is for decoder-only"):
        graftlm.get_peft_model(
            tied("t5"), graftlm.LoraConfig(**settings | {"modules_to_save": ["lm_head"]}, ensure_weight_tying=True)
        )


# -- what cannot be meant ----------------------------------------------------------------------------------------------
def test_errors() -> None:
    def tokens(**options: Any) -> Any:
        return graftlm.get_peft_model(tied("llama"), graftlm.TrainableTokensConfig(**options))

    def lora(**options: Any) -> Any:
        settings = {"target_modules": ["q_proj"]} | options
        return graftlm.get_peft_model(tied("llama"), graftlm.LoraConfig(**settings))

    for wrong in (VOCAB, -1):
        with pytest.raises(ConfigError, match=f"Token index {wrong} is outside of the vocabulary, 0 to 95"):
            tokens(token_indices=[1, wrong])
        with pytest.raises(ConfigError, match=f"Token index {wrong} is outside of the vocabulary, 0 to 95"):
            lora(trainable_token_indices=[1, wrong])
    with pytest.raises(ConfigError, match=r"\[4\] more than once"):
        tokens(token_indices=[4, 1, 4])
    with pytest.raises(ConfigError, match="expected tokens, each once"):
        tokens()
    with pytest.raises(ConfigError, match="token_indices="):
        graftlm.TrainableTokensConfig(token_indices=["a"])  # type: ignore[list-item]
    with pytest.raises(TargetError, match="no module of this model is called 'embed'; did you mean 'embed_tokens'"):
        lora(trainable_token_indices={"embed": [1]})
    with pytest.raises(TargetError, match="'model.shared' only holds a weight"):
        graftlm.get_peft_model(tied("bart", False), graftlm.TrainableTokensConfig(token_indices=[1]))
    with pytest.raises(UnsupportedError, match="Rows of 'model.norm'"):
        lora(trainable_token_indices={"model.norm": [1]})
    with pytest.raises(ConfigError, match="'model.embed_tokens' is changed by this adapter already"):
        lora(trainable_token_indices=[1], target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedError, match="trained in full"):
        lora(trainable_token_indices=[1], modules_to_save=["embed_tokens"])
    model = lora(trainable_token_indices=[1])
    model.add_adapter("low", graftlm.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="'low' has a low-rank change of a layer of which another one trains rows"):
        model.add_weighted_adapter(["default", "low"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config


def test_nothing_is_left_after_an_error() -> None:
    base = tied("llama")
    with pytest.raises(ConfigError):
        graftlm.get_peft_model(base, graftlm.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 500]))
    assert state_of(base).keys() == state_of(tied("llama")).keys()
