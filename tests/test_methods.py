"""The training scripts: losses against independent references, the loop's invariants, and what the scripts share."""
import ast
import copy
import json
import math
import re

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, call, counts_of, plain_loss, rows_of, trained

import sft_baseline
import sft_selfdistill

METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]


@pytest.fixture
def examples(base, world, tmp_path):
    """Training examples of unequal lengths."""
    facts = rows_of(world / "train_known.jsonl")[:8]
    lines = [json.dumps(fact | {"prompt": "Q: " * (i % 3) + fact["prompt"]}) for i, fact in enumerate(facts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return sft_baseline.read_examples(tmp_path / "rows.jsonl", base[1], 128)


def config_of(**settings):
    return sft_selfdistill.Config(**{"kl_weight": 1.0, "temperature": 2.0, "batch_size": 3, "device": "cpu", "dtype": "float32", **settings})


@pytest.fixture
def student_teacher(base):
    """Two different models of one architecture."""
    teacher, student = base[0], copy.deepcopy(base[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn_like(p)
    return student, teacher


def distil_loss(student, teacher, examples, config):
    """The self-distillation loss of `student`: loss_function(batch, counts)."""
    head = sft_selfdistill.cache_teacher(teacher, examples, config)
    return lambda batch, counts: sft_selfdistill.self_distillation(student, head, batch, counts, config)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_kl_equals_torch(student_teacher, examples, tau):
    student, teacher = student_teacher
    config = config_of(kl_weight=3.0, temperature=tau)
    loss_function = distil_loss(student, teacher, examples, config)
    batch = sft_selfdistill.collate(examples, "cpu")
    loss, terms = loss_function(batch, counts_of([batch]))
    # the reference goes row by row, without padding and without the script's masks
    kl, n, ce, supervised = 0.0, 0, 0.0, 0
    for example in examples:
        ids, prompt = example["ids"], int((~example["supervised"]).sum())
        with torch.no_grad():
            s, t = (m(input_ids=ids[None]).logits[0, :-1].double() for m in (student, teacher))
        kl += F.kl_div(F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1), reduction="sum", log_target=True)
        n += len(ids) - 1
        ce += F.cross_entropy(s[prompt - 1:], ids[prompt:], reduction="sum")
        supervised += len(ids) - prompt
    assert terms["kl"].item() == pytest.approx(float(kl / n), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(float(ce / supervised), rel=1e-4)
    assert loss.item() == pytest.approx(float(ce / supervised + 3.0 * tau ** 2 * kl / n), rel=1e-4)


def test_kl_by_hand():
    """Two positions, two tokens: KL((¾, ¼) ‖ (½, ½)) = ¾ ln 1.5 + ¼ ln 0.5 at the first, 0 at the second."""
    student, teacher = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    kl = sft_selfdistill.kl_sum(student, teacher, torch.nn.Identity(), torch.nn.Identity(), 1.0)
    assert kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_reads_zero_when_equal(base, examples, dtype):
    config = config_of(dtype=dtype)
    loss_function = distil_loss(base[0], base[0], examples, config)
    batch = sft_selfdistill.collate(examples, "cpu")
    with sft_selfdistill.autocast(config):
        _, terms = loss_function(batch, counts_of([batch]))
    assert abs(terms["kl"]) < 1e-6 and terms["ce"] > 0


def test_kl_is_finite_where_the_teacher_is_certain(student_teacher, examples):
    student, teacher = (copy.deepcopy(model) for model in student_teacher)
    for model in (student, teacher):
        model.transformer.ln_f.weight.data *= 1e4
    batch = sft_selfdistill.collate(examples, "cpu")
    loss, terms = distil_loss(student, teacher, examples, config_of(temperature=0.5))(batch, counts_of([batch]))
    loss.backward()
    assert terms["kl"] > 100 and all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_chunks_change_nothing(monkeypatch, student_teacher, examples):
    """In fp64: loss and gradient in chunks of seven positions, whose distributions are made twice, and in one chunk."""
    student, teacher = (copy.deepcopy(model).double() for model in student_teacher)
    config = config_of()
    monkeypatch.setattr(torch, "float32", torch.float64)            # what cache_teacher keeps
    loss_function = distil_loss(student, teacher, examples, config)
    monkeypatch.undo()
    batch, found, sizes, kl_sum = sft_selfdistill.collate(examples, "cpu"), [], [], sft_selfdistill.kl_sum
    monkeypatch.setattr(sft_selfdistill, "kl_sum", lambda part, *more: sizes.append(len(part)) or kl_sum(part, *more))
    for chunk in (7, 10 ** 6):
        monkeypatch.setattr(sft_selfdistill, "CHUNK", chunk * student.config.vocab_size)
        student.zero_grad()
        loss, _ = loss_function(batch, counts_of([batch]))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-7) and torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-9)
    n = counts_of([batch])["real"]
    assert sizes.pop() == n and max(sizes) == 7 and sum(sizes) == 2 * n


TINY = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90}, "llama": TINY, "gpt_neox": TINY,
          "gemma2": TINY | {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5},
          "granite": TINY | {"logits_scaling": 4.0}, "cohere": TINY | {"logit_scale": 0.1},
          "rembert": TINY | {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24}}     # its head is not linear


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_and_head_are_the_model(capsys, kind):
    """CE and its gradient are those of the model's own logits; a model whose logits are something else is refused."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **MODELS[kind])).eval()
    examples = []
    for first, last, prompt in ((3, 12, 5), (40, 47, 2), (20, 29, 8)):
        ids = torch.arange(first, last)
        examples.append({"ids": ids, "real": torch.ones_like(ids), "supervised": torch.arange(len(ids)) >= prompt})
    batch = sft_baseline.collate(examples, "cpu")
    if kind in ("gemma2", "granite", "cohere", "rembert"):
        with pytest.raises(SystemExit):
            sft_baseline.check_head(model, sft_baseline.collate(examples[:1], "cpu"), kind)
        assert f"--model {kind}: caps or scales its logits" in capsys.readouterr().err
        return
    sft_baseline.check_head(model, sft_baseline.collate(examples[:1], "cpu"), kind)
    whole = model(input_ids=batch["ids"], attention_mask=batch["real"]).logits[:, :-1]
    mask, found = batch["supervised"][:, 1:], []
    for loss in (plain_loss(sft_baseline, model)(batch, counts_of([batch]))[0],
                 F.cross_entropy(whole[mask].float(), batch["ids"][:, 1:][mask])):
        model.zero_grad()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


def gradient(loss_function, model, examples, size):
    """The gradient of a window of `examples` cut into batches of `size`."""
    model.zero_grad()
    batches = [sft_selfdistill.collate(part, "cpu") for part in sft_selfdistill.cut(examples, size)]
    for batch in batches:
        loss_function(batch, counts_of(batches))[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulation_changes_nothing(student_teacher, examples):
    student, teacher = student_teacher
    for loss_function in (plain_loss(sft_selfdistill, student), distil_loss(student, teacher, examples, config_of())):
        whole, parts = (gradient(loss_function, student, examples, size) for size in (8, 2))
        assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-5 * whole.abs().max().item())


def test_windows_do_not_depend_on_how_they_are_cut(examples):
    examples = [{"ids": [0] * len(e["ids"]), "n": i} for i, e in enumerate(examples * 5)]       # 40 rows, windows of 8
    one, four, next_epoch = (
        sft_baseline.make_windows(examples, 2, epoch, config_of(batch_size=size, accumulate=8 // size, seed=3))
        for size, epoch in ((8, 1), (2, 1), (8, 2)))
    assert [sum(w, []) for w in one] == [sum(w, []) for w in four] and {len(b) for w in four for b in w} == {2}
    rows = sum(sum(one, []), [])
    assert one != next_epoch and sorted(row["n"] for row in rows) == list(range(40))
    assert all(lengths == sorted(lengths) for lengths in ([len(e["ids"]) for e in sum(w, [])] for w in one))


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_without_kl_the_step_is_the_baselines(base, examples):
    plain, distilled = copy.deepcopy(base[0]), copy.deepcopy(base[0])
    trained(sft_baseline, plain, examples, plain_loss(sft_baseline, plain))
    trained(sft_selfdistill, distilled, examples, distil_loss(distilled, base[0], examples, config_of(kl_weight=0.0)))
    assert same_weights(plain, distilled) and not same_weights(plain, base[0])


def test_the_teacher_does_not_learn(base, examples):
    """The KL is 0 at the first step alone, and what the teacher says stays as it was, though the student's head is trained."""
    student, seen = copy.deepcopy(base[0]), []
    head = sft_selfdistill.cache_teacher(student, examples, config_of())
    before = [head(example["teacher"]) for example in examples]

    def loss_function(batch, counts):
        loss, terms = sft_selfdistill.self_distillation(student, head, batch, counts, config_of())
        seen.append(terms["kl"].item())
        return loss, terms
    trained(sft_selfdistill, student, examples, loss_function, weight_decay=0.5)
    assert abs(seen[0]) < 1e-6 and min(seen[1:]) > 1e-6
    for example, said in zip(examples, before):
        assert torch.equal(head(example["teacher"]), said)
        own = base[0](example["ids"][None]).logits[0, :-1]
        assert torch.allclose(said, own, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(student(example["ids"][None]).logits[0, :-1], own, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_learns(base, examples, dtype):
    model = copy.deepcopy(base[0])
    metrics = trained(sft_baseline, model, examples, plain_loss(sft_baseline, model), dtype=dtype)
    assert metrics[1]["ce"] < metrics[0]["ce"] and all(math.isfinite(m["ce"]) for m in metrics)


def test_epoch_loss_is_the_mean_of_its_windows(base, examples, capsys):
    config = {"batch_size": 1, "accumulate": 4, "learning_rate": 0.0}
    metrics = trained(sft_baseline, base[0], examples, plain_loss(sft_baseline, base[0]), **config)
    means = []
    for window in sft_baseline.make_windows(examples, 2, 1, sft_baseline.Config(**config)):
        losses, n = 0.0, 0
        for example in sum(window, []):
            ids, prompt = example["ids"], int((~example["supervised"]).sum())
            losses += F.cross_entropy(base[0](ids[None]).logits[0, prompt - 1:-1], ids[prompt:], reduction="sum").item()
            n += len(ids) - prompt
        means.append(losses / n)
    assert metrics[0]["ce"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    first = re.search(r"stage 2, step 1: {'ce': ([\d.]+)", capsys.readouterr().out)
    assert float(first[1]) == pytest.approx(means[0], abs=1e-4)             # the window's loss, not its last batch's


def test_collate_masks_by_length():
    a = {"ids": torch.tensor([5, 6, 7, 0]), "real": torch.ones(4), "supervised": torch.tensor([0, 0, 1, 1]).bool()}
    b = {"ids": torch.tensor([8, 0]), "real": torch.ones(2), "supervised": torch.tensor([0, 1]).bool()}
    batch = sft_baseline.collate([a, b], "cpu")
    assert batch["ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["supervised"].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]                # EOS 0 is learnt, padding is not
    assert batch["real"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]] and batch["examples"] == [a, b]


def test_learning_rate():
    config = sft_baseline.Config(learning_rate=1.0, warmup=0.1)
    rates = [sft_baseline.get_lr(step, 100, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[99] == pytest.approx(0.1) and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[55] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 45 / 89)))
    assert all(math.isfinite(sft_baseline.get_lr(0, total, sft_baseline.Config(learning_rate=1.0, warmup=w)))
               for total in (1, 2) for w in (0.0, 1.0))


# ------------------------------------------------------------------------------------------------------ one tokenization

def tokenizer_of(family):
    """A tokenizer of the world's texts, of a family by how it cuts and what it adds."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    text = ["Q: Who made Genis?\nA: Genis Co.\n", "Q: Where is Ulm?\nA: Ulm.\n", "Q: What?\nA: Genis Ulm\n"] * 9
    own = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    special = ["<unk>", "<s>", "</s>", "\n"] if family == "sentencepiece, prefix" else ["<unk>", "<s>", "</s>"]
    if family.startswith("sentencepiece"):
        prefix = [normalizers.Prepend("▁")] * family.endswith(", prefix")
        own.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        own.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|\n|▁"), "isolated")
        own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    elif family == "wordpiece-like":
        own.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
        own.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[A-Za-z]+| ?[^A-Za-z ]"), "isolated")
        own.decoder = decoders.Fuse()
    else:
        pattern = {"qwen": r" ?[A-Za-z]+| ?[^\sA-Za-z]+[\n]*|\s", "letters and newline": r" ?[A-Za-z.]+\n?| ?[^\sA-Za-z]|\s"}.get(
            family, r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s")
        own.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        own.decoder = decoders.ByteLevel()
    own.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    around = {"adds bos": "<s> $A", "adds both": "<s> $A </s>", "sentencepiece, prefix": "<s> $A"}.get(family)
    if around:
        ids = [(token, own.token_to_id(token)) for token in ("<s>", "</s>")]
        own.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAMILIES = ["byte-level", "qwen", "sentencepiece", "sentencepiece, prefix", "wordpiece-like", "adds bos", "adds both"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_cut_into_tokens_once(family, tmp_path):
    """Prompt and completion are the tokens of the whole text, whatever the tokenizer does at a text's beginning and end."""
    tokenizer, eos = tokenizer_of(family), 2
    prompt, completion = "Q: Who made Genis?\nA:", " Genis Co.\n"
    before, after = sft_baseline.tokenize(tokenizer, prompt, completion)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert before + after == whole[:-1] if family == "adds both" else before + after == whole
    assert before == sft_baseline.tokenize(tokenizer, prompt)[0] and eos not in before
    assert (before[0] == 1) == (family in ("adds bos", "adds both", "sentencepiece, prefix")) and 1 not in before[1:] + after
    alone = tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert (after != alone) == (family == "sentencepiece, prefix")
    # a rendered chat template brings its BOS along
    assert sft_baseline.tokenize(tokenizer, "<s>" + prompt, completion)[0].count(1) == 1
    # the end: a token with a newline in it, or EOS
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt, "completion": c}) + "\n" for c in (
        completion, " Genis Co.", " Genis</s>")))
    ends = [e["ids"][-2:].tolist() for e in sft_baseline.read_examples(tmp_path / "rows.jsonl", tokenizer, 99)]
    assert (ends[0][1] == eos) == (family == "wordpiece-like") and ("\n" in tokenizer.decode(ends[0])) == (family != "wordpiece-like")
    assert ends[1][1] == ends[2][1] == eos and ends[1][0] != eos


