"""Memory that does not suffice ends a command with one message and the changes that save some."""

from types import SimpleNamespace

from absl import flags
import jax
import jax.numpy as jnp
import pytest

from ctxjax import evaluate, export, main
from ctxjax.configs import base, tiny
from ctxjax.host import command
from ctxjax.plan.remedies import list_flags
from ctxjax.training.checkpoint import Checkpoints, saved_steps
from tests.checkpoint_test import make_state

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nBufferAssignment: ..."


def raises(error):
    def run(function, flags_parser):
        raise error

    return run


@pytest.fixture
def ends(monkeypatch, capsys):
    """ends(error): how the training command ends with that error: (exit code, what it said)."""

    def end(error, config) -> tuple[int, str]:
        monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value=config))
        monkeypatch.setattr(command.app, "run", raises(error))
        with pytest.raises(SystemExit) as ended:
            main.command_line()
        return ended.value.code, capsys.readouterr().err

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["out_of_memory"])
    return end


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError(EXHAUSTED), MemoryError("Unable to allocate 7 GiB")])
def test_a_run_ends_with_one_message_and_the_mildest_changes(error, ends):
    config = tiny.get_config()
    config.train.batch_size = 64
    code, said = ends(error, config)
    assert code == 2 and said.startswith("error: memory does not suffice (") and "Traceback" not in said
    assert "BufferAssignment" not in said and "llocate 1" in said.replace(" 7", " 1")
    places = [said.index(flag) for flag in list_flags(config, 8)]
    assert places == sorted(places) and "--config.train.micro_batches=2" in said and "--config.lora.rank=16" in said
    assert "--config.eval.batch_size=" in said and "python -m ctxjax.plan" in said


def test_what_the_device_itself_says_is_understood(ends):
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros(2**44)
    assert ends(error.value, tiny.get_config())[0] == 2


def test_other_errors_of_jax_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(command.app, "run", raises(jax.errors.JaxRuntimeError("INTERNAL: a bug")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main.command_line()


def test_only_changes_that_the_configuration_allows_are_named():
    config = base.get_config()
    config.train.batch_size, config.train.micro_batches, config.lora.rank = 16, 2, 8
    config.model.remat, config.rollout.weights = "full", "stored"
    assert list_flags(config, 8) == []
    config.train.batch_size, config.train.retention_rows = 32, 16
    assert list_flags(config, 8) == []  # 16 rows of retention do not split into 4 parts on 8 devices
    config.train.retention_rows = 32
    assert list_flags(config, 8) == ["--config.train.micro_batches=4"]


def test_an_evaluation_names_its_own_changes():
    config = base.get_config()
    config.model.path, config.eval.batch_size, config.train.batch_size = "m", 64, 8
    said = evaluate.suggest_less_memory(config, 8)
    assert "--config.eval.batch_size=32" in said and "--config.model.param_dtype=bfloat16" in said
    config.eval.batch_size, config.model.param_dtype = 8, "bfloat16"
    assert "--config" not in evaluate.suggest_less_memory(config, 8)


def test_an_export_may_use_the_hosts_memory(monkeypatch, capsys):
    def exhaust(*_):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr(export, "export", exhaust)
    assert export.main(["--workdir=w", "--out=o"]) == 2
    assert "bytes); export in the host's memory: JAX_PLATFORMS=cpu" in capsys.readouterr().err


def test_a_checkpoint_that_found_no_memory_is_not_damaged(tmp_path, mesh, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", 2, {})
    for step in (1, 2):
        checkpoints.save(make_state(mesh, step), step, {"data_position": step})
    checkpoints.wait()
    read = Checkpoints._read
    full = iter([True, False])

    def fail_once(self, taken, like):
        if next(full):
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        return read(self, taken, like)

    monkeypatch.setattr(Checkpoints, "_read", fail_once)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        checkpoints.restore(make_state(mesh, 0.0))
    checkpoints.close()
    assert saved_steps(tmp_path / "c") == [1, 2]
