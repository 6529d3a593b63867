"""Train and score mini-FLUX on a CPU; README.md has the commands and the figures."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from autoencoder import AutoencoderRecipe, train_autoencoder
from diffusers import AutoencoderKL, FluxPipeline
from fashion_mnist import LabelledImages, load_split
from flow import FlowRecipe, train_flow
from reader import load_classifier, save_classifier, train_classifier
from sampling import Sampling
from scoring import Figures, Scorer, score_sampling

STAGES = ("vae", "flux", "eval")


def main() -> None:
    """Run the stages that the command line names, in their order."""
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    # Fresh networks produce denormals, which slow a CPU down many times.
    torch.set_flush_denormal(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    full = load_split(arguments.data, "train")
    train = LabelledImages(*(part[: arguments.images] for part in full))
    for stage in arguments.stages:
        # A seed for each stage, so that a stage run alone repeats what it did among the others.
        torch.manual_seed(10 * arguments.seed + STAGES.index(stage))
        start_s = time.monotonic()
        figures = _run_stage(stage, train, arguments)
        figures["seconds"] = round(time.monotonic() - start_s)
        figures["provenance"] = _provenance(arguments)
        text = json.dumps(figures, indent=1, default=str)
        (arguments.out / f"result_{stage}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{stage}: {text}")


def _provenance(arguments: argparse.Namespace) -> Figures:
    """Say what a figure depends on: options, versions, machine and date."""
    return {
        "arguments": vars(arguments),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "machine": platform.platform(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _run_stage(stage: str, train: LabelledImages, arguments: argparse.Namespace) -> Figures:
    vae_folder = arguments.out / "vae_fp32"
    if stage == "vae":
        vae_recipe = AutoencoderRecipe(steps=arguments.vae_steps)
        train_autoencoder(train.images, vae_recipe).save_pretrained(vae_folder)
        return {}
    if stage == "flux":
        vae = AutoencoderKL.from_pretrained(vae_folder).eval()
        recipe = FlowRecipe(steps=arguments.flux_steps, save_every=arguments.save_every)
        return {"loss": train_flow(vae, train, recipe, arguments.out)}
    return _evaluate(train, arguments)


def _evaluate(train: LabelledImages, arguments: argparse.Namespace) -> Figures:
    folder = arguments.pipeline or arguments.out / "bf16"
    reader_file = folder / "classifier.safetensors"
    if not reader_file.exists():
        save_classifier(train_classifier(train, arguments.reader_epochs), reader_file)
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scorer = Scorer(load_classifier(reader_file), load_split(arguments.data, "t10k"))
    sheet = arguments.out / "samples.png"
    return {
        **scorer.score_reader(train.images[: 10 * arguments.seeds]),
        **scorer.score_autoencoder(pipe),
        **score_sampling(pipe, scorer, arguments.samplings, seeds=arguments.seeds, sheet=sheet),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with the *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=Path("out/miniflux"), help="written to")
    parser.add_argument("--stages", type=_stages, default=STAGES, help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--images", type=int, default=60000, help="training pictures used")
    parser.add_argument("--vae-steps", type=int, default=AutoencoderRecipe.steps)
    parser.add_argument("--flux-steps", type=int, default=FlowRecipe.steps)
    parser.add_argument("--save-every", type=int, default=FlowRecipe.save_every, help="steps")
    parser.add_argument("--reader-epochs", type=int, default=3)
    parser.add_argument(
        "--pipeline",
        type=Path,
        help="folder to score instead of OUT/bf16; where it lacks classifier.safetensors, "
        "a reader is trained and written there",
    )
    parser.add_argument("--seeds", type=int, default=40, help="pictures of each prompt scored")
    parser.add_argument(
        "--samplings",
        type=_samplings,
        default=_samplings("12:1,8:1,12:2"),
        help="steps:true_cfg_scale pairs scored, comma-separated",
    )
    return parser.parse_args()


def _stages(text: str) -> tuple[str, ...]:
    stages = tuple(text.split(","))
    if unknown := sorted(set(stages) - set(STAGES)):
        message = f"unknown stages {unknown}; known: {', '.join(STAGES)}"
        raise argparse.ArgumentTypeError(message)
    return stages


def _samplings(text: str) -> tuple[Sampling, ...]:
    return tuple(map(Sampling.parse, text.split(",")))


if __name__ == "__main__":
    main()
