"""Measure SFT-induced hallucination: what a fine-tuned model still knows, what it learnt, what it forgot.

Score one model on the three fact sets of a folder that make_facts.py wrote:
    python eval_hallucination.py --model runs/selfdistill-tiny-0 --facts facts/tiny
Compare runs of the sft_*.py scripts from the files that they left and their facts (no model is loaded):
    python eval_hallucination.py runs/baseline-tiny-0 runs/selfdistill-tiny-0 --show 5 --plot accuracy.png
Why did they forget? Forgetting by kind or name of the held-out facts, by number of new ones; drift of representations:
    python eval_hallucination.py runs/semantic-[0-2] runs/uuid-[0-2] --of kind --plot kinds.png
Put one question to the model that they started from and to theirs:
    python eval_hallucination.py runs/baseline-tiny-0 runs/selfdistill-tiny-0 --ask "What is the capital of France?"

Terms (Kaplan et al. 2026, arXiv:2604.15574): *factual plasticity* is accuracy on the Unknown facts that are
trained on, *factual stability* accuracy on held-out HighlyKnown facts that are never trained on, *forgetting* the
drop of the latter, here in points from the model before stage 2 to the model after.
"""
import argparse
import functools
import hashlib
import json
import logging
import math
import os
import re
import statistics
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

ORIGINS = ["that of a new fact, name shared", "that of another new fact", "another of the relation", "none of these"]
LEARNT = [0.25, 0.5, 0.95]                     # shares of the new facts at which the forgetting of runs is compared
GROUPS = ["relation", "kind", "words shared"]  # of held-out facts; the last: how many words of the name are in a new one
AXES = {                                       # what --of draws: x and y
    "number": ("new facts trained on", "forgetting in points"), "width": ("width of the model", "forgetting in points"),
    "kind": ("kind of held-out facts", "forgetting in points"),
    "overlap": ("words that a held-out name shares with new ones", "forgetting in points"),
    "overlap-answers": ("words that a held-out name shares with new ones", "hallucinations answered as a new fact that shares one, %"),
    "drift": ("layer, 0 = embeddings", "drift: 1 − cosine, in %"),
    "drift-groups": ("group of held-out subjects", "drift at half depth, in %"),
    "drift-epochs": ("epoch of stage 2", "drift at half depth, in %")}
# With --resume a run may go on with other values of these settings.
MAY_CHANGE = ["model", "facts", "train", "known", "heldout", "out", "overwrite", "resume", "device",
              "eval_every", "save_every_epoch", "batch_size", "accumulate"]
SETS = {"unknown": "train_unknown.jsonl", "known": "train_known.jsonl", "heldout": "heldout_known.jsonl"}


def fail(message):
    """End the program with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------- answers and scores

def normalize(text):
    """The form in which answers are compared: the exact match of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

    First line only, Unicode NFKC, lower case, no ASCII punctuation, no English article, single spaces."""
    text = unicodedata.normalize("NFKC", text).strip().split("\n")[0].lower()
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer, accepted):
    """True if `answer` (str) equals any of `accepted` (list of str) after `normalize`.

    An accepted answer of which the normalisation leaves nothing ("A", "?") is compared as it stands."""
    return any(normalize(answer) == normalize(a) if normalize(a) else answer.strip() == a.strip() for a in accepted)


@functools.lru_cache(maxsize=4)
def newline_ids(tokenizer):
    """Ids of the tokens whose text begins with a newline (tuple of int). Decodes the whole vocabulary, so it is kept."""
    return tuple(i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith("\n"))


def stop_ids(tokenizer, model=None):
    """Ids of every token that ends an answer: those whose text begins with a newline, and EOS. Sorted list of int."""
    ids = set(newline_ids(tokenizer))
    declared = model.generation_config.eos_token_id if model is not None else None
    ids.update([tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])])
    return sorted(ids - {None})


def tokenize(tokenizer, prompt, completion=""):
    """Token ids of one text, (prompt, completion): those of the prompt, then the rest.

    Both are encoded together, as one text: encoded alone, a completion would get a second ▁ from
    tokenizers that put one before every text (Llama 2, Mistral). If the tokens of the prompt are
    no prefix of those of the whole text, the completion is encoded alone after all. BOS comes
    first if the tokenizer adds it; an EOS that it puts behind every text is removed, since it
    would end the prompt.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = bos is None or not prompt.startswith(bos)     # a chat template may begin with BOS
    encoded = []
    for text in (prompt, prompt + completion):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(eos):
            ids = ids[:-1]
        encoded.append(ids)
    before, whole = encoded
    if whole[:len(before)] == before:
        return before, whole[len(before):]
    return before, tokenizer(completion, add_special_tokens=False)["input_ids"]


