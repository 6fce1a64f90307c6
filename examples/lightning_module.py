"""Quantization-aware training with consistency regularization, in Lightning.

A LightningModule holds student and teacher; `TeacherCallback` makes the teacher follow. The program interrupts itself
after half of the epochs and resumes from the checkpoint, which carries both networks. Needs
`pip install crcore[cli,lightning]`.
"""

import tempfile
from pathlib import Path

import crcore_torch as crt
import lightning as L
import torch
import torch.nn.functional as F
from crcore_torch.lightning import TeacherCallback
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import crcore as cr

RECIPE = cr.Recipe(
    weights=cr.LSQ(bits=4, per_channel=True),
    activations=cr.LSQ(bits=4),
    consistency=cr.Consistency(cr.kl_divergence, weight=cr.linear_ramp(1.0, steps=40)),
    ema=cr.EMA(decay=0.9, warmup=100),
)


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.student = crt.prepare(net, RECIPE)
        self.teacher = crt.Teacher(self.student, RECIPE.ema)  # a submodule: checkpoints carry it, its step included
        self.consistency = crt.ConsistencyLoss(RECIPE.consistency)

    def augment(self, x):
        return (x + 0.1 * torch.randn_like(x)).clamp(0.0, 1.0)

    def training_step(self, batch, index):
        x, y = batch
        logits, target = self.student(self.augment(x)), self.teacher(self.augment(x))
        return F.cross_entropy(logits, y) + self.consistency(logits, target, step=self.teacher.step)

    def validation_step(self, batch, index):
        x, y = batch
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            self.log(f"{name}_accuracy", (model(x).argmax(dim=1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(crt.parameter_groups(self.student, lr=0.2, weight_decay=1e-4), momentum=0.9)


def trainer(epochs, folder):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[TeacherCallback()],
        num_sanity_val_steps=0,  # scales of activations come from the first training batch
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main():
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1297, 500])
    loaders = DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=500)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.ckpt"
        first = trainer(4, folder)
        first.fit(Digits(), *loaders)
        first.save_checkpoint(checkpoint)
        module, second = Digits(), trainer(8, folder)
        second.fit(module, *loaders, ckpt_path=checkpoint)
    print(f"optimizer steps: {module.teacher.step}")
    for name in ("student", "teacher"):
        print(f"{name}: {100.0 * second.callback_metrics[f'{name}_accuracy']:.1f} % of the test images")


if __name__ == "__main__":
    main()
