"""One stage of tuning: train some rows of a base's embedding, and nothing else, with transformers' Trainer."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from ksl_patch.atomic import write_atomically
from ksl_patch.bank import SlotRows
from ksl_patch.base import find_embedding
from ksl_patch.data.encoding import IGNORED, Example, collate
from ksl_patch.errors import RunError
from ksl_patch.overlay import TrainedRows, training
from ksl_patch.patch import Scope, Side
from ksl_patch.train.events import COMPLETE, Events
from ksl_patch.train.interrupts import interrupts_noted
from ksl_patch.train.loss import answer_logits, answer_losses
from ksl_patch.train.progress import Reporter
from ksl_patch.train.record import keep
from ksl_patch.train.stopping import BestAverage, Validation, best_step


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How a stage trains. lr is absolute; batch_size counts examples per step and process.

    damp_rare: Adam's epsilon is then the size of an average number's gradient when all are clipped to norm 1, so that
    a row which few examples touch moves in proportion to its gradient; plain Adam moves it as far as any other.
    schedule, warmup: as in `BuildConfig`, or "constant".
    """

    steps: int
    lr: float
    batch_size: int
    accumulate: int
    seed: int
    checkpoint_every: int
    gradient_checkpointing: bool = False
    damp_rare: bool = False
    schedule: str = "linear"
    warmup: float = 0.0

    def optimiser(self, numbers: int) -> dict[str, int | float | str | bool]:
        """The optimiser's hyper-parameters for so many trained numbers."""
        return optimiser(
            numbers, damp_rare=self.damp_rare, schedule=self.schedule, warmup=self.warmup, steps=self.steps
        )


def optimiser(
    numbers: int, *, damp_rare: bool, schedule: str = "linear", warmup: float = 0.0, steps: int = 0
) -> dict[str, int | float | str | bool]:
    """The optimiser's hyper-parameters for so many trained numbers, by transformers' names for them."""
    return {
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": numbers**-0.5 if damp_rare else 1e-8,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,  # decay would move rows that no example has
        "lr_scheduler_type": schedule,
        "warmup_steps": math.ceil(warmup * steps),
    }


def tune_rows(
    model: Any,
    token_ids: torch.Tensor,
    examples: Sequence[Example],
    settings: TuneSettings,
    *,
    side: Side,
    scope: Scope = "all",
    folder: Path,
    stage: str,
    reporter: Reporter,
    later: int | None = None,
    start: torch.Tensor | None = None,
    validation: Validation | None = None,
) -> torch.Tensor:
    """Train the rows of `token_ids` (int64 [k]) from `start` [k, d]; returns them as float32 [k, d].

    examples: what is read, in this order: steps x batch_size x accumulate of them, for each process.
    The optimiser holds k x d numbers; the model's own weights are frozen and never copied. Checkpoints in
    `folder` let a killed run continue to the same result; a finished stage is read back from `rows.safetensors`.
    later: steps of the stages that follow, for the time left. start: by default the base's own rows.
    validation: stop by it, after the settings' steps at most; the rows are then the best average of those of all steps.
    """
    done = folder / "rows.safetensors"
    if done.is_file():
        reporter.note("reused", f"{stage}: already done in {folder}", stage=stage, folder=str(folder))
        return _read_rows(done, token_ids)
    folder.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if start is None:
        start = find_embedding(model).weight.detach()[token_ids.to(model.device)].float()
    slot = SlotRows(token_ids, start, output=side == "input+output", prompt_only=scope == "prompt")
    with _alone(folder), training(model, slot) as trained, _evaluating_after(model):
        progress = Events(stage, reporter, later, ends_by_itself=validation is not None)
        trainer = _RowTrainer(
            model=model,
            args=_arguments(settings, folder, model.device, trained.rows.numel()),
            train_dataset=list(examples),  # type: ignore[arg-type]
            data_collator=lambda batch: collate(batch, pad=0),  # masked and without labels: any id will do
            compute_loss_func=_mean_loss,
        )
        trainer.remove_callback(PrinterCallback)
        averaging, last = None, _last_complete(folder)
        if validation is not None:
            loss = partial(_validation_loss, trainer, model, trained, validation)
            averaging = BestAverage(trained.rows, loss, reporter, stage)
            if last is not None:
                averaging.resume(last)
            trainer.add_callback(averaging)
        trainer.add_callback(progress)
        trainer.accelerator.wait_for_everyone()  # nobody looks for checkpoints that another has deleted
        if averaging is None or not averaging.has_stalled:
            with interrupts_noted(progress.interrupt):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        has_ended = averaging is not None and averaging.has_stalled
        if progress.interrupted and trainer.state.global_step < settings.steps and not has_ended:
            raise KeyboardInterrupt
        found = {"rows": trained.rows.detach()} if averaging is None else averaging.result()
        found = {"token_ids": token_ids} | {name: tensor.cpu().clone() for name, tensor in found.items()}
        if trainer.is_world_process_zero():
            keep(done, safetensors.torch.save(found))
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        trainer.accelerator.wait_for_everyone()
    return found["rows"]


