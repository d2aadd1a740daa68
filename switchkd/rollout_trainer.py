"""A trainer that writes: the rollouts of a window, by an engine that is kept from step to step."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from switchkd_kernels import InvalidLogits
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from switchkd import losses, metrics
from switchkd.cache import capacity_for
from switchkd.checkpoint import (
    append_completions,
    checkpoint_step,
    day_of,
    drop_completions_after,
    last_checkpoint,
)
from switchkd.config import SwitchConfig
from switchkd.data import Row, Rows, rows_from
from switchkd.decoder import rollout as block_rollout
from switchkd.distributed import ShardedTrainer
from switchkd.engine import Engine
from switchkd.mixture import Mixture, Text, records, write
from switchkd.models import count_parameters, evaluating
from switchkd.rollout import Rollout, rollout_in_batches

log = logging.getLogger(__name__)


class WholeEpochs(TrainerCallback):
    """An epoch that a callback has ended counts as one: the next draws other noise."""

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_epoch_stop:
            state.epoch = math.ceil(state.epoch)


class RolloutTrainer(ShardedTrainer):
    """`roll_out`, on what SwitchTrainer sets up."""

    _said: tuple = (None, None)

    @staticmethod
    def read_rows(dataset, tokenizer, args: SwitchConfig) -> Rows | None:
        """Tokenised rows of a data set in any form, of the day of the run in output_dir."""
        if dataset is None or isinstance(dataset, Rows):
            return dataset
        day = day_of(last_checkpoint(args.output_dir))
        rows = rows_from(dataset, tokenizer, args.max_prompt_length, args.max_new_tokens, day)
        if rows.report.notable and args.process_index == 0:
            log.warning("note: %s", rows.report)
        return rows

    def adopt_arguments(self, anew: bool = False) -> None:
        """Take what `args` say now, for they may change between two runs; a policy that was set by
        hand stays while they say the same. anew: begin with a new mixture in any case."""
        args = self.args
        names = ("seed", "lmbda", "adaptive_lmbda", "replay_capacity", "replay_ratio")
        options = {name: getattr(args, name) for name in names}
        policy, before = args.policy(), self._said
        self._said = policy, options
        if policy != before[0]:
            self.policy = policy
        if options != before[1] or anew:
            self.mixture = Mixture(self.train_dataset, **options)
        self.sampling = args.sampling()
        wanted = {"from_teacher": args.loss_type == "contrastive_skew",
                  "row_weights": args.importance_weight}  # fmt: skip
        self._columns = [name for name, on in wanted.items() if on]  # per token, for the loss

    def _inner_training_loop(self, *args, **kwargs):
        """Training, or one attempt at it: `auto_find_batch_size` begins anew with fewer rows in a
        batch where memory was not enough. What was written in vain does not count."""
        resumed = kwargs.get("resume_from_checkpoint")
        first = checkpoint_step(resumed) if resumed else 0
        totals, mixture = dict(self.totals), self.mixture.state()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except RuntimeError as error:
            if not (self.args.auto_find_batch_size and should_reduce_batch_size(error)):
                raise
            step = self.state.global_step
            if step > first:
                raise MemoryError(
                    f"step {step + 1}: {error} auto_find_batch_size begins anew at the first step "
                    f"only, for the weights have changed; {self._left()}, to be gone on with in "
                    "smaller batches and more gradient_accumulation_steps"
                ) from error
            self.totals = totals
            self.mixture.load(mixture)
            self._logs.clear()
            if self.is_world_process_zero():
                drop_completions_after(self.args.output_dir, first)
            raise

    def _next_rows(self, epoch_iterator, num_batches: int) -> tuple[list[Row], list[int]]:
        """The rows of a step on this rank, and how many of them are in each of its batches.

        For all ranks to make the same steps, accelerate fills up the last batches of an epoch with
        rows of its beginning. They are left out: one process does not train on them twice.
        """
        args, rows, sizes = self.args, [], []
        for _ in range(num_batches):
            try:
                batch = next(epoch_iterator)["rows"].tolist()
            except StopIteration:
                break
            ends = self.accelerator.gradient_state.end_of_dataloader
            if args.world_size > 1 and ends and not args.dataloader_drop_last:
                last = len(self.train_dataset) % args.rows_per_batch or args.rows_per_batch
                batch = batch[: max(last - args.process_index * len(batch), 0)]
            rows += [self.train_dataset.rows[i] for i in batch]
            sizes.append(len(batch))
        return rows, sizes

    def _write(self, rows: list[Row], epoch: int) -> list[Text]:
        """The texts of a window: from the data, from the replay buffer, or written now."""
        step, args = self.state.global_step, self.args
        texts = self.mixture.draw(rows, epoch, step / max(self.state.max_steps, 1))
        fresh = [text for text in texts if text.source == "rollout"]
        rollout = self.roll_out([text.row for text in fresh], epoch) if fresh else None
        if rollout is not None:
            rate = self.policy.rate if args.importance_weight else None
            write(fresh, rollout, step + 1, rate)
            if args.draft_from_history:
                self._history.update((text.row.id, text.tokens) for text in fresh)
            first, every = fresh[0], self.state.logging_steps or math.inf  # 0: no such log
            if first.hidden is not None and step % every == 0:
                said = rollout.student_logprob[0, : len(first.tokens)]
                for name, value in self.differences(first, said).items():
                    self._logs[name].append(value)
        self.mixture.keep(texts, self._gather)
        self._record(rollout, texts)
        return texts

    def _gather(self, objects: list) -> list:
        return gather_object(objects) if self.args.world_size > 1 else objects

    def roll_out(self, rows: list[Row], epoch: int) -> Rollout:
        """Completions of `rows` by the current student and the teacher, in the order given."""
        args, teacher, student = self.args, self.teacher, self._student_for_decoding()
        prompts = [row.prompt_ids for row in rows]
        noise = epoch << 32 if args.noise_per_epoch else 0  # its key: below 2^56
        options = dict(
            batch_size=args.rollout_batch_size,
            sequence_ids=[noise | row.id for row in rows],
            sampling=self.sampling,
            max_new_tokens=args.max_new_tokens,
            eos_token_ids=self.vocabulary.eos_token_ids,
            pad_token_id=self.vocabulary.pad_token_id,
            vocab_size=self.vocabulary.size,
        )
        where = self.naming(lambda error: f"data row {rows[error.row].id}")
        with where, self._bar(len(rows), "rollout", "row") as bar:
            if args.decoder == "naive":
                return rollout_in_batches(teacher, student, prompts, self.policy, **options)
            given = {"teacher": teacher, "student": student}
            given = {role: model for role, model in given.items() if model is not None}
            plan = args.rollout_block, args.rollout_drafter
            if self._engine is None or (self._engine.given, self._engine.plan[:2]) != (given, plan):
                self._engine = None  # its memory is free before another takes it
                self._engine = self._new_engine(teacher, student)
            return block_rollout(
                teacher, student, prompts, self.policy, **options, engine=self._engine,
                keep_hidden=args.loss_type != "cross_entropy",
                history=[self._history.get(row.id) for row in rows],
                on_step=lambda _written, left: bar.update(len(rows) - left - bar.n),
            )  # fmt: skip

    def _record(self, rollout: Rollout | None, texts: list[Text]) -> None:
        """Seconds, log values, completions.jsonl; None where no row of this rank was rolled out."""
        if rollout is not None:
            self.totals["rollout_seconds"] += rollout.seconds
            for name, value in metrics.describe(rollout, self.vocabulary.eos_token_ids).items():
                self._logs[name].append(value)
        for name, value in self.mixture.describe(texts).items():
            self._logs[name].append(value)
        decode = self.processing_class.decode
        lines = records(texts, rollout, self.state.global_step + 1, decode)
        self._last_sample = next((r for r in lines if "replay_of" not in r), self._last_sample)
        if self.args.save_completions:
            lines = self._gather(lines)
            if self.is_world_process_zero():
                append_completions(self.args.output_dir, lines)

    def differences(self, text: Text, logprob: Tensor) -> dict[str, float]:
        """How far decoding is from training passes over the text that it wrote: the teacher's kept
        states, relative, and the student's log-probabilities (tokens,), in nats."""
        known = losses.kept_difference(self.teacher, text.row, text.tokens, text.hidden)
        found = {"rollout/hidden_difference": known}
        asked = logprob.isfinite()  # not where the teacher writes anyway
        if self.is_fsdp_enabled or not asked.any():  # all ranks would have to make such a pass
            return found
        batch = losses.collate([text.row.prompt_ids], [text.tokens], self.vocabulary.pad_token_id)
        batch = {name: x.to(self.args.device) for name, x in batch.items()}
        student = self.accelerator.unwrap_model(self.model)
        # What is logged must not draw the dropout of the steps that follow.
        with evaluating(student), torch.no_grad(), self.compute_loss_context_manager():
            loss = losses.distillation_loss(
                None, student, student, batch, vocab_size=self.vocabulary.size,
                kind="cross_entropy", reduction="none",
            )  # fmt: skip
        apart = (loss.cpu() + logprob)[asked].abs().max().item()
        return found | {"rollout/logprob_difference": apart}

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if hasattr(self.model, "peft_config"):  # else it says by itself what ends a response
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def _new_engine(self, teacher, student) -> Engine:
        args, models = self.args, (("teacher", teacher), ("student", student))
        costs = {name: count_parameters(m) for name, m in models if m is not None}
        engine = Engine(
            teacher, student, block=args.rollout_block, drafter=args.rollout_drafter, costs=costs
        )
        longest = max(len(row.prompt_ids) for row in self.train_dataset.rows)
        window = args.per_device_train_batch_size * args.gradient_accumulation_steps
        engine.room = (
            min(window, args.rollout_batch_size),
            capacity_for(longest, args.max_new_tokens, max(engine.planner.blocks)),
        )
        return engine

    def _bar(self, total: int, what: str, unit: str):
        off = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(total=total, desc=what, unit=unit, leave=False, disable=off)

    @contextlib.contextmanager
    def naming(self, where: Callable[[InvalidLogits], str]):
        """Within it, invalid logits end the run with step, place and last checkpoint."""
        try:
            yield
        except InvalidLogits as error:
            raise self._broken(f"{where(error)}: {error}") from error

    def _broken(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"step {self.state.global_step + 1}, {what}. Training stops; {self._left()}"
        )

    def _left(self) -> str:
        last = last_checkpoint(self.args.output_dir)
        return (
            f"the last intact checkpoint is {last}" if last else "no checkpoint is left to resume"
        )
