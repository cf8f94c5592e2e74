"""Reads off which layers of two models correspond: by their names, by the shapes of their arrays, and by their order.

Layers correspond one to one, and only layers of one signature, which stands for their arrays, can.  What is left to
decide is which of several layers with the same arrays is which.  A pair is accepted

1. if it is given;
2. if all layers of its signature have the same words and numbers in their names, such as ``layer1.0.conv1`` and
   ``layer1_0/conv_1``;
3. if only this pair has its signature;
4. if words in the names, such as "shortcut", leave only this pair;
5. if it has the same place in the order of both models, and no other pair says that the orders differ.

Order is weak evidence: two layers with the same arrays may be called in another order than they are defined in.  So a
pair of rule 4 or 5 is refused if it crosses another pair (i before j in one model, after it in the other), unless words
tell these two kinds of layers apart; if it crosses another pair in the numbers of otherwise equal names (``conv1`` and
``conv2``, ``Conv_1`` and ``Conv_0``); if the words say one thing and an order in which nothing crosses says another;
or if the mappings are sorted, so that the order of layers with different names is that of the alphabet.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

# Words for the path around the other layers of a block, and words that only say what a layer is or that it is in a
# group, which models use in different ways.
_SHORTCUT = {"downsample", "shortcut", "skip", "proj", "projection"}
_SILENT = {
    *("conv", "convolution", "norm", "bn", "batch", "batchnorm", "normalization", "dense", "linear", "fc", "d"),
    *("layer", "block", "module", "sequential", "feature"),
}


class Layer(NamedTuple):
    """A layer of a model.

    Attributes:
      name: its name or path.
      signature: equal for layers whose arrays correspond.
    """

    name: str
    signature: Hashable


class Model(NamedTuple):
    """The layers of a model.

    Attributes:
      layers: in order.
      is_sorted: whether the order may be that of the alphabet.
    """

    layers: tuple[Layer, ...]
    is_sorted: bool


class Pair(NamedTuple):
    """A layer of the source, one of the target, and how they were matched."""

    source: int
    target: int
    how: str


class Reading(NamedTuple):
    """What the models say.

    Attributes:
      pairs: those accepted.
      open: groups of source and target layers that could correspond in several ways, as indices.
    """

    pairs: tuple[Pair, ...]
    open: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def read(source: Model, target: Model, given: Mapping[int, int]) -> Reading:
    """Matches the layers of two models, which have equally many layers of each signature.

    Args:
      source: one model.
      target: the other.
      given: pairs that are known, by index.

    Returns:
      The pairs by rules 1 to 5, and what remains open.
    """
    classes = _classes(source, target, given)
    same_names, rest = [], {}
    for signature, (sources, targets) in classes.items():
        by_name = {_same(target.layers[t].name): t for t in targets}
        names = [_same(source.layers[s].name) for s in sources]
        if len(by_name) == len(targets) and len({*names}) == len(names) and {*names} == {*by_name}:
            same_names += [Pair(s, by_name[name], "same name") for s, name in zip(sources, names, strict=True)]
        else:
            rest[signature] = (sources, targets)
    words = _telling_words(source, target, rest.values())
    pairs, marks, doubts = [], {}, []
    for sources, targets in rest.values():
        for mark, (cell, counterparts) in _cells(source, target, sources, targets, words).items():
            how = "only one" if len(sources) == 1 else "words" if len(cell) == 1 else "order"
            new = [Pair(s, t, how) for s, t in zip(cell, counterparts, strict=True)]
            pairs += new
            marks |= dict.fromkeys((pair.source for pair in new), mark)
            if _of_unknown_order(source, cell) or _of_unknown_order(target, counterparts):
                doubts.append({*new})
    by_order = {s: t for sources, targets in rest.values() for s, t in zip(sources, targets, strict=True)}
    if not any(_cross(one, other) for one, other in itertools.combinations(sorted(by_order.items()), 2)):
        at = {pair.target: pair for pair in pairs}
        doubts += [{pair, at[by_order[pair.source]]} for pair in pairs if by_order[pair.source] != pair.target]
    crossing = set()
    for one, other in itertools.combinations(pairs, 2):
        if marks[one.source] == marks[other.source] and _cross(one, other):
            crossing |= {one, other}
    same_signature = defaultdict(list)
    for pair in [*same_names, *pairs]:
        same_signature[source.layers[pair.source].signature].append(pair)
    for group in same_signature.values():
        for one, other in itertools.combinations(group, 2):
            if _numbers_cross(source, target, one, other):
                doubts.append({one, other})
        # What crosses may be exchanged with the one before or after it; words tell it from others.
        for mark in {marks.get(pair.source) for pair in group}:
            cell = sorted(pair for pair in group if marks.get(pair.source) == mark)
            for place, pair in enumerate(cell):
                if pair in crossing and pair.how != "only one":
                    doubts.append({*cell[max(place - 1, 0) : place + 2]})
    groups = _merged(doubts)
    doubtful = set().union(*groups)
    accepted = [Pair(s, t, "given") for s, t in given.items()]
    accepted += [pair for pair in [*same_names, *pairs] if pair not in doubtful]
    unclear = sorted((sorted(pair.source for pair in group), sorted(pair.target for pair in group)) for group in groups)
    return Reading(tuple(sorted(accepted)), tuple((tuple(sources), tuple(targets)) for sources, targets in unclear))


def natural_key(name: str) -> tuple:
    """Orders names by their numbers, as in Block_2 before Block_10."""
    return tuple((1, int(token), "") if token.isdigit() else (0, 0, token) for token in _tokens(name))


def _classes(source: Model, target: Model, given: Mapping[int, int]) -> dict[Hashable, tuple[list[int], list[int]]]:
    """Returns the layers of each signature that are not given, in order."""
    classes = defaultdict(lambda: ([], []))
    for side, (model, taken) in enumerate(((source, {*given}), (target, {*given.values()}))):
        for index, layer in enumerate(model.layers):
            if index not in taken:
                classes[layer.signature][side].append(index)
    return classes


def _telling_words(source: Model, target: Model, classes: Iterable[tuple[list[int], list[int]]]) -> frozenset[str]:
    """Returns the words that in each class as many source as target layers have in their names."""
    balance = defaultdict(lambda: defaultdict(int))
    for number, (sources, targets) in enumerate(classes):
        for model, indices, sign in ((source, sources, 1), (target, targets, -1)):
            for index in indices:
                for word in _words(model.layers[index].name):
                    balance[word][number] += sign
    return frozenset(word for word, counts in balance.items() if not any(counts.values()))


def _cells(
    source: Model, target: Model, sources: list[int], targets: list[int], words: frozenset[str]
) -> dict[frozenset[str], tuple[list[int], list[int]]]:
    """Splits the layers of one signature by the telling words in their names."""
    cells = defaultdict(lambda: ([], []))
    for side, (model, indices) in enumerate(((source, sources), (target, targets))):
        for index in indices:
            cells[words & _words(model.layers[index].name)][side].append(index)
    if all(len(cell) == len(counterparts) for cell, counterparts in cells.values()):
        return cells
    return {frozenset(): (sources, targets)}


def _of_unknown_order(model: Model, cell: Sequence[int]) -> bool:
    """Whether layers were put in order by the alphabet, and not by numbers in otherwise equal names."""
    if not model.is_sorted:
        return False
    for one, other in itertools.pairwise(cell):
        # Up to the first difference: Block_0/Conv_1 comes before Block_1/Conv_0, whatever the blocks contain.
        pairs = itertools.zip_longest(_tokens(model.layers[one].name), _tokens(model.layers[other].name))
        if not all((token or "").isdigit() for token in next((a, b) for a, b in pairs if a != b)):
            return True
    return False


def _cross(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two pairs have another order in the source than in the target."""
    return (one[0] < other[0]) != (one[1] < other[1])


