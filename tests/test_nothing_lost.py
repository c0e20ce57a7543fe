"""Interrupted runs end as others do; what is in a folder is not lost; a run that diverges stops."""
import contextlib
import copy
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import Bomb, call, contents, plain_loss, refused, rows_of, run, trained

import sft_baseline

METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]
SHORT = ["--epochs", 3, "--format-epochs", 2, "--batch-size", 16, "--out", "x"]          # 2 · 2 and 3 · 3 steps, four states


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts catches it."""


def die(patch, module, moment, n):
    """Let the `n`-th call of what `moment` names be the run's last: a step, half of a state's write, or a renaming."""
    owner, name = {"step": (module, "get_lr"), "write": (torch, "save"), "rename": (os, "replace")}[moment]
    real, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(args)
        if len(calls) < n:
            return real(*args)
        if moment == "write":
            real(*args)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        raise Killed
    patch.setattr(owner, name, counted)


def ended(folder):
    """All that a run leaves, without the word that it was resumed."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files["run.json"] = json.loads(files["run.json"])
    files["run.json"]["config"].pop("resume")
    files["run.json"]["config"].pop("overwrite")
    return files


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_at_any_moment(workplace, monkeypatch, method):
    """A run that dies again and again, in steps, writes and renamings, ends bit for bit as one that was left alone."""
    module, words = importlib.import_module(method), SHORT + (["--l2", 0.1] if method == "sft_freeze" else [])
    call(workplace, method, *words)
    whole = ended(workplace / "x")
    shutil.rmtree(workplace / "x")
    epochs = []
    # a renaming is of unfinished.json, five files of before/, states, five files again, metrics.jsonl, answers.jsonl, run.json
    for moment, n in [("step", 1), ("rename", 1), ("step", 4), ("rename", 3), ("write", 1), ("rename", 7), ("step", 6), ("write", 1),
                      ("rename", 2), ("step", 3), ("write", 1), ("step", 5), ("write", 1), ("rename", 4), ("rename", 8), ("rename", 7)]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, module, moment, n)
            call(workplace, method, *words, "--resume")
        assert not (workplace / "x/run.json").exists()
        state = workplace / "x/state.pt"
        epochs.append(torch.load(state, weights_only=True)["epoch"] if state.exists() else None)
    assert epochs == [None] * 6 + [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], epochs
    call(workplace, method, *words, "--resume")
    assert ended(workplace / "x") == whole
    (workplace / "x/state.pt").touch()                              # killed between its last renaming and the end
    assert "is finished" in call(workplace, method, *words, "--resume").stdout
    (workplace / "x/state.pt").unlink()
    assert ended(workplace / "x") == whole


def test_sigkill_in_a_write(workplace):
    """The same with a real SIGKILL, in the middle of the third state's write; then with another batch size, in as many rows a step."""
    words = [str(word) for word in SHORT]
    call(workplace, "sft_selfdistill", *words)
    whole = ended(workplace / "x")
    shutil.rmtree(workplace / "x")
    killed = ("import os, torch, sft_selfdistill as s; real, n = torch.save, []\n"
              "def save(state, path):\n"
              "    real(state, path); n.append(0)\n"
              "    if len(n) == 3: os.truncate(path, 9999); os.kill(os.getpid(), 9)\n"
              f"torch.save = save; s.main({words})")
    assert subprocess.run([sys.executable, "-c", killed], cwd=workplace, capture_output=True).returncode == -signal.SIGKILL
    shutil.copytree(workplace / "x", workplace / "y")
    run(workplace, "sft_selfdistill.py", *words, "--resume")
    assert ended(workplace / "x") == whole
    halves = [*words[:-1], "y", "--batch-size", 8, "--accumulate", 2, "--resume", "--eval-every", 0, "--save-every-epoch"]
    call(workplace, "sft_selfdistill", *halves)
    assert [m["epoch"] for m in rows_of(workplace / "y/metrics.jsonl")] == [1, 2, 0, 1, 2, 3]
    assert (workplace / "y/epoch-3/model.safetensors").read_bytes() == (workplace / "y/model.safetensors").read_bytes()
    assert "is finished" in call(workplace, "sft_selfdistill", *halves).stdout
    assert "learning_rate was" in refused(workplace, "sft_selfdistill", *halves, "--learning-rate", "1e-5")     # nor is it taken for another run


