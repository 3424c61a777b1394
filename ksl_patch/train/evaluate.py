"""What a model does on held-out pairs, with a patch and beside the controls that a patch is judged against.

Raw output, first line, stopping and length are separate figures: one number that mixes them misleads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ksl_patch.atomic import write_atomically
from ksl_patch.base.tensors import dtype_name
from ksl_patch.data.encoding import IGNORED, Encoded, Example, collate
from ksl_patch.data.recognition import recogniser
from ksl_patch.errors import RunError
from ksl_patch.evidence import Difference, Figure, Split
from ksl_patch.hf import Completion, PatchHandle, attach, generate
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.train.loss import answer_logits
from ksl_patch.train.progress import Reporter, SilentReporter


@dataclass(frozen=True)
class Outputs:
    """What one system did on each held-out pair.

    losses: nats, summed over the tokens of the reference; tokens: how many those are.
    token_ids: of the greedy output.
    """

    texts: list[str]
    stopped: list[bool]
    losses: list[float]
    tokens: list[int]
    token_ids: list[list[int]]


@dataclass(frozen=True)
class Cache:
    """A folder where outputs are kept and found again, by all that they depend on. base: the model's `model_digest`."""

    folder: Path
    base: str

    def file(self, *key: Any) -> Path:
        """The file of a result that depends on the key besides."""
        text = json.dumps([_OUTPUTS, self.base, *key])
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


_OUTPUTS = 3  # counts what the form or the meaning of kept outputs was


def token_limit(held_out: Encoded) -> int:
    """How many tokens an output may have by default: half as many again as the longest reference, at least 32."""
    return max(32, 16 * math.ceil(1.5 * held_out.longest_answer / 16))


