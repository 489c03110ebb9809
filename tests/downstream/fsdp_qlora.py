"""One process of a sharded QLoRA step; ``test_fsdp.py`` starts two of them and one that is alone.

    python fsdp_qlora.py CHECKPOINT RANK PROCESSES STORE OUT DEVICE

DEVICE is ``cpu`` or ``cuda``, where each process has a GPU of its own. Rank 0 writes the loss and the whole gradients
of the adapters to OUT.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bitsandbytes as bnb


def build(folder: str, device: torch.device) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device, quantization_config=config
    )
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, adapters, autocast_adapter_dtype=False)


def shard(model: torch.nn.Module, processes: int, kind: str) -> None:
    mesh = init_device_mesh(kind, (processes,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(folder: str, rank: int, processes: int, store: str, out: str, kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    talk = "gloo" if kind == "cpu" else "nccl"
    dist.init_process_group(talk, init_method=f"file://{store}", rank=rank, world_size=processes)
    model = build(folder, device)
    if processes > 1:
        shard(model, processes, kind)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert isinstance(layer, bnb.nn.Linear4bit)
        assert layer.weight.to_local().numel() == layer.weight.numel() // processes
    losses = []
    for _ in range(2):
        model.zero_grad()
        ids = torch.arange(40, 72, device=device).view(1, -1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            gradients[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).cpu()
    if rank == 0:
        torch.save({"losses": losses, "gradients": gradients}, Path(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6])
