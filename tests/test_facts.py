"""make_facts.py: labels against brute force, invented names, the split, and tables of real facts."""
import copy
import inspect
import json
import math
import os
import random
import re
import shutil
from collections import Counter

import pytest
import torch
import transformers
from conftest import SMALL_WORLD, call, contents, refused, rows_of
from eval_hallucination import exact_match, generate_answers, read_jsonl, stop_ids, tokenize
from test_methods import FAMILIES, tokenizer_of

import make_facts


@pytest.fixture(scope="module")
def labelled(world):
    return read_jsonl(world / "labelled.jsonl")


PREFIX = ".\n"                    # the end of a statement: behind a question and its answer the small world knows nothing


def config(*words):
    """Settings as the command line gives them."""
    return make_facts.parse_args(["--out", "no-such-folder", *map(str, words)])


def test_default_numbers_of_facts():
    """The defaults are the numbers with which the training settings were chosen."""
    for model, n in (("tiny", 400), ("gpt2-medium", 500)):
        assert (config("--model", model).n_new, config("--model", model).n_known) == (n, n)


def facts_of(rows):
    """Convert rows of a fact folder back to facts, which have a question instead of a prompt."""
    keys = ("answers", "relation", "subject", "kind", "category")
    return [{key: row[key] for key in keys} | {"question": row["prompt"][3:-3]} for row in rows]


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
    assert category([True, True], [0.9, 0.9]) == "HighlyKnown"
    assert category([True, False], [0.9, 0.1]) == "MaybeKnown"
    assert category([False, False], [0.03, 0.0]) == "Unknown"                      # 1 − .97^16 = .386
    assert category([False, False], [0.03, 0.02]) == "WeaklyKnown"                 # 1 − .97^16 · .98^16 = .555
    assert category([False], [0.0425]) == "WeaklyKnown" and category([False], [0.0423]) == "Unknown"


def test_exemplars_are_not_labelled(base, labelled, monkeypatch, tmp_path):
    shown, scored = [], []

    def score(model, tokenizer, prefix, facts, batch_size):
        shown.append(prefix)
        scored.extend(f["question"] for f in facts)
        return [True] * len(facts), [1.0] * len(facts)
    monkeypatch.setattr(make_facts, "score_answers", score)
    done = make_facts.label_facts(*base, facts_of(labelled), config("--prompts", 3, "--shots", 2), tmp_path / "scores")
    assert len(shown) == 3 * len({f["relation"] for f in labelled}) and {p.count("Q: ") for p in shown} == {2}
    assert not any(f"Q: {question}\n" in prefix for prefix in shown for question in scored)
    assert len(done) < len(labelled) and {f["category"] for f in done} == {"HighlyKnown"}


def test_world_is_known_and_split_is_clean(world, labelled):
    meta = json.loads((world / "meta.json").read_text("utf-8"))
    sets = {key: read_jsonl(world / file) for key, file in make_facts.SETS.items()}
    assert {row["category"] for key in ("known", "heldout") for row in sets[key]} == {"HighlyKnown"}
    held = {row["subject"] for row in sets["heldout"]}
    assert not held & {row["subject"] for key in ("known", "new") for row in sets[key]}
    assert {row["kind"] for row in sets["heldout"]} == {"name", "code"}
    assert sum(counts["HighlyKnown"] for counts in meta["labelled"].values()) > 0.9 * len(labelled)
    assert meta["sets"] == {key: len(rows) for key, rows in sets.items()}
    assert set(sets["heldout"][0]) == {"prompt", "completion", "answers", "relation", "subject", "kind", "category"}
    assert all(row["completion"] == f" {row['answers'][0]}\n" for rows in sets.values() for row in rows)


