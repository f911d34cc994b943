"""What may go wrong on a server, and how a run asks one for scores.

A fault is a function of the handler of a request and of the answer that it would send, which it
may change; it returns True if it has answered itself.
"""

import contextlib
import json
import socket
import time

import numpy as np

from rlft.rewards.scoring import host


def scored(reward, images, prompts, timeout_s=30.0):
  """Scores, in threads, as a run does."""
  caller = host.HostCaller(reward, timeout_s=timeout_s, threads=reward.threads)
  try:
    return caller.finish(caller.start(np.array(images), prompts)).values
  finally:
    caller.close()


def fine(handler, answer):
  return None


def status(code, message="no luck", **headers):
  def act(handler, answer):
    data = json.dumps({"error": message}).encode()
    handler.answer(code, data, {key.replace("_", "-"): text for key, text in headers.items()})
    return True

  return act


def truncated(handler, answer):
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  handler.wfile.write(b'{"id":')
  handler.close_connection = True
  return True


def dropped(handler, answer):
  handler.connection.shutdown(socket.SHUT_RDWR)
  handler.close_connection = True
  return True


def hanging(handler, answer):
  time.sleep(3)
  return True


def dribbling(handler, answer):
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  return _dribble(handler)


def dribbling_and_closing(handler, answer):
  """The client lets go of such a connection when it has the headers."""
  handler.send_response(200)
  handler.send_header("Connection", "close")
  handler.end_headers()
  return _dribble(handler)


def dribbling_headers(handler, answer):
  handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Name: ")
  return _dribble(handler)


def _dribble(handler):
  """Never long without a byte, and never done."""
  with contextlib.suppress(OSError):
    for _ in range(400):
      handler.wfile.write(b" ")
      time.sleep(0.05)
  return True
