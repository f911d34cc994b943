"""A hub on loopback that takes uploads: what of the Hugging Face hub's interface they use."""

import base64
import http.server
import json
import threading


class Hub:
  """Keeps what it is given; `status` answers all that makes a repository, or asks for one."""

  def __init__(self):
    self.files, self.tokens, self.made, self.status = {}, set(), [], 200
    self._blobs = {}
    hub = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def log_message(self, *_):
        pass

      def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

      def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

      def do_GET(self):  # Of the oldest releases, before they upload.
        found = {"id": self.path.removeprefix("/api/models/"), "xetEnabled": False}
        self._answer(found, hub.status)

      def do_PUT(self):
        hub._blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

      def do_POST(self):
        body = self._body()
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
          hub.made.append(json.loads(body))
          name = "/".join(filter(None, (hub.made[-1].get("organization"), hub.made[-1]["name"])))
          self._answer({"url": f"{hub.endpoint}/{name}", "error": "no"}, hub.status)
        elif "/preupload/" in self.path:
          found = [
            {
              "path": file["path"],
              "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
              "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
          ]
          self._answer({"files": found})
        elif self.path.endswith("/info/lfs/objects/batch"):
          objects = [
            {**one, "actions": {"upload": {"href": f"{hub.endpoint}/blob/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
          ]
          self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
          for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
              hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
              hub.files[value["path"]] = hub._blobs[value["oid"]]
          self._answer({"commitUrl": f"{hub.endpoint}/org/name/commit/1", "commitOid": "1"})
        elif self.path == "/api/validate-yaml":
          self._answer({"errors": [], "warnings": []})
        else:
          self._answer({"error": self.path}, 404)

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()
