"""eval_hallucination.py: answers, matching, statistics against hand-computed cases, and the comparison of runs."""
import copy
import hashlib
import importlib.util
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, refused
from eval_hallucination import (ORIGINS, accepted_answers, compare, curves, draw, drift, evaluate, exact_match,
                                generate_answers, grouped, interaction, labels, load_model, mcnemar, normalize, provenance,
                                read_jsonl, read_run, setting, show, show_curves, spread, stop_ids, tokenize, trained_facts, wilson)


def test_normalize_and_exact_match():
    assert normalize(" The  Hague.\nQ: next") == "hague"
    assert normalize("Ａna's A-b") == "anas ab"                  # NFKC, punctuation, case
    assert exact_match("the netherlands", ["Holland", "Netherlands"]) and not exact_match("Nether lands", ["Netherlands"])
    assert exact_match("A", ["A"]) and not exact_match("B", ["A"]) and not exact_match("", ["?"])


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
    return tokenizer.decode(answer).strip()


def test_batched_answers_equal_one_by_one(base, world):
    model, tokenizer = base
    prompts = [row["prompt"] for row in read_jsonl(world / "labelled.jsonl")][::7] + ["Q: Who?\nA:", "The language of"]
    assert generate_answers(model, tokenizer, prompts, 5, batch_size=6) == [
        greedy_by_hand(model, tokenizer, p, 5) for p in prompts]


def test_checkpoints_own_generation_settings_are_ignored(base):
    model, tokenizer = base
    prompts = ["Q: Who?\nA:", "The language of"]
    expected, kept = generate_answers(model, tokenizer, prompts, 5), model.generation_config
    model.generation_config = type(kept)(do_sample=True, temperature=9.0, repetition_penalty=50.0, num_beams=3, max_length=4,
                                         eos_token_id=kept.eos_token_id)
    try:
        assert generate_answers(model, tokenizer, prompts, 5) == expected
    finally:
        model.generation_config = kept


def test_stop_ids(base):
    tokenizer = base[1]
    newline, = tokenizer("\n")["input_ids"]
    assert {newline, tokenizer.eos_token_id} <= set(stop_ids(tokenizer, base[0]))
    assert all(tokenizer.decode([i]).startswith("\n") or i == tokenizer.eos_token_id for i in stop_ids(tokenizer))


def test_evaluate(base, world):
    rows = read_jsonl(world / "heldout_known.jsonl")
    result = evaluate(*base, rows)
    assert result["accuracy"] == 1.0 and all(result["right"])           # HighlyKnown, zero shots: right by definition
    assert accepted_answers({"answers": "Ulm"}) == ["Ulm"] and accepted_answers({"answers": [7]}) == ["7"]
    assert accepted_answers({"completion": " Ulm\n", "answers": []}) == ["Ulm"]
    wrong = [{"prompt": r["prompt"], "completion": " Nobody\n"} for r in rows[:4]]
    assert evaluate(*base, wrong + rows[:4])["accuracy"] == 0.5 and math.isnan(evaluate(*base, [])["accuracy"])


CONFIG = {"model": "tiny", "facts": "no-such-folder", "train": None, "known": None, "heldout": None, "seed": 0}


