"""A TrainableTokens adapter made with PEFT, served by vLLM beside the base.

python examples/serve_trainable_tokens.py .demo        (with the environment of `make vllm`)
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

if __name__ == "__main__":
    import torch
    from peft import TrainableTokensConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base = str(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo") / "gemma3")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = TrainableTokensConfig(token_indices=[504, 3575, 282], target_modules=["embed_tokens"])
    peft = get_peft_model(model, config)
    with torch.no_grad():  # where training would be
        for name, parameter in peft.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))

    with tempfile.TemporaryDirectory() as adapter:
        peft.save_pretrained(adapter)
        llm = LLM(
            base,
            enable_lora=True,
            max_loras=4,
            max_lora_rank=8,
            lora_target_modules=["embed_tokens"],
            max_model_len=512,
        )
        outputs = llm.generate(
            ["The capital of France is"] * 2,
            SamplingParams(temperature=0, max_tokens=16),
            lora_request=[LoRARequest("tokens", 1, adapter), None],
        )
    for who, output in zip(("adapter", "base"), outputs, strict=True):
        print(f"{who}: {output.outputs[0].text.strip()!r}")
