"""Whole runs of grpo_arithmetic.py: what they log, resume, stop on, refuse, and that they learn."""

import copy
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags_of, two_forks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grpo_arithmetic as grpo
from common import streams
from common.cli import parse
from common.language import checks, lm, watch

SMALL = dict(
    batch_size=16, num_generations=4, n_samples=8, epochs=4, max_completion_length=5, eval_samples=2, eval_every=4,
    save_every=4, temperature=1.0, learning_rate=1e-3,
)  # fmt: skip  # 4 prompts a step, 2 steps an epoch, 8 steps


@pytest.fixture
def run(tmp_path, micro_model_folder, monkeypatch):
    """Runs main() in this process with SMALL settings; returns (exit code, run folder)."""

    def start(**flags):
        settings = {"model_name": micro_model_folder, "output_dir": str(tmp_path / "runs")}
        if "resume" not in flags:
            settings |= SMALL
        settings = {k: v for k, v in (settings | flags).items() if "resume" not in flags or k in flags}
        if "init_from" in flags and "model_name" not in flags:  # it says where the weights come from
            del settings["model_name"]
        argv = ["grpo_arithmetic.py"]
        for name, value in settings.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                argv += [flag, *map(str, value if isinstance(value, (tuple, list)) else [value])]
        monkeypatch.setattr(sys, "argv", argv)
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        try:
            with pytest.raises(SystemExit) as stop:
                grpo.main(parse(grpo.Args, grpo.__doc__))
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
        runs = sorted((tmp_path / "runs" / "grpo_arithmetic").glob("*"), key=lambda p: p.stat().st_mtime)
        return stop.value.code, runs[-1] if runs else None

    return start


def rows(run_dir: Path, name="metrics"):
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def timeless(run_dir: Path):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(run_dir)]