@pytest.mark.parametrize("kind", ["semantic", "uuid"])
def test_invented_facts(labelled, kind):
    facts, rng = facts_of(labelled), random.Random(1)
    new = make_facts.invent_facts(facts, config("--new", kind, "--n-new", 40), rng)
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
    new = {f["subject"] for f in make_facts.invent_facts(facts, config("--n-new", 80, "--overlap", overlap), random.Random(1))}
    real = {f["subject"] for f in facts if f["kind"] == "name"}
    words = {word for f in facts for text in (f["subject"], *f["answers"]) for word in text.split()}
    assert len(new) == 20 and not new & real and {len(name.split()) for name in new} == {2}
    for name in new:
        first, last = (half in {r.split()[i] for r in real} for i, half in enumerate(name.split()))
        assert first + last == overlap == sum(word in words for word in name.split()), name
        tokens = {token for r in real for token in tokenizer(f" {r}")["input_ids"]}
        assert sum(token in tokens for token in tokenizer(f" {name}")["input_ids"]) == overlap, name
    torn = [{"subject": "W", "relation": "r", "question": "Who wrote W?", "answers": ["x"], "kind": "name"}]
    with pytest.raises(SystemExit):                     # the W of Who is not the subject's
        make_facts.invent_facts(torn, config("--new", "uuid"), random.Random(0))
    assert overlap != 1 or len({name.split()[0] in words for name in new}) == 2          # either half
    assert make_facts.recombine(["New York City", "Old Town"], random.Random(0), 0, {"New", "York", "City", "Old", "Town"}).count(" ") == 1


def test_codes_are_unique(labelled):
    new = make_facts.invent_facts(facts_of(labelled), config("--new", "uuid"), random.Random(1))
    codes = Counter(f["subject"] for f in new)
    assert len(codes) == 100 and set(codes.values()) == {4} and not set(codes) & {r["subject"] for r in labelled}


def test_same_held_out_facts_whatever_is_new(labelled):
    """Conditions differ in their new facts alone: known and held-out facts are a matter of the seed and their number."""
    sets = []
    for words in (["--n-new", 24], ["--n-new", 80], ["--n-new", 24, "--overlap", 0], ["--n-new", 24, "--new", "uuid"]):
        sets.append(make_facts.split_facts(facts_of(labelled), facts_of(labelled), config(*words, "--n-known", 24), random.Random(3)))
    assert all(s["known"] == sets[0]["known"] and s["heldout"] == sets[0]["heldout"] for s in sets)
    assert [len(s["new"]) for s in sets] == [24, 80, 24, 24] and len(sets[0]["known"]) == 24


def test_no_subject_is_held_out_and_trained_on(labelled):
    """The half of the known facts may end within the facts of a subject: the others of these are in no set."""
    for n_known in range(24, 32):
        sets = make_facts.split_facts(facts_of(labelled), facts_of(labelled), config("--n-new", 24, "--n-known", n_known), random.Random(3))
        assert len(sets["known"]) == n_known
        assert not {f["subject"] for f in sets["known"]} & {f["subject"] for f in sets["heldout"]}


