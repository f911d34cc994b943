"""The page in headless Chromium: by mouse, by touch at 390 pixels, by keys alone.

Needs chromium and chromedriver, of Debian's chromium-driver say; skipped without.
"""

import shutil
import threading
import time

import pytest
import rating_cases

webdriver = pytest.importorskip("selenium.webdriver")
uvicorn = pytest.importorskip("uvicorn")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium-driver")

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
WAIT_S = 60


@pytest.fixture(scope="module")
def chromium():
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
    options.add_argument(argument)
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
  yield driver
  driver.quit()


class Server:
  """The page on a port of its own, in a thread; to be stopped and started again."""

  def __init__(self, study):
    self.study = study
    client, self.links, self.votes = rating_cases.make_client(study)
    self._app, self.port = client.app, 0
    self.start()

  def start(self):
    config = uvicorn.Config(self._app, port=self.port, log_level="error")
    self._server = uvicorn.Server(config)
    self._thread = threading.Thread(target=self._server.run)
    self._thread.start()
    until(lambda: self._server.started)
    self.port = self._server.servers[0].sockets[0].getsockname()[1]

  def stop(self):
    self._server.should_exit = True
    self._thread.join()

  def rater(self, number):
    return f"http://127.0.0.1:{self.port}/r/{self.links.rater(number)}"


@pytest.fixture
def server(tmp_path):
  server = Server(rating_cases.make_study(tmp_path, checks=0.0, prompts=[HOSTILE, "b", "c", "d"]))
  yield server
  server.stop()
  server.votes.close()


def until(done):
  end = time.monotonic() + WAIT_S
  while not done():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.05)


def show(driver, width, height, *, touch):
  driver.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride",
    {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch},
  )
  driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})


def is_ready(driver):
  return driver.execute_script("return document.body.dataset.ready") == "yes"


def count(driver):
  return driver.find_element(By.ID, "count").text


def answered(server, driver, number):
  """Waits until so many answers are stored and the page is ready for the next."""
  until(lambda: len(server.votes.answered()) == number)
  until(lambda: is_ready(driver) and count(driver) == f"{number} of 4")
  return server.votes.answered()


def side(driver, value):
  return driver.find_element(By.CSS_SELECTOR, f'[value="{value}"]')


def test_by_mouse_on_a_desktop(chromium, server):
  show(chromium, 1280, 800, touch=False)
  chromium.get(server.rater(1))
  chromium.find_element(By.ID, "begin").click()  # The driver's mouse, at the place of the link.
  until(lambda: is_ready(chromium))
  # Text of prompts is text.
  assert chromium.title == "Which picture is better?"
  # The whole question fits on the screen.
  assert side(chromium, "tie").rect["y"] + side(chromium, "tie").rect["height"] <= 800
  given = []
  for number, value in enumerate(("right", "left", "tie", "right"), start=1):
    # A second click at once, as of a nervous finger, must not answer the next pair.
    chromium.execute_script("arguments[0].click(); arguments[0].click()", side(chromium, value))
    given = [vote.answer for vote in answered(server, chromium, number)]
  assert given == ["right", "left", "tie", "right"]
  assert "4 answers are stored" in chromium.find_element(By.ID, "done").text


def test_by_touch_at_the_width_of_a_phone(chromium, server):
  show(chromium, 390, 844, touch=True)
  chromium.get(server.rater(1))
  begin = chromium.find_element(By.ID, "begin")
  assert begin.rect["y"] + begin.rect["height"] <= 844 and fits(chromium)
  tap(chromium, begin)
  until(lambda: "/rate" in chromium.current_url and is_ready(chromium))
  assert fits(chromium)
  top, bottom, tie = (side(chromium, value).rect for value in ("left", "right", "tie"))
  assert top["y"] + top["height"] <= bottom["y"] and bottom["y"] + bottom["height"] <= tie["y"]
  assert tie["y"] + tie["height"] <= 844 and min(tie["height"], top["height"]) >= 44
  assert side(chromium, "left").text == "Top" and side(chromium, "right").text == "Bottom"
  # More than twice what they would have beside one another.
  pictures = chromium.find_elements(By.CSS_SELECTOR, "main img")
  assert all(picture.rect["height"] > 250 for picture in pictures)
  for number in (1, 2):
    tap(chromium, side(chromium, "left"))
    answered(server, chromium, number)
  tap(chromium, chromium.find_element(By.CSS_SELECTOR, '[data-key="u"]'))
  answered(server, chromium, 1)
  for number, value in enumerate(("right", "tie", "right"), start=2):
    tap(chromium, side(chromium, value))
    given = answered(server, chromium, number)
  assert [vote.answer for vote in given] == ["left", "right", "tie", "right"]
  assert "Thank you" in chromium.page_source and fits(chromium)
  chromium.get(f"http://127.0.0.1:{server.port}/o/{server.links.organizer()}")
  assert "4 of 20 votes" in chromium.page_source and fits(chromium)


