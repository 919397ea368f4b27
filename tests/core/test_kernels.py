"""The cheaper forms against plain ones: values and gradients."""

from __future__ import annotations

import itertools
import time
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import close, on_flash
from torch import Tensor

from graftlm import kernels
from graftlm.kernels import (
    HeadForm,
    Segments,
    Update,
    attention,
    blocks,
    grouped_low_rank,
    linear,
    lora,
    loss,
    mkl,
    packed,
    timing,
)
from graftlm.kernels.attention import Piece
from graftlm.kernels.gated import ACTIVATIONS as GATED


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# -- attention -----------------------------------------------------------------------------------------------------------
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], shared: int, keys: Tensor | None, values: Tensor | None,
    slopes: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The same by one mask over the whole row: q [H, N, D], k and v [G, N, D] -> [N, H, D]."""
    heads, count, _ = q.shape
    prefix = 0 if keys is None else keys.shape[1]
    if keys is not None and values is not None:
        k, v = torch.cat((keys, k), 1), torch.cat((values, v), 1)
    k, v = (t.repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
    owner = torch.tensor([-1] * shared + [i for i, n in enumerate(lengths) for _ in range(n)])
    place = torch.tensor([*range(shared), *(shared + j for n in lengths for j in range(n))])
    seen = ((owner[:, None] == owner) | (owner == -1)) & (place[:, None] >= place)
    seen = torch.cat((torch.ones(count, prefix, dtype=torch.bool), seen), 1)
    scores = q @ k.transpose(1, 2) * scale
    if slopes is not None:
        scores = scores + slopes[:, None, None] * torch.cat((torch.arange(prefix), prefix + place))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("way", ["short", "long", "varlen"])
@pytest.mark.parametrize(
    ("heads", "groups", "alibi", "shared", "prefix"),
    [
        (4, 4, False, 0, 0),
        (4, 2, False, 3, 0),
        (4, 1, False, 2, 3),
        (4, 4, True, 0, 5),
        (4, 4, True, 2, 3),
        (4, 2, False, 0, 4),
    ],
)
def test_segments_attend_like_a_masked_row(
    heads: int, groups: int, alibi: bool, shared: int, prefix: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "long":
        monkeypatch.setattr(attention, "LONG", 1)
    if way == "varlen":
        calls = on_flash(monkeypatch)
    lengths, width = [5, 5, 1, 7], 8
    count = shared + sum(lengths)
    tensors = [normal(count, n, width, seed=i).requires_grad_() for i, n in enumerate((heads, groups, groups))]
    memory = [normal(groups, prefix, width, seed=i + 5).requires_grad_() for i in range(2)] if prefix else []
    slopes = torch.rand(heads, generator=generator(9)) if alibi else None
    at = 0 if memory else None
    bounds = [shared + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    pieces = [Piece(a, b, (0, shared), at) for a, b in itertools.pairwise(bounds)]
    pieces = [Piece(0, shared, memory=at)] * (shared > 0) + pieces
    segments = Segments(pieces, [[tuple(memory)]] if memory else None, slopes)  # type: ignore[list-item]
    q, k, v = (t.transpose(0, 1) for t in tensors)
    got = segments.attend(q, k, v, 0, 0.3)
    wanted = dense_attention(q, k, v, lengths, shared, *(memory or (None, None)), slopes, 0.3)
    close(got, wanted)
    outer = normal(*got.shape, seed=11)
    for ours, theirs in zip(*(torch.autograd.grad(x, tensors + memory, outer) for x in (got, wanted)), strict=True):
        close(ours, theirs)
    assert way != "varlen" or len(calls) == (not alibi)


def test_gradients_of_keys_that_many_sequences_see_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    on_flash(monkeypatch)
    memory = [normal(2, 3, 8, seed=i, dtype=torch.bfloat16).requires_grad_() for i in range(2)]
    row = [normal(2, 300, 8, seed=2 + i, dtype=torch.bfloat16) for i in range(3)]
    pieces = [Piece(i, i + 1, (0, 0), 0) for i in range(300)]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        own = [m.detach().to(dtype).requires_grad_() for m in memory]
        made = Segments(pieces, [[tuple(own)]]).attend(*(t.to(dtype) for t in row), 0, 0.3)  # type: ignore[list-item]
        found.append(torch.cat(torch.autograd.grad(made, own, torch.ones_like(made))).float())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-2  # summed in bf16 it is 0.04


def test_attention_dropout_drops_and_its_gradient_is_that_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([0.0, 2.0])[torch.randint(0, 2, (2, 6, 6), generator=generator())].double()
    monkeypatch.setattr(attention, "_mask_of", lambda shares, p: mask)
    tensors = [normal(6, 2, 4, seed=i).requires_grad_() for i in range(3)]
    q, k, v = (t.transpose(0, 1) for t in tensors)
    got = Segments([Piece(0, 6)]).attend(q, k, v, 0, 0.5, 0.5)
    scores = (q @ k.transpose(1, 2) * 0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    wanted = (scores.softmax(-1) * mask @ v).transpose(0, 1)
    close(got, wanted)
    outer = normal(*got.shape, seed=3)
    for ours, theirs in zip(*(torch.autograd.grad(x, tensors, outer) for x in (got, wanted)), strict=True):
        close(ours, theirs)


# -- loss ----------------------------------------------------------------------------------------------------------------
FORMS = [HeadForm(), HeadForm(scale=0.3), HeadForm(softcap=5.0), HeadForm(scale=2.0, softcap=4.0)]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "scaled", "capped", "both"])
def test_losses_are_those_of_all_logits(form: HeadForm, bias: bool, smoothing: float) -> None:
    hidden = normal(300, 16, dtype=torch.float32).requires_grad_()
    weight = normal(9000, 16, seed=1, dtype=torch.float32)
    added = normal(9000, seed=2, dtype=torch.float32) if bias else None
    targets = torch.randint(0, 9000, (300,), generator=generator(3))
    share = torch.rand(300, generator=generator(4))
    logits = form.apply(F.linear(hidden, weight, added))
    wanted = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    ours = kernels.token_losses(hidden, weight, added, targets, form, smoothing=smoothing)
    chunks = loss.chunked_losses(lambda x: F.linear(x, weight, added), hidden, targets, form, smoothing)
    (gradient,) = torch.autograd.grad((wanted * share).sum(), hidden)
    for got in (ours, chunks):
        close(got, wanted)
        (own,) = torch.autograd.grad((got * share).sum(), hidden)
        close(own, gradient, 1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_losses_in_bf16_are_close_and_need_no_gradient(smoothing: float) -> None:
    hidden, weight = normal(70, 32, dtype=torch.bfloat16), normal(5000, 32, seed=1, dtype=torch.bfloat16) * 0.1
    targets = torch.randint(0, 5000, (70,), generator=generator(3))
    hidden.requires_grad_()
    logits = hidden.float() @ weight.float().T
    wanted = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    given = kernels.token_losses(hidden, weight, None, targets, HeadForm(), smoothing=smoothing)
    ours, theirs = (torch.autograd.grad(x.mean(), hidden)[0].float() for x in (given, wanted))
    assert float((ours - theirs).norm()) < 2e-2 * float(theirs.norm())
    with torch.no_grad():
        got = kernels.token_losses(hidden, weight, None, targets, HeadForm(), smoothing=smoothing)
    assert got.dtype is torch.float32
    close(got, wanted, 2e-2)
    assert kernels.token_losses(hidden[:0], weight, None, targets[:0], HeadForm()).shape == (0,)


@pytest.mark.parametrize("wrong", [-1, 50])
def test_labels_outside_the_vocabulary_raise(wrong: int) -> None:
    hidden, weight = normal(3, 8), normal(50, 8)
    with pytest.raises(IndexError, match=rf"labels from .*{wrong}.*50 entries"):
        kernels.token_losses(hidden, weight, None, torch.tensor([3, wrong, 7]), HeadForm())


@pytest.mark.parametrize("form", FORMS[:3], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_form_is_recognised(form: HeadForm, dtype: torch.dtype) -> None:
    raw = normal(2, 5, 200, dtype=dtype) * 6
    found = HeadForm.recognise(raw, form.apply(raw), 5.0)
    assert found is not None
    assert found.softcap == form.softcap
    assert found.scale == pytest.approx(form.scale, rel=2e-3)
    assert HeadForm.recognise(raw, raw + raw.abs(), 5.0) is None


# -- linear, LoRA, dropout -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trained", [False, True])
def test_onednns_product_has_torchs_gradients(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "way", lambda dtype, rows, transposed: linear.onednn)
    monkeypatch.setattr(linear, "_SMALL", {torch.float32: 0})
    x = normal(3, 21, 40, dtype=torch.float32).requires_grad_()
    weight = normal(24, 40, seed=1, dtype=torch.float32).requires_grad_(trained)
    bias = normal(24, seed=2, dtype=torch.float32).requires_grad_(trained)
    wanted_of = [x, weight, bias] if trained else [x]
    outer = normal(3, 21, 24, seed=3, dtype=torch.float32)
    got, wanted = kernels.product(x, weight, bias), F.linear(x, weight, bias)
    assert "Product" in type(got.grad_fn).__name__
    close(got, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y, wanted_of, outer) for y in (got, wanted)), strict=True):
        close(ours, theirs)


def narrow(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return normal(*shape, seed=seed, dtype=torch.float32).to(dtype)


def same_but_for_rounding(got: Tensor, wide: Tensor) -> None:
    """Whether a 16-bit result is the fp32 one, rounded once (sums in another order may round to the next number)."""
    unit = torch.finfo(got.dtype).eps
    assert ((got.float() - wide).abs() <= 0.51 * unit * wide.abs() + 1e-5).all()


@pytest.mark.parametrize("buffer", [2**22, 200], ids=["whole", "tiles"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_are_fp32s_rounded_once(
    dtype: torch.dtype, conv1d: bool, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        linear, "way", lambda dtype, rows, transposed: F.linear if dtype is torch.float32 else linear.widened
    )
    monkeypatch.setattr(linear, "_SMALL", {dtype: 0})
    monkeypatch.setattr(linear, "_BUFFER", buffer)
    linear._kept.__dict__.clear()
    x = narrow(3, 21, 40, dtype=dtype).requires_grad_()
    weight, bias = narrow(24, 40, seed=1, dtype=dtype), narrow(24, seed=2, dtype=dtype)
    weight = weight.t().contiguous().t() if conv1d else weight
    outer = narrow(3, 21, 24, seed=3, dtype=dtype)
    got = kernels.product(x, weight, bias)
    same_but_for_rounding(got, F.linear(x.float(), weight.float(), bias.float()))
    (gradient,) = torch.autograd.grad(got, x, outer)
    same_but_for_rounding(gradient, outer.float() @ weight.float())
    assert linear._kept.buffer.numel() <= max(2 * weight.numel(), buffer)
    with torch.inference_mode():
        assert torch.equal(kernels.product(x, weight, bias), got)
    with torch.no_grad():
        assert torch.equal(kernels.product(x, weight, bias), got)


@pytest.mark.parametrize("way", [linear.onednn, mkl.striped, linear.widened])
def test_products_may_be_written_into(way: linear.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what a linear layer gives: by an activation in place, by clamping (OLMo's `clip_qkv`)."""
    dtype = torch.bfloat16 if way is linear.widened else torch.float32
    fp32 = F.linear if way is linear.widened else way
    monkeypatch.setattr(linear, "way", lambda dtype, rows, transposed: fp32 if dtype is torch.float32 else way)
    monkeypatch.setattr(linear, "_SMALL", {dtype: 0})
    x, weight = narrow(2, 21, 40, dtype=dtype).requires_grad_(), narrow(24, 40, seed=1, dtype=dtype)
    y = kernels.product(x, weight)
    assert type(y.grad_fn).__name__ == "_ProductBackward"
    y.clamp_(-1, 1)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    inside = F.linear(x.float(), weight.float()).to(dtype).abs() <= 1
    torch.testing.assert_close(gradient.float(), inside.float() @ weight.float(), rtol=2e-2, atol=2e-2)


