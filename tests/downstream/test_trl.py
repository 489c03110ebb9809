"""QLoRA through trl's trainer on the first layers of the real model."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import bitsandbytes as bnb

from .conftest import TEXT, load

pytestmark = pytest.mark.model


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_supervised_fine_tuning(tiny_folder, tokenizer, tmp_path, name):
    torch.manual_seed(0)
    paragraphs = [line for line in TEXT.read_text().splitlines() if len(line) > 200][:4]
    trainer = SFTTrainer(
        model=load(tiny_folder, name),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": paragraphs}),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            optim="paged_adamw_8bit",
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            max_steps=6,
            per_device_train_batch_size=4,
            max_length=48,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    kind = bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit
    assert any(isinstance(module, kind) for module in trainer.model.modules())
