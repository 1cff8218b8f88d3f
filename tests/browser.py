"""A headless Chromium for tests, driven over its debugging pipe: no package, no port."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess


def program():
  """Path of a Chromium, or None."""
  return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
              None)


class Page:
  """A page of a browser; `errors` collects errors in its console and exceptions."""

  def __init__(self, pipes, width, height, scale):
    self._read, self._write = pipes
    self._numbers, self._session, self.errors, self._loaded = itertools.count(1), None, [], False
    target = self._call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
      self._call(f"{domain}.enable")
    self._call("Emulation.setDeviceMetricsOverride", width=width, height=height,
               deviceScaleFactor=scale, mobile=width < 500)

  def open(self, url):
    """Opens a page and waits until it has loaded."""
    self._loaded = False
    self._call("Page.navigate", url=url)
    while not self._loaded:
      self._take()

  def run(self, script):
    """The value of a JavaScript expression."""
    answer = self._call("Runtime.evaluate", expression=script, returnByValue=True,
                        awaitPromise=True)
    if "exceptionDetails" in answer:
      raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
    return answer["result"].get("value")

  def press(self, key):
    """Presses a key, such as ArrowRight or Tab."""
    for kind in ("keyDown", "keyUp"):
      self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

  def screenshot(self, selector):
    """PNG bytes of the first element that matches a CSS selector."""
    place = self.run(f"""(() => {{
      const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
      return {{x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height}};
    }})()""")
    shot = self._call("Page.captureScreenshot", captureBeyondViewport=True,
                      clip={**place, "scale": 1})
    return base64.b64decode(shot["data"])

  def _call(self, method, **params):
    number = next(self._numbers)
    message = {"id": number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    self._write.write(json.dumps(message).encode() + b"\0")
    self._write.flush()
    while True:
      answer = self._take()
      if answer.get("id") == number:
        if "error" in answer:
          raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

  def _take(self):
    text = bytearray()
    while (byte := self._read.read(1)) != b"\0":
      if not byte:
        raise RuntimeError("the browser has gone")
      text += byte
    answer = json.loads(text)
    method, params = answer.get("method"), answer.get("params", {})
    self._loaded |= method == "Page.loadEventFired"
    if method == "Runtime.exceptionThrown":
      self.errors.append(params["exceptionDetails"]["text"])
    elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
      self.errors.append(str(params["args"]))
    elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
      self.errors.append(params["entry"]["text"])
    return answer


@contextlib.contextmanager
def browse(profile, *, width=1200, height=900, scale=1):
  """A Page of a new browser; `profile` is a folder, `scale` the pixels of a CSS pixel."""
  (to_read, to_us), (from_us, to_write) = os.pipe(), os.pipe()
  command = [program(), "--headless=new", "--remote-debugging-pipe", "--no-sandbox",
             "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
             "--disable-background-networking", f"--user-data-dir={profile}"]
  # The pipe's ends are 3 and 4 in the browser.
  process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", *command],
                             pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
  os.close(from_us)
  os.close(to_us)
  with open(to_read, "rb") as reader, open(to_write, "wb") as writer:
    try:
      yield Page((reader, writer), width, height, scale)
    finally:
      process.kill()
      process.wait()
