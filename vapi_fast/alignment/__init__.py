"""VA-π's loop: configuration, rollouts, reward, loss and step, the run around them, and what it leaves behind."""

from vapi_fast._lazy import offers

__all__, __getattr__ = offers(
    __name__,
    {
        "config": ["AlignConfig"],
        "run": ["align"],
        "models": ["Models", "load_models"],
        "step": ["Trainer", "align_step", "make_trainer"],
        "rollout": ["Rollout", "roll_out"],
        "reward": ["PixelReward", "Reward"],
        "measurement": ["Evaluator", "Measurement"],
        "snapshots": ["Snapshots"],
    },
)
