"""Environments of two processes of four fake devices each, as cluster managers set them."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading

from tests.launch.runs import ROOT, environment


def free_port(first=0, last=0):
    """A free port; with limits, the first free one between them."""
    for port in range(first, last + 1):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise RuntimeError("no free port")


@contextlib.contextmanager
def slurm():
    """Two nodes with one task and four GPUs each; the coordinator's port follows from the job's number."""
    port = free_port(61440 + os.getpid() % 3000, 65535)
    common = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    common |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}
    yield [common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"} for rank in range(2)]


@contextlib.contextmanager
def tpu_vm():
    """A Cloud TPU pod of two workers: only the metadata server of each knows about the other."""
    servers = [_metadata(worker) for worker in range(2)]
    port = str(free_port())
    try:
        yield [
            {
                "JAX_FORCE_TPU_INIT": "1",
                "GCE_METADATA_IP": f"127.0.0.1:{server.server_port}",
                "JAX_COORDINATOR_PORT": port,
            }
            for server in servers
        ]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _metadata(worker):
    values = {"agent-worker-number": str(worker), "worker-network-endpoints": "127.0.0.1,127.0.0.1", "tpu-env": ""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = values.get(self.path.rpartition("/")[2])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def tpu_jobset():
    """A GKE JobSet of two TPU hosts: the webhook sets the hosts' names and the chips of each; no metadata server."""
    port = str(free_port())
    common = {"JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "localhost,localhost", "JAX_COORDINATOR_PORT": port}
    common |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1"}
    common |= {"GCE_METADATA_IP": "127.0.0.1:1"}  # nothing listens there: a query raises an error
    yield [common | {"TPU_WORKER_ID": str(rank), "JOB_COMPLETION_INDEX": str(rank)} for rank in range(2)]


@contextlib.contextmanager
def gpu_jobset():
    """The three variables that launch/clusters/gke_gpu_jobset.yaml sets."""
    common = {"COORDINATOR_ADDRESS": f"localhost:{free_port()}", "NUM_PROCESSES": "2", "DEVICES_PER_PROCESS": "4"}
    yield [common | {"PROCESS_ID": str(rank), "KUBERNETES_SERVICE_HOST": "10.0.0.1"} for rank in range(2)]


ALL = {f.__name__: f for f in (slurm, tpu_vm, tpu_jobset, gpu_jobset)}


def start(arguments, environments, *, devices=4, **variables):
    """Starts the entry point in every environment; returns (return code, output, error) of each process."""
    command = [sys.executable, "-m", "tests.clusters.entry", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen(command, env=environment(devices) | own | variables, **pipes) for own in environments]
    outputs = [process.communicate(timeout=800) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]
