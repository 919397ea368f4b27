"""Recipes over quantised bases: loading, training, what is refused, and what a run writes about the base."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import NEEDED, save_base, save_tweets
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm import PeftModel
from graftlm.errors import ConfigError, RecipeError, UnsupportedError
from graftlm.quantization import loading_options, quantized_layers, scheme_of
from graftlm.training import BaseModelError, Recipe, bases, measure, recipe_of, resolve_base, run
from graftlm.training.defaults import method_names
from graftlm.training.recipes import training_arguments

SCHEMES = ("int8", "nf4", "fp4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, the same saved in each scheme, and data."""
    folder = tmp_path_factory.mktemp("quantized")
    save_base(folder / "base")
    save_tweets(folder / "tweets")
    for scheme in SCHEMES:
        options = loading_options(scheme, torch.bfloat16, "cpu")
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, **options).save_pretrained(
            folder / scheme
        )
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / scheme)
    return folder


def recipe(place: Path, output: Path, *overrides: str, base: str = "base", **values: Any) -> Recipe:
    training = {"epochs": 2, "batch_size": 4, "learning_rate": 0.02, "save_strategy": "no", "load_best": False, "threads": 1}
    start = {"base": str(place / base), "data": {"source": str(place / "tweets")}, "training": training}
    return Recipe.from_dict(start | {"output_dir": str(output)} | values, overrides)


# -- reading -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, scheme", [("qlora", "nf4"), ("QLoRA", "nf4"), ("lora-int8", "int8"), ("lora_int8", "int8")])
def test_names_that_say_the_quantisation_too(name: str, scheme: str) -> None:
    for values in ({"method": name}, {"method": name, "quantization": scheme.upper()}):
        made = Recipe.from_dict(values)
        assert (made.method, made.quantization) == ("lora", scheme)
    assert Recipe().replace(method=name).quantization == scheme


@pytest.mark.parametrize("value", ["none", "no", False, None])
def test_no_quantisation(value: Any) -> None:
    assert Recipe.from_dict({"quantization": value}).quantization is None


