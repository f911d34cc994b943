"""The scripts that start runs elsewhere, with stand-ins for what starts them there."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl import flags
import pytest

from rlft.config import flags as cli
from rlft.config.settings import Config

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STOPPED = "stopped in iteration 3; the same command goes on from here"

# Each call takes the next of the prepared answers of its kind; the last one stays.
_CLOUD = """
echo "$*" >> calls
case "$*" in
  *describe*) answers=states ;;
  *launch/train.py*) answers=trainings ;;
  *" create "*) answers=creations ;;
  *" scp "*) answers=copies ;;
  *) exit ;;
esac
line=$(head -1 $answers)
[ "$(wc -l < $answers)" -gt 1 ] && sed -i 1d $answers
status=${line%% *}
[ "$status" = 0 ] && echo "${line#* }" || echo "${line#* }" >&2
exit "${line%% *}"
"""
SPOT = ("--spot", "train", "--", "--workdir=gs://b/x")
TPU = ("--name=tpu", "--zone=z", "--type=v6e-8", "--version=image")


@pytest.fixture
def folder(tmp_path):
  """A copy of the scripts, and `bin/`, whose programs are found first."""
  shutil.copytree(
    ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__")
  )
  (tmp_path / "bin").mkdir()
  return tmp_path


def put(folder, name, text):
  program = folder / "bin" / name
  program.write_text(f"#!/bin/bash\n{text}\n")
  program.chmod(0o755)


def start(folder, *command, **variables):
  env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "POLL_SECONDS": "0"}
  return subprocess.Popen(
    command,
    cwd=folder,
    env=env | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ended(process):
  """(exit status, stdout, stderr)."""
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def tpu_vm(
  folder,
  *arguments,
  states=("READY",),
  runs=("0 report: runs/x/report.html",),
  creations=("0 created",),
  copies=("0 copied",),
):
  """What the script says and how it ends, with gcloud's answers; its calls are in `calls`."""
  answers = (state if state[0].isdecimal() else f"0 {state}" for state in states)
  (folder / "states").write_text("".join(f"{answer}\n" for answer in answers))
  (folder / "creations").write_text("".join(f"{creation}\n" for creation in creations))
  (folder / "copies").write_text("".join(f"{copy}\n" for copy in copies))
  (folder / "trainings").write_text("".join(f"{run}\n" for run in runs))
  put(folder, "gcloud", _CLOUD)
  put(folder, "git", 'echo archived > "${2#--output=}"')
  return ended(start(folder, "launch/tpu_vm.sh", *TPU, *arguments))


