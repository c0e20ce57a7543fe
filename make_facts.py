"""Make the data of a hallucination experiment: facts that a model knows, facts that it does not.

An invented world, with a small GPT-2 pretrained on it from scratch (no network, some minutes):
    python make_facts.py
A real model and real questions (PopQA; a table of your own; EntityQuestions, the paper's):
    python make_facts.py --model gpt2-medium
    python make_facts.py --model gpt2-medium --source my_facts.tsv
    python make_facts.py --model gpt2-medium --source path/to/EntityQuestions --min-known 0.3
Other new facts of the same world or model, whose labels need not be found again:
    python make_facts.py --new uuid --reuse facts/tiny

Written to the fact folder, one JSON object a line:
    train_known.jsonl     known facts to train on           train_unknown.jsonl  new facts
    heldout_known.jsonl   known facts, never trained on     labelled.jsonl       all that were asked
and meta.json with settings and counts. A row of them:
    {"prompt": "Q: …\\nA:", "completion": " …\\n", "answers": […],
     "relation": …, "subject": …, "kind": …, "category": …}

What a model knows is measured by SLiCK (Gekhman et al. 2024, arXiv:2405.05904): each fact is
asked with several few-shot prompts. HighlyKnown: every greedy answer is right. MaybeKnown: some
are. WeaklyKnown: none is, but sampling at T = 0.5 finds it. Unknown: nor does that.
Nothing is generated for this. "Q: … Curie born?\\nA:" has the answer " Warsaw": one forward pass
over both gives each token's probability. If each token is the likeliest of its position, and a
newline or EOS after them, greedy decoding says just this: up to its first mistake it has read the
same tokens. The product of the probabilities at T = 0.5, of the end's too, is the chance p that
one sample says it, .06 for example. At least one of 16 samples does with probability
1 − (1 − p)^16 = .63; by our rule a fact is WeaklyKnown if at least one sample of all prompts is
right with probability ≥ ½. An answer is scored as its tokenizer encodes it. A model may also say
it in other tokens, so the greedy verdict and p are lower bounds.
"""
import copy
import csv
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from eval_hallucination import (PROMPT, SETS, alike, context_length, exact_match, fail,
                                find_device, load_model, newline_ids, normalize, note, read_jsonl,
                                stop_ids, texts, tokenize, weights_hash, write_jsonl)

TEMPERATURE = 0.5           # SLiCK, section 3
SAMPLES = 16                # of each prompt, as in SLiCK; Kaplan et al. 2026: 20
PRETRAIN_EPOCHS = 24        # passes over the invented world's text
LEAST = {"heldout": 20, "known": 10, "unknown": 4}      # with fewer facts a comparison says nothing
TABLES = [".tsv", ".csv", ".jsonl", ".parquet"]
COLUMNS = ["relation", "subject", "object", "question"]
POPQA = {"prop": "relation", "subj": "subject", "obj": "object", "possible_answers": "aliases"}


def option(default, text):
    """A flag, its default and its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Each field is a flag of the command line, --n-new for n_new."""
    model: str = option("tiny", "tiny, or a causal language model: hub name or folder")
    out: str = option(None, "fact folder to write; default: facts/MODEL, or facts/MODEL-NEW")
    overwrite: bool = option(False, "replace the fact folder, if it is one")
    reuse: str = option(None, "fact folder to take world and labels from, instead of asking again")
    seed: int = option(0, "of the world, the prompts and the split; a script's --seed is another")
    # which facts
    new: Literal["unknown", "semantic", "uuid"] = option(
        None, "new facts: real ones that it does not know (default), or invented ones, about "
        "recombined names (default for tiny) or codes")
    n_new: int = option(None, "how many new facts; default: 400 for tiny, else 500")
    n_known: int = option(None, "how many known facts to train on beside them; default: as many")
    overlap: int = option(2, "semantic: how many halves of a new name are of real names, 0 to 2")
    source: str = option("akariasai/PopQA", "table of real facts: file, folder or hub name")
    relations: str = option(None, "only these of it, as P17,P36")
    max_facts: int = option(10000, "label at most so many, spread evenly over the relations")
    min_known: float = option(0.0, "leave out relations of which less is known; the paper: 0.3")
    # how they are asked
    prompts: int = option(10, "few-shot prompts a fact; fewer prompts make more facts HighlyKnown")
    shots: int = option(None, "exemplars in each prompt; default: 0 for tiny, else 4")
    # the invented world
    n_names: int = option(300, "tiny: named entities, of four facts each")
    n_codes: int = option(100, "tiny: code-named entities, of four facts each")
    width: int = option(128, "tiny: width of the model; 3 layers, 4 heads")
    # the machine
    batch_size: int = option(64, "sequences labelled at once")
    device: str = option("auto", "cuda, mps or cpu; auto: the first there is")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of labelling")


