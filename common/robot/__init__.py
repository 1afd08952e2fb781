"""What the robot scripts share. `GR00T`, `FetchVec`, `Policy` can be imported from here: each loads what it needs."""

import importlib

PLACES = {"GR00T": "gr00t_n15", "FetchVec": "fetch", "Policy": "policy"}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'common.robot' has no attribute {name!r}")
    return getattr(importlib.import_module(f"common.robot.{PLACES[name]}"), name)
