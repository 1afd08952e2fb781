"""Ten ideas to fill in, each with tests that say in words what is still wrong.

    uv run pytest exercises                     # what is filled in, what is wrong, what waits
    uv run python -m exercises.run gae          # your function in a run that learns, a few seconds
    uv run python -m exercises.run gae --script # ... and in the script itself

Fill in grpo.py, ppo.py and flow.py; docs/course.md says when. The solutions are the functions of the five scripts.
"""
