"""A model card: what a run's model was trained on, what came of it, and how to use it."""

import re
import shlex
from typing import Any

import huggingface_hub
import numpy as np

from rlft.config.settings import EMOJI_SD
from rlft.evaluation import statistics, summary
from rlft.evaluation.results import EvalResult
from rlft.evaluation.tables import Table
from rlft.inference.load import Finetuned
from rlft.models.files import hub
from rlft.report import page, samples
from rlft.report.render import render
from rlft.report.run_files import RunFiles

_TAGS = ("rlft", "reinforcement-learning", "stable-diffusion", "diffusers")
_SETTINGS = (
  ("learning_rate", "learning rate"),
  ("lora_rank", "LoRA rank"),
  ("train_timesteps", "timesteps trained per iteration"),
  ("clip_range", "clip range"),
  ("kl_weight", "weight of the KL divergence to the base model"),
  ("pretrain_weight", "weight of the pretraining loss"),
  ("sampling_steps", "sampling steps"),
  ("guidance_scale", "guidance"),
  ("seed", "seed"),
)
# What stands before the name of a file in an absolute path.
_FOLDERS = re.compile(r"(?<![\w.:/-])(?:~|/)[^\s?,;*]*/|(?<=:)/[^\s?,;*]*/")


def card(run: RunFiles, found: Finetuned, *, repo: str = "", adapter_file: str = "") -> str:
  """The content of README.md, with the hub's metadata before it.

  Folders of this machine are left out of names.

  Args:
    run: what its directory says.
    found: its model.
    repo: 'org/name' of the hub where it will be; '' if it stays here.
    adapter_file: the LoRA's name where that is all there is; '' for a whole model.
  """
  config = run.config
  base = config.get("pretrained") or "a model that is not known"
  parsed = hub.parse(base)
  base_id = parsed.repo if parsed else _short(base)
  sheets = samples.read_samples(run.workdir).values()
  prompt = next((sheet.prompts[0] for kept in sheets for sheet in kept), "...")
  tasks = [{key: _short(str(value)) for key, value in task.items()} for task in run.tasks]
  return render(
    "card.md",
    metadata=_metadata(base, adapter=bool(adapter_file)),
    name=repo.rpartition("/")[2] or run.name,
    verdict=run.verdict,
    base=f"[{base_id}](https://huggingface.co/{base_id})" if parsed else f"`{base_id}`",
    base_id=base_id,
    iterations=found.iteration,
    images=run.images,
    algorithm=config.get("algorithm") or "policy-gradient",
    adapter=bool(config.get("lora_rank")),
    tasks=tasks,
    settings=[(text, config[key]) for key, text in _SETTINGS if config.get(key)],
    table=_table(run),
    measured=run.history[-1][0] if run.history else 0,
    averaged=found.averaged or not config.get("ema_decay"),
    level=f"{statistics.LEVEL:.0%}",
    adapter_file=adapter_file,
    where=repo or "PATH/TO/THIS/FOLDER",
    pushed=bool(repo),
    prompt=prompt.replace("\\", "").replace('"', "'"),
    quoted=shlex.quote(prompt),
    steps=config.get("sampling_steps", 50),
    guidance=config.get("guidance_scale", 7.0),
    eta=config.get("eta", 1.0),
    made=[(name, _short(value)) for name, value in page.made(run)],
    licence=_licence(base, base_id),
  )


def _metadata(base: str, *, adapter: bool) -> str:
  """The YAML that the hub reads: https://huggingface.co/docs/hub/model-cards."""
  parsed = hub.parse(base)
  values: dict[str, Any] = {
    "library_name": "diffusers",
    "pipeline_tag": "text-to-image",
    "tags": [*_TAGS, *(["lora"] if adapter else [])],
  }
  if base == EMOJI_SD:
    values["license"] = "cc-by-4.0"
  else:
    values |= {"license": "other", "license_name": "that-of-the-base-model"}
  if parsed:
    values |= {"license_link": f"https://huggingface.co/{parsed.repo}"}
    values |= {"base_model": parsed.repo}
    values |= {"base_model_relation": "adapter" if adapter else "finetune"}
  return huggingface_hub.ModelCardData(**values).to_yaml().strip()


def _licence(base: str, base_id: str) -> str:
  if base == EMOJI_SD:
    return (
      "`emoji-sd` was trained on Twemoji (CC-BY 4.0, Twitter, Inc. and other contributors), and so"
      " was this model; the attribution has to stay."
    )
  return (
    f"This is a derivative of {base_id}, whose licence and terms of use hold for it as well."
    " Rewards that are models have licences of their own: see whether they say anything of what was"
    " trained on their scores."
  )


def _table(run: RunFiles) -> str:
  """The evaluations before and after, in Markdown; '' if there are not both."""
  if len(run.history) < 2:
    return ""
  before, after = run.history[0][1], run.history[-1][1]
  header = ["evaluation", "metric", "before", "after", "change", ""]
  if run.best:
    header.insert(3, "base at its best guidance")
  rows = []
  for name, old in before.items():
    if name not in after:
      continue
    beaten = run.best[name].result if name in run.best else old
    change, interval, relative, called = summary.change(beaten, after[name])
    marks = [", trained on"] * old.trained_on + [", a guard"] * (name in run.guards)
    direction = "lower" if old.lower_is_better else "higher"
    row = [f"{name}{''.join(marks)}", f"`{_short(old.metric)}`, {direction} is better", _mean(old)]
    if run.best:
      best = run.best.get(name)
      row.append(f"{_mean(best.result)} at {best.guidance:g}" if best else "")
    new = ", ".join(filter(None, (_mean(after[name]), summary.found(old, after[name]))))
    rows.append([*row, new, f"{change} {interval}".strip(), f"{relative} {called}"])
  return Table(header, rows).markdown()


def _mean(result: EvalResult) -> str:
  if np.isnan(result.mean):
    return "not scored"
  mean = f"{result.mean:.{result.digits}f}"
  if np.isnan(result.low):
    return mean
  return f"{mean} [{result.low:.{result.digits}f}, {result.high:.{result.digits}f}]"


def _short(text: str) -> str:
  """A name without the folders of this machine."""
  return _FOLDERS.sub("", text)