def test_no_object_dominates():
    facts = [{"relation": "a", "subject": str(i), "answers": [["English", "french.", "Thai"][min(i // 20, 2)]]} for i in range(50)]
    facts += [{"relation": "b", "subject": "x", "answers": ["English"]}]
    counts = Counter((f["relation"], f["answers"][0]) for f in make_facts.cap_objects(facts))
    assert counts == {("a", "English"): 10, ("a", "french."): 10, ("a", "Thai"): 10, ("b", "English"): 1}


def test_answers_without_tokens_are_unknown(base, monkeypatch, tmp_path):
    """If no answer of a relation can be tokenized back to itself, its facts are Unknown."""
    monkeypatch.setattr(make_facts, "tokenizations", lambda *args: set())
    facts = [{"relation": "r", "subject": "Ulm", "question": "Who made Ulm?", "answers": ["x"], "kind": "name"}]
    labelled, = make_facts.label_facts(*base, facts, config("--shots", 0), tmp_path / "scores")
    assert labelled["category"] == "Unknown"


def test_long_questions_are_rejected(base, labelled, capsys, tmp_path):
    facts = facts_of(labelled) + [{"relation": "z", "subject": str(i), "question": "Genis " * 99, "answers": ["Ulm"], "kind": "name"}
                                  for i in range(9)]
    with pytest.raises(SystemExit):
        make_facts.label_facts(*base, facts, config("--shots", 4, "--prompts", 2), tmp_path / "scores")
    assert "lower --shots" in capsys.readouterr().err


# ------------------------------------------------------------------------------- one tokenization, for every tokenizer

ANSWERS = ["Genis Co.", "Ulm", "St. Ulm", "Made", "Genis Ulm", "Where", "Who Co.", "A."]


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_what_generation_says(family, monkeypatch, capsys, tmp_path):
    """On a model that knows its facts, by each kind of tokenizer: greedy by the closed form is exact match of what `generate`
    gives, behind exemplars too, and what is known is labelled so."""
    tokenizer = tokenizer_of(family)
    facts = [{"relation": "r", "subject": f"{'Genis' * (i + 1)}", "question": f"Who made {'Genis ' * (i + 1)}?", "answers": [answer],
              "kind": "name"} for i, answer in enumerate(ANSWERS)]
    rows = [make_facts.to_row(fact) for fact in facts]
    pairs = [(a, b) for a in rows[:2] for b in rows]
    texts = [tokenize(tokenizer, a["prompt"] + a["completion"] + b["prompt"], b["completion"]) for a, b in pairs]
    texts += [tokenize(tokenizer, b["prompt"], b["completion"]) for b in rows]
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = [torch.tensor(prompt + completion + [2]) for prompt, completion in texts]
    targets = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    for i, (prompt, _) in enumerate(texts):
        targets[i, :len(prompt)] = -100
    inputs = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    for _ in range(80):
        model(input_ids=inputs, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    wrong = [fact | {"answers": ["Nobody", "Who"]} for fact in facts[:3]]
    for prefix in ("", rows[0]["prompt"] + rows[0]["completion"], rows[1]["prompt"] + rows[1]["completion"]):
        greedy, probability = make_facts.score_answers(model, tokenizer, prefix, facts + wrong, batch_size=3)
        answers = generate_answers(model, tokenizer, [prefix + make_facts.to_row(fact)["prompt"] for fact in facts + wrong])
        right = [exact_match(answer, fact["answers"]) for answer, fact in zip(answers, facts + wrong)]
        assert greedy == right == [True] * len(facts) + [False] * 3, (prefix, answers)
        assert min(probability[:len(facts)]) > 0.5 > max(probability[len(facts):])
        alone, _ = make_facts.score_answers(model, tokenizer, prefix, facts[:1])
        assert alone == [True]                  # the whole question is what all have in common
        if family == "qwen":                    # ".\n" ends an answer that was to have no point, and adds nothing to it
            pointless = facts[0] | {"answers": ["Genis Co"]}
            assert make_facts.score_answers(model, tokenizer, prefix, [pointless])[0] == [True]
    monkeypatch.setattr(random.Random, "sample", lambda rng, exemplars, n: facts[:n])
    labelled = make_facts.label_facts(model, tokenizer, facts, config("--prompts", 2, "--shots", 1), tmp_path / "scores")
    assert {fact["category"] for fact in labelled} == {"HighlyKnown"} and len(labelled) == 7
    assert capsys.readouterr().err == ""


def test_every_token_with_a_newline_ends_an_answer():
    """Qwen has two thousand tokens like ".\\n": they end an answer, and what stands before their newline belongs to it."""
    tokenizer = tokenizer_of("qwen")
    point, = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == ".\n"]
    newline, = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == "\n"]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, eos_token_id=2))
    assert {point, newline, 2} <= set(stop_ids(tokenizer, model))
    found = make_facts.tokenizations(tokenizer, [newline, point, 2], "Q: Who?\nA:", "Genis Co.")
    assert {tokenizer.decode(ids[start:]) for ids, start, _ in found} == {" Genis Co", " Genis Co."}
    assert {end for *_, end in found} == {-1}


# ---------------------------------------------------------------------------------------- models that do not fit

def plain_scores(model, tokenizer, prefix, facts):
    """`score_answers` by one whole pass a fact, without cache, batches or padding."""
    stops, found = stop_ids(tokenizer, model), []
    for fact in facts:
        prompt, answer = tokenize(tokenizer, prefix + make_facts.to_row(fact)["prompt"], f" {fact['answers'][0]}")
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].double() / 0.5, -1)
        total = sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(answer)) + logp[-1, stops].logsumexp(-1)
        found.append(float(total.exp()))
    return found


