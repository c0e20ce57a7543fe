"""The training scripts: losses against independent references, and the training loop."""
import ast
import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import METHODS, ROOT, call, ce_loss, counts_of, rows_of, train_epochs

import sft_baseline
import sft_selfdistill


@pytest.fixture
def examples(base, world, tmp_path):
    """Return eight training examples of unequal lengths."""
    lines = []
    for i, fact in enumerate(rows_of(world / "train_known.jsonl")[:8]):
        lines.append(json.dumps(fact | {"prompt": "Q: " * (i % 3) + fact["prompt"]}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return sft_baseline.read_examples(tmp_path / "rows.jsonl", base[1], 128)


def config_of(**settings):
    defaults = {"kl_weight": 1.0, "temperature": 2.0, "batch_size": 3, "device": "cpu",
                "dtype": "float32"}
    return sft_selfdistill.Config(**defaults | settings)


@pytest.fixture
def student_teacher(base):
    """Return two models of one architecture with different weights."""
    student = copy.deepcopy(base[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in student.parameters():
            weights += 0.02 * torch.randn_like(weights)
    return student, base[0]


def distillation_loss(student, teacher, examples, config):
    """Return the loss of self-distillation as loss_function(batch, counts)."""
    head = sft_selfdistill.cache_teacher(teacher, examples, config)

    def loss_function(batch, counts):
        return sft_selfdistill.self_distillation(student, head, batch, counts, config)
    return loss_function


def split_ids(example):
    """Return the token ids of an example, and the number of those in the prompt."""
    return example["input_ids"], int((~example["completion"]).sum())


def gradient_of(model):
    """Return the gradient of a model as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# --------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_loss_equals_torch(student_teacher, examples, tau):
    """The reference goes row by row in fp64, without padding and without the script's masks."""
    student, teacher = student_teacher
    config = config_of(kl_weight=3.0, temperature=tau)
    loss_function = distillation_loss(student, teacher, examples, config)
    batch = sft_selfdistill.collate(examples, "cpu")
    loss, terms = loss_function(batch, counts_of([batch]))
    kl = n = ce = n_completion = 0
    for example in examples:
        ids, prompt = split_ids(example)
        with torch.no_grad():
            s, t = (m(input_ids=ids[None]).logits[0, :-1].double() for m in (student, teacher))
        kl += F.kl_div(F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1), reduction="sum",
                       log_target=True).item()
        n += len(ids) - 1
        ce += F.cross_entropy(s[prompt - 1:], ids[prompt:], reduction="sum").item()
        n_completion += len(ids) - prompt
    ce, kl = ce / n_completion, kl / n
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert loss.item() == pytest.approx(ce + 3.0 * tau ** 2 * kl, rel=1e-4)


def test_kl_by_hand():
    """KL((¾, ¼) ‖ (½, ½)) = ¾ ln 1.5 + ¼ ln 0.5 at the first position, 0 at the second."""
    student = torch.zeros(2, 2)
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    identity = torch.nn.Identity()
    kl = sft_selfdistill.kl_sum(student, teacher, identity, identity, 1.0)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_is_zero_if_teacher_and_student_are_equal(base, examples, dtype):
    config = config_of(dtype=dtype)
    loss_function = distillation_loss(base[0], base[0], examples, config)
    batch = sft_selfdistill.collate(examples, "cpu")
    _, terms = loss_function(batch, counts_of([batch]))
    assert abs(terms["kl"]) < 1e-6 and terms["ce"] > 0


def test_kl_is_finite_if_the_teacher_is_certain(student_teacher, examples):
    student, teacher = (copy.deepcopy(model) for model in student_teacher)
    for model in (student, teacher):
        model.transformer.ln_f.weight.data *= 1e4
    loss_function = distillation_loss(student, teacher, examples, config_of(temperature=0.5))
    batch = sft_selfdistill.collate(examples, "cpu")
    loss, terms = loss_function(batch, counts_of([batch]))
    loss.backward()
    assert terms["kl"] > 100 and gradient_of(student).isfinite().all()


def test_chunks_do_not_change_the_kl(monkeypatch, student_teacher, examples):
    """In fp64, chunks of seven positions give the loss and the gradient of a single chunk."""
    student, teacher = (copy.deepcopy(model).double() for model in student_teacher)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    loss_function = distillation_loss(student, teacher, examples, config_of())
    kl_sum = sft_selfdistill.kl_sum
    sizes = []

    def counted(part, *more):
        sizes.append(len(part))
        return kl_sum(part, *more)
    monkeypatch.setattr(sft_selfdistill, "kl_sum", counted)
    batch = sft_selfdistill.collate(examples, "cpu")
    losses, gradients = [], []
    for size in (7, 10 ** 6):
        monkeypatch.setattr(sft_selfdistill, "CHUNK", size * student.config.vocab_size)
        student.zero_grad()
        loss, _ = loss_function(batch, counts_of([batch]))
        loss.backward()
        losses.append(loss.item())
        gradients.append(gradient_of(student))
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9)
    n = counts_of([batch])["predicted"]
    # The logits of small chunks are computed twice.
    assert sizes.pop() == n and max(sizes) == 7 and sum(sizes) == 2 * n


TINY = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64}
ACCEPTED = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90}, "llama": TINY,
            "gpt_neox": TINY}
