"""The store of teacher logits, version 1: `plan` says what it is, `exact` how a shard is laid out, `writer` and
`reader` mirror each other. numpy and h5py only; docs/store-format.md is the specification."""
