"""The scripts that make, use and give back TPU slices: the exact cloud commands, and going on after a preemption."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu"
SETTINGS = {"PROJECT": "p", "ZONE": "z", "NAME": "n", "TYPE": "v5litepod-32", "REPOSITORY": "https://x/y.git"}
WHERE = "--project=p --zone=z"

# A cloud of its own: notes each command, keeps the slice's state in a file, and ends the run as the test wants.
CLOUD = """#!/usr/bin/env bash
echo "${*//$'\\n'/;}" >> "$CLOUD/calls"
case "$*" in
  *"queued-resources create"*) echo READY > "$CLOUD/state" ;;
  *"tpu-vm describe"*)
    refusal=$(head -n 1 "$CLOUD/refusals"); sed -i 1d "$CLOUD/refusals"
    if [ -n "$refusal" ]; then echo "ERROR: (gcloud.compute.tpus.tpu-vm.describe) $refusal" >&2; exit 1; fi
    cat "$CLOUD/state" ;;
  *ctxjax.main*)
    code=$(head -n 1 "$CLOUD/codes"); sed -i 1d "$CLOUD/codes"
    [ "$code" = 143 ] && echo PREEMPTED > "$CLOUD/state"
    echo "step of the run"; exit "$code" ;;
esac
"""


def script(name: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]} | SETTINGS | settings
    command = ["bash", str(SCRIPTS / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def get_remote_command(line: str) -> str:
    """Return what a printed ssh command runs on the hosts, as their shell reads it."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.partition("\n--command=")[2].removesuffix("\n")


