"""What a server learns that uses Flower's SecAgg+ otherwise than Flower's own server does.

All that hospitals do is done by Flower's mod, and the server's other stages are Flower's too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation import quantization, secaggplus_utils
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
    Stage,
)
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)
from peers.costs import Weights, vectors_of
from peers.secaggplus import EXAMPLES, Exchange, Hospital, hospitals_of, mean_of, run_round


class AskingTwice(SecAggPlusWorkflow):
    """Flower's server with another last request: it names one hospital as alive *and* as lost.

    The other stages are Flower's. For the hospital that is alive, others give shares of the seed of
    its own mask; for one that is lost, shares of the key of its masks with others. Of both the
    server takes all masks off that hospital's vector.

    Parameters
    ----------
    victim : int
        Node whose weights the server wants.
    threshold : int
        That the server tells hospitals; 1 if one hospital's shares are to be enough.
    asked : sequence of int
        Nodes that get the request.

    Attributes
    ----------
    weights : array or None
        What was recovered.
    step : float
        Quantisation step of the recovered weights.
    """

    def __init__(self, victim: int, threshold: int, asked: Sequence[int]) -> None:
        super().__init__(1.0, 0.5)
        # The constructor turns 1 into "all"; what hospitals accept is asked here.
        self.reconstruction_threshold = threshold
        self.victim = victim
        self.asked = asked
        self.weights: Weights | None = None
        self.step = 0.0

    def unmask_stage(self, grid: Any, context: LegacyContext, state: Any) -> bool:
        """Ask for both kinds of shares in one request, and open the victim's vector."""
        uploads = {reply.metadata.src_node_id: reply for reply in grid.received}
        record = uploads[self.victim].content.config_records[RECORD_KEY_CONFIGS]
        masked = [bytes_to_ndarray(each) for each in record[Key.MASKED_PARAMETERS]]
        request = {
            Key.STAGE: Stage.UNMASK,
            Key.ACTIVE_NODE_ID_LIST: sorted(state.active_node_ids),
            Key.DEAD_NODE_ID_LIST: [self.victim],
        }
        messages = [
            Message(
                RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(dict(request))}),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
            )
            for node in self.asked
        ]
        of_seed = []
        of_key = []
        for reply in grid.send_and_receive(messages):
            answer = reply.content.config_records[RECORD_KEY_CONFIGS]
            shares = list(zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True))
            # Alive hospitals stand first, lost ones last.
            of_seed.append(dict(shares[:-1])[self.victim])
            of_key.append(shares[-1][1])
        self._open(masked, combine_shares(of_seed), combine_shares(of_key), state)
        return True

    def _open(self, masked: list[Any], seed: bytes, key: bytes, state: Any) -> None:
        """Take the masks off the victim's vector, and set what was recovered."""
        shapes = get_parameters_shape(masked)
        draw = secaggplus_utils.pseudo_rand_gen
        opened = parameters_subtraction(masked, draw(seed, state.mod_range, shapes))
        for node in state.nid_to_neighbours[self.victim] - {self.victim}:
            public = bytes_to_public_key(state.nid_to_publickeys[node][0])
            shared = generate_shared_key(bytes_to_private_key(key), public)
            mask = draw(shared, state.mod_range, shapes)
            # A hospital adds the mask of a pair if its own node id is the larger one.
            undo = parameters_subtraction if self.victim > node else parameters_addition
            opened = undo(opened, mask)
        ratio, values = factor_extract(parameters_mod(opened, state.mod_range))
        share = int(ratio) / state.quantization_range
        weighted = quantization.dequantize(values, state.clipping_range, state.quantization_range)
        self.weights = weighted[0] / share
        self.step = 2 * state.clipping_range / state.quantization_range / share


class Opened(NamedTuple):
    """What the server got of one hospital.

    Attributes
    ----------
    difference : float
        The largest between recovered and true weights.
    step : float
        Quantisation step of a weight.
    largest : float
        The largest weight.
    asked : int
        Hospitals that got the request, once each.
    """

    difference: float
    step: float
    largest: float
    asked: int


def opened(vectors: Sequence[Weights], *, threshold: int) -> Opened:
    """Return what one changed request tells of the second hospital's weights.

    Parameters
    ----------
    vectors : sequence of arrays of float32
    threshold : int
        Of 1 the hospital itself is asked; of more, as many others.
    """
    exchange = Exchange(hospitals_of(vectors))
    first, victim, *rest = exchange.hospitals
    asked = [victim] if threshold == 1 else [first, *rest][:threshold]
    server = AskingTwice(victim, threshold, asked)
    run_round(server, exchange)
    if server.weights is None:
        raise RuntimeError("the round ended before the last request")
    difference = float(np.abs(server.weights - vectors[1]).max())
    largest = float(np.abs(vectors[1]).max())
    return Opened(difference, server.step, largest, len(asked))