def _validation_loss(trainer: Trainer, model: Any, trained: TrainedRows, validation: Validation) -> float:
    """Per answer token, in nats; each process computes its share, so that all find the same."""
    model.eval()  # the Trainer's next step turns it back
    accelerator = trainer.accelerator
    own = validation.examples[accelerator.process_index :: accelerator.num_processes]
    losses, tokens = answer_losses(model, own, marking=trained.marking)
    found = torch.tensor([sum(losses), sum(tokens)], dtype=torch.float32, device=accelerator.device)
    total, count = accelerator.reduce(found, "sum").tolist()
    return float(total / count)


def steps_taken(folder: Path) -> tuple[int, int]:
    """Of a finished stage that stopped by validation, the step whose rows it kept, and the last. Raises RunError."""
    try:
        losses = safetensors.torch.load_file(folder / "rows.safetensors")["losses"].tolist()
        return best_step(losses), int(losses[-1][0])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unusable(folder / "rows.safetensors", error) from error


def _unusable(file: Path, error: Exception) -> RunError:
    return RunError(f"cannot use {file} ({error}): delete its folder, and the build will make it again.")


def _read_rows(file: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """The rows of a finished stage. Raises RunError when they are not those of the token ids."""
    try:
        saved = safetensors.torch.load_file(file)
        rows: torch.Tensor = saved["rows"]
        if not torch.equal(saved["token_ids"], token_ids) or len(rows) != len(token_ids) or not rows.isfinite().all():
            raise ValueError("it has other rows")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unusable(file, error) from error
    return rows


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time in a stage's folder. Raises RunError."""
    if int(os.environ.get("RANK", 0)):
        yield  # the first process holds it
        return
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise RunError(
            f"another build is training in {folder}: wait for it, or give this one its own --resume."
        ) from error


def autocasts(device: str) -> bool:
    """Whether a stage computes in bfloat16 where that is safe, whatever dtype the weights have."""
    return device == "cuda" and torch.cuda.is_bf16_supported()


@contextmanager
def _evaluating_after(model: Any) -> Iterator[None]:
    """The Trainer turns dropout on; however it ends, the model is left without."""
    try:
        yield
    finally:
        model.eval()


def _arguments(settings: TuneSettings, folder: Path, device: torch.device, numbers: int) -> TrainingArguments:
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # a launcher's default, which would count instead of `bf16`
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        train_sampling_strategy="sequential",
        **settings.optimiser(numbers),
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device.type == "cpu",
        bf16=autocasts(device.type),
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,  # the older one stays until the newer is marked complete
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    # Without a launcher the Trainer would copy the model to every GPU it sees, and the copies' overlays would not
    # be trained; several GPUs are a matter of torchrun.
    arguments.device  # noqa: B018 - sets _n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _last_complete(folder: Path) -> Path | None:
    marked = [marker.parent for marker in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(marked, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None) -> torch.Tensor:
    """Over the tokens of all answers of a step. logits [N, V], labels int64 [B, T] with N answer tokens."""
    wanted = labels[:, 1:][labels[:, 1:] != IGNORED].to(logits.device)
    total = F.cross_entropy(logits.float(), wanted, reduction="sum")
    return total / (len(wanted) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(total.device))


class _RowTrainer(Trainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of the logits that predict answers."""
        labels = inputs["labels"]
        self.accelerator.unwrap_model(model).ksl_overlay.prompt = labels == IGNORED

        def logits(num_items_in_batch: Any = None, **batch: torch.Tensor) -> torch.Tensor:
            return answer_logits(model, batch, labels)

        return super().compute_loss(logits, inputs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch says of a full disk that it is at another position
            folder = self.args.output_dir
            raise RunError(
                f"cannot keep a checkpoint in {folder}, where {shutil.disk_usage(folder).free:,} bytes are free "
                f"({getattr(error, 'strerror', None) or error}): with more room the same command goes on."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Keep the trained rows, not the base."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rows = (state_dict or {}).get("ksl_overlay.rows")
        if rows is None:
            rows = self.accelerator.unwrap_model(self.model).ksl_overlay.rows
        content = safetensors.torch.save({"ksl_overlay.rows": rows.detach().cpu().contiguous()})
        write_atomically(folder / "model.safetensors", content)
