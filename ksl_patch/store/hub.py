"""Patches on the Hugging Face Hub: `hf://ORG/REPO[@REVISION][/FILE]`, fetched into its cache, and pushed with a card.

Only .safetensors files (and their signatures) are ever read; nothing of a repository is executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ksl_patch import __version__
from ksl_patch.errors import HubError, KslPatchError
from ksl_patch.patch import Patch
from ksl_patch.patch.file import SUFFIX
from ksl_patch.store import sign
from ksl_patch.store.card import CARD, make_card

PREFIX = "hf://"
MAX_BYTES = 256 * 2**20  # a thousand float32 rows of 16,384, three tensors, are 197 MB
_MOST_FILES = 10_000
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"(?:{PREFIX})?(?P<repo>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/pr/\d{1,9}|[A-Za-z0-9][A-Za-z0-9._-]{0,199}))?"
    rf"(?:/(?P<file>{_PART}(?:/{_PART}){{0,7}}))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubReference:
    """A patch on the Hub. revision: a branch, tag or commit; None is the main branch. file: None is the only patch."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Read `[hf://]ORG/REPO[@REVISION][/FILE]`. Raises HubError."""
        found = _REFERENCE.fullmatch(text)
        if found is None or (found["file"] and not found["file"].endswith(SUFFIX)):
            raise HubError(f"{text[:200]!r} is not a patch on the Hub: that is ORG/REPO[@REVISION][/FILE{SUFFIX}].")
        return cls(found["repo"], found["revision"], found["file"])

    @property
    def organisation(self) -> str:
        """The user or organisation that owns the repository."""
        return self.repo.partition("/")[0]

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}{f'/{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Fetched:
    """A file of the Hub's cache, and the reference with its file and the commit it came from."""

    path: Path
    reference: HubReference


def fetch(text: str) -> Fetched:
    """Bring a patch file and its signature, where it has one, into the Hub's cache.

    A commit that is there already is not asked for again; offline, so is nothing else. A cut download continues, a
    busy Hub is asked again when it says. The content is compared with the hash that the Hub lists. Raises HubError.
    """
    reference = HubReference.parse(text)
    if reference.file and reference.revision and _COMMIT.fullmatch(reference.revision):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(reference.repo, reference.file, revision=reference.revision)
        if isinstance(cached, str):
            return Fetched(Path(cached), reference)
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    with _reasons(reference):
        try:
            return _download(reference)
        except (OfflineModeIsEnabled, HTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in (429, 500, 502, 503, 504):
                raise
            return _cached(reference, error)


def push(
    patch: Path,
    name: str,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
) -> str:
    """Upload a patch file as NAME.safetensors, its signature where it has one, and the card. Returns the commit's URL.

    repo: ORG/REPO, made when it is not there. private: of a new one. base_model: the base's id on the Hub, where the
    patch does not say it. The card keeps what it has of other patches. Raises HubError, PatchError.
    """
    from huggingface_hub import CommitOperationAdd, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    file = f"{name}{SUFFIX}"
    target = HubReference.parse(str(HubReference(repo, revision, file)))
    loaded = Patch.load(patch)
    signature = sign.signature_path(patch)
    api = _api()
    with _reasons(target):
        api.create_repo(target.repo, private=private, exist_ok=True)
        try:
            old = Path(hf_hub_download(target.repo, CARD, revision=target.revision))
            known, parent = old.read_text(encoding="utf-8"), old.parent.name
        except EntryNotFoundError:
            known, parent = None, None
        card = make_card(loaded, target.repo, file, known, base_model=base_model)
        operations = [CommitOperationAdd(file, str(patch)), CommitOperationAdd(CARD, card.encode())]
        if signature.is_file():
            operations.append(CommitOperationAdd(file + sign.SUFFIX, str(signature)))
        commit = api.create_commit(
            target.repo,
            operations,
            commit_message=message or f"{name}: {len(loaded.token_ids)} rows, {loaded.digest[:12]}",
            revision=target.revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    return str(commit.pr_url or commit.commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="ksl_patch", library_version=__version__)


def _download(reference: HubReference) -> Fetched:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    tree = _api().list_repo_tree(reference.repo, revision=reference.revision, recursive=True)
    files = {entry.path: entry for entry in islice(tree, _MOST_FILES) if isinstance(entry, RepoFile)}
    file = _choose(reference, [path for path in files if path.endswith(SUFFIX)])
    paths = []
    for name in (file, file + sign.SUFFIX):
        if name not in files:
            continue
        if files[name].size > MAX_BYTES:
            raise HubError(f"{reference.repo}/{name} has {files[name].size:,} bytes; no patch is above {MAX_BYTES:,}.")
        path = Path(hf_hub_download(reference.repo, name, revision=reference.revision))
        _compare(path, files[name], f"{reference.repo}/{name}")
        paths.append(path)
    return Fetched(paths[0], _pinned(reference, paths[0], file))


def _cached(reference: HubReference, error: Exception) -> Fetched:
    """What the cache has of a reference, when the Hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    pattern = reference.file or f"*{SUFFIX}"
    try:
        folder = Path(
            snapshot_download(
                reference.repo, revision=reference.revision, allow_patterns=pattern, local_files_only=True
            )
        )
        file = _choose(reference, [str(path.relative_to(folder)) for path in folder.rglob(f"*{SUFFIX}")])
    except (LocalEntryNotFoundError, HubError) as absent:
        raise HubError(f"{reference} is not in the cache, and the Hub cannot be asked: {_said(error)}.") from absent
    return Fetched(folder / file, _pinned(reference, folder / file, file))


def _choose(reference: HubReference, files: list[str]) -> str:
    """The file of a reference among a repository's patch files."""
    if reference.file is not None:
        if reference.file not in files:
            raise HubError(f"{reference.repo} has no {reference.file} there; it has {_listed(files)}.")
        return reference.file
    if len(files) != 1:
        raise HubError(f"{reference.repo} has {_listed(files)}: say which, as in {reference}/NAME{SUFFIX}.")
    HubReference.parse(f"{reference.repo}/{files[0]}")  # a repository may call its files anything
    return files[0]


def _listed(files: list[str]) -> str:
    return ", ".join(sorted(files)[:20]) + (" and more" if len(files) > 20 else "") if files else "no .safetensors file"


def _pinned(reference: HubReference, path: Path, file: str) -> HubReference:
    commit = path.parents[file.count("/")].name  # the cache has snapshots/COMMIT/FILE
    return replace(reference, revision=commit if _COMMIT.fullmatch(commit) else reference.revision, file=file)


def _compare(path: Path, entry: Any, what: str) -> None:
    """Raise HubError, and drop the file, where its content is not what the Hub lists."""
    content = path.read_bytes()
    if entry.lfs is not None:
        expected, found = entry.lfs.sha256, hashlib.sha256(content).hexdigest()
    else:  # git's own hash
        expected, found = entry.blob_id, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != expected:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"{what} came as {found[:12]}, and the Hub lists {expected[:12]}: it was damaged on the way or has just "
            "changed; it was dropped, so try again."
        )


@contextmanager
def _reasons(reference: HubReference) -> Iterator[None]:
    """Say in one sentence what the Hub, or the way to it, has against a request."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except KslPatchError:
        raise
    except GatedRepoError as error:
        raise HubError(
            f"{reference.repo} is gated: {_said(error)}. Ask for access on its page, then sign in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no {reference.repo} for you ({_said(error)}): check the name; for a private one, sign in "
            "with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{reference.repo} has no revision {reference.revision}: {_said(error)}.") from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, and this needs the Hub.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        what = {
            401: "the token is not valid, sign in again with `hf auth login`",
            403: "your token may not do this",
            412: "it changed meanwhile, try again",
        }.get(status, "try again later")
        raise HubError(f"the Hub answers {status} for {reference.repo}: {_said(error)} ({what}).") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"the Hub cannot be used for {reference.repo}: {_said(error)}.") from error


def _said(error: BaseException) -> str:
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # an upload's own failure
        return _said(error.__cause__)
    return str(text).strip().splitlines()[0].rstrip(".:")
