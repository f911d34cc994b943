"""A Google Cloud Storage of the tests: its JSON API on loopback, with everything in memory.

What gcsfs, google-cloud-storage and TensorStore's driver ask for, by the rules of the service:
objects appear and are replaced as a whole, each time with a new generation, and there are no
directories. Nothing is authenticated.
"""

import base64
from collections.abc import Mapping
import dataclasses
import hashlib
from http import server
import itertools
import json
import re
import sys
import threading
from typing import Any
from urllib import parse

_MIN_CHUNK = 256 * 1024  # parts of a resumable upload are multiples of it, but for the last
_TIME = "2026-01-01T00:00:00.000Z"


@dataclasses.dataclass(frozen=True)
class Object:
  """An object as it was written at one time."""

  data: bytes
  generation: int
  content_type: str


class Error(Exception):
  """What is answered in the place of what was asked for."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Server:
  """A server, while the context lasts.

  Attributes:
    buckets: the objects of each bucket, by name; tests may read them and write to them.
    asked: all requests so far, as (method, path).
  """

  def __init__(self, *buckets: str, page: int = 1000):
    """Takes a port.

    Args:
      *buckets: their names.
      page: the most entries of one answer to a listing.
    """
    self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
    self.asked: list[tuple[str, str]] = []
    self.page = page
    self.lock = threading.Lock()
    self._generations = itertools.count(1)
    self._numbers = itertools.count(1)
    self._uploads: dict[str, dict[str, Any]] = {}
    self._held: re.Pattern | None = None
    self._refused: tuple[re.Pattern, int] | None = None
    self._reached, self._free = threading.Event(), threading.Event()
    self._http = _Http(("127.0.0.1", 0), _handler(self))
    self.url = f"http://127.0.0.1:{self._http.server_port}"

  def __enter__(self) -> "Server":
    # Asked every 10 ms whether it shall end; half a second is the default.
    self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self.go_on()
    self._http.shutdown()
    self._thread.join()
    self._http.server_close()

  def environment(self) -> dict[str, str]:
    """The variables by which the clients come here, and look for no credentials elsewhere."""
    return {
      "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, google-cloud-storage
      "FSSPEC_GCS_TOKEN": "anon",
      # Whether a bucket has real directories is asked by gRPC, which is not spoken here.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore
      "NO_GCE_CHECK": "true",  # google-auth
    }

  def hold(self, pattern: str) -> None:
    """Leaves uploads to objects whose names match without an answer, and unwritten."""
    self._reached.clear()
    self._free.clear()
    self._held = re.compile(pattern)

  def wait_for_held(self, timeout_s: float) -> bool:
    """Whether somebody comes to wait for an upload that is held."""
    return self._reached.wait(timeout_s)

  def go_on(self) -> None:
    """Ends `hold`: what waits is answered, with an error."""
    self._held = None
    self._free.set()

  def refuse(self, pattern: str = "", status: int = 403) -> None:
    """Answers all that is asked with a status from now on where a pattern is in 'METHOD path'.

    Args:
      pattern: of the decoded path and query; '' ends it.
      status: 500 and above, 408 and 429 are tried again by the clients, for minutes.
    """
    self._refused = (re.compile(pattern), status) if pattern else None

  def stop_if_refused(self, asked: str) -> None:
    """Raises Error where `refuse` says so."""
    if self._refused and self._refused[0].search(parse.unquote(asked)):
      raise Error(self._refused[1], "refused")

  def put(self, bucket: str, name: str, data: bytes, content_type: str = "text/plain") -> Object:
    """Writes an object."""
    made = Object(bytes(data), next(self._generations), content_type)
    self.buckets[bucket][name] = made
    return made

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    """The names of the objects that begin with a prefix, in order."""
    with self.lock:
      return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

  # What is asked, by parts of its path, with the lock held.

  def bucket(self, bucket: str) -> dict[str, Any]:
    """The description of a bucket."""
    self._objects(bucket)
    return {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"}

  def listing(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the objects of a bucket, and of what stands for directories."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    first, end = query.get("startOffset", ""), query.get("endOffset")
    entries: dict[str, Object | None] = {}  # None for a prefix
    for name, found in sorted(self._objects(bucket).items()):
      if not name.startswith(prefix) or name < first or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        entries[prefix + rest[: rest.index(delimiter) + len(delimiter)]] = None
      else:
        entries[name] = found
    after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
    waiting = [(name, found) for name, found in entries.items() if name > after]
    page = waiting[: min(self.page, int(query.get("maxResults", self.page)))]
    answer: dict[str, Any] = {"kind": "storage#objects"}
    if items := [_resource(bucket, name, found) for name, found in page if found]:
      answer["items"] = items
    if prefixes := [name for name, found in page if not found]:
      answer["prefixes"] = prefixes
    if len(waiting) > len(page):
      answer["nextPageToken"] = base64.urlsafe_b64encode(page[-1][0].encode()).decode()
    return answer

  def read(self, bucket: str, name: str, query: Mapping[str, str]) -> Object:
    """An object, under the conditions of a query."""
    found = self._objects(bucket).get(name)
    if found is None or query.get("generation", str(found.generation)) != str(found.generation):
      raise Error(404, f"No such object: {bucket}/{name}")
    self._check(found, query)
    return found

  def write(
    self, bucket: str, name: str, query: Mapping[str, str], data: bytes, content_type: str
  ) -> dict[str, Any]:
    """Writes an object under the conditions of a query, and describes it."""
    self._check(self._objects(bucket).get(name), query)
    return _resource(bucket, name, self.put(bucket, name, data, content_type))

  def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
    """Deletes an object under the conditions of a query."""
    self.read(bucket, name, query)
    del self._objects(bucket)[name]

  def begin(
    self, bucket: str, name: str, query: Mapping[str, str], content_type: str
  ) -> Mapping[str, str]:
    """Begins a resumable upload; the answer's headers say where its parts go."""
    self._check(self._objects(bucket).get(name), query)
    number = str(next(self._numbers))
    self._uploads[number] = {
      "to": (bucket, name, dict(query)),
      "type": content_type,
      "data": bytearray(),
    }
    where = parse.urlencode({"uploadType": "resumable", "name": name, "upload_id": number})
    return {"Location": f"{self.url}/upload/storage/v1/b/{parse.quote(bucket)}/o?{where}"}

  def receive(self, number: str, place: str, data: bytes) -> tuple[int, dict[str, Any]]:
    """Takes a part of a resumable upload: (bytes so far, what was written with the last part)."""
    upload = self._uploads.get(number)
    if upload is None:
      raise Error(404, "No such upload")
    matched = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", place or f"bytes */{len(data)}")
    if matched is None:
      raise Error(400, f"Not a range: {place}")
    start, last, total = matched.groups()
    held = upload["data"]
    if place and start is not None:
      if int(start) != len(held) or int(last) - int(start) + 1 != len(data):
        raise Error(400, f"{place} does not follow {len(held)} bytes")
      if total == "*" and len(data) % _MIN_CHUNK:
        raise Error(400, f"{len(data)} bytes are no multiple of {_MIN_CHUNK}")
    held += data
    if total == "*" or len(held) < int(total):
      return len(held), {}
    bucket, name, query = upload["to"]
    made = self.write(bucket, name, query, held, upload["type"])
    del self._uploads[number]
    return len(held), made

  def stop_if_held(self, name: str) -> None:
    """Waits where `hold` says so; called without the lock.

    Raises:
      Error: it did.
    """
    if self._held is not None and self._held.search(name):
      self._reached.set()
      self._free.wait()
      raise Error(503, "held")

  def _objects(self, bucket: str) -> dict[str, Object]:
    try:
      return self.buckets[bucket]
    except KeyError:
      raise Error(404, f"The specified bucket does not exist: {bucket}") from None

  def _check(self, found: Object | None, query: Mapping[str, str]) -> None:
    generation = str(found.generation if found else 0)  # 0 is that of what is not there.
    if query.get("ifGenerationMatch", generation) != generation:
      raise Error(412, "At least one of the pre-conditions you specified did not hold.")
    if query.get("ifGenerationNotMatch") == generation:
      raise Error(304, "")


