"""The whole build: embedding tuning -> KS test -> partial tuning (or transfer) -> patch.

Every stage keeps its result in the run folder under a name made from all that it depends on, so a build that
was killed continues, and a build with another alpha uses the same embedding tuning.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ksl_patch.atomic import write_atomically
from ksl_patch.base import find_embedding
from ksl_patch.base.identity import has_other_weights
from ksl_patch.base.names import check_base_model, is_hub_id, named_in_files
from ksl_patch.base.tensors import dtype_name
from ksl_patch.data.columns import Columns
from ksl_patch.data.encoding import Encoded, Example, check_ids, encode, source_tokens, token_counts
from ksl_patch.data.languages import check_languages, language_name
from ksl_patch.data.pairs import Pair, data_digest
from ksl_patch.data.reading import Reading, read_pairs
from ksl_patch.data.recognition import recogniser
from ksl_patch.data.sketch import sketch
from ksl_patch.data.split import reading_order, split_pairs
from ksl_patch.data.templates import make_template, template_fields
from ksl_patch.errors import DataError, RunError
from ksl_patch.hf import attach, end_token_id, load_base
from ksl_patch.kstest import KSResult, ks_test
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import Patch, Scope, Side, TemplateMeta, TicketMeta, TrainingMeta
from ksl_patch.patch.evidence import Evaluation, write
from ksl_patch.patch.meta import timestamp
from ksl_patch.patch.names import check_language, check_name
from ksl_patch.terminal import counted
from ksl_patch.ticket import (
    DEFAULT_CAP,
    Selection,
    Ticket,
    frequency_ticket,
    given_ticket,
    ks_ticket,
    l2_ticket,
    random_ticket,
)
from ksl_patch.train.loaded import Loaded, launched
from ksl_patch.train.loss import token_loss
from ksl_patch.train.progress import Reporter, SilentReporter
from ksl_patch.train.record import Machine, Record, keep, note_use, read_record, read_tests, write_record
from ksl_patch.train.tune import TuneSettings, autocasts, optimiser, tune_rows

Mode = Literal["partial", "transfer"]
_LOOKED_AT = 64  # pairs, for what a template shows


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything a build depends on. Learning rates are in units of the standard deviation of the table's values.

    pairs: what `read_pairs` takes. strict: a line that is no pair is an error, and not left out.
    rows: tokens named by hand, ids or texts, in place of a selection. group: the pairs' column with their document.
    data_seed: of the split into training, dev and held-out pairs. damp_rare: of the embedding tuning, see
    `TuneSettings`. base_model: the base's id on the Hub, where it is a folder.
    """

    base: str
    pairs: str | tuple[str, ...]
    language: str
    name: str
    revision: str | None = None
    source_language: str = "en"
    columns: tuple[str, str] = ("source", "target")
    group: str | None = None
    strict: bool = False
    template: str = "plain"
    system: str | None = None
    alpha: float | None = 0.05
    top_k: int | None = None
    cap: int = DEFAULT_CAP
    selection: Selection = "ks"
    rows: tuple[str | int, ...] = ()
    mode: Mode = "partial"
    side: Side = "input"
    scope: Scope = "all"
    embed_steps: int = 100
    embed_lr: float = 0.15
    damp_rare: bool = True
    steps: int = 100
    lr: float = 0.15
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    data_seed: int = 0
    dev: int = 64
    held_out: int = 64
    max_pairs: int | None = None
    max_length: int = 256
    checkpoint_every: int = 25
    gradient_checkpointing: bool = False
    licence: str | None = None
    device: str | None = None
    base_model: str | None = None


def build(config: BuildConfig, run: Path, reporter: Reporter | None = None) -> Patch:
    """Build a patch, or continue the build that `run` holds.

    Raises a KslPatchError with one sentence for what the user can mend: data, base, settings, an empty ticket.
    """
    return Build(config, run, reporter or SilentReporter()).patch()


