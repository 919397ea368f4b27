"""The options of MiSS, OFT and BOFT beside HF PEFT's, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import batch
from helpers import close, fresh, logits_of, randomise, state_of, still, twenty_steps
from peft.tuners.boft import layer as boft_layer
from test_layer_methods import adapted
from test_parity import both_ways, theirs

import graftlm
from graftlm.errors import ConfigError, UnsupportedError
from graftlm.layers import Change, Frozen
from graftlm.methods.boft import BOFTChange
from graftlm.methods.miss import BatChange, MissChange
from graftlm.methods.oft import nearest_divisor

INPUTS = batch("llama")


class BlockDiagonal:
    """What HF PEFT's CUDA extension computes, so that it takes several butterfly factors here."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]

    @staticmethod
    def backward(gradient: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        n, size = blocks.shape[1], blocks.shape[2]
        parts = [gradient[:, i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(n)]
        return [torch.stack(parts, 1)]


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", BlockDiagonal())


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "miss_random": ("Miss", {"r": 7, "init_weights": False}),
    "miss_bias": ("Miss", {"r": 8, "bias": "all"}),
    "miss_own_bias": ("Miss", {"r": 8, "bias": "MiSS_only"}),
    "oft_shared": ("OFT", {"oft_block_size": 4, "block_share": True}),
    "oft_random": ("OFT", {"oft_block_size": 4, "init_weights": False}),
    "oft_bias": ("OFT", {"oft_block_size": 4, "bias": "oft_only"}),
    "oft_embedding": ("OFT", {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "oft_near_size": ("OFT", {"oft_block_size": 5}),
    "oft_near_count": ("OFT", {"oft_block_size": 0, "r": 7}),
    "coft": ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.5}),
    "coft_shared": ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.1, "block_share": True}),
    **{f"oft_terms_{n}": ("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": n}) for n in (2, 3, 4, 6)},
    "boft_count": ("BOFT", {"boft_block_size": 0, "boft_block_num": 8}),
    "boft_random": ("BOFT", {"init_weights": False}),
    "butterfly_2": ("BOFT", {"boft_n_butterfly_factor": 2}),
    "butterfly_3": ("BOFT", {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 3}),
    "boft_bias": ("BOFT", {"bias": "boft_only"}),
}  # fmt: skip


def settings(case: str, lib: Any, **changes: Any) -> Any:
    kind, options = SETTINGS[case]
    values = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]} | options | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(lib, f"{kind}Config")(**values)


@pytest.mark.filterwarnings("ignore:.*is taken there")
@pytest.mark.parametrize("case", SETTINGS)
def test_files_both_ways(case: str, tmp_path: Path) -> None:
    name = "opt" if "bias" in case else "llama"
    targets = {"target_modules": ["q_proj", "v_proj", "fc1"]} if name == "opt" else {}
    both_ways(lambda: fresh(name), lambda lib: settings(case, lib, **targets), batch(name), tmp_path)


@pytest.mark.parametrize(
    "case", ["oft_shared", "oft_embedding", "oft_terms_3", "coft", "coft_shared", "butterfly_2", "butterfly_3"]
)
def test_twenty_losses(case: str) -> None:
    losses: dict[str, list[float]] = {}
    for library in (graftlm, peft):
        model = (theirs if library is peft else graftlm.get_peft_model)(still("llama"), settings(case, library))
        losses[library.__name__] = twenty_steps(model, lambda step: batch("llama", seed=step % 4), 0.03)
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)


def test_evaluation_leaves_what_coft_trains() -> None:
    model = randomise(graftlm.get_peft_model(fresh("llama"), settings("coft", graftlm)), scale=2.0).eval()
    before = state_of(model)
    wanted = logits_of(model, **INPUTS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.train()(**INPUTS)
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    close(logits_of(model.eval(), **INPUTS), wanted)
    model.merge_adapter()
    close(logits_of(model, **INPUTS), wanted, 2e-5)


def test_sizes_that_do_not_divide() -> None:
    with pytest.warns(UserWarning, match="oft_block_size=5 does not divide a width of 32: oft_block_size=4 is taken"):
        graftlm.get_peft_model(fresh("llama"), settings("oft_near_size", graftlm))
    assert [nearest_divisor(12, n) for n in (1, 5, 7, 9, 10, 30)] == [1, 4, 6, 6, 12, 12]


# -- dropout -----------------------------------------------------------------------------------------------------------
def test_boft_drops_what_hf_peft_drops() -> None:
    for case in ("boft_count", "butterfly_2"):
        mine = randomise(graftlm.get_peft_model(fresh("llama"), settings(case, graftlm, boft_dropout=0.5)))
        their = theirs(fresh("llama"), settings(case, peft, boft_dropout=0.5))
        peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(mine))
        x, found = torch.randn(2, 3, 32), []
        for model in (mine, their):
            layer = model.base_model.model.model.layers[0].self_attn.q_proj.train()
            torch.manual_seed(5)
            found.append([layer(x) for _ in range(6)])
        for got, wanted in zip(*found, strict=True):
            close(got, wanted)
        assert not all(torch.equal(found[0][0], other) for other in found[0])


