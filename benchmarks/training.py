"""Training k rows beside a loop written by hand, PEFT's TrainableTokens and tuning of the whole embedding, in one run.

    python benchmarks/training.py --base .demo/gemma3 --pairs .demo/gnome/en-de.jsonl [--output FILE]

Every contender is a process of its own, which loads the base, reads the same batches in the same order, and trains at
the same rate; they take turns. The loop by hand is what one would write for this alone: the bare model's layers, the
head on the answers' positions, Adam on k rows, and nothing kept; ours keeps a checkpoint in its 25th step. PEFT and the
whole embedding are trained by transformers' Trainer with the model's own loss, which has the logits of all positions;
on a tied base both train the head too, so they do more than ours. Seconds are of the steps after the first two; loading
and what comes after the last step are not timed. Memory is what the process has at most while it trains, by Linux.
"""

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import click
import numpy as np
import torch
from machine import machine, paired, report, show
from torch.nn import functional as F

ROWS, BATCH, WARM, LR = 18, 8, 2, 0.005
STEPS = {"ours": 27, "by hand": 27, "PEFT": 8, "whole embedding": 8}  # the latter take long, and keep nothing


def material(base, pairs, steps):
    """The base, batches of examples, and the rows to train: the most frequent tokens of the prompts."""
    from ksl_patch.data.columns import Columns
    from ksl_patch.data.encoding import encode, token_counts
    from ksl_patch.data.reading import read_pairs
    from ksl_patch.data.templates import make_template
    from ksl_patch.hf import end_token_id, load_base
    from ksl_patch.train.loaded import Loaded

    loaded = Loaded.of(*load_base(base, device="cpu"))
    template = make_template("plain", source_language="en", language="de", tokenizer=loaded.tokenizer)
    read = read_pairs(pairs, Columns("source", "target", None, ()), languages=("en", "de"), limit=8 * BATCH * steps)
    end = end_token_id(loaded.model, loaded.tokenizer)
    examples = encode(template, read, loaded.tokenizer, end, 256).examples[: BATCH * steps]
    counts = token_counts(examples, loaded.identity.vocab_size)
    return loaded.model, examples, torch.from_numpy(np.sort(np.argsort(-counts)[:ROWS]).copy())


class Clock:
    """The times at which steps were over."""

    def __init__(self, steps):
        self.steps, self.times = steps, []

    def tick(self):
        self.times.append(time.perf_counter())

    @property
    def seconds(self):
        """Of each step after the first ones."""
        return [float(b - a) for a, b in itertools.pairwise(self.times[WARM - 1 :])]


def ours(model, examples, ids, clock):
    from ksl_patch.train.progress import SilentReporter
    from ksl_patch.train.tune import TuneSettings, tune_rows

    class Reporter(SilentReporter):
        def step(self, done, loss=None):
            clock.tick()

    settings = TuneSettings(steps=clock.steps, lr=LR, batch_size=BATCH, accumulate=1, seed=0, checkpoint_every=25)
    with tempfile.TemporaryDirectory() as folder:
        return tune_rows(
            model, ids, examples, settings, side="input", folder=Path(folder) / "run", stage="rows", reporter=Reporter()
        )


def by_hand(model, examples, ids, clock):
    from ksl_patch.data.encoding import IGNORED, collate
    from ksl_patch.train.tune import optimiser

    model.requires_grad_(False).train()
    embedding, head, kind = model.get_input_embeddings(), model.get_output_embeddings(), optimiser(1, damp_rare=False)
    rows = torch.nn.Parameter(embedding.weight[ids].float())
    index = torch.full((len(embedding.weight),), -1)
    index[ids] = torch.arange(len(ids))
    scale = getattr(embedding, "embed_scale", 1.0)
    adam = torch.optim.AdamW(
        [rows], LR, betas=(kind["adam_beta1"], kind["adam_beta2"]), eps=kind["adam_epsilon"], weight_decay=0
    )
    rates = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, total_iters=clock.steps)
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH], 0)
        at, tokens, wanted = index[batch["input_ids"]], batch["labels"][:, 1:], batch["labels"][:, 1:] != IGNORED
        inputs = embedding(batch["input_ids"])
        inputs = torch.where((at >= 0)[..., None], (rows[at.clamp(min=0)] * scale).to(inputs.dtype), inputs)
        hidden = model.model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], use_cache=False)[0]
        # No name holds the logits, which would keep them through the backward pass.
        F.cross_entropy(head(hidden[:, :-1][wanted]).float(), tokens[wanted]).backward()
        torch.nn.utils.clip_grad_norm_([rows], 1.0)
        adam.step()
        rates.step()
        adam.zero_grad()
        clock.tick()
    return rows.detach()


def by_trainer(model, examples, clock):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ksl_patch.data.encoding import collate
    from ksl_patch.train.tune import optimiser

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=clock.steps, per_device_train_batch_size=BATCH, learning_rate=LR,
            train_sampling_strategy="sequential", **optimiser(1, damp_rare=False), use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        Trainer(
            model=model, args=arguments, train_dataset=examples, data_collator=lambda batch: collate(batch, 0),
            callbacks=[Ticks()],
        ).train()  # fmt: skip


