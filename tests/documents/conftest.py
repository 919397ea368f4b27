"""Where the documents' scripts run: a folder with their data sets, the bundled base, no network, no progress bars."""

import socket
from pathlib import Path

import datasets
import pytest
import torch
from document_runner import LAYERS, Workplace
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from graftlm.bundled import base_path
from graftlm.data import load_data

DATA = {
    "fka/awesome-chatgpt-prompts": "prompts",
    "Abirate/english_quotes": "quotes",
    "HasturOfficial/adgen": "adgen-zh",
    "raft": "tweets",
}


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Sockets lead nowhere but to processes of this machine (datasets' own)."""
    connect = socket.socket.connect

    def refuse(self, address, *args):
        if self.family != socket.AF_UNIX:
            raise OSError("the test tried to open a connection")
        return connect(self, address, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bars."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The bundled base, its first two layers in fp32: quick, and two libraries can be compared closely."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.float32)
    model.transformer.h = model.transformer.h[:LAYERS]
    model.config.n_layer = LAYERS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder, current, with the documents' data sets in it under the names that the documents use."""
    folder = tmp_path_factory.mktemp("documents")
    for name, bundled in DATA.items():
        (folder / name).mkdir(parents=True)
        for split, rows in load_data(bundled).items():
            rows.to_parquet(folder / name / f"{split}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield Workplace(folder)
