"""eval_hallucination.py: answers, matching, statistics against hand-computed cases, and the comparison of runs."""
import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict

import eval_hallucination
import pytest
import torch
import transformers
import why
from conftest import ROOT, call, refused, rows_of
from eval_hallucination import (ORIGINS, accepted_answers, by_epoch, compare, context_length, evaluate, exact_match, generate_answers,
                                load_model, make_batches, mcnemar, normalize, read_jsonl, read_run, special_tokens, stop_ids, tokenize,
                                weights_hash, wilson, write_answers, write_jsonl)


def test_normalize_and_exact_match():
    assert normalize(" The  Hague.\nQ: next") == "hague"
    assert normalize("Ａna's A-b") == "anas ab"                  # NFKC, punctuation, case
    assert exact_match("the netherlands", ["Holland", "Netherlands"]) and not exact_match("Nether lands", ["Netherlands"])
    # an article stays where nothing else does, punctuation where not even that does
    assert exact_match("A", ["A"]) and exact_match("A.", ["A"]) and exact_match("the", ["The"]) and exact_match("?", ["?"])
    assert not exact_match("B", ["A"]) and not exact_match("", ["?"]) and not exact_match("", ["A"]) and not exact_match("!", ["?"])


def test_wilson_by_hand():
    # 8 of 10: centre (.8 + 3.8415/20) / 1.38415, half 1.95996 · √(.016 + 3.8415/400) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6) and wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_by_hand():
    first = [True] * 5 + [False] * 1 + [True] * 3
    second = [False] * 5 + [True] * 1 + [True] * 3
    assert mcnemar(first, second) == (5, 1, pytest.approx(14 / 64))     # 2 · (C(6,0) + C(6,1)) / 2⁶
    assert mcnemar([True] * 10, [False] * 10) == (10, 0, pytest.approx(2 / 1024))
    assert mcnemar([True] * 5000, [False] * 5000)[2] == 1e-300          # too small for a float: not 0
    assert mcnemar([True, False], [False, True]) == (1, 1, 1.0) and mcnemar([True], [True]) == (0, 0, 1.0)


def greedy_by_hand(model, tokenizer, prompt, n):
    """Token by token, without padding, cache or generate."""
    ids, stops = tokenize(tokenizer, prompt)[0], stop_ids(tokenizer, model)
    answer = []
    for _ in range(n):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token in stops:
            break
        answer.append(token)
    return tokenizer.decode(answer).strip() + " [cut off]" * (len(answer) == n)


def test_batched_answers_equal_one_by_one(base, world):
    model, tokenizer = base
    prompts = [row["prompt"] for row in read_jsonl(world / "labelled.jsonl")][::7] + ["Q: Who?\nA:", "The language of"]
    assert generate_answers(model, tokenizer, prompts, [5] * len(prompts), batch_size=6) == [
        greedy_by_hand(model, tokenizer, p, 5) for p in prompts]


def test_checkpoints_own_generation_settings_are_ignored(base):
    model, tokenizer = base
    prompts = ["Q: Who?\nA:", "The language of"]
    expected, kept = generate_answers(model, tokenizer, prompts, [5, 5]), model.generation_config
    model.generation_config = type(kept)(do_sample=True, temperature=9.0, repetition_penalty=50.0, num_beams=3, max_length=4,
                                         eos_token_id=kept.eos_token_id)
    try:
        assert generate_answers(model, tokenizer, prompts, [5, 5]) == expected
    finally:
        model.generation_config = kept


def test_stop_ids(base):
    tokenizer = base[1]
    newline, = tokenizer("\n")["input_ids"]
    assert {newline, tokenizer.eos_token_id} <= set(stop_ids(tokenizer, base[0]))
    assert all("\n" in tokenizer.decode([i]) or i == tokenizer.eos_token_id for i in stop_ids(tokenizer))


