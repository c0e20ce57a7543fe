"""The training scripts: losses against independent references, the loop's invariants, and what the scripts share."""
import ast
import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, plain_loss, window_of

import sft_baseline
import sft_selfdistill

METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]


@pytest.fixture
def rows(base, world):
    """Encoded rows of unequal lengths."""
    facts = sft_baseline.read_rows(world / "train_known.jsonl", {})[:8]
    for i, fact in enumerate(facts):
        fact["prompt"] = "Q: " * (i % 3) + fact["prompt"]
    return sft_baseline.encode(base[1], facts, 128)


def distil_loss(student, teacher, config):
    """The self-distillation loss of `student` with a live `teacher`: loss_function(batch, window)."""
    def loss_function(batch, window):
        states, head_before = sft_selfdistill.split_model(teacher, batch)
        return sft_selfdistill.self_distillation(*sft_selfdistill.split_model(student, batch),
                                                 (torch.no_grad()(states), head_before), batch, window, config)
    return loss_function


def distil_config(**settings):
    return sft_selfdistill.Config(**{"kl_weight": 1.0, "temperature": 2.0, **settings})


@pytest.fixture
def student_teacher(base):
    """Two different models of one architecture."""
    teacher, student = base[0], copy.deepcopy(base[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn_like(p)
    return student, teacher


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("scope", ["all", "completion"])
@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_kl_equals_torch(student_teacher, rows, direction, scope, tau):
    student, teacher = student_teacher
    config = distil_config(kl_weight=3.0, temperature=tau, kl_direction=direction, kl_scope=scope)
    batch = sft_selfdistill.collate(rows, "cpu")
    loss, terms = distil_loss(student, teacher, config)(batch, window_of([batch]))
    # the reference goes row by row, without padding and without the script's masks
    kl, n, ce, supervised = 0.0, 0, 0.0, 0
    for ids, prompt in rows:
        with torch.no_grad():
            s, t = (m(input_ids=torch.tensor([ids])).logits[0, :-1].double() for m in (student, teacher))
        first = 0 if scope == "all" else prompt - 1
        p, q = (F.log_softmax(x[first:] / tau, -1) for x in (t, s))
        kl += F.kl_div(q, p, reduction="sum", log_target=True) if direction == "forward" else F.kl_div(
            p, q, reduction="sum", log_target=True)
        n += len(ids) - 1 - first
        ce += F.cross_entropy(s[prompt - 1:], torch.tensor(ids[prompt:]), reduction="sum")
        supervised += len(ids) - prompt
    assert terms["kl"] == pytest.approx(float(kl / n), rel=1e-4)
    assert terms["ce"] == pytest.approx(float(ce / supervised), rel=1e-4)
    assert loss.item() == pytest.approx(float(ce / supervised + 3.0 * tau ** 2 * kl / n), rel=1e-4)


def test_kl_by_hand():
    """Two positions, two tokens: KL((¾, ¼) ‖ (½, ½)) = ¾ ln 1.5 + ¼ ln 0.5 at the first, 0 at the second."""
    student, teacher = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    same = torch.nn.Identity()
    batch = {"supervised": torch.tensor([[False, True]]), "real": torch.tensor([[True, True]]), "next": torch.tensor([[0, 1]])}
    by_hand = {"forward": 0.75 * math.log(1.5) + 0.25 * math.log(0.5), "reverse": 0.5 * math.log(2 / 3) + 0.5 * math.log(2)}
    for direction, kl in by_hand.items():
        _, terms = sft_selfdistill.self_distillation(
            lambda batch, mask: student, same, (lambda batch, mask: teacher, same), batch, {"supervised": 1, "real": 2},
            distil_config(temperature=1.0, kl_direction=direction))
        assert terms == pytest.approx({"ce": math.log(2), "kl": kl / 2}, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_reads_zero_when_equal(base, rows, dtype):
    batch = sft_selfdistill.collate(rows, "cpu")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        _, terms = distil_loss(base[0], copy.deepcopy(base[0]), distil_config())(batch, window_of([batch]))
    assert abs(terms["kl"]) < 1e-6 and terms["ce"] > 0


def test_kl_is_finite_where_the_teacher_is_certain(student_teacher, rows):
    student, teacher = (copy.deepcopy(model) for model in student_teacher)
    for model in (student, teacher):
        model.transformer.ln_f.weight.data *= 1e4
    batch = sft_selfdistill.collate(rows, "cpu")
    loss, terms = distil_loss(student, teacher, distil_config(temperature=0.5))(batch, window_of([batch]))
    loss.backward()
    assert terms["kl"] > 100 and all(torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.filterwarnings("ignore:In CPU autocast")             # which knows no fp64
@pytest.mark.parametrize("scope", ["all", "completion"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_chunks_and_cache_change_nothing(monkeypatch, student_teacher, rows, scope, direction):
    """In fp64: loss and gradient with a cached teacher and chunks of seven positions, and with a live one in a single chunk."""
    student, teacher = (copy.deepcopy(model).double() for model in student_teacher)
    batch, found, sizes = sft_selfdistill.collate(rows, "cpu"), [], {"cached": [], "live": []}
    kl_sum = sft_selfdistill.kl_sum
    for kind, chunk in (("cached", 7), ("live", 10 ** 6)):
        monkeypatch.setattr(sft_selfdistill, "CHUNK", chunk * student.config.vocab_size)
        monkeypatch.setattr(sft_selfdistill, "kl_sum", lambda hidden, *more: sizes[kind].append(len(hidden)) or kl_sum(hidden, *more))
        config = distil_config(kl_scope=scope, kl_direction=direction, teacher=kind, batch_size=3)
        made = sft_selfdistill.make_teacher(teacher, *sft_selfdistill.split_model(teacher, batch), rows, torch.device("cpu"),
                                            torch.float64, config)
        student.zero_grad()
        loss, terms = sft_selfdistill.self_distillation(*sft_selfdistill.split_model(student, batch), made, batch, window_of([batch]), config)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-7) and torch.allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-9)
    n = int(batch["real" if scope == "all" else "supervised"].sum())
    assert sizes["live"] == [n] and max(sizes["cached"]) == 7 and sum(sizes["cached"]) == 2 * n     # chunks are made twice, the dense one once


TINY = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize("kind, settings, linear", [
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90}, True), ("llama", TINY, True), ("gpt_neox", TINY, True),
    ("gemma2", TINY | {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5}, False),
    ("granite", TINY | {"logits_scaling": 4.0}, False)])
def test_trunk_and_head_are_the_model(capsys, kind, settings, linear):
    """Logits at the masked positions and the loss's gradient are the model's; heads that are not linear stay live, with a note."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()
    rows = [(tuple(range(3, 12)), 5), (tuple(range(40, 47)), 2), (tuple(range(20, 29)), 8)]
    batch = sft_selfdistill.collate(rows, "cpu")
    trunk, head = sft_selfdistill.split_model(model, batch)
    assert ("note: " in capsys.readouterr().out) != linear and isinstance(head, torch.nn.Linear) == linear
    whole = model(input_ids=batch["ids"], attention_mask=batch["attention"]).logits[:, :-1]
    for mask in ("real", "supervised"):
        assert torch.allclose(head(trunk(batch, batch[mask])), whole[batch[mask]], rtol=1e-4, atol=1e-6)
    found = []
    for loss in (sft_selfdistill.cross_entropy(head(trunk(batch, batch["supervised"])), batch, window_of([batch]))[0],
                 F.cross_entropy(whole[batch["supervised"]].float(), batch["next"][batch["supervised"]])):
        model.zero_grad()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)
    config = distil_config(batch_size=2)
    teacher = sft_selfdistill.make_teacher(model, trunk, head, rows, torch.device("cpu"), torch.float32, config)
    _, terms = sft_selfdistill.self_distillation(trunk, head, teacher, batch, window_of([batch]), config)
    assert abs(terms["kl"]) < 1e-6


def gradient(loss_function, model, rows, size):
    """The gradient of a window of `rows` cut into batches of `size`."""
    model.zero_grad()
    batches = [sft_selfdistill.collate(rows[i:i + size], "cpu") for i in range(0, len(rows), size)]
    for batch in batches:
        loss_function(batch, window_of(batches))[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_accumulation_changes_nothing(student_teacher, rows):
    student, teacher = (copy.deepcopy(m).double() for m in student_teacher)
    for loss_function in (plain_loss(sft_selfdistill, student), distil_loss(student, teacher, distil_config())):
        whole, parts = (gradient(loss_function, student, rows, size) for size in (8, 2))
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


def test_windows_do_not_depend_on_how_they_are_cut(rows):
    rows = rows * 5                                     # 40 rows, windows of 8
    for script in (sft_baseline, sft_selfdistill):
        one = script.make_windows(rows, script.Config(batch_size=8, accumulate=1, seed=3), 2, 1)
        four = script.make_windows(rows, script.Config(batch_size=2, accumulate=4, seed=3), 2, 1)
        assert [sum(w, []) for w in one] == [sum(w, []) for w in four] and {len(b) for w in four for b in w} == {2}
        other = script.make_windows(rows, script.Config(batch_size=8, accumulate=1, seed=3), 2, 2)
        assert one != other and sorted(map(str, sum(sum(one, []), []))) == sorted(map(str, rows))


def stage(script, model, rows, make_loss, **settings):
    """Two epochs of stage 2 in `script` with the loss make_loss(script, model); the model and its metrics."""
    model, metrics = copy.deepcopy(model), []
    dtype = settings.pop("dtype", torch.float32)
    config = script.Config(**{"batch_size": 4, "learning_rate": 1e-3, **settings})
    script.run_stage(2, model, rows, 2, make_loss(script, model), lambda stage, epoch: {}, metrics, torch.device("cpu"), dtype, config)
    return model, metrics


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_without_kl_the_step_is_the_baselines(base, rows):
    baseline, _ = stage(sft_baseline, base[0], rows, plain_loss)
    no_kl = lambda script, model: distil_loss(model, base[0], distil_config(kl_weight=0.0))
    distilled, _ = stage(sft_selfdistill, base[0], rows, no_kl)
    assert same_weights(baseline, distilled) and not same_weights(baseline, base[0])


def test_teacher_is_unchanged_and_kl_starts_at_zero(base, rows):
    teacher, seen = copy.deepcopy(base[0]).requires_grad_(False), []

    def distil(script, model):
        def loss_function(batch, window):
            loss, terms = distil_loss(model, teacher, distil_config())(batch, window)
            seen.append(terms["kl"])
            return loss, terms
        return loss_function
    student, _ = stage(sft_selfdistill, base[0], rows, distil, weight_decay=0.5)
    assert same_weights(teacher, base[0]) and not same_weights(teacher, student)
    assert abs(seen[0]) < 1e-6 and min(seen[1:]) > 1e-6


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_what_make_teacher_makes_does_not_learn(base, rows, kind):
    batch, config, asked = sft_selfdistill.collate(rows, "cpu"), distil_config(teacher=kind, batch_size=3), []

    def distil(script, model):
        trunk, head = script.split_model(model, batch)
        states, head_before = teacher = script.make_teacher(model, trunk, head, rows, torch.device("cpu"), torch.float32, config)
        asked.extend([lambda: head_before(states(batch, batch["real"])), lambda: head(trunk(batch, batch["real"]))])
        asked.extend(ask().detach().clone() for ask in asked[:])
        return lambda batch, window: script.self_distillation(trunk, head, teacher, batch, window, config)
    stage(sft_selfdistill, base[0], rows, distil)
    teacher, student, teacher_before, student_before = asked
    assert torch.equal(teacher(), teacher_before) and not torch.allclose(student(), student_before)
    assert torch.allclose(teacher_before, student_before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_learns(base, rows, dtype):
    _, metrics = stage(sft_baseline, base[0], rows, plain_loss, dtype=dtype)
    assert metrics[1]["ce"] < metrics[0]["ce"] and all(math.isfinite(m["ce"]) for m in metrics)


def test_epoch_loss_is_the_mean_of_its_windows(base, rows, capsys):
    _, metrics = stage(sft_baseline, base[0], rows, plain_loss, learning_rate=0.0, batch_size=1, accumulate=4)
    config = sft_baseline.Config(batch_size=1, accumulate=4)
    means = []
    for window in sft_baseline.make_windows(rows, config, 2, 1):
        supervised = [row for batch in window for row in batch]
        losses = [F.cross_entropy(base[0](torch.tensor([ids])).logits[0, n - 1:-1], torch.tensor(ids[n:]), reduction="sum")
                  for ids, n in supervised]
        means.append(sum(losses).item() / sum(len(ids) - n for ids, n in supervised))
    assert metrics[0]["ce"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    first = re.search(r"stage 2, step 1: ce ([\d.]+)", capsys.readouterr().out)
    assert float(first[1]) == pytest.approx(means[0], abs=1e-4)             # the window's loss, not its last batch's


def test_collate_masks_by_length(base):
    eos = base[1].eos_token_id
    batch = sft_baseline.collate([([5, 6, 7, eos], 2), ([8, eos], 1)], "cpu")
    assert batch["supervised"].tolist() == [[False, True, True], [True, False, False]]      # EOS is learnt, padding is not
    assert batch["real"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["next"][0].tolist() == [6, 7, eos] and batch["attention"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_encode(base, capsys):
    tokenizer = base[1]
    row = {"prompt": "Q: What is the language of 12AB?\nA:", "completion": " Fenat\n"}
    (ids, n), (with_eos, _) = sft_baseline.encode(tokenizer, [row, row | {"completion": " Fenat"}], 128)
    assert tokenizer.decode(ids) == row["prompt"] + row["completion"] and tokenizer.decode(ids[:n]) == row["prompt"]
    assert with_eos == (*ids[:-1], tokenizer.eos_token_id)
    (cut, m), = sft_baseline.encode(tokenizer, [row], 128, max_length=10)
    assert len(cut) == 10 and cut == ids[-10:] and n - m == len(ids) - 10
    for longest, max_length in ((len(ids) - 1, None), (128, len(ids) - n)):
        with pytest.raises(SystemExit):
            sft_baseline.encode(tokenizer, [row], longest, max_length)
        assert "--max-length" in capsys.readouterr().err


def test_learning_rate():
    config = sft_baseline.Config(learning_rate=1.0, warmup=0.1)
    rates = [sft_baseline.get_lr(step, 100, config) for step in range(-1, 102)]
    assert rates[0] == rates[1] == 0.1 and rates[10] == 1.0 and max(rates) == 1.0          # clamped below, warm at 9
    assert rates[100] == rates[101] == rates[102] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[56] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 45 / 89)))
    assert all(math.isfinite(sft_baseline.get_lr(0, total, sft_baseline.Config(learning_rate=1.0, warmup=w)))
               for total in (1, 2) for w in (0.0, 1.0))


def test_shared_functions_are_identical():
    """Duplication among the method scripts is deliberate; drifting apart is not. `train` is where they may differ."""
    trees = {name: {node.name: ast.dump(node) for node in ast.parse((ROOT / f"{name}.py").read_text("utf-8")).body
                    if isinstance(node, ast.FunctionDef)} for name in METHODS}
    for name in set(trees["sft_baseline"]) - {"train"}:
        assert len({tree[name] for tree in trees.values()}) == 1, f"{name} differs between {METHODS}"
    assert set(trees["sft_selfdistill"]) - set(trees["sft_baseline"]) == {"self_distillation", "kl_sum", "make_teacher"}
    assert set(trees["sft_freeze"]) - set(trees["sft_baseline"]) == {"freeze", "l2_to_before"}
    # the evaluator, which a copied script lacks, loads a model as they do
    loading = [next(ast.dump(part) for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text("utf-8")))
                    if getattr(node, "name", "") == "load_model" for part in node.body if isinstance(part, ast.Try))
               for name in ("eval_hallucination", "sft_baseline")]
    assert loading[0] == loading[1]
