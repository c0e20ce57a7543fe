"""Interrupted runs end as others do; no folder is overwritten; a diverged run stops."""
import contextlib
import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import (METHODS, Bomb, call, ce_loss, contents, refused, rows_of, run,
                      train_epochs)

import sft_baseline

# Stage 1 has 2 epochs of 2 steps, stage 2 has 3 epochs of 3 steps: four states are saved.
SHORT = ["--epochs", "3", "--format-epochs", "2", "--batch-size", "16", "--out", "x"]
EPOCHS = [1, 2, 0, 1, 2, 3]     # of the rows of metrics.jsonl


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts catches it."""


def die(patch, moment, n):
    """Kill the run at its n-th step, within its n-th torch.save, or at its n-th rename."""
    places = {"step": (torch.nn.utils, "clip_grad_norm_"), "write": (torch, "save"),
              "rename": (os, "replace")}
    owner, name = places[moment]
    real = getattr(owner, name)
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) < n:
            return real(*args)
        if moment == "write":
            real(*args)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        raise Killed
    patch.setattr(owner, name, counted)


def result_of(folder):
    """Return all that a run leaves, without what may differ: --resume and the measured time."""
    result = {str(path.relative_to(folder)): data for path, data in contents(folder).items()}
    run, = rows_of(folder / "run.json")
    run["config"].pop("resume")
    metrics = rows_of(folder / "metrics.jsonl")
    for row in metrics:
        row.pop("seconds_per_step", None)
    return result | {"run.json": run, "metrics.jsonl": metrics}


def train_and_remove(folder, method, *words):
    """Train an uninterrupted run; return its result."""
    call(folder, method, *words)
    result = result_of(folder / "x")
    shutil.rmtree(folder / "x")
    return result


# -------------------------------------------------------------------------------- interruptions

# The files that are renamed: unfinished.json, five of before/, the states, five of the final
# model, metrics.jsonl, answers.jsonl and run.json.
MOMENTS = [("step", 1), ("rename", 1), ("step", 4), ("rename", 3), ("write", 1), ("rename", 7),
           ("step", 6), ("write", 1), ("rename", 3), ("step", 3), ("write", 1), ("step", 5),
           ("write", 1), ("rename", 5), ("rename", 9), ("rename", 8)]
STATES = [None] * 6 + [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]        # the saved epoch after each moment


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_at_any_moment(workplace, monkeypatch, method):
    """A run that is killed sixteen times ends like an uninterrupted one, bit for bit."""
    words = SHORT + ["--l2", "0.1"] if method == "sft_freeze" else SHORT
    whole = train_and_remove(workplace, method, *words)
    state = workplace / "x/state.pt"
    found = []
    for moment, n in MOMENTS:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, moment, n)
            call(workplace, method, *words, "--resume")
        assert not (workplace / "x/run.json").exists()
        found.append(torch.load(state, weights_only=True)["epoch"] if state.exists() else None)
    assert found == STATES
    call(workplace, method, *words, "--resume")
    assert result_of(workplace / "x") == whole
    state.touch()                       # killed between the last rename and the end
    assert "is not empty" in refused(workplace, method, *words, "--resume")
    state.unlink()
    assert result_of(workplace / "x") == whole


def test_sigkill_during_a_write(workplace):
    """A real SIGKILL while the third state is written; then also with half the batch size."""
    whole = train_and_remove(workplace, "sft_selfdistill", *SHORT)
    code = f"""
import os, torch, sft_selfdistill
real = torch.save
calls = []
def save(state, path):
    real(state, path)
    calls.append(path)
    if len(calls) == 3:
        os.truncate(path, 9999)
        os.kill(os.getpid(), 9)
