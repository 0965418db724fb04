"""What may be decided, and a decision for all of it: `SearchSpace` and `Recipe`.

A decision covers one layer, or several that hold the same weight. A layer whose input is a concatenation of streams has
one decision per stream, about the weights that read it: a recipe tells them as parts along the layer's input channels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from sedimo.codec import content_key, parse_json, to_json
from sedimo.errors import InputError, StateError
from sedimo.graph.model import DenoiserGraph, Stream, first_layers, last_layers
from sedimo.quant.formats import FP16, FULL_BITS, Format, count_bops, paper_bytes, parse_formats, stored_bytes
from sedimo.quant.parts import Entry, PartFormat, covering, entry_text, parts_of, read_entry

RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of a recipe: the layers it covers (equal weights) and the formats it may take.

    `macs` is summed over the layers [MACs]; `shape` is that of one layer, `[out, in, ...]`. With a `stream`, the
    decision is about the weights that read these input channels alone; shape and MACs are theirs.
    """

    name: str
    layers: tuple[str, ...]
    operation: str
    block: str
    shape: tuple[int, ...]
    macs: int
    formats: tuple[Format, ...]
    stream: Stream | None = None

    @property
    def share(self) -> float:
        """The share of the layer's weights that it is about."""
        return 1.0 if self.stream is None else self.stream.width / self.stream.n_inputs

    @property
    def params(self) -> int:
        """Number of weights, stored once for all layers."""
        return math.prod(self.shape)

    @property
    def weight_formats(self) -> tuple[Format, ...]:
        """The different formats of weights that it may take, full precision left out."""
        return tuple(dict.fromkeys(f.weight_format for f in self.formats if f.is_quantized))

    @property
    def activation_bits(self) -> tuple[int, ...]:
        """The bits below 16 that its inputs may take, ascending."""
        return tuple(sorted({f.activation_bits for f in self.formats} - {FULL_BITS}))

    @property
    def changes(self) -> tuple[str, ...]:
        """What can change, each by itself: its weight formats (`uaq4`), then its activations (`a8`)."""
        return (*map(str, self.weight_formats), *(f"a{bits}" for bits in self.activation_bits))

    def paper_bytes(self, number_format: Format) -> int:
        """Bytes in the papers' accounting."""
        return paper_bytes(number_format, self.shape)

    def stored_bytes(self, number_format: Format) -> int:
        """Bytes of the tensors that replace the weight."""
        return stored_bytes(number_format, self.shape)


