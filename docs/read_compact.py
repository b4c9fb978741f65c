"""Every row of a view of a store, codec `compact`, without the package: `python read_compact.py STORE [VIEW]`.

Written from docs/store-format.md, section 6, in whole numbers; one row at a time, so slow.
"""

import math
import sys

from read_store import rows


def compact(plan, shard, arrays):
    sizes, freq, tables = arrays["symbols"].tolist(), arrays["freq"].tolist(), []
    for size in sizes:
        tables.append(freq[:size])
        freq = freq[size:]
    samples = sample_ids(plan, shard, set(arrays["skipped"].tolist()))
    content, begin = arrays["rows"].tobytes(), 0
    for sample, length in zip(samples, arrays["length"].tolist(), strict=True):
        coder = Coder(content[begin : (begin := begin + length)], arrays["map"].tolist(), tables)
        yield sample, *row(coder, plan, arrays["centre"].tolist())


class Coder:
    def __init__(self, content, table_of, tables):
        self.content, self.table_of, self.tables = content, table_of, tables
        self.words = (len(content) - 5) // 4 if len(content) > 8 else 0
        self.state = int.from_bytes(content[4 * self.words :], "little")

    def number(self, context):
        freq, symbol, first = self.tables[self.table_of[context]], 0, 0
        while first + freq[symbol] <= self.state % 2048:
            first, symbol = first + freq[symbol], symbol + 1
        self.state = freq[symbol] * (self.state // 2048) + self.state % 2048 - first
        if symbol < 32:
            return self.filled(symbol)
        bits = (symbol - 32) // 4 + 3
        return (4 + symbol % 4) * 2**bits + self.raw(bits)

    def raw(self, bits):
        number, self.state = self.state % 2**bits, self.state >> bits
        return self.filled(number)

    def filled(self, number):
        if self.state < 2**31 and self.words:
            self.words -= 1
            self.state = self.state << 32 | int.from_bytes(self.content[4 * self.words :][:4], "little")
        return number


def row(coder, plan, centre):
    classes, most, scale = plan["teacher"]["num_classes"], plan["top_k"] + plan["sample"], 9 << plan["bits"] - 3
    most = min(classes, most)
    count = coder.number(0) + 1 if plan["sample"] or plan["keep_mass"] is not None else most
    least, class_id, size, before, entries = coder.number(1), -1, 1, 1, []
    for _ in range(count):
        gap, level = coder.number(2 + 3 * size + before), coder.number(11 + min(symbol(least), 31))
        class_id += gap + 1
        entries.append((class_id, least + level - 1 if level else None))
        limits = symbol(classes // (4 * most)), symbol(classes // most)
        size, before = sum(symbol(gap) > limit for limit in limits), size
    tail = 64 * coder.number(43 + min(symbol(least), 31)) + coder.raw(6)
    log_tail = (64 - tail) / 128 if tail >= 64 else -math.inf
    entries.sort(key=lambda entry: (entry[1] is not None, -(entry[1] or 0), entry[0]))
    prob = [None if level is None else probability(level, scale, centre) for _, level in entries]
    if prob[0] is None:
        prob[0] = max([1 - math.exp(log_tail) - sum(prob[1:]), 1e-30, *prob[1:2]])
    return [name for name, _ in entries], [math.log(p) if p else -math.inf for p in prob], log_tail


def probability(level, scale, centre):
    if 1 <= level <= 16:
        begin = level - 0.5 if level > 1 else 0
        level = begin + (level + 0.5 - begin) * (centre[level - 1] + 0.5) / 65536
    return (level / scale) ** 2.5


def symbol(number):
    high = number.bit_length() - 1
    return number if number < 32 else 4 * high + 12 + (number >> high - 2) % 4


def sample_ids(plan, shard, skipped):
    """The samples of a shard: those whose place it has."""
    if sizes := plan.get("shard_sizes"):
        return [sum(sizes[:shard]) + place for place in range(sizes[shard]) if place not in skipped]
    first, n = shard * plan["shard_rows"], plan["samples"]
    places = range(first, min(first + plan["shard_rows"], n))
    return [sample(first + place, n) for place in range(len(places)) if place not in skipped]


def sample(place, n):
    bits = max(2, (n - 1).bit_length())
    widths = bits // 2, bits - bits // 2
    while True:
        left, right = place >> widths[1], place & (1 << widths[1]) - 1
        for t in (3, 2, 1, 0):
            v = (left + (t + 1) * 0x9E3779B97F4A7C15) % 2**64
            v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            v = (v ^ v >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right ^ (v ^ v >> 31) & (1 << widths[t % 2]) - 1, left
        place = left << widths[1] | right
        if place < n:
            return place


if __name__ == "__main__":
    for found in rows(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0, compact):
        print(*found)
