"""Self-distillation in a Trainer, on one process or sharded; helpers for test_trainer.py.

test_trainer.py starts this file on two processes:

    accelerate launch --config_file tests/fsdp2.yaml tests/sharded.py FACTS OUT

FACTS: a fact folder of the synthetic world
OUT: receives a checkpoint, and losses.json with the loss and the KL of each step
"""
import copy
import json
import os
import sys
from pathlib import Path

import torch
from conftest import trainer_class
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainingArguments

import sft_selfdistill as script


def collate(examples):
    """Collate examples of the scripts for a Trainer's models."""
    ids, mask, completion = [
        pad_sequence([example[key] for example in examples], batch_first=True)
        for key in ("input_ids", "predicted", "completion")]
    return {"input_ids": ids, "attention_mask": mask,
            "labels": ids.masked_fill(~completion, -100)}


def without_dropout(model):
    """Set every dropout to 0, because a Trainer puts the model into training mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def arguments(out, **settings):
    """Return quiet TrainingArguments that log every step."""
    defaults = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
                "remove_unused_columns": False, "disable_tqdm": True}
    return TrainingArguments(str(out), **defaults | settings)


def losses_of(trainer):
    """Return [loss, KL] of each step."""
    return [[row["loss"], row["kl"]] for row in trainer.state.log_history if "loss" in row]


def train(facts, out):
    """Train two epochs on the new facts, with eight rows per step; save the result in `out`."""
    model, tokenizer = script.load_model(f"{facts}/base", "cpu")
    without_dropout(model)
    examples = script.read_examples(f"{facts}/train_unknown.jsonl", tokenizer, 128)
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    args = arguments(out, per_device_train_batch_size=4 // n_processes,
                     gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=1e-3)
    sharded = "ACCELERATE_USE_FSDP" in os.environ
    if sharded:
        # accelerate shards on accelerators only. This makes it shard on CPUs, over gloo.
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, fsdp2_prepare_model
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = trainer_class()(model, args, collate, examples)
    trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if sharded:
        trainer.teacher = fsdp2_prepare_model(trainer.accelerator, trainer.teacher)
    trainer.train()
    trainer.save_model(out)
    if trainer.accelerator.is_main_process:
        kind = type(next(trainer.model.parameters())).__name__
        result = {"weights": kind, "losses": losses_of(trainer)}
        Path(out, "losses.json").write_text(json.dumps(result))


if __name__ == "__main__":
    train(*sys.argv[1:])
