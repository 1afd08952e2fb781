"""What the figures of the robot scripts show."""

from common.plot import SECONDS

SUCCESS = ["eval/success_rate", "eval/success_once", "charts/success_rate"]
RETURN = ["eval/episodic_return", "charts/episodic_return"]
PPO = {
    "learning": [
        ("success (eval: without exploration)", "step", SUCCESS),
        ("the same against training time", "time/train_s", SUCCESS),
        ("return of an episode", "step", RETURN),
        ("the same against training time", "time/train_s", RETURN),
    ],
    "health": [
        ("KL to the old policy, last minibatch", "step", ["losses/approx_kl"]),
        ("share of ratios clipped", "step", ["losses/clipfrac"]),
        ("explained variance of returns", "step", ["losses/explained_variance"]),
        ("ratio error before the first step", "step", ["losses/first_ratio_error"]),
        ("action std", "step", ["losses/action_std"]),
        ("gradient norm before clipping", "step", ["losses/grad_norm", "losses/critic_grad_norm"]),
        ("optimizer steps an iteration", "step", ["losses/optimizer_steps"]),
    ],
}
# script -> figure -> panels: see common/plot/__init__.py
FIGURES = {
    "ppo_fetch": PPO,
    "ppo_gr00t": PPO,
    "gr00t_finetune": {
        "learning": [
            ("loss and error of sampled actions, log scale", "step", ["train/loss", "val/loss", "val/mse"]),
            ("the same against time, log scale", SECONDS, ["train/loss", "val/loss", "val/mse"]),
            (
                "validation loss by time of the flow (0: noise), log scale",
                "step",
                [f"val/loss_t/{i / 4:.2f}-{(i + 1) / 4:.2f}" for i in range(4)],
            ),
        ],
        "health": [
            ("gradient norm before clipping", "step", ["train/grad_norm"]),
            ("learning rate", "step", ["train/learning_rate"]),
            ("samples / s", "step", ["time/samples_per_s"]),
        ],
    },
}
# script -> what a step is
STEP = dict.fromkeys(("ppo_fetch", "ppo_gr00t"), "environment steps")
# pattern of a metric -> label of its axis
UNITS = {
    ".*success": "share of episodes",
    ".*episodic_return": "sum of rewards of an episode",
    "losses/approx_kl": "nats an action",
    "losses/clipfrac": "share of actions",
    "losses/explained_variance": "1: all, 0: as a constant",
    "losses/first_ratio_error": "largest |ratio - 1|",
    "losses/action_std": "standard deviation, action units",
    r".*grad_norm": "norm",
    "losses/optimizer_steps": "steps",
    "train/loss|val/": "squared error, normalised units",
    "train/learning_rate": "learning rate",
    "time/samples_per_s": "samples a second",
}
