"""Every row of a view of a store, codec `exact`, without the package: `python read_store.py STORE [VIEW]`.

Written from docs/store-format.md. read_compact.py has the codec `compact`.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np


def rows(store, view=0, decode=None):
    """(sample id, class ids, log-probabilities, log of the remaining mass), row by row."""
    for number in itertools.count():  # The generation that has the view.
        suffix = f"-{number:03d}.json" if number else ".json"
        text, manifest = ((Path(store) / f"{name}{suffix}").read_bytes() for name in ("plan", "manifest"))
        plan, manifest, digest = json.loads(text), json.loads(manifest), hashlib.sha256(text).hexdigest()
        assert (plan["format"], plan["version"], manifest["plan_sha256"]) == ("distill-store", 1, digest)
        if view < plan["views"]:
            break
        view -= plan["views"]
    shards = len(plan.get("shard_sizes") or range(0, plan["samples"], plan["shard_rows"]))
    for shard, entry in enumerate(manifest["shards"][view * shards : (view + 1) * shards]):
        content = (Path(store) / entry["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["path"]
        header = json.loads(content[:1024])
        assert (header["plan_sha256"], header["view"]) == (digest, plan["first_view"] + view)
        arrays = {
            name: np.frombuffer(content, dtype, int(np.prod(shape)), first).reshape(shape)
            for name, (dtype, shape, first) in header["arrays"].items()
        }
        yield from (decode or exact)(plan, shard, arrays)


def exact(plan, shard, arrays):
    n = len(arrays["sample_id"])
    ends = np.cumsum(arrays.get("count", np.full(n, plan["top_k"])), dtype=np.int64)[:-1]
    values = (np.split(arrays[name].ravel(), ends) for name in ("class_id", "log_prob"))
    return zip(arrays["sample_id"], *values, arrays["log_tail"], strict=True)


if __name__ == "__main__":
    for row in rows(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0):
        print(*(np.array(part).tolist() for part in row))