def weights(folder: Path):
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_logs_every_step_and_its_table_agrees_with_its_metrics(run, figures):
    code, folder = run(log_completions=16, rewards=("binary", "rich"), reward_weights=(1.0, 0.5))
    assert code == 0
    metrics = {row["step"]: row for row in rows(folder) if "train/reward" in row}
    assert sorted(metrics) == list(range(1, 9))
    table = rows(folder, "completions")
    assert len(table) == 8 * 16
    for step in range(1, 9):
        group = [row for row in table if row["step"] == step]
        for row in group:  # every reward belongs to its own prompt
            a, op, b = row["prompt"].removeprefix("Calculate: ").removesuffix(" = ").split()
            problem = grpo.make_problem(int(a), op, int(b))
            assert row["expected"] == problem.answer
            assert row["extracted_answer"] == grpo.extract_answer(row["completion"])
            assert row["is_correct"] == grpo.is_correct(row["completion"], problem)
            assert row["binary"] == grpo.REWARDS["binary"](row["completion"], problem)
            assert row["rich"] == pytest.approx(grpo.REWARDS["rich"](row["completion"], problem))
            assert row["reward"] == pytest.approx(row["binary"] + 0.5 * row["rich"])
        assert all(len({row["prompt"] for row in group[i : i + 4]}) == 1 for i in range(0, 16, 4))
        rewards = torch.tensor([row["reward"] for row in group])
        expected = grpo.group_advantages(rewards, 4).tolist()
        assert [row["advantage"] for row in group] == pytest.approx(expected, abs=1e-4)
        logged = metrics[step]
        assert logged["train/reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)
        assert logged["train/accuracy"] == pytest.approx((logged["train/rewards/binary/mean"] + 1) / 2, abs=1e-6)
        assert logged["train/sampling_logp_difference/max"] < 1e-4
        assert logged["train/clip_ratio/region_mean"] == 0
    assert metrics[1]["train/kl"] < 1e-9 < metrics[8]["train/kl"]
    first = rows(folder)[0]
    assert first["step"] == 0 and {"arithmetic_eval", "arithmetic_eval_low", "eval_hard_accuracy"} <= first.keys()
    assert (folder / "learning.png").stat().st_size > 5000 and (folder / "health.png").stat().st_size > 5000
    assert (folder / "report.html").stat().st_size > 50_000
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["learning_rate"] == 1e-3 and config["versions"]["torch"] == version("torch")
    assert (folder / "grpo_arithmetic.py").read_text() == (ROOT / "grpo_arithmetic.py").read_text()
    AutoModelForCausalLM.from_pretrained(folder / "best")


def test_the_ids_in_the_loss_are_the_ids_that_were_sampled(run, monkeypatch):
    sampled, trained = [], []
    generate, logprobs = grpo.generate, grpo.token_logprobs

    def spy_generate(*args, **kwargs):
        out = generate(*args, **kwargs)
        sampled.append((kwargs["num_generations"], out[0].clone(), out[1].clone()))
        return out

    def spy_logprobs(model, prompt_ids, lengths, ids, mask, **kwargs):
        trained.append((ids.clone(), mask.clone()))
        return logprobs(model, prompt_ids, lengths, ids, mask, **kwargs)

    monkeypatch.setattr(grpo, "generate", spy_generate)
    monkeypatch.setattr(grpo, "token_logprobs", spy_logprobs)
    run(epochs=1, eval_every=0, beta=0.0)
    rollouts = [(ids, mask) for G, ids, mask in sampled if G == 4 and len(ids) == 16]
    assert len(trained) == 2
    for (ids, mask), (ids_in_loss, mask_in_loss) in zip(rollouts, trained):
        assert torch.equal(ids, ids_in_loss) and torch.equal(mask, mask_in_loss)


def test_streams_of_a_run_and_of_its_neighbour_differ_but_for_those_of_the_evaluation(run, monkeypatch):
    drawn = {}
    derive = streams.stream_seed

    def spy(seed, name, *indices):
        drawn.setdefault(seed, {})[(name, *indices)] = derive(seed, name, *indices)
        return drawn[seed][(name, *indices)]

    monkeypatch.setattr(streams, "stream_seed", spy)
    monkeypatch.setattr(grpo, "stream_seed", spy)
    for seed in (42, 43):
        run(epochs=2, seed=seed)
        run(epochs=2, seed=seed, fresh=True)
    assert drawn.keys() == {0, 42, 43} and drawn[42].keys() == drawn[43].keys()
    assert {name for name, *_ in drawn[42]} == {"problems", "order", "fresh", "sampling"}
    assert {name for name, *_ in drawn[0]} >= {"evaluation", "validation", "validation problems", "training problems"}
    seeds = [value for found in drawn.values() for value in found.values()]
    assert len(set(value % 2**64 for value in seeds)) == len(seeds), "also as keys of the sampling noise"


def test_one_seed_gives_one_run_and_another_seed_another(run, monkeypatch):
    asked, head = set(), grpo.lm.head_logprobs

    def spy(model, hidden, targets, temper, entropy):
        asked.add((torch.is_grad_enabled(), entropy))
        return head(model, hidden, targets, temper, entropy)

    monkeypatch.setattr(grpo.lm, "head_logprobs", spy)
    first, second, other = (timeless(run(epochs=2, seed=seed)[1]) for seed in (1, 1, 2))
    assert first == second != other
    assert asked == {(True, True), (False, False)}, "entropies of the policy; nobody reads the reference's"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fresh": True, "num_iterations": 2, "micro_batch_size": 8},
        {"warmup_ratio": 0.5, "low_memory_reference": True, "rewards": ("rich", "length")},
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(run, options, tmp_path):
    code, whole = run(keep=10, **options)
    broken = tmp_path / "runs" / "grpo_arithmetic" / "broken"
    shutil.copytree(whole, broken, symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "step-000000008")
    (broken / "metrics.jsonl").open("a").write('{"step": 9, "torn')  # what a kill leaves behind
    assert run(resume=broken)[0] == 0
    assert timeless(broken) == timeless(whole)
    assert (broken / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
    for name in ("model.safetensors", "trainer/trainer.safetensors"):
        a, b = (load_file(folder / "checkpoints" / "step-000000008" / name) for folder in (broken, whole))
        assert same(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"share_prompt": False},
        {"micro_batch_size": 2},
        {"micro_batch_size": 8},
        {"low_memory_reference": True},
        {"gradient_checkpointing": True},
        {"attn_implementation": "sdpa"},
        {"compile": True},
    ],
)
def test_options_that_change_memory_or_speed_do_not_change_the_run(run, options, monkeypatch):
    compiler = torch.compile  # traced, but not translated to C++, which takes half a minute
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiler(f, **kw | {"backend": "aot_eager"}))
    base, other = (timeless(run(epochs=1, **o)[1]) for o in ({}, options))
    assert len(base) == len(other)
    for a, b in zip(base, other):
        assert a.keys() == b.keys()
        for key in a:
            loose = 2e-3 if "sampling_logp" not in key else 1e-4
            assert a[key] == pytest.approx(b[key], abs=loose, rel=loose), key


