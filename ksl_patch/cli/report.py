"""`ksl-patch report`: one page that shows a patch, or compares several."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ksl_patch.cli.options import REFERENCE, force_option, json_option, kept_run, needing, output_option


@click.command()
@click.argument("references", metavar="P...", nargs=-1, type=REFERENCE, required=True)
@output_option("H", "Page to write.  [default: the first patch's name with .html, here]")
@force_option("Replace an existing page.")
@click.option(
    "--run",
    "runs",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Folder that the build of the patch in the same place kept.  [default: P.run, where it is there]",
)
@json_option()
def report(
    references: tuple[str, ...], output: Path | None, force: bool, runs: tuple[Path, ...], as_json: bool
) -> None:
    """Write one HTML file about a patch: its rows, all rows that were trained, evaluation, samples, certificate.

    Several patches are compared first, then shown one by one. The page needs no network and no script, and can be read
    on a phone and printed. What was not measured is said to be missing: run `eval` and `certify` before.
    """
    with needing("reports need the report extra: pip install 'ksl-patch[report]'"):
        from ksl_patch.report.page import AllRows, make_report, write_report
        from ksl_patch.train.record import has_record

    from ksl_patch.store.references import resolve

    if len(runs) not in (0, len(references)):
        raise click.UsageError(f"{len(runs)} --run for {len(references)} patches: give one for each, or none.")
    found = [resolve(reference) for reference in references]
    output = output or Path(f"{found[0].patch.meta.name}.html")
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; add --force to replace it, or choose another name with -o.")
    rows = []
    for i, each in enumerate(found):
        run = runs[i] if runs else kept_run(each.path, each.patch.digest)
        rows.append(AllRows.of(each.patch, run) if runs or has_record(run, each.patch.digest) else None)
    page = make_report([each.patch for each in found], rows)
    write_report(output, page)
    if as_json:
        print(json.dumps({
            "path": str(output), "bytes": output.stat().st_size, "digests": [each.patch.digest for each in found],
        }))  # fmt: skip
    else:
        click.echo(f"Wrote {output}: {output.stat().st_size:,} bytes.")