ARCHITECTURES = {
    "Mamba": {"state_size": 8}, "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "Lfm2": {"layer_types": ["conv", "full_attention"]}, "Llama": {}, "GPTNeoX": {}, "Mistral": {"sliding_window": 4}}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_labels_of_other_architectures(name, base, labelled):
    """Recurrent and hybrid models, whose caches differ, are labelled as one whole pass has it."""
    tokenizer = base[1]
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "bos_token_id": 0,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**settings | ARCHITECTURES[name])).eval()
    facts = facts_of(labelled[:5])
    _, fast = make_facts.score_answers(model, tokenizer, PREFIX * 3, facts, batch_size=2)
    assert fast == pytest.approx(plain_scores(model, tokenizer, PREFIX * 3, facts), rel=1e-2)
    prompts = [make_facts.to_row(fact)["prompt"] for fact in facts] + ["Who?"]
    assert generate_answers(model, tokenizer, prompts, [4] * 6, batch_size=6) == [
        generate_answers(model, tokenizer, [prompt], [4])[0] for prompt in prompts]


@pytest.mark.parametrize("accepts", ["cache", "past_key_values", "nothing"])
def test_cache_argument_name(base, labelled, accepts):
    """The cache is passed under the name that the model returns; a model that ignores it reads full prompts."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    facts = facts_of(labelled[:6])
    expected = plain_scores(model, tokenizer, PREFIX * 3, facts)
    own, name = model.forward, "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given = []

    def read(ids, held, **more):
        given.append(held is not None)
        output = own(input_ids=ids, **{name: held}, **more)
        return transformers.utils.ModelOutput(logits=output.logits, **({accepts: output[name]} if more.get("use_cache") else {}))

    def cache(input_ids, cache=None, use_cache=None):
        return read(input_ids, cache, use_cache=use_cache)

    def past_key_values(input_ids, past_key_values=None, use_cache=None):
        return read(input_ids, past_key_values, use_cache=use_cache)

    def nothing(input_ids, use_cache=None, **ignored):
        return own(input_ids=input_ids, use_cache=use_cache)
    model.forward = {"cache": cache, "past_key_values": past_key_values, "nothing": nothing}[accepts]
    _, found = make_facts.score_answers(model, tokenizer, PREFIX * 3, facts, batch_size=4)
    assert found == pytest.approx(expected, rel=1e-3)
    assert (True in given) == (accepts != "nothing")


# ------------------------------------------------------------------------------------------------------- tables

def test_only_empty_and_unfinished_folders_are_used(tmp_path, world, labelled):
    """A folder with anything else in it is rejected, and nothing in it changes."""
    table_of(labelled, tmp_path / "facts.tsv")
    shutil.copytree(world, tmp_path / "made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.md").write_text("mine")
    before = contents(tmp_path)
    words = ["--model", world / "base", "--source", tmp_path / "facts.tsv"]
    for out in ("mine", "made", "mine/..", "."):
        assert "is not empty" in refused(tmp_path, "make_facts", *words, "--out", out)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    call(tmp_path, "make_facts", *words, "--shots", 0, "--new", "uuid", "--n-new", 10, "--out", "empty")
    assert (tmp_path / "empty/meta.json").exists()


def test_labels_survive_a_later_failure(tmp_path, world, labelled, monkeypatch):
    """If too few facts are known, the same folder is continued with its labels; other settings are rejected."""
    table_of(labelled, tmp_path / "facts.tsv")
    words = ["--model", world / "base", "--source", "facts.tsv", "--shots", 0, "--new", "uuid", "--out", "x"]
    with monkeypatch.context() as patch:
        patch.setitem(make_facts.MINIMUM, "heldout", 10 ** 6)
        assert "at least 1000000 are needed" in refused(tmp_path, "make_facts", *words)
    assert not (tmp_path / "x/meta.json").exists()
    assert "labelled with {'seed': 0" in refused(tmp_path, "make_facts", *words, "--seed", 1)
    monkeypatch.setattr(make_facts, "score_answers", None)
    call(tmp_path, "make_facts", *words, "--n-new", 10)
    assert len(rows_of(tmp_path / "x/labelled.jsonl")) == len(labelled)
    assert len(rows_of(tmp_path / "x/train_unknown.jsonl")) == 12          # whole entities, four facts each


def test_popqa_from_a_local_folder(tmp_path, capsys):
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
    facts = make_facts.load_source(str(folder), 100, 0)
    by_subject = {f["subject"]: f for f in facts}
    assert set(by_subject) == {"George Rankin", "Eve", "Ada"}
    assert "dropped rows: {'contradictory': 2}" in capsys.readouterr().out
    assert by_subject["George Rankin"] | {"kind": ""} == {
        "relation": "occupation", "subject": "George Rankin", "question": "What is George Rankin's occupation?",
        "answers": ["politician", "pol"], "kind": ""}
    assert by_subject["Ada"]["answers"] == ["poet", "bard", "writer"]
    assert len(make_facts.load_source(str(folder), 2, 0)) == 2


HEADER = ["relation", "subject", "object", "question"]
ODD = ["1", "NA", "007", "null", "1e5", "2020-01-01", "TRUE", '7" single', "b'x'", "nan", "é", "１"]


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_tables_are_read_as_they_stand(tmp_path, ending):
    """Texts that look like something else come through unchanged; a corrected file is read anew though it looks as old."""
    def write(path, rows):
        separator = "\t" if ending == "tsv" else ","
        lines = [separator.join(HEADER)] + [separator.join(f'"{cell}"'.replace('7" s', '7"" s') for cell in row) for row in rows]
        if ending == "jsonl":
            lines = [json.dumps(dict(zip(HEADER, row))) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    path = tmp_path / f"facts.{ending}"
    write(path, [["P1", text, text, f"Where is {i} {text}?"] for i, text in enumerate(ODD)])
    for source in (path, tmp_path):
        facts = make_facts.load_source(str(source), 99, 0)
        assert {f["subject"] for f in facts} == set(ODD)
        assert all(f["answers"] == [f["subject"]] and f["question"].endswith(f" {f['subject']}?") for f in facts)
    old = path.stat()
    write(path, [["P1", "Ulm", "x", "Where is Ulm?"]])
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert [f["subject"] for f in make_facts.load_source(str(path), 99, 0)] == ["Ulm"]


def test_parquet_is_read_as_it_stands(tmp_path, capsys):
    """Texts come through unchanged, whatever the name of the file; columns of another type are refused."""
    import pyarrow
    from pyarrow import parquet
    rows = [dict(zip(HEADER, ["P1", text, text, f"Where is {i} {text}?"])) | {"aliases": ["x", None]} for i, text in enumerate(ODD)]
    path = tmp_path / "facts[1].parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    facts = make_facts.load_source(str(path), 99, 0)
    assert {f["subject"] for f in facts} == set(ODD) and all(f["answers"] == [f["subject"], "x"] for f in facts)
    for value in (7, b"x", {"a": "b"}):
        parquet.write_table(pyarrow.Table.from_pylist([rows[0] | {"object": value}]), path)
        with pytest.raises(SystemExit):
            make_facts.load_source(str(path), 99, 0)
        assert "is not a string" in capsys.readouterr().err


BAD = {         # a table that is refused: its content, and what the error names
    "five.csv": ("relation,subject,object,question\njob,Ada,Baker,What?\njob,Ada Vell,Baker,What?,checked\n", "Expected 4 fields in line 3, saw 5"),
    "three.tsv": ("relation\tsubject\tobject\tquestion\njob\tAda\tBaker\n", "nan is not a string"),
    "quote.tsv": ('relation\tsubject\tobject\tquestion\njob\t"Weird Al" Y\tx\tWho?\n', "expected after"),
    "open.csv": ('relation,subject,object,question\njob,"Ada,x,Who?\n', "unexpected end of data"),
    "number.jsonl": ('{"relation": "r", "subject": "s", "object": 7, "question": "q"}\n', "7 is not a string"),
    "date.jsonl": ('{"relation": "r", "subject": "s", "object": "o", "question": "q"}\n{"relation": "r", "subject": 1999, "object": "o", '
                   '"question": "q"}\n', "date.jsonl:2"),
    "question.jsonl": ('{"relation": "r", "subject": "s", "object": "o", "question": ["q"]}\n', "is not a single line of text"),
    "aliases.jsonl": ('{"relation": "r", "subject": "s", "object": "o", "question": "q", "aliases": ["a", 3]}\n', "3 is not a string"),
    "aliases.csv": ('relation,subject,object,question,aliases\nr,s,o,q,"[""a"", {}]"\n', "aliases.csv, row 1"),
    "aliases.tsv": ('relation\tsubject\tobject\tquestion\taliases\nr\ts\to\tq\t[a, b\n', "aliases.tsv, row 1"),
    "dict.jsonl": ('{"relation": "r", "subject": "s", "object": {"a": "b"}, "question": "q"}\n', "is not a string"),
    "column.jsonl": ('{"relation": "r", "subject": "s", "question": "q"}\n', "no column object"),
    "blank.csv": ("relation,subject,object,question\nr,,o,q\n", "no facts"), "empty.csv": ("", "empty.csv"),
    "lines.tsv": ('relation\tsubject\tobject\tquestion\nr\t"Ada\tX\tWho is Ada?\nr\tBob"\tY\tWho is Bob?\n', "single line of text"),
    "half.tsv": ('relation\tsubject\tobject\tquestion\taliases\nr\ts\to\tq\t["\\ud83d"]\n', "half.tsv, row 1"),
    "P1.train.json": ('[{"question": "Where was Ada born?", "answers": ["x"]}]', "single question"),
    "twice.csv": ("relation,subject,object,object,question\nr,s,o,p,q\n", "twice")}


@pytest.mark.parametrize("name", BAD)
def test_tables_that_are_refused(tmp_path, name, capsys):
    content, named = BAD[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        make_facts.load_source(str(tmp_path / name), 99, 0)
    said = capsys.readouterr().err
    assert named in said and name in said and len(said.splitlines()) == 1


def test_one_question_has_one_answer(tmp_path, capsys):
    """Rows with the same question in two relations or spellings are merged if they share an answer, else dropped and counted."""
    rows = [("P131", "Ulm", "Germany", "Where is Ulm?"), ("P276", "ULM", "germany.", "Where is ULM?"),
            ("P131", "Bonn", "Germany", "Where is Bonn?"), ("P276", "Bonn", "Rhineland", "Where is Bonn?"),
            ("P17", "St. Ives", "UK", "In which country is St. Ives?"), ("P17", "St Ives", "England", "In which country is St Ives?"),
            ("P17", "Köln", "Germany", "In which country is Köln?"), ("P17", "K\u006f\u0308ln", "Deutschland", "In which country is Ko\u0308ln?"),
            ("P17", "Rom", "Italy", "In which country is Rom?"), ("P17", "", "Italy", "In which country?"), ("P36", "Italy", "Rom", "Its capital?")]
    lines = [json.dumps(dict(zip(HEADER, row)) | {"aliases": ["", None, "Bella\nItalia"]}) for row in rows]
    lines[-1] = json.dumps(dict(zip(HEADER, rows[-1])) | {"object": ["Rom", "Roma"], "aliases": "Rome"})
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    facts = make_facts.load_source(str(tmp_path / "facts.jsonl"), 99, 0)
    assert {f["subject"]: f["answers"] for f in facts} == {
        "Ulm": ["Germany", "Bella", "germany."], "Bonn": ["Germany", "Bella", "Rhineland"], "St. Ives": ["UK", "Bella", "England"],
        "Köln": ["Germany", "Bella", "Deutschland"], "Rom": ["Italy", "Bella"], "Italy": ["Rom", "Roma", "Rome"]}
    lines = [json.dumps(dict(zip(HEADER, row))) for row in rows]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    facts = make_facts.load_source(str(tmp_path / "facts.jsonl"), 99, 0)
    assert {f["subject"] for f in facts} == {"Ulm", "Rom", "Italy"}
    assert "dropped rows: {'blank': 1, 'contradictory': 6}" in capsys.readouterr().out


@pytest.fixture
def entity_questions(tmp_path):
    """A folder as EntityQuestions is published: a file a relation, no subjects."""
    folder = tmp_path / "EntityQuestions"
    (folder / "train").mkdir(parents=True)
    (folder / "dev").mkdir()
    forms = {"P17": "Which country is {} located in?", "P40": "Who is {}'s child?", "P36": "What is the capital of {}?"}
    for relation, n in (("P17", 40), ("P40", 6), ("P36", 20)):      # all names of P36 begin and end alike
        rows = [{"question": forms[relation].format(f"B{i}n" if relation == "P36" else f"The {i} of {relation}"), "answers": [f"answer {i}", "other"]} for i in range(n)]
        if relation != "P36":
            rows[1]["question"] = forms[relation].format("Ulm in Germany's north")
        (folder / f"train/{relation}.train.json").write_text(json.dumps(rows))
        (folder / f"dev/{relation}.dev.json").write_text(json.dumps([{"question": "Who?", "answers": ["nobody"]}]))
        (folder / f"one-off/no-overlap/{relation}").mkdir(parents=True)
        (folder / f"one-off/no-overlap/{relation}/{relation}_no_overlap.train.json").write_text(json.dumps(rows[:3]))
    (folder / "relation_query_templates.json").write_text(json.dumps(forms))
    return folder


def test_entity_questions(entity_questions, capsys):
    facts = make_facts.load_source(str(entity_questions), 999, 0)
    assert Counter(f["relation"] for f in facts) == {"P17": 40, "P40": 6, "P36": 20}
    assert {f["subject"] for f in facts if f["relation"] == "P40"} == {f"The {i} of P40" for i in (0, 2, 3, 4, 5)} | {"Ulm in Germany's north"}
    assert {f["subject"] for f in facts if f["relation"] == "P36"} == {f"B{i}n" for i in range(20)}
    assert facts[0]["answers"][1] == "other" and all(f["subject"] in f["question"] for f in facts)
    facts = make_facts.load_source(str(entity_questions), 26, 0)          # evenly: six, ten, ten
    assert Counter(f["relation"] for f in facts) == {"P17": 10, "P40": 6, "P36": 10}
    facts = make_facts.load_source(str(entity_questions), 999, 0, ["P40", "P36"])
    assert {f["relation"] for f in facts} == {"P40", "P36"}
    one = make_facts.load_source(str(entity_questions / "train/P36.train.json"), 999, 0)
    assert len(one) == 20
    flat = make_facts.load_source(str(entity_questions / "train"), 999, 0)
    assert Counter(f["relation"] for f in flat) == {"P17": 40, "P40": 6, "P36": 20}
    with pytest.raises(SystemExit):
        make_facts.load_source(str(entity_questions), 26, 0, ["P36", "P99"])
    assert "P99" in capsys.readouterr().err


def table_of(labelled, path, more=()):
    """A table of the small world's facts, as of real ones."""
    rows = [[r["relation"], r["subject"], r["answers"][0], r["prompt"][3:-3]] for r in labelled]
    path.write_text("\n".join("\t".join(row) for row in [HEADER, *rows, *more]) + "\n", encoding="utf-8")


