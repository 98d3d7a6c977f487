"""Checkpoints: exact on any mesh, the latest and the best kept, and no damage that goes unseen or costs more."""

import os

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from ctxjax.host.checksum import compute_checksums
from ctxjax.training.checkpoint import Checkpoints, best_step, saved_steps
from ctxjax.types import TrainState

WHOLE = P()


def state(mesh, value: float, spec: P = WHOLE) -> TrainState:
    """A state of some 100 kB whose arrays hold ``value`` and a number of their own each."""

    def array(own: int, dtype=np.float32, shape=(8, 1024), spec=spec):
        return jax.device_put(np.full(shape, value + own, dtype), NamedSharding(mesh, spec))

    params = {"layers": {"q": array(0), "k": array(1, jax.numpy.bfloat16)}}
    moments = (array(3), array(4))
    return TrainState(array(2, np.int32, (), WHOLE), params, moments, jax.random.key(7), {"ema": array(5)})


def equal(one: TrainState, other: TrainState) -> bool:
    key = [jax.random.key_data(tree.key) for tree in (one, other)]
    leaves = [jax.tree.leaves(tree.replace(key=k)) for tree, k in zip((one, other), key)]
    return all(a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(*leaves))


@pytest.fixture
def saved(tmp_path, mesh):
    """(folder, mesh): checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "c", 2, {})
    for step in (1, 2):
        checkpoints.save(state(mesh, step), step, {"data_position": step, "manifest": {"commit": "abc"}})
    checkpoints.close()
    return tmp_path / "c", mesh


def restored(folder, mesh):
    checkpoints = Checkpoints(folder, 2, {})
    try:
        return checkpoints.restore(state(mesh, 0.0))
    finally:
        checkpoints.close()


def test_everything_comes_back_with_what_was_saved_beside_it(saved):
    found, run = restored(*saved)
    assert equal(found, state(saved[1], 2))
    assert run == {"data_position": 2, "manifest": {"commit": "abc"}}


def test_there_is_nothing_to_restore_before_the_first_save(tmp_path, mesh):
    assert restored(tmp_path / "new", mesh) is None


def test_another_mesh_reads_the_same_values_in_its_own_layout(tmp_path, mesh8):
    sharded = state(mesh8, 3.0, P("fsdp", "tensor"))
    checkpoints = Checkpoints(tmp_path / "c", 1, {})
    checkpoints.save(sharded, 1, {})
    like = state(mesh8, 0.0, P(None, ("data", "tensor")))
    found, _ = checkpoints.restore(like)
    checkpoints.close()
    assert equal(found, sharded)
    assert found.params["layers"]["q"].sharding == like.params["layers"]["q"].sharding
    params = [tree.params for tree in (found, sharded)]
    assert compute_checksums(params[0]) == compute_checksums(params[1])


def test_a_state_that_is_overwritten_at_once_is_saved_as_it_was(tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path / "c", 1, {})
    now = state(mesh, 1.0)
    key = now.key
    checkpoints.save(now, 1, {})
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + x.dtype.type(1), tree), donate_argnums=0)
    jax.block_until_ready(step(now.replace(key=None)))
    found, _ = checkpoints.restore(state(mesh, 0.0).replace(key=key))
    checkpoints.close()
    assert equal(found, state(mesh, 1.0))


def truncate(folder):
    for path in (folder / "state").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    """Changes a bit somewhere in every data file."""
    for path in (folder / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


def lose_the_run(folder):
    for path in (folder / "run").iterdir():
        path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip, lose_the_run])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(harm, saved, capsys):
    folder, mesh = saved
    harm(folder / "2")
    found, run = restored(folder, mesh)
    assert equal(found, state(mesh, 1)) and run["data_position"] == 1
    message = capsys.readouterr().err
    assert f"{folder / '2'} is damaged" in message and "2.damaged, and the one of step 1 is used" in message
    assert saved_steps(folder) == [1] and (folder / "2.damaged").is_dir()
    checkpoints = Checkpoints(folder, 2, {})
    checkpoints.save(state(mesh, 2), 2, {})  # its place is free again
    checkpoints.close()
    assert saved_steps(folder) == [1, 2]


def test_values_other_than_those_that_were_saved_are_damage(saved, monkeypatch, capsys):
    """As if the file system had delivered other bytes without an error."""
    folder, mesh = saved
    original = compute_checksums
    seen = []

    def wrong(tree):
        seen.append(tree)
        sums = original(tree)
        return sums | {"params/layers/q": 1} if len(seen) == 1 else sums

    monkeypatch.setattr("ctxjax.training.checkpoint.compute_checksums", wrong)
    _, run = restored(folder, mesh)
    assert run["data_position"] == 1
    assert "1 arrays are not those that were saved, the first params/layers/q" in capsys.readouterr().err


def test_where_all_are_damaged_nothing_is_touched(saved):
    folder, mesh = saved
    for step in (1, 2):
        truncate(folder / str(step))
    with pytest.raises(ValueError, match="no checkpoint in .* can be read .*step 2: .*step 1: .*from a backup"):
        restored(folder, mesh)
    assert saved_steps(folder) == [1, 2]


def test_the_latest_and_the_best_are_kept(tmp_path, mesh):
    scores: dict[int, float] = {}
    checkpoints = Checkpoints(tmp_path / "c", 1, scores)
    for step, score in enumerate([0.1, 0.9, float("nan"), 0.9, 0.2], start=1):
        scores[step] = score
        checkpoints.save(state(mesh, step), step, {})
    checkpoints.close()
    assert saved_steps(tmp_path / "c") == [4, 5]  # of equals the later one
    assert best_step({}) is None and best_step({3: float("nan"), 1: -2.0}) == 1


@pytest.fixture
def small_disk(mounted):
    return mounted(megabytes=1)


def test_a_full_disk_ends_the_run_with_a_message_and_leaves_the_last_good_state(small_disk, mesh):
    folder = small_disk / "c"
    checkpoints = Checkpoints(folder, 2, {})
    checkpoints.save(state(mesh, 1), 1, {})
    checkpoints.close()
    (small_disk / "filler").write_bytes(b"")
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
        while filler.write(bytes(4096)):
            pass
    checkpoints = Checkpoints(folder, 2, {})
    with pytest.raises(OSError, match=r"could not be written to .*the last complete one is of step 1\. Make room"):
        random = np.random.default_rng(0).random((8, 1024))  # does not shrink
        checkpoints.save(state(mesh, 2).replace(opt_state=(jax.device_put(random.astype(np.float32)),)), 2, {})
        checkpoints.close()
    (small_disk / "filler").unlink()
    found, _ = restored(folder, mesh)
    assert equal(found, state(mesh, 1))


@pytest.mark.parametrize(
    ("place", "method"), [("save", "save"), ("wait_until_finished", "wait"), ("restore", "restore")]
)
def test_the_loss_of_another_process_is_no_fault_of_the_disk(place, method, saved, monkeypatch, capsys):
    def lost(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    folder, mesh = saved
    checkpoints = Checkpoints(folder, 2, {})
    arguments = {"save": (state(mesh, 3), 3, {}), "restore": (state(mesh, 0.0),)}.get(method, ())
    with monkeypatch.context() as patch:
        patch.setattr(jax.distributed, "is_initialized", lambda: True)
        patch.setattr(checkpoints._manager, place, lost)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
            getattr(checkpoints, method)(*arguments)
    checkpoints.close()
    assert saved_steps(folder) == [1, 2] and "damaged" not in capsys.readouterr().err
