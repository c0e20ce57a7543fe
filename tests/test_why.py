"""docs/study/why.py: origins of wrong answers and drift, against values computed by hand."""
import copy
import json
import shutil
from collections import Counter, defaultdict

import pytest
import torch
import transformers
from conftest import call, refused, rows_of
from test_eval import PLOTS, change_run, make_run, save

import eval_hallucination
import why
from eval_hallucination import SETS, file_hash, load_model, read_run, weights_hash, write_jsonl


def call_json(folder, *words):
    """Run why.py --json in a folder; return what it prints."""
    return json.loads(call(folder, "why", *words, "--json").stdout)


def add_data(folder, sets, **more):
    """Write the data files of a run made by hand into its folder, and change its run.json."""
    paths = {}
    for key, rows in sets.items():
        paths[key] = str(folder / SETS[key])
        write_jsonl(paths[key], rows)
    config = rows_of(folder / "run.json")[0]["config"]
    config |= {"train": paths["new"], "known": paths["known"], "heldout": paths["heldout"]}
    data = {key: file_hash(path) for key, path in paths.items()}
    change_run(folder, config=config | more.pop("config", {}), data=data, **more)


# ------------------------------------------------------------------------------------- origins

def fact(subject, relation, *answers):
    return {"prompt": f"Q: {relation} of {subject}?\nA:", "completion": f" {answers[0]}\n",
            "answers": list(answers), "subject": subject, "relation": relation}


# Subject, correct answer, new answer, origin of the new answer.
WRONG = [("Ann Yew", "Monk", "Baker", 0), ("Ann Fir", "Monk", "smith.", 1),
         ("Gus Oak", "Monk", "Ulm", 3), ("Gus Elm", "Monk", "Chef", 2),
         ("Gus Fir", "Monk", "Nobody", 3)]


@pytest.fixture
def wrong_answers(tmp_path):
    """Write a run with five wrong answers, of every origin; return its folder."""
    sets = {"new": [fact("Ann Ash", "job", "Baker"), fact("Bob Elm", "job", "Smith"),
                    fact("Cid Oak", "home", "Ulm")],
            # A second answer counts as the answer of some fact, too.
            "known": [fact("Dee Fir", "job", "Cook", "Chef"), fact("Eve Yew", "job", "Cook")],
            "heldout": [fact(subject, "job", right) for subject, right, *_ in WRONG]}
    sets["heldout"].append(fact("Gus Yew", "job", "Monk"))
    folder = tmp_path / "a-0"
    make_run(folder, [False] * 5 + [True], facts=sets["heldout"])
    add_data(folder, sets)
    rows = rows_of(folder / "answers.jsonl")
    for row, (_, right, new, _) in zip(rows, WRONG):
        row |= {"before": right, "after": new}
    write_jsonl(folder / "answers.jsonl", rows)
    return folder


def test_origins_by_hand(wrong_answers):
    origins = why.ORIGINS
    run = read_run(wrong_answers)
    why.add_origins(run)
    facts = run["facts"]
    assert [row["origin"] for row in facts] == [origins[i] for *_, i in WRONG] + [None]
    assert [row["words shared"] for row in facts] == ["1", "1", "1", "1", "0", "0"]
    # The other answers of the relation are Baker, Smith, Cook and Cook. Baker is a new fact that
    # shares a word for two of the five subjects, Smith for Gus Elm.
    chance = [(2 + 1) / 4 / 5, (3 + 4) / 4 / 5, 2 / 4, 0]
    found = Counter()
    for row in facts[:5]:
        found.update(row["chance"])
    assert [found[origin] / 5 for origin in origins] == pytest.approx(chance)
    # The table has each origin next to what chance would give.
    table = call_json(wrong_answers.parent, "a-0", "--of", "origin")["newly wrong answers, %"]["a"]
    expected = {}
    for i, origin in enumerate(origins):
        expected[origin] = [pytest.approx(20 * [n for *_, n in WRONG].count(i))]
        expected[f"{origin}, by chance"] = [pytest.approx(100 * chance[i])]
    assert table == expected and list(table) == list(expected)
    printed = call(wrong_answers.parent, "why", "a-0", "--of", "origin").stdout.splitlines()
    assert [line.split()[-1] for line in printed[2:]] == [
        "20.0", "15.0", "20.0", "35.0", "20.0", "50.0", "40.0", "0.0"]
    hits = call_json(wrong_answers.parent, "a-0", "--of", "overlap-answers")
    assert list(hits.values()) == [{"a": {"0": [0.0], "1": [25.0]}}]


