"""int8 and 4-bit bases: every method trains on them as HF PEFT's, packed CPU kernels lose nothing, bad bases are named."""

from __future__ import annotations

import pickle
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from families import batch, build
from helpers import ONE_OF_EACH, attach, close, config, logits_of, randomise
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import graftlm
from graftlm import quantization
from graftlm.errors import ConfigError, UnsupportedError
from graftlm.quantization import dequantize, quantized_kind, scheme_of

WIDER: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "bloom": {"hidden_size": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "dropout": 0.0},
}
PROJECTION = {"llama": "q_proj", "bloom": "query_key_value", "opt": "q_proj"}
PEERS = ("lora", "dora", "prompt", "p_tuning_mlp", "prefix")
packs = pytest.mark.skipif(
    not __import__("bitsandbytes").functional.has_avx512bf16(), reason="only CPUs with AVX512-BF16 pack 4-bit layers"
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Directories of unquantised tiny models by family."""
    made = {}
    for name, sizes in WIDER.items():
        made[name] = tmp_path_factory.mktemp("bases") / name
        build(name, **sizes).save_pretrained(made[name])
    return made


def settings(scheme: str, compute: torch.dtype = torch.float32, **more: Any) -> BitsAndBytesConfig:
    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    more = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute} | more
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=scheme, **more)


def load(folder: Any, scheme: str | None, *, dtype: Any = torch.float32, **more: Any) -> Any:
    options = {"quantization_config": settings(scheme, **more), "device_map": "cpu"} if scheme else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if quantized_kind(m) and not hasattr(m, "base_layer")]


def from_peft(base: nn.Module, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder)


TRAINED = [*ONE_OF_EACH, "dora", "patterns", "p_tuning_lstm", "pfeiffer"]


@pytest.mark.parametrize(
    ("scheme", "method", "name"),  # quick: every method in int8 and in 4 bits, every family with each
    [
        pytest.param(scheme, method, name, marks=[] if (i + j) % 3 == k and name != "bloom" else [pytest.mark.slow])
        for i, scheme in enumerate(("int8", "nf4", "fp4"))
        for j, method in enumerate(TRAINED)
        for k, name in enumerate(("llama", "opt", "bloom"))
    ],
)
def test_every_method_trains_on_a_quantised_base(folders, name, method, scheme, tmp_path):
    base = load(folders[name], scheme)
    model = randomise(graftlm.get_peft_model(base, config(method, name)))
    weights = [p.detach().clone() for p in base.parameters() if not p.requires_grad]
    inputs = batch(name)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        loss = model.train()(**inputs).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for kept, now in zip(weights, (p for p in base.parameters() if not p.requires_grad), strict=True):
        assert torch.equal(kept, now)

    model.eval().save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(load(folders[name], scheme), tmp_path)
    close(logits_of(again, **inputs), logits_of(model, **inputs))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_outputs_counts_and_footprint_are_hf_pefts(folders, name, method, scheme, tmp_path, capsys):
    """4-bit in HF PEFT's training mode, where bitsandbytes computes in the dtype that it was told."""
    model = attach(name, method, base=load(folders[name], scheme))
    model.save_pretrained(tmp_path)
    theirs = from_peft(load(folders[name], scheme), tmp_path).train(scheme != "int8")
    inputs = batch(name)
    close(logits_of(model, **inputs), logits_of(theirs, **inputs))
    if method != "p_tuning_mlp":  # HF PEFT loads no encoder
        assert model.get_nb_trainable_parameters()[1] == theirs.get_nb_trainable_parameters()[1]
    if method in ("lora", "dora"):  # HF PEFT leaves a soft prompt out of the footprint
        assert model.get_memory_footprint() == theirs.get_memory_footprint()


@pytest.mark.parametrize(
    "options",
    [{"scheme": "int8"}, {"scheme": "nf4"}, {"scheme": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}],
    ids=["int8", "nf4", "nf4-bf16-storage"],
)
def test_parameters_are_counted_in_elements(folders, options, capsys):
    lines = []
    for library in (graftlm, peft):
        base = load(folders["llama"], **options)
        library.get_peft_model(base, config("lora", "llama", library)).print_trainable_parameters()
        lines.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert lines[0] == lines[1]
    plain = build("llama", **WIDER["llama"])
    total = sum(p.numel() for p in plain.parameters())
    added = int(lines[0].split()[2].replace(",", ""))
    assert f"all params: {total + added:,}" in lines[0]


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dropout_is_hf_pefts(folders, options, scheme, tmp_path, monkeypatch):
    """Under one seed the same masks (torch's, of the padded batch), the same loss; and another loss than without dropout."""
    for place in ("lora", "dropout"):
        monkeypatch.setattr(sys.modules[f"graftlm.kernels.{place}"], "is_cheap", lambda x, p: False)
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], lora_dropout=0.5, **options)
    model = randomise(graftlm.get_peft_model(load(folders["llama"], scheme), settings))
    model.packs = False
    model.save_pretrained(tmp_path)
    theirs = from_peft(load(folders["llama"], scheme), tmp_path)
    inputs, losses = batch("llama"), []
    for one in (model, theirs):
        torch.manual_seed(7)
        losses.append(one.train()(**inputs).loss)
    close(losses[0], losses[1])
    assert (losses[0] - model.eval()(**inputs).loss).abs() > 1e-3


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_gradients_equal_those_of_the_dequantised_layer(folders, scheme):
    """LoRA over a quantised layer against the same over its dequantised weight (int8 rounds its input as well)."""
    model = randomise(graftlm.get_peft_model(load(folders["llama"], scheme), config("lora", "llama")))
    layer = model.base.model.layers[0].self_attn.q_proj
    reference = nn.Linear(layer.in_features, layer.out_features, bias=False)
    reference.weight.data = dequantize(layer.frozen.layer).float()
    x = torch.randn(2, 5, layer.in_features)
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    a, b = (p.detach().clone().requires_grad_() for p in layer.changes["default"].factors(layer.held("default")))
    out = layer(ours)
    wanted = reference(plain) + plain @ a.T @ b.T * layer.scaling["default"]
    g = torch.randn_like(out)
    out.backward(g)
    wanted.backward(g)
    tolerance = 0.05 if scheme == "int8" else 1e-4
    close(out, wanted, tolerance * wanted.abs().max().item())
    close(ours.grad, plain.grad, tolerance * plain.grad.abs().max().item())
    for mine, other in zip(layer.changes["default"].factors(layer.held("default")), (a, b), strict=True):
        close(mine.grad, other.grad, 1e-4 * other.grad.abs().max().item())
    assert layer.frozen.layer.weight.grad is None


