"""Trains the miniature Stable Diffusion that the package ships: emoji-sd.

python launch/pretrain.py --flagfile=experiments/emoji_pretrain.flags
"""

import dataclasses

from absl import flags

from rlft import cli
from rlft.pretrain import PretrainConfig, run

for _field in dataclasses.fields(PretrainConfig):
  _define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
  _default = None if _field.default is dataclasses.MISSING else _field.default
  _define[_field.type](_field.name, _default, _field.metadata["help"])
flags.mark_flag_as_required("workdir")


def main() -> None:
  values = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(PretrainConfig)}
  run(PretrainConfig(**values))


if __name__ == "__main__":
  cli.main(main)