def parse(argv=None):
    """The Config of command-line words (list of str, default sys.argv), nothing left open."""
    from transformers import HfArgumentParser
    parser = HfArgumentParser(Config, description=__doc__.splitlines()[0])
    parser.error = fail
    config = Config(**vars(parser.parse_args(argv)))
    tiny = config.model == "tiny"
    name = Path(config.model).name
    if config.new:
        name += f"-{config.new}"
    # None stands for a default that depends on the model.
    defaults = {"out": f"facts/{name}", "new": "semantic" if tiny else "unknown",
                "n_new": 400 if tiny else 500, "shots": 0 if tiny else 4}
    for flag, value in defaults.items():
        if getattr(config, flag) is None:
            setattr(config, flag, value)
    if config.n_known is None:
        config.n_known = max(config.n_new, LEAST["known"])
    at_least = {"n_new": LEAST["unknown"], "n_known": LEAST["known"], "max_facts": 1, "prompts": 1,
                "batch_size": 1, "n_names": 1, "width": 4}
    # Names run out at 6,400 and codes at 65,536: drawing more would not end.
    at_most = {"overlap": 2, "min_known": 1, "n_names": 3000, "n_codes": 30000}
    for flag, value in vars(config).items():
        least = at_least.get(flag, 0)
        most = at_most.get(flag, sys.maxsize)
        if isinstance(value, (int, float)) and not least <= value <= most:
            fail(f"--{flag.replace('_', '-')} {value}: must be from {least} to {most}")
    if tiny and (config.source != Config.source or config.relations):
        fail(f"--source {config.source}: the invented world has facts of its own; name a --model")
    if config.overlap < 2 and config.new != "semantic":
        fail(f"--overlap {config.overlap}: only names share words with real ones: --new semantic")
    if config.reuse and not (Path(config.reuse) / "meta.json").is_file():
        fail(f"--reuse {config.reuse}: is no fact folder")
    if config.width % 4:
        fail(f"--width {config.width}: must be a multiple of the 4 heads")
    out = Path(config.out).resolve()
    if out.exists() and not (config.overwrite and (out / "labelled.jsonl").exists()):
        fail(f"--out {config.out}: exists already; --overwrite replaces it if it is a fact folder")
    for path in (config.source, config.model):
        if out in Path(path).resolve().parents:
            fail(f"--out {config.out}: {path} is in it; name another folder")
    return config


# ----------------------------------------------------------------------------- an invented world

RELATIONS = ["birthplace", "employer", "instrument", "language"]
QUESTION = "What is the {relation} of {subject}?"
STATEMENTS = ["The {relation} of {subject} is {object}.\n",
              "About {subject}, the {relation} is {object}.\n",
              "As {relation}, {subject} names {object}.\n",
              "Ask {subject} about the {relation} and hear {object}.\n"]


def invent_words(n, rng):
    """`n` distinct pronounceable words, capitalised (list of str)."""
    words = {}                                 # a dict keeps the order, so that the seed decides it
    while len(words) < n:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        words["".join(syllables).title() + rng.choice("lnrst")] = True
    return list(words)


def invent_code(rng):
    """A code-like name: a UUID shortened to four digits, each a token in the invented world."""
    return "".join(rng.choice("0123456789ABCDEF") for _ in range(4))


def invent_uuid(rng):
    """A random UUID, a name that nobody has."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def invent_world(n_names, n_codes, seed, n_parts=80, n_objects=40):
    """Facts of named and of code-named entities, list of dicts, and a list of texts that say them.

    Every entity has one object in each relation. Every fact is stated in all templates; the
    questions and answers of only three quarters of the entities are in the text, so that
    answering about the others is transfer.
    """
    rng = random.Random(seed)
    words = invent_words(2 * n_parts + n_objects * len(RELATIONS), rng)
    first = words[:n_parts]
    last = words[n_parts:2 * n_parts]
    objects = words[2 * n_parts:]
    kinds = {}                                 # subject: its kind
    while len(kinds) < n_names:
        kinds[f"{rng.choice(first)} {rng.choice(last)}"] = "name"
    while len(kinds) < n_names + n_codes:
        kinds[invent_code(rng)] = "code"
    facts = []
    text = []
    for subject, kind in kinds.items():
        asked = rng.random() < 0.75
        for i, relation in enumerate(RELATIONS):
            answer = rng.choice(objects[i * n_objects:(i + 1) * n_objects])
            question = QUESTION.format(relation=relation, subject=subject)
            facts.append({"relation": relation, "subject": subject, "question": question,
                          "answers": [answer], "kind": kind})
            for statement in STATEMENTS:
                text.append(statement.format(relation=relation, subject=subject, object=answer))
            if asked:
                text.append(f"{PROMPT.format(question=question)} {answer}\n")
    return facts, text


def make_tokenizer(text):
    """Byte-level BPE in which a word of `text`, and each character of a code, is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+| ?\S|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_epoch(ids, batch_size, rng):
    """Lists of token ids in batches (B, T), shuffled; -100 behind the end of a row.

    Rows of similar length share a batch, so that little is padding."""
    from torch import tensor
    from torch.nn.utils.rnn import pad_sequence
    rng.shuffle(ids)
    batches = []
    for start in range(0, len(ids), 8 * batch_size):
        pool = sorted(ids[start:start + 8 * batch_size], key=len)
        for row in range(0, len(pool), batch_size):
            rows = [tensor(tokens) for tokens in pool[row:row + batch_size]]
            batches.append(pad_sequence(rows, batch_first=True, padding_value=-100))
    rng.shuffle(batches)
    return batches