@pytest.mark.parametrize(
    "values, told",
    [
        ({"quantization": "nf5"}, "expected 'int8', 'nf4' or 'fp4', got 'nf5'; did you mean 'nf4'"),
        ({"quantization": 4}, "expected 'int8', 'nf4' or 'fp4', got 4"),
        ({"method": "qlora", "quantization": "int8"}, "qlora is lora with quantization: nf4, and the recipe says int8"),
        ({"method": "qlroa"}, "did you mean 'qlora'"),
        ({"dtype": "f16"}, "did you mean 'fp16'"),
    ],
)
def test_impossible_entries(values: dict, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(values)
    assert told in str(caught.value)


# -- loading -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_is_quantised_while_it_is_loaded(scheme: str, place: Path) -> None:
    plain, _ = resolve_base(str(place / "base"))
    model, _ = resolve_base(str(place / "base"), quantization=scheme)
    assert scheme_of(model) == scheme and not model.training and model.dtype is torch.float32
    assert model.get_memory_footprint() < plain.get_memory_footprint() and model.num_parameters() == plain.num_parameters()


@pytest.fixture(params=[True, False], ids=["bf16", "no-bf16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is one that multiplies bf16."""
    monkeypatch.setattr(bases, "cpu_has_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype, computes", [("auto", "bfloat16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_products_of_four_bit_layers(dtype: str, computes: str, place: Path, has_bf16: bool) -> None:
    computes = "float32" if dtype == "auto" and not has_bf16 else computes
    model, _ = resolve_base(str(place / "base"), quantization="nf4", dtype=dtype)
    assert {layer.compute_dtype for _, layer in quantized_layers(model)} == {getattr(torch, computes)}
    assert model.dtype is (torch.bfloat16 if dtype == "bf16" else torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
def test_a_checkpoint_that_was_saved_quantised(scheme: str, dtype: str, place: Path, has_bf16: bool) -> None:
    """In its own dtype, or where that is not told and bf16 is slow here in fp32, its products too."""
    wide = dtype == "fp32" or (dtype == "auto" and not has_bf16)
    for wanted in (None, scheme):
        model, _ = resolve_base(str(place / scheme), quantization=wanted, dtype=dtype)
        assert scheme_of(model) == scheme
        assert model.dtype is (torch.float32 if wide else torch.bfloat16)
        if dtype == "auto" and scheme != "int8":
            computes = {layer.compute_dtype for _, layer in quantized_layers(model)}
            assert computes == {torch.bfloat16 if has_bf16 else torch.float32}
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_other_kinds_of_model(family: str, tmp_path: Path) -> None:
    model, _ = resolve_base(str(save_base(tmp_path, family)), quantization="int8")
    assert scheme_of(model) == "int8"


def test_what_cannot_be_loaded(place: Path, tmp_path: Path) -> None:
    base = str(place / "base")
    strange = save_base(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    for name, options, told in (
        (str(place / "nf4"), {"quantization": "int8"}, "is saved in nf4, and quantization='int8' was asked for"),
        (str(strange), {}, "is quantised by 'gptq', on which GraftLM cannot train. It trains on int8, nf4, fp4"),
        (str(strange), {"quantization": "nf4"}, "is quantised by 'gptq'"),
        (base, {"device": "cuda:99"}, "device='cuda:99': torch finds"),
        (base, {"device": "gpu"}, "device='gpu': expected 'cpu', 'cuda'"),
        (base, {"dtype": "fp16", "device": "cpu"}, "dtype='fp16' needs a GPU.*Use 'bf16'"),
        (base, {"dtype": "fp61"}, "did you mean 'fp16'"),
    ):  # fmt: skip
        with pytest.raises(BaseModelError, match=told):
            resolve_base(name, **options)
    with pytest.raises(ConfigError, match="quantization='int4': expected one of int8, nf4, fp4; did you mean"):
        resolve_base(base, quantization="int4")


def test_without_bitsandbytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name, scheme in (("base", "nf4"), ("int8", None)):
        with pytest.raises(UnsupportedError, match="pip install bitsandbytes"):
            resolve_base(str(place / name), quantization=scheme)


# -- runs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", sorted(method_names()))
@pytest.mark.parametrize("scheme", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_every_method_learns(method: str, scheme: str, place: Path, tmp_path: Path) -> None:
    needed = NEEDED.get(method, {})
    result = run(recipe(place, tmp_path, method=method, method_options=needed, quantization=scheme), quiet=True)
    assert result.metrics["loss"] < result.metrics["loss_before"] and result.metrics["quantization"] == scheme


def test_a_run_tells_the_form_of_its_base(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = run(recipe(place, tmp_path / "a", method="qlora"), quiet=True).metrics
    assert found["loss"] < found["loss_before"] and found["quantization"] == "nf4"
    assert found["base_bytes"] == resolve_base(str(place / "base"), quantization="nf4")[0].get_memory_footprint()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"]["base_bytes"] == found["base_bytes"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| base quantised to | nf4 |" in card and f"| base in memory, bytes | {found['base_bytes']} |" in card
    again = recipe_of(tmp_path / "a")
    assert (again.method, again.quantization) == ("lora", "nf4")

    model, tokenizer = resolve_base(str(place / "base"), quantization="nf4")
    same = measure(again, PeftModel.from_pretrained(model, tmp_path / "a"), tokenizer)
    plain, _ = resolve_base(str(place / "base"))
    capsys.readouterr()
    other = measure(again, PeftModel.from_pretrained(plain, tmp_path / "a"), tokenizer)
    assert "trained on the same base in another form (nf4); here it is float32" in capsys.readouterr().out
    assert same is not None and same.metrics["loss"] == pytest.approx(found["loss"], abs=1e-4)
    assert other is not None and other.metrics["loss"] == pytest.approx(found["loss"], abs=0.3)

    unquantised = run(recipe(place, tmp_path / "b"), quiet=True).metrics
    assert unquantised["quantization"] is None and unquantised["base_bytes"] > found["base_bytes"]
    assert "quantised" not in (tmp_path / "b" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(model, tmp_path / "b")
    assert "trained on the same base in another form (float32); here it is nf4" in capsys.readouterr().out
    loaded.unload()


@pytest.mark.parametrize("quiet", [True, False])
def test_casts_are_told_unless_quiet(quiet: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = recipe(place, tmp_path, "training.gradient_checkpointing=true", dtype="bf16", quantization="nf4")
    result = run(made, quiet=quiet)
    assert result.metrics["loss"] < result.metrics["loss_before"]
    out = capsys.readouterr().out
    assert ("prepare_model_for_kbit_training:" in out) is not quiet and (out == "") is quiet


def test_a_quantised_checkpoint_trains(place: Path, tmp_path: Path) -> None:
    made = recipe(place, tmp_path, base="int8")
    result = run(made, quiet=True)
    assert result.metrics["quantization"] == "int8" and recipe_of(tmp_path).quantization is None


def test_a_base_that_is_given_loaded(place: Path, tmp_path: Path) -> None:
    model, tokenizer = resolve_base(str(place / "base"), quantization="nf4")
    for name in "ab":  # prepared twice
        result = run(recipe(place, tmp_path / name), model=model, tokenizer=tokenizer, quiet=True)
        assert result.metrics["quantization"] == recipe_of(tmp_path / name).quantization == "nf4"
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (tmp_path / "b/adapter_model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="quantization: int8, but the base that was given is nf4"):
        run(recipe(place, tmp_path / "c", quantization="int8"), model=model, tokenizer=tokenizer, quiet=True)
    plain = resolve_base(str(place / "base"))
    with pytest.raises(RecipeError, match="given is not quantised; load it by resolve_base"):
        run(recipe(place, tmp_path / "c", method="qlora"), model=plain[0], tokenizer=plain[1], quiet=True)
    assert not (tmp_path / "c").exists()


def test_resuming_over_another_form_is_refused(place: Path, tmp_path: Path) -> None:
    run(recipe(place, tmp_path, "training.max_steps=1", quantization="nf4"), quiet=True)
    with pytest.raises(RecipeError, match="quantization: 'nf4' then, None now"):
        run(recipe(place, tmp_path, resume=True), quiet=True)


def test_loftq_starts_from_what_rounding_took(place: Path, tmp_path: Path) -> None:
    options = {"init_lora_weights": "loftq", "target_modules": "all-linear"}
    result = run(recipe(place, tmp_path, method="qlora", method_options=options), quiet=True)
    assert result.metrics["loss"] < result.metrics["loss_before"]


def test_precision_follows_the_base(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(place, tmp_path)
    for dtype, told in ((torch.float32, (False, False)), (torch.bfloat16, (False, False)), (torch.float16, (False, False))):
        arguments = training_arguments(made, True, dtype)
        assert (arguments.bf16, arguments.fp16) == told
    monkeypatch.setattr("graftlm.training.arguments.has_accelerator", lambda: True)
    assert training_arguments(made, True, torch.float16).fp16
