"""A small Hugging Face Hub over HTTP: repositories, commits, regular and LFS uploads, downloads, and the check of
cards.

It answers what `huggingface_hub` and transformers really ask, so that pushing and pulling is tested through the real
client, without network. Nothing is stored on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "user"
WHO = {
    "type": "user",
    "name": USER,
    "fullname": USER,
    "orgs": [],
    "auth": {"type": "access_token", "accessToken": {"role": "write", "displayName": "test"}},
}
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    """One state of a repository: path -> bytes."""

    sha: str
    title: str
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Answer:
    """Status, body (JSON where it is no bytes) and headers of a response."""

    status: int = 200
    body: object = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, code: str, **headers: str) -> Answer:
    """What the Hub says when it has no such thing; the client tells the cases apart by `X-Error-Code`."""
    return Answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **headers})


def blob_id(content: bytes) -> str:
    """git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_data(text: str) -> dict:
    """The metadata of a card."""
    found = re.match(r"^---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def card_errors(text: str) -> list[str]:
    """What is wrong with the metadata of a card: YAML, and the shape that the Hub asks of a `model-index`."""
    try:
        data = card_data(text)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = [f"{key} must be a string" for key in ("library_name", "pipeline_tag") if not _is_text(data, key)]
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append("tags must be a list of strings")
    if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append(f"base_model_relation {data['base_model_relation']!r} is unknown")
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append("model-index: a model has no name")
        for result in model.get("results", [None]):
            errors += _result_errors(result)
    return errors


def _is_text(data: dict, key: str) -> bool:
    return isinstance(data.get(key, ""), str)


def _result_errors(result: dict | None) -> list[str]:
    if result is None:
        return ["model-index: no results"]
    errors = [
        f"model-index: {part}.type is missing" for part in ("task", "dataset") if not result.get(part, {}).get("type")
    ]
    if not result.get("dataset", {}).get("name"):
        errors.append("model-index: dataset.name is missing")
    for metric in result.get("metrics") or [{}]:
        if not metric.get("type") or not isinstance(metric.get("value"), (int, float)):
            errors.append("model-index: a metric needs a type and a number")
    return errors


class LocalHub:
    """The server; use as a context manager.

    Args:
        upload_mode: path, size -> "regular" or "lfs".

    Attributes:
        url: what `HF_ENDPOINT` is set to. log: (method, path) of every request. repos: {"user/name": commits, oldest
            first}.
    """

    def __init__(self, upload_mode: Callable[[str, int], str] = lambda path, size: "regular"):
        self.upload_mode = upload_mode
        self.repos: dict[str, list[Commit]] = {}
        self.log: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """The newest state of a repository."""
        return self.repos[repo][-1].files

    # -- routes -------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict, body: bytes) -> Answer:
        """The response to one request."""
        for pattern, route in ROUTES:
            if found := re.fullmatch(pattern, path):
                return route(self, found, query, body)
        return refusal(404, "NotFound")

    def who(self, found, query, body) -> Answer:
        return Answer(body=WHO)

    def create(self, found, query, body) -> Answer:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name'].split('/')[-1]}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": "0"}
        if name in self.repos:
            return Answer(409, answer | {"error": "exists"})
        self.repos[name] = [Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit")]
        return Answer(body=answer)

    def validate(self, found, query, body) -> Answer:
        errors = card_errors(json.loads(body)["content"])
        self.errors += errors
        return Answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def lfs_batch(self, found, query, body) -> Answer:
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self._large:
                links = {"upload": f"{self.url}/_lfs/{item['oid']}", "verify": f"{self.url}/_lfs_verify"}
                entry["actions"] = {name: {"href": href, "header": {}} for name, href in links.items()}
            objects.append(entry)
        return Answer(
            body={"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"}
        )

    def lfs_put(self, found, query, body) -> Answer:
        if hashlib.sha256(body).hexdigest() != found[1]:
            return Answer(400)
        self._large[found[1]] = body
        return Answer()

    def lfs_verify(self, found, query, body) -> Answer:
        return Answer(body={})

    def preupload(self, found, query, body) -> Answer:
        if (commit := self._at(found[1], "main")) is None:
            return refusal(404, "RepoNotFound")
        answers = []
        for item in json.loads(body)["files"]:
            there = commit.files.get(item["path"])
            mode = self.upload_mode(item["path"], item["size"])
            answers.append(
                {
                    "path": item["path"],
                    "uploadMode": mode,
                    "shouldIgnore": False,
                    "oid": blob_id(there) if there else None,
                }
            )
        return Answer(body={"files": answers})

    def commit(self, found, query, body) -> Answer:
        if (head := self._at(found[1], "main")) is None:
            return refusal(404, "RepoNotFound")
        files, title = dict(head.files), ""
        for line in filter(None, map(bytes.strip, body.splitlines())):
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            else:
                return Answer(400, {"error": f"unknown operation {kind}"})
        state = [len(self.repos[found[1]]), title, sorted((p, blob_id(c)) for p, c in files.items())]
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.repos[found[1]].append(Commit(sha, title, files))
        url = f"{self.url}/{found[1]}/commit/{sha}"
        return Answer(body={"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def info(self, found, query, body) -> Answer:
        commit = self._at(found[1], found[2] or "main")
        if commit is None:
            return refusal(404, "RevisionNotFound" if found[1] in self.repos else "RepoNotFound")
        values = {"_id": "0", "id": found[1], "modelId": found[1], "sha": commit.sha, "private": False, "tags": []}
        values |= {"downloads": 0, "likes": 0, "createdAt": DATE, "lastModified": DATE}
        values["cardData"] = card_data(commit.files.get("README.md", b"").decode())
        values["siblings"] = [{"rfilename": path} for path in commit.files]
        return Answer(body=values, headers={"X-Repo-Commit": commit.sha})

    def tree(self, found, query, body) -> Answer:
        commit = self._at(found[1], found[2])
        if commit is None:
            return refusal(404, "RepoNotFound")
        folder = (found[3] or "").strip("/")
        inside = {p: c for p, c in commit.files.items() if not folder or p.startswith(folder + "/")}
        if folder and not inside:
            return refusal(404, "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        entries = [{"type": "file", "oid": blob_id(c), "size": len(c), "path": p} for p, c in inside.items()]
        if query.get("recursive", ["false"])[0].lower() != "true":
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        return Answer(body=entries, headers={"X-Repo-Commit": commit.sha})

    def resolve(self, found, query, body) -> Answer:
        commit = self._at(found[1], found[2])
        if commit is None:
            return refusal(404, "RevisionNotFound" if found[1] in self.repos else "RepoNotFound")
        if found[3] not in commit.files:
            return refusal(404, "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        content = commit.files[found[3]]
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        return Answer(body=content, headers=headers | {"Content-Type": "application/octet-stream"})

    def _at(self, repo: str, revision: str) -> Commit | None:
        commits = self.repos.get(repo, [])
        if revision in ("main", "HEAD"):
            return commits[-1] if commits else None
        return next((commit for commit in reversed(commits) if commit.sha == revision), None)


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (r"/api/whoami-v2", LocalHub.who),
    (r"/api/repos/create", LocalHub.create),
    (r"/api/validate-yaml", LocalHub.validate),
    (rf"/{NAME}\.git/info/lfs/objects/batch", LocalHub.lfs_batch),
    (r"/_lfs/([0-9a-f]{64})", LocalHub.lfs_put),
    (r"/_lfs_verify", LocalHub.lfs_verify),
    (rf"/api/models/{NAME}/preupload/main", LocalHub.preupload),
    (rf"/api/models/{NAME}/commit/main", LocalHub.commit),
    (rf"/api/models/{NAME}(?:/revision/([^/]+))?", LocalHub.info),
    (rf"/api/models/{NAME}/tree/([^/]+)(/.*)?", LocalHub.tree),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", LocalHub.resolve),
)


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _handle(self) -> None:
            url, body = urlsplit(self.path), self._body()
            hub.log.append((self.command, self.path))
            answer = hub.answer(self.command, unquote(url.path), parse_qs(url.query), body)
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | answer.headers
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _handle

    return Handler
