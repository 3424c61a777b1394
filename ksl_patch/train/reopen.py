"""The build that a patch came from, opened again to judge the patch, by the record in its run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ksl_patch.base import find_embedding
from ksl_patch.base.identity import has_other_weights
from ksl_patch.data.pairs import data_digest
from ksl_patch.errors import DataError, RunError
from ksl_patch.patch import Patch
from ksl_patch.train.build import Build
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loaded import launched
from ksl_patch.train.progress import Reporter, SilentReporter
from ksl_patch.train.record import read_record


def reopen(patch: Patch, run: Path, reporter: Reporter | None = None, **changes: Any) -> Build:
    """The build that a patch came from, by the record in its run folder.

    changes: fields of its BuildConfig that are different now, such as where the base and the pairs are.
    Raises RunError without a record, DataError when the pairs are not those of the patch's training.
    """
    record = read_record(run, patch.digest)
    try:
        config = BuildConfig(**record.config | changes)
        if not isinstance(config.pairs, str):
            config = replace(config, pairs=tuple(config.pairs))
    except TypeError as error:
        raise RunError(f"the record of the build in {run} is of another version of ksl-patch ({error}).") from error
    if record.machine is None:
        raise RunError(
            f"the patch is of an earlier ksl-patch, whose split of the pairs was another: build it again in {run}."
        )
    # As many pairs in a step as all processes had together.
    processes = record.machine.batch[2]
    accumulate, rest = divmod(config.accumulate * processes, launched(config.device).num_processes)
    if rest:
        raise RunError(f"the patch was trained by {processes} processes: run this with one process, or so many.")
    config = _selected_as(patch, replace(config, accumulate=accumulate))
    reporter, template = reporter or SilentReporter(), patch.meta.template
    build = Build(config, run, reporter, reopened=record.machine, template=template)
    training = patch.meta.training
    if training is None or training.data_digest != data_digest(build.pairs.train):
        raise DataError(
            f"the pairs in {config.pairs} do not give the training data of this patch; name the file that it was built "
            "from with --pairs"
            + (" (or an earlier one built it, whose --max-pairs counted too long pairs)" if config.max_pairs else "")
            + "."
        )
    patch.check_table(find_embedding(build.model))
    patch.check_vocabulary(build.tokenizer)
    if has_other_weights(patch.meta.base, build.model):
        raise RunError(
            f"{config.base} has the rows of the base that this patch was trained on, and other weights beside them: "
            "give --base the one it was trained on, or measure the patch on this one with --alone."
        )
    named = [i for i in patch.token_ids.tolist() if build.reserved.name(i) in build.template.text]
    if build.template.unpatched is not None and build.reserved_ids != named:
        token = next(i for i in named if i not in build.reserved_ids)
        raise RunError(
            f"{config.base} does not take {build.reserved.name(token)!r} for reserved, as the base that this patch was "
            f"trained on did ({build.reserved.why_not(token)}): give --base that one."
        )
    if build.examples_digest != record.examples:
        raise RunError(
            f"the tokenizer or the template of {config.base} cuts the training pairs into other tokens than when this "
            "patch was trained: give --base the one it was trained on."
        )
    return build


def _selected_as(patch: Patch, config: BuildConfig) -> BuildConfig:
    """The settings with the patch's own selection: two that gave the same rows share a digest, and so a record."""
    ticket = patch.meta.ticket
    if ticket is None:
        return config
    if ticket.selection == "given":
        return replace(config, rows=tuple(patch.token_ids.tolist()))
    return replace(config, rows=(), selection=ticket.selection, alpha=ticket.alpha, top_k=ticket.top_k)  # type: ignore[arg-type]
