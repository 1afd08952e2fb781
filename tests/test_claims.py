"""Claims that hold: the results tables and README's numbers are recomputed from docs/results, cell by cell.

A table in a page's sections 6 and 7 is either recomputed here or stands under a line with a °: no curve of it was kept.
"""

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
from conftest import ROOT

import grpo_arithmetic as grpo
from benchmarks.ablate import GRIDS, accuracy, key_of, spread
from common.robot.report import student
from common.stats import wilson
from common.streams import stream

RESULTS = ROOT / "docs" / "results"
GRPO, GR00T, PPO = (42, 43, 44), (42, 43, 44), (1, 2, 3)
FIVE = (1, 2, 3, 4, 5)  # seeds of Push and PickAndPlace with their recipes


@cache
def rows(run: str | Path, file: str = "metrics.jsonl") -> list[dict]:
    """run: a folder below docs/results, or a file"""
    if isinstance(run, Path):
        return [json.loads(line) for line in run.read_text().splitlines()]
    return [json.loads(line) for line in (RESULTS / run / file).read_text().splitlines()]


def values(run: str, name: str) -> list[float]:
    return [row[name] for row in rows(run) if row.get(name) is not None]


def last(run: str, name: str) -> float:
    return values(run, name)[-1]


def at(run: str, name: str, step: int) -> float:
    return next(row[name] for row in rows(run) if row["step"] == step and name in row)


def seeds(folder: str, numbers=PPO) -> list[str]:
    return [f"{folder}/seed{n}" for n in numbers]


def each(numbers, digits: int = 2) -> str:
    return " / ".join(f"{x:,.{digits}f}" for x in numbers).replace("-", "−")


def with_interval(row: dict, name: str) -> str:
    return f"{row[name]:.3f} [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"


def line(*cells) -> str:
    return "|" + "|".join(f" {cell} " if str(cell) else " " for cell in cells) + "|"


def table(page: str, head: str) -> list[str]:
    """Body of the one table whose header begins with `head`."""
    lines = (ROOT / page).read_text().splitlines()
    (start,) = [i for i, text in enumerate(lines) if text.startswith(head)]
    body = lines[start + 2 :]
    return body[: next(i for i, text in enumerate([*body, ""]) if not text.startswith("|"))]


# ---- the tables ------------------------------------------------------------------------------------------------------


def of_language(folder: str, named: list[tuple[str, str, bool]]) -> list[str]:
    """Rows (label, metric, with its interval) of the base model and the three runs."""
    runs, out = seeds(folder, GRPO), []
    ends = [[row for row in rows(run) if "arithmetic_eval" in row] for run in runs]
    for label, name, interval in named:
        show = (lambda row: with_interval(row, name)) if interval else (lambda row: f"{row[name]:.3f}")
        out.append(line(label, show(ends[0][0]), *(show(end[-1]) for end in ends)))
    out.append(
        line("train accuracy, evaluated at the end", "", *(f"{last(r, 'final_train_accuracy'):.3f}" for r in runs))
    )
    return out


def grpo_arithmetic():
    runs = seeds("grpo_arithmetic", GRPO)
    bands = [(band.replace("_", " "), f"eval_{band}_accuracy", False) for band in
             ("very_easy", "easy", "medium", "hard", "very_hard")]  # fmt: skip
    named = [("`arithmetic_eval`", "arithmetic_eval", True), ("greedy", "arithmetic_eval_greedy", False)]
    out = of_language("grpo_arithmetic", [*named, ("pass@16", "arithmetic_eval_pass@16", False), *bands])
    epoch = [(mean(values(run, "train/reward")[-62:]) + 1) / 2 for run in runs]  # 62 steps of 16 of 1,000 problems
    gaps = [f"{max(values(run, 'train/sampling_logp_difference/max')):.1e}".replace("e-0", "e-") for run in runs]
    out.append(line("(mean reward of the last epoch + 1) / 2", "", *(f"{x:.3f}" for x in epoch)))
    out.append(line("largest sampling vs training log-prob gap", "", *gaps))
    return [*out, line("seconds", "", *(f"{last(run, 'time/elapsed_s'):.0f}" for run in runs))]