def test_ctrl_c_within_a_write_is_no_full_disk(tmp_path, monkeypatch):
    """torch.save makes a RuntimeError of what comes up while it writes."""
    def save(*args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        sft_baseline.save_state(tmp_path / "state.pt", {})


def test_ctrl_c_says_how_to_go_on(workplace):
    words = [sys.executable, "-u", "sft_baseline.py", "--epochs", "500", "--out", "x"]
    with subprocess.Popen(words, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:      # ignored under nohup
        for line in process.stdout:
            if line.startswith("{'stage': 2, 'epoch': 2"):         # the first has been written by then
                break
        for _ in range(3):                                          # Python loses one that comes while it cleans up an object
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        error = process.stderr.read()
    assert process.returncode == 130 and len(error.splitlines()) == 1 and "--resume" in error
    assert (workplace / "x/state.pt").exists()


@pytest.fixture
def interrupted(workplace, monkeypatch):
    """A folder with a baseline run that died in the second epoch of stage 2."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, sft_baseline, "step", 8)
        call(workplace, "sft_baseline", *SHORT)
    return workplace


@pytest.mark.parametrize("words, change, named", [
    ([], None, "--resume"), (["--resume", "--epochs", 9], None, "epochs was 3, is 9"), (["--resume", "--seed", 1], None, "seed was 0, is 1"),
    (["--resume", "--learning-rate", 1e-3], None, "learning_rate was 0.0004"), (["--resume", "--batch-size", 8], None, "rows a step was 16, is 8"),
    (["--resume", "--dtype", "bfloat16"], None, "dtype was float32"), (["--resume", "--no-unknown"], None, "no_unknown was False"),
    (["--resume"], "heldout_known.jsonl", "data was"), (["--resume"], "base", "made for other weights"),
    (["--resume"], lambda state: state.update(bomb=Bomb("exploded")), "state.pt"), (["--resume"], "cut", "state.pt"), (["--resume"], "empty", "state.pt")])
def test_refused_resumption(interrupted, words, change, named):
    """Other settings, rows or weights, a broken state: the line says which, and the interrupted run stays as it is."""
    path = interrupted / "x/state.pt"
    if change in ("heldout_known.jsonl", "base"):
        real = (interrupted / "facts/tiny").resolve()
        os.unlink(interrupted / "facts/tiny")
        shutil.copytree(real, interrupted / "facts/tiny")
        if change == "base":
            model = transformers.AutoModelForCausalLM.from_pretrained(real / "base")
            model.transformer.wte.weight.data[0] += 1
            model.save_pretrained(interrupted / "facts/tiny/base")
        else:
            rows = (real / change).read_text("utf-8").splitlines(keepends=True)
            (interrupted / "facts/tiny" / change).write_text("".join(rows[1:]), encoding="utf-8")
    elif change in ("cut", "empty"):
        os.truncate(path, os.path.getsize(path) // 2 if change == "cut" else 0)
    elif change:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    before = contents(interrupted / "x")
    assert named in refused(interrupted, "sft_baseline", *SHORT, *words)
    assert contents(interrupted / "x") == before
    assert not list(interrupted.glob("exploded")) and not os.path.exists("exploded")


def test_another_method_does_not_go_on(interrupted):
    assert "method was baseline, is freeze" in refused(interrupted, "sft_freeze", *SHORT, "--resume")


def test_overwrite_starts_anew(interrupted):
    (interrupted / "x/epoch-1").mkdir()                             # of --save-every-epoch
    call(interrupted, "sft_baseline", *SHORT, "--overwrite")
    assert [m["epoch"] for m in rows_of(interrupted / "x/metrics.jsonl")] == [1, 2, 0, 1, 2, 3]
    assert not list(interrupted.glob("x/epoch-*"))


@pytest.mark.parametrize("words, named", [
    (["--out", "facts/tiny"], "facts/tiny"), (["--out", "facts"], "only a run"), (["--out", "facts/tiny/base/x"], "facts/tiny/base"),
    (["--model", "x", "--facts", "facts/tiny", "--out", "link"], "place of x"), (["--model", "x/before", "--facts", "facts/tiny", "--out", "x"], "place of x/before"),
    (["--model", "x", "--train", "x/answers.jsonl", "--out", "x"], "place of x"), (["--out", "mine"], "only a run")])
def test_no_input_is_overwritten(workplace, words, named):
    """A run's folder is never the place of its model or its rows, nor above or below it, by whatever name; nor is a folder of others'."""
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "x")
    os.symlink(workplace / "x", workplace / "link", target_is_directory=True)
    (workplace / "mine").mkdir()
    (workplace / "mine/thesis.txt").write_text("years of work")
    before = contents(workplace)
    assert named in refused(workplace, "sft_baseline", *words, "--overwrite")
    assert contents(workplace) == before


def test_further_training_with_the_facts_of_the_start_model(workplace):
    """A run's output is trained further with the facts of the model that it started from: allowed, and said."""
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "x")
    done = call(workplace, "sft_baseline", "--epochs", 1, "--model", "x", "--facts", "facts/tiny", "--out", "y")
    assert "note: facts/tiny says what the model knew from which x was trained" in done.stdout
    done = call(workplace, "sft_baseline", "--epochs", 1, "--model", "x/before", "--facts", "facts/tiny", "--out", "w")
    assert "note: facts/tiny says what the model knew from which x/before was trained" in done.stdout
    (workplace / "x/run.json").unlink()
    assert "made for other weights" in refused(workplace, "sft_baseline", "--model", "x", "--facts", "facts/tiny", "--out", "z")
    # the same weights in another folder are the same model
    shutil.copytree(workplace / "facts/tiny/base", workplace / "copy")
    call(workplace, "sft_baseline", "--epochs", 1, "--model", "copy", "--facts", "facts/tiny", "--out", "z")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["state.pt.tmp", "metrics.jsonl.tmp", "model"])
