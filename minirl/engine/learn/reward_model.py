"""The reward model: how likely a sample is right, by a sequence classifier with LoRA that was
trained on verified samples. It picks one of k samples (ReFT, arXiv 2401.08967, section 4).

Invariant: it reads the ids of prompt and attempt as they were sampled, and its opinion of a sample
does not depend on the others. Its folder is plain peft with reward_model.json beside it; no pickle
is read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from minirl import recipe
from minirl.engine.model import load as models
from minirl.engine.model.adapter import adapter_state, load_adapter_state, save_adapter
from minirl.engine.model.batch import pad_rows
from minirl.engine.model.chunks import chunks
from minirl.engine.model.source import public_name
from minirl.errors import UserError
from minirl.record.statistics import auc

CONFIG, WEIGHTS = "reward_model.json", "adapter_model.safetensors"
LABELS = ("wrong", "right")
# Scales the loss where activations are float16: gradients would vanish. AdamW does not feel it.
HALF_SCALE = 1024.0
SCORED_TOKENS = 8192  # padded tokens in one forward pass when samples are scored


class Sample(NamedTuple):
    """The token ids of a prompt and its attempt, and whether the attempt is right."""

    tokens: tuple[int, ...]
    right: bool


class RewardModel:
    """A classifier of LABELS; open it by `fresh` or `open`."""

    def __init__(self, loaded: models.LoadedModel) -> None:
        self.loaded = loaded
        self._pad: int = loaded.tokenizer.pad_token_id

    @classmethod
    def fresh(
        cls, model: recipe.Model, adapter: Mapping[str, Tensor], seed: int, device: torch.device
    ) -> Self:
        """A new one. Its trunk starts from a policy's adapter, as `adapter_state` gives it, and its
        head at zero."""
        made = cls(models.load_classifier(model, len(LABELS), seed, device))
        load_adapter_state(made.loaded.model, adapter_state(made.loaded.model) | dict(adapter))
        return made

    @classmethod
    def open(cls, folder: Path, model: recipe.Model) -> Self:
        """The one that a run has left in `folder`; `model` is that run's. Raises UserError if there
        is none, or another model's."""
        try:
            described = json.loads((folder / CONFIG).read_text())
            stored = load_file(folder / WEIGHTS)
            base, labels = described.get("base"), tuple(described.get("labels", ()))
            if (base, labels) != (public_name(model.name), LABELS):
                raise ValueError(f"{CONFIG} speaks of {str(base)[:80]!r}")
            made = cls(models.load_classifier(model, len(LABELS)))
            load_adapter_state(made.loaded.model, stored)
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: no reward model of {model.name} that can be read"
                f" ({' '.join(str(error).split())[:200]}); name a finished run of a recipe with a"
                " reward_model stage, e.g. recipes/reft_reward_model.yaml"
            ) from error
        return made

    def save(self, folder: Path, facts: Mapping[str, float]) -> None:
        """Write the adapter with its head as plain peft, and beside it the base model's name and
        `facts` about the training."""
        save_adapter(self.loaded.model, folder)
        described = {"base": public_name(self.loaded.settings.name), "labels": LABELS, **facts}
        (folder / CONFIG).write_text(json.dumps(described, indent=1) + "\n")

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The probability that each row of token ids is right."""
        self.loaded.model.eval()
        chances = [0.0] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for chunk in chunks(by_length, lambda c: len(c) * len(rows[c[-1]]), SCORED_TOKENS):
            batch = self._collate([{"tokens": rows[i]} for i in chunk])
            batch = {name: tensor.to(self.loaded.device) for name, tensor in batch.items()}
            wrong, right = self.loaded.model(**batch).logits.double().cpu().unbind(1)
            for i, chance in zip(chunk, torch.sigmoid(right - wrong).tolist(), strict=True):
                chances[i] = chance
        return chances

    def _collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Padded on the right: (B, T) ids and mask, and (B,) labels if the samples have them."""
        ids, mask = pad_rows([sample["tokens"] for sample in samples], self._pad)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "right" in samples[0]:
            batch["labels"] = torch.tensor([int(sample["right"]) for sample in samples])
        return batch

    def fit(
        self,
        train: Sequence[Sample],
        held_out: Sequence[Sample],
        settings: recipe.RewardModel,
        seed: int,
        log: Callable[[dict[str, float]], None],
        stop: Callable[[], bool],
    ) -> dict[str, float] | None:
        """Train on samples by transformers' Trainer; the last epoch's numbers, None if it was
        stopped before its end.

        log: gets each epoch's number as `step` (from 0), its loss, and `assess` of `held_out`.
        stop: asked after every update. Raises UserError if all of `train` are right, or all wrong.
        """
        counts = [sum(not s.right for s in train), sum(s.right for s in train)]
        if not all(counts):
            raise UserError(
                f"reward model: got {counts[1]} right and {counts[0]} wrong samples to learn from,"
                " expected some of each; collect more"
            )
        scale = HALF_SCALE if self.loaded.dtype == torch.float16 else 1.0
        balance = [len(train) / (2 * count) if settings.balance else 1.0 for count in counts]
        weights = torch.tensor(balance, device=self.loaded.device)

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            # Over the whole update, however it is cut; the weights are 1 on the mean sample.
            each = torch.nn.functional.cross_entropy(
                outputs.logits.float(), labels, weights, reduction="sum"
            )
            count = labels.numel() if num_items_in_batch is None else num_items_in_batch
            return scale * each / count

        watch = _Watch(self, held_out, log, stop, scale)
        # The Trainer writes notes of its own, which are not worth keeping.
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                self.loaded.model,
                _arguments(settings, seed, scratch, len(train), scale, self.loaded.device),
                data_collator=self._collate,
                train_dataset=[sample._asdict() for sample in train],  # type: ignore[arg-type]
                compute_loss_func=loss,
                callbacks=[watch],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.loaded.model.eval()
        return None if watch.stopped else watch.last

    def assess(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Accuracy at P(right) = 1/2, the share of right samples, and AUC if there are both kinds;
        nothing for no samples."""
        if not samples:
            return {}
        chances, right = self([s.tokens for s in samples]), [s.right for s in samples]
        hits = sum((chance > 0.5) == label for chance, label in zip(chances, right, strict=True))
        facts = {"accuracy": hits / len(right), "right": sum(right) / len(right)}
        return facts | ({"auc": auc(chances, right)} if 0 < sum(right) < len(right) else {})


@dataclass(eq=False)
class _Watch(TrainerCallback):  # type: ignore[misc]
    """Measures and reports at the end of each epoch, and stops the training when asked to."""

    model: RewardModel
    held_out: Sequence[Sample]
    log: Callable[[dict[str, float]], None]
    stop: Callable[[], bool]
    scale: float
    last: dict[str, float] = field(default_factory=dict)
    stopped: bool = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop a gradient that is not finite (float16 overflows): clipped it would be NaN, and so
        would the weights be from then on."""
        gradients = [p.grad for p in self.model.loaded.model.parameters() if p.grad is not None]
        if not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            for gradient in gradients:
                gradient.zero_()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and self.stop():
            self.stopped = control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if self.stopped or not logs or "loss" not in logs:
            return
        loss = float(logs["loss"]) / self.scale
        self.last = {"loss": loss, **self.model.assess(self.held_out)}
        self.log({"step": round(state.epoch) - 1, **self.last})
        self.model.loaded.model.train()


def _arguments(
    settings: recipe.RewardModel,
    seed: int,
    scratch: str,
    samples: int,
    clip: float,
    device: torch.device,
) -> TrainingArguments:
    micro = min(settings.micro_batch, settings.batch)
    updates = settings.epochs * -(-samples // settings.batch)
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-settings.batch // micro),
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=updates // 20,
        weight_decay=0.0,
        max_grad_norm=clip,
        seed=seed,
        data_seed=seed,
        logging_strategy="epoch",
        eval_strategy="no",
        save_strategy="no",  # a killed stage begins again: it is short
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else DataParallel would take half of each batch to a second GPU
    return arguments
