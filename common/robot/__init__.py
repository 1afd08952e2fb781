"""What the robot scripts share. `GR00T`, `GR00TN17`, `FetchVec`, `Policy` can be imported from here: each loads what
it needs."""

import importlib

PLACES = {"GR00T": "gr00t_n15", "GR00TN17": "gr00t_n17", "FetchVec": "fetch", "Policy": "policy"}


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module 'common.robot' has no attribute {name!r}")
    return getattr(importlib.import_module(f"common.robot.{PLACES[name]}"), name)
