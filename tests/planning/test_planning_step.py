"""The account of a step against a real one, and plans of whole runs."""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_helpers import KNOWN
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graftlm
from graftlm.errors import PlanError
from graftlm.kernels import linear
from graftlm.planning import machine as machines
from graftlm.planning import step as steps
from graftlm.planning.devices import device
from graftlm.planning.evaluating import evaluation_memory, generation_memory, longest, passed
from graftlm.planning.rows import Part, Rows, rows_given, stacked
from graftlm.planning.skeleton import skeleton
from graftlm.planning.step import StepMemory, Work, step_memory
from graftlm.training import Recipe, resolve_base
from graftlm.training.defaults import config_type, defaults_of
from graftlm.training.setup import INIT_FIELDS

HEAD = 16_384 * 256  # the head of the bundled base


class Counted(TorchDispatchMode):
    """Bytes of real storages that are alive, counted in another way than the planner's."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.highest = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.is_floating_point() and id(x.untyped_storage()) not in given | self.seen:
                storage = x.untyped_storage()
                self.seen.add(id(storage))
                self.live += storage.nbytes()
                self.highest = max(self.highest, self.live)
                weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        return made

    def gone(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.live -= size


def batch(rows: int = 3, length: int = 40) -> dict[str, Tensor]:
    ids = torch.randint(3, 900, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def real(method: str, form: str | None, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Activations kept, and the highest above the weights, of a real second step."""
    scheme, dtype = (None, "bf16") if form == "bf16" else (form, "fp32")
    base, _ = resolve_base("graftlm-base", dtype=dtype, quantization=scheme)
    options = {k: v for k, v in defaults_of(method).options.items() if k not in INIT_FIELDS}
    if scheme is not None:
        graftlm.prepare_model_for_kbit_training(base, False)
    model = graftlm.get_peft_model(base, config_type(method)(task_type="CAUSAL_LM", **options)).train()
    model(**inputs).loss.backward()
    model.zero_grad()
    with Counted() as counted:
        loss = model(**inputs).loss
        kept = counted.live
        loss.backward()
    return kept, counted.highest


@pytest.mark.parametrize(
    ("method", "form"),
    [("lora", None), ("prefix-tuning", None), ("lora", "nf4"), ("lora", "bf16")]
    + [pytest.param(m, None, marks=pytest.mark.slow) for m in ("bottleneck", "loha", "oft", "prompt-tuning")],
)
def test_a_step_over_fake_tensors_takes_what_the_real_one_takes(method: str, form: str | None) -> None:
    scheme, dtype = (None, "bf16") if form == "bf16" else (form, "fp32")
    planned = step_memory(Recipe.from_dict({"method": method, "quantization": scheme, "dtype": dtype}), batch())
    kept, highest = real(method, form, batch())
    assert planned.kept == pytest.approx(kept, rel=0.03)
    assert planned.kept + planned.workspace + planned.gradients == pytest.approx(highest, rel=0.10)


def test_ways_of_16_bits_are_timed_before_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that is timed on fake tensors would be chosen by chance."""
    asked: list[bool] = []
    way = linear.way.__wrapped__

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None)
        return way(*args, **kwargs)

    monkeypatch.setattr(linear, "way", functools.cache(noted))
    step_memory(Recipe.from_dict({"dtype": "bf16"}), batch(2, 8))
    assert asked and not any(asked)


def test_evaluation_takes_what_the_real_one_takes() -> None:
    recipe = Recipe.from_dict({"training": {"eval_batch_size": 4}})
    rows = [{"input_ids": [3] * 50, "labels": [-100] * 2 + [3] * 48}] * 6
    found = Rows(Part(rows), stacked, Part(rows))
    planned = evaluation_memory(recipe, found, skeleton(recipe))
    base, _ = resolve_base("graftlm-base", dtype="fp32")
    options = {k: v for k, v in defaults_of("lora").options.items() if k not in INIT_FIELDS}
    model = graftlm.get_peft_model(base, config_type("lora")(task_type="CAUSAL_LM", **options)).eval()
    inputs = stacked(rows[:4])
    with torch.no_grad():
        model(**inputs)
        with Counted() as counted:
            model(**inputs)
    shape = passed(skeleton(recipe), longest(recipe, found), gpu=False)
    assert shape.highest == pytest.approx(counted.highest, rel=0.10)
    assert shape.highest < planned < 2 * shape.highest  # with what the heap holds besides
    assert evaluation_memory(recipe, Rows(Part(rows), stacked), skeleton(recipe)) == 0
    answered = Rows(Part(rows), stacked, Part(rows), "label", True)
    assert generation_memory(recipe, answered, skeleton(recipe)) == 4 * (66 * 2 * 8 * 256 * 4 + 2 * 4 * 16_384)


def test_nothing_of_it_stays_in_the_process() -> None:
    """Ways are timed on real tensors, and the buffer of 16-bit products is not a fake one."""
    step_memory(Recipe.from_dict({"dtype": "bf16"}), batch(2, 8))
    assert not isinstance(vars(linear._kept).get("buffer"), FakeTensor)
    base, _ = resolve_base("graftlm-base", dtype="bf16")
    assert torch.isfinite(base(**batch(1, 8)).loss)


def test_checkpointing_and_length_show() -> None:
    def planned(**training: Any) -> StepMemory:
        return step_memory(Recipe.from_dict({"training": training}), batch(2, 64))

    plain, less = planned(), planned(gradient_checkpointing=True)
    assert less.kept < plain.kept / 4
    assert less.base == plain.base
    assert step_memory(Recipe.from_dict({}), batch(4, 64)).kept == pytest.approx(2 * plain.kept, rel=0.1)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was measured before."""
    monkeypatch.setattr("graftlm.planning.whole.machine", lambda form, say=None: KNOWN)