def test_trained_weights_in_16_bits_get_fp32s_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        linear, "way", lambda dtype, rows, transposed: F.linear if dtype is torch.float32 else linear.widened
    )
    monkeypatch.setattr(linear, "_SMALL", {torch.bfloat16: 0})
    x, weight = narrow(21, 40).requires_grad_(), narrow(24, 40, seed=1).requires_grad_()
    outer = narrow(21, 24, seed=3)
    made = torch.autograd.grad(kernels.product(x, weight), (x, weight), outer)
    same_but_for_rounding(made[0], outer.float() @ weight.float())
    same_but_for_rounding(made[1], outer.float().t() @ x.float())


def test_the_fastest_way_is_taken_where_it_wins_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    monkeypatch.setattr(timing, "shortest_times", lambda calls, like: times)
    calls, like = [lambda: None] * 3, torch.ones(1)
    for times[:], best in (([1.0, 0.9, 2.0], 0), ([1.0, 0.7, 0.6], 2), ([1.0, 0.3, 0.6], 1)):
        assert timing.fastest(calls, like, 0.8) == best


@pytest.mark.skipif(mkl._stripes() is None, reason="a torch whose MKL cannot be told how to cut products")
def test_a_product_that_mkl_cuts_along_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    get, put = cast("tuple[Any, Any]", mkl._stripes())
    seen: list[int] = []
    plain = F.linear
    monkeypatch.setattr(mkl.F, "linear", lambda *given: seen.append(get()) or plain(*given))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert mkl.takes_stripes()
    x, weight, bias = normal(5, 7, 40), normal(24, 40, seed=1), normal(24, seed=2)
    for before in (0, 2):
        put(before)
        close(mkl.striped(x, weight, bias), x @ weight.t() + bias)
        assert get() == before
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mkl.striped(x, weight.t(), bias)
    assert get() == 2
    put(0)
    assert seen == [3] * 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not mkl.takes_stripes()


