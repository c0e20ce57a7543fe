"""make_facts.py: labels against brute force, invented names, the split, and tables of real facts."""
import json
import math
import random
from collections import Counter

import pytest
import torch
from eval_hallucination import exact_match, generate_answers, read_jsonl, stop_ids, tokenize

import make_facts


@pytest.fixture(scope="module")
def labelled(world):
    return read_jsonl(world / "labelled.jsonl")


PREFIX = ".\n"                    # the end of a statement: behind a question and its answer the small world knows nothing


def facts_of(rows):
    """Facts as the labelling takes them: with a question."""
    return [row | {"question": row["prompt"][3:-3]} for row in rows]


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_greedy_equals_generate(base, labelled, prefix):
    """Closed-form (a): right if and only if greedy `generate` gives an accepted answer to the letter."""
    model, tokenizer = base
    facts = facts_of(labelled[:60])
    for fact in facts[::3]:                            # a third with a wrong answer, some with an alias
        fact["answers"] = ["Nobody", *fact["answers"][:len(fact["subject"]) % 2]]
    greedy, _ = make_facts.score_answers(model, tokenizer, prefix, facts, batch_size=7)
    answers = generate_answers(model, tokenizer, [prefix + make_facts.to_row(f)["prompt"] for f in facts], batch_size=7)
    assert greedy == [a in f["answers"] for a, f in zip(answers, facts)]
    assert False in greedy and True in greedy


def test_probability_equals_sampling(base, labelled):
    """Closed-form (b) against the share of right answers among many samples, within four standard errors."""
    model, tokenizer = base
    facts = facts_of([r for r in labelled if r["kind"] == "code"][:4])
    facts = [f | {"question": f["question"].replace(f["subject"], f["subject"][:2] + "7E"), "answers": f["answers"]} for f in facts]
    stops, n = stop_ids(tokenizer, model), 4000
    for fact in facts:
        ids = torch.tensor([tokenize(tokenizer, make_facts.to_row(fact)["prompt"])[0]])
        probabilities = torch.softmax(model(ids).logits[0, -1].float() / 0.5, -1)
        likely = tokenizer.decode(probabilities.argsort()[-2]).strip()                # neither certain nor impossible
        fact["answers"] = [likely, "Nobody"]
        _, (p,) = make_facts.score_answers(model, tokenizer, "", [fact])
        torch.manual_seed(0)
        out = model.generate(ids.expand(n, -1), do_sample=True, temperature=0.5, top_k=0, top_p=1.0, max_new_tokens=6,
                             eos_token_id=stops, pad_token_id=stops[0], attention_mask=torch.ones_like(ids).expand(n, -1))
        answers = [tokenizer.decode(o[ids.shape[1]:]).split("\n")[0].split("<|")[0] for o in out]
        share = sum(exact_match(a, fact["answers"]) for a in answers) / n
        assert abs(share - p) <= 4 * math.sqrt(max(p * (1 - p), 1e-4) / n)


def test_prefix_cache_and_batching_change_nothing(base, labelled):
    """Scores behind a few-shot prefix equal one plain forward pass over prefix + prompt + answer, row by row."""
    model, tokenizer = base
    facts = facts_of(labelled[:12])
    _, fast = make_facts.score_answers(model, tokenizer, PREFIX, facts, batch_size=5)
    stops = stop_ids(tokenizer, model)
    for fact, p in zip(facts, fast):
        prompt = tokenizer(PREFIX + make_facts.to_row(fact)["prompt"])["input_ids"]
        answer = tokenizer(" " + fact["answers"][0])["input_ids"]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].double() / 0.5, -1)
        total = sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(answer)) + logp[-1, stops].logsumexp(-1)
        assert p == pytest.approx(float(total.exp()), rel=1e-3, abs=1e-9)


def test_slick_categories():
    category = make_facts.slick_category
    assert category([True, True], [0.9, 0.9], 16) == "HighlyKnown"
    assert category([True, False], [0.9, 0.1], 16) == "MaybeKnown"
    assert category([False, False], [0.03, 0.0], 16) == "Unknown"                      # 1 − .97^16 = .386
    assert category([False, False], [0.03, 0.02], 16) == "WeaklyKnown"                 # 1 − .97^16 · .98^16 = .555
    assert category([False], [0.0425], 16) == "WeaklyKnown" and category([False], [0.0423], 16) == "Unknown"
    assert category([False], [1.0], 1) == "WeaklyKnown"


