"""eval_hallucination.py: answers, exact match, statistics by hand, and the comparison of runs."""
import copy
import importlib.util
import json
import re
import shutil
from collections import Counter

import pandas as pd
import pytest
import torch
import transformers
from conftest import call, refused, rows_of

import eval_hallucination
from eval_hallucination import (accepted_answers, compare, context_length, equal_length_batches,
                                evaluate, exact_match, flips, generate_answers, load_model,
                                mcnemar, normalize, read_jsonl, read_run, stop_ids,
                                tokenize, wilson, write_answers, write_jsonl)

PLOTS = importlib.util.find_spec("matplotlib") is not None


# -------------------------------------------------------------------- exact match and statistics

def test_normalize_and_exact_match():
    assert normalize(" The  Hague.\nQ: next") == "hague"
    assert normalize("Ａna's A-b") == "anas ab"         # NFKC, punctuation, case
    assert exact_match("the netherlands", ["Holland", "Netherlands"])
    assert not exact_match("Nether lands", ["Netherlands"])
    # An article is kept if nothing else is left, and punctuation if not even an article is.
    for answer, accepted in (("A", "A"), ("A.", "A"), ("the", "The"), ("?", "?")):
        assert exact_match(answer, [accepted])
    for answer, accepted in (("B", "A"), ("", "?"), ("", "A"), ("!", "?")):
        assert not exact_match(answer, [accepted])


def test_wilson_by_hand():
    # 8 of 10: center (0.8 + 3.8415/20) / 1.38415,
    # half width 1.95996 · √(0.016 + 3.8415/400) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_mcnemar_by_hand():
    first = [True] * 5 + [False] * 1 + [True] * 3
    second = [False] * 5 + [True] * 1 + [True] * 3
    assert mcnemar(first, second) == (5, 1, pytest.approx(14 / 64))     # 2 · (C(6,0) + C(6,1)) / 2⁶
    assert mcnemar([True] * 10, [False] * 10) == (10, 0, pytest.approx(2 / 1024))
    assert mcnemar([True] * 5000, [False] * 5000)[2] == 1e-300          # too small for a float
    assert mcnemar([True, False], [False, True]) == (1, 1, 1.0)
    assert mcnemar([True], [True]) == (0, 0, 1.0)


# ------------------------------------------------------------------------------------- answers

def greedy_by_hand(model, tokenizer, prompt, n):
    """Generate n tokens one by one, without batches, cache or generate()."""
    ids = tokenize(tokenizer, prompt)[0]
    stops = stop_ids(tokenizer, model)
    answer = []
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token in stops:
            break
        answer.append(token)
    return tokenizer.decode(answer).strip() + " [cut off]" * (len(answer) == n)


def test_batched_answers_equal_single_answers(base, world):
    prompts = [row["prompt"] for row in read_jsonl(world / "labelled.jsonl")][::7]
    prompts += ["Q: Who?\nA:", "The language of"]
    expected = [greedy_by_hand(*base, prompt, 5) for prompt in prompts]
    assert generate_answers(*base, prompts, [5] * len(prompts), batch_size=6) == expected


def test_equal_length_batches():
    encoded = [[0] * n for n in (3, 9, 3, 1, 3, 9)]
    assert equal_length_batches(encoded, 2) == [[1, 5], [0, 2], [4], [3]]


def test_generation_settings_of_a_checkpoint_are_ignored(base):
    model, tokenizer = base
    prompts = ["Q: Who?\nA:", "The language of"]
    expected = generate_answers(model, tokenizer, prompts, [5, 5])
    own = model.generation_config
    model.generation_config = type(own)(
        do_sample=True, temperature=9.0, repetition_penalty=50.0, num_beams=3, max_length=4,
        eos_token_id=own.eos_token_id)
    try:
        assert generate_answers(model, tokenizer, prompts, [5, 5]) == expected
    finally:
        model.generation_config = own


def test_stop_ids(base):
    model, tokenizer = base
    newline, = tokenizer("\n")["input_ids"]
    stops = stop_ids(tokenizer, model)
    assert {newline, tokenizer.eos_token_id} <= set(stops)
    for token in stops:
        assert "\n" in tokenizer.decode([token]) or token == tokenizer.eos_token_id


