"""Datasets in shards: files anywhere, fetched whole into a local cache of bounded size and read by sample."""