class _Http(server.ThreadingHTTPServer):
  def handle_error(self, *_: Any) -> None:
    if not isinstance(sys.exception(), ConnectionError):  # Whoever asked was killed.
      super().handle_error(*_)


def _resource(bucket: str, name: str, found: Object) -> dict[str, Any]:
  return {
    "kind": "storage#object",
    "id": f"{bucket}/{name}/{found.generation}",
    "name": name,
    "bucket": bucket,
    "generation": str(found.generation),
    "metageneration": "1",
    "size": str(len(found.data)),
    "contentType": found.content_type,
    "md5Hash": _md5(found.data),
    "etag": f"etag{found.generation}",
    "timeCreated": _TIME,
    "updated": _TIME,
  }


def _md5(data: bytes) -> str:
  return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _parts(data: bytes, content_type: str) -> tuple[dict[str, Any], str, bytes]:
  """What multipart/related has: the description of an object, its type and its content."""
  border = b"--" + re.search(r"boundary=\"?([^\";]+)", content_type)[1].encode()
  start = data.index(border) + len(border)
  line = b"\r\n" if data[start : start + 2] == b"\r\n" else b"\n"
  middle = data.index(line + border + line, start)
  end = data.rindex(line + border + b"--")
  first, second = data[start:middle], data[middle + len(line + border) : end]
  description = json.loads(first.partition(line * 2)[2])
  head, _, content = second.partition(line * 2)
  found = re.search(rb"(?i)content-type: *([^\r\n]+)", head)
  return description, found[1].decode() if found else "", content


