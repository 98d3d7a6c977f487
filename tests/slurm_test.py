"""The GPUs of a Slurm task: without more, jax takes one per task and leaves the others idle."""

import pytest

from ctxjax.host import processes

NODE = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
ALL = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": ALL}, [0, 1, 2, 3, 4, 5, 6, 7]),  # plain srun: one task, all GPUs
        ({"CUDA_VISIBLE_DEVICES": ALL, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}, list(range(8))),
        ({"CUDA_VISIBLE_DEVICES": ALL, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}, [5]),
        ({"CUDA_VISIBLE_DEVICES": ALL, "SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_NODEID": "1"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": ALL, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}, [4, 5, 6, 7]),
        # bound by Slurm: a task sees its own GPUs only, which start at 0
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3"}, [0, 1]),
        # for jax, or for the user's own setting
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": ALL, "JAX_LOCAL_DEVICE_IDS": "2"}, None),
    ],
)
def test_a_task_takes_its_share_of_the_gpus_that_it_sees(environment, gpus):
    assert processes.choose_gpus(NODE | environment) == gpus


def test_outside_of_slurm_jax_chooses():
    assert processes.choose_gpus({"CUDA_VISIBLE_DEVICES": ALL}) is None


def test_a_slurm_that_does_not_hand_out_gpus_leaves_none_idle_either():
    assert processes.choose_gpus(NODE, installed=2) == [0, 1]
    assert processes.choose_gpus(NODE | {"CUDA_VISIBLE_DEVICES": "1"}, installed=2) == [0]


def test_gpus_that_would_stay_idle_are_an_error():
    with pytest.raises(ValueError, match=r"8 GPUs .* 3 Slurm tasks;.*--ntasks-per-node=1"):
        processes.choose_gpus(NODE | {"CUDA_VISIBLE_DEVICES": ALL, "SLURM_STEP_TASKS_PER_NODE": "3"})
