"""`ksl-patch certify`: how far a patch agrees with the fully tuned embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ksl_patch.cli.judging import evidence_options, subject
from ksl_patch.cli.options import REFERENCE

if TYPE_CHECKING:
    from rich.table import Table

    from ksl_patch.patch.evaluation import Certificate


@click.command(context_settings={"show_default": True})
@click.argument("reference", metavar="P", type=REFERENCE)
@click.option(
    "--delta",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    help="The bounds may fail so often.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Level of the KS margin.  [default: the ticket's, or 0.05]",
)
@evidence_options
def certify(
    reference: str, delta: float, alpha: float | None, max_new_tokens: int | None, output: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Certify what a patch leaves alone, and how far it agrees with the fully tuned embedding of its build.

    Agreement is no certificate of quality: the tuned embedding may be wrong, and `eval` measures how good the two are.

    First, what it changes outside its template: nothing, where its tokens are reserved ones, which no text has; that is
    all that is said of such a patch, since it comes from no tuned embedding.

    Then three statements, each with its assumptions: inputs on which the two are bit-equal, counted; the share of next
    tokens and of whole greedy outputs on which they agree, with a lower bound; and the paper's KS margin, a heuristic,
    beside what was measured. The result goes into the patch's metadata.
    """
    with subject(reference, output=output, needs_build=True, as_json=as_json, **options) as it:
        from ksl_patch.evidence.agreement import certify as certificate_of
        from ksl_patch.patch.evaluation import Certificate, write
        from ksl_patch.patch.meta import DEFAULT_ALPHA

        assert it.build is not None
        ticket = it.patch.meta.ticket
        replaced = it.check_replaces(it.replaced(Certificate))
        result = certificate_of(
            it.build,
            it.patch,
            it.held_out,
            alpha=alpha or (ticket.level if ticket else DEFAULT_ALPHA),
            delta=delta,
            max_new_tokens=max_new_tokens,
            part=it.part,
            uses=it.count_use(),
        )
        it.save(certificate=write(result))
    if as_json:
        print(it.as_json(result))
        return
    from ksl_patch.evidence.certificate import summary
    from ksl_patch.terminal import PlainConsole

    console = PlainConsole(width=None if PlainConsole().is_terminal else 120)
    console.print(summary(result))
    console.print(table(result))
    for note in result.notes:
        console.print(f"Note: {note}")
    if it.target is not None:
        click.echo(f"Wrote the certificate into {it.target}. {replaced}".rstrip())


def table(certificate: Certificate) -> Table:
    """The statements, what was found, and what each rests on."""
    from rich.table import Table

    from ksl_patch.evidence.certificate import statements

    result = Table(
        title="Certificate"
        + (f"; agreement with the tuned embedding, on {certificate.what}" if certificate.next_token else ""),
        title_justify="left",
        show_lines=True,
    )
    for name in ("", "found", "assumptions"):
        result.add_column(name, overflow="fold", ratio=3 if name == "assumptions" else 2)
    for what, found, assumption in statements(certificate):
        result.add_row(what, found, assumption)
    return result