def test_evaluate(base, world):
    rows = read_jsonl(world / "heldout_known.jsonl")
    result = evaluate(*base, rows)
    assert result["accuracy"] == 1.0 and all(result["right"])           # HighlyKnown, zero shots: right by definition
    wrong = [{"prompt": r["prompt"], "completion": " Nobody\n"} for r in rows[:4]]
    assert evaluate(*base, wrong + rows[:4])["accuracy"] == 0.5 and evaluate(*base, [])["accuracy"] is None
    # texts or lists of texts; blanks and nulls say nothing; special tokens and further lines are no part of an answer
    answer, tokenizer = rows[0]["answers"][0], base[1]
    assert accepted_answers({"answers": "Ulm"}) == ["Ulm"] and accepted_answers({"answers": ["", None, " "], "completion": "Ulm"}) == ["Ulm"]
    for written in (answer, [None, answer, ""], f" {answer}<|endoftext|>", [f"{answer}\nQ: Who?"]):
        assert evaluate(*base, [rows[0] | {"answers": written}])["accuracy"] == 1.0, written
    assert evaluate(*base, [{"prompt": rows[0]["prompt"], "completion": f" {answer}<|endoftext|>\n"}])["accuracy"] == 1.0
    assert accepted_answers({"completion": "Ulm<|endoftext|>\n<|endoftext|>"}, special_tokens(tokenizer)) == ["Ulm"]
    # an answer that is cut off is not right, whatever stands there by then; training mode is left as it was
    model = base[0]
    model.train()
    assert evaluate(*base, rows)["accuracy"] == 1.0 and model.training
    model.eval()
    begun = generate_answers(*base, [rows[0]["prompt"]], [1])
    assert begun == [f"{answer} [cut off]"] and not exact_match(begun[0], [answer])
    for row in ({"question": "Who?"}, {"prompt": "Who?"}, {"prompt": "", "answers": ["He"]}, {"prompt": "Who?", "completion": " \n"}):
        with pytest.raises(ValueError, match="^no "):
            evaluate(*base, [row])
    for answers in (7, [7], {"a": "Ulm"}, ["Ulm", True]):
        with pytest.raises(ValueError, match="is no text"):
            evaluate(*base, [rows[0] | {"answers": answers}])


def test_three_lines_of_the_docstring(world, monkeypatch):
    """`evaluate` in another project, as the docstring has it."""
    lines = re.search(r"    (from eval_h.*?)\n\n", eval_hallucination.__doc__, re.S)[1]
    monkeypatch.chdir(world.parent)
    lines = [line.strip() for line in lines.splitlines()]
    assert len(lines) == 3
    exec("\n".join(lines).replace('"gpt2"', '"tiny/base"').replace("evaluate(model", "found = evaluate(model"), scope := {})
    assert scope["found"] == 0.0


def test_a_long_row_shortens_no_other(base, world):
    """Rows beside one whose answer nearly fills the context are answered as without it."""
    rows = read_jsonl(world / "heldout_known.jsonl")[:12]
    long = {"prompt": rows[0]["prompt"], "answers": ["Genis " * 108]}
    assert evaluate(*base, rows + [long])["right"] == [True] * 12 + [False]
    prompt = {"prompt": "Genis " * 110 + rows[0]["prompt"], "answers": ["Ulm"]}
    assert evaluate(*base, rows + [prompt, long])["right"][:12] == [True] * 12


def test_a_prompt_beyond_the_context_loses_its_start_with_a_note(base, world, capsys):
    model, tokenizer = base
    row = read_jsonl(world / "heldout_known.jsonl")[0]
    long = " ".join(row["answers"][0] for _ in range(200)) + "\n" + row["prompt"]
    kept = tokenizer.decode(tokenize(tokenizer, long)[0][-120:])
    assert generate_answers(model, tokenizer, [long], [8]) == generate_answers(model, tokenizer, [kept], [8])
    assert capsys.readouterr().err.count("only the end of") == 1


def test_batches_leave_every_answer_its_room():
    lengths, needed = [100, 10, 50, 9, 100], [2, 110, 5, 3, 20]
    batches = make_batches(lengths, needed, 8, 128)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4] and len(batches) == 2
    for batch in batches:
        assert lengths[batch[0]] == max(lengths[i] for i in batch)
        assert lengths[batch[0]] + max(needed[i] for i in batch) <= 128
    assert len(make_batches([5] * 7, [2] * 7, 3, float("inf"))) == 3


