"""Runs experiments/emoji_colab.ipynb from top to bottom and keeps what a reader sees.

    pip install -e '.[notebook,rating]' nbclient
    python experiments/notebook.py

Duration: that of the trainings in it. Progress bars are kept as they ended.
"""

import pathlib
import re
import time

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "experiments" / "emoji_colab.ipynb"


def main() -> None:
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  start = time.monotonic()
  run(notebook, ROOT)
  nbformat.write(notebook, NOTEBOOK)
  print(f"{NOTEBOOK.name}: {(time.monotonic() - start) / 60:.1f} minutes")


def run(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> None:
  """Executes every cell of a notebook in a folder; an error in one is raised."""
  client = nbclient.NotebookClient(
    notebook, timeout=3600, resources={"metadata": {"path": str(folder)}}
  )
  client.execute()
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)  # times, which differ from run to run
    if cell.cell_type == "code":
      cell.outputs = joined(cell.outputs)


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
  """What was printed piece by piece as one, as a terminal would show it."""
  found: list[nbformat.NotebookNode] = []
  for output in outputs:
    printed = output.output_type == "stream"
    if printed and found and found[-1].get("name") == output.name:
      found[-1].text += output.text
    else:
      found.append(output)
  for output in found:
    if output.output_type == "stream":
      output.text = as_seen(output.text)
  return found


def as_seen(text: str) -> str:
  """What a terminal shows in the end: bars write their lines again and again, one below another."""
  lines, row, column = [""], 0, 0
  for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|\x1b", text):
    if part == "\n":
      row, column = row + 1, 0
      lines += [""] * (row + 1 - len(lines))
    elif part == "\r":
      column = 0
    elif part == "\x1b[A":
      row = max(row - 1, 0)
    elif not part.startswith("\x1b"):
      line = lines[row].ljust(column)
      lines[row] = line[:column] + part + line[column + len(part) :]
      column += len(part)
  return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n" * text.endswith("\n")


if __name__ == "__main__":
  main()