def smollm2():
    first, end = (row for row in rows("smollm2/seed42") if "arithmetic_eval" in row)
    steps = [row for row in rows("smollm2/seed42") if "train/reward" in row]

    def both(*names):
        return [", ".join(f"{row[name]:.3f}" for name in names) for row in (first, end)]

    eval_ = [with_interval(row, "arithmetic_eval") for row in (first, end)]
    cut = [f"{row['train/completions/clipped_ratio']:.2f}" for row in (steps[0], steps[-1])]
    return [
        line("`arithmetic_eval`, 4 samples at T 0.7", *eval_),
        line("greedy, pass@4", *both("arithmetic_eval_greedy", "arithmetic_eval_pass@4")),
        line("addition, subtraction, multiplication", *both(*(f"eval_{op}_accuracy" for op in ("add", "sub", "mul")))),
        line("validation", *both("validation_accuracy")),
        line("completions cut at 8 tokens", *cut),
    ]


def ablations(*grids: str):
    """Rows of grids of benchmarks/ablate.py: validation accuracy, and its difference to the first setting by seed."""

    every, out = {row["key"]: row for path in RESULTS.glob("ablations/*.jsonl") for row in rows(path)}, []
    for grid in grids:
        question, settings = GRIDS[grid]
        ends = {}
        for s in settings:
            prefix = key_of(s, 0)[:-2]
            mine = {
                row["seed"]: row["evaluations"][-1] for key, row in every.items() if key == f"{prefix}{row['seed']}]"
            }
            ends[s.name] = {seed: end["validation_k"] / end["validation_n"] for seed, end in sorted(mine.items())}
        base = ends[settings[0].name]
        for name, end in ends.items():
            pairs = [end[seed] - base[seed] for seed in end if seed in base]
            difference = "" if name == settings[0].name else spread(pairs, True).replace("-", "−")
            out.append(line(f"`{grid}`: {name}", len(end), spread([*end.values()]), difference))
    return out


def objectives():
    return ablations("objective", "several_rewards", "kl_gradient", "kl_gradient_strong")


def pretrained():
    return ablations("smollm2_learning_rate", "smollm2_beta", "smollm2_misaligned")


def grpo_mixed():
    tasks = (("arithmetic", "arithmetic"), ("counting words", "words"), ("comparison", "comparison"))
    named = [(f"{label}, 100 held out", f"eval_{task}_accuracy", True) for label, task in tasks]
    named += [("`arithmetic_eval`, 200", "arithmetic_eval", True)]
    named += [(f"{label}, greedy", f"eval_{task}_greedy", False) for label, task in tasks]
    named += [("`arithmetic_eval`, greedy", "arithmetic_eval_greedy", False)]
    named += [("`arithmetic_eval`, pass@16", "arithmetic_eval_pass@16", False)]
    named += [("validation, 120 problems", "validation_accuracy", False)]
    elapsed = (f"{last(run, 'time/elapsed_s'):.0f}" for run in seeds("grpo_mixed", GRPO))
    return [*of_language("grpo_mixed", named), line("seconds on one busy core", "", *elapsed)]


def first_at(run: str, share: float = 0.95) -> str:
    steps = [row["step"] for row in rows(run) if row.get("eval/success_rate", 0) >= share - 1e-6]
    return f"{steps[0]:,}" if steps else "not"


def ppo_fetch():
    out = []
    for label, folder, numbers in (
        ("FetchReach, dense (default)", "reach_dense", PPO),
        ("FetchReach, sparse", "reach_sparse", PPO),
        ("FetchReach, distance", "reach_distance", PPO),
        ("FetchReach, shaped", "reach_shaped", PPO),
        ("FetchPush, shaped (default)", "push", FIVE),
        ("FetchPush, dense: control", "push_dense", PPO),
        ("FetchPush, sparse: control", "push_sparse", PPO),
        ("FetchPickAndPlace, shaped (default)", "pick_grasped", FIVE),
        ("FetchPickAndPlace, shaped, `--grasped-starts 0`", "pick_control", PPO),
        ("the same, schedule of 1.2M steps, earlier streams", "pick", PPO),
        ("FetchSlide, shaped, `--gamma 0.98`", "slide", PPO),
    ):
        runs = seeds(f"ppo_fetch/{folder}", numbers)
        steps = [f"{max(row['step'] for row in rows(run)):,}" for run in runs]
        out.append(
            line(
                label,
                ", ".join(map(str, numbers)),
                " / ".join(steps if len(set(steps)) > 1 else steps[:1]),
                each(last(run, "eval/success_rate") for run in runs),
                each(last(run, "eval/success_once") for run in runs),
                " / ".join(map(first_at, runs)) if len(runs) > 1 else first_at(runs[0]),
                each((100 * last(run, "eval/final_distance") for run in runs), 1),
                f"{values(runs[0], 'baseline/success_rate')[0]:.2f}",
            )
        )
    return out


