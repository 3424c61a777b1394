"""What a build works on: the base, the pairs in their parts, and the template that puts them into token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ksl_patch.base import find_embedding
from ksl_patch.base.model_id import check_base_model, is_hub_id, named_in_files
from ksl_patch.base.reserved import ReservedTokens
from ksl_patch.base.tensors import dtype_name
from ksl_patch.data.columns import Columns
from ksl_patch.data.encoding import Encoded, Example, check_ids, encode, token_counts
from ksl_patch.data.languages import check_languages
from ksl_patch.data.pairs import Pair
from ksl_patch.data.reading import Reading, read_pairs
from ksl_patch.data.split import PairSplit, reading_order, split_pairs
from ksl_patch.data.templates import make_template, template_fields
from ksl_patch.errors import RunError
from ksl_patch.hf import end_token_id, load_base
from ksl_patch.patch import TemplateMeta
from ksl_patch.patch.names import check_language, check_name
from ksl_patch.terminal import counted
from ksl_patch.ticket import given_ticket
from ksl_patch.train import reserved
from ksl_patch.train.config import BuildConfig
from ksl_patch.train.first_look import report_pairs, report_start
from ksl_patch.train.loaded import Loaded, launched
from ksl_patch.train.progress import Reporter
from ksl_patch.train.record import Machine
from ksl_patch.train.run_folder import RunFolder
from ksl_patch.train.stopping import EVERY
from ksl_patch.train.tune import autocasts


class Material:
    """A build's base and pairs, ready after construction.

    config: with steps where `given` has epochs. pairs, train, dev, held_out, validation: the pairs, and those that are
    not too long as token ids. model, tokenizer, template: what they are put into. base: the model's identity. scale:
    the standard deviation of the table's values. processes: how many train together.
    Its arguments: loaded: the base, where it is at hand. reopened: where its patch was trained; stages that were
    finished there, or on another kind of machine, are used then. template: where it is known, since a chat template may
    render otherwise today. like: whose pairs are taken, all of them, however long they are in another prompt.
    """

    read: list[Pair]
    pairs: PairSplit
    _chats: bool

    def __init__(
        self,
        config: BuildConfig,
        run: Path,
        reporter: Reporter,
        loaded: Loaded | None = None,
        *,
        reopened: Machine | None = None,
        template: TemplateMeta | None = None,
        like: Material | None = None,
    ) -> None:
        check_name(config.name)
        check_language(config.language)
        self.config = self.given = config
        self.run, self.reporter, self.reopened = run, reporter, reopened
        self.folder = RunFolder(run, reopened)
        reserved.check_settings(config)
        if config.scope == "prompt" and config.side != "input":
            raise RunError("scope 'prompt' needs side 'input': the output side acts on what follows the prompt.")
        if config.auto_steps and (config.mode != "partial" or config.validation < 1):
            raise RunError("auto_steps ends the rows' own tuning by validation pairs: give some, and mode 'partial'.")
        fields = template_fields(config.template, config.system)
        if config.columns[1] in fields:
            raise RunError(f"the template must not hold the answer: remove {{{config.columns[1]}}}.")
        languages = config.source_language, config.language
        check_base_model(config.base_model)
        check_languages(*languages)
        if like is None:
            self._read(Columns(*config.columns, config.group, tuple(fields)))
        else:
            self.read, self._chats, self.pairs = like.read, like._chats, like.pairs
        # Under a launcher each process has a device of its own.
        state = launched(config.device)
        device = config.device or str(state.device)
        self.processes: int = state.num_processes
        if loaded is None:
            reporter.note("loading", f"Loading {config.base} ...", base=config.base)
            loaded = Loaded.of(*load_base(config.base, revision=config.revision, device=device))
        self.loaded = loaded
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.base, self.scale = loaded.identity, loaded.scale
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
        self.reserved = ReservedTokens(self.tokenizer, self.model)
        self.template = template or self._made_template()
        self._reserved_places = reserved.positions(self)
        self._longest = config.max_length + self._reserved_places if like is None else None
        if like is None:
            self.train = self._training()
            dev, held_out, validation = self.pairs.dev, self.pairs.held_out, self.pairs.validation
            self.dev, self.held_out, self.validation = (
                self.encode(pairs, what) if pairs else Encoded([], [], self.template)
                for pairs, what in ((dev, "dev"), (held_out, "held-out"), (validation, "validation"))
            )
        else:
            same = (like.train, like.dev, like.held_out, like.validation)
            self.train, self.dev, self.held_out, self.validation = (self._encoded(part.pairs) for part in same)
        if config.auto_steps and not len(self.validation):
            raise RunError("no pair is left to stop by (auto_steps): give more pairs, or the number of steps.")
        self.config = config.resolved(len(self.train), self.batch, self.scale)
        if reopened is None and like is None:
            report_start(self)

    def _read(self, columns: Columns) -> None:
        """Read the pairs, say which they are, and split them."""
        config, reading = self.config, Reading(strict=self.config.strict)
        self.read = read_pairs(
            config.pairs,
            columns,
            languages=(config.source_language, config.language),
            limit=config.most_read,
            reading=reading,
        )
        self._chats = reading.messages
        if self._chats and config.template != "chat":
            raise RunError("the pairs are chats (messages), in the chat template's prompts: add --template chat.")
        if self.reopened is None:
            report_pairs(self, self.read, reading)
        self.pairs = split_pairs(
            self.read,
            held_out=config.held_out, dev=config.dev, validation=config.validation_pairs, seed=config.data_seed,
        )  # fmt: skip
        for event, count, what in (
            ("duplicates", self.pairs.duplicates, "whose source occurs before"),
            ("unused", self.pairs.unused, "of documents or sources that are held out, beyond those that are measured"),
        ):
            if count:
                self.reporter.note(event, f"left out: {counted(count, 'pair')} {what}", pairs=count)

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
        return [self.train.examples[i] for i in self.order(steps)]

    def pairs_read_in(self, steps: int) -> list[Pair]:
        """The different pairs that so many steps of a tuning read."""
        return [self.train.pairs[i] for i in dict.fromkeys(self.order(steps))]

    @cached_property
    def examples_digest(self) -> str:
        """sha256 over what is trained on, as token ids."""
        return hashlib.sha256(json.dumps(self.train.examples).encode()).hexdigest()

    def base_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The base's rows of token_ids int64 [k], float32 [k, d] on the CPU."""
        weight = find_embedding(self.model).weight.detach()
        return weight[token_ids.to(weight.device)].float().cpu()

    @cached_property
    def embed_counts(self) -> np.ndarray:
        """How often the embedding tuning read each token where a patch acts, int64 [V]."""
        return self.counts_in(self.config.embed_steps)

    @cached_property
    def counts(self) -> np.ndarray:
        """The same for the tuning that gives the patch its rows: only rows that were read get a gradient."""
        return self.counts_in(self.patch_steps)

    def counts_in(self, steps: int) -> np.ndarray:
        """The same for the first so many steps."""
        return token_counts(self.read_in(steps), self.base.vocab_size, prompt_only=self.config.scope == "prompt")

    def order(self, steps: int) -> list[int]:
        """Which training pairs so many steps read, in that order."""
        return reading_order(len(self.train), steps * self.batch, self.config.seed)

    @property
    def patch_steps(self) -> int:
        """Steps of the tuning that gives the patch its rows, the fewest where it stops by itself."""
        config = self.config
        fewest = min(config.steps, EVERY) if config.auto_steps else config.steps
        return fewest if config.mode == "partial" else config.embed_steps

    def encode(self, pairs: list[Pair], what: str) -> Encoded:
        """Pairs as token ids in the template. Raises RunError when all are too long."""
        encoded = self._encoded(pairs)
        self._check_length(pairs, encoded, what)
        return encoded

    def of_base(self, pairs: Encoded) -> Encoded:
        """The same pairs in the prompt of somebody without the patch, which a base is compared in."""
        template = self.template.of_base()
        if template == self.template:
            return pairs
        return encode(template, pairs.pairs, self.tokenizer, end_token_id(self.model, self.tokenizer))

    def _encoded(self, pairs: list[Pair]) -> Encoded:
        end = end_token_id(self.model, self.tokenizer)
        encoded = encode(self.template, pairs, self.tokenizer, end, self._longest)
        check_ids((e.prompt + e.answer for e in encoded.examples), self.base.vocab_size)
        if self.reserved_ids:
            reserved.check_reached(self.reserved_ids, encoded, self._reserved_places)
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

    @cached_property
    def reserved_ids(self) -> list[int]:
        """The reserved tokens of the template whose rows are trained, ascending."""
        if self.template.unpatched is None:
            return []
        given = self._given_reserved
        return [i for i in self.reserved.in_text(self.template.text) if not self.config.rows or i in given]

    @cached_property
    def _given_reserved(self) -> list[int]:
        """The reserved tokens among the rows that are named by hand."""
        if not self.config.rows:
            return []
        ids = given_ticket(self.config.rows, self.tokenizer, self.base.vocab_size).token_ids.tolist()
        return [i for i in ids if self.reserved.why_not(i) is None]

    def _made_template(self) -> TemplateMeta:
        """The prompt template, as this run folder had it first: a chat template may hold the day's date."""
        config = self.config
        names = reserved.choose(self) if config.selection == "reserved" and not config.rows else []
        texts = config.template + (config.system or "")
        named = [name for i in self._given_reserved if (name := self.reserved.name(i)) in texts]
        made = make_template(
            config.template,
            source_language=config.source_language,
            language=config.language,
            tokenizer=self.tokenizer,
            system=config.system,
            instruction=not self._chats,
            reserved=names,
            named=named,
        )
        if names and [self.reserved.name(i) for i in self.reserved.in_text(made.text)] != names:
            raise RunError("the prompt has other reserved tokens than were chosen: remove them from the template.")
        if not made.chat:
            return made
        key = [config.system, config.source_language, config.language, self.loaded.digest]
        key += ["chats"] if self._chats else []
        key += [*names, *named]
        name = f"template-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
        try:
            return TemplateMeta(**self.folder.once(name, lambda: asdict(made)))
        except TypeError as error:
            raise RunError(f"cannot read {self.run / name} ({error}): delete it, and it is made again.") from error
