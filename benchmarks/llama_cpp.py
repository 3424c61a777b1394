"""A model with patches in it, by llama.cpp and by transformers: the same greedy text, and where the base's is another.

ksl-patch export DE RU --base BASE --format model -o MODEL
python convert_hf_to_gguf.py MODEL --outfile MODEL.gguf --outtype bf16      # of llama.cpp's source
pip install xllamacpp
python benchmarks/llama_cpp.py MODEL MODEL.gguf BASE
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from machine import machine

RESULT = Path(__file__).parent / "results" / "llama-cpp.json"
SENTENCES = ("Open the file.", "The network is not available.", "Click the button to save your work.")
NEW_TOKENS = 24


def prompts(folder):
    """Each patch's own prompt of each sentence, and one that no patch has."""
    patches = json.loads((folder / "ksl_patch.json").read_text())["patches"]
    templates = {patch["name"]: patch["template"]["text"] for patch in patches}
    templates["none"] = "Translate this sentence from English to German.\nEnglish: {source}\nGerman:"
    return {
        f"{name} {i}": text.replace("{source}", sentence)
        for name, text in templates.items()
        for i, sentence in enumerate(SENTENCES)
    }


def by_llama_cpp(file, asked):
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = file, 1024, 1, False
    server = xllamacpp.Server(settings)

    def answer(prompt):
        found = server.handle_completions({"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0})
        return {"text": found["choices"][0]["text"], "prompt_tokens": found["usage"]["prompt_tokens"]}

    return {name: answer(prompt) for name, prompt in asked.items()}


def by_transformers(folder, asked):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(prompt):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        return {"text": tokenizer.decode(found, skip_special_tokens=True), "prompt_tokens": ids.shape[1]}

    return {name: answer(prompt) for name, prompt in asked.items()}


def main(model, gguf, base):
    if gguf == "-":  # the part of another process, whose stdout llama.cpp writes into
        Path(base).write_text(json.dumps(by_llama_cpp(model, json.loads(sys.stdin.read()))))
        return
    asked = prompts(Path(model))
    answers = Path(gguf).with_suffix(".json")
    subprocess.run(
        [sys.executable, __file__, gguf, "-", answers], input=json.dumps(asked), text=True, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found, ours, plain = json.loads(answers.read_text()), by_transformers(model, asked), by_transformers(base, asked)
    result = {
        "machine": machine(), "xllamacpp": version("xllamacpp"), "new_tokens": NEW_TOKENS, "prompts": len(asked),
        "same_as_transformers": sum(found[name] == ours[name] for name in asked),
        "same_as_base": {
            "patches' prompts": sum(found[name] == plain[name] for name in asked if not name.startswith("none")),
            "other prompts": sum(found[name] == plain[name] for name in asked if name.startswith("none")),
        },
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
