"""Any torch module as a base: convolutions, attention, embeddings; beside HF PEFT, wrapped and changed in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import attach, close, config, fresh, logits_of, randomise, state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import graftlm
from graftlm.errors import AdapterError, CompositionError, ConfigError, TargetError, UnsupportedError
from graftlm.functional import delete_adapter, set_adapter, set_requires_grad
from graftlm.layers import Adapted
from graftlm.passes.served import Served


# -- modules that users bring ------------------------------------------------------------------------------------------
class Words(nn.Module):
    """An embedding, transformers' Conv1D, a linear layer: ids [B, T] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 6)
        self.mix = Conv1D(8, 6)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.emb(ids)).tanh().mean(1))


class Block(nn.Module):
    """torchvision's basic block: two convolutions, batch norm, a way past them."""

    def __init__(self, inner: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(inner, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class Pictures(nn.Module):
    """x [B, 3, 8, 8] -> [B, 4]; `scale` by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(3, 8), Block(8, 8, 2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, *rest: Any, scale: float = 1.0) -> Tensor:
        return self.fc(self.layer1(x).mean((2, 3))) * scale


class Patches(nn.Module):
    """timm's vision transformer: patches by a convolution, a fused qkv, a positional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 12, 4, stride=4)
        self.pos = nn.Parameter(torch.randn(1, 4, 12))
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).mT + self.pos
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head((x + self.mlp(x)).mean(1))


class Sound(nn.Module):
    """x [B, 2, 16] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(-1))


class Volumes(nn.Module):
    """x [B, 2, 4, 4, 4] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3, 4)))


class Attends(nn.Module):
    """x [B, T, 8] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mha(x, x, x)[0].mean(1))


class Encodes(nn.Module):
    """torch's encoder: x [B, T, 8], `masked` [B, T] -> [B, T, 4]."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=masked))


INPUTS: dict[type, Any] = {
    Words: lambda n: torch.randint(20, (n, 5)), Pictures: lambda n: torch.randn(n, 3, 8, 8),
    Patches: lambda n: torch.randn(n, 3, 8, 8), Sound: lambda n: torch.randn(n, 2, 16),
    Volumes: lambda n: torch.randn(n, 2, 4, 4, 4), Attends: lambda n: torch.randn(n, 5, 8),
    Encodes: lambda n: torch.randn(n, 5, 8),
}  # fmt: skip
# what stands in the configurations: (module, targets)
PLACES: dict[str, tuple[type, Any]] = {
    "words": (Words, ["emb", "mix", "head"]), "pictures": (Pictures, r".*(conv\d|downsample\.0|fc)"),
    "patches": (Patches, ["proj", "qkv", "mlp.0", "mlp.2"]), "sound": (Sound, ["conv", "head"]),
    "volumes": (Volumes, ["conv"]), "attends": (Attends, ["mha", "head"]),
    "encodes": (Encodes, ["self_attn", "linear1", "linear2"]),
}  # fmt: skip
METHODS: dict[str, Any] = {
    "lora": lambda lib, t: lib.LoraConfig(r=4, lora_alpha=8, target_modules=t),
    "dora": lambda lib, t: lib.LoraConfig(r=4, lora_alpha=8, target_modules=t, use_dora=True),
    "ia3": lambda lib, t: lib.IA3Config(target_modules=t, feedforward_modules=[]),
    "ia3_input": lambda lib, t: lib.IA3Config(target_modules=t, feedforward_modules=t),
    "loha": lambda lib, t: lib.LoHaConfig(r=3, target_modules=t),
    "loha_effective": lambda lib, t: lib.LoHaConfig(r=3, target_modules=t, use_effective_conv2d=True),
    "lokr": lambda lib, t: lib.LoKrConfig(r=1, alpha=2, target_modules=t, decompose_both=True),
    "lokr_effective": lambda lib, t: lib.LoKrConfig(r=1, target_modules=t, use_effective_conv2d=True),
}
# what HF PEFT cannot (DoRA of attention, (IA)3 on Conv1d, LoHa and LoKr on Conv3d and Conv1D), or neither of us
ALONE = {
    ("attends", "dora"),
    ("encodes", "dora"),
    ("sound", "ia3"),
    ("sound", "ia3_input"),
    ("volumes", "loha"),
    ("volumes", "lokr"),
}
NEITHER = {(n, m) for n in ("words", "attends", "encodes") for m in METHODS if m not in ("lora", "dora")}
NEITHER |= {("volumes", "loha_effective"), ("volumes", "lokr_effective")}
CASES = [(n, m) for n in PLACES for m in METHODS if (n, m) not in NEITHER]


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return PLACES[name][0]().eval()