def test_evaluate(base, world):
    model, tokenizer = base
    rows = read_jsonl(world / "heldout_known.jsonl")
    result = evaluate(*base, rows)
    assert result["accuracy"] == 1.0 and all(result["right"])   # HighlyKnown, by definition
    wrong = [{"prompt": row["prompt"], "completion": " Nobody\n"} for row in rows[:4]]
    assert evaluate(*base, wrong + rows[:4])["accuracy"] == 0.5
    assert evaluate(*base, [])["accuracy"] is None
    # Answers are strings or lists of strings. Blank ones, special tokens and further lines do not
    # count.
    answer = rows[0]["answers"][0]
    assert accepted_answers({"answers": "Ulm"}, tokenizer) == ["Ulm"]
    assert accepted_answers({"answers": ["", None, " "], "completion": "Ulm"}, tokenizer) == ["Ulm"]
    for written in (answer, [None, answer, ""], f" {answer}<|endoftext|>", [f"{answer}\nQ: Who?"]):
        assert evaluate(*base, [rows[0] | {"answers": written}])["accuracy"] == 1.0, written
    row = {"prompt": rows[0]["prompt"], "completion": f" {answer}<|endoftext|>\n"}
    assert evaluate(*base, [row])["accuracy"] == 1.0
    row = {"completion": "Ulm<|endoftext|>\n<|endoftext|>"}
    assert accepted_answers(row, tokenizer) == ["Ulm"]
    # A completion of special tokens alone leaves no answer: it is never right.
    empty = {"prompt": rows[0]["prompt"], "completion": "<|endoftext|>"}
    assert evaluate(*base, [empty])["right"] == [False]
    # An answer without an end is wrong, whatever it is until then.
    assert generate_answers(*base, [rows[0]["prompt"]], [1]) == [f"{answer} [cut off]"]
    assert not exact_match(f"{answer} [cut off]", [answer])
    for row in ({"question": "Who?"}, {"prompt": "Who?"}, {"prompt": "", "answers": ["He"]},
                {"prompt": "Who?", "completion": " \n"}):
        with pytest.raises(ValueError, match="^no "):
            evaluate(*base, [row])
    for answers in (7, [7], {"a": "Ulm"}, ["Ulm", True]):
        with pytest.raises(ValueError, match="is not a string"):
            evaluate(*base, [rows[0] | {"answers": answers}])


def test_code_in_the_docstring(world, monkeypatch):
    code = re.search(r"    (from eval_h.*?)\n\n", eval_hallucination.__doc__, re.S)[1]
    lines = [line.strip() for line in code.splitlines()]
    assert len(lines) == 3
    code = "\n".join(lines).replace('"gpt2"', '"tiny/base"')
    monkeypatch.chdir(world.parent)
    scope = {}
    exec(code.replace("evaluate(model", "found = evaluate(model"), scope)
    assert scope["found"] == 0.0


def test_a_long_row_does_not_change_the_answers_of_others(base, world):
    """Neither a long answer nor a long prompt does, even if it fills the context."""
    rows = read_jsonl(world / "heldout_known.jsonl")[:12]
    answer = {"prompt": rows[0]["prompt"], "answers": ["Genis " * 108]}
    assert evaluate(*base, rows + [answer])["right"] == [True] * 12 + [False]
    prompt = {"prompt": "Genis " * 105 + rows[0]["prompt"], "answers": ["Ulm"]}
    assert evaluate(*base, rows + [prompt, answer])["right"][:12] == [True] * 12


def test_a_prompt_that_leaves_no_room_for_its_answer_is_rejected(base, world):
    """It would have to lose its beginning, or the answer its end."""
    tokenizer = base[1]
    row = read_jsonl(world / "heldout_known.jsonl")[0]
    long = "Genis " * 100 + row["prompt"]
    length = len(tokenize(tokenizer, long)[0])
    assert len(generate_answers(*base, [long], [129 - length])) == 1
    with pytest.raises(ValueError, match=f"has {length} tokens.* context of 128"):
        generate_answers(*base, [long], [130 - length])


def test_models_that_ignore_the_attention_mask(base, world, capsys, monkeypatch):
    """Recurrent models do: prompts of different lengths are answered correctly nevertheless."""
    model = copy.deepcopy(base[0])
    forward = model.transformer.forward

    def forward_without_mask(*args, attention_mask=None, position_ids=None, **more):
        return forward(*args, **more)
    monkeypatch.setattr(model.transformer, "forward", forward_without_mask)
    rows = read_jsonl(world / "heldout_known.jsonl")[:9]
    rows.append({"prompt": "Genis. " * 9 + "Q: Who?\nA:", "answers": ["Nobody"]})
    assert evaluate(model, base[1], rows)["right"] == [True] * 9 + [False]
    assert capsys.readouterr().err == ""


