"""Bytes and seconds of the rounds, by site."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmed_flower.server.traffic import Traffic, saved, size_of, traffic_of


def test_the_size_of_a_content_is_that_of_its_parts():
    arrays = ArrayRecord({"w": Array(np.zeros(10, np.float32))})
    bare = len(arrays["w"].data)
    content = RecordDict(
        {
            "arrays": arrays,
            "metrics": MetricRecord({"loss": 0.5, "counts": [1, 2, 3]}),
            "config": ConfigRecord({"name": "north", "png": b"1234"}),
        }
    )
    assert size_of(content) == (1 + bare) + (4 + 8) + (6 + 24) + (4 + 5) + (3 + 4)
    assert bare >= 40


def test_traffic_survives_json_and_refuses_what_it_cannot_be():
    traffic = Traffic()
    traffic.add(100, 40, 0.5)
    traffic.add(100, 60, 1.5)
    table = json.loads(json.dumps({"north": traffic.table()}))
    assert traffic_of(table) == {"north": Traffic(2, 200, 100, 2.0)}
    assert traffic_of(None) == {}
    for wrong in (-1, float("nan"), float("inf"), True, 1e30):
        with pytest.raises(ValueError, match="seconds of the traffic is"):
            traffic_of({"north": table["north"] | {"seconds": wrong}})
    with pytest.raises(KeyError):
        traffic_of({"north": {}})


def test_what_codes_have_saved_is_read_from_any_version_and_may_be_less_than_nothing():
    table = {"replies": 1, "bytes-to-site": 9, "bytes-from-site": 4, "seconds": 0.5}
    assert traffic_of({"north": table})["north"].bytes_saved == 0
    assert traffic_of({"north": table | {"bytes-saved": -3}})["north"].bytes_saved == -3
    for wrong in (float("nan"), -1e30, 1e30, True):
        with pytest.raises(ValueError, match="bytes_saved of the traffic is"):
            traffic_of({"north": table | {"bytes-saved": wrong}})
    traffic = {"north": Traffic(2, 200, 30, 1.0, 70), "south": Traffic(2, 200, 40, 1.0, -10)}
    assert saved(traffic) == {"from-sites": [70, 130], "to-sites": [400, 400]}
    assert saved({}) == {"from-sites": [0, 0], "to-sites": [0, 0]}