def test_a_way_that_is_slower_by_far_is_timed_once() -> None:
    runs = [0, 0]

    def call(which: int, seconds: float) -> None:
        runs[which] += 1
        time.sleep(seconds)

    slow, quick = timing.shortest_times([lambda: call(0, 0.02), lambda: call(1, 0.001)], torch.ones(1))
    assert runs == [1, 5]
    assert slow > quick


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", [F.linear, mkl.striped, linear.onednn])
def test_a_layer_and_its_update_in_one_function(
    p: float, bias: bool, transposed: bool, way: linear.Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "way_for", lambda x, weight, backward=False: way)
    x, a, b = (
        normal(2, 13, 40).requires_grad_(),
        normal(3, 40, seed=1).requires_grad_(),
        normal(24, 3, seed=2).requires_grad_(),
    )
    weight = normal(40, 24, seed=3).t() if transposed else normal(24, 40, seed=3)
    shift = normal(24, seed=4) if bias else None
    torch.manual_seed(0)
    got = kernels.adapted_linear(x.float(), weight.float(), None if shift is None else shift.float(), a, b, 0.7, p)
    assert got is not None
    torch.manual_seed(0)
    wanted = kernels.low_rank(F.linear(x, weight, shift), x, a, b, 0.7, p)
    close(got.double(), wanted)
    outer = normal(2, 13, 24, seed=5)
    grads = [torch.autograd.grad(y, (x, a, b), outer.to(y.dtype), retain_graph=True) for y in (got, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs)
    got.clamp_(-1, 1)  # as what a linear layer gives, it may be written into
    torch.autograd.grad(got.sum(), x)


def test_a_layer_and_its_update_of_no_tokens() -> None:
    """A head that gets no labelled place."""
    x, weight, a, b = (normal(*shape, dtype=torch.float32) for shape in ((1, 0, 8), (6, 8), (2, 8), (6, 2)))
    got: Any = kernels.adapted_linear(x.requires_grad_(), weight, None, a.requires_grad_(), b.requires_grad_(), 1.0)
    assert got.shape == (1, 0, 6)
    assert all(not bool(t.any()) for t in torch.autograd.grad(got.sum(), (a, b)))


def test_a_layer_and_its_update_are_made_apart_where_the_layer_is_trained() -> None:
    x, weight, a, b = (normal(*shape, dtype=torch.float32) for shape in ((4, 8), (6, 8), (2, 8), (6, 2)))
    assert kernels.adapted_linear(x, weight, None, a, b, 1.0) is not None
    assert kernels.adapted_linear(x, weight.clone().requires_grad_(), None, a, b, 1.0) is None
    assert kernels.adapted_linear(x, weight, torch.ones(6, requires_grad=True), a, b, 1.0) is None
    assert kernels.adapted_linear(x, weight.half(), None, a, b, 1.0) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.adapted_linear(x, weight, None, a, b, 1.0) is None


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_in_16_bits_works_in_fp32_where_that_is_faster(
    grouped: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update and its gradients are those of fp32, rounded when they are handed on."""
    monkeypatch.setattr(lora, "working_dtype", lambda dtype, device: torch.float32)
    x, y = narrow(2, 12, 16), narrow(2, 12, 20, seed=1)
    a, b = normal(3, 16, seed=2, dtype=torch.float32), normal(20, 3, seed=3, dtype=torch.float32)
    outer = narrow(2, 12, 20, seed=4)
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        torch.manual_seed(0)
        start = y.to(dtype).clone()
        if grouped:
            out = kernels.grouped_low_rank(start, leaves[0], [kernels.Update(slice(0, 2), *leaves[1:], 0.5, p)], {})
        else:
            out = kernels.low_rank(start, *leaves, 0.5, p)
        made.append([out, *torch.autograd.grad(out, leaves, outer.to(dtype))])
    assert made[0][0].dtype is made[0][1].dtype is torch.bfloat16
    for ours, wide in zip(made[0], made[1], strict=True):
        torch.testing.assert_close(ours.float(), wide, rtol=1e-2, atol=1e-2)
    for ours, wide in zip(made[0][2:], made[1][2:], strict=True):  # never rounded
        torch.testing.assert_close(ours, wide)


def test_16_bit_values_are_kept_as_they_come_where_products_are_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the gradient of an update and of attention: no fp32 copy of what is in memory in bf16 anyway."""
    for module in (lora, attention):
        monkeypatch.setattr(module, "working_dtype", lambda dtype, device: torch.float32)
    x, y, q, k = narrow(2, 12, 16).requires_grad_(), narrow(2, 12, 20), narrow(4, 6, 8).requires_grad_(), narrow(2, 6, 8)
    a, b = normal(3, 16, dtype=torch.float32).requires_grad_(), normal(20, 3, dtype=torch.float32).requires_grad_()
    wide: set[tuple[int, ...]] = set()

    def keep(t: Tensor) -> Tensor:
        if t.dtype is torch.float32:
            wide.add(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        updated = kernels.low_rank(y.clone(), x, a, b, 0.5)
        attended = Segments([Piece(0, 6)]).attend(q, k, k, 0, 0.5)
    assert wide == {(3, 16), (20, 3), (24, 3), (2, 12, 6)}  # A, B, the product with A, and the probabilities
    for value, leaf in ((updated, x), (attended, q)):
        assert torch.autograd.grad(value.float().sum(), leaf)[0].dtype is torch.bfloat16


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("activation", GATED)
def test_gated_activations_and_their_gradients(activation: str, joint: bool) -> None:
    both = normal(2, 5, 24).requires_grad_()
    plain = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    gate, up = both.chunk(2, -1)
    got = kernels.gated(both, None, activation) if joint else kernels.gated(gate, up, activation)
    wanted = plain(gate) * up
    close(got, wanted, 0)
    outer = normal(2, 5, 12, seed=8)
    close(*(torch.autograd.grad(y, both, outer, retain_graph=True)[0] for y in (got, wanted)))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("view", [False, True], ids=["in_place", "view"])
@pytest.mark.parametrize("few", [False, True], ids=["one function", "few elements"])
def test_low_rank_update_and_its_gradients(p: float, view: bool, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not few:
        monkeypatch.setattr(lora, "_FEW", 0)
    x, a, b = (normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 5, 16), (3, 16), (12, 3)]))
    before = normal(2, 5, 12, seed=7).requires_grad_()

    def fresh() -> Tensor:
        y = before * 1.0
        return y.view(10, 12).view(2, 5, 12) if view else y

    torch.manual_seed(1)
    got = kernels.low_rank(fresh(), x, a, b, 0.7, p)
    torch.manual_seed(1)
    kept, scale = kernels.lora.keep_mask(x.reshape(-1, 16), p) if p else (torch.ones(10, 16), 1.0)
    wanted = before + 0.7 * scale * (x * kept.view(2, 5, 16)) @ a.T @ b.T
    close(got, wanted)
    outer = normal(2, 5, 12, seed=8)
    for ours, theirs in zip(*(torch.autograd.grad(y, (before, x, a, b), outer) for y in (got, wanted)), strict=True):
        close(ours, theirs)


def test_cheap_dropout_drops_its_share_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = kernels.dropout(x, 0.05)
    y.sum().backward()
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(0.05, abs=1e-3)
    assert y.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]
    assert kernels.dropout(x, 0.05, training=False) is x


