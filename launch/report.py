"""Writes a run's report again, or one page that compares several runs.

python launch/report.py runs/emoji_joint
python launch/report.py runs/emoji_joint runs/emoji_preference --output=compared.html
"""

from collections.abc import Sequence
import dataclasses

from rlft.config import flags
from rlft.config.fields import option
from rlft.inference.reports import report


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """Where to; each field is a flag of the same name."""

  output: str = option(
    "file of the page that compares several runs; if empty, compared.html here", "", path=True
  )


flags.define(ReportSettings)


def main(workdirs: Sequence[str]) -> None:
  print("\n".join(report(workdirs, output=flags.read(ReportSettings).output)))


if __name__ == "__main__":
  flags.main(main, takes_paths=True)
