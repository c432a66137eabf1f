"""A local Hugging Face hub, with the part of its HTTP interface that huggingface_hub needs."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeHub:
    """Repos are folders user/name/revision under `root`. `requests` lists all requests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []

    def folder(self, repo_id: str, revision: str = "main") -> Path:
        """The folder with the files of a revision."""
        return self.root / repo_id / revision

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body; the body is the bytes of a file, or is sent as JSON."""
        self.requests.append(f"{method} {path}")
        parts = path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if self.folder(repo_id).exists():
                return 409, {}, {"url": repo_id}
            self.folder(repo_id).mkdir(parents=True)
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.private[repo_id] = bool(private)
            return 200, {}, {"url": f"https://huggingface.co/{repo_id}"}
        if parts == ["api", "validate-yaml"]:
            return 200, {}, {"errors": [], "warnings": []}
        if parts[:2] == ["api", "models"]:
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo_id, rest = "/".join(parts[:2]), parts[2:]
        if not (self.root / repo_id).is_dir() or len(parts) < 2:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        revision = rest[1] if len(rest) > 1 else "main"
        commits = {f.name: _sha1(f.name.encode()) for f in (self.root / repo_id).iterdir()}
        revisions = {
            **{commit: name for name, commit in commits.items()},
            **{r: r for r in commits},
        }
        if revision not in revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        folder, commit = self.folder(repo_id, revisions[revision]), commits[revisions[revision]]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        match rest[0] if rest else "":
            case "resolve":
                file = folder / "/".join(rest[2:])
                if not file.is_file():
                    return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
                content = file.read_bytes()
                return 200, {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": commit}, content
            case "" | "revision":
                info = {"id": repo_id, "sha": commit, "private": self.private.get(repo_id, False)}
                return 200, {}, {**info, "siblings": [{"rfilename": name} for name in names]}
            case "tree":
                sizes = [file.stat().st_size for file in files]
                entries = zip(names, sizes, strict=True)
                return (
                    200,
                    {},
                    [{"type": "file", "path": p, "size": s, "oid": p} for p, s in entries],
                )
            case "preupload":
                wanted = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return 200, {}, {"files": [{**f, "shouldIgnore": False} for f in wanted]}
            case "commit":
                for line in body.decode().splitlines():
                    operation = json.loads(line)
                    value = operation["value"]
                    if operation["key"] == "header":
                        self.commits.append(value["summary"])
                    elif operation["key"] == "file":
                        target = folder / value["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(value["content"]))
                url = f"https://huggingface.co/{repo_id}/commit/{commit}"
                return 200, {}, {"commitUrl": url, "commitOid": commit, "success": True}
        return 501, {}, {"error": f"the fake hub does not know {method} {path}"}


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serve a hub and yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(self.command, self.path, body)
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers = {**headers, "Content-Type": "application/json"}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = _handle

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
