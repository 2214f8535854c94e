"""The loops of accelerate, transformers and Lightning, each skipped where it is not installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fused_lora
from tests.stacks.sample import batch, close, patched, train, trained


class Images(nn.Module):
    """A patched ViT as transformers wants its models: keywords in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = patched()

    def forward(self, pixel_values, labels=None):
        logits = self.vit(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_accelerate_accumulates_and_saves(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = patched()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    data = DataLoader(TensorDataset(*batch()), batch_size=2)
    run, optimizer, data = accelerator.prepare(model, optimizer, data)
    for _ in range(3):
        for x, labels in data:
            with accelerator.accumulate(run):
                accelerator.backward(F.cross_entropy(run(x), labels))
                optimizer.step()
                optimizer.zero_grad()
    close({n: p.detach() for n, p in trained(model).items()}, train(patched()))
    fused_lora.save(accelerator.unwrap_model(run), tmp_path)
    other = patched()
    fused_lora.load(other, tmp_path)
    close(dict(trained(other)), dict(trained(model)), rtol=0, atol=0)


def test_transformers_trainer_trains_saves_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    x, labels = batch(8)
    data = [
        {"pixel_values": image, "labels": label} for image, label in zip(x, labels, strict=True)
    ]

    def trainer(epochs: int):
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=epochs, use_cpu=True,
            gradient_accumulation_steps=2, learning_rate=0.01, lr_scheduler_type="constant",
            save_strategy="epoch", logging_steps=1, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(Images(), arguments, train_dataset=data)

    whole = trainer(3)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert float(losses[-1]) < float(losses[0])
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 3
    close(dict(trained(resumed.model.cpu())), dict(trained(whole.model.cpu())))


def test_lightning_fits(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Fit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vit = patched()

        def training_step(self, batch, _):
            x, labels = batch
            return F.cross_entropy(self.vit(x), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(trained(self).values(), lr=0.1)

    module = Fit()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(*batch()), batch_size=4))
    found = {n.removeprefix("vit."): p.detach() for n, p in trained(module).items()}
    close(found, train(patched()))
