"""The page, called as a browser and as a stranger would call it."""

import asyncio
import html.parser
import io
import re
import sqlite3

import numpy as np
import PIL.Image
import pytest
import rating_cases

testclient = pytest.importorskip("starlette.testclient")

HOSTILE = '<script>alert("x")</script>\' OR 1=1; -- {{ 7 * 7 }} ../../etc/passwd'


@pytest.fixture
def study(tmp_path):
  return rating_cases.make_study(tmp_path, checks=0.0)


@pytest.fixture
def page(study):
  client, links, votes = rating_cases.make_client(study)
  with client:
    yield client, links, votes
  votes.close()


class Forms(html.parser.HTMLParser):
  """Reads the hidden fields and the buttons of each form, and the pictures."""

  def __init__(self, text):
    super().__init__()
    self.forms, self.pictures, self.buttons = {}, [], {}
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    if tag == "form":
      self._fields = self.forms.setdefault(attrs["action"].rpartition("/")[2], {})
    elif tag == "input" and attrs.get("type") == "hidden":
      self._fields[attrs["name"]] = attrs["value"]
    elif tag == "button":
      self.buttons[attrs.get("value", "undo")] = "disabled" not in attrs
    elif tag == "img":
      self.pictures.append(attrs["src"])


def read(client, rater):
  answer = client.get(f"/r/{rater}/rate")
  assert answer.status_code == 200
  return Forms(answer.text)


def level(client, address):
  """Which contender's picture this is, by its brightness."""
  picture = PIL.Image.open(io.BytesIO(client.get(address).content))
  levels = {value: name for name, value in rating_cases.BRIGHTNESS.items()}
  return levels[int(np.asarray(picture)[-1, -1, 0])]


def test_from_the_guide_to_thanks(page):
  client, links, votes = page
  rater = links.rater(1)
  guide = client.get(f"/r/{rater}")
  assert "Is it well made?" in guide.text and ">Begin<" in guide.text
  for done in range(8):
    seen = read(client, rater)
    assert seen.buttons == {"undo": done > 0, "left": True, "right": True, "tie": True}
    left, right = seen.pictures
    assert {level(client, left), level(client, right)} == {"base", "tuned"}
    tuned = "left" if level(client, left) == "tuned" else "right"
    sent = client.post(f"/r/{rater}/vote", data={**seen.forms["vote"], "answer": tuned})
    assert (sent.status_code, sent.headers["location"]) == (303, f"/r/{rater}/rate")
  assert "8 answers are stored" in client.get(f"/r/{rater}/rate").text
  assert "Go on (8 of 8 done)" in client.get(f"/r/{rater}").text
  assert [vote.value for vote in votes.answered()] == [1.0] * 8
  assert 0 < sum(vote.flipped for vote in votes.answered()) < 8


def test_nothing_says_whose_picture_it_is(page, study):
  client, links, _ = page
  text = client.get(f"/r/{links.rater(1)}/rate").text
  picture = client.get(Forms(text).pictures[0])
  said = text + str(picture.headers) + picture.content.decode("latin1")
  for contender in study.contenders:
    assert contender.source not in said
  assert "tuned" not in said
  # Which file was written first says which model drew it.
  assert not {"etag", "last-modified"} & picture.headers.keys()
  assert not PIL.Image.open(io.BytesIO(picture.content)).info


def test_undo_and_another_answer(page):
  client, links, votes = page
  rater = links.rater(1)
  first = read(client, rater).forms["vote"]
  client.post(f"/r/{rater}/vote", data={**first, "answer": "left"})
  undo = read(client, rater).forms["undo"]
  assert client.post(f"/r/{rater}/undo", data=undo).status_code == 303
  assert read(client, rater).forms["vote"] == first
  client.post(f"/r/{rater}/vote", data={**first, "answer": "right"})
  assert [vote.answer for vote in votes.answered()] == ["right"]


def test_an_answer_that_is_sent_again_counts_once(page):
  client, links, votes = page
  rater = links.rater(1)
  form = read(client, rater).forms["vote"]
  for _ in range(3):
    assert client.post(f"/r/{rater}/vote", data={**form, "answer": "tie"}).status_code == 303
  assert len(votes.answered()) == 1


def test_without_ties(tmp_path):
  study = rating_cases.make_study(tmp_path, ties=False)
  client, links, votes = rating_cases.make_client(study)
  rater = links.rater(1)
  seen = read(client, rater)
  assert "tie" not in seen.buttons
  refused = client.post(f"/r/{rater}/vote", data={**seen.forms["vote"], "answer": "tie"})
  assert refused.status_code == 400 and votes.answered() == []


