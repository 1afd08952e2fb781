"""Tasks of reasoning-gym (an extra): a hundred procedural kinds of problems, each with its verifier."""

import difflib
import warnings

from common.cli import fail
from common.language.numbers import marked

SIZE = 1_000_000  # problems of a task; each is made of its number when it is asked for
PREFIX = "rg:"


def answer_of(completion: str) -> str:
    """What goes to the verifier: the answer that the completion marks, else its first line without a full stop."""
    return marked(completion) or completion.strip().partition("\n")[0].strip().removesuffix(".")


def score(completion: str, problem) -> float:
    """A reward: what the task's verifier gives, 0 to 1; of a problem without a verifier 0."""
    answer = answer_of(completion)
    return problem.score(answer) if problem.score and answer else 0.0


def add_tasks(tasks: dict, names: tuple[str, ...], make) -> tuple[str, ...]:
    """Adds the tasks rg:NAME among `names` to `tasks`, as (draws a problem, finds the answer); returns their names.

    make(question, answer, score): a problem of them; score(answer) -> 0 to 1, the library's verifier.
    """
    wanted = tuple(name for name in names if name.startswith(PREFIX))
    if not wanted:
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that it imports
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError:
        fail(f"--tasks {wanted[0]}: reasoning-gym is not installed; `uv sync --extra rg` brings it")

    def task(name: str):
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, 3, 0.5) or ["chain_sum", "countdown", "gsm_symbolic"]
            fail(f"--tasks {PREFIX}{name}: reasoning-gym has no {name!r}; it has {', '.join(near)}, ...")
        data = reasoning_gym.create_dataset(name, size=SIZE, seed=0)

        def draw(rng, level):
            entry = data[int(rng.integers(SIZE))]

            def score(answer: str) -> float:
                try:
                    return float(data.score_answer(answer, entry))
                except Exception:  # a verifier that trips over a text has not found an answer in it
                    return 0.0

            return make(entry["question"].rstrip() + "\nAnswer: ", str(entry["answer"]), score)

        return draw, answer_of

    tasks |= {name: task(name.removeprefix(PREFIX)) for name in wanted}
    return wanted
