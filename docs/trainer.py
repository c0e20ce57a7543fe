"""Self-distillation for transformers.Trainer and for trainers derived from it (TRL's SFTTrainer).

    L = CE + λ · τ² · KL(teacher ‖ student)

    CE     mean over the completion tokens (labels other than -100)
    KL     mean over all predicted tokens, prompts included; whole vocabulary, temperature τ

Both means are taken over a whole optimizer step: all accumulated batches on all devices. The loss
is the same as in sft_selfdistill.py. This file needs transformers and accelerate. Copy it into
your project. Stage 1 is a plain Trainer: one epoch on known facts, saved as "before". Stage 2:

    from trainer import SelfDistillationTrainer

    model = AutoModelForCausalLM.from_pretrained("before", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained("before", dtype=torch.float32)
    trainer = SelfDistillationTrainer(model=model, args=args, train_dataset=known_and_new)
    trainer.teacher = teacher.eval().requires_grad_(False).to(trainer.args.device)
    trainer.kl_weight = 4.0
    trainer.train()         # logs "loss" and "kl"; at step 1, kl must be 0 up to rounding

With LoRA (PEFT), leave `teacher` unset: the teacher is the model with its adapter disabled.
docs/use.md has both stages, LoRA, sharding over several devices, and the limitations.
"""
import torch
import torch.nn.functional as F
# For TRL, replace the next line by: from trl import SFTTrainer as Trainer
from transformers import Trainer


class SelfDistillationTrainer(Trainer):
    """A Trainer that adds λ · τ² · KL(teacher ‖ student) to the cross-entropy loss."""

    teacher = None          # a frozen model; None: the PEFT model with its adapter disabled
    kl_weight = 4.0         # λ
    temperature = 4.0       # τ: higher values expose lower-ranked tokens
    kl = 0.0                # this device's contribution to the mean KL of the last optimizer step

    def get_batch_samples(self, *args):
        """Return the batches of one optimizer step; count its tokens on all devices."""
        batches, num_items_in_batch = super().get_batch_samples(*args)
        counts = torch.zeros(2, device=self.args.device)
        for batch in batches:
            # The first token of a row is never predicted.
            loss_mask = batch["labels"][:, 1:] != -100
            attention_mask = batch["attention_mask"][:, 1:]
            counts[0] += loss_mask.sum()
            counts[1] += attention_mask.sum()
        self.n_completion_tokens, self.n_tokens = self.accelerator.reduce(counts)
        self.kl = 0.0
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return this batch's contribution to the loss of the optimizer step.

        Evaluation uses the loss of the parent class, without the KL term.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise ValueError(
                "the model's forward() accepts no **kwargs, so Trainer would divide this loss "
                "by the number of accumulated batches, although it is already normalized"
            )
        if self.teacher is not None and "forward" in vars(self.teacher):
            # TRL and accelerate replace `forward` on the instance, bound to the original model.
            raise ValueError(
                "the teacher is a copy of a model that a trainer has prepared, so it would return "
                "the student's logits; load the teacher with from_pretrained() instead"
            )
        # Position t predicts token t + 1.
        targets = inputs.pop("labels")[:, 1:]                               # (B, T-1)
        attention_mask = inputs["attention_mask"][:, 1:].bool()             # (B, T-1)
        student = model(**inputs).logits[:, :-1].float()                    # (B, T-1, V)
        with torch.no_grad(), self.accelerator.autocast():
            if self.teacher is None:
                with self.accelerator.unwrap_model(model).disable_adapter():
                    teacher = model(**inputs).logits[:, :-1].float()        # (B, T-1, V)
            else:
                teacher = self.teacher(**inputs).logits[:, :-1].float()     # (B, T-1, V)

        # Divide sums by the token counts of the whole step. A mean of per-batch means would give
        # the tokens of short batches more weight. cross_entropy ignores targets of -100.
        ce = F.cross_entropy(student.flatten(0, 1), targets.flatten(), reduction="sum")
        ce = ce / self.n_completion_tokens
        # All N predicted tokens of the batch, without the padding.
        log_q = F.log_softmax(student[attention_mask] / self.temperature, dim=-1)       # (N, V)
        log_p = F.log_softmax(teacher[attention_mask] / self.temperature, dim=-1)       # (N, V)
        # Forward KL, Σ p (log p − log q): the student must cover every token that the teacher
        # finds likely.
        kl = (log_p.exp() * (log_p - log_q)).sum() / self.n_tokens
        self.kl += kl.detach()
        # τ²: the gradient of a KL at temperature τ shrinks as 1/τ² (Hinton et al. 2015).
        loss = ce + self.kl_weight * self.temperature ** 2 * kl
        # The counts cover all devices, but data parallelism averages gradients over them.
        return loss * self.accelerator.num_processes

    def log(self, logs, *args):
        """Add the KL of the last optimizer step to each log entry of the training loss."""
        if "loss" in logs:
            logs = logs | {"kl": float(self.kl)}
        super().log(logs, *args)