@pytest.mark.parametrize("case", ["oft_random", "miss_random"])
def test_dropout_is_for_training(case: str) -> None:
    """OFT leaves blocks out (HF PEFT does not), MiSS drops what its update reads."""
    rate = {"module_dropout": 0.5} if case.startswith("oft") else {"miss_dropout": 0.5}
    model = randomise(graftlm.get_peft_model(still("llama"), settings(case, graftlm, **rate)), scale=0.3)
    outputs = [logits_of(model.train(), **INPUTS) for _ in range(2)]
    assert not torch.equal(*outputs)
    wanted = logits_of(model.eval(), **INPUTS)
    assert torch.equal(wanted, logits_of(model, **INPUTS))
    model.merge_adapter()
    close(logits_of(model, **INPUTS), wanted, 2e-5)


def test_half_of_the_blocks_are_left_out() -> None:
    layer, x = adapted("without_bias", "oft")
    change, t = layer.changes["oft"], layer.held("oft")
    t["oft_dropout"] = torch.nn.Dropout(0.5)
    assert not change.drops(t) or t["oft_dropout"].training
    blocks = change.rotation(t)
    same = [torch.equal(block, torch.eye(3)) for block in blocks]
    assert sum(same) == len(blocks) // 2
    t["oft_dropout"].eval()
    assert not any(torch.equal(block, torch.eye(3)) for block in change.rotation(t))


# -- what cannot be meant ----------------------------------------------------------------------------------------------
def test_butterfly_factors_against_a_matrix() -> None:
    """The rotation as one [in, in] matrix is orthogonal, and reaches as far as its factors say."""
    for factors, reach in ((1, 4), (2, 8), (3, 16)):
        frozen = Frozen(torch.nn.Linear(32, 5))
        change = BOFTChange(graftlm.BOFTConfig(boft_n_butterfly_factor=factors), "layer", frozen)
        t: dict[str, Any] = {}
        change.create(t, frozen, torch.float64, True)  # type: ignore[arg-type]
        with torch.no_grad():
            t["boft_R"].normal_()
            matrix = change.enter(t, torch.eye(32, dtype=torch.float64))  # type: ignore[arg-type]
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(32, dtype=torch.float64))
        assert int((matrix.abs() > 1e-9).sum(1).max()) == reach


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda: graftlm.OFTConfig(r=2), "r=2, oft_block_size=32: give one of them"),
        (lambda: graftlm.OFTConfig(oft_block_size=0), "r=0, oft_block_size=0: give one of them"),
        (lambda: graftlm.OFTConfig(bias="some"), "bias='some': expected 'none', 'all' or 'oft_only'"),
        (lambda: graftlm.BOFTConfig(boft_block_num=2), "boft_block_size=4, boft_block_num=2: give one of them"),
        (lambda: graftlm.MissConfig(init_weights="fast"), "init_weights='fast': expected True or False or 'bat' or 'mini'"),
        (lambda: graftlm.MissConfig(layers_pattern="h"), "layers_pattern is given without layers_to_transform"),
        (
            lambda: BOFTChange(graftlm.BOFTConfig(boft_block_size=5), "a.b", LAYER),
            "boft_block_size=5 does not divide .*'a.b', 12",
        ),
        (
            lambda: BOFTChange(graftlm.BOFTConfig(boft_n_butterfly_factor=2), "a.b", LAYER),
            "boft_n_butterfly_factor=2 needs blocks .* multiple of 2; 'a.b', with 12 inputs, has 3 of size 4",
        ),
        (lambda: MissChange(graftlm.MissConfig(r=13), "a.b", LAYER), "r=13 is over the input of 'a.b', 12"),
        (
            lambda: MissChange(graftlm.MissConfig(r=3, mini_r=4, init_weights="mini"), "a.b", LAYER),
            "mini_r=4 does not divide the output of 'a.b', 9",
        ),
        (lambda: BatChange(graftlm.MissConfig(r=2, init_weights="bat"), "a.b", LAYER), "does not divide 'a.b', 9 x 12"),
    ],
)
def test_what_cannot_be_meant(change: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        change()


LAYER = Frozen(torch.nn.Linear(12, 9))


def test_layers_that_they_do_not_change() -> None:
    for kind in (graftlm.MissConfig, graftlm.BOFTConfig, graftlm.AdaLoraConfig):
        with pytest.raises(UnsupportedError, match="has no form for 'model.embed_tokens', a Embedding; it takes linear"):
            graftlm.get_peft_model(fresh("llama"), kind(target_modules=["embed_tokens"]))
    bare = fresh("llama")
    with pytest.raises(ConfigError, match="r=64 is over the input of 'model.layers.0.*', 32"):
        graftlm.get_peft_model(bare, graftlm.MissConfig())
    assert state_of(bare).keys() == state_of(fresh("llama")).keys()


def test_gradients_of_bat() -> None:
    layer, x = adapted("linear", "bat")
    change: Change = layer.changes["bat"]
    frozen = Frozen(layer.base_layer.double())
    block = layer.held("bat")["miss_block"].detach().double().requires_grad_()
    x = x.double().requires_grad_()

    def leave(x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        t: Any = {"miss_block": block, "miss_dropout": torch.nn.Identity()}
        return BatChange.leave(change, t, x, x.new_zeros(*x.shape[:-1], 9), None, frozen)  # type: ignore[arg-type]

    change.dtype = lambda t: torch.float64  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(leave, (x, block))