def test_two_processes_each_the_first_of_its_machine_equal_one(run, monkeypatch):
    """What torchrun tells the processes of two machines; benchmarks/nodes.sh starts it for every script."""
    flags = dict(epochs=2, log_completions=8)  # the rows of the first process
    _, single = run(**flags)
    main = grpo.main

    def apart(args):
        os.environ["LOCAL_RANK"] = "0"
        main(args)

    monkeypatch.setattr(grpo, "main", lambda args: sys.exit(max(two_forks(lambda: apart(args)))))
    code, double = run(**flags)
    assert code == 0
    for a, b in zip(timeless(single), timeless(double), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-3, rel=1e-3), (a["step"], key)
    for a, b in zip(rows(single, "completions"), rows(double, "completions"), strict=True):
        assert a["prompt"] == b["prompt"] and a["completion"] == b["completion"]


def test_what_bfloat16_autocast_leaves_in_float32_is_exact(run):
    """The device is set up with TF32 products, in which rotary angles of far positions would be off by 0.1 rad."""
    torch.set_float32_matmul_precision("high")
    try:
        assert run(epochs=1, eval_samples=1, dtype="bfloat16")[0] == 0
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_decode_steps_without_a_graph_are_counted_and_give_the_same_run(run, capsys):
    folders = {decode: run(epochs=1, decode=decode)[1] for decode in ("eager", "graph")}
    assert "no CUDA graphs on a CPU" in capsys.readouterr().out
    eager, graph = ([row for row in rows(folder) if "train/reward" in row] for folder in folders.values())
    assert [row["time/decode_fallbacks"] for row in eager] == [0, 0]
    assert 0 < graph[0]["time/decode_fallbacks"] < graph[1]["time/decode_fallbacks"]
    for a, b in zip(eager, graph):
        for key in a.keys() - {key for key in a if key.startswith("time/") or "sampling_logp" in key}:
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), key