def test_a_token_over_the_border_is_cut_apart(base):
    """Where the prompt's tokens do not begin the whole text's, prompt and completion are encoded apart."""
    before, after = sft_baseline.tokenize(base[1], "Q: Wh", "at is")
    assert base[1].decode(before) == "Q: Wh" and base[1].decode(after) == "at is"
    assert before + after != base[1]("Q: What is")["input_ids"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path, capsys):
    tokenizer = tokenizer_of("byte-level")
    tokenizer.eos_token = None
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Q", "completion": "A\\n"}\n{"prompt": "Q", "completion": "A"}\n')
    with pytest.raises(SystemExit):
        sft_baseline.read_examples(tmp_path / "rows.jsonl", tokenizer, 99)
    assert "rows.jsonl:2" in (error := capsys.readouterr().err) and "no EOS" in error


# ---------------------------------------------------------------------------------------------------- what scripts share

def functions_of(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_shared_functions_are_identical():
    """Duplication among the method scripts is deliberate; drifting apart is not. `parse` and `train` may differ."""
    shared = {name: functions_of(name) for name in METHODS}
    for name in set(shared["sft_baseline"]) - {"parse", "train"}:
        assert len({functions[name] for functions in shared.values()}) == 1, f"{name} differs between {METHODS}"
    assert set(shared["sft_selfdistill"]) - set(shared["sft_baseline"]) == {"self_distillation", "kl_sum", "cache_teacher"}
    assert functions_of("eval_hallucination")["tokenize"] == shared["sft_baseline"]["tokenize"]


@pytest.mark.parametrize("name, longest", [*((method, 80) for method in METHODS), ("make_facts", 60), ("eval_hallucination", 60), ("assets/frontier", 60)])
def test_scripts_are_plain(name, longest):
    """What makes a script readable, held where it is: line width, lambdas, length of functions, number of parameters."""
    text = (ROOT / f"{name}.py").read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, (ast.Lambda, ast.NamedExpr))
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < longest and len(node.args.args) <= 7, node.name


def test_eval_every_measures_less_and_trains_the_same(workplace):
    for n in (0, 1, 2):
        call(workplace, "sft_baseline", "--epochs", 3, "--eval-every", n, "--out", f"x{n}")
    measured = [[m["epoch"] for m in rows_of(workplace / f"x{n}/metrics.jsonl") if "heldout" in m] for n in (0, 1, 2)]
    assert measured == [[0, 3], [0, 1, 2, 3], [0, 2, 3]]
    assert len({(workplace / f"x{n}/model.safetensors").read_bytes() for n in (0, 1, 2)}) == 1
    assert "x0" in call(workplace, "eval_hallucination", "x0", "x1", "x2").stdout