def test_new_facts_that_are_not_trained_on_count(wrong_answers):
    """With --known-only, words shared and origins refer to the new facts that were left out."""
    expected = call_json(wrong_answers.parent, "a-0", "--of", "origin")
    config = rows_of(wrong_answers / "run.json")[0]["config"]
    change_run(wrong_answers, n_new=0, config=config | {"known_only": True})
    assert call_json(wrong_answers.parent, "a-0", "--of", "origin") == expected


def test_rows_without_columns_have_nothing_to_show(tmp_path):
    """A column of the user's that is named origin is not mistaken for one of ours."""
    facts = [{"prompt": f"{i}?", "completion": "x", "origin": "mine"} for i in range(8)]
    make_run(tmp_path / "bare", [True] * 8, facts=facts)
    new, known = [[{"prompt": f"{name}?", "completion": "x"}] for name in ("new", "known")]
    add_data(tmp_path / "bare", {"new": new, "known": known, "heldout": facts})
    for of in ("overlap", "origin", "overlap-answers", "kind", "drift"):
        done = call(tmp_path, "why", "bare", "--of", of)
        assert f"--of {of}: nothing to show" in done.stderr and done.stdout == ""
    assert "--of" in refused(tmp_path, "why", "bare", "--of", "shape")


def test_changed_data_is_rejected(wrong_answers):
    path = wrong_answers / SETS["known"]
    path.write_bytes(path.read_bytes() + b"\n")
    for change in (lambda: None, path.unlink):
        change()
        error = refused(wrong_answers.parent, "why", "a-0", "--of", "origin")
        assert str(path) in error and "a-0" in error
    call(wrong_answers.parent, "why", "a-0", "--of", "n_new")       # does not need the data


def test_data_of_a_trained_run(workplace):
    """The files are found in a fact folder, or by --train, --known and --heldout."""
    facts = "facts/tiny"
    own = ["--train", f"{facts}/{SETS['new']}", "--known", f"{facts}/{SETS['known']}",
           "--heldout", f"{facts}/{SETS['heldout']}", "--model", f"{facts}/base", "--known-only"]
    for out, words in (("folder", []), ("files", own)):
        call(workplace, "sft_baseline", "--epochs", 4, "--batch-size", 8, "--learning-rate", 4e-3,
             "--eval-every", 0, *words, "--out", out)
        overlap = call_json(workplace, out, "--of", "overlap")["forgetting, points"][out]
        assert {"code", "1"} < set(overlap)
        run = read_run(workplace / out)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workplace)
            data = why.read_data(run)
        assert data == {key: rows_of(workplace / facts / file) for key, file in SETS.items()}
    shares = call_json(workplace, "folder", "--of", "origin")["newly wrong answers, %"]["folder"]
    assert sum(share for (share,) in shares.values()) == pytest.approx(200)     # with chance


# ------------------------------------------------------------------------------ equal learning

def test_forgetting_at_equal_learning(tmp_path):
    """The first measured epoch with that share learned; nothing for runs measured only twice."""
    for name, rows in (("a-0", [0, 1, 2]), ("b-0", [0, 2])):
        make_run(tmp_path / name, [True, False] * 4)
        metrics = [row for row in rows_of(tmp_path / name / "metrics.jsonl")
                   if row["stage"] == 1 or row["epoch"] in rows]
        for row in metrics:
            if row["epoch"] == 1 and row["stage"] == 2:
                row["kept"] = 0.75
        write_jsonl(tmp_path / name / "metrics.jsonl", metrics)
    # New facts learned: 0, 0.5 and 1; held-out accuracy: 1, 0.75 and 0.5.
    assert call_json(tmp_path, "a-0", "b-0", "--of", "learned") == {
        "forgetting, points": {"a": {"25%": [25.0], "50%": [25.0], "95%": [50.0]}}}


# ---------------------------------------------------------------------- other tables and plots

def test_answer_in_the_name(tmp_path):
    """An answer is part of a name if its words are; one of several answers is enough."""
    facts = [{"prompt": "?", "subject": subject, "answers": answers} for subject, answers in (
        ("Ford Focus", ["Fiat", "ford"]), ("the Amman Governorate", ["Amman"]),
        ("Fordham", ["Ford"]), ("Mazda2", ["Mazda"]))]
    make_run(tmp_path / "a-0", [True, False, False, False], facts=facts)
    assert call_json(tmp_path, "a-0", "--of", "answer") == {
        "forgetting, points": {"a": {"no": [100.0], "yes": [50.0]}}}