def make_run(folder, after, heldout="same", **config):
    """A run folder by hand: eight held-out facts, all right before, `after` says which are afterwards."""
    folder.mkdir()
    run = {"method": "x", "data": {"heldout": heldout}, "config": CONFIG | config}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    metrics = [{"stage": 1, "epoch": 1, "heldout": 0.1}] + [
        {"stage": 2, "epoch": i, "unknown": i / 2, "known": 1.0, "heldout": h} for i, h in enumerate((1.0, 1.0, sum(after) / 8))]
    answers = [{"relation": "ab"[i % 2], "kind": "name", "before": "x", "after": "y", "right_before": True, "right_after": a}
               for i, a in enumerate(after)]
    for name, rows in (("metrics.jsonl", metrics), ("answers.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return read_run(folder)


def test_compare(tmp_path):
    first = make_run(tmp_path / "a", [True, False] * 4)
    second = make_run(tmp_path / "b", [True] * 7 + [False])
    third = make_run(tmp_path / "c", [True] * 8, heldout="other")
    a, b, c = compare([first, second, third])
    assert (a["before"], a["after"], a["forgetting"], a["peak_forgetting"]) == (1.0, 0.5, 50.0, 50.0)
    assert (b["unknown"], b["known"], b["forgetting"], b["epochs"]) == (1.0, 1.0, 12.5, 2)
    assert a["when_learnt"] == {0.25: 0.0, 0.5: 0.0, 0.95: 50.0}
    assert b["mcnemar"] == {"first": str(tmp_path / "a"), "first_only": 0, "this_only": 3, "p": 0.25}
    assert "mcnemar" not in a and "mcnemar" not in c                    # other held-out rows: not paired
    assert a["by"]["relation"] == {"a": {"n": 4, "before": 1.0, "after": 1.0}, "b": {"n": 4, "before": 1.0, "after": 0.0}}


def test_show_means_over_seeds(tmp_path, capsys):
    """Runs that differ only in seed share a row of means in all tables but the first; other settings have their own."""
    runs = [make_run(tmp_path / f"a-{seed}", [True] * (6 - 2 * seed) + [False] * (2 + 2 * seed), seed=seed) for seed in (0, 1)]
    runs.append(make_run(tmp_path / "b-0", [True] * 8, epochs=3))
    show(compare(runs))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].split("/")[-1] for line in lines if str(tmp_path) in line] == ["a-0", "a-1", "b-0", "a", "b-0", "a", "b-0"]
    assert "0.625 ± 0.177" in lines[7] and "37.5 ± 17.7" in lines[7] and lines[7].split()[1] == "2"      # .75 and .5: sd √.03125
    assert lines[-2].endswith("37.5 ± 17.7") and "0.0 ± 0.0" in lines[-2]
    assert spread([1, None, 2], ".1f") == "1.5 ± 0.7" and spread([None], ".1f") == "–" and spread([0.5], ".3f") == "0.500"


