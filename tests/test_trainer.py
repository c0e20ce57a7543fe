"""The SelfDistillationTrainer of assets/use.md against sft_selfdistill.py, with adapters, in TRL and sharded."""
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

pytest.importorskip("accelerate", reason="the Trainer needs it")
from sharded import arguments, collate, losses_of, train, without_dropout

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
USE, = [code for code in code_of("assets/use.md") if "save_model" in code]


@pytest.fixture
def examples(world, base):
    return [example for name in ("unknown", "known") for example in script.read_examples(world / f"train_{name}.jsonl", base[1], 128)]


def test_the_losses_of_the_script(base, examples, tmp_path):
    """Same rows, order, optimizer and schedule, two batches a step: the same losses, over 20 steps and more."""
    config = script.Config(epochs=4, batch_size=4, accumulate=2, learning_rate=1e-3, kl_weight=4.0, temperature=4.0,
                           device="cpu", dtype="float32")
    ours, batches, parts = copy.deepcopy(base[0]), [], []
    head = script.cache_teacher(ours, examples, config)

    def loss_function(batch, counts):
        loss, terms = script.self_distillation(ours, head, batch, counts, config)
        batches.extend(batch["examples"])
        parts.append([loss.item(), terms["kl"].item()])
        return loss, terms

    for _ in script.run_stage(2, ours, examples, loss_function, config, {"epoch": 0}):
        pass
    steps = [[a + b for a, b in zip(*pair)] for pair in zip(parts[::2], parts[1::2])]

    found = []

    class InOrder(trainer_class()):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **more):
            before = float(self.kl)
            loss = super().training_step(*args, **more).item()      # the log of some versions is rounded
            found.append([loss, float(self.kl) - before])
            return torch.tensor(loss)

    model = without_dropout(copy.deepcopy(base[0]))
    optimizer = script.make_optimizer(model, config)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1.0
    schedule = LambdaLR(optimizer, lambda step: script.get_lr(min(step, len(steps) - 1), len(steps), config))
    trainer = InOrder(model, arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
                                       max_grad_norm=config.grad_clip), collate, batches, optimizers=(optimizer, schedule))
    trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    trainer.train()
    found = [[a + b for a, b in zip(*pair)] for pair in zip(found[::2], found[1::2])]
    assert len(found) == len(steps) >= 20 and found[0][1] == 0 < found[1][1]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], rel=1e-5)
    assert [kl for _, kl in found[1:]] == pytest.approx([kl for _, kl in steps[1:]], rel=1e-3)


@needs_peft
def test_adapter_off_is_the_teacher(base, examples, tmp_path):
    """Without a copy, a PEFT model's own weights are the teacher: the same losses as with one."""
    import peft
    losses = []
    for copied in (True, False):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(base[0]), peft.LoraConfig(r=4, target_modules="all-linear"))
        args = arguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=2, learning_rate=1e-2)
        trainer = trainer_class()(without_dropout(adapted), args, collate, examples)
        if copied:
            trainer.teacher = copy.deepcopy(base[0])
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1] and losses[0][0][1] == 0 < losses[0][1][1]


@pytest.fixture
def in_trl(world, base, tmp_path, monkeypatch):
    """Names with which the page's blocks run in TRL: rows of prompt and completion, a model, arguments."""
    import datasets
    import trl
    monkeypatch.chdir(tmp_path)
    rows = {}
    for name in ("unknown", "known"):
        rows[name] = [{key: row[key] for key in ("prompt", "completion")} for row in rows_of(world / f"train_{name}.jsonl")]

    def settings(**more):
        return trl.SFTConfig("out", **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
                                       "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
                                       "disable_tqdm": True} | more)

    base[1].save_pretrained("before")
    names = {"model": without_dropout(copy.deepcopy(base[0])), "known": datasets.Dataset.from_list(rows["known"]),
             "known_and_new": datasets.Dataset.from_list(rows["known"] + rows["unknown"]), "more": {"processing_class": base[1]},
             "Trainer": trl.SFTTrainer, "SelfDistillationTrainer": trainer_class("from trl import SFTTrainer as Trainer"),
             "settings": settings, "args": settings(num_train_epochs=2), "args_of_stage_1": settings(num_train_epochs=1)}
    return names


@needs_trl
@pytest.mark.parametrize("bf16", [False, True])
def test_in_trl(in_trl, bf16):
    """As the page has it, both stages: at step 1 the KL is 0 and the loss that of TRL, then the KL is not 0, in bf16 too."""
    in_trl["model"].config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    for name, epochs in (("args_of_stage_1", 1), ("args", 2)):
        in_trl[name] = in_trl["settings"](num_train_epochs=epochs, bf16=bf16)
    exec(USE, in_trl)
    distilled = [row for row in in_trl["trainer"].state.log_history if "loss" in row]
    start = in_trl["AutoModelForCausalLM"].from_pretrained("before")
    plain = in_trl["Trainer"](model=start, args=in_trl["args"], train_dataset=in_trl["known_and_new"], **in_trl["more"])
    plain.train()
    assert len(distilled) == 12 and "first" not in in_trl
    assert distilled[0]["kl"] == 0 and distilled[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=2e-3 if bf16 else 1e-5)
    assert all(row["kl"] > 1e-6 for row in distilled[1:])


@needs_trl
def test_a_copied_teacher_is_found_out(in_trl):
    """A copy of what TRL has prepared would answer with the student's weights."""
    trainer = in_trl["SelfDistillationTrainer"](model=in_trl["model"], args=in_trl["args"], train_dataset=in_trl["known_and_new"],
                                                **in_trl["more"])
    trainer.teacher = copy.deepcopy(trainer.model).eval().requires_grad_(False)
    with pytest.raises(AssertionError, match="a copy"):
        trainer.train()


def test_a_model_that_the_trainer_would_divide_for_is_refused(base, examples, tmp_path):
    trainer = trainer_class()(base[0], arguments(tmp_path), collate, examples)
    with pytest.raises(AssertionError, match="divide"):
        trainer.compute_loss(copy.deepcopy(base[0]).train(), collate(examples[:2]))


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on GPUs alone")
def test_sharded(world, tmp_path):
    """FSDP2 over two gloo processes, the teacher sharded too: the losses and the weights of one process."""
    from safetensors.torch import load_file
    train(world, tmp_path / "one")
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "tests/fsdp2.yaml",
                           ROOT / "tests/sharded.py", world, tmp_path / "two"],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two")]
    assert (one["weights"], two["weights"]) == ("Parameter", "DTensor") and len(one["losses"]) == 6
    assert [loss for loss, _ in two["losses"]] == pytest.approx([loss for loss, _ in one["losses"]], rel=1e-4)
    weights = load_file(tmp_path / "two/model.safetensors")         # with the tied head, which one process leaves out
    for name, weight in load_file(tmp_path / "one/model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-3)


def test_architectures(world, capsys):
    """The script behind the table of assets/use.md: what the scripts refuse for its logits trains in a Trainer."""
    import architectures
    architectures.main(world, "gpt2", "gemma2", "mamba", "cpmant", "got_ocr2")
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {kind: (ours, theirs) for ours, theirs, _, kinds in rows[1:] for kind in kinds.split(", ")}
    assert found.pop("gpt2") == found.pop("mamba") == ("trains", "trains") and found.pop("got_ocr2") == ("not made small", "")
    assert found.pop("gemma2") == ("caps or scales its logits, or has no linear head", "trains")
    assert "not causal" in found.pop("cpmant")[0] and not found
