"""Several patches of one base: one that fails stops none of the others, and what is done is not done again."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from ksl_patch.errors import KslPatchError, PatchError, RunError
from ksl_patch.hf import load_base
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Evaluation, read
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loaded import Loaded
from ksl_patch.train.progress import Reporter
from ksl_patch.train.record import keep, read_record, recorded


@dataclass(frozen=True)
class Member:
    """A patch to build. config, run: of its build. output: its file. force: replace another patch there."""

    config: BuildConfig
    output: Path
    run: Path
    force: bool = False

    @property
    def name(self) -> str:
        """What the patch is called."""
        return self.config.name


@dataclass(frozen=True)
class Outcome:
    """What became of a member. loss_base, loss_patch: per answer token on its dev pairs, in nats; None without any.

    state: "unchanged" where the file was there, of the same digest. error: in a sentence, of a failed one.
    """

    name: str
    state: Literal["built", "unchanged", "failed"]
    seconds: float
    error: str | None = None
    digest: str | None = None
    rows: int | None = None
    loss_base: float | None = None
    loss_patch: float | None = None


def build_fleet(
    members: Sequence[Member], reporter_of: Callable[[Member], Reporter], done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Build the members in their order on one base, which is loaded once.

    reporter_of: who is told of a member's build, which begins then. done: called after each. Raises a KslPatchError
    where the base cannot be loaded, before any.
    """
    if not members:
        return []
    config = members[0].config
    if any((each.config.base, each.config.revision) != (config.base, config.revision) for each in members):
        raise RunError("the patches of one file are of one base.")
    loaded = Loaded.of(*load_base(config.base, revision=config.revision, device=config.device))
    outcomes = []
    for member in members:
        outcomes.append(build_member(member, reporter_of(member), loaded))
        done(outcomes[-1])
    return outcomes


def build_member(member: Member, reporter: Reporter, loaded: Loaded) -> Outcome:
    """Build one, and write its file; an exception of any kind is its outcome."""
    began = time.monotonic()
    try:
        before = _before(member)
        patch = Build(member.config, member.run, reporter, loaded).patch()
        same = before is not None and before.digest == patch.digest
        if before is not None and not same and not member.force:
            raise RunError(f"{member.output} is another patch ({before.digest[:12]}): --force replaces it.")
        if before is not None and same and member.force:
            same, patch = _described(before, patch)
        if not same:  # what was measured of the same patch stays in its file
            patch.save(member.output)
    except Exception as error:  # of every kind: the others are built all the same
        return Outcome(member.name, "failed", time.monotonic() - began, error=_sentence(member, error))
    losses = read(Evaluation, patch.meta.evaluation)
    return Outcome(
        member.name,
        "unchanged" if same else "built",
        time.monotonic() - began,
        digest=patch.digest,
        rows=len(patch.token_ids),
        loss_base=losses.loss_base if losses else None,
        loss_patch=losses.loss_patch if losses else None,
    )


def _described(before: Patch, patch: Patch) -> tuple[bool, Patch]:
    """Whether a file says of the same rows what a build says, and what it is to say, with what was measured of them."""
    texts = [(each.name, each.language, each.licence, each.template, each.base) for each in (before.meta, patch.meta)]
    if texts[0] != texts[1] and texts[0][3] == texts[1][3]:
        patch = patch.with_meta(evaluation=before.meta.evaluation, certificate=before.meta.certificate)
    return texts[0] == texts[1], patch


def _before(member: Member) -> Patch | None:
    """The patch that is in the member's file. Raises RunError where it is of other settings, before any work."""
    if not member.output.parent.is_dir():
        raise RunError(f"the folder {member.output.parent} does not exist.")
    if not member.output.exists():
        return None
    try:
        patch = Patch.load(member.output)
        settings = json.loads(json.dumps(read_record(member.run, patch.digest).config))
    except (PatchError, RunError) as error:
        if member.force:
            return None
        raise RunError(f"{member.output} was not built here: --force replaces it ({error}).") from error
    now = recorded(asdict(member.config))
    settings = {each.name: each.default for each in fields(BuildConfig)} | settings  # of an earlier version
    if not member.force and (other := [key for key, value in now.items() if settings[key] != value]):
        raise RunError(
            f"{member.output} was built with other settings ({other[0].replace('_', '-')} {settings[other[0]]!r}, "
            f"now {now[other[0]]!r}): --force replaces it."
        )
    return patch


def _sentence(member: Member, error: Exception) -> str:
    """What is said of a failure; of one that nobody foresaw, with the file that has all of it."""
    if isinstance(error, KslPatchError):
        return str(error)
    file = member.run / f"error-{member.name}.txt"
    try:
        keep(file, "".join(traceback.format_exception(error)).encode())
    except RunError:
        return f"{type(error).__name__}: {error}"
    return f"{type(error).__name__}: {error} ({file} has where)"
