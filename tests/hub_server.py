"""A Hub on loopback: the part of its HTTP API that huggingface_hub uses to push and pull models, and its faults."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """commits: content by path, for each commit. refs: the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)

    def commit(self, files, ref="main"):
        before = self.commits.get(self.refs.get(ref), {})
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = {**before, **files}, sha
        return sha

    def read(self, path):
        """A file's text on the main branch."""
        return self.commits[self.refs["main"]][path].decode()

    def sha(self, revision):
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """The server. token: what a caller must show to write, or to read what is private.

    faults: functions of (method, path) that say what goes wrong: None, ("status", code, headers, message),
    ("cut", bytes) for a connection cut after that many bytes, ("wrong",) for another content of the same size.
    """

    def __init__(self):
        self.repos, self.lfs, self.faults, self.seen = {}, {}, [], []
        self.token = "hf_secret"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def once(self, method, part, *fault, times=1):
        """A fault of the next requests whose path has a part in it."""
        left = [times]

        def fails(found_method, path):
            if found_method == method and part in path and left[0]:
                left[0] -= 1
                return fault
            return None

        self.faults.append(fails)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _handle(self):
        url = urlsplit(self.path)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.seen.append((self.command, url.path, self.headers.get("Range")))
        self.fault = next((f for each in self.hub.faults if (f := each(self.command, url.path))), None)
        if self.fault and self.fault[0] == "status":
            _, code, headers, message = self.fault
            return self._refuse(code, "", message, headers)
        return self._route()

    def _route(self):
        parts = self.parts
        authorised = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[0] == "lfs" and self.command == "PUT":
            self.hub.lfs[parts[1]] = self.body
            return self._send(200)
        if self.command == "POST":
            if not authorised:
                return self._refuse(401, "", "Invalid username or password.")
            if parts == ["api", "repos", "create"]:
                wanted = json.loads(self.body)
                repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
                if repo in self.hub.repos:
                    known = {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
                    return self._send(409, json.dumps(known).encode())
                self.hub.repos[repo] = Repo(
                    private=bool(wanted.get("private") or wanted.get("visibility") == "private")
                )
                self.hub.repos[repo].commit({})
                return self._json({"url": f"{self.hub.url}/{repo}", "name": repo})
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2]).removesuffix(".git")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not authorised):
            return self._refuse(401 if not authorised else 404, "RepoNotFound", "Repository not found")
        if parts[0] == "api":
            return self._api(repo, name, parts[4:])
        if parts[2:4] == ["info", "lfs"]:
            objects = json.loads(self.body)["objects"]
            return self._json({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}} for each in objects
            ]})  # fmt: skip
        if repo.gated and not authorised:
            return self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        return self._file(repo, parts[3], "/".join(parts[4:]))

    def _api(self, repo, name, rest):
        kind, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            mode = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode[path], "shouldIgnore": False} for path in paths]
            return self._json({"files": files})
        sha = repo.sha(revision)
        if sha is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "commit":
            return self._commit(repo, name, sha, revision)
        files = repo.commits[sha]
        if kind == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        return self._json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def _commit(self, repo, name, sha, revision):
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, sha):
                return self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        ref = "refs/pr/1" if self.query.get("create_pr") else revision
        if ref != revision:
            repo.refs[ref] = sha
        made = repo.commit(files, ref)
        return self._json({
            "commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made,
            "pullRequestUrl": f"{self.hub.url}/{name}/discussions/1",
        })  # fmt: skip

    def _file(self, repo, revision, path):
        sha = repo.sha(revision)
        if sha is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repo.commits[sha]:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        content = repo.commits[sha][path]
        entry = _entry(path, content)
        etag = entry.get("lfs", {}).get("oid", entry["oid"])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.fault and self.fault[0] == "wrong":
            content = bytes(reversed(content))
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206 if start else 200, content[start:], headers)

    def _refuse(self, code, error, message, headers=None):
        more = {"X-Error-Code": error} if error else {}
        self._send(
            code, json.dumps({"error": message}).encode(), {**more, "X-Error-Message": message, **(headers or {})}
        )

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, code, content=b"", headers=None):
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault[0] == "cut":
            self.wfile.write(content[: self.fault[1]])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content)


def _entry(path, content):
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith(".safetensors"):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return entry