def test_products_work_under_autocast() -> None:
    weight = normal(64, 32, dtype=torch.float32)
    hidden = normal(5, 32, seed=1, dtype=torch.float32).requires_grad_()
    targets = torch.arange(5)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        got = kernels.token_losses(hidden, weight, None, targets, HeadForm(), **options)
        q = normal(6, 2, 4, seed=2, dtype=torch.float32).transpose(0, 1)
        assert Segments([Piece(0, 6)]).attend(q, q, q.bfloat16(), 0, 0.5).dtype is torch.bfloat16
    close(got, F.cross_entropy(hidden @ weight.T, targets, reduction="none"), 5e-2)


# -- LoRA of several adapters --------------------------------------------------------------------------------------------
def updates(many: int, shape: tuple[int, ...], second: bool, scattered: bool, dtype: torch.dtype) -> list[Update]:
    """Adapters of other ranks, each with its part of x [..., 12] -> [..., 10]."""
    count = shape[1] if second else shape[0]
    found = []
    for i in range(many):
        places: Any = slice(i * count // many, (i + 1) * count // many)
        places = torch.arange(i, count, many) if scattered else places
        a, b = normal(i + 1, 12, seed=i, dtype=dtype), normal(10, i + 1, seed=i + 20, dtype=dtype)
        found.append(Update((slice(None), places) if second else places, a, b, 0.5 + i, 0.0))
    return found


def slowly(y: Tensor, x: Tensor, parts: list[Update]) -> Tensor:
    for u in parts:
        change = torch.zeros_like(y)
        change[u.index] = (x[u.index] @ u.a.T @ u.b.T) * u.scale
        y = y + change
    return y


@pytest.mark.parametrize("few", [True, False], ids=["side by side", "one by one"])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(("shape", "second"), [((6, 3), False), ((6,), False), ((1, 9), True)])
@pytest.mark.parametrize("grad", [False, True])
def test_updates_of_several_adapters(
    shape: tuple[int, ...], second: bool, scattered: bool, few: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "_WASTE", 1e12 if few else 0.0)
    x, y = normal(*shape, 12, seed=40), normal(*shape, 10, seed=41)
    parts = updates(3, shape, second, scattered, torch.float64)
    wanted = slowly(y, x, parts)
    kept: dict = {}
    if not grad:
        with torch.no_grad():
            for _ in range(2):  # the second time from what was kept
                close(grouped_low_rank(y.clone(), x, parts, kept), wanted)
            assert bool(kept) is few
        return
    leaves = [t.requires_grad_() for t in (x, y, *(f for u in parts for f in (u.a, u.b)))]
    got = grouped_low_rank(y * 1.0, x, parts, kept)
    close(got, wanted)
    outer = normal(*got.shape, seed=42)
    theirs = torch.autograd.grad(slowly(y, x, parts), leaves, outer)
    for mine, other in zip(torch.autograd.grad(got, leaves, outer), theirs, strict=True):
        close(mine, other)


def test_an_adapter_of_nan_stays_in_its_rows() -> None:
    x, y = normal(4, 1, 12), normal(4, 1, 10, seed=1)
    parts = updates(2, (4, 1), False, False, torch.float64)
    parts[0].b.fill_(torch.nan)
    with torch.no_grad():
        made = grouped_low_rank(y.clone(), x, parts, {})
    assert made[:2].isnan().all()
    close(made[2:], slowly(y, x, parts[1:])[2:])


needs_halves = pytest.mark.skipif(not blocks._multiplies_halves(), reason="a torch or a processor without FBGEMM")


@needs_halves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "size"), [(24, 40), (7, 5), (1, 100), (100, 1), (963, 700)])
def test_products_by_weights_in_16_bits(dtype: torch.dtype, out: int, size: int) -> None:
    weight = (
        normal(size, out, seed=1, dtype=torch.float32).to(torch.bfloat16 if dtype is torch.bfloat16 else torch.float16).t()
    )
    weight, bias = weight.to(dtype), normal(out, seed=2, dtype=dtype)
    kept = blocks.Halves(weight)
    for rows in ((1,), (3,), (2, 7), (70,), (0,)):
        x = normal(size, *rows, dtype=dtype).movedim(0, -1)  # not contiguous
        for b in (None, bias):
            wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
            got = kept(x, b)
            assert got.dtype is dtype
            assert got.shape == wanted.shape
            torch.testing.assert_close(got.double(), wanted, atol=1e-4 if dtype is torch.float32 else 0.3, rtol=1e-2)
            assert not got._is_view()