class Build:
    """A build whose stages are computed once, on demand, and kept in the run folder.

    pairs, model, tokenizer, template, train, dev, held_out: what it works on, ready after construction.
    loaded: the base, where it is at hand. reopened: where its patch was trained; stages that were finished there, or on
    another kind of machine, are used then. template: where it is known; a chat template may render otherwise today.
    """

    def __init__(
        self,
        config: BuildConfig,
        run: Path,
        reporter: Reporter,
        loaded: Loaded | None = None,
        *,
        reopened: Machine | None = None,
        template: TemplateMeta | None = None,
    ) -> None:
        check_name(config.name)
        check_language(config.language)
        self.config, self.run, self.reporter, self._reopened = config, run, reporter, reopened
        if config.scope == "prompt" and config.side != "input":
            raise RunError("scope 'prompt' needs side 'input': the output side acts on what follows the prompt.")
        fields = template_fields(config.template, config.system)
        if config.columns[1] in fields:
            raise RunError(f"the template must not hold the answer: remove {{{config.columns[1]}}}.")
        languages = config.source_language, config.language
        check_base_model(config.base_model)
        check_languages(*languages)
        reading = Reading(strict=config.strict)
        read = read_pairs(
            config.pairs,
            Columns(*config.columns, config.group, tuple(fields)),
            languages=languages,
            limit=None if config.max_pairs is None else 2 * (config.max_pairs + config.dev + config.held_out),
            reading=reading,
        )
        self._chats = reading.messages
        if self._chats and config.template != "chat":
            raise RunError("the pairs are chats (messages), in the chat template's prompts: add --template chat.")
        if reopened is None:
            self._report_pairs(read, reading)
        self.pairs = split_pairs(read, held_out=config.held_out, dev=config.dev, seed=config.data_seed)
        for event, count, what in (
            ("duplicates", self.pairs.duplicates, "whose source occurs before"),
            ("unused", self.pairs.unused, "of documents or sources that are held out, beyond those that are measured"),
        ):
            if count:
                reporter.note(event, f"left out: {counted(count, 'pair')} {what}", pairs=count)
        # Under a launcher each process has a device of its own.
        state = launched(config.device)
        device = config.device or str(state.device)
        self.processes: int = state.num_processes
        if loaded is None:
            reporter.note("loading", f"Loading {config.base} ...", base=config.base)
            loaded = Loaded.of(*load_base(config.base, revision=config.revision, device=device))
        self.loaded = loaded
        self.model, self.tokenizer, self.base, self.scale = (
            loaded.model,
            loaded.tokenizer,
            loaded.identity,
            loaded.scale,
        )
        if config.base_model is not None:
            self.base = replace(self.base, model_id=config.base_model)
        elif reopened is None and Path(config.base).is_dir() and not is_hub_id(self.base.model_id or ""):
            named = named_in_files(Path(config.base))
            tuned = f" (its config.json names {named}, which may be what it was tuned from)" if named else ""
            message = (
                f"the patch will call its base {self.base.model_id}, after its folder; to publish it, --base-model ID "
                f"says its id on the Hub{tuned}"
            )
            reporter.note("base_model", message, model_id=self.base.model_id, named=named)
        if config.side == "input+output" and not find_embedding(self.model).tied:
            raise RunError("side 'input+output' is for bases whose head is tied to the embedding; use 'input' here.")
        self.template = template or self._template()
        self.train = self._training()
        self.dev = self.encode(self.pairs.dev, "dev") if self.pairs.dev else Encoded([], [], self.template)
        self.held_out = (
            self.encode(self.pairs.held_out, "held-out") if self.pairs.held_out else Encoded([], [], self.template)
        )
        if reopened is None:
            self._report_start()

    def _training(self) -> Encoded:
        """The training pairs as token ids, of those that are not too long the first `max_pairs`."""
        limit, pairs = self.config.max_pairs, self.pairs.train
        taken = limit or len(pairs)
        while len(found := self._encoded(pairs[:taken])) < (limit or 0) and taken < len(pairs):
            taken *= 2
        found = found.first(limit)
        if len(found):
            pairs = pairs[: pairs.index(found.pairs[-1]) + 1] if limit else pairs
        self._check_length(pairs, found, "training")
        if limit:
            self.pairs = replace(self.pairs, train=found.pairs)
        return found

    def _report_pairs(self, read: Sequence[Pair], reading: Reading) -> None:
        """Which language is which, the first pairs as they will be trained, and what was left out."""
        config, shown = self.config, read[:5]
        source, target = (f"{language_name(tag)} ({tag})" for tag in (config.source_language, config.language))
        lines = [f"{source} -> {target}, {len(read):,} pairs. The first:"]
        lines += [f"  {_short(pair.source)} -> {_short(pair.target)}" for pair in shown]
        examples = [[pair.source, pair.target] for pair in shown]
        self.reporter.note("pairs", "\n".join(lines), pairs=len(read), examples=examples)
        known = recogniser(config.language, config.source_language)
        sample = [pair.target for pair in read[:: max(1, len(read) // 200)]]
        if known is not None and len(sample) >= 20 and (found := sum(map(known, sample)) / len(sample)) < 0.2:
            message = (
                f"py3langid takes {found:.0%} of the targets for {language_name(config.language)}: is --language right?"
            )
            self.reporter.doubt("language", message, recognised=found, language=config.language)
        if reading.wrong:
            count = (
                "1 line is no pair and was" if reading.wrong == 1 else f"{reading.wrong:,} lines are no pairs and were"
            )
            lines = [f"{count} left out (--strict refuses them):", *reading.first]
            self.reporter.note("wrong_lines", "\n  ".join(lines), lines=reading.wrong, first=reading.first)

    @property
    def machine(self) -> Machine:
        """What its stages are computed with."""
        config, device = self.config, self.model.device.type
        batch = config.batch_size, config.accumulate, self.processes
        return Machine(device, dtype_name(self.model.dtype), autocasts(device), batch)

    @property
    def batch(self) -> int:
        """Pairs in a step, over all processes."""
        return self.config.batch_size * self.config.accumulate * self.processes

    def read_in(self, steps: int) -> list[Example]:
        """What so many steps of a tuning read, in that order, with repetitions."""
        return [self.train.examples[i] for i in reading_order(len(self.train), steps * self.batch, self.config.seed)]

    def pairs_read_in(self, steps: int) -> list[Pair]:
        """The different pairs that so many steps of a tuning read."""
        order = reading_order(len(self.train), steps * self.batch, self.config.seed)
        return [self.train.pairs[i] for i in dict.fromkeys(order)]

    @cached_property
    def embed_counts(self) -> np.ndarray:
        """How often the embedding tuning read each token where a patch acts, int64 [V]."""
        return self._counts(self.config.embed_steps)

    @cached_property
    def counts(self) -> np.ndarray:
        """The same for the tuning that gives the patch its rows: only rows that were read get a gradient."""
        return self._counts(self.config.steps) if self.config.mode == "partial" else self.embed_counts

    def _counts(self, steps: int) -> np.ndarray:
        return token_counts(self.read_in(steps), self.base.vocab_size, prompt_only=self.config.scope == "prompt")

    def patch(self) -> Patch:
        """Run whatever is not done yet, and measure the loss of the result on the dev pairs."""
        patch = self.patch_of(self.ticket())
        patch = patch.with_meta(evaluation=self.losses(patch), created=self._created(patch.digest))
        config = asdict(self.config)
        config["base"] = _resolved(config["base"])
        pairs = config["pairs"]
        config["pairs"] = _resolved(pairs) if isinstance(pairs, str) else tuple(map(_resolved, pairs))
        tested = (self._embedding_folder / "ks.npz").is_file()
        tests = self._embedding_folder.name if tested else None
        write_record(self.run, patch.digest, Record(config, tests, self._examples_digest, self.machine))
        return patch

    def seeded(self, seed: int) -> Build:
        """The same build of the same pairs and held-out pairs, trained with another seed."""
        config, template = replace(self.config, seed=seed), self.template
        return Build(config, self.run, self.reporter, self.loaded, reopened=self._reopened, template=template)

    def patch_of(self, ticket: Ticket) -> Patch:
        """The patch of a ticket, trained (or transferred) as configured."""
        return self.patch_from(ticket, self.rows(ticket))

    @property
    def is_embedding_tuned(self) -> bool:
        """Whether the result of the embedding tuning is in the run folder."""
        return (self._embedding_folder / "rows.safetensors").is_file()

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
        rows = self._tune("embedding tuning", "embed", token_ids, config.embed_steps, config.embed_lr, None)
        return token_ids, rows

    def ks(self) -> KSResult:
        """Stage 2. The test of every row, kept in `ks.npz` with the counts of the tokens in training."""
        file = self._embedding_folder / "ks.npz"
        if file.is_file():
            saved = read_tests(file)
            message = f"embedding tuning and its test: already done in {file.parent}"
            self.reporter.note("reused", message, stage="embedding tuning", folder=str(file.parent))
            return KSResult(saved["statistic"], saved["pvalue"], int(saved["hidden_size"]))
        token_ids, rows = self.embedding()
        before = self._base_rows(token_ids)
        self.reporter.note("testing", f"Testing {len(token_ids):,} rows ...", rows=len(token_ids))
        tested = ks_test(before, rows)
        statistic, pvalue = np.zeros(self.base.vocab_size), np.ones(self.base.vocab_size)
        statistic[token_ids], pvalue[token_ids] = tested.statistic, tested.pvalue
        content = io.BytesIO()
        np.savez(
            content, statistic=statistic, pvalue=pvalue, hidden_size=self.base.hidden_size, counts=self.embed_counts
        )
        write_atomically(file, content.getvalue())
        return KSResult(statistic, pvalue, self.base.hidden_size)

    def ticket(self, selection: Selection | None = None, k: int | None = None) -> Ticket:
        """The selected rows: by the configured rule, or `k` rows by a selection of the caller's.

        The most frequent and random rows need no embedding tuning, and neither has the best single row, which is one
        whatever `k` says.
        """
        config = self.config
        selection = selection or ("given" if config.rows else config.selection)
        k = k or config.top_k
        if selection == "given":
            return self._given()
        if selection == "single":
            return self._single()
        if selection == "ks":
            with self._noting_warnings():
                return ks_ticket(self.ks(), alpha=config.alpha, top_k=k, cap=config.cap)
        if k is None:
            raise RunError(f"the selection {selection!r} needs top_k: nothing else says how many rows to take.")
        if selection == "frequency":
            return frequency_ticket(self.counts, k)
        if selection == "random":
            return random_ticket(self.counts, k, config.seed)
        token_ids, rows = self.embedding()
        distance = torch.linalg.vector_norm(rows - self._base_rows(token_ids), dim=1)
        return l2_ticket(token_ids.numpy(), distance.numpy(), k)

    def _given(self) -> Ticket:
        """The rows named by hand. Raises RunError where none of them gets a gradient, and says which do not."""
        ticket = given_ticket(self.config.rows, self.tokenizer, self.base.vocab_size)
        if self.config.side == "input+output":
            return ticket
        unread = ticket.token_ids[self.counts[ticket.token_ids] == 0]
        if len(unread):
            names = ", ".join(f"{self.tokenizer.decode([i])!r} ({i})" for i in unread)
            what = f"the training never reads {names} where the patch acts"
            if len(unread) == len(ticket) or self.config.mode == "transfer":
                raise RunError(f"{what}, so there is nothing to train: name tokens of the prompt.")
            self.reporter.note("unread", f"{what}, so these rows stay the base's", token_ids=unread.tolist())
        return ticket

    def _single(self) -> Ticket:
        """The row of the template whose patch has the lowest loss on the dev pairs; of equal ones the smallest id.

        A patch of each is trained as any other is, and kept. Raises RunError without dev pairs.
        """
        if not len(self.dev):
            raise RunError("the selection 'single' compares rows on the dev pairs, and there are none: give --dev.")
        candidates, losses = self.template_tokens(), []
        for place, i in enumerate(candidates, start=1):
            loss = self.patched_loss(self.patch_of(Ticket(np.array([i]), "single")))
            losses.append(loss)
            self.reporter.note(
                "candidate",
                f"row {place} of {len(candidates)}, {self.tokenizer.decode([i])!r} ({i}), alone: loss {loss:.3f} on "
                f"{len(self.dev)} dev pairs",
                token_id=i,
                loss=loss,
            )
        return Ticket(np.array([candidates[int(np.argmin(losses))]]), "single")

    def template_tokens(self, most: int | None = None) -> list[int]:
        """The ids, ascending, that training reads in prompts around the sentence and what else is filled in.

        most: look at so many pairs only. Raises RunError for a tokenizer that does not say which characters a token
        covers.
        """
        steps = self.config.steps if self.config.mode == "partial" else self.config.embed_steps
        found: set[int] = set()
        for i in list(set(reading_order(len(self.train), steps * self.batch, self.config.seed)))[:most]:
            filled = source_tokens(self.tokenizer, self.template, self.train.pairs[i], fields=True)
            if filled is None:
                raise RunError(
                    "the selection 'single' needs a fast tokenizer: others do not say which tokens are the template's."
                )
            prompt = self.train.examples[i].prompt
            found.update(token for token, inside in zip(prompt, filled, strict=True) if not inside)
        if not found:
            raise RunError("the template has no token of its own around the sentence: 'single' has nothing to choose.")
        return sorted(found)

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
        own = "given" if self.config.rows else self.config.selection
        if self._reopened is None and ticket.selection == own:
            self._report_weak_rows(ticket)
        if self.config.mode == "transfer":
            tuned_ids, rows = self.embedding()
            return rows[torch.searchsorted(tuned_ids, token_ids)]
        return self._tune("partial tuning", "partial", token_ids, self.config.steps, self.config.lr, ticket)

    def _report_weak_rows(self, ticket: Ticket) -> None:
        """Of a ticket, which rows the test does not call moved, and whether the template has any of them."""
        level = self.config.alpha or 0.05
        pvalues = np.zeros(0) if ticket.pvalue is None else ticket.pvalue
        if weak := int((pvalues >= level).sum()):
            message = (
                f"{weak} of these {counted(len(ticket), 'row')} did not move by the test (p >= {level:g}, up to "
                f"{pvalues.max():.2g}): --top-k alone takes them all the same, and --alpha {level:g} beside it does not"
            )
            self.reporter.note("weak_rows", message, rows=weak, alpha=level)
        with suppress(RunError):  # a slow tokenizer, or a template without words
            if not set(ticket.token_ids.tolist()) & set(self.template_tokens(_LOOKED_AT)):
                message = (
                    "no row of the ticket is of the template around the sentence: the patch acts where a sentence or "
                    "an answer has these tokens, and nowhere else"
                )
                self.reporter.note("outside_template", message)

    def patch_from(self, ticket: Ticket, rows: torch.Tensor) -> Patch:
        """The patch of some rows, float32 [k, d], cast to the base's own dtype."""
        config = self.config
        table = find_embedding(self.model)
        compute = table.weight.dtype
        table.weight.data = table.weight.data.to(self.loaded.dtype)
        try:
            patch = Patch.from_model(
                self.model,
                torch.from_numpy(ticket.token_ids),
                rows,
                name=config.name,
                language=config.language,
                tokenizer=self.tokenizer,
                side=config.side,
                scope=config.scope,
                template=self.template,
                licence=config.licence,
            )
        finally:
            table.weight.data = table.weight.data.to(compute)
        whole = ticket.selection == "all"
        partial = config.mode == "partial" and not whole
        tuned = not partial or ticket.selection in ("ks", "l2")
        steps = max(config.steps if partial else 0, config.embed_steps if tuned else 0)
        read = self.pairs_read_in(steps)
        return patch.with_meta(
            base=self.base,
            ticket=TicketMeta(
                selection=ticket.selection,
                test=None if ticket.statistic is None else "two-sample Kolmogorov-Smirnov, two-sided, exact",
                alpha=ticket.alpha,
                top_k=ticket.top_k,
                statistic=None if ticket.statistic is None else ticket.statistic.tolist(),
                pvalue=None if ticket.pvalue is None else ticket.pvalue.tolist(),
            ),
            training=TrainingMeta(
                mode="transfer" if whole else config.mode,
                steps=config.steps if partial else 0,
                lr=config.lr * self.scale if partial else 0.0,
                optimiser="AdamW, weight decay 0, linear decay",
                batch_size=self.batch,
                seed=config.seed,
                data_digest=data_digest(self.pairs.train),
                pairs=len(self.train),
                embed_steps=config.embed_steps if tuned else 0,
                embed_lr=config.embed_lr * self.scale if tuned else 0.0,
                embedding_scale=self.scale,
                pairs_read=len(self.pairs_read_in(config.steps)) if partial else 0,
                embed_pairs_read=len(self.pairs_read_in(config.embed_steps)) if tuned else 0,
                processes=self.processes,
                hyperparameters=self._hyperparameters(len(ticket), partial, tuned),
                sources=sketch(read),
            ),
        )

    def _hyperparameters(self, rows: int, partial: bool, tuned: bool) -> dict[str, int | float | str | bool]:
        """What the optimiser of the rows was set to; embed_: what is other in the embedding tuning before."""
        config, d = self.config, self.base.hidden_size
        found = optimiser(rows * d, damp_rare=False) if partial else {}
        if tuned:
            n = np.count_nonzero(self.embed_counts) if config.side == "input" else self.base.vocab_size
            embed = optimiser(int(n) * d, damp_rare=config.damp_rare)
            found = found or {key: value for key, value in embed.items() if key != "adam_epsilon"}
            found |= {"damp_rare": config.damp_rare, "embed_adam_epsilon": embed["adam_epsilon"]}
        return found | {
            "gradient_accumulation_steps": config.accumulate,
            "dtype": self.machine.dtype,
            "bf16": self.machine.autocast,
            "device": self.machine.device,
        }

    def _created(self, digest: str) -> str:
        """When a build ended here with this patch and description first: one that is run again gives the same file."""
        described = [digest, self.config.name, self.config.language, self.config.licence]
        key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
        return str(self._once(f"created-{key}.json", {"created": timestamp()})["created"])

    def losses(self, patch: Patch) -> dict[str, Any] | None:
        """Loss per answer token of the base and the patch on the dev pairs; None when there are none.

        The held-out pairs are for figures that nothing was chosen by: `eval` is their place.
        """
        if not len(self.dev):
            return None
        self.reporter.note("measuring", f"Measuring the loss on {len(self.dev)} dev pairs ...", pairs=len(self.dev))
        result = Evaluation(
            pairs=len(self.dev),
            data_digest=self.dev.digest,
            loss_base=token_loss(self.model, self.dev.examples),
            loss_patch=self.patched_loss(patch),
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
        return write(result)

    def patched_loss(self, patch: Patch, pairs: Encoded | None = None) -> float:
        """Loss per answer token of the model with the patch's stored rows, on the dev pairs by default."""
        with attach(self.model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
            return token_loss(self.model, (pairs or self.dev).examples, handle=handle)

    def note_use(self, pairs: Encoded, patch: Patch) -> int:
        """Remember that a patch was measured on pairs; how many patches of this run folder were on any of them."""
        return note_use(self.run, patch.digest, pairs)

    def _tune(
        self, stage: str, kind: str, token_ids: torch.Tensor, steps: int, lr: float, ticket: Ticket | None
    ) -> torch.Tensor:
        config, key = self.config, self._tune_key(steps, lr, ticket)
        folder = self._folder(kind, key)
        if not (folder / "rows.safetensors").is_file():
            keep(folder / "settings.json", json.dumps(key, indent=1).encode())
        return tune_rows(
            self.model,
            token_ids,
            self.read_in(steps),
            TuneSettings(
                steps=steps,
                lr=lr * self.scale,
                batch_size=config.batch_size,
                accumulate=config.accumulate,
                seed=config.seed,
                checkpoint_every=config.checkpoint_every,
                gradient_checkpointing=config.gradient_checkpointing,
                damp_rare=ticket is None and config.damp_rare,
            ),
            side=config.side,
            scope=config.scope,
            folder=folder,
            stage=stage,
            reporter=self.reporter,
            later=self._later(kind),
        )

    def _later(self, kind: str) -> int | None:
        """Steps of the stages after one of a kind; None where controls or candidates follow, nobody knows how many."""
        if self._reopened is not None or self.config.selection == "single":
            return None
        return self.config.steps if kind == "embed" and self.config.mode == "partial" else 0

    @property
    def _embedding_folder(self) -> Path:
        return self._folder("embed", self._tune_key(self.config.embed_steps, self.config.embed_lr, None))

    def _tune_key(self, steps: int, lr: float, ticket: Ticket | None) -> dict[str, Any]:
        """All that a tuning's result depends on."""
        config = self.config
        return {
            "base": self.loaded.digest,
            "examples": self._examples_digest,
            "side": config.side,
            "scope": config.scope,
            "steps": steps,
            "lr": lr,
            "damp_rare": ticket is None and config.damp_rare,
            "batch": self.batch,
            "seed": config.seed,
            "machine": asdict(self.machine),
            "token_ids": None if ticket is None else hashlib.sha256(ticket.token_ids.tobytes()).hexdigest(),
        }

    @cached_property
    def _examples_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.train.examples).encode()).hexdigest()

    def _folder(self, kind: str, key: dict[str, Any]) -> Path:
        """The stage's folder in the run folder; `settings.json` in it says what its name was made from.

        A build that was opened again takes a stage that was finished where its patch was trained, then one of this
        kind of machine, then of any other.
        """
        own = self._named(kind, key)
        if self._reopened is None:
            return own
        there = self._named(kind, key | {"machine": asdict(self._reopened)})
        others = []
        for settings in sorted(self.run.glob(f"{kind}-*/settings.json")):
            with suppress(OSError, ValueError, TypeError):  # not a stage of ours
                if {**json.loads(settings.read_bytes()), "machine": None} == {**key, "machine": None}:
                    others.append(settings.parent)
        return next((each for each in (there, own, *others) if (each / "rows.safetensors").is_file()), own)

    def _named(self, kind: str, key: dict[str, Any]) -> Path:
        return self.run / f"{kind}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"

    def _template(self) -> TemplateMeta:
        """The prompt template, as this run folder had it first: a chat template may hold the day's date."""
        config = self.config
        made = make_template(
            config.template,
            source_language=config.source_language,
            language=config.language,
            tokenizer=self.tokenizer,
            system=config.system,
            instruction=not self._chats,
        )
        if not made.chat:
            return made
        key = [config.system, config.source_language, config.language, self.loaded.digest]
        key += ["chats"] if self._chats else []
        name = f"template-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
        try:
            return TemplateMeta(**self._once(name, asdict(made)))
        except TypeError as error:
            raise RunError(f"cannot read {self.run / name} ({error}): delete it, and it is made again.") from error

    def _once(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """A value that a continued run takes from its beginning."""
        file = self.run / name
        if not file.is_file():
            keep(file, json.dumps(value).encode())
        try:
            return dict(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {file}: {error}.") from error

    def _base_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        weight = find_embedding(self.model).weight.detach()
        return weight[token_ids.to(weight.device)].float().cpu()

    def encode(self, pairs: list[Pair], what: str, template: TemplateMeta | None = None) -> Encoded:
        """Pairs as token ids in a template, the build's own by default. Raises RunError when all are too long."""
        encoded = self._encoded(pairs, template)
        self._check_length(pairs, encoded, what)
        return encoded

    def _encoded(self, pairs: list[Pair], template: TemplateMeta | None = None) -> Encoded:
        end = end_token_id(self.model, self.tokenizer)
        encoded = encode(template or self.template, pairs, self.tokenizer, end, self.config.max_length)
        check_ids((e.prompt + e.answer for e in encoded.examples), self.base.vocab_size)
        return encoded

    def _check_length(self, pairs: list[Pair], encoded: Encoded, what: str) -> None:
        dropped = len(pairs) - len(encoded)
        if not len(encoded):
            raise RunError(f"every {what} pair is longer than {self.config.max_length} tokens; raise --max-length.")
        if dropped:
            self.reporter.note(
                "too_long",
                f"{dropped} of {len(pairs)} {what} pairs were left out: longer than {self.config.max_length} tokens",
                pairs=dropped,
            )

    def _report_start(self) -> None:
        config, processes = self.config, self.processes
        together = f", {processes} processes" if processes > 1 else ""
        lines = [
            f"{len(self.train)} pairs to train, {len(self.dev)} for choices, {len(self.held_out)} held out{together}",
            f"learning rates {config.embed_lr * self.scale:.3g} (embedding) and {config.lr * self.scale:.3g} (rows), "
            f"which are {config.embed_lr:g} and {config.lr:g} of the standard deviation of the table's values, "
            f"{self.scale:.3g}",
        ]
        self.reporter.note(
            "start",
            "\n".join(lines),
            pairs=len(self.train),
            dev=len(self.dev),
            held_out=len(self.held_out),
            processes=processes,
            scale=self.scale,
            embed_lr=config.embed_lr * self.scale,
            lr=config.lr * self.scale,
            run=str(self.run),
        )

    @contextmanager
    def _noting_warnings(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            self.reporter.note("warning", str(warning.message))


def _selected_as(patch: Patch, config: BuildConfig) -> BuildConfig:
    """The settings with the patch's own selection: two that gave the same rows share a digest, and so a record."""
    ticket = patch.meta.ticket
    if ticket is None:
        return config
    if ticket.selection == "given":
        return replace(config, rows=tuple(patch.token_ids.tolist()))
    return replace(config, rows=(), selection=ticket.selection, alpha=ticket.alpha, top_k=ticket.top_k)  # type: ignore[arg-type]


def _resolved(path: str) -> str:
    """A path from anywhere; what does not exist is an id on the Hub."""
    return os.path.abspath(path) if Path(path).exists() else path  # noqa: PTH100 - a link's name says a form, too


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def reopen(patch: Patch, run: Path, reporter: Reporter | None = None, **changes: Any) -> Build:
    """The build that a patch came from, by the record in its run folder.

    changes: fields of its BuildConfig that are different now, such as where the base and the pairs are.
    Raises RunError without a record, DataError when the pairs are not those of the patch's training.
    """
    record = read_record(run, patch.digest)
    try:
        config = BuildConfig(**record.config | changes)
        if not isinstance(config.pairs, str):
            config = replace(config, pairs=tuple(config.pairs))
    except TypeError as error:
        raise RunError(f"the record of the build in {run} is of another version of ksl-patch ({error}).") from error
    if record.machine is None:
        raise RunError(
            f"the patch is of an earlier ksl-patch, whose split of the pairs was another: build it again in {run}."
        )
    # As many pairs in a step as all processes had together.
    processes = record.machine.batch[2]
    accumulate, rest = divmod(config.accumulate * processes, launched(config.device).num_processes)
    if rest:
        raise RunError(f"the patch was trained by {processes} processes: run this with one process, or so many.")
    config = _selected_as(patch, replace(config, accumulate=accumulate))
    reporter, template = reporter or SilentReporter(), patch.meta.template
    build = Build(config, run, reporter, reopened=record.machine, template=template)
    training = patch.meta.training
    if training is None or training.data_digest != data_digest(build.pairs.train):
        raise DataError(
            f"the pairs in {config.pairs} do not give the training data of this patch; name the file that it was built "
            "from with --pairs"
            + (" (or an earlier one built it, whose --max-pairs counted too long pairs)" if config.max_pairs else "")
            + "."
        )
    patch.check_table(find_embedding(build.model))
    patch.check_vocabulary(build.tokenizer)
    if has_other_weights(patch.meta.base, build.model):
        raise RunError(
            f"{config.base} has the rows of the base that this patch was trained on, and other weights beside them: "
            "give --base the one it was trained on, or measure the patch on this one with --alone."
        )
    if build._examples_digest != record.examples:
        raise RunError(
            f"the tokenizer or the template of {config.base} cuts the training pairs into other tokens than when this "
            "patch was trained: give --base the one it was trained on."
        )
    return build
