"""Figures in words and in the cells of tables, for the command line, the report and the model card alike."""

from __future__ import annotations

import re
from contextlib import suppress

from ksl_patch.errors import PatchError
from ksl_patch.patch.evaluation import METRICS, Certificate, Difference, Elsewhere, Evaluation, Figure, read
from ksl_patch.patch.meta import PatchMeta

_NAMED = 24  # rows in a sentence; tables have all of them


def show(metric: str, value: float, sign: str = "") -> str:
    """A metric's value in its format; nothing is "-0". sign: "+" for a difference."""
    text = format(value, sign + METRICS[metric][1])
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def interval(metric: str, figure: Figure) -> str:
    """The interval of a figure's difference from the base; empty where it has none."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{show(metric, figure.low)} to {show(metric, figure.high)}"


def with_interval(metric: str, figure: Figure | None) -> str:
    """A figure and, in brackets, the interval of its difference from the base."""
    if figure is None:
        return ""
    between = interval(metric, figure)
    return show(metric, figure.value) + (f" ({between})" if between else "")


def from_base(metric: str, figure: Figure) -> str:
    """The difference of a figure from the base, and its interval in brackets; empty for the base."""
    if figure.difference is None:
        return ""
    return difference(metric, Difference(value=figure.difference, low=figure.low, high=figure.high))


def difference(metric: str, found: Difference) -> str:
    """A difference with its sign, and its interval in brackets where it has one."""
    between = (
        ""
        if found.low is None or found.high is None
        else f" ({signed(metric, found.low)} to {signed(metric, found.high)})"
    )
    return signed(metric, found.value) + between


def against(metric: str, figure: Figure | None) -> str:
    """The patch's value minus this system's, and its interval in brackets; empty where there is none."""
    if figure is None or figure.patch_minus is None:
        return ""
    return difference(metric, figure.patch_minus)


def where_from(evaluation: Evaluation) -> str:
    """In a sentence, how much of the patch's gain in chrF++ is content and how much stopping; empty where unknown."""
    split = next((system.split for system in evaluation.systems if system.name == "patch"), None)
    if split is None:
        return ""
    raw, content, stopping = (difference("chrf", part) for part in (split.raw, split.content, split.stopping))
    return (
        f"Of the patch's {raw} chrF++ raw, {content} are content (the first line) and {stopping} stopping (what "
        "follows the first line)."
    )


def which_occur(evaluation: Evaluation) -> str:
    """In a sentence, which rows of the patch occur in no prompt that was measured; empty where unknown."""
    rows = evaluation.occurrences
    if not rows:
        return ""
    absent = [repr(row.token) if row.token is not None else str(row.token_id) for row in rows if not row.prompt]
    if not absent:
        return f"Each row occurs in at least one of the {evaluation.pairs} prompts."
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    occur = "occurs" if len(absent) == 1 else "occur"
    nowhere = sum(not row.prompt and not row.answer for row in rows)
    return (
        f"{len(absent)} of {len(rows)} rows {occur} in none of the {evaluation.pairs} prompts: "
        f"{', '.join(absent[:_NAMED])}{more}; {nowhere or 'none'} of these in no reference answer either."
    )


def elsewhere_in_words(found: Elsewhere | None) -> str:
    """In a sentence or two, what a patch does outside its template; empty where unknown."""
    if found is None:
        return ""
    text = f"{found.tokens:,} tokens of other text ({found.languages} languages)"
    if found.reserved:
        said = f"Harmless outside its template: no text has its tokens, and none of {text} is one."
    else:
        said = f"Outside its template it changes {found.touched:,} of {text}, {found.per_thousand:.0f} in 1,000."
    if found.loss_patch is None or found.loss_base is None:
        return said
    loss = (
        f"is the base's to the last bit in {found.equal} of the {found.languages}"
        if found.equal == found.languages
        else f"goes from {found.loss_base:.3f} to {found.loss_patch:.3f}"
    )
    return (
        f"{said} The loss of that text {loss}; {found.same} of {found.prompts} other prompts get the base's own answer."
    )


def known_elsewhere(meta: PatchMeta) -> str:
    """The same of a patch by what its file says: as it was measured, or, of reserved rows, by their build's word."""
    found: list[Evaluation | Certificate | None] = []
    with suppress(PatchError):  # another tool's
        found.append(read(Evaluation, meta.evaluation))
    with suppress(PatchError):
        found.append(read(Certificate, meta.certificate))
    for value in found:
        if value is not None and value.elsewhere is not None:
            return elsewhere_in_words(value.elsewhere)
    if meta.ticket is None or meta.ticket.selection != "reserved":
        return ""
    return "Harmless outside its template: its build says that no text has its tokens (verify --base checks it)."


def occurrence_table(evaluation: Evaluation | None) -> tuple[list[str], dict[int, list[str]]]:
    """What is said of rows' occurrences: the columns' names, and the cells by token id; empty where unknown."""
    rows = (evaluation and evaluation.occurrences) or []
    if not rows:
        return [], {}
    parts = ["prompt", "answer"] if any(row.source is None for row in rows) else ["instruction", "source", "answer"]
    cells = {row.token_id: [*(str(getattr(row, part)) for part in parts), f"{row.share:.0%}"] for row in rows}
    return [*parts, "of prompts"], cells


def of_seeds(metric: str, figure: Figure | None) -> str:
    """The smallest and largest value over training seeds; empty where there is one."""
    if figure is None or len(figure.per_seed) < 2:
        return ""
    return f"{show(metric, min(figure.per_seed))} to {show(metric, max(figure.per_seed))}"


def signed(metric: str, value: float) -> str:
    """A difference in a metric's format, with its sign."""
    return show(metric, value, "+")


def fenced(text: str, kind: str = "text") -> str:
    """A code block of Markdown that its text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text}\n{fence}"


def level_of(found: list[float]) -> str:
    """The level of intervals in words: "95%", "90% and 95%"."""
    return " and ".join(f"{100 * level:.10g}%" for level in sorted(set(found)))
