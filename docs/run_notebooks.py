"""Run the notebooks of the site and store what they print and draw, without progress bars and logs.

make notebooks
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(
            notebook, coalesce_streams=True, record_timing=False, resources=resources
        ).execute()
        tidy(notebook)
        nbformat.write(notebook, path)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out what is of this machine and run: standard error, versions of the kernel."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


if __name__ == "__main__":
    main()
