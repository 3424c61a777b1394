"""From patches to the page: what is shown of each, in the form that `page.html` lays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ksl_patch import __version__
from ksl_patch.atomic import write_atomically
from ksl_patch.errors import RunError
from ksl_patch.evidence.certificate import MEANING, statements
from ksl_patch.kstest import critical_statistic
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import METRICS, Certificate, Evaluation, Figure, read
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.patch.wording import (
    against,
    from_base,
    interval,
    known_elsewhere,
    level_of,
    occurrence_table,
    of_seeds,
    show,
    where_from,
    which_occur,
)
from ksl_patch.report.comparison import compare
from ksl_patch.report.figures import Picture, dots, histogram, quoted, volcano
from ksl_patch.train.record import read_record, read_tests
from ksl_patch.words import P_RANKS

_HISTOGRAMS = 6
_ROWS = 24
_KINDS = {"patch": "patch", "embedding": "reference"}  # of a dot; all others are controls


@dataclass(frozen=True)
class AllRows:
    """The test of every row and how often its token occurs in training, [V] each, as a run folder keeps them."""

    statistic: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, patch: Patch, run: Path) -> AllRows | None:
        """Those of the patch's own build; None where the folder has none. Raises RunError for a damaged one."""
        record = read_record(run, patch.digest)
        file = run / (record.tests or "-") / "ks.npz"
        if not file.is_file():
            return None
        saved = read_tests(file)
        found = cls(saved["statistic"], saved["counts"])
        if not len(found.statistic) == len(found.counts) == patch.meta.base.vocab_size:
            raise RunError(f"{file} is not a test of this patch's base.")
        return found