def inputs(name: str, rows: int = 6) -> Tensor:
    torch.manual_seed(7)
    return INPUTS[PLACES[name][0]](rows)


def wrapped(name: str, method: str = "lora", **options: Any) -> Any:
    settings = METHODS[method](graftlm, PLACES[name][1])
    for key, value in options.items():
        setattr(settings, key, value)
    return randomise(graftlm.get_peft_model(build(name), settings), scale=0.3)


def merges(name: str, method: str) -> bool:
    """LoRA of a grouped convolution is no change of its weight."""
    return name != "pictures" or method not in ("lora", "dora")


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------
@pytest.fixture
def unfused() -> Iterator[None]:
    """Without torch's fused encoder, which leaves HF PEFT's adapters out."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(("name", "method"), [c for c in CASES if c not in ALONE])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unfused")
def test_as_hf_peft(name: str, method: str, tmp_path: Path) -> None:
    """The same file, the same outputs, the same losses; each loads the other's."""
    mine, x = wrapped(name, method), inputs(name)
    their: Any = peft.get_peft_model(build(name), METHODS[method](peft, PLACES[name][1]))
    state = graftlm.get_peft_model_state_dict(mine)
    wanted = peft.get_peft_model_state_dict(their)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}
    assert not peft.set_peft_model_state_dict(their, state).unexpected_keys
    assert (mine(x) - build(name)(x)).abs().max() > 1e-3
    close(mine(x), their(x))
    target = torch.randn(mine(x).shape)
    losses: dict[Any, list[float]] = {}
    for model in (mine, their):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(10):
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.setdefault(model, []).append(loss.item())
    if method != "loha_effective":  # HF PEFT's gradient of A takes the other product's core
        assert losses[mine] == pytest.approx(losses[their], rel=1e-3 if name in ("attends", "encodes") else 1e-4)
    assert losses[mine][-1] < losses[mine][0]
    mine.save_pretrained(tmp_path / "mine")
    their.save_pretrained(tmp_path / "their")
    close(peft.PeftModel.from_pretrained(build(name), tmp_path / "mine").eval()(x), mine(x), 1e-4)
    close(graftlm.PeftModel.from_pretrained(build(name), tmp_path / "their")(x), their(x), 1e-4)


# -- the wrapper -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_whole_life(name: str, method: str, tmp_path: Path) -> None:
    """Train, save, reload, copy, switch off, merge, unmerge, unload."""
    model, x = wrapped(name, method), inputs(name)
    before, base = state_of(model.get_base_model()), build(name)
    plain = base(x)
    with torch.no_grad():
        first = model(x)
    with torch.enable_grad():
        close(model(x), first)
    with model.disable_adapter():
        close(model(x), plain)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(x).square().mean().backward()
    trained = [p for _, p in model.adapter_parameters("default")]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    optimiser.step()
    model.requires_grad_(False)
    wanted = model(x)
    assert not torch.equal(wanted, first)
    model.save_pretrained(tmp_path)
    for other in (
        graftlm.PeftModel.from_pretrained(build(name), tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    ):  # fmt: skip
        close(other(x), wanted)
    if merges(name, method):
        model.merge_adapter()
        close(model(x), wanted, 1e-4)
        with model.disable_adapter():
            close(model(x), plain)
        model.unmerge_adapter()
        close(model(x), wanted)
        own = {k: v for k, v in state_of(model.get_base_model()).items() if k in before and v.shape == before[k].shape}
        prefixes = ("lora", "hada", "lokr", "ia3")
        assert all(torch.equal(before[k], v) for k, v in own.items() if not any(p in k for p in prefixes))
        merged = copy.deepcopy(model).merge_and_unload()
        close(merged(x), wanted, 1e-4)
        assert not any(isinstance(m, Adapted) for m in merged.modules())
        assert state_of(merged).keys() == state_of(base).keys()
    else:
        with pytest.raises(UnsupportedError, match="of 2 groups cannot take LoRA's update into its weight"):
            model.merge_adapter()
        close(model(x), wanted)
    unloaded = model.unload()
    assert state_of(unloaded).keys() == state_of(base).keys()
    assert all(torch.equal(v, state_of(base)[k]) for k, v in state_of(unloaded).items())
    close(unloaded(x), plain)


def test_calls_go_through_as_they_are() -> None:
    model, x = wrapped("pictures"), inputs("pictures")
    close(model(x, "anything", {"at": "all"}, scale=3.0), 3 * model(x))
    close(model(x=x, scale=3.0), 3 * model(x))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {"args": args, "out": [self.lin(kwargs["x"])]}

    plain = graftlm.get_peft_model(Plain(), graftlm.LoraConfig(target_modules="all-linear"))
    found = plain(1, None, x=torch.ones(2, 3))
    assert found["args"] == (1, None)
    assert found["out"][0].shape == (2, 3)
    assert plain.train().training
    assert plain.to(torch.float64)(x=torch.ones(2, 3).double())["out"][0].dtype == torch.float64


def test_no_language_model() -> None:
    """What is asked of language models is answered, or said to be impossible."""
    model = wrapped("sound")
    assert not model.can_pack()
    assert not model.makes_loss({"labels": torch.zeros(1)})
    assert not model.heeds_items()
    model.try_out()
    with pytest.raises(UnsupportedError, match="Sound is no language model of transformers: it cannot be served"):
        Served(model)
    with pytest.raises(AttributeError, match="generate"):
        model.generate(inputs("sound"))
    with pytest.raises(AttributeError, match="hidden_size"):
        model.hidden_size  # noqa: B018


def test_count(capsys: pytest.CaptureFixture) -> None:
    model = graftlm.get_peft_model(Sound(), graftlm.LoraConfig(r=2, target_modules=["conv"]))
    model.print_trainable_parameters()
    assert f"trainable params: {2 * 2 * 3 + 2 * 8}" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.base_model_type, status.num_adapter_layers) == ("Sound", 1)


