"""Writes a run's report again, or one page that compares several runs.

python launch/report.py runs/emoji_joint
python launch/report.py runs/emoji_joint runs/emoji_preference --output=compared.html
"""

from collections.abc import Sequence

from absl import flags

from rlft.config import flags as cli
from rlft.inference.reports import report

_OUTPUT = flags.DEFINE_string(
  "output", "", "the page that compares several runs; compared.html here if empty"
)


def main(workdirs: Sequence[str]) -> None:
  print("\n".join(report(workdirs, output=_OUTPUT.value)))


if __name__ == "__main__":
  cli.main(main, takes_paths=True)
