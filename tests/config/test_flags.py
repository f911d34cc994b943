"""Flags made from the settings, and errors of one line."""

import dataclasses
import json
import logging
import pathlib
import subprocess
import sys

from absl import flags
import jax
import pytest

import rlft
from rlft import catalog
from rlft.config import fields, tasks
from rlft.config import flags as cli
from rlft.config import stored as stored_lib
from rlft.config.fields import option
from rlft.config.settings import Config, EvalConfig, TaskConfig


def parse(*argv: str) -> Config:
  values = flags.FlagValues()
  cli.define(Config, flag_values=values)
  values(["train.py", *argv])
  return cli.read(Config, flag_values=values)


def test_an_algorithm_has_other_defaults_which_yield_to_what_is_given():
  found = parse("--algorithm=ddpo")
  assert found == fields.make(
    Config,
    algorithm="ddpo",
    advantage="prompt",
    accumulate_timesteps=True,
    train_timesteps=0,
    learning_rate=1e-5,
  )
  stored = json.loads(stored_lib.to_json(found))
  assert (stored["algorithm"], stored["advantage"]) == ("ddpo", "prompt")
  # What is given counts, also where it is the default of everything else.
  given = parse("--algorithm=ddpo", "--train_timesteps=5", "--noaccumulate_timesteps")
  assert (given.algorithm.train_timesteps, given.algorithm.accumulate_timesteps) == (5, False)
  assert given.algorithm.advantage == "prompt"
  # Options behind the name are no part of it.
  assert parse("--algorithm=raft?one_in=4").optimizer.learning_rate == 3e-6
  assert parse("--algorithm=policy-gradient") == Config()
  values = flags.FlagValues()
  cli.define(Config, flag_values=values)
  assert "dpok has other defaults: --kl_weight=0.01;" in values["algorithm"].help


def test_every_algorithm_is_known_to_help_and_every_default_is_a_setting():
  field = fields.leaves(Config)["algorithm"]
  for name in catalog.ALGORITHMS:
    assert name in field.metadata["help"]
  for name, defaults in field.metadata["presets"].items():
    assert name in catalog.ALGORITHMS
    fields.check(fields.make(Config, **defaults))


def test_paths_are_those_of_other_working_directories_too(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "clip").mkdir()
  (tmp_path / "emoji-sd").mkdir()
  (tmp_path / "m.safetensors").touch()
  for given, expected in (
    ("clip", f"{tmp_path}/clip"),
    ("~/clip", f"{tmp_path}/clip"),
    ("emoji-sd", "emoji-sd"),
    ("org/name@main", "org/name@main"),
    ("m.safetensors?tokenizer=~/clip", f"{tmp_path}/m.safetensors?tokenizer={tmp_path}/clip"),
    ("m.safetensors?tokenizer=a/b@c", f"{tmp_path}/m.safetensors?tokenizer=a/b@c"),
  ):
    assert parse(f"--pretrained={given}").pretrained == expected


def test_without_flags_the_paper():
  settings = parse()
  assert settings == Config()
  assert (settings.policy.sampling_steps, settings.policy.guidance_scale) == (50, 7)
  assert (settings.algorithm.train_timesteps, settings.algorithm.clip_range) == (5, 1e-4)
  assert (settings.optimizer.learning_rate, settings.iterations) == (2e-6, 1000)
  assert settings.pretraining.pretrain_batch_size == 2048
  assert settings.devices.compute_dtype == "bfloat16"


def test_every_field_has_a_flag_with_its_help():
  values = flags.FlagValues()
  cli.define(Config, flag_values=values)
  for name, field in fields.leaves(Config).items():
    assert field.metadata["help"] in values[name].help


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
  assert (settings.seed, settings.policy.eta) == (3, 0.5)
  assert (settings.algorithm.advantage, settings.algorithm.accumulate_timesteps) == ("group", True)
  assert not settings.devices.remat
  assert settings.output.workdir == "/home/someone/run"
  assert settings.task == (
    TaskConfig(name="a", prompts="p.txt", reward="host:f.py:g", batch_size=8),
    *tasks.TASK_PRESETS["emoji-skintone"],
  )
  assert settings.eval == (EvalConfig(name="e", prompts="p.txt", metric="m"),)