def test_several_adapters_and_saved_modules(tmp_path: Path) -> None:
    """Composed, switched, deleted; a head trained in full; all of it saved and loaded."""
    model, x = wrapped("pictures", modules_to_save=["fc"], target_modules=["conv1"]), inputs("pictures")
    model.add_adapter("second", graftlm.LoHaConfig(target_modules=["conv2", "downsample.0"]))
    model.set_adapter("second")
    randomise(model, seed=5, scale=0.3)
    alone: dict[str, Tensor] = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model(x)
    model.set_adapter(["default", "second"])
    both = model(x)
    assert all((both - one).abs().max() > 1e-3 for one in alone.values())
    model.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(build("pictures"), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    close(again(x), alone["default"])
    again.set_adapter(["default", "second"])
    close(again(x), both)
    model.requires_grad_(False)
    close(copy.deepcopy(model).merge_and_unload()(x), both, 1e-4)
    model.delete_adapter("second")
    close(model(x), alone["default"])


@pytest.mark.parametrize("name", ["words", "pictures", "sound", "volumes", "patches"])
def test_mixed_rows(name: str) -> None:
    """Rows of LoRA, DoRA, a composition and the base in one batch: each as alone, and their gradients."""
    model, x = wrapped(name), inputs(name, 4)
    model.add_adapter("dora", METHODS["dora"](graftlm, PLACES[name][1]))
    model.set_adapter("dora")
    randomise(model, seed=5, scale=0.3)
    rows: Any = ["default", "__base__", ["default", "dora"], "dora"]
    found = model(x, adapter_names=rows)
    for i, row in enumerate(rows):
        close(found[i], model(x[i : i + 1], adapter_names=[row])[0], 2e-5)
    close(found[1], build(name)(x)[1], 2e-5)
    model.set_requires_grad(["default", "dora"])
    model(x, adapter_names=rows).square().sum().backward()
    mixed = {k: p.grad.clone() for n in ("default", "dora") for k, p in model.adapter_parameters(n)}
    model.zero_grad()
    sum(model(x[i : i + 1], adapter_names=[row]).square().sum() for i, row in enumerate(rows)).backward()
    for n in ("default", "dora"):
        for k, p in model.adapter_parameters(n):
            close(mixed[k], p.grad, 1e-4)


def test_mixed_rows_that_cannot_be_told_apart() -> None:
    """Time first: the layers see as many places as rows, in another order. It is tried out on the batch itself."""
    torch.manual_seed(0)
    model = graftlm.get_peft_model(Encodes(batch_first=False), METHODS["lora"](graftlm, ["linear1"])).eval()
    with pytest.raises(UnsupportedError, match="rows of (default|the base) give other values than alone"):
        model(torch.randn(4, 4, 8), adapter_names=["default", "default", "__base__", "__base__"])
    with pytest.raises(UnsupportedError, match="MultiheadAttention computes by its weights.*one adapter a batch"):
        wrapped("attends")(inputs("attends", 2), adapter_names=["default", "__base__"])
    with pytest.raises(AdapterError, match="adapter_names has 1 entries, the batch 2 rows"):
        wrapped("sound")(inputs("sound", 2), adapter_names=["default"])


def test_attention_of_two_wrappers_and_composed() -> None:
    """Adapters of one attention add up, merged or not; another wrapper's do not act in this one's passes."""
    base, x = build("attends"), inputs("attends")
    first = randomise(graftlm.get_peft_model(base, METHODS["lora"](graftlm, ["mha"])), scale=0.3)
    alone = first(x)
    second = randomise(graftlm.get_peft_model(base, METHODS["dora"](graftlm, ["mha"])), seed=9, scale=0.3)
    close(first(x), alone)
    assert (second(x) - alone).abs().max() > 1e-3
    other, state = second(x), graftlm.get_peft_model_state_dict(second)
    state = {k: v.clone() for k, v in state.items()}
    with second.disable_adapter():
        close(second(x), build("attends")(x))
    second.unload()
    close(first(x), alone)
    first.add_adapter("dora", METHODS["dora"](graftlm, ["mha"]))
    first.set_adapter("dora")
    graftlm.set_peft_model_state_dict(first, state, "dora")
    close(first(x), other)
    first.set_adapter(["default", "dora"])
    both = first(x)
    first.requires_grad_(False)
    for some in (["default"], ["dora"], ["default", "dora"]):
        first.merge_adapter(some)
        close(first(x), both, 1e-4)
        first.unmerge_adapter()
    first.delete_adapter("default")
    close(first(x), other)


@torch.no_grad()
def test_fused_encoder_with_adapters() -> None:
    """In evaluation torch's encoder computes past its modules: with adapters in them it must not, and may again after."""
    model, x = wrapped("encodes"), inputs("encodes")
    masked = torch.zeros(6, 5, dtype=torch.bool)
    masked[1, 3:] = True
    with torch.enable_grad():
        wanted = model(x, masked)
    close(model(x, masked)[~masked], wanted[~masked])
    close(model.get_base_model()(x, masked)[~masked], wanted[~masked])
    with pytest.raises((RuntimeError, AssertionError)):
        model(x[..., :3], masked)
    assert torch.backends.mha.get_fastpath_enabled()
    base = model.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


# -- one module, trained in full and changed -----------------------------------------------------------------------------
@pytest.mark.parametrize("full_first", [True, False])
def test_trained_in_full_by_one_changed_by_another(full_first: bool, tmp_path: Path) -> None:
    x = inputs("sound")
    settings = {
        "full": graftlm.LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head"]),
        "low": graftlm.LoraConfig(r=2, target_modules=["head"]),
    }
    names = ["full", "low"] if full_first else ["low", "full"]
    model = graftlm.get_peft_model(build("sound"), settings[names[0]], names[0])
    model.add_adapter(names[1], settings[names[1]])
    found: dict[str, Tensor] = {}
    for name in names:
        model.set_adapter(name)
        found[name] = randomise(model, scale=0.3)(x)
        alone = graftlm.get_peft_model(build("sound"), copy.deepcopy(settings[name]), name)
        graftlm.set_peft_model_state_dict(alone, graftlm.get_peft_model_state_dict(model, adapter_name=name), name)
        close(alone(x), found[name])
    rows = ["full", "low", "__base__", "low", "full", "__base__"]
    mixed = model(x, adapter_names=rows)
    for i, row in enumerate(rows):
        close(mixed[i], (build("sound")(x) if row == "__base__" else found[row])[i], 2e-5)
    model.set_adapter(["full", "low"])
    with pytest.raises(
        CompositionError, match=r"'full' trains a Linear in full \(modules_to_save\) that low has changes of"
    ):
        model(x)
    model.save_pretrained(tmp_path)
    for name in names:
        loaded = graftlm.PeftModel.from_pretrained(build("sound"), tmp_path / name, name)
        close(loaded(x), found[name])
    model.set_adapter("low")
    model.delete_adapter("full")
    close(model(x), found["low"])
    model.delete_adapter("low")
    assert state_of(model.get_base_model()).keys() == state_of(build("sound")).keys()


def test_saved_modules_are_called_by_keyword() -> None:
    """Llama calls its attention so; a cache that it fills does not go by rows, which is said."""
    model = attach("llama", "lora")
    model.add_adapter(
        "full", graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], modules_to_save=["self_attn"])
    )
    model.set_adapter("full")
    randomise(model, scale=0.3).eval()
    ids = torch.arange(10).view(2, 5) + 3
    found = logits_of(model, input_ids=ids)
    assert (found - logits_of(fresh("llama"), input_ids=ids)).abs().max() > 1e-3
    with pytest.raises(UnsupportedError, match="Run one adapter a batch"):
        model(input_ids=ids, adapter_names=["full", "default"])