def small(kind, **more):
    """A random model of an architecture, small; its logits are far apart."""
    torch.manual_seed(0)
    name = {"mpt": "Mpt", "xlstm": "xLSTM", "rwkv": "Rwkv", "mamba": "Mamba", "gemma3": "Gemma3", "opt": "OPT"}[kind]
    config = getattr(transformers, f"{name}Config")(**more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MAMBA = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def test_models_that_mind_padding_answer_one_by_one(base, world, capsys, monkeypatch):
    """A model that reads the padding on the left gives the same answers all the same, and one line says how."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    forward = model.transformer.forward

    def blind(*args, attention_mask=None, position_ids=None, **more):
        return forward(*args, **more)                       # ignores the mask, as recurrent models do
    monkeypatch.setattr(model.transformer, "forward", blind)
    if hasattr(model, "ignores_padding"):
        del model.ignores_padding
    rows = read_jsonl(world / "heldout_known.jsonl")[:9] + [{"prompt": "Genis. " * 9 + "Q: Who?\nA:", "answers": ["Nobody"]}]
    capsys.readouterr()
    assert evaluate(model, tokenizer, rows)["right"] == [True] * 9 + [False]
    assert evaluate(model, tokenizer, rows)["right"] == [True] * 9 + [False]
    assert capsys.readouterr().err.count("one by one") == 1


def test_dropout_is_no_padding(base, world, capsys):
    """A model in training mode, with dropout, is probed and asked without it."""
    model = copy.deepcopy(base[0])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    if hasattr(model, "ignores_padding"):
        del model.ignores_padding
    assert evaluate(model, base[1], read_jsonl(world / "heldout_known.jsonl"))["accuracy"] == 1.0 and model.training
    assert capsys.readouterr().err == ""


def test_context_length(base):
    assert context_length(base[0]) == 128
    assert context_length(small("mpt", d_model=16, n_heads=2, n_layers=1, vocab_size=99, max_seq_len=77)) == 77
    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 55}
    holder = copy.copy(base[0])
    holder.config = transformers.Gemma3Config(text_config=text)
    assert context_length(holder) == 55


def saved(model, tokenizer, folder):
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def test_settings_of_sampling_do_not_hinder_saving(tmp_path, base):
    """Checkpoints have a temperature beside greedy decoding, which some versions of the library refuse to write."""
    folder = saved(*base, tmp_path / "odd")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": false, "eos_token_id": 0}')
    model, tokenizer = load_model(folder)
    saved(model, tokenizer, tmp_path / "again")
    assert load_model(tmp_path / "again")[0].generation_config.eos_token_id == 0


def test_load_model_says_what_it_leaves_out_or_refuses(tmp_path, base, capsys):
    """Weights that are not the language model's are named; a model that would be saved other than measured is refused."""
    folder = saved(*base, tmp_path / "more")
    weights = base[0].state_dict() | {"vision.weight": torch.ones(3)}
    weights.pop("lm_head.weight")
    base[0].save_pretrained(folder, state_dict=weights)
    load_model(folder)
    assert "note" in (said := capsys.readouterr().err) and "neither used nor saved" in said
    load_model(saved(*base, tmp_path / "plain"))
    assert capsys.readouterr().err == ""
    rwkv = small("rwkv", vocab_size=len(base[1]), hidden_size=32, num_hidden_layers=4, rescale_every=1, context_length=64)
    with pytest.raises(SystemExit):
        load_model(saved(rwkv, base[1], tmp_path / "rwkv"))
    assert "changes its weights" in capsys.readouterr().err


CONFIG = {"model": "tiny", "facts": "no-such-folder", "train": None, "known": None, "heldout": None, "seed": 0, "batch_size": 8,
          "accumulate": 1, "epochs": 2}


def make_run(folder, after, heldout="same", facts=None, sets=None, **config):
    """A run folder by hand: held-out facts (default: eight), all right before, `after` says which are afterwards."""
    folder.mkdir(parents=True)
    run = {"method": "x", "data": {"heldout": heldout}, "config": CONFIG | config, "number": 24, "width": 64, "weights": "w"}
    n = len(after)
    metrics = [{"stage": 1, "epoch": 1, "heldout": 0.1}]
    for epoch, kept in enumerate((1.0, 1.0, sum(after) / n)):
        metrics.append({"stage": 2, "epoch": epoch, "unknown": epoch / 2, "known": 1.0, "heldout": kept})
    if facts is None:
        facts = [{"relation": "ab"[i % 2], "kind": "name", "prompt": f"{i}?", "completion": "x"} for i in range(n)]
    sets = (sets or {"unknown": [], "known": []}) | {"heldout": [{"row": fact} for fact in facts]}
    write_jsonl(folder / "run.json", [run])
    write_jsonl(folder / "metrics.jsonl", metrics)
    before = {key: {"accepted": [accepted_answers(example["row"]) for example in rows]} for key, rows in sets.items()}
    before["heldout"] |= {"answers": ["x"] * n, "right": [True] * n}
    said = ["y"] * (n - 1) + [""]                               # an answer may be empty
    write_answers(folder, sets, before, {"heldout": {"answers": said, "right": after}})
    return read_run(folder)


def test_compare(tmp_path):
    first = make_run(tmp_path / "a", [True, False] * 4)
    second = make_run(tmp_path / "b", [True] * 7 + [False])
    third = make_run(tmp_path / "c", [True] * 8, heldout="other")
    del third["metrics"][1]                                             # as with --eval-every 0
    a, b, c = compare([first, second, third])
    assert a["accuracy"] == {"Unknown learnt": 1.0, "Known trained": 1.0, "held out before": 1.0, "held out after": 0.5}
    assert a["forgetting"] == {"all": 50.0, "all, % of the peak": 50.0, "relation a": 0.0, "relation b": 100.0, "kind name": 50.0, "at 25% learnt": 0.0, "at 50% learnt": 0.0, "at 95% learnt": 50.0}
    assert b["forgetting"]["all"] == 12.5 and a["interval"] == wilson(4, 8) and (a["n"], a["group"]) == (8, str(tmp_path / "a"))
    assert b["mcnemar"] == [str(tmp_path / "a"), 0, 3, 0.25]
    assert "mcnemar" not in a and "mcnemar" not in c                    # other held-out rows: not paired
    assert len(third["metrics"]) == 2 and list(c["forgetting"]) == ["all", "all, % of the peak", "relation a", "relation b", "kind name"]
    json.dumps([a, b, c], allow_nan=False)


def test_means_over_seeds(tmp_path, capsys):
    """Runs that differ only in seed, GROUP-SEED, share a row of means; by another setting they must not."""
    for seed in (0, 1):
        make_run(tmp_path / f"a-{seed}", [True] * (6 - 2 * seed) + [False] * (2 + 2 * seed), seed=seed)
    make_run(tmp_path / "b-0", [True] * 8, epochs=3)
    said = call(tmp_path, "eval_hallucination", "a-0", "a-1", "b-0").stdout
    assert re.search(r"^a +1.000 ± 0.000 .* 0.625 ± 0.177$", said, re.M)       # .75 and .5: sd √.03125
    assert re.search(r"^forgetting, points +a +b$", said, re.M) and re.search(r"^all +37.5 ± 17.7 +0.0$", said, re.M)
    assert re.search(r"^all, % of the peak +37.5 ± 17.7 +0.0$", said, re.M)
    assert re.search(r"^a-0: forgets 25.0 points of 8 held-out facts \(95 % interval of accuracy after: 0.409–0.929\)$", said, re.M)
    assert re.search(r"^  right in a-0 alone 2, here alone 0 \(McNemar p = 0.5\)$", said, re.M)
    make_run(tmp_path / "a-2", [True] * 8, seed=2, epochs=3)
    assert "a-2" in refused(tmp_path, "eval_hallucination", "a-0", "a-1", "a-2")
    make_run(tmp_path / "b-1", [True] * 8, seed=1, epochs=3)
    run = rows_of(tmp_path / "b-1/run.json")[0]
    write_jsonl(tmp_path / "b-1/run.json", [run | {"number": 25}])              # nor by the number of new facts
    assert "b-1" in refused(tmp_path, "eval_hallucination", "b-0", "b-1")


def test_a_relation_of_any_name():
    """One that is called as the sum of all is counted once."""
    facts = [{"relation": name, "right_before": True, "right_after": name == "all"} for name in ("all", "all", "b")]
    assert eval_hallucination.flips(facts) == {"all": [3, 1, 0, 1.0], "relation all": [2, 0, 0, 1.0], "relation b": [1, 1, 0, 1.0]}


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
def test_thin_lines_are_runs():
    """A mean and a line a run; the mean alone where runs were not measured at the same epochs, as their values cannot be told apart."""
    panels = {("x", "y"): {"even": {0: [90, 80], 5: [50, 60]}, "uneven": {0: [90, 10], 1: [10], 5: [50, 10]}}}
    axis, = eval_hallucination.draw(panels).axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[85, 55], [90, 50], [80, 60], [50, 10, 30]]


