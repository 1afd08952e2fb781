"""What the figures of the GRPO scripts show."""

from common.plot import SECONDS

BANDS = ("very_easy", "easy", "medium", "hard", "very_hard")
TASKS = ("arithmetic", "words", "letters", "comparison", "binary", "word_problems")  # those not in a run draw nothing
STANDARD = ["arithmetic_eval", "arithmetic_eval_greedy", "train/reward"]
GRPO_HEALTH = [
    ("KL to the reference (nats / token)", "step", ["train/kl"]),
    ("entropy (nats / token)", "step", ["train/entropy"]),
    ("groups without spread", "step", ["train/frac_reward_zero_std"]),
    ("gradient norm", "step", ["train/grad_norm"]),
    ("completion length, share cut", "step", ["train/completions/mean_length", "train/completions/clipped_ratio"]),
    ("sampling vs training log-prob", "step", ["train/sampling_logp_difference/mean"]),
]
# script -> figure -> panels: see common/plot/__init__.py
FIGURES = {
    "grpo_arithmetic": {
        "learning": [
            ("held-out accuracy and train reward", "step", STANDARD),
            ("the same against time", SECONDS, STANDARD),
            ("held-out accuracy by band", "step", [f"eval_{band}_accuracy" for band in BANDS]),
        ],
        "health": GRPO_HEALTH,
    },
    "grpo_mixed": {
        "learning": [
            ("held-out accuracy by task", "step", [f"eval_{task}_accuracy" for task in TASKS]),
            ("transfer to the standard evaluation", "step", STANDARD),
            ("solve rate of training problems by task", "step", [f"train/{task}/solve_rate" for task in TASKS]),
        ],
        "health": GRPO_HEALTH,
    },
}
