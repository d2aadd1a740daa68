"""Distil large language models with teacher-intervened rollouts."""

__version__ = "0.1.0"
__all__ = ["Rollout", "SwitchConfig", "SwitchTrainer", "rollout_naive"]


def __getattr__(name):  # importing torch and transformers takes seconds: only for who needs them
    if name == "SwitchConfig":
        from switchkd.config import SwitchConfig as found
    elif name == "SwitchTrainer":
        from switchkd.trainer import SwitchTrainer as found
    elif name in ("Rollout", "rollout_naive"):
        from switchkd import rollout

        found = getattr(rollout, name)
    else:
        raise AttributeError(f"module 'switchkd' has no attribute {name!r}")
    return found
