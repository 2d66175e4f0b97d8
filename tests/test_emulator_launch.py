"""What the emulated device takes and refuses, and the settings that describe it."""

import numpy as np
import pytest
from emulated import missing_tools, nothing, values

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "1056 threads in a block"),
        (2, "300000 bytes of shared memory where a block has 232448"),
        (3, "a cluster of 32 blocks where 16 is the limit"),
        (4, "a grid 3 blocks wide is no multiple of the cluster's 2"),
        (5, "a cooperative launch of 4096 blocks where 256 fit"),
    ],
)
def test_refused_launches(cases, bug, message):
    assert message in cases.launch(bug, values(32), nothing(32))


def test_device_is_a_setting(cases, monkeypatch):
    found = np.zeros(7, np.int32)
    assert cases.device(found, 256, 100 * 1024, 4) == ""
    assert found.tolist() == [90, 8, 232448, 233472, 16, 2, 4]
    monkeypatch.setenv("FUSEDSEQ_EMULATOR_DEVICE", "sms=3,shared=49152,shared_per_sm=65536,cluster=4,capability=90")
    assert cases.device(found, 256, 20000, 2) == ""
    assert found.tolist() == [90, 3, 49152, 65536, 4, 3, 4]
    monkeypatch.setenv("FUSEDSEQ_EMULATOR_DEVICE", "capability=80")
    assert "the size of the cluster is not given" in cases.device(found, 256, 20000, 1)
    assert found[4] == 1
    assert "a cluster of 2 blocks where 1 is the limit" in cases.ring(0, values(2, 32), 32, 2, 2, 1)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("FUSEDSEQ_EMULATOR_DEVICE", "sms=many", "its item 'sms=many' is not understood"),
        ("FUSEDSEQ_EMULATOR_DEVICE", "cores=3", "its item 'cores=3' is not understood"),
        ("FUSEDSEQ_EMULATOR_SEED", "-1", "FUSEDSEQ_EMULATOR_SEED must be a number, not '-1'"),
    ],
)
def test_bad_settings_are_named(cases, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    assert message in cases.reverse(0, values(32), nothing(32), 32)


def test_a_seed_gives_the_same_schedule(cases, monkeypatch):
    errors = []
    for seed in (3, 3, 4):
        monkeypatch.setenv("FUSEDSEQ_EMULATOR_SEED", str(seed))
        errors.append(cases.reverse(1, values(128), nothing(128), 128))
    assert errors[0] == errors[1] != errors[2]
