"""Align the tiny preset step by step, and draw samples: `python examples/align_tiny.py [--steps 20] [--out FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vapi_fast import AlignConfig, generate
from vapi_fast.alignment.models import load_models
from vapi_fast.alignment.step import align_step, make_trainer
from vapi_fast.data.dataset import ImageData
from vapi_fast.data.pictures import save_sheets
from vapi_fast.runtime.checkpoint import save_generator

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("aligned_tiny"))
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = AlignConfig(model="tiny", steps=options.steps)  # 32 images × 8 rollouts a step
models = load_models(config, device)
trainer = make_trainer(models, config)
classes = torch.arange(9, device=device)
sheets = [("before", models.tokenizer.decode(generate(models.generator, classes, seed=1)))]

data = ImageData(config.data, config.image_size)
for step, batch in enumerate(data.batches(config.batch_size, config.steps, seed=config.seed)):
    metrics, _ = align_step(trainer, batch.to(device), step).read()
    print(f"step {step + 1}: reward {metrics['reward']:.4f}, mse {metrics['mse']:.4f}, lpips {metrics['lpips']:.4f}")

sheets.append(("aligned", models.tokenizer.decode(generate(models.generator, classes, seed=1))))
save_generator(options.out / "aligned.pt", models.generator.state_dict())
save_sheets(options.out / "samples.png", sheets, columns=3)
print(f"{options.out}: aligned.pt, samples.png")
