"""A server on 127.0.0.1 that speaks just enough of the hub's protocol for huggingface_hub to download from it.

    with HubServer() as hub:
        hub.add("owner/model", {"config.json": b"..."}, revision="main")
        ...  # HF_ENDPOINT = hub.url

It counts requests, and can be slow, shut down, or break transfers off.
"""

import hashlib
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pandas as pd

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?$")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


# Two data sets of lm-evaluation-harness, small: (repo, configuration) -> rows, in the columns that its tasks read.
LAMBADA = ("EleutherAI/lambada_openai", "default")
HOTPOT = ("Xnhyacinth/LongBench", "hotpotqa_e")
TASK_DATA = {
    LAMBADA: [
        {"text": "The cat sat on the mat and the dog lay beside the cat"},
        {"text": "She opened the door and he came in through the door"},
        {"text": "Nobody knew the way so everybody asked for the way"},
        {"text": "They sold the old house and moved into a smaller house"},
    ],
    HOTPOT: [
        {
            "question": f"Which river runs through {town}?",
            "context": "".join(f"Passage {i}:\nThe river {river} runs through {town}.\n" for i in range(20)),
            "answers": [river, f"the {river}"],
            "all_classes": None,
            "length": 140,
            "dataset": "hotpotqa_e",
            "language": "en",
            "_id": town.lower(),
        }
        for town, river in (("Aldbury", "Bulbourne"), ("Hexham", "Tyne"), ("Bakewell", "Wye"))
    ],
}


def publish_task_data(hub: "HubServer") -> None:
    """Publish TASK_DATA as the hub keeps data sets: a card that names configuration and files, and a parquet."""
    for (repo, configuration), rows in TASK_DATA.items():
        content = io.BytesIO()
        pd.DataFrame(rows).to_parquet(content)
        files = [{"split": "test", "path": f"{configuration}/test-*.parquet"}]
        card = {"configs": [{"config_name": configuration, "data_files": files}]}
        name = f"{configuration}/test-00000-of-00001.parquet"
        hub.add(
            repo, {"README.md": f"---\n{json.dumps(card)}\n---\n".encode(), name: content.getvalue()}, kind="datasets"
        )


class HubServer:
    def __init__(self):
        self.snapshots = {}  # (kind, repo) -> {revision or commit: (commit, {path: content})}
        self.requests = []  # "METHOD path", as they came
        self.delays_s = []  # before the next answers, one after the other
        self.broken = set()  # files of which a first request gets half and the next ones an error
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main", kind: str = "models") -> str:
        """Publish `files` as a revision of a repo (kind: models or datasets); returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode() + revision.encode()).hexdigest()
        revisions = self.snapshots.setdefault((kind, repo), {})
        revisions[revision] = revisions[commit] = (commit, dict(files))
        return commit

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        matches = [RESOLVE.search(request) for request in self.requests if request.startswith("GET")]
        return [match[4] for match in matches if match]

    def stop(self):
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.stop()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(with_body=True)

    def do_HEAD(self):
        self._answer(with_body=False)

    def log_message(self, *arguments):
        pass

    def _answer(self, with_body: bool):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.delays_s:
            time.sleep(self.hub.delays_s.pop(0))
        if match := API.match(path):
            kind, repo, what, revision, folder = match.groups()
            if what == "tree":
                recursive = "recursive=true" in urlsplit(self.path).query.lower()
                self._list(kind, repo, revision, f"{folder}/" if folder else "", recursive)
            else:
                self._describe(kind, repo, revision or "main")
        elif match := RESOLVE.match(path):
            kind, repo, revision, name = match.groups()
            self._send_file(kind or "models", repo, revision, name, with_body)
        else:
            self._send(404)

    def _snapshot(self, kind, repo, revision):
        revisions = self.hub.snapshots.get((kind, repo))
        if revisions is None:
            self._send(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif revision not in revisions:
            self._send(404, headers={"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return revisions[revision]

    def _describe(self, kind, repo, revision):
        if snapshot := self._snapshot(kind, repo, revision):
            commit, files = snapshot
            self._send_json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def _list(self, kind, repo, revision, folder, recursive):
        """All files below `folder` ("" is the repository), or what lies directly in it."""
        if (snapshot := self._snapshot(kind, repo, revision)) is None:
            return
        commit, files = snapshot
        below = {name: content for name, content in files.items() if name.startswith(folder)}
        if folder and not below:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        folders = set()
        if not recursive:
            folders = {folder + name[len(folder) :].split("/")[0] for name in below if "/" in name[len(folder) :]}
            below = {name: content for name, content in below.items() if "/" not in name[len(folder) :]}
        self._send_json(
            [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders]
            + [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in below.items()
            ]
        )

    def _send_json(self, answer):
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, kind, repo, revision, name, with_body):
        if (snapshot := self._snapshot(kind, repo, revision)) is None:
            return
        commit, files = snapshot
        if name not in files:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, status = files[name], 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if wanted := re.match(r"bytes=(\d+)-$", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        if name in self.hub.broken and with_body:
            if self.hub.downloads().count(name) > 1:
                return self._send(500)
            return self._send(status, content, headers, cut=True)
        self._send(status, content, headers, with_body)

    def _send(self, status: int, content: bytes = b"", headers=None, with_body=True, cut=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
