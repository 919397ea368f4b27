"""Liger's kernels are taken only where they are right and faster: with stand-ins, since Triton needs a GPU."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graftlm import kernels
from graftlm.kernels import liger


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Swapped(torch.autograd.Function):
    """Stands for Liger's RMSNorm: its arguments and modes, in torch."""

    @staticmethod
    def forward(ctx, x, weight, epsilon, offset, mode, in_place):
        assert (offset, mode) in ((0.0, "llama"), (1.0, "gemma")) and not in_place
        Swapped.calls += 1
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            wide = ctx.x.float()
            ctx.y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * (offset + weight.float())).to(
                x.dtype
            )
        return ctx.y.detach() * Swapped.factor

    @staticmethod
    def backward(ctx, gradient):
        return (
            *torch.autograd.grad(ctx.y, ctx.x, gradient * Swapped.factor, retain_graph=True),
            torch.zeros(1),
            None,
            None,
            None,
            None,
        )


def swiglu_forward(a, b):
    Swapped.calls += 1
    return a, b, F.silu(a) * b


def swiglu_backward(a, b, gradient):
    """Writes into what it is given, as Liger's."""
    share = torch.sigmoid(a)
    to_a = gradient * b * (share + a * share * (1 - share))
    b.copy_(gradient * a * share)
    a.copy_(to_a)
    return a, b


@pytest.fixture
def liger_stands_in(monkeypatch: pytest.MonkeyPatch):
    """Liger's two modules, on the CPU; `Swapped.factor` makes them wrong, `fast` slow."""
    modules = {"rms_norm": SimpleNamespace(LigerRMSNormFunction=Swapped)}
    modules["swiglu"] = SimpleNamespace(swiglu_forward=swiglu_forward, swiglu_backward=swiglu_backward)
    Swapped.calls, Swapped.factor = 0, 1.0
    monkeypatch.setattr(liger, "runs_on", lambda x: True)
    monkeypatch.setattr(liger, "operations", modules.get)
    monkeypatch.setattr(liger, "_WINS", {})
    monkeypatch.setattr(liger, "ROWS", 8)
    return lambda fast: monkeypatch.setattr(liger, "faster", lambda *_: fast)


@pytest.mark.parametrize("case", ["norm", "norm plus one", "swiglu"])
@pytest.mark.parametrize("way", ["faster", "slower", "wrong", "missing"])
def test_liger_is_taken_where_it_is_right_and_faster(
    way: str, case: str, liger_stands_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger_stands_in(way != "slower")
    if way == "wrong":
        Swapped.factor = 1.1
        monkeypatch.setattr(liger, "SwiGLU", SimpleNamespace(apply=lambda a, b: swiglu_forward(a, b)[-1] * 1.1))
    if way == "missing":
        monkeypatch.setattr(liger, "operations", lambda name: None)
    x, other = (normal(2, 5, 16, seed=i).requires_grad_() for i in (0, 1))
    weight = normal(16, seed=2)

    def run() -> Tensor:
        if case == "swiglu":
            return kernels.gated(x, other, "silu")
        return kernels.rms_norm(x, weight, 1e-6, one_more=case != "norm")

    with torch.no_grad():
        wanted = run()
    assert Swapped.calls == 0  # without gradients: ours
    got = run()
    tried = Swapped.calls
    inputs = [x, other] if case == "swiglu" else [x]
    outer = normal(*got.shape, seed=3)
    gradients = [torch.autograd.grad(got, inputs, outer, retain_graph=True) for _ in range(2)]
    again = run()
    assert (Swapped.calls > tried) == (way == "faster")
    monkeypatch.setattr(liger, "runs_on", lambda x: False)
    close(got, wanted)
    close(again, wanted)
    expected = torch.autograd.grad(run(), inputs, outer)
    for found in gradients:  # a graph can be gone through twice
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trial_leaves_checkpointing_alone(reentrant: bool, liger_stands_in: Any) -> None:
    liger_stands_in(True)
    x, weight = normal(2, 5, 16).requires_grad_(), normal(16, seed=2)
    made = checkpoint(lambda x: kernels.rms_norm(x * 2, weight, 1e-6), x, use_reentrant=reentrant)
    made.sum().backward()
    plain = x.detach().requires_grad_()
    kernels.rms_norm(plain * 2, weight, 1e-6).sum().backward()
    assert list(liger._WINS.values()) == [True]
    close(x.grad, plain.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["norm", "swiglu"])
def test_second_derivatives_raise(case: str, liger_stands_in: Any) -> None:
    liger_stands_in(True)
    x, other = normal(2, 16).requires_grad_(), normal(2, 16, seed=1)
    made = kernels.rms_norm(x, other[0], 1e-6) if case == "norm" else kernels.gated(x, other, "silu")
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(made.sum(), x, create_graph=True)


def test_each_mode_is_tried(liger_stands_in: Any) -> None:
    liger_stands_in(True)
    x = normal(2, 16).requires_grad_()
    for one_more in (False, True):
        kernels.rms_norm(x, normal(16, seed=2), 1e-6, one_more)
    assert [key[1] for key in liger._WINS] == [False, True]


def test_liger_is_timed_both_ways(liger_stands_in: Any) -> None:
    x = normal(4, 8)
    slow = lambda t: time.sleep(0.002) or t * 2  # noqa: E731
    assert liger.faster(lambda t: t * 2, slow, [x]) and not liger.faster(slow, lambda t: t * 2, [x])


def test_without_liger_nothing_is_found() -> None:
    assert liger.operations.__wrapped__("no_such_operation") is None
    assert not liger.wins("rms_norm", normal(2, 3), lambda t: t, lambda t: t)
