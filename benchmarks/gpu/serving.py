"""What vLLM does with patches on one GPU: every answer checked, then throughput and loading. Without network.

    python benchmarks/gpu/serving.py [--output benchmarks/results/serving-vllm-gpu.json]
    python benchmarks/gpu/serving.py --shape tiny   # the script itself, on a CPU

Compiled, under CUDA graphs and asynchronous scheduling, as `ksl-patch serve` starts vLLM. An answer is right if it has
the tokens of the same batch by the same engine while its table is overwritten by hand. Exit code 1 otherwise.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine, report, show

CUDA = torch.cuda.is_available()
# On a CPU vLLM's head has its own copy of the table, which overwriting the table by hand does not change.
LLAMA = {"initializer_range": 0.05, "max_position_embeddings": 2048, "tie_word_embeddings": CUDA}
SHAPES = {
    "8b": LLAMA | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": LLAMA | {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip
ROWS, CONTENTS, COUNT, SEED = 18, 8, 88, 7


def table(shape):
    """The table that every engine gets in place of vLLM's dummy, whose values are too small to matter: [V, d] bf16."""
    V, d = shape["vocab_size"], shape["hidden_size"]
    return (0.5 * torch.randn(V, d, generator=torch.Generator().manual_seed(SEED))).bfloat16()


def write(folder, shape, count):
    """The base's configuration, and patches 0..count-1 of its table, the first CONTENTS for the head too."""
    import transformers

    from ksl_patch import Patch

    config = transformers.LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | {"num_hidden_layers": 0})))
    model.to_empty(device="cpu").bfloat16()
    model.tie_weights()
    model.get_input_embeddings().weight.data.copy_(table(shape))
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        ids = torch.randperm(shape["vocab_size"] - 3, generator=g)[:ROWS] + 3
        rows = 0.5 * torch.randn(ROWS, shape["hidden_size"], generator=g)
        side = "input+output" if CUDA and number < CONTENTS else "input"
        Patch.from_model(model, ids, rows, name=f"p{number}", side=side).save(Path(folder) / f"{number}.safetensors")


def start(folder, shape, kind, **options):
    """vLLM with dummy weights, but for the table. kind: plain, ours, or stock (its own LoRA of the embedding)."""
    from vllm import LLM

    if kind != "plain":
        options = {"enable_lora": True, "lora_target_modules": ["embed_tokens"], "max_lora_rank": 32} | options
    if kind == "ours":
        options |= {"max_cpu_loras": 256, "additional_config": {"ksl_patch": {"max_rows": 2 * ROWS}}}
    if CUDA:
        options |= {"async_scheduling": True}
    llm = LLM(
        folder, load_format="dummy", dtype="bfloat16", max_model_len=1024, skip_tokenizer_init=True, max_num_seqs=64,
        enable_prefix_caching=False, **options,
    )  # fmt: skip
    weight = embedding(llm).weight
    weight[: shape["vocab_size"]].copy_(table(shape))
    return llm


def embedding(llm):
    layer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.model.embed_tokens
    return getattr(layer, "base_layer", layer)


class Truth:
    """The table, which the head reads too, with a patch's rows for a `with` block."""

    def __init__(self, llm, patch):
        self.weight, self.patch = embedding(llm).weight, patch

    def __enter__(self):
        self.kept = self.weight[self.patch.token_ids].clone()
        self.weight[self.patch.token_ids] = self.patch.rows.to(self.weight)

    def __exit__(self, *_):
        self.weight[self.patch.token_ids] = self.kept


def prompts(batch, shape, patches, seed=0):
    """Prompts of 5 to 200 tokens, each with tokens of all patches in it."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([patch.token_ids for patch in patches])
    texts = []
    for row in range(batch):
        own = torch.randint(3, shape["vocab_size"], (5 + 37 * row % 196,), generator=g)
        theirs = ids[torch.randperm(len(ids), generator=g)[:32]]
        texts.append({"prompt_token_ids": torch.cat([own, theirs]).tolist()})
    return texts


def answers(llm, texts, requests, count=24, **more):
    """Of each request its tokens and their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0, **more)
    outputs = llm.generate(texts, params, lora_request=requests, use_tqdm=False)
    found = []
    for output in outputs:
        scores = [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]
        scores += [next(iter(entry.values())).logprob for entry in (output.prompt_logprobs or [])[1:]]
        found.append((list(output.outputs[0].token_ids), scores))
    return found


