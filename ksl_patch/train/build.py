"""The whole build: embedding tuning -> KS test -> partial tuning (or transfer) -> patch.

Every stage keeps its result in the run folder under a name made from all that it depends on, so a build that
was killed continues, and a build with another alpha uses the same embedding tuning.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState

from ksl_patch.base import dtype_name, find_embedding, identify
from ksl_patch.errors import DataError, RunError
from ksl_patch.evidence import Evaluation, write
from ksl_patch.hf import attach, end_token_id, load_base
from ksl_patch.kstest import KSResult, ks_test
from ksl_patch.overlay import slot_rows
from ksl_patch.patch import (
    Patch,
    Side,
    TemplateMeta,
    TicketMeta,
    TrainingMeta,
    check_language,
    check_name,
    timestamp,
    write_atomically,
)
from ksl_patch.ticket import DEFAULT_CAP, Selection, Ticket, frequency_ticket, ks_ticket, l2_ticket, random_ticket
from ksl_patch.train.data import (
    Encoded,
    Pair,
    data_digest,
    encode,
    make_template,
    read_pairs,
    split_pairs,
    token_counts,
)
from ksl_patch.train.evaluate import token_loss
from ksl_patch.train.progress import Reporter, SilentReporter
from ksl_patch.train.record import Record, keep, read_record, read_tests, write_record
from ksl_patch.train.tune import TuneSettings, tune_rows

Mode = Literal["partial", "transfer"]


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything a build depends on. Learning rates are in units of the standard deviation of the table's values.

    data_seed: of the split into training and held-out pairs; `seed` by default.
    """

    base: str
    pairs: str
    language: str
    name: str
    revision: str | None = None
    source_language: str = "en"
    columns: tuple[str, str] = ("source", "target")
    template: str = "plain"
    alpha: float | None = 0.05
    top_k: int | None = None
    cap: int = DEFAULT_CAP
    selection: Selection = "ks"
    mode: Mode = "partial"
    side: Side = "input"
    embed_steps: int = 100
    embed_lr: float = 0.15
    steps: int = 100
    lr: float = 0.15
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    data_seed: int | None = None
    held_out: int = 64
    max_pairs: int | None = None
    max_length: int = 256
    checkpoint_every: int = 25
    gradient_checkpointing: bool = False
    licence: str | None = None
    device: str | None = None


def build(config: BuildConfig, run: Path, reporter: Reporter | None = None) -> Patch:
    """Build a patch, or continue the build that `run` holds.

    Raises a KslPatchError with one sentence for what the user can mend: data, base, settings, an empty ticket.
    """
    return Build(config, run, reporter or SilentReporter()).patch()


