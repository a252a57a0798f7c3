"""Train the demo model from scratch: `python -m tools.demo_model.train`.

Stages write checkpoints to the work folder; a finished stage is skipped, an interrupted one continues. The
first two are independent: run them in parallel with `--stages vision` and `--stages synthetic`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import ficoco_vllm.demo_model
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.decoder import Decoder, Projector
from tools.demo_model.export import export
from tools.demo_model.tokenizer import build_tokenizer
from tools.demo_model.train_features import ALL_TOKENS, SUBSETS, train_features
from tools.demo_model.train_synthetic import train_synthetic
from tools.demo_model.train_vision import train_vision
from tools.demo_model.vision import VisionTower

SECONDS = {"vision": 2000.0, "synthetic": 950.0, "subsets": 900.0, "all_tokens": 600.0}
NUM_IMAGES = 8000


def export_latest(work: Path, folder: Path) -> None:
    """Export the last stage's checkpoint.

    Raises:
        FileNotFoundError: no stage on features has written a checkpoint yet.
    """
    checkpoints = [
        work / f"{phase.name}.pt" for phase in (ALL_TOKENS, SUBSETS) if (work / f"{phase.name}.pt").exists()
    ]
    if not checkpoints:
        raise FileNotFoundError(f"nothing to export in {work}: train the stages first")
    tokenizer = build_tokenizer()
    tower, projector = VisionTower(), Projector()
    decoder = Decoder(len(tokenizer), ARCHITECTURE.decoder_layers)
    saved = torch.load(checkpoints[0])
    tower.load_state_dict(torch.load(work / "vision.pt")["tower"])
    projector.load_state_dict(saved["projector"])
    decoder.load_state_dict(saved["decoder"])
    export(folder, tokenizer, tower, projector, decoder)


def main() -> None:
    """Run the chosen stages in order."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.train", description=__doc__)
    stages = [*SECONDS, "export"]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, help="which to run")
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), help="folder of checkpoints")
    parser.add_argument("--output", type=Path, default=ficoco_vllm.demo_model.path(), help="exported model")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the time of every stage")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="images whose features are cached")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, seed = options.work, options.seed
    work.mkdir(parents=True, exist_ok=True)
    seconds = {name: options.scale * value for name, value in SECONDS.items()}
    run: dict[str, Callable[[], None]] = {
        "vision": lambda: train_vision(work, seconds["vision"], seed),
        "synthetic": lambda: train_synthetic(work, seconds["synthetic"], seed + 1),
        "subsets": lambda: train_features(work, SUBSETS, seconds["subsets"], options.images, seed + 2),
        "all_tokens": lambda: train_features(
            work, ALL_TOKENS, seconds["all_tokens"], options.images, seed + 3
        ),
        "export": lambda: export_latest(work, options.output),
    }
    for stage in stages:
        if stage in options.stages:
            run[stage]()


if __name__ == "__main__":
    main()