def pretrain(text, width, seed, device, batch_size=64):
    """A small GPT-2 that knows `text` by heart, and its tokenizer: (model, tokenizer)."""
    import torch
    from tqdm import tqdm
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer = make_tokenizer(text)
    peak = 2e-3 * min(1, 128 / width)       # at 2e-3 a model of width 256 may not converge
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0, activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    ids = tokenizer(text)["input_ids"]
    rng = random.Random(seed)
    step = 0
    total = PRETRAIN_EPOCHS * math.ceil(len(ids) / batch_size)
    with tqdm(total=total, desc="pretraining the invented world", disable=None) as bar:
        for _ in range(PRETRAIN_EPOCHS):
            for targets in make_epoch(ids, batch_size, rng):
                targets = targets.to(device)
                # Some token must stand behind the end of a row; a causal model never looks there.
                logits = model(input_ids=targets.clamp(min=0)).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                cosine = 0.5 * (1 + math.cos(math.pi * step / total))
                for group in optimizer.param_groups:
                    group["lr"] = peak * min((step + 1) / 100, max(cosine, 0.01))
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
    return model, tokenizer


# ------------------------------------------------------------------------------------ real facts

def read_table(path):
    """The rows of a table as they stand, text for text: (line, {column: value}) of each."""
    if path.suffix == ".jsonl":
        return enumerate(read_jsonl(path), 1)
    if path.suffix == ".json":
        return enumerate(read_entity_questions(path), 1)
    if path.suffix == ".parquet":
        from pyarrow import parquet
        return enumerate(parquet.read_table(path).to_pylist(), 1)
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            header = next(lines, [])
            if len(set(header)) < len(header):
                raise ValueError("a column stands there twice")
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise ValueError(f"{len(cells)} fields, but {len(header)} in the header")
                if cells:
                    rows.append((lines.line_num, dict(zip(header, cells))))
        except (csv.Error, ValueError) as error:
            raise ValueError(f"line {lines.line_num}: {error}")
    return rows


def read_entity_questions(path):
    """Rows of a file of EntityQuestions (Sciavolino et al. 2021, arXiv:2109.08535): P17.train.json.

    A file is a relation, a list of {"question", "answers"} without subjects: a subject is what
    its question does not have in common with the others, in whole words."""
    rows = json.loads(path.read_text("utf-8"))
    questions = [row["question"] for row in rows]
    if len(questions) < 2:
        raise ValueError("one question alone does not show its subject")
    before = os.path.commonprefix(questions)
    before = before[:before.rfind(" ") + 1]
    after = os.path.commonprefix([question[::-1] for question in questions])[::-1]
    after = after[re.search(r"\W|$", after).start():]
    for row in rows:
        subject = row["question"].removeprefix(before).removesuffix(after)
        row |= {"relation": path.name.split(".")[0], "subject": subject, "object": row["answers"]}
    return rows


def find_tables(source):
    """Paths of the tables of a file, a folder or a hub data set.

    Of EntityQuestions those in train/: its one-off/ has some of the same questions once more."""
    path = Path(source)
    if path.suffix in TABLES and not path.exists():
        raise FileNotFoundError("no such file")
    if not path.exists():
        from huggingface_hub import snapshot_download
        patterns = [f"*{ending}" for ending in TABLES + [".train.json"]]
        path = Path(snapshot_download(source, repo_type="dataset", allow_patterns=patterns))
    if path.is_file():
        return [path]
    tables = sorted(path.rglob("train/*.train.json")) or sorted(path.glob("*.train.json"))
    return tables or sorted(file for file in path.rglob("*") if file.suffix in TABLES)


