import json
import shlex

import numpy as np
import pytest

from rlft.evaluation import results, statistics
from rlft.inference import card
from rlft.inference.load import Finetuned
from rlft.report import metrics, samples
from rlft.report.run_files import read_run
from rlft.types import Prompt

yaml = pytest.importorskip("yaml")


def result(name, scores, **rest):
  scores = np.array(scores, np.float32)
  low, high = statistics.bootstrap_interval(scores, samples=50)
  return results.EvalResult(
    name, "oracle", statistics.mean(scores), low, high, len(scores), len(scores), scores, **rest
  )


def make(workdir, base, *, gain=1.0, **settings):
  task = {
    "name": "tone",
    "prompts": "/home/me/prompts.txt",
    "reward": "0.5*host:/home/me/rewards.py:mine + 0.5*aesthetic-v2",
    "batch_size": 64,
    "veto": "safe>=0.5",
  }
  guard = {"name": "guard", "metric": "oracle", "prompts": "p", "guard": True}
  config = {"pretrained": base, "iterations": 2, "task": [task], "eval": [guard]}
  config |= {"sampling_steps": 10, "guidance_scale": 3.0, "eta": 1.0, "learning_rate": 1e-4}
  (workdir / "config.json").write_text(json.dumps(config | settings))
  with metrics.MetricsWriter(workdir, first_iteration=0) as writer:
    for iteration in range(2):
      writer.write(iteration, {"reward/tone/mean": iteration, "time/sample_s": 60.0})
  for iteration in (0, 2):
    liked = result("liked", np.arange(20) + gain * iteration)
    found = {"liked": liked, "guard": result("guard", np.arange(20))}
    results.append_history(workdir, iteration, found)
  samples.Keeper(workdir, 2).save("liked", np.zeros((1, 4, 4, 3), np.uint8), [Prompt('a "dog"')])
  return read_run(workdir)


def text_of(run, **settings):
  return card.card(run, Finetuned(None, iteration=2), **settings)


def metadata(text):
  _, front, rest = text.split("---\n", 2)
  return yaml.safe_load(front), rest


def test_the_hub_reads_what_it_is(tmp_path):
  run = make(tmp_path, "org/sd@0123")
  about, _ = metadata(text_of(run, repo="me/mine"))
  assert about == {
    "base_model": "org/sd",
    "base_model_relation": "finetune",
    "library_name": "diffusers",
    "license": "other",
    "license_link": "https://huggingface.co/org/sd",
    "license_name": "that-of-the-base-model",
    "pipeline_tag": "text-to-image",
    "tags": ["rlft", "reinforcement-learning", "stable-diffusion", "diffusers"],
  }
  about, _ = metadata(text_of(run, repo="me/mine", adapter_file="lora.safetensors"))
  assert about["base_model_relation"] == "adapter" and "lora" in about["tags"]


def test_what_people_read(tmp_path):
  results.write_base(tmp_path, {"liked": results.BestBase(5.0, result("liked", np.arange(20) + 1))})
  run = make(tmp_path, "org/sd@0123")
  _, text = metadata(text_of(run, repo="me/mine"))
  assert text.startswith("\n# mine\n\n**improved liked 10.5 → 11.5, and nothing that was measured")
  assert "[org/sd](https://huggingface.co/org/sd)" in text
  assert "2 iterations of `policy-gradient`, 128 images drawn" in text
  assert (
    "| tone | `0.5*host:rewards.py:mine + 0.5*aesthetic-v2`, images vetoed unless `safe>=0.5` |"
    " `prompts.txt` | 64, ? for each prompt |" in text
  )
  assert "| learning rate | 0.0001 |" in text and "LoRA" not in text
  table = [line for line in text.splitlines() if line.startswith(("| liked", "| guard"))]
  assert len(table) == 2 and "9.5000 [" in table[0] and "10.5000 [" in table[0]
  assert " at 5 |" in table[0] and "+1.0000 [+1.0000, +1.0000] | +9.5% better |" in table[0]
  assert table[1].startswith("| guard, a guard | `oracle`, higher is better |")
  assert 'from_pretrained("me/mine")' in text and "\"a 'dog'\"," in text
  assert "--model=me/mine@main --sampling_steps=10 --guidance_scale=3.0 --eta=1.0" in text
  assert "- Of that, in iterations: sample 2.0 min" in text
  assert "derivative of org/sd" in text
  assert "/home" not in text and "\n\n\n" not in text


def test_what_was_measured_of_other_weights_is_said(tmp_path):
  run = make(tmp_path, "org/sd@0123", ema_decay=0.9)
  later = card.card(run, Finetuned(None, iteration=7, averaged=True))
  assert "**Measured after 2 iterations; the weights here are those after 7.**" in later
  assert "Measured with" not in later
  last = card.card(run, Finetuned(None, iteration=2))
  assert "**Measured with the average of the last iterations' weights; the weights here" in last
  assert "Measured after" not in last


def test_a_prompt_runs_nothing(tmp_path):
  run = make(tmp_path, "org/sd@0123")
  prompt = "a $(touch x) `id` 'dog'"
  samples.Keeper(tmp_path, 2).save("liked", np.zeros((1, 4, 4, 3), np.uint8), [Prompt(prompt)])
  (line,) = (x for x in card.card(run, Finetuned(None)).splitlines() if "sample.py" in x)
  assert shlex.split(line)[-1] == f"--prompt={prompt}"


def test_a_hacked_run_says_so_first(tmp_path):
  text = text_of(make(tmp_path, "emoji-sd", gain=-1.0))
  about, text = metadata(text)
  assert about["license"] == "cc-by-4.0" and "base_model" not in about
  assert "**became worse: liked 9.50 → 7.50.**" in text
  assert "Twemoji (CC-BY 4.0" in text and 'from_pretrained("PATH/TO/THIS/FOLDER")' in text


def test_an_adapter_is_loaded_into_its_base(tmp_path):
  run = make(tmp_path, "/home/me/models/sd", lora_rank=4)
  about, text = metadata(text_of(run, repo="me/mine", adapter_file="lora.safetensors"))
  assert "base_model" not in about and 'from_pretrained("sd")' in text
  assert 'load_lora_weights("me/mine", weight_name="lora.safetensors")' in text
  assert "Only a LoRA adapter was trained." in text and "| LoRA rank | 4 |" in text
  assert "--init_lora=lora.safetensors" in text and "/home" not in text


def test_a_run_that_says_nothing(tmp_path):
  text = text_of(read_run(tmp_path))
  assert "Nothing was measured before and after." in text
