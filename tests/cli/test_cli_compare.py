"""`graftlm compare` and what `graftlm demo` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftlm.cli.demo import before_and_after, first_line
from graftlm.comparison import ComparisonResult, MethodRun

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