@dataclass(frozen=True)
class SearchSpace:
    """The decisions of one denoiser, and notes on formats that were dropped and streams that were not told apart.

    `attention_macs` are those of the products of attention, which no recipe changes [MACs]. They follow from the
    graph, and notes from graph and formats.
    """

    denoiser: str
    graph_digest: str
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)
    attention_macs: int = field(default=0, compare=False)

    @cached_property
    def decision_index(self) -> Mapping[str, Decision]:
        """Decisions by name."""
        return {d.name: d for d in self.decisions}

    @cached_property
    def weights(self) -> tuple[Decision, ...]:
        """What is stored once, each as one decision: the streams of a layer are put together."""
        found: dict[str, Decision] = {}
        for d in self.decisions:
            if d.stream is None:
                found[d.layers[0]] = d
                continue
            macs = d.macs + (found[d.layers[0]].macs if d.layers[0] in found else 0)
            shape = (d.shape[0], d.stream.n_inputs, *d.shape[2:])
            operation = d.operation.rpartition("[")[0]
            found[d.layers[0]] = replace(d, name=d.layers[0], operation=operation, shape=shape, macs=macs, stream=None)
        return tuple(found.values())

    @cached_property
    def _free(self) -> tuple[Decision, ...]:
        """The decisions that have a choice; all of them where none has."""
        return tuple(d for d in self.decisions if len(d.formats) > 1) or self.decisions

    @property
    def common_formats(self) -> tuple[Format, ...]:
        """The formats, fp16 left out, that every decision with a choice can take, by their texts."""
        common = set.intersection(*(set(d.formats) for d in self._free))
        return tuple(f for f in sorted(common, key=str) if f.is_quantized)

    @property
    def params(self) -> int:
        """Number of weights that recipes are about, shared ones once."""
        return sum(d.params for d in self.decisions)

    def paper_bits(self, recipe: Recipe) -> float:
        """Average bits per weight of a recipe in the papers' accounting [bits]."""
        return 8 * self.paper_bytes(recipe) / self.params

    def paper_bytes(self, recipe: Recipe) -> int:
        """Bytes of a recipe in the papers' accounting, unlisted layers at fp16 [bytes]."""
        return self._bytes(paper_bytes, recipe)

    def stored_bytes(self, recipe: Recipe) -> int:
        """Bytes of the tensors of all weights under a recipe, those at fp16 included [bytes]."""
        return self._bytes(stored_bytes, recipe)

    def _bytes(self, size: Callable[[Format, Sequence[int]], int], recipe: Recipe) -> int:
        return sum(
            size(part.format, (w.shape[0], part.stop - part.start, *w.shape[2:]))
            for w in self.weights
            for part in recipe.parts(w)
        )

    @property
    def attention_bops(self) -> int:
        """Bit operations of the products of attention, whose inputs stay at 16 bits [BOPs]."""
        return count_bops(self.attention_macs, FP16)

    @property
    def full_bops(self) -> int:
        """Bit operations of one sample and denoiser call at 16 bits, attention included [BOPs]."""
        return self.bops(Recipe({}))

    def bops(self, recipe: Recipe) -> int:
        """Bit operations of one sample and denoiser call under a recipe, attention included [BOPs].

        Each part of a layer's inputs has its share of the layer's MACs.
        """
        layers = (
            sum(count_bops(w.macs * (p.stop - p.start), p.format) for p in recipe.parts(w)) // w.shape[1]
            for w in self.weights
        )
        return sum(layers) + self.attention_bops

    def uniform(self, number_format: Format) -> Recipe:
        """Every decision with a choice at one format; the others as they must be."""
        only = {d.name: d.formats[0] for d in self.decisions}
        return self.recipe(only | {d.name: number_format for d in self._free})

    def recipe(self, choice: Mapping[str, Format]) -> Recipe:
        """The recipe of one format per decision; decisions not named stay at fp16.

        Raises:
            InputError: a name that is no decision.
        """
        if unknown := sorted(choice.keys() - self.decision_index.keys()):
            raise InputError(f"no such decision in {self.denoiser}: {unknown[:5]}")
        chosen = {d.name: choice[d.name] for d in self.decisions if d.name in choice}
        return compose(chosen, self.layers, self.streams)

    @property
    def layers(self) -> dict[str, tuple[str, ...]]:
        """The layers of each decision by its name."""
        return {d.name: d.layers for d in self.decisions}

    @property
    def streams(self) -> dict[str, Stream]:
        """The streams of the decisions that have one, by name."""
        return {d.name: d.stream for d in self.decisions if d.stream is not None}

    def check(self, recipe: Recipe) -> None:
        """Refuses a recipe that this denoiser cannot take.

        Raises:
            InputError: a layer is unknown, or differs from a layer that shares its weight.
        """
        if unknown := sorted(set(recipe.layers) - {layer for d in self.decisions for layer in d.layers}):
            raise InputError(f"the recipe names layers that {self.denoiser} does not have: {unknown[:5]}")
        for decision in self.decisions:
            entries = [recipe.layers.get(layer, FP16) for layer in decision.layers]
            if len(set(entries)) != 1:
                found = ", ".join(sorted(map(str, entries)))
                raise InputError(
                    f"layers with equal weights must have one format, got {found} for {', '.join(decision.layers[:3])}"
                )

    def choice(self, recipe: Recipe) -> dict[str, Format]:
        """The format of every decision under a recipe, fp16 where the recipe is silent.

        Raises:
            InputError: a layer is unknown, in other parts than here, or differs from a layer that shares its weight.
        """
        self.check(recipe)
        found = {}
        for d in self.decisions:
            number_format = recipe.format_of(d.layers[0], d.stream)
            if number_format is None:
                raise InputError(
                    f"layer {d.layers[0]!r} is split in parts otherwise than in this space: it is "
                    f"{entry_text(recipe.layers[d.layers[0]])}, and {d.name!r} must have a format of its own"
                )
            found[d.name] = number_format
        return found


