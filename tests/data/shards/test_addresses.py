"""An address means the shards that its writer had in mind, and runs nothing."""

from __future__ import annotations

import json

import pytest
from data.shards.made import mood

from trainfleet.data.shards.addresses import Address, addresses, expanded
from trainfleet.errors import DataError


def test_braces_are_ranges_and_choices():
    assert expanded("s3://b/{a,b}-{08..11}.tar") == [
        f"s3://b/{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10", "11")
    ]
    assert expanded("{9..11}") == ["9", "10", "11"] and expanded("{2..0}") == ["2", "1", "0"]
    assert expanded("{000..002}") == ["000", "001", "002"] and expanded("x{y}z") == ["x{y}z"] and expanded("x") == ["x"]
    with pytest.raises(DataError, match="the most"):
        expanded("{0..99999999999}")
    with pytest.raises(DataError, match="means 1000000000 shards"):
        expanded("{0..999}{0..999}{0..999}")


def test_a_folder_and_a_pattern_of_this_host_are_their_archives_in_order(tmp_path):
    for name in ("b.tar", "a.tar.gz", "c.txt", "d.tgz"):
        (tmp_path / name).touch()
    assert [a.url for a in addresses(tmp_path)] == [f"{tmp_path}/{n}" for n in ("a.tar.gz", "b.tar", "d.tgz")]
    assert [a.url for a in addresses(f"{tmp_path}/?.t*")] == [
        f"{tmp_path}/{n}" for n in ("a.tar.gz", "b.tar", "c.txt", "d.tgz")
    ]
    assert [a.url for a in addresses(["x://1.tar", f"{tmp_path}/b.tar"])] == ["x://1.tar", f"{tmp_path}/b.tar"]


def test_nothing_there_is_said(tmp_path):
    for url in (tmp_path, f"{tmp_path}/*.tar", []):
        with pytest.raises(DataError, match="There is no shard at"):
            addresses(url)


@pytest.mark.parametrize("scheme", ["", "shaky:/"])
def test_an_index_of_webdataset_says_what_there_is(tmp_path, scheme):
    shards = [{"url": "a.tar", "nsamples": 3}, {"url": "s3://b/c.tar", "nsamples": 4, "filesize": 9}]
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    mood(tmp_path)
    found = addresses(f"{scheme}{tmp_path}/index.json")
    assert found == [Address(f"{scheme}{tmp_path}/a.tar", 3), Address("s3://b/c.tar", 4, 9)]


@pytest.mark.parametrize(
    "plain",
    [
        [],
        {},
        "x",
        {"shardlist": 3},
        {"shardlist": [{"url": "a"}]},
        {"shardlist": [{"url": "a", "nsamples": -1}]},
        {"shardlist": [{"url": "pipe:rm", "nsamples": 1}]},
        {"shardlist": [{"url": 4, "nsamples": 1}]},
    ],
)
def test_another_json_is_refused(tmp_path, plain):
    (tmp_path / "i.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match="no index with a `shardlist`"):
        addresses(tmp_path / "i.json")


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/x", "local:///etc/x", "memory://x", "simplecache::s3://b/x"]
)
def test_an_index_from_elsewhere_names_no_file_of_this_host(tmp_path, url):
    (tmp_path / "i.json").write_text(json.dumps({"shardlist": [{"url": url, "nsamples": 1}]}))
    with pytest.raises(DataError, match="it is from elsewhere and names"):
        addresses(f"shaky:/{tmp_path}/i.json")
    (tmp_path / "i.json").write_text(json.dumps({"base": "/etc", "shardlist": [{"url": "x", "nsamples": 1}]}))
    with pytest.raises(DataError, match="it is from elsewhere and names '/etc/x'"):
        addresses(f"shaky:/{tmp_path}/i.json")


def test_commands_are_not_run():
    with pytest.raises(DataError, match="would run a command"):
        addresses("pipe:curl http://x/{0..3}.tar")
