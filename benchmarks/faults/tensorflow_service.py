"""tf.data service as the peer: `python tensorflow_service.py dispatcher|worker|consumer ...`, where tensorflow is.

Needs nothing but tensorflow, so that it may live in an environment apart.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

EDGE = 400
"""Of the matrices that a sample costs: some milliseconds of a core."""


def dispatch(folder: str) -> None:
    from tensorflow import __version__
    from tensorflow.data.experimental import service

    config = service.DispatcherConfig(port=0, work_dir=folder, fault_tolerant_mode=True)
    server = service.DispatchServer(config)
    say({"target": server.target, "version": __version__})
    server.join()


def work(dispatcher: str, port: str) -> None:
    from tensorflow.data.experimental import service

    config = service.WorkerConfig(dispatcher, worker_address=f"127.0.0.1:{port}", port=int(port))
    server = service.WorkerServer(config)
    say("ready")
    server.join()


def consume(target: str, policy: str, samples: str) -> None:
    """Epoch after epoch, each begun by a line; every sample's number as it comes, then None."""
    import tensorflow as tf

    service = tf.data.experimental.service

    def costly(index: Any) -> Any:
        noise = tf.random.stateless_uniform((EDGE, EDGE), (1, 2)) + tf.cast(index, tf.float32) * 0
        return index + tf.cast(tf.reduce_min(noise @ noise) * 0, tf.int64)

    data = tf.data.Dataset.range(int(samples)).map(costly)
    data = data.apply(service.distribute(service.ShardingPolicy[policy], target, max_outstanding_requests=2))
    say("ready")
    for _ in sys.stdin:
        for index in data:
            say(int(index))
        say(None)


def say(words: Any) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    roles: dict[str, Callable[..., None]] = {"dispatcher": dispatch, "worker": work, "consumer": consume}
    roles[sys.argv[1]](*sys.argv[2:])
