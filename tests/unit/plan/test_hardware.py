from stoker.plan.hardware import Device, Hardware


def test_the_first_device_of_a_kind_is_found():
    first, second = Device("cuda", "a", 1), Device("cuda", "b", 2)
    hardware = Hardware((first, second))
    assert hardware.first("cuda") is first
    assert hardware.first("mps") is None
