"""One rank of a model under a tensor parallel plan; `test_attach.py` launches two.

python -m torch.distributed.run --nproc-per-node 2 tests/tensor_parallel.py BASE PATCH
"""

import json
import sys

import torch
import transformers
from transformers.distributed import DistributedConfig

from ksl_patch import Patch, attach

if __name__ == "__main__":
    base, file = sys.argv[1:]
    torch.set_num_threads(1)
    plan = DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, distributed_config=plan).eval()
    prompts = torch.tensor([[5, 9, 300, 17, 40], [17, 17, 5, 251, 9]])
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    with attach(model) as handle, torch.no_grad():
        name = handle.load(Patch.load(file))
        with handle.using([name, None]):
            tokens = model.generate(prompts, **settings).tolist()
    weight = model.model.layers[0].self_attn.q_proj.weight
    shard = list(getattr(weight, "_local_tensor", weight).shape)
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"tokens": tokens, "shard": shard}))
