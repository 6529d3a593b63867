"""Scoring a pipeline: how often the reader sees the class that the prompt asked for."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from fashion_mnist import LabelledImages, to_grey28, to_rgb32
from prompts import SCORED_PROMPTS
from reader import frechet_distance, read
from sampling import Sampling, generate, save_contact_sheet
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import FluxPipeline
    from torch import nn

_log = logging.getLogger("miniflux.scoring")
_CLASSES = len(SCORED_PROMPTS)

Figures = dict[str, Any]
"""Named results, ready for JSON."""


class Scorer:
    """Scores pictures against the real test pictures.

    Args:
        classifier: the reader.
        test: the real test split.

    """

    def __init__(self, classifier: nn.Sequential, test: LabelledImages) -> None:
        """Read the test pictures once."""
        self._classifier = classifier
        self._test = test
        self._reading = read(classifier, test.images)

    def score_reader(self, real: torch.Tensor) -> Figures:
        """Say what the scale is worth: the reader's accuracy, and the distance of ``real``.

        Args:
            real: ``(n, 1, 28, 28)`` training pictures, as many as will be sampled.

        """
        features = read(self._classifier, real).features
        distance = frechet_distance(features, self._reading.features)
        return {
            "reader_on_real_test": _share(self._reading.classes == self._test.labels),
            "frechet_of_real_train": round(distance, 3),
        }

    @torch.no_grad()
    def score_autoencoder(self, pipe: FluxPipeline, count: int = 2000) -> Figures:
        """Compare ``count`` test pictures with what the VAE makes of them."""
        real, labels = self._test.images[:count], self._test.labels[:count]
        decoded = torch.cat([pipe.vae(to_rgb32(part)).sample for part in torch.split(real, 500)])
        grey = to_grey28(decoded)
        # The values span [-1, 1], so the peak of the PSNR is 2 and its square 4.
        psnr_db = 10 * math.log10(4 / functional.mse_loss(grey, real).item())
        is_right = read(self._classifier, grey).classes == labels
        return {"vae_psnr_db": round(psnr_db, 2), "reader_on_vae": _share(is_right)}

    def score_samples(self, images: torch.Tensor) -> Figures:
        """Score ``(10, seeds, 3, 32, 32)`` samples in [-1, 1], one row for each scored prompt."""
        features, classes = read(self._classifier, to_grey28(images.flatten(0, 1)))
        asked = torch.arange(_CLASSES)[:, None]
        is_right = classes.view(_CLASSES, -1) == asked
        return {
            "accuracy": _share(is_right),
            "frechet": round(frechet_distance(features, self._reading.features), 3),
            "by_prompt": dict(zip(SCORED_PROMPTS, map(_share, is_right), strict=True)),
        }


def _share(hits: torch.Tensor) -> float:
    return round(hits.double().mean().item(), 4)


def score_sampling(
    pipe: FluxPipeline, scorer: Scorer, samplings: Sequence[Sampling], *, seeds: int, sheet: Path
) -> Figures:
    """Sample and score a pipeline under several settings.

    Args:
        pipe: the pipeline.
        scorer: what reads the samples.
        samplings: the settings.
        seeds: pictures of each prompt and setting.
        sheet: receives the first ten samples of each prompt under the last setting.

    Returns:
        For each setting accuracy, Frechet distance, seconds, and accuracy by prompt.

    """
    figures: Figures = {}
    for sampling in samplings:
        start_s = time.monotonic()
        images = generate(pipe, SCORED_PROMPTS, seeds=seeds, sampling=sampling)
        seconds = (time.monotonic() - start_s) / (seeds * _CLASSES)
        row = {"seconds_per_image": round(seconds, 4), **scorer.score_samples(images)}
        figures[f"steps {sampling.steps}, true_cfg_scale {sampling.true_cfg_scale:g}"] = row
        _log.info("%s accuracy %.3f frechet %.2f", sampling, row["accuracy"], row["frechet"])
        save_contact_sheet(images[:, :10], sheet)
    return figures
