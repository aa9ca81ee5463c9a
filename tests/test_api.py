"""What Python users are promised: names that import when they are used, and examples that run as they are written."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import histossl
from histossl.slides.reading.slide import Slide

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "python_api.ipynb").read_text(encoding="utf-8"))
PAGE = (EXAMPLES / "python_api.md").read_text(encoding="utf-8")


def test_every_public_name_is_there_and_documented() -> None:
    assert list(histossl.__all__) == sorted(histossl.__all__)
    for name in histossl.__all__:
        found = getattr(histossl, name)
        assert found.__doc__, name
        assert name in dir(histossl)
        assert re.search(rf"\b{name}\b", histossl.__doc__ or ""), f"{name}: not in the module's docstring"
        assert re.search(rf"\b{name}\b", PAGE), f"{name}: not in examples/python_api.md"
    assert histossl.Slide is Slide
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = histossl.no_such_name


def test_editors_see_the_names_that_are_there() -> None:
    """The imports for type checkers name each public name once, from the module where it is found at run time."""
    tree = ast.parse(Path(histossl.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(histossl.__all__)
    assert {name: f"histossl.{module}" for name, module in histossl._MODULE_OF.items()} == seen


def test_import_histossl_imports_nothing_heavy() -> None:
    script = (
        "import sys, histossl\n"
        "dir(histossl), histossl.__version__, histossl.Workspace, histossl.FinetuneConfig, histossl.UsageError\n"
        "heavy = {'torch', 'timm', 'numpy', 'scipy', 'sklearn', 'openslide', 'rich', 'typer', 'h5py'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_notebook_holds_no_outputs_and_plain_python() -> None:
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs"), "clear its outputs"
        assert cell.get("execution_count") is None
    for source in code_cells():
        ast.parse(source)  # no magics: the cells are run as they stand


# As a kernel does: one namespace, no file that it would be of, and what a cell ends with is shown.
SESSION = """
import ast, json, sys
space = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    cell, tree = f"cell {number}", ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell, "exec"), space)
    shown = eval(compile(ast.Expression(last.value), cell, "eval"), space) if last else None
    print("" if shown is None else repr(shown), flush=True)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook's cells in their order, then the page's, each in a fresh session; the page goes on in its folder."""
    folder = tmp_path_factory.mktemp("examples")
    done = {}
    for name, parts in {"notebook": code_cells(), "page": code_blocks()}.items():
        line = [sys.executable, "-W", "error", "-c", SESSION]
        done[name] = subprocess.run(
            line, cwd=folder, input=json.dumps(parts), capture_output=True, text=True, check=False
        )
    return folder, done


def test_the_notebook_runs_from_top_to_bottom(ran: Any) -> None:
    folder, done = ran
    notebook = done["notebook"]
    assert notebook.returncode == 0, notebook.stderr[-3000:]
    assert "(180, 240, 3)" in notebook.stdout  # the region: 120 x 90 microns at 0.5
    assert "PIL.Image.Image" in notebook.stdout  # the sheet of views, which a notebook shows
    assert (folder / "workspace/finetune/default/report.html").exists()
    assert "predictions.csv" in notebook.stdout
    assert "tiling" not in notebook.stderr  # within silent()
    assert "pretraining" in notebook.stderr


def test_the_page_runs_as_written(ran: Any) -> None:
    _, done = ran
    assert done["page"].returncode == 0, done["page"].stderr[-3000:]