# -- packed layers -------------------------------------------------------------------------------------------------------
@packs
def test_packing_for_evaluation_loses_nothing(folders):
    """Evaluate, train, evaluate, save: as if bitsandbytes had never packed the layers."""
    inputs = batch("llama")
    one, other = (attach("llama", "lora", base=load(folders["llama"], "nf4", compute=torch.bfloat16)) for _ in range(2))
    before = logits_of(one.eval(), **inputs)
    assert any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers(one))
    for model in (one, other):
        model.train()(**inputs).loss.backward()
    for (key, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        if p.requires_grad:
            assert torch.equal(p.grad, q.grad), key
    assert torch.equal(logits_of(one.eval(), **inputs), before)
    for key, value in other.base.state_dict().items():
        assert torch.equal(one.base.state_dict()[key], value), key
    for mine, theirs in zip(layers(one), layers(other), strict=True):
        assert torch.equal(dequantize(mine), dequantize(theirs))


@packs
def test_a_gradient_in_evaluation_mode_passes_packed_layers(folders):
    model = randomise(
        graftlm.get_peft_model(load(folders["llama"], "nf4", compute=torch.bfloat16), config("prompt", "llama"))
    ).eval()
    logits_of(model, **batch("llama"))
    model(**batch("llama")).loss.backward()
    gradient = next(p.grad for p in model.parameters() if p.requires_grad)
    assert gradient is not None and gradient.abs().sum() > 0


@packs
def test_fp32_products_are_never_packed(folders):
    """bitsandbytes would evaluate them in bf16; and it fails on layers that its kernel cannot take."""
    model = graftlm.get_peft_model(load(folders["llama"], "nf4"), config("lora", "llama"))
    inputs = batch("llama")
    with torch.no_grad():
        trained = model.train()(**inputs).logits
    close(logits_of(model.eval(), **inputs), trained)
    narrow = build("llama")  # 32 columns: fewer than a block of 64
    assert not any(quantization._may_pack(m) for m in layers(quantise_in_place(narrow)))
    assert torch.isfinite(logits_of(graftlm.get_peft_model(narrow, config("lora", "llama")).eval(), **inputs)).all()


def quantise_in_place(model: nn.Module) -> nn.Module:
    """NF4 layers with bf16 products in place of a model's linear layers."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16)
            made.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made.to("cpu"))
    return model


# -- other ways to a quantised base --------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_base_saved_quantised_trains(folders, scheme, tmp_path):
    load(folders["llama"], scheme).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert scheme_of(base) == quantization.config_scheme(base.config) == scheme
    inputs = batch("llama")
    model = attach("llama", "lora", base=base)
    close(logits_of(model, **inputs), logits_of(attach("llama", "lora", base=load(folders["llama"], scheme)), **inputs))
    model.train()(**inputs).loss.backward()


def test_torchao_int8_weight_only_trains(folders, tmp_path):
    quantize = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    base = AutoModelForCausalLM.from_pretrained(
        folders["llama"], quantization_config=TorchAoConfig(quantize.Int8WeightOnlyConfig()), device_map="cpu",
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert scheme_of(base) == "torchao"
    inputs = batch("llama")
    for method in ("lora", "dora", "prompt", "prefix", "houlsby"):
        model = randomise(graftlm.get_peft_model(base, config(method, "llama")))
        model.train()(**inputs).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.unload()
    model = randomise(graftlm.get_peft_model(base, config("lora", "llama"))).eval()
    wanted = logits_of(model, **inputs).float()
    model.merge_adapter()
    close(logits_of(model, **inputs).float(), wanted, 0.05 * wanted.abs().max().item())


def test_an_adapter_moves_between_forms_of_the_base(folders, tmp_path, capsys):
    half = load(folders["llama"], None, dtype=torch.float16)
    trained = randomise(graftlm.get_peft_model(half, config("lora", "llama"))).eval()
    trained.save_pretrained(tmp_path)
    capsys.readouterr()
    model = graftlm.PeftModel.from_pretrained(load(folders["llama"], "nf4"), tmp_path)
    assert "another form (float16); here it is nf4" in capsys.readouterr().out
    wanted, got = logits_of(trained, **batch("llama")), logits_of(model, **batch("llama"))
    assert (got - wanted).abs().mean() < 0.5 * wanted.abs().mean()
    graftlm.PeftModel.from_pretrained(load(folders["llama"], None, dtype=torch.float16), tmp_path)
    assert "another form" not in capsys.readouterr().out


def test_a_quantised_module_to_save_is_trained_dequantised(folders, tmp_path):
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["down_proj"])
    model = graftlm.get_peft_model(load(folders["llama"], "nf4"), settings)
    copy = model.base.model.layers[0].mlp.down_proj.modules_to_save["default"]
    close(copy.weight, dequantize(model.base.model.layers[0].mlp.down_proj.original_module).float(), 0.01)
    randomise(model).train()(**batch("llama")).loss.backward()
    assert copy.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(load(folders["llama"], "nf4"), tmp_path)
    close(logits_of(again, **batch("llama")), logits_of(model, **batch("llama")))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_pickled_model_computes_the_same(folders, method, scheme):
    """A pickle makes plain parameters of bitsandbytes' weights; they get their class back."""
    model = attach("llama", method, base=load(folders["llama"], scheme))
    again = pickle.loads(pickle.dumps(model))
    assert scheme_of(again.base) == scheme
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    close(logits_of(again, **batch("llama")), logits_of(model, **batch("llama")), 0)
    again.train()(**batch("llama")).loss.backward()


def test_a_module_to_save_of_gpt2_has_its_own_layout(tmp_path):
    build("gpt2", n_embd=64).save_pretrained(tmp_path / "base")
    lora = graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], modules_to_save=["c_fc"])
    model = randomise(graftlm.get_peft_model(load(tmp_path / "base", "nf4"), lora)).eval()
    assert model.base.transformer.h[0].mlp.c_fc.modules_to_save["default"].weight.shape == (64, 256)
    model.save_pretrained(tmp_path / "adapter")
    graftlm.PeftModel.from_pretrained(load(tmp_path / "base", None), tmp_path / "adapter")
    again = graftlm.PeftModel.from_pretrained(load(tmp_path / "base", "nf4"), tmp_path / "adapter")
    close(logits_of(again, **batch("gpt2")), logits_of(model, **batch("gpt2")))


