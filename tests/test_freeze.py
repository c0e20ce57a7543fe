"""sft_freeze.py: the roles of parameters in several architectures, hard and soft freezing, and what it tells its user."""
import copy
import json

import pytest
import torch
from conftest import call, plain_loss, refused, rows_of, window_of
from transformers import (AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config,
                          GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Phi3Config, PhiConfig, Qwen2Config, Qwen3Config)

import sft_baseline
import sft_freeze

SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GEMMA = SIZE | {"head_dim": 8, "num_key_value_heads": 1}
SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
ARCHITECTURES = {
    "gpt2": GPT2Config(**SMALL, n_embd=16, n_layer=3, n_head=2, n_positions=32),
    "llama": LlamaConfig(**SIZE), "llama-tied": LlamaConfig(**SIZE, tie_word_embeddings=True), "mistral": MistralConfig(**GEMMA),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=1), "qwen3": Qwen3Config(**GEMMA), "gemma": GemmaConfig(**GEMMA),
    "gemma2": Gemma2Config(**GEMMA), "gemma3": Gemma3TextConfig(**GEMMA), "gpt-neox": GPTNeoXConfig(**SIZE),
    "phi": PhiConfig(**SIZE, qk_layernorm=True), "phi3": Phi3Config(**SIZE),
    "opt": OPTConfig(**SMALL, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32, max_position_embeddings=32),
    "opt-350m": OPTConfig(**SMALL, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=8,
                          max_position_embeddings=32, do_layer_norm_before=False)}


def role_by_module(model, name):
    """The role of a parameter from the classes of the modules that hold it, not from its name; "tied" for a shared matrix."""
    modules, path = dict(model.named_modules()), name.split(".")[:-1]
    owners = [type(modules[".".join(path[:n])]).__name__ for n in range(len(path), 0, -1)]
    if "Norm" in owners[0]:
        return "norms"
    if any("Attention" in owner for owner in owners):
        return "attention"
    if any("Layer" in owner or "Block" in owner for owner in owners[1:]):
        return "mlp"
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight is model.get_parameter(name):
        return "tied"
    return "embeddings" if "Embedding" in owners[0] or path[-1] == "project_in" else "head"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_of_an_architecture(architecture, capsys):
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]).eval()
    ids = torch.arange(12)[None]
    before, weights = model(ids).logits, dict(model.named_parameters())
    expected = {name: role_by_module(model, name) for name in weights}
    for role in sft_freeze.ROLES:
        sft_freeze.freeze(model, sft_freeze.Config(trainable=role))
        wanted = {name for name in weights if expected[name] == role or (expected[name] == "tied" and role in ("embeddings", "head"))}
        assert {name for name, p in weights.items() if p.requires_grad} == wanted and wanted, role
        assert ("are one matrix" in capsys.readouterr().out) == ("tied" in expected.values())
    sft_freeze.freeze(model, sft_freeze.Config(trainable="all"))
    assert all(p.requires_grad for p in weights.values()) and torch.equal(before, model(ids).logits)
    sft_freeze.freeze(model, sft_freeze.Config(trainable="mlp, attention", layers="1-2"))
    assert {name for name, p in weights.items() if p.requires_grad} == {
        name for name in weights if expected[name] in ("mlp", "attention") and (".1." in name or ".2." in name)}
    trained = sum(p.numel() for name, p in weights.items() if p.requires_grad and expected[name] == "mlp")
    assert f"mlp        {trained:>13,} of {trained:>13,} weights are trained" in capsys.readouterr().out


@pytest.mark.parametrize("architecture, settings, named", [
    ("gpt2", {"trainable": "ffn"}, "there are attention ("), ("gpt2", {"trainable": "mlp,,"}, "--trainable :"),
    ("gpt2", {"layers": "2-3"}, "blocks 0 to 2"), ("gpt2", {"layers": "2-1"}, "--layers 2-1"), ("gpt2", {"layers": "two"}, "--layers two"),
    ("gpt2", {"layers": ""}, "--layers : must"),
    ("gpt2", {"trainable": "embeddings", "layers": "0-1"}, "embeddings (0 weights)"), ("bloom", {}, "word_embeddings")])
def test_refusals(architecture, settings, named, capsys):
    bloom = BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config((ARCHITECTURES | {"bloom": bloom})[architecture])
    with pytest.raises(SystemExit):
        sft_freeze.freeze(model, sft_freeze.Config(**{"trainable": "attention", **settings}))
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


@pytest.fixture
def rows(base, world):
    return sft_freeze.encode(base[1], sft_freeze.read_rows(world / "train_known.jsonl", {})[:8], 128)