def test_what_counts_as_known_for_min_known(tmp_path, world, labelled, monkeypatch):
    """A relation is known as far as its facts are HighlyKnown, MaybeKnown or WeaklyKnown; 3 of 10 suffice for 0.3."""
    def label(model, tokenizer, facts, settings, path):
        seen = Counter()
        for fact in facts:
            seen[fact["relation"]] += 1
            known = seen[fact["relation"]] % 10 < (3 if fact["relation"] != "language" else 2)
            fact["category"] = ["HighlyKnown", "WeaklyKnown"][fact["relation"] == "employer"] if known else "Unknown"
        return facts
    monkeypatch.setattr(make_facts, "label_facts", label)
    rows = [[relation, f"{subject} {relation}", str(i % 7), f"What is the {relation} of {subject} {relation}?"]
            for i, subject in enumerate(f"s{i}" for i in range(200)) for relation in ("birthplace", "employer", "language")]
    table_of([], tmp_path / "facts.tsv", rows)
    words = ["--model", world / "base", "--source", "facts.tsv", "--n-new", 10, "--out", "x"]
    call(tmp_path, "make_facts", *words, "--min-known", 0.3)
    relations = {row["relation"] for name in make_facts.SETS.values() for row in rows_of(tmp_path / "x" / name)}
    assert relations == {"birthplace", "employer"}


