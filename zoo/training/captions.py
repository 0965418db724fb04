"""What the embedded U-Net is told: captions of the ten classes, and a tokenizer that knows their words.

The vocabulary is made the way CLIP's was, from these captions instead of the web: all bytes, all bytes at the end
of a word, then the pairs that byte-pair encoding merges. Each word of a caption becomes one token, and any other
text is spelt, byte by byte if need be.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("a photo of {}", "a picture of {}", "a small photo of {}", "{}", "{bare}")
TASK = "text-to-image"  # under it, the text encoder's config tells what prompts and guidance suit the pipeline
MAX_TOKENS = 16
_END_OF_WORD = "</w>"
_LARGEST_VOCABULARY = 2048  # far above what the captions can fill


def captions_of(name: str) -> tuple[str, ...]:
    """The captions of a class, such as "a photo of a cat", "a cat" and "cat"."""
    article = "an" if name[0] in "aeiou" else "a"
    return tuple(template.format(f"{article} {name}", bare=name) for template in TEMPLATES)


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer of about 570 tokens, the same at every call."""
    rules = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    texts = [text for name in CLASS_NAMES for text in captions_of(name)]
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        initial_alphabet=alphabet,
        end_of_word_suffix=_END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
