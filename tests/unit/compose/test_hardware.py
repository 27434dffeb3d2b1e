"""What the machine offers to a model that is loaded already."""

import torch
from torch import nn

from stoker.compose.hardware import with_loaded
from stoker.plan.hardware import Device, Hardware


def test_memory_that_the_model_itself_holds_is_free_for_its_run():
    model = nn.Linear(10, 30, bias=False)
    model.register_buffer("scales", torch.zeros(7, dtype=torch.float16))
    hardware = Hardware((Device("cuda", "a GPU", 5000), Device("cpu", "a CPU", 9000)), num_threads=2)
    seen = with_loaded(hardware, model)
    assert [device.memory_bytes for device in seen.devices] == [5000, 9000 + 10 * 30 * 4 + 7 * 2]
    assert seen.num_threads == 2