def advantages():
    out = []
    for name in ("gae", "group"):
        runs = seeds(f"ppo_fetch/reach_{name}")
        success = [each(at(run, "eval/success_rate", step) for run in runs) for step in (8_000, 16_000, 24_000)]
        returns = each(last(run, "eval/episodic_return") for run in runs)
        distance = each((100 * last(run, "eval/final_distance") for run in runs), 1)
        out.append(line(f"`{name}`", "1, 2, 3", *success, returns, distance))
    return out


def advantages_on_push():
    out = []
    for name, folder in (("gae", "push"), ("group", "push_group")):
        runs = seeds(f"ppo_fetch/{folder}")
        success = [
            each([row["eval/success_rate"] for row in rows(run) if "eval/success_rate" in row and row["step"] <= step][-1]
                 for run in runs) for step in (200_000, 400_000, 1_000_000)
        ]  # fmt: skip
        steps = " / ".join(f"{max(row['step'] for row in rows(run)):,}" for run in runs)
        distance = each((100 * last(run, "eval/final_distance") for run in runs), 1)
        out.append(line(f"`{name}`, FetchPush", "1, 2, 3", *success, steps, distance))
    return out


def peers():
    names = {
        "ours": "ppo_fetch.py, default",
        "sb3": "stable-baselines3 PPO at its defaults, 1 × 2048, batch 64",
        "sb3, 8 x 1024": "stable-baselines3 PPO, 8 × 1024, batch 256: our choice, not theirs",
        "sb3, our settings": "the same with our observations and settings",
        "cleanrl-style": "cleanRL-style loop, 1 × 2048",
    }
    curves = {}
    for row in rows("ppo_fetch", "peers.jsonl"):
        curves.setdefault((row["contender"], row["seed"]), []).append(row)
    reached = {key: next(r for r in curve if r["success"] >= 0.95 - 1e-6) for key, curve in curves.items()}
    out = []
    for name, label in names.items():
        numbers = [seed for seed in PPO if (name, seed) in curves]
        label += "" if numbers == list(PPO) else f" (seed {', '.join(map(str, numbers))})"
        steps = [reached[name, seed]["steps"] for seed in numbers]
        ratios = "" if name == "ours" else each((s / reached["ours", i]["steps"] for i, s in zip(numbers, steps)), 1)
        ends = [curves[name, seed][-1] for seed in numbers]
        timed = name != "sb3"
        seconds = (
            each((reached[name, seed]["seconds"] for seed in numbers), 1) if timed else "not measured (a busy core)"
        )
        rate = each((end["steps"] / end["seconds"] for end in ends), 0) if timed else ""
        out.append(line(label, each(steps, 0), ratios, seconds, rate))
    return out


def simulator():
    out, found = [], {}
    for text in (RESULTS / "ppo_fetch" / "fetch_speed.txt").read_text().splitlines()[1:]:
        if not text.startswith(" "):
            found[text] = mine = []
        mine.append(text)
    for task, lines in found.items():
        rate = [f"{int(text.split()[-7]):,}" for text in lines[1:5]]
        both = re.search(r"mj_step alone ([\d.]+), 1 thread ([\d.]+)", lines[-1])
        out.append(line(task, *rate, f"{both[1]} ({both[2]})"))
    return out


def ppo_ablations(file: str, names: dict[str, str]):
    found = {}
    for row in rows("ppo_fetch", file):
        found.setdefault((row["variant"], row["step"]), []).append(row)
    out = []
    for name, label in names.items():
        cells = []
        for step in (6_400, 12_000):
            success, ret = (
                mean(r[f"eval/{k}"] for r in found[name, step]) for k in ("success_rate", "episodic_return")
            )
            cells.append(f"{success:.2f} ({ret:.2f})")
        out.append(line(label, *cells, f"{min(r['eval/success_rate'] for r in found[name, 12_000]):.2f}"))
    return out


