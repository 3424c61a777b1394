"""How far a patch agrees with the fully tuned embedding: counted, bounded, and guessed, never mixed.

The mathematics and the assumptions are here; `agreement.py` gets the model's answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal

import torch

from ksl_patch.base.tensors import row_bits
from ksl_patch.errors import RunError
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Bound, Certificate, Margin, in_words
from ksl_patch.patch.wording import elsewhere_in_words

HARMLESS = "Harmless outside its template: an input without the patch's tokens gets what the base gives, bit for bit"
# What a certificate is, as the paper's Theorem 2 is.
MEANING = (
    "A certificate is of agreement with the tuned embedding, not of quality: where that is wrong, the patch agrees "
    "with what is wrong. How good the two are is what `ksl-patch eval` measures."
)
ASSUMPTIONS = {
    "elsewhere": "By construction: the head is the base's, so a row acts only where an input has its token, and this "
    "base's tokenizer gives these tokens for their own names alone. A text that writes such a name, or a model that "
    "writes one by itself, is not covered. The texts are a check of it: articles 1 and 3 of the Universal Declaration "
    "of Human Rights in each language, and prompts of other tasks, answered greedily.",
    "elsewhere touched": "Counted on articles 1 and 3 of the Universal Declaration of Human Rights in each language: "
    "other text has these tokens more or less often. A loss that did not rise here may rise there.",
    "exact": "Counted on these inputs, not estimated. Every token of the input has the same row, bit for bit, under "
    "the patch and in the tuned table, so the next token's logits are the same too. It says nothing of other inputs, "
    "nor of what follows once the model has written a token whose row is another one.",
    "statistical": "With probability at least 1 - delta over the draw of the examples, the share that agrees in the "
    "whole text that they are drawn from is at least the bound (Clopper and Pearson 1934, one-sided); each of the two "
    "bounds by itself. The examples must be independent draws from the text that the patch will meet, and none of them "
    "may have trained a row or chosen the ticket. Another domain, another prompt or sampled decoding is not covered.",
    "margin": "A heuristic after KS-Lottery, no certificate: it takes rows to be independent, the prediction to be a "
    "function of their values' distributions alone, and its change to be no larger than their KS distances, none of "
    "which a transformer gives. Read the measured violations beside it.",
}


def lower_bound(agreements: int, examples: int, delta: float) -> Bound:
    """The one-sided lower bound of a share, at level 1 - delta, from independent examples.

    Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial" (1934),
    as scipy.stats.binomtest computes it. Raises RunError for counts or a delta that make no sense.
    """
    from scipy.stats import binomtest

    if not 0 < delta < 1:
        raise RunError(f"delta must be between 0 and 1, not {delta}.")
    if not 0 <= agreements <= examples or examples < 1:
        raise RunError(f"{agreements} agreements of {examples} examples are no count.")
    interval = binomtest(agreements, examples, alternative="greater").proportion_ci(1 - delta, method="exact")
    return Bound(
        agreements=agreements, examples=examples, share=agreements / examples, lower=max(0.0, float(interval.low))
    )


def critical_distance(d: int, alpha: float) -> float:
    """tau(alpha) = sqrt(-ln(alpha / 2) / d): the asymptotic critical KS distance of two samples of size d."""
    if not 0 < alpha < 1:
        raise RunError(f"alpha must be between 0 and 1, not {alpha}.")
    return math.sqrt(-math.log(alpha / 2) / d)


def differing_tokens(patch: Patch, tuned: Patch) -> set[int]:
    """The token ids whose rows differ, in any bit, between the patched table and the tuned one.

    Both are patches of one base; ids that neither has keep the base's row in both tables.
    """
    ids = torch.unique(torch.cat([patch.token_ids, tuned.token_ids]))

    def rows(of: Patch, other: Patch) -> torch.Tensor:
        found = torch.empty(len(ids), of.rows.shape[1], dtype=of.rows.dtype)
        found[torch.searchsorted(ids, other.token_ids)] = other.base_rows
        found[torch.searchsorted(ids, of.token_ids)] = of.rows
        return row_bits(found)

    differ = (rows(patch, tuned) != rows(tuned, patch)).any(dim=1)
    return set(ids[differ].tolist())


def exact(patch: Patch, tuned: Patch, inputs: Iterable[Sequence[int]]) -> int:
    """How many inputs (token ids) have no token whose rows differ, so that the outputs are bit-equal.

    With side "input+output" every logit depends on the rows of its token in the head: none counts unless all agree.
    """
    differ = differing_tokens(patch, tuned)
    if patch.meta.side == "input+output" and differ:
        return 0
    return sum(differ.isdisjoint(tokens) for tokens in inputs)


def ks_margin(
    margins: torch.Tensor, changed: torch.Tensor, statistic: torch.Tensor, ticket: torch.Tensor, d: int, alpha: float
) -> Margin:
    """The heuristic: predictions whose margin exceeds 2 tau(alpha), and how many of those changed all the same.

    margins: [n], probability of the top token minus that of the second, under the tuned model. changed: bool [n],
    whether the patched model's top token is another. statistic: [V], D of every row. ticket: int64 [k].
    """
    tau = critical_distance(d, alpha)
    certified = margins > 2 * tau
    left = torch.ones(len(statistic), dtype=torch.bool)
    left[ticket] = False
    return Margin(
        alpha=alpha,
        tau=tau,
        certified=int(certified.sum()),
        violations=int((certified & changed).sum()),
        outside=int((left & (statistic >= tau)).sum()),
        examples=len(margins),
    )


def at_least(bound: float) -> str:
    """A lower bound of a share in words, rounded down to a tenth of a percent: never more than it is."""
    return f"{math.floor(1000 * bound) / 10:.1f}%"


def _confidence(certificate: Certificate) -> str:
    """1 - delta in percent."""
    return f"{(100 - 100 * Decimal(str(certificate.delta))).normalize():f}%"


def summary(certificate: Certificate) -> str:
    """A certificate in a few lines."""
    c, level = certificate, _confidence(certificate)
    word, whole, outside = c.next_token, c.continuation, elsewhere_in_words(c.elsewhere)
    if word is None or whole is None:
        return outside
    return (f"{outside}\n" if outside else "") + (
        f"On {word.agreements} of {in_words(word.examples, c.part)} the patch begins with the "
        f"tuned embedding's token (confidence {level}: on at least {at_least(word.lower)} of such text), on "
        f"{whole.agreements} it gives the same whole answer (at least {at_least(whole.lower)}).\n{MEANING}"
    )


def statements(certificate: Certificate) -> list[tuple[str, str, str]]:
    """What a certificate says in words: the statement, what was found, and its assumptions."""
    c, m, outside = certificate, certificate.margin, certificate.elsewhere
    level = f"at least {{}} with confidence {_confidence(c)}"
    found = []
    if outside is not None and outside.reserved:
        checked = (
            f"all its tokens are reserved; the loss is the base's in {outside.equal} of {outside.languages} texts, "
            f"the answer in {outside.same} of {outside.prompts}"
        )
        found.append((HARMLESS, checked, ASSUMPTIONS["elsewhere"]))
    elif outside is not None:
        found.append(
            ("What it changes outside its template", elsewhere_in_words(outside), ASSUMPTIONS["elsewhere touched"])
        )
    if c.next_token is None or c.continuation is None or m is None:
        return found
    return [
        *found,
        (
            "Exact: bit-equal to the tuned embedding on the whole input",
            f"{c.exact} of {c.pairs} inputs",
            ASSUMPTIONS["exact"],
        ),
        (
            "Same greedy next token as the tuned embedding",
            f"{c.next_token.agreements} of {c.next_token.examples}; {level.format(at_least(c.next_token.lower))}",
            ASSUMPTIONS["statistical"],
        ),
        (
            f"Same greedy output as the tuned embedding, up to {c.max_new_tokens} tokens",
            f"{c.continuation.agreements} of {c.continuation.examples}; {level.format(at_least(c.continuation.lower))}",
            "As above.",
        ),
        (
            f"KS margin (heuristic): margin above 2 tau = {2 * m.tau:.3f} at alpha {m.alpha:g}",
            f"{m.certified} of {m.examples} predictions; {m.violations} of these changed all the same; "
            f"{m.outside} rows outside the patch moved by tau or more",
            ASSUMPTIONS["margin"],
        ),
    ]
