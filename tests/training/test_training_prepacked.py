"""`training.prepacked`: recipes that keep the base's weights in the processor's layout too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_helpers import save_base, save_tweets

from graftlm.architectures import fast
from graftlm.errors import RecipeError
from graftlm.kernels import blocks, packed
from graftlm.training import Recipe, Together, resolve_base, run, train_together

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def recipe(folder: Path, name: str, prepacked: bool = True, **training: Any) -> Recipe:
    settings = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "threads": 1} | training
    values = {"base": str(folder / "base"), "data": {"source": str(folder / "tweets")}, "output_dir": str(folder / name)}
    return Recipe.from_dict(values | {"training": settings | {"prepacked": prepacked}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    save_tweets(tmp_path / "tweets")
    return tmp_path


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the products with kept weights."""
    made: list[int] = []
    for kind in (blocks.Plain, blocks.Blocks, blocks.Halves):
        monkeypatch.setattr(kind, "__call__", lambda *a, plain=kind.__call__: (made.append(1), plain(*a))[1])
    return made


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


def close(folder: Path, a: str, b: str) -> None:
    first, second = weights(folder, a), weights(folder, b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=1e-4, rtol=1e-3)


@needs_onednn
def test_a_run_learns_the_same(folder: Path, products: list[int]) -> None:
    run(recipe(folder, "plain", prepacked=False), quiet=True)
    assert not products
    run(recipe(folder, "kept"), quiet=True)
    assert len(products) >= 4 * 2 * 7  # four steps; forward and backward of two layers' four products, less the first one's
    assert not len(packed._KEPT)  # given back
    close(folder, "plain", "kept")


@needs_onednn
def test_too_little_memory_leaves_it_out(
    folder: Path, products: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(recipe(folder, "plain", prepacked=False), quiet=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    run(recipe(folder, "kept"), quiet=True)
    assert not products
    assert "training.prepacked is left out" in caplog.text
    for key, value in weights(folder, "plain").items():
        assert torch.equal(value, weights(folder, "kept")[key])


@needs_onednn
def test_runs_that_train_together_share_the_copies(
    folder: Path, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "CHOSEN", ())  # no fast forms but those of prepacked
    for name, steps in (("a1", 2), ("b1", 6)):
        run(recipe(folder, name, max_steps=steps), quiet=True)
    base, tokenizer = resolve_base(str(folder / "base"), device="cpu")
    before = {n: type(m) for n, m in base.named_modules()}
    products.clear()
    together, counts = Together(base, tokenizer, quiet=True), []
    together.add(recipe(folder, "a", max_steps=2), done=lambda outcome: counts.append(len(products)))
    together.add(recipe(folder, "b", max_steps=6), done=lambda outcome: counts.append(len(products)))
    outcomes = together.run()
    assert [o.error for o in outcomes] == [None, None]
    assert counts[1] - counts[0] >= 3 * 2 * 7  # the longer run goes on with them
    assert not len(packed._KEPT)
    assert {n: type(m) for n, m in base.named_modules()} == before
    for name in ("a", "b"):
        close(folder, name, f"{name}1")
    different = [recipe(folder, "c"), recipe(folder, "d", prepacked=False)]
    with pytest.raises(RecipeError, match=r"training.prepacked: False in the run of .*d, True in that of .*c"):
        train_together(different, quiet=True)
