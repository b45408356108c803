"""All that is private of TensorFlow, each with its reason."""

import functools


def set_heartbeat(seconds):
    """How long a worker may be silent before TensorFlow takes it for dead.

    The strategy configures the coordination service itself and has no argument for it, and
    TensorFlow has no public function: only its context object takes the number.
    """
    from tensorflow.python.eager import context

    context = context.context()
    context.configure_coordination_service = functools.partial(
        type(context).configure_coordination_service,
        context,
        heartbeat_timeout_in_ms=int(1000 * seconds),
    )
