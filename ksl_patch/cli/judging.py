"""What `eval` and `certify` share: their options, finding the build of a patch, and writing into its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ksl_patch.cli.options import (
    PATH_OR_ID,
    base_option,
    check_output,
    columns_option,
    device_option,
    force_option,
    json_option,
    kept_run,
    needing,
    one_or_several,
    output_option,
    starting,
)

if TYPE_CHECKING:
    from ksl_patch.patch.evaluation import Certificate, Evaluation

    E = TypeVar("E", Evaluation, Certificate)
    from ksl_patch.data.encoding import Encoded
    from ksl_patch.patch import Patch
    from ksl_patch.train.build import Build
    from ksl_patch.train.progress import Reporter

_OPTIONS = (
    click.option(
        "--run",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Folder that the patch's build kept.  [default: P.run]",
    ),
    base_option("Base model, where it is not at the place that the build had it from."),
    click.option(
        "--pairs",
        multiple=True,
        callback=one_or_several,
        metavar="F",
        type=PATH_OR_ID,
        help="The pairs that the patch was built from, where they have moved.",
    ),
    click.option(
        "--test",
        multiple=True,
        callback=one_or_several,
        metavar="G",
        type=PATH_OR_ID,
        help="Use these pairs, which no training saw, instead of those that the build held out.",
    ),
    columns_option("Names of the two columns of --test."),
    click.option("--group", metavar="COLUMN", help="Column of --test with the document of a pair.  [default: none]"),
    click.option(
        "--part",
        type=click.Choice(["held-out", "dev"]),
        help="Pairs that the build set aside: those for the figures, or those that choices are made on.  [default: "
        "held-out]",
    ),
    click.option("--limit", type=click.IntRange(2), metavar="N", help="Use the first N of the pairs only."),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        metavar="N",
        help="Cut greedy outputs after this many.  [default: half as many again as the longest reference has]",
    ),
    output_option("P2", "Write the patch with the result to this file.  [default: into P itself]"),
    click.option("--no-save", is_flag=True, help="Print the result only."),
    force_option("Replace figures of more pairs or systems, or an existing P2."),
    device_option(),
    json_option(),
)


def evidence_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that measures a patch on held-out pairs."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass
class Subject:
    """A patch, the model and held-out pairs it is measured on, and its build where the run folder is there.

    whole: the pairs that the held-out ones are the first of. own: whether the target is the patch's file.
    """

    patch: Patch
    target: Path | None
    own: bool
    model: Any
    tokenizer: Any
    held_out: Encoded
    whole: Encoded
    build: Build | None
    part: str
    force: bool
    reporter: Reporter

    def count_use(self) -> int | None:
        """How many patches of the run folder were measured on any of these pairs; None where that is unknown."""
        if self.build is None:
            return None
        return self.build.note_use(self.whole, self.patch)

    def replaced(self, kind: type[E]) -> E | None:
        """The figures that the result will replace in the patch itself; None for none.

        Raises UsageError for those of another tool, where --force was not given.
        """
        from ksl_patch.errors import PatchError
        from ksl_patch.patch.evaluation import read

        name = kind.__name__.lower()
        if self.target is None or not self.own:
            return None
        try:
            return read(kind, getattr(self.patch.meta, name))
        except PatchError as error:
            if self.force:
                return None
            raise click.UsageError(f"{error} Add --force to replace it, give -o FILE, or --no-save.") from error

    def check_replaces(self, old: Evaluation | Certificate | None, less: Sequence[str] = ()) -> str:
        """What the result will replace in the patch, in words; empty for nothing.

        less: what else the old one has that the new one will not have. Raises UsageError when the old one has more and
        --force was not given.
        """
        if old is None:
            return ""
        less = list(less)
        if old.pairs > len(self.held_out):
            less.append(f"{old.pairs} pairs where this one has {len(self.held_out)}")
        if self.part == "dev" and old.part != "dev":
            less.append("pairs that no choice was made on where this one has dev pairs")
        kind = type(old).__name__.lower()
        if less and not self.force:
            raise click.UsageError(
                f"the patch's {kind} has {', '.join(less)}: add --force to replace it, give -o FILE, or --no-save."
            )
        return f"It replaces the {kind} on {old.what}."

    def save(self, **meta: Any) -> None:
        """Write the patch with other metadata where it was asked for."""
        if self.target is not None:
            self.patch.with_meta(**meta).save(self.target)

    def as_json(self, result: Evaluation | Certificate) -> str:
        """The result, what it is of and where it was written, as one JSON object."""
        from ksl_patch.patch.evaluation import write

        path = None if self.target is None else str(self.target)
        return json.dumps({"path": path, "digest": self.patch.digest, **write(result)})


@contextmanager
def subject(
    reference: str, *, run: Path | None, base: str | None, pairs: str | tuple[str, ...] | None,
    test: str | tuple[str, ...] | None,
    columns: tuple[str, str], group: str | None, part: str | None, limit: int | None,
    output: Path | None, no_save: bool, force: bool, device: str | None, needs_build: bool,
    as_json: bool, alone: bool = False,
) -> Iterator[Subject]:  # fmt: skip
    """What the options name. Everything that can be wrong is said before the first computation."""
    from ksl_patch.store.references import resolve
    from ksl_patch.store.sign import signature_path

    path, patch, _ = resolve(reference)
    is_file = path == Path(reference)
    target = None if no_save else output or path
    if target is not None and output is None and not is_file:
        raise click.UsageError(f"{reference} is not a file of yours to write to: give -o FILE, or --no-save.")
    if target is not None and signature_path(target).exists():
        raise click.UsageError(
            f"{target} is signed, and new metadata would make the signature invalid: give -o FILE, or --no-save."
        )
    if test and part:
        raise click.UsageError("--part says which pairs of the build, and --test gives others: give one of the two.")
    if group and not test:
        raise click.UsageError("--group is a column of --test; the build knows its own.")
    if tuple(columns) != ("source", "target") and not test:
        raise click.UsageError("--columns are those of --test; the build knows its own.")
    if output is not None and not no_save:
        check_output(output, force)
    if alone and (not (base and test) or run):
        raise click.UsageError("--alone measures the patch with --base M and --test G, and takes no --run.")
    run = run or kept_run(path, patch.digest)
    built = run.is_dir() and not alone
    if not built and (needs_build or not (base and test)):
        otherwise = "" if needs_build else ", or measure the patch alone with --base M --test G"
        raise click.UsageError(
            f"{run}, the folder that the patch's build kept, is not there: name it with --run{otherwise}."
        )

    if pairs and not built:
        raise click.UsageError("--pairs are those that the patch's build had, and this measures it without its build.")

    starting(as_json)
    with needing("this needs the train extra: pip install 'ksl-patch[train]'"):
        from ksl_patch.data.columns import Columns
        from ksl_patch.data.reading import read_pairs
        from ksl_patch.evidence.evaluate import encode_test
        from ksl_patch.hf import load_base
        from ksl_patch.train.progress import RichReporter
        from ksl_patch.train.reopen import reopen

    with RichReporter() as reporter:
        build = None
        if built:
            changes = {"base": base, "pairs": pairs, "device": device}
            build = reopen(patch, run, reporter, **{name: value for name, value in changes.items() if value})
            model, tokenizer = build.model, build.tokenizer
        else:
            assert base is not None
            reporter.note("loading", f"Loading {base} ...")
            model, tokenizer = load_base(base, device=device)
            patch.check(model, tokenizer)
        if test is not None:
            part, template = "given", patch.meta.template
            fields = tuple((template and template.fields) or ())
            languages = (None if build is None else build.config.source_language, patch.meta.language)
            read = read_pairs(test, Columns(*columns, group, fields), languages=languages)
            held_out = encode_test(patch, model, tokenizer, read, build, reporter)
        else:
            assert build is not None
            part = part or "held-out"
            held_out = build.dev if part == "dev" else build.held_out
        if len(held_out) < 2:
            raise click.UsageError(
                f"fewer than two {'test' if test else part} pairs: "
                + ("give more." if test else "give --test G with pairs that no training saw.")
            )
        some, own = held_out.first(limit), target == path
        yield Subject(patch, target, own, model, tokenizer, some, held_out, build, part, force, reporter)
