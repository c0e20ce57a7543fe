"""Self-distillation in a Trainer, sharded or in one process: what test_trainer.py starts by `accelerate launch`.

    accelerate launch --config_file tests/fsdp2.yaml tests/sharded.py FACTS OUT
FACTS: a fact folder of the invented world. Leaves a checkpoint and losses.json, with [loss, KL] of each step, in OUT.
"""
import copy
import json
import os
import sys
from pathlib import Path

import torch
from conftest import trainer_class
from transformers import TrainingArguments

import sft_selfdistill as script


def collate(examples):
    """A batch as the Trainer's models take it."""
    batch = script.collate(examples, "cpu")
    labels = batch["ids"].masked_fill(~batch["supervised"], -100)
    return {"input_ids": batch["ids"], "attention_mask": batch["real"], "labels": labels}


def without_dropout(model):
    """The model, with every dropout at 0: a Trainer puts it into training mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def arguments(out, **settings):
    """Quiet TrainingArguments that log every step."""
    return TrainingArguments(str(out), **{"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
                                          "remove_unused_columns": False, "disable_tqdm": True} | settings)


def losses_of(trainer):
    """[[loss, KL], …] by step."""
    return [[row["loss"], row["kl"]] for row in trainer.state.log_history if "loss" in row]


def train(facts, out, rows_a_step=8):
    """Two passes over the new facts; the result is written to `out`."""
    model, tokenizer = script.load_model(f"{facts}/base", "cpu")
    without_dropout(model)
    examples = script.read_examples(f"{facts}/train_unknown.jsonl", tokenizer, 128)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = arguments(out, per_device_train_batch_size=rows_a_step // 2 // processes, gradient_accumulation_steps=2,
                     num_train_epochs=2, learning_rate=1e-3)
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:
        # accelerate shards on accelerators alone. Told that the CPUs are some, it does it over gloo.
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, fsdp2_prepare_model
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = trainer_class()(model=model, args=args, train_dataset=examples, data_collator=collate)
    trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if sharded:
        trainer.teacher = fsdp2_prepare_model(trainer.accelerator, trainer.teacher)
    trainer.train()
    trainer.save_model(out)
    if trainer.accelerator.is_main_process:
        kind = type(next(trainer.model.parameters())).__name__
        Path(out, "losses.json").write_text(json.dumps({"weights": kind, "losses": losses_of(trainer)}))


if __name__ == "__main__":
    train(*sys.argv[1:])