def test_runs_that_differ_in_the_number_of_new_facts_form_a_line(tmp_path):
    """The number leaves the name of the group only where it stands alone."""
    for n_new, name in ((24, "x-240-24-0"), (48, "x-240-48-0"), (24, "x-240-24-1")):
        make_run(tmp_path / name, [True] * n_new + [False] * 24, seed=int(name[-1]))
        change_run(tmp_path / name, n_new=n_new)
    found = call_json(tmp_path, "x-240-48-0", "x-240-24-0", "x-240-24-1", "--of", "n_new")
    assert found == {"forgetting, points": {
        "x-240": {"24": [50.0, 50.0], "48": [pytest.approx(100 / 3)]}}}
    runs = [read_run(tmp_path / name) for name in ("x-240-24-0", "x-240-48-0")]
    frame = why.curves(runs, [why.measure(run, "n_new") for run in runs], "n_new")
    assert set(frame["run"]) == {str(tmp_path / "x-240-0")}     # a thin line per seed
    assert list(frame["n_new"]) == [24, 48]


@pytest.fixture(scope="module")
def studied(tmp_path_factory, base, world):
    """Write runs of the small world by hand; return their folder.

    same-SEED is the start model itself. moved-SEED has other weights and lost one code's facts.
    """
    folder = tmp_path_factory.mktemp("studied")
    sets = {key: rows_of(world / file) for key, file in SETS.items()}
    code = next(row["subject"] for row in sets["heldout"] if row["kind"] == "code")
    torch.manual_seed(0)
    for name, noise in (("same", 0.0), ("moved", 0.05)):
        model = copy.deepcopy(base[0])
        for weights in model.parameters():
            weights.data += noise * torch.randn_like(weights)
        after = [name == "same" or row["subject"] != code for row in sets["heldout"]]
        make_run(folder / f"{name}-0", after, facts=sets["heldout"])
        add_data(folder / f"{name}-0", sets, weights=weights_hash(base[0]),
                 start=str(world / "base"), config={"epochs": 10})
        for path, weights in (("", model), ("before", base[0]), ("epoch-10", model)):
            save(weights, base[1], folder / f"{name}-0" / path)
        shutil.copytree(folder / f"{name}-0", folder / f"{name}-1")
        config = rows_of(folder / f"{name}-1/run.json")[0]["config"]
        change_run(folder / f"{name}-1", config=config | {"seed": 1})
    return folder


RUNS = ["same-0", "same-1", "moved-0", "moved-1"]


def test_tables(studied):
    """Seeds are averaged, groups are rows, x are columns; --kind selects facts."""
    printed = {of: call(studied, "why", *RUNS, "--of", of).stdout.splitlines() for of in why.AXES}
    facts = read_run(studied / "moved-0")["facts"]
    lost = [row for row in facts if not row["right_after"]]
    of_codes = 100 * len(lost) / sum(row["kind"] == "code" for row in facts)
    of_all = 100 * len(lost) / len(facts)
    assert printed["kind"][1].split()[-2:] == ["code", "name"]
    assert printed["kind"][3].split() == ["moved", f"{of_codes:.1f}", "±", "0.0", "0.0", "±", "0.0"]
    assert printed["n_new"][1].split()[-1] == "24"
    assert printed["n_new"][3].split() == ["moved", f"{of_all:.1f}", "±", "0.0"]
    assert printed["learned"][1].split()[-3:] == ["25%", "50%", "95%"]
    assert printed["drift"][1].split()[-4:] == list("0123")
    assert printed["drift"][2].split()[-3:] == ["0.0", "±", "0.0"]
    assert printed["drift-epochs"][1].split()[-2:] == ["0", "10"]
    assert "code" in printed["overlap"][1]
    words = ["moved-0", "--of", "n_new", "--kind", "name", "code"]
    assert call_json(studied, *words) == {
        "forgetting, points (names)": {"moved": {"24": [0.0]}},
        "forgetting, points (codes)": {"moved": {"24": [pytest.approx(of_codes)]}}}


@pytest.mark.skipif(not PLOTS, reason="no matplotlib")
@pytest.mark.parametrize("of", ["kind", "n_new", "drift"])
def test_plots(studied, tmp_path, of):
    path = tmp_path / "plot.png"
    call(studied, "why", *RUNS, "--of", of, "--kind", "name", "code", "--plot", path)
    assert len(path.read_bytes()) > 5000