@dataclass(frozen=True)
class Recipe:
    """Layer name to format, or to the formats of several parts along its input channels.

    Layers not named stay as they are. Equal recipes have equal keys, whatever the order of their layers.
    """

    layers: Mapping[str, Entry]

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, str | Format | Sequence[Mapping[str, object] | PartFormat]]) -> Recipe:
        """A recipe from layer names to formats, their texts, or lists of `{start, stop, format}`.

        Raises:
            InputError: a value that is neither, naming the layer.
        """
        layers: dict[str, Entry] = {}
        for name, value in mapping.items():
            try:
                layers[name] = read_entry(value)
            except (InputError, StateError) as error:
                raise InputError(f"layer {name!r} cannot take format {value!r}: {error}") from error
        return cls(layers)

    def format_of(self, layer: str, stream: Stream | None = None) -> Format | None:
        """The one format of a layer or of a stream of it, fp16 when the recipe is silent; None if it has none.

        A layer in one format as a whole has other scales and codebooks than its streams in that format have.
        """
        entry = self.layers.get(layer, FP16)
        if isinstance(entry, Format):
            return entry if stream is None or not entry.is_quantized else None
        if stream is None:
            return None
        return next((p.format for p in entry if (p.start, p.stop) == (stream.start, stream.stop)), None)

    def parts(self, weight: Decision) -> tuple[PartFormat, ...]:
        """The parts of a whole weight, fp16 when the recipe is silent."""
        return parts_of(self.layers.get(weight.layers[0], FP16), weight.shape[1])

    @property
    def formats(self) -> frozenset[Format]:
        """All formats that it mentions."""
        return frozenset(part.format for entry in self.layers.values() for part in parts_of(entry, 1))

    @property
    def activation_bits(self) -> dict[str, int]:
        """Bits of the inputs of the layers that take fewer than 16.

        Raises:
            InputError: parts of a layer that differ in it; a layer's inputs are rounded once.
        """
        found: dict[str, int] = {}
        for layer, entry in self.layers.items():
            widths = {part.format.activation_bits for part in parts_of(entry, 1)}
            if len(widths) != 1:
                raise InputError(f"the parts of layer {layer!r} must agree on activation bits, got {sorted(widths)}")
            if (bits := widths.pop()) != FULL_BITS:
                found[layer] = bits
        return found

    @property
    def weights_alone(self) -> Recipe:
        """The same formats of weights, with activations left at 16 bits."""
        return self.with_activations({})

    def with_activations(self, bits: Mapping[str, int]) -> Recipe:
        """The same formats of weights, with activations of so many bits by layer, 16 where it is silent."""

        def rounded(entry: Entry, width: int) -> Entry:
            if isinstance(entry, Format):
                return replace(entry, activation_bits=width)
            return tuple(replace(p, format=replace(p.format, activation_bits=width)) for p in entry)

        return Recipe({name: rounded(entry, bits.get(name, FULL_BITS)) for name, entry in self.layers.items()})

    @property
    def key(self) -> str:
        """Content key; layers left at fp16 do not count."""
        return content_key({name: entry for name, entry in self.layers.items() if entry != FP16})

    def to_json(self) -> str:
        """The recipe as a JSON file's text."""
        return to_json({"sedimo_recipe": RECIPE_VERSION, "layers": self.layers})

    @classmethod
    def from_json(cls, text: str | bytes, *, place: str = "recipe") -> Recipe:
        """Reads a recipe file, or a plain JSON object of layer names to format texts.

        Raises:
            StateError: not JSON, a foreign version, or not an object.
            InputError: an entry that is not a format.
        """
        plain = parse_json(text, place=place)
        if isinstance(plain, dict) and "sedimo_recipe" in plain:
            if plain["sedimo_recipe"] != RECIPE_VERSION:
                raise StateError(
                    f"{place} has recipe version {plain['sedimo_recipe']!r}; this Sedimo reads {RECIPE_VERSION}"
                )
            plain = plain.get("layers")
        if not isinstance(plain, dict):
            raise StateError(f"{place} must be an object of layer names to formats, got {type(plain).__name__}")
        return cls.from_mapping(plain)


