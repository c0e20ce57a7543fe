"""Bad input ends in one line on stderr and exit status 2, and leaves all files as they were."""
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
from conftest import (METHODS, ROOT, Bomb, call, contents, copy_project, refused, rows_of, run)

GOOD = '{"prompt": "Q: Who?\\nA:", "completion": " He\\n"}\n'
# Rows that a script rejects even without the other files: name, content, parts of the error.
ROWS = {
    "words": (GOOD + "{not json}\n", ["words.jsonl:2", "{not json}"]),
    "cut": (GOOD + GOOD[:30], ["cut.jsonl:2", GOOD[:20]]),
    "binary": (bytes(range(256)), ["binary.jsonl:"]),
    "latin": (b'\n{"prompt": "K\xf6ln", "completion": " x"}\n',
              ["latin.jsonl:2", "UnicodeDecodeError"]),
    "list": ("[1]\n", ["list.jsonl:1", "[1]"]),
    "columns": ('{"prompt": "Q"}\n', ["columns.jsonl:1", "KeyError('completion')",
                                      "a prompt and a completion"]),
    "number": ('\n{"prompt": "Q", "completion": 3}\n', ["number.jsonl:2"]),
    "numbers": ('{"prompt": 1, "completion": 3}\n', ["numbers.jsonl:1"]),
    "lists": ('{"prompt": ["Q"], "completion": ["A"]}\n', ["lists.jsonl:1"]),
    "null": (GOOD.replace('" He\\n"', "null"), ["null.jsonl:1"]),
    "no-prompt": (GOOD.replace("Q: Who?\\nA:", ""), ["no-prompt.jsonl:1", "empty prompt or"]),
    "no-answer": (GOOD.replace(" He\\n", "\\n"), ["no-answer.jsonl:1", "or completion"]),
    "half-a-character": (GOOD.replace("Who", "\\ud800"), ["half-a-character.jsonl:1"]),
    "deep": ("[" * 10 ** 5 + "\n", ["deep.jsonl:1"]),
    "messages": ('{"messages": [{"role": "user", "content": "Who?"}]}\n',
                 ["messages.jsonl:1", '{"messages"', "docs/use.md"]),
    "alpaca": ('{"instruction": "Who?", "input": "", "output": "He"}\n',
               ["alpaca.jsonl:1", '{"instruction"']),
    "text": ('{"text": "Q: Who?\\nA: He"}\n', ["text.jsonl:1", '{"text"']),
    "long": (GOOD + "".join(GOOD.replace("Who", "Who " * n) for n in (200, 300)),
             ["long.jsonl:2", "the model's context is 128"])}
# Rows that are rejected because they cannot be measured, or by the tokenizer of the model `ok`.
MEASURED = {
    "empty": ("", ["no rows to train on", "empty.jsonl"]),
    "blank": (" \n\n", ["no rows to train on"]),
    "no-token": (GOOD + GOOD.replace("Who", "Why").replace(" He\\n", "\u200b"),
                 ["no-token.jsonl:2", "empty prompt or completion", "Why"]),
    "answers": (GOOD.replace("}", ', "answers": [7]}'),
                ["answers.jsonl", "Q: Who?", "7 is not a string"]),
    "answers-dict": (GOOD.replace("}", ', "answers": {"a": "He"}}'),
                     ["answers-dict.jsonl", "is not a string"]),
    "subject": (GOOD.replace("}", ', "subject": 7}'), ["subject.jsonl", "7 is not a string"]),
    "half-anywhere": (GOOD.replace("}", ', "note": "\\ud83d"}'),
                      ["half-anywhere.jsonl", "surrogates"])}
# Models, and what the error names in addition to the model and HF_TOKEN.
MODELS = {"no-such-model": [], "facts": [], "no-weights": [], "no-tokenizer": [],
          "cut-weights": [], "some-weights": ["missing", ".h.1.attn"],
          "not-finite": ["not finite", ".h.1.attn"], "encoder": ["not causal"],
          "encoder-decoder": [], "pickle": [], "remote": []}
