"""Faults that reviews and users of similar projects reported: each stays fixed."""
import copy
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
import transformers
from conftest import METHODS, call, counts_of, refused, rows_of

import eval_hallucination
import make_facts
import sft_baseline
import sft_selfdistill
from eval_hallucination import evaluate, load_model


def save(model, tokenizer, folder, **settings):
    """Save a checkpoint whose config.json also has `settings`; return its folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


# ------------------------------------------------------------------------------------- precision

@pytest.fixture
def shifted():
    """Return a GPT-2, and the same model with 100 subtracted from every logit.

    The last bias and a column of the head give the shift. It changes no probability.
    """
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=90, tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)       # so that the tokens differ in probability
        model.lm_head.weight[:, 0] = 0
        lower = copy.deepcopy(model)
        lower.transformer.ln_f.bias[0] = 100
        lower.transformer.ln_f.weight[0] = 0
        lower.lm_head.weight[:, 0] = -1
    return model, lower


def examples_of(n):
    """Return `n` training examples of 12 tokens, 6 of them in the completion."""
    examples = []
    for i in range(n):
        ids = torch.randint(90, (12,), generator=torch.Generator().manual_seed(i))
        examples.append({"input_ids": ids, "predicted": torch.ones_like(ids),
                         "completion": torch.arange(12) >= 6})
    return examples


def test_bf16_does_not_round_the_logits(shifted):
    """Cross-entropy and KL in bf16 do not depend on a shift of all logits."""
    found = []
    for teacher in shifted:
        examples = examples_of(8)
        config = sft_selfdistill.Config(
            kl_weight=1.0, temperature=4.0, batch_size=8, dtype="bfloat16")
        head = sft_selfdistill.cache_teacher(teacher, examples, config)
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            student.transformer.ln_f.weight[1:].mul_(1.01)
        batch = sft_selfdistill.collate(examples, "cpu")
        _, terms = sft_selfdistill.self_distillation(
            student, head, batch, counts_of([batch]), config)
        found.append(terms)
    assert found[1]["ce"].item() == pytest.approx(found[0]["ce"].item(), rel=1e-4)
    assert found[1]["kl"].item() == pytest.approx(found[0]["kl"].item(), rel=0.02)
    assert found[0]["kl"] > 1e-6


def test_evaluation_ignores_autocast(base, world):
    """Neither the caller's autocast nor --dtype changes the precision of generation."""
    enabled = []
    hook = base[0].register_forward_pre_hook(
        lambda *_: enabled.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(*base, rows_of(world / "heldout_known.jsonl")[:4])
    hook.remove()
    assert enabled and not any(enabled)


def test_accuracies_of_a_bf16_run_are_those_of_its_checkpoint(workplace):
    words = ["--epochs", 6, "--dtype", "bfloat16", "--learning-rate", 2e-3, "--out", "x"]
    call(workplace, "sft_baseline", *words)
    last = rows_of(workplace / "x/metrics.jsonl")[-1]
    done = call(workplace, "eval_hallucination", "--model", "x", "--facts", "facts/tiny")
    again = {row["set"]: row["accuracy"] for row in map(json.loads, done.stdout.splitlines())}
    assert again == {"new": last["new"], "known": last["known"], "heldout": last["kept"]}
    assert 0 < last["kept"] < 1


def test_auto_dtype(monkeypatch):
    """It is bf16 on any GPU that has it, whatever its number, but fp32 for the tiny model."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for model, device, dtype in (("x", "cuda", "bfloat16"), ("x", "cuda:1", "bfloat16"),
                                 ("x", "cpu", "float32"), ("tiny", "cuda", "float32")):
        assert sft_baseline.parse_args(["--model", model, "--device", device]).dtype == dtype


# ------------------------------------------------------------------------------------------ cost

def test_only_rows_with_answers_are_decoded(workplace, monkeypatch):
    """Completions of rows without answers can be long; held-out rows are always measured."""
    rows = rows_of(workplace / "facts/tiny/train_unknown.jsonl")
    for row in rows[1:]:
        del row["answers"]
    eval_hallucination.write_jsonl(workplace / "mine.jsonl", rows)
    decoded = []
    real = eval_hallucination.evaluate

    def counted(model, tokenizer, rows, batch_size):
        decoded.append(len(rows))
        return real(model, tokenizer, rows, batch_size)
    monkeypatch.setattr(eval_hallucination, "evaluate", counted)
    call(workplace, "sft_baseline", "--model", "facts/tiny/base", "--epochs", 1,
         "--train", "mine.jsonl", "--heldout", "facts/tiny/heldout_known.jsonl", "--out", "x")
    n_heldout = len(rows_of(workplace / "facts/tiny/heldout_known.jsonl"))
    assert decoded == [1, n_heldout] * 2


def test_a_batch_of_answers_is_read_twice(base, world, monkeypatch):
    """Labelling waits for the device twice per batch, not several times per answer."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or tolist(x))
    facts = [{"question": row["prompt"][3:-3], "answers": row["answers"]}
             for row in rows_of(world / "labelled.jsonl")[:12]]
    greedy, _ = make_facts.score_answers(*base, "", facts, batch_size=6)
    assert sum(greedy) > 6 and len(reads) == 2 * 2


def test_head_is_checked_without_gradients(base):
    grad = []
    model = copy.deepcopy(base[0])
    model.lm_head.register_forward_pre_hook(lambda *_: grad.append(torch.is_grad_enabled()))
    batch = sft_baseline.collate(examples_of(1), "cpu")
    sft_baseline.check_head(model, batch, "x")
    assert grad == [False, False]


# --------------------------------------------------------------------------------- nothing is lost

def test_resume_with_several_chat_templates(workplace, base, monkeypatch):
    """Their folder, additional_chat_templates, is saved again when a run is resumed."""
    tokenizer = copy.deepcopy(base[1])
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    save(base[0], tokenizer, workplace / "model")
    words = ["--model", "model", "--facts", "facts/tiny", "--epochs", 1, "--out", "x"]

    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sft_baseline, "save_state", interrupt)
        call(workplace, "sft_baseline", *words, ok=False)
    assert (workplace / "x/before").exists()
    call(workplace, "sft_baseline", *words, "--resume")
    template = "x/before/additional_chat_templates/tools.jinja"
    assert (workplace / template).read_text() == "{{ tools }}"
    assert not list((workplace / "x").rglob("tmp"))