def test_origins_by_hand(tmp_path):
    """Five hallucinations, of every origin; chance: the relation's other answers, each as often as it stands there."""
    def fact(subject, relation, answer):
        return {"prompt": f"Q: {relation} of {subject}?\nA:", "completion": f" {answer}\n", "answers": [answer], "subject": subject,
                "relation": relation}
    sets = {"unknown": [fact("Ann Ash", "job", "Baker"), fact("Bob Elm", "job", "Smith"), fact("Cid Oak", "home", "Ulm")],
            "known": [fact("Dee Fir", "job", "Cook"), fact("Eve Yew", "job", "Cook")]}
    # subject, right answer, new answer
    heldout = [("Ann Yew", "Monk", "Baker"), ("Ann Fir", "Monk", "smith."), ("Gus Oak", "Monk", "Ulm"), ("Gus Elm", "Monk", "Cook"),
               ("Gus Fir", "Monk", "Nobody"), ("Gus Yew", "Monk", "Monk")]
    sets["heldout"] = [fact(subject, "job", right) for subject, right, _ in heldout]
    new = [answer for *_, answer in heldout]
    before = {key: {"accepted": [row["answers"] for row in rows]} for key, rows in sets.items()}
    before["known"]["accepted"][0] = ["Cook", "Chef"]                   # a second answer counts as some fact's
    new[3] = "Chef"
    before["heldout"] |= {"answers": ["Monk"] * 6, "right": [True] * 6}
    write_answers(tmp_path, {key: [{"row": row} for row in rows] for key, rows in sets.items()}, before,
                  {"heldout": {"answers": new, "right": [False] * 5 + [True]}})
    rows = rows_of(tmp_path / "answers.jsonl")
    assert [row.get("origin") for row in rows] == [ORIGINS[0], ORIGINS[1], ORIGINS[3], ORIGINS[2], ORIGINS[3], None]
    # the relation's other answers are Baker, Smith, Cook, Cook; Baker shares a name with two of five subjects, Smith with Gus Elm
    chance = Counter()
    for row in rows[:5]:
        chance.update(row["chance"])
    assert {o: chance[o] / 5 for o in ORIGINS} == pytest.approx(dict(zip(ORIGINS, [(2 + 1) / 4 / 5, (3 + 4) / 4 / 5, 2 / 4, 0])))
    assert [row["words shared"] for row in rows] == ["1", "1", "1", "1", "0", "0"]