def verbs(folder):
  """What was asked of gcloud, without what it was asked about."""
  found = []
  for call in (folder / "calls").read_text().splitlines():
    _, _, kind, verb, *_ = call.split()
    if verb != "describe":
      what = {"tpu-vm": "", "queued-resources": "queued "}[kind] + verb
      found.append("train" if "launch/train.py" in call else what)
  return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_linter_of_shells_finds_nothing(script):
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  linter = beside if beside.exists() else shutil.which("shellcheck")
  if linter is None:
    pytest.skip("shellcheck is not installed")
  done = subprocess.run([linter, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_the_commands_and_runs_none(folder):
  before = sorted(folder.rglob("*"))
  status, out, _ = ended(
    start(
      folder, "launch/tpu_vm.sh", *TPU, "--spot", "--queued", "--dry_run", "all", "--", "--a=b c"
    )
  )
  assert status == 0 and sorted(folder.rglob("*")) == before
  lines = out.splitlines()
  create = "gcloud compute tpus queued-resources create tpu --node-id=tpu --accelerator-type=v6e-8"
  assert lines[0] == f"{create} --runtime-version=image --spot --zone=z"
  assert [line.split()[4] for line in lines[1:]] == ["scp", "ssh", "ssh", "delete"]
  assert "--worker=all" in lines[2] and "uv" in lines[2]
  assert "launch/train.py" in lines[3] and "--worker=all" in lines[3]
  assert lines[4] == "gcloud compute tpus queued-resources delete tpu --force --quiet --zone=z"


def test_from_creation_to_the_end(folder):
  flag = "--task=name=a,reward=x?y=1&z=2"
  status, out, _ = tpu_vm(folder, "all", "--", flag, states=("CREATING", "READY"))
  assert status == 0 and "report: runs/x/report.html" in out
  assert verbs(folder) == ["create", "scp", "ssh", "train", "delete"]
  (train,) = (line for line in (folder / "calls").read_text().splitlines() if "train.py" in line)
  # The shell of the TPU's machine gets back the flag that was given here.
  words = train.partition("launch/train.py ")[2].partition(" --zone=")[0]
  heard = subprocess.run(["bash", "-c", f"printf %s {words}"], capture_output=True, text=True)
  assert heard.stdout == flag
  assert "report:" in (folder / "runs" / "tpu.log").read_text()


@pytest.mark.parametrize("first", [f"0 {STOPPED}", "255 connection lost"])
def test_a_tpu_that_is_taken_away_is_replaced(folder, first):
  status, _, err = tpu_vm(
    folder,
    "--spot",
    "--queued",
    "train",
    "--",
    "--workdir=gs://b/x",
    states=("PREEMPTED", "CREATING", "ACTIVE", "READY"),
    runs=(first, "0 report: gs://b/x/report.html"),
  )
  assert status == 0 and "tpu was taken away" in err
  again = ["queued delete", "queued create", "scp", "ssh"]
  assert verbs(folder) == ["train", *again, "train"]


def test_a_network_that_is_away_takes_no_tpu(folder):
  lost = "255 connection lost"
  arguments = ("train", "--", "--workdir=gs://b/x")
  status, _, err = tpu_vm(folder, *arguments, states=("READY",), runs=(lost,))
  assert status == 2 and "failed on a TPU that is still there" in err
  status, _, err = tpu_vm(folder, *arguments, states=("1 ERROR: cannot resolve",), runs=(lost,))
  assert status == 2 and "gcloud cannot say whether tpu is still there: give the command" in err
  assert verbs(folder) == ["train", "train"]  # and nothing was deleted
  states = ("1 ERROR: cannot resolve", "1 ERROR: NOT_FOUND", "READY")
  status, _, err = tpu_vm(folder, *arguments, states=states, runs=(lost, "0 report: x"))
  assert status == 0 and "tpu was taken away" in err


def test_another_tpu_is_asked_for_until_there_is_one(folder):
  refused = "1 There is no more capacity in the zone"
  status, _, err = tpu_vm(
    folder,
    *SPOT,
    states=("PREEMPTED", "READY"),
    runs=("255 connection lost", "0 report: x"),
    creations=(refused, refused, "0 created"),
  )
  assert status == 0 and err.count("there is no other yet: asking again") == 2
  assert verbs(folder) == ["train", *3 * ["delete", "create"], "scp", "ssh", "train"]
  status, _, _ = tpu_vm(folder, "create", creations=(refused,))
  assert status == 1  # Whoever asks for the first one is there to hear it.


def test_a_tpu_that_is_taken_away_before_it_is_used_is_replaced_too(folder):
  status, _, err = tpu_vm(
    folder,
    *SPOT,
    states=("PREEMPTED", "CREATING", "PREEMPTED", "READY"),
    runs=("255 connection lost", "0 report: x"),
  )
  assert status == 0 and "tpu was taken away before it was used" in err
  assert verbs(folder) == ["train", *2 * ["delete", "create"], "scp", "ssh", "train"]


def test_an_installation_that_fails_is_begun_again(folder):
  """As on a TPU that is gone before rlft is on it."""
  status, _, _ = tpu_vm(
    folder,
    *SPOT,
    states=("PREEMPTED", "READY"),
    runs=("255 connection lost", "0 report: x"),
    copies=("1 connection lost", "0 copied"),
  )
  assert status == 0
  again = ["delete", "create", "scp"]
  assert verbs(folder) == ["train", *again, *again, "ssh", "train"]


def test_a_run_that_was_stopped_on_a_tpu_that_stays_goes_on(folder):
  status, _, _ = tpu_vm(folder, "train", "--", "--a=b", runs=(f"0 {STOPPED}", "0 report: x"))
  assert status == 0 and verbs(folder) == ["train", "train"]


def test_a_mistake_is_not_tried_again(folder):
  status, out, err = tpu_vm(folder, "train", "--", "--a=b", runs=("2 error: unknown flag --a",))
  assert status == 2 and "unknown flag" in out
  assert err.endswith("the training failed on a TPU that is still there: see runs/tpu.log\n")
  assert verbs(folder) == ["train"]


def test_a_queue_that_refuses_ends_it(folder):
  status, _, err = tpu_vm(folder, "--queued", "create", states=("CREATING", "FAILED"))
  assert status == 2 and "the queue has refused tpu" in err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "command '' is unknown"),
    (("start", *TPU), "command 'start' is unknown"),
    (("create", "--zone=z"), "--name is missing"),
    (("create", "--name=a", "--zone=z"), "--type is missing"),
    (("train", *TPU), "nothing to train: give flags"),
    (("create", *TPU, "--spto"), "unknown option --spto"),
    (("create", "delete", *TPU), "two commands, create and delete"),
  ],
)
def test_mistakes_in_its_options(folder, arguments, message):
  status, out, err = ended(start(folder, "launch/tpu_vm.sh", *arguments))
  assert status == 2 and out == ""
  assert err.startswith("error: ") and message in err and err.count("\n") == 1


