"""Serving many patches on one transformers model, beside the base alone and PEFT's ways, in one run.

    python benchmarks/serving.py --base .demo/gemma3 [--output benchmarks/results/serving-cpu.json]
    python benchmarks/serving.py --random llama-8b --device cuda --compile --output benchmarks/results/serving-gpu.json

Contenders take turns; medians are printed, the ratio to the base in the same round first. With --compile the base
and ours run with a static cache under torch.compile(mode="reduce-overhead"), which is CUDA graphs on a GPU.
"""

import copy
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import click
import torch
import transformers
from machine import machine, paired, report, show
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from ksl_patch import Patch, attach
from ksl_patch.bank import SlotRows

SHAPES = {
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


class Bench:
    def __init__(self, base, random, device, rows, batch, tokens):
        self.base, self.random, self.device = base, random, device
        self.k, self.batch, self.tokens = rows, batch, tokens
        torch.manual_seed(0)
        self.model = self.load()
        table = self.model.get_input_embeddings().weight
        self.V, self.d = table.shape
        self.prompts = torch.randint(3, self.V, (batch, 32), device=device)

    def load(self):
        if self.random:
            config = transformers.LlamaConfig(**SHAPES[self.random], tie_word_embeddings=self.random == "tiny")
            with torch.device(self.device):
                torch.set_default_dtype(torch.bfloat16)
                model = transformers.LlamaForCausalLM(config)
                torch.set_default_dtype(torch.float32)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16)
        return model.to(self.device).eval()

    def view(self):
        """Another model of the same weights, not copied: each contender gets one to itself."""
        return copy.deepcopy(self.model, {id(t): t for t in (*self.model.parameters(), *self.model.buffers())})

    def ids(self, seed):
        return torch.randperm(self.V - 3, generator=torch.Generator().manual_seed(seed))[: self.k].sort().values + 3

    def patch(self, seed):
        g = torch.Generator().manual_seed(seed)
        rows = 0.1 * torch.randn(self.k, self.d, generator=g)
        return Patch.from_model(self.model, self.ids(seed), rows, name=f"p{seed}")

    def generate(self, model, prompts=None, tokens=None, **extra):
        with torch.no_grad():
            model.generate(
                input_ids=self.prompts if prompts is None else prompts, do_sample=False, pad_token_id=2,
                max_new_tokens=tokens or self.tokens, min_new_tokens=tokens or self.tokens, **extra,
            )  # fmt: skip
        if self.device == "cuda":
            torch.cuda.synchronize()


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(contenders, rounds):
    times, order = {name: [] for name in contenders}, list(contenders)
    for _ in range(rounds + 1):
        for name in order:
            times[name].append(seconds(contenders[name]))
        order = order[1:] + order[:1]  # nobody always comes after the same one
    return {name: values[1:] for name, values in times.items()}  # the first warms up


def throughput(bench, counts, rounds, compiled):
    """Decode throughput in tokens per second of every way to serve."""
    warnings.simplefilter("ignore")

    def compile_(model):
        if compiled:
            model.generation_config.cache_implementation = "static"
            model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        return model

    def ours(count):
        model = bench.view()
        options = {"max_batch": bench.batch, "capacity": (count + 8) * bench.k} if compiled else {}
        handle = attach(model, **options)
        rows = torch.zeros(bench.k, bench.d, dtype=torch.bfloat16)
        slots = [handle.bank.add(SlotRows(bench.ids(seed), rows + 0.001 * seed)) for seed in range(count)]
        # Every row of the batch another choice: patches and the base in turn.
        choice = [slots[row * 997 % count] if row % 4 < 3 else 0 for row in range(bench.batch)]
        compile_(model)

        def run():
            with handle.serving(choice):
                bench.generate(model)

        return run

    plain = compile_(bench.view())
    contenders = {"base": lambda: bench.generate(plain)}
    for count in counts:
        contenders[f"ours, {count:,} patches loaded, mixed batch"] = ours(count)
    if not compiled:
        tokens = TrainableTokensConfig(token_indices=bench.ids(0).tolist(), target_modules=["embed_tokens"])
        trainable = get_peft_model(bench.view(), tokens).eval()
        contenders["PEFT TrainableTokens, one adapter"] = lambda: bench.generate(trainable)
        lora = get_peft_model(bench.view(), LoraConfig(**LORA), adapter_name="a").eval()
        lora.add_adapter("b", LoraConfig(**LORA))
        lora.add_adapter("c", LoraConfig(**LORA))
        names = [["a", "b", "c", "__base__"][row % 4] for row in range(bench.batch)]
        contenders["PEFT LoRA (r=8, q and v), mixed batch"] = lambda: bench.generate(lora, adapter_names=names)
        contenders["the model reloaded for one batch"] = lambda: bench.generate(bench.load())
    times = interleaved(contenders, rounds)
    return {
        name: {
            "tokens_per_second": bench.batch * bench.tokens / statistics.median(values),
            **dict(zip(("of_base", "interval"), paired(times["base"], values), strict=True)),
        }
        for name, values in times.items()
    }