def test_show_and_ask(workplace):
    """What a user sees: tables, origins, examples; one question to two runs, before and after; from another folder too."""
    for method in ("sft_baseline", "sft_freeze"):
        call(workplace, method, "--epochs", 12, "--learning-rate", 4e-3, "--out", f"runs/{method}")
    done = call(workplace, "eval_hallucination", "runs/sft_baseline", "--show", 2, "runs/sft_freeze").stdout
    assert re.search(r"^accuracy +Unknown learnt +Known trained +held out before +held out after$", done, re.M)
    assert "right in runs/sft_baseline alone" in done and f"{ORIGINS[-1]}: by chance" in done
    answers = [row for row in read_jsonl(workplace / "runs/sft_baseline/answers.jsonl") if row["right_before"] and not row["right_after"]]
    assert len(answers) > 2 and f"A: {answers[1]['before']} → {answers[1]['after']}\n" in done
    assert f"{answers[2]['prompt']} {answers[2]['before']} → {answers[2]['after']}" not in done
    (workplace / "elsewhere").mkdir()
    assert f"{ORIGINS[-1]}: by chance" in call(workplace / "elsewhere", "eval_hallucination", "../runs/sft_baseline").stdout
    question = answers[0]["prompt"][3:-3]
    done = call(workplace, "eval_hallucination", "runs/sft_baseline", "runs/sft_freeze", "--ask", question)
    said = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert said["runs/sft_baseline/before"] == answers[0]["before"] and said["runs/sft_baseline"] == answers[0]["after"]
    assert list(said) == [f"runs/sft_{name}" for name in ("baseline/before", "baseline", "freeze/before", "freeze")]
    for words, named in ((["--show", -1], "--show -1"), (["--model", "x", "--facts", "facts/tiny", "--ask", "Who?"], "--ask")):
        assert named in refused(workplace, "eval_hallucination", *(["runs/sft_freeze"] if "--model" not in words else []), *words)
    # drift is measured from the weights that the run started from, or not at all
    call(workplace, "why", "runs/sft_freeze", "--of", "drift-groups")
    run = rows_of(workplace / "runs/sft_freeze/run.json")[0]
    write_jsonl(workplace / "runs/sft_freeze/run.json", [run | {"weights": "others"}])
    assert "no longer the model" in refused(workplace, "why", "runs/sft_freeze", "--of", "drift")


def test_flips(workplace):
    """What a run lost and gained, counted again from its answers; the same from its models; without labels, what changed."""
    call(workplace, "sft_baseline", "--epochs", 12, "--eval-every", 0, "--out", "runs/b")
    facts = rows_of(workplace / "runs/b/answers.jsonl")
    by_hand = Counter()
    for fact in facts:
        for group in ("all", f"relation {fact['relation']}"):
            by_hand[group, fact["right_before"], fact["right_after"]] += 1
    assert by_hand["all", True, False] > 0
    table = json.loads(call(workplace, "eval_hallucination", "runs/b", "--flips", "--json").stdout)["runs/b"]
    assert set(table) == {"all"} | {f"relation {fact['relation']}" for fact in facts}
    for group, (n, lost, gained, _) in table.items():
        counts = [by_hand[group, *pair] for pair in ((True, True), (True, False), (False, True), (False, False))]
        assert [n, lost, gained] == [sum(counts), *counts[1:3]]
    first = next(fact for fact in facts if fact["right_before"] and not fact["right_after"])
    said = call(workplace, "eval_hallucination", "runs/b", "--flips", "--show", 1).stdout
    assert f"right → wrong\n{first['prompt']} {first['before']} → {first['after']}\n" in said
    # asked again, with labels: the same table
    again = ["runs/b", "--flips", "--json", "--heldout"]
    assert json.loads(call(workplace, "eval_hallucination", *again, "facts/tiny/heldout_known.jsonl").stdout)["runs/b"] == table
    # without: what is no longer said counts as lost
    write_jsonl(workplace / "mine.jsonl", [{"prompt": fact["prompt"]} for fact in facts])
    done = call(workplace, "eval_hallucination", *again, "mine.jsonl")
    changed = sum(normalize(fact["before"]) != normalize(fact["after"]) for fact in facts)
    assert json.loads(done.stdout)["runs/b"]["all"][:3] == [len(facts), changed, 0]
    assert f"{len(facts)} rows have no answers" in done.stderr
    write_jsonl(workplace / "bad.jsonl", [{"question": "Who?"}])
    for words, named in ((["--flips", "--heldout", "bad.jsonl"], "bad.jsonl"), (["--heldout", "mine.jsonl"], "--flips")):
        assert named in refused(workplace, "eval_hallucination", "runs/b", *words)


