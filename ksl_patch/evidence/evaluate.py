"""Runs base, patch and controls on the same pairs and makes the evaluation; intervals are scorer.py's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from ksl_patch.base.reserved import ReservedTokens
from ksl_patch.data.encoding import Encoded, check_ids, encode, source_tokens
from ksl_patch.data.pairs import Pair, distinct
from ksl_patch.data.sketch import seen
from ksl_patch.errors import DataError, RunError
from ksl_patch.evidence.elsewhere import elsewhere_in, elsewhere_of, other_text
from ksl_patch.evidence.outputs import Cache, Outputs, outputs_of, token_limit
from ksl_patch.evidence.scorer import Scorer
from ksl_patch.hf import end_token_id, prompt_ids
from ksl_patch.patch import Patch, TemplateMeta
from ksl_patch.patch.evaluation import SYSTEMS, Evaluation, Occurrence, Sample, SystemScores
from ksl_patch.train.build import Build
from ksl_patch.train.progress import Reporter
from ksl_patch.train.reserved import check_reached

_SAMPLES = 6
_SAMPLE_CHARACTERS = 600  # the text of a model that does not stop is long


def evaluate(
    model: Any,
    tokenizer: Any,
    held_out: Encoded,
    systems: dict[str, dict[int, Patch]],
    reporter: Reporter,
    *,
    max_new_tokens: int | None = None,
    cache: Cache | None = None,
    resamples: int = 1000,
    part: str | None = None,
    uses: int | None = None,
    source_language: str | None = None,
    prompts: Mapping[str, TemplateMeta] | None = None,
) -> Evaluation:
    """Run every system and the base on held-out pairs, and score them; see `Scorer` for the intervals.

    max_new_tokens: by default what `token_limit` says. cache: where finished runs are kept, so that an evaluation that
    was cut off continues. part: which pairs these are (`Evaluation`); uses: how many patches were measured on them.
    source_language: of the pairs, which an output may be in; English, with a note, where it is not known.
    prompts: of systems that answer another one than the pairs are in, by name; "base" among them.
    """
    own = next(iter(systems["patch"].values()))
    scorer = Scorer(
        held_out.references, language=own.meta.language, source_language=source_language or "en",
        groups=held_out.groups, resamples=resamples,
    )  # fmt: skip
    max_new_tokens = max_new_tokens or token_limit(held_out)

    prompts, end = prompts or {}, end_token_id(model, tokenizer)
    pairs = held_out.pairs
    asked = {name: encode(prompt, pairs, tokenizer, end) for name, prompt in prompts.items()}

    def of(patch: Patch | None, name: str) -> Outputs:
        return outputs_of(
            model, tokenizer, asked.get(name, held_out), patch, max_new_tokens=max_new_tokens, cache=cache,
            reporter=reporter, stage=f"answers: {SYSTEMS.get(name, name)}",
        )  # fmt: skip

    base = of(None, "base")
    texts = elsewhere_of(model, tokenizer, None, cache, reporter)
    scores = [SystemScores(name="base", rows=[0], seeds=[], figures=scorer.of_base(base) | other_text(None, texts))]
    runs: dict[str, list[Outputs]] = {}
    for name, patches in systems.items():
        for patch in patches.values():
            runs.setdefault(name, []).append(of(patch, name))
    reporter.note("scoring", f"Scoring, with {scorer.resamples:,} resamples of the text ...")
    found = {
        name: elsewhere_in(model, tokenizer, next(iter(patches.values())), texts, cache, reporter)
        for name, patches in systems.items()
    }
    for name, patches in systems.items():
        scores.append(
            SystemScores(
                name=name,
                rows=[len(patch.token_ids) for patch in patches.values()],
                seeds=list(patches),
                figures=scorer.figures(runs[name], base, None if name == "patch" else runs["patch"][0])
                | other_text(found[name], texts),
                split=scorer.split(runs[name][0], base),
            )
        )
    seeds = len(systems["patch"])
    rows, about_rows = occurrences(tokenizer, held_out, own)
    assumed = source_language is None and any("in_language" in score.figures for score in scores)
    guess = "The pairs' own language is not known here; it is taken to be English where an output's language is told."
    notes = [
        *scorer.notes, *([guess] if assumed else []), *_notes(scores, scorer, seeds, part, uses),
        *_limit_notes(held_out, max_new_tokens), *about_rows, *_prompt_notes(prompts, systems),
    ]  # fmt: skip
    return Evaluation(
        pairs=len(held_out),
        data_digest=held_out.digest,
        loss_base=scores[0].figures["loss"].value,
        loss_patch=next(each for each in scores if each.name == "patch").figures["loss"].per_seed[0],
        max_new_tokens=max_new_tokens,
        confidence=scorer.confidence,
        resamples=scorer.resamples,
        signatures=scorer.signatures,
        notes=notes,
        part=part,
        documents=scorer.documents,
        occurrences=rows,
        elsewhere=found["patch"],
        systems=scores,
        samples=[
            Sample(
                source=pair.source,
                reference=pair.target,
                base=_cut(before),
                patch=_cut(after),
            )
            for pair, before, after in zip(held_out.pairs, base.texts, runs["patch"][0].texts, strict=True)
        ][:_SAMPLES],
    )


def occurrences(tokenizer: Any, held_out: Encoded, patch: Patch) -> tuple[list[Occurrence], list[str]]:
    """How often each row of the patch is read in the pairs, and what a reader must know of it.

    Where the tokenizer does not say which characters a token covers, instruction and source are counted as one.
    """
    found = {part: Counter[int]() for part in ("source", "prompt", "answer", "prompts")}
    apart = True
    for example, pair in zip(held_out.examples, held_out.pairs, strict=True):
        inside = source_tokens(tokenizer, held_out.template, pair)
        if inside is None:
            apart, inside = False, [False] * len(example.prompt)
        found["source"].update(token for token, here in zip(example.prompt, inside, strict=True) if here)
        found["prompt"].update(example.prompt)
        found["answer"].update(example.answer[:-1])  # the last is only ever predicted
        found["prompts"].update(set(example.prompt))
    rows = [
        Occurrence(
            token_id=i,
            token=token,
            instruction=found["prompt"][i] - found["source"][i] if apart else None,
            source=found["source"][i] if apart else None,
            prompt=found["prompt"][i],
            answer=found["answer"][i],
            share=found["prompts"][i] / len(held_out),
        )
        for i, token in zip(patch.token_ids.tolist(), patch.meta.tokens or repeat(None), strict=False)
    ]
    note = "The tokenizer does not say which characters a token covers: rows are counted in prompts as a whole."
    return rows, [] if apart else [note]


def _cut(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " […]"


def _notes(scores: Sequence[SystemScores], scorer: Scorer, seeds: int, part: str | None, uses: int | None) -> list[str]:
    """What the figures do not say by themselves."""
    level = f"{100 * scorer.confidence:.10g} %"
    notes = []
    if seeds > 1:
        notes.append(
            f"Values and intervals are those of the patch's own training seed; {seeds} seeds were trained, whose range "
            "stands beside. An interval over held-out text says nothing of other trainings."
        )
    else:
        notes.append("One training seed: how far another one's patch would be from this was not measured (--seeds).")
    n = scorer.documents
    if n == 1:
        notes.append("All pairs are of one document, so there are no intervals: they are no independent examples.")
    elif n is not None:
        few = ", too few to trust them," if n < 20 else ""
        notes.append(f"Intervals resample {n} documents{few} and not sentences, which are not independent.")
    figures = [figure for system in scores for figure in system.figures.values()]
    intervals = sum((figure.low is not None) + (figure.patch_minus is not None) for figure in figures)
    intervals += sum(system.split is not None and system.split.stopping.low is not None for system in scores)
    if intervals:
        missing = intervals * (1 - scorer.confidence)
        notes.append(
            f"These are {intervals} intervals of {level}, each by itself: about {missing:.1f} of them would miss by "
            "chance alone. Say beforehand which one counts."
        )
    if part == "dev":
        notes.append("These are the dev pairs, which choices are made on: figures to publish come from others.")
    elif uses is not None and uses > 1:
        notes.append(
            f"{uses} patches of this run folder were measured on these pairs, or some of them. If one of them was "
            "chosen by that, its figures here are too good: choose on the dev pairs (--part dev)."
        )
    elif uses == 1:
        notes.append("No other patch of this run folder was measured on any of these pairs.")
    return notes


def _prompt_notes(prompts: Mapping[str, TemplateMeta], systems: Mapping[str, Any]) -> list[str]:
    """Which systems answer another prompt than the patch, and which."""
    said: dict[str, list[str]] = {}
    for name, template in prompts.items():
        if name == "base" or name in systems:
            said.setdefault(template.text, []).append(SYSTEMS.get(name, name))
    return [f"Another prompt than the patch's, {text!r}, has: {', '.join(names)}." for text, names in said.items()]


def _limit_notes(held_out: Encoded, max_new_tokens: int) -> list[str]:
    """What is cut by a limit on new tokens."""
    longer = sum(len(example.answer) > max_new_tokens for example in held_out.examples)
    if not longer:
        return []
    return [
        f"{longer} of {len(held_out)} references are longer than the {max_new_tokens} tokens at which outputs are cut "
        f"(the longest has {held_out.longest_answer}): a right answer to them is cut too. Raise --max-new-tokens."
    ]


def encode_test(
    patch: Patch, model: Any, tokenizer: Any, pairs: list[Pair], build: Build | None, reporter: Reporter
) -> Encoded:
    """Other pairs than the build's held-out ones, in the patch's template; of repeated sources the first.

    Raises DataError when the training read some of them, RunError for a patch without a template.
    """
    kept = distinct(pairs)
    if len(kept) < len(pairs):
        count = len(pairs) - len(kept)
        reporter.note(
            "duplicates",
            f"{count} of the {len(pairs)} test pairs were left out: their source occurs before",
            pairs=count,
        )
    training = patch.meta.training
    if build is not None:
        chosen = {pair.key for part in (build.pairs.dev, build.pairs.validation) for pair in part}
        trained = {pair.key for pair in build.pairs.train}
        read, whole = sum(pair.key in trained for pair in kept), True
        if count := sum(pair.key in chosen for pair in kept):
            message = f"{count} of the test pairs are dev or validation pairs: choices may have been made on them"
            reporter.note("dev", message, pairs=count)
    else:
        read, whole = seen(training.sources, kept) if training and training.sources else (0, True)
    if read:
        raise DataError(
            f"{'' if whole else 'at least '}{read} of the {len(kept)} test pairs are in the patch's own training data, "
            "so they say nothing about new text; give pairs that no training saw."
        )
    if not whole:
        message = "the patch holds hashes of a part of its training sentences: only these were compared with the test"
        reporter.note("sampled", message)
    if build is None and (training is None or training.sources is None):
        reporter.note("unchecked", "the patch does not say what it was trained on: it may have seen the test pairs")
    if build is not None:
        return build.encode(kept, "test")
    if patch.meta.template is None:
        raise RunError("the patch names no prompt template, so there is nothing to put the sentences into.")
    template = patch.meta.template
    encoded = encode(template, kept, tokenizer, end_token_id(model, tokenizer))
    if template.unpatched is not None:
        ids = set(ReservedTokens(tokenizer, model).in_text(template.text)).intersection(patch.token_ids.tolist())
        [whole_template] = prompt_ids(tokenizer, [template.text], chat=template.chat)
        check_reached(ids, encoded, sum(token in ids for token in whole_template))
    check_ids((e.prompt + e.answer for e in encoded.examples), patch.meta.base.vocab_size)
    return encoded