def test_exemplars_are_not_labelled(base, labelled, monkeypatch):
    shown, scored = [], []

    def score(model, tokenizer, prefix, facts, *more, **options):
        shown.append(prefix)
        scored.extend(f["question"] for f in facts)
        return [True] * len(facts), [1.0] * len(facts)
    monkeypatch.setattr(make_facts, "score_answers", score)
    done = make_facts.label_facts(*base, facts_of(labelled), prompts=3, shots=2, samples=16, seed=0, batch_size=8)
    assert len(shown) == 3 * len({f["relation"] for f in labelled}) and {p.count("Q: ") for p in shown} == {2}
    assert not any(f"Q: {question}\n" in prefix for prefix in shown for question in scored)
    assert len(done) < len(labelled) and {f["category"] for f in done} == {"HighlyKnown"}


def test_world_is_known_and_split_is_clean(world, labelled):
    meta = json.loads((world / "meta.json").read_text("utf-8"))
    sets = {key: read_jsonl(world / file) for key, file in make_facts.SETS.items()}
    assert {row["category"] for key in ("known", "heldout") for row in sets[key]} == {"HighlyKnown"}
    held = {row["subject"] for row in sets["heldout"]}
    assert not held & {row["subject"] for key in ("known", "unknown") for row in sets[key]}
    assert {row["kind"] for row in sets["heldout"]} == {"name", "code"}
    assert meta["labelled"]["HighlyKnown"] > 0.9 * len(labelled)
    assert set(sets["heldout"][0]) == {"prompt", "completion", "answers", "relation", "subject", "kind", "category"}
    assert all(row["completion"] == f" {row['answers'][0]}\n" for rows in sets.values() for row in rows)


@pytest.mark.parametrize("kind", ["semantic", "uuid"])
def test_invented_facts(labelled, kind):
    facts, rng = facts_of(labelled), random.Random(1)
    new = make_facts.invent_facts(facts, kind, 40, rng, make_facts.invent_code)
    real = {f["subject"] for f in facts}
    assert len(new) == 40 and len({(f["subject"], f["relation"]) for f in new}) == 40
    assert not real & {f["subject"] for f in new}
    objects = {(f["relation"], f["answers"][0]) for f in facts}
    assert all((f["relation"], f["answers"][0]) in objects and f["subject"] in f["question"] for f in new)
    if kind == "semantic":
        parts = {part for name in real for part in name.split()}
        assert all(part in parts for f in new for part in f["subject"].split()) and {f["kind"] for f in new} == {"name"}
    else:
        assert {f["kind"] for f in new} == {"code"} and all(len(f["subject"]) == 4 for f in new)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_overlap_of_invented_names(base, labelled, overlap):
    """So many halves of a new name are halves of real ones, and so many of its tokens; the others nobody in the world is called."""
    facts, tokenizer = facts_of(labelled), base[1]
    new = {f["subject"] for f in make_facts.invent_facts(facts, "semantic", 80, random.Random(1), make_facts.invent_code, overlap)}
    real = {f["subject"] for f in facts if f["kind"] == "name"}
    words = {word for f in facts for text in (f["subject"], *f["answers"]) for word in text.split()}
    assert len(new) == 20 and not new & real and {len(name.split()) for name in new} == {2}
    for name in new:
        first, last = (half in {r.split()[i] for r in real} for i, half in enumerate(name.split()))
        assert first + last == overlap == sum(word in words for word in name.split()), name
        tokens = {token for r in real for token in tokenizer(f" {r}")["input_ids"]}
        assert sum(token in tokens for token in tokenizer(f" {name}")["input_ids"]) == overlap, name
    assert overlap != 1 or len({name.split()[0] in words for name in new}) == 2          # either half
    assert make_facts.recombine(["New York City", "Old Town"], random.Random(0), 0, {"New", "York", "City", "Old", "Town"}).count(" ") == 1


