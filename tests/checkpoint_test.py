"""Checkpoints: exact on any mesh; the latest and the best are kept; damage is detected and an older one is used."""

import errno
import os
import shutil

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tenacity

from ctxjax.host.checksum import compute_checksums
from ctxjax.training.checkpoint import Checkpoints, best_step, read_params, saved_steps
from ctxjax.types import TrainState

REPLICATED = P()


def make_state(mesh, value: float, spec: P = REPLICATED) -> TrainState:
    """Make a state of about 100 kB. Each array is filled with ``value`` plus a number of its own."""

    def array(own: int, dtype=np.float32, shape=(8, 1024), spec=spec):
        return jax.device_put(np.full(shape, value + own, dtype), NamedSharding(mesh, spec))

    params = {"layers": {"q": array(0), "k": array(1, jax.numpy.bfloat16)}}
    moments = (array(3), array(4))
    return TrainState(array(2, np.int32, (), REPLICATED), params, moments, jax.random.key(7), {"ema": array(5)})


def are_equal(one: TrainState, other: TrainState) -> bool:
    keys = [jax.random.key_data(tree.key) for tree in (one, other)]
    leaves = [jax.tree.leaves(tree.replace(key=key)) for tree, key in zip((one, other), keys)]
    return all(a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*leaves))


@pytest.fixture
def saved(tmp_path, mesh):
    """(folder, mesh), with checkpoints of steps 1 and 2 in the folder."""
    checkpoints = Checkpoints(tmp_path / "c", 2, {})
    for step in (1, 2):
        checkpoints.save(make_state(mesh, step), step, {"data_position": step, "manifest": {"commit": "abc"}})
    checkpoints.close()
    return tmp_path / "c", mesh


def restore(folder, mesh):
    checkpoints = Checkpoints(folder, 2, {})
    try:
        return checkpoints.restore(make_state(mesh, 0.0))
    finally:
        checkpoints.close()


def test_restore_returns_the_saved_state_and_record(saved):
    found, record = restore(*saved)
    assert are_equal(found, make_state(saved[1], 2))
    assert record == {"data_position": 2, "manifest": {"commit": "abc"}}


def test_a_save_does_not_count_as_a_question_for_a_preemption(saved, monkeypatch):
    """JAX stops all processes at a number that none has asked for yet (host/preemption.py counts them)."""
    folder, mesh = saved
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpoints = Checkpoints(folder, 2, {})
    checkpoints.save(make_state(mesh, 3), 3, {})
    checkpoints.close()
    assert asked == [] and saved_steps(folder)[-1] == 3


def test_restore_returns_none_before_the_first_save(tmp_path, mesh):
    assert restore(tmp_path / "new", mesh) is None


def test_a_checkpoint_is_restored_in_another_sharding(tmp_path, mesh8):
    sharded = make_state(mesh8, 3.0, P("fsdp", "tensor"))
    checkpoints = Checkpoints(tmp_path / "c", 1, {})
    checkpoints.save(sharded, 1, {})
    like = make_state(mesh8, 0.0, P(None, ("data", "tensor")))
    found, _ = checkpoints.restore(like)
    checkpoints.close()
    assert are_equal(found, sharded)
    assert found.params["layers"]["q"].sharding == like.params["layers"]["q"].sharding
    params = [tree.params for tree in (found, sharded)]
    assert compute_checksums(params[0]) == compute_checksums(params[1])


def test_a_state_that_is_donated_right_after_save_is_saved_unchanged(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c", 1, {})
    state = make_state(mesh, 1.0)
    key = state.key
    checkpoints.save(state, 1, {})
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + x.dtype.type(1), tree), donate_argnums=0)
    jax.block_until_ready(step(state.replace(key=None)))
    found, _ = checkpoints.restore(make_state(mesh, 0.0).replace(key=key))
    checkpoints.close()
    assert are_equal(found, make_state(mesh, 1.0))


def truncate(folder):
    """Cut every data file in half."""
    for path in (folder / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder):
    """Flip one bit in the middle of every data file."""
    for path in (folder / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def delete_the_record(folder):
    for path in (folder / "run").iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete_the_record])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(damage, saved, capsys):
    folder, mesh = saved
    damage(folder / "2")
    found, record = restore(folder, mesh)
    assert are_equal(found, make_state(mesh, 1)) and record["data_position"] == 1
    message = capsys.readouterr().err
    assert f"{folder / '2'} is damaged" in message and "2.damaged, and the one of step 1 is used" in message
    assert saved_steps(folder) == [1] and (folder / "2.damaged").is_dir()
    checkpoints = Checkpoints(folder, 2, {})
    checkpoints.save(make_state(mesh, 2), 2, {})  # the name 2 is free again
    checkpoints.close()
    assert saved_steps(folder) == [1, 2]


