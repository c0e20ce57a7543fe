"""The scripts as users run them: end to end, alone in an empty folder, from a hub cache; the README."""
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call, code_of, refused, restored, rows_of, run

import eval_hallucination
import make_facts

METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]
PEFT = importlib.util.find_spec("peft") is not None                     # optional, for a rival of assets/frontier.py
PICTURES = importlib.util.find_spec("matplotlib") is not None          # optional, see requirements.txt


@pytest.mark.parametrize("method", METHODS)
def test_run_folder(workplace, method):
    name = method.removeprefix("sft_")
    done = call(workplace, method, "--epochs", 2, "--accumulate", 2, "--batch-size", 16)
    out = workplace / "runs" / f"{name}-tiny-0"
    assert done.stdout.strip().endswith(f"saved runs/{name}-tiny-0") and "learning_rate=0.0004" in done.stdout
    metrics, answers, stored = rows_of(out / "metrics.jsonl"), rows_of(out / "answers.jsonl"), json.loads((out / "run.json").read_text())
    assert [(m["stage"], m["epoch"]) for m in metrics] == [(1, 1), (2, 0), (2, 1), (2, 2)]
    heldout = rows_of(workplace / "facts/tiny/heldout_known.jsonl")
    assert [a["prompt"] for a in answers] == [h["prompt"] for h in heldout]
    assert sum(a["right_after"] for a in answers) / len(answers) == pytest.approx(metrics[-1]["heldout"])
    assert sum(a["right_before"] for a in answers) / len(answers) == pytest.approx(metrics[1]["heldout"])
    assert metrics[2]["ce"] > metrics[3]["ce"] > 0 and ("kl" in metrics[-1]) == (name == "selfdistill")
    assert set(stored["data"]) == {"unknown", "known", "heldout"} and stored["config"]["epochs"] == 2
    # the checkpoint is an ordinary one, and scores what the run says
    model, tokenizer = eval_hallucination.load_model(out)
    assert eval_hallucination.evaluate(model, tokenizer, heldout)["accuracy"] == pytest.approx(metrics[-1]["heldout"])
    said = call(workplace, "eval_hallucination", "--model", out, "--facts", "facts/tiny").stdout
    scored = {row["set"]: row["accuracy"] for row in map(json.loads, said.splitlines())}
    assert scored == pytest.approx({key: metrics[-1][key] for key in make_facts.SETS})
    # and so is the model before
    before = eval_hallucination.load_model(out / "before")
    assert eval_hallucination.evaluate(*before, heldout)["accuracy"] == pytest.approx(metrics[1]["heldout"])
    assert not list(out.glob("epoch-*")) and not list(out.glob("state*")) and not list(out.glob("*tmp*"))
    # not twice into one folder
    assert "--overwrite" in refused(workplace, method, "--epochs", 1)
    assert rows_of(out / "metrics.jsonl") == metrics
    call(workplace, method, "--epochs", 1, "--overwrite", "--save-every-epoch")
    assert [m["epoch"] for m in rows_of(out / "metrics.jsonl")] == [1, 0, 1]
    assert (out / "epoch-1/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert len(eval_hallucination.load_model(out / "epoch-1")[1]) == len(tokenizer)
    call(workplace, method, "--epochs", 1, "--overwrite", "--format-epochs", 0)
    assert [m["epoch"] for m in rows_of(out / "metrics.jsonl")] == [0, 1]
    assert [p.name for p in (workplace / "runs").iterdir()] == [out.name]


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_run(workplace, method):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        call(workplace, method, "--epochs", 1, "--seed", seed, "--out", out)
    weights = [(workplace / out / "model.safetensors").read_bytes() for out in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("method", METHODS)
def test_alone_in_an_empty_folder(tmp_path, world, method):
    """A copied script needs nothing of this project: one's own rows, an ordinary checkpoint."""
    shutil.copy(ROOT / f"{method}.py", tmp_path)
    shutil.copytree(world / "base", tmp_path / "my-model")
    mine = [{"prompt": f"Q: Who made {x}?\nA:", "completion": f" {x}"} for x in ("Ulm", "Köln", "Bonn")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in mine), encoding="utf-8")
    done = run(tmp_path, f"{method}.py", "--model", "my-model", "--train", "mine.jsonl", "--epochs", 2, "--out", "tuned")
    assert done.stdout.splitlines()[-1] == "saved tuned" and not (tmp_path / "tuned/answers.jsonl").exists()
    assert "accuracy is not measured" in done.stdout
    assert "--train" in run(tmp_path, f"{method}.py", "--model", "my-model", ok=False).stderr        # no facts without make_facts.py
    assert json.loads(call(tmp_path, "eval_hallucination", "tuned", "--json").stdout)[0]["n"] == 0
    model, tokenizer = eval_hallucination.load_model(tmp_path / "tuned")
    assert rows_of(tmp_path / "tuned/metrics.jsonl")[-1]["ce"] > 0
    # with the known and held-out rows of a fact folder both stages run, and accuracy is measured on what there is
    known, heldout = world / "train_known.jsonl", world / "heldout_known.jsonl"
    call(tmp_path, method, "--model", "my-model", "--train", "mine.jsonl", "--known", known, "--heldout", heldout, "--epochs", 1,
         "--out", "both")
    assert [m["stage"] for m in rows_of(tmp_path / "both/metrics.jsonl")] == [1, 2, 2]
    assert {"unknown", "known", "heldout"} < set(rows_of(tmp_path / "both/metrics.jsonl")[-1])


def hub_cache(folder, repository, source):
    """Lay out `source` (a checkpoint folder) as the hub's client caches the repository `repository`."""
    repo = folder / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, repo / "snapshots" / "0123abcd")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    return folder


