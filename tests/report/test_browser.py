"""The report in headless Chromium, at a phone's width: the slider, the large pictures, the keys.

Needs chromium and chromedriver, of Debian's chromium-driver say; skipped without.
"""

import json
import shutil

import numpy as np
import pytest

from rlft.report import page, samples
from rlft.types import Prompt

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium-driver")

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


@pytest.fixture
def chromium():
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
  metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
  driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
  yield driver
  driver.quit()


def test_pictures_by_slider_keys_and_buttons(chromium, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"iterations": 8, "seed": HOSTILE}))
  for iteration in (0, 4, 8):
    images = np.full((2, 8, 8, 3), 20 * iteration, np.uint8)
    prompts = [Prompt(HOSTILE), Prompt("a dog")]
    samples.Keeper(tmp_path, iteration).save("liked", images, prompts)
  chromium.get(page.write_report(tmp_path).as_uri())
  assert chromium.title == f"rlft: {tmp_path.name}"

  def visible():
    shots = chromium.find_elements(By.CSS_SELECTOR, ".now .shot:not([hidden])")
    return [shot.get_attribute("data-iteration") for shot in shots]

  def press(*keys):
    chromium.switch_to.active_element.send_keys(*keys)

  def text():
    return chromium.find_element(By.ID, "viewer-text").text

  assert visible() == ["8", "8"]
  chromium.find_element(By.ID, "time").send_keys(Keys.ARROW_LEFT)
  assert visible() == ["4", "4"]
  assert chromium.find_element(By.ID, "time-text").text == "after 4 iterations"
  # By keys alone.
  first = chromium.find_element(By.CSS_SELECTOR, ".shot")
  chromium.execute_script("arguments[0].focus()", first)
  press(Keys.ENTER)
  assert text() == f"{HOSTILE}, at the start"
  press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
  assert text() == "a dog, after 4 iterations"
  # By touch.
  chromium.find_element(By.CSS_SELECTOR, "[data-step='1']").click()
  assert text() == "a dog, after 8 iterations"
  press(Keys.ESCAPE)
  assert not chromium.execute_script("return document.getElementById('viewer').open")
  wide, screen = chromium.execute_script(
    "return [document.documentElement.scrollWidth, window.innerWidth]"
  )
  assert wide <= screen and not chromium.get_log("browser")