REJECTED = {
    "gemma2": TINY | {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5},
    "granite": TINY | {"logits_scaling": 4.0},
    "cohere": TINY | {"logit_scale": 0.1},
    # Its head is not linear.
    "rembert": TINY | {"is_decoder": True, "input_embedding_size": 16,
                       "output_embedding_size": 24}}


def random_model(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(ACCEPTED | REJECTED)[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch_of(*spans):
    """Return a batch of rows (first id, last id + 1, prompt length)."""
    examples = []
    for first, end, prompt in spans:
        ids = torch.arange(first, end)
        examples.append({"input_ids": ids, "predicted": torch.ones_like(ids),
                         "completion": torch.arange(len(ids)) >= prompt})
    return sft_baseline.collate(examples, "cpu")


@pytest.mark.parametrize("kind", ACCEPTED)
def test_gradient_equals_that_of_the_models_own_logits(kind):
    model = random_model(kind)
    sft_baseline.check_head(model, batch_of((3, 12, 5)), kind)
    batch = batch_of((3, 12, 5), (40, 47, 2), (20, 29, 8))
    # The reference gets an attention mask, and masks made from the lengths.
    ids = batch["input_ids"]
    position = torch.arange(ids.shape[1])
    lengths, prompts = torch.tensor([9, 7, 9])[:, None], torch.tensor([5, 2, 8])[:, None]
    mask = ((position >= prompts) & (position < lengths))[:, 1:]
    logits = model(input_ids=ids, attention_mask=(position < lengths).long()).logits[:, :-1]
    gradients = []
    for loss in (ce_loss(sft_baseline, model)(batch, counts_of([batch]))[0],
                 F.cross_entropy(logits[mask].float(), ids[:, 1:][mask])):
        model.zero_grad()
        loss.backward()
        gradients.append(gradient_of(model))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", REJECTED)
def test_model_whose_head_does_not_give_its_logits_is_rejected(capsys, kind):
    with pytest.raises(SystemExit):
        sft_baseline.check_head(random_model(kind), batch_of((3, 12, 5)), kind)
    assert f"--model {kind}: its logits are not its LM head applied" in capsys.readouterr().err


# --------------------------------------------------------------------------------- training loop

def test_gradient_accumulation_does_not_change_the_gradient(student_teacher, examples):
    student, teacher = student_teacher
    for loss_function in (ce_loss(sft_selfdistill, student),
                          distillation_loss(student, teacher, examples, config_of())):
        gradients = []
        for size in (8, 2):
            student.zero_grad()
            batches = [sft_selfdistill.collate(rows, "cpu")
                       for rows in sft_selfdistill.chunks(examples, size)]
            for batch in batches:
                loss_function(batch, counts_of(batches))[0].backward()
            gradients.append(gradient_of(student))
        tolerance = 1e-5 * gradients[0].abs().max().item()
        assert torch.allclose(*gradients, rtol=1e-3, atol=tolerance)


def test_steps_do_not_depend_on_batch_size(examples):
    rows = []
    for i, example in enumerate(examples * 5):
        rows.append({"input_ids": [0] * len(example["input_ids"]), "n": i})
    found = []
    for batch_size, epoch in ((8, 1), (2, 1), (8, 2)):
        config = config_of(batch_size=batch_size, gradient_accumulation_steps=8 // batch_size,
                           seed=3)
        steps = sft_baseline.make_steps(rows, 2, epoch, config)
        assert {len(batch) for batches in steps for batch in batches} == {batch_size}
        found.append([sum(batches, []) for batches in steps])
    assert found[0] == found[1] != found[2]
    assert sorted(row["n"] for row in sum(found[0], [])) == list(range(40))
    for step in found[0]:
        lengths = [len(row["input_ids"]) for row in step]
        assert lengths == sorted(lengths)


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_without_kl_training_equals_the_baseline(base, examples):
    plain, distilled = copy.deepcopy(base[0]), copy.deepcopy(base[0])
    train_epochs(sft_baseline, plain, examples, ce_loss(sft_baseline, plain))
    loss_function = distillation_loss(distilled, base[0], examples, config_of(kl_weight=0.0))
    train_epochs(sft_selfdistill, distilled, examples, loss_function)
    assert same_weights(plain, distilled) and not same_weights(plain, base[0])


def test_teacher_does_not_change(base, examples):
    """The KL is 0 at the first step only: training the student's head leaves the teacher alone."""
    student = copy.deepcopy(base[0])
    config = config_of()
    head = sft_selfdistill.cache_teacher(student, examples, config)
    before = [head(example["teacher"]) for example in examples]
    kl = []

    def loss_function(batch, counts):
        loss, terms = sft_selfdistill.self_distillation(student, head, batch, counts, config)
        kl.append(terms["kl"].item())
        return loss, terms
    train_epochs(sft_selfdistill, student, examples, loss_function, weight_decay=0.5)
    assert abs(kl[0]) < 1e-6 and min(kl[1:]) > 1e-6
    for example, logits in zip(examples, before):
        ids = example["input_ids"][None]
        expected = base[0](ids).logits[0, :-1]
        assert torch.equal(head(example["teacher"]), logits)
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(student(ids).logits[0, :-1], expected, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_precision_learns(base, examples, dtype):
    model = copy.deepcopy(base[0])
    loss_function = ce_loss(sft_baseline, model)
    first, last = train_epochs(sft_baseline, model, examples, loss_function, dtype=dtype)
    assert last["ce"] < first["ce"] and all(math.isfinite(m["ce"]) for m in (first, last))


def test_logged_loss_is_the_mean_over_steps(base, examples, capsys):
    settings = {"batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0}
    loss_function = ce_loss(sft_baseline, base[0])
    metrics = train_epochs(sft_baseline, base[0], examples, loss_function, **settings)
    means = []
    for batches in sft_baseline.make_steps(examples, 2, 1, sft_baseline.Config(**settings)):
        losses = n = 0
        for example in sum(batches, []):
            ids, prompt = split_ids(example)
            logits = base[0](ids[None]).logits[0, prompt - 1:-1]
            losses += F.cross_entropy(logits, ids[prompt:], reduction="sum").item()
            n += len(ids) - prompt
        means.append(losses / n)
    assert metrics[0]["ce"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    # The printed loss is that of the step, not of its last batch.
    first = re.search(r"stage 2, step 1: {'ce': ([\d.]+)", capsys.readouterr().out)
    assert float(first[1]) == pytest.approx(means[0], abs=1e-4)


def test_collate_masks_by_length():
    """A last token 0, which is EOS here, is learned. Padding, which is 0 too, is not."""
    a = {"input_ids": torch.tensor([5, 6, 7, 0]), "predicted": torch.ones(4),
         "completion": torch.tensor([0, 0, 1, 1])}
    b = {"input_ids": torch.tensor([8, 0]), "predicted": torch.ones(2),
         "completion": torch.tensor([0, 1])}
    batch = sft_baseline.collate([a, b], "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    # Indices into [[5 → 6, 6 → 7, 7 → 0], [8 → 0, padding, padding]].
    assert batch["predicted"].tolist() == [0, 1, 2, 3]
    assert batch["completion"].tolist() == [1, 2, 3]
    assert batch["examples"] == [a, b]


def test_learning_rate():
    config = sft_baseline.Config(learning_rate=1.0, warmup_ratio=0.1)
    rates = [sft_baseline.get_lr(step, 100, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[99] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 45 / 89)))
    for ratio in (0.0, 1.0):
        config = sft_baseline.Config(learning_rate=1.0, warmup_ratio=ratio)
        assert all(math.isfinite(sft_baseline.get_lr(0, total, config)) for total in (1, 2))


def test_log_prints_one_line_per_epoch(capsys):
    sft_baseline.log({"stage": 2, "epoch": 12, "ce": 0.0312, "kl": 0.00213,
                      "seconds_per_step": 1.42, "new": 0.985, "known": 1.0, "kept": 0.9921})
    assert capsys.readouterr().out == (
        "epoch 12 | ce 0.031 | kl 0.0021 | new 0.985 | known 1.000 | kept 0.992 | 1.4 s/step\n")


def test_eval_every_does_not_change_training(workplace):
    measured, weights = [], set()
    for n in (0, 1, 2):
        call(workplace, "sft_baseline", "--epochs", 3, "--eval-every", n, "--out", f"x{n}")
        metrics = rows_of(workplace / f"x{n}/metrics.jsonl")
        measured.append([row["epoch"] for row in metrics if "kept" in row])
        weights.add((workplace / f"x{n}/model.safetensors").read_bytes())
    assert measured == [[0, 3], [0, 1, 2, 3], [0, 2, 3]] and len(weights) == 1
    assert "x0" in call(workplace, "eval_hallucination", "x0", "x1", "x2").stdout


# --------------------------------------------------------------------------------- tokenization

WORDS = r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s"
FAMILIES = {        # a tokenizer's splits, and the special tokens that it adds
    "byte-level": (WORDS, None),
    "qwen": (r" ?[A-Za-z]+| ?[^\sA-Za-z]+[\n]*|\s", None),
    "adds bos": (WORDS, "<s> $A"),
    "adds both": (WORDS, "<s> $A </s>"),
    "sentencepiece": ("▁?[^▁\n]+|\n|▁", None),
    "sentencepiece, prefix": ("▁?[^▁\n]+|\n|▁", "<s> $A"),
    "letters and newline": (r" ?[A-Za-z.]+\n?| ?[^\sA-Za-z]|\s", None),
    "wordpiece-like": (" ?[A-Za-z]+| ?[^A-Za-z ]", None)}


def tokenizer_of(family):
    """Train a small tokenizer of the given family."""
    from tokenizers import (Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                            processors, trainers)
    own = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    special = ["<unk>", "<s>", "</s>"]
    pattern, template = FAMILIES[family]
    own.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    own.decoder = decoders.Fuse()
    if family.startswith("sentencepiece"):
        replace = [normalizers.Replace(" ", "▁")]
        if family.endswith("prefix"):
            special.append("\n")
            replace.insert(0, normalizers.Prepend("▁"))
        own.normalizer = normalizers.Sequence(replace)
        own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    elif family == "wordpiece-like":
        own.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    else:
        own.pre_tokenizer = pre_tokenizers.Sequence([
            own.pre_tokenizer,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        own.decoder = decoders.ByteLevel()
    text = ["Q: Who made Genis?\nA: Genis Co.\n", "Q: Where is Ulm?\nA: Ulm.\n",
            "Q: What?\nA: Genis Ulm\n"]
    own.train_from_iterator(text * 9, trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if template:
        ids = [(token, own.token_to_id(token)) for token in ("<s>", "</s>")]
        own.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_are_tokenized_as_one_text(family, tmp_path):
    tokenizer = tokenizer_of(family)
    bos, eos = 1, 2
    prompt, completion = "Q: Who made Genis?\nA:", " Genis Co.\n"
    prompt_ids, completion_ids = sft_baseline.tokenize(tokenizer, prompt, completion)
    whole = tokenizer(prompt + completion)["input_ids"]
    if family == "adds both":
        assert whole.pop() == eos
    assert prompt_ids + completion_ids == whole
    assert prompt_ids == sft_baseline.tokenize(tokenizer, prompt)[0] and eos not in prompt_ids
    assert (prompt_ids[0] == bos) == (FAMILIES[family][1] is not None)
    assert bos not in prompt_ids[1:] + completion_ids
    alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert (completion_ids != alone) == (family == "sentencepiece, prefix")
    # A rendered chat template already contains its BOS.
    assert sft_baseline.tokenize(tokenizer, "<s>" + prompt, completion)[0].count(bos) == 1
    # A completion ends with a token that contains a newline, or with EOS.
    rows = [{"prompt": prompt, "completion": text}
            for text in (completion, " Genis Co.", " Genis</s>")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = sft_baseline.read_examples(tmp_path / "rows.jsonl", tokenizer, 99)
    first, second, third = [example["input_ids"][-2:].tolist() for example in examples]
    has_no_newline = family == "wordpiece-like"
    assert (first[1] == eos) == ("\n" not in tokenizer.decode(first)) == has_no_newline
    assert second[1] == third[1] == eos and eos not in (second[0], third[0])


def test_prompt_that_ends_within_a_token_is_tokenized_separately(base):
    tokenizer = base[1]
    prompt_ids, completion_ids = sft_baseline.tokenize(tokenizer, "Q: Wh", "at is")
    assert tokenizer.decode(prompt_ids) == "Q: Wh" and tokenizer.decode(completion_ids) == "at is"
    assert prompt_ids + completion_ids != tokenizer("Q: What is")["input_ids"]


def test_row_that_needs_a_missing_eos_is_rejected(tmp_path, capsys):
    tokenizer = tokenizer_of("byte-level")
    tokenizer.eos_token = None
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "Q", "completion": "A\\n"}\n{"prompt": "Q", "completion": "A"}\n')
    with pytest.raises(SystemExit):
        sft_baseline.read_examples(tmp_path / "rows.jsonl", tokenizer, 99)
    assert "rows.jsonl:2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- source code

def functions_of(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_shared_functions_are_identical():
    """The method scripts differ only in parse_args, in train and in their own functions.

    sft_freeze.py changes the optimizer, too.
    """
    baseline, distilled, freeze = [functions_of(name) for name in METHODS]
    for name in baseline.keys() - {"parse_args", "train"}:
        assert baseline[name] == distilled[name], name
        assert baseline[name] == freeze[name] or name == "make_optimizer", name
    own = distilled.keys() - baseline.keys()
    assert own == {"self_distillation", "kl_sum", "cache_teacher"}
    assert functions_of("eval_hallucination")["tokenize"] == baseline["tokenize"]


@pytest.mark.parametrize("name, longest", [
    *((method, 80) for method in METHODS), ("make_facts", 60), ("eval_hallucination", 60),
    ("docs/trainer", 60), ("docs/study/frontier", 60)])
def test_scripts_are_readable(name, longest):
    """Limit line width, function length and number of parameters; allow no lambda or walrus."""
    text = (ROOT / f"{name}.py").read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, (ast.Lambda, ast.NamedExpr))
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < longest and len(node.args.args) <= 7, node.name