# -- changed in place ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "method"), [("words", "lora"), ("pictures", "dora"), ("attends", "lora"), ("sound", "loha")]
)
@pytest.mark.filterwarnings("ignore")
def test_injected(name: str, method: str) -> None:
    """The module itself computes with the adapter; its state as HF PEFT's; layers found by a state's keys."""
    base, x = build(name), inputs(name)
    made = graftlm.inject_adapter_in_model(METHODS[method](graftlm, PLACES[name][1]), base)
    assert made is base
    assert type(made) is PLACES[name][0]
    trained = [k for k, p in made.named_parameters() if p.requires_grad]
    randomise(made, scale=0.3)
    their = peft.inject_adapter_in_model(METHODS[method](peft, PLACES[name][1]), build(name))
    assert sorted(trained) == sorted(k for k, p in their.named_parameters() if p.requires_grad)
    state = graftlm.get_peft_model_state_dict(made)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in peft.get_peft_model_state_dict(their).items()}
    peft.set_peft_model_state_dict(their, state)
    close(made(x), their(x))
    assert (made(x) - build(name)(x)).abs().max() > 1e-3
    other = graftlm.inject_adapter_in_model(METHODS[method](graftlm, None), build(name), state_dict=state)
    assert not graftlm.set_peft_model_state_dict(other, state).unexpected_keys
    close(other(x), made(x))
    close(copy.deepcopy(made)(x), made(x))
    wrapper = graftlm.get_peft_model(build(name), METHODS[method](graftlm, PLACES[name][1]))
    graftlm.set_peft_model_state_dict(wrapper, state)
    close(wrapper(x), made(x))