@pytest.mark.parametrize(
    ("name", "arguments", "settings", "commands"),
    [
        ("create.sh", (), {}, [
            f"gcloud compute tpus queued-resources create n {WHERE} --accelerator-type=v5litepod-32 "
            "--runtime-version=v2-alpha-tpuv5-lite --node-id=n"]),
        ("create.sh", (), {"SLICES": "2", "SPOT": "1", "TYPE": "v6e-16"}, [
            f"gcloud compute tpus queued-resources create n {WHERE} --accelerator-type=v6e-16 "
            "--runtime-version=v2-alpha-tpuv6e --node-count=2 --node-prefix=n --spot"]),
        ("create.sh", ("--now",), {"TYPE": "v5p-16"}, [
            f"gcloud compute tpus tpu-vm create n {WHERE} --accelerator-type=v5p-16 --version=v2-alpha-tpuv5"]),
        ("delete.sh", (), {}, [f"gcloud compute tpus queued-resources delete n {WHERE} --force --quiet"]),
        ("delete.sh", ("--now",), {}, [f"gcloud compute tpus tpu-vm delete n {WHERE} --quiet"]),
    ],
)  # fmt: skip
def test_a_dry_run_prints_the_exact_commands(name, arguments, settings, commands):
    done = script(name, *arguments, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == commands


def test_a_run_reaches_every_host_of_every_slice_with_its_flags_and_its_arguments_quoted():
    arguments = ("--config=configs/llama3.py:medical", "--workdir=/mnt/b/a run")
    done = script("run.sh", *arguments, DRY_RUN="1", SLICES="2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert line.startswith(f"gcloud compute tpus tpu-vm ssh n-{index} {WHERE} --worker=all --command=")
        command = get_remote_command(line)
        assert (
            f"MEGASCALE_COORDINATOR_ADDRESS=ADDRESS-OF-n-0 MEGASCALE_NUM_SLICES=2 MEGASCALE_SLICE_ID={index} "
            in command
        )
        assert "--workdir=/mnt/b/a\\ run" in command and 'LIBTPU_INIT_ARGS="--xla' in command
    assert "MEGASCALE" not in script("run.sh", *arguments, DRY_RUN="1").stdout


def test_a_bucket_is_mounted_on_every_host_and_no_run_begins_without_it():
    command = "mountpoint -q /mnt/bucket"
    setup = script("setup.sh", DRY_RUN="1", BUCKET="my-b").stdout
    assert "gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 my-b /mnt/bucket" in setup
    arguments = ("--config=c", "--workdir=/mnt/bucket/r")
    line = script("run.sh", *arguments, DRY_RUN="1", BUCKET="my-b").stdout
    assert f"; {command} && cd ctxjax" in get_remote_command(line)
    for name, more in (("setup.sh", ()), ("run.sh", arguments)):
        assert "mount" not in script(name, *more, DRY_RUN="1").stdout.replace("/mnt/", "").replace(arguments[1], "")


# What pgrep -f does, with the shell that asks and those of a file as all processes.
PGREP = """#!/usr/bin/env bash
{ tr '\\0' ' ' < /proc/$PPID/cmdline; echo; cat ~/processes; } | grep -qE -- "${@: -1}"
"""


@pytest.mark.parametrize(
    ("processes", "said"), [("python -m ctxjax.main --config=c", "running"), ("python -m ctxjax.plan", "idle")]
)
def test_the_monitor_does_not_take_its_own_question_for_a_run(processes, said, tmp_path):
    remote = get_remote_command(script("monitor.sh", DRY_RUN="1").stdout.splitlines()[-1])
    (tmp_path / "pgrep").write_text(PGREP)
    (tmp_path / "pgrep").chmod(0o755)
    (tmp_path / "processes").write_text(processes + "\n")
    (tmp_path / "run.log").write_text("step 3\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", remote], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [said, "step 3"]


# Saves for two seconds after SIGTERM, and prints meanwhile, as a run does.
SAVING_PYTHON = f"""#!{sys.executable}
import signal, sys, time
def save(*signal):
    for n in range(4):
        time.sleep(0.5)
        print("saving", n, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("begins", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("failing", ["fetch", "checkout", "pull", "nothing"])
def test_a_host_that_cannot_get_the_new_code_is_not_set_up_with_the_old(failing, tmp_path):
    remote = get_remote_command(script("setup.sh", DRY_RUN="1").stdout)
    for folder in ("ctxjax", "bin", ".local/bin", "venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("bin/git", "bin/python3", ".local/bin/uv", "venv/bin/python"):
        fake = tmp_path / name
        fake.write_text(f'#!/usr/bin/env bash\necho "{fake.name} $*" >> ~/calls\n[ "$3" != {failing} ]\n')
        fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=environment, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode == 0) == (failing == "nothing")
    assert failing in calls[-1] if failing != "nothing" else calls[-1].startswith("python -c")


@pytest.fixture
def host(tmp_path):
    """host(arguments, BRANCH): sets up a host as setup.sh does, with a real clone; returns its commit.
    ``host.old`` has the tag v1, ``host.new`` is the newest."""
    repository, home = tmp_path / "repository", tmp_path / "home"

    def git(folder: Path, *arguments: str) -> str:
        line = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    repository.mkdir()
    git(repository, "init", "-q", "--initial-branch=main")
    commits = []
    for number in range(2):
        git(repository, "commit", "-q", "--allow-empty", "-m", str(number))
        git(repository, "tag", f"v{number + 1}")
        commits.append(git(repository, "rev-parse", "HEAD"))
    for name in ("bin/python3", ".local/bin/uv", "venv/bin/python"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f'#!/usr/bin/env bash\n[ "$1" = -c ] || exit 0\nexec {sys.executable} "$@"\n')
        (home / name).chmod(0o755)
    (home / "venv/bin/python").write_text("#!/usr/bin/env bash\n")

    def set_up(*arguments: str, branch: str = "main") -> str:
        done = script("setup.sh", *arguments, DRY_RUN="1", BRANCH=branch, REPOSITORY=str(repository))
        environment = {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "HOME": str(home)}
        subprocess.run(["bash", "-c", get_remote_command(done.stdout)], cwd=home, env=environment, check=True)
        return git(home / "ctxjax", "rev-parse", "HEAD")

    set_up.old, set_up.new = commits
    return set_up


def test_a_tag_is_set_up_again_and_a_branch_is_updated(host):
    assert [host(branch=name) for name in ("v1", "v1", "main", "v1", "main")] == [
        host.old, host.old, host.new, host.old, host.new,
    ]  # fmt: skip


def test_a_run_that_goes_on_elsewhere_has_the_code_of_its_last_start(host, tmp_path):
    workdir = tmp_path / "a run"
    workdir.mkdir()
    assert host(f"--workdir={workdir}") == host.new  # it has computed nothing yet
    (workdir / "run.json").write_text(json.dumps({"commit": f"{host.old} with changes 12ab", "earlier_starts": []}))
    assert host(f"--workdir={workdir}") == host.old
    assert host() == host.new


@pytest.mark.parametrize("is_ssh_lost", [False, True])
def test_a_host_that_shuts_down_lets_the_run_save_and_its_log_is_whole(is_ssh_lost, tmp_path):
    """A shutdown sends SIGTERM and SIGHUP to all processes of the ssh session, at once."""
    remote = get_remote_command(script("run.sh", "--config=c", "--workdir=w", DRY_RUN="1").stdout)
    (tmp_path / "ctxjax").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").write_text(SAVING_PYTHON)
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    environment, log = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, tmp_path / "run.log"
    line = ["bash", "-c", remote]
    with subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True) as run:
        assert run.stdout.readline() == b"begins\n"
        if is_ssh_lost:
            run.stdout.close()
        time.sleep(0.3)
        for number in (signal.SIGTERM, signal.SIGHUP):
            os.killpg(run.pid, number)
        assert run.wait(30) == 75
    assert log.read_text().split("\n") == ["begins", *(f"saving {n}" for n in range(4)), ""]


@pytest.fixture
def cloud(tmp_path):
    """cloud(codes): runs run.sh --resume in a cloud whose runs end with these codes; (result, cloud commands).

    ``refusals``: the errors that the first questions for a state are answered with.
    """

    def run(*codes: int, refusals: tuple[str, ...] = ()):
        gcloud = tmp_path / "gcloud"
        gcloud.write_text(CLOUD)
        gcloud.chmod(0o755)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "state").write_text("READY\n")
        (tmp_path / "refusals").write_text("".join(f"{text}\n" for text in refusals))
        places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CLOUD": str(tmp_path), "LOGS": str(tmp_path / "logs")}
        done = script("run.sh", "--resume", "--config=c", "--workdir=w", WAIT="0", **places)
        return done, (tmp_path / "calls").read_text().splitlines()

    return run


def test_a_run_that_was_told_to_stop_is_repeated_where_it_is(cloud, tmp_path):
    done, calls = cloud(75, 0)
    assert done.returncode == 0, done.stderr
    assert sum("ctxjax.main" in call for call in calls) == 2 and not any("create" in call for call in calls)
    assert (tmp_path / "logs" / "n.log").read_text() == "step of the run\n" * 2


def test_a_slice_that_was_taken_away_is_asked_for_again_and_the_run_goes_on(cloud):
    done, calls = cloud(143, 0)
    assert done.returncode == 0, done.stderr
    kinds = [kind for call in calls for kind in ("delete", "create", "device_count", "ctxjax.main") if kind in call]
    assert kinds == ["ctxjax.main", "delete", "create", "device_count", "ctxjax.main"]
    assert "-f w/run.json" in next(call for call in calls if "device_count" in call)


UNAVAILABLE = "UNAVAILABLE: 503: The service is currently unavailable."


@pytest.mark.parametrize("code", [75, 1])
def test_a_slice_whose_state_is_unknown_is_asked_for_again_and_not_deleted(code, cloud):
    done, calls = cloud(code, 0, refusals=(UNAVAILABLE, UNAVAILABLE))
    assert not [call for call in calls if "delete" in call or "create" in call]
    assert done.returncode == (0 if code == 75 else 1)
    assert done.stderr.count("the state of n is unknown, asking again: ERROR: (gcloud.compute.tpus.tpu-vm.") == 2


def test_a_slice_that_does_not_exist_any_more_is_created_again(cloud):
    missing = "NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found."
    done, calls = cloud(143, 0, refusals=(UNAVAILABLE, missing, missing))
    assert done.returncode == 0, done.stderr
    assert sum("queued-resources create" in call for call in calls) == 1


def test_a_run_that_fails_is_not_repeated(cloud):
    done, calls = cloud(2, 0)
    assert done.returncode == 2 and "failed with exit code 2" in done.stderr
    assert sum("ctxjax.main" in call for call in calls) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "settings", "message"),
    [
        ("create.sh", (), {"ZONE": ""}, "ZONE is not set"),
        ("create.sh", (), {"TYPE": "v9-8"}, "TYPE=v9-8 is not known"),
        ("create.sh", ("--now",), {"SLICES": "2"}, "--now makes one slice"),
        ("create.sh", ("--later",), {}, "unknown argument --later"),
        ("setup.sh", ("v1",), {}, "unknown argument v1; tpu/setup.sh [--workdir=DIR]"),
        ("run.sh", ("--config=c",), {}, "--workdir is missing"),
        ("run.sh", ("--config=c", "--workdir=gs://b/r"), {}, "--workdir is a folder, not an address: set BUCKET"),
        ("run.sh", (), {}, "nothing to run"),
        ("setup.sh", (), {"CTXJAX_TPU": "/no/file"}, "CTXJAX_TPU=/no/file cannot be read"),
    ],
)
def test_a_bad_setting_is_named(name, arguments, settings, message):
    done = script(name, *arguments, DRY_RUN="1", **settings)
    assert done.returncode == 2 and message in done.stderr and "gcloud" not in done.stdout


def submit(folder: Path, code: int) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run slurm.sbatch as Slurm runs it, with a run that ends with ``code``. Return (result, Slurm's commands)."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "activate").touch()
    for name, end in (("srun", code), ("scontrol", 0)):
        (bin_folder / name).write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n'
            f'echo "${{SRUN_CPUS_PER_TASK:-}}" >> {folder}/cpus\nexit {end}\n'
        )
        (bin_folder / name).chmod(0o755)
    settings = {
        "VENV": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NAME": "ctxjax",
    }
    done = script("slurm.sbatch", "--config=c", "--workdir=w", PATH=f"{bin_folder}:{os.environ['PATH']}", **settings)
    return done, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (2, False)])
def test_a_slurm_job_that_saved_its_state_is_queued_again(code, requeued, tmp_path):
    done, calls = submit(tmp_path, code)
    assert done.returncode == code, done.stderr
    assert calls[0].endswith("python -m ctxjax.main --config=c --workdir=w")
    assert calls[1:] == ["scontrol requeue 7"] * requeued


def test_a_task_that_ends_with_75_does_not_get_the_others_killed(tmp_path):
    """srun ends with the largest exit code; that of a killed task is 137, after which nothing would be queued again."""
    assert "--kill-on-bad-exit=0" in submit(tmp_path, 0)[1][0]  # 0 also where the cluster's default is 1


def test_a_task_has_the_cpus_of_the_job(tmp_path):
    """srun does not read sbatch's --cpus-per-task since Slurm 22.05: it would give a task one CPU."""
    submit(tmp_path, 0)
    assert (tmp_path / "cpus").read_text() == "32\n"


def test_a_slurm_jobs_log_needs_no_folder_and_survives_the_requeue():
    options = [line.split()[1] for line in (SCRIPTS / "slurm.sbatch").read_text().splitlines() if "#SBATCH -" in line]
    (output,) = (option.removeprefix("--output=") for option in options if option.startswith("--output="))
    assert "/" not in output and "--open-mode=append" in options and "--requeue" in options


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    files = [str(path) for path in sorted(SCRIPTS.iterdir()) if path.suffix in (".sh", ".sbatch")]
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