def seed_of_32_bits() -> bool:
    """Tell whether the masks of a seed of 32 bytes are those of one of 4 bytes, its words' XOR."""
    seed = os.urandom(32)
    short = folded(seed).to_bytes(4, "little")
    draw = secaggplus_utils.pseudo_rand_gen
    one, other = (draw(each, 2**32, [(1000,)])[0] for each in (seed, short))
    return bool((one == other).all())


def folded(seed: bytes) -> int:
    """Return the XOR of a seed's words of 4 bytes."""
    return int(np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")))


def varying_bits(keys: int = 100) -> int:
    """Return how many bits of the 32 differ between the seeds of `keys` pairs of hospitals."""
    own, _ = generate_key_pairs()
    seeds = [folded(generate_shared_key(own, generate_key_pairs()[1])) for _ in range(keys)]
    return int(np.bitwise_or.reduce(seeds) ^ np.bitwise_and.reduce(seeds)).bit_count()


def threshold_of_one() -> bool:
    """Tell whether hospitals take part with a threshold of 1, and one opens its own vector."""
    found = opened(vectors_of(1000, 5), threshold=1)
    return found.difference <= found.step


def keys_unsigned() -> bool:
    """Tell whether a hospital encrypts its shares with keys that the server has made.

    The server hands it four pairs of keys of its own in place of the other hospitals', and reads
    the seed of the hospital's own mask out of what comes back.
    """
    hospital = Hospital(11, vectors_of(10, 1)[0], EXAMPLES)
    exchange = Exchange({11: hospital})
    setup = {
        Key.SAMPLE_NUMBER: 5,
        Key.SHARE_NUMBER: 5,
        Key.THRESHOLD: 3,
        Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 2**22,
        Key.MOD_RANGE: 2**32,
        Key.MAX_WEIGHT: 1000.0,
    }
    hello = asked_alone(exchange, Stage.SETUP, setup)
    false_keys = {node: [generate_key_pairs(), generate_key_pairs()] for node in range(12, 16)}
    shown = {
        str(node): [public_key_to_bytes(public) for _, public in pairs]
        for node, pairs in false_keys.items()
    }
    shown["11"] = [hello[Key.PUBLIC_KEY_1], hello[Key.PUBLIC_KEY_2]]
    answer = asked_alone(exchange, Stage.SHARE_KEYS, shown)
    theirs = bytes_to_public_key(hello[Key.PUBLIC_KEY_2])
    shares = []
    for node, envelope in zip(
        answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True
    ):
        private, _ = false_keys[node][1]
        text = decrypt(generate_shared_key(private, theirs), envelope)
        shares.append(secaggplus_utils.share_keys_plaintext_separate(text)[2])
    true = hospital.context.state.config_records[RECORD_KEY_STATE]["rd_seed"]
    return combine_shares(shares[:3]) == true


def asked_alone(exchange: Exchange, stage: str, config: dict[str, Any]) -> ConfigRecord:
    """Return what hospital 11 answers to one message."""
    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({**config, Key.STAGE: stage})})
    message = Message(content, dst_node_id=11, message_type=MessageType.TRAIN)
    [reply] = exchange.send_and_receive([message])
    return reply.content.config_records[RECORD_KEY_CONFIGS]


class Clipped(NamedTuple):
    """Mean of weights of which one is out of range, and how many warnings Flower logged."""

    mean: float
    warnings: int


def clipped(weight: float, examples: int) -> Clipped:
    """Return the mean that five hospitals get who all send one weight, and have equally many rows.

    Weight times rows is 20 in Flower's unit, and its default range ends at 8, if ``weight *
    examples`` is 20,000.
    """
    vector = np.full(10, weight, np.float32)
    exchange = Exchange({node: Hospital(node, vector, examples) for node in range(11, 16)})
    warnings: list[logging.LogRecord] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            warnings.append(record)
        return False

    logger = logging.getLogger("flwr")
    logger.addFilter(collect)
    try:
        mean = mean_of(exchange)
    finally:
        logger.removeFilter(collect)
    return Clipped(float(mean.mean()), len(warnings))


def counts_in_clear() -> bool:
    """Tell whether the reply with the masked vector has rows and metrics that can be read."""
    found = []

    class Reading(SecAggPlusWorkflow):
        def unmask_stage(self, grid: Any, context: LegacyContext, state: Any) -> bool:
            results = [compat.recorddict_to_fitres(each.content, True) for each in grid.received]
            found.extend((each.num_examples, each.metrics) for each in results)
            return True

    exchange = Exchange(hospitals_of(vectors_of(10, 5)))
    run_round(Reading(1.0, 3), exchange)
    told = {(each.examples, 0.5) for each in exchange.hospitals.values()}
    return {(count, metrics["loss"]) for count, metrics in found} == told
