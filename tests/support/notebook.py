"""Run a notebook's cells in one namespace and collect their outputs, without Jupyter.

    python -m tests.support.notebook docs/huggingface.ipynb

writes the outputs into the file.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run all code cells in order.

    Args:
        notebook: in the format of Jupyter, version 4.

    Returns:
        Outputs of each code cell: what it printed, then its figures.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [_outputs("".join(cell["source"]), namespace) for cell in code_cells(notebook)]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(outputs: list[dict[str, Any]]) -> str:
    """What a cell printed."""
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def _outputs(source: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.parse(source), "<cell>", "exec"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    for number in plt.get_fignums():
        image = io.BytesIO()
        plt.figure(number).savefig(image, format="png", dpi=80, bbox_inches="tight")
        encoded = base64.b64encode(image.getvalue()).decode()
        outputs.append({"output_type": "display_data", "metadata": {}, "data": {"image/png": encoded}})
    plt.close("all")
    return outputs


def main(path: Path) -> None:
    """Run a notebook and write its outputs."""
    plt.switch_backend("agg")
    notebook = json.loads(path.read_text())
    for number, (cell, outputs) in enumerate(zip(code_cells(notebook), run(notebook), strict=True), start=1):
        cell |= {"execution_count": number, "outputs": outputs}
        for output in outputs:
            print("".join(output.get("text", ["[figure]\n"])), end="")
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
