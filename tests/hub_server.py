"""A stand-in for the Hugging Face hub on this computer: what its client asks for when it uploads and downloads."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_" + "stand" * 6 + "in"
SHA = "0123456789" * 4  # of every commit


class Hub:
    """Repositories in memory: "models/owner/name" -> path -> bytes. Used as a context manager."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # large files by sha256
        self.requests: list[str] = []
        self.refuses: tuple[str, int] | None = None  # ("commit", 500) answers such requests with this status

    def __enter__(self) -> "Hub":
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.read_chunk, b""))
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refuses and self.hub.refuses[0] in path:
            return self.answer({"error": "refused"}, self.hub.refuses[1])
        if not path.startswith("/storage/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, **match.groupdict())
        return self.answer({"error": f"no route for {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        self.hub.repos.setdefault(repo, {})
        self.hub.private[repo] = asked.get("visibility") == "private" or asked.get("private", False)
        self.answer({"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})

    def info(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.answer({"id": repo.partition("/")[2], "sha": SHA, "siblings": [], "private": True})

    def may_write(self, body: bytes, repo: str) -> None:
        self.answer({})

    def upload_modes(self, body: bytes, repo: str) -> None:
        files = json.loads(body)["files"]
        mode = {True: "regular", False: "lfs"}
        self.answer(
            {
                "files": [
                    {"path": f["path"], "uploadMode": mode[f["path"].endswith(".json")], "shouldIgnore": False}
                    for f in files
                ]
            }
        )

    def large_files(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        actions = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}", "header": {}}}}
            for item in objects
        ]
        self.answer({"transfer": "basic", "objects": actions})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self.answer({})

    def commit(self, body: bytes, repo: str) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.stored[value["oid"]]
        url = f"{self.hub.url}/{repo.partition('/')[2]}/commit/{SHA}"
        self.answer({"commitUrl": url, "commitOid": SHA, "success": True})

    def tree(self, body: bytes, repo: str) -> None:
        files = self.hub.repos[repo].items()
        self.answer([{"type": "file", "path": path, "size": len(data), "oid": git_hash(data)} for path, data in files])

    def download(self, body: bytes, repo: str, path: str) -> None:
        data = self.hub.repos[f"models/{repo}"][path]
        self.answer(data, headers={"ETag": f'"{git_hash(data)}"', "X-Repo-Commit": SHA})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"(?P<repo>\w+/[\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", HubHandler.create),
    ("GET", f"/api/{REPO}(/revision/[^/]+)?", HubHandler.info),
    ("GET", f"/api/{REPO}/auth-check/write", HubHandler.may_write),
    ("POST", f"/api/{REPO}/preupload/main", HubHandler.upload_modes),
    ("POST", r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", HubHandler.large_files),
    ("PUT", r"/storage/(?P<oid>\w+)", HubHandler.store),
    ("POST", f"/api/{REPO}/commit/main", HubHandler.commit),
    ("GET", f"/api/{REPO}/tree/\\w+", HubHandler.tree),
    ("GET HEAD", r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/\w+/(?P<path>.+)", HubHandler.download),
]
