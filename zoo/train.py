"""Trains the embedded models of Sedimo from CIFAR-10, stage by stage, on any machine.

    python zoo/train.py autoencoder --data DIR --minutes 8 --work DIR
    python zoo/train.py classifier  --data DIR --minutes 8 --work DIR
    python zoo/train.py denoiser    --data DIR --minutes 60 --work DIR
    python zoo/train.py unet        --data DIR --minutes 60 --work DIR
    python zoo/train.py suite       --data DIR --minutes 15 --work DIR --start PIPELINE [--models NAME ...]
    python zoo/train.py assemble    --data DIR --work DIR --out zoo/src/sedimo_zoo/data

`denoiser` is the transformer of `cifar-dit`, `unet` the U-Net of `cifar-ldm` and its text encoder; `assemble` writes a
folder for each that the work folder holds, and the classifier if it holds that. `suite` trains the denoisers of
`benchmarks/generalization.py`, ready to use in `WORK/suite`, with the autoencoder of an embedded pipeline.

Every stage stops when its minutes are spent, and goes on where it was when started again with more. With
`--start PIPELINE` both denoisers use the autoencoder of a pipeline that was assembled before, and the transformer
starts from its weights instead of from random ones.
`DIR` of `--data` holds `cifar10_train.parquet` and `cifar10_test.parquet` (columns `jpeg`, `label`).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "src"))

from training import assemble, autoencoder, classifier, denoiser, suite, unet

STAGES = {
    "autoencoder": autoencoder.run,
    "classifier": classifier.run,
    "denoiser": denoiser.run,
    "unet": unet.run,
    "suite": suite.run,
    "assemble": assemble.run,
}


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".zoo-work"))
    parser.add_argument("--out", type=Path, default=Path("zoo/src/sedimo_zoo/data"))
    parser.add_argument("--start", type=Path, help="folder of an assembled pipeline to go on from")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="*", help="of the suite, all by default")
    parser.add_argument("--threads", type=int, help="of the suite's training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    STAGES[arguments.stage](arguments)


if __name__ == "__main__":
    main()
