"""A trainer that writes: the rollouts of a window, by an engine that is kept from step to step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from switchkd_kernels import InvalidLogits
from torch import Tensor
from tqdm.auto import tqdm

from switchkd import losses
from switchkd.cache import capacity_for
from switchkd.checkpoint import day_of, last_checkpoint
from switchkd.config import SwitchConfig
from switchkd.data import Row, Rows, rows_from
from switchkd.decoder import rollout as block_rollout
from switchkd.distributed import ShardedTrainer
from switchkd.engine import Engine
from switchkd.mixture import Mixture, Text
from switchkd.models import count_parameters, evaluating
from switchkd.rollout import Rollout, rollout_in_batches

log = logging.getLogger(__name__)


class RolloutTrainer(ShardedTrainer):
    """`roll_out`, on what SwitchTrainer sets up."""

    _said: tuple = (None, None)

    @staticmethod
    def read_rows(dataset, tokenizer, args: SwitchConfig) -> Rows | None:
        """Tokenised rows of a data set in any form, of the day of the run in output_dir."""
        if dataset is None or isinstance(dataset, Rows):
            return dataset
        sizes, day = (args.max_prompt_length, args.max_new_tokens), day_of(args.output_dir)
        rows = rows_from(dataset, tokenizer, *sizes, day)
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
        last = last_checkpoint(self.args.output_dir)
        left = (
            f"the last intact checkpoint is {last}" if last else "no checkpoint is left to resume"
        )
        return FloatingPointError(
            f"step {self.state.global_step + 1}, {what}. Training stops; {left}"
        )
