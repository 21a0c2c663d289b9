"""Where a process finds the others: flags, SLURM; and that a process on its own finds none."""

import pytest

from efficient_lm.distributed import Place, find_place, first_host, from_flags, slurm_place
from efficient_lm.errors import ProcessError

SLURM = {"SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_NTASKS": "16",
         "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}  # fmt: skip


def test_flags_need_each_other():
    assert from_flags(None, None, None) is None
    assert from_flags("a:1234", 2, 1) == Place("a:1234", 2, 1, None, "from flags")
    with pytest.raises(ProcessError, match=r"--process_id not given; .* all three"):
        from_flags("a:1234", 2, None)
    with pytest.raises(ProcessError, match="--coordinator=a; give host:port"):
        from_flags("a", 2, 0)
    with pytest.raises(ProcessError, match="--process_id=2; allowed: 0 to 1"):
        from_flags("a:1234", 2, 2)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("rack1-n[01-02]", "rack1-n01"),
        ("c[1-2]-eth", "c1-eth"),
    ],
)
def test_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "changes, devices",
    [
        ({}, None),  # no GPUs, or a GPU of its own each that SLURM hides from the others
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "8,2"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
    ],
)
def test_place_in_slurm(changes, devices):
    place = slurm_place(SLURM | changes)
    assert place == Place("gpu003:61242", 16, 9, devices, "found by SLURM")


def test_gpus_that_the_tasks_of_a_host_cannot_share():
    with pytest.raises(ProcessError, match="8 tasks on a host with 3 GPUs; start one task a host"):
        slurm_place(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize("method", ["auto", "off", "slurm"])
def test_a_process_on_its_own(method):
    alone = SLURM | {"SLURM_NTASKS": "1"}
    for environment in ({}, alone, {"SLURM_JOB_ID": "1"}):  # the last one: a batch script
        if method == "slurm":
            with pytest.raises(ProcessError, match="--distributed=slurm, but this is no process"):
                find_place(method, environment, 1.0)
        else:
            assert find_place(method, environment, 1.0) is None
    if method == "off":
        assert find_place(method, SLURM, 1.0) is None
