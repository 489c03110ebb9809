"""One process of those that share 4-bit weights; started by ``test_fsdp_4bit.py``.

``python fsdp_4bit_worker.py DEVICE RANK WORLD FOLDER CASE...`` runs the cases, functions of this module, and writes the
names of those that passed to ``FOLDER/passed-DEVICE-WORLD-RANK``. DEVICE is ``cpu`` or ``cuda``, where each process has
a GPU of its own.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from bitsandbytes.nn import Linear4bit, Params4bit

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FULL = StateDictOptions(full_state_dict=True)
DEVICE = torch.device(sys.argv[1]) if sys.argv[1] == "cpu" else torch.device(sys.argv[1], int(sys.argv[2]))


@functools.cache
def storages() -> tuple[torch.dtype, ...]:
    """The dtypes of packed codes. FSDP2 itself refuses parameters of integers in some releases, 2.11 among them."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)])
    try:
        fully_shard(module, mesh=init_device_mesh(DEVICE.type, (dist.get_world_size(),)))
    except RuntimeError:
        return FLOATS
    return (torch.uint8, *FLOATS)


def foreach_copy_through_float(targets: Any, sources: Any, non_blocking: bool = False) -> None:
    """``torch._foreach_copy_`` as the CUDA kernel does it: one and the same NaN for all of them."""
    for target, source in zip(targets, sources, strict=True):
        if source.is_floating_point():
            values = source.to(torch.float32, copy=True)
            source = values.masked_fill_(values.isnan(), torch.nan)
        target.copy_(source)