@torch.no_grad()
def answer_losses(
    model: Any, examples: Sequence[Example], *, batch_size: int = 8, handle: PatchHandle | None = None
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood of each example's answer, in nats, and the number of its tokens.

    handle: whose patches the model answers with, so that those of scope "prompt" act on the prompts alone.
    """
    losses, counts = [0.0] * len(examples), [0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].answer))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = {k: v.to(model.device) for k, v in collate([examples[i] for i in part], pad=0).items()}
        labels = batch.pop("labels")
        with nullcontext() if handle is None else handle.marking(labels == IGNORED):
            logits = answer_logits(model, batch, labels)
        labels = labels[:, 1:]
        answer = labels != IGNORED
        each = torch.zeros(labels.shape, device=logits.device)
        each[answer] = F.cross_entropy(logits.float(), labels[answer].to(logits.device), reduction="none")
        for i, loss, count in zip(part, each.double().sum(dim=1).tolist(), answer.sum(dim=1).tolist(), strict=True):
            losses[i], counts[i] = loss, count
    if not math.isfinite(sum(losses)):
        raise RunError("the model's loss on these pairs is not a number: its rows or its weights are too large.")
    return losses, counts


def token_loss(
    model: Any, examples: Sequence[Example], *, batch_size: int = 8, handle: PatchHandle | None = None
) -> float:
    """Mean negative log-likelihood per answer token, in nats, over all tokens of all examples; see `answer_losses`."""
    losses, counts = answer_losses(model, examples, batch_size=batch_size, handle=handle)
    return sum(losses) / sum(counts)


def translate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    patch: Patch | None,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy output for the prompt of each example, with a patch or, for None, the base.

    What ends the examples' answers ends an output too. advance: is told how many more have their output.
    """
    prompts = [example.prompt for example in examples]
    return generate(
        model, tokenizer, prompts, [patch] * len(prompts), max_new_tokens=max_new_tokens, batch_size=batch_size,
        ends=[example.answer[-1] for example in examples], advance=advance,
    )  # fmt: skip


def run(
    model: Any,
    tokenizer: Any,
    held_out: Encoded,
    patch: Patch | None,
    *,
    max_new_tokens: int,
    cache: Cache | None = None,
    reporter: Reporter | None = None,
    stage: str = "",
) -> Outputs:
    """What the model does with a patch, or, for None, by itself. reporter: is told of it as `stage`."""
    reporter, done = reporter or SilentReporter(), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        reporter.step(done)

    file = None
    if cache is not None:
        file = cache.file(
            patch.digest if patch else None, dtype_name(model.dtype), model.device.type, max_new_tokens,
            held_out.digest, held_out.examples,
        )  # fmt: skip
        with suppress(OSError, ValueError, TypeError):  # none yet, or one that was cut
            return Outputs(**json.loads(file.read_bytes()))
    reporter.begin(stage, len(held_out))
    with attach(model) as handle:
        slot = 0 if patch is None else handle.bank.add(slot_rows(patch))
        with handle.serving(slot):
            losses, tokens = answer_losses(model, held_out.examples, handle=handle)
    completions = translate(model, tokenizer, held_out.examples, patch, max_new_tokens=max_new_tokens, advance=advance)
    reporter.end()
    outputs = of_completions(completions, losses, tokens)
    if file is not None:
        write_atomically(file, json.dumps(asdict(outputs), ensure_ascii=False).encode())
    return outputs


def of_completions(completions: Sequence[Completion], losses: list[float], tokens: list[int]) -> Outputs:
    """Greedy outputs and losses of the references, together."""
    return Outputs(
        texts=[completion.text.strip() for completion in completions],
        stopped=[completion.stopped for completion in completions],
        losses=losses,
        tokens=tokens,
        token_ids=[list(completion.token_ids) for completion in completions],
    )


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
        bleu, notes = _bleu(language)
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


# How BLEU cuts text in scripts that put no spaces between words, or are not to be cut at them: sacrebleu's tokenizers.
# The morphological ones are packages of their own, without which characters are counted.
_WORDS = {"Hans": "zh", "Hant": "zh", "Hani": "zh", "Jpan": "ja-mecab", "Kore": "ko-mecab", "Hang": "ko-mecab"}
_NO_SPACES = ("Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Lana", "Tale", "Talu", "Java", "Bali")


def _words(language: str | None) -> tuple[Any, list[str]]:
    import langcodes
    from sacrebleu.metrics import BLEU

    # "zho", "cmn" and "lzh" are written as "zh" is.
    script = langcodes.get(langcodes.standardize_tag(language, macro=True)).maximize().script if language else None
    name = _WORDS.get(script or "", "char" if script in _NO_SPACES else "13a")
    try:
        return BLEU(tokenize=name), []
    except RuntimeError:
        extra = name.partition("-")[0]
        note = f"BLEU is over characters, since sacrebleu's tokenizer {name} is not installed: pip install "
        return BLEU(tokenize="char"), [f"{note}'sacrebleu[{extra}]'."]


def _bleu(language: str | None) -> tuple[Any, list[str]]:
    """BLEU over Flores' pieces (spBLEU) where their model can be had, else over the language's words, with a note."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.utils import SACREBLEU_DIR

    model = Path(SACREBLEU_DIR) / "models" / "flores200sacrebleuspm"
    timeout = socket.getdefaulttimeout()
    try:
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not model.is_file():
            raise OSError("HF_HUB_OFFLINE is set")
        socket.setdefaulttimeout(10)  # sacrebleu downloads it without a limit of its own
        return BLEU(tokenize="flores200"), []
    except (Exception, SystemExit) as error:  # a network's many, and sacrebleu's own exit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        bleu, notes = _words(language)
        return bleu, [
            f"BLEU's words are those of sacrebleu's tokenizer {bleu.tokenizer_signature}; it is not spBLEU, whose "
            f"tokenizer model, which sacrebleu downloads, is not at hand ({reason}).",
            *notes,
        ]
    finally:
        socket.setdefaulttimeout(timeout)