class Build:
    """A build whose stages are computed once, on demand, and kept in the run folder.

    pairs, model, tokenizer, template, examples, held_out: what it works on, ready after construction.
    loaded: the base and its tokenizer, where they are at hand.
    """

    def __init__(
        self, config: BuildConfig, run: Path, reporter: Reporter, loaded: tuple[Any, Any] | None = None
    ) -> None:
        check_name(config.name)
        check_language(config.language)
        self.config, self.run, self.reporter = config, run, reporter
        self.pairs = split_pairs(
            read_pairs(config.pairs, columns=config.columns),
            held_out=config.held_out,
            seed=config.seed if config.data_seed is None else config.data_seed,
            limit=config.max_pairs,
        )
        if self.pairs.duplicates:
            reporter.note(
                "duplicates",
                f"{self.pairs.duplicates} pairs whose source occurs before were left out",
                pairs=self.pairs.duplicates,
            )
        # Under a launcher each process has a device of its own.
        device = config.device or str(PartialState().device)
        self.model, self.tokenizer = loaded or load_base(config.base, revision=config.revision, device=device)
        table = find_embedding(self.model)
        if config.side == "input+output" and not table.tied:
            raise RunError("side 'input+output' is for bases whose head is tied to the embedding; use 'input' here.")
        self.base = identify(self.model, self.tokenizer)
        self.stored_dtype = table.weight.dtype
        if self.model.device.type == "cpu" and not _cpu_computes_bfloat16():
            # Twice as fast there as bfloat16, and exact for its values.
            self.model.float()
        self.scale = float(table.weight.detach().float().std())
        self.template: TemplateMeta = make_template(
            config.template,
            source_language=config.source_language,
            language=config.language,
            tokenizer=self.tokenizer,
        )
        self.examples = self.encode(self.pairs.train, "training").examples
        self.held_out = self.encode(self.pairs.held_out, "held-out") if self.pairs.held_out else Encoded([], [])
        self.counts = token_counts(self.examples, self.base.vocab_size)
        self.created = self._once("created.json", {"created": timestamp()})["created"]
        self._report_learning_rates()

    def patch(self) -> Patch:
        """Run whatever is not done yet, and measure the loss of the result on the held-out pairs."""
        patch = self.patch_of(self.ticket())
        patch = patch.with_meta(evaluation=self.losses(patch))
        config = asdict(self.config)
        for name in ("base", "pairs"):
            if Path(config[name]).exists():  # else an id on the Hub
                config[name] = str(Path(config[name]).resolve())
        tested = (self._embedding_folder / "ks.npz").is_file()
        write_record(self.run, patch.digest, Record(config, self._embedding_folder.name if tested else None))
        return patch

    def seeded(self, seed: int) -> Build:
        """The same build of the same pairs and held-out pairs, trained with another seed."""
        config = self.config
        data_seed = config.seed if config.data_seed is None else config.data_seed
        return Build(
            replace(config, seed=seed, data_seed=data_seed), self.run, self.reporter, (self.model, self.tokenizer)
        )

    def patch_of(self, ticket: Ticket) -> Patch:
        """The patch of a ticket, trained (or transferred) as configured."""
        return self.patch_from(ticket, self.rows(ticket))

    @property
    def is_embedding_tuned(self) -> bool:
        """Whether the result of the embedding tuning is in the run folder."""
        return (self._embedding_folder / "rows.safetensors").is_file()

    def embedding_patch(self) -> Patch:
        """The tuned embedding in a patch's form: every row that the tuning could change."""
        token_ids, rows = self.embedding()
        return self.patch_from(Ticket(token_ids.numpy(), "all"), rows)

    def embedding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage 1. The token ids int64 [n] that embedding tuning can change and their tuned rows, float32 [n, d].

        With side "input" a row gets a gradient only if its token occurs in the data, so tuning those rows is
        tuning the whole table; the head of a tied model sees every token.
        """
        config = self.config
        ids = np.flatnonzero(self.counts) if config.side == "input" else np.arange(self.base.vocab_size)
        token_ids = torch.from_numpy(ids)
        rows = self._tune("embedding tuning", "embed", token_ids, config.embed_steps, config.embed_lr, None)
        return token_ids, rows

    def ks(self) -> KSResult:
        """Stage 2. The test of every row, kept in `ks.npz` with the counts of the tokens in training."""
        file = self._embedding_folder / "ks.npz"
        if file.is_file():
            saved = read_tests(file)
            return KSResult(saved["statistic"], saved["pvalue"], int(saved["hidden_size"]))
        token_ids, rows = self.embedding()
        before = self._base_rows(token_ids)
        tested = ks_test(before, rows)
        statistic, pvalue = np.zeros(self.base.vocab_size), np.ones(self.base.vocab_size)
        statistic[token_ids], pvalue[token_ids] = tested.statistic, tested.pvalue
        content = io.BytesIO()
        np.savez(content, statistic=statistic, pvalue=pvalue, hidden_size=self.base.hidden_size, counts=self.counts)
        write_atomically(file, content.getvalue())
        return KSResult(statistic, pvalue, self.base.hidden_size)

    def ticket(self, selection: Selection | None = None, k: int | None = None) -> Ticket:
        """The selected rows: by the configured rule, or `k` rows by a selection of the caller's.

        The most frequent and random rows need no embedding tuning.
        """
        config = self.config
        selection, k = selection or config.selection, k or config.top_k
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
        V, d = self.base.vocab_size, self.base.hidden_size
        before, after = torch.zeros(V, d), torch.zeros(V, d)
        before[token_ids], after[token_ids] = self._base_rows(token_ids), rows
        return l2_ticket(before, after, k)

    def rows(self, ticket: Ticket) -> torch.Tensor:
        """Stage 3. The ticket's rows, float32 [k, d]: tuned alone from the base, or taken from the tuned table."""
        token_ids = torch.from_numpy(ticket.token_ids)
        largest = "" if ticket.statistic is None else f", largest D {ticket.statistic.max():.4f}"
        self.reporter.note(
            "ticket",
            f"ticket: {len(ticket)} rows ({ticket.selection}){largest}",
            selection=ticket.selection,
            token_ids=ticket.token_ids.tolist(),
        )
        if self.config.mode == "transfer":
            tuned_ids, rows = self.embedding()
            return rows[torch.searchsorted(tuned_ids, token_ids)]
        return self._tune("partial tuning", "partial", token_ids, self.config.steps, self.config.lr, ticket)

    def patch_from(self, ticket: Ticket, rows: torch.Tensor) -> Patch:
        """The patch of some rows, float32 [k, d], cast to the base's own dtype."""
        config = self.config
        table = find_embedding(self.model)
        compute = table.weight.dtype
        table.weight.data = table.weight.data.to(self.stored_dtype)
        try:
            patch = Patch.from_model(
                self.model,
                torch.from_numpy(ticket.token_ids),
                rows,
                name=config.name,
                language=config.language,
                tokenizer=self.tokenizer,
                side=config.side,
                template=self.template,
                licence=config.licence,
                created=self.created,
            )
        finally:
            table.weight.data = table.weight.data.to(compute)
        partial = config.mode == "partial"
        tuned = not partial or ticket.selection in ("ks", "l2")
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
                mode=config.mode,
                steps=config.steps if partial else 0,
                lr=config.lr * self.scale if partial else 0.0,
                optimiser="AdamW, weight decay 0, linear decay",
                batch_size=config.batch_size * config.accumulate,
                seed=config.seed,
                data_digest=data_digest(self.pairs.train),
                pairs=len(self.examples),
                embed_steps=config.embed_steps if tuned else 0,
                embed_lr=config.embed_lr * self.scale if tuned else 0.0,
                embedding_scale=self.scale,
            ),
        )

    def losses(self, patch: Patch) -> dict[str, Any] | None:
        """Held-out loss per answer token of the base and the patch; None when nothing is held out."""
        if not len(self.held_out):
            return None
        result = Evaluation(
            pairs=len(self.held_out),
            data_digest=self.held_out.digest,
            loss_base=token_loss(self.model, self.held_out.examples),
            loss_patch=self.patched_loss(patch),
        )
        self.reporter.note(
            "held_out",
            f"held-out loss on {result.pairs} pairs: base {result.loss_base:.3f}, patch {result.loss_patch:.3f}",
            pairs=result.pairs,
            data_digest=result.data_digest,
            loss_base=result.loss_base,
            loss_patch=result.loss_patch,
        )
        return write(result)

    def patched_loss(self, patch: Patch) -> float:
        """Held-out loss per answer token of the model with the patch's stored rows."""
        with attach(self.model) as handle, handle.serving(handle.bank.add(slot_rows(patch))):
            return token_loss(self.model, self.held_out.examples, handle=handle)

    def _tune(
        self, stage: str, kind: str, token_ids: torch.Tensor, steps: int, lr: float, ticket: Ticket | None
    ) -> torch.Tensor:
        config = self.config
        rows = tune_rows(
            self.model,
            token_ids,
            self.examples,
            TuneSettings(
                steps=steps,
                lr=lr * self.scale,
                batch_size=config.batch_size,
                accumulate=config.accumulate,
                seed=config.seed,
                checkpoint_every=config.checkpoint_every,
                gradient_checkpointing=config.gradient_checkpointing,
                damp_rare=ticket is None,
            ),
            side=config.side,
            folder=self._folder(kind, self._tune_key(steps, lr, ticket)),
            stage=stage,
            reporter=self.reporter,
        )
        self.model.eval()
        return rows

    @property
    def _embedding_folder(self) -> Path:
        return self._folder("embed", self._tune_key(self.config.embed_steps, self.config.embed_lr, None))

    def _tune_key(self, steps: int, lr: float, ticket: Ticket | None) -> dict[str, Any]:
        """All that a tuning's result depends on."""
        config = self.config
        return {
            "base": asdict(self.base) | {"model_id": None, "revision": None},
            "data": data_digest(self.pairs.train),
            "template": asdict(self.template),
            "max_length": config.max_length,
            "side": config.side,
            "steps": steps,
            "lr": lr,
            "batch": [config.batch_size, config.accumulate],
            "seed": config.seed,
            "device": [self.model.device.type, dtype_name(self.model.dtype)],
            "token_ids": None if ticket is None else hashlib.sha256(ticket.token_ids.tobytes()).hexdigest(),
        }

    def _folder(self, kind: str, key: dict[str, Any]) -> Path:
        """The stage's folder in the run folder; `settings.json` in it says what its name was made from."""
        text = json.dumps(key, indent=1, sort_keys=True)
        folder = self.run / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "settings.json", text.encode())
        except OSError as error:
            raise RunError(f"cannot keep the run in {folder}: {error.strerror or error}.") from error
        return folder

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
        end = end_token_id(self.model, self.tokenizer)
        encoded = encode(template or self.template, pairs, self.tokenizer, end, self.config.max_length)
        dropped = len(pairs) - len(encoded)
        if not len(encoded):
            raise RunError(f"every {what} pair is longer than {self.config.max_length} tokens; raise --max-length.")
        if dropped:
            self.reporter.note(
                "too_long",
                f"{dropped} of {len(pairs)} {what} pairs were left out: longer than {self.config.max_length} tokens",
                pairs=dropped,
            )
        return encoded

    def _report_learning_rates(self) -> None:
        config = self.config
        self.reporter.note(
            "start",
            f"{len(self.examples)} pairs to train, {len(self.held_out)} held out; the table's values have the standard "
            f"deviation {self.scale:.4g}, so the learning rates are {config.embed_lr:g} x that = "
            f"{config.embed_lr * self.scale:.3g} (embedding) and {config.lr:g} x = {config.lr * self.scale:.3g} (rows)",
            pairs=len(self.examples),
            held_out=len(self.held_out),
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


def reopen(patch: Patch, run: Path, reporter: Reporter | None = None, **changes: Any) -> Build:
    """The build that a patch came from, by the record in its run folder.

    changes: fields of its BuildConfig that are different now, such as where the base and the pairs are.
    Raises RunError without a record, DataError when the pairs are not those of the patch's training.
    """
    try:
        config = BuildConfig(**read_record(run, patch.digest).config | changes)
    except TypeError as error:
        raise RunError(f"the record of the build in {run} is of another version of ksl-patch ({error}).") from error
    build = Build(config, run, reporter or SilentReporter())
    training = patch.meta.training
    if training is None or training.data_digest != data_digest(build.pairs.train):
        raise DataError(
            f"the pairs in {config.pairs} do not give the training data of this patch; "
            "name the file that it was built from with --pairs."
        )
    patch.check(build.model, build.tokenizer)
    return build


def _cpu_computes_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where torch cannot tell, it is taken not to."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(value for name, value in capabilities.items() if name.endswith("bf16"))
