"""The door of the configuration: every field has a type and a range, and a value outside of them is named."""

import copy
import dataclasses
import math

from hypothesis import given, settings, strategies as st
from ml_collections import ConfigDict
import numpy as np
import pytest

from ctxjax import config as config_lib
from ctxjax.configs import tiny

VALUES = tiny.get_config().to_dict()
VALUES["mesh"] |= {"data": 1, "fsdp": -1, "tensor": 1}


def values() -> dict:
    """The tiny configuration, to be changed at will."""
    return copy.deepcopy(VALUES)


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def with_field(field: str, value) -> ConfigDict:
    """The tiny configuration with a value that ConfigDict's own type checks may not have let in."""
    tree = values()
    *sections, name = field.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return ConfigDict(tree)


FIELDS = flat(VALUES)
NUMBERS = [name for name, value in FIELDS.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
RUN = sorted(FIELDS.keys() - {name for name in FIELDS if name.startswith("arms.off_policy")})  # run_arms lacks that one


def refused(field: str, value, message: str = "") -> None:
    with pytest.raises(ValueError) as error:
        config_lib.experiment(with_field(field, value), device_count=8)
    # Sizes of the mesh are named together.
    assert field in str(error.value) or (field.startswith("mesh.") and "mesh = " in str(error.value))
    assert message in str(error.value)


def test_the_configuration_itself_is_accepted():
    config_lib.experiment(ConfigDict(values()), device_count=8)
    assert len(NUMBERS) > 80


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_infinite_or_not_a_number(value):
    for field in NUMBERS:
        refused(field, value)


def test_no_number_may_be_negative():
    for field in NUMBERS:
        refused(field, -2 if isinstance(FIELDS[field], int) else -0.5)


def test_no_number_may_be_absurdly_large():
    for field in NUMBERS:
        refused(field, 10**12 if isinstance(FIELDS[field], int) else 1e12)
        refused(field, 10**400)


OPTIONAL = ("prompt.thinking", "prompt.teacher_thinking")  # may be None, and a configuration holds None by default


def test_whole_numbers_are_not_given_with_a_point():
    for field in NUMBERS:
        if isinstance(FIELDS[field], int):
            refused(field, float(FIELDS[field]) + 0.5, "must be a whole number")
            refused(field, float(FIELDS[field]), "must be a whole number")


@pytest.mark.parametrize("value", [None, {}, [], b"bytes", object, {"a": 1}], ids=str)
def test_every_field_has_a_type(value):
    for field in RUN:
        if field in OPTIONAL and value is None or isinstance(FIELDS[field], tuple) and value == []:
            continue
        refused(field, value)


def test_texts_numbers_and_switches_are_not_taken_for_each_other():
    for field, value in FIELDS.items():
        for other in ("3", 3, 3.5, True):
            is_number = isinstance(value, float) and type(other) is int
            if type(other) is not type(value) and not is_number and field not in OPTIONAL:
                refused(field, other)


@pytest.mark.parametrize("field", ["lora.targets", "loss.masked_ids", "run_arms", "records.skip", "alarms.stop"])
def test_a_list_is_not_one_text_and_its_items_have_a_type(field):
    refused(field, "opcd", "must be a list of values")
    refused(field, (None,), f"{field}[0] = None must be")


@pytest.mark.parametrize("field", sorted({name.split(".")[0] for name in FIELDS}))
def test_a_section_or_field_that_is_missing_or_of_another_kind_is_named(field):
    tree = values()
    del tree[field]
    with pytest.raises(ValueError, match=f"no {field}; configs/base.py lists all"):
        config_lib.experiment(ConfigDict(tree), device_count=8)
    if isinstance(VALUES[field], dict):
        refused(field, 3, "must be a section" if field != "arms" else "must be a section of arms")


def test_a_field_that_is_missing_or_unknown_is_named():
    tree = values()
    del tree["train"]["keep"]
    with pytest.raises(ValueError, match="no field train.keep"):
        config_lib.experiment(ConfigDict(tree), device_count=8)
    refused("train.stepps", 3, "is no field; train has batch_size, ")
    refused("arms.opcd.betta", 0.5, "is no field")


def test_whole_numbers_lists_and_numpys_numbers_serve_where_they_are_meant():
    config = with_field("optim.lr", 1)
    config.lora.targets, config.lora.rank = ["q", "v"], 2
    config.train = ConfigDict(config.train.to_dict() | {"steps": np.int64(7)})
    experiment = config_lib.experiment(config, device_count=8)
    assert type(experiment.optim.lr) is float and experiment.lora.targets == ("q", "v")
    assert type(experiment.train.steps) is int and experiment.optim.steps == 7
    hash(experiment.optim), hash(experiment.lora)


def test_an_arm_may_have_a_rate_of_its_own():
    config = tiny.get_config()
    config.run_arms = ("opcd", "opcd_anchored")
    config.arms.opcd.lr = 3e-4
    experiment = config_lib.experiment(config, device_count=8)
    assert experiment.optim_of("opcd") == dataclasses.replace(experiment.optim, lr=3e-4)
    assert experiment.optim_of("opcd_anchored") == experiment.optim and experiment.arms["opcd"].beta == 0.0
    refused("arms.opcd.lr", 3.0, "at most 1")


@pytest.mark.parametrize("name", ["/tmp/up", "a/b", "", "a b", "a\\b", "-a"])
def test_an_arm_is_named_so_that_its_folder_stays_in_the_workdir(name):
    tree = values()
    tree["arms"][name], tree["run_arms"] = {"beta": 0.1}, (name,)
    with pytest.raises(ValueError, match="names a folder of the workdir"):
        config_lib.experiment(ConfigDict(tree), device_count=8)


GARBAGE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.lists(st.one_of(st.integers(), st.text(max_size=4), st.none()), max_size=3).map(tuple),
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), GARBAGE, min_size=1, max_size=4))
def test_garbage_is_a_value_error_or_a_configuration(garbage):
    tree = values()
    for field, value in garbage.items():
        *sections, name = field.split(".")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[name] = value
    try:
        config_lib.experiment(ConfigDict(tree), device_count=8)
    except ValueError as error:
        assert str(error)