def replacing(bench, folder, repeats):
    """Latency of putting new content behind a name from a file, and of load to the first token, in seconds."""
    model = bench.model
    files = [folder / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        bench.patch(seed).save(file)
    # LoRA stands for PEFT: in 0.21 a TrainableTokens adapter that is loaded again on a tied model fails at its forward.
    folders = [str(folder / f"lora{seed}") for seed in range(2)]
    for seed, where in enumerate(folders):
        torch.manual_seed(seed)
        get_peft_model(bench.view(), LoraConfig(**LORA)).save_pretrained(where)
    lora = PeftModel.from_pretrained(bench.view(), folders[0], adapter_name="live").eval()
    prompts = bench.prompts[:1]

    def reload(path):
        lora.delete_adapter("live")
        lora.load_adapter(path, "live")
        lora.set_adapter("live")

    with attach(model) as handle:
        handle.load(files[0], "live")
        turn = iter(range(10**9))
        ways = {
            "ours, replace": lambda: handle.replace("live", files[next(turn) % 2]),
            "PEFT LoRA, hotswap_adapter": lambda: hotswap_adapter(lora, folders[next(turn) % 2], "live"),
            "PEFT LoRA, delete, load and set": lambda: reload(folders[next(turn) % 2]),
        }
        replace = interleaved(ways, repeats)

        def ours_first():
            name = handle.load(files[1], "new")
            with handle.using(name):
                bench.generate(model, prompts, 1)

        def peft_first():
            lora.load_adapter(folders[1], "new")
            lora.set_adapter("new")
            bench.generate(lora, prompts, 1)

        first = {
            "the base's own first token": lambda: bench.generate(model, prompts, 1),
            "ours, load to first token": ours_first,
            "PEFT LoRA, load to first token": peft_first,
        }
        times = {name: [] for name in first}
        for _ in range(max(3, repeats // 4) + 1):
            for name, function in first.items():
                times[name].append(seconds(function))
            handle.unload("new")
            lora.set_adapter("live")
            lora.delete_adapter("new")

    def summary(values):
        return {"p50": statistics.median(values), "p99": statistics.quantiles(values, n=100)[98]}

    return {name: summary(v) for name, v in replace.items()}, {name: summary(v[1:]) for name, v in times.items()}


def memory(bench, count):
    """Bytes per resident patch, beside a LoRA and stock vLLM's embedding LoRA of as many rows."""
    with attach(bench.model) as handle:
        for seed in range(count):
            handle.bank.add(SlotRows(bench.ids(seed), torch.zeros(bench.k, bench.d, dtype=torch.bfloat16)))
        ours = handle.bank.nbytes / count
    lora = get_peft_model(bench.view(), LoraConfig(**LORA))
    adapter = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name) * 2
    content = bench.k * bench.d * 2
    return {
        "rows alone": content,
        "ours": ours,
        "ours / rows": ours / content,
        "LoRA (r=8, q and v), bfloat16": adapter,
        f"embedding LoRA (r={bench.k}), bfloat16": 2 * bench.k * (bench.V + bench.d),
    }


@click.command()
@click.option("--base", help="Folder of a model.")
@click.option("--random", type=click.Choice(list(SHAPES)), help="A model of this shape with random weights instead.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--rows", default=32, help="Rows of a patch.")
@click.option("--batch", default=4)
@click.option("--tokens", default=16, help="New tokens in a turn.")
@click.option("--patches", "counts", type=int, multiple=True, default=(1, 100, 10_000))
@click.option("--rounds", default=31)
@click.option("--repeats", default=100, help="Of the latencies.")
@click.option("--compile", "compiled", is_flag=True)
@click.option("--output", type=click.Path(path_type=Path))
def main(base, random, device, rows, batch, tokens, counts, rounds, repeats, compiled, output):
    transformers.logging.set_verbosity_error()
    bench = Bench(base, random, device, rows, batch, tokens)
    results = {
        "machine": machine(device), "transformers": transformers.__version__, "model": base or random,
        "rows": rows, "batch": batch, "tokens": tokens, "rounds": rounds, "compiled": compiled,
    }  # fmt: skip
    results["memory"] = memory(bench, max(counts) if not compiled else 100)
    show("Bytes per resident patch", ("bytes", "what"), [(f"{v:,.2f}", k) for k, v in results["memory"].items()])
    if not compiled:
        with tempfile.TemporaryDirectory() as folder:
            results["replace"], results["first_token"] = replacing(bench, Path(folder), repeats)
        for title, key in (
            ("New content behind a name, from a file", "replace"),
            ("To the first token", "first_token"),
        ):
            ours = next(v for k, v in results[key].items() if k.startswith("ours"))["p50"]
            rows = [
                (f"{v['p50'] / ours:.1f}", f"{1e3 * v['p50']:.2f}", f"{1e3 * v['p99']:.2f}", way)
                for way, v in results[key].items()
            ]
            show(title, ("x ours", "p50 ms", "p99 ms", "way"), rows)
    results["throughput"] = throughput(bench, counts, rounds, compiled)
    show(
        "Decode throughput",
        ("of base", "95% interval", "tokens/s", "way"),
        [
            (f"{v['of_base']:.3f}", "{:.3f} to {:.3f}".format(*v["interval"]), f"{v['tokens_per_second']:.1f}", k)
            for k, v in results["throughput"].items()
        ],
    )
    report(results, output)


if __name__ == "__main__":
    main()