# -- LoftQ ---------------------------------------------------------------------------------------------------------------
def loftq(**more: Any) -> Any:
    return graftlm.LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=8, target_modules="all-linear", init_lora_weights="loftq", **more
    )


@pytest.mark.parametrize(("scheme", "bits"), [("nf4", 4), ("fp4", 4), ("int8", 8)])
def test_loftq_makes_up_for_the_rounding(folders, scheme, bits, tmp_path):
    inputs = batch("llama")
    exact = logits_of(load(folders["llama"], None).eval(), **inputs)
    rounded = (logits_of(load(folders["llama"], scheme).eval(), **inputs) - exact).abs().mean()
    model = graftlm.get_peft_model(load(folders["llama"], scheme), loftq(loftq_config={"loftq_bits": bits})).eval()
    assert (logits_of(model, **inputs) - exact).abs().mean() < (0.75 if bits == 4 else 0.95) * rounded
    weight = build("llama", **WIDER["llama"]).model.layers[0].mlp.up_proj.weight
    layer = model.base.model.layers[0].mlp.up_proj
    residual = weight - dequantize(layer.frozen.layer).float()
    u, s, vh = torch.linalg.svd(residual)
    close(layer.get_delta_weight("default"), (u[:, :16] * s[:16]) @ vh[:16])
    model.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(load(folders["llama"], scheme), tmp_path)
    close(logits_of(again, **inputs), logits_of(model, **inputs))
    assert again.peft_config["default"].init_lora_weights == "loftq"
    theirs = from_peft(load(folders["llama"], scheme), tmp_path).train(scheme != "int8")
    close(logits_of(theirs, **inputs), logits_of(model, **inputs))


