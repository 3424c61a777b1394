"""Training k rows beside a loop written by hand, PEFT's TrainableTokens and tuning of the whole embedding, in one run.

    python benchmarks/training.py --base .demo/gemma3 --pairs .demo/gnome/en-de.jsonl [--output FILE]

Every contender is a process of its own, which loads the base, reads the same batches, and trains at the same rate; they
take turns. The loop by hand is what one would write for this alone: the bare model's layers, the head on the answers'
positions, Adam on k rows, no checkpoints. PEFT and the whole embedding are trained by transformers' Trainer with the
model's own loss. Seconds are of the steps after the first two; memory is the process's peak.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from machine import machine, paired, report, show
from torch.nn import functional as F

ROWS, BATCH, STEPS, WARM, LR = 18, 8, 14, 2, 0.005
CONTENDERS = ("ours", "by hand", "PEFT", "whole embedding")


def material(base, pairs):
    """The base, batches of examples, and the rows to train: the most frequent tokens of the prompts."""
    from ksl_patch.data.columns import Columns
    from ksl_patch.data.encoding import encode, token_counts
    from ksl_patch.data.reading import read_pairs
    from ksl_patch.data.templates import make_template
    from ksl_patch.hf import end_token_id, load_base
    from ksl_patch.train.loaded import Loaded

    loaded = Loaded.of(*load_base(base, device="cpu"))
    template = make_template("plain", source_language="en", language="de", tokenizer=loaded.tokenizer)
    read = read_pairs(pairs, Columns("source", "target", None, ()), languages=("en", "de"), limit=4 * BATCH * STEPS)
    end = end_token_id(loaded.model, loaded.tokenizer)
    examples = encode(template, read, loaded.tokenizer, end, 256).examples[: BATCH * STEPS]
    counts = token_counts(examples, loaded.identity.vocab_size)
    return loaded.model, examples, torch.from_numpy(np.sort(np.argsort(-counts)[:ROWS]).copy())


class Clock:
    """The times at which steps were over."""

    def __init__(self):
        self.times = []

    def tick(self):
        self.times.append(time.perf_counter())

    @property
    def seconds(self):
        return float(self.times[-1] - self.times[WARM - 1]) / (len(self.times) - WARM)


def ours(model, examples, ids, clock):
    from ksl_patch.train.progress import SilentReporter
    from ksl_patch.train.tune import TuneSettings, tune_rows

    class Reporter(SilentReporter):
        def step(self, done, loss=None):
            clock.tick()

    settings = TuneSettings(steps=STEPS, lr=LR, batch_size=BATCH, accumulate=1, seed=0, checkpoint_every=25)
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
    rates = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, total_iters=STEPS)
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH], 0)
        at, tokens = index[batch["input_ids"]], batch["labels"][:, 1:]
        inputs = embedding(batch["input_ids"])
        inputs = torch.where((at >= 0)[..., None], (rows[at.clamp(min=0)] * scale).to(inputs.dtype), inputs)
        hidden = model.model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], use_cache=False)[0]
        logits = head(hidden[:, :-1][tokens != IGNORED])
        F.cross_entropy(logits.float(), tokens[tokens != IGNORED]).backward()
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
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=LR,
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


def one(name, base, pairs):
    """A contender's figures, as JSON on standard output."""
    model, examples, ids = material(base, pairs)
    clock, before = Clock(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = {"ours": ours, "by hand": by_hand, "PEFT": peft, "whole embedding": whole_embedding}[name]
    rows = run(model, examples, ids, clock)
    tokens = sum(len(each.prompt) + len(each.answer) for each in examples[WARM * BATCH :])
    print(json.dumps({
        "seconds": clock.seconds, "tokens": tokens / (STEPS - WARM),
        "answer_tokens": sum(len(each.answer) for each in examples[WARM * BATCH :]) / (STEPS - WARM),
        "loaded_mb": before / 1024, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "dtype": str(model.dtype), "rows": None if rows is None else rows.float().tolist(),
    }))  # fmt: skip


@click.command()
@click.option("--base", required=True)
@click.option("--pairs", required=True)
@click.option("--rounds", default=5)
@click.option("--only", multiple=True, type=click.Choice(CONTENDERS), default=CONTENDERS)
@click.option("--output", type=click.Path(path_type=Path))
@click.option("--one", "single", hidden=True)
def main(base, pairs, rounds, only, output, single):
    if single:
        one(single, base, pairs)
        return
    found = {name: [] for name in only}
    for i in range(rounds):
        for name in only[i % len(only) :] + only[: i % len(only)]:
            command = [sys.executable, __file__, "--base", base, "--pairs", pairs, "--one", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
            print(f"round {i + 1}, {name}: {found[name][-1]['seconds']:.2f} s a step", file=sys.stderr)
    lines, results = [], {"machine": machine(), "base": Path(base).name, "contenders": {}}
    hand = [each["seconds"] for each in found.get("by hand", [])]
    for name, runs in found.items():
        seconds, peak = (float(np.median([each[key] for each in runs])) for key in ("seconds", "peak_mb"))
        ratio, interval = paired(hand, [each["seconds"] for each in runs]) if hand else (None, None)
        results["contenders"][name] = {
            "steps_per_second_of_by_hand": ratio, "interval": interval, "seconds_per_step": seconds,
            "tokens_per_second": runs[0]["tokens"] / seconds, "peak_mb": peak,
            "each_seconds": [each["seconds"] for each in runs],
        }  # fmt: skip
        shown = f"{ratio:.3f} ({interval[0]:.3f} to {interval[1]:.3f})" if ratio else ""
        lines.append((shown, f"{seconds:.2f} s", f"{runs[0]['tokens'] / seconds:.0f}", f"{peak:,.0f} MB", name))
    if "ours" in found and hand:
        a, b = (torch.tensor(found[name][0]["rows"]) for name in ("ours", "by hand"))
        results["largest_difference_of_rows"] = float((a - b).abs().max())
        results["rows_moved_by"] = LR * STEPS / 2
    first = next(iter(found.values()))[0]
    results |= {
        "rows": ROWS, "batch": BATCH, "steps": STEPS, "dtype": first["dtype"], "tokens_a_step": first["tokens"],
        "answer_tokens_a_step": first["answer_tokens"],
    }  # fmt: skip
    show("steps a second, of the loop by hand", ("ratio", "a step", "tokens/s", "peak", ""), lines)
    print(f"rows differ by at most {results.get('largest_difference_of_rows')} from those of the loop by hand")
    report(results, output)


if __name__ == "__main__":
    main()
