"""Pictures that are there more than once: the same bytes, or the same look."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import combinations

from library.dataset.picture_files import Decoded

MAX_BITS = 3  # of the 64 of the hash, in which pictures that are alike differ, unless said otherwise
MAX_COLOUR = 8  # of 255, by which their mean colours differ
MIN_BITS_SET = 5  # pictures with hardly an edge look alike without being so
MAX_NEIGHBOURS = 16  # of the looks that share two bands, how many each is compared with

Look = tuple[int, int]  # as by picture_files.look_of
Groups = list[list[str]]  # sorted, each of two pictures or more


def same_pictures(decoded: Mapping[str, Decoded]) -> Groups:
    """Groups of files with the same bytes."""
    return _groups((file, (picture.content, picture.num_bytes)) for file, picture in decoded.items())


def like_pictures(decoded: Mapping[str, Decoded], max_bits: int = MAX_BITS) -> Groups:
    """Groups of pictures whose looks differ in few bits, without those that only have the same bytes.

    Hashes that differ in n bits are equal in two of n + 2 bands or more. Each look is put into all combinations of two
    bands (W. Manku et al., "Detecting near-duplicates
    for web crawling", 2007, section 3), and compared with its next neighbours there: time grows with the number of
    pictures, not with its square. Where very many pictures look nearly alike, some pairs are not found.
    """
    first_of = {(decoded[file].content, decoded[file].num_bytes): file for file in sorted(decoded, reverse=True)}
    looks = {file: (decoded[file].look, decoded[file].colour) for file in first_of.values()}
    looks = {file: look for file, look in looks.items() if MIN_BITS_SET <= look[0].bit_count() <= 64 - MIN_BITS_SET}
    root_of = _joined(sorted(set(looks.values())), max_bits)
    return _groups((file, root_of(look)) for file, look in looks.items())


def are_alike(one: Look, other: Look, max_bits: int = MAX_BITS) -> bool:
    """Whether two looks differ in few bits, and little in colour."""
    if (one[0] ^ other[0]).bit_count() > max_bits:
        return False
    return all(abs((one[1] >> shift & 255) - (other[1] >> shift & 255)) <= MAX_COLOUR for shift in (0, 8, 16))


def _groups(keys: Iterable[tuple[str, Hashable]]) -> Groups:
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for file, key in keys:
        groups[key].append(file)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _joined(looks: list[Look], max_bits: int) -> Callable[[Look], Look]:
    """A function that gives the looks of one group the same look of theirs."""
    parents: dict[Look, Look] = {}

    def root(look: Look) -> Look:
        while (parent := parents.get(look, look)) != look:
            look = parent
        return look

    for mask in _masks(max_bits + 2):
        for members in _sharing(looks, mask):
            for place, look in enumerate(members):
                for other in members[place + 1 : place + 1 + MAX_NEIGHBOURS]:
                    if are_alike(look, other, max_bits):
                        parents[root(other)] = root(look)
    return root


def _sharing(looks: list[Look], mask: int) -> Iterable[list[Look]]:
    """Looks whose hashes are equal in the bits of a mask, where there are two or more."""
    keys = [look & mask for look, _ in looks]
    shared = {key for key, count in Counter(keys).items() if count > 1}
    groups: dict[int, list[Look]] = defaultdict(list)
    for key, look in zip(keys, looks, strict=True):
        if key in shared:
            groups[key].append(look)
    return groups.values()


def _masks(num_bands: int) -> list[int]:
    """The bits of two bands, for each pair of bands."""
    edges = [64 * band // num_bands for band in range(num_bands + 1)]
    bands = [(1 << end) - (1 << start) for start, end in zip(edges, edges[1:], strict=False)]
    return [one | other for one, other in combinations(bands, 2)]