def test_loftq_on_an_unquantised_base_starts_as_the_base(folders, tmp_path):
    inputs = batch("llama")
    base = load(folders["llama"], None).eval()
    plain = logits_of(base, **inputs)
    model = graftlm.get_peft_model(base, loftq(loftq_config=graftlm.LoftQConfig())).eval()
    close(logits_of(model, **inputs), plain)
    randomise(model).save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(load(folders["llama"], None), tmp_path)
    close(logits_of(again, **inputs), logits_of(model, **inputs))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_loftq_reads_gpt2s_layout(scheme, tmp_path):
    plain = build("gpt2", n_embd=64)
    plain.save_pretrained(tmp_path)
    lora = loftq(loftq_config=peft.LoftQConfig(loftq_bits=8 if scheme == "int8" else 4))  # HF PEFT's object will do
    model = graftlm.get_peft_model(load(tmp_path, scheme), lora)
    for name in ("c_attn", "c_proj"):  # the second is square: its shape does not tell
        layer = getattr(model.base.transformer.h[0].attn, name)
        weight = getattr(plain.transformer.h[0].attn, name).weight.T
        before = (weight - layer.frozen.weight()).norm()
        assert (weight - layer.frozen.weight() - layer.get_delta_weight("default")).norm() < 0.9 * before