def test_codes_are_unique(labelled):
    new = make_facts.invent_facts(facts_of(labelled), "uuid", 400, random.Random(1), make_facts.invent_code)
    codes = Counter(f["subject"] for f in new)
    assert len(codes) == 100 and set(codes.values()) == {4} and not set(codes) & {r["subject"] for r in labelled}


def test_same_held_out_facts_whatever_is_new(labelled):
    """Conditions differ in their new facts alone: known and held-out facts are a matter of the seed and their number."""
    split = lambda new, n_new, overlap: make_facts.split_facts(
        facts_of(labelled), labelled, new, n_new, 24, random.Random(3), make_facts.invent_code, overlap)
    sets = [split("semantic", 24, 2), split("semantic", 80, 2), split("semantic", 24, 0), split("uuid", 24, 2)]
    assert all(s["known"] == sets[0]["known"] and s["heldout"] == sets[0]["heldout"] for s in sets)
    assert [len(s["unknown"]) for s in sets] == [24, 80, 24, 24] and len(sets[0]["known"]) == 24


def test_no_object_dominates():
    facts = [{"relation": "a", "subject": str(i), "answers": [["English", "French", "Thai", "Zulu", "Czech", "Greek"][min(i // 9, 5)]]}
             for i in range(120)]
    kept = make_facts.cap_objects(facts)
    counts = Counter(f["answers"][0] for f in kept)
    assert max(counts.values()) / len(kept) <= 0.2 and counts["English"] == 9
    assert make_facts.cap_objects([f | {"answers": ["English"]} for f in facts]) == []
    assert make_facts.cap_objects(facts[:45]) == facts[:45]


def test_popqa_from_a_local_folder(tmp_path):
    """PopQA's own layout: test.tsv with its columns, the aliases a JSON list in a string."""
    folder = tmp_path / "akariasai" / "PopQA"
    folder.mkdir(parents=True)
    lines = ["id\tsubj\tprop\tobj\tsubj_id\ts_pop\tquestion\tpossible_answers",
             '1\tGeorge Rankin\toccupation\tpolitician\t22\t142\tWhat is George Rankin\'s occupation?\t"[""politician"", ""pol""]"',
             '2\tEve\toccupation\tactor\t23\t142\tWhat is Eve\'s occupation?\t"[""actor"", ""actress""]"',
             '3\tAda\toccupation\tpoet\t24\t1\tWhat is Ada\'s occupation?\t"[""poet"", ""bard""]"',
             '4\tAda\toccupation\twriter\t24\t1\tWhat is Ada\'s occupation?\t"[""writer"", ""poet""]"',
             '5\tBob\toccupation\tpoet\t25\t1\tWhat is Bob\'s occupation?\t"[""poet""]"',
             '6\tBob\toccupation\tbaker\t25\t1\tWhat is Bob\'s occupation?\t"[""baker""]"']
    (folder / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts, dropped = make_facts.load_source(str(folder), 100, 0)
    by_subject = {f["subject"]: f for f in facts}
    assert set(by_subject) == {"George Rankin", "Eve", "Ada"} and dropped == 1
    assert by_subject["George Rankin"] | {"kind": ""} == {
        "relation": "occupation", "subject": "George Rankin", "question": "What is George Rankin's occupation?",
        "answers": ["politician", "pol"], "kind": ""}
    assert by_subject["Ada"]["answers"] == ["poet", "bard", "writer"]
    assert len(make_facts.load_source(str(folder), 2, 0)[0]) == 2


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_local_tables(tmp_path, ending):
    import datasets
    rows = [{"relation": "P1", "subject": s, "object": o, "question": f"Where is {s}?"} for s, o in (("Ulm", "1"), ("Köln", "NA"))]
    path, table = tmp_path / f"facts.{ending}", datasets.Dataset.from_list(rows)
    {"tsv": lambda: table.to_csv(path, sep="\t"), "csv": lambda: table.to_csv(path), "jsonl": lambda: table.to_json(path),
     "parquet": lambda: table.to_parquet(path)}[ending]()
    facts, dropped = make_facts.load_source(str(path), 10, 0)
    assert {(f["subject"], *f["answers"]) for f in facts} == {("Ulm", "1"), ("Köln", "NA")} and dropped == 0
