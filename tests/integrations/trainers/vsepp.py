"""A loop of vsepp's shape: two encoders with unit output, Adam, gradient clipping, `criterion(im, s)`."""

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils import clip_grad_norm_

from .common import BagOfWords, batches, recall_at_1, scenes

SIZE = 128
GRAD_CLIP = 2.0
WARM_UP = 0.5  # of the steps with the sum of hinges, as VSE∞ does


def train(criterion, steps=300, batch_size=64, dtype=torch.float32):
    """The losses of all steps, and the recalls at the end."""
    torch.manual_seed(0)
    image_encoder = nn.Linear(scenes()["train_pictures"].shape[1], SIZE).to(dtype)
    caption_encoder = BagOfWords(int(scenes()["words"]), SIZE).to(dtype)
    parameters = [*image_encoder.parameters(), *caption_encoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-6)

    losses = []
    for step, (pictures, captions) in enumerate(batches(steps, batch_size, dtype)):
        criterion.max_violation = step >= WARM_UP * steps
        im = normalize(image_encoder(pictures))
        s = normalize(caption_encoder(captions))
        loss = criterion(im, s)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        losses.append(loss.item())
    recalls = recall_at_1(
        lambda x: normalize(image_encoder(x)), lambda x: normalize(caption_encoder(x)), dtype
    )
    return torch.tensor(losses, dtype=torch.float64), recalls