def test_loftq_says_what_it_lacks(folders, tmp_path):
    with pytest.raises(ConfigError, match="loftq_bits=2: expected 4"):
        loftq(loftq_config={"loftq_bits": 2})
    with pytest.raises(ConfigError, match="loftq_iter=5: expected 1"):
        loftq(loftq_config={"loftq_iter": 5})
    with pytest.raises(ConfigError, match="no field 'bits'.*loftq_bits"):
        loftq(loftq_config={"bits": 4})
    with pytest.raises(ConfigError, match="loftq_bits=8, but .* holds 4-bit weights; set loftq_bits=4"):
        graftlm.get_peft_model(load(folders["llama"], "nf4"), loftq(loftq_config={"loftq_bits": 8}))
    load(folders["llama"], "nf4").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    with pytest.raises(UnsupportedError, match="quantised checkpoint. Load the base from the unquantised one"):
        graftlm.get_peft_model(base, loftq())
    assert not any("lora" in n for n, _ in base.named_modules())


# -- bad input -----------------------------------------------------------------------------------------------------------
def test_float16_is_not_trained_on_a_cpu(folders):
    inputs = batch("llama")
    model = graftlm.get_peft_model(load(folders["llama"], None), config("lora", "llama")).train()
    with torch.autocast("cpu", torch.float16), pytest.raises(UnsupportedError, match="bf16=True instead of fp16=True"):
        model(**inputs)
    half = graftlm.get_peft_model(load(folders["llama"], None, dtype=torch.float16), config("prompt", "llama"))
    with pytest.raises(UnsupportedError, match="dtype=torch.bfloat16"):
        half.train()(**inputs)
    logits_of(half.eval(), **inputs)
    packed = graftlm.get_peft_model(load(folders["llama"], "nf4", compute=torch.float16), config("lora", "llama"))
    with pytest.raises(UnsupportedError, match="bnb_4bit_compute_dtype=torch.bfloat16"):
        packed.train()(**inputs)


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match="pip install bitsandbytes"):
        quantization.loading_options("nf4", torch.bfloat16, "cpu")


def test_unknown_schemes_are_named(folders):
    with pytest.raises(ConfigError, match="quantization='nf5'.*int8, nf4, fp4.*did you mean 'nf4'"):
        quantization.loading_options("nf5", torch.bfloat16, "cpu")
    model = load(folders["llama"], None)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    dora = config("dora", "llama")
    with pytest.raises(UnsupportedError, match="a scheme that GraftLM cannot dequantise"):
        graftlm.get_peft_model(model, dora)


# -- whole runs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_twenty_steps_follow_hf_peft(folders, method, scheme):
    """Both prepare the base in their own way, start equal and train on the same batches."""
    losses = {}
    for library in (graftlm, peft):
        base = library.prepare_model_for_kbit_training(load(folders["llama"], scheme), use_gradient_checkpointing=False)
        torch.manual_seed(3)
        model = library.get_peft_model(base, config(method, "llama", library))
        start(model)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        run = losses[library.__name__] = []
        for step in range(20):
            loss = model.train()(**batch("llama", seed=step)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            run.append(loss.item())
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-5:]) < sum(losses["graftlm"][:5])


def start(model: nn.Module) -> None:
    """The same start values for both libraries, by size: their names differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: tuple(p.shape)):
            if parameter.abs().sum() > 0:  # LoRA's B stays zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
