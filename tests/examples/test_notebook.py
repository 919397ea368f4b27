"""The notebook runs from top to bottom."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "two_adapters.ipynb"


def test_two_adapters_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    settings = notebook.cells[1]
    assert "epochs = 2" in settings.source and "rows = 40" in settings.source
    settings.source = settings.source.replace("epochs = 2", "epochs = 1").replace("rows = 40", "rows = 8")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert printed.count("trainable params: 1,024") == 2
    assert printed.count("before:") == printed.count("after:") == 2
    assert (tmp_path / "runs" / "quotes" / "adapter_model.safetensors").is_file()
