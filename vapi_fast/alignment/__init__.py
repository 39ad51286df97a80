"""VA-π's loop: configuration, rollouts, reward, loss and step, the run around them, and what it leaves behind."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {
        "config": ["AlignConfig"],
        "run": ["align"],
        "step": ["Models", "Trainer", "align_step", "load_models", "make_trainer"],
        "rollout": ["Rollout", "roll_out"],
        "reward": ["PixelReward", "Reward"],
        "measurement": ["Evaluator", "Measurement"],
        "snapshots": ["Snapshots"],
    },
)