def test_values_with_another_checksum_are_damage(saved, monkeypatch, capsys):
    """As if the file system had returned other bytes without an error."""
    folder, mesh = saved
    original = compute_checksums
    calls = []

    def wrong_in_the_first_call(tree):
        calls.append(tree)
        sums = original(tree)
        return sums | {"params/layers/q": 1} if len(calls) == 1 else sums

    monkeypatch.setattr("ctxjax.training.checkpoint.compute_checksums", wrong_in_the_first_call)
    _, record = restore(folder, mesh)
    assert record["data_position"] == 1
    assert "the checksums of 1 arrays differ from the saved ones, first params/layers/q" in capsys.readouterr().err


def test_weights_that_are_not_those_that_were_saved_are_not_read_for_an_export(saved):
    """The weights of step 1 under the name of step 2: each can be read, and only the checksums tell."""
    folder, mesh = saved
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, make_state(mesh, 2).params)
    assert jax.tree.all(jax.tree.map(np.array_equal, read_params(folder, 2, like), make_state(mesh, 2).params))
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    with pytest.raises(ValueError, match="step 2 in .* is damaged: the checksums of .* take another step"):
        read_params(folder, 2, like)


TENSORSTORE = ValueError("UNKNOWN: Error reading local file \"d/0\": Input/output error [os_error_code='5']")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), TENSORSTORE])
def test_an_error_that_passes_by_itself_is_not_damage(error, saved, monkeypatch, capsys):
    folder, mesh = saved
    read, errors = ocp.CheckpointManager.restore, [error]

    def fail_once(*given, **named):
        if errors:
            raise errors.pop()
        return read(*given, **named)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail_once)
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    found, record = restore(folder, mesh)
    assert are_equal(found, make_state(mesh, 2)) and record["data_position"] == 2 and not errors
    assert saved_steps(folder) == [1, 2] and "damaged" not in capsys.readouterr().err


def test_if_all_checkpoints_are_damaged_none_is_renamed(saved):
    folder, mesh = saved
    for step in (1, 2):
        truncate(folder / str(step))
    with pytest.raises(ValueError, match="no checkpoint in .* can be read .*step 2: .*step 1: .*from a backup"):
        restore(folder, mesh)
    assert saved_steps(folder) == [1, 2]


def test_the_latest_and_the_best_are_kept(tmp_path, mesh):
    scores: dict[int, float] = {}
    checkpoints = Checkpoints(tmp_path / "c", 1, scores)
    for step, score in enumerate([0.1, 0.9, float("nan"), 0.9, 0.2], start=1):
        scores[step] = score
        checkpoints.save(make_state(mesh, step), step, {})
    checkpoints.close()
    assert saved_steps(tmp_path / "c") == [4, 5]  # 2 and 4 have the same score; the later one is kept
    assert best_step({}) is None and best_step({3: float("nan"), 1: -2.0}) == 1


@pytest.fixture
def small_disk(mounted):
    return mounted(megabytes=1)


def test_a_full_disk_is_an_error_with_a_remedy_and_keeps_the_last_complete_checkpoint(small_disk, mesh):
    folder = small_disk / "c"
    checkpoints = Checkpoints(folder, 2, {})
    checkpoints.save(make_state(mesh, 1), 1, {})
    checkpoints.close()
    (small_disk / "filler").write_bytes(b"")
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
        while filler.write(bytes(4096)):
            pass
    checkpoints = Checkpoints(folder, 2, {})
    with pytest.raises(OSError, match=r"could not be written to .*the last complete one is of step 1\. Make room"):
        random = np.random.default_rng(0).random((8, 1024))  # cannot be compressed
        checkpoints.save(make_state(mesh, 2).replace(opt_state=(jax.device_put(random.astype(np.float32)),)), 2, {})
        checkpoints.close()
    (small_disk / "filler").unlink()
    found, _ = restore(folder, mesh)
    assert are_equal(found, make_state(mesh, 1))


@pytest.mark.parametrize(
    ("place", "method"), [("save", "save"), ("wait_until_finished", "wait"), ("restore", "restore")]
)
def test_the_loss_of_another_process_is_not_reported_as_a_damaged_checkpoint(place, method, saved, monkeypatch, capsys):
    def lose_process(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    folder, mesh = saved
    checkpoints = Checkpoints(folder, 2, {})
    arguments = {"save": (make_state(mesh, 3), 3, {}), "restore": (make_state(mesh, 0.0),)}.get(method, ())
    with monkeypatch.context() as patch:
        patch.setattr(jax.distributed, "is_initialized", lambda: True)
        patch.setattr(checkpoints._manager, place, lose_process)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
            getattr(checkpoints, method)(*arguments)
    checkpoints.close()
    assert saved_steps(folder) == [1, 2] and "damaged" not in capsys.readouterr().err