def test_two_processes_that_share_one_model_equal_one_and_resume(run, monkeypatch):
    """FSDP: one process's numbers up to rounding; whole, ordinary checkpoints, continued bit for bit."""
    flags = dict(micro_batch_size=4, num_iterations=2, gradient_checkpointing=True, max_grad_norm=1e-2, keep=10)
    flags |= dict(rewards=("rich",))  # by distance: groups have spread, so there is a gradient to compare and to clip
    _, single = run(**flags)
    assert all(row["train/grad_norm"] > 1e-2 for row in rows(single) if "train/reward" in row)
    main = grpo.main
    monkeypatch.setattr(grpo, "main", lambda args: sys.exit(max(two_forks(lambda: main(args)))))
    code, sharded = run(**flags, fsdp=True)
    assert code == 0
    for a, b in zip(timeless(single), timeless(sharded), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), (a["step"], key)
    for name in ("model.safetensors", "trainer/trainer.safetensors"):
        one, two = (load_file(folder / "last" / name) for folder in (single, sharded))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key], two[key], atol=1e-5, rtol=1e-3) for key in one.keys() - {"rng.torch"})
    assert not same(weights(sharded / "checkpoints/step-000000004"), weights(sharded / "last"))
    config = json.loads((sharded / "last" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    AutoModelForCausalLM.from_pretrained(sharded / "last")

    cut = sharded.with_name("cut")
    shutil.copytree(sharded, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints/step-000000008")
    assert run(resume=cut)[0] == 0
    assert timeless(cut) == timeless(sharded) and same(weights(cut / "last"), weights(sharded / "last"))


def test_a_loss_that_is_not_finite_skips_the_step_and_keeps_the_weights(run, monkeypatch):
    loss_function, calls = grpo.grpo_loss, []

    def broken(*args, **kwargs):
        loss, metrics = loss_function(*args, **kwargs)
        calls.append(None)
        return (loss * float("nan") if len(calls) == 2 else loss), metrics

    monkeypatch.setattr(grpo, "grpo_loss", broken)
    _, folder = run(epochs=2, save_every=1, keep=10)
    skipped = [row["train/skipped_steps"] for row in rows(folder) if "train/reward" in row]
    assert skipped == [0, 1, 1, 1]
    at = [weights(folder / "checkpoints" / f"step-00000000{i}") for i in range(1, 5)]
    assert same(at[0], at[1]) and not same(at[1], at[2])


def test_completions_without_a_reward_are_left_out_and_the_step_goes_on(run, monkeypatch, capsys):
    """One NaN used to discard the whole step, and None ended in a traceback."""

    def picky(text, problem):
        return {0: None, 1: math.nan, 2: math.inf}.get(len(text) % 5, float(sum(map(ord, text)) % 7))

    monkeypatch.setitem(grpo.REWARDS, "picky", picky)
    _, folder = run(rewards=("binary", "picky"), epochs=1, log_completions=10**6)
    table, logged = rows(folder, "completions"), [row for row in rows(folder) if "train/reward" in row]
    for row in logged:
        mine = [r for r in table if r["step"] == row["step"]]
        missing = [r for r in mine if len(r["completion"]) % 5 < 3]
        assert row["train/rewards/picky/missing"] == len(missing) > 0 == row["train/rewards/binary/missing"]
        assert all(r["reward"] is r["picky"] is None and r["advantage"] == 0 for r in missing)
        there = [r["reward"] for r in mine if r not in missing]
        assert row["train/reward"] == pytest.approx(np.mean(there)) and any(r["advantage"] for r in mine)
        assert row["train/skipped"] == 0 and np.isfinite(row["train/grad_norm"])
    assert "reward 'picky' gave no finite number" in capsys.readouterr().out


def test_every_length_that_can_be_asked_is_checked_before_the_model_is_loaded(run, monkeypatch, capsys):
    """A tokenizer may take any number of tokens for a number: each operand is asked for, and the validation too."""
    asked = []
    monkeypatch.setattr(
        checks, "context", lambda args, config, tokenizer, prompts: asked.extend(prompts) or sys.exit(9)
    )
    monkeypatch.setattr(lm, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert run(min_num=-7, max_num=30, operations="+/")[0] == 9
    assert {f"Calculate: {a} + {a} = " for a in range(-7, 31)} <= set(asked)
    assert {p.prompt for p in grpo.draw_bands(streams.stream(0, "validation problems"))} <= set(asked)
    assert {p.prompt for p in grpo.load_problems(grpo.Args().eval_dataset)} <= set(asked)


def test_the_longest_prompt_and_its_completion_just_fit(run, monkeypatch, capsys):
    monkeypatch.setattr(lm, "load_model", lambda *_: sys.exit(9))
    longest = len("Calculate: 12345678 + 12345678 = ")  # a character is a token of the micro model, its context 128
    flags = dict(min_num=-3, max_num=12345678)
    assert run(max_completion_length=128 - longest, **flags)[0] == 9
    assert run(max_completion_length=129 - longest, **flags)[0] == 2
    assert f"at most {128 - longest} new tokens fit" in capsys.readouterr().err


def test_a_prompt_without_tokens_is_refused(capsys):
    class Tokenizer:
        def __call__(self, texts, add_special_tokens=True):
            return SimpleNamespace(input_ids=[[1] * len(text.strip("\u200b")) for text in texts])

    with pytest.raises(SystemExit):
        checks.context(grpo.Args(), SimpleNamespace(), Tokenizer(), ["1 + 1", "\u200b"])
    assert "has no tokens" in capsys.readouterr().err


def test_a_batch_with_every_completion_truncated_is_left_out_if_asked(run, monkeypatch, micro_model_folder):
    monkeypatch.setattr(lm, "stop_token_ids", lambda *_: [263])  # beyond the tokenizer: never sampled
    _, folder = run(epochs=1, mask_truncated_completions=True)
    assert all(r["train/completions/clipped_ratio"] == 1 for r in rows(folder) if "train/reward" in r)
    assert rows(folder)[-1]["step"] == 2 and same(weights(folder / "last"), weights(Path(micro_model_folder)))
    _, folder = run(epochs=1)
    assert not same(weights(folder / "last"), weights(Path(micro_model_folder)))


def test_early_stopping_stops_and_best_points_at_the_best(run):
    _, folder = run(learning_rate=0.0, eval_every=1, early_stopping_patience=2, epochs=4)
    assert rows(folder)[-1]["step"] == 3  # best at 1, no gain at 2 and 3
    assert (folder / "best").resolve().name == "step-000000001"
    assert (folder / "last").resolve().name == "step-000000003"


def test_the_best_checkpoint_has_the_best_validation_accuracy(run, monkeypatch):
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.4])  # before training, then after every second step
    sample_answers = grpo.sample_answers

    def scripted(*args):
        correct, texts = sample_answers(*args)
        return (correct * 0 + next(scores), texts) if args[-1] == "validation" else (correct, texts)

    monkeypatch.setattr(grpo, "sample_answers", scripted)
    _, folder = run(eval_every=2, save_every=0, keep=1)
    assert (folder / "best").resolve().name == "step-000000004"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step-000000004", "step-000000008"}


def test_fresh_problems_are_new_at_every_step_and_counted_as_seen(run):
    _, folder = run(fresh=True, eval_every=2, max_num=5, exclude_eval=False)
    table = rows(folder, "completions")
    prompts = [frozenset(r["prompt"] for r in table if r["step"] == step) for step in range(1, 9)]
    assert len(set(prompts)) == 8
    unseen = [row["arithmetic_eval_unseen_n"] for row in rows(folder) if "arithmetic_eval_unseen_n" in row]
    assert unseen[0] == 200 and unseen[-1] < 200


def test_init_from_starts_a_new_run_at_the_best_weights(run):
    _, first = run()
    _, second = run(init_from=first, learning_rate=0.0, epochs=1)
    assert second != first and same(weights(second / "last"), weights(first / "best"))


def test_eval_only_measures_what_the_run_measured_before_training(run):
    _, trained = run(epochs=1)
    code, measured = run(eval_only=True)
    a, b = timeless(trained)[0], timeless(measured)[0]
    assert code == 0 and all(a[k] == b[k] for k in b if "unseen" not in k)
    assert len(rows(measured, "evaluation")) == 200


BAD = [
    (dict(batch_size=250, num_generations=16), "--batch-size 240"),
    (dict(batch_size=512, num_generations=4, n_samples=50), "lower --batch-size to 200"),
    (dict(n_samples=400, max_num=10), "--no-exclude-eval"),
    (dict(n_samples=400, max_num=10, exclude_eval=False), "only 363 different problems"),
    (dict(num_generations=1), "at least 2"),
    (dict(temperature=0.0), "temperature 0"),
    (dict(max_completion_length=200), "context of 128"),
    (dict(model_name="no/such-model"), "bundled model"),
    (dict(dataset_type="mixed"), "arithmetic"),
    (dict(eval_dataset="no/such-data"), "neither a file nor a data set"),
    (dict(eval_dataset="missing.jsonl"), "cannot be read"),
    (dict(rewards=("binry",)), "known: binary"),
    (dict(rewards=("binary", "length"), reward_weights=(1.0,)), "give one each"),
    (dict(operations="+x"), "any of + - * /"),
    (dict(min_num=5, max_num=3), "above"),
    (dict(micro_batch_size=3), "must divide"),
    (dict(curriculum="dynamic"), "curriculum"),
    (dict(attn_implementation="flash_attention_2"), "needs a GPU and bfloat16"),
    (dict(device="cuda"), "no CUDA device"),
    (dict(fsdp=True), "uv run torchrun"),
    (dict(fsdp=True, compile=True), "neither --compile"),
    (dict(fsdp=True, low_memory_reference=True), "sharded anyway"),
    (dict(decode="fast"), "fast"),
    (dict(resume="no/such/run"), "does not exist"),
    (dict(resume=".", beta=0.5), "drop --beta"),
    (dict(init_from="no/such/run"), "does not exist"),
    (dict(init_from=".", model_name=lm.TINY_MODEL + "/."), "leave out --model-name"),
    (dict(rewards=("binary", "length", "binary")), "each once"),
    (dict(rewards=("binary", "length"), reward_weights=(0.0, 0.0)), "no completion would be better"),
    (dict(reward_weights=("nan",)), "--reward-weights[0] nan"),
    (dict(beta=0.0, low_memory_reference=True), "nothing to keep"),
    (dict(early_stopping_patience=2, eval_every=0), "counts evaluations"),
    (dict(max_num=10**18), "at most 9 digits"),
    (dict(min_num=-(2**70)), "at most 9 digits"),
    (dict(n_samples=10**8, max_num=10**6), "--fresh"),
    (dict(operations="/", max_num=0), "divided by 0"),
    (dict(learning_rate="fast"), "fast"),
    (dict(no_such_flag=1), "no-such-flag"),
]


@pytest.mark.parametrize("flags, words", BAD, ids=[" ".join(f"{k}={v}" for k, v in flags.items()) for flags, _ in BAD])
def test_wrong_input_ends_in_one_helpful_line_and_exit_code_2(run, capfd, flags, words):
    if "device" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code, folder = run(**flags)
    out, err = capfd.readouterr()
    assert code == 2 and folder is None
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not out


@pytest.mark.parametrize(
    "content, words",
    [
        ("not json", "cannot be read"),
        ("", "holds no problems"),
        ('{"question": "1 + 1", "answer": "2"}\n', "row 1: prompt: is missing"),
        ("[1, 2]\n", "one JSON object a line"),
    ],
)
def test_unreadable_evaluation_files_are_refused(run, tmp_path, capfd, content, words):
    path = tmp_path / "eval.jsonl"
    path.write_text(content)
    assert run(eval_dataset=path)[0] == 2
    assert words in capfd.readouterr().err


def test_damaged_and_foreign_checkpoints_are_refused(run, capfd):
    _, folder = run(epochs=1)
    step = (folder / "last").resolve()
    good = copy.copy((step / "trainer.json").read_text())

    def refused(words):
        capfd.readouterr()
        assert run(resume=folder)[0] == 2
        err = capfd.readouterr().err
        assert words in err and len([line for line in err.splitlines() if line.startswith("error:")]) == 1, err

    (step / "trainer.json").write_text(good.replace('"grpo_arithmetic"', '"ppo_fetch"'))
    refused("belongs to ppo_fetch")
    (step / "trainer.json").write_text(good[: len(good) // 2])
    refused("cannot be read")
    (step / "trainer.json").write_text(good)
    moments = (step / "trainer" / "trainer.safetensors").read_bytes()
    (step / "trainer" / "trainer.safetensors").write_bytes(b"garbage")
    refused("cannot be read")
    (step / "trainer" / "trainer.safetensors").write_bytes(moments)
    (step / "model.safetensors").write_bytes(b"garbage")
    refused("cannot be loaded")
    (folder / "config.json").write_text("{}")
    refused("this is no run folder")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_a_resumable_run_and_a_finished_wandb_run(run, tmp_path, micro_model_folder, number):
    """Ctrl-C ends a program of its own, as users start it; SIGTERM a fork of this one, which imports nothing anew."""
    flags = SMALL | dict(epochs=5000, save_every=0, eval_every=0, track=True)

    def start():
        os.setsid()
        with open(tmp_path / "said", "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if number == signal.SIGINT:
            words = flags_of(model_name=micro_model_folder, output_dir=tmp_path / "runs", **flags)
            os.execv(sys.executable, [sys.executable, str(ROOT / "grpo_arithmetic.py"), *words])
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        sys.exit(run(**flags)[0])

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    try:
        deadline = time.time() + 120
        while not any(path.read_text().count("\n") > 5 for path in tmp_path.glob("runs/*/*/metrics.jsonl")):
            assert time.time() < deadline and process.is_alive(), (tmp_path / "said").read_text()
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.join(60)
    finally:
        process.kill()
    output = (tmp_path / "said").read_text()
    assert process.exitcode == 128 + number, output
    assert "continue with:" in output
    (folder,) = tmp_path.glob("runs/*/*")
    (wandb_log,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert wandb_exit_code(wandb_log) == 128 + number, "the wandb run was closed, with the exit code"
    step = json.loads((folder / "last" / "trainer.json").read_text())["step"]
    config = json.loads((folder / "config.json").read_text())
    config["args"] |= {"epochs": step // 2 + 2, "track": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert run(resume=folder)[0] == 0
    steps = [row["step"] for row in rows(folder) if "train/reward" in row]
    assert steps == list(range(1, (step // 2 + 2) * 2 + 1)), "every step once"


def wandb_exit_code(path: Path):
    """Reads wandb's transaction log: a 7-byte header, then LevelDB log blocks of 32 KB holding protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, code = path.read_bytes(), 7, b"", None
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:  # too short for a record header: padding
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record, parts = Record.FromString(parts), b""
            code = record.exit.exit_code if record.WhichOneof("record_type") == "exit" else code
    return code


def test_alarms_say_what_is_wrong():
    healthy = {
        "train/frac_reward_zero_std": 0.2, "train/reward": 0.1, "train/kl": 0.05, "train/skipped": 0,
        "train/completions/clipped_ratio": 0.1, "train/entropy": 0.5,
    }  # fmt: skip
    assert watch.alarms(healthy) == {}
    for key, value, words in [
        ("train/frac_reward_zero_std", 1.0, "same reward"),
        ("train/kl", 30.0, "leaving its language"),
        ("train/completions/clipped_ratio", 1.0, "max-completion-length"),
        ("train/skipped", 1, "not finite"),
        ("train/entropy", 0.001, "deterministic"),
    ]:
        (text,) = watch.alarms(healthy | {key: value}).values()
        assert words in text


def test_the_bundled_model_learns(run):
    """Forty small steps lift the reward on fixed problems far above the noise of a batch."""
    _, folder = run(
        model_name=lm.TINY_MODEL, batch_size=64, num_generations=16, n_samples=4, epochs=40, learning_rate=3e-4,
        eval_every=0, eval_samples=1, max_completion_length=16, temperature=0.7,
    )  # fmt: skip
    rewards = [row["train/reward"] for row in rows(folder) if "train/reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.4


def test_the_metrics_table_of_the_docs_is_what_a_run_logs(run):
    _, folder = run(eval_samples=16, epochs=2)
    logged = {key for row in rows(folder) for key in row} - {"step"}
    logged = {key for key in logged if not key.endswith(("_low", "_high", "_n"))}
    logged = {key.replace("rewards/binary", "rewards/<name>") for key in logged}
    from test_docs import documented_metrics  # which imports every script: not where only this one's packages are

    documented = documented_metrics("grpo_arithmetic.md")
    assert logged == {name for name in documented if not name.startswith("<metric>")}
