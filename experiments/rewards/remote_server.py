"""A small inference server for a reward: the Open Inference Protocol v2 over HTTP.

    python experiments/rewards/remote_server.py --model=experiments/rewards/host_function.py:warmth

serves a function `(images, prompts, metadata) -> scores`, the same as host:FILE.py:FUNCTION would,
and prints its address, for experiments/rewards/remote_server.flags, or for --task with
reward=http://127.0.0.1:8080/v2/models/warmth. Needs nothing but numpy, and nothing of rlft.

For more than a trial use a server that batches and schedules; the address in --task stays the same.

MLServer: a class with the two methods below in `model.py`, beside a `model-settings.json` of
{"name": "warmth", "implementation": "model.Warmth"}, and `mlserver start .`:

    from host_function import warmth
    from mlserver import MLModel
    from mlserver.codecs import NumpyCodec, StringCodec
    from mlserver.types import InferenceResponse

    class Warmth(MLModel):
      async def load(self):
        return True

      async def predict(self, payload):
        inputs = {tensor.name: tensor for tensor in payload.inputs}
        images = NumpyCodec.decode_input(inputs["images"])
        prompts = StringCodec.decode_input(inputs["prompts"])
        scores = warmth(images, prompts, [{}] * len(prompts))
        outputs = [NumpyCodec.encode_output("score", scores)]
        return InferenceResponse(model_name=self.name, outputs=outputs)

Triton: a model of the Python backend with, in its `config.pbtxt`,

    max_batch_size: 0
    input [ {name: "images" data_type: TYPE_FP32 dims: [-1, -1, -1, 3]},
            {name: "prompts" data_type: TYPE_STRING dims: [-1]} ]
    output [ {name: "score" data_type: TYPE_FP32 dims: [-1]} ]
"""

import argparse
from collections.abc import Callable, Mapping
from http import server
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

LENGTH = "Inference-Header-Content-Length"  # Of the JSON in front of binary data.
INPUTS = [
  {"name": "images", "datatype": "FP32", "shape": [-1, -1, -1, 3]},
  {"name": "prompts", "datatype": "BYTES", "shape": [-1]},
  {"name": "metadata", "datatype": "BYTES", "shape": [-1]},
]
OUTPUTS = [{"name": "score", "datatype": "FP32", "shape": [-1]}]


def load(model: str) -> Callable[..., Any]:
  """The function that 'file.py:function' names."""
  path, _, name = model.rpartition(":")
  found = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return getattr(module, name)


def infer(score: Callable[..., Any], body: bytes, length: str | None) -> tuple[bytes, int | None]:
  """Answers one inference request.

  Args:
    score: `(images [B, H, W, 3], prompts, metadata) -> [B]`.
    body: JSON, with the extension for binary data followed by the tensors' bytes.
    length: of the JSON, where that extension is used.

  Returns:
    The answer, and the length of its JSON where binary data was asked for.

  Raises:
    ValueError: it is no such request.
  """
  split = len(body) if length is None else int(length)
  request, rest = json.loads(body[:split]), body[split:]
  inputs = {}
  for tensor in request["inputs"]:
    size = tensor.get("parameters", {}).get("binary_data_size")
    part, rest = (None, rest) if size is None else (rest[:size], rest[size:])
    inputs[tensor["name"]] = read(tensor, part)
  metadata = [json.loads(text) for text in inputs["metadata"]]
  scores = np.asarray(score(inputs["images"], inputs["prompts"], metadata), "<f4")

  output = {"name": "score", "datatype": "FP32", "shape": list(scores.shape)}
  answer = {"model_name": "model", "id": request.get("id"), "outputs": [output]}
  wanted = [tensor.get("parameters", {}) for tensor in request.get("outputs", [])]
  if not any(parameters.get("binary_data") for parameters in wanted):
    # JSON has no NaN.
    output["data"] = [float(s) if np.isfinite(s) else None for s in scores.ravel()]
    return json.dumps(answer).encode(), None
  output["parameters"] = {"binary_data_size": scores.nbytes}
  text = json.dumps(answer).encode()
  return text + scores.tobytes(), len(text)


def read(tensor: Mapping[str, Any], part: bytes | None) -> Any:
  """An input: an array of its shape, or a list of strings."""
  if tensor["datatype"] == "FP32":
    values = tensor["data"] if part is None else np.frombuffer(part, "<f4")
    return np.array(values, np.float32).reshape(tensor["shape"])
  if part is None:
    return tensor["data"]
  texts = []
  while part:
    size = int.from_bytes(part[:4], "little")
    texts.append(part[4 : 4 + size].decode())
    part = part[4 + size :]
  return texts


class Handler(server.BaseHTTPRequestHandler):
  """Requests about one model; `name` and `score` are set by `serve`."""

  protocol_version = "HTTP/1.1"  # Connections stay open.
  disable_nagle_algorithm = True
  name: str
  score: Callable[..., Any]

  def do_GET(self):
    model = f"/v2/models/{self.name}"
    answers = {
      "/v2": {"name": "rlft-example", "version": "1", "extensions": ["binary_tensor_data"]},
      "/v2/health/live": {},
      "/v2/health/ready": {},
      f"{model}/ready": {},
      model: {"name": self.name, "platform": "python", "inputs": INPUTS, "outputs": OUTPUTS},
    }
    if self.path in answers:
      self.answer(200, json.dumps(answers[self.path]).encode())
    else:
      self.fail(404, f"there is no {self.path} here, only the model {self.name}")

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    if self.path != f"/v2/models/{self.name}/infer":
      return self.fail(404, f"there is no {self.path} here, only the model {self.name}")
    try:
      data, length = infer(type(self).score, body, self.headers.get(LENGTH))
    except (ValueError, KeyError, TypeError) as error:
      return self.fail(400, f"{type(error).__name__}: {error}")
    except Exception as error:
      return self.fail(500, f"{type(error).__name__}: {error}")
    self.answer(200, data, {} if length is None else {LENGTH: str(length)})

  def fail(self, status: int, message: str) -> None:
    self.answer(status, json.dumps({"error": message}).encode())

  def answer(self, status: int, data: bytes, headers: Mapping[str, str] = {}) -> None:
    self.send_response(status)
    binary = LENGTH in headers
    self.send_header("Content-Type", f"application/{'octet-stream' if binary else 'json'}")
    self.send_header("Content-Length", str(len(data)))
    for key, value in headers.items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args: Any) -> None:
    """No line for each request."""


def main() -> None:
  parser = argparse.ArgumentParser(description="Serves a reward by the Open Inference Protocol v2.")
  parser.add_argument("--model", required=True, help="file.py:function")
  parser.add_argument("--name", help="of the model in the address; default: the function's")
  parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines as well")
  parser.add_argument("--port", type=int, default=8080, help="0 for any that is free")
  args = parser.parse_args()
  name = args.name or args.model.rpartition(":")[2]
  # Loaded before the port opens: whoever can connect gets an answer.
  handler = type("Handler", (Handler,), {"name": name, "score": staticmethod(load(args.model))})
  with server.ThreadingHTTPServer((args.host, args.port), handler) as running:
    print(f"serving http://{args.host}:{running.server_port}/v2/models/{name}", flush=True)
    try:
      running.serve_forever()
    except KeyboardInterrupt:
      print("stopped")


if __name__ == "__main__":
  main()
