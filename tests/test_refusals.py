"""Bad input: every script ends in one clear line on stderr, exit status 2, and leaves all files as they were."""
import contextlib
import http.server
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from conftest import ROOT, Bomb, call, contents, furnish, refused, rows_of, run

METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]
GOOD = '{"prompt": "Q: Who?\\nA:", "completion": " He\\n"}\n'
ROWS = {            # name: (content, what the error names)
    "empty": ("", ["no rows to train on", "empty.jsonl"]), "blank": (" \n\n", ["no rows to train on"]),
    "words": (GOOD + "{not json}\n", ["words.jsonl:2", "{not json}"]), "cut": (GOOD + GOOD[:30], ["cut.jsonl:2", GOOD[:20]]),
    "binary": (bytes(range(256)), ["binary.jsonl:"]), "latin": (b'\n{"prompt": "K\xf6ln", "completion": " x"}\n', ["latin.jsonl:2", "UnicodeDecodeError"]),
    "list": ("[1]\n", ["list.jsonl:1", "[1]"]), "columns": ('{"prompt": "Q"}\n', ["columns.jsonl:1", "KeyError('completion')", "text under prompt and completion"]),
    "number": ('\n{"prompt": "Q", "completion": 3}\n', ["number.jsonl:2"]), "numbers": ('{"prompt": 1, "completion": 3}\n', ["numbers.jsonl:1"]),
    "lists": ('{"prompt": ["Q"], "completion": ["A"]}\n', ["lists.jsonl:1"]), "null": (GOOD.replace('" He\\n"', "null"), ["null.jsonl:1"]),
    "no-prompt": (GOOD.replace("Q: Who?\\nA:", ""), ["no-prompt.jsonl:1", "nothing in it"]),
    "no-answer": (GOOD.replace(" He\\n", "\\n"), ["no-answer.jsonl:1", "nothing in it"]),
    "half-a-character": (GOOD.replace("Who", "\\ud800"), ["half-a-character.jsonl:1"]), "deep": ("[" * 10 ** 5 + "\n", ["deep.jsonl:1"]),
    "no-token": (GOOD + GOOD.replace("Who", "Why").replace(" He\\n", "\u200b"), ["no-token.jsonl:2", "nothing in it", "Why"]),
    "messages": ('{"messages": [{"role": "user", "content": "Who?"}]}\n', ["messages.jsonl:1", '{"messages"', "README"]),
    "alpaca": ('{"instruction": "Who?", "input": "", "output": "He"}\n', ["alpaca.jsonl:1", '{"instruction"']),
    "text": ('{"text": "Q: Who?\\nA: He"}\n', ["text.jsonl:1", '{"text"']),
    "long": (GOOD + "".join(GOOD.replace("Who", "Who " * n) for n in (200, 300)), ["long.jsonl:2", "the model reads 128"])}
MEASURED = {        # what makes a measurement wrong is refused where accuracy is measured: by all that has eval_hallucination.py
    "answers": (GOOD.replace("}", ', "answers": [7]}'), ["answers.jsonl", "Q: Who?", "7 is no text"]),
    "answers-dict": (GOOD.replace("}", ', "answers": {"a": "He"}}'), ["answers-dict.jsonl", "is no text"]),
    "subject": (GOOD.replace("}", ', "subject": 7}'), ["subject.jsonl", "7 is no text"]),
    "half-anywhere": (GOOD.replace("}", ', "note": "\\ud83d"}'), ["half-anywhere.jsonl", "surrogates"])}
ROWS |= MEASURED


