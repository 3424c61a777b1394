"""Metrics of outputs, and their bootstrap intervals; how outputs are made is outputs.py's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ksl_patch.data.recognition import recogniser
from ksl_patch.evidence.bleu import bleu_metric
from ksl_patch.evidence.outputs import Outputs
from ksl_patch.patch.evaluation import Difference, Figure, Split


def first_line(text: str) -> str:
    """The first line of an output, where a translation is."""
    return (text.strip().splitlines() or [""])[0]


class Scorer:
    """Corpus figures of systems on the same held-out pairs, with paired bootstrap intervals over sentences.

    Each system's figures come from sums of per-sentence statistics, so a resampled corpus is a weighted sum: the
    same `resamples` draws of sentences serve every system and metric (Koehn, "Statistical significance tests for
    machine translation evaluation", EMNLP 2004). chrF++ and BLEU are sacrebleu's own. The first line of an output is
    compared with the first line of its reference.

    language: of the references, which decides how BLEU cuts text into words and what `in_language` counts, a first line
    in it, as `recogniser` says; the latter is left out for a language that it does not know. source_language: what else
    an output may be in. groups: the document of each reference; documents are drawn then instead of sentences, since
    those of one document are no independent examples.
    signatures: sacrebleu's, by metric. documents: how many are drawn. notes: what was done otherwise than one expects.
    """

    def __init__(
        self,
        references: Sequence[str],
        *,
        language: str | None = None,
        source_language: str = "en",
        groups: Sequence[str] | None = None,
        resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 12345,
    ) -> None:
        from sacrebleu.metrics import CHRF

        self._references = {"": list(references), "_first_line": [first_line(text) for text in references]}
        self.confidence, self.resamples = confidence, resamples
        n = len(references)
        # A pair without a document is one by itself.
        names = [group or f"\n{i}" for i, group in enumerate(groups or [""] * n)]
        units, unit = np.unique(names, return_inverse=True)
        self.documents = None if groups is None else len(units)
        # How often each sentence is drawn, [resamples, n]; the first line is the corpus itself.
        u = len(units)
        draws = np.random.default_rng(seed).multinomial(u, np.full(u, 1 / u), size=resamples)[:, unit]
        self._draws = np.vstack([np.ones(n, dtype=np.int64), draws])
        self._known: list[tuple[Outputs, dict[str, np.ndarray]]] = []
        bleu, notes = bleu_metric(language)
        self._recognises = None if language is None else recogniser(language, source_language)
        self._one_line = all(first_line(text) == text.strip() for text in references)
        several = "References have several lines, so gains are not split into content and stopping."
        self.notes = [*notes, self._language_note(language), *([] if self._one_line else [several])]
        self._text_metrics = {"chrf": CHRF(word_order=2), "bleu": bleu}
        self.signatures = {}
        for name, metric in self._text_metrics.items():
            metric.corpus_score([""] * n, [self._references[""]])  # the signature knows the number of references then
            self.signatures[name] = str(metric.get_signature())

    def figures(self, runs: Sequence[Outputs], base: Outputs, patch: Outputs | None = None) -> dict[str, Figure]:
        """Every metric of a system: one run for each training seed, the patch's own first.

        base, patch: what those two did on the same pairs; without the latter there is no difference from the patch.
        """
        per_run, of_base = [self._resampled(outputs) for outputs in runs], self._resampled(base)
        of_patch = None if patch is None else self._resampled(patch)
        found = {}
        for name, scores in of_base.items():
            own = per_run[0][name]
            gain = self._difference(own - scores)
            found[name] = Figure(
                value=float(own[0]),
                difference=gain.value,
                low=gain.low,
                high=gain.high,
                per_seed=[float(each[name][0]) for each in per_run],
                patch_minus=None if of_patch is None or gain.low is None else self._difference(of_patch[name] - own),
            )
        return found

    def split(self, outputs: Outputs, base: Outputs) -> Split | None:
        """Where the gain of one run over the base in chrF++ comes from.

        None where references have several lines: what follows the first one is then content too.
        """
        if not self._one_line:
            return None
        own, before = self._resampled(outputs), self._resampled(base)
        raw, content = (own[name] - before[name] for name in ("chrf", "chrf_first_line"))
        return Split(
            raw=self._difference(raw), content=self._difference(content), stopping=self._difference(raw - content)
        )

    def of_base(self, base: Outputs) -> dict[str, Figure]:
        """The base's own figures, which have no difference."""
        return {
            name: Figure(value=float(scores[0]), per_seed=[float(scores[0])])
            for name, scores in self._resampled(base).items()
        }

    def _language_note(self, language: str | None) -> str:
        """What `in_language` can be at most, or why it is left out."""
        import langcodes

        if language is None:
            return "The patch names no language, so whether outputs are in it is not said."
        name = langcodes.get(language).display_name("en")
        if self._recognises is None:
            return f"py3langid does not know {name}, so whether outputs are in it is not said."
        lines = self._references["_first_line"]
        share = sum(map(self._recognises, lines)) / len(lines)
        return (
            f"py3langid takes the first lines of {share:.1%} of the references for {name}: more is not to be expected "
            "of outputs."
        )

    def _difference(self, values: np.ndarray) -> Difference:
        """A difference on the corpus and on every resampled one, [1 + resamples], with its interval."""
        if self.documents == 1:
            return Difference(value=float(values[0]))
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(values[1:], [tail, 1 - tail])
        return Difference(value=float(values[0]), low=float(low), high=float(high))

    def _resampled(self, outputs: Outputs) -> dict[str, np.ndarray]:
        """Each metric on the corpus and on every resampled one, float64 [1 + resamples]."""
        for known, scores in self._known:
            if known is outputs:
                return scores
        lines = [first_line(text) for text in outputs.texts]

        def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> np.ndarray:
            return np.asarray((self._draws @ numerator) / (self._draws @ denominator))

        one, recognises = [1.0] * len(outputs.texts), self._recognises
        found = {
            "loss": ratio(outputs.losses, outputs.tokens),
            "chrf": self._text("chrf", outputs.texts),
            "chrf_first_line": self._text("chrf", lines, "_first_line"),
            "bleu": self._text("bleu", outputs.texts),
            "bleu_first_line": self._text("bleu", lines, "_first_line"),
            "stop_rate": ratio([float(stopped) for stopped in outputs.stopped], one),
            **({"in_language": ratio([float(recognises(line)) for line in lines], one)} if recognises else {}),
            "characters": ratio([float(len(text)) for text in outputs.texts], one),
        }
        self._known.append((outputs, found))
        return found

    def _text(self, name: str, texts: list[str], part: str = "") -> np.ndarray:
        metric = self._text_metrics[name]
        # What sacrebleu's own significance tests are made of.
        statistics = np.array(metric._extract_corpus_statistics(texts, [self._references[part]]))
        return np.array([metric._compute_score_from_stats(sums.tolist()).score for sums in self._draws @ statistics])