torch.save = save
sft_selfdistill.main({SHORT})"""
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    shutil.copytree(workplace / "x", workplace / "y")
    run(workplace, "sft_selfdistill.py", *SHORT, "--resume")
    assert result_of(workplace / "x") == whole
    halves = SHORT[:-1] + ["y", "--batch-size", "8", "--gradient-accumulation-steps", "2",
                           "--eval-every", "0", "--save-every-epoch", "--resume"]
    call(workplace, "sft_selfdistill", *halves)
    assert [row["epoch"] for row in rows_of(workplace / "y/metrics.jsonl")] == EPOCHS
    weights = (workplace / "y/model.safetensors").read_bytes()
    assert (workplace / "y/epoch-3/model.safetensors").read_bytes() == weights
    assert "is not empty" in refused(workplace, "sft_selfdistill", *halves)


def test_ctrl_c_names_resume(workplace):
    words = [sys.executable, "-u", "sft_baseline.py", "--epochs", "500", "--out", "x"]

    def receive_sigint():               # ignored under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(words, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, preexec_fn=receive_sigint) as process:
        for line in process.stdout:
            if line.startswith("epoch 2 |"):        # the state of epoch 1 is saved
                break
        for _ in range(3):              # Python ignores a signal while it finalizes an object
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        error = process.stderr.read()
    assert process.returncode == 130 and len(error.splitlines()) == 1 and "--resume" in error
    assert (workplace / "x/state.pt").exists()


@pytest.fixture
def interrupted(workplace, monkeypatch):
    """Return a folder with a baseline run, x, that was killed in epoch 2 of stage 2."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, "step", 8)
        call(workplace, "sft_baseline", *SHORT)
    return workplace


@pytest.mark.parametrize("method, words, named", [
    ("sft_baseline", "", "--resume"),
    ("sft_baseline", "--resume --epochs 9", "epochs was 3, is 9"),
    ("sft_baseline", "--resume --seed 1", "seed was 0, is 1"),
    ("sft_baseline", "--resume --learning-rate 1e-3", "learning_rate was 0.0004"),
    ("sft_baseline", "--resume --batch-size 8", "rows per step was 16, is 8"),
    ("sft_baseline", "--resume --dtype bfloat16", "dtype was float32"),
    ("sft_baseline", "--resume --known-only", "known_only was False"),
    ("sft_freeze", "--resume", "method was baseline, is freeze")])
def test_resume_with_other_settings_is_rejected(interrupted, method, words, named):
    before = contents(interrupted / "x")
    assert named in refused(interrupted, method, *SHORT, *words.split())
    assert contents(interrupted / "x") == before


@pytest.mark.parametrize("changed, named", [
    ("heldout_known.jsonl", "data was"), ("base", "labelled with other weights")])
def test_resume_with_other_inputs_is_rejected(interrupted, world, changed, named):
    before = contents(interrupted / "x")
    facts = interrupted / "facts/tiny"
    facts.unlink()
    shutil.copytree(world, facts)
    if changed == "base":
        model = transformers.AutoModelForCausalLM.from_pretrained(world / "base")
        model.transformer.wte.weight.data[0] += 1
        model.save_pretrained(facts / "base")
    else:
        rows = (facts / changed).read_text("utf-8").splitlines(keepends=True)
        (facts / changed).write_text("".join(rows[1:]), encoding="utf-8")
    assert named in refused(interrupted, "sft_baseline", *SHORT, "--resume")
    assert contents(interrupted / "x") == before


@pytest.mark.parametrize("damage", ["pickle", "truncated", "empty"])
def test_damaged_state_is_left_alone(interrupted, damage):
    """A damaged state is neither resumed from nor deleted, and no code in it is executed."""
    state = interrupted / "x/state.pt"
    if damage == "pickle":
        stored = torch.load(state, weights_only=True)
        torch.save(stored | {"bomb": Bomb(interrupted / "exploded")}, state)
    else:
        os.truncate(state, os.path.getsize(state) // 2 if damage == "truncated" else 0)
    before = contents(interrupted)
    with pytest.raises(Exception):
        call(interrupted, "sft_baseline", *SHORT, "--resume")
    after = contents(interrupted)
    for files in (before, after):
        files.pop(interrupted / "x/unfinished.json")        # records the settings of --resume
    assert after == before


# ---------------------------------------------------------------------------- existing folders

@pytest.mark.parametrize("words, named", [
    ("--out facts/tiny", "--out facts/tiny is not empty"),
    ("--out facts", "--out facts is not empty"),
    ("--out mine", "--out mine is not empty"),
    ("--out mine --resume", "--out mine is not empty"),
    ("--out link", "--out link is not empty"),
    ("--model x --train x/answers.jsonl --out x", "--out x is not empty"),
    ("--model x/before --out x --resume", "is not empty")])
def test_existing_folder_is_not_overwritten(workplace, words, named):
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "x")
    (workplace / "link").symlink_to("x", target_is_directory=True)
    (workplace / "mine").mkdir()
    (workplace / "mine/thesis.txt").write_text("years of work")
    before = contents(workplace)
    assert named in refused(workplace, "sft_baseline", "--facts", "facts/tiny", *words.split())
    assert contents(workplace) == before


