"""Gives the five scripts wrong inputs; each should end in one line, with exit code 2, before anything has happened.

    uv run python benchmarks/wrong_inputs.py                                       # all of them, one core
    uv run python benchmarks/wrong_inputs.py --script ppo_fetch --kind bounds
    uv run python benchmarks/wrong_inputs.py --every 20

Kind "bounds" is generated from the types of the scripts' flags: for each, values below and above its bounds, NaN,
infinity, a word, an empty string, too few and too many of a pair. All others stand in wrong_flags.py and broken_files.py.

An input is refused well if stderr is exactly one line that begins with "error: ", the exit code is 2, no model was
built or read (unless only its weights can tell), no file was made, changed or removed, and it took less than 20 s.
Prints the inputs that are not, a table, and exits with 1 if more than 1 % of the generated or of the others are not.
"""

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_type_hints

import pydantic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import short_runs
from benchmarks.broken_files import folder_cases
from benchmarks.short_runs import SCRIPTS, forked, run_main
from benchmarks.wrong_flags import Case, flag_cases
from common.cli import flag, parse

SECONDS, LOADED = 20, 97  # at most for a case; exit code of one that would read a model

# ---- values beyond the declared bounds -------------------------------------------------------------------------------


def wrong_values(schema: dict) -> list[str]:
    """What a flag with this JSON schema must refuse."""
    if "anyOf" in schema:  # an optional value
        return wrong_values(next(option for option in schema["anyOf"] if option.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return ["no-such-choice", "", str(schema.get("enum", [schema.get("const")])[0]).upper()]
    kind, found = schema.get("type"), []
    if kind in ("integer", "number"):
        whole = kind == "integer"
        if "minimum" in schema:
            found += [str(schema["minimum"] - (1 if whole else 0.5)), "-1000000"]
        if "exclusiveMinimum" in schema:
            found += [str(schema["exclusiveMinimum"]), "-1e-9", "-1000000"]
        if "maximum" in schema:
            found += [str(schema["maximum"] + (1 if whole else 0.5))]
        if "exclusiveMaximum" in schema:
            found += [str(schema["exclusiveMaximum"])]
        found += ["nan", "inf", "-inf", "word", "", *(["1.5", "1e3"] if whole else ["1e400"])]
    if kind == "string":
        found += [""] if schema.get("minLength") or "pattern" in schema else []
        found += ["a/b", "a b\n", "../x"] if "pattern" in schema else []
        found += ["x" * (schema["maxLength"] + 1)] if "maxLength" in schema else []
    return found


def bounds_cases() -> Iterator[Case]:
    for script in SCRIPTS:
        config = importlib.import_module(script).Args
        for name, hint in get_type_hints(config, include_extras=True).items():
            schema = pydantic.TypeAdapter(hint).json_schema()
            schema = next((o for o in schema.get("anyOf", []) if o.get("type") == "array"), schema)
            if schema.get("type") == "boolean":
                yield Case(script, "bounds", [f"{flag(name)}=maybe"])
            elif schema.get("type") != "array":
                yield from (Case(script, "bounds", [f"{flag(name)}={value}"]) for value in wrong_values(schema))
            elif "prefixItems" in schema:  # so many values, no more and no fewer
                good = [str(x) for x in getattr(config(), name) or ["0.5"] * len(schema["prefixItems"])]
                yield Case(script, "bounds", [flag(name), *good[1:]])
                yield Case(script, "bounds", [flag(name), *good, good[0]])
                for place, item in enumerate(schema["prefixItems"]):
                    for value in wrong_values(item):
                        yield Case(script, "bounds", [flag(name), *good[:place], value, *good[place + 1 :]])
            else:
                yield from (Case(script, "bounds", [flag(name), value]) for value in wrong_values(schema["items"]))


# ---- one case --------------------------------------------------------------------------------------------------------


def make_runs(stock: Path, flags: dict[str, list[str]]) -> None:
    """An unfinished run of each script: stock/<script>."""
    from common.run import Run

    def cut_short(script: str) -> None:
        end_step = Run.end_step

        def last(run, step, *args, **kwargs):
            end_step(run, step, *args, **kwargs)
            if step == 3:
                os._exit(0)

        Run.end_step = last
        run_main(script, [*flags[script], "--output-dir", str(stock / "unfinished")])

    for script in SCRIPTS:
        outcome = forked(partial(cut_short, script))
        (run,) = (stock / "unfinished" / script).iterdir()
        run.rename(stock / script)
        assert (stock / script / "last").exists(), f"{script} has no checkpoint: {outcome.err}"


def attempt(case: Case, flags: dict[str, list[str]]) -> None:
    """Runs the script, in a fork; where it would build or read a model, the fork ends."""
    import torch
    from transformers import AutoModelForCausalLM

    import ppo_fetch
    from common.robot.gr00t import Network

    def guard(owner, name: str, counting: bool = False) -> None:
        build = getattr(owner, name)

        def loading(*args, **kwargs):
            if counting and torch.get_default_device().type == "meta":  # without memory for its weights
                return build(*args, **kwargs)
            os._exit(LOADED)

        setattr(owner, name, loading)

    if not case.loads:
        guard(AutoModelForCausalLM, "from_pretrained")
        guard(Network, "from_pretrained")
        guard(Network, "__init__", counting=True)
        guard(ppo_fetch.Agent, "__init__")
    run_main(case.script, case.words if case.alone else [*flags[case.script], *case.words])


def tree(folder: Path) -> dict[str, tuple | None]:
    """Every folder, and every file with its size and time."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = None if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    # who continues a run locks it
    return {name: value for name, value in found.items() if not name.endswith("/.lock")}


def verdict(case: Case, stock: Path, flags: dict[str, list[str]], here: Path) -> str:
    """What is wrong with how this input is refused, or nothing. `here`: a folder of its own."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    (here / "file").touch()
    case.spoil(stock, here)
    words = [word.replace("{here}", str(here)).replace("{stock}", str(stock)) for word in case.words]
    own = [*flags[case.script], "--output-dir", str(here / "runs")]
    before = tree(here)
    case = Case(case.script, case.kind, words, case.alone, loads=case.loads)
    outcome = forked(partial(attempt, case, {case.script: own}), SECONDS)
    last = (outcome.err.strip().splitlines() or ["nothing on stderr"])[-1][:160]
    if outcome.code is None:
        return f"took longer than {SECONDS} s"
    if outcome.code == LOADED:
        return "goes on to build a model"
    if outcome.code != 2:
        return f"exit code {outcome.code}: {last}"
    if outcome.err.count("\n") != 1 or not outcome.err.startswith("error: "):
        return f"{outcome.err.count(chr(10))} lines on stderr: {last}"
    after = tree(here)
    if changed := sorted(name for name in {**before, **after} if before.get(name) != after.get(name)):
        return f"changes {changed[0]}: {last}"
    return ""


def control(stock: Path, flags: dict[str, list[str]], here: Path) -> None:
    """Right inputs get as far as building a model, or a refusal would say nothing."""
    for script in SCRIPTS:
        resume = Case(script, "right", ["--resume", str(stock / script)], alone=True)
        for case in (Case(script, "right", []), resume):
            said = verdict(case, stock, flags, here)
            assert said == "goes on to build a model", f"{case}: {said}"


@dataclass
class Args:
    script: Literal["all", "grpo_arithmetic", "grpo_mixed", "ppo_fetch", "gr00t_finetune", "ppo_gr00t"] = "all"
    """whose inputs"""
    kind: str = "all"  # which kind of input, such as bounds or flags
    every: int = 1  # try every so many inputs


def main(args: Args) -> None:
    short_runs.warm_up()
    with tempfile.TemporaryDirectory() as name:
        stock, here = Path(name) / "stock", Path(name) / "here"
        flags = short_runs.starting_points(stock)
        make_runs(stock, flags)
        control(stock, flags, here)
        cases = [*bounds_cases(), *flag_cases(), *folder_cases(stock)]
        cases = [c for c in cases if args.script in ("all", c.script) and args.kind in ("all", c.kind)][:: args.every]
        tried, wrong, start = Counter(), Counter(), time.time()
        for number, case in enumerate(cases, 1):
            said = verdict(case, stock, flags, here)
            if number % 100 == 0:
                print(f"{number} of {len(cases)}", file=sys.stderr)
            tried[case.kind, case.script] += 1
            if said:
                wrong[case.kind, case.script] += 1
                print(f"{case.kind}: {case}: {said}", flush=True)
    print(f"\n| kind | {' | '.join(SCRIPTS)} |\n|{'---|' * (len(SCRIPTS) + 1)}")
    for kind in dict.fromkeys(case.kind for case in cases):
        cells = [f"{tried[kind, s] - wrong[kind, s]} of {tried[kind, s]}" for s in SCRIPTS]
        print(f"| {kind} | {' | '.join(cells)} |")
    shares = []
    for generated in (True, False):
        n, bad = (sum(v for (kind, _), v in c.items() if (kind == "bounds") == generated) for c in (tried, wrong))
        shares.append(bad / max(n, 1))
        print(f"{'generated' if generated else 'by hand'}: {n - bad} of {n} refused well ({1 - shares[-1]:.1%})")
    print(f"{time.time() - start:.0f} s")
    sys.exit(1 if max(shares) > 0.01 else 0)


if __name__ == "__main__":
    main(parse(Args, __doc__))