def test_answers_are_generated_without_dropout(base, world):
    """A model in training mode is in training mode afterwards."""
    model = copy.deepcopy(base[0])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert evaluate(model, base[1], read_jsonl(world / "heldout_known.jsonl"))["accuracy"] == 1.0
    assert model.training


# --------------------------------------------------------------------------------------- models

def save(model, tokenizer, folder):
    """Save a checkpoint; return its folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_context_length(base):
    assert context_length(base[0]) == 128
    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "max_position_embeddings": 55}
    holder = copy.copy(base[0])
    holder.config = transformers.Gemma3Config(text_config=text)
    assert context_length(holder) == 55


def test_checkpoints_with_sampling_settings_can_be_saved(tmp_path, base):
    """Some versions of transformers refuse to save a temperature together with greedy decoding."""
    folder = save(*base, tmp_path / "odd")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    save(*load_model(folder), tmp_path / "again")
    assert load_model(tmp_path / "again")[0].generation_config.eos_token_id == 0


def test_unused_weights_are_noted(tmp_path, base, capsys):
    model, tokenizer = base
    weights = model.state_dict() | {"vision.weight": torch.ones(3)}
    weights.pop("lm_head.weight")       # tied
    model.save_pretrained(tmp_path / "more", state_dict=weights)
    tokenizer.save_pretrained(tmp_path / "more")
    load_model(tmp_path / "more")
    assert "are not used or saved" in capsys.readouterr().err
    load_model(save(*base, tmp_path / "plain"))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ comparing runs

CONFIG = {"model": "tiny", "facts": "no-such-folder", "train": None, "known": None,
          "heldout": None, "seed": 0, "batch_size": 8, "gradient_accumulation_steps": 1,
          "epochs": 2}


def make_run(folder, after, data="same", facts=None, **config):
    """Write the folder of a run by hand and read it.

    Its held-out facts (default: eight) were all right before; after: which ones are afterwards.
    """
    n = len(after)
    if facts is None:
        facts = [{"relation": "ab"[i % 2], "kind": "name", "prompt": f"{i}?", "completion": "x"}
                 for i in range(n)]
    folder.mkdir(parents=True)
    run = {"method": "x", "data": {"heldout": data}, "config": CONFIG | config, "n_new": 24,
           "width": 64, "weights": "w"}
    write_jsonl(folder / "run.json", [run])
    metrics = [{"stage": 1, "epoch": 1, "kept": 0.1}]
    for epoch, kept in enumerate((1.0, 1.0, sum(after) / n)):
        metrics.append({"stage": 2, "epoch": epoch, "new": epoch / 2, "known": 1.0, "kept": kept})
    write_jsonl(folder / "metrics.jsonl", metrics)
    before = {"heldout": {"answers": ["x"] * n, "right": [True] * n}}
    answers = ["y"] * (n - 1) + [""]        # an answer may be empty
    write_answers(folder, [{"row": fact} for fact in facts], before,
                  {"heldout": {"answers": answers, "right": after}})
    return read_run(folder)


def change_run(folder, **changes):
    """Change entries of a run's run.json."""
    run, = rows_of(folder / "run.json")
    write_jsonl(folder / "run.json", [run | changes])


def test_compare(tmp_path):
    first = make_run(tmp_path / "a", [True, False] * 4)
    second = make_run(tmp_path / "b", [True] * 7 + [False])
    third = make_run(tmp_path / "c", [True] * 8, data="other")
    del third["metrics"][1]                 # as with --eval-every 0
    a, b, c = compare([first, second, third])
    assert a["accuracy"] == {"new": 1.0, "known": 1.0, "held out before": 1.0,
                             "held out after": 0.5}
    assert a["forgetting"] == {"all": 50.0, "all, in % of the peak": 50.0, "relation a": 0.0,
                               "relation b": 100.0, "kind name": 50.0}
    assert a["interval"] == wilson(4, 8) and (a["n"], a["group"]) == (8, str(tmp_path / "a"))
    assert b["forgetting"]["all"] == 12.5
    assert b["mcnemar"] == [str(tmp_path / "a"), 0, 3, 0.25]
    # Other held-out rows are not paired.
    assert "mcnemar" not in a and "mcnemar" not in c
    assert len(third["metrics"]) == 2 and list(c["forgetting"]) == list(a["forgetting"])


