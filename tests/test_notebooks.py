"""The notebooks run, and what is stored of them is small.

The one that needs the hub runs in test_docs.py, with tiny models for the released ones.
"""

import os

import pytest
from common import ROOT
from conftest import CACHE

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[123]_*.ipynb"))

pytestmark = pytest.mark.slow


def kinds(notebook) -> list[list[str]]:
    """The outputs of each cell, by their kinds."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        sorted(kind for out in cell.outputs for kind in out.get("data", {out.output_type: 0}))
        for cell in cells
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_stored(path, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    assert path.stat().st_size < 600_000
    notebook = nbformat.read(path, as_version=4)
    assert f"notebooks/{path.name})" in notebook.cells[0].source  # The badge leads here.
    stored = kinds(notebook)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    env["TMPDIR"] = str(tmp_path)
    where = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(notebook, timeout=1200, resources=where)
    client.execute(env=env)  # Raises what a cell raises.
    found = [[kind for kind in cell if kind != "image/jpeg"] for cell in kinds(notebook)]
    assert found == stored and sum(map(len, stored)) >= 6