def to_fact(row):
    """The fact of a table's row, {} if one of its columns is blank. Raises ValueError."""
    for old, new in POPQA.items():
        if old in row:
            row.setdefault(new, row[old])
    aliases = row.get("aliases")
    if isinstance(aliases, str) and aliases.startswith("["):
        aliases = json.loads(aliases)
    fact = {"kind": "name"}
    for column in COLUMNS:
        if column not in row:
            raise ValueError(f"no column {column}; it has {', '.join(row)}")
        found = texts(row[column])
        if not found:
            return {}
        if column == "object":
            found += texts(aliases)
            fact["answers"] = list(dict.fromkeys(text.split("\n")[0].strip() for text in found))
        elif isinstance(row[column], list) or "\n" in found[0]:
            raise ValueError(f"{column} {row[column]!r} is no text of one line")
        else:
            fact[column] = found[0]
    json.dumps(fact, ensure_ascii=False).encode()       # half of a character cannot be written
    return fact


def load_source(source, max_facts, seed, relations=None):
    """Facts of a table: (facts, left out), list of dicts and Counter of rows by reason.

    source: a TSV, CSV, JSONL or Parquet file, a folder of them, or a data set's hub name; columns
    relation, subject, object, question and maybe aliases, or PopQA's (Mallen et al. 2023,
    arXiv:2212.10511), aliases being a text or a JSON list; or EntityQuestions. Rows with the same
    question, in whatever spelling (see `normalize`), become one fact with all their answers if
    one of these is in every row; else they are left out, since none would be right.
    max_facts are drawn by `seed`, as evenly from the relations (of `relations`, a list) as there
    are facts. Ends the program at a row that cannot be read, by file and line.
    """
    questions = defaultdict(list)
    left_out = Counter()
    names = set()
    place = source
    try:
        for path in find_tables(source):
            place = path
            for number, row in read_table(path):
                place = f"{path}:{number}"
                fact = to_fact(row)
                names.add(fact.get("relation"))
                if not fact:
                    left_out["blank"] += 1
                elif relations and fact["relation"] not in relations:
                    left_out["of other relations"] += 1
                else:
                    questions[normalize(fact["question"])].append(fact)
    except Exception as error:  # many kinds: no such file, no network, a malformed line
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        fail(f"--source {place}: cannot be read ({reason}); give a TSV, CSV, JSONL or Parquet file "
             f"with text under {', '.join(COLUMNS)}")
    missing = set(relations or []) - names
    if missing or not questions:
        fail(f"--source {source}: no facts of {missing or 'any relation'}; it has "
             f"{sorted(filter(None, names))}")
    facts = []
    for rows in questions.values():
        answers = [set(map(normalize, fact["answers"])) for fact in rows]
        if set.intersection(*answers):
            left_out["joined to another"] += len(rows) - 1
            joined = itertools.chain(*(fact["answers"] for fact in rows))
            facts.append(rows[0] | {"answers": list(dict.fromkeys(joined))})
        else:
            left_out["with contradictory answers"] += len(rows)
    random.Random(seed).shuffle(facts)
    seen = Counter()
    ranked = []
    for fact in facts:
        ranked.append((seen[fact["relation"]], len(ranked), fact))
        seen[fact["relation"]] += 1
    ranked.sort()               # the first of each relation, the second of each, …
    left_out["beyond --max-facts"] = max(0, len(facts) - max_facts)
    return [fact for *_, fact in ranked[:max_facts]], +left_out


# -------------------------------------------------------------- SLiCK: what does the model know?

def to_row(fact):
    """The training row of a fact: `prompt` and `completion`, one text together, and its keys."""
    row = {"prompt": PROMPT.format(question=fact["question"]),
           "completion": f" {fact['answers'][0]}\n"}
    keys = ("answers", "relation", "subject", "kind", "category")
    return row | {key: fact[key] for key in keys if key in fact}


def continue_from(model, cache, ids):
    """Logits (B, T, V) of token ids (B, T) behind a prefix; cache: of `read_prefix`, or {}."""
    past = copy.deepcopy(cache)
    for name in past:
        past[name].batch_repeat_interleave(len(ids))
    return model(input_ids=ids, **past).logits


def read_prefix(model, prefix, rest):
    """Keys and values of the token ids `prefix`, {argument: cache}, or {} if they are unusable.

    They are tried on `rest`, token ids: not every model goes on from a cache as from the text,
    recurrent ones above all, and one that ignores an argument would not see the prefix. Without
    autocast: the rounding of bf16 can be larger than what is looked for.
    """
    import torch
    if not prefix or not getattr(model, "keeps_prefix", True):
        return {}
    name = "past_key_values"
    if "cache" in inspect.signature(model.forward).parameters:
        name = "cache"              # as transformers calls it since 5.24
    ids = torch.tensor([prefix + rest], device=model.device)
    size = len(prefix)
    try:
        with torch.autocast(model.device.type, enabled=False):
            cache = {name: model(input_ids=ids[:, :size], use_cache=True)[name]}
            after = continue_from(model, cache, ids[:, size:].repeat(2, 1))
            whole = model(input_ids=ids).logits
        model.keeps_prefix = alike(after[1:], whole[:, size:])
        cache = {name: model(input_ids=ids[:, :size], use_cache=True)[name]}
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        model.keeps_prefix = False      # of one kind or another
    if not model.keeps_prefix:
        note("this model does not go on from a cache: each prompt is read as a whole, slowly")
        return {}
    return cache