def test_a_plan(known: None) -> None:
    recipe = Recipe.from_dict({"training": {"batch_size": 4, "epochs": 2}})
    found = graftlm.plan(recipe, rows=10, length=30, device="16GiB")
    assert found.fits and found.updates == 6
    assert found.rows == {"rows": 10, "longest": 30, "quantile": 30, "tokens": 300}
    assert found.peak_bytes == found.process_bytes + found.step.total
    # 8 blocks of 12 width²; the head; attention; three steps an epoch, of 100 tokens in the mean and 120 at most
    work, formula = found.step.work, 4 * 120 * (6_291_456 + HEAD + 2 * 8 * 256 * 30)
    assert work.tokens == 120 and formula < work.operations < 1.3 * formula  # LoRA's products too
    step = (work.operations - formula / 6) / 2.5e10 + work.moved * 5 / 6 / 5e9 + work.calls * 2e-5
    saves = 3 * found.sizes.checkpoint / 2e8
    assert found.step_seconds == pytest.approx(step)
    assert found.seconds[1] == pytest.approx(6 * step + saves)
    assert found.seconds[0] < found.seconds[1] < found.seconds[2]
    assert "does not fit" in graftlm.plan(recipe, rows=10, length=30, device="100MiB").line()
    assert json.loads(json.dumps(found.to_dict(), default=str))["peak_bytes"] == found.peak_bytes


WORKS = [Work(2e9, 1e8, 2500, 32), Work(1e10, 7e8, 2500, 384), Work(1e10, 3e8, 1300, 64), Work(6e10, 1e9, 1400, 384)]


def seconds_at(rate: float, bandwidth: float, calls: float) -> list[float]:
    return [w.operations / rate + w.moved / bandwidth + w.calls * calls for w in WORKS]


def test_rates_are_fitted_to_steps() -> None:
    """Products, other operations and calls of known speed are found again, within what the machine was seen to do."""
    known = {"step_operations": 5e10, "bandwidth": 1e10, "call_seconds": 1e-5}
    assert machines.fitted(WORKS, seconds_at(5e10, 1e10, 1e-5), 8e10, 4e10) == pytest.approx(known)
    least = {"step_operations": 5e10, "bandwidth": 1e10, "call_seconds": 1e-6}
    assert machines.fitted(WORKS, seconds_at(5e10, 1e10, 1e-6), 5e10, 1e10) == pytest.approx(least)
    found = machines.fitted(WORKS, seconds_at(1e11, 1e10, 1e-5), 9e10, 4e10)  # faster than the fastest product
    assert found["step_operations"] == pytest.approx(9e10) and found["bandwidth"] > 1e10
    slow_moment = machines.fitted(WORKS, seconds_at(1e11, 1e12, 1e-6), 2e10, 4e12)
    assert slow_moment["step_operations"] >= 9e10, "whole steps were faster than the product"


def test_least_squares_without_negative_parts() -> None:
    """The best point of the quarter plane lies on its edge, where the free one has a negative part."""
    a, b = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    assert machines.non_negative(a, b) == pytest.approx([2.0, 0.0])
    assert machines.non_negative(a, a @ torch.tensor([0.5, 2.0]).double()) == pytest.approx([0.5, 2.0])
    assert machines.non_negative(a, -b) == [0.0, 0.0]