def test_groups(tmp_path):
  study = rating_cases.make_study(tmp_path, images_per_prompt=6, ask="variety")
  client, links, _ = rating_cases.make_client(study)
  seen = read(client, links.rater(1))
  assert len(seen.pictures) == 12
  levels = [level(client, address) for address in seen.pictures]
  assert len(set(levels[:6])) == len(set(levels[6:])) == 1 and levels[0] != levels[6]
  # Six different ones of the same prompt.
  assert len({client.get(address).content for address in seen.pictures[:6]}) == 6
  assert "Which group is more varied?" in client.get(f"/r/{links.rater(1)}/rate").text
  assert client.get(seen.pictures[0][:-1] + "6").status_code == 404


def test_a_stranger_sees_nothing(page):
  client, links, votes = page
  rater, organizer = links.rater(1), links.organizer()
  picture = read(client, rater).pictures[0]
  client.post(f"/r/{rater}/vote", data={"question": "1", "answer": "left"})
  addresses = ["/r/TOKEN", "/r/TOKEN/rate", "/r/TOKEN/page.css", "/r/TOKEN/page.js"]
  addresses += [picture.replace(rater, "TOKEN"), "/o/TOKEN", "/o/TOKEN/votes.csv"]
  addresses += ["/o/TOKEN/results.json", "/o/TOKEN/page.css", "/TOKEN", "/"]
  wrong = [
    "",
    "1",
    "1-",
    rater[:-1],
    rater + "0",
    "1" + rater,
    f"2-{rater[2:]}",
    "%00",
    "١-" + rater,
  ]
  wrong += [
    f"1-{'0' * 32}",
    "' OR 1=1 --",
    "..",
    "%2e%2e%2fkey",
    "\udcff".encode("utf-8", "replace"),
  ]
  for token in [*wrong, "x" * 5000]:
    for address in addresses:
      answer = client.get(address.replace("TOKEN", str(token)))
      assert (answer.status_code, answer.text) == (404, "Not found"), (token, address)
  for path in ("vote", "undo"):
    data = {"question": "1", "answer": "right"}
    assert client.post(f"/r/{wrong[4]}/{path}", data=data).status_code == 404
  # A rater is no organizer, nor the other way round.
  assert client.get(f"/o/{rater}").status_code == client.get(f"/r/{organizer}").status_code == 404
  assert [vote.answer for vote in votes.answered()] == ["left"]


def test_one_rater_does_nothing_with_anothers(page):
  client, links, votes = page
  one, other = links.rater(1), links.rater(2)
  seen = read(client, one)
  for path, data in (("vote", {"answer": "left"}), ("undo", {})):
    sent = client.post(f"/r/{other}/{path}", data={**seen.forms["vote"], **data})
    assert sent.status_code == 404
  assert client.get(seen.pictures[0].replace(one, other)).status_code == 404
  assert votes.answered() == []


@pytest.mark.parametrize(
  "form",
  [
    {"question": "1; DROP TABLE questions", "answer": "left"},
    {"question": "1' OR '1'='1", "answer": "left"},
    {"question": "-1", "answer": "left"},
    {"question": "9" * 30, "answer": "left"},
    {"question": "١", "answer": "left"},
    {"answer": "left"},
    {"question": "1", "answer": "left' OR 1=1"},
    {"question": "1"},
    {},
    {"question": "1", "answer": "left", "padding": "x" * 5000},
  ],
)
def test_hostile_forms(page, form):
  client, links, votes = page
  read(client, links.rater(1))
  answer = client.post(f"/r/{links.rater(1)}/vote", data=form)
  assert answer.status_code in (400, 404, 413)
  assert votes.answered() == []


def test_a_body_that_is_no_form(page):
  client, links, votes = page
  read(client, links.rater(1))
  for body in (b"\xff\xfe", b"question", b"%", b"question=1&answer=left&x"):
    assert client.post(f"/r/{links.rater(1)}/vote", content=body).status_code in (400, 404)
  assert votes.answered() == []


@pytest.mark.parametrize(
  "path",
  [
    "picture/1/left/../../../key",
    "picture/1/left/..%2f..%2fkey",
    "picture/1/..%2f..%2fstudy.json/0",
    "picture/1/left/1",
    "picture/1/middle/0",
    "picture/1/left/-1",
    f"picture/{2**63}/left/0",
    f"picture/{'9' * 5000}/left/0",
    f"picture/1/left/{'9' * 5000}",
    "..%2f..%2fkey",
    "layout.html",
    "%2e%2e/app.py",
    "page.css%00",
  ],
)
def test_no_other_file_is_read(page, path):
  client, links, _ = page
  read(client, links.rater(1))
  assert client.get(f"/r/{links.rater(1)}/{path}").status_code == 404


