"""What the transformers runtime, the bank, the KS test and a training step do on one GPU. Without network.

    python benchmarks/gpu/runtime.py [--output benchmarks/results/runtime-gpu.json]
    python benchmarks/gpu/runtime.py --shape tiny   # the script itself, on a CPU

`benchmarks/serving.py --random llama-8b --device cuda --compile` has throughput, `tests/gpu.py` the answers of
continuous batching and of graphs of one's own.
"""

import statistics
import sys
import time
from pathlib import Path

import click
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine, report, show

from ksl_patch import Patch, attach, ks_test
from ksl_patch.bank import PatchBank, SlotRows
from ksl_patch.overlay import training
from ksl_patch.train.loss import answer_logits

SHAPES = {
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROWS, TOKENS = 18, 24


def model_of(shape):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[shape], initializer_range=0.05))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def median_ms(function, rounds=20):
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def answers(model, prompts, static):
    settings = {"cache_implementation": "static"} if static else {}
    with torch.no_grad():
        found = model.generate(
            input_ids=prompts, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=2, **settings
        )
    return found[:, prompts.shape[1] :].tolist()


def check(model, compiled):
    """Rows of a mixed batch that have the tokens of the same batch while the table is overwritten by hand."""
    weight = model.get_input_embeddings().weight.data
    V, d = weight.shape
    patches = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        ids = torch.randperm(V - 3, generator=g)[:ROWS] + 3
        patches.append(Patch.from_model(model, ids, 0.2 * torch.randn(ROWS, d, generator=g), name=f"p{seed}"))
    g = torch.Generator().manual_seed(9)
    right = total = 0
    forward = model.forward
    with attach(model, max_batch=9, capacity=4 * ROWS) as handle:
        for patch in patches:
            handle.load(patch, patch.meta.name)
        if compiled:
            model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        for batch in (1, 3, 7, 8, 9):
            prompts = torch.randint(3, V, (batch, 24), generator=g)
            prompts[:, ::4] = torch.cat([patch.token_ids for patch in patches])[:6]
            prompts = prompts.to(DEVICE)
            choices = [None if row % 4 == 3 else f"p{row % 4}" for row in range(batch)]
            with handle.using(choices):
                found = answers(model, prompts, compiled)
            for row, choice in enumerate(choices):
                kept = None
                if choice is not None:
                    patch = patches[int(choice[1:])]
                    kept = weight[patch.token_ids].clone()
                    weight[patch.token_ids] = patch.rows.to(weight)
                with handle.using([None] * batch):
                    wanted = answers(model, prompts, compiled)
                if kept is not None:
                    weight[patch.token_ids] = kept
                right += found[row] == wanted[row]
                total += 1
    model.forward = forward
    return right, total


def bank(shape, count=10_000):
    """Milliseconds of each operation with so many patches on the device."""
    V, d = shape["vocab_size"], shape["hidden_size"]
    rows = torch.randn(ROWS, d).bfloat16()
    g = torch.Generator().manual_seed(0)
    contents = [
        SlotRows(torch.randint(0, V - ROWS, (1,), generator=g) + torch.arange(ROWS), rows) for _ in range(count)
    ]
    made = PatchBank(V, d, dtype=torch.bfloat16, device=DEVICE, capacity=(count + 64) * ROWS)
    slots = [made.add(content) for content in contents]

    def hold():
        with made.hold(slots[:64]):
            pass

    ids = torch.randint(0, V, (64, 1), device=DEVICE)
    own = torch.tensor(slots[:64], device=DEVICE)[:, None]
    return {
        "bytes a patch": made.nbytes / count,
        "add": median_ms(lambda: made.remove(made.add(contents[0]))),
        "hold of 64": median_ms(hold),
        "lookup of 64 tokens": median_ms(lambda: made.tensors.lookup(own, ids)),
    }


def ks(shape):
    """Seconds of the test over a whole table, and of sorting both tables."""
    before = torch.randn(shape["vocab_size"], shape["hidden_size"], device=DEVICE).bfloat16()
    after = (before.float() + 0.1 * torch.randn_like(before.float())).bfloat16()

    def sort():
        for table in (before, after):
            for piece in table.split(8192):
                piece.sort(dim=1)

    return {"ks_test": median_ms(lambda: ks_test(before, after), 5) / 1e3, "sorting both": median_ms(sort, 5) / 1e3}


def step(model):
    """A step of training rows, 8 x 64 tokens with half of them the answer's; and one of the whole table."""
    table = model.get_input_embeddings().weight
    ids = torch.randint(3, len(table), (8, 64), device=DEVICE)
    labels = ids.clone()
    labels[:, :32] = -100
    mask = torch.ones_like(ids)
    result = {}
    model.requires_grad_(False)

    def one(parameters, optimiser):
        logits = answer_logits(model, {"input_ids": ids, "attention_mask": mask}, labels)
        torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][labels[:, 1:] != -100]).backward()
        optimiser.step()
        optimiser.zero_grad()

    def measure(parameters):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        optimiser = torch.optim.Adam(parameters, lr=1e-6)
        took = median_ms(lambda: one(parameters, optimiser), 5)
        return {"ms": took} | ({"peak_GiB": torch.cuda.max_memory_allocated() / 2**30} if CUDA else {})

    rows = SlotRows(ids[0, :ROWS].unique().cpu(), table.detach()[ids[0, :ROWS].unique()].cpu())
    with training(model, rows) as trained:
        result[f"{len(rows.token_ids)} rows"] = measure(list(trained.parameters()))
    table.requires_grad_(True)
    result["the whole table, Adam"] = measure([table])
    return result


def written(value):
    return ", ".join(f"{v:.4g} {k}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.4g}"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="8b")
@click.option("--output", type=click.Path(path_type=Path))
def main(shape, output):
    transformers.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64  # a shape for each batch, of the prompt and of a token
    results = {"machine": machine(DEVICE), "transformers": transformers.__version__, "shape": shape}
    model = model_of(shape)
    wrong = False
    for name, compiled in (("eager", False), ("compiled, static cache", True)):
        right, total = check(model, compiled)
        wrong |= right != total
        results[name] = f"{right} of {total} rows"
        print(f"{'ok   ' if right == total else 'wrong'} {name}: {results[name]}")
    for name, part in (
        ("10,000 patches (ms, and bytes)", lambda: bank(SHAPES[shape])),
        ("KS test of a table (s)", lambda: ks(SHAPES[shape])),
        ("A training step", lambda: step(model)),
    ):
        results[name] = part()
        show(name, ("value", "what"), [(written(value), what) for what, value in results[name].items()])
    report(results, output)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
