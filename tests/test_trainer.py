"""docs/trainer.py against sft_selfdistill.py; with LoRA, in TRL, and sharded."""
import copy
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, code_of, rows_of, trainer_class
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler

import sft_selfdistill as script

pytest.importorskip("accelerate", reason="Trainer needs it")
from sharded import arguments, collate, losses_of, train, without_dropout

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")


@pytest.fixture
def examples(world, base):
    found = []
    for name in ("unknown", "known"):
        found += script.read_examples(world / f"train_{name}.jsonl", base[1], 128)
    return found


def add_pairs(batches):
    """Add the [loss, KL] of the two batches of each step."""
    return [[a + b for a, b in zip(*pair)] for pair in zip(batches[::2], batches[1::2])]


def test_losses_equal_those_of_the_script(base, examples, tmp_path):
    """Same rows, order, optimizer and schedule, two batches per step, more than 20 steps."""
    config = script.Config(epochs=4, batch_size=4, gradient_accumulation_steps=2,
                           learning_rate=1e-3, kl_weight=4.0, device="cpu", dtype="float32")
    model = copy.deepcopy(base[0])
    head = script.cache_teacher(model, examples, config)
    rows, expected = [], []

    def loss_function(batch, counts):
        loss, terms = script.self_distillation(model, head, batch, counts, config)
        rows.extend(batch["examples"])
        expected.append([loss.item(), terms["kl"].item()])
        return loss, terms

    for _ in script.train_stage(2, model, examples, loss_function, config, {"epoch": 0}):
        pass
    expected = add_pairs(expected)
    found = []

    class InOrder(trainer_class()):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **more):
            before = float(self.kl)
            loss = super().training_step(*args, **more).item()  # some versions round what they log
            found.append([loss, float(self.kl) - before])
            return torch.tensor(loss)

    def learning_rate(step):
        return script.get_lr(min(step, len(expected) - 1), len(expected), config)

    model = without_dropout(copy.deepcopy(base[0]))
    optimizer = script.make_optimizer(model, config, 2)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                     num_train_epochs=1, max_grad_norm=config.max_grad_norm)
    trainer = InOrder(model, args, collate, rows,
                      optimizers=(optimizer, LambdaLR(optimizer, learning_rate)))
    trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    trainer.train()
    found = add_pairs(found)
    assert len(found) == len(expected) >= 20 and found[0][1] == 0 < found[1][1]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [kl for _, kl in found[1:]] == pytest.approx([kl for _, kl in expected[1:]], rel=1e-3)


@needs_peft
def test_disabled_adapter_is_the_teacher(base, examples, tmp_path):
    """A PEFT model without a teacher has the same losses as with a copy of its base model."""
    import peft
    losses = []
    for copied in (True, False):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules="all-linear")
        model = without_dropout(peft.get_peft_model(copy.deepcopy(base[0]), lora))
        args = arguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=2,
                         learning_rate=1e-2)
        trainer = trainer_class()(model, args, collate, examples)
        if copied:
            trainer.teacher = copy.deepcopy(base[0])
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1] and losses[0][0][1] == 0 < losses[0][1][1]


@pytest.fixture
def in_trl(world, base, tmp_path, monkeypatch):
    """Return the names that docs/use.md expects, for TRL: datasets, a model, arguments."""
    import datasets
    import trl
    monkeypatch.chdir(tmp_path)
    base[1].save_pretrained("before")
    rows = {}
    for name in ("unknown", "known"):
        rows[name] = [{key: row[key] for key in ("prompt", "completion")}
                      for row in rows_of(world / f"train_{name}.jsonl")]

    def settings(**more):
        return trl.SFTConfig(
            "out", per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=1e-3, logging_steps=1, report_to="none", save_strategy="no",
            use_cpu=True, disable_tqdm=True, **{"bf16": False} | more)

    return {"model": without_dropout(copy.deepcopy(base[0])),
            "known": datasets.Dataset.from_list(rows["known"]),
            "known_and_new": datasets.Dataset.from_list(rows["known"] + rows["unknown"]),
            "more": {"processing_class": base[1]}, "Trainer": trl.SFTTrainer,
            "SelfDistillationTrainer": trainer_class("from trl import SFTTrainer as Trainer"),
            "settings": settings, "args": settings(num_train_epochs=2)}