def _merged(groups: Iterable[set[Pair]]) -> list[set[Pair]]:
    """Joins groups that have a pair in common."""
    merged = []
    for group in groups:
        touching = [other for other in merged if not other.isdisjoint(group)]
        merged = [other for other in merged if other not in touching] + [group.union(*touching)]
    return merged


def _numbers_cross(source: Model, target: Model, one: Pair, other: Pair) -> bool:
    """Whether numbers in otherwise equal names have another order in the source than in the target."""
    signs = []
    for model, first, second in ((source, one.source, other.source), (target, one.target, other.target)):
        first, second = (_tokens(model.layers[index].name) for index in (first, second))
        if [token if not token.isdigit() else "0" for token in first] != [
            token if not token.isdigit() else "0" for token in second
        ]:
            return False
        signs.append([int(a) for a in first if a.isdigit()] < [int(b) for b in second if b.isdigit()])
    return signs[0] != signs[1]


def _tokens(name: str) -> list[str]:
    """Splits a name into words and numbers: layer1.0.BatchNorm_1 is layer, 1, 0, Batch, Norm, 1."""
    return re.findall(r"\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+", name)


def _words(name: str) -> frozenset[str]:
    """Returns the words in a name that may say which layer it is."""
    words = {token.lower().removesuffix("s") for token in _tokens(name) if not token.isdigit()}
    return frozenset("shortcut" if word in _SHORTCUT else word for word in words - _SILENT)


def _same(name: str) -> tuple[str, ...]:
    """Returns what is equal for the same name in two frameworks, which join its parts differently."""
    return tuple(token.lower() for token in _tokens(name))
