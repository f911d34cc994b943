"""Flags made from the settings, and errors of one line."""

import dataclasses
import json
import subprocess
import sys

from absl import flags

from rlft.config import flags as cli
from rlft.config import tasks
from rlft.config.settings import Config, EvalConfig, TaskConfig


def parse(*argv: str) -> Config:
  values = flags.FlagValues()
  cli.define_flags(flag_values=values)
  values(["train.py", *argv])
  return cli.from_flags(values)


def test_without_flags_the_paper():
  settings = parse()
  assert settings == Config()
  assert (settings.sampling_steps, settings.train_timesteps, settings.guidance_scale) == (50, 5, 7)
  assert (settings.learning_rate, settings.clip_range, settings.iterations) == (2e-6, 1e-4, 1000)
  assert (settings.pretrain_batch_size, settings.compute_dtype) == (2048, "bfloat16")


def test_every_field_has_a_flag_with_its_help():
  values = flags.FlagValues()
  cli.define_flags(flag_values=values)
  for field in dataclasses.fields(Config):
    assert field.metadata["help"] in values[field.name].help


def test_flags_of_every_type(monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")
  settings = parse(
    "--seed=3",
    "--eta=0.5",
    "--noremat",
    "--accumulate_timesteps",
    "--advantage=group",
    "--workdir=~/run",
    "--task=name=a,prompts=p.txt,reward=host:f.py:g,batch_size=8",
    "--task=emoji-skintone",
    "--eval=name=e,prompts=p.txt,metric=m",
  )
  assert (settings.seed, settings.eta, settings.advantage) == (3, 0.5, "group")
  assert (settings.remat, settings.accumulate_timesteps) == (False, True)
  assert settings.workdir == "/home/someone/run"
  assert settings.task == (
    TaskConfig(name="a", prompts="p.txt", reward="host:f.py:g", batch_size=8),
    *tasks.TASK_PRESETS["emoji-skintone"],
  )
  assert settings.eval == (EvalConfig(name="e", prompts="p.txt", metric="m"),)


def test_a_script_may_define_some_flags_only():
  values = flags.FlagValues()
  cli.define_flags("pretrained", "eta", flag_values=values)
  values(["sample.py", "--eta=0.5"])
  assert "seed" not in values
  assert cli.from_flags(values) == Config(eta=0.5)
  assert [flag.name for flag in values.get_key_flags_for_module(sys.argv[0])] == [
    "pretrained",
    "eta",
  ]


def test_the_command_line_fails_in_one_line(tmp_path):
  spaced = tmp_path / "spaced.flags"
  spaced.write_text("# a comment\n--seed 1\n")
  stray = tmp_path / "stray.flags"
  stray.write_text("seed=1\n--eta=0.5\n")
  binary = tmp_path / "binary.flags"
  binary.write_bytes(b"--seed=\xff\xfe\n")
  script = """if True:
    import json, sys
    from rlft import types
    from rlft.config import flags as cli
    cli.define_flags()
    def run():
      cli.from_flags()
      raise types.UserError("first\\nsecond")
    for argv in json.loads(sys.argv[1]):
      sys.argv = ["train.py", *argv]
      try:
        cli.main(run)
      except SystemExit as stop:
        print(stop.code, file=sys.stderr)
  """
  cases = [
    (["--learning_rat=1"], "unknown flag --learning_rat: did you mean --learning_rate?"),
    (["--qqqqqqq"], "unknown flag --qqqqqqq: see --help"),
    (["--seed=1.5"], "flag --seed=1.5: give a whole number"),
    (["--eta=high"], "flag --eta=high: give a number"),
    (["--remat=3"], "flag --remat=3: give true or false"),
    (["--advantage=grup"], "flag --advantage=grup: value should be one of <batch|prompt|group>"),
    (["--seed"], "Missing value for flag --seed"),
    (["seed=1"], "unexpected argument 'seed=1': write options as --flag=value"),
    ([f"--flagfile={tmp_path}/none.flags"], "Unable to open flagfile"),
    ([f"--flagfile={spaced}"], "'--seed 1': write --seed=1"),
    ([f"--flagfile={stray}"], "unexpected argument 'seed=1'"),
    ([f"--flagfile={binary}"], "a flagfile is not text"),
    (["--seed=1"], "first second"),
  ]
  done = subprocess.run(
    [sys.executable, "-c", script, json.dumps([argv for argv, _ in cases])],
    capture_output=True,
    text=True,
    timeout=60,
  )
  lines = done.stderr.splitlines()
  assert len(lines) == 2 * len(cases), done.stderr
  for (_, message), shown, code in zip(cases, lines[::2], lines[1::2], strict=True):
    assert shown.startswith(f"error: {message}")
    assert code == "2"
  assert not done.stdout