@needs_trl
@pytest.mark.parametrize("bf16", [False, True])
def test_in_trl(in_trl, bf16):
    """Run both stages as docs/use.md does.

    At step 1 the KL is 0 and the loss equals TRL's. After that the KL is not 0, in bf16 too.
    """
    in_trl["model"].config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    for name, epochs in (("args_of_stage_1", 1), ("args", 2)):
        in_trl[name] = in_trl["settings"](num_train_epochs=epochs, bf16=bf16)
    code, = [code for code in code_of("docs/use.md") if "save_model" in code]
    exec(code, in_trl)
    distilled = [row for row in in_trl["trainer"].state.log_history if "loss" in row]
    start = in_trl["AutoModelForCausalLM"].from_pretrained("before")
    plain = in_trl["Trainer"](model=start, args=in_trl["args"],
                              train_dataset=in_trl["known_and_new"], **in_trl["more"])
    plain.train()
    loss = plain.state.log_history[0]["loss"]
    assert len(distilled) == 12 and "first" not in in_trl
    assert distilled[0]["loss"] == pytest.approx(loss, rel=2e-3 if bf16 else 1e-5)
    assert distilled[0]["kl"] == 0 and all(row["kl"] > 1e-6 for row in distilled[1:])


@needs_trl
def test_copied_teacher_is_rejected(in_trl):
    """A copy of a model that TRL has prepared would return the student's logits."""
    trainer = in_trl["SelfDistillationTrainer"](
        model=in_trl["model"], args=in_trl["args"], train_dataset=in_trl["known_and_new"],
        **in_trl["more"])
    trainer.teacher = copy.deepcopy(trainer.model).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="a copy"):
        trainer.train()


def test_model_whose_loss_trainer_would_divide_is_rejected(base, examples, tmp_path):
    trainer = trainer_class()(base[0], arguments(tmp_path), collate, examples)
    with pytest.raises(ValueError, match="divide"):
        trainer.compute_loss(copy.deepcopy(base[0]).train(), collate(examples[:2]))


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                    reason="this torch shards on GPUs only")
def test_sharded(world, tmp_path):
    """FSDP2 on two processes, teacher included, has the losses and weights of one process."""
    from safetensors.torch import load_file
    train(world, tmp_path / "one")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               ROOT / "tests/fsdp2.yaml", ROOT / "tests/sharded.py", world, tmp_path / "two"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = [json.loads((tmp_path / name / "losses.json").read_text())
                for name in ("one", "two")]
    assert one["weights"] == "Parameter" and two["weights"] == "DTensor"
    assert len(one["losses"]) == 6
    assert [loss for loss, _ in two["losses"]] == pytest.approx(
        [loss for loss, _ in one["losses"]], rel=1e-4)
    weights = load_file(tmp_path / "two/model.safetensors")     # includes the tied head, unlike one
    for name, weight in load_file(tmp_path / "one/model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-3)


def test_architectures(world, capsys):
    """docs/study/architectures.py: models whose logits the scripts reject train in a Trainer."""
    import architectures
    architectures.main(world, "gpt2", "gemma2", "mamba", "cpmant", "got_ocr2")
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("| "):
            ours, theirs, _, kinds = [cell.strip() for cell in line.split("|")[1:5]]
            for kind in kinds.split(", "):
                found[kind] = (ours, theirs)
    assert found.pop("gpt2") == found.pop("mamba") == ("trains", "trains")
    assert found.pop("got_ocr2") == ("no small model could be made", "")
    assert found.pop("gemma2") == (
        "its logits are not its LM head applied to the last hidden state", "trains")
    assert "not causal" in found.pop("cpmant")[0]
    assert found == {"architectures": ("script", "Trainer")}
