"""Greedy tokens of prompts, as texts, from vLLM: with patches by this package, or, of an exported model, without it.

python tests/vllm_reserved.py MODEL REQUESTS, where REQUESTS is JSON: a list of [prompt, patch file or null]. Prints the
tokens of each, and whether this package was imported, as JSON.
"""

import json
import sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model, requests = sys.argv[1], json.loads(sys.argv[2])
    files = sorted({file for _, file in requests if file})
    adapters = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64, "lora_target_modules": ["embed_tokens"]}
    llm = LLM(model, dtype="float32", max_model_len=160, enforce_eager=True, **(adapters if files else {}))
    named = {None: None}
    if files:
        from ksl_patch import Patch
        from ksl_patch.vllm import lora_request

        named |= {file: lora_request(Patch.load(file)) for file in files}
    outputs = llm.generate(
        [prompt for prompt, _ in requests], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        lora_request=[named[file] for _, file in requests], use_tqdm=False,
    )  # fmt: skip
    imported = any(name.partition(".")[0] == "ksl_patch" for name in sys.modules)
    print(json.dumps({"tokens": [list(each.outputs[0].token_ids) for each in outputs], "imported": imported}))
