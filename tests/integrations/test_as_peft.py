"""`graftlm.as_peft()`: who imports `peft` gets GraftLM, whether HF PEFT is installed or not, until `undo()`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from accelerate.utils import is_peft_model
from transformers.trainer_utils import _is_peft_model
from transformers.utils import is_peft_available

import graftlm

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.tensor([[5, 6, 7, 8]])

# HF PEFT hidden from the import system, as if it were not installed
HIDDEN = """
import importlib.metadata, sys
class Hides:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest): return None if name.split(".")[0] == "peft" else self.finder.find_spec(name, *rest)
    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        return () if context.name == "peft" else self.finder.find_distributions(context)
sys.meta_path[:] = [Hides(f) if hasattr(f, "find_distributions") else f for f in sys.meta_path]
"""
SCRIPT = """
import importlib.metadata, importlib.util, sys
import peft
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, infer_device
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.utils import is_peft_available
assert is_peft_available() and importlib.util.find_spec("peft") is not None
assert importlib.metadata.version("peft") == peft.__version__
assert PeftModel.__module__ == "graftlm.model", PeftModel
print("arguments", sys.argv[1:])
"""


def python(*arguments: str, code: str | None = None) -> str:
    source = str(Path(graftlm.__file__).parent.parent)
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *(["-c", code] if code is not None else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def wrapped(tiny: Path, **options: Any) -> Any:
    base = t.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(**{**LORA, **options}))
    with torch.no_grad():
        for _, parameter in model.adapter_parameters("default"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# -- names ---------------------------------------------------------------------------------------------------------------
def test_with_hf_peft_installed(as_peft: None) -> None:
    import peft
    from peft.peft_model import PeftModelForCausalLM
    from peft.utils.save_and_load import load_peft_weights

    assert peft.PeftModel is graftlm.PeftModel and load_peft_weights is graftlm.load_peft_weights
    assert PeftModelForCausalLM is graftlm.PeftModelForCausalLM and "LoraConfig" in dir(peft)
    assert importlib.metadata.version("peft") == peft.__version__ and importlib.util.find_spec("peft.tuners") is not None


def test_the_level_between_wrapper_and_base(as_peft: None, tiny: Path) -> None:
    """`model.model` is HF PEFT's: the base where a method changes layers, the base's backbone under virtual tokens."""
    base = t.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    soft = graftlm.get_peft_model(base, graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert soft.model is base.model
    model = wrapped(tiny)
    assert model.model is model.get_base_model()
    graftlm.as_peft.undo()
    assert model.model is model.get_base_model().model


def test_undo_gives_everything_back() -> None:
    peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
    import transformers.trainer as trainer

    before, version = trainer.PeftModel, importlib.metadata.version("peft")
    for _ in range(2):
        graftlm.as_peft()
        graftlm.as_peft()  # a second time changes nothing
        assert sys.modules.get("peft") is not peft and trainer.PeftModel is graftlm.PeftModel
        graftlm.as_peft.undo()
        assert sys.modules["peft"] is peft and trainer.PeftModel is before is peft.PeftModel
        assert importlib.metadata.version("peft") == version
    assert graftlm.as_peft.FINDER not in sys.meta_path
    graftlm.as_peft.undo()


@pytest.mark.parametrize(
    ("name", "why"), [("XLoraConfig", "a method that is not here"), ("no_such_name", "cannot import name")]
)
def test_names_that_are_not_here(as_peft: None, name: str, why: str) -> None:
    with pytest.raises(ImportError, match=why):
        exec(f"from peft import {name}")
    with pytest.raises(ModuleNotFoundError, match="GraftLM, which stands in for peft"):
        importlib.import_module("peft.tuners.xlora")


# -- without HF PEFT -----------------------------------------------------------------------------------------------------
def test_without_hf_peft() -> None:
    before = (
        f"{HIDDEN}\nimport transformers.trainer, graftlm.training\n"
        "assert not transformers.utils.is_peft_available() and not graftlm.as_peft.active()  # never unasked\n"
    )
    late = "assert transformers.trainer.PeftModel is graftlm.PeftModel\n"
    gone = "graftlm.as_peft.undo()\nassert importlib.util.find_spec('peft') is None and not is_peft_available()\n"
    assert python(code=f"{before}graftlm.as_peft()\n{late}{SCRIPT}{gone}") == "arguments []\n"


@pytest.mark.parametrize(
    "command",
    [("-m", "graftlm", "run"), pytest.param(("-m", "graftlm.as_peft"), marks=pytest.mark.slow)],
    ids=["run", "module"],
)
def test_scripts_run_unchanged(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 3\n", encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(f"{SCRIPT}import beside\nprint(beside.VALUE, __name__)\n", encoding="utf-8")
    printed = python(*command, str(script), "--rate", "3", "--debug", "--help")
    assert printed == "arguments ['--rate', '3', '--debug', '--help']\n3 __main__\n"


# -- what libraries ask --------------------------------------------------------------------------------------------------
def test_libraries_recognise_the_wrapper(tiny: Path) -> None:
    model = wrapped(tiny)
    assert not is_peft_model(model)
    graftlm.as_peft()
    try:
        assert is_peft_available() and is_peft_model(model) and _is_peft_model(model)
        assert not is_peft_model(model.get_base_model())
    finally:
        graftlm.as_peft.undo()
    assert not is_peft_model(model)


def test_a_plain_trainer(as_peft: None, tiny: Path, tmp_path: Path) -> None:
    """It saves adapters only, and reads them again."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    args = t.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = t.Trainer(wrapped(tiny), args, train_dataset=rows)
    trainer.train()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    again = t.Trainer(wrapped(tiny), args, train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (_, a), (_, b) in zip(
        trainer.model.adapter_parameters("default"), again.model.adapter_parameters("default"), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("named", [False, True])
def test_pipeline(tiny: Path, named: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = wrapped(tiny), t.AutoTokenizer.from_pretrained(tiny)
    if named:
        graftlm.as_peft()
    try:
        generate = t.pipeline("text-generation", model=model, tokenizer=tokenizer)
        made = generate("a good friend", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    finally:
        graftlm.as_peft.undo()
    ids = tokenizer("a good friend", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert made == tokenizer.decode(expected, skip_special_tokens=True)