def test_full_disk(interrupted, name):
    """No room for a file: one line, and with room again the run goes on from the last state."""
    def no_room(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        if name == "model":
            patch.setattr(transformers.PreTrainedModel, "save_pretrained", no_room)
        else:
            (interrupted / "x" / name).symlink_to("/dev/full")
        assert "--resume goes on" in refused(interrupted, "sft_baseline", *SHORT, "--resume")
    (interrupted / "x" / name).unlink(missing_ok=True)
    call(interrupted, "sft_baseline", *SHORT, "--resume")
    assert [m["epoch"] for m in rows_of(interrupted / "x/metrics.jsonl")] == [1, 2, 0, 1, 2, 3]


def test_out_of_memory_is_called_so(interrupted, monkeypatch):
    def too_much(*args, **more):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")
    with monkeypatch.context() as patch:
        patch.setattr(sft_baseline, "cross_entropy", too_much)
        said = refused(interrupted, "sft_baseline", *SHORT, "--resume")
    assert "out of memory" in said and "--accumulate" in said and "--model" not in said
    monkeypatch.setattr(transformers.PreTrainedModel, "to", too_much)
    assert "out of memory" in refused(interrupted, "sft_baseline", *SHORT, "--resume")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_and_keeps_the_last_state(workplace, monkeypatch, what):
    """A loss or a gradient that is not finite in the second epoch of stage 2: one line, and resumed it is as never."""
    call(workplace, "sft_baseline", *SHORT)
    whole = ended(workplace / "x")
    shutil.rmtree(workplace / "x")
    owner, name = {"loss": (sft_baseline, "cross_entropy"), "gradient": (torch.nn.utils, "clip_grad_norm_")}[what]
    real, calls = getattr(owner, name), []

    def broken(*args):
        calls.append(args)
        result = real(*args)
        if len(calls) < 4 + 3 + 2:
            return result
        return result * torch.inf if what == "gradient" else (result[0] * torch.nan, {"ce": result[0] * torch.nan})
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        said = refused(workplace, "sft_baseline", *SHORT)
    assert "stage 2, epoch 2, step 5:" in said and "lower --learning-rate" in said
    assert torch.load(workplace / "x/state.pt", weights_only=True)["epoch"] == 1
    call(workplace, "sft_baseline", *SHORT, "--resume")
    assert ended(workplace / "x") == whole


@pytest.mark.parametrize("scale, what, ends", [(2.0, "gradient", False), (1.0, "gradient", True), (2.0, "loss", True)])
def test_a_step_that_the_scaler_skips_is_no_divergence(base, world, monkeypatch, capsys, scale, what, ends):
    """fp16: a gradient beyond its range is the scaler's affair as long as the scale can be halved; a loss that is no number is not."""
    examples = sft_baseline.read_examples(world / "train_known.jsonl", base[1], 128)[:8]
    model, calls = copy.deepcopy(base[0]), []
    scaler, clip, loss = torch.amp.GradScaler, torch.nn.utils.clip_grad_norm_, plain_loss(sft_baseline, model)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **more: scaler(*args, **more, init_scale=scale))
    broken = lambda result: calls.append(0) or (result * torch.inf if len(calls) == 1 else result)
    if what == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: broken(clip(*args)))

    def lost(*args):
        ce = loss(*args)[0] * torch.nan
        return ce, {"ce": ce}
    train = lambda: trained(sft_baseline, model, examples, loss if what == "gradient" else lost, dtype="float16", learning_rate=1e-4)
    if ends:
        with pytest.raises(SystemExit):
            train()
        assert "stage 2, epoch 1, step 1:" in capsys.readouterr().err
    else:
        assert len(train()) == 2 and len(calls) == 4
