"""The arms of each experiment: a name and the options that differ from the others.

Tables and figures are those of SWITCH (arXiv 2410.19503); what it prints is quoted beside it in
LOG.md, never here.
"""

from __future__ import annotations

SWITCH = dict(rollout_policy="switch")
# (a) Table 1, for the methods whose rollouts this engine can make.
METHODS = {
    "SFT": dict(method="sft"),
    "KD": dict(method="kd"),
    "GKD": dict(method="gkd"),
    # Its share of rollouts follows the validation loss.
    "DistiLLM": dict(method="distillm", eval_strategy="steps", eval_steps=0.25),
    "SKD": dict(method="skd"),
    "SWITCH": SWITCH,  # what --method switch says, too: one run for all experiments
    # K and L could not be recovered from the paper: ours, not theirs.
    "AdaSwitch, K = 3, L = 5": dict(method="adaswitch", adaswitch_k=3.0, adaswitch_window=5),
}
# (b) Table 4.
DECAY = {f"λ = 1/{n}": dict(SWITCH, switch_lambda=1 / n) for n in (5, 10, 15, 25)}
# (c) Table 3.
SCHEDULES = {
    "exponential": dict(SWITCH),
    "linear": dict(SWITCH, switch_schedule="linear"),
    "constant 0.2": dict(SWITCH, switch_schedule="constant", switch_tau0=0.2),
    "growth": dict(SWITCH, switch_schedule="growth"),
    "random 0.5": dict(SWITCH, switch_schedule="random"),
    "mix-in 0.2": dict(SWITCH, switch_schedule="mix-in"),
}
# (f) Figure 3: each loss on student-only and on teacher-intervened rollouts.
LOSSES = {
    "KL(p‖q)": dict(loss_type="kl_teacher_student"),
    "KL(q‖p)": dict(loss_type="kl_student_teacher"),
    # The paper's 0.9 as the teacher's weight; in DistiLLM's code it is the student's: beta 0.1.
    "GJSD 0.9": dict(loss_type="generalized_jsd", beta=0.9),
    "SRKL 0.1": dict(),
}
LOSSES = {
    f"{name}, {rollouts}": dict(loss, rollout_policy=policy)
    for name, loss in LOSSES.items()
    for rollouts, policy in (("student", "student"), ("SWITCH", "switch"))
}


def sizes(scale) -> dict:
    """(e) Table 1 over sizes, and an open question: a teacher no larger than the student."""
    arms = {}
    for rollouts, policy in (("student", "student"), ("SWITCH", "switch")):
        for size in scale.sizes:
            arms[f"student {size} of teacher, {rollouts}"] = dict(rollout_policy=policy, size=size)
        large, small = scale.sizes[0], scale.sizes[-1]
        for teacher in (small, large):
            options = dict(rollout_policy=policy, size=large, teacher_size=teacher)
            arms[f"student {large}, teacher {teacher}, {rollouts}"] = options
    return arms
