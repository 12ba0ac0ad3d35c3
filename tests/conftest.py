import pytest
import torch

# The tests' tensors are tiny: threads cost more than they give, many times so when the machine is busy.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    ):
        pytest.skip("needs a CUDA GPU with FP8 units")
