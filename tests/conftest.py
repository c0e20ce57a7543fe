"""One small invented world, made once and shared by all tests, and two ways to run a script."""
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"          # before any import of the hub's client: the tests need no network

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
SMALL_WORLD = ["--n-names", "40", "--n-codes", "12", "--width", "64", "--n-new", "24"]


def rows_of(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def code_of(page):
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


def trainer_class(trainer="from transformers import Trainer"):
    """The SelfDistillationTrainer of assets/use.md, derived from what `trainer` imports as Trainer."""
    code, = [code for code in code_of("assets/use.md") if "class SelfDistillationTrainer" in code]
    names = {}
    exec(code.replace("from transformers import Trainer", trainer), names)
    return names["SelfDistillationTrainer"]


def call(folder, script, *words, ok=True):
    """Run the `main` of a script of this project in `folder`, in this process: starting another one takes seconds."""
    module, out, err, status, before = importlib.import_module(script), io.StringIO(), io.StringIO(), 0, os.getcwd()
    words = [str(word) for word in words]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main(words)
    except SystemExit as stopped:
        status = stopped.code or 0
    finally:
        os.chdir(before)
    assert (status == 0) == ok, f"{script} {words}\n{out.getvalue()}\n{err.getvalue()}"
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def refused(folder, script, *words):
    """What a script says when it refuses `words` (str): one line on stderr, exit status 2."""
    done = call(folder, script, *words, ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    return done.stderr


@contextlib.contextmanager
def restored():
    """What a rival of assets/frontier.py replaces in the method scripts is put back afterwards."""
    modules = [importlib.import_module(name) for name in ("sft_baseline", "sft_selfdistill", "sft_freeze")]
    own = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, own):
            vars(module).update(names)


def contents(folder):
    """{path: bytes or None} of all that is in `folder`."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
            if "__pycache__" not in path.parts}


def counts_of(batches):
    """How many tokens an accumulation window of `collate`d batches predicts, as the losses take it."""
    return {mask: sum(int(b[mask][:, 1:].sum()) for b in batches) for mask in ("supervised", "real")}


def plain_loss(script, model):
    """The cross-entropy of `model` as the scripts put it together: loss_function(batch, counts)."""
    return lambda batch, counts: script.cross_entropy(model, script.last_hidden(model, batch), batch, counts)


def trained(script, model, examples, loss_function, **settings):
    """Stage 2 of `script`, two epochs unless `settings` say otherwise: its metrics, a dict an epoch."""
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "dtype": "float32"} | settings
    stage = script.run_stage(2, model, examples, loss_function, script.Config(**settings), {"epoch": 0})
    return [metrics for metrics, _ in stage]


def run(folder, *words, ok=True):
    """Run a script of this project in `folder` as a user would, in a process of its own; returns it, its output as text."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode == 0) == ok, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A fact folder with a pretrained base model, made by make_facts.py (some 20 seconds)."""
    import make_facts
    make_facts.PRETRAIN_EPOCHS = 60         # passes over a sixth of the usual text
    return make_facts.main([*SMALL_WORLD, "--out", str(tmp_path_factory.mktemp("facts") / "tiny")])


@pytest.fixture(scope="session")
def base(world):
    """(model, tokenizer) of the small world."""
    from eval_hallucination import load_model
    return load_model(world / "base")


def furnish(folder, world):
    """Put the scripts and the small world into the empty `folder`, where the README's commands then run as they stand."""
    for script in ROOT.glob("*.py"):
        (folder / script.name).write_bytes(script.read_bytes())
    (folder / "facts").mkdir()
    os.symlink(world, folder / "facts" / "tiny", target_is_directory=True)
    return folder


@pytest.fixture
def workplace(tmp_path, world):
    return furnish(tmp_path, world)


class Bomb:
    """What creates the file `path` when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
