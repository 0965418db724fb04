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
        "Error feedback",
        "A way to choose codes. The nearest code of each weight is the best for that weight, and not for the layer: "
        "where two inputs rise and fall together, the error of one weight can be cancelled by the other. With error "
        "feedback, weights are rounded one after another, and each makes up for what the ones before it missed.",
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

EXPLANATION_GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Trial",
        "One recipe that was really run and compared with full precision.",
    ),
    (
        "Predictor and baseline",
        "A predictor tells the quality of a recipe without running it. A baseline is a simpler rule for the same "
        "task, such as the average bits or the sum of weight errors. A predictor that is no better than its baselines "
        "has learned nothing that they do not say already.",
    ),
    (
        "Score",
        "What the predictor thinks of one choice, a layer at a format, with regard to the quality of the whole. Higher "
        "is better. Scores are for comparing choices with each other.",
    ),
    (
        "Operation and block",
        "An operation is the part that a layer plays, such as the query of an attention. A denoiser repeats the same "
        "operations in many blocks, one after the other.",
    ),
    (
        "Held-out recipes, fold",
        "Recipes that were kept from the predictor while it learned, so that it cannot know their quality by heart. "
        "The trials are divided into folds, and each fold is held out once.",
    ),
    (
        "Band",
        "Recipes of nearly the same size. Within a band, bits tell nothing about quality any more; the choice of "
        "layers does.",
    ),
    (
        "Rank correlation (SRCC)",
        "Spearman's: 1 if the predicted order of recipes is the measured one, 0 for guessing, negative for an order "
        "that is rather the reverse.",
    ),
    (
        "Kendall's tau",
        "Another measure of order: the share of pairs of recipes in the right order less that in the wrong one.",
    ),
    (
        "NDCG@10",
        "Whether the ten recipes predicted to be best are really good ones, the first counting most; 1 is perfect.",
    ),
    (
        "Hop",
        "How far the graph network looks around a layer: 0 is the layer alone, 1 its direct neighbours as well, and so "
        "on, up to whole blocks.",
    ),
    (
        "Confirmed, refuted, open",
        "A prediction is confirmed if the measured change goes the same way and its 95 % interval does not hold zero, "
        "refuted if it goes the other way, open if the interval holds zero.",
    ),
)
