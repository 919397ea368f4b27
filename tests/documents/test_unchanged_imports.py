"""The documents with their own `from peft import …`, under `graftlm.as_peft()`."""

from __future__ import annotations

from typing import Any

import pytest
import test_document_001
import test_document_002
import test_document_003
import test_document_004
from test_document_004 import models  # noqa: F401  (a fixture)

import graftlm
from graftlm.data import load_data

ONE_STEP = {"trainer.train(": "trainer.args.max_steps = 1\ntrainer.train("}
RUNS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "document_001": (test_document_001.REPLACED | {"num_epochs = 10": "num_epochs = 1"}, {"i": 0}),
    "document_002": (test_document_002.REPLACED, {}),
    "document_003": (test_document_003.REPLACED["MLP"], {}),
    "document_004_lora": (test_document_004.LORA, {}),
    "document_004_qlora nf4": (test_document_004.QLORA | ONE_STEP, {}),
    "document_004_qlora": (
        test_document_004.UNQUANTISED | ONE_STEP,
        {"start": test_document_004.start, "resume_from_checkpoint": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "script", ["document_004_lora", *(pytest.param(s, marks=pytest.mark.slow) for s in RUNS if s != "document_004_lora")]
)
def test_documents_run_unchanged(script, workplace, base, models):  # noqa: F811
    for name in ("bloomz-560m", "bigscience/bloomz-560m", "bloom-1b4-zh"):
        if not (workplace.folder / name).exists():
            workplace.model(name, base)
    if not (workplace.folder / "alpaca_data_zh").exists():
        load_data("alpaca-zh", split="train").save_to_disk("alpaca_data_zh")
    replaced, names = RUNS[script]
    graftlm.as_peft()
    try:
        outcome = workplace.run(script.partition(" ")[0], "peft", replaced, **names)
    finally:
        graftlm.as_peft.undo()
    assert any(isinstance(value, graftlm.PeftModel) for value in vars(outcome).values())
    assert "trainable params: " in outcome.printed
