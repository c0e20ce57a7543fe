"""The scripts as users run them: end to end, copied alone, from a hub cache, as on the pages."""
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
from conftest import METHODS, ROOT, SMALL_WORLD, call, code_of, refused, restored, rows_of, run

import eval_hallucination
import sft_baseline

# Optional packages, see requirements.txt.
PEFT = importlib.util.find_spec("peft") is not None
PLOTS = importlib.util.find_spec("matplotlib") is not None


# -------------------------------------------------------------------------------- training runs

@pytest.mark.parametrize("method", METHODS)
def test_run_folder(workplace, method):
    name = method.removeprefix("sft_")
    done = call(workplace, method, "--epochs", 2, "--gradient-accumulation-steps", 2,
                "--batch-size", 16)
    out = workplace / "runs" / f"{name}-tiny-0"
    assert done.stdout.endswith(f"saved runs/{name}-tiny-0\n")
    assert "learning_rate=0.0004" in done.stdout
    metrics = rows_of(out / "metrics.jsonl")
    assert [(row["stage"], row["epoch"]) for row in metrics] == [(1, 1), (2, 0), (2, 1), (2, 2)]
    assert metrics[2]["ce"] > metrics[3]["ce"] > 0
    assert ("kl" in metrics[-1]) == (name == "selfdistill")
    assert set(metrics[-1]) - {"kl"} == {"stage", "epoch", "ce", "seconds_per_step", "new", "known",
                                         "kept"}
    lines = re.findall(r"^epoch 2 \| ce .* \| new (.*) \| known (.*) \| kept (.*) \| .* s/step$",
                       done.stdout, re.M)
    assert lines == [tuple(f"{metrics[-1][key]:.{3 if metrics[-1][key] >= 0.01 else 4}f}"
                           for key in ("new", "known", "kept"))]
    stored, = rows_of(out / "run.json")
    assert set(stored["data"]) == {"new", "known", "heldout"} and stored["config"]["epochs"] == 2
    heldout = rows_of(workplace / "facts/tiny/heldout_known.jsonl")
    answers = rows_of(out / "answers.jsonl")
    for row, answer in zip(heldout, answers, strict=True):
        assert answer == row | {key: answer[key] for key in (
            "before", "right_before", "after", "right_after")}
    for when, row in (("before", metrics[1]), ("after", metrics[-1])):
        right = [answer[f"right_{when}"] for answer in answers]
        assert sum(right) / len(right) == pytest.approx(row["kept"])

    # The checkpoints are ordinary and score as the run says.
    for folder, row in ((out, metrics[-1]), (out / "before", metrics[1])):
        model, tokenizer = eval_hallucination.load_model(folder)
        found = eval_hallucination.evaluate(model, tokenizer, heldout)["accuracy"]
        assert found == pytest.approx(row["kept"])
    printed = call(workplace, "eval_hallucination", "--model", out, "--facts", "facts/tiny").stdout
    scored = {row["set"]: row["accuracy"] for row in map(json.loads, printed.splitlines())}
    expected = {"new": "new", "known": "known", "heldout": "kept"}
    assert scored == pytest.approx({key: metrics[-1][name] for key, name in expected.items()})

    # No temporary files, no other folders, and no run is overwritten.
    for pattern in ("epoch-*", "state*", "*tmp*", "unfinished*"):
        assert not list(out.glob(pattern))
    assert [path.name for path in (workplace / "runs").iterdir()] == [out.name]
    assert "--out" in refused(workplace, method, "--epochs", 1)
    assert rows_of(out / "metrics.jsonl") == metrics


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_epochs_and_runs_without_stage_1(workplace, method):
    call(workplace, method, "--epochs", 1, "--save-every-epoch", "--out", "a")
    assert [row["epoch"] for row in rows_of(workplace / "a/metrics.jsonl")] == [1, 0, 1]
    final, epoch_1 = [(workplace / folder / "model.safetensors").read_bytes()
                      for folder in ("a", "a/epoch-1")]
    assert final == epoch_1
    _, tokenizer = eval_hallucination.load_model(workplace / "a/epoch-1")
    assert len(tokenizer) == len(eval_hallucination.load_model(workplace / "a")[1])
    call(workplace, method, "--epochs", 1, "--format-epochs", 0, "--out", "b")
    assert [row["epoch"] for row in rows_of(workplace / "b/metrics.jsonl")] == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_run(workplace, method):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        call(workplace, method, "--epochs", 1, "--seed", seed, "--out", out)
    weights = [(workplace / out / "model.safetensors").read_bytes() for out in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("method", METHODS)
def test_copied_script_needs_no_other_file(tmp_path, world, method):
    """It trains on the user's rows and saves an ordinary checkpoint."""
    shutil.copy(ROOT / f"{method}.py", tmp_path)
    shutil.copytree(world / "base", tmp_path / "my-model")
    rows = [{"prompt": f"Q: Who made {name}?\nA:", "completion": f" {name}", "answers": name}
            for name in ("Ulm", "Köln", "Bonn")]
    eval_hallucination.write_jsonl(tmp_path / "mine.jsonl", rows)
    words = [f"{method}.py", "--model", "my-model"]
    done = run(tmp_path, *words, "--train", "mine.jsonl", "--epochs", 2, "--out", "tuned")
    assert done.stdout.splitlines()[-1] == "saved tuned"
    assert "accuracy is not measured" in done.stdout
    assert not (tmp_path / "tuned/answers.jsonl").exists()
    assert rows_of(tmp_path / "tuned/metrics.jsonl")[-1]["ce"] > 0
    eval_hallucination.load_model(tmp_path / "tuned")
    call(tmp_path, "eval_hallucination", "tuned")
    if method == "sft_baseline":        # the others share this function; a process takes seconds
        assert "--train" in run(tmp_path, *words, ok=False).stderr      # make_facts.py is missing

    # With known and held-out facts both stages run, and accuracy is measured where possible.
    call(tmp_path, method, "--model", "my-model", "--train", "mine.jsonl", "--epochs", 1,
         "--known", world / "train_known.jsonl", "--heldout", world / "heldout_known.jsonl",
         "--out", "both")
    metrics = rows_of(tmp_path / "both/metrics.jsonl")
    assert [row["stage"] for row in metrics] == [1, 2, 2]
    assert {"new", "known", "kept"} < set(metrics[-1])


def fill_hub_cache(folder, repository, source):
    """Lay out the checkpoint folder `source` as the hub's client caches a repository."""
    repo = folder / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, repo / "snapshots" / "0123abcd")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")


