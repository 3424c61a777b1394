"""How far a patched model says what the fully tuned one says, on held-out prompts, and the certificate of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ksl_patch.data.encoding import Encoded, Example, collate
from ksl_patch.errors import RunError
from ksl_patch.evidence.certificate import exact, ks_margin, lower_bound
from ksl_patch.evidence.elsewhere import elsewhere_in, elsewhere_of
from ksl_patch.evidence.outputs import Cache, outputs_of, token_limit
from ksl_patch.hf import attach
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch
from ksl_patch.patch.evaluation import Certificate
from ksl_patch.patch.meta import DEFAULT_ALPHA
from ksl_patch.train.build import Build


def certify(
    build: Build,
    patch: Patch,
    held_out: Encoded,
    *,
    alpha: float = DEFAULT_ALPHA,
    delta: float = 0.05,
    max_new_tokens: int | None = None,
    part: str | None = None,
    uses: int | None = None,
) -> Certificate:
    """The certificate of a patch: what it does outside its template, and, against the tuned embedding that its build
    began with, its agreement. Reserved rows come from no tuned embedding, and there is the former alone.

    held_out: pairs that trained nothing and chose nothing. part, uses: as in `compare.evaluate`. Raises RunError when
    the build has no tuned embedding.
    """
    cache = Cache.of(build)
    model, tokenizer, reporter = build.model, build.tokenizer, build.reporter
    texts = elsewhere_of(model, tokenizer, None, cache, reporter)
    outside = elsewhere_in(model, tokenizer, patch, texts, cache, reporter)
    if build.reserved_ids:
        return Certificate(
            pairs=len(held_out), data_digest=held_out.digest, delta=delta,
            max_new_tokens=max_new_tokens or token_limit(held_out), exact=None, next_token=None, continuation=None,
            margin=None, part=part, elsewhere=outside,
        )  # fmt: skip
    if not build.is_embedding_tuned:
        raise RunError(
            f"{build.run} has no tuned embedding to compare the patch with, of this seed, base, pairs and template: "
            "`ksl-patch build` with the same settings and folder, with --selection ks and without --rows, makes it."
        )
    max_new_tokens = max_new_tokens or token_limit(held_out)
    tuned = build.embedding_patch()
    prompts = [example.prompt for example in held_out.examples]
    build.reporter.note("next_tokens", f"Comparing the next token after {len(prompts)} prompts ...")
    tokens, margins = _next_tokens(build.model, held_out.examples, tuned)
    patched, _ = _next_tokens(build.model, held_out.examples, patch)
    outputs = [
        outputs_of(
            model, tokenizer, held_out, each, max_new_tokens=max_new_tokens, cache=cache, reporter=reporter,
            stage=f"answers: {name}",
        ).token_ids
        for name, each in (("embedding tuned", tuned), ("patch", patch))
    ]  # fmt: skip
    n = len(held_out)
    notes = []
    if part == "dev":
        notes.append("These are the dev pairs: if the patch was chosen by them, the bounds do not hold.")
    elif uses is not None and uses > 1:
        notes.append(
            f"{uses} patches of this run folder were measured on these pairs, or some of them: if this one was chosen "
            "by that, the bounds do not hold."
        )
    if held_out.groups is not None and len(set(held_out.groups)) < len(held_out):
        notes.append("The pairs come in documents, so they are not independent draws, and the bounds are too high.")
    return Certificate(
        pairs=n,
        data_digest=held_out.digest,
        delta=delta,
        max_new_tokens=max_new_tokens,
        exact=exact(patch, tuned, prompts),
        next_token=lower_bound(int((tokens == patched).sum()), n, delta),
        continuation=lower_bound(sum(a == b for a, b in zip(*outputs, strict=True)), n, delta),
        margin=ks_margin(
            margins, tokens != patched, torch.from_numpy(build.ks().statistic), patch.token_ids,
            build.base.hidden_size, alpha,
        ),
        part=part,
        notes=notes,
        elsewhere=outside,
    )  # fmt: skip


@torch.no_grad()
def _next_tokens(
    model: Any, examples: Sequence[Example], patch: Patch, *, batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy token after each prompt, int64 [n], and its probability minus that of the second, float32 [n]."""
    tokens, margins = [], []
    with attach(model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
        for start in range(0, len(examples), batch_size):
            part = [Example(example.prompt, []) for example in examples[start : start + batch_size]]
            batch = {k: v.to(model.device) for k, v in collate(part, pad=0).items() if k != "labels"}
            with handle.marking(batch["attention_mask"] == 1):  # there is nothing but the prompt
                logits = model(**batch, use_cache=False).logits
            last = batch["attention_mask"].sum(dim=1) - 1
            top = logits[torch.arange(len(part), device=last.device), last].float().softmax(-1).topk(2)
            tokens.append(top.indices[:, 0].cpu())
            margins.append((top.values[:, 0] - top.values[:, 1]).cpu())
    return torch.cat(tokens), torch.cat(margins)
