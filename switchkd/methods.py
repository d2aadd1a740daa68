"""The methods of the literature, each as a name for options: who writes, which loss, which data.

`--method NAME` sets the defaults of a method's options. An option that is given wins; a
`rollout_policy` or `loss_type` that is given takes the place of all that the method says about
rollouts or about the loss, so that any policy goes with any loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field, fields

from switchkd.names import ALIASES, hint_of


@dataclass(frozen=True)
class Method:
    """source: where its constants come from. note: how it differs from what was published."""

    source: str
    rollout: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    note: str = ""


_DATA_ONLY = {"lmbda": 0.0}
_ROLLOUTS_ONLY = {"lmbda": 1.0}
_STUDENT = {"rollout_policy": "student"}
_SKEW = {"loss_type": "skew_reverse_kl", "skew_alpha": 0.1}

METHODS = {
    "sft": Method(
        source="supervised fine-tuning; SWITCH, arXiv 2410.19503, 4.1: 3 epochs for the student",
        loss={"loss_type": "cross_entropy"},
        data=_DATA_ONLY,
    ),
    "kd": Method(
        source="Hinton et al., arXiv 1503.02531, at every token; as DistiLLM's code: kd_ratio 1",
        loss={"loss_type": "kl_teacher_student"},
        data=_DATA_ONLY,
    ),
    "seqkd": Method(
        source="Kim and Rush, arXiv 1606.07947",
        # The same noise in each epoch: the teacher writes one fixed text for each prompt, which
        # from the second epoch on is checked rather than written.
        rollout={"rollout_policy": "teacher", "noise_per_epoch": False, "draft_from_history": True},
        loss={"loss_type": "cross_entropy"},
        data=_ROLLOUTS_ONLY,
        note="the teacher's text is sampled, not searched for with a beam",
    ),
    "imitkd": Method(
        source="ImitKD, arXiv 2009.07253, 'full', as DistiLLM's code has it: mixed-fkl, alpha 1",
        rollout=_STUDENT,
        loss={"loss_type": "kl_teacher_student"},
        data=_ROLLOUTS_ONLY,
        note="fresh rollouts, where the code replays; no data, where the paper's share decays; "
        "without the language-model loss on OpenWebText (lm_file)",
    ),
    "gkd": Method(
        source="GKD, arXiv 2306.13649, eq. 1; lmbda and beta of TRL's GKDConfig",
        rollout=_STUDENT,
        loss={"loss_type": "generalized_jsd", "beta": 0.5},
        data={"lmbda": 0.5},
        note="temperature 1 as in the paper, not TRL's 0.9; a coin per row, not per step; the mean "
        "is over all tokens, not per sequence; DistiLLM's GKD has beta 0.1",
    ),
    "minillm-mix": Method(
        source="MiniLLM, arXiv 2306.08543: teacher-mixed sampling, alpha 0.2",
        rollout={
            "rollout_policy": "switch",
            "switch_schedule": "mix-in",  # its default rate is alpha
            "importance_weight": True,
        },
        loss={"loss_type": "kl_student_teacher"},
        data=_ROLLOUTS_ONLY,
        note="MiniLLM's sampler, weight and single-step term; not its policy gradient over returns",
    ),
    "distillm": Method(
        source="DistiLLM, arXiv 2402.03898, and its code: adaptive-srkl, capacity 1000",
        rollout=_STUDENT,
        loss=_SKEW,
        data={
            "lmbda": 0.0,
            "adaptive_lmbda": True,
            "replay_capacity": 1000,
            "replay_ratio": "decreasing",
        },
        note="a coin per row, not per batch; its GPT-2 script has loss_type skew_kl; without the "
        "language-model loss on OpenWebText (lm_file)",
    ),
    "distillm2": Method(
        source="DistiLLM-2, arXiv 2503.07067, and its code: b = 1, mixture detached",
        rollout={"rollout_policy": "switch", "switch_schedule": "sequence"},
        loss={
            "loss_type": "contrastive_skew",
            "skew_alpha": 0.1,
            "contrastive_weight": 1.0,
            "detach_mixture": True,
        },
        data=_ROLLOUTS_ONLY,
        note="by a coin per prompt and epoch the teacher's or the student's response, not both; "
        "the mean is over all tokens, not per sequence",
    ),
    "skd": Method(
        source="SKD, arXiv 2410.11325, Algorithm 1, and its configuration",
        rollout={
            "rollout_policy": "skd",
            "skd_top_k": 25,
            "student_temperature": 0.5,
            "teacher_temperature": 0.2,
            "top_p": 0.5,
        },
        loss={"loss_type": "kl_teacher_student"},
        data=_ROLLOUTS_ONLY,
        note="the token that is tested is the one that is kept; all rows of a batch at once",
    ),
    "switch": Method(
        source="SWITCH, arXiv 2410.19503, eqs. 3-5, Algorithm 1 and appendix A",
        rollout={
            "rollout_policy": "switch",
            "switch_schedule": "exponential",
            "switch_tau0": 1.0,
            "switch_lambda": 0.1,
            "jsd_base": "2",
        },
        loss=_SKEW,
        data={"lmbda": 0.5},
        note="a coin per row for rollout or data; without the language-model loss on OpenWebText "
        "(lm_file); the JSD's base and the first t are not printed: bits and 0 here",
    ),
    "adaswitch": Method(
        source="AdaSwitch, arXiv 2510.07842, as far as it could be read",
        rollout={"rollout_policy": "adaswitch"},
        loss={"loss_type": "kl_teacher_student"},
        data=_ROLLOUTS_ONLY,
        note="K and L must be given: the published values could not be recovered; the mean of the "
        "window is taken as 1e-4 at least",
    ),
    "ssd": Method(
        source="SSD, OpenReview 6DlaA6eBt7: constant tau in 0.2 to 0.5, JSD in nats",
        rollout={
            "rollout_policy": "switch",
            "switch_schedule": "constant",
            "switch_tau0": 0.3,
            "jsd_base": "e",
        },
        loss={"loss_type": "kl_teacher_student"},
        data=_ROLLOUTS_ONLY,
        note="its switching rule with any teacher; there, the student's weights given a document",
    ),
}


def preset(name: str | None, given: Collection[str] = ()) -> dict:
    """The options that a method sets where those named in `given` were given.

    Raises ValueError with the names for one that is not in the table, and for a rollout_policy
    that would write nothing.
    """
    if name is None:
        return {}
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    values = dict(method.data)
    rolls = values["lmbda"] > 0 or "adaptive_lmbda" in values
    if "rollout_policy" in given and not (rolls or {"lmbda", "adaptive_lmbda"} & {*given}):
        raise ValueError(
            f"rollout_policy: got one with method {name}, which trains on data alone; expected "
            "lmbda > 0 with it"
        )
    if "rollout_policy" not in given:
        values |= method.rollout
    if "loss_type" not in given:
        values |= method.loss
    return {key: value for key, value in values.items() if key not in given}


class WithMethods(type):
    """Metaclass of configurations, and so of those that others derive: keyword arguments that are
    not given default to those of `method`, and may have the names that other projects give them."""

    def __call__(cls, *args, **given):
        known = [f.name for f in fields(cls) if f.init]
        for name in sorted(given.keys() - set(known)):
            if ALIASES.get(name) not in known:
                hint = hint_of(name, [*known, *ALIASES])
                raise TypeError(f"{cls.__name__}: got the unknown argument {name!r}{hint}")
            if ALIASES[name] in given:
                raise TypeError(f"{cls.__name__}: got {ALIASES[name]} and its alias {name}")
            given[ALIASES[name]] = given.pop(name)
        return super().__call__(*args, **given, **preset(given.get("method"), given))

    @property
    def __signature__(cls):
        _self, *others = inspect.signature(cls.__init__).parameters.values()
        return inspect.Signature(others)
