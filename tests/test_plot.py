"""Figures: what is drawn of which metric, where a median is, and that it tells the truth between points."""

import json

import numpy as np
import pytest

from common import plot
from common.plot import language, robot


@pytest.fixture
def axes(monkeypatch, tmp_path, figures):
    """figure(...) for runs given as rows; its axes."""
    import matplotlib.pyplot as plt

    found = []
    monkeypatch.setattr(plt, "close", found.append)

    def drawn(runs, panels, units=(), step="step"):
        folders = []
        for i, rows in enumerate(runs):
            folders.append(tmp_path / str(i))
            folders[-1].mkdir(exist_ok=True)
            (folders[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plot.figure(folders, panels, tmp_path / "figure.png", "", dict(units), step)
        return found[-1].axes

    return drawn


def colour_of(ax, label):
    return dict(zip(ax.get_legend_handles_labels()[1], [line.get_color() for line in ax.get_legend().get_lines()]))[
        label
    ]


def test_a_caption_names_every_seed_and_every_commit_once(tmp_path):
    for seed, commit in ((1, "aaa"), (2, "aaa"), (3, "bbb")):
        facts = {"args": {"seed": seed}, "command": f"x.py --seed {seed} --beta 0.1", "git": commit}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "config.json").write_text(json.dumps(facts | {"device": "cpu", "threads": 2}))
    caption = plot.caption_of([tmp_path / str(seed) for seed in (1, 2, 3)])
    assert caption == "x.py --beta 0.1 | commit aaa, bbb | cpu, 2 threads | seeds 1, 2, 3"


def test_a_median_is_where_all_runs_are_and_shows_no_outcome_that_no_run_had():
    up, low = (np.array([0.0, 1, 2]), np.array([0.0, 1, 1])), (np.array([0.0, 1, 2, 3]), np.array([0.0, 0.5, 0.5, 0.5]))
    xs, ys = plot.median([up, up, low])
    assert xs.tolist() == [0, 1, 2] and ys.tolist() == [0, 1, 1]


def test_between_points_a_median_on_a_log_axis_is_the_straight_line_that_is_drawn():
    a, b = (np.array([0.0, 2]), np.array([1.0, 0.01])), (np.array([0.0, 1, 2]), np.array([1.0, 0.1, 0.01]))
    assert plot.median([a, b], log=True)[1] == pytest.approx([1, 0.1, 0.01])


def test_a_metric_that_never_was_a_number_is_drawn_as_nothing(axes):
    """A bin of times that a short run never drew."""
    (ax,) = axes(
        [[{"step": 1, "loss": 1.0, "bin": None}, {"step": 2, "loss": 0.5}]], [("loss", "step", ["loss", "bin"])]
    )
    assert ax.get_legend_handles_labels()[1] == ["loss", "bin"] and [len(line.get_xdata()) for line in ax.lines][
        :1
    ] == [2]


def test_seconds_below_one_are_no_millions_and_steps_are_thousands(axes):
    (ax,) = axes([[{"step": x, "loss": 1.0} for x in (0, 20_000)]], [("loss", "step", ["loss"])])
    assert ax.xaxis.get_major_formatter().format_ticks([0.5, 10_000]) == ["0.5", "10k"]


def test_a_task_of_a_users_own_is_drawn_and_keeps_its_colour_in_all_panels(axes):
    rows = [
        {"step": i, "eval_reverse_accuracy": 0.1 * i, "eval_reverse_greedy": 0.5, "train/reverse/solve_rate": 0.1 * i,
         "eval_arithmetic_accuracy": 0.2, "eval_arithmetic_greedy": 0.2, "eval_easy_accuracy": 0.3}
        for i in range(4)
    ]  # fmt: skip
    held_out, solved = axes([rows], language.FIGURES["grpo_mixed"]["learning"])[:2]
    labels = held_out.get_legend_handles_labels()[1]
    assert labels == ["eval_arithmetic_accuracy", "eval_reverse_accuracy"]  # bands and operations are no tasks
    assert colour_of(held_out, labels[1]) == colour_of(solved, "reverse/solve_rate") != colour_of(held_out, labels[0])


def test_every_panel_has_its_units_and_no_reward_stands_on_an_axis_of_accuracies():
    for room in (language, robot):
        for figures in room.FIGURES.values():
            for title, _, metrics in (panel for panels in figures.values() for panel in panels):
                labels = {plot.unit_of(metric, room.UNITS) for metric in metrics}
                assert len(labels) == 1 and labels != {""}, (title, labels)


def test_an_evaluation_shows_its_interval_as_a_band_of_one_run_and_as_whiskers_of_several(axes):
    rows = [
        {"step": i, "eval/success_rate": 1.0, "eval/success_rate_low": 0.9, "eval/success_rate_high": 0.99999}
        for i in (0, 1)
    ]
    panel = [("success", "step", ["eval/success_rate"])]
    assert len(axes([rows], panel)[0].collections) == 1
    assert len(axes([rows, rows], panel)[0].containers) == 2


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kl, scale", [([0.0, 0.0], "linear"), ([0.0, 1e-3], "log")])
def test_zeros_alone_are_drawn_on_a_linear_axis_without_a_warning(axes, kl, scale):
    (ax,) = axes(
        [[{"step": i, "train/kl": value} for i, value in enumerate(kl)]], [("KL, log scale", "step", ["train/kl"])]
    )
    assert ax.get_yscale() == scale
