import pytest
import torch


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    ):
        pytest.skip("needs a CUDA GPU with FP8 units")
