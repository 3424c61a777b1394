"""From trained rows to a patch: the cast to the base's dtype, and what the metadata says of ticket and training."""

from __future__ import annotations

import numpy as np
import torch

from ksl_patch.base import find_embedding
from ksl_patch.data.pairs import data_digest
from ksl_patch.data.sketch import sketch
from ksl_patch.patch import Patch, TicketMeta, TrainingMeta
from ksl_patch.ticket import Ticket
from ksl_patch.train.tune import optimiser
from ksl_patch.train.tuning import Tuning


def assemble(of: Tuning, ticket: Ticket, rows: torch.Tensor) -> Patch:
    """The patch of some rows, float32 [k, d], cast to the base's own dtype."""
    config = of.config
    table = find_embedding(of.model)
    compute = table.weight.dtype
    table.weight.data = table.weight.data.to(of.loaded.dtype)
    try:
        patch = Patch.from_model(
            of.model,
            torch.from_numpy(ticket.token_ids),
            rows,
            name=config.name,
            language=config.language,
            tokenizer=of.tokenizer,
            side=config.side,
            scope=config.scope,
            template=of.template,
            licence=config.licence,
        )
    finally:
        table.weight.data = table.weight.data.to(compute)
    tuned, partial = config.trains(ticket.selection)
    (steps, trained), auto = of.steps_of(ticket), partial and config.auto_steps
    decay = "best average of the rows by validation loss" if auto else f"{config.schedule} decay"
    read = of.pairs_read_in(max(steps, config.embed_steps if tuned else 0))
    return patch.with_meta(
        base=of.base,
        ticket=TicketMeta(
            selection=ticket.selection,
            test=None if ticket.statistic is None else "two-sample Kolmogorov-Smirnov, two-sided, exact",
            alpha=ticket.alpha,
            top_k=ticket.top_k,
            statistic=None if ticket.statistic is None else ticket.statistic.tolist(),
            pvalue=None if ticket.pvalue is None else ticket.pvalue.tolist(),
        ),
        training=TrainingMeta(
            mode="partial" if partial else "transfer",
            steps=steps,
            lr=config.lr * of.scale if partial else 0.0,
            optimiser=f"AdamW, weight decay 0, {decay}",
            batch_size=of.batch,
            seed=config.seed,
            data_digest=data_digest(of.pairs.train),
            pairs=len(of.train),
            embed_steps=config.embed_steps if tuned else 0,
            embed_lr=config.embed_lr * of.scale if tuned else 0.0,
            embedding_scale=of.scale,
            pairs_read=len(of.pairs_read_in(steps)) if partial else 0,
            embed_pairs_read=len(of.pairs_read_in(config.embed_steps)) if tuned else 0,
            processes=of.processes,
            hyperparameters=_hyperparameters(of, len(ticket), partial, tuned, trained if auto else None),
            sources=sketch(read),
        ),
    )


def _hyperparameters(
    of: Tuning, rows: int, partial: bool, tuned: bool, trained: int | None
) -> dict[str, int | float | str | bool]:
    """What the optimiser of the rows was set to; embed_: what is other in the embedding tuning before.

    trained: the steps of a tuning that ended by itself.
    """
    config, d = of.config, of.base.hidden_size
    found = optimiser(rows * d, damp_rare=False, steps=config.steps, **config.rates(rows=True)) if partial else {}
    if trained is not None:
        found |= {"validation_pairs": len(of.validation), "steps_trained": trained, "most_steps": config.steps}
    if tuned:
        n = np.count_nonzero(of.embed_counts) if config.side == "input" else of.base.vocab_size
        rates = config.rates(rows=False)
        embed = optimiser(int(n) * d, damp_rare=config.damp_rare, steps=config.embed_steps, **rates)
        found = found or {key: value for key, value in embed.items() if key != "adam_epsilon"}
        found |= {"damp_rare": config.damp_rare, "embed_adam_epsilon": embed["adam_epsilon"]}
        for name in ("lr_scheduler_type", "warmup_steps"):
            if embed[name] != found[name]:
                found[f"embed_{name}"] = embed[name]
    return found | {
        "gradient_accumulation_steps": config.accumulate,
        "dtype": of.machine.dtype,
        "bf16": of.machine.autocast,
        "device": of.machine.device,
    }