def peft(model, examples, ids, clock):
    from peft import TrainableTokensConfig, get_peft_model

    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    config = TrainableTokensConfig(target_modules=[name.rpartition(".")[2]], token_indices=ids.tolist())
    by_trainer(get_peft_model(model, config), examples, clock)


def whole_embedding(model, examples, ids, clock):
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    by_trainer(model, examples, clock)


def memory(field):
    """A field of /proc/self/status in MB, memory-mapped weights among them."""
    return int(re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


def one(name, base, pairs):
    """A contender's figures, as JSON on standard output."""
    model, examples, ids = material(base, pairs, STEPS[name])
    clock = Clock(STEPS[name])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    run = {"ours": ours, "by hand": by_hand, "PEFT": peft, "whole embedding": whole_embedding}[name]
    rows = run(model, examples, ids, clock)
    tokens = sum(len(each.prompt) + len(each.answer) for each in examples[WARM * BATCH :])
    timed = STEPS[name] - WARM
    print(json.dumps({
        "seconds": clock.seconds, "tokens": tokens / timed,
        "answer_tokens": sum(len(each.answer) for each in examples[WARM * BATCH :]) / timed,
        "loaded_mb": before, "peak_mb": memory("VmHWM"), "threads": torch.get_num_threads(),
        "dtype": str(model.dtype), "rows": None if rows is None else rows.float().tolist(),
    }))  # fmt: skip


@click.command()
@click.option("--base", required=True)
@click.option("--pairs", required=True)
@click.option("--rounds", type=click.IntRange(2), default=5, help="Of ours and the loop by hand; of the others two.")
@click.option("--only", multiple=True, type=click.Choice(list(STEPS)), default=list(STEPS))
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--one", "single", hidden=True)
def main(base, pairs, rounds, only, output, single):
    if single:
        one(single, base, pairs)
        return
    if os.getloadavg()[0] > 1:
        raise click.ClickException(f"the machine is busy (load {os.getloadavg()[0]:.1f}): nothing is timed.")
    found = {name: [] for name in only}
    for i in range(rounds):
        for name in only[i % len(only) :] + only[: i % len(only)]:
            if i >= 2 and STEPS[name] < max(STEPS.values()):
                continue
            command = [sys.executable, __file__, "--base", base, "--pairs", pairs, "--one", name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
            print(f"round {i + 1}, {name}: {np.mean(found[name][-1]['seconds']):.2f} s a step", file=sys.stderr)
    lines, results = [], {"machine": machine(), "base": Path(base).name, "contenders": {}}
    for name, runs in found.items():
        each = summary(runs, found.get("by hand", []))
        results["contenders"][name] = each
        low, high = each["interval"]
        lines.append((
            f"{each['steps_per_second_of_by_hand']:.3f} ({low:.3f} to {high:.3f}, {len(runs)} rounds)",
            f"{each['seconds_per_step']:.2f} s", f"{each['tokens_per_second']:.0f}", f"{each['peak_of_by_hand']:.2f}",
            f"{each['peak_mb']:,.0f} MB", f"{each['working_mb']:,.0f} MB", name,
        ))  # fmt: skip
    if "ours" in found and "by hand" in found:
        a, b = (torch.tensor(found[name][0]["rows"]) for name in ("ours", "by hand"))
        results["largest_difference_of_rows"] = float((a - b).abs().max())
        if results["largest_difference_of_rows"] > LR / 10:
            raise click.ClickException("ours and the loop by hand do not train the same rows: nothing is reported.")
    first = next(iter(found.values()))[0]
    results |= {
        "rows": ROWS, "batch": BATCH, "steps": STEPS, "dtype": first["dtype"], "threads": first["threads"],
        "tokens_a_step": first["tokens"], "answer_tokens_a_step": first["answer_tokens"],
        "versions": {name: metadata.version(name) for name in ("transformers", "peft", "accelerate")},
    }  # fmt: skip
    head = ("ratio", "a step", "tokens/s", "peak, of the loop's", "peak", "of it beyond what was loaded", "")
    show("steps a second, of the loop by hand", head, lines)
    print(f"rows differ by at most {results.get('largest_difference_of_rows')} from those of the loop by hand")
    report(results, output)


def summary(runs, hand):
    """A contender beside the loop by hand, round by round."""
    seconds = float(np.median([np.mean(each["seconds"]) for each in runs]))
    peak = float(np.median([each["peak_mb"] for each in runs]))
    beside = hand[: len(runs)] or runs
    steps = len(runs[0]["seconds"])  # batches differ in length: the same ones are compared
    ratio, interval = paired(*([np.mean(each["seconds"][:steps]) for each in of] for of in (beside, runs)))
    return {
        "steps_per_second_of_by_hand": ratio, "interval": interval, "seconds_per_step": seconds,
        "tokens_per_second": runs[0]["tokens"] / seconds, "peak_mb": peak,
        "peak_of_by_hand": float(np.median([a["peak_mb"] / b["peak_mb"] for a, b in zip(runs, beside, strict=True)])),
        "working_mb": float(np.median([each["peak_mb"] - each["loaded_mb"] for each in runs])),
        "each_round": [float(np.mean(each["seconds"])) for each in runs],
    }  # fmt: skip


if __name__ == "__main__":
    main()