def test_provenance_by_hand(tmp_path):
    """Five hallucinations, of every origin; chance: the relation's other answers, each as often as it stands there."""
    fact = lambda subject, relation, answer: {"prompt": f"Q: {relation} of {subject}?\nA:", "completion": f" {answer}\n",
                                              "answers": [answer], "subject": subject, "relation": relation}
    unknown = [fact("Ann Ash", "job", "Baker"), fact("Bob Elm", "job", "Smith"), fact("Cid Oak", "home", "Ulm")]
    known = [fact("Dee Fir", "job", "Cook"), fact("Eve Yew", "job", "Cook")]
    # subject, right answer, new answer
    heldout = [("Ann Yew", "Monk", "Baker"), ("Ann Fir", "Monk", "smith."), ("Gus Oak", "Monk", "Ulm"), ("Gus Elm", "Monk", "Cook"),
               ("Gus Fir", "Monk", "Nobody"), ("Gus Yew", "Monk", "Monk")]
    data = {}
    for key, rows in (("unknown", unknown), ("known", known)):
        (tmp_path / f"train_{key}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        data[key] = hashlib.sha256((tmp_path / f"train_{key}.jsonl").read_bytes()).hexdigest()
    answers = [fact(s, "job", a) | {"before": a, "after": b, "right_before": True, "right_after": a == b} for s, a, b in heldout]
    run = {"run": {"config": CONFIG | {"facts": str(tmp_path)}, "data": data | {"heldout": "x"}}, "answers": answers}
    run["trained"] = trained_facts(run["run"])
    found = provenance(run)
    assert [e["origin"] for e in found["examples"]] == [ORIGINS[0], ORIGINS[1], ORIGINS[3], ORIGINS[2], ORIGINS[3]]
    assert found["counts"] == dict(zip(ORIGINS, [1, 1, 1, 2]))                  # Ulm is taught, but of another relation
    # the relation's other answers are Baker, Smith, Cook, Cook; Baker shares a name with two of five subjects, Smith with Gus Elm
    assert found["chance"] == pytest.approx(dict(zip(ORIGINS, [(2 + 1) / 4 / 5, (3 + 4) / 4 / 5, 2 / 4, 0])))
    # a run without new facts cannot have answers of theirs; other rows than the run's tell nothing
    run["run"]["config"]["no_unknown"] = True
    assert provenance(run)["counts"] == dict(zip(ORIGINS, [0, 0, 3, 2]))
    run["run"]["data"]["known"] = "other"
    run["trained"] = trained_facts(run["run"])
    assert run["trained"] is None and provenance(run)["counts"] == {} and len(provenance(run)["examples"]) == 5


def test_show_and_ask(workplace):
    """What a user sees: the table, origins, examples; one question to two runs, before and after."""
    for method in ("sft_baseline", "sft_freeze"):
        call(workplace, method, "--epochs", 12, "--learning-rate", 4e-3, "--out", f"runs/{method}")
    done = call(workplace, "eval_hallucination", "runs/sft_baseline", "--show", 2, "runs/sft_freeze")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("runs/sft_baseline") and " : " in lines[2] and "McNemar" in lines[0]
    origins = lines[lines.index(next(line for line in lines if line.startswith("right before and wrong after"))) + 1:]
    assert origins[0].endswith(ORIGINS[-1]) and origins[1].count("%") == 8 and origins[2].startswith("runs/sft_freeze")
    answers = [row for row in read_jsonl(workplace / "runs/sft_baseline/answers.jsonl") if row["right_before"] and not row["right_after"]]
    assert len(answers) > 2 and f"A: {answers[1]['before']} → {answers[1]['after']}" in lines
    assert not any(row["after"] == answers[2]["after"] and row["prompt"] == answers[2]["prompt"] for row in answers[:2])
    question = answers[0]["prompt"][3:-3]
    done = call(workplace, "eval_hallucination", "runs/sft_baseline", "runs/sft_freeze", "--ask", question)
    said = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert said["runs/sft_baseline/before"] == answers[0]["before"] and said["runs/sft_baseline"] == answers[0]["after"]
    assert list(said) == [f"runs/sft_{name}" for name in ("baseline/before", "baseline", "freeze/before", "freeze")]
    for words, named in ((["--show", -1], "--show -1"), (["--model", "x", "--facts", "facts/tiny", "--ask", "Who?"], "--ask")):
        assert named in refused(workplace, "eval_hallucination", *(["runs/sft_freeze"] if "--model" not in words else []), *words)


def conditions(folder, base, world):
    """Runs by hand of the small world: "semantic" is the start model itself, "uuid" has other weights and kept one fact less."""
    heldout = read_jsonl(world / "heldout_known.jsonl")
    sha = lambda name: hashlib.sha256((world / f"{name}.jsonl").read_bytes()).hexdigest()
    torch.manual_seed(0)
    for kind, noise, lost in (("semantic", 0.0, "name"), ("uuid", 0.05, "code")):
        shutil.copytree(world, folder / f"facts-{kind}")
        meta = json.loads((world / "meta.json").read_text()) | {"new": kind}
        (folder / f"facts-{kind}" / "meta.json").write_text(json.dumps(meta))
        out, model = folder / f"{kind}-0", copy.deepcopy(base[0])
        for p in model.parameters():
            p.data += noise * torch.randn_like(p)
        for checkpoint, weights in ((out, model), (out / "before", base[0]), (out / "epoch-10", model)):
            weights.save_pretrained(checkpoint)
            base[1].save_pretrained(checkpoint)
        answers = [row | {"before": "x", "after": "y", "right_before": True, "right_after": i > 4 or row["kind"] != lost}
                   for i, row in enumerate(sorted(heldout, key=lambda row: row["kind"], reverse=kind == "semantic"))]
        answers.sort(key=lambda row: row["prompt"])
        run = {"method": "baseline", "data": {"heldout": sha("heldout_known"), "unknown": sha("train_unknown")},
               "config": CONFIG | {"facts": str(folder / f"facts-{kind}")}}
        metrics = {"stage": 2, "epoch": 10, "unknown": 1.0, "known": 1.0, "heldout": 0.9}
        for name, rows in (("run.json", [run]), ("metrics.jsonl", [metrics]), ("answers.jsonl", answers)):
            (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [read_run(folder / "semantic-0"), read_run(folder / "uuid-0")]


def test_drift_by_hand(tmp_path, base, world):
    """0 for a model against itself; else 1 − cosine at the subject's last token of the whole prompt, averaged by subject."""
    same, moved = conditions(tmp_path, base, world)
    assert max(abs(value) for value in drift(same, torch.device("cpu"))["drift"].values()) < 1e-6
    found = drift(moved, torch.device("cpu"), batch_size=7, by_epoch=True)
    model, tokenizer = load_model(tmp_path / "uuid-0")
    by_subject = defaultdict(list)
    for row in moved["answers"]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        at = ids.shape[1] - 1 - len(tokenizer("?\nA:")["input_ids"])                   # the prompt goes on behind the subject
        assert tokenizer.decode(ids[0, :at + 1]).endswith(row["subject"])
        with torch.no_grad():
            x, y = ([h[0, at].double() for h in m(ids, output_hidden_states=True).hidden_states] for m in (base[0], model))
        by_subject[row["subject"]].append([1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(x, y)])
    means = {subject: [sum(column) / len(rows) for column in zip(*rows)] for subject, rows in by_subject.items()}
    assert {s: pytest.approx(v, abs=1e-5) for s, v in means.items()} == found["subjects"] and len(found["drift"]) == 4
    layers = [sum(column) / len(means) for column in zip(*means.values())]
    assert list(found["drift"].values()) == pytest.approx(layers, abs=1e-5) and layers[2] > 1e-3
    assert found["drift-epochs"] == {0: pytest.approx(0, abs=1e-6), 10: pytest.approx(layers[2], abs=1e-5)}
    codes = [value[2] for subject, value in means.items() if len(subject) == 4]
    assert found["drift-groups"]["code"] == pytest.approx(sum(codes) / len(codes), abs=1e-5)


def test_groups_and_interaction_by_brute_force(tmp_path, base, world):
    semantic, uuid = conditions(tmp_path, base, world)
    new = {word for row in read_jsonl(world / "train_unknown.jsonl") for word in row["subject"].lower().split()}
    for row, group in zip(semantic["answers"], grouped(semantic, "words shared")):
        shared = sum(word.lower() in new for word in row["subject"].split())
        assert group == (None if row["kind"] == "code" else f"{shared} shared")
    assert {"0 shared", "1 shared", "2 shared"} >= set(compare([semantic])[0]["by"]["words shared"])
    # answers of new facts of the relation, by hand where one shares a name with the subject
    taken, lost = Counter(), Counter()
    for row, group in zip(semantic["answers"], grouped(semantic, "words shared")):
        if group and not row["right_after"]:
            lost[group] += 1
            for fact in read_jsonl(world / "train_unknown.jsonl"):
                if fact["relation"] == row["relation"] and set(fact["subject"].split()) & set(row["subject"].split()):
                    taken[group] += row["after"] == "y"
                    row["after"] = fact["answers"][0]
    shares = {group: [pytest.approx(100 * taken[group] / n)] for group, n in lost.items()}
    assert list(curves([semantic], "overlap-answers").values()) == [shares] and sum(taken.values()) > 0
    points, z, p = interaction(semantic, uuid)
    # by subject, over rows drawn ten thousand times: the standard error is that of what is drawn
    subjects = {(row["kind"], row["subject"]): [] for row in semantic["answers"]}
    for a, b in zip(semantic["answers"], uuid["answers"]):
        subjects[a["kind"], a["subject"]].append(int(b["right_after"]) - int(a["right_after"]))
    names, codes = (np.array([np.mean(lost) for (k, _), lost in subjects.items() if k == kind]) for kind in ("name", "code"))
    rng = np.random.default_rng(0)
    drawn = [rng.choice(values, (10000, len(values))).mean(1) for values in (names, codes)]
    assert points == pytest.approx(100 * (names.mean() - codes.mean())) and 0 < p == pytest.approx(math.erfc(z / 2 ** 0.5))
    assert points / z == pytest.approx(100 * (drawn[0] - drawn[1]).std(), rel=0.05) and len(codes) < 12 < len(names)
    assert interaction(semantic, semantic) == (0.0, 0.0, 1.0)
    names_only = [run | {"answers": [row | {"kind": "name"} for row in run["answers"]]} for run in (semantic, uuid)]
    assert interaction(*names_only) is None


def test_of(tmp_path, base, world, capsys):
    """What --of prints and draws: labels say what differs, seeds are averaged, kinds are tested against each other."""
    for run in conditions(tmp_path, base, world):
        twin = Path(run["name"].removesuffix("0") + "1")
        shutil.copytree(run["name"], twin)
        stored = json.loads((twin / "run.json").read_text())
        (twin / "run.json").write_text(json.dumps(stored | {"config": stored["config"] | {"seed": 1}}))
    folders = [f"{kind}-{seed}" for kind in ("semantic", "uuid") for seed in (0, 1)]
    said = {of: call(tmp_path, "eval_hallucination", *folders, "--of", of).stdout.splitlines()
            for of in ("kind", "number", "width", "overlap", "overlap-answers", "drift", "drift-groups", "drift-epochs")}
    assert said["kind"][2].split("  ")[0] == "baseline, semantic" and said["kind"][2].endswith("± 0.0")
    assert said["kind"][-1].startswith("baseline: semantic facts hurt names more") and said["kind"][-1].count("z = ") == 2
    assert said["number"][1].split()[-1] == "24" and said["width"][1].split()[-1] == "64"
    assert said["drift"][1].split()[-4:] == list("0123") and said["drift"][2].split()[-1] == "0.0"
    assert said["drift-epochs"][1].split()[-2:] == ["0", "10"] and len(said["overlap"]) >= 4
    capsys.readouterr()
    show_curves({"long": {epoch: [epoch / 2] for epoch in range(9)}, "short": {8: [1.0, 3.0]}}, "drift-epochs")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][-2:] == ["long", "short"] and lines[2:][7] == ["7", "3.5", "–"] and lines[-1] == ["8", "4.0", "2.0", "±", "1.4"]
    drawn = json.loads(call(tmp_path, "eval_hallucination", *folders, "--of", "kind", "--json").stdout)
    n = sum(row["kind"] == "code" for row in read_jsonl(tmp_path / "uuid-0/answers.jsonl"))
    assert drawn["baseline, uuid"]["code"] == [pytest.approx(500 / n)] * 2 and drawn["baseline, semantic"]["code"] == [0.0, 0.0]
    if importlib.util.find_spec("matplotlib"):
        for of in ("kind", "number", "drift"):
            call(tmp_path, "eval_hallucination", *folders, "--of", of, "--plot", f"{of}.png")
            assert len((tmp_path / f"{of}.png").read_bytes()) > 5000
    alike = [read_run(tmp_path / "semantic-0") for _ in "ab"]
    for run, folder in zip(alike, "ab"):                    # each trained on all the known facts of its own folder
        run["run"]["config"] |= {"facts": folder, "known": f"{folder}/labelled.jsonl"}
    assert setting(alike[0]) == setting(alike[1]) and labels(alike) == ["baseline"] * 2
    alike[1]["run"] |= {"method": "freeze", "config": alike[1]["run"]["config"] | {"l2": 0.01}}
    assert labels(alike) == ["baseline", "L2 0.01"]
    for kind in ("semantic", "uuid"):
        shutil.rmtree(tmp_path / f"facts-{kind}")
    assert "fact folder" in refused(tmp_path, "eval_hallucination", *folders, "--of", "number")
    stored["data"]["unknown"] = "other"                     # without their facts, runs on other rows are not taken for alike
    (tmp_path / "uuid-1/run.json").write_text(json.dumps(stored))
    settings = {setting(read_run(tmp_path / folder)) for folder in folders}
    assert len(settings) == 2
    assert "--of" in refused(tmp_path, "eval_hallucination", "--model", "x", "--facts", "y", "--of", "kind")


def test_plot(tmp_path, capsys):
    """A picture with matplotlib; without it one line that says how to get it."""
    runs = [make_run(tmp_path / "a", [True, False] * 4), make_run(tmp_path / "b", [True] * 8)]
    picture = tmp_path / "plot.png"
    if importlib.util.find_spec("matplotlib"):
        draw(runs, str(picture))
        assert picture.read_bytes().startswith(b"\x89PNG") and len(picture.read_bytes()) > 5000
    else:
        with pytest.raises(SystemExit):
            draw(runs, str(picture))
        assert "pip install matplotlib" in capsys.readouterr().err and not picture.exists()
