"""Every notebook runs under papermill, with reduced parameters, from the folder that a user would be in."""

import nbformat
import pandas as pd
import papermill
import pytest
from conftest import REPOSITORY

from kvneox_lib import records

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
COMMON = {"model", "attn_implementation", "dtype", "device", "context_length", "output_dir"}


def parameters_of(path) -> set[str]:
    return set(papermill.inspect_notebook(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_bare_and_take_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    assert COMMON <= parameters_of(path)


def run(name: str, tmp_path, **parameters):
    executed = tmp_path / f"{name}.ipynb"
    papermill.execute_notebook(
        REPOSITORY / "notebooks" / f"{name}.ipynb", executed, parameters=parameters, cwd=tmp_path, progress_bar=False
    )
    return nbformat.read(executed, as_version=4)


def said(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs)


@pytest.mark.slow
def test_adapter_notebook(tmp_path):
    names = ["snapkv", "adakv_snapkv", "observed_attention", "decoding_knorm"]
    notebook = run("00_adapter", tmp_path, context_length=192, presses=names, output_dir=str(tmp_path / "out"))
    text = said(notebook)
    assert "16 / 16 项通过" in text and "全部检查通过" in text
    (record,) = records.load_records(tmp_path / "out").to_dict("records")
    assert (record["weights"], record["n_checks"], record["n_checks_failed"], record["n_cells"]) == (
        "bundled",
        16,
        0,
        24,
    )
    matrix = records.table_path(tmp_path / "out", record["run_id"], "matrix")
    assert list(pd.read_csv(matrix).press) == names
    assert "4 种 press，24 格" in text