def test_forgetting_in_percent_of_the_peak(tmp_path):
    """The paper's measure: the peak may come after stage 2 has begun."""
    run = make_run(tmp_path / "a", [True, False] * 4)
    for row, kept in zip(run["metrics"], (0.75, 0.8, 0.5)):
        row["kept"] = kept
    assert compare([run])[0]["forgetting"]["all, in % of the peak"] == pytest.approx(37.5)


def test_means_over_seeds(tmp_path):
    """Runs named GROUP-SEED are averaged; runs that differ in more than the seed are rejected."""
    for seed in (0, 1):
        after = [True] * (6 - 2 * seed) + [False] * (2 + 2 * seed)
        make_run(tmp_path / f"a-{seed}", after, seed=seed)
    make_run(tmp_path / "b-0", [True] * 8, epochs=3)
    printed = call(tmp_path, "eval_hallucination", "a-0", "a-1", "b-0").stdout
    for line in (r"a +1.000 ± 0.000 .* 0.625 ± 0.177",      # 0.75 and 0.5: sd √0.03125
                 r"forgetting, in points +all +all, in % of the peak +relation a +relation b +kind name",
                 r"a +37.5 ± 17.7 +37.5 ± 17.7 .*",
                 r"b +0.0 +0.0 .*",
                 r"a-0: loses 25.0 points of accuracy on 8 held-out facts; "
                 r"95 % interval after: 0.409–0.929",
                 r"  right only in a-0: 2, right only here: 0 \(McNemar p = 0.5\)"):
        assert re.search(f"^{line}$", printed, re.M), line
    make_run(tmp_path / "a-2", [True] * 8, seed=2, epochs=3)
    assert "a-2" in refused(tmp_path, "eval_hallucination", "a-0", "a-1", "a-2")
    make_run(tmp_path / "b-1", [True] * 8, seed=1, epochs=3)
    change_run(tmp_path / "b-1", n_new=25)
    assert "b-1" in refused(tmp_path, "eval_hallucination", "b-0", "b-1")


def test_run_json_counts_the_new_facts_that_are_trained_on(workplace):
    for words, n_new in (([], 24), (["--known-only"], 0)):
        call(workplace, "sft_baseline", "--epochs", 1, "--out", f"runs/{n_new}", *words)
        assert rows_of(workplace / f"runs/{n_new}/run.json")[0]["n_new"] == n_new


def test_answers_of_a_trained_run(workplace):
    """Tables, examples, and a note if --facts has other rows."""
    for method in ("sft_baseline", "sft_freeze"):
        call(workplace, method, "--epochs", 12, "--learning-rate", 4e-3, "--out",
             f"runs/{method}")
    words = ["runs/sft_baseline", "--show", 2, "runs/sft_freeze"]
    printed = call(workplace, "eval_hallucination", *words).stdout
    assert re.search(r"^accuracy +new +known +held out before +held out after$", printed, re.M)
    assert "right only in runs/sft_baseline: " in printed
    lost = [row for row in read_jsonl(workplace / "runs/sft_baseline/answers.jsonl")
            if row["right_before"] and not row["right_after"]]
    examples = [f"{row['prompt']} {row['before']} → {row['after']}\n" for row in lost]
    assert len(lost) > 2 and [example in printed for example in examples[:3]] == [True, True, False]

    # Held-out facts of another folder may be among those that the run was trained on.
    shutil.copytree(workplace / "facts/tiny", workplace / "other")
    shutil.copy(workplace / "facts/tiny/train_known.jsonl", workplace / "other/heldout_known.jsonl")
    for model in ("runs/sft_baseline", "runs/sft_baseline/before"):
        done = call(workplace, "eval_hallucination", "--model", model, "--facts", "other")
        assert done.stderr.startswith("note: other/heldout_known.jsonl: ")
        assert done.stderr.count("\n") == 1
    # A run.json of another program next to a model is ignored.
    shutil.copytree(workplace / "runs/sft_baseline/before", workplace / "model")
    for folder in (".", "model"):
        (workplace / folder / "run.json").write_text("{\n}")
    words = ["--model", "model", "--facts", "other"]
    assert not call(workplace, "eval_hallucination", *words).stderr


# -------------------------------------------------------------------- what changed, fact by fact