HEADER = "relation,subject,object,question\n"
FILES = {
    "bad.csv": "relation,subject,question\na,b,c\n",
    "bad.txt": "relation\n",
    "empty.csv": "",
    "cut.jsonl": '{"relation": "x',
    "latin.csv": b"relation,subject,object,question\nr,K\xf6ln,o,q\n",
    "short.csv": HEADER + "a,b,c,d\na,b\n",
    "ragged.csv": HEADER + "a,b,c,d\nc,d,e,f,g,h\n",
    "good.csv": HEADER + "".join(f"r,s{i},o{i},Who is s{i}?\n" for i in range(30)),
    "broken/train_unknown.jsonl":
        '{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n',
    "half-a-run/run.json": "{}",
    "no-json/run.json": "{",
    "rows/good.jsonl": GOOD}


def save_models(folder):
    """Save the model `ok`, and copies of it that are named after what is wrong with them."""
    tokenizer_files = ["tokenizer.json", "tokenizer_config.json"]
    ok = folder / "ok"
    shutil.copytree(folder / "facts/tiny/base", ok)
    # A zero-width space is no token.
    tokenizer = json.loads((ok / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    (ok / "tokenizer.json").write_text(json.dumps(tokenizer))
    removed = {"no-weights": ["model.safetensors"], "no-tokenizer": tokenizer_files,
               "cut-weights": [], "pickle": ["model.safetensors"],
               "remote": ["model.safetensors"]}
    for name, files in removed.items():
        shutil.copytree(ok, folder / name)
        for file in files:
            (folder / name / file).unlink()
    weights = (ok / "model.safetensors").read_bytes()
    (folder / "cut-weights/model.safetensors").write_bytes(weights[:5000])
    torch.save({"weight": Bomb(folder / "exploded")}, folder / "pickle/pytorch_model.bin")
    config = json.loads((ok / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "remote/config.json").write_text(json.dumps(config))
    (folder / "remote/own.py").write_text(f"open({str(folder / 'exploded')!r}, 'w')\n")

    model = transformers.AutoModelForCausalLM.from_pretrained(ok)
    some = {name: weights for name, weights in model.state_dict().items()
            if ".h.1.attn" not in name and name != "lm_head.weight"}
    model.save_pretrained(folder / "some-weights", state_dict=some)
    model.transformer.wte.weight.data += 1
    model.save_pretrained(folder / "other")
    model.transformer.h[1].attn.c_attn.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder / "not-finite")
    model = transformers.AutoModelForCausalLM.from_pretrained(ok)
    model.resize_token_embeddings(30)
    model.save_pretrained(folder / "few-embeddings")
    size = {"vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32}
    encoder = transformers.BertForMaskedLM(transformers.BertConfig(**size))
    encoder.save_pretrained(folder / "encoder")
    t5 = transformers.T5Config(d_model=16, d_ff=16, num_layers=1)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(folder / "encoder-decoder")
    for name in ("some-weights", "other", "not-finite", "few-embeddings", "encoder",
                 "encoder-decoder"):
        for file in tokenizer_files:
            shutil.copy(ok / file, folder / name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, world):
    """Return a folder with rows, tables and models, which no test changes."""
    folder = copy_project(tmp_path_factory.mktemp("refusals"), world)
    files = dict(FILES)
    for name, (content, _) in (ROWS | MEASURED).items():
        files[f"rows/{name}.jsonl"] = content
    heldout = rows_of(world / "heldout_known.jsonl")[0]
    files["rows/shared.jsonl"] = json.dumps(heldout | {"prompt": "Q: Who else?\nA:"})
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_models(folder)
    return folder


def check_refusal(inputs, out, script, words, named):
    """Check that a script rejects `words`, names the fault and changes no file."""
    before = contents(inputs)
    words = words.split()
    if "--out" not in words and script != "eval_hallucination":
        words += ["--out", out]
    error = refused(inputs, script, *words)
    assert error.startswith("error: ") and [part for part in named if part not in error] == []
    assert contents(inputs) == before       # so no code of a model was executed either
    assert not any(out.glob("*"))


# ---------------------------------------------------------------------------- training scripts

FLAGS = {
    "--epochs 0": ["--epochs 0"],
    "--epochs two": ["two"],
    "--batch-size 0": ["--batch-size 0"],
    "--gradient-accumulation-steps 0": ["--gradient-accumulation-steps 0"],
    "--learning-rate -1": ["--learning-rate -1"],
    "--seed -1": ["--seed -1"],
    "--no-such-flag": ["--no-such-flag"],
    "--device abacus": ["abacus"],
    "--device cuda": ["cuda"],
    "--dtype int4": ["int4", "bfloat16"],
    "--train rows --model ok": ["rows"],
    "--train absent.jsonl --model ok": ["absent.jsonl"],
    "--train rows/good.jsonl --model ok --known-only": ["no rows to train on"],
    "--model ok --train rows/good.jsonl --heldout rows/good.jsonl": ["good.jsonl", "held out and trained on"],
    "--model ok --train rows/good.jsonl --known rows/empty.jsonl": ["empty.jsonl is empty"],
    "--model ok --train rows/good.jsonl --heldout rows/empty.jsonl": ["empty.jsonl is empty"],
    "--model ok --train rows/shared.jsonl --heldout facts/tiny/heldout_known.jsonl": [
        "heldout_known.jsonl", "held out and trained on"],
    "--known facts/tiny/labelled.jsonl": ["heldout_known.jsonl", "held out and trained on"],
    "--heldout rows/long.jsonl": ["long.jsonl:2", "the model's context is 128"],
    "--model other --facts facts/tiny": ["facts/tiny was labelled with other weights"],
    "--model few-embeddings --train rows/good.jsonl": ["has no embedding", "only 30"],
    "--epochs 1 --out rows/good.jsonl/x": ["rows/good.jsonl/x"],
    "--epochs 1 --out rows": ["--out rows is not empty", "choose another folder"],
    "--epochs 1 --out rows --resume": ["--out rows is not empty", "choose another folder"]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("words", FLAGS)
def test_bad_flags(inputs, tmp_path, method, words):
    check_refusal(inputs, tmp_path / "x", method, words, FLAGS[words])


# The methods share the functions that read rows and models, so one of them is tested.
@pytest.mark.parametrize("name", ROWS | MEASURED)
def test_bad_rows(inputs, tmp_path, name):
    words = f"--model ok --train rows/{name}.jsonl"
    named = (ROWS | MEASURED)[name][1]
    check_refusal(inputs, tmp_path / "x", METHODS[len(name) % 3], words, named)


@pytest.mark.parametrize("name", MODELS)
def test_bad_models(inputs, tmp_path, name):
    words = f"--model {name} --train rows/good.jsonl"
    named = [f"model {name} cannot", "HF_TOKEN", *MODELS[name]]
    check_refusal(inputs, tmp_path / "x", METHODS[len(name) % 3], words, named)


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_of_a_script_alone(tmp_path, world, name):
    """A copied script rejects rows that it cannot train on without the other files."""
    shutil.copy(ROOT / "sft_baseline.py", tmp_path / "copied.py")
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    content, named = ROWS[name]
    rows = tmp_path / f"{name}.jsonl"
    rows.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["--model", world / "base", "--train", rows, "--out", tmp_path / "x"]
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        with pytest.raises(SystemExit) as stopped:
            copied.main(list(map(str, words)))
    line, = error.getvalue().splitlines()
    assert stopped.value.code == 2 and [part for part in named if part not in line] == []
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script, words, named", [
    ("sft_freeze", "--trainable ffn",
     "choose all or some of norms,attention,mlp,embeddings,head"),
    ("sft_freeze", "--trainable mlp,,", "--trainable :"),
    ("sft_freeze", "--layers 2-9", "0 ≤ A ≤ B ≤ 2"),
    ("sft_selfdistill", "--temperature 0", "--temperature 0"),
    ("make_facts", "--out facts/tiny", "--out facts/tiny is not empty"),
    ("make_facts", "--new old", "old"),
    ("make_facts", "--n-new 0", "--n-new 0"),
    ("make_facts", "--width 6", "6 and `num_heads`: 4"),
    ("make_facts", "--source good.csv", "synthetic"),
    ("make_facts", "--out good.csv/x", "good.csv/x"),
    ("make_facts", "--model ok --source absent.tsv", "absent.tsv: cannot be read"),
    ("make_facts", "--model ok --source bad.csv", "no column object"),
    ("make_facts", "--model ok --source bad.txt", "bad.txt"),
    ("make_facts", "--model ok --source latin.csv", "latin.csv"),
    ("make_facts", "--model ok --source empty.csv", "empty.csv"),
    ("make_facts", "--model ok --source short.csv", "short.csv, row 2: cannot be read (ValueError('nan is not"),
    ("make_facts", "--model ok --source ragged.csv", "Expected 4 fields in line 3, saw 6"),
    ("make_facts", "--model ok --source cut.jsonl", "cut.jsonl"),
    ("make_facts", "--model no-such-model --source good.csv", "no-such-model"),
    ("make_facts", "--model encoder --source good.csv", "not causal"),
    ("make_facts", "--model no-tokenizer --source good.csv", "no-tokenizer"),
    ("eval_hallucination", "", "--model"),
    ("eval_hallucination", "facts", "run.json"),
    ("eval_hallucination", "--model ok", "--facts"),
    ("eval_hallucination", "--model x --facts facts/tiny", "model x cannot"),
    ("eval_hallucination", "--model ok --facts absent", "absent"),
    ("eval_hallucination", "--model ok --facts broken", "broken/train_unknown.jsonl:2"),
    ("eval_hallucination", "half-a-run", "half-a-run"),
    ("eval_hallucination", "no-json", "no-json/run.json"),
    ("eval_hallucination", "--model remote --facts facts/tiny", "model remote cannot")])
def test_bad_input_of_one_script(inputs, tmp_path, script, words, named):
    check_refusal(inputs, tmp_path / "x", script, words, [named])


@pytest.mark.parametrize("shots, named", [
    (0, "only 0 facts for train_known.jsonl"), (40, "--shots")])
def test_too_few_facts(inputs, tmp_path, shots, named):
    """The labels are saved, because labelling is slow."""
    words = ["--model", "ok", "--source", "good.csv", "--out", tmp_path / "x", "--shots", shots]
    before = contents(inputs)
    assert named in refused(inputs, "make_facts", *words)
    assert contents(inputs) == before
    assert len(rows_of(tmp_path / "x/labelled.jsonl")) == (0 if shots else 30)


def test_error_is_one_line_without_traceback(workplace):
    words = ["--train", "absent.jsonl", "--model", "facts/tiny/base"]
    done = run(workplace, "sft_selfdistill.py", *words, ok=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "absent.jsonl" in done.stderr


# ------------------------------------------------------------------------------------- the hub

class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one gated model."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("name, running, named", [
    ("some/gated-model", True, "gated"), ("some/model", True, "some/model"),
    ("some/model", False, "a network")])
def test_model_that_the_hub_does_not_provide(inputs, tmp_path, monkeypatch, name, running, named):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    if running:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = """
import runpy, sys, time
time.sleep = lambda seconds: None       # between the hub client's attempts
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""
    words = ["--model", name, "--train", "rows/good.jsonl", "--out", tmp_path / "x"]
    done = run(inputs, "-c", code, "sft_baseline.py", *words, ok=False)
    if running:
        server.shutdown()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "HF_TOKEN" in done.stderr and named in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script, words", [
    ("sft_freeze.py", ["--train", "rows/good.jsonl"]),
    ("eval_hallucination.py", ["--facts", "facts/tiny"])])
def test_code_of_a_model_is_rejected_without_a_question(inputs, script, words):
    """A "y" that waits on stdin answers nothing."""
    command = [sys.executable, script, "--model", "remote", *words]
    done = subprocess.run(command, cwd=inputs, input="y\n" * 9, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not (inputs / "exploded").exists()


def test_accepted_oddities(inputs, tmp_path):
    """More embeddings than tokens, no pad token, a BOM, Windows line ends, a repeated prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "ok")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "ok")
    assert tokenizer.pad_token is None
    model.resize_token_embeddings(len(tokenizer) + 7)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    rows = (GOOD + GOOD.replace("He", "She")).replace("\n", "\r\n")
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    call(tmp_path, "sft_selfdistill", "--model", "padded", "--train", "rows.jsonl",
         "--epochs", 1, "--out", "x")
    assert rows_of(tmp_path / "x/metrics.jsonl")[-1]["ce"] > 0