def model_of(storage: torch.dtype) -> torch.nn.Sequential:
    """An adapter, a layer with every pattern of 16 bits, and one with fewer rows than some processes can share."""
    torch.manual_seed(0)
    options = {"quant_type": "nf4", "quant_storage": storage, "compute_dtype": torch.float32}
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 256),
        Linear4bit(256, 1024, **options),
        torch.nn.Tanh(),
        torch.nn.Linear(1024, 8),
        Linear4bit(8, 2, bias=False, **options),
    ).to("cpu")
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    model[1].weight.data = patterns.view(storage).view(-1, 1)
    return model.to(DEVICE)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def whole(tensor: Any) -> torch.Tensor:
    """A tensor that may be spread over the processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def packed_layers(model: torch.nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def shard(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """Shard the layer with all patterns on its own, and the rest together."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    fully_shard(model[1], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def step(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Result of a forward pass, and the gradients of all parameters that have some."""
    model.zero_grad()
    result = model(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    result.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return result.detach(), [whole(gradient).to(DEVICE) for gradient in gradients]


def check_steps(storage: torch.dtype, **options: Any) -> None:
    """Two steps of a sharded model give what one process gets, and all layers get their bytes."""
    alone = model_of(storage)
    expected = [raw(layer.weight) for layer in packed_layers(alone)]
    model = shard(model_of(storage), **options)
    gathered: list[torch.Tensor] = []
    for layer in packed_layers(model):
        layer.register_forward_pre_hook(lambda module, _args: gathered.append(raw(module.weight).clone()))
    result, gradients = step(alone)
    for _ in range(2):
        gathered.clear()
        sharded_result, sharded_gradients = step(model)
        assert all(torch.equal(a, b) for a, b in zip(gathered, expected, strict=True))
        torch.testing.assert_close(sharded_result, result)
        assert len(sharded_gradients) == 5
        torch.testing.assert_close(sharded_gradients, gradients)


def check_weights(model: torch.nn.Module, alone: torch.nn.Module) -> None:
    """The weights of a sharded model have the bytes of the other, and so have those that its layers get."""
    for layer, other in zip(packed_layers(model), packed_layers(alone), strict=True):
        assert torch.equal(raw(layer.weight.full_tensor()), raw(other.weight))
        assert layer.weight.dtype == other.weight.dtype
    torch.testing.assert_close(step(model), step(alone))


def steps() -> None:
    for storage in storages():
        check_steps(storage)


def steps_without_resharding() -> None:
    for storage in storages():
        check_steps(storage, reshard_after_forward=False)


def mixed_precision() -> None:
    for storage in FLOATS:
        check_steps(storage, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    # The other parameters are rounded, so that only the bytes can be compared.
    for storage in storages():
        model = shard(model_of(storage), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        model.unshard()
        model[1].unshard()
        for layer, other in zip(packed_layers(model), packed_layers(model_of(storage)), strict=True):
            assert torch.equal(raw(layer.weight), raw(other.weight))
        assert model[0].weight.dtype == torch.bfloat16


def offload() -> None:
    for storage in storages():
        for pinned in {False, DEVICE.type == "cuda"}:
            check_steps(storage, offload_policy=CPUOffloadPolicy(pin_memory=pinned))


def local_parts() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for storage in storages():
        alone, model = model_of(storage), shard(model_of(storage))
        for layer, other in zip(packed_layers(model), packed_layers(alone), strict=True):
            parts = torch.chunk(other.weight.data, world)
            part = layer.weight.to_local()
            assert part.dtype == storage
            assert torch.equal(raw(part), raw(parts[rank]) if rank < len(parts) else raw(part[:0]))
            assert part.view(torch.uint8).numel() == part.numel() * part.element_size()


def full_state() -> None:
    for storage in storages():
        alone, model = model_of(storage), shard(model_of(storage))
        expected = alone.state_dict()
        step(model)
        sharded = model.state_dict()
        assert list(sharded) == list(expected)
        for state in (get_model_state_dict(model, options=FULL), get_model_state_dict(model)):
            assert state.keys() == expected.keys()
            for key, value in state.items():
                value = whole(value)
                assert type(value) is torch.Tensor
                assert torch.equal(raw(value), raw(expected[key])), key
        check_weights(model, alone)


def other_model(storage: torch.dtype) -> torch.nn.Module:
    """A sharded model with other weights and statistics."""
    model = model_of(storage)
    for layer in packed_layers(model):
        layer.weight.data.view(torch.uint8).fill_(0x77)
        layer.quant_state.absmax.fill_(1)
    return shard(model)


def loading() -> None:
    for storage in storages():
        alone = model_of(storage)
        model = other_model(storage)
        assert not model.load_state_dict(shard(model_of(storage)).state_dict()).missing_keys
        check_weights(model, alone)
        model = other_model(storage)
        model.load_state_dict(shard(model_of(storage)).state_dict(), assign=True)
        check_weights(model, alone)
        model = other_model(storage)
        set_model_state_dict(model, copy.deepcopy(alone.state_dict()), options=FULL)
        check_weights(model, alone)


def broadcast() -> None:
    """The statistics do not get to the other processes, which must not go unnoticed there."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    first = dist.get_rank() == 0
    for storage in storages():
        state = model_of(storage).state_dict() if first else {}
        refusal = contextlib.nullcontext() if first else pytest.raises(RuntimeError, match=r"weight\.absmax")
        with refusal:
            set_model_state_dict(other_model(storage), state, options=options)


def checkpoint(folder: Path) -> None:
    for storage in storages():
        place = folder / f"checkpoint-{DEVICE.type}-{storage}"
        dcp.save(get_model_state_dict(shard(model_of(storage))), checkpoint_id=place)
        model = other_model(storage)
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=place)
        set_model_state_dict(model, state)
        check_weights(model, model_of(storage))


def conversions() -> None:
    for storage in storages():
        model = shard(model_of(storage))
        alone = model_of(storage)
        for each in (model, alone):
            each.to(torch.bfloat16).to(torch.float32)
        check_weights(model, alone)
        model.to_empty(device=DEVICE)
        model.load_state_dict(shard(model_of(storage)).state_dict())
        check_weights(model, model_of(storage))


def from_meta() -> None:
    for storage in storages():
        model = model_of(storage)
        for layer in packed_layers(model):
            layer.weight = layer.weight.to("meta")
        model = shard(model.to("meta"))
        model.load_state_dict(shard(model_of(storage)).state_dict(), assign=True)
        check_weights(model, model_of(storage))


def copies() -> None:
    for storage in storages():
        layer = copy.deepcopy(model_of(storage)[1])
        assert isinstance(layer.weight, Params4bit)
        sharded = shard(model_of(storage))[1].weight
        assert torch.equal(raw(copy.deepcopy(sharded).full_tensor()), raw(layer.weight))


def main() -> None:
    kind, rank, world, folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "cpu":
        torch._foreach_copy_ = foreach_copy_through_float
    else:
        torch.cuda.set_device(DEVICE)
    # Gradients of offloaded parameters are gathered on the CPU.
    talk = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    store = f"file://{folder}/store-{kind}-{world}"
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group(talk, init_method=store, rank=int(rank), world_size=int(world), timeout=minute)
    with (Path(folder) / f"passed-{kind}-{world}-{rank}").open("w", buffering=1) as passed:
        for case in cases:
            globals()[case](*([Path(folder)] if case == "checkpoint" else []))
            print(case, file=passed)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