def test_a_script_may_define_some_flags_only():
  values = flags.FlagValues()
  cli.define(Config, "pretrained", "eta", flag_values=values)
  values(["sample.py", "--eta=0.5"])
  assert "seed" not in values
  assert cli.read(Config, flag_values=values) == fields.make(Config, eta=0.5)
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
    from rlft.config.settings import Config
    cli.define(Config)
    def run():
      cli.read(Config)
      raise types.UserError("first\\n" + 9000 * "x" + " last")
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
    (["--" + "q" * 2000], "unknown flag, with a name longer than any there is: see --help"),
    (["--seed=1.5"], "flag --seed=1.5 is not a whole number: give one"),
    (["--eta=high"], "flag --eta=high is not a number: give one"),
    (["--remat=3"], "flag --remat=3 is neither true nor false: give one of them"),
    (["--advantage=grup"], "flag --advantage=grup is not known: did you mean group?"),
    (["--seed"], "Missing value for flag --seed"),
    (["seed=1"], "unexpected argument 'seed=1': write options as --flag=value"),
    ([f"--flagfile={tmp_path}/none.flags"], "Unable to open flagfile"),
    ([f"--flagfile={spaced}"], "'--seed 1': write --seed=1"),
    ([f"--flagfile={stray}"], "unexpected argument 'seed=1'"),
    ([f"--flagfile={binary}"], "a flagfile is not text"),
    (["--seed=1"], f"first {'x' * 594} ... {'x' * 595} last"),
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


def test_a_flag_that_must_be_given_is_named(capsys):
  values = flags.FlagValues()
  flags.DEFINE_string("model", None, "m", flag_values=values)
  flags.mark_flag_as_required("model", flag_values=values)
  with pytest.raises(SystemExit) as ended:
    cli.parse(["x"], flag_values=values)
  assert ended.value.code == 2
  assert capsys.readouterr().err == "error: --model is missing: give it\n"


def test_versions_are_printed_also_where_a_flag_is_missing():
  script = pathlib.Path(__file__).parents[2] / "launch" / "sample.py"
  done = subprocess.run(
    [sys.executable, script, "--version"], capture_output=True, text=True, timeout=60
  )
  found = f"rlft {rlft.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}\n"
  assert (done.returncode, done.stdout) == (0, found), done.stderr


@pytest.mark.parametrize(
  ("message", "shown"),
  [
    ("'tpu': INTERNAL: Failed to open libtpu.so: libtpu.so: cannot open shared object file", False),
    ("'proxy': The 'proxy' backend requires the address of an IFRT Proxy server", False),
    ("'tpu': UNKNOWN: TPU initialization failed: the device is in use", True),
    ("'cuda': no driver", True),
  ],
)
def test_jax_says_nothing_of_a_tpu_that_nobody_has(message, shown):
  text = f"Unable to initialize backend {message}"
  record = logging.LogRecord("jax", logging.INFO, "", 0, text, None, None)
  assert cli._tells_something(record) is shown


@dataclasses.dataclass(frozen=True)
class Own:
  name: str = option("what it is called")
  count: int = option("how many", 3, least=1, most=9)
  rate: float | None = option("how fast", default=None, least=0.0)
  loud: bool = option("heard far away", default=True)


def parse_own(*arguments):
  values = flags.FlagValues()
  cli.define(Own, flag_values=values)
  values(["script", *arguments])
  return cli.read(Own, flag_values=values)


def test_defaults_are_those_of_the_fields():
  assert parse_own("--name=a") == Own(name="a", count=3, rate=None, loud=True)


def test_every_type_is_read():
  given = parse_own("--name=b", "--count=9", "--rate=0.5", "--noloud")
  assert given == Own(name="b", count=9, rate=0.5, loud=False)


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--count=0", "--count=0: is out of range: it must be at least 1"),
    ("--count=10", "--count=10: .* at most 9"),
    ("--count=x", "flag --count=x"),
    ("--rate=-1", "--rate=-1: .* at least 0.0"),
  ],
)
def test_values_out_of_range_are_refused(argument, message):
  with pytest.raises(flags.IllegalFlagValueError, match=message):
    parse_own("--name=a", argument)


def test_a_field_without_a_default_must_be_given():
  with pytest.raises(flags.IllegalFlagValueError, match="--name must have a value"):
    parse_own("--count=1")