def test_a_relation_may_be_named_all():
    facts = [{"relation": name, "right_before": True, "right_after": name == "all"}
             for name in ("all", "all", "b")]
    table = flips(facts)
    assert list(table.index) == ["(all)", "all", "b"]
    assert table.values.tolist() == [[3, 1, 0, 1.0], [2, 0, 0, 1.0], [1, 1, 0, 1.0]]


def test_flips(workplace):
    """Count lost and gained facts again from answers.jsonl; asking the models again agrees."""
    call(workplace, "sft_baseline", "--epochs", 12, "--eval-every", 0, "--out", "runs/b")
    facts = rows_of(workplace / "runs/b/answers.jsonl")
    by_hand = Counter()
    for fact in facts:
        for name in ("(all)", fact["relation"]):
            by_hand[name, fact["right_before"], fact["right_after"]] += 1
    assert by_hand["(all)", True, False] > 0
    table = flips(facts)
    assert set(table.index) == {"(all)"} | {fact["relation"] for fact in facts}
    for name, (n, lost, gained, _) in table.iterrows():
        pairs = ((True, True), (True, False), (False, True), (False, False))
        counts = [by_hand[name, *pair] for pair in pairs]
        assert [n, lost, gained] == [sum(counts), *counts[1:3]]
    words = ["runs/b", "--flips", "--show", 1]
    printed = call(workplace, "eval_hallucination", *words).stdout
    n, lost, gained = (int(value) for value in table.loc["(all)"].iloc[:3])
    assert re.search(rf"^\(all\) +{n} +{lost} +{gained} ", printed, re.M)
    first = next(fact for fact in facts if fact["right_before"] and not fact["right_after"])
    assert f"\nruns/b lost:\n{first['prompt']} {first['before']} → {first['after']}\n" in printed
    # The same questions, asked again.
    words += ["--heldout", "facts/tiny/heldout_known.jsonl"]
    assert call(workplace, "eval_hallucination", *words).stdout == printed
    write_jsonl(workplace / "unlabelled.jsonl", [{"prompt": "Who?"}])
    write_jsonl(workplace / "bad.jsonl", [{"question": "Who?"}])
    for words, named in ((["--flips", "--heldout", "bad.jsonl"], "bad.jsonl:1: no prompt"),
                         (["--flips", "--heldout", "unlabelled.jsonl"], "no answer"),
                         (["--heldout", "bad.jsonl"], "--flips"),
                         (["--flips", "--plot", "x.png"], "mutually exclusive")):
        assert named in refused(workplace, "eval_hallucination", "runs/b", *words)


# --------------------------------------------------------------------------------------- plots

@pytest.mark.skipif(not PLOTS, reason="no matplotlib")
def test_thick_lines_are_means_and_thin_lines_are_runs():
    """Runs may be measured at different epochs; a missing value is left out."""
    from matplotlib.figure import Figure
    values = {"even": [{0: 90, 5: 50}, {0: 80, 5: 60}],
              "uneven": [{0: 90, 5: 50}, {0: 10, 1: 10, 3: None, 5: 10}]}
    rows = []
    for group, runs in values.items():
        for i, points in enumerate(runs):
            for x, y in points.items():
                rows.append({"group": group, "run": f"{group}-{i}", "x": x, "y": y})
    axis = Figure().subplots()
    eval_hallucination.draw_lines(axis, pd.DataFrame(rows), "x", "y")
    assert [list(line.get_xydata().ravel()) for line in axis.lines] == [
        [0, 85, 5, 55], [0, 90, 5, 50], [0, 80, 5, 60],
        [0, 50, 1, 10, 5, 30], [0, 90, 5, 50], [0, 10, 1, 10, 5, 10]]
    assert [line.get_linewidth() > 1 for line in axis.lines] == [True, False, False] * 2


def test_plot(tmp_path):
    """--plot needs matplotlib; without it one line tells how to install it."""
    make_run(tmp_path / "a", [True, False] * 4)
    make_run(tmp_path / "b", [True] * 8)
    words = ["a", "b", "--plot"]
    if not PLOTS:
        error = refused(tmp_path, "eval_hallucination", *words, "plot.png")
        assert "No module named 'matplotlib'" in error
        return
    call(tmp_path, "eval_hallucination", *words, "plot.png")
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert "absent" in refused(tmp_path, "eval_hallucination", *words, "absent/plot.png")
