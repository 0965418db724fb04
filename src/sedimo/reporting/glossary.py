"""The words that a report uses, for people who have not read the papers."""

from __future__ import annotations

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Bits per weight",
        "How much memory one weight takes on average. The original has 16. *As in the papers* counts codes, scales "
        "and codebooks at 16 bits each, the way the published systems do; *as stored* counts the bytes that are "
        "really in the file.",
    ),
    (
        "Format",
        "What a layer's weights become: `uaq4` is a uniform grid of 2^4 = 16 steps for each output channel, "
        "`uaq4g64` one for every 64 inputs of a channel, `kmc4` a codebook of 16 freely placed values per output "
        "channel, `kma4` one codebook for the whole layer, `fp16` the untouched 16-bit number.",
    ),
    (
        "Codebook",
        "A short list of values. Every weight is stored as the number of its entry in the list. The values are "
        "chosen by k-means, so that the weights move as little as possible.",
    ),
    (
        "Decision",
        "One choice of a format. It covers one layer, or several whose weights are equal and stored once.",
    ),
    (
        "Recipe",
        "The formats of all decisions together.",
    ),
    (
        "Noise",
        "The squared difference between what the quantized and the original network compute, relative to the "
        "original's squared size: 0.1 means that a tenth of the power is error.",
    ),
    (
        "SQNR",
        "Signal to quantization noise ratio: -10 log10 of the noise, in decibels, averaged over samples that both "
        "networks make from the same seeds. Higher is better; 10 dB more is a tenth of the noise, 3 dB more half.",
    ),
    (
        "PSNR",
        "The same idea on finished images, relative to the brightest possible pixel.",
    ),
    (
        "FID and KID",
        "Distances between a set of generated images and a set of real ones, in the features of an image classifier. "
        "Lower is better. They judge whether images look right as a whole, not whether they stay the same.",
    ),
    (
        "95 % interval",
        "Where the true value lies in 95 of 100 such measurements. If the interval of a difference holds zero, "
        "the measurement shows no difference.",
    ),
    (
        "Sensitivity",
        "The cost of giving one layer a certain format, while all others stay as they are.",
    ),
)
