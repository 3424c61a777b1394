"""The same prompt under two patches, with vLLM's prefix cache as it is and with the adapter taken out of its key.

VLLM_ENABLE_V1_MULTIPROCESSING=0 python tests/vllm_without_key.py BASE
"""

import json
import sys

if __name__ == "__main__":
    import torch
    import transformers
    from test_hf import overwritten, some_patch
    from vllm import LLM, SamplingParams
    from vllm.v1.core import kv_cache_utils

    from ksl_patch.vllm import lora_request

    base = sys.argv[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    patches = [some_patch(model, seed, list(range(2, 372, 12))) for seed in range(2)]
    llm = LLM(
        base, dtype="float32", max_model_len=160, enforce_eager=True, block_size=32, enable_lora=True, max_loras=2,
        max_lora_rank=64, lora_target_modules=["embed_tokens"],
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    results = {}
    for number, key in enumerate(("with", "without")):
        if key == "without":
            kv_cache_utils._gen_lora_extra_hash_keys = lambda request: []
        ids = torch.randint(2, 400, (100,), generator=torch.Generator().manual_seed(number))
        for patch in patches:
            output = llm.generate(
                [{"prompt_token_ids": ids.tolist()}], params, lora_request=lora_request(patch), use_tqdm=False
            )[0]
        right = overwritten(model, patch).generate(
            ids[None], do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=1
        )[0, 100:]
        same = list(output.outputs[0].token_ids) == right.tolist()
        results[key] = {"cached": output.num_cached_tokens, "right": same}
    print(json.dumps(results))