def mistakes():
    return ppo_ablations("ablations.jsonl", {
        "none": "the script as it is",
        "truncation_as_death": "**mistake**: a time limit counts as the end, V(s′) = 0",
        "reset_as_successor": "**mistake**: V of the reset observation in place of the last one's",
        "off_by_one_dones": "**mistake**: ends stored one step late, V of the reset observation",
        "no_shuffle": "**mistake**: the same minibatches in every epoch",
        "unsaved_statistics": "**mistake**: evaluation starts without statistics and learns them as it goes",
        "stale_normaliser": "**mistake**: statistics move between acting and learning",
        "in_phase_starts": "`--no-stagger`",
        "no_goal_delta": "`--observation-mode observation_goal`",
        "gamma_0.99": "`--gamma 0.99`",
        "no_target_kl": "`--target-kl 0`",
    })  # fmt: skip


def switches():
    return ppo_ablations("ablations_switches.jsonl", {
        "none": "the script as it is",
        "no_obs_statistics": "`--no-normalize-obs`",
        "no_reward_scaling": "`--no-scale-rewards`",
        "no_advantage_norm": "`--no-norm-adv` (commit e67f120)",
        "no_annealing": "`--no-anneal-lr` (commit e67f120)",
    })  # fmt: skip


def flow_runs(folder: str, steps: tuple[int, ...]) -> list[str]:
    """Cells from the start's success to the returns."""
    runs = seeds(f"ppo_gr00t/{folder}")
    rates = each(mean(at(run, "eval/success_rate", step) for run in runs) for step in steps)
    ends = [each(last(run, f"eval/{k}") for run in runs) for k in ("success_rate", "success_once")]
    distance = each((100 * last(run, "eval/final_distance") for run in runs), 1)
    return [rates, *ends, distance, each(last(run, "eval/episodic_return") for run in runs)]


def ppo_gr00t():
    out = []
    scratch = [at(run, "eval/success_rate", 240_000) for run in seeds("ppo_fetch/push")]
    reach = [at(run, "eval/success_rate", 8_000) for run in seeds("ppo_fetch/reach_dense")]
    for label, folder, total, steps, note, other in (
        ("FetchReach, dense (default)", "reach", "38,400", (12_800, 25_600, 38_400), "", f"{each(reach)} (after 8,000)"),
        ("the same from an earlier start, commit 232d42b", "reach_earlier_start", "38,400", (12_800, 25_600, 38_400),
         "", ""),
        ("FetchPush, shaped", "push", "240,000", (48_000, 96_000, 144_000), " (at 48k / 96k / 144k)",
         f"{each(scratch)}, of a schedule of 1M"),
    ):  # fmt: skip
        rates, success, once, distance, returns = flow_runs(folder, steps)
        runs = seeds(f"ppo_gr00t/{folder}")
        start = f"{mean(values(run, 'baseline/success_rate')[0] for run in runs):.2f}"
        before = each([mean(values(run, "baseline/episodic_return")[0] for run in runs)])
        out.append(
            line(label, "1, 2, 3", total, start, rates + note, success, once, distance, f"{before} → {returns}", other)
        )
    return out


def samplers():
    names = {"reach": "`flow-sde`, `--noisy-step last` (default)", "reach_any": "`flow-sde`, `--noisy-step any`",
             "reach_chain": "`flow-sde-chain`", "reach_noise": "`flow-noise`"}  # fmt: skip
    return [line(label, *flow_runs(folder, (12_800, 25_600, 38_400))) for folder, label in names.items()]


def flow_advantages():
    out = []
    for name, folder in (("gae", "reach"), ("group", "reach_group")):
        runs = seeds(f"ppo_gr00t/{folder}")
        success = [each(at(run, "eval/success_rate", step) for run in runs) for step in (25_600, 38_400)]
        once, returns = (each(last(run, f"eval/{k}") for run in runs) for k in ("success_once", "episodic_return"))
        steps = each((sum(values(run, "losses/optimizer_steps")) for run in runs), 0)
        out.append(line(f"`{name}`", *success, once, each((100 * last(run, "eval/final_distance") for run in runs), 1),
                        returns, steps))  # fmt: skip
    return out


