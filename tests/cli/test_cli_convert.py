"""`graftlm convert`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomForCausalLM

import graftlm


@pytest.fixture
def lokr(base, tmp_path):
    torch.manual_seed(1)
    config = graftlm.LoKrConfig(task_type="CAUSAL_LM", r=2, init_weights=False)
    graftlm.get_peft_model(BloomForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "lokr")
    return tmp_path / "lokr"


def test_lora_adapter_and_what_it_costs(cli, base, lokr, tmp_path):
    ids = torch.tensor([[5, 9, 100, 7]])
    wanted = graftlm.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lokr)(ids).logits
    differences = []
    for rank in ("2", "0.9", "16"):
        result = cli("convert", lokr, "--to", "lora", "--rank", rank, "-b", base, "-o", tmp_path / rank)
        assert result.exit_code == 0, result.output
        assert "2 layers as LoRA of rank" in result.stdout and "Logits differ from the adapter's by up to" in result.stdout
        model = graftlm.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / rank)
        assert isinstance(model.peft_config["default"], graftlm.LoraConfig)
        differences.append((model(ids).logits - wanted).abs().max().item())
    assert differences == sorted(differences, reverse=True)
    assert differences[-1] < 1e-5 < differences[0]


def test_what_convert_refuses(cli, base, adapters, lokr, tmp_path):
    def refused(*arguments):
        result = cli("convert", *arguments, "-b", base)
        assert result.exit_code == 2, result.output
        return result.stderr

    out = ["-o", tmp_path / "out"]
    assert "adapters can become lora only" in refused(lokr, "--to", "ia3", "-r", "2", *out)
    assert "'two': expected a whole number, or a share" in refused(lokr, "-r", "two", *out)
    assert "expected a whole number above 0" in refused(lokr, "-r", "1.5", *out)
    assert "is 48 x 16, so 16 is the most" in refused(lokr, "-r", "17", *out)
    assert "it is no change of weights" in refused(adapters["prompt"], "-r", "2", *out)
    assert "not an empty directory" in refused(lokr, "-r", "2", "-o", lokr)
    assert refused(tmp_path / "nowhere", "-r", "2", *out)
    assert not (tmp_path / "out").exists()