def overwritten(llm, texts, choices, **more):
    """What the same batch says with the table of each choice; of each row its own choice's answer."""
    wanted = [None] * len(texts)
    for choice in set(choices):
        if choice is None:
            found = answers(llm, texts, [None] * len(texts), **more)
        else:
            with Truth(llm, choice):
                found = answers(llm, texts, [None] * len(texts), **more)
        for row, own in enumerate(choices):
            if own is choice:
                wanted[row] = found[row]
    return wanted


def compare(what, found, wanted, failures):
    wrong = [row for row, (one, other) in enumerate(zip(found, wanted, strict=True)) if one[0] != other[0]]
    equal = sum(one == other for one, other in zip(found, wanted, strict=True))
    print(
        f"{'wrong' if wrong else 'ok   '} {what}: {len(found) - len(wrong)} of {len(found)} rows, {equal} bit for bit"
    )
    if wrong:
        failures.append(what)


def check(folder, shape, failures):
    """Mixed batches, more contents than slots, a name that changes in flight, log-probabilities of prompts, sleep."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from ksl_patch import Patch

    patches = [Patch.load(Path(folder) / f"{number}.safetensors") for number in range(CONTENTS)]
    requests = [
        LoRARequest(f"p{number}", number + 1, str(Path(folder) / f"{number}.safetensors")) for number in range(CONTENTS)
    ]
    sleeps = {"enable_sleep_mode": True} if CUDA else {}
    llm = start(folder, shape, "ours", max_loras=2, **sleeps, **share(0.8))

    def mixed(batch, contents, what, **more):
        texts = prompts(batch, shape, patches, seed=batch)
        own = [None if row % (contents + 1) == contents else row % (contents + 1) for row in range(batch)]
        found = answers(llm, texts, [None if n is None else requests[n] for n in own], **more)
        compare(
            what, found, overwritten(llm, texts, [None if n is None else patches[n] for n in own], **more), failures
        )

    for batch in (1, 3, 7, 8, 9, 33):
        mixed(batch, 2, f"a mixed batch of {batch}")
    mixed(24, len(patches), f"{len(patches)} contents and 2 slots")
    mixed(5, 2, "log-probabilities of prompts", prompt_logprobs=0)

    engine, texts = llm.llm_engine, prompts(8, shape, patches, seed=99)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    done = {}
    for row, text in enumerate(texts):
        choice = LoRARequest("name", 100 + row // 4, requests[row // 4].lora_path)
        engine.add_request(str(row), text, params, lora_request=choice)
        if row == 3:
            for _ in range(6):
                done |= {out.request_id: out for out in engine.step() if out.finished}
    while engine.has_unfinished_requests():
        done |= {out.request_id: out for out in engine.step() if out.finished}
    wanted = overwritten(llm, texts, [patches[row // 4] for row in range(8)])
    tokens = [(list(done[str(row)].outputs[0].token_ids), None) for row in range(8)]
    compare("a name that gets another content in flight", tokens, [(ids, None) for ids, _ in wanted], failures)

    if sleeps:
        for level in (1, 2):
            before = answers(llm, texts, [None] * 8)
            llm.sleep(level)
            llm.wake_up()
            if level == 2:
                llm.collective_rpc("reload_weights")
                embedding(llm).weight[: shape["vocab_size"]].copy_(table(shape))
            compare(f"the base after sleep of level {level}", answers(llm, texts, [None] * 8), before, failures)


def share(part):
    return {"gpu_memory_utilization": part} if CUDA else {}


def throughput(folder, shape, kind, tokens):
    """One engine: tokens a second with so many patches in a batch of 64, and what a load takes, idle and under load."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    slots = {"ours": {"max_loras": 64}, "stock": {"max_loras": 16}, "plain": {}}[kind]
    llm = start(folder, shape, kind, **slots, **share(0.8))
    g = torch.Generator().manual_seed(1)
    texts = [
        {"prompt_token_ids": torch.randint(3, shape["vocab_size"], (128,), generator=g).tolist()} for _ in range(64)
    ]
    suffix = {"ours": ".safetensors", "stock": "-lora", "plain": ""}[kind]

    def adapter(number):
        path = Path(folder) / f"{CONTENTS + number}{suffix}"  # for the input alone, as vLLM's own LoRA of it
        return LoRARequest(f"p{number}", number + 1, str(path))

    result = {}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for count in {"plain": (0,), "ours": (1, 16, 64), "stock": (1, 16)}[kind]:
        requests = [adapter(row % count) if count else None for row in range(64)]
        llm.generate(texts, params, lora_request=requests, use_tqdm=False)
        times = []
        for _ in range(3):
            start_of_round = time.perf_counter()
            llm.generate(texts, params, lora_request=requests, use_tqdm=False)
            times.append(time.perf_counter() - start_of_round)
        result[f"{kind}, {count} adapters" if count else kind] = 64 * tokens / statistics.median(times)
    loads = {"idle": [], "under load": []}
    if kind != "plain":
        engine = llm.llm_engine
        for number in range(8):
            start_of_load = time.perf_counter()
            engine.add_lora(adapter(64 + number))
            loads["idle"].append(1e3 * (time.perf_counter() - start_of_load))
        for row, text in enumerate(texts):
            engine.add_request(str(row), text, params, lora_request=adapter(0))
        for number in range(8):
            engine.step()
            start_of_load = time.perf_counter()
            engine.add_lora(adapter(72 + number))
            loads["under load"].append(1e3 * (time.perf_counter() - start_of_load))
    return {"tokens_per_second": result, "load_ms": {name: statistics.median(v) for name, v in loads.items() if v}}