def t_interval(run: str) -> tuple[float, float, float]:
    """Mean open-loop error of the held-out episodes, with its 95 % interval."""
    errors = np.array([row["mse"] for row in rows(run, "trajectory_results.jsonl")])
    half = student(len(errors) - 1) * errors.std(ddof=1) / np.sqrt(len(errors))
    return errors.mean(), errors.mean() - half, errors.mean() + half


def closed(run: str, task: str) -> float:
    return last(run, f"closed_loop/{task}/success_rate")


def gr00t_finetune():
    out = []
    for model in ("tiny", "tiny-n17", "lite"):
        for run in seeds(f"gr00t_finetune/{model}", GR00T):
            rates = [closed(run, task) for task in ("FetchReach", "FetchPush", "FetchPickAndPlace")]
            played = ["{:.2f} [{:.2f}, {:.2f}]".format(rate, *wilson(rate * 100, 100)) for rate in rates]
            error = t_interval(run)
            ratios = [f"{last(run, f'eval/mse_{k}') / error[0]:.1f}x" for k in ("hold_last", "mean_action")]
            seconds = [f"{last(run, f'time/{k}_s'):.0f}" for k in ("train", "elapsed")]
            before = f"{values(run, 'base/mse')[0]:.2f}"
            after = "{:.4f} [{:.3f}, {:.3f}]".format(*error)
            commit = json.loads((RESULTS / run / "config.json").read_text())["git"].removesuffix("-dirty")
            out.append(line(model, run[-2:], before, after, *ratios, *played, *seconds, commit))
    return out


def page_ablations():
    """The diffs of the mixed page beside the unedited script with the same flags: validation, and what shows the change."""
    told = {
        1: ("reward", lambda r: mean(r["curve"]["reward"][-10:])),
        2: ("train/comparison/accuracy", lambda r: mean(r["curve"]["comparison/accuracy"][-10:])),
        3: ("held-out accuracy where yes is right", lambda r: r["evaluations"][-1]["comparison_yes"]),
        4: ("eval_words_accuracy", lambda r: r["evaluations"][-1]["eval_words_accuracy"]),
        5: ("train/comparison/share", lambda r: mean(r["curve"]["comparison/share"][-10:])),
        6: ("reward", lambda r: mean(r["curve"]["reward"][-10:])),
        7: ("train/clip_ratio/region_mean", lambda r: mean(r["curve"]["clip_ratio/region_mean"])),
        8: ("train/kl", lambda r: mean(r["curve"]["kl"][-10:])),
        9: ("train/completions/mean_length", lambda r: mean(r["curve"]["completions/mean_length"][-10:])),
        10: ("train/sampling_logp_difference/mean, step 1", lambda r: r["curve"]["sampling_logp_difference/mean"][0]),
    }
    found, out = {}, []
    for row in rows("ablations", "page.jsonl"):
        found.setdefault(row["setting"], {})[row["seed"]] = row
    for number, (name, measure) in told.items():
        edited = found[f"ablation {number}"]
        base = found.get(f"unedited, flags of {number}", found["unedited"])
        changes = [accuracy(row, "validation") - accuracy(base[seed], "validation") for seed, row in edited.items()]
        before, after = ([measure(runs[seed]) for seed in edited] for runs in (base, edited))
        ends = f"{mean(before):.3f} → {mean(after):.3f} ({spread([b - a for a, b in zip(before, after)], True)})"
        out.append(re.sub(r"-(?=\d)", "−", line(number, len(edited), spread(changes, True), name, ends)))
    return out


