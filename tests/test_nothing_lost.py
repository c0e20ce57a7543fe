"""Interrupted runs end as others do; a run that diverges stops; several processes do what one does."""
import contextlib
import copy
import errno
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch
import transformers
from conftest import Bomb, call, plain_loss, refused, rows_of, run

import sft_baseline

METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]
SHORT = ["--epochs", 3, "--format-epochs", 2, "--batch-size", 16, "--out", "x"]          # 2 · 2 and 3 · 3 steps, five states


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the scripts catches it."""


def die(patch, module, moment, n):
    """Let the `n`-th call of what `moment` names be the run's last: a step, half of a state's write, or its renaming."""
    owner, name = {"step": (module, "get_lr"), "write": (torch, "save"), "rename": (os, "replace")}[moment]
    real, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(args)
        if len(calls) < n:
            return real(*args)
        if moment == "write":
            real(*args)
            args[1].truncate(args[1].tell() // 2)
        raise Killed
    patch.setattr(owner, name, counted)


def ended(folder):
    """All that a run leaves, without times and the word that it was resumed."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["metrics.jsonl"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder / "metrics.jsonl")]
    files["run.json"] = json.loads(files["run.json"])
    files["run.json"]["config"].pop("resume")
    return files


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_at_any_moment(workplace, monkeypatch, method):
    """A run that dies again and again, in steps, writes and renamings, ends bit for bit as one that was left alone."""
    module, words = importlib.import_module(method), SHORT + (["--l2", 0.1] if method == "sft_freeze" else [])
    call(workplace, method, *words)
    whole = ended(workplace / "x")
    shutil.rmtree(workplace / "x")
    seen = []
    for moment, n in [("step", 1), ("step", 2), ("write", 1), ("step", 4), ("write", 1), ("rename", 1), ("step", 3), ("write", 1),
                      ("step", 4), ("rename", 1), ("step", 5), ("write", 1), ("rename", 1), ("rename", 2)]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, module, moment, n)
            call(workplace, method, *words, "--resume")
        assert not (workplace / "x").exists()
        seen.append({path.name: torch.load(path, weights_only=True)["epoch"] for path in workplace.glob(".x.part/stage-?.pt")})
    assert seen[:3] == [{}] * 3 and seen[3] == {"stage-1.pt": 1} and seen[-1] == {"stage-1.pt": 2, "stage-2.pt": 3}, seen
    assert "stage 2: resumed after epoch 3" in call(workplace, method, *words, "--resume").stdout
    assert ended(workplace / "x") == whole
    assert not list(workplace.glob(".x*"))
    (workplace / "x/stage-2.pt").touch()                             # killed between its last renaming and the end
    assert "complete" in call(workplace, method, *words, "--resume").stdout and ended(workplace / "x") == whole


def test_sigkill_in_a_write(workplace):
    """The same with a real SIGKILL, in the middle of the fourth state's write."""
    words = [str(word) for word in SHORT]
    call(workplace, "sft_selfdistill", *words)
    whole = ended(workplace / "x")
    shutil.rmtree(workplace / "x")
    killed = ("import os, torch, sft_selfdistill as s; real, n = torch.save, []\n"
              "def save(state, file):\n"
              "    real(state, file); n.append(0)\n"
              "    if len(n) == 4: file.truncate(9999); os.kill(os.getpid(), 9)\n"
              f"torch.save = save; s.train(s.parse({words}))")
    assert subprocess.run([sys.executable, "-c", killed], cwd=workplace, capture_output=True).returncode == -signal.SIGKILL
    assert "stage 2: resumed after epoch 1" in run(workplace, "sft_selfdistill.py", *words, "--resume").stdout
    assert ended(workplace / "x") == whole