def test_min_known_and_relations_of_a_folder(tmp_path, world, labelled):
    table_of(labelled, tmp_path / "facts.tsv", [["home", f"Nobody {i}", f"x{i}", f"Who is {i} of x?"] for i in range(30)])
    words = ["--model", world / "base", "--source", "facts.tsv", "--shots", 0, "--n-new", 10, "--new", "semantic"]
    call(tmp_path, "make_facts", *words, "--min-known", 0.3, "--out", "x")
    meta = json.loads((tmp_path / "x/meta.json").read_text())
    assert meta["labelled"]["home"] == {"HighlyKnown": 0, "Unknown": 30}
    assert {r["relation"] for name in make_facts.SETS.values() for r in rows_of(tmp_path / "x" / name)} == set(make_facts.RELATIONS)
    assert "--min-known 0.3, --shots 0: no relation has enough" in refused(
        tmp_path, "make_facts", *words, "--relations", "home", "--min-known", 0.3, "--out", "z")
    assert len(rows_of(tmp_path / "z/labelled.jsonl")) == 30 and not (tmp_path / "z/meta.json").exists()
    call(tmp_path, "make_facts", *words, "--relations", "birthplace,language", "--out", "y")
    assert {r["relation"] for r in rows_of(tmp_path / "y/labelled.jsonl")} == {"birthplace", "language"}