TABLES = [
    ("docs/grpo_arithmetic.md", "| | base model | seed 42 |", grpo_arithmetic),
    ("docs/grpo_arithmetic.md", "| | before | after 20 steps |", smollm2),
    ("docs/grpo_arithmetic.md", "| bundled model, grid: setting |", objectives),
    ("docs/grpo_arithmetic.md", "| SmolLM2-135M, grid: setting |", pretrained),
    ("docs/grpo_mixed.md", "| | base model | seed 42 |", grpo_mixed),
    ("docs/grpo_mixed.md", "| ablation | n |", page_ablations),
    ("docs/ppo_fetch.md", "| task, reward |", ppo_fetch),
    ("docs/ppo_fetch.md", "| `--advantage` |", advantages),
    ("docs/ppo_fetch.md", "| FetchPush, `--advantage` |", advantages_on_push),
    ("docs/ppo_fetch.md", "| contender |", peers),
    ("docs/ppo_fetch.md", "| env steps/s |", simulator),
    ("docs/ppo_gr00t.md", "| task | seeds |", ppo_gr00t),
    ("docs/ppo_gr00t.md", "| `--sampler` | success", samplers),
    ("docs/ppo_gr00t.md", "| `--advantage` | success", flow_advantages),
    ("docs/gr00t_finetune.md", "| model | seed |", gr00t_finetune),
]


@pytest.mark.parametrize("page, head, recomputed", TABLES, ids=lambda x: getattr(x, "__name__", None))
def test_a_results_table_is_what_the_curves_say(page, head, recomputed):
    rest = [row for row in table(page, head) if "°" not in row]  # a row can be marked, too
    assert rest == recomputed()


def test_the_tables_of_ppo_ablations_are_what_the_curves_say():
    page = (ROOT / "docs/ppo_fetch.md").read_text().split("## 7.")[1]
    for recomputed in (mistakes(), switches()):
        assert "\n".join(recomputed) in page


def test_the_returns_on_classic_control_are_those_of_the_curves():
    """Every last return of seeds 1 to 3 stands in its row; the cells have words besides."""
    ends = {(r["env"], r["contender"], r["seed"]): r["return"] for r in rows("ppo_fetch", "classic.jsonl")}
    for text in table("docs/ppo_fetch.md", "| environment | env steps | ours | SB3 |"):
        env, _, *cells = (cell.strip() for cell in text.strip("|").split("|"))
        for contender, cell in zip(("ours", "sb3"), cells):
            told = [ends[env, contender, seed] for seed in PPO if (env, contender, seed) in ends]
            assert cell.startswith(each(told, 0)), (env, contender)


def test_a_results_table_without_curves_says_so():
    """Above every table of the sections on results that is not recomputed, its paragraph has the sign for that."""
    known = [head for _, head, _ in TABLES] + ["| variant | success", "| environment | env steps"]
    for page in ("grpo_arithmetic", "grpo_mixed", "ppo_fetch", "ppo_gr00t", "gr00t_finetune"):
        text = (ROOT / "docs" / f"{page}.md").read_text().split("## 6. Results")[1].split("## 8.")[0]
        blocks = text.split("\n\n")
        for above, block in zip(blocks, blocks[1:]):
            if block.startswith("|") and not block.startswith(tuple(known)):
                assert "°" in above, f"{page}: {block.splitlines()[0]}"


# ---- README ----------------------------------------------------------------------------------------------------------


def runs_end(folder: str, name: str, numbers=GRPO) -> float:
    return mean(last(run, name) for run in seeds(folder, numbers))


def span(numbers, form: str = "{:.0f}") -> str:
    low, high = (form.format(x) for x in (min(numbers), max(numbers)))
    return f"{low} to {high}"


def arithmetic_row():
    before, after = (
        values("grpo_arithmetic/seed42", "arithmetic_eval")[0],
        runs_end("grpo_arithmetic", "arithmetic_eval"),
    )
    told = f"held-out accuracy {before:.2f} → {after:.2f} (mean of 3 seeds, on one busy core each)"
    return f"{told}; 3 minutes on 2 free cores°"


def mixed_row():
    parts = {"arithmetic": "eval_arithmetic_accuracy", "counting": "eval_words_accuracy",
             "comparison": "eval_comparison_accuracy", "`arithmetic_eval`": "arithmetic_eval"}  # fmt: skip
    told = [
        f"{label} {values('grpo_mixed/seed42', name)[0]:.2f} → {runs_end('grpo_mixed', name):.2f}"
        for label, name in parts.items()
    ]
    return (
        f"held-out {', '.join(told[:3])}; {told[3]} (means of 3 seeds, on one busy core each); "
        f"another seed-42 run on 2 free cores took {last('grpo_mixed/two_threads', 'time/elapsed_s'):.0f} s"
    )


