"""The tunings of a build: what each is given, what its result depends on, and so where it is kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ksl_patch.ticket import Ticket
from ksl_patch.train.material import Material
from ksl_patch.train.record import keep
from ksl_patch.train.reserved import start_ids, start_rows
from ksl_patch.train.stopping import Validation
from ksl_patch.train.tune import TuneSettings, steps_taken, tune_rows


class Tuning(Material):
    """Trains rows on the build's pairs, once; results are kept in the run folder."""

    def tune(
        self, stage: str, kind: str, token_ids: torch.Tensor, steps: int, lr: float, ticket: Ticket | None
    ) -> torch.Tensor:
        """Train the rows of token_ids int64 [k], float32 [k, d]; or what was trained so before.

        stage: what people call it. kind: the beginning of its folder's name. ticket: None for the embedding tuning.
        """
        config, key = self.config, self.key_of(steps, lr, ticket)
        folder, auto = self.folder.stage(kind, key), self._stops_by(ticket)
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
                **config.rates(rows=ticket is not None),
            ),
            side=config.side,
            scope=config.scope,
            folder=folder,
            stage=stage,
            reporter=self.reporter,
            later=self._later(kind),
            start=self._start(ticket),
            validation=auto,
        )

    def _stops_by(self, ticket: Ticket | None) -> Validation | None:
        """What the tuning of a ticket's rows stops by; None where its steps are given."""
        if ticket is None or not self.config.auto_steps:
            return None
        return Validation(self.validation.examples, self.validation.digest)

    def steps_of(self, ticket: Ticket) -> tuple[int, int]:
        """The steps that gave a ticket its rows, and those that were trained.

        Raises RunError where they cannot be told any more.
        """
        config = self.config
        if not config.trains(ticket.selection)[1]:
            return 0, 0
        if not config.auto_steps:
            return config.steps, config.steps
        return steps_taken(self.folder.stage("partial", self.key_of(config.steps, config.lr, ticket)))

    def _start(self, ticket: Ticket | None) -> torch.Tensor | None:
        """Where the training of a ticket's rows starts, float32 [k, d]; None for the base's own rows."""
        if ticket is None or ticket.selection != "reserved":
            return None
        return start_rows(self, torch.from_numpy(ticket.token_ids))

    def _later(self, kind: str) -> int | None:
        """Steps of the stages after one of a kind; None where nobody knows how many: controls or candidates follow."""
        if self.reopened is not None or self.config.selection == "single" or self.config.auto_steps:
            return None
        return self.config.steps if kind == "embed" and self.config.mode == "partial" else 0

    @property
    def embedding_folder(self) -> Path:
        """Where the embedding tuning and its test are kept."""
        return self.folder.stage("embed", self.key_of(self.config.embed_steps, self.config.embed_lr, None))

    def key_of(self, steps: int, lr: float, ticket: Ticket | None) -> dict[str, Any]:
        """All that a tuning's result depends on."""
        config, auto, rates = self.config, self._stops_by(ticket), self.config.rates(rows=ticket is not None)
        return {
            "base": self.loaded.digest,
            "examples": self.examples_digest,
            "side": config.side,
            "scope": config.scope,
            "steps": steps,
            "lr": lr,
            "damp_rare": ticket is None and config.damp_rare,
            "batch": self.batch,
            "seed": config.seed,
            "machine": asdict(self.machine),
            "token_ids": None if ticket is None else hashlib.sha256(ticket.token_ids.tobytes()).hexdigest(),
            **({"auto": auto.key()} if auto else {}),
            **({} if rates["schedule"] == "linear" else {"schedule": rates["schedule"]}),
            **({"warmup": rates["warmup"]} if rates["warmup"] else {}),
            **({"start": start_ids(self, len(ticket))} if ticket and ticket.selection == "reserved" else {}),
        }
