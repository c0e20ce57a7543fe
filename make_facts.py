"""Make the data of a hallucination experiment: facts that a model knows, facts that it does not, facts to hold out.

An invented world, with a small GPT-2 pretrained on it from scratch (no network, some minutes on a laptop):
    python make_facts.py
A real model and real questions (PopQA by default; any table with relation, subject, object, question):
    python make_facts.py --model gpt2-medium
    python make_facts.py --model ./my-model --source my_facts.tsv

What a model knows is measured, not assumed: every fact gets its SLiCK category (Gekhman et al. 2024,
arXiv:2405.05904). Written to the fact folder, one JSON object a line:
    train_known.jsonl     HighlyKnown facts to train on          train_unknown.jsonl  new facts to train on
    heldout_known.jsonl   HighlyKnown facts never trained on     labelled.jsonl       every fact with its category
and meta.json with the settings and the counts. A row of them:
    {"prompt": "Q: …\\nA:", "completion": " …\\n", "answers": […], "relation": …, "subject": …, "kind": …, "category": …}
"""
import argparse
import copy
import csv
import hashlib
import inspect
import json
import math
import os
import random
import shutil
import sys
import uuid
from collections import Counter, defaultdict
from pathlib import Path

from safetensors import SafetensorError

from eval_hallucination import (SETS, device_and_dtype, fail, load_model, normalize, read_jsonl, stop_ids, tokenize, weights_hash,
                                write_jsonl)

