"""A study of four worlds in three architectures, and of a student that has not learnt much yet, with intervals over
seeds and tests.

    python -m ctxjax.study --config=configs/study.py --workdir=runs/study

Every cell is one run, with all arms in it. In the first phase every arm is trained at every rate, with ``rate_seeds``,
in one architecture of each world, and the rate that is best on dev is taken for all of them; in the second phase, with
``seeds``, every arm is trained at its own rate. Nothing was tuned on any of these seeds.
docs/study.md says how to start it on several machines, to stop it and to read its report.
"""

from ml_collections import ConfigDict

WORLDS = {"rules": "tiny", "policy": "tiny_policy", "scratch": "tiny_scratch", "grid": "tiny_grid"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")

ARMS = {  # name -> changes to config.loss
    "off_policy": {"divergence": "forward_kl", "on_policy_fraction": 0.0},
    "opcd": {},
    "anchored": {"beta": 0.5},
    "retained": {"beta": 0.5, "mu": 1.0},
    "retention_alone": {"mu": 1.0},
    "handover": {"beta": 0.5, "anchor": "handover"},
    "handover_retained": {"beta": 0.5, "mu": 1.0, "anchor": "handover"},
    "ema": {"beta": 0.5, "anchor": "ema"},
    "teacher_bare": {"beta": 0.5, "anchor": "teacher_bare"},
    "joint": {"beta": 0.5, "anchor": "joint"},
    "symkl": {"beta": 0.5, "anchor": "symmetric"},
    "dualopd": {"beta": 0.5, "anchor": "teacher"},
    "gated": {"beta": 0.5, "gate": "token"},
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    # Name -> the configuration file of its runs.
    config.configurations = {
        f"{world}_{architecture}": f"configs/{file}.py:{architecture}"
        for world, file in WORLDS.items()
        for architecture in ARCHITECTURES
    }
    # A fifth of the steps: the student knows little without the context, which anchoring takes away as well.
    config.configurations["rules_early"] = "configs/tiny.py:llama"
    # Configuration -> changes to the fields of its runs. Worlds and architectures have contexts of their own: with the
    # same seed, `rules` and `scratch` draw the same tables. (rules_early has the base and the table of rules_llama.)
    places = {"rules_qwen2": 1, "rules_qwen3": 2, "scratch_qwen3": 3, "scratch_llama": 4, "scratch_qwen2": 5}
    places |= {"policy_llama": 1, "policy_qwen3": 2, "grid_qwen2": 1, "grid_qwen3": 2}
    sections = {"rules": "rules", "policy": "policy", "scratch": "scratch", "grid": "tiny_grid"}
    config.own_changes = {
        name: {sections[name.split("_")[0]]: {"context_index": place}} for name, place in places.items()
    }
    config.own_changes["rules_early"] = {"train": {"steps": 40}}
    config.arms = ARMS  # name -> changes to config.loss
    # In every configuration.
    config.run_arms = ("off_policy", "opcd", "anchored", "retained", "retention_alone", "handover")
    # Configuration -> its further arms.
    further = ("ema", "teacher_bare", "joint", "symkl", "dualopd", "gated", "handover_retained")
    config.more_arms = dict.fromkeys(("rules_llama", "policy_qwen2", "scratch_qwen3"), further)
    config.more_arms["rules_early"] = ("handover_retained",)
    # Configuration -> arms that it does without: in a game only the student plays, not the teacher.
    config.left_out = {f"grid_{architecture}": ("off_policy",) for architecture in ARCHITECTURES}
    config.first_arm = "opcd"  # the arm that others are compared with

    config.rates = (3e-4, 1e-3, 3e-3)  # the learning rates to choose from; one alone: nothing to choose
    # Configuration -> the one whose first phase chooses its rates; its own one otherwise.
    rated = {"rules": "rules_llama", "policy": "policy_qwen2", "scratch": "scratch_qwen3", "grid": "grid_llama"}
    config.rates_of = {
        f"{world}_{architecture}": rated[world]
        for world in WORLDS
        for architecture in ARCHITECTURES
        if f"{world}_{architecture}" != rated[world]
    }
    config.rate_seeds = (100,)  # seeds of the first phase; none of them is one of seeds
    config.seeds = (10, 11, 12)  # seeds of the second phase: of the world, its base and the run
    # The metrics on dev that choose an arm's rate, the second one only if the first ones are equal; with a minus sign
    # the lower the better. All arms are to answer without the context, so this chooses the rates. If answers with the
    # context chose them, plain OPCD would be chosen by its harm.
    config.select = ("acc_x", "-distill")

    # Changes to the fields of all runs. No alarm stops a run, since its other arms are to go on.
    config.changes = {"alarms": {"stop": ()}, "eval": {"every": 0}, "train": {"keep": 1}}
    # Changes to those of the first phase, which are judged on dev only.
    config.rate_changes = {
        "eval": {"views": ()},
        "rules": {"test_questions": 32},
        "policy": {"test_questions": 32},
        "scratch": {"test_questions": 32},
        "tiny_grid": {"test_questions": 32},
    }
    return config
