"""Test which architectures train: the table of docs/use.md.

    python docs/study/architectures.py facts/tiny                   all of transformers, 10 minutes
    python docs/study/architectures.py facts/tiny gpt2 gemma2

Each kind of causal language model in transformers is tested as a small random model. It passes in
the script sft_selfdistill.py if the KL is 0 at step 1 and not afterwards, if the CE falls, if a
resumed run ends bit for bit like an uninterrupted one, and if the saved model gives the same
outputs when it is loaded. It passes in a Trainer, with docs/trainer.py, if the KL is 0 at step 1
and not at the end, and if the loss falls.
"""
import contextlib
import copy
import io
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOCS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
import sft_selfdistill as script
from trainer import SelfDistillationTrainer

# Sizes, by the names that configurations have for them.
SIZES = {
    32: "hidden_size d_model n_embd model_dim dim embedding_size word_embed_proj_dim dim_model "
        "lru_width attention_hidden_size",
    64: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff "
        "ffn_hidden_size mamba_d_ssm",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank "
        "kv_lora_rank moe_shared_expert_intermediate_size hidden_size_per_layer_input "
        "shared_intermediate_size",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers "
       "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk linear_num_key_heads moe_k "
       "expand mamba_expand",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
       "encoder_attention_heads attention_heads num_experts num_local_experts n_routed_experts "
       "moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels d_kv rotary_dim "
       "linear_key_head_dim state_size linear_value_head_dim mamba_d_state mamba_d_head "
       "mamba_head_dim index_head_dim",
    1: "n_group topk_group mamba_n_groups n_groups first_k_dense_replace num_nextn_predict_layers",
    256: "max_position_embeddings n_positions max_seq_len context_length n_ctx",
    0: "bos_token_id eos_token_id pad_token_id num_kv_shared_layers",
}
# Further settings that some kinds need to fit together.
MORE = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_n_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4,
                         "mamba_d_head": 16},
}
# Make caps and scales of the logits visible, as they are in trained models.
VISIBLE = {"initializer_range": 0.1, "logits_scaling": 8.0, "logit_scale": 0.0625,
           "final_logit_softcapping": 2.0}


def small_model(kind, n_tokens):
    """Create a random model of a type of transformers, with some ten thousand weights."""
    config_class = transformers.CONFIG_MAPPING[kind]
    defaults = vars(config_class())
    settings = {}
    for size, names in SIZES.items():
        for name in names.split():
            if name in defaults or name in getattr(config_class, "attribute_map", {}):
                settings[name] = size
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if name in defaults:
            settings[name] = n_tokens
    if "kv_lora_rank" in defaults:      # here keys and values are not shared by heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, value in defaults.items():
        if name in VISIBLE and value is not None:
            settings[name] = VISIBLE[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
        elif name == "is_decoder":
            settings[name] = True
    config = config_class(**settings | MORE.get(kind, {}))
    with torch.device("meta"):          # allocates no memory for the weights
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if model.num_parameters() > 5_000_000:
        raise ValueError(f"{model.num_parameters():,} parameters")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def check_in_script(folder, facts):
    """Train the model in `folder` like sft_selfdistill.py; raise AssertionError if it fails."""
    config = script.Config(epochs=2, batch_size=4, learning_rate=1e-3, kl_weight=1.0,
                           temperature=4.0, device="cpu", dtype="float32")
    start, tokenizer = script.load_model(folder, "cpu")
    examples = script.read_examples(facts, tokenizer, 128)[:12]
    script.check_head(start, script.collate(examples[:1], "cpu"), folder)
    results = []
    for interrupted in (False, True):
        model = copy.deepcopy(start)
        head = script.cache_teacher(model, examples, config)
        kls = []

        def loss_function(batch, counts):
            loss, terms = script.self_distillation(model, head, batch, counts, config)
            kls.append(terms["kl"].item())
            return loss, terms

        metrics = []
        state = {"epoch": 0}
        for row, new_state in script.train_stage(2, model, examples, loss_function, config, state):
            metrics.append(row)
            if interrupted and row["epoch"] == 1:
                state = copy.deepcopy(new_state)
                break
        if interrupted:
            model = copy.deepcopy(start)
            for row, _ in script.train_stage(2, model, examples, loss_function, config, state):
                metrics.append(row)
        for row in metrics:
            row.pop("seconds_per_step")
        assert abs(kls[0]) < 1e-6, f"KL {kls[0]:.1e} at step 1"
        assert metrics[1]["ce"] < metrics[0]["ce"], f"does not learn: {metrics}"
        assert metrics[1]["kl"] > 1e-9, f"the KL stays 0: {metrics}"
        results.append((model, metrics))
    (model, metrics), (resumed, others) = results
    assert metrics == others, "a resumed run ends differently"
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), f"resumed, {name} differs"
    saved = Path(folder) / "saved"
    saved.mkdir()
    script.save_checkpoint(saved, model, tokenizer)
    batch = script.collate(examples[:4], "cpu")
    with torch.no_grad():
        loaded = script.last_hidden_state(script.load_model(saved, "cpu")[0], batch, "float32")
        assert torch.equal(script.last_hidden_state(model, batch, "float32"), loaded), (
            "saved and loaded, its outputs differ")


