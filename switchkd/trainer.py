"""SwitchTrainer: `transformers.Trainer` whose batches are partly written by teacher and student.

One optimizer window: draw the rows -> decide per row, seeded, rollout or data -> decode all
rollouts of the window at once -> skew reverse KL over all response tokens, divided by their global
number.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from pathlib import Path

import torch
from switchkd_kernels import InvalidLogits, uniform
from switchkd_kernels.reference import STREAM_TEXT
from torch import Tensor

from switchkd import adapters, checks, losses, metrics, mixture, models
from switchkd.attention import without_cudnn
from switchkd.calibration import Calibration, calibrate_trainer
from switchkd.checkpoint import (
    PREFIX_CHECKPOINT_DIR,
    RUN_STATE,
    STATE,
    adopt_threshold,
    checkpoint_step,
    drop_completions_after,
    find_checkpoint,
    last_completions,
    read_run_state,
    set_checkpoints_aside,
    set_completions_aside,
    unsaved,
)
from switchkd.config import SwitchConfig
from switchkd.console import print_completion
from switchkd.distributed import with_whole_weights
from switchkd.rollout import Sampling, check_lengths
from switchkd.rollout_trainer import RolloutTrainer, WholeEpochs
from switchkd.run_folder import BestBeside
from switchkd.templates import with_kwargs
from switchkd.vocabulary import share_vocabulary

log = logging.getLogger(__name__)


def row_numbers(rows: list[int]) -> dict[str, Tensor]:
    """A batch as it comes from a data loader, whose workers may need to be sent this function."""
    return {"rows": torch.tensor(rows)}


class SwitchTrainer(RolloutTrainer):
    """Distil `teacher_model` into `model` with teacher-intervened rollouts.

    model, teacher_model: causal language models, or their Hub ids or folders (the student is then
    loaded in float32, the teacher in its own type); the teacher may be None for
    `loss_type="cross_entropy"`. args: SwitchConfig. train_dataset, eval_dataset: rows in
    one of the forms of `switchkd.data` (a `datasets.Dataset` or a list of dicts), without those
    over max_prompt_length or a response over max_new_tokens, which are logged; or tokenised `Rows`.
    processing_class: the tokenizer of both models. peft_config: train an adapter instead of the
    whole student (needs peft). Other arguments as in `transformers.Trainer`, without those that
    take the place of batches, loss or metrics (`checks.UNUSED`).

    Raises ValueError for models that do not share a tokenizer, rows that fit no form, impossible
    lengths, and whatever else `checks` refuses, all before training starts.
    """

    def __init__(
        self,
        model,
        teacher_model=None,
        args: SwitchConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        teacher_processing_class=None,
        **kwargs,
    ):
        args = SwitchConfig() if args is None else args
        processing_class = checks.tokenizer_of(processing_class, "processing_class")
        teacher_processing_class = checks.tokenizer_of(
            teacher_processing_class, "teacher_processing_class"
        )
        checks.check_arguments(args, kwargs, model=model, teacher_model=teacher_model,
            eval_dataset=eval_dataset, processing_class=processing_class, peft_config=peft_config,
        )  # fmt: skip
        if isinstance(model, str):
            processing_class = processing_class or models.load_tokenizer(model)
            model = models.load_model(model, dtype="float32")
        if isinstance(teacher_model, str):
            given = teacher_processing_class
            teacher_processing_class = given or models.load_tokenizer(teacher_model)
            teacher_model = models.load_model(teacher_model)
        if args.teacher_is_base:
            teacher_model = adapters.share_base(model, teacher_model, peft_config)
        processing_class = with_kwargs(processing_class, args.chat_template_kwargs)
        self.vocabulary = share_vocabulary(
            teacher_model, model, teacher_processing_class or processing_class, processing_class
        )
        if args.process_index == 0:
            for note in (*self.vocabulary.notes, *checks.notes(args, peft_config)):
                log.warning("note: %s", note)
        for role, checked in (("teacher", teacher_model), ("student", model)):
            if checked is not None:
                models.check_weights(checked, role)
                models.check_head(checked, role)
                check_lengths(checked, [[0] * args.max_prompt_length], args.max_new_tokens)
        if args.disable_dropout:
            models.disable_dropout(model)
        if peft_config is not None:
            model = adapters.add(model, peft_config, args.seed)
        checks.check_trained(model, teacher_model)
        if args.loss_type != "cross_entropy":
            losses.check_scales(models.head_of(teacher_model), models.head_of(model))
        if getattr(model, "generation_config", None) is not None:  # ends what is saved as training
            model.generation_config.eos_token_id = list(self.vocabulary.eos_token_ids)
        self._lm_blocks = None
        if args.lm_file is not None and args.lm_coef > 0:
            width = args.max_prompt_length + args.max_new_tokens
            self._lm_blocks = mixture.text_blocks(args.lm_file, processing_class, width)
        train_rows = self.read_rows(train_dataset, processing_class, args)
        eval_rows = self.read_rows(eval_dataset, processing_class, args)
        checks.check_rows(train_rows, args)
        checks.check_validation(eval_rows, args, teacher_model is not None)
        super().__init__(
            model=model,
            args=args,
            data_collator=row_numbers,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self._best = BestBeside()
        self.add_callback(self._best)
        self.add_callback(WholeEpochs())
        self.loss_is_scaled_for_ga = True  # by the global number of response tokens
        self.calibration: dict | None = None
        self.teacher = self.place(teacher_model, model)
        self._history: dict[int, list[int]] = {}  # the last completion of each row
        self.adopt_arguments()
        self._logs: dict[str, list[float]] = defaultdict(list)
        self._last_sample = None
        self.totals = {"tokens": 0, "teacher_tokens": 0, "rollout_seconds": 0.0, "seconds": 0.0}
        self.before: dict[str, float] | None = None
        self._clock: float | None = None  # since when time counts as training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `transformers.Trainer`; a resumed run goes on as if it had not been interrupted."""
        checkpoint = None
        self.adopt_arguments(anew=bool(self.state.global_step or resume_from_checkpoint))
        if resume_from_checkpoint:
            checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
            self.load_run_state(checkpoint)
        else:
            self._begin()
        self._best.resumed = checkpoint
        self._clock = time.time()
        try:
            with without_cudnn():
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self.totals, self._clock = self._totals(), None

    def _begin(self) -> None:
        """What a run that is not resumed needs before its first step."""
        if self.is_world_process_zero():
            self._set_aside()
        if self.args.target_teacher_share is not None and self.calibration is None:
            self.calibrate()
        if self.args.adaptive_lmbda and self.mixture.reference is None:
            self.evaluate(metric_key_prefix="before")

    def _set_aside(self) -> None:
        if aside := set_completions_aside(self.args.output_dir):
            log.warning("completions of an earlier run are now in %s", aside)

    @with_whole_weights
    def calibrate(self) -> Calibration:
        """Choose the threshold for `target_teacher_share`; `train` does so if nobody has."""
        return calibrate_trainer(self)

    # ------------------------------------------------------------------ one window of batches

    @with_whole_weights
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """All micro-batches of one optimizer step, the rollouts of all of them decoded at once."""
        if 0 < self.state.max_steps <= self.state.global_step:  # of a run resumed at its end:
            return [], torch.zeros(2, device=device)  # Trainer looks at that after a step alone
        rows, sizes = self._next_rows(epoch_iterator, num_batches)
        epoch = int(self.state.epoch or 0)
        texts = self._write(rows, epoch)
        if self.teacher_shards is not None and self.args.loss_type != "cross_entropy":
            mixture.complete(texts, self.teacher, self.args.per_device_train_batch_size)
        batches = mixture.deal(texts, sizes, self.vocabulary.pad_token_id, self._columns)
        if self._lm_blocks is not None:
            for batch in batches:
                batch["lm_ids"] = self._choose_blocks(batch["row_ids"], epoch)
        tokens = sum(len(text.tokens) for text in texts)
        counts = torch.tensor([tokens, len(texts), *mixture.written(texts)], device=device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        for name, count in zip(("tokens", "teacher_tokens"), counts[2:].tolist(), strict=True):
            self.totals[name] += count
        return batches, counts[:2]

    def _choose_blocks(self, ids: Tensor, epoch: int) -> Tensor:
        """One block of the extra text per row id, by (row, epoch): independent of batching."""
        at = uniform(self.args.seed, ids, torch.full_like(ids, epoch), STREAM_TEXT)
        return self._lm_blocks[(at * len(self._lm_blocks)).long()]

    # ------------------------------------------------------------------ loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs: got True, expected False: logits are never held")
        if num_items_in_batch is None:  # of a batch by itself
            num_items_in_batch = inputs["completion_mask"].sum(), len(inputs["row_ids"])
        tokens, samples = num_items_in_batch
        student, args = self.accelerator.unwrap_model(model), self.args
        row_ids, lm_ids = inputs.pop("row_ids"), inputs.pop("lm_ids", None)
        idle = inputs.pop("idle", False)
        start = time.perf_counter()

        def where(error: InvalidLogits) -> str:
            of_token = torch.repeat_interleave(row_ids, inputs["completion_mask"].sum(1))
            return f"data row {int(of_token[error.row])}"

        with self.naming(where):
            loss = losses.distillation_loss(
                None if idle else self.teacher, model, student, inputs,
                kind="cross_entropy" if idle else args.loss_type,
                vocab_size=self.vocabulary.size, alpha=args.skew_alpha,
                detach_mixture=args.detach_mixture,
                beta=0.5 if args.beta is None else args.beta,
                contrastive_weight=args.contrastive_weight,
            )  # fmt: skip
        loss = loss / tokens.clamp(min=1)
        if lm_ids is not None:
            mask = torch.ones_like(lm_ids)
            text = {"input_ids": lm_ids, "attention_mask": mask, "completion_mask": mask.bool()}
            lm_loss = losses.distillation_loss(
                None, model, student, text, vocab_size=self.vocabulary.size, kind="cross_entropy"
            )
            loss = loss + args.lm_coef * lm_loss / (samples * (lm_ids.shape[1] - 1))
        if idle:  # a pass for the sake of the other processes, which wait for its gradients
            loss = 0 * loss
        if not torch.isfinite(loss):
            raise self._broken(f"data rows {row_ids.tolist()}: the loss is {loss.item()}")
        self._logs["time/forward"].append(time.perf_counter() - start)
        return loss * self.accelerator.num_processes  # gradients are averaged over processes

    # ------------------------------------------------------------------ logs

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs.update({name: sum(v) / len(v) for name, v in self._logs.items() if v})
            self._logs.clear()
            if self._last_sample and self.args.log_completions and self.is_world_process_zero():
                print_completion(self.processing_class, self._last_sample)
        super().log(logs, start_time)

    # ------------------------------------------------------------------ validation

    @with_whole_weights
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """cross_entropy, kl, jsd on the references, and rouge_l of one sample per row; without
        any reference, none of them. eval_dataset: other rows, in any form, than the trainer's."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ValueError("eval_dataset: got None here and in SwitchTrainer, expected rows")
        rows = self.read_rows(given, self.processing_class, self.args).rows
        mine = rows[self.args.process_index :: self.args.world_size]
        start, decoding = time.perf_counter(), self._student_for_decoding()
        bar = self._bar(None, f"validation on {len(mine)} rows", "token")
        # autocast as in training, before it, too
        with bar, self.accelerator.autocast(), self.naming(lambda _: "validation"):
            sums = metrics.validate(
                self.teacher,
                # With FSDP, a pass of the student would have to be made by all ranks together.
                decoding if self.is_fsdp_enabled else self.accelerator.unwrap_model(self.model),
                decoding,
                mine,
                self.processing_class,
                self.vocabulary,
                Sampling(seed=self.args.seed, student_temperature=self.args.eval_temperature),
                max_new_tokens=self.args.max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                rollout_batch_size=self.args.rollout_batch_size,
                on_step=lambda _t, _running: bar.update(),
            )
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)
        values = metrics.means(sums)
        if metric_key_prefix in ("before", "eval") and eval_dataset is None:
            self.mixture.validated(values.get("cross_entropy"), self.state.global_step)
        result = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        result[f"{metric_key_prefix}_seconds"] = time.perf_counter() - start
        self.log(dict(result))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, result
        )
        return result

    def predict(self, *_args, **_kwargs):
        raise TypeError(  # Trainer's would return logits, which are never held
            "predict: expected evaluate(rows) for scores, or switchkd.metrics.generate for texts"
        )

    # ------------------------------------------------------------------ checkpoints

    def _determine_best_metric(self, metrics, trial):
        """A stop is saved, too, where only the best is."""
        stop = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        return super()._determine_best_metric(metrics, trial) or stop

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / STATE).unlink(missing_ok=True)  # of an earlier one: it is whole no more
                (folder / RUN_STATE).write_text(json.dumps(self.run_state()))
            super()._save_checkpoint(model, trial)  # writes trainer_state.json last
        except Exception as error:  # a full disk surfaces as OSError, RuntimeError, SafetensorError
            raise unsaved(folder, error) from error

    def _totals(self) -> dict[str, float]:
        running = 0.0 if self._clock is None else time.time() - self._clock
        return self.totals | {"seconds": self.totals["seconds"] + running}

    def run_state(self) -> dict:
        return {
            "totals": self._totals(),
            "before": self.before,
            "mixture": self.mixture.state(),
            "calibration": self.calibration,
            "rows_per_step": self.args.rows_per_step,
            "rows_per_batch": self.args.rows_per_batch,
            "rows": self.train_dataset.digest,
            "day": self.train_dataset.report.day,
        }

    def load_run_state(self, checkpoint: str) -> None:
        """Take up what a checkpoint of a run says of it, and forget completions written after."""
        state = read_run_state(checkpoint, self.train_dataset.digest, self.args)
        self.totals, self.before = state["totals"], state["before"]
        self.mixture.load(state["mixture"])
        self.calibration = state["calibration"]
        adopt_threshold(self.args, checkpoint)
        self.adopt_arguments()
        folder = Path(self.args.output_dir).resolve()
        if self.is_world_process_zero() and folder == Path(checkpoint).resolve().parent:
            if aside := set_checkpoints_aside(checkpoint):  # first, whenever a kill comes
                log.warning("later checkpoints are now called %s", ", ".join(aside))
            drop_completions_after(folder, checkpoint_step(checkpoint))
        elif self.is_world_process_zero():
            self._set_aside()
        if self.args.draft_from_history:
            self._history = last_completions(self.args.output_dir)
