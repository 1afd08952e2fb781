"""The grading runs in one process: workers would take longer to start than it does."""


def pytest_xdist_auto_num_workers(config) -> int:
    return 0
