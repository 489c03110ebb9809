"""transformers' Trainer with the optimizers that it takes from bitsandbytes."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import bitsandbytes as bnb

pytestmark = pytest.mark.model

#: Name in ``TrainingArguments.optim`` -> class and options that the optimizer must have, and a learning rate.
OPTIMIZERS = {
    "adamw_bnb_8bit": (bnb.optim.AdamW, 8, False, 2e-4),
    "paged_adamw_8bit": (bnb.optim.AdamW, 8, True, 2e-4),
    "paged_adamw_32bit": (bnb.optim.AdamW, 32, True, 2e-4),
    "lion_8bit": (bnb.optim.Lion, 8, False, 5e-5),
    "paged_lion_32bit": (bnb.optim.Lion, 32, True, 5e-5),
    "rmsprop_bnb_8bit": (bnb.optim.RMSprop, 8, False, 5e-5),
    "ademamix_8bit": (bnb.optim.AdEMAMix, 8, False, 2e-4),
}


class Passages(Dataset):
    """Four passages of 32 tokens."""

    def __init__(self, ids):
        self.rows = ids[0, :128].view(4, 32)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.fixture
def trainer(tiny_folder, text_ids, tmp_path):
    """``trainer(optim, **options)``: a Trainer of the small model that does four steps on the CPU."""

    def make(optim, **options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "optim": optim,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            **options,
        }
        return Trainer(model=model, args=TrainingArguments(**settings), train_dataset=Passages(text_ids))

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def states(trainer):
    """The bitsandbytes optimizer below accelerate's wrapper, and its state by parameter name."""
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer, {name: optimizer.state[p] for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_training_lowers_the_loss(trainer, optim):
    kind, bits, paged, rate = OPTIMIZERS[optim]
    run = trainer(optim, learning_rate=rate)
    run.train()
    optimizer, state = states(run)
    assert type(optimizer) is kind
    assert (optimizer.args.optim_bits, optimizer.is_paged) == (bits, paged)
    assert losses(run)[-1] < losses(run)[0] - 0.3
    projection = state["model.layers.0.mlp.up_proj.weight"]["state1"]
    assert projection.dtype == (torch.uint8 if bits == 8 else torch.float32)
    # Trainer asks GlobalOptimManager for 32-bit state of every embedding.
    assert state["model.embed_tokens.weight"]["state1"].dtype == torch.float32


def test_resuming_continues_as_if_uninterrupted(trainer):
    whole = trainer("adamw_bnb_8bit", learning_rate=2e-4, seed=1)
    whole.train()
    first = trainer("adamw_bnb_8bit", learning_rate=2e-4, seed=1, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer("adamw_bnb_8bit", learning_rate=2e-4, seed=1)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert losses(second)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-5)
    for (name, expected), other in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-6, msg=name)
