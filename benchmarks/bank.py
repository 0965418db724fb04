"""The bank at the size of PixArt-XL (610 M weights, float16, from safetensors), and the main job by weight error.

    python benchmarks/bank.py [--work DIR] [--layers 28] [--out bank.json]

Part 1 fits the six formats {uaq, kmc, kma} x {3, 4} of every layer in full and saves them, then opens the saved
bank again. Part 2 times scikit-learn's KMeans (the published implementation's calls) on sampled rows of the same
weights in the same process and scales it to the model. Part 3 runs `sedimo quantize --method error` on the same
folder with the 20 formats of `wide`. Weights are random: times do not depend on training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

import sedimo
from sedimo.bank import fit_bank
from sedimo.cli.console import ConsoleProgress
from sedimo.jobs.quantize import peak_rss_bytes
from sedimo.pipelines.weights import FileWeights

PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 64,
    "patch_size": 2,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "use_additional_conditions": False,
}
ROWS_OF_SKLEARN = 12


def write_model(folder: Path, n_layers: int) -> None:
    """A denoiser's folder with random float16 weights."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = PixArtTransformer2DModel.from_config({**PIXART, "num_layers": n_layers})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(value.shape, generator=generator) * 0.02).half()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model.save_config(folder)


def fit_all(folder: Path, cache: Path) -> dict[str, float]:
    """Part 1."""
    weights = FileWeights(folder)
    begin = time.perf_counter()
    with torch.device("meta"):
        model = PixArtTransformer2DModel.from_config(PixArtTransformer2DModel.load_config(folder))
    space = sedimo.search_space(sedimo.trace(model), "paper")
    traced = time.perf_counter()
    fit_bank(weights, space, cache=cache, progress=ConsoleProgress())
    fitted = time.perf_counter()
    fit_bank(weights, space, cache=cache)
    return {
        "weights": space.params,
        "trace_seconds": traced - begin,
        "fit_seconds": fitted - traced,
        "reuse_seconds": time.perf_counter() - fitted,
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }


def scikit_learn_seconds(folder: Path, n_weights: int) -> dict[str, float]:
    """Part 2: what the published calls would take for k-means per channel at 3 and 4 bits on the whole model."""
    weights = FileWeights(folder)
    name = next(name for name in weights.layer_names if weights.read(name).shape == (1152, 1152))
    rows = weights.read(name)[:ROWS_OF_SKLEARN].float().numpy()
    found = {}
    for bits in (3, 4):
        begin = time.perf_counter()
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")
            for row in rows:
                KMeans(n_clusters=2**bits, max_iter=100, n_init="auto").fit(row.reshape(-1, 1))
        found[f"kmc{bits}_seconds"] = (time.perf_counter() - begin) / rows.size * n_weights
    return found


def quantize_by_error(folder: Path, out: Path) -> dict[str, float]:
    """Part 3."""
    command = [sys.executable, "-m", "sedimo.cli", "quantize", str(folder), "--method", "error", "--bits", "3.7"]
    begin = time.perf_counter()
    done = subprocess.run([*command, "-o", str(out), "--json"], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    names = ("paper_bits", "stored_bits", "stored_bytes", "file_bytes", "peak_rss_bytes", "gap")
    return {"seconds": time.perf_counter() - begin, **{name: found[name] for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bank"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path("runs/bank.json"))
    arguments = parser.parse_args()
    folder = arguments.work / f"pixart-{arguments.layers}"
    write_model(folder, arguments.layers)
    stamp = f"{time.time():.0f}"
    found: dict[str, object] = {}
    found["bank"] = bank = fit_all(folder, arguments.work / f"cache-{stamp}")
    print(
        f"six formats of {bank['weights'] / 1e6:.0f} M weights: {bank['fit_seconds']:.0f} s, reused in "
        f"{bank['reuse_seconds']:.1f} s, peak {bank['peak_rss_bytes'] / 2**30:.2f} GiB",
        flush=True,
    )
    found["scikit-learn"] = rival = scikit_learn_seconds(folder, bank["weights"])
    ratio = sum(rival.values()) / bank["fit_seconds"]
    print(
        f"scikit-learn, kmc3 and kmc4 alone: {sum(rival.values()):.0f} s (from {ROWS_OF_SKLEARN} rows), "
        f"{ratio:.1f} times our six formats",
        flush=True,
    )
    found["quantize"] = job = quantize_by_error(folder, arguments.work / f"out-{stamp}")
    print(f"quantize --method error, 20 formats: {job['seconds']:.0f} s, peak {job['peak_rss_bytes'] / 2**30:.2f} GiB")
    arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