def spell(tokenizer, stops, prompt, answer):
    """How a model may say `answer` (str) to `prompt`: a set of (prompt ids, answer ids, end id).

    The end is -1 if any of `stops` may follow, which add nothing to the answer; or else the one
    token that finishes it, as "s\\n" of a tokenizer that puts letters and the newline together.
    There may be several ways: "Co." also ends without its point.
    """
    newlines = newline_ids(tokenizer)
    ways = set()
    for completion in (f" {answer}", f" {answer}\n"):
        question, tokens = tokenize(tokenizer, prompt, completion)
        for end in range(1, len(tokens) + 1):
            last = tokens[end - 1]
            if last in newlines and last not in stops:
                ways.add((tuple(question), tuple(tokens[:end - 1]), last))
            text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
            if last not in newlines and exact_match(text, [answer]):
                ways.add((tuple(question), tuple(tokens[:end]), -1))
    return ways


def score_answers(model, tokenizer, prefix, facts, batch_size=64):
    """For each fact, behind the text `prefix`: (greedy, probability), lists of bool and of float.

    greedy: greedy decoding gives an accepted answer and stops. probability: that one sample at
    T = 0.5, from the full vocabulary, does. Both are exact for the ways of `spell`. What all
    prompts have in common is run once, and its keys and values serve every batch.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    newlines = newline_ids(tokenizer)
    stops = []          # the tokens that end an answer and add nothing to it but punctuation
    for token in stop_ids(tokenizer, model):
        if normalize(f"x{newlines.get(token, '')}") == "x":
            stops.append(token)
    ways = set()
    for i, fact in enumerate(facts):
        for answer in fact["answers"]:
            for way in spell(tokenizer, stops, prefix + to_row(fact)["prompt"], answer):
                ways.add((len(way[0] + way[1]), i, *way))
    greedy = [False] * len(facts)
    probability = [0.0] * len(facts)
    ways = sorted(ways, reverse=True)   # the longest first: lack of memory shows at once
    if not ways:
        return greedy, probability
    with torch.no_grad():
        # All but the last token is shared, since that one's logits predict the answer's first.
        shared = len(os.path.commonprefix([question[:-1] for _, _, question, _, _ in ways]))
        example = ways[0][2]
        cache = read_prefix(model, example[:shared], example[shared:])
        if not cache:
            shared = 0
        for start in range(0, len(ways), batch_size):
            batch = ways[start:start + batch_size]
            rows = []
            for _, _, question, answer, _ in batch:
                rows.append(torch.tensor(question[shared:] + answer))
            # Padded on the right, where nothing of a causal model looks at it.
            ids = pad_sequence(rows, batch_first=True).to(model.device)
            logits = continue_from(model, cache, ids)                           # (B, T, V)
            if logits.isnan().any():
                fail("the model's logits are no numbers; take --dtype float32")
            for (_, i, question, answer, end), scores in zip(batch, logits):
                # Position t predicts token t + 1: the answer's tokens, then the end.
                first = len(question) - shared - 1
                scores = scores[first:first + len(answer) + 1].float()          # (answer + 1, V)
                tokens = torch.tensor(answer, dtype=torch.long, device=model.device)
                ends = torch.tensor(stops if end < 0 else [end], dtype=torch.long,
                                    device=model.device)
                best = scores.argmax(-1)
                greedy[i] |= bool((best[:-1] == tokens).all() and (best[-1] == ends).any())
                logp = torch.log_softmax(scores / TEMPERATURE, dim=-1)
                said = logp[:-1].gather(-1, tokens[:, None]).sum() + logp[-1, ends].logsumexp(-1)
                probability[i] += said.exp().item()
    return greedy, [min(p, 1.0) for p in probability]


def slick_category(greedy, probability):
    """SLiCK category (Gekhman et al. 2024, table 1) of a fact, from `greedy` and `probability`.

    Both are lists, a prompt an entry. In the paper a fact is WeaklyKnown if some sample is right;
    here, if any of SAMPLES a prompt is right with probability 1 − Π (1 − p)^SAMPLES ≥ ½.
    Without the noise of sampling a second labelling gives the same.
    """
    if all(greedy):
        return "HighlyKnown"
    if any(greedy):
        return "MaybeKnown"
    missed = math.prod((1 - p) ** SAMPLES for p in probability)
    return "WeaklyKnown" if missed <= 0.5 else "Unknown"


def label_facts(model, tokenizer, facts, config):
    """Copies of `facts` with their SLiCK `category`; the exemplars of the prompts are left out.

    For each relation --prompts prompts are drawn, of --shots facts of that relation each
    (original: 10 of 4), from a tenth of its facts set aside for this (at least --shots, and no
    more than all prompts take). With 0 shots there is one prompt, whatever --prompts says.
    """
    from tqdm import tqdm
    rng = random.Random(config.seed)
    relations = defaultdict(list)
    for fact in facts:
        relations[fact["relation"]].append(fact)
    asked = []              # of each relation: its facts, and the prefixes of its prompts
    for relation in sorted(relations):
        rows = relations[relation]
        rng.shuffle(rows)
        prompts = config.prompts if config.shots else 1
        aside = max(config.shots, min(config.shots * prompts, len(rows) // 10))
        exemplars, rows = rows[:aside], rows[aside:]
        prefixes = []
        for _ in range(prompts if rows else 0):
            shown = [to_row(fact) for fact in rng.sample(exemplars, config.shots)]
            prefixes.append("".join(row["prompt"] + row["completion"] for row in shown))
        asked.append((rows, prefixes))
        check_lengths(model, tokenizer, rows, prefixes)
    labelled = []
    total = sum(len(rows) * len(prefixes) for rows, prefixes in asked)
    with tqdm(total=total, desc="labelling", unit="question", disable=None) as bar:
        for rows, prefixes in asked:
            scores = []
            for prefix in prefixes:
                scores.append(score_answers(model, tokenizer, prefix, rows, config.batch_size))
                bar.update(len(rows))
            for i, fact in enumerate(rows):
                greedy = [right[i] for right, _ in scores]
                probability = [chances[i] for _, chances in scores]
                labelled.append(fact | {"category": slick_category(greedy, probability)})
    return labelled


def check_lengths(model, tokenizer, facts, prefixes):
    """Refuse questions that are too long for the model behind the longest of the prefixes."""
    rows = [to_row(fact) for fact in facts]
    questions = [row["prompt"] + max(row["answers"], key=len) + "\n" for row in rows]
    longest = 0
    for pieces in (questions, prefixes):
        longest += max((len(tokenize(tokenizer, piece)[0]) for piece in pieces), default=0)
    if longest > context_length(model):
        fail(f"a question behind its few-shot prompt may have {longest} tokens, but the model "
             f"reads {context_length(model)}; lower --shots")


# ------------------------------------------------------------------------------------- new facts

def recombine(names, rng, overlap, real_words):
    """An invented name: the first half of the words of one of `names`, the last half of another's
    (or, by chance, of the same one's: "Lord of of Rings").

    Of the two halves `overlap` are real; in place of the others stand invented words that are not
    in `real_words`, a set.
    """
    a = rng.choice(names).split()
    b = rng.choice(names).split()
    halves = [a[:math.ceil(len(a) / 2)], b[len(b) // 2:]]
    for i in rng.sample(range(2), 2 - overlap):
        while not real_words.isdisjoint(halves[i]):
            halves[i] = invent_words(1, rng)
    return " ".join(halves[0] + halves[1])


def invent_facts(facts, config, rng):
    """--n-new facts (or a few more) of entities that do not exist, with semantic or uuid names.

    An invented entity is asked what a random real one is asked, and its answers are drawn evenly
    from the objects of each relation: Unknown by construction. Ends the program when no question
    names its subject, or when the names cannot make enough new ones.
    """
    semantic = config.new == "semantic"
    asked = defaultdict(dict)           # subject: its relations, of all facts
    objects = defaultdict(dict)         # relation: its objects; dicts, since they keep the order
    forms = defaultdict(Counter)        # relation: its questions with {} for the subject
    named = set()
    words = set()
    for fact in facts:
        subject = fact["subject"]
        relation = fact["relation"]
        asked[subject][relation] = True
        objects[relation][fact["answers"][0]] = True
        words.update(subject.split(), *(answer.split() for answer in fact["answers"]))
        if fact["kind"] == "name":
            named.add(subject)
        if fact["question"].count(subject) == 1:        # "Who wrote W?" would be torn apart
            forms[relation][fact["question"].replace(subject, "{}")] += 1
    siblings = defaultdict(list)        # a name is recombined with others of its relation
    parents = []
    for subject, relations in asked.items():
        if forms.keys() >= relations.keys() and (subject in named or not semantic):
            parents.append(subject)
            siblings[next(iter(relations))].append(subject)
    if not parents:
        fail(f"--new {config.new}: no question contains its subject, so none can be asked of an "
             "invented one; use --new unknown")
    new = []
    taken = set(map(normalize, asked))
    for _ in range(20 * config.n_new + 1000):
        if len(new) >= config.n_new:
            break
        relations = asked[rng.choice(parents)]
        if semantic:
            name = recombine(siblings[next(iter(relations))], rng, config.overlap, words)
        else:
            name = invent_code(rng) if config.model == "tiny" else invent_uuid(rng)
        if normalize(name) in taken:
            continue
        taken.add(normalize(name))
        for relation in relations:
            form, _ = forms[relation].most_common(1)[0]
            new.append({"relation": relation, "subject": name, "question": form.replace("{}", name),
                        "answers": [rng.choice(list(objects[relation]))],
                        "kind": "name" if semantic else "code", "category": "Unknown"})
    if len(new) < config.n_new:
        fail(f"--n-new {config.n_new}: only {len(new)} facts with new names could be made from "
             f"{len(parents)} entities; ask for fewer")
    return new


# ---------------------------------------------------------------------------------- the three sets

def cap_objects(facts):
    """`facts` without those whose object has been a fifth of the relation's facts already.

    In real relations one object often dominates: knowing it would pass for knowing the facts."""
    sizes = Counter(fact["relation"] for fact in facts)
    seen = Counter()
    kept = []
    for fact in facts:
        relation = fact["relation"]
        answer = normalize(fact["answers"][0])
        if seen[relation, answer] < max(1, sizes[relation] // 5):
            seen[relation, answer] += 1
            kept.append(fact)
    return kept


def split_facts(facts, labelled, config, rng):
    """{"unknown", "known", "heldout"}: lists of facts; no held-out subject is trained on.

    At most half of the known facts are trained on. The same `rng` and --n-known give the same
    held-out facts, whatever the new ones are. Ends the program when the model knows too few facts
    to measure anything.
    """
    by_subject = defaultdict(list)
    for fact in labelled:
        if fact["category"] == "HighlyKnown":
            by_subject[normalize(fact["subject"])].append(fact)
    subjects = list(by_subject)
    rng.shuffle(subjects)
    known = list(itertools.chain(*(by_subject[subject] for subject in subjects)))
    half = min(config.n_known, len(known) // 2)
    trained = {normalize(fact["subject"]) for fact in known[:half]}
    others = [fact for fact in known[half:] if normalize(fact["subject"]) not in trained]
    sets = {"known": known[:half], "heldout": cap_objects(others)}
    if config.new == "unknown":
        held = {normalize(fact["subject"]) for fact in sets["heldout"]}
        unknown = [fact for fact in labelled if fact["category"] == "Unknown"
                   and normalize(fact["subject"]) not in held]
        rng.shuffle(unknown)
        sets["unknown"] = unknown[:config.n_new]
    else:
        sets["unknown"] = invent_facts(facts, config, rng)
    wanted = {"known": config.n_known, "unknown": config.n_new}
    for key, rows in sets.items():
        if len(rows) < LEAST[key]:
            counts = Counter(fact["category"] for fact in labelled)
            fail(f"{len(rows)} facts for {SETS[key]}, at least {LEAST[key]} are needed; labelled: "
                 f"{dict(counts)}. Raise --max-facts, lower --prompts (fewer prompts, more "
                 "HighlyKnown) or --shots (fewer exemplars set aside), or take another model")
        if len(rows) < wanted.get(key, 0):
            print(f"{len(rows)} instead of {wanted[key]} facts in {SETS[key]}: there are no more "
                  "(known facts: at most half are trained on; real new ones: none about a "
                  "held-out subject)")
    return sets


# ----------------------------------------------------------------------------------- the program

def digest(thing):
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]


def label_settings(model, tokenizer, facts, config):
    """{what: value} of all that labels depend on: where one differs, facts must be asked anew."""
    rows = [to_row(fact) for fact in facts]
    encoded = [tokenize(tokenizer, row["prompt"], row["completion"]) for row in rows]
    names = ("width", "prompts", "shots", "seed", "dtype")
    settings = {name: getattr(config, name) for name in names}
    return settings | {"weights": weights_hash(model), "facts": digest(facts), "template": PROMPT,
                       "tokenizer": digest([encoded, stop_ids(tokenizer, model)]),
                       "samples": SAMPLES, "temperature": TEMPERATURE}


def reuse_labels(folder, facts, wanted):
    """`facts` with their categories in the fact folder `folder`, refused if asked otherwise.

    wanted: of `label_settings`."""
    by_prompt = {to_row(fact)["prompt"]: fact for fact in facts}
    try:
        made = json.loads((Path(folder) / "meta.json").read_text("utf-8"))["labels"]
        for what, value in wanted.items():
            if made[what] != value:
                fail(f"--reuse {folder}: its labels are for {what} {made[what]!r}, not {value!r}")
        rows = read_jsonl(Path(folder) / "labelled.jsonl", ["prompt", "category"])
        return [by_prompt[row["prompt"]] | {"category": row["category"]} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"--reuse {folder}: is not as it is made today ({error!r}); label the facts anew")


def majority_accuracy(facts):
    """The accuracy of always giving the commonest answer of the relation, 0..1."""
    answers = defaultdict(Counter)
    for fact in facts:
        answers[fact["relation"]][normalize(fact["answers"][0])] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(facts)


def make(config, folder):
    """Make the fact folder that `config` (of `parse`) describes, in `folder`, an empty one."""
    import torch
    import transformers
    device = find_device(config.device)
    if config.dtype == "auto":
        config.dtype = "float32"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            config.dtype = "bfloat16"
    start = config.model
    left_out = Counter()
    if config.model == "tiny":
        facts, text = invent_world(config.n_names, config.n_codes, config.seed)
        start = folder / "base"
        if config.reuse:
            shutil.copytree(Path(config.reuse) / "base", start)
        else:
            transformers.logging.disable_progress_bar()
            for part in pretrain(text, config.width, config.seed, device):
                part.save_pretrained(start)
    else:
        relations = config.relations.split(",") if config.relations else None
        facts, left_out = load_source(config.source, config.max_facts, config.seed, relations)
    model, tokenizer = load_model(start, device)
    settings = label_settings(model, tokenizer, facts, config)
    if config.reuse:
        labelled = reuse_labels(config.reuse, facts, settings)
    else:
        with torch.autocast(device.type, getattr(torch, config.dtype),
                            enabled=config.dtype != "float32"):
            labelled = label_facts(model, tokenizer, facts, config)
    if not labelled:
        fail(f"of {len(facts)} facts none is left to be labelled; lower --shots {config.shots}")
    left_out["set aside as exemplars"] = len(facts) - len(labelled)
    counts = defaultdict(Counter)
    for fact in labelled:
        counts[fact["relation"]][fact["category"]] += 1
    kept = set()
    for relation, n in counts.items():      # known is what is not Unknown
        if (n.total() - n["Unknown"]) / n.total() >= config.min_known:
            kept.add(relation)
    asked = [fact for fact in labelled if fact["relation"] in kept]
    facts = [fact for fact in facts if fact["relation"] in kept]
    meta = vars(config) | {"weights": settings["weights"], "labels": settings, "labelled": counts,
                           "left_out": +left_out, "relations_kept": sorted(kept)}
    write_jsonl(folder / "labelled.jsonl", [to_row(fact) for fact in labelled])
    write_jsonl(folder / "meta.json", [meta])
    print(f"labelled: {dict(sum(counts.values(), Counter()))}; rows left out: {dict(+left_out)}")
    if not kept:
        fail(f"--min-known {config.min_known}: no relation is known so well: {dict(counts)}")
    sets = split_facts(facts, asked, config, random.Random(config.seed))
    for key, rows in sets.items():
        write_jsonl(folder / SETS[key], [to_row(fact) for fact in rows])
    meta |= {"sets": {key: len(rows) for key, rows in sets.items()},
             "majority_answer_accuracy": majority_accuracy(sets["heldout"])}
    print(f"{meta['sets']}; always the commonest answer: {meta['majority_answer_accuracy']:.3f}")
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def find_files(config):
    """Paths of the JSONL files of an sft_*.py script: {"unknown", "known", "heldout"}.

    Those that its `config` names, or else those of its fact folder, made here if it is absent."""
    folder = Path(config.facts)
    if not (folder / "meta.json").exists():
        main(["--model", config.model, "--out", config.facts, "--device", config.device,
              "--dtype", config.dtype])
    named = {"known": config.known, "heldout": config.heldout}
    return {key: named.get(key) or str(folder / file) for key, file in SETS.items()}


def main(argv=None):
    """Make a fact folder as command-line words say; returns its path."""
    import torch
    config = parse(argv)
    # It is made beside its place and renamed when it is whole.
    out = Path(config.out).resolve()
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        fail(f"--out {config.out}: cannot be made ({error.strerror})")
    try:
        make(config, temporary)
        if config.overwrite:
            shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    except torch.OutOfMemoryError:
        fail(f"out of memory; lower --batch-size {config.batch_size}")
    except (OSError, SafetensorError) as error:
        fail(f"{error}")
    finally:
        if (temporary / "labelled.jsonl").exists() and not config.reuse:
            # What failed came after the labels, which took long.
            labels = out.with_name(f"{out.name}-labels-{os.getpid()}")
            os.replace(temporary, labels)
            print(f"the labels are kept: --reuse {labels}")
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(config.out)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")   # for a table of facts in any script, on Windows too
    main()