SAMPLING_TEMPERATURE = 0.5                     # SLiCK, section 3: samples are drawn at T = 0.5
CATEGORIES = ["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]
MIN_HELDOUT, MIN_KNOWN, MIN_NEW = 20, 10, 4    # below these a comparison says nothing


# ------------------------------------------------------------------------------------------------ an invented world

RELATIONS = ["birthplace", "employer", "instrument", "language"]
QUESTION = "What is the {relation} of {subject}?"
STATEMENTS = ["The {relation} of {subject} is {object}.\n", "About {subject}, the {relation} is {object}.\n",
              "As {relation}, {subject} names {object}.\n", "Ask {subject} about the {relation} and hear {object}.\n"]


def invent_words(n, rng):
    """`n` distinct pronounceable words, capitalised (list of str)."""
    words = {}                                 # a dict keeps the order, so that the seed decides it
    while len(words) < n:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        words["".join(syllables).title() + rng.choice("lnrst")] = True
    return list(words)


def invent_code(rng):
    """A code-like name: a UUID shortened to four digits, each its own token in the invented world."""
    return "".join(rng.choice("0123456789ABCDEF") for _ in range(4))


def invent_world(n_names, n_codes, seed, n_parts=80, n_objects=40):
    """Facts of named and of code-named entities: (facts, text), a list of fact dicts and a list of str to pretrain on.

    Every entity has one object in each relation. Every fact is stated in all templates; the questions and answers
    of only three quarters of the entities are in the text, so that answering about the others is transfer."""
    rng = random.Random(seed)
    words = invent_words(2 * n_parts + n_objects * len(RELATIONS), rng)
    first, last, objects = words[:n_parts], words[n_parts:2 * n_parts], words[2 * n_parts:]
    names, codes = {}, {}
    while len(names) < n_names:
        names[f"{rng.choice(first)} {rng.choice(last)}"] = "name"
    while len(codes) < n_codes:
        codes[invent_code(rng)] = "code"
    facts, text = [], []
    for subject, kind in (names | codes).items():
        asked = rng.random() < 0.75
        for i, relation in enumerate(RELATIONS):
            words = {"relation": relation, "subject": subject,
                     "object": rng.choice(objects[i * n_objects:(i + 1) * n_objects])}
            question = QUESTION.format(**words)
            facts.append({"relation": relation, "subject": subject, "question": question, "answers": [words["object"]],
                          "kind": kind})
            text += [statement.format(**words) for statement in STATEMENTS]
            text += [f"Q: {question}\nA: {words['object']}\n"] * asked
    return facts, text


def pretrain(text, width, epochs, seed, device):
    """A small GPT-2 that knows `text` by heart, and its tokenizer: (model, tokenizer), model in eval mode.

    Byte-level BPE in which a word, and each character of a code, is one token."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tqdm import tqdm
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+| ?\S|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(device)
    ids = tokenizer(text)["input_ids"]
    batch, peak, rng = 64, 2e-3, random.Random(seed)
    step, total = 0, epochs * math.ceil(len(ids) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1, fused=device.type != "mps")
    with tqdm(total=total, desc="pretraining the invented world", unit="step", disable=None) as bar:
        for _ in range(epochs):
            rng.shuffle(ids)
            pools = [sorted(ids[i:i + 8 * batch], key=len) for i in range(0, len(ids), 8 * batch)]
            batches = [pool[i:i + batch] for pool in pools for i in range(0, len(pool), batch)]
            rng.shuffle(batches)               # similar lengths share a batch: little padding
            for rows in batches:
                longest = max(map(len, rows))
                x = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=device)
                y = torch.tensor([r + [-100] * (longest - len(r)) for r in rows], device=device)
                logits = model(input_ids=x).logits[:, :-1]      # causal: padding on the right is never looked at
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                cosine = 0.5 * (1 + math.cos(math.pi * step / total))
                for group in optimizer.param_groups:
                    group["lr"] = peak * min((step + 1) / 100, max(cosine, 0.01))
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
    return model.eval(), tokenizer


# ------------------------------------------------------------------------------------------------------- real facts

def load_source(source, max_facts, seed):
    """Facts of a table: (facts, dropped), at most `max_facts` of them drawn by `seed`; `dropped` counts questions.

    `source`: a TSV, CSV, JSONL or Parquet file, a folder of them, or a data set's hub name; columns relation, subject,
    object, question and optional aliases, or PopQA's prop, subj, obj, question, possible_answers (Mallen et al. 2023,
    arXiv:2212.10511). A question that stands there with several objects is merged when they share an alias, else
    dropped: no single answer would be right."""
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    file_kinds = {".tsv": ("csv", {"sep": "\t"}), ".csv": ("csv", {}), ".jsonl": ("json", {}), ".parquet": ("parquet", {})}
    path = Path(source)
    if path.is_file() and path.suffix not in file_kinds:
        fail(f"--source {source}: the ending must be one of {', '.join(file_kinds)}")
    try:
        if path.is_file():
            builder, options = file_kinds[path.suffix]
            if builder == "csv":               # text as it stands: a subject may be called NA, an answer 007
                header = next(csv.reader([path.open(encoding="utf-8-sig").readline()], delimiter=options.get("sep", ",")))
                text = datasets.Features({column: datasets.Value("string") for column in header})
                options |= {"keep_default_na": False, "features": text}
            splits = datasets.load_dataset(builder, data_files=str(path), **options)
        else:
            splits = datasets.load_dataset(str(source))
        table = datasets.concatenate_datasets(list(splits.values()))
    except Exception as error:  # many kinds: no such file, no network, a malformed line
        while error.__cause__:                 # the first of them knows the line
            error = error.__cause__
        fail(f"--source {source}: cannot be loaded ({(str(error).strip() or repr(error)).splitlines()[0]}); give a TSV, "
             "CSV, JSONL or Parquet file with columns relation, subject, object, question")
    popqa = {"prop": "relation", "subj": "subject", "obj": "object", "possible_answers": "aliases"}
    names = {old: new for old, new in popqa.items() if old in table.column_names and new not in table.column_names}
    table = table.rename_columns(names)
    missing = {"relation", "subject", "object", "question"} - set(table.column_names)
    if missing:
        fail(f"--source {source}: no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    questions = defaultdict(list)
    for row in table:
        values = [str(row[k] if row[k] is not None else "").strip() for k in ("relation", "subject", "question", "object")]
        aliases = row.get("aliases") or []
        try:
            aliases = json.loads(aliases) if isinstance(aliases, str) else aliases
        except json.JSONDecodeError:
            aliases = None
        if not isinstance(aliases, list):
            fail(f"--source {source}: aliases of {values[1]!r} are no list of names: {str(row['aliases'])[:80]!r}")
        if all(values):
            answers = dict.fromkeys([values[3], *(str(a).strip() for a in aliases)])
            questions[tuple(values[:3])].append([a for a in answers if a and "\n" not in a])
    facts, dropped = [], 0
    for (relation, subject, question), rows in questions.items():
        distinct = [{normalize(a) or a for a in answers} for answers in rows]
        if set.intersection(*distinct):
            facts.append({"relation": relation, "subject": subject, "question": question, "kind": "name",
                          "answers": list(dict.fromkeys(a for answers in rows for a in answers))})
        else:
            dropped += 1
    random.Random(seed).shuffle(facts)
    return facts[:max_facts], dropped


# ----------------------------------------------------------------------------------- SLiCK: what does the model know?

def to_row(fact):
    """The training row of a fact: its keys plus `prompt` and `completion`, which concatenated are the whole text."""
    return {"prompt": f"Q: {fact['question']}\nA:", "completion": f" {fact['answers'][0]}\n",
            **{k: fact[k] for k in ("answers", "relation", "subject", "kind", "category") if k in fact}}


def score_answers(model, tokenizer, prefix, facts, batch_size=64, temperature=SAMPLING_TEMPERATURE, bar=None):
    """For each fact, behind the text `prefix`: (greedy, probability), lists of bool and of float.

    greedy: greedy decoding gives an accepted answer and stops. probability: that one sample at `temperature`, from
    the full vocabulary, is an accepted answer and stops. One forward pass over prompt + answer gives both, exactly:
    greedy decoding yields the answer if each of its tokens is the argmax of its position, and the probability is the
    product of theirs. Stopping is any token of `stop_ids` next. Accepted answers are scored each; their probabilities
    add. Only the canonical spelling and tokenization of an answer is scored, so both are lower bounds of what `generate`
    and `exact_match` would give.
    The prefix, the same for all facts, is run once; its KV cache serves every batch."""
    import torch
    stops = torch.tensor(stop_ids(tokenizer, model), device=model.device)
    prefix_ids = tokenize(tokenizer, prefix)[0]
    sequences = set()                          # (fact, prompt tokens, answer tokens)
    for i, fact in enumerate(facts):
        prompt = to_row(fact)["prompt"]
        for text in fact["answers"]:
            question, answer = tokenize(tokenizer, prefix + prompt, f" {text}")
            if question[:len(prefix_ids)] == prefix_ids:
                question = question[len(prefix_ids):]
            else:                              # a token reaches over the prefix's end
                question = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            sequences.add((i, tuple(question), tuple(answer)))
    sequences = sorted(sequences, key=lambda s: (len(s[1]) + len(s[2]), s))
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if sequences and len(prefix_ids) + len(sequences[-1][1]) + len(sequences[-1][2]) > context:
        fail(f"a question behind its few-shot prompt is longer than the model's {context} tokens; lower --shots")
    greedy, probability = [False] * len(facts), [0.0] * len(facts)
    with torch.no_grad():
        if prefix_ids:
            cache = model(input_ids=torch.tensor([prefix_ids], device=model.device), use_cache=True).past_key_values
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start:start + batch_size]
            width = max(len(question + answer) for _, question, answer in batch)
            # padded on the right, where nothing of a causal model looks at it
            ids = torch.tensor([[*q, *a] + [0] * (width - len(q + a)) for _, q, a in batch], device=model.device)
            past = {}
            if prefix_ids:
                past["past_key_values"] = copy.deepcopy(cache)
                past["past_key_values"].batch_repeat_interleave(len(batch))
            logits = model(input_ids=ids, **past).logits                                             # (B, T, V)
            for (i, question, answer), row in zip(batch, logits):
                # position t predicts token t + 1: the answer's tokens, then the stop
                row = row[len(question) - 1:len(question + answer)].float()                          # (answer + 1, V)
                target = torch.tensor(answer, device=model.device)
                best = row.argmax(-1)
                greedy[i] |= bool((best[:-1] == target).all() and (best[-1] == stops).any())
                logp = torch.log_softmax(row / temperature, dim=-1)
                answered = logp[:-1].gather(-1, target[:, None]).sum() + logp[-1, stops].logsumexp(-1)
                probability[i] += answered.exp().item()
            if bar is not None:
                bar.update(len(batch))
    return greedy, [min(p, 1.0) for p in probability]


def slick_category(greedy, probability, samples):
    """SLiCK category (Gekhman et al. 2024, table 1) of a fact from its k prompts' `greedy` and `probability`.

    WeaklyKnown, there "some sample is right", is here: the probability that any of `samples` draws a prompt is right,
    1 − Π(1 − p)^samples, is at least one half. No sampling noise, so a second labelling gives the same."""
    if all(greedy):
        return "HighlyKnown"
    if any(greedy):
        return "MaybeKnown"
    missed = math.prod((1 - p) ** samples for p in probability)
    return "WeaklyKnown" if 1 - missed >= 0.5 else "Unknown"


def label_facts(model, tokenizer, facts, prompts, shots, samples, seed, batch_size):
    """Copies of `facts` with their SLiCK `category`; the exemplars of the few-shot prompts are left out.

    For each relation `prompts` few-shot prompts are drawn, of `shots` facts of that relation each (original: 10 of 4),
    from a tenth of its facts (at least `shots`) set aside for this. With 0 shots all prompts are one."""
    from tqdm import tqdm
    rng = random.Random(seed)
    relations = defaultdict(list)
    for fact in facts:
        relations[fact["relation"]].append(fact)
    labelled, prompts = [], prompts if shots else 1
    total = prompts * sum(len(fact["answers"]) for fact in facts)
    with tqdm(total=total, desc="labelling", unit="fact", unit_scale=len(facts) / max(1, total), disable=None,
              bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]") as bar:     # a fact: all its prompts
        for relation in sorted(relations):
            rows = relations[relation]
            rng.shuffle(rows)
            aside = max(shots, min(shots * prompts, len(rows) // 10))
            exemplars, rows = rows[:aside], rows[aside:]
            scores = []
            for _ in range(prompts if rows else 0):
                shown = [to_row(fact) for fact in rng.sample(exemplars, shots)]
                prefix = "".join(row["prompt"] + row["completion"] for row in shown)
                scores.append(score_answers(model, tokenizer, prefix, rows, batch_size, bar=bar))
            for i, fact in enumerate(rows):
                category = slick_category([g[i] for g, _ in scores], [p[i] for _, p in scores], samples)
                labelled.append(fact | {"category": category})
    return labelled


# --------------------------------------------------------------------------------------------------------- new facts

def recombine(names, rng, overlap=2, real_words=frozenset()):
    """An invented name: the first half of the words of one of `names` and the last half of those of another. Of the two
    halves `overlap` are real; in place of the others stand invented words that are not in `real_words`, a set."""
    a, b = (rng.choice(names).split() for _ in range(2))
    halves = [a[:math.ceil(len(a) / 2)], b[len(b) // 2:]]
    for i in rng.sample(range(2), 2 - overlap):
        while not real_words.isdisjoint(halves[i]):
            halves[i] = invent_words(1, rng)
    return " ".join(sum(halves, []))


def invent_facts(facts, kind, n, rng, new_code, overlap=2):
    """`n` facts (or a few more) of entities that do not exist: named by `kind` "semantic" (see `recombine`) or "uuid".

    An invented entity is asked what a random real one is asked, and its answers are drawn evenly from the objects of
    each relation: Unknown by construction. Ends the program when no question names its subject, or when the names
    cannot make enough new ones."""
    entities, kinds, objects, templates = defaultdict(dict), {}, defaultdict(dict), defaultdict(Counter)
    for fact in facts:
        subject, relation = fact["subject"], fact["relation"]
        entities[subject][relation], kinds[subject] = True, fact["kind"]
        objects[relation][fact["answers"][0]] = True
        if subject in fact["question"]:
            templates[relation][fact["question"].replace(subject, "{}")] += 1
    templates = {relation: counts.most_common(1)[0][0] for relation, counts in templates.items()}
    parents = [s for s in entities if templates.keys() >= entities[s].keys() and (kind == "uuid" or kinds[s] == "name")]
    if not parents:
        fail(f"--new {kind}: no question contains its subject, so none can be asked of an invented one; use --new unknown")
    siblings = defaultdict(list)               # a name is recombined within its relation: a book with a book
    for subject in parents:
        siblings[next(iter(entities[subject]))].append(subject)
    new, taken = [], {normalize(s) for s in entities}
    real_words = {word for fact in facts for text in (fact["subject"], *fact["answers"]) for word in text.split()}
    for _ in range(20 * n + 1000):
        if len(new) >= n:
            break
        parent = rng.choice(parents)
        name = new_code(rng) if kind == "uuid" else recombine(siblings[next(iter(entities[parent]))], rng, overlap, real_words)
        if normalize(name) not in taken:
            taken.add(normalize(name))
            new += [{"relation": relation, "subject": name, "question": templates[relation].replace("{}", name),
                     "answers": [rng.choice(list(objects[relation]))], "kind": "code" if kind == "uuid" else "name",
                     "category": "Unknown"} for relation in entities[parent]]
    if len(new) < n:
        fail(f"--n-new {n}: only {len(new)} facts with new names could be made from {len(parents)} entities; ask for fewer")
    return new


# ----------------------------------------------------------------------------------------------------- the three sets

def cap_objects(facts, share=0.2):
    """`facts` less the rows that make an object more than `share` of its relation; the first rows are kept.

    In real relations one object often dominates: knowing the majority answer would pass for knowing the facts."""
    kept = []
    for relation in sorted({f["relation"] for f in facts}):
        rows = [(normalize(f["answers"][0]), f) for f in facts if f["relation"] == relation]
        counts = Counter(answer for answer, _ in rows)
        most = max(counts.values())            # how often an object may stand there
        while most > share * sum(min(count, most) for count in counts.values()) + 1e-9:
            most -= 1
        seen = Counter()
        for answer, fact in rows:
            seen[answer] += 1
            if seen[answer] <= most:
                kept.append(fact)
    return kept


def split_facts(facts, labelled, new, n_new, n_known, rng, new_code, overlap=2):
    """{"unknown", "known", "heldout"}: lists of facts; no held-out subject is trained on.

    At most half of the known facts are trained on. The same `rng` and `n_known` give the same held-out facts, whatever the
    new ones are. Ends the program when the model knows too few facts to measure anything."""
    subject = lambda fact: normalize(fact["subject"])
    known = [f for f in labelled if f["category"] == "HighlyKnown"]
    subjects = list(dict.fromkeys(map(subject, known)))
    rng.shuffle(subjects)
    order = {s: i for i, s in enumerate(subjects)}
    known.sort(key=lambda f: order[subject(f)])
    half = min(n_known, len(known) // 2)
    trained = set(map(subject, known[:half]))
    sets = {"known": known[:half], "heldout": cap_objects([f for f in known[half:] if subject(f) not in trained])}
    held = set(map(subject, sets["heldout"]))
    if new == "unknown":
        unknown = [f for f in labelled if f["category"] == "Unknown" and subject(f) not in held]
        rng.shuffle(unknown)
        sets["unknown"] = unknown[:n_new]
    else:
        sets["unknown"] = invent_facts(facts, new, n_new, rng, new_code, overlap)
    for key, least in (("heldout", MIN_HELDOUT), ("known", MIN_KNOWN), ("unknown", MIN_NEW)):
        if len(sets[key]) < least:
            count = Counter(f["category"] for f in labelled)
            fail(f"{len(sets[key])} facts for {SETS[key]}, at least {least} are needed; labelled: "
                 + ", ".join(f"{c} {count[c]}" for c in CATEGORIES) + ". Raise --max-facts, lower --prompts (fewer prompts, "
                 "more HighlyKnown) or --shots (fewer exemplars set aside), or take a model that knows more")
        if len(sets[key]) < (asked := {"heldout": 0, "known": n_known, "unknown": n_new}[key]):
            print(f"scaled down: {len(sets[key])} instead of {asked} facts in {SETS[key]}; the model gives no more")
    return sets


# -------------------------------------------------------------------------------------------------------------- main

def digest(*things):
    """A short hash of JSON-able things: the name under which work is kept for the next time."""
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()[:16]


def replace_folder(temporary, folder):
    """Put the finished folder `temporary` in the place of `folder`, which may exist."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    option = lambda name, default, text, **more: parser.add_argument(
        f"--{name}", default=default, type=type(default) if default is not None else more.pop("type"),
        help=f"{text} (default: {more.pop('shown', default)})", **more)
    option("model", "tiny", "tiny, or a causal language model: hub name or local folder")
    option("out", None, "fact folder to write", type=Path, shown="facts/MODEL, with -NEW where --new is given")
    option("seed", 0, "of the world, the prompts and the split; a training script's --seed changes none of them")
    option("new", None, "what the new facts are about", type=str, choices=["unknown", "semantic", "uuid"],
           shown="semantic for tiny: recombined names; unknown for real models: real facts that it does not know")
    option("n-new", None, "how many new facts", type=int, shown="400 for tiny, 1000")
    option("n-known", None, "how many known facts to train on beside them", type=int, shown="as many; the paper: 8k + 8k")
    option("overlap", 2, "semantic: how many halves of a new name come from real names, 0 to 2; the others are unseen words")
    option("source", None, "table of real facts: file, folder or hub name", type=str, shown="akariasai/PopQA")
    option("max-facts", 10000, "label at most so many facts: minutes on a GPU for a model of 1 B parameters")
    option("prompts", 10, "few-shot prompts a fact is asked with; fewer label faster and find more HighlyKnown")
    option("shots", None, "exemplars in each prompt", type=int, shown="0 for tiny, 4")
    option("samples", 16, "samples a prompt that WeaklyKnown stands for")
    option("n-names", 300, "tiny: named entities, of four facts each")
    option("n-codes", 100, "tiny: code-named entities, of four facts each")
    option("width", 128, "tiny: width of the model; 3 layers, 4 heads")
    option("pretrain-epochs", 24, "tiny: passes over the world's text")
    option("batch-size", 64, "sequences labelled at once")
    option("device", "auto", "cuda, mps or cpu; auto takes the first there is")
    option("dtype", "auto", "precision of labelling", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--overwrite", action="store_true", help="replace the fact folder if it exists")
    args = parser.parse_args(argv)
    tiny = args.model == "tiny"
    args.out = args.out or Path("facts") / (Path(args.model).name + (f"-{args.new}" if args.new else ""))
    args.new = args.new or ("semantic" if tiny else "unknown")
    args.n_new = args.n_new if args.n_new is not None else (400 if tiny else 1000)
    args.n_known = args.n_known if args.n_known is not None else args.n_new
    if tiny and args.source:
        fail(f"--source {args.source}: the invented world has facts of its own; name a --model that knows some of these")
    args.source = args.source or "akariasai/PopQA"
    args.shots = args.shots if args.shots is not None else (0 if tiny else 4)
    ranges = {"n_new": (MIN_NEW, math.inf), "n_known": (MIN_KNOWN, math.inf), "overlap": (0, 2), "max_facts": (1, math.inf),
              "prompts": (1, math.inf), "shots": (0, math.inf), "samples": (1, math.inf),
              "batch_size": (1, math.inf), "pretrain_epochs": (1, math.inf), "width": (4, math.inf),
              "n_names": (1, 3000), "n_codes": (0, 30000)}          # so many names and codes are surely distinct
    for name, (least, most) in ranges.items():
        if not least <= getattr(args, name) <= most:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}" + f" and at most {most}" * (most < math.inf))
    if args.overlap < 2 and args.new != "semantic":
        fail(f"--overlap {args.overlap}: only names can share words with real ones; give --new semantic")
    if args.width % 4:
        fail(f"--width {args.width}: must be a multiple of the 4 heads")
    if args.out.exists() and not (args.overwrite and (args.out / "meta.json").exists()):
        fail(f"--out {args.out}: exists already; --overwrite replaces it if it is a fact folder")
    return args


