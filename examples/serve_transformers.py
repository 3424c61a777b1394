"""One base in memory, another language for every prompt of a batch. `make demo` has built the two patches.

python examples/serve_transformers.py .demo
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ksl_patch import attach

SENTENCE = "Click the network icon and choose your wireless network."

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".demo")
    tokenizer = AutoTokenizer.from_pretrained(folder / "gemma3", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "gemma3", dtype=torch.bfloat16)

    with attach(model, tokenizer=tokenizer) as handle:
        for language in ("de", "ru"):
            handle.load(folder / f"{language}.safetensors", language)
        prompts = [handle.meta(language).template.render(SENTENCE) for language in ("de", "ru")]
        batch = tokenizer([*prompts, "The capital of France is"], padding=True, return_tensors="pt")
        with handle.using(["de", "ru", None]):
            output = model.generate(**batch, max_new_tokens=32, do_sample=False)
    for text in tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True):
        print(text.strip().splitlines()[0])
