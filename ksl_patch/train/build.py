"""The stages of a build in their order, and the rule for its rows; what it works on is material.py's.

Every stage keeps its result in the run folder under a name made from all that it depends on, so a build that
was killed continues, and a build with another alpha uses the same embedding tuning.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksl_patch.data.encoding import Encoded
from ksl_patch.errors import RunError
from ksl_patch.hf import attach
from ksl_patch.kstest import KSResult, ks_test
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch, TemplateMeta
from ksl_patch.patch.evaluation import Evaluation, write
from ksl_patch.patch.meta import timestamp
from ksl_patch.terminal import counted
from ksl_patch.ticket import Selection, Ticket, frequency_ticket, ks_ticket, l2_ticket, random_ticket
from ksl_patch.train.assemble import assemble
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.loss import token_loss
from ksl_patch.train.progress import Reporter, SilentReporter, noting_warnings
from ksl_patch.train.record import Record, keep, note_use, read_tests, recorded, write_record
from ksl_patch.train.single import single
from ksl_patch.train.ticket_checks import given, report_unread, report_weak_rows
from ksl_patch.train.tuning import Tuning


def build(config: BuildConfig, run: Path, reporter: Reporter | None = None) -> Patch:
    """Build a patch, or continue the build that `run` holds.

    Raises a KslPatchError with one sentence for what the user can mend: data, base, settings, an empty ticket.
    """
    return Build(config, run, reporter or SilentReporter()).patch()


class Build(Tuning):
    """A build whose stages are computed once, on demand, and kept in the run folder."""

    def patch(self) -> Patch:
        """Run whatever is not done yet, and measure the loss of the result on the dev pairs."""
        patch = self.patch_of(self.ticket())
        patch = patch.with_meta(evaluation=self.losses(patch), created=self._created(patch.digest))
        tested = (self.embedding_folder / "ks.npz").is_file()
        tests = self.embedding_folder.name if tested else None
        record = Record(recorded(asdict(self.given)), tests, self.examples_digest, self.machine)
        write_record(self.run, patch.digest, record)
        return patch

    def seeded(self, seed: int) -> Build:
        """The same build of the same pairs and held-out pairs, trained with another seed."""
        return self._like(replace(self.config, seed=seed), self.template)

    def _like(self, config: BuildConfig, template: TemplateMeta | None) -> Build:
        """A build of the same pairs with other settings and, for None, a template made anew."""
        return Build(config, self.run, self.reporter, self.loaded, reopened=self.reopened, template=template, like=self)

    def selecting(self, selection: Selection, k: int) -> Build:
        """The same pairs with k rows by another selection, in its own prompt: with reserved tokens, or without any.

        Raises RunError where the base has too few reserved tokens, or no prompt for them that is this one otherwise.
        """
        config, own, wanted = self.config, self.template.of_base(), selection == "reserved"
        if wanted == (config.selection == "reserved" and not config.rows) and (wanted or own == self.template):
            return self
        config = replace(config, selection=selection, rows=(), top_k=k, beside=(), mode="partial", side="input")
        if wanted:
            config = replace(config, scope="all")
        made = self._like(config, None if wanted else own)
        if wanted and made.template.chat and made.template.of_base() != own:
            raise RunError("the chat template gives another prompt now than the patch has, by its date, say.")
        return made

    def patch_of(self, ticket: Ticket) -> Patch:
        """The patch of a ticket, trained (or transferred) as configured."""
        return self.patch_from(ticket, self.rows(ticket))

    @property
    def is_embedding_tuned(self) -> bool:
        """Whether the result of the embedding tuning is in the run folder."""
        return (self.embedding_folder / "rows.safetensors").is_file()

    def embedding_patch(self) -> Patch:
        """The tuned embedding in a patch's form: every row that the tuning read, and so could change."""
        token_ids, rows = self.embedding()
        return self.patch_from(Ticket(token_ids.numpy(), "all"), rows)

    def embedding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage 1. The token ids int64 [n] that embedding tuning can change and their tuned rows, float32 [n, d].

        With side "input" a row gets a gradient only if a step reads its token, so tuning those rows is tuning the whole
        table; the head of a tied model sees every token.
        """
        config = self.config
        ids = np.flatnonzero(self.embed_counts) if config.side == "input" else np.arange(self.base.vocab_size)
        token_ids = torch.from_numpy(ids)
        rows = self.tune("embedding tuning", "embed", token_ids, config.embed_steps, config.embed_lr, None)
        return token_ids, rows

    def ks(self) -> KSResult:
        """Stage 2. The test of every row, kept in `ks.npz` with the counts of the tokens in training."""
        file = self.embedding_folder / "ks.npz"
        if file.is_file():
            saved = read_tests(file)
            message = f"embedding tuning and its test: already done in {file.parent}"
            self.reporter.note("reused", message, stage="embedding tuning", folder=str(file.parent))
            return KSResult(saved["statistic"], saved["pvalue"], int(saved["hidden_size"]))
        token_ids, rows = self.embedding()
        before = self.base_rows(token_ids)
        self.reporter.note("testing", f"Testing {len(token_ids):,} rows ...", rows=len(token_ids))
        tested = ks_test(before, rows)
        statistic, pvalue = np.zeros(self.base.vocab_size), np.ones(self.base.vocab_size)
        statistic[token_ids], pvalue[token_ids] = tested.statistic, tested.pvalue
        content = io.BytesIO()
        np.savez(
            content, statistic=statistic, pvalue=pvalue, hidden_size=self.base.hidden_size, counts=self.embed_counts
        )
        keep(file, content.getvalue())
        return KSResult(statistic, pvalue, self.base.hidden_size)

    def ticket(self, selection: Selection | None = None, k: int | None = None) -> Ticket:
        """The selected rows: by the configured rule, or `k` rows by a selection of the caller's.

        The most frequent and random rows need no embedding tuning, and neither has the best single row, which is one
        whatever `k` says.
        """
        config = self.config
        selection = selection or config.rule
        k = k or config.top_k
        if selection == "given":
            return given(self)
        if selection == "single":
            return single(self)
        if selection == "reserved":
            return Ticket(np.array(self.reserved_ids), "reserved", top_k=k)
        if selection == "ks":
            with noting_warnings(self.reporter):
                return ks_ticket(self.ks(), alpha=config.alpha, top_k=k, cap=config.cap)
        if k is None:
            raise RunError(f"the selection {selection!r} needs top_k: nothing else says how many rows to take.")
        if selection == "frequency":
            return frequency_ticket(self.counts, k)
        if selection == "random":
            return random_ticket(self.counts, k, config.seed)
        token_ids, rows = self.embedding()
        distance = torch.linalg.vector_norm(rows - self.base_rows(token_ids), dim=1)
        return l2_ticket(token_ids.numpy(), distance.numpy(), k)

    def rows(self, ticket: Ticket) -> torch.Tensor:
        """Stage 3. The ticket's rows, float32 [k, d]: tuned alone from the base, or taken from the tuned table."""
        token_ids = torch.from_numpy(ticket.token_ids)
        largest = "" if ticket.statistic is None else f", largest D {ticket.statistic.max():.4f}"
        self.reporter.note(
            "ticket",
            f"ticket (the rows to replace): {counted(len(ticket), 'row')} ({ticket.selection}){largest}",
            selection=ticket.selection,
            token_ids=ticket.token_ids.tolist(),
        )
        own = self.reopened is None and ticket.selection == self.config.rule
        if own:
            report_weak_rows(self, ticket)
        if self.config.mode == "transfer":
            tuned_ids, rows = self.embedding()
            return rows[torch.searchsorted(tuned_ids, token_ids)]
        rows = self.tune("partial tuning", "partial", token_ids, self.config.steps, self.config.lr, ticket)
        if own:
            report_unread(self, ticket, self.steps_of(ticket)[0])
        return rows

    def patch_from(self, ticket: Ticket, rows: torch.Tensor) -> Patch:
        """The patch of some rows, float32 [k, d], cast to the base's own dtype."""
        return assemble(self, ticket, rows)

    def _created(self, digest: str) -> str:
        """When a build ended here with this patch and description first: one that is run again gives the same file."""
        described = [digest, self.config.name, self.config.language, self.config.licence]
        key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
        return str(self.folder.once(f"created-{key}.json", lambda: {"created": timestamp()})["created"])

    def losses(self, patch: Patch) -> dict[str, Any] | None:
        """Loss per answer token of the base and the patch on the dev pairs; None when there are none.

        The held-out pairs are for figures that nothing was chosen by: `eval` is their place.
        """
        if not len(self.dev):
            return None
        plain = self.of_base(self.dev).examples
        key = [patch.digest, self.loaded.digest, self.dev.examples, plain, asdict(self.machine)]
        file = f"dev-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"

        def measured() -> dict[str, Any]:
            self.reporter.note("measuring", f"Measuring the loss on {len(self.dev)} dev pairs ...", pairs=len(self.dev))
            return {"base": token_loss(self.model, plain), "patch": self.patched_loss(patch)}

        losses = self.folder.once(file, measured)
        result = Evaluation(
            pairs=len(self.dev),
            data_digest=self.dev.digest,
            loss_base=losses["base"],
            loss_patch=losses["patch"],
            part="dev",
        )
        self.note_use(self.dev, patch)
        self.reporter.note(
            "dev",
            f"loss on {result.pairs} dev pairs: base {result.loss_base:.3f}, patch {result.loss_patch:.3f}",
            pairs=result.pairs,
            data_digest=result.data_digest,
            loss_base=result.loss_base,
            loss_patch=result.loss_patch,
        )
        if result.loss_base is not None and (result.loss_patch or 0) >= result.loss_base:
            self.reporter.note("no_gain", "the patch is no better than the base there: train longer, or otherwise.")
        return write(result)

    def patched_loss(self, patch: Patch, pairs: Encoded | None = None) -> float:
        """Loss per answer token of the model with the patch's stored rows, on the dev pairs by default."""
        with attach(self.model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
            return token_loss(self.model, (self.dev if pairs is None else pairs).examples, marking=handle.marking)

    def note_use(self, pairs: Encoded, patch: Patch) -> int:
        """Remember that a patch was measured on pairs; how many patches of this run folder were on any of them."""
        return note_use(self.run, patch.digest, pairs)