def _handler(store: Server) -> type[server.BaseHTTPRequestHandler]:
  class Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # Connections are kept.
    disable_nagle_algorithm = True

    def log_message(self, *_):
      pass

    def _serve(self):
      body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
      # Names of objects may have any letter: one is taken apart before it is decoded.
      url = parse.urlsplit(self.path)
      parts = [parse.unquote(part) for part in url.path.split("/")[1:]]
      query = dict(parse.parse_qsl(url.query, keep_blank_values=True))
      store.asked.append((self.command, self.path))
      try:
        store.stop_if_refused(f"{self.command} {self.path}")
        if parts[0] == "upload":
          self._upload(parts[4], query, body)
          return
        if parts[0] == "download":
          parts, query["alt"] = parts[1:], "media"
        match self.command, parts[2:]:
          case "GET", ["b", bucket]:
            with store.lock:
              answer = store.bucket(bucket)
            self._answer(200, answer)
          case "GET", ["b", bucket, "o"]:
            with store.lock:
              answer = store.listing(bucket, query)
            self._answer(200, answer)
          case "GET", ["b", bucket, "o", name]:
            with store.lock:
              found = store.read(bucket, name, query)
            if query.get("alt") == "media":
              self._media(found)
            else:
              self._answer(200, _resource(bucket, name, found))
          case "DELETE", ["b", bucket, "o", name]:
            with store.lock:
              store.delete(bucket, name, query)
            self._answer(204)
          case "POST", ["b", bucket, "o", name, "rewriteTo", "b", other, "o", target]:
            with store.lock:
              found = store.read(bucket, name, {})
              made = store.write(other, target, query, found.data, found.content_type)
            self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": made})
          case "POST", ["b", bucket, "o", name, "moveTo", "o", target]:
            with store.lock:
              found = store.read(bucket, name, {})
              made = store.write(bucket, target, query, found.data, found.content_type)
              store.delete(bucket, name, {})
            self._answer(200, made)
          case _:
            raise Error(501, f"The server of the tests knows no {self.command} {self.path}")
      except Error as error:
        self._fail(error)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _upload(self, bucket, query, body):
      if number := query.get("upload_id"):
        store.stop_if_held(query["name"])
        with store.lock:
          size, made = store.receive(number, self.headers.get("Content-Range", ""), body)
        if made:
          self._answer(200, made)
        else:
          self._answer(308, headers={"Range": f"bytes=0-{size - 1}"} if size else {})
        return
      kind, content_type = query["uploadType"], self.headers.get("Content-Type", "")
      description = {}
      if kind == "multipart":
        description, content_type, body = _parts(body, content_type)
      elif kind == "resumable" and body:
        description = json.loads(body)
        content_type = self.headers.get("X-Upload-Content-Type", "")
      name = query.get("name") or description["name"]
      store.stop_if_held(name)
      with store.lock:
        if kind == "resumable":
          answer, headers = {}, store.begin(bucket, name, query, content_type)
        else:
          answer, headers = store.write(bucket, name, query, body, content_type), {}
      self._answer(200, answer, headers)

    def _media(self, found):
      size = len(found.data)
      headers = {
        "x-goog-generation": str(found.generation),
        "x-goog-metageneration": "1",
        "x-goog-stored-content-length": str(size),
        "x-goog-hash": f"md5={_md5(found.data)}",
        "ETag": f'"etag{found.generation}"',
        "Content-Type": found.content_type or "application/octet-stream",
      }
      asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
      if asked is None or asked[1] == asked[2] == "":
        self._answer(200, found.data, headers)
        return
      start, end = 0, size
      if asked[1]:
        start, end = int(asked[1]), min(size, int(asked[2]) + 1) if asked[2] else size
      else:
        start = max(0, size - int(asked[2]))
      if start >= end:
        raise Error(416, f"{self.headers['Range']} is not within {size} bytes")
      headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
      self._answer(206, found.data[start:end], headers)

    def _fail(self, error):
      reason = {"code": error.status, "message": str(error)}
      self._answer(error.status, None if error.status == 304 else {"error": reason})

    def _answer(self, status, content=None, headers=None):
      headers = dict(headers or {})
      if isinstance(content, dict):
        content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      if status not in (204, 304):
        self.send_header("Content-Length", str(len(content or b"")))
      self._headers_buffer.append(b"\r\n" + (content or b""))
      self.flush_headers()

  return Handler