def compose(choice: Mapping[str, Format], layers: Mapping[str, Sequence[str]], streams: Mapping[str, Stream]) -> Recipe:
    """The recipe of a choice of formats for decisions with these `layers`, of which some are `streams`.

    A stream that is not chosen for is left at fp16; a layer whose streams all are is left alone as a whole.
    """
    parts: dict[str, list[PartFormat]] = defaultdict(list)
    for name in choice.keys() & streams.keys():
        parts[layers[name][0]].append(PartFormat(streams[name].start, streams[name].stop, choice[name]))
    entries: dict[str, Entry] = {}
    for name, number_format in choice.items():
        stream = streams.get(name)
        entry = number_format if stream is None else covering(stream.n_inputs, parts[layers[name][0]])
        entries |= dict.fromkeys(layers[name], entry)
    return Recipe(entries)


def search_space(
    graph: DenoiserGraph,
    formats: str | Iterable[str | Format] = "wide",
    *,
    ends: str | Format | None = None,
    streams: bool | Collection[str] = True,
) -> SearchSpace:
    """The decisions of a graph: one per layer or stream of a layer, one for all layers with equal weights.

    A format that costs at least as much as fp16 on a layer (in either accounting) is dropped there, with a
    note; fp16 itself stays when it is in the list. A layer for which nothing remains stays at fp16. With `ends`,
    the first and the last layers have that format and no choice.

    A layer whose input is a concatenation of streams has a decision for each, if there is a choice at all and no format
    rounds activations: the input of a layer is rounded as a whole, at one width. `streams` may name the layers for
    which that holds; without, every layer has one decision.
    """
    wanted = parse_formats(formats)
    at_ends = wanted if ends is None else parse_formats([ends])
    end_layers = () if ends is None else (*first_layers(graph), *last_layers(graph))
    tied = {name: tie for tie in graph.ties for name in tie}
    found, notes, whole = [], [], []
    for node in graph.layers:
        layers = tied.get(node.name, (node.name,))
        if node.name != layers[0]:
            continue
        offered = wanted if set(end_layers).isdisjoint(layers) else at_ends
        is_cut = len(offered) > 1 and (streams if isinstance(streams, bool) else node.name in streams)
        cuts = graph.streams_of(layers) if is_cut else ()
        if cuts and any(f.activation_bits != FULL_BITS for f in offered):
            whole.append(node.name)
            cuts = ()
        macs = sum(graph.layer_index[name].macs for name in layers)
        decision = Decision(node.name, layers, node.operation, node.block, node.shape, macs, offered)
        found += [_of_stream(decision, cut, number) for number, cut in enumerate(cuts)] or [decision]
    decisions = []
    for decision in found:
        dropped = [f for f in decision.formats if f.is_quantized and not _is_smaller(f, decision.shape)]
        if dropped:
            notes.append(f"{decision.name}: {', '.join(map(str, dropped))} would cost at least fp16 and were dropped")
        refusals = {f: f.numerics.refusal(f, decision.shape) for f in decision.formats}
        notes += [f"{decision.name}: {f} was dropped, because {why}" for f, why in refusals.items() if why]
        kept = tuple(f for f in decision.formats if f not in dropped and not refusals[f]) or (FP16,)
        decisions.append(replace(decision, formats=kept))
    if whole:
        notes.append(
            f"{len(whole)} layers read several streams and have one decision each, because formats with activation "
            f"bits round the input of a layer as a whole: {', '.join(whole)}"
        )
    return SearchSpace(graph.denoiser, graph.digest, tuple(decisions), tuple(notes), graph.attention_macs)


def _of_stream(decision: Decision, stream: Stream, number: int) -> Decision:
    """The decision about one stream of a layer, with its share of weights and MACs; an operation of its own."""
    return replace(
        decision,
        name=stream.named(decision.name),
        operation=f"{decision.operation}[{number}]",
        shape=(decision.shape[0], stream.width, *decision.shape[2:]),
        macs=decision.macs * stream.width // stream.n_inputs,
        stream=stream,
    )


def _is_smaller(number_format: Format, shape: tuple[int, ...]) -> bool:
    return all(size(number_format, shape) < size(FP16, shape) for size in (paper_bytes, stored_bytes))