def test_text_in_prompts_stays_text(tmp_path):
  study = rating_cases.make_study(tmp_path, prompts=[HOSTILE])
  client, links, _ = rating_cases.make_client(study)
  text = client.get(f"/r/{links.rater(1)}/rate").text
  assert "<script>alert" not in text and "&lt;script&gt;alert" in text
  assert "{{ 7 * 7 }}" in text
  # The only script is the page's own.
  assert re.findall(r"<script[^>]*>", text) == [f'<script src="/r/{links.rater(1)}/page.js" defer>']


def test_what_browsers_are_told(page):
  client, links, _ = page
  for address in (f"/r/{links.rater(1)}/rate", "/", f"/o/{links.organizer()}"):
    headers = client.get(address).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and "form-action 'self'" in policy
    assert headers["referrer-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "set-cookie" not in headers
  text = client.get(f"/r/{links.rater(1)}/rate").text
  assert not re.search(r"https?:|style=|onclick", text)  # Nothing from elsewhere, nothing inline.


def test_another_slash_says_nothing_to_a_stranger(page):
  client, links, _ = page
  for address in ("/r/x/", "/o/x/", f"/r/{links.rater(1)}/"):
    assert client.get(address).status_code == 404


def test_whoever_leaves_in_the_middle_of_a_vote_leaves_no_trace(page):
  client, links, votes = page
  path = f"/r/{links.rater(1)}/vote"
  host = (b"host", b"127.0.0.1")
  scope = {"type": "http", "method": "POST", "path": path, "headers": [host], "query_string": b""}
  sent = []

  async def receive():
    return {"type": "http.disconnect"}

  async def send(message):
    sent.append(message)

  asyncio.run(client.app(scope, receive, send))
  assert sent[0]["status"] == 400 and votes.answered() == []


def test_other_sites_and_other_names_are_refused(page):
  client, links, votes = page
  rater = links.rater(1)
  form = {**read(client, rater).forms["vote"], "answer": "left"}
  for origin in ("http://evil.example", "null", "http://127.0.0.1:81", "http://["):
    sent = client.post(f"/r/{rater}/vote", data=form, headers={"origin": origin})
    assert sent.status_code == 404
  assert client.get(f"/r/{rater}", headers={"host": "evil.example"}).status_code == 400
  assert votes.answered() == []
  sent = client.post(f"/r/{rater}/vote", data=form, headers={"origin": "http://127.0.0.1"})
  assert sent.status_code == 303


def test_a_web_server_before_the_page_may_call_it_by_another_name(study):
  client, links, votes = rating_cases.make_client(study, address="https://rate.example:8443/x")
  with client:
    rater = links.rater(1)
    form = {**read(client, rater).forms["vote"], "answer": "left"}
    for origin, status in (("https://rate.example", 404), ("https://rate.example:8443", 303)):
      sent = client.post(f"/r/{rater}/vote", data=form, headers={"origin": origin})
      assert sent.status_code == status
  assert len(votes.answered()) == 1
  votes.close()


def test_a_full_disk_is_said_and_nothing_is_lost(page, monkeypatch):
  client, links, votes = page
  rater = links.rater(1)
  form = {**read(client, rater).forms["vote"], "answer": "left"}

  def full(*_):
    raise sqlite3.OperationalError("database or disk is full")

  with monkeypatch.context() as patch:
    patch.setattr(votes, "answer", full)
    assert client.post(f"/r/{rater}/vote", data=form).status_code == 503
  assert client.post(f"/r/{rater}/vote", data=form).status_code == 303
  assert len(votes.answered()) == 1


def test_the_organizer_sees_results(page):
  client, links, _ = page
  form = {**read(client, links.rater(1)).forms["vote"], "answer": "tie"}
  client.post(f"/r/{links.rater(1)}/vote", data=form)
  organizer = f"/o/{links.organizer()}"
  assert "tuned is preferred to base in 50.0 % of 1 votes" in client.get(organizer).text
  assert client.get(f"{organizer}/results.json").json()["rates"][0]["ties"] == 1
  assert client.get(f"{organizer}/votes.csv").text.count("\n") == 2


def test_links_are_the_same_again_and_secret(study):
  from rlft.rating.links import Links

  one, again = Links(study.directory), Links(study.directory)
  assert one.rater(3) == again.rater(3) != one.rater(4)
  assert one.find_rater(one.rater(3)) == 3
  assert (study.directory / "key").stat().st_mode & 0o077 == 0