def test_several_injected() -> None:
    model, x = build("sound"), inputs("sound")
    graftlm.inject_adapter_in_model(graftlm.LoraConfig(target_modules=["conv"], modules_to_save=["head"]), model)
    randomise(model, scale=0.3)
    first = model(x)
    graftlm.inject_adapter_in_model(graftlm.LoHaConfig(target_modules=["conv"]), model, "second")
    close(model(x), first)
    set_adapter(model, "second")
    assert list(model.peft_config) == ["default", "second"]
    randomise(model, scale=0.3)
    second = model(x)
    assert (second - first).abs().max() > 1e-3
    assert all("hada" in k for k, p in model.named_parameters() if p.requires_grad)
    set_requires_grad(model, "second", False)
    assert not any(p.requires_grad for p in model.parameters())
    set_adapter(model, "default")
    close(model(x), first)
    assert "head.weight" in graftlm.get_peft_model_state_dict(model)
    assert delete_adapter(model, "second") == ["default"]
    close(model(x), first)
    assert delete_adapter(model, "default") is None
    close(model(x), build("sound")(x))


@pytest.mark.parametrize("from_state", [False, True])
def test_injected_into_a_compiled_module(from_state: bool) -> None:
    """The adapter is the module's that was compiled, whichever of the two it is asked of."""
    settings, x = graftlm.LoraConfig(target_modules=["conv"], r=2), inputs("sound")
    plain = randomise(graftlm.inject_adapter_in_model(settings, build("sound")), scale=0.3)
    state = graftlm.get_peft_model_state_dict(plain)
    compiled: Any = torch.compile(build("sound"), backend="eager")
    found = graftlm.inject_adapter_in_model(settings, compiled, state_dict=state if from_state else None)
    assert found is compiled
    graftlm.set_peft_model_state_dict(compiled, state)
    assert graftlm.get_peft_model_state_dict(compiled._orig_mod).keys() == state.keys()
    close(compiled(x), plain(x))