def test_ctrl_c_says_how_to_go_on(workplace):
    words = [sys.executable, "-u", "sft_baseline.py", "--epochs", "500", "--out", "x"]
    with subprocess.Popen(words, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("stage 2, epoch 2:"):       # the first has been written by then
                break
        for _ in range(3):                                          # Python loses one that comes while it cleans up an object
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        error = process.stderr.read()
    assert process.returncode == 130 and len(error.splitlines()) == 1 and "--resume" in error
    assert (workplace / ".x.part/stage-2.pt").exists()


def test_ctrl_c_in_a_write(workplace, monkeypatch):
    """torch.save turns an interruption of its file into an error of its own: still an interruption, not a full disk."""
    real = torch.save

    def interrupting(state, file):
        write, calls = file.write, []
        broken = types.SimpleNamespace(flush=file.flush, write=lambda data: calls.append(0) or (write(data) if len(calls) < 9 else os.kill(os.getpid(), signal.SIGINT)))
        real(state, broken)
    monkeypatch.setattr(torch, "save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        call(workplace, "sft_baseline", *SHORT)
    assert not list(workplace.glob(".x.part/stage-?.pt"))


@pytest.fixture
def interrupted(workplace, monkeypatch):
    """A folder with a baseline run that died in the second epoch of stage 2."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, sft_baseline, "step", 8)
        call(workplace, "sft_baseline", *SHORT)
    shutil.copy(workplace / "facts/tiny/train_known.jsonl", workplace / "known.jsonl")
    return workplace


@pytest.mark.parametrize("words, change, named", [
    ([], None, "--resume"), (["--resume", "--epochs", 9], None, "config epochs was 3, is 9"),
    (["--resume", "--seed", 1, "--temperature", 9], None, "--temperature"), (["--resume", "--learning-rate", 1e-3], None, "learning_rate was 0.0004"),
    (["--resume"], "facts", "data heldout was"), (["--resume"], lambda state: state["model"].popitem(), "stage-2.pt"),
    (["--resume"], lambda state: state["optimizer"]["param_groups"].pop(), "stage-2.pt"), (["--resume"], lambda state: state.pop("run"), "stage-2.pt"),
    (["--resume"], lambda state: state.update(model={k: v[:1] for k, v in state["model"].items()}), "stage-2.pt"),
    (["--resume"], lambda state: state.update(bomb=Bomb("exploded")), "stage-2.pt"), (["--resume"], "cut", "stage-2.pt"), (["--resume"], "empty", "stage-2.pt")])
def test_refused_resumption(interrupted, words, change, named):
    """Other settings, other rows, another model, a broken state: the line says which, and the interrupted run stays as it is."""
    path = interrupted / ".x.part/stage-2.pt"
    if change == "facts":
        real = (interrupted / "facts/tiny").resolve()
        os.unlink(interrupted / "facts/tiny")
        shutil.copytree(real, interrupted / "facts/tiny")
        rows = (real / "heldout_known.jsonl").read_text("utf-8").splitlines(keepends=True)
        (interrupted / "facts/tiny/heldout_known.jsonl").write_text("".join(rows[1:]), encoding="utf-8")
    elif change in ("cut", "empty"):
        os.truncate(path, os.path.getsize(path) // 2 if change == "cut" else 0)
    elif change:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    before = {file: file.read_bytes() for file in interrupted.glob(".x.part/*")}
    assert named in refused(interrupted, "sft_baseline", *SHORT, *words)
    assert {file: file.read_bytes() for file in interrupted.glob(".x.part/*")} == before and not (interrupted / "x").exists()
    assert not list(interrupted.glob("exploded")) and not os.path.exists("exploded")


def test_overwrite_starts_anew(interrupted):
    (interrupted / ".x.part/stage-2-epoch-1").mkdir()               # of --save-every-epoch
    done = call(interrupted, "sft_baseline", *SHORT, "--overwrite")
    assert "resumed" not in done.stdout and rows_of(interrupted / "x/metrics.jsonl")[-1]["epoch"] == 3
    assert not list(interrupted.glob("x/stage-*"))
    assert not list(interrupted.glob(".x*"))


def no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk(interrupted):
    """No room for a state: one line, and with room again the run goes on from the state before."""
    (interrupted / ".x.part/stage-2.tmp").symlink_to("/dev/full")
    assert "stage-2.pt: cannot be written ([Errno 28] No space left on device" in refused(interrupted, "sft_baseline", *SHORT, "--resume")
    (interrupted / ".x.part/stage-2.tmp").unlink()
    with pytest.MonkeyPatch.context() as patch:                      # the same for what the run leaves
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", no_room)
        assert "--out x: cannot be written ([Errno 28]" in refused(interrupted, "sft_baseline", *SHORT, "--resume")
    assert "stage 2: resumed after epoch 3" in call(interrupted, "sft_baseline", *SHORT, "--resume").stdout


def test_an_old_run_stays_until_the_new_one_is_whole(workplace, monkeypatch):
    """--overwrite: killed at any of the last renamings, the old run or the new one is there, or can be resumed."""
    call(workplace, "sft_baseline", *SHORT)
    whole = ended(workplace / "x")
    (workplace / "x/old").touch()
    for n in (1, 6, 1, 2, 1):                                       # the first state; behind five, the two last renamings; again
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, sft_baseline, "rename", n)
            call(workplace, "sft_baseline", *SHORT, "--overwrite", *["--resume"] * (n < 6))
        assert (workplace / "x/old").exists() or (workplace / ".x.old/old").exists()
    call(workplace, "sft_baseline", *SHORT, "--overwrite", "--resume")
    new = ended(workplace / "x")
    assert new["run.json"]["config"].pop("overwrite") and not whole["run.json"]["config"].pop("overwrite") and new == whole
    assert not list(workplace.glob(".x*"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_and_keeps_the_last_state(workplace, monkeypatch, what):
    """A loss or a gradient that is not finite in the second epoch of stage 2: step, rate and rows are named; resumed, it is as never."""
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
        return result * torch.inf if what == "gradient" else (result[0] * torch.nan, {"ce": torch.nan})
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        said = refused(workplace, "sft_baseline", *SHORT)
    assert "stage 2, epoch 2, step 5:" in said and "learning rate 0.000" in said and ("nan" in said) == (what == "loss")
    numbers = json.loads(said[said.index(" rows [") + 6:said.index("]") + 1])
    assert len(numbers) == 16 and 1 <= min(numbers) and max(numbers) <= 48
    assert torch.load(workplace / ".x.part/stage-2.pt", weights_only=True)["epoch"] == 1
    call(workplace, "sft_baseline", *SHORT, "--resume")
    assert ended(workplace / "x") == whole


@pytest.mark.parametrize("scale, what, ends", [(2.0, "gradient", False), (1.0, "gradient", True), (2.0, "loss", True)])
def test_a_step_that_the_scaler_skips_is_no_divergence(base, world, monkeypatch, capsys, scale, what, ends):
    """fp16: a gradient beyond its range is the scaler's affair as long as the scale can be halved; a loss that is no number is not."""
    rows = sft_baseline.encode(base[1], sft_baseline.read_rows(world / "train_known.jsonl", {})[:8], 128)
    model, config, metrics, calls = copy.deepcopy(base[0]), sft_baseline.Config(batch_size=4, learning_rate=1e-4), [], []
    scaler, clip, loss = torch.amp.GradScaler, torch.nn.utils.clip_grad_norm_, plain_loss(sft_baseline, model)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **more: scaler(*args, **more, init_scale=scale))
    broken = lambda result: calls.append(0) or (result * torch.inf if len(calls) == 1 else result)
    if what == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: broken(clip(*args)))
    loss_function = loss if what == "gradient" else lambda *args: (broken(loss(*args)[0]), {"ce": torch.nan})
    train = lambda: sft_baseline.run_stage(2, model, rows, 2, loss_function, lambda stage, epoch: {}, metrics,
                                           torch.device("cpu"), torch.float16, config)
    if ends:
        with pytest.raises(SystemExit):
            train()
        assert "stage 2, epoch 1, step 1:" in capsys.readouterr().err and not metrics
    else:
        train()
        assert len(metrics) == 2 and len(calls) == 4


