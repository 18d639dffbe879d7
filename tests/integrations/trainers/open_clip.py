"""A loop of open_clip's shape: one model that returns features and its scale, AMP, AdamW, `loss(**out)`."""

import math

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils import clip_grad_norm_

from .common import BagOfWords, batches, recall_at_1, scenes

SIZE = 128
GRAD_CLIP = 1.0


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        features = scenes()["train_pictures"].shape[1]
        self.visual = nn.Sequential(nn.Linear(features, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        self.text = BagOfWords(int(scenes()["words"]), SIZE)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pictures, captions):
        return {
            "image_features": normalize(self.visual(pictures), dim=-1),
            "text_features": normalize(self.text(captions), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def train(loss_function, steps=200, batch_size=64, dtype=torch.float32, amp=True):
    """The losses of all steps, and the recalls at the end."""
    torch.manual_seed(0)
    model = Clip().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.1)

    losses = []
    for pictures, captions in batches(steps, batch_size, dtype):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model_out = model(pictures, captions)
            computed = loss_function(**model_out, output_dict=True)
            total_loss = sum(computed.values())
        total_loss.backward()
        clip_grad_norm_(model.parameters(), GRAD_CLIP, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(total_loss.item())
    recalls = recall_at_1(
        lambda x: normalize(model.visual(x), dim=-1),
        lambda x: normalize(model.text(x), dim=-1),
        dtype,
    )
    return torch.tensor(losses, dtype=torch.float64), recalls