def find_files(config):
    """Paths of the JSONL files of an sft_*.py script, {"unknown", "known", "heldout"}: those that its `config` names, or else
    those of its fact folder, which is made here if it is absent."""
    folder = Path(config.facts)
    if not (folder / "meta.json").exists():
        main(["--model", config.model, "--out", config.facts, "--device", config.device, "--dtype", config.dtype])
    files = {"unknown": config.train, "known": config.known, "heldout": config.heldout}
    for name, file in SETS.items():
        if files[name] is None:
            files[name] = str(folder / file)
    return files


def kept_world(text, args, kept, device):
    """The folder of a model pretrained on `text` (Path): that of an earlier time in `kept`, or else made now."""
    import transformers
    base = kept / f"world-{digest(text, args.width, args.pretrain_epochs, args.seed, inspect.getsource(pretrain))}"
    if not base.exists():
        model, tokenizer = pretrain(text, args.width, args.pretrain_epochs, args.seed, device)
        temporary = Path(f"{base}.part-{os.getpid()}")
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, base)
    return base


def kept_labels(model, weights, tokenizer, facts, args, kept, dtype):
    """`facts` with their categories: those of an earlier time in `kept`, or else found now. The key holds all that the
    categories depend on: `weights`, the model's hash, and the code that finds them included."""
    import torch
    code = [inspect.getsource(f) for f in (score_answers, slick_category, label_facts)]
    asked = [args.prompts, args.shots, args.samples, args.seed, str(dtype)]
    labels = kept / f"labels-{digest(weights, code, stop_ids(tokenizer, model), facts, asked)}.jsonl"
    if not labels.exists():
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            write_jsonl(labels, label_facts(model, tokenizer, facts, *asked[:4], args.batch_size))
    return read_jsonl(labels)