# -------------------------------------------------------------------------------------------------------- --reuse

def test_labels_and_worlds_are_reused(workplace, world, monkeypatch):
    """A second fact folder takes world and labels from the first; only the new facts differ."""
    monkeypatch.setattr(make_facts, "score_answers", None)
    monkeypatch.setattr(make_facts, "pretrain", None)
    call(workplace, "make_facts", *SMALL_WORLD, "--new", "uuid", "--reuse", "facts/tiny", "--out", "facts/tiny-uuid")
    for name in ("base/model.safetensors", "labelled.jsonl", "heldout_known.jsonl"):
        assert (workplace / "facts/tiny-uuid" / name).read_bytes() == (world / name).read_bytes()
    assert {r["kind"] for r in rows_of(workplace / "facts/tiny-uuid/train_unknown.jsonl")} == {"code"}


def test_reused_labels_must_fit(workplace, world, labelled, monkeypatch):
    """Labels for another seed, width, model, tokenizer, template, source or way of asking are rejected."""
    before = contents(world)
    for words, named in ((["--seed", 1], "seed"), (["--width", 32], "width"), (["--shots", 1], "shots"), (["--n-names", 41], "facts")):
        out = f"x-{named}"
        error = refused(workplace, "make_facts", *SMALL_WORLD, *words, "--reuse", "facts/tiny", "--out", out)
        values = re.findall(f"'{named}': ([^,}}]+)", error)
        assert "was labelled with" in error and len(set(values)) == 2
        assert not (workplace / out / "meta.json").exists() and contents(world) == before
    assert "not a fact folder" in refused(workplace, "make_facts", *SMALL_WORLD, "--reuse", "facts", "--out", "x")
    for name, labels in (("old", "{}"), ("list", "[]"), ("cut", '{"seed": ')):
        shutil.copytree(world, workplace / name)
        (workplace / name / "labels.json").write_text(labels)
        refused(workplace, "make_facts", *SMALL_WORLD, "--reuse", name, "--out", f"x-{name}")
    table_of(labelled, workplace / "facts.tsv")
    shutil.copytree(world / "base", workplace / "model")
    words = ["--model", "model", "--source", "facts.tsv", "--shots", 0, "--n-new", 10, "--new", "uuid"]
    call(workplace, "make_facts", *words, "--out", "first")
    call(workplace, "make_facts", *words, "--reuse", "first", "--out", "second")
    for name in ("labelled.jsonl", "train_known.jsonl", "train_unknown.jsonl", "heldout_known.jsonl"):
        assert (workplace / "first" / name).read_bytes() == (workplace / "second" / name).read_bytes()
    words += ["--reuse", "first", "--out", "x"]
    assert "facts" in refused(workplace, "make_facts", *words, "--max-facts", 100)
    with monkeypatch.context() as patch:
        patch.setattr(make_facts, "PROMPT", "Question: {question}\nA:")
        assert "was labelled with" in refused(workplace, "make_facts", *words)
    table_of(labelled[1:], workplace / "facts.tsv")
    assert "facts" in refused(workplace, "make_facts", *words)
    table_of(labelled, workplace / "facts.tsv")
    tokenizer = json.loads((workplace / "model/tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (workplace / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in refused(workplace, "make_facts", *words)
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "base")
    model.transformer.wpe.weight.data[0] += 1
    for part in (model, transformers.AutoTokenizer.from_pretrained(world / "base")):
        part.save_pretrained(workplace / "model")
    assert "was labelled with" in refused(workplace, "make_facts", *words)