def fetch_row():
    reach, push, pick, slide = (
        [100 * last(run, "eval/success_rate") for run in seeds(f"ppo_fetch/{name}", FIVE if name == "push" else PPO)]
        for name in ("reach_dense", "push", "pick_control", "slide")
    )
    assert set(reach) == {100.0}
    grasped = seeds("ppo_fetch/pick_grasped", FIVE)
    held, within = [100 * last(run, "eval/success_rate") for run in grasped], max(rows(r)[-1]["step"] for r in grasped)
    steps = {max(row["step"] for row in rows(run)) for run in seeds("ppo_fetch/reach_dense")}
    seconds = median(last(run, "time/train_s") for run in seeds("ppo_fetch/reach_dense"))
    ratios = {cells[1].strip(): [float(x) for x in cells[3].split("/")]
              for cells in (text.split("|") for text in peers()) if cells[3].strip()}  # fmt: skip
    settings = next(v for k, v in ratios.items() if "our observations" in k)
    defaults = next(v for k, v in ratios.items() if "at its defaults" in k)
    told = span(defaults, "{:.1f}") if len(defaults) == 3 else f"{each(defaults, 1)} (n {len(defaults)})"
    return (
        f"3 to 5 seeds each: FetchReach 100 % after {steps.pop():,} steps, {seconds:.0f} s of training on one busy core; "
        f"Push {span(push)} % within 1M steps; PickAndPlace {each(held, 0)} % within {within:,} where "
        f"a quarter of training begins with a grasp, {each(pick, 0)} % without; "
        f"Slide {span(slide)} % after 800,000; on FetchReach stable-baselines3 at its "
        f"defaults needs {told} times the steps, with our settings {span(settings, '{:.1f}')} times"
    )


def finetune_row():
    runs = seeds("gr00t_finetune/tiny", GR00T)
    hold, still = ([last(r, f"eval/mse_{k}") / last(r, "eval/mse") for r in runs] for k in ("hold_last", "mean_action"))
    newer = seeds("gr00t_finetune/tiny-n17", GR00T)
    newer = [[last(r, f"eval/mse_{k}") / last(r, "eval/mse") for r in newer] for k in ("hold_last", "mean_action")]
    push, pick = ([100 * closed(run, task) for run in runs] for task in ("FetchPush", "FetchPickAndPlace"))
    assert {closed(run, "FetchReach") for run in runs} == {1.0}
    minutes = span([last(run, "time/elapsed_s") / 60 for run in runs])
    return (
        "the losses, gradients and actions of N1.5 and of N1.7 to 1e-5; tiny model, 3 seeds on one busy core each, "
        f"{minutes} minutes: held-out action error {span(hold, '{:.1f}')} times below holding the last action's, "
        f"{span(still, '{:.1f}')} times "
        f"below the mean action's (N1.7: {span(newer[0], '{:.1f}')}, {span(newer[1], '{:.1f}')}); "
        f"acting, it succeeds on Reach 100 %, Push {span(push)} %, PickAndPlace {span(pick)} %; "
        f"another seed-42 run on 2 cores took {last('gr00t_finetune/tiny/two_threads', 'time/elapsed_s'):.0f} s"
    )


def flow_row():
    told = []
    for folder, label, steps in (
        ("reach", "FetchReach from a weak start of", "38,400"),
        ("push", "FetchPush from", "240,000"),
    ):
        runs = seeds(f"ppo_gr00t/{folder}")
        ends = ", ".join(f"{last(run, 'eval/success_rate'):.2f}" for run in runs)
        seconds = span([last(run, "time/train_s") for run in runs])
        start = mean(values(run, "baseline/success_rate")[0] for run in runs)
        told.append(f"{label} {start:.2f} to {ends} in {steps} steps, {seconds} s")
    return f"3 seeds on one core: {told[0]} of training; {told[1]}"


@pytest.mark.parametrize(
    "script, recomputed",
    [
        ("grpo_arithmetic", arithmetic_row),
        ("grpo_mixed", mixed_row),
        ("ppo_fetch", fetch_row),
        ("gr00t_finetune", finetune_row),
        ("ppo_gr00t", flow_row),
    ],
)
def test_a_result_in_the_readme_is_what_the_curves_say(script, recomputed):
    text = (ROOT / "README.md").read_text()
    (row,) = re.findall(rf"^\| `{script}\.py` \|.*$", text, re.M)
    assert row.split(" | ")[5] == recomputed()