# -------------------------------------------------------------------------------------------------- several processes

def step_of(method, rank, world, folder, out):
    """One window of `method` in this process, one of `world`; saves its gradient and what is logged to `out`."""
    script = importlib.import_module(method)
    assert (script.RANK, script.WORLD) == (rank, world)
    device = torch.device("cpu")
    model, tokenizer = script.load_model(folder / "base", device)
    rows = script.encode(tokenizer, script.read_rows(folder / "train_known.jsonl", {})[:9], 128)     # batches of 4, 4 and 1: an empty share
    config, metrics, found = script.Config(batch_size=4, accumulate=3, learning_rate=1e-3), [], {}
    trunk, head = script.split_model(model, script.collate(rows[:2], device))
    loss = lambda batch, window: script.cross_entropy(head(trunk(batch, batch["supervised"])), batch, window)
    if method == "sft_selfdistill":
        config.kl_weight, plain = 4.0, loss
        teacher = script.make_teacher(model, trunk, head, rows, device, torch.float32, config)
        with torch.no_grad():                                       # away from the teacher: the KL has a gradient
            model.transformer.wte.weight += 0.02 * torch.randn(model.transformer.wte.weight.shape, generator=torch.Generator().manual_seed(0))
        loss = lambda batch, window: script.self_distillation(trunk, head, teacher, batch, window, config)
    if method == "sft_freeze":
        script.freeze(model, script.Config(trainable="attention"))
        start, plain = {name: 0.9 * p.detach() for name, p in model.named_parameters() if p.requires_grad}, loss
        config.l2 = 0.01
        loss = lambda batch, window: script.l2_to_before(plain(batch, window), batch, window, model, start, config)
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda parameters, norm: found.update(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}) or clip(model.parameters(), norm)
    if world > 1:
        script.dist.init_process_group("gloo")
    script.run_stage(2, model, rows, 1, loss, lambda stage, epoch: {}, metrics, device, torch.float32, config)
    torch.nn.utils.clip_grad_norm_ = clip
    torch.save({"gradient": found, "metrics": metrics}, f"{out}-{rank}.pt")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_gradient_of_one(world, tmp_path, method):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as patch:                  # as torchrun does; read when the script is imported
            for key, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}.items():
                patch.setenv(key, str(value))
            processes.append(multiprocessing.get_context("spawn").Process(target=step_of, args=(method, rank, 2, world, tmp_path / "2")))
            processes[-1].start()
    step_of(method, 0, 1, world, tmp_path / "1")
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    whole = torch.cat([g.flatten() for g in one["gradient"].values()])
    for other in two:
        assert one["gradient"].keys() == other["gradient"].keys()
        assert (torch.cat([g.flatten() for g in other["gradient"].values()]) - whole).norm() <= 1e-6 * whole.norm()
        for key in {"ce", "kl", "distance"} & one["metrics"][0].keys():
            assert other["metrics"][0][key] == pytest.approx(one["metrics"][0][key], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_torchrun(workplace, method):
    """Two processes end where one does, within a fact; one of them writes and speaks."""
    words = ["--epochs", 3, "--batch-size", 7]
    call(workplace, method, *words, "--out", "one")
    done = run(workplace, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{method}.py", *words, "--out", "two")
    assert done.stdout.count("saved two") == 1 and done.stdout.count("stage 2, epoch 3:") == 1
    one, two = (rows_of(workplace / out / "metrics.jsonl") for out in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key, n in (("unknown", 24), ("known", 24), ("heldout", len(rows_of(workplace / "one/answers.jsonl")))):
            assert abs(a[key] - b[key]) * n <= 1.01, (key, a, b)
    assert one[-1]["ce"] == pytest.approx(two[-1]["ce"], rel=1e-3)
    assert [row["prompt"] for row in rows_of(workplace / "two/answers.jsonl")] == [row["prompt"] for row in rows_of(workplace / "one/answers.jsonl")]
    assert json.loads((workplace / "two/run.json").read_text())["processes"] == 2


def test_several_processes_make_no_facts(workplace, monkeypatch):
    """One of them would work for an hour while the others wait; so the line says how to make them first."""
    monkeypatch.setattr(sft_baseline, "WORLD", 2)
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        sft_baseline.fact_files(sft_baseline.parse(["--facts", "absent"]))
    assert not (workplace / "absent").exists()