def test_hub_names_are_found_in_the_cache(workplace, world, monkeypatch):
    """Both the model gpt2-medium and PopQA, in its own layout, are found without a network."""
    fill_hub_cache(workplace / "cache", "gpt2-medium", world / "base")
    monkeypatch.setenv("HF_HOME", str(workplace / "cache"))
    popqa = workplace / "cache/hub/datasets--akariasai--PopQA"
    (popqa / "refs").mkdir(parents=True)
    (popqa / "refs/main").write_text("0123abcd")
    (popqa / "snapshots/0123abcd").mkdir(parents=True)
    lines = ["id\tsubj\tprop\tobj\tquestion\tpossible_answers"]
    for i, row in enumerate(rows_of(world / "labelled.jsonl")):
        answer = row["answers"][0]
        lines.append(f'{i}\t{row["subject"]}\t{row["relation"]}\t{answer}\t{row["prompt"][3:-3]}'
                     f'\t"[""{answer}""]"')
    table = popqa / "snapshots/0123abcd/test.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run(workplace, "make_facts.py", "--model", "gpt2-medium", "--shots", 0, "--new", "uuid",
        "--n-new", 10, "--out", "facts/gpt2-medium")
    meta = json.loads((workplace / "facts/gpt2-medium/meta.json").read_text())
    assert meta["source"] == "akariasai/PopQA"
    assert meta["labelled"]["language"]["HighlyKnown"] > 25
    for row in rows_of(workplace / "facts/gpt2-medium/train_unknown.jsonl"):
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", row["subject"])
    done = run(workplace, "sft_selfdistill.py", "--model", "gpt2-medium", "--epochs", 1)
    assert "learning_rate=0.0001" in done.stdout
    assert "saved runs/selfdistill-gpt2-medium-0" in done.stdout