def test_together_the_base_counts_once(known: None) -> None:
    recipes = [Recipe.from_dict({"output_dir": name}) for name in ("a", "b")]
    one, both = graftlm.plan(recipes[0], rows=8, length=20), graftlm.plan(recipes, rows=8, length=20)
    assert both.step.base == one.step.base and both.together == 2
    assert both.step.kept == 2 * one.step.kept


@pytest.mark.parametrize("name", ["tpu", "-3GiB", "0", "h1000", "3XB"])
def test_devices_that_are_none(name: str) -> None:
    with pytest.raises(PlanError, match="expected"):
        device(name)


def test_gpus_by_name(known: None) -> None:
    recipe = Recipe.from_dict({"training": {"batch_size": 4}})
    found, here = graftlm.plan(recipe, rows=10, length=30, device="H100"), graftlm.plan(recipe, rows=10, length=30)
    assert found.device.free_bytes == 80 * 10**9 and found.recipe.dtype == "bf16"
    assert found.step.base == here.step.base // 2 and found.loading_bytes == 0
    assert "not checked on a GPU" in found.line() and "not checked" not in here.line()


def test_what_cannot_be_planned(known: None) -> None:
    assert device("16GiB").free_bytes == 16 << 30 and device("auto").free_bytes > 0
    with pytest.raises(PlanError, match="at least 1"):
        rows_given(-1, 20)
    with pytest.raises(PlanError, match="both"):
        graftlm.plan(Recipe.from_dict({}), rows=3)
    with pytest.raises(PlanError, match="no recipe"):
        graftlm.plan([])
    with pytest.raises(graftlm.errors.BaseModelError):
        graftlm.plan(Recipe.from_dict({"base": "./nowhere"}), rows=3, length=4)


def test_the_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path))
    calls: list[str] = []
    figures: dict[str, Any] = {
        "process_bytes": 7, "start_bytes": 5, "step_operations": 1e9, "bandwidth": 1e9,
        "call_seconds": 1e-5,
    }  # fmt: skip

    def measured(form: str) -> dict[str, float]:
        calls.append(form)
        return figures

    monkeypatch.setattr(machines, "measured", measured)
    assert machines.machine("fp32") == machines.machine("fp32") == machines.Machine(**figures)
    (tmp_path / "machine.json").write_text("{ broken", encoding="utf-8")
    machines.machine("fp32")
    assert calls == ["fp32", "fp32"]
    assert machines.known("fp32") == machines.Machine(**figures) and machines.known("bf16") is None


# -- blocks that are not alike, the heap ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"adapter_layers": 5}], ids=["all but two", "so many"])
def test_an_adapter_that_leaves_blocks_out_is_carried_on_as_it_grows(options: dict[str, Any]) -> None:
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=14, num_attention_heads=4, pad_token_id=0
    )
    recipe = Recipe.from_dict(
        {"base": "some/where", "dtype": "fp32", "method": "adaption-prompt", "method_options": options}
    )
    found, forms = skeleton(recipe, config), steps.short_cuts(recipe, config)
    carried = steps.heights(recipe, found, batch(), forms)
    whole = steps.traced(recipe, skeleton(recipe, config), batch(), forms)
    for name in ("kept", "highest", "operations"):
        assert getattr(carried, name) == pytest.approx(getattr(whole, name), rel=0.02), name


def test_products_that_are_timed_first_are_in_the_heap() -> None:
    """A step of a few tokens takes less than the weights on which its products are timed."""
    first = steps.timed_products(torch.float32)
    width, count = linear.timed_weights(torch.float32)
    assert first == (count * width * width * 4 if linear.takes_stripes() or linear.onednn_multiplies(torch.float32) else 0)
    recipe = Recipe.from_dict({"dtype": "fp32", "training": {"batch_size": 1}})
    found = steps.step_memory(recipe, batch(1, 4))
    held = found.gradients + found.kept + found.workspace + found.optimizer + found.allocator
    assert held >= first and (not first or found.allocator > held / 2)


def test_the_heap_says_what_is_in_use() -> None:
    before = machines.heap_state()
    if before is None:
        pytest.skip("another C library than glibc")
    held = [torch.ones(16_000) for _ in range(300)]  # each below what is mapped apart
    after = machines.heap_state()
    size = sum(x.nbytes for x in held)
    assert after is not None and size <= after[1] - before[1] < 1.2 * size
    del held
    last = machines.heap_state()
    assert last is not None and last[1] - before[1] < 0.1 * size