def generate_answers(model, tokenizer, prompts, max_new_tokens=16, batch_size=64):
    """Greedy answers to `prompts` (list of str): list of str, each cut at its stop token.

    Batches are padded on the left; `generate` derives the positions from the attention mask, so that padding does
    not shift them. Longest prompts first: running out of memory shows at once."""
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    stops = stop_ids(tokenizer, model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]   # masked: any id serves
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad)
    # The checkpoint's own settings may sample, penalise repetition or cap the length, and generate() lets them fill what
    # its argument leaves open: so the model gets these for the time being.
    own, model.generation_config = model.generation_config, greedy
    room = (getattr(model.config, "max_position_embeddings", None) or 10 ** 9) - max_new_tokens
    encoded = [tokenize(tokenizer, p)[0][-room:] for p in prompts]       # a prompt beyond the context loses its start
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc="answering", unit="fact", leave=False, disable=None)
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            width = max(len(encoded[i]) for i in rows)
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in rows])
            out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            for i, tokens in zip(rows, out[:, width:].tolist()):
                end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens))
                answers[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
            bar.update(len(rows))
    finally:
        model.generation_config = own
        bar.close()
    return answers


def accepted_answers(row):
    """The answers that count as right for a row (list of str): its `answers`, a list or one, or else its completion."""
    answers = row.get("answers") or row["completion"].strip()
    return [str(a) for a in answers] if isinstance(answers, list) else [str(answers)]


def evaluate(model, tokenizer, rows, batch_size=64):
    """Score `model` on `rows` (dicts with `prompt` and `answers` or `completion`) by greedy decoding and exact match.

    Returns {"accuracy": float in 0..1 (nan without rows), "answers": list of str, "right": list of bool}.
    `model` answers with whatever precision the caller's autocast sets; it should be in eval mode."""
    if not rows:
        return {"accuracy": math.nan, "answers": [], "right": []}
    longest = max(len(tokenizer(" " + a)["input_ids"]) for row in rows for a in accepted_answers(row))
    answers = generate_answers(model, tokenizer, [r["prompt"] for r in rows], longest + 2, batch_size)
    right = [exact_match(a, accepted_answers(r)) for a, r in zip(answers, rows)]
    return {"accuracy": sum(right) / len(right), "answers": answers, "right": right}


# --------------------------------------------------------------------- what the sft_*.py scripts call

def weights_hash(model):
    """Hash of a model's parameters, whatever folder or hub they came from (str)."""
    sha = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(weights.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def check_run(model, name, files, sets, run):
    """Refuse data with which a run would measure something else than it says.

    model: what training starts from, of the path or hub name `name`; files: {set: path or None};
    sets: {set: list of {"row": dict, …}}; run: {"method", "config"}, as in the sft_*.py scripts.
    Refused are fact folders made for other weights, rows whose answers, subject or relation are
    no text, held-out facts that are trained on, and --resume of a run that began otherwise.
    Returns what run.json says of weights, data and libraries.
    """
    import torch
    import transformers
    weights = weights_hash(model)
    data = {}
    for key, path in files.items():
        if path is not None:
            check_weights(Path(path).parent, weights, name)
            data[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    check_rows(files, sets)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    more = {"weights": weights, "data": data, "versions": versions}
    begun = Path(run["config"]["out"]) / "unfinished.json"
    if run["config"]["resume"] and begun.exists() and begun.with_name("state.pt").exists():
        check_resumed(begun, run | more)
    return more


def check_rows(files, sets):
    """Refuse rows with which accuracy would be measured wrongly; see `check_run`."""
    trained = set()
    for key in ("unknown", "known", "heldout"):
        if files[key] is not None and not sets[key]:
            fail(f"{files[key]}: empty; wanted: one object with prompt and completion a line")
        for example in sets[key]:
            row = example["row"]
            place = f"{files[key]}: the row of the prompt {row['prompt'][:60]!r}"
            check_texts(row, place)
            prompt, subject = ("prompt", row["prompt"]), ("subject", row.get("subject"))
            if key != "heldout":
                trained.update([prompt, subject])
            elif prompt in trained:
                fail(f"{place} is held out and trained on; take it out of one of the files")
            elif subject[1] and subject in trained:
                fail(f"{place} is held out, but {subject[1]!r} is trained on; take it out")


def check_resumed(path, run):
    """Refuse to go on with a run as `run` (dict) that began as the file `path` says."""
    begun = read_jsonl(path, ["method", "config"])[0]
    new = must_match(run)
    old = must_match(begun)
    changed = [key for key in sorted(new.keys() | old.keys()) if new.get(key) != old.get(key)]
    if changed:
        values = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed]
        fail(f"--resume: not as in {path}: {'; '.join(values)}; --overwrite starts anew")


def must_match(run):
    """What a resumed run must have in common with its beginning, of the dict of run.json."""
    same = {key: run.get(key) for key in ("method", "weights", "data")} | run["config"]
    same["rows a step"] = same["batch_size"] * same["accumulate"]
    for name in MAY_CHANGE:
        same.pop(name, None)
    return same


def check_weights(folder, weights, name):
    """Refuse the fact folder `folder`, if it is one, unless it was made for these weights (hash)."""
    if not (folder / "meta.json").is_file():
        return
    labelled = json.loads((folder / "meta.json").read_text("utf-8")).get("weights")
    if labelled == weights:
        return
    for earlier in (Path(name), Path(name).parent):     # a run's folder, or before/ and epoch-N/ in it
        run = earlier / "run.json"
        if run.is_file() and json.loads(run.read_text("utf-8")).get("weights") == labelled:
            print(f"note: {folder} says what the model knew from which {name} was trained")
            return
    fail(f"--model {name}: {folder} was made for other weights; make a fact folder for these, with "
         "make_facts.py --model, and name it with --facts")


def check_texts(row, place):
    """Refuse a row whose answers, subject or relation are not texts, or cannot be written."""
    answers = row.get("answers")
    texts = [row.get("subject"), row.get("relation"), *(answers if isinstance(answers, list) else [answers])]
    for text in texts:
        if text is not None and not isinstance(text, str):
            fail(f"{place}: {text!r} is no text, as answers, subject and relation must be")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        fail(f"{place}: {error}; it holds half of a character")


def evaluate_sets(model, tokenizer, sets, batch_size, metrics):
    """{set: result of `evaluate`} of the sets that have rows; their accuracies go into `metrics`.

    sets: {set: list of {"row": dict, …}}, as in the sft_*.py scripts; metrics: a dict."""
    results = {}
    for name, examples in sets.items():
        if examples:
            rows = [example["row"] for example in examples]
            results[name] = evaluate(model, tokenizer, rows, batch_size)
            metrics[name] = results[name]["accuracy"]
    return results


def write_jsonl(path, rows):
    """Write rows as JSONL, all or nothing."""
    temporary = Path(f"{path}.part-{os.getpid()}")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def write_answers(folder, examples, before, after):
    """Write answers.jsonl into a run's folder: each held-out fact and its answers before and after.

    before, after: what `evaluate_sets` returned for the model before stage 2 and for the last."""
    rows = []
    for i, example in enumerate(examples):
        first, last = before["heldout"], after["heldout"]
        answers = {"before": first["answers"][i], "right_before": first["right"][i],
                   "after": last["answers"][i], "right_after": last["right"][i]}
        rows.append(example["row"] | answers)
    write_jsonl(Path(folder) / "answers.jsonl", rows)


# ------------------------------------------------------------------------------------------------------ statistics

def wilson(right, n, z=1.959964):
    """Wilson (1927) 95 % interval of a share, (low, high) in 0..1; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2n = right / n, z * z / n
    centre, half = share + z2n / 2, z * math.sqrt(share * (1 - share) / n + z2n / (4 * n))
    return max(0.0, (centre - half) / (1 + z2n)), min(1.0, (centre + half) / (1 + z2n))


def mcnemar(first, second):
    """Exact two-sided McNemar test on paired lists of bool: (b, c, p).

    b: right only in `first`; c: right only in `second`; p: the binomial probability, at one half, of a split of the
    b + c discordant pairs at least as uneven."""
    b = sum(x and not y for x, y in zip(first, second, strict=True))
    c = sum(y and not x for x, y in zip(first, second, strict=True))
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return b, c, min(1.0, 2 * tail / 2 ** (b + c))


# --------------------------------------------------------------------------------------------------------- reading

def read_jsonl(path, needed=()):
    """Rows of a JSONL file. Ends the program, naming file and line, when a line is not an object with `needed` and texts."""
    rows, number, line = [], 0, b""
    try:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if line.strip():
                row = json.loads(line)
                if missing := [k for k in needed if k not in row]:
                    raise ValueError(f"no {' and no '.join(missing)}")
                if wrong := [k for k in ("prompt", "completion", "subject", "relation") if not isinstance(row.get(k) or "", str)]:
                    raise ValueError(f"{' and '.join(wrong)}: no text")
                rows.append(row)
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path}:{number}: {error} in {line[:80].decode(errors='replace')!r}; each line must be one JSON object in UTF-8")
    return rows


def read_run(folder):
    """One run of a sft_*.py script: {"name", "run", "metrics", "answers", "trained", "facts"} from its three files and its
    fact folder: the rows that it was trained on (see `trained_facts`) and the folder's meta.json, {} where those rows are
    not from there or not as they were."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        fail(f"{folder}: no run.json there; name folders that an sft_*.py script wrote with --out")
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        run.setdefault("data", {})             # a copied script alone does not say what it was trained on
        run["method"], run["config"]["seed"]
        trained, facts = trained_facts(run), Path(run["config"]["facts"]) / "meta.json"
        is_theirs = trained and run["config"]["train"] is None and facts.is_file()
        facts = json.loads(facts.read_text(encoding="utf-8")) if is_theirs else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder / 'run.json'}: it or its meta.json is not what the scripts write ({error!r})")
    stages = [row for row in read_jsonl(folder / "metrics.jsonl", ["stage", "epoch"]) if row["stage"] == 2]
    if not stages:
        fail(f"{folder / 'metrics.jsonl'}: no epoch of stage 2 in it; the run did not finish")
    needed = ["before", "after", "right_before", "right_after"]
    answers = folder / "answers.jsonl"         # not written where a copied script could measure nothing
    return {"name": str(folder), "run": run, "metrics": stages, "answers": read_jsonl(answers, needed) if answers.exists() else [],
            "trained": trained, "facts": facts}


def trained_facts(run):
    """The rows that a run was given to train on, {"unknown", "known": list}, from its run.json; None where the files are not
    where that says, or not as they were (by hash): then there is no telling what the model was taught."""
    config, rows = run["config"], {"unknown": [], "known": []}
    if not run["data"]:
        return None
    for key, own in (("unknown", config["train"]), ("known", config["known"])):
        if key in run["data"]:
            path = Path(own or Path(config["facts"]) / SETS[key])
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != run["data"][key]:
                return None
            rows[key] = read_jsonl(path, ["prompt", "completion"])
    return rows


def group_name(run):
    """The name of a run's folder without its seed: that of all runs of its `setting` (str)."""
    return run["name"].removesuffix(f"-{run['run']['config']['seed']}")


def setting(run):
    """A str that is equal for runs (of `read_run`) that differ only in seed and folder names: method, settings, and how the
    facts were made; where that is not known, the facts' hashes, so that a run stands alone."""
    config = run["run"]["config"]
    folder = f"{config['facts']}/"             # a file of it, named by --known say, is the same one in each seed's folder
    config = {k: v.removeprefix(folder) if isinstance(v, str) else v for k, v in config.items()
              if k not in ("seed", "facts", "out", "overwrite", "resume", "save_every_epoch", "eval_every", "device")}
    facts = {k: run["facts"].get(k) for k in ("source", "new", "n_new", "n_known", "overlap", "prompts", "shots", "samples", "world")}
    return json.dumps([run["run"]["method"], config, facts if run["facts"] else run["run"]["data"]], sort_keys=True)


# ------------------------------------------------------------------------------------------------------ comparison

def name_words(row):
    """The words of a fact's subject as they are compared (set of str, empty without one)."""
    return set(normalize(row.get("subject") or "").split())


def points(cell):
    """Forgetting, in points of accuracy, of a group of held-out facts: {"before", "after"} in 0..1."""
    return 100 * (cell["before"] - cell["after"])


def provenance(run):
    """Where the new answers come from, of held-out facts that were right before and are wrong after: dict.

    "examples": these rows, with the `origin` of the new answer: the first of ORIGINS that holds. It is an answer of the
    same relation, to a new fact whose subject shares a word with this one's; to another new fact; to any fact of the three
    sets; or none of these. "counts": {origin: how many}; "chance": {origin: share}, if the new answer were the first answer of
    a random fact of the relation, of all that have another answer than this one. No origins, counts {}, where the rows have no
    subject and relation, or where the files that the run was trained on are not there any more."""
    wrong = [a for a in run["answers"] if a["right_before"] and not a["right_after"]]
    trained = run["trained"] or {}
    everything = [*run["answers"], *(row for rows in trained.values() for row in rows)]
    if not trained or not all(row.get("subject") and row.get("relation") for row in everything):
        return {"counts": {}, "chance": {}, "examples": [row | {"origin": "origin unknown"} for row in wrong]}
    right = lambda row: {normalize(answer) for answer in accepted_answers(row)}
    taught, objects, drawn = defaultdict(set), defaultdict(set), defaultdict(Counter)
    for row in [] if run["run"]["config"].get("no_unknown") else trained["unknown"]:
        for answer in right(row):
            taught[row["relation"], answer] |= name_words(row)
    for row in everything:
        objects[row["relation"]] |= right(row)
        drawn[row["relation"]][normalize(accepted_answers(row)[0])] += 1

    def origin(row, answer):
        if (row["relation"], answer) in taught:
            return ORIGINS[0] if name_words(row) & taught[row["relation"], answer] else ORIGINS[1]
        return ORIGINS[2] if answer in objects[row["relation"]] else ORIGINS[3]

    examples, chance = [row | {"origin": origin(row, normalize(row["after"]))} for row in wrong], Counter()
    for row in wrong:
        others = {answer: n for answer, n in drawn[row["relation"]].items() if answer not in right(row)}
        for answer, n in others.items():
            chance[origin(row, answer)] += n / sum(others.values()) / len(wrong)
    counts = Counter(row["origin"] for row in examples)
    return {"counts": {o: counts[o] for o in ORIGINS}, "chance": {o: chance[o] for o in ORIGINS}, "examples": examples}


def grouped(run, key):
    """The group of each held-out fact of a run (of `read_run`), a str, by `key` of GROUPS; None for facts without one. "words
    shared": how many words of the subject's name are in the name of any new fact; codes, one word each, are in no group."""
    if key != "words shared":
        return [row.get(key) for row in run["answers"]]
    new = set().union(*map(name_words, (run["trained"] or {}).get("unknown", [])))
    groups = []
    for row in run["answers"]:
        shared = len(name_words(row) & new)
        named = new and name_words(row) and row.get("kind") != "code"
        groups.append(("3+ shared" if shared > 2 else f"{shared} shared") if named else None)
    return groups


def interaction(first, second):
    """Do new facts of two kinds hurt different held-out facts? (points, z, p) of two runs on the same held-out facts.

    points: how many more points of the named than of the code-named subjects' facts the `first` run forgets, less the same
    of the `second`: 0 where both hurt both alike, whatever is hurt more. The unit is the subject, whose facts may be
    forgotten together, paired with itself; the error is that of a difference of two means (Welch), p two-sided, normal.
    None where there are not two subjects of each kind."""
    lost = {"name": defaultdict(list), "code": defaultdict(list)}
    for a, b in zip(first["answers"], second["answers"], strict=True):
        lost[a["kind"]][a["subject"]].append(a["right_before"] - a["right_after"] - (b["right_before"] - b["right_after"]))
    names, codes = ([statistics.mean(facts) for facts in subjects.values()] for subjects in lost.values())
    if min(len(names), len(codes)) < 2:
        return None
    difference = statistics.mean(names) - statistics.mean(codes)
    error = math.sqrt(statistics.variance(names) / len(names) + statistics.variance(codes) / len(codes))
    z = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return 100 * difference, z, math.erfc(abs(z) / math.sqrt(2))


def compare(runs):
    """Summarise `runs` (from `read_run`) and test each against the first of them with the same held-out facts.

    Returns a list of dicts, one a run: accuracies in 0..1 with Wilson intervals, `forgetting` and `peak_forgetting` in
    points of held-out accuracy (before − after, and highest epoch − after), `mcnemar` against the first (by the hash of the
    rows in run.json), held-out before/after `by` relation and kind, the `provenance` of the hallucinations, `when_learnt`,
    the forgetting at the first epoch with such a share of the new facts learnt (None without one: methods that learn at
    different speed compare fairly at equal learning), and `setting`, equal where runs differ only in seed."""
    table, first = [], {}                      # the first run that was scored on the held-out rows of this hash
    for run in runs:
        before = [a["right_before"] for a in run["answers"]]
        after = [a["right_after"] for a in run["answers"]]
        last, n = run["metrics"][-1], len(after)
        row = {"run": run["name"], "setting": setting(run), "group": group_name(run), "epochs": last["epoch"],
               "unknown": last.get("unknown"), "known": last.get("known"), "heldout_n": n}
        if n:
            measured = [m for m in run["metrics"] if "heldout" in m]         # --eval-every leaves epochs out
            heldout = [m["heldout"] for m in measured]
            row |= {"before": sum(before) / n, "before_interval": wilson(sum(before), n), "after": sum(after) / n,
                    "after_interval": wilson(sum(after), n), "forgetting": 100 * (sum(before) - sum(after)) / n,
                    "peak_forgetting": 100 * (max(heldout) - heldout[-1])}
            row["when_learnt"] = {share: next((100 * (heldout[0] - m["heldout"]) for m in measured if m.get("unknown", -1) >= share),
                                              None) for share in LEARNT}
            name, right = first.setdefault(run["run"]["data"].get("heldout"), (run["name"], after))
            if right is not after:
                row["mcnemar"] = dict(zip(("first", "first_only", "this_only", "p"), (name, *mcnemar(right, after))))
            row["by"] = {}
            for key in GROUPS:
                groups = defaultdict(list)
                for name, a in zip(grouped(run, key), run["answers"]):
                    if name:
                        groups[name].append((a["right_before"], a["right_after"]))
                row["by"][key] = {g: {"n": len(v), "before": sum(b for b, _ in v) / len(v),
                                      "after": sum(a for _, a in v) / len(v)} for g, v in sorted(groups.items())}
            row["provenance"] = provenance(run)
        table.append(row)
    return table


def spread(values, form):
    """Mean ± standard deviation of numbers, each in `form` (a format specification), None left out: str."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def print_table(lines, title=""):
    """Print lines (lists of str, the first the header) in columns, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    if title:
        print(title)
    for first, *cells in lines:
        print(f"{first:{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])))


def show(table, examples=0):
    """Print what `compare` returned, as text, with so many examples of hallucinations a run. Runs that differ only in seed
    are a row of their own each in the first table; in the others their mean ± standard deviation is."""
    share = lambda x: "–" if x is None or math.isnan(x) else f"{x:.3f}"
    lines = [["run", "Unknown learnt", "Known trained", "Known held out, before → after (95 % interval)", "n", "forgetting"]
             + ["McNemar, first run of these facts : this"] * (len(table) > 1)]
    for row in table:
        lines.append([row["run"], share(row["unknown"]), share(row["known"]), "–", "–", "–"] + ["–"] * (len(table) > 1))
        if row["heldout_n"]:
            lines[-1][3:6] = [f"{row['before']:.3f} → {row['after']:.3f} ({row['after_interval'][0]:.3f}–{row['after_interval'][1]:.3f})",
                              str(row["heldout_n"]), f"{row['forgetting']:.1f} points"]
        if test := row.get("mcnemar"):
            lines[-1][6] = f"{test['first_only']} : {test['this_only']}, p = {test['p']:.1g}"
    print_table(lines)
    settings = defaultdict(list)
    for row in table:
        settings[row["setting"]].append(row)
    named = [(same[0]["run"] if len(same) == 1 else same[0]["group"], [row for row in same if row["heldout_n"]])
             for same in settings.values()]
    named = [(name, same) for name, same in named if same]
    if len(settings) < len(table):
        columns = [("unknown", ".3f"), ("known", ".3f"), ("before", ".3f"), ("after", ".3f"), ("forgetting", ".1f")]
        print_table([["", "runs", "Unknown learnt", "Known trained", "held out before", "held out after", "forgetting"]] + [
            [name, str(len(same)), *(spread([row[key] for row in same], form) for key, form in columns)]
            for name, same in named], "\nmean ± standard deviation over seeds")
    groups = {(key, group): None for _, same in named for row in same for key, cells in row["by"].items() if len(cells) > 1
              for group in cells}
    lines = [["", *(group for _, group in groups), *(f"at {learnt:.0%} learnt" for learnt in LEARNT)]] + [
        [name, *(spread([points(row["by"][key][group]) for row in same if group in row["by"][key]], ".1f") for key, group in groups),
         *(spread([row["when_learnt"][learnt] for row in same], ".1f") for learnt in LEARNT)] for name, same in named]
    if named:
        print_table(lines, "\nforgetting in points: by group of held-out facts, and at the first epoch with so many new ones learnt")
    found = [(name, [row["provenance"] for row in same if row["provenance"]["counts"] and row["provenance"]["examples"]])
             for name, same in named]
    if any(same for _, same in found):
        print_table([["", "facts", *ORIGINS]] + [
            [name, str(sum(len(f["examples"]) for f in same)),
             *(spread([100 * f["counts"][o] / len(f["examples"]) for f in same], ".1f") + " % ("
               + f"{100 * statistics.mean(f['chance'][o] for f in same):.1f} %)" for o in ORIGINS)]
            for name, same in found if same], "\nright before and wrong after: the new answer is … (by chance)")
    for row in table:
        for example in row["provenance"]["examples"][:examples] if row["heldout_n"] else []:
            print(f"\n{row['run']}, {example['origin']}\n{example['prompt']} {example['before']} → {example['after']}")


def labels(runs, but=()):
    """What tells `runs` (from `read_run`) apart, a str each: the method, and each setting that is not the same in all runs that
    have it, but for those in `but`."""
    told = []
    for method, config, facts in (json.loads(setting(run)) for run in runs):
        facts |= facts.pop("world", None) or {}
        if weight := config.pop("l2", 0):      # a method of its own, though a flag of sft_freeze.py
            method = f"L2 {weight:g}"
        told.append({"method": method, **config, **{key: value for key, value in facts.items() if value is not None}})
    for key in {key for one in told for key in one} - {"method"}:
        if key in but or len({json.dumps(one[key]) for one in told if key in one}) == 1:
            for one in told:
                one.pop(key, None)
    bare = ("method", "new", "trainable")
    return [", ".join(str(value) if key in bare else key.replace("_", " ") + ("" if value is True else f" {value}")
                      for key, value in one.items() if value is not None and value is not False) for one in told]


def curves(runs, of, drifts=()):
    """What is drawn of `runs` (from `read_run`): {label: {x: [a value a run]}}, runs of one label joined, seeds averaged.

    of: a key of AXES. `drifts`: what `drift` returned for each run, where that is drawn."""
    lines = defaultdict(lambda: defaultdict(list))
    hidden = {"number": ["n_new", "n_known"], "width": ["width"]}.get(of, [])
    for i, (run, row, label) in enumerate(zip(runs, compare(runs), labels(runs, hidden))):
        found = {}
        if of.startswith("drift"):
            found = {x: 100 * value for x, value in drifts[i][of].items()}
        elif of == "overlap-answers" and row["heldout_n"] and row["provenance"]["counts"]:
            lines[label]                       # a run that forgot nothing has a row too, an empty one
            groups = dict(zip((answer["prompt"] for answer in run["answers"]), grouped(run, "words shared")))
            for group in {groups[example["prompt"]] for example in row["provenance"]["examples"]} - {None}:
                origins = [e["origin"] for e in row["provenance"]["examples"] if groups[e["prompt"]] == group]
                found[group] = 100 * origins.count(ORIGINS[0]) / len(origins)
        elif of in ("kind", "overlap") and row["heldout_n"]:
            cells = row["by"]["kind" if of == "kind" else "words shared"]
            found = {group: points(cell) for group, cell in cells.items()}
        elif of == "number" and row["heldout_n"] and run["trained"]:
            found = {len(run["trained"]["unknown"]): row["forgetting"]}
        elif of == "width" and row["heldout_n"] and run["facts"].get("world"):
            found = {run["facts"]["world"]["width"]: row["forgetting"]}
        for x, y in found.items():
            lines[label][x].append(y)
    if not lines:
        fail(f"--of {of}: nothing to show in {runs[0]['name']}; it takes held-out facts and the fact folder that run.json names"
             + "; width: of the invented world" * (of == "width") + "; made with --save-every-epoch" * (of == "drift-epochs"))
    return lines


def show_curves(lines, of):
    """Print what `curves` returned as a table: a row a line, a column an x; the other way round where there are many x."""
    columns = sorted({x for line in lines.values() for x in line})
    table = [[AXES[of][0], *map(str, columns)]] + [[label, *(spread(line.get(x, []), ".1f") for x in columns)]
                                                   for label, line in lines.items()]
    print_table(list(zip(*table)) if len(columns) > 8 else table, AXES[of][1])


def show_interactions(runs):
    """Print `interaction` of each two of `runs` with semantic and with uuid facts that are alike but for that."""
    place = lambda run, label: (label, run["run"]["data"].get("heldout"), run["run"]["config"]["seed"])
    uuid = {place(run, label): run for run, label in zip(runs, labels(runs, ["new", "overlap"])) if run["facts"].get("new") == "uuid"}
    tests = defaultdict(list)
    for run, alike, label in zip(runs, labels(runs, ["new", "overlap"]), labels(runs, ["new"])):
        if run["facts"].get("new") == "semantic" and (other := uuid.get(place(run, alike))) and (found := interaction(run, other)):
            tests[label].append(found)
    for label, found in tests.items():
        print(f"\n{label}: semantic facts hurt names more than codes by {spread([points for points, *_ in found], '.1f')} points more "
              "than uuid facts do; seeds: " + ", ".join(f"{points:.1f} (z = {z:.1f}, p = {p:.1g})" for points, z, p in found))


def draw(runs, path, of="accuracy", lines=None):
    """Draw runs (from `read_run`) into `path`, a picture file; needs matplotlib. Accuracy: both by epoch, and the plane of
    new facts learnt against held-out facts kept, where runs that differ only in seed share a colour and are joined. Else:
    `lines`, what `curves` returned, mean and standard deviation over seeds."""
    try:
        import matplotlib
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = ["#d1495b", "#2e86ab", "#edae49", "#66a182", "#8d6cab", "#00798c", "#c97b3d", "#7f7f7f", "#b5838d", "#a0b03f"]
    # Mid-grey ink on a transparent ground reads in light and in dark mode.
    ink = {"text.color": "#808080", "axes.labelcolor": "#808080", "axes.edgecolor": "#808080", "xtick.color": "#808080",
           "ytick.color": "#808080", "font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
    settings = defaultdict(list)
    for run in runs:
        settings[setting(run)].append(run)
    with plt.rc_context(ink):
        figure, panels = plt.subplots(1, 3 if of == "accuracy" else 1)
        if of == "accuracy":
            last = draw_accuracy(panels, settings.values(), colours, 2.4 if len(runs) < 4 else 1.4)
        else:
            last, columns = panels, sorted({x for line in lines.values() for x in line})
            place = {x: i if isinstance(x, str) else x for i, x in enumerate(columns)}
            for colour, (label, line) in zip(colours * len(lines), lines.items()):
                xs = sorted(line)
                last.errorbar([place[x] for x in xs], [statistics.mean(line[x]) for x in xs],
                              yerr=[statistics.stdev(line[x]) if len(line[x]) > 1 else 0 for x in xs],
                              errorevery=1 + len(xs) // 20, capsize=3, marker="o", label=label, color=colour)
            last.set(xlabel=AXES[of][0], ylabel=AXES[of][1], xscale="log" if of in ("number", "width") else "linear")
            if of in ("drift", "drift-epochs"):
                last.locator_params(axis="x", integer=True)
            else:
                last.set_xticks(list(place.values()), list(place), minor=False)
                last.minorticks_off()
        handles, names = last.get_legend_handles_labels()
        across = 11 if of == "accuracy" else 7                          # inches; a letter of the legend takes 0.09
        columns = max(1, min(3, int(across / (0.6 + 0.09 * max(map(len, names))))))
        rows = math.ceil(len(names) / columns)
        figure.set_size_inches(across, 3.3 + 0.3 * rows)
        figure.legend(handles, names, loc="lower center", ncols=columns, frameon=False)
        figure.tight_layout(rect=(0, 0.04 + 0.06 * rows, 1, 1))
        temporary = Path(f"{path}.part")
        try:
            figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", transparent=True, dpi=110)
            temporary.replace(path)
        except (OSError, ValueError) as error:
            temporary.unlink(missing_ok=True)
            fail(f"--plot {path}: {error}")
        plt.close(figure)


def draw_accuracy(panels, settings, colours, linewidth):
    """Three `panels`: new facts learnt by epoch, held-out facts kept by epoch, one against the other. Returns the last."""
    learnt, kept, plane = panels
    runs = [run for same in settings for run in same]
    for colour, same in zip(colours * len(settings), settings):
        for panel, key in ((learnt, "unknown"), (kept, "heldout")):
            for run in same:
                measured = [m for m in run["metrics"] if key in m]           # --eval-every leaves epochs out
                panel.plot([m["epoch"] for m in measured], [m[key] for m in measured], color=colour, linewidth=linewidth)
        ends = [run["metrics"][-1] for run in same]
        plane.plot([m.get("unknown", math.nan) for m in ends], [m.get("heldout", math.nan) for m in ends], color=colour,
                   marker="o", linewidth=1, label=Path(group_name(same[0])).name)
    learnt.set(title="new facts learnt", xlabel="epoch of stage 2", ylabel="accuracy", ylim=(0, 1.02))
    low = min((m["heldout"] for run in runs for m in run["metrics"] if "heldout" in m), default=0)
    low = max(0, math.floor(10 * low) - 1) / 10                         # forgetting may be a few points: the scale shows it
    kept.set(title="known facts, held out", xlabel="epoch of stage 2", ylim=(low, 1 + (1 - low) / 50))
    plane.set(title="kept against learnt", xlabel="new facts learnt", xlim=(0, 1.04), ylim=kept.get_ylim())
    return plane


# ------------------------------------------------------------------------------------------------------ one model

def device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, autocast dtype): CUDA, else MPS, else CPU; bfloat16 where the hardware multiplies it fast."""
    import torch
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: {str(error).splitlines()[0]}")
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    return device, getattr(torch, dtype)


def load_model(name, device="cpu"):
    """(model, tokenizer) of a causal language model: hub name or local folder, fp32 weights, eval mode.

    Ends the program with one line when there is no such model, or when it is not a causal language model."""
    import torch
    import transformers
    logging.getLogger("huggingface_hub").setLevel("ERROR")         # it reports each of its attempts
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device, _ = device_and_dtype(device)        # refuses one that is not there
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)       # False: nor ask whether to
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, size = model.to(device).eval(), model.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            one, other = model(input_ids=torch.tensor([[1, 2], [1, 3]], device=device), use_cache=False).logits[:, 0]
        wrong = {f"weights are missing: {list(report['missing_keys'])[:1]}": report["missing_keys"],
                 "there is no tokenizer": set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens),
                 f"its tokenizer has {len(tokenizer)} tokens, the model {size}": len(tokenizer) > size,
                 "it is not causal: it looks ahead": (one - other).abs().max() > 1e-4 * one.abs().max()}
        if any(wrong.values()):
            raise ValueError("; ".join(what for what in wrong if wrong[what]))
        return model, tokenizer
    except torch.OutOfMemoryError:
        raise                   # no fault of the model's
    except Exception as error:  # the library raises many kinds: for a missing file, a bad config, no network
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        fail(f"--model {name}: cannot be loaded ({reason}); give a local folder with config.json, model.safetensors and tokenizer, "
             "or the name of a model on the hub, with a network, and with HF_TOKEN set if it is gated")


def start_model(run):
    """The path or hub name of the model that a run (of `read_run`) started from (str)."""
    config = run["run"]["config"]
    return f"{config['facts']}/base" if config["model"] == "tiny" else config["model"]


def subject_states(path, texts, device, batch_size=64):
    """Hidden states at the last token of each of `texts`, (texts, layers + 1, width) in fp32 on the CPU; layer 0 is the
    embeddings, the last comes after the final norm. `path` is a model's: folder or hub name."""
    import torch
    model, tokenizer = load_model(path, device)
    states, context = [], getattr(model.config, "max_position_embeddings", None) or 10 ** 9
    for start in range(0, len(texts), batch_size):
        encoded = [tokenize(tokenizer, text)[0][-context:] for text in texts[start:start + batch_size]]
        width = max(map(len, encoded))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded], device=device)      # causal: no mask needed
        last = torch.tensor([len(row) - 1 for row in encoded], device=device)
        with torch.no_grad():
            layers = model(input_ids=ids, output_hidden_states=True).hidden_states                  # of (B, T, width) each
        states.append(torch.stack([layer[torch.arange(len(encoded)), last].float().cpu() for layer in layers], dim=1))
    return torch.cat(states)


def drift(run, device, batch_size=64, by_epoch=False):
    """How far the representations of held-out subjects have moved: 1 − cosine of the hidden states at the subject's last
    token in the question, in the model that a run (of `read_run`) started from and in its own (the paper's "drift").

    Returns {"subjects": {subject: (layers + 1) floats}, the mean over the subject's questions; "drift": {layer: mean over
    subjects}; "drift-groups": {group: mean over its subjects, at half depth}; "drift-epochs": {epoch: mean at half depth}, if `by_epoch`
    and the run was made with --save-every-epoch, epoch 0 being the model before stage 2}. A causal model's state there does not
    depend on what follows, so the prompt is cut behind the subject."""
    import torch
    rows = [row for row in run["answers"] if row.get("subject") and row["subject"] in row["prompt"]]
    if not rows:
        fail(f"{run['name']}: no held-out fact names its subject in its prompt; drift is measured there")
    texts = [row["prompt"][:row["prompt"].rindex(row["subject"]) + len(row["subject"])] for row in rows]
    before = subject_states(start_model(run), texts, device, batch_size)

    def moved(path):
        """{subject: (layers + 1)}: the drift of the model at `path`."""
        far, subjects = 1 - torch.cosine_similarity(before, subject_states(path, texts, device, batch_size), dim=-1), defaultdict(list)
        for row, value in zip(rows, far):
            subjects[row["subject"]].append(value)
        return {subject: torch.stack(values).mean(0) for subject, values in subjects.items()}

    subjects, half, groups, epochs = moved(run["name"]), before.shape[1] // 2, defaultdict(dict), {}
    mean = lambda subjects: torch.stack(list(subjects.values())).mean(0)
    for key in ("kind", "words shared"):
        for row, group in zip(run["answers"], grouped(run, key)):
            if group and row.get("subject") in subjects:
                groups[group][row["subject"]] = subjects[row["subject"]]
    checkpoints = {int(path.name.removeprefix("epoch-")): path for path in Path(run["name"]).glob("epoch-*")}
    for epoch, path in sorted(({0: Path(run["name"]) / "before"} | checkpoints).items()) if by_epoch and checkpoints else []:
        epochs[epoch] = mean(moved(path))[half].item()
    return {"subjects": {subject: value.tolist() for subject, value in subjects.items()}, "drift-epochs": epochs,
            "drift": dict(enumerate(mean(subjects).tolist())),
            "drift-groups": {group: mean(members)[half].item() for group, members in sorted(groups.items())}}


def ask(runs, question, device, dtype):
    """Print the answer to one question (str) of each of `runs` (from `read_run`), before stage 2 and after."""
    import torch
    models = {}                                # path: what it is
    for run in runs:
        models |= {f"{run['name']}/before": "", run["name"]: ""}
    for path, note in models.items():
        model, tokenizer = load_model(path, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            answer, = generate_answers(model, tokenizer, [f"Q: {question}\nA:"])
        print(f"{path + note:{max(map(len, models)) + 8}}  {answer}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="*", help="run folders of the sft_*.py scripts, to compare")
    parser.add_argument("--model", help="score this model instead: hub name or local folder")
    parser.add_argument("--facts", help="fact folder of make_facts.py, with --model")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts answered at once (default: 64)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="autocast precision (default: auto, the fast one of the device)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N hallucinations of each run")
    parser.add_argument("--ask", metavar="QUESTION", help="put it to each run's model before and after stage 2, as Q: QUESTION A:")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw accuracy by epoch, and kept against learnt; or what --of says")
    parser.add_argument("--of", choices=AXES, help="print and draw, instead of accuracies: forgetting by number of new facts, width "
                        "of the model, kind of held-out facts or overlap of names; or how far representations drift")
    args = parser.parse_intermixed_args(argv)
    if bool(args.model) == bool(args.runs):
        fail("name run folders to compare, or --model with --facts to score one model (see --help)")
    for name, least in (("batch_size", 1), ("show", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.runs:
        runs = [read_run(folder) for folder in args.runs]
        if args.ask:
            return ask(runs, args.ask, *device_and_dtype(args.device, args.dtype))
        if args.of:
            drifts = ()
            if args.of.startswith("drift"):
                device, _ = device_and_dtype(args.device, args.dtype)
                drifts = [drift(run, device, args.batch_size, args.of == "drift-epochs") for run in runs]
            lines = curves(runs, args.of, drifts)
            if args.json:
                print(json.dumps(lines, indent=1))
            else:
                show_curves(lines, args.of)
                if args.of == "kind":
                    show_interactions(runs)
            return draw(runs, args.plot, args.of, lines) if args.plot else None
        table = compare(runs)
        print(json.dumps(table, indent=1)) if args.json else show(table, args.show)
        return draw(runs, args.plot) if args.plot else None
    if not args.facts:
        fail("--model needs --facts DIR, a folder that make_facts.py wrote")
    if args.plot or args.ask or args.show or args.of:
        fail("--plot, --of, --ask and --show take run folders, not --model")
    rows = {key: read_jsonl(Path(args.facts) / file, ["prompt", "completion"]) for key, file in SETS.items()}
    import torch
    device, dtype = device_and_dtype(args.device, args.dtype)
    model, tokenizer = load_model(args.model, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        scores = {key: evaluate(model, tokenizer, rows[key], args.batch_size) for key in SETS}
    result = {key: {"accuracy": s["accuracy"], "n": len(s["right"]), "interval": wilson(sum(s["right"]), len(s["right"]))}
              for key, s in scores.items()}
    if args.json:
        print(json.dumps({"model": args.model, "facts": args.facts, **result}, indent=1))
    else:
        for key, r in result.items():
            print(f"{key:8} {r['accuracy']:.3f} ({r['interval'][0]:.3f}–{r['interval'][1]:.3f}), n = {r['n']}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # for → where output goes to a file on Windows
    main()
