"""Recipes and runs: reading, refusing, training, resuming, and giving the base back."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from training_helpers import NEEDED, Kill, equal, save_base, save_tweets
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm import PeftModel, get_peft_model
from graftlm.errors import ConfigError, RecipeError
from graftlm.training import (
    BaseModelError,
    Evaluation,
    Recipe,
    Together,
    TrainingInterrupted,
    advice,
    evaluate,
    generate_texts,
    measure,
    recipe_of,
    resolve_base,
    run,
    train_together,
)
from graftlm.training.defaults import DEFAULTS, REFERENCE, config_type, method_names, method_type
from graftlm.training.output import open_output
from graftlm.training.schema import load_yaml

evaluation_module = importlib.import_module("graftlm.training.evaluation")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    save_tweets(folder / "tweets")
    return folder


def recipe(place: Path, output: Path, *overrides: str, **values) -> Recipe:
    training = {"epochs": 2, "batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, "threads": 1}
    start = {"base": str(place / "base"), "data": {"source": str(place / "tweets")}, "training": training}
    return Recipe.from_dict(start | {"output_dir": str(output)} | values, overrides)


# -- reading -----------------------------------------------------------------------------------------------------------
def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(
            {
                "trainig": {},
                "epochs": 3,
                "data": {"sorce": "x", "seed": 3},
                "training": {"epochs": -1, "schedule": "linaer"},
            },
            ["training.learnin_rate=1e-3", "nonsense"],
        )
    text = str(caught.value)
    for part in (
        "trainig: unknown key; did you mean 'training'?", "epochs: unknown key; did you mean 'training.epochs'?",
        "data.sorce: unknown key; did you mean 'source'?", "data.seed: unknown key; did you mean 'training.seed'?",
        "training.learnin_rate: unknown key; did you mean 'learning_rate'",
        "training.epochs: input should be greater than 0",
        "'nonsense': expected key=value",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    "values, told",
    [
        ({"method": "lorra"}, "did you mean 'lora'"),
        (
            {"method_options": {"lora_alfa": 3}},
            "method_options.lora_alfa: LoraConfig has no such field; did you mean 'lora_alpha'",
        ),
        ({"method_options": {"lora_dropout": 2}}, "lora_dropout=2"),
        ({"method_options": 3}, "method_options"),
        ({"overwrite": True, "resume": True}, "choose one"),
        ({"training": {"early_stopping": 1, "eval_strategy": "no"}}, "early_stopping needs"),
        ({"training": {"schedule": "linaer"}}, "did you mean 'linear'"),
        ({"data": 3}, "data: expected keys and values, got 3"),
    ],
)
def test_impossible_entries(values: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told.replace("(", r"\(")):
        Recipe.from_dict(values)


def test_yaml_round_trip(tmp_path: Path) -> None:
    made = Recipe.from_dict({"method": "p-tuning"}, ["training.learning_rate=1e-3", "data.columns={text: tweet}"])
    assert made.training.learning_rate == 1e-3 and made.data.columns == {"text": "tweet"}
    path = tmp_path / "r.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(path) == made
    assert Recipe.from_yaml(path, ["training.seed=5"]).training.seed == 5
    assert made.replace("training.epochs=3", method="lora").training.epochs == 3


@pytest.mark.parametrize("text, told", [("- a", "top level"), ("a: [", "not valid YAML"), (None, "cannot read")])
def test_files_that_are_no_recipes(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=told):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method: lora\nmethod: prompt-tuning\n", "line 2: the key 'method' stands in line 1 already"),
        ("data: {source: a}\ntraining:\n  epochs: 1\n  seed: 2\n  epochs: 3\n", "line 5: the key 'epochs' .* line 3"),
        ("method_options: {r: 4,\n  r: 8}\n", "line 2: the key 'r' stands in line 1"),
        ("data:\n  columns: {a: x, a: y}\n", "line 2: the key 'a'"),
    ],
)
def test_a_key_twice_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"r\.yaml is not valid YAML: {told}"):
        Recipe.from_yaml(path)
    with pytest.raises(RecipeError, match="the key 'r' stands"):
        Recipe.from_dict({}, ["method_options={r: 4, r: 8}"])


def test_one_key_in_several_mappings_is_fine(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {source: a, name: x}\nmethod_options: {r: 4}\ntraining: {seed: 1}\n")
    assert Recipe.from_yaml(tmp_path / "r.yaml").data.source == "a"
    merged = load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a, y: 4}\n")
    assert merged == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 1, "y": 4}}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_recipes_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("output_dir: l\u00f6ra\n", encoding=encoding)
    assert Recipe.from_yaml(tmp_path / "r.yaml").output_dir == "l\u00f6ra"


def test_recipes_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("seed: 1\noutput_dir: l\u00f6ra\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"r\.yaml, line 2: byte 21 \(0xf6\) is not UTF-8 text\. Save the file as UTF-8"):
        Recipe.from_yaml(tmp_path / "r.yaml")


def test_every_method_has_a_name_and_a_default() -> None:
    assert set(method_names()) == {
        "lora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck", "ia3", "loha",
        "miss", "oft", "boft", "adalora", "vera", "lokr", "randlora", "fourierft", "ln-tuning", "multitask-prompt-tuning",
        "adaption-prompt", "trainable-tokens", "cartridge",
    }  # fmt: skip
    assert set(DEFAULTS) == set(method_names().values())
    assert method_type("Prefix_Tuning") is method_type("p-tuning-v2")
    for name in method_names():
        config_type(name)(**DEFAULTS[method_type(name)].options)
        shapes = ((2048, 40), (256, 8))  # bases that are wider are deeper, too
        wide, narrow = (Recipe(method=name).filled(w, 50, layers).training.learning_rate for w, layers in shapes)
        assert wide < DEFAULTS[method_type(name)].rate(REFERENCE) == DEFAULTS[method_type(name)].learning_rate < narrow


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(20, 2, 10), (50, 4, 10), (160, 8, 8), (2000, 8, 3)])
def test_few_rows_make_enough_updates(rows: int, batch: int, epochs: int) -> None:
    filled = Recipe().filled(576, rows).training
    assert (filled.batch_size, filled.epochs) == (batch, epochs)
    own = Recipe(training={"epochs": 2, "batch_size": 3, "learning_rate": 0.5}).filled(576, rows)
    assert (own.training.batch_size, own.training.epochs, own.training.learning_rate) == (3, 2, 0.5)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_example_recipes_are_valid(path: Path) -> None:
    assert Recipe.from_yaml(path).base == "graftlm-base"


# -- bases -------------------------------------------------------------------------------------------------------------
def test_bases_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{}")
    for name, told in (
        ("graftlm-bse", "did you mean 'graftlm-base'"), (str(tmp_path / "none"), "no base model directory"),
        (str(tmp_path / "adapter"), "It is an adapter"), ("nobody/nothing", "there is no network"),
        (str(tmp_path / "bad"), "incomplete"),
    ):  # fmt: skip
        with pytest.raises(BaseModelError, match=told):
            resolve_base(name)
    with pytest.raises(BaseModelError, match="trust_remote_code"):
        resolve_base("graftlm-base", trust_remote_code=True)


@pytest.mark.parametrize("family, cls", [("t5", "T5ForConditionalGeneration"), ("llama", "LlamaForCausalLM"),
                                         ("bert", "BertForSequenceClassification")])  # fmt: skip
def test_kind_of_base_follows_its_configuration(family: str, cls: str, tmp_path: Path) -> None:
    model, tokenizer = resolve_base(str(save_base(tmp_path, family)), dtype="bf16")
    assert type(model).__name__ == cls and model.dtype is torch.bfloat16 and tokenizer.pad_token == "<pad>"


# -- runs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", sorted(method_names()))
def test_a_run_learns_and_gives_the_base_back(method: str, place: Path, tmp_path: Path) -> None:
    model, tokenizer = resolve_base(str(place / "base"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    needed = NEEDED.get(method, {})
    result = run(recipe(place, tmp_path, method=method, method_options=needed), model=model, tokenizer=tokenizer, quiet=True)
    m = result.metrics
    assert m["loss"] < m["loss_before"] and m["accuracy"] is not None
    assert m["file_bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size and m["trainable_parameters"] > 0
    assert m["tokens_per_second"] > 0 and m["peak_memory_bytes"] > 0 and m["seconds"] > 0
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert {"recipe.yaml", "metrics.json", "loss.png", "README.md", "adapter_config.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["loss"] == m["loss"]
    assert len(result.samples) == 5 and set(result.samples[0]) == {"prompt", "target", "before", "after"}
    last = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert min(last) == pytest.approx(m["loss"], abs=1e-5)
    assert "held-out accuracy of the base" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(model, tmp_path)
    again = measure(recipe_of(tmp_path), loaded, tokenizer)
    assert again is not None and again.metrics["loss"] == pytest.approx(m["loss"], abs=1e-5)


def test_runs_are_equal_bit_for_bit(place: Path, tmp_path: Path) -> None:
    options = {"method": "prompt-tuning"}
    for name in "ab":
        run(recipe(place, tmp_path / name, **options), quiet=True)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert equal(a, b)
    run(recipe_of(tmp_path / "a").replace(output_dir=str(tmp_path / "c")), quiet=True)
    assert equal(load_file(tmp_path / "c" / "adapter_model.safetensors"), a)


def test_resume_overwrite_and_continue(place: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(recipe(place, whole), quiet=True)
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe(place, cut), quiet=True, callbacks=[Kill(4)])
    with pytest.raises(RecipeError, match="--resume"):
        run(recipe(place, cut), quiet=True)
    with pytest.raises(RecipeError, match="cannot be resumed"):
        run(recipe(place, cut, resume=True, method="bottleneck"), quiet=True)
    run(recipe(place, cut, resume=True), quiet=True)
    name = "adapter_model.safetensors"
    assert equal(load_file(cut / name), load_file(whole / name))
    run(recipe(place, cut, "training.max_steps=1", overwrite=True), quiet=True)
    assert [p.name for p in cut.glob("checkpoint-*")] == ["checkpoint-1"]
    further = run(recipe(place, tmp_path / "more", init_from=str(whole)), quiet=True)
    assert further.metrics["loss"] < json.loads((whole / "metrics.json").read_text())["metrics"]["loss"]
    with pytest.raises(RecipeError, match="leave one out"):
        run(recipe(place, tmp_path / "no", init_from=str(whole), method="bottleneck"), quiet=True)
    with pytest.raises(RecipeError, match="leave method_options out"):
        run(recipe(place, tmp_path / "no", init_from=str(whole), method_options={"r": 2}), quiet=True)


def test_text_data_with_holdout_and_checkpointing(place: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"the train was late w{i} w3 yes"}) + "\n" for i in range(9))
    )
    made = recipe(
        place, tmp_path / "out", "training.gradient_checkpointing=true", "training.early_stopping=1",
        "training.accumulation=2",
        data={"source": str(tmp_path / "texts.jsonl"), "holdout": 0.3, "max_examples": 5}, method="prefix-tuning",
    )  # fmt: skip
    result = run(made, quiet=True)
    evaluated = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert result.metrics["accuracy"] is None and result.metrics["loss"] == pytest.approx(min(evaluated), abs=1e-5)
    assert result.samples and result.samples[0]["prompt"]
    none = run(
        recipe(place, tmp_path / "none", "data.holdout=0", data={"source": str(tmp_path / "texts.jsonl")}), quiet=True
    )
    assert none.metrics["loss"] is None and none.samples == []


@pytest.mark.parametrize("method", ["lora", "prefix-tuning"])
def test_checkpointing_each_nth_layer(method: str, place: Path, tmp_path: Path) -> None:
    seen: dict[int, set[tuple[bool, ...]]] = {0: set(), 1: set(), 2: set()}
    losses = []

    class Look(t.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            layers = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
            seen[every].add(tuple(m.gradient_checkpointing for m in layers))

    for every in seen:
        written = str(every) if every else "false"
        made = recipe(place, tmp_path / written, f"training.gradient_checkpointing={written}", method=method)
        history = run(made, quiet=True, callbacks=[Look()]).history
        losses.append([e["epoch_train_loss"] for e in history if "epoch_train_loss" in e])
    assert {k: next(iter(v)) for k, v in seen.items()} == {0: (False, False), 1: (True, True), 2: (True, False)}
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_encoder_decoder_run(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    save_base(place / "base", "t5")
    save_tweets(place / "tweets")
    result = run(recipe(place, tmp_path / "out", method="prompt-tuning"), quiet=True)
    assert result.metrics["loss"] < result.metrics["loss_before"]


# -- searched learning rates, and runs that learn nothing -----------------------------------------------------------------
def test_a_recipe_searches_its_learning_rate(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The rate that is trained with is one of those that were tried, the best on rows taken out of those to train on."""
    made = recipe(place, tmp_path / "out", "training.learning_rate=search", "training.budget=3s")
    assert made.training.budget == 3.0
    result = run(made)
    said = re.search(r"Learning rate (\S+?)(?: \(.*\))?, out of (.*)\.", capsys.readouterr().out)
    assert said is not None
    used = yaml.safe_load((result.output_dir / "recipe.yaml").read_text())["training"]["learning_rate"]
    assert f"{used:g}" == said[1]
    assert said[1] in said[2].split(", ") and len(said[2].split(", ")) == 5
    assert not list(tmp_path.glob("out-*"))