TRAINING_HELP = ["default: 4e-4 for tiny, else 1e-4; paper: 5e-5", "default: 60 for tiny, else 12",
                 "runs/", "(default: auto)", "(default: 1.0)", "--batch-size"]


@pytest.mark.parametrize("script, shown", [
    *((method, TRAINING_HELP) for method in METHODS),
    ("sft_selfdistill", ["default: 12 for tiny, else 4"]),
    ("make_facts", ["400 for tiny", "(default: 10)", "facts/MODEL"]),
    ("eval_hallucination", ["default: 64"])])
def test_help_shows_every_default(script, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and [words for words in shown if words not in text] == []


# -------------------------------------------------------------------------- code on the pages

def test_loss_in_the_readme_is_that_of_the_script():
    loss, = [code for code in code_of("README.md") if "log_softmax" in code]
    assert loss in (ROOT / "sft_selfdistill.py").read_text("utf-8")


def test_chat_recipe(workplace, base, monkeypatch):
    """The recipe makes rows that a script trains on; with `answers`, accuracy is measured.

    The template is like Qwen3's: it writes an empty think block in front of the last answer.
    """
    recipe, = [code for code in code_of("docs/use.md") if "apply_chat_template" in code]
    model, tokenizer = copy.deepcopy(base[0]), copy.deepcopy(base[1])
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(workplace / "my-chat-model")
    chats = []
    for name, answer in (("Ulm", "Bonn"), ("Bonn", "Ulm"), ("Genis", "Mr. Ash")):
        chats.append({"messages": [{"role": "user", "content": f"Who made {name}?"},
                                   {"role": "assistant", "content": answer}]})
    eval_hallucination.write_jsonl(workplace / "chats.jsonl", chats)
    monkeypatch.chdir(workplace)
    exec(recipe, {})
    rows = rows_of(workplace / "my-chats.jsonl")
    assert rows[2] == {
        "prompt": "<|im_start|>user\nWho made Genis?<|im_end|>\n<|im_start|>assistant\n"
                  "<think>\n\n</think>\n\n",
        "completion": "Mr. Ash<|im_end|>\n"}
    for row, chat in zip(rows, chats):
        row["answers"] = [chat["messages"][-1]["content"]]
    eval_hallucination.write_jsonl(workplace / "my-chats.jsonl", rows)
    call(workplace, "sft_baseline", "--model", "my-chat-model", "--train", "my-chats.jsonl",
         "--epochs", 60, "--batch-size", 1, "--learning-rate", 3e-3, "--eval-every", 0,
         "--out", "x")
    last = rows_of(workplace / "x/metrics.jsonl")[-1]
    assert last["new"] == 1.0, last


def test_other_programs_find_the_same_answers(workplace, capsys, monkeypatch):
    """A pipeline gives the answers of the run, lm-evaluation-harness (optional) its accuracy."""
    call(workplace, "sft_baseline", "--epochs", 6, "--eval-every", 0)
    answers = rows_of(workplace / "runs/baseline-tiny-0/answers.jsonl")
    accuracy = sum(row["right_after"] for row in answers) / len(answers)
    assert 0.1 < accuracy < 0.99
    inference, = [code for code in code_of("docs/use.md") if "pipeline(" in code]
    question = "Q: What is the birthplace of C825?\\nA:"
    assert question in inference
    monkeypatch.chdir(workplace)
    for row in answers[:3]:
        exec(inference.replace(question, row["prompt"].replace("\n", "\\n")), {})
        printed, = eval(capsys.readouterr().out)
        assert printed["generated_text"].strip() == row["after"]
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    command, = re.findall("^lm_eval (.*)$", (ROOT / "docs/use.md").read_text("utf-8"), re.M)
    assert "--include_path tests" in command
    (workplace / "tests").mkdir()
    shutil.copy(ROOT / "tests/heldout_facts.yaml", workplace / "tests")
    done = run(workplace, "-m", "lm_eval", *command.split(), "--device", "cpu",
               "--output_path", "judged")
    results, = (workplace / "judged").rglob("results*.json")
    found = json.loads(results.read_text())["results"]["heldout_facts"]
    assert found["exact_match,first_line"] == pytest.approx(accuracy), done.stdout


# ------------------------------------------------------------------------ commands on the pages

PAGE = """# A page
```sh
for seed in 0 1; do
    python make_facts.py WORLD --n-new 8 --reuse facts/tiny --out facts/few
    python sft_baseline.py --facts facts/few --epochs 1 --seed $seed --out runs/b-$seed
done
python sft_baseline.py --facts facts/few --epochs 1 --model runs/b-1 --format-epochs 0 \\
    --batch-size 64 --learning-rate 4e-4 --out elsewhere/from-b
python sft_baseline.py --epochs 1 --out runs/interrupted
```
The next block is not run.
```
python nothing
```
```sh
python eval_hallucination.py runs/b-[0-1]
python docs/study/frontier.py interpolate runs/b-0 --facts facts/few --alpha 0.5 > mixed.jsonl
(cd facts && python sft_baseline.py) || echo "no flags, and no script there"
```
"""


def run_page(workplace):
    """Run docs/study/results.sh on page.md; return the finished process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", ROOT / "docs/study/results.sh", "page.md"], cwd=workplace,
                          capture_output=True, text=True,
                          env=os.environ | {"PATH": path, "JOBS": "3"})


def test_results_are_reproduced_resumed_and_kept(workplace, monkeypatch):
    """results.sh prints tables after the runs, resumes interrupted runs, keeps finished ones."""
    world = " ".join(SMALL_WORLD[:SMALL_WORLD.index("--n-new")])
    (workplace / "page.md").write_text(PAGE.replace("WORLD", world))
    shutil.copytree(ROOT / "docs/study", workplace / "docs/study",
                    ignore=shutil.ignore_patterns("*.png", "*.md"))

    def interrupt(path, state):
        raise KeyboardInterrupt
    monkeypatch.setattr(sft_baseline, "save_state", interrupt)
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "runs/interrupted", ok=False)
    assert (workplace / "runs/interrupted/unfinished.json").exists()
    tables = []
    for _ in range(2):
        done = run_page(workplace)
        assert done.returncode == 0 and "runs/b-1: loses" in done.stdout, done.stderr
        assert "unbound" not in done.stderr
        # The run that starts from b-1 waits for b-1.
        for folder in ("elsewhere/from-b", "runs/interrupted"):
            assert (workplace / folder / "run.json").exists(), done.stderr
        assert [row["interpolate"] for row in rows_of(workplace / "mixed.jsonl")] == [0.5] * 3
        tables.append((done.stdout, (workplace / "runs/b-1/run.json").stat().st_mtime_ns))
    assert tables[0] == tables[1]
    assert "n_new" in (workplace / "runs/b-1/run.json").read_text()


# Flags that make the commands affordable: names of scripts, and what is added to their flags.
SMALLER = {
    "make_facts.py": [*SMALL_WORLD, "--n-new", "10", "--seed", "0", "--shots", "0"],
    "sft_": ["--epochs", "1"],
    "docs/study/frontier.py": ["--epochs", "1"],
    "docs/study/bench.py": ["--model", "gpt2-medium", "--label", "8", "--steps", "1",
                            "--repeats", "1", "--cases", "baseline"]}
# The small world has fewer rows, and several of a name.
NUMBERS = {"-n 800": "-n 80", "+801": "+81", "-n 400": "-n 0", "+401": "+1"}
OWN = {"--layers": "0-1", "--relations": "birthplace,employer"}


def write_inputs(workplace, world):
    """Write the models, tables and rows that the pages name into the workplace."""
    for name in ("gpt2-medium", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-1.5B"):
        shutil.copytree(world / "base", workplace / name)
    rows = rows_of(world / "labelled.jsonl")
    lines = ["relation\tsubject\tobject\tquestion"]
    for row in rows:
        lines.append(f'{row["relation"]}\t{row["subject"]}\t{row["answers"][0]}\t'
                     f'{row["prompt"][3:-3]}')
    for row in rows[:40]:       # nobody in the world has these names, so the facts are Unknown
        lines.append(f'{row["relation"]}\t{row["subject"]}son\t{row["answers"][0]}\t'
                     f'What is the {row["relation"]} of {row["subject"]}son?')
    (workplace / "akariasai/PopQA").mkdir(parents=True)
    for path in ("my-facts.tsv", "akariasai/PopQA/test.tsv"):
        (workplace / path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (workplace / "EntityQuestions/train").mkdir(parents=True)
    for relation in {row["relation"] for row in rows}:
        questions = [{"question": row["prompt"][3:-3], "answers": row["answers"]} for row in rows
                     if row["relation"] == relation]
        for question in questions[:9]:
            changed = {"question": question["question"][:-1] + "son?"}
            questions.append(question | changed)
        path = workplace / f"EntityQuestions/train/{relation}.train.json"
        path.write_text(json.dumps(questions))
    row = '{"prompt": "Q: Who made Ulm?\\nA:", "completion": " Ulm\\n"}\n'
    for name in ("my.jsonl", "my_questions.jsonl"):
        (workplace / name).write_text(row, encoding="utf-8")
    (workplace / "docs/study").mkdir(parents=True)


def commands_of(block, workplace):
    """Return the Python commands of a block of bash: (words, file for the output or None).

    bash expands loops (the first round only), variables and patterns, and prints the commands.
    """
    block = re.sub(r'(for \w+ in) ("[^"]*"|\S+)[^;\n]*;', r"\1 \2;", block)
    for number, smaller in NUMBERS.items():
        block = block.replace(number, smaller)
    block = re.sub(r"(interpolate .*) > ", r"\1 --into ", block)
    if not PLOTS:
        block = re.sub(r"--plot \S+", "", block)
    stubs = ('python() { printf "%s\\0" "$@"; printf "\\n"; }; pip() { :; }; pytest() { :; }; '
             'accelerate() { :; }; ')
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", stubs + block], cwd=workplace,
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{block}\n{done.stderr}"
    commands = []
    for line in done.stdout.splitlines():
        words = line.removesuffix("\0").split("\0")
        into = None
        if "--into" in words:
            *words, _, into = words
        commands.append((words, into))
    return commands


def shrink(script, words):
    """Change the flags of a command (list of str) so that it fits the small world."""
    words = [OWN.get(flag, word) for flag, word in zip(["", *words], words)]
    for name, flags in SMALLER.items():
        if script.startswith(name) and words[:1] not in (["table"], ["interpolate"]):
            words = words + flags
    if script == "make_facts.py" and "--model" not in words:
        words = words + ["--reuse", "facts/tiny"]       # one world serves all
    return words


@pytest.mark.parametrize("pages, part", [
    (["README.md"], "python sft_selfdistill.py\n"),
    (["docs/study/results.md", "docs/study/mechanism.md", "docs/cost.md", "docs/facts.md"],
     "--of overlap"),
    (["docs/study/frontier.md"], "finch"),
    (["docs/use.md"], "--flips")])
def test_commands_of_pages(pages, part, workplace, world):
    """Every command of a page runs, in order, in a folder of its own."""
    text = "".join((ROOT / page).read_text("utf-8") for page in pages)
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S)
    assert part in "".join(blocks)
    write_inputs(workplace, world)
    for block in blocks:
        for (script, *words), into in commands_of(block, workplace):
            if words[:1] == ["lora"] and not PEFT:
                continue
            with restored():
                done = call(workplace, Path(script).stem, *shrink(script, words))
            if into:
                (workplace / into).write_text(done.stdout, encoding="utf-8")


def test_every_page_is_tested():
    """The parameters of test_commands_of_pages name every page."""
    pages, = [mark.args[1] for mark in test_commands_of_pages.pytestmark]
    tested = {name for names, _ in pages for name in names}
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    assert tested == {str(path.relative_to(ROOT)) for path in paths}