def test_injecting_into_a_transformers_model() -> None:
    model = graftlm.inject_adapter_in_model(config("lora", "llama"), fresh("llama"))
    ids = torch.arange(10).view(2, 5) + 3
    with torch.no_grad():
        randomise(model, scale=0.3)
        found = model(input_ids=ids).logits
    wrapper = graftlm.get_peft_model(fresh("llama"), config("lora", "llama"))
    graftlm.set_peft_model_state_dict(wrapper, graftlm.get_peft_model_state_dict(model))
    close(logits_of(wrapper, input_ids=ids), found)


def test_what_cannot_be_injected() -> None:
    for settings in (graftlm.PromptTuningConfig(), graftlm.BottleneckConfig(), graftlm.LoraConfig(bias="all")):
        with pytest.raises(AdapterError, match=r"changes layers only; .* act through a wrapper. Use get_peft_model"):
            graftlm.inject_adapter_in_model(settings, build("sound"))
    with pytest.raises(AdapterError, match="This model is wrapped"):
        graftlm.inject_adapter_in_model(graftlm.LoraConfig(), wrapped("sound"))
    with pytest.raises(AdapterError, match="Sound has no adapters"):
        graftlm.get_peft_model_state_dict(build("sound"))
    with pytest.raises(AdapterError, match="state_dict holds no adapter of Sound's layers"):
        graftlm.inject_adapter_in_model(
            graftlm.LoraConfig(), build("sound"), state_dict={"other.lora_A.weight": torch.ones(1)}
        )
    model = build("sound")
    with pytest.raises(TargetError, match="matches no module"):
        graftlm.inject_adapter_in_model(graftlm.LoraConfig(target_modules=["nothing"]), model)
    assert "peft_config" not in vars(model)


