"""Stands for TRL's process: draws grey images, brighter with each epoch, and learns nothing."""

import array
import importlib.util
import json
import os
import pathlib
import sys

spec = importlib.util.spec_from_file_location("worker", os.environ["TRL_WORKER"])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


class Images:
  def __init__(self, shape, value):
    self.shape, count = shape, 1
    for size in shape:
      count *= size
    self._numbers = array.array("f", [value] * count)

  def tobytes(self):
    return self._numbers.tobytes()


class Trainer:
  def __init__(self, work):
    self.epochs = 0
    self.log = []
    if work["resume"]:
      kept = json.loads((pathlib.Path(work["resume"]) / "unet" / "state.json").read_text())
      self.epochs, self.log = kept["epochs"], kept["log"]
    self.work = work

  def epoch(self, prompts, score):
    if self.epochs == self.work["options"].get("dies_at"):
      sys.exit("out of memory")
    value = self.work["options"].get("value", 0.25 * self.epochs)
    rewards = array.array("f", score(Images((len(prompts), 2, 2, 3), value)))
    self.log.append([prompts, list(rewards)])
    self.epochs += 1

  def save(self, folder):
    place = pathlib.Path(folder) / "unet"
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps({"epochs": self.epochs, "log": self.log}))


if __name__ == "__main__":
  print("Loading", file=sys.stderr)
  worker.send(sys.stdout.buffer, {})
  worker.serve(sys.stdin.buffer, sys.stdout.buffer, Trainer(json.loads(sys.argv[1])))
