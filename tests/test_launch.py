"""The launch scripts, as a user calls them: train, sample, evaluate, export, and diffusers."""

import json
import pathlib
import subprocess
import sys

import forked_cases
import jax
import models_cases
import numpy as np
import PIL.Image
import pytest
import train_cases

from rlft.diffusion import rollout
from rlft.diffusion.policy import make_policy
from rlft.diffusion.sampler import Sampler, image_keys
from rlft.models import lora, stable_diffusion
from rlft.models.files import pretrained

ROOT = pathlib.Path(__file__).parents[1]
STEPS, GUIDANCE = 4, 3.0


def launch(script, *arguments, cwd):
  command = [sys.executable, ROOT / "launch" / f"{script}.py", *arguments]
  return subprocess.run(
    command,
    cwd=cwd,
    env=train_cases.environment_of_runs(),
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.fixture(scope="module")
def nursery():
  made = forked_cases.Nursery(train_cases.environment_of_runs())
  yield made
  made.close()


def assert_one_line(nursery, message, script, *arguments, cwd, said):
  """A script says what is wrong, and nothing else."""
  process = nursery.start([ROOT / "launch" / f"{script}.py", *arguments], said, cwd)
  assert process.wait(timeout=600) == 2 and process.output() == ""
  errors = process.errors()
  assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where a LoRA was trained for an iteration: `base`, `run`, `prompts.txt`, `reward.py`."""
  folder = tmp_path_factory.mktemp("launch")
  # Of 8 pixels, as diffusers draws none that are smaller.
  pretrained.save(folder / "base", train_cases.tiny_model(size=8))
  (folder / "prompts.txt").write_text("\n".join(models_cases.PROMPTS))
  (folder / "reward.py").write_text(
    "def bright(images, prompts, metadata):\n  return images.mean((1, 2, 3))\n"
  )
  done = launch(
    "train",
    "--pretrained=base",
    "--workdir=run",
    "--task=name=bright,prompts=prompts.txt,reward=host:reward.py:bright,batch_size=4",
    "--eval=name=bright,prompts=prompts.txt,metric=host:reward.py:bright,images=4",
    "--iterations=1",
    f"--sampling_steps={STEPS}",
    f"--guidance_scale={GUIDANCE}",
    "--train_timesteps=2",
    # The update is the learning rate's sign: large enough to be seen in the pictures.
    "--learning_rate=0.1",
    "--pretrain_weight=0",
    "--lora_rank=2",
    "--lora_alpha=4",
    "--compute_dtype=float32",
    cwd=folder,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  # The last line says what the run came to, as the report's first does.
  *_, written, verdict = done.stdout.splitlines()
  assert written == "report: run/report.html"
  assert f"<h1>{verdict}.</h1>" in (folder / "run" / "report.html").read_text()
  return folder


def test_a_run_leaves_its_files(folder):
  files = {path.name for path in (folder / "run").iterdir()}
  assert {"config.json", "metrics.jsonl", "eval.json", "report.html", "checkpoints"} <= files
  assert {"usage.jsonl", "tensorboard"} <= files
  (line,) = (folder / "run" / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line)["learning_rate"] == 0.1 and json.loads(line)["images_seen"] == 4


def test_sample(folder):
  prompt = models_cases.PROMPTS[0]
  done = launch(
    "sample",
    "--model=run",
    f"--prompt={prompt}",
    "--prompts=prompts.txt",
    "--images_per_prompt=2",
    "--output=grid.png",
    cwd=folder,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("grid.png: 3 prompts, 2 images each (seed 1000, sampling_steps 4")
  with PIL.Image.open(folder / "grid.png") as picture:
    assert picture.size == (2 * 130 + 2, 3 * 130 + 2)


def test_evaluate_repeats_the_runs_own_evaluation(folder):
  done = launch("evaluate", "--model=run", "--output=again.json", cwd=folder)
  assert done.returncode == 0, done.stderr
  assert "bright" in done.stdout
  again = json.loads((folder / "again.json").read_text())["results"]["bright"]
  own = json.loads((folder / "run" / "eval.json").read_text())["after"]["bright"]
  assert again["mean"] == pytest.approx(own["mean"], abs=1e-6)
  assert again["images"] == own["images"] == 4 and again["trained_on"]


def test_export_is_the_run_and_diffusers_draws_the_same(folder):
  done = launch(
    "export",
    "--workdir=run",
    "--pretrained=base",
    "--output=exported",
    "--lora_output=lora.safetensors",
    "--lora_format=kohya",
    cwd=folder,
  )
  assert done.returncode == 0, done.stderr
  said = done.stdout.splitlines()
  assert said[0] == "wrote exported" and said[-1] == "wrote lora.safetensors" and len(said) == 3
  assert "no safety checker" in said[1]

  prompts = list(models_cases.PROMPTS)
  exported = pretrained.load(folder / "exported")
  policy = make_policy(exported, sampling_steps=STEPS, guidance_scale=GUIDANCE, eta=0.0)
  sampler = Sampler(exported, policy, batch_size=8)
  ours = sampler(prompts, 3)
  keys = image_keys(jax.random.key(3), 0, len(prompts))
  noise = np.asarray(rollout.normal(keys, STEPS, stable_diffusion.latent_shape(exported)))
  base = pretrained.load(folder / "base")
  plain = sampler(prompts, 3, weights=lora.Weights(base.params["unet"]))
  assert np.abs(ours - plain).max() > 0.02, "the training changed nothing that can be compared"

  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")

  def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    latents = torch.tensor(noise).permute(0, 3, 1, 2)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 0.0}
    return pipe(prompts, latents=latents, output_type="np", **settings).images

  pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "exported")
  np.testing.assert_allclose(draw(pipe), ours, atol=1e-3)

  pytest.importorskip("peft")
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "base")
  np.testing.assert_allclose(draw(pipe), plain, atol=1e-3)
  pipe.load_lora_weights(folder, weight_name="lora.safetensors")
  np.testing.assert_allclose(draw(pipe), ours, atol=1e-3)


def test_a_directory_has_no_lora(folder, nursery, tmp_path):
  arguments = ["--workdir=base", "--lora_output=other.safetensors"]
  place = {"cwd": folder, "said": tmp_path / "said"}
  assert_one_line(nursery, "base has no LoRA", "export", *arguments, **place)


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("train", ["--iteration=3"], "unknown flag --iteration: did you mean --iterations?"),
    ("train", ["--target=h100:8"], "--target has no effect on a training: give --dry_run too"),
    (
      "train",
      ["--dry_run", "--target=h100:12", "--pretrained=emoji-sd", "--task=emoji-composition"]
      + ["--pretrain_weight=0", "--workdir=run"],
      "--target=h100:12 is no number of whole machines",
    ),
    (
      "train",
      ["--dry_run", "--pretrained=emoji-sd", "--task=emoji-composition", "--coordinator=a:1"]
      + ["--num_processes=2", "--process_id=1"],
      "--coordinator has no effect on --dry_run, which meets no other process: leave it out",
    ),
    ("sample", ["--model=nowhere", "--prompt=a"], "nowhere is not a directory"),
    ("evaluate", ["--model=nowhere", "--eval=emojy"], "unknown preset 'emojy', did you mean emoji"),
    ("evaluate", ["--model=nowhere", "--suite=emojy", "--output=o"], "--suite=emojy is not known"),
    ("export", ["--workdir=run"], "nothing to write: give --output"),
  ],
)
def test_a_mistake_is_one_line(nursery, tmp_path, script, arguments, message):
  cwd = tmp_path / "cwd"
  cwd.mkdir()
  assert_one_line(nursery, message, script, *arguments, cwd=cwd, said=tmp_path / "said")
  assert not list(cwd.iterdir())