def test_interpolate(workplace):
    """α 0 and 1 score as the two models do; between them the weights are means, and are saved as an ordinary checkpoint."""
    call(workplace, "sft_baseline", "--epochs", 12, "--learning-rate", 4e-3, "--out", "runs/a")
    words = ["--model", "runs/a", "--facts", "facts/tiny"]
    done = call(workplace, "eval_hallucination", *words, "--interpolate", 0, 0.25, 1)
    assert done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.pop("interpolate") for line in lines] == [0, 0, 0, 0.25, 0.25, 0.25, 1, 1, 1]
    before = call(workplace, "eval_hallucination", "--model", "runs/a/before", *words[2:]).stdout
    after = call(workplace, "eval_hallucination", *words).stdout
    assert lines[:3] + lines[6:] == [json.loads(line) for line in (before + after).splitlines()]
    assert lines[0]["accuracy"] < 0.3 and lines[6]["accuracy"] > 0.9
    done = call(workplace, "eval_hallucination", *words, "--interpolate", 0.25, "--out", "mixed")
    models = [load_model(str(workplace / name))[0].state_dict() for name in ("runs/a/before", "runs/a", "mixed")]
    for name, weight in models[2].items():
        torch.testing.assert_close(weight, 0.75 * models[0][name] + 0.25 * models[1][name])
    scored = call(workplace, "eval_hallucination", "--model", "mixed", *words[2:]).stdout
    assert [json.loads(line) for line in scored.splitlines()] == lines[3:6] and done.stdout.endswith("saved mixed\n")
    for more, named in ((["--interpolate", 1.5], "1.5"), (["--out", "new"], "--out new"), (["--interpolate", 0.5, "--out", "mixed"], "mixed"),
                        (["--interpolate", 0.1, 0.2, "--out", "new"], "new")):
        assert named in refused(workplace, "eval_hallucination", *words, *more)
    assert "--interpolate" in refused(workplace, "eval_hallucination", "runs/a", "--interpolate", 0.5)
    # of other rows than the run had, held-out ones may be among those that it was trained on
    shutil.copytree(workplace / "facts/tiny", workplace / "other")
    (workplace / "other/heldout_known.jsonl").write_bytes((workplace / "facts/tiny/train_known.jsonl").read_bytes())
    for model in ("runs/a", "runs/a/before"):
        done = call(workplace, "eval_hallucination", "--model", model, "--facts", "other")
        assert done.stderr.startswith("note: other/heldout_known.jsonl: ") and done.stderr.count("\n") == 1
    shutil.copytree(workplace / "runs/a/before", workplace / "model")                # with strangers' run.json
    for folder in (".", "model"):
        (workplace / folder / "run.json").write_text("{\n}")
    assert not call(workplace, "eval_hallucination", "--model", "model", "--facts", "other").stderr