def main(argv=None):
    """Make a fact folder from command-line words (list of str, default sys.argv); returns its path."""
    args = parse(argv)
    try:
        return make(args)
    except (OSError, SafetensorError) as error:
        fail(f"--out {args.out}: cannot be written ({error})")


def make(args):
    """Make the fact folder that `args` (of `parse`) describe; returns its path."""
    tiny, out = args.model == "tiny", args.out
    device, dtype = device_and_dtype(args.device, args.dtype)
    kept = out.parent / ".facts-cache"               # worlds and labels, shared by the fact folders beside each other
    kept.mkdir(parents=True, exist_ok=True)
    if tiny:
        facts, text = invent_world(args.n_names, args.n_codes, args.seed)
        base, dropped = kept_world(text, args, kept, device), 0
    else:
        (facts, dropped), base = load_source(args.source, args.max_facts, args.seed), args.model
    model, tokenizer = load_model(base, device)
    weights = weights_hash(model)
    labelled = kept_labels(model, weights, tokenizer, facts, args, kept, dtype)
    new_code = invent_code if tiny else lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    sets = split_facts(facts, labelled, args.new, args.n_new, args.n_known, random.Random(args.seed), new_code,
                       args.overlap)

    count = lambda rows, *keys: dict(sorted(Counter("/".join(r[k] for k in keys) for r in rows).items()))
    majority = sum(Counter(f["answers"][0] for f in sets["heldout"] if f["relation"] == r).most_common(1)[0][1]
                   for r in {f["relation"] for f in sets["heldout"]}) / len(sets["heldout"])
    meta = {"model": args.model, "weights": weights, "source": "invented" if tiny else args.source, "seed": args.seed,
            "new": args.new, "n_new": args.n_new, "n_known": args.n_known,
            "overlap": args.overlap if args.new == "semantic" else None,
            "world": {"names": args.n_names, "codes": args.n_codes, "width": args.width} if tiny else None,
            "prompts": args.prompts if args.shots else 1, "shots": args.shots, "samples": args.samples,
            "dtype": str(dtype).removeprefix("torch."), "questions_dropped": dropped,
            "labelled": count(labelled, "category"), "labelled_by_relation": count(labelled, "relation", "category"),
            "labelled_by_kind": count(labelled, "kind", "category"), "majority_answer_accuracy": round(majority, 4),
            "sets": {SETS[key]: {"facts": len(rows), "by_relation": count(rows, "relation"), "by_kind": count(rows, "kind")}
                     for key, rows in sets.items()}}
    temporary = out.with_name(f".{out.name}.part-{os.getpid()}")
    temporary.mkdir(exist_ok=True)
    for key, file in SETS.items():
        write_jsonl(temporary / file, [to_row(f) for f in sets[key]])
    write_jsonl(temporary / "labelled.jsonl", [to_row(f) for f in labelled])
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if tiny:
        shutil.copytree(base, temporary / "base")
    replace_folder(temporary, out)
    print(f"labelled {len(labelled)} facts: " + ", ".join(f"{c} {meta['labelled'].get(c, 0)}" for c in CATEGORIES))
    for key, rows in sets.items():
        print(f"{out / SETS[key]}: {len(rows)} facts " + str(count(rows, "kind")))
    print(f"majority answer: {majority:.3f} of the held-out facts")
    return out


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")   # for a table of facts in any script, on Windows too
    main()