def make_report(patches: Sequence[Patch], rows: Sequence[AllRows | None]) -> str:
    """The page for one patch, or for several with a comparison before them. rows: one for each patch, where at hand.

    Raises PatchError for a patch whose evaluation or certificate is not in this version's form.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ksl_patch.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(f"p{i}", patch, tested) for i, (patch, tested) in enumerate(zip(patches, rows, strict=True))]
    title = " · ".join(patch.meta.name for patch in patches)
    return environment.get_template("page.html").render(
        title=title,
        sections=sections,
        comparison=compare(patches) if len(patches) > 1 else None,
        version=__version__,
        svg=lambda picture: Markup(picture.svg),
    )


def _section(name: str, patch: Patch, tested: AllRows | None) -> dict[str, Any]:
    meta = patch.meta
    evaluation, certificate = read(Evaluation, meta.evaluation), read(Certificate, meta.certificate)
    systems = evaluation.ordered if evaluation else []
    # Largest D first, or, where there was no test, what moved farthest.
    counted, occur = occurrence_table(evaluation)
    rows = sorted(enumerate(patch.row_facts()), key=lambda row: -(row[1]["statistic"] or row[1]["change_norm"]))
    return {
        "id": name,
        "name": meta.name,
        "facts": _facts(patch),
        "headline": _headline(evaluation),
        "tokens": _tokens(rows, occur),
        "counted": counted,
        "which_occur": which_occur(evaluation) if evaluation else "",
        "shown": _ROWS,
        "ticket": meta.ticket,
        "retuned": bool(meta.ticket and meta.ticket.statistic and meta.training and meta.training.mode == "partial"),
        "histograms": _histograms(name, patch, rows),
        "volcano": _volcano(name, patch, tested),
        "evaluation": evaluation,
        "level": level_of([evaluation.confidence] if evaluation and evaluation.confidence else []),
        "figures": [
            (label, [_cell(system.figures.get(metric), metric) for system in systems])
            for metric, label in (evaluation.metrics if evaluation else {}).items()
        ],
        "where_from": where_from(evaluation) if evaluation else "",
        "leads": _leads(evaluation),
        "several_seeds": any(len(system.seeds) > 1 for system in systems),
        "p_ranks": P_RANKS,
        "metrics": list(evaluation.metrics.values()) if evaluation else [],
        "systems": [(system.label, system.size) for system in systems],
        "dots": dots(
            name,
            [(each.label, each.figures, _KINDS.get(each.name, "control")) for each in systems if each.name != "base"],
        ),
        "samples": evaluation.samples if evaluation else [],
        "certificate": certificate,
        "meaning": MEANING,
        "statements": statements(certificate) if certificate else [],
        "provenance": _provenance(patch, evaluation),
        "template": meta.template and meta.template.text,
        "origin": meta.origin,
    }  # fmt: skip


def _facts(patch: Patch) -> list[tuple[str, str]]:
    meta, base = patch.meta, patch.meta.base
    return [
        ("language", meta.language or "not said"),
        ("base", base.model_id or "unnamed"),
        ("rows", f"{len(patch.token_ids)} of {base.vocab_size:,}, {base.hidden_size} values each"),
        ("size", f"{patch.rows.nbytes / 1024:,.0f} KiB of rows in {base.dtype}"),
        ("side, scope", f"{meta.side}, {meta.scope}"),
        ("elsewhere", known_elsewhere(meta) or "not measured"),
        ("licence", meta.licence or "not said"),
    ]


def _headline(evaluation: Evaluation | None) -> list[tuple[str, str, str]]:
    """The three figures that must be seen together: a name, from base to patch, and the interval of the difference."""
    if evaluation is None:
        return []
    by_name = {system.name: system.figures for system in evaluation.systems}
    if not {"base", "patch"} <= by_name.keys():
        change = f"{evaluation.loss_base:.3f} → {evaluation.loss_patch:.3f}"
        return [(METRICS["loss"][0], change, f"on {evaluation.what}")]
    found = []
    for metric in ("loss", "chrf_first_line", "stop_rate"):
        before, after = by_name["base"].get(metric), by_name["patch"].get(metric)
        if before and after:
            change = f"{show(metric, before.value)} → {show(metric, after.value)}"
            seeds = of_seeds(metric, after)
            more = f"difference {from_base(metric, after)}" + (
                f"; {len(after.per_seed)} seeds {seeds}" if seeds else ""
            )
            found.append((METRICS[metric][0], change, more))
    return found


def _tokens(rows: list[tuple[int, dict[str, Any]]], occur: dict[int, list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "token": "" if row["token"] is None else quoted(row["token"]),
            "id": str(row["token_id"]),
            "D": "" if row["statistic"] is None else f"{row['statistic']:.4f}",
            "p": "" if row["pvalue"] is None else f"{row['pvalue']:.2g}",
            "base": f"{row['base_norm']:.3f}",
            "change": f"{row['change_norm']:.3f}",
            "occurs": occur.get(row["token_id"], []),
        }
        for _, row in rows
    ]


def _histograms(name: str, patch: Patch, rows: list[tuple[int, dict[str, Any]]]) -> list[Picture]:
    return [
        histogram(
            f"{name}-row{i}",
            str(row["token_id"]) if row["token"] is None else quoted(row["token"]),
            patch.base_rows[i].double().numpy(),
            patch.rows[i].double().numpy(),
            row["statistic"],
        )
        for i, row in rows[:_HISTOGRAMS]
    ]


def _volcano(name: str, patch: Patch, tested: AllRows | None) -> Picture | None:
    if tested is None:
        return None
    meta = patch.meta
    alpha = meta.ticket.level if meta.ticket else DEFAULT_ALPHA
    critical = critical_statistic(meta.base.hidden_size, alpha)
    ids = patch.token_ids.numpy()
    return volcano(
        f"{name}-volcano", tested.counts, tested.statistic, ids, meta.tokens or [str(i) for i in ids],
        None if critical is None else (alpha, critical),
    )  # fmt: skip


def _provenance(patch: Patch, evaluation: Evaluation | None) -> list[tuple[str, str]]:
    meta, base, t = patch.meta, patch.meta.base, patch.meta.training
    lines = [
        ("digest", patch.digest),
        ("created", meta.created or "not said"),
        ("base fingerprint", base.fingerprint),
        ("base revision", base.revision or "not said"),
        ("tokenizer", base.tokenizer_digest or "not said"),
    ]
    if meta.ticket:
        lines.append(("rows chosen by", meta.ticket.rule))
    if t:
        lines += [
            ("training", f"{t.mode}, seed {t.seed}, {t.optimiser}"),
            ("training read", t.read),
            ("tuned", t.tunings),
            ("training data", t.data_digest),
        ]
        if t.settings:
            lines.append(("optimiser", t.settings))
    if evaluation:
        lines.append((evaluation.what, evaluation.data_digest))
        lines += [(f"{name} signature", value) for name, value in evaluation.signatures.items()]
    return lines


def _cell(figure: Figure | None, metric: str) -> tuple[str, str, str]:
    """A value, the interval of its difference from the base, and the range over training seeds."""
    if figure is None:
        return "", "", ""
    return show(metric, figure.value), interval(metric, figure), of_seeds(metric, figure)


def _leads(evaluation: Evaluation | None) -> list[tuple[str, list[str]]]:
    """For each system beside the patch, the patch minus it in every metric, with the interval."""
    if evaluation is None:
        return []
    metrics = evaluation.metrics
    lines = [(each.label, [against(name, each.figures.get(name)) for name in metrics]) for each in evaluation.ordered]
    return [(label, cells) for label, cells in lines if any(cells)]


def write_report(path: Path, page: str) -> None:
    """Write the page. Raises RunError."""
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}.") from error
