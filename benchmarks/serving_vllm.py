"""Serving many patches with vLLM, beside vLLM without adapters and its own embedding LoRA of the same rows, in one run.

    python benchmarks/serving_vllm.py --base .demo/gemma3 [--output benchmarks/results/serving-vllm-cpu.json]
    python benchmarks/serving_vllm.py --random llama-8b-embedding --rows 18 --skip-throughput

Every engine lives in a process of its own that sleeps while the others work; they take turns, and the ratios are those
of one round. vLLM compiles its plain model on CPUs, and ours; it does not compile where a LoRA has kernels of its own.
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
from machine import machine, paired, report, show

SHAPES = {
    "llama-8b-embedding": {  # the table of Llama 3 8B over one of its layers
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
STOCK_SLOTS = 4


def worker(base, kind, count, rows, batch, tokens, folder, eager):
    """One engine; reads commands from stdin and prints what they took as JSON."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": batch, "enable_prefix_caching": False}
    options |= {"enforce_eager": eager}
    if kind != "plain":
        options |= {"enable_lora": True, "max_loras": count, "lora_target_modules": ["embed_tokens"]}
        options |= {"max_lora_rank": max(8, 1 << (rows - 1).bit_length())}
    if kind == "ours":
        options |= {"max_cpu_loras": count + 64, "additional_config": {"ksl_patch": {"max_rows": rows}}}
    llm = LLM(base, skip_tokenizer_init=True, disable_log_stats=True, **options)
    V = llm.llm_engine.model_config.get_vocab_size()
    g = torch.Generator().manual_seed(0)
    prompts = [{"prompt_token_ids": torch.randint(3, V, (32,), generator=g).tolist()} for _ in range(batch)]

    def adapter(number):
        path = f"{folder}/{number}.safetensors" if kind == "ours" else f"{folder}/lora{number}"
        return LoRARequest(f"p{number}", number + 1, path)

    def generate(count_of_tokens, prompts, requests):
        params = SamplingParams(temperature=0, max_tokens=count_of_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return time.perf_counter() - start

    loaded = 0 if kind == "plain" else count
    for number in range(loaded):
        llm.llm_engine.add_lora(adapter(number))
    # Every row another choice: the base, and patches in turn.
    choices = [None if not loaded or row % 4 == 3 else adapter(row * 61 % loaded) for row in range(batch)]
    print(json.dumps({"ready": True}), flush=True)
    turn = 0
    for line in sys.stdin:
        command = json.loads(line)
        if command == "run":
            answer = {"seconds": generate(tokens, prompts, choices), "first": generate(1, prompts[:1], choices[:1])}
        elif command == "load":  # what is loaded was not there before, and goes again
            number = 10_000 + turn % 8
            turn += 1
            start = time.perf_counter()
            llm.llm_engine.add_lora(adapter(number))
            answer = {"load": time.perf_counter() - start}
            answer["first"] = answer["load"] + generate(1, prompts[:1], [adapter(number)])
            llm.llm_engine.remove_lora(number + 1)
        else:
            model = llm.apply_model(_bytes)[0]
            answer = {"bytes": model / max(1, count)}
        print(json.dumps(answer), flush=True)


def _bytes(model):
    layer = model.get_submodule("model.embed_tokens")
    if hasattr(layer, "bank"):
        return layer.bank.tensors.nbytes
    return layer.lora_a_stacked.nbytes + layer.lora_b_stacked.nbytes


def metadata(count, rounds):
    """Host milliseconds of what a step writes down of who has which adapter, as vLLM does it and as ours does.

    With `count` adapters, for a step of one token for each of as many requests, and for one of 2,048 tokens of prompts.
    """
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from ksl_patch.vllm.layer import update_indices

    made = {name: PunicaWrapperCPU(4096, max_batches=count, device="cpu") for name in ("vLLM's", "ours")}
    update_indices(made["ours"])
    slots = [number + 1 for number in range(count)]
    found = {}
    for what, each in (("a token each", 1), ("2,048 tokens of prompts", 2048 // count)):
        tokens = tuple(number for number in slots for _ in range(each))
        times = {name: [] for name in made}
        for _ in range(20 * rounds):
            for name, punica in made.items():
                mapping = LoRAMapping(tokens, tuple(slots), is_prefill=True)
                start = time.perf_counter()
                punica.update_metadata(mapping, slots, count + 1, 50_000)
                times[name].append(1e3 * (time.perf_counter() - start))
        found[what] = {name: statistics.median(values) for name, values in times.items()}
    return found


class Engine:
    def __init__(self, base, kind, count, common):
        arguments = [sys.executable, __file__, "--worker", json.dumps([base, kind, count, *common])]
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        if kind != "ours":
            settings["VLLM_PLUGINS"] = "none"  # vLLM as it comes
        self.process = subprocess.Popen(
            arguments, env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("an engine ended early: see above")

    def ask(self, command):
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()


def write_patches(base, count, rows, folder):
    """Patches 0..count-1 and eight more from 10,000 on; of STOCK_SLOTS and the eight also vLLM's LoRA of the same."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from ksl_patch import Patch

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    table = model.get_input_embeddings().weight.detach()
    V, d = table.shape
    rank = max(8, 1 << (rows - 1).bit_length())
    extra = list(range(10_000, 10_008))
    for number in [*range(count), *extra]:
        g = torch.Generator().manual_seed(number)
        ids = torch.randperm(V - 3, generator=g)[:rows].sort().values + 3
        new = (table[ids].float() + 0.02 * torch.randn(rows, d, generator=g)).bfloat16()
        Patch.from_model(model, ids, new, name=f"p{number}").save(folder / f"{number}.safetensors")
        if number < STOCK_SLOTS or number in extra:
            A, B = torch.zeros(rank, V, dtype=torch.bfloat16), torch.zeros(d, rank, dtype=torch.bfloat16)
            A[torch.arange(rows), ids] = 1
            B[:, :rows] = (new.float() - table[ids].float()).T.bfloat16()
            where = folder / f"lora{number}"
            where.mkdir()
            key = "base_model.model.model.embed_tokens.lora_embedding_"
            save_file({f"{key}A": A, f"{key}B": B}, where / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["embed_tokens"]}
            (where / "adapter_config.json").write_text(json.dumps(config))
    sizes = {"patch": (folder / "0.safetensors").stat().st_size}
    return sizes | {"stock LoRA": (folder / "lora0" / "adapter_model.safetensors").stat().st_size}


@click.command()
@click.option("--base", help="Folder of a model.")
@click.option("--random", type=click.Choice(list(SHAPES)), help="A model of this shape with random weights instead.")
@click.option("--rows", default=32, help="Rows of a patch.")
@click.option("--batch", default=16)
@click.option("--tokens", default=64)
@click.option("--patches", "counts", type=int, multiple=True, default=(1, 64, 1000))
@click.option("--rounds", default=15)
@click.option("--skip-throughput", is_flag=True, help="Memory and loading alone.")
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--worker", "as_worker", hidden=True)
def main(base, random, rows, batch, tokens, counts, rounds, skip_throughput, output, as_worker):
    if as_worker:
        worker(*json.loads(as_worker))
        return
    import vllm

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "patches"
        folder.mkdir()
        if random:
            import torch
            import transformers

            base = str(Path(scratch) / "base")
            torch.set_default_dtype(torch.bfloat16)
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[random])).save_pretrained(base)
            torch.set_default_dtype(torch.float32)
        counts = (64,) if skip_throughput else counts
        results = {
            "machine": machine("cpu"), "vllm": vllm.__version__, "model": random or base, "rows": rows,
            "batch": batch, "tokens": tokens, "rounds": rounds,
        }  # fmt: skip
        results["file_bytes"] = write_patches(base, max(counts), rows, folder)
        common = [rows, batch, tokens, str(folder), skip_throughput]
        engines = {} if skip_throughput else {"plain vLLM": Engine(base, "plain", 0, common)}
        for count in counts:
            engines[f"ours, {count:,} patches"] = Engine(base, "ours", count, common)
        stock = f"stock embedding LoRA, {STOCK_SLOTS} slots"
        ours = f"ours, {max(counts):,} patches"
        try:
            engines[stock] = Engine(base, "stock", STOCK_SLOTS, common)
        except SystemExit:
            results["stock"] = "vLLM gives the embedding of this class no LoRA"
            print(f"{results['stock']}: see above")
            stock = ours

        memory = {name: engines[name].ask("bytes")["bytes"] for name in engines if name != "plain vLLM"}
        results["bytes_per_slot"] = memory
        rows_of = [(f"{max(memory.values()) / v:.1f}", f"{v:,.0f}", name) for name, v in memory.items()]
        show("Memory of a slot", ("largest / this", "bytes", "engine"), rows_of)

        loads = {name: [] for name in {ours: 0, stock: 0}}
        for _ in range(rounds + 1):
            for name, values in loads.items():
                values.append(engines[name].ask("load"))
        results["loading"] = {
            name: {key: statistics.median(v[key] for v in values[1:]) for key in ("load", "first")}
            for name, values in loads.items()
        }
        best = results["loading"][ours]
        show(
            "An adapter that was not loaded",
            ("x ours", "load ms", "x ours", "load to first token ms", "engine"),
            [
                (f"{v['load'] / best['load']:.1f}", f"{1e3 * v['load']:.2f}",
                 f"{v['first'] / best['first']:.1f}", f"{1e3 * v['first']:.1f}", name)
                for name, v in results["loading"].items()
            ],
        )  # fmt: skip

        if not skip_throughput:
            times, order = {name: [] for name in engines}, list(engines)
            for _ in range(rounds + 1):
                for name in order:
                    times[name].append(engines[name].ask("run"))
                order = order[1:] + order[:1]
            seconds = {
                key: {name: [v[key] for v in values[1:]] for name, values in times.items()}
                for key in ("seconds", "first")
            }
            plain = seconds["seconds"]["plain vLLM"]
            results["throughput"] = {
                name: {
                    "tokens_per_second": batch * tokens / statistics.median(values),
                    "first_token_seconds": statistics.median(seconds["first"][name]),
                    **dict(zip(("of_plain", "interval"), paired(plain, values), strict=True)),
                }
                for name, values in seconds["seconds"].items()
            }
            show(
                "Throughput and time to the first token",
                ("of plain", "95% interval", "tokens/s", "first token ms", "engine"),
                [
                    (f"{v['of_plain']:.3f}", "{:.3f} to {:.3f}".format(*v["interval"]),
                     f"{v['tokens_per_second']:.1f}", f"{1e3 * v['first_token_seconds']:.1f}", name)
                    for name, v in results["throughput"].items()
                ],
            )  # fmt: skip
        for engine in engines.values():
            engine.process.kill()
    results["metadata_ms"] = metadata(64, rounds)
    show(
        "A step's record of its adapters, 64 of them",
        ("vLLM's / ours", "ours ms", "vLLM's ms", "step"),
        [
            (f"{stock / ours:.1f}", f"{ours:.3f}", f"{stock:.3f}", what)
            for what, (stock, ours) in ((what, v.values()) for what, v in results["metadata_ms"].items())
        ],
    )
    report(results, output)


if __name__ == "__main__":
    main()