def test_frozen_weights_stay_bit_for_bit(base, rows):
    model = copy.deepcopy(base[0])
    sft_freeze.freeze(model, sft_freeze.Config(trainable="mlp", layers="1-2"))
    config = sft_freeze.Config(batch_size=4, learning_rate=1e-2, weight_decay=0.5)
    sft_freeze.run_stage(2, model, rows, 2, plain_loss(sft_freeze, model), lambda stage, epoch: {}, [], torch.device("cpu"), torch.float32, config)
    for (name, p), (_, q) in zip(model.named_parameters(), base[0].named_parameters(), strict=True):
        assert torch.equal(p, q) == (not (".mlp." in name and (".1." in name or ".2." in name))), name


def test_l2_counts_once_a_window(base, rows):
    """Loss and gradient of CE + W · ‖θ − θ_before‖², by hand, however the window is cut into batches."""
    model, start = copy.deepcopy(base[0]).double(), {name: p.detach().double() for name, p in base[0].named_parameters()}
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    distance = sum(((p - start[name]) ** 2).sum().item() for name, p in model.named_parameters())
    config, gradients = sft_freeze.Config(l2=0.3), []
    for size, weight in ((8, 0.0), (8, 0.3), (2, 0.3)):
        model.zero_grad()
        batches = [sft_freeze.collate(rows[i:i + size], "cpu") for i in range(0, 8, size)]
        window = window_of(batches)
        config.l2, logged = weight, 0.0
        for batch in batches:
            loss, terms = sft_freeze.l2_to_before(plain_loss(sft_freeze, model)(batch, window), batch, window, model, start, config)
            loss.backward()
            logged += terms["distance"]
        assert logged == pytest.approx(distance, rel=1e-5)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        by_hand = gradients[0][name] + 2 * 0.3 * (p - start[name]).detach()
        assert torch.allclose(gradients[1][name], by_hand, atol=1e-5) and torch.allclose(gradients[2][name], by_hand, atol=1e-5), name


def test_all_trainable_is_the_baseline(workplace):
    """With everything trainable and nothing held, the two scripts end in the same weights; held ones stay nearer the start."""
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "a")
    call(workplace, "sft_freeze", "--epochs", 1, "--trainable", "all", "--out", "b")
    call(workplace, "sft_freeze", "--epochs", 1, "--l2", 0, "--out", "c")
    assert len({(workplace / run / "model.safetensors").read_bytes() for run in "abc"}) == 1
    done = [call(workplace, "sft_freeze", "--epochs", 3, "--l2", weight, "--out", f"l2-{weight}") for weight in (0, 1000)]
    assert "ce " in done[1].stdout and "distance 0.0000" in done[1].stdout and "   0 of" not in done[1].stdout
    free, held = (rows_of(workplace / f"l2-{weight}/metrics.jsonl")[-1]["distance"] for weight in (0, 1000))
    assert 0 < held < free / 2


def test_no_unknown(workplace):
    """Stage 2 on known facts alone: only their tokens are counted, and the new facts are scored but not learnt."""
    for method in ("sft_baseline", "sft_freeze"):
        done = call(workplace, method, "--epochs", 2, "--no-unknown", "--out", method)
        known = sft_baseline.read_rows(workplace / "facts/tiny/train_known.jsonl", {})
        tokenizer = sft_baseline.load_model(workplace / "facts/tiny/base", "cpu")[1]
        tokens = sum(len(ids) for ids, _ in sft_baseline.encode(tokenizer, known, 128))
        assert f"{tokens:,} tokens an epoch" in done.stdout and "advice" not in done.stdout
        assert rows_of(workplace / method / "metrics.jsonl")[-1]["unknown"] < 0.3
    mine = workplace / "mine.jsonl"
    mine.write_text('{"prompt": "Q", "completion": " A"}\n')
    assert "--known" in refused(workplace, "sft_freeze", "--model", "facts/tiny/base", "--train", mine, "--no-unknown")


def test_run_says_what_is_frozen_and_advises(workplace):
    for name in ("train_unknown.jsonl", "train_known.jsonl"):               # new facts that cannot be right by chance
        rows = rows_of(workplace / "facts/tiny" / name)
        (workplace / name).write_text("".join(json.dumps(row | {"answers": ["Q"]} if "unknown" in name else row) + "\n" for row in rows))
    done = call(workplace, "sft_freeze", "--epochs", 1, "--trainable", "norms", "--layers", "0-0", "--train", "train_unknown.jsonl",
                "--known", "train_known.jsonl")
    assert "advice: the new facts were not learnt" in done.stdout
    assert done.stdout.index("trainable = norms") < done.stdout.index("256 of ") < done.stdout.index("stage 1, step 1")
    run = json.loads((workplace / "runs/freeze-tiny-0/run.json").read_text())
    assert run["method"] == "freeze" and run["config"]["layers"] == "0-0"
