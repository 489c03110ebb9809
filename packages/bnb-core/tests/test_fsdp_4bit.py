"""4-bit weights under FSDP2: every pattern of the packed bytes survives, whatever dtype they are stored as."""

from __future__ import annotations

import copy
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.shard4bit import Shard4bit

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
#: Functions of the worker. Three processes do not divide the rows, and one of them gets none of the small layer.
CASES = {
    2: (
        "local_parts",
        "steps",
        "steps_without_resharding",
        "mixed_precision",
        "offload",
        "full_state",
        "loading",
        "checkpoint",
        "conversions",
        "from_meta",
        "copies",
        "broadcast",
    ),
    3: ("local_parts", "steps", "full_state", "loading"),
}


#: Those that need the stand-in for the CUDA kernel, and those that have the kernel itself.
RUNS = [
    *(("cpu", world, case) for world, cases in CASES.items() for case in cases),
    *(pytest.param("cuda", 2, case, marks=pytest.mark.multigpu) for case in CASES[2]),
]


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """``passed(device, world)``: the cases that every process passed, and what the processes wrote."""
    folder = tmp_path_factory.mktemp("fsdp")
    return functools.cache(lambda device, world: launch(device, world, folder))


def launch(device: str, world: int, folder: Path) -> tuple[list[str], str]:
    worker = Path(__file__).with_name("fsdp_4bit_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [folder / f"log-{device}-{world}-{rank}" for rank in range(world)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(worker), device, str(rank), str(world), str(folder), *CASES[world]]
            with log.open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"passed-{device}-{world}-{rank}" for rank in range(world)]
    names = [file.read_text().split() if file.exists() else [] for file in files]
    shared = [name for name in CASES[world] if all(name in one for one in names)]
    return shared, "\n".join(log.read_text()[-2000:] for log in logs)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize(("device", "world", "case"), RUNS)
def test_processes_share_weights(passed, device, world, case):
    cases, output = passed(device, world)
    assert case in cases, output


class Mesh:
    """As much of a device mesh as an all-gather needs."""

    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


def patterns(dtype: torch.dtype, columns: int = 1) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, columns)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_only_packed_floats_give_shards():
    def zeros(layer):
        return type(layer.weight.new_zeros((3, 1)))

    assert zeros(Linear4bit(64, 64, quant_storage=torch.bfloat16)) is torch.Tensor
    assert zeros(Linear4bit(64, 64).to("cpu")) is torch.Tensor
    packed = Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu")
    assert zeros(packed) is Shard4bit
    assert type(packed.weight.new_zeros((3, 1), dtype=torch.float32)) is torch.Tensor
    assert type(torch.zeros_like(packed.weight)) is torch.Tensor


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_and_copies_are_shards(dtype):
    whole = patterns(dtype)
    shard = Shard4bit.of(whole.clone())
    assert shard.dtype == dtype and shard.shape == whole.shape and shard.stride() == whole.stride()
    for same in (shard.detach(), shard.view(-1), shard.clone(), shard.to(dtype), shard.narrow(0, 0, len(whole))):
        assert type(same) is Shard4bit
        assert torch.equal(raw(same), raw(whole))
    for other in (shard.new_zeros(3), torch.empty_like(shard), shard[:3], *shard.split(30000), shard.to("meta")):
        assert type(other) is Shard4bit and other.dtype == dtype
    copied = shard.new_zeros(shard.shape)
    assert copied.copy_(whole) is copied
    assert torch.equal(raw(copied), raw(whole))
    assert shard.zero_() is shard
    assert not raw(shard).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_ops_see_numbers(dtype):
    values = torch.tensor([1.5, -2.0], dtype=dtype)
    shard = Shard4bit.of(values)
    assert type(shard + 1) is torch.Tensor
    assert torch.equal(shard + 1, values + 1)
    assert torch.equal(shard.to(torch.float64), values.to(torch.float64))
    assert torch.equal(torch.cat([shard, shard]), torch.cat([values, values]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_saves_as_a_plain_tensor(dtype):
    whole = patterns(dtype)
    file = io.BytesIO()
    torch.save(Shard4bit.of(whole), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(raw(loaded), raw(whole))
    copied = copy.deepcopy(Shard4bit.of(whole))
    assert type(copied) is Shard4bit
    assert torch.equal(raw(copied), raw(whole))


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_gather_moves_padded_integers(dtype, columns):
    whole = patterns(dtype, columns)
    sent = [Shard4bit.of(part).fsdp_pre_all_gather(Mesh(5), whole.shape)[0][0] for part in torch.chunk(whole, 5)]
    assert {part.shape for part in sent} == {(-(-len(whole) // 5), columns)}
    assert not sent[0].is_floating_point() and sent[0].itemsize == dtype.itemsize
    gathered = torch.cat(sent)
    shard = Shard4bit.of(whole[:0])
    result, owned = shard.fsdp_post_all_gather((gathered,), None, torch.float64)
    assert owned == () and result.dtype == dtype
    assert result.data_ptr() == gathered.data_ptr()
    assert torch.equal(raw(result[: len(whole)]), raw(whole))
    assert shard.fsdp_post_all_gather((gathered,), None, torch.float64, out=result) is None
    with pytest.raises(RuntimeError, match="other memory"):
        shard.fsdp_post_all_gather((gathered,), None, torch.float64, out=result.clone())


def test_old_releases_tell_the_mesh_alone():
    shard = Shard4bit.of(patterns(torch.bfloat16))
    (sent,), _metadata = shard.fsdp_pre_all_gather(Mesh(2))
    assert sent.shape == shard.shape
