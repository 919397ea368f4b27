"""What an int8 base makes of a row depends on the rows beside it: by outlier columns, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VOCAB
from training_helpers import save_base

from graftlm.quantization import quantized_layers
from graftlm.training import resolve_base


@pytest.mark.parametrize(("threshold", "depends"), [(6.0, True), (0.0, False)])
def test_rows_beside_each_other_in_int8(threshold: float, depends: bool, tmp_path: Path) -> None:
    base, _ = resolve_base(str(save_base(tmp_path, "llama", hidden_size=64, intermediate_size=128)), quantization="int8")
    with torch.no_grad():
        base.model.layers[0].input_layernorm.weight[:4] = 4.0  # some columns are outliers in some rows
    for _, layer in quantized_layers(base):
        layer.state.threshold = threshold
    rows = torch.randint(3, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = base(input_ids=rows).logits
        alone = torch.cat([base(input_ids=row[None]).logits for row in rows])
    error = float((together - alone).abs().max() / together.abs().max())
    assert error > 1e-4 if depends else error < 1e-5, error
