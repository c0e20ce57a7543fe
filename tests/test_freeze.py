"""sft_freeze.py: the roles of parameters in several architectures, hard and soft freezing, and what it tells its user."""
import copy
import json

import pytest
import torch
from conftest import call, counts_of, plain_loss, refused, rows_of, trained
from transformers import (AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig, GemmaConfig, GPT2Config,
                          FalconConfig, GPTNeoXConfig, GraniteMoeConfig, LlamaConfig, MistralConfig, MptConfig, OPTConfig, Phi3Config,
                          PhiConfig, Qwen2Config, Qwen3Config)

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
    for role in [role for role in sft_freeze.ROLES if role != "other"]:
        sft_freeze.freeze(model, sft_freeze.Config(trainable=role))
        wanted = {name for name in weights if expected[name] == role or (expected[name] == "tied" and role in ("embeddings", "head"))}
        assert {name for name, p in weights.items() if p.requires_grad} == wanted and wanted, role
        size = sum(weights[name].numel() for name in wanted)
        said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert said[role].replace(" ", "") == f"{size:,}of{size:,}weightsaretrained" and "other" not in said
        shared = sum(weights[name].numel() for name in wanted if expected[name] == "tied")
        for other in set(said) - {role}:
            assert said[other].startswith(f"{shared if other in ('embeddings', 'head') else 0:,} of"), (role, other, said)
    sft_freeze.freeze(model, sft_freeze.Config(trainable="all"))
    assert all(p.requires_grad for p in weights.values()) and torch.equal(before, model(ids).logits)
    sft_freeze.freeze(model, sft_freeze.Config(trainable="mlp, attention", layers="1-2"))
    assert {name for name, p in weights.items() if p.requires_grad} == {
        name for name in weights if expected[name] in ("mlp", "attention") and (".1." in name or ".2." in name)}


@pytest.mark.parametrize("architecture, settings, named", [
    ("gpt2", {"trainable": "ffn"}, "--trainable ffn: no such weights"), ("gpt2", {"trainable": "mlp,,"}, "--trainable :"),
    ("gpt2", {"layers": "2-3"}, "blocks 0 to 2"), ("gpt2", {"layers": "2-1"}, "--layers 2-1"), ("gpt2", {"layers": "two"}, "--layers two"),
    ("gpt2", {"layers": ""}, "--layers : must"), ("gpt2", {"trainable": "other"}, "--trainable other: no such weights"),
    ("gpt2", {"trainable": "embeddings", "layers": "0-1"}, "--layers 0-1 has norms, attention, mlp")])
def test_refusals(architecture, settings, named, capsys):
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture])
    with pytest.raises(SystemExit):
        sft_freeze.freeze(model, sft_freeze.Config(**{"trainable": "attention", **settings}))
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


MIXTURE = SIZE | {"num_local_experts": 2, "num_experts_per_tok": 1}
ODD = {"bloom": BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2), "mpt": MptConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2),
       "falcon": FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2), "granite-moe": GraniteMoeConfig(**MIXTURE)}


@pytest.mark.parametrize("architecture", ODD)
def test_what_has_no_role_is_seen(architecture, capsys):
    """Architectures that the names were not written for: what fits none is `other`, printed, and trained only when named or with all."""
    model = AutoModelForCausalLM.from_config(ODD[architecture])
    split = sft_freeze.split_parameters(model, sft_freeze.Config())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(map(len, split.values())) - tied == len(dict(model.named_parameters())) and split["attention"] and split["mlp"] + split["other"]
    for role in ("attention", "all"):
        sft_freeze.freeze(model, sft_freeze.Config(trainable=role))
        assert {p.requires_grad for name, p in model.named_parameters() if name in split["other"]} <= {role == "all"}
        assert ("other" in capsys.readouterr().out) == bool(split["other"])
    assert bool(split["other"]) == (architecture == "granite-moe")


@pytest.fixture
def examples(base, world):
    return sft_freeze.read_examples(world / "train_known.jsonl", base[1], 128)[:8]


def test_frozen_weights_stay_bit_for_bit(base, examples):
    model = copy.deepcopy(base[0])
    sft_freeze.freeze(model, sft_freeze.Config(trainable="mlp", layers="1-2"))
    trained(sft_freeze, model, examples, plain_loss(sft_freeze, model), learning_rate=1e-2, weight_decay=0.5)
    for (name, p), (_, q) in zip(model.named_parameters(), base[0].named_parameters(), strict=True):
        assert torch.equal(p, q) == (not (".mlp." in name and (".1." in name or ".2." in name))), name


def test_l2_counts_once_a_window(base, examples):
    """Loss and gradient of CE + W · ‖θ − θ_before‖², by hand, however the window is cut into batches."""
    model, start = copy.deepcopy(base[0]).double(), sft_freeze.copy_trained(copy.deepcopy(base[0]).double())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    distance = sum(((p - start[name]) ** 2).sum().item() for name, p in model.named_parameters())
    gradients = []
    for size, weight in ((8, 0.0), (8, 0.3), (2, 0.3)):
        model.zero_grad()
        batches = [sft_freeze.collate(part, "cpu") for part in sft_freeze.cut(examples, size)]
        logged = 0.0
        for batch in batches:
            loss, terms = sft_freeze.l2_to_before(model, start, batch, counts_of(batches), sft_freeze.Config(l2=weight))
            loss.backward()
            logged += terms["distance"].item()
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
    assert "stage 2, step 1: {'ce': " in done[1].stdout and "'distance': 0.0}" in done[1].stdout and " 0 of" not in done[1].stdout
    free, held = (rows_of(workplace / f"l2-{weight}/metrics.jsonl")[-1]["distance"] for weight in (0, 1000))
    assert 0 < held < free / 2


def test_no_unknown(workplace):
    """Stage 2 on known facts alone: only their rows are counted, and the new facts are scored but not learnt."""
    for method in ("sft_baseline", "sft_freeze"):
        done = call(workplace, method, "--epochs", 2, "--no-unknown", "--out", method)
        assert ", 24 rows an epoch" in done.stdout
        assert rows_of(workplace / method / "metrics.jsonl")[-1]["unknown"] < 0.3
    mine = workplace / "mine.jsonl"
    mine.write_text('{"prompt": "Q", "completion": " A"}\n')
    assert "no rows to train on" in refused(workplace, "sft_freeze", "--model", "facts/tiny/base", "--train", mine, "--no-unknown")


def test_run_says_what_is_frozen(workplace):
    done = call(workplace, "sft_freeze", "--epochs", 1, "--trainable", "norms", "--layers", "0-0")
    assert done.stdout.index("trainable='norms'") < done.stdout.index("256 of ") < done.stdout.index("stage 1, step 1")
    run = json.loads((workplace / "runs/freeze-tiny-0/run.json").read_text())
    assert run["method"] == "freeze" and run["config"]["layers"] == "0-0"
