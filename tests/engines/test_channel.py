"""Values between two processes: what is sent beside the pickle, and what is not sent again."""

import os
import pickle
import socket
import threading

import pytest
from tiny import says

from fedmed_flower.engines.channel import Channel

LARGE = 1 << 16


@pytest.fixture
def ends():
    """Both ends of a connection, and a count of the bytes that the first one has sent."""
    sockets = socket.socketpair()
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    yield [Channel(each) for each in sockets]
    for each in sockets:
        each.close()


def through(ends, *values, keep=False):
    """Send values from the first end to the second, and return what comes."""
    sender = threading.Thread(target=lambda: [ends[0].send(value, keep) for value in values])
    sender.start()
    received = [ends[1].receive() for _ in values]
    sender.join()
    return received


def test_values_come_as_they_were_sent(ends):
    large = os.urandom(3 * LARGE)
    values = [
        None,
        {"a": [1, 2.5, "text"], "b": b"small"},
        [large, large[:LARGE], large[: LARGE - 1], {"again": large}],
        b"",
        [bytes(2 * LARGE), large],
    ]
    assert through(ends, *values) == values
    assert through(ends, *values, keep=True) == values
    assert through(ends[::-1], *values) == values


def test_large_bytes_of_the_last_value_are_not_sent_again(ends, monkeypatch):
    first, second = os.urandom(LARGE), os.urandom(LARGE)
    lengths = []
    exactly = Channel._exactly

    def counting(self, length):
        lengths.append(length)
        return exactly(self, length)

    monkeypatch.setattr(Channel, "_exactly", counting)
    values = [[first], [first, second], [second], [first], [bytes(first)]]
    received = through(ends, *values, keep=True)
    assert received == values
    # `first` comes again because the value before did not hold it.
    assert lengths.count(LARGE) == 3
    assert received[1][0] is received[0][0]
    assert received[2][0] is received[1][1]
    lengths.clear()
    through(ends, [first], [first])
    # The first of these is kept from before; nothing is kept from it.
    assert lengths.count(LARGE) == 1


def test_a_closed_connection_is_the_end(ends):
    ends[0].send([1])
    ends[0].close()
    assert ends[1].receive() == [1]
    with pytest.raises(EOFError, match=says("the other process has closed the connection")):
        ends[1].receive()
    with pytest.raises(OSError):
        ends[1].send([bytes(1 << 20)])


def test_an_interrupt_within_a_value_leaves_the_connection_torn(ends):
    class Interrupting:
        def __reduce__(self):
            raise KeyboardInterrupt

    assert not ends[0].torn
    with pytest.raises(KeyboardInterrupt):
        ends[0].send(Interrupting())
    assert ends[0].torn
    assert not ends[1].torn


def test_what_pickle_cannot_take_is_not_sent(ends):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        ends[0].send(lambda: None)