def collate(examples):
    """Collate examples of the script for a Trainer's models."""
    ids, mask, completion = [
        pad_sequence([example[key] for example in examples], batch_first=True)
        for key in ("input_ids", "predicted", "completion")]
    return {"input_ids": ids, "attention_mask": mask,
            "labels": ids.masked_fill(~completion, -100)}


def check_in_trainer(model, tokenizer, facts, out):
    """Train a model with the class of docs/trainer.py; raise AssertionError if it fails."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0          # a Trainer puts the model into training mode
    examples = script.read_examples(facts, tokenizer, 128)[:12]
    args = transformers.TrainingArguments(
        out, per_device_train_batch_size=4, num_train_epochs=4, learning_rate=1e-3,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True)
    trainer = SelfDistillationTrainer(model, args, collate, examples)
    trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    first, last = steps[0]["loss"], steps[-1]["loss"]
    assert abs(steps[0]["kl"]) < 1e-6, f"KL {steps[0]['kl']:.1e} at step 1"
    assert last < first, f"does not learn: loss {first:.1f} → {last:.1f}"
    assert steps[-1]["kl"] > 1e-9, "the KL stays 0"


def attempt(function, *args):
    """Call a function; return None if it succeeds, else the reason why not (str)."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            function(*args)
    except SystemExit:
        # "error: --model PATH: REASON; ADVICE", or "error: model PATH cannot be used … (REASON); …"
        line = errors.getvalue().splitlines()[-1]
        unusable = re.search(r"cannot be used on device \w+ \((.*)\); pass", line)
        if unusable:
            return unusable[1]
        return line.split(":", 2)[2].partition(";")[0].strip()
    except Exception as error:          # of any type: this is what the test looks for
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def run_checks(kinds, facts):
    """Test kinds of models on a fact folder; return (outcomes, failed).

    outcomes: {(reason in the script, reason in a trainer): list of kinds}; None: it trains
    failed: {kind: reason why no small model could be made}
    """
    _, tokenizer = script.load_model(f"{facts}/base", "cpu")
    rows = f"{facts}/train_unknown.jsonl"
    outcomes = defaultdict(list)
    failed = {}
    for kind in tqdm(kinds, disable=None):
        with tempfile.TemporaryDirectory() as folder:
            def save():
                small_model(kind, len(tokenizer)).save_pretrained(folder)
                tokenizer.save_pretrained(folder)

            reason = attempt(save)
            if reason:
                failed[kind] = reason
                tqdm.write(f"{kind}: {reason[:150]}", file=sys.stderr)
                continue
            ours = attempt(check_in_script, folder, rows)
            model = small_model(kind, len(tokenizer))
            theirs = attempt(check_in_trainer, model, tokenizer, rows, folder)
            outcomes[ours, theirs].append(kind)
            tqdm.write(f"{kind}: {ours or 'trains'} | {theirs or 'trains'}", file=sys.stderr)
    return outcomes, failed


def main(facts, *kinds):
    """Print the table for a fact folder and kinds of models (default: all)."""
    transformers.logging.set_verbosity_error()
    outcomes, failed = run_checks(kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), facts)
    print("| script | Trainer | count | architectures |\n|---|---|---|---|")
    for (ours, theirs), members in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"| {ours or 'trains'} | {theirs or 'trains'} | {len(members)} | "
              f"{', '.join(members)} |")
    print(f"| no small model could be made | | {len(failed)} | {', '.join(failed)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