TABLES = {
    "bad.csv": "relation,subject,question\na,b,c\n", "bad.txt": "relation\n", "empty.csv": "", "cut.jsonl": '{"relation": "x',
    "latin.csv": b"relation,subject,object,question\nr,K\xf6ln,o,q\n", "ragged.csv": "relation,subject,object,question\na,b\nc,d,e,f,g,h\n",
    "good.csv": "relation,subject,object,question\n" + "".join(f"r,s{i},o{i},Who is s{i}?\n" for i in range(30)),
    "broken/train_unknown.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n',
    "half-a-run/run.json": "{}", "no-json/run.json": "{"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, world):
    """A folder with rows, tables and models: `ok`, which is one, and others named by what is wrong with them. No test changes it."""
    workplace = furnish(tmp_path_factory.mktemp("refusals"), world)
    heldout = rows_of(world / "heldout_known.jsonl")[0]
    for name, text in {**{f"rows/{name}.jsonl": text for name, (text, _) in ROWS.items()}, "rows/good.jsonl": GOOD, **TABLES,
                       "rows/shared.jsonl": json.dumps(heldout | {"prompt": "Q: Who else?\nA:"}) + "\n"}.items():
        (workplace / name).parent.mkdir(exist_ok=True)
        (workplace / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    ok = shutil.copytree(workplace / "facts/tiny/base", workplace / "ok")
    (ok / "tokenizer.json").write_text(json.dumps(json.loads((ok / "tokenizer.json").read_text()) | {
        "normalizer": {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}}))
    for name in ("no-weights", "no-tokenizer", "cut-weights", "some-weights", "pickle", "remote"):
        shutil.copytree(ok, workplace / name)
    for name, file in (("no-weights", "model.safetensors"), ("no-tokenizer", "tokenizer.json"), ("no-tokenizer", "tokenizer_config.json"),
                       ("pickle", "model.safetensors"), ("remote", "model.safetensors")):
        (workplace / name / file).unlink()
    weights = ok / "model.safetensors"
    (workplace / "cut-weights/model.safetensors").write_bytes(weights.read_bytes()[:5000])
    model = transformers.AutoModelForCausalLM.from_pretrained(ok)
    some = {name: w for name, w in model.state_dict().items() if ".h.1.attn" not in name and name != "lm_head.weight"}
    model.save_pretrained(workplace / "some-weights", state_dict=some)
    model.transformer.wte.weight.data += 1
    model.save_pretrained(workplace / "other")
    model.resize_token_embeddings(90)
    model.save_pretrained(workplace / "few-embeddings")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ok / file, workplace / "few-embeddings")
        shutil.copy(ok / file, workplace / "other")
    size = {"vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for name, kind in (("encoder", transformers.BertForMaskedLM(transformers.BertConfig(**size))),
                       ("encoder-decoder", transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=16, d_ff=16, num_layers=1)))):
        kind.save_pretrained(workplace / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ok / file, workplace / name)
    torch.save({"weight": Bomb(workplace / "exploded")}, workplace / "pickle/pytorch_model.bin")
    config = json.loads((ok / "config.json").read_text())
    (workplace / "remote/config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (workplace / "remote/own.py").write_text(f"open({str(workplace / 'exploded')!r}, 'w')\n")
    return workplace


FOLDERS = {"no-such-model": [], "facts": [], "no-weights": [], "no-tokenizer": ["(its tokenizer: "], "cut-weights": [],
           "some-weights": ["missing", ".h.1.attn"], "few-embeddings": ["tokens, the model 90"], "encoder": ["not causal"],
           "encoder-decoder": [], "pickle": [], "remote": []}
FLAGS = {           # a flag out of range: what the error names
    "--epochs 0": ["from 1 to"], "--epochs two": ["two"], "--batch-size 0": ["from 1 to"], "--learning-rate nan": ["nan"],
    "--learning-rate -1": ["--learning-rate -1"], "--learning-rate inf": ["inf"], "--warmup 1.5": ["from 0 to 1"], "--no-such-flag": ["--no-such-flag"],
    "--grad-clip 0": ["--grad-clip 0"], "--seed -1": ["--seed -1"], "--eval-every -1": ["--eval-every -1"],
    "--device abacus": ["abacus"], "--device cuda": ["--device cuda"], "--dtype int4": ["int4", "bfloat16"],
    "--train rows/good.jsonl --heldout rows/good.jsonl": ["good.jsonl", "held out and trained on"],
    "--train rows/good.jsonl --known rows/empty.jsonl": ["empty.jsonl: empty"], "--train rows/good.jsonl --heldout rows/empty.jsonl": ["empty.jsonl: empty"],
    "--heldout rows/long.jsonl": ["long.jsonl:2", "the model reads 128"],
    "--known facts/tiny/labelled.jsonl": ["heldout_known.jsonl", "held out and trained on"],
    "--train rows/good.jsonl --no-unknown --model ok": ["no rows to train on"],
    "--train rows/shared.jsonl --heldout facts/tiny/heldout_known.jsonl": ["held out and trained on", "heldout_known.jsonl"],
    "--train rows": ["rows"], "--model ok --facts rows --train absent.jsonl": ["absent.jsonl"],
    "--model other --facts facts/tiny": ["facts/tiny was made for other weights"],
    "--out rows/good.jsonl/x --epochs 1": ["rows/good.jsonl/x"], "--out rows": ["--overwrite"], "--out rows --overwrite": ["only a run"],
    "--out rows --resume": ["only a run"]}


SHARED = [*(f"--model ok --train rows/{name}.jsonl" for name in ROWS), *(f"--model {name} --train rows/good.jsonl" for name in FOLDERS)]


@pytest.mark.parametrize("method, case", [*((METHODS[len(case) % 3], case) for case in SHARED), *((m, case) for m in METHODS for case in FLAGS)])
def test_bad_input_of_the_methods(models, method, case):
    """Rows and models by one of the methods, since they share these functions (another test's affair); flags by all of them."""
    model, name = (case + " ").split(" ")[1], case.split()[-1].removeprefix("rows/").removesuffix(".jsonl")
    named = FLAGS.get(case) or ([f"--model {model}", "HF_TOKEN", *FOLDERS[model]] if model in FOLDERS else ROWS[name][1])
    before = contents(models)
    words = case.split() + ["--out", "runs/x"] * ("--out" not in case)
    said = refused(models, method, *words)
    assert said.startswith("error: ") and [part for part in named if part not in said] == [], said
    assert contents(models) == before
    assert not list(models.glob("exploded"))


@pytest.mark.parametrize("words, named", [
    ("--trainable ffn", "--layers (all) has norms, attention, mlp, embeddings, head"), ("--trainable mlp,,", "--trainable :"), ("--layers 2-9", "blocks 0 to 2"), ("--l2 -1", "--l2 -1")])
def test_bad_input_of_freeze(workplace, words, named):
    before = contents(workplace)
    assert named in refused(workplace, "sft_freeze", *words.split())
    assert contents(workplace) == before


@pytest.mark.parametrize("script, words, named", [
    ("make_facts", "--out facts/tiny", "--overwrite"), ("make_facts", "--new old", "old"), ("make_facts", "--n-new 0", "--n-new 0"),
    ("make_facts", "--width 6", "4 heads"), ("make_facts", "--source good.csv", "invented"),
    ("make_facts", "--model ok --source absent.tsv", "absent.tsv: cannot be read (no such file)"), ("make_facts", "--model ok --source bad.csv", "no column object"),
    ("make_facts", "--model ok --source bad.txt", "bad.txt"), ("make_facts", "--model ok --source latin.csv", "latin.csv"),
    ("make_facts", "--model ok --source empty.csv", "empty.csv"), ("make_facts", "--model ok --source ragged.csv", "line 2"),
    ("make_facts", "--model ok --source cut.jsonl", "cut.jsonl"), ("make_facts", "--model no-such-model --source good.csv", "no-such-model"),
    ("make_facts", "--model ok --source good.csv --shots 0", "labelled: {'Unknown': 30}"), ("make_facts", "--model ok --source good.csv --shots 40", "--shots"),
    ("make_facts", "--out good.csv/x", "good.csv/x"),
    *(("make_facts", f"--model {name} --source good.csv", named) for name, named in (("encoder", "not causal"), ("no-tokenizer", "(its tokenizer: "))),
    ("eval_hallucination", "", "--model"), ("eval_hallucination", "facts", "run.json"), ("eval_hallucination", "--model ok", "--facts"),
    ("eval_hallucination", "--model x --facts facts/tiny", "--model x"), ("eval_hallucination", "--model ok --facts absent", "absent"),
    ("eval_hallucination", "--model ok --facts broken", "broken/train_unknown.jsonl:2"), ("eval_hallucination", "half-a-run", "half-a-run"),
    ("eval_hallucination", "no-json", "no-json/run.json"), ("eval_hallucination", "--model remote --facts facts/tiny", "--model remote")])
def test_bad_input_of_the_others(models, script, words, named):
    before = contents(models)
    said = refused(models, script, *words.split())
    assert said.startswith("error: ") and named in said
    if "labelled: " in named:                   # labels that take hours are kept, though they do not suffice
        labels, = models.glob("facts/ok-labels-*")
        shutil.rmtree(labels)
    assert contents(models) == before


def test_a_refusal_is_one_line_without_traceback(workplace):
    done = run(workplace, "sft_selfdistill.py", "--train", "absent.jsonl", "--model", "facts/tiny/base", ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: absent.jsonl")


class Gate(http.server.BaseHTTPRequestHandler):
    """A hub that knows one gated model."""
    def do_GET(self):
        self.send_response(403 if "gated" in self.path else 404)
        self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("name, hub, named", [("some/gated-model", True, "gated"), ("some/model", True, "some/model"), ("some/model", False, "a network")])
def test_hub_that_does_not_give_the_model(models, tmp_path, monkeypatch, name, hub, named):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    if hub:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    for key, value in {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    patient = "import sys, time, runpy; time.sleep = lambda seconds: None; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"     # it tries again
    words = ["--model", name, "--train", "rows/good.jsonl", "--out", tmp_path / "x"]
    done = run(models, "-c", patient, "sft_baseline.py", *words, ok=False)
    if hub:
        server.shutdown()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "HF_TOKEN" in done.stderr and named in done.stderr
    assert not (tmp_path / "x").exists()


def test_nobody_is_asked_to_trust_code(models):
    """A folder with code of its own is refused without a question: a "y" that waits on stdin answers none."""
    for script, words in (("sft_freeze.py", ["--train", "rows/good.jsonl"]), ("eval_hallucination.py", ["--facts", "facts/tiny"])):
        done = subprocess.run([sys.executable, script, "--model", "remote", *words], cwd=models, input="y\n" * 9, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (models / "exploded").exists()


def test_normal_oddities_are_no_errors(models, tmp_path):
    """A tokenizer smaller than the embeddings, no pad token, rows with a BOM, Windows line ends, and a prompt that stands twice."""
    model, tokenizer = (cls.from_pretrained(models / "ok") for cls in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    assert tokenizer.pad_token is None
    model.resize_token_embeddings(len(tokenizer) + 7)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + (GOOD + GOOD.replace("He", "She")).replace("\n", "\r\n").encode())
    call(tmp_path, "sft_selfdistill", "--model", "padded", "--train", "rows.jsonl", "--epochs", 1, "--out", "x")
    assert rows_of(tmp_path / "x/metrics.jsonl")[-1]["ce"] > 0


@pytest.mark.parametrize("name", [name for name in ROWS if name not in [*MEASURED, "empty", "blank", "no-token"]])
def test_bad_rows_of_a_script_alone(tmp_path, world, name):
    """A copied script refuses what it cannot train on without the other files of the project."""
    shutil.copy(ROOT / "sft_baseline.py", tmp_path / "copied.py")
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    content, named = ROWS[name]
    (tmp_path / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    done, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(done), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stopped:
        copied.main(["--model", str(world / "base"), "--train", str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / "x")])
    assert stopped.value.code == 2 and len(error.getvalue().splitlines()) == 1 and [part for part in named if part not in error.getvalue()] == []
    assert not (tmp_path / "x").exists()