def write_stock(folder, shape):
    """vLLM's own LoRA of the same rows, for the adapters that are loaded."""
    from safetensors.torch import save_file

    from ksl_patch import Patch

    V, d = shape["vocab_size"], shape["hidden_size"]
    for number in range(CONTENTS, COUNT):
        patch = Patch.load(Path(folder) / f"{number}.safetensors")
        A, B = torch.zeros(32, V, dtype=torch.bfloat16), torch.zeros(d, 32, dtype=torch.bfloat16)
        A[torch.arange(ROWS), patch.token_ids] = 1
        B[:, :ROWS] = (patch.rows.float() - patch.base_rows.float()).T.bfloat16()
        where = Path(folder) / f"{number}-lora"
        where.mkdir()
        key = "base_model.model.model.embed_tokens.lora_embedding_"
        save_file({f"{key}A": A, f"{key}B": B}, where / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": ["embed_tokens"]}
        (where / "adapter_config.json").write_text(json.dumps(config))


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="8b")
@click.option("--tokens", default=128, help="Tokens of an answer, for throughput.")
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--part", hidden=True)
@click.option("--folder", hidden=True)
def main(shape, tokens, output, part, folder):
    sizes = SHAPES[shape]
    if part == "check":
        failures = []
        check(folder, sizes, failures)
        sys.exit(bool(failures))
    if part:
        print(json.dumps(throughput(folder, sizes, part, tokens)))
        return
    device = "cuda" if CUDA else "cpu"
    results = {"machine": machine(device), "shape": shape, "rows": ROWS, "batch": 64, "tokens": tokens}
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        write(scratch, sizes, COUNT)
        write_stock(scratch, sizes)
        for name in ("check", "plain", "ours", "stock"):
            command = [sys.executable, __file__, "--shape", shape, "--tokens", str(tokens)]
            # Stock is vLLM as it comes, without this package's plugin.
            more = {"VLLM_PLUGINS": "none"} if name in ("plain", "stock") else {}
            done = subprocess.run(
                [*command, "--part", name, "--folder", scratch], env=os.environ | settings | more, text=True,
                stdout=subprocess.PIPE, check=False,
            )  # fmt: skip
            lines = done.stdout.splitlines()
            if name == "check":
                results["checked"] = [line for line in lines if line.startswith(("ok ", "wrong "))]
                print("\n".join(results["checked"]))
            elif done.returncode == 0:
                results[name] = json.loads(next(line for line in lines if line.startswith("{")))
            if done.returncode:
                results["failed"] = [*results.get("failed", []), name]
    plain = results.get("plain", {}).get("tokens_per_second", {}).get("plain")
    speeds = [
        (f"{speed / plain:.3f}" if plain else "", f"{speed:,.0f}", name)
        for kind in ("plain", "ours", "stock")
        for name, speed in results.get(kind, {}).get("tokens_per_second", {}).items()
    ]
    show("Throughput, one engine after the other", ("of plain", "tokens/s", "engine"), speeds)
    loads = [
        (f"{took:.2f}", f"{kind}, {when}")
        for kind in ("ours", "stock")
        for when, took in results.get(kind, {}).get("load_ms", {}).items()
    ]
    show("Loading one more adapter", ("ms", "engine"), loads)
    report(results, output)
    sys.exit(bool(results.get("failed")))


if __name__ == "__main__":
    main()
