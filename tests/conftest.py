import gc
import os
import signal

import pytest
import torch

# The tests' tensors are tiny: threads cost more than they give, many times so when the machine is busy.
torch.set_num_threads(1)


def pytest_configure(config):
    """Under pytest-xdist (-n 8, say) the workers share the GPUs. Started in the background, they heed Ctrl-C too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and torch.cuda.is_available():
        torch.cuda.set_device(int(worker[2:]) % torch.cuda.device_count())


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    ):
        pytest.skip("needs a CUDA GPU with FP8 units")


def pytest_runtest_teardown(item):
    """What one worker no longer uses is another's to take."""
    if item.get_closest_marker("gpu") and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
