"""What differs around two runs is named once, with the number of pairs that it is in."""

from evalsuite.report.surroundings import Surrounding, sentence, surroundings
from report.record_files import machine, model, speed_record


def test_what_is_the_same_is_not_named():
    assert surroundings([(speed_record(), speed_record(decode=50.0))]) == []
    assert sentence([], 1) == ""


def test_a_driver_and_a_library_are_counted_by_pair():
    old = speed_record()
    newer = speed_record(machine=machine(driver="590.2", vllm="0.27.0"))
    driver = speed_record(machine=machine(driver="590.2"))
    found = surroundings([(old, newer), (old, driver)])
    assert found == [Surrounding("driver", "580.1", "590.2", 2), Surrounding("vllm", "0.26.0", "0.27.0", 1)]
    assert sentence(found, 2).endswith("driver 580.1 → 590.2; vllm 0.26.0 → 0.27.0 (1 of 2 pairs).")


def test_what_one_side_does_not_have_is_absent_there():
    without = machine().model_copy(update={"gpus": (), "gpu_driver": None, "packages": {"torch": "2.11.0"}})
    cpu = model().model_copy(update={"device_name": "Xeon"})
    found = surroundings([(speed_record(), speed_record(machine=without, model=cpu))])
    assert [(one.name, one.old, one.new) for one in found] == [
        ("device", "H100", "Xeon"),
        ("GPUs", "H100", "absent"),
        ("driver", "580.1", "absent"),
        ("vllm", "0.26.0", "absent"),
    ]
