"""The notebook runs from top to bottom: its cells in this process, and (`slow`) in a kernel."""

import contextlib
import io
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "two_adapters.ipynb"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """With fewer rows and epochs, and nothing from the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    assert not any(cell.get("outputs") for cell in found.cells), "commit the notebook without outputs"
    settings = found.cells[1]
    assert "epochs = 2" in settings.source and "rows = 40" in settings.source
    settings.source = settings.source.replace("epochs = 2", "epochs = 1").replace("rows = 40", "rows = 8")
    return found


def check(printed: str, folder: Path) -> None:
    assert printed.count("trainable params: 1,024") == 2
    assert printed.count("before:") == printed.count("after:") == 2
    for name in ("prompts", "quotes"):
        (kept,) = load_file(folder / "runs" / name / "adapter_model.safetensors").values()
        assert kept.shape == (4, 256)


def test_its_cells(notebook, tmp_path):
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"cell {number}", "exec"), names)
    check(printed.getvalue(), tmp_path)


@pytest.mark.slow
def test_in_a_kernel(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    check("".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", [])), tmp_path)