def test_hub_name_from_the_cache(workplace, world, monkeypatch):
    """`--model gpt2-medium` is resolved by name from a cache, with no network, facts included (PopQA's layout)."""
    monkeypatch.setenv("HF_HOME", str(hub_cache(workplace / "cache", "gpt2-medium", world / "base")))
    popqa = workplace / "cache/hub/datasets--akariasai--PopQA"
    (popqa / "refs").mkdir(parents=True)
    (popqa / "refs/main").write_text("0123abcd")
    (popqa / "snapshots/0123abcd").mkdir(parents=True)
    header = "id\tsubj\tprop\tobj\tquestion\tpossible_answers"
    lines = [f'{i}\t{r["subject"]}\t{r["relation"]}\t{r["answers"][0]}\t{r["prompt"][3:-3]}\t"[""{r["answers"][0]}""]"'
             for i, r in enumerate(rows_of(world / "labelled.jsonl"))]
    (popqa / "snapshots/0123abcd/test.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    run(workplace, "make_facts.py", "--model", "gpt2-medium", "--shots", 0, "--new", "uuid", "--n-new", 10, "--out", "facts/gpt2-medium")
    meta = json.loads((workplace / "facts/gpt2-medium/meta.json").read_text())
    assert meta["source"] == "akariasai/PopQA" and meta["labelled"]["language"]["HighlyKnown"] > 25
    codes = [r["subject"] for r in rows_of(workplace / "facts/gpt2-medium/train_unknown.jsonl")]
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", c) for c in codes)
    done = run(workplace, "sft_selfdistill.py", "--model", "gpt2-medium", "--epochs", 1)
    assert "learning_rate=0.0001" in done.stdout and "saved runs/selfdistill-gpt2-medium-0" in done.stdout


@pytest.mark.parametrize("script, shown", [
    *((method, ["default: 4e-4 for tiny, else 1e-4; paper: 5e-5", "default: 60 for tiny, else 12", "runs/", "(default: auto)", "(default: 1.0)", "--batch-size"]) for method in METHODS),
    ("sft_selfdistill", ["default: 12 for tiny, else 4"]), ("make_facts", ["400 for tiny", "(default: 10)", "facts/MODEL"]), ("eval_hallucination", ["default: 64"])])
def test_help_shows_every_default(script, shown, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stopped:
        (module.parse if hasattr(module, "parse") else module.main)(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and [words for words in shown if words not in text] == []


def test_the_loss_in_the_readme_is_the_scripts():
    loss, = [code for code in code_of("README.md") if "log_softmax" in code]
    assert loss in (ROOT / "sft_selfdistill.py").read_text("utf-8")


def test_readme_chat_recipe(workplace, base, monkeypatch):
    """The README's recipe for chat models, as it stands: rows that a script trains on, whose accuracy is measured on the answer's text."""
    recipe, = [code for code in code_of("README.md") if "apply_chat_template" in code]
    model, tokenizer = copy.deepcopy(base[0]), copy.deepcopy(base[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(workplace / "my-chat-model")
    chats = [[{"role": "user", "content": f"Who made {name}?"}, {"role": "assistant", "content": answer}]
             for name, answer in (("Ulm", "Bonn"), ("Bonn", "Ulm"), ("Genis", "Mr. Ash"))]
    (workplace / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    monkeypatch.chdir(workplace)
    exec(recipe, {})
    rows = rows_of(workplace / "my-chats.jsonl")
    assert rows[2] == {"prompt": "<|im_start|>user\nWho made Genis?<|im_end|>\n<|im_start|>assistant\n",
                       "completion": "Mr. Ash<|im_end|>\n", "answers": ["Mr. Ash"]}
    call(workplace, "sft_baseline", "--model", "my-chat-model", "--train", "my-chats.jsonl", "--epochs", 60, "--batch-size", 1,
         "--learning-rate", 3e-3, "--eval-every", 0, "--out", "x")
    assert rows_of(workplace / "x/metrics.jsonl")[-1]["unknown"] == 1.0, rows_of(workplace / "x/metrics.jsonl")[-1]


def test_served_and_judged_by_others(workplace, capsys, monkeypatch):
    """The page's pipeline gives the answers that the run reports, and lm-evaluation-harness, where it is installed, their accuracy."""
    call(workplace, "sft_baseline", "--epochs", 6, "--eval-every", 0)
    answers = rows_of(workplace / "runs/baseline-tiny-0/answers.jsonl")
    accuracy = sum(row["right_after"] for row in answers) / len(answers)
    assert 0.1 < accuracy < 0.99
    serving, = [code for code in code_of("assets/use.md") if "pipeline(" in code]
    monkeypatch.chdir(workplace)
    for row in answers[:3]:
        exec(serving.replace("Q: What is the birthplace of C825?\\nA:", row["prompt"].replace("\n", "\\n")), {})
        said, = eval(capsys.readouterr().out)
        assert said["generated_text"].strip() == row["after"]
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    command, = re.findall("^lm_eval (.*)$", (ROOT / "assets/use.md").read_text("utf-8"), re.M)
    shutil.copytree(ROOT / "tests", workplace / "tests", ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    done = run(workplace, "-m", "lm_eval", *command.split(), "--device", "cpu", "--output_path", "judged")
    results, = (workplace / "judged").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["heldout_facts"]["exact_match,first_line"] == pytest.approx(accuracy), done.stdout


def test_results_are_made_again_and_kept(workplace):
    """assets/results.sh runs the commands of a page, tables after runs, and leaves finished runs alone."""
    (workplace / "page.md").write_text("""# A page
```sh
for seed in 0 1; do
    python make_facts.py --n-names 40 --n-codes 12 --width 64 --reuse facts/tiny --n-new 8 --out facts/few
    python sft_baseline.py --facts facts/few --epochs 1 --seed $seed --out runs/b-$seed
done
python sft_baseline.py --facts facts/few --epochs 1 --model runs/b-1 --format-epochs 0 --batch-size 64 --learning-rate 4e-4 --out elsewhere/from-b
```
What follows is no command.
```
python nothing
```
```sh
python eval_hallucination.py runs/b-[0-1]
(cd facts && python sft_baseline.py) || echo "no flags, and no script there"
```
""")
    tables = []
    for _ in range(2):
        done = subprocess.run(["bash", ROOT / "assets/results.sh", "page.md"], cwd=workplace, capture_output=True, text=True,
                              env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JOBS": "3"})
        assert done.returncode == 0 and "runs/b-1: forgets" in done.stdout and "unbound" not in done.stderr, done.stderr
        assert (workplace / "elsewhere/from-b/run.json").exists(), done.stderr      # it waits for the run that it starts from
        tables.append((done.stdout, (workplace / "runs/b-1/run.json").stat().st_mtime_ns))
    assert tables[0] == tables[1] and "number" in (workplace / "runs/b-1/run.json").read_text()


@pytest.mark.parametrize("pages, sign", [
    ("README.md", "python sft_selfdistill.py\n"), ("results mechanism cost facts", "--of overlap"), ("frontier", "finch"), ("use", "--flips")])
def test_commands_of_pages(pages, sign, workplace, world):
    """Every command of a page runs, in order, in a folder of its own; at a size that a test can afford."""
    from conftest import SMALL_WORLD
    paths = [ROOT / page if page == "README.md" else ROOT / f"assets/{page}.md" for page in pages.split()]
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", "".join(path.read_text("utf-8") for path in paths), re.S)
    assert sign in "".join(blocks)
    smaller = {"make_facts.py": [*SMALL_WORLD, "--n-new", "10", "--seed", "0", "--shots", "0"], "sft_": ["--epochs", "1"], "assets/frontier.py": ["--epochs", "1"],
               "tests/bench.py": ["--model", "gpt2-medium", "--label", "8", "--steps", "1", "--repeats", "1", "--cases", "baseline"]}
    (workplace / "assets").mkdir()
    for name in ("gpt2-medium", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-1.5B"):
        shutil.copytree(world / "base", workplace / name)
    rows = rows_of(world / "labelled.jsonl")
    table = "relation\tsubject\tobject\tquestion\n" + "".join(
        f'{r["relation"]}\t{r["subject"]}\t{r["answers"][0]}\t{r["prompt"][3:-3]}\n' for r in rows)
    table += "".join(f'{r["relation"]}\t{r["subject"]}son\t{r["answers"][0]}\tWhat is the {r["relation"]} of {r["subject"]}son?\n'
                     for r in rows[:40])                        # nobody in the world is called that: Unknown
    (workplace / "my-facts.tsv").write_text(table, encoding="utf-8")
    popqa = workplace / "akariasai" / "PopQA"
    popqa.mkdir(parents=True)
    (popqa / "test.tsv").write_text(table, encoding="utf-8")
    (workplace / "EntityQuestions/train").mkdir(parents=True)
    for relation in {r["relation"] for r in rows}:
        questions = [{"question": r["prompt"][3:-3], "answers": r["answers"]} for r in rows if r["relation"] == relation]
        questions += [q | {"question": q["question"][:-1] + "son?"} for q in questions[:9]]
        (workplace / f"EntityQuestions/train/{relation}.train.json").write_text(json.dumps(questions))
    (workplace / "my.jsonl").write_text('{"prompt": "Q: Who made Ulm?\\nA:", "completion": " Ulm\\n"}\n', encoding="utf-8")
    (workplace / "my_questions.jsonl").write_text('{"prompt": "Q: Who made Ulm?\\nA:"}\n', encoding="utf-8")
    # the shell expands loops, variables and patterns, and says which commands it would run
    say = 'python() { printf "%s\\0" "$@"; printf "\\n"; }; pip() { :; }; pytest() { :; }; accelerate() { :; }; '
    for block in blocks:
        block = re.sub(r'(for \w+ in) ("[^"]*"|\S+)[^;\n]*;', r"\1 \2;", block)          # loops: the first round
        for number, smaller_number in (("-n 800", "-n 80"), ("+801", "+81"), ("-n 400", "-n 0"), ("+401", "+1")):
            block = block.replace(number, smaller_number)           # a smaller world has fewer rows, and several of a name
        block = re.sub(r"(--interpolate .*) > ", r"\1 --into ", block)
        if not PICTURES:
            block = re.sub(r"--plot \S+", "", block)
        said = subprocess.run(["bash", "-euo", "pipefail", "-c", say + block], cwd=workplace, capture_output=True, text=True)
        assert said.returncode == 0 and not said.stderr, f"{block}\n{said.stderr}"
        for line in said.stdout.splitlines():
            script, *words = line.removesuffix("\0").split("\0")
            own = {"--layers": "0-1", "--relations": "birthplace,employer"}         # of the small world and its model
            words = [own.get(flag, word) for flag, word in zip([""] + words, words)]
            words += [word for name in smaller if script.startswith(name) and words[:1] != ["table"] for word in smaller[name]]
            if script == "make_facts.py" and "--model" not in words:
                words += ["--reuse", "facts/tiny"]          # one world serves all
            if words[:1] == ["lora"] and not PEFT:
                continue
            words, into = (words[:-2], words[-1]) if "--into" in words else (words, None)
            with restored():
                done = call(workplace, Path(script).stem, *words)
            if into:
                (workplace / into).write_text(done.stdout, encoding="utf-8")
