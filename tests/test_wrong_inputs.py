"""Every kind of wrong input ends in one line; a sample of benchmarks/wrong_inputs.py, which tries them all."""

import pydantic
import pytest

from benchmarks import short_runs
from benchmarks.broken_files import folder_cases
from benchmarks.wrong_flags import flag_cases
from benchmarks.wrong_inputs import bounds_cases, control, make_runs, verdict, wrong_values


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Runs, models and data to be broken; and the flags of each script."""
    folder = tmp_path_factory.mktemp("stock")
    short_runs.warm_up()
    flags = short_runs.starting_points(folder, steps=0)
    make_runs(folder, flags)
    return folder, flags


def test_right_inputs_get_as_far_as_a_model(stock, tmp_path):
    control(*stock, tmp_path / "here")


@pytest.mark.parametrize("kind", ["bounds", "names", "run folders", "language models", "demonstrations"])
def test_wrong_inputs_end_in_one_line(stock, tmp_path, kind):
    """What is left of the other kinds (flags, starts, policies, problems) the benchmark lists."""
    folder, flags = stock
    cases = [case for case in [*bounds_cases(), *flag_cases(), *folder_cases(folder)] if case.kind == kind]
    sample = cases[:: len(cases) // 12]
    said = {str(case): verdict(case, folder, flags, tmp_path / "here") for case in sample}
    assert {case: wrong for case, wrong in said.items() if wrong} == {} and len(said) >= 12


def test_values_beyond_bounds_are_made_from_the_bounds():
    def values(hint):
        return wrong_values(pydantic.TypeAdapter(hint).json_schema())

    from typing import Annotated, Literal

    from annotated_types import Ge, Gt, Interval

    whole = {"nan", "inf", "-inf", "word", "", "1.5", "1e3"}
    assert set(values(int | None)) == whole and set(values(Annotated[int, Ge(1)])) == whole | {"0", "-1000000"}
    assert {"0", "-1e-9"} <= set(values(Annotated[float, Gt(0)])) and {"-0.5", "1.5"} <= set(
        values(Annotated[float, Interval(ge=0, le=1)])
    )
    assert values(Literal["a", "b"]) == ["no-such-choice", "", "A"] and values(str) == []