def test_labelling_goes_on_after_an_interruption(tmp_path, world, monkeypatch):
    """One line, no lost label; the same command gives the folder of an uninterrupted one."""
    rows = rows_of(world / "labelled.jsonl")
    lines = ["relation\tsubject\tobject\tquestion"]
    for row in rows:
        lines.append("\t".join([row["relation"], row["subject"], row["answers"][0],
                                row["prompt"][3:-3]]))
    (tmp_path / "facts.tsv").write_text("\n".join(lines) + "\n")
    words = ["--model", world / "base", "--source", "facts.tsv", "--shots", 0, "--n-new", 4,
             "--new", "uuid"]
    call(tmp_path, "make_facts", *words, "--out", "whole")
    real = make_facts.score_answers
    asked = []

    def interrupted(*args):
        asked.append(args[2])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(make_facts, "score_answers", interrupted)
    assert "the same command continues" in refused(tmp_path, "make_facts", *words, "--out", "x")
    call(tmp_path, "make_facts", *words, "--out", "x")
    assert len(asked) == 3 + 2          # four relations; the third was asked again
    for path in (tmp_path / "whole").glob("*.jsonl"):
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes()


def test_two_scripts_share_a_fact_folder_that_does_not_exist_yet(tmp_path, monkeypatch):
    made = []

    def slow(words):
        made.append(words)
        time.sleep(0.5)
        (tmp_path / "x/meta.json").write_text("{}")
    monkeypatch.setattr(make_facts, "main", slow)
    config = sft_baseline.Config(facts=str(tmp_path / "x"))
    threads = [threading.Thread(target=make_facts.find_files, args=[config]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    # The lock is no content: a folder that has nothing else is empty.
    (tmp_path / "y").mkdir()
    (tmp_path / "y/.lock").touch()
    assert make_facts.parse_args(["--out", str(tmp_path / "y")]).out == str(tmp_path / "y")


# ------------------------------------------------------------------------------------- checkpoints

def test_quantized_models_and_adapters_are_rejected_by_name(workplace, base):
    save(*base, workplace / "four", quantization_config={"quant_method": "bitsandbytes",
                                                         "load_in_4bit": True})
    save(*base, workplace / "lora")
    (workplace / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for model, reason in (("four", "quantized: pass the full-precision model"),
                          ("lora", "adapter: merge it")):
        words = ["--model", model, "--facts", "facts/tiny"]
        assert reason in refused(workplace, "sft_baseline", *words)
        assert reason in refused(workplace, "eval_hallucination", *words)


def test_heads_that_are_not_loaded_are_not_declared(tmp_path, base, capsys):
    """transformers drops multi-token prediction heads; the saved config must not declare them."""
    save(*base, tmp_path / "mtp", num_nextn_predict_layers=1)
    model, tokenizer = load_model(tmp_path / "mtp")
    assert "num_nextn_predict_layers are neither trained nor saved" in capsys.readouterr().err
    save(model, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_evaluation_leaves_the_settings_of_a_peft_model_alone(base, world, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])
    model = peft.get_peft_model(copy.deepcopy(base[0]), config)
    own = model.generation_config.to_dict()
    evaluate(model, base[1], rows_of(world / "heldout_known.jsonl")[:4])
    assert model.generation_config.to_dict() == own
    merged = model.merge_and_unload()
    assert merged.generation_config.to_dict() == own
    save(merged, base[1], tmp_path / "merged")
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert "max_new_tokens" not in settings


@pytest.mark.parametrize("settings", [
    {"num_beams": 1, "early_stopping": True}, {"eta_cutoff": 0.1}, {"pad_token_id": -1},
    {"temperature": 0.6}])
def test_contradictory_generation_settings_do_not_stop_saving(workplace, base, settings):
    save(*base, workplace / "model")
    path = workplace / "model/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 0, "do_sample": False} | settings))
    call(workplace, "sft_baseline", "--model", "model", "--facts", "facts/tiny", "--epochs", 1,
         "--out", "x")
    assert load_model(workplace / "x")[0].generation_config.eos_token_id == 0


# -------------------------------------------------------------------------------------------- rows

@pytest.mark.parametrize("row", [
    {"answers": '["Paris", "Paris, France"]', "completion": " Paris\n"},
    {"answers": ["Paris"], "completion": "\nParis\n"},
    {"answers": ["Paris"], "completion": "<think>\n\n</think>\n\nParis<|im_end|>\n"},
    {"answers": ["Paris"], "completion": " The capital is Paris.\n"}])
def test_rows_that_would_always_be_wrong_are_rejected(workplace, row):
    """They are, before training, wherever accuracy is measured."""
    row = {"prompt": "Q: What is the capital of France?\nA:"} | row
    (workplace / "mine.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--model", "facts/tiny/base", "--train", "mine.jsonl", "--out", "x"]
    assert "mine.jsonl" in refused(workplace, "sft_baseline", *words)
    shutil.copytree(workplace / "facts/tiny", workplace / "other")
    (workplace / "other/heldout_known.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--model", "facts/tiny/base", "--facts", "other"]
    error = call(workplace, "eval_hallucination", *words, ok=False).stderr
    assert "Traceback" not in error and "Paris" in error


# ---------------------------------------------------------------------------- files and terminals

def test_hidden_files_are_no_data_and_suffixes_have_no_case(tmp_path):
    header = "relation,subject,object,question\n"
    (tmp_path / "a.csv").write_text(f"{header}job,Ada,Baker,What does Ada do?\n")
    (tmp_path / "B.CSV").write_text(f"{header}job,Eve,Smith,What does Eve do?\n")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints/a-checkpoint.csv").write_text(
        f"{header}job,Old,Smith,What does Old do?\n")
    (tmp_path / ".c.csv").write_text(f"{header}job,Old,Smith,What does Old do?\n")
    facts = make_facts.load_source(str(tmp_path), 99, 0)
    assert {fact["subject"] for fact in facts} == {"Ada", "Eve"}


@pytest.mark.parametrize("odd", ["Paris, the capital of what is it?", "Zzz", "Where is Ulm"])
def test_one_odd_question_does_not_change_the_other_subjects(tmp_path, odd):
    rows = [{"question": f"What is the capital of N{i}ia?", "answers": ["A"]} for i in range(150)]
    rows[70]["question"] = odd
    (tmp_path / "P36.train.json").write_text(json.dumps(rows))
    facts = make_facts.load_source(str(tmp_path), 999, 0)
    assert {fact["subject"] for fact in facts} == {f"N{i}ia" for i in range(150)} - {"N70ia"}


def test_scripts_find_each_other_by_path(workplace):
    """With python -P and inside a package, a script's folder is not on the module path."""
    words = ["--epochs", "1", "--out", "x"]
    package = workplace / "package"
    package.mkdir()
    for script in workplace.glob("*.py"):
        shutil.move(script, package)
    env = os.environ | {"PYTHONPATH": ""}
    for command in (["-P", "package/sft_baseline.py", *words],
                    ["-P", "package/make_facts.py", "--help"],
                    ["-m", "package.eval_hallucination", "x"]):
        done = subprocess.run([sys.executable, *command], cwd=workplace, env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", [*METHODS, "make_facts", "eval_hallucination"])
def test_help_on_a_terminal_in_cp1252(workplace, script):
    done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=workplace,
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stderr == b""
    if script == "sft_selfdistill":
        assert "λ; default" in done.stdout.decode("utf-8")


def test_plot_has_the_format_of_its_name(workplace):
    pytest.importorskip("matplotlib")
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "x")
    for name, start in (("a.pdf", b"%PDF"), ("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        call(workplace, "eval_hallucination", "x", "--plot", name)
        assert (workplace / name).read_bytes().startswith(start)
    for name in ("a.xyz", "a"):
        assert "is not supported" in refused_plot(workplace, name)


def test_pictures_of_the_study_have_the_format_of_their_name(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import why
    why.save_figure(why.new_figure(2, 2), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(SystemExit):
        why.save_figure(why.new_figure(2, 2), tmp_path / "a.xyz")
    assert "is not supported" in capsys.readouterr().err


def refused_plot(folder, name):
    """Return the error of a plot to a file of an unknown format."""
    done = call(folder, "eval_hallucination", "x", "--plot", name, ok=False)
    assert done.returncode == 2
    assert not (folder / name).exists() and not (folder / f"{name}.tmp").exists()
    return done.stderr


def test_own_rows_need_a_model(workplace):
    (workplace / "mine.jsonl").write_text('{"prompt": "Q", "completion": " A"}\n')
    assert "--train needs a model" in refused(workplace, "sft_baseline", "--train", "mine.jsonl")
    # The base model of a world is named by its fact folder.
    call(workplace, "sft_baseline", "--train", "mine.jsonl", "--facts", "facts/tiny",
         "--epochs", 1, "--out", "x")