def fits(driver):
  """Whether nothing is wider than the screen of a phone."""
  return driver.execute_script("return document.documentElement.scrollWidth") == 390


def tap(driver, element):
  box = driver.execute_script(
    "arguments[0].scrollIntoView({block: 'center'});"
    "const r = arguments[0].getBoundingClientRect();"
    "return [r.x + r.width / 2, r.y + r.height / 2]",
    element,
  )
  point = {"x": box[0], "y": box[1]}
  driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
  driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_by_keys_alone(chromium, server):
  show(chromium, 1280, 800, touch=False)
  chromium.get(server.rater(1))
  press(chromium, Keys.TAB, Keys.ENTER)
  until(lambda: is_ready(chromium) and "/rate" in chromium.current_url)
  press(chromium, Keys.ARROW_RIGHT)
  answered(server, chromium, 1)
  press(chromium, Keys.ARROW_DOWN)
  answered(server, chromium, 2)
  press(chromium, "u")
  answered(server, chromium, 1)
  press(chromium, Keys.ARROW_LEFT)
  assert [vote.answer for vote in answered(server, chromium, 2)] == ["right", "left"]
  # And without the page's own keys: from button to button, the ring is seen.
  for _ in range(20):
    press(chromium, Keys.TAB)
    if chromium.switch_to.active_element.get_attribute("value") == "right":
      break
  outline = chromium.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
  assert outline == "solid"
  press(chromium, Keys.ENTER)
  assert answered(server, chromium, 3)[-1].answer == "right"


def press(driver, *keys):
  for key in keys:
    webdriver.ActionChains(driver).send_keys(key).perform()


def test_an_answer_waits_for_the_server(chromium, server):
  show(chromium, 1280, 800, touch=False)
  chromium.get(server.rater(1) + "/rate")
  until(lambda: is_ready(chromium))
  server.stop()
  press(chromium, Keys.ARROW_RIGHT)
  until(lambda: chromium.find_element(By.ID, "offline").is_displayed())
  assert server.votes.answered() == []
  server.start()
  assert answered(server, chromium, 1)[0].answer == "right"
  assert not chromium.find_element(By.ID, "offline").is_displayed()


def test_nobody_judges_a_picture_that_is_not_there(chromium, server):
  show(chromium, 1280, 800, touch=False)
  chromium.execute_cdp_cmd("Network.enable", {})
  try:
    chromium.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/picture/*"]})
    chromium.get(server.rater(1) + "/rate")
    until(lambda: chromium.find_element(By.ID, "offline").is_displayed())
    press(chromium, Keys.ARROW_RIGHT)
    assert not is_ready(chromium)
  finally:
    chromium.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
  until(lambda: is_ready(chromium))
  assert not chromium.find_element(By.ID, "offline").is_displayed()
  assert server.votes.answered() == []
  press(chromium, Keys.ARROW_RIGHT)
  answered(server, chromium, 1)


def test_neither_page_nor_addresses_say_who_drew_what(chromium, server):
  show(chromium, 1280, 800, touch=False)
  chromium.get(server.rater(1) + "/rate")
  until(lambda: is_ready(chromium))
  loaded = chromium.execute_script(
    "return performance.getEntriesByType('resource').map(e => e.name)"
  )
  assert len([address for address in loaded if "/picture/" in address]) == 2
  said = chromium.page_source + " ".join(loaded)
  for contender in server.study.contenders:
    assert contender.name not in said and contender.source not in said


def test_a_stranger_sees_nothing(chromium, server):
  chromium.get(server.rater(1) + "/rate")
  until(lambda: is_ready(chromium))
  picture = chromium.find_element(By.CSS_SELECTOR, "main img").get_attribute("src")
  token, other = server.links.rater(1), server.links.rater(2)
  mine = picture.rpartition(token)[0]
  for wrong in ("", token[:-1], f"1-{other.partition('-')[2]}", other):
    chromium.get(picture.replace(token, wrong))
    assert chromium.find_element(By.TAG_NAME, "body").text == "Not found"
    assert chromium.find_elements(By.TAG_NAME, "img") == []
  for page in (f"{mine}{token[:-1]}/rate", mine, f"http://127.0.0.1:{server.port}/o/{token}"):
    chromium.get(page)
    assert chromium.find_element(By.TAG_NAME, "body").text == "Not found"


def test_without_the_script(chromium, server):
  show(chromium, 1280, 800, touch=False)
  chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
  try:
    chromium.get(server.rater(1) + "/rate")
    side(chromium, "left").click()
    until(lambda: len(server.votes.answered()) == 1)
    assert count(chromium) == "1 of 4"
  finally:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
