"""Names of Flower that it does not call public: each test fails when one moves."""

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity


def test_a_message_holds_its_metadata_and_id_where_they_are_set():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
    message = Message(RecordDict(), 5, "train")
    assert message.__dict__["_metadata"] is message.metadata
    message.metadata.__dict__["_message_id"] = "here"
    assert message.metadata.message_id == "here"


def test_flower_sends_the_text_of_an_exception_in_the_form_that_is_reduced():
    from flwr.app import Error

    from fedmed_flower.data.site import _simulating
    from fedmed_flower.server.screening import error_text

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
    sent = Message(RecordDict(), 5, "train")
    error = KeyError("4712 John Doe")
    reason = str(type(error)) + ":<'" + str(error) + "'>"
    reply = Message(Error(code=2, reason=reason), reply_to=sent)
    assert "John Doe" in error_text(reply)
    token = _simulating.set(False)
    try:
        assert error_text(reply) == "KeyError"
    finally:
        _simulating.reset(token)