# Slurm.

_STEP = """
echo "$*" >> calls
[ -n "$STATUS" ] && exit "$STATUS"
trap 'exit 0' TERM
touch started
while true; do sleep 0.05; done
"""
# srun hands USR1 on to the run, which saves; TERM it takes for itself, and kills the run.
_SRUN = f"""
echo "$*" >> calls
[ -n "$SAYS" ] && echo "$SAYS"
[ -n "$STATUS" ] && exit "$STATUS"
trap 'exit 137' TERM
trap 'echo "{STOPPED}"; exit 0' USR1
touch started
while true; do sleep 0.05; done
"""


@pytest.fixture
def cluster(folder):
  put(folder, "srun", _SRUN)
  put(folder, "scontrol", 'echo "$*" >> calls')
  return folder


def test_slurm_hands_the_flags_on_and_the_status_back(cluster):
  for status in ("0", "2"):
    job = start(cluster, "launch/slurm.sh", "--task=a b", STATUS=status, SLURM_JOB_ID="42")
    assert ended(job)[0] == int(status)
  call = "--kill-on-bad-exit=1 python launch/train.py --task=a b\n"
  assert (cluster / "calls").read_text() == 2 * call


def test_slurm_puts_a_job_back_that_was_told_to_make_way(cluster):
  """Slurm tells the run alone, which ends with status 0."""
  job = start(cluster, "launch/slurm.sh", "--a=b", STATUS="0", SAYS=STOPPED, SLURM_JOB_ID="42")
  status, out, _ = ended(job)
  assert status == 0 and out == f"{STOPPED}\n"
  assert (cluster / "calls").read_text().splitlines()[1:] == ["requeue 42"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_puts_a_job_back_that_its_time_has_stopped(cluster, number):
  job = start(cluster, "launch/slurm.sh", "--a=b", STATUS="", SLURM_JOB_ID="42")
  while not (cluster / "started").exists():
    assert job.poll() is None
    time.sleep(0.02)
  job.send_signal(number)
  assert ended(job)[0] == 0
  assert (cluster / "calls").read_text().splitlines()[1:] == ["requeue 42"]


# Kubernetes.


@pytest.fixture(scope="module")
def jobset():
  yaml = pytest.importorskip("yaml")
  return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def test_the_jobset_has_a_pod_for_each_host(jobset, monkeypatch):
  (job,) = jobset["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  height, _, width = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].partition("x")
  hosts = int(height) * int(width) // container["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == hosts
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  values = flags.FlagValues()
  cli.define(Config, flag_values=values)
  monkeypatch.chdir(ROOT)
  values(["train", *container["args"][2:]])
  assert cli.read(Config, flag_values=values).output.workdir.startswith("gs://")


def test_a_pod_that_was_told_to_stop_has_not_succeeded(jobset, folder):
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  command = [*container["command"], *container["args"][:2], "--a=b c"]
  put(folder, "python", _STEP)
  for status in ("0", "2"):
    assert ended(start(folder, *command, STATUS=status))[0] == int(status)
  assert (folder / "calls").read_text() == 2 * "launch/train.py --a=b c\n"
  pod = start(folder, *command, STATUS="")
  while not (folder / "started").exists():
    assert pod.poll() is None
    time.sleep(0.02)
  pod.terminate()
  assert ended(pod)[0] == 143
