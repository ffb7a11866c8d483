"""Sends published weights to SGLang servers. A program of its own: the only one with torch, fed by files in memory.

`rollout.refit.Sender` runs this file with an interpreter that has torch. Requests arrive as JSON lines on standard
input and run in threads; each is answered by one JSON line on standard output. The program ends with its input.

    {"op": "buckets", "path"}                     -> {"buckets": [{"file", "names", "dtypes", "shapes"}]}
    {"op": "listen", "host"}                      -> {"port", "backend"}: the store where a server joins a group
    {"op": "join", "port", "group", "world"}      -> {}: the group, as rank 0, when all servers' ranks are there
    {"op": "send", "group", "path", "bucket"}     -> {}: one bucket is broadcast in the group
    {"op": "share", "path", "bucket", "reuse"}    -> {"payload"}: the bucket in shared memory, for local servers
    {"op": "leave", "group"}                      -> {}

A bucket is one safetensors file: its data section crosses in one piece, mapped and not copied (gloo), or through the
GPU (NCCL).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import base64
import datetime
import io
import json
import pathlib
import sys
import threading
import traceback
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import distributed_c10d

DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
TIMEOUT = datetime.timedelta(seconds=float(sys.argv[1]) if len(sys.argv) > 1 else 600)
BACKEND = "nccl" if torch.cuda.is_available() else "gloo"

_stores: dict[int, dist.TCPStore] = {}
_groups: dict[str, Any] = {}
_shared: dict[int, tuple[str, torch.Tensor]] = {}  # bucket -> path of its content, shared memory
_making, _sharing, _writing = threading.Lock(), threading.Lock(), threading.Lock()


def contents(file: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, in the order of their data, and the offset of the data."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        head = json.loads(opened.read(size))
    head.pop("__metadata__", None)
    return dict(sorted(head.items(), key=lambda item: item[1]["data_offsets"])), 8 + size


def files(path: str) -> list[pathlib.Path]:
    """The buckets of a published version."""
    return sorted(pathlib.Path(path).glob("*.safetensors"))


def data(file: pathlib.Path) -> torch.Tensor:
    """The data section of a file as bytes, mapped."""
    start, size = contents(file)[1], file.stat().st_size
    return torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)[start:]


def buckets(path: str) -> dict[str, Any]:
    """What a server must know about each bucket before it arrives."""
    described = []
    for file in files(path):
        tensors = contents(file)[0]
        described.append(
            {
                "file": file.name,
                "names": list(tensors),
                "dtypes": [DTYPES[tensor["dtype"]] for tensor in tensors.values()],
                "shapes": [tensor["shape"] for tensor in tensors.values()],
            }
        )
    return {"buckets": described}


def listen(host: str) -> dict[str, Any]:
    """Opens a store on a free port."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    _stores[store.port] = store
    return {"port": store.port, "backend": BACKEND}


def join(port: int, group: str, world: int) -> dict[str, Any]:
    """Forms a group with the ranks of one server, as `init_custom_process_group` of SGLang does on the other side."""
    store = dist.PrefixStore(group, _stores.pop(port))
    with _making:  # it changes global state of torch
        helper: Any = distributed_c10d._new_process_group_helper
        made, _ = helper(world, 0, [], dist.Backend(BACKEND), store, group_name=group, timeout=TIMEOUT)
        distributed_c10d._world.pg_group_ranks[made] = {rank: rank for rank in range(world)}
    _groups[group] = made
    return {}


def send(group: str, path: str, bucket: int) -> dict[str, Any]:
    """Broadcasts the bytes of a bucket."""
    content = data(files(path)[bucket])
    if BACKEND == "nccl":
        content = content.cuda()
    dist.broadcast(content, src=0, group=_groups[group])
    if BACKEND == "nccl":
        torch.cuda.synchronize()
    return {}


def share(path: str, bucket: int, reuse: bool) -> dict[str, Any]:
    """Copies a bucket into shared memory and returns a pickle that maps it: SGLang's serialised named tensors.

    `reuse` overwrites the memory of the version before, which no server may be reading any more: new memory is slower.
    """
    file = files(path)[bucket]
    with _sharing:
        content, (shared, memory) = data(file), _shared.get(bucket, ("", torch.empty(0)))
        if shared != path:
            if not reuse or memory.numel() != content.numel():
                storage = torch.UntypedStorage._new_shared(content.numel())
                memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            memory.copy_(content)
            _shared[bucket] = path, memory
    named = [
        (
            name,
            memory[slice(*tensor["data_offsets"])].view(getattr(torch, DTYPES[tensor["dtype"]])).view(tensor["shape"]),
        )
        for name, tensor in contents(file)[0].items()
    ]
    pickled = io.BytesIO()
    ForkingPickler(pickled).dump(named)
    return {"payload": base64.b64encode(pickled.getvalue()).decode()}


def leave(group: str) -> dict[str, Any]:
    """Closes the connections of a group; an unknown one is ignored."""
    made = _groups.pop(group, None)
    if made is not None:
        with _making:
            dist.destroy_process_group(made)
    return {}


OPERATIONS = {function.__name__: function for function in (buckets, listen, join, send, share, leave)}


def answer(request: dict[str, Any]) -> None:
    """Runs one request and prints its answer."""
    number, operation = request.pop("id"), request.pop("op")
    try:
        reply = OPERATIONS[operation](**request)
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    with _writing:
        print(json.dumps({"id": number, **reply}), flush=True)


def main() -> None:
    """Serves requests until standard input ends."""
    torch.multiprocessing.set_sharing_strategy("file_system")  # a file descriptor cannot reach an unrelated process
    for line in sys.stdin:
        threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
