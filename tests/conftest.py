"""One small synthetic world, created once for all tests, and helpers that run the scripts."""
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # before the hub's client is imported: tests use no network

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs"), str(ROOT / "docs/study")]
METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]
SMALL_WORLD = ["--n-names", "40", "--n-codes", "12", "--width", "64", "--n-new", "24"]


# --------------------------------------------------------------------------------------- files

def rows_of(path):
    """Read the rows of a JSONL file (list of dicts)."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def code_of(page):
    """Return the Python blocks of a page (list of str)."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)


def contents(folder):
    """Return {path: bytes, or None for a folder} of everything in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
            if "__pycache__" not in path.parts}


class Bomb:
    """Creates the file `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# --------------------------------------------------------------------------- running the scripts

def call(folder, script, *words, ok=True):
    """Run the main() of a script in `folder`, in this process: a new process takes seconds."""
    module = importlib.import_module(script)
    words = [str(word) for word in words]
    out, err = io.StringIO(), io.StringIO()
    status = 0
    before = os.getcwd()
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
    """Return the error of a script that rejects `words`: one line on stderr, exit status 2."""
    done = call(folder, script, *words, ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    return done.stderr


def run(folder, *words, ok=True):
    """Run a script in `folder` as a user would, in a process of its own; return the process."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True,
        encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode == 0) == ok, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


@contextlib.contextmanager
def restored():
    """Restore the functions of the method scripts that docs/study/frontier.py replaces."""
    modules = [importlib.import_module(name) for name in METHODS]
    own = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, own):
            vars(module).update(names)


# ------------------------------------------------------------------------------------- training

def counts_of(batches):
    """Count the tokens that a step of collated batches predicts, as the losses expect them."""
    return {key: sum(len(batch[key]) for batch in batches) for key in ("completion", "predicted")}


def ce_loss(script, model, dtype="float32"):
    """Return the cross-entropy loss of `script` as loss_function(batch, counts)."""
    def loss_function(batch, counts):
        hidden = script.last_hidden_state(model, batch, dtype)
        return script.cross_entropy(model, hidden, batch, counts)
    return loss_function


def train_epochs(script, model, examples, loss_function, **settings):
    """Run stage 2 of `script`, two epochs by default; return the metrics, a dict per epoch."""
    defaults = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu",
                "dtype": "float32"}
    config = script.Config(**defaults | settings)
    stage = script.train_stage(2, model, examples, loss_function, config, {"epoch": 0})
    return [metrics for metrics, _ in stage]


def trainer_class(trainer="from transformers import Trainer"):
    """Return SelfDistillationTrainer of docs/trainer.py, with its import of Trainer replaced."""
    code = (ROOT / "docs/trainer.py").read_text("utf-8")
    line = "\nfrom transformers import Trainer\n"
    assert code.count(line) == 1
    names = {}
    exec(code.replace(line, f"\n{trainer}\n"), names)
    return names["SelfDistillationTrainer"]


# ------------------------------------------------------------------------------------- fixtures

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Create a fact folder with a pretrained base model; takes about 20 seconds."""
    import make_facts
    make_facts.PRETRAIN_EPOCHS = 60         # the text is a sixth of the usual one
    folder = tmp_path_factory.mktemp("facts") / "tiny"
    return make_facts.main([*SMALL_WORLD, "--out", str(folder)])


@pytest.fixture(scope="session")
def base(world):
    """Load the base model of the small world: (model, tokenizer)."""
    from eval_hallucination import load_model
    return load_model(world / "base")


def copy_project(folder, world):
    """Put the scripts and the small world into an empty folder, where the README's commands run."""
    for script in ROOT.glob("*.py"):
        (folder / script.name).write_bytes(script.read_bytes())
    (folder / "facts").mkdir()
    os.symlink(world, folder / "facts" / "tiny", target_is_directory=True)
    return folder


@pytest.fixture
def workplace(tmp_path, world):
    """Return a temporary folder with the scripts and the small world."""
    return copy_project(tmp_path, world)