def test_a_closed_pipe_is_no_error(workplace):
    make_run(workplace / "a", [True] * 8)
    done = subprocess.run(f"{sys.executable} {ROOT}/eval_hallucination.py {' a' * 500} | head -n 1", shell=True, cwd=workplace,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "" and done.stderr == ""


def conditions(folder, base, world):
    """Runs by hand of the small world: "same" is the start model itself, "moved" has other weights and lost one code's facts."""
    sets = {}
    for key, name in eval_hallucination.SETS.items():
        sets[key] = [{"row": row} for row in read_jsonl(world / name)]
    facts = [example["row"] for example in sets["heldout"]]
    torch.manual_seed(0)
    for name, noise in (("same", 0.0), ("moved", 0.05)):
        model = copy.deepcopy(base[0])
        for p in model.parameters():
            p.data += noise * torch.randn_like(p)
        code = next(fact["subject"] for fact in facts if fact["kind"] == "code")
        after = [name == "same" or fact["subject"] != code for fact in facts]
        make_run(folder / f"{name}-0", after, facts=facts, sets=sets)
        run = rows_of(folder / f"{name}-0/run.json")[0] | {"weights": weights_hash(base[0]), "start": str(world / "base")}
        run["config"]["epochs"] = 10
        write_jsonl(folder / f"{name}-0/run.json", [run])
        for path, weights in (("", model), ("before", base[0]), ("epoch-10", model)):
            saved(weights, base[1], folder / f"{name}-0" / path)


def test_drift_by_hand(tmp_path, base, world):
    """0 for a model against itself; else 1 − cosine at the subject's last token of the whole prompt."""
    conditions(tmp_path, base, world)
    runs = [read_run(tmp_path / "same-0"), read_run(tmp_path / "moved-0")]
    asked = []

    def load(path, device):
        asked.append(path.name)
        return load_model(path, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_hallucination, "load_model", load)
        measured = [why.measure(run, "drift") for run in runs]
    assert asked == ["base", "same-0", "moved-0"]               # the start that both share is asked once
    lines = {of: why.curves(runs, [why.measure(run, of) for run in runs], of) for of in ("drift-groups", "drift-epochs")}
    lines["drift"] = why.curves(runs, measured, "drift")
    lines = {of: list(line.values()) for of, line in lines.items()}
    assert max(abs(value) for value, in lines["drift"][0].values()) < 1e-4
    model, tokenizer = load_model(tmp_path / "moved-0")
    rows, groups = [], defaultdict(list)
    for row in runs[1]["facts"]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        at = ids.shape[1] - 1 - len(tokenizer("?\nA:")["input_ids"])                   # the prompt goes on behind the subject
        assert tokenizer.decode(ids[0, :at + 1]).endswith(row["subject"])
        with torch.no_grad():
            x, y = ([h[0, at].double() for h in m(ids, output_hidden_states=True).hidden_states] for m in (base[0], model))
        rows.append([100 * (1 - float(a @ b / a.norm() / b.norm())) for a, b in zip(x, y)])
        groups[row["words shared"]].append(rows[-1][2])
    layers = [sum(column) / len(rows) for column in zip(*rows)]
    assert [value for value, in lines["drift"][1].values()] == pytest.approx(layers, abs=1e-3) and layers[2] > 0.1
    assert lines["drift-epochs"][1] == {0: [pytest.approx(0, abs=1e-4)], 10: [pytest.approx(layers[2], abs=1e-3)]}
    assert lines["drift-groups"][1] == {g: [pytest.approx(sum(v) / len(v), abs=1e-3)] for g, v in groups.items()} and "code" in groups


def test_drift_of_odd_hidden_states(tmp_path, base):
    """Layers of different width (opt-350m), and hidden states in several streams (Gemma 3n), give a number a layer."""
    tokenizer = base[1]
    opt = small("opt", vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
                num_attention_heads=2, do_layer_norm_before=False, max_position_embeddings=64)
    texts = ["Genis", "Ulm of Ulm"]
    states = why.subject_states(saved(opt, tokenizer, tmp_path / "opt"), texts, torch.device("cpu"))
    assert len(states) == 3 and all(layer.shape[0] == 2 for layer in states)
    stacked = copy.deepcopy(base[0])
    forward = stacked.base_model.forward

    def streams(*args, **more):
        output = forward(*args, **more)
        if output.hidden_states:
            output.hidden_states = tuple(torch.stack([h, h]) for h in output.hidden_states[:-1]) + output.hidden_states[-1:]
        return output
    stacked.base_model.forward = streams
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_hallucination, "load_model", lambda path, device: (stacked, tokenizer))
        states = why.subject_states("x", texts, torch.device("cpu"))
    assert [layer.shape for layer in states] == [(2, 128)] * 3 + [(2, 64)]