# --------------------------------------------------------------------------------------- drift

def drift_by_hand(start, model, tokenizer, row):
    """Return 1 − cosine in percent by layer, at the subject's last token of the whole prompt."""
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
    last = ids.shape[1] - 1 - len(tokenizer("?\nA:")["input_ids"])
    assert tokenizer.decode(ids[0, :last + 1]).endswith(row["subject"])
    states = []
    for one in (start, model):
        with torch.no_grad():
            layers = one(ids, output_hidden_states=True).hidden_states
        states.append([layer[0, last].double() for layer in layers])
    return [100 * (1 - float(a @ b / a.norm() / b.norm())) for a, b in zip(*states)]


def test_drift_by_hand(studied, base):
    runs = [read_run(studied / "same-0"), read_run(studied / "moved-0")]
    loaded = []

    def load(path, device):
        loaded.append(str(path).split("/")[-1])
        return load_model(path, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_hallucination, "load_model", load)
        why.start_states.cache_clear()
        for run in runs:
            why.measure(run, "drift")
    assert loaded == ["base", "same-0", "moved-0"]          # the shared start model is run once
    found = {}
    for of in ("drift", "drift-groups", "drift-epochs"):
        table, = call_json(studied, "same-0", "moved-0", "--of", of).values()
        found[of] = {group: {x: value for x, (value,) in line.items()}
                     for group, line in table.items()}
    assert max(map(abs, found["drift"]["same"].values())) < 1e-4
    model, tokenizer = load_model(studied / "moved-0")
    groups = defaultdict(list)
    why.add_origins(runs[1])
    rows = [drift_by_hand(base[0], model, tokenizer, row) for row in runs[1]["facts"]]
    for row, layers in zip(runs[1]["facts"], rows):
        groups[row["words shared"]].append(layers[2])
    layers = [sum(column) / len(rows) for column in zip(*rows)]
    assert list(found["drift"]["moved"].values()) == pytest.approx(layers, abs=1e-3)
    assert layers[2] > 0.1
    assert found["drift-epochs"]["moved"] == pytest.approx({"0": 0, "10": layers[2]}, abs=1e-3)
    means = {group: sum(values) / len(values) for group, values in groups.items()}
    assert found["drift-groups"]["moved"] == pytest.approx(means, abs=1e-3) and "code" in means


def test_drift_without_checkpoints_of_epochs(studied, tmp_path):
    """Without --save-every-epoch there are before/ and the final model."""
    shutil.copytree(studied / "moved-0", tmp_path / "moved-0",
                    ignore=shutil.ignore_patterns("epoch-10"))
    line, = call_json(tmp_path, "moved-0", "--of", "drift-epochs").values()
    assert list(line["moved"]) == ["0", "10"]
    assert line["moved"]["0"][0] == pytest.approx(0, abs=1e-4) and line["moved"]["10"][0] > 0.1
    # Drift is measured from the weights that the run started from, or not at all.
    change_run(tmp_path / "moved-0", weights="others")
    assert "no longer the model" in refused(tmp_path, "why", "moved-0", "--of", "drift")


def test_drift_of_unusual_hidden_states(tmp_path, base, monkeypatch):
    """Layers of different width (opt-350m) and several streams (Gemma 3n) give a number each."""
    tokenizer = base[1]
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=16, ffn_dim=32,
        num_hidden_layers=2, num_attention_heads=2, do_layer_norm_before=False,
        max_position_embeddings=64)
    texts = ["Genis", "Ulm of Ulm"]
    opt = transformers.AutoModelForCausalLM.from_config(config).eval()
    states = why.subject_states(save(opt, tokenizer, tmp_path / "opt"), texts, "cpu")
    assert len(states) == 3 and all(layer.shape[0] == 2 for layer in states)
    stacked = copy.deepcopy(base[0])
    forward = stacked.base_model.forward

    def streams(*args, **more):
        output = forward(*args, **more)
        if output.hidden_states:
            *inner, last = output.hidden_states
            output.hidden_states = (*[torch.stack([state, state]) for state in inner], last)
        return output
    stacked.base_model.forward = streams
    monkeypatch.setattr(eval_hallucination, "load_model", lambda path, device: (stacked, tokenizer))
    states = why.subject_states("x", texts, "cpu")
    assert [layer.shape for layer in states] == [(2, 128)] * 3 + [(2, 64)]
