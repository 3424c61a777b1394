"""What `eval` and `certify` share: their options, finding the build of a patch, and writing into its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.cli.options import columns_option

if TYPE_CHECKING:
    from ksl_patch.evidence import Certificate, Evaluation
    from ksl_patch.patch import Patch
    from ksl_patch.train.build import Build
    from ksl_patch.train.data import Encoded
    from ksl_patch.train.progress import Reporter

_OPTIONS = (
    click.option(
        "--run",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Folder that the patch's build kept.  [default: P.run]",
    ),
    click.option("--base", metavar="M", help="Base model, where it is not at the place that the build had it from."),
    click.option("--pairs", metavar="F", help="The pairs that the patch was built from, where they have moved."),
    click.option(
        "--test",
        metavar="G",
        help="Use these pairs, which no training saw, instead of those that the build held out.",
    ),
    columns_option("Names of the two columns of --test."),
    click.option("--limit", type=click.IntRange(2), metavar="N", help="Use the first N held-out pairs only."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=128, help="Cut greedy outputs after this many."),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="P2",
        help="Write the patch with the result to this file.  [default: into P itself]",
    ),
    click.option("--no-save", is_flag=True, help="Print the result only."),
    click.option("--device", metavar="DEV", help="Where to run.  [default: cuda when there is one, else cpu]"),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
)


def evidence_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that measures a patch on held-out pairs."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass
class Subject:
    """A patch, the model and held-out pairs it is measured on, and its build where the run folder is there."""

    patch: Patch
    target: Path | None
    model: Any
    tokenizer: Any
    held_out: Encoded
    build: Build | None
    cache: Path | None
    reporter: Reporter

    def save(self, **meta: Any) -> None:
        """Write the patch with other metadata where it was asked for."""
        if self.target is not None:
            self.patch.with_meta(**meta).save(self.target)

    def as_json(self, result: Evaluation | Certificate) -> str:
        """The result, what it is of and where it was written, as one JSON object."""
        from ksl_patch.evidence import write

        path = None if self.target is None else str(self.target)
        return json.dumps({"path": path, "digest": self.patch.digest, **write(result)})


@contextmanager
def subject(
    reference: str, *, run: Path | None, base: str | None, pairs: str | None, test: str | None,
    columns: tuple[str, str], limit: int | None, output: Path | None, no_save: bool, device: str | None,
    needs_build: bool,
) -> Iterator[Subject]:  # fmt: skip
    """What the options name. Everything that can be wrong is said before the first computation."""
    from ksl_patch.store.local import find
    from ksl_patch.store.sign import signature_path

    path, patch = find(reference)
    own = path == Path(reference)
    target = None if no_save else output or path
    if target is not None and output is None and not own:
        raise click.UsageError(f"{reference} is not a file of yours to write to: give -o FILE, or --no-save.")
    if target is not None and signature_path(target).exists():
        raise click.UsageError(
            f"{target} is signed, and new metadata would make the signature invalid: give -o FILE, or --no-save."
        )
    run = run or path.with_name(path.name + ".run")
    if not run.is_dir() and (needs_build or not (base and test)):
        alone = "" if needs_build else ", or measure the patch alone with --base M --test G"
        raise click.UsageError(
            f"{run}, the folder that the patch's build kept, is not there: name it with --run{alone}."
        )

    try:
        from ksl_patch.hf import load_base
        from ksl_patch.train.build import reopen
        from ksl_patch.train.compare import encode_test
        from ksl_patch.train.data import read_pairs
        from ksl_patch.train.progress import RichReporter
    except ImportError as error:
        raise click.ClickException(f"this needs the train extra: pip install 'ksl-patch[train]' ({error}).") from error

    with RichReporter() as reporter:
        build = None
        if run.is_dir():
            changes = {"base": base, "pairs": pairs, "device": device}
            build = reopen(patch, run, reporter, **{name: value for name, value in changes.items() if value})
            model, tokenizer = build.model, build.tokenizer
        else:
            assert base is not None
            model, tokenizer = load_base(base, device=device)
            patch.check(model, tokenizer)
        if test is not None:
            held_out = encode_test(patch, model, tokenizer, read_pairs(test, columns=columns), build)
        else:
            assert build is not None
            held_out = build.held_out
        if len(held_out) < 2:
            raise click.UsageError("fewer than two pairs are held out: give --test G with pairs that no training saw.")
        cache = run / "outputs" if build is not None else None
        yield Subject(patch, target, model, tokenizer, held_out.first(limit), build, cache, reporter)
