"""A stand-in for the Hugging Face hub: what its client asks of it over HTTP, in memory.

Repositories of models with one branch, commits, files (large ones by the LFS protocol), and a token
for whoever writes.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import yaml

TOKEN = "hf_of_the_stand_in"
LARGE = (".safetensors", ".png")


class Hub(http.server.ThreadingHTTPServer):
    """Attributes: `repos`: {id: [(commit, {path: bytes}), ...]}, the newest last; `private` ids."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.private, self.large = {}, set(), {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main"):
        """(commit, {path: bytes}) of a revision; None: it is not there."""
        for commit, files in reversed(self.repos.get(repo, ())):
            if revision in ("main", commit):
                return commit, files
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, words):
        self.answer({"error": words}, status, X_Error_Code=code, X_Error_Message=words)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (found or file):
            return self.refuse(404, "", f"not of the stand-in: {path}")
        repo, revision = (found[1], found[3]) if found else file.groups()[:2]
        if repo not in self.server.repos:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        there = self.server.files(repo, revision or "main")
        if there is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = there
        if file:
            if file[3] not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            tag = {"ETag": f'"{digest(files[file[3]])}"', "X-Repo-Commit": commit}
            return self.answer(files[file[3]], **tag)
        if found[2] == "tree":
            return self.answer([about(name, x) for name, x in files.items()])
        return self.answer(
            {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        )

    do_HEAD = do_GET

    def do_PUT(self):
        name, content = self.path.rpartition("/")[2], self.body()
        assert digest(content) == name
        self.server.large[name] = content
        self.answer()

    def do_POST(self):
        body = self.body()
        if self.path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1])
            faults = [] if isinstance(data.get("license"), str) else [{"message": "no license"}]
            return self.answer({"errors": faults, "warnings": []}, 400 if faults else 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            about = {"url": f"{self.server.url}/{repo}"}
            if repo in self.server.repos:
                return self.answer(about | {"error": "You already created this model repo"}, 409)
            self.server.repos[repo] = [("0" * 40, {})]
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(repo)
            return self.answer(about)
        if self.path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            for one in wanted:
                one["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            return self.answer({"transfer": "basic", "objects": wanted})
        repo, what = re.match(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path
        ).groups()
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            return self.answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(self.server.files(repo)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        commits = self.server.repos[repo]
        commit = hashlib.sha1(body + str(len(commits)).encode()).hexdigest()
        commits.append((commit, files))
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return self.answer({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def about(name: str, content: bytes) -> dict:
    found = {"type": "file", "path": name, "size": len(content), "oid": digest(content)[:40]}
    if name.endswith(LARGE):
        found["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 100}
    return found


@contextlib.contextmanager
def running():
    """A `Hub` on a free port of this machine, while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