# ---- healthy ranges --------------------------------------------------------------------------------------------------

FETCH = [run for folder in ("reach_dense", "push", "pick") for run in seeds(f"ppo_fetch/{folder}")]
FLOW = [run for folder in ("reach", "push") for run in seeds(f"ppo_gr00t/{folder}")]
DEFAULT = seeds("grpo_arithmetic", GRPO) + seeds("grpo_mixed", GRPO)
HEALTH = {
    "grpo_arithmetic": (DEFAULT, ["train/kl", "train/entropy", "train/grad_norm", "train/frac_reward_zero_std",
                                  "train/sampling_logp_difference/mean"]),
    "ppo_fetch": (FETCH, ["losses/approx_kl", "losses/clipfrac", "losses/grad_norm", "losses/explained_variance",
                          "losses/optimizer_steps", "losses/first_ratio_error", "charts/reward_scale"]),
    "ppo_gr00t": (FLOW, ["losses/approx_kl", "losses/clipfrac", "losses/grad_norm", "losses/explained_variance",
                         "losses/first_ratio_error"]),
    "gr00t_finetune": (seeds("gr00t_finetune/tiny", GR00T), ["time/waiting_for_data"]),
}  # fmt: skip


def healthy(page: str, metric: str) -> tuple[float, float]:
    """The widest range that a page's table of metrics names: "a to b", "below b", "above a", or one number."""
    section = (ROOT / "docs" / f"{page}.md").read_text().split("## 5. Metrics")[1].split("## 6.")[0]
    (cells,) = [text.split("|") for text in section.splitlines() if f"`{metric}`" in text.split("|")[1:2].__str__()]
    number = r"(-?\d[\d.]*(?:e-\d+)?)"
    ends = [tuple(sorted(map(float, pair))) for pair in re.findall(rf"{number} to {number}", cells[3])]
    ends += [(-np.inf, float(x)) for x in re.findall(rf"below {number}", cells[3])] if not ends else []
    ends += [(float(x), np.inf) for x in re.findall(rf"above {number}", cells[3])] if not ends else []
    ends += [(float(x), float(x)) for x in re.findall(rf"^ {number} $", cells[3])] if not ends else []
    return min(low for low, _ in ends), max(high for _, high in ends)


@pytest.mark.parametrize(
    "page, metric", [(page, metric) for page, (_, metrics) in HEALTH.items() for metric in metrics]
)
def test_the_documented_runs_are_healthy_by_their_own_tables(page, metric):
    """Nine values of ten of all runs lie in the range that the page calls healthy; the first step's KL is 0."""
    found = np.concatenate([values(run, metric) for run in HEALTH[page][0]])
    low, high = healthy(page, metric)
    assert np.quantile(found, 0.05) >= low and np.quantile(found, 0.95) <= high


def test_problems_whose_commuted_twin_was_trained_on_are_told_apart():
    problems = {p.prompt for p in grpo.load_problems(str(ROOT / "assets/arithmetic_eval.jsonl"))}
    trained = {p.prompt for p in grpo.draw_unique(stream(42, "problems"), grpo.Level(0, 20), 1000, problems)}
    found: dict[tuple[bool, int], list[float]] = {}
    for row in rows("gpu/h100_grpo_arithmetic", "evaluation.jsonl"):
        a, sign, b = row["prompt"].removeprefix("Calculate: ").split()[:3]
        twin = sign in "+*" and a != b and f"Calculate: {b} {sign} {a} = " in trained
        found.setdefault((twin, row["step"]), []).append(row["accuracy"])
    told = [f"{len(found[key])} {mean(found[key]):.3f}" for key in ((True, 0), (True, 744), (False, 0), (False, 744))]
    assert told == ["41 0.441", "41 0.898", "159 0.399", "159 0.767"]
    page = " ".join((ROOT / "docs/grpo_arithmetic.md").read_text().split())
    assert "the 41 with a twin went from 0.441 to 0.898, the 159 without from 0.399 to 0.767" in page