def test_of(tmp_path, base, world):
    """What --of prints and draws: seeds are averaged, groups are columns, what stands along x is not in the name of the group."""
    conditions(tmp_path, base, world)
    for name in ("same", "moved"):
        shutil.copytree(tmp_path / f"{name}-0", tmp_path / f"{name}-24-1")
        run = rows_of(tmp_path / f"{name}-24-1/run.json")[0]
        run["config"]["seed"] = 1
        write_jsonl(tmp_path / f"{name}-24-1/run.json", [run])
        shutil.copytree(tmp_path / f"{name}-24-1", tmp_path / f"{name}-1")
    folders = ["same-0", "same-1", "moved-0", "moved-1"]
    said = {of: call(tmp_path, "why", *folders, "--of", of).stdout.splitlines() for of in why.AXES}
    rows = read_jsonl(world / "heldout_known.jsonl")
    lost = 100 * max(Counter(row["subject"] for row in rows if row["kind"] == "code").values()) / sum(row["kind"] == "code" for row in rows)
    assert said["kind"][1].split()[-2:] == ["code", "name"] and said["kind"][3].split() == ["moved", f"{lost:.1f}", "±", "0.0", "0.0", "±", "0.0"]
    assert said["number"][1].split()[-1] == "24"
    learnt, kept = by_epoch([read_run(tmp_path / folder) for folder in folders]).values()
    assert learnt[str(tmp_path / "same")] == {0: [0.0] * 2, 1: [50.0] * 2, 2: [100.0] * 2}
    assert kept[str(tmp_path / "same")] == {0: [100.0] * 2, 1: [100.0] * 2, 2: [100.0] * 2}
    assert said["drift"][1].split()[-4:] == list("0123") and said["drift"][2].split()[-1] == "0.0"
    assert said["drift-epochs"][1].split()[-2:] == ["0", "10"] and "code" in said["overlap"][1]
    everything = 100 * max(Counter(row["subject"] for row in rows if row["kind"] == "code").values()) / len(rows)
    drawn = json.loads(call(tmp_path, "why", "same-0", "same-24-1", "moved-0", "--of", "number", "--json").stdout)
    assert drawn == {"forgetting, points": {"same": {"24": [0.0, 0.0]}, "moved": {"24": [pytest.approx(everything)]}}}
    drawn = json.loads(call(tmp_path, "why", "moved-0", "--of", "number", "--json", "--kind", "name", "code").stdout)
    assert drawn == {"forgetting, points (names)": {"moved": {"24": [0.0]}}, "forgetting, points (codes)": {"moved": {"24": [pytest.approx(lost)]}}}
    if importlib.util.find_spec("matplotlib"):
        for of in ("kind", "number", "drift"):
            call(tmp_path, "why", *folders, "--of", of, "--kind", "name", "code", "--plot", f"{of}.png")
            assert len((tmp_path / f"{of}.png").read_bytes()) > 5000
    shutil.rmtree(tmp_path / "moved-0/epoch-10")                                      # without --save-every-epoch: before and after
    before, after = call(tmp_path, "why", "moved-0", "--of", "drift-epochs").stdout.splitlines()[-1].split()[-2:]
    assert before == "0.0" and float(after) > 0.1
    make_run(tmp_path / "bare", [True] * 8, facts=[{"prompt": "Who?", "completion": "x", "origin": "mine"}] * 8)
    assert "mine" not in call(tmp_path, "eval_hallucination", "bare").stdout      # a column of the user's own
    assert "--of overlap: nothing" in call(tmp_path, "why", "bare", "--of", "overlap").stderr
    assert "--of" in refused(tmp_path, "why", "bare", "--of", "shape")
    assert "one of them" in refused(tmp_path, "eval_hallucination", "bare", "--flips", "--plot", "x.png")


def test_answer_in_the_name(tmp_path):
    """Facts whose answer, whole words, can be read off the name are told from the others; of several answers one is enough."""
    facts = [{"prompt": "?", "subject": subject, "answers": answers} for subject, answers in (
        ("Ford Focus", ["Fiat", "ford"]), ("the Amman Governorate", ["Amman"]), ("Fordham", ["Ford"]), ("Mazda2", ["Mazda"]))]
    make_run(tmp_path / "a-0", [True, False, False, False], facts=facts)
    drawn = json.loads(call(tmp_path, "why", "a-0", "--of", "answer", "--json").stdout)
    assert drawn == {"forgetting, points": {"a": {"no": [100.0], "yes": [50.0]}}}


def test_peak(tmp_path):
    """Forgetting relative to the peak, as the paper has it: the peak may come after stage 2 has begun."""
    run = make_run(tmp_path / "a", [True, False] * 4)
    for row, kept in zip(run["metrics"], (0.75, 0.8, 0.5)):
        row["heldout"] = kept
    assert compare([run])[0]["forgetting"]["all, % of the peak"] == pytest.approx(37.5)


def test_number_of_new_facts(workplace, tmp_path):
    """It counts what is trained on, and leaves the name of the group where it stands alone there."""
    call(workplace, "sft_baseline", "--epochs", 1, "--no-unknown", "--out", "bare")
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "x-240-24-0")
    assert [rows_of(workplace / name / "run.json")[0]["number"] for name in ("bare", "x-240-24-0")] == [0, 24]
    run = read_run(workplace / "x-240-24-0")
    assert list(why.curves([run], [why.measure(run, "number")], "number")) == [str(workplace / "x-240")]


def test_plot(tmp_path):
    """A picture with matplotlib; without it one line that says how to get it."""
    make_run(tmp_path / "a", [True, False] * 4)
    make_run(tmp_path / "b", [True] * 8)
    if importlib.util.find_spec("matplotlib"):
        call(tmp_path, "eval_hallucination", "a", "b", "--plot", "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "plot.png").stat().st_size > 5000
        assert "absent" in refused(tmp_path, "eval_hallucination", "a", "b", "--plot", "absent/plot.png")
    else:
        assert "pip install matplotlib" in refused(tmp_path, "eval_hallucination", "a", "b", "--plot", "plot.png")
