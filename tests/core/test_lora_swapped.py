"""Hotswapping, scales, and new adapters out of several by the `_svd` and `magnitude_prune` combinations."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch
from helpers import close, fresh, logits_of, randomise
from lora_helpers import OPTIONS
from peft.helpers import rescale_adapter_scale as their_rescale
from peft.utils.hotswap import hotswap_adapter as their_hotswap
from test_parity import from_theirs
from torch import Tensor, nn

import graftlm
from graftlm.errors import AdapterError, CheckpointError, ConfigError
from graftlm.helpers import rescale_adapter_scale
from graftlm.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from graftlm.layers import Adapted

INPUTS = batch("llama")


def wrapped(seed: int = 2, **options: Any) -> graftlm.PeftModel:
    config = graftlm.LoraConfig(**{**OPTIONS, "target_modules": ["q_proj", "down_proj"], **options})
    return randomise(graftlm.get_peft_model(fresh("llama"), config), seed=seed, scale=0.3).eval()


# -- hotswapping -------------------------------------------------------------------------------------------------------
SWAPS: dict[str, dict[str, Any]] = {
    "same": {},
    "smaller": {"r": 2, "lora_alpha": 7},
    "larger": {"r": 9, "lora_alpha": 3},
    "fewer_layers": {"target_modules": ["q_proj"]},
    "patterns": {"rank_pattern": {"down_proj": 2}, "lora_alpha": 5},
}


@pytest.mark.parametrize("swap", SWAPS)
def test_hotswapped(swap: str, tmp_path: Path) -> None:
    """The new adapter under the old name, as HF PEFT swaps it; saved again it is the same."""
    wanted_model = wrapped(seed=9, **SWAPS[swap])
    wanted_model.save_pretrained(tmp_path / "new")
    wanted = logits_of(wanted_model, **INPUTS)
    model = wrapped()
    model.save_pretrained(tmp_path / "old")
    assert (logits_of(model, **INPUTS) - wanted).abs().max() > 1e-2
    hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    close(logits_of(model, **INPUTS), wanted)
    if swap != "patterns":  # HF PEFT does not find a pattern's layers here and scales them by the common rank
        their = from_theirs(fresh("llama"), tmp_path / "old")
        their_hotswap(their, str(tmp_path / "new"), adapter_name="default")
        close(logits_of(model, **INPUTS), logits_of(their, **INPUTS))
    model.save_pretrained(tmp_path / "again")
    close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "again"), **INPUTS), wanted)
    model.merge_adapter()
    close(logits_of(model, **INPUTS), wanted)


def test_swapped_for_fewer_layers_and_back(tmp_path: Path) -> None:
    """Layers that the one in between lacks leave no trace in what is swapped next. In a module without a wrapper."""
    settings = graftlm.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    first = graftlm.get_peft_model(fresh("llama"), settings)
    first.save_pretrained(tmp_path / "first")
    fewer = graftlm.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False)
    second = graftlm.get_peft_model(fresh("llama"), fewer)
    second.save_pretrained(tmp_path / "second")
    model = graftlm.inject_adapter_in_model(settings, fresh("llama"))
    for name, wanted in (("first", first), ("second", second), ("first", first)):
        hotswap_adapter(model, tmp_path / name, adapter_name="default")
        close(logits_of(model, **INPUTS), logits_of(wanted, **INPUTS))
        assert not model.peft_config["default"].alpha_pattern
    with pytest.raises(AdapterError, match="has no adapters"):
        prepare_model_for_compiled_hotswap(fresh("llama"))


def test_prepared(tmp_path: Path) -> None:
    """Padded ranks and scales in tensors compute the same, and can be swapped and saved."""
    folders = []
    for i, swap in enumerate(("same", "smaller", "larger", "fewer_layers")):
        folders.append(tmp_path / swap)
        wrapped(seed=9 + i, **SWAPS[swap]).save_pretrained(folders[-1])
    model = wrapped()
    wanted = logits_of(model, **INPUTS)
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    close(logits_of(model, **INPUTS), wanted)
    layer = next(m for m in model.modules() if isinstance(m, Adapted))
    weight, scale = layer.lora_A["default"].weight, layer.changes["default"].scaling  # type: ignore[union-attr, attr-defined]
    assert weight.shape[0] == 9
    for folder in folders:
        hotswap_adapter(model, folder, adapter_name="default")
        wanted = logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), folder), **INPUTS)
        close(logits_of(model, **INPUTS), wanted)
        assert layer.lora_A["default"].weight is weight  # type: ignore[union-attr]
        assert layer.changes["default"].scaling is scale  # type: ignore[attr-defined]
        model.save_pretrained(tmp_path / "again")
        close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "again"), **INPUTS), wanted)
    model.train()(**INPUTS).loss.backward()
    assert weight.grad is not None


class Convolutions(nn.Module):
    """Plain, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Experts(nn.Module):
    """Three matrices in one parameter, beside an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.stack = nn.Embedding(10, 4), nn.Module()
        self.stack.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,edf->btef", self.table(x), self.stack.weight)


@pytest.mark.parametrize("cls", [Convolutions, Experts])
def test_prepared_in_blocks(cls: type, tmp_path: Path) -> None:
    """Zeros for a larger rank stand behind each group's rows of A, behind each expert's."""
    x = torch.randn(2, 4, 7, 7) if cls is Convolutions else torch.arange(8).view(2, 4)

    def made(r: int) -> graftlm.PeftModel:
        targets: dict[str, Any] = {"target_modules": ["first", "second"]}
        if cls is Experts:
            targets = {"target_modules": ["table"], "target_parameters": ["stack.weight"]}
        return randomise(graftlm.get_peft_model(cls(), graftlm.LoraConfig(r=r, **targets)), seed=r, scale=0.3).eval()

    made(2).save_pretrained(tmp_path / "2")
    made(4).save_pretrained(tmp_path / "4")
    model, wanted = made(2), {r: made(r)(x) for r in (2, 4)}
    assert (wanted[2] - wanted[4]).abs().max() > 1e-2
    with pytest.raises(ConfigError, match="groups") if cls is Convolutions else nullcontext():
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    model = made(2)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    close(model(x), wanted[2])
    tensors = {name: (p, p.shape) for name, p in model.named_parameters()}
    for r in (4, 2, 4):
        hotswap_adapter(model, tmp_path / str(r), adapter_name="default")
        close(model(x), wanted[r])
    assert all(p is tensors[name][0] and p.shape == tensors[name][1] for name, p in model.named_parameters())
    made(6).save_pretrained(tmp_path / "6")
    with pytest.raises(ConfigError, match="prepared for rank 4, the new adapter has 6"):
        hotswap_adapter(model, tmp_path / "6", adapter_name="default")
    close(model(x), wanted[4])


def test_swapped_without_a_recompile(tmp_path: Path) -> None:
    """Scales and ranks that differ compile nothing anew."""
    for i, swap in enumerate(("smaller", "larger")):
        wrapped(seed=9 + i, **SWAPS[swap]).save_pretrained(tmp_path / swap)
    model = wrapped()
    prepare_model_for_compiled_hotswap(model, target_rank=9)
    compiles: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiles.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    ids = INPUTS["input_ids"]
    with torch.inference_mode():
        for _ in range(3):  # what a first pass finds out, later ones know
            first = compiled(input_ids=ids).logits
        assert compiles
        seen = len(compiles)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for swap in ("smaller", "larger"):
                hotswap_adapter(compiled, tmp_path / swap, adapter_name="default")
                got = compiled(input_ids=ids).logits
                alone = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / swap)
                close(got, alone(input_ids=ids).logits)
                assert (got - first).abs().max() > 1e-2
    assert len(compiles) == seen
    with pytest.raises(ConfigError, match=r"Call prepare_model_for_compiled_hotswap \*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled)


def test_what_cannot_be_swapped(tmp_path: Path) -> None:
    model = wrapped()
    before = logits_of(model, **INPUTS)
    for options in ({"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}):
        wrapped(**options).save_pretrained(tmp_path / "other")
        with pytest.raises(ConfigError, match=f"Configs are incompatible: for {next(iter(options))}, "):
            hotswap_adapter(model, tmp_path / "other", adapter_name="default")
    wrapped(init_lora_weights="pissa").save_pretrained(tmp_path / "pissa")
    with pytest.raises(ConfigError, match="taken against start values of its own"):
        hotswap_adapter(model, tmp_path / "pissa", adapter_name="default")
    wrapped(target_modules=["k_proj"]).save_pretrained(tmp_path / "k")
    with pytest.raises(CheckpointError, match="unexpected keys found: .*k_proj.*nothing was changed"):
        hotswap_adapter(model, tmp_path / "k", adapter_name="default")
    ia3 = graftlm.get_peft_model(fresh("llama"), graftlm.IA3Config(task_type="CAUSAL_LM"))
    ia3.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap_adapter(model, tmp_path / "ia3", adapter_name="default")
    with pytest.raises(ConfigError, match="Hotswapping only supports LORA, but IA3"):
        hotswap_adapter(ia3, tmp_path / "ia3", adapter_name="default")
    with pytest.raises(AdapterError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(ia3)
    with pytest.raises(AdapterError, match="There is no adapter 'other'"):
        hotswap_adapter(model, tmp_path / "k", adapter_name="other")
    wrapped(r=9).save_pretrained(tmp_path / "large")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    with pytest.raises(ConfigError, match=r"was prepared for rank 6, the new adapter has 9"):
        hotswap_adapter(model, tmp_path / "large", adapter_name="default")
    with pytest.raises(ConfigError, match=r"target rank 5, but the original rank is larger \(6\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    close(logits_of(model, **INPUTS), before)
    model.merge_adapter()
    wrapped().save_pretrained(tmp_path / "same")
    with pytest.raises(AdapterError, match=r"it is merged into the base's weights; call unmerge_adapter\(\) first"):
        hotswap_adapter(model, tmp_path / "same", adapter_name="default")


# -- scales ------------------------------------------------------------------------------------------------------------
def test_scales_are_hf_pefts(tmp_path: Path) -> None:
    model = wrapped(use_rslora=True)
    model.save_pretrained(tmp_path)
    their = from_theirs(fresh("llama"), tmp_path)
    plain = logits_of(model, **INPUTS)
    with rescale_adapter_scale(model, 0.3), their_rescale(their, 0.3):
        close(logits_of(model, **INPUTS), logits_of(their, **INPUTS))
        assert (logits_of(model, **INPUTS) - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(model, **INPUTS), plain)
    steps = [
        ("set_scale", "default", 2.0),
        ("scale_layer", 3.0),
        ("unscale_layer", 1.5),
        ("unscale_layer", None),
        ("set_scale", "no", 4),
    ]
    for name, *arguments in steps:
        for one in (model, their):
            for module in one.modules():
                if hasattr(type(module), name):
                    getattr(module, name)(*arguments)
        close(logits_of(model, **INPUTS), logits_of(their, **INPUTS))
    close(logits_of(model, **INPUTS), plain)


def test_scales_of_merged_adapters() -> None:
    model = wrapped()
    with rescale_adapter_scale(model, 0.5):
        half = logits_of(model, **INPUTS)
    model.merge_adapter()
    with rescale_adapter_scale(model, 0.5):
        close(logits_of(model, **INPUTS), half)
    with pytest.raises(TypeError, match="multiplier should be of type float"), rescale_adapter_scale(model, "a"):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(AdapterError, match="scaling is only supported for models with LoRA layers"),
        rescale_adapter_scale(fresh("llama"), 2),
    ):
        pass


# -- combinations ------------------------------------------------------------------------------------------------------
KINDS = ("ties_svd", "magnitude_prune", "magnitude_prune_svd", "dare_linear_svd", "dare_ties_svd")


@pytest.mark.parametrize("kind", KINDS)
def test_combined_as_hf_peft_combines(kind: str, tmp_path: Path) -> None:
    """By their products; DARE draws, so all is kept where HF PEFT is beside it."""
    density = 1.0 if "dare" in kind else 0.6
    model = wrapped(target_modules=["q_proj", "embed_tokens"])
    ranks = {} if not kind.endswith("svd") else {"r": 6}
    config = graftlm.LoraConfig(**{**OPTIONS, "target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 3, **ranks})
    model.add_adapter("second", config)
    model.set_adapter("second")
    randomise(model, seed=8, scale=0.3)
    model.save_pretrained(tmp_path)
    their: Any = from_theirs(fresh("llama"), tmp_path)
    their.load_adapter(str(tmp_path / "second"), "second")
    arguments = (["default", "second"], [0.7, -0.4], "mix")
    for one in (model, their):
        one.add_weighted_adapter(*arguments, combination_type=kind, density=density)
        one.set_adapter("mix")
    close(logits_of(model, **INPUTS), logits_of(their.eval(), **INPUTS), 1e-4)
    assert model.peft_config["mix"].r == their.peft_config["mix"].r


def test_what_dare_drops_before_the_svd() -> None:
    model = wrapped()
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="svd")
    model.add_adapter("second", graftlm.LoraConfig(**OPTIONS))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.add_weighted_adapter(
            ["default", "second"],
            [1.0, 1.0],
            f"mix{len(results)}",
            combination_type="dare_linear_svd",
            density=0.5,
            svd_rank=3,
        )
        model.set_adapter(f"mix{len(results)}")
        results.append(logits_of(model, **INPUTS))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert model.peft_config["mix0"].r == 3
    with pytest.raises(ConfigError, match="'magnitude_prune' needs the kept share"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mix", combination_type="magnitude_prune")