# -- bad input -----------------------------------------------------------------------------------------------------------
class Recomputes(nn.Module):
    """Calls torch's activation checkpointing itself: x [B, 8] -> [B, 4]."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(8, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x)


def two_over(base: nn.Module) -> tuple[Any, Any]:
    """Two wrappers, the first with adapters `default` and `b`, all trainable; each call gives the same values."""
    made = lambda: graftlm.LoraConfig(r=2, target_modules=r"blocks\.\d\.0")  # noqa: E731
    one, other = (randomise(graftlm.get_peft_model(base, made())) for _ in range(2))
    one.add_adapter("b", made())
    for name, parameter in (*one.named_parameters(), *other.named_parameters()):
        parameter.requires_grad_("lora_" in name)
    return randomise(one, seed=3).train(), other.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_models_own_checkpointing_goes_through_the_same_adapters_or_says_so(reentrant: bool) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def gradients(how: str, reentrant: bool | None) -> dict[str, Tensor]:
        one, other = two_over(Recomputes(reentrant))
        rows = ["default", "b", "__base__"] * 2 if how == "mixed" else None
        if how != "two wrappers":
            other.disable_adapter_layers()
        made = one(x) if rows is None else one(x, adapter_names=rows)
        if how == "switched":
            one.set_adapter("b")
        made.square().sum().backward()
        return {n: p.grad for n, p in one.named_parameters() if p.grad is not None}

    wanted = gradients("alone", None)
    assert any(g.abs().max() > 1e-3 for g in wanted.values())
    got = gradients("alone", reentrant)
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    for how in ("mixed", "switched", "two wrappers"):
        with pytest.raises(UnsupportedError, match="runs again in the backward pass"):
            gradients(how, reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_passes_before_one_backward_pass_are_told_apart(reentrant: bool) -> None:
    """What was not the last pass runs again in the backward pass as well: by its own adapters, or not at all."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mixed = {"adapter_names": ["default", "b", "__base__"] * 2}

    def gradients(how: str, reentrant: bool | None) -> dict[str, Tensor]:
        one, other = two_over(Recomputes(reentrant))
        other.disable_adapter_layers()
        first = one(x, **(mixed if how == "mixed first" else {})).square().sum()
        if how in ("switched between", "switched back"):
            one.set_adapter("b")
        second = one(x, **(mixed if how == "mixed second" else {})).sum()
        if how == "switched back":
            second.backward()  # each pass under its own adapters
            one.set_adapter("default")
            first.backward()
        else:
            (first + second).backward()
        return {n: p.grad for n, p in one.named_parameters() if p.grad is not None}

    for how in ("mixed first", "mixed second", "switched between"):
        with pytest.raises(UnsupportedError, match="runs again in the backward pass"):
            gradients(how, reentrant)
    for how in ("alike", "switched back"):
        wanted, got = gradients(how, None), gradients(how, reentrant)
        assert got.keys() == wanted.keys()
        for name, gradient in got.items():
            close(gradient, wanted[name])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6)
        self.lin = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("base", "settings", "error", "text"),
    [
        (Sound, graftlm.PromptTuningConfig(), UnsupportedError, "PROMPT_TUNING on Sound: virtual tokens.*such as LoRA"),
        (Sound, graftlm.PrefixTuningConfig(), UnsupportedError, "PREFIX_TUNING on Sound"),
        (Sound, graftlm.PromptEncoderConfig(), UnsupportedError, "P_TUNING on Sound"),
        (Sound, graftlm.BottleneckConfig(), UnsupportedError, "Sound: cannot find the feed_forward"),
        (Sound, graftlm.LoraConfig(), TargetError, "no default target_modules for Sound.*configuration of a family"),
        (Sound, graftlm.LoraConfig(target_modules=["nothing"]), TargetError, "Its linear layers are called head"),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 2)), graftlm.LoraConfig(target_modules="all-linear"), TargetError,
         "It has no linear layers; others are called 0"),
        (Wide, graftlm.LoraConfig(target_modules=["attn"]), UnsupportedError, "'attn' is a MultiheadAttention whose keys"),
        (Attends, graftlm.LoraConfig(target_modules=["out_proj"]), TargetError, "selects 'out_proj' of 'mha'.*Name 'mha'"),
        (Attends, graftlm.IA3Config(target_modules=["mha"], feedforward_modules=[]), UnsupportedError, "no form for 'mha'"),
        (Attends, graftlm.LoraConfig(target_modules=["mha"], bias="all"), UnsupportedError, "bias of 'mha"),
        (Pictures, graftlm.LoraConfig(r=3, target_modules=["conv2"]), ConfigError, "r=3 on a Conv2d of 2 groups"),
        (Sound, graftlm.LoraConfig(target_modules=["conv"], init_lora_weights="pissa"), UnsupportedError,
         "leave convolutions out"),
        (Volumes, graftlm.LoHaConfig(target_modules=["conv"], use_effective_conv2d=True), UnsupportedError,
         "Conv1d and Conv2d"),
        (lambda: nn.Sequential(nn.LSTM(2, 2)), graftlm.LoraConfig(target_modules=["0"]), UnsupportedError,
         "no form for '0', a LSTM"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 2)), graftlm.LoraConfig(target_modules=["0"]), UnsupportedError,
         "a ConvTranspose1d"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(base: Any, settings: Any, error: type[Exception], text: str) -> None:
    made = base()
    before = list(state_of(made))
    with pytest.raises(error, match=text):
        graftlm.get_peft_model(made, copy.deepcopy(settings))
    assert list(state_of(made)) == before
    assert not any(isinstance(m, Adapted) for m in made.modules())


def test_all_linear_leaves_out_what_attention_never_calls() -> None:
    model = graftlm.get_peft_model(build("encodes"), graftlm.LoraConfig(target_modules="all-linear"))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Adapted)}
    assert names == {"linear1", "linear2", "head"}
    chosen = graftlm.get_peft_model(build("attends"), graftlm.LoraConfig(target_modules=r"mha.*"))
    assert sum(isinstance(m, Adapted) for m in chosen.modules()) == 2


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_files_of_hf_peft_with_what_attention_never_calls(method: str, tmp_path: Path) -> None:
    """HF PEFT's "all-linear" names `out_proj` too (of SigLIP's head), where its adapter does nothing."""
    base, x = build("attends").eval(), inputs("attends")
    kind, options = {"lora": (peft.LoraConfig, {"r": 2}), "ia3": (peft.IA3Config, {"feedforward_modules": []})}[method]
    their = peft.get_peft_model(copy.deepcopy(base), kind(target_modules="all-linear", **options)).eval()
    with torch.no_grad():
        for name, parameter in their.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) if "lora" in name or "ia3" in name else 0
    their.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"Tensors of base_model.model.*mha.out_proj are left out"):
        model = graftlm.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(model(x), their(x))
    assert not any("out_proj" in name for name in model.targeted_module_names)


