"""Makes a data set of prompts for one of the paper's tasks, to be read by the million.

python launch/prepare_prompts.py --kind=composition --output=data/composition
python launch/prepare_prompts.py --kind=people --source=captions.jsonl --output=data/people
python launch/prepare_prompts.py --kind=preference --source=metadata.parquet --output=data/liked
"""

from rlft import catalog
from rlft.config import flags
from rlft.data.prepare import PrepareConfig, run

flags.define(PrepareConfig)


def main() -> None:
  print(run(flags.read(PrepareConfig), catalog.load_prompts))


if __name__ == "__main__":
  flags.main(main)
