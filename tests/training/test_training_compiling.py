"""torch.compile is kept only where it is exact and faster: with stand-ins for the compiler, and (slowly) with itself."""

from __future__ import annotations

import functools
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from families import build
from torch import nn
from training_helpers import arguments, equal, examples, losses, trained, wrapped

from graftlm.errors import RecipeError
from graftlm.training import CompiledLayers, Recipe, Trainer, train_together


def fit(folder: Path, method: str = "lora_dropout", compiles: bool = True) -> tuple[Trainer, CompiledLayers]:
    trainer = Trainer(
        wrapped(method, "llama"), arguments(folder, save_strategy="no"), train_dataset=examples(family="llama")
    )
    callback = CompiledLayers(trainer, times=3)
    if compiles:
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The same run without the compiler."""
    return fit(tmp_path_factory.mktemp("plain"), compiles=False)[0]


class _Silent:
    """Nothing that a tensor can be multiplied by."""

    def __rmul__(self, other: Any) -> Any:
        raise NotImplementedError

    __torch_function__ = classmethod(lambda cls, *args: (_ for _ in ()).throw(NotImplementedError()))


def stand_in(
    monkeypatch: pytest.MonkeyPatch, plain: float = 0.0, compiled: float = 0.0, factor: Any = 1.0, backward: float = 1.0
) -> list[int]:
    """Layers are "compiled" to what takes so many seconds more and gives `factor` times the result and `backward` times the
    gradient. Returns the calls."""
    calls: list[int] = []

    def compiled_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        time.sleep(compiled)
        found = layer._call_impl(*args, **kwargs, slow=False) * factor
        if backward != 1.0 and found.requires_grad:
            found.register_hook(lambda gradient: gradient * backward)
        return found

    def compile_layer(layer: Any, **options: Any) -> None:
        assert options == {"dynamic": True}
        forward = layer.forward

        def either(*args: Any, slow: bool = True, **kwargs: Any) -> Any:
            time.sleep(plain if slow else 0)
            return forward(*args, **kwargs)

        layer.forward = either
        layer._compiled_call_impl = functools.partial(compiled_call, layer)

    monkeypatch.setattr(nn.Module, "compile", compile_layer)
    return calls


def test_faster_layers_are_kept_until_training_ends(plain: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, plain=0.02)
    ours, callback = fit(tmp_path / "2")
    assert callback.trial is not None and callback.trial.kept and callback.trial.ratio is not None
    layers = len(callback.layers())
    assert len(calls) >= layers * (6 + 3)  # six steps and the trial's passes
    assert losses(ours) == losses(plain)
    assert equal(trained(ours.model), trained(plain.model))
    assert all(layer._compiled_call_impl is None for layer in callback.layers())


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"compiled": 0.02}, "a compiled pass takes .* of a plain one's time"),
        ({"factor": 1.1}, "change loss or gradients by"),
        ({"factor": float("nan")}, "change loss or gradients by nan"),
        ({"backward": float("nan")}, "change loss or gradients by nan"),
        ({"backward": 1.1}, "change loss or gradients by"),
        ({"factor": None}, "it failed \\(TypeError: "),
        ({"factor": _Silent()}, "it failed \\(NotImplementedError: no message"),
    ],
    ids=["slower", "other", "nan", "nan gradients", "other gradients", "failing", "failing without a word"],
)
def test_other_layers_are_not_kept(
    options: dict, reason: str, plain: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    calls = stand_in(monkeypatch, **options)
    ours, callback = fit(tmp_path / "2")
    assert callback.trial is not None and not callback.trial.kept
    assert any("torch.compile is left out" in r.getMessage() for r in caplog.records)
    assert calls
    assert losses(ours) == losses(plain)
    assert equal(trained(ours.model), trained(plain.model))
    assert re.search(reason, callback.trial.reason)


def test_a_model_of_transformers_with_dropout_is_compared_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, plain=0.02)
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    trainer = t.Trainer(model, arguments(tmp_path, save_strategy="no", max_steps=1), train_dataset=examples())
    trainer.add_callback(callback := CompiledLayers(trainer, times=3))
    trainer.train()
    assert callback.trial is not None and callback.trial.kept and calls


def test_models_without_such_layers(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor) -> dict:
            return {"loss": (self.weight * input_ids[:, :2]).sum()}

    trainer = Trainer(Own(), arguments(tmp_path, save_strategy="no", max_steps=1), train_dataset=examples())
    callback = CompiledLayers(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.trial is not None and "Own has no layers" in callback.trial.reason


def test_runs_that_train_together_are_not_compiled(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path)).replace("training.torch_compile=true")
    with pytest.raises(RecipeError, match="torch_compile .* train alone"):
        train_together([recipe])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("method", ["lora_dropout", "prompt", "prefix", "bottleneck"])
def test_the_compiler_itself(method: str, tmp_path: Path) -> None:
    """Whether it pays depends on the machine; what it gives does not."""
    plain, _ = fit(tmp_path / "1", method, compiles=False)
    ours, callback = fit(tmp_path / "2", method)
    trial = callback.trial
    assert trial is not None and trial.ratio is not None
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-4)