def test_what_attention_never_calls_beside_layers_of_its_name() -> None:
    base = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "other": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})})
    for targets in (["out_proj"], r".*out_proj"):
        with pytest.warns(UserWarning, match=r"mha.out_proj is left out.*Name 'mha' to change it"):
            model = graftlm.get_peft_model(copy.deepcopy(base), graftlm.LoraConfig(target_modules=targets))
        assert model.targeted_module_names == ["other.out_proj"]
    with pytest.raises(TargetError, match=r"selects 'out_proj' of 'mha'"):
        graftlm.get_peft_model(base, graftlm.LoraConfig(target_modules=["other.out_proj", "mha.out_proj"]))


def test_dropout_in_attention_is_said() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.5 has no effect in 'mha'"):
        wrapped("attends", lora_dropout=0.5)


def test_computed_weights_are_not_merged_into() -> None:
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.Flatten())
    model, x = graftlm.get_peft_model(base, graftlm.LoraConfig(r=2, target_modules=["0"])).eval(), torch.randn(3, 2, 5)
    wanted = randomise(model, scale=0.3)(x)
    with pytest.raises(UnsupportedError, match="Conv1d with adapters computes its weight at each pass"):
        model.merge_adapter()
    close(model(x), wanted)


def test_trained_biases_of_convolutions() -> None:
    model, x = wrapped("sound", bias="all"), inputs("sound")
    wanted = model(x)
    assert {k.rpartition(".")[2] for k in graftlm.get_peft_model_state_dict(model)} == {"weight", "bias"}
    model.requires_grad_(False)
    close(model.merge_and_unload()(x), wanted)
    plain = wrapped("sound")(x)
    assert (plain - wanted).abs().max() > 1e-3


def test_embeddings_are_saved_where_they_are_known(tmp_path: Path) -> None:
    model = wrapped("words")
    with pytest.warns(UserWarning, match=r"Could not identify embedding layer\(s\) of Words"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert not any("base_layer" in k for k in graftlm.load_peft_weights(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Adapters in fp32 beside a 16-bit base, whose outputs stay 16-bit."""
    for name in ("pictures", "attends", "sound"):
        model = graftlm.get_peft_model(build(name).to(dtype), METHODS["lora"](graftlm, PLACES[name][1])).eval()
        randomise(model, scale=0.3)
        assert all(p.dtype == torch.float32 for _, p in model.adapter_parameters("default"))
        with torch.no_grad():
            found = model(inputs(name).to(dtype))
        assert found.dtype == dtype
        exact = wrapped(name)
        graftlm.set_peft_model_state_dict(exact, graftlm.get_peft_model_state_dict(model))
        close(found.float(), exact(inputs(name)).detach(), 0.15)


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_a_container_in_modules_to_save(kind: str) -> None:
    parts = nn.ModuleList([nn.Linear(3, 3)]) if kind == "list" else nn.ModuleDict({"a": nn.Linear(3, 3)})
    base = nn.ModuleDict({"other": nn.Linear(3, 3), "parts": parts})
    with pytest.raises(UnsupportedError, match="selects 'parts', a Module.*never called.*Name the modules in it"):
        graftlm.get_peft_model(base, graftlm.LoraConfig(target_modules=["other"], modules_to_save=["parts"]))
    assert type(base["parts"]) is type(parts) and type(base["other"]) is nn.Linear


def test_a_module_that_has_a_configuration_of_transformers() -> None:
    """It is no `PreTrainedModel`, and is trained and evaluated all the same."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fresh("llama")
            self.config = self.inner.config

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    base = Around().train()
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(target_modules=["q_proj"]))
    assert model.training and base.inner.training
    assert not model.eval().training and not base.inner.training
    assert model.train().training and base.inner.training


def test_the_trial_of_a_mixed_batch_leaves_nothing_in_it() -> None:
    """Without gradients layers keep the factors side by side for a pass: those of the trial's disturbed values are not the
    pass's (nothing is known of what such a base reads, so the trial is on the call's own batch)."""
    model, x = wrapped("words"), inputs("words", 3)
    model.add_adapter("second", METHODS["lora"](graftlm, PLACES["words"][1]))
    model.set_adapter("second")
    randomise(model, seed=5, scale=0.3)
    with torch.no_grad():
        mixed = model(x, adapter_names=["default", "second", "__base__"])
        for i, name in enumerate(["default", "second", "__base__"]):
            close(mixed[i], model(x[i : i + 1], adapter_names=[name])[0], 2e-5)
