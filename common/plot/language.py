"""What the figures of the GRPO scripts show."""

from common.plot import SECONDS

BANDS = ("very_easy", "easy", "medium", "hard", "very_hard")
TASKS = ("arithmetic", "words", "letters", "comparison", "binary", "word_problems")  # *: and a user's own
STANDARD = ["arithmetic_eval", "arithmetic_eval_greedy"]
REWARD = ("reward of the training completions", "step", ["train/reward"])
GRPO_HEALTH = [
    ("KL to the reference, log scale", "step", ["train/kl"]),
    ("entropy of the policy", "step", ["train/entropy"]),
    ("groups without spread", "step", ["train/frac_reward_zero_std"]),
    ("gradient norm before clipping, log scale", "step", ["train/grad_norm"]),
    ("length of a completion", "step", ["train/completions/mean_length"]),
    ("completions cut at the limit", "step", ["train/completions/clipped_ratio"]),
    ("sampling against training log-prob, log scale", "step", ["train/sampling_logp_difference/mean"]),
]
# script -> figure -> panels: see common/plot/__init__.py
FIGURES = {
    "grpo_arithmetic": {
        "learning": [
            ("held-out accuracy", "step", STANDARD),
            ("the same against time", SECONDS, STANDARD),
            ("held-out accuracy by band", "step", [f"eval_{band}_accuracy" for band in BANDS]),
            REWARD,
        ],
        "health": GRPO_HEALTH,
    },
    "grpo_mixed": {
        "learning": [
            ("held-out accuracy by task", "step", [f"eval_{task}_accuracy" for task in (*TASKS, "*")]),
            ("solve rate of training problems by task", "step", [f"train/{task}/solve_rate" for task in (*TASKS, "*")]),
            ("transfer to the standard evaluation", "step", STANDARD),
            REWARD,
        ],
        "health": GRPO_HEALTH,
    },
}
STEP: dict[str, str] = {}
# pattern of a metric -> label of its axis
UNITS = {
    r".*(accuracy|arithmetic_eval|solve_rate)": "share of answers right",
    "train/reward": "reward (-1 wrong, 1 right)",
    "train/kl|train/entropy": "nats a token",
    "train/frac": "share of groups",
    "train/grad_norm": "norm",
    "train/completions/mean_length": "tokens",
    "train/completions/clipped_ratio": "share of completions",
    "train/sampling_logp_difference": "mean difference, nats",
}