def test_further_training_with_the_facts_of_the_base_model(workplace):
    """A run's models may be trained on the facts of the model that the run started from."""
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "x")
    words = ["--epochs", 1, "--facts", "facts/tiny"]
    for model, out in (("x", "y"), ("x/before", "z")):
        call(workplace, "sft_baseline", *words, "--model", model, "--out", out)
        stored = json.loads((workplace / out / "run.json").read_text())
        assert stored["start"] == str((workplace / model).resolve())
    (workplace / "x/run.json").unlink()
    error = refused(workplace, "sft_baseline", *words, "--model", "x", "--out", "new")
    assert "labelled with other weights" in error
    # The same weights in another folder are the same model.
    shutil.copytree(workplace / "facts/tiny/base", workplace / "copy")
    call(workplace, "sft_baseline", *words, "--model", "copy", "--out", "new")


# ------------------------------------------------------------------------ no space, no memory

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["state.pt.tmp", "metrics.jsonl.tmp", "model"])
def test_run_resumes_after_a_full_disk(interrupted, name):
    def no_space(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    path = interrupted / "x" / name
    with pytest.MonkeyPatch.context() as patch:
        if name == "model":
            patch.setattr(transformers.PreTrainedModel, "save_pretrained", no_space)
        else:
            path.symlink_to("/dev/full")
        # torch.save raises a RuntimeError of its own, the others an OSError.
        if name == "state.pt.tmp":
            with pytest.raises(RuntimeError):
                call(interrupted, "sft_baseline", *SHORT, "--resume")
        else:
            assert "No space left" in refused(interrupted, "sft_baseline", *SHORT, "--resume")
    path.unlink(missing_ok=True)
    call(interrupted, "sft_baseline", *SHORT, "--resume")
    assert [row["epoch"] for row in rows_of(interrupted / "x/metrics.jsonl")] == EPOCHS


@pytest.mark.parametrize("owner, name", [
    (sft_baseline, "cross_entropy"), (transformers.PreTrainedModel, "to")])
def test_out_of_memory_names_the_flags(interrupted, monkeypatch, owner, name):
    def too_much(*args, **more):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(owner, name, too_much)
    error = refused(interrupted, "sft_baseline", *SHORT, "--resume")
    assert "out of memory" in error and "--gradient-accumulation-steps" in error
    assert "--model" not in error


# ----------------------------------------------------------------------------------- divergence

@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_and_keeps_the_last_state(workplace, monkeypatch, what):
    """A non-finite value in epoch 2 of stage 2 is one line; the run can be resumed before it."""
    whole = train_and_remove(workplace, "sft_baseline", *SHORT)
    places = {"loss": (sft_baseline, "cross_entropy"),
              "gradient": (torch.nn.utils, "clip_grad_norm_")}
    owner, name = places[what]
    real = getattr(owner, name)
    calls = []

    def broken(*args):
        calls.append(args)
        result = real(*args)
        if len(calls) < 4 + 3 + 2:
            return result
        if what == "gradient":
            return result * torch.inf
        return result[0] * torch.nan, {"ce": result[0] * torch.nan}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        error = refused(workplace, "sft_baseline", *SHORT)
    for part in ("stage 2, epoch 2", "step 5", "lower --learning-rate"):
        assert part in error
    assert torch.load(workplace / "x/state.pt", weights_only=True)["epoch"] == 1
    call(workplace, "sft_baseline", *SHORT, "--resume")
    assert result_of(workplace / "x") == whole


@pytest.fixture
def examples(base, world):
    return sft_baseline.read_examples(world / "train_known.jsonl", base[1], 128)[:8]


def test_stops_at_a_loss_that_is_not_finite(base, examples, capsys):
    model = copy.deepcopy(base[0])
    real = ce_loss(sft_baseline, model)

    def loss_function(*args):
        ce = real(*args)[0] * torch.nan
        return ce, {"ce": ce}
    with pytest.raises(SystemExit):
        train_epochs(sft_baseline, model, examples, loss_function)
    error = capsys.readouterr().err
    assert "stage 2, epoch 1" in error and "step 1" in error