@needs_halves
def test_16_bits_are_only_for_weights_that_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "halves_win", lambda dtype: True)
    weight = normal(8, 6, dtype=torch.float32).half().float()
    assert isinstance(blocks.form(weight), blocks.Halves)
    assert isinstance(blocks.form(weight.t()), blocks.Halves)
    for value in (1 / 3, 65536.0, torch.inf, -torch.inf, torch.nan, 2.0**-26):
        for lying in (weight.clone(), weight.t().clone().t()):
            lying[3, 2] = value
            assert not isinstance(blocks.form(lying), blocks.Halves)
    assert not isinstance(blocks.form(weight.double()), blocks.Halves)
    tiny = weight.clone()
    tiny[0, 0] = 2.0**-24  # the smallest number of fp16
    assert blocks.form(tiny)(torch.eye(6), None)[0, 0].item() == 2.0**-24


@pytest.mark.parametrize("halves", [False, pytest.param(True, marks=needs_halves)], ids=["blocks", "halves"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_products_by_kept_blocks(transposed: bool, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "halves_win", lambda dtype: halves)
    weight = normal(*((40, 24) if transposed else (24, 40)), seed=1, dtype=torch.float32).mul_(8).round_()  # fits 16 bits
    weight = torch.nn.Parameter(weight, False)
    bias, x = normal(24, seed=2, dtype=torch.float32), normal(3, 7, 40, dtype=torch.float32).requires_grad_()
    outer = normal(3, 7, 24, seed=3, dtype=torch.float32)
    assert packed.packed(x, weight, bias) is None
    with packed.packed_weights([(weight, transposed)]):
        for change in (0.0, 1.0):
            with torch.no_grad():
                weight += change  # noticed: the blocks are made anew
            kept = packed.packed(x, weight, bias)
            assert kept is not None
            assert isinstance(kept.of(weight, backward=True), blocks.Halves) == halves
            got = packed.packed_product(x, kept, weight, bias)
            wanted = F.linear(x, weight.t() if transposed else weight, bias)
            close(got, wanted)
            close(*(torch.autograd.grad(y, x, outer)[0] for y in (got, wanted)))
            close(packed.packed_product(x.detach(), kept, weight, bias), wanted.detach())
        with packed.packed_weights([(weight, transposed)]):
            pass
        assert packed.packed(x, weight, bias) is not None, "the inner block has taken the outer one's away"
        assert packed.packed(x.double(), weight, bias) is None
        with torch.autocast("cpu"):
            assert packed.packed(x, weight, bias) is None
        weight.requires_grad_()
        assert packed.packed(x, weight, bias) is None
    assert packed.packed(x, weight.requires_grad_(False), bias) is None
