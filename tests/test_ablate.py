"""benchmarks/ablate.py: grids fit the scripts, nothing trains on what is measured, a kill costs one row at most."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from conftest import ROOT

import grpo_arithmetic
import grpo_mixed
from common.cli import parse

spec = importlib.util.spec_from_file_location("ablate", ROOT / "benchmarks" / "ablate.py")
ablate = importlib.util.module_from_spec(spec)
sys.modules["ablate"] = ablate  # dataclasses look their module up
spec.loader.exec_module(ablate)
SCRIPTS = {"grpo_arithmetic.py": grpo_arithmetic, "grpo_mixed.py": grpo_mixed}


@pytest.mark.parametrize("grid", ablate.GRIDS)
def test_every_setting_is_a_command_line_and_edits_that_the_script_takes(grid, monkeypatch):
    settings = ablate.GRIDS[grid][1]
    assert len({s.name for s in settings}) == len(settings) == len({ablate.key_of(s, 1) for s in settings})
    for setting in settings:
        monkeypatch.setattr(sys, "argv", [setting.script, *ablate.words_of(setting, 1)])
        args = parse(SCRIPTS[setting.script].Args, "")
        P = args.batch_size // args.num_generations
        assert args.seed == 1 and args.n_samples >= P
        compile(ablate.edited(setting.script, setting.edits), setting.script, "exec")


def test_settings_of_a_grid_take_equally_many_steps_of_equally_many_completions():
    for grid, (_, settings) in ablate.GRIDS.items():
        if grid == "sft":  # whose point is a longer run
            continue
        flags = [ablate.BASE | s.flags for s in settings]
        steps = [f["epochs"] * (f["n_samples"] // (f["batch_size"] // f["num_generations"])) for f in flags]
        assert max(steps) == min(steps) and len({f["batch_size"] for f in flags}) == 1, (grid, steps)


def test_an_edit_that_does_not_find_its_place_stops_everything():
    with pytest.raises(SystemExit, match="0 times"):
        ablate.edited("grpo_arithmetic.py", (("no such line", ""),))


def test_the_validation_set_is_apart_from_the_evaluation_and_kept_out_of_training(tmp_path):
    validation = ablate.draw_validation()
    standard = grpo_arithmetic.load_problems(str(ablate.EVAL_FILE))
    prompts = {p.prompt for p in validation}
    assert len(prompts) == len(validation) == 170 and not prompts & {p.prompt for p in standard}
    assert validation == ablate.draw_validation()
    assert ablate.write_problems(tmp_path / "problems.jsonl") == prompts
    everything = {p.prompt for p in grpo_arithmetic.load_problems(str(tmp_path / "problems.jsonl"))}
    assert everything == prompts | {p.prompt for p in standard}  # what --eval-dataset holds is excluded from training
    level = grpo_arithmetic.Level(0, 20)
    drawn = grpo_arithmetic.draw_unique(np.random.default_rng(0), level, 900, everything)
    assert not {p.prompt for p in drawn} & everything


def test_half_a_row_from_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "grid.jsonl"
    ablate.append_row(path, {"key": "a"})
    path.write_text(path.read_text() + '{"key": "b", "cur')
    ablate.append_row(path, {"key": "c"})
    assert [row["key"] for row in ablate.read_rows(path)] == ["a", "c"]


def test_a_run_is_the_same_run_in_whatever_grid_it_appears():
    first = {grid: ablate.key_of(settings[0], 2) for grid, (_, settings) in ablate.GRIDS.items()}
    same = ("beta", "generations", "loss_type", "scale_rewards", "temperature", "reward_shape", "num_iterations", "sft")
    assert len({first[grid] for grid in same}) == 1
    assert ablate.key_of(ablate.GRIDS["beta"][1][0], 3) != first["beta"]


def test_the_tables_and_the_claims_are_what_the_curves_say():
    readme, claims = ablate.pages(list(ablate.GRIDS))
    assert (ablate.RESULTS / "README.md").read_text() == readme
    assert ablate.CLAIMS.read_text() == claims


def test_no_run_is_kept_twice():
    keys = [row["key"] for path in ablate.RESULTS.glob("*.jsonl") for row in ablate.read_rows(path)]
    assert len(keys) == len(set(keys))


def test_p_values_are_student_ts_and_holm_stops_at_the_first_that_fails():
    quantiles = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 10: 2.2281}
    assert [ablate.student_p(t, df) for df, t in quantiles.items()] == pytest.approx([0.05] * 6, abs=1e-5)
    assert ablate.holm([("g", "a", 0.01), ("g", "b", 0.03), ("g", "c", 0.04)]) == {("g", "a")}


def test_intervals_are_student_ts():
    assert ablate.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 * 1.0 / 3**0.5)
    assert np.isnan(ablate.interval([1.0]))


def test_the_committed_rows_say_what_they_are():
    for path in ablate.RESULTS.glob("*.jsonl"):
        for row in ablate.read_rows(path):
            assert "-dirty" not in row["commit"] and "/tmp/" not in json.dumps(row) and str(ROOT) not in json.dumps(row)
            last = row["evaluations"][-1]
            assert last["validation_n"] == 170 and last["eval_n"] == 200 and last["step"] == len(row["curve"]["step"])
            assert 0 <= last["validation_k"] <= 170 and row["command"].startswith("python grpo_")