def test_a_resumed_run_keeps_the_rate_that_was_found(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    searching = ["training.learning_rate=search", "training.budget=2s", "training.epochs=4"]
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe(place, tmp_path / "out", *searching), callbacks=[Kill(5)])
    used = Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").training.learning_rate
    capsys.readouterr()
    run(recipe(place, tmp_path / "out", *searching, resume=True))
    assert "Searching" not in capsys.readouterr().out
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").training.learning_rate == used


def test_ctrl_c_in_a_search_promises_no_checkpoint(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Any) -> None:
        raise TrainingInterrupted("all saved")

    monkeypatch.setattr(Together, "run", stopped)
    with pytest.raises(KeyboardInterrupt, match="nothing was trained yet") as caught:
        run(recipe(place, tmp_path / "out", "training.learning_rate=search"), quiet=True)
    assert not isinstance(caught.value, TrainingInterrupted)


def test_searches_that_cannot_be(place: Path, tmp_path: Path) -> None:
    searching = recipe(place, tmp_path / "a", "training.learning_rate=search")
    with pytest.raises(RecipeError, match="runs that train together do not search"):
        train_together([searching, recipe(place, tmp_path / "b")], quiet=True)
    few = recipe(place, tmp_path / "c", "training.learning_rate=search", "data.max_examples=5")
    with pytest.raises(ConfigError, match="5 rows to train on are too few"):
        run(few, quiet=True)
    for value, told in (("soon", "learning_rate"), ("0", "learning_rate")):
        with pytest.raises(RecipeError, match=told):
            recipe(place, tmp_path / "d", f"training.learning_rate={value}")
    with pytest.raises(RecipeError, match="budget"):
        recipe(place, tmp_path / "d", "training.budget=soon")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["training.max_steps=2", "training.learning_rate=5e-4"], "2 updates only: raise training.epochs"),
        (["training.max_steps=2", "training.learning_rate=1e-9"], "1e-09 is too low: leave training.learning_rate out"),
        (["training.max_steps=2", "training.learning_rate=90"], "rate 90 is too high. Leave training.learning_rate out"),
    ],
)
def test_a_run_that_learns_nothing_says_why(place: Path, tmp_path: Path, changes: list[str], told: str) -> None:
    still = [
        "training.eval_strategy=no",
        "training.save_strategy=no",
        "training.load_best=false",
        "training.logging_steps=1",
    ]
    result = run(recipe(place, tmp_path / "out", *changes, *still), quiet=True)
    assert told in result.metrics["note"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["note"] == result.metrics["note"]


@pytest.mark.parametrize(
    ("labels", "losses", "told"),
    [
        ([[-100, -100, -100]] * 3 + [[-100, 5, 6]], (3.0, 1.0), "75% of the training rows have no labelled token"),
        ([[-100, 5, 6]], (3.0, 2.0, 9.0), "rose from 2 to 9: the learning rate 0.001 is too high"),
        ([[-100, 5, 6]], (2.9, 2.8), "The training loss is 2.8: the learning rate 0.001 is too high"),
        ([[-100, 5, 6]], (2.0, 1.9), "hardly moved (2 to 1.9): the learning rate 0.001 is too low for 180 updates"),
        ([[-100, 5, 6]], (3.0, 0.1), "learnt its rows by heart"),
        ([[-100, 5, 6]], (3.0, 2.0), "look whether prompt and answer are what you mean"),
    ],
)
def test_the_likeliest_reason(labels: list, losses: tuple[float, ...], told: str) -> None:
    data = SimpleNamespace(train_rows=Dataset.from_dict({"labels": labels}))
    before, after = (Evaluation(metrics={"loss": loss, "accuracy": None}) for loss in (2.0, 2.5))
    history = [{"loss": loss, "step": 90 * i} for i, loss in enumerate(losses, 1)]
    note = advice.note(Recipe().filled(576, 4), data, before, after, history, 1e-3)  # type: ignore[arg-type]
    assert note is not None and "no better than the base: held-out loss 2.000 before, 2.500 after" in note
    assert told in note


def test_a_constant_answer_is_no_success() -> None:
    targets = ("yes", "yes", "no", "yes")
    before = Evaluation(metrics={"loss": 9.0, "accuracy": 0.0})
    for accuracy, learnt in ((0.75, False), (1.0, True)):
        after = Evaluation(metrics={"loss": 1.0, "accuracy": accuracy}, targets=targets)
        assert (advice.verdict(before, after) is None) == learnt


@pytest.mark.parametrize(
    ("of", "told"),
    [
        (
            {"data": {"max_eval_examples": 4}},
            "measured on 4 held-out rows, with answers to 4 of them; this recipe's data has 6",
        ),
        (
            {"data": {"format": "completion", "columns": {"prompt": "Tweet text", "completion": "text_label"}}},
            "answers to 5",
        ),
        ({"data": {"split": "test", "eval_split": "train", "max_eval_examples": 6}, "swapped": True}, "other held-out rows"),
    ],
    ids=["fewer", "another format", "others"],
)
def test_a_baseline_of_other_rows_is_refused_before_training(of: dict, told: str, place: Path, tmp_path: Path) -> None:
    if of.pop("swapped", False):  # as many rows, and others
        save_tweets(tmp_path / "tweets")
        rows = (tmp_path / "tweets" / "train.csv").read_text().splitlines()
        (tmp_path / "tweets" / "train.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
        of["data"]["source"] = str(tmp_path / "tweets")
    data = {"source": str(place / "tweets")}
    model, tokenizer = resolve_base(str(place / "base"))
    baseline = measure(recipe(place, tmp_path / "x", **of | {"data": data | of["data"]}), model, tokenizer)
    mine = recipe(place, tmp_path / "run", data=data)
    steps: list[Any] = []
    with pytest.raises(RecipeError, match=told):
        run(mine, model=model, tokenizer=tokenizer, quiet=True, baseline=baseline, callbacks=[Noted(steps)])
    with pytest.raises(RecipeError, match="holds out no rows"):
        none = recipe(place, tmp_path / "none", data=data | {"split": "test", "eval_split": None, "holdout": 0.0})
        run(none, model=model, tokenizer=tokenizer, quiet=True, baseline=baseline, callbacks=[Noted(steps)])
    assert not steps
    run(
        mine,
        model=model,
        tokenizer=tokenizer,
        quiet=True,
        baseline=measure(mine, model, tokenizer),
        callbacks=[Noted(steps)],
    )
    assert steps


class Noted(t.TrainerCallback):
    """Keeps the numbers of the steps that began."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


# -- evaluation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [None, "prompt-tuning", "prefix-tuning", "lora"])
def test_losses_of_labelled_places_only_are_those_of_all_logits(
    method: str | None, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftlm.data import load_data, prepare

    model, tokenizer = resolve_base(str(place / "base"))
    rows = prepare(load_data(str(place / "tweets"), split="test"), tokenizer, "label")
    if method is not None:
        model = get_peft_model(model, config_type(method)(task_type="CAUSAL_LM")).eval()
    asked: list[bool] = []
    usual = evaluation_module.usual_loss
    monkeypatch.setattr(evaluation_module, "usual_loss", lambda m: asked.append(usual(m)) or asked[-1])
    few = evaluation_module.loss_metrics(model, tokenizer, rows, 4, False)
    assert asked and all(asked)
    monkeypatch.setattr(evaluation_module, "usual_loss", lambda m: False)
    assert few == pytest.approx(evaluation_module.loss_metrics(model, tokenizer, rows, 4, False), rel=1e-6, abs=1e-5)


def test_evaluation_does_not_depend_on_batches(place: Path) -> None:
    from graftlm.data import load_data, prepare

    model, tokenizer = resolve_base(str(place / "base"))
    rows = load_data(str(place / "tweets"), split="test")
    one, many = (evaluate(model, tokenizer, rows, batch_size=size) for size in (1, 4))
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-5) and one["accuracy"] == many["accuracy"]
    total, count = 0.0, 0
    for row in prepare(rows, tokenizer, "label"):
        labels = torch.tensor([row["labels"]])
        n = int(labels[:, 1:].ne(-100).sum())
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * n
        count += n
    assert one["loss"] == pytest.approx(total / count, abs=1e-5) and one["tokens"] == count
    assert evaluate(model, tokenizer, prepare(rows, tokenizer, "label"))["loss"] == pytest.approx(one["loss"], abs=1e-6)


def test_answers_that_the_losses_tell_are_those_of_generation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.data import CausalLMCollator, load_data, prepare

    model, tokenizer = resolve_base(str(place / "base"))
    rows = load_data(str(place / "tweets"), split="test")
    model = get_peft_model(model, config_type("lora")(task_type="CAUSAL_LM", r=4))
    prepared = prepare(rows, tokenizer, "label").select_columns(["input_ids", "attention_mask", "labels"])
    batch = CausalLMCollator(tokenizer)(list(prepared)[:-1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked: list[int] = []
    real = evaluation_module.generate_ids
    monkeypatch.setattr(evaluation_module, "generate_ids", lambda m, t, p, **o: asked.append(len(p)) or real(m, t, p, **o))
    few = evaluation_module.evaluation(model, tokenizer, rows)
    model.generation_config.repetition_penalty = 1.0001  # generation is more than the likeliest token
    every = evaluation_module.evaluation(model, tokenizer, rows)
    assert few == every and few.metrics["accuracy"] > 0.5
    assert asked == [round(len(rows) * (1 - few.metrics["accuracy"])), len(rows)]


def test_right_rows_are_told_whatever_their_lengths(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers at other places in each row: nearly all places have a label in some row."""
    model, tokenizer = resolve_base(str(place / "base"))
    tokenizer.padding_side = "right"
    rows = [{"input_ids": [5] * n + [6, 7], "labels": [-100] * n + [6, 7]} for n in range(2, 10)]
    with torch.no_grad():
        for row in rows[::2]:  # the likeliest tokens as labels
            for at in (-2, -1):
                logits = model(input_ids=torch.tensor([row["input_ids"][:at]])).logits
                row["input_ids"][at] = row["labels"][at] = int(logits[0, -1].argmax())

    def measured(most: int) -> tuple[dict[str, Any], set[int]]:
        monkeypatch.setattr(evaluation_module, "MOST_LOGITS", most)
        right: set[int] = set()
        return evaluation_module.loss_metrics(model, tokenizer, rows, 8, False, right), right

    (told, right), (tiled, none) = measured(1 << 26), measured(1)
    assert {0, 2, 4, 6} <= right and not none
    assert told == pytest.approx(tiled, rel=1e-5)


def test_accuracy_counts_exact_answers(place: Path) -> None:
    from graftlm.data import load_data

    class Says:
        """A model whose generation always writes `good` and the end."""

        def __init__(self, inner: t.PreTrainedModel, ids: list[int]) -> None:
            self.inner, self.ids = inner, ids

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def __call__(self, **inputs):
            return self.inner(**inputs)

        def generate(self, input_ids, **options):
            return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], dim=1)

    model, tokenizer = resolve_base(str(place / "base"))
    rows = load_data(str(place / "tweets"), split="test")
    for words, wanted in ((["good", "<pad>", "bad"], 0.5), (["good", "good"], 0.0), (["bad", "</s>"], 0.5)):
        said = Says(model, tokenizer.convert_tokens_to_ids(words))
        assert evaluate(said, tokenizer, rows)["accuracy"] == wanted


