"""Comparisons of small pictures in folders, for the tests of the rating page."""

import json

import numpy as np

from rlft.rating import pictures, rate
from rlft.rating.links import Links
from rlft.rating.settings import PromptSet, StudySettings
from rlft.rating.votes import Plan, Votes
from rlft.storage import images

PROMPTS = [f"a picture of thing {number}" for number in range(8)]
BRIGHTNESS = {"base": 60, "tuned": 200, "third": 120}


def write_folder(folder, level, *, prompts=PROMPTS, images_per_prompt=1, size=8):
  """Pictures of one brightness, all different by a pixel, and their list."""
  folder.mkdir(parents=True)
  rows = []
  for place, prompt in enumerate(prompts):
    for number in range(images_per_prompt):
      picture = np.full((size, size, 3), level, np.uint8)
      picture[0, 0] = [place, number, 0]
      name = f"{place}-{number}.png"
      images.save_png(folder / name, picture)
      rows.append({"file_name": name, "text": prompt})
  write_listing(folder, rows)


def write_listing(folder, rows):
  (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_study(
  folder,
  *,
  names=("base", "tuned"),
  prompts=PROMPTS,
  images_per_prompt=1,
  ask="quality",
  **settings,
):
  """A comparison with its pictures, in `folder/study`."""
  for name in names:
    write_folder(
      folder / name, BRIGHTNESS[name], prompts=prompts, images_per_prompt=images_per_prompt
    )
  study = rate.open_study(
    folder / "study",
    [str(folder / name) for name in names],
    [PromptSet("things", images=images_per_prompt, ask=ask)],
    StudySettings(**settings),
  )
  pictures.collect(study, batch_size=4)
  return study


def make_plan(study, *, raters=2):
  """Who is asked how much."""
  settings = study.settings
  return Plan(len(study.pairs), raters, settings.raters_per_pair, settings.checks, settings.seed)


def make_client(study, *, raters=2, **options):
  """The page, called by a test; its links; its votes."""
  from starlette import testclient

  from rlft.rating import app

  plan = make_plan(study, raters=raters)
  votes, links = Votes(study.directory / "votes.sqlite", plan), Links(study.directory)
  page = app.make_app(study, votes, links, plan, hosts=["127.0.0.1"], **options)
  client = testclient.TestClient(page, base_url="http://127.0.0.1", follow_redirects=False)
  return client, links, votes