def test_generated_texts_are_those_of_each_prompt_alone(place: Path) -> None:
    model, tokenizer = resolve_base(str(place / "base"))
    prompts = ["the train was", "great", "late again thanks yes"]
    together = generate_texts(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [generate_texts(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert generate_texts(model, tokenizer, []) == [] and not model.training


def test_yaml_reads_a_bare_no_as_the_word(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {eval_strategy: no, save_strategy: no}\n")
    recipe = Recipe.from_yaml(path, overrides=["training.save_strategy=no"])
    assert (recipe.training.eval_strategy, recipe.training.save_strategy) == ("no", "no")


def test_an_output_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match="cannot be written into .*choose another directory"):
        open_output(Recipe(output_dir=str(tmp_path / "data.jsonl" / "run")))


def test_an_output_directory_that_cannot_be_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:  # as the system refuses those who are not root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("graftlm.training.output.TemporaryFile", refused)
    with pytest.raises(RecipeError, match=r"cannot be written into \(Permission denied\)"):
        open_output(Recipe(output_dir=str(tmp_path)))


def test_an_entry_of_several_kinds_has_one_line() -> None:
    with pytest.raises(
        RecipeError, match=r"(?s)1 problem\(s\)\n  training.learning_rate: .*greater than 0.*; or expected 'search'"
    ):
        Recipe.from_dict({"training": {"learning_rate": -1.0}})
